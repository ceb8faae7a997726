"""Gradients of a solve: exact for "discrete", within the tolerance for "adjoint", and harmless in every failure."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.fields import MLPField
from skode.solver import METHODS, Solution, Status, solve
from skode.solver.tableaus import Tableau
from tests.problems import Field, Plain, column, mlp_field, random_states, rows

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]
EXPLICIT = [name for name in METHODS if name not in IMPLICIT]
CONTROLS = ["row", "batch"]
GRADIENTS = ["discrete", "adjoint", "reversible"]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", CONTROLS)
with_both_gradients = pytest.mark.parametrize("gradient", GRADIENTS)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(y: Tensor) -> Tensor:
    """A smooth function of all states that exist, with another weight for each entry."""
    generator = torch.Generator().manual_seed(17)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return (weights * y + 0.3 * y.square()).nansum()


def gradients_of(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


class Wiggle(nn.Module):
    """Stiff and time-dependent: adaptive steps are rejected on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(times(6.0))
        self.mix = nn.Parameter(rows((0.2, -1.0), (1.0, 0.1)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.mix - self.rate * torch.tanh(y - torch.cos(3 * t)) * (1 + 4 * torch.sin(9 * t) ** 2)


# --- an independent replay of the accepted steps, differentiated by autograd ---


def accepted_ends(solution: Solution) -> list[list[float]]:
    """For each row, where its accepted steps ended, but for the last one."""
    return [[end for end in row if end == end][1:-1] for row in solution.steps.t.tolist()]


def solved_slope(field: Field, t: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """F = f(t, base + weight F): solved without a graph, then one step of Newton's method that has the right one."""
    with torch.no_grad():
        J = torch.autograd.functional.jacobian(lambda y: field(t, y), base)[0, :, 0]
        eye, F = torch.eye(len(J), dtype=base.dtype), field(t, base)
        for _ in range(20):
            J = torch.autograd.functional.jacobian(lambda y: field(t, y), base + weight * F)[0, :, 0]
            F = F + torch.linalg.solve(eye - weight * J, (field(t, base + weight * F) - F)[0])
    return F + torch.linalg.solve((eye - weight * J).detach(), (field(t, base + weight * F) - F)[0])


def replay_row(field: Field, tableau: Tableau, y: Tensor, t: Tensor, ends: list[float]) -> Tensor:
    """States (m, d) at times t of a row that starts as y (1, d); t[0] and t[-1] move the first and the last step."""
    tableau = tableau.closed
    knots = [t[0], *(torch.tensor(end, dtype=t.dtype) for end in ends), t[-1]]
    pieces: list[tuple[Tensor, list[Tensor]]] = []
    for start, end in pairwise(knots):
        h, K = end - start, []
        for c, a in zip(tableau.c, ((), *tableau.a), strict=True):
            Y = y + h * sum((weight * k for weight, k in zip(a, K, strict=True)), torch.zeros_like(y))
            time = (start + c * h).view(1, 1)
            K.append(solved_slope(field, time, Y, h * tableau.gamma) if tableau.gamma and K else field(time, Y))
        pieces.append((y, K))
        y = y + h * sum(weight * k for weight, k in zip(tableau.b, K, strict=True))
    outputs, sign = [pieces[0][0]], 1.0 if t[-1] >= t[0] else -1.0
    for time in t[1:]:
        place = sum(bool(sign * knot < sign * time) for knot in knots[1:])
        start, end = knots[place], knots[place + 1]
        theta, (y_start, K) = (time - start) / (end - start), pieces[place]
        powers = torch.stack([theta ** (j + 1) for j in range(tableau.dense.shape[1])])
        beta = torch.from_numpy(tableau.dense) @ powers
        outputs.append(y_start + (end - start) * sum(b * k for b, k in zip(beta, K, strict=True)))
    outputs[-1] = y
    return torch.cat(outputs)


def replay(field: Field, method: str, y0: Tensor, t: Tensor, solution: Solution) -> Tensor:
    """The solve's states (n, m, d) as a plain torch computation with the solve's accepted steps."""
    states = []
    for i, ends in enumerate(accepted_ends(solution)):
        own = t if t.dim() == 1 else t[i]
        kept = own[: int((~own.isnan()).sum())]
        path = replay_row(field, METHODS[method], y0[i : i + 1], kept, ends)
        states.append(torch.cat([path, path.new_full((len(own) - len(kept), y0.shape[1]), NAN)]))
    return torch.stack(states)


def assert_replayed(
    field: nn.Module, y0: Tensor, t: Tensor, method: str, close: float = 1e-11, **options: Any
) -> Solution:
    """The solve and its gradients to states, times and parameters are those of the replay."""
    inputs = [y0.clone().requires_grad_(), t.clone().requires_grad_(), *field.parameters()]
    traced = solve(field, inputs[0], inputs[1], method=method, dense_output=True, **options)
    assert traced.success
    again = replay(field, method, inputs[0], inputs[1], traced)
    torch.testing.assert_close(traced.y, again, rtol=close, atol=0.1 * close, equal_nan=True)
    expected = gradients_of(loss_of(again), inputs)
    assert_all_close(gradients_of(loss_of(traced.y), inputs), expected, 100 * close)
    plain = solve(field, inputs[0], inputs[1], method=method, **options)
    assert_all_close(gradients_of(loss_of(plain.y), inputs), expected, 100 * close)
    return traced


def coarse(method: str) -> dict[str, float]:
    """Options with which a solve takes a handful of steps; an implicit method solves for its stages all the same."""
    if method in IMPLICIT:
        return {"rtol": 1e-10, "atol": 1e-10, "first_step": 0.25, "min_step": 0.25}
    return {"rtol": 1e-3, "atol": 1e-4} if METHODS[method].adaptive else {"step_size": 0.3}


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, 0.45, -0.2), (0.2, 0.2, 0.5, 0.5, 0.9)])
def test_discrete_gradients_are_those_of_the_accepted_steps(method: str, control: str, t: tuple[float, ...]) -> None:
    assert_replayed(mlp_field(), random_states(1, 3), times(*t), method, step_control=control, **coarse(method))


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [(0.0, 1.0, 1.0), (0.0, 0.4, 1.0, 1.0, 1.0)])
def test_equal_last_times_share_the_gradient_of_the_end(method: str, control: str, t: tuple[float, ...]) -> None:
    assert_replayed(mlp_field(), random_states(1, 3), times(*t), method, step_control=control, **coarse(method))


