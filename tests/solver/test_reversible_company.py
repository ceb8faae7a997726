"""Reversible steps together with what else a solve can do: given steps, second derivatives, torchdiffeq's calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from skode.exceptions import ConvergenceWarning
from skode.solver import METHODS, Event, odeint, solve
from skode.solver.reversible import ReversibleGradient
from skode.solver.second import Node
from tests.problems import Plain, column, mlp_field, random_states, rows, times
from tests.solver.gradient_helpers import replayed_map

OWN = ReversibleGradient(coupling=0.95)
NAN = math.nan
EXPLICIT = [name for name, tableau in METHODS.items() if not tableau.implicit]

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_kernels = pytest.mark.parametrize("wrap", [lambda field: field, Plain], ids=["own kernel", "tapes"])


def coarse(method: str, gradient: Any = OWN) -> dict[str, Any]:
    """Options with which a solve takes a handful of steps."""
    steps = {"rtol": 1e-2, "atol": 1e-3} if METHODS[method].adaptive else {"step_size": 0.3}
    return {"method": method, "gradient": gradient, **steps}


class Jump(nn.Module):
    """Changes its sign at t = 0.4."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp_field(1, n_dims=1, hidden_layer_sizes=(2,))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.4, 0.5, -1.0) * self.inner(t, y)


