"""Panels through scikit-learn's splitters, searches and pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingRegressor
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    cross_val_predict,
    cross_val_score,
    learning_curve,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import resample, shuffle

from skode import Panel
from tests.panel.dummies import ChannelMeans, SeriesMeans, series_means
from tests.panel.frames import long_frame, panel_of

X_DENSE = np.random.default_rng(1).normal(size=(12, 5, 2)) + 3.0
CONTAINERS = {
    "long": lambda: panel_of(long_frame()),
    "two-level index": lambda: Panel.from_long(long_frame().set_index(["patient", "hour"])),
    "frames": lambda: Panel.from_frames(panel_of(long_frame()).to_frames()),
    "series of frames": lambda: Panel.from_frames(
        pd.Series(panel_of(long_frame()).to_frames(), index=list("abcdefghijkl"))
    ),
    "array": lambda: Panel.from_dense(X_DENSE),
    "flat array": lambda: Panel.from_dense(X_DENSE[..., 0]),
    "wide frame": lambda: Panel.from_dense(pd.DataFrame(X_DENSE[..., 0])),
}


@pytest.fixture(params=list(CONTAINERS))
def panel(request: Any) -> Panel:
    return CONTAINERS[request.param]()


def test_train_and_test_parts_are_panels_without_common_series(panel: Panel) -> None:
    train, test, _, y_test = train_test_split(panel, np.arange(12), random_state=0)
    assert isinstance(train, Panel)
    assert isinstance(test, Panel)
    assert not set(train.ids) & set(test.ids)
    assert test.ids.tolist() == panel.ids[y_test].tolist()


def test_cross_val_score_splits_by_series(panel: Panel) -> None:
    scores = cross_val_score(ChannelMeans(), panel, cv=3)
    expected = [ChannelMeans().fit(panel[train]).score(panel[test]) for train, test in KFold(3).split(range(12))]
    np.testing.assert_allclose(scores, expected)


def test_cross_val_predict_returns_a_panel_in_the_order_of_its_input(panel: Panel) -> None:
    predicted = cross_val_predict(ChannelMeans(), panel, cv=KFold(3, shuffle=True, random_state=0))
    assert isinstance(predicted, Panel)
    assert predicted.with_values(panel.values) == panel
    assert predicted.to_long().index.equals(panel.to_long().index)


def test_cross_val_predict_of_a_target_returns_an_array(panel: Panel) -> None:
    y = 2.0 * series_means(panel)
    np.testing.assert_allclose(cross_val_predict(SeriesMeans(), panel, y), y)


def searched(panel: Panel, groups: Any, n_jobs: int) -> GridSearchCV:
    cv = 3 if groups is None else GroupKFold(2)
    return GridSearchCV(ChannelMeans(), {"shift": [0.0, 1.0]}, cv=cv, n_jobs=n_jobs).fit(panel, groups=groups)


@pytest.mark.parametrize("groups", [None, np.repeat(np.arange(4), 3)])
def test_a_grid_search_finds_the_best_and_predicts_panels(panel: Panel, groups: Any) -> None:
    search = searched(panel, groups, 1)
    assert search.best_params_ == {"shift": 0.0}
    assert isinstance(search.predict(panel), Panel)


def test_grid_search_in_two_processes_equals_one() -> None:
    # Of one container alone: all of them are panels by now, and two processes take long to start.
    panel, groups = CONTAINERS["long"](), np.repeat(np.arange(4), 3)
    one, two = (searched(panel, groups, n_jobs) for n_jobs in (1, 2))
    assert np.ptp(one.cv_results_["mean_test_score"]) > 0
    np.testing.assert_array_equal(one.cv_results_["mean_test_score"], two.cv_results_["mean_test_score"])
    assert two.predict(panel) == one.predict(panel)


def test_learning_curves_grow_by_series(panel: Panel) -> None:
    sizes, _, scores = learning_curve(ChannelMeans(), panel, None, cv=3, train_sizes=[4, 8])
    assert sizes.tolist() == [4, 8]
    assert np.isfinite(scores).all()


def test_pipelines_hand_panels_on(panel: Panel) -> None:
    pipeline = make_pipeline(FunctionTransformer(), ChannelMeans()).fit(panel)
    assert pipeline.predict(panel) == ChannelMeans().fit(panel).predict(panel)


def test_votes_and_transformed_targets_take_panels(panel: Panel) -> None:
    y = series_means(panel)
    voting = VotingRegressor([("a", SeriesMeans()), ("b", SeriesMeans())]).fit(panel, y)
    np.testing.assert_allclose(voting.predict(panel), y)
    transformed = TransformedTargetRegressor(SeriesMeans(), func=np.negative, inverse_func=np.negative).fit(panel, y)
    np.testing.assert_allclose(transformed.predict(panel), y)


def test_bootstraps_repeat_series(panel: Panel) -> None:
    sample, y = resample(panel, np.arange(12), random_state=0)
    assert len(set(sample.ids)) < len(sample) == 12
    assert sample == panel.take(y)
    predicted = cross_val_predict(ChannelMeans(), sample, cv=3)
    assert predicted.ids.tolist() == sample.ids.tolist()


def test_shuffled_panels_keep_their_type(panel: Panel) -> None:
    assert sorted(shuffle(panel, random_state=0).ids) == sorted(panel.ids)
