"""A flow's network as the solver sees it: velocity and integrands, with derivatives written by hand.

Symbols: hidden layer l maps ``x`` to ``h = s(u)``, ``u = g m + c``, with ``m = W_l x``, the gate ``g = 1 + t g_l`` and
the shift ``c = b_l + t b'_l`` (and what a context adds); ``e = s'(u) g`` are its slopes, ``delta`` is u's cotangent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.fields.activations import get_activation
from skode.fields.integrands import Integrands, as_probe, check_rows
from skode.fields.jacobian_terms import Share, Term, norm_term, trace_term
from skode.solver.dynamics import Weight
from skode.solver.wrapped import active

if TYPE_CHECKING:
    from skode.fields.flow_field import FlowField, FlowLayer


class Hidden(NamedTuple):
    """A hidden layer's evaluation; ``saved`` is what the activation remembers, ``d`` its derivative."""

    x: Tensor
    m: Tensor
    gate: Tensor
    saved: Tensor
    d: Tensor
    e: Tensor


class _Pulled(NamedTuple):
    """A hidden layer's cotangents: of u, of the gate and of m."""

    delta: Tensor
    gate: Tensor
    m: Tensor


class _Constants(NamedTuple):
    """What depends on the parameters alone: of each term what rows share, and the contexts' shifts layer by layer."""

    terms: list[Tensor | None]
    shifts: list[Tensor | None]


