"""Whole scripts of the kinds that people write with torchdiffeq: the same training with either import."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import skode.solver
from tests.solver.compat_cases import F64, Net, random

NAMES = ["odeint", "odeint_adjoint"]


def train(model: nn.Module, loss_of: object, n_steps: int = 4, lr: float = 0.02) -> list[float]:
    """Losses of a few steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_training(script: object, rel: float) -> None:
    ours, theirs = (script(api) for api in (skode.solver, torchdiffeq))  # type: ignore[operator]
    assert ours == pytest.approx(theirs, rel=rel)
    assert theirs[0] != pytest.approx(theirs[-1], rel=10 * rel)


@pytest.mark.parametrize("name", NAMES)
def test_a_spiral_is_learned_from_windows_of_its_path(name):
    """States of shape (batch, 1, 2) at ten times, float32, default tolerances."""
    rotation = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])

    def script(api: ModuleType) -> list[float]:
        t = torch.linspace(0.0, 5.0, 200)
        with torch.no_grad():
            path = api.odeint(lambda t, y: y**3 @ rotation, torch.tensor([[2.0, 0.0]]), t, method="dopri5")
        starts = torch.randint(190, (4, 20), generator=torch.Generator().manual_seed(0))

        def loss_of(model: nn.Module, step: int) -> Tensor:
            s = starts[step]
            y = getattr(api, name)(model, path[s], t[:10])
            return (y - torch.stack([path[s + i] for i in range(10)])).abs().mean()

        return train(Net(dtype=torch.float32).float(), loss_of)

    assert_same_training(script, rel=1e-3)


class Flow(nn.Module):
    """A continuous normalizing flow: its field takes derivatives of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = states[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            slope = self.net(t, z)
            trace = sum(torch.autograd.grad(slope[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return slope, -trace.view(-1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_continuous_normalizing_flow_is_trained_back_in_time(name):
    x = random(30, 2)

    def script(api: ModuleType) -> list[float]:
        def loss_of(model: nn.Module, step: int) -> Tensor:
            state = (x, torch.zeros(30, 1, dtype=F64))
            t = torch.tensor([1.0, 0.0])
            z, logp = getattr(api, name)(model, state, t, atol=1e-6, rtol=1e-6, method="dopri5")
            density = -0.5 * z[-1].square().sum(1) - math.log(2 * math.pi) - logp[-1].view(-1)
            return -density.mean()

        return train(Flow(), loss_of)

    assert_same_training(script, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_latent_path_is_trained_with_fixed_steps_between_output_times(name):
    t = torch.linspace(0.0, 2.0, 30)
    data = random(5, 30, dtype=torch.float32)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field, self.start = Net(3).float(), nn.Parameter(random(5, 3, dtype=torch.float32))

    def script(api: ModuleType) -> list[float]:
        def loss_of(model: nn.Module, step: int) -> Tensor:
            path = getattr(api, name)(model.field, model.start, t, method="rk4")
            return (path[..., 0].T - data).square().mean()

        return train(Model(), loss_of)

    assert_same_training(script, rel=1e-4)


class ConvField(nn.Module):
    """Images with a channel for the time; counts its calls, as many scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.nfe = 0
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(0.2 * random(*parameter.shape, dtype=torch.float32, seed=i))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        return torch.relu(self.conv(torch.cat([torch.ones_like(x[:, :1]) * t, x], dim=1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_images_is_trained_as_a_layer(name):
    images = random(4, 3, 6, 6, dtype=torch.float32)

    def script(api: ModuleType) -> list[float]:
        t = torch.tensor([0, 1]).float()

        def loss_of(model: nn.Module, step: int) -> Tensor:
            model.nfe = 0
            out = getattr(api, name)(model, images, t.type_as(images), rtol=1e-3, atol=1e-3)[1]
            assert model.nfe > 6
            return (out.mean(dim=(1, 2, 3)) - torch.arange(4.0)).square().mean()

        return train(ConvField(), loss_of)

    assert_same_training(script, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_real_constants_of_a_complex_path_are_fitted(name):
    """With either gradient as with torchdiffeq's odeint: its adjoint cannot do this."""
    t = torch.linspace(0, 2, 9, dtype=F64)
    target = torch.exp((-0.2 + 2j) * t)

    class Oscillator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.damping = nn.Parameter(torch.tensor(0.1, dtype=F64))
            self.frequency = nn.Parameter(torch.tensor(1.5, dtype=F64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return (-self.damping + 1j * self.frequency) * y

    def script(api: ModuleType) -> list[float]:
        y0 = torch.ones((), dtype=torch.complex128)
        solver = getattr(api, "odeint" if api is torchdiffeq else name)

        def loss_of(model: nn.Module, step: int) -> Tensor:
            return (solver(model, y0, t, rtol=1e-8, atol=1e-8) - target).abs().square().mean()

        return train(Oscillator(), loss_of, lr=0.1)

    assert_same_training(script, rel=1e-5)