@on_all_methods
def test_discrete_gradients_reach_times_of_each_row(method: str) -> None:
    t = rows((0.0, 0.3, 0.7, 1.3), (1.0, 0.8, 0.1, -0.5), (0.4, 0.6, NAN, NAN), (0.2, 0.2, 0.9, NAN))
    assert_replayed(mlp_field(), random_states(2, 4), t, method, **coarse(method))


@on_all_methods
@with_both_controls
def test_rejected_steps_leave_no_trace_in_the_gradient(method: str, control: str) -> None:
    options = {"rtol": 3e-3, "atol": 1e-3, "first_step": 0.9} if METHODS[method].adaptive else {"step_size": 0.1}
    if method in IMPLICIT:
        # As close as its stages are solved.
        options |= {"rtol": 1e-5, "atol": 1e-5, "close": 1e-6}
    solution = assert_replayed(
        Wiggle(), random_states(3, 3), times(0.0, 0.2, 0.5), method, step_control=control, **options
    )
    if METHODS[method].adaptive:
        assert bool((solution.n_rejected > 0).all())


@pytest.mark.parametrize("method", ADAPTIVE)
def test_rejected_steps_of_one_row_leave_no_trace_in_another(method: str) -> None:
    y0, t = random_states(4, 2), rows((0.0, 0.005, 0.01), (0.0, 0.4, 0.6))
    options = {"rtol": 1e-5, "atol": 1e-5, "close": 1e-6} if method in IMPLICIT else {"rtol": 1e-3, "atol": 1e-4}
    solution = assert_replayed(Wiggle(), y0, t, method, first_step=0.6, **options)
    assert len(set(solution.n_rejected.tolist())) > 1


# --- against another package ---


def reference_settings(method: str) -> tuple[dict[str, float], float]:
    """Options of a solve, and how close its gradients then come to the true ones."""
    tableau = METHODS[method]
    if not tableau.adaptive:
        return {"step_size": 0.02}, 10 * 0.02**tableau.order
    tolerance = {2: 1e-4, 3: 1e-7}.get(tableau.order, 1e-10)
    return {"rtol": tolerance, "atol": tolerance}, 600 * tolerance


