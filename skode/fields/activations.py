"""Activations with their derivatives, by the names that scikit-learn's MLPClassifier uses, and smooth ones more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

_ops = torch.ops.aten


class Into(Protocol):
    """A function of one tensor that writes its result into another, which may be the same."""

    def __call__(self, x: Tensor, out: Tensor) -> object:
        """Set ``out``."""
        ...


@dataclass(frozen=True)
class Activation:
    """A function of one variable and the pull-back through it.

    Parameters
    ----------
    forward : callable
        ``forward(x)``.
    backward : callable
        ``backward(a, saved)``, the cotangent times the derivative.
    saves_output : bool
        Whether ``saved`` is the output (else the input).
    into : callable
        ``into(x, out)``, the same as ``forward`` into memory that is there.
    derivative : callable or None
        ``derivative(saved, out)``; None means that it is 1.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_output: bool
    into: Into
    derivative: Into | None


@lru_cache(maxsize=16)
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def _tanh_slope(y: Tensor, out: Tensor) -> None:
    torch.addcmul(_one(y.dtype, y.device), y, y, value=-1, out=out)


def _logistic_slope(y: Tensor, out: Tensor) -> None:
    torch.addcmul(y, y, y, value=-1, out=out)


def _step(y: Tensor, out: Tensor) -> None:
    torch.heaviside(y, torch.zeros((), dtype=y.dtype, device=y.device), out=out)


def _silu_slope(x: Tensor, out: Tensor) -> None:
    gate = torch.sigmoid(x)
    torch.addcmul(gate, x, torch.addcmul(gate, gate, gate, value=-1), out=out)


def _relu_into(x: Tensor, out: Tensor) -> None:
    torch.clamp_min(x, 0.0, out=out)


def _silu_into(x: Tensor, out: Tensor) -> None:
    _ops.silu.out(x, out=out)


def _softplus_into(x: Tensor, out: Tensor) -> None:
    _ops.softplus.out(x, out=out)


def _softplus_slope(x: Tensor, out: Tensor) -> None:
    torch.sigmoid(x, out=out)


def _copy_into(x: Tensor, out: Tensor) -> None:
    if out is not x:
        out.copy_(x)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, lambda a, _: a, True, _copy_into, None),
    "tanh": Activation(torch.tanh, _ops.tanh_backward, True, torch.tanh, _tanh_slope),
    "logistic": Activation(torch.sigmoid, _ops.sigmoid_backward, True, torch.sigmoid, _logistic_slope),
    "relu": Activation(torch.relu, lambda a, y: _ops.threshold_backward(a, y, 0), True, _relu_into, _step),
    "silu": Activation(torch.nn.functional.silu, _ops.silu_backward, False, _silu_into, _silu_slope),
    "softplus": Activation(
        torch.nn.functional.softplus,
        lambda a, x: _ops.softplus_backward(a, x, 1, 20),
        False,
        _softplus_into,
        _softplus_slope,
    ),
}


def get_activation(name: str) -> Activation:
    """The activation that goes by ``name``.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation={name!r} is unknown; use one of {', '.join(map(repr, ACTIVATIONS))}.") from None
