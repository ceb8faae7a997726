"""What the solver asks of a vector field: its value, and its derivatives where it was evaluated.

A field that implements :class:`Dynamics` itself (the fields of :mod:`skode.fields` do) is used as it is; any other
``nn.Module`` or function ``field(t, y)`` is wrapped in :class:`AutogradDynamics`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.solver.parameters import Dependencies, checked, hooks_aside
from skode.solver.saved import saved_bytes

Weight = Tensor | float


@runtime_checkable
class Dynamics(Protocol):
    """A vector field with its derivatives.

    ``linearize`` evaluates and remembers; ``pull`` maps a cotangent of the value to one of the state (and time), and
    leaves on the tape what ``accumulate`` needs to give the parameters' gradients of many evaluations at once.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import MLPField
    >>> from skode.solver import Dynamics
    >>> field = MLPField(2, generator=torch.Generator().manual_seed(0))
    >>> isinstance(field, Dynamics)
    True
    >>> value, tape = field.linearize(torch.zeros(3, 1), torch.ones(3, 2))
    >>> dy, dt = field.pull(tape, torch.ones_like(value), time=True)
    >>> dy.shape, dt.shape
    (torch.Size([3, 2]), torch.Size([3, 1]))
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

    __slots__ = ("a", "f", "nbytes", "t", "y")

    def __init__(self, t: Tensor, y: Tensor, f: Tensor, nbytes: int) -> None:
        self.t, self.y, self.f, self.nbytes = t, y, f, nbytes
        self.a: Tensor | None = None


class AutogradDynamics:
    """Any ``field(t, y, *args)`` as :class:`Dynamics`, its derivatives by autograd.

    Parameters
    ----------
    field : nn.Module or callable
        ``field(t, y, *args)`` with t ``(n, 1)`` and y ``(n, d)`` returns ``(n, n_outputs)``.
    n_outputs : int, optional
        The state's dimension if not given.
    args : tuple
        Tensors in it (or in tuples, lists, dicts in it) that need gradients get them.
    parameters : iterable of tensors, optional
        Those that are to get gradients; searched for if not given.
    """

    any_rows = True
    """Rows may be copied: it treats each on its own."""

    def __init__(
        self,
        field: Callable[..., Tensor],
        *,
        n_outputs: int | None = None,
        args: tuple[Any, ...] = (),
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        self._field, self._n_outputs, self._args = field, n_outputs, args
        self._given = None if parameters is None else checked(parameters)
        self._depends_on = Dependencies(field, args, self._given)
        self._tape_bytes: int | None = None  # of every tape, as far as the first one tells

    def anew(self) -> AutogradDynamics:
        """The same for another solve."""
        other = copy.copy(self)
        other._depends_on = Dependencies(self._field, self._args, self._given)
        other._tape_bytes = None
        return other

    def settle(self) -> None:
        """Hold :meth:`trainable` to what the values so far depended on."""
        self._depends_on.settle()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if not self._depends_on.watching or torch.is_grad_enabled():
            return self._value(t, y)
        with torch.enable_grad():
            f = self._value(t, y)
        self._depends_on.look(f, (t, y))
        return f.detach()

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        return self._checked(self._field(t, y, *self._args), y)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        tape = self._graph(t, y)
        if self._depends_on.watching:
            self._depends_on.look(tape.f, (tape.t, tape.y))
        return tape.f.detach(), tape

    def _graph(self, t: Tensor, y: Tensor) -> _GraphTape:
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            y = y.detach().requires_grad_()
            f = self._value(t, y)
        if self._tape_bytes is None:
            self._tape_bytes = t.nbytes + y.nbytes + saved_bytes(f)
        return _GraphTape(t, y, f, self._tape_bytes)

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        tape.a = a
        inputs = (tape.y, tape.t) if time else (tape.y,)
        gradients = self._gradients([tape.f], inputs, [a])
        return gradients[0], gradients[1] if time else None

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        pulled = [(tape, 1.0 if weights is None else weights[i]) for i, tape in enumerate(tapes)]
        values = [tape.f for tape, _ in pulled if tape.a is not None]
        cotangents = [tape.a * weight for tape, weight in pulled if tape.a is not None]
        return self._gradients(values, self.trainable(), cotangents)

    def trainable(self) -> tuple[Tensor, ...]:
        return self._depends_on.tensors

    @staticmethod
    def _gradients(
        values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        pairs = [(f, a) for f, a in zip(values, cotangents, strict=True) if f.requires_grad]
        if not pairs or not inputs:
            return tuple(torch.zeros_like(x) for x in inputs)
        with torch.enable_grad(), hooks_aside(inputs):
            gradients = torch.autograd.grad(
                [f for f, _ in pairs], inputs, [a for _, a in pairs], retain_graph=True, allow_unused=True
            )
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True))

    def _checked(self, f: Any, y: Tensor) -> Tensor:
        if not isinstance(f, Tensor):
            raise FieldError(f"the field {self._name} returned {type(f).__name__}; it must return a tensor.")
        expected = (y.shape[0], self._n_outputs or y.shape[1])  # len() would be fixed in an exported program
        if f.shape != expected:
            raise FieldError(
                f"the field {self._name} returned shape {tuple(f.shape)} for a state of shape {tuple(y.shape)}; "
                f"it must return shape {expected}, one derivative for each component{self._integrands(y)}."
            )
        if f.dtype != y.dtype:
            raise FieldError(
                f"the field {self._name} returned {f.dtype} for a state of {y.dtype}; compute in the state's dtype "
                "(for a module: field.to(dtype))."
            )
        return f

    def _integrands(self, y: Tensor) -> str:
        n = (self._n_outputs or 0) - y.shape[1]
        return f" and then n_quadratures={n} integrands" if n > 0 else ""

    @property
    def _name(self) -> str:
        return getattr(self._field, "__name__", type(self._field).__name__)


