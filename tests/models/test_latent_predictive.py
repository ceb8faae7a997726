"""Predictive distributions against torch.distributions and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from skode.models import Likelihood
from skode.models.predictive import Calibration, Predictive, Spread

N = 5


def predictive(family: str, spread: float, noise: float = 1.0, degrees: float | torch.Tensor = math.inf) -> Predictive:
    likelihood = Likelihood([family]).double()
    eta = torch.linspace(-1.0, 2.0, N, dtype=torch.float64).unsqueeze(1)
    return Predictive(likelihood, eta, torch.full_like(eta, spread), (noise,), degrees)


def test_normal_noise_and_a_normal_error_are_one_normal() -> None:
    own = predictive("gaussian", 0.7, noise=1.5)
    expected = torch.distributions.Normal(own.eta, (0.75**2 + 0.7**2) ** 0.5)
    y = own.eta + 0.4
    torch.testing.assert_close(own.log_prob(y).detach(), expected.log_prob(y))
    torch.testing.assert_close(own.std().detach(), expected.stddev, rtol=1e-6, atol=0)
    for p in (0.05, 0.5, 0.9):
        torch.testing.assert_close(own.quantile(p).detach(), expected.icdf(own.eta * 0 + p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [0.025, 0.3, 0.5, 0.975])
def test_quantiles_of_heavy_tails_are_scipys(p: float) -> None:
    own = predictive("student_t", 0.0)
    nu = float(own._likelihood.degrees[0].detach())
    expected = own.eta.numpy() + 0.5 * stats.t(nu).ppf(p)
    np.testing.assert_allclose(own.quantile(p).detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(own.std().detach().numpy(), 0.5 * stats.t(nu).std(), rtol=1e-5)


def test_a_normal_channel_with_heavy_errors_has_the_normals_variance_and_the_ts_shape() -> None:
    own, nu = predictive("gaussian", 0.7, noise=1.5, degrees=5.0), 5.0
    std = (0.75**2 + 0.7**2) ** 0.5
    expected = stats.t(nu, loc=own.eta.numpy(), scale=std * (1 - 2 / nu) ** 0.5)
    np.testing.assert_allclose(own.std().detach(), std, rtol=1e-6)
    np.testing.assert_allclose(own.log_prob(own.eta + 0.4).detach(), expected.logpdf(own.eta.numpy() + 0.4), rtol=1e-6)
    for p in (0.05, 0.5, 0.9):
        np.testing.assert_allclose(own.quantile(p).detach(), expected.ppf(p), rtol=1e-4, atol=1e-4)
    many = torch.rand(200_000, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = Predictive(own._likelihood, own.eta[:1].expand(len(many), 1), torch.full((len(many), 1), 0.7), (1.5,), nu)
    drawn = wide.drawn(many).detach().numpy()[:, 0]
    assert stats.kstest(drawn, stats.t(nu, loc=-1.0, scale=std * (1 - 2 / nu) ** 0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_quantiles_of_counts_without_error_are_scipys(p: float) -> None:
    own = predictive("poisson", 0.0)
    rates = own.eta.exp().numpy()
    np.testing.assert_array_equal(own.quantile(p).numpy(), stats.poisson(rates).ppf(p))
    np.testing.assert_allclose(own.mean().numpy(), rates)
    np.testing.assert_allclose(own.std().numpy(), rates**0.5)


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
def test_an_uncertain_rate_is_integrated_out(family: str) -> None:
    own = predictive(family, 0.6)
    generator = torch.Generator().manual_seed(0)
    eta = own.eta + 0.6 * torch.randn(N, 200_000, generator=generator, dtype=torch.float64)
    one = torch.ones_like(own.eta)
    if family == "bernoulli":
        mean, log_prob = eta.sigmoid().mean(1), eta.sigmoid().mean(1).log()
    else:
        mean, log_prob = eta.exp().mean(1), torch.distributions.Poisson(eta.exp()).log_prob(one).exp().mean(1).log()
        torch.testing.assert_close(own.std()[:, 0], (eta.exp().mean(1) + eta.exp().var(1)).sqrt(), rtol=0.02, atol=0)
    torch.testing.assert_close(own.mean()[:, 0], mean, rtol=0.01, atol=0)
    torch.testing.assert_close(own.log_prob(one)[:, 0], log_prob, rtol=0.02, atol=0.005)


def test_spreads_grow_from_the_nearest_observation() -> None:
    calibration = Calibration(Spread(2.0, 0.5, 1.0), Spread(3.0, 1.0, 2.0), (1.0,))
    ahead = torch.tensor([False, False, True])
    found = calibration.spread(torch.full((3, 1), 0.1), torch.tensor([0.0, 4.0, 4.0]), ahead)
    expected = torch.tensor([[0.2], [(0.2**2 + 2.0**2) ** 0.5], [(0.3**2 + 16.0**2) ** 0.5]])
    torch.testing.assert_close(found, expected)


def test_degrees_of_freedom_may_be_rows_own() -> None:
    calibration = Calibration(Spread(), Spread(), (1.0,), 3.0, degrees_ahead=9.0)
    ahead = torch.tensor([False, True, False])
    degrees = calibration.degrees_of(ahead)
    assert degrees.tolist() == [3.0, 9.0, 3.0]
    assert Calibration(Spread(), Spread(), (1.0,), 3.0).degrees_of(ahead).tolist() == [3.0] * 3
    together = predictive("gaussian", 0.7, degrees=torch.tensor([3.0, 9.0, torch.inf, 3.0, 9.0]).double())
    y, u = together.eta + 0.4, torch.full((N, 1, 2), 0.3, dtype=torch.float64)
    for i, nu in enumerate((3.0, 9.0, np.inf)):
        alone = predictive("gaussian", 0.7, degrees=nu)
        for one, other in (
            (together.quantile(0.9), alone.quantile(0.9)),
            (together.log_prob(y), alone.log_prob(y)),
            (together.std(), alone.std()),
            (together.drawn(u), alone.drawn(u)),
        ):
            torch.testing.assert_close(one[i], other[i])
