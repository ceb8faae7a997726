"""torch.func, torch.compile and torch.export of a solve: the numbers of plain autograd, or a plain refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from skode.exceptions import FieldError
from skode.solver import METHODS, solve
from tests.problems import Field, Plain, mlp_field, random_states

FIXED = [name for name, tableau in METHODS.items() if not tableau.adaptive]
# Two steps, of 0.5 and 0.25.
T, STEP = [0.0, 0.5, 0.75], 0.5

# Forward-mode differentiation in torch.func calls torch.jit.script; tracing looks at .grad and into caches.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
]

on_fixed_methods = pytest.mark.parametrize("method", FIXED)
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_fields = pytest.mark.parametrize("wrap", [lambda field: field, Plain], ids=["built in", "module"])

Wrap = Callable[[nn.Module], nn.Module]


def by_hand(field: Field, method: str, y: Tensor) -> Tensor:
    """The states at T, by a loop over the stages that any transform can go through."""
    tableau, outputs = METHODS[method], [y]
    for start, end in pairwise(T):
        stages: list[Tensor] = []
        for c, weights in zip(tableau.c, ((), *tableau.a), strict=True):
            inner = y
            for weight, k in zip(weights, stages, strict=True):
                inner = inner + (end - start) * weight * k
            stages.append(field(torch.full_like(y[:, :1], start + c * (end - start)), inner))
        for weight, k in zip(tableau.b, stages, strict=True):
            y = y + (end - start) * weight * k
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def solved(field: Field, method: str, control: str, y: Tensor) -> Tensor:
    return solve(field, y, T, method=method, step_control=control, step_size=STEP).y


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def pair(wrap: Wrap, method: str, control: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The solve and the loop by hand as functions of the initial states."""
    field = wrap(mlp_field())
    return partial(solved, field, method, control), partial(by_hand, field, method)


# --- torch.func on fixed steps ---


