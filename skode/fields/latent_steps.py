"""Few equal steps of a latent field, all rows at once: one node of autograd, its derivatives written by hand.

For small batches and few steps, where the fixed cost of an operation rules: everything is written into leased memory,
and each weight's gradient is gathered once, over all evaluations.

Symbols: n rows of d components, k known inputs; a slot is one evaluation of the field f, s of them a step and one at
the end. ``Y_i`` is slot i's state, ``a_i`` the cotangent of ``f(Y_i)``; ``delta_l`` that of layer l's product. In
memory components come first and rows last; every layer's input has a one as its last component, for the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skode.fields.activations import Activation, get_activation
from skode.fields.latent import LatentField
from skode.solver.arena import Lease, lease
from skode.solver.unrolled import Weights

FULL = 8  # rows; memory has a multiple of it, so that batches of nearly the same size share
TANH = get_activation("tanh")
Views = TypeVar("Views", "_Slots", "_Cotangents")


def equal_steps(
    field: LatentField,
    z: Tensor,
    h: Tensor,
    n_steps: int,
    weights: Weights,
    inputs: Tensor | None = None,
    *,
    stages: bool = False,
) -> tuple[Tensor, Tensor]:
    """Steps of rows' own lengths.

    Parameters
    ----------
    field : LatentField
    z : tensor of shape (n, d)
    h : tensor of shape (n, 1)
        Of either sign. It gets no gradient.
    n_steps : int
    weights : Weights
        Of an explicit method.
    inputs : tensor of shape (n_steps s + 1, n, k), optional
        Known inputs at the :func:`shares` of the way. They get no gradient.
    stages : bool, default=False
        Whether the states of all stages are given.

    Returns
    -------
    states : tensor of shape (n_steps + 1, n, d), or (n_steps s + 1, n, d) with ``stages``
    changes : tensor of shape (n_steps + 1, n, d)
        Those in a step at the derivative at each step's end.

    Raises
    ------
    ValueError
        If inputs are missing, or given to a field that takes none.
    """
    if (inputs is None) != (field.n_inputs == 0):
        raise ValueError(f"a field with n_inputs={field.n_inputs} needs inputs exactly if it takes any.")
    layers = field.network.trainable()
    maps = [
        torch.cat([weight, shift.unsqueeze(1)], dim=1) for weight, shift in zip(layers[::2], layers[1::2], strict=True)
    ]
    parameters = (field.matrix(), field.reach.unsqueeze(1), *maps)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (z, *parameters))
    plan = _Plan(field.network.activation, weights, n_steps, keep, 1 if stages else len(weights.b))
    found: tuple[Tensor, Tensor] = _Steps.apply(plan, inputs, h, z, *parameters)  # type: ignore[no-untyped-call]
    return found


def shares(n_steps: int, weights: Weights) -> list[float]:
    """Of the way, at every slot."""
    return [(step + 1 - late) / n_steps for step in range(n_steps) for late in weights.late] + [1.0]


class _Plan(NamedTuple):
    """What is no tensor; every ``every``-th slot's state is given."""

    activation: Activation
    weights: Weights
    n_steps: int
    keep: bool
    every: int

    @property
    def n_stages(self) -> int:
        return len(self.weights.b)

    @property
    def n_slots(self) -> int:
        return self.n_steps * self.n_stages + 1


class _Shape(NamedTuple):
    """Of a pass: ``n_kept`` slots keep their inner values; ``hidden`` are the widths of hidden layers."""

    n: int
    d: int
    k: int
    n_slots: int
    n_stages: int
    n_kept: int
    hidden: tuple[int, ...]
    apart: bool

    def by_step(self, slots: Tensor) -> Tensor:
        """All slots but the last, (n_steps, s, ...)."""
        return slots[:-1].view(-1, self.n_stages, *slots.shape[1:])