def as_dynamics(
    field: Any,
    *,
    n_outputs: int | None = None,
    args: tuple[Any, ...] = (),
    parameters: Iterable[Tensor] | None = None,
) -> Dynamics:
    """``field`` itself where it knows its derivatives, else wrapped; arguments as of :class:`AutogradDynamics`.

    Raises
    ------
    FieldError
        If it cannot be called, or takes no ``args``.
    ValueError
        If ``args`` is no tuple, or ``parameters`` are not the field's tensors.
    """
    if not isinstance(args, tuple | list):
        raise ValueError(f"args must be a tuple, such as args=(x,); got {type(args).__name__}.")
    if _knows_derivatives(field):
        if args:
            raise FieldError(
                f"{type(field).__name__} brings its own derivatives and takes no args; wrap it in a module or function "
                "field(t, y, *args) that does."
            )
        return field if parameters is None else RestrictedDynamics(field, parameters)
    if not callable(field):
        raise FieldError(f"a field is called as field(t, y); got {type(field).__name__}, which cannot be called.")
    offers = callable(getattr(field, "vjp", None)) and getattr(type(field), "vjp", None) is not OffersVjp.vjp
    kind = VjpDynamics if offers else AutogradDynamics
    return kind(field, n_outputs=n_outputs, args=tuple(args), parameters=parameters)


def _knows_derivatives(field: Any) -> bool:
    """Whether it is :class:`Dynamics`, and what calling it does is what these are about."""
    if not isinstance(field, nn.Module):
        return isinstance(field, Dynamics)
    return not field._forward_hooks and not field._forward_pre_hooks and _is_about_its_forward(type(field))  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _is_about_its_forward(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has all of :class:`Dynamics`, none of it older than ``forward``."""
    if not issubclass(kind, Dynamics):
        return False
    return _first_with("forward", kind) >= _first_with("linearize", kind)


def _first_with(name: str, kind: type) -> int:
    """How far up a class's line the one is that defines a method."""
    return next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))


class RestrictedDynamics:
    """Dynamics of which only some parameters get gradients.

    Parameters
    ----------
    dynamics : Dynamics
    parameters : iterable of tensors
    """

    def __init__(self, dynamics: Dynamics, parameters: Iterable[Tensor]) -> None:
        self._dynamics = dynamics
        self._chosen = {id(x) for x in checked(parameters) if x.requires_grad}
        if self._chosen - {id(x) for x in dynamics.trainable()}:
            raise ValueError(f"parameters= names a tensor that is no parameter of {type(dynamics).__name__}.")
        self.linearize, self.pull, self.accumulate = dynamics.linearize, dynamics.pull, dynamics.accumulate
        self.any_rows: bool = getattr(dynamics, "any_rows", False)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self._dynamics(t, y)

    def trainable(self) -> tuple[Tensor, ...]:
        """The same tensors in the same order, those that get nothing without a link to their parameter."""
        return tuple(x if id(x) in self._chosen else x.detach() for x in self._dynamics.trainable())

    def kernel(self, y0: Tensor, **options: Any) -> Any:
        """The dynamics' own, if it has one."""
        make = getattr(self._dynamics, "kernel", None)
        return None if make is None else make(y0, **options)


# --- vjp: the public face of a field's derivatives ------------------------------------------------------------------


