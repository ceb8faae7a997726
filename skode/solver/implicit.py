"""Stages that have to be solved for: Newton's method inside of a kernel, and its exact way back.

Symbols: a stage of a diagonally implicit step is ``Y = base + h gamma f(t, Y)``, where ``base`` is what the stages
before give; ``Z = Y - base``, so that the field's value there is ``F = Z / (h gamma)`` without cancellation (and
without the factor by which a stiff field would magnify what Newton's method leaves). ``J = df/dy``,
``M = 1 - h gamma J``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skode.solver.control import Tolerance, row_norm
from skode.solver.dynamics import Dynamics
from skode.solver.kernels import TapeBlock, TapeKernel, TapeWayBack
from skode.solver.layout import Layout
from skode.solver.solution import Stats
from skode.solver.tableau import Tableau

MAX_ITERATIONS = 12
KAPPA = 1e-3
"""What Newton's method may leave, in units of the tolerance (or of a thousandth of the state, if that is less)."""
STALLED = 1e-2
"""What it may leave, in units of the tolerance, where round-off keeps it from going on."""


def jacobian(dynamics: Dynamics, t: Tensor, y: Tensor) -> Tensor:
    """df/dy of every row, shape (n, d, d): one linearisation and d pulls, or what the dynamics knows of its own."""
    own = getattr(dynamics, "jacobian", None)
    if own is not None:
        return own(t, y)  # type: ignore[no-any-return]
    f, tape = dynamics.linearize(t, y)
    return pulled_jacobian(dynamics, tape, y, f.shape[1])


def pulled_jacobian(dynamics: Dynamics, tape: Any, y: Tensor, n_outputs: int) -> Tensor:
    """df/dy where a tape was recorded, row by row of the matrices; integrands behind the slopes do not count."""
    n, d = y.shape
    J = y.new_empty((n, d, d))
    for k in range(d):
        unit = y.new_zeros((n, n_outputs))
        unit[:, k] = 1
        J[:, k] = dynamics.pull(tape, unit)[0]
    return J


def newton_matrix(J: Tensor, h_gamma: float | Tensor) -> Tensor:
    """M of every row; ``h_gamma`` is a number, or one for each row (n, 1)."""
    M = J * (-h_gamma if isinstance(h_gamma, float) else -h_gamma.unsqueeze(-1))
    M.diagonal(dim1=1, dim2=2).add_(1)
    return M


class _Units(NamedTuple):
    """What Newton's changes are measured in: to be content, to put up with, and what is round-off (n, 1)."""

    wanted: Tensor
    allowed: Tensor
    noise: Tensor


