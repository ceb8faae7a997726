"""The bounded latent field: derivatives by hand, inputs, durations, the rate of events."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from skode.fields import LatentField, MLPField
from skode.solver import solve
from tests.derivatives import assert_derivatives_are_autograds, times_for


def field(n_inputs: int = 0, intensity: bool = False, seed: int = 0, sizes: tuple[int, ...] = (7, 5)) -> LatentField:
    generator = torch.Generator().manual_seed(seed)
    made = LatentField(3, sizes, n_inputs=n_inputs, intensity=intensity, generator=generator).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


def states(n: int = 6) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("intensity", [False, True])
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("with_durations", [False, True])
def test_derivatives_by_hand_are_autograds(intensity: bool, with_inputs: bool, with_durations: bool) -> None:
    own = field(2 if with_inputs else 0, intensity)
    inputs = (lambda t: torch.cat([t > 0.5, t <= 0.5], dim=1).double()) if with_inputs else None
    durations = torch.linspace(-2, 3, 6, dtype=torch.float64).view(-1, 1) if with_durations else None
    dynamics = own.dynamics(durations, inputs, intensity=intensity)
    assert_derivatives_are_autograds(dynamics, times_for("own", 6), states())


def test_gradients_pass_gradcheck_through_a_solve() -> None:
    own = field(intensity=True, sizes=(3,))
    with torch.no_grad():
        assert own.intensity is not None
        own.intensity = MLPField(3, (2,), time_dependent=False, n_outputs=1).double()
    parameters = [p.detach().clone().requires_grad_() for p in own.parameters()]
    names = [name for name, _ in own.named_parameters()]

    def ends(y0: Tensor, *values: Tensor) -> Tensor:
        copy = deepcopy(own)
        for name, value in zip(names, values, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = copy.get_submodule(owner)
            del module._parameters[leaf]
            setattr(module, leaf, value)
        solution = solve(
            lambda t, y: copy.dynamics(intensity=True)(t, y),
            y0,
            [0.0, 0.5, 1.0],
            method="rk4",
            step_size=0.5,
            n_quadratures=1,
            parameters=values,
        )
        assert solution.quadratures is not None
        return torch.cat([solution.y1, solution.quadratures[:, -1]], dim=1)

    assert torch.autograd.gradcheck(ends, (states(2).requires_grad_(), *parameters))


def test_without_its_network_it_is_the_matrix_exponential() -> None:
    own = field()
    with torch.no_grad():
        own.reach.zero_()
    y0, durations = states(), torch.linspace(-1, 2, 6, dtype=torch.float64).view(-1, 1)
    found = solve(own.dynamics(durations), y0, [0.0, 1.0], rtol=1e-10, atol=1e-12, method="dopri8").y1
    expected = torch.linalg.matrix_exp(own.matrix() * durations.unsqueeze(2)) @ y0.unsqueeze(2)
    torch.testing.assert_close(found, expected.squeeze(2), rtol=1e-8, atol=1e-9)


def test_states_stay_within_the_bound_that_the_field_promises() -> None:
    own = field(seed=3)
    bound = own.reach.norm() / torch.nn.functional.softplus(own.damping).min()
    far = solve(own.dynamics(), 3 * bound.detach() * states(), [0.0, 200.0], rtol=1e-4, method="dopri5").y1
    assert bool((far.norm(dim=1) <= bound).all())


def test_a_rate_is_positive_and_the_integrand_of_its_dynamics() -> None:
    own = field(intensity=True)
    value = own.dynamics(intensity=True)(torch.zeros(6, 1, dtype=torch.float64), states())
    torch.testing.assert_close(value[:, 3], own.rate(states()))
    assert bool((value[:, 3] > 0).all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="needs inputs exactly"):
        field(n_inputs=1).dynamics()
    with pytest.raises(ValueError, match="without intensity"):
        field().dynamics(intensity=True)
    with pytest.raises(ValueError, match="without intensity"):
        field().rate(states())
