"""Several fields of any kind side by side: each has its own consecutive block of a batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skode.solver.dynamics import Dynamics, Weight


class _Tape(list[Any]):
    """The members' tapes."""

    @property
    def nbytes(self) -> int:
        return sum(int(tape.nbytes) for tape in self)


class MemberDynamics:
    """Independent fields as one: row block m of a batch belongs to member m.

    Parameters
    ----------
    members : sequence of Dynamics

    Examples
    --------
    >>> import torch
    >>> from skode.fields import MemberDynamics, MLPField
    >>> from skode.solver import solve
    >>> members = [MLPField(2, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    >>> solve(MemberDynamics(members), torch.ones(3 * 4, 2), [0.0, 1.0]).y1.shape  # four rows for each
    torch.Size([12, 2])
    """

    def __init__(self, members: Sequence[Dynamics]) -> None:
        self._members = tuple(members)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([member(*rows) for member, *rows in self._blocks(t, y)])

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        values, tapes = zip(*(member.linearize(*rows) for member, *rows in self._blocks(t, y)), strict=True)
        return torch.cat(values), _Tape(tapes)

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        parts = [
            member.pull(own, rows, time=time)
            for member, own, rows in zip(self._members, tape, a.chunk(len(self._members)), strict=True)
        ]
        times = [dt for _, dt in parts if dt is not None]
        return torch.cat([dy for dy, _ in parts]), torch.cat(times) if times else None

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        gradients: list[Tensor] = []
        for m, member in enumerate(self._members):
            own = [self._share(weight, m) for weight in weights] if weights is not None else None
            gradients += member.accumulate([tape[m] for tape in tapes], own)
        return tuple(gradients)

    def trainable(self) -> tuple[Tensor, ...]:
        return tuple(parameter for member in self._members for parameter in member.trainable())

    def _share(self, weight: Weight, m: int) -> Weight:
        return weight.chunk(len(self._members))[m] if isinstance(weight, Tensor) else weight

    def _blocks(self, t: Tensor, y: Tensor) -> list[tuple[Any, ...]]:
        n = len(self._members)
        if torch.compiler.is_compiling():  # chunks of an unknown number of rows are none
            return list(zip(self._members, t.unflatten(0, (n, -1)), y.unflatten(0, (n, -1)), strict=True))
        return list(zip(self._members, t.chunk(n), y.chunk(n), strict=True))
