"""Events: found where they are, in the direction asked for, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.special import ellipk
from torch import Tensor

from skode.solver import METHODS, Event, Status, solve
from tests.problems import column, mlp_field, random_states, rows, times

NAN = math.nan
G = 9.81
TIGHT = {"rtol": 1e-9, "atol": 1e-9}

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def clock(t: Tensor, y: Tensor) -> Tensor:
    """The state is the time."""
    return torch.ones_like(y)


def fall(t: Tensor, y: Tensor) -> Tensor:
    """Height and velocity."""
    return torch.stack([y[:, 1], torch.full_like(y[:, 1], -G)], dim=1)


def oscillator(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[:, 1], -y[:, 0]], dim=1)


def height(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0]


def at(level: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: y[:, 0] - level


def landing(start: Tensor, g: Tensor | float = G, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Time and velocity of a falling body's landing, in closed form."""
    speed = (start[:, 1] ** 2 + 2 * g * (start[:, 0] - floor)).sqrt()
    return (start[:, 1] + speed) / g, -speed


STARTS = rows((1.0, 0.0), (2.0, 3.0), (0.5, -4.0))


# --- where a row stops ---


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3"])
def test_a_falling_body_lands_when_it_should(method: str, control: str) -> None:
    solution = solve(fall, STARTS, [0.0, 5.0], method=method, step_control=control, events=Event(height), **TIGHT)
    when, velocity = landing(STARTS)
    torch.testing.assert_close(solution.event_t, when, rtol=0, atol=1e-7)
    torch.testing.assert_close(solution.event_y, torch.stack([0 * when, velocity], dim=1), rtol=0, atol=1e-6)
    assert solution.event_index.tolist() == [0, 0, 0]


@on_all_methods
@with_both_controls
def test_every_method_locates_an_event_inside_of_its_steps(method: str, control: str) -> None:
    # Every method solves this problem without error, so that only the location can be wrong.
    y0 = column(-0.3, -0.71, -0.002)
    solution = solve(clock, y0, [0.0, 1.0], method=method, step_control=control, events=Event(height))
    torch.testing.assert_close(solution.event_t, -y0[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.event_y, 0 * y0, rtol=0, atol=1e-6)


def test_a_row_that_an_event_stops_has_succeeded_and_has_no_later_output() -> None:
    t = times(0.0, 0.2, 0.4, 0.6, 0.9, 2.0)
    solution = solve(fall, STARTS, t, events=Event(height), **TIGHT)
    when, _ = landing(STARTS)
    assert solution.status.tolist() == [Status.EVENT] * 3
    assert solution.success and solution.failures() == {}
    torch.testing.assert_close(solution.t_reached, solution.event_t.detach())
    way = STARTS[:, :1] + STARTS[:, 1:] * t - G / 2 * t**2
    way = torch.where(t <= when.unsqueeze(1), way, NAN)
    torch.testing.assert_close(solution.y[..., 0], way, rtol=0, atol=1e-7, equal_nan=True)
    assert torch.isnan(solution.y[:, -1]).all()
    # The last state that a row reached is the one at its event.
    assert torch.equal(solution.y1, solution.event_y)


def test_rows_without_an_event_go_to_their_end() -> None:
    y0 = column(-0.4, -2.0, -5.0, 1.0)
    solution = solve(clock, y0, [0.0, 0.2, 1.0], events=Event(height))
    assert solution.status.tolist() == [Status.EVENT, 0, 0, 0]
    assert solution.event_index.tolist() == [0, -1, -1, -1]
    torch.testing.assert_close(solution.event_t, times(0.4, NAN, NAN, NAN), rtol=0, atol=1e-7, equal_nan=True)
    assert torch.isnan(solution.event_y[1:]).all()
    torch.testing.assert_close(solution.y[1:, -1], y0[1:] + 1)
    torch.testing.assert_close(solution.t_reached, times(0.4, 1, 1, 1), rtol=0, atol=1e-7)


def test_without_events_there_is_nothing_to_tell() -> None:
    solution = solve(clock, column(-0.4), [0.0, 1.0])
    assert solution.event_t is None or bool(torch.isnan(solution.event_t).all())
    assert solution.status.tolist() == [0]


@pytest.mark.parametrize("amplitude", [0.1, 1.5, 3.0])
def test_the_period_of_a_pendulum(amplitude: float) -> None:
    def swing(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[:, 1], -torch.sin(y[:, 0])], dim=1)

    # At rest at t0: that zero is none; the next upward one of the velocity is half a period away.
    y0, period = rows((amplitude, 0.0)), 4 * ellipk(math.sin(amplitude / 2) ** 2)
    turn = Event(lambda t, y: y[:, 1], direction=1)
    half = solve(swing, y0, [0.0, 30.0], events=turn, rtol=1e-11, atol=1e-11)
    assert abs(float(half.event_t) - period / 2) < 1e-8
    down = solve(swing, y0, [0.0, 30.0], events=Event(height, direction=-1), rtol=1e-11, atol=1e-11)
    assert abs(float(down.event_t) - period / 4) < 1e-8
    turn = Event(lambda t, y: y[:, 1], direction=-1)
    full = solve(swing, y0, [0.0, 30.0], events=turn, rtol=1e-11, atol=1e-11)
    assert abs(float(full.event_t) - period) < 1e-8


