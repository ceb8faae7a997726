"""The paper's Table 2: what follows a window of a noisy, irregularly observed spiral (Chen et al. 2018, section 5.1).

1,000 training series and 1,000 test series of ``skode.datasets.make_spirals``: windows of 100 points of two fixed
spirals, half of them clockwise, each from its own start, noise 0.3, of which 30, 50 or 100 points are observed at
random. Figures are root mean squared errors of a coordinate against the curve WITHOUT noise: "inside" on the window's
100 points, "ahead" on the next 100, which nobody saw of any test series. Bands of 80 % are to cover fresh noisy
observations.

Contestants: ``LatentODERegressor`` with its defaults; a GRU of 25 units with time gaps whose predictions are fed back
(the paper's baseline; learning rate and step chosen by forecasts of held-out series, on seed 0 of each n); a Gaussian
process of each series and coordinate (scikit-learn, RBF and white noise, 100 test series); the last value; and the
Bayes floor, which knows both curves, the noise and how starts are drawn, and averages over starts and sides.

    python examples/benchmarks/spirals.py --cache spirals.json --seeds 5

Each result is written to the cache at once, as "n/seed/contestant"; what is there is not computed again. ``--report``
prints what there is and fits nothing. Times are CPU seconds of one thread, also as multiples of a fixed piece of work
done before and after a fit, since a busy machine is slower.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from density_defaults import Cache, unit_of_work
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import Tensor, nn

from skode import LatentODERegressor, Panel
from skode.datasets import make_spirals
from skode.datasets.spirals import Spirals

NOISE, N_POINTS, N_SERIES = 0.3, 100, 1000
SIZES = (30, 50, 100)
BAND = (0.1, 0.9)
OURS, GRU, GP, LAST, FLOOR = "LatentODE", "GRU", "GP per series", "last value", "Bayes floor"
PAPER = {"RNN, paper": (0.3937, 0.3202, 0.1813), "latent ODE, paper": (0.1642, 0.1502, 0.1346)}
GP_SERIES = 100
Result = dict[str, Any]


class Task(NamedTuple):
    """Training and test windows, the times of the 200 points, fresh noisy observations of the test series there."""

    train: Spirals
    test: Spirals
    grid: np.ndarray
    clean: np.ndarray  # (n_series, 200, 2)
    noisy: np.ndarray


class Found(NamedTuple):
    """Predictions (n_series, 200, 2), NaN where there are none, and the bands' ends, for the first test series."""

    mean: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    told: Result = {}


def make_task(n: int, seed: int) -> Task:
    train = make_spirals(N_SERIES, N_POINTS, n, NOISE, "train", random_state=seed)
    test = make_spirals(N_SERIES, N_POINTS, n, NOISE, "test", random_state=10_000 + seed)
    clean = np.concatenate([test.clean, test.ahead], axis=1)
    noisy = clean + NOISE * np.random.default_rng(20_000 + seed).standard_normal(clean.shape)
    return Task(train, test, np.concatenate([test.times, test.times_ahead]), clean, noisy)


# --- contestants ---


def latent_ode(task: Task, seed: int, params: Result) -> Callable[[], Found]:
    """Time 0 of a panel's series is each series' own, so that the model has no common clock to read."""
    train, test = (Panel.from_dense(part.values, part.times) for part in (task.train, task.test))
    model = LatentODERegressor(random_state=seed, **params).fit(train)
    told = {
        "updates": model.n_iter_,
        "scores": [round(score, 4) for score in model.validation_scores_],
        "stride": model.horizon_stride_,
    }

    def predict() -> Found:
        mean = model.predict(test, times=task.grid)
        band = model.predict(test, times=task.grid, quantiles=list(BAND))
        return Found(mean, band[..., 0], band[..., 1], told)

    return predict


def last_value(task: Task, seed: int, params: Result) -> Callable[[], Found]:
    values = task.test.values
    seen = ~np.isnan(values[:, :, 0])
    last = N_POINTS - 1 - seen[:, ::-1].argmax(axis=1)
    mean = np.full(task.clean.shape, np.nan)
    mean[:, N_POINTS:] = values[np.arange(len(values)), last][:, np.newaxis]
    return lambda: Found(mean)


def gaussian_process(task: Task, seed: int, params: Result) -> Callable[[], Found]:
    """One for each coordinate of each of the first test series; kernels by marginal likelihood, fitted when asked."""

    def predict() -> Found:
        mean, std = np.empty((2, GP_SERIES, len(task.grid), 2))
        for i, j in np.ndindex(GP_SERIES, 2):
            y = task.test.values[i, :, j]
            seen = ~np.isnan(y)
            kernel = ConstantKernel(1.0, (1e-3, 1e4)) * RBF(1.0, (0.05, 50.0)) + WhiteKernel(0.05, (1e-5, 1.0))
            model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
            model.fit(task.test.times[seen, np.newaxis], y[seen])
            mean[i, :, j], std[i, :, j] = model.predict(task.grid[:, np.newaxis], return_std=True)
        return Found(mean, mean - 1.2816 * std, mean + 1.2816 * std, {"series": GP_SERIES})

    return predict


