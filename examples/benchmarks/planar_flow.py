"""The planar normalizing flow (Rezende & Mohamed 2015, arXiv:1505.05770), and targets whose densities are known.

Symbols: layer k maps z to z + u_k tanh(w_k . z + b_k); U a potential, exp(-U) its density up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import make_circles, make_moons
from torch import Tensor, nn
from torch.nn import functional as F

Array = NDArray[np.float64]
IDENTITY = math.log(math.e - 1)  # softplus of it is 1


class PlanarFlow(nn.Module):
    """Layers z + u tanh(w . z + b), which start near the identity; one direction is cheap, the other is a search."""

    def __init__(self, n_layers: int, generator: torch.Generator, n_dims: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_layers, n_dims, generator=generator))
        self.b = nn.Parameter(torch.randn(n_layers, generator=generator))
        self.u = nn.Parameter(0.1 * torch.randn(n_layers, n_dims, generator=generator))

    def _opened(self) -> tuple[Tensor, Tensor]:
        """The u of invertible layers (their appendix A.1; shifted, so that u = 0 stays 0), and 1 + w . u > 0 (K,)."""
        along = (self.w * self.u).sum(1)
        opened = F.softplus(along + IDENTITY)
        return self.u + ((opened - 1 - along) / self.w.square().sum(1)).unsqueeze(1) * self.w, opened

    def forward(self, z: Tensor, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Where layers ``first`` to ``last`` take the points (n, d), and the log-determinants (n,)."""
        directions, opened = self._opened()
        u, w, b = (x[first:last].unbind() for x in (directions, self.w, self.b))
        hs = []
        for u_k, w_k, b_k in zip(u, w, b, strict=True):
            h = torch.tanh(torch.addmv(b_k, z, w_k))
            z = torch.addr(z, h, u_k)
            hs.append(h)
        if not hs:
            return z, z.new_zeros(len(z))
        # 1 + (1 - h^2) w . u as a sum of positive terms: round-off cannot make it 0 or less.
        bent = torch.stack(hs).square()
        return z, torch.log(bent + (1 - bent) * opened[first:last].unsqueeze(1)).sum(0)

    @torch.no_grad()
    def inverse(self, y: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Back through layers ``last`` to ``first``: w . z is found by bisection."""
        u, w, b = (x[first:last] for x in (self._opened()[0], self.w, self.b))
        for u_k, w_k, b_k in zip(u.flip(0), w.flip(0), b.flip(0), strict=True):
            goal, overlap = y @ w_k, u_k @ w_k
            low, high = goal - overlap.abs(), goal + overlap.abs()
            for _ in range(60):
                middle = (low + high) / 2
                above = middle + overlap * torch.tanh(middle + b_k) > goal
                low, high = torch.where(above, low, middle), torch.where(above, middle, high)
            y = y - torch.outer(torch.tanh(low + b_k), u_k)
        return y


def log_normal(z: Tensor) -> Tensor:
    """Log-density of N(0, I)."""
    return -0.5 * z.square().sum(1) - 0.5 * math.log(2 * math.pi) * z.shape[1]


# --- two moons and two circles ---


class Toy(NamedTuple):
    """Curves, each passed at uniform speed, and the noise around them."""

    draw: Callable[[int, int], Array]
    curves: Array
    noise: float

    def log_density(self, X: Array) -> Array:
        """By quadrature over the curves."""
        parts = []
        for block in np.array_split(X, max(1, len(X) // 2000)):
            joint = -((block[:, None] - self.curves) ** 2).sum(2) / (2 * self.noise**2)
            parts.append(np.logaddexp.reduce(joint, axis=1))
        log_constant = math.log(len(self.curves) * 2 * math.pi * self.noise**2)
        return np.concatenate(parts) - log_constant


def toys() -> dict[str, Toy]:
    """Scikit-learn's generators."""
    middle = (np.arange(400) + 0.5) / 400
    half = np.column_stack([np.cos(np.pi * middle), np.sin(np.pi * middle)])
    circle = np.column_stack([np.cos(2 * np.pi * middle), np.sin(2 * np.pi * middle)])
    moons = np.concatenate([half, [1, 0.5] - half])
    return {
        "moons": Toy(lambda n, seed: make_moons(n, noise=0.1, random_state=seed)[0], moons, 0.1),
        "circles": Toy(
            lambda n, seed: make_circles(n, noise=0.06, factor=0.5, random_state=seed)[0],
            np.concatenate([circle, circle / 2]),
            0.06,
        ),
    }


# --- the potentials of Rezende & Mohamed, table 1 ---


def _wave(z: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * z[:, 0])


def _wall(z: Tensor) -> Tensor:
    """Potentials 2 to 4 have no finite mass; beyond abs(z_1) = 4 this gives them one."""
    return 0.5 * ((z[:, 0].abs() - 4).clamp(min=0) / 0.4).square()


def _either(a: Tensor, b: Tensor) -> Tensor:
    return -torch.logaddexp(-0.5 * a.square(), -0.5 * b.square())


def _ring(z: Tensor) -> Tensor:
    radius = (z.square().sum(1) + 1e-12).sqrt()
    return 0.5 * ((radius - 2) / 0.4).square() + _either((z[:, 0] - 2) / 0.6, (z[:, 0] + 2) / 0.6)


def _sine(z: Tensor) -> Tensor:
    return 0.5 * ((z[:, 1] - _wave(z)) / 0.4).square() + _wall(z)


def _bump(z: Tensor) -> Tensor:
    off, apart = z[:, 1] - _wave(z), 3 * torch.exp(-0.5 * ((z[:, 0] - 1) / 0.6).square())
    return _either(off / 0.35, (off + apart) / 0.35) + _wall(z)


def _fork(z: Tensor) -> Tensor:
    off, apart = z[:, 1] - _wave(z), 3 * torch.sigmoid((z[:, 0] - 1) / 0.3)
    return _either(off / 0.4, (off + apart) / 0.35) + _wall(z)


POTENTIALS = {"1": _ring, "2": _sine, "3": _bump, "4": _fork}


def grid(low: float, high: float, n: int) -> Tensor:
    """Centres (n * n, 2) of the cells of a square, float64; reshaped to (n, n) rows are of one height."""
    side = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.cartesian_prod(side, side).flip(1)


def log_partition(potential: Callable[[Tensor], Tensor], n: int = 600) -> float:
    """log of the integral of exp(-U)."""
    low, high = -8.0, 8.0
    return float((-potential(grid(low, high, n))).logsumexp(0)) + 2 * math.log((high - low) / n)
