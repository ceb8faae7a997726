"""What `solve` promises about states, times, statistics, failures and wrong arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.fields import MLPField
from skode.solver import METHODS, BatchControl, Solution, Status, solve
from tests.problems import PROBLEMS, Field, Plain, Recorded, column, mlp_field, random_states, rows

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
CONTROLS = ["row", "batch"]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", CONTROLS)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def tracking(t: Tensor, y: Tensor) -> Tensor:
    """Stiff enough for rejections at loose tolerances."""
    return -50 * (y - torch.cos(t))


def wobbly(t: Tensor, y: Tensor) -> Tensor:
    """Needs many steps in both directions."""
    return 10 * torch.cos(10 * t) - y


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def accuracy(method: str, level: int) -> dict[str, float]:
    """Tolerances, or steps, of which each level is finer than the one before."""
    if METHODS[method].adaptive:
        # A high order is still far below the coarser tolerances with its first steps.
        tolerance = ((1e-6, 1e-9, 1e-12) if METHODS[method].order == 8 else (1e-2, 1e-4, 1e-6))[level]
        return {"rtol": tolerance, "atol": tolerance}
    return {"step_size": (0.1, 0.05, 0.025)[level]}


def test_every_method_takes_part() -> None:
    assert set(ADAPTIVE) | set(FIXED) == set(METHODS)
    assert ADAPTIVE and FIXED


# --- known solutions ---


@pytest.mark.parametrize("name", PROBLEMS)
@with_both_controls
def test_error_against_the_known_solution_scales_with_the_tolerance(name: str, control: str) -> None:
    problem = PROBLEMS[name]
    t = torch.linspace(problem.t0, problem.t1, 4, dtype=torch.float64)
    exact = problem.solution(t)
    for method in ("tsit5", "dopri5"):
        errors = []
        for tolerance in (1e-4, 1e-7, 1e-10):
            solution = solve(
                problem.field, problem.y0, t, method=method, rtol=tolerance, atol=tolerance, step_control=control
            )
            assert solution.success
            errors.append(float((solution.y - exact).abs().max()))
            assert errors[-1] < 300 * tolerance * float(exact.abs().max())
        assert errors[2] < 0.05 * errors[1] < 0.0025 * errors[0]


@on_all_methods
@with_both_controls
def test_every_method_comes_closer_to_the_known_solution(method: str, control: str) -> None:
    problem = PROBLEMS["seasonal"]
    t = times(problem.t0, 0.3, problem.t1)
    exact, errors = problem.solution(t), []
    for level in range(3):
        options = accuracy(method, level)
        solution = solve(problem.field, problem.y0, t, method=method, step_control=control, **options)
        errors.append(float((solution.y - exact).abs().max()))
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]
    assert errors[2] < 0.02


@on_all_methods
@with_both_controls
def test_backward_in_time_retraces_the_way(method: str, control: str) -> None:
    problem = PROBLEMS["gaussian"]
    t = times(problem.t1, 0.25, problem.t0)
    start = problem.solution(t)[:, 0]
    solution = solve(problem.field, start, t, method=method, step_control=control, **accuracy(method, 1))
    assert solution.success
    torch.testing.assert_close(solution.y, problem.solution(t), rtol=0.3, atol=0.0)


@on_all_methods
@with_both_controls
def test_float32_stays_float32(method: str, control: str) -> None:
    solution = solve(decay, torch.ones(2, 1), [0, 0.5, 1], method=method, step_control=control, step_size=None)
    assert solution.y.dtype == torch.float32
    torch.testing.assert_close(solution.y1, torch.full((2, 1), math.exp(-1)), rtol=0.1, atol=0)


# --- output times ---


@on_all_methods
def test_rows_with_their_own_times_are_as_if_each_were_alone(method: str) -> None:
    y0 = random_states(1, 5)
    t = torch.stack(
        [
            times(0.0, 0.3, 0.7, 1.0),
            times(1.0, 0.8, 0.1, -0.5),
            times(0.0, 0.5, NAN, NAN),
            times(0.2, 0.2, 0.6, 0.6),
            times(2.0, 2.0, 2.0, 2.0),
        ]
    )
    field, options = mlp_field(), {} if METHODS[method].adaptive else {"step_size": 0.17}
    solution = solve(field, y0, t, method=method, **options)
    assert solution.success
    for i, own in enumerate(t):
        kept = own[~own.isnan()]
        alone = solve(field, y0[i : i + 1], own.view(1, -1), method=method, **options)
        torch.testing.assert_close(solution.y[i], alone.y[0], rtol=1e-12, atol=1e-12, equal_nan=True)
        assert torch.equal(torch.isnan(solution.y[i]).all(dim=1), own.isnan())
        torch.testing.assert_close(solution.y1[i], alone.y1[0], rtol=1e-12, atol=1e-12)
        counts = (solution.n_evals[i], solution.n_steps[i], solution.n_rejected[i])
        assert counts == (alone.n_evals[0], alone.n_steps[0], alone.n_rejected[0])
        assert solution.t_reached[i] == kept[-1]


@on_all_methods
@with_both_controls
def test_equal_neighbouring_times_give_equal_states(method: str, control: str) -> None:
    y0 = random_states(2, 3)
    solution = solve(mlp_field(), y0, [0.0, 0.0, 0.4, 0.4, 1.0, 1.0], method=method, step_control=control)
    assert torch.equal(solution.y[:, 0], y0)
    for first in (0, 2, 4):
        torch.testing.assert_close(solution.y[:, first], solution.y[:, first + 1], rtol=1e-14, atol=0)


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]])
@pytest.mark.parametrize("dense_output", [False, True])
def test_an_interval_without_length_gives_the_initial_state(
    method: str, control: str, t: list[float], dense_output: bool
) -> None:
    y0 = random_states(3, 2)
    solution = solve(mlp_field(), y0, t, method=method, step_control=control, dense_output=dense_output)
    assert solution.success
    assert solution.n_steps.tolist() == [0, 0]
    assert torch.equal(solution.y, y0.unsqueeze(1).expand(-1, len(t), -1))
    assert torch.equal(solution.y1, y0)
    if dense_output:
        assert torch.equal(solution.evaluate(times(0.5)), y0.unsqueeze(1))


@with_both_controls
def test_single_time_of_each_row(control: str) -> None:
    y0 = random_states(3, 2)
    shared = solve(mlp_field(), y0, times(1.0), step_control=control, first_step=0.1)
    assert torch.equal(shared.y, y0.unsqueeze(1))
    own = solve(mlp_field(), y0, times(1.0, 2.0).view(2, 1))
    assert torch.equal(own.y, y0.unsqueeze(1))


@pytest.mark.parametrize("t", [[0, 1, 2], (0, 1, 2), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0, 2.0])])
def test_times_may_be_lists_tuples_integers_or_float32(t: object) -> None:
    y0 = column(1.0, 2.0)
    expected = solve(decay, y0, times(0, 1, 2)).y
    assert torch.equal(solve(decay, y0, t).y, expected)  # type: ignore[arg-type]


@with_both_controls
def test_a_batch_without_rows_has_an_empty_solution(control: str) -> None:
    solution = solve(decay, torch.zeros(0, 3), [0.0, 1.0], step_control=control)
    assert solution.y.shape == (0, 2, 3)
    assert solution.success


def test_the_initial_state_is_left_alone() -> None:
    y0 = random_states(5, 3)
    before = y0.clone()
    solution = solve(mlp_field(), y0, [0.0, 0.5, 1.0], dense_output=True)
    assert torch.equal(y0, before)
    solution.y.mul_(2)
    assert torch.equal(y0, before)


# --- dense output ---


@on_all_methods
@with_both_controls
def test_dense_output_at_the_ends_is_the_solution_bit_for_bit(method: str, control: str) -> None:
    y0 = random_states(6, 3)
    solution = solve(mlp_field(), y0, [0.1, 0.9], method=method, step_control=control, dense_output=True)
    ends = solution.evaluate(times(0.1, 0.9))
    assert torch.equal(ends[:, 0], y0)
    assert torch.equal(ends[:, 1], solution.y1)


@on_all_methods
@with_both_controls
def test_dense_output_gives_what_output_times_give(method: str, control: str) -> None:
    y0, t = random_states(7, 3), times(0.0, 0.21, 0.5, 0.77, 1.0)
    asked = solve(mlp_field(), y0, t, method=method, step_control=control)
    dense = solve(mlp_field(), y0, t[[0, -1]], method=method, step_control=control, dense_output=True)
    torch.testing.assert_close(dense.evaluate(t), asked.y, rtol=1e-12, atol=1e-12)


@on_all_methods
def test_output_times_do_not_change_the_steps(method: str) -> None:
    y0 = random_states(7, 3)
    few = solve(mlp_field(), y0, [0.0, 1.0], method=method, dense_output=True)
    many = solve(mlp_field(), y0, torch.linspace(0, 1, 101, dtype=torch.float64), method=method)
    assert torch.equal(few.n_steps, many.n_steps) and torch.equal(few.n_evals, many.n_evals)
    assert torch.equal(few.y1, many.y1)


def test_dense_output_is_close_to_the_solution_between_the_steps() -> None:
    problem = PROBLEMS["oscillator"]
    for method in ADAPTIVE:
        solution = solve(
            problem.field,
            problem.y0,
            [problem.t0, problem.t1],
            method=method,
            rtol=1e-4,
            atol=1e-4,
            dense_output=True,
        )
        t = torch.linspace(problem.t0, problem.t1, 57, dtype=torch.float64)
        assert float((solution.evaluate(t) - problem.solution(t)).abs().max()) < 0.1


def test_dense_output_takes_times_of_each_row_in_any_order() -> None:
    y0 = column(1.0, 2.0)
    solution = solve(decay, y0, rows((0.0, 1.0), (3.0, 1.0)), rtol=1e-9, atol=1e-9, dense_output=True)
    asked = rows((0.7, 0.1, NAN, 0.7), (1.5, 3.0, 2.0, NAN))
    states = solution.evaluate(asked)[..., 0]
    exact = torch.stack([torch.exp(-asked[0]), 2 * torch.exp(3 - asked[1])])
    torch.testing.assert_close(states, exact, rtol=1e-6, atol=0, equal_nan=True)


def test_dense_output_outside_of_the_interval_is_refused() -> None:
    solution = solve(decay, column(1.0, 2.0), rows((0.0, 1.0), (3.0, 2.0)), dense_output=True)
    with pytest.raises(ValueError, match=r"time 1\.5 \(row 0\) lies outside of the solved interval \[0, 1\]"):
        solution.evaluate(times(1.5))
    with pytest.raises(ValueError, match=r"time 1\.9 \(row 1\) lies outside of the solved interval \[2, 3\]"):
        solution.evaluate(column(0.5, 1.9))


def test_dense_output_must_be_asked_for() -> None:
    solution = solve(decay, column(1.0), [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="dense_output=True"):
        solution.evaluate(times(0.5))


# --- where the field is called ---


def assert_inside(field: Recorded, t: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Every call's times lie between each row's first and last time."""
    low = t.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True).to(dtype)
    high = t.nan_to_num(nan=-math.inf).amax(dim=1, keepdim=True).to(dtype)
    assert field.n_calls
    # A field may be asked for copies of the rows after them.
    called = torch.cat([calls[: len(t)].expand(len(t), 1) for calls in field.times], dim=1)
    below, above = (low - called).amax(), (called - high).amax()
    assert below <= 0 and above <= 0, f"called {max(float(below), float(above)):.3g} outside"


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_field_is_only_called_inside_of_a_shared_interval(method: str, control: str, dtype: torch.dtype) -> None:
    ends = torch.rand(3, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for t0, t1 in (ends * 3 - 1).tolist():
        field = Recorded(wobbly)
        solve(field, torch.ones(2, 1, dtype=dtype), [t0, t1], method=method, step_control=control)
        assert_inside(field, times(t0, t1).expand(2, -1), dtype)


@on_all_methods
def test_field_is_only_called_inside_of_each_rows_own_interval(method: str) -> None:
    t = rows((0.1, 0.4, 1.3), (2.7, 2.0, 1.9), (0.5, 0.5, 0.5), (0.3, 0.6, NAN), (-1.1, 0.2, 0.9))
    field = Recorded(wobbly)
    y0 = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    y = solve(field, y0, t, method=method, memory_budget=0).y
    assert_inside(field, t)
    n_forward = field.n_calls
    y.nansum().backward()
    assert field.n_calls > n_forward
    assert_inside(field, t)


@on_all_methods
def test_field_is_only_called_inside_of_the_interval_by_the_adjoint(method: str) -> None:
    t = rows((0.1, 0.4, 1.3), (1.7, 1.6, 1.5), (0.5, 0.5, 0.5), (0.3, 0.6, NAN))
    field = Recorded(mlp_field())
    y0 = random_states(1, 4).requires_grad_()
    solve(field, y0, t, method=method, gradient="adjoint").y.nansum().backward()
    assert_inside(field, t)


@with_both_controls
def test_the_probe_for_the_first_step_stays_inside(control: str) -> None:
    # t0 + (t1 - t0) rounds to a time beyond t1, and the flat field lets the probe go all the way.
    t0, t1 = 0.4505631066311552, 1.980736135867167
    assert t0 + (t1 - t0) > t1
    field = Recorded(lambda t, y: 0.1 * torch.ones_like(y))
    solve(field, column(1e6), [t0, t1], step_control=control)
    assert_inside(field, times(t0, t1).view(1, 2))


@with_both_controls
def test_steps_below_the_resolution_of_float32_times_stay_inside(control: str) -> None:
    field = Recorded(decay)
    solve(field, torch.ones(1, 1), [1.0, 1.1], first_step=5e-8, step_control=control)
    assert_inside(field, times(1.0, 1.1).view(1, 2), torch.float32)


# --- statistics ---


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.3, 1.0], [1.0, 0.2]])
def test_counted_evaluations_are_the_calls_of_the_field(method: str, control: str, t: list[float]) -> None:
    options = {"first_step": 0.5} if METHODS[method].adaptive else {"step_size": 0.02}
    field = Recorded(tracking)
    solution = solve(field, column(2.0), t, method=method, step_control=control, **options)
    assert solution.success
    assert int(solution.n_evals) == field.n_calls
    if METHODS[method].adaptive:
        assert int(solution.n_rejected) > 0


