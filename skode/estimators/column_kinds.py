"""What the columns of a table are: constant, copies or combinations of others, lattices, continuous.

Finding goes by distinct rows and total weights, so that a weight of 2 is the row twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skode.estimators.stored import stored
from skode.runtime import row_keys

Array = NDArray[np.float64]

CONSTANT, DUPLICATE, COLLINEAR = "constant", "duplicate", "collinear"
BINARY, INTEGER, ROUNDED, LEVELS, CONTINUOUS = "binary", "integer", "rounded", "levels", "continuous"

ROUND_OFF = 4.0  # machine epsilons of a column's largest value: what equal values may differ by
COARSEST_NOISE = 400.0  # a spacing is so many times the round-off at least
FEWEST_ROWS = 10  # that show a lattice which is not made of whole numbers
MOST_DISTINCT = 0.9  # of the rows: a column with fewer repeated values counts as continuous
SHARE_ON_LATTICE = 0.98  # of the weight; single values off the lattice do not hide it
MUCH_COARSER = 10.0  # times: a lattice worth leaving single values off for
FEW_LEVELS = 20  # values without a common spacing that make a column of levels, at most 5 % of the rows
SPARE_ROWS = 5  # beyond those that any columns of this number would fit exactly


@stored
class Lattice(NamedTuple):
    """Values origin + k spacing within [low, high]; or any ``levels``, in cells that end half-way to their neighbours.

    A cell is where the values lie that are rounded to one value of the lattice. With ``per_unit`` the values are whole
    numbers divided by it: decimals come back as they were written.
    """

    origin: float
    spacing: float
    low: float
    high: float
    levels: Array | None = None
    per_unit: float | None = None

    def snap(self, x: Array) -> Array:
        """The nearest value of the lattice, which may be out of range."""
        if self.levels is not None:
            nearest: Array = self.levels[np.searchsorted(self.edges[1:-1], x)]
            return nearest
        if self.per_unit is not None:
            decimals: Array = np.rint(x * self.per_unit) / self.per_unit
            return decimals
        return self.origin + np.rint((x - self.origin) / self.spacing) * self.spacing

    def restore(self, x: Array) -> Array:
        """The nearest value of the lattice in the observed range."""
        return np.clip(self.snap(np.clip(x, self.low, self.high)), self.low, self.high)

    def spread(self, x: Array, u: Array) -> Array:
        """The place at the fraction ``u`` in (0, 1) of the cell around ``x``."""
        if self.levels is None:
            return self.snap(x) + (u - 0.5) * self.spacing
        place = np.searchsorted(self.edges[1:-1], x)
        return self.edges[place] * (1 - u) + self.edges[place + 1] * u

    @property
    def edges(self) -> Array:
        """Ends of the levels' cells; the outermost cells are symmetric."""
        assert self.levels is not None
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        first, last = 2 * self.levels[0] - middles[0], 2 * self.levels[-1] - middles[-1]
        return np.concatenate([[first], middles, [last]])


@stored
class Relation(NamedTuple):
    """Column ``target`` is ``intercept`` plus ``coefficients`` times the columns ``sources``."""

    target: int
    sources: NDArray[np.int64]
    coefficients: Array
    intercept: float

    def rebuild(self, X: Array) -> Array:
        """The target from the other columns."""
        rebuilt: Array = X[:, self.sources] @ self.coefficients + self.intercept
        return rebuilt

    def size(self, X: Array) -> Array:
        """Size of the largest term and of the target in every row: what a deviation is measured by."""
        terms = np.abs(X[:, self.sources] * self.coefficients).max(axis=1, initial=abs(self.intercept))
        size: Array = np.maximum(terms, np.abs(X[:, self.target]))
        return size


