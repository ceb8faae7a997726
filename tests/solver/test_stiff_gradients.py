"""Implicit methods: exact gradients, and steps that are taken again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.solver import METHODS, Status, solve
from tests.problems import column, rows, times
from tests.solver.gradient_helpers import assert_all_close, assert_replayed, gradients_of, loss_of
from tests.solver.stiff_problems import VanDerPol, coupled, radau, stiff_and_mild

IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]

on_implicit_methods = pytest.mark.parametrize("method", IMPLICIT)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


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
        return radau(field, tuple(y0[0].tolist()), (0.0, 40.0))[-1]

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


@on_implicit_methods
def test_integrals_have_the_same_gradients_by_the_adjoint(method: str) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([-2 * (y - torch.cos(t)), y.square().sum(dim=1, keepdim=True)], dim=1)

    found = []
    for gradient in ("discrete", "adjoint"):
        y0 = rows((1.0, 0.5), (2.0, 1.0)).requires_grad_()
        solution = solve(field, y0, [0.0, 1.0], method=method, gradient=gradient, n_quadratures=1, rtol=1e-7, atol=1e-7)
        assert solution.quadratures is not None
        found += gradients_of(solution.quadratures[:, -1].sum() + solution.y1.sum(), [y0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
