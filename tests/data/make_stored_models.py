"""Fit one small model of each estimator and store it, with inputs and predictions, under the version's own folder.

Run `python tests/data/make_stored_models.py` once for each minor version, before its release; later versions are
tested against the files, which are never made anew.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import skops.io

import skode
from skode import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
)

FOLDER = Path(__file__).parent / "stored"
NET = {"hidden_layer_sizes": 4, "n_members": 2, "max_iter": 20, "random_state": 0}
FLOW = {"hidden_layer_sizes": (4,), "max_iter": 5, "random_state": 0}
SERIES = {
    "latent_dim": 2,
    "hidden_layer_sizes": (4,),
    "encoder_layer_sizes": (4,),
    "decoder_layer_sizes": (4,),
    "max_iter": 20,
    "random_state": 0,
}


def cases() -> dict[str, tuple[Any, Any, Any, str]]:
    """By name: an estimator, its X and y, and the method whose result is kept."""
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=(40, 2)), rng.integers(4, size=40)]).astype(np.float64)
    labels = np.where(X[:, 0] > 0, "yes", "no").astype(object)
    series = np.sin(rng.uniform(0, 3, (6, 1, 1)) + 0.5 * np.arange(8)[:, None]) * [1.0, 2.0]
    series[rng.random(series.shape) < 0.2] = np.nan
    # Fewer than 10 rows: the conditional density has no network for the mean then, which would be large.
    few = {**FLOW, "n_members": 1, "early_stopping": False}
    return {
        "classifier": (ODENetClassifier(**NET, class_weight={"yes": 2.0, "no": 1.0}), X, labels, "predict_proba"),
        "regressor": (ODENetRegressor(**NET, dtype=np.float64, order=2), X, X[:, :2] * [3.0, -1.0], "predict"),
        "density": (ContinuousFlowDensity(**FLOW, early_stopping=False), X, None, "score_samples"),
        "conditional": (ContinuousFlowRegressor(**few), X[:9], X[:9, 0] + X[:9, 2], "score_samples"),
        "series": (LatentODERegressor(**SERIES, likelihood=["gaussian", "student_t"]), series, None, "predict"),
    }


def main() -> None:
    """Store all of them: the regressor by joblib, the others by skops."""
    folder = FOLDER / skode.__version__
    folder.mkdir(parents=True)
    arrays = {}
    for name, (estimator, X, y, method) in cases().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.fit(X) if y is None else estimator.fit(X, y)
        if name == "regressor":
            joblib.dump(estimator, folder / f"{name}.joblib", compress=9)
        else:
            skops.io.dump(estimator, folder / f"{name}.skops", compression=8, compresslevel=9)
        arrays[f"{name}_X"], arrays[f"{name}_{method}"] = X, getattr(estimator, method)(X)
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
