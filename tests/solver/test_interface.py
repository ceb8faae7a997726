"""What `solve` takes and gives besides times and states: tolerances, steps, strategies, dense output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skode import solver
from skode.solver import METHODS, BatchControl, Solution, Status, solve
from tests.problems import Plain, column, mlp_field, random_states, rows, times

NAN = math.nan
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
EXPLICIT = [name for name in ADAPTIVE if not getattr(METHODS[name], "gamma", 0)]
IMPLICIT = [name for name in ADAPTIVE if name not in EXPLICIT]

on_all_methods = pytest.mark.parametrize("method", METHODS)
on_adaptive_methods = pytest.mark.parametrize("method", ADAPTIVE)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def swing(t: Tensor, y: Tensor) -> Tensor:
    """Two oscillators that do not know of each other, the second one five times faster."""
    return torch.stack([y[:, 1], -y[:, 0], 5 * y[:, 3], -5 * y[:, 2]], dim=1)


def step_lengths(solution: Solution, row: int = 0) -> Tensor:
    ends = solution.steps.t[row]
    return ends[~ends.isnan()].diff().abs()


# --- a tolerance for each component ---

STARTS = rows((1.0, 0.0, 0.0, 1.0), (0.3, -1.0, 2.0, 0.5))


@on_adaptive_methods
@with_both_controls
def test_components_in_other_units_take_the_same_steps_bit_for_bit(method: str, control: str) -> None:
    # A power of two changes no digit; the absolute tolerance goes with the unit.
    unit, atol = times(2.0**20, 2.0**20, 1.0, 2.0**-14), times(1e-4, 1e-5, 1e-6, 1e-4)

    def scaled(t: Tensor, y: Tensor) -> Tensor:
        return swing(t, y / unit) * unit

    options = {"method": method, "step_control": control, "rtol": 1e-3}
    plain = solve(swing, STARTS, [0.0, 0.3, 1.0], atol=atol, **options)
    other = solve(scaled, STARTS * unit, [0.0, 0.3, 1.0], atol=atol * unit, **options)
    assert torch.equal(plain.n_steps, other.n_steps) and torch.equal(plain.n_rejected, other.n_rejected)
    assert torch.equal(plain.y * unit, other.y)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("make", [torch.tensor, lambda values, dtype: torch.tensor(values, dtype=dtype).numpy()])
def test_tolerances_go_with_their_components(name: str, make: Callable[..., Any]) -> None:
    order, values = [2, 3, 0, 1], [1e-8, 1e-8, 1e-2, 1e-2]
    other = {"atol": 0.0} if name == "rtol" else {"rtol": 0.0}

    def turned(t: Tensor, y: Tensor) -> Tensor:
        return swing(t, y[:, order])[:, order]

    first = solve(swing, STARTS, [0.0, 2.0], **{name: make(values, dtype=torch.float64)}, **other)
    values = [values[i] for i in order]
    second = solve(turned, STARTS[:, order], [0.0, 2.0], **{name: make(values, dtype=torch.float64)}, **other)
    torch.testing.assert_close(first.y1[:, order], second.y1, rtol=1e-9, atol=1e-12)
    exact = torch.stack([STARTS[:, 0] * math.cos(2) + STARTS[:, 1] * math.sin(2)])
    assert float((first.y1[:, 0] - exact).abs().max()) < 1e-6
    loose = solve(swing, STARTS, [0.0, 2.0], **{name: 1e-2}, **other)
    tight = solve(swing, STARTS, [0.0, 2.0], **{name: 1e-8}, **other)
    assert (loose.n_steps < first.n_steps).all() and (first.n_steps < tight.n_steps).all()


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [times(1e-3, 1e-3), times(1e-3, 1e-3, 1e-3, -1e-3), times(1e-3, 1e-3, 1e-3, NAN)])
def test_wrong_tolerances_of_components_are_refused(name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=name):
        solve(swing, STARTS, [0.0, 1.0], **{name: value})


# --- the length of steps ---


@on_adaptive_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [1.0, 0.0]])
def test_the_first_step_is_the_one_asked_for(method: str, control: str, t: list[float]) -> None:
    solution = solve(decay, column(1.0, 2.0), t, method=method, step_control=control, first_step=1e-3)
    for row in (0, 1):
        assert float(step_lengths(solution, row)[0]) == pytest.approx(1e-3, rel=1e-9)


@on_adaptive_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [1.0, 0.4, 0.0]])
def test_no_step_is_longer_than_max_step(method: str, control: str, t: list[float]) -> None:
    options = {"method": method, "step_control": control, "rtol": 1e-1, "atol": 1e-1}
    solution = solve(decay, column(1.0, 2.0), t, max_step=0.03, **options)
    assert solution.success
    for row in (0, 1):
        assert float(step_lengths(solution, row).max()) <= 0.03 * (1 + 1e-9)
    assert int(solution.n_steps.min()) > int(solve(decay, column(1.0, 2.0), t, **options).n_steps.max())


def test_max_step_finds_a_pulse_that_would_be_stepped_over() -> None:
    def pulse(t: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-(((t - 50) / 0.1) ** 2)) + 0 * y

    area, y0 = 0.1 * math.sqrt(math.pi), column(0.0)
    assert abs(float(solve(pulse, y0, [0.0, 100.0]).y1)) < 1e-3
    assert float(solve(pulse, y0, [0.0, 100.0], max_step=0.2).y1) == pytest.approx(area, rel=1e-2)


@on_adaptive_methods
@with_both_controls
def test_a_step_of_min_step_is_accepted_whatever_its_error(method: str, control: str) -> None:
    def wild(t: Tensor, y: Tensor) -> Tensor:
        return 20 * torch.cos(20 * t) - y

    options = {"method": method, "step_control": control, "rtol": 1e-10, "atol": 1e-10}
    solution = solve(wild, column(1.0, 2.0), [0.0, 1.0], min_step=0.05, **options)
    assert solution.success
    for row in (0, 1):
        lengths = step_lengths(solution, row)
        # What is left at the end may be shorter.
        assert float(lengths[:-1].min()) >= 0.05 * (1 - 1e-9)
        assert len(lengths) <= 21


@with_both_controls
def test_a_shortest_step_into_nan_is_still_tried(control: str) -> None:
    def late(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, NAN, -y)

    # The first try ends in NaN; a step of min_step does not.
    solution = solve(late, column(1.0), [0.0, 2.0], step_control=control, first_step=0.9, min_step=0.3)
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert float(solution.t_reached) == pytest.approx(0.3)


@with_both_controls
def test_what_is_left_is_not_shared_by_steps_shorter_than_min_step(control: str) -> None:
    options = {"first_step": 0.7, "min_step": 0.6, "rtol": 1e-10, "atol": 1e-10}
    solution = solve(decay, column(1.0, 2.0), [0.0, 1.0], step_control=control, **options)
    for row in (0, 1):
        assert step_lengths(solution, row).tolist() == pytest.approx([0.6, 0.4])


@pytest.mark.parametrize("method", EXPLICIT)
def test_min_step_does_not_accept_what_is_no_number(method: str) -> None:
    def late(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, NAN, -y)

    solution = solve(late, column(1.0), [0.0, 0.3, 1.0], method=method, min_step=0.01)
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert 0.3 < float(solution.t_reached) <= 0.5 and torch.isfinite(solution.y[:, :2]).all()


@pytest.mark.parametrize(
    "wrong", [{"min_step": 0.2, "max_step": 0.1}, {"max_step": 0.0}, {"max_step": NAN}, {"min_step": -0.1}]
)
def test_wrong_bounds_of_the_steps_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="_step"):
        solve(decay, column(1.0), [0.0, 1.0], **wrong)


# --- the steps that were taken ---


@on_all_methods
@with_both_controls
def test_the_steps_run_from_the_first_time_to_the_last(method: str, control: str) -> None:
    t = [0.3, 0.5, 1.7]
    solution = solve(mlp_field(), random_states(1, 4), t, method=method, step_control=control)
    ends = solution.steps.t
    assert ends.shape == (4, int(solution.n_steps.max()) + 1)
    for row in range(4):
        own = ends[row][~ends[row].isnan()]
        assert len(own) == int(solution.n_steps[row]) + 1
        assert own[0] == 0.3 and own[-1] == 1.7 and bool((own.diff() > 0).all())
        assert not bool(ends[row][: len(own)].isnan().any())


def test_each_row_has_its_own_steps() -> None:
    t = rows((0.0, 1.0, NAN), (2.0, 0.0, -9.0), (0.5, 0.5, 0.5), (0.0, 0.2, 3.0))
    y0 = torch.cat([random_states(2, 3), rows((NAN, 0.0))])
    solution = solve(Plain(mlp_field()), y0, t)
    ends = [row[~row.isnan()] for row in solution.steps.t]
    assert [len(row) - 1 for row in ends] == solution.n_steps.tolist()
    assert (ends[0][-1], ends[1][-1]) == (1.0, -9.0) and bool((ends[1].diff() < 0).all())
    assert ends[2].tolist() == [0.5] and ends[3].tolist() == [0.0]


# --- strategies and norms as objects ---


def test_a_strategy_may_be_an_object() -> None:
    field, found = mlp_field(), {}
    strategies = {
        "discrete": solver.DiscreteGradient(),
        "adjoint": solver.AdjointGradient(),
        "tight adjoint": solver.AdjointGradient(rtol=1e-10, atol=1e-10),
        "other adjoint": solver.AdjointGradient(method="dopri5", rtol=1e-10, atol=1e-10),
    }
    for name, strategy in [*strategies.items(), ("text", "adjoint"), ("exact", "discrete")]:
        tolerance = 1e-11 if name == "exact" else 1e-4
        y0 = random_states(3, 3).requires_grad_()
        y1 = solve(field, y0, [0.0, 2.0], gradient=strategy, rtol=tolerance, atol=tolerance).y1
        (found[name],) = torch.autograd.grad(y1.sum(), y0)
    assert torch.equal(found["adjoint"], found["text"])
    assert not torch.equal(found["tight adjoint"], found["adjoint"])
    errors = {name: float((g - found["exact"]).abs().max()) for name, g in found.items()}
    assert errors["discrete"] < 1e-2 and errors["adjoint"] < 1e-2
    torch.testing.assert_close(found["tight adjoint"], found["other adjoint"], rtol=1e-7, atol=1e-7)


def test_a_norm_of_ones_own_decides_which_steps_are_accepted() -> None:
    field, y0, t = mlp_field(), random_states(4, 5), [0.0, 2.0]
    seen = []

    def of_first_row(ratio: Tensor) -> Tensor:
        seen.append(tuple(ratio.shape))
        return ratio[0].square().mean().sqrt()

    own = solve(field, y0, t, step_control=BatchControl(norm=of_first_row))
    weighed = solve(field, y0, t, step_control=BatchControl(weights=times(1.0, 0.0, 0.0, 0.0, 0.0)))
    assert set(seen) == {(5, 2)} and own.n_steps.tolist() == weighed.n_steps.tolist()
    torch.testing.assert_close(own.y, weighed.y, rtol=1e-9, atol=1e-9)
    strict = solve(field, y0, t, step_control=BatchControl(norm=lambda ratio: 100 * ratio.abs().max()))
    assert int(strict.n_steps[0]) > int(own.n_steps[0])


# --- dense output ---


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 2.0], [2.0, 0.0]])
def test_the_derivative_is_that_of_dense_output(method: str, control: str, t: list[float]) -> None:
    field, y0, width = mlp_field(), random_states(5, 3), 1e-6
    solution = solve(field, y0, t, method=method, step_control=control, dense_output=True)
    asked = torch.linspace(0.013, 1.987, 23, dtype=torch.float64)
    slope = solution.derivative(asked)
    assert slope.shape == (3, 23, 2)
    difference = (solution.evaluate(asked + width) - solution.evaluate(asked - width)) / (2 * width)
    torch.testing.assert_close(slope, difference, rtol=1e-3, atol=1e-4)
    for end in t:
        expected = field(times(end).expand(3, 1), solution.evaluate(times(end))[:, 0]).detach()
        # Of an implicit step's last stage Newton's method leaves a small part of the tolerance.
        exactly = {"rtol": 1e-4, "atol": 2e-5} if method in IMPLICIT else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(solution.derivative(times(end))[:, 0], expected, **exactly)


def test_the_derivative_takes_times_of_each_row() -> None:
    t = rows((0.0, 1.0), (3.0, 1.0))
    solution = solve(decay, column(1.0, 2.0), t, rtol=1e-9, atol=1e-9, dense_output=True)
    asked = rows((0.7, 0.1, NAN), (1.5, 3.0, 2.0))
    exact = -torch.stack([torch.exp(-asked[0]), 2 * torch.exp(3 - asked[1])])
    torch.testing.assert_close(solution.derivative(asked)[..., 0], exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match=r"time 1\.5 \(row 0\)"):
        solution.derivative(times(1.5))
    with pytest.raises(ValueError, match="dense_output=True"):
        solve(decay, column(1.0), [0.0, 1.0]).derivative(times(0.5))


# --- states and values in unusual memory ---


def same_buffer() -> Callable[[Tensor, Tensor], Tensor]:
    """A field that writes all its values into one tensor."""
    buffers: dict[torch.Size, Tensor] = {}

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.mul(y, -1, out=buffers.setdefault(y.shape, torch.empty_like(y)))

    return field


def same_constant() -> Callable[[Tensor, Tensor], Tensor]:
    constants: dict[torch.Size, Tensor] = {}
    return lambda t, y: constants.setdefault(y.shape, torch.full_like(y, 3.0))


# Fields, and what they make of y0 (n, 2) after times t (m, 1, 1).
ODD: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "the state itself": (lambda: lambda t, y: y, lambda y0, t: y0 * torch.exp(t)),
    "a view of the state": (lambda: lambda t, y: y[:], lambda y0, t: y0 * torch.exp(t)),
    "a transposed tensor": (lambda: lambda t, y: (-y).T.contiguous().T, lambda y0, t: y0 * torch.exp(-t)),
    "an expanded tensor": (lambda: lambda t, y: t.new_full((1, 1), 2).expand_as(y), lambda y0, t: y0 + 2 * t),
    "one constant": (same_constant, lambda y0, t: y0 + 3 * t),
    "one buffer": (same_buffer, lambda y0, t: y0 * torch.exp(-t)),
}


# An implicit method differentiates the field, which a buffer does not allow.
@pytest.mark.parametrize(
    ("odd", "method"),
    [(odd, method) for odd in ODD for method in METHODS if odd != "one buffer" or method not in IMPLICIT],
)
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 0.4], [0.0, 0.2, 0.3, 0.4]])
def test_a_field_may_return_any_tensor_of_the_right_shape(odd: str, method: str, control: str, t: list[float]) -> None:
    make, exact = ODD[odd]
    options = {"rtol": 1e-5, "atol": 1e-5} if METHODS[method].adaptive else {"step_size": 0.02}
    y0 = random_states(6, 3)
    with torch.no_grad():
        solution = solve(make(), y0, t, method=method, step_control=control, **options)
    expected = exact(y0, times(*t).view(-1, 1, 1)).transpose(0, 1)
    tolerance = 0.02 if METHODS[method].order == 1 else 1e-3
    torch.testing.assert_close(solution.y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("odd", [name for name in ODD if name != "one buffer"])
@with_both_controls
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_such_a_field_has_its_gradient(odd: str, control: str, gradient: str) -> None:
    make, exact = ODD[odd]
    y0, t = random_states(7, 3).requires_grad_(), times(0.0, 0.2, 0.4).requires_grad_()
    options = {"step_control": control, "gradient": gradient, "rtol": 1e-9, "atol": 1e-9}
    found = solve(make(), y0, t, **options).y
    expected = exact(y0, (t - t[0]).view(-1, 1, 1)).transpose(0, 1)
    inputs = [y0, t]
    for own, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


@on_all_methods
@with_both_controls
def test_the_initial_state_may_lie_anywhere_in_memory(method: str, control: str) -> None:
    field, whole = mlp_field(), random_states(8, 6, 4)
    for y0 in (whole[::2, ::2], whole[:2, :3].T, whole[:1, :2].expand(3, -1)):
        kept, t = y0.clone(), [0.0, 0.3, 1.0]
        with torch.no_grad():
            found, expected = (solve(field, x, t, method=method, step_control=control).y for x in (y0, kept))
        assert torch.equal(found, expected) and torch.equal(y0, kept)


@with_both_controls
def test_a_solve_works_in_inference_mode(control: str) -> None:
    field, y0 = mlp_field(), random_states(9, 3)
    expected = solve(field, y0, [0.0, 0.3, 1.0], step_control=control).y
    with torch.inference_mode():
        found = solve(field, y0.clone(), [0.0, 0.3, 1.0], step_control=control, dense_output=True)
        assert torch.equal(found.y, expected)
        torch.testing.assert_close(found.evaluate(times(0.3))[:, 0], expected[:, 1], rtol=1e-12, atol=1e-12)
    outside = solve(field, y0.clone().requires_grad_(), [0.0, 0.3, 1.0], step_control=control).y
    outside.sum().backward()
    assert torch.equal(outside, expected)
