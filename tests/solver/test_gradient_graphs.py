"""What a solve's part of autograd's graph allows, notices and holds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.fields import MLPField
from skode.solver import METHODS, solve
from tests.problems import Plain, mlp_field, random_states, times
from tests.solver.gradient_helpers import assert_all_close, coarse, gradients_of, loss_of

EXPLICIT = [name for name, tableau in METHODS.items() if not tableau.implicit]

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_all_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])


# --- what autograd allows ---


@with_both_controls
@with_all_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_two_forwards_before_two_backwards(control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]) -> None:
    field = wrap(mlp_field())
    first, second = random_states(13, 3).requires_grad_(), random_states(14, 3).requires_grad_()

    def run(y0: Tensor) -> Tensor:
        return loss_of(solve(field, y0, [0.0, 0.4, 1.0], step_control=control, gradient=gradient).y)

    one_by_one = [gradients_of(run(y0), [y0, *field.parameters()]) for y0 in (first, second)]
    losses = [run(first), run(second)]
    for i in (0, 1):
        assert_all_close(
            gradients_of(losses[i], [(first, second)[i], *field.parameters()]), one_by_one[i], tolerance=0.0
        )


@with_both_controls
@with_all_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_a_retained_graph_gives_the_same_gradient_again(
    control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]
) -> None:
    field, y0 = wrap(mlp_field()), random_states(13, 3).requires_grad_()
    solution = solve(field, y0, [0.0, 0.4, 1.0], step_control=control, gradient=gradient)
    inputs = [y0, *field.parameters()]
    first, second = (torch.autograd.grad(loss_of(solution.y), inputs, retain_graph=True) for _ in range(2))
    assert_all_close(first, second, tolerance=0.0)


@with_both_controls
@with_all_gradients
@pytest.mark.parametrize("wrap", [lambda field: field, Plain])
def test_parameters_changed_in_place_before_backward_are_noticed(
    control: str, gradient: str, wrap: Callable[[MLPField], nn.Module]
) -> None:
    field = wrap(mlp_field())
    solution = solve(field, random_states(13, 3), [0.0, 0.4, 1.0], step_control=control, gradient=gradient)
    with torch.no_grad():
        next(iter(field.parameters())).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.y.sum().backward()


def gradients_after(change: Callable[[Tensor, Tensor], object], gradient: str, control: str) -> list[Tensor] | None:
    """Gradients to the parameters after states were changed in place; None where torch noticed the change."""
    field, y0 = mlp_field(), random_states(13, 3)
    solution = solve(field, y0, [0.0, 1.0], step_control=control, gradient=gradient)
    loss = solution.y1.sum()
    change(y0, solution.y)
    try:
        return gradients_of(loss, list(field.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@with_both_controls
@with_all_gradients
def test_states_changed_in_place_before_backward_never_change_the_gradient(control: str, gradient: str) -> None:
    expected = gradients_after(lambda y0, y: None, gradient, control)
    assert expected is not None
    changes: list[Callable[[Tensor, Tensor], object]] = [
        lambda y0, y: y0.mul_(3),
        lambda y0, y: y.detach().mul_(3),
    ]
    for change in changes:
        found = gradients_after(change, gradient, control)
        if found is not None:
            assert_all_close(found, expected, 1e-12)


@with_all_gradients
def test_only_what_requires_grad_gets_one(gradient: str) -> None:
    field, y0 = mlp_field(), random_states(13, 3)
    field.layers[0].requires_grad_(False)
    solve(field, y0, [0.0, 1.0], gradient=gradient).y.sum().backward()
    assert y0.grad is None
    assert [p.grad is not None for p in field.parameters()] == [False, False, True, True]
    frozen = mlp_field().requires_grad_(False)
    y0.requires_grad_()
    solve(frozen, y0, [0.0, 1.0], gradient=gradient).y.sum().backward()
    assert y0.grad is not None
    assert all(p.grad is None for p in frozen.parameters())


@with_both_controls
@with_all_gradients
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
def test_gradients_come_in_the_dtype_of_their_inputs(control: str, gradient: str, t_dtype: torch.dtype) -> None:
    field = MLPField(2, (4,), generator=torch.Generator().manual_seed(0))
    y0, t = torch.ones(3, 2, requires_grad=True), torch.tensor([0.0, 0.4, 1.0], dtype=t_dtype, requires_grad=True)
    solve(field, y0, t, step_control=control, gradient=gradient).y.sum().backward()
    assert y0.grad is not None and y0.grad.dtype == torch.float32
    assert t.grad is not None and t.grad.dtype == t_dtype
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in field.parameters())


# --- memory ---


@pytest.fixture
def fresh_heap() -> Iterator[None]:
    """Hides all older objects from the garbage collector, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def living_bytes() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def bytes_held(gradient: str, control: str, t: Tensor, tolerance: float) -> tuple[int, int]:
    """What a solve with gradients holds before its backward besides the steps' lengths, and its number of steps."""
    field, y0 = mlp_field(), random_states(15, 64).requires_grad_()
    before = living_bytes()
    solution = solve(field, y0, t, gradient=gradient, step_control=control, rtol=tolerance, atol=tolerance)
    assert solution._knots is not None
    return living_bytes() - before - solution._knots.nbytes, int(solution.n_steps.max())


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
@pytest.mark.parametrize("t", [times(0.0, 2.0), times(0.0, 1.0, 2.0), times(0.0, 2.0).requires_grad_()])
@pytest.mark.parametrize("gradient", ["adjoint", "reversible"])
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")
def test_the_memory_of_going_back_does_not_grow_with_the_steps(control: str, t: Tensor, gradient: str) -> None:
    few, few_steps = bytes_held(gradient, control, t, 1e-2)
    many, many_steps = bytes_held(gradient, control, t, 1e-10)
    assert many_steps > 5 * few_steps
    assert many < 1.5 * few


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
def test_the_memory_of_discrete_gradients_grows_with_the_steps(control: str) -> None:
    # The measure of the test above sees what is held.
    few, few_steps = bytes_held("discrete", control, times(0.0, 2.0), 1e-2)
    many, many_steps = bytes_held("discrete", control, times(0.0, 2.0), 1e-10)
    assert many - few >= (many_steps - few_steps) * 64 * 2 * 8


