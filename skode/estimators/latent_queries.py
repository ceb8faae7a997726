"""What a fitted latent ODE is asked for: predictions, samples, bounds, features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.metrics import r2_score
from sklearn.utils._set_output import _get_output_config
from torch import Tensor

from skode.estimators.containers import Container
from skode.estimators.export_series import SeriesExport
from skode.estimators.fitted_latent import Array, Forecaster
from skode.estimators.latent_inputs import series_keys
from skode.estimators.series_scaling import LONGEST
from skode.exceptions import SolverError, warn
from skode.models import Series
from skode.models.trajectories import log_bound, path_counts, prior_eta
from skode.panel import Panel
from skode.panel.checks import shown
from skode.runtime import as_array, key_uniforms, row_keys, seed_sequence, to_numpy

BOUND_SAMPLES = 64
FEWEST_SAMPLES = 32  # from which the spread between trajectories is told
HELD_OUT = 0.25  # of each series, by ``score``
KEYS_OF_BOUNDS, KEYS_OF_HOLDOUT = 1, 2


class LatentQueries(ClassNamePrefixFeaturesOutMixin, TransformerMixin, SeriesExport):
    """Predictions of a fitted latent ODE."""

    # TransformerMixin makes set_output work for a transform that its direct subclass defines, so it stands here.

    holdout: str

    # --- predictions ---

    def predict(
        self,
        X: Any,
        times: Any = None,
        horizon: Any = None,
        given: str = "all",
        return_std: bool = False,
        quantiles: Sequence[float] | None = None,
    ) -> Any:
        """Values of the channels at the rows of X or at other times; after a fit with y: the targets.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array
            Rows whose channels are all NaN are queries.
        times : sequence of times or MultiIndex, optional
            Times for all series, in their own units, or an index (series, time) with a row for each query.
        horizon : sequence of offsets, optional
            Times past each series' last observation.
        given : {"all", "past"}, default="all"
            What of a series is used: all observations, or those before the time of each prediction.
        return_std : bool, default=False
            Also the standard deviations of observations, their noise included.
        quantiles : sequence of float, optional
            Probabilities at which quantiles of observations are wanted instead of means.

        Returns
        -------
        In X's own container, order and index without ``times`` and ``horizon``; an array (n_series, n_times,
        n_channels) for shared times and for horizons; a DataFrame for an index. With ``quantiles`` arrays have one more
        axis, frames and panels columns (channel, probability). With ``return_std`` two of them. Targets: (n_series,) or
        (n_series, n_targets).

        Raises
        ------
        ValueError
            If arguments contradict each other, or the channels are not those of the fit.
        KeyError
            If the index names series that X has not.
        SolverError
            If a path cannot be solved; it names the series.
        """
        if given not in ("all", "past"):
            raise ValueError(f"given={given!r} must be 'all' or 'past'.")
        if times is not None and horizon is not None:
            raise ValueError("times and horizon cannot be given at once.")
        if return_std and quantiles is not None:
            raise ValueError("return_std and quantiles cannot be asked for at once; call predict twice.")
        container, panel = self._read_fitted(X)
        if self._target_scale is not None:
            if times is not None or horizon is not None or return_std or quantiles is not None:
                raise ValueError("this model was fitted to targets y: predict gives them, and nothing at other times.")
            return self._targets(panel)
        labels = None if quantiles is None else _probabilities(quantiles)
        query, t, shape = self._asked(container, panel, times, horizon)
        forecaster = self._forecaster(panel)
        where = torch.from_numpy(query), torch.from_numpy(t / self._fitted.scaling.time)
        moments = self._solved(panel, lambda: forecaster.moments(*where, past=given == "past"))
        predictive = forecaster.predictive(moments)
        if labels is not None:
            return shape([self._in_units(predictive.quantile(p)) for p in labels], labels)
        mean = shape([self._in_units(predictive.mean())], None)
        return (mean, shape([self._in_units(predictive.std(), shift=False)], None)) if return_std else mean

    def _asked(
        self, container: Container, panel: Panel, times: Any, horizon: Any
    ) -> tuple[NDArray[np.int64], Array, Callable[[list[Array], Any], Any]]:
        """Series and times (Q,), in the panel's unit, and how to shape values (Q, n_channels) that were found."""
        if times is None and horizon is None:
            return panel.series, panel.times, container.restored
        wanted = panel.queries(times) if horizon is None else panel.queries(horizon, since="last")
        columns = list(self._all_columns)

        def shape(parts: list[Array], labels: Any) -> Any:
            table = parts[0] if labels is None else np.stack(parts, axis=2)
            if wanted.n_shared is not None:
                return table.reshape(len(panel), wanted.n_shared, *table.shape[1:])
            names: Any = columns
            if labels is not None:
                names = pd.MultiIndex.from_product([columns, labels])
            return pd.DataFrame(table.reshape(len(table), -1), wanted.index, names)

        return wanted.series, wanted.times, shape

    def _in_units(self, values: Tensor, *, shift: bool = True) -> Array:
        """In the units of X, for all of its channels: NaN for those that were never observed in the fit."""
        scaling = self._fitted.scaling
        found = to_numpy(values.detach()) * scaling.scale + (scaling.centre if shift else 0.0)
        out = np.full((*found.shape[:-1], len(self._all_columns)), np.nan)
        out[..., self._channels] = found
        return out

    def _solved(self, panel: Panel, function: Callable[[], Any]) -> Any:
        """What the function gives; its failure names the series.

        Raises
        ------
        SolverError
        """
        try:
            with torch.no_grad():
                return function()
        except SolverError as error:
            names = [panel.ids[row] for row in error.rows if row < len(panel)]
            told = f"series {shown(names[0])} and {len(names) - 1} others" if names else "some series"
            raise SolverError(f"{told} cannot be solved: {error}; raise max_num_steps or rtol.", error.rows) from error

    def _targets(self, panel: Panel) -> Array:
        assert self._target_scale is not None
        forecaster = self._forecaster(panel)
        with torch.no_grad():
            found = to_numpy(forecaster.model.targets(forecaster.seen))
        out: Array = found * self._target_scale[1] + self._target_scale[0]
        return out[:, 0] if self._one_dimensional else out

    # --- samples ---

    def sample(
        self, X: Any = None, times: Any = None, n_samples: int = 1, random_state: Any = None, noise: bool = True
    ) -> Array:
        """Trajectories of the channels, given each series' observations; without X of series never seen.

        How trajectories move in time is that of the latent state's posterior; how far they are apart is calibrated as
        for the standard deviations of ``predict``. Draws depend on a series' content and on the time alone.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array, optional
        times : sequence of times or MultiIndex, optional
            As for ``predict``; the rows of X by default. Without X: numbers since the origin, in the panel's unit.
        n_samples : int, default=1
        random_state : int, RandomState, Generator or None
        noise : bool, default=True
            Whether observations are drawn, rather than what they are noisy versions of.

        Returns
        -------
        array of shape (n_samples, n_series, n_times, n_channels) for shared times, (n_samples, n_queries, n_channels)
        for an index and for the rows of X in its own order, n_samples times X's shape for arrays, (n_samples, n_times,
        n_channels) without X
        """
        if not isinstance(n_samples, Integral) or n_samples < 0:
            raise ValueError(f"n_samples must be a whole number, 0 or more, got {n_samples!r}.")
        seed = int(seed_sequence(random_state).generate_state(1)[0])
        if X is None:
            return self._sample_prior(times, int(n_samples), seed, noise)
        container, panel = self._read_fitted(X)
        query, t, _ = self._asked(container, panel, times, None)
        forecaster = self._forecaster(panel)
        keys = series_keys(panel, seed)
        eps = _normals(keys, max(int(n_samples), FEWEST_SAMPLES), forecaster.model.n_dims)
        where = torch.from_numpy(query), torch.from_numpy(t / self._fitted.scaling.time)
        eta = self._solved(panel, lambda: forecaster.trajectories(*where, eps))[: int(n_samples)]
        of_row = row_keys(np.column_stack([_halves(keys[query]), t]), seed)
        found = self._in_units(self._drawn(forecaster, eta, forecaster.lie_ahead(*where), of_row, noise))
        if times is not None:
            shared = not isinstance(times, pd.MultiIndex)
            n_times = len(query) // max(len(panel), 1)
            return found.reshape(len(found), len(panel), n_times, found.shape[2]) if shared else found
        return self._samples_like(container, found)

    def _samples_like(self, container: Container, found: Array) -> Array:
        """Samples of the rows of X, in its own order."""
        if container.kind in ("dense", "wide"):
            shape = container.panel.with_values(np.zeros_like(container.panel.values)).to_dense().shape
            like = [np.asarray(container.restored([sample])) for sample in found]
            empty = np.empty((0, *(shape[:2] if container.kind == "wide" else shape)))
            return np.stack(like) if like else empty
        place = np.arange(len(container.panel.times), dtype=np.float64)[:, None]
        order = container.panel.with_values(place, ["_place"]).to_long()["_place"].to_numpy().astype(np.int64)
        return found[:, order]

    def _sample_prior(self, times: Any, n_samples: int, seed: int, noise: bool) -> Array:
        if times is None:
            raise ValueError("samples of series never seen need times.")
        t = np.asarray(times, dtype=np.float64)
        if t.ndim != 1 or not np.isfinite(t).all() or not len(t):
            raise ValueError("times must be finite numbers since the origin, one or more.")
        config = self._fitted.config
        if config.n_covariates or config.n_static:
            raise ValueError("series never seen have no covariates; give X with queries instead.")
        order = np.argsort(t, kind="stable")
        offsets = torch.arange(n_samples + 1) * len(t)
        forecaster = self._forecaster_of(offsets, np.tile(t[order], n_samples))
        keys = row_keys(np.arange(n_samples, dtype=np.float64)[:, None], seed)
        eps = _normals(keys, 1, forecaster.model.n_dims)[:, 0]
        asked = forecaster.series
        with torch.no_grad():
            eta = prior_eta(
                forecaster.model,
                forecaster.prior,
                offsets,
                asked.times,
                asked.static,
                forecaster.inputs,
                forecaster.solver,
                eps,
            )
        of_row = row_keys(np.column_stack([_halves(np.repeat(keys, len(t))), np.tile(t[order], n_samples)]), seed)
        never = torch.zeros(eta.shape[0], dtype=torch.bool)
        found = self._in_units(self._drawn(forecaster, eta[None], never, of_row, noise))[0]
        out = np.empty((n_samples, len(t), found.shape[-1]))
        out[:, order] = found.reshape(n_samples, len(t), -1)
        return out

    def _forecaster_of(self, offsets: Tensor, t: Array) -> Forecaster:
        """For series without observations."""
        n_channels = len(self._fitted.config.families)
        scaled = torch.from_numpy(t / self._fitted.scaling.time)
        empty = torch.full((len(t), n_channels), torch.nan, dtype=torch.float64)
        series = Series.of(offsets, scaled, empty, clock=self._fitted.config.clock)
        return Forecaster(self._fitted, series, torch.device("cpu"), self._solver())

    @staticmethod
    def _drawn(forecaster: Forecaster, eta: Tensor, ahead: Tensor, keys: NDArray[np.uint64], noise: bool) -> Tensor:
        """Observations around trajectories (n_samples, Q, n_channels), some (Q,) ahead, or their expectations."""
        n, q, c = eta.shape
        flat = eta.reshape(n * q, c)
        predictive = forecaster.around(flat, ahead.repeat(n))
        if not noise:
            return predictive.mean().view(n, q, c)
        u = key_uniforms(keys, 2 * n * c).reshape(q, n, c, 2).swapaxes(0, 1).reshape(n * q, c, 2)
        return predictive.drawn(torch.from_numpy(np.ascontiguousarray(u)).to(flat)).view(n, q, c)

    # --- likelihoods ---

    def score_samples(self, X: Any) -> Array:
        """A lower bound of each series' log-likelihood, in nats and the units of X.

        The importance-weighted bound of 64 samples [1]_: summed over the observations of a series, and over their times
        if the model is of a point process. A series without observations has 0.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array

        Returns
        -------
        array of shape (n_series,)

        References
        ----------
        .. [1] Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, arXiv:1509.00519.
        """
        _, panel = self._read_fitted(X)
        forecaster, config = self._forecaster(panel), self._fitted.config
        keys = series_keys(panel, KEYS_OF_BOUNDS)
        eps = _normals(keys, BOUND_SAMPLES, forecaster.model.n_dims).transpose(0, 1)
        ends = self._windows(panel, self._fitted.scaling.time)
        windows = None if ends is None else torch.from_numpy(ends)
        bound = self._solved(
            panel,
            lambda: log_bound(
                forecaster.model,
                forecaster.prior,
                forecaster.seen,
                forecaster.inputs,
                eps,
                forecaster.solver,
                LONGEST,
                windows,
            ),
        )
        seen = ~np.isnan(panel.values)
        scales = np.bincount(panel.series, seen @ self._fitted.scaling.log_scale, minlength=len(panel))
        if config.point_process:
            events = np.bincount(panel.series, seen.any(axis=1) if panel.columns else None, minlength=len(panel))
            scales = scales + events * math.log(self._fitted.scaling.time)
        found: Array = to_numpy(bound) - scales
        return found

    def intensity(self, X: Any, times: Any = None) -> Array:
        """The rate of events at times, per unit of the panel's time; for ``point_process=True``.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array
        times : sequence of times or MultiIndex, optional
            As for ``predict``; the rows of X by default.

        Returns
        -------
        array of shape (n_series, n_times) for shared times, else (n_queries,)
        """
        container, panel = self._read_fitted(X)
        if not self._fitted.config.point_process:
            raise ValueError("intensity needs a fit with point_process=True.")
        query, t, _ = self._asked(container, panel, times, None)
        forecaster = self._forecaster(panel)
        where = torch.from_numpy(query), torch.from_numpy(t / self._fitted.scaling.time)
        rate = self._solved(panel, lambda: forecaster.rate(*where))
        found: Array = to_numpy(rate) / self._fitted.scaling.time
        shared = times is not None and not isinstance(times, pd.MultiIndex)
        return found.reshape(len(panel), -1) if shared else found

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density of held-out observations, given the rest of their series; R^2 after a fit with y.

        ``holdout="last"`` holds out the last quarter of each series' observed rows, "random" a quarter that depends on
        the series' content alone. Series of one observed row have nothing to hold out. Bare events are scored by the
        bound of their log-likelihood, an event.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array
        y : array-like of shape (n_series,) or (n_series, n_targets), optional

        Returns
        -------
        float
            In nats and the units of X.

        Warns
        -----
        UserWarning
            If series were in the training.
        """
        _, panel = self._read_fitted(X)
        if self._target_scale is not None:
            if y is None:
                raise ValueError("this model was fitted to targets; score(X, y) needs them.")
            return float(r2_score(as_array(y), self._targets(panel)))
        known = np.isin(series_keys(panel, 0), self._fitted.training_keys)
        if known.any():
            name = shown(panel.ids[int(np.flatnonzero(known)[0])])
            warn(
                f"{int(known.sum())} of the {len(panel)} series that are scored were in the training (first: "
                f"{name}); their score is too good. Split by series.",
            )
        if not panel.columns:
            return float(self.score_samples(X).sum() / max(len(panel.times), 1))
        hidden = self._hidden(panel)
        if not hidden.any():
            raise ValueError("no series has two observed rows, one of which could be held out.")
        values = np.where(hidden[:, None], np.nan, panel.values)
        forecaster = self._forecaster(panel.with_values(values))
        rows = np.flatnonzero(hidden)
        where = (
            torch.from_numpy(panel.series[rows]),
            torch.from_numpy(panel.times[rows] / self._fitted.scaling.time),
        )
        moments = self._solved(panel, lambda: forecaster.moments(*where))
        scaling, truth = self._fitted.scaling, panel.values[rows]
        scaled = torch.from_numpy((truth - scaling.centre) / scaling.scale)
        found = forecaster.predictive(moments).log_prob(torch.nan_to_num(scaled))
        log_density = to_numpy(found) - scaling.log_scale
        return float(log_density[~np.isnan(truth)].mean())

    def _hidden(self, panel: Panel) -> NDArray[np.bool_]:
        """Which rows are held out."""
        seen = ~np.isnan(panel.values).all(axis=1)
        index, n = panel.series, np.bincount(panel.series, seen, minlength=len(panel))
        count = np.where(n > 1, np.maximum(1, np.floor(HELD_OUT * n)), 0)
        if self.holdout == "last":
            place = -panel.times
        else:
            keys = series_keys(panel, KEYS_OF_HOLDOUT)
            mixed = row_keys(np.column_stack([_halves(keys[index]), panel.times]), KEYS_OF_HOLDOUT)
            place = key_uniforms(mixed, 1)[:, 0]
        order = np.lexsort((place, ~seen, index))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - panel.offsets[:-1][index[order]]
        return np.asarray(seen & (rank < count[index]))

    # --- features, costs ---

    def transform(self, X: Any) -> Any:
        """The posterior mean of each series' latent state at its first observation.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array

        Returns
        -------
        array of shape (n_series, n_dims)
            ``latent_dim`` of them, and one for each channel: its level. After ``set_output`` a frame; where rows of X
            are not series its index has the series' names.
        """
        container, panel = self._read_fitted(X)
        forecaster = self._forecaster(panel)
        seen = forecaster.seen
        every = torch.arange(seen.n_series)
        with torch.no_grad():
            near = seen.around(every, seen.first, LONGEST)
            mean = forecaster.model.encode(near, seen.first.unsqueeze(1)).mean[:, 0]
        found: Array = to_numpy(torch.where((seen.lengths > 0).unsqueeze(1), mean, forecaster.prior.mean))
        if container.kind in ("dense", "wide") or _get_output_config("transform", self)["dense"] != "pandas":
            return found
        return pd.DataFrame(found, pd.Index(panel.ids))

    def solver_stats(self, X: Any) -> pd.DataFrame:
        """What the solver did on each series' path from its last observation back to the first and on to its last row.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array

        Returns
        -------
        DataFrame
            One row per series: ``n_evals, n_steps, n_rejected`` and ``status`` (0 is success, see
            :class:`skode.solver.Status`). It never raises for a failed solve.
        """
        container, panel = self._read_fitted(X)
        found = self._path_stats(self._forecaster(panel))
        given = container.given
        index = given.index if container.kind == "wide" and isinstance(given, pd.DataFrame) else pd.Index(panel.ids)
        return pd.DataFrame(found, index, ["n_evals", "n_steps", "n_rejected", "status"])

    def _path_stats(self, forecaster: Forecaster) -> NDArray[np.int64]:
        counts = path_counts(
            forecaster.model, forecaster.seen, forecaster.series.last, forecaster.inputs, forecaster.solver, LONGEST
        )
        return np.asarray(to_numpy(counts))

    def _mean_evaluations(self, series: Series) -> float:
        forecaster = Forecaster(self._fitted, series, series.times.device, self._solver())
        return float(self._path_stats(forecaster)[:, 0].mean())


def _probabilities(quantiles: Sequence[float]) -> list[float]:
    found = np.asarray(quantiles, dtype=np.float64)
    if found.ndim != 1 or not ((found > 0) & (found < 1)).all():
        raise ValueError(f"quantiles must be probabilities between 0 and 1, a list of them; got {quantiles!r}.")
    return [float(p) for p in found]


def _halves(keys: NDArray[np.uint64]) -> Array:
    """Keys as two columns of numbers that lose no bit."""
    low = keys & np.uint64(0xFFFFFFFF)
    return np.column_stack([(keys >> np.uint64(32)).astype(np.float64), low.astype(np.float64)])


def _normals(keys: NDArray[np.uint64], n_samples: int, d: int) -> Tensor:
    """Standard normal numbers (n_series, n_samples, d)."""
    u = torch.from_numpy(key_uniforms(keys, n_samples * d).reshape(len(keys), n_samples, d))
    normal: Tensor = torch.special.ndtri(u)
    return normal
