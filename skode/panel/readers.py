"""Frames and arrays into stores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel.checks import (
    Places,
    constant_columns,
    names_of,
    numeric_columns,
    refuse_duplicates,
    refuse_infinite,
    refuse_missing,
    shown,
    tell_unsorted,
)
from skode.panel.clock import Clock, stamps_of
from skode.panel.store import Layout, Store, offsets_of


@dataclass(frozen=True)
class Rows:
    """A panel's content in the order of the user's rows.

    Parameters
    ----------
    codes : ndarray of shape (n_rows,)
        Position of each row's series.
    ids : Index of length n_series
    times : Index of length n_rows
    values, covariates, static : ndarrays
        The last with a row per series.
    columns, covariate_names, static_names : tuples of labels
    layout : Layout
    at : Places
    """

    codes: NDArray[np.int64]
    ids: Any
    times: Any
    values: NDArray[np.float64]
    covariates: NDArray[np.float64]
    static: NDArray[np.float64]
    columns: tuple[Hashable, ...]
    covariate_names: tuple[Hashable, ...]
    static_names: tuple[Hashable, ...]
    layout: Layout
    at: Places


def assemble(rows: Rows, origin: Any) -> Store:
    """Sort the rows into series and check what is asked of them."""
    stamps = stamps_of(rows.times, rows.at)
    clock = Clock(rows.times.dtype)
    refuse_missing(rows.covariates, rows.covariate_names, rows.at)
    order = np.arange(len(rows.codes))
    if not _is_sorted(rows.codes, stamps):
        tell_unsorted(rows.codes, stamps, rows.values, rows.at)
        order = np.lexsort((stamps, rows.codes))
    codes, stamps = rows.codes[order], stamps[order]
    refuse_duplicates(codes, stamps, order, rows.at)
    offsets = offsets_of(np.bincount(codes, minlength=len(rows.ids)))
    return Store(
        ids=rows.ids.to_numpy(copy=True),
        id_dtype=rows.ids.dtype,
        offsets=offsets,
        stamps=stamps,
        origins=origins_of(origin, clock, stamps, stamps[offsets[:-1]]),
        values=rows.values[order],
        covariates=rows.covariates[order],
        static=rows.static,
        columns=rows.columns,
        covariate_names=rows.covariate_names,
        static_names=rows.static_names,
        clock=clock,
        origin=kind_of_origin(origin),
        rows=order,
        by_series=False,
        layout=rows.layout,
    )


def _is_sorted(codes: NDArray[np.int64], stamps: NDArray[Any]) -> bool:
    step = np.diff(codes)
    return bool(((step > 0) | ((step == 0) & (stamps[1:] >= stamps[:-1]))).all())


def kind_of_origin(origin: Any) -> str:
    """``"series"``, or ``"panel"`` for a common clock, whatever its zero."""
    return "series" if isinstance(origin, str) and origin == "series" else "panel"


def origins_of(origin: Any, clock: Clock, stamps: NDArray[Any], firsts: NDArray[Any]) -> NDArray[Any]:
    """Stamps of time zero, one per series.

    Parameters
    ----------
    origin : {"series", "panel"} or a time
    clock : Clock
    stamps : ndarray of shape (n_rows,)
    firsts : ndarray of shape (n_series,)
        Each series' own zero.
    """
    if isinstance(origin, str) and origin in ("series", "panel"):
        return firsts.copy() if origin == "series" else np.full_like(firsts, stamps.min())
    zero = clock.moments(origin)
    if zero.ndim or (clock.kind == "datetime" and zero.dtype.kind == "m"):
        raise ValueError(f"origin={origin!r} must be 'series', 'panel' or one time.")
    return np.full(firsts.shape, zero)


def read_long(
    frame: Any, series_id: Hashable, time: Hashable, values: Any, static: Any, covariates: Any, origin: Any
) -> Store:
    """A frame with a row per series and time."""
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"from_long takes a pandas DataFrame, not {type(frame).__name__}.")
    if not len(frame):
        raise ValueError("the frame has no rows.")
    places = _level_places(frame) if series_id is None and time is None else _named_places(frame, series_id, time)
    ids, times = (_labels(frame, *place) for place in places)
    in_columns = tuple(role for role, (kind, _) in zip(("series", "time"), places, strict=True) if kind == "column")
    static_names, covariate_names = names_of(static, frame.columns), names_of(covariates, frame.columns)
    taken = [place for kind, place in places if kind == "column"] + [*static_names, *covariate_names]
    columns = (
        tuple(name for name in frame.columns if name not in taken)
        if values is None
        else names_of(values, frame.columns)
    )
    _check_names(frame, [*taken, *columns])

    codes, uniques = pd.factorize(ids)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        raise ValueError(f"row {row}: the series id is missing ({ids[row]!r}).")
    at = Places(codes, uniques)
    static_rows = numeric_columns(frame, static_names, at)
    levels = {place: role for role, (kind, place) in zip(("series", "time"), places, strict=True) if kind == "level"}
    known = frame.index.nlevels == len(levels)
    rows = Rows(
        codes=codes,
        ids=uniques,
        times=times,
        values=numeric_columns(frame, columns, at),
        covariates=numeric_columns(frame, covariate_names, at),
        static=constant_columns(static_rows, static_names, codes, len(uniques), at),
        columns=columns,
        covariate_names=covariate_names,
        static_names=static_names,
        layout=Layout(
            series_name=ids.name,
            time_name=times.name,
            levels=tuple(levels[level] for level in sorted(levels)) if known else (),
            index=None if known else frame.index,
            in_columns=in_columns,
            column_order=tuple(frame.columns),
        ),
        at=at,
    )
    return assemble(rows, origin)


def _level_places(frame: Any) -> list[tuple[str, Any]]:
    """Ids and times in a two-level index."""
    if frame.index.nlevels != 2:
        raise ValueError(
            f"the frame's index has {frame.index.nlevels} level(s): name the columns or levels by series_id= and "
            "time=, or give a two-level index (series, time)."
        )
    return [("level", 0), ("level", 1)]


def _named_places(frame: Any, series_id: Hashable, time: Hashable) -> list[tuple[str, Any]]:
    if series_id is None or time is None:
        missing = "series_id" if series_id is None else "time"
        raise TypeError(f"{missing}= is missing: series_id and time go together (a level of the index needs a name).")
    return [_place(frame, series_id, "series_id"), _place(frame, time, "time")]


def _place(frame: Any, name: Hashable, argument: str) -> tuple[str, Any]:
    levels = list(frame.index.names)
    if name in frame.columns and name in levels:
        raise ValueError(f"{argument}={name!r} is both a column and a level of the index: rename one of them.")
    if name in levels:
        return "level", levels.index(name)
    _check_names(frame, [name], f"{argument}=")
    return "column", name


def _check_names(frame: Any, names: Sequence[Hashable], argument: str = "") -> None:
    for name in names:
        if name not in frame.columns:
            raise KeyError(
                f"{argument}{name!r} is not in the frame; columns: {list(frame.columns)}, levels of the index: "
                f"{list(frame.index.names)}."
            )
    doubled = frame.columns[frame.columns.duplicated()]
    if doubled.isin(list(names)).any():
        raise ValueError(f"the frame has duplicate columns: {doubled.unique().tolist()}. Rename or drop them.")
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ValueError(
            f"column {twice[0]!r} was named twice: series_id, time, values, static, covariates must differ."
        )


def _labels(frame: Any, kind: str, place: Any) -> Any:
    if kind == "level":
        return frame.index.get_level_values(place)
    column = frame[place]
    return pd.Index(column, dtype=column.dtype, name=place)


def read_frames(frames: Any, ids: Any, covariates: Any, static: Any, origin: Any) -> Store:
    """A frame per series, with times in the index."""
    if not isinstance(frames, list | tuple | np.ndarray | pd.Series):
        raise TypeError(f"from_frames takes a list, object array or Series of DataFrames, not {type(frames).__name__}.")
    if ids is None:
        ids = frames.index if isinstance(frames, pd.Series) else pd.RangeIndex(len(frames))
    frames, ids = list(frames), _unique_ids(ids, len(frames))
    columns = _common_columns(frames, ids)
    covariate_names = names_of(covariates, frames[0].columns)
    _check_names(frames[0], covariate_names, "covariates: ")
    channels = tuple(name for name in columns if name not in covariate_names)

    lengths = np.array([len(frame) for frame in frames])
    codes = np.repeat(np.arange(len(frames)), lengths)
    at = Places(codes, ids, offsets_of(lengths))
    stacked = pd.concat(frames, ignore_index=True)
    times = frames[0].index.append([frame.index for frame in frames[1:]])
    table, names = _static_table(static, len(frames))
    rows = Rows(
        codes=codes,
        ids=ids,
        times=times,
        values=numeric_columns(stacked, channels, at),
        covariates=numeric_columns(stacked, covariate_names, at),
        static=table,
        columns=channels,
        covariate_names=covariate_names,
        static_names=names,
        layout=Layout(ids.name or "series", frames[0].index.name or "time", column_order=columns),
        at=at,
    )
    return assemble(rows, origin)


def _unique_ids(ids: Any, n_series: int) -> Any:
    ids = pd.Index(ids)
    if len(ids) != n_series:
        raise ValueError(f"{len(ids)} ids for {n_series} series.")
    if not n_series:
        raise ValueError("there are no series.")
    if ids.hasnans or not ids.is_unique:
        wrong = ids[ids.isna()] if ids.hasnans else ids[ids.duplicated()]
        raise ValueError(f"ids must be unique and not missing, but have {shown(wrong[0])}.")
    return ids


def _common_columns(frames: list[Any], ids: Any) -> tuple[Hashable, ...]:
    """The columns that all frames have, in the order of the first frame."""
    for frame, label in zip(frames, ids, strict=True):
        if not isinstance(frame, pd.DataFrame) or frame.index.nlevels > 1:
            found = f"{type(frame).__name__} with {list(frame.index.names)}" if hasattr(frame, "index") else repr(frame)
            raise TypeError(f"series {shown(label)} must be a DataFrame with times as its index, not {found}.")
        if not len(frame):
            raise ValueError(
                f"series {shown(label)} has no rows, so it has no time: drop it, or give it rows of NaN at times to "
                "predict."
            )
        _check_names(frame, list(frames[0].columns.unique()), f"series {shown(label)}: column ")
        if len(frame.columns) != len(frames[0].columns):
            raise ValueError(
                f"series {shown(label)} has columns {list(frame.columns)}, but series {shown(ids[0])} has "
                f"{list(frames[0].columns)}."
            )
    return tuple(frames[0].columns)


def _static_table(static: Any, n_series: int) -> tuple[NDArray[np.float64], tuple[Hashable, ...]]:
    """Static covariates given as one row per series."""
    if static is None:
        return np.empty((n_series, 0)), ()
    frame = static if isinstance(static, pd.DataFrame) else pd.DataFrame(np.asarray(static)).add_prefix("static")
    if len(frame) != n_series:
        raise ValueError(f"static has {len(frame)} rows for {n_series} series.")
    names = tuple(frame.columns)
    _check_names(frame, names)
    return numeric_columns(frame, names, Places(np.arange(n_series), frame.index)), names


def read_dense(X: Any, times: Any, ids: Any, columns: Any, static: Any, origin: Any) -> Store:
    """An array with a row per series; a frame's labels are its ids and, where they are times, its grid."""
    if isinstance(X, pd.DataFrame):
        ids = X.index if ids is None else ids
        times = X.columns if times is None and _is_grid(X.columns) else times
        X = numeric_columns(
            X.set_axis(range(X.shape[1]), axis=1), range(X.shape[1]), Places(np.arange(len(X)), X.index)
        )
    dense = np.asarray(X)
    if dense.dtype.kind not in "iufb":
        raise TypeError(f"from_dense takes an array of numbers, not of dtype {dense.dtype}.")
    dense = dense[:, :, np.newaxis] if dense.ndim == 2 else dense
    if dense.ndim != 3 or 0 in dense.shape[:2]:
        raise ValueError(f"from_dense takes (n_series, n_times[, n_channels]), not an array of shape {np.shape(X)}.")
    n_series, n_times, n_channels = dense.shape
    ids = _unique_ids(pd.RangeIndex(n_series) if ids is None else ids, n_series)
    names = tuple(range(n_channels)) if columns is None else tuple(columns)
    if len(names) != n_channels or len(set(names)) != n_channels:
        raise ValueError(f"columns={list(names)} must be {n_channels} different names.")

    codes = np.repeat(np.arange(n_series), n_times)
    at = Places(codes, ids, np.arange(n_series) * n_times)
    values = dense.reshape(-1, n_channels).astype(np.float64)
    refuse_infinite(values, names, at)
    table, static_names = _static_table(static, n_series)
    rows = Rows(
        codes=codes,
        ids=ids,
        times=_grid(times, n_series, n_times),
        values=values,
        covariates=np.empty((len(codes), 0)),
        static=table,
        columns=names,
        covariate_names=(),
        static_names=static_names,
        layout=Layout(ids.name or "series"),
        at=at,
    )
    return assemble(rows, origin)


def _is_grid(labels: Any) -> bool:
    return bool(labels.dtype.kind in "iufmM")


def _grid(times: Any, n_series: int, n_times: int) -> Any:
    """The times of all rows: shared, or each series' own."""
    if times is None:
        times = np.arange(n_times)
    if np.shape(times) == (n_series, n_times):
        return pd.Index(np.asarray(times).ravel())
    if np.shape(times) != (n_times,):
        raise ValueError(f"times of shape {np.shape(times)} must be ({n_times},) or ({n_series}, {n_times}).")
    return pd.Index(times).take(np.tile(np.arange(n_times), n_series))