@pytest.fixture(scope="module")
def reference_gradients() -> Callable[[], list[Tensor]]:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, y0, t = mlp_field(), random_states(5, 3).requires_grad_(), times(0.0, 0.4, 1.0).requires_grad_()

    def shared_time(time: Tensor, y: Tensor) -> Tensor:
        return field(time.expand(len(y), 1), y)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, time: Tensor, y: Tensor) -> Tensor:
            return shared_time(time, y)

    options = {"rtol": 1e-10, "atol": 1e-10, "method": "dopri5"}
    direct = torchdiffeq.odeint(shared_time, y0, t, **options).transpose(0, 1)
    to_states = gradients_of(loss_of(direct), [y0, *field.parameters()])
    # Only torchdiffeq's adjoint gives the gradients of the first and the last time.
    adjoint = torchdiffeq.odeint_adjoint(Shared(), y0, t, **options).transpose(0, 1)
    (to_times,) = gradients_of(loss_of(adjoint), [t])
    return lambda: [to_states[0], to_times, *to_states[1:]]


@on_all_methods
@with_both_controls
@with_both_gradients
def test_gradients_come_close_to_those_of_torchdiffeq(
    method: str, control: str, gradient: str, reference_gradients: Callable[[], list[Tensor]]
) -> None:
    options, tolerance = reference_settings(method)
    if gradient == "reversible":
        if METHODS[method].implicit:
            pytest.skip("refused by name")
        tolerance *= 3  # its steps err more
    field, y0, t = mlp_field(), random_states(5, 3).requires_grad_(), times(0.0, 0.4, 1.0).requires_grad_()
    solution = solve(field, y0, t, method=method, step_control=control, gradient=gradient, **options)
    assert_all_close(gradients_of(loss_of(solution.y), [y0, t, *field.parameters()]), reference_gradients(), tolerance)


@pytest.mark.parametrize("method", [name for name in ADAPTIVE if METHODS[name].order >= 3])
@pytest.mark.parametrize("t", [times(0.0, 1.0), rows((0.0, 0.3, 1.0), (1.0, 0.2, NAN), (0.5, 0.5, 0.6))])
def test_adjoint_equals_discrete_at_tight_tolerances(method: str, t: Tensor) -> None:
    tolerance = 1e-7 if METHODS[method].order == 3 else 1e-11
    field, found = mlp_field(seed=1), []
    for gradient in ("discrete", "adjoint"):
        inputs = [random_states(6, 3).requires_grad_(), t.clone().requires_grad_(), *field.parameters()]
        solution = solve(field, *inputs[:2], method=method, gradient=gradient, rtol=tolerance, atol=tolerance)
        found.append(gradients_of(loss_of(solution.y), inputs))
    assert_all_close(found[0], found[1], 100 * tolerance)


def test_the_adjoint_never_visits_states_that_padding_stands_for() -> None:
    # 1 / y has no value at 0.
    t, found = rows((0.0, 0.5, NAN), (0.0, 0.5, 1.0)), []
    for gradient in ("discrete", "adjoint"):
        y0 = column(1.0, 2.0).requires_grad_()
        solution = solve(lambda t, y: 1 / y, y0, t, gradient=gradient, rtol=1e-9, atol=1e-9)
        found.append(gradients_of(loss_of(solution.y), [y0]))
    assert_all_close(found[0], found[1], 1e-6)


# --- against finite differences ---


def held_steps(method: str) -> dict[str, float]:
    """Two steps, of 0.4 (or 0.5) and what is left of 1, whatever the states and parameters are."""
    if method in IMPLICIT:
        return {"first_step": 0.5, "min_step": 0.5, "rtol": 0.0, "atol": 1e-12}
    return {"first_step": 0.4, "rtol": 0.0, "atol": 1e3} if METHODS[method].adaptive else {"step_size": 0.4}


