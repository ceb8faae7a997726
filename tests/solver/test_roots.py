"""Roots in brackets: to the tolerance, row by row, and never much slower than bisection."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.solver.roots import far_ends

EPS = torch.finfo(torch.float64).eps
Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, tuple[Function, float]] = {
    "line": (lambda x: x - 0.3, 0.3),
    "cosine": (lambda x: torch.cos(4 * x), math.pi / 8),
    "falls and is flat": (lambda x: -((x - 0.2) ** 3), 0.2),
    "very flat": (lambda x: (x - 0.7) ** 9, 0.7),
    "step": (lambda x: torch.where(x < 0.6, -1.0, 1e-12).to(x.dtype), 0.6),
    "grows fast": (lambda x: torch.exp(40 * x) - math.exp(30), 0.75),
    "all but a step": (lambda x: torch.atan(1e6 * (x - 1 / 3)), 1 / 3),
    "huge": (lambda x: 1e300 * (x - 0.25), 0.25),
    "tiny": (lambda x: 1e-300 * (x - 0.125), 0.125),
    "NaN before the root": (lambda x: torch.where((x > 0.1) & (x < 0.2), torch.nan, x - 0.4), 0.4),
}


def solved(function: Function, a: Tensor, b: Tensor, tolerance: float = EPS) -> tuple[Tensor, int]:
    """The ends, and the number of evaluations."""
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return function(x)

    return far_ends(counted, a, b, function(a), function(b), tolerance), calls


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_brackets_close_on_the_root_from_behind(name: str) -> None:
    function, root = FUNCTIONS[name]
    end, calls = solved(function, points(0.0), points(1.0))
    exact = "flat" not in name
    assert abs(float(end) - root) < (4 * EPS if exact else 0.02)
    # The end lies where the sign has changed.
    assert float(function(end)) * float(function(points(1.0))) >= 0
    assert calls <= 55


@pytest.mark.parametrize("name", ["line", "cosine", "grows fast"])
def test_smooth_functions_take_far_fewer_evaluations_than_bisection(name: str) -> None:
    _, calls = solved(FUNCTIONS[name][0], points(0.0), points(1.0))
    assert calls <= 16


def test_every_row_has_a_root_of_its_own_whatever_the_others_are() -> None:
    roots = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    power = torch.arange(37) % 3 * 2 + 1
    sign = torch.where(torch.arange(37) % 2 == 0, 1.0, -1.0)

    def function(which: Tensor) -> Function:
        return lambda x: sign[which] * ((x - roots[which]) + (x - roots[which]) ** power[which])

    every = torch.arange(37)
    together, _ = solved(function(every), torch.zeros(37).double(), torch.ones(37).double())
    torch.testing.assert_close(together, roots, rtol=0, atol=1e-15)
    for i in range(0, 37, 5):
        alone, _ = solved(function(every[i : i + 1]), points(0.0), points(1.0))
        assert torch.equal(alone, together[i : i + 1])


def test_a_root_at_the_bracket_s_end_is_that_end_and_empty_brackets_stay() -> None:
    end, calls = solved(lambda x: x - 1, points(0.0, 1.0), points(1.0, 1.0))
    assert end.tolist() == [1.0, 1.0] and calls == 0


@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_the_tolerance_is_kept(tolerance: float) -> None:
    end, calls = solved(lambda x: torch.cos(4 * x), points(0.0), points(1.0), tolerance)
    assert 0 <= float(end) - math.pi / 8 <= 2 * tolerance
    assert calls <= math.ceil(math.log2(0.5 / tolerance)) + 2
