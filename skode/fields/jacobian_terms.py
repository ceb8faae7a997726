"""Trace and squared norm of a network's Jacobian, with their derivatives.

Symbols: ``W_1 .. W_{L+1}`` the layers' weights, ``e_l (n, H_l)`` the slopes of hidden layer l: what its value changes
by with ``W_l x``, the activation's derivative times the gate. The Jacobian is ``J = W_{L+1} e_L W_L ... e_1 W_1`` row
by row, so each term is a function of weights and slopes alone. Gates differ from row to row with the rows' times;
as part of the slopes they leave all matrices of weights to all rows. ``*`` is the product entry by entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class Share(NamedTuple):
    """One evaluation's part in the weights' gradients: its slopes, what was remembered, and cotangents (n, 1)."""

    slopes: Tensors
    memory: Any
    a: Tensor


class Term(ABC):
    """A number for each row."""

    @abstractmethod
    def prepare(self, weights: Tensors) -> Any:
        """What all rows share, once for each set of weights."""

    @abstractmethod
    def evaluate(self, weights: Tensors, shared: Any, slopes: Tensors) -> tuple[Tensor, Any]:
        """Values (n, 1), and what to remember."""

    @abstractmethod
    def pull(self, weights: Tensors, shared: Any, slopes: Tensors, memory: Any, a: Tensor) -> tuple[list[Tensor], Any]:
        """The slopes' cotangents for cotangents (n, 1) of the values, and what :meth:`accumulate` needs."""

    @abstractmethod
    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        """Add to the weights' gradients."""


class TraceOfOne(Term):
    """One hidden layer: tr J = sum_j e_j kappa_j with kappa = diag(W_1 W_2), no matrix product at all."""

    def prepare(self, weights: Tensors) -> Tensor:
        return (weights[0] * weights[1].mT).sum(dim=1)

    def evaluate(self, weights: Tensors, shared: Tensor, slopes: Tensors) -> tuple[Tensor, None]:
        return (slopes[0] * shared).sum(dim=1, keepdim=True), None

    def pull(
        self, weights: Tensors, shared: Tensor, slopes: Tensors, memory: Any, a: Tensor
    ) -> tuple[list[Tensor], None]:
        return [a * shared], None

    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        kappa = sum((share.a * share.slopes[0]).sum(dim=0) for share in shares)
        assert isinstance(kappa, Tensor)
        totals[0].addcmul_(kappa.unsqueeze(1), weights[1].mT)
        totals[1].addcmul_(kappa, weights[0].mT)


class TraceOfTwo(Term):
    """Two hidden layers: tr J = e_2^T K e_1 with K = W_2 * (W_1 W_3)^T, one product with H_2 x H_1."""

    def prepare(self, weights: Tensors) -> Tensor:
        return weights[1] * (weights[0] @ weights[2]).mT

    def evaluate(self, weights: Tensors, shared: Tensor, slopes: Tensors) -> tuple[Tensor, Tensor]:
        mixed = slopes[0] @ shared.mT
        return (mixed * slopes[1]).sum(dim=1, keepdim=True), mixed

    def pull(
        self, weights: Tensors, shared: Tensor, slopes: Tensors, memory: Tensor, a: Tensor
    ) -> tuple[list[Tensor], None]:
        return [(a * slopes[1]) @ shared, a * memory], None

    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        K = torch.zeros_like(weights[1])
        for share in shares:
            K.addmm_((share.a * share.slopes[1]).mT, share.slopes[0])
        product = (K * weights[1]).mT
        totals[0].addmm_(product, weights[2].mT)
        totals[1].addcmul_(K, (weights[0] @ weights[2]).mT)
        totals[2].addmm_(weights[0].mT, product)


class NormOfOne(Term):
    """One hidden layer: abs(J)^2 / d = e^T Q e with Q = (W_2^T W_2) * (W_1 W_1^T) / d."""

    def prepare(self, weights: Tensors) -> Tensor:
        first, last = weights
        return (last.mT @ last) * (first @ first.mT) / len(last)

    def evaluate(self, weights: Tensors, shared: Tensor, slopes: Tensors) -> tuple[Tensor, Tensor]:
        mixed = slopes[0] @ shared
        return (mixed * slopes[0]).sum(dim=1, keepdim=True), mixed

    def pull(
        self, weights: Tensors, shared: Tensor, slopes: Tensors, memory: Tensor, a: Tensor
    ) -> tuple[list[Tensor], None]:
        return [2 * a * memory], None

    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        first, last = weights
        Q = first.new_zeros((len(first), len(first)))
        for share in shares:
            Q.addmm_((share.a * share.slopes[0]).mT, share.slopes[0], alpha=2.0 / len(last))
        totals[0].addmm_(Q * (last.mT @ last), first)
        totals[1].addmm_(last, Q * (first @ first.mT))


class _Carried(NamedTuple):
    """Tangents (n, p, H_l) of every hidden layer before its slopes act and after, and of the first layer's input."""

    start: Tensor
    before: list[Tensor]
    after: list[Tensor]


