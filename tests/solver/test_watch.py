"""Events beside everything else: shared steps, networks' kernels, tight memory, dense output, failures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.solver import BatchControl, Event, Status, solve
from tests.problems import Plain, Recorded, column, mlp_field, random_states, rows, times

TIGHT = {"rtol": 1e-10, "atol": 1e-10}

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint"])


def clock(t: Tensor, y: Tensor) -> Tensor:
    """The state is the time."""
    return torch.ones_like(y)


def height(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0]


def difference(t: Tensor, y: Tensor) -> Tensor:
    return y[:, 0] - y[:, 1] - 0.1 * t[:, 0]


def told(field: nn.Module, y0: Tensor, t: Tensor, **options: Any) -> Tensor:
    """Events' times and states, crossings and outputs as one vector."""
    watch = [Event(difference), Event(lambda t, y: y[:, 0] + y[:, 1], terminal=False)]
    solution = solve(field, y0, t, events=watch, **options)
    assert 0 < len(torch.nonzero(solution.status == Status.EVENT)) < len(y0)
    parts = (solution.event_t, solution.event_y, solution.crossings.t, solution.crossings.y, solution.y)
    return torch.cat([part.reshape(-1) for part in parts]).nan_to_num(nan=0.0)


def weighted(found: Tensor) -> Tensor:
    """One number that tells all entries apart."""
    return (torch.linspace(-1, 2, len(found), dtype=torch.float64) * found).sum()


