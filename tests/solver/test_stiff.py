"""Stiff problems: implicit methods solve them, each row by itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skode.solver import METHODS, Status, implicit, solve
from skode.solver.step import Attempt, Stepper
from tests.problems import Recorded, column, rows
from tests.solver.stiff_problems import coupled, drawn_in, radau, robertson, stiff_and_mild, van_der_pol

IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]

on_implicit_methods = pytest.mark.parametrize("method", IMPLICIT)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


# --- known problems ---


@on_implicit_methods
@with_both_controls
def test_robertsons_reactions_agree_with_another_package(method: str, control: str) -> None:
    y0, t, errors = (1.0, 0.0, 0.0), (0.0, 0.4, 40.0, 1e4), []
    exact = radau(robertson, y0, t)
    for tolerance in (1e-4, 1e-6):
        options = {"method": method, "step_control": control, "rtol": tolerance, "atol": 1e-4 * tolerance}
        solution = solve(robertson, rows(y0), t, **options)
        assert solution.success
        errors.append(float(((solution.y[0] - exact) / (exact.abs() + 1e-4)).abs().max()))
        assert errors[-1] <= 3 * tolerance
        # What the field conserves, linear methods conserve.
        torch.testing.assert_close(solution.y.sum(dim=2), torch.ones(1, 4, dtype=torch.float64), rtol=1e-9, atol=0)
    assert errors[1] < 0.1 * errors[0]


@on_implicit_methods
@with_both_controls
def test_van_der_pols_jumps_agree_with_another_package(method: str, control: str) -> None:
    # The jump is at t = 807.
    y0, t, errors = (2.0, 0.0), (0.0, 400.0, 800.0, 1200.0), []
    exact = radau(van_der_pol, y0, t)
    for tolerance in (1e-3, 1e-5) if method == "kvaerno3" else (1e-4, 1e-6):
        options = {"method": method, "step_control": control, "rtol": tolerance, "atol": 1e-2 * tolerance}
        solution = solve(van_der_pol, rows(y0), t, **options)
        assert solution.success and int(solution.n_steps) < 1000
        errors.append(float(((solution.y[0] - exact) / (exact.abs() + 1e-4)).abs().max()))
        assert errors[-1] <= 200 * tolerance
    assert errors[1] < 0.1 * errors[0]


@on_implicit_methods
@pytest.mark.parametrize(("rate", "order"), [(1.0, 0), (1e6, 2)])
def test_errors_fall_with_the_order_however_stiff_the_problem_is(method: str, rate: float, order: int) -> None:
    # Stages are of second order only: that is what is left in the stiff limit, with an error of 1 / rate.
    order = order or METHODS[method].order
    errors = []
    for h in (1 / 4, 1 / 8, 1 / 16, 1 / 32):
        options = {"first_step": h, "min_step": h, "max_step": h}
        solution = solve(drawn_in(rate), column(1.0), [0.0, 2.0], method=method, rtol=1e-13, atol=1e-13, **options)
        assert solution.success and int(solution.n_steps) == round(2 / h)
        errors.append(abs(float(solution.y1) - math.cos(2.0)))
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert max(observed) >= order - 0.1
    assert errors[-1] < 1e-4 / rate**0.5


@on_implicit_methods
@with_both_controls
def test_a_fast_transient_far_from_the_slow_solution_is_damped(method: str, control: str) -> None:
    y0, options = column(-3.0, 5.0), {"rtol": 1e-5, "atol": 1e-5, "step_control": control}
    solution = solve(drawn_in(1e6), y0, [0.0, 3.0], method=method, **options)
    assert solution.success
    torch.testing.assert_close(solution.y1, column(math.cos(3.0), math.cos(3.0)), rtol=0, atol=1e-5)
    assert int(solution.n_steps.max()) < 150


@on_implicit_methods
def test_stiff_problems_can_be_solved_in_float32(method: str) -> None:
    y0 = torch.tensor([[1.0, 0.0, 0.0]])
    solution = solve(robertson, y0, [0.0, 40.0, 1e3], method=method, rtol=1e-3, atol=1e-7)
    assert solution.success and solution.y.dtype == torch.float32
    expected = radau(robertson, (1.0, 0.0, 0.0), (0.0, 40.0, 1e3)).float()
    torch.testing.assert_close(solution.y[0], expected, rtol=1e-2, atol=1e-6)


@on_implicit_methods
@with_both_controls
def test_descending_times_mirror_ascending_ones(method: str, control: str) -> None:
    y0, options = rows((1.0, 0.0, 0.0)), {"method": method, "rtol": 1e-4, "atol": 1e-8, "step_control": control}
    forward = solve(robertson, y0, [0.0, 1.0, 50.0], **options)
    mirrored = solve(lambda t, y: -robertson(-t, y), y0, [0.0, -1.0, -50.0], **options)
    assert torch.equal(forward.y, mirrored.y) and torch.equal(forward.n_evals, mirrored.n_evals)


@on_implicit_methods
@with_both_controls
def test_dense_output_follows_the_slow_solution(method: str, control: str) -> None:
    t = torch.linspace(0.0, 3.0, 50, dtype=torch.float64)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    solution = solve(
        drawn_in(1e4), column(1.0), [0.0, 3.0], method=method, dense_output=True, step_control=control, **tolerance
    )
    assert int(solution.n_steps) < 150
    torch.testing.assert_close(solution.evaluate(t)[0, :, 0], torch.cos(t), rtol=0, atol=5e-3)
    torch.testing.assert_close(solution.derivative(t)[0, 1:, 0], -torch.sin(t[1:]), rtol=0, atol=5e-2)


@on_implicit_methods
@with_both_controls
def test_a_jump_of_the_field_divides_the_solve_in_two(method: str, control: str) -> None:
    def switched(t: Tensor, y: Tensor) -> Tensor:
        return -1e4 * (y - torch.where(t < 1, torch.cos(t), 2 + torch.sin(t)))

    options = {"method": method, "rtol": 1e-6, "atol": 1e-6, "step_control": control}
    field = Recorded(switched)
    solution = solve(field, column(1.0, 1.5), [0.0, 0.5, 1.5], jump_times=[1.0], **options)
    before = solve(lambda t, y: -1e4 * (y - torch.cos(t)), column(1.0, 1.5), [0.0, 0.5, 1.0], **options)
    after = solve(lambda t, y: -1e4 * (y - 2 - torch.sin(t)), before.y1, [1.0, 1.5], **options)
    assert solution.success
    torch.testing.assert_close(solution.y[:, 1], before.y[:, 1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.y1, after.y1, rtol=1e-5, atol=1e-5)
    assert int(solution.n_rejected.max()) <= int(before.n_rejected.max() + after.n_rejected.max()) + 10
    assert not any(bool((t == 1).any()) for t in field.times)


# --- each row its own ---


@on_implicit_methods
@pytest.mark.parametrize("n", [1, 5, 16, 17])
def test_a_row_does_not_depend_on_the_others(method: str, n: int) -> None:
    y0, rate = stiff_and_mild(n)
    options = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    together = solve(coupled(rate), y0, [0.0, 0.7, 2.0], **options)
    assert together.success
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    permuted = solve(coupled(rate[order]), y0[order], [0.0, 0.7, 2.0], **options)
    torch.testing.assert_close(permuted.y, together.y[order], rtol=1e-12, atol=1e-14)
    for i in range(0, n, 3):
        alone = solve(coupled(rate[i : i + 1]), y0[i : i + 1], [0.0, 0.7, 2.0], **options)
        torch.testing.assert_close(alone.y[0], together.y[i], rtol=1e-12, atol=1e-14)
        for name in ("n_steps", "n_rejected", "n_evals"):
            assert getattr(alone, name)[0] == getattr(together, name)[i], name


@on_implicit_methods
def test_every_row_takes_steps_of_its_own(method: str) -> None:
    y0, rate = column(1.0, 1.0, 1.0), column(1.0, 1.0, 1.0)
    speed = column(1.0, 1.0, 30.0)
    solution = solve(lambda t, y: -rate * y + torch.cos(speed * t), y0, [0.0, 3.0], method=method, rtol=1e-6)
    assert solution.n_steps[0] == solution.n_steps[1] < solution.n_steps[2]


@on_implicit_methods
def test_a_row_of_nan_stops_alone(method: str) -> None:
    y0, rate = stiff_and_mild(4)
    bad = torch.tensor([[False], [True], [False], [False]])

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(bad & (t > 0.5), torch.nan, coupled(rate)(t, y))

    options = {"method": method, "rtol": 1e-5, "atol": 1e-7}
    solution = solve(field, y0, [0.0, 2.0], **options)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0, 0]
    whole = solve(coupled(rate), y0, [0.0, 2.0], **options)
    kept = [0, 2, 3]
    torch.testing.assert_close(solution.y[kept], whole.y[kept], rtol=1e-12, atol=1e-14)


# --- Newton's method ---


@on_implicit_methods
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_newtons_method_leaves_far_less_than_the_tolerance(
    method: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, "rtol": tolerance, "atol": 1e-2 * tolerance}
    for field, y0, t1 in ((van_der_pol, rows((2.0, 0.0)), 100.0), (robertson, rows((1.0, 0.0, 0.0)), 40.0)):
        found = solve(field, y0, [0.0, t1], dense_output=True, **options)
        monkeypatch.setattr(implicit, "KAPPA", 1e-9)
        exact = solve(field, y0, [0.0, t1], dense_output=True, **options)
        monkeypatch.undo()
        assert int(exact.n_evals) > int(found.n_evals)
        unit = options["atol"] + tolerance * exact.y1.abs()
        assert float(((found.y1 - exact.y1) / unit).abs().max()) < 0.1


@on_implicit_methods
@with_both_controls
def test_a_step_that_newtons_method_cannot_take_is_rejected_and_tried_shorter(
    method: str, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Away from the cosine the slope hardly changes: Newton's method takes the first steps' states far beyond.
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -30 * torch.tanh(30 * (y - torch.cos(t)))

    n_failed = [0]
    attempt = Stepper.attempt

    def counting(*args: Any) -> Attempt:
        made = attempt(*args)
        assert made.failed is not None
        n_failed[0] += int(made.failed.any())
        return made

    monkeypatch.setattr(Stepper, "attempt", counting)
    solution = solve(field, column(0.3, 1.0), [0.0, 2.0], method=method, first_step=2.0, step_control=control)
    monkeypatch.undo()
    assert solution.success
    assert 0 < n_failed[0] <= int(solution.n_rejected.sum())
    exact = solve(field, column(0.3, 1.0), [0.0, 2.0], method="dopri5", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.y1, exact.y1, rtol=1e-2, atol=1e-3)


@with_both_controls
@on_implicit_methods
def test_where_no_step_has_a_solution_the_status_says_so(method: str, control: str) -> None:
    # From the zero on, no state has a slope that keeps it there: 1 - sign pulls it over and back.
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, -1.0, 2.0).to(y.dtype)

    solution = solve(field, column(0.5), [0.0, 2.0], method=method, step_control=control, rtol=1e-6, atol=1e-14)
    assert solution.status.tolist() == [Status.NO_CONVERGENCE]
    assert float(solution.t_reached) == pytest.approx(0.5, abs=1e-3)
    assert "Newton's method found no solution" in solution.failures()[0]
    assert torch.isnan(solution.y1).all()


@on_implicit_methods
def test_evaluations_are_counted_for_each_row(method: str) -> None:
    y0, rate = stiff_and_mild(3)
    field = Recorded(coupled(rate[:1]))
    alone = solve(field, y0[:1], [0.0, 2.0], method=method)
    assert int(alone.n_evals) == field.n_calls
    together = Recorded(coupled(rate))
    solution = solve(together, y0, [0.0, 2.0], method=method)
    assert int(solution.n_evals.max()) <= together.n_calls
