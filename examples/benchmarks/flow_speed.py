"""What do continuous normalizing flows cost: exact traces, train steps, whole fits, and a million rows?

One thread on one core, float32 in training and float64 in densities, as ContinuousFlowDensity has them. Contestants
take turns, round after round, each round begun by another one; ratios are medians over rounds of ratios within a round,
with their 10th and 90th percentile, of processor time (``time.process_time``, which other work on the machine disturbs
least). Everything runs twice untimed before. Tables:

- ``field``: value and gradients (to the state and all weights) of a field D-64-64-D with its exact trace, over those of
  the velocity alone; a batch of 512. Both by the field's own formulas, as the solver asks them, at one time for all
  rows (training) and at times of each row's own (densities), and both by autograd; beside them, over the field's own
  velocity, traces by autograd: one Hutchinson probe, and D products.
- ``step``: one train step by likelihood (forward solve, gradients, Adam; a batch of 512) as ContinuousFlowDensity makes
  them, beside FFJORD's way (Grathwohl et al. 2019): torchdiffeq's ``odeint_adjoint``, the trace by D autograd calls or
  by a Hutchinson probe, at FFJORD's tolerance (dopri5, 1e-5) and at skode's method and tolerance. The field is a
  trained one; the torch module that FFJORD's way integrates has its weights and its function, each layer a matrix with
  gate and shift in time (FFJORD's "concatsquash" with a line instead of the sigmoid, so that it is the same ODE). Every
  step begins at the same weights, every round has other rows. Told are evaluations of the field a step, forward and
  backward, and how far log-densities are from those of a solve at 1e-9 in float64 (for Hutchinson: of its estimate).
- ``fit``: seconds of ``fit`` with its defaults for 2,000 rows of two moons and for the training part of scikit-learn's
  breast cancer data (455 x 30), and of ``score_samples`` of 5,000 rows (moons: fresh ones; cancer: drawn from the
  fitted density) and of one row; every round is a process of its own with another seed.
- ``rows``: microseconds a row of scoring and of sampling many rows, over those of 20,000 rows in the same process, and
  the growth of the process's largest resident size beyond input and output, from those 20,000 rows on.

    python examples/benchmarks/flow_speed.py [--tables field step fit rows] [--rounds 15] [--most-rows 1000000]
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported

import numpy as np
import torch
from flow_contestants import FFJORDStep
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits, make_moons
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split
from torch import Tensor

from skode import ContinuousFlowDensity
from skode.fields import FlowField, draw_probe
from skode.fields.integrands import Integrands
from skode.fields.trace import TracedDynamics
from skode.models import LinearPath, SolverOptions
from skode.models.flow import ContinuousFlow, TrainingPass
from skode.training.flow import FlowRows, FlowTraining
from skode.training.noise import RowNoise

TABLES = ("field", "step", "fit", "rows")
BATCH, HIDDEN = 512, (64, 64)
FIELD_DIMS, STEP_DIMS = (2, 6, 13, 30, 63, 128), (2, 16, 43)
N_WARM = 2
MOST_FIELD_RATIO, LEAST_STEP_RATIO = 2.0, 8.0
FIT_LIMITS = {"moons": 10.0, "cancer": 20.0}  # processor seconds
N_SCORED, SCORE_LIMIT = 5000, 1.0
FEW_ROWS = 20_000
Step = Callable[[], object]


def moons(n: int, seed: int = 0) -> NDArray[np.float64]:
    """Two moons."""
    return make_moons(n, noise=0.08, random_state=seed)[0]


# --- timing -----------------------------------------------------------------------------------------------------


def cpu_of(step: Step) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    step()
    return time.process_time() - start


def race(steps: dict[str, Step], rounds: int, prepare: Callable[[int], None] = lambda i: None) -> dict[str, Any]:
    """Seconds (rounds,) of each contestant; all take turns, and ``prepare`` makes a round's arrays beforehand."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(-N_WARM, rounds):
        prepare(i)
        gc.collect()
        gc.disable()
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            took = cpu_of(steps[name])
            if i >= 0:
                seconds[name].append(took)
        gc.enable()
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(own: NDArray[np.float64], base: NDArray[np.float64]) -> str:
    """Median of the rounds' ratios, and their 10th and 90th percentile."""
    low, middle, high = np.percentile(own / base, [10, 50, 90])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def verdict(what: str, missed: Sequence[object]) -> None:
    """Whether a limit was kept."""
    print(f"\n{what}: {'kept' if not missed else 'missed at ' + ', '.join(map(str, missed))}.", flush=True)


# --- the field --------------------------------------------------------------------------------------------------


