"""Initial-value problems and their gradients: per-row adaptive Runge-Kutta methods in torch."""

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
