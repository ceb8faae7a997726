"""``panel[...]``, ``panel.iloc`` and ``panel.loc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel.checks import shown
from skode.panel.queries import positions_of

if TYPE_CHECKING:
    from skode.panel.rows import SeriesRows


def positions_in(key: Any, size: int, what: str) -> NDArray[np.int64]:
    """Non-negative positions that a slice, a mask or a list of integers means.

    Raises
    ------
    IndexError
        If a position is out of range, or a mask has another length.
    TypeError
        If these are no positions.
    """
    if isinstance(key, slice):
        return np.arange(size)[key]
    key = np.asarray(key)
    if key.ndim != 1 or (key.size and key.dtype.kind not in "iub"):
        raise TypeError(f"{what} are picked by integers, a slice or a mask; for labels use loc.")
    if key.dtype.kind == "b":
        if len(key) != size:
            raise IndexError(f"the mask has {len(key)} entries for {size} {what}.")
        return np.flatnonzero(key)
    positions = key.astype(np.int64)
    outside = (positions < -size) | (positions >= size)
    if outside.any():
        raise IndexError(f"position {positions[outside][0]} is out of range for {size} {what}.")
    return np.asarray(np.where(positions < 0, positions + size, positions))


def is_integer(key: Any) -> bool:
    """Whether a key is one position."""
    return isinstance(key, int | np.integer) and not isinstance(key, bool)


class PositionIndexer:
    """``iloc[series]`` and ``iloc[series, channels]``, by position."""

    def __init__(self, panel: SeriesRows) -> None:
        self._panel = panel

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):
            return self._panel[key]
        series, channels = key
        channels = positions_in([channels] if is_integer(channels) else channels, self._panel.shape[1], "channels")
        return self._panel.take(channels, axis=1)[series]


class LabelIndexer:
    """``loc[ids]`` and ``loc[ids, columns]``, by label; a mask works as well."""

    def __init__(self, panel: SeriesRows) -> None:
        self._panel = panel

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):
            return self._series(self._panel, key)
        ids, columns = key
        return self._series(self._channels(columns), ids)

    def _channels(self, columns: Any) -> SeriesRows:
        panel = self._panel
        if not _by_position(columns):
            known = panel.columns
            columns = list(columns) if pd.api.types.is_list_like(columns) else [columns]
            missing = [name for name in columns if name not in known]
            if missing:
                raise KeyError(f"channel {missing[0]!r} is not among {list(known)}.")
            columns = [known.index(name) for name in columns]
        return panel.take(positions_in(columns, panel.shape[1], "channels"), axis=1)

    @staticmethod
    def _series(panel: SeriesRows, key: Any) -> Any:
        if _by_position(key):
            return panel[key]
        if pd.api.types.is_list_like(key):
            return panel[positions_of(panel._store, key)]
        found = np.flatnonzero(panel.ids == key)
        if not found.size:
            raise KeyError(f"series {shown(key)} is not in the panel.")
        return panel[int(found[0])] if found.size == 1 else panel[found]


def _by_position(key: Any) -> bool:
    """Whether a key of ``loc`` is a mask or takes everything."""
    if isinstance(key, slice):
        if key != slice(None):
            raise TypeError("loc takes ids, lists of ids and masks; slices go to iloc or to the panel itself.")
        return True
    return pd.api.types.is_list_like(key) and np.asarray(key).dtype.kind == "b"
