"""Likelihoods of observations, one of a few families for each channel.

Symbols: ``eta (n, c)`` what the decoder gives: the location, the logit of a binary channel, the log rate of a count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

FAMILIES = ("gaussian", "student_t", "bernoulli", "poisson")
LARGEST_LOG_RATE = 15.0


class Likelihood(nn.Module):
    """Densities of observations given the decoder's output; scales are learned, one a channel.

    "gaussian", "student_t" (with learned degrees of freedom, above 2), "bernoulli" (values 0 and 1) and "poisson"
    (counts).

    Parameters
    ----------
    families : sequence of str
        One for each channel.
    start : float, default=0.5
        The noise's scale at first, in the channels' units.

    Raises
    ------
    ValueError
        If a family is unknown.

    Examples
    --------
    >>> import torch
    >>> from skode.models import Likelihood
    >>> Likelihood(["gaussian", "poisson"]).log_prob(torch.zeros(1, 2), torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """

    def __init__(self, families: Sequence[str], start: float = 0.5) -> None:
        super().__init__()
        unknown = [name for name in families if name not in FAMILIES]
        if unknown:
            raise ValueError(f"likelihood {unknown[0]!r} is unknown; use one of {', '.join(map(repr, FAMILIES))}.")
        self.families = tuple(families)
        self.log_scale = nn.Parameter(torch.full((len(families),), math.log(start)))
        self.tail = nn.Parameter(torch.full((len(families),), 2.0))
        self._channels = {
            name: [i for i, own in enumerate(families) if own == name] for name in dict.fromkeys(families)
        }

    @property
    def scale(self) -> Tensor:
        """Of the noise, (c,); without meaning for binary channels and counts."""
        return self.log_scale.clamp(min=-7.0).exp()

    @property
    def degrees(self) -> Tensor:
        """Degrees of freedom, (c,)."""
        return 2.0 + softplus(self.tail)

    def log_prob(self, eta: Tensor, y: Tensor) -> Tensor:
        """Log-densities (n, c) of observations, in nats."""
        return self._by_family(self._log_prob, eta, y)

    def mean(self, eta: Tensor) -> Tensor:
        """Expected observations (n, c)."""
        return self._by_family(lambda name, own, eta: _mean(name, eta), eta)

    def variance(self, eta: Tensor) -> Tensor:
        """Variances (n, c) of observations around their expectation."""
        return self._by_family(self._variance, eta)

    def sample(self, eta: Tensor, generator: torch.Generator) -> Tensor:
        """Observations (n, c), drawn on the CPU."""
        return self._by_family(lambda name, own, eta: self._sample(name, own, eta, generator), eta)

    def as_input(self, y: Tensor) -> Tensor:
        """Observations on a scale that a network reads well: logs of counts, -1 and 1 for binary channels."""
        return self._by_family(_as_input, y)

    def _by_family(self, function: object, *arrays: Tensor) -> Tensor:
        """``function(family, channels, ...)`` of each family's columns, put together."""
        assert callable(function)
        if len(self._channels) == 1:
            out: Tensor = function(self.families[0], slice(None), *arrays)
            return out
        columns = [i for own in self._channels.values() for i in own]
        parts = [function(name, own, *(x[..., own] for x in arrays)) for name, own in self._channels.items()]
        if not parts:
            return arrays[0]
        back = torch.tensor(columns, device=arrays[0].device).argsort()
        return torch.cat(parts, dim=-1)[..., back]

    def _log_prob(self, name: str, own: list[int] | slice, eta: Tensor, y: Tensor) -> Tensor:
        if name == "bernoulli":
            return -nn.functional.binary_cross_entropy_with_logits(eta, y, reduction="none")
        if name == "poisson":
            eta = eta.clamp(max=LARGEST_LOG_RATE)
            return y * eta - eta.exp() - torch.lgamma(y + 1)
        scale = self.scale[own]
        z = (y - eta) / scale
        if name == "gaussian":
            return -0.5 * z.square() - scale.log() - 0.5 * math.log(2 * math.pi)
        nu = self.degrees[own]
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi).log() - scale.log()
        return constant - (nu + 1) / 2 * torch.log1p(z.square() / nu)

    def _variance(self, name: str, own: list[int] | slice, eta: Tensor) -> Tensor:
        if name == "bernoulli":
            return eta.sigmoid() * (-eta).sigmoid()
        if name == "poisson":
            return _mean(name, eta)
        variance = self.scale[own].square()
        if name == "student_t":
            nu = self.degrees[own]
            variance = variance * nu / (nu - 2)
        return variance.expand_as(eta)

    def _sample(self, name: str, own: list[int] | slice, eta: Tensor, generator: torch.Generator) -> Tensor:
        mean = _mean(name, eta.detach()).cpu()
        if name == "bernoulli":
            return torch.bernoulli(mean, generator=generator).to(eta)
        if name == "poisson":
            return torch.poisson(mean, generator=generator).to(eta)
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        if name == "student_t":
            # A normal over the root of a mean square: chi-squared is twice a gamma of half the degrees.
            nu = self.degrees[own].detach().double().cpu().expand(mean.shape)
            noise = noise / (torch._standard_gamma(nu / 2, generator=generator) * 2 / nu).sqrt()
        return eta.detach() + noise.to(eta) * self.scale[own].detach()


def _mean(name: str, eta: Tensor) -> Tensor:
    if name == "bernoulli":
        return eta.sigmoid()
    return eta.clamp(max=LARGEST_LOG_RATE).exp() if name == "poisson" else eta


def _as_input(name: str, own: object, y: Tensor) -> Tensor:
    if name == "bernoulli":
        return 2 * y - 1
    return torch.log1p(y.clamp(min=0)) if name == "poisson" else y
