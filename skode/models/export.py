"""Fitted models as plain modules, from raw X to predictions, for people who go on in torch.

They take rows in the units of the training data, in the dtype of their own parameters, and gradients reach inputs and
parameters. With a fixed-step method ``torch.export`` and ONNX take them, with any number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from skode.exceptions import SolverError
from skode.fields import traced
from skode.models.bases import Base
from skode.models.flow import ContinuousFlow
from skode.models.odenet import ODENet, SolverOptions
from skode.solver import Solution, solve


def refuse_failures(solution: Solution, n_rows: int) -> None:
    """Raise if a row was not solved; compiled programs cannot ask and give NaN.

    Raises
    ------
    SolverError
        It names the rows.
    """
    if solution.success:
        return
    rows = sorted({int(i) % n_rows for i in torch.nonzero(solution.status)})
    message = next(iter(solution.failures().values())).partition(" ")[2].partition(" ")[2]
    raise SolverError(
        f"the ODE could not be solved for {len(rows)} rows (first: row {rows[0]}, which {message}).", rows
    )


class NetModule(nn.Module):
    """An ODE network and the solver of its predictions.

    Parameters
    ----------
    net : ODENet
    solver : SolverOptions
    """

    def __init__(self, net: ODENet, solver: SolverOptions) -> None:
        super().__init__()
        self.net, self.solver = net, solver

    def members(self, X: Tensor) -> Tensor:
        """Outputs (n_members, n, n_outputs) of rows (n, n_features)."""
        solution = self.net.solve_rows(X, self.solver)
        refuse_failures(solution, X.shape[0])
        return self.net.read_out(solution.y1)


class ClassifierModule(NetModule):
    """Probabilities of the classes, as ``ODENetClassifier.predict_proba``."""

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, n_features) to probabilities (n, n_classes)."""
        return self.members(X).softmax(dim=-1).mean(dim=0)


class RegressorModule(NetModule):
    """Targets in their own units, as ``ODENetRegressor.predict``.

    Parameters
    ----------
    net : ODENet
    solver : SolverOptions
    mean, scale : tensors of shape (n_targets,)
        Of the targets.
    one_dimensional : bool
        Whether the axis of targets is left out.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, net: ODENet, solver: SolverOptions, mean: Tensor, scale: Tensor, *, one_dimensional: bool
    ) -> None:
        super().__init__(net, solver)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.one_dimensional = one_dimensional

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, n_features) to targets (n,) or (n, n_targets)."""
        targets = self.members(X).mean(dim=0) * self.scale + self.mean
        return targets[:, 0] if self.one_dimensional else targets


class FlowModule(nn.Module):
    """A continuous flow whose base moves with it.

    Parameters
    ----------
    flow : ContinuousFlow
    """

    def __init__(self, flow: ContinuousFlow) -> None:
        super().__init__()
        self.field, self._base = flow.field, type(flow.base)
        self._names = [field.name for field in fields(flow.base)]
        for name in self._names:
            self.register_buffer(name, getattr(flow.base, name).clone())

    @property
    def base(self) -> Base:
        """The base distribution, of the buffers."""
        return self._base(*(getattr(self, name) for name in self._names))

    def log_density(self, z: Tensor, solver: SolverOptions, context: Tensor | None = None) -> Tensor:
        """Of standardised rows (n, d) under their contexts."""
        start, integral = self.carried(z, [1.0, 0.0], solver, context)
        return self.base.log_density(start) + integral

    def carried(
        self, y: Tensor, times: list[float], solver: SolverOptions, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where rows (n, d) come to on the way between two times, and the divergence's integral (n,)."""
        if torch.compiler.is_compiling():
            return self._compiled(y, times, solver, context)
        solution = ContinuousFlow(self.field, self.base).solution(y, times, solver, context=context)
        refuse_failures(solution, y.shape[0])
        assert solution.quadratures is not None
        return solution.y1, solution.quadratures[:, -1, 0]

    def _compiled(
        self, y: Tensor, times: list[float], solver: SolverOptions, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The integral as one more component of the state: compilers see through solves without quadratures."""
        d = y.shape[1]
        dynamics = traced(self.field, d, context)
        solution = solve(
            lambda t, state: dynamics(t, state[:, :d]),
            nn.functional.pad(y, (0, 1)),
            times,
            method=solver.method,
            step_size=solver.step_size,
        )
        return solution.y1[:, :d], solution.y1[:, d]


class FlowsModule(nn.Module):
    """The average of some flows.

    Parameters
    ----------
    flows : sequence of ContinuousFlow
        Without any the log-density is 0: there is nothing to be carried.
    ladder : sequence of (SolverOptions, SolverOptions)
        Solvers of log-densities, each with a stricter one that tells its errors; a row takes the first that is exact
        enough for it. A single one is taken as it is.
    tolerance, floor : float
        The error in nats that is allowed, and what is added to errors.
    """

    def __init__(
        self,
        flows: Sequence[ContinuousFlow],
        ladder: Sequence[tuple[SolverOptions, SolverOptions]],
        tolerance: float,
        floor: float,
    ) -> None:
        super().__init__()
        self.flows = nn.ModuleList(FlowModule(flow) for flow in flows)
        self._ladder, self._tolerance, self._floor = tuple(ladder), tolerance, floor

    def log_density(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Of standardised rows (n, d) under their contexts."""
        if not len(self.flows):
            return z.new_zeros(z.shape[0])
        each = [self._of_one(flow, z, context) for flow in self.flows]
        return torch.stack(each).logsumexp(dim=0) - math.log(len(each))

    def _of_one(self, flow: Any, z: Tensor, context: Tensor | None) -> Tensor:
        if len(self._ladder) == 1:
            return flow.log_density(z, self._ladder[0][0], context)  # type: ignore[no-any-return]
        rung, out = self._rungs(flow, z, context), z.new_zeros(z.shape[0])
        for i in rung.unique().tolist():
            rows = torch.nonzero(rung == i).view(-1)
            found = flow.log_density(z[rows], self._ladder[i][0], None if context is None else context[rows])
            out = out.index_copy(0, rows, found)
        return out

    @torch.no_grad()
    def _rungs(self, flow: Any, z: Tensor, context: Tensor | None) -> Tensor:
        """Which solver each row takes."""
        rung = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        rows = torch.arange(len(z), device=z.device)
        for pair in self._ladder[:-1]:
            some = None if context is None else context[rows]
            found, check = (flow.log_density(z[rows], solver, some) for solver in pair)
            error = 2 * (found - check).abs() + self._floor
            rows = rows[~(error <= self._tolerance)]
            rung[rows] += 1
            if not len(rows):
                break
        return rung
