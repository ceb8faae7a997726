"""Solutions of classic problems, and their derivatives, against SciPy's DOP853 at a tolerance of 1e-12."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from skode.solver import METHODS, solve
from tests.detest import DETEST, T1
from tests.problems import PROBLEMS, Field, reference, rows

METHODS_OF_HIGH_ORDER = [name for name, method in METHODS.items() if method.adaptive and method.order >= 5]


def with_tolerances(*tolerances: float) -> pytest.MarkDecorator:
    """These for methods of high order; coarser ones for one of low order."""
    cases = [(name, tolerances) for name in METHODS_OF_HIGH_ORDER] + [("bosh3", (1e-3, 1e-5))]
    return pytest.mark.parametrize(("method", "tolerances"), cases)


with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])

# By how much a problem enlarges the errors of single steps up to its end, in units of the tolerance: twice what
# methods of orders 3 to 5 show. A decaying solution forgets them; in an orbit they become an error of the phase,
# which grows with time, and the more the closer the orbit comes to the centre. Where stability holds the steps of a
# method of order 8, its interpolant is worse than its steps (C; SciPy shows the same).
GROWTH = {"A": 60.0, "B": 200.0, "C": 400.0, "D": 3500.0, "D5": 6500.0, "E": 250.0}


def times(start: float, end: float, n: int = 9) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def largest_error(found: Tensor, exact: Tensor) -> float:
    """Of all states, in units of the solution's size where that is above 1."""
    return float((found - exact).abs().max()) / max(1.0, float(exact.abs().max()))


@cache
def detest_solution(name: str) -> Tensor:
    problem = DETEST[name]
    return reference(problem.field, problem.y0, 0.0, times(0, T1).unsqueeze(0))


@pytest.mark.parametrize("name", DETEST)
@with_tolerances(1e-3, 1e-8)
def test_errors_on_the_detest_set_follow_the_tolerance(name: str, method: str, tolerances: tuple[float, ...]) -> None:
    problem, errors = DETEST[name], []
    for tolerance in tolerances:
        solution = solve(problem.field, problem.y0, times(0, T1), method=method, rtol=tolerance, atol=tolerance)
        assert solution.success
        errors.append(largest_error(solution.y, detest_solution(name)))
        assert errors[-1] <= GROWTH.get(name, GROWTH[name[0]]) * tolerance
    assert errors[-1] < 0.1 * errors[0]


@dataclass(frozen=True, eq=False)
class System:
    """dy/dt = field(t, y) from several ``y0 (n, d)`` at t = 0, and by how much it enlarges single steps' errors."""

    field: Field
    y0: Tensor
    t1: float
    growth: float


def _van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    x, v = y.unbind(1)
    return torch.stack([v, 5 * (1 - x**2) * v - x], dim=1)


def _kepler(t: Tensor, y: Tensor) -> Tensor:
    place, velocity = y[:, :2], y[:, 2:]
    return torch.cat([velocity, -place / place.norm(dim=1, keepdim=True) ** 3], dim=1)


def _perihelion(eccentricity: float) -> tuple[float, float, float, float]:
    return 1 - eccentricity, 0.0, 0.0, math.sqrt((1 + eccentricity) / (1 - eccentricity))


SYSTEMS = {
    "lotka_volterra": System(PROBLEMS["lotka_volterra"].field, rows((2.0, 1.0), (4.0, 2.0), (0.5, 0.3)), 8.0, 180.0),
    # Two jumps of the relaxation oscillation, which move errors of the state into its phase.
    "van_der_pol": System(_van_der_pol, rows((2.0, 0.0), (0.1, 0.0), (-1.0, 3.0)), 12.0, 220.0),
    # Two periods of a circular orbit and of ones that come near the centre; SciPy's RK45 has 5400 tolerances.
    "kepler": System(_kepler, rows(*map(_perihelion, (0.0, 0.3, 0.6, 0.85))), 4 * math.pi, 20_000.0),
}


@cache
def system_solution(name: str, end: float) -> Tensor:
    system = SYSTEMS[name]
    return reference(system.field, system.y0, 0.0, times(0, end, 25).expand(len(system.y0), -1))


