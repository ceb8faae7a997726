"""Base distributions of a flow: what the data is carried to.

z: a point, d: number of dimensions, K: number of a mixture's components.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.runtime import kronecker_steps, to_numpy, to_tensor

_CPU = torch.device("cpu")
N_CELLS = 2**16  # of the grid that quantiles of Student's t are read off: to 1e-7


@dataclass(frozen=True, eq=False)
class Base(ABC):
    """A distribution whose parameters are tensors: the fields of the subclass."""

    @property
    @abstractmethod
    def n_dims(self) -> int:
        """Number of dimensions d."""

    @abstractmethod
    def log_density(self, z: Tensor) -> Tensor:
        """Log-density in nats, differentiable.

        Parameters
        ----------
        z : tensor of shape (n, d)
            Of the parameters' dtype and device.

        Returns
        -------
        tensor of shape (n,)
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws.

        Parameters
        ----------
        n : int
            0 is allowed.
        generator : torch.Generator
            On the CPU: draws are made there in float64, so that devices agree.

        Returns
        -------
        tensor of shape (n, d)
        """

    @abstractmethod
    def placed(self, u: Tensor) -> Tensor:
        """Points (k, d) of uniform numbers in (0, 1), (k, 2 d + 1); both float64 on the CPU.

        In one dimension of the first number alone, and ascending with it: quantiles. So are the columns of independent
        ones, of the first d numbers.
        """

    def points(self, k: int) -> Tensor:
        """Points that fill the distribution evenly, float64 (k, d) on the CPU.

        In one dimension the quantiles of (i + 1/2) / k, in more a Kronecker sequence and its mirror image.
        """
        u = torch.full((k, 2 * self.n_dims + 1), 0.5, dtype=torch.float64)
        if self.n_dims == 1:
            u[:, 0] = (torch.arange(k, dtype=torch.float64) + 0.5) / k
        else:
            u = (u + torch.arange(1, k + 1).unsqueeze(1) * torch.from_numpy(kronecker_steps(u.shape[1]))) % 1.0
            # In pairs that mirror each other: heavy tails shall not pull means to a side.
            u = torch.cat([u[: (k + 1) // 2], 1 - u[: k // 2]])
        return self.placed(u.clamp(2.0**-53, 1 - 2.0**-53))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The parameters as NumPy arrays, for :meth:`from_arrays`."""
        return {field.name: to_numpy(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], dtype: torch.dtype = torch.float64, device: torch.device = _CPU
    ) -> Self:
        """The distribution that has these parameters."""
        return cls(**{name: to_tensor(array, dtype, device) for name, array in arrays.items()})

    def to(self, dtype: torch.dtype, device: torch.device = _CPU) -> Self:
        """The same distribution in another dtype or on another device."""
        return type(self)(**{field.name: getattr(self, field.name).to(dtype).to(device) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class Normal(Base):
    """Independent normal columns.

    Parameters
    ----------
    loc, scale : tensors of shape (d,)

    Examples
    --------
    >>> import torch
    >>> from skode.models import Normal
    >>> base = Normal.standard(2)
    >>> round(base.log_density(torch.zeros(1, 2, dtype=torch.float64)).item(), 4)
    -1.8379
    """

    loc: Tensor
    scale: Tensor

    @classmethod
    def standard(cls, n_dims: int) -> Self:
        """N(0, I) in float64."""
        return cls(torch.zeros(n_dims, dtype=torch.float64), torch.ones(n_dims, dtype=torch.float64))

    @property
    def n_dims(self) -> int:
        return len(self.loc)

    def log_density(self, z: Tensor) -> Tensor:
        log_scale = self.scale.log().sum() + 0.5 * math.log(2 * math.pi) * self.n_dims
        return -0.5 * ((z - self.loc) / self.scale).square().sum(-1) - log_scale

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.loc + self.scale * _normals(n, self.loc, generator)

    def placed(self, u: Tensor) -> Tensor:
        normal: Tensor = torch.special.ndtri(u[:, : self.n_dims])
        return _exact(self.loc) + _exact(self.scale) * normal


@dataclass(frozen=True, eq=False)
class StudentT(Base):
    """Independent columns of Student's t distribution, each with its own degrees of freedom.

    Far away a network of bounded units moves a point by a bounded distance, so that a flow's tails are those of its
    base. Columns of a table differ in their tails, hence one number each; a multivariate t has one for all, and calls a
    row with one far value far in all columns.

    Parameters
    ----------
    loc, scale, df : tensors of shape (d,)
        Centre, scale (not the standard deviation) and degrees of freedom.

    Examples
    --------
    >>> import numpy as np
    >>> from skode.models import StudentT
    >>> base = StudentT.fit(np.random.default_rng(0).standard_t(3, size=(5000, 1)))
    >>> 2.5 < base.df.item() < 3.5
    True
    """

    loc: Tensor
    scale: Tensor
    df: Tensor

    @classmethod
    def fit(cls, Z: NDArray[Any], sample_weight: NDArray[Any] | None = None) -> Self:
        """The maximum-likelihood fit to standardised rows; degrees of freedom are kept in [1, 100].

        A scale is at least a twentieth of the column's spread, since a value that half of the rows share would let it
        fall to 0.

        Parameters
        ----------
        Z : array of shape (n, d)
        sample_weight : array of shape (n,), optional
        """
        Z = np.asarray(Z, np.float64)
        weight = np.ones(len(Z)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        Z, weight = Z[weight > 0], weight[weight > 0]
        columns = np.array([_fit_t(z, weight / weight.sum()) for z in Z.T]).reshape(-1, 3)
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)) for part in columns.T))

    @property
    def n_dims(self) -> int:
        return len(self.loc)

    def log_density(self, z: Tensor) -> Tensor:
        nu = self.df
        constant = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * (nu * math.pi).log() - self.scale.log()
        squared = ((z - self.loc) / self.scale).square()
        columns: Tensor = constant - 0.5 * (nu + 1) * torch.log1p(squared / nu)
        return columns.sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = 1 - torch.rand(n, self.n_dims, generator=generator, dtype=torch.float64)
        return self.drawn(torch.cat([u, torch.rand(n, self.n_dims, generator=generator, dtype=torch.float64)], dim=1))

    def placed(self, u: Tensor) -> Tensor:
        # With z = sqrt(nu) tan(a) the density is proportional to cos(a)^(nu - 1): smooth, on a bounded interval.
        edges = np.linspace(-np.pi / 2, np.pi / 2, N_CELLS + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        z = np.empty((len(u), self.n_dims))
        for j, nu in enumerate(self.df.tolist()):
            mass = np.cumsum(np.cos(middles) ** (nu - 1))
            a = np.interp(u[:, j].numpy(), np.concatenate([[0.0], mass / mass[-1]]), edges)
            z[:, j] = math.sqrt(nu) * np.tan(a)
        return _exact(self.loc) + _exact(self.scale) * torch.from_numpy(z)

    def drawn(self, u: Tensor) -> Tensor:
        """Draws (n, d) of uniform numbers in (0, 1), float64 (n, 2 d) on the CPU."""
        # The polar method: Bailey 1994, Mathematics of Computation 62, 779-781.
        radius, angle = u.chunk(2, dim=1)
        nu = self.df.cpu().double()
        draws = (nu * torch.expm1(-2 / nu * radius.log())).sqrt() * (2 * math.pi * angle).cos()
        return self.loc + self.scale * draws.to(self.loc.dtype).to(self.loc.device)


@dataclass(frozen=True, eq=False)
class Mixture(Base):
    """A Gaussian mixture with full covariances.

    Parameters
    ----------
    weights : tensor of shape (K,)
        Positive, of sum 1.
    means : tensor of shape (K, d)
    factors : tensor of shape (K, d, d)
        Lower Cholesky factors of the covariances.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from skode.models import Mixture
    >>> base = Mixture.of(np.array([0.5, 0.5]), np.array([[-3.0], [3.0]]), np.ones((2, 1, 1)))
    >>> base.posterior(torch.tensor([[-3.0], [0.0]], dtype=torch.float64)).round(decimals=3).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    @classmethod
    def of(cls, weights: NDArray[Any], means: NDArray[Any], covariances: NDArray[Any]) -> Self:
        """The mixture of these weights (K,), means (K, d) and covariances (K, d, d), in float64."""
        arrays = {"weights": weights, "means": means, "factors": np.linalg.cholesky(covariances)}
        return cls.from_arrays(arrays)

    @property
    def n_dims(self) -> int:
        return self.means.shape[1]

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return len(self.weights)

    @cached_property
    def _whiteners(self) -> Tensor:
        """Inverse Cholesky factors (K, d, d)."""
        eye = torch.eye(self.n_dims, dtype=self.factors.dtype, device=self.factors.device)
        whiteners: Tensor = torch.linalg.solve_triangular(self.factors, eye.expand_as(self.factors), upper=False)
        return whiteners

    @cached_property
    def _log_constants(self) -> Tensor:
        log_det = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.weights.log() - log_det - 0.5 * self.n_dims * math.log(2 * math.pi)

    def log_joint(self, z: Tensor) -> Tensor:
        """log(weight of k times its density at z), shape (n, K)."""
        white = torch.matmul(z - self.means.unsqueeze(1), self._whiteners.mT)
        return (self._log_constants.unsqueeze(1) - 0.5 * white.square().sum(-1)).mT

    def log_density(self, z: Tensor) -> Tensor:
        return self.log_joint(z).logsumexp(-1)

    def posterior(self, z: Tensor) -> Tensor:
        """p(k | z), shape (n, K)."""
        return self.log_joint(z).softmax(-1)

    def scatter(self, component: Tensor, eps: Tensor) -> Tensor:
        """Cholesky factor of a row's component times the row of ``eps`` (n, d)."""
        scattered = torch.empty_like(eps)
        for k, factor in enumerate(self.factors):
            rows = component == k
            scattered[rows] = eps[rows] @ factor.mT
        return scattered

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        component = draw_component(self.weights.expand(n, -1), generator)
        return self.means[component] + self.scatter(component, _normals(n, self.means, generator))

    def placed(self, u: Tensor) -> Tensor:
        exact = self.to(torch.float64)
        if self.n_dims == 1:
            return exact._quantiles(u[:, :1])
        component = component_at(exact.weights.expand(len(u), -1), u[:, -1:])
        return exact.means[component] + exact.scatter(component, torch.special.ndtri(u[:, : self.n_dims]))

    def _quantiles(self, p: Tensor) -> Tensor:
        """By bisection between the components' own quantiles."""
        means, deviations = self.means[:, 0], self.factors[:, 0, 0]
        own = means + deviations * torch.special.ndtri(p)
        low, high = own.amin(dim=1, keepdim=True), own.amax(dim=1, keepdim=True)
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.weights * torch.special.ndtr((middle - means) / deviations)).sum(dim=1, keepdim=True) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.as_tensor(high)


