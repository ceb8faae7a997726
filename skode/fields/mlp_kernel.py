"""The multilayer perceptron in slots of memory: what :class:`~skode.fields.MLPField` does, without a copy too many.

Symbols: layer l maps ``x_l`` to ``W_l x_l``, where x_l has the time (if the network takes it) and a one as its last
components, and W_l their weights: one matrix product does it all, and one gives its gradient. Components come first
in memory, rows last; ``delta_l`` is the cotangent of layer l's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from skode.fields.activations import Activation
from skode.solver.arena import Block, Lease, empty, lease, numbers, tensor_bytes
from skode.solver.kernels import Kernel, WayBack
from skode.solver.layout import ColumnLayout


class _Slots(Block):
    """States, layer inputs and values by slot. Without ``keep`` all slots share the layers' inputs."""

    def __init__(self, kernel: MLPKernel, n_slots: int, keep: bool) -> None:
        like, layout, lead = kernel.like, kernel.layout, kernel.layout.lead
        n, extra = layout.n_columns, kernel.n_extra
        n_inner = n_slots if keep else 1

        def inputs(width: int, n_blocks: int) -> Tensor:
            x = empty((n_blocks, *lead, width + extra, n), like)
            x[..., -1, :] = 1
            return x

        self.first = inputs(layout.d, n_slots)
        states = self.first[:, : layout.d] if not lead else empty((n_slots, *layout.state), like)
        self.inner = [inputs(width, n_inner) for width in kernel.widths]
        # What the activations need to remember: their input, if not their output.
        apart = bool(lead) or not kernel.activation.saves_output
        n_before = n_inner if not kernel.activation.saves_output else 1
        self.before = [empty((n_before, *lead, width, n), like) for width in kernel.widths] if apart else []
        t = None
        if kernel.uses_time:
            t = self.first[..., layout.d : layout.d + 1, :]
        super().__init__(states.unbind(0), empty((n_slots, *layout.state), like), t)
        self._states, self._n_extra = states if lead else None, extra
        self.copies = [x[..., : layout.d, :] for x in self.first] if lead else None
        # The time is an input of every layer: set once a step where each slot has inputs of its own.
        rows = [x[..., -2:-1, :] for x in self.inner] if t is not None else []
        self._kept_times, self.shared_times = (rows, []) if keep else ([], [x[0] for x in rows])
        self.layers = [self._products(kernel, slot) for slot in range(n_slots)]

    def _products(self, kernel: MLPKernel, slot: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer: its input, where its product goes, and where its activation goes."""
        products = []
        x = self.first[slot]
        for layer, width in enumerate(kernel.widths):
            inner = self.inner[layer]
            after = inner[slot % len(inner)]
            value = after[..., :width, :]
            before = value
            if self.before:
                before = self.before[layer][slot % len(self.before[layer])]
            products.append((x, before, value))
            x = after
        products.append((x, self.f[slot], self.f[slot]))
        return products

    def saved(self, layer: int) -> Tensor:
        """What layer's activation remembers, for all slots."""
        if self.before and len(self.before[layer]) > 1:
            return self.before[layer]
        inner = self.inner[layer]
        return inner[..., : -self._n_extra, :]

    def set_times(self, first: int, times: Tensor) -> None:
        super().set_times(first, times)
        for row in self._kept_times:
            row[first : first + len(times)] = times

    @property
    def nbytes(self) -> int:
        own = [] if self._states is None else [self._states]
        return tensor_bytes([self.first, *self.inner, *self.before, self.F, *own])


class MLPKernel(Kernel):
    """A multilayer perceptron's evaluations and their derivatives.

    Parameters
    ----------
    weights : sequence of tensors of shape (..., n_out, n_in + n_extra)
        Each layer's weights: of its inputs, of the time if ``time_dependent``, and its bias; a leading axis are
        independent networks, one for each group of the layout.
    activation : Activation
    time_dependent : bool
    layout : ColumnLayout
    shared_times : bool
    """

    layout: ColumnLayout

    def __init__(
        self,
        weights: Sequence[Tensor],
        activation: Activation,
        time_dependent: bool,
        layout: ColumnLayout,
        shared_times: bool,
    ) -> None:
        super().__init__(layout, shared_times)
        self.weights, self.activation, self.uses_time = list(weights), activation, time_dependent
        self.n_extra = 1 + int(time_dependent)
        self.like = weights[0]
        self.widths = tuple(int(weight.shape[-2]) for weight in weights[:-1])
        self.product = torch.bmm if layout.lead else torch.mm
        self._key = (
            MLPKernel,
            layout,
            self.widths,
            time_dependent,
            activation.saves_output,
            self.like.dtype,
            self.like.device,
        )

    def computing(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def block(self, n_slots: int, keep: bool) -> Lease[Any]:
        nbytes = n_slots * self.slot_bytes
        return lease((self._key, n_slots, keep), lambda: _Slots(self, n_slots, keep), nbytes)

    @property
    def slot_bytes(self) -> int:
        apart = int(not self.activation.saves_output)
        width = 2 * self.layout.d + self.n_extra + sum((1 + apart) * w + self.n_extra for w in self.widths)
        if self.layout.lead:
            width += self.layout.d
        return width * numbers(self.layout.row) * self.like.element_size()

    def evaluate(self, block: _Slots, slot: int, keep: bool) -> None:
        if block.copies is not None:
            block.copies[slot].copy_(block.y[slot])
        for time in block.shared_times:
            time.copy_(block.t[slot])  # type: ignore[index]
        product, activate = self.product, self.activation.into
        *hidden, (last, _, value) = block.layers[slot]
        for weight, (x, before, after) in zip(self.weights, hidden, strict=False):
            product(weight, x, out=before)
            activate(before, out=after)
        product(self.weights[-1], last, out=value)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        like = y.new_ones(self.layout.row)
        extra = [t.expand(self.layout.row), like] if self.uses_time else [like]
        x = y
        for i, weight in enumerate(self.weights):
            x = self.product(weight, torch.cat([x, *extra], dim=-2))
            if i < len(self.widths):
                x = self.activation.forward(x)
        return x

    def way_back(self, n_stages: int) -> MLPWayBack:
        key = (self._key, n_stages)
        state, lead, n = self.layout.state, self.layout.lead, self.layout.n_columns
        n_hidden = sum(self.widths) * n * (self.layout.n_groups or 1)
        n_numbers = (2 * n_stages + 1) * numbers(state) + 2 * n_stages * n_hidden
        held = lease(
            (key, "back"),
            lambda: _Cotangents(self.like, n_stages, state, [(*lead, width, n) for width in self.widths]),
            n_numbers * self.like.element_size(),
        )
        return MLPWayBack(self, held)


class _Cotangents:
    """Room for one step's cotangents: of the values A, the states V, the layers, and the activations' slopes."""

    def __init__(self, like: Tensor, n_stages: int, state: Sequence[int], hidden: Sequence[Sequence[int]]) -> None:
        self.V = torch.zeros((n_stages + 1, *state), dtype=like.dtype, device=like.device)
        self.A = empty((n_stages, *state), like)
        self.deltas = [empty((n_stages, *shape), like) for shape in hidden]
        self.slopes = [empty((n_stages, *shape), like) for shape in hidden]
        self.a = list(self.A.unbind(0))
        by_stage = zip(*(zip(d.unbind(0), s.unbind(0), strict=True) for d, s in zip(self.deltas, self.slopes, strict=True)), strict=True)
        self.layers: list[Any] = [list(reversed(layers)) for layers in by_stage] or [[] for _ in range(n_stages)]


class MLPWayBack(WayBack):
    """Pulls cotangents through an :class:`MLPKernel`'s slots."""

    def __init__(self, kernel: MLPKernel, held: Lease[_Cotangents]) -> None:
        self._held, room = held, held.memory
        room.V.zero_()
        super().__init__(room.V, room.a)
        self._kernel, self._room = kernel, room
        self._transposed = [weight[..., : -kernel.n_extra].mT for weight in reversed(kernel.weights)]
        self._totals: list[Tensor] | None = None

    def begin_step(self, block: _Slots, first: int, h: Any) -> None:
        derivative = self._kernel.activation.derivative
        if derivative is None:
            return
        for layer, slopes in enumerate(self._room.slopes):
            derivative(block.saved(layer)[first : first + len(slopes)], out=slopes)

    def pull(self, block: _Slots, first: int, i: int, out: Tensor, time: bool) -> Tensor | None:
        product, delta = self._kernel.product, self.a[i]
        curved = self._kernel.activation.derivative is not None
        for transposed, (following, slope) in zip(self._transposed, self._room.layers[i], strict=False):
            product(transposed, delta, out=following)
            if curved:
                following.mul_(slope)
            delta = following
        product(self._transposed[-1], delta, out=out)
        return self._time_cotangent(i) if time else None

    def _time_cotangent(self, i: int) -> Tensor:
        kernel = self._kernel
        total = self.a[i].new_zeros(kernel.layout.row)
        if kernel.uses_time:
            deltas = [delta[i] for delta in self._room.deltas] + [self.a[i]]
            for weight, delta in zip(kernel.weights, deltas, strict=True):
                total += kernel.product(weight[..., -2:-1].mT, delta)
        return total

    def accumulate(self, block: _Slots, first: int, stages: range) -> None:
        if not len(stages):
            return
        if self._totals is None:
            n = len(self._room.A)
            self._totals = [w.new_zeros((n, *w.shape)) for w in self._kernel.weights]
        low, high = stages.start, stages.stop
        inputs = (block.first, *block.inner)
        for total, delta, x in zip(self._totals, (*self._room.deltas, self._room.A), inputs, strict=True):
            own = total[low:high].flatten(0, -3)
            torch.baddbmm(
                own,
                delta[low:high].flatten(0, -3),
                x[first + low : first + high].flatten(0, -3).mT,
                out=own,
            )

    def gradients(self) -> tuple[Tensor, ...]:
        """Weights (with the time's), then bias, layer by layer."""
        gradients: list[Tensor] = []
        for i, weight in enumerate(self._kernel.weights):
            total = torch.zeros_like(weight) if self._totals is None else self._totals[i].sum(dim=0)
            gradients += [total[..., :-1].contiguous(), total[..., -1].contiguous()]
        return tuple(gradients)
