"""Kinds of columns, dequantising, rebuilding, and the log-density's units."""

import pickle

import numpy as np
import pytest
from scipy import stats
from sklearn import datasets

from skode.estimators.columns import BROKEN_RELATION, Columns


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normals(n: int = 200, d: int = 2, seed: int = 0) -> np.ndarray:
    return rng(seed).normal(size=(n, d))


def one_hot(n: int = 200) -> np.ndarray:
    return np.eye(3)[rng(1).integers(3, size=n)]


def with_outlier() -> np.ndarray:
    X = normals()
    X[17] = 1e12
    return X


def scales() -> np.ndarray:
    return normals() * [1e12, 1e-12]


# The adversarial tables of which a table can be made; NaN is scikit-learn's to refuse.
TABLES = {
    "constant": (lambda: np.column_stack([normals(), np.full(200, 0.1)]), ["continuous"] * 2 + ["constant"]),
    "duplicated": (lambda: normals()[:, [0, 1, 0]], ["continuous"] * 2 + ["duplicate"]),
    "collinear": (
        lambda: normals(d=3) @ np.column_stack([np.eye(3), [0.3, -1.7, 0.0]]),
        ["continuous"] * 3 + ["collinear"],
    ),
    "one-hot": (one_hot, ["binary", "binary", "collinear"]),
    "integers": (lambda: rng().poisson(4, size=(200, 2)).astype(float), ["integer"] * 2),
    "lattice": (lambda: np.round(normals() * 4) / 4 + 0.1, ["rounded"] * 2),
    "huge outlier": (with_outlier, ["continuous"] * 2),
    "n < D": (lambda: normals(5, 20), ["continuous"] * 20),
    "n = 1": (lambda: normals(1, 3), ["constant"] * 3),
    "scales of 1e12 and 1e-12": (scales, ["continuous"] * 2),
    "heavy tails": (lambda: rng().standard_cauchy(size=(500, 2)), ["continuous"] * 2),
    "float32": (lambda: normals().astype(np.float32), ["continuous"] * 2),
    "few levels": (lambda: np.array([0.1, np.sqrt(2), np.pi])[rng().integers(3, size=(300, 1))], ["levels"]),
    "all at once": (
        lambda: np.column_stack([normals(), one_hot(), rng().integers(9, size=200), np.ones(200)]),
        ["continuous"] * 2 + ["binary"] * 2 + ["collinear", "integer", "constant"],
    ),
}
every_table = pytest.mark.parametrize("name", TABLES)


def table(name: str) -> np.ndarray:
    return TABLES[name][0]()


# --- what is found ---


@every_table
def test_kinds_are_found(name: str) -> None:
    assert Columns.fit(table(name)).kinds.tolist() == TABLES[name][1]


@every_table
def test_kinds_do_not_depend_on_the_order_of_rows(name: str) -> None:
    X = table(name)
    assert Columns.fit(X[::-1]).kinds.tolist() == TABLES[name][1]


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"n < D"}))
def test_a_weight_of_two_finds_what_the_row_twice_does_and_one_of_zero_what_no_row_does(name: str) -> None:
    X = table(name)
    weight = rng(3).integers(0, 3, size=len(X))
    weight[0] = 2
    weighted, repeated = Columns.fit(X, weight), Columns.fit(np.repeat(X, weight, axis=0))
    assert weighted.kinds.tolist() == repeated.kinds.tolist()
    assert weighted.n_repeats == repeated.n_repeats
    np.testing.assert_allclose(weighted.scale, repeated.scale, rtol=1e-12)
    np.testing.assert_allclose(
        weighted.mean, repeated.mean, rtol=1e-10, atol=1e-12 * np.abs(repeated.scale).max(initial=0)
    )


@pytest.mark.parametrize("spacing", [0.1, 0.01, 1 / 3, 2.5, 1e-9, 7e11])
@pytest.mark.parametrize("origin", [0.0, 0.05, -1.0])
def test_the_spacing_of_a_lattice_is_found_through_float_noise(spacing: float, origin: float) -> None:
    k = rng().integers(-20, 40, size=500)
    x = (origin + k) * spacing
    x *= 1 + rng(1).integers(-1, 2, size=500) * 2.0**-53
    columns = Columns.fit(x[:, None])
    assert columns.kinds[0] == "rounded"
    assert columns.found.lattices[0].spacing == pytest.approx(spacing, rel=1e-9)


