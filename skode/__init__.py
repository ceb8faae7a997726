"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import datasets, exceptions, metrics, model_selection
from skode.estimators import ContinuousFlowDensity, ContinuousFlowRegressor, ODENetClassifier, ODENetRegressor
from skode.panel import Panel

__all__ = [
    "ContinuousFlowDensity",
    "ContinuousFlowRegressor",
    "ODENetClassifier",
    "ODENetRegressor",
    "Panel",
    "datasets",
    "exceptions",
    "metrics",
    "model_selection",
]
__version__ = "0.1.0"
