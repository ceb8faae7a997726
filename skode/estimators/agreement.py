"""Whether the processes of a data-parallel fit are about to do the same."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from sklearn.base import BaseEstimator

from skode.runtime import Peers, current_peers

OWN = ("device", "random_state", "verbose")  # may differ between processes; the first one's seed counts
PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


def check_support(estimator: BaseEstimator) -> None:
    """Refuse a data-parallel fit of an estimator that has none.

    Raises
    ------
    NotImplementedError
        If it has none.
    """
    if current_peers().size > 1 and not getattr(estimator, "_fits_in_parallel", False):
        raise NotImplementedError(
            f"{type(estimator).__name__} has no data-parallel fit; ODENetClassifier and ODENetRegressor do. Fit it "
            "outside of skode.parallel.data_parallel(), in one process that has all rows."
        )


def check_agreement(estimator: BaseEstimator, X: NDArray[Any], y: NDArray[Any], fresh: bool, peers: Peers) -> None:
    """Refuse processes whose data or arguments do not go together.

    Raises
    ------
    ValueError
        In all processes, naming what differs and which process has what.
    """
    if peers.size == 1:
        return
    told = peers.gather(_facts(estimator, X, y, fresh))
    for name, value in told[0].items():
        found = [facts.get(name) for facts in told]
        other = next((rank for rank, own in enumerate(found) if own != value), None)
        if other is not None:
            raise ValueError(
                f"data-parallel fit: {name} must be the same in all processes; process 0 has {value!r}, process "
                f"{other} has {found[other]!r}."
            )


def _facts(estimator: BaseEstimator, X: NDArray[Any], y: NDArray[Any], fresh: bool) -> dict[str, Any]:
    arguments = {name: value for name, value in estimator.get_params(deep=False).items() if name not in OWN}
    return {
        "the estimator": type(estimator).__name__,
        "the number of columns of X": X.shape[1],
        "the names of X's columns": [str(name) for name in getattr(estimator, "feature_names_in_", ())],
        "the dtype to compute in": str(estimator.dtype_),
        "the shape of y's rows": y.shape[1:],
        "the kind of y's values": y.dtype.kind,
        "whether the estimator has been fitted": not fresh,
        **{
            name: repr(value) if isinstance(value, PLAIN) else type(value).__name__ for name, value in arguments.items()
        },
    }
