"""Initial-value problems and their gradients: per-row adaptive Runge-Kutta methods in torch."""

from skode.solver.control import BatchControl
from skode.solver.dynamics import Dynamics
from skode.solver.solution import Solution, Status
from skode.solver.solve import solve
from skode.solver.tableaus import METHODS

__all__ = ["METHODS", "BatchControl", "Dynamics", "Solution", "Status", "solve"]
