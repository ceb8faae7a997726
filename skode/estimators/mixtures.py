"""A Gaussian mixture for standardised rows; components and regularisation are chosen by cross-validation.

scikit-learn's GaussianMixture takes no weights, so that its EM algorithm is written out here with weights (Dempster,
Laird and Rubin 1977; Bishop 2006, section 9.2.2), from starts by its k-means++, which does take them. Equal rows are
counted as one row of their total weight before anything else, and rows are put in an order that depends on their
content: a weight of 2 is the row twice, to the last bit, and the order of rows does not matter.

Z: rows (n, d), w: their weights, R: responsibilities (n, K).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from skode.models import Mixture
from skode.runtime import row_keys

Array = NDArray[np.float64]

# Covariances are drawn by such a fraction towards the components' mean variances (a diagonal matrix); a single Gaussian
# may do without, and with few rows wants much.
SHRINKAGES = (1e-3, 1e-2, 0.05, 0.2)
SINGLE_SHRINKAGES = (0.0, *SHRINKAGES, 0.5, 1.0)
ENOUGH = 10  # rows for each column, from which a single covariance needs no shrinkage
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
VARIANCE_FLOOR = 1e-6  # of standardised rows, added to every variance
ROUND_OFF = 1e-10  # of a component's largest variance, added as well: a far row must not undo the factorisation
MOST_FITS, MOST_COMPONENTS = 8, 48  # whose densities are averaged, and the components of all together
SEARCH_ROWS, FIT_ROWS = 3_000, 20_000  # at most; beyond, a subset that depends on the rows' content
# Held-out densities are mixed with a little of a wide one, so that a single far row does not choose the model.
BACKGROUND = 1e-6
FEW = 50  # rows: a standard error from few of them is itself uncertain, and more of them are asked for
OF_FEW = 3.0, 3.2  # by shrinkage, by a mixture
# Of the single Gaussian in a mixture fitted to n rows: (12 / n) ** 1.5, between a row's weight and this.
LARGEST_SINGLE_SHARE, ROWS_OF_SINGLE = 0.25, 12
N_STANDARD_ERRORS = 2.0  # by which shrinkage must beat the plain Gaussian, and a mixture the single one chosen


class Rows(NamedTuple):
    """Distinct rows in an order of their content, and their weights of sum 1."""

    Z: Array
    w: Array

    def take(self, rows: Any) -> Rows:
        """Some of the rows."""
        w = self.w[rows]
        return Rows(self.Z[rows], w / w.sum())


class Gaussians(NamedTuple):
    """Weights (K,), means (K, d), covariances (K, d, d)."""

    weights: Array
    means: Array
    covariances: Array


class Choice(NamedTuple):
    """Number of components and shrinkage."""

    n_components: int
    shrinkage: float


def fit_mixture(
    Z: NDArray[Any], sample_weight: NDArray[Any] | None = None, seed: int = 0, choice: Choice | None = None
) -> Mixture:
    """Fit a Gaussian mixture to standardised rows.

    Number of components and shrinkage of the covariances are those of the best held-out log-likelihood; a mixture must
    beat the single Gaussian by two standard errors. It is the average of several fits from different starts. With fewer
    than four distinct rows the covariance is diagonal.

    Parameters
    ----------
    Z : array of shape (n, d)
        Columns of a scale near 1; any number of rows, repeated ones, collinear columns and n < d are fine.
    sample_weight : array of shape (n,), optional
        A weight of 2 counts as the row twice, one of 0 as none. Only their ratios matter.
    seed : int
        Of the k-means starts and of the subset that is taken from more than 20,000 rows.
    choice : Choice, optional
        Instead of the search.

    Returns
    -------
    Mixture

    Raises
    ------
    ValueError
        If no row has a positive weight.

    Examples
    --------
    >>> import numpy as np
    >>> from skode.estimators.mixtures import fit_mixture
    >>> rng = np.random.default_rng(0)
    >>> Z = np.concatenate([rng.normal(-1, 0.2, (300, 1)), rng.normal(1, 0.2, (300, 1))])
    >>> fit_mixture(Z).n_components  # the single Gaussian is one of them
    3
    """
    rows = distinct_rows(Z, sample_weight, seed)
    choice = choice or _choose(rows, seed)
    rows = rows.take(slice(FIT_ROWS))
    return Mixture.of(*_with_single(_average(_fits(rows, choice, seed)), rows))


def _fits(rows: Rows, choice: Choice, seed: int) -> list[Gaussians]:
    """Of different starts; those that end at the same likelihood are the same."""
    most = 1 if choice.n_components == 1 else max(1, min(MOST_FITS, MOST_COMPONENTS // choice.n_components))
    fits: dict[float, Gaussians] = {}
    for start in range(most):
        found = _fit(rows, choice, seed + 100 * start, n_starts=3, n_steps=300, tol=1e-6)
        fits.setdefault(round(float(rows.w @ _log_sum(_log_joint(rows.Z, found))), 4), found)
    return list(fits.values())


def _average(fits: list[Gaussians]) -> Gaussians:
    """The mean of densities, which is better than their mean log-density says."""
    weights, means, covariances = (np.concatenate(parts) for parts in zip(*fits, strict=True))
    return Gaussians(weights / len(fits), means, covariances)


def distinct_rows(Z: NDArray[Any], sample_weight: NDArray[Any] | None, seed: int) -> Rows:
    """Equal rows as one of their total weight, in the order of their keys; rows of weight 0 are left out."""
    Z = np.asarray(Z, np.float64) + 0.0
    weight = np.ones(len(Z)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    Z, weight = Z[weight > 0], weight[weight > 0]
    if not len(Z):
        raise ValueError("a mixture needs at least one row of positive weight.")
    _, first, place = np.unique(row_keys(Z, seed), return_index=True, return_inverse=True)
    total = np.bincount(place.ravel(), weights=weight)
    return Rows(Z[first], total / total.sum())


# --- the choice ---


def choose(Z: NDArray[Any], sample_weight: NDArray[Any] | None, seed: int) -> Choice:
    """Components and shrinkage of the best held-out log-likelihood."""
    return _choose(distinct_rows(Z, sample_weight, seed), seed)


def _choose(rows: Rows, seed: int) -> Choice:
    rows = rows.take(slice(SEARCH_ROWS))
    n_rows, n_dims = rows.Z.shape
    if n_rows < 4 or n_dims == 0:
        return Choice(1, 1.0)
    folds = np.arange(n_rows) % min(n_rows, 10 if n_rows < 200 else 3)
    shrinkages = SINGLE_SHRINKAGES if n_rows < ENOUGH * n_dims else (0.0,)
    scores = {Choice(1, a): score for a, score in _held_out(rows, folds, 1, shrinkages, seed).items()}
    single = _unless_clearly_worse(scores, Choice(1, 0.0), rows, OF_FEW[0])
    worse = 0
    near: tuple[float, ...] = SHRINKAGES
    for size in _sizes(n_rows, n_dims):
        before = rows.w @ scores[_best(scores, rows)]
        found = _held_out(rows, folds, size, near, seed)
        scores.update({Choice(size, a): score for a, score in found.items()})
        best = _best({Choice(size, a): score for a, score in found.items()}, rows)
        near = _neighbours(best.shrinkage)
        worse = 0 if rows.w @ scores[best] > before else worse + 1
        if worse == 2:
            break
    return _unless_clearly_worse(scores, single, rows, OF_FEW[1])


def _sizes(n_rows: int, n_dims: int) -> Iterator[int]:
    """Numbers of components that leave enough rows to each."""
    return (size for size in SIZES if size * min(n_dims + 1, 10) <= n_rows / 2)


def _best(scores: dict[Choice, Array], rows: Rows) -> Choice:
    return max(scores, key=lambda choice: float(rows.w @ scores[choice]))


def _neighbours(shrinkage: float) -> tuple[float, ...]:
    place = SHRINKAGES.index(shrinkage)
    return SHRINKAGES[max(place - 1, 0) : place + 2]


def _unless_clearly_worse(scores: dict[Choice, Array], simple: Choice, rows: Rows, of_few: float) -> Choice:
    """The best choice if its mean gain over the simple one is above the standard errors asked for; else that one."""
    best = _best(scores, rows)
    gain = scores[best] - scores[simple]
    mean = float(rows.w @ gain)
    error = float(rows.w @ (gain - mean) ** 2 / len(gain)) ** 0.5
    asked = N_STANDARD_ERRORS if len(gain) >= FEW else of_few
    return best if mean > asked * error else simple


def _held_out(
    rows: Rows, folds: NDArray[np.int64], size: int, shrinkages: tuple[float, ...], seed: int
) -> dict[float, Array]:
    """By shrinkage, every row's log-density under the fit without its fold."""
    scores = {a: np.empty(len(rows.Z)) for a in shrinkages}
    for fold in range(int(folds.max()) + 1):
        training, left_out = rows.take(folds != fold), folds == fold
        start: Gaussians | None = None
        for a in shrinkages:
            if start is None:
                start = _fit(training, Choice(size, a), seed, n_starts=2, n_steps=50)
            else:
                start, _ = _maximise(training, start, a, 20)
            scores[a][left_out] = _with_background(rows.Z[left_out], _with_single(start, training))
    return scores


