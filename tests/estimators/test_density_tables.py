"""ContinuousFlowDensity on tables as they come: weights, frames, discrete and degenerate columns, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import make_moons

from skode import ContinuousFlowDensity
from skode.exceptions import SolverError

QUICK = {"max_iter": 6, "hidden_layer_sizes": 16, "random_state": 0}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Tables here are small: blocks of 256 rows are filled up with fewer copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skode.models.blocks.BLOCK_STATES", 256)
        yield


def _fit(X, sample_weight=None, **arguments):
    return ContinuousFlowDensity(**{**QUICK, **arguments}).fit(X, sample_weight=sample_weight)


def _quietly(X, **arguments):
    """A fit whose warnings about left-out columns are expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="column", category=UserWarning)
        return _fit(X, **arguments)


# --- weights and order ---


@pytest.mark.parametrize("base", ["normal", "auto"])
@pytest.mark.parametrize("n", [20, 200])
def test_weights_are_repetitions_and_zero_is_no_row(n, base):
    X = make_moons(n, noise=0.1, random_state=0)[0]
    weight = np.random.default_rng(1).integers(0, 4, size=n)
    weighted = _fit(X, weight, base=base)
    repeated = _fit(np.repeat(X, weight, axis=0), base=base)
    dropped = _fit(X[weight > 0], weight[weight > 0], base=base)
    expected = weighted.score_samples(X)
    np.testing.assert_allclose(repeated.score_samples(X), expected, rtol=1e-7, atol=1e-7)
    np.testing.assert_array_equal(dropped.score_samples(X), expected)
    assert repeated.offset_ == pytest.approx(weighted.offset_, abs=1e-6)


def test_weights_of_discrete_columns_are_repetitions():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=120), rng.integers(5, size=120)])
    weight = rng.integers(0, 3, size=120)
    weighted, repeated = _fit(X, weight), _fit(np.repeat(X, weight, axis=0))
    np.testing.assert_array_equal(weighted.column_kinds_, repeated.column_kinds_)
    np.testing.assert_allclose(repeated.score_samples(X), weighted.score_samples(X), rtol=1e-7, atol=1e-7)


def test_weights_move_the_density():
    X = np.concatenate([make_moons(100, noise=0.1, random_state=k)[0] + 10 * k for k in (0, 1)])
    heavy = _fit(X, np.repeat([9.0, 1.0], 100)).sample(400, random_state=0)
    assert np.mean(heavy[:, 0] < 5) == pytest.approx(0.9, abs=0.05)


def test_the_order_of_rows_does_not_matter():
    X = make_moons(150, noise=0.1, random_state=0)[0]
    order = np.random.default_rng(0).permutation(150)
    expected = _fit(X).score_samples(X)
    np.testing.assert_array_equal(_fit(X[order]).score_samples(X), expected)


@pytest.mark.parametrize("weight", [np.zeros(30), -np.ones(30), np.full(30, np.nan), np.ones(29)])
def test_weights_that_are_none_are_refused(weight):
    X = np.random.default_rng(0).normal(size=(30, 2))
    with pytest.raises(ValueError, match=r"[Ww]eight"):
        _fit(X, weight)


# --- frames ---


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame({"height": rng.normal(170, 8, 100), "children": rng.integers(0, 5, 100), "unit": 7.0})


def test_messages_and_results_name_a_frames_columns(frame):
    with pytest.warns(UserWarning, match=r"'unit' of X is constant \(7\)"):
        density = _fit(frame)
    assert list(density.feature_names_in_) == list(frame.columns)
    assert density.column_kinds_.tolist() == ["continuous", "integer", "constant"]
    np.testing.assert_array_equal(
        density.score_samples(frame), _quietly(frame.to_numpy()).score_samples(frame.to_numpy())
    )
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame.iloc[:, ::-1])


def test_discrete_takes_names_and_numbers(frame):
    frame = frame.drop(columns="unit")
    assert _fit(frame, discrete=["children"]).column_kinds_.tolist() == ["continuous", "integer"]
    assert _fit(frame.to_numpy(), discrete=[1]).column_kinds_.tolist() == ["continuous", "integer"]
    assert _fit(frame, discrete=None).column_kinds_.tolist() == ["continuous", "continuous"]
    with pytest.raises(ValueError, match="weight"):
        _fit(frame, discrete=["weight"])
    with pytest.raises(ValueError, match="'height'"):
        _fit(frame, discrete=["height"])


def test_set_output_gives_frames(frame):
    with pytest.warns(UserWarning, match="'unit'"):
        density = ContinuousFlowDensity(**QUICK).set_output(transform="pandas").fit(frame)
    Z = density.transform(frame)
    assert list(Z.columns) == ["continuousflowdensity0", "continuousflowdensity1"]
    assert list(Z.index) == list(frame.index)
    back = np.asarray(density.inverse_transform(Z))
    np.testing.assert_allclose(back, frame.to_numpy(), rtol=1e-6)


