"""Integrals along the solution: their values, their own tolerance and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.solver import METHODS, Status, solve
from tests.problems import Recorded, column, random_states, rows, times

NAN, INF = math.nan, math.inf
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])


class With(nn.Module):
    """A function of the time, the state and parameters."""

    def __init__(self, function: Callable[..., Tensor], *values: float) -> None:
        super().__init__()
        self.function, self.values = function, nn.ParameterList([nn.Parameter(times(value)) for value in values])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.function(t, y, *self.values)


def decay(t: Tensor, y: Tensor) -> Tensor:
    """y' = -y with the integrals of y^2 and t y."""
    return torch.cat([-y, y**2, t * y], dim=1)


def decayed(y0: Tensor, t: Tensor) -> Tensor:
    """Its integrals (n, m, 2) from 0 for y0 (n, 1) and times (m,) or (n, m)."""
    square = y0**2 * (1 - torch.exp(-2 * t)) / 2
    moment = y0 * (1 - (1 + t) * torch.exp(-t))
    return torch.stack([square, moment], dim=2)


# --- values ---


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])
def test_integrals_have_their_closed_form(method: str, control: str) -> None:
    y0, t = column(1.0, -2.0, 0.5), times(0.0, 0.5, 0.5, 2.0)
    solution = solve(decay, y0, t, method=method, step_control=control, n_quadratures=2, **TIGHT)
    assert solution.y.shape == (3, 4, 1) and solution.quadratures.shape == (3, 4, 2)
    torch.testing.assert_close(solution.quadratures, decayed(y0, t), rtol=1e-7, atol=1e-7)
    assert torch.equal(solution.quadratures[:, 0], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(solution.y[..., 0], y0 * torch.exp(-t), rtol=1e-7, atol=1e-7)
    assert solution.y1.shape == (3, 1)


@on_all_methods
def test_every_method_integrates_polynomials_of_the_time(method: str) -> None:
    order = METHODS[method].order

    def powers(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([0 * y, *(t**k for k in range(order))], dim=1)

    solution = solve(powers, column(1.0, 2.0), [0.5, 2.0], method=method, n_quadratures=order)
    exact = torch.stack([times((2.0 ** (k + 1) - 0.5 ** (k + 1)) / (k + 1)) for k in range(order)], dim=1)
    torch.testing.assert_close(solution.quadratures[:, 1], exact.expand(2, -1), rtol=1e-10, atol=0)


@on_all_methods
@with_both_controls
def test_the_field_sees_the_state_alone(method: str, control: str) -> None:
    field = Recorded(decay)
    solve(field, column(1.0, 2.0), [0.0, 0.3, 1.0], method=method, step_control=control, n_quadratures=2)
    assert {tuple(state.shape[1:]) for state in field.states} == {(1,)}


@pytest.mark.parametrize("n_quadratures", [0, 1, 3])
def test_a_field_that_returns_another_number_of_columns_is_refused(n_quadratures: int) -> None:
    with pytest.raises(FieldError, match=rf"shape \(2, 3\).*shape \(2, {1 + n_quadratures}\)"):
        solve(decay, column(1.0, 2.0), [0.0, 1.0], n_quadratures=n_quadratures)


def test_without_quadratures_there_are_none() -> None:
    quadratures = solve(lambda t, y: -y, column(1.0), [0.0, 1.0]).quadratures
    assert quadratures is None or quadratures.shape == (1, 2, 0)


@with_both_controls
def test_integrals_against_the_time_are_negative(control: str) -> None:
    y0, t = column(1.0, -2.0), times(1.5, 0.5, 0.0)
    solution = solve(decay, y0 * math.exp(-1.5), t, step_control=control, n_quadratures=2, **TIGHT)
    whole = decayed(y0, t)
    torch.testing.assert_close(solution.quadratures, whole - whole[:, :1], rtol=1e-7, atol=1e-7)


def test_rows_with_their_own_times_have_their_own_integrals() -> None:
    y0 = column(1.0, -2.0, 0.5, 3.0)
    t = rows((0.0, 0.5, 2.0), (0.0, 0.1, 0.2), (0.0, 1.0, NAN), (0.0, 0.0, 0.0))
    solution = solve(decay, y0, t, n_quadratures=2, **TIGHT)
    torch.testing.assert_close(solution.quadratures, decayed(y0, t), rtol=1e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_quadratures_are_those_of_a_state_that_is_longer(method: str) -> None:
    # As further components of the state, with an equal tolerance, they take the same steps.
    def longer(t: Tensor, y: Tensor) -> Tensor:
        return decay(t, y[:, :1])

    y0, t = column(1.0, -2.0, 0.5), times(0.0, 0.7, 2.0)
    whole = solve(longer, torch.cat([y0, torch.zeros(3, 2, dtype=torch.float64)], dim=1), t, method=method).y
    tolerances = {"rtol": times(1e-3, 1e-3, 1e-3), "atol": times(1e-6, 1e-6, 1e-6)}
    found = solve(decay, y0, t, method=method, n_quadratures=2, **tolerances)
    torch.testing.assert_close(torch.cat([found.y, found.quadratures], dim=2), whole, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_integrals_of_others() -> None:
    y0 = random_states(1, 20)
    field = Integrated(7)
    together = solve(field, y0, [0.0, 0.5, 1.0], n_quadratures=2)
    for i in range(0, 20, 6):
        alone = solve(field, y0[i : i + 1], [0.0, 0.5, 1.0], n_quadratures=2)
        torch.testing.assert_close(alone.quadratures[0], together.quadratures[i], rtol=1e-12, atol=1e-12)


# --- tolerances ---


def humming(t: Tensor, y: Tensor) -> Tensor:
    """A state that is easy, and an integral that is not."""
    return torch.cat([-0.1 * y, torch.cos(40 * t)], dim=1)


@with_both_controls
@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_integral_without_tolerance_does_not_choose_the_steps(method: str, control: str) -> None:
    options = {"method": method, "step_control": control}
    y0, t = column(1.0, 2.0), [0.0, 0.4, 1.0]
    plain = solve(lambda t, y: humming(t, y)[:, :1], y0, t, **options)
    for free in ({"rtol": times(1e-3, INF)}, {"atol": times(1e-6, INF)}):
        beside = solve(humming, y0, t, n_quadratures=1, **free, **options)
        assert torch.equal(beside.n_steps, plain.n_steps)
        torch.testing.assert_close(beside.y, plain.y, rtol=1e-12, atol=1e-12)
        assert torch.isfinite(beside.quadratures).all()


@with_both_controls
def test_an_integral_with_its_own_tolerance_is_as_exact_as_that(control: str) -> None:
    y0, t, errors, steps = column(1.0, 2.0), times(0.0, 0.4, 1.0), [], []
    for own in (INF, 1e-3, 1e-6, 1e-9):
        tolerances = {"rtol": times(1e-2, 0.0), "atol": times(1e-2, own)}
        solution = solve(humming, y0, t, step_control=control, n_quadratures=1, **tolerances)
        errors.append(float((solution.quadratures[..., 0] - torch.sin(40 * t) / 40).abs().max()))
        steps.append(int(solution.n_steps.max()))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-1 and errors[2] < 1e-4 and errors[3] < 1e-7
    assert steps == sorted(steps) and steps[3] > 3 * steps[0]


# --- known integrals ---


class Integrated(nn.Module):
    """A network of one hidden layer with its kinetic energy and the trace of its Jacobian."""

    def __init__(self, seed: int, n_dims: int = 2) -> None:
        super().__init__()
        self.first, self.time, self.last = (
            nn.Parameter(random_states(seed + k, *shape)) for k, shape in enumerate(((n_dims, 5), (1, 5), (5, n_dims)))
        )

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.first + t @ self.time) @ self.last

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(y @ self.first + t @ self.time)
        f = hidden @ self.last
        trace = (1 - hidden**2) @ (self.first * self.last.T).sum(dim=0).unsqueeze(1)
        return torch.cat([f, f.square().sum(dim=1, keepdim=True), trace], dim=1)


def test_the_kinetic_energy_of_an_oscillator() -> None:
    # The integral of v^2 for x = cos t is t/2 - sin(2t)/4.
    def field(t: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, -x, v**2], dim=1)

    t = times(0.0, 1.0, 7.0)
    found = solve(field, rows((1.0, 0.0), (3.0, 0.0)), t, n_quadratures=1, **TIGHT).quadratures[..., 0]
    exact = t / 2 - torch.sin(2 * t) / 4
    torch.testing.assert_close(found, torch.stack([exact, 9 * exact]), rtol=1e-7, atol=1e-7)


def test_the_integral_of_the_trace_is_the_log_determinant_of_the_flow() -> None:
    field, y0 = Integrated(5, 3), random_states(2, 3, 3)
    t = times(0.0, 0.5, 1.5)
    found = solve(field, y0, t, n_quadratures=2, **TIGHT).quadratures[..., 1]

    def flow(y0: Tensor) -> Tensor:
        return solve(field.velocity, y0, t, **TIGHT).y

    jacobian = torch.autograd.functional.jacobian(flow, y0)
    for row in range(3):
        for i in range(3):
            _, exact = torch.linalg.slogdet(jacobian[row, i, :, row])
            torch.testing.assert_close(found[row, i], exact, rtol=1e-6, atol=1e-7)


# --- gradients ---


def assert_gradients(
    found: Sequence[Tensor], exact: Sequence[Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    weights = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape) for x in exact]
    own, other = (
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, values, strict=True)), inputs)
        for values in (found, exact)
    )
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@with_both_gradients
@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "dopri5"])
def test_gradients_of_integrals_have_their_closed_form(gradient: str, control: str, method: str) -> None:
    # y' = -k y with the integral of c y^2
    field = With(lambda t, y, k, c: torch.cat([-k * y, c * y**2], dim=1), 0.7, 1.3)
    k, c = field.parameters()
    y0, t = column(1.0, -2.0, 0.5).requires_grad_(), times(0.2, 0.9, 2.0).requires_grad_()
    options = {"method": method, "gradient": gradient, "step_control": control, **TIGHT}
    solution = solve(field, y0, t, n_quadratures=1, **options)
    y = y0 * torch.exp(-k * (t - t[0]))
    exact = c * (y0**2 - y**2) / (2 * k)
    torch.testing.assert_close(solution.quadratures[..., 0], exact, rtol=1e-7, atol=1e-8)
    inputs = [y0, t, k, c]
    assert_gradients([solution.y[..., 0], solution.quadratures[..., 0]], [y, exact], inputs, 1e-5)


