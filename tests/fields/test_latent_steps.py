"""The node of equal steps against plain torch: values, gradients, shapes of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skode.fields import ACTIVATIONS, LatentField
from skode.fields.latent_steps import equal_steps, shares
from skode.solver.tableaus import get_tableau
from skode.solver.unrolled import Weights

RK4 = Weights.of(get_tableau("rk4"))


def field(hidden: tuple[int, ...], activation: str = "tanh", n_inputs: int = 0) -> LatentField:
    generator = torch.Generator().manual_seed(0)
    made = LatentField(3, hidden, activation, n_inputs=n_inputs, generator=generator).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


def known(u: Tensor) -> Tensor:
    return torch.cat([u.cos(), u.square()], dim=1).double()


def at_slots(n: int) -> Tensor:
    return torch.stack([known(torch.full((n, 1), u, dtype=torch.float64)) for u in shares(2, RK4)])


def plain(own: LatentField, z: Tensor, h: Tensor, n_steps: int, with_inputs: bool) -> tuple[Tensor, Tensor]:
    """Classical Runge-Kutta steps, stage by stage."""

    def f(u: float, y: Tensor) -> Tensor:
        inputs = known if with_inputs else None
        return own.dynamics(inputs=inputs)(y.new_full((len(y), 1), u), y)

    stages, changes, y = [], [], z
    for step in range(n_steps):
        u, half, end = step / n_steps, (step + 0.5) / n_steps, (step + 1) / n_steps
        k1 = f(u, y)
        k2 = f(half, y + h / 2 * k1)
        k3 = f(half, y + h / 2 * k2)
        stages += [y, y + h / 2 * k1, y + h / 2 * k2, y + h * k3]
        changes.append(h * k1)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(end, y + h * k3))
    return torch.stack([*stages, y]), torch.stack([*changes, h * f(1.0, y)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("n", [1, 8, 11])
def test_steps_are_those_of_plain_torch(activation: str, hidden: tuple[int, ...], with_inputs: bool, n: int) -> None:
    own = field(hidden, activation, 2 * with_inputs)
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_()
    h = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    weights = torch.randn(9, n, 3, generator=generator, dtype=torch.float64)
    found = equal_steps(own, z, h, 2, RK4, at_slots(n) if with_inputs else None, stages=True)
    wanted = plain(own, z, h, 2, with_inputs)
    gradients = []
    for stages, changes in (found, wanted):
        total = (weights * stages).sum() + (weights[:3] * changes).square().sum()
        gradients.append(torch.autograd.grad(total, [z, *own.parameters()]))
    for one, other in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    with torch.no_grad():  # where inner values are overwritten
        states, changes = equal_steps(own, z, h, 2, RK4, at_slots(n) if with_inputs else None)
    torch.testing.assert_close(states, wanted[0][::4].detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(changes, wanted[1].detach(), rtol=1e-12, atol=1e-13)


def test_two_passes_at_once_do_not_share_memory() -> None:
    own = field((7,))
    h = torch.full((4, 1), 0.3, dtype=torch.float64)
    one, other = (torch.full((4, 3), value, dtype=torch.float64, requires_grad=True) for value in (0.5, -1.0))
    together = [equal_steps(own, z, h, 3, RK4)[0].square().sum() for z in (one, other)]
    for total, z in zip(together, (one, other), strict=True):
        (found,) = torch.autograd.grad(total, z, retain_graph=True)
        (wanted,) = torch.autograd.grad(equal_steps(own, z, h, 3, RK4)[0].square().sum(), z)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n_inputs", [0, 2])
def test_inputs_that_are_missing_or_not_taken_are_refused(n_inputs: int) -> None:
    z = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"n_inputs={n_inputs} needs inputs exactly if it takes any"):
        equal_steps(field((4,), n_inputs=n_inputs), z, z[:, :1], 2, RK4, None if n_inputs else at_slots(2))


def test_shares_of_the_way_are_the_stages_times() -> None:
    assert shares(2, RK4) == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
