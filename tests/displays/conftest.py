"""Small fitted models and a backend without a window, for the tests of displays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ContinuousFlowDensity, LatentODERegressor, ODENetClassifier, Panel


@pytest.fixture
def plt():
    """pyplot on the Agg backend; what was there before comes back, and no figure stays open."""
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    plt.switch_backend("agg")
    yield plt
    plt.close("all")
    plt.switch_backend(before)


@pytest.fixture(scope="session")
def moons():
    return make_moons(120, noise=0.1, random_state=0)


@pytest.fixture(scope="session")
def net(moons):
    model = ODENetClassifier((8,), n_members=2, augment_dim=1, max_iter=8, tol=1.0, random_state=0)
    return make_pipeline(StandardScaler(), model).fit(*moons)


@pytest.fixture(scope="session")
def flow(moons):
    return ContinuousFlowDensity((8,), max_iter=8, base="normal", random_state=0).fit(moons[0])


@pytest.fixture(scope="session")
def series():
    """Six irregular series of two channels, and a model of them."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 6, (6, 9)), axis=1)
    values = np.stack([np.sin(t), 70 + 10 * np.cos(t)], axis=2)
    values[:, ::3, 1] = np.nan
    panel = Panel.from_dense(values, times=t, columns=["load", "pulse"], ids=list("abcdef"))
    sizes = {"hidden_layer_sizes": (8,), "encoder_layer_sizes": (8,), "decoder_layer_sizes": (8,)}
    model = LatentODERegressor(latent_dim=2, max_iter=10, random_state=0, **sizes).fit(panel)
    return SimpleNamespace(panel=panel, model=model)
