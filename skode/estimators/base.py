"""What ODENetClassifier and ODENetRegressor share: arguments, fitting, blocks of predictions, statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.base import _fit_context
from sklearn.callback import CallbackSupportMixin
from sklearn.model_selection import KFold
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from skode.estimators.agreement import check_agreement
from skode.estimators.arguments import SHARED_CONSTRAINTS, DocumentationLink
from skode.estimators.checks import (
    checked_image,
    checked_times,
    fold_numbers,
    require_success,
    unchanged_on_failure,
)
from skode.estimators.export import NetExport
from skode.estimators.fit_tasks import FitTask
from skode.estimators.fitted import FittedNet
from skode.estimators.methods import AUTO_METHODS, SLACK, USUAL_SLACK, Slack
from skode.estimators.namespaces import ArrayNamespaces
from skode.estimators.scaling import input_scale
from skode.estimators.table import Table
from skode.models import ODENet, ODENetConfig, SolverOptions
from skode.models.blocks import block_size, blocks
from skode.runtime import (
    as_array,
    current_peers,
    resolve_device,
    resolve_dtype,
    seed_sequence,
    to_numpy,
    to_tensor,
    torch_dtype,
    torch_generator,
)
from skode.runtime.device import check_dtype_on_device
from skode.solver import METHODS, Solution
from skode.training import History, ShardedRows, TrainingOptions, TrainingRows, train
from skode.training.tasks import Task

EARLY_STOPPING_ROWS = 100  # "auto": held-out rows decide from here on
LARGEST_ENCODED_WIDTH = 200  # columns; beyond, "auto" leaves the piecewise-linear encoding out
N_UPDATES = 300  # epochs of small data, if not given, make at least so many updates


class BaseODENet(DocumentationLink, CallbackSupportMixin, NetExport, ArrayNamespaces):
    """Base class; see :class:`ODENetClassifier` for the arguments."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **SHARED_CONSTRAINTS,
        "hidden_layer_sizes": [StrOptions({"auto"}), "array-like", Interval(Integral, 1, None, closed="left")],
        "n_members": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "input_encoding": [StrOptions({"auto", "standard", "piecewise"})],
        "augment_dim": [None, Interval(Integral, 0, None, closed="left")],
        "order": [Interval(Integral, 1, 2, closed="both")],
        "time_dependent": ["boolean"],
        "t1": [Interval(Real, 0, None, closed="neither")],
        "image_shape": [None, tuple, list],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [None, Interval(Integral, 1, None, closed="left")],
    }

    _fits_in_parallel: ClassVar[bool] = True
    _default_members: ClassVar[int] = 8
    _default_epochs: ClassVar[int]
    _default_units: ClassVar[int]
    _unit_variance: ClassVar[bool]  # of the piecewise-linear encoding

    def __init__(
        self,
        hidden_layer_sizes: Any,
        activation: str,
        n_members: str | int,
        input_encoding: str,
        augment_dim: int | None,
        order: int,
        time_dependent: bool,
        t1: float,
        image_shape: tuple[int, int, int] | None,
        field: Callable[[int], torch.nn.Module] | None,
        energy_penalty: float,
        error_penalty: float,
        method: str,
        rtol: float,
        atol: float,
        step_size: float | None,
        max_num_steps: int,
        gradient: str,
        device: str | torch.device,
        dtype: Any,
        alpha: float,
        batch_size: str | int,
        learning_rate_init: float,
        max_iter: int | None,
        shuffle: bool,
        random_state: Any,
        tol: float,
        verbose: bool | int,
        warm_start: bool,
        early_stopping: str | bool,
        validation_fraction: float,
        n_iter_no_change: int,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.n_members = n_members
        self.input_encoding = input_encoding
        self.augment_dim = augment_dim
        self.order = order
        self.time_dependent = time_dependent
        self.t1 = t1
        self.image_shape = image_shape
        self.field = field
        self.energy_penalty = energy_penalty
        self.error_penalty = error_penalty
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_num_steps = max_num_steps
        self.gradient = gradient
        self.device = device
        self.dtype = dtype
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    # --- what the two estimators differ in ---

    @abstractmethod
    def _task(self) -> Task:
        """Loss and score."""

    @abstractmethod
    def _learn_targets(
        self, y: NDArray[Any], sample_weight: NDArray[Any], *, fresh: bool, incremental: bool
    ) -> tuple[NDArray[Any], int]:
        """Targets as the task wants them, and the number of outputs; sets what predictions need to undo it."""

    def _validate_targets(self, X: Any, y: Any, reset: bool) -> tuple[NDArray[Any], NDArray[Any]]:
        """X and y as scikit-learn validates them."""
        return validate_data(self, X, y, dtype=(np.float64, np.float32), reset=reset, **self._y_checks)  # type: ignore[no-any-return]

    _y_checks: ClassVar[dict[str, Any]] = {}

    def _row_weights(self, y: NDArray[Any], sample_weight: NDArray[Any]) -> NDArray[Any]:
        """Sample weights, times the classes' for the classifier."""
        return sample_weight

    def _folds(self, n_rows: int, target: NDArray[Any], n_folds: int, seed: int) -> NDArray[Any]:
        """The fold of every row, all processes' rows one behind the other; ``target`` is of those that are here."""
        return fold_numbers(KFold(n_folds, shuffle=True, random_state=seed).split(np.empty(n_rows)), n_rows)

    # --- fit ---

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to training data.

        Callbacks (``set_callbacks``, :mod:`skode.callbacks`) see each epoch, and may end training after it.

        Parameters
        ----------
        X : array-like, DataFrame or tensor of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or, for the regressor, (n_samples, n_targets)
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
            fresh = not (self.warm_start and hasattr(self, "_net"))
            self._fit(X, y, sample_weight, fresh=fresh, incremental=False)
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        """See the estimators' ``partial_fit``, which put all back if it fails."""
        if self.early_stopping is True:
            raise ValueError("partial_fit does not support early_stopping=True; set early_stopping=False or 'auto'.")
        self._fit(X, y, sample_weight, fresh=not hasattr(self, "_net"), incremental=True)
        return self

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, fresh: bool, incremental: bool) -> None:
        given = X, y, sample_weight
        X, y = self._validate_targets(as_array(X), as_array(y), reset=fresh)
        device = resolve_device(self.device, self.dtype)
        if fresh:
            self.dtype_ = resolve_dtype(self.dtype, X.dtype, device)
        check_dtype_on_device(self.dtype_, device)
        sample_weight = _check_sample_weight(
            as_array(sample_weight), X, dtype=np.float64, ensure_non_negative=True, allow_all_zero_weights=False
        )
        peers = current_peers()
        check_agreement(self, X, y, fresh, peers)
        seeds = peers.share(seed_sequence(self.random_state)).spawn(3)
        target, n_outputs = self._learn_targets(y, sample_weight, fresh=fresh, incremental=incremental)
        weights = self._row_weights(y, sample_weight)
        counted = weights > 0
        if not counted.all():
            X, target, weights, sample_weight = (part[counted] for part in (X, target, weights, sample_weight))
        model = self._make_model(X, sample_weight, n_outputs, seeds[0], fresh, device)
        rows = self._training_rows(model, X, target, weights, int(seeds[1].generate_state(1)[0]), incremental)
        options, whole = self._training_options(rows, incremental), fresh or not incremental
        fit = FitTask.root(self, options.max_iter, *given, name="partial_fit" if incremental else "fit")
        history = train(
            model,
            self._task(),
            rows,
            self._training_solver(),
            options,
            torch_generator(seeds[2]),
            moments=list(self._net.moments) if incremental and not fresh else None,
            report=Table(rows.folds is not None) if self.verbose and not peers.rank else None,
            watcher=fit.rounds("epoch", lambda fitted, found: fitted._keep(model, found, whole)).watcher(),
        )
        self._keep(model, history, whole)
        fit.end_fit()

    def _make_model(
        self,
        X: NDArray[Any],
        sample_weight: NDArray[Any],
        n_outputs: int,
        seed: np.random.SeedSequence,
        fresh: bool,
        device: torch.device,
    ) -> ODENet:
        if not fresh:
            return self._net.build(torch_dtype(self.dtype_), device).train()
        config = self._config(X.shape[1], n_outputs)
        scale = input_scale(X, sample_weight, config, self._unit_variance)
        n_units = 0 if scale.encoding is None else len(scale.encoding.column)
        # Constant columns have no units; without any, every member reads the columns as they are.
        config = replace(config, n_units=n_units, n_encoded=config.n_encoded if n_units else 0)
        model = ODENet(config, torch_generator(seed)).to(torch_dtype(self.dtype_))
        model.inputs.set(scale)
        return model.to(device)

    def _config(self, n_features: int, n_outputs: int) -> ODENetConfig:
        sizes = self._layer_sizes()
        image = None if self.image_shape is None else checked_image(self.image_shape, n_features)
        own = image is not None or self.field is not None
        if isinstance(self.field, torch.nn.Module):
            raise TypeError(
                "field is an nn.Module instance, which every clone and fold would share; pass a callable that makes "
                "one: field=lambda n_dims: MyField(n_dims), or the class itself."
            )
        members = (1 if own else self._default_members) if self.n_members == "auto" else int(self.n_members)
        plain = own or self.augment_dim is not None or self.input_encoding == "standard"
        n_encoded = 0
        if self.input_encoding == "piecewise":
            if plain:
                raise ValueError(
                    "input_encoding='piecewise' needs the linear lift: no augment_dim, image_shape or field."
                )
            n_encoded = members
        elif not plain and n_features <= LARGEST_ENCODED_WIDTH:
            n_encoded = members // 2
        return ODENetConfig(
            n_features=n_features,
            n_outputs=n_outputs,
            n_members=members,
            n_encoded=n_encoded,
            hidden_layer_sizes=sizes,
            activation=self.activation,
            time_dependent=bool(self.time_dependent),
            augment_dim=self.augment_dim,
            order=int(self.order),
            t1=float(self.t1),
            image_shape=image,
            field=self.field,
        )

    def _layer_sizes(self) -> tuple[int, ...]:
        sizes = self.hidden_layer_sizes
        if isinstance(sizes, str):
            return (self._default_units,)
        sizes = tuple(int(size) for size in np.atleast_1d(sizes))
        if any(size < 1 for size in sizes):
            raise ValueError(f"hidden_layer_sizes must be positive, got {self.hidden_layer_sizes!r}.")
        return sizes

    def _training_rows(
        self,
        model: ODENet,
        X: NDArray[Any],
        target: NDArray[Any],
        weights: NDArray[Any],
        seed: int,
        incremental: bool,
    ) -> TrainingRows:
        stopping = self.early_stopping
        peers = current_peers()
        n_all = peers.rows(len(X)).total
        if stopping == "auto":
            stopping = n_all >= EARLY_STOPPING_ROWS
        folds = None
        if stopping and not incremental:
            n_folds = max(2, round(1 / self.validation_fraction))
            if n_all < n_folds:
                raise ValueError(
                    f"early_stopping with validation_fraction={self.validation_fraction} needs at least {n_folds} "
                    f"rows; got {n_all}. Set early_stopping=False."
                )
            folds = self._folds(n_all, target, n_folds, seed)
        device, dtype = model.head.weight.device, model.head.weight.dtype
        y = to_tensor(target, torch.int64 if target.dtype.kind in "iu" else dtype, device)
        tensors = to_tensor(X, dtype, device), y, to_tensor(weights, dtype, device)
        if peers.size == 1:
            return TrainingRows(*tensors, model.config.n_members, folds)
        return ShardedRows(*tensors, model.config.n_members, folds, peers)

    def _training_options(self, rows: TrainingRows, incremental: bool) -> TrainingOptions:
        batch_size = 128 if self.batch_size == "auto" else int(self.batch_size)
        n_batches = max(1, round(rows.n_rows / batch_size))
        epochs = max(self._default_epochs, -(-N_UPDATES // n_batches)) if self.max_iter is None else int(self.max_iter)
        return TrainingOptions(
            max_iter=1 if incremental else epochs,
            batch_size=batch_size,
            learning_rate_init=float(self.learning_rate_init),
            alpha=float(self.alpha),
            tol=float(self.tol),
            n_iter_no_change=int(self.n_iter_no_change),
            shuffle=bool(self.shuffle),
            decay=not incremental,
            error_penalty=self._training_slack().weight,
            energy_penalty=float(self.energy_penalty),
        )

    def _training_slack(self) -> Slack:
        """Of the training method; none where the error is not estimated or not differentiable."""
        method = self._method(training=True)
        if self.error_penalty == 0 or not METHODS[method].adaptive or self.gradient != "discrete":
            return Slack(1.0, 0.0)
        slack = SLACK.get(method, USUAL_SLACK)
        # The solver tells errors in units of its own, slackened tolerance.
        return Slack(slack.tolerances, float(self.error_penalty) * slack.weight * slack.tolerances**2)

    def _training_solver(self) -> SolverOptions:
        options, slack = self._solver_options(training=True), self._training_slack().tolerances
        return replace(options, rtol=options.rtol * slack, atol=options.atol * slack, gradient=self.gradient)

    def _solver_options(self, *, training: bool = False) -> SolverOptions:
        method = self._method(training=training)
        return SolverOptions(
            method=method,
            rtol=float(self.rtol),
            atol=float(self.atol),
            step_size=None if self.step_size is None or METHODS[method].adaptive else float(self.step_size),
            max_num_steps=int(self.max_num_steps),
        )

    def _method(self, *, training: bool) -> str:
        if self.method != "auto":
            return str(self.method)
        _, in_training, in_prediction = next(row for row in AUTO_METHODS if self.rtol >= row[0])
        return in_training if training else in_prediction

    def _keep(self, model: ODENet, history: History, whole: bool) -> None:
        """Fitted attributes, all of them NumPy or plain Python."""
        arrays = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
        arrays, moments = current_peers().share((arrays, tuple(history.moments or ())))  # rounding may differ
        self._net = FittedNet(model.config, arrays, self.gradient, moments)
        self.n_parameters_ = sum(parameter.numel() for parameter in model.parameters())
        if whole:
            self.n_iter_, self.loss_curve_ = history.n_iter, history.loss_curve
            self.n_evals_curve_ = history.n_evals_curve
            self.validation_scores_, self.validation_epochs_ = history.validation_scores, history.validation_epochs
        else:
            self.n_iter_ += history.n_iter
            self.loss_curve_ = [*self.loss_curve_, *history.loss_curve]
            self.n_evals_curve_ = [*self.n_evals_curve_, *history.n_evals_curve]
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else None
        self.best_loss_ = min(self.loss_curve_, default=None)
        self.n_evals_ = history.n_evals

    # --- predictions ---

    def _prepare(self, X: Any) -> tuple[ODENet, Tensor]:
        """The model and the validated rows, on the device of now."""
        check_is_fitted(self)
        X = validate_data(self, as_array(X), dtype=(np.float64, np.float32), reset=False)
        device = resolve_device(self.device, self.dtype_)
        check_dtype_on_device(self.dtype_, device)
        self._validate_params()
        return self._net.build(torch_dtype(self.dtype_), device), to_tensor(X, torch_dtype(self.dtype_), device)

    def _solutions(
        self, model: ODENet, X: Tensor, times: list[float] | None = None
    ) -> Iterator[tuple[slice, Solution]]:
        """Solve in blocks of one fixed shape."""
        options = self._solver_options()
        for rows, block in blocks(X, block_size(model.config.n_members, model.n_dims)):
            with torch.no_grad():
                yield rows, model.solve_rows(block, options, times)

    @abstractmethod
    def _average(self, outputs: Tensor) -> Tensor:
        """Of all members' outputs (n_members, n, n_outputs), the prediction (n, n_outputs)."""

    def _predictions(self, X: Any) -> NDArray[Any]:
        """The members' averaged outputs, shape (n, n_outputs)."""
        model, rows = self._prepare(X)
        config = model.config
        out = np.empty((len(rows), config.n_outputs), dtype=self.dtype_)
        for place, solution in self._solutions(model, rows):
            require_success(solution, place, config.n_members)
            with torch.no_grad():
                out[place] = self._average(model.read_out(solution.y1))[: place.stop - place.start].cpu().numpy()
        return out

    def solver_stats(self, X: Any) -> pd.DataFrame:
        """What the solver did for every row; never raises for a failed solve.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        DataFrame
            One row per row of X, with X's index if it has one: ``n_evals, n_steps, n_rejected`` (sums over members) and
            ``status`` (the worst of them; 0 is success, see :class:`skode.solver.Status`).
        """
        model, rows = self._prepare(X)
        columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("n_evals", "n_steps", "n_rejected", "status")}
        for place, solution in self._solutions(model, rows):
            n = place.stop - place.start
            for name, parts in columns.items():
                values = to_numpy(getattr(solution, name)).reshape(model.config.n_members, -1)[:, :n]
                parts.append(values.max(axis=0) if name == "status" else values.sum(axis=0))
        index = X.index if isinstance(X, pd.DataFrame) else None
        return pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()}, index=index)

    def trajectory(self, X: Any, t: Any, *, member: int = 0) -> NDArray[Any]:
        """The hidden state's path through the ODE block.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        t : array-like of shape (m,)
            Times in [0, t1], ascending.
        member : int, default=0
            Whose state.

        Returns
        -------
        ndarray of shape (n_samples, m, n_dims)
            For ``order=2`` positions, then velocities.

        Raises
        ------
        ValueError
            If times or member do not exist.
        SolverError
            If the solve fails for some row.
        """
        model, rows = self._prepare(X)
        config = model.config
        if not 0 <= member < config.n_members:
            raise ValueError(f"member={member} does not exist; there are members 0 to {config.n_members - 1}.")
        times = checked_times(t, config.t1)
        path = np.empty((len(rows), len(times), model.n_dims), dtype=self.dtype_)
        for place, solution in self._solutions(model, rows, [0.0, *times, config.t1]):
            require_success(solution, place, config.n_members)
            size = len(solution.y) // config.n_members
            own = solution.y[member * size : member * size + place.stop - place.start]
            path[place] = own[:, 1:-1].cpu().numpy()
        return path
