"""What is to be solved, apart from the states and times; it makes what takes the steps and what decides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode.solver.control import BatchControl, CountingControl, Tolerance
from skode.solver.dynamics import Dynamics
from skode.solver.events import Watched
from skode.solver.implicit import ImplicitKernel
from skode.solver.kernels import Kernel, TapeKernel
from skode.solver.layout import PADDING, Layout, PaddedLayout, RowLayout
from skode.solver.plan import Plan
from skode.solver.retaken import RetakenRows, RetakenShared
from skode.solver.row_control import RowControl, Stops
from skode.solver.shared_control import SharedControl, SharedStops
from skode.solver.step import Scheme, Stepper


@dataclass(frozen=True)
class Landings:
    """Times where steps have to end, shape (n, k) in any order.

    ``jumps`` (k,) tells where the field has to be asked again, ``aside`` whether then just after, and just before.
    """

    t: Tensor
    jumps: Tensor
    aside: bool = True


@dataclass(frozen=True)
class Problem:
    """An initial-value problem but for its states and times.

    ``batch`` is None where every row takes steps of its own. ``tolerance`` holds its tensors in the callers' shapes,
    one number for each component. ``dense``: outputs come from dense output; ``keeps_dense``: it is wanted after the
    solve. ``plan`` are the steps to take, if they are given.
    """

    dynamics: Dynamics
    scheme: Scheme
    tolerance: Tolerance
    batch: BatchControl | None
    memory_budget: int
    dense: bool
    keeps_dense: bool
    keep_errors: bool = False
    landings: Landings | None = None
    padded: bool = True
    watched: Watched | None = None
    plan: Plan | None = None

    def stepper(self, y0: Tensor) -> Stepper:
        """Takes the steps of a batch like ``y0``."""
        return Stepper(self.scheme, self._kernel(y0))

    def _kernel(self, y0: Tensor) -> Kernel:
        by_row = self.batch is None or not len(y0)
        # Rows that an event has ended keep their time while the others go on.
        shared_times = not by_row and self.watched is None
        implicit = self.scheme.tableau.implicit
        make = getattr(self.dynamics, "kernel", None)
        if make is not None and len(y0) and not implicit:
            kernel: Kernel | None = make(y0, padded=by_row, shared_times=shared_times)
            if kernel is not None:
                return kernel
        layout: Layout = RowLayout(*y0.shape)
        uneven = by_row and len(y0) % PADDING and y0.dtype == torch.float32
        if uneven and self.padded and getattr(self.dynamics, "any_rows", False):
            layout = PaddedLayout(*y0.shape)
        if implicit:
            return ImplicitKernel(self.dynamics, layout, shared_times, y0, self.scheme.tableau, self.tolerance)
        return TapeKernel(self.dynamics, layout, shared_times, y0)

    def control(self, stepper: Stepper, t0: Tensor, t1: Tensor) -> CountingControl:
        """Decides the steps from t0 to t1, both of shape (n,)."""
        layout, tolerance = stepper.kernel.layout, self._in_layout(stepper.kernel.layout)
        if self.plan is not None:
            retaken = RetakenRows if self.batch is None or not len(t0) else RetakenShared
            return retaken(self.plan, tolerance, self.scheme, layout, self.keep_errors)
        if self.batch is not None and len(t0):
            ends = float(t0[0]), float(t1[0])
            return SharedControl(*ends, tolerance, self.scheme, layout, self.batch, self._shared_stops(*ends))
        start, end = (layout.enter(t.unsqueeze(1)) for t in (t0, t1))
        return RowControl(start, end, tolerance, self.scheme, layout, self._row_stops(layout, t0, t1))

    def _in_layout(self, layout: Layout) -> Tolerance:
        """The tolerances of components along the layout's axis of components."""
        if layout.dim == 1:
            return self.tolerance
        rtol, atol = self.tolerance.rtol, self.tolerance.atol
        column = {"atol": atol.unsqueeze(-1)} if atol.dim() else {}
        if isinstance(rtol, Tensor):
            column["rtol"] = rtol.unsqueeze(-1)
        return self.tolerance.replace(**column) if column else self.tolerance

    def _shared_stops(self, t0: float, t1: float) -> SharedStops:
        if self.landings is None:
            return SharedStops([(t1, False)])
        sign = 1.0 if t1 >= t0 else -1.0
        jumps: dict[float, bool] = {t1: False}
        for time, jump in zip(self.landings.t[0].tolist(), self.landings.jumps.tolist(), strict=True):
            jumps[time] = jumps.get(time, False) or jump
        ahead = sorted((sign * time, jump) for time, jump in jumps.items())
        return SharedStops(
            [(sign * time, jump) for time, jump in ahead if sign * t0 < time <= sign * t1],
            jumps.get(t0, False),
            self.landings.aside,
        )

    def _row_stops(self, layout: Layout, t0: Tensor, t1: Tensor) -> Stops | None:
        if self.landings is None:
            return None
        sign = torch.where(t1 < t0, -1.0, 1.0).to(t0.dtype).unsqueeze(1)
        low, high = (sign[:, 0] * t0).unsqueeze(1), (sign[:, 0] * t1).unsqueeze(1)
        ahead = sign * self.landings.t
        at_start = ((ahead == low) & self.landings.jumps).any(dim=1, keepdim=True)
        inside = (ahead > low) & (ahead <= high)
        ahead = torch.cat([torch.where(inside, ahead, high), high], dim=1)
        jumps = torch.cat([inside & self.landings.jumps, torch.zeros_like(inside[:, :1])], dim=1)
        # Of equal times the one that jumps comes first.
        order = torch.argsort(jumps.to(torch.int8), dim=1, descending=True, stable=True)
        order = order.gather(1, torch.argsort(ahead.gather(1, order), dim=1, stable=True))
        times, jumps = (sign * ahead).gather(1, order), jumps.gather(1, order)
        return Stops(_by_row(layout, times), _by_row(layout, jumps), layout.enter(at_start), self.landings.aside)


def _by_row(layout: Layout, x: Tensor) -> Tensor:
    """Columns of ``(n, k)`` as k times one number for each row."""
    return torch.stack([layout.enter(x[:, j : j + 1].contiguous()) for j in range(x.shape[1])])


def landings(jump_times: Any, step_times: Any, y0: Tensor, dtype: torch.dtype) -> Landings | None:
    """The callers' times, shared ``(k,)`` or each row's own ``(n, k)``.

    Raises
    ------
    ValueError
        If they have another shape or are not finite.
    """
    parts: list[Tensor] = []
    jumps: list[bool] = []
    for name, given, jump in (("jump_times", jump_times, True), ("step_times", step_times, False)):
        if given is None:
            continue
        times = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=dtype)
        times = times.detach().to(y0.device, dtype)
        times = times.expand(len(y0), -1) if times.dim() == 1 else times
        if times.dim() != 2 or len(times) != len(y0) or not bool(torch.isfinite(times).all()):
            raise ValueError(f"{name} must be finite and have shape (k,) or ({len(y0)}, k); got {tuple(times.shape)}.")
        parts.append(times)
        jumps += [jump] * times.shape[1]
    if not jumps:
        return None
    return Landings(torch.cat(parts, dim=1), torch.tensor(jumps, device=y0.device))


__all__: Sequence[str] = ("Landings", "Problem", "landings")
