"""Events' times and states as differentiable functions of everything that they depend on.

By the implicit function theorem ``g(t_e, y(t_e)) = 0`` gives ``dt_e = -dg / slope``, where dg is the change of the
event function at a fixed time, and the slope its total derivative with the time, along the interpolant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skode.solver.events import Crossings, Ends, Watched, no_ends
from skode.solver.gradients import Run
from skode.solver.solution import Solution, Status
from skode.solver.watch import Found


def own_outputs(run: Run, y: Tensor) -> Tensor:
    """Of a run's outputs those at the callers' times, without the crossings'."""
    if run.found is None:
        return y
    return y.gather(1, run.found.columns.unsqueeze(2).expand(-1, -1, y.shape[2]))


def with_events(solution: Solution, watched: Watched, run: Run, y: Tensor) -> Solution:
    """The solution of a run with outputs ``y``, and its crossings, now differentiable."""
    found = run.found
    if found is None:
        return replace(solution, _ends=no_ends(solution.y[:, 0].detach(), run.times.dtype))
    states = y[found.row, found.column, : watched.d]
    crossings, flat = _crossings(states, watched, run, found)
    ends = _ends(crossings, found.stopped, solution)
    flat_rows = found.row[flat & found.stopped]
    status = solution.status.index_fill(0, flat_rows, Status.GRAZING)
    stopped = ends.event >= 0
    return replace(
        solution,
        status=status,
        t_reached=torch.where(stopped, ends.t.detach().to(solution.t_reached), solution.t_reached),
        _ends=ends,
    )


def _ends(crossings: Crossings, stopped: Tensor, solution: Solution) -> Ends:
    none = no_ends(solution.y[:, 0].detach(), crossings.t.dtype)
    where = (crossings.row[stopped],)
    return Ends(
        none.t.index_put(where, crossings.t[stopped]),
        none.y.index_put(where, crossings.y[stopped]),
        none.event.index_put(where, crossings.event[stopped]),
        crossings,
    )


def _crossings(states: Tensor, watched: Watched, run: Run, found: Found) -> tuple[Crossings, Tensor]:
    """The crossings, and which of them are flat."""
    velocity = _velocity(run, found)[:, : watched.d]
    times, flat = found.t.clone(), torch.zeros_like(found.stopped)
    for number, entries in _one_each(found):
        t, y = _stood_in(found.t, states, found.row, entries, len(run.y))
        rows = found.row[entries]
        _, dy = _stood_in(found.t, velocity, found.row, entries, len(run.y))
        slope = _slope(watched, number, t, y, dy)[rows].to(times.dtype)
        # Of a function that does not rise clearly above its own round-off the slope means nothing.
        steep = slope.abs() > torch.finfo(y.dtype).eps ** (1 / 3) * found.scale[entries]
        flat[entries] = ~steep
        if torch.is_grad_enabled():
            g = watched.value(number, t, y)[rows]
            if g.requires_grad:
                inverse = torch.where(steep, 1 / slope, 0.0)
                times = times.index_put((entries,), _Root.apply(found.t[entries], g, inverse))  # type: ignore[no-untyped-call]
    states = states + velocity * (times - times.detach()).to(states.dtype).unsqueeze(1)
    return Crossings(found.row, found.event, times, states), flat


def _velocity(run: Run, found: Found) -> Tensor:
    """The interpolant's derivatives at the crossings."""
    assert run.dense is not None
    times = run.times.new_full((len(run.times), int(found.rank.max()) + 1), torch.nan)
    times[found.row, found.rank] = found.t
    return run.dense.derivative(times)[found.row, found.rank]


def _one_each(found: Found) -> Iterator[tuple[int, Tensor]]:
    """Entries of one event, at most one for each row: functions are asked about all rows at once."""
    for number in torch.unique(found.event).tolist():
        entries = torch.nonzero(found.event == number).view(-1)
        row = found.row[entries]
        rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        for k in range(int(rank.max()) + 1):
            yield number, entries[rank == k]


def _stood_in(t: Tensor, y: Tensor, row: Tensor, entries: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Times (n, 1) and states (n, d) of entries; the first of them stands in for rows without one."""
    where, first = (row[entries],), entries[:1]
    times = t[first].expand(n).index_put(where, t[entries])
    states = y[first].detach().expand(n, -1).index_put(where, y[entries])
    return times.unsqueeze(1).to(y.dtype), states


def _slope(watched: Watched, number: int, t: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """The function's total derivative with the time (n,); 0 where autograd sees none."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = t.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
        g = watched.value(number, *inputs)
        if not g.requires_grad:
            return torch.zeros_like(g)
        to_t, to_y = torch.autograd.grad(g.sum(), inputs, allow_unused=True)
    slope = torch.zeros_like(t[:, 0]) if to_t is None else to_t[:, 0]
    return slope if to_y is None else slope + (to_y * dy.detach()).sum(dim=1)


class _Root(torch.autograd.Function):
    """The time of an event, given the function's value there and one over its slope."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, g: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(g, inverse)
        return t.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, Tensor, None]:
        g, inverse = ctx.saved_tensors
        gradient = (-cotangent * inverse).to(g.dtype)
        if torch.is_grad_enabled():
            gradient = gradient + _Once.apply(g)  # type: ignore[no-untyped-call]
        return None, gradient, None


class _Once(torch.autograd.Function):
    """Zero, where a derivative would be wrong: the slope moves too."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        raise NotImplementedError("second derivatives of an event's time and state are not supported.")
