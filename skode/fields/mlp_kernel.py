"""The multilayer perceptron in slots of memory: what :class:`~skode.fields.MLPField` does, without a copy too many.

Symbols: layer l maps ``x_l`` to ``W_l x_l``, where x_l has the time (if the network takes it) and a one as its last
components, and W_l their weights: one matrix product does it all, and one gives its gradient. Components come first
in memory, rows last; ``delta_l`` is the cotangent of layer l's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from skode.fields.activations import Activation
from skode.solver.arena import Block, Lease, empty, lease, numbers, tensor_bytes
from skode.solver.kernels import Cotangents, Kernel, WayBack
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
        self._states = states if lead else None
        self._inputs: dict[tuple[int, int], list[Tensor]] = {}
        self.copies = [x[..., : layout.d, :] for x in self.first] if lead else None
        # The time is an input of every layer: set once a step where each slot has inputs of its own.
        rows = [x[..., -2:-1, :] for x in self.inner] if t is not None else []
        self._kept_times, self.shared_times = (rows, []) if keep else ([], [x[0] for x in rows])
        self.layers = [self._products(kernel, slot) for slot in range(n_slots)]
        # What the activations remember of each slot, from the last layer to the first.
        which = 2 if kernel.activation.saves_output else 1
        self.saved = [[layer[which] for layer in reversed(hidden)] for hidden, _, _ in self.layers]

    def _products(self, kernel: MLPKernel, slot: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
        """Of each hidden layer input, product and activation (where they go); the last one's input and product."""
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
        return products, x, self.f[slot]

    def inputs(self, first: int, n: int) -> list[Tensor]:
        """The layers' transposed inputs of the slots from ``first`` on, the slots' axis flat."""
        key = first, n
        found = self._inputs.get(key)
        if found is None:
            found = self._inputs[key] = [x[first : first + n].flatten(0, -3).mT for x in (self.first, *self.inner)]
        return found

    def set_times(self, first: int, times: Tensor) -> None:
        super().set_times(first, times)
        for row in self._kept_times:
            row[first : first + len(times)] = times

    @cached_property
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
        hidden, last, value = block.layers[slot]
        for weight, (x, before, after) in zip(self.weights, hidden):  # noqa: B905, the last weight's turn comes after
            product(weight, x, out=before)
            activate(before, out=after)
        product(self.weights[-1], last, out=value)

    def way_back(self, n_stages: int) -> MLPWayBack:
        state, lead, n = self.layout.state, self.layout.lead, self.layout.n_columns
        hidden = [(*lead, width, n) for width in self.widths]
        weights = [tuple(weight.shape) for weight in self.weights]
        n_numbers = (2 * n_stages + 2) * numbers(state)
        n_numbers += n_stages * (sum(map(numbers, hidden)) + sum(map(numbers, weights)))
        held = lease(
            (self._key, "back", n_stages),
            lambda: _LayerCotangents(self.like, n_stages, state, hidden, weights),
            n_numbers * self.like.element_size(),
        )
        return MLPWayBack(self, held)


class _LayerCotangents(Cotangents):
    """Room for one step's cotangents, those of the layers, and the weights' gradients."""

    def __init__(
        self,
        like: Tensor,
        n_stages: int,
        state: Sequence[int],
        hidden: Sequence[Sequence[int]],
        weights: Sequence[Sequence[int]],
    ) -> None:
        super().__init__(like, n_stages, state)
        self.totals = [empty((n_stages, *shape), like) for shape in weights]
        self._stages: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        self.deltas = [empty((n_stages, *shape), like) for shape in hidden]
        # Of each stage, from the last layer to the first.
        self.layers = [[delta[i] for delta in reversed(self.deltas)] for i in range(n_stages)]

    def stages(self, low: int, high: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights' gradients and the layers' cotangents of some stages, the stages' axis flat."""
        key = low, high
        found = self._stages.get(key)
        if found is None:
            found = self._stages[key] = (
                [total[low:high].flatten(0, -3) for total in self.totals],
                [delta[low:high].flatten(0, -3) for delta in (*self.deltas, self.A)],
            )
        return found


class MLPWayBack(WayBack):
    """Pulls cotangents through an :class:`MLPKernel`'s slots."""

    room: _LayerCotangents

    def __init__(self, kernel: MLPKernel, held: Lease[_LayerCotangents]) -> None:
        super().__init__(held.memory)
        self._held, self._kernel = held, kernel
        self._transposed = [weight[..., : -kernel.n_extra].mT for weight in reversed(kernel.weights)]
        for total in held.memory.totals:
            total.zero_()

    def pull(self, block: _Slots, first: int, i: int, out: Tensor, time: bool) -> Tensor | None:
        product, bend, delta = self._kernel.product, self._kernel.activation.backward_, self.room.a[i]
        for transposed, following, saved in zip(self._transposed, self.room.layers[i], block.saved[first + i]):  # noqa: B905, the first layer's turn comes after
            product(transposed, delta, out=following)
            bend(following, saved)
            delta = following
        product(self._transposed[-1], delta, out=out)
        return self._time_cotangent(i) if time else None

    def _time_cotangent(self, i: int) -> Tensor:
        kernel = self._kernel
        total = self.room.a[i].new_zeros(kernel.layout.row)
        if kernel.uses_time:
            deltas = [delta[i] for delta in self.room.deltas] + [self.room.a[i]]
            for weight, delta in zip(kernel.weights, deltas, strict=True):
                total += kernel.product(weight[..., -2:-1].mT, delta)
        return total

    def accumulate(self, block: _Slots, first: int, low: int, high: int) -> None:
        totals, deltas = self.room.stages(low, high)
        for total, delta, x in zip(totals, deltas, block.inputs(first + low, high - low), strict=True):
            torch.baddbmm(total, delta, x, out=total)

    def gradients(self) -> tuple[Tensor, ...]:
        """Weights (with the time's), then bias, layer by layer."""
        sums = [total.sum(dim=0) for total in self.room.totals]
        return tuple(part for total in sums for part in (total[..., :-1], total[..., -1]))
