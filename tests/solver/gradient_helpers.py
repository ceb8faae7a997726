"""Gradients of solves: how tests take and compare them, and a replay of accepted steps that autograd differentiates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skode.solver import METHODS, Solution, solve
from skode.solver.tableaus import Tableau
from tests.problems import Field

NAN = math.nan


def loss_of(y: Tensor) -> Tensor:
    """A smooth function of all states that exist, with another weight for each entry."""
    generator = torch.Generator().manual_seed(17)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    return (weights * y + 0.3 * y.square()).nansum()


def gradients_of(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_all_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


def coarse(method: str) -> dict[str, float]:
    """Options with which a solve takes a handful of steps; an implicit method solves for its stages all the same."""
    if METHODS[method].implicit:
        return {"rtol": 1e-10, "atol": 1e-10, "first_step": 0.25, "min_step": 0.25}
    return {"rtol": 1e-3, "atol": 1e-4} if METHODS[method].adaptive else {"step_size": 0.3}


def replayed_map(field: Field, y0: Tensor, t: Tensor, **options: Any) -> Callable[..., Tensor]:
    """(y0, t, *parameters) -> states, with the steps of a solve of y0 over t."""
    steps = solve(field, y0.detach(), t.detach(), **options).steps
    return lambda y0, t, *_: solve(field, y0, t, steps=steps, **options).y


# --- an independent replay of the accepted steps, differentiated by autograd ---


def accepted_ends(solution: Solution) -> list[list[float]]:
    """For each row, where its accepted steps ended, but for the last one."""
    return [[end for end in row if end == end][1:-1] for row in solution.steps.t.tolist()]


def solved_slope(field: Field, t: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """F = f(t, base + weight F): solved without a graph, then one step of Newton's method that has the right one."""
    with torch.no_grad():
        eye, F = torch.eye(base.shape[1], dtype=base.dtype), field(t, base)
        for _ in range(20):
            J = torch.autograd.functional.jacobian(lambda y: field(t, y), base + weight * F)[0, :, 0]
            change = torch.linalg.solve(eye - weight * J, (field(t, base + weight * F) - F)[0])
            F = F + change
            if change.abs().max() <= 1e-12 * (1 + F.abs().max()):
                break
        else:
            raise AssertionError("Newton's method found no stage.")
    return F + torch.linalg.solve((eye - weight * J).detach(), (field(t, base + weight * F) - F)[0])


def replay_row(field: Field, tableau: Tableau, y: Tensor, t: Tensor, ends: list[float]) -> Tensor:
    """States (m, d) at times t of a row that starts as y (1, d); t[0] and t[-1] move the first and the last step."""
    tableau = tableau.closed
    knots = [t[0], *(torch.tensor(end, dtype=t.dtype) for end in ends), t[-1]]
    pieces: list[tuple[Tensor, list[Tensor]]] = []
    for start, end in pairwise(knots):
        h, K = end - start, []
        for c, a in zip(tableau.c, ((), *tableau.a), strict=True):
            Y = y + h * sum((weight * k for weight, k in zip(a, K, strict=True)), torch.zeros_like(y))
            time = (start + c * h).view(1, 1)
            K.append(solved_slope(field, time, Y, h * tableau.gamma) if tableau.gamma and K else field(time, Y))
        pieces.append((y, K))
        y = y + h * sum(weight * k for weight, k in zip(tableau.b, K, strict=True))
    outputs, sign = [pieces[0][0]], 1.0 if t[-1] >= t[0] else -1.0
    for time in t[1:]:
        place = sum(bool(sign * knot < sign * time) for knot in knots[1:])
        start, end = knots[place], knots[place + 1]
        theta, (y_start, K) = (time - start) / (end - start), pieces[place]
        powers = torch.stack([theta ** (j + 1) for j in range(tableau.dense.shape[1])])
        beta = torch.from_numpy(tableau.dense) @ powers
        outputs.append(y_start + (end - start) * sum(b * k for b, k in zip(beta, K, strict=True)))
    outputs[-1] = y
    return torch.cat(outputs)


def replay(field: Field, method: str, y0: Tensor, t: Tensor, solution: Solution) -> Tensor:
    """The solve's states (n, m, d) as a plain torch computation with the solve's accepted steps."""
    states = []
    for i, ends in enumerate(accepted_ends(solution)):
        own = t if t.dim() == 1 else t[i]
        kept = own[: int((~own.isnan()).sum())]
        path = replay_row(field, METHODS[method], y0[i : i + 1], kept, ends)
        states.append(torch.cat([path, path.new_full((len(own) - len(kept), y0.shape[1]), NAN)]))
    return torch.stack(states)


def assert_replayed(
    field: nn.Module, y0: Tensor, t: Tensor, method: str, close: float = 1e-11, **options: Any
) -> Solution:
    """The solve and its gradients to states, times and parameters are those of the replay."""
    inputs = [y0.clone().requires_grad_(), t.clone().requires_grad_(), *field.parameters()]
    traced = solve(field, inputs[0], inputs[1], method=method, dense_output=True, **options)
    assert traced.success
    again = replay(field, method, inputs[0], inputs[1], traced)
    torch.testing.assert_close(traced.y, again, rtol=close, atol=0.1 * close, equal_nan=True)
    expected = gradients_of(loss_of(again), inputs)
    assert_all_close(gradients_of(loss_of(traced.y), inputs), expected, 100 * close)
    plain = solve(field, inputs[0], inputs[1], method=method, **options)
    assert_all_close(gradients_of(loss_of(plain.y), inputs), expected, 100 * close)
    return traced
