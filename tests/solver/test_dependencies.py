"""What a field depends on: each tensor gets its own part of the gradient once, and nothing that is not used hinders."""

from __future__ import annotations

import threading
from collections import deque
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields import MLPField
from skode.solver import BatchControl, solve
from skode.solver.adjoint import _AdjointDynamics
from skode.solver.parameters import find_tensors, name_of
from tests.problems import Plain, Recorded, column, mlp_field, random_states

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
with_both_gradients = pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def decay_slope(rate: float) -> Tensor:
    """Of e^(-rate) with the rate."""
    return -torch.exp(-torch.tensor(rate, dtype=torch.float64))


# --- the search ---


class Slotted:
    __slots__ = ("empty", "rate")

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate


class Odd:
    """Answers nothing, is not hashable, and equals nothing."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, rate: Tensor) -> None:
        object.__setattr__(self, "rate", rate)

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class OfClass:
    rate: Tensor

    @property
    def twice(self) -> Tensor:
        return 2 * self.rate


HOLDERS: dict[str, Any] = {
    "tensor": lambda x: x,
    "deep containers": lambda x: [(1, {"a": deque([{"b": (x,)}])})],
    "module's list": lambda x: _with_attribute(nn.Linear(1, 1).requires_grad_(False), [x]),
    "module's tensor": lambda x: _with_attribute(nn.Sequential(nn.Identity()), x * 1),
    "module in an object": lambda x: _with_attribute(Slotted(nn.ParameterList([x]))),
    "slots": Slotted,
    "odd": Odd,
    "class": lambda x: type("Own", (OfClass,), {"rate": x})(),
    "function's attribute": lambda x: _with_attribute(lambda t, y: y, x),
    "keyword default": lambda x: lambda t, y, *, rate=x: rate * y,
    "function inside of a function": lambda x: lambda t, y: (lambda: x * y)(),
    "partial's keyword": lambda x: partial(partial(max, key=x)),
    "tensor's own method": lambda x: x.mul,
}


def _with_attribute(holder: Any, x: Any = None) -> Any:
    if x is not None:
        holder.extra = x
    return holder


@pytest.mark.parametrize("case", HOLDERS)
def test_tensors_are_found_where_objects_hold_them(case: str) -> None:
    x = nn.Parameter(torch.ones(3))
    (found,) = find_tensors(HOLDERS[case](x))
    assert found is x or found.grad_fn is not None


def test_each_tensor_is_found_once_and_only_if_it_needs_gradients() -> None:
    x, frozen = number(1.0), torch.ones(2)
    cycle: list[Any] = [x, frozen, {"again": x}]
    cycle.append(cycle)
    assert [id(found) for found in find_tensors(cycle, x, lambda: (x, frozen))] == [id(x)]


def test_odd_things_in_a_closure_do_not_hinder() -> None:
    rate, odd = number(0.7), [Odd(number(1.0)), threading.Lock(), iter([1]), torch, Ellipsis, {1: {2: object()}}]

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y if odd else late  # noqa: F821

    solve(field, column(1.0), [0.0, 1.0], **TIGHT).y1.backward()
    torch.testing.assert_close(rate.grad, decay_slope(0.7), rtol=1e-7, atol=0)
    late = None
    del late


def test_a_tensor_that_was_not_found_is_called_by_its_name() -> None:
    rate, box = number(0.7), [[number(0.3)]]
    for _ in range(20):
        box = [box]  # type: ignore[list-item]

    def deep(t: Tensor, y: Tensor) -> Tensor:
        inner: Any = box
        while isinstance(inner, list):
            (inner,) = inner
        return -inner * y

    def by_name(t: Tensor, y: Tensor) -> Tensor:
        return -hidden() * y

    hidden = iter(lambda: rate, None).__next__
    with pytest.raises(FieldError, match=r"field by_name depends on 'rate', a tensor of shape \(\) .*parameters="):
        solve(by_name, column(1.0), [0.0, 1.0])
    with pytest.raises(FieldError, match=r"field deep depends on a tensor of shape \(\) .*args="):
        solve(deep, column(1.0), [0.0, 1.0])


def test_names_are_found_in_modules_and_containers() -> None:
    net, table, pair = nn.Sequential(nn.Linear(2, 3)), {"a": number(1.0)}, (number(2.0),)
    assert name_of(net[0].weight) == "net.0.weight"
    assert name_of(table["a"]) == "table['a']" and name_of(pair[0]) == "pair[0]"
    assert name_of(torch.ones(1)) is None


# --- gradients ---


@with_both_gradients
def test_tensors_that_come_from_each_other_are_not_counted_twice(gradient: str) -> None:
    root, other = number(0.3), number(0.2)
    rate = root * other + root

    def field(t: Tensor, y: Tensor) -> Tensor:
        return -(rate + root) * y

    y1 = solve(field, column(1.0), [0.0, 1.0], gradient=gradient, **TIGHT).y1
    found = torch.autograd.grad(y1.sum(), [root, other], retain_graph=True)
    exact = torch.autograd.grad(torch.exp(-(root * other + 2 * root)), [root, other])
    for own, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-7, atol=0)


@with_both_gradients
def test_a_computed_tensor_gets_its_own_part_and_autograd_goes_on(gradient: str) -> None:
    root = number(0.3)
    rate = root.square()
    y1 = solve(lambda t, y: -rate * y, column(1.0), [0.0, 1.0], gradient=gradient, **TIGHT).y1
    found = torch.autograd.grad(y1.sum() + 2 * rate, [rate, root])
    expected = decay_slope(0.09) + 2
    torch.testing.assert_close(found, (expected, 0.6 * expected), rtol=1e-7, atol=0)


@with_both_gradients
def test_a_hook_sees_the_whole_gradient_once(gradient: str) -> None:
    root, seen = number(0.7), []
    rate = root * 1
    for x, factor in ((root, 2.0), (rate, 3.0)):
        x.register_hook(lambda g, factor=factor: (seen.append(g), factor * g)[1])
    y1 = solve(lambda t, y: -rate * y, column(1.0), [0.0, 1.0], gradient=gradient, **TIGHT).y1
    y1.sum().backward()
    torch.testing.assert_close(root.grad, 6 * decay_slope(0.7), rtol=1e-7, atol=0)
    assert len(seen) == 2


@with_both_gradients
def test_what_is_left_of_an_earlier_pass_does_not_hinder(gradient: str) -> None:
    class Model(nn.Module):
        """Holds the graph of its last call, which is gone after a backward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
            self.last: Any = None

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.last = -self.rate.exp().log() * y
            return self.last

    model = Model()
    for _ in range(2):
        model.rate.grad = None
        solve(model, column(1.0), [0.0, 1.0], gradient=gradient, **TIGHT).y1.sum().backward()
        torch.testing.assert_close(model.rate.grad, decay_slope(0.7), rtol=1e-7, atol=0)
        model.last = model.rate.exp()
        model.last.backward()


