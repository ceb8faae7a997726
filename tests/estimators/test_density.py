"""What ContinuousFlowDensity promises: the density itself, its exactness, samples and the base distribution."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_moons
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from skode import ContinuousFlowDensity
from skode.estimators.fitted_flow import CHUNK_NUMBERS, chunks, exact_solver, in_blocks
from skode.exceptions import DivergenceError
from skode.fields import PlanarField

QUICK = {"max_iter": 8, "hidden_layer_sizes": 16, "random_state": 0}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Tables here are small: blocks of 256 rows are filled up with fewer copies, and large calls have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skode.models.blocks.BLOCK_STATES", 256)
        yield


@parametrize_with_checks([ContinuousFlowDensity(max_iter=8)])
def test_scikit_learns_checks_pass(estimator, check):
    check(estimator)


def test_no_check_is_dodged():
    tags = ContinuousFlowDensity().__sklearn_tags__()
    assert tags.estimator_type == "outlier_detector"
    assert not tags.non_deterministic and not tags.no_validation and not tags._skip_test


@pytest.fixture(scope="module")
def moons():
    return make_moons(240, noise=0.1, random_state=0)[0]


OPTIONS = {
    "normal": {"base": "normal"},
    "student_t": {"base": "student_t"},
    "mixture": {"base": "mixture"},
    "auto": {"max_iter": 60},
    "planar": {"net": "planar", "base": "normal", "hidden_layer_sizes": 8},
    "members": {"n_members": 2},
}


@pytest.fixture(scope="module")
def fitted(moons):
    """A fitted estimator for each option, made when it is first asked for."""
    known = {}

    def get(option):
        if option not in known:
            known[option] = ContinuousFlowDensity(**QUICK).set_params(**OPTIONS[option]).fit(moons)
        return known[option]

    return get


# --- the density ---


@pytest.mark.parametrize("option", OPTIONS)
def test_the_density_integrates_to_one(fitted, moons, option):
    density, side = fitted(option), 40 if option == "planar" else 120
    u = 2 * (np.arange(side) + 0.5) / side - 1
    if option == "student_t":  # far tails: x = sinh(8 u) is fine in the middle
        x, width = np.sinh(8 * u), 8 * np.cosh(8 * u) * 2 / side
    else:
        x, width = 4 * u, np.full(side, 8 / side)
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2) + moons.mean(axis=0)
    mass = np.exp(density.score_samples(grid)) @ np.outer(width, width).ravel()
    assert mass == pytest.approx(1, abs=1e-3)


def test_a_gaussian_is_recovered_within_two_hundredths_of_a_nat():
    rng = np.random.default_rng(0)
    factor = np.array([[2.0, 0.0, 0.0], [0.5, 0.7, 0.0], [-3.0, 1.0, 20.0]])
    X, fresh = (rng.normal(size=(n, 3)) for n in (2000, 4000))
    truth = -0.5 * (fresh**2).sum(axis=1) - 1.5 * np.log(2 * np.pi) - np.log(np.diag(factor)).sum()
    density = ContinuousFlowDensity(**QUICK).fit(X @ factor.T + 5)
    assert density.score(fresh @ factor.T + 5) == pytest.approx(truth.mean(), abs=0.02)


@pytest.mark.parametrize("data", ["normal", "skewed"])
def test_thirty_rows_are_fitted_no_worse_than_by_a_gaussian(data):
    gaps = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        X, fresh = (rng.normal(size=(n, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]]) for n in (30, 400))
        if data == "skewed":
            X, fresh = np.exp(X / 2), np.exp(fresh / 2)
        density = ContinuousFlowDensity(max_iter=10, hidden_layer_sizes=16, random_state=seed).fit(X)
        gaps.append(density.score(fresh) - _gaussian_score(X, fresh))
    assert np.mean(gaps) >= -1e-5  # the variances' floor


def _gaussian_score(X, fresh):
    centred = fresh - X.mean(axis=0)
    covariance = np.cov(X.T, bias=True)
    far = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
    return float(np.mean(-0.5 * far - 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]))


def _moons_log_density(X, noise, n=2000):
    """Of scikit-learn's two moons: an arc's density by the midpoint rule."""
    angle = (np.arange(n) + 0.5) * np.pi / n
    outer = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    centres = np.concatenate([outer, [1, 0.5] - outer])
    squared = ((X[:, None] - centres) ** 2).sum(axis=2)
    return np.log(np.exp(-0.5 * squared / noise**2).mean(axis=1) / (2 * np.pi * noise**2))


@pytest.mark.parametrize(("base", "max_iter"), [("normal", 120), ("auto", 20)])
def test_two_moons_are_learned_much_better_than_by_a_gaussian(base, max_iter):
    X, fresh = (make_moons(n, noise=0.15, random_state=seed)[0] for n, seed in ((600, 0), (500, 1)))
    density = ContinuousFlowDensity(max_iter=max_iter, hidden_layer_sizes=32, base=base, random_state=0).fit(X)
    truth = float(_moons_log_density(fresh, 0.15).mean())
    gap, gap_of_gaussian = truth - density.score(fresh), truth - _gaussian_score(X, fresh)
    assert gap < 0.4 * gap_of_gaussian


def test_flow_matching_and_likelihood_each_beat_the_base_they_start_from(moons):
    fresh = make_moons(400, noise=0.1, random_state=9)[0]
    start = ContinuousFlowDensity(**{**QUICK, "max_iter": 0}, base="normal").fit(moons).score(fresh)
    for objective in ("flow_matching", "likelihood", "auto"):
        density = ContinuousFlowDensity(**{**QUICK, "max_iter": 30}, base="normal", objective=objective).fit(moons)
        assert density.score(fresh) > start + 0.02, objective


# --- log-densities and their errors ---


@pytest.mark.parametrize("option", ["normal", "student_t", "auto", "planar"])
def test_log_densities_are_within_their_stated_errors_of_a_tight_solve(fitted, moons, option):
    density = fitted(option)
    X = np.concatenate([moons[:60], np.random.default_rng(0).uniform(-4, 4, size=(60, 2))])
    scores, errors = density.score_samples(X, return_error=True)
    true = np.abs(scores - _reference(density, X))
    assert (true <= errors).all()
    assert (errors <= 0.01).all()
    assert np.median(errors) <= max(10 * np.median(true), 1.1e-8)  # nobody asks for a part of 1e-8 nat


def _reference(density, X):
    """Log-densities by a solve to 1e-10."""
    columns = density.columns_
    Z = torch.from_numpy(columns.standardise(X[:, columns.found.kept]))
    flow = density._flows[0].build(torch.float64, torch.device("cpu"))
    found = in_blocks(Z, lambda block, _: flow.densities(block, exact_solver(1e-10)).log_density, torch.device("cpu"))
    return found - columns.log_scale


def test_a_planar_fields_times_are_shared_in_scoring_as_units_of_every_rows_own_are_dear(fitted, moons, monkeypatch):
    density, rows = fitted("planar"), []
    units = PlanarField.dynamics

    def watched(self, **options):
        self.hypernet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
        return units(self, **options)

    monkeypatch.setattr(PlanarField, "dynamics", watched)
    density.score_samples(moons)
    assert rows and set(rows) == {1}


def test_score_error_is_the_training_rows_largest(fitted, moons):
    density = fitted("normal")
    assert density.score_error_ == pytest.approx(density.score_samples(moons, return_error=True)[1].max(), abs=1e-12)


@pytest.mark.parametrize("option", ["normal", "student_t", "auto", "members", "planar"])
def test_a_row_has_its_log_density_in_any_company(fitted, moons, option):
    density = fitted(option)
    together = density.score_samples(moons)
    order = np.random.default_rng(0).permutation(len(moons))
    np.testing.assert_array_equal(density.score_samples(moons[order]), together[order])
    np.testing.assert_array_equal(density.score_samples(moons[7:9]), together[7:9])
    company = np.concatenate([[[1e5, -1e5]], moons[:3]])
    np.testing.assert_array_equal(density.score_samples(company)[1:], together[:3])


@pytest.mark.parametrize(("n_dims", "places"), [(0, 1), (2, 1), (30, 8), (10**5, 1)])
def test_what_is_worked_on_at_a_time_does_not_grow_with_the_table(n_dims, places):
    few, many = list(chunks(10**6, n_dims, places)), list(chunks(10**7, n_dims, places))
    assert [row.start for row in many] == [0, *(row.stop for row in many[:-1])] and many[-1].stop == 10**7
    assert few[0] == many[0] and few[0].stop * n_dims * places <= max(CHUNK_NUMBERS, 512 * n_dims)
    assert not list(chunks(0, n_dims, places))


@pytest.mark.parametrize("option", ["auto", "members", "planar"])
def test_tables_larger_than_what_is_worked_on_at_a_time_have_the_same_results(fitted, moons, option, monkeypatch):
    density, bases = fitted(option), None
    whole = density.score_samples(moons, return_error=True)
    if option != "members":
        bases = density.transform(moons)
        back = density.inverse_transform(bases)
    monkeypatch.setattr("skode.models.blocks.BLOCK_STATES", 64)
    monkeypatch.setattr("skode.estimators.fitted_flow.CHUNK_ROWS", 128)
    parts = density.score_samples(moons, return_error=True)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-7)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-7)
    np.testing.assert_array_equal(density.score_samples(moons[150:]), parts[0][150:])
    X, log_density = density.sample(300, random_state=0, return_log_density=True)
    np.testing.assert_array_equal(density.score_samples(X), log_density)
    assert len(np.unique(X, axis=0)) == 300
    if bases is not None:
        np.testing.assert_allclose(density.transform(moons), bases, atol=1e-5)
        np.testing.assert_allclose(density.inverse_transform(bases), back, atol=1e-5)


@pytest.mark.parametrize("option", ["normal", "student_t", "auto", "members", "planar"])
def test_only_rows_unlike_the_training_rows_are_solved_a_second_time(fitted, moons, option, monkeypatch):
    density, checked = fitted(option), []
    everything = density.score_samples(moons, return_error=True)[0]
    scores = density._table_scores

    def watched(X, *arguments, check=True):
        if check:
            checked.append(X)
        return scores(X, *arguments, check=check)

    monkeypatch.setattr(density, "_table_scores", watched)
    np.testing.assert_array_equal(density.score_samples(moons), everything)
    assert not checked
    far = moons[:3] + np.array([50.0, -50.0])
    found = density.score_samples(np.concatenate([moons[:20], far]))
    np.testing.assert_array_equal(checked, [far])
    np.testing.assert_array_equal(found[20:], density.score_samples(far, return_error=True)[0])


def test_score_is_the_mean(fitted, moons):
    density = fitted("auto")
    assert density.score(moons[:50]) == pytest.approx(density.score_samples(moons[:50]).mean(), rel=1e-14)


@pytest.mark.parametrize("option", ["normal", "student_t", "mixture", "auto", "members"])
def test_points_a_hundred_deviations_away_have_finite_and_low_log_densities(fitted, moons, option):
    density = fitted(option)
    far = moons.mean(axis=0) + 100 * moons.std(axis=0) * np.array([[1, 0], [0, -1], [-1, 1], [100, 100]])
    scores, errors = density.score_samples(far, return_error=True)
    assert np.isfinite(scores).all() and (errors <= 0.01).all()
    assert (scores < density.score_samples(moons).min()).all()
    assert (density.predict(far) == -1).all()


def test_the_density_is_the_same_whatever_the_tolerance_after_the_fit(fitted, moons):
    density = fitted("normal")
    expected = density.score_samples(moons[:50])
    loose = pickle.loads(pickle.dumps(density)).set_params(rtol=0.5, atol=0.5)
    np.testing.assert_allclose(loose.score_samples(moons[:50]), expected, atol=0.01)


def test_a_change_of_units_shifts_log_densities_by_the_log_of_the_units(moons):
    units = np.array([1e-3, 50.0])
    plain, scaled = (ContinuousFlowDensity(**QUICK).fit(X) for X in (moons, moons * units + 3))
    shift = plain.score(moons) - scaled.score(moons * units + 3)
    assert shift == pytest.approx(np.log(units).sum(), abs=0.25)  # another part is held out


# --- samples ---


def test_the_same_seed_draws_the_same_rows_and_another_others(fitted):
    density = fitted("auto")
    np.testing.assert_array_equal(density.sample(20, random_state=3), density.sample(20, random_state=3))
    assert not np.isin(density.sample(20, random_state=3), density.sample(20, random_state=4)).any()
    assert not np.array_equal(density.sample(5), density.sample(5))


@pytest.mark.parametrize("n_samples", [0, 1, 7])
@pytest.mark.parametrize("option", ["auto", "members"])
def test_samples_have_the_shape_that_was_asked_for(fitted, option, n_samples):
    X, log_density = fitted(option).sample(n_samples, random_state=0, return_log_density=True)
    assert X.shape == (n_samples, 2) and log_density.shape == (n_samples,)
    assert fitted(option).sample(n_samples).shape == (n_samples, 2)
    assert fitted(option).sample().shape == (1, 2)


@pytest.mark.parametrize("n_samples", [-1, 2.5, "3", None])
def test_a_number_of_samples_that_is_none_is_refused(fitted, n_samples):
    with pytest.raises(ValueError, match="n_samples"):
        fitted("auto").sample(n_samples)


@pytest.mark.parametrize("option", OPTIONS)
def test_samples_have_the_moments_of_the_density_and_come_with_their_log_densities(fitted, moons, option):
    density = fitted(option)
    X, log_density = density.sample(1500, random_state=0, return_log_density=True)
    np.testing.assert_array_equal(density.score_samples(X[:100]), log_density[:100])
    if option != "student_t":
        np.testing.assert_allclose(X.mean(axis=0), moons.mean(axis=0), atol=0.12)
        np.testing.assert_allclose(X.std(axis=0), moons.std(axis=0), rtol=0.2)


@pytest.mark.parametrize("option", OPTIONS)
def test_samples_follow_the_density(fitted, option):
    """The share of samples in a box is the density's integral over it."""
    low, high, side, n = np.array([-0.5, 0.25]), np.array([0.5, 1.5]), 24, 3000
    u = (np.arange(side) + 0.5) / side
    places = low + (high - low) * np.stack(np.meshgrid(u, u), axis=-1).reshape(-1, 2)
    mass = np.exp(fitted(option).score_samples(places)).mean() * np.prod(high - low)
    X = fitted(option).sample(n, random_state=1)
    share = (np.abs(X - (low + high) / 2) < (high - low) / 2).all(axis=1).mean()
    assert share == pytest.approx(mass, abs=4 * np.sqrt(mass * (1 - mass) / n))


