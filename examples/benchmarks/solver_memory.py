"""How much memory does a train step hold and need, by its number of steps and the way it is differentiated?

A solve of an MLP field (16-32-16, 64 rows, float32) from t = 0 to 2 in 10 to 10,000 equal steps (tsit5 with
``max_step``), by each gradient, control and byte budget. Told for every case:

- saved: bytes of all tensors made by the forward solve that are still alive when only the loss is kept: every storage
  that an operation returned is followed by a weak reference, whoever holds it (saved tensors, Python objects, caches);
  memory that the solver keeps ready for the next solve (its pool, at most 128 MiB) is not among it;
- steps: the part of it that tells when each row's steps were and whose: none where rows share their steps;
- Python: bytes that Python and NumPy hold more than before the solve (``tracemalloc``, up to 1,000 steps), for one the
  record of steps as plain floats;
- peak: the process's largest resident size through forward and backward beyond what imports and a small train step
  needed, the pool included.

Every measurement is a process of its own. Apart from the steps, ``adjoint`` and ``reversible`` are to stay flat within
5 % and ``discrete`` within its budget; the last lines tell both.

    python examples/benchmarks/solver_memory.py [--steps 10 100 1000 10000] [--budgets 1048576 ...] [--peak-only]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import sys
import tracemalloc
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before torch is imported

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skode.fields import MLPField
from skode.solver import Solution, arena, solve

SPAN = 2.0
N_ROWS, N_DIMS, WIDTH = 64, 16, 32
MOST_TRACED_STEPS = 1000  # tracemalloc makes Python several times slower
Case = dict[str, Any]


class Follow(TorchDispatchMode):
    """Follows every storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[Any, int]] = {}
        self._next_look = 4096

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what it returned."""
        result = function(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if len(self._alive) > self._next_look:
            self._forget()
            self._next_look = 2 * len(self._alive) + 4096
        return result

    def _forget(self) -> None:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}

    def close(self) -> int:
        """The bytes of all that still live; the notes are thrown away."""
        self._forget()
        total = sum(size for _, size in self._alive.values())
        self._alive = {}
        return total


# --- in a process of its own ------------------------------------------------------------------------------------


def loss_of(case: Case, n_steps: int, field: MLPField, y0: Tensor) -> tuple[Tensor, int, int]:
    """A scalar through the solve, the number of steps taken, and bytes of when they were; nothing else is kept."""
    options: dict[str, Any] = {
        "max_num_steps": 10**6,
        "gradient": case["gradient"],
        "step_control": case["control"],
    }
    options |= {"method": "tsit5", "max_step": SPAN / n_steps, "rtol": 1e-2, "atol": 1e-2}
    if case["budget"] is not None:
        options["memory_budget"] = case["budget"]
    solution = solve(field, y0, [0.0, SPAN], **options)
    return solution.y1.square().sum(), int(solution.n_steps.max()), bytes_of_times(solution)


def bytes_of_times(solution: Solution) -> int:
    """What the record holds to tell each row's steps."""
    run = solution.y.grad_fn.run  # type: ignore[union-attr]
    spans = [x for step in run.record.steps for x in (*step.span, step.h, step.accept)]
    parts = [x for x in (*spans, *(x for span in run.knots._spans for x in span)) if isinstance(x, Tensor)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in parts}.values())


def peak() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(case: Case, n_steps: int, field: MLPField, y0: Tensor) -> Case:
    """What forward and backward need beyond a small train step."""
    base = peak()
    loss, taken, _ = loss_of(case, n_steps, field, y0)
    loss.backward()
    return {"peak": peak() - base, "steps": taken}


def saved_bytes(case: Case, n_steps: int, field: MLPField, y0: Tensor) -> Case:
    """What the graph of the loss holds."""
    arena.POOL_BYTES = 0
    with Follow():
        loss_of(case, 3, field, y0[:2])  # torch imports much when a dispatch mode is first used
    traced = n_steps <= MOST_TRACED_STEPS
    if traced:
        tracemalloc.start()
    with Follow() as follow:
        loss, _, times = loss_of(case, n_steps, field, y0)
    gc.collect()
    saved = follow.close()
    assert loss.requires_grad
    return {"saved": saved, "times": times, "python": tracemalloc.get_traced_memory()[0] if traced else None}


