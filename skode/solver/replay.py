"""Steps that were taken before, taken again: to differentiate them, or with other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skode.solver.arena import Lease
from skode.solver.control import Verdict
from skode.solver.integrate import integrate
from skode.solver.record import Record, Step
from skode.solver.step import Attempt, Place, Span, Stepper


class Replay:
    """Proposes the recorded steps as they counted, and accepts each.

    Parameters
    ----------
    stepper : Stepper
    steps : sequence of Step
    start_time : tensor
        The time that the field sees at the start, in the state's dtype.
    f : tensor, optional
        What the step before handed on, if the field does not give it again.
    """

    def __init__(self, stepper: Stepper, steps: Sequence[Step], start_time: Tensor, f: Tensor | None = None) -> None:
        self._stepper, self._steps, self._start_time, self._f = stepper, steps, start_time, f
        self._index = 0

    @property
    def running(self) -> bool:
        return self._index < len(self._steps)

    def start_time(self) -> Tensor:
        return self._start_time

    def begin(self, stepper: Stepper, place: Place) -> None:
        """Nothing has to be chosen."""
        if self._f is not None:
            place.f.copy_(self._f)

    def propose(self) -> Span:
        step = self._steps[self._index]
        return effective(step)

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        self._index += 1
        jumped = False
        if self.running:
            following = self._steps[self._index]
            jumped = following.own and self._stepper.scheme.tableau.fsal
            self._start_time = first_time(self._stepper, following)
        return Verdict(span.h, None, True, True, jumped)


def first_time(stepper: Stepper, step: Step) -> Tensor:
    """The time that the field sees at a step's start, in the state's dtype."""
    like, shape = stepper.scheme.b, stepper.kernel.layout.row
    t = step.span.t
    if step.start_time is not None:
        return step.start_time
    if isinstance(t, float):
        return torch.full((1,) * len(shape), t, dtype=like.dtype, device=like.device)
    return t.to(like.dtype)  # type: ignore[no-any-return]


def effective(step: Step) -> Span:
    """The span as it counted: rows that stayed have no length."""
    span, h = step.span, step.h
    t_next, times = span.t_next, span.times
    if step.accept is not None:
        t_next = torch.where(step.accept, span.t_next, span.t)
        if times is not None:
            times = torch.where(step.accept, times, span.t.to(times.dtype))
    return Span(span.t, t_next, h, times)


def replayed(stepper: Stepper, steps: Sequence[Step], dead: Tensor | None) -> tuple[list[Step], list[Lease[Any]]]:
    """A stretch of steps with their stages again, computed from the state that the first of them keeps.

    The field need not be finite where ``dead`` rows stand that do not move any more: a row that moves stands in for
    them.
    """
    first = steps[0]
    assert first.y is not None
    y, f, start = first.y, first.f, first_time(stepper, first)
    if dead is not None:
        y, f, start, steps = _with_stand_ins(stepper, steps, y, f, start, dead)
    record = Record(keep=True, budget=2**62, n_expected=len(steps))
    integrate(stepper, y, Replay(stepper, steps, start, f), record)
    again = [
        step._replace(block=own.block, slot=own.slot, h=own.h, accept=None, span=own.span)
        for step, own in zip(steps, record.steps, strict=True)
    ]
    return again, record.leases


def _with_stand_ins(
    stepper: Stepper, steps: Sequence[Step], y: Tensor, f: Tensor | None, start: Tensor, dead: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Sequence[Step]]:
    layout = stepper.kernel.layout
    moves = torch.zeros_like(dead)
    for step in steps:
        moves |= step.h != 0
    idle = dead & ~moves
    row = int(torch.argmax(moves.reshape(-1).to(torch.int8)))

    def with_stand_in(x: Tensor) -> Tensor:
        return torch.where(idle, layout.one(x, row), x)

    # It stands still: its times are all the first one.
    t = with_stand_in(steps[0].span.t.expand(layout.row))

    def stays(step: Step) -> Step:
        span = step.span
        times = None if span.times is None else torch.where(idle, t.to(span.times.dtype), span.times)
        span = span._replace(t=torch.where(idle, t, span.t), t_next=torch.where(idle, t, span.t_next), times=times)
        return step._replace(span=span)

    stand_in_f = None if f is None else with_stand_in(f)
    return with_stand_in(y), stand_in_f, with_stand_in(start), [stays(step) for step in steps]