# --- given steps ---


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
@pytest.mark.parametrize("t", [(0.0, 1.0), (0.0, 0.2, 0.2, 0.9), (1.0, 0.3, -0.5), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")  # Euler's
def test_given_steps_give_the_same_bits(method: str, control: str, t: tuple[float, ...], dtype: torch.dtype) -> None:
    field, y0 = mlp_field().to(dtype), random_states(1, 5).to(dtype).requires_grad_()
    options = {"step_control": control, **coarse(method)}
    first = solve(field, y0, times(*t), **options)
    again = solve(field, y0, times(*t), steps=first.steps, **options)
    assert torch.equal(again.y, first.y) and torch.equal(again.steps.t.nan_to_num(), first.steps.t.nan_to_num())
    inputs = [y0, *field.parameters()]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12  # rejected steps change the order of sums
    for own, other in zip(*(torch.autograd.grad(s.y.square().sum(), inputs) for s in (again, first)), strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "midpoint"])
def test_given_steps_give_the_same_bits_beside_a_jump(method: str, control: str) -> None:
    options = {"step_control": control, "jump_times": [0.4], **coarse(method)}
    first = solve(Jump(), column(1.0, 2.0), times(0.0, 0.7, 1.0), **options)
    again = solve(Jump(), column(1.0, 2.0), times(0.0, 0.7, 1.0), steps=first.steps, **options)
    assert torch.equal(again.y, first.y)


def test_a_failed_solves_steps_reach_as_far_as_it_did() -> None:
    t = rows((0.0, 0.3, 0.3, 1.3), (1.0, 0.1, -0.5, NAN), (0.0, 0.5, 1.0, 2.0))
    options = {"gradient": "reversible", "max_num_steps": 3}
    first = solve(mlp_field(), random_states(2, 3), t, **options)
    again = solve(mlp_field(), random_states(2, 3), t, steps=first.steps, **options)
    assert int(first.status.max()) > 0
    assert torch.equal(again.y.nan_to_num(nan=7.0), first.y.nan_to_num(nan=7.0))
    assert torch.equal(again.status, first.status)


@with_both_controls
def test_steps_that_pass_over_an_output_are_refused(control: str) -> None:
    field, y0, options = mlp_field(), random_states(3, 2), {"step_control": control}
    steps = solve(field, y0, [0.0, 1.0], **options).steps
    solve(field, y0, [0.0, 1.0], gradient="reversible", steps=steps, **options)
    with pytest.raises(ValueError, match=r"no step of steps ends at the output time 0\.123 \(row 0\).*'discrete'"):
        solve(field, y0, [0.0, 0.123, 1.0], gradient="reversible", steps=steps, **options)


def test_steps_of_an_ordinary_solve_can_be_taken() -> None:
    field, y0, t = mlp_field(), random_states(4, 3), [0.0, 0.4, 1.0]
    ordinary = solve(field, y0, t, step_times=[0.4], rtol=1e-8, atol=1e-8)
    again = solve(field, y0, t, steps=ordinary.steps, gradient="reversible")
    torch.testing.assert_close(again.y, ordinary.y, rtol=1e-6, atol=1e-6)


def test_steps_are_told_without_gradients_too() -> None:
    field, y0, options = mlp_field(), random_states(5, 3), {"gradient": "reversible"}
    told = solve(field, y0, [0.0, 0.4, 1.0], **options).steps
    with torch.no_grad():
        plain = solve(field, y0, [0.0, 0.4, 1.0], **options).steps
    assert torch.equal(told.t.nan_to_num(nan=7.0), plain.t.nan_to_num(nan=7.0))
    assert bool((told.t == 0.4).any(dim=1).all())


# --- derivatives of the map with its steps held fixed ---


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
@with_both_kernels
def test_the_replayed_map_passes_gradcheck(method: str, control: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    field = wrap(mlp_field(1, hidden_layer_sizes=(2,)))
    # The times' derivatives are below: given steps do not move with inner outputs by themselves.
    y0, t = random_states(4, 2).requires_grad_(), times(0.0, 0.15, 0.8, 1.0)
    states = replayed_map(field, y0, t, step_control=control, **coarse(method))
    inputs = (y0, *field.parameters())
    assert gradcheck(lambda y0, *p: states(y0, t, *p), inputs, atol=2e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
def test_the_first_and_the_last_time_of_the_replayed_map_pass_gradcheck(method: str, control: str) -> None:
    field, y0, t = mlp_field(1, hidden_layer_sizes=(2,)), random_states(4, 2), times(0.0, 1.0).requires_grad_()
    states = replayed_map(field, y0, t, step_control=control, **coarse(method))
    assert gradcheck(lambda t: states(y0, t), (t,), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
def test_all_times_pass_gradcheck_where_the_steps_follow_the_outputs(method: str, control: str) -> None:
    field, y0, t = mlp_field(1, hidden_layer_sizes=(2,)), random_states(4, 2), times(0.0, 0.35, 0.8, 1.0)
    options = {"step_control": control, **coarse(method)}
    steps, outputs = solve(field, y0, t, **options).steps.t, t[1:-1].tolist()

    def states(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        moved = steps
        for old, new in zip(outputs, t[1:-1].detach(), strict=True):
            assert bool((steps == old).any(dim=1).all())
            moved = torch.where(steps == old, new, moved)
        return solve(field, y0, t, steps=moved, **options).y

    assert gradcheck(lambda t: states(y0, t), (t.clone().requires_grad_(),), atol=2e-6, rtol=1e-4)
    inputs = (y0.requires_grad_(), t.requires_grad_(), *field.parameters())
    assert gradcheck(states, inputs, atol=2e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "rk4", "midpoint"])
@with_both_kernels
def test_second_derivatives_of_the_replayed_map_pass_gradgradcheck(
    method: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    field = wrap(mlp_field(1, n_dims=1, hidden_layer_sizes=(1,)))
    y0, t = random_states(9, 2, 1).requires_grad_(), times(0.0, 0.4, 1.0)
    states = replayed_map(field, y0, t, **coarse(method))
    assert gradgradcheck(lambda y0, *p: states(y0, t, *p), (y0, *field.parameters()), atol=1e-5, rtol=1e-3)


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
@pytest.mark.parametrize("jumps", [None, [0.4]])
@pytest.mark.parametrize("t", [(0.0, 0.0, 0.4, 0.4, 0.9, 1.0), (1.0, 1.0, 0.4, 0.0, 0.0)], ids=["up", "down"])
def test_the_map_in_plain_torch_is_the_one_that_is_solved(
    control: str, method: str, jumps: list[float] | None, t: tuple[float, ...]
) -> None:
    field, y0, kept = Jump() if jumps else mlp_field(1, n_dims=1), column(1.0, 2.0), times(*t)
    inputs = [y0.requires_grad_(), kept.requires_grad_(), *field.parameters()]
    solution = solve(field, y0, kept, step_control=control, jump_times=jumps, **coarse(method))
    node = solution.y.grad_fn
    weights = torch.linspace(-1, 1, 2 * len(t), dtype=torch.float64).view(2, -1, 1)
    found = torch.autograd.grad((weights * solution.y).sum(), inputs, retain_graph=True)
    y, _ = Node(node.problem, node.strategy, node.run, True).map(y0, kept.expand(2, -1))
    torch.testing.assert_close(y, solution.y, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((weights * y).sum(), inputs)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_the_map_in_plain_torch_knows_rows_that_fail_and_rows_with_their_own_times() -> None:
    field, y0 = mlp_field(4), torch.cat([random_states(5, 4), rows((NAN, NAN))]).requires_grad_()
    t = rows((0.0, 0.4, 0.4, 1.3), (2.0, 1.1, 0.3, NAN), (0.5,) * 4, (-1.0, -1.0, 0.2, 0.2), (0.0, 0.0, 1.0, 1.0))
    inputs = [y0, t.requires_grad_(), *field.parameters()]
    y = solve(field, y0, t, gradient=OWN, rtol=1e-4).y
    first = torch.autograd.grad(y.square().nansum(), inputs, create_graph=True)
    plain = torch.autograd.grad(y.square().nansum(), inputs, retain_graph=True)
    for own, other in zip(first, plain, strict=True):
        torch.testing.assert_close(own.detach(), other, rtol=0, atol=0)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert all(bool(g.isfinite().all()) for g in second)
    assert not bool(second[0][4].any()) and bool(second[0][:2].any())


# --- rows that are not found again ---


@with_both_controls
def test_a_row_that_is_not_found_again_is_told_and_spoils_no_other(control: str) -> None:
    def solved(y0: Tensor, *, asked: list[int]) -> Tensor:
        strategy = ReversibleGradient(coupling=0.5)
        y = solve(steep, y0, [0.0, 1.0], method="rk4", step_size=0.002, gradient=strategy, step_control=control).y1
        return torch.autograd.grad(y[asked].sum(), y0)[0]

    def steep(t: Tensor, y: Tensor) -> Tensor:
        # Where y is below 3 nothing moves, so that the way back stays there.
        return torch.where(y > 3, 40 * torch.sin(y * y) * y * y, 0.0 * y)

    y0 = column(1.0, 4.0, 2.0).requires_grad_()
    quiet = solved(y0, asked=[0, 2])
    torch.testing.assert_close(quiet, column(1.0, 0.0, 1.0))
    with pytest.warns(ConvergenceWarning, match=r"missed y0 going back in 1 of 3 rows, by .*row 1"):
        found = solved(y0, asked=[0, 1, 2])
    torch.testing.assert_close(found[[0, 2]], column(1.0, 1.0))


# --- what does not go together ---


def test_events_are_refused() -> None:
    event = Event(lambda t, y: y[:, 0] - 0.5)
    with pytest.raises(ValueError, match=r"events= does not go with gradient='reversible'.*'discrete'"):
        solve(lambda t, y: -y, column(1.0), [0.0, 2.0], events=event, gradient="reversible")
    with pytest.raises(ValueError, match=r"events= does not go with gradient='reversible'.*'discrete'"):
        odeint(
            lambda t, y: -y,
            times(1.0),
            times(0.0, 2.0),
            event_fn=lambda t, y: y[0] - 0.5,
            gradient="reversible",
        )


def test_function_transforms_are_refused() -> None:
    def loss(y0: Tensor) -> Tensor:
        return solve(lambda t, y: -y, y0, [0.0, 1.0], gradient="reversible").y1.sum()

    with pytest.raises(NotImplementedError, match=r"gradient='reversible' .* torch\.func.*gradient='discrete'"):
        torch.func.grad(loss)(column(1.0))


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "options": {"step_size": 0.05}}, {"method": "midpoint"}])
def test_odeint_takes_reversible_steps(options: dict[str, Any]) -> None:
    field, t = mlp_field(), torch.linspace(0, 1, 21, dtype=torch.float64)
    found = []
    for gradient in ("reversible", "discrete"):
        y0 = random_states(6, 3).requires_grad_()
        y = odeint(lambda t, y: field(t.expand(len(y), 1), y), y0, t, gradient=gradient, **options)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [y0, *field.parameters()])))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
