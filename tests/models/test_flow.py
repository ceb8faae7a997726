"""The continuous flow between a base and data."""

from __future__ import annotations

import pytest
import torch

from skode.fields import FlowField
from skode.models import SolverOptions, StudentT
from skode.models.flow import ContinuousFlow

SOLVER = SolverOptions("dopri5", 1e-8, 1e-8, None, 1_000)


def make_flow(*, zero_output: bool) -> tuple[ContinuousFlow, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    field = FlowField(2, (8,), zero_output=zero_output, generator=generator).double()
    points = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    return ContinuousFlow(field, StudentT.fit(torch.randn(50, 2, generator=generator).double().numpy())), points


def test_a_flow_that_stands_still_is_its_base_and_needs_no_solve() -> None:
    flow, points = make_flow(zero_output=True)
    with torch.no_grad():
        at_once, (drawn, log_density) = flow.densities(points, SOLVER), flow.drawn(points, SOLVER)
    solved = flow.densities(points, SOLVER)  # with gradients there is something to learn
    assert solved.n_evals > 0 and at_once.n_evals == 0
    torch.testing.assert_close(at_once.log_density, solved.log_density.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(log_density, at_once.log_density, rtol=0, atol=0)
    assert torch.equal(drawn, points) and torch.equal(at_once.z, points)


def test_a_flow_that_stands_still_has_no_place_for_points_beyond_the_numbers() -> None:
    flow, points = make_flow(zero_output=True)
    points[1, 0] = torch.inf
    with torch.no_grad():
        found = flow.densities(points, SOLVER)
    assert found.log_density.isnan().tolist() == [False, True, *[False] * 4]
    assert found.z.isnan().any(dim=1).tolist() == [False, True, *[False] * 4]


@pytest.mark.parametrize("parameter", ["weight", "bias", "drift"])
def test_a_flow_whose_last_layer_is_not_zero_is_solved(parameter: str) -> None:
    flow, points = make_flow(zero_output=True)
    with torch.no_grad():
        getattr(flow.field.flow_layers[-1], parameter).view(-1)[0] = 1e-3
        found = flow.densities(points, SOLVER)
    assert found.n_evals > 0 and bool((found.z != points).any())
