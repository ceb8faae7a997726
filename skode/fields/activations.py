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
    slope : callable
        ``slope(saved)``, the derivative; autograd can differentiate it.
    curve : callable, optional
        ``curve(saved, slope)``, the second derivative; None where it is zero.
    bend : float, optional
        k, where the second derivative is k times the output times the slope.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_output: bool
    into: Into
    backward_: Callable[[Tensor, Tensor], object]
    slope: Callable[[Tensor], Tensor]
    curve: Callable[[Tensor, Tensor], Tensor] | None = None
    bend: float | None = None

    def pull_slope(self, a: Tensor, b: Tensor, saved: Tensor, slope: Tensor) -> Tensor:
        """The cotangent of the input from those of the output, ``a``, and of the slope, ``b``."""
        if self.bend is not None:
            return torch.addcmul(a, b, saved, value=self.bend) * slope
        if self.curve is None:
            return a * slope
        return torch.addcmul(a * slope, b, self.curve(saved, slope))

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        """By its name, since torch's own functions cannot be pickled."""
        return get_activation, (next(name for name, one in ACTIVATIONS.items() if one is self),)


def _relu_into(x: Tensor, *, out: Tensor) -> None:
    torch.clamp_min(x, 0.0, out=out)


def _silu_into(x: Tensor, *, out: Tensor) -> None:
    _ops.silu.out(x, out=out)


def _softplus_into(x: Tensor, *, out: Tensor) -> None:
    _ops.softplus.out(x, out=out)


def _copy_into(x: Tensor, *, out: Tensor) -> None:
    if out is not x:
        out.copy_(x)


def _silu_slope(x: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return p * (1 + x * (1 - p))


def _silu_curve(x: Tensor, _: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return p * (1 - p) * (2 + x * (1 - 2 * p))


def _softplus_slope(x: Tensor) -> Tensor:
    # torch's is the identity beyond 20.
    return torch.where(x > 20, 1.0, torch.sigmoid(x))


def _softplus_curve(_: Tensor, slope: Tensor) -> Tensor:
    return slope * (1 - slope)


_tanh_backward = _ops.tanh_backward.grad_input
_logistic_backward = _ops.sigmoid_backward.grad_input
_relu_backward = _ops.threshold_backward.grad_input
_silu_backward = _ops.silu_backward.grad_input
_softplus_backward = _ops.softplus_backward.grad_input

ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, lambda a, _: a, True, _copy_into, lambda a, _: a, torch.ones_like),
    "tanh": Activation(
        torch.tanh,
        _ops.tanh_backward,
        True,
        torch.tanh,
        lambda a, y: _tanh_backward(a, y, grad_input=a),
        lambda y: torch.addcmul(y.new_ones(()), y, y, value=-1),
        lambda y, slope: -2 * y * slope,
        -2.0,
    ),
    "logistic": Activation(
        torch.sigmoid,
        _ops.sigmoid_backward,
        True,
        torch.sigmoid,
        lambda a, y: _logistic_backward(a, y, grad_input=a),
        lambda y: y * (1 - y),
        lambda y, slope: slope * (1 - 2 * y),
    ),
    "relu": Activation(
        torch.relu,
        lambda a, y: _ops.threshold_backward(a, y, 0),
        True,
        _relu_into,
        lambda a, y: _relu_backward(a, y, 0, grad_input=a),
        lambda y: (y > 0).to(y.dtype),
    ),
    "silu": Activation(
        torch.nn.functional.silu,
        _ops.silu_backward,
        False,
        _silu_into,
        lambda a, x: _silu_backward(a, x, grad_input=a),
        _silu_slope,
        _silu_curve,
    ),
    "softplus": Activation(
        torch.nn.functional.softplus,
        lambda a, x: _ops.softplus_backward(a, x, 1, 20),
        False,
        _softplus_into,
        lambda a, x: _softplus_backward(a, x, 1, 20, grad_input=a),
        _softplus_slope,
        _softplus_curve,
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
