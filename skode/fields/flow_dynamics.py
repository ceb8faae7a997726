"""A flow's network as the solver sees it: velocity and integrands, with derivatives written by hand.

Symbols: hidden layer l maps ``x`` to ``h = s(u)``, ``u = g m + c``, with ``m = W_l x``, the gate ``g = 1 + t g_l`` and
the shift ``c = b_l + t b'_l`` (and what a context adds); ``e = s'(u) g`` are its slopes, ``delta`` is u's cotangent.

Where all rows share their time, gates belong to the weights: ``u = (g W_l) x + c``, and the slopes are ``s'(u)``. No
array of a number for each row and unit then knows of gates, and their derivatives come from those of ``g W_l``.
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
    """A hidden layer's evaluation.

    ``saved`` is what the activation remembers, ``d`` its derivative, ``slopes`` what the value changes by with ``W x``.
    Where the rows share their time ``W`` holds the gates, and there is no ``m``.
    """

    x: Tensor
    W: Tensor
    m: Tensor | None
    gate: Tensor
    saved: Tensor
    d: Tensor
    slopes: Tensor


class _Pulled(NamedTuple):
    """A hidden layer's cotangents: of u, of ``W x`` and, where there is ``m``, of the gate."""

    delta: Tensor
    product: Tensor
    gate: Tensor | None


class _Constants(NamedTuple):
    """What depends on the parameters alone.

    Of each term what rows share, the contexts' shifts layer by layer, and all lines in time side by side: gate and
    shift of each hidden layer, and the last layer's shift.
    """

    terms: list[Any]
    shifts: list[Tensor | None]
    start: Tensor
    slope: Tensor
    widths: list[int]


