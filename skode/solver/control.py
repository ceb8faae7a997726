"""Who decides the step: every row for itself, or one step for the whole batch.

Both follow the PI controller of Gustafsson (Hairer and Wanner, "Solving Ordinary Differential Equations II",
section IV.2): h_new = safety h err^(-0.7/k) err_previous^(0.4/k), for an error estimate of order h^k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from skode.solver.dynamics import Dynamics
from skode.solver.solution import Stats, Status
from skode.solver.step import Attempt, Scheme, Span

SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Tolerance:
    """How exact and how long: tolerances, and limits of the steps."""

    rtol: float
    atol: float
    max_num_steps: int
    first_step: float | None = None
    step_size: float | None = None


@dataclass(frozen=True)
class BatchControl:
    """One step for all rows, chosen by the (weighted) mean of the rows' squared errors.

    Parameters
    ----------
    weights : tensor of shape (n,), optional
        A row's share in the error norm; equal shares if not given.
    """

    weights: Tensor | None = None


class Verdict(NamedTuple):
    """A judged step: the state to go on from, the step that counts (0 where a row stays), whether all is finite.

    ``ratio`` is each component's error in units of the tolerance, ``unit`` that unit.
    """

    y: Tensor
    f: Tensor | None
    h: Tensor | float
    accepted: bool
    finite: bool
    ratio: Tensor | None = None
    unit: Tensor | None = None


def error_unit(y: Tensor, y1: Tensor, tolerance: Tolerance) -> Tensor:
    """Atol + rtol max(abs(y), abs(y1)), shape (n, d)."""
    return torch.maximum(y.abs(), y1.abs()).mul_(tolerance.rtol).add_(tolerance.atol)


def row_norm(ratio: Tensor) -> Tensor:
    """Each row's root mean square, shape (n, 1)."""
    return ratio.square().mean(dim=1, keepdim=True).sqrt_()


# --- one step size for each row ---------------------------------------------------------------------------------


class _Tables(NamedTuple):
    """Step factors over quantised errors.

    Float32 round-off in an error must not reach the step (a first step would amplify it to 4e-2), so a step depends on
    the error's bucket alone.
    """

    edges: Tensor
    proportional: Tensor
    integral: Tensor
    rejected: Tensor
    power: Tensor
    n: int


