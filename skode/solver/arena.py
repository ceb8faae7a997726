"""Memory for the stages of a solve: blocks of slots, one slot an evaluation, leased from a pool and handed back.

Fresh memory is dear (every page of it faults once), so blocks are used again by later solves. A block belongs to
whoever holds it: when the last reference goes, its memory returns to the pool.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

POOL_BYTES = 2**27
"""The pool keeps at most this much memory that nobody uses."""


class Block:
    """Slots for evaluations: stage states ``y``, field values ``f`` and times ``t``, all by slot.

    Parameters
    ----------
    y : sequence of tensors
        Each slot's state, contiguous.
    F : tensor of shape (n_slots, *state)
        The slots' field values.
    t : tensor or None
        The slots' times: one number each, shape (n_slots, 1, 1), or one for each row, (n_slots, *row); None for
        fields that do not look at the time.
    """

    def __init__(self, y: Sequence[Tensor], F: Tensor, t: Tensor | None) -> None:
        self.n_slots = len(F)
        self.y, self.F, self.t = list(y), F, t
        self.f = list(F.unbind(0))
        self.y_flat = [state.view(-1) for state in self.y]
        self._flat = F.view(self.n_slots, -1)
        self._stacks: dict[tuple[int, int], list[Tensor]] = {}

    def stacks(self, first: int, n: int) -> list[Tensor]:
        """The values of the 1, 2, ... n slots from ``first`` on, one column each; number 0 of the list is empty."""
        key = first, n
        stacks = self._stacks.get(key)
        if stacks is None:
            stacks = self._stacks[key] = [self._flat[first : first + i].t() for i in range(n + 1)]
        return stacks

    def set_times(self, first: int, times: Tensor) -> None:
        """Give the slots from ``first`` on their times."""
        if self.t is not None:
            self.t[first : first + len(times)] = times

    @property
    def nbytes(self) -> int:
        """Bytes of the block's own memory."""
        raise NotImplementedError

    def tape_bytes(self, first: int, n: int) -> int:
        """Bytes that some slots' evaluations keep elsewhere."""
        return 0


Memory = TypeVar("Memory")


class Lease(Generic[Memory]):
    """Holds memory of the pool, and gives it back when it is itself let go."""

    __slots__ = ("_key", "_nbytes", "memory")

    def __init__(self, key: Hashable, memory: Memory, nbytes: int) -> None:
        self._key, self.memory, self._nbytes = key, memory, nbytes

    def __del__(self) -> None:
        _POOL.take_back(self._key, self.memory, self._nbytes)


class _Pool:
    """Unused memory by its shape; what was used longest ago goes first when there is too much."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._unused: dict[Hashable, list[tuple[Any, int]]] = {}
        self._returned: deque[tuple[Hashable, Any, int]] = deque()
        self._nbytes = 0

    def lease(self, key: Hashable, make: Callable[[], Any], nbytes: int) -> Lease[Any]:
        with self._lock:
            self._sort_returned()
            stock = self._unused.get(key)
            if stock:
                memory, _ = stock.pop()
                self._nbytes -= nbytes
                if not stock:
                    del self._unused[key]
                return Lease(key, memory, nbytes)
        with torch.inference_mode(False):  # it will be written to by others, who may not be in that mode
            return Lease(key, make(), nbytes)

    def take_back(self, key: Hashable, memory: Any, nbytes: int) -> None:
        # May be called by the garbage collector at any time, so it does not wait for the lock.
        if key is not None and nbytes <= POOL_BYTES:
            self._returned.append((key, memory, nbytes))
            if len(self._returned) > 64 and self._lock.acquire(blocking=False):
                try:
                    self._sort_returned()
                finally:
                    self._lock.release()

    def _sort_returned(self) -> None:
        while self._returned:
            key, memory, nbytes = self._returned.popleft()
            stock = self._unused.pop(key, [])
            stock.append((memory, nbytes))
            self._unused[key] = stock  # the youngest last
            self._nbytes += nbytes
        while self._nbytes > POOL_BYTES:
            key = next(iter(self._unused))
            stock = self._unused[key]
            self._nbytes -= stock.pop(0)[1]
            if not stock:
                del self._unused[key]


_POOL = _Pool()


def lease(key: Hashable, make: Callable[[], Memory], nbytes: int) -> Lease[Memory]:
    """Memory of the pool for a key, made anew if there is none.

    Parameters
    ----------
    key : hashable
        All that the memory's shape, type and device depend on. None: not to be used again.
    make : callable
        Makes it.
    nbytes : int
        Its size.
    """
    return _POOL.lease(key, make, nbytes)


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors' own elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory without contents, in the dtype and on the device of another tensor."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)


def numbers(shape: Sequence[int]) -> int:
    """How many numbers a tensor of a shape has."""
    return math.prod(shape)
