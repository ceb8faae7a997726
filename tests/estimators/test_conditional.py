"""What ContinuousFlowRegressor promises: conditional densities, their quantiles, means and samples."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from skode import ContinuousFlowRegressor
from skode.estimators.location import FoldedRegressor, quantiles_of_mean
from skode.exceptions import SolverError

QUICK = {"max_iter": 8, "hidden_layer_sizes": 16, "n_members": 2, "random_state": 0}
LOCATION = FoldedRegressor.of
# Locations are short here, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")


@pytest.fixture(autouse=True, scope="module")
def _small_blocks_and_short_locations():
    """Tables here are small: blocks of 256 rows are filled up with fewer copies, and large calls have several.

    A location takes 60 epochs, not 300, which would be nearly all that a fit here costs; where quality is tested, and
    in scikit-learn's checks, it takes its own number.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skode.models.blocks.BLOCK_STATES", 256)
        patch.setattr(FoldedRegressor, "of", lambda *arguments: LOCATION(*arguments).set_params(max_iter=60))
        yield


@parametrize_with_checks([ContinuousFlowRegressor(max_iter=4, n_members=1)])
def test_scikit_learns_checks_pass(estimator, check, monkeypatch):
    monkeypatch.setattr(FoldedRegressor, "of", LOCATION)
    check(estimator)


def test_no_check_is_dodged():
    tags = ContinuousFlowRegressor().__sklearn_tags__()
    assert tags.estimator_type == "regressor"
    assert not tags.non_deterministic and not tags.no_validation and not tags._skip_test
    assert not tags.regressor_tags.poor_score


