"""What the solver benchmarks count rather than race: operations, matrix products, evaluations by output times.

Operations are those that reach torch's dispatcher below autograd (``TorchDispatchMode``). In inference mode composite
operations arrive there whole; they are taken apart, so that the numbers can be compared. Host synchronisations are
values that Python reads (``item``, ``bool``, ``float``, ``tolist``, ``numpy``) and operations whose output's size
depends on values (``nonzero`` and the like).
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from solver_cases import Array, Case, Inputs, Net, case_of, draw, mlp_field, set_weights
from solver_contestants import (
    Contestant,
    TorchContestant,
    contestants,
    count_evaluations,
    skode_solution,
    skode_solver,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "unique",
    "_unique2",
    "repeat_interleave",
}
STAGES = 6  # evaluations that a step of tsit5 or dopri5 costs
PULLS = ("pull", "vjp")


class Operations(TorchDispatchMode):
    """Counts operations and host synchronisations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.n_reads = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, or its parts."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.n += 1
        self.n_reads += function.overloadpacket.__name__ in READS
        return function(*args, **kwargs)


@contextlib.contextmanager
def counting() -> Iterator[Operations]:
    """``Operations`` that also notices whole tensors being read."""
    whole = ("tolist", "numpy")
    methods = {name: getattr(torch.Tensor, name) for name in whole}
    with Operations() as operations:

        def noticed(method: Callable[..., Any]) -> Callable[..., Any]:
            def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                operations.n_reads += tensor.dim() > 0  # a scalar's reading is an operation
                return method(tensor, *args, **kwargs)

            return read

        for name, method in methods.items():
            setattr(torch.Tensor, name, noticed(method))
        try:
            yield operations
        finally:
            for name, method in methods.items():
                setattr(torch.Tensor, name, method)


def counts_of(contestant: Contestant, inputs: Inputs) -> np.ndarray:
    """Operations, reads and evaluations forward of one step."""
    contestant.load(inputs)
    contestant.step()  # caches are filled
    n_evals = contestant.outcome().forward
    with counting() as operations:
        contestant.step()
    return np.array([operations.n, operations.n_reads, n_evals])


def field_operations(case: Case) -> dict[str, int]:
    """Operations of one evaluation of the field: skode's and the plain module."""
    t, y = torch.zeros(case.batch, 1), torch.zeros(case.batch, case.n_dims)
    found = {}
    for name, field in (("skode", mlp_field(case)), ("module", Net(case))):
        with torch.no_grad(), counting() as operations:
            field(t, y)
        found[name] = operations.n
    return found


