"""What TrajectoryDisplay shows of fitted models: arguments of its constructor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from skode.displays.common import places_of
from skode.estimators import LatentODERegressor
from skode.estimators.base import BaseODENet
from skode.panel import Panel

SHOWN = 4  # components, series, channels


def hidden_paths(
    model: BaseODENet, X: Any, kind: str, times: Any, components: Any, n_points: int, member: int
) -> dict[str, Any]:
    """Times, hidden states and names."""
    t = np.linspace(0.0, model._net.config.t1, n_points) if times is None else np.asarray(times, dtype=np.float64)
    states = model.trajectory(X, t, member=member)
    n_dims = states.shape[2]
    if components is None:
        components = "pca" if kind == "plane" and n_dims != 2 else range(min(n_dims, SHOWN))
    if isinstance(components, str):
        if components != "pca":
            raise ValueError(f"components={components!r} must be 'pca' or numbers of components.")
        if n_dims < 2:
            raise ValueError("components='pca' needs a state of 2 components or more; this one has 1.")
        flat = PCA(2, svd_solver="full").fit_transform(states.reshape(-1, n_dims).astype(np.float64))
        return {
            "times": t,
            "values": flat.reshape(*states.shape[:2], 2),
            "component_names": ["principal component 1", "principal component 2"],
        }
    names = [f"hidden {j}" for j in range(n_dims)]
    places = places_of(components, names, "the state")
    if kind == "plane" and len(places) != 2:
        raise ValueError(f"a plane has 2 components; got components={components!r}.")
    return {"times": t, "values": states[:, :, places], "component_names": [names[j] for j in places]}


def series_paths(
    model: LatentODERegressor,
    X: Any,
    times: Any,
    series: Any,
    channels: Any,
    quantiles: Sequence[float] | None,
    horizon: Any,
    n_points: int,
) -> dict[str, Any]:
    """Times, predicted means, bands, observations and names of each chosen series."""
    if model._target_scale is not None:
        raise ValueError("this model was fitted to targets y; it does not predict the series themselves.")
    if not model._all_columns:
        raise ValueError("this model is of bare events and has no channels; see its intensity(X, times).")
    if quantiles is not None and len(quantiles) != 2:
        raise ValueError(f"quantiles={quantiles!r} must be the two ends of a band, or None.")
    panel = model._read_fitted(X)[0].panel
    names, ids = list(model._all_columns), panel.ids.tolist()
    rows = places_of(range(min(SHOWN, len(ids))) if series is None else series, ids, "X")
    columns = places_of(range(min(SHOWN, len(names))) if channels is None else channels, names, "X")
    found: dict[str, list[Any]] = {key: [] for key in ("times", "values", "lower", "upper", "observed")}
    for row in rows:
        one = panel.take([row])
        grid = _grid(one, horizon, n_points) if times is None else _as_index(times)
        found["times"].append(_shown_times(grid))
        found["values"].append(model.predict(one, times=grid)[0][:, columns])
        if quantiles is not None:
            ends = model.predict(one, times=grid, quantiles=list(quantiles))[0][:, columns]
            found["lower"].append(ends[..., 0])
            found["upper"].append(ends[..., 1])
        found["observed"].append(_observed(one, columns))
    return {
        **{key: parts or None for key, parts in found.items()},
        "series_names": [f"series {ids[row]}" for row in rows],
        "component_names": [str(names[j]) for j in columns],
        "time_name": "time [s]" if panel.time_dtype.kind == "m" else "time",
    }


def _grid(panel: Panel, horizon: Any, n_points: int) -> Any:
    """Times of a panel of one series, from its first row to its last, or on from its last observation."""
    index = pd.Index(panel[0].index)
    if not len(index):
        raise ValueError(f"series {panel.ids[0]!r} has no rows; give times=.")
    first, last = index.min(), index.max()
    if horizon is not None:
        seen = panel[0].dropna(how="all", subset=list(panel.columns)).index
        ahead = pd.Timedelta(horizon) if index.dtype.kind in "mM" else horizon
        last = max(last, (seen.max() if len(seen) else first) + ahead)
    if index.dtype.kind in "mM":
        # A share of nanoseconds is exact enough for a line, and keeps time zones.
        return first + pd.to_timedelta(np.linspace(0, (last - first).value, n_points).astype(np.int64), unit="ns")
    return pd.Index(np.linspace(float(first), float(last), n_points))


def _as_index(times: Any) -> Any:
    return times if isinstance(times, pd.Index) else pd.Index(times)


def _shown_times(index: Any) -> Any:
    """Timedeltas in seconds; all else as it is."""
    return index.total_seconds() if index.dtype.kind == "m" else index


def _observed(panel: Panel, columns: list[int]) -> tuple[Any, Any]:
    frame = panel[0]
    return _shown_times(frame.index), frame.to_numpy(dtype=np.float64)[:, columns]
