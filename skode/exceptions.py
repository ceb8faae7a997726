"""Every error and warning of its own that skode raises.

Bad input to an estimator meets scikit-learn's own errors first; what is left is named here, so that
``except`` clauses can be precise.
"""

from __future__ import annotations

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


class SkodeError(Exception):
    """Base class of skode's own errors."""


class DeviceError(SkodeError, ValueError):
    """A device is unknown, absent from this machine, or cannot compute in the requested dtype."""


class FieldError(SkodeError, ValueError):
    """A vector field does not keep to the protocol ``field(t, y) -> dy/dt`` (shape, dtype, type)."""


class DivergenceError(SkodeError, ValueError):
    """Training left the finite numbers; the estimator is as it was before the call."""


class StoredModelError(SkodeError, ValueError):
    """A stored estimator is of a format that this version does not read.

    The message names the version that wrote it, the one that reads it, and what to do.
    """


class PeerError(SkodeError, RuntimeError):
    """Another process of a data-parallel fit failed, ended, or is doing something else."""


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
    """

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(int(row) for row in rows)

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.rows)
