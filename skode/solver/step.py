"""One Runge-Kutta step of a whole batch, in slots of memory.

Symbols: stage i has the state ``Y_i = y + h sum_j a_ij F_j`` and the field's value ``F_i = f(t + c_i h, Y_i)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.arena import Block, empty
from skode.solver.kernels import Kernel
from skode.solver.layout import Layout
from skode.solver.tableau import Tableau


class Span(NamedTuple):
    """A step that is to be tried: from ``t`` to ``t_next``, float64.

    Numbers where all rows share them, else tensors of one number for each row. ``h`` is ``t_next - t``, a number or in
    the state's dtype; ``times`` are the stages' times after the first, ``(n_stages - 1, ...)``, in the state's dtype,
    where they keep off a jump, else None: they are those of :func:`stage_times` then.
    """

    t: Any
    t_next: Any
    h: Any
    times: Tensor | None


def stage_times(scheme: Scheme, layout: Layout, t_next: Any, length: Any) -> Tensor:
    """The times of the stages after the first, as the field sees them; rounded last, so that none leaves the step."""
    late = scheme.late.view(-1, *(1,) * len(layout.row))
    if isinstance(t_next, float):
        return torch.rsub(late, t_next, alpha=length).to(scheme.b.dtype)
    return torch.addcmul(t_next, late, length, value=-1).to(scheme.b.dtype)


@dataclass(frozen=True)
class Scheme:
    """A tableau's weights as tensors of the solve's dtype and device.

    ``late`` are the stages' distances from the step's end, in float64 where the device has it, after the first one's.
    """

    tableau: Tableau
    a: tuple[Tensor, ...]
    b: Tensor
    e: Tensor | None
    e2: Tensor | None
    late: Tensor
    p: Tensor
    back: Back

    @cached_property
    def n_stages(self) -> int:
        """Stages of a step, those for dense output included."""
        return self.tableau.n_stages

    @cached_property
    def end(self) -> int:
        """How many slots after a step's first the next one may begin, without copying anything."""
        return self.tableau.end_stage if self.tableau.end_stage is not None else self.n_stages

    @cached_property
    def flat(self) -> bool:
        """Whether the next step's first slot is this one's last."""
        return self.end >= self.n_stages - 1


class Back(NamedTuple):
    """The transposed tableau: what stage i's value gives to later stages' states and to the new state.

    Row i of ``weights`` has one column for each stage and one for the new state; ``rows`` are those columns of it that
    belong to later stages. A stage that is the field at the new state itself gives what it asks of its state to the new
    state: its column is empty. ``start`` adds up what the step's first state gets, but for the first stage's part.
    """

    weights: Tensor
    rows: tuple[Tensor, ...]
    start: Tensor
    used: tuple[bool, ...]


