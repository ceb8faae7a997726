"""Likelihoods against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal, Poisson, StudentT

from skode.models import FAMILIES, Likelihood


def likelihood(*families: str) -> Likelihood:
    own = Likelihood(families).double()
    with torch.no_grad():
        own.log_scale += torch.linspace(-0.5, 0.5, len(families))
        own.tail += torch.linspace(1.0, -1.0, len(families))
    return own


def reference(own: Likelihood, i: int, eta: Tensor) -> Distribution:
    scale, degrees = own.scale[i].detach(), own.degrees[i].detach()
    return {
        "gaussian": lambda: Normal(eta, scale),
        "student_t": lambda: StudentT(degrees, eta, scale),
        "bernoulli": lambda: Bernoulli(logits=eta),
        "poisson": lambda: Poisson(eta.exp()),
    }[own.families[i]]()


MIXED = ("poisson", "gaussian", "bernoulli", "gaussian", "student_t")


@pytest.mark.parametrize("families", [(name,) for name in FAMILIES] + [MIXED])
def test_densities_means_and_variances_are_those_of_torch(families: tuple[str, ...]) -> None:
    own, generator = likelihood(*families), torch.Generator().manual_seed(0)
    eta = torch.randn(50, len(families), generator=generator, dtype=torch.float64)
    y = torch.stack([reference(own, i, torch.zeros(50, dtype=torch.float64)).mean for i in range(len(families))], dim=1)
    y = torch.stack(
        [
            (draw.abs() * 2).round() if name == "poisson" else (draw > 0).double() if name == "bernoulli" else draw
            for name, draw in zip(families, (y + torch.randn(y.shape, generator=generator)).unbind(1), strict=True)
        ],
        dim=1,
    )
    for i in range(len(families)):
        expected = reference(own, i, eta[:, i])
        torch.testing.assert_close(own.log_prob(eta, y)[:, i].detach(), expected.log_prob(y[:, i]))
        torch.testing.assert_close(own.mean(eta)[:, i], expected.mean)
        torch.testing.assert_close(own.variance(eta)[:, i].detach(), expected.variance)


def test_samples_have_the_moments_of_their_family() -> None:
    own, generator = likelihood(*MIXED), torch.Generator().manual_seed(0)
    eta = torch.tensor([[1.0, -2.0, 0.4, 0.5, 0.0]], dtype=torch.float64).expand(40_000, -1)
    samples = own.sample(eta, generator)
    torch.testing.assert_close(samples.mean(dim=0), own.mean(eta)[0], rtol=0.03, atol=0.02)
    torch.testing.assert_close(samples.var(dim=0), own.variance(eta)[0].detach(), rtol=0.1, atol=0.02)
    again = own.sample(eta, torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)


def test_inputs_for_networks_are_on_one_scale() -> None:
    y = torch.tensor([[100.0, 3.0, 0.0, 4.0, 5.0]], dtype=torch.float64)
    read = likelihood(*MIXED).as_input(y)
    torch.testing.assert_close(
        read,
        torch.tensor([[101.0, 1, 1, 1, 1]], dtype=torch.float64).log() + y.new_tensor([[0.0, 3.0, -1.0, 4.0, 5.0]]),
    )


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="'cauchy' is unknown"):
        Likelihood(["gaussian", "cauchy"])
