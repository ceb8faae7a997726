"""Outlier detection by ContinuousFlowDensity's defaults beside scikit-learn's detectors.

Sets with a known part of anomalies: shuttle (river; classes other than 1 and 4 are anomalies, as in the flag it ships
with), breast cancer (malignant tumours among benign ones, one in ten rows), wine (the third cultivar, one in ten rows)
and digits (the nines among the fours, one in ten rows, 16 principal components). Detectors are fitted to a random half
of the rows, 5,000 at most, without labels and with the anomalies in it or, with ``--clean``, to its normal rows alone
(novelty detection); the figure is the area under the ROC curve on the other half, mean and standard deviation over
five splits. Columns are standardised for the peers that need it.

Peers: IsolationForest, LocalOutlierFactor (novelty), one-class SVM, and a Gaussian mixture with the number of
components of the best BIC, all with scikit-learn's defaults otherwise.

    python examples/benchmarks/outliers.py

Needs river.
"""

from __future__ import annotations

import argparse
import io
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from tabular_data import _river

from skode import ContinuousFlowDensity

MOST_ROWS = 5000
Table = tuple[np.ndarray, np.ndarray]


def shuttle(rng: np.random.Generator) -> Table:
    frame = pd.read_csv(io.BytesIO(_river("shuttle.csv.gz")))
    flag = frame.columns[-1]
    return frame.drop(columns=flag).to_numpy(np.float64), frame[flag].to_numpy().astype(int)


def rare(X: np.ndarray, normal: np.ndarray, anomalous: np.ndarray, rng: np.random.Generator) -> Table:
    """All normal rows, and as many anomalies as make a tenth."""
    inliers, others = np.flatnonzero(normal), np.flatnonzero(anomalous)
    some = rng.choice(others, size=min(len(others), len(inliers) // 9), replace=False)
    rows = np.concatenate([inliers, some])
    return X[rows], np.repeat([0, 1], [len(inliers), len(some)])


def breast_cancer(rng: np.random.Generator) -> Table:
    X, y = load_breast_cancer(return_X_y=True)
    return rare(X, y == 1, y == 0, rng)


def wine(rng: np.random.Generator) -> Table:
    X, y = load_wine(return_X_y=True)
    return rare(X, y < 2, y == 2, rng)


def digits(rng: np.random.Generator) -> Table:
    X, y = load_digits(return_X_y=True)
    return rare(PCA(16, random_state=0).fit_transform(X), y == 4, y == 9, rng)


SETS: dict[str, Callable[[np.random.Generator], Table]] = {
    "shuttle": shuttle,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "digits": digits,
}


class BicMixture(BaseEstimator):
    """The Gaussian mixture of the best BIC among 1 to 16 components."""

    def fit(self, X: np.ndarray, y: None = None) -> BicMixture:
        fits = [GaussianMixture(k, reg_covar=1e-4, random_state=0).fit(X) for k in (1, 2, 4, 8, 16) if k < len(X) // 10]
        self.best_ = min(fits, key=lambda mixture: mixture.bic(X))
        return self

    def score_samples(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(self.best_.score_samples(X))


def detectors(seed: int) -> dict[str, Any]:
    return {
        "ContinuousFlow": ContinuousFlowDensity(random_state=seed),
        "IsolationForest": IsolationForest(random_state=seed),
        "LOF": make_pipeline(StandardScaler(), LocalOutlierFactor(novelty=True)),
        "one-class SVM": make_pipeline(StandardScaler(), OneClassSVM()),
        "GMM": make_pipeline(StandardScaler(), BicMixture()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--clean", action="store_true", help="fit to normal rows alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = list(detectors(0))
    print(f"| set | rows | columns | anomalies | {' | '.join(names)} |\n|---|---|---|---|" + "---|" * len(names))
    seconds = {name: 0.0 for name in names}
    for which in options.sets:
        areas: dict[str, list[float]] = {name: [] for name in names}
        for split in range(options.splits):
            X, y = SETS[which](np.random.default_rng(split))
            halves = StratifiedShuffleSplit(1, test_size=0.5, random_state=split)
            train, test = (rows[: 2 * MOST_ROWS] for rows in next(halves.split(X, y)))
            train = (train[y[train] == 0] if options.clean else train)[:MOST_ROWS]
            for name, detector in detectors(split).items():
                began = time.process_time()
                detector.fit(X[train])
                seconds[name] += time.process_time() - began
                areas[name].append(roc_auc_score(y[test], -detector.score_samples(X[test])))
        best = max(np.mean(area) for area in areas.values())
        cells = [
            f"{'**' if np.mean(area) == best else ''}{np.mean(area):.3f}{'**' if np.mean(area) == best else ''} "
            f"± {np.std(area):.3f}"
            for area in areas.values()
        ]
        print(f"| {which} | {len(X):,} | {X.shape[1]} | {y.mean():.1%} | {' | '.join(cells)} |", flush=True)
    least = min(seconds.values())
    print("\nCPU seconds of all fits, ratio to the fastest: ", end="")
    print(", ".join(f"{name} {value / least:.0f}" for name, value in seconds.items()))


if __name__ == "__main__":
    main()
