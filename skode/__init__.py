"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import datasets, exceptions, metrics, model_selection, parallel
from skode.estimators import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
)
from skode.panel import Panel

__all__ = [
    "ContinuousFlowDensity",
    "ContinuousFlowRegressor",
    "LatentODERegressor",
    "ODENetClassifier",
    "ODENetRegressor",
    "Panel",
    "datasets",
    "exceptions",
    "metrics",
    "model_selection",
    "parallel",
]
__version__ = "0.1.0"
