"""A torchdiffeq script gives the same values and gradients after changing the import."""

from __future__ import annotations

import doctest
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import skode.solver
import skode.solver.compat
from skode.solver import odeint, odeint_adjoint
from tests.solver.compat_cases import F64, Net, halves, random, seasonal, seasonal_solution, times

ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]


def gradients_of(api: ModuleType, call: Any, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a fixed functional of ``call(api)``."""
    y = call(api)
    parts = y if isinstance(y, tuple) else (y,)
    loss = sum(
        (part.abs().square() * torch.arange(1.0, len(part) + 1).view(-1, *[1] * (part.dim() - 1))).sum()
        for part in parts
    )
    return list(torch.autograd.grad(loss, leaves))


def assert_same_gradients(call: Any, *leaves: Tensor, rtol: float = 1e-6) -> None:
    ours, theirs = (gradients_of(api, call, *leaves) for api in (skode.solver, torchdiffeq))
    for own, other in zip(ours, theirs, strict=True):
        assert float(other.abs().max()) > 1e-3
        torch.testing.assert_close(own, other, rtol=rtol, atol=rtol * float(other.abs().max()))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("t", [times(0, 0.5, 2), times(1, -1, -1.5)], ids=["ascending", "descending"])
def test_states_of_any_shape_and_dtype_are_solved(shape, dtype, t):
    y0 = random(*shape, dtype=dtype)
    y = odeint(seasonal, y0, t)
    assert y.shape == (len(t), *shape) and y.dtype == dtype
    torch.testing.assert_close(y, seasonal_solution(y0, t).to(dtype), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("t_dtype", [torch.float32, F64])
def test_a_tuple_is_one_system(t_dtype):
    y0 = (random(2, 3), random(4, seed=1), random(seed=2))
    t = times(0, 1, 2.5).to(t_dtype)

    def field(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b, c = y
        return -a * c.cos(), torch.cos(b * t), a.sum() + b.mean() - c

    ours, theirs = (api.odeint(field, y0, t) for api in (skode.solver, torchdiffeq))
    assert isinstance(ours, tuple) and [part.shape for part in ours] == [part.shape for part in theirs]
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_tuple_of_one_stays_a_tuple():
    (y,) = odeint(lambda t, y: (-y[0],), (random(2),), times(0, 1))
    torch.testing.assert_close(y[1], random(2) * math.exp(-1), rtol=1e-6, atol=0)


def test_parts_of_different_dtype_take_their_common_one():
    y0 = (random(2, dtype=torch.float32), random(2, dtype=torch.complex128))
    ours, theirs = (api.odeint(lambda t, y: (-y[0], 1j * y[1]), y0, times(0, 1)) for api in (skode.solver, torchdiffeq))
    assert [part.dtype for part in ours] == [part.dtype for part in theirs] == [torch.complex128] * 2
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods_are_as_exact_as_torchdiffeq(method):
    y0, t = random(3), times(0, 0.7, 3)
    exact = seasonal_solution(y0, t)
    errors = [
        float((api.odeint(seasonal, y0, t, method=method, rtol=1e-5, atol=1e-7) - exact).abs().max())
        for api in (skode.solver, torchdiffeq)
    ]
    assert errors[0] <= max(3 * errors[1], 1e-9)


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_size": 0.13},
        {"step_size": 0.125},
        {"step_size": 0.13, "interp": "cubic"},
        {"step_size": 100.0},
        {"grid_constructor": halves},
        {"grid_constructor": halves, "interp": "cubic"},
    ],
    ids=["times", "step_size", "fitting_step_size", "cubic", "one_step", "grid", "cubic_grid"],
)
@pytest.mark.parametrize("t", [times(0, 0.5, 0.9, 1), times(2, 1.9, -1)], ids=["ascending", "descending"])
def test_fixed_steps_are_those_of_torchdiffeq(method, options, t):
    ours, theirs = (
        api.odeint(seasonal, random(2, 3), t, method=method, options=options) for api in (skode.solver, torchdiffeq)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_fixed_steps_go_from_one_output_time_to_the_next():
    y = odeint(lambda t, y: y, torch.ones(1, dtype=F64), times(0, 1, 1.5, 3.5), method="euler")
    assert y.view(-1).tolist() == [1, 2, 3, 9]


def test_float32_times_are_not_split_by_their_rounding():
    """A step whose length is rounded up or down must still be one step."""
    y0, t = torch.ones(1), torch.linspace(0, 1, 38)
    n_calls = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        n_calls.append(t)
        return -y

    odeint(field, y0, t, method="midpoint")
    assert len(n_calls) - 2 * 37 in (0, 1)  # one more where the last state is closed by its slope


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.5}])
def test_one_time_gives_the_initial_state(method, options):
    options = options if method == "rk4" else {}
    y = odeint(seasonal, random(2), times(3), method=method, options=options)
    assert torch.equal(y, random(2).unsqueeze(0))


def test_equal_times_give_equal_states():
    for method in ("dopri5", "euler"):
        y = odeint(seasonal, random(2), times(0, 1, 1, 2), method=method)
        assert torch.equal(y[1], y[2])


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_field_sees_what_torchdiffeq_shows_it(dtype, method):
    seen: list[set[Any]] = []
    for api in (skode.solver, torchdiffeq):
        calls = set()

        def field(t: Tensor, y: Tensor, calls: set[Any] = calls) -> Tensor:
            calls.add((t.shape, t.dtype, t.device, y.shape, y.dtype))
            return -y

        api.odeint(field, random(2, 3, dtype=dtype), times(0, 1), method=method, rtol=1e-2, atol=1e-2)
        seen.append(calls)
    assert seen[0] == seen[1] and len(seen[0]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_fields_are_solved_in_float32(dtype):
    net = Net().to(dtype)
    y0 = random(3, 2, dtype=dtype).requires_grad_()
    y = odeint(net, y0, torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2)
    assert y.dtype == dtype
    exact = odeint(Net(), y0.detach().double(), times(0, 1))
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)
    y[-1].sum().backward()
    assert y0.grad is not None and y0.grad.dtype == dtype and net.first.weight.grad.isfinite().all()


def test_small_steps_are_not_lost_in_half_precision():
    y = odeint(lambda t, y: -y, torch.ones(1, dtype=torch.bfloat16), times(0, 1), rtol=1e-2, atol=1e-2)
    theirs = torchdiffeq.odeint(lambda t, y: -y, torch.ones(1, dtype=torch.bfloat16), times(0, 1))
    assert abs(float(y[-1]) - math.exp(-1)) < 0.01
    assert float(theirs[-1]) > 0.9  # no step was large enough to be added


@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (3,)])
def test_derivatives_are_broadcast_as_torchdiffeq_does(shape):
    y0 = random(1, 3)
    slope = random(*shape)
    torch.testing.assert_close(odeint(lambda t, y: slope, y0, times(0, 2))[-1], y0 + 2 * slope)


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("t", [times(0, 0.5, 2), times(1, -0.5)], ids=["ascending", "descending"])
def test_gradients_of_modules_states_and_times_are_those_of_torchdiffeq(name, t):
    net, y0, t = Net(), random(3, 2).requires_grad_(), t.requires_grad_()
    assert_same_gradients(lambda api: getattr(api, name)(net, y0, t, rtol=1e-10, atol=1e-10), y0, t, *net.parameters())


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_have_the_gradients_of_torchdiffeq(method):
    net, y0, t = Net(), random(3, 2).requires_grad_(), times(0, 0.5, 0.7, 2).requires_grad_()
    assert_same_gradients(lambda api: api.odeint(net, y0, t, method=method), y0, t, *net.parameters(), rtol=1e-11)


@pytest.mark.parametrize("options", [{"step_size": 0.3}, {"grid_constructor": halves}])
def test_interpolated_outputs_have_the_gradients_of_torchdiffeq(options):
    net, y0, t = Net(), random(3, 2).requires_grad_(), times(0, 0.5, 0.7, 2)
    assert_same_gradients(
        lambda api: api.odeint(net, y0, t, method="midpoint", options=options), y0, *net.parameters(), rtol=1e-11
    )


@pytest.mark.parametrize(
    "options",
    [{"step_size": 0.3}, {"step_size": 0.3, "interp": "cubic"}, {"grid_constructor": halves}],
    ids=["step_size", "cubic", "grid"],
)
def test_times_between_steps_have_the_gradients_of_torchdiffeq(options):
    inner = times(0.5, 0.7, 1.9).requires_grad_()
    assert_same_gradients(
        lambda api: api.odeint(
            Net(), random(3, 2), torch.cat([times(0), inner, times(2)]), method="rk4", options=options
        ),
        inner,
        rtol=1e-10,
    )


def test_gradients_of_tuples_are_those_of_torchdiffeq():
    net = Net()
    y0 = (random(3, 2).requires_grad_(), random(3, seed=1).requires_grad_())

    def field(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return net(t, y[0]), y[0].square().sum(dim=1) - y[1]

    assert_same_gradients(
        lambda api: api.odeint(field, y0, times(0, 1, 2), rtol=1e-10, atol=1e-10), *y0, *net.parameters()
    )


def test_gradients_of_complex_states_are_those_of_torchdiffeq():
    y0 = random(3, dtype=torch.complex128).requires_grad_()
    rate = torch.tensor(-0.3 + 1j, dtype=torch.complex128, requires_grad=True)

    class Spiral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(rate.detach())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.rate * y * t

    spiral = Spiral()
    assert_same_gradients(lambda api: api.odeint(spiral, y0, times(0, 1, 2), rtol=1e-10, atol=1e-10), y0, spiral.rate)


def test_modules_and_tensors_in_closures_get_gradients():
    net, y0 = Net(), random(3, 2)
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    assert_same_gradients(
        lambda api: api.odeint(lambda t, y: scale * net(t, y), y0, times(0, 1), rtol=1e-10, atol=1e-10),
        scale,
        *net.parameters(),
    )


def test_bound_methods_reach_their_module():
    net, y0 = Net(), random(3, 2)
    assert_same_gradients(
        lambda api: api.odeint(net.forward, y0, times(0, 1), rtol=1e-10, atol=1e-10), *net.parameters()
    )


@pytest.mark.parametrize("generator", [False, True])
def test_adjoint_params_alone_get_gradients(generator):
    net, y0 = Net(), random(3, 2)
    frozen = torch.zeros(2, dtype=F64)

    def call(api: ModuleType) -> Tensor:
        chosen = (net.first.weight, net.last.bias, frozen)
        params = (p for p in chosen) if generator else chosen
        return api.odeint_adjoint(
            lambda t, y: net(t, y), y0, times(0, 1), rtol=1e-10, atol=1e-10, adjoint_params=params
        )

    assert_same_gradients(call, net.first.weight, net.last.bias)
    odeint_adjoint(net, y0, times(0, 1), adjoint_params=(net.last.bias,)).sum().backward()
    assert net.last.bias.grad is not None and net.first.weight.grad is None


def test_adjoint_params_may_be_empty():
    y0 = random(2).requires_grad_()
    odeint_adjoint(seasonal, y0, times(0, 1), adjoint_params=())[-1].sum().backward()
    torch.testing.assert_close(y0.grad, torch.full((2,), math.exp(-math.sin(1)), dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"adjoint_rtol": 1e-9, "adjoint_atol": 1e-9},
        {"adjoint_method": "bosh3"},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {}},
    ],
)
def test_adjoint_arguments_are_those_of_torchdiffeq(options):
    net, y0 = Net(), random(3, 2).requires_grad_()
    assert_same_gradients(
        lambda api: api.odeint_adjoint(net, y0, times(0, 1), rtol=1e-7, atol=1e-7, **options),
        y0,
        *net.parameters(),
        rtol=1e-4,
    )


@pytest.mark.parametrize("loose", ["rtol", "adjoint_rtol"])
def test_adjoint_tolerances_rule_the_solve_going_back(loose):
    n_calls = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        n_calls.append(t)
        return seasonal(t, y)

    tolerances = {"rtol": 1e-9, "adjoint_rtol": 1e-9, loose: 1e-3}
    y = odeint_adjoint(field, random(2).requires_grad_(), times(0, 3), atol=1e-12, adjoint_params=(), **tolerances)
    forward = len(n_calls)
    y[-1].sum().backward()
    back = len(n_calls) - forward
    assert back > 2 * forward if loose == "rtol" else 2 * back < forward


@pytest.mark.parametrize("method", ["rk4", "midpoint"])
@pytest.mark.parametrize("options", [{}, {"step_size": 0.05}])
def test_adjoint_goes_back_in_the_same_fixed_steps(method, options):
    net, y0 = Net(), random(3, 2).requires_grad_()
    assert_same_gradients(
        lambda api: api.odeint_adjoint(net, y0, times(0, 0.1, 0.2), method=method, options=options),
        y0,
        *net.parameters(),
        rtol=1e-4,
    )


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_the_gradient_may_be_chosen(gradient):
    y0 = random(2).requires_grad_()
    y = odeint(seasonal, y0, times(0, 1), gradient=gradient)
    (slope,) = torch.autograd.grad(y[-1].sum(), y0)
    torch.testing.assert_close(slope, torch.full((2,), math.exp(-math.sin(1)), dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_second_derivatives_are_those_of_torchdiffeq(method):
    net, y0 = Net(), random(3, 2).requires_grad_()
    curvature = []
    for api in (skode.solver, torchdiffeq):
        y = api.odeint(net, y0, times(0, 0.5, 1), method=method, rtol=1e-10, atol=1e-10)
        (slope,) = torch.autograd.grad(y[-1].square().sum(), y0, create_graph=True)
        curvature.append(torch.autograd.grad(slope.square().sum(), (y0, *net.parameters()), allow_unused=True))
    for own, other in zip(*curvature, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


def test_nothing_is_recorded_without_gradients():
    with torch.no_grad():
        assert not odeint(Net(), random(2), times(0, 1)).requires_grad
    assert not odeint(seasonal, random(2), times(0, 1)).requires_grad


def test_the_examples_of_the_docstrings_run():
    assert doctest.testmod(skode.solver.compat).failed == 0
