"""Tolerances, options and errors of odeint: what is understood, and what is refused by name."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import skode.solver
from skode.exceptions import FieldError, SolverError
from skode.solver import odeint, odeint_adjoint
from tests.solver.compat_cases import F64, Net, n_evals, random, seasonal, seasonal_solution, times

# --- tolerances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_tolerances_may_differ_between_components(name):
    y0 = torch.ones(2, 3, dtype=F64)
    other = {"rtol": "atol", "atol": "rtol"}[name]
    few, all_, rows = (
        n_evals(y0, **{name: tolerance, other: 1e-12})
        for tolerance in (1e-3, torch.full((2, 3), 1e-10), torch.tensor([[1e-10], [1e-3]]))
    )
    assert few < rows <= all_ == n_evals(y0, **{name: 1e-10, other: 1e-12})


def test_tuples_take_one_tolerance_a_part():
    y0 = (torch.ones((), dtype=F64), torch.ones(2, dtype=F64))

    def field(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return seasonal(t, y[0]), seasonal(t, y[1])

    strict = n_evals(y0, field, rtol=1e-9, atol=1e-9)
    assert n_evals(y0, field, rtol=(1e-9, 1e-3), atol=(1e-9, 1e-3)) <= strict
    assert n_evals(y0, field, rtol=(1e-3, torch.tensor([1e-3, 1e-9])), atol=1e-12) > n_evals(y0, field, rtol=1e-3)
    assert n_evals(y0, field, rtol=torch.tensor([1e-9, 1e-9]), atol=[1e-9, 1e-9]) == strict


def test_complex_states_take_a_tolerance_for_each_entry():
    y0 = torch.ones(2, dtype=torch.complex128)
    assert n_evals(y0, rtol=torch.tensor([1e-9, 1e-9]), atol=1e-9) == n_evals(y0, rtol=1e-9, atol=1e-9)


def test_a_tuple_is_judged_by_its_worst_part():
    """Parts that do not move must not hide the error of those that do."""
    y0 = random(2)
    idle = torch.zeros(10_000, dtype=F64)

    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return seasonal(t, y[0]), torch.zeros_like(y[1])

    assert n_evals((y0, idle), field) == n_evals(y0)


# --- options -----------------------------------------------------------------------------------------------------


class Clock:
    """Remembers the times at which a field was asked."""

    def __init__(self, field: Any = seasonal) -> None:
        self.field, self.times = field, list[float]()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t))
        return self.field(t, y)


def test_the_norm_takes_a_state_like_the_initial_one():
    seen = []

    def norm(state: Any) -> Tensor:
        seen.append(state)
        return state.abs().max() if isinstance(state, Tensor) else state[0].abs().max()

    y0 = random(2, 3, dtype=torch.complex128)
    odeint(seasonal, y0, times(0, 1), options={"norm": norm})
    assert {(x.shape, x.dtype) for x in seen} == {((2, 3), torch.complex128)}
    seen.clear()
    odeint(lambda t, y: (-y[0], -y[1]), (random(), random(2, 3)), times(0, 1), options={"norm": norm})
    assert {tuple(part.shape for part in state) for state in seen} == {((), (2, 3))}


def test_a_larger_norm_makes_smaller_steps():
    few, many = (n_evals(random(3), options={"norm": lambda x, c=c: c * x.abs().max()}) for c in (1, 1000))
    assert many > 1.5 * few


def test_the_norm_may_leave_parts_out():
    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return seasonal(t, y[0]), torch.cos(30 * t) + 0 * y[1]

    y0 = (random(2), random(2))
    judged = n_evals(y0, field, options={"norm": lambda y: y[0].square().mean().sqrt()})
    assert judged == n_evals(y0[0]) < n_evals(y0, field)


def test_max_step_bounds_the_steps():
    field = Clock()
    y = odeint(field, random(2), times(0, 3), rtol=1e-2, atol=1e-2, options={"max_step": 0.01})
    assert len(field.times) >= 6 * 300
    torch.testing.assert_close(y[1], seasonal_solution(random(2), times(0, 3))[1], rtol=1e-9, atol=1e-9)
    free = n_evals(random(2), rtol=1e-2, atol=1e-2)
    assert n_evals(random(2), rtol=1e-2, atol=1e-2, options={"max_step": math.inf}) == free


def test_min_step_is_taken_whatever_its_error():
    assert n_evals(random(2), rtol=1e-12, atol=1e-12, options={"min_step": 0.5}) < 60


def test_first_step_is_the_first_that_is_tried():
    field = Clock()
    odeint(field, random(2), times(0, 3), options={"first_step": torch.tensor(0.01)})
    assert field.times[1] == pytest.approx(0.01 / 5)


def test_max_num_steps_is_for_each_output_interval():
    t = torch.linspace(0, 3, 11, dtype=F64)
    torchdiffeq.odeint(seasonal, random(2), t, options={"max_num_steps": 20})
    odeint(seasonal, random(2), t, options={"max_num_steps": 20})
    with pytest.raises(SolverError, match=r"max_num_steps .* options=\{'max_num_steps': ...\}"):
        odeint(seasonal, random(2), times(0, 3), options={"max_num_steps": 3})


def jumping(t: Tensor, y: Tensor) -> Tensor:
    """Jumps at t = 1."""
    return torch.where(t < 1, -y, 1 + 0 * y)


@pytest.mark.parametrize("ends", [(0, 2), (2, 0)], ids=["ascending", "descending"])
def test_jump_t_takes_the_solve_over_a_jump(ends):
    y0 = random(2)
    y = odeint(jumping, y0, times(*ends), options={"jump_t": torch.tensor([1.0])})
    exact = y0 * math.exp(-1) + 1 if ends == (0, 2) else (y0 - 1) * math.e
    torch.testing.assert_close(y[1], exact, rtol=1e-6, atol=1e-6)
    assert n_evals(y0, jumping, times(*ends), options={"jump_t": [1.0]}) < n_evals(y0, jumping, times(*ends)) / 2


@pytest.mark.parametrize("ends", [(0, 2), (2, 0)], ids=["ascending", "descending"])
def test_steps_end_at_step_t(ends):
    field = Clock(lambda t, y: -y * torch.abs(t - 1))
    y0 = random(2)
    y = odeint(field, y0, times(*ends), options={"step_t": times(1)})
    assert min(abs(t - 1) for t in field.times) < 1e-12
    torch.testing.assert_close(y[1], y0 * math.exp(ends[0] - 1), rtol=1e-6, atol=1e-6)


def test_a_jump_is_evaluated_on_either_side_but_never_on_it():
    field = Clock(jumping)
    odeint(field, random(2), times(0, 2), options={"jump_t": [1.0]})
    assert 1.0 not in field.times
    assert any(0 < 1 - t < 1e-12 for t in field.times) and any(0 < t - 1 < 1e-12 for t in field.times)


@pytest.mark.parametrize("name", ["step_t", "jump_t"])
def test_stops_outside_of_the_interval_have_no_effect(name):
    plain = odeint(seasonal, random(2), times(0, 2))
    told = odeint(seasonal, random(2), times(0, 2), options={name: times(-1, 5)})
    assert torch.equal(plain, told)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.5}], ids=["times", "step_size"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "rk4"])
def test_perturb_sees_a_jump_from_either_side(method, options):
    options = {**options, "perturb": True}
    ours, theirs = (
        api.odeint(jumping, random(2), times(0, 0.5, 1, 1.5, 2), method=method, options=options)
        for api in (skode.solver, torchdiffeq)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"safety": 0.9, "ifactor": 10, "dfactor": 0.2},
        {"dtype": torch.float64},
        {"dtype": torch.float32},
        {"norm": None},
    ],
)
def test_options_that_say_what_is_done_anyway_are_understood(options):
    assert torch.equal(
        odeint(seasonal, random(2), times(0, 1), options=options), odeint(seasonal, random(2), times(0, 1))
    )


def test_options_are_not_changed():
    options = {"step_size": 0.1, "interp": None}
    odeint(seasonal, random(2), times(0, 1), method="rk4", options=options)
    assert options == {"step_size": 0.1, "interp": None}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver", "implicit_euler", "radauIIA5", "trapezoid"],
)
@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_methods_that_are_not_here_are_refused_by_name(method, solver):
    with pytest.raises(ValueError, match=rf"method='{method}' .* is not supported; use 'dopri5'"):
        solver(Net(), random(2), times(0, 1), method=method)


def test_unknown_methods_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'dopri4' is unknown; use one of .*'dopri5'"):
        odeint(seasonal, random(2), times(0, 1), method="dopri4")


def test_every_method_of_torchdiffeq_is_known_or_refused():
    for method in sys.modules["torchdiffeq._impl.odeint"].SOLVERS:
        try:
            odeint(seasonal, random(2), times(0, 0.1), method=method, rtol=1e-3)
        except ValueError as error:
            assert f"method={method!r} (" in str(error)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (None, {"first_stepp": 0.1}, r"options\['first_stepp'\] is unknown; method='dopri5' takes first_step,"),
        (None, {"frist": None}, r"options\['frist'\] is unknown"),
        ("bosh3", {"step_size": 0.1}, "'step_size'.* goes with fixed-step methods; method='bosh3' takes first_step"),
        ("rk4", {"max_num_steps": 9}, "'max_num_steps'.* goes with adaptive methods; method='rk4' takes step_size"),
        ("rk4", {"step_size": 0.1, "grid_constructor": len}, "both step_size and grid_constructor"),
        ("rk4", {"step_size": -0.1}, r"options\['step_size'\]=-0.1 must be positive"),
        ("rk4", {"interp": "spline"}, r"options\['interp'\]='spline' is unknown; use 'linear' or 'cubic'"),
        ("rk4", {"grid_constructor": lambda f, y, t: t[:-1]}, "must return times from t.0. to t.-1."),
        ("rk4", {"grid_constructor": lambda f, y, t: t[[0, 1, 0, 2]]}, "ascending or descending"),
        ("rk4", {"grid_constructor": lambda f, y, t: t[[0, 1, 1, 2]]}, "equal times"),
        (None, {"safety": 0.8}, r"options\['safety'\]=0.8 is not supported: it is 0.9"),
        (None, {"ifactor": torch.tensor(2.0)}, r"options\['ifactor'\].* it is 10.0"),
        (None, {"dtype": torch.float16}, r"options\['dtype'\]=torch.float16 is not supported"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_by_name(method, options, message):
    with pytest.raises(ValueError, match=message):
        odeint(seasonal, random(2), times(0, 0.5, 1), method=method, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adjoint_options": {"norm": lambda x: x}}, r"adjoint_options\['norm'\] may be 'seminorm' only"),
        ({"adjoint_options": {"max_step": 0.1}}, r"adjoint_options\['max_step'\]=0.1 differs from options \(None\)"),
        ({"adjoint_method": "rk4"}, "adjoint_method='rk4' takes fixed steps"),
        ({"adjoint_method": "bosh3", "options": {"max_step": 0.1}}, "give adjoint_options, too"),
        ({"adjoint_method": "scipy_solver"}, "'scipy_solver'"),
    ],
)
def test_adjoint_arguments_that_cannot_be_kept_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        odeint_adjoint(Net(), random(2), times(0, 1), **arguments)


@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step", "callback_reject_step_adjoint"])
def test_callbacks_are_refused_by_name(name):
    class Watched(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

    setattr(Watched, name, lambda self, t0, y0, dt: None)
    with pytest.raises(ValueError, match=f"Watched.{name} would not be called"):
        odeint(Watched(), random(2), times(0, 1))


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y0", "value", "message"),
    [
        (random(3, 2), random(2, 3), r"shape \(2, 3\) for a state of shape \(3, 2\)"),
        (random(2), random(3), r"shape \(3,\) for a state of shape \(2,\)"),
        (random(2), None, r"field growth returned NoneType; .* shape \(2,\)"),
        (random(2), random(2, dtype=torch.complex128), "complex derivative of a real state"),
        ((random(2), random(3)), (random(2),), r"a tuple of 1 \(Tensor\); .* shapes \(\(2,\), \(3,\)\)"),
        ((random(2), random(3)), random(5), r"returned Tensor; it must return a tuple"),
        ((random(2), random(3)), (random(2), 1.0), r"a tuple of 2 \(Tensor, float\)"),
    ],
)
def test_wrong_derivatives_are_named(y0, value, message):
    def growth(t: Tensor, y: Any) -> Any:
        return value

    with pytest.raises(FieldError, match=message):
        odeint(growth, y0, times(0, 1))


@pytest.mark.parametrize(
    ("y0", "message"),
    [
        ([1.0, 2.0], r"got a list of 2 \(float, float\)"),
        (1.0, "got float"),
        ((), "got a tuple of 0"),
        ((random(2), 1.0), r"\(Tensor, float\)"),
        (torch.ones(2, dtype=torch.int64), r"torch.int64: call y0.float\(\)"),
        (torch.ones(2, dtype=torch.bool), "torch.bool"),
    ],
)
def test_wrong_initial_states_are_named(y0, message):
    with pytest.raises(FieldError, match=message):
        odeint(seasonal, y0, times(0, 1))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (times(), r"1-D with at least one time; got shape \(0,\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.zeros(2, 2), r"got shape \(2, 2\)"),
        (times(0, 2, 1), r"ascending or descending; got \[0.0, 2.0, 1.0\]"),
        (times(0, math.nan), "finite"),
        (times(0, math.inf), "finite"),
    ],
)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_wrong_times_are_named(t, message, method):
    with pytest.raises(ValueError, match=message):
        odeint(seasonal, random(2), t, method=method)


@pytest.mark.parametrize(
    ("y0", "rtol", "message"),
    [
        (random(2), torch.ones(3), r"rtol of shape \[\(3,\)\] does not fit y0 of shape \[\(2,\)\]"),
        ((random(2), random(3)), (1e-3,), "rtol has 1 entries for the 2 parts of y0"),
        ((random(2), random(3)), (1e-3, torch.ones(2)), "does not fit"),
        (random(2), torch.ones(2, requires_grad=True), r"rtol.detach\(\)"),
    ],
)
def test_wrong_tolerances_are_named(y0, rtol, message):
    with pytest.raises(ValueError, match=message):
        odeint(lambda t, y: y, y0, times(0, 1), rtol=rtol)


def test_a_failed_solve_says_where_and_what_to_change():
    def explosion(t: Tensor, y: Tensor) -> Tensor:
        return y**2

    with pytest.raises(
        SolverError, match=r"explosion: the solve stopped at t=1 after \d+ accepted and \d+ rejected steps, "
    ):
        odeint(explosion, torch.ones(1, dtype=F64), times(0, 2))


def test_fixed_steps_that_leave_the_finite_numbers_are_an_error():
    with pytest.raises(SolverError, match="NaN or infinite"):
        odeint(lambda t, y: y**2, torch.ones(1), torch.linspace(0, 100, 50), method="euler")
