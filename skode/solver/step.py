"""One explicit Runge-Kutta step of a whole batch.

Symbols: stage increments ``K[i] = h f(t + c_i h, Y_i)``, so that rows may differ in h and a row with h = 0 stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skode.solver.dynamics import Dynamics
from skode.solver.tableaus import Tableau


class Span(NamedTuple):
    """A step that is to be tried: from ``t`` (rows, or shared) over ``h`` to ``t_next``.

    ``h`` is a float (shared) or ``(n, 1)`` in the state's dtype; ``times[i]`` is stage i's time as ``(n, 1)``.
    """

    t: Any
    t_next: Any
    h: Any
    times: tuple[Tensor, ...]


@dataclass(frozen=True)
class Scheme:
    """A tableau's weights as tensors of the solve's dtype and device."""

    tableau: Tableau
    a: tuple[Tensor, ...]
    b: Tensor
    e: Tensor | None
    c: Tensor
    p: Tensor

    def weights(self, row: int | str) -> Tensor:
        """Row number ``row`` of ``a``, or "b", or "e"."""
        return self.a[row] if isinstance(row, int) else getattr(self, row)

    def terms(self, row: int | str) -> tuple[tuple[int, float], ...]:
        """The same as (stage, weight) pairs without zeros."""
        return _terms(self.tableau.a[row] if isinstance(row, int) else getattr(self.tableau, row))


@lru_cache(maxsize=1024)
def _terms(weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    kept = tuple((i, weight) for i, weight in enumerate(weights) if weight != 0)
    return kept or ((0, 0.0),)


@lru_cache(maxsize=64)
def make_scheme(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Scheme:
    """The scheme of a tableau, made once for each dtype and device."""

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Scheme(
        tableau,
        tuple(tensor(row) for row in tableau.a),
        tensor(tableau.b),
        None if tableau.e is None else tensor(tableau.e),
        tensor(tableau.c).view(-1, 1, 1),
        tensor(tableau.dense.tolist()),
    )


class Attempt(NamedTuple):
    """What a step gave: new state, the field there (FSAL methods), error estimate, stages and tapes."""

    y1: Tensor
    f1: Tensor | None
    error: Tensor | None
    stages: Stages
    tapes: list[Any] | None


class Stages(Protocol):
    """The stages of a step, as they are computed."""

    def add(self, f: Tensor) -> None:
        """Take the next stage's field value."""
        ...

    def combine(self, y: Tensor | None, row: int | str) -> Tensor:
        """``y`` (or zero) plus the weighted increments; weights are the row of ``a`` with that number, "b" or "e"."""
        ...

    def stacked(self) -> Tensor:
        """The increments K, shape (n_stages, n, d)."""
        ...


class RowStages:
    """Rows have steps of their own: increments stacked in one block of memory, combined in one pass."""

    def __init__(self, scheme: Scheme, y: Tensor, h: Tensor) -> None:
        self._scheme, self._h, self._n = scheme, h, 0
        self._K = y.new_empty((scheme.tableau.n_stages, *y.shape))

    def add(self, f: Tensor) -> None:
        torch.mul(f, self._h, out=self._K[self._n])
        self._n += 1

    def combine(self, y: Tensor | None, row: int | str) -> Tensor:
        weights = self._scheme.weights(row)
        K = self._K[: len(weights)].view(len(weights), -1).t()
        if y is None:
            return torch.mv(K, weights).view(self._K.shape[1:])
        return torch.addmv(y.reshape(-1), K, weights).view_as(y)

    def stacked(self) -> Tensor:
        return self._K


class SharedStages:
    """One step for all rows: it goes into the weights, and zero weights cost nothing."""

    def __init__(self, scheme: Scheme, h: float) -> None:
        self._scheme, self._h = scheme, h
        self._values: list[Tensor] = []

    def add(self, f: Tensor) -> None:
        self._values.append(f)

    def combine(self, y: Tensor | None, row: int | str) -> Tensor:
        (first, weight), *others = self._scheme.terms(row)
        if y is None:
            total = self._values[first] * (weight * self._h)
        else:
            total = torch.add(y, self._values[first], alpha=weight * self._h)
        for i, weight in others:
            total.add_(self._values[i], alpha=weight * self._h)
        return total

    def stacked(self) -> Tensor:
        return torch.stack(self._values).mul_(self._h)


def make_stages(scheme: Scheme, y: Tensor, h: Any) -> Stages:
    """Room for a step's stages."""
    return SharedStages(scheme, h) if isinstance(h, float) else RowStages(scheme, y, h)


def attempt_step(
    dynamics: Dynamics, scheme: Scheme, y: Tensor, f0: Tensor, span: Span, tape0: Any | None = None
) -> Attempt:
    """Take one step from ``y``, whose field value ``f0`` is known; with its tape every stage is linearised."""
    tableau = scheme.tableau
    stages = make_stages(scheme, y, span.h)
    stages.add(f0)
    tapes = None if tape0 is None else [tape0]
    Y, f = y, f0
    for i in range(1, tableau.n_stages):
        Y = stages.combine(y, i - 1)
        if tapes is None:
            f = dynamics(span.times[i], Y)
        else:
            f, tape = dynamics.linearize(span.times[i], Y)
            tapes.append(tape)
        stages.add(f)
    y1 = Y if tableau.fsal else stages.combine(y, "b")
    error = stages.combine(None, "e") if tableau.adaptive else None
    return Attempt(y1, f if tableau.fsal else None, error, stages, tapes)
