"""What `solve` promises about states, times and statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.fields import MLPField
from skode.solver import METHODS, BatchControl, solve
from tests.problems import (
    PROBLEMS,
    Field,
    Plain,
    Recorded,
    column,
    decay,
    mlp_field,
    random_states,
    rows,
    times,
    tracking,
)

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
CONTROLS = ["row", "batch"]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", CONTROLS)


def wobbly(t: Tensor, y: Tensor) -> Tensor:
    """Needs many steps in both directions."""
    return 10 * torch.cos(10 * t) - y


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
