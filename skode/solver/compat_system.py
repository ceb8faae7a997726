"""One system, a row ``(1, D)``, solved as torchdiffeq would: adaptively, along a grid, or until an event."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skode.exceptions import SolverError
from skode.solver.compat_form import Form, State, name_of
from skode.solver.compat_options import LIMITS, STOPS, Options, number
from skode.solver.control import BatchControl
from skode.solver.solution import Solution
from skode.solver.solve import solve
from skode.solver.step import time_dtype_of
from skode.solver.tableaus import Tableau

Func = Callable[[Tensor, State], State]
EventFunction = Callable[[Tensor, State], Tensor]
RowField = Callable[[Tensor, Tensor], Tensor]

_MAX_NUM_STEPS = 2**31 - 1  # torchdiffeq's
_MAX_EVENT_STEPS = 100_000  # for an event that never comes


def _of_row(func: Func, form: Form, t: Tensor, y: Tensor) -> Tensor:
    """``func`` at a row ``(1, D)`` and its time ``(1, 1)``."""
    return form.derivative(func(t.reshape(()).to(form.real), form.state(y[0])), name_of(func))


class _RowModule(nn.Module):
    """A module as a field of rows, with its parameters."""

    def __init__(self, func: nn.Module, form: Form) -> None:
        super().__init__()
        self.func, self.form = func, form

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return _of_row(self.func, self.form, t, y)


def _row_field(func: Func, form: Form) -> RowField:
    """``func`` as a field of rows."""
    return _RowModule(func, form) if isinstance(func, nn.Module) else lambda t, y: _of_row(func, form, t, y)


@dataclass(frozen=True)
class System:
    """One row with its field, and what solve is to be told besides the times."""

    func: Func
    form: Form
    y0: State
    row: Tensor
    tableau: Tableau
    options: Options
    keywords: Options

    def solve(self, t: Tensor, y: Tensor | None = None, **more: Any) -> Solution:
        """The solution from ``y`` on (y0 if not given), or an error that says what to change."""
        field = _row_field(self.func, self.form)
        solution = solve(field, self.row if y is None else y, t, **self.keywords, **more)
        if not solution.success:
            (message,) = solution.failures().values()
            hint = " (max_num_steps: options={'max_num_steps': ...})" if "max_num_steps" in message else ""
            raise SolverError(f"{name_of(self.func)}: {message.replace('row 0', 'the solve', 1)}{hint}", [0])
        return solution


def step_control(form: Form, norm: Callable[[State], Any] | None) -> str | BatchControl:
    """One step for all, judged by the user's norm or torchdiffeq's: the parts' largest root mean square."""
    if norm is None and len(form.shapes) == 1:
        return "batch"

    def of_row(ratio: Tensor) -> Any:
        return _mixed_norm(ratio[0].split(form.sizes)) if norm is None else norm(form.parts(ratio[0]))

    return BatchControl(norm=of_row)


def _mixed_norm(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().mean() for part in parts if part.numel()]).max().sqrt()


# --- adaptive steps ----------------------------------------------------------------------------------------------


def adaptive(system: System, t: Tensor) -> Tensor:
    """States (m, D) at t."""
    n_steps = number(system.options.get("max_num_steps", _MAX_NUM_STEPS)) * max(len(t) - 1, 1)
    return system.solve(t, max_num_steps=int(min(n_steps, _MAX_NUM_STEPS)), **_steps(system, t)).y[0]


def _steps(system: System, t: Tensor) -> dict[str, Any]:
    """What solve is to be told about the steps from t's first to its last time."""
    options = system.options
    if not system.tableau.adaptive:
        return {"step_size": _step_size(options)} | _jumps(system, t)
    limits = {name: number(options[name]) for name in LIMITS if name in options}
    if limits.get("max_step") == math.inf:
        del limits["max_step"]
    stops = {STOPS[name]: _within(options[name], t) for name in STOPS if name in options}
    return limits | {name: times for name, times in stops.items() if len(times)}


def _ends(t: Tensor) -> tuple[float, float]:
    """The first and the last time."""
    first, last = t[[0, -1]].tolist()
    return first, last


def _within(times: Any, t: Tensor) -> Tensor:
    stops = torch.as_tensor(times, dtype=time_dtype_of(t.device), device=t.device)
    low, high = sorted(_ends(t))
    return stops[(stops >= low) & (stops <= high)]


# --- fixed steps -------------------------------------------------------------------------------------------------


def fixed(system: System, t: Tensor) -> Tensor:
    """States (m, D) at t: steps from one of t's times to the next, or along a grid and interpolated."""
    options = system.options
    if "step_size" not in options and "grid_constructor" not in options:
        return _on_grid(system, t)
    if len(t) == 1:
        return system.row
    grid = _uniform(t, _step_size(options)) if "step_size" in options else _constructed(system, t)
    if options.get("interp") == "cubic":
        return system.solve(t, **_along(system, grid)).y[0]
    return _linear(system, grid, t)


def _linear(system: System, grid: Tensor, t: Tensor) -> Tensor:
    """States (m, D) at t, straight lines between those at the grid's times."""
    first, last = _ends(t)
    sign = math.copysign(1.0, last - first)
    right = torch.searchsorted(sign * grid, sign * t).clamp(min=1)
    knots, (left, right) = torch.unique(torch.stack([right - 1, right]), return_inverse=True)
    if "step_size" in system.options:
        states = system.solve(grid[knots], **_along(system, grid)).y[0]
    else:
        states = _on_grid(system, grid)[knots]
    start, end = grid[knots][left], grid[knots][right]
    share = ((t - start) / (end - start)).to(states.dtype).unsqueeze(1)
    return torch.lerp(states[left], states[right], share)