@stored
@dataclass(frozen=True)
class ColumnKinds:
    """The kind of each column, and what it takes to leave out and rebuild it.

    Attributes
    ----------
    kinds : tuple of str
        "constant", "duplicate", "collinear", "binary", "integer", "rounded" (to a spacing), "levels" (few values
        without a common spacing) or "continuous".
    lattices : dict
        By number of column, the lattice of discrete ones; of discrete columns that are rebuilt from others, too.
    relations : tuple of Relation
        Of constant, duplicate and collinear columns, whose sources are all kept.
    n_repeats : int
        Rows to each distinct row, the mean rounded; 1 without lattices.
    """

    kinds: tuple[str, ...]
    lattices: dict[int, Lattice] = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()
    n_repeats: int = 1

    @property
    def kept(self) -> NDArray[np.int64]:
        """Numbers of the columns that are not rebuilt from others."""
        left_out = {relation.target for relation in self.relations}
        return np.array([j for j in range(len(self.kinds)) if j not in left_out], dtype=np.int64)


def find_kinds(
    X: NDArray[Any],
    weight: Array,
    discrete: Any = "auto",
    names: Sequence[str] | None = None,
) -> ColumnKinds:
    """Find the kind of each column.

    Parameters
    ----------
    X : array of shape (n, n_columns)
        Finite; a float32 table is granted float32's round-off.
    weight : array of shape (n,)
        All positive.
    discrete : {"auto", None} or sequence of int or str
        Columns that are looked at for a lattice: all, none, or these by number or name. Those named are discrete
        however many values they have.
    names : sequence of str, optional

    Raises
    ------
    ValueError
        If a column named in ``discrete`` is unknown or continuous.
    """
    epsilon = float(np.finfo(X.dtype).eps) if X.dtype.kind == "f" else float(np.finfo(np.float64).eps)
    X = np.asarray(X, np.float64)
    named = None if discrete is None or isinstance(discrete, str) else named_columns(discrete, X.shape[1], names)
    kinds = [CONTINUOUS] * X.shape[1]
    relations, lattices = [], {}
    for j, x in enumerate(X.T):
        if np.ptp(x) <= ROUND_OFF * 2 * epsilon * np.abs(x).max():
            kinds[j] = CONSTANT
            relations.append(_relation(j, [], [], float(np.median(x))))
        elif discrete == "auto" or (named is not None and j in named):
            found = _find_lattice(x, weight, epsilon, asked_for=named is not None)
            if found is not None:
                kinds[j], lattices[j] = found
            elif named is not None:
                raise ValueError(
                    f"{column_name(j, names)} was named in discrete, but its values have no common spacing and are "
                    f"more than {FEW_LEVELS}; leave it out, or round it."
                )
    distinct = X[np.unique(row_keys(X), return_index=True)[1]]
    n_rows = max(float(weight.sum()), len(X))
    for relation in _find_relations(distinct, X, kinds, lattices, n_rows, epsilon):
        is_copy = len(relation.sources) == 1 and relation.coefficients[0] == 1 and relation.intercept == 0
        kinds[relation.target] = DUPLICATE if is_copy else COLLINEAR
        relations.append(relation)
    n_repeats = max(1, round(n_rows / len(distinct))) if lattices else 1
    return ColumnKinds(tuple(kinds), lattices, tuple(sorted(relations, key=lambda r: r.target)), n_repeats)


def column_name(j: int, names: Sequence[str] | None) -> str:
    """How a message calls a column."""
    return f"column {j} of X" if names is None else f"column {names[j]!r} of X"


def named_columns(discrete: Any, n_columns: int, names: Sequence[str] | None) -> set[int]:
    """Numbers of the columns that the user listed by number or name."""
    known = {} if names is None else {name: j for j, name in enumerate(names)}
    numbers = set()
    for item in discrete:
        j = known.get(item, item) if isinstance(item, str) else item
        if isinstance(j, str) or not 0 <= int(j) < n_columns:
            raise ValueError(f"discrete names column {item!r}, but X has no such column; it has {n_columns}.")
        numbers.add(int(j))
    return numbers


# --- lattices ---