@with_both_gradients
@pytest.mark.parametrize("chosen", ["states", "integrals"])
def test_a_loss_of_states_or_of_integrals_alone_has_its_gradient(gradient: str, chosen: str) -> None:
    field = With(lambda t, y, k, c: torch.cat([-k * y, c * y**2], dim=1), 0.7, 1.3)
    k, c = field.parameters()
    y0 = column(1.0, -2.0).requires_grad_()
    solution = solve(field, y0, [0.0, 1.0], gradient=gradient, n_quadratures=1, **TIGHT)
    loss = solution.y1.square().sum() if chosen == "states" else solution.quadratures.sum()
    y1 = y0 * torch.exp(-k)
    exact = y1.square().sum() if chosen == "states" else (c * (y0**2 - y1**2) / (2 * k)).sum()
    found = torch.autograd.grad(loss, [y0, k, c], allow_unused=True)
    expected = torch.autograd.grad(exact, [y0, k, c], allow_unused=True)
    for own, other in zip(found, expected, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero.double() if own is None else own.squeeze(), zero.double() if other is None else other.squeeze()
        )


@with_both_gradients
def test_an_integrand_with_parameters_of_its_own_trains_them(gradient: str) -> None:
    # Energy and log-determinant of a network: the sum of both against the state that carries them itself.
    class Longer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.inner(t, y[:, :2])

    field, y0 = Integrated(6), random_states(3, 4).requires_grad_()
    weights, t = list(field.parameters()), [0.0, 0.6, 1.0]
    solution = solve(field, y0, t, gradient=gradient, n_quadratures=2, **TIGHT)
    carried = solve(
        Longer(field), torch.cat([y0, torch.zeros(4, 2, dtype=torch.float64)], dim=1), t, rtol=1e-10, atol=1e-10
    )
    assert_gradients([solution.y, solution.quadratures], [carried.y[..., :2], carried.y[..., 2:]], [y0, *weights], 1e-5)


