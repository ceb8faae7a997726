"""Activations with their derivatives, by the names that scikit-learn's MLPClassifier uses, and smooth ones more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ops = torch.ops.aten


class Into(Protocol):
    """A function of one tensor that writes its result into another, which may be the same."""

    def __call__(self, input: Tensor, /, *, out: Tensor) -> object:
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
    backward_ : callable
        ``backward_(a, saved)``, the same as ``backward`` in the cotangent's place.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_output: bool
    into: Into
    backward_: Callable[[Tensor, Tensor], object]


def _relu_into(x: Tensor, *, out: Tensor) -> None:
    torch.clamp_min(x, 0.0, out=out)


def _silu_into(x: Tensor, *, out: Tensor) -> None:
    _ops.silu.out(x, out=out)


def _softplus_into(x: Tensor, *, out: Tensor) -> None:
    _ops.softplus.out(x, out=out)


def _copy_into(x: Tensor, *, out: Tensor) -> None:
    if out is not x:
        out.copy_(x)


_tanh_backward = _ops.tanh_backward.grad_input
_logistic_backward = _ops.sigmoid_backward.grad_input
_relu_backward = _ops.threshold_backward.grad_input
_silu_backward = _ops.silu_backward.grad_input
_softplus_backward = _ops.softplus_backward.grad_input

ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, lambda a, _: a, True, _copy_into, lambda a, _: a),
    "tanh": Activation(
        torch.tanh, _ops.tanh_backward, True, torch.tanh, lambda a, y: _tanh_backward(a, y, grad_input=a)
    ),
    "logistic": Activation(
        torch.sigmoid,
        _ops.sigmoid_backward,
        True,
        torch.sigmoid,
        lambda a, y: _logistic_backward(a, y, grad_input=a),
    ),
    "relu": Activation(
        torch.relu,
        lambda a, y: _ops.threshold_backward(a, y, 0),
        True,
        _relu_into,
        lambda a, y: _relu_backward(a, y, 0, grad_input=a),
    ),
    "silu": Activation(
        torch.nn.functional.silu,
        _ops.silu_backward,
        False,
        _silu_into,
        lambda a, x: _silu_backward(a, x, grad_input=a),
    ),
    "softplus": Activation(
        torch.nn.functional.softplus,
        lambda a, x: _ops.softplus_backward(a, x, 1, 20),
        False,
        _softplus_into,
        lambda a, x: _softplus_backward(a, x, 1, 20, grad_input=a),
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