def _find_lattice(x: Array, weight: Array, epsilon: float, *, asked_for: bool) -> tuple[str, Lattice] | None:
    """Kind and lattice of a column that is not constant; None for a continuous one."""
    noise = ROUND_OFF * epsilon * float(np.abs(x).max())
    values, counts = _distinct(x, weight, noise)
    n_rows = max(float(weight.sum()), len(x))
    low, high = float(values[0]), float(values[-1])
    if not asked_for and len(values) > 2 and len(values) > MOST_DISTINCT * n_rows and not _is_whole(values, epsilon):
        return None
    if len(values) == 2 and (asked_for or n_rows >= FEWEST_ROWS):
        return BINARY, Lattice(low, high - low, low, high)
    if _is_whole(values, epsilon):
        step = float(np.gcd.reduce(np.diff(values).astype(np.int64))) if n_rows >= FEWEST_ROWS else 1.0
        if step > 1:
            return ROUNDED, Lattice(low, step, low, high)
        return INTEGER, Lattice(0.0, 1.0, low, high, per_unit=1.0)
    if n_rows < FEWEST_ROWS and not asked_for:
        return None
    found = _find_spacing(values, counts, noise)
    if found is not None:
        origin, spacing = found
        lattice = _in_decimals(Lattice(origin, spacing, low, high), noise)
        ends = lattice.snap(np.array([low, high]))
        return ROUNDED, lattice._replace(low=float(ends[0]), high=float(ends[1]))
    if len(values) <= FEW_LEVELS and (asked_for or len(values) <= 0.05 * n_rows):
        return LEVELS, Lattice(0.0, float("nan"), low, high, values)
    return None


def _is_whole(values: Array, epsilon: float) -> bool:
    """Whether all values are whole numbers of a size at which not every number is one."""
    return bool(np.abs(values).max() * epsilon < 0.05 and (values == np.rint(values)).all())


def _distinct(x: Array, weight: Array, noise: float) -> tuple[Array, Array]:
    """Sorted values with their total weights; those within ``noise`` of the one before count as that one."""
    order = np.argsort(x, kind="stable")
    sorted_x = x[order]
    starts = np.flatnonzero(np.diff(sorted_x, prepend=-np.inf) > noise)
    return sorted_x[starts], np.add.reduceat(weight[order], starts)


def _find_spacing(values: Array, counts: Array, noise: float) -> tuple[float, float] | None:
    """Origin and spacing of a lattice that holds nearly all of the weight; None if there is none.

    That of all values, unless those met more often than the rarest lie on a far coarser one: single values may be off.
    """
    fine = _spacing_of(values, values, counts, noise)
    repeated = values[counts > counts.min()]
    coarse = _spacing_of(repeated, values, counts, noise)
    if fine is None or coarse is None:
        return fine or coarse
    return coarse if coarse[1] > MUCH_COARSER * fine[1] else fine


def _spacing_of(some: Array, values: Array, counts: Array, noise: float) -> tuple[float, float] | None:
    """Origin and spacing of the lattice through ``some`` values if nearly all of the weight is on it."""
    spacing = _common_divisor(np.diff(some), noise) if len(some) >= 3 else None
    if spacing is None:
        return None
    k = np.rint((some - some[0]) / spacing)
    # The fit averages the noise out; the whole numbers that the rough spacing gave were right.
    spacing = float(np.polyfit(k, some - some[0], 1)[0])
    origin = float(np.median(some - k * spacing))
    off = np.abs(values - origin - np.rint((values - origin) / spacing) * spacing)
    on = off <= max(8 * noise, 1e-6 * spacing)
    return (origin, spacing) if counts[on].sum() >= SHARE_ON_LATTICE * counts.sum() else None


def _in_decimals(lattice: Lattice, noise: float) -> Lattice:
    """The same lattice, as whole numbers over a whole number if it can be written so."""
    per_unit = float(np.rint(1 / lattice.spacing))
    is_whole = per_unit >= 1 and abs(per_unit * lattice.spacing - 1) < 1e-9
    if not is_whole or abs(lattice.origin - np.rint(lattice.origin * per_unit) / per_unit) > 8 * noise:
        return lattice
    return lattice._replace(spacing=1 / per_unit, per_unit=per_unit)


def _common_divisor(gaps: Array, noise: float) -> float | None:
    """Euclid's algorithm on all gaps, where a remainder within some noise is 0; None if only noise divides them."""
    divisor = float(gaps.min())
    while divisor > COARSEST_NOISE * noise:
        remainders = gaps - np.rint(gaps / divisor) * divisor
        # Whole multiples carry the divisor's own error along.
        left = np.abs(remainders)[np.abs(remainders) > np.maximum(8 * noise, 1e-9 * gaps)]
        if not len(left):
            return divisor
        divisor = float(left.min())
    return None


