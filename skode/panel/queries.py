"""Times at which a panel's series are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel.checks import shown
from skode.panel.clock import Clock
from skode.panel.store import Store, keep_rows


@dataclass(frozen=True, eq=False)
class Queries:
    """Pairs of series and time.

    Attributes
    ----------
    series : int64 ndarray of shape (n_queries,)
        Positions of series in the panel.
    times : float64 ndarray of shape (n_queries,)
        Elapsed times in the panel's ``unit``, since each series' origin.
    index : MultiIndex of length n_queries
        (series id, time): the index of an output with a row per query.
    n_shared : int or None
        Number of times if every series is asked for at the same ones (or the same offsets): queries then go series
        by series, and an output reshapes to ``(n_series, n_shared)``. None for queries given by a (series, time) index.
    """

    series: NDArray[np.int64]
    times: NDArray[np.float64]
    index: Any
    n_shared: int | None


def make_queries(store: Store, times: Any, since: str | None) -> Queries:
    """The queries that ``times`` means; see Panel.queries."""
    if isinstance(times, pd.MultiIndex):
        return _paired(store, times)
    moments = np.atleast_1d(store.clock.moments(times))
    n_series, n_shared = len(store.ids), len(moments)
    series = np.repeat(np.arange(n_series), n_shared)
    zeros = zeros_of(store, moments, since)
    stamps = np.tile(moments, n_series) if zeros is None else zeros[series] + np.tile(moments, n_series)
    ids = pd.Index(store.ids, dtype=store.id_dtype)[series]
    index = pd.MultiIndex.from_arrays(
        [ids, store.clock.show(stamps)], names=[store.layout.series_name, store.layout.time_name]
    )
    return Queries(series, store.clock.elapsed(stamps, store.origins[series]), index, n_shared)


def zeros_of(store: Store, moments: NDArray[Any], since: str | None) -> NDArray[Any] | None:
    """Each series' stamp that offsets count from; None if ``moments`` are no offsets."""
    if since not in (None, "origin", "last"):
        raise ValueError(f"since={since!r} must be None, 'origin' or 'last'.")
    offsets_given = store.clock.kind == "datetime" and moments.dtype.kind == "m"
    if since is None:
        return store.origins if offsets_given else None
    if store.clock.kind == "datetime" and not offsets_given:
        raise TypeError(f"since={since!r} takes offsets such as '6h' or pd.Timedelta(6, 'h'), not timestamps.")
    return store.origins if since == "origin" else last_observed(store)


def last_observed(store: Store) -> NDArray[Any]:
    """Stamp of each series' last observation.

    Raises
    ------
    ValueError
        If a series has none.
    """
    seen = keep_rows(store, store.observed)
    empty = np.flatnonzero(seen.lengths == 0)
    if empty.size:
        raise ValueError(
            f"{empty.size} series have no observation to count from (first: {shown(store.ids[empty[0]])}): give "
            "times, or offsets since='origin'."
        )
    return np.asarray(seen.stamps[seen.offsets[1:] - 1])


def _paired(store: Store, index: Any) -> Queries:
    if index.nlevels != 2:
        raise ValueError(f"a query index has two levels (series, time), not {index.nlevels}.")
    series = positions_of(store, index.get_level_values(0))
    times = index.get_level_values(1)
    moments = store.clock.moments(times)
    if Clock(times.dtype).kind != store.clock.kind:
        raise TypeError(f"the index holds times of dtype {times.dtype}, the panel those of dtype {store.clock.dtype}.")
    return Queries(series, store.clock.elapsed(moments, store.origins[series]), index, None)


def positions_of(store: Store, labels: Any) -> NDArray[np.int64]:
    """Positions of ids.

    Raises
    ------
    KeyError
        If an id is unknown; names the first five.
    ValueError
        If ids repeat in the panel, as after sampling with replacement.
    """
    ids = pd.Index(store.ids, dtype=store.id_dtype)
    if not ids.is_unique:
        raise ValueError(
            f"the panel holds series {shown(ids[ids.duplicated()][0])} more than once: use positions (iloc)."
        )
    positions = np.asarray(ids.get_indexer(labels), dtype=np.int64)
    if (positions < 0).any():
        unknown = pd.Index(labels)[positions < 0].unique()
        more = "" if len(unknown) <= 5 else f" and {len(unknown) - 5} more"
        raise KeyError(f"series not in the panel: {', '.join(shown(label) for label in unknown[:5])}{more}.")
    return positions
