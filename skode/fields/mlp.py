"""The multilayer perceptron as a vector field, its derivatives written by hand.

Symbols: layer l maps ``x_l`` to ``W_l x_l + w_l t + b_l``, ``w_l`` being the last column of the layer's weight;
``delta_l`` is the cotangent of that value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields.activations import Activation, get_activation
from skode.fields.mlp_kernel import MLPKernel
from skode.solver.dynamics import OffersVjp, Weight
from skode.solver.layout import ColumnLayout


class _Layer(nn.Module):
    """An affine map, or ``n_members`` of them side by side; the last input column is the time if it has one."""

    def __init__(self, n_in: int, n_out: int, n_members: int | None, time_dependent: bool) -> None:
        super().__init__()
        n_in += int(time_dependent)
        self._time_dependent = time_dependent
        lead = () if n_members is None else (n_members,)
        self.weight = nn.Parameter(torch.empty(*lead, n_out, n_in))
        self.bias = nn.Parameter(torch.empty(*lead, n_out))

    def draw(self, generator: torch.Generator, *, first: bool) -> None:
        """Uniform weights of variance 1 / fan_in; shifts, in time too, in the first layer alone."""
        n_in = self.weight.shape[-1] - int(self._time_dependent)
        shift = n_in**-0.5 if first else 0.0
        with torch.no_grad():
            self.weight.copy_(_uniform(self.weight.shape, (3.0 / n_in) ** 0.5, generator))
            self.bias.copy_(_uniform(self.bias.shape, shift, generator))
            if self._time_dependent:
                self.weight[..., -1].copy_(_uniform(self.bias.shape, shift, generator))


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound


class _Tape:
    """One evaluation: time, every layer's input, what the activations saved, and later every layer's delta."""

    __slots__ = ("deltas", "inputs", "saved", "t")

    def __init__(self, t: Tensor, inputs: list[Tensor], saved: list[Tensor]) -> None:
        self.t, self.inputs, self.saved = t, inputs, saved
        self.deltas: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        hidden = sum(x.numel() for x in self.inputs)
        return 2 * hidden * self.inputs[0].element_size()


class MLPField(OffersVjp, nn.Module):
    """A multilayer perceptron dy/dt = net(t, y) with closed-form derivatives.

    Parameters are ordinary torch parameters, layer by layer, weight ``(n_out, n_in)`` then bias. With
    ``time_dependent`` every layer has the time as one more input, the last column of its weight, as the concatenating
    layers of the paper's experiments have [1]_.

    Parameters
    ----------
    n_dims : int
        Dimension of the state.
    hidden_layer_sizes : sequence of int, default=(64, 64)
        Units of the hidden layers.
    activation : str, default="tanh"
        "tanh", "softplus", "silu", "logistic", "identity" or "relu" (not smooth: solvers take more steps).
    time_dependent : bool, default=True
        Whether the time is an input of every layer.
    n_outputs : int, optional
        Dimension of the value, ``n_dims`` if not given.
    n_members : int, optional
        Makes it that many independent fields in one: parameters get a leading axis, and the rows of a batch belong to
        the members in equal consecutive blocks.
    generator : torch.Generator, optional
        Draws the initial weights; fresh entropy if not given. torch's global generator is not used.

    References
    ----------
    .. [1] Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, section 3. arXiv:1806.07366

    Examples
    --------
    >>> import torch
    >>> from skode.fields import MLPField
    >>> field = MLPField(2, hidden_layer_sizes=(16,), generator=torch.Generator().manual_seed(0))
    >>> field(torch.zeros(5, 1), torch.ones(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        n_dims: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        time_dependent: bool = True,
        *,
        n_outputs: int | None = None,
        n_members: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.n_dims, self.n_members, self.time_dependent = n_dims, n_members, time_dependent
        self._activation = get_activation(activation)
        sizes = [n_dims, *hidden_layer_sizes, n_dims if n_outputs is None else n_outputs]
        if min(sizes) < 1:
            raise ValueError(f"every layer needs at least one unit; got sizes {sizes}.")
        self.layers = nn.ModuleList(_Layer(n_in, n_out, n_members, time_dependent) for n_in, n_out in pairwise(sizes))
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.draw(generator)

    def draw(self, generator: torch.Generator) -> None:
        """Draw all parameters anew."""
        for i, layer in enumerate(self.layers):
            layer.draw(generator, first=i == 0)  # type: ignore[operator]

    @property
    def activation(self) -> Activation:
        """Between the layers."""
        return self._activation

    @property
    def any_rows(self) -> bool:
        """Whether rows may be copied to make more of them."""
        return self.n_members is None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Value at times ``t (n, 1)`` and states ``y (n, d)``."""
        x, last = self._taken(y), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = self._affine(layer, t, x)
            if i < last:
                x = self._activation.forward(x)
        return x.reshape(y.shape[0], x.shape[-1])

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        """Value, and a tape for :meth:`pull`."""
        x, last = self._taken(y), len(self.layers) - 1
        inputs, saved = [], []
        for i, layer in enumerate(self.layers):
            inputs.append(x)
            x = self._affine(layer, t, x)
            if i < last:
                before, x = x, self._activation.forward(x)
                saved.append(x if self._activation.saves_output else before)
        return x.reshape(len(y), x.shape[-1]), _Tape(t, inputs, saved)

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        """The cotangents of the state and, if asked for, of the time ``(n, 1)``."""
        delta = self._grouped(a)
        tape.deltas = [delta] * len(self.layers)
        for i in reversed(range(len(self.layers))):
            if i < len(self.layers) - 1:
                delta = self._activation.backward(delta, tape.saved[i])
            tape.deltas[i] = delta
            delta = delta @ self._matrix(self.layers[i])
        dy = delta.reshape(len(a), self.n_dims)
        return dy, self._time_cotangent(tape, len(a)) if time else None

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        """The parameters' gradients, summed over evaluations."""
        gradients: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            weight = torch.zeros_like(self._matrix(layer), memory_format=torch.contiguous_format)
            bias = torch.zeros_like(layer.bias)  # type: ignore[arg-type]
            column = torch.zeros_like(bias)
            for k, tape in enumerate(tapes):
                delta = self._weighted(tape.deltas[i], 1.0 if weights is None else weights[k])
                (weight.addmm_ if self.n_members is None else weight.baddbmm_)(delta.mT, tape.inputs[i])
                total = delta.sum(dim=-2)
                bias += total
                if self.time_dependent:
                    shared = _is_shared(tape.t)
                    column += total * tape.t[0] if shared else (delta * self._by_member(tape.t)).sum(dim=-2)
            gradients += [torch.cat([weight, column.unsqueeze(-1)], dim=-1) if self.time_dependent else weight, bias]
        return tuple(gradients)

    def trainable(self) -> tuple[Tensor, ...]:
        """All parameters, in the order of :meth:`accumulate`."""
        return tuple(parameter for layer in self.layers for parameter in (layer.weight, layer.bias))  # type: ignore[misc]

    def kernel(self, y0: Tensor, *, padded: bool, shared_times: bool) -> MLPKernel | None:
        """What evaluates the network in the solver's memory, for a batch like ``y0``; None for what overrides it."""
        own = type(self).forward is MLPField.forward and type(self).linearize is MLPField.linearize
        if not own or self._forward_hooks or self._forward_pre_hooks:
            return None
        self._taken(y0)
        layout = ColumnLayout(len(y0), self.n_dims, self.n_members, padded)
        weights = [torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1).detach() for layer in self.layers]  # type: ignore[list-item, operator]
        n_outputs = weights[-1].shape[-2]
        if n_outputs != self.n_dims:
            raise FieldError(f"the network gives {n_outputs} derivatives for states of {self.n_dims} components.")
        return MLPKernel(weights, self._activation, self.time_dependent, layout, shared_times)

    # --- layers ---

    def _matrix(self, layer: nn.Module) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return weight[..., :-1] if self.time_dependent else weight

    def _affine(self, layer: nn.Module, t: Tensor, x: Tensor) -> Tensor:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor = layer.bias  # type: ignore[assignment]
        product = torch.addmm if self.n_members is None else torch.baddbmm
        if not self.time_dependent:
            return product(bias if self.n_members is None else bias.unsqueeze(1), x, weight.mT)
        shared = _is_shared(t)
        if shared:
            bias = torch.addcmul(bias, weight[..., -1], t[0])
        if self.n_members is not None:
            bias = bias.unsqueeze(1)
        out = product(bias, x, weight[..., :-1].mT)
        return out if shared else torch.addcmul(out, self._by_member(t), weight[..., -1].unsqueeze(-2))

    # --- rows and members ---

    def _by_member(self, rows: Tensor) -> Tensor:
        return rows if self.n_members is None else rows.reshape(self.n_members, -1, rows.shape[-1])

    def _grouped(self, y: Tensor) -> Tensor:
        return y if self.n_members is None else y.view(self.n_members, -1, y.shape[-1])

    def _taken(self, y: Tensor) -> Tensor:
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        if y.shape[-1] != self.n_dims or y.dtype != weight.dtype:
            raise FieldError(
                f"the network takes states of {self.n_dims} components in {weight.dtype}; got {y.shape[-1]} in "
                f"{y.dtype}."
            )
        return self._grouped(y)

    def _weighted(self, delta: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return delta * self._by_member(weight)
        return delta if weight == 1.0 else delta * weight

    def _time_cotangent(self, tape: _Tape, n_rows: int) -> Tensor:
        total = tape.t.new_zeros((n_rows, 1))
        if not self.time_dependent:
            return total
        for delta, layer in zip(tape.deltas, self.layers, strict=True):
            column: Tensor = layer.weight[..., -1:]  # type: ignore[index]
            total = total + (delta @ column).reshape(n_rows, 1)
        return total


def _is_shared(t: Tensor) -> bool:
    """Whether all rows have one time (an expanded tensor), which then costs nothing."""
    return t.stride(0) == 0 or t.shape[0] == 1
