"""Dense output: the solution between the steps' ends, gathered once for each (row, time) pair.

Symbols: ``theta`` in [0, 1] is the place inside a step, ``beta_i(theta)`` the weight of stage increment ``K[i]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.step import Scheme, Span


class Step(NamedTuple):
    """A recorded step: where from (``y``), what was tried, the ``h`` that counted.

    Kept on demand: stacked increments, tapes, and the derivative of the squared error with the error.
    """

    y: Tensor
    span: Span
    h: Any
    K: Tensor | None
    tapes: list[Any] | None
    error: Tensor | None = None


class Places(NamedTuple):
    """Where output times lie: step, theta, at the step's very end?, and not reached?; all of shape (n, q)."""

    step: Tensor
    theta: Tensor
    at_end: Tensor
    beyond: Tensor


@dataclass(frozen=True)
class DenseOutput:
    """The recorded steps of a solve as a function of time.

    Parameters
    ----------
    steps : list of Step
    y_end : tensor of shape (n, d)
    t0, t1 : tensors of shape (n,)
    scheme : Scheme
    """

    steps: list[Step]
    y_end: Tensor
    t0: Tensor
    t1: Tensor
    scheme: Scheme

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        """Each step's start and end for every row, both of shape (n, n_steps)."""
        return self._column("t"), self._column("t_next")

    def _column(self, name: str) -> Tensor:
        values = [getattr(step.span, name) for step in self.steps]
        if isinstance(values[0], Tensor):
            # A row that stayed has an empty step.
            moved = [step.h != 0 for step in self.steps]
            stay = [step.span.t for step in self.steps]
            return torch.cat(
                [torch.where(m, v, s) for m, v, s in zip(moved, values, stay, strict=True)], dim=1
            ).contiguous()
        return self.t0.new_tensor(values).expand(len(self.t0), -1).contiguous()

    @cached_property
    def _states(self) -> Tensor:
        return torch.stack([step.y for step in self.steps] + [self.y_end])

    @cached_property
    def _increments(self) -> Tensor:
        return torch.stack([step.K for step in self.steps if step.K is not None])

    @property
    def _sign(self) -> Tensor:
        return torch.where(self.t1 < self.t0, -1.0, 1.0).to(self.t0.dtype).unsqueeze(1)

    def locate(self, times: Tensor) -> Places:
        """The step that covers each time, shape (n, q)."""
        starts, ends = self._ends
        found = torch.searchsorted(self._sign * ends, (self._sign * times).contiguous())
        beyond = (found == ends.shape[1]) | torch.isnan(times)
        step = found.clamp(max=ends.shape[1] - 1)
        start, end = starts.gather(1, step), ends.gather(1, step)
        inside = (times - start) / torch.where(end == start, 1.0, end - start)
        at_end = (times == end) & ~beyond
        theta = torch.where(at_end, 1.0, inside)
        return Places(step, torch.where(beyond, 0.0, theta), at_end, beyond)

    def weights(self, theta: Tensor) -> Tensor:
        """beta_i(theta), shape (..., n_stages)."""
        p = self.scheme.p
        return torch.stack([theta**k for k in range(1, p.shape[1] + 1)], dim=-1).to(p.dtype) @ p.t()

    def slopes(self, theta: Tensor) -> Tensor:
        """D beta_i / d theta, shape (..., n_stages)."""
        p = self.scheme.p
        return torch.stack([k * theta ** (k - 1) for k in range(1, p.shape[1] + 1)], dim=-1).to(p.dtype) @ p.t()

    def evaluate(self, t: Tensor, *, checked: bool = False) -> Tensor:
        """States at times ``(q,)`` or ``(n, q)``; NaN where they were not reached."""
        times = t.to(self.t0).expand(len(self.t0), -1) if t.dim() == 1 else t.to(self.t0)
        if checked:
            self._require_inside(times)
        if not self.steps:
            states = self.y_end.unsqueeze(1).expand(-1, times.shape[1], -1).clone()
            return torch.where((times == self.t0.unsqueeze(1)).unsqueeze(-1), states, torch.nan)
        places = self.locate(times)
        rows = torch.arange(len(times), device=times.device).unsqueeze(1)
        inside = torch.einsum("nqs,nqsd->nqd", self.weights(places.theta), self._increments[places.step, :, rows])
        inside += self._states[places.step, rows]
        states = torch.where(places.at_end.unsqueeze(-1), self._states[places.step + 1, rows], inside)
        return states.masked_fill(places.beyond.unsqueeze(-1), torch.nan)

    def _require_inside(self, times: Tensor) -> None:
        low = torch.minimum(self.t0, self.t1).unsqueeze(1)
        high = torch.maximum(self.t0, self.t1).unsqueeze(1)
        outside = torch.nonzero((times < low) | (times > high))
        if len(outside):
            row, column = outside[0].tolist()
            raise ValueError(
                f"time {float(times[row, column]):.6g} (row {row}) lies outside of the solved interval "
                f"[{float(low[row]):.6g}, {float(high[row]):.6g}]."
            )