def test_whole_numbers_may_lie_on_a_coarser_lattice() -> None:
    income = 50 + 100 * rng().integers(1, 900, size=(300, 1)).astype(float)
    columns = Columns.fit(income)
    assert columns.kinds[0] == "rounded"
    assert columns.found.lattices[0].spacing == 100
    np.testing.assert_array_equal(columns.restore(columns.standardise(columns.dequantise(income, 0))), income)


def test_a_spacing_that_no_two_neighbours_have_is_found() -> None:
    x = np.repeat([0.0, 0.6, 1.5, 2.1], 10)  # gaps of 2 and 3 times 0.3
    assert Columns.fit(x[:, None]).found.lattices[0].spacing == pytest.approx(0.3)


def test_single_values_off_the_lattice_do_not_hide_it() -> None:
    x = np.round(normals(500, 1) * 5) / 5
    x[3] = 0.12345678912
    columns = Columns.fit(x)
    assert columns.kinds[0] == "rounded"
    assert columns.found.lattices[0].spacing == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(20))
def test_continuous_columns_are_not_taken_for_lattices_however_often_rows_are_repeated(seed: int, dtype: type) -> None:
    X = np.column_stack([rng(seed).normal(size=60), rng(seed).uniform(size=60), rng(seed).exponential(size=60) * 1e3])
    X = np.repeat(X.astype(dtype), 10, axis=0)
    assert Columns.fit(X).kinds.tolist() == ["continuous"] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_numbers_only_because_of_their_size_are_continuous(dtype: type) -> None:
    X = (normals() * 1e17).astype(dtype)
    assert Columns.fit(X).kinds.tolist() == ["continuous"] * 2


def test_a_relation_of_huge_and_tiny_columns_is_found() -> None:
    x = normals() * [1e12, 1e-12]
    X = np.column_stack([x, 3e-12 * x[:, 0] + 1e12 * x[:, 1] + 5])
    assert Columns.fit(X).kinds.tolist() == ["continuous", "continuous", "collinear"]


def test_columns_that_share_an_outlier_are_not_collinear() -> None:
    X = with_outlier()
    assert np.corrcoef(X.T)[0, 1] > 1 - 1e-12
    assert Columns.fit(X).kinds.tolist() == ["continuous"] * 2


def test_nearly_collinear_is_not_collinear() -> None:
    X = normals(300, 3)
    X[:, 2] = X[:, 0] + X[:, 1] + 1e-5 * X[:, 2]
    assert Columns.fit(X).kinds.tolist() == ["continuous"] * 3


def test_of_a_continuous_and_a_discrete_column_the_continuous_one_is_left_out() -> None:
    x, k = normals(d=1)[:, 0], rng(1).integers(5, size=200)
    assert Columns.fit(np.column_stack([x, x + k, k])).kinds.tolist() == ["continuous", "collinear", "integer"]


# --- discrete= ---


def test_nothing_is_discrete_where_none_is_asked_for() -> None:
    assert Columns.fit(table("all at once"), discrete=None).kinds.tolist() == [
        *["continuous"] * 4,
        "collinear",
        "continuous",
        "constant",
    ]


@pytest.mark.parametrize("discrete", [[1], ["b"]])
def test_discrete_columns_can_be_named(discrete: list) -> None:
    X = table("integers")
    assert Columns.fit(X, discrete=discrete, names=["a", "b"]).kinds.tolist() == ["continuous", "integer"]


def test_a_column_that_is_named_is_discrete_however_many_values_it_has() -> None:
    x = np.round(normals(100, 1), 6)
    assert Columns.fit(x).kinds.tolist() == ["continuous"]
    assert Columns.fit(x, discrete=[0]).found.lattices[0].spacing == pytest.approx(1e-6)