class OffersVjp:
    """Gives a field of this package ``vjp``, from what the solver uses."""

    def vjp(self, t: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Vector-Jacobian products: of a cotangent ``a`` of the value with the state, the time and the parameters.

        Parameters
        ----------
        t : tensor of shape (n, 1)
        y : tensor of shape (n, d)
        a : tensor of shape (n, n_outputs)

        Returns
        -------
        dy : tensor of shape (n, d)
        dt : tensor of shape (n, 1)
        parameters : tuple of tensors
            One for each of ``parameters()``, summed over the rows; zero for frozen ones of a convolution.
        """
        dynamics = as_dynamics(self, n_outputs=a.shape[1])
        with torch.no_grad():
            _, tape = dynamics.linearize(t, y)
            dy, dt = dynamics.pull(tape, a, time=True)
            own = dynamics.trainable()
            gradients = {id(x): g for x, g in zip(own, dynamics.accumulate([tape]), strict=True)}
        parameters = self.parameters()  # type: ignore[attr-defined]
        assert dt is not None
        return dy, dt, tuple(gradients[id(x)] if id(x) in gradients else torch.zeros_like(x) for x in parameters)


class _VjpTape:
    """An evaluation without a graph; what ``vjp`` gave for it, and a graph where that was not all."""

    __slots__ = ("a", "gradients", "graph", "t", "y")

    def __init__(self, t: Tensor, y: Tensor) -> None:
        self.t, self.y = t, y
        self.a: Tensor | None = None
        self.gradients: Sequence[Tensor | None] | None = None
        self.graph: _GraphTape | None = None

    @property
    def nbytes(self) -> int:
        if self.graph is not None:
            return self.graph.nbytes
        return (self.y.numel() + self.t.numel()) * self.y.element_size()


class VjpDynamics(AutogradDynamics):
    """A field with a ``vjp(t, y, a, *args)`` of its own; parameters as of :class:`AutogradDynamics`.

    It returns dy ``(n, d)``, or (dy, dt ``(n, 1)``), or (dy, dt, gradients): one for each of the tensors given as
    ``parameters=``, else of the module's ``parameters()``, None for zero. What it does not return is found by
    autograd, which evaluates the field once more.
    """

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        with torch.no_grad():
            return self(t, y), _VjpTape(t, y)

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        dy, dt, tape.gradients = self._asked(tape, a)
        tape.a = a
        if time and dt is None:
            graph = self._graph_of(tape)
            (dt,) = self._gradients([graph.f], (graph.t,), [a])
        return dy, dt if time else None

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        pulled = [(tape, 1.0 if weights is None else weights[i]) for i, tape in enumerate(tapes) if tape.a is not None]
        totals = {id(x): torch.zeros_like(x) for x in self.trainable()}
        told = {id(x) for x in self._told()} if all(tape.gradients is not None for tape, _ in pulled) else set()
        for tape, weight in pulled if told else ():
            for x, gradient in zip(self._told(), self._weighted(tape, weight), strict=True):
                if id(x) in totals and gradient is not None:
                    totals[id(x)] += gradient
        rest = tuple(x for x in self.trainable() if id(x) not in told)
        if rest:
            graphs = [self._graph_of(tape) for tape, _ in pulled]
            found = self._gradients([graph.f for graph in graphs], rest, [tape.a * weight for tape, weight in pulled])
            totals.update({id(x): gradient for x, gradient in zip(rest, found, strict=True)})
        return tuple(totals[id(x)] for x in self.trainable())

    def _told(self) -> Sequence[Tensor]:
        """The tensors that vjp's gradients belong to."""
        if self._given is not None:
            return self._given
        return list(self._field.parameters()) if isinstance(self._field, nn.Module) else ()

    def _weighted(self, tape: _VjpTape, weight: Weight) -> list[Tensor | None]:
        """Parameter gradients are sums over rows: with weights of the rows' own, they have to be asked for again."""
        assert tape.a is not None and tape.gradients is not None
        if isinstance(weight, Tensor):
            return list(self._asked(tape, tape.a * weight)[2] or ())
        return [None if gradient is None else gradient * weight for gradient in tape.gradients]

    def _graph_of(self, tape: _VjpTape) -> _GraphTape:
        if tape.graph is None:
            tape.graph = self._graph(tape.t, tape.y)
        return tape.graph

    def _asked(self, tape: _VjpTape, a: Tensor) -> tuple[Tensor, Tensor | None, Sequence[Tensor | None] | None]:
        """What vjp returns, in its longest form, checked."""
        with torch.no_grad():
            given = self._field.vjp(tape.t, tape.y, a, *self._args)  # type: ignore[attr-defined]
        given = (given,) if isinstance(given, Tensor) else given
        if not isinstance(given, tuple | list) or not 1 <= len(given) <= 3:
            raise FieldError(f"{self._name}.vjp must return dy, (dy, dt) or (dy, dt, gradients of the parameters).")
        dy, dt, gradients = (*given, None, None)[:3]
        self._require("dy", dy, tape.y)
        if dt is not None:
            self._require("dt", dt, tape.t)
        if gradients is not None:
            told = self._told()
            if len(gradients) != len(told):
                raise FieldError(
                    f"{self._name}.vjp returned {len(gradients)} gradients for {len(told)} parameters: they are a "
                    "module's own in their order, or those given as solve(..., parameters=(...))."
                )
            for i, (x, gradient) in enumerate(zip(told, gradients, strict=True)):
                if gradient is not None:
                    self._require(f"gradient {i}", gradient, x)
        return dy, dt, gradients

    def _require(self, name: str, x: Any, like: Tensor) -> None:
        if not isinstance(x, Tensor) or x.shape != like.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise FieldError(f"{self._name}.vjp must return {name} of shape {tuple(like.shape)}; got {got}.")
