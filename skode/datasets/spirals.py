"""The two-dimensional spirals of Chen et al. (2018), section 5.1."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The curves of torchdiffeq's examples/latent_ode.py, whose radius grows by SLOPE a radian.
N_CURVE_POINTS = 500
STOP = 6 * np.pi
SLOPE = 0.3
CENTRE = 5.0


class Spirals(NamedTuple):
    """Noisy windows of spirals, and what follows them.

    Attributes
    ----------
    values : ndarray of shape (n_series, n_points, 2)
        Noisy points, NaN where unobserved.
    times : ndarray of shape (n_points,)
        Times of the window's points, from 0; the curve advances by one radian per unit.
    clean : ndarray of shape (n_series, n_points, 2)
        The points without noise.
    times_ahead : ndarray of shape (n_points,)
        Times of the points after the window.
    ahead : ndarray of shape (n_series, n_points, 2)
        Those points without noise; NaN past the curve's end, which happens for ``subset="train"`` alone.
    clockwise : bool ndarray of shape (n_series,)

    Examples
    --------
    >>> from skode.datasets import make_spirals
    >>> spirals = make_spirals(n_series=4, n_points=50, random_state=0)
    >>> spirals.values.shape, spirals.times.shape, spirals.ahead.shape
    ((4, 50, 2), (50,), (4, 50, 2))
    """

    values: NDArray[np.float64]
    times: NDArray[np.float64]
    clean: NDArray[np.float64]
    times_ahead: NDArray[np.float64]
    ahead: NDArray[np.float64]
    clockwise: NDArray[np.bool_]


def make_spirals(
    n_series: int = 1000,
    n_points: int = 100,
    n_observed: int | None = None,
    noise: float = 0.3,
    subset: str = "train",
    random_state: Any = None,
) -> Spirals:
    """Windows of two fixed spirals, half of them clockwise, each from a start of its own.

    Both curves have 500 points at angles t in [0, 6 pi]. Counter-clockwise: the Archimedean spiral r = 0.3 t around
    (5, 0). Clockwise: r = 15 / s at the angle s = 6 pi + 1 - t, around (-5, 0).

    Parameters
    ----------
    n_series : int, default=1000
    n_points : int, default=100
        Points in a window, at most 166; 100 are 0.6 of a turn.
    n_observed : int, optional
        How many of them are observed, at random places of each series, both coordinates together; all by default.
    noise : float, default=0.3
        Standard deviation of the Gaussian noise of a coordinate.
    subset : {"train", "test"}
        Training windows start at the points ``n_points`` to ``500 - n_points``, those for tests ``n_points``
        earlier at the latest, so that ``n_points`` more points follow.
    random_state : int, Generator, RandomState or None

    Returns
    -------
    Spirals
        values, times, clean, times_ahead, ahead, clockwise.

    Raises
    ------
    ValueError
        If a size or ``subset`` is out of range.

    References
    ----------
    R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud: Neural ordinary differential equations. NeurIPS 2018,
    section 5.1. The paper does not give its curves and noise; these are those of torchdiffeq's ``latent_ode.py``.

    Examples
    --------
    >>> from skode import Panel
    >>> from skode.datasets import make_spirals
    >>> spirals = make_spirals(n_series=20, n_observed=30, random_state=0)
    >>> Panel.from_dense(spirals.values, spirals.times).shape, int(spirals.clockwise.sum())
    ((20, 2), 10)
    """
    _check(n_series, n_points, n_observed, noise, subset)
    rng = _generator(random_state)
    n_windows = 1 if subset == "train" else 2
    starts = rng.integers(n_points, N_CURVE_POINTS - n_windows * n_points, size=n_series)
    clockwise = rng.permutation(np.arange(n_series) % 2 == 1)

    curves = np.concatenate([_curves(), np.full((2, n_points, 2), np.nan)], axis=1)
    places = starts[:, np.newaxis] + np.arange(2 * n_points)
    path = curves[clockwise.astype(int)[:, np.newaxis], places]
    clean, ahead = path[:, :n_points], path[:, n_points:]
    values = clean + noise * rng.standard_normal(clean.shape)
    if n_observed is not None:
        ranks = rng.random((n_series, n_points)).argsort(axis=1).argsort(axis=1)
        values[ranks >= n_observed] = np.nan
    times = np.arange(2.0 * n_points) * (STOP / (N_CURVE_POINTS - 1))
    return Spirals(values, times[:n_points], clean, times[n_points:], ahead, clockwise)


def _curves() -> NDArray[np.float64]:
    """Points of the counter-clockwise and the clockwise curve, shape (2, 500, 2)."""
    angle = np.linspace(0, STOP, N_CURVE_POINTS)
    falling = STOP + 1 - angle
    return np.stack([_polar(SLOPE * angle, angle, CENTRE), _polar(50 * SLOPE / falling, falling, -CENTRE)])


def _polar(radius: NDArray[np.float64], angle: NDArray[np.float64], centre: float) -> NDArray[np.float64]:
    return np.column_stack([radius * np.cos(angle) + centre, radius * np.sin(angle)])


def _check(n_series: int, n_points: int, n_observed: int | None, noise: float, subset: str) -> None:
    if subset not in ("train", "test"):
        raise ValueError(f"subset={subset!r} must be 'train' or 'test'.")
    if n_series < 1 or not 1 <= n_points <= (N_CURVE_POINTS - 1) // 3:
        raise ValueError(f"n_series={n_series} must be at least 1, n_points={n_points} from 1 to 166.")
    if n_observed is not None and not 0 <= n_observed <= n_points:
        raise ValueError(f"n_observed={n_observed} must be from 0 to n_points={n_points}.")
    if not (np.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise} must be finite and not negative.")


def _generator(random_state: Any) -> np.random.Generator:
    if isinstance(random_state, np.random.RandomState):
        random_state = random_state.randint(np.iinfo(np.int32).max)
    return np.random.default_rng(random_state)
