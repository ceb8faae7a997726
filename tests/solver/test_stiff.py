"""Stiff problems: implicit methods solve them, with exact gradients; explicit ones that struggle say so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from skode.solver import METHODS, Solution, Status, implicit, solve
from skode.solver.step import Attempt, Stepper
from skode.solver.stiffness import stability_limit
from tests.problems import Field, Recorded, column, rows
from tests.solver.test_gradients import assert_all_close, assert_replayed, gradients_of, loss_of, times

IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.adaptive and not tableau.implicit]

on_implicit_methods = pytest.mark.parametrize("method", IMPLICIT)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Three reactions whose speeds differ by nine orders of magnitude."""
    first = 0.04 * y[:, 0] - 1e4 * y[:, 1] * y[:, 2]
    last = 3e7 * y[:, 1] ** 2
    return torch.stack([-first, first - last, last], dim=1)


def van_der_pol(t: Tensor, y: Tensor, mu: float | Tensor = 1000.0) -> Tensor:
    return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=1)


def drawn_in(rate: float | Tensor) -> Field:
    """Prothero and Robinson's problem: the solution cos(t) draws all others in."""
    return lambda t, y: -rate * (y - torch.cos(t)) - torch.sin(t)


class VanDerPol(nn.Module):
    """With rates of its own for each row, if given."""

    def __init__(self, *mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(times(*mu))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return van_der_pol(t, y, self.mu)


def reference(field: Field, y0: list[float], t: list[float]) -> Tensor:
    """States (m, d) by another package's implicit method."""

    def one(t: float, y: np.ndarray) -> np.ndarray:
        return field(torch.full((1, 1), t, dtype=torch.float64), torch.from_numpy(y).view(1, -1))[0].numpy()

    found = solve_ivp(one, (t[0], t[-1]), y0, "Radau", t, rtol=1e-10, atol=1e-14)
    return torch.from_numpy(found.y.T.copy())


# --- known problems ---


@on_implicit_methods
@with_both_controls
def test_robertsons_reactions_agree_with_another_package(method: str, control: str) -> None:
    t = [0.0, 0.4, 40.0, 1e4]
    solution = solve(robertson, rows((1.0, 0.0, 0.0)), t, method=method, rtol=1e-6, atol=1e-10, step_control=control)
    assert solution.success
    expected = reference(robertson, [1.0, 0.0, 0.0], t)
    torch.testing.assert_close(solution.y[0], expected, rtol=2e-5, atol=1e-9)
    # What the field conserves, linear methods conserve.
    torch.testing.assert_close(solution.y.sum(dim=2), torch.ones(1, 4, dtype=torch.float64), rtol=1e-9, atol=0)


@on_implicit_methods
@with_both_controls
def test_van_der_pols_jumps_agree_with_another_package(method: str, control: str) -> None:
    # The jump is at t = 807.
    t, tolerance = [0.0, 400.0, 800.0, 1200.0], 1e-4 if method == "kvaerno3" else 1e-6
    solution = solve(
        van_der_pol, rows((2.0, 0.0)), t, method=method, rtol=tolerance, atol=1e-2 * tolerance, step_control=control
    )
    assert solution.success
    assert int(solution.n_steps) < 700
    torch.testing.assert_close(solution.y[0], reference(van_der_pol, [2.0, 0.0], t), rtol=200 * tolerance, atol=1e-6)


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
    expected = reference(robertson, [1.0, 0.0, 0.0], [0.0, 40.0, 1e3]).float()
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


def stiff_and_mild(n: int) -> tuple[Tensor, Tensor]:
    """States and rates, from 1 to 1e6 in turn."""
    y0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return y0, 10.0 ** (torch.arange(n, dtype=torch.float64) % 7).unsqueeze(1)


def coupled(rate: Tensor) -> Field:
    def field(t: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v + torch.sin(t), -rate * (v + x**3) - x], dim=1)

    return field


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


# --- gradients ---


@on_implicit_methods
@with_both_controls
@pytest.mark.parametrize("t", [(0.0, 0.8), (0.0, 0.3, 0.8), (1.0, 0.9, 0.2)])
def test_gradients_of_a_stiff_solve_are_those_of_its_steps(method: str, control: str, t: tuple[float, ...]) -> None:
    sign = 1.0 if t[-1] > t[0] else -1.0

    class Mirrored(VanDerPol):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return sign * super().forward(t, y) + 0.1 * torch.cos(t)

    # The first step is far too long.
    solution = assert_replayed(
        Mirrored(100.0),
        rows((2.0, -0.6), (1.7, 0.3)),
        times(*t),
        method,
        close=1e-6,
        step_control=control,
        rtol=1e-4,
        atol=1e-5,
        first_step=0.5,
    )
    assert int(solution.n_rejected.max()) > 0


