"""What LatentODERegressor accepts as X, as one Panel; and predictions in the container that X came in.

A panel, a long frame, a list of frames, a 3-D array, a 2-D array or wide frame: rows are series in all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel import Panel

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """The roles of a long frame's columns, as the estimator's arguments name them."""

    series_id: Hashable = None
    time: Hashable = None
    values: Any = None
    static: Any = None
    covariates: Any = None
    origin: Any = "series"

    @property
    def named(self) -> bool:
        """Whether frames are long because the arguments say so."""
        return self.series_id is not None or self.time is not None


@dataclass(frozen=True)
class Container:
    """A panel, and the object that it came from.

    ``kind`` is "panel", "long", "frames", "dense" (3-D) or "wide" (2-D).
    """

    panel: Panel
    kind: str
    given: Any = None

    def restored(self, parts: Sequence[Array], labels: Sequence[Any] | None = None) -> Any:
        """Values of all rows in X's own container.

        Parameters
        ----------
        parts : sequence of arrays of shape (n_rows, n_channels)
            In the order of the panel's times: one, or as many as ``labels``.
        labels : sequence, optional
            Arrays get one more last axis, of this length; frames and panels a column (channel, label) of each.
        """
        if self.kind in ("dense", "wide"):
            arrays = [self._dense(part) for part in parts]
            return self._framed(arrays, labels) if labels is not None else self._like_wide(arrays[0])
        columns: list[Hashable] = list(self.panel.columns)
        table = parts[0]
        if labels is not None:
            table = np.stack(parts, axis=2).reshape(len(table), len(columns) * len(labels))
            columns = [(column, label) for column in columns for label in labels]
        panel = self.panel.with_values(table, columns)
        if self.kind == "panel":
            return panel
        if self.kind == "frames":
            return panel.to_frames()
        frame = panel.to_long()
        known = {*self.panel.covariate_names, *self.panel.static_names}
        return frame[[column for column in frame.columns if column not in known]]

    def _dense(self, part: Array) -> Array:
        dense = self.panel.with_values(part).to_dense()
        return np.asarray(dense[:, :, 0] if self.kind == "wide" else dense)

    def _like_wide(self, values: Array) -> Any:
        if isinstance(self.given, pd.DataFrame):
            return pd.DataFrame(values, index=self.given.index, columns=self.given.columns)
        return values

    def _framed(self, arrays: list[Array], labels: Sequence[Any]) -> Any:
        if isinstance(self.given, pd.DataFrame):
            columns = pd.MultiIndex.from_product([self.given.columns, labels])
            return pd.DataFrame(np.stack(arrays, axis=2).reshape(len(arrays[0]), -1), self.given.index, columns)
        return np.stack(arrays, axis=-1)


def is_long(X: Any, columns: Columns) -> bool:
    """Whether a frame has a row for each series and time."""
    return isinstance(X, pd.DataFrame) and (columns.named or isinstance(X.index, pd.MultiIndex))


def is_frames(X: Any) -> bool:
    """Whether X is a list, an object array or a Series of frames."""
    if isinstance(X, pd.Series | list | tuple) or (isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1):
        return len(X) > 0 and all(isinstance(frame, pd.DataFrame) for frame in X)
    return False


def read_series(X: Any, columns: Columns) -> Container | None:
    """The container of anything but a plain table of two axes, which is scikit-learn's to check first.

    Raises
    ------
    KeyError, TypeError, ValueError
        As :class:`skode.Panel` says of bad frames and arrays.
    """
    if isinstance(X, Panel):
        return Container(X, "panel")
    if is_long(X, columns):
        panel = Panel.from_long(
            X, columns.series_id, columns.time, columns.values, columns.static, columns.covariates, columns.origin
        )
        return Container(panel, "long", X)
    if is_frames(X):
        return Container(Panel.from_frames(X, covariates=columns.covariates, origin=columns.origin), "frames", X)
    if not isinstance(X, pd.DataFrame) and getattr(X, "ndim", 0) == 3:
        if not len(X) or not X.shape[1] or not X.shape[2]:
            raise ValueError(f"X has shape {tuple(X.shape)}: no series, no times or no channels.")
        return Container(Panel.from_dense(X, origin=columns.origin), "dense", X)
    _refuse_nested(X)
    return None


def _refuse_nested(X: Any) -> None:
    """Refuse a frame whose cells are series, which scikit-learn's checks would call a sequence."""
    if isinstance(X, pd.DataFrame) and X.size and isinstance(X.iat[0, 0], pd.Series):
        raise TypeError(
            f"X holds a Series in its first cell, of row {X.index[0]!r} and column {X.columns[0]!r}: such nested "
            "frames are not read. sktime.datatypes.convert_to(X, 'pd-multiindex') makes a long frame of one."
        )


def read_wide(X: Any, table: Array, columns: Columns) -> Container:
    """The container of a table whose rows are series; ``table`` is its checked array.

    Times are 0, 1, ..., or a frame's column labels if these are numbers or datetimes.
    """
    if isinstance(X, pd.DataFrame):
        framed = pd.DataFrame(table, columns=X.columns)
        panel = Panel.from_dense(framed, origin=columns.origin)
        return Container(panel, "wide", X)
    return Container(Panel.from_dense(table, origin=columns.origin), "wide")
