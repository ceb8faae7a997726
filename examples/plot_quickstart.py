"""
Quickstart: handwritten digits with a network of continuous depth
=================================================================

How good is :class:`skode.ODENetClassifier` out of the box, what does it cost, and what does the solver's tolerance do
after the fit? All models run with their defaults on scikit-learn's digits, 1,797 real images of 8 x 8 pixels.
"""

# %%
# Data
# ----
# A quarter of the images is kept for the test.

import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.base import ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ODENetClassifier

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=0)

# %%
# Beside two models of scikit-learn
# ---------------------------------
# ``ODENetClassifier`` standardises its inputs itself; the other two stand behind a ``StandardScaler``. Its evaluations
# are those of the learned vector field, the mean over the test rows: each row is solved with its own steps.


def n_parameters(model: ClassifierMixin) -> int:
    """Count what was learned."""
    if isinstance(model, ODENetClassifier):
        return model.n_parameters_
    last = model[-1]
    weights = [*last.coefs_, *last.intercepts_] if isinstance(last, MLPClassifier) else [last.coef_, last.intercept_]
    return sum(part.size for part in weights)


def scores(model: ClassifierMixin) -> tuple[float, float]:
    """Accuracy and log-loss on the test images."""
    probabilities = model.predict_proba(X_test)
    return accuracy_score(y_test, model.classes_[probabilities.argmax(axis=1)]), log_loss(y_test, probabilities)


models = {
    "ODENetClassifier": ODENetClassifier(random_state=0),
    "MLPClassifier": make_pipeline(StandardScaler(), MLPClassifier(random_state=0)),
    "LogisticRegression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
}
print(f"{'test images':<20}{'accuracy':>10}{'log-loss':>10}{'parameters':>12}{'fit seconds':>12}{'evals a row':>13}")
for name, model in models.items():
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # MLPClassifier's 200 epochs do not always suffice it
        model.fit(X_train, y_train)
    seconds = time.perf_counter() - start
    accuracy, loss = scores(model)
    evals = f"{model.solver_stats(X_test)['n_evals'].mean():.1f}" if isinstance(model, ODENetClassifier) else "-"
    print(f"{name:<20}{accuracy:>10.4f}{loss:>10.4f}{n_parameters(model):>12,}{seconds:>12.1f}{evals:>13}")

# %%
# Accuracy against cost, after the fit
# ------------------------------------
# The depth of the network is the solver's choice, so its precision can be changed without a refit: coarse where time or
# power is short, fine where it is not. Evaluations are summed over the averaged networks. Training favours fields
# that are easy to solve, so coarse predictions hardly differ from fine ones.

ode = models["ODENetClassifier"]
tolerances = [1e-1, 1e-2, 1e-4, 1e-6]
accuracies, losses, costs, probabilities = [], [], [], []
for rtol in tolerances:
    ode.set_params(rtol=rtol, atol=rtol / 10)
    accuracy, loss = scores(ode)
    accuracies.append(accuracy)
    losses.append(loss)
    costs.append(ode.solver_stats(X_test)["n_evals"].mean())
    probabilities.append(ode.predict_proba(X_test))
print(f"\n{'rtol':<8}{'atol':<8}{'accuracy':>10}{'log-loss':>10}{'evals a row':>13}{'largest probability change':>29}")
for i, rtol in enumerate(tolerances):
    change = np.abs(probabilities[i] - probabilities[-1]).max()
    told = f"{change:.1e}" if i + 1 < len(tolerances) else "(reference)"
    print(f"{rtol:<8.0e}{rtol / 10:<8.0e}{accuracies[i]:>10.4f}{losses[i]:>10.4f}{costs[i]:>13.1f}{told:>29}")

# %%
# The hidden state on its way
# ---------------------------
# The ODE block carries each image's hidden state from t = 0 (ring) to t = 1 (dot), where a linear layer reads the
# class. The plane is that of the first two principal components of one network's paths, which
# are nearly straight: that is what makes them cheap to solve.

CLASSES, ROWS_PER_CLASS = (0, 1, 4, 7), 10
chosen = np.concatenate([np.flatnonzero(y_test == digit)[:ROWS_PER_CLASS] for digit in CLASSES])
paths = ode.trajectory(X_test[chosen], np.linspace(0, 1, 41))
plane = PCA(2).fit(paths.reshape(-1, paths.shape[2]))
flat = plane.transform(paths.reshape(-1, paths.shape[2])).reshape(*paths.shape[:2], 2)


def plot_cost(axes: Axes) -> None:
    """Accuracy and evaluations against the tolerance."""
    axes.semilogx(tolerances, accuracies, "o-", color="C0")
    axes.set(xlabel="rtol of the prediction", title="After one fit: accuracy and cost by tolerance")
    axes.set_ylabel("test accuracy", color="C0")
    axes.set_ylim(0.9, 1.0)
    axes.tick_params(axis="y", colors="C0")
    axes.invert_xaxis()
    cost = axes.twinx()
    cost.semilogx(tolerances, costs, "s--", color="C1")
    cost.set_ylabel("evaluations a row", color="C1")
    cost.set_ylim(0, 1.1 * max(costs))
    cost.tick_params(axis="y", colors="C1")
    axes.minorticks_off()
    cost.minorticks_off()


def plot_paths(axes: Axes) -> None:
    """Paths of the hidden state in the plane, a colour a class."""
    for color, digit in enumerate(CLASSES):
        own = flat[y_test[chosen] == digit]
        axes.plot(own[:, :, 0].T, own[:, :, 1].T, color=f"C{color}", alpha=0.5, linewidth=1)
        axes.plot(own[:, 0, 0], own[:, 0, 1], "o", color=f"C{color}", markersize=4, fillstyle="none")
        axes.plot(own[:, -1, 0], own[:, -1, 1], "o", color=f"C{color}", markersize=5, label=f"digit {digit}")
    axes.set(xlabel="first component", ylabel="second component", title="Hidden states from t = 0 (ring) to 1 (dot)")
    axes.legend(frameon=False)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
plot_cost(left)
plot_paths(right)
if plt.get_backend().lower() == "agg":
    picture = Path(tempfile.gettempdir()) / "skode_quickstart.png"
    figure.savefig(picture, dpi=120)
    print(f"\npicture: {picture}")
plt.show()
