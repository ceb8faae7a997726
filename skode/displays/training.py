"""TrainingDisplay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from skode.displays.common import Panels, last_step, refuse
from skode.estimators.base import BaseODENet


class TrainingDisplay(Panels):
    """The course of a fit: losses, validation scores, evaluations of the field.

    Parameters
    ----------
    loss_curve : sequence of float
        One for each epoch, or for each check.
    validation_scores : sequence of float, optional
    validation_places : sequence of float, optional
        Where the validation scores stand on the axis of the losses, which are at 1, 2, ...; there by default.
    n_evals_curve : sequence of float, optional
        Evaluations of the field a row, at 1, 2, ...
    unit : str, default="epoch"
        What the losses are of.
    score_name : str, default="validation score"

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        Of the losses, the validation scores and the evaluations, as far as there are any.
    ax_, axes_, figure_
        The first axes, all of them (n_panels, 1), the figure.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.displays import TrainingDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODENetClassifier(max_iter=20, random_state=0).fit(X, y)
    >>> display = TrainingDisplay.from_estimator(model)
    >>> [ax.get_ylabel() for ax in display.axes_[:, 0]]
    ['loss', 'validation score', 'evaluations a row']
    """

    def __init__(
        self,
        loss_curve: Sequence[float],
        *,
        validation_scores: Sequence[float] | None = None,
        validation_places: Sequence[float] | None = None,
        n_evals_curve: Sequence[float] | None = None,
        unit: str = "epoch",
        score_name: str = "validation score",
    ) -> None:
        self.loss_curve = loss_curve
        self.validation_scores = validation_scores
        self.validation_places = validation_places
        self.n_evals_curve = n_evals_curve
        self.unit = unit
        self.score_name = score_name

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None, **kwargs: Any) -> Self:
        """The course of the last fit of an estimator.

        Parameters
        ----------
        estimator : fitted estimator of skode, or a pipeline that ends in one
        ax : matplotlib Axes or array of them, optional
            A single one is divided into as many panels as there are curves.
        **kwargs
            Of ``Axes.plot``.

        Returns
        -------
        TrainingDisplay

        Raises
        ------
        ValueError
            If there was nothing to train, so that there is no loss.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        model, _ = last_step(estimator)
        check_is_fitted(model)
        if not hasattr(model, "loss_curve_"):
            raise refuse(cls.__name__, model, "fitted estimators of skode")
        losses, scores = model.loss_curve_, model.validation_scores_ or None
        if not losses:
            raise ValueError(f"this {type(model).__name__} has no losses: its data were too few to train on.")
        places = getattr(model, "validation_epochs_", None)
        if scores is not None and places is None:
            scores, places = _aligned(scores, len(losses))
        display = cls(
            losses,
            validation_scores=scores,
            validation_places=places,
            n_evals_curve=getattr(model, "n_evals_curve_", None) or None,
            unit="epoch" if isinstance(model, BaseODENet) else "check",
        )
        return display.plot(ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> Self:
        """Draw one panel for each curve, one below the other.

        Parameters
        ----------
        ax : matplotlib Axes or array of them, optional
        **kwargs
            Of ``Axes.plot``.

        Returns
        -------
        self
        """
        curves = [
            ("loss", None, self.loss_curve),
            (self.score_name, self.validation_places, self.validation_scores),
            ("evaluations a row", None, self.n_evals_curve),
        ]
        curves = [curve for curve in curves if curve[2] is not None]
        axes = self._take_axes(ax, len(curves))[:, 0]
        self.lines_ = []
        for i, (panel, (name, places, values)) in enumerate(zip(axes, curves, strict=True)):
            x = np.arange(1, len(values or ()) + 1) if places is None else places
            style = {"color": f"C{i}", "marker": "." if len(x) < 40 else None} | kwargs
            self.lines_ += panel.plot(x, values, **style)
            panel.set_ylabel(name)
            panel.locator_params(axis="x", integer=True)
            if i:
                panel.sharex(axes[0])
            panel.tick_params(labelbottom=i == len(curves) - 1)
        axes[-1].set_xlabel(self.unit)
        self.figure_.align_ylabels(axes)
        return self


def _aligned(scores: Sequence[float], n: int) -> tuple[list[float], list[float]]:
    """Scores, and their places on the axis of n losses.

    A flow's last checks follow the losses by likelihood, one each, and one is before them. Without that phase there is
    one check before the losses and one after them.
    """
    if len(scores) < n:
        return list(scores), np.linspace(0, n, len(scores)).tolist()
    kept = list(scores)[-n - 1 :]
    return kept, [float(place) for place in range(n - len(kept) + 1, n + 1)]