# --- discrete and degenerate columns ---


def _mixed(n=300):
    """Continuous, integer, rounded, constant, copied and combined columns."""
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=n), rng.integers(0, 6, size=n)
    tenths = np.round(0.5 * x + rng.normal(size=n), 1)
    return np.column_stack([x, k, tenths, np.full(n, 3.0), x, 2 * x - k, rng.integers(2, size=n) * 5.0])


@pytest.fixture(scope="module")
def mixed():
    X = _mixed()
    return X, _quietly(X)


def test_samples_keep_lattices_constants_copies_and_combinations(mixed):
    X, density = mixed
    expected = ["continuous", "integer", "rounded", "constant", "duplicate", "collinear", "binary"]
    assert density.column_kinds_.tolist() == expected
    S, log_density = density.sample(400, random_state=0, return_log_density=True)
    assert set(S[:, 1]) <= set(range(6)) and set(S[:, 6]) == {0.0, 5.0}
    np.testing.assert_array_equal(S[:, 2], np.round(S[:, 2], 1))
    assert (S[:, 3] == 3).all()
    np.testing.assert_array_equal(S[:, 4], S[:, 0])
    np.testing.assert_allclose(S[:, 5], 2 * S[:, 0] - S[:, 1], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(density.score_samples(S), log_density)
    assert log_density.min() > -100
    np.testing.assert_allclose(S.mean(axis=0), X.mean(axis=0), atol=0.5)


def test_rows_go_to_the_base_and_back_to_their_lattices(mixed):
    X, density = mixed
    Z = density.transform(X)
    assert Z.shape == (len(X), 4)
    assert density.get_feature_names_out().tolist() == [f"continuousflowdensity{j}" for j in range(4)]
    back = density.inverse_transform(Z)
    np.testing.assert_array_equal(back[:, [1, 2, 3, 6]], X[:, [1, 2, 3, 6]])
    np.testing.assert_allclose(back, X, atol=1e-5)


def test_a_row_off_the_tables_surface_is_told_apart_by_a_finite_score(mixed):
    X, density = mixed
    off = X[:2].copy()
    off[0, 3] = 4.0
    off[1, 4] += 1.0
    scores = density.score_samples(off)
    assert np.isfinite(scores).all() and (scores < -1e5).all()
    assert (density.predict(off) == -1).all()


def test_a_degenerate_column_changes_no_log_density():
    X = make_moons(150, noise=0.1, random_state=0)[0]
    plain = _fit(X)
    for more in (np.full(150, 2.0), X[:, 0], X @ [2.0, 3.0]):
        wider = np.column_stack([X, more])
        with pytest.warns(UserWarning, match="column 2"):
            density = _fit(wider)
        assert density.score(wider) == pytest.approx(plain.score(X), abs=0.1)


def test_the_masses_of_a_dice_are_its_log_densities():
    X = np.random.default_rng(0).choice([1, 2, 3, 4], p=[0.1, 0.2, 0.3, 0.4], size=(1500, 1))
    density = _fit(X, max_iter=60)
    mass = np.exp(density.score_samples(np.arange(-4, 10.0)[:, None]))
    np.testing.assert_allclose(mass[5:9], [0.1, 0.2, 0.3, 0.4], atol=0.06)
    assert mass.sum() == pytest.approx(1, abs=0.01)
    half = _fit(X / 2, max_iter=60).score(X / 2)
    assert half == pytest.approx(density.score(X) + np.log(2), abs=0.02)


def test_two_outcomes_have_their_frequencies():
    X = (np.random.default_rng(0).random((600, 1)) < 0.3) * 10.0
    mass = np.exp(_fit(X, max_iter=40).score_samples([[0.0], [10.0]])) * 10
    np.testing.assert_allclose(mass, [1 - X.mean() / 10, X.mean() / 10], atol=0.1)


# --- adversarial tables ---


def _tables():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    outliers = x.copy()
    outliers[[3, 40], [0, 2]] = 1e6, -1e9
    return {
        "constant": np.column_stack([x, np.full(80, 5.0)]),
        "all constant": np.full((80, 3), 5.0),
        "duplicated": np.column_stack([x, x[:, 1]]),
        "duplicated rows": np.repeat(x[:8], 10, axis=0),
        "one row many times": np.repeat(x[:1], 40, axis=0),
        "collinear": np.column_stack([x, x @ [1.0, -2.0, 0.5]]),
        "one-hot": np.column_stack([np.eye(4)[rng.integers(4, size=80)], x[:, 0]]),
        "nothing but one-hot": np.eye(4)[rng.integers(4, size=80)],
        "integers": rng.poisson(4, size=(80, 3)).astype(float),
        "large integers": rng.integers(0, 10**9, size=(80, 2)).astype(float),
        "lattice": np.round(x, 1),
        "huge outliers": outliers,
        "n < D": rng.normal(size=(5, 12)),
        "n = 1": x[:1],
        "n = 2": x[:2],
        "scales": x * [1e12, 1.0, 1e-12],
        "far from 0": x * [1.0, 1e-3, 1.0] + [1e9, 1e4, -1e6],
        "heavy tails": rng.standard_cauchy(size=(80, 2)),
        "tiny": x * 1e-200,
        "mostly zeros": np.where(rng.random((80, 2)) < 0.9, 0.0, rng.normal(size=(80, 2))),
    }


@pytest.mark.parametrize("name", list(_tables()))
def test_an_adversarial_table_has_finite_results(name):
    X = _tables()[name]
    density = _quietly(X)
    scores, errors = density.score_samples(X, return_error=True)
    assert np.isfinite(scores).all() and (errors <= 0.01).all() and np.isfinite(density.offset_)
    assert scores.min() > -1e5  # no row of the table breaks what was found in it
    assert scores.max() < 60 + 460 * (name == "tiny") * X.shape[1]  # no likelihood runs off to infinity
    S, log_density = density.sample(20, random_state=0, return_log_density=True)
    assert S.shape == (20, X.shape[1]) and np.isfinite(S).all() and np.isfinite(log_density).all()
    assert set(density.predict(X)) <= {-1, 1}
    far = X[:1] + 100 * np.where(np.ptp(X, axis=0) > 0, np.ptp(X, axis=0), 1)
    assert np.isfinite(density.score_samples(far)).all()
    assert np.isfinite(density.inverse_transform(density.transform(X[:2]))).all()


def test_a_huge_outlier_does_not_blur_the_other_rows():
    X = np.random.default_rng(0).normal(size=(200, 2))
    plain = _fit(X).score(X)
    X_far = np.concatenate([X, [[1e7, -1e5]]])
    assert _fit(X_far).score(X) > plain - 0.3


@pytest.mark.parametrize("name", ["collinear", "one-hot", "duplicated", "constant"])
def test_a_column_that_is_left_out_is_named_once(name):
    with pytest.warns(UserWarning) as found:
        _fit(_tables()[name])
    messages = [str(warning.message) for warning in found]
    assert len(messages) == 1 and messages[0].startswith("column 3 of X is ")


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.array([[1.0, np.nan], [2.0, 3.0]]), "NaN"),
        (np.array([[1.0, np.inf], [2.0, 3.0]]), "infinity"),
        (np.array([[1.0, 1e200], [2.0, 3.0]]), "column 1 of X is too large"),
        (np.zeros((0, 2)), "0 sample"),
        (np.zeros((3, 0)), "0 feature"),
        (np.zeros(3), "2D array"),
        (np.array([["a", "b"]]), "could not convert|dtype"),
        (np.array([[1j, 2.0]]), "[Cc]omplex"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_by_one_clear_error(X, message):
    with pytest.raises(ValueError, match=message):
        _fit(X)


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_layer_sizes": 0},
        {"hidden_layer_sizes": ()},
        {"hidden_layer_sizes": (8, -1)},
        {"activation": "no such"},
        {"base": "cauchy"},
        {"objective": "mle"},
        {"n_members": 0},
        {"rtol": 0.0},
        {"max_iter": -1},
        {"learning_rate_init": 0.0},
        {"device": "no such device"},
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(arguments):
    X = np.random.default_rng(0).normal(size=(60, 2))
    with pytest.raises((ValueError, RuntimeError), match=next(reversed(arguments))):
        _fit(X, **arguments)


def test_queries_are_checked_as_the_table_was():
    density = _fit(np.random.default_rng(0).normal(size=(30, 2)))
    for bad in ([[np.nan, 0.0]], [[np.inf, 0.0]], [[1.0]], [[1.0, 2.0, 3.0]], [1.0, 2.0]):
        for method in (density.score_samples, density.predict, density.transform):
            with pytest.raises(ValueError):
                method(bad)


@pytest.mark.parametrize("base", ["normal", "student_t", "mixture"])
def test_rows_at_the_end_of_the_numbers_have_a_finite_score_or_are_named(base):
    X = np.random.default_rng(0).normal(size=(30, 2)) / 10
    density = _fit(X, base=base)
    scores, errors = density.score_samples([[1e140, -1e140], [1e200, 0.0]], return_error=True)
    assert np.isfinite(scores).all() and np.isfinite(errors).all() and (scores < -1e4).all()
    for method in (density.score_samples, density.transform):
        with pytest.raises(SolverError, match="row 1 ") as caught:
            method([[0.0, 0.0], [1.7e308, 0.0]])
        assert list(caught.value.rows) == [1]


def test_a_field_that_is_not_finite_is_told_and_not_passed_on():
    X = np.random.default_rng(0).normal(size=(60, 2))
    density = _fit(X, base="normal")
    for array in density._flows[0].field_arrays.values():
        array[...] = np.nan
    for method in (density.score_samples, density.predict, density.transform, density.inverse_transform):
        with pytest.raises(SolverError, match="row 0"):
            method(X)
    with pytest.raises(SolverError, match="row 0"):
        density.sample(3)
