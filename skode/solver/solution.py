"""What a solve returns: states, per-row status and statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from skode.solver.events import Crossings, Ends, no_ends

if TYPE_CHECKING:
    from skode.solver.interpolate import DenseOutput, Knots
    from skode.solver.problem import Problem


class Status(IntEnum):
    """How a row's solve ended.

    Examples
    --------
    >>> from skode.solver import Status
    >>> Status.EVENT.failed, Status.EVENT.message
    (False, 'a terminal event ended the solve')
    >>> [status.name for status in Status if status.failed]
    ['MAX_STEPS', 'STEP_UNDERFLOW', 'NON_FINITE', 'NO_CONVERGENCE']
    """

    SUCCESS = 0
    MAX_STEPS = 1
    STEP_UNDERFLOW = 2
    NON_FINITE = 3
    EVENT = 4
    GRAZING = 5
    NO_CONVERGENCE = 6

    @property
    def message(self) -> str:
        """What happened, and what to change."""
        return _MESSAGES[self]

    @property
    def failed(self) -> bool:
        """Whether the row did not get where it should."""
        return self not in (Status.SUCCESS, Status.EVENT, Status.GRAZING)


_MESSAGES = {
    Status.SUCCESS: "the end was reached",
    Status.MAX_STEPS: "max_num_steps was reached before the end; raise max_num_steps, or rtol (with fixed steps: "
    "step_size)",
    Status.STEP_UNDERFLOW: "the step shrank to round-off, the field is too steep there; raise rtol or atol, "
    "or make the field smoother (regularise it, use a smooth activation)",
    Status.NON_FINITE: "the field or the state became NaN or infinite; check the field and the scale of y0, end t "
    "earlier, or name the times where the field jumps (jump_times)",
    Status.EVENT: "a terminal event ended the solve",
    Status.GRAZING: "a terminal event ended the solve where its function touches zero without a slope; gradients do "
    "not flow through the event's time",
    Status.NO_CONVERGENCE: "the step shrank to round-off, and still Newton's method found no solution of an implicit "
    "step: the field is too steep or not smooth there; raise rtol or atol, or make the field smoother",
}


def failed_rows(status: Tensor) -> Tensor:
    """Which rows did not get where they should."""
    return (status != Status.SUCCESS) & (status != Status.EVENT) & (status != Status.GRAZING)


class Stats(NamedTuple):
    """Per-row columns of shape (n,): status, counts, the time that was reached, the last step tried and its error norm.

    ``next_step`` is the step that would come next, ``success`` whether all rows succeeded.
    """

    status: Tensor
    n_evals: Tensor
    n_steps: Tensor
    n_rejected: Tensor
    t: Tensor
    h: Tensor
    norm: Tensor
    next_step: float
    success: bool


class Steps(NamedTuple):
    """The accepted steps of a solve, to be taken again by ``solve(..., steps=)``.

    ``t`` has shape (n, k + 1): where each row's steps end, its first time in front; NaN for rows with fewer.
    ``status`` (n,) tells which rows failed: their steps end before their last time.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import solve
    >>> decay = lambda t, y: -y
    >>> first = solve(decay, torch.ones(1, 1), [0.0, 1.0])
    >>> again = solve(decay, 2 * torch.ones(1, 1), [0.0, 1.0], steps=first.steps)
    >>> first.steps.t.shape[1] == int(first.n_steps[0]) + 1, bool((again.n_steps == first.n_steps).all())
    (True, True)
    """

    t: Tensor
    status: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """The solution of a batch of initial-value problems.

    Attributes
    ----------
    t : tensor of shape (n, m)
        Output times; NaN where a row has fewer.
    y : tensor of shape (n, m, d)
        States; NaN at times that a row did not reach, and behind an event that ended it. Carries gradients.
    status : tensor of shape (n,), int8
        One of :class:`Status`.
    n_evals, n_steps, n_rejected : tensors of shape (n,), int64
        Evaluations of the field, accepted and rejected steps. With an implicit method those of each row's own Newton
        iterations, and one for every Jacobian.
    t_reached : tensor of shape (n,)
        Where each row stopped.
    last_step, last_norm : tensors of shape (n,)
        Length of the last step that each row tried, and its error in units of the tolerance.
    success : bool
        Whether every row reached its end, or an event that ended it.
    next_step : float
        The controller's proposal after the last step (the rows' mean): a first step for a similar solve.
    advice : dict of int to str
        For rows that failed, what else was found out.
    error_estimate : tensor of shape (n,) or None
        Squared local errors in units of the tolerance, summed over the accepted steps; on request.
    quadratures : tensor of shape (n, m, q) or None
        The integrals from each row's first time on, with ``n_quadratures=q``: 0 there, NaN where ``y`` is. Carries
        gradients.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import solve
    >>> solution = solve(lambda t, y: -y, torch.ones(3, 2), [0.0, 0.5, 1.0], dense_output=True)
    >>> solution.y.shape, solution.y1.shape, solution.success
    (torch.Size([3, 3, 2]), torch.Size([3, 2]), True)
    >>> solution.evaluate(torch.tensor([0.25])).shape
    torch.Size([3, 1, 2])
    """

    t: Tensor
    y: Tensor
    status: Tensor
    n_evals: Tensor
    n_steps: Tensor
    n_rejected: Tensor
    t_reached: Tensor
    last_step: Tensor
    last_norm: Tensor
    next_step: float
    success: bool
    error_estimate: Tensor | None = None
    advice: dict[int, str] = field(default_factory=dict)
    _dense: DenseOutput | None = None
    _knots: Knots | None = None
    quadratures: Tensor | None = None
    _ends: Ends | None = None
    _problem: Problem | None = None
    _ragged: bool | None = None  # whether rows have fewer times than others; None: look

    @property
    def y1(self) -> Tensor:
        """States at each row's last time, shape (n, d), or at the event that ended it; NaN where it was not reached."""
        last = self._last_outputs()
        if self._ends is None:
            return last
        return torch.where((self._ends.event >= 0).unsqueeze(1), self._ends.y, last)

    def _last_outputs(self) -> Tensor:
        if self._ragged is False or (self._ragged is None and not bool(torch.isnan(self.t).any())):
            return self.y[:, -1]
        last = (~torch.isnan(self.t)).sum(dim=1) - 1
        return self.y[torch.arange(len(last), device=last.device), last]

    @property
    def event_t(self) -> Tensor:
        """Times of the terminal events that ended rows, shape (n,); NaN for the others. Carries gradients."""
        return self._events.t

    @property
    def event_y(self) -> Tensor:
        """States there, shape (n, d). Carries gradients."""
        return self._events.y

    @property
    def event_index(self) -> Tensor:
        """Which of the events it was, shape (n,); -1 for rows that none ended."""
        return self._events.event

    @property
    def crossings(self) -> Crossings:
        """All events' crossings before the rows' ends, those that ended them too."""
        return self._events.crossings

    @cached_property
    def _events(self) -> Ends:
        return no_ends(self.y[:, 0].detach(), self.t.dtype) if self._ends is None else self._ends

    @cached_property
    def steps(self) -> Steps:
        """The accepted steps, to be taken again by ``solve(..., steps=)``.

        Raises
        ------
        ValueError
            If the solve ran under ``torch.func.vmap`` or a compiler.
        """
        if self._knots is None:
            raise ValueError("solves under torch.func.vmap or a compiler do not give their steps.")
        return Steps(self._knots.accepted(), self.status)

    def failures(self) -> dict[int, str]:
        """Failed rows, with what happened to each, where, and what to change."""
        rows = torch.nonzero(self.status).view(-1).tolist()
        return {row: self._failure(row) for row in rows if Status(int(self.status[row])).failed}

    def _failure(self, row: int) -> str:
        text = (
            f"row {row} stopped at t={float(self.t_reached[row]):.6g} after {int(self.n_steps[row])} accepted and "
            f"{int(self.n_rejected[row])} rejected steps, the last of length {float(self.last_step[row]):.3g} with an "
            f"error of {float(self.last_norm[row]):.3g} tolerances: {Status(int(self.status[row])).message}"
        )
        return text + self.advice.get(row, "")

    def evaluate(self, t: Tensor) -> Tensor:
        """States at any times between a row's first and last, by the method's dense output (no gradients).

        Parameters
        ----------
        t : tensor of shape (q,) or (n, q)

        Returns
        -------
        tensor of shape (n, q, d)

        Raises
        ------
        ValueError
            If the solve was made without ``dense_output=True``, or a time lies outside of a row's interval.
        """
        return self._output().evaluate(t, checked=True)[..., : self.y.shape[2]]

    def evaluate_quadratures(self, t: Tensor) -> Tensor:
        """Integrals at any times, as :meth:`evaluate` gives states (no gradients).

        Parameters
        ----------
        t : tensor of shape (q,) or (n, q)

        Returns
        -------
        tensor of shape (n, q, n_quadratures)

        Raises
        ------
        ValueError
            As by :meth:`evaluate`.
        """
        return self._output().evaluate(t, checked=True)[..., self.y.shape[2] :]

    def derivative(self, t: Tensor) -> Tensor:
        """Derivatives with the time of what :meth:`evaluate` gives: the interpolant's slope, no call of the field.

        Parameters
        ----------
        t : tensor of shape (q,) or (n, q)

        Returns
        -------
        tensor of shape (n, q, d)

        Raises
        ------
        ValueError
            As by :meth:`evaluate`.
        """
        return self._output().derivative(t, checked=True)[..., : self.y.shape[2]]

    def _output(self) -> DenseOutput:
        if self._dense is None:
            raise ValueError("this Solution has no dense output; call solve(..., dense_output=True).")
        return self._dense