def slopes(case: Case, train: bool, libraries: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, counts a step (difference of two lengths of interval), and counts of the whole shorter solve."""
    short, long = (replace(case, times=(0.0, end)) for end in (2.0, 12.0))
    pairs = zip(
        *(contestants(c, [name for name in libraries if name != "diffrax"], train, every=train) for c in (short, long)),
        strict=True,
    )
    for one, other in pairs:
        a, b = counts_of(one, draw(short, 0)), counts_of(other, draw(long, 0))
        yield one.name, (b - a)[:2] / ((b[2] - a[2]) / STAGES), a


def operation_table(case: Case, libraries: list[str]) -> None:
    """Print operations and reads a step, with and without the field's own."""
    own = field_operations(case)
    print(f"\n### operations of torch, (batch, D, H) = ({case.batch}, {case.n_dims}, {case.hidden[0]})\n")
    print(f"A step is {STAGES} evaluations; one evaluation is {own['skode']} operations (skode's field: without")
    print(f"gradients) or {own['module']} (the peers' module).\n")
    print("| | operations a step | less the field's | reads a step | whole solve (0 to 2): operations | reads |")
    print("|---" * 6 + "|")
    for train in (False, True):
        for name, slope, whole in slopes(case, train, libraries):
            kind = "train step" if train else "forward"
            less = slope[0] - STAGES * own["skode" if name.startswith("skode") else "module"]
            print(
                f"| {kind}: {name} | {slope[0]:.0f} | {'' if train else f'{less:.0f}'} | {slope[1]:.1f} "
                f"| {whole[0]:.0f} | {whole[1]:.0f} |",
                flush=True,
            )


# --- the floor of the matrix products ---------------------------------------------------------------------------


class Gemms:
    """The matrix products of evaluations: values, pull-backs and parameter gradients, into buffers made beforehand."""

    def __init__(self, case: Case) -> None:
        pairs = list(zip(case.sizes[:-1], case.sizes[1:], strict=True))
        self._weights = [torch.randn(n_out, n_in) for n_in, n_out in pairs]
        self._states = [torch.randn(case.batch, width) for width in case.sizes]
        self._values = [torch.empty(case.batch, n_out) for _, n_out in pairs]
        self._pulled = [torch.empty(case.batch, n_in) for n_in, _ in pairs]
        self._gradients = [torch.zeros_like(weight) for weight in self._weights]

    @torch.inference_mode()
    def run(self, n_evals: int) -> None:
        """All of them, back to back."""
        last = len(self._weights) - 1
        for _ in range(n_evals):
            for i, weight in enumerate(self._weights):
                torch.mm(self._states[i], weight.t(), out=self._values[i])
        for _ in range(n_evals):
            for i in range(last, -1, -1):
                torch.mm(self._states[i + 1], self._weights[i], out=self._pulled[i])
                self._gradients[i].addmm_(self._states[i + 1].t(), self._states[i])


def seconds(function: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


def gemm_table(case: Case, rounds: int) -> None:
    """Print skode's train step over the floor of its accepted steps' matrix products."""
    print(f"\n### matrix products alone, (batch, D, H) = ({case.batch}, {case.n_dims}, {case.hidden[0]})\n")
    print("| | steps | products ms | train step ms | over the products (p10-p90) |\n|---|---|---|---|---|")
    gemms = Gemms(case)
    for method in ("tsit5", "dopri5"):
        for control in ("batch", "row"):
            contestant = TorchContestant("skode", mlp_field(case), skode_solver(case, method, control))
            rows = []
            for i in range(rounds + 2):
                inputs = draw(case, i)
                contestant.load(inputs)
                n_steps = mean_steps(case, inputs, method, control)
                floor = seconds(lambda n=n_steps: gemms.run(round(STAGES * n) + 1))  # type: ignore[misc]
                rows.append([n_steps, floor, seconds(contestant.step)])
            n, floor_s, own_s = np.array(rows[2:]).T
            low, middle, high = np.percentile(own_s / floor_s, [10, 50, 90])
            print(
                f"| skode {method}, {control} | {n.mean():.1f} | {1e3 * np.median(floor_s):.2f} "
                f"| {1e3 * np.median(own_s):.2f} | {middle:.2f} ({low:.2f}-{high:.2f}) |",
                flush=True,
            )


def mean_steps(case: Case, inputs: Inputs, method: str, control: str) -> float:
    """Accepted steps, the rows' mean."""
    field = mlp_field(case)
    set_weights(field, inputs.weights)
    with torch.no_grad():
        solution = skode_solution(case, field, torch.from_numpy(inputs.y0), method, control)
    return float(solution.n_steps.double().mean())


# --- many output times ------------------------------------------------------------------------------------------


def own_times(n_rows: int, n_times: int) -> Array:
    """Sorted times of each row's own in (0, 2], float32, with 0 before them."""
    rng = np.random.default_rng(0)
    inner = np.sort(rng.uniform(0.02, 2.0, size=(n_rows, n_times)), axis=1).astype(np.float32)
    return np.concatenate([np.zeros((n_rows, 1), np.float32), inner], axis=1)


def own_times_contestants(case: Case, libraries: list[str]) -> dict[str, tuple[Contestant, str]]:
    """Contestants by name, each with the name of the endpoint solve that it is measured by."""
    times = own_times(case.batch, 10)
    found: dict[str, tuple[Contestant, str]] = {}
    for control in ("row", "batch"):
        end = f"skode, {control}, endpoint"
        found[end] = (TorchContestant(end, mlp_field(case), skode_solver(case, "tsit5", control)), end)
    name = "skode, row, 10 own times a row"
    found[name] = (_skode_own_times(case, times, name), "skode, row, endpoint")
    if "torchdiffeq" in libraries:
        with contextlib.suppress(ImportError):
            found |= _torchdiffeq_own_times(case, times)
    if "torchode" in libraries:
        with contextlib.suppress(ImportError):
            found |= _torchode_own_times(case, times)
    return found


def _skode_own_times(case: Case, times: Array, name: str) -> Contestant:
    from skode.solver import solve

    t = torch.from_numpy(times).double()

    def solve_with(field: Any, y0: Tensor) -> Tensor:
        return solve(field, y0, t, rtol=case.rtol, atol=case.atol).y[:, 1:].transpose(0, 1)

    return TorchContestant(name, mlp_field(case), solve_with)


def _torchdiffeq_own_times(case: Case, times: Array) -> dict[str, tuple[Contestant, str]]:
    """A solve over the union of all times, each row's own picked out."""
    import torchdiffeq

    union = torch.from_numpy(np.unique(times))
    place = torch.from_numpy(np.searchsorted(union.numpy(), times[:, 1:]))
    rows = torch.arange(len(times)).unsqueeze(1)
    found: dict[str, tuple[Contestant, str]] = {}
    for name in ("odeint", "odeint_adjoint"):
        solver = getattr(torchdiffeq, name)

        def over(t: Tensor, pick: bool, solver: Any = solver) -> Any:
            def solve_with(field: Any, y0: Tensor) -> Tensor:
                y = solver(field, y0, t, rtol=case.rtol, atol=case.atol, method="dopri5")
                return y[place, rows].transpose(0, 1) if pick else y[1:]

            return solve_with

        end, own = f"torchdiffeq {name}, endpoint", f"torchdiffeq {name}, union of times"
        found[end] = (TorchContestant(end, Net(case), over(torch.tensor(case.times), False)), end)
        found[own] = (TorchContestant(own, Net(case), over(union, True)), end)
    return found


def _torchode_own_times(case: Case, times: Array) -> dict[str, tuple[Contestant, str]]:
    import torchode

    t = torch.from_numpy(times)
    (end,) = contestants(case, ["torchode"], every=False)
    field = Net(case)
    term = torchode.ODETerm(field)
    controller = torchode.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Tsit5(term=term), controller, backprop_through_step_size_control=False)

    def solve_with(_: Any, y0: Tensor) -> Tensor:
        return solver.solve(torchode.InitialValueProblem(y0, t_eval=t)).ys[:, 1:].transpose(0, 1)

    name = "torchode AutoDiff, 10 own times a row"
    return {end.name: (end, end.name), name: (TorchContestant(name, field, solve_with), end.name)}


def own_times_table(rounds: int, libraries: list[str]) -> None:
    """Print the cost of 10 own times a row in solves to the end."""
    case = case_of((64, 2, 32))
    found = own_times_contestants(case, libraries)
    spent: dict[str, list[float]] = {name: [] for name in found}
    cotangents = np.random.default_rng(0).standard_normal((10, case.batch, case.n_dims)).astype(np.float32)
    gc.disable()
    for i in range(rounds + 1):
        inputs = draw(case, i)
        for name, (contestant, end) in found.items():
            if "union" in name and "adjoint" in name and i > 2:
                continue  # seconds a step
            contestant.load(inputs if end == name else inputs._replace(cotangent=cotangents))
            spent[name].append(seconds(contestant.step))
    gc.enable()
    print(f"\n### train step with 10 own times for each of 64 rows, D = {case.n_dims}, H = {case.hidden[0]}\n")
    print("| | CPU ms | endpoint solves of the same library (p10-p90) |\n|---|---|---|")
    for name, (_, end) in found.items():
        own = np.array(spent[name][1:])
        low, middle, high = np.percentile(own / np.array(spent[end][1 : len(own) + 1]), [10, 50, 90])
        print(f"| {name} | {1e3 * np.median(own):.1f} | {middle:.1f} ({low:.1f}-{high:.1f}) |")


def backward_counts(contestant: TorchContestant, field: Any, inputs: Inputs) -> list[float]:
    """Evaluations forward, evaluations backward, and pull-backs, a row."""
    contestant.load(inputs)
    pulls = count_evaluations(field, PULLS)
    with pulls:
        outcome = contestant.outcome()
    return [outcome.forward, outcome.backward or 0.0, pulls.rows / len(inputs.y0)]


def output_times_table(libraries: list[str]) -> None:
    """Print evaluations by the number of output times."""
    numbers = (2, 10, 50, 200, 1000)
    print("\n### evaluations a row by the number of output times: forward + backward (pull-backs), (64, 2, 32)\n")
    print("| |" + "".join(f" {m} |" for m in numbers) + "\n" + "|---" * (len(numbers) + 1) + "|")
    table: dict[str, list[str]] = {}
    for m in numbers:
        case = replace(case_of((64, 2, 32)), times=tuple(np.linspace(0.0, 2.0, m).tolist()))
        inputs = draw(case, 0)
        for name, contestant, field in _by_output_times(case, libraries):
            forward, backward, pulls = backward_counts(contestant, field, inputs)
            cell = f"{forward:.0f} + {backward:.0f}" + (f" ({pulls:.0f})" if pulls else "")
            table.setdefault(name, []).append(cell)
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |")


def _by_output_times(case: Case, libraries: list[str]) -> Iterator[tuple[str, TorchContestant, Any]]:
    for gradient in ("discrete", "adjoint"):
        for control in ("batch", "row"):
            field = mlp_field(case)
            name = f"skode {gradient}, {control}"
            yield name, TorchContestant(name, field, skode_solver(case, "tsit5", control, gradient)), field
    for contestant in contestants(case, [name for name in libraries if name == "torchdiffeq"], every=False):
        assert isinstance(contestant, TorchContestant)
        yield contestant.name, contestant, contestant.field
