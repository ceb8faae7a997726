"""Which method solves what by default, and how loosely in training."""

from __future__ import annotations

from typing import NamedTuple

# "auto" methods by tolerance: the first whose rtol is reached, with (training, prediction).
AUTO_METHODS = (
    (2e-2, "adaptive_midpoint", "bosh3"),
    (1e-3, "adaptive_midpoint", "tsit5"),
    (1e-5, "bosh3", "tsit5"),
    (0.0, "tsit5", "dopri8"),
)


class Slack(NamedTuple):
    """A training solve's estimated error may be so many tolerances, and the penalty on its square has this weight.

    Steps are coarse while the dynamics are still wild, and the penalty leads to dynamics that a single step solves in
    the end. Euler's estimate in the midpoint method is of lower order, hence larger for the same error.
    """

    tolerances: float
    weight: float


SLACK = {"adaptive_midpoint": Slack(100.0, 3e-4), "adaptive_heun": Slack(100.0, 3e-4)}
USUAL_SLACK = Slack(10.0, 3e-3)
