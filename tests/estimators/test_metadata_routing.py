"""Weights and groups on their way through scikit-learn's metadata routing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ContinuousFlowDensity, ContinuousFlowRegressor, LatentODERegressor, ODENetClassifier, ODENetRegressor
from skode.model_selection import SeriesKFold
from tests.estimators.series import SMALL, panel_of

pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 2))
Y = X[:, 0] + 0.1 * RNG.normal(size=30)
WEIGHTS = RNG.integers(0, 4, size=30).astype(float)

NET = {"max_iter": 2, "n_members": 1, "random_state": 0}
FLOW = {"max_iter": 0, "n_members": 1, "random_state": 0}
WEIGHTED = {
    "classifier": (ODENetClassifier(**NET), np.where(Y > 0, "up", "down")),
    "regressor": (ODENetRegressor(**NET), Y),
    "density": (ContinuousFlowDensity(**FLOW), None),
    "conditional density": (ContinuousFlowRegressor(**FLOW), Y),
}


@pytest.fixture(autouse=True)
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def part(y, rows):
    return () if y is None else (y[rows],)


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("name", WEIGHTED)
def test_cross_validation_hands_weights_to_fit_and_score_as_requested(name, scored):
    estimator, y = WEIGHTED[name]
    # Folds of nine rows, so that the conditional density needs no location, which would be trained for 50 epochs.
    rows = np.arange(18) if name == "conditional density" else np.arange(30)
    asked = clone(estimator).set_fit_request(sample_weight=True).set_score_request(sample_weight=scored)
    found = cross_validate(asked, X[rows], *part(y, rows), cv=2, params={"sample_weight": WEIGHTS[rows]})
    splits = sklearn.model_selection.check_cv(2, None if y is None else y[rows], classifier=name == "classifier")
    for score, (train, test) in zip(found["test_score"], splits.split(rows, *part(y, rows)), strict=True):
        fitted = clone(estimator).fit(X[train], *part(y, train), sample_weight=WEIGHTS[train])
        weights = {"sample_weight": WEIGHTS[test]} if scored else {}
        assert score == fitted.score(X[test], *part(y, test), **weights)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_that_nobody_asked_for_are_refused(name):
    estimator, y = WEIGHTED[name]
    with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
        GridSearchCV(estimator, {"tol": [0.0]}, cv=2).fit(X, y, sample_weight=WEIGHTS)


def test_a_search_over_a_pipeline_hands_weights_to_its_steps():
    net = ODENetRegressor(**NET).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
    scaler = StandardScaler().set_fit_request(sample_weight=True)
    search = GridSearchCV(make_pipeline(scaler, net), {"odenetregressor__alpha": [0.0]}, cv=2)
    search.fit(X, Y, sample_weight=WEIGHTS)
    Z = StandardScaler().fit(X, sample_weight=WEIGHTS).transform(X)
    alone = ODENetRegressor(**NET, alpha=0.0).fit(Z, Y, sample_weight=WEIGHTS)
    np.testing.assert_array_equal(search.predict(X), alone.predict(Z))
    assert search.score(X, Y, sample_weight=WEIGHTS) == alone.score(Z, Y, sample_weight=WEIGHTS)


def test_partial_fit_and_predict_have_requests_of_their_own():
    net = ODENetClassifier().set_partial_fit_request(sample_weight=True, classes=True)
    assert net.get_metadata_routing().partial_fit.requests == {"classes": True, "sample_weight": True}
    series = LatentODERegressor().set_predict_request(times=True)
    assert series.get_metadata_routing().predict.requests["times"] is True


def test_groups_of_series_reach_the_splitter_and_a_latent_ode_takes_no_weights():
    panel, groups = panel_of(6, 0), np.array([0, 0, 1, 1, 2, 2])
    model = LatentODERegressor(max_iter=0, random_state=0, early_stopping=False, **SMALL)
    found = cross_validate(model, panel, cv=GroupKFold(3), params={"groups": groups}, return_indices=True)
    assert not any(
        set(groups[train]) & set(groups[test])
        for train, test in zip(found["indices"]["train"], found["indices"]["test"], strict=True)
    )
    assert np.isfinite(found["test_score"]).all()
    with pytest.raises(TypeError, match="sample_weight"):
        cross_validate(model, panel, cv=KFold(2), params={"sample_weight": np.ones(6)})


def test_a_series_splitter_asks_for_no_groups_while_weights_go_by():
    frame = pd.DataFrame(X, columns=["a", "b"], index=pd.Index(np.repeat(np.arange(10), 3), name="patient"))
    splitter = SeriesKFold(2, series_id="patient")
    net = ODENetRegressor(**NET).set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
    weights = {"sample_weight": WEIGHTS}
    found = cross_validate(net, frame, Y, cv=splitter, params=weights, return_indices=True)
    expected = [list(test) for _, test in splitter.split(frame)]
    assert [list(test) for test in found["indices"]["test"]] == expected
    with pytest.raises(TypeError, match="groups"):
        cross_validate(net, frame, Y, cv=splitter, params=weights | {"groups": frame.index})


def test_the_rows_of_inverse_transform_are_no_metadata():
    assert not hasattr(ContinuousFlowDensity(), "set_inverse_transform_request")
