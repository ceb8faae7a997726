"""Stiff problems, and their solutions by another package."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from tests.problems import Field, times


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Three reactions whose speeds differ by nine orders of magnitude."""
    first = 0.04 * y[:, 0] - 1e4 * y[:, 1] * y[:, 2]
    last = 3e7 * y[:, 1] ** 2
    return torch.stack([-first, first - last, last], dim=1)


def van_der_pol(t: Tensor, y: Tensor, mu: float | Tensor = 1000.0) -> Tensor:
    return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=1)


def drawn_in(rate: float | Tensor) -> Field:
    """Prothero and Robinson's problem: the solution cos(t) draws all others in."""
    return lambda t, y: -rate * (y - torch.cos(t)) - torch.sin(t)


class VanDerPol(nn.Module):
    """With rates of its own for each row, if given."""

    def __init__(self, *mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(times(*mu))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return van_der_pol(t, y, self.mu)


@cache
def radau(field: Field, y0: tuple[float, ...], t: tuple[float, ...]) -> Tensor:
    """States (m, d) by SciPy's implicit method, far closer than a test asks of a solve."""

    def one(t: float, y: np.ndarray) -> np.ndarray:
        return field(torch.full((1, 1), t, dtype=torch.float64), torch.from_numpy(y).view(1, -1))[0].numpy()

    found = solve_ivp(one, (t[0], t[-1]), y0, "Radau", t, rtol=1e-10, atol=1e-14)
    return torch.from_numpy(found.y.T.copy())


def stiff_and_mild(n: int) -> tuple[Tensor, Tensor]:
    """States and rates, from 1 to 1e6 in turn."""
    y0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return y0, 10.0 ** (torch.arange(n, dtype=torch.float64) % 7).unsqueeze(1)


def coupled(rate: Tensor) -> Field:
    def field(t: Tensor, y: Tensor) -> Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v + torch.sin(t), -rate * (v + x**3) - x], dim=1)

    return field
