"""Activations with their derivatives, by the names that scikit-learn's MLPClassifier uses, and smooth ones more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ops = torch.ops.aten


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
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    saves_output: bool


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, lambda a, _: a, True),
    "tanh": Activation(torch.tanh, _ops.tanh_backward, True),
    "logistic": Activation(torch.sigmoid, _ops.sigmoid_backward, True),
    "relu": Activation(torch.relu, lambda a, y: _ops.threshold_backward(a, y, 0), True),
    "silu": Activation(torch.nn.functional.silu, _ops.silu_backward, False),
    "softplus": Activation(torch.nn.functional.softplus, lambda a, x: _ops.softplus_backward(a, x, 1, 20), False),
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
