"""How fast is a train step through an ODE solve, beside torchdiffeq, torchode and diffrax?

A train step is a solve of an MLP field D-H-H-D (tanh, autonomous, float32) from t = 0 to 2 at rtol 1e-5, atol 1e-7, and
the product of a random cotangent with its derivative to y0 and all weights. One thread on one core; all contestants
take turns, round after round, each round with fresh weights and states that are the same for all and made outside of
the timed region. Told are the medians of wall and processor time, and the median, 10th and 90th percentile over
rounds of torchdiffeq ``odeint_adjoint``'s time over the contestant's (higher is faster; processor time is the one to
trust on a busy machine). A jitted step's first call, mostly compilation, is told apart. For every contestant, on the
first three rounds' arrays: the largest error of outputs and gradients (relative; the larger one of y0's and the
weights') against float64 at a tolerance of 1e-10, and the mean number of evaluations of the field a row, counted by
the field (diffrax: from its number of steps).

Libraries that are missing are named and skipped. Further tables on request:

- ``--variants``: the same ratios where the field or the outputs are of another kind, and as a share of the base case;
- ``--forward``: the solve alone, without gradients;
- ``--operations``: operations of torch and host synchronisations a step;
- ``--gemm-floor``: the accepted steps' matrix products alone, back to back;
- ``--times``: outputs at many times, and at times of each row's own.

    python examples/benchmarks/solver_speed.py [--rounds 25] [--sizes 64,2,32 ...] [--variants] [--forward] [--all]
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from typing import NamedTuple


def use_one_core(core: int) -> None:
    """One thread for all libraries, on one core; before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()
    if core >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sizes", nargs="+", default=["64,2,32", "256,32,64", "1024,64,128"], help="batch,D,H")
    parser.add_argument("--libraries", nargs="+", default=["torchdiffeq", "skode", "torchode", "diffrax"])
    parser.add_argument("--methods", nargs="+", default=["tsit5", "dopri5"], help="skode's")
    parser.add_argument("--gain", type=float, default=1.0, help="of the weights; 2: twice as many steps")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core to stay on; -1: any")
    for name in TABLES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--all", action="store_true", help="all tables")
    return parser.parse_args()


TABLES = ("train", "variants", "forward", "operations", "gemm-floor", "times")

if __name__ == "__main__":
    OPTIONS = parse()  # help is given, and the threads are set, before anything is imported
    use_one_core(OPTIONS.core)

import numpy as np
import solver_contestants as peers
import solver_counts as counts
import torch
from solver_cases import Case, Inputs, case_of, draw, variants
from solver_classifier import classifier_contestants

REFERENCE = "torchdiffeq odeint_adjoint"
N_WARM = 1  # untimed rounds, beside the first call
MOST_ROUNDS = 9  # of a variant


class Timing(NamedTuple):
    """Seconds of all rounds (rounds,), and of the first call."""

    wall: np.ndarray
    cpu: np.ndarray
    first: float


def timed(contestant: peers.Contestant, inputs: Inputs) -> tuple[float, float]:
    """Wall and processor seconds of one step."""
    contestant.load(inputs)
    wall, cpu = time.perf_counter(), time.process_time()
    contestant.step()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(contestants: list[peers.Contestant], draws: Sequence[Inputs], rounds: int) -> dict[str, Timing]:
    """Time all contestants in turn, round after round; each round begins with another one.

    One that cannot make a step is named and leaves the list.
    """
    first: dict[str, float] = {}
    for contestant in list(contestants):
        try:
            first[contestant.name] = timed(contestant, draws[0])[0]
        except Exception as error:
            print(f"({contestant.name} is left out: {type(error).__name__}: {str(error).splitlines()[0][:200]})")
            contestants.remove(contestant)
    for i in range(N_WARM):
        for contestant in contestants:
            timed(contestant, draws[i % len(draws)])
    seconds: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contestants}
    gc.collect()
    gc.disable()
    for i in range(rounds):
        for k in range(len(contestants)):
            contestant = contestants[(i + k) % len(contestants)]
            seconds[contestant.name].append(timed(contestant, draws[i % len(draws)]))
        gc.collect()
    gc.enable()
    return {
        name: Timing(*np.array(values).T, first[name])  # type: ignore[misc]
        for name, values in seconds.items()
    }


def speed_up(base: np.ndarray, own: np.ndarray) -> str:
    """Median, and 10th and 90th percentile, of the rounds' ratios."""
    low, middle, high = np.percentile(base / own, [10, 50, 90])
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def accuracies(case: Case, contestants: Sequence[peers.Contestant], draws: Sequence[Inputs]) -> dict[str, list[float]]:
    """State error, gradient error (largest over the draws), evaluations forward and backward (mean)."""
    rows: dict[str, list[list[float]]] = {c.name: [] for c in contestants}
    for inputs in draws:
        true = peers.reference(case, inputs)
        for contestant in contestants:
            contestant.load(inputs)
            own = contestant.outcome()
            gradient = peers.gradient_error(own, true) if own.gradients else np.nan
            backward = np.nan if own.backward is None else own.backward
            rows[contestant.name].append([peers.state_error(own, true), gradient, own.forward, backward])
    return {
        name: [*np.max(values, axis=0)[:2].tolist(), *np.mean(values, axis=0)[2:].tolist()]
        for name, values in rows.items()
    }


def title(case: Case) -> str:
    """Of a table."""
    return f"(batch, D, H) = ({case.batch}, {case.n_dims}, {case.hidden[0] if case.hidden else 0})"


def draws_of(case: Case, rounds: int) -> list[Inputs]:
    """Fresh arrays for every round, made beforehand."""
    return [draw(case, seed) for seed in range(rounds)]


