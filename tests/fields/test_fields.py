"""Vector fields: values as written down plainly, derivatives as autograd finds them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields import ACTIVATIONS, ConvField, EnergyDynamics, MemberDynamics, MLPField, SecondOrderDynamics
from skode.solver import Dynamics, solve
from skode.solver.dynamics import AutogradDynamics, as_dynamics
from tests.derivatives import KINDS_OF_TIMES, assert_derivatives_are_autograds, times_for
from tests.problems import Plain, column, mlp_field, random_states, rows

TORCH_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "logistic": nn.Sigmoid,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}

on_all_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
timed_or_not = pytest.mark.parametrize("time_dependent", [True, False])
at_all_times = pytest.mark.parametrize("kind", KINDS_OF_TIMES)


def sequential(field: MLPField, activation: str, t: Tensor, y: Tensor) -> Tensor:
    """A plain re-implementation of a field without members."""
    x, layers = y, list(field.parameters())
    for i, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True), start=1):
        linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        linear.load_state_dict({"weight": weight, "bias": bias})
        if field.time_dependent:
            x = torch.cat([x, t.expand(len(x), 1)], dim=1)
        x = linear(x)
        if 2 * i < len(layers):
            x = TORCH_ACTIVATIONS[activation]()(x)
    return x


# --- activations ---


@on_all_activations
def test_activations_have_the_values_of_torchs(activation: str) -> None:
    x = torch.linspace(-30, 30, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[activation].forward(x), TORCH_ACTIVATIONS[activation]()(x))


@on_all_activations
def test_slopes_and_curves_of_activations_are_autograds(activation: str) -> None:
    chosen = ACTIVATIONS[activation]
    x = torch.tensor([-25.0, -3.0, -0.4, 0.3, 1.0, 4.0, 19.0, 25.0], dtype=torch.float64, requires_grad=True)
    value = TORCH_ACTIVATIONS[activation]()(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    saved = chosen.forward(x) if chosen.saves_output else x
    torch.testing.assert_close(chosen.slope(saved), slope, rtol=1e-13, atol=1e-15)
    curve = torch.zeros_like(x)
    if slope.requires_grad:
        (curve,) = torch.autograd.grad(slope.sum(), x, materialize_grads=True, allow_unused=True)
    found = torch.zeros_like(x) if chosen.curve is None else chosen.curve(saved, chosen.slope(saved))
    torch.testing.assert_close(found, curve, rtol=1e-9, atol=1e-12)
    a, b = torch.linspace(-1, 2, 8, dtype=torch.float64), torch.linspace(3, -2, 8, dtype=torch.float64)
    both = chosen.pull_slope(a, b, saved, chosen.slope(saved))
    torch.testing.assert_close(both, a * slope + b * curve, rtol=1e-9, atol=1e-12)


@on_all_activations
def test_derivatives_of_activations_pass_gradcheck(activation: str) -> None:
    chosen = ACTIVATIONS[activation]

    class Applied(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = chosen.forward(x)
            ctx.save_for_backward(y if chosen.saves_output else x)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, a: Tensor) -> Tensor:
            return chosen.backward(a, *ctx.saved_tensors)

    x = torch.tensor([-25.0, -3.0, -0.4, 0.3, 1.0, 4.0, 25.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Applied.apply, (x,))


@on_all_activations
def test_networks_can_be_pickled(activation: str) -> None:
    field, t, y = mlp_field(1, activation=activation), times_for("own", 3), random_states(2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(field))(t, y), field(t, y))


@pytest.mark.parametrize("activation", ["elu", None, ["tanh"]])
def test_an_unknown_activation_is_refused_with_the_names_of_the_known(activation: object) -> None:
    with pytest.raises(ValueError, match=r"is unknown; use one of 'identity', 'tanh'"):
        MLPField(2, activation=activation)  # type: ignore[arg-type]


# --- the multilayer perceptron ---


@timed_or_not
@pytest.mark.parametrize("hidden", [(), (5,), (5, 3), (4, 6, 2)])
def test_parameters_come_layer_by_layer_weight_then_bias(hidden: tuple[int, ...], time_dependent: bool) -> None:
    field = MLPField(3, hidden, time_dependent=time_dependent, generator=torch.Generator().manual_seed(0))
    expected = []
    for n_in, n_out in pairwise((3, *hidden, 3)):
        expected += [(n_out, n_in + time_dependent), (n_out,)]
    assert [tuple(p.shape) for p in field.parameters()] == expected
    assert [name.rpartition(".")[2] for name, _ in field.named_parameters()] == ["weight", "bias"] * (len(hidden) + 1)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.dtype == torch.float32 for p in field.parameters())
    assert [id(p) for p in field.trainable()] == [id(p) for p in field.parameters()]


def test_members_give_parameters_a_leading_axis() -> None:
    field = MLPField(3, (5,), n_members=4, n_outputs=2)
    assert [tuple(p.shape) for p in field.parameters()] == [(4, 5, 4), (4, 5), (4, 2, 6), (4, 2)]


def test_the_defaults_are_those_of_the_contract() -> None:
    field = MLPField(3)
    assert [tuple(p.shape) for p in field.parameters()] == [(64, 4), (64,), (64, 65), (64,), (3, 65), (3,)]
    t, y = torch.full((5, 1), 0.3), torch.ones(5, 3)
    assert torch.equal(field(t, y), MLPField.forward(field, t, y))
    torch.testing.assert_close(field(t, y), sequential(field, "tanh", t, y))


@on_all_activations
@timed_or_not
@at_all_times
@pytest.mark.parametrize("hidden", [(), (5,), (4, 3)])
def test_values_are_those_of_a_plain_network(
    activation: str, time_dependent: bool, kind: str, hidden: tuple[int, ...]
) -> None:
    field = mlp_field(1, 3, hidden, activation, time_dependent)
    t, y = times_for(kind, 6), random_states(2, 6, 3)
    torch.testing.assert_close(field(t, y), sequential(field, activation, t, y), rtol=1e-13, atol=1e-13)


@on_all_activations
@timed_or_not
@at_all_times
@pytest.mark.parametrize("hidden", [(), (4, 3)])
def test_hand_written_derivatives_are_autograds(
    activation: str, time_dependent: bool, kind: str, hidden: tuple[int, ...]
) -> None:
    field = mlp_field(1, 3, hidden, activation, time_dependent)
    assert_derivatives_are_autograds(field, times_for(kind, 6), random_states(2, 6, 3))


@timed_or_not
@at_all_times
def test_derivatives_of_members_and_other_outputs_are_autograds(time_dependent: bool, kind: str) -> None:
    field = mlp_field(1, 3, (4,), time_dependent=time_dependent, n_outputs=2, n_members=2)
    assert_derivatives_are_autograds(field, times_for(kind, 6), random_states(2, 6, 3))


def test_a_single_row_is_a_batch_too() -> None:
    field = mlp_field(1, 3, (4,))
    assert_derivatives_are_autograds(field, times_for("own", 1), random_states(2, 1, 3))


def test_a_batch_may_be_empty() -> None:
    field = mlp_field(1, 3, (4,))
    assert field(torch.zeros(0, 1, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3)


@timed_or_not
@at_all_times
@pytest.mark.parametrize("n_members", [1, 3])
def test_members_are_separate_fields(time_dependent: bool, kind: str, n_members: int) -> None:
    field = mlp_field(3, 2, (4,), time_dependent=time_dependent, n_members=n_members)
    t, y = times_for(kind, 6), random_states(4, 6)
    value, tape = field.linearize(t, y)
    a = random_states(5, 6)
    dy, dt = field.pull(tape, a, time=True)
    gradients = field.accumulate([tape])
    for m in range(n_members):
        alone = MLPField(2, (4,), time_dependent=time_dependent).double()
        with torch.no_grad():
            for own, all_of_them in zip(alone.parameters(), field.parameters(), strict=True):
                own.copy_(all_of_them[m])
        block = slice(m * 6 // n_members, (m + 1) * 6 // n_members)
        own_value, own_tape = alone.linearize(t[block], y[block])
        own_dy, own_dt = alone.pull(own_tape, a[block], time=True)
        assert dt is not None and own_dt is not None
        torch.testing.assert_close(value[block], own_value, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dy[block], own_dy, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(dt[block], own_dt, rtol=1e-13, atol=1e-13)
        for own, all_of_them in zip(alone.accumulate([own_tape]), gradients, strict=True):
            torch.testing.assert_close(all_of_them[m], own, rtol=1e-12, atol=1e-13)


def test_initial_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (MLPField(2, (8,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other, fresh = MLPField(2, (8,), generator=torch.Generator().manual_seed(4)), MLPField(2, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(field.parameters()) for field in (first, second, other, fresh, MLPField(2, (8,)))]
    assert torch.equal(weights[0], weights[1])
    assert not any(torch.equal(a, b) for a, b in pairwise(weights[1:]))


@pytest.mark.parametrize("sizes", [{"hidden_layer_sizes": (4, 0)}, {"n_dims": 0}, {"n_outputs": 0}])
def test_a_layer_without_units_is_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every layer needs at least one unit"):
        MLPField(**({"n_dims": 2} | sizes))


# --- fields made of fields ---


@at_all_times
@pytest.mark.parametrize("hide", [False, True])
def test_derivatives_of_second_order_dynamics_are_autograds(kind: str, hide: bool) -> None:
    field = mlp_field(6, 4, (5,), n_outputs=2)
    inner = AutogradDynamics(Plain(field), n_outputs=2) if hide else field
    dynamics = SecondOrderDynamics(inner)
    t, y = times_for(kind, 6), random_states(7, 6, 4)
    value = dynamics(t, y)
    assert torch.equal(value[:, :2], y[:, 2:])
    torch.testing.assert_close(value[:, 2:], field(t, y), rtol=1e-13, atol=1e-13)
    assert_derivatives_are_autograds(dynamics, t, y)


def test_second_order_dynamics_solve_the_oscillator() -> None:
    dynamics = SecondOrderDynamics(AutogradDynamics(lambda t, y: -y[:, :1], n_outputs=1))
    solution = solve(dynamics, rows((1.0, 0.0), (0.0, 2.0)), [0.0, 2.0], rtol=1e-9, atol=1e-9)
    t = torch.tensor(2.0, dtype=torch.float64)
    expected = torch.stack([torch.stack([t.cos(), -t.sin()]), torch.stack([2 * t.sin(), 2 * t.cos()])])
    torch.testing.assert_close(solution.y1, expected, rtol=1e-7, atol=1e-7)


@at_all_times
@pytest.mark.parametrize("hide", [False, True])
def test_derivatives_of_energy_dynamics_are_autograds(kind: str, hide: bool) -> None:
    field = mlp_field(8, 3, (5,))
    dynamics = EnergyDynamics(AutogradDynamics(Plain(field)) if hide else field)
    t, y = times_for(kind, 6), random_states(9, 6, 3)
    value = dynamics(t, y)
    torch.testing.assert_close(value[:, :3], field(t, y), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value[:, 3], field(t, y).square().mean(dim=1), rtol=1e-13, atol=1e-13)
    assert_derivatives_are_autograds(dynamics, t, y)


def test_energy_of_a_constant_velocity_is_its_square() -> None:
    dynamics = EnergyDynamics(AutogradDynamics(lambda t, y: torch.full_like(y, 3.0)))
    solution = solve(dynamics, rows((0.0, 1.0)), [0.0, 2.0], n_quadratures=1)
    torch.testing.assert_close(solution.y1, rows((6.0, 7.0)))
    assert solution.quadratures is not None
    torch.testing.assert_close(solution.quadratures[:, -1], column(18.0))


@at_all_times
def test_derivatives_of_members_of_any_kind_are_autograds(kind: str) -> None:
    fields = [mlp_field(10, 2, (4,)), mlp_field(11, 2, (3, 3), "silu"), mlp_field(12, 2, (), time_dependent=False)]
    dynamics = MemberDynamics([fields[0], as_dynamics(Plain(fields[1])), fields[2]])
    t, y = times_for(kind, 6), random_states(13, 6)
    for m, field in enumerate(fields):
        block = slice(2 * m, 2 * m + 2)
        torch.testing.assert_close(dynamics(t, y)[block], field(t[block], y[block]), rtol=1e-13, atol=1e-13)
    assert_derivatives_are_autograds(dynamics, t, y)


@at_all_times
def test_fields_of_fields_of_fields_still_know_their_derivatives(kind: str) -> None:
    accelerations = [mlp_field(seed, 4, (4,), n_outputs=2) for seed in (14, 15)]
    dynamics = EnergyDynamics(MemberDynamics([SecondOrderDynamics(field) for field in accelerations]))
    assert_derivatives_are_autograds(dynamics, times_for(kind, 6), random_states(16, 6, 4))


# --- convolutions ---


def conv_field(**options: Any) -> ConvField:
    return ConvField((2, 4, 3), (3,), generator=torch.Generator().manual_seed(17), **options).double()


@timed_or_not
@at_all_times
def test_convolutions_see_the_time_as_one_more_channel(time_dependent: bool, kind: str) -> None:
    field = conv_field(time_dependent=time_dependent)
    t, y = times_for(kind, 5), random_states(18, 5, 24)
    x = y.view(5, 2, 4, 3)
    for i, (weight, bias) in enumerate(zip(*[iter(field.parameters())] * 2, strict=True)):
        if i:
            x = torch.tanh(x)
        if time_dependent:
            x = torch.cat([x, t.expand(5, 1).reshape(5, 1, 1, 1) * torch.ones_like(x[:, :1])], dim=1)
        x = nn.functional.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(field(t, y), x.reshape(5, 24), rtol=1e-13, atol=1e-13)


@timed_or_not
@at_all_times
def test_derivatives_of_convolutions_are_autograds(time_dependent: bool, kind: str) -> None:
    dynamics = as_dynamics(conv_field(time_dependent=time_dependent))
    assert_derivatives_are_autograds(dynamics, times_for(kind, 5), random_states(18, 5, 24))


def test_convolutions_have_the_parameters_of_their_channels() -> None:
    shapes = [tuple(p.shape) for p in ConvField((2, 4, 3), (5, 6), n_outputs=1).parameters()]
    assert shapes == [(5, 3, 3, 3), (5,), (6, 6, 3, 3), (6,), (1, 7, 3, 3), (1,)]


def test_initial_convolutions_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (list(conv_field().parameters()) for _ in range(2))
    ConvField((2, 4, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the protocol ---


@pytest.mark.parametrize(
    "dynamics",
    [
        mlp_field(),
        SecondOrderDynamics(mlp_field(n_outputs=1)),
        EnergyDynamics(mlp_field(1, 1)),
        MemberDynamics([mlp_field()]),
        AutogradDynamics(Plain(mlp_field())),
    ],
    ids=lambda dynamics: type(dynamics).__name__,
)
def test_fields_with_derivatives_are_used_as_they_are(dynamics: Dynamics) -> None:
    assert isinstance(dynamics, Dynamics)
    assert as_dynamics(dynamics) is dynamics


def test_other_fields_are_wrapped() -> None:
    for field in (conv_field(), Plain(mlp_field()), lambda t, y: -y):
        assert isinstance(as_dynamics(field), AutogradDynamics)


def test_frozen_parameters_of_a_wrapped_field_are_not_trainable() -> None:
    field = Plain(mlp_field())
    weight, *_ = field.parameters()
    weight.requires_grad_(False)
    trainable = as_dynamics(field).trainable()
    assert len(trainable) == 3 and all(p is not weight for p in trainable)


def test_a_wrapped_field_may_ignore_state_time_and_parameters() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, 2.0)

    field, y0 = Constant(), random_states(19, 3).requires_grad_()
    y = solve(field, y0, [0.0, 1.0]).y1
    torch.testing.assert_close(y, y0 + 2)
    y.sum().backward()
    assert y0.grad is not None and field.unused.grad is not None
    torch.testing.assert_close(y0.grad, torch.ones_like(y0))
    assert torch.equal(field.unused.grad, torch.zeros(3, dtype=torch.float64))


WRONG_FIELDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "too few columns": (lambda t, y: y[:, :1], r"returned shape \(3, 1\) for a state of shape \(3, 2\)"),
    "too many columns": (lambda t, y: torch.cat([y, t], dim=1), r"returned shape \(3, 3\)"),
    "flat": (lambda t, y: y.sum(dim=1), r"returned shape \(3,\)"),
    "one row": (lambda t, y: y[:1], r"returned shape \(1, 2\)"),
    "float32": (lambda t, y: y.float(), r"returned torch\.float32 for a state of torch\.float64"),
    "integers": (lambda t, y: torch.ones(3, 2, dtype=torch.int64), r"returned torch\.int64"),
    "None": (lambda t, y: None, "returned NoneType; it must return a tensor"),
    "tuple": (lambda t, y: (y, y), "returned tuple"),
    "array": (lambda t, y: y.detach().numpy(), "returned ndarray"),
}


class Module(nn.Module):
    """A generic module around a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor, y: Tensor) -> Any:
        return self.function(t, y)


