"""What the solver benchmarks solve: multilayer-perceptron fields with fresh weights and states for every repetition.

A case fixes the shapes; ``draw`` makes one repetition's arrays, the same for all contestants. Weights are uniform in
+-1/sqrt(fan_in), as ``nn.Linear`` draws them, matrices times ``gain``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skode.fields import MLPField

Array = NDArray[Any]
ACTIVATIONS = {"tanh": torch.tanh, "silu": torch.nn.functional.silu}


@dataclass(frozen=True)
class Case:
    """A train step's shapes and tolerances; ``times`` are the output times, the first one y0's."""

    batch: int
    n_dims: int
    hidden: tuple[int, ...]
    activation: str = "tanh"
    time_dependent: bool = False
    times: tuple[float, ...] = (0.0, 2.0)
    rtol: float = 1e-5
    atol: float = 1e-7
    heterogeneous: bool = False
    gain: float = 1.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths of all layers."""
        return (self.n_dims, *self.hidden, self.n_dims)


class Inputs(NamedTuple):
    """One repetition: y0 (n, d), weights (n_out, n_in) and biases in turn, cotangents of the outputs (m - 1, n, d)."""

    y0: Array
    weights: list[Array]
    cotangent: Array


def case_of(size: tuple[int, int, int], gain: float = 1.0) -> Case:
    """The field D-H-H-D of a (batch, D, H)."""
    batch, n_dims, width = size
    return Case(batch, n_dims, (width, width), gain=gain)


def variants(base: Case) -> dict[str, Case]:
    """The base case with one thing changed."""
    width = base.hidden[0]
    return {
        "time_dependent=True": replace(base, time_dependent=True),
        "one hidden layer": replace(base, hidden=(width,)),
        "three hidden layers": replace(base, hidden=(width,) * 3),
        "SiLU": replace(base, activation="silu"),
        "heterogeneous batch": replace(base, heterogeneous=True),
        "20 output times": replace(base, times=tuple(np.linspace(0.0, 2.0, 21).tolist())),
    }


def draw(case: Case, seed: int) -> Inputs:
    """One repetition's arrays."""
    rng = np.random.default_rng(seed)
    y0 = rng.standard_normal((case.batch, case.n_dims))
    if case.heterogeneous:
        y0 *= 10.0 ** rng.uniform(-2, 1, size=(case.batch, 1))
    weights: list[Array] = []
    for n_in, n_out in zip(case.sizes[:-1], case.sizes[1:], strict=True):
        n_in += int(case.time_dependent)
        bound = n_in**-0.5
        weights.append(case.gain * rng.uniform(-bound, bound, size=(n_out, n_in)).astype(np.float32))
        weights.append(rng.uniform(-bound, bound, size=n_out).astype(np.float32))
    cotangent = rng.standard_normal((len(case.times) - 1, case.batch, case.n_dims))
    return Inputs(y0.astype(np.float32), weights, cotangent.astype(np.float32))


class Net(nn.Module):
    """The field as a user would write it, for any of the torch libraries; it counts its evaluations.

    The time may be a scalar, (n,) or (n, 1); it is the last input of every layer of a time-dependent field.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        extra = int(case.time_dependent)
        pairs = zip(case.sizes[:-1], case.sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(n_in + extra, n_out) for n_in, n_out in pairs)
        self.activation = ACTIVATIONS[case.activation]
        self.time_dependent = case.time_dependent
        self.n_evals = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The field's value (n, d)."""
        self.n_evals += 1
        time = t.reshape(-1, 1).to(y.dtype).expand(len(y), 1) if self.time_dependent else None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            y = layer(y if time is None else torch.cat([y, time], dim=1))
            if i < last:
                y = self.activation(y)
        return y


def mlp_field(case: Case) -> MLPField:
    """The field as skode has it."""
    return MLPField(case.n_dims, case.hidden, case.activation, case.time_dependent)


def set_weights(module: nn.Module, weights: list[Array]) -> None:
    """Overwrite the parameters in place."""
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
