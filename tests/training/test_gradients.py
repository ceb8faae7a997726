"""Gradients on their way to the optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

from skode import ContinuousFlowDensity, ODENetClassifier
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


class Turned(nn.Module):
    """A weight that is used transposed, or kept as it is used."""

    transposed = True

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        start = torch.linspace(-0.5, 0.7, 3 * n_dims).view(3, n_dims)
        self.a = nn.Parameter(start.clone() if self.transposed else start.mT.contiguous())
        self.b = nn.Parameter(torch.linspace(0.3, -0.4, 3 * n_dims).view(3, n_dims))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ (self.a.mT if self.transposed else self.a)) @ self.b


class Straight(Turned):
    transposed = False


@pytest.mark.parametrize("estimator", [ContinuousFlowDensity, ODENetClassifier])
def test_a_field_learns_the_same_whichever_way_its_weight_is_kept(estimator: type) -> None:
    X, y = make_moons(120, noise=0.1, random_state=0)
    more = {"base": "normal"} if estimator is ContinuousFlowDensity else {}
    one, other = (estimator(field=field, max_iter=8, random_state=0, **more).fit(X, y) for field in (Turned, Straight))
    ask = "score_samples" if estimator is ContinuousFlowDensity else "predict_proba"
    np.testing.assert_allclose(getattr(one, ask)(X), getattr(other, ask)(X), rtol=1e-6, atol=1e-8)
