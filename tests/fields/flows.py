"""What tests of flows share: fields with all parameters set, and plain autograd to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skode.fields import FlowField, PlanarField


def shaken(field: nn.Module, seed: int, size: float = 0.3) -> Any:
    """In float64, with no parameter left at zero."""
    generator = torch.Generator().manual_seed(seed)
    field.double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return field


def flow_field(
    seed: int = 0, n_dims: int = 3, hidden: Sequence[int] = (5, 4), activation: str = "tanh", **options: Any
) -> FlowField:
    generator = torch.Generator().manual_seed(seed)
    return shaken(FlowField(n_dims, hidden, activation, generator=generator, **options), seed)  # type: ignore[no-any-return]


def planar_field(seed: int = 0, n_dims: int = 3, n_units: int = 5, activation: str = "tanh") -> PlanarField:
    generator = torch.Generator().manual_seed(seed)
    return shaken(PlanarField(n_dims, n_units, (4, 3), activation, generator=generator), seed)  # type: ignore[no-any-return]


def jacobians(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
    """(n, d, d), by one reverse pass for each component of the value."""
    y = y.detach().clone().requires_grad_()
    v = field(t, y)
    rows = [torch.autograd.grad(v[:, i].sum(), y, retain_graph=True)[0] for i in range(y.shape[1])]
    return torch.stack(rows, dim=1)


def traces(field: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
    return jacobians(field, t, y).diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def written_down(field: FlowField, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
    """The velocity, layer by layer, with torch's own activations."""
    functions = {"identity": lambda x: x, "logistic": torch.sigmoid}
    functions |= {name: getattr(torch.nn.functional, name) for name in ("relu", "silu", "softplus")}
    x, layers = y, field.flow_layers
    for layer in layers[:-1]:
        shift = layer.bias + t * layer.drift
        if context is not None:
            shift = shift + context @ layer.context.T
        x = functions.get(field.activation, torch.tanh)((1 + t * layer.gate) * (x @ layer.weight.T) + shift)
    return x @ layers[-1].weight.T + layers[-1].bias + t * layers[-1].drift
