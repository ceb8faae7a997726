"""The scikit-learn face: validate, call down, wrap up."""

from skode.estimators.classifier import ODENetClassifier
from skode.estimators.regressor import ODENetRegressor

__all__ = ["ODENetClassifier", "ODENetRegressor"]
