"""``solve`` under ``torch.compile`` and ``torch.export``: steps that are known beforehand, in plain torch.

Supported are fixed-step methods with ``step_size``, and explicit methods with ``steps``. Times, steps, ``jump_times``
and ``step_times`` are plain numbers that all rows share. Whether a row failed is no question that the program can ask
while it is compiled: ``Solution.success`` is True, and ``Solution.status`` tells. Any other solve runs as it is between
two compiled graphs; with ``fullgraph=True`` or in an export it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from skode.solver.solution import Solution, Status
from skode.solver.tableaus import METHODS
from skode.solver.unrolled import Jump, Unrolled, Weights

_WEIGHTS = {
    name: (Weights.of(tableau), Weights.of(tableau.closed)) for name, tableau in METHODS.items() if not tableau.implicit
}
_ADAPTIVE = {name: tableau.adaptive for name, tableau in METHODS.items()}
_REFUSED = ("dense_output", "error_estimate", "events", "n_quadratures")


def solve_compiled(field: Callable[..., Tensor], y0: Tensor, t: Any, options: dict[str, Any]) -> Solution:
    """What ``solve`` gives, in a form that compilers can trace.

    Raises
    ------
    NotImplementedError
        If something is asked for that cannot be traced.
    """
    reason = why_not(t, options)
    if reason is not None:
        raise NotImplementedError(reason)
    method, steps = options.get("method", "tsit5"), options.get("steps")
    times = _numbers(t)
    jump_times = _numbers(options.get("jump_times"))
    stops = [*jump_times, *_numbers(options.get("step_times"))]
    if steps is None:
        knots = fixed_knots(times[0], times[-1], options["step_size"], options.get("max_step"), stops)
    else:
        knots = _moved(_numbers(steps), times[0], times[-1])
    args = options.get("args") or ()
    dense = len(times) > 2
    weights = _WEIGHTS[method][int(dense)]
    unrolled = Unrolled((lambda t, y: field(t, y, *args)) if args else field, weights, y0)
    jumps = [knot in jump_times for knot in knots]
    sign = 1.0 if times[-1] >= times[0] else -1.0
    for i in range(len(knots) - 1):
        if jumps[i]:
            unrolled.ask_again()
        jump = Jump(jumps[i], jumps[i + 1], sign) if jumps[i] or jumps[i + 1] else None
        unrolled.take(knots[i], knots[i + 1], jump)
    y = torch.stack([y0, *(_output(unrolled, knots, time, last=time == times[-1]) for time in times[1:])], dim=1)
    return _solution(y, times, knots, weights, sum(jumps[1:-1]))


def fixed_knots(
    t0: float, t1: float, step_size: float, max_step: float | None = None, stops: Sequence[float] = ()
) -> list[float]:
    """Where the steps of a fixed-step method end."""
    sign = 1.0 if t1 >= t0 else -1.0
    h = step_size if max_step is None else min(step_size, max_step)
    ahead = [*sorted((s for s in stops if sign * t0 < sign * s < sign * t1), key=lambda s: sign * s), t1]
    knots = [t0]
    for stop in ahead:
        while knots[-1] != stop:
            t = knots[-1]
            # A step that all but arrives goes the whole way.
            knots.append(stop if h >= abs(stop - t) * (1 - 1e-9) else t + sign * h)
    return knots


def why_not(t: Any, options: dict[str, Any]) -> str | None:
    """What keeps a solve from being compiled; None if nothing does."""
    method, step_size, steps = options.get("method", "tsit5"), options.get("step_size"), options.get("steps")
    if method not in _WEIGHTS:
        return f"method={method!r} cannot be compiled; explicit methods can."
    if steps is None and (_ADAPTIVE[method] or step_size is None):
        return (
            f"method={method!r} with step_size={step_size} chooses its steps while it runs, which cannot be compiled; "
            "use a fixed-step method with step_size, or give the steps of an earlier solve: "
            "steps=solution.steps.t[0].tolist()."
        )
    for name in _REFUSED:
        if options.get(name):
            return f"solve(..., {name}=) cannot be compiled."
    if options.get("gradient", "discrete") != "discrete":
        return "only gradient='discrete' can be compiled."
    for name, values in (("t", t), *((name, options.get(name)) for name in ("steps", "jump_times", "step_times"))):
        if values is not None and not isinstance(values, (list, tuple)):
            return f"{name} must be a list of numbers where solve is compiled; got {type(values).__name__}."
    return None


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values or ()]


def _moved(knots: list[float], t0: float, t1: float) -> list[float]:
    knots = [t0, *knots[1:-1], t1] if len(knots) > 1 else [t0]
    sign = 1.0 if t1 >= t0 else -1.0
    if knots[-1] != t1 or any(sign * after <= sign * before for before, after in pairwise(knots)):
        raise ValueError(f"steps do not lead from t0={t0} to t1={t1}: with these as first and last they are {knots}.")
    return knots


def _output(unrolled: Unrolled, knots: list[float], time: float, *, last: bool) -> Tensor:
    if last:
        return unrolled.y
    sign = 1.0 if knots[-1] >= knots[0] else -1.0
    i = 0
    while sign * knots[i + 1] < sign * time:
        i += 1
    if time == knots[i + 1]:
        return unrolled.steps[i + 1].y
    return unrolled.inside(i, (time - knots[i]) / (knots[i + 1] - knots[i]))


def _solution(y: Tensor, times: list[float], knots: list[float], weights: Weights, n_jumps: int) -> Solution:
    n, n_steps = y.shape[0], len(knots) - 1
    again = n_jumps if weights.end_stage is not None else max(n_steps - 1, 0)

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=y.device)

    finite = torch.isfinite(y.detach()).flatten(1).all(dim=1)
    step = abs(knots[-1] - knots[-2]) if n_steps else 0.0
    return Solution(
        torch.tensor(times, dtype=torch.float64, device=y.device).expand(n, -1),
        y,
        torch.where(finite, int(Status.SUCCESS), int(Status.NON_FINITE)).to(torch.int8),
        column(1 + n_steps * (len(weights.b) - 1) + again, torch.int64),
        column(n_steps, torch.int64),
        column(0, torch.int64),
        column(knots[-1], torch.float64),
        column(step, torch.float64),
        column(math.nan, torch.float64),
        step,
        True,
        _ragged=False,
    )