@on_implicit_methods
@with_both_controls
def test_gradients_of_a_stiff_solve_pass_gradcheck(method: str, control: str) -> None:
    field = VanDerPol(50.0)
    y0 = rows((2.0, -0.6), (1.7, 0.3)).requires_grad_()
    options = {"first_step": 0.05, "min_step": 0.05, "max_step": 0.05, "rtol": 1e-14, "atol": 1e-13}

    def states(y0: Tensor, mu: Tensor) -> Tensor:
        solution = solve(field, y0, [0.0, 0.12, 0.2], method=method, step_control=control, **options)
        assert solution.success and solution.n_steps.tolist() == [4, 4]
        return solution.y

    assert torch.autograd.gradcheck(states, (y0, field.mu), eps=1e-5)

    def of_times(t: Tensor) -> Tensor:
        return solve(field, y0.detach(), t, method=method, step_control=control, **options).y

    assert torch.autograd.gradcheck(of_times, (times(0.01, 0.02, 0.05).requires_grad_(),))


@on_implicit_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 2.0], [0.0, 0.4, 2.0]])
def test_a_memory_budget_does_not_change_the_gradient(method: str, control: str, t: list[float]) -> None:
    field, y0 = VanDerPol(100.0), rows((2.0, -0.6), (1.7, 0.3), (-2.0, 0.0))
    found = []
    for budget in (2**28, 3000, 0):
        start = y0.clone().requires_grad_()
        solution = solve(
            field, start, t, method=method, step_control=control, first_step=1.0, memory_budget=budget, rtol=1e-4
        )
        assert int(solution.n_rejected.max()) > 0
        found.append(gradients_of(loss_of(solution.y), [start, field.mu]))
    assert_all_close(found[1], found[0], 1e-11)
    assert_all_close(found[2], found[0], 1e-11)


@on_implicit_methods
def test_gradients_of_a_stiff_solve_converge_to_the_true_ones(method: str) -> None:
    y0 = rows((1.0, 0.0, 0.0))

    class Reactions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_rates = nn.Parameter(times(0.04, 1e4, 3e7).log())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            k = self.log_rates.exp()
            first, last = k[0] * y[:, 0] - k[1] * y[:, 1] * y[:, 2], k[2] * y[:, 1] ** 2
            return torch.stack([-first, first - last, last], dim=1)

    def last_state(change: int, by: float) -> Tensor:
        field = Reactions().requires_grad_(False)
        field.log_rates[change] += by
        return reference(field, y0[0].tolist(), [0.0, 40.0])[-1]

    by = 1e-4
    exact = torch.stack([(last_state(k, by)[2] - last_state(k, -by)[2]) / (2 * by) for k in range(3)])
    field = Reactions()
    solution = solve(field, y0, [0.0, 40.0], method=method, rtol=1e-6, atol=1e-10)
    (found,) = gradients_of(solution.y1[0, 2], [field.log_rates])
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)


@on_implicit_methods
@with_both_controls
@pytest.mark.parametrize("jumps", [None, [0.5]])
def test_the_adjoint_can_be_solved_by_an_implicit_method(method: str, control: str, jumps: list[float] | None) -> None:
    found = []
    for gradient in ("discrete", "adjoint"):
        field, y0 = VanDerPol(5.0), rows((2.0, -0.6), (1.7, 0.3)).requires_grad_()
        solution = solve(
            field,
            y0,
            [0.0, 0.6, 1.0],
            method=method,
            gradient=gradient,
            step_control=control,
            jump_times=jumps,
            rtol=1e-7,
            atol=1e-7,
        )
        found.append(gradients_of(loss_of(solution.y), [y0, field.mu]))
    assert_all_close(found[1], found[0], 1e-4)


@on_implicit_methods
def test_gradients_flow_past_a_row_that_failed(method: str) -> None:
    y0, rate = stiff_and_mild(3)
    bad = torch.tensor([[False], [True], [False]])

    def field(t: Tensor, y: Tensor) -> Tensor:
        return coupled(rate)(t, y) + torch.where(bad & (t > 0.5), torch.nan, 0.0)

    start = y0.clone().requires_grad_()
    solution = solve(field, start, [0.0, 1.0], method=method, rtol=1e-5)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    (found,) = gradients_of(loss_of(solution.y), [start])
    whole = y0.clone().requires_grad_()
    (expected,) = gradients_of(
        loss_of(
            torch.where(
                bad.unsqueeze(2), torch.nan, solve(coupled(rate), whole, [0.0, 1.0], method=method, rtol=1e-5).y
            )
        ),
        [whole],
    )
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-10, atol=1e-12)


# --- advice ---


def few_steps(field: Field, y0: Tensor, t1: float, method: str, control: str = "row", rtol: float = 1e-3) -> Solution:
    solution = solve(
        field, y0, [0.0, t1], method=method, max_num_steps=150, step_control=control, rtol=rtol, atol=1e-4 * rtol
    )
    assert bool((solution.status == Status.MAX_STEPS).any())
    return solution


