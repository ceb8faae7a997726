"""ODENetRegressor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import RegressorMixin, _fit_context
from sklearn.preprocessing import StandardScaler
from sklearn.utils import Tags

from skode.estimators.base import BaseODENet
from skode.estimators.checks import unchanged_on_failure
from skode.training import Regression


class ODENetRegressor(RegressorMixin, BaseODENet):
    """A neural network of continuous depth for regression.

    As :class:`ODENetClassifier`, with a linear read-out and squared loss on standardised targets [1]_.

    Parameters
    ----------
    hidden_layer_sizes : int, sequence of int or "auto", default="auto"
        Units of the field's hidden layers (channels, with ``image_shape``). "auto": one layer of 64.
    activation : {"tanh", "softplus", "silu", "logistic", "identity", "relu"}, default="tanh"
        Of the field's hidden layers. Smooth ones need fewer steps than "relu".
    n_members : int or "auto", default="auto"
        Independent networks whose outputs are averaged; they are trained and solved together, as one model. 1 is
        the paper's network. "auto": 8, or 1 with ``image_shape`` or ``field``.
    input_encoding : {"auto", "standard", "piecewise"}, default="auto"
        What the networks read: standardised columns, or columns encoded piecewise linearly between quantiles, which
        helps with thresholds. "auto": the latter for half of the members, on up to 200 columns.
    augment_dim : int, optional
        Zeros appended to the standardised columns to make the initial state (channels, with ``image_shape``). None: a
        linear lift (a convolutional stem) makes it instead.
    order : {1, 2}, default=1
        Whether the field is the state's derivative or its acceleration.
    time_dependent : bool, default=True
        Whether the field depends on the time.
    t1 : float, default=1.0
        Length of the integration interval [0, t1].
    image_shape : (channels, height, width), optional
        Rows of X are such images, flattened; the field is convolutional.
    field : callable, optional
        ``field(n_dims)`` returns an ``nn.Module`` that maps t ``(n, 1)`` and the state ``(n, n_dims)`` to its
        derivative; for ``order=2`` it is given positions and velocities ``(n, 2 n_dims)`` and returns accelerations.
        A class or a module-level function pickles. An instance is refused, since clones would share it.
    energy_penalty : float, default=0
        Weight of the mean kinetic energy of the path in the loss.
    error_penalty : float, default=1
        Strength of a penalty on the solver's squared error estimate, in units of the tolerance. It keeps the network
        from exploiting the coarse steps of training, so that predictions do not depend on the tolerance. 1 is what was
        found to cost no accuracy; 0 switches it off. Adaptive methods and ``gradient="discrete"`` only.
    method : str, default="auto"
        Solver, see :func:`skode.solver.solve`. "auto" goes by ``rtol``: predictions take "tsit5", from 2e-2 on the
        cheaper "bosh3", below 1e-5 "dopri8"; training takes "adaptive_midpoint" from 1e-3 on, "bosh3" from 1e-5 on,
        else "tsit5". Acts on predictions after the fit without a refit, like the next four.
    rtol, atol : float, default=1e-2, 1e-3
        Tolerances of a step.
    step_size : float, optional
        Step of a fixed-step method; a tenth of the interval if not given. Adaptive methods do without.
    max_num_steps : int, default=1000
        Limit of the steps of a row.
    gradient : {"discrete", "adjoint", "reversible"}, default="discrete"
        Exact gradients of the steps taken, or at constant memory the paper's adjoint equation, or exact gradients of
        steps that can be undone (experimental).
    device : str or torch.device, default="auto"
        "auto": CUDA if present, else MPS, else the CPU. Acts after the fit, too.
    dtype : {"auto", "float32", "float64"} or NumPy dtype, default="auto"
        "auto": X's on the CPU (integers: float64), float32 on accelerators.
    alpha : float, default=1e-4
        Strength of the L2 term, as in MLPClassifier.
    batch_size : int or "auto", default="auto"
        "auto" is 128. Batches of an epoch have equal sizes.
    learning_rate_init : float, default=0.015
        Adam's learning rate; constant for the first half of ``max_iter`` epochs, it then falls linearly to 0.
    max_iter : int, optional
        Epochs. None: 50, on small data as many as make 300 updates.
    shuffle : bool, default=True
        Whether batches are drawn in random order.
    random_state : int, RandomState, Generator or None, default=None
        Seeds weights, folds and batches. None takes fresh entropy; NumPy's and torch's global generators are not used.
    tol : float, default=1e-4
        Smallest improvement that counts.
    verbose : bool or int, default=False
        Print a line an epoch.
    warm_start : bool, default=False
        Start ``fit`` from the fitted weights and input scaling.
    early_stopping : bool or "auto", default="auto"
        Whether every member leaves rows out and keeps its weights of lowest loss on them. "auto": from 100 rows on.
    validation_fraction : float, default=0.1
        Share of the rows that a member leaves out; members leave out different ones.
    n_iter_no_change : int, default=10
        Epochs without improvement by ``tol`` after which training stops (with early stopping at least a quarter of
        ``max_iter``).

    Attributes
    ----------
    n_outputs_ : int
        Number of targets.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        If X had column names.
    n_iter_ : int
        Epochs run.
    loss_, best_loss_ : float
        Last and lowest training loss.
    loss_curve_ : list of float
        Training loss of every epoch, the members' mean.
    validation_scores_ : list of float or None
        R2 on the members' left-out rows.
    validation_epochs_ : list of int or None
        Epochs after which these were taken.
    n_parameters_ : int
        Of all members together.
    dtype_ : numpy.dtype
        What fit computed in, and predictions do.
    n_evals_ : float
        Evaluations of the field per row in the last epoch, the members' sum.
    n_evals_curve_ : list of float
        The same of every epoch.

    References
    ----------
    .. [1] R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, "Neural Ordinary Differential Equations",
       NeurIPS 2018. arXiv:1806.07366

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.model_selection import train_test_split
    >>> from skode import ODENetRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
    >>> model = ODENetRegressor(random_state=0).fit(X_train, y_train)
    >>> bool(model.score(X_test, y_test) > 0.3)
    True
    """

    _default_epochs: ClassVar[int] = 50
    _default_units: ClassVar[int] = 64
    _unit_variance: ClassVar[bool] = True
    _y_checks: ClassVar[dict[str, Any]] = {"multi_output": True, "y_numeric": True}

    def __init__(
        self,
        hidden_layer_sizes: Any = "auto",
        activation: str = "tanh",
        *,
        n_members: str | int = "auto",
        input_encoding: str = "auto",
        augment_dim: int | None = None,
        order: int = 1,
        time_dependent: bool = True,
        t1: float = 1.0,
        image_shape: tuple[int, int, int] | None = None,
        field: Callable[[int], torch.nn.Module] | None = None,
        energy_penalty: float = 0.0,
        error_penalty: float = 1.0,
        method: str = "auto",
        rtol: float = 1e-2,
        atol: float = 1e-3,
        step_size: float | None = None,
        max_num_steps: int = 1000,
        gradient: str = "discrete",
        device: str | torch.device = "auto",
        dtype: Any = "auto",
        alpha: float = 1e-4,
        batch_size: str | int = "auto",
        learning_rate_init: float = 1.5e-2,
        max_iter: int | None = None,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool | int = False,
        warm_start: bool = False,
        early_stopping: str | bool = "auto",
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            n_members,
            input_encoding,
            augment_dim,
            order,
            time_dependent,
            t1,
            image_shape,
            field,
            energy_penalty,
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

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Take one epoch of updates from where training stands.

        The first call fixes the scaling of inputs and targets.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,) or (n_samples, n_targets)
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        self
        """
        with unchanged_on_failure(self):
            return self._partial_fit(X, y, sample_weight)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _task(self) -> Regression:
        return Regression()

    def _average(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.mean(dim=0)

    def _learn_targets(
        self, y: NDArray[Any], sample_weight: NDArray[Any], *, fresh: bool, incremental: bool
    ) -> tuple[NDArray[Any], int]:
        columns = y.reshape(len(y), -1).astype(np.float64)
        if fresh:
            scaler = StandardScaler().fit(columns, sample_weight=sample_weight)
            self._target_mean, self._target_scale = scaler.mean_, scaler.scale_
            self._one_dimensional, self.n_outputs_ = y.ndim == 1, columns.shape[1]
        if columns.shape[1] != self.n_outputs_:
            raise ValueError(f"y has {columns.shape[1]} targets; the fitted model has {self.n_outputs_}.")
        return (columns - self._target_mean) / self._target_scale, self.n_outputs_

    def predict(self, X: Any) -> NDArray[Any]:
        """Predicted targets, the members' mean.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_targets), float64

        Raises
        ------
        SolverError
            If the solve fails for some row.
        """
        outputs = self._predictions(X).astype(np.float64)
        predictions: NDArray[Any] = outputs * self._target_scale + self._target_mean
        return predictions[:, 0] if self._one_dimensional else predictions
