"""Whether a solve with an explicit method failed because its problem is stiff: a look at it after the failure.

Symbols: ``v`` a direction of states, ``J = df/dy``, ``rho`` the size of J's largest eigenvalue.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from skode.solver.control import Tolerance
from skode.solver.dynamics import Dynamics
from skode.solver.solution import Stats, Status
from skode.solver.tableau import Tableau

MOST_ROWS = 8
"""So many failed rows are told about."""
N_ITERATIONS = 12
NEAR = 0.5
"""A step this far towards the limit of stability is held there by the controller."""


@lru_cache(maxsize=128)
def stability_limit(tableau: Tableau) -> float:
    """Up to which z the method keeps y' = -z y / h from growing; infinity for L-stable methods."""
    if tableau.implicit:
        return float("inf")
    z = np.arange(1, 4001) / 100
    A, b = tableau.matrix, np.array(tableau.b)
    systems = np.eye(len(A)) + z[:, None, None] * A
    growth = 1 - z * (np.linalg.solve(systems, np.ones((len(z), len(A), 1)))[..., 0] @ b)
    return float(z[np.argmax(np.abs(growth) > 1 + 1e-9)])


def advice(
    dynamics: Dynamics, tableau: Tableau, tolerance: Tolerance, y: Tensor, stats: Stats, t0: Tensor, t1: Tensor
) -> dict[int, str]:
    """A sentence for each row that stopped where its step was as long as the method's stability allows.

    Parameters
    ----------
    dynamics : Dynamics
        Is asked for all rows at once, and only at times and states that the solve has come to.
    tableau : Tableau
    tolerance : Tolerance
    y : tensor of shape (n, d)
        Where each row stopped.
    stats : Stats
    t0, t1 : tensors of shape (n,)
        Where each row began and was to end.
    """
    failed = (stats.status == Status.MAX_STEPS) | (stats.status == Status.STEP_UNDERFLOW)
    rows = torch.nonzero(failed & (stats.n_steps > 0)).view(-1).tolist()[:MOST_ROWS]
    limit = stability_limit(tableau)
    if not rows or not tableau.adaptive or limit == float("inf"):
        return {}
    with torch.no_grad():
        rho, decay = _spectrum(dynamics, tolerance, stats.t.to(y.dtype).unsqueeze(1), y)
    # The controller swings about the limit: a step may be far below it, the steps' mean is not.
    mean = (stats.t - t0).abs() / stats.n_steps.clamp(min=1)
    z = torch.maximum(stats.h, mean.to(stats.h)).to(rho) * rho
    # Only what decays fast along the row's time is stiff; growth and oscillation are there to be resolved.
    stiff = (z >= NEAR * limit) & (torch.sign(t1 - t0).to(rho) * decay < -0.5 * rho)
    return {row: _sentence(float(z[row]), limit) for row in rows if bool(stiff[row])}


def _sentence(z: float, limit: float) -> str:
    return (
        f". The step is held by stability (h |lambda| = {z:.2g}, and the method's limit is {limit:.2g}), not by "
        "accuracy: the problem is stiff; use method='kencarp4'"
    )


def _spectrum(dynamics: Dynamics, tolerance: Tolerance, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row rho, and v.Jv / v.v, by power iterations with differences of the field, shape (n,).

    Directions are measured in units of the tolerance, and the differences are as large as the tolerance itself.
    """
    unit = tolerance.unit(y, y)
    unit = torch.where(torch.isfinite(unit), unit, y.abs() + 1)
    unit = torch.maximum(unit, torch.finfo(y.dtype).eps ** 0.5 * y.abs())
    f = dynamics(t, y)
    # A direction without symmetry, and what the solution does itself.
    start = torch.cos(1.0 + torch.arange(y.shape[1], dtype=y.dtype, device=y.device))
    v = _normed(start + _normed(f / unit))
    sizes, quotients = [], []
    for _ in range(N_ITERATIONS):
        w = (dynamics(t, y + v * unit) - f) / unit
        sizes.append(torch.linalg.vector_norm(w, dim=1))
        quotients.append((v * w).sum(dim=1))
        v = _normed(w)
    # Of complex eigenvalues the sizes go round: their geometric mean does not.
    late = torch.stack(sizes[N_ITERATIONS // 2 :]).clamp(min=torch.finfo(y.dtype).tiny)
    return late.log().mean(dim=0).exp(), torch.stack(quotients[N_ITERATIONS // 2 :]).mean(dim=0)


def _normed(v: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(size > 0, v / size, v)