def test_a_module_that_is_only_captured_gets_no_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = mlp_field(1), nn.Linear(2, 2)

        def velocity(self, t: Tensor, y: Tensor) -> Tensor:
            return self.net(t, y)

    model = Model()
    solve(model.velocity, random_states(1, 3), [0.0, 1.0]).y1.sum().backward()
    assert all(p.grad is not None for p in model.net.parameters())
    assert all(p.grad is None for p in model.head.parameters())


@with_both_gradients
@with_both_controls
@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")  # the field jumps
def test_a_tensor_that_is_needed_late_gets_its_gradient(gradient: str, control: str) -> None:
    early, late, never = number(0.3), number(0.8), number(1.0)
    computed = late * 1

    def field(t: Tensor, y: Tensor) -> Tensor:
        if bool((t < 0.5).all()):
            return -early * y
        return -computed * y if bool((t <= 1).all()) else never * y

    options = {"gradient": gradient, "step_control": control, **TIGHT}
    y1 = solve(field, column(1.0), [0.0, 1.0], **options).y1
    y1.sum().backward()
    expected = -0.5 * torch.exp(torch.tensor(-0.55, dtype=torch.float64))
    for rate in (early, late):
        torch.testing.assert_close(rate.grad, expected, rtol=1e-5 if gradient == "reversible" else 1e-6, atol=0)
    assert never.grad is None