@on_all_methods
@with_both_controls
def test_discrete_gradients_to_states_and_parameters_pass_gradcheck(method: str, control: str) -> None:
    field = mlp_field(hidden_layer_sizes=(2,))
    y0 = random_states(7, 2).requires_grad_()

    def states(y0: Tensor, *_: Tensor) -> Tensor:
        return solve(field, y0, [0.0, 0.3, 1.0], method=method, step_control=control, **held_steps(method)).y

    assert torch.autograd.gradcheck(states, (y0, *field.parameters()))


@on_all_methods
@with_both_controls
def test_gradients_to_the_times_of_a_single_step_pass_gradcheck(method: str, control: str) -> None:
    field, y0 = mlp_field(), random_states(8, 2)
    options = {"first_step": 5.0, "rtol": 0.0, "atol": 1e3} if METHODS[method].adaptive else {"step_size": 5.0}
    if method in IMPLICIT:
        options |= {"min_step": 5.0, "atol": 1e-12}

    def states(t: Tensor) -> Tensor:
        return solve(field, y0, t, method=method, step_control=control, **options).y

    for t in (times(0.1, 0.8), times(0.1, 0.3, 0.8), times(0.9, 0.5, 0.3)):
        assert torch.autograd.gradcheck(states, (t.requires_grad_(),))


@pytest.mark.parametrize("method", ADAPTIVE)
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.3, 1.0]])
def test_error_estimate_passes_gradcheck(method: str, control: str, t: list[float]) -> None:
    # rtol = 0 makes the unit of the error a constant.
    field = mlp_field(hidden_layer_sizes=(2,))
    y0 = random_states(9, 2).requires_grad_()

    def estimate(y0: Tensor, *_: Tensor) -> Tensor:
        options = held_steps(method)
        solution = solve(field, y0, t, method=method, step_control=control, error_estimate=True, **options)
        assert solution.n_steps.tolist() == [2, 2] and solution.error_estimate is not None
        return solution.error_estimate * scale

    scale = 1.0
    scale = 1 / float(estimate(y0).detach().mean())
    assert torch.autograd.gradcheck(estimate, (y0, *field.parameters()), eps=1e-3, atol=1e-4, rtol=1e-3)


@with_both_controls
def test_states_and_their_error_estimate_are_differentiated_together(control: str) -> None:
    field, y0 = mlp_field(), random_states(9, 3).requires_grad_()
    inputs = [y0, *field.parameters()]
    parts = []
    for chosen in ("states", "errors", "both"):
        solution = solve(field, y0, [0.0, 0.3, 1.0], step_control=control, error_estimate=True)
        assert solution.error_estimate is not None
        terms = {"states": loss_of(solution.y), "errors": 1e3 * solution.error_estimate.sum()}
        parts.append(gradients_of(sum(terms.values(), times(0.0)) if chosen == "both" else terms[chosen], inputs))
    states, errors, both = parts
    assert_all_close(both, [a + b for a, b in zip(states, errors, strict=True)], 1e-9)
    assert max(float(g.abs().max()) for g in errors) > 0


# --- hand-written derivatives ---


@with_both_controls
@with_both_gradients
@pytest.mark.parametrize("activation", ["tanh", "silu", "softplus", "logistic", "identity"])
@pytest.mark.parametrize("time_dependent", [True, False])
def test_hand_written_derivatives_give_the_gradients_of_autograd(
    control: str, gradient: str, activation: str, time_dependent: bool
) -> None:
    field = mlp_field(2, 2, (5, 4), activation, time_dependent)
    y0, t = random_states(10, 3).requires_grad_(), times(0.0, 0.4, 1.0).requires_grad_()
    found = []
    for own in (field, Plain(field)):
        solution = solve(own, y0, t, step_control=control, gradient=gradient, rtol=1e-5)
        found.append(gradients_of(loss_of(solution.y), [y0, t, *field.parameters()]))
    assert_all_close(found[0], found[1], 1e-10)


# --- rows that fail ---


