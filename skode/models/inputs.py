"""From a row of X to what a network can read: standardised, smoothly clipped, or encoded piecewise linearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

CLIP = 3.0  # standard deviations; beyond, values approach this bound smoothly


@dataclass(frozen=True)
class InputScale:
    """Statistics of the training rows that the model's inputs are scaled by.

    Parameters
    ----------
    mean, scale : arrays of shape (n_features,)
        A scale of 1 goes with constant columns.
    edges : array of shape (n_features, n_bins + 1) or None
        Quantiles of the columns, for the piecewise-linear encoding.
    """

    mean: NDArray[Any]
    scale: NDArray[Any]
    edges: NDArray[Any] | None = None


class InputLayer(nn.Module):
    """Standardise and clip; encode piecewise linearly on request.

    The encoding (Gorishniy et al. 2022, arXiv:2203.05556) gives each bin between two quantiles a unit that rises from
    0 to 1 across it, which lets a smooth network follow thresholds.

    Parameters
    ----------
    n_features : int
    n_bins : int
        0 for no encoding.
    """

    def __init__(self, n_features: int, n_bins: int) -> None:
        super().__init__()
        self.n_bins = n_bins
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("factor", torch.ones(n_features))
        if n_bins:
            self.register_buffer("left", torch.zeros(n_features, n_bins))
            self.register_buffer("steepness", torch.zeros(n_features, n_bins))

    @torch.no_grad()
    def set(self, scale: InputScale) -> None:
        """Take over the training rows' statistics."""
        buffers: dict[str, Tensor] = dict(self.named_buffers())
        buffers["mean"].copy_(torch.from_numpy(scale.mean))
        buffers["factor"].copy_(torch.from_numpy(1 / scale.scale))
        if self.n_bins:
            assert scale.edges is not None
            edges = (scale.edges - scale.mean[:, None]) / scale.scale[:, None]
            width = np.diff(edges, axis=1)
            # A bin without width (tied quantiles) gets no unit.
            steepness = np.divide(1.0, width, out=np.zeros_like(width), where=width > 1e-9)
            buffers["left"].copy_(torch.from_numpy(edges[:, :-1]))
            buffers["steepness"].copy_(torch.from_numpy(steepness))

    def standardise(self, X: Tensor) -> Tensor:
        """(x - mean) / scale, shape (..., n_features)."""
        mean, factor = self._two("mean", "factor")
        return (X - mean).mul_(factor)

    @staticmethod
    def clip(z: Tensor) -> Tensor:
        """z / sqrt(1 + (z / 3)^2): the identity for usual values, bounded by 3 for any."""
        # hypot does not overflow where the square of an outlier would.
        return z / torch.hypot(z.new_ones(()), z / CLIP)

    def encode(self, z: Tensor) -> Tensor:
        """Units in [0, 1], shape (..., n_features * n_bins), from standardised values."""
        left, steepness = self._two("left", "steepness")
        return (z.unsqueeze(-1) - left).mul_(steepness).clamp_(0, 1).flatten(-2)

    def _two(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        return getattr(self, first), getattr(self, second)
