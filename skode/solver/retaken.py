"""Steps that are given, taken one after another: none is rejected, none is chosen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from skode.solver.control import Tolerance, Verdict
from skode.solver.layout import Layout
from skode.solver.plan import Plan
from skode.solver.solution import Stats, Status, failed_rows
from skode.solver.step import Attempt, Place, Scheme, Span, Stepper, stage_times, time_dtype_of


class _Retaken:
    """What both kinds have in common.

    Parameters
    ----------
    plan : Plan
    tolerance : Tolerance
        Gives the units of the errors.
    scheme : Scheme
    layout : Layout
    keep_errors : bool
        Whether the steps' errors are asked for.
    """

    def __init__(self, plan: Plan, tolerance: Tolerance, scheme: Scheme, layout: Layout, keep_errors: bool) -> None:
        self.plan, self.tolerance, self.scheme, self.layout = plan, tolerance, scheme, layout
        self._keep_errors, self._index = keep_errors, 0
        self.running = plan.t.shape[1] > 1

    def begin(self, stepper: Stepper, place: Place) -> None:
        """Nothing has to be chosen."""

    def _errors(self, place: Place, attempt: Attempt) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Each component's error in units of the tolerance, that unit, and the second estimate's error."""
        if attempt.error is None or not self._keep_errors:
            return None, None, None
        unit = self.tolerance.unit(place.y, attempt.y1)
        return attempt.error / unit, unit, None if attempt.error2 is None else attempt.error2 / unit

    def _stats(self, status: Tensor, n_steps: Tensor, n_evals: Tensor, t: Tensor, h: Tensor) -> Stats:
        success = not bool(failed_rows(status).any())
        step = float(h.mean()) if h.numel() else 0.0
        return Stats(
            status, n_evals, n_steps, torch.zeros_like(n_steps), t, h, torch.full_like(h, math.nan), step, success
        )


class RetakenRows(_Retaken):
    """Every row its own given steps; a row whose state stops being finite stays where it was."""

    def __init__(self, plan: Plan, tolerance: Tolerance, scheme: Scheme, layout: Layout, keep_errors: bool) -> None:
        super().__init__(plan, tolerance, scheme, layout, keep_errors)
        self._times = [layout.enter(t.unsqueeze(1).contiguous()) for t in plan.t.unbind(1)]
        self._sign = torch.sign(self._times[-1] - self._times[0])
        self._jumps: list[Tensor] | None = None
        if plan.jumps is not None:
            self._jumps = [layout.enter(jump.unsqueeze(1).contiguous()) for jump in plan.jumps.unbind(1)]
            starts = plan.starts_aside
            assert starts is not None
            self._aside = [layout.enter(start.unsqueeze(1).contiguous()) for start in starts.unbind(1)]
            self._any_jump = plan.jumps.any(dim=0).tolist()
        self.t = self._times[0]
        self._died: Tensor | None = None  # rows that stopped, once there are any
        self._own_status = torch.zeros_like(self.t, dtype=torch.int8)
        self._steps = torch.zeros_like(self.t, dtype=torch.int64)
        self._extra_evals = torch.ones_like(self._steps)
        self._h = torch.zeros_like(self.t)

    def start_time(self) -> Tensor:
        time = self.t.to(self.scheme.b.dtype)
        if self._jumps is None or not self._any_jump[self._index]:
            return time
        return torch.where(self._aside[self._index], torch.nextafter(time, time + self._sign.to(time.dtype)), time)

    def propose(self) -> Span:
        t, t_next = self.t, self._times[self._index + 1]
        if self._died is not None:
            t_next = torch.where(self._died, t, t_next)
        length = t_next - t
        bounded = self._jumps is not None and (self._any_jump[self._index] or self._any_jump[self._index + 1])
        times = self._inside(stage_times(self.scheme, self.layout, t_next, length), t_next) if bounded else None
        return Span(t, t_next, length.to(self.scheme.b.dtype), times)

    def _inside(self, times: Tensor, t_next: Tensor) -> Tensor:
        """Keep off the jumps at either end of the step."""
        assert self._jumps is not None
        start, end = self.start_time(), t_next.to(times.dtype)
        end = torch.where(self._jumps[self._index + 1], torch.nextafter(end, end - self._sign.to(end.dtype)), end)
        return torch.clamp(times, torch.minimum(start, end), torch.maximum(start, end))

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        dim = self.layout.dim
        finite = torch.isfinite(attempt.y1).all(dim=dim, keepdim=True)
        if attempt.error is not None:
            finite &= torch.isfinite(attempt.error).all(dim=dim, keepdim=True)
        moves = span.t_next != span.t
        good = finite if attempt.failed is None else finite & ~attempt.failed
        n_moves, n_bad = torch.stack([moves, moves & ~good]).flatten(1).sum(dim=1).tolist()
        if n_bad:
            self._stop(moves & ~good, Status.NON_FINITE)
            if attempt.failed is not None:
                self._own_status.masked_fill_(moves & attempt.failed, Status.NO_CONVERGENCE)
        ratio, unit, ratio2 = self._errors(place, attempt)
        accept = None if self._died is None else moves & good & ~self._died
        moved = moves if accept is None else accept
        self.t = span.t_next if accept is None else torch.where(accept, span.t_next, span.t)
        self._h = torch.where(moved, (span.t_next - span.t).abs(), self._h)
        self._steps += moved
        self._index += 1
        self.running = self._index + 1 < len(self._times) and (self._died is None or not bool(self._died.all()))
        if accept is None:
            return Verdict(span.h, None, True, True, self._ask_again(moved), ratio, unit, ratio2)
        ratio, ratio2 = (None if x is None else torch.where(accept, x, 0.0) for x in (ratio, ratio2))
        asked_again = self._ask_again(moved)
        return Verdict(span.h * accept, accept, n_moves > n_bad, False, asked_again, ratio, unit, ratio2)

    def _ask_again(self, moved: Tensor) -> bool:
        """Whether the field jumps where some row has arrived."""
        fsal = self.scheme.tableau.fsal
        if not fsal and self.running:
            self._extra_evals += moved & (self._times[self._index + 1] != self._times[self._index])
        if self._jumps is None or not self._any_jump[self._index]:
            return False
        if fsal:
            self._extra_evals += moved & self._jumps[self._index]
        return True

    def stop(self, rows: Tensor, status: Status) -> None:
        """End the solve of rows here."""
        self._stop(rows, status)
        self.running = self.running and not bool((rows if self._died is None else self._died).all())

    def _stop(self, rows: Tensor, status: Status) -> None:
        self._own_status.masked_fill_(rows, status)
        self._died = rows if self._died is None else self._died | rows

    def stats(self, y: Tensor) -> Stats:
        def column(x: Tensor) -> Tensor:
            return self.layout.leave(x).reshape(-1)

        status, n_steps = column(self._own_status).clone(), column(self._steps).clone()
        if self.plan.status is not None:
            status = torch.where(status == 0, self.plan.status, status)
        n_evals = column(self._extra_evals) + n_steps * (self.scheme.n_stages - 1)
        return self._stats(status, n_steps, n_evals, column(self.t).clone(), column(self._h).clone())


