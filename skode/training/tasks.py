"""What a network is trained for: the loss of a row, and the score that users know."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Task(Protocol):
    """A loss and a score over outputs (n_members, n, n_outputs)."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss of every row, shape (n_members, n)."""
        ...

    def score(self, outputs: Tensor, target: Tensor, weights: Tensor) -> float:
        """The score of all members' rows together."""
        ...


class Classification:
    """Cross-entropy and accuracy; targets are class numbers, (n_members, n)."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), target.flatten(), reduction="none")
        return loss.view(target.shape)

    def score(self, outputs: Tensor, target: Tensor, weights: Tensor) -> float:
        right = (outputs.argmax(dim=-1) == target).to(weights.dtype)
        return float((right * weights).sum() / weights.sum())


class Regression:
    """Half the squared error (as scikit-learn's MLPRegressor) and R2; targets are (n_members, n, n_targets)."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().mean(dim=-1) / 2

    def score(self, outputs: Tensor, target: Tensor, weights: Tensor) -> float:
        w = (weights / weights.sum()).unsqueeze(-1)
        mean = (w * target).sum(dim=(0, 1), keepdim=True)
        residual = (w * (outputs - target).square()).sum(dim=(0, 1))
        total = (w * (target - mean).square()).sum(dim=(0, 1))
        return float((1 - residual / total.clamp(min=torch.finfo(total.dtype).tiny)).mean())
