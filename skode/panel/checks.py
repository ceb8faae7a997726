"""What is asked of the rows of a panel. Every complaint names the series, the column and the row."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.exceptions import warn


@dataclass(frozen=True)
class Places:
    """Words for the place of a row in the user's data.

    Parameters
    ----------
    codes : ndarray of shape (n_rows,)
        Each row's series.
    ids : sequence
        The series' names.
    starts : ndarray of shape (n_series,), optional
        Where the rows of each series start, if rows are counted within their series.
    """

    codes: NDArray[np.int64]
    ids: Any
    starts: NDArray[np.int64] | None = None

    def __call__(self, row: int) -> str:
        """Series and row."""
        code = int(self.codes[row])
        within = row if self.starts is None else row - int(self.starts[code])
        return f"series {shown(self.ids[code])}, row {within}"


def shown(label: Any) -> str:
    """A label as a user would type it."""
    return repr(label.item()) if isinstance(label, np.number | np.bool_) else repr(label)


def names_of(columns: Any, known: Any) -> tuple[Hashable, ...]:
    """Names of columns: of none, of one or of many; a tuple that is a column of ``known`` is one name."""
    if columns is None:
        return ()
    one = not pd.api.types.is_list_like(columns) or (isinstance(columns, tuple) and columns in known)
    return (columns,) if one else tuple(columns)


def numeric_columns(frame: Any, names: Sequence[Hashable], at: Places) -> NDArray[np.float64]:
    """Columns of a frame as float64, NaN where a cell is empty.

    Raises
    ------
    TypeError
        If a column holds something else than real numbers.
    ValueError
        If a number is infinite.
    """
    out = np.empty((len(frame), len(names)))
    for place, name in enumerate(names):
        out[:, place] = _numeric(frame[name], name, at)
    refuse_infinite(out, names, at)
    return out


def _numeric(column: Any, name: Hashable, at: Places) -> NDArray[np.float64]:
    if column.dtype.kind in "iufb":
        return np.asarray(column.to_numpy(dtype=np.float64, na_value=np.nan))
    cells = column.to_numpy(dtype=object)
    empty = pd.isna(cells)
    for row in np.flatnonzero(~empty).tolist():
        if not isinstance(cells[row], numbers.Real):
            raise TypeError(
                f"{at(row)}: column {name!r} (dtype {column.dtype}) holds {cells[row]!r}, which is not a number. "
                "Convert the column to numbers, or leave it out of values, covariates and static."
            )
    return np.where(empty, np.nan, cells).astype(np.float64)


def refuse_infinite(table: NDArray[np.float64], names: Sequence[Hashable], at: Places) -> None:
    """Raise ValueError if a cell is infinite."""
    infinite = np.isinf(table)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        raise ValueError(
            f"{at(row)}: column {names[column]!r} is {table[row, column]}. Values must be finite, or NaN if unobserved."
        )


def refuse_missing(covariates: NDArray[np.float64], names: Sequence[Hashable], at: Places) -> None:
    """Raise ValueError if a covariate is NaN."""
    missing = np.isnan(covariates)
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise ValueError(
            f"{at(row)}: covariate {names[column]!r} is NaN. Covariates are known inputs, needed at every row, queries "
            "included: fill it, or pass the column in values if it is observed only now and then."
        )


def refuse_duplicates(series: NDArray[np.int64], stamps: NDArray[Any], rows: NDArray[np.int64], at: Places) -> None:
    """Raise ValueError if a series has two rows at one time.

    Parameters
    ----------
    series, stamps : ndarray of shape (n_rows,)
        Series and time of each row, ascending.
    rows : ndarray of shape (n_rows,)
        Their rows in the user's data.
    at : callable
    """
    again = np.flatnonzero((series[1:] == series[:-1]) & (stamps[1:] == stamps[:-1]))
    if again.size:
        first, second = sorted(int(row) for row in rows[again[0] : again[0] + 2])
        raise ValueError(
            f"{again.size} duplicate rows of (series, time); first: {at(second)} has the time {stamps[again[0]]} of "
            f"row {at(first).rpartition(' ')[2]}. Join them, by groupby([series, time]).mean() for example."
        )


def tell_unsorted(codes: NDArray[np.int64], stamps: NDArray[Any], values: NDArray[np.float64], at: Places) -> None:
    """Warn if the observed rows of a series are not ascending; queries, which are all NaN, may stand anywhere."""
    observed = np.flatnonzero(~np.isnan(values).all(axis=1)) if values.shape[1] else np.arange(len(codes))
    rows = observed[np.argsort(codes[observed], kind="stable")]
    late = rows[1:][(codes[rows[1:]] == codes[rows[:-1]]) & (stamps[rows[1:]] < stamps[rows[:-1]])]
    if late.size:
        warn(
            f"the times of {np.unique(codes[late]).size} series are not ascending (first: {at(int(late.min()))}). They "
            "are sorted inside; results keep the order of your rows.",
        )


def constant_columns(
    table: NDArray[np.float64], names: Sequence[Hashable], codes: NDArray[np.int64], n_series: int, at: Places
) -> NDArray[np.float64]:
    """The one row per series of columns that do not vary within a series.

    Raises
    ------
    ValueError
        If one varies. NaN throughout a series is constant.
    """
    first = np.full(n_series, len(codes))
    np.minimum.at(first, codes, np.arange(len(codes)))
    expected = table[first[codes]]
    differs = (table != expected) & ~(np.isnan(table) & np.isnan(expected))
    if differs.any():
        row, column = np.argwhere(differs)[0]
        raise ValueError(
            f"{at(row)}: static column {names[column]!r} is {table[row, column]}, but {expected[row, column]} at row "
            f"{at(first[codes[row]]).rpartition(' ')[2]}. Static columns have one value per series; pass what varies "
            "in covariates."
        )
    return np.asarray(table[first])
