"""The numerical map of a solve: from its state and times to its outputs, with its steps held fixed, in plain torch.

The first step carries t0, the last one t1; times between take the interpolant's slope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode.solver.control import Tolerance
from skode.solver.interpolate import weights as interpolation
from skode.solver.plan import Plan
from skode.solver.problem import Problem
from skode.solver.record import combined_squares
from skode.solver.tableau import Row
from skode.solver.unrolled import Jump, Unrolled, Weights


@dataclass(frozen=True)
class Course:
    """All that is fixed of the map; r is n, or 1 where all rows share their steps and times.

    Parameters
    ----------
    t : tensor of shape (r, k + 1)
        Where steps end.
    carries : tensor of shape (r, k + 1)
        Whether that is the row's last time itself.
    step : tensor of shape (r, m)
        The step that covers an output.
    at_end : tensor of shape (r, m)
        Whether the output is the row's last state itself.
    last : tensor of shape (r, 1)
        The output that is a row's last.
    missing : tensor of shape (n, m) or None
        Outputs that there are none of.
    jumps, starts_aside : tensors of shape (r, k + 1) or None
        Where steps end just before a jump, and where they start just after one; ``any_jump`` tells where there is one
        for some row.
    moves : tensor of shape (n, k) or None
        Where some row failed: 2 for the rows that move in a step, 1 for others that did not fail.
    """

    t: Tensor
    carries: Tensor
    step: Tensor
    at_end: Tensor
    last: Tensor
    missing: Tensor | None = None
    jumps: Tensor | None = None
    starts_aside: Tensor | None = None
    any_jump: tuple[bool, ...] = ()
    moves: Tensor | None = None


def course(plan: Plan, times: Tensor, shared: bool) -> Course:
    """What a plan fixes of the map, for values of the times ``(n, m)``; ``shared`` if all rows have the same ones."""
    step, missing = plan.covering(times)
    last = (~torch.isnan(times)).sum(dim=1, keepdim=True) - 1
    ends = torch.arange(plan.t.shape[1], device=plan.t.device)
    n_steps = plan.n_steps.unsqueeze(1)
    carries = (ends >= n_steps) & (n_steps > 0)
    moves = None
    if plan.status is not None:
        carries &= (plan.status == 0).unsqueeze(1)
        moves = torch.where(ends[1:] <= n_steps, 2, (plan.status == 0).unsqueeze(1).to(torch.int8))
    columns = torch.arange(times.shape[1], device=times.device)
    at_end = (columns == last) & carries.gather(1, n_steps)
    r = 1 if shared else len(times)
    return Course(
        plan.t[:r],
        carries[:r],
        step[:r],
        at_end[:r],
        last[:r],
        missing if bool(missing.any()) else None,
        None if plan.jumps is None else plan.jumps[:r],
        None if plan.starts_aside is None else plan.starts_aside[:r],
        () if plan.jumps is None else tuple(plan.jumps.any(dim=0).tolist()),
        moves,
    )


def numerical_map(problem: Problem, fixed: Course, y0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (n, m, d), and each row's summed squared errors (n,) if the problem keeps them."""
    unrolled = Unrolled(problem.dynamics, Weights.of(problem.scheme.tableau), y0)
    own = times[: len(fixed.t)]
    T = _knots(fixed, own)
    knots = T.split(1, dim=1)
    for i in range(T.shape[1] - 1):
        if fixed.any_jump and fixed.any_jump[i]:
            unrolled.ask_again()
        moves = None if fixed.moves is None else fixed.moves[:, i : i + 1]
        unrolled.take(knots[i], knots[i + 1], _jump(fixed, i), moves)
    return _outputs(problem, fixed, unrolled, T, y0, own), _errors(problem, unrolled)


def _knots(fixed: Course, times: Tensor) -> Tensor:
    t1 = times.gather(1, fixed.last)
    return torch.cat([times[:, :1], torch.where(fixed.carries[:, 1:], t1, fixed.t[:, 1:])], dim=1)


def _jump(fixed: Course, i: int) -> Jump | None:
    if not fixed.any_jump or not (fixed.any_jump[i] or fixed.any_jump[i + 1]):
        return None
    assert fixed.jumps is not None and fixed.starts_aside is not None
    sign = torch.sign(fixed.t[:, -1:] - fixed.t[:, :1])
    return Jump(fixed.starts_aside[:, i : i + 1], fixed.jumps[:, i + 1 : i + 2], sign)


def _outputs(problem: Problem, fixed: Course, unrolled: Unrolled, T: Tensor, y0: Tensor, times: Tensor) -> Tensor:
    m = times.shape[1]
    if m == 1:
        return y0.unsqueeze(1)
    if not unrolled.steps:
        y = y0.unsqueeze(1).expand(-1, m, -1)
    elif problem.dense:
        inner = _inside(problem, fixed, unrolled, T, times)
        y = torch.where(fixed.at_end.unsqueeze(2), unrolled.y.unsqueeze(1), inner)
        y = torch.cat([y0.unsqueeze(1), y[:, 1:]], dim=1)
    else:
        y = torch.stack([y0, unrolled.y], dim=1)
    return y if fixed.missing is None else y.masked_fill(fixed.missing.unsqueeze(2), torch.nan)


def _inside(problem: Problem, fixed: Course, unrolled: Unrolled, T: Tensor, times: Tensor) -> Tensor:
    """The interpolant at all times."""
    n = len(unrolled.y)
    start, length = T.gather(1, fixed.step), T.diff(dim=1).gather(1, fixed.step)
    stays = fixed.t.diff(dim=1).gather(1, fixed.step) == 0
    times = torch.where(torch.isnan(times), fixed.t[:, :1], times)
    theta = (times - start) / torch.where(stays, 1.0, length)
    beta = interpolation(problem.scheme, theta).expand(n, -1, -1)
    step, rows = fixed.step.expand(n, -1), torch.arange(n, device=times.device).unsqueeze(1)
    mixed = torch.einsum("nqs,nqsd->nqd", beta, unrolled.values()[step, :, rows])
    return unrolled.states()[step, rows] + mixed


def _errors(problem: Problem, unrolled: Unrolled) -> Tensor:
    """The squares of the local errors in units of the tolerance, the units held fixed."""
    error, estimates = unrolled.y.new_zeros(len(unrolled.y)), unrolled.weights.estimates
    if not problem.keep_errors or not estimates:
        return error
    ends = [*(step.y for step in unrolled.steps[1:]), unrolled.y]
    for step, y1 in zip(unrolled.steps, ends, strict=True):
        unit = _unit(problem.tolerance, step.y, y1)
        squares = [(_combination(e, step.F) * step.h.to(unit.dtype) / unit).square().mean(dim=1) for e in estimates]
        error = error + (squares[0] if len(squares) == 1 else combined_squares(*squares)[0])
    return error


def _combination(weights: Row, F: list[Tensor]) -> Tensor:
    return torch.stack([f * weight for weight, f in zip(weights, F, strict=False) if weight]).sum(dim=0)


def _unit(tolerance: Tolerance, y: Tensor, y1: Tensor) -> Any:
    with torch.no_grad():
        return tolerance.unit(y.detach(), y1.detach())
