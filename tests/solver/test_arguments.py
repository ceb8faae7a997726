"""What solve takes for times and tolerances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skode.solver import solve


@pytest.mark.parametrize("step_control", ["row", "batch"])
def test_times_may_be_an_array_a_list_or_a_tensor(step_control):
    y0 = torch.ones(2, 1, dtype=torch.float64)
    times = np.array([0.0, 0.5, 1.0])
    times.setflags(write=False)
    found = [
        solve(lambda t, y: -y, y0, t, step_control=step_control).y
        for t in (times.copy(), times.tolist(), tuple(times), torch.tensor(times.tolist(), dtype=torch.float64))
    ]
    assert all(torch.equal(y, found[0]) for y in found)


def test_times_of_each_row_may_be_an_array():
    y0 = torch.ones(2, 1, dtype=torch.float64)
    solution = solve(lambda t, y: -y, y0, np.array([[0.0, 1.0], [0.0, 2.0]]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.y1, torch.exp(torch.tensor([[-1.0], [-2.0]], dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_control", ["row", "batch"])
def test_a_state_of_zero_is_solved_without_an_absolute_tolerance(dtype, step_control):
    y0 = torch.tensor([[0.0], [1.0]], dtype=dtype)
    solution = solve(lambda t, y: -y, y0, [0.0, 1.0], rtol=1e-3, atol=0.0, step_control=step_control)
    assert solution.success
    assert solution.y1[0] == 0 and abs(solution.y1[1] - np.exp(-1)) < 1e-3
