"""Every row its own time, step, acceptance and status; one host synchronisation a step."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from skode.solver.control import LARGEST, SAFETY, SMALLEST, Tolerance, Verdict, combined, row_norm
from skode.solver.layout import Layout
from skode.solver.solution import Stats, Status, failed_rows
from skode.solver.step import Attempt, Place, Scheme, Span, Stepper, stage_times, time_dtype_of

BUCKETS = 8
"""Of a factor of two: so finely errors are told apart."""


class _Tables(NamedTuple):
    """Step factors over quantised errors.

    Float32 round-off in an error must not reach the step (a first step would amplify it to 4e-2), so a step depends on
    the error's bucket alone.
    """

    edges: Tensor
    centres: Tensor
    accepted: Tensor
    rejected: Tensor
    power: Tensor
    n: int


@lru_cache(maxsize=64)
def _tables(order: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        return _make_tables(order, dtype, device)


def _make_tables(order: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    exponents = torch.arange(-240, 241, dtype=torch.float64) / BUCKETS
    values = torch.cat([2.0 ** (exponents - 0.5 / BUCKETS), torch.tensor([2.0**64])])
    time_dtype = time_dtype_of(device)

    def table(entries: Tensor) -> Tensor:
        return entries.to(time_dtype).to(device)

    return _Tables(
        (2.0**exponents).to(dtype).to(device),
        table(values),
        table((SAFETY * values ** (-1 / order)).clamp(SMALLEST, LARGEST)),
        table((SAFETY * values ** (-1 / order)).clamp(SMALLEST, SAFETY)),
        table((0.01 / values) ** (1 / order)),
        len(values),
    )


class Stops(NamedTuple):
    """Times where steps have to end, sorted along each row's way and padded with its last time.

    ``t`` has shape (k, *row), float64; ``jumps`` tells where the field has to be asked again, ``at_start`` whether it
    jumps at the very start, ``aside`` whether it is asked just after a jump, and before it just before.
    """

    t: Tensor
    jumps: Tensor
    at_start: Tensor
    aside: bool = True


class RowControl:
    """Steps of each row's own.

    Parameters
    ----------
    t0, t1 : tensors, float64
        One number for each row, in the layout's shape.
    tolerance : Tolerance
    scheme : Scheme
    layout : Layout
    stops : Stops, optional
    """

    def __init__(
        self, t0: Tensor, t1: Tensor, tolerance: Tolerance, scheme: Scheme, layout: Layout, stops: Stops | None = None
    ) -> None:
        self.t, self.t1, self._target = t0.clone(), t1, t1
        self.sign = torch.sign(t1 - t0)
        self.tolerance, self.scheme, self.layout = tolerance, scheme, layout
        self.dtype = scheme.b.dtype
        self._tables = _tables(max(scheme.tableau.error_order, 1), self.dtype, t0.device)
        self._active = self.sign != 0
        self._status = torch.zeros_like(self._active, dtype=torch.int8)
        self._attempts = torch.zeros_like(self._status, dtype=torch.int64)
        self._steps, self._extra_evals = self._attempts.clone(), self._attempts.clone()
        self._was_rejected: Tensor | None = None
        self._norm_now = torch.zeros_like(t0, dtype=self.dtype)
        self.h = self._length = (t1 - t0).abs()
        self._stops, self.stop_number = stops, torch.zeros_like(self._attempts)
        self.landed = torch.zeros_like(self._active)  # rows that the last step brought to a stop
        self._side: Tensor | None = None
        if stops is not None:
            self._aim()
            self._side = stops.at_start if stops.aside else None
        self._try, self._last = self.h, self._active
        self._success, self._dirty, self._n_judged, self._n_common = True, False, 0, 0
        self._n_rows = t0.numel()
        self._direction: Tensor | None = None
        self._recount()

    def start_time(self) -> Tensor:
        time = self.t.to(self.dtype)
        if self._side is None:
            return time
        return torch.where(self._side, torch.nextafter(time, time + self.sign.to(self.dtype)), time)

    def begin(self, stepper: Stepper, place: Place) -> None:
        y, f = place.y, place.f
        self._extra_evals += 1
        dim = self.layout.dim
        finite = torch.isfinite(f).all(dim=dim, keepdim=True) & torch.isfinite(y).all(dim=dim, keepdim=True)
        self._success = bool(finite.all())
        if not self._success:
            self._dirty = True
            self._status.masked_fill_(~finite, Status.NON_FINITE)
            self._active = self._active & finite
            self._recount()
        length = (self._target - self.t).abs()
        given = self.tolerance.step_size or self.tolerance.first_step
        if given is not None:
            self.h = torch.clamp(self._length, max=given)
        elif self.running:
            self.h = torch.minimum(self._first_step(stepper, place, length), (self.t1 - self.t).abs())
        self._bound()

    def _bound(self) -> None:
        low, high = self.tolerance.min_step, self.tolerance.max_step
        if low or high is not None:
            self.h = torch.clamp(self.h, low, high)

    def _first_step(self, stepper: Stepper, place: Place, length: Tensor) -> Tensor:
        """Hairer, Norsett and Wanner I, section II.4, on quantised norms."""
        tables, dim, y, f = self._tables, self.layout.dim, place.y, place.f
        unit = self.tolerance.unit(y, y)
        d0, d1 = row_norm(y / unit, dim), row_norm(f / unit, dim)
        small = torch.minimum(d0, d1) < 1e-5
        bucket = torch.bucketize((d0 / d1).nan_to_num_(0.0), tables.edges).clamp_(max=tables.n - 2)
        guess = torch.where(small, 1e-6, 0.01 * tables.centres[bucket])
        guess = torch.minimum(guess, length) * self._active
        t = torch.where(guess == length, self._target, torch.addcmul(self.t, guess, self.sign))
        h = guess * self.sign
        probe = stepper.probe(place, t.to(self.dtype), torch.addcmul(y, h.to(self.dtype), f))
        self._extra_evals += self._active
        d2 = row_norm((probe - f).div_(unit), dim) / guess.to(self.dtype)
        steepest = torch.fmax(d1, d2)
        bound = tables.power[torch.bucketize(steepest.nan_to_num(0.0), tables.edges)]
        bound = torch.where(steepest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), bound)
        return torch.minimum(100 * guess, bound)

    def propose(self) -> Span:
        remaining = (self._target - self.t).abs_()
        # A step that all but arrives goes the whole way: no sliver is left by round-off.
        self._last = torch.ge(self.h, remaining * (1 - 1e-9)).logical_and_(self._active)
        self._try = torch.minimum(self.h, remaining)
        if self._direction is None:
            self._direction = self.sign * self._active
        t_next = torch.where(self._last, self._target, torch.addcmul(self.t, self._try, self._direction))
        h = t_next - self.t
        times = None if self._side is None else self._inside(stage_times(self.scheme, self.layout, t_next, h))
        return Span(self.t, t_next, h.to(self.dtype), times)

    def _inside(self, times: Tensor) -> Tensor:
        """Keep off the jumps at either end of the step: the field is asked just before, and just after."""
        assert self._stops is not None
        start, end = self.start_time(), self._target.to(self.dtype)
        jumps = self._of_stop(self._stops.jumps)
        end = torch.where(jumps, torch.nextafter(end, end - self.sign.to(self.dtype)), end)
        return torch.clamp(times, torch.minimum(start, end), torch.maximum(start, end))

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        parts, unit, second, dim = None, None, attempt.error2, self.layout.dim
        if attempt.error is None:
            norm = torch.where(torch.isfinite(attempt.y1).all(dim=dim, keepdim=True), 0.0, torch.nan).to(self.dtype)
        else:
            unit = self.tolerance.unit(place.y, attempt.y1)
            parts = attempt.error.div_(unit)
            norm = row_norm(parts, dim).mul_(span.h.abs())
            if second is not None:
                norm = combined(norm, row_norm(second.div_(unit), dim).mul_(span.h.abs()))
        failed = attempt.failed
        if failed is not None:
            norm = torch.where(failed, torch.inf, norm)
        accept = torch.le(norm, 1).logical_and_(self._active)
        if self.tolerance.min_step:
            accept |= self._active & torch.isfinite(norm) & (self._try <= self.tolerance.min_step)
        arrived = accept & self._last
        n_accepted, n_arrived = torch.stack([accept, arrived]).flatten(1).sum(dim=1).tolist()
        everyone, jumped = n_accepted == self._n_active, False
        self._norm_now = norm
        self._count(accept, everyone)
        if everyone:
            self._go_on(norm, span, n_arrived)
        else:
            self._sort_out(norm, span, accept, failed)
        if n_arrived and self._stops is not None:
            jumped = self._reach(arrived)
        self._limit()
        if n_arrived or not everyone:
            self._recount()
        if not self.scheme.tableau.fsal:
            self._extra_evals += accept & self._active  # the next step's first stage
        # What a row holds that died must not be touched any more.
        whole = everyone and not self._dirty
        h = span.h if whole else span.h * accept
        if parts is not None and not whole:
            parts = torch.where(accept, parts, 0.0)
            second = None if second is None else torch.where(accept, second, 0.0)
        return Verdict(h, None if whole else accept, n_accepted > 0, not self._dirty, jumped, parts, unit, second)

    def _count(self, accept: Tensor, everyone: bool) -> None:
        if everyone and self._n_active == self._n_rows:
            self._n_common += 1  # of all rows, a number does
        else:
            self._attempts += self._active
            self._steps += accept

    def _recount(self) -> None:
        """After rows have retired."""
        self._n_active, self._direction = int(self._active.sum()), None
        self.running = self._n_active > 0

    def _go_on(self, norm: Tensor, span: Span, n_arrived: int) -> None:
        """All rows that wanted to have gone on."""
        self.t = span.t_next
        if self.tolerance.step_size is None:
            self.h = self._growth(torch.bucketize(norm, self._tables.edges)).mul_(self._try)
            self._was_rejected = None
            self._bound()
        if n_arrived and self._stops is None:
            self._active = self._active & ~self._last

    def _growth(self, bucket: Tensor) -> Tensor:
        """The step factors of accepted errors; a step that follows a rejection does not grow."""
        growth = torch.take(self._tables.accepted, bucket)
        if self._was_rejected is None:
            return growth
        return torch.where(self._was_rejected, growth.clamp(max=1.0), growth)

    def _sort_out(self, norm: Tensor, span: Span, accept: Tensor, failed: Tensor | None) -> None:
        """Some rows were rejected: they try again, or stop; a failed row keeps its last good state."""
        active, finite = self._active, torch.isfinite(norm)
        self._dirty = self._dirty or bool((active & ~(finite if failed is None else finite | failed)).any())
        self.t = torch.where(accept, span.t_next, self.t)
        if self.tolerance.step_size is None:
            bucket = torch.bucketize(norm, self._tables.edges)
            factor = torch.where(accept, self._growth(bucket), self._tables.rejected[bucket])
            self.h = torch.where(active, self._try * factor, self.h)
            self._bound()
            self._was_rejected = active & ~accept
        stuck = active & ~accept
        if self.tolerance.step_size is None:
            tiny = 4 * torch.finfo(self.t.dtype).eps * torch.maximum(self.t.abs(), self.t1.abs())
            stuck = stuck & ((self.h <= tiny) | (~finite & (self._try <= self.tolerance.min_step)))
        self._status.masked_fill_(stuck & finite, Status.STEP_UNDERFLOW)
        self._status.masked_fill_(stuck & ~finite, Status.NON_FINITE)
        if failed is not None:
            self._status.masked_fill_(stuck & failed, Status.NO_CONVERGENCE)
        self._active = active & ~stuck
        if self._stops is None:
            self._active &= ~(accept & self._last)
        self._success = self._success and not bool(stuck.any())

    def _reach(self, arrived: Tensor) -> bool:
        """Rows that came to a stop take the next one; those that came to the end retire."""
        assert self._stops is not None
        ended = arrived & (self.t == self.t1)
        jumps = arrived & ~ended & self._of_stop(self._stops.jumps)
        if self._side is not None:
            self._side = torch.where(arrived, jumps, self._side)
        self.landed = arrived
        self._aim()
        self._active = self._active & ~ended
        jumped = bool(jumps.any())
        if jumped and self.scheme.tableau.fsal:
            self._extra_evals += jumps
        return jumped

    def _aim(self) -> None:
        """Every row takes the first stop that it has not passed."""
        assert self._stops is not None
        passed = (self.sign * self._stops.t <= self.sign * self.t).sum(dim=0)
        self.stop_number = passed.clamp(max=len(self._stops.t) - 1)
        self._target = self._of_stop(self._stops.t)

    def _of_stop(self, x: Tensor) -> Tensor:
        return x.gather(0, self.stop_number.unsqueeze(0))[0]

    def _limit(self) -> None:
        """Retire rows that have used up their steps."""
        limit = self.tolerance.max_num_steps
        self._n_judged += 1
        if self._n_judged < limit:
            return
        spent = self._active & (self._attempts + self._n_common >= limit)
        if bool(spent.any()):
            self._status.masked_fill_(spent, Status.MAX_STEPS)
            self._active = self._active & ~spent
            self._success = False
            self._recount()

    def stop(self, rows: Tensor, status: Status) -> None:
        """End the solve of rows here."""
        self._status.masked_fill_(rows, status)
        self._active = self._active & ~rows
        self._success = not bool(failed_rows(self._status).any())
        self._recount()

    def stats(self, y: Tensor) -> Stats:
        def column(x: Tensor) -> Tensor:
            return self.layout.leave(x).reshape(-1)

        status = column(self._status)
        steps, attempts = column(self._steps) + self._n_common, column(self._attempts) + self._n_common
        evals = column(self._extra_evals) + attempts * (self.scheme.n_stages - 1)
        next_step = float(torch.minimum(self.h, self._length).mean()) if self._status.numel() else 0.0
        return Stats(
            status,
            evals,
            steps,
            attempts - steps,
            column(self.t),
            column(self._try),
            column(self._norm_now),
            next_step,
            self._success,
        )
