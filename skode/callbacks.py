"""Callbacks for ``set_callbacks``: what training costs, where it stands on new data, what the model does meanwhile.

All keep their records in the process that made them, from workers of ``GridSearchCV(n_jobs=2)`` too, as scikit-learn's
:class:`~sklearn.callback.ScoringMonitor` does, whose ``get_logs`` they have.
"""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from sklearn.callback import ScoringMonitor
from sklearn.metrics import check_scoring

__all__ = ["EvaluationRecorder", "TrajectoryRecorder", "ValidationMonitor"]

NO_TARGETS = ()  # in place of y=None, which ScoringMonitor takes for nothing to score


class EvaluationRecorder(ScoringMonitor):
    """Records each epoch of training: its loss and validation score, evaluations of the field, seconds.

    Estimators that train by updates tell of the rounds between their checks, and count updates in ``epoch``. The model
    is not touched, so that recording costs next to nothing.

    ``get_logs().data_as_pandas`` has a row an epoch with the columns ``epoch, loss, validation_score`` (NaN where
    nothing was validated), ``n_evals`` (of a row, as in the estimator's ``n_evals_``; NaN for LatentODERegressor, which
    does not count them in training), ``seconds`` (since training began, callbacks included) and those that
    ``ScoringMonitor`` has.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.callbacks import EvaluationRecorder
    >>> recorder = EvaluationRecorder()
    >>> net = ODENetClassifier(max_iter=10, n_members=1, tol=0.1, random_state=0).set_callbacks(recorder)
    >>> net = net.fit(*load_iris(return_X_y=True))
    >>> records = recorder.get_logs().data_as_pandas
    >>> list(records["epoch"])[:5], bool((records["n_evals"] > 0).all())
    ([1, 2, 3, 4, 5], True)
    """

    def __init__(self) -> None:
        super().__init__(scoring=_numbers)

    def on_fit_task_end(self, estimator: Any, context: Any) -> None:
        """Record an epoch."""
        epoch = getattr(context, "epoch", None)
        if epoch is not None:
            super().on_fit_task_end(estimator, context, X=epoch, y=NO_TARGETS, fitted_estimator=estimator)