def _with_background(Z: Array, gaussians: Gaussians) -> Array:
    """Log-density of the mixture, with a little of a multivariate Cauchy distribution around 0."""
    d = Z.shape[1]
    log_gamma = math.lgamma((d + 1) / 2)
    wide = log_gamma - 0.5 * (d + 1) * (np.log(np.pi) + np.log1p(np.einsum("nd,nd->n", Z, Z)))
    narrow = np.log1p(-BACKGROUND) + _log_sum(_log_joint(Z, gaussians))
    both: Array = np.logaddexp(narrow, np.log(BACKGROUND) + wide)
    return both


# --- the weighted EM algorithm ---


def _fit(rows: Rows, choice: Choice, seed: int, n_starts: int, n_steps: int, tol: float = 1e-4) -> Gaussians:
    """The best of some short runs, run on (Biernacki, Celeux and Govaert 2003)."""
    size, a = choice
    if size == 1 or len(rows.Z) <= size:
        return _from_responsibilities(rows, np.ones((len(rows.Z), 1)), a)
    runs = []
    for start in range(n_starts):
        R = np.eye(size)[_clusters(rows, size, (seed + start) % 2**32)]
        runs.append(_maximise(rows, _from_responsibilities(rows, R, a), a, 15))
    best, _ = max(runs, key=lambda run: run[1])
    return _maximise(rows, best, a, n_steps, tol)[0]


