"""The loop: propose, attempt, judge, record. The same for every method, control and gradient."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from skode.solver.control import Control, Verdict
from skode.solver.record import Record
from skode.solver.step import Attempt, Place, Span, Stepper


class Observer(Protocol):
    """Is shown every step that counted for some row."""

    def observe(self, place: Place, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        """Look, before the step's memory is used again."""
        ...


def integrate(
    stepper: Stepper, y: Tensor, control: Control, record: Record, observer: Observer | None = None
) -> Tensor:
    """Carry ``y`` to the control's end. Nothing here is differentiated: call it in the kernel's mode.

    Parameters
    ----------
    stepper : Stepper
    y : tensor
        The first state, in the layout's shape.
    control : Control
    record : Record
    observer : Observer, optional

    Returns
    -------
    tensor
        The last state, in memory that the record holds.
    """
    place = record.open(stepper, y)
    _evaluate(stepper, place, control, record.keeps_stages)
    place, own = place._replace(known=True), True
    control.begin(stepper, place)
    while control.running:
        span = control.propose()
        if not place.known:
            _evaluate(stepper, place, control, record.keeps_stages)
            own = True
        attempt = stepper.attempt(place, span, record.keeps_stages)
        verdict = control.judge(place, span, attempt)
        if verdict.accepted:
            if observer is not None:
                observer.observe(place, span, attempt, verdict)
            place = record.advance(stepper, place, span, attempt, verdict, own)
            own = False
        else:
            place = place._replace(known=True)
    return place.y


def _evaluate(stepper: Stepper, place: Place, control: Control, keep: bool) -> None:
    """The field where a step begins."""
    if place.block.t is not None:
        place.block.set_times(place.slot, control.start_time().unsqueeze(0))
    stepper.kernel.evaluate(place.block, place.slot, keep)
