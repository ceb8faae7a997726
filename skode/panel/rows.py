"""Series as the rows of X: what NumPy, scikit-learn and pickle ask of a panel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from skode.panel.indexers import LabelIndexer, PositionIndexer, is_integer, positions_in
from skode.panel.join import stack
from skode.panel.store import Store, settled, take_channels, take_series
from skode.panel.writers import order_within, write_frame


class SeriesRows:
    """An immutable sequence of series.

    Parameters
    ----------
    store : Store
    """

    __slots__ = ("_store",)
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]
    ndim = 2

    _store: Store

    def __init__(self, store: Store) -> None:
        if not isinstance(store, Store):
            raise TypeError("make a panel by Panel.from_long, Panel.from_frames or Panel.from_dense.")
        object.__setattr__(self, "_store", store)

    @property
    def ids(self) -> NDArray[Any]:
        """Names of the series, shape (n_series,)."""
        return self._store.ids

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where the rows of each series start and the last ones end, shape (n_series + 1,)."""
        return self._store.offsets

    @property
    def values(self) -> NDArray[np.float64]:
        """Shape (n_rows, n_channels), NaN where unobserved."""
        return self._store.values

    @property
    def covariates(self) -> NDArray[np.float64]:
        """Shape (n_rows, n_covariates), never NaN."""
        return self._store.covariates

    @property
    def static(self) -> NDArray[np.float64]:
        """Shape (n_series, n_static), NaN where unknown."""
        return self._store.static

    @property
    def columns(self) -> tuple[Hashable, ...]:
        """Names of the channels."""
        return self._store.columns

    @property
    def covariate_names(self) -> tuple[Hashable, ...]:
        """Names of the covariates."""
        return self._store.covariate_names

    @property
    def static_names(self) -> tuple[Hashable, ...]:
        """Names of the static covariates."""
        return self._store.static_names

    @property
    def origin(self) -> str:
        """``"series"`` or ``"panel"``."""
        return self._store.origin

    @property
    def origins(self) -> NDArray[Any]:
        """Time 0 of each series, shape (n_series,)."""
        return self._store.origins

    @property
    def times(self) -> NDArray[np.float64]:
        """Elapsed times since the origin, shape (n_rows,)."""
        return np.asarray(self._store.times)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of rows of each series."""
        return self._store.lengths

    @property
    def series(self) -> NDArray[np.int64]:
        """The position of each row's series, shape (n_rows,)."""
        return self._store.series

    @property
    def shape(self) -> tuple[int, int]:
        """(n_series, n_channels)."""
        return len(self._store.ids), len(self._store.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self._store.arrays())

    def __len__(self) -> int:
        return len(self._store.ids)

    def __getitem__(self, key: Any) -> Any:
        """One series as a DataFrame for an integer; a Panel for a slice, mask, list or array of integers."""
        if is_integer(key):
            (position,) = positions_in([key], len(self), "series")
            one = take_series(self._store, np.array([position]))
            return write_frame(one, 0, order_within(one))
        return type(self)(take_series(self._store, positions_in(key, len(self), "series")))

    def __iter__(self) -> Iterator[Any]:
        order = order_within(self._store)
        return (write_frame(self._store, position, order) for position in range(len(self)))

    @property
    def iloc(self) -> PositionIndexer:
        """``iloc[series]``, ``iloc[series, channels]``, by position."""
        return PositionIndexer(self)

    @property
    def loc(self) -> LabelIndexer:
        """``loc[ids]``, ``loc[ids, columns]``, by label; a mask works as well."""
        return LabelIndexer(self)

    def take(self, indices: Any, axis: int = 0) -> Self:
        """Series (``axis=0``) or channels (``axis=1``) at positions, repeats of series allowed.

        The rows of what was taken go out series by series, in the order of ``indices``.
        """
        if axis == 0:
            return type(self)(take_series(self._store, positions_in(indices, len(self), "series")))
        return type(self)(take_channels(self._store, positions_in(indices, self.shape[1], "channels")))

    def copy(self) -> Self:
        """The panel itself: nothing can change it."""
        return self

    def equals(self, other: Any) -> bool:
        """Whether two panels hold the same series, in the same order, with the same times and values (NaN is NaN).

        The order of rows and the index of the frames that they came from do not count.
        """
        if not isinstance(other, SeriesRows):
            return False
        one, two = self._store, other._store
        names = ("columns", "covariate_names", "static_names", "origin", "id_dtype", "clock")
        exact = ("ids", "offsets", "stamps", "origins")
        floats = ("values", "covariates", "static")
        return (
            all(getattr(one, name) == getattr(two, name) for name in names)
            and all(np.array_equal(getattr(one, name), getattr(two, name)) for name in exact)
            and all(np.array_equal(getattr(one, name), getattr(two, name), equal_nan=True) for name in floats)
        )

    def __eq__(self, other: object) -> bool:
        return self.equals(other)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Panel cannot be changed; with_values and with_origin make new ones (got {name!r}).")

    def __reduce__(self) -> tuple[Any, tuple[type[Self], dict[str, Any]]]:
        store = settled(self._store)
        rows = None if np.array_equal(store.rows, np.arange(len(store.rows))) else store.rows
        return _rebuilt, (type(self), store.parts() | {"times": None, "rows": rows})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError(
            "series of different times make no plain array: use panel.to_dense() if all have the same number of rows, "
            "panel.values and panel.offsets for the flat arrays, or panel.to_long()."
        )

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """NumPy's concatenate, which cross_val_predict calls on predictions; equal ids stay apart."""
        if func is not np.concatenate:
            raise TypeError(f"numpy.{func.__name__} does not work on a Panel; see panel.values and panel.to_dense().")
        panels: Sequence[SeriesRows] = args[0]
        if kwargs or len(args) > 1 or not all(isinstance(panel, SeriesRows) for panel in panels):
            raise TypeError("np.concatenate joins panels with panels alone, along the first axis.")
        return type(self)(stack([panel._store for panel in panels]))


def _rebuilt(kind: type[SeriesRows], parts: dict[str, Any]) -> SeriesRows:
    return kind(Store(**parts))
