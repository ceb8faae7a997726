"""Outputs between the steps' ends, worked out while a solve goes on, so that its steps need not be kept for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skode.solver.control import Verdict
from skode.solver.interpolate import DenseOutput, Knots
from skode.solver.step import Attempt, Place, Span, Stepper

PENDING_BYTES = 2**22
"""Steps are put by until they take so much memory, or a part of the budget if that is less; outputs are then worked out
for all of them at once."""
_PART = 16


class Interpolated:
    """The states at the output times, filled in as steps are accepted.

    Parameters
    ----------
    stepper : Stepper
    y0 : tensor of shape (n, d)
    times : tensor of shape (n, m)
        The output times.
    t1 : tensor of shape (n,)
    budget : int
        Bytes.
    """

    def __init__(self, stepper: Stepper, y0: Tensor, times: Tensor, t1: Tensor, budget: int) -> None:
        self._stepper, self._times, self._t0, self._t1 = stepper, times, times[:, 0], t1
        self._sign = torch.where(t1 < self._t0, -1.0, 1.0).to(times.dtype).unsqueeze(1)
        self.y = torch.where((times == times[:, :1]).unsqueeze(2), y0.unsqueeze(1), torch.nan)
        self._spans: list[tuple[Any, Any, Tensor | None]] = []
        self._states: list[Tensor] = []
        self._values: list[Tensor] = []
        self._nbytes, self._limit = 0, min(PENDING_BYTES, budget // _PART)

    def observe(self, place: Place, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        """Put a step by."""
        n = self._stepper.scheme.n_stages
        self._spans.append((span.t, span.t_next, verdict.accept))
        self._states.append(place.y.clone())
        self._values.append(place.block.F[place.slot : place.slot + n] * verdict.h)
        self._nbytes += self._values[-1].nbytes
        if self._nbytes > self._limit:
            accept = verdict.accept
            self._fill(attempt.y1 if accept is None else torch.where(accept, attempt.y1, place.y))

    def finish(self, end: Tensor, success: bool) -> Tensor:
        """All outputs (n, m, d), NaN where they were not reached; ``end`` is the last state, in the layout's shape."""
        if self._spans:
            self._fill(end)
        return self.y if success else self.y.masked_fill_(torch.isinf(self.y), torch.nan)

    def _fill(self, end: Tensor) -> None:
        """The outputs in the steps that were put by, which end with a state."""
        leave = self._stepper.kernel.layout.leave
        knots = Knots(self._spans, self._stepper.kernel.layout, self._t0, self._t1)
        states = torch.stack([*map(leave, self._states), leave(end)])
        dense = DenseOutput(states, torch.stack([*map(leave, self._values)]), knots, self._stepper.scheme)
        ahead = self._sign * self._times
        covered = (ahead > self._sign * knots.starts[:, :1]) & (ahead <= self._sign * knots.ends[:, -1:])
        columns = torch.nonzero(covered.any(dim=0)).view(-1)
        n_at_once = max(1, self._limit // max(1, dense.output_bytes))
        for some in columns.split(n_at_once):
            found = dense.evaluate(self._times[:, some])
            self.y[:, some] = torch.where(covered[:, some].unsqueeze(2), found, self.y[:, some])
        self._spans, self._states, self._values, self._nbytes = [], [], [], 0
