"""Dense output: the solution between the steps' ends, gathered once for each (row, time) pair.

Symbols: ``theta`` in [0, 1] is the place inside a step, ``beta_i(theta)`` the weight of stage value ``F[i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.control import at
from skode.solver.layout import Layout
from skode.solver.record import Step
from skode.solver.step import Scheme


class Places(NamedTuple):
    """Where output times lie: step, theta, at the step's very end?, and not reached?; all of shape (n, q)."""

    step: Tensor
    theta: Tensor
    at_end: Tensor
    beyond: Tensor


class Knots:
    """The steps' starts and ends in time for every row, both of shape (n, n_steps), and where times lie in them.

    Parameters
    ----------
    spans : sequence of (start, end, accept)
        As a record keeps them.
    layout : Layout
    t0, t1 : tensors of shape (n,)
    halts : tensor of shape (n,), optional
        Times that rows did not go beyond, although their last steps did; NaN for others.
    """

    def __init__(
        self,
        spans: Sequence[tuple[Any, Any, Tensor | None]],
        layout: Layout,
        t0: Tensor,
        t1: Tensor,
        halts: Tensor | None = None,
    ) -> None:
        self.t0, self.t1, self._halts = t0, t1, halts
        self._spans, self._layout = spans, layout

    def bare(self) -> Knots:
        """The same without what was worked out from it."""
        return Knots(self._spans, self._layout, self.t0, self.t1, self._halts)

    @property
    def nbytes(self) -> int:
        """Bytes of the record of steps: none for steps that all rows share."""
        tensors = [x for span in self._spans for x in span if isinstance(x, Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    @cached_property
    def starts(self) -> Tensor:
        """Where each row's steps start."""
        return self._column([t for t, _, _ in self._spans])

    @cached_property
    def ends(self) -> Tensor:
        """Where they end; a row that stayed has an empty step."""
        return self._column(
            [t_next if accept is None else torch.where(accept, t_next, t) for t, t_next, accept in self._spans]
        )

    @cached_property
    def _sign(self) -> Tensor:
        return torch.where(self.t1 < self.t0, -1.0, 1.0).to(self.t0.dtype).unsqueeze(1)

    def _column(self, values: list[Any]) -> Tensor:
        if values and isinstance(values[-1], Tensor):
            # Shared times become the rows' own once some of these have ended.
            columns = [value if isinstance(value, Tensor) else at(value, self._layout.row, self.t0) for value in values]
            return torch.cat([self._layout.leave(column) for column in columns], dim=1).contiguous()
        return self.t0.new_tensor(values).expand(len(self.t0), -1).contiguous()

    def accepted(self) -> Tensor:
        """Each row's first time and the ends of its steps, without empty ones, shape (n, k + 1), NaN-padded."""
        moved = self.starts != self.ends
        if not moved.numel():
            return self.t0.unsqueeze(1)
        order = torch.argsort((~moved).to(torch.int8), dim=1, stable=True)[:, : int(moved.sum(dim=1).max())]
        ends = torch.where(moved, self.ends, torch.nan).gather(1, order)
        return torch.cat([self.t0.unsqueeze(1), ends], dim=1)

    def locate(self, times: Tensor) -> Places:
        """The step that covers each time, shape (n, q)."""
        found = torch.searchsorted(self._sign * self.ends, (self._sign * times).contiguous())
        beyond = (found == self.ends.shape[1]) | torch.isnan(times)
        if self._halts is not None:
            beyond |= self._sign * times > self._sign * self._halts.unsqueeze(1)
        step = found.clamp(max=self.ends.shape[1] - 1)
        start, end = self.starts.gather(1, step), self.ends.gather(1, step)
        inside = (times - start) / torch.where(end == start, 1.0, end - start)
        at_end = (times == end) & ~beyond
        theta = torch.where(at_end, 1.0, inside)
        return Places(step, torch.where(beyond, 0.0, theta), at_end, beyond)


def weights(scheme: Scheme, theta: Tensor) -> Tensor:
    """beta_i(theta) in the solve's dtype, shape (..., n_stages); computed in theta's, since large terms cancel."""
    return _polynomials(scheme, [theta**k for k in range(1, scheme.p.shape[1] + 1)])


def slopes(scheme: Scheme, theta: Tensor) -> Tensor:
    """D beta_i / d theta in the solve's dtype, shape (..., n_stages)."""
    return _polynomials(scheme, [k * theta ** (k - 1) for k in range(1, scheme.p.shape[1] + 1)])


def _polynomials(scheme: Scheme, powers: list[Tensor]) -> Tensor:
    # Not as a matrix product, whose rounding depends on how many times there are.
    p = scheme.p.to(powers[0].dtype)
    return (torch.stack(powers, dim=-1).unsqueeze(-2) * p).sum(dim=-1).to(scheme.b.dtype)


@dataclass(frozen=True)
class DenseOutput:
    """Some consecutive steps of a solve as a function of time.

    Parameters
    ----------
    states : tensor of shape (n_steps + 1, n, d)
        At the steps' starts and at the end.
    values : tensor of shape (n_steps, n_stages, n, d), or None without steps
        Stage values times the steps' lengths.
    knots : Knots
    scheme : Scheme
    """

    states: Tensor
    values: Tensor | None
    knots: Knots
    scheme: Scheme

    @staticmethod
    def of(steps: Sequence[Step], y_end: Tensor, knots: Knots, scheme: Scheme, layout: Layout) -> DenseOutput:
        """Of recorded steps with their states and values, or the blocks where these lie, and the last state (n, d)."""
        if not steps:
            return DenseOutput(y_end.unsqueeze(0).clone(), None, knots, scheme)
        n = scheme.n_stages
        starts = [step.y if step.block is None else step.block.y[step.slot] for step in steps]
        values = [step.F if step.block is None else step.block.F[step.slot : step.slot + n] for step in steps]
        return DenseOutput(
            torch.stack([*(layout.leave(y) for y in starts if y is not None), y_end]),
            torch.stack([layout.leave(F * step.h) for F, step in zip(values, steps, strict=True) if F is not None]),
            knots,
            scheme,
        )

    @property
    def output_bytes(self) -> int:
        """Bytes that it takes to work out one output of each row."""
        return 0 if self.values is None else self.values[0].nbytes

    def evaluate(self, t: Tensor, *, checked: bool = False) -> Tensor:
        """States at times ``(q,)`` or ``(n, q)``; NaN where they were not reached."""
        times = self._times(t, checked)
        if self.values is None:
            states = self.states[-1].unsqueeze(1).expand(-1, times.shape[1], -1).clone()
            return torch.where((times == self.knots.t0.unsqueeze(1)).unsqueeze(-1), states, torch.nan)
        places = self.knots.locate(times)
        rows = torch.arange(len(times), device=times.device).unsqueeze(1)
        inside = _mixed(weights(self.scheme, places.theta), self.values, places, rows)
        inside += self.states[places.step, rows]
        states = torch.where(places.at_end.unsqueeze(-1), self.states[places.step + 1, rows], inside)
        return states.masked_fill(places.beyond.unsqueeze(-1), torch.nan)

    def derivative(self, t: Tensor, *, checked: bool = False) -> Tensor:
        """Derivatives with the time of what :meth:`evaluate` gives."""
        times = self._times(t, checked)
        if self.values is None:
            return torch.full_like(self.evaluate(times), torch.nan)
        places = self.knots.locate(times)
        rows = torch.arange(len(times), device=times.device).unsqueeze(1)
        length = (self.knots.ends - self.knots.starts).gather(1, places.step).to(self.states.dtype)
        slope = _mixed(slopes(self.scheme, places.theta), self.values, places, rows) / length.unsqueeze(-1)
        return slope.masked_fill(places.beyond.unsqueeze(-1), torch.nan)

    def _times(self, t: Tensor, checked: bool) -> Tensor:
        t0 = self.knots.t0
        times = t.to(t0).expand(len(t0), -1) if t.dim() == 1 else t.to(t0)
        if checked:
            self._require_inside(times)
        return times

    def _require_inside(self, times: Tensor) -> None:
        t0, t1 = self.knots.t0, self.knots.t1
        low, high = torch.minimum(t0, t1).unsqueeze(1), torch.maximum(t0, t1).unsqueeze(1)
        outside = torch.nonzero((times < low) | (times > high))
        if len(outside):
            row, column = outside[0].tolist()
            raise ValueError(
                f"time {float(times[row, column]):.6g} (row {row}) lies outside of the solved interval "
                f"[{float(low[row]):.6g}, {float(high[row]):.6g}]."
            )


def _mixed(beta: Tensor, values: Tensor, places: Places, rows: Tensor) -> Tensor:
    # Not as a matrix product, whose rounding depends on how many times there are.
    return values[places.step, :, rows].mul_(beta.unsqueeze(-1)).sum(dim=2)
