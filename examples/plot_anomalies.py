"""
Anomaly detection: nines among the fours
========================================

A density tells how ordinary a row is, so the least likely rows are the anomalies. :class:`skode.ContinuousFlowDensity`
is a scikit-learn outlier detector: here it learns what a handwritten four looks like, and finds the nines among new
ones.
"""

# %%
# The data
# --------
# Real images of 8 x 8 pixels, summed up by 16 principal components. Two thirds of the fours are for training; the
# others are mixed with nines.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import OneClassSVM

from skode import ContinuousFlowDensity
from skode.displays import DensityDisplay

X, y = load_digits(return_X_y=True)
train, ordinary = train_test_split(X[y == 4], test_size=1 / 3, random_state=0)
nines = X[y == 9][:60]
test = np.concatenate([ordinary, nines])
is_nine = np.repeat([False, True], [len(ordinary), len(nines)])
print(f"{len(train)} fours in training; {len(ordinary)} fours and {len(nines)} nines to be told apart")

# %%
# Four detectors
# --------------
# They see fours only. (Were nines hidden among the training rows, a flexible density could learn them as well; clean
# training rows matter.) Low values of ``score_samples`` stand for anomalies.

detectors = {
    "ContinuousFlowDensity": ContinuousFlowDensity(contamination=0.05, random_state=0),
    "GaussianMixture": GaussianMixture(random_state=0),
    "OneClassSVM": OneClassSVM(),
    "IsolationForest": IsolationForest(random_state=0),
}
models = {name: make_pipeline(PCA(16, random_state=0), detector).fit(train) for name, detector in detectors.items()}
scores = {name: model.score_samples(test) for name, model in models.items()}
for name, score in scores.items():
    print(f"{name:<22} area under the ROC curve {roc_auc_score(is_nine, -score):.3f}")

# %%
# ``contamination`` is the share of the training rows that ``predict`` is to call outliers; it sets the threshold
# ``offset_``.

flagged = models["ContinuousFlowDensity"].predict(test) == -1
print(
    f"flagged: {(flagged & is_nine).sum()} of {len(nines)} nines, {(flagged & ~is_nine).sum()} of {len(ordinary)} fours"
)

# %%
# Log-densities have a unit (nats), unlike most outlier scores: a difference of one means e times less likely. Left: how
# they are distributed. Right: the learned density in the plane of the first two components, and the new images. Many
# nines look like fours in this plane; it is in all 16 components that they are unlikely. Below: images at both ends.

FOUR, NINE = "#0072B2", "#D55E00"
pca, flow = models["ContinuousFlowDensity"]
density = scores["ContinuousFlowDensity"]
figure = plt.figure(figsize=(11, 5.4), layout="constrained")
curves, images = figure.subfigures(2, 1, height_ratios=(4, 1))
left, right = curves.subplots(1, 2)
bins = np.linspace(max(density.min(), np.median(density) - 40), density.max(), 30)
left.hist(np.clip(density[~is_nine], bins[0], None), bins, color=FOUR, alpha=0.7, label="fours")
left.hist(np.clip(density[is_nine], bins[0], None), bins, color=NINE, alpha=0.8, label="nines")
left.axvline(flow.offset_, color="black", linestyle="--", linewidth=1, label="threshold")
left.set(xlabel="log-density, nats", ylabel="images", title="Nines are unlikely fours")
left.legend(frameon=False, loc="upper left")
DensityDisplay.from_estimator(flow, grid_resolution=60, ax=right, cmap="Greys", alpha=0.5)
for rows, color, marker in ((~is_nine, FOUR, "o"), (is_nine, NINE, "^")):
    right.scatter(*pca.transform(test[rows])[:, :2].T, s=14, color=color, marker=marker)
right.set(xlabel="component 1", ylabel="component 2", title="The density in two of 16 dimensions")

N_IMAGES = 9
order = np.argsort(density)
strange, usual = images.subfigures(1, 2)
for part, rows, title in ((strange, order[:N_IMAGES], "the least likely"), (usual, order[-N_IMAGES:], "the likeliest")):
    part.suptitle(title, fontsize=10)
    for ax, row in zip(part.subplots(1, N_IMAGES), rows, strict=True):
        ax.imshow(test[row].reshape(8, 8), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set(color=NINE if is_nine[row] else FOUR, linewidth=2)
plt.show()
