"""Rows of a fitted density with some columns given: by importance sampling around a mixture fitted to its samples.

z: standardised rows (n, d), b: the places of the columns that are given, a: those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from skode.exceptions import SolverError

Array = NDArray[np.float64]

N_COMPONENTS, N_FITTED = 8, 2_000
SHRINKAGE = 1e-3  # added to the variances of standardised rows
DF = 5.0  # of the proposals' Student t: their tails shall be heavier than the density's
WIDENING = 1.2  # of their scales
FARTHEST = 1e6  # standard deviations: beyond, squares lose the digits that tell candidates apart
CANDIDATES, CANDIDATES_A_ROW = 2_000, 10


class Conditioned(NamedTuple):
    """Rows z, the log of the given columns' density, and how many independent rows the candidates are worth."""

    Z: Array
    log_marginal: float
    effective_size: float


class _Proposal(NamedTuple):
    """A mixture of multivariate t distributions of the columns a."""

    log_weights: Array
    means: Array
    factors: Array  # lower Cholesky factors

    @classmethod
    def given(cls, mixture: GaussianMixture, a: Array, b: Array, values: Array) -> _Proposal:
        """The mixture's conditional distribution, wider and with heavier tails (Bishop 2006, section 2.3.1)."""
        means, covariances, log_weights = [], [], []
        for weight, mean, covariance in zip(mixture.weights_, mixture.means_, mixture.covariances_, strict=True):
            within = covariance[np.ix_(b, b)]
            gain = np.linalg.solve(within, covariance[np.ix_(b, a)]).T
            distance = values - mean[b]
            means.append(mean[a] + gain @ distance)
            covariances.append(covariance[np.ix_(a, a)] - gain @ covariance[np.ix_(b, a)])
            log_weights.append(
                math.log(weight) - 0.5 * (np.linalg.slogdet(within)[1] + distance @ np.linalg.solve(within, distance))
            )
        floor = SHRINKAGE * np.eye(len(a))
        factors = [WIDENING * np.linalg.cholesky((c + c.T) / 2 + floor) for c in covariances]
        # Every component keeps a part: the density may have mass where the fitted mixture has hardly any.
        weights = 0.9 * np.exp(log_weights - np.logaddexp.reduce(log_weights)) + 0.1 / len(log_weights)
        return cls(np.log(weights), np.array(means), np.array(factors))

    def drawn(self, n: int, rng: np.random.Generator) -> Array:
        component = rng.choice(len(self.means), size=n, p=np.exp(self.log_weights))
        scale = np.sqrt(DF / rng.chisquare(DF, size=n))
        noise = np.einsum("nij,nj->ni", self.factors[component], rng.normal(size=(n, self.means.shape[1])))
        drawn: Array = self.means[component] + scale[:, None] * noise
        return drawn

    def log_density(self, x: Array) -> Array:
        d = x.shape[1]
        constant = math.lgamma((DF + d) / 2) - math.lgamma(DF / 2) - 0.5 * d * math.log(DF * math.pi)
        parts = []
        for log_weight, mean, factor in zip(self.log_weights, self.means, self.factors, strict=True):
            squared = np.square(np.linalg.solve(factor, (x - mean).T)).sum(axis=0)
            log_scale = np.log(np.diag(factor)).sum()
            parts.append(log_weight + constant - log_scale - 0.5 * (DF + d) * np.log1p(squared / DF))
        found: Array = np.logaddexp.reduce(parts)
        return found


def conditioned(
    samples: Array,
    log_density: Callable[[Array], Array],
    b: Array,
    values: Array,
    n: int,
    rng: np.random.Generator,
) -> Conditioned:
    """Rows whose columns ``b`` have given values, by sampling-importance-resampling (Rubin 1988).

    Parameters
    ----------
    samples : array of shape (m, d)
        Of the density.
    log_density : callable
        Of rows (k, d).
    b : array of shape (p,)
        Columns that are given, fewer than d.
    values : array of shape (p,)
    n : int
    rng : numpy.random.Generator

    Raises
    ------
    ValueError
        If the values are absurdly far away.
    SolverError
        If no candidate has a log-density.
    """
    if not np.abs(values).max() <= FARTHEST:
        raise ValueError(f"given has values more than {FARTHEST:g} standard deviations away; no row is like that.")
    d = samples.shape[1]
    a = np.setdiff1d(np.arange(d), b)
    mixture = GaussianMixture(
        min(N_COMPONENTS, len(samples)), reg_covar=SHRINKAGE, max_iter=500, random_state=int(rng.integers(2**31))
    ).fit(samples)
    proposal = _Proposal.given(mixture, a, b, values)
    k = max(CANDIDATES, CANDIDATES_A_ROW * n)
    Z = np.empty((k, d))
    Z[:, b], Z[:, a] = values, proposal.drawn(k, rng)
    log_weights = log_density(Z) - proposal.log_density(Z[:, a])
    # A candidate that the solver cannot carry to the base is none.
    log_weights[np.isnan(log_weights)] = -np.inf
    if not log_weights.max() > -np.inf:
        raise SolverError("no candidate under these conditions could be solved; give values nearer to the table's.", [])
    total = float(np.logaddexp.reduce(log_weights))
    weights = np.exp(log_weights - total)
    places = (rng.random() + np.arange(n)) / max(n, 1)  # systematic: a candidate comes twice only if it must
    chosen = np.searchsorted(np.cumsum(weights), places).clip(max=k - 1)
    return Conditioned(Z[rng.permutation(chosen)], total - math.log(k), float(1 / np.square(weights).sum()))
