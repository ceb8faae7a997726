"""Torch modules: what is fitted."""

from skode.models.bases import Base, Mixture, Normal, StudentT
from skode.models.inputs import Encoding, InputScale
from skode.models.odenet import ODENet, ODENetConfig, SolverOptions
from skode.models.paths import LinearPath, MixturePath, Pairs

__all__ = [
    "Base",
    "Encoding",
    "InputScale",
    "LinearPath",
    "Mixture",
    "MixturePath",
    "Normal",
    "ODENet",
    "ODENetConfig",
    "Pairs",
    "SolverOptions",
    "StudentT",
]
