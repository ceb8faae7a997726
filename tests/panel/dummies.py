"""Estimators for panels that learn next to nothing: what scikit-learn's tools are tried on."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from skode import Panel


class ChannelMeans(BaseEstimator):
    """Predicts the training mean of each channel, plus ``shift``, at every row: panels in, panels out."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def fit(self, X: Panel, y: Any = None) -> Self:
        self.means_ = np.nanmean(checked(X).values, axis=0)
        return self

    def predict(self, X: Panel) -> Panel:
        return checked(X).with_values(np.broadcast_to(self.means_ + self.shift, X.values.shape))

    def score(self, X: Panel, y: Any = None) -> float:
        return -float(np.nanmean((X.values - self.predict(X).values) ** 2))


class SeriesMeans(RegressorMixin, BaseEstimator):
    """Predicts one number per series: a multiple of its mean value."""

    def fit(self, X: Panel, y: Any) -> Self:
        means = series_means(checked(X))
        self.slope_ = float(means @ y / (means @ means))
        return self

    def predict(self, X: Panel) -> Any:
        return self.slope_ * series_means(checked(X))


def checked(X: Any) -> Panel:
    assert isinstance(X, Panel)
    return X


def series_means(panel: Panel) -> Any:
    return np.array([np.nanmean(frame.to_numpy()) for frame in panel])