def noisy_wave(n, seed, targets=1):
    """More noise on the right; exact conditional mean and deviation beside the rows."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, size=(n, 1))
    mean, std = np.sin(3 * X[:, 0]), np.exp(X[:, 0] - 1.5)
    y = mean + std * rng.normal(size=n)
    if targets == 2:
        y = np.column_stack([y, y + 0.5 * rng.normal(size=n)])
    return X, y, mean, std


@pytest.fixture(scope="module")
def wave():
    return noisy_wave(600, 0)


@pytest.fixture(scope="module")
def wave_model(wave):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldedRegressor, "of", LOCATION)
        return ContinuousFlowRegressor(n_members=2, random_state=0).fit(wave[0], wave[1])


@pytest.fixture(scope="module")
def pair_model():
    X, Y, *_ = noisy_wave(300, 1, targets=2)
    return ContinuousFlowRegressor(**QUICK | {"max_iter": 40}).fit(X, Y)


# --- the density ---


def test_mean_and_deviation_follow_the_noise(wave_model):
    X, _, mean, std = noisy_wave(200, 1)
    found, deviation = wave_model.predict(X, return_std=True)
    assert np.sqrt(np.mean((found - mean) ** 2)) < 0.1
    assert np.abs(np.log(deviation / std)).mean() < 0.2


def test_held_out_log_density_is_near_the_true_one(wave_model):
    X, y, mean, std = noisy_wave(1500, 2)
    true = -0.5 * ((y - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    assert np.mean(true - wave_model.score_samples(X, y)) < 0.08


def test_intervals_hold_their_share_of_fresh_rows(wave_model):
    X, y, *_ = noisy_wave(500, 3)
    shares = np.array([0.5, 0.8, 0.95])
    low, high = np.split(wave_model.predict(X, quantiles=np.r_[0.5 - shares / 2, 0.5 + shares / 2]), 2, axis=1)
    inside = np.mean((low <= y[:, None]) & (y[:, None] <= high), axis=0)
    np.testing.assert_allclose(inside, shares, atol=0.06)  # of one training table of 600 rows


def test_a_density_integrates_to_1_over_y(wave_model):
    y = np.linspace(-8, 8, 1001)
    for x in (-0.9, 0.0, 0.8):
        density = np.exp(wave_model.score_samples(np.full((len(y), 1), x), y))
        assert abs(np.trapezoid(density, y) - 1) < 1e-3


def test_quantiles_are_those_of_the_density(wave_model):
    q = np.array([0.05, 0.3, 0.5, 0.9, 0.999])
    y = np.linspace(-8, 8, 1601)
    for x in (-0.5, 0.7):
        density = np.exp(wave_model.score_samples(np.full((len(y), 1), x), y))
        below = np.r_[0, np.cumsum(density[1:] + density[:-1])] * (y[1] - y[0]) / 2
        found = wave_model.predict([[x]], quantiles=q)[0]
        np.testing.assert_allclose(np.interp(found, y, below), q, atol=3e-3)


def test_mean_and_deviation_are_those_of_the_density(wave_model):
    y = np.linspace(-8, 8, 1601)
    density = np.exp(wave_model.score_samples(np.full((len(y), 1), 0.3), y))
    mean, std = wave_model.predict([[0.3]], return_std=True)
    exact = np.trapezoid(y * density, y)
    assert abs(mean[0] - exact) < 0.01
    assert (
        abs(std[0] / np.sqrt(np.trapezoid((y - exact) ** 2 * density, y)) - 1) < 0.1
    )  # of the tails beyond the points


def test_samples_have_the_moments_of_the_prediction(wave_model):
    mean = wave_model.predict([[-0.5], [0.5]])
    draws = wave_model.sample([[-0.5], [0.5]], n_samples=4000, random_state=0)
    assert draws.shape == (4000, 2)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.05)
    np.testing.assert_allclose(
        np.quantile(draws, 0.9, axis=0), wave_model.predict([[-0.5], [0.5]], quantiles=[0.9])[:, 0], atol=0.06
    )


def test_a_rows_draws_depend_on_its_content_alone(wave_model):
    together = wave_model.sample([[0.5], [0.1], [0.5]], n_samples=3, random_state=0)
    np.testing.assert_array_equal(together[:, 0], together[:, 2])
    np.testing.assert_array_equal(wave_model.sample([[0.1]], n_samples=3, random_state=0), together[:, 1:2])
    assert len(np.unique(together)) == 6
    assert not np.isin(wave_model.sample([[0.5]], n_samples=3, random_state=1), together).any()


def test_without_y_a_score_is_minus_the_entropy(wave_model):
    y = np.linspace(-8, 8, 1601)
    scores = wave_model.score_samples(np.full((len(y), 1), 0.3), y)
    entropy = -np.trapezoid(np.exp(scores) * scores, y)
    assert wave_model.score_samples([[0.3]])[0] == pytest.approx(-entropy, abs=0.05)


def test_stated_errors_of_log_densities_are_small(wave_model, wave):
    scores, errors = wave_model.score_samples(wave[0][:50], wave[1][:50], return_error=True)
    assert np.isfinite(scores).all()
    assert (errors <= 0.01).all() and (errors > 0).all()


# --- several targets ---


def test_shapes_of_several_targets(pair_model):
    X = np.array([[-0.5], [0.5], [0.1]])
    mean, std = pair_model.predict(X, return_std=True)
    assert mean.shape == std.shape == (3, 2)
    assert pair_model.predict(X, quantiles=[0.1, 0.9]).shape == (3, 2, 2)
    assert pair_model.sample(X, 5, random_state=0).shape == (5, 3, 2)
    assert pair_model.score_samples(X, mean).shape == (3,)


def test_correlated_targets_are_sampled_together(pair_model):
    draws = pair_model.sample([[0.8]], 2000, random_state=0)[:, 0]
    assert np.corrcoef(draws.T)[0, 1] > 0.4


def test_a_joint_density_integrates_to_1(pair_model):
    grid = np.linspace(-6, 6, 121)
    Y = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    density = np.exp(pair_model.score_samples(np.full((len(Y), 1), 0.2), Y))
    assert abs(density.sum() * (grid[1] - grid[0]) ** 2 - 1) < 1e-3


def test_a_target_that_is_another_one_twice_is_rebuilt():
    X, y, *_ = noisy_wave(80, 4)
    with pytest.warns(UserWarning, match="column 1 of y is a linear combination of column 0"):
        model = ContinuousFlowRegressor(**QUICK).fit(X, np.column_stack([y, 1 - 2 * y]))
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_allclose(mean[:, 1], 1 - 2 * mean[:, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(std[:, 1], 2 * std[:, 0], rtol=1e-9)
    alone = ContinuousFlowRegressor(**QUICK).fit(X, y).predict(X[:3], quantiles=[0.1, 0.9])
    q = model.predict(X[:3], quantiles=[0.1, 0.9])
    assert np.abs(q[:, 0] - alone).max() < 0.3  # another content, other folds
    np.testing.assert_allclose(q[:, 1, 1], 1 - 2 * q[:, 0, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(q[:, 1, 0], 1 - 2 * q[:, 0, 1], rtol=1e-9, atol=1e-9)
    assert (model.score_samples(X, np.column_stack([y, y])) < -1e5).all()


# --- tables as they come ---


def test_a_constant_target_is_predicted_exactly():
    X = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.warns(UserWarning, match="column 0 of y is constant"):
        model = ContinuousFlowRegressor(**QUICK).fit(X, np.full(50, 3.0))
    mean, std = model.predict(X, return_std=True)
    assert (mean == 3).all() and (std == 0).all()
    assert (model.sample(X, 2, random_state=0) == 3).all()


def test_counts_are_sampled_as_counts_and_have_a_finite_density():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 2))
    y = rng.poisson(np.exp(0.5 * X[:, 0]))
    model = ContinuousFlowRegressor(**QUICK).fit(X, y)
    assert model.column_kinds_.tolist() == ["integer"]
    draws = model.sample(X, 3, random_state=0)
    assert (draws == np.round(draws)).all() and draws.min() >= 0
    assert model.score_samples(X, y).max() < 0  # masses below 1 in cells of width 1


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12, 30])
def test_few_rows_are_enough(n):
    X, y, *_ = noisy_wave(n, 5)
    model = ContinuousFlowRegressor(**QUICK)
    if n == 1:
        with pytest.warns(UserWarning, match="constant"):
            model.fit(X, y)
    else:
        model.fit(X, y)
    mean, std = model.predict(X, return_std=True)
    assert np.isfinite(mean).all() and np.isfinite(std).all()
    assert np.isfinite(model.score_samples(X, y)).all()


def test_a_row_of_great_weight_is_no_obstacle():
    X, y, *_ = noisy_wave(60, 10)
    model = ContinuousFlowRegressor(**QUICK | {"n_members": 5}).fit(X, y, sample_weight=np.r_[60.0, np.ones(59)])
    assert np.isfinite(model.predict(X)).all()


def test_heavy_tails_of_several_targets_do_not_pull_the_means():
    X = np.linspace(-1, 1, 8)[:, None]
    Y = np.column_stack([X[:, 0], 3 * X[:, 0] ** 2])
    model = ContinuousFlowRegressor(**QUICK | {"base": "student_t"}).fit(X, Y)
    assert (np.abs(model.predict(X) - Y.mean(axis=0)) < 5 * Y.std(axis=0)).all()


def test_rows_that_cannot_be_solved_are_named(wave_model):
    model = pickle.loads(pickle.dumps(wave_model)).set_params(max_num_steps=1, rtol=1e-9)
    with pytest.raises(SolverError, match="raise max_num_steps or rtol") as caught:
        model.predict([[0.1], [0.2], [0.3]])
    assert list(caught.value.rows) == [0, 1, 2]


def test_far_rows_get_finite_predictions(wave_model):
    mean, std = wave_model.predict([[1e6], [-1e6]], return_std=True)
    assert np.isfinite(mean).all() and (std > 0).all()
    assert np.isfinite(wave_model.score_samples([[1e6]], [1e6])).all()


def test_scales_of_x_and_y_do_not_matter():
    X, y, *_ = noisy_wave(120, 6)
    plain = ContinuousFlowRegressor(**QUICK).fit(X, y)
    scaled = ContinuousFlowRegressor(**QUICK).fit(X * 2.0**40, y * 2.0**-30)
    # Members, folds and noise are chosen by content, which is another one: near, not equal.
    np.testing.assert_allclose(scaled.predict(X * 2.0**40) * 2.0**30, plain.predict(X), atol=0.3)


def test_a_frame_gives_the_same_predictions(wave):
    X, y = wave[0][:80], wave[1][:80]
    frame, target = pd.DataFrame(X, columns=["x"]), pd.Series(y, name="y")
    model = ContinuousFlowRegressor(**QUICK).fit(frame, target)
    assert model.feature_names_in_.tolist() == ["x"]
    plain = ContinuousFlowRegressor(**QUICK).fit(X, y)
    np.testing.assert_array_equal(model.predict(frame), plain.predict(X))


# --- promises ---


def test_a_row_is_predicted_alike_in_any_company(wave_model, wave):
    X, y = wave[0][:60], wave[1][:60]
    np.testing.assert_array_equal(wave_model.predict(X)[7:9], wave_model.predict(X[7:9]))
    np.testing.assert_array_equal(wave_model.score_samples(X, y)[7:9], wave_model.score_samples(X[7:9], y[7:9]))
    q = [0.1, 0.9]
    np.testing.assert_array_equal(wave_model.predict(X, quantiles=q)[7:9], wave_model.predict(X[7:9], quantiles=q))


def test_the_same_seed_gives_the_same_bits(wave):
    X, y, *_ = wave
    first, second = (ContinuousFlowRegressor(**QUICK).fit(X[:80], y[:80]) for _ in range(2))
    X = X[:50]
    np.testing.assert_array_equal(first.predict(X), second.predict(X))
    np.testing.assert_array_equal(first.sample(X, 2, random_state=1), second.sample(X, 2, random_state=1))


@pytest.mark.parametrize("n", [30, 90])
def test_a_weight_of_2_is_the_row_twice_and_one_of_0_none(n):
    X, y, *_ = noisy_wave(n, 7)
    weight = np.random.default_rng(0).integers(0, 3, size=n)
    weighted = ContinuousFlowRegressor(**QUICK).fit(X, y, sample_weight=weight)
    repeated = ContinuousFlowRegressor(**QUICK).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_array_equal(weighted.predict(X), repeated.predict(X))
    np.testing.assert_array_equal(weighted.score_samples(X, y), repeated.score_samples(X, y))


def test_the_order_of_rows_does_not_matter():
    X, y, *_ = noisy_wave(90, 8)
    order = np.random.default_rng(0).permutation(90)
    first = ContinuousFlowRegressor(**QUICK).fit(X, y)
    second = ContinuousFlowRegressor(**QUICK).fit(X[order], y[order])
    np.testing.assert_array_equal(first.predict(X), second.predict(X))


def test_a_fitted_model_survives_pickling(wave_model, wave):
    again, X = pickle.loads(pickle.dumps(wave_model)), wave[0][:50]
    np.testing.assert_array_equal(again.predict(X), wave_model.predict(X))


def test_predictions_do_not_change_the_object(wave_model, wave):
    before = pickle.dumps(wave_model)
    wave_model.predict(wave[0][:5], return_std=True)
    wave_model.score_samples(wave[0][:5], wave[1][:5])
    assert pickle.dumps(wave_model) == before


def test_a_failed_fit_leaves_the_object_as_it_was(wave):
    X, y, *_ = wave
    model = ContinuousFlowRegressor(**QUICK).fit(X[:60], y[:60])
    before = model.predict(X[:20])
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.full((60, 1), np.nan), y[:60])
    np.testing.assert_array_equal(model.predict(X[:20]), before)


def test_it_works_in_pipelines_searches_and_cross_validation(wave):
    X, y, *_ = wave
    pipe = make_pipeline(StandardScaler(), ContinuousFlowRegressor(**QUICK))
    assert cross_val_predict(pipe, X[:90], y[:90], cv=3).shape == (90,)
    search = GridSearchCV(ContinuousFlowRegressor(**QUICK), {"rtol": [1e-1, 1e-2]}, cv=2).fit(X[:90], y[:90])
    assert search.best_score_ > 0.3


def test_a_warm_start_goes_on_with_the_flows():
    X, y, *_ = noisy_wave(200, 9)
    X, y = X[:60], y[:60]
    model = ContinuousFlowRegressor(**QUICK, warm_start=True).fit(X, y)
    first = model._flows[0].field_arrays
    second = model.fit(X, y)._flows[0].field_arrays
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    mean = model.predict(X[:20])
    with pytest.raises(ValueError, match="n_members=3"):
        model.set_params(n_members=3).fit(X, y)
    with pytest.raises(ValueError, match="y has 2 targets; the model that warm_start goes on with has 1"):
        model.set_params(n_members=2).fit(X, np.column_stack([y, y**2]))
    with pytest.raises(ValueError, match="warm_start goes on with the field of the last fit"):
        model.set_params(activation="softplus").fit(X, y)
    np.testing.assert_array_equal(model.predict(X[:20]), mean)


def test_the_solver_tells_what_it_did(wave_model):
    stats = wave_model.solver_stats(pd.DataFrame({"x": [0.1, 0.2]}, index=["a", "b"]).to_numpy())
    assert list(stats.columns) == ["n_evals", "n_steps", "n_rejected", "status"]
    assert (stats["status"] == 0).all() and (stats["n_evals"] > 0).all()


@pytest.mark.parametrize("quantiles", [[0.0], [1.5], [[0.1]], 0.5])
def test_what_is_no_list_of_probabilities_is_refused(wave_model, quantiles):
    with pytest.raises(ValueError, match="quantiles"):
        wave_model.predict([[0.0]], quantiles=quantiles)


def test_deviations_and_quantiles_are_asked_for_one_by_one(wave_model):
    with pytest.raises(ValueError, match="at once"):
        wave_model.predict([[0.0]], return_std=True, quantiles=[0.5])


def test_targets_of_another_number_are_refused(wave_model):
    with pytest.raises(ValueError, match="y has 2 targets; the fit had 1"):
        wave_model.score_samples([[0.0]], [[0.0, 1.0]])


# --- parts ---


def test_quantiles_of_a_mean_of_distributions_are_between_the_members():
    nodes = np.linspace(0.01, 0.99, 99)
    Y = np.stack([nodes, 2 + nodes])[:, None]  # uniform on (0, 1) and on (2, 3)
    found = quantiles_of_mean(Y, nodes, np.array([0.25, 0.75]))
    np.testing.assert_allclose(found, [[0.5, 2.5]], atol=0.01)


def test_members_that_were_trained_without_a_row_predict_it_worse():
    X, y = load_diabetes(return_X_y=True)
    model = FoldedRegressor.of("cpu", "auto", 0).fit(X, y)
    held_out, seen = model.held_out_predictions(X)[:, 0], model.predict(X)
    assert np.mean((y - held_out) ** 2) > 1.1 * np.mean((y - seen) ** 2)
    assert np.mean((y - held_out) ** 2) < y.var() * 0.65
