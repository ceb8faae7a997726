"""LatentODERegressor: series of irregular times as rows of X."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict, cross_val_score, learning_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from skode import LatentODERegressor, Panel
from skode.model_selection import SeriesKFold
from skode.models.kriging import Kernel
from skode.training import train_latent
from tests.estimators.series import QUICK, SMALL, long_frame, panel_of, waves


@parametrize_with_checks([LatentODERegressor()])
def test_scikit_learns_checks_pass_with_defaults(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def model():
    return LatentODERegressor(random_state=0, max_iter=150).fit(panel_of(60, 0))


@pytest.fixture(scope="module")
def quick():
    return LatentODERegressor(**QUICK).fit(panel_of(10, 0))


# --- what is learned ---


def test_waves_are_interpolated_and_continued(model):
    t, y, phase = waves(30, 1)
    panel = Panel.from_dense(y[:, :, None], times=t, columns=["y"], origin=0.0)
    inside, ahead = np.linspace(1, 5, 9), np.linspace(6, 8, 5)
    for times, bound in ((inside, 0.15), (ahead, 0.35)):
        found = model.predict(panel, times=times)[:, :, 0]
        assert np.sqrt(np.mean((found - np.sin(times + phase[:, None])) ** 2)) < bound


def test_held_out_likelihood_is_near_that_of_the_noise(model):
    noise_alone = -np.log(0.1) - 0.5 * np.log(2 * np.pi * np.e)
    assert noise_alone - 1.0 < model.score(panel_of(30, 1)) < noise_alone + 0.1


def test_intervals_cover_new_observations(model):
    t, y, _ = waves(60, 2, n_times=16)
    panel = Panel.from_dense(y[:, :, None], times=t, columns=["y"], origin=0.0)
    low, high = np.moveaxis(model.predict(panel, times=[1.0, 3.0, 5.0], quantiles=[0.1, 0.9]), -1, 0)
    _, _, phase = waves(60, 2, n_times=16)
    truth = np.sin(np.array([1.0, 3.0, 5.0]) + phase[:, None])[:, :, None]
    noisy = truth + 0.1 * np.random.default_rng(0).normal(size=truth.shape)
    assert 0.65 < np.mean((noisy > low) & (noisy < high)) < 0.95


def test_deviations_grow_with_the_distance_from_observations(model):
    _, std = model.predict(panel_of(10, 3), horizon=[0.1, 3.0, 9.0], return_std=True)
    assert (np.diff(std.mean(axis=(0, 2))) > 0).all()


def test_far_ahead_predictions_stay_where_the_data_are(model):
    assert np.abs(model.predict(panel_of(10, 3), horizon=[60.0])).max() < 3


def test_a_target_of_each_series_is_learned():
    t, y, phase = waves(120, 4)
    target = np.sin(phase)
    panel = Panel.from_dense(y[:, :, None], times=t, origin=0.0)
    model = LatentODERegressor(random_state=0).fit(panel[:90], target[:90])
    assert model.score(panel[90:], target[90:]) > 0.6
    several = LatentODERegressor(**QUICK).fit(panel, np.column_stack([target, -target]))
    assert several.predict(panel).shape == (120, 2)


# --- containers ---


def containers():
    """Name, X, and the arguments that its reading takes."""
    _, y, _ = waves(8, 0)
    grid = np.where(np.random.default_rng(0).uniform(size=(8, 6)) < 0.2, np.nan, y[:, :6])
    long = long_frame()
    frames = [own.set_index("hour")[["pulse", "load"]] for _, own in long_frame(shuffle=False).groupby("patient")]
    stamps = pd.Timestamp("2024-03-30", tz="Europe/Berlin") + pd.to_timedelta(long["hour"] * 8, unit="h")
    named = {"series_id": "patient", "time": "hour"}
    return {
        "panel": (Panel.from_long(long, "patient", "hour"), {}),
        "long": (long, named),
        "indexed": (long.set_index(["patient", "hour"]), {}),
        "zoned": (long.assign(hour=stamps), named),
        "frames": (frames, {}),
        "dense": (np.stack([grid, grid**2], axis=2), {}),
        "wide": (grid, {}),
        "wide frame": (pd.DataFrame(grid, columns=np.arange(6) * 0.5, index=list("abcdefgh")), {}),
    }


@pytest.mark.parametrize("name", list(containers()))
def test_predictions_come_in_the_container_of_x(name):
    X, named = containers()[name]
    model = LatentODERegressor(**QUICK, **SMALL, **named).fit(X)
    found, std = model.predict(X, return_std=True)
    quantiles = model.predict(X, quantiles=[0.1, 0.5, 0.9])
    assert type(found) is type(X)
    if isinstance(X, Panel):
        assert found.columns == X.columns and np.array_equal(found.times, X.times)
        assert quantiles.shape[1] == 3 * X.shape[1]
    elif isinstance(X, pd.DataFrame):
        assert found.index.equals(X.index) and std.index.equals(X.index)
        assert list(found.columns) == list(X.columns)
    elif isinstance(X, list):
        assert all(own.index.equals(given.index) for own, given in zip(found, X, strict=True))
    else:
        assert found.shape == X.shape and quantiles.shape == (*X.shape, 3)


@pytest.mark.parametrize("name", ["dense", "wide"])
def test_arrays_run_through_panels(name):
    X, _ = containers()[name]
    panel = Panel.from_dense(X)
    by_array, by_panel = (LatentODERegressor(**QUICK, **SMALL).fit(own) for own in (X, panel))
    found = by_panel.predict(panel).to_dense()
    np.testing.assert_allclose(by_array.predict(X), found.reshape(X.shape), rtol=0, atol=1e-12)


def test_an_array_and_a_frame_of_one_grid_agree():
    X, _ = containers()["wide"]
    frame = pd.DataFrame(X, columns=[f"c{i}" for i in range(X.shape[1])])
    model = LatentODERegressor(**QUICK, **SMALL)
    np.testing.assert_array_equal(clone(model).fit(X).predict(X), clone(model).fit(frame).predict(frame).to_numpy())


def test_time_zones_and_orders_survive_a_change_to_daylight_saving_time():
    X, named = containers()["zoned"]
    found = LatentODERegressor(**QUICK, **SMALL, **named).fit(X).predict(X)
    assert found["hour"].equals(X["hour"]) and found["patient"].equals(X["patient"])
    elapsed = Panel.from_long(X, "patient", "hour").times
    hours = Panel.from_long(long_frame(), "patient", "hour").times
    np.testing.assert_allclose(elapsed / 3600, hours * 8, atol=1e-6)


def test_queries_travel_inside_of_x(model):
    panel = panel_of(3, 5)
    asked = panel.to_long().reset_index()
    queries = pd.DataFrame({"series": [0, 1, 2], "time": [2.5, 7.0, 3.5], "y": np.nan})
    both = pd.concat([asked, queries], ignore_index=True)
    fitted = LatentODERegressor(random_state=0, series_id="series", time="time", origin=0.0, max_iter=12).fit(asked)
    inside = fitted.predict(both)["y"].to_numpy()[-3:]
    index = pd.MultiIndex.from_frame(queries[["series", "time"]])
    # The solver's steps depend on where the path ends, within its tolerance.
    np.testing.assert_allclose(inside, fitted.predict(asked, times=index)["y"], atol=1e-3)


def test_times_are_shared_or_by_series(quick):
    panel = panel_of(4, 1)
    shared = quick.predict(panel, times=[1.0, 2.0])
    index = pd.MultiIndex.from_product([range(4), [1.0, 2.0]], names=["series", "time"])
    found = quick.predict(panel, times=index[::-1])
    assert shared.shape == (4, 2, 1) and found.index.equals(index[::-1])
    np.testing.assert_allclose(found["y"].to_numpy()[::-1], shared.ravel(), rtol=1e-12)


def test_a_horizon_counts_from_each_last_observation(quick):
    panel = panel_of(4, 1)
    last = [panel.times[end - 1] for end in panel.offsets[1:]]
    index = pd.MultiIndex.from_arrays([range(4), np.array(last) + 0.5])
    np.testing.assert_allclose(
        quick.predict(panel, horizon=[0.5]).ravel(), quick.predict(panel, times=index)["y"], rtol=1e-9
    )


# --- what a prediction may use ---


def test_given_the_past_later_observations_do_not_matter(quick):
    panel = panel_of(5, 2)
    changed = panel.with_values(np.where(panel.times > 3.0, -panel.values.ravel(), panel.values.ravel())[:, None])
    early = panel.times <= 3.0
    one, two = (quick.predict(own, given="past").values[early] for own in (panel, changed))
    np.testing.assert_allclose(one, two, rtol=1e-12)
    assert np.abs(quick.predict(panel).values - quick.predict(changed).values)[early].max() > 1e-3


def test_a_row_does_not_depend_on_the_other_rows(quick):
    panel = panel_of(9, 3)
    together = quick.predict(panel, times=[1.0, 7.0])
    alone = np.concatenate([quick.predict(panel[[i]], times=[1.0, 7.0]) for i in range(9)])
    np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        quick.score_samples(panel), [quick.score_samples(panel[[i]])[0] for i in range(9)], rtol=1e-10
    )


def test_new_observations_are_used_without_a_refit(model):
    panel = panel_of(5, 6)
    past, future = panel.before(3.0), panel.after(3.0)
    before = model.predict(past, times=[5.0])
    after = model.predict(Panel.concat([past, future]), times=[5.0])
    np.testing.assert_allclose(after, model.predict(panel, times=[5.0]), rtol=1e-12)
    assert np.abs(after - before).max() > 1e-3


# --- samples and bounds ---


def test_samples_have_the_shapes_of_what_was_asked(quick):
    panel = panel_of(4, 1)
    assert quick.sample(panel, times=[1.0, 2.0], n_samples=3, random_state=0).shape == (3, 4, 2, 1)
    assert quick.sample(panel, n_samples=3, random_state=0).shape == (3, len(panel.times), 1)
    assert quick.sample(times=[0.0, 1.0, 2.0], n_samples=3, random_state=0).shape == (3, 3, 1)
    assert quick.sample(panel, times=[1.0], n_samples=0).shape == (0, 4, 1, 1)


def test_samples_scatter_as_the_standard_deviations_say(model):
    panel = panel_of(6, 1)
    mean, std = model.predict(panel, times=[2.0, 8.0], return_std=True)
    drawn = model.sample(panel, times=[2.0, 8.0], n_samples=400, random_state=0)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=4 * std.max() / 20)
    np.testing.assert_allclose(drawn.std(axis=0), std, rtol=0.25)


def test_a_series_draws_depend_on_its_content_alone(quick):
    panel = panel_of(4, 1)
    together = quick.sample(panel, times=[1.0], n_samples=2, random_state=3)
    alone = quick.sample(panel[[2]], times=[1.0], n_samples=2, random_state=3)
    np.testing.assert_allclose(together[:, 2], alone[:, 0], rtol=1e-10)


def test_samples_of_the_prior_look_like_series(model):
    drawn = model.sample(times=np.linspace(0, 6, 25), n_samples=200, random_state=0)
    assert abs(drawn.mean()) < 0.3 and 0.4 < drawn.std() < 1.0


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_bounds_are_in_the_units_of_x(factor):
    panel = panel_of(12, 0)
    scaled = panel.with_values(panel.values * factor)
    one, two = (LatentODERegressor(**QUICK, **SMALL).fit(own).score_samples(own) for own in (panel, scaled))
    # Draws are keyed by the values, so that they differ.
    assert np.mean(two - one) == pytest.approx(-12 * np.log(factor), abs=1.0)


# --- scikit-learn ---


def test_searches_and_scores_split_by_series():
    panel = panel_of(12, 0)
    search = GridSearchCV(LatentODERegressor(**QUICK, **SMALL), {"rtol": [1e-1, 1e-3]}, cv=3)
    one = search.fit(panel).cv_results_["mean_test_score"]
    two = clone(search).set_params(n_jobs=2).fit(panel).cv_results_["mean_test_score"]
    assert np.isfinite(one).all()
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert search.predict(panel).shape == panel.shape


def test_scikit_learns_helpers_take_panels():
    panel = panel_of(12, 0)
    model = LatentODERegressor(**QUICK, **SMALL)
    assert np.isfinite(cross_val_score(model, panel, cv=3)).all()
    assert len(cross_val_predict(model, panel, cv=3)) == 12
    groups = np.arange(12) // 2
    assert np.isfinite(cross_val_score(model, panel, cv=GroupKFold(3), groups=groups)).all()
    with pytest.warns(UserWarning, match="were in the training"):
        learning_curve(model, panel, None, cv=2, train_sizes=[0.5, 1.0])
    piped = make_pipeline(FunctionTransformer(), model).fit(panel)
    assert piped.predict(panel).shape == panel.shape
    target = np.arange(12.0)
    assert cross_val_predict(model, panel, target, cv=3).shape == (12,)


def test_long_frames_are_split_by_series_with_their_own_splitter():
    frame = long_frame(9)
    model = LatentODERegressor(**QUICK, **SMALL, series_id="patient", time="hour")
    scores = cross_val_score(model, frame, cv=SeriesKFold(3, series_id="patient"))
    assert np.isfinite(scores).all()


def test_scoring_series_of_the_training_warns(quick):
    with pytest.warns(UserWarning, match=r"10 of the 10 series .* were in the training"):
        quick.score(panel_of(10, 0))


def test_features_have_names(quick):
    assert quick.transform(panel_of(3, 1)).shape == (3, 9)
    assert list(quick.get_feature_names_out())[:2] == ["latentoderegressor0", "latentoderegressor1"]


def test_a_pickle_holds_no_torch_and_predicts_the_same(quick):
    panel = panel_of(3, 1)
    data = pickle.dumps(quick)
    assert b"torch" not in data
    np.testing.assert_array_equal(pickle.loads(data).predict(panel).values, quick.predict(panel).values)


def test_steps_that_a_fit_turned_out_to_need_are_those_of_its_refit_and_of_warm_starts(monkeypatch):
    taken = []

    def recorded(model, data, options, *others, **more):
        taken.append(options.steps_per_unit)
        return train_latent(model, data, options, *others, **more)

    monkeypatch.setattr("skode.estimators.latent.train_latent", recorded)
    monkeypatch.setattr("skode.training.latent.STEP_ERROR", -1.0)  # no steps are good enough
    model = LatentODERegressor(**{**QUICK, "max_iter": 10}, warm_start=True).fit(panel_of(10, 0))
    assert taken == [4.0, 8.0]
    model.fit(panel_of(10, 0))
    assert taken == [4.0, 8.0, 8.0]


def test_a_warm_start_goes_on(quick):
    panel = panel_of(10, 0)
    model = LatentODERegressor(**QUICK, warm_start=True).fit(panel)
    before = model.loss_
    for _ in range(3):
        model.fit(panel)
    assert model.loss_ < before
    with pytest.raises(ValueError, match="warm_start goes on"):
        model.set_params(latent_dim=5).fit(panel)


@pytest.mark.parametrize("encoder", ["kernel", "rnn", "ode_rnn", "attention"])
def test_every_encoder_fits(encoder):
    panel = panel_of(8, 0)
    model = LatentODERegressor(**QUICK, **SMALL, encoder=encoder).fit(panel)
    assert np.isfinite(model.predict(panel, horizon=[1.0])).all()


@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
def test_other_gradients_come_to_nearly_the_same_model(gradient):
    panel = panel_of(8, 0)
    one, two = (
        LatentODERegressor(**QUICK, **SMALL, gradient=own, dtype="float64").fit(panel) for own in ("discrete", gradient)
    )
    np.testing.assert_allclose(two.loss_, one.loss_, rtol=0.02)


def test_a_model_of_one_channel_takes_tables_of_any_length_and_stays_as_it_is():
    model = LatentODERegressor(**QUICK, **SMALL).fit(Panel.from_dense(np.random.default_rng(0).normal(size=(6, 5))))
    assert model.predict(np.zeros((2, 9))).shape == (2, 9)
    assert model.n_features_in_ == 1


# --- likelihoods, inputs, events ---


def test_a_known_rate_of_events_is_recovered():
    rng = np.random.default_rng(0)
    events = []
    for i in range(60):
        t = np.sort(rng.uniform(0, 10, rng.poisson(60)))
        events.append(pd.DataFrame({"id": i, "t": t[rng.uniform(size=len(t)) < (3 + 2 * np.sin(t)) / 6]}))
    panel = Panel.from_long(pd.concat(events), "id", "t", values=[], origin=0.0)
    model = LatentODERegressor(random_state=0, point_process=True, window=(0, 10), max_iter=120).fit(panel)
    grid = np.linspace(0.5, 9.5, 50)
    rate, true = model.intensity(panel, times=grid).mean(axis=0), 3 + 2 * np.sin(grid)
    assert np.linalg.norm(rate - true) / np.linalg.norm(true) < 0.2
    assert np.isfinite(model.score_samples(panel)).all()


def test_events_outside_of_the_window_are_refused():
    panel = Panel.from_long(pd.DataFrame({"id": [0, 0], "t": [1.0, 12.0]}), "id", "t", values=[], origin=0.0)
    with pytest.raises(ValueError, match="has a row at 12"):
        LatentODERegressor(point_process=True, window=(0, 10)).fit(panel)


def test_counts_and_binary_channels_have_distributions_of_their_own():
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 5, (30, 10)), axis=1)
    level = rng.normal(size=30)[:, None]
    X = np.stack([rng.poisson(np.exp(1 + level + 0 * t)), rng.uniform(size=t.shape) < 1 / (1 + np.exp(-level))], axis=2)
    panel = Panel.from_dense(X.astype(float), times=t, columns=["count", "flag"])
    model = LatentODERegressor(random_state=0, max_iter=60, likelihood={"count": "poisson", "flag": "bernoulli"})
    model.fit(panel)
    found = model.predict(panel).values
    assert (found[:, 0] > 0).all() and ((found[:, 1] > 0) & (found[:, 1] < 1)).all()
    drawn = model.sample(panel, n_samples=2, random_state=0)
    assert (drawn == np.round(drawn)).all() and set(np.unique(drawn[:, :, 1])) <= {0.0, 1.0}
    assert np.corrcoef(found[:, 0], X[:, :, 0].ravel())[0, 1] > 0.5


def test_known_inputs_at_queries_count():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": np.repeat(range(40), 10), "t": np.tile(np.arange(10.0), 40)})
    frame["dose"] = np.repeat(rng.normal(size=40), 10) * (frame["t"] >= 4)
    frame["y"] = frame["dose"] * (frame["t"] - 4).clip(0) + 0.05 * rng.normal(size=400)
    model = LatentODERegressor(
        random_state=0, max_iter=150, early_stopping=False, series_id="id", time="t", covariates=["dose"]
    )
    model.fit(frame)
    hidden = frame.assign(y=frame["y"].where(frame["t"] < 6))
    found = model.predict(hidden)["y"].to_numpy()
    ahead = frame["t"] >= 6
    assert np.corrcoef(found[ahead], frame.loc[ahead, "y"])[0, 1] > 0.9


def test_static_covariates_count():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"id": np.repeat(range(60), 4), "t": np.tile(np.arange(4.0), 60)})
    frame["age"] = np.repeat(rng.normal(size=60), 4)
    frame["y"] = frame["age"] * frame["t"]
    model = LatentODERegressor(
        random_state=0, max_iter=100, early_stopping=False, series_id="id", time="t", static=["age"]
    ).fit(frame)
    hidden = frame.assign(y=frame["y"].where(frame["t"] < 1))
    found = model.predict(hidden)["y"].to_numpy()
    assert np.corrcoef(found[frame["t"] == 3], frame.loc[frame["t"] == 3, "y"])[0, 1] > 0.9


def test_what_is_missed_at_observations_corrects_predictions_nearby(quick):
    corrected, plain = (copy.deepcopy(quick) for _ in range(2))
    for model, kernels in ((corrected, (Kernel(0.5, 1e6),)), (plain, ())):
        calibration = replace(model._fitted.calibration, kernels=kernels)
        model._fitted = model._fitted._replace(calibration=calibration)
    panel = panel_of(6, 5)
    truth = panel.values
    errors = [np.nanmean((model.predict(panel).values - truth) ** 2) for model in (corrected, plain)]
    assert errors[0] < 0.01 * errors[1]  # hardly any noise is believed in
    last = panel.offsets[1:] - 1
    later = [model.predict(panel, horizon=[1e-6])[:, 0, 0] for model in (corrected, plain)]
    off = [np.nanmean((found - truth[last, 0]) ** 2) for found in later]
    assert off[0] < 0.01 * off[1]


def test_dynamics_without_hidden_layers_fit():
    model = LatentODERegressor(max_iter=6, hidden_layer_sizes=(), random_state=0).fit(panel_of(6, 5))
    assert np.isfinite(model.predict(panel_of(2, 6)).values).all()
