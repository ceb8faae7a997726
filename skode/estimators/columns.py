"""Between a table as it comes and the standardised, continuous columns that a density is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from skode.estimators.column_kinds import (
    COLLINEAR,
    CONSTANT,
    DUPLICATE,
    ColumnKinds,
    Lattice,
    column_name,
    find_kinds,
)
from skode.estimators.stored import stored
from skode.runtime import key_uniforms, kronecker_steps, row_keys

Array = NDArray[np.float64]

# Log-density that a row loses by each relation it breaks. Finite, so that means over rows stay finite and differences
# between models scored on the same rows are kept; far below what a row on the table's own surface gets.
BROKEN_RELATION = -1e6
RELATION_TOLERANCE = 1e-6  # of the largest term: rows that went through float32 are not called broken
OUTLIER_CUT = 10.0  # robust deviations, beyond which a value counts as being there
FINE_CELL = 0.01  # of a column's scale: within such a cell the mean density is that of the middle


@stored
@dataclass(frozen=True, eq=False)
class Columns:
    """What a density estimator needs to know of a table's columns.

    Constant, duplicate and collinear columns are left out of the density and rebuilt. Discrete columns are spread
    uniformly over their cells (Theis, van den Oord and Bethge 2016, arXiv:1511.01844, section 3.1): the log-density of
    a value of the lattice is that of its cell's mass minus log(spacing), the mean density over the cell. Hence
    densities share units with those of peers that take the values as they are.

    Densities are with respect to the kept columns, in their units; the columns left out are point masses given the
    others, and add nothing where the relation holds.

    Parameters
    ----------
    found : ColumnKinds
    mean, scale : arrays of shape (n_kept,)
        Of the kept columns.
    names : tuple of str, optional
        Of all columns.

    Examples
    --------
    >>> import numpy as np
    >>> from skode.estimators.columns import Columns
    >>> rng = np.random.default_rng(0)
    >>> x, k = rng.normal(size=100), rng.integers(6, size=100)
    >>> table = np.column_stack([x, k, 2 * x + 1, np.full(100, 7.0)])
    >>> columns = Columns.fit(table)
    >>> columns.kinds.tolist()
    ['continuous', 'integer', 'collinear', 'constant']
    >>> Z = columns.standardise(columns.dequantise(table, seed=0))
    >>> Z.shape, bool(np.allclose(columns.restore(Z), table))
    ((100, 2), True)
    """

    found: ColumnKinds
    mean: Array
    scale: Array
    names: tuple[str, ...] | None = None

    @classmethod
    def fit(
        cls,
        X: NDArray[Any],
        sample_weight: NDArray[Any] | None = None,
        discrete: Any = "auto",
        names: Sequence[str] | None = None,
    ) -> Self:
        """Learn the columns of a table.

        Parameters
        ----------
        X : array of shape (n, n_columns)
            Finite.
        sample_weight : array of shape (n,), optional
            A weight of 2 counts as the row twice, one of 0 as none.
        discrete : {"auto", None} or sequence of int or str, default="auto"
            Columns to look at for a lattice: all, none, or these.
        names : sequence of str, optional
            Names of the columns, for messages and ``discrete``.

        Raises
        ------
        ValueError
            If no row has a positive weight, a column is too large to be standardised, or ``discrete`` names a column
            that is unknown or continuous.
        """
        X = np.asarray(X)
        weight = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        X, weight = X[weight > 0], weight[weight > 0]
        if not len(X):
            raise ValueError("no row of X has a positive weight.")
        names = None if names is None else tuple(str(name) for name in names)
        _refuse_huge(X, names)
        found = find_kinds(X, weight, discrete, names)
        pairs = [
            _mean_and_scale(X[:, j].astype(np.float64), weight, found.lattices.get(j)) for j in found.kept.tolist()
        ]
        mean, scale = np.array(pairs, np.float64).reshape(-1, 2).T
        return cls(found, mean, scale, names)

    # --- what was found ---

    @property
    def kinds(self) -> NDArray[np.str_]:
        """The kind of each column, see :class:`ColumnKinds`."""
        return np.array(self.found.kinds, dtype=np.str_)

    @property
    def n_kept(self) -> int:
        """Number of columns that the density is fitted to; 0 if all are constant."""
        return len(self.mean)

    @property
    def n_repeats(self) -> int:
        """Times each row of a table with many equal rows is to be dequantised; 1 where hardly any rows are equal."""
        return self.found.n_repeats

    @property
    def log_scale(self) -> float:
        """Log-determinant of the scale: the log-density of rows is that of standardised ones minus this."""
        return float(np.log(self.scale).sum())

    def messages(self, table: str = "X") -> list[str]:
        """A sentence for each column that is left out."""
        sentences = [self._message(relation) for relation in self.found.relations]
        return [sentence.replace(" of X ", f" of {table} ", 1) for sentence in sentences]

    def _message(self, relation: Any) -> str:
        name, kind = column_name(relation.target, self.names), self.found.kinds[relation.target]
        others = ", ".join(column_name(int(s), self.names).removesuffix(" of X") for s in relation.sources)
        what = {
            CONSTANT: f"is constant ({relation.intercept:g})",
            DUPLICATE: f"is a copy of {others}",
            COLLINEAR: f"is a linear combination of {others}",
        }[kind]
        return f"{name} {what}: the density leaves it out, and samples rebuild it."

    # --- to the density and back ---

    def dequantise(self, X: NDArray[Any], seed: int, repeat: int = 0, content: NDArray[Any] | None = None) -> Array:
        """The kept columns, discrete ones spread uniformly over their cells.

        The noise depends on the row's content, ``seed`` and ``repeat`` alone. Equal rows get equal noise, so that a
        weight of 2 is the row twice; rows of a table in which many are equal are to be dequantised
        :attr:`n_repeats` times, each time with the weight divided by that number. Repetitions of a row fill its cell
        evenly.

        Parameters
        ----------
        X : array of shape (n, n_columns)
        seed, repeat : int
        content : array of shape (n, m), optional
            What noise depends on if it is not X.

        Returns
        -------
        array of shape (n, n_kept)
        """
        spread = np.array(X[:, self.found.kept], np.float64)
        lattices = self._kept_lattices()
        u = key_uniforms(row_keys(X if content is None else content, seed), len(lattices))
        u = (u + repeat * kronecker_steps(len(lattices))) % 1.0
        for (place, lattice), noise in zip(lattices.items(), u.T, strict=True):
            spread[:, place] = lattice.spread(spread[:, place], np.clip(noise, 2.0**-52, 1 - 2.0**-52))
        return spread

    def centres(self, X: NDArray[Any]) -> Array:
        """The kept columns, discrete ones at their lattices' nearest values; shape (n, n_kept)."""
        kept = np.array(X[:, self.found.kept], np.float64)
        for place, lattice in self._kept_lattices().items():
            kept[:, place] = lattice.snap(kept[:, place])
        return kept

    @property
    def has_cells(self) -> bool:
        """Whether the density of a row is a mean over a cell that is not small."""
        return bool(self._wide_cells())

    def cell_noise(self, X: NDArray[Any], k: int) -> Array:
        """Offsets from :meth:`centres` that fill the rows' cells evenly, for a mean of the density over them.

        The same fractions of a cell for every row: a row's density does not depend on its company. One discrete column
        takes k midpoints, more take a Kronecker sequence. 0 in continuous columns and in cells of at most a hundredth
        of the column's scale.

        Parameters
        ----------
        X : array of shape (n, n_columns)
        k : int
            Places in a cell.

        Returns
        -------
        array of shape (k, n, n_kept)
        """
        centres = self.centres(X)
        offsets = np.zeros((k, *centres.shape))
        wide = self._wide_cells()
        u = self.cell_points(k)
        for column, (place, lattice) in enumerate(wide.items()):
            x = centres[:, place]
            offsets[:, :, place] = lattice.spread(x[None], u[:, column : column + 1]) - x
        return offsets

    def cell_points(self, k: int) -> Array:
        """The fractions of the cells that are not small, (k, n_wide)."""
        return _cell_points(k, len(self._wide_cells()))

    def cells(self) -> tuple[list[int], list[Lattice], list[int]]:
        """Places among the kept columns of the discrete ones, their lattices, and which cells are not small."""
        lattices = self._kept_lattices()
        return list(lattices), list(lattices.values()), list(self._wide_cells())

    def log_density(self, X: NDArray[Any], log_standardised: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Log-density of the table's rows from those of standardised places in their cells.

        Parameters
        ----------
        X : array of shape (n, n_columns)
        log_standardised : array of shape (k, n)
            Log-density at ``standardise(centres(X) + cell_noise(X, k))``; k = 1 without wide cells.

        Returns
        -------
        log_density : array of shape (n,)
            In the units of X; a million nats less for each relation that a row breaks.
        broken : array of shape (n,) of bool
            Rows that break a relation: their probability is 0.
        """
        peak = log_standardised.max(axis=0)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        with np.errstate(divide="ignore"):
            mean = peak + np.log(np.exp(log_standardised - peak).mean(axis=0))
        n_broken = self.n_broken(X)
        return mean - self.log_scale + BROKEN_RELATION * n_broken, n_broken > 0

    def n_broken(self, X: NDArray[Any]) -> NDArray[np.int64]:
        """Relations that a row breaks by more than a millionth of their largest term; shape (n,)."""
        table = np.asarray(X, np.float64)
        broken = np.zeros(len(table), np.int64)
        for relation in self.found.relations:
            distance = np.abs(table[:, relation.target] - relation.rebuild(table))
            broken += distance > RELATION_TOLERANCE * relation.size(table)
        return broken

    def standardise(self, kept: Array) -> Array:
        """Kept columns in units of their scales, around 0."""
        with np.errstate(over="ignore"):
            standardised: Array = (kept - self.mean) / self.scale
        return standardised

    def restore(self, Z: NDArray[Any], *, snap: bool = True) -> Array:
        """A table of all columns from standardised rows.

        Discrete columns are rounded to their lattices and stay in the observed range; columns that were left out are
        rebuilt, which goes before their range.

        Parameters
        ----------
        Z : array of shape (n, n_kept)
        snap : bool, default=True
            Whether to round to lattices.

        Returns
        -------
        array of shape (n, n_columns)
        """
        lattices = self.found.lattices if snap else {}
        X = np.zeros((len(Z), len(self.found.kinds)))
        X[:, self.found.kept] = np.asarray(Z, np.float64) * self.scale + self.mean
        for j in self.found.kept.tolist():
            if j in lattices:
                X[:, j] = lattices[j].restore(X[:, j])
        for relation in self.found.relations:
            X[:, relation.target] = relation.rebuild(X)
            if relation.target in lattices:
                X[:, relation.target] = lattices[relation.target].snap(X[:, relation.target])
        return X

    def _kept_lattices(self) -> dict[int, Lattice]:
        """Lattices by place among the kept columns."""
        lattices = self.found.lattices
        return {place: lattices[j] for place, j in enumerate(self.found.kept.tolist()) if j in lattices}

    def _wide_cells(self) -> dict[int, Lattice]:
        """Those whose cells are not small."""
        return {
            place: lattice
            for place, lattice in self._kept_lattices().items()
            if lattice.levels is not None or lattice.spacing > FINE_CELL * self.scale[place]
        }


def _refuse_huge(X: NDArray[Any], names: Sequence[str] | None) -> None:
    """Raise where a range would overflow."""
    largest = np.abs(X).max(axis=0, initial=0.0).astype(np.float64)
    for j in np.flatnonzero(~(largest < 1e150)):
        raise ValueError(f"{column_name(int(j), names)} is too large to be standardised ({largest[j]:g}); rescale it.")


def _mean_and_scale(x: Array, weight: Array, lattice: Lattice | None) -> tuple[float, float]:
    """Weighted mean and standard deviation, far values cut; with the variance that dequantising adds.

    A value beyond 10 robust deviations of the median counts as being there: the columns of usual tables are not
    touched, and a single far value moves neither.
    """
    share = weight / weight.sum()
    centre = float(np.quantile(x, 0.5, weights=share, method="inverted_cdf"))
    cut = OUTLIER_CUT * _robust_deviation(x, share, few=lattice is None and len(np.unique(x)) < 25)
    unit = float(np.ldexp(1.0, int(np.frexp(cut)[1])))  # squares of tiny numbers would be 0; this rounds nothing
    near = np.clip(x - centre, -cut, cut) / unit
    mean = float(share @ near)
    variance = float(share @ (near - mean) ** 2)
    if lattice is not None:
        widths = np.diff(lattice.edges) if lattice.levels is not None else np.array([lattice.spacing])
        variance += (float(np.median(widths)) / unit) ** 2 / 12
    return centre + mean * unit, float(np.sqrt(variance)) * unit


_TAILS = ((0.25, 0.6745), (0.1, 1.2816), (0.05, 1.6449), (0.01, 2.3263))  # with their normal deviations


def _robust_deviation(x: Array, share: Array, *, few: bool) -> float:
    """Half of a central range of the weight in normal deviations: of the middle 90 %, of the middle half of few values.

    If that is 0 the next wider one; the whole range in the end. A group of rows far away, beyond the ends of the
    middle half, is not an outlier; of few values a single one is already more than 5 %.
    """
    for tail, deviations in _TAILS if few else _TAILS[2:]:
        low, high = np.quantile(x, [tail, 1 - tail], weights=share, method="inverted_cdf")
        if high > low:
            return float(high - low) / 2 / deviations
    return float(np.ptp(x))


def _cell_points(k: int, n_columns: int) -> Array:
    """Places that fill the unit cube evenly; shape (k, n_columns)."""
    midpoints = (np.arange(k)[:, None] + 0.5) / k
    if n_columns == 0:
        return midpoints[:, :0]
    others = (0.5 + np.arange(k)[:, None] * kronecker_steps(n_columns - 1)) % 1.0
    return np.concatenate([midpoints, others], axis=1)