def test_only_chosen_parameters_of_a_network_get_gradients() -> None:
    field, whole = mlp_field(1), mlp_field(1)
    chosen = list(field.parameters())[1:3]
    for own, options in ((field, {"parameters": iter(chosen)}), (whole, {})):
        solve(own, random_states(1, 3), [0.0, 1.0], **options).y1.sum().backward()
    found, expected = ([p.grad for p in net.parameters()] for net in (field, whole))
    assert [g is None for g in found] == [True, False, False, True]
    for own, other in zip(found[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(own, other)
    with pytest.raises(ValueError, match="no parameter of MLPField"):
        solve(field, random_states(1, 3), [0.0, 1.0], parameters=(number(1.0),))


@pytest.mark.parametrize("wrong", [(1.0,), ["rate"], [None]])
def test_parameters_that_are_no_tensors_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="parameters must be tensors"):
        solve(Plain(mlp_field()), random_states(1, 3), [0.0, 1.0], parameters=wrong)


def test_fields_that_bring_their_derivatives_take_no_args() -> None:
    with pytest.raises(FieldError, match=r"MLPField brings its own derivatives and takes no args"):
        solve(mlp_field(), random_states(1, 3), [0.0, 1.0], args=(1.0,))


@pytest.mark.parametrize("wrong", [torch.ones(2), 1.0, {"rate": 1.0}])
def test_args_that_are_no_tuple_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="args must be a tuple"):
        solve(lambda t, y, *args: y, random_states(1, 3), [0.0, 1.0], args=wrong)


@with_both_gradients
def test_tensors_inside_of_args_get_gradients(gradient: str) -> None:
    rates = [number(0.1), number(0.2), number(0.4)]

    def field(t: Tensor, y: Tensor, first: Tensor, rest: Any) -> Tensor:
        return -(first + rest["b"][0] + rest["c"]) * y

    args = (rates[0], {"b": (rates[1], "text"), "c": rates[2].square()})
    solve(field, column(1.0), [0.0, 1.0], args=args, gradient=gradient, **TIGHT).y1.sum().backward()
    expected = decay_slope(0.1 + 0.2 + 0.16)
    for rate, factor in zip(rates, (1.0, 1.0, 0.8), strict=True):
        torch.testing.assert_close(rate.grad, factor * expected, rtol=1e-7, atol=0)


def test_a_field_is_not_asked_more_often_for_what_it_depends_on() -> None:
    rate = number(0.7)
    field = Recorded(lambda t, y: -rate * y)
    for y0 in (column(1.0), column(1.0).requires_grad_()):
        before = field.n_calls
        solution = solve(field, y0, [0.0, 1.0])
        assert field.n_calls - before == int(solution.n_evals[0])


def test_without_gradients_nothing_is_searched_for() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return -next(hidden) * y

    rate = number(0.7)
    hidden = iter(lambda: rate, None)
    with torch.no_grad():
        assert solve(field, column(1.0), [0.0, 1.0]).success


# --- few rows in float32, which come with copies ---