# --- the base distribution ---


@pytest.mark.parametrize("option", ["normal", "student_t", "mixture", "auto", "planar"])
def test_there_and_back_again_is_exact_to_a_thousandth_of_a_percent(fitted, moons, option):
    density = fitted(option)
    Z = density.transform(moons)
    assert Z.shape == moons.shape
    np.testing.assert_allclose(density.inverse_transform(Z), moons, atol=1e-5)
    far = moons.mean(axis=0) + np.array([[30.0, -20.0]])
    np.testing.assert_allclose(density.inverse_transform(density.transform(far)), far, rtol=1e-4)


@pytest.mark.parametrize("option", ["normal", "student_t", "mixture", "planar"])
def test_the_inverse_of_far_points_is_finite(fitted, option):
    X = fitted(option).inverse_transform(np.array([[100.0, -100.0], [1e4, 1e4]]))
    assert np.isfinite(X).all()


@pytest.mark.parametrize("Z", [np.zeros((3, 5)), np.zeros(2), [[np.nan, 0.0]], [[np.inf, 0.0]]])
def test_points_that_are_none_of_the_base_are_refused(fitted, Z):
    with pytest.raises(ValueError):
        fitted("normal").inverse_transform(Z)


def test_several_flows_have_no_common_base(fitted, moons):
    with pytest.raises(ValueError, match="n_members=2"):
        fitted("members").transform(moons)
    with pytest.raises(ValueError, match="n_members=2"):
        fitted("members").inverse_transform(moons)