def bayes_floor(task: Task, seed: int, params: Result) -> Callable[[], Found]:
    """The posterior mean over both curves and all starts that test windows may have, equally likely before."""
    angle = np.linspace(0, 6 * np.pi, 500)
    back = 6 * np.pi + 1 - angle
    out = np.stack([5 + 0.3 * angle * np.cos(angle), 0.3 * angle * np.sin(angle)], axis=1)
    into = np.stack([-5 + 15 / back * np.cos(back), 15 / back * np.sin(back)], axis=1)
    starts = range(N_POINTS, 500 - 2 * N_POINTS)
    paths = np.stack([curve[start : start + 2 * N_POINTS] for curve in (out, into) for start in starts])

    def predict() -> Found:
        y = task.test.values
        seen = ~np.isnan(y)
        gap = np.where(seen, y, 0.0)[:, np.newaxis] - paths[:, :N_POINTS]
        square = np.einsum("shtc,stc->sh", np.square(gap), seen.astype(float))
        weight = np.exp(-0.5 * (square - square.min(axis=1, keepdims=True)) / NOISE**2)
        return Found(np.einsum("sh,htc->stc", weight / weight.sum(axis=1, keepdims=True), paths))

    return predict


# --- the recurrent network ---

GRU_GRID = ({"rate": 3e-3}, {"rate": 1e-2}, {"rate": 3e-2}, {"rate": 6e-2})
GRU_UNITS, GRU_UPDATES, GRU_BATCH, GRU_HELD_OUT = 25, 4000, 100, 100


class GapGRU(nn.Module):
    """The next observation's mean and log standard deviation from the values so far and the gaps behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, GRU_UNITS, batch_first=True)
        self.head = nn.Linear(GRU_UNITS, 4)

    def forward(self, x: Tensor, gap: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        out, state = self.gru(torch.cat([x, gap.unsqueeze(2)], dim=2), state)
        mean, log_std = self.head(out).chunk(2, dim=2)
        return mean, log_std.clamp(-5, 3), state

    @torch.no_grad()
    def roll(self, x: Tensor, t: Tensor, query: Tensor, step: float) -> Tensor:
        """Means (b, q, 2) at later times (q,), increasing; what is predicted every ``step`` is fed back."""
        state = None
        if x.shape[1] > 1:
            _, _, state = self(x[:, :-1], t.diff(dim=1))
        state = x.new_zeros(1, len(x), GRU_UNITS) if state is None else state
        value, now, means = x[:, -1:], t[:, -1], []
        for moment in query:
            while bool((far := moment - now > 1.001 * step).any()):
                mean, _, later = self(value, torch.full_like(now, step).unsqueeze(1), state)
                value = torch.where(far[:, None, None], mean, value)
                state = torch.where(far[None, :, None], later, state)
                now = torch.where(far, now + step, now)
            means.append(self(value, (moment - now).unsqueeze(1), state)[0])
        return torch.cat(means, dim=1)


def observed(spirals: Spirals, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Values (n_series, n, 2) and times (n_series, n) of what was observed."""
    place = np.argwhere(~np.isnan(spirals.values[:, :, 0]))[:, 1].reshape(-1, n)
    return np.take_along_axis(spirals.values, place[:, :, np.newaxis], axis=1), spirals.times[place]


def gru_held_out(model: GapGRU, x: Tensor, t: Tensor, step: float) -> float:
    """Error of forecasts of the second half of each held-out series from the first, in standard deviations."""
    half = x.shape[1] // 2
    error = []
    for own, when in zip(x, t, strict=True):
        found = model.roll(own[None, :half], when[None, :half], when[half:], step)
        error.append((found[0] - own[half:]).square().mean())
    return float(torch.stack(error).mean().sqrt())


