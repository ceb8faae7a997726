"""The 25 nonstiff DETEST problems, each an initial-value problem on [0, 20].

Source: T. E. Hull, W. H. Enright, B. M. Fellen, A. E. Sedgwick, "Comparing numerical methods for ordinary differential
equations", SIAM J. Numer. Anal. 9(4), 1972, pp. 603-637; constants as in W. H. Enright, J. D. Pryce, "Algorithm 648:
NSDTST and STDTST", ACM Trans. Math. Softw. 13(1), 1987, pp. 28-34. Classes: A single equations, B small systems, C
moderate systems, D orbits, E higher-order equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
T1 = 20.0


@dataclass(frozen=True, eq=False)
class Problem:
    """dy/dt = field(t, y), t ``(n, 1)``, y ``(n, d)``, from ``y0 (1, d)`` at t = 0 to t = 20."""

    name: str
    field: Field
    y0: Tensor

    def derivative(self, t: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """The field for SciPy: one state ``(d,)``."""
        time = torch.full((1, 1), t, dtype=torch.float64)
        value: NDArray[np.float64] = self.field(time, torch.from_numpy(y).view(1, -1)).numpy()[0]
        return value


def _problem(name: str, field: Field, y0: Sequence[float]) -> Problem:
    return Problem(name, field, torch.tensor([list(y0)], dtype=torch.float64))


def _system(function: Callable[..., Sequence[Tensor]]) -> Field:
    """A field from ``function(t, y_1, ..., y_d)`` of columns ``(n,)``."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(list(function(t[:, 0], *y.unbind(1))), dim=1)

    return field


def _linear(matrix: NDArray[np.float64]) -> Field:
    transposed = torch.from_numpy(matrix.T.copy())
    return lambda t, y: y @ transposed


# --- A: single equations ---


def _class_a() -> list[Problem]:
    return [
        _problem("A1", lambda t, y: -y, [1.0]),
        _problem("A2", lambda t, y: -(y**3) / 2, [1.0]),
        _problem("A3", lambda t, y: y * torch.cos(t), [1.0]),
        _problem("A4", lambda t, y: y / 4 * (1 - y / 20), [1.0]),
        _problem("A5", lambda t, y: (y - t) / (y + t), [4.0]),
    ]


# --- B: small systems ---


def _growth(t: Tensor, a: Tensor, b: Tensor) -> Sequence[Tensor]:
    """Two conflicting populations."""
    return 2 * (a - a * b), -(b - a * b)


