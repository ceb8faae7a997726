"""Torch modules: what is fitted."""

from skode.models.inputs import InputScale
from skode.models.odenet import ODENet, ODENetConfig, SolverOptions

__all__ = ["InputScale", "ODENet", "ODENetConfig", "SolverOptions"]
