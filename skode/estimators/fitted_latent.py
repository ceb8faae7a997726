"""What a fit of LatentODERegressor leaves behind, and what is predicted with it in the model's own units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.estimators.series_scaling import LONGEST, SeriesScaling
from skode.estimators.stored import stored
from skode.models import HeldInputs, LatentConfig, LatentODE, Rows, Series, SolverOptions
from skode.models.forecast import ForecastOptions, corrected
from skode.models.predictive import Calibration, Predictive
from skode.models.trajectories import Prior, middle, posterior_eta
from skode.runtime import to_numpy
from skode.training.calibration import distances
from skode.training.windows import HeldOut, observed

Array = NDArray[np.float64]
FARTHEST_BACK = 2.0  # median spans before the first observation; what is predicted before that stays the same
CLONED_ROWS = 200_000  # rows of the pasts of queries that are held at a time


@stored
class FittedLatent(NamedTuple):
    """Configuration and NumPy arrays, nothing of torch.

    ``stride`` is how far forecasts hop; ``marginal`` (2, n_channels) has the channels' means and variances in the
    model's units; ``training_keys`` tell the series of the fit by their content; further training would take
    ``steps_per_unit`` of time.
    """

    config: LatentConfig
    arrays: dict[str, NDArray[Any]]
    scaling: SeriesScaling
    prior: tuple[Array, Array]
    marginal: Array
    stride: float | None
    calibration: Calibration
    training_keys: NDArray[np.uint64]
    steps_per_unit: float = 4.0

    def build(self, dtype: torch.dtype, device: torch.device) -> LatentODE:
        """The torch module."""
        model = LatentODE(self.config, torch.Generator().manual_seed(0))
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.arrays.items()})
        return model.to(dtype).to(device)


def arrays_of(model: LatentODE) -> dict[str, NDArray[Any]]:
    """What a trained module holds."""
    return {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}


def in_double(task: HeldOut) -> HeldOut:
    """What was held out, in float64."""
    given, target = (part.to(dtype=torch.float64) for part in (task.given, task.target))
    inputs = task.inputs
    if inputs is not None:
        inputs = HeldInputs.of(inputs.series.to(dtype=torch.float64))
    return HeldOut(given, target, inputs)


def marginal(series: Series) -> Array:
    """Means and variances (2, n_channels) of the observations."""
    n = series.mask.sum(dim=0).clamp(min=1)
    mean = series.values.sum(dim=0) / n
    variance = (torch.where(series.mask, series.values - mean, 0.0).square().sum(dim=0)) / n
    found: Array = np.stack([to_numpy(mean), to_numpy(variance)]).astype(np.float64)
    return found


class Moments(NamedTuple):
    """The decoder's values at queries and how far they may be off, (Q, n_channels), degrees of freedom of that (Q,)."""

    eta: Tensor
    spread: Tensor
    degrees: Tensor