@on_all_methods
@with_both_controls
def test_a_replay_with_integrals_is_the_same_and_passes_gradcheck(method: str, control: str) -> None:
    field = With(lambda t, y, k, c: torch.cat([-k * torch.sin(y) * t, c * y**2 + t], dim=1), 0.7, 1.3)
    y0, t = column(1.0, -2.0).requires_grad_(), times(0.2, 0.9, 1.4).requires_grad_()
    options: dict[str, Any] = {"method": method, "step_control": control, "n_quadratures": 1, "rtol": 1e-3}
    if getattr(METHODS[method], "gamma", 0):
        options |= {"rtol": 1e-10, "atol": 1e-10, "min_step": 0.3, "first_step": 0.3}
    elif not METHODS[method].adaptive:
        options |= {"step_size": 0.5}
    first = solve(field, y0, t, **options)

    def again(y0: Tensor, t: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve(field, y0, t, steps=first.steps, **options)
        return solution.y, solution.quadratures

    y, quadratures = again(y0, t)
    assert torch.equal(y, first.y) and torch.equal(quadratures, first.quadratures)
    inputs = (y0, t, *field.parameters())
    assert torch.autograd.gradcheck(again, inputs, atol=2e-6, rtol=1e-4, fast_mode=True)


def test_second_derivatives_of_an_integral_have_their_closed_form() -> None:
    field = With(lambda t, y, k: torch.cat([-k * y, y**2], dim=1), 0.7)
    (k,), y0 = field.parameters(), column(1.3).requires_grad_()
    energy = solve(field, y0, [0.0, 1.0], n_quadratures=1, rtol=1e-10, atol=1e-10).quadratures[:, -1].sum()
    exact = (y0**2 * (1 - torch.exp(-2 * k)) / (2 * k)).sum()
    seconds = []
    for value in (energy, exact):
        (slope,) = torch.autograd.grad(value, y0, create_graph=True)
        seconds.append(torch.autograd.grad(slope.square().sum(), [y0, k]))
    for own, other in zip(*seconds, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


# --- rows that stop ---


@with_both_gradients
def test_an_integrand_that_is_no_number_fails_its_row_alone(gradient: str) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([-y, torch.where(y > 5, NAN, y)], dim=1)

    y0 = column(1.0, 10.0, 2.0).requires_grad_()
    solution = solve(field, y0, [0.0, 1.0], gradient=gradient, n_quadratures=1, **TIGHT)
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    exact = (1 - math.exp(-1)) * y0[[0, 2]]
    torch.testing.assert_close(solution.quadratures[[0, 2], 1], exact)
    assert torch.isnan(solution.quadratures[1, 1]).all()
    (found,) = torch.autograd.grad(solution.quadratures[[0, 2], 1].sum(), y0)
    torch.testing.assert_close(found, column(1 - math.exp(-1), 0.0, 1 - math.exp(-1)))