def test_the_density_of_members_is_the_mean_of_theirs(fitted, moons):
    density = fitted("members")
    one_each = [pickle.loads(pickle.dumps(density)) for _ in range(2)]
    for k, single in enumerate(one_each):
        single._flows = density._flows[k : k + 1]
    mean = np.log(np.mean([np.exp(single.score_samples(moons[:30])) for single in one_each], axis=0))
    np.testing.assert_allclose(density.score_samples(moons[:30]), mean, rtol=1e-12)


# --- scikit-learn's ways ---


@pytest.mark.parametrize("contamination", [0.05, 0.1, 0.5])
def test_contamination_is_the_share_of_training_rows_called_outliers(moons, contamination):
    density = ContinuousFlowDensity(**QUICK, contamination=contamination)
    labels = density.fit_predict(moons)
    assert (labels == -1).mean() == pytest.approx(contamination, abs=1.5 / len(moons))
    np.testing.assert_array_equal(labels, density.predict(moons))
    scores = density.score_samples(moons)
    np.testing.assert_array_equal(density.decision_function(moons), scores - density.offset_)
    np.testing.assert_array_equal(labels == -1, density.decision_function(moons) < 0)
    assert scores[labels == -1].max() < scores[labels == 1].min()


@pytest.mark.parametrize("contamination", [0.0, 0.51, -0.1, np.nan, "a few"])
def test_contamination_out_of_range_is_refused(moons, contamination):
    with pytest.raises(ValueError, match="contamination"):
        ContinuousFlowDensity(contamination=contamination).fit(moons)


