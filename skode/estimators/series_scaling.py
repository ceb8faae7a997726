"""Units in which a latent ODE sees series, and back.

Times are divided by the median span of the training series, values and known inputs are standardised; binary channels
and counts stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from skode.estimators.stored import stored
from skode.models import Series
from skode.panel import Panel

Array = NDArray[np.float64]
LONGEST = 256  # rows of a stretch that is about one unit of time long
UNSCALED = ("bernoulli", "poisson")


@stored
class SeriesScaling(NamedTuple):
    """Fitted to a training panel.

    ``time`` is a unit of time; ``centre`` and ``scale`` are the channels', ``inputs`` and ``static`` a row of centres
    and one of scales.
    """

    time: float
    centre: Array
    scale: Array
    inputs: Array
    static: Array

    @staticmethod
    def fit(panel: Panel, families: tuple[str, ...]) -> SeriesScaling:
        """Of all observations together; what does not vary has scale 1."""
        centre, scale = _moments(panel.values)
        plain = np.array([family in UNSCALED for family in families], dtype=bool)
        return SeriesScaling(
            _unit_of_time(panel),
            np.where(plain, 0.0, centre),
            np.where(plain, 1.0, scale),
            np.stack(_moments(panel.covariates)),
            np.stack(_moments(panel.static)),
        )

    def series(
        self, panel: Panel, dtype: torch.dtype, device: torch.device, clock: tuple[float, float] | None
    ) -> Series:
        """All rows of a panel, queries as rows without an observation, in its order; unknown static inputs are mean."""
        values = (panel.values - self.centre) / self.scale
        inputs = (panel.covariates - self.inputs[0]) / self.inputs[1]
        static = np.nan_to_num((panel.static - self.static[0]) / self.static[1])
        made = Series.of(
            torch.from_numpy(panel.offsets.copy()),
            torch.from_numpy(panel.times / self.time),
            torch.from_numpy(values),
            covariates=torch.from_numpy(inputs),
            static=torch.from_numpy(static),
            clock=clock,
        )
        return made.to(device, dtype)

    @property
    def log_scale(self) -> Array:
        """What each channel's log-densities lose by their units, (n_channels,)."""
        return np.log(self.scale)


def _moments(X: Array) -> tuple[Array, Array]:
    """Means and standard deviations of columns without NaN: 0 and 1 where nothing is known, 1 where nothing varies."""
    known = ~np.isnan(X)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, X, 0.0).sum(axis=0) / n
    std = np.sqrt(np.square(np.where(known, X - mean, 0.0)).sum(axis=0) / n)
    flat = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return mean, np.where(flat, 1.0, std)


def _unit_of_time(panel: Panel) -> float:
    """The median span of stretches of at most 256 observed rows."""
    seen = panel.rows(~np.isnan(panel.values).all(axis=1)) if panel.columns else panel
    lengths, offsets, times = seen.lengths, seen.offsets, seen.times
    some = np.flatnonzero(lengths > 1)
    if not len(some):
        return 1.0
    span = times[offsets[some + 1] - 1] - times[offsets[some]]
    typical = float(np.median(span * np.minimum(1.0, LONGEST / lengths[some])))
    return typical if typical > 0 else 1.0
