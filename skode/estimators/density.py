"""ContinuousFlowDensity: a continuous normalizing flow as a density estimator, outlier detector and transformer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    OutlierMixin,
    TransformerMixin,
    _fit_context,
)
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted, validate_data
from torch import Tensor

from skode.estimators.checks import unchanged_on_failure
from skode.estimators.columns import Columns
from skode.estimators.fitted_flow import (
    BASES,
    SCORE_ERROR,
    Array,
    FittedFlow,
    bounded_log_density,
    exact_solver,
    in_blocks,
    make_field,
    refuse_nan,
)
from skode.estimators.mixtures import fit_mixture
from skode.exceptions import ConvergenceWarning
from skode.fields import ACTIVATIONS
from skode.models import Base, LinearPath, Mixture, MixturePath, Normal, SolverOptions, StudentT
from skode.models.flow import ContinuousFlow
from skode.runtime import as_array, resolve_device, row_keys, seed_sequence, torch_generator
from skode.training.flow import FlowOptions, FlowRows, FlowTraining, train_flow
from skode.training.noise import RowNoise

FEWEST_ROWS = 40  # distinct ones, to hold some out; with fewer the base alone is fitted
HELD_OUT = 0.15
CELL_POINTS = 8  # places in a cell that a discrete value's density is averaged over


class ContinuousFlowDensity(
    OutlierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator
):
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
    n_members : int, default=1
        Flows whose densities are averaged.
    contamination : float, default=0.1
        Share of the training rows that ``predict`` calls outliers.
    rtol, atol : float, default=1e-2, 1e-3
        Tolerances of the solves in training by likelihood; an ``rtol`` below 1e-6 rules samples and ``transform``, too.
    alpha : float, default=0.0
        L2 penalty on the weights.
    error_penalty : float, default=1e-3
        Weight of the training solves' squared errors in units of the tolerance: it keeps the flow from using the
        solver's errors.
    energy_penalty : float, default=0.0
        Weight of the flow's mean kinetic energy, in training by likelihood.
    jacobian_penalty : float, default=0.0
        Weight of the mean squared norm of its Jacobian, estimated by a probe.
    batch_size : int, default=256
        Rows of an update by flow matching; by likelihood twice as many.
    learning_rate_init : float, default=5e-3
    max_iter : int, default=200
        Updates by likelihood; by flow matching 7.5 times as many.
    device : str or torch.device, default="auto"
        For training. Densities and samples are computed in float64 on the CPU.
    random_state : int, RandomState, Generator or None, default=None
        Decides everything: initial weights, order of the rows, noise (which also depends on the rows' content).

    Attributes
    ----------
    column_kinds_ : array of shape (n_features_in_,)
        "continuous", "constant", "duplicate", "collinear", "binary", "integer" or "rounded".
    score_error_ : float
        Largest solver error of the training rows' log-densities, in nats.
    offset_ : float
        Log-density below which rows are outliers.
    n_iter_ : int
        Updates of the weights; 1 if there was nothing to train.
    validation_scores_ : list of float
        Held-out log-likelihoods of the standardised rows in the course of training.
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
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "net": [StrOptions({"mlp", "planar"})],
        "objective": [StrOptions({"auto", "likelihood", "flow_matching"})],
        "divergence": [StrOptions({"auto", "exact", "hutchinson"})],
        "base": [StrOptions({"auto", *BASES})],
        "discrete": [StrOptions({"auto"}), None, "array-like"],
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "contamination": [Interval(Real, 0, 0.5, closed="right")],
        "rtol": [Interval(Real, 0, None, closed="neither")],
        "atol": [Interval(Real, 0, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "error_penalty": [Interval(Real, 0, None, closed="left")],
        "energy_penalty": [Interval(Real, 0, None, closed="left")],
        "jacobian_penalty": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "device": [str, torch.device],
        "random_state": ["random_state", np.random.Generator],
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
        n_members: int = 1,
        contamination: float = 0.1,
        rtol: float = 1e-2,
        atol: float = 1e-3,
        alpha: float = 0.0,
        error_penalty: float = 1e-3,
        energy_penalty: float = 0.0,
        jacobian_penalty: float = 0.0,
        batch_size: int = 256,
        learning_rate_init: float = 5e-3,
        max_iter: int = 200,
        device: str | torch.device = "auto",
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.net = net
        self.objective = objective
        self.divergence = divergence
        self.base = base
        self.discrete = discrete
        self.n_members = n_members
        self.contamination = contamination
        self.rtol = rtol
        self.atol = atol
        self.alpha = alpha
        self.error_penalty = error_penalty
        self.energy_penalty = energy_penalty
        self.jacobian_penalty = jacobian_penalty
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.device = device
        self.random_state = random_state

    # --- fit ---

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the density of the rows of X.

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
            self._fit(X, sample_weight)
        return self

    def _fit(self, X: Any, sample_weight: Any) -> None:
        X = validate_data(self, as_array(X), dtype=np.float64, ensure_min_samples=1)
        weight = _check_sample_weight(
            as_array(sample_weight), X, dtype=np.float64, ensure_non_negative=True, allow_all_zero_weights=False
        )
        root = seed_sequence(self.random_state)
        seeds = root.spawn(int(self.n_members) + 1)
        seed = int(seeds[0].generate_state(1)[0])
        X, weight = _distinct(X[weight > 0], weight[weight > 0], seed)
        self.columns_ = Columns.fit(X, weight, self.discrete, getattr(self, "feature_names_in_", None))
        for message in self.columns_.messages():
            warnings.warn(message, UserWarning, stacklevel=4)
        self.column_kinds_ = self.columns_.kinds
        self._n_features_out = self.columns_.n_kept
        self.n_iter_ = 1
        self.validation_scores_: list[float] = []
        self._flows = [self._fit_flow(X, weight, part) for part in seeds[1:]]
        scores, errors = self._scored(X)
        self.score_error_ = float(errors.max(initial=0.0))
        if self.score_error_ > SCORE_ERROR:
            warnings.warn(
                f"log-densities of the training rows are exact to {self.score_error_:.2g} nats only; raise "
                "error_penalty, which keeps the flow easy to solve.",
                ConvergenceWarning,
                stacklevel=4,
            )
        order = np.argsort(scores)
        share = np.cumsum(weight[order]) / weight.sum()
        below = scores[order][np.searchsorted(share, self.contamination * (1 - 1e-12))]
        self.offset_ = float(np.nextafter(below, np.inf))

    def _fit_flow(self, X: Array, weight: Array, part: np.random.SeedSequence) -> FittedFlow | None:
        d = self.columns_.n_kept
        if not d:
            return None
        seed, generator = int(part.generate_state(1)[0]), torch_generator(part)
        Z, weight, held_out, rows = self._training_rows(X, weight, seed)
        trained, inside = bool(held_out.any()), ~held_out
        sizes = tuple(int(n) for n in np.atleast_1d(self.hidden_layer_sizes))
        runs = []
        for base in self._bases(Z[inside], weight[inside], seed):
            field = make_field(self.net, d, sizes, self.activation, generator).to(rows.x.device)
            flow = ContinuousFlow(field, base.to(torch.float32, rows.x.device))
            path = MixturePath(flow.base) if isinstance(flow.base, Mixture) else LinearPath()
            options = self._options(trained)
            runs.append(FlowTraining(flow, path, rows, _start_of(base), self._solver(), options, generator))
        best = train_flow(runs)
        if best.unchanged and isinstance(best.flow.base, Mixture) and trained:
            # The network adds nothing: then the rows that were held out for it belong to the mixture.
            best.flow.base = fit_mixture(Z, weight, seed)
        self.n_iter_ = max(self.n_iter_, best.n_updates)
        self.validation_scores_ = best.history.validation_scores
        name = next(name for name, kind in BASES.items() if type(best.flow.base) is kind)
        return FittedFlow.of(best.flow, self.net, sizes, self.activation, name)

    def _training_rows(self, X: Array, weight: Array, seed: int) -> tuple[Array, Array, NDArray[np.bool_], FlowRows]:
        """Standardised rows, discrete values spread over their cells, with weights and those that are held out."""
        columns, d = self.columns_, self.columns_.n_kept
        repeats, device = columns.n_repeats, resolve_device(self.device, "float32")
        # Columns that are left out shall not matter.
        order = np.argsort(row_keys(X[:, columns.found.kept], seed))
        X, weight = X[order], weight[order]
        Z = np.concatenate([columns.standardise(columns.dequantise(X, seed, r)) for r in range(repeats)])
        number = np.repeat(np.arange(repeats), len(X))
        X, weight = np.tile(X[:, columns.found.kept], (repeats, 1)), np.tile(weight / repeats, repeats)
        held_out = self._held_out(X, weight, seed)
        rows = FlowRows(
            torch.from_numpy(Z).to(torch.float32).to(device),
            torch.from_numpy(weight).to(torch.float32).to(device),
            # Repetitions of a row have noise of their own.
            RowNoise(np.column_stack([X, number]), 2 * d + 2, seed),
            torch.from_numpy(held_out),
        )
        return Z, weight, held_out, rows

    def _bases(self, Z: Array, weight: Array, seed: int) -> Iterator[Base]:
        if self.base in ("auto", "mixture"):
            yield fit_mixture(Z, weight, seed)
        if self.base == "normal" or (self.base == "auto" and len(Z) >= FEWEST_ROWS):
            yield Normal.standard(Z.shape[1])
        if self.base == "student_t":
            yield StudentT.fit(Z, weight)

    def _held_out(self, X: Array, weight: Array, seed: int) -> NDArray[np.bool_]:
        """A part of the weight, chosen by the rows' content."""
        keys, distinct = np.unique(row_keys(X, seed + 1), return_inverse=True)
        if len(keys) < FEWEST_ROWS:
            return np.zeros(len(X), dtype=bool)
        share = np.cumsum(np.bincount(distinct, weights=weight)) / weight.sum()
        held: NDArray[np.bool_] = (share <= HELD_OUT)[distinct]
        return held

    def _options(self, trained: bool) -> FlowOptions:
        scale = self.max_iter / 200
        matching = 0 if self.objective == "likelihood" else round(1500 * scale)
        likelihood = 0 if self.objective == "flow_matching" else round(200 * scale)
        return FlowOptions(
            matching if trained else 0,
            likelihood if trained else 0,
            int(self.batch_size),
            float(self.learning_rate_init),
            float(self.alpha),
            float(self.error_penalty),
            float(self.energy_penalty),
            float(self.jacobian_penalty),
            "hutchinson" if self.divergence == "hutchinson" else "auto",
        )

    def _solver(self) -> SolverOptions:
        return SolverOptions("bosh3", float(self.rtol), float(self.atol), None, 10_000)

    # --- densities ---

    def score_samples(self, X: Any, return_error: bool = False) -> Any:
        """Log-density of each row, in nats and the units of X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        return_error : bool, default=False
            Also give each row's solver error in nats, estimated from a second solve.

        Returns
        -------
        array of shape (n_samples,), or two of them
            A row that breaks a relation between columns (a constant that is another one) loses a million nats for
            each.
        """
        X = self._validated(X)
        scores, errors = self._scored(X)
        return (scores, errors) if return_error else scores

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density of the rows."""
        return float(np.mean(self.score_samples(X)))

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

    def _scored(self, X: Array) -> tuple[Array, Array]:
        columns = self.columns_
        k = CELL_POINTS if columns.has_cells else 1
        places = columns.standardise(columns.centres(X) + (columns.cell_noise(X, k) if k > 1 else 0.0))
        places = places.reshape(k * len(X), columns.n_kept)
        found = [bounded_log_density(flow, places) for flow in self._flows]
        refuse_nan(np.sum([values for values, _ in found], axis=0).reshape(k, -1).T, "log-density")
        log_standardised = np.logaddexp.reduce([values for values, _ in found]) - math.log(len(found))
        errors = np.max([errors for _, errors in found], axis=0)
        log_density, _ = columns.log_density(X, log_standardised.reshape(k, -1))
        return log_density, errors.reshape(k, -1).max(axis=0, initial=0.0)

    # --- samples and the base ---

    def sample(self, n_samples: int = 1, random_state: Any = None, return_log_density: bool = False) -> Any:
        """Rows drawn from the fitted density.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState, Generator or None
        return_log_density : bool, default=False
            Also give the rows' log-densities.

        Returns
        -------
        array of shape (n_samples, n_features_in_), and one of shape (n_samples,) on request
            Discrete columns are rounded to their lattices.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 0:
            raise ValueError(f"n_samples={n_samples!r} must be a whole number, 0 or more.")
        parts = seed_sequence(random_state).spawn(2)
        member = np.random.default_rng(parts[0]).integers(len(self._flows), size=int(n_samples))
        generator = torch_generator(parts[1])
        Z = np.zeros((int(n_samples), self.columns_.n_kept))
        for m, fitted in enumerate(self._flows):
            rows = member == m
            if fitted is not None and rows.any():
                flow = fitted.build(torch.float64, torch.device("cpu"))
                z = flow.base.sample(int(rows.sum()), generator)
                Z[rows] = in_blocks(
                    z, lambda block, flow=flow: flow.drawn(block, exact_solver(min(float(self.rtol), 1e-5)))[0]
                ).numpy()
        X = self.columns_.restore(refuse_nan(Z, "sample"))
        return (X, self._scored(X)[0]) if return_log_density else X

    def transform(self, X: Any) -> Array:
        """The rows' places in the base distribution."""
        X = self._validated(X)
        Z = torch.from_numpy(np.ascontiguousarray(self.columns_.standardise(self.columns_.centres(X))))
        if self.columns_.n_kept:
            flow = self._single().build(torch.float64, torch.device("cpu"))
            Z = in_blocks(Z, lambda block: flow.densities(block, exact_solver(min(float(self.rtol), 1e-6))).z)
        return refuse_nan(Z.numpy(), "place in the base")

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
        z = torch.from_numpy(places)
        if z.shape[1] != self.columns_.n_kept:
            raise ValueError(f"Z must have shape (n, {self.columns_.n_kept}); got {tuple(z.shape)}.")
        if self.columns_.n_kept:
            flow = self._single().build(torch.float64, torch.device("cpu"))
            z = in_blocks(z, lambda block: flow.drawn(block, exact_solver(min(float(self.rtol), 1e-6)))[0])
        return self.columns_.restore(refuse_nan(z.numpy(), "row of the table"))

    def _single(self) -> FittedFlow:
        if len(self._flows) > 1:
            raise ValueError(f"n_members={self.n_members} flows have no common base; use n_members=1 to transform.")
        flow = self._flows[0]
        assert flow is not None
        return flow


def _distinct(X: Array, weight: Array, seed: int) -> tuple[Array, Array]:
    """Each row once with its total weight, in an order that depends on content alone."""
    _, first, place = np.unique(row_keys(X, seed), return_index=True, return_inverse=True)
    total: Array = np.bincount(place, weights=weight).astype(np.float64)
    return X[first], total


def _start_of(base: Base) -> Callable[[Tensor], Tensor]:
    """From uniform numbers (n, 2 d) to draws of the path's start (n, d)."""
    if isinstance(base, StudentT):
        return base.drawn
    return lambda u: torch.special.ndtri(u[:, : base.n_dims])
