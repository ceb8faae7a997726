"""Integrals along a solution: carried beside the state, though the field does not see them.

Symbols: d components of the state, q integrals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.solver.control import BatchControl, Tolerance
from skode.solver.dynamics import AutogradDynamics, Dynamics, Weight, as_dynamics


class QuadratureDynamics:
    """State (y, integrals) of a field that sees y alone and returns dy/dt, then the integrands.

    Parameters
    ----------
    dynamics : Dynamics
        Maps states ``(n, d)`` to ``(n, d + q)``.
    n_quadratures : int
    """

    def __init__(self, dynamics: Dynamics, n_quadratures: int) -> None:
        self.inner, self.n_quadratures = dynamics, n_quadratures
        self.any_rows: bool = getattr(dynamics, "any_rows", False)

    def settle(self) -> None:
        """As the inner one does, if it does."""
        settle(self.inner)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._checked(self.inner(t, self._state(y)), y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        f, tape = self.inner.linearize(t, self._state(y))
        return self._checked(f, y), tape

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        dy, dt = self.inner.pull(tape, a, time=time)
        return torch.nn.functional.pad(dy, (0, self.n_quadratures)), dt

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        return self.inner.accumulate(tapes, weights)

    def trainable(self) -> tuple[Tensor, ...]:
        return self.inner.trainable()

    def _state(self, z: Tensor) -> Tensor:
        return z[:, : z.shape[1] - self.n_quadratures].contiguous()

    def _checked(self, f: Tensor, z: Tensor) -> Tensor:
        if f.shape != z.shape:
            d = z.shape[1] - self.n_quadratures
            raise FieldError(
                f"the field {type(self.inner).__name__} returned shape {tuple(f.shape)} for a state of shape "
                f"{(len(z), d)}; with n_quadratures={self.n_quadratures} it must return shape {tuple(z.shape)}."
            )
        return f


def prepared(
    field: Any, d: int, args: tuple[Any, ...], parameters: Iterable[Tensor] | None, n_quadratures: int
) -> Dynamics:
    """What ``solve`` is given as a field, as dynamics of states with their integrals.

    Raises
    ------
    FieldError, ValueError
        If it is no field, or an argument is not understood.
    """
    if not isinstance(n_quadratures, int) or n_quadratures < 0:
        raise ValueError(f"n_quadratures={n_quadratures!r} must be a whole number, 0 or more.")
    if isinstance(field, AutogradDynamics):
        field = field.anew()
    n_outputs = d + n_quadratures if n_quadratures else None
    dynamics = as_dynamics(field, n_outputs=n_outputs, args=args, parameters=parameters)
    return QuadratureDynamics(dynamics, n_quadratures) if n_quadratures else dynamics


def settle(dynamics: Dynamics) -> None:
    """Hold dynamics to the parameters that they turned out to depend on, where they find that out."""
    if isinstance(dynamics, AutogradDynamics | QuadratureDynamics):
        dynamics.settle()


def with_quadratures(name: str, value: Any, d: int, q: int) -> Any:
    """A tolerance for states and integrals; the integrals have the states' strictest where they have none of their own.

    Raises
    ------
    ValueError
        If it has the wrong shape.
    """
    if not q:
        return value
    numbers = torch.as_tensor(value, dtype=torch.float64).detach()
    if not numbers.dim() or numbers.shape == (d + q,):
        return value
    if numbers.shape != (d,):
        raise ValueError(
            f"{name} must be a number or have shape ({d},) or ({d + q},), one for each component and then one for each "
            f"integral; got {tuple(numbers.shape)}."
        )
    return torch.cat([numbers, numbers.min().expand(q)])


def controlled(tolerance: Tolerance, batch: BatchControl | None, n: int) -> Tolerance:
    """Tolerances so that the error norm is the mean over the components that have one.

    The others, of infinite tolerance, have no error in its units, but count in the mean: the rest makes up for it.
    """
    rtol, atol = tolerance.rtol, tolerance.atol
    if isinstance(rtol, float) and not atol.dim():
        return tolerance  # numbers are finite
    free = torch.isinf(atol) | torch.isinf(torch.as_tensor(rtol, device=atol.device))
    if not bool(free.any()):
        return tolerance
    # An infinite part of a state of 0 has no meaning.
    rtol = torch.where(free, 0.0, torch.as_tensor(rtol, dtype=atol.dtype, device=atol.device))
    n_controlled = n - int(free.sum())
    own_norm = batch is not None and batch.norm is not None
    share = 1.0 if own_norm or not n_controlled else math.sqrt(n_controlled / n)
    return tolerance.replace(rtol=rtol * share, atol=torch.where(free, math.inf, atol.expand(n) * share))