def field_steps(n_dims: int, generator: torch.Generator) -> dict[str, Step]:
    """Value and gradients of one field in all ways."""
    field = FlowField(n_dims, HIDDEN, generator=generator)
    y = torch.randn(BATCH, n_dims, generator=generator)
    shared = torch.full((1, 1), 0.3).expand(BATCH, 1)
    own = torch.rand(BATCH, 1, generator=generator)
    probe = draw_probe(BATCH, n_dims, generator=generator)
    cotangent = torch.randn(BATCH, n_dims + 1, generator=generator)
    plain, exact = field.dynamics(trace=False), field.dynamics()

    def by_autograd(dynamics: Any, trace: bool) -> Step:
        a = cotangent if trace else cotangent[:, :-1].contiguous()

        def step() -> object:
            state = y.detach().requires_grad_()
            return torch.autograd.grad(dynamics(shared, state), [state, *field.parameters()], a)

        return step

    def by_formula(dynamics: Any, t: Tensor, trace: bool) -> Step:
        a = cotangent if trace else cotangent[:, :-1].contiguous()

        @torch.no_grad()
        def step() -> object:
            _, tape = dynamics.linearize(t, y)
            return dynamics.pull(tape, a), dynamics.accumulate([tape])

        return step

    def traced_by_products(probe: Tensor | None) -> Step:
        dynamics = TracedDynamics(field, n_dims, integrands=Integrands(), probe=probe, own_trace=False)
        return by_autograd(dynamics, True)

    return {
        "plain": by_formula(plain, shared, False),
        "exact": by_formula(exact, shared, True),
        "plain, own times": by_formula(plain, own, False),
        "exact, own times": by_formula(exact, own, True),
        "plain by autograd": by_autograd(plain, False),
        "exact by autograd": by_autograd(exact, True),
        "Hutchinson": traced_by_products(probe),
        "D products": traced_by_products(None),
    }


