"""Torch modules: what is fitted."""

from skode.models.inputs import Encoding, InputScale
from skode.models.odenet import ODENet, ODENetConfig, SolverOptions

__all__ = ["Encoding", "InputScale", "ODENet", "ODENetConfig", "SolverOptions"]
