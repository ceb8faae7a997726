"""ContinuousFlowRegressor: conditional densities by a continuous normalizing flow around an ODE network's mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import RegressorMixin, _fit_context
from sklearn.utils import Tags, check_array, check_consistent_length, gen_batches
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from skode.estimators.checks import unchanged_on_failure
from skode.estimators.columns import Columns
from skode.estimators.export_flow import POINT_TOLERANCE, POINTS, POINTS_OF_MANY, ConditionalExport
from skode.estimators.fit_tasks import FitTask, Rounds
from skode.estimators.fitted_flow import Array, FittedFlow, in_blocks, refuse_nan
from skode.estimators.flow_base import BaseFlow, Fitted, distinct
from skode.estimators.location import FoldedRegressor, Location, quantiles_of_mean
from skode.exceptions import warn
from skode.runtime import as_array, key_uniforms, row_keys, seed_sequence, torch_generator

FEW_POINTS = 16  # of a single target's, whose log-densities are averaged
CHUNK = 1024  # rows whose points are held at a time
TAILS = np.array([1e-6, 1e-5, 1e-4, 1e-3])  # probabilities at which quantiles are always known


class ContinuousFlowRegressor(RegressorMixin, ConditionalExport):
    """Conditional densities p(y | x): predictive means, intervals, samples and log-densities.

    An ensemble of ODE networks (:class:`ODENetRegressor` [1]_) predicts the mean. What is left of each row by the
    members that were trained without it is the data of a continuous normalizing flow [1]_ whose field depends on x and
    on the predicted mean: it begins at the distribution of all residuals, heavy tails included, and is trained by
    maximum likelihood to change with x. Several such flows, each with other rows held out, are averaged.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(32, 32)
        Units of the flow's hidden layers; the trace is in closed form for one and two.
    activation : str, default="tanh"
        Of the flow's field.
    objective : {"auto", "likelihood", "flow_matching"}, default="auto"
        "auto" is likelihood: flow matching overfits conditions.
    base : {"auto", "normal", "student_t", "mixture"}, default="auto"
        Where the flow begins. "auto": Student's t for one target; for several the better of that and a mixture.
    discrete : {"auto", None} or sequence of int, default="auto"
        Targets to look at for a lattice (integers, rounded numbers): all, none, or these; see
        :class:`ContinuousFlowDensity`.
    n_members : int, default=4
        Flows whose densities are averaged.
    energy_penalty, jacobian_penalty, error_penalty : float, default=0.0, 0.0, 1e-3
        As for :class:`ContinuousFlowDensity`.
    method, step_size, max_num_steps, gradient : default="auto", None, 10000, "discrete"
        As for :class:`ContinuousFlowDensity`.
    rtol, atol : float, default=1e-2, 1e-3
        Of the flows' solves in training, and a tenth of them, those of now, in predictions; not of the mean's networks.
    device, dtype : default="auto"
        Of training; the dtype "auto" is that of X. Predictions of the flow are computed in float64.
    alpha : float, default=0.0
        L2 penalty on the flow's weights.
    batch_size : int, default=256
        Half the rows of an update by likelihood.
    learning_rate_init, shuffle, random_state, verbose : default=5e-3, True, None, False
    max_iter : int, default=200
        Updates by likelihood.
    tol : float, default=0.0
        By which the held-out likelihood has to rise.
    warm_start : bool, default=False
        Whether another fit goes on with the flows of the last one; the mean is fitted anew.
    early_stopping : bool or "auto", default="auto"
        Whether each flow holds out a fifth of the rows and ends at its weights of the best held-out likelihood. "auto":
        with 40 distinct rows or more; with fewer the residuals' distribution is the same for all x.
    validation_fraction : float, default=0.2
        Held-out share of each flow; flows hold out different rows.
    n_iter_no_change : int, default=3
        Checks, of the 8 in training, without a better held-out likelihood after which training ends.

    Attributes
    ----------
    location_ : ODENetRegressor or None
        The mean of the standardised targets; None with fewer than 10 distinct rows.
    column_kinds_ : array of shape (n_targets,)
        Of the targets: "continuous", "constant", "duplicate", "collinear", "binary", "integer" or "rounded".
    n_iter_, loss_, loss_curve_, best_loss_, validation_scores_, n_evals_, n_evals_curve_, n_parameters_, dtype_
        Of the flows' training, as in the other estimators; of the flow that took most updates.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    References
    ----------
    .. [1] Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, sections 3 and 4. arXiv:1806.07366

    Examples
    --------
    >>> import numpy as np
    >>> from skode import ContinuousFlowRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-1, 1, size=(200, 1))
    >>> y = np.sin(3 * X[:, 0]) + (0.1 + 0.2 * (X[:, 0] > 0)) * rng.normal(size=200)  # more noise on the right
    >>> model = ContinuousFlowRegressor(n_members=1, random_state=0).fit(X, y)
    >>> mean, std = model.predict([[-0.5], [0.5]], return_std=True)
    >>> bool(std[0] < std[1])
    True
    >>> model.predict([[-0.5], [0.5]], quantiles=[0.1, 0.5, 0.9]).shape
    (2, 3)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseFlow._parameter_constraints,
        "discrete": [StrOptions({"auto"}), None, "array-like"],
    }
    _location: Location

    def __init__(
        self,
        hidden_layer_sizes: Any = (32, 32),
        activation: str = "tanh",
        *,
        objective: str = "auto",
        base: str = "auto",
        discrete: Any = "auto",
        n_members: int = 4,
        energy_penalty: float = 0.0,
        jacobian_penalty: float = 0.0,
        error_penalty: float = 1e-3,
        method: str = "auto",
        rtol: float = 1e-2,
        atol: float = 1e-3,
        step_size: float | None = None,
        max_num_steps: int = 10_000,
        gradient: str = "discrete",
        device: str | torch.device = "auto",
        dtype: Any = "auto",
        alpha: float = 0.0,
        batch_size: int = 256,
        learning_rate_init: float = 5e-3,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 0.0,
        verbose: bool | int = False,
        warm_start: bool = False,
        early_stopping: str | bool = "auto",
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 3,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            objective,
            base,
            None,
            n_members,
            energy_penalty,
            jacobian_penalty,
            error_penalty,
            method,
            rtol,
            atol,
            step_size,
            max_num_steps,
            gradient,
            device,
            dtype,
            alpha,
            batch_size,
            learning_rate_init,
            max_iter,
            shuffle,
            random_state,
            tol,
            verbose,
            warm_start,
            early_stopping,
            validation_fraction,
            n_iter_no_change,
        )
        self.discrete = discrete

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    # --- fit ---

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the conditional density; callbacks see its location, then the members' rounds, which they may end.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_targets)
        sample_weight : array-like of shape (n_samples,), optional
            A weight of k counts as k copies of the row, a weight of 0 as none.

        Returns
        -------
        self

        Raises
        ------
        DivergenceError
            If training leaves the finite numbers; the object is then as it was before.
        """
        with unchanged_on_failure(self):
            self._fit(X, y, sample_weight)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        fresh = not (self.warm_start and hasattr(self, "_flows"))
        given = X, y, sample_weight
        checks = {"dtype": (np.float64, np.float32), "multi_output": True, "y_numeric": True}
        X, y = validate_data(self, as_array(X), as_array(y), reset=fresh, **checks)
        device = self._resolve(X.dtype)
        task = FitTask.root(self, 1 + self._n_subtasks, *given)
        self._one_dimensional = y.ndim == 1
        X, Y = np.asarray(X, np.float64), np.asarray(y, np.float64).reshape(len(y), -1)
        weight = _check_sample_weight(
            as_array(sample_weight), X, dtype=np.float64, ensure_non_negative=True, allow_all_zero_weights=False
        )
        seeds = seed_sequence(self.random_state).spawn(int(self.n_members) + 2)
        seed = int(seeds[0].generate_state(1)[0])
        content = np.column_stack([X, Y])[weight > 0]
        first, weight = distinct(content, weight[weight > 0], seed)
        content = content[first]
        X, Y = np.split(content, [X.shape[1]], axis=1)
        if not fresh and Y.shape[1] != (k := len(self.columns_.kinds)):
            raise ValueError(f"y has {Y.shape[1]} targets; the model that warm_start goes on with has {k}.")
        if fresh:
            self.columns_ = Columns.fit(Y, weight, self.discrete)
            for message in self.columns_.messages("y"):
                warn(message)
        Z = self.columns_.standardise(self.columns_.dequantise(Y, seed, content=content))
        mean = FoldedRegressor.of(self.device, self.dtype_, int(seeds[1].generate_state(1)[0]))
        before = None if fresh else self._location
        self._location, R, context = task.fit_within("location", mean, lambda: Location.fit(mean, X, Z, weight, before))
        self.location_ = self._location.mean
        earlier = [None] * int(self.n_members) if fresh else self._earlier()
        fits = [
            partial(self._fit_flow, R, context, weight, content, member, seed, part, device, flow)
            for member, (part, flow) in enumerate(zip(seeds[2:], earlier, strict=True))
        ]
        self._fit_members(task, fits, ContinuousFlowRegressor._keep_members)
        task.end_fit()

    def _keep_members(self, members: list[Fitted]) -> None:
        super()._keep_members(members)
        self.n_parameters_ += self.location_.n_parameters_ if self.location_ is not None else 0

    def _fit_flow(
        self,
        R: Array,
        context: Array,
        weight: Array,
        content: Array,
        member: int,
        seed: int,
        part: np.random.SeedSequence,
        device: torch.device,
        earlier: FittedFlow | None,
        rounds: Rounds,
    ) -> Fitted:
        n_dims = R.shape[1]
        plan = self._plan("mlp", n_dims, context.shape[1])
        if not n_dims:
            return None, None
        held_out = self._held_out_fold(content, weight, member, seed)
        rows = self._flow_rows(R, weight, held_out, content, int(part.generate_state(1)[0]), device, context)
        trained = bool(held_out.any()) or self.early_stopping is False
        options = self._flow_options(
            trained and self.objective == "flow_matching", trained and self.objective != "flow_matching", "auto"
        )
        candidates = ("student_t",) if n_dims == 1 else ("mixture", "student_t")
        bases = self._bases(R[~held_out], weight[~held_out], seed, candidates)
        watcher = rounds.watcher(lambda run: (FittedFlow.of(run.flow, plan), run))
        best = self._best_flow(plan, bases, rows, options, torch_generator(part), earlier, watcher)
        return FittedFlow.of(best.flow, plan), best

    def _held_out_fold(self, content: Array, weight: Array, member: int, seed: int) -> NDArray[np.bool_]:
        """Members hold out different rows as long as there are some."""
        n_folds = max(1, int(1 / self.validation_fraction))
        return self._held_out(content, weight, seed + 1 + member // n_folds, member % n_folds)

    # --- predictions ---

    def _prepare(self, X: Any) -> tuple[Array, Array]:
        """Predicted means of the standardised targets, and contexts."""
        check_is_fitted(self)
        rows = np.asarray(validate_data(self, as_array(X), dtype=(np.float64, np.float32), reset=False), np.float64)
        return self._location.predict(rows, self.columns_.n_kept, self.device)

    def _points(self, predicted: Array, context: Array, probabilities: Array) -> Iterator[Array]:
        """Targets that fill the rows' densities evenly, (n_members, n, k, n_targets), some rows at a time.

        Of a single column they are its quantiles at these probabilities, or at (i + 1/2) / k if there are none.
        """
        for rows in gen_batches(len(predicted), CHUNK):
            numbers = np.arange(rows.start, rows.stop)
            members = [
                self._member_points(flow, predicted[rows], context[rows], probabilities, numbers)
                for flow in self._flows
            ]
            Z = np.stack(members)
            *sizes, d = Z.shape
            yield self.columns_.restore(Z.reshape(math.prod(sizes), d), snap=False).reshape(*sizes, -1)

    def _member_points(
        self,
        fitted: FittedFlow | None,
        predicted: Array,
        context: Array,
        probabilities: Array,
        numbers: NDArray[np.int64],
    ) -> Array:
        """Standardised."""
        if fitted is None:
            return predicted[:, None]
        n, d = predicted.shape
        base = fitted.build(torch.float64, torch.device("cpu")).base
        if d == 1 and len(probabilities):
            u = torch.full((len(probabilities), 3), 0.5, dtype=torch.float64)
            u[:, 0] = torch.from_numpy(probabilities)
            points = base.placed(u)
        else:
            points = base.points(POINTS if d == 1 else POINTS_OF_MANY)
        k = len(points)
        context, numbers = np.repeat(context, k, axis=0), np.repeat(numbers, k)
        drawn = self._carried(fitted, np.tile(points.numpy(), (n, 1)), context, numbers)
        return predicted[:, None] + drawn.reshape(n, k, d)

    def _carried(self, fitted: FittedFlow, start: Array, context: Array, numbers: NDArray[np.int64]) -> Array:
        """Standardised residuals (n, d) at points of a flow's base."""
        device, solver = self._predicting_device(), self._sampling_solver(POINT_TOLERANCE)
        flow = fitted.build(torch.float64, device)
        found = in_blocks(start, lambda block, given: flow.drawn(block, solver, given)[0], device, context)
        return np.asarray(refuse_nan(found, "target", numbers) * self._location.residual_scale)

    def predict(self, X: Any, return_std: bool = False, quantiles: Any = None) -> Any:
        """Means, standard deviations or quantiles of y | x.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_std : bool, default=False
            Also give the standard deviation.
        quantiles : array-like of shape (q,), optional
            Probabilities in (0, 1), of each target by itself; asked for instead of the mean.

        Returns
        -------
        array of shape (n_samples,) or (n_samples, n_targets)
            The mean; with ``return_std`` a pair of such arrays; with ``quantiles`` one array with a last axis of
            length q. Discrete targets are not rounded.

        Raises
        ------
        ValueError
            If a probability is not in (0, 1), or quantiles and standard deviations are asked for at once.
        SolverError
            If the solve fails for some row.
        """
        if quantiles is not None:
            if return_std:
                raise ValueError("return_std and quantiles cannot be asked for at once; call predict twice.")
            return self._quantiles(X, quantiles)
        chunks = [(Y.mean(axis=(0, 2)), Y.std(axis=(0, 2))) for Y in self._points(*self._prepare(X), np.empty(0))]
        mean, std = (self._shaped(np.concatenate(parts)) for parts in zip(*chunks, strict=True))
        return (mean, std) if return_std else mean

    def _quantiles(self, X: Any, quantiles: Any) -> Array:
        q = np.asarray(as_array(quantiles), dtype=np.float64)
        if q.ndim != 1 or not ((q > 0) & (q < 1)).all():
            raise ValueError(f"quantiles must be probabilities between 0 and 1, a list of them; got {quantiles!r}.")
        nodes = np.unique(np.concatenate([q, TAILS, 1 - TAILS, (np.arange(POINTS) + 0.5) / POINTS]))
        parts = []
        for Y in self._points(*self._prepare(X), nodes):
            if self.columns_.n_kept == 1:
                parts.append(
                    np.stack([quantiles_of_mean(target, nodes, q) for target in np.moveaxis(Y, -1, 0)], axis=1)
                )
            else:
                parts.append(np.moveaxis(np.quantile(Y, q, axis=(0, 2), method="hazen"), 0, -1))
        return self._shaped(np.concatenate(parts))

    def _shaped(self, Y: Array) -> Array:
        """Without the axis of targets where y had none."""
        return Y[:, 0] if self._one_dimensional else Y

    def sample(self, X: Any, n_samples: int = 1, random_state: Any = None) -> Array:
        """Targets drawn from the conditional densities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        n_samples : int, default=1
            Draws for each row.
        random_state : int, RandomState, Generator or None

        Returns
        -------
        array of shape (n_samples, len(X)) or (n_samples, len(X), n_targets)
            Discrete targets are rounded to their lattices. A row's draws depend on its content and ``random_state``
            alone: equal rows have equal draws, in any company.
        """
        if not isinstance(n_samples, Integral) or n_samples < 0:
            raise ValueError(f"n_samples={n_samples!r} must be a whole number, 0 or more.")
        predicted, context = self._prepare(X)
        rows, (n, d) = np.asarray(as_array(X), np.float64), predicted.shape
        seed = int(seed_sequence(random_state).generate_state(1)[0])
        u = key_uniforms(row_keys(rows, seed), int(n_samples) * (2 * d + 2)).reshape(n * int(n_samples), 2 * d + 2)
        member = (u[:, 0] * len(self._flows)).astype(np.int64)
        number = np.repeat(np.arange(n), int(n_samples))
        Z = predicted[number]
        for m, fitted in enumerate(self._flows):
            own = np.flatnonzero(member == m)
            if fitted is not None and len(own):
                base = fitted.build(torch.float64, torch.device("cpu")).base
                start = base.placed(torch.from_numpy(u[own, 1:])).numpy()
                Z[own] += self._carried(fitted, start, context[number[own]], number[own])
        Y = self.columns_.restore(Z).reshape(n, int(n_samples), len(self.columns_.kinds)).swapaxes(0, 1)
        return Y[:, :, 0] if self._one_dimensional else Y

    # --- densities ---

    def score_samples(self, X: Any, y: Any = None, return_error: bool = False) -> Any:
        """Log-density of each row's y given its x, in nats and the units of y.

        Without y the log-density that is to be expected of it: minus the entropy of y | x.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_targets), optional
        return_error : bool, default=False
            Also give each row's solver error in nats, estimated from a second solve.

        Returns
        -------
        array of shape (n_samples,), or two of them
            A row that breaks a relation between targets (a constant that is another one) loses a million nats for each.
        """
        predicted, context = self._prepare(X)
        if y is None:
            return self._expected_scores(predicted, context, return_error)
        Y = check_array(as_array(y), dtype=np.float64, ensure_2d=False, input_name="y")
        Y = Y.reshape(len(Y), -1)
        check_consistent_length(predicted, Y)
        if Y.shape[1] != len(self.columns_.kinds):
            raise ValueError(f"y has {Y.shape[1]} targets; the fit had {len(self.columns_.kinds)}.")
        scores, errors = self._table_scores(Y, predicted, self._location.residual_scale, context)
        return (scores, errors) if return_error else scores

    def _expected_scores(self, predicted: Array, context: Array, return_error: bool) -> Any:
        nodes, weights = np.polynomial.legendre.leggauss(FEW_POINTS)
        chunks = self._points(predicted, context, (nodes + 1) / 2)
        Y = np.concatenate([points.swapaxes(0, 1) for points in chunks])  # (n, n_members, k, n_targets)
        n, k = len(Y), Y.shape[1] * Y.shape[2]
        scores, errors = self._table_scores(
            Y.reshape(n * k, -1),
            np.repeat(predicted, k, axis=0),
            self._location.residual_scale,
            np.repeat(context, k, axis=0),
        )
        weights = weights if Y.shape[2] == FEW_POINTS else np.ones(Y.shape[2])
        means = np.average(scores.reshape(n, k), axis=1, weights=np.tile(weights, Y.shape[1]))
        return (means, errors.reshape(n, k).max(axis=1)) if return_error else means

    def solver_stats(self, X: Any) -> pd.DataFrame:
        """What the solver did on the flows' way from 0 in the base; ``location_.solver_stats`` tells of the mean.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        DataFrame
            One row per row of X, with X's index if it has one: ``n_evals, n_steps, n_rejected`` (sums over members) and
            ``status`` (the worst of them; 0 is success, see :class:`skode.solver.Status`).
        """
        predicted, context = self._prepare(X)
        index = X.index if isinstance(X, pd.DataFrame) else None
        return self._flow_stats(np.zeros_like(predicted), [0.0, 1.0], context, index)
