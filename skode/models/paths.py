"""Paths from a base distribution to the data, along which flow matching learns the velocity.

A row of the data is reached at t = 1; at t = 0 the rows follow the base. x1: rows of the data, eps: standard normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skode.models.bases import Mixture, component_at


class Pairs(NamedTuple):
    """Times (n, 1), places on the path (n, d) and the velocities there (n, d), which a field is fitted to."""

    t: Tensor
    x: Tensor
    velocity: Tensor


@dataclass(frozen=True, eq=False)
class LinearPath:
    """Straight lines from N(0, I), drawn independently of the data: x_t = (1 - t) eps + t x1.

    Lipman et al. 2023 (arXiv:2210.02747, section 4.1, with sigma_min = 0), Tong et al. 2024 (arXiv:2302.00482, I-CFM).

    Examples
    --------
    >>> import torch
    >>> from skode.models import LinearPath
    >>> generator = torch.Generator().manual_seed(0)
    >>> t, x, velocity = LinearPath().pairs(torch.ones(3, 2), generator)
    >>> bool(torch.allclose(x + (1 - t) * velocity, torch.ones(3, 2), atol=1e-6))  # straight on to the data
    True
    """

    def pairs(self, x1: Tensor, generator: torch.Generator, t: Tensor | None = None) -> Pairs:
        """One place on the path to each row.

        Parameters
        ----------
        x1 : tensor of shape (n, d)
        generator : torch.Generator
            On the CPU.
        t : tensor of shape (n, 1), optional
            Times in [0, 1]; drawn uniformly if not given.

        Returns
        -------
        Pairs
        """
        t, eps = _draws(x1, generator, t)
        return self.at(x1, t, eps)

    def at(self, x1: Tensor, t: Tensor, eps: Tensor, u: Tensor | None = None) -> Pairs:
        """The places of given times (n, 1) and normal numbers (n, d); ``u`` is not looked at."""
        return Pairs(t, torch.lerp(eps, x1, t), x1 - eps)


@dataclass(frozen=True, eq=False)
class MixturePath:
    """From a Gaussian mixture to the data, standing still where the data is the mixture itself.

    A row picks a component k with probability p(k | x1); with S_k^(1/2) any square root of its covariance,
    z = S_k^(-1/2) (x1 - mu_k), z_t = sin(pi t / 2) z + cos(pi t / 2) eps and x_t = mu_k + S_k^(1/2) z_t. At t = 0
    rows follow the mixture with the posteriors' mean as weights. If the data follows the mixture, z and eps are
    independent standard normals, so that z_t and its derivative are, too, and the mean velocity at every place is 0: a
    network that starts at zero starts at its goal. Without the factor and its inverse side by side the place is
    mu_k + sin(pi t / 2) (x1 - mu_k) + cos(pi t / 2) S_k^(1/2) eps: thin covariances do no harm.

    Parameters
    ----------
    mixture : Mixture
        Of the rows' dtype and device.
    """

    mixture: Mixture

    def pairs(self, x1: Tensor, generator: torch.Generator, t: Tensor | None = None) -> Pairs:
        """One place on the path to each row; as :meth:`LinearPath.pairs`."""
        t, eps = _draws(x1, generator, t)
        u = torch.rand(len(x1), 1, generator=generator, dtype=torch.float64)
        return self.at(x1, t, eps, u.to(x1.dtype).to(x1.device))

    def at(self, x1: Tensor, t: Tensor, eps: Tensor, u: Tensor) -> Pairs:
        """The places of given times (n, 1), normal numbers (n, d), and uniform ones (n, 1) that pick components."""
        component = component_at(self.mixture.posterior(x1), u)
        mean, noise = self.mixture.means[component], self.mixture.scatter(component, eps)
        sine, cosine = (0.5 * math.pi * t).sin(), (0.5 * math.pi * t).cos()
        x = mean + sine * (x1 - mean) + cosine * noise
        return Pairs(t, x, 0.5 * math.pi * (cosine * (x1 - mean) - sine * noise))


def _draws(x1: Tensor, generator: torch.Generator, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """Times (n, 1) and standard normals (n, d)."""
    eps = torch.randn(x1.shape, generator=generator, dtype=torch.float64).to(x1.dtype).to(x1.device)
    if t is None:
        t = torch.rand(len(x1), 1, generator=generator, dtype=torch.float64).to(x1.dtype).to(x1.device)
    return t, eps
