"""Figures for flows_vs_paper.py: densities matched, and the way from noise to data. Written to docs/figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from planar_flow import POTENTIALS, PlanarFlow, Toy, grid, log_normal
from torch import Tensor, nn

from skode.fields import FlowField, PlanarField
from skode.solver import solve

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
N_POINTS = 800


def carried(field: nn.Module, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Where a continuous flow takes points, and the integral of its divergence."""
    if start == end:
        return y, y.new_zeros(len(y))
    assert isinstance(field, PlanarField | FlowField)
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "step_control": "batch", "n_quadratures": 1}
    solution = solve(field.dynamics(), y, [start, end], **options)
    assert solution.quadratures is not None
    return solution.y1, solution.quadratures[:, -1, 0]


def _write(figure: Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / name
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.relative_to(FOLDER.parents[1])}: {path.stat().st_size / 1024:.0f} kB")


def _show(ax: Axes, log_density: Tensor, side: float) -> None:
    """A density on a square grid around 0, white where there is none."""
    n = round(len(log_density) ** 0.5)
    values = log_density.exp().reshape(n, n).numpy()
    ax.imshow(values, origin="lower", extent=(-side, side, -side, side), cmap="Blues", vmin=0, vmax=values.max())


def _bare(axes: NDArray[Any], rows: Sequence[str], columns: Sequence[str]) -> None:
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(label, fontsize=9)
    for ax, label in zip(axes[0], columns, strict=True):
        ax.set_title(label, fontsize=9)


# --- density matching ---


@torch.no_grad()
def matched_density(flow: nn.Module, y: Tensor) -> Tensor:
    """Log-density of a flow that was trained from the base to the potential: back from the points."""
    if isinstance(flow, PlanarFlow):
        z = flow.inverse(y)
        return log_normal(z) - flow(z)[1]
    z, change = carried(flow, y, 1.0, 0.0)
    return log_normal(z) + change


def draw_matching(
    flows: Mapping[tuple[str, str, int], nn.Module],
    kinds: Mapping[str, str],
    targets: Sequence[str],
    sizes: Sequence[int],
    side: float = 4.5,
) -> None:
    """The paper's figure 4: the target, then each kind of flow in all sizes."""
    columns = ["target", *(f"{label} = {size}" for label in kinds.values() for size in sizes)]
    figure, axes = plt.subplots(
        len(targets), len(columns), figsize=(9, 1.35 * len(targets) + 0.3), layout="constrained"
    )
    y = grid(-side, side, 150)
    for target, row in zip(targets, axes, strict=True):
        _show(row[0], -POTENTIALS[target](y), side)
        pairs = [(kind, size) for kind in kinds for size in sizes]
        for ax, (kind, size) in zip(row[1:], pairs, strict=True):
            _show(ax, matched_density(flows[target, kind, size], y), side)
    _bare(axes, [f"potential {target}" for target in targets], columns)
    _write(figure, "flows_density_matching.png")


# --- the way from noise to data ---


class _Continuous:
    """States of a fitted ContinuousFlowDensity, whose public methods know the whole way only."""

    def __init__(self, density: Any) -> None:
        flow = density._flows[0].build(torch.float64, torch.device("cpu"))
        self.field, self.base = flow.field, flow.base

    @torch.no_grad()
    def points(self, z: Tensor, t: float) -> Tensor:
        """Points of the base at time t."""
        return carried(self.field, z, 0.0, t)[0]

    @torch.no_grad()
    def log_density(self, y: Tensor, t: float) -> Tensor:
        """At time t."""
        z, change = carried(self.field, y, t, 0.0)
        return self.base.log_density(z) + change


class _Layered:
    """The same of a planar flow from data to base: t is the share of the layers that have been undone."""

    def __init__(self, flow: PlanarFlow) -> None:
        self.flow = flow

    def _first(self, t: float) -> int:
        return round((1 - t) * len(self.flow.w))

    def points(self, z: Tensor, t: float) -> Tensor:
        """Points of the base at time t."""
        first = self._first(t)
        return self.flow.inverse(z, first) if first < len(self.flow.w) else z

    @torch.no_grad()
    def log_density(self, y: Tensor, t: float) -> Tensor:
        """At time t."""
        first = self._first(t)
        z, log_det = self.flow(y, first)
        return log_normal(z) + log_det


def draw_likelihood(name: str, toy: Toy, density: Any, planar: Any, side: float = 3.0) -> None:
    """The paper's figure 5: densities and points from noise, at t = 0, to the data, which are standardised."""
    z = torch.randn(N_POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = grid(-side, side, 150)
    X = toy.draw(20_000, 0)
    true = torch.from_numpy(toy.log_density(y.numpy() * X.std(0) + X.mean(0)) + np.log(X.std(0)).sum())
    figure, axes = plt.subplots(4, len(TIMES) + 1, figsize=(9, 6.3), layout="constrained")
    layers = len(planar.flow.w)
    for row, flow in ((0, _Continuous(density)), (2, _Layered(planar.flow))):
        for ax, below, t in zip(axes[row], axes[row + 1], TIMES, strict=False):
            _show(ax, flow.log_density(y, t), side)
            points = flow.points(z, t)
            below.plot(points[:, 0], points[:, 1], ".", color="tab:blue", markersize=1.2)
            below.set(xlim=(-side, side), ylim=(-side, side), aspect="equal")
        _show(axes[row, -1], true, side)
        own = (toy.draw(N_POINTS, 1) - X.mean(0)) / X.std(0)
        axes[row + 1, -1].plot(own[:, 0], own[:, 1], ".", color="black", markersize=1.2)
        axes[row + 1, -1].set(xlim=(-side, side), ylim=(-side, side), aspect="equal")
    columns = [*(f"t = {t:g}" for t in TIMES), "data"]
    _bare(axes, ["CNF density", "CNF points", "NF density", "NF points"], columns)
    for ax, t in zip(axes[2], TIMES, strict=False):
        ax.set_title(f"{round(t * layers)} layers", fontsize=9)
    _write(figure, f"flows_{name}.png")
