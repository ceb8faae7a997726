"""
Spirals seen in glimpses: a latent ODE
======================================

Each of these spirals is seen a few dozen times, at moments of its own and through noise.
:class:`skode.LatentODERegressor` learns from many of them what a spiral is, then draws each one whole and goes on where
its observations end (Figure 8 of `Chen et al. 2018 <https://arxiv.org/abs/1806.07366>`_).
"""

# %%
# The data
# --------
# Half of the spirals turn clockwise. 30 of 100 points are observed. For the test series we also know the 100 points
# that follow.

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from skode import LatentODERegressor, Panel
from skode.datasets import make_spirals

train = make_spirals(n_series=200, n_observed=30, noise=0.1, random_state=0)
test = make_spirals(n_series=40, n_observed=30, noise=0.1, subset="test", random_state=1)
panels = [Panel.from_dense(part.values, part.times) for part in (train, test)]
print(f"{panels[0].shape[0]} series, {np.isfinite(panels[0].values).all(axis=1).sum()} observed points")

# %%
# The model
# ---------
# Nothing is resampled or imputed: an encoder reads the points that are there, the learned equation carries the hidden
# state through any time, a decoder turns it into coordinates. Fewer updates than the default keep this example short.

model = LatentODERegressor(max_iter=350, random_state=0).fit(panels[0])
inside = model.predict(panels[1], times=test.times)
ahead, ahead_std = model.predict(panels[1], times=test.times_ahead, return_std=True)


def rmse(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square distance of a coordinate from the curve without noise."""
    return float(np.sqrt(np.mean((prediction - truth) ** 2)))


print(f"noise of a coordinate 0.10; error inside of the window {rmse(inside, test.clean):.2f}")
for name, points in (("first", slice(0, 25)), ("next", slice(25, 50)), ("last", slice(50, 100))):
    print(
        f"error ahead, {name} {points.stop - points.start} points: {rmse(ahead[:, points], test.ahead[:, points]):.2f}"
    )

# %%
# Six spirals that were not in the training. The model saw the dots. The dashed line is the truth that follows.

SEEN, AHEAD = "#0072B2", "#D55E00"


def plot_spiral(ax: Axes, i: int) -> None:
    """One test series: observations, reconstruction, forecast and truth."""
    truth = np.concatenate([test.clean[i], test.ahead[i]])
    ax.plot(*truth.T, "--", color="0.6", linewidth=1.5, label="truth")
    ax.plot(*inside[i].T, color=SEEN, linewidth=2, label="reconstruction")
    ax.plot(*ahead[i].T, color=AHEAD, linewidth=2, label="forecast")
    ax.plot(*test.values[i].T, "o", color="black", markersize=3, label="observed")
    ax.set(xticks=[], yticks=[], aspect="equal", title="clockwise" if test.clockwise[i] else "counter-clockwise")
    ax.title.set_fontsize(9)


shown = np.concatenate([np.flatnonzero(~test.clockwise)[:3], np.flatnonzero(test.clockwise)[:3]])
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for ax, i in zip(axes.flat, shown, strict=True):
    plot_spiral(ax, i)
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
plt.show()