def _chain(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Sequence[Tensor]:
    """A linear chemical reaction."""
    return -a + b, a - 2 * b + c, b - c


def _reaction(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Sequence[Tensor]:
    """A nonlinear chemical reaction."""
    return -a, a - b**2, b**2


def _torus(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Sequence[Tensor]:
    """The integral surface of a torus."""
    r = torch.sqrt(a**2 + b**2)
    return -b - a * c / r, a - b * c / r, a / r


def _rigid_body(t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Sequence[Tensor]:
    """Euler's equations of a rigid body without external forces."""
    return b * c, -a * c, -0.51 * a * b


def _class_b() -> list[Problem]:
    return [
        _problem("B1", _system(_growth), [1.0, 3.0]),
        _problem("B2", _system(_chain), [2.0, 0.0, 1.0]),
        _problem("B3", _system(_reaction), [1.0, 0.0, 0.0]),
        _problem("B4", _system(_torus), [3.0, 0.0, 0.0]),
        _problem("B5", _system(_rigid_body), [0.0, 1.0, 1.0]),
    ]


# --- C: moderate systems ---


def _decay_chain(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every substance decays into the next, the last one is stable."""
    return np.diag([*-rates, 0.0]) + np.diag(rates, -1)


def _heat(n: int) -> NDArray[np.float64]:
    """A parabolic equation by the method of lines."""
    return -2 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)


GRAVITY = 2.95912208286
SUN = 1.00000597682
# Jupiter, Saturn, Uranus, Neptune, Pluto
MASSES = (0.000954786104043, 0.000285583733151, 0.0000437273164546, 0.0000517759138449, 0.00000277777777778)
POSITIONS = (
    (3.42947415189, 3.35386959711, 1.35494901715),
    (6.64145542550, 5.97156957878, 2.18231499728),
    (11.2630437207, 14.6952576794, 6.27960525067),
    (-30.1552268759, 1.65699966404, 1.43785752721),
    (-21.1238353380, 28.4465098142, 15.3882659679),
)
VELOCITIES = (
    (-0.557160570446, 0.505696783289, 0.230578543901),
    (-0.415570776342, 0.365682722812, 0.169143213293),
    (-0.325325669158, 0.189706021964, 0.087726532278),
    (-0.0240476254170, -0.287659532608, -0.117219543175),
    (-0.176860753121, -0.216393453025, -0.0148647893090),
)


def _planets(t: Tensor, y: Tensor) -> Tensor:
    """The five outer planets around a sun that they pull, in heliocentric coordinates."""
    positions, velocities = y.view(-1, 2, 5, 3).unbind(1)
    masses = torch.tensor(MASSES, dtype=y.dtype)
    pull = positions / positions.norm(dim=2, keepdim=True) ** 3
    apart = positions.unsqueeze(1) - positions.unsqueeze(2)  # [:, j, k] from planet j to planet k
    distance = apart.norm(dim=3, keepdim=True)
    mutual = torch.where(distance == 0, 0.0, apart / distance**3 - pull.unsqueeze(1))
    others = (masses.view(1, 1, 5, 1) * mutual).sum(dim=2)
    acceleration = GRAVITY * (others - (SUN + masses).view(1, 5, 1) * pull)
    return torch.stack([velocities, acceleration], dim=1).view(len(y), -1)


def _class_c() -> list[Problem]:
    def first(n: int) -> list[float]:
        return [1.0] + [0.0] * (n - 1)

    planets = np.array([POSITIONS, VELOCITIES]).reshape(-1).tolist()
    return [
        _problem("C1", _linear(_decay_chain(np.ones(9))), first(10)),
        _problem("C2", _linear(_decay_chain(np.arange(1.0, 10.0))), first(10)),
        _problem("C3", _linear(_heat(10)), first(10)),
        _problem("C4", _linear(_heat(51)), first(51)),
        _problem("C5", _planets, planets),
    ]


# --- D: orbits ---


def _orbit(t: Tensor, x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Sequence[Tensor]:
    cube = (x**2 + y**2) ** 1.5
    return u, v, -x / cube, -y / cube


def _class_d() -> list[Problem]:
    return [
        _problem(f"D{i}", _system(_orbit), [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))])
        for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9), start=1)
    ]


# --- E: higher-order equations ---


def _bessel(t: Tensor, x: Tensor, v: Tensor) -> Sequence[Tensor]:
    """Bessel's equation of order one half, its time moved by 1."""
    return v, -(v / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * x)


def _van_der_pol(t: Tensor, x: Tensor, v: Tensor) -> Sequence[Tensor]:
    return v, (1 - x**2) * v - x


def _duffing(t: Tensor, x: Tensor, v: Tensor) -> Sequence[Tensor]:
    return v, x**3 / 6 - x + 2 * torch.sin(2.78535 * t)


def _falling(t: Tensor, x: Tensor, v: Tensor) -> Sequence[Tensor]:
    return v, 0.032 - 0.4 * v**2


def _pursuit(t: Tensor, x: Tensor, v: Tensor) -> Sequence[Tensor]:
    return v, torch.sqrt(1 + v**2) / (25 - t)


def _class_e() -> list[Problem]:
    return [
        _problem("E1", _system(_bessel), [0.6713967071418030, 0.09540051444747446]),
        _problem("E2", _system(_van_der_pol), [2.0, 0.0]),
        _problem("E3", _system(_duffing), [0.0, 0.0]),
        _problem("E4", _system(_falling), [30.0, 0.0]),
        _problem("E5", _system(_pursuit), [0.0, 0.0]),
    ]


DETEST: dict[str, Problem] = {
    problem.name: problem for problem in (*_class_a(), *_class_b(), *_class_c(), *_class_d(), *_class_e())
}