def test_errors_and_messages_name_the_column() -> None:
    X = np.column_stack([normals(), np.ones(200), normals()[:, 0]])
    names = ["height", "weight", "planet", "size"]
    with pytest.raises(ValueError, match="column 'weight' of X was named in discrete, but its values have no common"):
        Columns.fit(X, discrete=["weight"], names=names)
    with pytest.raises(ValueError, match="column 1 of X was named in discrete"):
        Columns.fit(X, discrete=[1])
    with pytest.raises(ValueError, match="names column 'age', but X has no such column"):
        Columns.fit(X, discrete=["age"], names=names)
    with pytest.raises(ValueError, match="column 'height' of X is too large"):
        Columns.fit(X * 1e200, names=names)
    planet, size = Columns.fit(X, names=names).messages()
    assert planet.startswith("column 'planet' of X is constant (1)")
    assert size.startswith("column 'size' of X is a copy of column 'height'")


def test_a_table_of_zero_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no row of X has a positive weight"):
        Columns.fit(normals(), np.zeros(200))


# --- to the density and back ---


def off_by(X: np.ndarray, other: np.ndarray) -> float:
    """Largest difference in units of a column's size."""
    return float((np.abs(X - other) / np.maximum(np.abs(X).max(axis=0), 1e-300)).max())


