"""Linear maps of several members side by side."""

from __future__ import annotations

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
