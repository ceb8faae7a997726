"""Numbers drawn from a row's content: equal rows get equal draws, wherever they stand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(h: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def row_keys(X: NDArray[Any], seed: int = 0) -> NDArray[np.uint64]:
    """A random-looking number for every row that depends on its values and ``seed`` alone.

    Values count as float64; 0.0 and -0.0 are the same.

    Parameters
    ----------
    X : array of shape (n, n_columns)
    seed : int

    Returns
    -------
    array of shape (n,) of uint64

    Examples
    --------
    >>> import numpy as np
    >>> from skode.runtime import row_keys
    >>> first, second, third = row_keys(np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    >>> bool(first == third), bool(first == second)
    (True, False)
    """
    keys = _mix(np.full(len(X), np.uint64(seed % 2**64)) + _GAMMA)
    for column in np.transpose(X):
        bits = (np.asarray(column, np.float64) + 0.0).view(np.uint64)
        keys = _mix((keys ^ _mix(bits)) + _GAMMA)
    return keys


def key_uniforms(keys: NDArray[np.uint64], n_columns: int) -> NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1), ``n_columns`` for every key.

    Parameters
    ----------
    keys : array of shape (n,) of uint64
    n_columns : int

    Returns
    -------
    array of shape (n, n_columns)
    """
    steps = np.arange(1, n_columns + 1, dtype=np.uint64) * _GAMMA
    bits = _mix(keys[:, None] + steps) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def kronecker_steps(n_columns: int) -> NDArray[np.float64]:
    """Steps of a Kronecker sequence, whose multiples modulo 1 fill the unit cube evenly.

    Powers of 1/g, g the positive root of g^(n + 1) = g + 1 (1 / golden ratio for one column): such generalised golden
    ratios are badly approximated by fractions.

    Parameters
    ----------
    n_columns : int

    Returns
    -------
    array of shape (n_columns,)
    """
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (n_columns + 1))
    return np.asarray(root ** -np.arange(1.0, n_columns + 1))
