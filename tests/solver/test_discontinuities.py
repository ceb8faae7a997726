"""Fields that jump, and steps that must end at given times."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from math import log2
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.solver import METHODS, Status, solve
from tests.problems import Field, Recorded, column, mlp_field, random_states, rows, times

NAN = math.nan
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
JUMP = 0.37

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])


# Whether the field has its value before or after the jump at the time of the jump itself must not matter.
SIDES: dict[str, Callable[[Tensor, Tensor | float], Tensor]] = {
    "open": lambda t, jump: t < jump,
    "closed": lambda t, jump: t <= jump,
}
with_both_sides = pytest.mark.parametrize("side", SIDES)


def relaxation(side: str, jump: Tensor | float = JUMP) -> Field:
    """y' = 1 - y before the jump and y' = -2 - y after it."""
    return lambda t, y: torch.where(SIDES[side](t, jump), 1.0, -2.0) - y


def relaxed(y0: Tensor, t: Tensor, jump: Tensor | float = JUMP, start: float = 0.0) -> Tensor:
    """Its solution (n, m) for y0 (n, 1) and ascending t (m,)."""
    jump = torch.as_tensor(jump, dtype=torch.float64)
    before = 1 + (y0 - 1) * torch.exp(-(t - start))
    at_jump = 1 + (y0 - 1) * torch.exp(-(jump - start))
    return torch.where(t < jump, before, -2 + (at_jump + 2) * torch.exp(-(t - jump)))


def step_ends(solution: Any, row: int = 0) -> list[float]:
    return [t for t in solution.steps.t[row].tolist() if not math.isnan(t)]


# --- accuracy ---


@with_both_sides
@with_both_controls
@pytest.mark.parametrize(("method", "order"), [("midpoint", 2), ("rk4", 4), ("rk4_38", 4)])
def test_the_order_of_fixed_steps_is_recovered_across_a_jump(side: str, control: str, method: str, order: int) -> None:
    y0, t = column(0.3, 2.0), times(0.0, 1.0)
    exact = relaxed(y0, t)[:, -1:]

    def errors(jumps: list[float] | None) -> list[float]:
        found = []
        for h in (0.1, 0.05, 0.025):
            y1 = solve(relaxation(side), y0, t, method=method, step_control=control, step_size=h, jump_times=jumps).y1
            found.append(float((y1 - exact).abs().max()))
        return found

    with_jump, without = errors([JUMP]), errors(None)
    assert min(log2(a / b) for a, b in pairwise(with_jump)) > order - 0.4
    assert with_jump[-1] < 0.05 * without[-1]


@with_both_sides
@with_both_controls
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jump_that_is_told_costs_no_accuracy(side: str, control: str, method: str, dtype: torch.dtype) -> None:
    y0, t = column(0.3, 2.0).to(dtype), times(0.0, 0.2, JUMP, 0.9)
    rtol = 1e-4 if dtype == torch.float32 else 1e-5
    options = {"method": method, "step_control": control, "rtol": rtol, "atol": rtol}
    told = solve(relaxation(side), y0, t, jump_times=[JUMP], **options)
    assert told.success
    exact = relaxed(y0.double(), t, torch.tensor(JUMP, dtype=dtype).double())
    assert float((told.y[..., 0] - exact).abs().max()) < 100 * rtol


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])
def test_a_jump_that_is_told_costs_no_search_for_it(control: str, method: str) -> None:
    options = {"method": method, "step_control": control, **TIGHT}
    told, surprised = (
        solve(relaxation("open"), column(0.3, 2.0), [0.0, 1.0], jump_times=jumps, **options) for jumps in ([JUMP], None)
    )
    # Hitting the jump from in front takes ten orders of magnitude of ever smaller steps.
    assert int(told.n_rejected.max()) <= 4
    assert int(surprised.n_rejected.min()) >= 2 * int(told.n_rejected.max()) + 4


@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3", "rk4"])
def test_a_piecewise_constant_field_is_solved_to_the_last_bits(method: str) -> None:
    # Between its jumps the solution is a straight line: all that is left is a stage on the wrong side.
    jumps, levels = [0.1, 0.25, 0.7, 0.95], [1.0, -30.0, 4.0, 100.0, 7.0]

    def stairs(t: Tensor, y: Tensor) -> Tensor:
        value = torch.full_like(y, levels[0])
        for jump, level in zip(jumps, levels[1:], strict=True):
            value = torch.where(t < jump, value, level)
        return value

    solution = solve(stairs, column(0.0, 1.0), [0.0, 0.5, 1.0], method=method, jump_times=jumps)
    knots = [0.0, *jumps, 1.0]
    total = sum(level * (b - a) for level, (a, b) in zip(levels, pairwise(knots), strict=True))
    torch.testing.assert_close(solution.y1, column(total, 1 + total), rtol=1e-13, atol=0)


def test_a_jump_of_the_field_scales_with_the_tolerance() -> None:
    errors = []
    for rtol in (1e-4, 1e-7, 1e-10):
        solution = solve(relaxation("open"), column(2.0), [0.0, 1.0], rtol=rtol, atol=rtol, jump_times=[JUMP])
        errors.append(float((solution.y1 - relaxed(column(2.0), times(0.0, 1.0))[:, -1:]).abs()))
    assert errors[2] < 0.05 * errors[1] < 0.0025 * errors[0]


# --- where the field is called and steps end ---


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [[0.0, 0.3, 1.0], [1.0, 0.9, 0.0]])
def test_the_field_is_called_on_both_sides_of_a_jump_and_never_at_it(
    method: str, control: str, dtype: torch.dtype, t: list[float]
) -> None:
    field = Recorded(mlp_field().to(dtype))
    y0 = random_states(1, 2).to(dtype)
    solution = solve(field, y0, t, method=method, step_control=control, jump_times=[JUMP, 0.8])
    called = torch.cat([time[:2].expand(2, 1) for time in field.times], dim=1)
    for jump in (JUMP, 0.8):
        place = torch.tensor(jump, dtype=dtype)
        assert not bool((called == place).any())
        before, after = (torch.nextafter(place, torch.tensor(float(end), dtype=dtype)) for end in (t[0], t[-1]))
        # The first stage of the next step, and of most methods the last one of the step before, are its neighbours.
        assert bool((called == after).any(dim=1).all())
        if METHODS[method].closed.c[-1] == 1 and METHODS[method].fsal:
            assert bool((called == before).any(dim=1).all())
        assert all(jump in step_ends(solution, row) for row in (0, 1))


@on_all_methods
@with_both_controls
def test_steps_end_at_step_times_and_the_field_stays_smooth_there(method: str, control: str) -> None:
    field, y0 = mlp_field(), random_states(2, 3)
    marks = [0.123, 0.124, 0.567]
    options = {"method": method, "step_control": control}
    solution = solve(field, y0, [0.0, 0.6, 1.0], step_times=marks, **options)
    plain = solve(field, y0, [0.0, 0.6, 1.0], **options)
    for row in range(3):
        assert set(marks) < set(step_ends(solution, row))
        assert not set(marks) & set(step_ends(plain, row))
    torch.testing.assert_close(solution.y, plain.y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["jump_times", "step_times"])
def test_rows_have_their_own(kind: str) -> None:
    own = rows((0.2, 0.7), (0.5, 5.0), (-1.0, 0.9), (0.4, 0.1))
    t = rows((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    solution = solve(mlp_field(), random_states(3, 4), t, **{kind: own})
    inside = [{0.2, 0.7}, {0.5}, {0.9}, {0.4, 0.1}]
    everywhere = set(own.flatten().tolist())
    assert [set(step_ends(solution, row)) & everywhere for row in range(4)] == inside


@with_both_sides
def test_jumps_of_each_row_give_each_row_its_solution(side: str) -> None:
    jumps, y0, t = column(0.2, 0.5, 0.9, 7.0), column(0.3, 1.0, 2.0, -1.0), times(0.0, 0.4, 1.0)
    solution = solve(relaxation(side, jumps), y0, t, jump_times=jumps, **TIGHT)
    torch.testing.assert_close(solution.y[..., 0], relaxed(y0, t, jumps), rtol=1e-7, atol=1e-7)
    assert int(solution.n_rejected.max()) <= 4


def test_rows_beside_each_other_do_not_share_their_jumps() -> None:
    jumps, y0 = column(0.2, 0.5, 0.9), random_states(4, 3)
    together = solve(mlp_field(), y0, [0.0, 1.0], jump_times=jumps)
    for i in range(3):
        alone = solve(mlp_field(), y0[i : i + 1], [0.0, 1.0], jump_times=jumps[i : i + 1])
        torch.testing.assert_close(alone.y[0], together.y[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(times(*step_ends(alone)), times(*step_ends(together, i)), rtol=1e-9, atol=0)


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("kind", ["jump_times", "step_times"])
def test_those_outside_of_the_interval_are_ignored(method: str, control: str, kind: str) -> None:
    field, y0, t = mlp_field(), random_states(5, 3), [0.0, 0.4, 1.0]
    options: dict[str, Any] = {"method": method, "step_control": control}
    plain, far = (solve(field, y0, t, **options, **extra) for extra in ({}, {kind: [-3.0, -1e-9, 1.0 + 1e-9, 2.0]}))
    assert torch.equal(plain.y, far.y)
    assert torch.equal(plain.n_evals, far.n_evals)


@on_all_methods
@with_both_controls
def test_jumps_at_the_ends_belong_to_the_other_side(method: str, control: str) -> None:
    # The field is absurd at t0 and before, and at t1 and after: only what lies between counts.
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((t <= 0) | (t >= 1), 1e6, 2.0) + 0 * y

    solution = solve(field, column(0.0, 1.0), [0.0, 1.0], method=method, step_control=control, jump_times=[0.0, 1.0])
    assert solution.success
    torch.testing.assert_close(solution.y1, column(2.0, 3.0), rtol=1e-12, atol=0)


@with_both_sides
@with_both_controls
def test_descending_rows_cross_a_jump(side: str, control: str) -> None:
    y0, t = column(0.3, 2.0), times(1.0, 0.6, 0.1)
    ahead = relaxed(y0, times(0.1, 0.6, 1.0), start=0.1)
    field = relaxation(side)
    back = solve(field, ahead[:, -1:], t, step_control=control, jump_times=[JUMP], **TIGHT)
    torch.testing.assert_close(back.y[..., 0], ahead.flip(1), rtol=1e-7, atol=1e-7)
    assert int(back.n_rejected.max()) <= 4


def test_a_jump_between_finite_and_nan_ends_nothing_before_it() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < JUMP, -y, NAN)

    solution = solve(field, column(1.0), [0.0, 0.2, JUMP, 1.0], jump_times=[JUMP], **TIGHT)
    assert solution.status.tolist() == [Status.NON_FINITE]
    torch.testing.assert_close(solution.t_reached, times(JUMP))
    torch.testing.assert_close(solution.y[0, :3, 0], torch.exp(-times(0.0, 0.2, JUMP)))


# --- gradients ---


class Switched(nn.Module):
    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.before, self.after = nn.Parameter(times(1.0)), nn.Parameter(times(-2.0))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(SIDES[self.side](t, JUMP), self.before, self.after) - y


@with_both_gradients
@with_both_controls
@with_both_sides
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])
def test_gradients_across_a_jump_are_those_of_the_solution(gradient: str, control: str, side: str, method: str) -> None:
    field, y0 = Switched(side), column(0.3, 2.0).requires_grad_()
    t = times(0.0, 0.25, 0.8, 1.0).requires_grad_()
    solution = solve(
        field,
        y0,
        t,
        method=method,
        gradient=gradient,
        step_control=control,
        jump_times=[JUMP],
        rtol=1e-8,
        atol=1e-8,
    )
    before = field.before + (y0 - field.before) * torch.exp(-(t - t[0]))
    at_jump = field.before + (y0 - field.before) * torch.exp(-(JUMP - t[0]))
    exact = torch.where(t < JUMP, before, field.after + (at_jump - field.after) * torch.exp(-(t - JUMP)))
    weights = torch.linspace(-1, 2, 8, dtype=torch.float64).view(2, 4)
    inputs = [y0, t, field.before, field.after]
    found = torch.autograd.grad((weights * solution.y[..., 0]).sum(), inputs)
    for own, other in zip(found, torch.autograd.grad((weights * exact).sum(), inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["jump_times", "step_times"])
def test_replayed_steps_with_jumps_are_the_same_and_pass_gradcheck(kind: str) -> None:
    field, y0, extra = mlp_field(hidden_layer_sizes=(2,)), random_states(6, 2).requires_grad_(), {kind: [JUMP]}
    t = times(0.0, 0.5, 1.0).requires_grad_()
    first = solve(field, y0, t, **extra)

    def again(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return solve(field, y0, t, steps=first.steps, **extra).y

    assert torch.equal(again(y0, t), first.y)
    assert torch.autograd.gradcheck(again, (y0, t, *field.parameters()))
