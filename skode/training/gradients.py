"""Gradients on their way to torch's fused optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def set_gradients(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """Give each parameter, which must fill its memory, its gradient in the parameter's own layout.

    torch's fused optimizers read both in the order of memory: the gradient of a weight that a field uses transposed, or
    as a part of a larger matrix, would move other weights than its own.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient
