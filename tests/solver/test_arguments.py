"""What solve takes for its arguments, and what it refuses, by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skode.exceptions import FieldError
from skode.solver import solve
from tests.problems import column, decay, rows

NAN = math.nan


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


# --- what is refused ---


WRONG_ARGUMENTS: dict[str, tuple[dict[str, object], str]] = {
    "method": ({"method": "dopri9"}, "method='dopri9' is unknown"),
    "gradient": ({"gradient": "backprop"}, "gradient='backprop' is unknown; use one of 'discrete', 'adjoint'"),
    "control": ({"step_control": "column"}, "step_control='column' is unknown"),
    "negative rtol": ({"rtol": -1e-3}, "rtol=-0.001 must be finite and not negative"),
    "nan atol": ({"atol": NAN}, "atol=nan must be finite"),
    "no tolerance": ({"rtol": 0, "atol": 0}, "rtol and atol are both 0"),
    "step size of an adaptive method": ({"step_size": 0.1}, "goes with fixed-step methods; 'tsit5' adapts"),
    "zero step size": ({"method": "rk4", "step_size": 0.0}, "step_size=0.0 must be positive"),
    "negative step size": ({"method": "rk4", "step_size": -0.1}, "step_size=-0.1 must be positive"),
    "first step": ({"first_step": 0}, "first_step=0 must be positive"),
    "negative first step": ({"first_step": -1.0}, "first_step=-1.0 must be finite and not negative"),
    "no steps": ({"max_num_steps": 0}, "max_num_steps=0 must be positive"),
    "error of the adjoint": ({"error_estimate": True, "gradient": "adjoint"}, "needs gradient='discrete'"),
    "error of fixed steps": ({"error_estimate": True, "method": "rk4"}, "and an adaptive method"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_refused_with_its_name(case: str) -> None:
    options, message = WRONG_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        solve(decay, column(1.0, 2.0), [0.0, 1.0], **options)  # type: ignore[arg-type]


WRONG_TIMES: dict[str, tuple[object, str]] = {
    "not monotone": ([0.0, 2.0, 1.0], "must be ascending or descending"),
    "not monotone in a row": (rows((0.0, 1.0, 2.0), (0.0, 2.0, 1.0)), r"row 1 has \[0\.0, 2\.0, 1\.0\]"),
    "shared nan": ([0.0, NAN], "must be finite where it is shared"),
    "shared infinity": ([0.0, math.inf], "must be finite"),
    "infinity": (rows((0.0, 1.0), (0.0, math.inf)), "infinite time"),
    "nan first": (rows((0.0, 1.0), (NAN, 1.0)), "NaN in t may only pad the end"),
    "nan between": (rows((0.0, 1.0, 2.0), (0.0, NAN, 1.0)), "NaN in t may only pad the end"),
    "other number of rows": (rows((0.0, 1.0)), r"t must have shape \(m,\) or \(2, m\) for y0 of shape \(2, 1\)"),
    "no times": ([], "t must have shape"),
    "a number": (torch.tensor(1.0), "t must have shape"),
    "three axes": (torch.zeros(2, 1, 1), "t must have shape"),
}


@pytest.mark.parametrize("case", WRONG_TIMES)
def test_wrong_times_are_refused(case: str) -> None:
    t, message = WRONG_TIMES[case]
    with pytest.raises(ValueError, match=message):
        solve(decay, column(1.0, 2.0), t)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y0", "message"),
    [
        ([[1.0]], "y0 must be a tensor"),
        (torch.ones(3), r"y0 must have shape \(n, d\); got \(3,\)"),
        (torch.ones(3, 1, dtype=torch.int64), "y0 must be float32 or float64; got torch.int64"),
        (torch.ones(3, 1, dtype=torch.float16), "y0 must be float32 or float64"),
    ],
)
def test_a_wrong_state_is_refused(y0: object, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        solve(decay, y0, [0.0, 1.0])  # type: ignore[arg-type]