class _Tape:
    """One evaluation; ``pulled``, ``a_v`` and ``parts`` are of the last cotangent that was pulled through it.

    ``weights`` and ``terms``, what rows share, hold the gates where the rows share their time.
    """

    __slots__ = ("a_v", "hidden", "last", "memories", "parts", "pulled", "shared", "t", "terms", "v", "weights")

    def __init__(self, t: Tensor, v: Tensor, last: Tensor, hidden: list[Hidden], weights: list[Tensor]) -> None:
        self.t, self.v, self.last, self.hidden, self.weights = t, v, last, hidden, weights
        self.shared = _are_one(t)
        self.terms: list[Any] = []
        self.memories: list[Any] = []
        self.pulled: list[_Pulled] = []
        self.parts: list[Share] = []
        self.a_v: Tensor | None = None

    @property
    def slopes(self) -> list[Tensor]:
        """Of the hidden layers."""
        return [layer.slopes for layer in self.hidden]

    @property
    def nbytes(self) -> int:
        """Of the evaluation, and of as much again for its cotangents."""
        numbers = self.last.numel() + 2 * self.v.numel()
        numbers += sum((4 if self.shared else 7) * layer.d.numel() for layer in self.hidden)
        numbers += sum(2 * _numel(memory) for memory in self.memories)
        numbers += sum(x.numel() for x in self.weights) if self.shared else 0
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

    Examples
    --------
    >>> import torch
    >>> from skode.fields import FlowField
    >>> from skode.solver import solve
    >>> dynamics = FlowField(2, generator=torch.Generator().manual_seed(0)).dynamics(trace=True)
    >>> solution = solve(dynamics, torch.ones(3, 2), [0.0, 1.0], n_quadratures=dynamics.n_quadratures)
    >>> solution.y1.shape, solution.quadratures[:, -1].shape  # states, and how the log-densities changed
    (torch.Size([3, 2]), torch.Size([3, 1]))
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
        if not self._terms:
            return self._integrands.beside(self._velocity(t, y), None, None)
        if torch.is_grad_enabled() or active() or _are_one(t):
            return self.linearize(t, y)[0]
        return self._value(t, y)

    def trainable(self) -> tuple[Tensor, ...]:
        """The field's parameters, and the contexts if they need gradients."""
        own = self._own()
        return own if self._context is None or not self._context.requires_grad else (*own, self._context)

    # --- value ---

    def _velocity(self, t: Tensor, y: Tensor) -> Tensor:
        self._check(y)
        x = y
        for layer, shift in zip(self._layers[:-1], self._constants().shifts, strict=True):
            x = self._activation.forward(_before(layer, t, x, shift)[-1])
        return _last(self._layers[-1], once(t), x)

    def _value(self, t: Tensor, y: Tensor) -> Tensor:
        """As :meth:`linearize`, at times of the rows' own and without a tape: in place where it can be."""
        self._check(y)
        activation, constants, x = self._activation, self._constants(), y
        lines = torch.addcmul(constants.start, t, constants.slope)
        parts = list(lines.split(constants.widths, dim=1))
        slopes = []
        for layer, shift in zip(self._layers[:-1], constants.shifts, strict=True):
            gate, c = parts.pop(0), parts.pop(0)
            u = torch.mm(x, layer.weight.mT)
            torch.addcmul(c if shift is None else c.add_(shift), gate, u, out=u)
            if activation.saves_output:
                activation.into(u, out=u)
            slopes.append(activation.slope(u).mul_(gate))
            x = u if activation.saves_output else activation.forward(u)
        v = torch.addmm(parts.pop(0), x, self._layers[-1].weight.mT)
        values = [
            term.evaluate(self._weights, own, slopes)[0] for term, own in zip(self._terms, constants.terms, strict=True)
        ]
        return self._beside(v, values)

    def _beside(self, v: Tensor, values: list[Tensor]) -> Tensor:
        """The velocity and the terms' values."""
        trace = values[0] if self._trace else None
        return self._integrands.beside(v, trace, values[-1] if self._norm else None)

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        """Value and tape, in plain torch."""
        self._check(y)
        constants, x, hidden = self._constants(), y, []
        for layer, shift in zip(self._layers[:-1], constants.shifts, strict=True):
            hidden.append(self._through(layer, t, x, shift))
            x = self._output(hidden[-1])
        v = _last(self._layers[-1], once(t), x)
        tape = _Tape(t, v, x, hidden, [*(layer.W for layer in hidden), self._layers[-1].weight])
        tape.terms = [term.prepare(tape.weights) for term in self._terms] if tape.shared else constants.terms
        values = []
        for term, own in zip(self._terms, tape.terms, strict=True):
            value, memory = term.evaluate(tape.weights, own, tape.slopes)
            values.append(value)
            tape.memories.append(memory)
        return self._beside(v, values), tape

    def _through(self, layer: FlowLayer, t: Tensor, x: Tensor, shift: Tensor | None) -> Hidden:
        activation = self._activation
        W, m, gate, u = _before(layer, t, x, shift)
        saved = activation.forward(u) if activation.saves_output else u
        d = activation.slope(saved)
        return Hidden(x, W, m, gate, saved, d, d if m is None else d * gate)

    def _output(self, layer: Hidden) -> Tensor:
        activation = self._activation
        return layer.saved if activation.saves_output else activation.forward(layer.saved)

    # --- derivatives ---

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        dy = self._pull(tape, a)
        if not time:
            return dy, None
        if not tape.shared:
            return dy, self._time_cotangent(tape)
        # Each row has a cotangent of its own: that is a matter of gates in its slopes.
        own = self.linearize(tape.t.contiguous(), tape.hidden[0].x)[1]
        self._pull(own, a)
        return dy, self._time_cotangent(own)

    def _pull(self, tape: _Tape, a: Tensor) -> Tensor:
        a_v, *rest = self._integrands.pull(tape.v, a)
        of_slopes: list[Tensor] | None = None
        tape.a_v, tape.parts = a_v, []
        cotangents = [x for x in rest if x is not None]
        for term, own, memory, x in zip(self._terms, tape.terms, tape.memories, cotangents, strict=True):
            found, kept = term.pull(tape.weights, own, tape.slopes, memory, x)
            of_slopes = found if of_slopes is None else [p + q for p, q in zip(of_slopes, found, strict=True)]
            tape.parts.append(Share(tape.slopes, kept, x))
        a = a_v @ tape.weights[-1]
        tape.pulled = []
        for i in reversed(range(len(tape.hidden))):
            pulled = self._pulled(tape.hidden[i], a, None if of_slopes is None else of_slopes[i])
            tape.pulled.insert(0, pulled)
            a = pulled.product @ tape.weights[i]
        return a

    def _pulled(self, layer: Hidden, a: Tensor, of_slopes: Tensor | None) -> _Pulled:
        """Through one layer: ``a`` is its value's cotangent."""
        bent = of_slopes
        if of_slopes is not None and layer.m is not None:
            bent = of_slopes * layer.gate
        delta = a * layer.d if bent is None else self._activation.pull_slope(a, bent, layer.saved, layer.d)
        if layer.m is None:
            return _Pulled(delta, delta, None)
        gate = delta * layer.m
        if of_slopes is not None:
            gate = torch.addcmul(gate, of_slopes, layer.d)
        return _Pulled(delta, delta * layer.gate, gate)

    def _time_cotangent(self, tape: _Tape) -> Tensor:
        assert tape.a_v is not None
        total = (tape.a_v * self._layers[-1].drift).sum(dim=1)
        for layer, pulled in zip(self._layers, tape.pulled, strict=False):
            assert pulled.gate is not None
            total = total + (pulled.delta * layer.drift + pulled.gate * layer.gate).sum(dim=1)
        return total.unsqueeze(1)

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        totals = [{name: torch.zeros_like(x) for name, x in layer.named_parameters()} for layer in self._layers]
        context = None if self._context is None else torch.zeros_like(self._context)
        pairs = list(zip(tapes, [1.0] * len(tapes) if weights is None else weights, strict=True))
        for tape, share in pairs:
            if tape.shared:
                self._add_shared(tape, share, totals)
            else:
                self._add_own(tape, share, totals)
            if context is not None:
                self._add_context(tape, share, totals, context)
        own_times = [(tape, share) for tape, share in pairs if not tape.shared]
        if own_times:
            self._add_terms(self._weights, [total["weight"] for total in totals], own_times)
        gradients = tuple(gradient for total in totals for gradient in total.values())
        if len(self.trainable()) > len(gradients):
            assert context is not None
            return *gradients, context
        return gradients

    def _add_own(self, tape: _Tape, share: Weight, totals: list[dict[str, Tensor]]) -> None:
        """Add the gradients of a tape with times of the rows' own, but for the terms'."""
        assert tape.a_v is not None
        basis = _weighted(torch.cat([torch.ones_like(tape.t), tape.t], dim=1), share).mT
        for total, hidden, pulled in zip(totals, tape.hidden, tape.pulled, strict=False):
            assert pulled.gate is not None
            total["weight"].addmm_(pulled.product.mT, _weighted(hidden.x, share))
            _add_line(total, basis @ pulled.delta)
            total["gate"] += (basis[1:] @ pulled.gate)[0]
        totals[-1]["weight"].addmm_(tape.a_v.mT, _weighted(tape.last, share))
        _add_line(totals[-1], basis @ tape.a_v)

    def _add_shared(self, tape: _Tape, share: Weight, totals: list[dict[str, Tensor]]) -> None:
        """Add the gradients of a tape with one time for all rows, by those of the weights that hold the gates."""
        assert tape.a_v is not None
        t = tape.t[0]
        cotangents = [*(pulled.delta for pulled in tape.pulled), tape.a_v]
        inputs = [*(hidden.x for hidden in tape.hidden), tape.last]
        by_row = share.expand(len(tape.v), 1) if isinstance(share, Tensor) else tape.v.new_full((len(tape.v), 1), share)
        matrices = []
        for total, delta, x in zip(totals, cotangents, inputs, strict=True):
            matrices.append(_weighted(delta, share).mT @ x)
            line = (by_row.mT @ delta)[0]
            total["bias"] += line
            total["drift"].addcmul_(line, t)
        self._add_terms(tape.weights, matrices, [(tape, share)])
        for layer, total, hidden, matrix in zip(self._layers, totals, tape.hidden, matrices, strict=False):
            total["weight"].addcmul_(matrix, hidden.gate.mT)
            total["gate"].addcmul_((matrix * layer.weight).sum(dim=1), t)
        totals[-1]["weight"] += matrices[-1]

    def _add_context(self, tape: _Tape, share: Weight, totals: list[dict[str, Tensor]], of_context: Tensor) -> None:
        assert self._context is not None
        for layer, total, pulled in zip(self._layers, totals, tape.pulled, strict=False):
            weighted = _weighted(pulled.delta, share)
            total["context"].addmm_(weighted.mT, self._context)
            of_context.addmm_(weighted, layer.context)

    def _add_terms(self, weights: list[Tensor], matrices: list[Tensor], pairs: Sequence[tuple[_Tape, Weight]]) -> None:
        for k, term in enumerate(self._terms):
            own = [tape.parts[k]._replace(a=_weighted(tape.parts[k].a, share)) for tape, share in pairs]
            term.accumulate(weights, matrices, own)

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
        starts: list[Tensor] = []
        slopes: list[Tensor] = []
        for layer in self._layers[:-1]:
            starts += [torch.ones_like(layer.gate), layer.bias]
            slopes += [layer.gate, layer.drift]
        starts.append(self._layers[-1].bias)
        slopes.append(self._layers[-1].drift)
        widths = [len(start) for start in starts]
        terms = [term.prepare(weights) for term in self._terms]
        return _Constants(terms, shifts, torch.cat(starts), torch.cat(slopes), widths)

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


