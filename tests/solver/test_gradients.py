"""Gradients of a solve: exact for "discrete", within the tolerance for "adjoint", and harmless in every failure."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skode.solver import METHODS, Status, solve
from tests.problems import Plain, column, mlp_field, random_states, rows, times
from tests.solver.gradient_helpers import assert_all_close, assert_replayed, coarse, gradients_of, loss_of

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_all_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])


class Wiggle(nn.Module):
    """Stiff and time-dependent: adaptive steps are rejected on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(times(6.0))
        self.mix = nn.Parameter(rows((0.2, -1.0), (1.0, 0.1)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.mix - self.rate * torch.tanh(y - torch.cos(3 * t)) * (1 + 4 * torch.sin(9 * t) ** 2)


# --- of the accepted steps ---


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
    if METHODS[method].implicit:
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
    options = {"rtol": 1e-5, "atol": 1e-5, "close": 1e-6} if METHODS[method].implicit else {"rtol": 1e-3, "atol": 1e-4}
    solution = assert_replayed(Wiggle(), y0, t, method, first_step=0.6, **options)
    assert len(set(solution.n_rejected.tolist())) > 1


@with_all_gradients
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
@with_all_gradients
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


# --- hand-written derivatives ---


@with_both_controls
@with_all_gradients
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
@with_all_gradients
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


@with_all_gradients
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


@with_all_gradients
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