class TrajectoryRecorder(ScoringMonitor):
    """Records paths of some rows in the course of training.

    Of ODENetClassifier and ODENetRegressor it is the hidden state's path, ``trajectory(X, t)``; of
    ContinuousFlowDensity the rows' way from the base; of LatentODERegressor ``predict(X, times=t)``. The model is the
    one that ``fit`` would give if it ended with that epoch: with early stopping, the best so far.

    ``get_logs().data`` is a list of dictionaries, one for each recorded epoch, with ``epoch`` and ``trajectory``, an
    array of shape (n_rows, len(t), n_dims), besides what ``ScoringMonitor`` has.

    Parameters
    ----------
    X : array-like, DataFrame or Panel
        The rows, as ``predict`` takes them.
    t : array-like
        Times, as ``trajectory`` or ``predict`` takes them.
    every : int, default=1
        Epochs from one record to the next, the first being recorded.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.callbacks import TrajectoryRecorder
    >>> X, y = load_iris(return_X_y=True)
    >>> recorder = TrajectoryRecorder(X[:3], [0.0, 0.5, 1.0], every=4)
    >>> net = ODENetClassifier(max_iter=10, n_members=1, tol=0.1, random_state=0).set_callbacks(recorder).fit(X, y)
    >>> [(record["epoch"], record["trajectory"].shape[:2]) for record in recorder.get_logs().data]
    [(1, (3, 3)), (5, (3, 3)), (9, (3, 3))]
    """

    def __init__(self, X: Any, t: Any, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be 1 or more.")
        self.every = every
        super().__init__(scoring=_Paths(X, t))

    def setup(self, estimator: Any, context: Any) -> None:
        """Refuse estimators without paths.

        Raises
        ------
        TypeError
            If the estimator has neither ``trajectory`` nor predictions at times.
        """
        if not hasattr(estimator, "trajectory") and "times" not in signature(estimator.predict).parameters:
            raise TypeError(
                f"{type(estimator).__name__} has no trajectories to record: it has neither trajectory(X, t) nor "
                "predict(X, times=t). All estimators but ContinuousFlowRegressor do."
            )
        super().setup(estimator, context)

    def on_fit_task_end(self, estimator: Any, context: Any, *, fitted_estimator: Any = None) -> None:
        """Record an epoch if it is one of those chosen."""
        epoch = getattr(context, "epoch", None)
        if epoch is not None and fitted_estimator is not None and context.task_id % self.every == 0:
            super().on_fit_task_end(estimator, context, X=epoch, y=NO_TARGETS, fitted_estimator=fitted_estimator)


class ValidationMonitor(ScoringMonitor):
    """scikit-learn's ScoringMonitor with validation scores, and for estimators that learn without y, too.

    The model is the one that ``fit`` would give if it ended with that epoch: with early stopping, the best so far.
    ``get_logs().data_as_pandas`` has a row for each epoch and one for the whole fit, with the columns ``training`` and
    ``validation`` besides those that ``ScoringMonitor`` has.

    Parameters
    ----------
    X_val, y_val : array-like, optional
        Rows to validate on. Without them ``validation`` is the estimator's own last validation score, in the
        estimator's own measure (see its ``validation_scores_``), NaN if nothing was held out.
    scoring : str or callable, optional
        A scorer with a single value, as ``check_scoring`` of scikit-learn takes it; by default the ``score`` method.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import train_test_split
    >>> from skode import ODENetClassifier
    >>> from skode.callbacks import ValidationMonitor
    >>> X, X_val, y, y_val = train_test_split(*load_iris(return_X_y=True), random_state=0)
    >>> monitor = ValidationMonitor(X_val, y_val, scoring="neg_log_loss")
    >>> net = ODENetClassifier(max_iter=10, n_members=1, tol=0.1, random_state=0).set_callbacks(monitor).fit(X, y)
    >>> monitor.get_logs().data_as_pandas[["training", "validation"]].shape
    (11, 2)
    """

    def __init__(self, X_val: Any = None, y_val: Any = None, *, scoring: Any = None) -> None:
        super().__init__(scoring=_BothScores(X_val, y_val, scoring))

    def on_fit_task_end(
        self,
        estimator: Any,
        context: Any,
        *,
        X: Any = None,
        y: Any = None,
        metadata: Any = None,
        fitted_estimator: Any = None,
    ) -> None:
        """Score the model of this task, if it has one already."""
        super().on_fit_task_end(
            estimator,
            context,
            X=X,
            y=NO_TARGETS if y is None else y,
            metadata=metadata,
            fitted_estimator=fitted_estimator,
        )


def _numbers(estimator: Any, epoch: Any, y: Any) -> dict[str, float]:
    score = math.nan if epoch.validation_score is None else epoch.validation_score
    return {
        "epoch": epoch.number,
        "loss": epoch.loss,
        "validation_score": score,
        "n_evals": epoch.n_evals,
        "seconds": epoch.seconds,
    }


class _Paths:
    def __init__(self, X: Any, t: Any) -> None:
        self._X, self._t = X, t

    def __call__(self, fitted: Any, epoch: Any, y: Any) -> dict[str, Any]:
        if hasattr(fitted, "trajectory"):
            path = fitted.trajectory(self._X, self._t)
        else:
            path = fitted.predict(self._X, times=self._t)
        return {"epoch": epoch.number, "trajectory": path}


class _BothScores:
    def __init__(self, X_val: Any, y_val: Any, scoring: Any) -> None:
        self._X, self._y, self._scoring = X_val, y_val, scoring

    def __call__(self, fitted: Any, X: Any, y: Any, **metadata: Any) -> dict[str, float]:
        scorer = check_scoring(fitted, self._scoring)
        target = None if y is NO_TARGETS else y
        return {
            "training": float(scorer(fitted, X, target, **metadata)),
            "validation": self._validation(fitted, scorer),
        }

    def _validation(self, fitted: Any, scorer: Any) -> float:
        if self._X is not None:
            return float(scorer(fitted, self._X, self._y))
        own = getattr(fitted, "validation_scores_", None)
        return float(own[-1]) if own else math.nan
