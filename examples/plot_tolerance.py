"""
Accuracy against evaluations, by tolerance
==========================================

In a neural ODE the number of "layers" is the solver's choice: it evaluates the learned field as often as its tolerance
``rtol`` demands. This example shows what a digit of precision costs (Figure 3 of `Chen et al. 2018
<https://arxiv.org/abs/1806.07366>`_), that the price can be chosen after the fit, and how to search for it with
scikit-learn's tools.
"""

# %%
# One fit, many tolerances
# ------------------------
# Two networks are fitted to the digits. The second goes without ``error_penalty``, the term by which skode keeps
# networks easy to solve; it is closer to the paper's network.

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, train_test_split

from skode import ODENetClassifier
from skode.displays import ToleranceDisplay

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, train_size=600, stratify=y, random_state=0)
models = {
    "with error_penalty (default)": ODENetClassifier(n_members=1, random_state=0),
    "without": ODENetClassifier(n_members=1, error_penalty=0, random_state=0),
}


def sweep(model: ODENetClassifier, tolerances: np.ndarray) -> pd.DataFrame:
    """Error, accuracy and cost of a fitted model by tolerance."""
    exact = model.set_params(method="dopri8", rtol=1e-11, atol=1e-12).predict_proba(X_test)
    rows = []
    for rtol in tolerances:
        model.set_params(method="tsit5", rtol=rtol, atol=rtol / 10)
        probabilities = model.predict_proba(X_test)
        rows.append(
            {
                "rtol": rtol,
                "evaluations a row": model.solver_stats(X_test)["n_evals"].mean(),
                "largest probability error": np.abs(probabilities - exact).max(),
                "accuracy": (model.classes_[probabilities.argmax(axis=1)] == y_test).mean(),
            }
        )
    return pd.DataFrame(rows)


tolerances = np.logspace(-1, -8, 8)
sweeps = {}
for name, model in models.items():
    model.fit(X_train, y_train)
    sweeps[name] = sweep(model, tolerances)
    print(f"{name}\n{sweeps[name].to_string(index=False, float_format='{:.2g}'.format)}\n")

# %%
# No refit happened in between: ``set_params(rtol=...)`` acts on the next prediction. Errors of the solver shrink with
# the tolerance by many orders of magnitude, while the accuracy hardly notices.

# %%
# A grid of tolerances
# --------------------
# The tolerance also rules the training. ``rtol`` is an ordinary parameter, so a grid search takes it as any other.

grid = GridSearchCV(
    ODENetClassifier(n_members=1, max_iter=20, random_state=0),
    {"rtol": [1e-1, 1e-2, 1e-3, 1e-4]},
    scoring="neg_log_loss",
    cv=3,
).fit(X_train, y_train)
found = pd.DataFrame(grid.cv_results_)
print(found[["param_rtol", "mean_test_score", "std_test_score", "mean_fit_time"]].to_string(index=False))

# %%
# Successive halving
# ------------------
# Where there are more candidates than time, ``HalvingGridSearchCV`` gives all of them a few rows and the better ones
# more. Fits that are cut short warn that their loss still falls; that is the idea here.

halving = HalvingGridSearchCV(
    ODENetClassifier(n_members=1, max_iter=20, random_state=0),
    {"rtol": [1e-1, 1e-3], "hidden_layer_sizes": [8, 64]},
    min_resources=150,
    factor=2,
    cv=3,
    scoring="neg_log_loss",
    random_state=0,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)
    halving.fit(X_train, y_train)
history = pd.DataFrame(halving.cv_results_)
print(f"candidates in each round: {halving.n_candidates_}, rows: {halving.n_resources_}")
print(f"best: {halving.best_params_}, test accuracy {halving.best_estimator_.score(X_test, y_test):.3f}")

# %%
# The picture
# -----------
# Left: a digit of precision costs a few evaluations more, and a network trained to be easy needs fewer for the same
# precision. Middle: models that were trained at each tolerance; the folds (band) differ about as much as the
# tolerances do. Right: the rounds of the halving search.

BLUE, ORANGE = "#0072B2", "#D55E00"
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
for (name, table), color in zip(sweeps.items(), (BLUE, ORANGE), strict=True):
    left.semilogy(table["evaluations a row"], table["largest probability error"], "o-", color=color, label=name)
for _, row in sweeps["without"].iloc[[0, 4, 6]].iterrows():
    spot = row["evaluations a row"], row["largest probability error"]
    left.annotate(f"rtol {row['rtol']:.0e}", spot, xytext=(6, 3), textcoords="offset points", fontsize=8)
left.set(xlabel="evaluations a row", ylabel="largest error of a probability", title="After the fit: precision and cost")
left.margins(x=0.15)
left.legend(frameon=False, fontsize=8)

ToleranceDisplay.from_cv_results(grid.cv_results_, cost="fit_time", ax=middle)
middle.set_title("GridSearchCV: score and cost")

searched = ["param_rtol", "param_hidden_layer_sizes"]
for candidate, rounds in history.groupby(searched):
    best = candidate == (halving.best_params_["rtol"], halving.best_params_["hidden_layer_sizes"])
    style = {"color": BLUE, "linewidth": 2, "label": "best", "zorder": 3} if best else {"color": "0.7"}
    right.plot(rounds["n_resources"], -rounds["mean_test_score"], "o-", markersize=4, **style)
right.set(xscale="log", xlabel="rows", ylabel="log-loss", title="HalvingGridSearchCV")
right.set_xticks(halving.n_resources_, [str(n) for n in halving.n_resources_])
right.minorticks_off()
right.legend(frameon=False)
plt.show()