def field_table(rounds: int) -> None:
    """Print the exact trace's cost."""
    print(f"\n### field D-64-64-D, forward and backward, batch {BATCH}: over the velocity alone\n")
    print("| D | plain ms | exact trace | exact, own times | exact by autograd | Hutchinson by autograd | D products |")
    print("|---" * 7 + "|")
    missed = []
    for n_dims in FIELD_DIMS:
        steps = field_steps(n_dims, torch.Generator().manual_seed(0))
        seconds = race({name: step for name, step in steps.items() if name != "D products"}, 4 * rounds)
        slow = race({name: steps[name] for name in ("plain", "D products")}, max(2, rounds // 3))
        plain = seconds["plain"]
        ratios = [
            ratio(seconds["exact"], plain),
            ratio(seconds["exact, own times"], seconds["plain, own times"]),
            ratio(seconds["exact by autograd"], seconds["plain by autograd"]),
            ratio(seconds["Hutchinson"], plain),
            ratio(slow["D products"], slow["plain"]),
        ]
        print(f"| {n_dims} | {1e3 * np.median(plain):.2f} | {' | '.join(ratios)} |", flush=True)
        if np.median(seconds["exact"] / plain) > MOST_FIELD_RATIO:
            missed.append(n_dims)
    verdict(f"exact trace at most {MOST_FIELD_RATIO:g} plain fields", missed)


# --- a train step -----------------------------------------------------------------------------------------------


class SkodeStep:
    """A train step as ContinuousFlowDensity makes them, its method and tolerance by default."""

    def __init__(self, flow: ContinuousFlow, rows: Tensor, solver: SolverOptions | None = None) -> None:
        defaults, (n, d) = ContinuousFlowDensity(), rows.shape
        noise = RowNoise(rows.double().numpy(), 2 * d + 2, 0)
        table = FlowRows(rows, torch.ones(n), noise, torch.zeros(n, dtype=torch.bool))
        self.solver = solver or defaults._training_solver()
        generator = torch.Generator().manual_seed(0)
        options = defaults._flow_options(True, True, "auto")
        self._training = FlowTraining(flow, LinearPath(), table, lambda u: u, self.solver, options, generator)
        self._training._start_likelihood()
        self._training._set_rate(self._training._adam, 1e-4)
        self._start = [p.detach().clone() for p in self._training.parameters]

    def load(self, rows: Tensor) -> None:
        """Take a round's rows (their numbers), and the first weights again; the step length stays, as in training."""
        self._rows = rows
        self._training._take(self._start)

    def log_densities(self) -> Tensor:
        """Of the rows."""
        training = self._training
        with torch.no_grad():
            rows = training.rows.x[self._rows]
            return training.flow.densities(rows, self.solver, training=TrainingPass()).log_density

    def __call__(self) -> tuple[float, float]:
        training = self._training
        training._step(training._adam, training._likelihood_loss(self._rows))
        return training.history.n_evals, 0


def trained(n_dims: int) -> tuple[ContinuousFlowDensity, Tensor]:
    """A flow fitted to two moons or to digits' first principal components, and its standardised rows."""
    X = moons(2000) if n_dims == 2 else PCA(n_dims, random_state=0).fit_transform(load_digits().data)
    density = ContinuousFlowDensity(base="normal", random_state=0).fit(X)
    rows = density.columns_.standardise(density.columns_.centres(X))
    return density, torch.from_numpy(rows).float()


def step_contestants(density: ContinuousFlowDensity, rows: Tensor) -> dict[str, SkodeStep | FFJORDStep]:
    """All ways to make a step, each with a flow of its own."""

    def flow() -> ContinuousFlow:
        return density._flows[0].build(torch.float32, torch.device("cpu"))

    own = SkodeStep(flow(), rows)
    tight = SolverOptions("dopri5", 1e-5, 1e-5, None, 10_000)
    same = (own.solver.method, own.solver.rtol, own.solver.atol)
    found: dict[str, SkodeStep | FFJORDStep] = {
        f"skode, {same[0]} {same[1]:g}": own,
        "skode, dopri5 1e-05": SkodeStep(flow(), rows, tight),
    }
    for method, rtol, atol in (("dopri5", 1e-5, 1e-5), same):
        for hutchinson in (False, True):
            name = f"FFJORD's way, {method} {rtol:g}, {'Hutchinson' if hutchinson else 'D autograd calls'}"
            found[name] = FFJORDStep(flow(), method, rtol, atol, hutchinson)
    return found


def exact_log_densities(density: ContinuousFlowDensity, x: Tensor, probe: Tensor | None) -> Tensor:
    """At 1e-9 in float64; with a probe of Hutchinson's estimate."""
    flow = density._flows[0].build(torch.float64, torch.device("cpu"))
    wanted = None if probe is None else TrainingPass(divergence="hutchinson", probe=probe.double())
    options = SolverOptions("dopri8", 1e-9, 1e-9, None, 100_000)
    with torch.no_grad():
        return flow.densities(x.double(), options, training=wanted).log_density


def step_table(n_dims: int, rounds: int) -> bool:
    """Race, check and print one size; whether the limit was kept."""
    density, rows = trained(n_dims)
    steps = step_contestants(density, rows)
    generator = torch.Generator().manual_seed(1)
    evaluations: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}

    def prepare(_: int) -> None:
        chosen = torch.randperm(len(rows), generator=generator)[:BATCH]
        for step in steps.values():
            step.load(chosen if isinstance(step, SkodeStep) else rows[chosen])

    def noting(name: str) -> Step:
        return lambda: evaluations[name].append(steps[name]())

    errors, chosen = {}, torch.arange(BATCH)
    for name, step in steps.items():
        step.load(chosen if isinstance(step, SkodeStep) else rows[chosen])
        probe = step.dynamics.probe if isinstance(step, FFJORDStep) else None
        error = (step.log_densities().detach().double() - exact_log_densities(density, rows[chosen], probe)).abs()
        errors[name] = f"{error.mean():.1e} | {error.max():.1e}"
    seconds = race({name: noting(name) for name in steps}, rounds, prepare)
    names = list(steps)
    own, rival = names[0], next(name for name in names if name.startswith("FFJORD"))
    print(f"\n### train step, D = {n_dims}, batch {len(chosen)}: time over skode's\n")
    print("| | over skode's | CPU ms | evaluations forward | backward | error of log-density: mean | largest |")
    print("|---" * 7 + "|")
    for name, values in seconds.items():
        forward, backward = np.mean(evaluations[name], axis=0)
        print(
            f"| {name} | {ratio(values, seconds[own])} | {1e3 * np.median(values):.1f} | {forward:.1f} "
            f"| {backward:.1f} | {errors[name]} |",
            flush=True,
        )
    return bool(np.median(seconds[rival] / seconds[own]) >= LEAST_STEP_RATIO)


# --- whole processes ----------------------------------------------------------------------------------------------


def measure_fit(name: str, seed: int) -> dict[str, float]:
    """Seconds of a fit and of scores."""
    X = (
        moons(2000)
        if name == "moons"
        else train_test_split(load_breast_cancer().data, test_size=114, random_state=0)[0]
    )
    ContinuousFlowDensity(max_iter=2, random_state=0).fit(X[:60]).score_samples(X[:60])  # libraries' first calls
    model = ContinuousFlowDensity(random_state=seed)
    found = {"fit": cpu_of(lambda: model.fit(X)), "n_dims": X.shape[1]}
    many = moons(N_SCORED, 1) if name == "moons" else model.sample(N_SCORED, 1)
    found["score"] = float(np.median([cpu_of(lambda: model.score_samples(many)) for _ in range(5)]))
    found["one"] = float(np.median([cpu_of(lambda: model.score_samples(many[:1])) for _ in range(9)]))
    found["error"] = float(model.score_samples(many, return_error=True)[1].max())
    return found


def peak_bytes() -> int:
    """The process's largest resident size so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins at the size of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_rows(task: str, n_rows: int) -> dict[str, float]:
    """Seconds a row and bytes of a pickled density for many rows, and for few before and after.

    The fit was another process's: its memory would hide what is needed here.
    """
    what, path = task.split(",")
    model = pickle.loads(Path(path).read_bytes())
    X = np.empty((n_rows if what == "score" else 1, 2))
    for start in range(0, len(X), FEW_ROWS):  # temporary arrays of all rows would hide what scores need
        X[start : start + FEW_ROWS] = moons(FEW_ROWS, 1 + start)[: len(X) - start]
    held: list[object] = []

    def call(n: int) -> float:
        return cpu_of(lambda: held.append(model.score_samples(X[:n]) if what == "score" else model.sample(n, 0))) / n

    few = [call(FEW_ROWS) for _ in range(3)]
    base = peak_bytes()
    held.clear()
    many = call(n_rows)
    output = n_rows * 8 * (1 if what == "score" else X.shape[1])
    beyond = peak_bytes() - base - output
    few += [call(FEW_ROWS) for _ in range(3)]
    return {"many": many, "few": float(np.median(few)), "beyond": beyond, "output": output}


MEASURES: dict[str, Callable[[str, int], dict[str, float]]] = {"fit": measure_fit, "rows": measure_rows}


def in_child(*task: object) -> dict[str, float]:
    """Run a measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", *map(str, task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def fit_table(rounds: int) -> None:
    """Print costs of fits and scores."""
    print(f"\n### fit with defaults, and scores of {N_SCORED:,} rows and of one: processor seconds, median (largest)\n")
    print("| | D | fit | limit | score | limit | one row | largest solver error, nats |\n" + "|---" * 8 + "|")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in FIT_LIMITS}
    for seed in range(rounds):
        for name in runs:
            runs[name].append(in_child("fit", name, seed))
    missed = []
    for name, found in runs.items():
        fit, score, one, error = (np.array([run[key] for run in found]) for key in ("fit", "score", "one", "error"))
        print(
            f"| {name} | {found[0]['n_dims']} | {np.median(fit):.1f} ({fit.max():.1f}) | {FIT_LIMITS[name]:g} "
            f"| {np.median(score):.2f} ({score.max():.2f}) | {SCORE_LIMIT:g} | {np.median(one):.3f} "
            f"| {error.max():.1e} |"
        )
        missed += [f"fit of {name}"] * bool(np.median(fit) > FIT_LIMITS[name])
        missed += [f"score of {name}"] * bool(np.median(score) > SCORE_LIMIT)
    verdict("limits of fits and scores", missed)