# --- directions, times, several events ---


@pytest.mark.parametrize(("direction", "first"), [(0, math.pi), (-1, math.pi), (1, 2 * math.pi)])
def test_a_zero_at_the_start_is_no_event(direction: int, first: float) -> None:
    # sin(t), which is 0 and rises at t0
    event = Event(height, direction=direction)
    solution = solve(oscillator, rows((0.0, 1.0)), [0.0, 10.0], events=event, **TIGHT)
    assert abs(float(solution.event_t) - first) < 1e-7
    assert len(solution.crossings.t) == 1


@pytest.mark.parametrize("first_step", [0.01, 1.9])
def test_a_throw_from_the_floor_lands_again_even_within_the_first_step(first_step: float) -> None:
    # With the long step the ball is below the floor when the first step ends.
    start = rows((0.0, G / 2))
    solution = solve(fall, start, [0.0, 2.0], events=Event(height), first_step=first_step, **TIGHT)
    assert solution.status.tolist() == [Status.EVENT]
    torch.testing.assert_close(solution.event_t, times(1.0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_crossings_in_the_direction_asked_for_are_all_told(direction: int) -> None:
    # cos(t + phase) is 0 at pi/2 + k pi - phase, falling for even k.
    phase = times(0.0, 1.0, 2.0, -0.5)
    y0 = torch.stack([torch.cos(phase), -torch.sin(phase)], dim=1)
    event = Event(height, terminal=False, direction=direction)
    solution = solve(oscillator, y0, [0.0, 12.0], events=event, **TIGHT)
    exact = [
        (row, math.pi / 2 + k * math.pi - float(shift))
        for row, shift in enumerate(phase)
        for k in range(-2, 8)
        if 0 < math.pi / 2 + k * math.pi - float(shift) < 12 and direction in (0, 2 * (k % 2) - 1)
    ]
    crossings = solution.crossings
    assert crossings.row.tolist() == [row for row, _ in exact]
    assert crossings.event.tolist() == [0] * len(exact)
    torch.testing.assert_close(crossings.t, times(*(t for _, t in exact)), rtol=0, atol=1e-6)
    torch.testing.assert_close(crossings.y[:, 0], torch.zeros(len(exact), dtype=torch.float64), rtol=0, atol=1e-6)
    assert crossings.y.shape == (len(exact), 2)
    # Nothing stops.
    assert solution.status.tolist() == [0] * 4 and torch.isnan(solution.event_t).all()
    assert solution.event_index.tolist() == [-1] * 4
    torch.testing.assert_close(solution.y1[:, 0], torch.cos(12 + phase), rtol=0, atol=1e-6)


def test_watching_an_event_that_does_not_stop_changes_no_state() -> None:
    field, y0 = mlp_field(), random_states(1, 4)
    watch = Event(lambda t, y: y[:, 0] - 0.1, terminal=False)
    plain, watched = solve(field, y0, [0.0, 0.5, 2.0]), solve(field, y0, [0.0, 0.5, 2.0], events=watch)
    torch.testing.assert_close(watched.y, plain.y, rtol=1e-12, atol=1e-12)
    assert torch.equal(watched.n_steps, plain.n_steps)


@with_both_controls
def test_descending_rows_meet_events_on_their_way(control: str) -> None:
    # From 3 down to -1: y falls along the row's way, from positive to negative.
    y0 = column(2.5, 3.5)
    for direction, found in ((0, True), (-1, True), (1, False)):
        event = Event(height, direction=direction)
        solution = solve(clock, y0, [3.0, 2.0, -1.0], step_control=control, events=event)
        assert solution.status.tolist() == [Status.EVENT if found else 0] * 2
        if found:
            torch.testing.assert_close(solution.event_t, times(0.5, -0.5), rtol=0, atol=1e-7)
            assert torch.isfinite(solution.y[:, 1]).all() and torch.isnan(solution.y[:, 2]).all()


def test_crossings_are_sorted_along_each_rows_own_way() -> None:
    y0 = torch.zeros(3, 1, dtype=torch.float64)
    t = rows((0.0, 10.0), (10.0, 0.0), (4.0, 1.0))
    ticks = Event(lambda t, y: torch.sin(math.pi * t[:, 0] + 0.5), terminal=False)
    crossings = solve(clock, y0, t, events=ticks, max_step=0.4, **TIGHT).crossings
    whole = [k - 0.5 / math.pi for k in range(1, 11)]
    expected = [whole, whole[::-1], [x for x in whole[::-1] if 1 < x < 4]]
    for row, when in enumerate(expected):
        torch.testing.assert_close(crossings.t[crossings.row == row], times(*when), rtol=0, atol=1e-7)
    assert crossings.row.tolist() == sorted(crossings.row.tolist())


def test_rows_with_their_own_times_have_their_own_events() -> None:
    y0 = column(0.0, 0.0, 0.0, 0.0)
    t = rows((0.0, 1.0, 2.0), (2.0, 1.0, 0.0), (0.0, 0.5, NAN), (5.0, 5.0, 5.0))
    # y is the time since the row's start, signed.
    solution = solve(clock, y0, t, events=Event(lambda t, y: y[:, 0].abs() - 0.75))
    torch.testing.assert_close(solution.event_t, times(0.75, 1.25, NAN, NAN), rtol=0, atol=1e-7, equal_nan=True)
    assert solution.status.tolist() == [Status.EVENT, Status.EVENT, 0, 0]
    torch.testing.assert_close(solution.y[2, :2, 0], times(0.0, 0.5))


def test_the_first_of_several_events_stops_even_within_one_step() -> None:
    events = [Event(at(0.6)), Event(at(0.3)), Event(at(0.1), terminal=False), Event(at(0.45), terminal=False)]
    y0 = column(0.0, 0.4, 0.5, 0.7)
    solution = solve(clock, y0, [0.0, 1.0], events=events, first_step=1.0)
    assert solution.event_index.tolist() == [1, 0, 0, -1]
    torch.testing.assert_close(solution.event_t, times(0.3, 0.2, 0.1, NAN), rtol=0, atol=1e-7, equal_nan=True)
    crossings = solution.crossings
    # What would come after the stop is not told.
    assert list(zip(crossings.row.tolist(), crossings.event.tolist(), strict=True)) == [
        (0, 2),
        (0, 1),
        (1, 3),
        (1, 0),
        (2, 0),
    ]
    torch.testing.assert_close(crossings.t, times(0.1, 0.3, 0.05, 0.2, 0.1), rtol=0, atol=1e-7)


def test_an_event_may_depend_on_time_alone() -> None:
    when = times(0.25, 0.5, 3.0)
    event = Event(lambda t, y: t[:, 0] - when)
    solution = solve(mlp_field(), random_states(2, 3), [0.0, 1.0], events=event)
    torch.testing.assert_close(solution.event_t, times(0.25, 0.5, NAN), rtol=0, atol=1e-9, equal_nan=True)
    with_outputs = solve(mlp_field(), random_states(2, 3), [0.0, 0.25, 0.5], **TIGHT).y
    tight = solve(mlp_field(), random_states(2, 3), [0.0, 1.0], events=event, **TIGHT)
    torch.testing.assert_close(tight.event_y[:2], torch.stack([with_outputs[0, 1], with_outputs[1, 2]]))


@on_all_methods
@pytest.mark.parametrize(("offset", "found"), [(-1e-7, True), (0.0, True), (1e-7, False)])
def test_an_event_at_the_very_end(method: str, offset: float, found: bool) -> None:
    event = Event(lambda t, y: t[:, 0] - (1.0 + offset))
    solution = solve(clock, column(0.0), [0.0, 0.4, 1.0], method=method, events=event)
    assert solution.status.tolist() == [Status.EVENT if found else 0]
    expected = times(1.0 + offset if found else NAN)
    torch.testing.assert_close(solution.event_t, expected, rtol=0, atol=1e-10, equal_nan=True)
    assert bool(torch.isnan(solution.y[:, -1]).all()) == (offset < 0)
    assert torch.isfinite(solution.y1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_event_of_a_row_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    field, y0 = mlp_field().to(dtype), random_states(3, 40).to(dtype)
    event = Event(lambda t, y: y[:, 0] - y[:, 1])
    together = solve(field, y0, [0.0, 2.0], events=event)
    assert 5 < int((together.status == Status.EVENT).sum()) < 40
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for i in range(0, 40, 3):
        alone = solve(field, y0[i : i + 1], [0.0, 2.0], events=event)
        for name in ("event_t", "event_y", "event_index", "status"):
            own, other = getattr(alone, name), getattr(together, name)[i : i + 1]
            torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- failures beside events ---


def test_failed_rows_and_stopped_rows_leave_each_other_alone() -> None:
    def mixed(t: Tensor, y: Tensor) -> Tensor:
        late = torch.where((y[:, 1:] == 1) & (t > 0.2), NAN, torch.ones_like(t))
        return torch.cat([late, torch.zeros_like(t)], dim=1)

    y0 = rows((-0.5, 0.0), (-0.5, 1.0), (-0.1, 1.0), (-2.0, 0.0), (NAN, 0.0))
    solution = solve(mixed, y0, [0.0, 1.0], events=Event(height))
    # The third row stops before its field fails.
    assert solution.status.tolist() == [Status.EVENT, Status.NON_FINITE, Status.EVENT, 0, Status.NON_FINITE]
    assert not solution.success and sorted(solution.failures()) == [1, 4]
    torch.testing.assert_close(solution.event_t, times(0.5, NAN, 0.1, NAN, NAN), rtol=0, atol=1e-7, equal_nan=True)
    assert solution.event_index.tolist() == [0, -1, 0, -1, -1]


def test_an_event_function_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"event.*\(3, 1\)"):
        solve(clock, column(-0.3, -0.2, 0.0), [0.0, 1.0], events=Event(lambda t, y: y))


# --- beside jumps and integrals ---


def test_an_event_after_a_jump_is_found() -> None:
    # Up with speed 1 until the jump, down with speed 2 after it.
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.37, 1.0, -2.0) + 0 * y

    y0 = column(0.0, 0.5)
    solution = solve(field, y0, [0.0, 2.0], jump_times=[0.37], events=Event(lambda t, y: y[:, 0] - 0.25))
    torch.testing.assert_close(solution.event_t, times(0.25, 0.37 + (0.5 + 0.37 - 0.25) / 2), rtol=0, atol=1e-7)


def test_integrals_of_a_row_that_an_event_stops_end_there() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        assert y.shape[1] == 1
        return torch.cat([torch.ones_like(y), y], dim=1)

    def crossed(t: Tensor, y: Tensor) -> Tensor:
        assert y.shape[1] == 1
        return y[:, 0] - 0.5

    solution = solve(field, column(0.0, -2.0), [0.0, 0.25, 1.0], n_quadratures=1, events=Event(crossed))
    expected = torch.stack([times(0.0, 0.03125, NAN), times(0.0, -0.46875, -1.5)])
    torch.testing.assert_close(solution.quadratures[..., 0], expected, rtol=1e-6, atol=1e-7, equal_nan=True)