class Partly(nn.Module):
    """An MLP, but for rows whose first component is above 50."""

    def __init__(self, bad: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.bad = mlp_field(3), bad

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value, chosen = self.inner(t, y), torch.nonzero(y[:, 0] > 50).view(-1)
        # By index: the gradient of torch.where would multiply 0 by NaN in the other rows.
        return value.index_put((chosen,), self.bad(t.expand(len(y), 1)[chosen], y[chosen]))


BAD_ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[float, float]]] = {
    "nan state of a network": (lambda: mlp_field(3), (NAN, 1.0)),
    "nan state": (lambda: Plain(mlp_field(3)), (1.0, NAN)),
    "infinite state": (lambda: mlp_field(3), (1.0, -math.inf)),
    "nan field": (lambda: Partly(lambda t, y: y * NAN), (100.0, 1.0)),
    "infinite field": (lambda: Partly(lambda t, y: y * math.inf), (100.0, 1.0)),
    "late nan": (lambda: Partly(lambda t, y: torch.where(t > 0.6, NAN, y)), (100.0, 1.0)),
    "blow-up": (lambda: Partly(lambda t, y: y * y), (100.0, 1.0)),
    "restless": (lambda: Partly(lambda t, y: 1e4 * torch.cos(1e4 * t) + 0 * y), (100.0, 1.0)),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@with_both_gradients
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.5, 1.0]])
def test_a_failed_row_has_no_gradient_and_leaves_that_of_the_others(bad: str, gradient: str, t: list[float]) -> None:
    make, state = BAD_ROWS[bad]
    field, good = make(), random_states(11, 4).requires_grad_()
    mixed = torch.cat([good.detach()[:2], rows(state), good.detach()[2:]]).requires_grad_()
    others = [0, 1, 3, 4]
    options = {"gradient": gradient, "max_num_steps": 60}
    parameters = list(field.parameters())
    alone = gradients_of(loss_of(solve(field, good, t, **options).y), [good, *parameters])
    solution = solve(field, mixed, t, **options)
    assert int(solution.status[2]) != Status.SUCCESS
    beside = gradients_of(loss_of(solution.y[others]), [mixed, *parameters])
    assert_all_close([beside[0][others], *beside[1:]], alone, 1e-11)
    assert torch.equal(beside[0][2], torch.zeros(2, dtype=torch.float64))


@with_both_gradients
def test_the_part_that_a_failed_row_reached_keeps_its_gradient(gradient: str) -> None:
    def late(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((t > 0.6) & (y > 5), NAN, -y)

    y0 = column(1.0, 20.0).requires_grad_()
    solution = solve(late, y0, [0.0, 0.5, 1.0], gradient=gradient, rtol=1e-8, atol=1e-8)
    assert solution.status.tolist() == [0, Status.NON_FINITE]
    (found,) = gradients_of(solution.y.nansum(), [y0])
    torch.testing.assert_close(found, column(1 + math.exp(-0.5) + math.exp(-1), 1 + math.exp(-0.5)))


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_failed_row_leaves_the_gradient_of_the_others_error_estimate(bad: str) -> None:
    make, state = BAD_ROWS[bad]
    field, good = make(), random_states(11, 4)
    mixed = torch.cat([good[:2], rows(state), good[2:]])
    others, parameters = [0, 1, 3, 4], list(field.parameters())
    options = {"error_estimate": True, "max_num_steps": 60}
    alone = solve(field, good, [0.0, 1.0], **options).error_estimate
    beside = solve(field, mixed, [0.0, 1.0], **options).error_estimate
    assert alone is not None and beside is not None
    assert_all_close(gradients_of(1e4 * beside[others].sum(), parameters), gradients_of(1e4 * alone.sum(), parameters))


@with_both_gradients
@with_both_controls
@pytest.mark.parametrize("t", [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]])
def test_the_gradient_through_an_interval_without_length_is_the_identity(
    gradient: str, control: str, t: list[float]
) -> None:
    field, y0 = mlp_field(), random_states(12, 3).requires_grad_()
    solution = solve(field, y0, t, method="rk4", step_control=control, gradient=gradient)
    found = gradients_of(solution.y.sum(), [y0, *field.parameters()])
    expected = [torch.full_like(y0, len(t)), *(torch.zeros_like(p) for p in field.parameters())]
    assert_all_close(found, expected, 1e-14)


# --- what autograd allows ---


