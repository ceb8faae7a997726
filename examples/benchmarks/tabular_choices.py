"""Which of the default choices earn their place? One change at a time, on the tuning sets.

Every variant is fitted on the same splits with the same seeds as the defaults, one after another on one thread; the
table tells the mean paired difference with its standard error over data sets, the fit time as a ratio (median), and
how far predictions at rtol 1e-2 are from those at rtol 1e-6.

    python examples/benchmarks/tabular_choices.py --task classification --splits 2

Needs what tabular_data.py names.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, r2_score
from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit
from tabular_data import SETS

from skode import ODENetClassifier, ODENetRegressor

VARIANTS: dict[str, dict[str, Any]] = {
    "one net (`n_members=1`)": {"n_members": 1},
    "4 members": {"n_members": 4},
    "16 members": {"n_members": 16},
    '`input_encoding="standard"`': {"input_encoding": "standard"},
    '`input_encoding="piecewise"`': {"input_encoding": "piecewise"},
    "`error_penalty=0`": {"error_penalty": 0.0},
    "`error_penalty=10`": {"error_penalty": 10.0},
    '`method="rk32"`': {"method": "rk32"},
    '`method="tsit5"`': {"method": "tsit5"},
    "16 units": {"hidden_layer_sizes": (16,)},
    "32 units": {"hidden_layer_sizes": (32,)},
    "64 units": {"hidden_layer_sizes": (64,)},
    '`activation="silu"`': {"activation": "silu"},
    "`learning_rate_init=0.005`": {"learning_rate_init": 0.005},
    "`learning_rate_init=0.03`": {"learning_rate_init": 0.03},
    "`early_stopping=False`": {"early_stopping": False},
    "`batch_size=64`": {"batch_size": 64},
    "`batch_size=256`": {"batch_size": 256},
}


def fit_and_score(model: Any, task: str, X: np.ndarray, y: np.ndarray, train: Any, test: Any) -> dict[str, float]:
    """Seconds, the figures of merit, and the distance to an accurate solve."""
    start = time.perf_counter()
    model.fit(X[train], y[train])
    seconds = time.perf_counter() - start
    if task == "regression":
        scale = float(np.std(y[train]))
        coarse = model.predict(X[test])
        gap = abs(coarse - model.set_params(rtol=1e-6).predict(X[test])).max() / scale
        return {"seconds": seconds, "first": r2_score(y[test], coarse), "second": 0.0, "gap": float(gap)}
    coarse = model.predict_proba(X[test])
    gap = abs(coarse - model.set_params(rtol=1e-6).predict_proba(X[test])).max()
    accuracy = float((model.classes_[coarse.argmax(axis=1)] == y[test]).mean())
    loss = float(log_loss(y[test], coarse, labels=model.classes_))
    return {"seconds": seconds, "first": accuracy, "second": float(np.log(loss)), "gap": float(gap)}


def compare(task: str, names: list[str], variants: list[str], n_splits: int) -> dict[str, np.ndarray]:
    """Results of the defaults ("") and of every variant, shape (sets, splits, figures)."""
    make = ODENetClassifier if task == "classification" else ODENetRegressor
    results: dict[str, list[list[list[float]]]] = {name: [] for name in ["", *variants]}
    for name in names:
        X, y = SETS[task, "tuning"][name]()
        splitter = (StratifiedShuffleSplit if task == "classification" else ShuffleSplit)(
            n_splits, test_size=0.2, random_state=0
        )
        for rows in results.values():
            rows.append([])
        for split, (train, test) in enumerate(splitter.split(X, y)):
            for variant, rows in results.items():
                model = make(random_state=split, **VARIANTS.get(variant, {}))
                rows[-1].append(list(fit_and_score(model, task, X, y, train, test).values()))
        print(f"{name} done", flush=True)
    return {variant: np.array(rows) for variant, rows in results.items()}


def report(task: str, results: dict[str, np.ndarray]) -> None:
    """Print the table in markdown."""
    base = results[""].mean(axis=1)
    first = "accuracy, points" if task == "classification" else "R2, points"
    print(f"| change | {first} | log-loss, % | fit time | largest gap |\n|---|---|---|---|---|")
    print(f"| none (the defaults) | 0 | 0 | 1 | {results[''][..., 3].max():.4f} |")
    for variant, rows in results.items():
        if not variant:
            continue
        change = rows.mean(axis=1) - base
        error = change.std(axis=0, ddof=1) / np.sqrt(len(change))
        score = f"{100 * change[:, 1].mean():+.2f} ± {100 * error[1]:.2f}"
        loss = f"{100 * change[:, 2].mean():+.1f} ± {100 * error[2]:.1f}" if task == "classification" else ""
        ratio = np.median(rows[..., 0] / results[""][..., 0])
        print(f"| {variant} | {score} | {loss} | {ratio:.2f} | {rows[..., 3].max():.4f} |")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["classification", "regression"], default="classification")
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of single sets")
    parser.add_argument("--variants", nargs="*", type=int, help="numbers of single variants, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = arguments.only or list(SETS[arguments.task, "tuning"])
    every = list(VARIANTS)
    variants = every if arguments.variants is None else [every[i] for i in arguments.variants]
    report(arguments.task, compare(arguments.task, names, variants, arguments.splits))


if __name__ == "__main__":
    main()
