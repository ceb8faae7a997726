"""How a field is evaluated in slots of memory, and pulled back through them.

Two kinds: fields of :mod:`skode.fields` may bring a kernel of their own that never leaves the slots; every other
field is evaluated through the :class:`~skode.solver.dynamics.Dynamics` protocol by :class:`TapeKernel`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.solver.arena import Block, Lease, empty, numbers, tensor_bytes
from skode.solver.dynamics import Dynamics
from skode.solver.layout import Layout, PaddedLayout
from skode.solver.solution import Stats


class Kernel(ABC):
    """Evaluates a field for a batch of fixed size.

    Parameters
    ----------
    layout : Layout
    shared_times : bool
        Whether all rows have one time.
    """

    uses_time = True
    failed: Tensor | None = None
    """Rows whose last step has no solution, one flag for each; None for kernels that only evaluate."""

    def __init__(self, layout: Layout, shared_times: bool) -> None:
        self.layout, self.shared_times = layout, shared_times

    @abstractmethod
    def block(self, n_slots: int, keep: bool) -> Lease[Any]:
        """Memory for that many evaluations; without ``keep`` they need not be remembered."""

    @property
    @abstractmethod
    def slot_bytes(self) -> int:
        """Bytes that a kept evaluation takes, about."""

    @abstractmethod
    def evaluate(self, block: Any, slot: int, keep: bool) -> None:
        """Set ``block.f[slot]`` to the field's value at the slot's time and state."""

    @abstractmethod
    def way_back(self, n_stages: int) -> WayBack:
        """What pulls cotangents back through kept evaluations."""

    def begin_step(self, block: Any, first: int, h: Any) -> None:  # noqa: B027
        """A step of length ``h`` begins at a slot: for kernels whose stages depend on it."""

    def counted(self, stats: Stats) -> Stats:
        """The statistics with what the kernel evaluated on its own account."""
        return stats

    def computing(self) -> AbstractContextManager[Any]:
        """The autograd mode to compute in."""
        return torch.no_grad()

    def time_shape(self, n_slots: int) -> tuple[int, ...]:
        """Of the slots' times."""
        return (n_slots, 1, 1) if self.shared_times else (n_slots, *self.layout.row)


class Cotangents:
    """Room for the cotangents of one step, and its views.

    ``a[i]`` takes the cotangent of stage i's value, ``v[i]`` then holds the one of its state; the last ``v`` is the
    new state's. ``scaled`` takes the transposed tableau times a step's length, ``scaled_rows`` are its columns that
    belong to later stages. ``new`` is a state's room to work in.
    """

    def __init__(self, like: Tensor, n_stages: int, state: Sequence[int]) -> None:
        self.V = torch.zeros((n_stages + 1, *state), dtype=like.dtype, device=like.device)
        self.A = empty((n_stages, *state), like)
        self.v, self.a, self.new = list(self.V.unbind(0)), list(self.A.unbind(0)), empty(state, like)
        flat = self.V.view(n_stages + 1, -1)
        self.stacks = [flat[i:].t() for i in range(n_stages + 1)]
        self.a_flat, self.new_flat = [x.view(-1) for x in self.a], self.new.view(-1)
        self.scaled = empty((n_stages, n_stages + 1), like)
        self.scaled_rows = [row[i + 1 :] for i, row in enumerate(self.scaled)]


class WayBack(ABC):
    """Pulls cotangents through the stages of one step after another, and adds up the parameters' gradients.

    Parameters
    ----------
    room : Cotangents
    """

    def __init__(self, room: Cotangents) -> None:
        room.V.zero_()
        self.room = room

    def begin_step(self, h: Any) -> None:  # noqa: B027
        """The stages of a step of length ``h`` come next: for kernels whose stages depend on it."""

    @abstractmethod
    def pull(self, block: Any, first: int, i: int, out: Tensor, time: bool) -> Tensor | None:
        """From the room's ``a[i]`` to the cotangent of stage i's state; returns the rows' times' if asked."""

    @abstractmethod
    def accumulate(self, block: Any, first: int, low: int, high: int) -> None:
        """Add the parameters' gradients of the stages from ``low`` to before ``high``, which were pulled."""

    @abstractmethod
    def gradients(self) -> tuple[Tensor, ...]:
        """The parameters' gradients so far."""


class RowsDifferError(Exception):
    """A field's value for a row changes with copies of rows beside it."""


# --- fields known by value, tape and pull --------------------------------------------------------------------------


