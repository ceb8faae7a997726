"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import exceptions, metrics
from skode.estimators import ODENetClassifier, ODENetRegressor

__all__ = ["ODENetClassifier", "ODENetRegressor", "exceptions", "metrics"]
__version__ = "0.1.0"
