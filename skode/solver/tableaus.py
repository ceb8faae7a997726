"""Runge-Kutta methods as data: a new method is one literal."""

from __future__ import annotations

from skode.solver.dopri8 import DOPRI8
from skode.solver.tableau import Tableau

__all__ = ["METHODS", "Tableau", "get_tableau"]

EULER = Tableau("euler", 1, (), (1.0,))

MIDPOINT = Tableau("midpoint", 2, ((1 / 2,),), (0.0, 1.0))

HEUN = Tableau("heun", 2, ((1.0,),), (1 / 2, 1 / 2))

# Heun, Z. Math. Phys. 45, 1900.
HEUN3 = Tableau("heun3", 3, ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))

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

# Kvaerno, BIT 44, 2004: the third-order pair, its weights to full precision from gamma, the middle root of
# 6 g^3 - 18 g^2 + 9 g = 1. L-stable; the embedded method (the third stage) is A-stable with R(infinity) = -0.957.
KVAERNO3 = Tableau(
    "kvaerno3",
    3,
    (
        (0.435866521508459,),
        (0.49056338842178054, 0.07357009006976042),
        (0.30880996997674653, 1.4905633884217806, -1.2352398799069861),
    ),
    (0.30880996997674653, 1.4905633884217806, -1.2352398799069861, 0.435866521508459),
    (-0.18175341844503404, 1.4169932983520201, -1.671106401415445, 0.435866521508459),
    3,
    gamma=0.435866521508459,
)

# Kennedy and Carpenter, Appl. Numer. Math. 44, 2003: the implicit half of ARK4(3)6L[2]SA. L-stable; the embedded method
# is A-stable with R(infinity) = -3/20. Kvaerno's 4(3) pairs are no choice here: with gamma = 0.4359 the fourth-order
# solution has R(infinity) = 0.72, and the L-stable one (gamma = 0.5728) evaluates at 1.15 h.
# Dense output: its stages leave one free quartic in theta. Smooth joints settle it but for the quartic's leading
# coefficient, and that is 0: the error inside of a step is then below that at its end.
KENCARP4 = Tableau(
    "kencarp4",
    4,
    (
        (1 / 4,),
        (8611 / 62500, -1743 / 31250),
        (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
        (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912),
        (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211),
    ),
    (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4),
    (
        31666707 / 9881966720,
        0.0,
        -256875 / 105007616,
        -2768025 / 128864768,
        169839 / 3864644,
        -5247 / 225920,
    ),
    4,
    (
        (1.0, -8620844395 / 2892679812, 5195427235 / 1446339906, -1051472152 / 723169953),
        (0.0, -648559 / 1041579, 1297118 / 1041579, -648559 / 1041579),
        (0.0, 3480859375 / 592807248, -22816046875 / 2074825368, 5510265625 / 1037412684),
        (0.0, -18332228125 / 5092428528, 25263688375 / 2546214264, -7182354625 / 1273107132),
        (0.0, 71540300 / 45250821, -192900040 / 45250821, 15557840 / 6464403),
        (0.0, -1 / 4, 1 / 2, 0.0),
    ),
    4,
    gamma=1 / 4,
)

METHODS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN,
        HEUN3,
        RK4,
        RK4_38,
        ADAPTIVE_HEUN,
        ADAPTIVE_MIDPOINT,
        FEHLBERG2,
        RK32,
        BOSH3,
        TSIT5,
        DOPRI5,
        DOPRI8,
        KVAERNO3,
        KENCARP4,
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