STIFF: dict[str, tuple[Field, tuple[float, ...], float]] = {
    "robertson": (robertson, (1.0, 0.0, 0.0), 1e4),
    "van der pol": (van_der_pol, (2.0, 0.0), 1000.0),
    "drawn in": (drawn_in(1e4), (0.3,), 100.0),
    "drawn in, backward": (lambda t, y: -drawn_in(1e4)(t, y), (0.3,), -100.0),
}
MERELY_LONG: dict[str, tuple[Field, tuple[float, ...], float]] = {
    "oscillator": (lambda t, y: torch.stack([y[:, 1], -y[:, 0]], dim=1), (1.0, 0.0), 3000.0),
    "growth": (lambda t, y: y, (1.0,), 700.0),
    "waves": (lambda t, y: torch.cos(7 * t) - 0.01 * y, (0.0,), 1e4),
    "wavy decay": (lambda t, y: torch.cos(t) - 0.1 * y, (0.0,), 1e5),
}


@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri5", "dopri8"])
@pytest.mark.parametrize("problem", STIFF)
@with_both_controls
def test_a_stiff_problem_is_told_from_its_steps(problem: str, method: str, control: str) -> None:
    field, y0, t1 = STIFF[problem]
    solution = few_steps(field, rows(y0), t1, method, control)
    text = solution.failures()[0]
    assert "the problem is stiff; use method='kencarp4'" in text
    assert f"the method's limit is {stability_limit(METHODS[method]):.2g}" in text
    assert solve(field, rows(y0), [0.0, t1], method="kencarp4", max_num_steps=600).success


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("problem", MERELY_LONG)
@with_both_controls
def test_a_long_problem_is_not_called_stiff(problem: str, method: str, control: str) -> None:
    field, y0, t1 = MERELY_LONG[problem]
    for rtol in (1e-3, 1e-6):
        assert few_steps(field, rows(y0), t1, method, control, rtol).advice == {}


def test_only_the_stiff_rows_get_the_advice() -> None:
    # The field knows each row by its place.
    rate = column(1.0, 1e5, 1.0, 1e5)
    speed = column(0.1, 1.0, 30.0, 1.0)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -rate * (y - torch.cos(speed * t))

    solution = few_steps(field, column(1.0, 1.0, 1.0, 1.0), 30.0, "tsit5", rtol=1e-4)
    assert list(solution.advice) == [1, 3]


def test_many_failed_rows_get_little_advice_and_a_solved_one_costs_nothing() -> None:
    field = Recorded(drawn_in(1e4))
    solution = few_steps(field, torch.linspace(-1, 1, 40, dtype=torch.float64).view(-1, 1), 100.0, "tsit5")
    assert 0 < len(solution.advice) <= 8
    calm = Recorded(drawn_in(1.0))
    assert solve(calm, column(0.3), [0.0, 1.0]).advice == {}
    assert calm.n_calls == int(solve(drawn_in(1.0), column(0.3), [0.0, 1.0]).n_evals)


@pytest.mark.parametrize(
    ("method", "limit"),
    [("adaptive_heun", 2.0), ("bosh3", 2.51), ("dopri5", 3.31), ("tsit5", 3.5), ("dopri8", 6.4), ("rk4", 2.79)],
)
def test_stability_limits_are_the_known_ones(method: str, limit: float) -> None:
    assert stability_limit(METHODS[method]) == pytest.approx(limit, abs=0.03)


@on_implicit_methods
def test_an_l_stable_method_has_no_limit(method: str) -> None:
    assert stability_limit(METHODS[method]) == math.inf


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_step_beyond_the_limit_grows_and_one_below_it_decays(method: str) -> None:
    limit = stability_limit(METHODS[method])
    sizes: list[float] = []
    decay: Callable[[Tensor, Tensor], Tensor] = lambda t, y: -y  # noqa: E731
    for h in (0.97 * limit, 1.03 * limit):
        options = {"first_step": h, "min_step": h, "max_step": h}
        y = solve(decay, column(1.0), [0.0, 40 * h], method=method, **options).y1
        sizes.append(abs(float(y)))
    assert sizes[0] < 1 < sizes[1]


# --- given steps ---


@on_implicit_methods
@with_both_controls
def test_the_same_steps_again_give_the_same_bits(method: str, control: str) -> None:
    field, t = VanDerPol(30.0), [0.0, 0.1, 0.8]
    y0 = rows((2.0, -0.6), (1.7, 0.3)).requires_grad_()
    options: dict[str, Any] = {"method": method, "step_control": control, "first_step": 0.5}
    first = solve(field, y0, t, **options)
    again = solve(field, y0, t, steps=first.steps, **{**options, "first_step": None})
    assert int(first.n_rejected.max()) > 0 and int(again.n_rejected.max()) == 0
    assert torch.equal(first.y, again.y)
    inputs = [y0, field.mu]
    for one, other in zip(gradients_of(loss_of(first.y), inputs), gradients_of(loss_of(again.y), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@on_implicit_methods
@with_both_controls
def test_a_given_step_without_a_solution_is_told(method: str, control: str) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -30 * torch.tanh(30 * (y - torch.cos(t)))

    solution = solve(field, column(0.3), [0.0, 2.0], method=method, steps=times(0.0, 2.0), step_control=control)
    assert solution.status.tolist() == [Status.NO_CONVERGENCE]
    assert float(solution.t_reached) == 0
    assert torch.isnan(solution.y1).all()