@pytest.mark.parametrize("method", ADAPTIVE)
@with_both_controls
def test_the_probe_for_the_first_step_is_counted(method: str, control: str) -> None:
    field = Recorded(tracking)
    solution = solve(field, column(2.0), [0.0, 0.2], method=method, step_control=control)
    assert int(solution.n_evals) == field.n_calls


@on_all_methods
@with_both_controls
def test_counted_evaluations_leave_out_those_of_the_gradient(method: str, control: str) -> None:
    y0, t = column(2.0), [0.0, 0.3, 1.0]
    options = {} if METHODS[method].adaptive else {"step_size": 0.02}
    without = solve(tracking, y0, t, method=method, step_control=control, **options)
    with_graph = solve(tracking, y0.requires_grad_(), t, method=method, step_control=control, **options)
    with_graph.y.sum().backward()
    assert torch.equal(with_graph.n_evals, without.n_evals)
    assert torch.equal(with_graph.y, without.y)


@pytest.mark.parametrize("method", FIXED)
@with_both_controls
@pytest.mark.parametrize(("step_size", "n_steps"), [(None, 10), (0.1, 10), (0.25, 4), (0.3, 4), (2.0, 1)])
def test_fixed_steps_are_as_many_as_fit(method: str, control: str, step_size: float | None, n_steps: int) -> None:
    solution = solve(decay, column(1.0), [0.0, 1.0], method=method, step_control=control, step_size=step_size)
    assert int(solution.n_steps) == n_steps
    assert int(solution.n_rejected) == 0


