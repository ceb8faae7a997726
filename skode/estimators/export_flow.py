"""``to_torch`` of flows: from raw rows to log-densities and conditional means."""

from __future__ import annotations

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skode.estimators.export import CPU, chosen_solver
from skode.estimators.fitted_flow import CHECK, FLOOR, LOOSEST, SCORE_ERROR, exact_solver, shared_solver
from skode.estimators.flow_base import CELL_POINTS, BaseFlow
from skode.estimators.location import FARTHEST, Location
from skode.estimators.table_module import TableModule
from skode.models import SolverOptions
from skode.models.export import FlowsModule, NetModule

RUNGS = 6  # of tolerances of log-densities, each a tenth of the one before
POINTS = 64  # of a member's distribution of a single target; of several targets more
POINTS_OF_MANY = 256
POINT_TOLERANCE = 0.1  # of rtol and atol: points are to 1e-3 of the residuals' spread by default


class DensityModule(nn.Module):
    """Log-densities of rows, as ``ContinuousFlowDensity.score_samples``.

    Parameters
    ----------
    table : TableModule
    flows : FlowsModule
    """

    def __init__(self, table: TableModule, flows: FlowsModule) -> None:
        super().__init__()
        self.table, self.flows = table, flows

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, n_features) to log-densities (n,), in nats and the units of X."""
        places = self.table.places(X)
        found = self.flows.log_density(places.flatten(0, 1))
        return self.table.log_density(X, found.view(places.shape[0], -1))


class ConditionalDensityModule(nn.Module):
    """Conditional means and log-densities, as ``ContinuousFlowRegressor.predict`` and its ``score_samples``.

    Parameters
    ----------
    location : Location
    mean : module, optional
        Of the standardised targets; they are 0 without.
    table : TableModule
        Of the targets.
    flows : FlowsModule
    n_points : int
        Of each flow, whose mean is the predicted one.
    solver : SolverOptions
        Of these points.
    one_dimensional : bool
        Whether the axis of targets is left out.
    """

    residual_scale: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(
        self,
        location: Location,
        mean: NetModule | None,
        table: TableModule,
        flows: FlowsModule,
        n_points: int,
        solver: SolverOptions,
        *,
        one_dimensional: bool,
    ) -> None:
        super().__init__()
        self.mean, self.table, self.flows = mean, table, flows
        for name in ("residual_scale", "context_mean", "context_scale"):
            self.register_buffer(name, torch.tensor(getattr(location, name)))
        self.solver, self.one_dimensional = solver, one_dimensional
        for i, flow in enumerate(flows.flows):
            self.register_buffer(f"points_{i}", flow.base.points(n_points))  # type: ignore[union-attr, operator]

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, n_features) to means (n,) or (n, n_targets)."""
        predicted, context = self._prepared(X)
        n, d = predicted.shape
        members = [predicted.unsqueeze(1)] if not len(self.flows.flows) else []
        for i, flow in enumerate(self.flows.flows):
            points: Tensor = getattr(self, f"points_{i}")
            k = len(points)
            start, given = points.repeat(n, 1), context.repeat_interleave(k, dim=0)
            drawn, _ = flow.carried(start, [0.0, 1.0], self.solver, given)  # type: ignore[operator]
            members.append(predicted.unsqueeze(1) + (drawn * self.residual_scale).view(n, k, d))
        means = torch.stack([self.table.restore(Z.flatten(0, 1)).view(n, Z.shape[1], -1).mean(dim=1) for Z in members])
        found = means.mean(dim=0)
        return found[:, 0] if self.one_dimensional else found

    def log_density(self, X: Tensor, y: Tensor) -> Tensor:
        """Log-densities (n,) of targets (n,) or (n, n_targets) given rows, in nats and the units of y."""
        predicted, context = self._prepared(X)
        Y = y.reshape(X.shape[0], -1)
        places = (self.table.places(Y) - predicted) / self.residual_scale
        found = self.flows.log_density(places.flatten(0, 1), context.repeat(places.shape[0], 1))
        return self.table.log_density(Y, found.view(places.shape[0], -1)) - self.residual_scale.log().sum()

    def _prepared(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the standardised targets, and contexts; see :class:`Location`."""
        d = len(self.residual_scale)
        predicted = X.new_zeros(X.shape[0], d) if self.mean is None else self.mean(X).view(X.shape[0], d)
        z = (torch.cat([X, predicted], dim=1) - self.context_mean) / self.context_scale
        return predicted, z / (1 + (z / FARTHEST).square()).sqrt()


class FlowExport(BaseFlow):
    """Modules of fitted flows, in float64."""

    def _flows_module(self, method: str | None, step_size: float | None) -> FlowsModule:
        flows = [fitted.build(torch.float64, CPU) for fitted in self._flows if fitted is not None]
        if method is not None or step_size is not None:
            fixed = chosen_solver(self._solver("dopri5", LOOSEST, LOOSEST / 10), method, step_size, 1.0)
            ladder = [(fixed, fixed)]
        else:
            own = shared_solver if getattr(self, "net", "mlp") == "planar" and self.field is None else exact_solver
            tolerances = [LOOSEST / 10**i for i in range(RUNGS)]
            ladder = [(own(rtol), own(rtol * CHECK)) for rtol in tolerances]
        return FlowsModule(flows, ladder, SCORE_ERROR / 2, FLOOR)

    def _table_module(self) -> TableModule:
        return TableModule(self.columns_, CELL_POINTS)


class DensityExport(FlowExport):
    """``to_torch`` of densities."""

    def to_torch(self, *, method: str | None = None, step_size: float | None = None) -> DensityModule:
        """The fitted density as a module of torch.

        Parameters
        ----------
        method : str, optional
            Solver, see :func:`skode.solver.solve`. By default every row is solved as precisely as ``score_samples``
            does it. A fixed-step method makes a module that ``torch.export`` takes.
        step_size : float, optional
            Of a fixed-step method, on the flow's way from t = 1 to 0; a tenth by default.

        Returns
        -------
        torch.nn.Module
            In evaluation mode on the CPU, with weights of its own, in float64; ``.to()`` moves it. It maps raw rows
            (n, n_features) to what ``score_samples`` gives. Gradients reach X (discrete columns have none) and the
            parameters.

        Raises
        ------
        ValueError
            If ``step_size`` is given and the method adapts its steps.

        Examples
        --------
        >>> import torch
        >>> from sklearn.datasets import make_moons
        >>> from skode import ContinuousFlowDensity
        >>> X, _ = make_moons(100, noise=0.1, random_state=0)
        >>> module = ContinuousFlowDensity(max_iter=5, random_state=0).fit(X).to_torch()
        >>> x = torch.tensor(X[:4], requires_grad=True)
        >>> torch.autograd.grad(module(x).sum(), x)[0].shape  # the score
        torch.Size([4, 2])
        """
        check_is_fitted(self)
        return DensityModule(self._table_module(), self._flows_module(method, step_size)).double().eval()


class ConditionalExport(FlowExport):
    """``to_torch`` of conditional densities."""

    _location: Location
    _one_dimensional: bool

    def to_torch(self, *, method: str | None = None, step_size: float | None = None) -> ConditionalDensityModule:
        """The fitted model as a module of torch.

        Parameters
        ----------
        method : str, optional
            Solver of networks and flows, see :func:`skode.solver.solve`. By default rows are solved as ``predict`` and
            ``score_samples`` do it.
        step_size : float, optional
            Of a fixed-step method, on the way from t = 0 to 1; a tenth by default.

        Returns
        -------
        torch.nn.Module
            In evaluation mode on the CPU, with weights of its own, in float64; ``.to()`` moves it. It maps raw rows
            (n, n_features) to the means that ``predict`` gives; its method ``log_density(X, y)`` is ``score_samples``.
            Gradients reach X, y and the parameters.

        Raises
        ------
        ValueError
            If ``step_size`` is given and the method adapts its steps.

        Examples
        --------
        >>> import numpy as np, torch
        >>> from skode import ContinuousFlowRegressor
        >>> X = np.random.default_rng(0).normal(size=(60, 2))
        >>> model = ContinuousFlowRegressor(max_iter=3, n_members=1, random_state=0).fit(X, X[:, 0])
        >>> module, rows = model.to_torch(), torch.tensor(X[:4])
        >>> module(rows).shape, module.log_density(rows, rows[:, 0]).shape
        (torch.Size([4]), torch.Size([4]))
        """
        check_is_fitted(self)
        mean = self._location.mean
        solver = self._sampling_solver(POINT_TOLERANCE)
        module = ConditionalDensityModule(
            self._location,
            None if mean is None else mean._exported(torch.float64, method, step_size),
            self._table_module(),
            self._flows_module(method, step_size),
            POINTS if self.columns_.n_kept == 1 else POINTS_OF_MANY,
            chosen_solver(solver, method, step_size, 1.0),
            one_dimensional=self._one_dimensional,
        )
        return module.double().eval()
