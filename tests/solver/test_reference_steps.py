"""Tableaus stepped by plain NumPy: observed orders on nonlinear systems, and the same steps as SciPy's.

Symbols: ``k`` the stages' field values, ``theta`` in [0, 1] the place inside a step.
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum, log2, sqrt

import numpy as np
import pytest
from scipy.integrate import DOP853

from skode.solver import METHODS
from skode.solver.tableaus import Tableau

TABLEAUS = METHODS
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
DOPRI8 = TABLEAUS["dopri8"]

Field = Callable[[float, np.ndarray], np.ndarray]


def waves(t: float, y: np.ndarray) -> np.ndarray:
    """A system of four that are coupled by powers, exponentials and logarithms, and driven by time."""
    return 2 * t * np.array([y[1] ** 0.2 * y[3], 5 * np.exp(5 * (y[2] - 1)) * y[3], y[3], -np.log(y[0])])


def waves_solution(t: float) -> np.ndarray:
    sin = np.sin(t**2)
    return np.array([np.exp(sin), np.exp(5 * sin), sin + 1, np.cos(t**2)])


def orbit(t: float, y: np.ndarray) -> np.ndarray:
    """Place and velocity of a body that another one attracts."""
    return np.concatenate([y[2:], -y[:2] / (y[0] ** 2 + y[1] ** 2) ** 1.5])


def orbit_solution(t: float, eccentricity: float = 0.3) -> np.ndarray:
    """The ellipse, from Kepler's equation E - e sin E = t."""
    e, anomaly = eccentricity, t
    for _ in range(30):
        anomaly -= (anomaly - e * np.sin(anomaly) - t) / (1 - e * np.cos(anomaly))
    minor, sin, cos = sqrt(1 - e**2), np.sin(anomaly), np.cos(anomaly)
    return np.array([cos - e, minor * sin, -sin / (1 - e * cos), minor * cos / (1 - e * cos)])


def jacobian(field: Field, t: float, y: np.ndarray) -> np.ndarray:
    """df/dy, by steps into the imaginary."""
    return np.stack([field(t, y + 1e-30j * unit).imag / 1e-30 for unit in np.eye(len(y))], axis=1)


def solved_stage(field: Field, t: float, known: np.ndarray, weight: float) -> np.ndarray:
    """Y = known + weight f(t, Y), by Newton's method."""
    Y = known
    for _ in range(8):
        residual = Y - known - weight * field(t, Y)
        Y = Y - np.linalg.solve(np.eye(len(Y)) - weight * jacobian(field, t, Y), residual)
    return Y


def stages(tableau: Tableau, field: Field, t: float, y: np.ndarray, h: float) -> np.ndarray:
    """The field at every stage, shape (n_stages, d)."""
    k = [field(t, y)]
    for c, row in zip(tableau.c[1:], tableau.a, strict=True):
        Y = y + h * np.array(row) @ np.array(k)
        if tableau.implicit:
            Y = solved_stage(field, t + c * h, Y, h * tableau.gamma)
        k.append(field(t + c * h, Y))
    return np.array(k)


def step(tableau: Tableau, field: Field, t: float, y: np.ndarray, h: float) -> np.ndarray:
    """The state after a step."""
    return y + h * np.array(tableau.b) @ stages(tableau, field, t, y, h)


def inside(tableau: Tableau, k: np.ndarray, y: np.ndarray, h: float, theta: float) -> np.ndarray:
    """The dense output of a closed method's step."""
    powers = theta ** np.arange(1, tableau.dense.shape[1] + 1)
    return y + h * (tableau.dense @ powers) @ k


def estimate(tableau: Tableau, k: np.ndarray, h: float) -> float:
    """The norm of the error, combined from both estimates where there are two."""
    error = float(np.linalg.norm(h * np.array(tableau.e) @ k))
    if tableau.e2 is None:
        return error
    coarse = float(np.linalg.norm(h * np.array(tableau.e2) @ k))
    return error**2 / sqrt(error**2 + 0.01 * coarse**2)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


def largest_error(tableau: Tableau, n_steps: int) -> float:
    """Over the ends of all steps: at a single time the errors of several orders may cancel."""
    h, y, largest = 1.5 / n_steps, waves_solution(0.0), 0.0
    for i in range(n_steps):
        y = step(tableau, waves, i * h, y, h)
        largest = max(largest, difference(y, waves_solution((i + 1) * h)))
    return largest


@pytest.mark.parametrize("method", TABLEAUS)
def test_error_after_fixed_steps_falls_with_the_order(method: str) -> None:
    tableau = TABLEAUS[method]
    # A method of high order reaches round-off with few steps.
    n_steps = 20 if tableau.order == 8 else 200
    observed = log2(largest_error(tableau, n_steps) / largest_error(tableau, 2 * n_steps))
    assert observed == pytest.approx(tableau.order, abs=0.15)


@pytest.mark.parametrize("method", TABLEAUS)
def test_error_inside_of_a_step_falls_with_the_dense_order(method: str) -> None:
    tableau, y, errors = TABLEAUS[method].closed, orbit_solution(0.7), []
    h_long = 0.1 if tableau.order == 8 else 0.05
    for h in (h_long, h_long / 2):
        k = stages(tableau, orbit, 0.7, y, h)
        places = (0.2, 0.4, 0.6, 0.8)
        errors.append(max(difference(inside(tableau, k, y, h, x), orbit_solution(0.7 + x * h)) for x in places))
    # One step: the local error has one order more.
    assert log2(errors[0] / errors[1]) == pytest.approx(tableau.dense_order + 1, abs=0.25)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_estimate_of_a_step_falls_with_its_power(method: str) -> None:
    tableau, y = TABLEAUS[method], orbit_solution(0.7)
    estimates = [estimate(tableau, stages(tableau, orbit, 0.7, y, h), h) for h in (0.05, 0.025)]
    assert log2(estimates[0] / estimates[1]) == pytest.approx(tableau.error_order, abs=0.15)


@pytest.mark.parametrize("h", [0.4, -0.4])
def test_dopri8_takes_the_step_of_scipys_dop853_and_its_dense_output(h: float) -> None:
    y, closed = waves_solution(0.7), DOPRI8.closed
    peer = DOP853(waves, 0.7, y, 0.7 + h, first_step=abs(h), rtol=1e9, atol=1e9)
    peer.step()
    assert peer.t == 0.7 + h
    k, theirs = stages(closed, waves, 0.7, y, h), peer.dense_output()
    np.testing.assert_allclose(step(DOPRI8, waves, 0.7, y, h), peer.y, rtol=1e-13)
    for theta in np.linspace(0.0, 1.0, 21):
        np.testing.assert_allclose(inside(closed, k, y, h, theta), theirs(0.7 + theta * h), rtol=1e-12)


def test_dopri8s_dense_output_ends_at_the_solution_weights_to_round_off() -> None:
    ends = [fsum(row) for row in DOPRI8.dense]
    np.testing.assert_allclose(ends, DOPRI8.closed.b, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", [name for name, tableau in METHODS.items() if tableau.implicit])
def test_implicit_steps_stay_on_the_slow_solution_of_a_stiff_problem(method: str) -> None:
    # Prothero and Robinson's, begun beside it. An explicit step has to be shorter than 4e-6 here.
    def field(t: float, y: np.ndarray) -> np.ndarray:
        return -1e6 * (y - np.sin(t)) + np.cos(t)

    y = np.array([0.5])
    for i in range(20):
        y = step(METHODS[method], field, 0.1 * i, y, 0.1)
    assert abs(y[0] - np.sin(2.0)) < 1e-6
