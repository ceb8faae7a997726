"""Explicit Runge-Kutta methods as data: a new method is one literal.

Symbols, as in Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I": nodes ``c``, stage weights
``a``, solution weights ``b``, error weights ``e`` (``b`` less those of the embedded method), and ``p``: the dense
output's polynomials, ``y(t + theta h) = y + h sum_i k_i sum_j p[i, j] theta^(j + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method, checked for consistency when it is made.

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
        Order of the embedded method's error estimate as a power of h (0 without one).
    p : tuple of tuple of float, optional
        Dense output; None means the cubic Hermite polynomial through both ends.
    dense_order : int
        Order of the dense output.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...] | None = None
    error_order: int = 0
    p: tuple[tuple[float, ...], ...] | None = None
    dense_order: int = 0
    c: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.p is None:
            object.__setattr__(self, "dense_order", min(self.order, 3))
        object.__setattr__(self, "c", (0.0, *(_node(sum(row)) for row in self.a)))
        self._require(len(self.b) == len(self.a) + 1, "one solution weight a stage")
        self._require(all(len(row) == i + 1 for i, row in enumerate(self.a)), "explicit stages")
        nodes, weights = np.array(self.c), np.array(self.b)
        for k in range(1, self.order + 1):
            self._require(abs(weights @ nodes ** (k - 1) - 1 / k) < 1e-12, f"quadrature order {k}")
        if self.e is not None:
            self._require(len(self.e) == len(self.b) and abs(sum(self.e)) < 1e-12, "error weights that add up to 0")
        if self.p is not None:
            self._require(
                np.allclose(np.sum(self.p, axis=1), self.b, rtol=0, atol=1e-12),
                "dense output that ends at y1",
            )

    def _require(self, fulfilled: bool, what: str) -> None:
        if not fulfilled:
            raise ValueError(f"tableau {self.name!r} lacks: {what}")

    @property
    def adaptive(self) -> bool:
        """Whether the method estimates its error."""
        return self.e is not None

    @property
    def n_stages(self) -> int:
        """Number of stages, the first-same-as-last one included."""
        return len(self.b)

    @cached_property
    def fsal(self) -> bool:
        """Whether the last stage is the field at the new state (first same as last)."""
        return self.b[-1] == 0 and np.allclose(self.a[-1], self.b[:-1], rtol=0, atol=1e-14)

    @cached_property
    def closed(self) -> Tableau:
        """The same method with a last stage at the new state, as dense output needs it."""
        if self.fsal:
            return self
        error = None if self.e is None else (*self.e, 0.0)
        return replace(self, a=(*self.a, self.b), b=(*self.b, 0.0), e=error)

    @cached_property
    def dense(self) -> NDArray[np.float64]:
        """Dense output of the closed method, as powers of theta: shape (n_stages, degree)."""
        if self.p is not None:
            return np.array(self.p)
        hermite = np.outer(self.closed.b, [0.0, 3.0, -2.0])
        hermite[0] += [1.0, -2.0, 1.0]
        hermite[-1] += [0.0, -1.0, 1.0]
        return hermite


def _node(total: float) -> float:
    """A row sum of decimal literals may miss 1 by an ulp, and a node beyond 1 would leave the interval."""
    return 1.0 if abs(total - 1.0) < 1e-12 else total


EULER = Tableau("euler", 1, (), (1.0,))

MIDPOINT = Tableau("midpoint", 2, ((1 / 2,),), (0.0, 1.0))

HEUN = Tableau("heun", 2, ((1.0,),), (1 / 2, 1 / 2))

RK4 = Tableau("rk4", 4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))

# Kutta's 3/8 rule; torchdiffeq calls this one "rk4".
RK4_38 = Tableau("rk4_38", 4, ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))

ADAPTIVE_HEUN = Tableau("adaptive_heun", 2, ((1.0,),), (1 / 2, 1 / 2), (-1 / 2, 1 / 2), 2)

# Euler's rule embedded: two evaluations a step, and an estimate of first order that is much larger than the error.
ADAPTIVE_MIDPOINT = Tableau("adaptive_midpoint", 2, ((1 / 2,),), (0.0, 1.0), (-1.0, 1.0), 2)

# Fehlberg, NASA TR R-315 (1969), the second-order solution propagated.
FEHLBERG2 = Tableau(
    "fehlberg2",
    2,
    ((1 / 2,), (1 / 256, 255 / 256)),
    (1 / 512, 255 / 256, 1 / 512),
    (-1 / 512, 0.0, 1 / 512),
    2,
)

# Bogacki and Shampine, Appl. Math. Lett. 2(4), 1989.
BOSH3 = Tableau(
    "bosh3",
    3,
    ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    (2 / 9, 1 / 3, 4 / 9, 0.0),
    (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    3,
)

# Bogacki and Shampine's third-order weights with the midpoint rule embedded: three evaluations a step and none at its
# end, for solves of very few steps. The estimate is that of the midpoint rule, so it is on the safe side.
RK32 = Tableau(
    "rk32",
    3,
    ((1 / 2,), (0.0, 3 / 4)),
    (2 / 9, 1 / 3, 4 / 9),
    (2 / 9, 1 / 3 - 1, 4 / 9),
    3,
)

# Tsitouras, Comput. Math. Appl. 62(2), 2011, with its free fourth-order interpolant.
TSIT5 = Tableau(
    "tsit5",
    5,
    (
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        (
            0.09646076681806523,
            0.01,
            0.4798896504144996,
            1.379008574103742,
            -3.290069515436081,
            2.324710524099774,
        ),
    ),
    (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
        0.0,
    ),
    (
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    ),
    5,
    (
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.13169999999999998, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
    4,
)

# Dormand and Prince, J. Comput. Appl. Math. 6(1), 1980; dense output by Shampine, Math. Comp. 46, 1986.
DOPRI5 = Tableau(
    "dopri5",
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    5,
    (
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    4,
)

METHODS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN,
        RK4,
        RK4_38,
        ADAPTIVE_HEUN,
        ADAPTIVE_MIDPOINT,
        FEHLBERG2,
        RK32,
        BOSH3,
        TSIT5,
        DOPRI5,
    )
}


def get_tableau(method: str) -> Tableau:
    """The tableau that goes by ``method``'s name.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    try:
        return METHODS[method]
    except (KeyError, TypeError):
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(map(repr, METHODS))}.") from None