def gru(task: Task, seed: int, params: Result) -> Callable[[], Found]:
    """Next-step likelihood on batches; the weights at the end of a cosine; steps of a point or of a mean gap."""
    n = int((~np.isnan(task.train.values[0, :, 0])).sum())
    x, t = observed(task.train, n)
    centre, scale, unit = x.mean(axis=(0, 1)), x.std(axis=(0, 1)), float(np.diff(t, axis=1).mean())
    x, t = torch.from_numpy((x - centre) / scale).float(), torch.from_numpy(t / unit).float()
    torch.manual_seed(seed)
    model = GapGRU()
    optimizer = torch.optim.Adam(model.parameters(), lr=params["rate"])
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, GRU_UPDATES)
    for _ in range(GRU_UPDATES):
        rows = GRU_HELD_OUT + torch.randint(len(x) - GRU_HELD_OUT, (GRU_BATCH,))
        mean, log_std, _ = model(x[rows, :-1], t[rows].diff(dim=1))
        loss = (0.5 * ((x[rows, 1:] - mean) * (-log_std).exp()).square() + log_std).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    held = x[:GRU_HELD_OUT], t[:GRU_HELD_OUT]
    errors = {step: gru_held_out(model, *held, step) for step in (1.0, float(np.diff(task.grid[:2])[0]) / unit)}
    step = min(errors, key=errors.__getitem__)

    def predict() -> Found:
        own, when = observed(task.test, n)
        query = torch.from_numpy(task.grid[N_POINTS:] / unit).float()
        found = model.roll(
            torch.from_numpy((own - centre) / scale).float(), torch.from_numpy(when / unit).float(), query, step
        )
        mean = np.full(task.clean.shape, np.nan)
        mean[:, N_POINTS:] = found.double().numpy() * scale + centre
        return Found(mean, told={"validation": errors[step], "step": step})

    return predict


CONTESTANTS = {OURS: latent_ode, GRU: gru, GP: gaussian_process, LAST: last_value, FLOOR: bayes_floor}


# --- results ---


def rms(error: np.ndarray) -> float | None:
    return None if np.isnan(error).any() else float(np.sqrt(np.square(error).mean()))