def time_dtype_of(device: torch.device) -> torch.dtype:
    """Times are float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@lru_cache(maxsize=128)
def make_scheme(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Scheme:
    """The scheme of a tableau, made once for each dtype and device."""
    with torch.inference_mode(False):
        return _scheme(tableau, dtype, device)


def _scheme(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Scheme:
    def tensor(values: Any, dtype: torch.dtype = dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    late = [1 - c for c in tableau.c[1:]]
    return Scheme(
        tableau,
        tuple(tensor(row) for row in tableau.a),
        tensor(tableau.b),
        None if tableau.e is None else tensor(tableau.e),
        None if tableau.e2 is None else tensor(tableau.e2),
        tensor(late, time_dtype_of(device)).view(-1, 1, 1),
        tensor(tableau.dense.tolist()),
        _back(tableau, tensor),
    )


def _back(tableau: Tableau, tensor: Any) -> Back:
    n = tableau.n_stages
    weights = [[tableau.a[j - 1][i] if j > i else 0.0 for j in range(n)] + [tableau.b[i]] for i in range(n)]
    end = tableau.end_stage
    start = [0.0, *[1.0] * n]
    if end is not None:
        start[end] = 0.0
        for row in weights:
            row[end] = 0.0
    table = tensor(weights)
    rows = tuple(row[i + 1 :] for i, row in enumerate(table))
    return Back(table, rows, tensor(start)[1:], tuple(any(row) for row in weights))


class Attempt(NamedTuple):
    """What a step gave: the new state, and error estimates (a second one of some methods), still to be times h.

    ``failed`` rows have no solution of this step, and hold what they had.
    """

    y1: Tensor
    error: Tensor | None
    error2: Tensor | None
    failed: Tensor | None = None


class Place(NamedTuple):
    """Where a step begins: its first slot, and whether the field is known there."""

    block: Block
    slot: int
    known: bool

    @property
    def y(self) -> Tensor:
        """The state."""
        return self.block.y[self.slot]

    @property
    def f(self) -> Tensor:
        """The field there."""
        return self.block.f[self.slot]


class Stepper:
    """Takes steps of a scheme with a kernel.

    Parameters
    ----------
    scheme : Scheme
    kernel : Kernel
    """

    def __init__(self, scheme: Scheme, kernel: Kernel) -> None:
        self.scheme, self.kernel = scheme, kernel
        n_estimates = 1 + (scheme.e2 is not None)
        self._error = [empty(kernel.layout.state, scheme.b) for _ in range(n_estimates)] if scheme.e is not None else []
        self._sum: Tensor | None = None
        # Slots that a step needs, the new state's included.
        self.n_slots = max(scheme.end, scheme.n_stages - 1) + 1

    def probe(self, place: Place, t: Tensor, y: Tensor) -> Tensor:
        """The field at another time and state, in the slot that comes next."""
        block, slot = place.block, place.slot + 1
        block.y[slot].copy_(y)
        if block.t is not None:
            block.set_times(slot, t.unsqueeze(0))
        self.kernel.evaluate(block, slot, False)
        return block.f[slot]

    def attempt(self, place: Place, span: Span, keep: bool) -> Attempt:
        """Take one step from a place where the field is known; ``keep`` what going back will need."""
        block, first = place.block, place.slot
        if block.t is not None:
            times = span.times
            if times is None:
                times = stage_times(self.scheme, self.kernel.layout, span.t_next, span.t_next - span.t)
            block.set_times(first + 1, times)
        self.kernel.begin_step(block, first, span.h)
        if isinstance(span.h, float):
            self._stages_shared(block, first, span.h, keep)
        else:
            self._stages_by_row(block, first, span.h, keep)
        return Attempt(block.y[first + self.scheme.end], *self._errors(block, first), self.kernel.failed)

    def _stages_shared(self, block: Block, first: int, h: float, keep: bool) -> None:
        """One step length for all rows goes into the weights."""
        evaluate, y, start = self.kernel.evaluate, block.y_flat, block.y_flat[first]
        stacks, addmv = block.stacks(first, self.scheme.n_stages), torch.addmv
        for i, weights in enumerate(self.scheme.a, start=1):
            addmv(start, stacks[i], weights, alpha=h, out=y[first + i])
            evaluate(block, first + i, keep)
        if self.scheme.tableau.end_stage is None:
            addmv(start, stacks[-1], self.scheme.b, alpha=h, out=y[first + self.scheme.end])

    def _stages_by_row(self, block: Block, first: int, h: Tensor, keep: bool) -> None:
        evaluate, y, start = self.kernel.evaluate, block.y, block.y[first]
        stacks, mv, addcmul = block.stacks(first, self.scheme.n_stages), torch.mv, torch.addcmul
        if self._sum is None:
            self._sum = torch.empty_like(start)
            self._sum_flat = self._sum.view(-1)
        total, flat = self._sum, self._sum_flat
        for i, weights in enumerate(self.scheme.a, start=1):
            mv(stacks[i], weights, out=flat)
            addcmul(start, h, total, out=y[first + i])
            evaluate(block, first + i, keep)
        if self.scheme.tableau.end_stage is None:
            mv(stacks[-1], self.scheme.b, out=flat)
            addcmul(start, h, total, out=y[first + self.scheme.end])

    def _errors(self, block: Block, first: int) -> tuple[Tensor | None, Tensor | None]:
        if not self._error:
            return None, None
        stack = block.stacks(first, self.scheme.n_stages)[-1]
        for estimate, weights in zip(self._error, (self.scheme.e, self.scheme.e2), strict=False):
            assert weights is not None
            torch.mv(stack, weights, out=estimate.view(-1))
        return self._error[0], self._error[1] if len(self._error) > 1 else None
