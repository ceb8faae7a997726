"""DensityDisplay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.neighbors import KernelDensity
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted, validate_data

from skode.displays.common import Array, Panels, feature_names, last_step, pair_of, refuse, square_grid
from skode.estimators import ContinuousFlowDensity

DEEPEST = 8.0  # nats below the highest density that are shown
FLOWING, MARGINAL, LIMITING = 300, 2000, 500  # samples: that flow, that a marginal is estimated from, for the limits
PLOTS = ("contourf", "contour", "pcolormesh")


class DensityDisplay(Panels):
    """A log-density over two columns, with samples and data; or the same at several times of the flow.

    Parameters
    ----------
    xx0, xx1 : arrays of shape (g, g)
        A grid.
    log_density : array of shape (g, g) or (m, g, g)
        In nats; the latter for m times.
    t : sequence of m float, optional
    samples : array of shape (n, 2) or (m, n, 2), optional
    data : array of shape (n, 2), optional
        Where there are times, the data are drawn at time 1.
    feature_names : tuple of two str

    Attributes
    ----------
    surfaces_ : list of QuadContourSet or QuadMesh
        One a panel.
    samples_, data_ : list of PathCollection
        As far as they are drawn.
    colorbar_ : matplotlib Colorbar
    ax_, axes_, figure_
        The first axes, all of them (1, m), the figure.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from skode import ContinuousFlowDensity
    >>> from skode.displays import DensityDisplay
    >>> X, _ = make_moons(200, noise=0.1, random_state=0)
    >>> density = ContinuousFlowDensity(max_iter=8, random_state=0).fit(X)
    >>> DensityDisplay.from_estimator(density, X, grid_resolution=20).log_density.shape
    (20, 20)
    >>> flow = DensityDisplay.from_estimator(density, t=[0.0, 0.5, 1.0], grid_resolution=20)
    >>> flow.samples.shape
    (3, 300, 2)
    """

    surfaces_: list[Any]
    samples_: list[Any]
    data_: list[Any]

    def __init__(
        self,
        xx0: Any,
        xx1: Any,
        log_density: Any,
        *,
        t: Sequence[float] | None = None,
        samples: Any = None,
        data: Any = None,
        feature_names: tuple[str, str] = ("column 0", "column 1"),
    ) -> None:
        self.xx0, self.xx1, self.log_density = xx0, xx1, log_density
        self.t = t
        self.samples = samples
        self.data = data
        self.feature_names = feature_names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any = None,
        *,
        features: Any = (0, 1),
        grid_resolution: int = 100,
        plot_method: str = "contourf",
        samples: int | None = None,
        t: Sequence[float] | None = None,
        random_state: Any = 0,
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Compute on a grid and draw.

        Of models of more than two columns the marginal density of two of them is shown: a kernel estimate from 2,000
        samples.

        Parameters
        ----------
        estimator : fitted ContinuousFlowDensity, or a pipeline that ends in one
        X : array-like of shape (n_samples, n_features), optional
            Data to be drawn.
        features : two int or str, default=(0, 1)
            Columns.
        grid_resolution : int, default=100
        plot_method : {"contourf", "contour", "pcolormesh"}, default="contourf"
        samples : int, optional
            How many samples are drawn; None: none, or 300 with ``t``.
        t : sequence of float, optional
            Times from 0, the base distribution, to 1, the data: one panel for each, in which the samples are where the
            flow has carried them (Chen et al. 2018, figure 5).
        random_state : int, RandomState, Generator or None, default=0
            Of the samples.
        ax : matplotlib Axes or array of them, optional
        **kwargs
            Of the plot method.

        Returns
        -------
        DensityDisplay

        Raises
        ------
        TypeError
            If the estimator is of another kind.
        ValueError
            If the columns do not exist or have no density, or ``t`` is not in [0, 1].
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        model, X = last_step(estimator, X)
        if not isinstance(model, ContinuousFlowDensity):
            raise refuse(cls.__name__, model, "a ContinuousFlowDensity")
        check_is_fitted(model)
        _check_method(plot_method)
        names = feature_names(model)
        if len(names) < 2:
            raise ValueError("DensityDisplay needs two columns; this density has one. Plot score_samples over it.")
        pair = pair_of(features, names)
        _check_continuous(model, pair)
        data = None if X is None else validate_data(model, X, dtype=np.float64, reset=False)[:, pair]
        wanted = (0 if t is None else FLOWING) if samples is None else int(samples)
        drawn = model.sample(max(wanted, LIMITING if len(names) == 2 else MARGINAL), random_state=random_state)
        times = None if t is None else [float(time) for time in np.atleast_1d(t)]
        paths = drawn[None] if times is None else _at_times(model, drawn, times)
        limits = np.concatenate([part for part in (data, *paths[:, :, pair]) if part is not None])
        xx0, xx1 = square_grid(limits, grid_resolution)
        grid = np.column_stack([xx0.ravel(), xx1.ravel()])
        if len(names) == 2:
            own = np.empty_like(grid)
            own[:, list(pair)] = grid
            values = _densities(model, own, times)
        else:
            values = np.stack([_marginal(part[:, pair], grid) for part in paths])
        shown = paths[:, :wanted][:, :, pair] if wanted else None
        if times is None:
            values, shown = values[0], None if shown is None else shown[0]
        display = cls(
            xx0,
            xx1,
            values.reshape(*values.shape[:-1], *xx0.shape),
            t=times,
            samples=shown,
            data=data,
            feature_names=(names[pair[0]], names[pair[1]]),
        )
        return display.plot(ax, plot_method=plot_method, **kwargs)

    def plot(
        self,
        ax: Any = None,
        *,
        plot_method: str = "contourf",
        sample_kw: dict[str, Any] | None = None,
        data_kw: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Draw one panel, or one for each time, on one scale of colours that ends 8 nats below the highest density.

        Parameters
        ----------
        ax : matplotlib Axes or array of them, optional
        plot_method : {"contourf", "contour", "pcolormesh"}, default="contourf"
        sample_kw, data_kw : dict, optional
            Of ``Axes.scatter``.
        **kwargs
            Of the plot method.

        Returns
        -------
        self
        """
        _check_method(plot_method)
        values = np.asarray(self.log_density)
        values = values if values.ndim == 3 else values[None]
        figure_size = {"figsize": (2.9 * len(values) + 1.0, 3.3)} if len(values) > 1 else {}
        axes = self._take_axes(ax, 1, len(values), **figure_size)[0]
        highest = float(values.max())
        low = max(float(values.min()), highest - DEEPEST)
        if low == highest:
            low = highest - 1.0
        self.surfaces_, self.samples_, self.data_ = [], [], []
        for k, panel in enumerate(axes):
            self.surfaces_.append(self._surface(panel, values[k], low, highest, plot_method, kwargs))
            self._points(panel, k, sample_kw or {}, data_kw or {})
            panel.set_xlabel(self.feature_names[0])
            panel.set(xlim=(np.min(self.xx0), np.max(self.xx0)), ylim=(np.min(self.xx1), np.max(self.xx1)))
            if self.t is not None:
                panel.set_title(f"t = {self.t[k]:g}")
            if k:
                panel.tick_params(labelleft=False)
        axes[0].set_ylabel(self.feature_names[1])
        label = "log-density"
        self.colorbar_ = self.figure_.colorbar(self.surfaces_[0], ax=list(axes), label=label, extend="min")
        return self

    def _surface(self, panel: Any, values: Array, low: float, high: float, method: str, kwargs: dict[str, Any]) -> Any:
        if method == "pcolormesh":
            options: dict[str, Any] = {"vmin": low, "vmax": high, "shading": "auto", "rasterized": True}
        else:
            options = {"levels": np.linspace(low, high, 17), "extend": "min"}
        return getattr(panel, method)(self.xx0, self.xx1, values, **options | {"cmap": "viridis"} | kwargs)

    def _points(self, panel: Any, k: int, sample_kw: dict[str, Any], data_kw: dict[str, Any]) -> None:
        handles: list[Any] = []
        style: dict[str, Any]
        if self.data is not None and (self.t is None or self.t[k] == 1):
            style = {"s": 9, "c": "white", "edgecolors": "black", "linewidths": 0.4, "label": "data"}
            self.data_.append(panel.scatter(*np.asarray(self.data).T, **style | data_kw))
            handles.append(self.data_[-1])
        if self.samples is not None:
            samples = np.asarray(self.samples)
            own = samples[k] if samples.ndim == 3 else samples
            style = {"s": 7, "c": "tab:red", "edgecolors": "white", "linewidths": 0.3, "label": "samples"}
            self.samples_.append(panel.scatter(*own.T, **style | sample_kw))
            handles.append(self.samples_[-1])
        if len(handles) > 1:
            panel.legend(handles=handles, loc="best", facecolor="0.5", labelcolor="white")


