"""Training rows on the device, who is trained on which, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.runtime import ALONE, Peers
from skode.solver import BatchControl


class Batch(NamedTuple):
    """Rows (n_members, n, n_features) or (n, n_features), targets (n_members, n, ...) and weights (n_members, n).

    ``totals`` (n_members,) are the weights' sums, those of the batch's rows in other processes included.
    """

    X: Tensor
    target: Tensor
    weights: Tensor
    totals: Tensor


@dataclass
class TrainingRows:
    """Rows with targets and weights, and the fold that each member leaves out.

    Parameters
    ----------
    X : tensor of shape (n, n_features)
    target : tensor of shape (n,) or (n, n_targets)
    weights : tensor of shape (n,)
    n_members : int
    folds : array of shape (n,), optional
        Member m is validated on fold m modulo the number of folds, and trained on the others; without folds every
        member is trained on all rows.
    """

    X: Tensor
    target: Tensor
    weights: Tensor
    n_members: int
    folds: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        self._whole: Batch | None = None
        self._rows = None if self.folds is None else self._tables(inside=False)

    def _tables(self, *, inside: bool) -> list[Tensor]:
        assert self.folds is not None
        n_folds = int(self.folds.max()) + 1
        picked = [(self.folds == m % n_folds) == inside for m in range(self.n_members)]
        return [torch.from_numpy(np.flatnonzero(mask)).to(self.X.device) for mask in picked]

    @property
    def peers(self) -> Peers:
        """The processes that hold rows."""
        return ALONE

    @property
    def n_all(self) -> int:
        """All rows, whoever is trained on them."""
        return len(self.X)

    @property
    def n_rows(self) -> int:
        """Rows that every member is trained on in an epoch."""
        return self.n_all if self._rows is None else min(map(len, self._rows))

    def control(self, batch: Batch) -> BatchControl:
        """How the batch's rows share their steps."""
        return BatchControl(batch.weights.reshape(-1))

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch: equal batches in an order of its own for each member; in the rows' order without a generator."""
        n_batches = max(1, round(self.n_rows / batch_size))
        if n_batches == 1:  # the order does not matter
            if self._whole is None:
                self._whole = self._take_all() if self._rows is None else self._take(self._order(None))
            yield self._whole
            return
        table = self._order(generator)
        for rows in table.tensor_split(n_batches, dim=1):
            yield self._take(rows)

    def _order(self, generator: torch.Generator | None) -> Tensor:
        """Row numbers (n_members, n_rows)."""
        orders = []
        for m in range(self.n_members):
            own = torch.arange(self.n_all) if self._rows is None else self._rows[m].cpu()
            if generator is not None:
                own = own[torch.randperm(len(own), generator=generator)]
            orders.append(own[: self.n_rows])
        return torch.stack(orders).to(self.X.device)

    def validation(self, size: int = 1024) -> Iterator[Batch]:
        """Each member's left-out rows in slices; shorter folds are filled up with rows of weight 0."""
        tables = self._tables(inside=True)
        longest = max(map(len, tables))
        rows = torch.stack([torch.nn.functional.pad(table, (0, longest - len(table))) for table in tables])
        real = torch.stack([torch.arange(longest, device=rows.device) < len(table) for table in tables])
        for part, counted in zip(rows.split(size, dim=1), real.split(size, dim=1), strict=True):
            yield self._take(part, counted)

    def _take(self, rows: Tensor, counted: Tensor | None = None) -> Batch:
        """Each member's rows (n_members, n), of which those that are not ``counted`` weigh nothing."""
        weights = self.weights[rows] if counted is None else self.weights[rows] * counted
        return Batch(self.X[rows], self.target[rows], weights, weights.sum(dim=1))

    def _take_all(self) -> Batch:
        members = (self.n_members, *(-1 for _ in self.target.shape))
        weights = self.weights.expand(self.n_members, -1)
        return Batch(self.X, self.target.expand(*members), weights, weights.sum(dim=1))