@pytest.mark.usefixtures("fresh_heap")
@with_both_controls
@with_all_gradients
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")
def test_nothing_outlives_a_solution(control: str, gradient: str) -> None:
    field, y0 = mlp_field(), random_states(15, 64)

    def use(t: list[float], backward: bool) -> None:
        y = solve(field, y0, t, gradient=gradient, step_control=control).y
        if backward:
            torch.autograd.grad(y.sum(), list(field.parameters()))

    use([0.0, 2.0], backward=True)
    before = living_bytes()
    for t in ([0.0, 2.0], [0.0, 1.0, 2.0]):
        for backward in (False, True):
            use(t, backward)
    assert living_bytes() - before < y0.numel() * 8


class Counted(MLPField):
    """Counts the evaluations whose tapes are kept."""

    n_linearized = 0

    def linearize(self, t: Tensor, y: Tensor) -> Any:
        self.n_linearized += 1
        return super().linearize(t, y)


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_small_memory_budget_ends_the_keeping_of_tapes(method: str) -> None:
    field = Counted(2, (4,), generator=torch.Generator().manual_seed(0)).double()
    y0, options = random_states(16, 3), coarse(method) | {"first_step": 0.1}
    kept, found, n_steps = {}, {}, 0
    for budget in (0, 1, 2**28):
        field.n_linearized = 0
        solution = solve(field, y0, [0.0, 2.0], method=method, step_control="batch", memory_budget=budget, **options)
        kept[budget], n_steps = field.n_linearized, int(solution.n_steps[0])
        found[budget] = gradients_of(loss_of(solution.y), list(field.parameters()))
    assert n_steps > 2
    n_stages = METHODS[method].n_stages
    assert kept[0] == 0
    assert 0 < kept[1] <= n_stages + int(solution.n_rejected[0]) * n_stages
    assert kept[2**28] >= n_steps * (n_stages - 1)
    assert_all_close(found[0], found[2**28], 1e-12)
    assert_all_close(found[1], found[2**28], 1e-12)