class _Tape:
    """One evaluation; ``pulled``, ``a_v`` and ``shares`` are of the last cotangent that was pulled through it."""

    __slots__ = ("a_v", "constants", "hidden", "last", "memories", "pulled", "shares", "t", "v")

    def __init__(
        self, t: Tensor, v: Tensor, last: Tensor, hidden: list[Hidden], memories: list[Any], constants: _Constants
    ) -> None:
        self.t, self.v, self.last, self.hidden = t, v, last, hidden
        self.memories, self.constants = memories, constants
        self.pulled: list[_Pulled] = []
        self.shares: list[Share] = []
        self.a_v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of the evaluation, and of as much again for its cotangents."""
        numbers = self.last.numel() + 2 * self.v.numel() + sum(7 * layer.m.numel() for layer in self.hidden)
        numbers += sum(2 * _numel(memory) for memory in self.memories)
        return numbers * self.v.element_size()


def _numel(memory: Any) -> int:
    if isinstance(memory, Tensor):
        return memory.numel()
    return sum(map(_numel, memory)) if isinstance(memory, tuple | list) else 0


class FlowDynamics:
    """Velocity ``(n, d)`` of a :class:`FlowField` and integrands behind it, for ``solve(..., n_quadratures=q)``.

    ``field.dynamics(...)`` makes it. What depends on the parameters alone (a matrix for the trace, the contexts' part)
    is computed once and kept until they change; changes through ``parameter.data`` within one dynamics' life are not
    seen, as autograd does not see them.

    Parameters
    ----------
    field : FlowField
    context : tensor of shape (n, n_context), optional
        Conditions of the rows: a batch then has to have these rows in this order.
    integrands : Integrands
    probe : tensor of shape (d,) or (n, d), optional
        Direction for the Jacobian's norm where there are two hidden layers or more; exact if not given, at the cost of
        d evaluations.

    Attributes
    ----------
    n_quadratures : int
    any_rows : bool
        Whether rows may be copied: not where they have contexts or probes of their own.
    """

    def __init__(
        self,
        field: FlowField,
        context: Tensor | None = None,
        *,
        integrands: Integrands,
        probe: Tensor | None = None,
    ) -> None:
        self._context, self._integrands, self._n_dims = context, integrands, field.n_dims
        self._layers, self._activation = field.flow_layers, get_activation(field.activation)
        probe = as_probe(probe, field.n_dims)
        n_hidden = len(field.layers) - 1
        self._trace = trace_term(n_hidden, field.n_dims) if integrands.trace else None
        self._norm = norm_term(n_hidden, field.n_dims, probe) if integrands.jacobian else None
        self._terms: list[Term] = [term for term in (self._trace, self._norm) if term is not None]
        self._probes = None if probe is None or len(probe) == 1 else probe
        self.any_rows = context is None and self._probes is None
        self._kept: tuple[list[tuple[Any, ...]], _Constants] | None = None
        _check_context(field.n_context, context)

    @property
    def n_quadratures(self) -> int:
        return self._integrands.n

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self._terms:
            return self.linearize(t, y)[0]
        return self._integrands.beside(self._velocity(t, y), None, None)

    def trainable(self) -> tuple[Tensor, ...]:
        """The field's parameters, and the contexts if they need gradients."""
        own = self._own()
        return own if self._context is None or not self._context.requires_grad else (*own, self._context)

    # --- value ---

    def _velocity(self, t: Tensor, y: Tensor) -> Tensor:
        self._check(y)
        t, x = once(t), y
        for layer, shift in zip(self._layers[:-1], self._constants().shifts, strict=True):
            x = self._activation.forward(_before(layer, t, x, shift)[2])
        return _last(self._layers[-1], t, x)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        """Value and tape, in plain torch."""
        self._check(y)
        constants, x, hidden = self._constants(), y, []
        for layer, shift in zip(self._layers[:-1], constants.shifts, strict=True):
            hidden.append(self._through(layer, once(t), x, shift))
            x = self._output(hidden[-1])
        v = _last(self._layers[-1], once(t), x)
        weights, slopes = self._weights, [layer.e for layer in hidden]
        found = [term.evaluate(weights, own, slopes) for term, own in zip(self._terms, constants.terms, strict=True)]
        values = [value for value, _ in found]
        trace = values.pop(0) if self._trace else None
        norm = values.pop(0) if self._norm else None
        tape = _Tape(t, v, x, hidden, [memory for _, memory in found], constants)
        return self._integrands.beside(v, trace, norm), tape

    def _through(self, layer: FlowLayer, t: Tensor, x: Tensor, shift: Tensor | None) -> Hidden:
        activation = self._activation
        m, gate, u = _before(layer, t, x, shift)
        saved = activation.forward(u) if activation.saves_output else u
        d = activation.slope(saved)
        return Hidden(x, m, gate, saved, d, d * gate)

    def _output(self, layer: Hidden) -> Tensor:
        activation = self._activation
        return layer.saved if activation.saves_output else activation.forward(layer.saved)

    # --- derivatives ---

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        weights, slopes = self._weights, [layer.e for layer in tape.hidden]
        a_v, *rest = self._integrands.pull(tape.v, a)
        cotangents = [x for x in rest if x is not None]
        of_slopes: list[Tensor] | None = None
        tape.a_v, tape.shares = a_v, []
        for term, own, memory, x in zip(self._terms, tape.constants.terms, tape.memories, cotangents, strict=True):
            found, kept = term.pull(weights, own, slopes, memory, x)
            of_slopes = found if of_slopes is None else [p + q for p, q in zip(of_slopes, found, strict=True)]
            tape.shares.append(Share(slopes, kept, x))
        a = a_v @ weights[-1]
        tape.pulled = []
        for i in reversed(range(len(tape.hidden))):
            pulled = self._pulled(tape.hidden[i], a, None if of_slopes is None else of_slopes[i])
            tape.pulled.insert(0, pulled)
            a = pulled.m @ weights[i]
        return a, self._time_cotangent(tape) if time else None

    def _pulled(self, layer: Hidden, a: Tensor, of_slopes: Tensor | None) -> _Pulled:
        """Through one layer: ``a`` is its value's cotangent."""
        curve = self._activation.curve
        delta = a * layer.d
        if of_slopes is not None and curve is not None:
            delta = torch.addcmul(delta, of_slopes * layer.gate, curve(layer.saved, layer.d))
        gate = delta * layer.m
        if of_slopes is not None:
            gate = torch.addcmul(gate, of_slopes, layer.d)
        return _Pulled(delta, gate, delta * layer.gate)

    def _time_cotangent(self, tape: _Tape) -> Tensor:
        assert tape.a_v is not None
        total = (tape.a_v * self._layers[-1].drift).sum(dim=1)
        for layer, pulled in zip(self._layers, tape.pulled, strict=False):
            total = total + (pulled.delta * layer.drift + pulled.gate * layer.gate).sum(dim=1)
        return total.unsqueeze(1)

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        totals = [{name: torch.zeros_like(x) for name, x in layer.named_parameters()} for layer in self._layers]
        context = None if self._context is None else torch.zeros_like(self._context)
        shares = [1.0] * len(tapes) if weights is None else weights
        for tape, share in zip(tapes, shares, strict=True):
            assert tape.a_v is not None
            basis = _weighted(torch.cat([torch.ones_like(tape.t), tape.t], dim=1), share).mT
            for layer, total, hidden, pulled in zip(self._layers, totals, tape.hidden, tape.pulled, strict=False):
                _add_layer(total, basis, _weighted(hidden.x, share), pulled.m, pulled.delta)
                total["gate"] += (basis[1:] @ pulled.gate)[0]
                if context is not None and self._context is not None:
                    weighted = _weighted(pulled.delta, share)
                    total["context"].addmm_(weighted.mT, self._context)
                    context.addmm_(weighted, layer.context)
            _add_layer(totals[-1], basis, _weighted(tape.last, share), tape.a_v, tape.a_v)
        matrices = [total["weight"] for total in totals]
        for k, term in enumerate(self._terms):
            parts = [(tape.shares[k], share) for tape, share in zip(tapes, shares, strict=True)]
            own = [part._replace(a=_weighted(part.a, share)) for part, share in parts]
            if own:
                term.accumulate(self._weights, matrices, own)
        gradients = tuple(gradient for total in totals for gradient in total.values())
        if len(self.trainable()) > len(gradients):
            assert context is not None
            return *gradients, context
        return gradients

    # --- what the parameters alone decide ---

    def _constants(self) -> _Constants:
        if torch.is_grad_enabled() or active():
            return self._computed()  # they are part of a graph
        key = _state_of(self._own())
        if key is None:
            return self._computed()
        if self._kept is None or not _same(self._kept[0], key):
            self._kept = key, self._computed()
        return self._kept[1]

    def _computed(self) -> _Constants:
        weights, context = self._weights, self._context
        shifts = [None if context is None else context @ layer.context.mT for layer in self._layers[:-1]]
        return _Constants([term.prepare(weights) for term in self._terms], shifts)

    def _own(self) -> tuple[Tensor, ...]:
        return tuple(x for layer in self._layers for x in layer.parameters(recurse=False))

    @property
    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in self._layers]

    def _check(self, y: Tensor) -> None:
        d, dtype = self._n_dims, self._layers[0].weight.dtype
        if y.shape[-1] != d or y.dtype != dtype:
            raise FieldError(f"the field takes states of {d} components in {dtype}; got {y.shape[-1]} in {y.dtype}.")
        check_rows("contexts", self._context, y)
        check_rows("probes", self._probes, y)


