"""Tensors that a field reads: handed on in ``args``, found by themselves, or named where they cannot be found."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.solver import Solution, solve
from tests.problems import Field, column, times

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])


# --- arguments of the field ---


@with_both_gradients
@with_both_controls
def test_args_reach_the_field_and_get_gradients(gradient: str, control: str) -> None:
    y0, rate, name = column(1.0, 2.0).requires_grad_(), column(0.5, 2.0).requires_grad_(), times(0.3).requires_grad_()
    forcing = name.exp()

    def field(t: Tensor, y: Tensor, rate: Tensor, forcing: Tensor, sign: float, label: str) -> Tensor:
        assert label == "some text"
        return sign * rate * y + forcing

    args = (rate, forcing, -1.0, "some text")
    options = {"gradient": gradient, "step_control": control, "rtol": 1e-9, "atol": 1e-9}
    y1 = solve(field, y0, [0.0, 1.0], args=args, **options).y1
    exact = forcing / rate + (y0 - forcing / rate) * torch.exp(-rate)
    torch.testing.assert_close(y1, exact)
    inputs = [y0, rate, name]
    found = torch.autograd.grad(y1.square().sum(), inputs, retain_graph=True)
    for own, other in zip(found, torch.autograd.grad(exact.square().sum(), inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


# --- parameters that are found by themselves ---

GLOBAL_RATE = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
GLOBAL_BOX = SimpleNamespace(rate=GLOBAL_RATE)


class Rate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(times(0.7))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


class Holder:
    """No module, but it holds a tensor."""

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate

    def velocity(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y

    __call__ = velocity


def with_rate(t: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    return -rate * y


def uses_global(t: Tensor, y: Tensor) -> Tensor:
    return -GLOBAL_RATE * y


def uses_global_box(t: Tensor, y: Tensor) -> Tensor:
    return -GLOBAL_BOX.rate * y


def calls_uses_global(t: Tensor, y: Tensor) -> Tensor:
    return uses_global(t, y)


def hides_global(t: Tensor, y: Tensor) -> Tensor:
    return -vars(sys.modules[__name__])["GLOBAL_" + "RATE"] * y


def shared_rate() -> tuple[Field, Tensor]:
    first = Rate()
    both = nn.ModuleList([first, first])
    return lambda t, y: (both[0](t, y) + both[1](t, y)) / 2, first.rate


def root_of_rate(wrap: Callable[[Tensor], Field]) -> tuple[Field, Tensor]:
    """A field of a tensor that itself was computed from a leaf."""
    root = times(math.sqrt(0.7)).requires_grad_()
    return wrap(root.square()), root


def of_rate(wrap: Callable[[Tensor], Field]) -> tuple[Field, Tensor]:
    rate = times(0.7).requires_grad_()
    return wrap(rate), rate


def of_module(wrap: Callable[[Rate], Field]) -> tuple[Field, Tensor]:
    module = Rate()
    return wrap(module), module.rate


FOUND: dict[str, Callable[[], tuple[Field, Tensor]]] = {
    "module": lambda: of_module(lambda module: module),
    "closure over a tensor": lambda: of_rate(lambda rate: lambda t, y: -rate * y),
    "closure over a module": lambda: of_module(lambda module: lambda t, y: module(t, y)),
    "closure over a list of modules": lambda: of_module(
        lambda module: (lambda nets: lambda t, y: nets[1](t, nets[0](y)))([nn.Identity(), module])
    ),
    "closure over a module twice": shared_rate,
    "closure over a function": lambda: of_rate(
        lambda rate: (lambda inner: lambda t, y: inner(t, y))(lambda t, y: -rate * y)
    ),
    "closure over a computed tensor": lambda: root_of_rate(lambda rate: lambda t, y: -rate * y),
    "global": lambda: (uses_global, GLOBAL_RATE),
    "global of a function that is called": lambda: (calls_uses_global, GLOBAL_RATE),
    "partial": lambda: of_rate(lambda rate: functools.partial(with_rate, rate=rate)),
    "partial of a closure": lambda: of_rate(
        lambda rate: functools.partial(lambda t, y, sign: -sign * rate * y, sign=1.0)
    ),
    "bound method of a module": lambda: of_module(lambda module: module.forward),
    "bound method of an object": lambda: of_rate(lambda rate: Holder(rate).velocity),
}
# Found or refused, but never passed over in silence.
HIDDEN: dict[str, Callable[[], tuple[Field, Tensor]]] = {
    "global by its name as text": lambda: (hides_global, GLOBAL_RATE),
    "attribute of a global": lambda: (uses_global_box, GLOBAL_RATE),
    "object that is called": lambda: of_rate(Holder),
    "default argument": lambda: of_rate(lambda rate: lambda t, y, rate=rate: -rate * y),
    "closure over an object": lambda: of_rate(lambda rate: (lambda box: lambda t, y: -box.rate * y)(Holder(rate))),
    "closure over a dictionary": lambda: of_rate(lambda rate: (lambda box: lambda t, y: -box[1] * y)({1: rate})),
    "generator": lambda: of_rate(lambda rate: (lambda box: lambda t, y: -next(box) * y)(iter(lambda: rate, None))),
}


def assert_gradient_of_rate(solution: Solution, rate: Tensor) -> None:
    """Of y1 = e^(-0.7), to the rate or to its root."""
    (found,) = torch.autograd.grad(solution.y1.sum(), rate)
    inner = 1.0 if float(rate.detach()) == 0.7 else 2 * math.sqrt(0.7)
    torch.testing.assert_close(found, times(-math.exp(-0.7) * inner), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", FOUND)
@with_both_gradients
@pytest.mark.parametrize("start_needs_gradient", [False, True])
def test_parameters_of_any_field_are_found(case: str, gradient: str, start_needs_gradient: bool) -> None:
    field, rate = FOUND[case]()
    y0 = column(1.0).requires_grad_(start_needs_gradient)
    solution = solve(field, y0, [0.0, 1.0], gradient=gradient, rtol=1e-9, atol=1e-9)
    assert_gradient_of_rate(solution, rate)


@pytest.mark.parametrize("case", HIDDEN)
@with_both_gradients
@pytest.mark.parametrize("start_needs_gradient", [False, True])
def test_a_tensor_that_is_not_found_is_never_passed_over(case: str, gradient: str, start_needs_gradient: bool) -> None:
    field, rate = HIDDEN[case]()
    y0 = column(1.0).requires_grad_(start_needs_gradient)
    options = {"gradient": gradient, "rtol": 1e-9, "atol": 1e-9}
    try:
        solution = solve(field, y0, [0.0, 1.0], **options)
        assert_gradient_of_rate(solution, rate)
    except FieldError as error:
        assert "parameters=" in str(error) and re.search(r"\(1,\)|\[1\]", str(error))
    told = solve(field, y0, [0.0, 1.0], parameters=[rate], **options)
    assert_gradient_of_rate(told, rate)
    with torch.no_grad():
        assert solve(field, y0, [0.0, 1.0], **options).success


def test_a_tensor_hidden_from_every_search_is_refused() -> None:
    with pytest.raises(FieldError, match="parameters="):
        solve(hides_global, column(1.0), [0.0, 1.0])


def test_only_the_parameters_that_are_given_get_gradients() -> None:
    first, second = times(0.3).requires_grad_(), times(0.4).requires_grad_()
    solution = solve(lambda t, y: -(first + second.detach()) * y, column(1.0), [0.0, 1.0], parameters=(first,))
    solution.y1.sum().backward()
    assert first.grad is not None and second.grad is None
