"""The gradients' names."""

from __future__ import annotations

from skode.solver.adjoint import AdjointGradient
from skode.solver.discrete import DiscreteGradient
from skode.solver.gradients import GradientStrategy

STRATEGIES: dict[str, GradientStrategy] = {"discrete": DiscreteGradient(), "adjoint": AdjointGradient()}
