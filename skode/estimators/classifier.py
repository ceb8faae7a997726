"""ODENetClassifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.model_selection import StratifiedKFold
from sklearn.utils import column_or_1d, compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets

from skode.estimators.base import BaseODENet
from skode.estimators.checks import fold_numbers, unchanged_on_failure
from skode.training import Classification


class ODENetClassifier(ClassifierMixin, BaseODENet):
    """A neural network of continuous depth for classification.

    A row is standardised, lifted to a hidden state, carried by a learned ordinary differential equation from t = 0 to
    t1, and read out by a linear layer with a softmax [1]_. A solver with error control does the carrying, so accuracy
    can be traded for speed even after the fit.

    Parameters
    ----------
    hidden_layer_sizes : int, sequence of int or "auto", default="auto"
        Units of the field's hidden layers (channels, with ``image_shape``). "auto": one layer of 32.
    activation : {"tanh", "softplus", "silu", "logistic", "identity", "relu"}, default="tanh"
        Of the field's hidden layers. Smooth ones need fewer steps than "relu".
    n_members : int or "auto", default="auto"
        Independent networks whose probabilities are averaged; they are trained and solved together, as one model. 1 is
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
        Epochs. None: 40, on small data as many as make 300 updates.
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
    class_weight : dict, "balanced" or None, default=None
        Weights of the classes.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
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
        Accuracy on the members' left-out rows.
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
    >>> from sklearn.datasets import load_wine
    >>> from sklearn.model_selection import train_test_split
    >>> from skode import ODENetClassifier
    >>> X, y = load_wine(return_X_y=True)
    >>> X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
    >>> model = ODENetClassifier(random_state=0).fit(X_train, y_train)
    >>> bool(model.score(X_test, y_test) > 0.9)
    True
    >>> coarse = model.set_params(rtol=0.1).predict_proba(X_test)  # cheaper, without a refit
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BaseODENet._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }
    _default_epochs: ClassVar[int] = 40
    _default_units: ClassVar[int] = 32
    _unit_variance: ClassVar[bool] = False
    _y_checks: ClassVar[dict[str, Any]] = {}

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
        class_weight: dict[Any, float] | str | None = None,
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
        self.class_weight = class_weight

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Take one epoch of updates from where training stands.

        The first call fixes classes, input scaling and encoding.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
        classes : array-like, optional
            All classes that will ever come; needed in the first call.
        sample_weight : array-like of shape (n_samples,), optional

        Returns
        -------
        self
        """
        with unchanged_on_failure(self):
            _check_partial_fit_first_call(self, classes)
            return self._partial_fit(X, y, sample_weight)

    def _task(self) -> Classification:
        return Classification()

    def _average(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.softmax(dim=-1).mean(dim=0)

    def _learn_targets(
        self, y: NDArray[Any], sample_weight: NDArray[Any], *, fresh: bool, incremental: bool
    ) -> tuple[NDArray[Any], int]:
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        present = np.unique(y[sample_weight > 0])
        if fresh and not incremental:
            self.classes_ = present
            if len(present) < 2:
                raise ValueError(
                    f"ODENetClassifier needs samples of at least 2 classes, but the data contains only one class: "
                    f"{present[0]!r}"
                )
        unknown = np.setdiff1d(present, self.classes_)
        if len(unknown):
            raise ValueError(f"y holds classes {unknown.tolist()} that are not among {self.classes_.tolist()}.")
        codes = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        return codes.astype(np.int64), len(self.classes_)

    def _row_weights(self, y: NDArray[Any], sample_weight: NDArray[Any]) -> NDArray[Any]:
        if self.class_weight is None:
            return sample_weight
        weights: NDArray[Any] = sample_weight * compute_sample_weight(self.class_weight, y)
        return weights

    def _folds(self, X: NDArray[Any], target: NDArray[Any], n_folds: int, seed: int) -> NDArray[Any]:
        # Classes with fewer rows than folds stay out of the stratification (it would only warn or refuse).
        counts = np.bincount(target)
        strata = np.where(counts[target] >= n_folds, target, len(counts))
        if np.bincount(strata).max() < n_folds or 0 < (strata == len(counts)).sum() < n_folds:
            return super()._folds(X, target, n_folds, seed)
        return fold_numbers(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(X, strata), len(X))

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Logarithms of the averaged probabilities; their difference for two classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,) for two classes, else (n_samples, n_classes)
        """
        logarithms = self.predict_log_proba(X)
        return logarithms[:, 1] - logarithms[:, 0] if logarithms.shape[1] == 2 else logarithms

    def predict_log_proba(self, X: Any) -> NDArray[Any]:
        """Logarithms of the probabilities.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
        """
        with np.errstate(divide="ignore"):
            logarithms: NDArray[Any] = np.log(self.predict_proba(X))
        return logarithms

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Probabilities of the classes, the members' mean.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)

        Raises
        ------
        SolverError
            If the solve fails for some row.
        """
        return self._predictions(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        probabilities = self.predict_proba(X)
        labels: NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return labels
