"""How a batch of states lies in memory while it is solved.

Symbols: n rows (problems) of d components; ``N`` rows with padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

PADDING = 16
"""Rows come in multiples of this where they are padded: matrix products then treat every row alike, bit for bit."""


class Layout(Protocol):
    """Maps the callers' rows ``(n, k)`` to the solver's states and back.

    ``state`` is the shape of a state, ``row`` that of one number for each row, which broadcasts against a state;
    ``dim`` is the axis of the components in both.
    """

    @property
    def n(self) -> int:
        """The callers' rows."""
        ...

    @property
    def d(self) -> int:
        """Components."""
        ...

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of a state."""
        ...

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one number for each row."""
        ...

    @property
    def dim(self) -> int:
        """Axis of the components."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """States of ``(n, k)``; rows of padding are copies of others."""
        ...

    def enter_cotangent(self, g: Tensor) -> Tensor:
        """Cotangents of ``(n, k)``; zero in the padding."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """``(n, k)`` of a state, or ``(..., n, k)`` of many."""
        ...

    def one(self, x: Tensor, row: int) -> Tensor:
        """The state of one row (counted with padding), to broadcast against all."""
        ...


@dataclass(frozen=True)
class RowLayout:
    """Rows as they come: states of shape (n, d)."""

    n: int
    d: int
    dim: int = 1

    @property
    def state(self) -> tuple[int, ...]:
        return self.n, self.d

    @property
    def row(self) -> tuple[int, ...]:
        return self.n, 1

    def enter(self, x: Tensor) -> Tensor:
        return x

    def enter_cotangent(self, g: Tensor) -> Tensor:
        return g

    def leave(self, x: Tensor) -> Tensor:
        return x

    def one(self, x: Tensor, row: int) -> Tensor:
        return x[row : row + 1]


@dataclass(frozen=True)
class PaddedLayout:
    """Rows as they come and copies of some after them: states of shape (N, d), N a multiple of ``PADDING``.

    Functions of single numbers, too, may treat those that do not fill a vector register differently.
    """

    n: int
    d: int
    dim: int = 1

    @property
    def _n_padded(self) -> int:
        return _padded(self.n)

    @property
    def state(self) -> tuple[int, ...]:
        return self._n_padded, self.d

    @property
    def row(self) -> tuple[int, ...]:
        return self._n_padded, 1

    def enter(self, x: Tensor) -> Tensor:
        return x[_copies(self.n, self._n_padded, x.device)]

    def enter_cotangent(self, g: Tensor) -> Tensor:
        return torch.nn.functional.pad(g, (0, 0, 0, self._n_padded - self.n))

    def leave(self, x: Tensor) -> Tensor:
        return x[..., : self.n, :]

    def one(self, x: Tensor, row: int) -> Tensor:
        return x[row : row + 1]


@dataclass(frozen=True)
class ColumnLayout:
    """Components first: states of shape (d, N), or (n_groups, d, N) for equal consecutive groups of rows.

    A network's layers then write into blocks of memory that lie together, with room for inputs that are constant.
    """

    n: int
    d: int
    n_groups: int | None = None
    padded: bool = False
    dim: int = -2

    @property
    def _of_group(self) -> int:
        return self.n // (self.n_groups or 1)

    @property
    def n_columns(self) -> int:
        """Rows of a group, with padding."""
        return _padded(self._of_group) if self.padded else self._of_group

    @property
    def lead(self) -> tuple[int, ...]:
        """The groups' axis, if there are any."""
        return () if self.n_groups is None else (self.n_groups,)

    @property
    def state(self) -> tuple[int, ...]:
        return *self.lead, self.d, self.n_columns

    @property
    def row(self) -> tuple[int, ...]:
        return *self.lead, 1, self.n_columns

    def enter(self, x: Tensor) -> Tensor:
        columns = self._columns(x)
        if self.n_columns == self._of_group:
            return columns
        return columns[..., _copies(self._of_group, self.n_columns, x.device)]

    def enter_cotangent(self, g: Tensor) -> Tensor:
        columns = self._columns(g)
        missing = self.n_columns - self._of_group
        return torch.nn.functional.pad(columns, (0, missing)) if missing else columns

    def leave(self, x: Tensor) -> Tensor:
        rows = x[..., : self._of_group].mT
        return rows if self.n_groups is None else rows.flatten(-3, -2)

    def one(self, x: Tensor, row: int) -> Tensor:
        group, column = divmod(row, self.n_columns)
        return (x[group] if self.lead else x)[..., column : column + 1]

    def _columns(self, x: Tensor) -> Tensor:
        return x.view(*self.lead, self._of_group, x.shape[-1]).mT if self.lead else x.t()


def _padded(n: int) -> int:
    return -(-n // PADDING) * PADDING


@lru_cache(maxsize=256)
def _copies(n: int, n_padded: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(n_padded, device=device) % n
