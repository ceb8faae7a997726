"""The processes of a data-parallel fit: who they are and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from skode.exceptions import PeerError

T = TypeVar("T")

# Kinds of messages; a process that fails says so instead of whatever the others wait for.
FAIL, ADD, TOTAL, GATHER, SHARE, LEAVE = range(6)
LENGTHS = 2**12  # lengths are compared modulo this, so that the sums below stay exact


class Rows(NamedTuple):
    """Which of all processes' rows, put one behind the other, are here: ``first`` and up, of ``total``."""

    first: int
    total: int


class Peers:
    """A process alone, which has nobody to tell; :class:`Group` for more of them."""

    rank = 0
    size = 1

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks."""
        return [value]

    def share(self, value: T, source: int = 0) -> T:
        """The value of one process."""
        return value

    def add_up(self, number: float) -> float:
        """The sum of everybody's numbers."""
        return number

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of everybody's tensors, which have the same shapes and one dtype."""
        return list(tensors)

    def fail(self, error: BaseException) -> None:
        """Tell the others of a failure here, so that they do not wait."""

    def leave(self) -> None:
        """Part, all together."""

    def any(self, flag: bool) -> bool:
        """Whether it is so anywhere."""
        return self.add_up(float(flag)) > 0

    def relay(self, state: T, add: Callable[[T], T]) -> T:
        """Hand ``state`` from process to process, each of which adds to it; the last one's is everybody's."""
        for source in range(self.size):
            state = self.share(add(state) if source == self.rank else state, source)
        return state

    def rows(self, n: int) -> Rows:
        """The place of the ``n`` rows that are here."""
        counts = self.gather(n)
        return Rows(sum(counts[: self.rank]), sum(counts))


class Group(Peers):
    """The processes of a group of torch.distributed that can send tensors on the CPU.

    Every message begins with a sum of four numbers, by which everybody learns whether somebody has failed or is at
    another place.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._told: BaseException | None = None
        self._is_broken = False

    def gather(self, value: T) -> list[T]:
        self._meet(GATHER)
        return self._gather(value)

    def share(self, value: T, source: int = 0) -> T:
        self._meet(SHARE, source)
        box = [value if self.rank == source else None]
        number = source if self._group is None else dist.get_global_rank(self._group, source)
        self._send(lambda: dist.broadcast_object_list(box, src=number, group=self._group))
        return box[0]  # type: ignore[return-value]

    def add_up(self, number: float) -> float:
        return self._meet(ADD, number=number)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
        self._meet(TOTAL, len(flat))
        self._send(lambda: dist.all_reduce(flat, group=self._group))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]

    def fail(self, error: BaseException) -> None:
        if isinstance(error, PeerError) or error is self._told or self._is_broken:
            return  # they know
        self._told = error
        try:
            self._meet(FAIL, reason=f"{type(error).__name__}: {error}")
        except PeerError:
            return

    def leave(self) -> None:
        self._meet(LEAVE)

    def _meet(self, kind: int, length: int = 0, number: float = 0.0, reason: str | None = None) -> float:
        """Begin a message, and add up one number."""
        tag = float(kind * LENGTHS + length % LENGTHS)
        head = torch.tensor([float(reason is not None), tag, tag * tag, number], dtype=torch.float64)
        self._send(lambda: dist.all_reduce(head, group=self._group))
        n_failed, tags, squares, result = (float(found) for found in head)
        if n_failed:
            reasons = self._gather(reason)
            told = [f"process {rank}: {said}" for rank, said in enumerate(reasons) if said is not None]
            raise PeerError(
                f"the data-parallel block failed in {len(told)} of {self.size} processes. {'; '.join(told)}"
            )
        if tags * tags != self.size * squares:  # equal numbers alone have no variance
            raise PeerError(
                f"the {self.size} processes are at different places of the data-parallel block; each must make the "
                "same calls of fit in the same order, with the same arguments."
            )
        return result

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._send(lambda: dist.all_gather_object(found, value, group=self._group))
        return found

    def _send(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            self._is_broken = True
            raise PeerError(
                f"the connection between the processes broke in process {self.rank} of {self.size}; another one has "
                f"ended, or took longer than the process group's timeout. {error}"
            ) from error


ALONE = Peers()
_PEERS: ContextVar[Peers] = ContextVar("skode_peers", default=ALONE)


def current_peers() -> Peers:
    """Who takes part in fits of this thread."""
    return _PEERS.get()


@contextmanager
def together(peers: Peers) -> Iterator[None]:
    """Let ``peers`` take part in the block's fits."""
    token = _PEERS.set(peers)
    try:
        yield
        peers.leave()
    except BaseException as error:
        peers.fail(error)
        raise
    finally:
        _PEERS.reset(token)
