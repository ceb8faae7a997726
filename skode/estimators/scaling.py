"""Statistics of the training rows that a network's inputs are scaled by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler
from sklearn.utils import gen_batches

from skode.models import Encoding, InputScale, ODENetConfig
from skode.runtime import current_peers

N_BINS = 8
QUANTILE_ROWS = 20_000  # enough to place so few


def input_scale(X: NDArray[Any], sample_weight: NDArray[Any], config: ODENetConfig, unit_variance: bool) -> InputScale:
    """Weighted means, scales and quantiles of the columns; one mean and scale for all pixels of an image."""
    if config.image_shape is not None:
        return _pixel_scale(X, sample_weight)
    peers = current_peers()
    scaler = peers.relay(StandardScaler(copy=False), lambda scaler: _scaled_on(scaler, X, sample_weight))
    mean, scale = np.asarray(scaler.mean_, np.float64), np.asarray(scaler.scale_, np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        column = int(np.flatnonzero(~(np.isfinite(mean) & np.isfinite(scale)))[0])
        raise ValueError(f"column {column} of X is too large to be standardised; rescale it.")
    encoding = None
    if config.n_encoded:
        first, n_all = peers.rows(len(X))
        every = max(1, n_all // QUANTILE_ROWS)
        part = slice(-first % every, None, every)
        Z = (np.asarray(X[part], np.float64) - mean) / scale
        # Where rows lie in several processes, a column at a time is looked at.
        columns = (np.concatenate(peers.gather(z)) for z in Z.T)
        weights = np.concatenate(peers.gather(sample_weight[part]))
        encoding = Encoding.fit(columns, weights, N_BINS, unit_variance=unit_variance)
    return InputScale(mean, scale, encoding)


def _scaled_on(scaler: StandardScaler, X: NDArray[Any], sample_weight: NDArray[Any]) -> StandardScaler:
    for rows in gen_batches(len(X), 2**16):
        scaler.partial_fit(X[rows], sample_weight=sample_weight[rows])
    return scaler


def _pixel_scale(X: NDArray[Any], sample_weight: NDArray[Any]) -> InputScale:
    peers = current_peers()
    share = sample_weight / peers.add_up(float(sample_weight.sum()))
    mean = peers.add_up(float(share @ X.mean(axis=1, dtype=np.float64)))
    variance = peers.add_up(
        float(share @ X.var(axis=1, dtype=np.float64)) + float(share @ (X.mean(axis=1) - mean) ** 2)
    )
    n_features = X.shape[1]
    return InputScale(np.full(n_features, mean), np.full(n_features, np.sqrt(variance) or 1.0))
