"""Warnings of estimators point at the line of the user's that led to them, however deep inside they are found."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from joblib import parallel_backend
from sklearn.datasets import load_iris
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
    Panel,
)

X, Y = load_iris(return_X_y=True)
SHORT = {"max_iter": 1, "n_members": 1, "random_state": 0}
TWICE = X[:20, [0, 0]]


def fit_of_targets_that_are_copies() -> None:
    ContinuousFlowRegressor(**SHORT).fit(X[:20], TWICE)


def fit_of_a_channel_never_seen() -> None:
    values = np.stack([X[:6], np.full((6, 4), np.nan)], axis=2)
    LatentODERegressor(max_iter=0, random_state=0).fit(Panel.from_dense(values, times=np.arange(4.0), origin=0.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: ODENetClassifier(**SHORT).fit(X, Y),
        lambda: ODENetRegressor(**SHORT).fit(X, Y),
        lambda: make_pipeline(StandardScaler(), ODENetClassifier(**SHORT)).fit(X, Y),
        lambda: cross_val_score(ODENetClassifier(**SHORT), X, Y, cv=2, error_score="raise"),
        lambda: ContinuousFlowDensity(**SHORT).fit(TWICE),
        lambda: ContinuousFlowDensity(**SHORT).fit_predict(TWICE),
        fit_of_targets_that_are_copies,
        fit_of_a_channel_never_seen,
    ],
)
def test_a_warning_points_at_the_users_line(call: Callable[[], object]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert caught
    assert {warning.filename for warning in caught} == {__file__}


def test_in_a_searchs_thread_a_warning_points_at_where_it_is_found() -> None:
    with warnings.catch_warnings(record=True) as caught, parallel_backend("threading"):
        warnings.simplefilter("always")
        cross_val_score(ODENetClassifier(**SHORT), X, Y, cv=2, n_jobs=2, error_score="raise")
    assert {Path(warning.filename).name for warning in caught} <= {Path(__file__).name, "loop.py"}
