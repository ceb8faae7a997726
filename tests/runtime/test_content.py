"""Random numbers from a row's content."""

import numpy as np
import pytest

from skode.runtime import key_uniforms, row_keys


def table(n: int = 500, n_columns: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, n_columns))


def test_a_rows_key_depends_neither_on_its_place_nor_on_its_company() -> None:
    X = table()
    order = np.random.default_rng(1).permutation(len(X))
    keys = row_keys(X, 3)
    np.testing.assert_array_equal(row_keys(X[order], 3), keys[order])
    np.testing.assert_array_equal(row_keys(np.asfortranarray(X)[7:8], 3), keys[7:8])


def test_a_float32_table_has_the_keys_of_its_values() -> None:
    X = table().astype(np.float32)
    np.testing.assert_array_equal(row_keys(X), row_keys(X.astype(np.float64)))


def test_minus_zero_is_zero() -> None:
    assert row_keys(np.array([[0.0]])) == row_keys(np.array([[-0.0]]))


@pytest.mark.parametrize("change", ["value", "order of values", "seed"])
def test_anything_else_changes_the_key(change: str) -> None:
    X = np.array([[1.0, 2.0, 3.0]])
    other = {"value": X * np.array([1, 1, 1 + 3e-16]), "order of values": X[:, ::-1], "seed": X}[change]
    assert row_keys(X, 0) != row_keys(other, int(change == "seed"))


def test_keys_of_a_large_table_do_not_collide() -> None:
    X = np.stack(np.meshgrid(np.arange(400.0), np.arange(500.0)), axis=-1).reshape(-1, 2)
    assert len(np.unique(row_keys(X))) == len(X)


def test_key_uniforms_are_uniform_and_independent_of_each_other() -> None:
    n = 40_000
    u = key_uniforms(row_keys(np.arange(float(n))[:, None]), 3)
    assert u.shape == (n, 3)
    assert u.min() > 0
    assert u.max() < 1
    cells = np.apply_along_axis(np.bincount, 0, (u * 20).astype(int))
    # Chi-squared with 19 degrees of freedom: above 53 with a probability of 4e-5.
    assert (((cells - n / 20) ** 2 / (n / 20)).sum(axis=0) < 53).all()
    correlation = np.corrcoef(u.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)