@every_table
def test_what_is_dequantised_is_restored(name: str) -> None:
    X = table(name)
    columns = Columns.fit(X)
    for repeat in range(3):
        Z = columns.standardise(columns.dequantise(X, 5, repeat))
        assert Z.shape == (len(X), columns.n_kept)
        assert np.isfinite(Z).all()
        assert off_by(X, columns.restore(Z)) < (1e-6 if X.dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("name", ["integers", "one-hot", "lattice"])
def test_discrete_values_come_back_to_the_bit(name: str) -> None:
    X = table(name) if name != "lattice" else np.round(normals() * 3, 1)
    columns = Columns.fit(X)
    np.testing.assert_array_equal(columns.restore(columns.standardise(columns.dequantise(X, 0))), X)


@every_table
def test_whatever_is_restored_breaks_no_relation_and_is_on_its_lattice_and_in_range(name: str) -> None:
    X = table(name)
    columns = Columns.fit(X)
    restored = columns.restore(rng(9).normal(size=(300, columns.n_kept)) * 3)
    assert restored.shape == (300, X.shape[1])
    assert (columns.n_broken(restored) == 0).all()
    for j in columns.found.kept:
        if j in columns.found.lattices:
            assert X[:, j].min() - 1e-12 <= restored[:, j].min()
            assert restored[:, j].max() <= X[:, j].max() + 1e-12
            np.testing.assert_allclose(columns.found.lattices[j].snap(restored[:, j]), restored[:, j])


def test_noise_is_uniform_over_the_cell() -> None:
    X = rng().integers(0, 1000, size=(20_000, 2)).astype(float)
    noise = Columns.fit(X).dequantise(X, 0) - X
    rows = np.unique(X, axis=0, return_index=True)[1]  # equal rows have equal noise
    for u in noise[rows].T:
        assert stats.kstest(u + 0.5, "uniform").pvalue > 1e-4


def test_noise_depends_on_content_seed_and_repetition_alone() -> None:
    X = table("integers")
    columns = Columns.fit(X)
    noisy = columns.dequantise(X, 3, 1)
    np.testing.assert_array_equal(columns.dequantise(X[::-1], 3, 1)[::-1], noisy)
    np.testing.assert_array_equal(columns.dequantise(X[4:5], 3, 1), noisy[4:5])
    assert (columns.dequantise(X, 4, 1) != noisy).all()
    assert (columns.dequantise(X, 3, 2) != noisy).all()


def test_repetitions_fill_the_cell_evenly() -> None:
    X = table("integers")
    columns = Columns.fit(X)
    noise = np.array([columns.dequantise(X, 0, r)[0] - X[0] for r in range(64)])
    # The discrepancy of independent draws would be near 1 / sqrt(64) = 0.125.
    for u in noise.T:
        assert stats.kstest(u + 0.5, "uniform").statistic < 0.06


def test_a_table_of_many_equal_rows_wants_many_repetitions() -> None:
    X = rng().integers(4, size=(1000, 1)).astype(float)
    assert Columns.fit(X).n_repeats == 250
    assert Columns.fit(normals()).n_repeats == 1


# --- standardising ---


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_usual_columns_get_mean_zero_and_variance_one(scale: float) -> None:
    X = normals() * scale + 3 * scale
    columns = Columns.fit(X)
    Z = columns.standardise(columns.centres(X))
    np.testing.assert_allclose(Z.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(Z.std(axis=0), 1, rtol=1e-12)


def test_one_huge_outlier_moves_neither_mean_nor_scale() -> None:
    columns = Columns.fit(with_outlier())
    usual = Columns.fit(normals())
    np.testing.assert_allclose(columns.scale, usual.scale, rtol=0.4)
    np.testing.assert_allclose(columns.mean, usual.mean, atol=0.1)


def test_a_group_of_rows_far_away_is_no_outlier() -> None:
    x = np.concatenate([rng().normal(size=800) * 0.01, 100 + rng().normal(size=200) * 0.01])
    assert np.abs(Columns.fit(x[:, None]).standardise(x[:, None])).max() < 3


def test_the_variance_of_a_discrete_column_includes_its_cells() -> None:
    X = rng().integers(2, size=(4000, 1)).astype(float)
    columns = Columns.fit(X)
    Z = np.concatenate([columns.standardise(columns.dequantise(X, 0, r)) for r in range(200)])
    assert Z.std() == pytest.approx(1, abs=0.01)


# --- the log-density's units ---


def normal_log_density(Z: np.ndarray) -> np.ndarray:
    return stats.norm.logpdf(Z).sum(axis=-1)


def cells(columns: Columns, X: np.ndarray, k: int) -> np.ndarray:
    return normal_log_density(columns.standardise(columns.centres(X) + columns.cell_noise(X, k)))


@pytest.mark.parametrize("spacing", [1.0, 0.25, 3.0])
def test_masses_of_a_lattice_sum_to_one(spacing: float) -> None:
    x = np.rint(normals(2000, 1) * 2) * spacing
    columns = Columns.fit(x)
    lattice = spacing * np.arange(-40.0, 41.0)[:, None]
    log_density, broken = columns.log_density(lattice, cells(columns, lattice, 32))
    assert not broken.any()
    # log-density = log(mass) - log(spacing)
    assert (np.exp(log_density) * spacing).sum() == pytest.approx(1, abs=1e-6)
    exact = np.diff(
        stats.norm.cdf(np.append(lattice - spacing / 2, lattice[-1] + spacing / 2), columns.mean, columns.scale)
    )
    np.testing.assert_allclose(np.exp(log_density) * spacing, exact, rtol=0.02, atol=1e-6)


def test_masses_of_two_discrete_columns_sum_to_one() -> None:
    X = rng().poisson(3, size=(2000, 2)).astype(float)
    columns = Columns.fit(X)
    grid = np.stack(np.meshgrid(*[np.arange(-12.0, 20.0)] * 2), axis=-1).reshape(-1, 2)
    log_density, _ = columns.log_density(grid, cells(columns, grid, 64))
    assert np.exp(log_density).sum() == pytest.approx(1, abs=1e-3)


def test_masses_of_levels_sum_to_one_with_their_cells() -> None:
    levels = np.array([0.1, np.sqrt(2), np.pi])
    X = levels[rng().integers(3, size=(300, 1))]
    columns = Columns.fit(X)
    lattice = columns.found.lattices[0]
    u = (np.arange(2000) + 0.5) / 2000
    inside = np.mean(
        [stats.norm.pdf(lattice.spread(levels, np.full(3, v)), *columns.mean, *columns.scale) for v in u], axis=0
    )
    log_density, _ = columns.log_density(levels[:, None], cells(columns, levels[:, None], 64))
    np.testing.assert_allclose(np.exp(log_density), inside, rtol=1e-3)
    assert lattice.edges[1] == pytest.approx(levels[:2].mean())


def test_a_place_off_the_lattice_has_the_density_of_its_cell() -> None:
    X = table("integers")
    columns = Columns.fit(X)
    off = X + rng(5).uniform(-0.49, 0.49, size=X.shape)
    np.testing.assert_array_equal(
        columns.log_density(off, cells(columns, off, 8))[0], columns.log_density(X, cells(columns, X, 8))[0]
    )


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_the_log_determinant_counts_the_units_of_the_table(factor: float) -> None:
    X = normals() * factor
    columns = Columns.fit(X)
    log_density, _ = columns.log_density(X, cells(columns, X, 1))
    expected = stats.norm.logpdf(X, columns.mean, columns.scale).sum(axis=1)
    np.testing.assert_allclose(log_density, expected, rtol=1e-10)


def test_columns_without_wide_cells_need_no_mean_over_them() -> None:
    assert not Columns.fit(normals()).has_cells
    assert not Columns.fit(np.round(normals() * 500)).has_cells
    assert Columns.fit(table("integers")).has_cells
    assert (Columns.fit(normals()).cell_noise(normals(), 3) == 0).all()


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [("constant", 2, 0.2), ("duplicated", 2, 7.0), ("collinear", 3, 1.0), ("one-hot", 2, 3.0), ("n = 1", 0, 9.0)],
)
def test_a_row_that_breaks_a_relation_is_told_and_has_a_very_low_finite_density(
    name: str, column: int, value: float
) -> None:
    X = table(name)
    columns = Columns.fit(X)
    kept, _ = columns.log_density(X, cells(columns, X, 4))
    X[0, column] = value
    log_density, broken = columns.log_density(X, cells(columns, X, 4))
    assert broken.tolist() == [True] + [False] * (len(X) - 1)
    assert log_density[0] == pytest.approx(kept[0] + BROKEN_RELATION)
    np.testing.assert_array_equal(log_density[1:], kept[1:])


@every_table
def test_rows_that_went_through_float32_break_no_relation(name: str) -> None:
    X = table(name)
    assert (Columns.fit(X).n_broken(X.astype(np.float32)) == 0).all()


def test_a_density_of_zero_stays_zero() -> None:
    columns = Columns.fit(normals(3, 1))
    log_density, _ = columns.log_density(normals(3, 1), np.full((4, 3), -np.inf))
    assert (log_density == -np.inf).all()


# --- tables of scikit-learn ---


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (datasets.load_iris, {"rounded": 4}),
        (datasets.load_wine, {"rounded": 11, "integer": 2}),
        (datasets.load_breast_cancer, {"continuous": 18, "rounded": 12}),
        (datasets.load_diabetes, {"binary": 1, "rounded": 9}),
        (datasets.load_digits, {"integer": 58, "binary": 3, "constant": 3}),
    ],
)
def test_kinds_of_real_tables(load, expected: dict[str, int]) -> None:
    X = load().data
    columns = Columns.fit(X)
    kinds, counts = np.unique(columns.kinds, return_counts=True)
    assert dict(zip(kinds.tolist(), counts.tolist(), strict=True)) == expected
    restored = columns.restore(columns.standardise(columns.dequantise(X, 0)))
    for j in range(X.shape[1]):
        # Single values may be off the lattice (wine has a 9.899999), by half a spacing at most.
        lattice = columns.found.lattices.get(j)
        off = np.abs(X[:, j] - restored[:, j])
        assert (off > 1e-9 * np.abs(X[:, j])).mean() <= 0.02
        assert off.max() <= (1e-9 * np.abs(X[:, j]).max() if lattice is None else lattice.spacing / 2)


def test_spacings_of_real_tables_are_those_of_their_instruments() -> None:
    iris = Columns.fit(datasets.load_iris().data)
    assert [iris.found.lattices[j].spacing for j in range(4)] == [0.1] * 4
    # Diabetes is standardised: a year of age is 0.0036, and ages run from 19 to 79.
    age = Columns.fit(datasets.load_diabetes().data).found.lattices[0]
    assert (age.high - age.low) / age.spacing == pytest.approx(60)


def test_columns_survive_pickling() -> None:
    X = table("all at once")
    columns = Columns.fit(X, names=list("abcdefg"))
    copy = pickle.loads(pickle.dumps(columns))
    np.testing.assert_array_equal(copy.dequantise(X, 1), columns.dequantise(X, 1))
    assert copy.messages() == columns.messages()
