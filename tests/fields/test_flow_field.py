"""The flow's network: its divergence in closed form, derivatives by hand, and log-densities that are exact."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skode.exceptions import FieldError
from skode.fields import ACTIVATIONS, FlowField, draw_probe, traced
from skode.solver import Dynamics, solve
from skode.solver.dynamics import as_dynamics
from tests.derivatives import KINDS_OF_TIMES, assert_derivatives_are_autograds, times_for
from tests.fields.flows import assert_close, flow_field, jacobians, planar_field, traces, written_down
from tests.problems import Plain, random_states

HIDDEN = [(5,), (5, 4), (4, 5, 3)]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

on_all_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
at_all_times = pytest.mark.parametrize("kind", KINDS_OF_TIMES)
with_all_depths = pytest.mark.parametrize("hidden", HIDDEN)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def columns(value: Tensor, d: int) -> list[Tensor]:
    return list(value[:, d:].split(1, dim=1))


# --- values ---


@on_all_activations
@at_all_times
@with_all_depths
def test_the_velocity_is_the_network_written_down(activation: str, kind: str, hidden: tuple[int, ...]) -> None:
    field = flow_field(1, 3, hidden, activation)
    t, y = times_for(kind, 6), random_states(2, 6, 3)
    assert_close(field(t, y), written_down(field, t, y), 1e-13)
    with torch.no_grad():
        assert_close(field(t, y), written_down(field, t, y), 1e-13)


@on_all_activations
@with_all_depths
@pytest.mark.parametrize("d", [1, 2, 5, 30])
def test_the_divergence_is_the_trace_of_autograds_jacobian(activation: str, hidden: tuple[int, ...], d: int) -> None:
    field = flow_field(1, d, hidden, activation)
    t, y = times_for("own", 6), random_states(2, 6, d)
    assert_close(field.trace(t, y), traces(lambda t, y: written_down(field, t, y), t, y), 1e-12)


@at_all_times
@with_all_depths
@pytest.mark.parametrize("probed", ["not", "all rows", "each row"])
def test_integrands_are_divergence_energy_and_norm(kind: str, hidden: tuple[int, ...], probed: str) -> None:
    field = flow_field(1, 3, hidden)
    t, y = times_for(kind, 6), random_states(2, 6, 3)
    probe = {"not": None, "all rows": random_states(3, 1, 3)[0], "each row": random_states(3, 6, 3)}[probed]
    dynamics = field.dynamics(energy=True, jacobian=True, probe=probe)
    value, J = dynamics(t, y), jacobians(field, t, y)
    assert dynamics.n_quadratures == 3 and value.shape == (6, 6)
    trace, energy, norm = columns(value, 3)
    assert_close(value[:, :3], field(t, y), 1e-13)
    assert_close(trace[:, 0], J.diagonal(dim1=1, dim2=2).sum(dim=1), 1e-12)
    assert_close(energy[:, 0], value[:, :3].square().mean(dim=1), 1e-12)
    if probe is None or len(hidden) == 1:
        expected = J.square().sum(dim=(1, 2)) / 3
    else:
        expected = (J @ probe.expand(6, 3).unsqueeze(2)).square().sum(dim=(1, 2)) / 3
    assert_close(norm[:, 0], expected, 1e-12)


@on_all_activations
@at_all_times
@with_all_depths
def test_values_without_gradients_are_those_with(activation: str, kind: str, hidden: tuple[int, ...]) -> None:
    field, context = flow_field(1, 3, hidden, activation, n_context=2), random_states(4, 6, 2)
    t, y = times_for(kind, 6), random_states(2, 6, 3)
    for integrands in ({}, {"trace": False, "jacobian": True}, {"energy": True, "jacobian": True}):
        dynamics = field.dynamics(context, **integrands)
        assert_close(torch.no_grad()(dynamics)(t, y), dynamics(t, y), 1e-13)
    assert torch.equal(y, random_states(2, 6, 3)) and torch.equal(context, random_states(4, 6, 2))


@with_all_depths
def test_the_norm_by_a_probe_is_right_on_average(hidden: tuple[int, ...]) -> None:
    field = flow_field(1, 3, hidden)
    t, y = times_for("own", 1), random_states(2, 1, 3)
    n = 4000
    probe = draw_probe(n, 3, generator=torch.Generator().manual_seed(0), kind="gaussian", dtype=torch.float64)
    estimates = field.dynamics(jacobian=True, probe=probe)(t.expand(n, 1), y.expand(n, 3))[:, -1]
    exact = field.dynamics(jacobian=True)(t, y)[0, -1]
    # Five standard errors, plus rounding where there is no error at all.
    assert (estimates.mean() - exact).abs() <= 5 * estimates.std() / n**0.5 + 1e-12


@pytest.mark.parametrize("integrands", [{"trace": False}, {"trace": False, "energy": True}, {"jacobian": True}])
def test_only_the_integrands_that_are_asked_for_come(integrands: dict[str, bool]) -> None:
    field = flow_field()
    dynamics = field.dynamics(**integrands)
    t, y = times_for("own", 4), random_states(2, 4, 3)
    assert dynamics(t, y).shape == (4, 3 + dynamics.n_quadratures)
    assert dynamics.n_quadratures == sum(({"trace": True} | integrands).values())


# --- derivatives ---


@on_all_activations
@at_all_times
@pytest.mark.parametrize("hidden", [*HIDDEN, (3, 4, 3, 2)])
@pytest.mark.parametrize("probed", [False, True])
def test_hand_written_derivatives_are_autograds(
    activation: str, kind: str, hidden: tuple[int, ...], probed: bool
) -> None:
    field = flow_field(1, 3, hidden, activation)
    probe = random_states(3, 6, 3) if probed else None
    dynamics = field.dynamics(energy=True, jacobian=True, probe=probe)
    assert_derivatives_are_autograds(dynamics, times_for(kind, 6), random_states(2, 6, 3))


@at_all_times
@with_all_depths
@pytest.mark.parametrize("trace", [False, True])
def test_derivatives_with_a_context_are_autograds(kind: str, hidden: tuple[int, ...], trace: bool) -> None:
    field = flow_field(1, 3, hidden, n_context=2)
    context = random_states(4, 6, 2).requires_grad_()
    dynamics = field.dynamics(context, trace=trace)
    assert dynamics.trainable()[-1] is context
    assert len(field.dynamics(context.detach()).trainable()) == len(list(field.parameters()))
    assert_derivatives_are_autograds(dynamics, times_for(kind, 6), random_states(2, 6, 3))


@at_all_times
def test_derivatives_of_the_velocity_alone_are_autograds(kind: str) -> None:
    assert_derivatives_are_autograds(flow_field(1), times_for(kind, 6), random_states(2, 6, 3))


@pytest.mark.parametrize("probe", [None, random_states(3, 1, 3)[0]])
def test_a_single_row_and_one_probe_for_all_are_fine(probe: Tensor | None) -> None:
    for hidden in HIDDEN:
        dynamics = flow_field(1, 3, hidden).dynamics(jacobian=True, probe=probe)
        assert dynamics.any_rows
        assert_derivatives_are_autograds(dynamics, times_for("own", 1), random_states(2, 1, 3))


@with_all_depths
@pytest.mark.parametrize("activation", ["tanh", "silu", "softplus", "logistic"])
def test_plain_autograd_goes_through_twice(activation: str, hidden: tuple[int, ...]) -> None:
    field = flow_field(1, 2, hidden, activation)
    t, y = times_for("own", 3).requires_grad_(), random_states(2, 3).requires_grad_()
    dynamics = field.dynamics(energy=True, jacobian=True)
    assert torch.autograd.gradgradcheck(dynamics, (t, y))
    assert torch.autograd.gradcheck(field.trace, (t, y))


def test_vjp_gives_the_products_of_the_velocity() -> None:
    field = flow_field(1)
    t, y, a = times_for("own", 5), random_states(2, 5, 3), random_states(3, 5, 3)
    dy, dt, gradients = field.vjp(t, y, a)
    moving_t, moving_y = t.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.autograd.grad(
        written_down(field, moving_t, moving_y), [moving_y, moving_t, *field.parameters()], a
    )
    for found, wanted in zip((dy, dt, *gradients), expected, strict=True):
        assert_close(found, wanted)


# --- what depends on the parameters alone is computed once, and anew when they change ---


def change_in_place(field: FlowField) -> None:
    with torch.no_grad():
        field.flow_layers[0].weight.mul_(1.5)


def change_by_optimiser(field: FlowField) -> None:
    for parameter in field.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(field.parameters(), lr=0.1).step()


def change_the_memory(field: FlowField) -> None:
    field.flow_layers[1].weight.data = field.flow_layers[1].weight.data * 2


def change_by_loading(field: FlowField) -> None:
    field.load_state_dict({name: 2 * value for name, value in field.state_dict().items()})


@pytest.mark.parametrize("change", [change_in_place, change_by_optimiser, change_the_memory, change_by_loading])
@with_all_depths
def test_dynamics_follow_changes_of_the_parameters(change: Any, hidden: tuple[int, ...]) -> None:
    field = flow_field(1, 3, hidden, n_context=2)
    t, y, context = times_for("own", 4), random_states(2, 4, 3), random_states(3, 4, 2)
    kept = field.dynamics(context, jacobian=True)
    with torch.no_grad():
        before = kept(t, y)
        change(field)
        after, fresh = kept(t, y), field.dynamics(context, jacobian=True)(t, y)
    assert_close(after, fresh, 1e-14)
    assert (before - after).abs().max() > 1e-3


def counted(dynamics: Dynamics, y: Tensor, *, back: bool = False) -> int:
    """Floating-point operations of matrix products, with what parameters alone decide already there."""
    t = torch.linspace(0, 1, len(y), dtype=y.dtype).view(-1, 1)
    with torch.no_grad():
        width = dynamics(t, y).shape[1]
        with FlopCounterMode(display=False) as counter:
            if back:
                _, tape = dynamics.linearize(t, y)
                dynamics.pull(tape, torch.ones(len(y), width, dtype=y.dtype))
                dynamics.accumulate([tape])
            else:
                dynamics(t, y)
    return counter.get_total_flops()


@pytest.mark.parametrize("d", [1, 2, 3, 8, 32, 64, 128])
def test_value_and_divergence_cost_at_most_two_values(d: int) -> None:
    field, n = FlowField(d, generator=torch.Generator().manual_seed(0)), 128
    y = random_states(0, n, d).float()
    # A row's sum over units (64 multiplications) is no matrix product: it is added by hand.
    assert counted(field.dynamics(), y) + 2 * 64 * n <= 2 * counted(field.dynamics(trace=False), y)
    # Going back the matrix's own gradient adds three small products, once for all evaluations.
    once = 2 * (3 * 64 * 64 * d)
    assert counted(field.dynamics(), y, back=True) - once <= 2 * counted(field.dynamics(trace=False), y, back=True)


# --- conditions ---


def test_conditions_shift_the_hidden_layers() -> None:
    field = flow_field(1, 3, (5, 4), n_context=2)
    t, y, context = times_for("own", 6), random_states(2, 6, 3), random_states(3, 6, 2)
    expected = written_down(field, t, y, context)
    assert_close(field(t, y, context), expected, 1e-13)
    assert_close(field.given(context)(t, y), expected, 1e-13)
    assert_close(field.trace(t, y, context), traces(lambda t, y: written_down(field, t, y, context), t, y), 1e-12)
    assert not field.given(context).any_rows and not field.any_rows and FlowField(2).any_rows


def test_conditions_that_do_not_fit_are_refused() -> None:
    field, t, y = flow_field(1, 3, n_context=2), times_for("own", 6), random_states(2, 6, 3)
    with pytest.raises(FieldError, match=r"takes context of shape \(n, 2\).*got none"):
        field(t, y)
    with pytest.raises(FieldError, match=r"got shape \(6, 3\)"):
        field.given(random_states(3, 6, 3))
    with pytest.raises(FieldError, match="takes no context; got"):
        flow_field().given(random_states(3, 6, 2))
    with pytest.raises(FieldError, match="contexts of 5 rows and is asked for 6"):
        field.given(random_states(3, 5, 2))(t, y)


@pytest.mark.parametrize("make", [flow_field, planar_field, lambda: Plain(flow_field())])
def test_probes_of_other_rows_are_refused(make: Any) -> None:
    dynamics = traced(make(), 3, jacobian=True, probe=random_states(1, 5, 3))
    with pytest.raises(FieldError, match="probes of 5 rows and is asked for 6"):
        dynamics(times_for("own", 6), random_states(2, 6, 3))


@with_both_controls
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_gradients_reach_conditions_that_another_network_made(gradient: str, control: str) -> None:
    field, y0 = flow_field(1, 2, (4, 4), n_context=3), random_states(2, 7)
    encoder = torch.nn.Linear(2, 3).double()
    with torch.no_grad():
        encoder.weight.copy_(random_states(5, 3))
        encoder.bias.zero_()
    inputs = random_states(3, 7)
    found = []
    for hide in (False, True):
        context = encoder(inputs)
        dynamics: Any = field.dynamics(context)
        given = {"args": (context,)} if hide else {}
        function = (lambda t, y, c: field.dynamics(c)(t, y)) if hide else dynamics
        options: Any = {"gradient": gradient, "step_control": control, "n_quadratures": 1, **given, **TIGHT}
        solution = solve(function, y0, [0.0, 1.0], **options)
        assert solution.quadratures is not None
        loss = solution.y1.square().sum() + solution.quadratures[:, -1].sum()
        found.append(torch.autograd.grad(loss, [encoder.weight, encoder.bias, *field.parameters()]))
    for own, other in zip(*found, strict=True):
        assert_close(own, other, 1e-10 if gradient == "discrete" else 1e-6)


# --- log-densities ---


@with_all_depths
@with_both_controls
def test_log_determinants_are_those_of_the_flow_map(hidden: tuple[int, ...], control: str) -> None:
    field, y0 = flow_field(1, 3, hidden), random_states(2, 5, 3)

    def end(y: Tensor) -> Tensor:
        return solve(field, y, [0.0, 1.0], step_control=control, rtol=1e-11, atol=1e-11).y1

    eps = 1e-5
    J = torch.stack([(end(y0 + eps * e) - end(y0 - eps * e)) / (2 * eps) for e in torch.eye(3).double()], dim=2)
    solution = solve(field.dynamics(), y0, [0.0, 1.0], step_control=control, n_quadratures=1, **TIGHT)
    assert solution.quadratures is not None
    assert_close(solution.quadratures[:, -1, 0], torch.linalg.slogdet(J).logabsdet, 1e-7)


def linear_field(A: Tensor, drift: Tensor) -> FlowField:
    """v = A y + t drift, set by hand."""
    d = len(A)
    field = FlowField(d, (d,), "identity", zero_output=True).double()
    first, last = field.flow_layers
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        first.weight.copy_(A)
        last.weight.copy_(torch.eye(d))
        last.drift.copy_(drift)
    return field


@with_both_controls
def test_the_log_density_of_a_linear_flow_is_that_of_its_gaussian(control: str) -> None:
    A = torch.tensor([[0.3, -1.0, 0.1], [0.8, -0.2, 0.0], [0.4, 0.1, 0.5]], dtype=torch.float64)
    drift = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    field = linear_field(A, drift)
    # y(1) = e^A (y(0) + integral of e^(-A s) s drift), a Gaussian for y(0) ~ N(0, 1).
    grown = torch.linalg.matrix_exp(A)
    inverse = torch.linalg.inv(A)
    mean = (inverse @ inverse @ (grown - torch.eye(3)) - inverse) @ drift
    exact = torch.distributions.MultivariateNormal(mean, grown @ grown.T)
    x = mean + 2 * random_states(3, 50, 3)
    options: Any = {"rtol": 1e-8, "atol": 1e-8, "step_control": control, "n_quadratures": 1}
    solution = solve(field.dynamics(), x, [1.0, 0.0], **options)
    assert solution.quadratures is not None
    base = -0.5 * solution.y1.square().sum(dim=1) - 1.5 * math.log(2 * math.pi)
    # Going back in time the integral is minus the log-determinant of the way there.
    assert_close(base + solution.quadratures[:, -1, 0], exact.log_prob(x), 1e-6)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_zero_output_starts_as_the_identity(hidden: tuple[int, ...]) -> None:
    field = FlowField(3, hidden, n_context=2, zero_output=True, generator=torch.Generator().manual_seed(0)).double()
    y0 = random_states(2, 4, 3)
    dynamics = field.dynamics(random_states(3, 4, 2), jacobian=True, energy=True)
    solution = solve(dynamics, y0, [0.0, 1.0], n_quadratures=3)
    assert solution.quadratures is not None
    assert torch.equal(solution.y1, y0) and torch.equal(solution.quadratures, torch.zeros(4, 2, 3).double())
    solution.quadratures[..., 0].sum().backward()
    weight = field.flow_layers[-1].weight
    assert weight.grad is not None and weight.grad.abs().max() > 1e-3


# --- in the solver ---


def loss_and_gradients(dynamics: Dynamics, field: FlowField, y0: Tensor, **options: Any) -> list[Tensor]:
    y0 = y0.clone().requires_grad_()
    n = dynamics(torch.zeros(len(y0), 1).to(y0), y0.detach()).shape[1] - y0.shape[1]
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    solution = solve(dynamics, y0, t, n_quadratures=n, **(TIGHT | options))
    assert solution.quadratures is not None
    weights = torch.arange(1.0, n + 1).to(y0)
    loss = solution.y1.sin().sum() + (solution.quadratures[:, 1:] * weights).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [y0, t, *field.parameters()])]


@with_all_depths
@with_both_controls
@pytest.mark.parametrize("probed", [False, True])
def test_discrete_and_adjoint_gradients_agree(hidden: tuple[int, ...], control: str, probed: bool) -> None:
    field, y0 = flow_field(1, 3, hidden), random_states(2, 5, 3)
    dynamics = field.dynamics(energy=True, jacobian=True, probe=random_states(4, 5, 3) if probed else None)
    by = {name: loss_and_gradients(dynamics, field, y0, gradient=name, step_control=control) for name in
          ("discrete", "adjoint")}  # fmt: skip
    for one, other in zip(by["discrete"], by["adjoint"], strict=True):
        assert_close(one, other, 1e-5)


@with_all_depths
@with_both_controls
def test_discrete_gradients_are_those_of_a_hidden_field(hidden: tuple[int, ...], control: str) -> None:
    field, y0 = flow_field(1, 3, hidden), random_states(2, 5, 3)
    dynamics = field.dynamics(energy=True, jacobian=True)
    plain = as_dynamics(Plain(dynamics), n_outputs=6, parameters=field.parameters())
    options = {"step_control": control, "rtol": 1e-4, "atol": 1e-6}
    for one, other in zip(*(loss_and_gradients(x, field, y0, **options) for x in (dynamics, plain)), strict=True):
        assert_close(one, other, 1e-9)


def test_second_derivatives_of_a_log_density_are_there() -> None:
    field, y0 = flow_field(1, 2, (4, 4)), random_states(2, 3).requires_grad_()

    def lost(y: Tensor) -> Tensor:
        solution = solve(field.dynamics(), y, [0.0, 1.0], n_quadratures=1, method="rk4", step_size=0.25)
        assert solution.quadratures is not None
        return solution.quadratures[:, -1].sum()

    assert torch.autograd.gradgradcheck(lost, (y0,))
    (expected,) = torch.autograd.grad(lost(y0), y0)
    for transform in (torch.func.grad, torch.func.jacrev):
        assert_close(transform(lost)(y0.detach()), expected, 1e-10)


@pytest.mark.parametrize("control", ["row", "batch"])
def test_a_batch_may_be_empty(control: str) -> None:
    for hidden in HIDDEN:
        y0 = random_states(2, 0, 3).requires_grad_()
        solution = solve(flow_field(1, 3, hidden).dynamics(), y0, [0.0, 1.0], n_quadratures=1, step_control=control)
        assert solution.quadratures is not None and solution.quadratures.shape == (0, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@with_all_depths
def test_rows_do_not_see_each_other(hidden: tuple[int, ...], dtype: torch.dtype) -> None:
    field = FlowField(3, tuple(8 * h for h in hidden), generator=torch.Generator().manual_seed(1)).to(dtype)
    y0 = (3 * random_states(2, 37, 3)).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    all_of_them = solve(field.dynamics(), y0, [0.0, 1.0], n_quadratures=1, rtol=1e-5, atol=1e-5)
    assert all_of_them.quadratures is not None
    for part in (slice(0, 1), slice(5, 12), slice(20, 37)):
        alone = solve(field.dynamics(), y0[part], [0.0, 1.0], n_quadratures=1, rtol=1e-5, atol=1e-5)
        assert alone.quadratures is not None
        assert_close(alone.y1, all_of_them.y1[part], tolerance)
        assert_close(alone.quadratures, all_of_them.quadratures[part], tolerance)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@with_both_controls
def test_float32_works(gradient: str, control: str) -> None:
    field, y0 = flow_field(1, 3), random_states(2, 20, 3)
    options: Any = {"gradient": gradient, "step_control": control, "rtol": 1e-4, "atol": 1e-4}
    exact = loss_and_gradients(field.dynamics(), field, y0, gradient=gradient, step_control=control)
    field.float()
    rough = loss_and_gradients(field.dynamics(), field, y0.float(), **options)
    for found, wanted in zip(rough, exact, strict=True):
        assert (found - wanted).abs().max() <= 5e-3 * (1 + wanted.abs().max())


# --- the module ---


def test_the_defaults_are_two_layers_of_64_units() -> None:
    shapes = {name: tuple(p.shape) for name, p in FlowField(3, n_context=2).named_parameters()}
    assert shapes["layers.0.weight"] == (64, 3) and shapes["layers.1.weight"] == (64, 64)
    assert shapes["layers.2.weight"] == (3, 64) and shapes["layers.0.context"] == (64, 2)
    assert not {"layers.2.gate", "layers.2.context"} & shapes.keys()


def test_initial_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (list(FlowField(2, generator=torch.Generator().manual_seed(3)).parameters()) for _ in range(2))
    fresh = FlowField(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(fresh.flow_layers[0].weight, FlowField(2).flow_layers[0].weight)


def test_it_can_be_copied_and_pickled() -> None:
    field, t, y = flow_field(1), times_for("own", 4), random_states(2, 4, 3)
    with torch.no_grad():
        for other in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
            assert torch.equal(other.trace(t, y), field.trace(t, y))


@pytest.mark.parametrize(
    "options", [{"hidden_layer_sizes": ()}, {"hidden_layer_sizes": (4, 0)}, {"n_dims": 0}, {"n_context": -1}]
)
def test_a_network_without_units_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one hidden layer, and a unit in each"):
        FlowField(**({"n_dims": 2} | options))


def test_what_does_not_fit_is_refused() -> None:
    field, t = flow_field(), times_for("own", 4)
    with pytest.raises(ValueError, match="activation='elu' is unknown"):
        FlowField(2, activation="elu")
    with pytest.raises(ValueError, match=r"a probe has shape \(3,\), or \(n, 3\).*got \(4, 2\)"):
        field.dynamics(jacobian=True, probe=random_states(1, 4, 2))
    with pytest.raises(FieldError, match=r"states of 3 components in torch.float64; got 2"):
        field(t, random_states(1, 4, 2))
    with pytest.raises(FieldError, match=r"got 3 in torch.float32"):
        field.trace(t, random_states(1, 4, 3).float())
    _, tape = field.dynamics().linearize(t, random_states(1, 4, 3))
    with pytest.raises(FieldError, match="a cotangent needs 4 columns; got 3"):
        field.dynamics().pull(tape, random_states(1, 4, 3))
