"""What is predicted of observations: the decoder's value, how far it may be off, and the noise.

Symbols: ``eta (n, c)`` the decoder's values, ``s (n, c)`` the standard deviation of their error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skode.models.kriging import Kernel
from skode.models.likelihoods import LARGEST_LOG_RATE, Likelihood

N_NODES = 15


@dataclass(frozen=True)
class Spread:
    """s^2 = (factor * disagreement)^2 + (growth * distance^power)^2.

    ``disagreement`` is that between references, ``distance`` that from the nearest observation used.
    """

    factor: float = 1.0
    growth: float = 0.05
    power: float = 0.5

    def of(self, disagreement: Tensor, distance: Tensor) -> Tensor:
        """The s of disagreements (n, c) at distances (n,)."""
        grown = self.growth * distance.clamp(min=0).to(disagreement) ** self.power
        return (
            (self.factor * disagreement).square() + torch.where(distance > 0, grown, 0.0).square().unsqueeze(1)
        ).sqrt()


@dataclass(frozen=True)
class Calibration:
    """Spreads inside and ahead of what was observed, and a factor on each channel's learned noise.

    Errors of normal channels have Student's t distribution with ``degrees`` of freedom, above 2: some series are
    followed better than others; ahead with ``degrees_ahead``, if that is given. ``kernels`` has one for each channel
    whose errors at the observations tell those nearby; it is empty if no channel's do.
    """

    inside: Spread
    ahead: Spread
    noise: tuple[float, ...]
    degrees: float = math.inf
    kernels: tuple[Kernel | None, ...] = ()
    degrees_ahead: float | None = None

    @staticmethod
    def plain(n_channels: int) -> Calibration:
        """Without any held-out data to learn from."""
        return Calibration(Spread(), Spread(3.0, 0.2), (1.0,) * n_channels)

    def spread(self, disagreement: Tensor, distance: Tensor, ahead: Tensor) -> Tensor:
        """The s (n, c) of disagreements (n, c), distances (n,) and which (n,) lie ahead."""
        inside, later = (own.of(disagreement, distance) for own in (self.inside, self.ahead))
        return torch.where(ahead.unsqueeze(1), later, inside)

    def degrees_of(self, ahead: Tensor) -> Tensor:
        """Degrees of freedom (n,) by which (n,) lie ahead."""
        later = self.degrees if self.degrees_ahead is None else self.degrees_ahead
        return torch.where(ahead, torch.tensor(later, dtype=torch.float64), self.degrees)


class Predictive:
    """Distributions of observations whose eta is normal around what was decoded.

    Exact for normal noise; Student-t noise keeps its shape and takes the error's variance; binary channels and counts
    are mixtures over the nodes of a Gauss-Hermite rule. With finite ``degrees`` what is exact of normal channels is the
    variance, and their shape is Student's t.

    Parameters
    ----------
    likelihood : Likelihood
    eta, spread : tensors of shape (n, c)
    noise : sequence of float, optional
        Factors on the channels' noise.
    degrees : float or tensor of shape (n,), default=inf
        Of freedom, above 2.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        eta: Tensor,
        spread: Tensor,
        noise: tuple[float, ...] | Tensor | None = None,
        degrees: float | Tensor = math.inf,
    ) -> None:
        self._likelihood, self.eta, self.spread = likelihood, eta, spread
        factor = torch.ones(eta.shape[1]) if noise is None else torch.as_tensor(noise)
        self._scale = likelihood.scale.to(eta) * factor.to(eta)
        self._degrees = likelihood.degrees.to(eta)
        self._of_errors = torch.as_tensor(degrees).to(eta)
        nodes, weights = np.polynomial.hermite_e.hermegauss(N_NODES)
        self._nodes = torch.as_tensor(nodes).to(eta)
        self._weights = torch.as_tensor(weights / weights.sum()).to(eta)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-densities (n, c) in nats."""
        return torch.stack([self._log_prob(i, y[:, i]) for i in range(self.eta.shape[1])], dim=1)

    def mean(self) -> Tensor:
        """Expected observations (n, c)."""
        return torch.stack([self._moments(i)[0] for i in range(self.eta.shape[1])], dim=1)

    def std(self) -> Tensor:
        """Standard deviations (n, c) of observations, noise included."""
        return torch.stack([self._moments(i)[1] for i in range(self.eta.shape[1])], dim=1).sqrt()

    def quantile(self, p: float) -> Tensor:
        """Quantiles (n, c) of observations at a probability."""
        return torch.stack([self._quantile(i, p) for i in range(self.eta.shape[1])], dim=1)

    def drawn(self, u: Tensor) -> Tensor:
        """Observations (n, c) at uniform numbers (n, c, 2)."""
        return torch.stack([self._drawn(i, u[:, i]) for i in range(self.eta.shape[1])], dim=1)

    # --- one channel ---

    def _drawn(self, i: int, u: Tensor) -> Tensor:
        family = self._likelihood.families[i]
        if family == "bernoulli":
            return (u[:, 0] < self._moments(i)[0]).to(u)
        if family == "poisson":
            return self._count_quantile(i, u[:, 0])
        nu = self._freedom(i)
        # Student's t in polar coordinates (Bailey 1994).
        away = (nu * (u[:, 0] ** (-2 / nu) - 1)).sqrt() * torch.cos(2 * math.pi * u[:, 1])
        return self.eta[:, i] + self._width(i) * torch.where(torch.isinf(nu), torch.special.ndtri(u[:, 0]), away)

    def _at_nodes(self, i: int) -> Tensor:
        return self.eta[:, i, None] + self.spread[:, i, None] * self._nodes

    def _freedom(self, i: int) -> Tensor:
        """Degrees of freedom, one number or (n,); infinite for a normal distribution."""
        return self._degrees[i] if self._likelihood.families[i] == "student_t" else self._of_errors

    def _width(self, i: int) -> Tensor:
        """Of a normal or a t distribution with the error's variance in it, (n,)."""
        share, noise = 1 - 2 / self._freedom(i), self._scale[i].square()
        if self._likelihood.families[i] != "student_t":
            noise = share * noise  # a scale is a normal's standard deviation
        return (noise + share * self.spread[:, i].square()).sqrt()

    def _log_prob(self, i: int, y: Tensor) -> Tensor:
        family = self._likelihood.families[i]
        if family == "bernoulli":
            chance = self._moments(i)[0].clamp(1e-7, 1 - 1e-7)
            return torch.where(y > 0.5, chance.log(), (1 - chance).log())
        if family == "poisson":
            log_rate = self._at_nodes(i).clamp(max=LARGEST_LOG_RATE)
            each = y.unsqueeze(1) * log_rate - log_rate.exp() - torch.lgamma(y + 1).unsqueeze(1)
            return torch.logsumexp(each + self._weights.log(), dim=1)
        width = self._width(i)
        z = (y - self.eta[:, i]) / width
        normal = torch.isinf(self._freedom(i))
        nu = torch.where(normal, 1.0, self._freedom(i))
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi).log()
        of_t = constant - (nu + 1) / 2 * torch.log1p(z.square() / nu)
        return torch.where(normal, -0.5 * z.square() - 0.5 * math.log(2 * math.pi), of_t) - width.log()

    def _moments(self, i: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (n,)."""
        family = self._likelihood.families[i]
        if family in ("bernoulli", "poisson"):
            at = self._at_nodes(i)
            each = at.sigmoid() if family == "bernoulli" else at.clamp(max=LARGEST_LOG_RATE).exp()
            mean = each @ self._weights
            if family == "bernoulli":
                return mean, mean * (1 - mean)
            return mean, mean + (each - mean.unsqueeze(1)).square() @ self._weights
        return self.eta[:, i], self._width(i).square() / (1 - 2 / self._freedom(i))

    def _quantile(self, i: int, p: float) -> Tensor:
        family = self._likelihood.families[i]
        if family == "bernoulli":
            return (self._moments(i)[0] > 1 - p).to(self.eta)
        if family == "poisson":
            return self._count_quantile(i, p)
        every, which = torch.unique(self._freedom(i).detach(), return_inverse=True)
        places = torch.tensor([_t_quantile(nu, p) for nu in every.tolist()]).to(self.eta)
        return self.eta[:, i] + places[which] * self._width(i)

    def _count_quantile(self, i: int, p: float | Tensor) -> Tensor:
        """The smallest count whose distribution function reaches ``p``, by bisection."""
        rate = self._at_nodes(i).clamp(max=LARGEST_LOG_RATE).exp()
        low = torch.full_like(rate[:, 0], -1.0)
        high = torch.ceil(rate.amax(dim=1) + 12 * rate.amax(dim=1).sqrt() + 30)
        while bool((high - low > 1).any()):
            middle = torch.floor((low + high) / 2)
            below = torch.special.gammaincc(middle.clamp(min=0).unsqueeze(1) + 1, rate) @ self._weights
            reached = (below >= p) & (middle >= 0)
            high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
        return high


def _t_quantile(nu: float, p: float) -> float:
    """Of Student's t: with t = sqrt(nu) tan(a) the density is cos(a)^(nu - 1), summed up over even angles."""
    if math.isinf(nu):
        return math.sqrt(2) * float(torch.special.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))
    angle = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angle).clip(0) ** (nu - 1)
    total = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(nu) * math.tan(float(np.interp(p * total[-1], total, angle)))
