"""The time and the state of an event are differentiated: by y0, times, and parameters of field and event."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor, nn

from skode.solver import Event, Status, solve
from tests.problems import Field, column, mlp_field, rows, times

G = 9.81
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
STARTS = rows((1.0, 0.0), (2.0, 3.0), (0.5, -4.0))

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint"])


def fall(t: Tensor, y: Tensor) -> Tensor:
    """Height and velocity."""
    return torch.stack([y[:, 1], torch.full_like(y[:, 1], -G)], dim=1)


def height(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0]


def landing(start: Tensor, g: Tensor | float = G, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Time and velocity of a falling body's landing, in closed form."""
    speed = (start[:, 1] ** 2 + 2 * g * (start[:, 0] - floor)).sqrt()
    return (start[:, 1] + speed) / g, -speed


# --- closed forms ---


def bounces(y0: Tensor, restitution: Tensor, n: int, **options: Any) -> Tensor:
    """The times (n + 1, rows) of a ball's first contacts, each solve starting on the floor where the last one ended."""
    t, contacts = torch.zeros(len(y0), dtype=torch.float64), []
    for _ in range(n + 1):
        solution = solve(fall, y0, torch.stack([t, t + 20], dim=1), events=Event(height, direction=-1), **options)
        t = solution.event_t
        contacts.append(t)
        y0 = torch.stack([torch.zeros_like(t), -restitution * solution.event_y[:, 1]], dim=1)
    return torch.stack(contacts)


@with_both_gradients
def test_a_bouncing_ball_and_its_gradients(gradient: str) -> None:
    y0, restitution = STARTS.clone().requires_grad_(), times(0.8).requires_grad_()
    found = bounces(y0, restitution, 3, gradient=gradient, **TIGHT)
    first, velocity = landing(y0)
    airtime = [-2 * velocity * restitution**k / G for k in (1, 2, 3)]
    exact = torch.stack([first, first + airtime[0], first + sum(airtime[:2]), first + sum(airtime)])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    for own, other in zip(
        torch.autograd.grad(found[-1].sum(), [y0, restitution]),
        torch.autograd.grad(exact[-1].sum(), [y0, restitution]),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@with_both_gradients
def test_an_event_before_a_singularity_saves_the_row(gradient: str) -> None:
    # y = sqrt(y0^2 - t), which ends at t = y0^2
    y0 = column(1.0, 0.9).requires_grad_()
    event = Event(lambda t, y: y[:, 0] - 0.3)
    solution = solve(lambda t, y: -0.5 / y, y0, [0.0, 2.0], events=event, gradient=gradient, **TIGHT)
    assert solution.success
    torch.testing.assert_close(solution.event_t, (y0**2 - 0.09)[:, 0], rtol=0, atol=1e-7)
    (found,) = torch.autograd.grad(solution.event_t.sum(), y0)
    torch.testing.assert_close(found, 2 * y0.detach(), rtol=1e-5, atol=0)


class Gravity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(times(9.81))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -self.g.expand(len(y))], dim=1)