class Forecaster:
    """A fitted model on some series.

    Parameters
    ----------
    fitted : FittedLatent
    series : Series
        All rows, queries and known inputs among them.
    device : torch.device
    solver : SolverOptions
    model : LatentODE, optional
        With its weights, if there is one already.
    """

    def __init__(
        self,
        fitted: FittedLatent,
        series: Series,
        device: torch.device,
        solver: SolverOptions,
        model: LatentODE | None = None,
    ) -> None:
        self.model = fitted.build(torch.float64, device).eval() if model is None else model
        self.series, self.seen, self.solver, self._fitted = series, observed(series), solver, fitted
        self.inputs = HeldInputs.of(series)
        self._options = ForecastOptions(solver, fitted.stride, LONGEST)

    @property
    def prior(self) -> Prior:
        """Of the state in the middle of a series."""
        mean, factor = (torch.from_numpy(part).to(self.series.values) for part in self._fitted.prior)
        return Prior(mean, factor)

    def moments(self, query: Tensor, t: Tensor, *, past: bool = False) -> Moments:
        """What is predicted at queries.

        With ``past`` only what was observed before each query's time is used.
        """
        if not past:
            return self._read(self.seen, query, t, self.inputs)
        parts = []
        count = self.seen.count_until(query, t, inclusive=False)
        for some in _portions(count):
            ids, own = query[some], count[some]
            start = self.seen.offsets[ids] + (own - 2 * LONGEST).clamp(min=0)
            clones = self.seen.stretch(ids, start, own.clamp(max=2 * LONGEST))
            every = torch.arange(len(ids), device=ids.device)
            inputs = None if self.inputs is None else HeldInputs(self.series.take(ids))
            parts.append(self._read(clones, every, t[some], inputs))
        if not parts:
            return self._read(self.seen, query, t, self.inputs)
        return Moments(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _read(self, seen: Series, query: Tensor, t: Tensor, inputs: HeldInputs | None) -> Moments:
        eta, spread = self._unread(len(t))
        degrees = self._fitted.calibration.degrees_of(torch.zeros(len(t), dtype=torch.bool)).to(eta)
        known = torch.nonzero((seen.lengths > 0)[query]).view(-1)
        query, t = query[known], t[known]
        calibration, then = self._fitted.calibration, _not_too_early(seen, query, t)
        found = corrected(self.model, seen, query, then, inputs, self._options, calibration.kernels)
        ahead = t > seen.last[query]
        off = calibration.spread(found.disagreement, distances(seen, query, t), ahead)
        eta[known], spread[known], degrees[known] = found.eta, off, calibration.degrees_of(ahead.cpu()).to(eta)
        return Moments(eta, spread, degrees)

    def _unread(self, n: int) -> tuple[Tensor, Tensor]:
        """Of series without any observation: the channels' own distributions."""
        mean, variance = (torch.from_numpy(part).to(self.series.values) for part in self._fitted.marginal)
        noise = self.model.likelihood.scale.detach() * torch.as_tensor(self._fitted.calibration.noise).to(mean)
        eta, spread = mean.clone(), (variance - noise.square()).clamp(min=0).sqrt()
        for i, family in enumerate(self.model.config.families):
            if family == "bernoulli":
                eta[i], spread[i] = torch.logit(mean[i], eps=1e-6), 0.0
            elif family == "poisson":
                eta[i], spread[i] = mean[i].clamp(min=1e-6).log(), 0.0
        return eta.repeat(n, 1), spread.repeat(n, 1)

    def predictive(self, moments: Moments) -> Predictive:
        """The distributions of observations."""
        noise = self._fitted.calibration.noise
        return Predictive(self.model.likelihood, moments.eta.detach(), moments.spread, noise, moments.degrees)

    def lie_ahead(self, query: Tensor, t: Tensor) -> Tensor:
        """Which queries (Q,) are later than all that was observed of their series."""
        return (t > self.seen.last[query]) & (self.seen.lengths > 0)[query]

    def around(self, eta: Tensor, ahead: Tensor) -> Predictive:
        """The distributions of observations around trajectories (n, n_channels), some of them (n,) ahead."""
        degrees = self._fitted.calibration.degrees_of(ahead.cpu()).to(eta)
        return self.predictive(Moments(eta, torch.zeros_like(eta), degrees))

    def trajectories(self, query: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The decoder's values along samples (n_samples, Q, n_channels) of normal ``eps (n_series, n_samples, d)``."""
        eta, spread, _ = self.moments(query, t)
        known = torch.nonzero((self.seen.lengths > 0)[query]).view(-1)
        out = eta.repeat(eps.shape[1], 1, 1)
        if not len(known):
            return out
        out[:, known] = posterior_eta(
            self.model,
            self.seen,
            query[known],
            _not_too_early(self.seen, query[known], t[known]),
            self.inputs,
            eta[known],
            spread[known],
            eps,
            self.solver,
            LONGEST,
        )
        return out

    def rate(self, query: Tensor, t: Tensor) -> Tensor:
        """The rate of events at queries, per unit of time, along the path through the middle of each series."""
        seen = self.seen
        every, place = torch.arange(seen.n_series, device=t.device), middle(seen)
        mean = self.model.encode(seen.around(every, place, LONGEST), place.unsqueeze(1)).mean[:, 0]
        rows = Rows(mean, place, every)
        known = None if self.inputs is None else self.inputs.at(query, t)
        return self.model.field.rate(self.model.exact_path(rows, query, t, self.inputs, self.solver).z, known)


def _not_too_early(seen: Series, query: Tensor, t: Tensor) -> Tensor:
    """Times, those long before a series' first observation put off: what is damped in time grows without bound back."""
    return torch.maximum(t, seen.first[query] - FARTHEST_BACK)


def _portions(count: Tensor) -> Iterator[Tensor]:
    """Numbers of queries whose pasts, of ``count`` rows, make up a portion."""
    rows = count.clamp(max=2 * LONGEST).cumsum(0) // CLONED_ROWS
    for portion in torch.unique(rows).tolist():
        yield torch.nonzero(rows == portion).view(-1)
