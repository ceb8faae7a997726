"""VectorFieldDisplay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from sklearn.utils._optional_dependencies import check_matplotlib_support
from sklearn.utils.validation import check_is_fitted, validate_data

from skode.displays.common import Array, Panels, feature_names, last_step, pair_of, refuse, square_grid
from skode.estimators import ContinuousFlowDensity, LatentODERegressor
from skode.estimators.base import BaseODENet
from skode.estimators.velocities import flow_velocity, hidden_velocity, latent_velocity

PLOTS = ("quiver", "streamplot")
N_SAMPLES = 300  # of a flow, if no data are given
USUAL = 2.0  # states lie between this and its negative, if no data are given


class VectorFieldDisplay(Panels):
    """Arrows of a learned vector field in a plane of its state, at one time.

    Parameters
    ----------
    xx0, xx1 : arrays of shape (g, g)
        A grid in the plane.
    u, v : arrays of shape (g, g)
        The field's two components there.
    t : float, optional
        For the title.
    states : array of shape (n, 2), optional
        States that are drawn as dots.
    names : tuple of two str
        Of the two coordinates.

    Attributes
    ----------
    arrows_ : matplotlib Quiver or StreamplotSet
    dots_ : PathCollection or None
    ax_, axes_, figure_
        The axes, the same in an array (1, 1), the figure.

    Examples
    --------
    >>> from sklearn.datasets import make_moons
    >>> from skode import ODENetClassifier
    >>> from skode.displays import VectorFieldDisplay
    >>> X, y = make_moons(200, noise=0.1, random_state=0)
    >>> model = ODENetClassifier(n_members=1, augment_dim=0, max_iter=20, random_state=0).fit(X, y)
    >>> VectorFieldDisplay.from_estimator(model, X, t=0.5).u.shape
    (20, 20)
    """

    def __init__(
        self,
        xx0: Any,
        xx1: Any,
        u: Any,
        v: Any,
        *,
        t: float | None = None,
        states: Any = None,
        names: tuple[str, str] = ("state 0", "state 1"),
    ) -> None:
        self.xx0, self.xx1, self.u, self.v = xx0, xx1, u, v
        self.t = t
        self.states = states
        self.names = names

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any = None,
        *,
        t: float = 0.0,
        features: Any = (0, 1),
        grid_resolution: int = 20,
        member: int = 0,
        plot_method: str = "quiver",
        ax: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Evaluate the field on a grid around the states of rows of X and draw it.

        Parameters
        ----------
        estimator : fitted ODENetClassifier, ODENetRegressor, ContinuousFlowDensity or LatentODERegressor
            Or a pipeline that ends in one. The plane is one of the hidden state, of the table's columns, or of the
            latent state.
        X : array-like or Panel, optional
            Rows whose states at time t are drawn, span the grid, and by their mean fix the other components. For
            latent models: the states at the first observations. Without X: samples of a flow, else -2 to 2 and 0.
        t : float, default=0
            From 0 to t1; of a flow from 0, the base, to 1, the data; of a latent model, whose field depends on time by
            known inputs and a clock alone, since the origin.
        features : two int or str, default=(0, 1)
            Components of the state; of a flow columns of X.
        grid_resolution : int, default=20
        member : int, default=0
            Which one of an ODE net's networks.
        plot_method : {"quiver", "streamplot"}, default="quiver"
        ax : matplotlib Axes, optional
        **kwargs
            Of the plot method.

        Returns
        -------
        VectorFieldDisplay

        Raises
        ------
        TypeError
            If the estimator is of another kind.
        ValueError
            If the state has no such components, or there is no such time or member.
        """
        check_matplotlib_support(f"{cls.__name__}.from_estimator")
        model, X = last_step(estimator, X)
        check_is_fitted(model)
        _check_method(plot_method)
        plane = _plane(cls.__name__, model, X, float(t), member)
        pair = pair_of(features, plane.names, "the state")
        near = plane.states if len(plane.states) else np.array([[-USUAL], [USUAL]]) * np.ones(len(plane.names))
        xx0, xx1 = square_grid(near[:, pair], grid_resolution)
        grid = np.tile(near.mean(axis=0), (xx0.size, 1))
        grid[:, list(pair)] = np.column_stack([xx0.ravel(), xx1.ravel()])
        arrows = plane.velocity(grid)[:, pair].reshape(*xx0.shape, 2)
        display = cls(
            xx0,
            xx1,
            arrows[..., 0],
            arrows[..., 1],
            t=float(t),
            states=plane.states[:, pair] if len(plane.states) else None,
            names=(plane.names[pair[0]], plane.names[pair[1]]),
        )
        return display.plot(ax, plot_method=plot_method, **kwargs)

    def plot(self, ax: Any = None, *, plot_method: str = "quiver", **kwargs: Any) -> Self:
        """Draw the arrows, coloured by their length, and the states as dots.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        plot_method : {"quiver", "streamplot"}, default="quiver"
        **kwargs
            Of the plot method.

        Returns
        -------
        self
        """
        _check_method(plot_method)
        panel = self._take_axes(ax)[0, 0]
        self.dots_ = None
        if self.states is not None:
            self.dots_ = panel.scatter(*np.asarray(self.states).T, s=8, c="0.5", alpha=0.6, linewidths=0)
        speed = np.hypot(self.u, self.v)
        if plot_method == "quiver":
            options: dict[str, Any] = {"cmap": "viridis", "pivot": "mid", "angles": "xy"}
            coloured = () if "color" in kwargs else (speed,)
            self.arrows_ = panel.quiver(self.xx0, self.xx1, self.u, self.v, *coloured, **options | kwargs)
            shown = self.arrows_
        else:
            options = {"density": 1.2, "linewidth": 1.0}
            if "color" not in kwargs:
                options |= {"color": speed, "cmap": "viridis"}
            self.arrows_ = panel.streamplot(self.xx0, self.xx1, self.u, self.v, **options | kwargs)
            shown = self.arrows_.lines
        if shown.get_array() is not None:
            self.figure_.colorbar(shown, ax=panel, label="speed")
        panel.set(xlabel=self.names[0], ylabel=self.names[1])
        if self.t is not None:
            panel.set_title(f"t = {self.t:g}")
        return self