class _Slots:
    """What evaluations read and write, by slot: views of a piece of memory."""

    @staticmethod
    def parts(shape: _Shape) -> list[tuple[int, int]]:
        """Slots and components: states and inputs, f, the last product, hidden layers' values, what stays apart."""
        _, d, k, n_slots, _, n_kept, hidden, apart = shape
        inner = [d, *(width + 1 for width in hidden), *(hidden if apart else ())]
        return [(n_slots, d + k + 1), (n_slots, d), *((n_kept, width) for width in inner)]

    def __init__(self, parts: list[Tensor], shape: _Shape) -> None:
        n_hidden, d = len(shape.hidden), shape.d
        seen, self.F, bounded = parts[:3]
        with_ones = parts[3 : 3 + n_hidden]
        for x in (seen, *with_ones):
            x[:, -1] = 1
        values = [x[:, :-1] for x in with_ones]
        # Activations remember their value or, if they do not get by with that, the product.
        products = parts[3 + n_hidden :] if shape.apart else values
        self.Y, self.known, self.inputs, self.bounded = seen[:, :d], seen[:, d:-1], [seen, *with_ones], bounded
        self.y, self.f = list(self.Y), list(self.F)
        # A step's derivatives as columns.
        self.stages = [step.flatten(1).mT for step in shape.by_step(self.F)]
        # Of each slot: every layer's input, product and value, the last layer's input, its product.
        kept = [0] * shape.n_slots if shape.n_kept == 1 else range(shape.n_slots)
        firsts = [seen, *with_ones]
        self.layers = [
            (
                [
                    (x[i if layer else slot], products[layer][i], values[layer][i])
                    for layer, x in enumerate(firsts[:-1])
                ],
                firsts[-1][i if n_hidden else slot],
                bounded[i],
            )
            for slot, i in enumerate(kept)
        ]
        self.saved = [[x[i] for x in (products if shape.apart else values)] for i in range(shape.n_kept)]


class _Cotangents:
    """Those of the way back, by slot."""

    @staticmethod
    def parts(shape: _Shape) -> list[tuple[int, int]]:
        """Slots and components of f and of all layers' products."""
        return [(shape.n_slots, width) for width in (shape.d, *shape.hidden, shape.d)]

    def __init__(self, parts: list[Tensor], shape: _Shape) -> None:
        self.A, *self.of_layers = parts
        self.a, self.steps = list(self.A), list(shape.by_step(self.A))
        self.deltas = [list(slot) for slot in zip(*self.of_layers, strict=True)]


def _leased(kind: type[Views], shape: _Shape, like: Tensor) -> Lease[Views]:
    """Views of memory that is theirs as long as the lease is held."""
    parts = kind.parts(shape)

    def make() -> Views:
        return kind([like.new_empty(n_slots, width, shape.n) for n_slots, width in parts], shape)

    nbytes = shape.n * like.element_size() * sum(n_slots * width for n_slots, width in parts)
    return lease((kind, shape, like.dtype, like.device), make, nbytes)


