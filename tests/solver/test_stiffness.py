"""Explicit methods that struggle with a stiff problem say so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.solver import METHODS, Solution, Status, solve
from skode.solver.stiffness import stability_limit
from tests.problems import Field, Recorded, column, rows
from tests.solver.stiff_problems import drawn_in, robertson, van_der_pol

IMPLICIT = [name for name, tableau in METHODS.items() if tableau.implicit]
EXPLICIT = [name for name, tableau in METHODS.items() if tableau.adaptive and not tableau.implicit]

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def few_steps(field: Field, y0: Tensor, t1: float, method: str, control: str = "row", rtol: float = 1e-3) -> Solution:
    solution = solve(
        field, y0, [0.0, t1], method=method, max_num_steps=150, step_control=control, rtol=rtol, atol=1e-4 * rtol
    )
    assert bool((solution.status == Status.MAX_STEPS).any())
    return solution


STIFF: dict[str, tuple[Field, tuple[float, ...], float]] = {
    "robertson": (robertson, (1.0, 0.0, 0.0), 1e4),
    "van der pol": (van_der_pol, (2.0, 0.0), 1000.0),
    "drawn in": (drawn_in(1e4), (0.3,), 100.0),
    "drawn in, backward": (lambda t, y: -drawn_in(1e4)(t, y), (0.3,), -100.0),
}
MERELY_LONG: dict[str, tuple[Field, tuple[float, ...], float]] = {
    "oscillator": (lambda t, y: torch.stack([y[:, 1], -y[:, 0]], dim=1), (1.0, 0.0), 3000.0),
    "growth": (lambda t, y: y, (1.0,), 700.0),
    "waves": (lambda t, y: torch.cos(7 * t) - 0.01 * y, (0.0,), 1e4),
    "wavy decay": (lambda t, y: torch.cos(t) - 0.1 * y, (0.0,), 1e5),
}


@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri5", "dopri8"])
@pytest.mark.parametrize("problem", STIFF)
@with_both_controls
def test_a_stiff_problem_is_told_from_its_steps(problem: str, method: str, control: str) -> None:
    field, y0, t1 = STIFF[problem]
    solution = few_steps(field, rows(y0), t1, method, control)
    text = solution.failures()[0]
    assert "the problem is stiff; use method='kencarp4'" in text
    assert f"the method's limit is {stability_limit(METHODS[method]):.2g}" in text
    assert solve(field, rows(y0), [0.0, t1], method="kencarp4", max_num_steps=600).success


@pytest.mark.parametrize("method", EXPLICIT)
@pytest.mark.parametrize("problem", MERELY_LONG)
@with_both_controls
def test_a_long_problem_is_not_called_stiff(problem: str, method: str, control: str) -> None:
    field, y0, t1 = MERELY_LONG[problem]
    for rtol in (1e-3, 1e-6):
        assert few_steps(field, rows(y0), t1, method, control, rtol).advice == {}


def test_only_the_stiff_rows_get_the_advice() -> None:
    # The field knows each row by its place.
    rate = column(1.0, 1e5, 1.0, 1e5)
    speed = column(0.1, 1.0, 30.0, 1.0)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -rate * (y - torch.cos(speed * t))

    solution = few_steps(field, column(1.0, 1.0, 1.0, 1.0), 30.0, "tsit5", rtol=1e-4)
    assert list(solution.advice) == [1, 3]


def test_many_failed_rows_get_little_advice_and_a_solved_one_costs_nothing() -> None:
    field = Recorded(drawn_in(1e4))
    solution = few_steps(field, torch.linspace(-1, 1, 40, dtype=torch.float64).view(-1, 1), 100.0, "tsit5")
    assert 0 < len(solution.advice) <= 8
    calm = Recorded(drawn_in(1.0))
    assert solve(calm, column(0.3), [0.0, 1.0]).advice == {}
    assert calm.n_calls == int(solve(drawn_in(1.0), column(0.3), [0.0, 1.0]).n_evals)


@pytest.mark.parametrize(
    ("method", "limit"),
    [("adaptive_heun", 2.0), ("bosh3", 2.51), ("dopri5", 3.31), ("tsit5", 3.5), ("dopri8", 6.4), ("rk4", 2.79)],
)
def test_stability_limits_are_the_known_ones(method: str, limit: float) -> None:
    assert stability_limit(METHODS[method]) == pytest.approx(limit, abs=0.03)


@pytest.mark.parametrize("method", IMPLICIT)
def test_an_l_stable_method_has_no_limit(method: str) -> None:
    assert stability_limit(METHODS[method]) == math.inf


@pytest.mark.parametrize("method", EXPLICIT)
def test_a_step_beyond_the_limit_grows_and_one_below_it_decays(method: str) -> None:
    limit = stability_limit(METHODS[method])
    sizes: list[float] = []
    decay: Callable[[Tensor, Tensor], Tensor] = lambda t, y: -y  # noqa: E731
    for h in (0.97 * limit, 1.03 * limit):
        options = {"first_step": h, "min_step": h, "max_step": h}
        y = solve(decay, column(1.0), [0.0, 40 * h], method=method, **options).y1
        sizes.append(abs(float(y)))
    assert sizes[0] < 1 < sizes[1]
