"""
Second-order dynamics: paths that may cross
===========================================

With ``order=1`` the network learns the velocity of the hidden state, and two paths can never pass through the same
point at the same time. With ``order=2`` it learns the acceleration, as forces do in physics: each row then has a
velocity of its own and may fly past the others. What that buys shows on a disc inside of a ring.
"""

# %%
# Two fits
# --------
# One network, and a hidden state that is the standardised plane itself (``augment_dim=0``). For ``order=2`` the state
# has a velocity besides the position, and the classes are read off both.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_circles
from sklearn.model_selection import train_test_split

from skode import ODENetClassifier

X, y = make_circles(500, noise=0.08, factor=0.4, random_state=0)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
models = {
    order: ODENetClassifier(
        order=order, augment_dim=0, n_members=1, input_encoding="standard", max_iter=200, tol=1e-3, random_state=0
    ).fit(X_train, y_train)
    for order in (1, 2)
}
for order, model in models.items():
    model.set_params(rtol=1e-4, atol=1e-5)  # smooth curves for the picture; no refit
    print(
        f"order={order}: test accuracy {model.score(X_test, y_test):.3f}, {model.n_parameters_} parameters, "
        f"{model.solver_stats(X_test)['n_evals'].mean():.1f} evaluations a row"
    )

# %%
# The paths
# ---------
# ``trajectory`` gives positions and then velocities: the first two columns are the place in the plane. With ``order=1``
# the ring has to be bent open to let the disc out, and still some of its rows stay behind. With ``order=2`` hardly
# anything moves: the classes part by their velocities, which all begin at the same value.

COLORS = np.array(["#0072B2", "#D55E00"])
times = np.linspace(0, 1, 41)
figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
for ax, (order, model) in zip(axes, models.items(), strict=False):
    places = model.trajectory(X_test, times)[:, :, :2]
    for path, label in zip(places, y_test, strict=True):
        ax.plot(*path.T, color=COLORS[label], alpha=0.35, linewidth=0.8)
    ax.scatter(*places[:, -1].T, c=COLORS[y_test], s=12, zorder=3)
    ax.set(title=f"order={order}: paths from t = 0 to 1 (dot)", xticks=[], yticks=[])

velocities = models[2].trajectory(X_test, times)[:, :, 2:]
for label, name in enumerate(("ring", "disc")):
    own = velocities[y_test == label]
    axes[2].plot(*own.transpose(2, 1, 0), color=COLORS[label], alpha=0.35, linewidth=0.8)
    axes[2].scatter(*own[:, -1].T, color=COLORS[label], s=12, label=name, zorder=3)
axes[2].set(title="order=2: velocities", xticks=[], yticks=[])
axes[2].legend(frameon=False)
plt.show()
