"""Noise that belongs to a row's content: equal rows get equal noise, so that a weight of 2 is the row twice."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.runtime import key_uniforms, kronecker_steps, row_keys

_SMALLEST = 2.0**-53


class RowNoise:
    """A low-discrepancy sequence for each row, begun at a place that the row's content and a seed decide.

    The k-th point of a row is its start plus k times the step of the R-sequence (a Kronecker sequence whose step comes
    from the root of x^(m + 1) = x + 1, m being the number of columns), modulo 1.

    Parameters
    ----------
    X : array of shape (n, p)
        The rows' content.
    n_columns : int
        m, how many numbers a point has.
    seed : int
    """

    def __init__(self, X: NDArray[np.float64], n_columns: int, seed: int) -> None:
        self._start = torch.from_numpy(np.ascontiguousarray(key_uniforms(row_keys(X, seed), n_columns)))
        self._step = torch.from_numpy(kronecker_steps(n_columns))

    def draw(self, rows: Tensor, k: Tensor | int) -> Tensor:
        """Points of some rows in (0, 1), float64 (len(rows), m); ``k`` is a number, or one for each row."""
        count = k.unsqueeze(1) if isinstance(k, Tensor) else k
        return torch.remainder(self._start[rows] + count * self._step, 1.0).clamp_(_SMALLEST, 1 - _SMALLEST)