class TapeBlock(Block):
    """Slots with tapes."""

    def __init__(self, y: Tensor, F: Tensor, t: Tensor) -> None:
        super().__init__(y.unbind(0), F, t)
        self._own = y
        self.tapes: list[Any] = [None] * self.n_slots

    @property
    def nbytes(self) -> int:
        assert self.t is not None
        return tensor_bytes([self._own, self.F, self.t])

    def tape_bytes(self, first: int, n: int) -> int:
        return sum(tape.nbytes for tape in self.tapes[first : first + n] if tape is not None)


class TapeKernel(Kernel):
    """Any :class:`Dynamics` as a kernel; a field sees tensors of its own, which it may keep.

    Parameters
    ----------
    dynamics : Dynamics
    layout : RowLayout or PaddedLayout
    shared_times : bool
    like : tensor
        Has the solve's dtype and device.
    """

    def __init__(self, dynamics: Dynamics, layout: Layout, shared_times: bool, like: Tensor) -> None:
        super().__init__(layout, shared_times)
        self.dynamics, self._like, self.begun = dynamics, like, False
        self._tape_bytes: int | None = None
        self._doubts = 3 if isinstance(layout, PaddedLayout) else 0

    def block(self, n_slots: int, keep: bool) -> Lease[TapeBlock]:
        shape = (n_slots, *self.layout.state)
        block = TapeBlock(
            empty(shape, self._like), empty(shape, self._like), empty(self.time_shape(n_slots), self._like)
        )
        return Lease(None, block, 0)

    @property
    def slot_bytes(self) -> int:
        state_bytes = numbers(self.layout.state) * self._like.element_size()
        # Before there is a tape: eight states an evaluation is what a small network keeps.
        return 3 * state_bytes + (8 * state_bytes if self._tape_bytes is None else self._tape_bytes)

    def evaluate(self, block: TapeBlock, slot: int, keep: bool) -> None:
        assert block.t is not None
        t, y = block.t[slot].clone().expand(self.layout.row), block.y[slot].clone()
        if keep:
            f, block.tapes[slot] = self.dynamics.linearize(t, y)
            if self._tape_bytes is None:
                self._tape_bytes = block.tapes[slot].nbytes
        else:
            f = self.dynamics(t, y)
        self._store(f, block.f[slot])
        self.begun = True
        if self._doubts:
            self._check_padding(t, y, f)

    def _check_padding(self, t: Tensor, y: Tensor, f: Tensor) -> None:
        """Whether copies of rows change nothing, where the field says something; asks the field once more."""
        n = self.layout.leave(y).shape[0]
        alone, among = self.dynamics(t[:n], y[:n].clone()), f[:n]
        size = float(torch.linalg.vector_norm(alone.nan_to_num(0.0, 0.0, 0.0)))
        if not torch.allclose(among, alone, rtol=1e-3, atol=1e-4 * size, equal_nan=True):
            raise RowsDifferError
        self._doubts = self._doubts - 1 if bool((alone == 0).all(dim=0).any()) else 0

    @staticmethod
    def _store(f: Tensor, out: Tensor) -> None:
        if f.shape != out.shape or f.dtype != out.dtype:
            raise FieldError(
                f"the field returned {tuple(f.shape)} in {f.dtype} for a state {tuple(out.shape)} in {out.dtype}."
            )
        out.copy_(f)

    def way_back(self, n_stages: int) -> TapeWayBack:
        return TapeWayBack(self, n_stages, self._like)


class TapeWayBack(WayBack):
    """The way back through tapes."""

    def __init__(self, kernel: TapeKernel, n_stages: int, like: Tensor) -> None:
        super().__init__(Cotangents(like, n_stages, kernel.layout.state))
        self._dynamics = kernel.dynamics
        self._total: tuple[Tensor, ...] | None = None

    def pull(self, block: TapeBlock, first: int, i: int, out: Tensor, time: bool) -> Tensor | None:
        # The tape keeps its cotangent until the parameters' turn comes, so it gets one of its own.
        dy, dt = self._dynamics.pull(block.tapes[first + i], self.room.a[i].clone(), time=time)
        out.copy_(dy)
        return dt

    def accumulate(self, block: TapeBlock, first: int, low: int, high: int) -> None:
        gradients = self._dynamics.accumulate(block.tapes[first + low : first + high])
        if self._total is None:
            self._total = gradients
        else:
            self._total = tuple(p + g for p, g in zip(self._total, gradients, strict=True))

    def gradients(self) -> tuple[Tensor, ...]:
        if self._total is None:
            return tuple(torch.zeros_like(p) for p in self._dynamics.trainable())
        return self._total
