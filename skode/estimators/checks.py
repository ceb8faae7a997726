"""What is asked of arguments, folds and failures, beyond what scikit-learn asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skode.estimators.agreement import check_support
from skode.exceptions import SolverError
from skode.runtime import as_array, current_peers
from skode.solver import Solution

CALLBACKS_BEGUN = ("_callback_fit_ctx", "_skl_callbacks_to_teardown")  # until the fit is over


@contextmanager
def unchanged_on_failure(estimator: BaseEstimator) -> Iterator[None]:
    """Put all attributes back if the block raises, save what scikit-learn tears callbacks down by; tell who waits."""
    before = dict(vars(estimator))
    try:
        check_support(estimator)
        yield
    except BaseException as error:
        current_peers().fail(error)
        begun = {name: value for name, value in vars(estimator).items() if name in CALLBACKS_BEGUN}
        vars(estimator).clear()
        vars(estimator).update(before | begun)
        raise


def checked_image(image_shape: Any, n_features: int) -> tuple[int, int, int]:
    """``image_shape`` as three sizes that make up a row of X."""
    shape = tuple(int(size) for size in image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape={image_shape!r} must be (channels, height, width).")
    if np.prod(shape) != n_features:
        raise ValueError(f"image_shape={shape} has {np.prod(shape)} pixels, but X has {n_features} columns.")
    return shape


def checked_times(t: Any, t1: float) -> list[float]:
    """Times of a trajectory, ascending in [0, t1]."""
    times = np.atleast_1d(np.asarray(as_array(t), dtype=np.float64))
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise ValueError("t must be finite, ascending and one-dimensional.")
    if times.size == 0 or times[0] < 0 or times[-1] > t1:
        raise ValueError(f"t must lie in [0, {t1:g}]; got {times.tolist() or 'no time'}.")
    return [float(time) for time in times]


def fold_numbers(splits: Any, n_rows: int) -> NDArray[Any]:
    """The test fold of every row."""
    folds = np.empty(n_rows, dtype=np.int64)
    for fold, (_, rows) in enumerate(splits):
        folds[rows] = fold
    return folds


def require_success(solution: Solution, place: slice, n_members: int) -> None:
    """Refuse a block's solution of rows ``place`` of X, members after members, if some row failed.

    Raises
    ------
    SolverError
        Names the first of them.
    """
    if solution.success:
        return
    size = len(solution.status) // n_members
    failed = {int(i) % size for i in torch.nonzero(solution.status)}
    rows = sorted(place.start + i for i in failed if place.start + i < place.stop)
    first, message = next(iter(solution.failures().items()))
    raise SolverError(
        f"the ODE could not be solved for {len(rows)} rows of X (first: row {place.start + first % size}, which "
        f"{message.partition(' ')[2].partition(' ')[2]}). solver_stats(X) tells each row's status.",
        rows,
    )
