"""Reversible steps: their map, its exact gradient, and what is said when the way back is lost."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import ConvergenceWarning
from skode.fields import MLPField
from skode.solver import METHODS, BatchControl, Solution, Status, solve
from skode.solver.reversible import ReversibleGradient
from skode.solver.tableau import Tableau
from tests.problems import PROBLEMS, Field, Plain, Recorded, column, mlp_field, random_states, rows, times
from tests.solver.gradient_helpers import loss_of

COUPLING = 0.95
OWN = ReversibleGradient(coupling=COUPLING)
NAN = math.nan
EXPLICIT = [name for name, tableau in METHODS.items() if not tableau.implicit]

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_kernels = pytest.mark.parametrize("wrap", [lambda field: field, Plain], ids=["own kernel", "tapes"])


class Wiggle(nn.Module):
    """Depends on the time, and adaptive steps are rejected on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(times(2.0))
        self.mix = nn.Parameter(rows((0.2, -1.0), (1.0, 0.1)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.mix - self.rate * torch.tanh(y - torch.cos(9 * t)) * (1 + 4 * torch.sin(9 * t) ** 2) / 4


# --- the map once more, in plain torch -----------------------------------------------------------------------------


def increment(field: Field, tableau: Tableau, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What a step of the method adds to x."""
    h, K = end - start, []
    for c, a in zip(tableau.c, ((), *tableau.a), strict=True):
        Y = x + h * sum((weight * k for weight, k in zip(a, K, strict=True)), torch.zeros_like(x))
        K.append(field((start + c * h).view(1, 1), Y))
    return h * sum(weight * k for weight, k in zip(tableau.b, K, strict=True))


FieldOfStep = Callable[[float, float], Field]


def replica_of_row(field_of: FieldOfStep, method: str, y: Tensor, t: Tensor, ends: Sequence[float]) -> Tensor:
    """States (m, d) of a row that starts as y (1, d); of equal times, but for t0, the last one is the steps' end."""
    tableau, values = METHODS[method], t.tolist()
    place = {value: index for index, value in enumerate(values)} | {values[0]: 0}
    knots = [t[place[end]] if end in place else torch.tensor(end, dtype=t.dtype) for end in ends]
    z, states = y, {ends[0]: y}
    for (first, last), (start, end) in zip(pairwise(ends), pairwise(knots), strict=True):
        field = field_of(first, last)
        y = COUPLING * y + (1 - COUPLING) * z + increment(field, tableau, z, start, end)
        z = z - increment(field, tableau, y, end, start)
        states[last] = y
    outputs = []
    for value, time in zip(values, t, strict=True):
        knot, state = t[place[value]], states[value]
        moved = (time - knot) * field_of(value, value)(knot.view(1, 1), state) if time is not knot else 0.0
        outputs.append(state + moved)
    return torch.cat(outputs)


def replica(field_of: FieldOfStep, method: str, y0: Tensor, t: Tensor, solution: Solution) -> Tensor:
    """The solve's states (n, m, d), by the map's definition with the solve's accepted steps."""
    states = []
    for i, ends in enumerate(solution.steps.t.tolist()):
        own = t if t.dim() == 1 else t[i]
        kept = own[: int((~own.isnan()).sum())]
        path = replica_of_row(field_of, method, y0[i : i + 1], kept, [end for end in ends if end == end])
        states.append(torch.cat([path, path.new_full((len(own) - len(kept), y0.shape[1]), NAN)]))
    return torch.stack(states)


def assert_replicated(
    field: nn.Module, y0: Tensor, t: Tensor, method: str, field_of: FieldOfStep | None = None, **options: Any
) -> Solution:
    """States and gradients to states, times and parameters are those of the replica."""
    inputs = [y0.clone().requires_grad_(), t.clone().requires_grad_(), *field.parameters()]
    solution = solve(field, inputs[0], inputs[1], method=method, gradient=OWN, **options)
    expected = replica(field_of or (lambda start, end: field), method, inputs[0], inputs[1], solution)
    torch.testing.assert_close(solution.y, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
    found = torch.autograd.grad(loss_of(solution.y), inputs)
    for own, other in zip(found, torch.autograd.grad(loss_of(expected), inputs), strict=True):
        torch.testing.assert_close(own.nan_to_num(), other.nan_to_num(), rtol=1e-9, atol=1e-9)
    return solution


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EXPLICIT)
@with_both_controls
@with_both_kernels
def test_states_and_gradients_are_those_of_the_maps_definition(method, control, wrap):
    field, y0 = wrap(mlp_field(0)), random_states(1, 4)
    options = {"rtol": 1e-3, "atol": 1e-3} if METHODS[method].adaptive else {"step_size": 0.05}
    assert_replicated(field, y0, times(0.0, 0.4, 1.0), method, step_control=control, **options)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "rk4"])
@with_both_controls
def test_output_times_going_down_and_equal_ones_have_their_gradients(method, control):
    t = times(1.5, 1.5, 1.2, 0.7, 0.7, 0.1, 0.1)
    assert_replicated(mlp_field(2), random_states(3, 3), t, method, step_control=control, rtol=1e-5, atol=1e-5)


@with_both_kernels
def test_rows_have_times_of_their_own(wrap):
    t = rows(
        (0.0, 0.4, 0.4, 1.3), (2.0, 1.1, 0.3, NAN), (0.5, 0.5, 0.5, 0.5), (-1.0, -1.0, 0.2, 0.2), (0.3, NAN, NAN, NAN)
    )
    assert_replicated(wrap(mlp_field(4)), random_states(5, 5), t, "tsit5", rtol=1e-5, atol=1e-5)


@with_both_controls
def test_rejected_steps_leave_no_trace_in_the_gradient(control):
    options = {"step_control": control, "first_step": 0.6, "rtol": 1e-4, "atol": 1e-4}
    y0 = rows((0.3, -1.0), (2.0, 1.0), (-0.4, 0.2))
    solution = assert_replicated(Wiggle(), y0, times(0.0, 0.7, 1.5), "bosh3", **options)
    assert bool((solution.n_rejected > 0).any())


@with_both_controls
def test_step_times_are_landed_on_and_are_not_outputs(control):
    options = {"step_control": control, "step_times": [0.25, 0.8], "rtol": 1e-4, "atol": 1e-4}
    solution = assert_replicated(mlp_field(6), random_states(7, 3), times(0.0, 0.5, 1.0), "tsit5", **options)
    assert {0.25, 0.5, 0.8} <= set(solution.steps.t[0].tolist())


class Jump(nn.Module):
    """Changes its sign at t = 0.6."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp_field(8)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 0.6, 0.5, -1.0) * self.inner(t, y)


@with_both_controls
@pytest.mark.parametrize("ends", [(0.0, 0.3, 1.0), (1.0, 0.3, 0.0)], ids=["up", "down"])
@pytest.mark.parametrize("method", ["tsit5", "midpoint"])
def test_both_halves_of_a_step_keep_to_their_side_of_a_jump(control, ends, method):
    field = Jump()

    def field_of(start: float, end: float) -> Field:
        return lambda t, y: (0.5 if (start + end) / 2 < 0.6 else -1.0) * field.inner(t, y)

    options = {"step_control": control, "jump_times": [0.6], "rtol": 1e-4, "atol": 1e-4}
    assert_replicated(field, random_states(9, 3), times(*ends), method, field_of, **options)


@with_both_controls
def test_the_gradient_at_tight_tolerance_is_the_exact_one(control):
    field, y0 = mlp_field(10), random_states(11, 6)
    found = []
    for gradient in ("reversible", "discrete"):
        inputs = [y0.clone().requires_grad_(), times(0.0, 0.7, 1.5).requires_grad_(), *field.parameters()]
        solution = solve(field, inputs[0], inputs[1], gradient=gradient, step_control=control, rtol=1e-10, atol=1e-10)
        found.append(torch.autograd.grad(loss_of(solution.y), inputs))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-7)


def test_the_graph_can_be_gone_back_through_twice():
    field, y0 = mlp_field(0), random_states(1, 3).requires_grad_()
    y1 = solve(field, y0, [0.0, 1.0], gradient="reversible").y1
    first = torch.autograd.grad(y1.sum(), y0, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y1.sum(), y0)[0], first, rtol=0, atol=0)


@pytest.mark.parametrize("n", [3, 40])
def test_float32_gradients_are_those_of_float64_to_rounding(n):
    field, y0 = mlp_field(12), random_states(13, n)
    found = []
    for dtype in (torch.float32, torch.float64):
        own = Plain(field.to(dtype))
        inputs = [y0.to(dtype).requires_grad_(), *own.parameters()]
        options = {"method": "rk4", "step_size": 0.05, "gradient": "reversible"}
        solution = solve(own, inputs[0], [0.0, 0.5, 1.0], **options)
        found.append([g.double() for g in torch.autograd.grad(solution.y.square().sum(), inputs)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


# --- the map -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EXPLICIT)
def test_the_map_has_its_methods_order(method):
    problem, order = PROBLEMS["oscillator"], METHODS[method].order
    t = times(problem.t0, problem.t0 + 1.0)
    errors = []
    for n_steps in (16, 32) if order < 4 else (6, 12) if order < 8 else (2, 4):
        options: dict[str, Any] = {"step_size": 1 / n_steps}
        if METHODS[method].adaptive:
            options = {"first_step": 1 / n_steps, "max_step": 1 / n_steps, "rtol": 1e3, "atol": 1e3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            y1 = solve(problem.field, problem.y0, t, method=method, gradient="reversible", **options).y1
        errors.append(float((y1 - problem.solution(t)[:, 1]).norm()))
    assert math.log2(errors[0] / errors[1]) > order - 0.1


@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.3, 1.0]])
def test_values_do_not_depend_on_the_grad_mode(control, t):
    field, y0 = mlp_field(0), random_states(1, 3)
    options = {"gradient": "reversible", "step_control": control}
    traced = solve(field, y0, t, **options)
    with torch.no_grad():
        plain = solve(field, y0, t, **options)
    assert traced.y.requires_grad and not plain.y.requires_grad
    assert torch.equal(traced.y.detach(), plain.y)
    assert not torch.equal(plain.y, solve(field, y0, t, step_control=control).y)


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "rk4", "bosh3"])
def test_evaluations_are_counted_and_stay_inside_of_the_interval(control, method):
    field = Recorded(mlp_field(0))
    options = {"gradient": "reversible", "step_control": control, "method": method}
    y0 = random_states(1, 1).requires_grad_()
    solution = solve(field, y0, [0.1, 0.4, 1.3], **options)
    assert int(solution.n_evals) == field.n_calls
    solution.y.sum().backward()
    asked = torch.cat(field.times)
    assert float(asked.min()) >= 0.1 and float(asked.max()) <= 1.3


# --- rows ----------------------------------------------------------------------------------------------------------


@with_both_kernels
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_rows_that_finish_early_or_are_rejected_do_as_they_do_alone(wrap, method):
    field, y0 = wrap(mlp_field(0)), random_states(1, 4) * times(0.1, 1.0, 3.0, 9.0).view(-1, 1)
    t = rows((0.0, 0.05), (0.0, 1.0), (1.0, -1.0), (0.0, 2.5))
    options = {"gradient": "reversible", "method": method, "rtol": 1e-6, "atol": 1e-6}
    if method == "rk4":
        options["step_size"] = 0.1

    def solved(rows_: slice) -> tuple[Tensor, Tensor]:
        start = y0[rows_].clone().requires_grad_()
        y = solve(field, start, t[rows_], **options).y
        return y.detach(), torch.autograd.grad(y.square().sum(), start)[0]

    together = solved(slice(0, 4))
    for i in range(4):
        for joint, alone in zip(together, solved(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(joint[i : i + 1], alone, rtol=1e-12, atol=1e-12)


class Cliff(nn.Module):
    """Becomes NaN where the first component passes 1.5."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y[:, :1] > 1.5, NAN, 1.0) * self.inner(t, y) + 3.0


@pytest.mark.parametrize(
    ("field", "start"),
    [(Cliff(mlp_field(0)), 1.0), (Cliff(mlp_field(0)), NAN), (mlp_field(0), NAN)],
    ids=["tapes, on the way", "tapes, at the start", "own kernel, at the start"],
)
def test_a_row_that_fails_keeps_what_it_reached_and_leaves_the_others_alone(field, start):
    good, bad = rows((-3.0, 0.1), (-2.5, 0.4)), rows((start, 0.3))
    t = times(0.0, 0.05, 1.0)
    found = []
    for y0 in (torch.cat([good[:1], bad, good[1:]]), good):
        y0 = y0.clone().requires_grad_()
        solution = solve(field, y0, t, gradient="reversible")
        gradients = torch.autograd.grad(solution.y.nansum(), [y0, *field.parameters()])
        found.append((solution, gradients))
    (solution, (g, *parameters)), (alone, (g_alone, *parameters_alone)) = found
    assert solution.status.tolist() == [0, Status.NON_FINITE, 0]
    torch.testing.assert_close(solution.y[[0, 2]], alone.y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g[[0, 2]], g_alone, rtol=1e-12, atol=1e-12)
    assert bool(solution.y[1, 2].isnan().all())
    assert bool(torch.cat([x.reshape(-1) for x in parameters]).isfinite().all())
    if start != start:
        for own, other in zip(parameters, parameters_alone, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    else:
        assert bool(solution.y[1, 1].isfinite().all()) and bool(g[1].isfinite().all())


@with_both_controls
def test_a_step_is_not_taken_if_only_its_second_half_meets_infinity(control):
    # The midpoint method does not ask the field where its step ends, but the way back from there does.
    y0 = column(0.0).requires_grad_()
    solution = solve(
        lambda t, y: torch.where(y > 0.5, math.inf, 1.0) + 0 * y,
        y0,
        [0.0, 0.2, 0.7],
        method="adaptive_midpoint",
        gradient="reversible",
        step_control=control,
    )
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert 0.2 < float(solution.t_reached) <= 0.5
    torch.testing.assert_close(solution.y[:, 1], y0 + 0.2)
    assert float(torch.autograd.grad(solution.y[:, 1].sum(), y0)[0]) == pytest.approx(1.0)


def test_with_shared_fixed_steps_a_row_that_fails_gives_no_gradient():
    field, y0 = Cliff(mlp_field(0)), rows((-3.0, 0.1), (1.0, 0.3)).requires_grad_()
    solution = solve(field, y0, [0.0, 1.0], method="rk4", step_control="batch", gradient="reversible")
    assert solution.status.tolist() == [0, Status.NON_FINITE]
    gradients = torch.autograd.grad(solution.y1.nansum(), [y0, *field.parameters()])
    alone = y0[:1].detach().requires_grad_()
    y1 = solve(field, alone, [0.0, 1.0], method="rk4", step_control="batch", gradient="reversible").y1
    expected = torch.autograd.grad(y1.sum(), [alone, *field.parameters()])
    assert not bool(gradients[0][1].any())
    torch.testing.assert_close(gradients[0][:1], expected[0], rtol=1e-12, atol=1e-12)
    for own, other in zip(gradients[1:], expected[1:], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_when_all_rows_fail_at_the_start_gradients_are_zero():
    field = mlp_field(0)
    y0 = torch.full((2, 2), NAN, dtype=torch.float64, requires_grad=True)
    solution = solve(field, y0, [0.0, 1.0], gradient="reversible")
    gradients = torch.autograd.grad(solution.y[:, 1].nansum(), [y0, *field.parameters()])
    assert all(not bool(g.any()) for g in gradients)


def test_no_rows_have_no_states():
    assert solve(mlp_field(0), torch.zeros(0, 2).double(), [0.0, 0.5, 1.0], gradient="reversible").y.shape == (0, 3, 2)


class OwnRows(nn.Module):
    """Holds a number for each row, so that it cannot be asked for more rows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(-1, 1, n).unsqueeze(1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rates * y


def test_a_field_with_numbers_for_each_row_is_solved():
    field = OwnRows(3)
    y1 = solve(field, torch.ones(3, 1), [0.0, 1.0], gradient="reversible", rtol=1e-6, atol=1e-6).y1
    torch.testing.assert_close(y1, field.rates.exp(), rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(y1.sum(), field.rates)[0]
    torch.testing.assert_close(gradient, field.rates.exp(), rtol=1e-5, atol=1e-5)


# --- memory --------------------------------------------------------------------------------------------------------


def held_bytes() -> int:
    """Of all tensors that Python can see."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some objects for their class warns
        found = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


@with_both_controls
@with_both_kernels
def test_nothing_but_the_step_sizes_grows_with_the_number_of_steps(control, wrap):
    n, d = 16, 32
    generator = torch.Generator().manual_seed(0)
    field = wrap(MLPField(d, (16,), generator=generator))
    y0 = torch.randn(n, d, generator=generator)

    def held(n_steps: int) -> int:
        before = held_bytes()
        options = {"method": "rk4", "step_size": 1 / n_steps, "step_control": control, "gradient": "reversible"}
        solution = solve(field, y0, [0.0, 1.0], **options)
        assert solution.y1.requires_grad
        return held_bytes() - before

    held(2)  # fills the pool of memory that is used again
    few, some, many = held(10), held(100), held(1000)
    # A time and a length a step and row, and whether it counted; a state would be 128 bytes.
    per_step = 0 if control == "batch" else n * (8 + 4 + 1)
    assert some - few <= 90 * per_step
    assert many - few <= 990 * per_step


# --- what is said --------------------------------------------------------------------------------------------------


def decaying(rate: float, dtype: torch.dtype) -> nn.Module:
    field = nn.Linear(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        field.weight.fill_(-rate)
    return Timeless(field)


class Timeless(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(y)


@with_both_controls
def test_a_lost_way_back_is_told_with_numbers(control):
    field, y0 = decaying(1.0, torch.float64), column(1.0, 2.0)
    strategy = ReversibleGradient(coupling=0.5)
    solution = solve(field, y0, [0.0, 1.0], method="rk4", step_size=0.02, gradient=strategy, step_control=control)
    with pytest.warns(ConvergenceWarning, match=r"missed y0 .* 2 of 2 rows, by \de[+-]\d\d .*gradient='discrete'"):
        solution.y1.sum().backward()


@pytest.mark.parametrize(("rtol", "method"), [(1e-3, "tsit5"), (1e-6, "tsit5"), (1e-3, "rk4")])
@with_both_controls
def test_states_that_part_where_the_field_contracts_are_told_with_numbers(rtol, method, control):
    field, y0 = decaying(9.0, torch.float64), column(1.0)
    options = {"rtol": rtol, "atol": 0.1 * rtol} if method == "tsit5" else {"step_size": 0.05}
    with pytest.warns(ConvergenceWarning, match=r"1 of 1 rows, by \de[+-]\d\d .*row 0.*gradient='discrete'"):
        solve(field, y0, [0.0, 1.0], method=method, gradient="reversible", step_control=control, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [-3.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_nothing_is_said_of_fields_that_contract_little(dtype, rate, rtol):
    field, y0 = decaying(rate, dtype), column(1.0, -2.0).to(dtype)
    solution = solve(field, y0, [0.0, 1.0], gradient="reversible", rtol=rtol, atol=0.1 * rtol)
    solution.y1.sum().backward()
    assert solution.success


# --- arguments -----------------------------------------------------------------------------------------------------


def test_dense_output_and_error_estimates_are_refused():
    field, y0 = mlp_field(0), random_states(1, 2)
    with pytest.raises(ValueError, match=r"dense_output= does not go with gradient='reversible'.*'discrete'"):
        solve(field, y0, [0.0, 1.0], gradient="reversible", dense_output=True)
    with pytest.raises(ValueError, match="error_estimate=True needs gradient='discrete'"):
        solve(field, y0, [0.0, 1.0], gradient="reversible", error_estimate=True)


@pytest.mark.parametrize("coupling", [0.0, -1.0, 1.5, NAN])
def test_a_coupling_outside_of_its_range_is_refused(coupling):
    with pytest.raises(ValueError, match="coupling"):
        ReversibleGradient(coupling)


def test_weights_of_rows_rule_the_shared_step():
    field, y0 = Wiggle(), rows((0.3, -1.0), (2.0, 1.0))
    weights = BatchControl(weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    both = solve(field, y0, [0.0, 1.0], gradient="reversible", step_control=weights, rtol=1e-5)
    alone = solve(field, y0[:1], [0.0, 1.0], gradient="reversible", step_control="batch", rtol=1e-5)
    torch.testing.assert_close(both.y[:1], alone.y, rtol=1e-9, atol=1e-9)
