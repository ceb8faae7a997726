"""TrajectoryDisplay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted

from skode.displays.common import Panels, last_step, refuse, row_colours, show_colours
from skode.displays.paths import hidden_paths, series_paths
from skode.estimators import LatentODERegressor
from skode.estimators.base import BaseODENet

KINDS = ("time", "plane", "series")


class TrajectoryDisplay(Panels):
    """Paths over time: hidden states of rows, or series with their observations and bands.

    Parameters
    ----------
    times : array-like of shape (m,), or list of n such
        Shared by all paths, or each one's own; numbers or datetimes.
    values : array of shape (n, m, d), or list of n arrays of shape (m_i, d)
        Paths of d components.
    kind : {"time", "plane", "series"}, default="time"
        "time": a panel for each component, with all paths. "plane": one panel, the second component against the
        first. "series": a panel for each path and component, with band and observations.
    lower, upper : as ``values``, optional
        Ends of the bands of "series".
    observed : list of n pairs of times (k_i,) and values (k_i, d), optional
        Dots of "series"; NaN is not drawn.
    y : array-like of shape (n,), optional
        What paths of "time" and "plane" are coloured by: classes if there are few values or they are no numbers.
    series_names, component_names : sequences of str, optional
        Of n and d.
    time_name : str, default="t"

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        Path by path; for "time" and "series" all components of each.
    bands_, dots_ : lists of PolyCollection and of Line2D
        Of "series".
    ax_, axes_, figure_
        The first axes, all that are used in their order, the figure.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.displays import TrajectoryDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODENetClassifier(max_iter=20, random_state=0).fit(X, y)
    >>> display = TrajectoryDisplay.from_estimator(model, X[::10], y=y[::10], components=[0, 1])
    >>> display.values.shape  # rows, times, components
    (15, 200, 2)
    """

    lines_: list[Any]
    bands_: list[Any]
    dots_: list[Any]

    def __init__(
        self,
        times: Any,
        values: Any,
        *,
        kind: str = "time",
        lower: Any = None,
        upper: Any = None,
        observed: Any = None,
        y: Any = None,
        series_names: Sequence[str] | None = None,
        component_names: Sequence[str] | None = None,
        time_name: str = "t",
    ) -> None:
        self.times, self.values = times, values
        self.kind = kind
        self.lower, self.upper = lower, upper
        self.observed = observed
        self.y = y
        self.series_names, self.component_names = series_names, component_names
        self.time_name = time_name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        *,
        kind: str = "time",
        y: Any = None,
        times: Any = None,
        series: Any = None,
        channels: Any = None,
        components: Any = None,
        quantiles: Sequence[float] | None = (0.1, 0.9),
        horizon: Any = None,
        n_points: int = 200,
        member: int = 0,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Compute and draw.

        Of ODE nets: the hidden states of the rows of X (``kind, y, times, components, member``). Of latent models:
        predictions for series (``times, series, channels, quantiles, horizon``).

        Parameters
        ----------
        estimator : fitted ODENetClassifier, ODENetRegressor or LatentODERegressor, or a pipeline that ends in one
        X : array-like or Panel
        kind : {"time", "plane"}, default="time"
            Components of the hidden state against time, or one against another.
        y : array-like of shape (n_samples,), optional
            What the rows are coloured by.
        times : array-like, optional
            By default ``n_points`` of them from 0 to t1, or from each series' first row to its last and on by
            ``horizon``. Of series: in their own units.
        series : sequence of int or label, optional
            Positions of series, or their ids where these are no integers; the first four by default.
        channels : sequence of int or label, optional
            Positions or names; the first four by default.
        components : sequence of int, or "pca", optional
            Of the hidden state; "pca": the first two principal components of all states that are shown. By default
            the first four against time, and for a plane "pca" (a state of two components as it is).
        quantiles : (float, float) or None, default=(0.1, 0.9)
            Ends of the band of observations.
        horizon : number, Timedelta or str, optional
            How far lines go on past each series' last observation.
        n_points : int, default=200
        member : int, default=0
            Which one of an ODE net's networks.
        ax : matplotlib Axes or array of them, optional
            A single one is divided into as many panels as are needed.
        **kwargs
            Of ``Axes.plot``, for the lines.

        Returns
        -------
        TrajectoryDisplay

        Raises
        ------
        TypeError
            If the estimator is of another kind.
        ValueError
            If there are no such times, series, channels, components or members; if the latent model was fitted to
            targets or has no channels.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        model, X = last_step(estimator, X)
        check_is_fitted(model)
        if isinstance(model, BaseODENet):
            if kind not in KINDS[:2]:
                raise ValueError(f"kind={kind!r} must be 'time' or 'plane'.")
            display = cls(**hidden_paths(model, X, kind, times, components, n_points, member), kind=kind, y=y)
        elif isinstance(model, LatentODERegressor):
            found = series_paths(model, X, times, series, channels, quantiles, horizon, n_points)
            display = cls(**found, kind="series")
        else:
            raise refuse(cls.__name__, model, "an ODE net or a LatentODERegressor")
        return display.plot(ax, **kwargs)

    def plot(
        self,
        ax: Any = None,
        *,
        cmap: str = "viridis",
        band_kw: dict[str, Any] | None = None,
        dot_kw: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw the paths.

        Parameters
        ----------
        ax : matplotlib Axes or array of them, optional
        cmap : str, default="viridis"
            For a y of many numbers.
        band_kw, dot_kw : dict, optional
            Of ``Axes.fill_between`` and, for the observations, ``Axes.plot``.
        **kwargs
            Of ``Axes.plot``, for the lines.

        Returns
        -------
        self
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(map(repr, KINDS))}.")
        self.lines_, self.bands_, self.dots_ = [], [], []
        if self.kind == "series":
            return self._plot_series(ax, kwargs, band_kw or {}, dot_kw or {})
        colours = row_colours(self.y, len(self.values), cmap)
        draw = self._plot_plane if self.kind == "plane" else self._plot_over_time
        draw(ax, colours.colours, {"linewidth": 1.0, "alpha": 0.7} | kwargs)
        show_colours(colours, self.figure_, self.axes_)
        return self

    def _plot_over_time(self, ax: Any, colours: list[Any], options: dict[str, Any]) -> None:
        names = self._components()
        axes = self._take_axes(ax, 1, len(names))[0]
        for i, (values, colour) in enumerate(zip(self.values, colours, strict=True)):
            for j, panel in enumerate(axes):
                self.lines_ += panel.plot(self._times(i), values[:, j], **{"color": colour} | options)
        for panel, name in zip(axes, names, strict=True):
            panel.set(xlabel=self.time_name, ylabel=name)

    def _plot_plane(self, ax: Any, colours: list[Any], options: dict[str, Any]) -> None:
        names = self._components()
        if len(names) != 2:
            raise ValueError(f"kind='plane' takes paths of 2 components; these have {len(names)}.")
        panel = self._take_axes(ax)[0, 0]
        for values, colour in zip(self.values, colours, strict=True):
            self.lines_ += panel.plot(*np.asarray(values).T, **{"color": colour} | options)
        # A dot is where a path ends.
        panel.scatter(*np.array([values[-1] for values in self.values]).T, s=10, c=colours, zorder=3)
        panel.set(xlabel=names[0], ylabel=names[1])

    def _plot_series(self, ax: Any, line_kw: dict[str, Any], band_kw: dict[str, Any], dot_kw: dict[str, Any]) -> Self:
        n, names = len(self.values), self._components()
        n_rows, n_cols = (n, len(names)) if len(names) > 1 else _arranged(n)
        axes = np.ravel(self._take_axes(ax, n_rows, n_cols))
        for spare in axes[n * len(names) :]:
            spare.set_axis_off()
        self.axes_ = axes = axes[: n * len(names)]
        for place, panel in enumerate(axes):
            i, j = divmod(place, len(names))
            self._plot_one(panel, i, j, line_kw, band_kw, dot_kw)
            title = str(self.series_names[i]) if self.series_names is not None else f"series {i}"
            panel.set_title(f"{title}: {names[j]}" if len(names) > 1 else title, fontsize="medium")
            if place + n_cols >= len(axes):
                panel.set_xlabel(self.time_name)
            if len(names) == 1 and place % n_cols == 0:
                panel.set_ylabel(names[0])
        return self

    def _plot_one(
        self,
        panel: Any,
        i: int,
        j: int,
        line_kw: dict[str, Any],
        band_kw: dict[str, Any],
        dot_kw: dict[str, Any],
    ) -> None:
        times = self._times(i)
        style: dict[str, Any]
        _format_dates(panel, times)
        self.lines_ += panel.plot(_plain(times), self.values[i][:, j], **{"color": "C0"} | line_kw)
        if self.lower is not None and self.upper is not None:
            ends = (self.lower[i][:, j], self.upper[i][:, j])
            style = {"color": self.lines_[-1].get_color(), "alpha": 0.25, "linewidth": 0}
            self.bands_.append(panel.fill_between(_plain(times), *ends, **style | band_kw))
        if self.observed is not None:
            when, seen = self.observed[i]
            known = ~np.isnan(seen[:, j])
            style = {"color": "C1", "marker": "o", "markersize": 3.5, "linestyle": "none"}
            self.dots_ += panel.plot(_plain(when[known]), seen[known, j], **style | dot_kw)

    def _times(self, i: int) -> Any:
        own = isinstance(self.times, list) and len(self.times) == len(self.values) and np.ndim(self.times[0]) == 1
        return self.times[i] if own else self.times

    def _components(self) -> list[str]:
        d = np.shape(self.values[0])[1]
        return [f"component {j}" for j in range(d)] if self.component_names is None else list(self.component_names)


def _arranged(n: int) -> tuple[int, int]:
    """Rows and columns of n panels."""
    n_cols = min(n, 2 if n in (2, 4) else 3)
    return -(-n // n_cols), n_cols


def _plain(times: Any) -> Any:
    """Datetimes as matplotlib takes them, in UTC; all else as it is."""
    if getattr(times, "tz", None) is not None:
        times = times.tz_convert("UTC").tz_localize(None)
    return np.asarray(times)


def _format_dates(panel: Any, times: Any) -> None:
    """Short labels of datetimes, in the series' own time zone."""
    if np.asarray(_plain(times)).dtype.kind != "M":
        return
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    zone = getattr(times, "tz", None)
    locator = AutoDateLocator(tz=zone, minticks=3, maxticks=6)
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone))
