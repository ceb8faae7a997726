"""What a solve keeps, and for how long."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from skode.fields import MLPField
from skode.solver import arena, solve


@pytest.mark.parametrize("step_control", ["row", "batch"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
def test_a_solves_record_dies_with_its_outputs(step_control, gradient):
    field = MLPField(2, (4,), generator=torch.Generator().manual_seed(0))
    solution = solve(field, torch.ones(3, 2), [0.0, 0.5, 1.0], step_control=step_control, gradient=gradient)
    record = weakref.ref(solution.y.grad_fn.problem)
    assert record() is not None
    gc.disable()
    try:
        del solution
        assert record() is None
    finally:
        gc.enable()


def test_beyond_its_budget_the_exact_gradient_keeps_no_tapes_and_stays_the_same():
    field = MLPField(2, (4,), generator=torch.Generator().manual_seed(0)).double()
    y0 = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2)
    gradients, tapes = [], []
    for budget in (2**28, 0):
        solution = solve(field, y0, [0.0, 2.0], step_control="batch", rtol=1e-6, memory_budget=budget)
        tapes.append([step.block for step in solution.y.grad_fn.run.record.steps])
        gradients.append(torch.autograd.grad(solution.y1.square().sum(), list(field.parameters())))
    assert None not in tapes[0] and set(tapes[1]) == {None}
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-12, atol=1e-14)


def test_the_adjoint_keeps_no_steps_however_many_there_are():
    field = MLPField(2, (4,), generator=torch.Generator().manual_seed(0)).double()
    y0 = torch.ones(3, 2, dtype=torch.float64)
    for rtol in (1e-3, 1e-12):
        solution = solve(field, y0, [0.0, 5.0], gradient="adjoint", rtol=rtol, atol=rtol)
        assert not solution.y.grad_fn.run.record.steps
    assert int(solution.n_steps.min()) > 50


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors made inside of it for as long as anything holds them, a graph for instance."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= n_bytes

        self._known[key] = weakref.ref(storage, gone)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def test_living_memory_is_counted_as_long_as_a_graph_holds_it() -> None:
    with LiveBytes() as live:
        x = torch.ones(100, requires_grad=True)
        y = x.exp().sin()
        assert live.now == 3 * 400  # the graph holds the exponentials
        del y
        assert live.now == 400
    assert live.peak == 3 * 400


def of_network() -> Callable[[Tensor, Tensor], Tensor]:
    return MLPField(2, (8,), time_dependent=True, generator=torch.Generator().manual_seed(0))


def of_function() -> Callable[[Tensor, Tensor], Tensor]:
    weights = (0.3 * torch.randn(2, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
    return lambda t, y: torch.tanh(y @ weights) - t * y


def bytes_of_lengths(record: Any) -> int:
    """What tells when the steps were and whose: a few numbers a row and step, none where rows share them."""
    parts = (x for step in record.steps for x in (step.h, step.accept, *step.span) if isinstance(x, Tensor))
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in parts}.values())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(y) - t


def n_parameters(field: Any) -> int:
    return sum(p.numel() for p in field.parameters()) if isinstance(field, nn.Module) else 4


@pytest.mark.parametrize("make", [of_network, of_function, Wide])
@pytest.mark.parametrize("step_control", ["row", "batch"])
@pytest.mark.parametrize(
    ("budget", "n_rows", "n_steps"),
    [(2**16, 4, 10), (2**16, 4, 100), (2**16, 4, 1000), (2**20, 64, 200), (2**24, 1024, 200)],
)
@pytest.mark.parametrize("n_outputs", [2, 40])
def test_the_exact_gradient_keeps_within_its_budget(
    make: Any,
    step_control: str,
    budget: int,
    n_rows: int,
    n_steps: int,
    n_outputs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena, "POOL_BYTES", 0)  # what is handed back is let go, and so not counted
    field, options = make(), {"method": "midpoint", "step_size": 1 / n_steps, "step_control": step_control}
    y0 = torch.randn(n_rows, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with LiveBytes() as live:
        t = torch.linspace(0, 1, n_outputs, dtype=torch.float64)
        solution = solve(field, y0, t, memory_budget=budget, **options)
        assert solution.n_steps.tolist() == [n_steps] * n_rows
        lengths = bytes_of_lengths(solution.y.grad_fn.run.record)
        loss = solution.y.square().sum()
        del solution
        # The outputs, the loss's part of the graph, the parameters' gradients, and the table of steps where outputs are
        # looked up are no part of the record.
        apart = 8 * y0.nbytes * n_outputs + 4 * n_parameters(field) * y0.element_size()
        apart += 5 * 8 * n_rows * n_steps if n_outputs > 2 or step_control == "row" else 0
        assert 0 < live.now - lengths <= budget + apart
        loss.backward()
    # For a moment stages and the states that take their place are held both.
    assert live.peak - lengths <= 1.25 * budget + apart


@pytest.mark.parametrize("step_control", ["row", "batch"])
def test_a_budget_too_small_for_any_record_is_exceeded_as_little_as_can_be(
    step_control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "POOL_BYTES", 0)
    field, n_steps, peaks = of_network(), 300, []
    y0 = torch.randn(256, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    # A state has 2 KiB, a step 36 KiB: the states of all steps 600 KiB; with every fourth of them, and four steps
    # computed again, it is half as much.
    for budget in (1, 2**16, 2**24):
        with LiveBytes() as live:
            options = {"method": "midpoint", "step_size": 1 / n_steps, "step_control": step_control}
            solution = solve(field, y0, [0.0, 1.0], memory_budget=budget, **options)
            lengths = bytes_of_lengths(solution.y.grad_fn.run.record)
            solution.y.square().sum().backward()
        peaks.append(live.peak - lengths)
        del solution
    assert max(peaks[:2]) < 450 * 1024 < 5 * 2**20 < peaks[2]


class Checkpointed(nn.Module):
    """Keeps its input alone, and computes the rest again when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Wide().double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return checkpoint(self.inner, t, y, use_reentrant=False)


class Conservative(nn.Module):
    """The slope of a potential, by a transform inside of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -torch.func.grad(lambda y: (self.rate * y.square()).sin().sum())(y)


@pytest.mark.parametrize("make", [Checkpointed, Conservative])
def test_graphs_of_any_kind_are_measured_and_differentiated(make: Callable[[], nn.Module]) -> None:
    field, found = make(), []
    for budget in (2**28, 0):
        y0 = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2).requires_grad_()
        solution = solve(field, y0, [0.0, 1.0], memory_budget=budget, rtol=1e-6, atol=1e-6)
        found.append(torch.autograd.grad(solution.y1.square().sum(), [y0, *field.parameters()]))
    for kept, computed_again in zip(*found, strict=True):
        assert float(kept.abs().max()) > 0
        torch.testing.assert_close(kept, computed_again, rtol=1e-12, atol=1e-14)
