"""Second-order dynamics: a field gives the acceleration of the first half of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skode.solver.dynamics import Dynamics, Weight


class SecondOrderDynamics:
    """State (x, v) with dx/dt = v and dv/dt = acceleration(t, (x, v)).

    Parameters
    ----------
    acceleration : Dynamics
        Maps the whole state ``(n, 2 k)`` to ``(n, k)``.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import MLPField, SecondOrderDynamics
    >>> from skode.solver import solve
    >>> acceleration = MLPField(4, n_outputs=2, generator=torch.Generator().manual_seed(0))
    >>> solve(SecondOrderDynamics(acceleration), torch.ones(3, 4), [0.0, 1.0]).y1.shape
    torch.Size([3, 4])
    """

    def __init__(self, acceleration: Dynamics) -> None:
        self._acceleration = acceleration

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self._velocity(y), self._acceleration(t, y)], dim=1)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        value, tape = self._acceleration.linearize(t, y)
        return torch.cat([self._velocity(y), value], dim=1), tape

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        position, velocity = a.chunk(2, dim=1)
        dy, dt = self._acceleration.pull(tape, velocity.contiguous(), time=time)
        dy = dy.clone()
        dy[:, position.shape[1] :] += position
        return dy, dt

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        return self._acceleration.accumulate(tapes, weights)

    def trainable(self) -> tuple[Tensor, ...]:
        return self._acceleration.trainable()

    @staticmethod
    def _velocity(y: Tensor) -> Tensor:
        return y[:, y.shape[1] // 2 :]
