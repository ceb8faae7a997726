"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import exceptions, metrics
from skode.estimators import ContinuousFlowDensity, ODENetClassifier, ODENetRegressor

__all__ = ["ContinuousFlowDensity", "ODENetClassifier", "ODENetRegressor", "exceptions", "metrics"]
__version__ = "0.1.0"
