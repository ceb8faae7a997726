"""The kinetic energy of a trajectory, an integral along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode.solver.dynamics import Dynamics, Weight


@dataclass
class _Tape:
    """The inner tape and the value that it belongs to."""

    inner: Any
    f: Tensor

    @property
    def nbytes(self) -> int:
        return int(self.inner.nbytes) + self.f.numel() * self.f.element_size()


class EnergyDynamics:
    """A field's value f ``(n, d)``, and mean(f^2) ``(n, 1)`` for ``solve(..., n_quadratures=1)``.

    Its integral is the kinetic energy of Finlay et al. 2020 (arXiv:2002.02798), eq. 6.

    Parameters
    ----------
    dynamics : Dynamics

    Examples
    --------
    >>> import torch
    >>> from skode.fields import EnergyDynamics, MLPField
    >>> from skode.solver import solve
    >>> field = MLPField(2, generator=torch.Generator().manual_seed(0))
    >>> solution = solve(EnergyDynamics(field), torch.ones(3, 2), [0.0, 1.0], n_quadratures=1)
    >>> bool((solution.quadratures[:, -1] > 0).all())
    True
    """

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._with_energy(self._dynamics(t, y))

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        f, tape = self._dynamics.linearize(t, y)
        return self._with_energy(f), _Tape(tape, f)

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        f = tape.f
        cotangent = torch.addcmul(a[:, :-1], a[:, -1:], f, value=2.0 / f.shape[1])
        return self._dynamics.pull(tape.inner, cotangent, time=time)

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        return self._dynamics.accumulate([tape.inner for tape in tapes], weights)

    def trainable(self) -> tuple[Tensor, ...]:
        return self._dynamics.trainable()

    @staticmethod
    def _with_energy(f: Tensor) -> Tensor:
        return torch.cat([f, f.square().mean(dim=1, keepdim=True)], dim=1)