@lru_cache(maxsize=64)
def _tables(order: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    exponents = torch.arange(-120, 121, dtype=torch.float64) / 4
    values = torch.cat([2.0**exponents, torch.tensor([2.0**64])])
    time_dtype = time_dtype_of(device)

    def table(entries: Tensor) -> Tensor:
        return entries.to(time_dtype).to(device)

    return _Tables(
        (2.0**exponents).to(dtype).to(device),
        table(SAFETY * values ** (-0.7 / order)),
        table(values.clamp(min=1e-4) ** (0.4 / order)),
        table((SAFETY * values ** (-1 / order)).clamp(SMALLEST, SAFETY)),
        table((0.01 / values) ** (1 / order)),
        len(values),
    )


def time_dtype_of(device: torch.device) -> torch.dtype:
    """Times are float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class RowControl:
    """Every row its own time, step, acceptance and status; one host synchronisation a step.

    Parameters
    ----------
    t0, t1 : tensors of shape (n,)
    tolerance : Tolerance
    scheme : Scheme
    """

    def __init__(self, t0: Tensor, t1: Tensor, tolerance: Tolerance, scheme: Scheme) -> None:
        device = t0.device
        self.t, self.t1 = t0.view(-1, 1).clone(), t1.view(-1, 1)
        self.sign = torch.sign(self.t1 - self.t)
        self.tolerance, self.scheme = tolerance, scheme
        self.dtype = scheme.b.dtype
        self._late = 1 - scheme.c.to(t0.dtype)
        self._order = scheme.tableau.error_order
        self._tables = _tables(max(self._order, 1), self.dtype, device)
        self._active = self.sign != 0
        self._status = torch.zeros_like(self._active, dtype=torch.int8)
        self._evals = torch.zeros_like(self._status, dtype=torch.int64)
        self._steps, self._rejected = self._evals.clone(), self._evals.clone()
        self._evals_a_step = scheme.tableau.n_stages - 1  # the first stage is known when the first step begins
        self._previous = torch.full_like(self._evals, 120)
        self._was_rejected = torch.zeros_like(self._active)
        self.h = (self.t1 - self.t).abs()
        self.running = bool(self._active.any())

    def start_time(self) -> Tensor:
        """Every row's first time, shape (n, 1), in the state's dtype."""
        return self.t.to(self.dtype)

    def begin(self, dynamics: Dynamics, y: Tensor, f: Tensor) -> None:
        """Choose the first step that is to be tried, given the field ``f`` at the start."""
        self._evals += 1
        finite = torch.isfinite(f).all(dim=1, keepdim=True) & torch.isfinite(y).all(dim=1, keepdim=True)
        self._status.masked_fill_(~finite, Status.NON_FINITE)
        self._active &= finite
        self.running = bool(self._active.any())
        self._success = bool(finite.all())
        length = (self.t1 - self.t).abs()
        given = self.tolerance.step_size or self.tolerance.first_step
        if given is not None:
            self.h = torch.clamp(length, max=given)
        elif self.running:
            self.h = torch.minimum(self._first_step(dynamics, y, f), length)

    def _first_step(self, dynamics: Dynamics, y: Tensor, f: Tensor) -> Tensor:
        """Hairer, Norsett and Wanner I, section II.4, on quantised norms."""
        tables = self._tables
        unit = error_unit(y, y, self.tolerance)
        d0, d1 = row_norm(y / unit), row_norm(f / unit)
        small = torch.minimum(d0, d1) < 1e-5
        bucket = torch.bucketize((d0 / d1).nan_to_num(0.0), tables.edges).clamp(max=tables.n - 2)
        guess = torch.where(small, 1e-6, 0.01 * tables.edges[bucket].to(self.t.dtype))
        length = (self.t1 - self.t).abs()
        guess = torch.minimum(guess, length) * self._active
        h = (guess * self.sign).to(self.dtype)
        t = torch.where(guess == length, self.t1, self.t + guess * self.sign)
        probe = dynamics(t.to(self.dtype), torch.addcmul(y, h, f))
        self._evals += self._active
        d2 = row_norm((probe - f) / unit) / guess.to(self.dtype)
        steepest = torch.bucketize(torch.fmax(d1, d2).nan_to_num(0.0), tables.edges)
        bound = torch.where(torch.fmax(d1, d2) <= 1e-15, (guess * 1e-3).clamp(min=1e-6), tables.power[steepest])
        return torch.minimum(100 * guess, bound)

    def propose(self) -> Span:
        remaining = (self.t1 - self.t).abs()
        # A step that all but arrives goes the whole way: no sliver is left by round-off.
        self._last = self.h >= remaining * (1 - 1e-9)
        step = torch.where(self._last, remaining, self.h) * self.sign * self._active
        self._try = step.abs()
        t_next = torch.where(self._last & self._active, self.t1, self.t + step)
        # Rounded last, so that no stage leaves the step.
        times = (t_next - step * self._late).to(self.dtype)
        return Span(self.t, t_next, step.to(self.dtype), (self.t.to(self.dtype), *times[1:].unbind(0)))

    def judge(self, y: Tensor, f: Tensor, span: Span, attempt: Attempt) -> Verdict:
        tables, active = self._tables, self._active
        parts, unit = None, None
        if attempt.error is None:
            ratio = torch.where(torch.isfinite(attempt.y1).all(dim=1, keepdim=True), 0.0, torch.nan)
        else:
            unit = error_unit(y, attempt.y1, self.tolerance)
            parts = attempt.error / unit
            ratio = row_norm(parts)
        accept = (ratio <= 1) & active
        finite = torch.isfinite(ratio)
        self._evals += active * self._evals_a_step
        self._evals_a_step = self.scheme.tableau.n_stages - int(self.scheme.tableau.fsal)
        self._steps += accept
        self._rejected += active & ~accept
        bucket = torch.bucketize(ratio, tables.edges)
        self._next_step(bucket, accept)
        self._retire(accept, finite)
        self.t = torch.where(accept, span.t_next, self.t)
        flags = torch.stack(
            [self._active.any(), (finite | ~active).all(), (self._status == 0).all(), accept.any()]
        ).tolist()
        self.running = flags[0]
        new_f = None if attempt.f1 is None else torch.where(accept, attempt.f1, f)
        self._success = flags[2]
        new_y = torch.where(accept, attempt.y1, y)
        if parts is not None:
            parts = torch.where(accept, parts, 0.0)
        return Verdict(new_y, new_f, span.h * accept, flags[3], flags[1], parts, unit)

    def _next_step(self, bucket: Tensor, accept: Tensor) -> None:
        if self.tolerance.step_size is not None:
            return
        tables = self._tables
        grow = (tables.proportional[bucket] * tables.integral[self._previous]).clamp(SMALLEST, LARGEST)
        grow = torch.where(self._was_rejected, grow.clamp(max=1.0), grow)
        factor = torch.where(accept, grow, tables.rejected[bucket])
        self.h = torch.where(self._active, self._try * factor, self.h)
        self._previous = torch.where(accept, bucket, self._previous)
        self._was_rejected = ~accept

    def _retire(self, accept: Tensor, finite: Tensor) -> None:
        """Rows that arrived or failed stop; a failed one keeps its last good state."""
        active = self._active
        tiny = 4 * torch.finfo(self.t.dtype).eps * torch.maximum(self.t.abs(), self.t1.abs())
        stuck = active & ~accept
        if self.tolerance.step_size is None:
            stuck = stuck & (self.h <= tiny)
        self._status.masked_fill_(stuck & finite, Status.STEP_UNDERFLOW)
        self._status.masked_fill_(stuck & ~finite, Status.NON_FINITE)
        going = active & ~stuck & ~(accept & self._last)
        spent = going & (self._steps + self._rejected >= self.tolerance.max_num_steps)
        self._status.masked_fill_(spent, Status.MAX_STEPS)
        self._active = going & ~spent

    def stats(self, y: Tensor) -> Stats:
        """What each row did, and at which time it stopped."""
        next_step = float(self.h.mean()) if self._status.numel() else 0.0
        return Stats(
            self._status.view(-1),
            self._evals.view(-1),
            self._steps.view(-1),
            self._rejected.view(-1),
            self.t.view(-1),
            next_step,
            self._success,
        )


# --- one step size for the batch --------------------------------------------------------------------------------


class SharedControl:
    """One time and step for all rows, as plain floats: cheap, but a row's result depends on its neighbours.

    Parameters
    ----------
    t0, t1 : float
    n_rows : int
    tolerance : Tolerance
    scheme : Scheme
    weights : tensor of shape (n,), optional
        The rows' shares in the error norm.
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        n_rows: int,
        tolerance: Tolerance,
        scheme: Scheme,
        weights: Tensor | None = None,
    ) -> None:
        self.t, self.t1, self.n_rows = t0, t1, n_rows
        self.sign = math.copysign(1.0, t1 - t0)
        self.tolerance, self.scheme = tolerance, scheme
        self._order = scheme.tableau.error_order
        self._weights = None if weights is None else (weights / weights.sum()).to(scheme.b.dtype).view(1, -1)
        self._n_evals, self._n_steps, self._n_rejected, self._status = 0, 0, 0, Status.SUCCESS
        self._error, self._was_rejected = 1.0, False
        self._last_step, self._last_error = abs(t1 - t0), SAFETY
        self._late = 1 - scheme.c.to(time_dtype_of(scheme.c.device))
        self._evals_a_step = scheme.tableau.n_stages - 1  # the first stage is known when the first step begins
        self.running = t0 != t1

    def start_time(self) -> Tensor:
        """The first time, as ``(n, 1)``."""
        return self._time(self.t)

    def begin(self, dynamics: Dynamics, y: Tensor, f: Tensor) -> None:
        """Choose the first step that is to be tried, given the field ``f`` at the start."""
        self._n_evals += 1
        length = abs(self.t1 - self.t)
        if not length:
            return
        given = self.tolerance.step_size or self.tolerance.first_step
        self.h = min(length, self._first_step(dynamics, y, f, length) if given is None else given)

    def _time(self, t: float) -> Tensor:
        return self.scheme.b.new_full((1, 1), t).expand(self.n_rows, 1)

    def _norm(self, ratio: Tensor) -> float:
        if self._weights is None:
            return float(torch.linalg.vector_norm(ratio)) / math.sqrt(max(ratio.numel(), 1))
        return math.sqrt(float((self._weights @ ratio.square()).sum()) / max(ratio.shape[1], 1))

    def _first_step(self, dynamics: Dynamics, y: Tensor, f: Tensor, length: float) -> float:
        unit = error_unit(y, y, self.tolerance)
        d0, d1 = self._norm(y / unit), self._norm(f / unit)
        if not math.isfinite(d0 + d1):
            return length
        guess = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, length)
        t = self.t1 if guess == length else self.t + self.sign * guess
        probe = dynamics(self._time(t), y + self.sign * guess * f)
        self._n_evals += 1
        steepest = max(d1, self._norm((probe - f) / unit) / guess)
        bound = max(1e-6, guess * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / max(self._order, 1))
        return min(100 * guess, bound)

    def propose(self) -> Span:
        remaining = self.t1 - self.t
        if self.h >= abs(remaining) * (1 - 1e-9):
            h, t_next = remaining, self.t1
        else:
            # The last two steps share what is left, so that none of them is a sliver.
            h = remaining / 2 if self._adapts and 2 * self.h > abs(remaining) else self.sign * self.h
            t_next = self.t + h
        times = (t_next - h * self._late).to(self.scheme.b.dtype).expand(-1, self.n_rows, 1).unbind(0)
        return Span(self.t, t_next, h, (self._time(self.t), *times[1:]))

    @property
    def _adapts(self) -> bool:
        return self.tolerance.step_size is None

    def judge(self, y: Tensor, f: Tensor, span: Span, attempt: Attempt) -> Verdict:
        self._n_evals += self._evals_a_step
        error, ratio, unit = 0.0, None, None
        if attempt.error is not None and self._adapts:
            unit = error_unit(y, attempt.y1, self.tolerance)
            ratio = attempt.error / unit
            error = self._norm(ratio)
        accepted = error <= 1
        if self._adapts:
            self._next_step(abs(span.h), error, accepted)
        if not accepted:
            self._n_rejected += 1
            self._evals_a_step = self.scheme.tableau.n_stages - 1  # the first stage is known
            if self._n_steps + self._n_rejected >= self.tolerance.max_num_steps:
                self._stop(Status.MAX_STEPS)
            if self.h <= 4 * torch.finfo(torch.float64).eps * max(abs(self.t), abs(self.t1)):
                self._stop(Status.STEP_UNDERFLOW if math.isfinite(error) else Status.NON_FINITE)
            return Verdict(y, f, 0.0, False, math.isfinite(error))
        self._n_steps += 1
        self._evals_a_step = self.scheme.tableau.n_stages - int(self.scheme.tableau.fsal)
        self._last_step, self._last_error = abs(span.h), error
        self.t = span.t_next
        self.running = self.t != self.t1
        if self.running and self._n_steps + self._n_rejected >= self.tolerance.max_num_steps:
            self._stop(Status.MAX_STEPS)
        return Verdict(attempt.y1, attempt.f1, span.h, True, True, ratio, unit)

    def _stop(self, status: Status) -> None:
        self._status, self.running = status, False

    def _next_step(self, h: float, error: float, accepted: bool) -> None:
        if not math.isfinite(error):
            factor = SMALLEST
        elif not accepted:
            factor = max(SMALLEST, SAFETY * error ** (-1 / self._order))
        else:
            growth = SAFETY * max(error, 1e-10) ** (-0.7 / self._order) * self._error ** (0.4 / self._order)
            factor = min(max(growth, SMALLEST), 1.0 if self._was_rejected else LARGEST)
            self._error = max(error, 1e-4)
        self._was_rejected = not accepted
        self.h = h * factor

    def stats(self, y: Tensor) -> Stats:
        device = y.device

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((self.n_rows,), value, dtype=dtype, device=device)

        status = column(self._status, torch.int8)
        success = self._status == Status.SUCCESS
        if success and not bool(torch.isfinite(y.sum())):
            status.masked_fill_(~torch.isfinite(y).all(dim=1), Status.NON_FINITE)
            success = not bool(status.any())
        return Stats(
            status,
            column(self._n_evals, torch.int64),
            column(self._n_steps, torch.int64),
            column(self._n_rejected, torch.int64),
            column(self.t, time_dtype_of(device)),
            self._proposal(),
            success,
        )

    def _proposal(self) -> float:
        """The longest step that the last one's error would have allowed."""
        return float(self._last_step * (SAFETY / max(self._last_error, 1e-10)) ** (1 / max(self._order, 1)))


Control = RowControl | SharedControl
