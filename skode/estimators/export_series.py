"""``to_torch`` of latent ODEs: from series on padded grids to predictions."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skode.estimators.export import CPU
from skode.estimators.fitted_latent import Array, FittedLatent, Forecaster
from skode.estimators.latent_inputs import LatentInputs
from skode.models import LatentODE, Series, SolverOptions
from skode.models.predictive import Predictive


class SeriesModule(nn.Module):
    """Predictions of series, as ``LatentODERegressor.predict`` gives them from all observations.

    Parameters
    ----------
    fitted : FittedLatent
    model : LatentODE
    solver : SolverOptions
    targets : two arrays of shape (n_targets,), optional
        Means and scales of the series' targets, for models of targets.
    one_dimensional : bool
        Whether the axis of targets is left out.
    """

    targets: Tensor
    inputs: Tensor
    static: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        fitted: FittedLatent,
        model: LatentODE,
        solver: SolverOptions,
        targets: tuple[Array, Array] | None,
        *,
        one_dimensional: bool,
    ) -> None:
        super().__init__()
        self.model, self.solver, self.one_dimensional = model, solver, one_dimensional
        self._fitted, self.of_targets = fitted, targets is not None
        self.register_buffer("targets", torch.tensor(np.empty((2, 0)) if targets is None else np.stack(targets)))
        for name in ("centre", "scale", "inputs", "static"):
            self.register_buffer(name, torch.tensor(getattr(fitted.scaling, name)))

    def forward(
        self,
        times: Tensor,
        values: Tensor,
        query_times: Tensor | None = None,
        covariates: Tensor | None = None,
        static: Tensor | None = None,
    ) -> Tensor:
        """Values of the channels at queries, or targets of the series.

        Parameters
        ----------
        times : tensor of shape (n, m)
            Ascending, since the origin, in the panel's unit (seconds for datetimes). Shorter series repeat their last
            time with NaN as values.
        values : tensor of shape (n, m, n_channels)
            Of the channels that were observed in the fit, in their units; NaN where unobserved.
        query_times : tensor of shape (n, q)
            Not for models of targets.
        covariates, static : tensors of shape (n, m, n_covariates), (n, n_static), optional
            Known inputs, needed if the fit had any; a covariate holds until the next of the times.

        Returns
        -------
        tensor of shape (n, q, n_channels); (n,) or (n, n_targets) for models of targets
        """
        series = self._series(times, values, covariates, static)
        forecaster = Forecaster(self._fitted, series, times.device, self.solver, self.model)
        if self.of_targets:
            found = self.model.targets(forecaster.seen) * self.targets[1] + self.targets[0]
            return found[:, 0] if self.one_dimensional else found
        if query_times is None:
            raise ValueError("a model of series needs query_times of shape (n_series, n_queries).")
        n, q = query_times.shape
        query = torch.arange(n, device=times.device).repeat_interleave(q)
        eta, spread, _ = forecaster.moments(query, query_times.reshape(-1) / self._fitted.scaling.time)
        noise = self._fitted.calibration.noise
        # Where two readings of a series agree the spread between them has no derivative.
        mean = Predictive(self.model.likelihood, eta, spread.detach(), noise).mean()
        return (mean * self.scale + self.centre).view(n, q, -1)

    def _series(self, times: Tensor, values: Tensor, covariates: Tensor | None, static: Tensor | None) -> Series:
        n, m = times.shape
        known = None if covariates is None else ((covariates - self.inputs[0]) / self.inputs[1]).flatten(0, 1)
        still = None if static is None else torch.nan_to_num((static - self.static[0]) / self.static[1])
        return Series.of(
            torch.arange(n + 1, device=times.device) * m,
            times.reshape(-1) / self._fitted.scaling.time,
            ((values - self.centre) / self.scale).flatten(0, 1),
            covariates=known,
            static=still,
            clock=self._fitted.config.clock,
        )


class SeriesExport(LatentInputs):
    """``to_torch`` of latent ODEs."""

    _target_scale: tuple[Array, Array] | None
    _one_dimensional: bool

    def to_torch(self) -> SeriesModule:
        """The fitted model as a module of torch.

        Returns
        -------
        torch.nn.Module
            In evaluation mode on the CPU, with weights of its own, in float64; ``.to()`` moves it. It maps
            ``(times (n, m), values (n, m, n_channels), query_times (n, q))``, and known inputs if the fit had any, to
            what ``predict`` gives at these times, (n, q, n_channels), from all observations; a model of targets maps
            times and values to them. Gradients reach values and parameters; how far apart several readings of a series
            are counts as a constant. Its solves adapt their steps to the data, so that it cannot be exported.

        Examples
        --------
        >>> import numpy as np, torch
        >>> from skode import LatentODERegressor, Panel
        >>> t = np.tile(np.linspace(0, 3, 7), (5, 1))
        >>> panel = Panel.from_dense(np.sin(t)[:, :, None], times=t, origin=0.0)
        >>> module = LatentODERegressor(max_iter=5, random_state=0).fit(panel).to_torch()
        >>> times = torch.tensor(t)
        >>> module(times, times.sin().unsqueeze(2), times[:, :2]).shape
        torch.Size([5, 2, 1])
        """
        check_is_fitted(self)
        model = self._fitted.build(torch.float64, CPU)
        module = SeriesModule(
            self._fitted, model, self._solver(), self._target_scale, one_dimensional=self._one_dimensional
        )
        return module.double().eval()
