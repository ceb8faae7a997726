"""Pictures of fitted estimators, after scikit-learn's Display protocol; they need matplotlib.

``from_estimator`` computes and draws; the data stay as attributes, and ``plot`` draws them again. After a plot ``ax_``
is the first axes, ``axes_`` all of them and ``figure_`` their figure.
"""

from skode.displays.density import DensityDisplay
from skode.displays.tolerance import ToleranceDisplay
from skode.displays.training import TrainingDisplay
from skode.displays.trajectory import TrajectoryDisplay
from skode.displays.vector_field import VectorFieldDisplay

__all__ = ["DensityDisplay", "ToleranceDisplay", "TrainingDisplay", "TrajectoryDisplay", "VectorFieldDisplay"]
