"""Rows that fail: what is told of them, what is kept, and how the rows beside them go on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.solver import METHODS, Solution, Status, solve
from tests.problems import Field, column, decay, mlp_field, random_states, rows, times, tracking

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def late_nan(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t > 0.5, torch.nan, -y)


def blow_up(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def restless(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(400 * t) + 0 * y


# field, state at t = 0, status, and before which time the row must stop
FAILURES: dict[str, tuple[Field, float, set[Status], float]] = {
    "nan field": (late_nan, 1.0, {Status.NON_FINITE}, 0.75),
    "blow-up": (blow_up, 2.0, {Status.STEP_UNDERFLOW, Status.NON_FINITE, Status.NO_CONVERGENCE}, 0.75),
    "too many steps": (restless, 1.0, {Status.MAX_STEPS}, 0.95),
}


def failing_solution(failure: str, method: str, control: str, t: list[float]) -> Solution:
    field, start, _, _ = FAILURES[failure]
    limit = (8 if METHODS[method].order == 8 else 3) if failure == "too many steps" else 10_000
    options = {"rtol": 0.01, "atol": 1e-3} if METHODS[method].adaptive else {"step_size": 0.0625}
    return solve(field, column(start), t, method=method, step_control=control, max_num_steps=limit, **options)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ADAPTIVE)
@with_both_controls
def test_a_failed_solve_tells_what_happened_and_keeps_what_it_reached(failure: str, method: str, control: str) -> None:
    _, start, statuses, stops_before = FAILURES[failure]
    solution = failing_solution(failure, method, control, [0.0, 1e-3, 1.0])
    status = Status(int(solution.status))
    assert status in statuses
    assert not solution.success
    assert 1e-3 < float(solution.t_reached) <= stops_before
    assert solution.y[0, 0] == start
    assert torch.isfinite(solution.y[0, 1]).all()
    assert torch.isnan(solution.y[0, 2]).all() and torch.isnan(solution.y1).all()
    text = solution.failures()[0]
    assert text.startswith(f"row 0 stopped at t={float(solution.t_reached):.6g} after")
    assert text.endswith(status.message)


@pytest.mark.parametrize("method", FIXED)
@with_both_controls
def test_fixed_steps_into_nan_fail(method: str, control: str) -> None:
    solution = failing_solution("nan field", method, control, [0.0, 0.25, 1.0])
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert torch.isfinite(solution.y[0, 1]).all()
    assert torch.isnan(solution.y1).all()


@pytest.mark.parametrize("method", FIXED)
@with_both_controls
def test_fixed_steps_into_infinity_fail_with_nan_at_the_end(method: str, control: str) -> None:
    solution = solve(lambda t, y: y**8, column(3.0), [0.0, 0.1, 1.0], method=method, step_control=control)
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert torch.isnan(solution.y1).all()


@pytest.mark.parametrize("method", METHODS)
@with_both_controls
def test_steps_are_never_more_than_allowed(method: str, control: str) -> None:
    length = {"first_step": 1.0} if METHODS[method].adaptive else {"step_size": 0.01}
    for limit in (1, 2, 5):
        solution = solve(
            tracking, column(2.0), [0.0, 1.0], method=method, step_control=control, max_num_steps=limit, **length
        )
        assert solution.status.tolist() == [Status.MAX_STEPS]
        assert int(solution.n_steps + solution.n_rejected) == limit


@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]])
@on_all_methods
@with_both_controls
def test_a_field_that_is_nan_from_the_start_gives_nan_after_the_start(
    t: list[float], method: str, control: str
) -> None:
    solution = solve(lambda t, y: y * NAN, column(1.0), t, method=method, step_control=control)
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert solution.y[0, 0] == 1.0
    assert torch.isnan(solution.y[0, -2:] if len(t) > 2 else solution.y[0, -1:]).all()


def test_dense_output_of_a_failed_row_is_nan_where_it_did_not_arrive() -> None:
    solution = solve(late_nan, column(1.0), [0.0, 1.0], dense_output=True)
    states = solution.evaluate(times(0.0, 0.25, 0.75, 1.0))[0, :, 0]
    torch.testing.assert_close(states, times(1.0, math.exp(-0.25), NAN, NAN), rtol=1e-3, atol=0, equal_nan=True)


def test_successful_solves_have_no_failures() -> None:
    assert solve(decay, column(1.0), [0.0, 1.0]).failures() == {}


@pytest.mark.parametrize("status", Status)
def test_every_status_says_what_to_change(status: Status) -> None:
    assert len(status.message) > 10
    if status.failed:
        assert ";" in status.message


def per_row(bad: Callable[[Tensor, Tensor], Tensor]) -> Field:
    """Rows whose last component is 1 follow ``bad``, the others an MLP; the last component stays."""
    good = mlp_field(3)

    def field(t: Tensor, y: Tensor) -> Tensor:
        value = torch.where(y[:, 2:] == 1, bad(t, y[:, :2]), good(t, y[:, :2]))
        return torch.cat([value, torch.zeros_like(y[:, 2:])], dim=1)

    return field


BAD_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nan": lambda t, y: torch.full_like(y, NAN),
    "late nan": lambda t, y: torch.where(t > 0.4, NAN, y),
    "infinite": lambda t, y: torch.full_like(y, math.inf),
    "blow-up": lambda t, y: 3 * y * y,
    "stiff": lambda t, y: -300 * (y - torch.cos(t)),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
@on_all_methods
def test_a_bad_row_leaves_its_neighbours_alone(bad: str, method: str) -> None:
    field, t = per_row(BAD_ROWS[bad]), [0.0, 0.4, 1.0]
    good = torch.cat([random_states(9, 4), torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    mixed = torch.cat([good[:2], rows((1.0, 2.0, 1.0)), good[2:]])
    alone = solve(field, good, t, method=method, max_num_steps=300)
    beside = solve(field, mixed, t, method=method, max_num_steps=300)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(beside.y[others], alone.y, rtol=1e-12, atol=1e-12)
    for name in ("status", "n_evals", "n_steps", "n_rejected"):
        assert torch.equal(getattr(beside, name)[others], getattr(alone, name))
    assert alone.success and beside.success == (int(beside.status[2]) == 0)


@pytest.mark.parametrize("value", [NAN, math.inf])
@on_all_methods
def test_a_row_that_starts_bad_leaves_its_neighbours_alone(value: float, method: str) -> None:
    field, good = mlp_field(), random_states(9, 4)
    mixed = torch.cat([good[:2], rows((value, 1.0)), good[2:]])
    alone, beside = (solve(field, y0, [0.0, 0.4, 1.0], method=method) for y0 in (good, mixed))
    torch.testing.assert_close(beside.y[[0, 1, 3, 4]], alone.y, rtol=1e-12, atol=1e-12)
    if math.isnan(value):
        assert beside.status.tolist() == [0, 0, Status.NON_FINITE, 0, 0]


@on_all_methods
def test_the_order_of_rows_does_not_matter(method: str) -> None:
    field, y0 = mlp_field(hidden_layer_sizes=(16, 16)), 2 * random_states(10, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(11))
    straight, mixed = (solve(field, rows_, [0.0, 0.4, 1.0], method=method) for rows_ in (y0, y0[order]))
    torch.testing.assert_close(mixed.y, straight.y[order], rtol=1e-12, atol=1e-12)
