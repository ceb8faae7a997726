"""The three pictures of the first page: ``python docs/figures/home.py`` (under a minute on one core)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons

from skode import ContinuousFlowDensity, LatentODERegressor, ODENetClassifier, Panel

HERE = Path(__file__).resolve().parent
GRID = np.stack(np.meshgrid(np.linspace(-1.7, 2.7, 120), np.linspace(-1.2, 1.7, 90)), axis=-1)


def save(figure: plt.Figure, name: str) -> None:
    """Write one picture beside this script."""
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)


def classifier() -> None:
    """Class probabilities of two moons, and where the classifier is undecided."""
    X, y = make_moons(400, noise=0.2, random_state=0)
    model = ODENetClassifier(random_state=0).fit(X, y)
    probability = model.predict_proba(GRID.reshape(-1, 2))[:, 1].reshape(GRID.shape[:2])
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    axes.contourf(*GRID.transpose(2, 0, 1), probability, 20, cmap="RdBu_r", vmin=-0.4, vmax=1.4)
    axes.contour(*GRID.transpose(2, 0, 1), probability, [0.5], colors="black", linewidths=1)
    axes.scatter(*X.T, c=np.where(y == 1, "darkred", "navy"), s=9, edgecolors="white", linewidths=0.4)
    axes.set(xticks=[], yticks=[], title="probability of a class")
    save(figure, "home_classifier.png")


def density() -> None:
    """The density of two moons, with rows drawn from it."""
    X, _ = make_moons(1500, noise=0.1, random_state=0)
    model = ContinuousFlowDensity(random_state=0).fit(X)
    height = np.exp(model.score_samples(GRID.reshape(-1, 2))).reshape(GRID.shape[:2])
    drawn = model.sample(150, random_state=0)
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    axes.pcolormesh(*GRID.transpose(2, 0, 1), height, cmap="viridis", shading="gouraud", rasterized=True)
    axes.plot(*drawn.T, ".", color="white", markersize=2.5)
    axes.set(xticks=[], yticks=[], xlim=(-1.7, 2.7), ylim=(-1.2, 1.7), title="density, and new rows (white)")
    save(figure, "home_density.png")


def series() -> None:
    """Three irregular series, predicted between and after their observations."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 6, (63, 12)), axis=1)
    phase, size = rng.uniform(0, 2 * np.pi, (63, 1)), rng.uniform(0.6, 1.4, (63, 1))
    values = size * np.sin(1.5 * times + phase) + 0.1 * rng.normal(size=times.shape)
    panel = Panel.from_dense(values[:, :, np.newaxis], times=times, origin=0.0)
    model = LatentODERegressor(random_state=0).fit(panel[:60])
    grid = np.linspace(0, 9, 91)
    bands = model.predict(panel[60:], times=grid, quantiles=[0.1, 0.5, 0.9])
    figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
    for i, band in enumerate(bands[:, :, 0]):
        shift = -3 * i
        axes.fill_between(grid, band[:, 0] + shift, band[:, 2] + shift, color=f"C{i}", alpha=0.25, linewidth=0)
        axes.plot(grid, band[:, 1] + shift, color=f"C{i}")
        axes.plot(times[60 + i], values[60 + i] + shift, "o", color=f"C{i}", markersize=4)
    axes.axvline(6, color="grey", linewidth=0.8, linestyle=":")
    axes.set(yticks=[], xlabel="time", title="new series, and what comes (80 % bands)")
    save(figure, "home_series.png")


if __name__ == "__main__":
    classifier()
    density()
    series()