def test_nothing_works_before_the_fit(moons):
    density = ContinuousFlowDensity()
    for call in (density.score_samples, density.predict, density.transform, density.inverse_transform, density.score):
        with pytest.raises(NotFittedError):
            call(moons)
    with pytest.raises(NotFittedError):
        density.sample()


def test_random_state_decides_everything_and_global_generators_are_left_alone(moons):
    before = torch.get_rng_state(), np.random.get_state(), torch.get_num_threads(), torch.get_default_dtype()
    arguments = {**QUICK, "base": "normal"}
    first, second = (ContinuousFlowDensity(**arguments).fit(moons) for _ in range(2))
    other = ContinuousFlowDensity(**{**arguments, "random_state": 1}).fit(moons)
    first.sample(3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True))
    assert (before[2], before[3]) == (torch.get_num_threads(), torch.get_default_dtype())
    np.testing.assert_array_equal(first.score_samples(moons), second.score_samples(moons))
    assert not np.array_equal(first.score_samples(moons), other.score_samples(moons))


def test_a_pickle_and_a_refitted_clone_give_the_same_bits(fitted, moons):
    density = fitted("auto")
    copy = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(copy.score_samples(moons), density.score_samples(moons))
    np.testing.assert_array_equal(copy.sample(4, random_state=0), density.sample(4, random_state=0))
    again = clone(density).fit(moons)
    np.testing.assert_array_equal(again.score_samples(moons), density.score_samples(moons))


