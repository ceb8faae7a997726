"""ContinuousFlowDensity: a continuous normalizing flow as a density estimator, outlier detector and transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import (
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    OutlierMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from skode.estimators.checks import unchanged_on_failure
from skode.estimators.columns import Columns
from skode.estimators.fit_tasks import FitTask, Rounds
from skode.estimators.fitted_flow import SCORE_ERROR, Array, FittedFlow
from skode.estimators.flow_base import BaseFlow, Fitted, distinct
from skode.estimators.flow_queries import FlowQueries
from skode.estimators.mixtures import choose, fit_mixture
from skode.exceptions import ConvergenceWarning, warn
from skode.models import Base
from skode.models.flow import ContinuousFlow
from skode.runtime import as_array, row_keys, seed_sequence, torch_generator
from skode.training.flow import FlowRows, FlowTraining

# Of the gain of held-out rows by a mixture that was fitted to them, too; rows that are new gain about as much.
OWN_ROWS_SHARE = 1 / 6
ROWS_SOLVED_ANEW = 4096  # training rows at most, to see whether the first tolerance is enough


class ContinuousFlowDensity(OutlierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, FlowQueries):
    """Density estimation by a continuous normalizing flow.

    A field carries a base distribution to the data; the log-density of a row is the base's, less what the flow's
    divergence takes away on the way [1]_. Two flows are begun, one at a fitted Gaussian mixture and one at the normal
    distribution; the one of better held-out likelihood after flow matching [2]_ is trained further by maximum
    likelihood. Below 40 distinct rows the mixture alone is fitted.

    Log-densities are those of the rows of X in its own units, in nats, whatever the solver's tolerance in training:
    they are solved until the solver's error is below 0.01 nat, which is checked by a second, tighter solve.

    Constant, duplicate and collinear columns are left out of the density and rebuilt in samples. Discrete columns
    (binary, integer-valued, rounded) are spread over the cells of their lattice: their log-density is log(mass) -
    log(spacing), so that it shares units with that of methods which take the values as they are.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(64, 64)
        Units of the field's hidden layers; the trace is in closed form for one and two. ``net="planar"``: one number.
    activation : str, default="tanh"
        Of the field.
    net : {"mlp", "planar"}, default="mlp"
        A perceptron with gates and shifts in time, or the paper's gated sum of units with parameters from a
        hypernetwork of time.
    objective : {"auto", "likelihood", "flow_matching"}, default="auto"
        Flow matching and then likelihood, or one of them.
    divergence : {"auto", "exact", "hutchinson"}, default="auto"
        In training by likelihood; "auto" is exact, which costs less than the estimate. Densities are always exact.
    base : {"auto", "normal", "student_t", "mixture"}, default="auto"
        Where the flow begins; "auto" takes the better of mixture and normal.
    discrete : {"auto", None} or sequence of int or str, default="auto"
        Columns to look at for a lattice: all, none, or these.
    field : callable, optional
        ``field(n_dims)`` returns an ``nn.Module`` that maps t ``(n, 1)`` and states ``(n, n_dims)`` to velocities; it
        takes the place of ``net``. Its divergence is its method ``trace(t, y)``, if it has one, else by autograd: exact
        in densities, estimated in training above 3 columns. A class or a module-level function pickles.
    n_members : int, default=1
        Flows whose densities are averaged.
    contamination : float, default=0.1
        Share of the training rows that ``predict`` calls outliers.
    energy_penalty : float, default=0.0
        Weight of the flow's mean kinetic energy, in training by likelihood.
    jacobian_penalty : float, default=0.0
        Weight of the mean squared norm of its Jacobian.
    error_penalty : float, default=1e-3
        Weight of the training solves' squared errors in units of the tolerance: it keeps the flow from using the
        solver's errors. For adaptive methods and ``gradient="discrete"``.
    method : str, default="auto"
        Solver of training, samples and ``transform``; "auto": bosh3 in training, then dopri5 or dopri8.
    rtol, atol : float, default=1e-2, 1e-3
        Tolerances of the solves in training by likelihood; samples and ``transform`` are solved to a ten-thousandth of
        them, those of now. Log-densities do not depend on them.
    step_size : float, optional
        Of a method of fixed steps.
    max_num_steps : int, default=10000
        Steps a solve may take.
    gradient : {"discrete", "adjoint", "reversible"}, default="discrete"
        How training differentiates through the solver.
    device : str or torch.device, default="auto"
        Where training and predictions are computed.
    dtype : "auto", "float32", "float64" or NumPy dtype, default="auto"
        Of training; "auto" is that of X on the CPU, else float32. Densities and samples are computed in float64.
    alpha : float, default=0.0
        L2 penalty on the weights.
    batch_size : int, default=256
        Rows of an update by flow matching; by likelihood twice as many.
    learning_rate_init : float, default=5e-3
        Falls to 0 in each phase; by likelihood two fifths of it.
    max_iter : int, default=200
        Updates by likelihood; by flow matching 7.5 times as many.
    shuffle : bool, default=True
        Whether the rows are put in a new order for each pass.
    random_state : int, RandomState, Generator or None, default=None
        Decides everything: initial weights, order of the rows, noise (which also depends on the rows' content).
    tol : float, default=0.0
        By which the held-out likelihood has to rise.
    verbose : bool or int, default=False
        Whether to print a line at each check.
    warm_start : bool, default=False
        Whether another fit goes on with the flows, bases and columns of the last one.
    early_stopping : bool or "auto", default="auto"
        Whether a part of the rows is held out: training starts from the better of two bases and ends at the weights
        that are best for them. "auto": with 40 distinct rows or more; with fewer the base alone is fitted.
    validation_fraction : float, default=0.15
        Held-out share of the weight.
    n_iter_no_change : int, default=2
        Checks, of the 8 in training by likelihood, without a rise after which training ends.

    Attributes
    ----------
    column_kinds_ : array of shape ``(n_features_in_,)``
        "continuous", "constant", "duplicate", "collinear", "binary", "integer" or "rounded".
    score_error_ : float
        Largest solver error of the training rows' log-densities, in nats.
    offset_ : float
        Log-density below which rows are outliers.
    n_iter_ : int
        Updates of the weights; 1 if there was nothing to train.
    loss_curve_, loss_, best_loss_ : list of float, float or None, float or None
        Mean losses between checks of training by likelihood (else by flow matching), the last and the least of them.
    validation_scores_ : list of float
        Held-out log-likelihoods of the standardised rows in the course of training.
    n_evals_ : float
        The field's evaluations a row in the last update by likelihood.
    n_evals_curve_ : list of float
        The same before each check of training by likelihood.
    n_parameters_ : int
        Of the fields.
    dtype_ : numpy.dtype
        Of training.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    References
    ----------
    .. [1] Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, section 4. arXiv:1806.07366
    .. [2] Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023. arXiv:2210.02747

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from skode import ContinuousFlowDensity
    >>> X, _ = make_moons(300, noise=0.1, random_state=0)
    >>> density = ContinuousFlowDensity(max_iter=20, random_state=0).fit(X)
    >>> density.score_samples(X[:5]).shape, density.sample(3, random_state=0).shape
    ((5,), (3, 2))
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseFlow._parameter_constraints,
        "net": [StrOptions({"mlp", "planar"})],
        "divergence": [StrOptions({"auto", "exact", "hutchinson"})],
        "discrete": [StrOptions({"auto"}), None, "array-like"],
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
    }

    def __init__(
        self,
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "tanh",
        *,
        net: str = "mlp",
        objective: str = "auto",
        divergence: str = "auto",
        base: str = "auto",
        discrete: Any = "auto",
        field: Callable[[int], torch.nn.Module] | None = None,
        n_members: int = 1,
        contamination: float = 0.1,
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
        validation_fraction: float = 0.15,
        n_iter_no_change: int = 2,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            objective,
            base,
            field,
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
        self.net = net
        self.divergence = divergence
        self.discrete = discrete
        self.contamination = contamination

    # --- fit ---

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the density of the rows of X.

        Callbacks (``set_callbacks``, :mod:`skode.callbacks`) see the rounds of training from check to check, parts of
        members where there are several, and may end each; scikit-learn's ScoringMonitor scores only where it sees a y.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n_samples, n_features)
        y : ignored
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
        given = validate_data(self, as_array(X), dtype=(np.float64, np.float32), ensure_min_samples=1, reset=fresh)
        device = self._resolve(given.dtype)
        task = FitTask.root(self, self._n_subtasks, X, y, sample_weight)
        X = np.asarray(given, np.float64)
        weight = _check_sample_weight(
            as_array(sample_weight), X, dtype=np.float64, ensure_non_negative=True, allow_all_zero_weights=False
        )
        seeds = seed_sequence(self.random_state).spawn(int(self.n_members) + 1)
        seed = int(seeds[0].generate_state(1)[0])
        counted = weight > 0
        first, weight = distinct(X[counted], weight[counted], seed)
        X = X[counted][first]
        if fresh:
            self.columns_ = Columns.fit(X, weight, self.discrete, getattr(self, "feature_names_in_", None))
            for message in self.columns_.messages():
                warn(message)
        self._n_features_out = self.columns_.n_kept
        earlier = self._earlier() if not fresh else [None] * int(self.n_members)
        fits = [
            partial(self._fit_flow, X, weight, part, device, flow)
            for part, flow in zip(seeds[1:], earlier, strict=True)
        ]

        def keep(fitted: ContinuousFlowDensity, members: list[Fitted]) -> None:
            fitted._keep_members(members)
            fitted._judge_training_rows(X, weight)

        self._fit_members(task, fits, keep)
        if self.score_error_ > SCORE_ERROR:
            warn(
                f"log-densities of the training rows are exact to {self.score_error_:.2g} nats only; raise "
                "error_penalty, which keeps the flow easy to solve.",
                ConvergenceWarning,
            )
        task.end_fit()

    def _judge_training_rows(self, X: Array, weight: Array) -> None:
        """``score_error_`` and ``offset_``."""
        scores, errors = self._table_scores(X)
        self.score_error_ = float(errors.max(initial=0.0))
        some = slice(ROWS_SOLVED_ANEW)  # rows are in the order of their contents' keys
        settled = bool((self._table_scores(X[some], check=False)[0] == scores[some]).all())
        self._known_scores = (float(scores.min()), float(scores.max())) if settled else None
        order = np.argsort(scores)
        share = np.cumsum(weight[order]) / weight.sum()
        below = scores[order][np.searchsorted(share, self.contamination * (1 - 1e-12))]
        # Rows as dense as the last outlier are inliers if that is nearer to the share asked for.
        wanted = self.contamination * weight.sum()
        too_many = weight[scores <= below].sum() - wanted > wanted - weight[scores < below].sum()
        self.offset_ = float(below if too_many else np.nextafter(below, np.inf))

    def _fit_flow(
        self,
        X: Array,
        weight: Array,
        part: np.random.SeedSequence,
        device: torch.device,
        earlier: FittedFlow | None,
        rounds: Rounds,
    ) -> Fitted:
        d = self.columns_.n_kept
        plan = self._plan(self.net, d)
        if not d:
            return None, None
        seed, generator = int(part.generate_state(1)[0]), torch_generator(part)
        Z, weight, held_out, rows = self._training_rows(X, weight, seed, device)
        trained, inside = bool(held_out.any()) or self.early_stopping is False, ~held_out
        candidates = ("mixture", "normal") if held_out.any() else ("mixture",)
        options = self._flow_options(
            trained and self.objective != "likelihood",
            trained and self.objective != "flow_matching",
            self.divergence,
        )
        may_start_at_mixture = earlier is None and self.base in ("auto", "mixture") and self.field is None
        choice = choose(Z, weight, seed) if may_start_at_mixture else None
        bases = list(self._bases(Z[inside], weight[inside], seed, candidates, choice))
        whole = fit_mixture(Z, weight, seed, choice) if choice is not None and held_out.any() else None

        def found(best: FlowTraining) -> Fitted:
            flow = best.flow
            if whole is not None and not self._earns_its_rows(best, bases[0], whole, Z[held_out], weight[held_out]):
                drawn = generator.clone_state()  # training may go on with its own
                flow = ContinuousFlow(plan.make(drawn).to(rows.x), whole.to(rows.x.dtype, device))
            return FittedFlow.of(flow, plan), best

        return found(self._best_flow(plan, bases, rows, options, generator, earlier, rounds.watcher(found)))

    @staticmethod
    def _earns_its_rows(best: FlowTraining, start: Base, whole: Base, held_out: Array, weight: Array) -> bool:
        """Whether the network gains more on the held-out rows than the mixture would by having them, too.

        Those rows are the whole mixture's own, which flatters it: of the difference a share counts.
        """
        rows = torch.from_numpy(held_out)
        before, after = (np.average(base.log_density(rows).numpy(), weights=weight) for base in (start, whole))
        return bool(best.best - before > OWN_ROWS_SHARE * max(after - before, 0.0))

    def _training_rows(
        self, X: Array, weight: Array, seed: int, device: torch.device
    ) -> tuple[Array, Array, NDArray[np.bool_], FlowRows]:
        """Standardised rows, discrete values spread over their cells, with weights and those that are held out."""
        columns, repeats = self.columns_, self.columns_.n_repeats
        # Columns that are left out shall not matter.
        order = np.argsort(row_keys(X[:, columns.found.kept], seed))
        X, weight = X[order], weight[order]
        Z = np.concatenate([columns.standardise(columns.dequantise(X, seed, r)) for r in range(repeats)])
        number = np.repeat(np.arange(repeats), len(X))
        X, weight = np.tile(X[:, columns.found.kept], (repeats, 1)), np.tile(weight / repeats, repeats)
        held_out = self._held_out(X, weight, seed + 1)
        # Repetitions of a row have noise of their own.
        rows = self._flow_rows(Z, weight, held_out, np.column_stack([X, number]), seed, device)
        return Z, weight, held_out, rows

    # --- densities ---

    def score_samples(self, X: Any, return_error: bool = False) -> Any:
        """Log-density of each row, in nats and the units of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_error : bool, default=False
            Also give each row's solver error in nats, estimated from a second solve. Without it that is made for rows
            less likely than all training rows, or more; for the others ``score_error_`` holds.

        Returns
        -------
        array of shape (n_samples,), or two of them
            A row that breaks a relation between columns (a constant that is another one) loses a million nats for
            each.
        """
        X = self._validated(X)
        return self._table_scores(X) if return_error else self._scores(X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Mean log-density of the rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : ignored
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        float
        """
        scores = self.score_samples(X)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(as_array(sample_weight), scores, dtype=np.float64)
        return float(np.average(scores, weights=sample_weight))

    def decision_function(self, X: Any) -> Array:
        """Log-density above the offset: negative for outliers."""
        found: Array = self.score_samples(X) - self.offset_
        return found

    def predict(self, X: Any) -> NDArray[np.int64]:
        """+1 for inliers, -1 for outliers."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def _validated(self, X: Any) -> Array:
        check_is_fitted(self)
        checked: Array = validate_data(self, as_array(X), dtype=np.float64, reset=False)
        return checked

    def transform(self, X: Any) -> Array:
        """The rows' places in the base distribution."""
        return self._places(X)

    def solver_stats(self, X: Any) -> pd.DataFrame:
        """What the solver did for every row on its way to the base; never raises for a failed solve.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        DataFrame
            One row per row of X, with X's index if it has one: ``n_evals, n_steps, n_rejected`` (sums over members) and
            ``status`` (the worst of them; 0 is success, see :class:`skode.solver.Status`).
        """
        rows = self._validated(X)
        Z = self.columns_.standardise(self.columns_.centres(rows))
        return self._flow_stats(Z, [1.0, 0.0], None, X.index if isinstance(X, pd.DataFrame) else None)