class _ByTangents(Term):
    """Directions carried forward through the layers, as a batch of p tangents a row.

    Parameters
    ----------
    start : tensor of shape (p, d), or (n, 1, d) with one of each row
    """

    def __init__(self, start: Tensor) -> None:
        self._start = start

    def prepare(self, weights: Tensors) -> None:
        return None

    def _carry(self, weights: Tensors, slopes: Tensors) -> _Carried:
        start = self._start.to(weights[0])
        before, after, x = [], [], start
        for W, e in zip(weights[:-1], slopes, strict=True):
            before.append(x @ W.mT)
            x = before[-1] * e.unsqueeze(1)
            after.append(x)
        return _Carried(start, before, after)

    def _pull_back(
        self, weights: Tensors, slopes: Tensors, carried: _Carried, a: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From cotangents of the last tangents to those of the slopes, and of the tangents before slopes act."""
        of_slopes, of_tangents = [], []
        for i in reversed(range(len(slopes))):
            of_slopes.append((a * carried.before[i]).sum(dim=1))
            a = a * slopes[i].unsqueeze(1)
            of_tangents.append(a)
            if i:
                a = a @ weights[i]
        return of_slopes[::-1], of_tangents[::-1]

    def _accumulate_carried(
        self, totals: Tensors, carried: _Carried, of_tangents: list[Tensor], weight: Tensor
    ) -> None:
        """``weight`` (n, 1) is that of the rows' cotangents."""
        inputs = [carried.start, *carried.after[:-1]]
        for total, x, a in zip(totals, inputs, of_tangents, strict=False):
            a = a * weight.unsqueeze(2)
            if x.dim() == 2:
                total.addmm_(a.sum(dim=0).mT, x)
            else:
                total.addmm_(a.flatten(0, 1).mT, x.expand(len(a), -1, -1).flatten(0, 1))


class TraceByTangents(_ByTangents):
    """Any number of hidden layers: the whole Jacobian is carried forward.

    Parameters
    ----------
    n_dims : int
    """

    def __init__(self, n_dims: int) -> None:
        super().__init__(torch.eye(n_dims))

    def evaluate(self, weights: Tensors, shared: Any, slopes: Tensors) -> tuple[Tensor, _Carried]:
        carried = self._carry(weights, slopes)
        return (carried.after[-1] * weights[-1]).sum(dim=(1, 2)).unsqueeze(1), carried

    def pull(
        self, weights: Tensors, shared: Any, slopes: Tensors, memory: _Carried, a: Tensor
    ) -> tuple[list[Tensor], Any]:
        # Cotangents of 1: the rows' own come in later, where they are needed.
        of_slopes, of_tangents = self._pull_back(weights, slopes, memory, weights[-1].unsqueeze(0))
        return [a * x for x in of_slopes], (memory, of_tangents)

    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        for share in shares:
            carried, of_tangents = share.memory
            self._accumulate_carried(totals, carried, of_tangents, share.a)
            totals[-1].add_((share.a.unsqueeze(2) * carried.after[-1]).sum(dim=0))


class NormByTangents(_ByTangents):
    """Any number of hidden layers: abs(J s)^2 / d summed over the directions s.

    All unit vectors give the squared norm of J, a random direction of unit covariance an estimate without bias.

    Parameters
    ----------
    n_dims : int
    probe : tensor of shape (n, d) or (1, d), optional
        The random directions; the unit vectors if not given.
    """

    def __init__(self, n_dims: int, probe: Tensor | None) -> None:
        if probe is None:
            start = torch.eye(n_dims)
        else:
            start = probe if len(probe) == 1 else probe.unsqueeze(1)
        super().__init__(start)

    def evaluate(self, weights: Tensors, shared: Any, slopes: Tensors) -> tuple[Tensor, Any]:
        carried = self._carry(weights, slopes)
        end = carried.after[-1] @ weights[-1].mT
        return end.square().sum(dim=(1, 2)).unsqueeze(1) / len(weights[-1]), (carried, end)

    def pull(self, weights: Tensors, shared: Any, slopes: Tensors, memory: Any, a: Tensor) -> tuple[list[Tensor], Any]:
        carried, end = memory
        a_end = end * (2.0 / len(weights[-1]))
        of_slopes, of_tangents = self._pull_back(weights, slopes, carried, a_end @ weights[-1])
        return [a * x for x in of_slopes], (carried, of_tangents, a_end)

    def accumulate(self, weights: Tensors, totals: Tensors, shares: Sequence[Share]) -> None:
        for share in shares:
            carried, of_tangents, a_end = share.memory
            self._accumulate_carried(totals, carried, of_tangents, share.a)
            totals[-1].addmm_((a_end * share.a.unsqueeze(2)).flatten(0, 1).mT, carried.after[-1].flatten(0, 1))


def trace_term(n_hidden: int, n_dims: int) -> Term:
    """The exact trace of a network with that many hidden layers."""
    closed: dict[int, type[Term]] = {1: TraceOfOne, 2: TraceOfTwo}
    return closed[n_hidden]() if n_hidden in closed else TraceByTangents(n_dims)


def norm_term(n_hidden: int, n_dims: int, probe: Tensor | None) -> Term:
    """The squared Frobenius norm over d: exact for one hidden layer or without a probe."""
    return NormOfOne() if n_hidden == 1 else NormByTangents(n_dims, probe)
