"""A solve with its steps given, in plain torch.

That is slower than the solver's own way, but whatever acts on plain torch acts on it: derivatives of any order,
function transforms, compilers.

Symbols: a step goes from ``t`` to ``t_next = t + h``; stage i has the field's value ``F_i``. Times and lengths are
numbers, or tensors of shape (r, 1), r being n or, for steps that all rows share, 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.tableau import Row, Tableau

Time = Any  # a number, or a tensor of shape (r, 1)


@dataclass(frozen=True)
class Weights:
    """A tableau as numbers alone."""

    a: tuple[Row, ...]
    b: Row
    estimates: tuple[Row, ...]
    late: Row
    p: tuple[Row, ...]
    end_stage: int | None

    @staticmethod
    def of(tableau: Tableau) -> Weights:
        """Of a tableau.

        Raises
        ------
        NotImplementedError
            If its stages have to be solved for.
        """
        if tableau.implicit:
            raise NotImplementedError(
                f"{tableau.name!r} solves for its stages and cannot be unrolled into plain torch (second derivatives, "
                "function transforms, compilation); use an explicit method."
            )
        late = tuple(1 - c for c in tableau.c)
        p = tuple(tuple(row) for row in tableau.dense.tolist())
        return Weights(tableau.a, tableau.b, tableau.estimates, late, p, tableau.end_stage)


@dataclass(frozen=True)
class Jump:
    """The field jumps at either end of a step; its direction is ``sign``. Flags are numbers or tensors like times."""

    at_start: Any
    at_end: Any
    sign: Any


class Step(NamedTuple):
    """One unrolled step: its state at the start, the stages' values and the length."""

    y: Tensor
    F: list[Tensor]
    h: Time


class Unrolled:
    """Takes the steps one after another and remembers them.

    Parameters
    ----------
    field : callable
        ``field(t, y)`` with t ``(n, 1)``.
    weights : Weights
        Of the closed tableau where there is dense output.
    y0 : tensor of shape (n, d)
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], weights: Weights, y0: Tensor) -> None:
        self._field, self.weights, self.y = field, weights, y0
        self.steps: list[Step] = []
        self._f: Tensor | None = None

    def take(self, t: Time, t_next: Time, jump: Jump | None = None, moves: Tensor | None = None) -> None:
        """Go from ``t`` to ``t_next``.

        ``moves``, of shape (n, 1), is there if rows may stand where no field is: 2 for rows that move, 1 for others
        where there is one, 0 for those where there may be none.
        """
        h, y, n = t_next - t, self.y, len(self.weights.b)
        times = [self._at(t)] + [self._at(_late(t_next, h, late)) for late in self.weights.late[1:]]
        if jump is not None:
            times = _inside(times, self._at(t_next).detach(), jump)
        if self._f is None:
            self._f = self._value(times[0], y, moves)
        F = [self._f]
        for i in range(1, n):
            F.append(self._value(times[i], _combined(y, h, F, self.weights.a[i - 1]), moves))
        end = self.weights.end_stage
        self.y = _combined(y, h, F, self.weights.b)
        self._f = None if end is None else F[end]
        self.steps.append(Step(y, F, h))

    def ask_again(self) -> None:
        """The field has jumped."""
        self._f = None

    def inside(self, step: int, theta: float) -> Tensor:
        """The states (n, d) at a place inside of a step."""
        y, F, h = self.steps[step]
        return _combined(y, h, F, tuple(_polynomial(row, theta) for row in self.weights.p))

    def values(self) -> Tensor:
        """Stage values times the steps' lengths, shape (n_steps, n_stages, n, d)."""
        return torch.stack([torch.stack(F) * (h if isinstance(h, float) else h.to(y.dtype)) for y, F, h in self.steps])

    def states(self) -> Tensor:
        """The states at the steps' starts, shape (n_steps, n, d)."""
        return torch.stack([y for y, _, _ in self.steps])

    def _value(self, t: Tensor, y: Tensor, moves: Tensor | None) -> Tensor:
        if moves is not None:
            # A row with a field stands in for those that do not move.
            row, own = moves.argmax(dim=0), moves == 2
            t = torch.where(own, t, t.index_select(0, row).detach())
            y = torch.where(own, y, y.index_select(0, row).detach())
        return self._field(t, y)

    def _at(self, t: Time) -> Tensor:
        if isinstance(t, float):
            return self.y.new_full((1, 1), t).expand(self.y.shape[0], 1)
        return t.to(self.y.dtype).expand(self.y.shape[0], 1)  # type: ignore[no-any-return]


def _late(t_next: Time, h: Time, late: float) -> Time:
    return t_next - late * h if isinstance(h, float) else torch.sub(t_next, h, alpha=late)


def _combined(y: Tensor, h: Time, F: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Y + h sum_i w_i F_i."""
    wanted = [(weight, f) for weight, f in zip(weights, F, strict=False) if weight]
    if not wanted:
        return y
    weight, f = wanted[0]
    if len(wanted) == 1:
        return (
            torch.add(y, f, alpha=weight * h)
            if isinstance(h, float)
            else torch.addcmul(y, h.to(y.dtype), f, value=weight)
        )
    total = f * weight
    for weight, f in wanted[1:]:
        total = torch.add(total, f, alpha=weight)
    return torch.add(y, total, alpha=h) if isinstance(h, float) else torch.addcmul(y, h.to(y.dtype), total)


def _polynomial(coefficients: Sequence[float], theta: float) -> float:
    """Without a constant term."""
    total = 0.0
    for coefficient in reversed(coefficients):
        total = (total + coefficient) * theta
    return total


def _inside(times: list[Tensor], end: Tensor, jump: Jump) -> list[Tensor]:
    """Keep off the jumps: the field is asked just before, and just after. The times' derivatives stay as they are."""
    values, sign = [t.detach() for t in times], torch.as_tensor(jump.sign, device=end.device).to(end.dtype)
    start = values[0]
    start = torch.where(torch.as_tensor(jump.at_start, device=end.device), torch.nextafter(start, start + sign), start)
    end = torch.where(torch.as_tensor(jump.at_end, device=end.device), torch.nextafter(end, end - sign), end)
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    return [t + (value.clamp(low, high) - value) for t, value in zip(times, values, strict=True)]