class RetakenShared(_Retaken):
    """The same given steps for all rows, as plain numbers; the device is never waited for."""

    def __init__(self, plan: Plan, tolerance: Tolerance, scheme: Scheme, layout: Layout, keep_errors: bool) -> None:
        super().__init__(plan, tolerance, scheme, layout, keep_errors)
        self._times: list[float] = plan.t[0].tolist()
        self._jumps: list[bool] = [False] * len(self._times) if plan.jumps is None else plan.jumps[0].tolist()
        self._sign = math.copysign(1.0, self._times[-1] - self._times[0])
        self._n_evals, self._status = 1, Status.SUCCESS

    @property
    def t(self) -> float:
        """Where all rows are."""
        return self._times[self._index]

    def start_time(self) -> Tensor:
        time = torch.full((), self.t, dtype=self.scheme.b.dtype, device=self.scheme.b.device)
        if self._jumps[self._index]:
            time = torch.nextafter(time, time + self._sign)
        return time.view((1,) * len(self.layout.row))

    def propose(self) -> Span:
        t, t_next = self.t, self._times[self._index + 1]
        times = None
        if self._jumps[self._index] or self._jumps[self._index + 1]:
            times = self._inside(stage_times(self.scheme, self.layout, t_next, t_next - t), t_next)
        return Span(t, t_next, t_next - t, times)

    def _inside(self, times: Tensor, t_next: float) -> Tensor:
        """Keep off the jumps at either end of the step."""
        low: Tensor | None = self.start_time() if self._jumps[self._index] else None
        high: Tensor | None = None
        if self._jumps[self._index + 1]:
            end = torch.full_like(times[:1], t_next)
            high = torch.nextafter(end, end - self._sign)
        if self._sign < 0:
            low, high = high, low
        return torch.clamp(times, low, high)

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        if attempt.failed is not None and bool(attempt.failed.any()):
            self._status, self.running = Status.NO_CONVERGENCE, False
            return Verdict(0.0, None, False, False)
        self._index += 1
        fsal, jumped = self.scheme.tableau.fsal, self._jumps[self._index]
        self.running = self._index + 1 < len(self._times)
        asked_again = self.running and (jumped or not fsal)
        self._n_evals += self.scheme.n_stages - 1 + int(asked_again)
        return Verdict(span.h, None, True, True, jumped, *self._errors(place, attempt))

    def stop(self, rows: Tensor, status: Status) -> None:
        """End the solve here: what rows share ends for all."""
        self._status, self.running = status, False

    def stats(self, y: Tensor) -> Stats:
        rows, device = self.layout.leave(y), y.device

        def column(value: Any, dtype: torch.dtype) -> Tensor:
            return torch.full((len(rows),), value, dtype=dtype, device=device)

        status = column(self._status, torch.int8) if self.plan.status is None else self.plan.status.clone()
        status.masked_fill_(~torch.isfinite(rows).all(dim=1), Status.NON_FINITE)
        h = abs(self.t - self._times[self._index - 1]) if self._index else 0.0
        return self._stats(
            status,
            column(self._index, torch.int64),
            column(self._n_evals, torch.int64),
            column(self.t, time_dtype_of(device)),
            column(h, torch.float64),
        )