def test_the_pickle_holds_nothing_of_torch(fitted):
    assert b"torch" not in pickle.dumps(fitted("auto")).replace(b"torch.float", b"")


@pytest.mark.parametrize("grid", [{"max_iter": [2, 4]}, {"rtol": [1e-1, 1e-3]}], ids=["max_iter", "rtol"])
def test_a_grid_search_goes_by_log_likelihood(moons, grid):
    density = ContinuousFlowDensity(**QUICK, base="normal")
    search = GridSearchCV(density, grid, cv=2).fit(moons[:120])
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.score(moons) == search.best_estimator_.score(moons)


def test_a_failed_fit_changes_nothing(fitted, moons):
    density = pickle.loads(pickle.dumps(fitted("auto")))
    before = pickle.dumps(density.__dict__)
    with pytest.raises(ValueError, match="NaN"):
        density.fit(np.where(moons > 1.5, np.nan, moons)[:, [0, 1, 1]])
    assert pickle.dumps(density.__dict__) == before
    density.set_params(learning_rate_init=1e30, base="normal", max_iter=8)
    with pytest.raises(DivergenceError, match="learning_rate_init"):
        density.fit(moons[:, [0, 1, 0]] + np.random.default_rng(0).normal(size=(len(moons), 3)))
    np.testing.assert_array_equal(density.score_samples(moons), fitted("auto").score_samples(moons))


def test_a_fit_that_fails_for_the_first_time_leaves_no_trace(moons):
    density = ContinuousFlowDensity(**QUICK)
    with pytest.raises(ValueError):
        density.fit(np.where(moons > 1.5, np.inf, moons))
    assert not [name for name in vars(density) if name.endswith("_")]
