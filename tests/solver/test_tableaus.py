"""Runge-Kutta methods keep what their tableaus promise: order conditions, dense output, observed convergence."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, pairwise, product
from math import log2

import numpy as np
import pytest
import torch

from skode.solver import METHODS, Solution, solve
from skode.solver.tableaus import Tableau, get_tableau
from tests.problems import PROBLEMS

ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive]
HUGE = 1e12  # as a tolerance it accepts every step

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
    return A


def elementary_weights(tree: Tree, A: np.ndarray) -> np.ndarray:
    """Each stage's Phi of the tree: the product over its subtrees of A Phi."""
    result = np.ones(len(A))
    for subtree in tree:
        result = result * (A @ elementary_weights(subtree, A))
    return result


def order_of(weights: np.ndarray, tableau: Tableau, limit: int = 6) -> int:
    """The order up to which quadrature weights fulfil all conditions."""
    A = stage_matrix(tableau)
    for order in range(1, limit + 1):
        for tree in trees(order):
            if abs(weights @ elementary_weights(tree, A) - 1 / density(tree)) > 1e-12:
                return order - 1
    return limit


def test_rooted_trees_are_as_many_as_they_should_be() -> None:
    # OEIS A000081
    assert [len(trees(n)) for n in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("method", METHODS)
def test_solution_has_the_order_of_the_method(method: str) -> None:
    tableau = METHODS[method]
    assert order_of(np.array(tableau.b), tableau) == tableau.order


@pytest.mark.parametrize("method", ADAPTIVE)
def test_embedded_solution_has_the_order_that_the_error_estimate_claims(method: str) -> None:
    tableau = METHODS[method]
    embedded = np.array(tableau.b) - np.array(tableau.e)
    assert order_of(embedded, tableau) == tableau.error_order - 1


@pytest.mark.parametrize("method", METHODS)
def test_nodes_are_row_sums_inside_of_the_step(method: str) -> None:
    tableau = METHODS[method]
    np.testing.assert_allclose(tableau.c, stage_matrix(tableau).sum(axis=1), rtol=0, atol=1e-12)
    assert all(0 <= node <= 1 for node in tableau.c)


@pytest.mark.parametrize("method", METHODS)
def test_closed_method_is_the_same_method_with_its_last_stage_at_the_end(method: str) -> None:
    tableau = METHODS[method]
    closed = tableau.closed
    assert closed.fsal and closed.c[-1] == 1.0
    assert closed.closed is closed
    assert order_of(np.array(closed.b), closed) == tableau.order
    if tableau.adaptive:
        assert order_of(np.array(closed.b) - np.array(closed.e), closed) == tableau.error_order - 1


@pytest.mark.parametrize("method", METHODS)
def test_dense_output_starts_at_0_and_ends_at_b(method: str) -> None:
    tableau = METHODS[method]
    # Powers of theta begin with the first, so that every weight is 0 at theta = 0.
    assert tableau.dense.shape[0] == tableau.closed.n_stages
    np.testing.assert_allclose(tableau.dense.sum(axis=1), tableau.closed.b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_dense_output_has_the_slopes_of_the_field_at_both_ends(method: str) -> None:
    tableau = METHODS[method]
    first, last = np.eye(tableau.closed.n_stages)[[0, -1]]
    powers = np.arange(1, tableau.dense.shape[1] + 1)
    np.testing.assert_allclose(tableau.dense[:, 0], first, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tableau.dense @ powers, last, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_dense_output_fulfils_the_order_conditions_of_its_order(method: str) -> None:
    tableau = METHODS[method]
    A = stage_matrix(tableau.closed)
    for order in range(1, tableau.dense_order + 1):
        for tree in trees(order):
            # sum_i b_i(theta) Phi_i = theta^order / gamma, power by power
            expected = np.zeros(tableau.dense.shape[1])
            expected[order - 1] = 1 / density(tree)
            found = elementary_weights(tree, A) @ tableau.dense
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


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
    for n_steps in (16, 32, 64):
        h, y = (problem.t1 - problem.t0) / n_steps, problem.y0
        for k in range(n_steps):
            y = one_step(method, y, problem.t0 + k * h, h).y1
        errors.append(float((y - exact).norm()))
    assert max(observed_orders(errors)) >= METHODS[method].order - 0.1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_estimate_falls_with_its_order(method: str) -> None:
    problem = PROBLEMS["seasonal"]
    estimates = []
    for h in (0.1, 0.05, 0.025, 0.0125):
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
    # One step: the local error has one order more.
    assert max(observed_orders(errors)) >= min(tableau.order, tableau.dense_order) + 1 - 0.1


WRONG = {
    "one solution weight a stage": {"b": (0.5, 0.25, 0.25)},
    "explicit stages": {"a": ((0.5, 0.5),)},
    "quadrature order 1": {"b": (0.5, 0.6)},
    "quadrature order 2": {"b": (0.25, 0.75)},
    "error weights that add up to 0": {"e": (0.5, -0.4), "error_order": 2},
    "dense output that ends at y1": {"p": ((1.0, -0.5), (0.0, 0.6))},
}


@pytest.mark.parametrize("lacks", WRONG)
def test_a_wrong_tableau_is_refused(lacks: str) -> None:
    heun = METHODS["heun"]
    with pytest.raises(ValueError, match=f"'heun' lacks: {lacks}"):
        replace(heun, **WRONG[lacks])


def test_error_weights_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="error weights"):
        replace(METHODS["heun"], e=(0.5, -0.25, -0.25), error_order=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_higher_order_than_the_weights_have_is_refused(method: str) -> None:
    tableau = METHODS[method]
    with pytest.raises(ValueError, match=f"quadrature order {tableau.order + 1}"):
        replace(tableau, order=tableau.order + 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_by_its_name(method: str) -> None:
    assert get_tableau(method) is METHODS[method]
    assert METHODS[method].name == method


@pytest.mark.parametrize("method", ["dopri8", "", None, ["tsit5"]])
def test_an_unknown_method_is_refused_with_the_names_of_the_known(method: object) -> None:
    with pytest.raises(ValueError, match=r"is unknown; use one of 'euler', .*'tsit5'"):
        get_tableau(method)
