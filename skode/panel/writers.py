"""Stores back into frames and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel.store import Store


def write_long(store: Store) -> Any:
    """The long frame, rows and index as they came."""
    order = store.order()
    series = store.series[order]
    labels = {
        "series": pd.Index(store.ids, dtype=store.id_dtype, name=store.layout.series_name).take(series),
        "time": store.clock.restore(store.stamps[order]).rename(store.layout.time_name),
    }
    columns = {labels[role].name: labels[role] for role in store.layout.in_columns}
    blocks = (
        (store.columns, store.values[order]),
        (store.covariate_names, store.covariates[order]),
        (store.static_names, store.static[series]),
    )
    columns |= {name: table[:, place] for names, table in blocks for place, name in enumerate(names)}
    first = [name for name in store.layout.column_order if name in columns]
    names = first + [name for name in columns if name not in first]
    frame = pd.DataFrame({place: columns[name] for place, name in enumerate(names)}, index=_index(store, labels, order))
    return frame.set_axis(pd.Index(names, tupleize_cols=False), axis=1)


def _index(store: Store, labels: dict[str, Any], order: NDArray[np.int64]) -> Any:
    layout = store.layout
    if layout.index is not None:
        rows = store.rows[order]
        whole = len(rows) == len(layout.index) and np.array_equal(rows, np.arange(len(rows)))
        return layout.index if whole else layout.index.take(rows)
    levels = [labels[role] for role in layout.levels]
    if len(levels) == 1:
        return levels[0]
    return pd.MultiIndex.from_arrays(levels, names=[level.name for level in levels])


def write_frame(store: Store, position: int, order: NDArray[np.int64]) -> Any:
    """Channels and covariates of one series, times as its index.

    Parameters
    ----------
    store : Store
    position : int
    order : ndarray of shape (n_rows,)
        The stored rows as they go out, series by series.
    """
    rows = order[store.offsets[position] : store.offsets[position + 1]]
    return pd.DataFrame(
        np.column_stack([store.values[rows], store.covariates[rows]]),
        index=store.clock.restore(store.stamps[rows]).rename(store.layout.time_name),
        columns=pd.Index([*store.columns, *store.covariate_names], tupleize_cols=False),
    )


def order_within(store: Store) -> NDArray[np.int64]:
    """The stored rows series by series, each in the order in which its rows came."""
    return np.lexsort((store.rows, store.series))


def write_dense(store: Store) -> NDArray[np.float64]:
    """The array of series that have equally many rows."""
    lengths = store.lengths
    if not len(lengths) or lengths.min() != lengths.max():
        raise ValueError(
            f"the series have {lengths.min(initial=0)} to {lengths.max(initial=0)} rows: only series with equally many "
            "rows make an array. Use to_long() or to_frames()."
        )
    return store.values[order_within(store)].reshape(len(lengths), lengths[0], len(store.columns))


def write_summary(store: Store, n_shown: int = 6) -> Any:
    """A frame with a line per series: rows, first and last time, share of observed values."""
    n_series = len(store.ids)
    places = np.arange(n_series)
    if n_series > n_shown:
        places = np.concatenate([places[: n_shown // 2], places[-n_shown // 2 :]])
    lines = [
        [stop - start, *_span(store, start, stop), _share(store.values[start:stop])]
        for place in places
        for start, stop in [store.offsets[place : place + 2]]
    ]
    ids = pd.Index(store.ids[places], dtype=store.id_dtype, name=store.layout.series_name)
    return pd.DataFrame(lines, index=ids, columns=["rows", "first", "last", "observed"])


def _span(store: Store, start: int, stop: int) -> list[str]:
    if stop == start:
        return ["-", "-"]
    # Ten digits tell seconds since 1970 apart and leave out what is rounding.
    shown = store.clock.show(store.stamps[[start, stop - 1]])
    return [f"{time:.10g}" if isinstance(time, float) else str(time) for time in shown]


def _share(values: NDArray[np.float64]) -> str:
    return f"{np.isfinite(values).mean():.0%}" if values.size else "-"