MEASURES = {"peak": peak_bytes, "saved": saved_bytes}


def child(send: Any, what: str, case: Case, n_steps: int) -> None:
    """One measurement, after a small train step that fills caches."""
    generator = torch.Generator().manual_seed(0)
    field = MLPField(N_DIMS, (WIDTH,), time_dependent=False, generator=generator)
    y0 = torch.randn(N_ROWS, N_DIMS, generator=generator).requires_grad_()
    try:
        loss_of(case, 3, field, y0[:2])[0].backward()
        gc.collect()
        send.send(MEASURES[what](case, n_steps, field, y0))
    except ValueError as error:
        send.send({"error": str(error)})


# --- in the parent, which never solves: a child inherits its resident size --------------------------------------


def measure(what: str, case: Case, n_steps: int) -> Case:
    """Run a measurement in a process of its own."""
    context = multiprocessing.get_context("fork")  # one import of torch serves them all
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send, what, case, n_steps))
    process.start()
    send.close()
    try:
        result: Case = receive.recv()
    except EOFError:
        result = {"error": "the process died"}
    process.join()
    return result


def cases(budgets: list[int]) -> list[Case]:
    """All gradients, controls and budgets."""
    found: list[Case] = []
    for control in ("batch", "row"):
        found += [{"gradient": name, "control": control, "budget": None} for name in ("adjoint", "reversible")]
        found += [{"gradient": "discrete", "control": control, "budget": budget} for budget in budgets]
    return found


def name_of(case: Case) -> str:
    """A case in words."""
    budget = "" if case["budget"] is None else f", {case['budget'] / 2**20:g} MiB"
    return f"{case['gradient']}, {case['control']}{budget}"


def row_of(case: Case, n_steps: int, peak_only: bool) -> Case:
    """Measure one case with one number of steps, and print the row."""
    row = measure("peak", case, n_steps)
    if not peak_only and "error" not in row:
        row |= measure("saved", case, n_steps)
    if "error" in row:
        print(f"| {name_of(case)} | {n_steps} | skipped: {row['error']} | | | | |", flush=True)
        return row
    cells = ["" if row.get(key) is None else f"{row[key] / 1024:,.0f}" for key in ("saved", "times", "python", "peak")]
    share = ""
    if "saved" in row and case["budget"] is not None:
        share = f"{(row['saved'] - row['times']) / case['budget']:.2f}"
    print(f"| {name_of(case)} | {row['steps']} | {' | '.join(cells)} | {share} |", flush=True)
    return row


def verdict(case: Case, rows: list[Case]) -> list[str]:
    """What the rows of a case say."""
    saved = [row["saved"] - row["times"] for row in rows if "saved" in row]
    if not saved:
        return []
    if case["budget"] is None:
        return [f"{name_of(case)}: largest over smallest saved {max(saved) / min(saved):.3f} (aim: 1.05)"]
    return [f"{name_of(case)}: largest saved {max(saved) / case['budget']:.2f} of the budget (aim: 1)"]


def main() -> None:
    """Measure all cases and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--budgets", nargs="+", type=int, default=[2**20, 2**24, 2**28])
    parser.add_argument("--peak-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| gradient, control, budget | n steps | saved KiB | steps KiB | Python KiB | peak KiB | saved / budget |")
    print("|---" * 7 + "|")
    verdicts: list[str] = []
    for case in cases(options.budgets):
        rows: list[Case] = []
        for n_steps in options.steps:
            rows.append(row_of(case, n_steps, options.peak_only))
            if "error" in rows[-1]:
                break
        verdicts += verdict(case, rows)
    print("\n" + "\n".join(verdicts))


if __name__ == "__main__":
    main()