class ImplicitKernel(TapeKernel):
    """Evaluates the first stage of a step as it is, and solves for the others.

    Every row has a Newton iteration of its own (with the Jacobian of the step's first state), so that it does not
    depend on its neighbours. A row whose iteration fails is marked in ``failed``, stays where the step began, and is
    rejected by the control.

    Parameters
    ----------
    dynamics : Dynamics
    layout : RowLayout or PaddedLayout
    shared_times : bool
    like : tensor
        Has the solve's dtype and device.
    tableau : Tableau
    tolerance : Tolerance
        Tells how well stages have to be solved.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        layout: Layout,
        shared_times: bool,
        like: Tensor,
        tableau: Tableau,
        tolerance: Tolerance,
    ) -> None:
        super().__init__(dynamics, layout, shared_times, like)
        self.gamma, self._tolerance = tableau.gamma, tolerance
        self._guesses = [torch.tensor(row, dtype=like.dtype, device=like.device) for row in _extrapolations(tableau)]
        self._lu = self._pivots = torch.empty(0)
        self._n_implicit, self._to_solve = tableau.n_stages - 1, 0
        self._extra = torch.zeros(layout.row, dtype=torch.int64, device=like.device)

    def begin_step(self, block: TapeBlock, first: int, h: Any) -> None:
        assert block.t is not None
        self._first, self._to_solve = first, self._n_implicit
        self._h_gamma = h * self.gamma
        moves = torch.ones_like(self._extra, dtype=torch.bool)
        self._moves = moves if isinstance(h, float) else h != 0
        self.failed = self._lost = torch.zeros_like(moves)
        # The start's time may not be at hand where the field there is: the first solved stage's time is as good.
        y = block.y[first].clone()
        self._factor(block.t[first + 1].clone().expand(self.layout.row), y)
        self._rate = torch.full_like(self._moves, torch.nan, dtype=y.dtype)
        # One evaluation for the Jacobian; those that the control counts for the stages are counted here.
        self._extra += self._moves * (1 - self._n_implicit)

    def evaluate(self, block: TapeBlock, slot: int, keep: bool) -> None:
        if not self._to_solve:
            super().evaluate(block, slot, keep)
            return
        self._to_solve -= 1
        assert block.t is not None
        t = block.t[slot].clone().expand(self.layout.row)
        base, n_before = block.y[slot].clone(), slot - self._first
        slope = torch.mv(block.stacks(self._first, n_before)[-1], self._guesses[n_before - 1]).view_as(base)
        Z = self._solve(t, base, slope * self._h_gamma, block.y[self._first])
        stays = ~self._moves | self._lost
        h_gamma = self._h_gamma
        if isinstance(h_gamma, Tensor):
            h_gamma = torch.where(h_gamma == 0, 1.0, h_gamma)
        block.y[slot].copy_(torch.where(stays, block.y[self._first], base + Z))
        block.f[slot].copy_(torch.where(stays, block.f[self._first], Z / h_gamma))
        if keep:
            _, block.tapes[slot] = self.dynamics.linearize(t, block.y[slot].clone())

    def _solve(self, t: Tensor, base: Tensor, Z: Tensor, y: Tensor) -> Tensor:
        """Newton's method (Hairer and Wanner, "Solving Ordinary Differential Equations II", section IV.8).

        It begins with the Jacobian of the step's first state; a row that this one serves badly gets a new one, once.
        """
        units = self._units(y, base)
        open_ = self._moves & ~self._lost
        renewed = torch.zeros_like(open_)
        # What the stages before tell of the rate: nothing of the step's first one.
        rate, previous = self._rate**0.8, torch.full_like(self._rate, torch.nan)
        for k in range(MAX_ITERATIONS):
            self._extra += open_
            residual = (self.dynamics(t, base + Z) * self._h_gamma).sub_(Z)
            change = torch.linalg.lu_solve(self._lu, self._pivots, residual.unsqueeze(-1)).squeeze(-1)
            size = row_norm(change / units.wanted, 1)
            if not k:
                # Where the field has no value at the first guess, the step fails as an explicit one would.
                Z = torch.where(open_, Z + change, Z)
                open_ = open_ & torch.isfinite(size)
            else:
                Z = torch.where(open_, Z + change, Z)
                rate = size / previous
                if k == 1:
                    self._rate = torch.where(open_, torch.fmax(self._rate, rate.clamp(1e-2, 1.0)), self._rate)
            left = torch.where(rate < 0.99, size * rate / (1 - rate), torch.inf if k else size)
            open_ = open_ & ~(left <= KAPPA)
            if k:
                open_ = self._give_up(open_, renewed, rate, k, change, units)
            if not bool(open_.any()):
                break
            previous = size
            slow = open_ & ~renewed & ((rate > 0.3) | (left * rate**2 > KAPPA)) if k else renewed
            if k and bool(slow.any()):
                self._renew(t, base + Z, slow)
                renewed = renewed | slow
                previous = torch.where(slow, torch.nan, previous)
        return Z

    def _give_up(self, open_: Tensor, renewed: Tensor, rate: Tensor, k: int, change: Tensor, units: _Units) -> Tensor:
        """Rows go on that may still get there; of the others those fail that round-off does not excuse."""
        hopeless = open_ & ((renewed & (rate >= 1)) | ~torch.isfinite(change).all(dim=1, keepdim=True))
        if k == MAX_ITERATIONS - 1:
            hopeless = open_
        good = (row_norm(change / units.allowed, 1) <= STALLED) | (row_norm(change, 1) <= units.noise)
        self._lost |= hopeless & ~good
        return open_ & ~hopeless

    def _renew(self, t: Tensor, y: Tensor, rows: Tensor) -> None:
        """Factors of M where these rows are now."""
        self._extra += rows
        self._rate = torch.where(rows, 1.0, self._rate)
        self._factor(t, torch.where(torch.isfinite(y), y, 0.0), rows)

    def _factor(self, t: Tensor, y: Tensor, rows: Tensor | None = None) -> None:
        J = jacobian(self.dynamics, t, y)
        M = newton_matrix(torch.where(torch.isfinite(J), J, 0.0), self._h_gamma)
        lu, pivots, _ = torch.linalg.lu_factor_ex(M)
        if rows is not None:
            lu, pivots = torch.where(rows.unsqueeze(-1), lu, self._lu), torch.where(rows, pivots, self._pivots)
        self._lu, self._pivots = lu, pivots

    def _units(self, y: Tensor, base: Tensor) -> _Units:
        allowed = self._tolerance.unit(y, base)
        eps = torch.finfo(y.dtype).eps
        size = torch.maximum(y.abs(), base.abs())
        largest = size.amax(dim=1, keepdim=True)
        least = (8 * eps / KAPPA) * size + torch.finfo(y.dtype).tiny
        return _Units(torch.maximum(torch.minimum(allowed, 1e-3 * largest), least), allowed, 32 * eps * largest)

    def counted(self, stats: Stats) -> Stats:
        extra = self.layout.leave(self._extra).reshape(-1)
        return stats._replace(n_evals=stats.n_evals + extra)

    def way_back(self, n_stages: int) -> ImplicitWayBack:
        return ImplicitWayBack(self, n_stages, self._like)


def _extrapolations(tableau: Tableau) -> list[list[float]]:
    """For each stage after the first, the weights with which up to three values before it foretell its own."""
    rows = []
    for i in range(1, tableau.n_stages):
        nodes = sorted(range(i), key=lambda j: abs(tableau.c[j] - tableau.c[i]))[:3]
        powers = np.vander([tableau.c[j] for j in nodes], increasing=True).T
        weights = np.linalg.solve(powers, tableau.c[i] ** np.arange(len(nodes)))
        row = np.zeros(i)
        row[nodes] = weights
        rows.append(row.tolist())
    return rows


class ImplicitWayBack(TapeWayBack):
    """The way back through solved stages.

    From ``F = f(t, base + h gamma F)`` follows ``M dF = J d(base) + gamma J F dh + f_t dt + f_theta d(theta)``: with
    ``delta = M^-T a`` all of a stage's cotangents are those of the field itself for ``delta``. J is the stage's own.
    """

    def __init__(self, kernel: ImplicitKernel, n_stages: int, like: Tensor) -> None:
        super().__init__(kernel, n_stages, like)
        self._gamma = kernel.gamma

    def begin_step(self, h: Any) -> None:
        self._h_gamma = h * self._gamma

    def pull(self, block: TapeBlock, first: int, i: int, out: Tensor, time: bool) -> Tensor | None:
        if i:
            a = self.room.a[i]
            J = pulled_jacobian(self._dynamics, block.tapes[first + i], a, a.shape[1])
            M = newton_matrix(J, self._h_gamma)
            delta, _ = torch.linalg.solve_ex(M.mT, a.unsqueeze(-1))
            a.copy_(delta.squeeze(-1))
        return super().pull(block, first, i, out, time)
