"""LatentODERegressor on input that is wrong, empty or far away: an error that names it, or a defined result."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from skode import LatentODERegressor, Panel
from skode.exceptions import SolverError
from tests.estimators.series import QUICK, SMALL, long_frame, panel_of, waves


@pytest.fixture(scope="module")
def quick():
    return LatentODERegressor(**QUICK).fit(panel_of(10, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"given": "future"}, "given="),
        ({"times": [1.0], "horizon": [1.0]}, "at once"),
        ({"return_std": True, "quantiles": [0.5]}, "at once"),
        ({"quantiles": [0.0, 0.5]}, "between 0 and 1"),
        ({"times": []}, "no times"),
    ],
)
def test_contradicting_arguments_are_refused(quick, arguments, message):
    with pytest.raises(ValueError, match=message):
        quick.predict(panel_of(3, 1), **arguments)


def test_unknown_series_are_named(quick):
    with pytest.raises(KeyError, match="99"):
        quick.predict(panel_of(3, 1), times=pd.MultiIndex.from_tuples([(99, 1.0)]))


def test_other_channels_than_those_of_the_fit_are_named():
    frame = long_frame()
    model = LatentODERegressor(**QUICK, **SMALL, series_id="patient", time="hour").fit(frame)
    with pytest.raises(ValueError, match="pulse"):
        model.predict(frame.drop(columns="load"))
    swapped = frame[["load", "patient", "hour", "pulse"]]
    found = model.predict(swapped)
    pd.testing.assert_frame_equal(found[["pulse", "load"]], model.predict(frame)[["pulse", "load"]])


def test_a_channel_never_observed_is_told_and_predicted_as_nan():
    frame = long_frame().assign(empty=np.nan)
    model = LatentODERegressor(**QUICK, **SMALL, series_id="patient", time="hour")
    with pytest.warns(UserWarning, match="'empty' is never observed"):
        model.fit(frame)
    found = model.predict(frame)
    assert found["empty"].isna().all() and found["pulse"].notna().all()


def test_a_series_without_observations_gets_the_channels_own_distribution(quick):
    panel = panel_of(2, 1)
    values = panel.values.copy()
    values[panel.series == 1] = np.nan
    mean, std = quick.predict(panel.with_values(values), times=[1.0, 50.0], return_std=True)
    training = panel_of(10, 0).values
    np.testing.assert_allclose(mean[1].ravel(), training.mean(), rtol=1e-6)
    np.testing.assert_allclose(std[1].ravel(), training.std(), rtol=0.5)
    assert quick.score_samples(panel.with_values(values))[1] == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1)])
def test_tiny_panels_are_fitted(shape):
    X = np.arange(np.prod(shape), dtype=float).reshape(shape)
    model = LatentODERegressor(**QUICK, **SMALL).fit(X)
    found, std = model.predict(X, return_std=True)
    assert np.isfinite(found).all() and np.isfinite(std).all()


@pytest.mark.parametrize("unit", [1e-9, 1e12])
def test_the_unit_of_time_does_not_matter(unit):
    t, y, _ = waves(8, 0)
    model = LatentODERegressor(**QUICK, **SMALL)
    one, two = (
        clone(model).fit(panel).predict(panel).values
        for panel in (Panel.from_dense(y[:, :, None], times=t * scale, origin=0.0) for scale in (1.0, unit))
    )
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_series_without_any_observation_have_samples_and_bounds(quick):
    empty = Panel.from_dense(np.full((2, 5, 1), np.nan), columns=["y"])
    assert np.isfinite(quick.sample(empty, n_samples=2, random_state=0)).all()
    assert (quick.score_samples(empty) == 0).all()


def test_long_before_the_first_observation_predictions_are_finite_and_unsure(quick):
    mean, std = quick.predict(panel_of(3, 1), times=[-1e6, 3.0], return_std=True)
    assert np.isfinite(mean).all() and (std[:, 0] > std[:, 1]).all()


@pytest.mark.parametrize(("likelihood", "value"), [("poisson", -1.0), ("poisson", 0.5), ("bernoulli", 2.0)])
def test_values_that_a_likelihood_cannot_have_are_refused(likelihood, value):
    X = np.ones((3, 4))
    X[1, 2] = value
    with pytest.raises(ValueError, match="series 1 has"):
        LatentODERegressor(likelihood=likelihood).fit(X)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="all are NaN"):
        LatentODERegressor().fit(Panel.from_dense(np.full((3, 4), np.nan)))
    with pytest.raises(ValueError, match="point_process"):
        LatentODERegressor().fit(Panel.from_long(pd.DataFrame({"id": [0, 0], "t": [1.0, 2.0]}), "id", "t"))


def test_a_solve_that_fails_names_the_series(quick):
    panel = panel_of(3, 1)
    model = pickle.loads(pickle.dumps(quick)).set_params(max_num_steps=1, rtol=1e-10, atol=1e-12)
    with pytest.raises(SolverError, match="series 0"):
        model.predict(panel, horizon=[5.0])
    assert (model.solver_stats(panel)["status"] != 0).any()


def test_a_fit_that_fails_changes_nothing(quick):
    before = quick.predict(panel_of(3, 1)).values
    with pytest.raises(ValueError):
        quick.fit(np.full((3, 4), np.nan))
    np.testing.assert_array_equal(quick.predict(panel_of(3, 1)).values, before)
