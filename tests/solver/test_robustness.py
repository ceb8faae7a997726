"""Where the field is called, what a failure says, and what threads and many solves leave behind."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skode import solver
from skode.solver import METHODS, Solution, Status, solve
from tests.problems import Field, Recorded, column, mlp_field, random_states, times

NAN = math.nan
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
EXPLICIT = [name for name in ADAPTIVE if not getattr(METHODS[name], "gamma", 0)]
IMPLICIT = [name for name in ADAPTIVE if name not in EXPLICIT]

on_all_methods = pytest.mark.parametrize("method", METHODS)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint"])


# --- the field is never called outside of the interval ---


def extremes(field: Recorded) -> tuple[float, float]:
    """First and last time of all calls."""
    called = torch.cat([t.flatten() for t in field.times])
    return float(called.min()), float(called.max())


def wobbly(t: Tensor, y: Tensor) -> Tensor:
    """Flat at first, so that the first probe is tempted to go far, then quick enough for rejections."""
    return torch.where((t - 0.6).abs() < 0.05, 1e-9, 8.0) * torch.cos(9 * t) - 0.1 * y


# What else a solve may be asked for; events and jumps lie inside of the last step.
EXTRAS: dict[str, Callable[[list[float]], dict[str, Any]]] = {
    "outputs": lambda t: {"dense_output": True},
    "long first step": lambda t: {"first_step": 50.0},
    "long steps": lambda t: {"min_step": 0.4, "max_step": 30.0},
    "jumps": lambda t: {"jump_times": [t[0], t[0] + 0.99 * (t[1] - t[0]), t[1], t[1] + 0.1, t[0] - 0.1]},
    "marks": lambda t: {"step_times": [t[0], t[0] + 0.01 * (t[1] - t[0]), t[1], t[1] + 0.1, t[0] - 0.1]},
}


@pytest.mark.parametrize(
    ("method", "extra"),
    [(method, extra) for method in METHODS for extra in EXTRAS if METHODS[method].adaptive or "step" not in extra],
)
@with_both_controls
@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, False), (torch.float64, True)])
def test_the_field_is_called_inside_of_the_interval_only(
    method: str, extra: str, control: str, dtype: torch.dtype, backward: bool
) -> None:
    ends = torch.rand(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for low, length in ends.tolist():
        t = [low - 0.5, low + length][:: -1 if backward else 1]
        field, options = Recorded(wobbly), EXTRAS[extra](t)
        y0 = torch.tensor([[1e4], [1.0]], dtype=dtype)
        solve(field, y0, t, method=method, step_control=control, rtol=1e-2, **options)
        first, last = (float(torch.tensor(end, dtype=dtype)) for end in sorted(t))
        assert first <= extremes(field)[0] and extremes(field)[1] <= last


@on_all_methods
@with_both_controls
@pytest.mark.parametrize("t", [[0.1, 0.7], [0.7, 0.1]])
@pytest.mark.parametrize("place", [0.001, 0.5, 0.999, 1.001])
def test_a_search_for_an_event_stays_inside_of_the_interval(
    method: str, control: str, t: list[float], place: float
) -> None:
    field, seen = Recorded(wobbly), Recorded(lambda s, y: s[:, 0] - (t[0] + place * (t[1] - t[0])))
    y0 = column(0.5, 2.0)
    solution = solve(field, y0, t, method=method, step_control=control, events=solver.Event(seen), rtol=1e-2)
    assert solution.status.tolist() == [Status.EVENT if place < 1 else Status.SUCCESS] * 2
    for called in (field, seen):
        assert extremes(called)[0] >= 0.1 and extremes(called)[1] <= 0.7


# --- what a failure says ---


def late_nan(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t > 0.5, NAN, -y)


def blow_up(t: Tensor, y: Tensor) -> Tensor:
    return y * y


def restless(t: Tensor, y: Tensor) -> Tensor:
    return 400 * torch.cos(400 * t) + 0 * y


FAILURES: dict[str, tuple[Field, set[str], dict[str, Any]]] = {
    "nan": (late_nan, {"NON_FINITE"}, {}),
    "blow-up": (blow_up, {"STEP_UNDERFLOW", "NON_FINITE", "NO_CONVERGENCE"}, {}),
    "too many steps": (restless, {"MAX_STEPS"}, {"max_num_steps": 40}),
}
ARGUMENTS = {"y0", "t", "rtol", "atol", "max_num_steps", "min_step", "max_step", "first_step", "method", "jump_times"}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", ["tsit5", "dopri5", "bosh3", *IMPLICIT])
@with_both_controls
def test_a_failure_names_time_step_norm_and_two_arguments(failure: str, method: str, control: str) -> None:
    field, statuses, options = FAILURES[failure]
    y0 = column(2.0) if failure == "blow-up" else column(1.0)
    solution = solve(field, y0, [0.0, 3.0], method=method, step_control=control, **options)
    assert Status(int(solution.status)).name in statuses
    text = solution.failures()[0]
    place = re.search(r"\bt=([-\d.e+]+)", text)
    assert place and float(place[1]) == pytest.approx(float(solution.t_reached), rel=1e-3), text
    assert f"length {float(solution.last_step):.3g}" in text
    assert f"error of {float(solution.last_norm):.3g} tolerances" in text
    what, _, advice = text.partition("; ")
    assert what and len(ARGUMENTS & set(re.findall(r"\w+", advice))) >= 2, text


# --- threads ---


@with_both_controls
def test_eight_solves_in_a_thread_pool_equal_the_serial_ones(control: str) -> None:
    field, methods = mlp_field(), ["tsit5", "dopri5", "bosh3", "rk4"]

    def run(k: int) -> tuple[Tensor, ...]:
        t, y0 = [0.0, 0.3, 1.0 + 0.1 * k], random_states(40 + k, 2 + k)
        with torch.no_grad():
            found = solve(field, y0, t, method=methods[k % 4], step_control=control, dense_output=True)
        return found.y, found.n_evals, found.n_steps, found.evaluate(times(0.1, 0.7))

    serial = [run(k) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(run, [*range(8)] * 4))
    for own, other in zip(threaded, serial * 4, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_a_failure_in_one_thread_stays_there() -> None:
    field = mlp_field()

    def run(k: int) -> Solution:
        y0 = random_states(50 + k, 3)
        return solve(late_nan if k % 2 else field, y0, [0.0, 1.0])

    with ThreadPoolExecutor(8) as pool:
        solutions = list(pool.map(run, range(16)))
    assert [bool(solution.success) for solution in solutions] == [True, False] * 8


# --- leaks ---


@pytest.fixture(scope="module")
def fresh_heap() -> Iterator[None]:
    """Hides all older objects from the garbage collector, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_tensors() -> int:
    gc.collect()
    return sum(isinstance(x, Tensor) for x in gc.get_objects())


