"""Derivatives that a field brings itself: used where it has them, found by autograd where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields import ConvField, MLPField
from skode.solver import solve
from skode.solver.dynamics import AutogradDynamics, as_dynamics
from tests.problems import Plain, mlp_field, random_states

with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Linear(nn.Module):
    """y' = y W + t b, which tells of its derivatives as much as it is asked to: 1, 2 or 3 of them."""

    def __init__(self, n_told: int) -> None:
        super().__init__()
        self.n_told, self.n_values, self.n_vjps = n_told, 0, 0
        self.W, self.b = nn.Parameter(random_states(1, 2)), nn.Parameter(random_states(2, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.n_values += 1
        return y @ self.W + t * self.b

    def vjp(self, t: Tensor, y: Tensor, a: Tensor) -> Any:
        self.n_vjps += 1
        assert not torch.is_grad_enabled()
        told = a @ self.W.T, (a * self.b).sum(dim=1, keepdim=True), (y.T @ a, (t * a).sum(dim=0, keepdim=True))
        return told[0] if self.n_told == 1 else told[: self.n_told]


def loss_of(field: Any, y0: Tensor, t: Tensor, **options: Any) -> Tensor:
    return solve(field, y0, t, **TIGHT, **options).y.square().sum()


@with_both_gradients
@with_both_controls
@pytest.mark.parametrize("n_told", [1, 2, 3])
def test_gradients_by_a_fields_own_vjp_are_autograds(n_told: int, gradient: str, control: str) -> None:
    field = Linear(n_told)
    y0, t = random_states(3, 5).requires_grad_(), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64).requires_grad_()
    inputs = [y0, t, *field.parameters()]
    options = {"gradient": gradient, "step_control": control}
    found = torch.autograd.grad(loss_of(field, y0, t, **options), inputs)
    assert field.n_vjps > 0
    expected = torch.autograd.grad(loss_of(Plain(field), y0, t, **options), inputs)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_a_vjp_that_tells_all_takes_the_place_of_autograd() -> None:
    field, y0 = Linear(3), random_states(3, 5)
    solution = solve(field, y0, [0.0, 1.0], step_control="batch")
    n_values = field.n_values
    assert n_values == int(solution.n_evals[0]) and field.n_vjps == 0
    solution.y1.sum().backward()
    # Every stage of an accepted step once, and the field not once more.
    assert field.n_vjps == 6 * int(solution.n_steps[0]) and field.n_values == n_values


def test_what_a_vjp_does_not_tell_costs_one_more_evaluation_of_each_stage() -> None:
    field, y0 = Linear(1), random_states(3, 5)
    solution = solve(field, y0, [0.0, 1.0], step_control="batch")
    n_values = field.n_values
    solution.y1.sum().backward()
    assert field.n_values - n_values == field.n_vjps == 6 * int(solution.n_steps[0])


@with_both_gradients
def test_a_vjp_is_handed_the_args_and_goes_with_frozen_parameters(gradient: str) -> None:
    class Scaled(Linear):
        def forward(self, t: Tensor, y: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(t, y) * scale

        def vjp(self, t: Tensor, y: Tensor, a: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
            return super().vjp(t, y, a * scale)

    field, scale = Scaled(3), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    field.W.requires_grad_(False)
    y0 = random_states(3, 4)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = torch.autograd.grad(loss_of(field, y0, t, gradient=gradient, args=(scale,)), [field.b, scale])

    def hidden(t: Tensor, y: Tensor) -> Tensor:
        return field(t, y, scale)

    expected = torch.autograd.grad(loss_of(hidden, y0, t, gradient=gradient), [field.b, scale])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_none_in_a_vjps_gradients_is_zero() -> None:
    class Half(Linear):
        def vjp(self, t: Tensor, y: Tensor, a: Tensor) -> Any:
            dy, dt, (gradient, _) = super().vjp(t, y, a)
            return dy, dt, (gradient, None)

    field = Half(3)
    solve(field, random_states(3, 4), [0.0, 1.0]).y1.sum().backward()
    assert field.W.grad is not None and field.b.grad is not None
    assert bool(field.W.grad.any()) and not bool(field.b.grad.any())


WRONG: dict[str, tuple[Any, str]] = {
    "state": (lambda dy, dt, p: dy[:, :1], r"return dy of shape \(4, 2\); got \(4, 1\)"),
    "time": (lambda dy, dt, p: (dy, dt[:, 0]), r"return dt of shape \(4, 1\); got \(4,\)"),
    "text": (lambda dy, dt, p: (dy, "no"), "return dt .*; got str"),
    "too many gradients": (lambda dy, dt, p: (dy, dt, (*p, dt)), "returned 3 gradients for 2 parameters"),
    "other gradients": (lambda dy, dt, p: (dy, dt, p[::-1]), r"return gradient 0 of shape \(2, 2\); got \(1, 2\)"),
    "nothing": (lambda dy, dt, p: None, r"must return dy, \(dy, dt\) or"),
    "four": (lambda dy, dt, p: (dy, dt, p, p), r"must return dy, \(dy, dt\) or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_vjp_of_another_shape_is_refused(case: str) -> None:
    change, message = WRONG[case]

    class Wrong(Linear):
        def vjp(self, t: Tensor, y: Tensor, a: Tensor) -> Any:
            return change(*super().vjp(t, y, a))

    y = solve(Wrong(3), random_states(3, 4), [0.0, 1.0]).y1
    with pytest.raises(FieldError, match=r"Wrong\.vjp .*" + message):
        y.sum().backward()


# --- fields of the package ---


@pytest.mark.parametrize(
    "field",
    [
        mlp_field(1, 24),
        mlp_field(1, 24, time_dependent=False, n_outputs=5),
        mlp_field(1, 24, n_members=2),
        ConvField((2, 4, 3), (3,), generator=torch.Generator().manual_seed(1)).double(),
    ],
    ids=["mlp", "mlp of other outputs", "members", "convolutions"],
)
def test_built_in_fields_tell_their_derivatives(field: MLPField | ConvField) -> None:
    t, y = random_states(2, 6, 1).requires_grad_(), random_states(3, 6, 24).requires_grad_()
    f = field(t, y)
    a = random_states(4, *f.shape)
    dy, dt, gradients = field.vjp(t.detach(), y.detach(), a)
    inputs = [y, t, *field.parameters()]
    expected = torch.autograd.grad(f, inputs, a, materialize_grads=True, allow_unused=True)
    for own, other in zip((dy, dt, *gradients), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)
        assert not own.requires_grad


def test_frozen_parameters_of_a_built_in_field_have_a_gradient_of_zero() -> None:
    field = ConvField((2, 4, 3), (3,)).double()
    first, *_ = field.parameters()
    first.requires_grad_(False)
    y = random_states(3, 6, 24)
    _, _, gradients = field.vjp(y[:, :1], y, y)
    assert len(gradients) == 4 and not bool(gradients[0].any()) and bool(gradients[1].any())


def test_a_built_in_field_is_not_solved_by_its_public_face() -> None:
    assert type(as_dynamics(ConvField((1, 2, 2)))) is AutogradDynamics


def test_a_network_that_was_changed_is_differentiated_as_it_is_now() -> None:
    class Doubled(MLPField):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(t, y)

    hooked = mlp_field(1)
    hooked.register_forward_hook(lambda module, inputs, f: 2 * f)
    doubled = Doubled(2, (4,)).double()
    doubled.load_state_dict(hooked.state_dict())
    plain, y0 = mlp_field(1), random_states(3, 4)
    found = []
    for field in (hooked, doubled, lambda t, y: 2 * plain(t, y)):
        weight = next((plain if field is not hooked and field is not doubled else field).parameters())  # type: ignore[union-attr]
        y1 = solve(field, y0, [0.0, 1.0], **TIGHT).y1
        found.append((y1.detach(), *torch.autograd.grad(y1.square().sum(), weight)))
    for own in found[:2]:
        for x, other in zip(own, found[2], strict=True):
            torch.testing.assert_close(x, other, rtol=1e-9, atol=1e-10)
