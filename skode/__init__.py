"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import datasets, displays, exceptions, metrics, model_selection
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
    "displays",
    "exceptions",
    "metrics",
    "model_selection",
]
__version__ = "0.1.0"
