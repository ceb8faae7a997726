"""A solve replayed with its accepted steps: the same bits, a smooth map, and its exact derivatives of any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from skode.solver import METHODS, Solution, solve
from tests.problems import Plain, Recorded, column, mlp_field, random_states, rows, times
from tests.solver.gradient_helpers import replayed_map

NAN = math.nan
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
IMPLICIT = [name for name, tableau in METHODS.items() if getattr(tableau, "gamma", 0)]
# The others are checked along one random direction only, which is faster.
SLOWLY = ["tsit5", "rk4"]
EXPLICIT = [name for name in ADAPTIVE if name not in IMPLICIT]

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def coarse(method: str) -> dict[str, Any]:
    """Options with which a solve takes a handful of steps; an implicit method solves its stages well."""
    if method in IMPLICIT:
        return {"method": method, "rtol": 1e-10, "atol": 1e-10, "min_step": 0.25, "first_step": 0.25}
    if METHODS[method].adaptive:
        return {"method": method, "rtol": 1e-2, "atol": 1e-3}
    return {"method": method, "step_size": 0.3}


def small_field() -> nn.Module:
    return mlp_field(1, hidden_layer_sizes=(2,))


class With(nn.Module):
    """A function of the time, the state and parameters."""

    def __init__(self, function: Callable[..., Tensor], *values: float) -> None:
        super().__init__()
        self.function, self.values = function, nn.ParameterList([nn.Parameter(times(value)) for value in values])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.function(t, y, *self.values)


def tracking(t: Tensor, y: Tensor) -> Tensor:
    """Stiff enough for rejected steps."""
    return -30 * (y - torch.cos(3 * t))


# --- the same bits ---


def assert_same_solution(found: Solution, expected: Solution) -> None:
    for name in ("y", "y1", "status", "n_steps", "t_reached"):
        own, other = getattr(found, name), getattr(expected, name)
        assert torch.equal(own.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)), name
    assert torch.equal(found.steps.t.nan_to_num(nan=7.0), expected.steps.t.nan_to_num(nan=7.0))
    assert int(found.n_rejected.sum()) == 0


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [(0.0, 1.0), (0.0, 0.2, 0.2, 0.9), (1.0, 0.3, -0.5), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_replay_gives_the_same_bits(method: str, control: str, t: tuple[float, ...], dtype: torch.dtype) -> None:
    field, y0 = mlp_field().to(dtype), random_states(1, 5).to(dtype)
    options = {"step_control": control, **coarse(method)}
    first = solve(field, y0, times(*t), **options)
    assert_same_solution(solve(field, y0, times(*t), steps=first.steps, **options), first)


@on_all_methods
def test_a_replay_of_rows_with_their_own_times_gives_the_same_bits(method: str) -> None:
    t = rows((0.0, 0.3, 1.3), (1.0, 0.1, -0.5), (0.4, 0.6, NAN), (0.7, 0.7, 0.7))
    first = solve(mlp_field(), random_states(2, 4), t, **coarse(method))
    again = solve(mlp_field(), random_states(2, 4), t, steps=first.steps, **coarse(method))
    assert_same_solution(again, first)


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
def test_rejected_steps_are_not_taken_again(method: str, control: str) -> None:
    field, y0 = Recorded(tracking), column(2.0, 1.0)
    options = {"method": method, "step_control": control, "rtol": 1e-2, "first_step": 0.5}
    first = solve(field, y0, [0.0, 0.3, 1.0], **options)
    assert int(first.n_rejected.min()) > 0
    n_calls = field.n_calls
    again = solve(field, y0, [0.0, 0.3, 1.0], steps=first.steps, **options)
    assert_same_solution(again, first)
    assert field.n_calls - n_calls < n_calls


def test_a_replay_takes_the_steps_whatever_the_error() -> None:
    # The steps of a smooth field, for one that would have rejected them.
    easy = solve(lambda t, y: -y, column(1.0, 2.0), [0.0, 1.0])
    hard = solve(lambda t, y: -y + 50 * torch.cos(50 * t), column(1.0, 2.0), [0.0, 1.0], steps=easy.steps)
    assert hard.success and torch.equal(hard.n_steps, easy.n_steps)
    assert int(hard.n_rejected.sum()) == 0
    torch.testing.assert_close(hard.steps.t, easy.steps.t, equal_nan=True)


def test_the_first_replayed_step_starts_at_t0_and_the_last_one_ends_at_t1() -> None:
    first = solve(tracking, column(2.0), [0.0, 1.0])
    knots = first.steps.t[0]
    moved = solve(tracking, column(2.0), [-0.001, 1.002], steps=first.steps).steps.t[0]
    assert moved[0] == -0.001 and moved[-1] == 1.002
    assert torch.equal(moved[1:-1], knots[1:-1])


def test_a_float32_replay_of_float64_steps_is_close() -> None:
    field, y0 = mlp_field(), random_states(3, 4)
    first = solve(field, y0, [0.0, 0.5, 2.0])
    again = solve(mlp_field().float(), y0.float(), [0.0, 0.5, 2.0], steps=first.steps)
    assert torch.equal(again.n_steps, first.n_steps)
    torch.testing.assert_close(again.y, first.y.float(), rtol=1e-5, atol=1e-5)


def test_steps_of_another_number_of_rows_are_refused() -> None:
    first = solve(tracking, column(2.0, 1.0), [0.0, 1.0])
    with pytest.raises(ValueError, match="steps"):
        solve(tracking, column(2.0, 1.0, 0.0), [0.0, 1.0], steps=first.steps)


# --- first derivatives of the replayed map ---


@on_all_methods
@with_both_controls
def test_the_replayed_map_passes_gradcheck(method: str, control: str) -> None:
    field, y0, t = small_field(), random_states(4, 2).requires_grad_(), times(0.0, 0.15, 0.8, 1.0).requires_grad_()
    states = replayed_map(field, y0, t, step_control=control, **coarse(method))
    assert gradcheck(states, (y0, t, *field.parameters()), atol=2e-6, rtol=1e-4, fast_mode=method not in SLOWLY)


@on_all_methods
def test_the_replayed_map_of_rows_with_their_own_times_passes_gradcheck(method: str) -> None:
    field, y0 = Plain(small_field()), random_states(5, 3).requires_grad_()
    kept = rows((0.0, 0.35, 1.0), (1.0, 0.5, -0.2), (0.3, 0.55, 1.4)).requires_grad_()
    states = replayed_map(field, y0, kept, **coarse(method))
    assert gradcheck(states, (y0, kept, *field.parameters()), atol=2e-6, rtol=1e-4, fast_mode=method not in SLOWLY)


@pytest.mark.parametrize("budget", [0, 1, 2000, 2**28])
@with_both_controls
def test_whatever_the_budget_the_gradient_is_the_same(budget: int, control: str) -> None:
    field, found = Plain(mlp_field()), []
    for allowed in (budget, 2**28):
        y0, t = random_states(8, 5).requires_grad_(), times(0.0, 1.0, 3.0).requires_grad_()
        y = solve(field, y0, t, step_control=control, rtol=1e-6, memory_budget=allowed).y
        found.append(torch.autograd.grad(y.square().sum(), [y0, t, *field.parameters()]))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-13)


# --- how exact ---


with_growing_rates = pytest.mark.parametrize("rate", [1.0, 5.0, 20.0, 40.0])
on_some_methods = pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])


@with_growing_rates
@on_some_methods
@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_gradients_of_a_linear_problem_are_as_exact_as_its_solution(rate: float, rtol: float, method: str) -> None:
    # y' = -rate (y - a cos t). The map is y0 A + a B with one step for both rows, y0 = 1 and -1: the errors of A and B
    # are half the sum and half the difference of the rows' errors, so neither is above the larger one.
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    y0, field = column(1.0, -1.0).requires_grad_(), With(lambda t, y, a: -rate * (y - a * torch.cos(t)), 1.0)
    (a,) = field.parameters()
    forced = a * (rate * torch.cos(t) + torch.sin(t)) * rate / (1 + rate**2)
    exact = forced + (y0 - a * rate**2 / (1 + rate**2)) * torch.exp(-rate * t)
    options = {"method": method, "rtol": rtol, "atol": rtol, "step_control": "batch"}
    y = solve(field, y0, t, **options).y[..., 0]
    truncation = float((y - exact).detach().abs().max())
    assert 0 < truncation < 100 * rtol
    for i in range(len(t)):
        found = torch.autograd.grad(y[0, i], [y0, a], retain_graph=True)
        expected = torch.autograd.grad(exact[0, i], [y0, a], retain_graph=True)
        for own, other in zip(found, expected, strict=True):
            assert float((own - other).abs().max()) <= 1.01 * truncation


class Follower(nn.Module):
    """Runs after a network's output, the faster the larger the rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.inner, self.rate = mlp_field(0, 3, (8,)), rate

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * (y - self.inner(t, y))


