"""Panel: irregular series as the rows of X."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skode.panel.checks import Places, refuse_infinite
from skode.panel.html import write_html
from skode.panel.join import join, stack
from skode.panel.queries import Queries, make_queries, positions_of, zeros_of
from skode.panel.readers import kind_of_origin, origins_of, read_dense, read_frames, read_long
from skode.panel.rows import SeriesRows
from skode.panel.store import keep_rows
from skode.panel.writers import write_dense, write_long, write_summary


class Panel(SeriesRows):
    """An immutable collection of series, each with its own irregular times; a row is a series.

    Any channel may be unobserved (NaN) at any time; a row whose channels are all NaN is a *query*: a time at which
    predictions are wanted. A panel is made by ``from_long``, ``from_frames`` or ``from_dense``, and keeps its type
    through scikit-learn's splitters, searches and pipelines.

    Times may be numbers, datetimes of any unit, with or without time zone, or timedeltas. Inside they are float64
    elapsed times since an origin: the numbers' own unit, or seconds. Datetimes with a time zone elapse in UTC. Rows
    may come in any order: they are sorted inside, and go out in the order in which they came.

    Attributes
    ----------
    ids : ndarray of shape (n_series,)
        Names of the series. Sampling with replacement may repeat them.
    offsets : int64 ndarray of shape (n_series + 1,)
        The rows of series ``i`` are ``offsets[i]`` to ``offsets[i + 1]`` of the row-wise arrays, ascending in time.
    times : float64 ndarray of shape (n_rows,)
        Time since the origin, in ``unit``.
    values : float64 ndarray of shape (n_rows, n_channels)
        NaN where unobserved.
    covariates : float64 ndarray of shape (n_rows, n_covariates)
        Inputs known at every row, queries included; never NaN.
    static : float64 ndarray of shape (n_series, n_static)
        Covariates of whole series; NaN where unknown.
    columns, covariate_names, static_names : tuples of labels
    origin : {"series", "panel"}
        Whether time 0 is each series' own, its first time when the panel was made, or one for the panel.
    origins : ndarray of shape (n_series,)
        Time 0 of each series in the user's times (datetimes in UTC).

    Notes
    -----
    All arrays are read-only. Picking series or rows (``take``, ``before``, ``after``) keeps origins, so that elapsed
    times of parts agree. A series may have no rows left after ``before`` or ``after``; channels without any
    observation and series of queries alone are kept too: what they mean is for the estimator to say.

    Examples
    --------
    >>> import pandas as pd
    >>> from skode import Panel
    >>> frame = pd.DataFrame(
    ...     {"patient": ["b", "a", "a"], "hour": [2.0, 0.5, 3.0], "pulse": [71.0, 64.0, None]}
    ... )
    >>> panel = Panel.from_long(frame, series_id="patient", time="hour")
    >>> panel.shape, panel.ids.tolist(), panel.times.tolist()
    ((2, 1), ['b', 'a'], [0.0, 0.0, 2.5])
    >>> panel[1]["pulse"].to_dict()
    {0.5: 64.0, 3.0: nan}
    >>> panel.to_long().equals(frame)
    True
    """

    __slots__ = ()

    # Making

    @classmethod
    def from_long(
        cls,
        df: Any,
        series_id: Hashable = None,
        time: Hashable = None,
        values: Any = None,
        static: Any = None,
        covariates: Any = None,
        origin: Any = "series",
    ) -> Panel:
        """A panel from a frame with one row per series and time.

        Parameters
        ----------
        df : DataFrame
            Rows in any order.
        series_id, time : label, optional
            The column or the level of the index with the series' names, and with the times. Both None: the index has
            two levels, (series, time).
        values : label or list of labels, optional
            Channels; all other columns by default. No column at all makes a panel of bare events.
        static : label or list of labels, optional
            Columns with one number per series.
        covariates : label or list of labels, optional
            Columns with inputs that are known at every row.
        origin : {"series", "panel"} or time, default="series"
            Time 0: each series' first time, the panel's first time, or a time on the panel's clock.

        Returns
        -------
        Panel
            Series in the order of their first rows.

        Raises
        ------
        KeyError
            If the frame lacks a named column.
        TypeError
            If times are no times or of several kinds or time zones, or another column is not numeric.
        ValueError
            If an id or time is missing or infinite, a value infinite, a covariate NaN, a pair (series, time) or a
            column's name comes twice, or a static column varies within a series.

        Warns
        -----
        UserWarning
            If the observed rows of a series are not in the order of their times.
        """
        return cls(read_long(df, series_id, time, values, static, covariates, origin))

    @classmethod
    def from_frames(
        cls,
        frames: Any,
        ids: Any = None,
        covariates: Any = None,
        static: Any = None,
        origin: Any = "series",
    ) -> Panel:
        """A panel from one frame per series, its index being times.

        Parameters
        ----------
        frames : list, object array or Series of DataFrames
            All with the same columns.
        ids : sequence of length n_series, optional
            Names of the series: by default the index of a Series, else 0, 1, ...
        covariates : label or list of labels, optional
            Columns with inputs that are known at every row.
        static : DataFrame or array of shape (n_series, n_static), optional
            Covariates of whole series, in the order of ``frames``.
        origin : {"series", "panel"} or time, default="series"
            As in ``from_long``.

        Returns
        -------
        Panel

        Raises
        ------
        KeyError, TypeError, ValueError
            As ``from_long``; also if a frame has no rows or other columns than the first, or ids repeat.
        """
        return cls(read_frames(frames, ids, covariates, static, origin))

    @classmethod
    def from_dense(
        cls,
        X: Any,
        times: Any = None,
        ids: Any = None,
        columns: Any = None,
        static: Any = None,
        origin: Any = "series",
    ) -> Panel:
        """A panel from an array whose rows are series.

        Parameters
        ----------
        X : array of shape (n_series, n_times, n_channels) or (n_series, n_times), or DataFrame of the latter
            NaN is unobserved. A frame's index gives ids; its columns are times if they are numbers or datetimes.
        times : array of shape (n_times,) or (n_series, n_times), optional
            0, 1, ... by default.
        ids, columns : sequences, optional
            Names of series and channels; 0, 1, ... by default.
        static : DataFrame or array of shape (n_series, n_static), optional
            Covariates of whole series.
        origin : {"series", "panel"} or time, default="series"
            As in ``from_long``.

        Returns
        -------
        Panel

        Raises
        ------
        TypeError, ValueError
            As ``from_long``; also if shapes do not fit or ids repeat.

        Examples
        --------
        >>> from skode import Panel
        >>> Panel.from_dense([[1.0, float("nan"), 3.0]], times=[0.0, 0.5, 2.0]).to_dense().shape
        (1, 3, 1)
        """
        return cls(read_dense(X, times, ids, columns, static, origin))

    @classmethod
    def concat(cls, panels: Iterable[Panel]) -> Panel:
        """Several panels as one; series with the same id become one series.

        So new observations reach a known series: ``Panel.concat([panel, news])``.

        Parameters
        ----------
        panels : iterable of Panel
            With the same channels, covariates, static columns, kind of origin and of time.

        Returns
        -------
        Panel
            Its rows go out one panel after another. A joined series starts at the earliest of its origins, and so
            does the clock of panels with ``origin="panel"``.

        Raises
        ------
        ValueError
            If two rows have the same series and time, static values of a series differ, or the panels do not match.
        """
        return cls(join(stack([panel._store for panel in panels])))

    @property
    def unit(self) -> str | None:
        """Unit of ``times``: ``"s"`` for datetimes and timedeltas, None (their own) for numbers."""
        return self._store.clock.unit

    @property
    def time_dtype(self) -> Any:
        """Dtype of the user's times, with unit and time zone."""
        return self._store.clock.dtype

    def positions(self, ids: Any) -> NDArray[np.int64]:
        """Positions of the series with these ids.

        Raises
        ------
        KeyError
            If an id is unknown.
        ValueError
            If ids repeat in the panel.
        """
        return positions_of(self._store, ids)

    def rows(self, keep: Any) -> Panel:
        """All series with those of their rows that a mask of shape (n_rows,) marks, in the order of ``times``."""
        keep = np.asarray(keep)
        if keep.dtype != bool or keep.shape != self.times.shape:
            raise ValueError(f"keep must be a mask of shape {self.times.shape}, not {keep.dtype} of {keep.shape}.")
        return Panel(keep_rows(self._store, keep))

    def before(self, t: Any, since: str | None = None) -> Panel:
        """All series with their rows earlier than ``t``.

        Parameters
        ----------
        t : number, Timestamp, Timedelta or str, or a sequence with one for each series
            A number or Timestamp is a time, as in the user's index. For panels of datetimes a Timedelta or a string
            such as ``"6h"`` is an offset from each series' origin; other strings are read as timestamps.
        since : {None, "origin", "last"}
            ``"origin"``: ``t`` is an offset from each series' origin, for numbers too. ``"last"``: from each series'
            last observation.

        Returns
        -------
        Panel
            The same series with the same origins; some may be empty. ``before(t)`` and ``after(t)`` together hold
            every row once.

        Raises
        ------
        TypeError, ValueError
            If ``t`` is no such time.

        Examples
        --------
        >>> from skode import Panel
        >>> panel = Panel.from_dense([[5.0, 6.0, 7.0]], times=[10.0, 11.0, 12.0])
        >>> panel.before(12).values.ravel().tolist(), panel.after(2, since="origin").values.ravel().tolist()
        ([5.0, 6.0], [7.0])
        """
        return self.rows(self._store.stamps < self._cuts(t, since))

    def after(self, t: Any, since: str | None = None) -> Panel:
        """All series with their rows at ``t`` or later; see ``before``."""
        return self.rows(self._store.stamps >= self._cuts(t, since))

    def _cuts(self, t: Any, since: str | None) -> NDArray[Any]:
        """The stamp that splits each row's series."""
        moments = self._store.clock.moments(t)
        if moments.ndim and moments.shape != (len(self),):
            raise ValueError(f"{len(moments)} times for {len(self)} series: give one time, or one for each.")
        zeros = zeros_of(self._store, moments, since)
        cuts = np.broadcast_to(moments, len(self)) if zeros is None else zeros + moments
        return np.asarray(cuts[self.series])

    # Queries

    def queries(self, times: Any, since: str | None = None) -> Queries:
        """Query times as positions of series and elapsed times.

        Parameters
        ----------
        times : number, Timestamp, Timedelta or str, a sequence of them, or MultiIndex
            Times for all series, as in ``before``; or an index (series id, time) with a row per query.
        since : {None, "origin", "last"}
            As in ``before``: ``"last"`` makes ``times`` a horizon past each series' last observation.

        Returns
        -------
        Queries
            ``series``, ``times``, ``index`` for an output with a row per query, ``n_shared``.

        Raises
        ------
        KeyError
            If the index has ids that the panel has not.
        TypeError, ValueError
            If these are no such times; with ``since="last"`` if a series has no observation.

        Examples
        --------
        >>> from skode import Panel
        >>> panel = Panel.from_dense([[5.0, 6.0], [7.0, float("nan")]], times=[10.0, 11.0])
        >>> ahead = panel.queries([1.0, 2.0], since="last")
        >>> ahead.series.tolist(), ahead.times.tolist(), ahead.index.tolist()
        ([0, 0, 1, 1], [2.0, 3.0, 1.0, 2.0], [(0, 12.0), (0, 13.0), (1, 11.0), (1, 12.0)])
        """
        return make_queries(self._store, times, since)

    def with_origin(self, origin: Any) -> Panel:
        """The same series with another time 0.

        Parameters
        ----------
        origin : {"series", "panel"} or time
            As in ``from_long``. Series without rows keep their own origin under ``"series"``.

        Returns
        -------
        Panel
        """
        store = self._store
        if not len(store.stamps):
            raise ValueError("a panel without rows has no other origin.")
        starts = np.minimum(store.offsets[:-1], len(store.stamps) - 1)
        firsts = np.where(store.lengths > 0, store.stamps[starts], store.origins)
        origins = origins_of(origin, store.clock, store.stamps, firsts)
        return Panel(replace(store, origin=kind_of_origin(origin), origins=origins, times=None))

    def with_values(self, values: Any, columns: Any = None) -> Panel:
        """The same rows with other values: predictions, say, or some of the values hidden.

        Parameters
        ----------
        values : array of shape (n_rows, n_columns)
            In the order of ``times``.
        columns : sequence of labels, optional
            The panel's own by default.

        Returns
        -------
        Panel
        """
        names = self.columns if columns is None else tuple(columns)
        table = np.array(values, dtype=np.float64)
        if table.shape != (len(self.times), len(names)):
            raise ValueError(f"values of shape {table.shape} must be {(len(self.times), len(names))}.")
        refuse_infinite(table, names, Places(self.series, self.ids))
        return Panel(replace(self._store, values=table, columns=names))

    # Going out

    def to_long(self) -> Any:
        """The long frame in the form the panel came from: same index, order of rows, dtype of times and ids.

        Values are float64. Columns that the panel did not take are gone. Panels from frames or arrays, and joined
        panels of different forms, get a two-level index (series, time).

        Returns
        -------
        DataFrame
        """
        return write_long(self._store)

    def to_frames(self) -> list[Any]:
        """A DataFrame per series, its index being times: channels, then covariates.

        Returns
        -------
        list of DataFrame
        """
        return list(self)

    def to_dense(self) -> NDArray[np.float64]:
        """The values as an array, row j of a series being its j-th row; times may differ between series.

        Returns
        -------
        ndarray of shape (n_series, n_times, n_channels)

        Raises
        ------
        ValueError
            If the series have different numbers of rows.
        """
        return write_dense(self._store)

    def __repr__(self) -> str:
        heading = f"Panel of {len(self)} series, {self.shape[1]} channels, {len(self.times)} rows"
        return f"{heading}\n{write_summary(self._store)}"

    def _repr_html_(self) -> str:
        return write_html(self._store)
