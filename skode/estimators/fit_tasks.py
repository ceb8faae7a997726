"""A fit as scikit-learn's callbacks see it: a tree of tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

from sklearn.base import BaseEstimator

from skode.runtime import ALONE, together
from skode.training import Epoch, Watcher

# Sets the fitted attributes of an estimator, the first argument, as if the fit had ended with the second.
Keep = Callable[[Any, Any], None]


class FitTask:
    """A task of a fit that has begun.

    Parameters
    ----------
    estimator : BaseEstimator
        That is being fitted.
    context : sklearn.callback.CallbackContext
    given : dict
        ``X``, ``y`` and ``metadata``, as they came into ``fit``.
    """

    def __init__(self, estimator: BaseEstimator, context: Any, given: dict[str, Any]) -> None:
        self._estimator, self._context, self._given = estimator, context, given
        context.call_on_fit_task_begin(estimator=estimator, **given)

    @classmethod
    def root(
        cls, estimator: BaseEstimator, n_subtasks: int, X: Any, y: Any, sample_weight: Any = None, name: str = "fit"
    ) -> FitTask:
        """The whole fit, with ``n_subtasks`` at most."""
        context = estimator._init_callback_context(task_name=name, max_subtasks=n_subtasks)
        metadata = None if sample_weight is None else {"sample_weight": sample_weight}
        return cls(estimator, context, {"X": X, "y": y, "metadata": metadata})

    def subtask(self, name: str, n_subtasks: int = 0) -> FitTask:
        """A part of it; none at most unless told otherwise."""
        context = self._context.subcontext(task_name=name, max_subtasks=n_subtasks)
        return FitTask(self._estimator, context, self._given)

    def fit_within(self, name: str, other: BaseEstimator, fit: Callable[[], Any]) -> Any:
        """A part in which another estimator is fitted: its tasks become parts of this one."""
        context = self._context.subcontext(task_name=name)
        with context.propagate_callback_context(other):
            FitTask(self._estimator, context, self._given)
            found = fit()
        context.call_on_fit_task_end(estimator=self._estimator, **self._given)
        return found

    def end(self, keep: Callable[[Any], None] | None = None, epoch: Epoch | None = None) -> bool:
        """Whether a callback asks to stop.

        A callback that wants a fitted estimator gets a copy of this one to which ``keep`` was done; without ``keep``
        there is none yet. ``epoch`` can be read from the context.
        """
        self._context.epoch = epoch

        def attributes() -> dict[str, Any]:
            fitted = copy(self._estimator)
            if keep is not None:
                keep(fitted)
            return dict(vars(fitted))

        lazily = None if keep is None else attributes
        with together(ALONE):  # other processes of a data-parallel fit may have no callbacks, or others
            return bool(
                self._context.call_on_fit_task_end(
                    estimator=self._estimator, reconstruction_attributes=lazily, **self._given
                )
            )

    def end_fit(self) -> None:
        """Of the whole fit: the estimator is fitted."""
        self.end(lambda fitted: None)

    def rounds(self, name: str, keep: Keep | None) -> Rounds:
        """Parts that a training loop goes through."""
        return Rounds(self, name, keep)

    @property
    def is_watched(self) -> bool:
        """Whether there is any callback."""
        return bool(getattr(self._estimator, "_skl_callbacks", None))


class Rounds:
    """Epochs, or rounds from check to check, as parts of a task.

    Parameters
    ----------
    task : FitTask
    name : str
        Of each part.
    keep : callable, optional
        ``keep(estimator, found)`` does to the estimator what ``fit`` does with what training found. None: a callback
        gets no fitted estimator from these parts.
    """

    def __init__(self, task: FitTask, name: str, keep: Keep | None) -> None:
        self._task, self._name, self._keep = task, name, keep

    def watcher(self, found: Callable[[Any], Any] = lambda found: found) -> Watcher | None:
        """For a training loop, from whose state ``found`` makes what is to be kept; None without callbacks."""
        return _Watcher(self._task, self._name, self._keep, found) if self._task.is_watched else None


class _Watcher:
    def __init__(self, task: FitTask, name: str, keep: Keep | None, found: Callable[[Any], Any]) -> None:
        self._task, self._name, self._keep, self._found = task, name, keep, found

    def begin(self) -> None:
        self._part = self._task.subtask(self._name)

    def end(self, epoch: Epoch, ended: Callable[[], AbstractContextManager[Any]]) -> bool:
        keep = self._keep
        if keep is None:
            return self._part.end(None, epoch)

        def kept(estimator: Any) -> None:
            with ended() as state:
                keep(estimator, self._found(state))

        return self._part.end(kept, epoch)
