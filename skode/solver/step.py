"""One explicit Runge-Kutta step of a whole batch, its stages stacked in one block of memory.

Symbols: stage increments ``K[i] = h f(t + c_i h, Y_i)``, so that rows may differ in h and a row with h = 0 stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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
    K: Tensor
    tapes: list[Any] | None


def combine(y: Tensor, K: Tensor, weights: Tensor) -> Tensor:
    """``y + sum_i weights[i] K[i]`` in one pass over the stacked stages."""
    n = weights.shape[0]
    return torch.addmv(y.reshape(-1), K[:n].reshape(n, -1).t(), weights).view_as(y)


def attempt_step(
    dynamics: Dynamics, scheme: Scheme, y: Tensor, f0: Tensor, span: Span, tape0: Any | None = None
) -> Attempt:
    """Take one step from ``y``, whose field value ``f0`` is known; with its tape every stage is linearised."""
    tableau = scheme.tableau
    K = y.new_empty((tableau.n_stages, *y.shape))
    torch.mul(f0, span.h, out=K[0])
    tapes = None if tape0 is None else [tape0]
    Y, f = y, f0
    for i, weights in enumerate(scheme.a, start=1):
        Y = combine(y, K, weights)
        if tapes is None:
            f = dynamics(span.times[i], Y)
        else:
            f, tape = dynamics.linearize(span.times[i], Y)
            tapes.append(tape)
        torch.mul(f, span.h, out=K[i])
    y1 = Y if tableau.fsal else combine(y, K, scheme.b)
    error = None if scheme.e is None else torch.mv(K.view(len(K), -1).t(), scheme.e).view_as(y)
    return Attempt(y1, f if tableau.fsal else None, error, K, tapes)
