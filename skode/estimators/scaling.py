"""Statistics of the training rows that a network's inputs are scaled by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from sklearn.utils import gen_batches

from skode.models import Encoding, InputScale, ODENetConfig

N_BINS = 8
QUANTILE_ROWS = 20_000  # enough to place so few


def input_scale(X: NDArray[Any], sample_weight: NDArray[Any], config: ODENetConfig, unit_variance: bool) -> InputScale:
    """Weighted means, scales and quantiles of the columns; one mean and scale for all pixels of an image."""
    if config.image_shape is not None:
        return _pixel_scale(X, sample_weight)
    scaler = StandardScaler(copy=False)
    for rows in gen_batches(len(X), 2**16):
        scaler.partial_fit(X[rows], sample_weight=sample_weight[rows])
    mean, scale = np.asarray(scaler.mean_, np.float64), np.asarray(scaler.scale_, np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        column = int(np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale)))[0])
        raise ValueError(f"column {column} of X is too large to be standardised; rescale it.")
    encoding = None
    if config.n_encoded:
        part = slice(None, None, max(1, len(X) // QUANTILE_ROWS))
        Z = (np.asarray(X[part], np.float64) - mean) / scale
        encoding = Encoding.fit(Z, sample_weight[part], N_BINS, unit_variance=unit_variance)
    return InputScale(mean, scale, encoding)


def _pixel_scale(X: NDArray[Any], sample_weight: NDArray[Any]) -> InputScale:
    share = sample_weight / sample_weight.sum()
    mean = float(share @ X.mean(axis=1, dtype=np.float64))
    variance = float(share @ X.var(axis=1, dtype=np.float64)) + float(share @ (X.mean(axis=1) - mean) ** 2)
    n_features = X.shape[1]
    return InputScale(np.full(n_features, mean), np.full(n_features, np.sqrt(variance) or 1.0))