class Floor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(times(0.2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y[:, 0] - self.level


def assert_gradients(found: Tensor, exact: Tensor, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Values and gradients, with another weight for each entry."""
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view(found.shape)
    own, other = (torch.autograd.grad((weights * x).sum(), inputs, retain_graph=True) for x in (found, exact))
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@with_both_gradients
@with_both_controls
@pytest.mark.parametrize("kind", ["module", "closure"])
def test_event_time_and_state_are_differentiated_in_closed_form(gradient: str, control: str, kind: str) -> None:
    field, floor, y0 = Gravity(), Floor(), STARTS.clone().requires_grad_()
    g, level = field.g, floor.level
    function: Field = floor if kind == "module" else lambda t, y: y[:, 0] - level
    solution = solve(field, y0, [0.0, 5.0], gradient=gradient, step_control=control, events=Event(function), **TIGHT)
    when, velocity = landing(y0, g, level)
    inputs = [y0, g, level]
    assert_gradients(solution.event_t, when, inputs)
    assert_gradients(solution.event_y, torch.stack([level.expand(3), velocity], dim=1), inputs)


@with_both_gradients
def test_the_event_time_moves_with_the_first_time_and_not_with_the_last(gradient: str) -> None:
    t = times(0.3, 5.0).requires_grad_()
    solution = solve(fall, STARTS, t, gradient=gradient, events=Event(height), **TIGHT)
    (found,) = torch.autograd.grad(solution.event_t.sum(), t)
    torch.testing.assert_close(found, times(3.0, 0.0), rtol=1e-6, atol=1e-6)


@with_both_gradients
def test_outputs_before_an_event_and_rows_without_one_keep_their_gradients(gradient: str) -> None:
    y0 = rows((1.0, 0.0), (100.0, 0.0)).requires_grad_()
    solution = solve(fall, y0, [0.0, 0.2, 3.0], gradient=gradient, events=Event(height), **TIGHT)
    assert solution.event_index.tolist() == [0, -1]
    (found,) = torch.autograd.grad(solution.y[..., 0].nansum() + solution.event_t.nansum(), y0)
    slope = 1 / math.sqrt(2 * G)
    torch.testing.assert_close(found, rows((2 + slope, 0.2 + 1 / G), (3.0, 3.2)), rtol=1e-6, atol=1e-6)


def event_time(weights: list[Tensor], y0: Tensor) -> float:
    """By scipy, for one row of ``mlp_field(4)`` with other parameters, and the event of the test below."""
    field = mlp_field(4)
    with torch.no_grad():
        for own, other in zip(field.parameters(), weights, strict=True):
            own.copy_(other)

    def derivative(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(times(t).view(1, 1), torch.from_numpy(y).view(1, -1)).numpy()[0]

    path = solve_ivp(derivative, (0, 3), y0.numpy(), method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True).sol
    return float(brentq(lambda t: path(t)[0] - path(t)[1] - 0.2 * t, 1e-3, 3, xtol=1e-13))


@with_both_gradients
@pytest.mark.parametrize("method", ["tsit5", "dopri5"])
def test_the_event_time_of_a_network_against_finite_differences_of_scipy(gradient: str, method: str) -> None:
    field, y0 = mlp_field(4), rows((0.5, -0.5)).requires_grad_()
    event = Event(lambda t, y: y[:, 0] - y[:, 1] - 0.2 * t[:, 0])
    solution = solve(field, y0, [0.0, 3.0], gradient=gradient, method=method, events=event, rtol=1e-10, atol=1e-10)
    weights, start = [p.detach().clone() for p in field.parameters()], y0.detach()[0].clone()
    assert abs(float(solution.event_t.detach()) - event_time(weights, start)) < 1e-8
    found = torch.autograd.grad(solution.event_t.sum(), [y0, *field.parameters()])
    for own, tensor in zip(found, [start, *weights], strict=True):
        flat = tensor.view(-1)
        for k in range(0, len(flat), 3):
            kept, ends = flat[k].item(), []
            for sign in (1, -1):
                flat[k] = kept + sign * 1e-4
                ends.append(event_time(weights, start))
            flat[k] = kept
            assert abs(float(own.view(-1)[k]) - (ends[0] - ends[1]) / 2e-4) < 1e-5


# --- touching without crossing ---


def test_an_event_function_that_touches_zero_without_a_slope_has_a_status() -> None:
    # The step from 0.5 ends at 1, where the function is 0 and flat.
    y0 = column(1.0, 2.0).requires_grad_()
    event = Event(lambda t, y: (t[:, 0] - 1) ** 2)
    solution = solve(lambda t, y: 0 * y, y0, [0.0, 2.0], method="rk4", step_size=0.5, events=event)
    assert solution.status.tolist() == [Status.GRAZING] * 2
    torch.testing.assert_close(solution.event_t, times(1.0, 1.0))
    torch.testing.assert_close(solution.event_y, y0)


@with_both_gradients
def test_a_flat_crossing_gives_values_and_no_gradient_through_its_time(gradient: str) -> None:
    # y = y0 + 1 + (t - 1)^3 crosses 0 at t = 1 with no slope if y0 = -1.
    y0, rate = column(-1.0, -2.0).requires_grad_(), times(1.0).requires_grad_()

    def flat(t: Tensor, y: Tensor) -> Tensor:
        return 3 * rate * (t - 1) ** 2 + 0 * y

    solution = solve(flat, y0, [0.0, 3.0], gradient=gradient, events=Event(height), **TIGHT)
    assert solution.status.tolist() == [Status.GRAZING, Status.EVENT]
    torch.testing.assert_close(solution.event_t, times(1.0, 2.0), rtol=0, atol=2e-3)
    to_states, to_rate = torch.autograd.grad(solution.event_t.sum(), [y0, rate])
    # Of the second row alone: y0 + rate ((t - 1)^3 + 1) = 0.
    torch.testing.assert_close(to_states, column(0.0, -1 / 3), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(to_rate, times(-2 / 3), rtol=1e-4, atol=1e-6)