def speed_table(case: Case, options: argparse.Namespace, train: bool) -> None:
    """Race, check, and print one size."""
    contestants = peers.contestants(case, options.libraries, train)
    draws = draws_of(case, options.rounds)
    timings = race(contestants, draws, options.rounds)
    checks = accuracies(case, contestants, draws[:3])
    reference = REFERENCE if train else "torchdiffeq odeint"
    reference = reference if reference in timings else contestants[0].name
    base, base_error = timings[reference], checks[reference][0]
    print(f"\n### {'train step' if train else 'forward solve'}, {title(case)}: speed-up over {reference}\n")
    print(
        "| | speed-up, CPU (p10-p90) | speed-up, wall (p10-p90) | CPU ms | wall ms | first call s | gradient error "
        "| state error | over the reference's | evaluations forward | backward |"
    )
    print("|---" * 11 + "|")
    for name, timing in timings.items():
        state, gradient, forward, backward = checks[name]
        print(
            f"| {name} | {speed_up(base.cpu, timing.cpu)} | {speed_up(base.wall, timing.wall)} "
            f"| {1e3 * np.median(timing.cpu):.2f} | {1e3 * np.median(timing.wall):.2f} | {timing.first:.2f} "
            f"| {gradient:.1e} | {state:.1e} | {state / base_error:.2f} | {forward:.1f} | {backward:.1f} |",
            flush=True,
        )


# --- variants ---------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """Median speed-up by processor time, gradient error, and state error over the reference's."""

    speed_up: float
    gradient: float
    state: float


def scores(case: Case, options: argparse.Namespace, base: bool) -> dict[str, Score]:
    """All contestants on one variant; the base case has the user's module, too."""
    contestants = peers.contestants(case, options.libraries, every=False)
    if base:
        contestants += peers.skode_with_users_module(case)
    rounds = min(options.rounds, MOST_ROUNDS if len(case.times) == 2 else MOST_ROUNDS // 3)
    draws = draws_of(case, rounds)
    timings = race(contestants, draws, rounds)
    checks = accuracies(case, contestants, draws[:1])
    reference = REFERENCE if REFERENCE in timings else contestants[0].name
    return {
        name: Score(
            float(np.median(timings[reference].cpu / own.cpu)),
            checks[name][1],
            checks[name][0] / checks[reference][0],
        )
        for name, own in timings.items()
    }


def variant_table(case: Case, options: argparse.Namespace) -> None:
    """Print one size's variants."""
    base = scores(case, options, base=True)
    columns = [name for name in base if name != REFERENCE and not name.startswith("user's")]
    print(f"\n### variants, {title(case)}: speed-up over {REFERENCE} (share of the base case's)\n")
    print(f"| | {' | '.join(columns)} | skode's gradient errors | state errors over the reference's |")
    print("|---" * (len(columns) + 3) + "|")
    print_variant("base", base, base, columns)
    for name, variant in variants(case).items():
        print_variant(name, scores(variant, options, base=False), base, columns)
    for name, score in base.items():
        if name.startswith("user's"):
            print(f"| {name} | {score.speed_up:.1f} | gradient {score.gradient:.1e}, state {score.state:.2f} |")


def print_variant(name: str, row: dict[str, Score], base: dict[str, Score], columns: list[str]) -> None:
    """One row; a contestant may be missing in it."""
    kept = [(key, row[key]) for key in columns if key in row]
    shares = {key: f"{s.speed_up:.1f} ({100 * s.speed_up / base[key].speed_up:.0f} %)" for key, s in kept}
    ours = [score for key, score in kept if key.startswith("skode")]
    errors = " / ".join(f"{score.gradient:.1e}" for score in ours)
    states = " / ".join(f"{score.state:.2f}" for score in ours)
    print(f"| {name} | {' | '.join(shares.get(key, '') for key in columns)} | {errors} | {states} |", flush=True)


def classifier_table(options: argparse.Namespace) -> None:
    """The solve inside ODENetClassifier's default train step."""
    contestants, what, draws = classifier_contestants(options.rounds)
    timings = race(contestants, draws, options.rounds)
    print(f"\n### the solve in ODENetClassifier's default train step\n\n{what}\n")
    print("| | CPU ms | speed-up of skode, CPU | wall |\n|---|---|---|---|")
    own = timings["skode"]
    for name, timing in timings.items():
        print(
            f"| {name} | {1e3 * np.median(timing.cpu):.2f} | {speed_up(timing.cpu, own.cpu)} "
            f"| {speed_up(timing.wall, own.wall)} |"
        )


def size(text: str) -> tuple[int, int, int]:
    """A (batch, D, H) from the command line."""
    batch, n_dims, width = (int(part) for part in text.split(","))
    return batch, n_dims, width


def main(options: argparse.Namespace) -> None:
    """Print the tables that are asked for; the train step's if none is."""
    torch.set_num_threads(1)
    chosen = [name for name in TABLES if options.all or getattr(options, name.replace("-", "_"))] or ["train"]
    peers.SKODE_METHODS = tuple(options.methods)
    cases = [case_of(size(text), options.gain) for text in options.sizes]
    for name in chosen:
        for case in cases:
            if name in ("train", "forward"):
                speed_table(case, options, train=name == "train")
            elif name == "variants":
                variant_table(case, options)
            elif name == "gemm-floor":
                counts.gemm_table(case, options.rounds)
            elif name == "operations":
                counts.operation_table(case, options.libraries)
        if name == "variants":
            classifier_table(options)
        elif name == "times":
            counts.own_times_table(options.rounds, options.libraries)
            counts.output_times_table(options.libraries)


if __name__ == "__main__":
    main(OPTIONS)