@pytest.mark.parametrize("name", SYSTEMS)
@with_tolerances(1e-4, 1e-8)
@with_both_controls
def test_errors_of_several_rows_follow_the_tolerance(
    name: str, method: str, tolerances: tuple[float, ...], control: str
) -> None:
    system, errors = SYSTEMS[name], []
    for tolerance in tolerances:
        options = {"method": method, "step_control": control, "rtol": tolerance, "atol": tolerance}
        solution = solve(system.field, system.y0, times(0, system.t1, 25), **options)
        errors.append(largest_error(solution.y, system_solution(name, system.t1)))
        assert errors[-1] <= system.growth * tolerance
    assert errors[-1] < 0.1 * errors[0]


@with_tolerances(1e-8)
def test_orbits_keep_their_energy_and_angular_momentum(method: str, tolerances: tuple[float, ...]) -> None:
    eccentricities = torch.tensor([0.0, 0.3, 0.6, 0.85], dtype=torch.float64)
    system, tolerance = SYSTEMS["kepler"], tolerances[-1]
    solution = solve(system.field, system.y0, times(0, system.t1, 25), method=method, rtol=tolerance, atol=tolerance)
    place, velocity = solution.y[..., :2], solution.y[..., 2:]
    energy = velocity.square().sum(dim=2) / 2 - 1 / place.norm(dim=2)
    momentum = place[..., 0] * velocity[..., 1] - place[..., 1] * velocity[..., 0]
    # The half axis is 1: the energy is -1/2, and the angular momentum tells the eccentricity.
    assert float((energy + 0.5).abs().max()) <= 1000 * tolerance
    expected = torch.sqrt(1 - eccentricities**2).unsqueeze(1)
    assert float((momentum - expected).abs().max()) <= 100 * tolerance


# --- derivatives, by the variational equations ---


def _predation(t: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    prey, hunters = y.unbind(1)
    growth, caught, death, fed = rates
    return torch.stack([growth * prey - caught * prey * hunters, fed * prey * hunters - death * hunters], dim=1)


START, RATES = rows((2.0, 1.0)), torch.tensor([1.5, 1.0, 3.0, 0.8], dtype=torch.float64)


def _with_sensitivities(t: Tensor, y: Tensor) -> Tensor:
    """The states' derivatives S with the initial state and the rates beside them: dS/dt = (df/dy) S + df/dp."""
    state, S = y[:, :2], y[:, 2:].view(2, 6)
    to_state, to_rates = torch.autograd.functional.jacobian(lambda x, p: _predation(t, x, p)[0], (state, RATES))
    dS = to_state[:, 0] @ S + torch.cat([torch.zeros(2, 2, dtype=torch.float64), to_rates], dim=1)
    return torch.cat([_predation(t, state, RATES), dS.view(1, 12)], dim=1)


@cache
def exact_sensitivities() -> Tensor:
    """Of the two states at times 2 and 4, with the initial state and the rates: shape (2, 2, 6)."""
    start = torch.cat([START, torch.eye(2, 6, dtype=torch.float64).view(1, 12)], dim=1)
    return reference(_with_sensitivities, start, 0.0, times(0, 4, 3).unsqueeze(0))[0, 1:, 2:].view(2, 2, 6)


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("method", METHODS_OF_HIGH_ORDER)
def test_gradients_are_those_of_the_variational_equations(gradient: str, method: str) -> None:
    for tolerance in (1e-5, 1e-8):
        start, rates = START.clone().requires_grad_(), RATES.clone().requires_grad_()
        options = {"method": method, "gradient": gradient, "rtol": tolerance, "atol": tolerance, "args": (rates,)}
        y = solve(_predation, start, times(0, 4, 3), **options).y
        found = torch.stack(
            [
                torch.cat([g.view(-1) for g in torch.autograd.grad(y[0, i, j], [start, rates], retain_graph=True)])
                for i in (1, 2)
                for j in (0, 1)
            ]
        ).view(2, 2, 6)
        assert largest_error(found, exact_sensitivities()) <= 100 * tolerance
