"""Splitters that keep series whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import BaseCrossValidator, GroupKFold

from skode.panel import Panel

__all__ = ["SeriesKFold"]


class SeriesKFold(BaseCrossValidator):
    """K folds of a long frame that never split a series.

    scikit-learn's KFold deals out rows, so that nearly every series of a long frame is in training and test part. A
    Panel, whose rows are series, needs no such splitter (but may use it after sampling with replacement: copies of a
    series stay together).

    Parameters
    ----------
    n_splits : int, default=5
    series_id : label, optional
        The column or the level of the index with the series' names; the first level of the index by default.
    shuffle : bool, default=False
        Whether series are dealt out at random; otherwise such that folds have about the same number of rows.
    random_state : int, RandomState instance or None, default=None
        Seed of the shuffle.

    Examples
    --------
    >>> import pandas as pd
    >>> from skode.model_selection import SeriesKFold
    >>> X = pd.DataFrame({"patient": ["a", "b", "a", "b"], "pulse": [61.0, 70.0, 62.0, 71.0]})
    >>> for train, test in SeriesKFold(2, series_id="patient").split(X):
    ...     print(train, test)
    [0 2] [1 3]
    [1 3] [0 2]
    """

    def __init__(
        self,
        n_splits: int = 5,
        series_id: Hashable = None,
        shuffle: bool = False,
        random_state: Any = None,
    ) -> None:
        self.n_splits = n_splits
        self.series_id = series_id
        self.shuffle = shuffle
        self.random_state = random_state

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Rows of training and test parts.

        Parameters
        ----------
        X : DataFrame or Panel
        y : ignored
        groups : None
            The series are the groups.

        Yields
        ------
        train, test : ndarrays of row positions

        Raises
        ------
        KeyError
            If X lacks the named column.
        TypeError
            If X has no series to tell.
        ValueError
            If an id is missing, groups are given, or there are fewer series than folds.
        """
        if groups is not None:
            raise ValueError("SeriesKFold takes no groups: the series are the groups. Use GroupKFold for others.")
        codes, _ = pd.factorize(self._ids(X))
        if (codes < 0).any():
            raise ValueError(f"row {int((codes < 0).argmax())}: the series id is missing.")
        folds = GroupKFold(self.n_splits, shuffle=self.shuffle, random_state=self.random_state)
        return iter(folds.split(codes, groups=codes))

    def _ids(self, X: Any) -> Any:
        """Each row's series."""
        if isinstance(X, Panel):
            return X.ids
        if not isinstance(X, pd.DataFrame):
            raise TypeError(f"SeriesKFold splits a DataFrame or a Panel, not {type(X).__name__}.")
        if self.series_id is None:
            if X.index.nlevels < 2:
                raise TypeError("name the column with the series by series_id=, or give an index (series, time).")
            return X.index.get_level_values(0)
        if self.series_id in X.columns:
            return X[self.series_id]
        levels = list(X.index.names)
        if self.series_id in levels:
            return X.index.get_level_values(levels.index(self.series_id))
        raise KeyError(
            f"series_id={self.series_id!r} is neither a column nor a level of the index; columns: {list(X.columns)}, "
            f"levels: {levels}."
        )

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """The number of folds.

        Parameters
        ----------
        X, y, groups : ignored

        Returns
        -------
        int
        """
        return self.n_splits
