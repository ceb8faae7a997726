"""One step size for the whole batch, kept in plain numbers: cheap, but a row's result depends on its neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skode.solver.control import LARGEST, SAFETY, SMALLEST, BatchControl, Tolerance, Verdict
from skode.solver.layout import Layout
from skode.solver.solution import Stats, Status
from skode.solver.standing import Standing
from skode.solver.step import Attempt, Place, Scheme, Span, Stepper, stage_times, time_dtype_of


class SharedStops(NamedTuple):
    """Times where a step has to end, in order, t1 the last, and whether the field has to be asked again there.

    ``at_start``: whether it jumps at the very start; ``aside``: whether it is asked just after a jump, and before it
    just before.
    """

    t: list[tuple[float, bool]]
    at_start: bool = False
    aside: bool = True


class SharedControl:
    """All rows take the same steps.

    Parameters
    ----------
    t0, t1 : float
    tolerance : Tolerance
    scheme : Scheme
    layout : Layout
    batch : BatchControl
    stops : SharedStops
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        tolerance: Tolerance,
        scheme: Scheme,
        layout: Layout,
        batch: BatchControl,
        stops: SharedStops,
    ) -> None:
        self.t, self.t1 = t0, t1
        self.sign = math.copysign(1.0, t1 - t0)
        self.tolerance, self.scheme, self.layout = tolerance, scheme, layout
        self._order = max(scheme.tableau.error_order, 1)
        self._batch, self._weights = batch, None
        if batch.weights is not None:
            weights = batch.weights if batch.peers.size > 1 else batch.weights / batch.weights.sum()
            self._weights = layout.enter_cotangent(weights.to(scheme.b.dtype).view(-1, 1))
        self._n_evals, self._n_steps, self._n_rejected, self._status = 0, 0, 0, Status.SUCCESS
        self._was_rejected, self._error_now = False, 0.0
        self._last_step, self._last_error = abs(t1 - t0), SAFETY
        self._evals_a_step = scheme.n_stages - 1  # the first stage is known when the first step begins
        self._stops, self._aside = list(stops.t), stops.aside
        self._side = float(stops.at_start and stops.aside)
        self._reason = Status.NON_FINITE  # of an error without bounds
        self.h = 0.0
        self._proposed: Span | None = None
        self._standing: Standing | None = None
        self.running = t0 != t1

    def start_time(self) -> Tensor:
        time = torch.full((), self.t, dtype=self.scheme.b.dtype, device=self.scheme.b.device)
        if self._side:
            time = torch.nextafter(time, time + self.sign)
        return time.view((1,) * len(self.layout.row))

    def begin(self, stepper: Stepper, place: Place) -> None:
        self._n_evals += 1
        length = abs(self.t1 - self.t)
        if not length:
            return
        given = self.tolerance.step_size or self.tolerance.first_step
        self.h = min(length, self._first_step(stepper, place, length) if given is None else given)
        self._bound()

    def _bound(self) -> None:
        if self.tolerance.max_step is not None:
            self.h = min(self.h, self.tolerance.max_step)
        self.h = max(self.h, self.tolerance.min_step)

    def _norm(self, ratio: Tensor, h: float = 1.0) -> float:
        """Of the errors ``h ratio``."""
        if self._batch.norm is not None:
            return float(self._batch.norm(self.layout.leave(ratio * h)))
        if self._weights is None:
            return abs(h) * float(torch.linalg.vector_norm(ratio)) / math.sqrt(max(ratio.numel(), 1))
        n_components = max(ratio.shape[self.layout.dim], 1)
        total = self._batch.peers.add_up(float((self._weights * ratio.square()).sum()))
        return abs(h) * math.sqrt(total / n_components)

    def _first_step(self, stepper: Stepper, place: Place, length: float) -> float:
        """Hairer, Norsett and Wanner I, section II.4."""
        y, f = place.y, place.f
        unit = self.tolerance.unit(y, y)
        d0, d1 = self._norm(y / unit), self._norm(f / unit)
        if not math.isfinite(d0 + d1):
            return length
        guess = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, abs(self._stops[0][0] - self.t))
        t = self._stops[0][0] if guess == abs(self._stops[0][0] - self.t) else self.t + self.sign * guess
        probe = stepper.probe(place, y.new_full((1,) * y.dim(), t), torch.add(y, f, alpha=self.sign * guess))
        self._n_evals += 1
        steepest = max(d1, self._norm((probe - f).div_(unit)) / guess)
        bound = max(1e-6, guess * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / self._order)
        return min(100 * guess, bound)

    def propose(self) -> Span:
        target = self._stops[0][0]
        remaining = target - self.t
        if self.h >= abs(remaining) * (1 - 1e-9):
            t_next = target
        else:
            # The last two steps share what is left, so that none of them is a sliver.
            shared = self._adapts and 2 * self.h > abs(remaining) >= 2 * self.tolerance.min_step
            t_next = self.t + (remaining / 2 if shared else self.sign * self.h)
        h = t_next - self.t
        times = None
        if (self._aside and (self._side or self._stops[0][1])) or self._standing is not None:
            times = self._inside(stage_times(self.scheme, self.layout, t_next, h), t_next)
        span = Span(self.t, t_next, h, times)
        if self._standing is None:
            return span
        self._proposed = span
        return self._standing.hold(span, self.scheme.b.dtype)

    def _inside(self, times: Tensor, t_next: float) -> Tensor:
        """Keep off the jumps at either end of the step: the field is asked just before, and just after."""
        low = self.start_time() if self._side else None
        high = None
        if self._stops[0][1] and t_next == self._stops[0][0]:
            end = torch.full_like(times[:1], t_next)
            high = torch.nextafter(end, end - self.sign)
        if self.sign < 0:
            low, high = high, low
        if low is None and high is None:
            return times
        return torch.clamp(times, low, high)

    @property
    def _adapts(self) -> bool:
        return self.tolerance.step_size is None

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        self._n_evals += self._evals_a_step
        error, ratio, unit, second = 0.0, None, None, attempt.error2
        h_of_rows = span.h
        span = span if self._standing is None or self._proposed is None else self._proposed
        if attempt.error is not None and self._adapts:
            unit = self.tolerance.unit(place.y, attempt.y1)
            if self._standing is not None:
                self._standing.clear(attempt.error, attempt.error2)
            ratio = attempt.error.div_(unit)
            error = self._norm(ratio, span.h)
            if second is not None:
                coarse = self._norm(second.div_(unit), span.h)
                error = error * (error / math.hypot(error, 0.1 * coarse)) if error else 0.0
        if attempt.failed is not None and self._batch.peers.any(bool(attempt.failed.any())):
            error, self._reason = math.inf, Status.NO_CONVERGENCE
        else:
            self._reason = Status.NON_FINITE
        self._error_now = error
        # Between two times a step of min_step comes out longer or shorter by round-off.
        shortest = min(self.h, abs(span.h)) <= self.tolerance.min_step
        accepted = error <= 1 or (shortest and math.isfinite(error))
        if self._adapts:
            self._next_step(abs(span.h), error, accepted)
        if not accepted:
            self._reject(error, shortest)
            return Verdict(0.0, None, False, math.isfinite(error))
        self._n_steps += 1
        self._evals_a_step = self.scheme.n_stages - int(self.scheme.tableau.fsal)
        self._last_step, self._last_error = abs(span.h), error
        jumped = self._arrive(span.t_next)
        if self.running and self._n_steps + self._n_rejected >= self.tolerance.max_num_steps:
            self._stop(Status.MAX_STEPS)
        return Verdict(h_of_rows, None, True, True, jumped, ratio, unit, second)

    def _reject(self, error: float, shortest: bool) -> None:
        self._n_rejected += 1
        self._evals_a_step = self.scheme.n_stages - 1  # the first stage is known
        if self._n_steps + self._n_rejected >= self.tolerance.max_num_steps:
            self._stop(Status.MAX_STEPS)
        if self.h <= 4 * torch.finfo(torch.float64).eps * max(abs(self.t), abs(self.t1)) or (
            not math.isfinite(error) and shortest
        ):
            self._stop(Status.STEP_UNDERFLOW if math.isfinite(error) else self._reason)

    def _arrive(self, t_next: float) -> bool:
        """Go on to ``t_next``; whether the field jumps there."""
        self.t, self._side = t_next, 0.0
        if t_next != self._stops[0][0]:
            return False
        _, jumps = self._stops.pop(0)
        self.running = bool(self._stops)
        self._side = float(jumps and self._aside)
        if jumps and self.running:
            self._n_evals += int(self.scheme.tableau.fsal)
        return jumps

    def _stop(self, status: Status) -> None:
        self._status, self.running = status, False

    def stop(self, rows: Tensor, status: Status) -> None:
        """End the solve of rows here: they stand still while the others go on, and do not count for these."""
        if self._standing is None:
            like = torch.empty((), dtype=time_dtype_of(rows.device), device=rows.device)
            self._standing = Standing(self.layout, like)
        self._standing.add(rows, status, self.t, (self._n_evals, self._n_steps, self._n_rejected))
        self._weights = self._standing.weights(self._weights).to(self.scheme.b.dtype)
        self.running = self.running and not bool(self._standing.rows.all())

    def _next_step(self, h: float, error: float, accepted: bool) -> None:
        if not math.isfinite(error):
            factor = SMALLEST
        elif not accepted:
            factor = max(SMALLEST, SAFETY * error ** (-1 / self._order))
        else:
            growth = SAFETY * max(error, 1e-10) ** (-1 / self._order)
            factor = min(max(growth, SMALLEST), 1.0 if self._was_rejected else LARGEST)
        self._was_rejected = not accepted
        self.h = h * factor
        self._bound()

    def stats(self, y: Tensor) -> Stats:
        rows = self.layout.leave(y)
        success = self._status in (Status.SUCCESS, Status.EVENT)
        status = torch.full((len(rows),), self._status, dtype=torch.int8, device=y.device)
        if success and not math.isfinite(float(rows.sum())):
            status.masked_fill_(~torch.isfinite(rows).all(dim=1), Status.NON_FINITE)
            success = not bool(status.any())
        counts = torch.tensor([self._n_evals, self._n_steps, self._n_rejected], device=y.device)
        last = self._last_step if success else self.h
        numbers = torch.tensor([self.t, last, self._error_now], dtype=time_dtype_of(y.device), device=y.device)
        # All rows share them: one number stands for all.
        n_evals, n_steps, n_rejected = counts.unsqueeze(1).expand(-1, len(rows)).unbind(0)
        t, h, norm = numbers.unsqueeze(1).expand(-1, len(rows)).unbind(0)
        stats = Stats(status, n_evals, n_steps, n_rejected, t, h, norm, self._proposal(), success)
        return stats if self._standing is None else self._standing.in_stats(stats)

    def _proposal(self) -> float:
        """The longest step that the last one's error would have allowed."""
        return float(self._last_step * (SAFETY / max(self._last_error, 1e-10)) ** (1 / self._order))
