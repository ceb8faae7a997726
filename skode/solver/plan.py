"""Steps that are known before a solve begins: where each row's steps end, and which step covers an output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skode.solver.solution import Status, Steps

if TYPE_CHECKING:
    from skode.solver.problem import Landings


@dataclass(frozen=True)
class Plan:
    """The steps of every row.

    Parameters
    ----------
    t : tensor of shape (n, k + 1)
        Each row's first time and where its steps end, filled up with the last of them.
    n_steps : tensor of shape (n,)
        How many steps a row takes.
    jumps : tensor of shape (n, k + 1) or None
        Where the field jumps: a step that ends there asks it just before, one that starts there just after.
    status : tensor of shape (n,) or None
        How a row ends; None if all reach their last time.
    """

    t: Tensor
    n_steps: Tensor
    jumps: Tensor | None = None
    status: Tensor | None = None

    @property
    def starts_aside(self) -> Tensor | None:
        """The steps that start at a jump, shape (n, k + 1)."""
        if self.jumps is None:
            return None
        return self.jumps & (torch.arange(self.t.shape[1], device=self.t.device) < self.n_steps.unsqueeze(1))

    def covering(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """The step that covers each time ``(n, m)``, and whether there is none; the end belongs to the step before."""
        ends = self.t[:, 1:]
        if not ends.shape[1]:
            return torch.zeros_like(times, dtype=torch.long), times != self.t
        sign = torch.where(self.t[:, -1:] < self.t[:, :1], -1.0, 1.0).to(ends.dtype)
        step = torch.searchsorted((sign * ends).contiguous(), (sign * times).contiguous())
        missing = (step == ends.shape[1]) | torch.isnan(times)
        return torch.where(missing, 0, step), missing


def planned(
    knots: Tensor, times: Tensor, status: Tensor | None, landings: Landings | None, batch: bool = False
) -> Plan:
    """The plan of recorded steps, from each row's first time to its last.

    Parameters
    ----------
    knots : tensor of shape (n, k + 1)
        NaN-padded.
    times : tensor of shape (n, m)
    status : tensor of shape (n,), optional
        Rows that failed end where they did.
    landings : Landings, optional
        Times where the field jumps.
    batch : bool
        Whether all rows have to take the same steps.

    Raises
    ------
    ValueError
        If a row's steps do not lead from its first time to its last.
    """
    t, last = knots.clone(), (~torch.isnan(times)).sum(dim=1, keepdim=True) - 1
    n_steps = (~torch.isnan(t)).sum(dim=1) - 1
    t0, t1 = times[:, :1], times.gather(1, last.clamp(min=0))
    if status is not None and not bool(status.any()):
        status = None
    ended = torch.zeros_like(n_steps, dtype=torch.bool) if status is None else status != Status.SUCCESS
    if len(t):
        _check_padding(t)
        own_way = t.gather(1, n_steps.unsqueeze(1)) - t[:, :1]
        t[:, :1] = t0
        end = n_steps.unsqueeze(1)
        t.scatter_(1, end, torch.where(ended.unsqueeze(1) | (end == 0), t.gather(1, end), t1))
        t = torch.where(torch.isnan(t), t.gather(1, end), t)
        _check_way(t, n_steps, torch.where(ended.unsqueeze(1), own_way, t1 - t0), own_way)
    if batch and bool((t != t[:1]).any()):
        raise ValueError("steps differ from row to row, but step_control='batch' takes one step for all rows.")
    return Plan(t, n_steps, _jumps(t, landings), status)


def given_plan(
    steps: Any, y0: Tensor, times: Tensor, landings: Landings | None, batch: bool, events: bool
) -> Plan | None:
    """The plan of the ``steps`` that a caller gave: a ``Steps``, or times ``(k + 1,)`` or ``(n, k + 1)``.

    Raises
    ------
    ValueError
        If they do not fit to the rows and times.
    """
    if steps is None:
        return None
    status = steps.status if isinstance(steps, Steps) else None
    _check_events(status, batch, events)
    knots = torch.as_tensor(steps.t if isinstance(steps, Steps) else steps, dtype=times.dtype)
    knots = knots.detach().to(y0.device)
    knots = knots.expand(len(y0), -1) if knots.dim() == 1 else knots
    if knots.dim() != 2 or len(knots) != len(y0) or not knots.shape[1]:
        raise ValueError(
            f"steps must have shape (k + 1,) or ({len(y0)}, k + 1), one row for each row of y0; got "
            f"{tuple(knots.shape)}."
        )
    plan = planned(knots, times.detach(), status, landings, batch)
    _check_landings(plan, landings)
    return plan


def _check_events(status: Tensor | None, batch: bool, events: bool) -> None:
    if batch and events:
        raise ValueError("steps and events go together with step_control='row' only: an event ends one row alone.")
    if not events and status is not None and bool((status == Status.EVENT).any()):
        raise ValueError("an event ended rows of the solve that the steps are from; give its events again.")


def _check_padding(t: Tensor) -> None:
    missing = torch.isnan(t)
    if bool(missing[:, 0].any() | (missing[:, :-1] & ~missing[:, 1:]).any() | torch.isinf(t).any()):
        raise ValueError("steps must be finite; NaN may only pad the end of a row.")


def _check_way(t: Tensor, n_steps: Tensor, way: Tensor, own_way: Tensor) -> None:
    sign = torch.sign(way)
    inside = torch.arange(1, t.shape[1], device=t.device) <= n_steps.unsqueeze(1)
    wrong = (inside & (sign * t.diff(dim=1) <= 0)).any(dim=1) | (sign != torch.sign(own_way)).view(-1)
    if bool(wrong.any()):
        row = int(torch.nonzero(wrong)[0])
        times = [round(time, 6) for time in t[row, : int(n_steps[row]) + 1].tolist()]
        raise ValueError(
            f"steps do not lead from t0 to t1: row {row} goes {float(way[row]):+.6g} in time, its {int(n_steps[row])} "
            f"steps {float(own_way[row]):+.6g}; with its own first and last time they are {times}."
        )


def _check_landings(plan: Plan, landings: Landings | None) -> None:
    if landings is None:
        return
    t0, t1 = plan.t[:, :1], plan.t[:, -1:]
    inside = (landings.t > torch.minimum(t0, t1)) & (landings.t < torch.maximum(t0, t1))
    missed = inside & ~(landings.t.unsqueeze(2) == plan.t.unsqueeze(1)).any(dim=2)
    if bool(missed.any()):
        row, column = torch.nonzero(missed)[0].tolist()
        raise ValueError(
            f"no step of steps ends at {float(landings.t[row, column]):.6g} (row {row}), a time of jump_times or "
            "step_times; give steps that were taken with the same ones."
        )


def _jumps(t: Tensor, landings: Landings | None) -> Tensor | None:
    if landings is None or not bool(landings.jumps.any()):
        return None
    times = landings.t[:, landings.jumps]
    at_jump = (t.unsqueeze(2) == times.unsqueeze(1)).any(dim=2)
    return at_jump