def test_fixed_steps_of_rows_divide_the_longest_interval_by_ten() -> None:
    field = Recorded(decay)
    solution = solve(field, column(1.0, 1.0), rows((0.0, 2.0), (1.0, 0.5)), method="euler")
    assert solution.n_steps.tolist()[1] == 3
    torch.testing.assert_close(solution.y1, column(0.8**10, 1.2**2 * 1.1))


def test_euler_with_fixed_steps_is_euler() -> None:
    solution = solve(decay, column(1.0), [0.0, 1.0], method="euler", step_size=0.25)
    torch.testing.assert_close(solution.y1, column(0.75**4), rtol=1e-14, atol=0)


@with_both_controls
def test_the_next_step_is_a_good_first_step(control: str) -> None:
    problem = PROBLEMS["lotka_volterra"]
    solution = solve(problem.field, problem.y0, [0.0, 3.0], step_control=control)
    again = solve(problem.field, problem.y0, [0.0, 3.0], step_control=control, first_step=solution.next_step)
    assert again.success
    assert int(again.n_rejected.max()) <= 3


# --- failures ---


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


# --- one step for the batch ---


@on_all_methods
def test_both_step_controls_agree_within_the_tolerance(method: str) -> None:
    y0, field = random_states(12, 4), mlp_field()
    options = {"rtol": 1e-6, "atol": 1e-6} if METHODS[method].adaptive else {"step_size": 0.125}
    tolerance = 1e-4 if METHODS[method].adaptive else 1e-13
    by_row, by_batch = (
        solve(field, y0, [0.0, 0.4, 1.0], method=method, step_control=control, **options) for control in CONTROLS
    )
    torch.testing.assert_close(by_batch.y, by_row.y, rtol=tolerance, atol=tolerance)


