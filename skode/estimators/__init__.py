"""The scikit-learn face: validate, call down, wrap up."""

from skode.estimators.classifier import ODENetClassifier
from skode.estimators.conditional import ContinuousFlowRegressor
from skode.estimators.density import ContinuousFlowDensity
from skode.estimators.latent import LatentODERegressor
from skode.estimators.regressor import ODENetRegressor

__all__ = [
    "ContinuousFlowDensity",
    "ContinuousFlowRegressor",
    "LatentODERegressor",
    "ODENetClassifier",
    "ODENetRegressor",
]