@with_both_controls
@with_both_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_two_forwards_before_two_backwards(control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]) -> None:
    field = wrap(mlp_field())
    first, second = random_states(13, 3).requires_grad_(), random_states(14, 3).requires_grad_()

    def run(y0: Tensor) -> Tensor:
        return loss_of(solve(field, y0, [0.0, 0.4, 1.0], step_control=control, gradient=gradient).y)

    one_by_one = [gradients_of(run(y0), [y0, *field.parameters()]) for y0 in (first, second)]
    losses = [run(first), run(second)]
    for i in (0, 1):
        assert_all_close(
            gradients_of(losses[i], [(first, second)[i], *field.parameters()]), one_by_one[i], tolerance=0.0
        )


@with_both_controls
@with_both_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_a_retained_graph_gives_the_same_gradient_again(
    control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]
) -> None:
    field, y0 = wrap(mlp_field()), random_states(13, 3).requires_grad_()
    solution = solve(field, y0, [0.0, 0.4, 1.0], step_control=control, gradient=gradient)
    inputs = [y0, *field.parameters()]
    first, second = (torch.autograd.grad(loss_of(solution.y), inputs, retain_graph=True) for _ in range(2))
    assert_all_close(first, second, tolerance=0.0)


@with_both_controls
@with_both_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_parameters_changed_in_place_before_backward_are_noticed(
    control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]
) -> None:
    field = wrap(mlp_field())
    solution = solve(field, random_states(13, 3), [0.0, 0.4, 1.0], step_control=control, gradient=gradient)
    with torch.no_grad():
        next(iter(field.parameters())).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.y.sum().backward()