class _Path:
    """One pass through the field, and the way back; a few rows that stand still fill up the memory."""

    def __init__(self, plan: _Plan, known: Tensor | None, h: Tensor, z: Tensor, parameters: Sequence[Tensor]) -> None:
        self.plan, self.n_rows = plan, len(z)
        self.matrix, self.reach, *self.maps = parameters
        n, d = -(-len(z) // FULL) * FULL, z.shape[1]
        hidden = tuple(len(weight) for weight in self.maps[:-1])
        k, n_kept = self.maps[0].shape[1] - d - 1, plan.n_slots if plan.keep else 1
        shape = _Shape(n, d, k, plan.n_slots, plan.n_stages, n_kept, hidden, not plan.activation.saves_output)
        self.shape, self._lease = shape, _leased(_Slots, shape, z)
        self.slots = slots = self._lease.memory
        self.h = self._filled(h)
        if known is not None:
            slots.known[..., len(z) :] = 0
            slots.known[..., : len(z)] = known.mT
        slots.y[0].copy_(self._filled(z))

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows as columns, with zeros behind."""
        columns = rows.new_zeros(rows.shape[1], self.shape.n)
        columns[:, : self.n_rows] = rows.mT
        return columns

    def forward(self) -> None:
        """Fill the slots."""
        slots, weights, h, s = self.slots, self.plan.weights, self.h, self.plan.n_stages
        shares = h.new_tensor(weights.b)
        for step, stages in enumerate(slots.stages):
            first = step * s
            y = slots.y[first]
            for i, row in enumerate(weights.a):
                self._evaluate(first + i)
                _combine(y, h, slots.f[first : first + s], row, slots.y[first + i + 1])
            self._evaluate(first + s - 1)
            torch.addcmul(y, h, torch.mv(stages, shares).view_as(y), out=slots.y[first + s])
        self._evaluate(self.plan.n_slots - 1)

    def _evaluate(self, slot: int) -> None:
        layers, x, bounded = self.slots.layers[slot]
        into = self.plan.activation.into
        for weight, (seen, product, value) in zip(self.maps, layers, strict=False):
            torch.mm(weight, seen, out=product)
            into(product, out=value)
        torch.mm(self.maps[-1], x, out=bounded)
        f = torch.mm(self.matrix, self.slots.y[slot], out=self.slots.f[slot])
        f.addcmul_(self.reach, bounded.tanh_())

    def backward(self, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        """Cotangents of z and of the parameters from those of states and changes."""
        held = _leased(_Cotangents, self.shape, self.h)
        back, plan, h, weights, s, n = (
            held.memory,
            self.plan,
            self.h,
            self.plan.weights,
            self.plan.n_stages,
            self.n_rows,
        )
        own, shares = h[:, :n], h.new_tensor(weights.b).view(-1, 1, 1)
        back.a[-1].zero_()[:, :n].addcmul_(q[-1].mT, own)
        total = self._pull(back, plan.n_slots - 1)  # the cotangent of the state at the step's end
        total[:, :n] += p[-1].mT
        for step in range(plan.n_steps - 1, -1, -1):
            first = step * s
            torch.mul(shares, total * h, out=back.steps[step])
            pulled: dict[int, Tensor] = {}
            for i in range(s - 1, -1, -1):
                a = back.a[first + i]
                if not i:
                    a[:, :n].addcmul_(q[step].mT, own)
                for j, other in pulled.items():
                    if weights.a[j - 1][i]:
                        a.addcmul_(other, h, value=weights.a[j - 1][i])
                pulled[i] = self._pull(back, first + i)
                if (first + i) % plan.every == 0:
                    pulled[i][:, :n] += p[(first + i) // plan.every].mT
            for other in pulled.values():
                total += other
        return total[:, :n].mT, *self._gradients(back)

    def _pull(self, back: _Cotangents, slot: int) -> Tensor:
        """The cotangent of Y from that of f, which is in ``a``."""
        a, deltas = back.a[slot], back.deltas[slot]
        delta = torch.mul(a, self.reach, out=deltas[-1])
        TANH.backward_(delta, self.slots.layers[slot][-1])
        saved = self.slots.saved[slot]
        for layer in range(len(deltas) - 2, -1, -1):
            delta = torch.mm(self._weights[layer + 1], delta, out=deltas[layer])
            self.plan.activation.backward_(delta, saved[layer])
        return torch.mm(self.matrix.mT, a).addmm_(self._weights[0], delta)

    @cached_property
    def _weights(self) -> list[Tensor]:
        """The layers' transposed weights, of the first one those of states."""
        return [weight[:, : self.shape.d if i == 0 else -1].mT for i, weight in enumerate(self.maps)]

    def _gradients(self, back: _Cotangents) -> list[Tensor]:
        """Of matrix, reach, and the layers' maps."""
        slots = self.slots
        reach = (back.A * slots.bounded).sum(dim=(0, 2)).unsqueeze(1)
        pairs = [(back.A, slots.Y), *zip(back.of_layers, slots.inputs, strict=True)]
        matrix, *maps = (torch.bmm(delta, x.mT).sum(dim=0) for delta, x in pairs)
        return [matrix, reach, *maps]


class _Steps(torch.autograd.Function):
    """Runge-Kutta steps, and their exact derivative."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, known: Tensor | None, h: Tensor, z: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        path = _Path(plan, known, h, z, parameters)
        path.forward()
        if plan.keep:
            ctx.path = path
        states, f = path.slots.Y[:: plan.every], path.slots.F[:: plan.n_stages]
        return states[..., : len(z)].mT.clone(), f[..., : len(z)].mT * h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *ctx.path.backward(p, q))


def _combine(y: Tensor, h: Tensor, f: Sequence[Tensor], row: Sequence[float], out: Tensor) -> None:
    """Set ``out`` to y + h sum_i w_i f_i."""
    for i, weight in enumerate(row):
        if weight:
            torch.addcmul(y, h, f[i], value=weight, out=out)
            y = out
