"""Runge-Kutta methods keep what their tableaus promise: order conditions, dense output, stability, convergence."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, pairwise, product
from math import factorial, fsum, log2, prod

import numpy as np
import pytest
import torch

from skode.solver import METHODS, Solution, solve
from skode.solver.tableaus import Tableau, get_tableau
from tests.problems import PROBLEMS

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
TABLEAUS = METHODS
IMPLICIT_METHODS = {name: METHODS[name] for name in ("kvaerno3", "kencarp4")}
HUGE = 1e12  # as a tolerance it accepts every step

on_all_tableaus = pytest.mark.parametrize("method", TABLEAUS)
on_adaptive_tableaus = pytest.mark.parametrize("method", [name for name, tab in TABLEAUS.items() if tab.adaptive])
on_implicit_tableaus = pytest.mark.parametrize("method", IMPLICIT_METHODS)

# A rooted tree is the sorted tuple of its root's subtrees; the single vertex is ().
Tree = tuple["Tree", ...]


@cache
def trees(n_vertices: int) -> tuple[Tree, ...]:
    """All rooted trees with that many vertices."""
    found: set[Tree] = set()
    for sizes in partitions(n_vertices - 1):
        counts = {size: sizes.count(size) for size in set(sizes)}
        choices = [combinations_with_replacement(trees(size), count) for size, count in counts.items()]
        for choice in product(*choices):
            found.add(tuple(sorted(tree for group in choice for tree in group)))
    return tuple(sorted(found))


def partitions(total: int, largest: int | None = None) -> list[tuple[int, ...]]:
    if total == 0:
        return [()]
    largest = total if largest is None else largest
    return [(k, *rest) for k in range(min(total, largest), 0, -1) for rest in partitions(total - k, k)]


def n_vertices(tree: Tree) -> int:
    return 1 + sum(map(n_vertices, tree))


def density(tree: Tree) -> int:
    """gamma of the tree: its size times the densities of its subtrees."""
    result = n_vertices(tree)
    for subtree in tree:
        result *= density(subtree)
    return result


def stage_matrix(tableau: Tableau) -> np.ndarray:
    A = np.zeros((tableau.n_stages, tableau.n_stages))
    for i, row in enumerate(tableau.a, start=1):
        A[i, : len(row)] = row
        A[i, i] = tableau.gamma
    return A


def elementary_weights(tree: Tree, A: np.ndarray) -> np.ndarray:
    """Each stage's Phi of the tree: the product over its subtrees of A Phi."""
    result = np.ones(len(A))
    for subtree in tree:
        result = result * (A @ elementary_weights(subtree, A))
    return result


def first_failing_order(weights: np.ndarray, A: np.ndarray, limit: int = 9) -> int:
    """The lowest order of which quadrature weights miss a condition."""
    for order in range(1, limit + 1):
        for tree in trees(order):
            if abs(weights @ elementary_weights(tree, A) - 1 / density(tree)) > 1e-11:
                return order
    raise AssertionError(f"no condition up to order {limit} fails")


def order_of(weights: tuple[float, ...], tableau: Tableau) -> int:
    """The order up to which quadrature weights fulfil all conditions."""
    return first_failing_order(np.array(weights), stage_matrix(tableau)) - 1


def power_of_error(weights: tuple[float, ...] | None, tableau: Tableau) -> int:
    """The power of h with which an error estimate falls: the lowest order of which its weights see a tree."""
    return order_of(tuple(np.array(tableau.b) - np.array(weights)), tableau) + 1


def test_rooted_trees_are_as_many_as_they_should_be() -> None:
    # OEIS A000081
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


