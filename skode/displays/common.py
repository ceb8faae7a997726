"""What the displays share: axes, names of columns, colours of rows, steps of pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.utils._optional_dependencies import check_matplotlib_support

Array = NDArray[np.float64]
MOST_CLASSES = 10  # different numbers that are still shown as classes


class Panels:
    """Base class of displays: the axes of the last plot."""

    ax_: Any
    axes_: Any
    figure_: Any

    def _take_axes(self, ax: Any, n_rows: int = 1, n_cols: int = 1, **options: Any) -> Any:
        """Axes (n_rows, n_cols): new ones, those given, or parts of the place of a single one that was given.

        Raises
        ------
        ValueError
            If another number of axes is given, or one that cannot be divided.
        """
        check_matplotlib_support(f"{type(self).__name__}.plot")
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes

        if ax is None:
            size = (max(6.4, 3.8 * n_cols), max(4.4, 2.4 * n_rows))
            options = {"figsize": size, "layout": "constrained"} | options
            _, axes = plt.subplots(n_rows, n_cols, squeeze=False, **options)
        elif isinstance(ax, Axes):
            axes = _divided(ax, n_rows, n_cols)
        else:
            axes = np.asarray(ax, dtype=object)
            if axes.size != n_rows * n_cols:
                raise ValueError(f"ax holds {axes.size} axes; this display has {n_rows} x {n_cols} panels.")
            axes = axes.reshape(n_rows, n_cols)
        self.axes_, self.ax_, self.figure_ = axes, axes[0, 0], axes[0, 0].figure
        return axes


def _divided(ax: Any, n_rows: int, n_cols: int) -> Any:
    from matplotlib.gridspec import GridSpecFromSubplotSpec

    if n_rows * n_cols == 1:
        return np.array([[ax]], dtype=object)
    place = ax.get_subplotspec()
    if place is None:
        raise ValueError(
            f"ax is not part of a grid, so that {n_rows} x {n_cols} panels have no place in it; give ax=None, an axes "
            "of plt.subplots or an array of axes."
        )
    ax.set_axis_off()
    grid = GridSpecFromSubplotSpec(n_rows, n_cols, subplot_spec=place)
    axes = [[ax.figure.add_subplot(grid[i, j]) for j in range(n_cols)] for i in range(n_rows)]
    return np.array(axes, dtype=object)


def last_step(estimator: Any, X: Any = None) -> tuple[Any, Any]:
    """The estimator, or the last step of a fitted pipeline with X as it comes to that step."""
    steps = getattr(estimator, "steps", None)
    if steps is None:
        return estimator, X
    return steps[-1][1], estimator[:-1].transform(X) if X is not None and len(steps) > 1 else X


def refuse(display: str, estimator: Any, shown: str) -> TypeError:
    """The error for an estimator that a display knows nothing of."""
    return TypeError(f"{display} shows {shown}, or a pipeline that ends in one; got {type(estimator).__name__}.")


def feature_names(estimator: Any) -> list[str]:
    """Names of the columns of X."""
    names = getattr(estimator, "feature_names_in_", None)
    return [f"column {j}" for j in range(estimator.n_features_in_)] if names is None else [str(name) for name in names]


def pair_of(features: Any, names: Sequence[str], what: str = "X") -> tuple[int, int]:
    """Two positions among ``names``, given as positions or names.

    Raises
    ------
    ValueError
        If they are not two different ones.
    """
    pair = tuple(places_of(features, names, what))
    if len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f"features={features!r} must be two different columns.")
    return pair[0], pair[1]


def places_of(wanted: Any, names: Sequence[Any], what: str) -> list[int]:
    """Positions among ``names``, given as positions or names.

    Raises
    ------
    ValueError
        If one is not there.
    """
    places = []
    for name in [wanted] if isinstance(wanted, str | int | np.integer) else wanted:
        place = list(names).index(name) if name in names and not isinstance(name, int | np.integer) else name
        if not isinstance(place, int | np.integer) or not 0 <= place < len(names):
            raise ValueError(f"{name!r} is not there: {what} has {len(names)}, {', '.join(map(str, names[:8]))} ...")
        places.append(int(place))
    return places


def square_grid(points: Array, resolution: int, margin: float = 0.1) -> tuple[Array, Array]:
    """Coordinates (resolution, resolution) of a grid around points (n, 2)."""
    low, high = points.min(axis=0), points.max(axis=0)
    room = np.where(high > low, margin * (high - low), 1.0)
    ends = zip(low - room, high + room, strict=True)
    xx0, xx1 = np.meshgrid(*(np.linspace(first, last, resolution) for first, last in ends))
    return xx0, xx1


class RowColours(NamedTuple):
    """A colour for each row, and what a legend or a colour bar needs."""

    colours: list[Any]
    classes: dict[Any, Any]
    scale: Any = None


def row_colours(y: Any, n: int, cmap: str) -> RowColours:
    """By classes if y has few different values or none that are numbers, else by its size; without y by number."""
    import matplotlib

    if y is None:
        return RowColours([f"C{i}" if n <= MOST_CLASSES else "C0" for i in range(n)], {})
    values, code = np.unique(np.asarray(y), return_inverse=True)
    if len(code) != n:
        raise ValueError(f"y has {len(code)} values for {n} rows of X.")
    if values.dtype.kind not in "fiu" or len(values) <= MOST_CLASSES:
        shades = matplotlib.colormaps["tab20"]
        each = [f"C{i}" if len(values) <= MOST_CLASSES else shades(i % 20) for i in range(len(values))]
        return RowColours([each[i] for i in code], dict(zip(values.tolist(), each, strict=True)))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(values.min(), values.max()), cmap)
    return RowColours(list(scale.to_rgba(np.asarray(y, dtype=np.float64))), {}, scale)


def show_colours(colours: RowColours, figure: Any, axes: Any) -> None:
    """A legend of the classes, or a colour bar."""
    from matplotlib.lines import Line2D

    if colours.scale is not None:
        figure.colorbar(colours.scale, ax=list(np.ravel(axes)), label="y")
    elif colours.classes:
        handles = [Line2D([], [], color=colour, label=str(name)) for name, colour in colours.classes.items()]
        np.ravel(axes)[-1].legend(handles=handles, title="y")