def _step_size(options: Options) -> float:
    size = number(options["step_size"])
    if not (math.isfinite(size) and size > 0):
        raise ValueError(f"options['step_size']={size} must be positive and finite.")
    return size


def _uniform(t: Tensor, size: float) -> Tensor:
    """From t's first to its last time in steps of ``size``, the last one shorter if need be."""
    start, end = _ends(t)
    inner = torch.arange(1, math.ceil(abs(end - start) / size - 1e-9), dtype=t.dtype, device=t.device)
    return torch.cat([t[:1], start + math.copysign(size, end - start) * inner, t[-1:]])


def _constructed(system: System, t: Tensor) -> Tensor:
    """The user's grid."""
    grid = torch.as_tensor(
        system.options["grid_constructor"](system.func, system.y0, t), dtype=t.dtype, device=t.device
    )
    times = grid.tolist()
    if grid.dim() != 1 or not len(grid) or (times[0], times[-1]) != _ends(t):
        raise ValueError(f"options['grid_constructor'] must return times from t[0] to t[-1]; got {times}.")
    check_monotone("the grid of options['grid_constructor']", times)
    if len(set(times)) < len(times):
        raise ValueError(f"the grid of options['grid_constructor'] has equal times: {times}.")
    return grid


def _along(system: System, grid: Tensor) -> dict[str, Any]:
    """One solve with steps along the grid."""
    first, last = _ends(grid)
    told = {"step_size": abs(last - first), "step_times": grid[1:-1].detach()}
    if "step_size" in system.options:
        told = {"step_size": _step_size(system.options)}
    return told | _jumps(system, grid)


def _jumps(system: System, grid: Tensor) -> dict[str, Any]:
    return {"jump_times": grid.detach()} if system.options.get("perturb") else {}


def _on_grid(system: System, grid: Tensor) -> Tensor:
    """States (m, D) at the grid's times, one step from each to the next; gradients reach each of them."""
    states = [system.row]
    for i, (start, end) in enumerate(pairwise(grid.tolist())):
        pair = grid[i : i + 2]
        size, y = abs(end - start), states[-1]
        states.append(system.solve(pair, y, step_size=size, **_jumps(system, pair)).y1 if size else y)
    return torch.cat(states)


# --- events ------------------------------------------------------------------------------------------------------


def until_event(system: System, t: Tensor, event_fn: EventFunction) -> tuple[Tensor, State]:
    """The event's time, and the states at t's first time and there."""
    if len(t) != 2 or t[0] == t[1]:
        raise ValueError(f"event_fn needs t = [t0, a later or earlier time]; got {t.tolist()}.")
    if not system.tableau.adaptive and "step_size" not in system.options:
        raise ValueError("event_fn with a fixed-step method needs options={'step_size': ...}.")
    form = system.form
    with torch.no_grad():
        signs = torch.sign(event_fn(t[0], system.y0))
    if not bool(signs.all()):
        return t[0], form.state(torch.cat([system.row, system.row]))

    def least(time: Tensor, y: Tensor) -> Tensor:
        """Positive at first, and until the first entry of the event function changes its sign."""
        value = event_fn(time.reshape(()).to(form.real), form.state(y[0]))
        return (value * signs).amin().to(y.dtype).reshape(1)

    event_t, y1 = _search(system, t, least)
    return event_t.to(t.dtype), form.state(torch.cat([system.row, y1]))


def _search(system: System, t: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Where ``function`` first becomes negative: interval after interval, each twice as long as the one before."""
    from skode.solver.events import Event

    start, y = t[:1].to(time_dtype_of(t.device)), system.row
    first, last = _ends(t)
    end, width = first, last - first
    if not system.tableau.adaptive:
        size = _step_size(system.options)
        width = math.copysign(size * math.ceil(abs(width) / size), width)
    first_step: float | None = None
    n_left = int(number(system.options.get("max_num_steps", _MAX_EVENT_STEPS)))
    while n_left > 0 and math.isfinite(end + width):
        span = torch.cat([start, start.new_tensor([end + width])])
        told = _steps(system, span)
        if first_step is not None and system.tableau.adaptive:
            told["first_step"] = first_step
        solution: Any = system.solve(span, y, events=Event(function), max_num_steps=n_left, **told)
        if int(solution.event_index[0]) >= 0:
            return solution.event_t[0], solution.event_y
        n_left -= int(solution.n_steps[0] + solution.n_rejected[0])
        with torch.no_grad():
            passed = bool(function(span[1:], solution.y1) > 0)
        # A zero exactly at the end is looked for once more, over a longer interval.
        if passed:
            start, y, end = span[1:], solution.y1, end + width
            first_step = min(solution.next_step, abs(width))
        width *= 2
    raise SolverError(
        f"no event was found between t={first:.6g} and t={end:.6g}: event_fn has not changed its sign. "
        "Check event_fn, or raise max_num_steps (options={'max_num_steps': ...}).",
        [0],
    )


def check_monotone(name: str, times: list[float]) -> None:
    """Refuse times that go back and forth, or are not finite."""
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} must be finite; got {times}.")
    if times not in (sorted(times), sorted(times, reverse=True)):
        raise ValueError(f"{name} must be ascending or descending; got {times}.")
