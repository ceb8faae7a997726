"""How a solve is differentiated: the protocol of the ways to do it, and what they work on."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from skode.solver.interpolate import DenseOutput, Knots
from skode.solver.numerical_map import Course
from skode.solver.problem import Problem
from skode.solver.record import Record
from skode.solver.solution import Stats
from skode.solver.step import Stepper
from skode.solver.watch import Found


class Run(NamedTuple):
    """A finished solve: outputs (n, m, d), summed squared errors (n,), statistics, and what its gradient needs.

    Events that were ``found`` have outputs too: ``times`` then hold theirs, row by row. ``advice`` is for rows that
    failed.
    """

    times: Tensor
    y: Tensor
    error: Tensor
    stats: Stats
    stepper: Stepper
    record: Record
    knots: Knots
    dense: DenseOutput | None
    advice: dict[int, str]
    found: Found | None = None


class Gradients(NamedTuple):
    """Of y0 ``(n, d)``, the times ``(n, m)`` if they were asked for, and the parameters."""

    y0: Tensor
    times: Tensor | None
    parameters: tuple[Tensor, ...]


class GradientStrategy(Protocol):
    """A way to differentiate a solve."""

    @property
    def keeps_steps(self) -> bool:
        """Whether the record of the forward has to be held until backward."""
        ...

    @property
    def interpolates(self) -> bool:
        """Whether outputs come from dense output; steps end at the output times otherwise."""
        ...

    def record(self, problem: Problem) -> Record:
        """What the forward solve has to keep."""
        ...

    def run(self, problem: Problem, record: Record, y0: Tensor, times: Tensor) -> Run:
        """The forward solve, with gradients or without."""
        ...

    def map(self, problem: Problem, fixed: Course, y0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and errors of the accepted steps, in plain torch, for second derivatives."""
        ...

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        """Pull the cotangents of outputs ``(n, m, d)`` and errors ``(n,)`` back to the solve's inputs."""
        ...
