"""What a fitted density is asked for beside log-densities: conditional samples and gradients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_moons

from skode import ContinuousFlowDensity
from skode.estimators.conditioning import conditioned
from skode.exceptions import ConvergenceWarning, SolverError

COVARIANCE = np.array([[1.0, 0.8, 0.0], [0.8, 2.0, -0.5], [0.0, -0.5, 0.5]])


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skode.models.blocks.BLOCK_STATES", 256)
        yield


@pytest.fixture(scope="module")
def gaussian():
    """A fitted Gaussian: without updates it is the mixture, here of one component."""
    X = np.random.default_rng(0).multivariate_normal([1.0, -2.0, 3.0], COVARIANCE, size=2000)
    return ContinuousFlowDensity(max_iter=0, base="mixture", random_state=0).fit(X), X


@pytest.fixture(scope="module")
def moons():
    X = make_moons(300, noise=0.1, random_state=0)[0]
    return ContinuousFlowDensity(max_iter=30, n_members=2, random_state=0).fit(X), X


# --- conditions ---


def test_conditional_samples_of_a_gaussian_have_its_conditional_moments(gaussian):
    density, X = gaussian
    mean, covariance = X.mean(axis=0), np.cov(X.T)
    rows = density.sample(2000, random_state=0, given={1: -1.0})
    assert (rows[:, 1] == -1.0).all()
    gain = covariance[[0, 2], 1] / covariance[1, 1]
    exact = covariance[np.ix_([0, 2], [0, 2])] - np.outer(gain, covariance[1, [0, 2]])
    np.testing.assert_allclose(rows[:, [0, 2]].mean(axis=0), mean[[0, 2]] + gain * (-1 - mean[1]), atol=0.06)
    np.testing.assert_allclose(np.cov(rows[:, [0, 2]].T), exact, atol=0.08)


def test_conditional_log_densities_are_joint_ones_less_the_marginal(gaussian):
    density, X = gaussian
    rows, found = density.sample(50, random_state=0, given={0: 0.5, 2: 3.5}, return_log_density=True)
    mean, covariance = X.mean(axis=0), np.cov(X.T)
    distance = np.array([0.5, 3.5]) - mean[[0, 2]]
    within = covariance[np.ix_([0, 2], [0, 2])]
    log_marginal = -0.5 * (distance @ np.linalg.solve(within, distance) + np.linalg.slogdet(2 * np.pi * within)[1])
    np.testing.assert_allclose(found, density.score_samples(rows) - log_marginal, atol=0.05)


def test_conditional_samples_of_two_moons_lie_on_both(moons):
    density, X = moons
    rows = density.sample(1000, random_state=0, given={0: 0.5})
    near = X[np.abs(X[:, 0] - 0.5) < 0.1, 1]
    assert np.mean(rows[:, 1] > 0.25) == pytest.approx(np.mean(near > 0.25), abs=0.15)
    assert np.quantile(rows[:, 1], 0.01) > near.min() - 0.4


def test_columns_are_named_after_a_fit_to_a_frame():
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 2)), columns=["a", "b"])
    density = ContinuousFlowDensity(max_iter=0, random_state=0).fit(X)
    by_name, by_number = (density.sample(5, random_state=0, given={key: 0.5}) for key in ("b", 1))
    np.testing.assert_array_equal(by_name, by_number)


def test_too_few_candidates_are_told(moons, monkeypatch):
    monkeypatch.setattr("skode.estimators.conditioning.CANDIDATES_A_ROW", 1)
    with pytest.warns(ConvergenceWarning, match=r"worth \d+ independent rows, fewer than n_samples=2000"):
        moons[0].sample(2000, random_state=0, given={0: 2.0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": 1.0}, "'c', which X did not have"),
        ({7: 1.0}, "7, which X did not have"),
        ({"a": np.nan}, "must be finite"),
        ({"a": 0.0, "b": 0.0}, "all columns"),
        ({"twice": 0.0}, "left out of the density"),
    ],
)
def test_conditions_that_cannot_be_met_are_refused(given, message):
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(100, 2)), columns=["a", "b"])
    X["twice"] = 2 * X["a"]
    with pytest.warns(UserWarning, match="linear combination"):
        density = ContinuousFlowDensity(max_iter=0, random_state=0).fit(X)
    with pytest.raises(ValueError, match=message):
        density.sample(3, given=given)


def test_candidates_that_cannot_be_solved_spoil_no_others():
    def log_density(Z):
        found = -0.5 * np.square(Z).sum(axis=1)
        found[::7] = np.nan
        return found

    samples, rng = np.random.default_rng(1).normal(size=(500, 2)), np.random.default_rng(0)
    found = conditioned(samples, log_density, np.array([0]), np.array([0.5]), 50, rng)
    assert len(np.unique(found.Z, axis=0)) > 40 and np.isfinite(found.log_marginal)
    with pytest.raises(SolverError, match="no candidate"):
        conditioned(samples, lambda Z: np.full(len(Z), np.nan), np.array([0]), np.array([0.5]), 5, rng)


def test_absurd_conditions_are_refused(moons):
    with pytest.raises(ValueError, match="standard deviations away"):
        moons[0].sample(2, random_state=0, given={0: 1e160})


def test_the_same_seed_gives_the_same_conditional_samples(moons):
    first, second = (moons[0].sample(20, random_state=3, given={1: 0.2}) for _ in range(2))
    np.testing.assert_array_equal(first, second)


# --- gradients ---


def test_the_gradient_of_a_gaussians_log_density_is_linear(gaussian):
    density, X = gaussian
    exact = -(X[:20] - X.mean(axis=0)) @ np.linalg.inv(np.cov(X.T))
    np.testing.assert_allclose(density.log_density_gradient(X[:20]), exact, atol=0.05)


def test_gradients_are_those_of_the_scores(moons):
    density, X = moons
    h = 1e-4
    differences = [
        (density.score_samples(X[:10] + h * unit) - density.score_samples(X[:10] - h * unit)) / (2 * h)
        for unit in np.eye(2)
    ]
    np.testing.assert_allclose(
        density.log_density_gradient(X[:10]), np.stack(differences, axis=1), rtol=2e-3, atol=2e-2
    )


def test_columns_that_were_left_out_have_no_gradient():
    X = np.random.default_rng(0).normal(size=(100, 2))
    with pytest.warns(UserWarning, match="constant"):
        density = ContinuousFlowDensity(max_iter=0, random_state=0).fit(np.column_stack([X, np.ones(100)]))
    gradient = density.log_density_gradient(np.column_stack([X, np.ones(100)]))
    assert (gradient[:, 2] == 0).all() and (gradient[:, :2] != 0).all()


# --- the way between the base and the data ---


@pytest.fixture(scope="module")
def bent():
    """A flow that bends a normal distribution, and rows."""
    X = make_moons(150, noise=0.1, random_state=0)[0]
    return ContinuousFlowDensity((8,), max_iter=8, base="normal", random_state=0).fit(X), X[:20]


def test_a_trajectory_leads_from_the_base_to_the_row(bent):
    density, X = bent
    path, log_density = density.trajectory(X, [0.0, 0.3, 1.0], return_log_density=True)
    columns = density.columns_
    np.testing.assert_allclose(path[:, 2], X, rtol=1e-12)
    np.testing.assert_allclose(path[:, 0], density.transform(X) * columns.scale + columns.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_density[:, 2], density.score_samples(X), atol=0.01)
    normal = -0.5 * np.square(density.transform(X)).sum(axis=1) - np.log(2 * np.pi) - columns.log_scale
    np.testing.assert_allclose(log_density[:, 0], normal, atol=1e-4)


@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
def test_a_trajectory_is_the_same_from_any_of_its_places(bent, start):
    density, X = bent
    times = [0.0, 0.2, 0.4, 0.9, 1.0]
    path, log_density = density.trajectory(X, times, return_log_density=True)
    again = density.trajectory(path[:, times.index(start)], times, start=start, return_log_density=True)
    np.testing.assert_allclose(again[0], path, atol=1e-4)
    np.testing.assert_allclose(again[1], log_density, atol=1e-4)


def test_a_trajectory_does_not_depend_on_the_other_rows(bent):
    density, X = bent
    whole = density.trajectory(X, [0.1, 0.8], return_log_density=True)
    alone = density.trajectory(X[3:4], [0.1, 0.8], return_log_density=True)
    for one, all_ in zip(alone, whole, strict=True):
        np.testing.assert_allclose(one[0], all_[3], rtol=1e-12)


def test_columns_that_were_left_out_are_rebuilt_along_the_way():
    x = np.random.default_rng(0).normal(size=(100, 1))
    with pytest.warns(UserWarning):
        density = ContinuousFlowDensity(max_iter=0, random_state=0).fit(np.hstack([x, x, np.full_like(x, 5.0)]))
    path = density.trajectory([[0.5, 0.5, 5.0]], [0.0, 1.0])
    assert path.shape == (1, 2, 3) and (path[0, :, 2] == 5.0).all()
    np.testing.assert_array_equal(path[0, :, 0], path[0, :, 1])


def test_a_trajectory_needs_times_of_one_flow(bent, moons):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        bent[0].trajectory(bent[1], [0.5], start=1.5)
    with pytest.raises(ValueError, match="no common base"):
        moons[0].trajectory(moons[1][:2], [0.5])