@with_both_gradients
@pytest.mark.parametrize("n", range(1, 17))
@pytest.mark.parametrize("kind", ["closure", "args", "wide"])
def test_tensors_of_each_row_go_with_any_number_of_rows(n: int, kind: str, gradient: str) -> None:
    rate = torch.linspace(0.2, 1.0, n).view(n, 1).requires_grad_()
    y0 = torch.linspace(1.0, 2.0, n).view(n, 1).expand(n, 2).contiguous().requires_grad_()

    def field(t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        own = args[0] if args else rate
        if kind == "wide":
            return -torch.bmm(own.view(n, 1, 1), y.unsqueeze(1)).squeeze(1)
        return -own * y

    args = (rate,) if kind == "args" else ()
    y1 = solve(field, y0, [0.0, 1.0], rtol=1e-5, atol=1e-6, args=args, gradient=gradient).y1
    torch.testing.assert_close(y1, y0 * torch.exp(-rate), rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(y1.sum(), [y0, rate])
    expected = torch.autograd.grad((y0 * torch.exp(-rate)).sum(), [y0, rate])
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15])
def test_a_field_with_an_order_of_its_own_for_its_rows_sees_them_alone(n: int) -> None:
    # Copies of rows would be taken for further components.
    def pulled_together(t: Tensor, y: Tensor) -> Tensor:
        groups = y.reshape(n, -1, 1)
        return (groups.mean(dim=1, keepdim=True) - groups).reshape(y.shape)

    y0 = torch.arange(2.0 * n).view(n, 2).square()
    found = solve(pulled_together, y0, [0.0, 1.0], rtol=1e-5, atol=1e-6).y1
    exact = solve(pulled_together, y0.double(), [0.0, 1.0], rtol=1e-9, atol=1e-9).y1
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16])
@pytest.mark.parametrize("n_quadratures", [0, 1])
def test_a_wrong_shape_is_told_with_the_callers_rows(n: int, n_quadratures: int) -> None:
    message = (
        rf"returned shape \({n}, 3\) for a state of shape \({n}, 1\); it must return shape \({n}, {1 + n_quadratures}\)"
    )
    with pytest.raises(FieldError, match=message):
        solve(lambda t, y: y.expand(-1, 3), torch.ones(n, 1), [0.0, 1.0], n_quadratures=n_quadratures)


def test_an_error_of_the_fields_own_comes_through() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        assert len(y) == 4, "not four"
        raise KeyError("the field's own")

    with pytest.raises(KeyError, match="the field's own"):
        solve(field, torch.ones(4, 2), [0.0, 1.0])


@pytest.mark.parametrize("n", [1, 2, 5, 15])
def test_a_norm_over_all_rows_is_that_of_the_callers(n: int) -> None:
    y0 = torch.arange(1.0, 2 * n + 1).view(n, 2)
    found = solve(lambda t, y: -t * y * y.norm(), y0, [0.0, 1.0], rtol=1e-5, atol=1e-6)
    exact = solve(lambda t, y: -t * y * y.norm(), y0.double(), [0.0, 1.0], rtol=1e-5, atol=1e-6)
    if n == 1:  # with more, each row's own steps see others at other times
        torch.testing.assert_close(found.y1.double(), exact.y1, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.y1.norm().double(), exact.y1.norm(), rtol=0.15, atol=0)


# --- integrals ---


class Energetic(nn.Module):
    """A network's value and its mean square."""

    def __init__(self, net: MLPField) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        f = self.net(t, y)
        return torch.cat([f, f.square().mean(dim=1, keepdim=True)], dim=1)


def test_integrals_are_no_part_of_the_adjoint_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = set()
    linearize = _AdjointDynamics.linearize

    def seen(self: _AdjointDynamics, t: Tensor, z: Tensor) -> Any:
        widths.add(z.shape[1])
        return linearize(self, t, z)

    monkeypatch.setattr(_AdjointDynamics, "linearize", seen)
    solution = solve(Energetic(mlp_field(1)), random_states(1, 3), [0.0, 0.4, 1.0], n_quadratures=1, gradient="adjoint")
    assert solution.quadratures is not None
    solution.quadratures.sum().backward()
    assert widths == {4}


