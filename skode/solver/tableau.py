"""What a Runge-Kutta method consists of, and the checks that refuse one that is inconsistent.

Symbols, as in Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I": nodes ``c``, stage weights
``a``, solution weights ``b``, error weights ``e`` (``b`` less those of the embedded method), and ``p``: the dense
output's polynomials, ``y(t + theta h) = y + h sum_i k_i sum_j p[i, j] theta^(j + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Row = tuple[float, ...]


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method, explicit or diagonally implicit, checked for consistency when it is made.

    Parameters
    ----------
    name : str
    order : int
        Order of the solution that is propagated.
    a : tuple of tuple of float
        Row i holds the weights of the stages before stage i + 1.
    b : tuple of float
        Solution weights.
    e : tuple of float, optional
        Error weights; None makes it a fixed-step method.
    error_order : int
        Order of the error estimate as a power of h (0 without one), of the combined one where there are two.
    p : tuple of tuple of float, optional
        Dense output, one row for each stage of the closed method; None means the cubic Hermite polynomial through both
        ends.
    dense_order : int
        Order of the dense output.
    e2 : tuple of float, optional
        Weights of a second, coarser error estimate E2. With E, the norm of the first, the estimate is
        ``E^2 / sqrt(E^2 + 0.01 E2^2)``.
    extra : tuple of tuple of float
        Stages that only dense output needs, after the closed method's last one. Rows go on like those of ``a``.
    gamma : float
        The diagonal element of all stages but the first; 0 for explicit methods. The last stage of an implicit method
        has to be its new state.
    """

    name: str
    order: int
    a: tuple[Row, ...]
    b: Row
    e: Row | None = None
    error_order: int = 0
    p: tuple[Row, ...] | None = None
    dense_order: int = 0
    e2: Row | None = None
    extra: tuple[Row, ...] = ()
    gamma: float = 0.0
    c: Row = field(init=False)

    def __post_init__(self) -> None:
        if self.p is None:
            object.__setattr__(self, "dense_order", min(self.order, 3))
        object.__setattr__(self, "c", (0.0, *(self._node(row) for row in self.a)))
        self._check_stages()
        self._check_solution()
        self._check_errors()
        self._check_dense()

    def _node(self, row: Row) -> float:
        """A row sum of decimal literals may miss 1 by an ulp, and a node beyond 1 would leave the interval."""
        total = sum(row) + self.gamma
        return 1.0 if abs(total - 1.0) < 1e-12 else total

    def _require(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise ValueError(f"tableau {self.name!r} lacks: {what}")

    def _check_stages(self) -> None:
        self._require(len(self.b) == len(self.a) + 1, "one solution weight a stage")
        self._require(all(len(row) == i + 1 for i, row in enumerate(self.a)), "explicit stages")
        self._require(self.gamma >= 0, "a diagonal element that is not negative")
        nodes = (*self.c, *(self._node(row) for row in self.extra))
        self._require(all(0 <= node <= 1 for node in nodes), "nodes inside of the step")

    def _check_solution(self) -> None:
        nodes, weights = np.array(self.c), np.array(self.b)
        for k in range(1, self.order + 1):
            self._require(abs(weights @ nodes ** (k - 1) - 1 / k) < 1e-12, f"quadrature order {k}")
        self._require(self.fsal or not self.implicit, "an implicit last stage at the new state")

    def _check_errors(self) -> None:
        self._require(self.e is not None or self.e2 is None, "a first error estimate")
        for which, e in (("", self.e), ("second ", self.e2)):
            if e is not None:
                adds_up = len(e) == len(self.b) and abs(sum(e)) < 1e-12
                self._require(adds_up, f"{which}error weights that add up to 0")

    def _check_dense(self) -> None:
        n_closed = self.n_stages + len(self._closing)
        lengths = [len(row) for row in self.extra]
        self._require(lengths == [n_closed + i for i in range(len(lengths))], "explicit extra stages")
        if self.p is None:
            self._require(not self.extra, "dense output for the extra stages")
            return
        n_rows = n_closed + len(lengths)
        self._require(len(self.p) == n_rows and len(set(map(len, self.p))) == 1, "one row of dense output a stage")
        b = np.array(_padded(self.b, n_rows))
        self._require(np.allclose(np.sum(self.p, axis=1), b, rtol=0, atol=1e-12), "dense output that ends at y1")

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.e is not None

    @property
    def estimates(self) -> tuple[Row, ...]:
        """The weights of the error's estimates: none, one or two."""
        return tuple(e for e in (self.e, self.e2) if e is not None)

    @property
    def implicit(self) -> bool:
        """Whether stages have to be solved for."""
        return self.gamma != 0

    @cached_property
    def n_stages(self) -> int:
        """Number of stages, the first-same-as-last one included."""
        return len(self.b)

    @cached_property
    def n_main(self) -> int:
        """Number of stages that a step needs; those from here to ``n_stages`` are only for dense output."""
        return self.n_stages if self.end_stage is None else self.end_stage + 1

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """The stages' weights with zeros and the diagonal, shape (n_stages, n_stages)."""
        A = np.zeros((self.n_stages, self.n_stages))
        for i, row in enumerate(self.a, start=1):
            A[i, : i + 1] = (*row, self.gamma)
        return A

    @cached_property
    def end_stage(self) -> int | None:
        """Index of the stage that is the field at the new state, None without one."""
        at_end = np.flatnonzero(np.all(np.abs(self.matrix - np.array(self.b)) < 1e-14, axis=1))
        return int(at_end[-1]) if len(at_end) else None

    @property
    def fsal(self) -> bool:
        """Whether the step's last stage, number ``n_main - 1``, is the field at the new state (first same as last).

        In a closed method with extra stages it is not the last of all: ask ``end_stage`` for its place.
        """
        return self.end_stage is not None

    @property
    def _closing(self) -> tuple[Row, ...]:
        """The stage at the new state, if it has to be added."""
        return () if self.fsal else (self.b,)

    @cached_property
    def closed(self) -> Tableau:
        """The same method with all stages that dense output needs: one at the new state, and the extra ones."""
        added = (*self._closing, *self.extra)
        if not added:
            return self
        n = self.n_stages + len(added)
        e, e2 = (None if weights is None else _padded(weights, n) for weights in (self.e, self.e2))
        return replace(self, a=(*self.a, *added), b=_padded(self.b, n), e=e, e2=e2, extra=())

    @cached_property
    def dense(self) -> NDArray[np.float64]:
        """Dense output of the closed method, as powers of theta: shape (closed.n_stages, degree)."""
        if self.p is not None:
            return np.array(self.p)
        hermite = np.outer(self.closed.b, [0.0, 3.0, -2.0])
        hermite[0] += [1.0, -2.0, 1.0]
        hermite[self.closed.end_stage] += [0.0, -1.0, 1.0]
        return hermite


def _padded(weights: Row, n: int) -> Row:
    return (*weights, *(0.0,) * (n - len(weights)))
