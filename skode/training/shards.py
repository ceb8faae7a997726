"""Training rows that lie in several processes: all form the same batches, and each evaluates the rows it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.runtime import Peers
from skode.solver import BatchControl
from skode.training.data import Batch, TrainingRows


class ShardedRows(TrainingRows):
    """Some of the rows, one behind the other in the order of processes; see :class:`TrainingRows`.

    Of the others' rows only weights and folds are known, so that everybody draws the same batches of the same total
    weight. A batch of members with orders of their own is filled up with rows of weight 0, where one has fewer here.

    Parameters
    ----------
    X, target, weights : tensors
        Of the rows that are here, at least one.
    n_members : int
    folds : array of shape (n_all,), optional
        Of all rows.
    peers : Peers
    """

    def __init__(
        self, X: Tensor, target: Tensor, weights: Tensor, n_members: int, folds: NDArray[Any] | None, peers: Peers
    ) -> None:
        everybodys = peers.gather(weights.cpu().numpy())
        self._first = sum(map(len, everybodys[: peers.rank]))
        self._all_weights = torch.from_numpy(np.concatenate(everybodys)).to(weights.device)
        self._peers = peers
        super().__init__(X, target, weights, n_members, folds)

    @property
    def peers(self) -> Peers:
        return self._peers

    @property
    def n_all(self) -> int:
        return len(self._all_weights)

    def control(self, batch: Batch) -> BatchControl:
        return BatchControl((batch.weights / batch.totals.sum()).reshape(-1), peers=self._peers)

    def _take(self, rows: Tensor, counted: Tensor | None = None) -> Batch:
        here = (rows >= self._first) & (rows < self._first + len(self.X))
        width = max(1, int(here.sum(dim=1).max()))
        own = torch.argsort(~here, dim=1, stable=True)[:, :width]
        is_own = here.gather(1, own)
        weights = self._all_weights[rows] if counted is None else self._all_weights[rows] * counted
        local = torch.where(is_own, rows.gather(1, own) - self._first, 0)
        return Batch(self.X[local], self.target[local], weights.gather(1, own) * is_own, weights.sum(dim=1))

    def _take_all(self) -> Batch:
        return super()._take_all()._replace(totals=self._all_weights.sum().expand(self.n_members))
