"""ToleranceDisplay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import numpy as np
from sklearn.metrics import check_scoring
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from skode.displays.common import Array, Panels, last_step, refuse
from skode.metrics import n_evals_score


class ToleranceDisplay(Panels):
    """Score and cost against the solver's tolerance (Chen et al. 2018, figure 3).

    Parameters
    ----------
    tolerance : array-like of shape (m,)
        Values of the parameter, above 0.
    score, cost : array-like of shape (m,)
    score_std : array-like of shape (m,), optional
        Half of the height of the band around the score.
    param_name, score_name, cost_name : str
        Labels.

    Attributes
    ----------
    score_line_, cost_line_ : matplotlib Line2D
    band_ : PolyCollection or None
    ax_, axes_, figure_
        Axes of the scores; those and the axes of the cost (1, 2), which is on the right; the figure.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.displays import ToleranceDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODENetClassifier(max_iter=20, random_state=0).fit(X, y)
    >>> display = ToleranceDisplay.from_estimator(model, X, y, rtol=[1e-1, 1e-3])
    >>> bool(display.cost[0] < display.cost[1])
    True
    """

    def __init__(
        self,
        tolerance: Any,
        score: Any,
        cost: Any,
        *,
        score_std: Any = None,
        param_name: str = "rtol",
        score_name: str = "score",
        cost_name: str = "evaluations a row",
    ) -> None:
        self.tolerance = tolerance
        self.score = score
        self.cost = cost
        self.score_std = score_std
        self.param_name = param_name
        self.score_name = score_name
        self.cost_name = cost_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any = None,
        *,
        rtol: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6),
        scoring: Any = None,
        scale_atol: bool = False,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Predict with other tolerances, without a refit, by a copy of the estimator.

        Log-densities of flows do not depend on ``rtol``: theirs is a flat line.

        Parameters
        ----------
        estimator : fitted estimator of skode, or a pipeline that ends in one
            It stays as it is.
        X : array-like or Panel
        y : array-like, optional
        rtol : sequence of float
        scoring : str, callable or None
            As in ``cross_validate``; None: the estimator's own ``score``.
        scale_atol : bool, default=False
            Whether ``atol`` follows, at the ratio that it has to ``rtol`` in the estimator; else it stays.
        ax : matplotlib Axes, optional
        **kwargs
            Of ``Axes.plot``, for both lines.

        Returns
        -------
        ToleranceDisplay
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        check_is_fitted(estimator)
        again = deepcopy(estimator)
        model, _ = last_step(again)
        if not hasattr(model, "solver_stats"):
            raise refuse(cls.__name__, model, "fitted estimators of skode")
        scorer = check_scoring(again, scoring=scoring)
        ratio = model.atol / model.rtol
        scores, costs = [], []
        for tolerance in rtol:
            model.set_params(rtol=tolerance, **({"atol": ratio * tolerance} if scale_atol else {}))
            scores.append(scorer(again, X) if y is None else scorer(again, X, y))
            costs.append(n_evals_score(again, X))
        display = cls(
            np.asarray(rtol, dtype=np.float64),
            np.asarray(scores),
            np.asarray(costs),
            score_name=scoring if isinstance(scoring, str) else "score",
        )
        return display.plot(ax, **kwargs)

    @classmethod
    def from_cv_results(
        cls,
        cv_results: Mapping[str, Any],
        *,
        param: str = "rtol",
        metric: str = "score",
        cost: str = "score_time",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """The results of a search over a tolerance: means over the folds, with one standard deviation.

        If other parameters were searched as well, each tolerance shows its best setting of them.

        Parameters
        ----------
        cv_results : dict
            ``cv_results_`` of GridSearchCV and its like.
        param : str, default="rtol"
            The parameter; that of a pipeline's step may be named without the step.
        metric : str, default="score"
            Of a search with several metrics: its name.
        cost : str, default="score_time"
            "score_time" or "fit_time", in seconds, or the name of a metric.
        ax : matplotlib Axes, optional
        **kwargs
            Of ``Axes.plot``, for both lines.

        Returns
        -------
        ToleranceDisplay

        Raises
        ------
        ValueError
            If the results do not have the parameter, the metric or the cost.
        """
        check_matplotlib_support(f"{cls.__name__}.from_cv_results")
        values = np.asarray(cv_results[_column(cv_results, param)], dtype=np.float64)
        mean, std = (_found(cv_results, f"{part}_test_{metric}") for part in ("mean", "std"))
        spent = _found(cv_results, f"mean_{cost}" if cost in ("score_time", "fit_time") else f"mean_test_{cost}")
        rows = np.array([_best(cv_results, values == value, mean) for value in np.unique(values)])
        display = cls(
            values[rows],
            mean[rows],
            spent[rows],
            score_std=std[rows],
            param_name=param,
            score_name=f"cross-validated {metric}",
            cost_name=f"{cost.replace('_', ' ')} [s]" if cost.endswith("_time") else cost.replace("_", " "),
        )
        return display.plot(ax, **kwargs)

    def plot(self, ax: Any = None, **kwargs: Any) -> Self:
        """Draw the score on the left axis and the cost on the right one, loose tolerances first.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        **kwargs
            Of ``Axes.plot``, for both lines.

        Returns
        -------
        self
        """
        left = self._take_axes(ax)[0, 0]
        right = left.twinx()
        self.axes_ = np.array([[left, right]], dtype=object)
        order = np.argsort(self.tolerance)
        x, score, cost = (np.asarray(part, dtype=np.float64)[order] for part in (self.tolerance, self.score, self.cost))
        (self.cost_line_,) = right.plot(x, cost, **{"color": "C1", "marker": "s", "linestyle": "--"} | kwargs)
        (self.score_line_,) = left.plot(x, score, **{"color": "C0", "marker": "o"} | kwargs)
        self.band_ = None
        if self.score_std is not None:
            std = np.asarray(self.score_std)[order]
            colour = self.score_line_.get_color()
            self.band_ = left.fill_between(x, score - std, score + std, color=colour, alpha=0.2, linewidth=0)
        left.set_zorder(right.get_zorder() + 1)  # scores lie above costs
        left.patch.set_visible(False)
        left.set(xscale="log", xlabel=self.param_name)
        if not left.xaxis_inverted():
            left.invert_xaxis()
        for panel, name, line in ((left, self.score_name, self.score_line_), (right, self.cost_name, self.cost_line_)):
            panel.set_ylabel(name, color=line.get_color())
            panel.tick_params(axis="y", labelcolor=line.get_color())
        right.set_ylim(bottom=min(0.0, right.get_ylim()[0]))
        return self


def _column(results: Mapping[str, Any], param: str) -> str:
    names = [name for name in results if name == f"param_{param}" or name.endswith(f"__{param}")]
    if len(names) != 1:
        searched = [name.removeprefix("param_") for name in results if name.startswith("param_")]
        raise ValueError(f"param={param!r} was not searched, or is not unique; searched were {searched}.")
    return names[0]


def _found(results: Mapping[str, Any], name: str) -> Array:
    if name not in results:
        have = [key for key in results if key.startswith("mean_")]
        raise ValueError(f"the results have no {name!r}, only {have}; name one by metric= and cost=.")
    return np.asarray(results[name], dtype=np.float64)


def _best(results: Mapping[str, Any], rows: Any, mean: Array) -> int:
    """The row of the best mean; in a search of several rounds among those of the last one."""
    if "iter" in results:
        rounds = np.asarray(results["iter"])
        rows = rows & (rounds == rounds[rows].max())
    return int(np.argmax(np.where(rows & ~np.isnan(mean), mean, -np.inf)))
