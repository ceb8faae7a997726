"""Scaling and encoding of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skode.models import Encoding, InputScale
from skode.models.inputs import InputLayer


def _layer(Z, weights=None, *, unit_variance=False, n_bins=8):
    weights = np.ones(len(Z)) if weights is None else weights
    encoding = Encoding.fit(Z.T, weights, n_bins, unit_variance=unit_variance)
    layer = InputLayer(Z.shape[1], len(encoding.column)).double()
    layer.set(InputScale(np.zeros(Z.shape[1]), np.ones(Z.shape[1]), encoding))
    return layer, encoding


def test_a_unit_rises_by_one_across_its_bin_and_is_centred():
    Z = np.random.default_rng(0).normal(size=(500, 2))
    layer, encoding = _layer(Z)
    units = layer.encode(torch.from_numpy(Z)).numpy()
    assert units.shape == (500, 16)
    np.testing.assert_allclose(units.mean(axis=0), 0, atol=1e-12)
    inner = np.setdiff1d(np.arange(16), [0, 7, 8, 15])
    np.testing.assert_allclose(np.ptp(units[:, inner], axis=0), 1)
    assert (np.diff(units[np.argsort(Z[:, 0])][:, encoding.column == 0], axis=0) >= 0).all()


def test_units_have_unit_variance_on_request():
    Z = np.random.default_rng(0).normal(size=(500, 1))
    layer, _ = _layer(Z, unit_variance=True)
    np.testing.assert_allclose(layer.encode(torch.from_numpy(Z)).std(dim=0, correction=0), 1)


def test_ties_share_a_unit_and_constant_columns_have_none():
    rng = np.random.default_rng(0)
    binary = (rng.uniform(size=200) < 0.5).astype(float)
    _, encoding = _layer(np.column_stack([np.zeros(200), binary, rng.normal(size=200)]))
    assert np.bincount(encoding.column, minlength=3).tolist() == [0, 1, 8]


def test_outliers_are_bounded_in_both_readings():
    layer, _ = _layer(np.random.default_rng(0).normal(size=(100, 1)))
    far = torch.tensor([[-1e300], [1e300]], dtype=torch.float64)
    assert torch.isfinite(layer.encode(far)).all() and layer.encode(far).abs().max() < 3
    torch.testing.assert_close(layer.clip(far), torch.tensor([[-3.0], [3.0]], dtype=torch.float64))
    near = torch.tensor([[0.1]], dtype=torch.float64)
    torch.testing.assert_close(layer.clip(near), near, rtol=1e-3, atol=0)


@pytest.mark.parametrize("unit_variance", [False, True])
def test_weights_count_as_copies(unit_variance):
    rng = np.random.default_rng(2)
    Z, weights = rng.normal(size=(30, 2)), rng.integers(0, 4, size=30)
    _, weighted = _layer(Z, weights, unit_variance=unit_variance)
    _, repeated = _layer(np.repeat(Z, weights, axis=0), unit_variance=unit_variance)
    for name in ("column", "slope", "offset", "low", "high"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-9, atol=1e-12)
