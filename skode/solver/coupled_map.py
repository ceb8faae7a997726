"""The map of steps that can be undone (:mod:`skode.solver.coupled`) with its steps held fixed, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from skode.solver.numerical_map import Course
from skode.solver.problem import Problem
from skode.solver.unrolled import Jump, Unrolled, Weights


def coupled_map(coupling: float, problem: Problem, fixed: Course, y0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (n, m, d), and zeros for errors (n,), which these steps do not have."""
    own, error = times[: len(fixed.t)], y0.new_zeros(len(y0))
    if own.shape[1] == 1 or fixed.t.shape[1] == 1:
        return _without(fixed, y0.unsqueeze(1).expand(-1, times.shape[1], -1)), error
    ends = _Ends(fixed, own)
    knots, weights = ends.knots.split(1, dim=1), Weights.of(problem.scheme.tableau)
    moved = fixed.t.diff(dim=1) != 0
    y, z, states = y0, y0, [y0]
    for i in range(len(knots) - 1):
        moves = None if fixed.moves is None else fixed.moves[:, i : i + 1]
        ahead, turn = (Unrolled(problem.dynamics, weights, x) for x in (z, y0))
        jump = _jump(fixed, i)
        ahead.take(knots[i], knots[i + 1], jump, moves)
        y = torch.where(moved[:, i : i + 1], coupling * (y - z) + ahead.y, y)
        turn.y = y
        turn.take(knots[i + 1], knots[i], None if jump is None else _turned(jump), moves)
        z = torch.where(moved[:, i : i + 1], z - (turn.y - y), z)
        states.append(y)
    return _without(fixed, ends.outputs(problem, torch.stack(states, dim=1))), error


class _Ends:
    """Which step ends at which output, and the other way round; of equal times the last one is the steps' end."""

    def __init__(self, fixed: Course, times: Tensor) -> None:
        self._fixed, self._times = fixed, times
        index = torch.arange(times.shape[1], device=times.device).expand_as(fixed.step)
        reached = fixed.t.gather(1, fixed.step + 1) == times.detach()
        self._number = torch.where(reached, fixed.step + 1, 0)
        carrier = torch.full(fixed.t.shape, -1, dtype=torch.int64, device=times.device)
        carrier = carrier.scatter_reduce(1, self._number, torch.where(reached, index, 0), "amax")
        inner = torch.where(carrier >= 0, times.gather(1, carrier.clamp(min=0)), fixed.t)[:, 1:]
        self.knots = torch.cat([times[:, :1], inner], dim=1)
        carrier[:, 0] = 0
        self._alone = carrier.gather(1, self._number) != index
        if fixed.missing is not None:
            self._alone &= ~fixed.missing[: len(times)]
        if fixed.moves is not None:
            self._alone = self._alone & (fixed.moves[:, :1] != 0)  # others have no field where they start

    def outputs(self, problem: Problem, states: Tensor) -> Tensor:
        """Of states (n, k + 1, d); an output whose time moves alone moves with the field."""
        n, m = len(states), self._number.shape[1]
        outputs = states.gather(1, self._number.expand(n, m).unsqueeze(2).expand(-1, -1, states.shape[2]))
        if not bool(self._alone.any()):
            return outputs
        ends = self.knots.gather(1, self._number)
        asked, alone = self._asked(ends, states.dtype).expand(n, m), self._alone.expand(n, m)
        shift = torch.where(self._alone, self._times - ends, 0.0).to(states.dtype).expand(n, m)
        columns = list(outputs.unbind(1))
        for j in torch.nonzero(self._alone.any(dim=0)).view(-1).tolist():
            # The field need not be finite at other rows' states: one of these stands in for them.
            own, row = alone[:, j : j + 1], int(alone[:, j].to(torch.int8).argmax())
            t = torch.where(own, asked[:, j : j + 1], asked[row, j].detach())
            y = torch.where(own, columns[j], columns[j][row].detach())
            columns[j] = torch.where(own, columns[j] + shift[:, j : j + 1] * problem.dynamics(t, y), columns[j])
        return torch.stack(columns, dim=1)

    def _asked(self, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """Where the field is asked: not at times where it jumps, but just before, and just after at the start."""
        t, fixed = ends.to(dtype), self._fixed
        if fixed.jumps is None:
            return t
        sign = torch.sign(fixed.t[:, -1:] - fixed.t[:, :1])
        towards = torch.where(self._number == 0, sign, -sign).to(dtype)
        aside = torch.nextafter(t.detach(), t.detach() + towards)
        return t + torch.where(fixed.jumps.gather(1, self._number), aside - t.detach(), 0.0)


def _jump(fixed: Course, i: int) -> Jump | None:
    if not fixed.any_jump or not (fixed.any_jump[i] or fixed.any_jump[i + 1]):
        return None
    assert fixed.jumps is not None and fixed.starts_aside is not None
    sign = torch.sign(fixed.t[:, -1:] - fixed.t[:, :1])
    return Jump(fixed.starts_aside[:, i : i + 1], fixed.jumps[:, i + 1 : i + 2], sign)


def _turned(jump: Jump) -> Jump:
    return Jump(jump.at_end, jump.at_start, -jump.sign)


def _without(fixed: Course, y: Tensor) -> Tensor:
    """NaN where there is no output."""
    return y if fixed.missing is None else y.masked_fill(fixed.missing.unsqueeze(2), torch.nan)