# --- relations ---


def _relation(target: int, sources: Sequence[int], coefficients: Any, intercept: float) -> Relation:
    return Relation(target, np.array(sources, np.int64), np.array(coefficients, np.float64), intercept)


def _find_relations(
    distinct: Array, X: Array, kinds: list[str], lattices: dict[int, Lattice], n_rows: float, epsilon: float
) -> list[Relation]:
    """Columns that are combinations of those before them; discrete ones come first, as rounding would break a relation.

    So few rows that any columns would fit them show nothing. Equal rows count as several where all columns are
    discrete: three kinds of rows, each of them often, show that a table is one-hot.
    """
    varying = [j for j, kind in enumerate(kinds) if kind != CONSTANT]
    order = sorted(varying, key=lambda j: j not in lattices)
    if len(order) < 2:
        return []
    tolerance = 1e-2 * epsilon**0.5
    some = distinct[:: max(1, len(distinct) // (20 * X.shape[1] + 1000))]
    A, centres, scales = _equilibrated(some, order)
    basis = [A[:, 0] / np.linalg.norm(A[:, 0])]
    kept: list[int] = []
    relations = []
    for place, j in enumerate(order):
        column = A[:, place + 1]
        Q = np.column_stack(basis)
        rest = column - Q @ (Q.T @ column)
        rest -= Q @ (Q.T @ rest)
        enough = (n_rows if j in lattices else len(distinct)) >= len(kept) + 1 + SPARE_ROWS
        if enough and np.linalg.norm(rest) <= 10 * tolerance * np.linalg.norm(column):
            relation = _solve_relation(A, order, kept, place, centres, scales)
            if (np.abs(X[:, j] - relation.rebuild(X)) <= tolerance * relation.size(X)).all():
                relations.append(relation)
                continue
        if np.linalg.norm(rest) > 1e-12 * np.linalg.norm(column):
            basis.append(rest / np.linalg.norm(rest))
        kept.append(place)
    return relations


def _equilibrated(X: Array, order: list[int]) -> tuple[Array, Array, Array]:
    """A column of ones and the standardised columns, each row divided by its length: a far row counts as one row."""
    Z = X[:, order]
    centres = np.median(Z, axis=0)
    scales = np.median(np.abs(Z - centres), axis=0)
    fallback = np.abs(Z - centres).max(axis=0)
    scales = np.where(scales > 0, scales, fallback)
    scales = np.where(scales > 0, scales, 1.0)
    A = np.column_stack([np.ones(len(Z)), (Z - centres) / scales])
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    return A, centres, scales


def _solve_relation(A: Array, order: list[int], kept: list[int], place: int, centres: Array, scales: Array) -> Relation:
    """Coefficients in the table's units; those that are 0 or whole within round-off are made so."""
    use = [0, *(k + 1 for k in kept)]
    for _ in range(2):
        solution = np.linalg.lstsq(A[:, use], A[:, place + 1], rcond=None)[0]
        needed = np.abs(solution) > 1e-9
        use = [column for column, is_needed in zip(use, needed, strict=True) if is_needed or column == 0]
    solution = np.linalg.lstsq(A[:, use], A[:, place + 1], rcond=None)[0]
    sources = [column - 1 for column in use[1:]]
    coefficients = solution[1:] * scales[place] / scales[sources]
    whole = np.rint(coefficients)
    is_whole = np.abs(coefficients - whole) <= 1e-9 * np.maximum(np.abs(coefficients), 1.0)
    # A coefficient far below 1 (columns of other units) is not rounded to 0.
    coefficients = np.where(is_whole & (whole != 0), whole, coefficients)
    intercept = float(centres[place] + solution[0] * scales[place] - centres[sources] @ coefficients)
    terms = np.abs([centres[place], scales[place], *(centres[sources] * coefficients)])
    intercept = 0.0 if abs(intercept) <= 1e-10 * terms.max() else intercept
    return _relation(order[place], [order[s] for s in sources], coefficients, intercept)