def gradients_after(change: Callable[[Tensor, Tensor], object], gradient: str, control: str) -> list[Tensor] | None:
    """Gradients to the parameters after states were changed in place; None where torch noticed the change."""
    field, y0 = mlp_field(), random_states(13, 3)
    solution = solve(field, y0, [0.0, 1.0], step_control=control, gradient=gradient)
    loss = solution.y1.sum()
    change(y0, solution.y)
    try:
        return gradients_of(loss, list(field.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@with_both_controls
@with_both_gradients
def test_states_changed_in_place_before_backward_never_change_the_gradient(control: str, gradient: str) -> None:
    expected = gradients_after(lambda y0, y: None, gradient, control)
    assert expected is not None
    changes: list[Callable[[Tensor, Tensor], object]] = [
        lambda y0, y: y0.mul_(3),
        lambda y0, y: y.detach().mul_(3),
    ]
    for change in changes:
        found = gradients_after(change, gradient, control)
        if found is not None:
            assert_all_close(found, expected, 1e-12)


@with_both_gradients
def test_only_what_requires_grad_gets_one(gradient: str) -> None:
    field, y0 = mlp_field(), random_states(13, 3)
    field.layers[0].requires_grad_(False)
    solve(field, y0, [0.0, 1.0], gradient=gradient).y.sum().backward()
    assert y0.grad is None
    assert [p.grad is not None for p in field.parameters()] == [False, False, True, True]
    frozen = mlp_field().requires_grad_(False)
    y0.requires_grad_()
    solve(frozen, y0, [0.0, 1.0], gradient=gradient).y.sum().backward()
    assert y0.grad is not None
    assert all(p.grad is None for p in frozen.parameters())


@with_both_controls
@with_both_gradients
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
def test_gradients_come_in_the_dtype_of_their_inputs(control: str, gradient: str, t_dtype: torch.dtype) -> None:
    field = MLPField(2, (4,), generator=torch.Generator().manual_seed(0))
    y0, t = torch.ones(3, 2, requires_grad=True), torch.tensor([0.0, 0.4, 1.0], dtype=t_dtype, requires_grad=True)
    solve(field, y0, t, step_control=control, gradient=gradient).y.sum().backward()
    assert y0.grad is not None and y0.grad.dtype == torch.float32
    assert t.grad is not None and t.grad.dtype == t_dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in field.parameters())


# --- memory ---


@pytest.fixture
def fresh_heap() -> Iterator[None]:
    """Hides all older objects from the garbage collector, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_bytes() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def bytes_held(gradient: str, control: str, t: Tensor, tolerance: float) -> tuple[int, int]:
    """What a solve with gradients holds before its backward besides the steps' lengths, and its number of steps."""
    field, y0 = mlp_field(), random_states(15, 64).requires_grad_()
    before = living_bytes()
    solution = solve(field, y0, t, gradient=gradient, step_control=control, rtol=tolerance, atol=tolerance)
    assert solution._knots is not None
    return living_bytes() - before - solution._knots.nbytes, int(solution.n_steps.max())


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
@pytest.mark.parametrize("t", [times(0.0, 2.0), times(0.0, 1.0, 2.0), times(0.0, 2.0).requires_grad_()])
@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")
def test_the_memory_of_going_back_does_not_grow_with_the_steps(control: str, t: Tensor, gradient: str) -> None:
    few, few_steps = bytes_held(gradient, control, t, 1e-2)
    many, many_steps = bytes_held(gradient, control, t, 1e-10)
    assert many_steps > 5 * few_steps
    assert many < 1.5 * few


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
def test_the_memory_of_discrete_gradients_grows_with_the_steps(control: str) -> None:
    # The measure of the test above sees what is held.
    few, few_steps = bytes_held("discrete", control, times(0.0, 2.0), 1e-2)
    many, many_steps = bytes_held("discrete", control, times(0.0, 2.0), 1e-10)
    assert many - few >= (many_steps - few_steps) * 64 * 2 * 8


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
@with_both_gradients
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")
def test_nothing_outlives_a_solution(control: str, gradient: str) -> None:
    field, y0 = mlp_field(), random_states(15, 64)

    def use(t: list[float], backward: bool) -> None:
        y = solve(field, y0, t, gradient=gradient, step_control=control).y
        if backward:
            torch.autograd.grad(y.sum(), list(field.parameters()))

    use([0.0, 2.0], backward=True)
    before = living_bytes()
    for t in ([0.0, 2.0], [0.0, 1.0, 2.0]):
        for backward in (False, True):
            use(t, backward)
    assert living_bytes() - before < y0.numel() * 8


class Counted(MLPField):
    """Counts the evaluations whose tapes are kept."""

    n_linearized = 0

    def linearize(self, t: Tensor, y: Tensor) -> Any:
        self.n_linearized += 1
        return super().linearize(t, y)


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_small_memory_budget_ends_the_keeping_of_tapes(method: str) -> None:
    field = Counted(2, (4,), generator=torch.Generator().manual_seed(0)).double()
    y0, options = random_states(16, 3), coarse(method) | {"first_step": 0.1}
    kept, found, n_steps = {}, {}, 0
    for budget in (0, 1, 2**28):
        field.n_linearized = 0
        solution = solve(field, y0, [0.0, 2.0], method=method, step_control="batch", memory_budget=budget, **options)
        kept[budget], n_steps = field.n_linearized, int(solution.n_steps[0])
        found[budget] = gradients_of(loss_of(solution.y), list(field.parameters()))
    assert n_steps > 2
    n_stages = METHODS[method].n_stages
    assert kept[0] == 0
    assert 0 < kept[1] <= n_stages + int(solution.n_rejected[0]) * n_stages
    assert kept[2**28] >= n_steps * (n_stages - 1)
    assert_all_close(found[0], found[2**28], 1e-12)
    assert_all_close(found[1], found[2**28], 1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
@with_both_controls
def test_rows_whose_times_are_all_the_same_move_with_each_of_them_alone(gradient: str, control: str) -> None:
    field, y0 = mlp_field(), random_states(3, 3)
    t = times(0.5, 0.5, 0.5) if control == "batch" else rows((0.5, 0.5, 0.5), (0.5, 0.5, NAN), (0.5, 0.7, 1.0))
    t.requires_grad_()
    g = torch.linspace(-1, 2, 3 * 3 * y0.shape[1], dtype=torch.float64).view(3, 3, -1)
    solution = solve(field, y0, t, gradient=gradient, step_control=control, rtol=1e-9, atol=1e-9)
    (found,) = gradients_of((torch.nan_to_num(solution.y) * g).sum(), [t])
    slope = field(torch.full((3, 1), 0.5, dtype=torch.float64), y0).detach()
    alone = torch.einsum("nmd,nd->nm", g[:, 1:], slope)
    if control == "batch":
        torch.testing.assert_close(found, torch.cat([-alone.sum().view(1), alone.sum(dim=0)]))
        return
    torch.testing.assert_close(found[0], torch.cat([-alone[0].sum().view(1), alone[0]]))
    torch.testing.assert_close(found[1], torch.stack([-alone[1, 0], alone[1, 0], times(0.0)[0]]))
