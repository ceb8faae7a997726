"""Initial-value problems whose solutions are known, and small networks as fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from skode.fields import MLPField

Field = Callable[[Tensor, Tensor], Tensor]


def times(*values: float) -> Tensor:
    """Times, or a state, as a float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def column(*values: float) -> Tensor:
    """Float64 states of one component, one a row."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def rows(*values: tuple[float, ...]) -> Tensor:
    """Float64 states, one tuple a row."""
    return torch.tensor(values, dtype=torch.float64)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def tracking(t: Tensor, y: Tensor) -> Tensor:
    """Stiff enough for rejections at loose tolerances."""
    return -50 * (y - torch.cos(t))


@dataclass(frozen=True, eq=False)
class KnownProblem:
    """A field with initial states at t0, and the solution: ``exact(y0, t0, t)`` is (n, m, d) for t (n, m)."""

    field: Field
    y0: Tensor
    t0: float
    t1: float
    exact: Callable[[Tensor, float, Tensor], Tensor]

    def solution(self, t: Tensor) -> Tensor:
        """The states of every row at times (m,) or (n, m)."""
        return self.exact(self.y0, self.t0, t.expand(len(self.y0), -1))


def _decay(y0: Tensor, t0: float, t: Tensor) -> Tensor:
    return y0.unsqueeze(1) * torch.exp(-(t - t0)).unsqueeze(2)


def _oscillator_field(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[:, 1], -y[:, 0]], dim=1)


def _oscillator(y0: Tensor, t0: float, t: Tensor) -> Tensor:
    x, v, cos, sin = y0[:, :1], y0[:, 1:], torch.cos(t - t0), torch.sin(t - t0)
    return torch.stack([x * cos + v * sin, v * cos - x * sin], dim=2)


def _logistic(y0: Tensor, t0: float, t: Tensor) -> Tensor:
    return (1 / (1 + (1 / y0 - 1) * torch.exp(-(t - t0)))).unsqueeze(2)


def _seasonal_field(t: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y) * (1 + torch.cos(t))


def _seasonal(y0: Tensor, t0: float, t: Tensor) -> Tensor:
    clock = t + torch.sin(t) - (t0 + np.sin(t0))
    return (1 / (1 + (1 / y0 - 1) * torch.exp(-clock))).unsqueeze(2)


def _gaussian(y0: Tensor, t0: float, t: Tensor) -> Tensor:
    return y0.unsqueeze(1) * torch.exp(t0**2 - t**2).unsqueeze(2)


def _lotka_volterra_field(t: Tensor, y: Tensor) -> Tensor:
    prey, hunters = y[:, :1], y[:, 1:]
    return torch.cat([1.5 * prey - prey * hunters, prey * hunters - 3 * hunters], dim=1)


def reference(field: Field, y0: Tensor, t0: float, t: Tensor) -> Tensor:
    """The solution by SciPy's DOP853 at 1e-12, for t ``(n, m)`` on one side of t0."""

    def derivative(time: float, state: np.ndarray) -> np.ndarray:
        return field(torch.full((1, 1), time, dtype=torch.float64), torch.from_numpy(state).view(1, -1)).numpy()[0]

    paths = []
    for start, times in zip(y0.numpy(), t.numpy(), strict=True):
        end = times[np.argmax(np.abs(times - t0))]
        options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-12, "dense_output": True}
        paths.append(torch.from_numpy(solve_ivp(derivative, (t0, end), start, **options).sol(times).T.copy()))
    return torch.stack(paths)


PROBLEMS = {
    "decay": KnownProblem(decay, column(1.0, -2.0, 0.5), 0.0, 2.0, _decay),
    "oscillator": KnownProblem(_oscillator_field, rows((1.0, 0.0), (0.3, -2.0)), 0.5, 4.0, _oscillator),
    "logistic": KnownProblem(lambda t, y: y * (1 - y), column(0.1, 0.5, 1.7), -1.0, 3.0, _logistic),
    "seasonal": KnownProblem(_seasonal_field, column(0.2, 0.4, 1.5), 0.0, 1.0, _seasonal),
    "gaussian": KnownProblem(lambda t, y: -2 * t * y, column(1.0, -3.0), -1.0, 1.5, _gaussian),
    "lotka_volterra": KnownProblem(
        _lotka_volterra_field,
        rows((2.0, 1.0), (4.0, 2.0)),
        0.0,
        3.0,
        lambda y0, t0, t: reference(_lotka_volterra_field, y0, t0, t),
    ),
}


def mlp_field(
    seed: int = 0,
    n_dims: int = 2,
    hidden_layer_sizes: tuple[int, ...] = (4,),
    activation: str = "tanh",
    time_dependent: bool = True,
    *,
    n_outputs: int | None = None,
    n_members: int | None = None,
) -> MLPField:
    """A float64 network with biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    field = MLPField(
        n_dims,
        hidden_layer_sizes,
        activation,
        time_dependent,
        n_outputs=n_outputs,
        n_members=n_members,
        generator=generator,
    ).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return field


def random_states(seed: int, n: int, d: int = 2) -> Tensor:
    """Standard normal float64 states."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain(nn.Module):
    """Hides what a field knows about its derivatives."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.inner = field

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(t, y)


class Recorded(nn.Module):
    """Remembers the times (n, 1) and states of all calls."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.inner = field
        self.times: list[Tensor] = []
        self.states: list[Tensor] = []

    @property
    def n_calls(self) -> int:
        return len(self.times)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(t.detach().clone())
        self.states.append(y.detach().clone())
        return self.inner(t, y)
