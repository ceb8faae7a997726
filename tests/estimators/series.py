"""Series for the tests of LatentODERegressor, and small models of them."""

import numpy as np
import pandas as pd

from skode import Panel

QUICK = {"max_iter": 12, "random_state": 0}
SMALL = {"latent_dim": 3, "hidden_layer_sizes": (8,), "encoder_layer_sizes": (8,), "decoder_layer_sizes": (8,)}


def waves(n, seed, n_times=12, span=6.0):
    """Sine waves of own phases at own times, with noise 0.1; times, values and phases."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.uniform(0, span, (n, n_times)), axis=1)
    phase = rng.uniform(0, 2 * np.pi, n)
    return t, np.sin(t + phase[:, None]) + 0.1 * rng.normal(size=t.shape), phase


def panel_of(n, seed, **options):
    t, y, _ = waves(n, seed, **options)
    return Panel.from_dense(y[:, :, None], times=t, columns=["y"], origin=0.0)


def long_frame(n=8, seed=0, shuffle=True):
    """Two channels, some unobserved, ids and times in columns; rows in the order of their times if shuffled."""
    t, y, _ = waves(n, seed)
    frame = pd.DataFrame(
        {
            "patient": np.repeat([f"p{i}" for i in range(n)], t.shape[1]),
            "hour": t.ravel(),
            "pulse": y.ravel() * 10 + 70,
            "load": y.ravel() ** 2,
        }
    )
    frame.loc[::5, "load"] = np.nan
    return frame.sort_values("hour", ignore_index=True) if shuffle else frame
