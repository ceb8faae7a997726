"""Dense output: the solution at any time, after the solve."""

from __future__ import annotations

import math

import pytest
import torch

from skode.solver import METHODS, solve
from tests.problems import PROBLEMS, column, decay, mlp_field, random_states, rows, times

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
NAN = math.nan

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


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