def _check_method(plot_method: str) -> None:
    if plot_method not in PLOTS:
        raise ValueError(f"plot_method={plot_method!r} must be one of {', '.join(map(repr, PLOTS))}.")


def _check_continuous(model: ContinuousFlowDensity, pair: tuple[int, int]) -> None:
    for j in pair:
        if j not in model.columns_.found.kept:
            kind = model.column_kinds_[j]
            raise ValueError(f"column {j} of X is {kind} and was left out of the density; show other features.")


def _at_times(model: ContinuousFlowDensity, rows: Array, times: list[float]) -> Array:
    """Places (m, n, d) of samples on their way, at times in any order."""
    order = np.argsort(times)
    found = np.empty((len(times), *rows.shape))
    found[order] = model.trajectory(rows, np.sort(times)).swapaxes(0, 1)
    return found


def _densities(model: ContinuousFlowDensity, grid: Array, times: list[float] | None) -> Array:
    """Log-densities (m, g) on a grid: the data's, or those of the flow's states at times."""
    if times is None:
        return np.asarray(model.score_samples(grid))[None]
    found = [model.trajectory(grid, [t], start=t, return_log_density=True)[1][:, 0] for t in times]
    return np.stack(found)


def _marginal(samples: Array, grid: Array) -> Array:
    """A kernel estimate of the samples' log-density on a grid."""
    centre, scale = samples.mean(axis=0), samples.std(axis=0)
    kernel = KernelDensity(bandwidth="scott").fit((samples - centre) / scale)
    found: Array = kernel.score_samples((grid - centre) / scale) - np.log(scale).sum()
    return found
