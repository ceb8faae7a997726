"""Neural ordinary differential equations as scikit-learn estimators."""

from skode import callbacks, datasets, displays, exceptions, metrics, model_selection, parallel
from skode.estimators import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
)
from skode.panel import Panel
from skode.runtime.show_versions import show_versions
from skode.runtime.versions import VERSION

__all__ = [
    "ContinuousFlowDensity",
    "ContinuousFlowRegressor",
    "LatentODERegressor",
    "ODENetClassifier",
    "ODENetRegressor",
    "Panel",
    "callbacks",
    "datasets",
    "displays",
    "exceptions",
    "metrics",
    "model_selection",
    "parallel",
    "show_versions",
]
__version__ = VERSION
