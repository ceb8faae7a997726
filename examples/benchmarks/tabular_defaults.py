"""Default settings on small tables: ODENetClassifier and ODENetRegressor against five peers each.

Every model runs with its defaults; linear models, multilayer perceptrons and support vector machines
stand behind a StandardScaler (for MLPRegressor and SVR the target is standardised too), SVC's
probabilities are calibrated with CalibratedClassifierCV. The models of a split are fitted one after
another on one thread; a model's time is given as a ratio to the multilayer perceptron's in the same
split and run. Splits: 80/20 shuffles (stratified for classes) with fixed seeds; a set's figure is the
mean over its splits, ranks are taken of those (ties averaged).

    python examples/benchmarks/tabular_defaults.py --task classification --cache peers.json

With ``--cache`` the peers' results are kept and not computed again (skode's are, always, unless
``--cached-only``); the perceptron is then refitted next to skode's model for the time ratio. Needs
pytabkit and what tabular_data.py names.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, log_loss, r2_score, root_mean_squared_error
from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from tabular_data import SETS

OURS, REFERENCE = "ODENet", "MLP"


def make_model(name: str, task: str, seed: int) -> Any:
    """A fresh model by its short name."""
    scaled = lambda model: make_pipeline(StandardScaler(), model)  # noqa: E731
    both = lambda model: TransformedTargetRegressor(scaled(model), transformer=StandardScaler())  # noqa: E731
    if name == OURS:
        import skode

        return (skode.ODENetClassifier if task == "classification" else skode.ODENetRegressor)(random_state=seed)
    if name == "RealMLP-TD-S":
        from pytabkit import RealMLP_TD_S_Classifier, RealMLP_TD_S_Regressor

        cls = RealMLP_TD_S_Classifier if task == "classification" else RealMLP_TD_S_Regressor
        return cls(device="cpu", random_state=seed, n_threads=1, verbosity=0)
    if task == "classification":
        return {
            "MLP": lambda: scaled(MLPClassifier(random_state=seed)),
            "HGB": lambda: HistGradientBoostingClassifier(random_state=seed),
            "LR": lambda: scaled(LogisticRegression()),
            "SVC": lambda: scaled(CalibratedClassifierCV(SVC())),
        }[name]()
    return {
        "MLP": lambda: both(MLPRegressor(random_state=seed)),
        "HGB": lambda: HistGradientBoostingRegressor(random_state=seed),
        "SVR": lambda: both(SVR()),
        "Ridge": lambda: scaled(Ridge()),
    }[name]()


PEERS = {
    "classification": ["MLP", "HGB", "LR", "SVC", "RealMLP-TD-S"],
    "regression": ["MLP", "HGB", "SVR", "Ridge", "RealMLP-TD-S"],
}


def timed_fit(model: Any, X: np.ndarray, y: np.ndarray) -> float:
    start = time.perf_counter()
    model.fit(X, y)
    return time.perf_counter() - start


def evaluate(model: Any, task: str, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The two figures of merit on a test set."""
    if task == "classification":
        proba = model.predict_proba(X)
        label = model.classes_[proba.argmax(axis=1)]
        return {"accuracy": accuracy_score(y, label), "log_loss": log_loss(y, proba, labels=model.classes_)}
    predicted = np.ravel(model.predict(X))
    return {"r2": r2_score(y, predicted), "rmse": root_mean_squared_error(y, predicted)}


def tolerance_gap(model: Any, task: str, X: np.ndarray, scale: float) -> dict[str, float]:
    """How far predictions at rtol 1e-2 and 1e-6 differ (regression: in units of the target's deviation)."""
    outputs = []
    for rtol in (1e-2, 1e-6):
        model.set_params(rtol=rtol)
        outputs.append(model.predict_proba(X) if task == "classification" else model.predict(X) / scale)
    gap = np.abs(outputs[0] - outputs[1])
    return {"gap_max": float(gap.max()), "gap_99": float(np.quantile(gap, 0.99))}


def run_set(
    task: str, name: str, load: Any, models: list[str], splits: int, cache: dict[str, Any], cached_only: bool
) -> None:
    """Fit what the cache lacks for one data set, split by split."""
    X, y = load()
    splitter = (StratifiedShuffleSplit if task == "classification" else ShuffleSplit)(
        splits, test_size=0.2, random_state=0
    )
    for split, (train, test) in enumerate(splitter.split(X, y)):
        key = lambda model: f"{task}/{name}/{split}/{model}"  # noqa: E731, B023
        todo = [m for m in models if key(m) not in cache or (m == OURS and not cached_only)]
        if not todo:
            continue
        reference = None
        for model_name in [REFERENCE, *[m for m in todo if m != REFERENCE]]:
            model = make_model(model_name, task, split)
            seconds = timed_fit(model, X[train], y[train])
            reference = seconds if model_name == REFERENCE else reference
            if model_name not in todo:
                continue
            result = evaluate(model, task, X[test], y[test])
            result |= {"seconds": seconds, "reference_seconds": reference}
            if model_name == OURS:
                result |= tolerance_gap(model, task, X[test], float(np.std(y[train])) if task == "regression" else 1.0)
            cache[key(model_name)] = result