@with_both_controls
def test_integrals_of_rows_with_their_own_times_have_their_gradients_by_the_adjoint(control: str) -> None:
    net, y0 = mlp_field(1), random_states(1, 3).requires_grad_()
    t = torch.tensor([[0.0, 0.3, 0.3, 1.0], [0.0, 0.3, 0.7, torch.nan], [1.0, 0.5, 0.2, 0.0]], dtype=torch.float64)
    if control == "batch":
        t = t[:1].expand(3, -1)
    t = t.clone().requires_grad_() if control == "row" else t[0].clone().requires_grad_()
    found = []
    for gradient in ("adjoint", "discrete"):
        options = {"gradient": gradient, "step_control": control, "n_quadratures": 1}
        quadratures = solve(Energetic(net), y0, t, rtol=1e-10, atol=1e-10, **options).quadratures
        assert quadratures is not None
        weights = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4, 1)
        loss = (quadratures.nan_to_num(0.0) * weights).sum()
        found.append(torch.autograd.grad(loss, [y0, t, *net.parameters()]))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own.nan_to_num(0.0), other.nan_to_num(0.0), rtol=1e-6, atol=1e-7)


@with_both_gradients
def test_a_network_with_further_outputs_gives_integrands(gradient: str) -> None:
    field, y0 = mlp_field(3, 2, (5,), n_outputs=3), random_states(2, 4).requires_grad_()

    def longer(t: Tensor, y: Tensor) -> Tensor:
        return field(t, y[:, :2])

    inputs = [y0, *field.parameters()]
    solution = solve(field, y0, [0.0, 1.0], n_quadratures=1, gradient=gradient, **TIGHT)
    whole = solve(longer, torch.nn.functional.pad(y0, (0, 1)), [0.0, 1.0], **TIGHT).y
    assert solution.quadratures is not None
    both = torch.cat([solution.y, solution.quadratures], dim=2)
    torch.testing.assert_close(both, whole, rtol=1e-8, atol=1e-8)
    for own, other in zip(
        torch.autograd.grad(both.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong", [-1, 1.0, "2", None])
def test_a_wrong_number_of_integrals_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="n_quadratures="):
        solve(mlp_field(), random_states(1, 3), [0.0, 1.0], n_quadratures=wrong)


def test_a_network_with_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(FieldError, match=r"MLPField returned shape \(3, 2\) .* n_quadratures=1 it must return"):
        solve(mlp_field(), random_states(1, 3), [0.0, 1.0], n_quadratures=1)


def test_integrals_take_the_strictest_tolerance_of_the_state_if_they_have_none() -> None:
    field, y0 = Energetic(mlp_field(1)), random_states(1, 3)
    atol = torch.tensor([1e-3, 1e-7], dtype=torch.float64)
    options: dict[str, Any] = {"n_quadratures": 1, "rtol": 0.0}
    short = solve(field, y0, [0.0, 1.0], atol=atol, **options)
    long = solve(field, y0, [0.0, 1.0], atol=torch.cat([atol, atol[1:]]), **options)
    assert torch.equal(short.y, long.y) and torch.equal(short.quadratures, long.quadratures)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"atol must be a number or have shape \(2,\) or \(3,\)"):
        solve(field, y0, [0.0, 1.0], atol=torch.ones(4), **options)


def test_a_norm_of_ones_own_sees_the_integrals_errors_in_units_of_their_tolerance() -> None:
    seen = []

    def norm(ratio: Tensor) -> Tensor:
        seen.append(ratio.clone())
        return ratio.abs().max()

    atol = torch.tensor([1e-5, 1e-5, torch.inf], dtype=torch.float64)
    field, control = Energetic(mlp_field(1)), BatchControl(norm=norm)
    solve(field, random_states(1, 3), [0.0, 1.0], step_control=control, atol=atol, n_quadratures=1)
    assert seen and all(ratio.shape == (3, 3) and not bool(ratio[:, 2].any()) for ratio in seen)


def test_dense_output_gives_states_and_integrals_apart() -> None:
    t = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {"n_quadratures": 1, **TIGHT}
    solution = solve(Energetic(mlp_field(1)), random_states(1, 3), t[[0, 2]], dense_output=True, **options)
    outputs = solve(Energetic(mlp_field(1)), random_states(1, 3), t, **options)
    torch.testing.assert_close(solution.evaluate(t), outputs.y)
    torch.testing.assert_close(solution.evaluate_quadratures(t), outputs.quadratures)
    assert solution.derivative(t).shape == (3, 3, 2)
