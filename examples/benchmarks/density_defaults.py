"""Held-out log-likelihood of ContinuousFlowDensity's defaults beside other density estimators.

Peers: kernel density with a cross-validated bandwidth; Gaussian mixtures chosen by BIC and by cross-validation; zuko's
neural spline and masked autoregressive flows, with the best of four and of three configurations for the data set (by
the validation likelihood of its first split); an FFJORD-like flow on torchdiffeq, which is slow and so gets two splits
and at most 300 updates or 60 CPU seconds a fit (more might serve it; see density_peers.py). skode's model has its
defaults everywhere. The figure is the mean negative log-likelihood of the test rows in nats, lower is better; where the
true density is known, its figure on the same rows is told as well.

Times are CPU seconds of a fit on one thread, without the search over NSF's and MAF's configurations, divided by those
of a fixed piece of work done before and after the fit, since a busy machine is slower: read ratios only.

    python examples/benchmarks/density_defaults.py --cache peers.json

Each result is written to the cache at once; several processes may share it. Peers' results are not computed again,
skode's always, unless ``--cached-only``. ``--report`` prints what there is and fits nothing.
"""

from __future__ import annotations

import argparse
import fcntl
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
from density_data import SETS, Split, load_split
from density_peers import GRIDS, MOST_SPLITS, PEERS, Fitted

OURS, REFERENCE, TRUE = "ContinuousFlow", "NSF", "TRUE"
Result = dict[str, Any]


class Cache:
    """Results by key, in a file that several processes may write to."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.results = path, {}
        if path and path.exists():
            self.results = json.loads(path.read_text())

    def put(self, key: str, result: Result) -> None:
        self.results[key] = result
        if self.path is None:
            return
        with open(f"{self.path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.results = {**json.loads(self.path.read_text()), key: result}
            part = Path(f"{self.path}.part")
            part.write_text(json.dumps(self.results, indent=0))
            part.replace(self.path)


def ours(X: np.ndarray, seed: int, params: Result) -> Fitted:
    """skode's density; tables of this benchmark must count as continuous."""
    import skode

    model = skode.ContinuousFlowDensity(random_state=seed, **params).fit(X)
    if set(model.column_kinds_) != {"continuous"}:
        raise ValueError(f"columns were taken for {model.column_kinds_}.")
    return Fitted(model.score_samples, model.validation_scores_[-1], f"{model.n_iter_} updates")


def unit_of_work() -> float:
    """CPU seconds of a fixed piece of work, about a tenth of a second."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=generator) for n in (256, 64))
    w.requires_grad_(True)
    start = time.process_time()
    for _ in range(150):
        torch.tanh(torch.tanh(x @ w) @ w).sum().backward()
    return time.process_time() - start


def measure(fit: Callable[..., Fitted], split: Split, seed: int, config: Result) -> Result:
    """Fit and score: mean and standard deviation of the test rows' figures, and the times."""
    before = unit_of_work()
    start = time.process_time()
    fitted = fit(split.train, seed, config)
    fit_seconds = time.process_time() - start
    scores = -fitted.score_samples(split.test)
    score_seconds = time.process_time() - start - fit_seconds
    return {
        "nll": float(scores.mean()),
        "sd_of_rows": float(scores.std()),
        "true": None if split.log_density is None else float(-split.log_density(split.test).mean()),
        "validation": fitted.validation,
        "chosen": fitted.chosen,
        "config": config,
        "seconds": fit_seconds,
        "score_seconds": score_seconds,
        "unit": (before + unit_of_work()) / 2,
    }


def choose_config(cache: Cache, name: str, model: str, split: Split) -> None:
    """Fit every configuration on the first split; the one of the best validation likelihood is its result."""
    for i, config in enumerate(GRIDS[model]):
        if f"{name}/0/{model}/{i}" not in cache.results:
            cache.put(f"{name}/0/{model}/{i}", measure(PEERS[model], split, 0, config))
    found = [cache.results[f"{name}/0/{model}/{i}"] for i in range(len(GRIDS[model]))]
    finite = [r for r in found if np.isfinite(r["validation"])]
    cache.put(f"{name}/0/{model}", max(finite, key=lambda r: r["validation"]))


def run_one(cache: Cache, name: str, seed: int, model: str, key: str, params: Result) -> None:
    """One model on one split."""
    split = load_split(name, seed)
    if model == OURS:
        cache.put(key, measure(ours, split, seed, params))
    elif model not in GRIDS:
        cache.put(key, measure(PEERS[model], split, seed, {}))
    elif seed == 0:
        choose_config(cache, name, model, split)
    else:
        config = cache.results[f"{name}/0/{model}"]["config"]
        cache.put(key, measure(PEERS[model], split, seed, config))
    r = cache.results[key]
    print(f"{key}: {r['nll']:.3f}, {r['chosen']}, {r['seconds']:.1f} CPU s", flush=True)