def followed(rate: float, **options: Any) -> tuple[Tensor, Tensor]:
    """States of the followers, and the gradient of their squares' sum as one vector."""
    field, y0 = Follower(rate), random_states(0, 4, 3).requires_grad_()
    y = solve(field, y0, torch.linspace(0, 1, 6, dtype=torch.float64), **options).y[:, 1:]
    gradients = torch.autograd.grad(y.square().sum(), [y0, *field.parameters()])
    return y.detach(), torch.cat([g.reshape(-1) for g in gradients])


@cache
def followed_exactly(rate: float) -> tuple[Tensor, Tensor]:
    return followed(rate, method="dopri5", rtol=1e-11, atol=1e-11)


@with_growing_rates
@on_some_methods
def test_gradients_of_a_damped_network_are_within_three_truncation_errors(rate: float, method: str) -> None:
    # An adjoint that goes back along the damped state loses all digits here: a thousand truncation errors.
    y, gradient = followed(rate, method=method, rtol=1e-5, atol=1e-5)
    exact_y, exact_gradient = followed_exactly(rate)
    truncation = (y - exact_y).norm() / exact_y.norm()
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() <= 3 * truncation


# --- second derivatives ---


def test_a_gradient_penalty_has_the_gradient_of_its_closed_form() -> None:
    # y1 = y0 e^(rate T), so the penalty (dy1/dy0)^2 is e^(2 rate T).
    field, y0 = With(lambda t, y, rate: rate * y, 0.7), column(1.3).requires_grad_()
    (rate,) = field.parameters()
    y1 = solve(field, y0, [0.0, 1.5], rtol=1e-10, atol=1e-10).y1
    (slope,) = torch.autograd.grad(y1.sum(), y0, create_graph=True)
    penalty = slope.square().sum()
    to_rate, to_y0 = torch.autograd.grad(penalty, [rate, y0], allow_unused=True)
    growth = math.exp(2 * 0.7 * 1.5)
    torch.testing.assert_close(penalty.detach(), times(growth)[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(to_rate, times(3 * growth), rtol=1e-8, atol=0)
    assert to_y0 is None or abs(float(to_y0)) < 1e-8


@with_both_controls
def test_second_derivatives_of_a_nonlinear_flow_have_their_closed_form(control: str) -> None:
    # The logistic equation with rate k: y1 = 1 / (1 + (1 / y0 - 1) e^(-k T)).
    y0, field = column(0.2, 0.7).requires_grad_(), With(lambda t, y, k: k * y * (1 - y), 1.3)
    (k,), t = field.parameters(), times(0.0, 0.6, 1.2)
    options = {"rtol": 1e-10, "atol": 1e-12, "step_control": control}
    found = solve(field, y0, t, **options).y[..., 0]
    exact = 1 / (1 + (1 / y0 - 1) * torch.exp(-k * t))
    seconds = []
    for y in (found, exact):
        first = torch.autograd.grad((y * times(0.5, 1.0, -2.0)).sum(), [y0, k], create_graph=True)
        seconds.append(torch.autograd.grad(first[0].square().sum() + first[1].sin().sum(), [y0, k]))
    for own, other in zip(*seconds, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "rk4", "midpoint"])
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_the_replayed_map_passes_gradgradcheck(method: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    field = wrap(mlp_field(1, n_dims=1, hidden_layer_sizes=(1,)))
    # No output where two steps meet: dense output has no second derivative there.
    y0, t = random_states(9, 2, 1).requires_grad_(), times(0.0, 0.4, 1.0).requires_grad_()
    states = replayed_map(field, y0, t, **coarse(method))
    assert gradgradcheck(states, (y0, t, *field.parameters()), atol=1e-5, rtol=1e-3)


@with_both_controls
def test_a_graph_of_the_gradient_leaves_its_value_as_it_is(control: str) -> None:
    field, found = mlp_field(), []
    for create_graph in (False, True):
        y0 = random_states(10, 4).requires_grad_()
        y = solve(field, y0, [0.0, 0.4, 1.0], step_control=control).y
        found.append(torch.autograd.grad(y.square().sum(), [y0, *field.parameters()], create_graph=create_graph))
    for plain, graph in zip(*found, strict=True):
        torch.testing.assert_close(plain, graph, rtol=1e-11, atol=1e-13)


def test_a_penalty_on_the_gradient_trains_the_parameters_of_a_network() -> None:
    # The mixed second derivative against central differences of the first one, along the replayed steps.
    field, y0 = mlp_field(2), random_states(11, 3).requires_grad_()
    steps = solve(field, y0.detach(), [0.0, 1.0]).steps

    def penalty(create_graph: bool) -> Tensor:
        y1 = solve(field, y0, [0.0, 1.0], steps=steps).y1
        (slope,) = torch.autograd.grad(y1.sum(), y0, create_graph=create_graph)
        return slope.square().sum()

    weights = list(field.parameters())
    found = torch.autograd.grad(penalty(True), weights)
    for weight, own in zip(weights, found, strict=True):
        flat, ends = weight.detach().view(-1), []
        for step in (1e-5, -1e-5):
            kept = flat[0].item()
            flat[0] = kept + step
            ends.append(float(penalty(False)))
            flat[0] = kept
        assert abs(float(own.view(-1)[0]) - (ends[0] - ends[1]) / 2e-5) < 1e-6


def test_a_second_derivative_by_the_adjoint_is_right_or_refused() -> None:
    field, y0 = With(lambda t, y, rate: rate * y, 0.7), column(1.3).requires_grad_()
    y1 = solve(field, y0, [0.0, 1.5], rtol=1e-10, atol=1e-10, gradient="adjoint").y1
    try:
        (slope,) = torch.autograd.grad(y1.sum(), y0, create_graph=True)
        (found,) = torch.autograd.grad(slope.square().sum(), list(field.parameters()))
    except RuntimeError as error:
        assert any(word in str(error) for word in ("once_differentiable", "discrete", "second"))
        return
    torch.testing.assert_close(found, times(3 * math.exp(2 * 0.7 * 1.5)), rtol=1e-6, atol=0)


# --- what belongs to a graph node stays with it ---


def gradients_of(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
@with_both_controls
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_solves_between_a_solve_and_its_backward_change_nothing(
    gradient: str, control: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    field = wrap(mlp_field())
    weights, options = list(field.parameters()), {"gradient": gradient, "step_control": control}
    starts = [random_states(20 + seed, n).requires_grad_() for seed, n in enumerate((4, 4, 7, 4))]

    def run(y0: Tensor) -> Tensor:
        return solve(field, y0, [0.0, 0.4, 1.0], **options).y

    alone = [gradients_of(run(y0), [y0, *weights]) for y0 in starts]
    first, second = run(starts[0]), run(starts[1])
    found = [gradients_of(first, [starts[0], *weights])]
    third = run(starts[2])
    again = gradients_of(first, [starts[0], *weights])
    with torch.no_grad():
        run(starts[3])
    found += [gradients_of(second, [starts[1], *weights]), gradients_of(third, [starts[2], *weights])]
    for own, other in [*zip(found, alone[:3], strict=True), (again, alone[0])]:
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_freed_graph_is_not_used_again() -> None:
    y0 = random_states(12, 3).requires_grad_()
    loss = solve(mlp_field(), y0, [0.0, 1.0]).y1.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
@with_both_controls
def test_backwards_of_one_field_in_several_threads_are_the_serial_ones(gradient: str, control: str) -> None:
    field, starts = mlp_field(), [random_states(30 + seed, 3 + seed % 2).requires_grad_() for seed in range(8)]

    def run(y0: Tensor) -> tuple[Tensor, ...]:
        y = solve(field, y0, [0.0, 0.4, 1.0], gradient=gradient, step_control=control).y
        return (y.detach(), *torch.autograd.grad(y.square().sum(), [y0, *field.parameters()]))

    serial = [run(y0) for y0 in starts]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(run, starts * 3))
    for own, other in zip(threaded, serial * 3, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