def test_densities_and_sizes_agree_with_the_number_of_labellings() -> None:
    # Hairer, Norsett and Wanner I, section II.2: over all trees of n vertices, n! / (gamma sigma) adds up to (n - 1)!
    for n in range(1, 10):
        labellings = [factorial(n) // (density(tree) * symmetry(tree)) for tree in trees(n)]
        assert all(n_vertices(tree) == n for tree in trees(n))
        assert sum(labellings) == factorial(n - 1)


def symmetry(tree: Tree) -> int:
    """sigma of the tree: in how many ways it maps to itself."""
    return prod(factorial(tree.count(subtree)) * symmetry(subtree) ** tree.count(subtree) for subtree in set(tree))


@on_all_tableaus
def test_solution_has_the_order_of_the_method_and_no_more(method: str) -> None:
    tableau = TABLEAUS[method]
    assert order_of(tableau.b, tableau) == tableau.order


@on_adaptive_tableaus
def test_error_estimate_falls_with_the_power_of_h_that_is_claimed(method: str) -> None:
    tableau = TABLEAUS[method]
    power = power_of_error(tableau.e, tableau)
    if tableau.e2 is not None:
        # E^2 / sqrt(E^2 + 0.01 E2^2), where E2 is the larger
        assert power > power_of_error(tableau.e2, tableau)
        power = 2 * power - power_of_error(tableau.e2, tableau)
    assert power == tableau.error_order


@on_all_tableaus
def test_nodes_are_row_sums_inside_of_the_step(method: str) -> None:
    tableau = TABLEAUS[method].closed
    np.testing.assert_allclose(tableau.c, stage_matrix(tableau).sum(axis=1), rtol=0, atol=1e-12)
    assert all(0 <= node <= 1 for node in tableau.c)


@on_all_tableaus
def test_matrix_holds_the_stage_weights(method: str) -> None:
    for tableau in (TABLEAUS[method], TABLEAUS[method].closed):
        np.testing.assert_array_equal(tableau.matrix, stage_matrix(tableau))


@on_all_tableaus
def test_closed_method_is_the_same_method_with_a_stage_at_the_end(method: str) -> None:
    tableau = TABLEAUS[method]
    closed = tableau.closed
    assert closed.fsal and closed.end_stage is not None and closed.c[closed.end_stage] == 1.0
    np.testing.assert_allclose(closed.matrix[closed.end_stage], closed.b, rtol=0, atol=1e-14)
    assert closed.closed is closed
    assert order_of(closed.b, closed) == tableau.order
    if tableau.adaptive:
        assert power_of_error(closed.e, closed) == power_of_error(tableau.e, tableau)
    if tableau.e2 is not None:
        assert power_of_error(closed.e2, closed) == power_of_error(tableau.e2, tableau)


@on_all_tableaus
def test_closed_method_appends_the_extra_stages_after_the_one_at_the_end(method: str) -> None:
    tableau = TABLEAUS[method]
    closed = tableau.closed
    assert tableau.n_main == tableau.n_stages
    assert closed.n_main == tableau.n_stages + (not tableau.fsal)
    assert closed.end_stage == closed.n_main - 1
    assert closed.n_stages == closed.n_main + len(tableau.extra)
    assert closed.a[closed.n_main - 1 :] == tableau.extra
    assert set(closed.b[tableau.n_stages :]) <= {0.0}


@on_all_tableaus
def test_dense_output_starts_at_0_and_ends_at_b(method: str) -> None:
    tableau = TABLEAUS[method]
    # Powers of theta begin with the first, so that every weight is 0 at theta = 0.
    assert tableau.dense.shape[0] == tableau.closed.n_stages
    np.testing.assert_allclose([fsum(row) for row in tableau.dense], tableau.closed.b, rtol=0, atol=1e-14)


@on_all_tableaus
def test_dense_output_has_the_slopes_of_the_field_at_both_ends(method: str) -> None:
    tableau = TABLEAUS[method]
    first, last = np.eye(tableau.closed.n_stages)[[0, tableau.closed.end_stage]]
    powers = np.arange(1, tableau.dense.shape[1] + 1)
    np.testing.assert_allclose(tableau.dense[:, 0], first, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tableau.dense @ powers, last, rtol=0, atol=1e-9)


def dense_residuals(tableau: Tableau, order: int) -> np.ndarray:
    """By how much ``sum_i beta_i(theta) Phi_i`` misses ``theta^order / gamma``, power by power, for every tree."""
    A = stage_matrix(tableau.closed)
    width = max(order, tableau.dense.shape[1])
    p = np.pad(tableau.dense, ((0, 0), (0, width - tableau.dense.shape[1])))
    wanted = np.eye(width)[order - 1]
    return np.array([elementary_weights(tree, A) @ p - wanted / density(tree) for tree in trees(order)])


@on_all_tableaus
def test_dense_output_has_the_order_that_is_claimed_and_no_more(method: str) -> None:
    tableau = TABLEAUS[method]
    for order in range(1, tableau.dense_order + 1):
        np.testing.assert_allclose(dense_residuals(tableau, order), 0.0, rtol=0, atol=1e-10)
    assert np.abs(dense_residuals(tableau, tableau.dense_order + 1)).max() > 1e-6


def stability(weights: np.ndarray, tableau: Tableau, z: complex) -> complex:
    """R(z): what a step makes of 1 where y' = z y / h."""
    A = stage_matrix(tableau)
    ones = np.ones(len(A))
    return complex(1 + z * weights @ np.linalg.solve(np.eye(len(A)) - z * A, ones))


def stability_at_infinity(weights: np.ndarray, tableau: Tableau) -> tuple[float, float]:
    """R(z) for large z is ``growth * z + limit``, by expanding the implicit stages in 1 / z."""
    A = stage_matrix(tableau)
    inverse, first = np.linalg.inv(A[1:, 1:]), A[1:, 0]
    growth = weights[0] - weights[1:] @ inverse @ first
    limit = 1 - weights[1:] @ inverse @ (1 + inverse @ first)
    return float(growth), float(limit)


@on_implicit_tableaus
def test_implicit_method_is_l_stable(method: str) -> None:
    tableau = IMPLICIT_METHODS[method]
    # The only pole, 1 / gamma, lies to the right: a bound on the imaginary axis holds for the whole left half-plane.
    assert tableau.gamma > 0
    b = np.array(tableau.b)
    values = [abs(stability(b, tableau, 1j * y)) for y in np.geomspace(1e-3, 1e5, 800)]
    assert max(values) <= 1 + 1e-12
    np.testing.assert_allclose(stability_at_infinity(b, tableau), (0.0, 0.0), rtol=0, atol=1e-12)
    assert abs(stability(b, tableau, -1e8)) < 1e-6


@pytest.mark.parametrize(("method", "limit"), [("kvaerno3", -0.9566995), ("kencarp4", -3 / 20)])
def test_embedded_method_of_an_implicit_one_is_a_stable(method: str, limit: float) -> None:
    tableau = IMPLICIT_METHODS[method]
    embedded = np.array(tableau.b) - np.array(tableau.e)
    values = [abs(stability(embedded, tableau, 1j * y)) for y in np.geomspace(1e-3, 1e5, 800)]
    assert max(values) <= 1 + 1e-12
    np.testing.assert_allclose(stability_at_infinity(embedded, tableau), (0.0, limit), rtol=0, atol=1e-7)


@on_all_tableaus
def test_a_method_is_implicit_where_its_last_stage_has_to_be_solved_for(method: str) -> None:
    tableau = TABLEAUS[method]
    assert tableau.implicit == (method in IMPLICIT_METHODS)
    if tableau.implicit:
        assert tableau.end_stage == tableau.n_stages - 1 and tableau.closed is tableau
        assert tableau.b == (*tableau.a[-1], tableau.gamma)


def one_step(method: str, y0: torch.Tensor, t: float, h: float, **options: bool) -> Solution:
    """A solve that takes exactly one step."""
    # The step wants to be longer than the interval, and is cut to it.
    length = {"first_step" if METHODS[method].adaptive else "step_size": 2 * h}
    field = PROBLEMS["seasonal"].field
    solution = solve(field, y0, [t, t + h], method=method, rtol=0.0, atol=HUGE, **length, **options)
    assert solution.n_steps.tolist() == [1] * len(y0)
    return solution


def observed_orders(errors: list[float]) -> list[float]:
    return [log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_the_nominal_order(method: str) -> None:
    problem = PROBLEMS["seasonal"]
    exact = problem.solution(torch.tensor([problem.t1], dtype=torch.float64))[:, 0]
    errors = []
    # A method of high order reaches round-off with few steps.
    for n_steps in (2, 4, 8) if METHODS[method].order == 8 else (16, 32, 64):
        h, y = (problem.t1 - problem.t0) / n_steps, problem.y0
        for k in range(n_steps):
            y = one_step(method, y, problem.t0 + k * h, h).y1
        errors.append(float((y - exact).norm()))
    assert max(observed_orders(errors)) >= METHODS[method].order - 0.1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_estimate_falls_with_its_order(method: str) -> None:
    problem = PROBLEMS["seasonal"]
    estimates = []
    for h in (0.1, 0.05, 0.025, 0.0125, 0.00625):
        squares = one_step(method, problem.y0, 0.3, h, error_estimate=True).error_estimate
        estimates.append(HUGE * float(squares.sum().sqrt()))
    assert max(observed_orders(estimates)) >= METHODS[method].error_order - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_error_inside_of_a_step_falls_with_the_order_of_the_dense_output(method: str) -> None:
    tableau, problem = METHODS[method], PROBLEMS["seasonal"]
    errors = []
    for h in (0.1, 0.05, 0.025, 0.0125, 0.00625):
        t = 0.3 + torch.tensor([[0.37 * h, 0.81 * h]], dtype=torch.float64)
        solution = one_step(method, problem.y0, 0.3, h, dense_output=True)
        errors.append(float((solution.evaluate(t[0]) - problem.exact(problem.y0, 0.3, t)).norm()))
    # One step: the local error has one order more. A high one is not seen in full before round-off sets in.
    slack = 0.25 if tableau.dense_order == 7 else 0.1
    assert max(observed_orders(errors)) >= min(tableau.order, tableau.dense_order) + 1 - slack


WRONG = {
    "one solution weight a stage": {"b": (0.5, 0.25, 0.25)},
    "explicit stages": {"a": ((0.5, 0.5),)},
    "nodes inside of the step": {"a": ((1.25,),), "b": (0.6, 0.4)},
    "a diagonal element that is not negative": {"gamma": -0.5},
    "quadrature order 1": {"b": (0.5, 0.6)},
    "quadrature order 2": {"b": (0.25, 0.75)},
    "an implicit last stage at the new state": {"a": ((0.25,),), "gamma": 0.75},
    "a first error estimate": {"e2": (0.5, -0.5)},
    "error weights that add up to 0": {"e": (0.5, -0.4), "error_order": 2},
    "second error weights that add up to 0": {"e": (0.5, -0.5), "e2": (0.5, -0.4), "error_order": 2},
    "explicit extra stages": {"extra": ((0.5, 0.0),)},
    "dense output for the extra stages": {"extra": ((0.5, 0.0, 0.0),)},
    "one row of dense output a stage": {"p": ((1.0, -0.5), (0.0, 0.5))},
    "dense output that ends at y1": {"p": ((1.0, -0.5), (0.0, 0.6), (0.0, 0.0))},
}


@pytest.mark.parametrize("lacks", WRONG)
def test_a_wrong_tableau_is_refused(lacks: str) -> None:
    heun = METHODS["heun"]
    with pytest.raises(ValueError, match=f"'heun' lacks: {lacks}"):
        replace(heun, **WRONG[lacks])


@pytest.mark.parametrize("which", ["e", "e2"])
def test_error_weights_of_another_length_are_refused(which: str) -> None:
    weights = {"e": (0.5, -0.5)} | {which: (0.5, -0.25, -0.25)}
    with pytest.raises(ValueError, match="error weights"):
        replace(METHODS["heun"], **weights, error_order=2)


def test_an_extra_stage_outside_of_the_step_is_refused() -> None:
    row = (0.5, 0.0, 0.75)
    with pytest.raises(ValueError, match="nodes inside of the step"):
        replace(METHODS["heun"], extra=(row,), p=((1.0, -0.5), (0.0, 0.5), (0.0, 0.0), (0.0, 0.0)))


@on_implicit_tableaus
@pytest.mark.parametrize("gamma", [0.0, 0.24])
def test_a_diagonal_that_does_not_go_with_the_other_weights_is_refused(method: str, gamma: float) -> None:
    with pytest.raises(ValueError, match="lacks"):
        replace(IMPLICIT_METHODS[method], gamma=gamma)


@on_all_tableaus
def test_a_higher_order_than_the_weights_have_is_refused(method: str) -> None:
    tableau = TABLEAUS[method]
    with pytest.raises(ValueError, match=f"quadrature order {tableau.order + 1}"):
        replace(tableau, order=tableau.order + 1)


@on_all_tableaus
def test_a_tableau_stands_under_its_name(method: str) -> None:
    assert TABLEAUS[method].name == method


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_by_its_name(method: str) -> None:
    assert get_tableau(method) is METHODS[method]
    assert METHODS[method].name == method


@pytest.mark.parametrize("method", ["dopri9", "", None, ["tsit5"]])
def test_an_unknown_method_is_refused_with_the_names_of_the_known(method: object) -> None:
    with pytest.raises(ValueError, match=r"is unknown; use one of 'euler', .*'tsit5'"):
        get_tableau(method)
