"""At equal tolerance, does skode need more evaluations than SciPy, or leave a larger error?

The 25 nonstiff DETEST problems (Hull et al. 1972; ``tests/detest.py``) from t = 0 to 20 in float64, each method beside
its counterpart in ``scipy.integrate.solve_ivp``: tsit5 and dopri5 beside RK45, dopri8 beside DOP853, bosh3 beside RK23,
at rtol = atol = 1e-3, 1e-5, 1e-7, 1e-9. Evaluations are counted by the field. The error is that of the state at t = 20,
the root mean square of (y - y_ref) / (1 + abs(y_ref)), against DOP853 at 1e-13; one below a hundredth of the tolerance
is an accident of the end point and counts as that hundredth, for both.

Printed: for every method and tolerance the ratios of the geometric means over the problems (to be at most 1.05 for
evaluations and 1.2 for errors), and how many problems are above these bounds by themselves. A single end-point error is
partly luck, so every problem is solved by both at 0.8, 1 and 1.25 times the tolerance. Nothing is timed.

    python examples/benchmarks/work_precision.py [--methods tsit5 ...] [--tolerances 1e-3 ...] [--control row] [--each]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from skode.solver import METHODS, solve
from tests.detest import DETEST, T1, Problem

COUNTERPARTS = {"tsit5": "RK45", "dopri5": "RK45", "dopri8": "DOP853", "bosh3": "RK23"}
MOST_EVALUATIONS, LARGEST_ERROR = 1.05, 1.2
BOUNDS = ((0, MOST_EVALUATIONS), (1, LARGEST_ERROR))
TINY = 0.01  # of the tolerance
AROUND = (0.8, 1.0, 1.25)  # a tolerance's neighbours
FINEST = {"bosh3": 1e-7}  # beyond, RK23 needs 100,000 evaluations


class Result(NamedTuple):
    """Of one solve."""

    n_evals: int
    error: float


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.n = function, 0

    def __call__(self, t: Any, y: Any) -> Any:
        """One evaluation."""
        self.n += 1
        return self.function(t, y)


@cache
def reference(name: str) -> NDArray[np.float64]:
    """The state at t = 20."""
    problem = DETEST[name]
    y0 = problem.y0.numpy()[0]
    end: NDArray[np.float64] = solve_ivp(problem.derivative, (0, T1), y0, method="DOP853", rtol=1e-13, atol=1e-13).y
    return end[:, -1]


def result(problem: Problem, n_evals: int, y: NDArray[np.float64], tolerance: float) -> Result:
    """Evaluations, and the error of the end state ``y``."""
    true = reference(problem.name)
    error = float(np.sqrt(np.mean(((y - true) / (1 + np.abs(true))) ** 2)))
    return Result(n_evals, max(error, TINY * tolerance))


@cache
def by_scipy(name: str, method: str, tolerance: float) -> Result:
    """One problem by SciPy."""
    problem = DETEST[name]
    field = Counted(problem.derivative)
    solution = solve_ivp(field, (0, T1), problem.y0.numpy()[0], method=method, rtol=tolerance, atol=tolerance)
    return result(problem, field.n, solution.y[:, -1], tolerance)


def by_skode(name: str, method: str, tolerance: float, control: str) -> Result:
    """One problem by skode."""
    problem = DETEST[name]
    field = Counted(problem.field)
    with torch.no_grad():
        solution = solve(
            field,
            problem.y0,
            [0.0, T1],
            method=method,
            rtol=tolerance,
            atol=tolerance,
            step_control=control,
            max_num_steps=10**7,
        )
    if not solution.success:
        raise RuntimeError(f"{name}: {solution.failures()[0]}")
    return result(problem, field.n, solution.y1.numpy()[0], tolerance)


def ratios(method: str, tolerance: float, control: str) -> dict[str, tuple[float, float]]:
    """Each problem's evaluations and error over SciPy's, the geometric means around the tolerance."""
    found = {}
    for name in DETEST:
        pairs = []
        for near in AROUND:
            own = by_skode(name, method, near * tolerance, control)
            other = by_scipy(name, COUNTERPARTS[method], near * tolerance)
            pairs.append((own.n_evals / other.n_evals, own.error / other.error))
        found[name] = (mean([evals for evals, _ in pairs]), mean([error for _, error in pairs]))
    return found


def mean(values: list[float]) -> float:
    """The geometric one."""
    return float(np.exp(np.mean(np.log(values))))


def above(found: dict[str, tuple[float, float]], column: int, bound: float) -> str:
    """The problems beyond a bound, with their ratios."""
    return " ".join(f"{name} {pair[column]:.2f}" for name, pair in found.items() if pair[column] > bound) or "none"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(COUNTERPARTS), choices=list(COUNTERPARTS))
    parser.add_argument("--tolerances", nargs="+", type=float, default=[1e-3, 1e-5, 1e-7, 1e-9])
    parser.add_argument("--control", default="row", choices=["row", "batch"])
    parser.add_argument("--each", action="store_true", help="name the problems that are above the bounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | tolerance | evaluations | error | | problems above: evaluations | error |")
    print("|---" * 7 + "|")
    details: list[str] = []
    for method in options.methods:
        if method not in METHODS:
            print(f"| {method} | | skode does not have it yet | | | | |")
            continue
        for tolerance in options.tolerances:
            if tolerance < FINEST.get(method, 0.0):
                continue
            found = ratios(method, tolerance, options.control)
            evals, error = (mean([pair[i] for pair in found.values()]) for i in (0, 1))
            verdict = "ok" if evals <= MOST_EVALUATIONS and error <= LARGEST_ERROR else "ABOVE"
            numbers = [sum(pair[i] > bound for pair in found.values()) for i, bound in BOUNDS]
            print(
                f"| {method} / {COUNTERPARTS[method]} | {tolerance:g} | {evals:.3f} | {error:.2f} | {verdict} "
                f"| {numbers[0]} | {numbers[1]} |",
                flush=True,
            )
            parts = [above(found, i, bound) for i, bound in BOUNDS]
            details.append(f"{method} {tolerance:g}: evaluations: {parts[0]}; error: {parts[1]}")
    if options.each:
        print("\n" + "\n".join(details))


if __name__ == "__main__":
    main()