@on_fixed_methods
@with_both_controls
@with_both_fields
def test_the_loop_by_hand_is_the_solve(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    close(solution(random_states(1, 3)), loop(random_states(1, 3)))


@on_fixed_methods
@with_both_controls
@with_both_fields
def test_grad_of_a_solve_is_that_of_autograd(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    y0 = random_states(2, 3)
    close(grad(lambda y: solution(y).square().sum())(y0), grad(lambda y: loop(y).square().sum())(y0))


@pytest.mark.parametrize("method", ["rk4", "midpoint"])
@with_both_controls
@with_both_fields
def test_grad_reaches_the_parameters_of_a_functional_call(method: str, control: str, wrap: Wrap) -> None:
    field, y0 = wrap(mlp_field()), random_states(3, 3)
    weights = {name: value.detach().clone() for name, value in field.named_parameters()}

    def loss(way: Callable[[Field, Tensor], Tensor], weights: dict[str, Tensor]) -> Tensor:
        return way(lambda t, y: functional_call(field, weights, (t, y)), y0).square().sum()

    ways = [lambda f, y: solved(f, method, control, y), lambda f, y: by_hand(f, method, y)]
    found, expected = (grad(partial(loss, way))(weights) for way in ways)
    close(found, expected)


@on_fixed_methods
@with_both_controls
@with_both_fields
def test_jvp_of_a_solve_is_that_of_the_loop(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    y0, v = random_states(4, 3), random_states(5, 3)
    close(jvp(solution, (y0,), (v,)), jvp(loop, (y0,), (v,)))


@pytest.mark.parametrize("method", ["rk4", "euler"])
@with_both_controls
@with_both_fields
def test_vjp_of_a_solve_is_that_of_the_loop(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    y0 = random_states(6, 3)
    (found, pull), (expected, pull_by_hand) = vjp(solution, y0), vjp(loop, y0)
    cotangent = random_states(7, 3 * 3).view(3, 3, 2)
    close((found, pull(cotangent)), (expected, pull_by_hand(cotangent)))


@on_fixed_methods
@with_both_controls
@with_both_fields
def test_vmap_over_batches_of_states_is_a_loop_over_them(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    batches = random_states(8, 4 * 3).view(4, 3, 2)
    close(vmap(solution)(batches), torch.stack([loop(y0) for y0 in batches]))


@pytest.mark.parametrize("method", ["rk4", "heun"])
@with_both_controls
def test_vmap_over_members_of_an_ensemble(method: str, control: str) -> None:
    fields, y0 = [Plain(mlp_field(seed)) for seed in range(3)], random_states(9, 4)
    weights = torch.func.stack_module_state(fields)[0]

    def member(weights: dict[str, Tensor]) -> Tensor:
        return solved(lambda t, y: functional_call(fields[0], weights, (t, y)), method, control, y0)

    close(vmap(member)(weights), torch.stack([by_hand(field, method, y0) for field in fields]))


@pytest.mark.parametrize("method", ["rk4", "midpoint"])
@with_both_controls
@with_both_fields
def test_jacobians_and_hessians_are_those_of_the_loop(method: str, control: str, wrap: Wrap) -> None:
    solution, loop = pair(wrap, method, control)
    y0 = random_states(10, 2)
    expected = jacrev(loop)(y0)
    close(jacrev(solution)(y0), expected)
    close(jacfwd(solution)(y0), expected)
    found, second = (hessian(lambda y, f=f: f(y)[:, -1].square().sum())(y0) for f in (solution, loop))
    close(found, second)


def test_gradients_of_each_row_by_vmap_of_grad() -> None:
    solution, loop = pair(Plain, "rk4", "row")
    y0 = random_states(11, 5)

    def one(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return f(y.unsqueeze(0))[0, -1].square().sum()

    close(vmap(grad(partial(one, solution)))(y0), torch.stack([grad(partial(one, loop))(y) for y in y0]))


# --- torch.func on adaptive steps ---


def adaptive(field: Field, method: str, control: str, y: Tensor) -> Tensor:
    return solve(field, y, T, method=method, step_control=control, rtol=1e-9, atol=1e-9).y


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, y0: grad(lambda y: f(y).square().sum())(y0),
    "jvp": lambda f, y0: jvp(f, (y0,), (torch.ones_like(y0),)),
    "vjp": lambda f, y0: vjp(f, y0)[1](torch.ones(len(y0), 3, 2, dtype=y0.dtype)),
    "vmap": lambda f, y0: vmap(f)(torch.stack([y0, 2 * y0])),
    "jacrev": lambda f, y0: jacrev(f)(y0),
    "jacfwd": lambda f, y0: jacfwd(f)(y0),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("method", ["tsit5", "dopri5"])
@with_both_controls
@with_both_fields
def test_a_transform_of_an_adaptive_solve_is_right_or_says_why_not(
    transform: str, method: str, control: str, wrap: Wrap
) -> None:
    field, y0, apply = wrap(mlp_field()), random_states(12, 2), TRANSFORMS[transform]
    try:
        found = apply(partial(adaptive, field, method, control), y0)
    except (FieldError, NotImplementedError) as error:
        text = str(error)
        assert "torch.func" in text or transform in text
        assert re.search(r"fixed|adaptive|steps|step_size|autograd", text), text
        return
    # Fine fixed steps of a method of order 4, by hand, are exact enough to compare with.
    expected = apply(partial(fine, field), y0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def fine(field: Field, y: Tensor) -> Tensor:
    """The states at T, by the classic Runge-Kutta method with steps of 1/32."""
    outputs, h = [y], 1 / 32
    for n in range(24):
        t = torch.full_like(y[:, :1], n * h)
        k1 = field(t, y)
        k2 = field(t + h / 2, y + h / 2 * k1)
        k3 = field(t + h / 2, y + h / 2 * k2)
        k4 = field(t + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if n in (15, 23):
            outputs.append(y)
    return torch.stack(outputs, dim=1)


# --- torch.compile and torch.export ---


class Model(nn.Module):
    """A block of a user: fixed steps between two layers."""

    def __init__(self, wrap: Wrap, method: str, control: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.utils.skip_init(nn.Linear, 2, 3, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.field, self.method, self.control = wrap(mlp_field()), method, control

    def forward(self, y: Tensor) -> Tensor:
        return self.head(solved(self.field, self.method, self.control, y)[:, -1])


class Layer(nn.Module):
    """A field that does not look at the number of rows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.weight + t)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


with_both_fields_and_controls = pytest.mark.parametrize(
    ("wrap", "control"),
    [(lambda field: field, "batch"), (lambda field: field, "row"), (Plain, "row")],
    ids=["built in-batch", "built in-row", "module-row"],
)


@with_both_fields_and_controls
@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_a_compiled_model_gives_the_same_numbers(wrap: Wrap, control: str, method: str) -> None:
    model = Model(wrap, method, control)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for seed in (13, 14):
            y0 = random_states(seed, 4)
            close(compiled(y0), model.head(by_hand(model.field, method, y0)[:, -1]))


@with_both_fields_and_controls
def test_a_compiled_model_trains_with_the_same_gradients(wrap: Wrap, control: str) -> None:
    model = Model(wrap, "rk4", control)
    compiled, inputs = torch.compile(model, backend="eager"), list(model.parameters())
    for seed in (15, 16):
        y0 = random_states(seed, 4).requires_grad_()
        found = torch.autograd.grad(compiled(y0).square().sum(), [y0, *inputs])
        loss = model.head(by_hand(model.field, "rk4", y0)[:, -1]).square().sum()
        close(found, torch.autograd.grad(loss, [y0, *inputs]))


@with_both_controls
def test_compiling_around_an_adaptive_solve_changes_no_number(control: str) -> None:
    field = mlp_field()

    def run(y: Tensor) -> Tensor:
        return 2 * solve(field, y, T, step_control=control).y

    compiled = torch.compile(run, backend="eager")
    for seed in (17, 18):
        y0 = random_states(seed, 4).requires_grad_()
        found, expected = compiled(y0), run(y0)
        close(found, expected)
        inputs = [y0, *field.parameters()]
        close(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


@with_both_fields_and_controls
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_gives_the_same_numbers(wrap: Wrap, control: str, strict: bool) -> None:
    model = Model(wrap, "rk4", control)
    with torch.no_grad():
        program = torch.export.export(model, (random_states(19, 4),), strict=strict)
        for seed in (20, 21):
            y0 = random_states(seed, 4)
            close(program.module()(y0), model.head(by_hand(model.field, "rk4", y0)[:, -1]))


@with_both_controls
def test_an_exported_model_takes_batches_of_any_size(control: str) -> None:
    model, rows = Model(Plain, "rk4", control), torch.export.Dim("rows", min=2, max=100)
    model.field = Layer(model.head.weight.detach()[:2])
    with torch.no_grad():
        program = torch.export.export(model, (random_states(22, 4),), dynamic_shapes=({0: rows},))
        for n in (2, 3, 17, 40):
            y0 = random_states(23, n)
            close(program.module()(y0), model.head(by_hand(model.field, "rk4", y0)[:, -1]))
