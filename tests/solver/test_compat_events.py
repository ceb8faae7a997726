"""odeint's event_fn and odeint_event: where torchdiffeq stops, with its gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import skode.solver
from skode.exceptions import SolverError
from skode.solver import odeint, odeint_adjoint, odeint_event
from tests.solver.compat_cases import F64, Net, random, seasonal, times

SOLVERS = {"odeint": odeint, "odeint_adjoint": odeint_adjoint}


def ramp(t: Tensor, y: Tensor) -> Tensor:
    return torch.ones_like(y)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("t_dtype", [torch.float32, F64])
def test_an_event_gives_its_time_and_the_states_at_both_ends(dtype, t_dtype):
    y0 = torch.ones(2, 3, dtype=dtype)
    t = times(0.5, 1.5).to(t_dtype)
    results = [api.odeint(decay, y0, t, event_fn=lambda t, y: y.mean() - 0.25) for api in (skode.solver, torchdiffeq)]
    for event_t, y in results:
        assert event_t.shape == () and event_t.dtype == t_dtype
        assert y.shape == (2, 2, 3) and y.dtype == dtype
        assert torch.equal(y[0], y0)
        torch.testing.assert_close(event_t, torch.tensor(0.5 + math.log(4), dtype=t_dtype), rtol=1e-5, atol=0)
        torch.testing.assert_close(y[1], 0.25 * y0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "midpoint", "rk4"])
@pytest.mark.parametrize("end", [2.0, 0.0], ids=["ascending", "descending"])
def test_events_are_found_with_every_method_in_both_directions(method, end):
    options = {"step_size": 0.01, "interp": "cubic"} if method in ("midpoint", "rk4") else {}
    level = 2.0 * math.exp(-3.7 if end > 1 else 3.7)
    event_t, y = odeint(
        decay,
        torch.full((3,), 2.0, dtype=F64),
        times(1, end),
        method=method,
        options=options,
        rtol=1e-6,
        event_fn=lambda t, y: y[0] - level,
    )
    assert float(event_t) == pytest.approx(4.7 if end > 1 else -2.7, rel=1e-4)
    torch.testing.assert_close(y[1], torch.full((3,), level, dtype=F64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("end", [1.0, 0.001, 50.0])
def test_the_second_time_only_tells_the_direction(end):
    event_t, _ = odeint(ramp, torch.zeros(1, dtype=F64), times(0, end), event_fn=lambda t, y: y[0] - math.pi)
    assert float(event_t) == pytest.approx(math.pi, rel=1e-7)


@pytest.mark.parametrize("level", [0.5, 1.0, 2.0, 3.0, 7.0, 1000.0])
def test_events_far_away_and_at_round_times_are_found(level):
    event_t, y = odeint_event(
        ramp, torch.zeros(1, dtype=F64), torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0] - level
    )
    assert float(event_t) == pytest.approx(level, rel=1e-7) and float(y[1]) == pytest.approx(level, rel=1e-7)


def test_events_of_the_time_alone_are_found():
    event_t, y = odeint(decay, random(2), times(0, 1), event_fn=lambda t, y: t - 2.5)
    assert float(event_t) == pytest.approx(2.5, rel=1e-7)
    torch.testing.assert_close(y[1], random(2) * math.exp(-2.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_entry_that_changes_its_sign_stops_the_solve(sign):
    """Entries may start on either side of zero."""

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        return sign * torch.stack([y - 3, 2 - y, (y - 5).square() + 1])

    for api in (skode.solver, torchdiffeq):
        event_t, _ = api.odeint(ramp, torch.zeros(2, dtype=F64), times(0, 1), event_fn=event_fn)
        assert float(event_t) == pytest.approx(2, rel=1e-6)


def test_a_zero_at_the_start_stops_there():
    for api in (skode.solver, torchdiffeq):
        event_t, y = api.odeint(ramp, torch.zeros(2, dtype=F64), times(0.5, 1), event_fn=lambda t, y: y)
        assert float(event_t) == 0.5 and torch.equal(y, torch.zeros(2, 2, dtype=F64))


def test_a_start_just_past_zero_waits_for_the_next_event():
    y0 = torch.tensor([1e-7, 1.0], dtype=F64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -y[0]])

    for api in (skode.solver, torchdiffeq):
        event_t, _ = api.odeint(field, y0, times(0, 1), event_fn=lambda t, y: y[0])
        assert float(event_t) == pytest.approx(math.pi, rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_tuples_and_reversed_time_are_those_of_torchdiffeq(reverse):
    y0 = (random(), random(2, seed=1))
    results = [
        api.odeint_event(
            lambda t, y: (1 + 0.1 * y[0].sin(), -y[1] * t),
            y0,
            torch.tensor([0.3], dtype=F64),
            event_fn=lambda t, y: y[0].abs() + 0.1 * y[1].sum() - 4,
            reverse_time=reverse,
            rtol=1e-9,
            atol=1e-9,
        )
        for api in (skode.solver, torchdiffeq)
    ]
    (own_t, own), (other_t, other) = results
    assert (own_t < 0.3) == reverse
    torch.testing.assert_close(own_t, other_t, rtol=1e-7, atol=0)
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_events_are_those_of_torchdiffeq(name, reverse):
    net, y0 = Net(), random(2).requires_grad_()
    t0 = torch.tensor(0.3, dtype=F64, requires_grad=True)
    found = []
    for api in (skode.solver, torchdiffeq):
        event_t, y = api.odeint_event(
            net,
            y0,
            t0,
            event_fn=lambda t, y: (y - y0.detach()).square().sum() - 0.5 - 0.1 * (t - 0.3),
            reverse_time=reverse,
            odeint_interface=getattr(api, name),
            rtol=1e-10,
            atol=1e-10,
        )
        loss = event_t.square() + (y[1] * times(1, 3)).sum()
        found.append(torch.autograd.grad(loss, (y0, t0, *net.parameters())))
    for own, other in zip(*found, strict=True):
        assert float(other.abs().max()) > 1e-4
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_gradients_pass_the_intervals_on_the_way_to_a_far_event():
    """The solve looks for the event in one interval after the other."""
    rate = torch.tensor(-0.1, dtype=F64, requires_grad=True)
    y0, t0 = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.tensor(0.5, dtype=F64, requires_grad=True)
    event_t, _ = odeint_event(lambda t, y: rate * y, y0, t0, event_fn=lambda t, y: y - 0.2, rtol=1e-10, atol=1e-12)
    slopes = torch.autograd.grad(event_t, (rate, y0, t0))
    exact = (-math.log(0.1) / 0.1**2, 1 / (0.1 * 2.0), 1.0)
    assert event_t.item() == pytest.approx(0.5 - math.log(0.1) / 0.1, rel=1e-8)
    assert [float(slope) for slope in slopes] == pytest.approx(exact, rel=1e-6)


def test_the_interface_may_be_wrapped():
    interface = functools.partial(odeint, method="bosh3", rtol=1e-8)
    event_t, _ = odeint_event(
        decay, torch.ones((), dtype=F64), torch.tensor(0), event_fn=lambda t, y: y - 0.5, odeint_interface=interface
    )
    assert float(event_t) == pytest.approx(math.log(2), rel=1e-6)


class Ball(nn.Module):
    """A ball that loses a part of its speed whenever it meets the ground."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor([9.8], dtype=F64))
        self.height = nn.Parameter(torch.tensor([10.0], dtype=F64))
        self.log_radius = nn.Parameter(torch.tensor([math.log(0.2)], dtype=F64))
        self.t0 = nn.Parameter(torch.tensor([0.0], dtype=F64))
        self.loss = nn.Parameter(torch.tensor([0.2], dtype=F64))

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[1], -self.gravity, torch.zeros_like(state[2])

    def gap(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return state[0] - torch.exp(state[2])

    def bounces(self, api: Any, name: str, n_bounces: int = 3) -> Tensor:
        t, state = self.t0, (self.height, torch.zeros_like(self.height), self.log_radius)
        found = []
        for _ in range(n_bounces):
            solver = getattr(api, name)
            t, path = api.odeint_event(self, state, t, event_fn=self.gap, atol=1e-8, rtol=1e-8, odeint_interface=solver)
            height, speed, log_radius = (part[-1] for part in path)
            state = (height + 1e-7, -speed * (1 - self.loss), log_radius)
            found.append(t)
        return torch.stack(found)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_bouncing_ball_runs_after_changing_the_import(name):
    ball = Ball()
    ours, theirs = (ball.bounces(api, name) for api in (skode.solver, torchdiffeq))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for own, other in zip(*(torch.autograd.grad(y[-1], tuple(ball.parameters())) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [times(0), times(0, 1, 2), times(1, 1)])
def test_events_need_two_times(t):
    with pytest.raises(ValueError, match=r"event_fn needs t = \[t0, a later or earlier time\]; got \["):
        odeint(decay, random(2), t, event_fn=lambda t, y: y[0])


def test_events_need_one_start():
    with pytest.raises(ValueError, match=r"t0 must have one entry; got shape \(2,\)"):
        odeint_event(decay, random(2), times(0, 1), event_fn=lambda t, y: y[0])


def test_events_with_fixed_steps_need_a_step_size():
    with pytest.raises(ValueError, match=r"needs options=\{'step_size': ...\}"):
        odeint(decay, random(2), times(0, 1), event_fn=lambda t, y: y[0], method="rk4")


def test_an_event_that_never_comes_is_an_error():
    with pytest.raises(SolverError, match=r"max_num_steps"):
        odeint(seasonal, random(2), times(0, 1), event_fn=lambda t, y: y[0] + 9, options={"max_num_steps": 200})
    with pytest.raises(SolverError, match=r"no event was found between t=0 and t=.*event_fn has not changed its sign"):
        odeint(lambda t, y: 0 * y, random(2), times(0, 1), event_fn=lambda t, y: y[0] + 9)