def measure(contestant: str, n: int, seed: int, params: Result) -> Result:
    task = make_task(n, seed)
    before, start = unit_of_work(), time.process_time()
    predict = CONTESTANTS[contestant](task, seed, params)
    seconds = time.process_time() - start
    unit, start = (before + unit_of_work()) / 2, time.process_time()
    found = predict()
    predict_seconds = time.process_time() - start
    own = slice(len(found.mean))
    error = found.mean - task.clean[own]
    by_series = np.sqrt(np.square(error[:, N_POINTS:]).mean(axis=(1, 2)))
    clockwise = task.test.clockwise[own]
    result = {
        "inside": rms(error[:, :N_POINTS]),
        "ahead": rms(error[:, N_POINTS:]),
        "median": float(np.median(by_series)),
        "worst": float(by_series.max()),
        "largest": float(np.abs(error[:, N_POINTS:]).max()),
        "clockwise": rms(error[clockwise, N_POINTS:]),
        "counter": rms(error[~clockwise, N_POINTS:]),
        "sd": float(np.sqrt(np.nanvar(task.train.values, axis=(0, 1)).mean())),
        "seconds": seconds,
        "predict_seconds": predict_seconds,
        "unit": unit,
        "params": params,
        **found.told,
    }
    if found.low is not None and found.high is not None:
        covered = (task.noisy[own] >= found.low) & (task.noisy[own] <= found.high)
        quarters = covered.reshape(len(covered), -1, N_POINTS // 4, 2).mean(axis=(0, 2, 3))
        result |= {
            "cover_inside": float(covered[:, :N_POINTS].mean()),
            "cover_ahead": float(covered[:, N_POINTS:].mean()),
            "cover_by_25": [round(float(share), 3) for share in quarters],
        }
    return result


def run_one(cache: Cache, n: int, seed: int, contestant: str, params: Result) -> None:
    """One contestant on one data set; the recurrent network's settings are chosen on the first."""
    key = key_of(n, seed, contestant, params)
    if contestant != GRU:
        cache.put(key, measure(contestant, n, seed, params))
    elif seed == 0:
        for i, own in enumerate(GRU_GRID):
            if f"{key}/{i}" not in cache.results:
                cache.put(f"{key}/{i}", measure(GRU, n, 0, own))
        tried = [cache.results[f"{key}/{i}"] for i in range(len(GRU_GRID))]
        cache.put(key, min(tried, key=lambda result: result["validation"]))
    else:
        if f"{n}/0/{GRU}" not in cache.results:
            run_one(cache, n, 0, GRU, params)
        cache.put(key, measure(GRU, n, seed, cache.results[f"{n}/0/{GRU}"]["params"]))
    r = cache.results[key]
    inside = "-" if r["inside"] is None else f"{r['inside']:.4f}"
    print(
        f"{key}: inside {inside}, ahead {r['ahead']:.4f}, worst {r['worst']:.2f}, {r['seconds']:.0f} CPU s", flush=True
    )


def key_of(n: int, seed: int, contestant: str, params: Result) -> str:
    changed = json.dumps(params, sort_keys=True) if params and contestant == OURS else ""
    return f"{n}/{seed}/{contestant}{changed}"


def counted(n: int) -> str:
    return f"{n} seed" + ("s" if n != 1 else "")


class Report:
    """Tables of what a cache has."""

    def __init__(self, cache: Cache, seeds: int, params: Result) -> None:
        self._results, self._seeds, self._params = cache.results, seeds, params

    def values(self, n: int, contestant: str, field: str) -> dict[int, float]:
        """By seed, without those that are not there."""
        keys = {seed: key_of(n, seed, contestant, self._params) for seed in range(self._seeds)}
        found = {seed: self._results.get(key, {}).get(field) for seed, key in keys.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def mean(self, n: int, contestant: str, field: str, digits: int = 3) -> str:
        found = list(self.values(n, contestant, field).values())
        if not found:
            return "-"
        error = f" ± {np.std(found, ddof=1) / len(found) ** 0.5:.{digits}f}" if len(found) > 1 else ""
        return f"{np.mean(found):.{digits}f}{error}" + (f" ({len(found)})" if len(found) < self._seeds else "")

    def rows(self, field: str, more: dict[str, tuple[float, ...]]) -> None:
        print(f"\n| {field} | " + " | ".join(f"n = {n}" for n in SIZES) + " |\n" + "|---" * (len(SIZES) + 1) + "|")
        for contestant in CONTESTANTS:
            cells = [self.mean(n, contestant, field) for n in SIZES]
            if set(cells) != {"-"}:
                print(f"| {contestant} | {' | '.join(cells)} |")
        for name, figures in more.items():
            print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")

    def details(self) -> None:
        fields = ("median", "worst", "largest", "counter", "clockwise", "cover_inside", "cover_ahead")
        print(f"\n| n | contestant | {' | '.join(fields)} | CPU s | of work | predict CPU s |")
        print("|---" * (len(fields) + 5) + "|")
        for n in SIZES:
            for contestant in CONTESTANTS:
                if not self.values(n, contestant, "ahead"):
                    continue
                cells = [self.mean(n, contestant, field, 2 if i < 3 else 3) for i, field in enumerate(fields)]
                unit = self.values(n, contestant, "unit")
                seconds = self.values(n, contestant, "seconds")
                ratio = np.median([seconds[seed] / unit[seed] for seed in seconds])
                times = [self.mean(n, contestant, field, 0) for field in ("seconds", "predict_seconds")]
                print(f"| {n} | {contestant} | {' | '.join(cells)} | {times[0]} | {ratio:.0f} | {times[1]} |")

    def paired(self) -> None:
        print("\nAhead, ours less the other, paired by seed (standard error); negative: ours is better\n")
        for n in SIZES:
            ours = self.values(n, OURS, "ahead")
            for other in CONTESTANTS:
                theirs = self.values(n, other, "ahead")
                gap = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
                if other != OURS and len(gap):
                    error = f" ({gap.std(ddof=1) / len(gap) ** 0.5:.3f})" if len(gap) > 1 else ""
                    print(f"- n = {n}, {other}: {gap.mean():+.3f}{error}, {counted(len(gap))}")

    def runaways(self) -> None:
        for n in SIZES:
            worst, largest, sd = (self.values(n, OURS, field) for field in ("worst", "largest", "sd"))
            if worst:
                seed = max(worst, key=worst.__getitem__)
                print(
                    f"\nn = {n}, {counted(len(worst))}: the worst series ahead has an error of {worst[seed]:.2f} (seed "
                    f"{seed}), {worst[seed] / sd[seed]:.2f} standard deviations of the data ({sd[seed]:.2f}); the "
                    f"largest error at a point is {max(largest.values()):.2f}."
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="*", choices=SIZES, default=SIZES, help="points observed; default: all")
    parser.add_argument("--models", nargs="*", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=5, help="of data and training: 0 to this one less")
    parser.add_argument("--params", type=json.loads, default={}, help="of LatentODERegressor, in JSON")
    parser.add_argument("--cache", type=Path, help="JSON file that keeps results")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cache = Cache(args.cache)
    unit_of_work()
    for seed in range(0 if args.report else args.seeds):
        for contestant in args.models:
            for n in args.n:
                if key_of(n, seed, contestant, args.params) not in cache.results:
                    run_one(cache, n, seed, contestant, args.params)
    report = Report(cache, args.seeds, args.params)
    report.rows("inside", {})
    report.rows("ahead", PAPER)
    report.details()
    report.paired()
    report.runaways()


if __name__ == "__main__":
    main()
