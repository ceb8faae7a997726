"""How do time and memory grow with rows, columns and classes, and does a search gain from a second process?

ODENetClassifier runs with its defaults on made data (a Gaussian cloud a class). Told for every size:

- epoch: microseconds a row of an epoch of ``fit``, the mean of the first two epochs, validation included, set-up (input
  scaling, folds) not: the time between the lines that ``verbose=True`` prints;
- predict: microseconds a row of ``predict_proba`` on all training rows;
- ratio: the same over that of the table's reference size, the median over rounds in which all sizes take turns;
- memory: the largest ``ru_maxrss`` after fit and prediction, less what it was when X and y had been made.

Every measurement is a fresh process with one thread; seconds are the processor's (``time.process_time``), which other
work on the machine disturbs least. The last table is a grid search of 4 candidates and
3 folds on scikit-learn's digits: a single process with all threads (torch's default) and with one thread, and two
processes (joblib gives each one its share of the cores).

    python examples/benchmarks/scaling.py [--quick] [--only rows columns classes search]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from statistics import median

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from skode import ODENetClassifier

Size = tuple[int, int, int]  # rows, columns, classes

TABLES: dict[str, tuple[list[Size], Size]] = {
    "rows": ([(10**k, 20, 2) for k in (3, 4, 5, 6)], (10**4, 20, 2)),
    "columns": ([(10**4, columns, 2) for columns in (10, 100, 1000)], (10**4, 10, 2)),
    "classes": ([(10**4, 20, classes) for classes in (2, 10, 100)], (10**4, 20, 2)),
}
LARGE = 10**6  # rows; from here on few rounds must do
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def make_data(n_rows: int, n_columns: int, n_classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Gaussian clouds around random centres, without temporary arrays that would hide what a fit needs."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((n_classes, n_columns)) * 3 / n_columns**0.5
    y = rng.integers(n_classes, size=n_rows)
    X = np.empty((n_rows, n_columns))
    for start in range(0, n_rows, 4096):
        part = X[start : start + 4096]
        rng.standard_normal(out=part)
        part += centers[y[start : start + 4096]]
    return X, y


class LineTimes(io.StringIO):
    """A stream that remembers when each line ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        """Take text, note the time if it ends a line."""
        if "\n" in text:
            self.times.append(time.process_time())
        return len(text)