class Plane(NamedTuple):
    """States (n, d), names of their components, and the field."""

    states: Array
    names: list[str]
    velocity: Callable[[Array], Array]


def _check_method(plot_method: str) -> None:
    if plot_method not in PLOTS:
        raise ValueError(f"plot_method={plot_method!r} must be one of {', '.join(map(repr, PLOTS))}.")


def _plane(display: str, model: Any, X: Any, t: float, member: int) -> Plane:
    if isinstance(model, BaseODENet):
        return _of_net(model, X, t, member)
    if isinstance(model, ContinuousFlowDensity):
        return _of_flow(model, X, t)
    if isinstance(model, LatentODERegressor):
        n = model._n_features_out
        states = np.empty((0, n)) if X is None else model.transform(X)
        return Plane(states, [f"latent {i}" for i in range(n)], lambda grid: latent_velocity(model, grid, t))
    raise refuse(display, model, "an ODE net, a ContinuousFlowDensity or a LatentODERegressor")


def _of_net(model: BaseODENet, X: Any, t: float, member: int) -> Plane:
    # A row of zeros tells the size of the state, and whether time and member exist.
    rows = np.zeros((1, model.n_features_in_)) if X is None else X
    path = model.trajectory(rows, [t], member=member)[:, 0].astype(np.float64)
    states = path[:0] if X is None else path
    names = [f"hidden {i}" for i in range(path.shape[1])]
    return Plane(states, names, lambda grid: hidden_velocity(model, grid, t, member))


def _of_flow(model: ContinuousFlowDensity, X: Any, t: float) -> Plane:
    rows = (
        model.sample(N_SAMPLES, random_state=0) if X is None else validate_data(model, X, dtype=np.float64, reset=False)
    )
    states = model.trajectory(rows, [t])[:, 0]
    return Plane(states, feature_names(model), lambda grid: flow_velocity(model, grid, t))
