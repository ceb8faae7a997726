"""What the solver asks of a vector field: its value, and its derivatives where it was evaluated.

A field that implements :class:`Dynamics` itself (the fields of :mod:`skode.fields` do) is used as it is; any other
``nn.Module`` or function ``field(t, y)`` is wrapped in :class:`AutogradDynamics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError

Weight = Tensor | float


class Tape(Protocol):
    """What one evaluation must remember for its derivatives."""

    @property
    def nbytes(self) -> int:
        """Bytes held besides the state itself."""
        ...


@runtime_checkable
class Dynamics(Protocol):
    """A vector field with its derivatives.

    ``linearize`` evaluates and remembers; ``pull`` maps a cotangent of the value to one of the state (and time), and
    leaves on the tape what ``accumulate`` needs to give the parameters' gradients of many evaluations at once.
    """

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Value ``(n, d)`` at times ``(n, 1)`` and states ``(n, d)``."""
        ...

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """Value and tape."""
        ...

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        """Vector-Jacobian products with the state and, if asked for, with the time ``(n, 1)``."""
        ...

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        """Sum over tapes (and rows) of weight times cotangent times the parameters' Jacobian."""
        ...

    def trainable(self) -> tuple[Tensor, ...]:
        """The parameters that ``accumulate`` speaks of, in its order."""
        ...


class _GraphTape:
    """An evaluation under autograd: inputs, value and the cotangent that was pulled through it."""

    __slots__ = ("a", "f", "t", "y")

    def __init__(self, t: Tensor, y: Tensor, f: Tensor) -> None:
        self.t, self.y, self.f = t, y, f
        self.a: Tensor | None = None

    @property
    def nbytes(self) -> int:
        # A graph does not tell its size; eight states an evaluation is what a two-layer network keeps.
        return 8 * self.y.numel() * self.y.element_size()


class AutogradDynamics:
    """Any ``field(t, y)`` as :class:`Dynamics`, its derivatives by autograd.

    Parameters
    ----------
    field : nn.Module or callable
        ``field(t, y)`` with t ``(n, 1)`` and y ``(n, d)`` returns ``(n, n_outputs)``.
    n_outputs : int, optional
        The state's dimension if not given.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], *, n_outputs: int | None = None) -> None:
        self._field = field
        self._n_outputs = n_outputs
        parameters = field.parameters() if isinstance(field, nn.Module) else ()
        self._parameters = tuple(parameter for parameter in parameters if parameter.requires_grad)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._checked(self._field(t, y), y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _GraphTape]:
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            y = y.detach().requires_grad_()
            f = self._checked(self._field(t, y), y)
        return f.detach(), _GraphTape(t, y, f)

    def pull(self, tape: _GraphTape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        tape.a = a
        inputs = (tape.y, tape.t) if time else (tape.y,)
        gradients = self._gradients([tape.f], inputs, [a])
        return gradients[0], gradients[1] if time else None

    def accumulate(self, tapes: Sequence[_GraphTape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        pulled = [(tape, 1.0 if weights is None else weights[i]) for i, tape in enumerate(tapes)]
        values = [tape.f for tape, _ in pulled if tape.a is not None]
        cotangents = [tape.a * weight for tape, weight in pulled if tape.a is not None]
        return self._gradients(values, self._parameters, cotangents)

    def trainable(self) -> tuple[Tensor, ...]:
        return self._parameters

    @staticmethod
    def _gradients(
        values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = [(f, a) for f, a in zip(values, cotangents, strict=True) if f.requires_grad]
        if not pairs or not inputs:
            return tuple(torch.zeros_like(x) for x in inputs)
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                [f for f, _ in pairs], inputs, [a for _, a in pairs], retain_graph=True, allow_unused=True
            )
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))

    def _checked(self, f: Any, y: Tensor) -> Tensor:
        if not isinstance(f, Tensor):
            raise FieldError(f"the field {self._name} returned {type(f).__name__}; it must return a tensor.")
        expected = (len(y), self._n_outputs or y.shape[1])
        if f.shape != expected:
            raise FieldError(
                f"the field {self._name} returned shape {tuple(f.shape)} for a state of shape {tuple(y.shape)}; "
                f"it must return shape {expected}, one derivative for each component."
            )
        if f.dtype != y.dtype:
            raise FieldError(
                f"the field {self._name} returned {f.dtype} for a state of {y.dtype}; compute in the state's dtype "
                "(for a module: field.to(dtype))."
            )
        return f

    @property
    def _name(self) -> str:
        return getattr(self._field, "__name__", type(self._field).__name__)


def as_dynamics(field: Any) -> Dynamics:
    """``field`` itself where it knows its derivatives, else wrapped for autograd."""
    if all(hasattr(field, name) for name in ("linearize", "pull", "accumulate", "trainable")):
        return cast(Dynamics, field)
    if not callable(field):
        raise FieldError(f"a field is called as field(t, y); got {type(field).__name__}, which cannot be called.")
    return AutogradDynamics(field)