def test_one_step_for_the_batch_refuses_times_of_each_row() -> None:
    with pytest.raises(ValueError, match="step_control='batch' needs times shared by all rows"):
        solve(decay, column(1.0, 2.0), rows((0.0, 1.0), (0.0, 2.0)), step_control="batch")


@pytest.mark.parametrize("method", ADAPTIVE)
def test_rows_without_weight_do_not_choose_the_step(method: str) -> None:
    y0 = column(1.0, 400.0)
    field, t = PROBLEMS["gaussian"].field, [0.0, 1.0]
    alone = solve(field, y0[:1], t, method=method, step_control="batch")
    control = BatchControl(weights=times(2.0, 0.0))
    both = solve(field, y0, t, method=method, step_control=control)
    assert both.n_steps.tolist() == [int(alone.n_steps)] * 2
    torch.testing.assert_close(both.y[:1], alone.y, rtol=1e-12, atol=0)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \(2,\); got \(3,\)"):
        solve(decay, column(1.0, 2.0), [0.0, 1.0], step_control=BatchControl(weights=torch.ones(3)))


# --- arguments ---


WRONG_ARGUMENTS: dict[str, tuple[dict[str, object], str]] = {
    "method": ({"method": "dopri9"}, "method='dopri9' is unknown"),
    "gradient": ({"gradient": "backprop"}, "gradient='backprop' is unknown; use one of 'discrete', 'adjoint'"),
    "control": ({"step_control": "column"}, "step_control='column' is unknown"),
    "negative rtol": ({"rtol": -1e-3}, "rtol=-0.001 must be finite and not negative"),
    "nan atol": ({"atol": NAN}, "atol=nan must be finite"),
    "no tolerance": ({"rtol": 0, "atol": 0}, "rtol and atol are both 0"),
    "step size of an adaptive method": ({"step_size": 0.1}, "goes with fixed-step methods; 'tsit5' adapts"),
    "zero step size": ({"method": "rk4", "step_size": 0.0}, "step_size=0.0 must be positive"),
    "negative step size": ({"method": "rk4", "step_size": -0.1}, "step_size=-0.1 must be positive"),
    "first step": ({"first_step": 0}, "first_step=0 must be positive"),
    "negative first step": ({"first_step": -1.0}, "first_step=-1.0 must be finite and not negative"),
    "no steps": ({"max_num_steps": 0}, "max_num_steps=0 must be positive"),
    "error of the adjoint": ({"error_estimate": True, "gradient": "adjoint"}, "needs gradient='discrete'"),
    "error of fixed steps": ({"error_estimate": True, "method": "rk4"}, "and an adaptive method"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_with_its_name(case: str) -> None:
    options, message = WRONG_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        solve(decay, column(1.0, 2.0), [0.0, 1.0], **options)  # type: ignore[arg-type]


WRONG_TIMES: dict[str, tuple[object, str]] = {
    "not monotone": ([0.0, 2.0, 1.0], "must be ascending or descending"),
    "not monotone in a row": (rows((0.0, 1.0, 2.0), (0.0, 2.0, 1.0)), r"row 1 has \[0\.0, 2\.0, 1\.0\]"),
    "shared nan": ([0.0, NAN], "must be finite where it is shared"),
    "shared infinity": ([0.0, math.inf], "must be finite"),
    "infinity": (rows((0.0, 1.0), (0.0, math.inf)), "infinite time"),
    "nan first": (rows((0.0, 1.0), (NAN, 1.0)), "NaN in t may only pad the end"),
    "nan between": (rows((0.0, 1.0, 2.0), (0.0, NAN, 1.0)), "NaN in t may only pad the end"),
    "other number of rows": (rows((0.0, 1.0)), r"t must have shape \(m,\) or \(2, m\) for y0 of shape \(2, 1\)"),
    "no times": ([], "t must have shape"),
    "a number": (torch.tensor(1.0), "t must have shape"),
    "three axes": (torch.zeros(2, 1, 1), "t must have shape"),
}


@pytest.mark.parametrize("case", WRONG_TIMES)
def test_wrong_times_are_refused(case: str) -> None:
    t, message = WRONG_TIMES[case]
    with pytest.raises(ValueError, match=message):
        solve(decay, column(1.0, 2.0), t)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y0", "message"),
    [
        ([[1.0]], "y0 must be a tensor"),
        (torch.ones(3), r"y0 must have shape \(n, d\); got \(3,\)"),
        (torch.ones(3, 1, dtype=torch.int64), "y0 must be float32 or float64; got torch.int64"),
        (torch.ones(3, 1, dtype=torch.float16), "y0 must be float32 or float64"),
    ],
)
def test_a_wrong_state_is_refused(y0: object, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        solve(decay, y0, [0.0, 1.0])  # type: ignore[arg-type]


# --- no graph where none is needed ---


@with_both_controls
@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_nothing_is_recorded_when_nothing_requires_grad(
    control: str, gradient: str, wrap: Callable[[MLPField], Field]
) -> None:
    class Watched(MLPField):
        def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, object]:
            raise AssertionError("linearised without need")

    plain = Watched(2, (4,), generator=torch.Generator().manual_seed(0)).double()
    y0, t = random_states(13, 3), [0.0, 0.5, 1.0]
    with torch.no_grad():
        assert not solve(wrap(plain), y0, t, step_control=control, gradient=gradient).y.requires_grad
    frozen = plain.requires_grad_(False)
    dense = gradient != "reversible"
    solution = solve(wrap(frozen), y0, t, step_control=control, gradient=gradient, dense_output=dense)
    assert solution.y.grad_fn is None and not solution.y.requires_grad
    assert not dense or not solution.evaluate(times(0.3)).requires_grad


def test_an_error_estimate_comes_only_on_request() -> None:
    assert solve(decay, column(1.0), [0.0, 1.0]).error_estimate is None
    solution = solve(decay, column(1.0, 100.0), [0.0, 1.0], error_estimate=True)
    assert solution.error_estimate is not None
    assert solution.error_estimate.shape == (2,)
    # Every accepted step's mean square is at most 1.
    assert bool((solution.error_estimate <= solution.n_steps).all())
    assert bool((solution.error_estimate > 0).all())


@with_both_controls
@pytest.mark.parametrize("t", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.5, 1.0]])
def test_an_error_estimate_is_zero_without_steps(control: str, t: list[float]) -> None:
    solution = solve(decay, column(1.0, 2.0), t, step_control=control, error_estimate=True, first_step=0.5)
    assert solution.error_estimate is not None
    assert bool((solution.error_estimate > 0).all()) == (t[0] != t[-1])
