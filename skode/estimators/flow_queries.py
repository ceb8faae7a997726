"""What a fitted density is asked for beside log-densities: samples, conditions, gradients, and the way to the base."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from skode.estimators.checks import checked_times
from skode.estimators.column_kinds import column_name
from skode.estimators.conditioning import N_FITTED, conditioned
from skode.estimators.export_flow import DensityExport
from skode.estimators.fitted_flow import (
    Array,
    FittedFlow,
    bounded_log_density,
    chunks,
    exact_solver,
    in_blocks,
    refuse_nan,
)
from skode.exceptions import ConvergenceWarning, warn
from skode.models import SolverOptions
from skode.models.flow import ContinuousFlow
from skode.runtime import as_array, seed_sequence, torch_generator

GRADIENT_TOLERANCE = 1e-6


class FlowQueries(DensityExport):
    """Samples, conditions, gradients, and places in the base, of flows that were fitted to a table's columns."""

    __metadata_request__inverse_transform: ClassVar = {"Z": UNUSED}  # the rows, nothing to be routed

    n_features_in_: int
    # The range of the training rows' log-densities, if their first solves were exact enough.
    _known_scores: tuple[float, float] | None

    def sample(
        self,
        n_samples: int = 1,
        random_state: Any = None,
        return_log_density: bool = False,
        given: Mapping[Any, float] | None = None,
    ) -> Any:
        """Rows drawn from the fitted density, or from that of the rows with given values in some columns.

        A marginal distribution is that of some of the sampled columns. Conditions are met by
        sampling-importance-resampling, around a mixture fitted to samples: exact with growing numbers of candidates, of
        which there are ten for each row, 2,000 at least.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState, Generator or None
        return_log_density : bool, default=False
            Also give the rows' log-densities; with ``given`` those of the other columns given these, an estimate.
        given : mapping of int or str to float, optional
            Values by column number or, after a fit to a frame, by name. A discrete column counts with the density in
            the middle of its cell.

        Returns
        -------
        array of shape ``(n_samples, n_features_in_)``, and one of shape (n_samples,) on request
            Discrete columns are rounded to their lattices.

        Raises
        ------
        ValueError
            If a column is unknown, was left out of the density (constant, duplicate or collinear), or all are given.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 0:
            raise ValueError(f"n_samples={n_samples!r} must be a whole number, 0 or more.")
        parts = seed_sequence(random_state).spawn(3)
        member, generator = np.random.default_rng(parts[0]), torch_generator(parts[1])
        if given:
            b, values = self._conditions(given)
            samples = self._drawn(N_FITTED, member, generator)
            X, log_marginal = self._conditioned(int(n_samples), samples, np.random.default_rng(parts[2]), b, values)
            return (X, self._table_scores(X)[0] - log_marginal) if return_log_density else X
        X, log_density = np.empty((int(n_samples), self.n_features_in_)), np.empty(int(n_samples))
        for rows in chunks(int(n_samples), self.columns_.n_kept):
            X[rows] = self.columns_.restore(self._drawn(rows.stop - rows.start, member, generator))
            if return_log_density:
                log_density[rows] = self._scores(X[rows])
        return (X, log_density) if return_log_density else X

    def _scores(self, X: Array) -> Array:
        """Log-densities of rows: one solve for those like the fit's, whose errors are known, two for the others."""
        if self._known_scores is None:
            return self._table_scores(X)[0]
        scores, _ = self._table_scores(X, check=False)
        low, high = self._known_scores
        unlike = ~((scores >= low) & (scores <= high))
        if unlike.any():
            scores[unlike] = self._table_scores(X[unlike])[0]
        return scores

    def _drawn(self, n: int, members: np.random.Generator, generator: torch.Generator) -> Array:
        """Standardised rows."""
        Z = np.zeros((n, self.columns_.n_kept))
        member = members.integers(len(self._flows), size=n)
        for m, fitted in enumerate(self._flows):
            rows = member == m
            if fitted is not None and rows.any():
                flow = fitted.build(torch.float64, self._predicting_device())
                Z[rows] = self._carried(flow, flow.base.sample(int(rows.sum()), generator))
        return refuse_nan(Z, "sample")

    def _carried(self, flow: ContinuousFlow, places: Any) -> Array:
        """From the base to standardised rows."""
        solver = self._sampling_solver()
        return in_blocks(places, lambda block, _: flow.drawn(block, solver)[0], self._predicting_device())

    def _conditions(self, given: Mapping[Any, float]) -> tuple[Array, Array]:
        """Places among the kept columns, and their values."""
        columns, names = self.columns_, getattr(self, "feature_names_in_", None)
        known = {str(name): j for j, name in enumerate(names)} if names is not None else {}
        places, kept = {}, columns.found.kept.tolist()
        for column, value in given.items():
            j = known.get(column, -1) if isinstance(column, str) else int(column)
            if not 0 <= j < self.n_features_in_:
                raise ValueError(f"given names the column {column!r}, which X did not have at fit.")
            if j not in kept:
                raise ValueError(
                    f"{column_name(j, columns.names)} is {columns.kinds[j]} and was left out of the density; give the "
                    "columns that it depends on instead."
                )
            if not np.isfinite(value):
                raise ValueError(f"given has {value} for {column_name(j, columns.names)}; it must be finite.")
            places[kept.index(j)] = float(value)
        if len(places) == columns.n_kept:
            raise ValueError("given names all columns of the density; leave out those that are to be drawn.")
        order = np.array(sorted(places))
        return order, np.array([places[place] for place in order.tolist()])

    def _conditioned(
        self, n: int, samples: Array, rng: np.random.Generator, b: Array, values: Array
    ) -> tuple[Array, float]:
        """Rows, and the log-density of the given values in the units of X."""
        columns = self.columns_
        standardised = (values - columns.mean[b]) / columns.scale[b]
        found = conditioned(samples, self._standardised_scores, b, standardised, n, rng)
        if found.effective_size < n:
            warn(
                f"the candidates under these conditions are worth {found.effective_size:.0f} independent rows, fewer "
                f"than n_samples={n}: some come more than once. The conditions may be unlikely.",
                ConvergenceWarning,
            )
        return columns.restore(found.Z), found.log_marginal - float(np.log(columns.scale[b]).sum())

    def _standardised_scores(self, Z: Array) -> Array:
        scores = [bounded_log_density(flow, Z, self._predicting_device())[0] for flow in self._flows]
        mean: Array = np.logaddexp.reduce(scores) - np.log(len(scores))
        return mean

    def log_density_gradient(self, X: Any) -> Array:
        """Gradient of the log-density with the row, by the solver's exact derivative; also called its score.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        array of shape ``(n_samples, n_features_in_)``
            0 in columns that were left out of the density. Of a discrete column's spread values, in the cell's middle.
        """
        check_is_fitted(self)
        rows = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        columns = self.columns_
        found = np.zeros(rows.shape)
        Z = columns.standardise(columns.centres(rows))
        if columns.n_kept:
            each = [self._value_and_gradient(flow, Z) for flow in self._flows if flow is not None]
            scores = np.stack([values for values, _ in each])
            shares = np.exp(scores - np.logaddexp.reduce(scores))
            mean = np.einsum("mn,mnd->nd", shares, np.stack([gradients for _, gradients in each]))
            found[:, columns.found.kept] = refuse_nan(mean, "gradient") / columns.scale
        return found

    def _value_and_gradient(self, fitted: FittedFlow, Z: Array) -> tuple[Array, Array]:
        device, solver = self._predicting_device(), exact_solver(GRADIENT_TOLERANCE)
        flow = fitted.build(torch.float64, device).requires_grad_(False)

        def both(block: Tensor, _: Tensor | None) -> Tensor:
            with torch.enable_grad():
                block = block.detach().requires_grad_()
                values = flow.densities(block, solver).log_density
                (gradient,) = torch.autograd.grad(values.sum(), block)
            return torch.cat([values.detach()[:, None], gradient], dim=1)

        found = in_blocks(Z, both, device)
        return found[:, 0], found[:, 1:]

    def _places(self, X: Any) -> Array:
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        columns, Z = self.columns_, np.zeros((len(X), self.columns_.n_kept))
        if columns.n_kept:
            device, solver = self._predicting_device(), self._sampling_solver()
            flow = self._single().build(torch.float64, device)
            for rows in chunks(*Z.shape):
                standardised = columns.standardise(columns.centres(X[rows]))
                Z[rows] = in_blocks(standardised, lambda block, _: flow.densities(block, solver).z, device)
        return refuse_nan(Z, "place in the base")

    def inverse_transform(self, Z: Any) -> Array:
        """Rows of the table at places of the base distribution."""
        check_is_fitted(self)
        places = check_array(
            as_array(Z),
            dtype=np.float64,
            order="C",
            copy=True,
            input_name="Z",
            ensure_min_samples=0,
            ensure_min_features=0,
        )
        if places.shape[1] != self.columns_.n_kept:
            raise ValueError(f"Z must have shape (n, {self.columns_.n_kept}); got {places.shape}.")
        if self.columns_.n_kept:
            flow = self._single().build(torch.float64, self._predicting_device())
            for rows in chunks(*places.shape):
                places[rows] = self._carried(flow, places[rows])
        return self.columns_.restore(refuse_nan(places, "row of the table"))

    def trajectory(self, X: Any, t: Any, *, start: float = 1.0, return_log_density: bool = False) -> Any:
        """Where rows are on their way from the base distribution, at time 0, to the data, at time 1.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        t : array-like of shape (m,)
            Times in [0, 1], ascending.
        start : float, default=1
            The time at which the rows are at X.
        return_log_density : bool, default=False
            Also give the log-density of the flow at each place and time. It is as exact as ``rtol`` asks for samples;
            ``score_samples`` has an error that is checked.

        Returns
        -------
        array of shape ``(n_samples, m, n_features_in_)``, and one of shape (n_samples, m) on request
            In the units of X. Discrete columns are not rounded.

        Raises
        ------
        ValueError
            If times are outside of [0, 1], or the density is an average of several flows.
        SolverError
            If the solve fails for some row.

        Examples
        --------
        >>> import numpy as np
        >>> from skode import ContinuousFlowDensity
        >>> X = np.random.default_rng(0).normal(size=(200, 2))
        >>> density = ContinuousFlowDensity(max_iter=2, random_state=0).fit(X)
        >>> density.trajectory(X[:5], [0.0, 0.5, 1.0]).shape
        (5, 3, 2)
        """
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        times, (begin,) = checked_times(t, 1.0), checked_times(start, 1.0)
        columns, m = self.columns_, len(times)
        Z = columns.standardise(columns.centres(X))
        found = np.zeros((len(X), m, columns.n_kept + 1))
        if columns.n_kept:
            device, solver = self._predicting_device(), self._sampling_solver()
            flow = self._single().build(torch.float64, device)
            for rows in chunks(len(Z), columns.n_kept, m):
                way = in_blocks(Z[rows], lambda block, _: _way(flow, block, begin, times, solver).flatten(1), device)
                found[rows] = way.reshape(-1, m, columns.n_kept + 1)
        refuse_nan(found.reshape(len(X), -1), "way")
        states, log_density = found[..., :-1], found[..., -1] - columns.log_scale
        places = columns.restore(states.reshape(len(X) * m, -1), snap=False).reshape(len(X), m, -1)
        return (places, log_density) if return_log_density else places

    def _single(self) -> FittedFlow:
        if len(self._flows) > 1:
            raise ValueError(f"n_members={self.n_members} flows have no common base; use n_members=1 to transform.")
        flow = self._flows[0]
        assert flow is not None
        return flow


def _way(flow: ContinuousFlow, z: Tensor, start: float, times: list[float], solver: SolverOptions) -> Tensor:
    """Places and log-densities (n, m, d + 1) at times of what is at ``z`` (n, d) at the start."""
    n_before = sum(t <= start for t in times)
    back = flow.solution(z, [start, *times[:n_before][::-1], 0.0], solver)
    assert back.quadratures is not None
    log_density = flow.base.log_density(back.y1)[:, None] + back.quadratures[:, -1]
    way = [torch.cat([back.y[:, 1:-1], (log_density[:, None] - back.quadratures)[:, 1:-1]], dim=2).flip(1)]
    if n_before < len(times):
        ahead = flow.solution(z, [start, *times[n_before:]], solver)
        assert ahead.quadratures is not None
        way.append(torch.cat([ahead.y, log_density[:, None] - ahead.quadratures], dim=2)[:, 1:])
    return torch.cat(way, dim=1)
