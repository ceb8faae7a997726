"""Folds that keep series whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from skode import Panel
from skode.model_selection import SeriesKFold


def long_frame() -> Any:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"id": rng.integers(0, 20, 200).astype(str), "time": np.arange(200), "x": rng.normal(size=200)})


def shared_series(splitter: Any, X: Any, ids: Any) -> int:
    return sum(len(set(ids[train]) & set(ids[test])) for train, test in splitter.split(X))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("form", ["column", "level", "first level"])
def test_no_series_is_in_both_parts(form: str, shuffle: bool) -> None:
    X = long_frame()
    ids = X["id"].to_numpy()
    X = X if form == "column" else X.set_index(["id", "time"] if form == "first level" else "id")
    splitter = SeriesKFold(4, series_id=None if form == "first level" else "id", shuffle=shuffle)
    assert shared_series(splitter, X, ids) == 0
    assert shared_series(KFold(4), X, ids) > 0
    tests = np.concatenate([test for _, test in splitter.split(X)])
    assert sorted(tests) == list(range(200))
    assert splitter.get_n_splits(X) == 4


def test_folds_have_about_the_same_number_of_rows() -> None:
    sizes = [len(test) for _, test in SeriesKFold(4, series_id="id").split(long_frame())]
    assert max(sizes) - min(sizes) < 10


def test_a_seed_repeats_a_shuffle() -> None:
    X = long_frame()
    folds = [
        [tuple(test) for _, test in SeriesKFold(4, "id", shuffle=True, random_state=seed).split(X)]
        for seed in (0, 0, 1)
    ]
    assert folds[0] == folds[1] != folds[2]


def test_scikit_learn_takes_it_as_cv() -> None:
    X = long_frame()
    y = X["x"] * 2.0
    cv = SeriesKFold(4, series_id="id")
    X = X.astype({"id": float})
    assert len(cross_val_score(Ridge(), X, y, cv=cv)) == 4
    search = GridSearchCV(Ridge(), {"alpha": [0.1, 1.0]}, cv=cv).fit(X, y)
    assert search.n_splits_ == 4
    assert repr(cv) == "SeriesKFold(n_splits=4, random_state=None, series_id='id', shuffle=False)"


def test_copies_of_a_series_stay_together() -> None:
    panel = Panel.from_dense(np.arange(12.0).reshape(6, 2)).take([0, 0, 1, 2, 2, 3])
    assert shared_series(SeriesKFold(3), panel, panel.ids) == 0


@pytest.mark.parametrize(
    ("X", "series_id", "error", "words"),
    [
        (long_frame(), "patient", KeyError, "series_id='patient' is neither"),
        (long_frame(), None, TypeError, "name the column"),
        (np.zeros((9, 2)), None, TypeError, "not ndarray"),
        (long_frame().assign(id=None), "id", ValueError, "row 0: the series id is missing"),
        (long_frame().assign(id="one"), "id", ValueError, "greater than the number of groups: 1"),
    ],
)
def test_what_has_no_series_to_split_is_refused(X: Any, series_id: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        list(SeriesKFold(4, series_id=series_id).split(X))


def test_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="takes no groups"):
        SeriesKFold(4, series_id="id").split(long_frame(), groups=np.zeros(200))