def peak_mb() -> float:
    """The process's largest resident size so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(size: Size) -> dict[str, float]:
    """Fit and predict once; seconds a row and megabytes."""
    X, y = make_data(*size)
    base = peak_mb()
    ODENetClassifier(max_iter=1, random_state=0).fit(X[:200], y[:200] % 2).predict_proba(X[:200])  # wakes torch
    lines = LineTimes()
    model = ODENetClassifier(max_iter=2, random_state=0, verbose=True)
    start = time.process_time()
    with contextlib.redirect_stdout(lines):
        model.fit(X, y)
    whole = time.process_time() - start
    after_fit = peak_mb() - base
    evals = model.n_evals_
    start = time.process_time()
    model.predict_proba(X)
    predict = time.process_time() - start
    epoch = (lines.times[-1] - lines.times[0]) / (len(lines.times) - 1)
    return {
        "epoch": epoch / len(X),
        "predict": predict / len(X),
        "setup": whole - epoch * model.n_iter_,
        "evals": evals,
        "evals_predict": float(model.solver_stats(X[:2000])["n_evals"].mean()),
        "fit_mb": after_fit,
        "mb": peak_mb() - base,
        "x_mb": X.nbytes / 1e6,
    }


def search(n_jobs: int) -> dict[str, float]:
    """Seconds of a grid search on digits."""
    X, y = load_digits(return_X_y=True)
    grid = {"learning_rate_init": [3e-3, 1e-2], "hidden_layer_sizes": [16, 32]}
    model = GridSearchCV(ODENetClassifier(random_state=0, max_iter=20), grid, cv=3, n_jobs=n_jobs, refit=False)
    start = time.perf_counter()
    model.fit(X, y)
    return {"seconds": time.perf_counter() - start, "score": float(max(model.cv_results_["mean_test_score"]))}


def in_child(task: str, *arguments: int, threads: int | None) -> dict[str, float]:
    """Run ``measure`` or ``search`` in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS}
    if threads is not None:
        environment |= dict.fromkeys(THREADS, str(threads))
    command = [sys.executable, __file__, "--child", task, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def scaling_table(name: str, sizes: list[Size], reference: Size, rounds: int) -> None:
    """Measure all sizes in turn, and print."""
    runs: dict[Size, list[dict[str, float]]] = {size: [] for size in sizes}
    for i in range(rounds):
        for size in sizes:
            if size[0] < LARGE or i < max(1, rounds // 3):
                runs[size].append(in_child("measure", *size, threads=1))
                print(f"{name} {size} round {i + 1}: {runs[size][-1]}", file=sys.stderr)
            if size[0] >= LARGE and i < max(1, rounds // 3):  # it took minutes: look at the reference again
                again = in_child("measure", *reference, threads=1)
                runs[reference][-1] |= {
                    key: (again[key] + runs[reference][-1][key]) / 2 for key in ("epoch", "predict")
                }

    def middle(size: Size, key: str) -> float:
        return median(run[key] for run in runs[size])

    def ratio(size: Size, key: str) -> float:
        return median(run[key] / other[key] for run, other in zip(runs[size], runs[reference], strict=False))

    print(f"\n### {name}; ratios to {reference[0]:,} rows, {reference[1]} columns, {reference[2]} classes\n")
    print(
        "| rows | columns | classes | epoch us/row | ratio | evals/row | predict us/row | ratio | evals/row | set-up s "
        "| X MB | peak MB beyond X: fit | fit and predict | runs |"
    )
    print("|---" * 14 + "|")
    for size in sizes:
        peak_fit, peak = (max(run[key] for run in runs[size]) for key in ("fit_mb", "mb"))
        print(
            f"| {size[0]:,} | {size[1]:,} | {size[2]} | {1e6 * middle(size, 'epoch'):.1f} | {ratio(size, 'epoch'):.2f} "
            f"| {middle(size, 'evals'):.1f} | {1e6 * middle(size, 'predict'):.1f} | {ratio(size, 'predict'):.2f} "
            f"| {middle(size, 'evals_predict'):.1f} | {middle(size, 'setup'):.2f} | {middle(size, 'x_mb'):.1f} "
            f"| {peak_fit:.0f} | {peak:.0f} | {len(runs[size])} |",
            flush=True,
        )


def search_table(rounds: int) -> None:
    """Time the grid search with one process and with two, in turn, and print."""
    kinds = {
        "n_jobs=1, all threads": (1, None),
        "n_jobs=1, one thread": (1, 1),
        "n_jobs=2": (2, None),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (n_jobs, threads) in kinds.items():
            seconds[kind].append(in_child("search", n_jobs, threads=threads)["seconds"])
            print(f"search {kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    print(f"\n### grid search on digits, 4 candidates x 3 folds of 20 epochs, {os.cpu_count()} cores\n")
    print("| | seconds | over n_jobs=2 |\n|---|---|---|")
    for kind, own in seconds.items():
        gain = median(a / b for a, b in zip(own, seconds["n_jobs=2"], strict=True))
        print(f"| {kind} | {median(own):.1f} | {gain:.2f} |")


def main() -> None:
    """Parse arguments; a child prints its measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 10,000 rows and 100 columns, one round")
    parser.add_argument("--only", nargs="+", choices=[*TABLES, "search"], default=[*TABLES, "search"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        warnings.simplefilter("ignore", ConvergenceWarning)  # two epochs are not meant to converge
        task, *numbers = options.child
        integers = [int(number) for number in numbers]
        result = search(*integers) if task == "search" else measure((integers[0], integers[1], integers[2]))
        print(json.dumps(result))
        return
    rounds = 1 if options.quick else options.rounds
    for name in options.only:
        if name == "search":
            search_table(rounds)
            continue
        sizes, reference = TABLES[name]
        if options.quick:
            sizes = [size for size in sizes if size[0] <= 10**4 and size[1] <= 100]
        scaling_table(name, sizes, reference, rounds)


if __name__ == "__main__":
    main()
