"""Gradients against finite differences of the solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.autograd import gradcheck

from skode.solver import METHODS, solve
from tests.problems import Plain, mlp_field, random_states, rows, times
from tests.solver.gradient_helpers import assert_all_close, gradients_of, loss_of, replayed_map

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


# --- where two steps are taken, whatever the states are ---


def held_steps(method: str) -> dict[str, float]:
    """Two steps, of 0.4 (or 0.5) and what is left of 1, whatever the states and parameters are."""
    if METHODS[method].implicit:
        return {"first_step": 0.5, "min_step": 0.5, "rtol": 0.0, "atol": 1e-12}
    return {"first_step": 0.4, "rtol": 0.0, "atol": 1e3} if METHODS[method].adaptive else {"step_size": 0.4}


@on_all_methods
@with_both_controls
def test_discrete_gradients_to_states_and_parameters_pass_gradcheck(method: str, control: str) -> None:
    field = mlp_field(hidden_layer_sizes=(2,))
    y0 = random_states(7, 2).requires_grad_()

    def states(y0: Tensor, *_: Tensor) -> Tensor:
        return solve(field, y0, [0.0, 0.3, 1.0], method=method, step_control=control, **held_steps(method)).y

    assert gradcheck(states, (y0, *field.parameters()))


@on_all_methods
@with_both_controls
def test_gradients_to_the_times_of_a_single_step_pass_gradcheck(method: str, control: str) -> None:
    field, y0 = mlp_field(), random_states(8, 2)
    options = {"first_step": 5.0, "rtol": 0.0, "atol": 1e3} if METHODS[method].adaptive else {"step_size": 5.0}
    if METHODS[method].implicit:
        options |= {"min_step": 5.0, "atol": 1e-12}

    def states(t: Tensor) -> Tensor:
        return solve(field, y0, t, method=method, step_control=control, **options).y

    for t in (times(0.1, 0.8), times(0.1, 0.3, 0.8), times(0.9, 0.5, 0.3)):
        assert gradcheck(states, (t.requires_grad_(),))


@pytest.mark.parametrize("method", ADAPTIVE)
@with_both_controls
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.3, 1.0]])
def test_error_estimate_passes_gradcheck(method: str, control: str, t: list[float]) -> None:
    # rtol = 0 makes the unit of the error a constant.
    field = mlp_field(hidden_layer_sizes=(2,))
    y0 = random_states(9, 2).requires_grad_()

    def estimate(y0: Tensor, *_: Tensor) -> Tensor:
        options = held_steps(method)
        solution = solve(field, y0, t, method=method, step_control=control, error_estimate=True, **options)
        assert solution.n_steps.tolist() == [2, 2] and solution.error_estimate is not None
        return solution.error_estimate * scale

    scale = 1.0
    scale = 1 / float(estimate(y0).detach().mean())
    assert gradcheck(estimate, (y0, *field.parameters()), eps=1e-3, atol=1e-4, rtol=1e-3)


@with_both_controls
def test_states_and_their_error_estimate_are_differentiated_together(control: str) -> None:
    field, y0 = mlp_field(), random_states(9, 3).requires_grad_()
    inputs = [y0, *field.parameters()]
    parts = []
    for chosen in ("states", "errors", "both"):
        solution = solve(field, y0, [0.0, 0.3, 1.0], step_control=control, error_estimate=True)
        assert solution.error_estimate is not None
        terms = {"states": loss_of(solution.y), "errors": 1e3 * solution.error_estimate.sum()}
        parts.append(gradients_of(sum(terms.values(), times(0.0)) if chosen == "both" else terms[chosen], inputs))
    states, errors, both = parts
    assert_all_close(both, [a + b for a, b in zip(states, errors, strict=True)], 1e-9)
    assert max(float(g.abs().max()) for g in errors) > 0


# --- where the steps are so short that the map and the solution are one ---

# Of these a quick solve is close enough to the solution.
PRECISE = [name for name, tableau in METHODS.items() if tableau.order >= 3]


def precise(method: str) -> dict[str, float]:
    tableau = METHODS[method]
    if not tableau.adaptive:
        return {"step_size": 0.04}
    tolerance = {3: 1e-6 if tableau.implicit else 1e-7, 4: 1e-8}.get(tableau.order, 1e-10)
    return {"rtol": tolerance, "atol": tolerance, "first_step": 0.01}


def assert_gradcheck(states: Callable[..., Tensor], inputs: Sequence[Tensor], method: str, fast: bool = True) -> None:
    """Differences are taken over a length that the error of the solve is small beside."""
    close = {"eps": 1e-4, "atol": 1e-6} if METHODS[method].order >= 5 else {"eps": 1e-3, "atol": 2e-5}
    if METHODS[method].implicit:
        close["atol"] = 1e-4
    # Fast: along one random direction.
    assert gradcheck(states, tuple(inputs), rtol=0.0, fast_mode=fast, check_undefined_grad=False, **close)


@pytest.mark.parametrize(
    ("method", "gradient", "control"),
    [
        (method, gradient, control)
        for method in PRECISE
        for gradient in ("discrete", "adjoint", "reversible")
        for control in (("row", "batch") if method in ("tsit5", "rk4", "kencarp4") else ("row",))
        if gradient != "reversible" or not METHODS[method].implicit
    ],
)
def test_the_map_itself_passes_gradcheck_at_tight_tolerances(method: str, gradient: str, control: str) -> None:
    field, y0, t = mlp_field(1, hidden_layer_sizes=(2,)), random_states(6, 2), times(0.0, 0.4, 1.0)
    options: dict[str, Any] = {"method": method, "gradient": gradient, "step_control": control, **precise(method)}

    def states(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return solve(field, y0, t, **options).y

    inputs = [y0.requires_grad_(), t.requires_grad_(), *field.parameters()]
    assert_gradcheck(states, inputs, method, fast=method != "tsit5")


@pytest.mark.parametrize("method", PRECISE)
def test_the_adjoint_passes_gradcheck_of_the_replayed_map_at_tight_tolerances(method: str) -> None:
    field, y0, t = mlp_field(1, hidden_layer_sizes=(2,)), random_states(6, 2), times(0.9, 0.6, -0.1)
    options: dict[str, Any] = {"method": method, "gradient": "adjoint", **precise(method)}
    states = replayed_map(field, y0, t, **options)
    assert_gradcheck(states, [y0.requires_grad_(), t.requires_grad_(), *field.parameters()], method)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "rk4"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
def test_the_map_of_rows_with_their_own_times_passes_gradcheck(method: str, gradient: str) -> None:
    field, y0 = Plain(mlp_field(1, hidden_layer_sizes=(2,))), random_states(6, 2)
    t = rows((0.0, 0.35, 0.9), (0.6, 0.4, -0.1))
    options: dict[str, Any] = {"method": method, "gradient": gradient, **precise(method)}

    def states(y0: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        return solve(field, y0, t, **options).y

    assert_gradcheck(states, [y0.requires_grad_(), t.requires_grad_(), *field.parameters()], method)