def report(task: str, names: list[str], models: list[str], splits: int, cache: dict[str, Any]) -> None:
    """Print the table of sets and the table of mean ranks in markdown."""
    first, second = ("accuracy", "log_loss") if task == "classification" else ("r2", "rmse")

    def table(field: str) -> np.ndarray:
        return np.array(
            [[np.mean([cache[f"{task}/{n}/{s}/{m}"][field] for s in range(splits)]) for m in models] for n in names]
        )

    a, b = table(first), table(second)
    ratio = table("seconds") / table("reference_seconds")
    print(f"\n| set | {' | '.join(f'{m}: {first}, {second}, time' for m in models)} |")
    print("|---" * (len(models) + 1) + "|")
    for i, name in enumerate(names):
        cells = [f"{a[i, j]:.4f}, {b[i, j]:.4g}, {ratio[i, j]:.2f}" for j in range(len(models))]
        print(f"| {name} | {' | '.join(cells)} |")
    ranks_a = np.array([rankdata(-np.round(row, 9)) for row in a])
    ranks_b = np.array([rankdata(np.round(row, 9)) for row in b])
    relative = np.exp(np.mean(np.log(np.maximum(b, 1e-12) / np.maximum(b.min(axis=1, keepdims=True), 1e-12)), axis=0))
    j_ref = models.index(REFERENCE) if REFERENCE in models else None
    print(
        f"\n| model | mean rank, {first} | mean rank, {second} | mean {first} "
        f"| {second} over the best (geometric mean) "
        "| time over MLP's: geometric mean, worst | total time over MLP's "
        "| sets lost to MLP by more than .01 |"
    )
    print("|---" * 8 + "|")
    for j, model in enumerate(models):
        lost = "-" if j_ref is None else int(np.sum(a[:, j] < a[:, j_ref] - 0.01))
        total = table("seconds")[:, j].sum() / table("reference_seconds")[:, j].sum()
        print(
            f"| {model} | {ranks_a[:, j].mean():.2f} | {ranks_b[:, j].mean():.2f} | {a[:, j].mean():.4f} "
            f"| {relative[j]:.3f} | {np.exp(np.log(ratio[:, j]).mean()):.2f}, {ratio[:, j].max():.1f} "
            f"| {total:.2f} | {lost} |"
        )
    best_peer = np.delete(a, [models.index(OURS)], axis=1).max(axis=1) if OURS in models else a.max(axis=1)
    if task == "classification":
        print(f"\nSets on which the best peer errs above 2 %: {int(np.sum(best_peer < 0.98))} of {len(names)}")
    if OURS in models:
        gaps = np.array(
            [
                [max(cache[f"{task}/{n}/{s}/{OURS}"][f] for s in range(splits)) for f in ("gap_max", "gap_99")]
                for n in names
            ]
        )
        worst = int(gaps[:, 0].argmax())
        print(
            f"Predictions at rtol 1e-2 and 1e-6 differ by at most {gaps[:, 0].max():.4f} ({names[worst]}); "
            f"the 99 % quantile is at most {gaps[:, 1].max():.4f}; maxima by set: "
            + ", ".join(f"{n} {g:.4f}" for n, g in zip(names, gaps[:, 0], strict=True))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["classification", "regression"], default="classification")
    parser.add_argument("--sets", choices=["tuning", "confirmation"], default="confirmation")
    parser.add_argument("--only", nargs="*", help="names of single sets")
    parser.add_argument("--models", nargs="*", help=f"of {OURS} and the peers; default: all")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="JSON file that keeps results")
    parser.add_argument("--cached-only", action="store_true", help="take skode's results from the cache too")
    args = parser.parse_args()

    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    models = args.models or [OURS, *PEERS[args.task]]
    sets = SETS[args.task, args.sets]
    names = args.only or list(sets)
    cache = json.loads(args.cache.read_text()) if args.cache and args.cache.exists() else {}
    with threadpool_limits(args.threads):
        for model in {REFERENCE, *models}:  # imports and first calls must not count as fitting time
            rows = np.random.default_rng(0).normal(size=(60, 3))
            make_model(model, args.task, 0).fit(rows, np.arange(60) % 2)
        for name in names:
            start = time.perf_counter()
            run_set(args.task, name, sets[name], models, args.splits, cache, args.cached_only)
            if args.cache:
                args.cache.write_text(json.dumps(cache, indent=0))
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    report(args.task, names, models, args.splits, cache)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