class Table:
    """Results of some sets and models by split; nan where there is none."""

    def __init__(self, cache: Cache, names: list[str], models: dict[str, str], splits: int) -> None:
        self.names, self.models = names, list(models)
        n_splits = {m: min(splits, MOST_SPLITS.get(m, splits)) for m in models}
        read = lambda n, s, m, f: cache.results.get(f"{n}/{s}/{models[m]}", {}).get(f)  # noqa: E731

        def values(field: str) -> np.ndarray:
            found = [
                [[read(n, s, m, field) if s < n_splits[m] else None for s in range(splits)] for m in models]
                for n in names
            ]
            return np.array(found, dtype=np.float64)

        self.nll, self.true = values("nll"), values("true")  # sets, models, splits
        self.cpu, self.score_cpu = values("seconds") / values("unit"), values("score_seconds") / values("unit")

    def complete(self) -> np.ndarray:
        """Which models have all splits of which sets."""
        return ~np.isnan(self.nll).any(axis=2)

    def mean(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return np.nanmean(self.nll, axis=2)


def print_table(table: Table) -> None:
    """Means by set in Markdown; the best of the models with all splits is bold, (n) marks fewer splits."""
    mean, complete = table.mean(), table.complete()
    print(f"\n| set | {TRUE} | {' | '.join(table.models)} |")
    print("|---" * (len(table.models) + 2) + "|")
    for i, name in enumerate(table.names):
        best = np.where(complete[i], mean[i], np.inf).min()
        known = table.true[i][~np.isnan(table.true[i])]
        cells = ["" if not len(known) else f"{table.true[i][~np.isnan(table.true[i]).any(axis=1)].mean():.3f}"]
        for j in range(len(table.models)):
            n = int((~np.isnan(table.nll[i, j])).sum())
            text = "-" if not n else f"{mean[i, j]:.3f}" + ("" if complete[i, j] else f" ({n})")
            cells.append(f"**{text}**" if complete[i, j] and mean[i, j] == best else text)
        print(f"| {name} | {' | '.join(cells)} |")


def print_differences(table: Table) -> None:
    """Ours less each peer, paired by split: mean (standard error) by set."""
    j = table.models.index(OURS)
    peers = [m for m in table.models if m != OURS]
    print("\nOurs less the peer, mean over splits (standard error); negative: ours is better\n")
    print(f"| set | {' | '.join(peers)} |")
    print("|---" * (len(peers) + 1) + "|")
    for i, name in enumerate(table.names):
        cells = []
        for peer in peers:
            gap = table.nll[i, j] - table.nll[i, table.models.index(peer)]
            gap = gap[~np.isnan(gap)]
            error = f" ({gap.std(ddof=1) / len(gap) ** 0.5:.3f})" if len(gap) > 1 else ""
            cells.append(f"{gap.mean():+.3f}{error}" if len(gap) else "-")
        print(f"| {name} | {' | '.join(cells)} |")


def print_summary(table: Table) -> None:
    """The figures of merit."""
    j, mean, complete = table.models.index(OURS), table.mean(), table.complete()
    peers = [k for k in range(len(table.models)) if k != j]
    full = [i for i in range(len(table.names)) if complete[i, j] and complete[i, peers].any()]
    if not full:
        return
    best = np.array([np.where(complete[i, peers], mean[i, peers], np.inf).min() for i in full])
    gap = mean[full, j] - best
    worst = int(gap.argmax())
    print(
        f"\nAt least as good as the best peer's mean on {int((gap <= 0).sum())} of {len(full)} sets, within 0.05 nat "
        f"on {int((gap <= 0.05).sum())}; largest loss {max(gap[worst], 0):.3f} ({table.names[full[worst]]}). "
        "The best is taken of the peers with all splits."
    )
    for k in peers:
        paired = table.nll[:, j] - table.nll[:, k]
        found = {n: np.nanmean(d) for n, d in zip(table.names, paired, strict=True) if not np.isnan(d).all()}
        lost = [n for n, d in found.items() if d > 0]
        ratio = np.log(table.cpu[:, j] / table.cpu[:, k])
        by_set = np.exp([np.nanmean(r) for r in ratio if not np.isnan(r).all()])
        if len(by_set):
            cpu = f"geometric mean {np.exp(np.log(by_set).mean()):.2f}, worst {by_set.max():.2f}"
            won = f"{len(found) - len(lost)} of {len(found)} sets (not: {', '.join(lost) or 'none'})"
            print(f"  {table.models[k]}: better than it on {won}; CPU of a fit over its: {cpu}")
    missing = [f"{table.names[i]}: {table.models[k]}" for i in full for k in peers if np.isnan(table.nll[i, k]).all()]
    if missing:
        print("  Not there yet: " + ", ".join(missing))
    score = table.score_cpu[:, j] / table.cpu[:, j]
    print(f"  CPU of scoring the test rows over that of the fit: median {np.nanmedian(score):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", help="names of single sets; default: all of the part")
    parser.add_argument("--tuning", action="store_true", help="the sets that choices are made on")
    parser.add_argument("--models", nargs="*", choices=[OURS, *PEERS], help="default: all")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--params", type=json.loads, default={}, help="of ContinuousFlowDensity, in JSON")
    parser.add_argument("--cache", type=Path, help="JSON file that keeps results")
    parser.add_argument("--cached-only", action="store_true", help="take skode's results from the cache too")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    args = parser.parse_args()

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    names = args.sets or SETS["tuning" if args.tuning else "confirmation"]
    models = {m: m for m in args.models or [*PEERS, OURS]}
    if OURS in models and args.params:
        models[OURS] = OURS + json.dumps(args.params, sort_keys=True)
    cache = Cache(args.cache)
    unit_of_work()
    for model, label in {} if args.report else models.items():
        for name in names:
            for seed in range(min(args.splits, MOST_SPLITS.get(model, args.splits))):
                key = f"{name}/{seed}/{label}"
                if key not in cache.results or (model == OURS and not args.cached_only):
                    run_one(cache, name, seed, model, key, args.params)
    table = Table(cache, names, models, args.splits)
    print_table(table)
    if OURS in models:
        print_differences(table)
        print_summary(table)


if __name__ == "__main__":
    main()
