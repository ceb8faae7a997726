"""Initial-value problems and their gradients: per-row adaptive Runge-Kutta methods in torch.

>>> import torch
>>> from skode.solver import METHODS, solve
>>> solution = solve(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0], method="bosh3")
>>> bool((solution.y1 - torch.tensor(-1.0).exp()).abs().max() < 1e-3)
True
>>> METHODS["bosh3"].order, "tsit5" in METHODS
(3, True)
"""

from skode.solver.adjoint import AdjointGradient
from skode.solver.compat import odeint, odeint_adjoint, odeint_event
from skode.solver.control import BatchControl
from skode.solver.discrete import DiscreteGradient
from skode.solver.dynamics import Dynamics
from skode.solver.events import Crossings, Event
from skode.solver.solution import Solution, Status, Steps
from skode.solver.solve import solve
from skode.solver.tableaus import METHODS

__all__ = [
    "METHODS",
    "AdjointGradient",
    "BatchControl",
    "Crossings",
    "DiscreteGradient",
    "Dynamics",
    "Event",
    "Solution",
    "Status",
    "Steps",
    "odeint",
    "odeint_adjoint",
    "odeint_event",
    "solve",
]
