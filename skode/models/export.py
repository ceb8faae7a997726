"""Fitted models as plain modules, from raw X to predictions, for people who go on in torch.

They take rows in the units of the training data, in the dtype of their own parameters, and gradients reach inputs and
parameters. With a fixed-step method ``torch.export`` and ONNX take them, with any number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skode.exceptions import SolverError
from skode.models.odenet import ODENet, SolverOptions
from skode.solver import Solution


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
    raise SolverError(f"the ODE could not be solved for {len(rows)} rows (first: row {rows[0]}, which {message}).", rows)


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