def _exact(parameter: Tensor) -> Tensor:
    """In float64 on the CPU."""
    return parameter.detach().cpu().double()


def draw_component(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """For each row of ``probabilities`` (n, K) the number of a component, drawn on the CPU."""
    u = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    return component_at(probabilities, u.to(probabilities.dtype).to(probabilities.device))


def component_at(probabilities: Tensor, u: Tensor) -> Tensor:
    """For each row of ``probabilities`` (n, K) the component whose part of [0, 1) a number ``u`` (n, 1) falls into."""
    return (probabilities.cumsum(-1) <= u).sum(-1).clamp_(max=probabilities.shape[1] - 1)


def _normals(n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    draws = torch.randn(n, like.shape[-1], generator=generator, dtype=torch.float64)
    return draws.to(like.dtype).to(like.device)


# --- the maximum-likelihood fit of a column of Student's t ---

DF_RANGE = (1.0, 100.0)  # a Cauchy distribution, and what cannot be told from a normal one
_SMALLEST_SCALE = 0.05  # of the column's spread
_N_STEPS = 200  # at most, of the expectation-maximisation


def _fit_t(z: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[float, float, float]:
    """Centre, scale and degrees of freedom; these by their profile likelihood on a grid, then between its points."""
    spread = _spread(z, share)
    profile = _Profile(z, share, _SMALLEST_SCALE * spread, spread)
    grid = np.geomspace(*DF_RANGE, 13)
    likelihoods = [profile.likelihood(df) for df in grid]
    best = int(np.argmax(likelihoods))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    df = _golden_section(profile.likelihood, low, high)
    df = max((df, float(grid[best])), key=profile.likelihood)
    return (*profile.centre_and_scale(df), df)


def _spread(z: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    """Half the range of the middle 90 %, in normal deviations; the standard deviation if that is 0, in the end 1."""
    low, high = np.quantile(z, [0.05, 0.95], weights=share, method="inverted_cdf")
    deviation = math.sqrt(float(share @ (z - share @ z) ** 2))
    return float(high - low) / 2 / 1.6449 or deviation or 1.0


class _Profile:
    """The log-likelihood of a column as a function of the degrees of freedom, with the best centre and scale."""

    def __init__(self, z: NDArray[np.float64], share: NDArray[np.float64], floor: float, spread: float) -> None:
        self._z, self._share, self._floor = z, share, floor
        centre = float(np.quantile(z, 0.5, weights=share, method="inverted_cdf"))
        self._last = (centre, max(spread, floor))

    def centre_and_scale(self, df: float) -> tuple[float, float]:
        """By EM with parameter expansion (Kent, Tyler and Vardi 1994), from where the last call ended."""
        centre, scale = self._last
        for _ in range(_N_STEPS):
            pull = self._share * (df + 1) / (df + ((self._z - centre) / scale) ** 2)
            new_centre = float(pull @ self._z / pull.sum())
            new_scale = max(math.sqrt(float(pull @ (self._z - new_centre) ** 2 / pull.sum())), self._floor)
            moved = max(abs(new_centre - centre), abs(new_scale - scale)) / new_scale
            centre, scale = new_centre, new_scale
            if moved < 1e-8:
                break
        self._last = (centre, scale)
        return self._last

    def likelihood(self, df: float) -> float:
        """Mean log-likelihood."""
        centre, scale = self.centre_and_scale(df)
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi) - math.log(scale)
        far = np.log1p(((self._z - centre) / scale) ** 2 / df)
        return constant - 0.5 * (df + 1) * float(self._share @ far)


def _golden_section(function: Any, low: float, high: float, n_steps: int = 14) -> float:
    """Where ``function`` is largest between ``low`` and ``high``, both positive, searched on a logarithmic axis."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = function(math.exp(c)), function(math.exp(d))
    for _ in range(n_steps):
        if at_c > at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = function(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = function(math.exp(d))
    return math.exp((a + b) / 2)
