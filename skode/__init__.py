"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import exceptions, metrics
from skode.estimators import ContinuousFlowDensity, ContinuousFlowRegressor, ODENetClassifier, ODENetRegressor

__all__ = [
    "ContinuousFlowDensity",
    "ContinuousFlowRegressor",
    "ODENetClassifier",
    "ODENetRegressor",
    "exceptions",
    "metrics",
]
__version__ = "0.1.0"
