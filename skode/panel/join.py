"""Several panels into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skode.panel.checks import Places, constant_columns, refuse_duplicates
from skode.panel.store import Layout, Store, offsets_of, settled


def stack(stores: Sequence[Store]) -> Store:
    """The series of all stores, one store after another; equal ids stay apart."""
    if not stores:
        raise ValueError("there are no panels to join.")
    for store in stores[1:]:
        _check_alike(stores[0], store)
    clock = reduce(lambda clock, store: clock.joined(store.clock), stores[1:], stores[0].clock)
    parts = [settled(store) for store in stores]
    origins = np.concatenate([part.origins for part in parts])
    starts = offsets_of(np.array([len(part.rows) for part in parts]))
    ids = reduce(lambda index, part: index.append(_ids(part)), parts[1:], _ids(parts[0]))
    return Store(
        ids=ids.to_numpy(),
        id_dtype=ids.dtype,
        offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
        stamps=np.concatenate([part.stamps for part in parts]),
        origins=np.full_like(origins, origins.min()) if stores[0].origin == "panel" and origins.size else origins,
        values=np.concatenate([part.values for part in parts]),
        covariates=np.concatenate([part.covariates for part in parts]),
        static=np.concatenate([part.static for part in parts]),
        columns=stores[0].columns,
        covariate_names=stores[0].covariate_names,
        static_names=stores[0].static_names,
        clock=clock,
        origin=stores[0].origin,
        rows=np.concatenate([part.rows + start for part, start in zip(parts, starts[:-1], strict=True)]),
        by_series=False,
        layout=_layout([part.layout for part in parts]),
    )


def _check_alike(one: Store, other: Store) -> None:
    for what in ("columns", "covariate_names", "static_names", "origin"):
        if getattr(one, what) != getattr(other, what):
            raise ValueError(f"panels with {what} {getattr(one, what)!r} and {getattr(other, what)!r} do not join.")


def _ids(store: Store) -> Any:
    return pd.Index(store.ids, dtype=store.id_dtype)


def _layout(layouts: list[Layout]) -> Layout:
    """The first frame's layout if all are of its form, else a two-level index."""
    first = layouts[0]
    if any((layout.levels, layout.in_columns) != (first.levels, first.in_columns) for layout in layouts):
        return Layout(first.series_name, first.time_name, column_order=first.column_order)
    if first.index is None:
        return first
    return replace(first, index=first.index.append([layout.index for layout in layouts[1:]]))


def join(store: Store) -> Store:
    """Series of equal ids as one series."""
    codes, ids = pd.factorize(_ids(store))
    if len(ids) == len(codes):
        return store
    row_codes = codes[store.series]
    order = np.lexsort((store.stamps, row_codes))
    stamps, at = store.stamps[order], Places(row_codes[np.argsort(store.rows)], ids)
    refuse_duplicates(row_codes[order], stamps, store.rows[order], at)
    return replace(
        store,
        ids=ids.to_numpy(),
        id_dtype=ids.dtype,
        offsets=offsets_of(np.bincount(row_codes, minlength=len(ids))),
        stamps=stamps,
        origins=_earliest(store.origins, codes),
        values=store.values[order],
        covariates=store.covariates[order],
        static=constant_columns(store.static, store.static_names, codes, len(ids), Places(codes, ids)),
        rows=store.rows[order],
        times=None,
    )


def _earliest(origins: NDArray[Any], codes: NDArray[np.int64]) -> NDArray[Any]:
    order = np.lexsort((origins, codes))
    return origins[order][np.searchsorted(codes[order], np.arange(codes.max() + 1))]
