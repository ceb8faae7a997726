"""The learned vector fields of fitted estimators, as functions of NumPy arrays: for pictures of them.

All are computed in float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from skode.estimators.base import BaseODENet
from skode.estimators.density import ContinuousFlowDensity
from skode.estimators.latent import LatentODERegressor
from skode.models import HeldInputs, Series

Array = NDArray[np.float64]
CPU = torch.device("cpu")


@torch.no_grad()
def hidden_velocity(estimator: BaseODENet, states: Array, t: float, member: int = 0) -> Array:
    """The hidden states' derivative (n, n_dims) at states (n, n_dims); with ``order=2`` velocities, accelerations."""
    check_is_fitted(estimator)
    model = estimator._net.build(torch.float64, CPU)
    y = torch.from_numpy(states).repeat(model.config.n_members, 1)
    found = model.dynamics()(y.new_full((len(y), 1), t), y)
    return np.asarray(found.chunk(model.config.n_members)[member])


@torch.no_grad()
def flow_velocity(estimator: ContinuousFlowDensity, X: Array, t: float) -> Array:
    """The flow's velocity (n, n_features_in_) at rows, in the units of X; 0 in columns left out of the density."""
    check_is_fitted(estimator)
    columns = estimator.columns_
    field = estimator._single().build(torch.float64, CPU).field
    Z = torch.from_numpy(np.ascontiguousarray(columns.standardise(X[:, columns.found.kept])))
    found = np.zeros(X.shape)
    found[:, columns.found.kept] = np.asarray(field(Z.new_full((len(Z), 1), t), Z)) * columns.scale
    return found


@torch.no_grad()
def latent_velocity(estimator: LatentODERegressor, states: Array, t: float) -> Array:
    """The latent state's derivative (n, n_dims), per unit of the panel's time; known inputs are at their means."""
    check_is_fitted(estimator)
    fitted = estimator._fitted
    config, z = fitted.config, torch.from_numpy(states)
    now = z.new_full((len(z),), t / fitted.scaling.time)
    one = Series.of(
        torch.tensor([0, 0]),
        now[:0],
        z.new_zeros(0, len(config.families)),
        covariates=z.new_zeros(0, config.n_covariates),
        static=z.new_zeros(1, config.n_static),
        clock=config.clock,
    )
    known: Any = HeldInputs.of(one)
    inputs = None if known is None else lambda u: known.at(torch.zeros(len(z), dtype=torch.int64), now)
    found = fitted.build(torch.float64, CPU).field.dynamics(None, inputs)(now[:, None], z)
    return np.asarray(found) / fitted.scaling.time
