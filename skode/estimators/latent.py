"""LatentODERegressor: a latent ODE for irregular series as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin, _fit_context
from sklearn.callback import CallbackSupportMixin
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_array, check_consistent_length

from skode.estimators.arguments import SHARED_CONSTRAINTS
from skode.estimators.checks import unchanged_on_failure
from skode.estimators.containers import Container
from skode.estimators.fit_tasks import FitTask
from skode.estimators.fitted_latent import Array, FittedLatent, arrays_of, in_double, marginal
from skode.estimators.latent_inputs import series_keys
from skode.estimators.latent_queries import LatentQueries
from skode.estimators.latent_schedule import latent_options
from skode.estimators.series_scaling import LONGEST, SeriesScaling
from skode.estimators.table import Table
from skode.models import FAMILIES, LatentConfig, LatentODE, Series
from skode.models.forecast import ForecastOptions
from skode.models.predictive import Calibration
from skode.models.trajectories import fit_prior
from skode.panel import Panel
from skode.runtime import (
    as_array,
    resolve_device,
    resolve_dtype,
    seed_sequence,
    to_numpy,
    torch_dtype,
    torch_generator,
)
from skode.training import LatentData, LatentHistory, train_latent
from skode.training.calibration import calibrate, choose_stride

ENCODERS = ("kernel", "rnn", "ode_rnn", "attention")
FEWEST_ROWS = 8  # observed ones, to hold any out by default


class LatentODERegressor(LatentQueries, RegressorMixin, CallbackSupportMixin, BaseEstimator):
    """Irregular series by a latent ODE: interpolation, imputation, forecasts, and targets of whole series.

    Each series is a path of a latent state that follows an ordinary differential equation; an encoder reads the
    observations and tells the state at any time, a decoder tells the channels' distributions along the path [1]_ [2]_.
    What that misses of a normal channel's observations corrects the predictions nearby: by a first guess, unless what
    was held out tells otherwise.
    Every series has times of its own, and any channel may be unobserved at any of them. Times and values are scaled
    inside.

    Rows of X are series. X is a :class:`skode.Panel`, a long DataFrame (columns named by ``series_id`` and ``time``, or
    an index of series and times), a list of DataFrames, an array of shape (n_series, n_times, n_channels), or a table
    whose rows are series on one grid of times (0, 1, ..., or the numbers or datetimes of a frame's columns). NaN is
    unobserved; rows whose channels are all NaN are times at which predictions are wanted.

    Parameters
    ----------
    latent_dim : int, default=8
        Dimensions of the latent state.
    hidden_layer_sizes : int or sequence of int, default=(64, 64)
        Of the network in the dynamics, which have a stable linear part besides and so cannot run away.
    activation : str, default="tanh"
        Of that network.
    encoder : {"kernel", "rnn", "ode_rnn", "attention"}, default="kernel"
        Gaussian windows in time around any moment (linear in observations), a recurrent network backwards in time with
        gaps [1]_, one whose state follows an ODE between observations [2]_, or attention.
    encoder_layer_sizes : sequence of int, default=(128, 128)
    decoder_layer_sizes : sequence of int, default=(64,)
    likelihood : str, list of str or dict, default="gaussian"
        "gaussian", "student_t" (heavy tails), "bernoulli" (0 and 1) or "poisson" (counts): of all channels, of each, or
        by name (the others are gaussian). Noise is learned for each channel.
    point_process : bool, default=False
        Whether the times of observations are events of a Poisson process whose rate follows the state [1]_.
    window : (start, end) or None, default=None
        Times since each series' origin, in the panel's unit, between which events were looked for; None: from each
        series' first row to its last.
    series_id, time, values, static, covariates : labels or lists of labels, optional
        Columns of long frames: see :meth:`skode.Panel.from_long`. ``covariates`` are known inputs, at queries too.
    origin : {"series", "panel"} or time, default="series"
        Time 0 of frames and arrays: each series' start, or a common clock, which the encoder then reads.
    holdout : {"last", "random"}, default="last"
        What ``score`` predicts from the rest of each series: its last quarter or a random one.
    method : str, default="auto"
        Solver of predictions: "auto" is tsit5. Training takes a few RK4 steps.
    rtol, atol : float, default=1e-3, 1e-4
        Tolerances of the latent state, whose components are of the size of 1, in predictions; those of now.
    step_size : float, optional
        Of fixed-step methods, in median spans of the training series.
    max_num_steps : int, default=10000
    gradient : {"discrete", "adjoint", "reversible"}, default="discrete"
        In training; the RK4 steps are few, so that "discrete" is exact and costs little.
    device, dtype : default="auto"
        Of training. Predictions are computed in float64.
    alpha : float, default=1e-4
        Weight decay.
    kl_weight : float, default=0.3
        Weight of the divergence of the encoder's posterior from N(0, I).
    batch_size : int, default=100
        Windows of an update, at most; as many as there are series, or 16.
    learning_rate_init : float, default=8e-3
        Falls to 0 as a cosine.
    max_iter : int, optional
        Updates. None: 25 times the square root of the number of observed values, 600 at least and 3000 at most; with
        targets 3 times and 60 at least, for point processes 6 times.
    shuffle : bool, default=True
        Whether series come in random order.
    random_state : int, RandomState, Generator or None
    tol : float, default=0.0
        By which a held-out score must rise to count.
    verbose : bool, default=False
        Prints a line at each check.
    warm_start : bool, default=False
        Go on with the weights and scales of the last fit.
    early_stopping : "auto" or bool, default="auto"
        Whether a part is held out, and the weights that predict it best are kept: series where there are 100 (20 with
        targets), else parts of the series, after which training goes over all of them again. It also calibrates
        intervals. "auto": from 8 observed rows on.
    validation_fraction : float, default=0.15
        Held-out share of many series; of the rows of few series it is a quarter.
    n_iter_no_change : int, default=10
        Checks without a rise after which training ends; there are 20 of them, 10 updates apart at least.

    Attributes
    ----------
    n_features_in_ : int
        Channels, or times of a table.
    feature_names_in_ : array of str
        Of the channels, or of a table's columns, where all are strings.
    n_iter_, loss_, loss_curve_, best_loss_, validation_scores_, n_parameters_, dtype_, n_evals_
        Updates, losses an observation, held-out log-densities an observation, trained numbers, evaluations a series.
    horizon_stride_ : float or None
        How far forecasts go ahead before the forecast itself is read again, in the panel's unit of time.

    Notes
    -----
    Forecasts go on from the last observations; they hop: the forecast window is encoded anew every ``horizon_stride_``,
    which is chosen on what was held out. Predictive distributions widen with the distance from observations and
    with the disagreement of states encoded at several times; how much is learned from what was held out.

    References
    ----------
    .. [1] Chen, Rubanova, Bettencourt and Duvenaud (2018), Neural ordinary differential equations, section 5,
       arXiv:1806.07366.
    .. [2] Rubanova, Chen and Duvenaud (2019), Latent ODEs for irregularly-sampled time series, arXiv:1907.03907.

    Examples
    --------
    >>> import numpy as np
    >>> from skode import LatentODERegressor, Panel
    >>> t = np.sort(np.random.default_rng(0).uniform(0, 6, (30, 12)), axis=1)
    >>> panel = Panel.from_dense(np.sin(t)[:, :, None], times=t, origin=0.0)
    >>> model = LatentODERegressor(max_iter=60, random_state=0).fit(panel)
    >>> model.predict(panel, times=[1.0, 2.0, 7.0]).shape
    (30, 3, 1)
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **{
            name: constraint
            for name, constraint in SHARED_CONSTRAINTS.items()
            if name not in ("field", "energy_penalty", "error_penalty")
        },
        "latent_dim": [Interval(Integral, 1, None, closed="left")],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "encoder": [StrOptions(set(ENCODERS))],
        "encoder_layer_sizes": ["array-like"],
        "decoder_layer_sizes": ["array-like"],
        "likelihood": [StrOptions(set(FAMILIES)), list, tuple, Mapping],
        "point_process": ["boolean"],
        "window": [None, "array-like"],
        "series_id": "no_validation",
        "time": "no_validation",
        "values": "no_validation",
        "static": "no_validation",
        "covariates": "no_validation",
        "origin": "no_validation",
        "holdout": [StrOptions({"last", "random"})],
        "kl_weight": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [None, Interval(Integral, 0, None, closed="left")],
    }

    def __init__(
        self,
        latent_dim: int = 8,
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "tanh",
        encoder: str = "kernel",
        encoder_layer_sizes: Sequence[int] = (128, 128),
        decoder_layer_sizes: Sequence[int] = (64,),
        likelihood: Any = "gaussian",
        point_process: bool = False,
        window: Any = None,
        series_id: Hashable = None,
        time: Hashable = None,
        values: Any = None,
        static: Any = None,
        covariates: Any = None,
        origin: Any = "series",
        holdout: str = "last",
        method: str = "auto",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        step_size: float | None = None,
        max_num_steps: int = 10_000,
        gradient: str = "discrete",
        device: str | torch.device = "auto",
        dtype: Any = "auto",
        alpha: float = 1e-4,
        kl_weight: float = 0.3,
        batch_size: int = 100,
        learning_rate_init: float = 8e-3,
        max_iter: int | None = None,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 0.0,
        verbose: bool | int = False,
        warm_start: bool = False,
        early_stopping: str | bool = "auto",
        validation_fraction: float = 0.15,
        n_iter_no_change: int = 10,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.encoder = encoder
        self.encoder_layer_sizes = encoder_layer_sizes
        self.decoder_layer_sizes = decoder_layer_sizes
        self.likelihood = likelihood
        self.point_process = point_process
        self.window = window
        self.series_id = series_id
        self.time = time
        self.values = values
        self.static = static
        self.covariates = covariates
        self.origin = origin
        self.holdout = holdout
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_num_steps = max_num_steps
        self.gradient = gradient
        self.device = device
        self.dtype = dtype
        self.alpha = alpha
        self.kl_weight = kl_weight
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

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        tags.target_tags.required = False
        tags.target_tags.multi_output = True
        return tags

    # --- fit ---

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the series themselves, or one target or several for each series.

        Callbacks (``set_callbacks``, :mod:`skode.callbacks`) see each round of updates up to a check, and may end
        training after it.

        Parameters
        ----------
        X : Panel, DataFrame, list of DataFrames or array
            Rows are series.
        y : array-like of shape (n_series,) or (n_series, n_targets), optional
            With it ``predict(X)`` gives targets.

        Returns
        -------
        self

        Raises
        ------
        DivergenceError
            If training leaves the finite numbers; the object is then as it was before.
        """
        with unchanged_on_failure(self):
            self._fit(X, y)
        return self

    def _fit(self, X: Any, y: Any) -> None:
        fresh = not (self.warm_start and hasattr(self, "_fitted"))
        container, targets, data_dtype = self._read_training(X, y, fresh)
        panel = self._checked(container.panel, fresh)
        device = resolve_device(self.device, self.dtype)
        self.dtype_ = resolve_dtype(self.dtype, data_dtype, device)
        seeds = seed_sequence(self.random_state).spawn(3)
        families = self._families(panel.columns)
        self._check_support(panel, families)
        scaling = SeriesScaling.fit(panel, families) if fresh else self._fitted.scaling
        config = self._config(panel, scaling, families, 0 if targets is None else targets.shape[1], fresh)
        if not fresh and config != self._fitted.config:
            raise ValueError(
                f"warm_start goes on with the model of the last fit, {self._fitted.config}; the arguments and data now "
                f"make {config}. Set them back, or fit with warm_start=False."
            )
        series = scaling.series(panel, torch_dtype(self.dtype_), device, config.clock)
        model = self._model(config, seeds[0], device, fresh)
        windows = self._windows(panel, scaling.time)
        data = self._split(series, windows, targets, torch_generator(seeds[1]), self._validates(panel))
        report = Table(validated=bool(data.held_out)) if self.verbose else None
        options = latent_options(self, panel, with_targets=targets is not None, fresh=fresh)
        again = fresh and data.in_parts
        task = FitTask.root(self, options.n_rounds + again, X, y)

        none = np.empty(0, np.uint64)  # callbacks score series of the training on purpose

        def unwarned(fitted: LatentODERegressor) -> None:
            fitted._fitted = fitted._fitted._replace(training_keys=none)

        def keep(fitted: LatentODERegressor, history: LatentHistory) -> None:
            stride, calibration = self._judged(model, data)
            fitted._keep(deepcopy(model), config, scaling, series, stride, calibration, none, history)

        watcher = task.rounds("round", keep).watcher()
        history = train_latent(model, data, options, torch_generator(seeds[2]), report, watcher)
        stride, calibration = self._judged(model, data)
        if again and not history.stopped:
            # What was held out of the few series is trained on, too: once more, as far as the best weights were.
            options = replace(options, stop_after=history.best_update, steps_per_unit=history.steps_per_unit)
            refit = self._model(config, seeds[0], device, fresh)
            data = self._split(series, windows, targets, torch_generator(seeds[1]), False)
            part = task.subtask("refit", options.n_rounds)
            watcher = part.rounds("round", None).watcher()
            done = train_latent(refit, data, options, torch_generator(seeds[2]), watcher=watcher).n_updates
            model = refit if done == options.last else model
            part.end()
        keys = np.unique(series_keys(panel, 0))
        self._keep(model, config, scaling, series, stride, calibration, keys, history)
        task.end(unwarned)

    def _read_training(self, X: Any, y: Any, fresh: bool) -> tuple[Container, NDArray[Any] | None, np.dtype[Any]]:
        """Series, standardised targets, the data's dtype."""
        container, dtype = self._read(X, reset=fresh)
        if y is None:
            if not fresh and self._target_scale is not None:
                raise ValueError("warm_start goes on with a model of targets; give y, or fit with warm_start=False.")
            self._target_scale: tuple[Array, Array] | None = None
            self._one_dimensional = True
            return container, None, dtype
        Y = check_array(as_array(y), dtype=np.float64, ensure_2d=False, allow_nd=False, input_name="y")
        self._one_dimensional = Y.ndim == 1
        Y = Y.reshape(len(Y), -1)
        check_consistent_length(container.panel, Y)
        if fresh or self._target_scale is None:
            scale = Y.std(axis=0)
            self._target_scale = Y.mean(axis=0), np.where(scale > 0, scale, 1.0)
        return container, (Y - self._target_scale[0]) / self._target_scale[1], dtype

    def _config(
        self, panel: Panel, scaling: SeriesScaling, families: tuple[str, ...], n_targets: int, fresh: bool
    ) -> LatentConfig:
        """Of the arguments and the panel; a warm start keeps its clock and its rate of events."""
        if fresh:
            clock, base_rate = None, self._events_a_unit(panel, scaling)
            if self._shared_clock and len(panel.times):
                clock = (float(panel.times.min()) / scaling.time, float(panel.times.max()) / scaling.time)
        else:
            clock, base_rate = self._fitted.config.clock, self._fitted.config.base_rate
        sizes = (np.atleast_1d(np.asarray(part)) for part in self._sizes())
        hidden, encoder, decoder = (tuple(int(n) for n in part) for part in sizes)
        return LatentConfig(
            families,
            panel.covariates.shape[1],
            panel.static.shape[1],
            int(self.latent_dim),
            self.encoder,
            encoder,
            hidden,
            decoder,
            self.activation,
            bool(self.point_process),
            n_targets,
            clock=clock,
            base_rate=base_rate,
        )

    def _events_a_unit(self, panel: Panel, scaling: SeriesScaling) -> float:
        """Of scaled time, on the average; 1 unless there is a point process."""
        if not self.point_process:
            return 1.0
        seen = panel.rows(~np.isnan(panel.values).all(axis=1)) if panel.columns else panel
        ends = self._windows(seen, scaling.time)
        if ends is None:
            some = np.flatnonzero(seen.lengths > 0)
            firsts, lasts = seen.offsets[some], seen.offsets[some + 1] - 1
            ends = np.column_stack([seen.times[firsts], seen.times[lasts]]) / scaling.time
        total = float((ends[:, 1] - ends[:, 0]).sum())
        return len(seen.times) / total if total > 0 else 1.0

    def _sizes(self) -> tuple[Any, Any, Any]:
        for name in ("hidden_layer_sizes", "encoder_layer_sizes", "decoder_layer_sizes"):
            sizes = np.atleast_1d(np.asarray(getattr(self, name)))
            if sizes.ndim != 1 or (len(sizes) and (sizes.dtype.kind not in "iu" or sizes.min() < 1)):
                raise ValueError(f"{name} must be whole numbers above 0, got {getattr(self, name)!r}.")
        return self.hidden_layer_sizes, self.encoder_layer_sizes, self.decoder_layer_sizes

    def _model(
        self, config: LatentConfig, seed: np.random.SeedSequence, device: torch.device, fresh: bool
    ) -> LatentODE:
        if not fresh:
            return self._fitted.build(torch_dtype(self.dtype_), device)
        return LatentODE(config, torch_generator(seed)).to(torch_dtype(self.dtype_)).to(device)

    def _validates(self, panel: Panel) -> bool:
        """Whether a part is held out."""
        seen = ~np.isnan(panel.values).all(axis=1)
        return self.early_stopping is True or (self.early_stopping == "auto" and bool(seen.sum() >= FEWEST_ROWS))

    def _split(
        self,
        series: Series,
        windows: Array | None,
        targets: NDArray[Any] | None,
        generator: torch.Generator,
        validate: bool,
    ) -> LatentData:
        known = None if targets is None else torch.from_numpy(targets).to(series.values)
        return LatentData.split(
            series,
            generator,
            validate=validate,
            share=float(self.validation_fraction),
            windows=None if windows is None else torch.from_numpy(windows).to(series.times.device),
            targets=known,
        )

    def _judged(self, model: LatentODE, data: LatentData) -> tuple[float | None, Calibration]:
        """How far forecasts hop, and how far they may be off, by what was held out."""
        options, config = ForecastOptions(self._solver(), 0.5, LONGEST), model.config
        if not data.held_out or not config.families or config.n_targets:
            return options.stride, Calibration.plain(len(config.families))
        own = deepcopy(model).double().eval()
        held = [in_double(task) for task in data.held_out]
        stride = choose_stride(own, held, options)
        return stride, calibrate(own, held, replace(options, stride=stride))

    def _keep(
        self,
        model: LatentODE,
        config: LatentConfig,
        scaling: SeriesScaling,
        series: Series,
        stride: float | None,
        calibration: Calibration,
        training_keys: NDArray[np.uint64],
        history: LatentHistory,
    ) -> None:
        """Fitted attributes."""
        model = model.double().eval()
        series = series.to(dtype=torch.float64)
        prior = fit_prior(model, series, LONGEST)
        self._fitted = FittedLatent(
            config,
            arrays_of(model.to(torch_dtype(self.dtype_))),
            scaling,
            (to_numpy(prior.mean), to_numpy(prior.factor)),
            marginal(series),
            stride,
            calibration,
            training_keys,
            history.steps_per_unit,
        )
        self.horizon_stride_ = None if stride is None else stride * scaling.time
        self.n_iter_ = max(1, history.n_updates)
        self.loss_curve_ = history.losses
        self.loss_ = history.losses[-1] if history.losses else None
        self.best_loss_ = min(history.losses, default=None)
        self.validation_scores_ = history.validation_scores
        self.n_parameters_ = sum(array.size for array in self._fitted.arrays.values())
        self._n_features_out = model.n_dims
        self.n_evals_ = self._mean_evaluations(series)
