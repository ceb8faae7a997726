"""Linear maps of several members side by side, and a plain perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MemberLinear(nn.Module):
    """Independent affine maps, one a member.

    Parameters
    ----------
    n_members, n_in, n_out : int
    generator : torch.Generator
        Draws the weights, uniform of variance 1 / n_in; biases start at zero.
    """

    def __init__(self, n_members: int, n_in: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = (3.0 / n_in) ** 0.5
        shape = (n_members, n_in, n_out)
        draw = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * bound - bound
        self.weight = nn.Parameter(draw.to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (n, n_in), read by every member, or (n_members, n, n_in); gives (n_members, n, n_out)."""
        if x.dim() == 2:
            x = x.expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias, x, self.weight)


class Perceptron(nn.Module):
    """Affine maps with SiLU between them.

    Parameters
    ----------
    sizes : sequence of int
        Of inputs, hidden layers and outputs.
    generator : torch.Generator
        Draws the weights, uniform of variance 1 / n_in; biases start at zero.
    """

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(drawn_linear(*pair, generator) for pair in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., n_in)`` gives ``(..., n_out)``."""
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else nn.functional.silu(x))
        return x


def drawn_linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    """An affine map with weights from ``generator``, uniform of variance 1 / n_in, and no shift."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    draw = torch.rand(n_out, n_in, generator=generator, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        layer.weight.copy_(draw * (3.0 / max(n_in, 1)) ** 0.5)
        layer.bias.zero_()
    return layer  # type: ignore[no-any-return]
