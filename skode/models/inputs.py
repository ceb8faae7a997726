"""From a row of X to what a network can read: standardised, smoothly clipped, or encoded piecewise linearly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_ENCODING = ("slope", "offset", "low", "high")
CLIP = 3.0  # standard deviations; beyond, values approach this bound smoothly


@dataclass(frozen=True)
class InputScale:
    """Statistics of the training rows that the model's inputs are scaled by.

    Parameters
    ----------
    mean, scale : arrays of shape (n_features,)
        A scale of 1 goes with constant columns.
    encoding : Encoding, optional
    """

    mean: NDArray[Any]
    scale: NDArray[Any]
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Encoding:
    """The piecewise-linear encoding's units: min(max(slope z + offset, low), high) of a standardised column z.

    All arrays have shape (n_units,); ``column`` tells which column a unit reads.
    """

    column: NDArray[np.int64]
    slope: NDArray[Any]
    offset: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def fit(
        cls, columns: Iterable[NDArray[Any]], weights: NDArray[Any], n_bins: int, *, unit_variance: bool
    ) -> Encoding:
        """Place the bins between weighted quantiles of the standardised columns; tied quantiles share one.

        A unit rises from 0 to 1 across its bin; the outermost ones go on for one more width. Units are centred, and
        divided by their deviation (at least 0.05) with ``unit_variance``.
        """
        units = [_encode_column(z, weights, n_bins, unit_variance) for z in columns]
        column = np.repeat(np.arange(len(units)), [len(unit[0]) for unit in units])
        return cls(column, *(np.concatenate(part) for part in zip(*units, strict=True)))


def _encode_column(
    z: NDArray[Any], weights: NDArray[Any], n_bins: int, unit_variance: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    levels = np.linspace(0, 1, n_bins + 1)
    edges = np.quantile(z, levels, weights=weights, method="inverted_cdf")
    edges = edges[np.diff(edges, prepend=-np.inf) > 1e-9]
    slope = 1 / np.diff(edges)
    offset = -edges[:-1] * slope
    low, high = np.zeros_like(slope), np.ones_like(slope)
    low[:1], high[-1:] = -1.0, 2.0
    units = np.clip(z[:, None] * slope + offset, low, high)
    center = np.average(units, axis=0, weights=weights)
    factor = np.ones_like(slope)
    if unit_variance:
        deviation = np.sqrt(np.average((units - center) ** 2, axis=0, weights=weights))
        factor = 1 / np.maximum(deviation, 0.05)
    return slope * factor, (offset - center) * factor, (low - center) * factor, (high - center) * factor


class InputLayer(nn.Module):
    """Standardise and clip; encode piecewise linearly on request.

    The encoding (Gorishniy et al. 2022, arXiv:2203.05556) gives each bin between two quantiles a unit that rises
    across it, which lets a smooth network follow thresholds.

    Parameters
    ----------
    n_features : int
    n_units : int
        Of the encoding; 0 for none.
    """

    def __init__(self, n_features: int, n_units: int) -> None:
        super().__init__()
        self.n_units = n_units
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("factor", torch.ones(n_features))
        if n_units:
            self.register_buffer("column", torch.zeros(n_units, dtype=torch.int64))
        for name in _ENCODING if n_units else ():
            self.register_buffer(name, torch.zeros(n_units))

    @torch.no_grad()
    def set(self, scale: InputScale) -> None:
        """Take over the training rows' statistics."""
        buffers: dict[str, Tensor] = dict(self.named_buffers())
        buffers["mean"].copy_(torch.from_numpy(scale.mean))
        buffers["factor"].copy_(torch.from_numpy(1 / scale.scale))
        for name in ("column", *_ENCODING) if self.n_units else ():
            buffers[name].copy_(torch.from_numpy(getattr(scale.encoding, name)))

    def standardise(self, X: Tensor) -> Tensor:
        """(x - mean) / scale, shape (..., n_features)."""
        mean, factor = self._some("mean", "factor")
        return (X - mean).mul_(factor)

    @staticmethod
    def clip(z: Tensor) -> Tensor:
        """Z / sqrt(1 + (z / 3)^2): the identity for usual values, bounded by 3 for any."""
        # hypot does not overflow where the square of an outlier would.
        if not torch.compiler.is_compiling():
            return z / torch.hypot(z.new_ones(()), z / CLIP)
        # ONNX has no hypot.
        largest = (z / CLIP).abs().clamp(min=1.0)
        return z / (largest * (largest.reciprocal().square() + (z / CLIP / largest).square()).sqrt())

    def encode(self, z: Tensor) -> Tensor:
        """The encoding's units, shape (..., n_units), of standardised values."""
        column, slope, offset, low, high = self._some("column", *_ENCODING)
        units = torch.addcmul(offset, z.index_select(-1, column), slope)
        return torch.minimum(torch.maximum(units, low), high)

    def _some(self, *names: str) -> list[Tensor]:
        return [getattr(self, name) for name in names]