def rows_table(most: int) -> None:
    """Print costs a row, and memory."""
    print(f"\n### many rows (two moons): time a row over that of {FEW_ROWS:,}, and memory beyond input and output\n")
    print("| | rows | us/row | ratio | output MB | peak growth beyond it, MB | bytes a row |\n" + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "density.pickle"
        path.write_bytes(pickle.dumps(ContinuousFlowDensity(random_state=0).fit(moons(2000))))
        for what in ("score", "sample"):
            for n_rows in sorted({min(10 * FEW_ROWS, most), most}):
                found = in_child("rows", f"{what},{path}", n_rows)
                print(
                    f"| {what} | {n_rows:,} | {1e6 * found['many']:.1f} | {found['many'] / found['few']:.2f} "
                    f"| {found['output'] / 1e6:.1f} | {found['beyond'] / 1e6:.1f} | {found['beyond'] / n_rows:.1f} |",
                    flush=True,
                )


def main() -> None:
    """Print the tables that are asked for; a child prints its measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fits", type=int, default=3, help="rounds of whole fits")
    parser.add_argument("--most-rows", type=int, default=1_000_000)
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to stay on; -1: any")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.core >= 0 and hasattr(os, "sched_setaffinity") and not options.child:
        os.sched_setaffinity(0, {options.core})  # children inherit it
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    if options.child:
        what, name, number = options.child
        print(json.dumps(MEASURES[what](name, int(number))))
        return
    if "field" in options.tables:
        field_table(options.rounds)
    if "step" in options.tables and importlib.util.find_spec("torchdiffeq") is None:
        print("\n(no table of train steps: torchdiffeq is not installed)")
    elif "step" in options.tables:
        kept = {n_dims: step_table(n_dims, options.rounds) for n_dims in STEP_DIMS}
        missed = [f"D = {n_dims}" for n_dims, ok in kept.items() if not ok]
        verdict(f"a train step at least {LEAST_STEP_RATIO:g} times as fast as FFJORD's way at its tolerance", missed)
    if "fit" in options.tables:
        fit_table(options.fits)
    if "rows" in options.tables:
        rows_table(options.most_rows)


if __name__ == "__main__":
    main()
