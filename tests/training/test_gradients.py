"""Gradients on their way to the optimizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from skode.training.gradients import set_gradients
from skode.training.loop import _laid_out


def test_a_gradient_comes_in_the_layout_of_its_parameter() -> None:
    straight, turned = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4, 3).mT)
    values = torch.arange(15.0).view(3, 5)[:, :4]
    set_gradients([straight, turned], [values, values])
    for parameter in (straight, turned):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, values)


def test_moments_are_taken_up_in_the_layout_of_the_parameter() -> None:
    turned = nn.Parameter(torch.zeros(4, 3).mT)
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    found = _laid_out(values, turned)
    assert found.stride() == turned.stride() and not found.requires_grad
    np.testing.assert_array_equal(found.numpy(), values)


def test_a_missing_gradient_stays_missing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    set_gradients([parameter], [None])
    assert parameter.grad is None
