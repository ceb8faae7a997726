"""Gradients on their way to the optimizer."""

from __future__ import annotations

import torch
from torch import nn

from skode.training.gradients import set_gradients


def test_a_gradient_comes_in_the_layout_of_its_parameter() -> None:
    straight, turned = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4, 3).mT)
    values = torch.arange(15.0).view(3, 5)[:, :4]
    set_gradients([straight, turned], [values, values])
    for parameter in (straight, turned):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, values)


def test_a_missing_gradient_stays_missing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    set_gradients([parameter], [None])
    assert parameter.grad is None
