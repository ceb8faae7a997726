"""The paper's gated sum of planar units with parameters from a hypernetwork."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.fields import ACTIVATIONS, PlanarField, draw_probe
from skode.solver import Dynamics, solve
from tests.derivatives import KINDS_OF_TIMES, assert_derivatives_are_autograds, times_for
from tests.fields.flows import assert_close, jacobians, planar_field, traces
from tests.problems import random_states

TIGHT = {"rtol": 1e-9, "atol": 1e-9}

on_all_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
at_all_times = pytest.mark.parametrize("kind", KINDS_OF_TIMES)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def written_down(field: PlanarField, t: Tensor, z: Tensor) -> Tensor:
    """Unit by unit and row by row, as in the paper."""
    d, functions = z.shape[1], {"identity": lambda x: x, "logistic": torch.sigmoid}
    functions |= {name: getattr(torch.nn.functional, name) for name in ("relu", "silu", "softplus")}
    h = functions.get(field.activation, torch.tanh)
    rows = []
    for i in range(len(z)):
        units = field.hypernet(t[i : i + 1], t[i : i + 1]).view(field.n_units, 2 * d + 2)
        parts = [
            torch.sigmoid(unit[-1]) * unit[d : 2 * d] * h(unit[:d] @ z[i] + unit[2 * d]) / field.n_units
            for unit in units
        ]
        rows.append(torch.stack(parts).sum(dim=0))
    return torch.stack(rows)


@on_all_activations
@at_all_times
def test_the_velocity_is_the_sum_of_the_units(activation: str, kind: str) -> None:
    field = planar_field(1, 3, 5, activation)
    t, z = times_for(kind, 6), random_states(2, 6, 3)
    assert_close(field(t, z), written_down(field, t, z), 1e-13)


@on_all_activations
@at_all_times
@pytest.mark.parametrize("d", [1, 2, 5, 30])
def test_the_divergence_is_the_trace_of_autograds_jacobian(activation: str, kind: str, d: int) -> None:
    field = planar_field(1, d, 4, activation)
    t, z = times_for(kind, 5), random_states(2, 5, d)
    expected = traces(lambda t, z: written_down(field, t, z), t, z)
    assert_close(field.trace(t, z), expected, 1e-12)


@at_all_times
@pytest.mark.parametrize("probed", ["not", "all rows", "each row"])
def test_integrands_are_divergence_energy_and_norm(kind: str, probed: str) -> None:
    field = planar_field(1)
    t, z = times_for(kind, 6), random_states(2, 6, 3)
    probe = {"not": None, "all rows": random_states(3, 1, 3)[0], "each row": random_states(3, 6, 3)}[probed]
    dynamics = field.dynamics(energy=True, jacobian=True, probe=probe)
    value, J = dynamics(t, z), jacobians(field, t, z)
    assert dynamics.n_quadratures == 3 and dynamics.any_rows == (probed != "each row")
    product = J if probe is None else J @ probe.expand(6, 3).unsqueeze(2)
    expected = [
        J.diagonal(dim1=1, dim2=2).sum(dim=1),
        field(t, z).square().mean(dim=1),
        product.square().sum(dim=(1, 2)) / 3,
    ]
    assert_close(value[:, 3:], torch.stack(expected, dim=1), 1e-12)
    assert_close(value[:, :3], field(t, z), 1e-13)


@on_all_activations
@at_all_times
@pytest.mark.parametrize("probed", [False, True])
def test_hand_written_derivatives_are_autograds(activation: str, kind: str, probed: bool) -> None:
    field = planar_field(1, 3, 5, activation)
    dynamics = field.dynamics(energy=True, jacobian=True, probe=random_states(3, 6, 3) if probed else None)
    assert_derivatives_are_autograds(dynamics, times_for(kind, 6), random_states(2, 6, 3))
    assert_derivatives_are_autograds(field.dynamics(), times_for(kind, 6), random_states(2, 6, 3))


@pytest.mark.parametrize("n", [1, 4])
def test_derivatives_of_the_velocity_alone_are_autograds(n: int) -> None:
    assert_derivatives_are_autograds(planar_field(1), times_for("own", n), random_states(2, n, 3))


def test_plain_autograd_goes_through_twice() -> None:
    field = planar_field(1, 2)
    t, z = times_for("own", 3).requires_grad_(), random_states(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(field.dynamics(energy=True, jacobian=True), (t, z))


@with_both_controls
def test_log_determinants_are_those_of_the_flow_map(control: str) -> None:
    field, z0 = planar_field(1, 2), random_states(2, 5)

    def end(z: Tensor) -> Tensor:
        return solve(field, z, [0.0, 1.0], step_control=control, rtol=1e-11, atol=1e-11).y1

    eps = 1e-5
    J = torch.stack([(end(z0 + eps * e) - end(z0 - eps * e)) / (2 * eps) for e in torch.eye(2).double()], dim=2)
    solution = solve(field.dynamics(), z0, [0.0, 1.0], step_control=control, n_quadratures=1, **TIGHT)
    assert solution.quadratures is not None
    assert_close(solution.quadratures[:, -1, 0], torch.linalg.slogdet(J).logabsdet, 1e-7)


def gradients(dynamics: Dynamics, field: PlanarField, z0: Tensor, **options: Any) -> list[Tensor]:
    z0 = z0.clone().requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    solution = solve(dynamics, z0, t, n_quadratures=3, **(TIGHT | options))
    assert solution.quadratures is not None
    loss = solution.y1.sin().sum() + solution.quadratures[:, 1:].square().sum()
    return list(torch.autograd.grad(loss, [z0, t, *field.parameters()]))


@with_both_controls
def test_discrete_and_adjoint_gradients_agree(control: str) -> None:
    field, z0 = planar_field(1), random_states(2, 5, 3)
    dynamics = field.dynamics(energy=True, jacobian=True)
    by_discrete, by_adjoint = (
        gradients(dynamics, field, z0, gradient=name, step_control=control) for name in ("discrete", "adjoint")
    )
    for one, other in zip(by_discrete, by_adjoint, strict=True):
        assert_close(one, other, 1e-5)


def test_a_probe_estimates_the_norm() -> None:
    field, n = planar_field(1), 4000
    t, z = times_for("own", 1).expand(n, 1), random_states(2, 1, 3).expand(n, 3)
    probe = draw_probe(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = field.dynamics(jacobian=True, probe=probe)(t, z)[:, -1]
    exact = field.dynamics(jacobian=True)(t[:1], z[:1])[0, -1]
    assert (estimates.mean() - exact).abs() <= 5 * estimates.std() / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    field = PlanarField(3, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    z0 = (3 * random_states(2, 37, 3)).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    all_of_them = solve(field.dynamics(), z0, [0.0, 3.0], n_quadratures=1, rtol=1e-5, atol=1e-5)
    assert all_of_them.quadratures is not None
    for part in (slice(0, 1), slice(5, 12), slice(20, 37)):
        alone = solve(field.dynamics(), z0[part], [0.0, 3.0], n_quadratures=1, rtol=1e-5, atol=1e-5)
        assert alone.quadratures is not None
        assert_close(alone.y1, all_of_them.y1[part], tolerance)
        assert_close(alone.quadratures, all_of_them.quadratures[part], tolerance)


def test_the_flow_moves_with_time_and_does_not_grow_with_the_units() -> None:
    z, t = random_states(2, 200).float(), torch.zeros(200, 1)
    sizes = []
    for n_units in (8, 512):
        field = PlanarField(2, n_units, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sizes.append(float(field(t, z).square().mean()))
            assert (field(t, z) - field(t + 1, z)).abs().max() > 1e-3
    assert sizes[1] <= 2 * sizes[0]


def test_the_module_behaves() -> None:
    before = torch.get_rng_state()
    first, second = (PlanarField(2, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [id(p) for p in first.trainable()] == [id(p) for p in first.parameters()]
    with pytest.raises(ValueError, match="needs units and dimensions; got n_units=0"):
        PlanarField(2, 0)
    with pytest.raises(ValueError, match="activation='elu' is unknown"):
        PlanarField(2, activation="elu")
    with pytest.raises(FieldError, match=r"states of 2 components in torch\.float32; got 3"):
        first(torch.zeros(4, 1), torch.zeros(4, 3))


def test_an_untrained_field_can_be_pickled() -> None:
    field = PlanarField(2, 4, generator=torch.Generator().manual_seed(3))
    other = pickle.loads(pickle.dumps(field))
    t, z = torch.zeros(4, 1), torch.ones(4, 2)
    assert torch.equal(other(t, z), field(t, z))
