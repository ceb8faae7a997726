"""The loop: propose, attempt, judge, record. The same for every method, control and gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.solver.control import Control, Verdict
from skode.solver.dynamics import Dynamics
from skode.solver.interpolate import Step
from skode.solver.solution import Stats
from skode.solver.step import Attempt, Scheme, Span, attempt_step


class Recorder(Protocol):
    """Takes note of the steps as they happen."""

    @property
    def wants_tapes(self) -> bool:
        """Whether the next step's stages are to be linearised."""
        ...

    def record(self, y: Tensor, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        """Called once for each step that counted for some row."""
        ...


@dataclass
class NoRecord:
    """For those who want the last state only."""

    wants_tapes: bool = False

    def record(self, y: Tensor, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        """Forget."""


@dataclass
class Record:
    """Keeps the steps: states always, stages for dense output, tapes while they fit into ``tape_budget`` bytes.

    Parameters
    ----------
    keep_stages : bool
    tape_budget : int
        0 keeps none: the stages are then linearised anew going back.
    keep_errors : bool
        ``error`` then adds up the rows' squared errors in units of the tolerance.
    """

    keep_stages: bool = False
    tape_budget: int = 0
    keep_errors: bool = False
    steps: list[Step] = field(default_factory=list)
    error: Tensor | None = None

    @property
    def wants_tapes(self) -> bool:
        return self.tape_budget > 0

    def record(self, y: Tensor, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        if attempt.tapes is not None:
            self.tape_budget -= sum(tape.nbytes for tape in attempt.tapes)
        K = attempt.stages.stacked() if self.keep_stages else None
        slope = None
        if self.keep_errors and verdict.ratio is not None and verdict.unit is not None:
            slope = self._add_error(verdict.ratio, verdict.unit)
        self.steps.append(Step(y, span, verdict.h, K, attempt.tapes, slope))

    def _add_error(self, ratio: Tensor, unit: Tensor) -> Tensor:
        """Add the mean square of error / unit, and return its derivative with the error (the unit held fixed)."""
        square = ratio.square().mean(dim=1)
        self.error = square if self.error is None else self.error + square
        return torch.where(ratio == 0, 0.0, ratio / unit).mul_(2 / ratio.shape[1])


class End(NamedTuple):
    """Where the loop arrived."""

    y: Tensor
    stats: Stats


def integrate(dynamics: Dynamics, scheme: Scheme, y: Tensor, control: Control, recorder: Recorder) -> End:
    """Carry ``y`` to the control's end. Nothing here is differentiated: call it without autograd.

    Parameters
    ----------
    dynamics : Dynamics
    scheme : Scheme
    y : tensor of shape (n, d)
    control : RowControl or SharedControl
    recorder : Recorder

    Returns
    -------
    End
    """
    start, tape = _evaluate(dynamics, control.start_time(), y, recorder)
    if start.shape != y.shape or start.dtype != y.dtype:
        raise FieldError(
            f"the field returned {tuple(start.shape)} in {start.dtype} for a state {tuple(y.shape)} in {y.dtype}."
        )
    control.begin(dynamics, y, start)
    f: Tensor | None = start
    while control.running:
        span = control.propose()
        if f is None or (recorder.wants_tapes and tape is None):
            f, tape = _evaluate(dynamics, span.times[0], y, recorder)
        attempt = attempt_step(dynamics, scheme, y, f, span, tape)
        verdict = control.judge(y, f, span, attempt)
        if verdict.accepted:
            recorder.record(y, span, attempt, verdict)
            # Of a first-same-as-last method, the last stage is the next step's first.
            handed_on = scheme.tableau.fsal and recorder.wants_tapes
            tape = attempt.tapes[-1] if handed_on and attempt.tapes is not None else None
        y, f = verdict.y, verdict.f
    return End(y, control.stats(y))


def _evaluate(dynamics: Dynamics, t: Tensor, y: Tensor, recorder: Recorder) -> tuple[Tensor, Any | None]:
    return dynamics.linearize(t, y) if recorder.wants_tapes else (dynamics(t, y), None)
