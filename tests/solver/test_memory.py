"""What a solve keeps, and for how long."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from skode.fields import MLPField
from skode.solver import solve


@pytest.mark.parametrize("step_control", ["row", "batch"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
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
