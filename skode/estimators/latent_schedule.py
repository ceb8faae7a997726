"""How long and by what steps LatentODERegressor trains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from skode.estimators.series_scaling import LONGEST
from skode.panel import Panel
from skode.training import LatentOptions

# Updates: at least, and for the square root of the number of observed values.
UPDATES, UPDATES_FOR_TARGETS, UPDATES_FOR_EVENTS = (600, 25.0), (60, 3.0), (400, 6.0)
MOST_UPDATES = 3_000
UPDATES_A_CHECK, MOST_CHECKS = 10, 20
FEWEST_WINDOWS = 16  # of an update
# Steps of RK4 for a median span, at first. Targets are read from the encoder alone; a rate's integral must see every
# wave that the rate can have, or events draw spikes between the steps.
STEPS, STEPS_FOR_TARGETS, STEPS_FOR_EVENTS = 4.0, 2.0, 16.0


def latent_options(estimator: Any, panel: Panel, *, with_targets: bool, fresh: bool) -> LatentOptions:
    """The estimator's arguments, completed for a training panel; steps at least those of the fit to go on with."""
    events, steps, updates = estimator.point_process, STEPS, UPDATES
    if events:
        steps, updates = STEPS_FOR_EVENTS, UPDATES_FOR_EVENTS
    elif with_targets:
        steps, updates = STEPS_FOR_TARGETS, UPDATES_FOR_TARGETS
    steps = steps if fresh else max(steps, estimator._fitted.steps_per_unit)
    n_values = int((~np.isnan(panel.values)).sum()) + (len(panel.times) if events else 0)
    n = estimator.max_iter
    if n is None:
        n = round(min(max(updates[1] * math.sqrt(n_values), updates[0]), MOST_UPDATES))
    return LatentOptions(
        n_updates=int(n),
        batch_size=min(int(estimator.batch_size), max(len(panel), FEWEST_WINDOWS)),
        learning_rate_init=float(estimator.learning_rate_init),
        alpha=float(estimator.alpha),
        kl_weight=float(estimator.kl_weight),
        steps_per_unit=steps,
        longest=LONGEST,
        n_checks=max(1, min(MOST_CHECKS, int(n) // UPDATES_A_CHECK)),
        n_checks_no_change=int(estimator.n_iter_no_change),
        tol=float(estimator.tol),
        shuffle=bool(estimator.shuffle),
        gradient=estimator.gradient,
    )