def everything(field: nn.Module, y0: Tensor, t: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """What is told, and its gradients."""
    y0, t = y0.clone().requires_grad_(), t.clone().requires_grad_()
    found = told(field, y0, t, **options)
    return found.detach(), list(torch.autograd.grad(weighted(found), [y0, t, *field.parameters()]))


# --- ways to compute the same ---


@with_both_gradients
@with_both_controls
@pytest.mark.parametrize("kernel", ["own", "autograd"])
@pytest.mark.parametrize("budget", [2**28, 20_000, 0])
def test_events_and_gradients_are_the_same_by_every_way(gradient: str, control: str, kernel: str, budget: int) -> None:
    field, y0, t = mlp_field(4, hidden_layer_sizes=(6,)), random_states(5, 7), times(0.0, 0.3, 1.1, 2.0)
    expected, slopes = everything(field, y0, t, **TIGHT)
    found, own = everything(
        field if kernel == "own" else Plain(field),
        y0,
        t,
        gradient=gradient,
        step_control=control,
        memory_budget=budget,
        **TIGHT,
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for a, b in zip(own, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@with_both_controls
@pytest.mark.parametrize("budget", [2**28, 0])
def test_the_discrete_gradient_is_that_of_the_numerical_map(control: str, budget: int) -> None:
    # At loose tolerances too: by finite differences of a fixed-step solve, whose steps do not move.
    field, y0, t = mlp_field(4), random_states(5, 5), times(0.0, 0.3, 1.1, 2.0)
    options = {"method": "bosh3", "first_step": 0.4, "min_step": 0.4, "max_step": 0.4}
    options |= {"step_control": control, "memory_budget": budget}
    _, slopes = everything(field, y0, t, **options)
    weights = [p.detach() for p in field.parameters()]
    for x, slope in zip([y0, *weights], [slopes[0], *slopes[2:]], strict=True):
        flat = x.view(-1)
        for k in range(0, len(flat), 3):
            kept, ends = flat[k].item(), []
            for sign in (1, -1):
                flat[k] = kept + sign * 1e-6
                with torch.no_grad():
                    ends.append(float(weighted(told(field, y0, t, **options))))
            flat[k] = kept
            own = float(slope.reshape(-1)[k])
            assert abs(own - (ends[0] - ends[1]) / 2e-6) < 2e-7 * max(1, abs(own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_members_of_an_ensemble_have_events_of_their_own(dtype: torch.dtype) -> None:
    field, y0 = mlp_field(4, n_members=3).to(dtype), random_states(6, 12).to(dtype)
    tolerances = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else TIGHT
    for control in ("row", "batch"):
        solution = solve(field, y0, [0.0, 2.0], step_control=control, events=Event(difference), **tolerances)
        plain = solve(Plain(field), y0, [0.0, 2.0], events=Event(difference), **tolerances)
        assert torch.equal(solution.event_index, plain.event_index) and int((plain.event_index == 0).sum()) > 2
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-8}
        torch.testing.assert_close(solution.event_t, plain.event_t, equal_nan=True, **close)


# --- shared steps ---


def test_rows_that_have_ended_stand_still_while_the_others_share_steps() -> None:
    seen = Recorded(lambda t, y: torch.ones_like(y) / (1 - y[:, :1]).clamp(min=0.0))
    # The first row would come to its singularity at t = 0.5.
    y0 = column(0.0, -5.0)
    solution = solve(seen, y0, [0.0, 3.0], step_control="batch", events=Event(lambda t, y: y[:, 0] - 0.5), **TIGHT)
    assert solution.status.tolist() == [Status.EVENT, 0] and solution.success
    torch.testing.assert_close(solution.event_t[:1], times(0.375), rtol=0, atol=1e-9)
    torch.testing.assert_close(solution.y1, column(0.5, 1 - math.sqrt(30)), rtol=1e-8, atol=0)
    late = [(t[0], y[0]) for t, y in zip(seen.times, seen.states, strict=True) if float(t[1]) > 1]
    assert len(late) > 6 and all(torch.equal(t, late[0][0]) and torch.equal(y, late[0][1]) for t, y in late)
    assert float(late[0][0]) < 0.5
    assert int(solution.n_steps[0]) < int(solution.n_steps[1])
    assert int(solution.n_evals[0]) < int(solution.n_evals[1]) == seen.n_calls


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_have_ended_do_not_count_for_the_others_errors(weighted: bool) -> None:
    # The hard row ends at once; from then on the steps are those of the easy one alone.
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(t[:, 0]), y[:, 2], -y[:, 2].new_tensor([900.0, 1.0]) * y[:, 1]], dim=1)

    y0 = rows((-1e-3, 1.0, 0.0), (-9.0, 1.0, 0.0))
    control = BatchControl(torch.tensor([3.0, 1.0])) if weighted else "batch"
    together = solve(field, y0, [0.0, 5.0], step_control=control, events=Event(height), rtol=1e-6, atol=1e-6)
    without = solve(field, y0, [0.0, 5.0], step_control=control, rtol=1e-6, atol=1e-6)
    assert together.status.tolist() == [Status.EVENT, 0]
    assert int(together.n_steps[1]) < int(without.n_steps[1]) / 5


def test_a_batch_whose_rows_have_all_ended_stops() -> None:
    seen = Recorded(clock)
    solution = solve(seen, column(-0.3, -0.7), [0.0, 100.0], step_control="batch", events=Event(height), max_step=0.1)
    assert solution.status.tolist() == [Status.EVENT] * 2
    assert max(float(t.max()) for t in seen.times) < 0.8


@with_both_controls
def test_a_row_may_end_by_an_event_in_its_very_last_allowed_step(control: str) -> None:
    options = {"method": "rk4", "step_size": 0.5, "max_num_steps": 2, "step_control": control}
    solution = solve(clock, column(-0.75, -0.8), [0.0, 9.0], events=Event(height), **options)
    assert solution.status.tolist() == [Status.EVENT] * 2 and solution.success
    mixed = solve(clock, column(-0.75, -3.0), [0.0, 9.0], events=Event(height), **options)
    assert mixed.status.tolist() == [Status.EVENT, Status.MAX_STEPS] and not mixed.success
    assert list(mixed.failures()) == [1]
    assert torch.isnan(mixed.y1[1]).all() and torch.isfinite(mixed.y1[0]).all()


# --- outputs ---


@with_both_controls
def test_dense_output_ends_where_the_row_ends(control: str) -> None:
    y0 = column(-0.35, -5.0)
    solution = solve(clock, y0, [0.0, 2.0], step_control=control, events=Event(height), dense_output=True)
    t = times(0.0, 0.1, 0.34, 0.36, 1.0, 2.0)
    expected = torch.where((t > 0.35) & (y0 > -1), math.nan, y0 + t)
    torch.testing.assert_close(solution.evaluate(t)[..., 0], expected, equal_nan=True)
    torch.testing.assert_close(solution.derivative(t)[..., 0], expected * 0 + 1, equal_nan=True)
    at_event = solution.evaluate(solution.event_t.nan_to_num(nan=2.0).unsqueeze(1))
    torch.testing.assert_close(at_event[0], solution.event_y[:1])
    # The last step may lead behind the event, and nothing comes after it.
    ends = solution.steps.t[0]
    ends = ends[~torch.isnan(ends)]
    assert float(ends[-2]) < 0.35 <= float(ends[-1])


@with_both_controls
def test_two_crossings_inside_of_one_step_are_found(control: str) -> None:
    events = Event(lambda t, y: (y[:, 0] - 0.3) * (y[:, 0] - 0.6), terminal=False)
    solution = solve(clock, column(0.0, 0.4), [0.0, 1.0], first_step=1.0, step_control=control, events=events)
    assert int(solution.n_steps[0]) == 1
    torch.testing.assert_close(solution.crossings.t, times(0.3, 0.6, 0.2), rtol=0, atol=1e-12)
    assert solution.crossings.row.tolist() == [0, 0, 1]


def test_a_row_goes_on_from_its_event_without_meeting_it_again() -> None:
    # The states found are zeros but for round-off, on either side.
    for dtype in (torch.float32, torch.float64):
        y0 = torch.linspace(-3, -0.1, 50).unsqueeze(1).to(dtype)
        first = solve(clock, y0, [0.0, 4.0], events=Event(height))
        t = torch.stack([first.event_t, first.event_t + 1], dim=1)
        again = solve(clock, first.event_y, t, events=Event(height))
        assert (first.status == Status.EVENT).all() and (again.status == 0).all()


def test_nothing_happens_to_rows_that_do_not_move() -> None:
    y0 = column(-1.0, 0.0)
    for t in ([0.5], [0.5, 0.5]):
        solution = solve(clock, y0, t, events=[Event(height), Event(height, terminal=False)])
        assert solution.status.tolist() == [0, 0] and len(solution.crossings.t) == 0
        assert solution.crossings.y.shape == (0, 1) and torch.equal(solution.y1, y0)
    empty = solve(clock, y0[:0], [0.0, 1.0], events=Event(height))
    assert empty.event_t.shape == (0,) and empty.event_y.shape == (0, 1)


@with_both_controls
def test_landing_on_times_and_events_go_together(control: str) -> None:
    y0 = column(-0.3, -0.5, -2.0)
    seen: list[float] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        seen.extend(t.flatten().tolist())
        return torch.where(t < 0.4, 1.0, 2.0) + 0 * y

    solution = solve(
        field, y0, [0.0, 1.0], jump_times=[0.4], step_times=[0.3], step_control=control, events=Event(height)
    )
    torch.testing.assert_close(solution.event_t, times(0.3, 0.45, math.nan), rtol=0, atol=1e-12, equal_nan=True)
    assert 0.4 not in seen


def test_squared_errors_of_a_row_are_counted_up_to_its_end() -> None:
    field, y0 = mlp_field(4), random_states(5, 7)
    for control in ("row", "batch"):
        options = {"step_control": control, "error_estimate": True}
        solution = solve(field, y0, [0.0, 9.0], events=Event(difference), **options)
        whole = solve(field, y0, [0.0, 9.0], **options)
        stopped = solution.event_index == 0
        assert (solution.error_estimate[stopped] < whole.error_estimate[stopped]).all()


# --- gradients ---


def test_parameters_of_the_event_alone_get_gradients() -> None:
    level = times(0.25).requires_grad_()
    event = Event(lambda t, y: y[:, 0] - level * torch.arange(1, 4))
    solution = solve(clock, column(0.0, 0.0, 0.0), [0.0, 2.0], events=event)
    (found,) = torch.autograd.grad((solution.event_t * times(1, 10, 100)).sum(), level)
    torch.testing.assert_close(found, times(321.0))


@with_both_gradients
def test_every_crossing_has_gradients(gradient: str) -> None:
    # y = cos(w t) crosses 0 at (k + 1/2) pi / w with the state (0, -+w).
    class Oscillator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(times(1.5))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.stack([y[:, 1], -(self.w**2) * y[:, 0]], dim=1)

    field = Oscillator()
    event = Event(height, terminal=False)
    crossings = solve(
        field, rows((1.0, 0.0)), [0.0, 9.0], gradient=gradient, events=event, rtol=1e-8, atol=1e-8
    ).crossings
    exact = (torch.arange(len(crossings.t)).double() + 0.5) * math.pi / 1.5
    assert len(crossings.t) == 4
    torch.testing.assert_close(crossings.t, exact, rtol=0, atol=1e-6)
    weights = times(1.0, -2.0, 3.0, 5.0)
    (to_t,) = torch.autograd.grad((weights * crossings.t).sum(), field.w, retain_graph=True)
    (to_y,) = torch.autograd.grad((weights * crossings.y[:, 1]).sum(), field.w)
    torch.testing.assert_close(to_t, -(weights * exact).sum(dim=0, keepdim=True) / 1.5, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        to_y, (weights * times(-1.0, 1.0, -1.0, 1.0)).sum(dim=0, keepdim=True), rtol=1e-6, atol=0
    )


def test_a_second_derivative_of_an_events_time_is_refused_rather_than_wrong() -> None:
    level = times(0.25).requires_grad_()
    solution = solve(clock, column(0.0), [0.0, 2.0], events=Event(lambda t, y: y[:, 0] - level**2))
    (first,) = torch.autograd.grad(solution.event_t.sum(), level, create_graph=True)
    torch.testing.assert_close(first.detach(), times(0.5))
    with pytest.raises(NotImplementedError, match="second derivatives of an event"):
        torch.autograd.grad(first, level)


def test_a_function_that_autograd_cannot_see_through_counts_as_flat() -> None:
    event = Event(lambda t, y: torch.from_numpy(y.detach().numpy()[:, 0] - 0.5))
    solution = solve(clock, column(0.0), [0.0, 2.0], events=event)
    torch.testing.assert_close(solution.event_t, times(0.5))
    assert solution.status.tolist() == [Status.GRAZING] and solution.success


def test_functions_may_differentiate_and_may_keep_what_they_get() -> None:
    kept: list[Tensor] = []

    def steepest(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad((x**3).sum(), x)
        kept.append(y)
        return slope[:, 0] - 3 * y[:, 0] * 0.5

    field = mlp_field(4, time_dependent=False)
    solution = solve(field, random_states(5, 7), [0.0, 2.0], events=Event(steepest))
    assert len({float(y[0, 0].detach()) for y in kept}) >= len(kept) / 3
    assert torch.isfinite(solution.y[:, 0]).all()


def test_solves_inside_inference_mode_find_events() -> None:
    with torch.inference_mode():
        solution = solve(mlp_field(4), random_states(5, 7), [0.0, 2.0], events=Event(difference))
    plain = solve(mlp_field(4), random_states(5, 7), [0.0, 2.0], events=Event(difference))
    assert torch.equal(solution.event_index, plain.event_index)
    torch.testing.assert_close(solution.event_t.clone(), plain.event_t.detach(), equal_nan=True)


# --- what is refused ---


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (3, "events must be an Event"),
        ([Event(height), height], "events must be an Event or a sequence of them; got function"),
    ],
)
def test_what_is_no_event_is_refused(events: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(clock, column(0.0), [0.0, 1.0], events=events)


def test_events_check_what_they_are_made_of() -> None:
    with pytest.raises(ValueError, match="direction=2"):
        Event(height, direction=2)
    with pytest.raises(ValueError, match="function"):
        Event(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, y: y, r"event 1 \(<lambda>\) returned torch.float64 of shape \(2, 1\)"),
        (lambda t, y: y[:, 0] > 0, "torch.bool"),
        (lambda t, y: y[:, 0].sum(), r"shape \(\)"),
        (lambda t, y: 0.5, "returned float; it must return a tensor"),
    ],
)
def test_a_functions_value_is_checked(function: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        solve(clock, column(-0.3, -0.2), [0.0, 1.0], events=[Event(height), Event(function)])
