"""The conditional mean that a conditional density starts at, and its predictions for rows held out."""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from skode.estimators.checks import require_success
from skode.estimators.regressor import ODENetRegressor
from skode.estimators.stored import stored
from skode.runtime import to_numpy

Array = NDArray[np.float64]

N_MEMBERS, N_FOLDS = 10, 5
FEWEST_ROWS = 2 * N_FOLDS
FARTHEST = 3.0  # standard deviations, that columns of a context are bent towards


class FoldedRegressor(ODENetRegressor):
    """An ensemble that keeps which rows each of its members was trained without: two members leave out each fold."""

    @classmethod
    def of(cls, device: str | torch.device, dtype: Any, seed: int) -> FoldedRegressor:
        """With the regressor's defaults."""
        return cls(
            n_members=N_MEMBERS,
            early_stopping=True,
            validation_fraction=1 / N_FOLDS,
            device=device,
            dtype=dtype,
            random_state=seed,
        )

    def _folds(self, n_rows: int, target: NDArray[Any], n_folds: int, seed: int) -> NDArray[Any]:
        self._row_folds = super()._folds(n_rows, target, n_folds, seed)
        return self._row_folds

    def held_out_predictions(self, X: NDArray[Any]) -> Array:
        """For the rows of the fit, in its order, the mean of the members that were trained without the row; (n, k)."""
        model, rows = self._prepare(X)
        members = model.config.n_members
        each = np.empty((members, len(rows), model.config.n_outputs))
        for place, solution in self._solutions(model, rows):
            require_success(solution, place, members)
            with torch.no_grad():
                each[:, place] = to_numpy(model.read_out(solution.y1))[:, : place.stop - place.start]
        left_out = np.arange(members)[:, None] % N_FOLDS == self._row_folds
        mean = (each * left_out[:, :, None]).sum(axis=0) / left_out.sum(axis=0)[:, None]
        return self._in_units(mean)


@stored
class Location(NamedTuple):
    """A mean, the scale of what it leaves, and the scale of contexts: columns of X and predicted means.

    With fewer than 10 rows there is no mean, and 0 is predicted for the standardised targets.
    """

    mean: FoldedRegressor | None
    residual_scale: Array
    context_mean: Array
    context_scale: Array

    @classmethod
    def fit(
        cls, mean: FoldedRegressor, X: Array, Z: Array, weight: Array, earlier: Location | None
    ) -> tuple[Location, Array, Array]:
        """The location, the rows' scaled residuals by members that were trained without them, and their contexts.

        ``X (n, p)`` and standardised targets ``Z (n, d)``; scales are those of an earlier fit, if there is one.
        """
        usable = len(Z) >= FEWEST_ROWS and Z.shape[1] > 0
        predicted = np.zeros_like(Z)
        if usable:
            mean.fit(X, Z if Z.shape[1] > 1 else Z[:, 0], weight)
            predicted = mean.held_out_predictions(X)
        R = Z - predicted
        if earlier is None:
            given = StandardScaler().fit(np.column_stack([X, predicted]), sample_weight=weight)
            scale = np.sqrt(weight @ (R * R) / weight.sum())
            scale[scale == 0] = 1.0
            found = cls(mean if usable else None, scale, given.mean_, given.scale_)
        else:
            found = earlier._replace(mean=mean if usable else None)
        return found, R / found.residual_scale, found.context(X, predicted)

    def context(self, X: Array, predicted: Array) -> Array:
        """What the flows' fields depend on: standardised columns and predicted means, far values bent towards 3."""
        z = (np.column_stack([X, predicted]) - self.context_mean) / self.context_scale
        bent: Array = z / np.sqrt(1 + (z / FARTHEST) ** 2)
        return bent

    def predict(self, X: Array, n_dims: int, device: Any) -> tuple[Array, Array]:
        """Predicted means of the standardised targets (n, n_dims), and contexts."""
        predicted = np.zeros((len(X), n_dims))
        if self.mean is not None:
            mean = copy(self.mean).set_params(device=device)
            predicted = np.asarray(mean.predict(X), np.float64).reshape(predicted.shape)
        return predicted, self.context(X, predicted)


def quantiles_of_mean(Y: Array, nodes: Array, q: Array) -> Array:
    """Quantiles (n, q) of the mean of distributions whose quantiles at ``nodes`` are ``Y (n_members, n, k)``.

    Where they descend they are those of a target that falls as the nodes rise.
    """
    if (Y[..., -1] < Y[..., 0]).any():
        return -quantiles_of_mean(-Y, nodes, 1 - q)
    found = np.empty((Y.shape[1], len(q)))
    for i in range(Y.shape[1]):
        places = np.sort(Y[:, i].ravel())
        below = np.mean([np.interp(places, own, nodes, left=0.0, right=1.0) for own in Y[:, i]], axis=0)
        found[i] = np.interp(q, below, places)
    return found
