"""Every error and warning of its own that skode raises.

Bad input to an estimator meets scikit-learn's own errors first; what is left is named here, so that
``except`` clauses can be precise.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from sklearn.exceptions import ConvergenceWarning

__all__ = [
    "ConvergenceWarning",
    "DeviceError",
    "DivergenceError",
    "FieldError",
    "PeerError",
    "SkodeError",
    "SolverError",
    "StoredModelError",
]

# Packages whose lines a warning does not point at: they stand between the user's and where it is found.
BETWEEN = {"joblib", "skode", "sklearn", "torch"}
WORKERS = {"concurrent", "multiprocessing", "threading"}  # behind these there is no line of the user's


class SkodeError(Exception):
    """Base class of skode's own errors.

    Examples
    --------
    >>> from skode.exceptions import DeviceError, SkodeError
    >>> issubclass(DeviceError, SkodeError)
    True
    """


class DeviceError(SkodeError, ValueError):
    """A device is unknown, absent from this machine, or cannot compute in the requested dtype.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.exceptions import DeviceError
    >>> try:
    ...     ODENetClassifier(device="gpu").fit(*load_iris(return_X_y=True))
    ... except DeviceError as error:
    ...     print(error)
    device='gpu' is not a torch device; use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
    """


class FieldError(SkodeError, ValueError):
    """A vector field does not keep to the protocol ``field(t, y) -> dy/dt`` (shape, dtype, type).

    Examples
    --------
    >>> import torch
    >>> from skode.exceptions import FieldError
    >>> from skode.solver import solve
    >>> try:
    ...     solve(lambda t, y: y.sum(dim=1), torch.ones(4, 2), [0.0, 1.0])
    ... except FieldError as error:
    ...     print("shape" in str(error))
    True
    """


class DivergenceError(SkodeError, ValueError):
    """Training left the finite numbers; the estimator is as it was before the call.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.exceptions import DivergenceError
    >>> model = ODENetClassifier(learning_rate_init=1e30, random_state=0)
    >>> try:
    ...     model.fit(*load_iris(return_X_y=True))
    ... except DivergenceError:
    ...     print("smaller steps, please;", "fitted:", hasattr(model, "classes_"))
    smaller steps, please; fitted: False
    """


class StoredModelError(SkodeError, ValueError):
    """A stored estimator is of a format that this version does not read.

    The message names the version that wrote it, the one that reads it, and what to do.

    Examples
    --------
    >>> from skode import ODENetClassifier
    >>> from skode.exceptions import StoredModelError
    >>> state = ODENetClassifier().__getstate__()  # what pickle stores
    >>> try:
    ...     ODENetClassifier().__setstate__(state | {"_skode_format": 99, "_skode_version": "9.0.0"})
    ... except StoredModelError as error:
    ...     print(error)
    this ODENetClassifier was stored by skode 9.0.0 and cannot be loaded by skode ...
    """


class PeerError(SkodeError, RuntimeError):
    """The processes of a data-parallel fit cannot go on: one failed, ended, does something else, or has no group.

    Examples
    --------
    >>> from skode.exceptions import PeerError
    >>> from skode.parallel import data_parallel
    >>> try:
    ...     with data_parallel():
    ...         pass
    ... except PeerError as error:
    ...     print(error)
    data_parallel needs torch.distributed: call torch.distributed.init_process_group('gloo') first, ...
    """


class SolverError(SkodeError, RuntimeError):
    """An initial-value problem could not be solved for some rows.

    Parameters
    ----------
    message : str
        What happened, where, and what to change.
    rows : sequence of int
        The rows of the call's input whose solve failed.

    Attributes
    ----------
    rows : tuple of int
        The failed rows, in ascending order.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.exceptions import SolverError
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODENetClassifier(tol=1.0, n_members=1, random_state=0).fit(X, y)
    >>> try:
    ...     model.set_params(rtol=1e-9, atol=1e-9, max_num_steps=2).predict(X[:3])
    ... except SolverError as error:
    ...     print(error.rows)
    (0, 1, 2)
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(int(row) for row in rows)

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.rows)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line outside of this package, and of those through which it is called, that led here.

    In a worker that a search has started, where there is none, of the caller's own.
    """
    frame, level = sys._getframe(1), 2
    while (package := frame.f_globals.get("__name__", "").partition(".")[0]) in BETWEEN and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=2 if package in WORKERS else level)