def _with_single(gaussians: Gaussians, rows: Rows) -> Gaussians:
    """With the single Gaussian as one more component: of a quarter with 30 rows, of the weight of one with thousands.

    Components fitted to a handful of rows are too narrow, and between and beyond them a row may come. This way no place
    is more than log(n + 1) nats below the single Gaussian's density; with 30 rows, log(4).
    """
    if len(gaussians.weights) == 1:
        return gaussians
    n = len(rows.Z)
    single = _from_responsibilities(rows, np.ones((n, 1)), 0.0)
    parts = [np.concatenate([ours, its]) for ours, its in zip(gaussians, single, strict=True)]
    share = max(min((ROWS_OF_SINGLE / n) ** 1.5, LARGEST_SINGLE_SHARE), 1 / (n + 1))
    parts[0] *= np.append(np.full(len(gaussians.weights), 1 - share), share)
    return Gaussians(*parts)


def _clusters(rows: Rows, size: int, seed: int) -> NDArray[np.int64]:
    """Labels of a few steps of k-means; some may be empty.

    scikit-learn's KMeans would warn of those, and a warning of a mere start is not the user's. Far rows are drawn near,
    so that the distances of others do not drown in their rounding.
    """
    Z = 5 * np.arcsinh(rows.Z / 5)
    centres, _ = kmeans_plusplus(Z, size, sample_weight=rows.w * len(rows.w), random_state=seed)
    for _ in range(15):
        labels: NDArray[np.int64] = (np.square(centres).sum(axis=1) - 2 * Z @ centres.T).argmin(axis=1)
        members = np.eye(size)[labels] * rows.w[:, None]
        total = members.sum(axis=0)
        last, centres = centres, np.where(total > 0, Z.T @ members / np.maximum(total, 1e-300), centres.T).T
        if (last == centres).all():
            break
    return labels


def _maximise(
    rows: Rows, gaussians: Gaussians, shrinkage: float, n_steps: int, tol: float = 1e-4
) -> tuple[Gaussians, float]:
    """Up to ``n_steps`` of EM; stops when the mean log-likelihood rises by less than ``tol``."""
    last = -np.inf
    for _ in range(n_steps):
        joint = _log_joint(rows.Z, gaussians)
        log_density = _log_sum(joint)
        likelihood = float(rows.w @ log_density)
        if abs(likelihood - last) < tol:
            break
        last = likelihood
        gaussians = _from_responsibilities(rows, np.exp(joint - log_density[:, None]), shrinkage)
    return gaussians, last


def _from_responsibilities(rows: Rows, R: Array, shrinkage: float) -> Gaussians:
    """The M-step; components that have lost their rows are dropped."""
    shares = R * rows.w[:, None]
    weights = shares.sum(axis=0)
    alive = weights > 1e-8
    shares, weights = shares[:, alive], weights[alive]
    means = shares.T @ rows.Z / weights[:, None]
    offsets = (rows.Z - means[:, None]) * np.sqrt(shares / weights).T[:, :, None]
    covariances = offsets.transpose(0, 2, 1) @ offsets
    variances = weights @ np.einsum("kdd->kd", covariances) / weights.sum()
    # One distinct row has no variance: that of the standardised table stands in.
    target = variances if len(rows.Z) > 1 else np.ones_like(variances)
    covariances = (1 - shrinkage) * covariances + np.diag(shrinkage * target)
    largest = np.einsum("kdd->kd", covariances).max(axis=1, initial=0.0)
    floor = VARIANCE_FLOOR + ROUND_OFF * largest
    return Gaussians(weights / weights.sum(), means, covariances + floor[:, None, None] * np.eye(rows.Z.shape[1]))


def _log_joint(Z: Array, gaussians: Gaussians) -> Array:
    """log(weight of k times its density), shape (n, K)."""
    weights, means, covariances = gaussians
    factors = np.linalg.cholesky(covariances)
    whiteners = np.linalg.inv(factors).transpose(0, 2, 1)
    constants = np.log(weights) - np.log(np.einsum("kdd->kd", factors)).sum(axis=1)
    constants -= 0.5 * Z.shape[1] * np.log(2 * np.pi)
    white = (Z - means[:, None]) @ whiteners
    joint: Array = constants - 0.5 * np.einsum("knd,knd->nk", white, white)
    return joint


def _log_sum(joint: Array) -> Array:
    peak = joint.max(axis=1, keepdims=True)
    total: Array = peak[:, 0] + np.log(np.exp(joint - peak).sum(axis=1))
    return total