@pytest.mark.parametrize("case", WRONG_FIELDS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("control", ["row", "batch"])
def test_a_field_with_a_wrong_value_is_refused(case: str, requires_grad: bool, control: str) -> None:
    function, message = WRONG_FIELDS[case]
    y0 = random_states(20, 3).requires_grad_(requires_grad)
    with pytest.raises(FieldError, match=f"the field Module {message}"):
        solve(Module(function), y0, [0.0, 1.0], step_control=control)  # type: ignore[arg-type]


def test_a_wrong_field_is_called_by_its_name() -> None:
    def sloppy(t: Tensor, y: Tensor) -> Tensor:
        return y[:, 0]

    with pytest.raises(FieldError, match="the field sloppy returned shape"):
        solve(sloppy, column(1.0), [0.0, 1.0])


@pytest.mark.parametrize("field", [3, None, torch.ones(2)])
def test_a_field_that_cannot_be_called_is_refused(field: object) -> None:
    with pytest.raises(FieldError, match="which cannot be called"):
        solve(field, column(1.0), [0.0, 1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("control", ["row", "batch"])
@pytest.mark.parametrize(
    "field",
    [
        MLPField(3, generator=torch.Generator().manual_seed(0)).double(),
        MLPField(2, n_outputs=1, generator=torch.Generator().manual_seed(0)).double(),
        MLPField(2, n_outputs=3, generator=torch.Generator().manual_seed(0)).double(),
        MLPField(2, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["other state", "too few outputs", "too many outputs", "float32"],
)
def test_a_network_that_does_not_fit_the_state_is_refused(field: MLPField, control: str) -> None:
    with pytest.raises(FieldError):
        solve(field, random_states(20, 3), [0.0, 1.0], step_control=control)
