"""Steps that can be undone (McCallum and Foster 2024): how they are taken, and where their outputs go.

Two states go side by side, y and z, both y0 at first. With ``Psi_h(t, x)``, what a step of length h of any
Runge-Kutta method adds to x, and the coupling ``l``, a step is

    y' = z + l (y - z) + Psi_h(t, z),    z' = z - Psi_-h(t + h, y'),

and can be undone: z from y' and z', then y.

Symbols: a *turn* is the base step from y' backwards.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from skode.solver.arena import Block
from skode.solver.control import Verdict
from skode.solver.kernels import Kernel
from skode.solver.plan import Plan
from skode.solver.problem import Landings
from skode.solver.record import Record, Step
from skode.solver.step import Attempt, Place, Scheme, Span, Stepper, make_scheme, stage_times
from skode.solver.tableau import Tableau


class _Restarting(Tableau):
    """A method whose steps ask the field anew where they begin: the step before asked it at another state."""

    @property
    def fsal(self) -> bool:
        return False


@lru_cache(maxsize=64)
def restarting(tableau: Tableau) -> Tableau:
    """The method of z's steps."""
    given = {field.name: getattr(tableau, field.name) for field in fields(tableau) if field.init}
    return _Restarting(**(given | {"p": None, "extra": ()}))


