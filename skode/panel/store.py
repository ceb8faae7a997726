"""The flat arrays of a panel, and how series and rows are picked from them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skode.panel.clock import Clock


@dataclass(frozen=True)
class Layout:
    """The form of the long frame that a panel came from and goes back to.

    Parameters
    ----------
    series_name, time_name : label
        Names of the column or the index level of ids and times.
    levels : tuple of {"series", "time"}
        The levels of the frame's index if they are ids and times alone; empty: ``index`` holds the index.
    index : Index or None
        The index of the frame's rows if it cannot be made from ids and times.
    in_columns : tuple of {"series", "time"}
        Which of the two are columns.
    column_order : tuple of labels
    """

    series_name: Hashable = "series"
    time_name: Hashable = "time"
    levels: tuple[str, ...] = ("series", "time")
    index: Any = None
    in_columns: tuple[str, ...] = ()
    column_order: tuple[Hashable, ...] = ()

    def column_labels(self) -> list[Hashable]:
        """Names of ids and times where they are columns."""
        labels = {"series": self.series_name, "time": self.time_name}
        return [labels[role] for role in self.in_columns]


@dataclass(frozen=True, eq=False)
class Store:
    """Series one after another, each in the order of its times.

    Parameters
    ----------
    ids : ndarray of shape (n_series,)
    id_dtype : dtype
        That of the user's ids.
    offsets : int64 ndarray of shape (n_series + 1,)
        Series i has rows ``offsets[i]`` to ``offsets[i + 1]``.
    stamps : ndarray of shape (n_rows,)
    origins : ndarray of shape (n_series,)
        Stamps of time zero.
    values, covariates : float64 ndarrays of shape (n_rows, n_channels) and (n_rows, n_covariates)
    static : float64 ndarray of shape (n_series, n_static)
    columns, covariate_names, static_names : tuples of labels
    clock : Clock
    origin : {"series", "panel"}
    rows : int64 ndarray of shape (n_rows,) or None
        Each row's place in the user's frame; None is filled by 0, 1, ...
    by_series : bool
        Whether rows go out series by series, and by ``rows`` only within a series; else by ``rows`` alone.
    layout : Layout
    times : float64 ndarray of shape (n_rows,), optional
        Elapsed times; computed where not given.
    """

    ids: NDArray[Any]
    id_dtype: Any
    offsets: NDArray[np.int64]
    stamps: NDArray[Any]
    origins: NDArray[Any]
    values: NDArray[np.float64]
    covariates: NDArray[np.float64]
    static: NDArray[np.float64]
    columns: tuple[Hashable, ...]
    covariate_names: tuple[Hashable, ...]
    static_names: tuple[Hashable, ...]
    clock: Clock
    origin: str
    rows: Any
    by_series: bool
    layout: Layout
    times: Any = None

    def __post_init__(self) -> None:
        names = (*self.columns, *self.covariate_names, *self.static_names, *self.layout.column_labels())
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(
                f"two columns are named {twice[0]!r}: ids, times, channels, covariates, static must differ."
            )
        if self.rows is None:
            object.__setattr__(self, "rows", np.arange(len(self.stamps)))
        if self.times is None:
            object.__setattr__(self, "times", self.clock.elapsed(self.stamps, self.origins[self.series]))
        for array in self.arrays():
            array.flags.writeable = False

    def arrays(self) -> list[NDArray[Any]]:
        """All arrays."""
        return [part for part in self.parts().values() if isinstance(part, np.ndarray)]

    def parts(self) -> dict[str, Any]:
        """All fields by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of rows of each series."""
        return np.diff(self.offsets)

    @property
    def series(self) -> NDArray[np.int64]:
        """Position of each row's series."""
        return np.repeat(np.arange(len(self.ids)), self.lengths)

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Whether a row holds an observation; without channels every row is one."""
        return np.asarray(~np.isnan(self.values).all(axis=1) if self.columns else np.full(len(self.values), True))

    def order(self) -> NDArray[np.int64]:
        """The stored rows in the order in which they go out."""
        return np.lexsort((self.rows, self.series)) if self.by_series else np.argsort(self.rows, kind="stable")


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where series of these lengths start and the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def take_series(store: Store, positions: NDArray[np.int64]) -> Store:
    """The series at ``positions``, repeats allowed."""
    lengths = store.lengths[positions]
    offsets = offsets_of(lengths)
    picked = np.arange(offsets[-1]) + np.repeat(store.offsets[positions] - offsets[:-1], lengths)
    return replace(
        store,
        ids=store.ids[positions],
        offsets=offsets,
        origins=store.origins[positions],
        static=store.static[positions],
        by_series=True,
        **_row_arrays(store, picked),
    )


def keep_rows(store: Store, keep: NDArray[np.bool_]) -> Store:
    """All series with those of their rows that ``keep`` marks."""
    return replace(store, offsets=offsets_of(keep)[store.offsets], **_row_arrays(store, keep))


def _row_arrays(store: Store, picked: NDArray[Any]) -> dict[str, Any]:
    return {name: getattr(store, name)[picked] for name in ("stamps", "values", "covariates", "rows", "times")}


def take_channels(store: Store, positions: NDArray[np.int64]) -> Store:
    """All series with the channels at ``positions``."""
    columns = tuple(store.columns[position] for position in positions)
    return replace(store, values=store.values[:, positions], columns=columns)


def settled(store: Store) -> Store:
    """The same series, with ``rows`` counted from 0 and an index of these rows alone."""
    order = store.order()
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    index = store.layout.index
    if index is not None and not (len(index) == len(rows) and np.array_equal(store.rows, rows)):
        index = index.take(store.rows[order])
    return replace(store, rows=rows, by_series=False, layout=replace(store.layout, index=index))
