"""ContinuousFlowRegressor's defaults beside other regressors with predictive distributions.

Tables of ``tabular_data.py`` that were not used to choose defaults, 75 % of the rows and 600 at most for training, all
others for testing, five splits. Peers: a Gaussian process (anisotropic squared exponential and white noise by marginal
likelihood, standardised columns and target), NGBoost (normal distribution, early stopping on 15 % of the rows, the
learning rate of 0.01 and 0.05 that is better on these), and gradient boosting of quantiles (scikit-learn's
HistGradientBoostingRegressor, one model a quantile, early stopping), which has no density.

Per set, means over the splits: negative log-likelihood of the target in units of its standard deviation (nats, lower is
better), mean pinball loss of seven quantiles in the same units, and the share of test rows inside the central intervals
of 50, 80 and 95 %. CPU seconds of a fit are told as ratios to NGBoost's.

    python examples/benchmarks/conditional_densities.py --cache results.json

Needs ngboost and what tabular_data.py names.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import ShuffleSplit, train_test_split
from tabular_data import REGRESSION_CONFIRMATION

from skode import ContinuousFlowRegressor

SETS = ("friedman2", "concrete", "carseats", "balance", "wage", "diamonds", "evals", "airfare", "computers", "births")
QUANTILES = np.array([0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975])
INTERVALS = {50: (2, 4), 80: (1, 5), 95: (0, 6)}
TRAIN_ROWS = 600
# A model's (log-densities of the test rows or None, quantiles of the test rows (n, 7)).
Predicted = tuple[np.ndarray | None, np.ndarray]


def flow(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, seed: int) -> Predicted:
    model = ContinuousFlowRegressor(random_state=seed).fit(X, y)
    return model.score_samples(X_test, y_test), model.predict(X_test, quantiles=QUANTILES)


def of_normals(mean: np.ndarray, std: np.ndarray, y: np.ndarray) -> Predicted:
    return norm.logpdf(y, mean, std), mean[:, None] + std[:, None] * norm.ppf(QUANTILES)


def gaussian_process(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, seed: int) -> Predicted:
    centre, scale = X.mean(axis=0), X.std(axis=0)
    scale[scale == 0] = 1.0
    kernel = ConstantKernel(1.0) * RBF(np.full(X.shape[1], 3.0), (1e-2, 1e4)) + WhiteKernel(0.3, (1e-5, 10.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed).fit((X - centre) / scale, y)
    return of_normals(*model.predict((X_test - centre) / scale, return_std=True), y_test)


def ngboost(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, seed: int) -> Predicted:
    from ngboost import NGBRegressor

    X_fit, X_valid, y_fit, y_valid = train_test_split(X, y, test_size=0.15, random_state=seed)
    models = [
        NGBRegressor(n_estimators=2000, learning_rate=rate, random_state=seed, verbose=False).fit(
            X_fit, y_fit, X_valid, y_valid, early_stopping_rounds=50
        )
        for rate in (0.01, 0.05)
    ]
    best = max(models, key=lambda model: np.mean(model.pred_dist(X_valid).logpdf(y_valid)))
    distribution = best.pred_dist(X_test, max_iter=best.best_val_loss_itr)
    return of_normals(distribution.params["loc"], distribution.params["scale"], y_test)


def quantile_boosting(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, seed: int) -> Predicted:
    columns = [
        HistGradientBoostingRegressor(
            loss="quantile", quantile=q, early_stopping=True, validation_fraction=0.15, max_iter=500,
            learning_rate=0.05, random_state=seed,
        )
        .fit(X, y)
        .predict(X_test)
        for q in QUANTILES
    ]  # fmt: skip
    return None, np.sort(np.column_stack(columns), axis=1)


MODELS: dict[str, Callable[..., Predicted]] = {
    "ContinuousFlow": flow,
    "GP": gaussian_process,
    "NGBoost": ngboost,
    "quantile GB": quantile_boosting,
}


def run(name: str, model: str, split: int) -> dict[str, Any]:
    X, y = REGRESSION_CONFIRMATION[name]()
    n_train = min(TRAIN_ROWS, int(0.75 * len(X)))
    train, test = next(ShuffleSplit(1, train_size=n_train, random_state=split).split(X))
    y = (y - y[train].mean()) / y[train].std()
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores, q = MODELS[model](X[train], y[train], X[test], y[test], split)
    seconds = time.process_time() - began
    distance = y[test][:, None] - q
    return {
        "nll": None if scores is None else float(-np.mean(scores)),
        "pinball": float(np.mean(np.maximum(QUANTILES * distance, (QUANTILES - 1) * distance))),
        "inside": {
            str(share): float(np.mean((q[:, low] <= y[test]) & (y[test] <= q[:, high])))
            for share, (low, high) in INTERVALS.items()
        },
        "seconds": seconds,
    }


def report(results: dict[str, dict[str, Any]], sets: list[str], splits: int) -> None:
    def mean(name: str, model: str, *keys: str) -> float:
        found = []
        for split in range(splits):
            value: Any = results.get(f"{name}/{model}/{split}")
            for key in keys:
                value = None if value is None else value[key]
            found.append(np.nan if value is None else value)
        return float(np.mean(found))

    for title, keys in (("Negative log-likelihood", ("nll",)), ("Mean pinball loss", ("pinball",))):
        print(f"\n{title}\n\n| set | {' | '.join(MODELS)} |\n|---|" + "---|" * len(MODELS))
        for name in sets:
            values = [mean(name, model, *keys) for model in MODELS]
            best = np.nanmin(values) if not np.isnan(values).all() else np.nan
            cells = ["-" if np.isnan(v) else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values]
            print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nInside the intervals of 50 / 80 / 95 %\n\n| set | {' | '.join(MODELS)} |\n|---|" + "---|" * len(MODELS))
    for name in sets:
        cells = [" / ".join(f"{100 * mean(name, m, 'inside', str(s)):.1f}" for s in INTERVALS) for m in MODELS]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nCPU seconds of fit and predictions, ratio to NGBoost's (geometric mean over sets):")
    for model in MODELS:
        ratios = [mean(name, model, "seconds") / mean(name, "NGBoost", "seconds") for name in sets]
        print(f"- {model}: {np.exp(np.nanmean(np.log(ratios))):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="keep results here; what is there is not computed again")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.cache.read_text()) if options.cache and options.cache.exists() else {}
    for split in range(0 if options.report else options.splits):
        for name in options.sets:
            for model in options.models:
                key = f"{name}/{model}/{split}"
                if key not in results:
                    results[key] = run(name, model, split)
                    print(key, results[key], flush=True)
                    if options.cache:
                        options.cache.write_text(json.dumps(results, indent=0))
    report(results, options.sets, options.splits)


if __name__ == "__main__":
    main()
