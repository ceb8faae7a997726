"""Torch modules: what is fitted."""

from skode.models.bases import Base, Mixture, Normal, StudentT
from skode.models.encoders import EncoderConfig, make_encoder
from skode.models.inputs import Encoding, InputScale
from skode.models.latent import Gaussian, LatentConfig, LatentODE, Rows
from skode.models.likelihoods import FAMILIES, Likelihood
from skode.models.odenet import ODENet, ODENetConfig, SolverOptions
from skode.models.paths import LinearPath, MixturePath, Pairs
from skode.models.series import HeldInputs, Series

__all__ = [
    "FAMILIES",
    "Base",
    "EncoderConfig",
    "Encoding",
    "Gaussian",
    "HeldInputs",
    "InputScale",
    "LatentConfig",
    "LatentODE",
    "Likelihood",
    "LinearPath",
    "Mixture",
    "MixturePath",
    "Normal",
    "ODENet",
    "ODENetConfig",
    "Pairs",
    "Rows",
    "Series",
    "SolverOptions",
    "StudentT",
    "make_encoder",
]
