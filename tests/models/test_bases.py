"""Base distributions and the paths that lead from them to the data."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from skode.models import Base, LinearPath, Mixture, MixturePath, Normal, StudentT


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal() -> Normal:
    return Normal.from_arrays({"loc": np.array([0.5, -1.0]), "scale": np.array([1.0, 0.3])})


def student_t() -> StudentT:
    return StudentT.from_arrays(
        {"loc": np.array([0.2, -0.4]), "scale": np.array([0.7, 1.5]), "df": np.array([1.0, 30.0])}
    )


def mixture() -> Mixture:
    """Three components, one of them thin."""
    covariances = np.array([[[1.0, 0.8], [0.8, 1.0]], [[0.2, 0.0], [0.0, 0.1]], [[1.0, 0.999], [0.999, 1.0]]])
    return Mixture.of(np.array([0.5, 0.2, 0.3]), np.array([[0.0, 0.0], [2.0, -1.0], [-2.0, 1.0]]), covariances)


BASES = {"normal": normal, "student_t": student_t, "mixture": mixture}
every_base = pytest.mark.parametrize("base", [make() for make in BASES.values()], ids=BASES.keys())


def reference(base: Base, z: np.ndarray) -> np.ndarray:
    parts = base.arrays()
    if isinstance(base, Normal):
        return stats.norm.logpdf(z, parts["loc"], parts["scale"]).sum(axis=1)
    if isinstance(base, StudentT):
        return stats.t.logpdf(z, parts["df"], parts["loc"], parts["scale"]).sum(axis=1)
    densities = [
        weight * stats.multivariate_normal.pdf(z, mean, factor @ factor.T)
        for weight, mean, factor in zip(parts["weights"], parts["means"], parts["factors"], strict=True)
    ]
    return np.log(np.sum(densities, axis=0))


@every_base
def test_the_log_density_is_scipys(base: Base) -> None:
    z = np.random.default_rng(0).normal(size=(50, 2)) * 2
    np.testing.assert_allclose(base.log_density(torch.from_numpy(z)), reference(base, z), rtol=1e-10)


@every_base
def test_the_log_density_is_differentiable(base: Base) -> None:
    z = torch.randn(4, 2, generator=generator(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(base.log_density, z)


@every_base
def test_a_place_a_hundred_deviations_away_has_a_finite_log_density_and_gradient(base: Base) -> None:
    z = torch.full((1, 2), 100.0, dtype=torch.float64, requires_grad=True)
    density = base.log_density(z)
    density.sum().backward()
    assert torch.isfinite(density).all()
    assert torch.isfinite(z.grad).all()


@every_base
def test_samples_have_the_density_that_is_told(base: Base) -> None:
    """Along two directions, the integral of the density up to a place is the share of samples up to it."""
    n = 20_000
    z = base.sample(n, generator()).numpy()
    assert z.shape == (n, 2)
    fresh = reference_samples(base, n)
    for direction in ([1.0, 0.0], [1.0, -1.0]):
        # Two samples of one distribution: a p-value below 1e-4 once in ten thousand.
        assert stats.ks_2samp(z @ direction, fresh @ direction).pvalue > 1e-4


def reference_samples(base: Base, n: int) -> np.ndarray:
    rng, parts = np.random.default_rng(1), base.arrays()
    if isinstance(base, Normal):
        return rng.normal(parts["loc"], parts["scale"], (n, 2))
    if isinstance(base, StudentT):
        return parts["loc"] + parts["scale"] * rng.standard_t(parts["df"], (n, 2))
    k = rng.choice(3, size=n, p=parts["weights"])
    return parts["means"][k] + np.einsum("nij,nj->ni", parts["factors"][k], rng.normal(size=(n, 2)))


@every_base
@pytest.mark.parametrize("n", [0, 1])
def test_few_samples_or_none_can_be_drawn(base: Base, n: int) -> None:
    assert base.sample(n, generator()).shape == (n, 2)
    assert base.log_density(base.sample(n, generator())).shape == (n,)


@every_base
def test_a_seed_gives_the_same_samples_and_no_global_generator_is_touched(base: Base) -> None:
    before = torch.get_rng_state()
    assert torch.equal(base.sample(5, generator(3)), base.sample(5, generator(3)))
    assert not torch.equal(base.sample(5, generator(3)), base.sample(5, generator(4)))
    assert torch.equal(torch.get_rng_state(), before)


@every_base
def test_arrays_survive_pickling(base: Base) -> None:
    arrays = pickle.loads(pickle.dumps(base.arrays()))
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    z = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    assert torch.equal(type(base).from_arrays(arrays).log_density(z), base.log_density(z))


@every_base
def test_float32_agrees_with_float64(base: Base) -> None:
    z = torch.randn(20, 2, generator=generator(), dtype=torch.float64)
    single = base.to(torch.float32)
    assert single.log_density(z.float()).dtype == single.sample(2, generator()).dtype == torch.float32
    torch.testing.assert_close(single.log_density(z.float()).double(), base.log_density(z), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        single.sample(9, generator()).double(), base.sample(9, generator()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("base", [Normal.standard(0), StudentT.fit(np.empty((5, 0)))], ids=["normal", "student_t"])
def test_no_dimensions_have_a_density_of_one(base: Base) -> None:
    assert base.log_density(torch.empty(3, 0, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]
    assert base.sample(3, generator()).shape == (3, 0)


# --- Student's t ---


@pytest.mark.parametrize("df", [1.0, 2.0, 5.0, 20.0])
def test_degrees_of_freedom_are_those_of_scipys_maximum_likelihood(df: float) -> None:
    z = np.random.default_rng(2).standard_t(df, size=1500)
    fitted = StudentT.fit(z[:, None])
    best_df, best_loc, best_scale = stats.t.fit(z)
    ours = stats.t.logpdf(z, fitted.df.item(), fitted.loc.item(), fitted.scale.item()).mean()
    best = stats.t.logpdf(z, max(best_df, 1.0), best_loc, best_scale).mean()
    assert ours >= best - 1e-5


def test_columns_have_degrees_of_freedom_of_their_own() -> None:
    rng = np.random.default_rng(0)
    fitted = StudentT.fit(np.column_stack([rng.standard_cauchy(3000), rng.normal(size=3000)]))
    assert fitted.df[0] < 1.2
    assert fitted.df[1] > 25


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_t_fitted_to_very_few_rows_is_finite(n: int) -> None:
    Z = np.random.default_rng(0).normal(size=(n, 4))
    fitted = StudentT.fit(Z)
    assert torch.isfinite(fitted.log_density(torch.from_numpy(Z))).all()
    assert ((fitted.df >= 1) & (fitted.df <= 100)).all()


def test_a_value_that_most_rows_share_does_not_drive_the_scale_to_zero() -> None:
    z = np.random.default_rng(0).normal(size=1000)
    z[:700] = 0.0
    assert StudentT.fit(z[:, None]).scale.item() > 0.01


def test_a_t_takes_a_weight_of_two_as_the_row_twice_and_of_zero_as_none() -> None:
    Z = np.random.default_rng(0).standard_t(3, size=(60, 2))
    weight = np.random.default_rng(1).integers(0, 4, size=60)
    weighted, repeated = StudentT.fit(Z, weight), StudentT.fit(np.repeat(Z, weight, axis=0))
    for name, array in weighted.arrays().items():
        np.testing.assert_allclose(array, repeated.arrays()[name], rtol=1e-5, atol=1e-7)


# --- paths ---


def within_standard_errors(values: torch.Tensor, n_errors: float = 4.5) -> bool:
    """Whether the mean of each column is 0 as far as the sample can tell."""
    return bool((values.mean(0).abs() <= n_errors * values.std(0) / math.sqrt(len(values))).all())


def test_functions(x: torch.Tensor) -> torch.Tensor:
    """What a conditional mean of 0 is tested against: if E[v | x] = 0, then E[v phi(x)] = 0 for each of them."""
    parts = [torch.ones(len(x)), x[:, 0], x[:, 1], x[:, 0] * x[:, 1], x[:, 0] ** 2, x[:, 0].sin(), (2 * x[:, 1]).tanh()]
    near = torch.exp(-0.5 * (x[:, None] - mixture().means).square().sum(-1))
    return torch.column_stack([*parts, near])


test_functions.__test__ = False  # type: ignore[attr-defined]


def products(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (v[:, :, None] * test_functions(x)[:, None]).flatten(1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_the_mean_velocity_of_the_mixture_path_is_zero_where_the_data_is_the_mixture(t: float) -> None:
    base, n = mixture(), 100_000
    pairs = MixturePath(base).pairs(base.sample(n, generator(1)), generator(2), torch.full((n, 1), t).double())
    assert within_standard_errors(products(pairs.velocity, pairs.x))


def test_the_mean_velocity_of_the_mixture_path_is_not_zero_for_other_data() -> None:
    """The test above can fail."""
    n = 100_000
    x1 = mixture().sample(n, generator(1)) * torch.tensor([1.0, 1.1]).double()
    pairs = MixturePath(mixture()).pairs(x1, generator(2), torch.full((n, 1), 0.5).double())
    assert not within_standard_errors(products(pairs.velocity, pairs.x))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
def test_all_along_the_mixture_path_the_mixture_stays_itself(t: float) -> None:
    base, n = mixture(), 20_000
    x = MixturePath(base).pairs(base.sample(n, generator(1)), generator(2), torch.full((n, 1), t).double()).x.numpy()
    for direction in ([1.0, 0.0], [1.0, -1.0]):
        assert stats.ks_2samp(x @ direction, reference_samples(base, n) @ direction).pvalue > 1e-4


@pytest.mark.parametrize("t", [0.0, 0.25, 0.6, 1.0])
def test_the_mean_velocity_of_the_linear_path_to_a_gaussian_is_the_closed_form(t: float) -> None:
    """For data N(m, S): v(x, t) = m + (t S - (1 - t) I) ((1 - t)^2 I + t^2 S)^-1 (x - t m)."""
    n, mean = 100_000, torch.tensor([1.0, -0.5]).double()
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()
    x1 = mean + torch.randn(n, 2, generator=generator(1), dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    pairs = LinearPath().pairs(x1, generator(2), torch.full((n, 1), t).double())
    eye = torch.eye(2).double()
    map_ = (t * covariance - (1 - t) * eye) @ torch.linalg.inv((1 - t) ** 2 * eye + t**2 * covariance)
    expected = mean + (pairs.x - t * mean) @ map_.T
    assert within_standard_errors(products(pairs.velocity - expected, pairs.x))
    assert not within_standard_errors(products(pairs.velocity - 1.02 * expected, pairs.x))


PATHS = {"linear": LinearPath(), "mixture": MixturePath(mixture())}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_the_target_is_the_derivative_of_the_place(path: LinearPath | MixturePath) -> None:
    x1, h = mixture().sample(40, generator(1)), 1e-5
    t = torch.rand(40, 1, generator=generator(3), dtype=torch.float64) * 0.9 + 0.05
    before, here, after = (path.pairs(x1, generator(2), t + shift) for shift in (-h, 0.0, h))
    torch.testing.assert_close((after.x - before.x) / (2 * h), here.velocity, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_path_ends_at_the_data(path: LinearPath | MixturePath) -> None:
    x1 = mixture().sample(40, generator(1))
    torch.testing.assert_close(path.pairs(x1, generator(2), torch.ones(40, 1).double()).x, x1)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_times_are_drawn_uniformly_and_by_the_generator(path: LinearPath | MixturePath) -> None:
    x1 = mixture().sample(5000, generator(1))
    t = path.pairs(x1, generator(2)).t
    assert t.shape == (5000, 1)
    assert stats.kstest(t[:, 0].numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(path.pairs(x1, generator(2)).x, path.pairs(x1, generator(2)).x)


def test_far_rows_and_thin_components_keep_a_finite_path() -> None:
    base = Mixture.of(np.array([0.5, 0.5]), np.zeros((2, 2)), np.array([np.eye(2), 1e-12 * np.eye(2)]))
    x1 = torch.tensor([[1e6, -1e6], [0.0, 0.0]]).double()
    pairs = MixturePath(base).pairs(x1, generator())
    assert torch.isfinite(pairs.x).all()
    assert torch.isfinite(pairs.velocity).all()


@pytest.mark.parametrize("df", [1.0, 2.5, 30.0])
def test_quantiles_of_students_t_are_scipys(df: float) -> None:
    base = StudentT(*(torch.tensor([value], dtype=torch.float64) for value in (0.5, 2.0, df)))
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    u = torch.full((99, 3), 0.5, dtype=torch.float64)
    u[:, 0] = p
    expected = torch.from_numpy(stats.t.ppf(p.numpy(), df, loc=0.5, scale=2.0))
    torch.testing.assert_close(base.placed(u)[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_quantiles_of_a_mixture_are_inverse_to_its_distribution() -> None:
    base = Mixture.of(np.array([0.3, 0.7]), np.array([[-2.0], [1.0]]), np.array([[[0.25]], [[1.0]]]))
    u = torch.full((50, 3), 0.5, dtype=torch.float64)
    u[:, 0] = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    z = base.placed(u)[:, 0].numpy()
    below = 0.3 * stats.norm.cdf(z, -2.0, 0.5) + 0.7 * stats.norm.cdf(z, 1.0, 1.0)
    np.testing.assert_allclose(below, u[:, 0].numpy(), atol=1e-12)


@pytest.mark.parametrize("n_dims", [1, 2, 5])
def test_points_of_heavy_tails_are_centred(n_dims: int) -> None:
    base = StudentT(torch.zeros(n_dims), torch.ones(n_dims), torch.full((n_dims,), 1.5))
    points = base.points(256)
    assert points.shape == (256, n_dims) and points.mean(dim=0).abs().max() < 1e-9


@pytest.mark.parametrize("n_dims", [1, 3])
def test_points_fill_a_mixture_evenly(n_dims: int) -> None:
    means = np.stack([np.full(n_dims, -2.0), np.full(n_dims, 1.0)])
    base = Mixture.of(np.array([0.25, 0.75]), means, np.stack([0.5 * np.eye(n_dims)] * 2))
    points = base.points(1024).numpy()
    np.testing.assert_allclose(points.mean(axis=0), 0.25, atol=0.05)
    np.testing.assert_allclose(points.var(axis=0), 0.5 + 0.25 * 0.75 * 9, rtol=0.05)
