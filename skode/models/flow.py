"""A continuous normalizing flow: a field that carries a base distribution, at t = 0, to the data, at t = 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skode.exceptions import SolverError
from skode.fields import FlowField, PlanarField, traced
from skode.models.bases import Base
from skode.models.odenet import SolverOptions
from skode.solver import Solution, solve


class Densities(NamedTuple):
    """Log-densities in nats and, on request, squared solver errors and penalties, all (n,); the base's points (n, d).

    ``penalty`` is the weighted sum of the way's mean kinetic energy and mean squared Jacobian; ``n_evals`` the field's
    evaluations a row.
    """

    log_density: Tensor
    error: Tensor | None
    penalty: Tensor | None
    z: Tensor
    n_evals: float
    next_step: float


@dataclass(frozen=True)
class TrainingPass:
    """What a pass in training wants beside densities.

    Parameters
    ----------
    first_step : float, optional
        That the solver tries.
    error : bool
        Whether squared solver errors are wanted.
    energy, jacobian : float
        Weights of the kinetic energy and of the Jacobian's squared norm (Finlay et al. 2020, arXiv:2002.02798).
    divergence : {"auto", "exact", "hutchinson"}
    probe : tensor of shape (n, d), optional
        For "hutchinson", and for the Jacobian's norm.
    """

    first_step: float | None = None
    error: bool = False
    energy: float = 0.0
    jacobian: float = 0.0
    divergence: str = "auto"
    probe: Tensor | None = None

    @property
    def n_integrals(self) -> int:
        """The divergence and the penalties."""
        return 1 + int(self.energy > 0) + int(self.jacobian > 0)


class ContinuousFlow(nn.Module):
    """The instantaneous change of variables (Chen et al. 2018, section 4, eq. 8) between a base and data.

    Parameters
    ----------
    field : module
        As :func:`skode.fields.traced` takes it.
    base : Base
    """

    def __init__(self, field: nn.Module, base: Base) -> None:
        super().__init__()
        self.field, self.base = field, base

    def densities(
        self,
        x: Tensor,
        options: SolverOptions,
        *,
        training: TrainingPass | None = None,
        context: Tensor | None = None,
    ) -> Densities:
        """Log-densities of ``x (n, d)``, from the data back to the base; in training by one step for all rows."""
        if training is None and self._stands_still():
            log_density, z = self._where_it_stands(x)
            return Densities(log_density, None, None, z, 0.0, 1.0)
        solution = self.solution(x, [1.0, 0.0], options, training=training, context=context)
        z, integrals = solution.y1, solution.quadratures
        assert integrals is not None
        penalty = None
        if training is not None and training.n_integrals > 1:
            weights = [weight for weight in (training.energy, training.jacobian) if weight > 0]
            # Time runs backwards, and so do the integrals.
            penalty = -(integrals[:, -1, 1:] * integrals.new_tensor(weights)).sum(dim=1)
        return Densities(
            self.base.log_density(z) + integrals[:, -1, 0],
            solution.error_estimate,
            penalty,
            z,
            float(solution.n_evals.double().mean()) if len(x) else 0.0,
            solution.next_step,
        )

    def drawn(self, z: Tensor, options: SolverOptions, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The data (n, d) of points ``z`` of the base, and their log-densities (n,)."""
        if self._stands_still():
            log_density, x = self._where_it_stands(z)
            return x, log_density
        solution = self.solution(z, [0.0, 1.0], options, context=context)
        assert solution.quadratures is not None
        return solution.y1, self.base.log_density(z) - solution.quadratures[:, -1, 0]

    def _stands_still(self) -> bool:
        """Whether the field is 0 everywhere, as where a mixture was kept as it is: there is nothing to solve."""
        return not torch.is_grad_enabled() and isinstance(self.field, FlowField) and self.field.is_zero()

    def _where_it_stands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities of points that stay, and they; NaN for those beyond the numbers, which no solve would reach."""
        x = torch.where(x.isfinite().all(dim=1, keepdim=True), x, torch.nan)
        return self.base.log_density(x), x

    def solution(
        self,
        y: Tensor,
        times: list[float],
        options: SolverOptions,
        *,
        training: TrainingPass | None = None,
        context: Tensor | None = None,
    ) -> Solution:
        """The solver's account of the way of ``y (n, d)`` from the first of two times to the second."""
        wanted = training or TrainingPass()
        # A planar field's units are computed once for rows that share their times; its velocity is bounded, so that
        # with fixed steps no row can have a say in another's result.
        shared = isinstance(self.field, PlanarField) and options.step_size is not None
        solution = solve(
            traced(
                self.field,
                y.shape[1],
                context,
                divergence=wanted.divergence,
                probe=wanted.probe,
                energy=wanted.energy > 0,
                jacobian=wanted.jacobian > 0,
            ),
            y,
            times,
            method=options.method,
            rtol=options.rtol,
            atol=options.atol,
            gradient=options.gradient,
            step_control="row" if training is None and not shared else "batch",
            step_size=options.step_size,
            first_step=wanted.first_step,
            max_num_steps=options.max_num_steps,
            error_estimate=wanted.error,
            n_quadratures=wanted.n_integrals,
        )
        if training is not None and not solution.success:
            raise SolverError(f"the batch's solve {next(iter(solution.failures().values())).partition(' ')[2]}")
        return solution