def resident_bytes() -> int:
    """Of this process; what only C++ holds is not seen by the garbage collector."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def forward_only(gradient: str, control: str) -> None:
    with torch.no_grad():
        solve(mlp_field(), random_states(1, 64), [0.0, 0.5, 1.0], step_control=control, dense_output=True)


def forward_without_backward(gradient: str, control: str) -> None:
    solve(mlp_field(), random_states(1, 64), [0.0, 0.5, 1.0], gradient=gradient, step_control=control)


def train_step(gradient: str, control: str) -> None:
    y0 = random_states(1, 64).requires_grad_()
    y = solve(mlp_field(), y0, [0.0, 0.5, 1.0], gradient=gradient, step_control=control).y
    y.square().sum().backward()


def interrupted(gradient: str, control: str) -> None:
    """The field raises in the middle of a solve."""
    inner, calls = mlp_field(), []

    def field(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 20:
            raise KeyError("enough")
        return inner(t, y)

    y0 = random_states(1, 64).requires_grad_()
    with pytest.raises(KeyError, match="enough"):
        solve(field, y0, [0.0, 5.0], gradient=gradient, step_control=control)


USES = [forward_only, forward_without_backward, train_step, interrupted]


@pytest.mark.usefixtures("fresh_heap")
@pytest.mark.parametrize("use", USES)
@with_both_gradients
@with_both_controls
def test_fifty_solves_leave_no_tensor(use: Callable[[str, str], None], gradient: str, control: str) -> None:
    for _ in range(3):
        use(gradient, control)
    before = living_tensors()
    for _ in range(50):
        use(gradient, control)
    assert living_tensors() <= before + 5


@pytest.mark.skipif(not resident_bytes(), reason="needs /proc")
@with_both_controls
def test_two_hundred_solves_leave_no_memory(control: str) -> None:
    field = mlp_field(0, 32, (64,))

    def use() -> None:
        y0 = random_states(1, 256, 32).requires_grad_()
        y = solve(field, y0, [0.0, 0.2], step_control=control, first_step=0.1).y
        torch.autograd.grad(y.sum(), [y0, *field.parameters()])

    for _ in range(10):
        use()
    before = resident_bytes()
    for _ in range(200):
        use()
    # Each solve records more than 1 MB; a leak would be above 200 MB.
    assert resident_bytes() - before < 50 * 2**20
