"""Fields and helpers of the tests that put skode beside torchdiffeq."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import skode.solver

F64 = torch.float64


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def random(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seasonal(t: Tensor, y: Tensor) -> Tensor:
    return -y * torch.cos(t)


def seasonal_solution(y0: Tensor, t: Tensor) -> Tensor:
    decay = torch.exp(torch.sin(t[0]) - torch.sin(t))
    return y0 * decay.view(-1, *[1] * y0.dim())


class Net(nn.Module):
    """A small field whose weights come from a seed."""

    def __init__(self, n_dims: int = 2, seed: int = 0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(n_dims + 1, 8, dtype=dtype), nn.Linear(8, n_dims, dtype=dtype)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(0.5 * random(*parameter.shape, seed=seed + i))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        clock = torch.ones_like(y[..., :1]) * t
        return self.last(torch.tanh(self.first(torch.cat([y, clock], dim=-1))))


def halves(func: Any, y0: Any, t: Tensor) -> Tensor:
    """Every second step of this grid is short."""
    ends = torch.linspace(t[0].item(), t[-1].item(), 6, dtype=t.dtype)
    return torch.cat([ends, ends[:-1] + 0.3 * ends.diff()]).sort(descending=bool(t[-1] < t[0])).values


def n_evals(y0: Any, field: Any = seasonal, t: Tensor | None = None, **kwargs: Any) -> int:
    calls: list[Tensor] = []

    def counted(t: Tensor, y: Any) -> Any:
        calls.append(t)
        return field(t, y)

    skode.solver.odeint(counted, y0, times(0, 3) if t is None else t, **kwargs)
    return len(calls)