def once(t: Tensor) -> Tensor:
    """The times, once for all rows where they are one number expanded, which then costs nothing."""
    return t[:1] if t.stride(0) == 0 else t


def _before(layer: FlowLayer, t: Tensor, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A hidden layer's product m, gate g and u = g m + c."""
    m = x @ layer.weight.mT
    gate, c = 1 + t * layer.gate, _affine(t, layer.bias, layer.drift)
    return m, gate, torch.addcmul(c if shift is None else c + shift, gate, m)


def _last(layer: FlowLayer, t: Tensor, x: Tensor) -> Tensor:
    return x @ layer.weight.mT + _affine(t, layer.bias, layer.drift)


def _weighted(x: Tensor, weight: Weight) -> Tensor:
    return x * weight if isinstance(weight, Tensor) or weight != 1.0 else x


def _affine(t: Tensor, start: Tensor, slope: Tensor) -> Tensor:
    """A line in time: ``(n, k)``, or ``(1, k)`` for a time that all rows share."""
    return torch.addcmul(start, t, slope)


def _add_layer(total: dict[str, Tensor], basis: Tensor, x: Tensor, m: Tensor, delta: Tensor) -> None:
    """Add to the gradients of a layer's weight, bias and drift; rows' weights are in ``basis`` and ``x``."""
    total["weight"].addmm_(m.mT, x)
    lines = basis @ delta
    total["bias"] += lines[0]
    total["drift"] += lines[1]


def _check_context(n_context: int, context: Tensor | None) -> None:
    found = 0 if context is None else context.shape[-1] if context.dim() == 2 else -1
    if found != n_context:
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        wanted = f"context of shape (n, {n_context}): field.given(context)" if n_context else "no context"
        raise FieldError(f"the field takes {wanted}; got {got}.")


def _state_of(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]] | None:
    """What changes when tensors do; None where that cannot be told."""
    if any(x.is_inference() for x in tensors):
        return None
    return [(x, x._version, x.data_ptr()) for x in tensors]


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(one, other, strict=True))
