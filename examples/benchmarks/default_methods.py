"""Which method should predict by default? Evaluations that reach an accuracy, on the estimators' own problems.

Default estimators are fitted on the tuning sets; the states of their test rows are then solved by every method over a
range of tolerances, each row by its own steps, as in ``predict``. The error is the root mean square over rows and
outputs (before softmax) against dopri8 at 1e-10, in units of the outputs' standard deviation. Told is, for each
accuracy, the evaluations a row that reach it (log-log interpolated between tolerances; geometric mean over data sets),
and for each ``rtol`` the evaluations and the error that it leads to (geometric means).

    python examples/benchmarks/default_methods.py [--sets 8]

Needs what tabular_data.py names.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from tabular_data import SETS

from skode import ODENetClassifier, ODENetRegressor
from skode.models import ODENet, SolverOptions

METHODS = ("adaptive_heun", "adaptive_midpoint", "fehlberg2", "rk32", "bosh3", "tsit5", "dopri5", "dopri8")
RTOLS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ACCURACIES = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5)


def fitted(n_sets: int) -> Iterator[tuple[str, ODENet, torch.Tensor]]:
    """Names, networks in float64, and their test rows."""
    for task, kind in (("classification", ODENetClassifier), ("regression", ODENetRegressor)):
        for name, load in list(SETS[task, "tuning"].items())[:n_sets]:
            X, y = load()
            train, test, target, _ = train_test_split(X, y, test_size=0.25, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = kind(random_state=0).fit(train, target)
            net = model._net.build(torch.float64, torch.device("cpu"))
            yield name, net, torch.from_numpy(test[:500])


def solved(net: ODENet, X: torch.Tensor, method: str, rtol: float) -> tuple[torch.Tensor, float]:
    """Outputs, and mean evaluations a row."""
    options = SolverOptions(method=method, rtol=rtol, atol=1e-2 * rtol, step_size=None, max_num_steps=100_000)
    with torch.no_grad():
        solution = net.solve_rows(X, options)
        return net.read_out(solution.y1), float(solution.n_evals.double().mean())


def curves(net: ODENet, X: torch.Tensor) -> dict[str, np.ndarray]:
    """Evaluations and errors (2, n_rtols) of every method."""
    truth, _ = solved(net, X, "dopri8", 1e-10)
    found = {}
    for method in METHODS:
        points = []
        for rtol in RTOLS:
            out, n_evals = solved(net, X, method, rtol)
            points.append((n_evals, max(float((out - truth).square().mean().sqrt() / truth.std()), 1e-14)))
        found[method] = np.array(points).T
    return found


def cost(curve: np.ndarray, accuracy: float) -> float:
    """Evaluations that reach an accuracy; those of the loosest tolerance if that does already."""
    n_evals, errors = np.log(curve)
    best = np.minimum.accumulate(errors)
    if best[0] <= np.log(accuracy):
        return float(np.exp(n_evals[0]))
    if best[-1] > np.log(accuracy):
        return float("nan")
    return float(np.exp(np.interp(-np.log(accuracy), -best, n_evals)))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=8, help="of each task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    all_curves = []
    for name, net, X in fitted(options.sets):
        all_curves.append(curves(net, X))
        print(f"{name}: {len(X)} rows, states of {net.n_dims}", flush=True)
    print(f"\nEvaluations a row to an accuracy, {len(all_curves)} data sets\n")
    print("| method |" + "".join(f" {a:g} |" for a in ACCURACIES) + "\n" + "|---" * (len(ACCURACIES) + 1) + "|")
    for method in METHODS:
        costs = [np.exp(np.mean([np.log(cost(c[method], a)) for c in all_curves])) for a in ACCURACIES]
        print(f"| {method} |" + "".join(f" {x:.1f} |" for x in costs))
    print("\nEvaluations a row / error at a tolerance\n")
    print("| method |" + "".join(f" {r:g} |" for r in RTOLS) + "\n" + "|---" * (len(RTOLS) + 1) + "|")
    for method in METHODS:
        means = np.exp(np.mean([np.log(c[method]) for c in all_curves], axis=0)).T
        print(f"| {method} |" + "".join(f" {n:.0f} / {e:.1e} |" for n, e in means))


if __name__ == "__main__":
    main()
