"""
A decision boundary as the state flows
======================================

A neural ODE does not cut the plane into pieces: it bends the plane, as if it were drawn on rubber, until a straight
line can cut it. Here we look at the plane on its way, and at a shape that cannot be bent apart without one more
dimension.
"""

# %%
# A state with two dimensions
# ---------------------------
# By default :class:`skode.ODENetClassifier` lifts each row to a larger hidden state and averages several networks.
# For a picture we want the hidden state to be the plane itself: one network (``n_members=1``), plain standardised
# inputs, and nothing appended to them (``augment_dim=0``).

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.datasets import make_circles, make_moons
from sklearn.model_selection import train_test_split

from skode import ODENetClassifier

SETTINGS = {"n_members": 1, "input_encoding": "standard", "random_state": 0}
FINE = {"rtol": 1e-4, "atol": 1e-5}  # for smooth pictures, after the fit
X, y = make_moons(400, noise=0.15, random_state=0)
X_train, X_test, y_train, y_test = train_test_split(X, y, random_state=0)
model = ODENetClassifier(augment_dim=0, **SETTINGS).fit(X_train, y_train).set_params(**FINE)
print(f"two moons, test accuracy: {model.score(X_test, y_test):.2f}")

# %%
# ``trajectory(X, t)`` gives the hidden state of each row at the times ``t``. We ask for that of a grid that covers the
# plane, coloured by the probability that is predicted in the end. At t = 0 the colours show the decision boundary in
# the space of the inputs; at t = 1 it has become a straight line.

SIDE = np.linspace(-2.4, 2.4, 61)
COLORS = np.array(["#0072B2", "#D55E00"])


def grid_around(X: np.ndarray) -> np.ndarray:
    """Points of a square grid that covers the standardised plane, in the units of X."""
    plane = np.stack(np.meshgrid(SIDE, SIDE), axis=-1).reshape(-1, 2)
    return X.mean(axis=0) + X.std(axis=0) * plane


def plot_plane(ax: Axes, grid: np.ndarray, probability: np.ndarray, points: np.ndarray, labels: np.ndarray) -> None:
    """The bent grid, coloured by probability, and the data on it."""
    n = len(SIDE)
    a, b = grid[:, :2].T.reshape(2, n, n)
    ax.pcolormesh(a, b, probability.reshape(n, n), cmap="RdBu_r", vmin=-0.2, vmax=1.2, shading="gouraud")
    ax.plot(a[::6].T, b[::6].T, a[:, ::6], b[:, ::6], color="white", linewidth=0.6)
    ax.scatter(*points[:, :2].T, c=COLORS[labels], s=10, edgecolor="white", linewidth=0.3, zorder=3)
    ax.set(xticks=[], yticks=[])


times = np.array([0.0, 0.35, 0.7, 1.0])
grid = grid_around(X_train)
moons_grid, moons_points = model.trajectory(grid, times), model.trajectory(X_test, times)
moons_probability = model.predict_proba(grid)[:, 1]

# %%
# What bending cannot do
# ----------------------
# Paths of an ODE never cross, so a disc inside of a ring stays inside. Two circles therefore cannot be parted in two
# dimensions: the network tears at the plane and still leaks. With a third dimension (``augment_dim=1``) the inner
# circle is simply lifted out.

X, y = make_circles(400, noise=0.08, factor=0.4, random_state=0)
X_train, X_test, y_train, y_test_circles = train_test_split(X, y, random_state=0)
flat = ODENetClassifier(augment_dim=0, **SETTINGS).fit(X_train, y_train).set_params(**FINE)
lifted = ODENetClassifier(augment_dim=1, max_iter=200, **SETTINGS).fit(X_train, y_train).set_params(**FINE)
for name, circles in {"two dimensions": flat, "three dimensions": lifted}.items():
    stats = circles.solver_stats(X_test)
    print(
        f"circles in {name}: test accuracy {circles.score(X_test, y_test_circles):.2f}, "
        f"{stats['n_evals'].mean():.0f} evaluations a row"
    )

# %%
# The first row shows the moons on their way, the second the circles before the flow, after a flow in the plane, and
# one in space, seen from the side: all begin at 0 of the appended dimension.

figure, axes = plt.subplots(2, 4, figsize=(11, 5.5), layout="constrained")
for ax, i in zip(axes[0], range(len(times)), strict=True):
    plot_plane(ax, moons_grid[:, i], moons_probability, moons_points[:, i], y_test)
    ax.set_title(f"moons, t = {times[i]:.2g}")

grid = grid_around(X_train)
for ax, circles, i, title in (
    (axes[1, 0], flat, 0, "circles, t = 0"),
    (axes[1, 1], flat, -1, "t = 1, two dimensions"),
):
    ends = [circles.trajectory(rows, [0.0, 1.0])[:, i] for rows in (grid, X_test)]
    plot_plane(ax, ends[0], circles.predict_proba(grid)[:, 1], ends[1], y_test_circles)
    ax.set_title(title)

grid_spec = axes[1, 2].get_gridspec()
for ax in axes[1, 2:]:
    ax.remove()
side_view = figure.add_subplot(grid_spec[1, 2:])
paths = lifted.trajectory(X_test, np.linspace(0, 1, 31))
for path, label in zip(paths, y_test_circles, strict=True):
    side_view.plot(path[:, 0], path[:, 2], color=COLORS[label], alpha=0.4, linewidth=0.8)
side_view.scatter(paths[:, -1, 0], paths[:, -1, 2], c=COLORS[y_test_circles], s=10, zorder=3)
side_view.set(xticks=[], yticks=[], title="circles: paths in three dimensions", ylabel="appended dimension")
plt.show()