@lru_cache(maxsize=64)
def _base_scheme(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Scheme:
    """The stages that a step's increment consists of; going back, the state itself is left out."""
    n = 1 + max(i for i, weight in enumerate(tableau.b) if weight)
    changes = {"a": tableau.a[: n - 1], "b": tableau.b[:n], "e": None, "e2": None, "error_order": 0}
    scheme = make_scheme(replace(tableau, **changes), dtype, device)  # type: ignore[arg-type]
    with torch.inference_mode(False):
        start = scheme.back.start.clone()
        start[-1] = 0
    return replace(scheme, back=scheme.back._replace(start=start))


class CoupledStepper(Stepper):
    """Takes steps of both states: a place is z's, ``y`` is kept here.

    Parameters
    ----------
    scheme : Scheme
    kernel : Kernel
    coupling : float
    aside : bool
        Whether the field jumps at some times where steps end.
    """

    def __init__(self, scheme: Scheme, kernel: Kernel, coupling: float, aside: bool) -> None:
        super().__init__(scheme, kernel)
        self.coupling, self._aside = coupling, aside
        self.base = Stepper(_base_scheme(scheme.tableau, scheme.b.dtype, scheme.b.device), kernel)
        self._turn = kernel.block(self.base.n_slots, False)
        self.y, self._psi = scheme.b.new_empty(kernel.layout.state), scheme.b.new_empty(kernel.layout.state)

    def attempt(self, place: Place, span: Span, keep: bool) -> Attempt:
        found = super().attempt(place, span, keep)
        z, turn = place.y, self._turn.memory
        y1, z1 = turn.y[0], place.block.y[place.slot + self.scheme.end]
        psi = self._increment(place.block, place.slot, span.h)
        torch.sub(self.y, z, out=y1).mul_(self.coupling).add_(psi).add_(z)
        moves = span.h != 0 if isinstance(span.h, Tensor) else None
        if moves is not None:
            y1.copy_(torch.where(moves, y1, self.y))
        torch.sub(z, self.leg(turn, *self.turned(span), keep=False), out=z1)
        if moves is not None:
            z1.copy_(torch.where(moves, z1, z))
        # A step is good only if both states are finite, whatever the estimate of the first half says.
        return found._replace(y1=(y1 + z1).mul_(0).add_(y1))

    def go_on(self, accept: Tensor | None) -> None:
        """Take on the attempt's y, in rows that were accepted."""
        y1 = self._turn.memory.y[0]
        self.y.copy_(y1 if accept is None else torch.where(accept, y1, self.y))

    def leg(self, block: Block, start: Tensor, span: Span, keep: bool) -> Tensor:
        """The increment of a base step from the state in a block's first slot."""
        block.set_times(0, start.unsqueeze(0))
        self.kernel.evaluate(block, 0, keep)
        self.base.attempt(Place(block, 0, True), span, keep)
        return self._increment(block, 0, span.h)

    def _increment(self, block: Block, first: int, h: Any) -> Tensor:
        """Of a base step whose stages are known."""
        stack = block.stacks(first, self.base.scheme.n_stages)[-1]
        torch.mv(stack, self.base.scheme.b, out=self._psi.view(-1))
        return self._psi.mul_(h)

    def turned(self, span: Span) -> tuple[Tensor, Span]:
        """A span's turn, and the time that the field sees where it starts."""
        start, times = self._seen(span.t_next), None
        if self._aside:
            # The turn keeps off both ends of every step, whichever of them is a jump: steps taken again need not know.
            low, high = torch.minimum(start, self._seen(span.t)), torch.maximum(start, self._seen(span.t))
            low, high = torch.nextafter(low, high), torch.nextafter(high, low)
            start = start.clamp(low, high)
            times = stage_times(self.base.scheme, self.kernel.layout, span.t, span.t - span.t_next).clamp(low, high)
        return start, Span(span.t_next, span.t, -span.h, times)

    def _seen(self, t: Any) -> Tensor:
        like = self.scheme.b
        if isinstance(t, float):
            return torch.full((1,) * len(self.kernel.layout.row), t, dtype=like.dtype, device=like.device)
        return cast(Tensor, t.to(like.dtype))


def require_outputs(plan: Plan, times: Tensor) -> None:
    """Refuse steps that are given and pass over output times ``(n, m)``.

    Raises
    ------
    ValueError
        If there is such a time.
    """
    step, missing = plan.covering(times)
    ends = plan.t.gather(1, (step + 1).clamp(max=plan.t.shape[1] - 1))
    passed = ~missing & (ends != times) & (times != plan.t[:, :1])
    if bool(passed.any()):
        row, column = torch.nonzero(passed)[0].tolist()
        raise ValueError(
            f"no step of steps ends at the output time {float(times[row, column]):.6g} (row {row}), and those of "
            "gradient='reversible' have no interpolant; give steps of a solve with the same output times, or use "
            "gradient='discrete'."
        )


def at_outputs(given: Landings | None, times: Tensor) -> Landings | None:
    """Steps have to end at the output times between the first and the last, too."""
    inner = times[:, 1:-1]
    if given is None and not inner.shape[1]:
        return None
    jumps = torch.zeros(inner.shape[1], dtype=torch.bool, device=times.device)
    if given is None:
        return Landings(inner, jumps, aside=False)
    aside = given.aside and bool(given.jumps.any())
    return Landings(torch.cat([given.t, inner], dim=1), torch.cat([given.jumps, jumps]), aside)


class Pair(Record):
    """Carries both states on, keeps the outputs, and notes the steps' times and lengths, but no states."""

    def __init__(self, outputs: Landed, noted: bool) -> None:
        super().__init__()
        self.outputs, self.noted = outputs, noted
        self.end: tuple[Tensor, Tensor] | None = None

    def open(self, stepper: Stepper, y: Tensor) -> Place:
        cast(CoupledStepper, stepper).y.copy_(y)
        return super().open(stepper, y)

    def advance(
        self, stepper: Stepper, place: Place, span: Span, attempt: Attempt, verdict: Verdict, own: bool
    ) -> Place:
        coupled, layout = cast(CoupledStepper, stepper), stepper.kernel.layout
        coupled.go_on(verdict.accept)
        if isinstance(verdict.h, float):
            self.outputs.take(span.t_next, layout.leave(coupled.y))
        else:
            arrived = torch.where(verdict.h != 0, span.t_next, torch.nan)
            self.outputs.take_by_row(layout.leave(arrived), layout.leave(coupled.y))
        if self.noted:
            start = None if span.times is None else place.block.t
            seen = None if start is None else start[place.slot].clone()
            # Lengths follow from the times, which are kept anyway.
            self.steps.append(Step(span._replace(h=None), None, verdict.accept, True, None, 0, start_time=seen))
        return super().advance(stepper, place, span, attempt, verdict, own)


class Landed:
    """Outputs, filled in where steps end."""

    def __init__(self, y0: Tensor, times: Tensor, shared: bool) -> None:
        at_start = times == times[:, :1]
        self._y = torch.where(at_start.unsqueeze(2), y0.unsqueeze(1), torch.nan)
        self._times, self._rows = times, torch.arange(len(times), device=times.device).unsqueeze(1)
        index = torch.arange(times.shape[1], device=times.device).expand(len(times), -1)
        new = torch.ones_like(at_start)
        new[:, 1:] = times[:, 1:] != times[:, :-1]
        self._first = torch.cummax(torch.where(new, index, 0), dim=1).values  # of equal times
        starts = torch.where(new, index, times.shape[1])
        self._following = torch.cummin(starts.flip(1), dim=1).values.flip(1).roll(-1, dims=1)
        self._following[:, -1] = times.shape[1]
        self._column: Any = at_start.sum(dim=1, keepdim=True)  # to be filled next
        if shared:
            self._list, self._column = times[0].tolist(), int(self._column[0])

    def take(self, t: float, y: Tensor) -> None:
        """All rows are at ``t``."""
        while self._column < len(self._list) and self._list[self._column] == t:
            self._y[:, self._column] = y
            self._column += 1

    def take_by_row(self, t: Tensor, y: Tensor) -> None:
        """Rows are at times ``t``, shape (n, 1); NaN where they did not move."""
        m = self._times.shape[1]
        column = self._column.clamp(max=m - 1)
        hit = (self._times.gather(1, column) == t) & (self._column < m)
        place = self._rows[:, 0], column[:, 0]
        self._y[place] = torch.where(hit, y, self._y[place])
        self._column = torch.where(hit, self._following.gather(1, column), self._column)

    def finish(self, success: bool) -> Tensor:
        """Outputs ``(n, m, d)``, NaN where they were not reached."""
        y = self._y.gather(1, self._first.unsqueeze(2).expand_as(self._y))
        return y if success else y.masked_fill(torch.isinf(y), torch.nan)