def _are_one(t: Tensor) -> bool:
    """Whether times are one number expanded."""
    return t.stride(0) == 0


def once(t: Tensor) -> Tensor:
    """The times, once for all rows where they are one number expanded, which then costs nothing."""
    return t[:1] if _are_one(t) else t


def _before(
    layer: FlowLayer, t: Tensor, x: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """A hidden layer's matrix W, the product m where W does not hold the gate, the gate g, and u."""
    time = once(t)
    gate = torch.addcmul(layer.gate.new_ones(()), time, layer.gate)
    c = _affine(time, layer.bias, layer.drift)
    if shift is not None:
        c = c + shift
    if _are_one(t):
        W = layer.weight * gate.mT
        return W, None, gate, torch.addmm(c, x, W.mT)
    m = x @ layer.weight.mT
    return layer.weight, m, gate, torch.addcmul(c, gate, m)


def _last(layer: FlowLayer, t: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(_affine(t, layer.bias, layer.drift), x, layer.weight.mT)


def _weighted(x: Tensor, weight: Weight) -> Tensor:
    return x * weight if isinstance(weight, Tensor) or weight != 1.0 else x


def _affine(t: Tensor, start: Tensor, slope: Tensor) -> Tensor:
    """A line in time: ``(n, k)``, or ``(1, k)`` for a time that all rows share."""
    return torch.addcmul(start, t, slope)


def _add_line(total: dict[str, Tensor], lines: Tensor) -> None:
    """Add to the gradients of a layer's bias and drift."""
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
