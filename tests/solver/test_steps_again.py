"""Steps given to a solve: what they have to be, what they do at jumps and failures; and derivatives of what follows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jvp, vmap

from skode.fields import SecondOrderDynamics
from skode.solver import METHODS, Event, Status, solve
from tests.problems import Field, Plain, column, mlp_field, random_states, rows

NAN = math.nan

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
with_both_fields = pytest.mark.parametrize("wrap", [lambda field: field, Plain], ids=["built in", "module"])
ignoring_jit = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def falls(t: Tensor, y: Tensor) -> Tensor:
    """A thrust that is switched over at t = 0.4."""
    return torch.where(t < 0.4, 1.0, -3.0) * (1 + 0.1 * y) - y


def runs_away(t: Tensor, y: Tensor) -> Tensor:
    """Has no values beyond 40."""
    return torch.where(y > 40, torch.nan, y * y)


# --- what steps have to be ---


@with_both_controls
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t[0], lambda t: t[0].tolist(), lambda t: t.numpy()])
def test_steps_are_taken_in_any_form(control: str, form: Any) -> None:
    field, options = mlp_field(), {"step_control": control, "max_step": 0.2}
    first = solve(field, random_states(1, 3), [0.0, 0.5, 1.0], **options)
    # Steps of the same length: those of all rows are the first one's.
    steps = torch.linspace(0, 1, 6, dtype=torch.float64).expand(3, -1)
    again = solve(field, random_states(1, 3), [0.0, 0.5, 1.0], steps=form(steps), **options)
    assert_equal(again.steps.t, steps)
    torch.testing.assert_close(again.y, first.y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[0.0, 0.5, 1.0]], "one row for each row"),
        ([0.0, 0.7, 0.5, 1.0], "row 0"),
        ([0.0, 0.5, 0.5, 1.0], "row 0"),
        ([1.0, 0.5, 0.0], "row 0"),
        ([0.0], "0 steps"),
        ([[0.0, 0.5, 1.0], [0.0, 2.0, 3.0]], "row 1"),
        ([0.0, NAN, 1.0], "NaN"),
        ([0.0, math.inf, 1.0], "finite"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(mlp_field(), random_states(2, 2), [0.0, 1.0], steps=torch.tensor(steps))


def test_one_step_for_all_rows_cannot_be_taken_from_steps_that_differ() -> None:
    with pytest.raises(ValueError, match="differ from row to row"):
        solve(
            mlp_field(),
            random_states(2, 2),
            [0.0, 1.0],
            step_control="batch",
            steps=rows((0.0, 0.5, 1.0), (0.0, 0.4, 1.0)),
        )


def test_a_jump_that_no_step_ends_at_is_refused() -> None:
    steps = solve(falls, column(1.0, 2.0), [0.0, 1.0], jump_times=[0.4]).steps
    with pytest.raises(ValueError, match=r"0\.35"):
        solve(falls, column(1.0, 2.0), [0.0, 1.0], jump_times=[0.35], steps=steps)


# --- what they do ---


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "rk32", "heun"])
@pytest.mark.parametrize("t", [[0.0, 1.0], [0.0, 0.4, 0.7, 1.0], [1.0, 0.1]])
def test_jumps_are_jumped_again(control: str, method: str, t: list[float]) -> None:
    options: dict[str, Any] = {"step_control": control, "method": method, "jump_times": [0.4, 3.0], "step_times": [0.6]}
    y0 = column(1.0, 2.0).requires_grad_()
    first = solve(falls, y0, t, **options)
    again = solve(falls, y0, t, steps=first.steps, **options)
    assert_equal(again.y, first.y)
    assert_equal(again.steps.t, first.steps.t)
    assert int(again.n_rejected.sum()) == 0
    assert_equal(*(torch.autograd.grad(s.y.square().sum(), y0)[0] for s in (again, first)))


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "rk32", "heun", "rk4"])
def test_evaluations_are_counted(control: str, method: str) -> None:
    calls = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        return -y

    options: dict[str, Any] = {"step_control": control, "method": method}
    first = solve(field, column(1.0), [0.0, 2.0], **options)
    calls.clear()
    again = solve(field, column(1.0), [0.0, 2.0], steps=first.steps, **options)
    assert again.n_evals.tolist() == [len(calls)]
    assert again.n_steps.tolist() == first.n_steps.tolist()


@pytest.mark.parametrize("method", ["tsit5", "rk32"])
def test_a_row_that_failed_fails_again_at_the_same_place(method: str) -> None:
    first = solve(runs_away, column(0.5, 30.0, 0.2), [0.0, 0.02, 1.0], method=method)
    again = solve(runs_away, column(0.5, 30.0, 0.2), [0.0, 0.02, 1.0], method=method, steps=first.steps)
    assert first.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS]
    for name in ("y", "status", "t_reached", "n_steps"):
        assert_equal(getattr(again, name), getattr(first, name))


def test_a_row_that_fails_along_given_steps_leaves_the_others_alone() -> None:
    steps = torch.linspace(0, 1, 9, dtype=torch.float64)
    field, found = mlp_field(), []
    for bad in (0.3, math.inf):
        y0 = random_states(3, 3)
        y0[1] = bad
        y0.requires_grad_()
        solution = solve(lambda t, y: field(t, y) / torch.isfinite(y), y0, [0.0, 0.4, 1.0], steps=steps)
        y = solution.y[[0, 2]]
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), y0)[0][[0, 2]]))
        assert bool(solution.status[1]) == (bad == math.inf)
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
@pytest.mark.parametrize("budget", [0, 2**28])
def test_gradients_along_given_steps(gradient: str, budget: int) -> None:
    field, y0 = Plain(mlp_field()), random_states(4, 3).requires_grad_()
    # A step ends at the output, which "reversible" needs.
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "step_times": [0.4]}
    first = solve(field, y0, [0.0, 0.4, 1.0], **options)
    again = solve(field, y0, [0.0, 0.4, 1.0], steps=first.steps, gradient=gradient, memory_budget=budget, **options)
    inputs = [y0, *field.parameters()]
    for own, other in zip(*(torch.autograd.grad(s.y.square().sum(), inputs) for s in (again, first)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-7)


def test_dense_output_along_given_steps_is_the_same() -> None:
    t = torch.linspace(0, 2, 17, dtype=torch.float64)
    first = solve(mlp_field(), random_states(5, 3), [0.0, 2.0], dense_output=True)
    again = solve(mlp_field(), random_states(5, 3), [0.0, 2.0], dense_output=True, steps=first.steps)
    assert_equal(again.evaluate(t), first.evaluate(t))
    assert_equal(again.derivative(t), first.derivative(t))


def test_no_rows_take_no_steps() -> None:
    first = solve(mlp_field(), torch.zeros(0, 2, dtype=torch.float64), [0.0, 1.0])
    assert solve(mlp_field(), torch.zeros(0, 2, dtype=torch.float64), [0.0, 1.0], steps=first.steps).y.shape == (
        0,
        2,
        2,
    )


# --- second derivatives ---


def penalty(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the squared gradient."""
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)


def fine(field: Field, y: Tensor) -> Tensor:
    """States at 0, 0.5 and 1 by the classic method with steps of 1/64, in plain torch."""
    h, outputs = 1 / 64, [y]
    for i in range(64):
        t = torch.full_like(y[:, :1], i * h)
        k1 = field(t, y)
        k2 = field(t + h / 2, y + h / 2 * k1)
        k3 = field(t + h / 2, y + h / 2 * k2)
        k4 = field(t + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if i in (31, 63):
            outputs.append(y)
    return torch.stack(outputs, dim=1)


@with_both_controls
@with_both_fields
@pytest.mark.parametrize("gradient", ["discrete", "adjoint", "reversible"])
def test_second_derivatives_of_solves_in_a_chain(control: str, wrap: Any, gradient: str) -> None:
    # The second solve's states depend on the same parameters: they must not count twice.
    field, y0 = wrap(mlp_field()), random_states(6, 3).requires_grad_()
    inputs = [y0, *field.parameters()]

    def run(y: Tensor) -> Tensor:
        options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "gradient": gradient, "step_control": control}
        return solve(field, y, [0.0, 0.5, 1.0], **options).y

    found, expected = penalty(run(run(y0)[:, -1]), inputs), penalty(fine(field, fine(field, y0)[:, -1]), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_third_derivatives() -> None:
    field, y0 = mlp_field(), random_states(7, 2).requires_grad_()
    inputs, found = [y0, *field.parameters()], []
    for y in (solve(field, y0, [0.0, 0.5, 1.0], rtol=1e-9, atol=1e-9).y, fine(field, y0)):
        gradients: Any = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        for _ in range(2):
            gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, create_graph=True)
        found.append(gradients)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@with_both_controls
def test_second_derivatives_across_a_jump(control: str) -> None:
    y0, t = column(1.0, 2.0).requires_grad_(), torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64).requires_grad_()
    options: dict[str, Any] = {"step_control": control, "jump_times": [0.4], "rtol": 1e-2}
    steps = solve(falls, y0.detach(), t.detach(), **options).steps

    def states(y0: Tensor, t: Tensor) -> Tensor:
        return solve(lambda t, y: falls(t, y) + 0.1 * y**3, y0, t, steps=steps, **options).y

    assert gradcheck(states, (y0, t))
    assert gradgradcheck(states, (y0, t))


@pytest.mark.parametrize("method", ["tsit5", "rk32"])
@with_both_controls
def test_second_derivatives_of_the_error_estimate(method: str, control: str) -> None:
    # The unit of the tolerance is held fixed; with rtol = 0 it is constant.
    field, y0 = mlp_field(1, hidden_layer_sizes=(2,)), random_states(8, 2).requires_grad_()
    options: dict[str, Any] = {"method": method, "step_control": control, "rtol": 0.0, "atol": 1e-3}
    steps = solve(field, y0.detach(), [0.0, 1.0], **options).steps

    def estimate(y0: Tensor, *_: Tensor) -> Tensor:
        estimate = solve(field, y0, [0.0, 1.0], steps=steps, error_estimate=True, **options).error_estimate
        assert estimate is not None
        return estimate

    assert gradgradcheck(estimate, (y0, *field.parameters()), atol=1e-5, rtol=1e-3)


def test_second_derivatives_beside_a_row_that_failed() -> None:
    found = []
    for bad in (30.0, 0.1):
        y0 = column(0.5, bad, 0.2).requires_grad_()
        y = solve(runs_away, y0, [0.0, 0.02, 1.0]).y[[0, 2]]
        (first,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
        found.append(torch.autograd.grad(first[[0, 2]].square().sum(), y0)[0][[0, 2]])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_second_derivatives_of_a_field_of_fields() -> None:
    inner = mlp_field(n_outputs=1)
    field, y0 = SecondOrderDynamics(inner), random_states(9, 3).requires_grad_()
    inputs = [y0, *inner.parameters()]
    found = penalty(solve(field, y0, [0.0, 0.5, 1.0], rtol=1e-9, atol=1e-9).y, inputs)
    for own, other in zip(found, penalty(fine(field, y0), inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def with_energy(field: Field) -> Field:
    """The field, and its energy as an integrand."""

    def both(t: Tensor, y: Tensor) -> Tensor:
        f = field(t, y)
        return torch.cat([f, f.square().mean(dim=1, keepdim=True)], dim=1)

    return both


@with_both_controls
def test_second_derivatives_of_quadratures(control: str) -> None:
    field, y0 = Plain(mlp_field()), random_states(9, 3).requires_grad_()
    inputs, both = [y0, *field.parameters()], with_energy(field)
    options: dict[str, Any] = {"n_quadratures": 1, "step_control": control, "rtol": 1e-9, "atol": 1e-9}
    energy = solve(both, y0, [0.0, 0.5, 1.0], **options).quadratures
    assert energy is not None
    state = torch.nn.functional.pad(y0, (0, 1))
    expected = fine(lambda t, z: both(t, z[:, :-1]), state)[..., -1:]
    torch.testing.assert_close(penalty(energy, inputs), penalty(expected, inputs), rtol=1e-6, atol=1e-6)


def test_second_derivatives_of_a_solve_with_events_are_refused() -> None:
    y0 = column(1.0).requires_grad_()
    y = solve(lambda t, y: -y, y0, [0.0, 1.0], events=Event(lambda t, y: y[:, 0] - 0.5)).y
    with pytest.raises(NotImplementedError, match="events"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


def test_events_are_found_again_along_given_steps() -> None:
    events = [Event(lambda t, y: y[:, 0] - 0.5), Event(lambda t, y: y[:, 0] - 0.8, terminal=False)]
    y0 = column(1.0, 0.9, 0.2).requires_grad_()
    first = solve(lambda t, y: -y, y0, [0.0, 0.3, 2.0], events=events)
    again = solve(lambda t, y: -y, y0, [0.0, 0.3, 2.0], events=events, steps=first.steps)
    for name in ("y", "y1", "status", "event_t", "event_y", "t_reached"):
        assert_equal(getattr(again, name), getattr(first, name))
    assert_equal(*(torch.autograd.grad(s.event_t.nan_to_num().sum(), y0)[0] for s in (again, first)))
    with pytest.raises(ValueError, match="give its events again"):
        solve(lambda t, y: -y, y0, [0.0, 0.3, 2.0], steps=first.steps)


def test_hooks_on_parameters_see_whole_gradients_alone() -> None:
    field, y0, seen = mlp_field(), random_states(9, 3).requires_grad_(), []
    weight = next(field.parameters())
    y = solve(field, y0, [0.0, 1.0]).y1
    (first,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
    weight.register_hook(lambda g: seen.append(g.clone()))
    first.square().sum().backward()
    assert len(seen) == 1
    assert_equal(seen[0], weight.grad)


@with_both_controls
@with_both_fields
def test_many_cotangents_at_once(control: str, wrap: Any) -> None:
    field, y0 = wrap(mlp_field()), random_states(10, 2)

    def states(y0: Tensor) -> Tensor:
        return solve(field, y0, [0.0, 0.5, 1.0], step_control=control).y

    jacobians = [torch.autograd.functional.jacobian(states, y0, vectorize=vectorize) for vectorize in (True, False)]
    torch.testing.assert_close(*jacobians, rtol=1e-11, atol=1e-13)


# --- transforms ---


@ignoring_jit
@with_both_controls
@with_both_fields
def test_dual_numbers_go_through_an_adaptive_solve(control: str, wrap: Any) -> None:
    field, y0, v = wrap(mlp_field()), random_states(11, 3), random_states(12, 3)

    def states(y0: Tensor) -> Tensor:
        return solve(field, y0, [0.0, 0.5, 1.0], step_control=control).y

    jacobian = torch.autograd.functional.jacobian(states, y0)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(states(forward_ad.make_dual(y0, v))).tangent
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, v, 2), rtol=1e-10, atol=1e-12)


@ignoring_jit
def test_derivatives_with_the_times() -> None:
    field, y0 = mlp_field(), random_states(13, 2)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return solve(field, y0, t).y.sin().sum()

    own = t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(own), own)
    torch.testing.assert_close(grad(loss)(t), expected)
    torch.testing.assert_close(jvp(loss, (t,), (t,))[1], expected @ t)
    torch.testing.assert_close(hessian(loss)(t), torch.autograd.functional.hessian(loss, t), rtol=1e-9, atol=1e-11)


def test_batches_of_an_adaptive_solve_take_steps_of_their_own() -> None:
    field, y0 = mlp_field(), random_states(14, 3 * 2).view(3, 2, 2)
    y0[1] *= 20
    solution = vmap(lambda y: tuple(getattr(solve(field, y, [0.0, 1.0]), name) for name in ("y", "n_steps", "n_evals")))
    alone = [solve(field, y, [0.0, 1.0]) for y in y0]
    y, n_steps, n_evals = solution(y0)
    torch.testing.assert_close(y, torch.stack([s.y for s in alone]), rtol=1e-12, atol=1e-13)
    assert_equal(n_steps, torch.stack([s.n_steps for s in alone]))
    assert_equal(n_evals, torch.stack([s.n_evals for s in alone]))
    assert len(set(n_steps.flatten().tolist())) > 1


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_batches_of_times(method: str) -> None:
    field, y0, t = mlp_field(), random_states(15, 2), rows((0.0, 0.2, 1.0), (1.0, 0.5, -1.0))
    options: dict[str, Any] = {"method": method, "step_size": 0.3} if not METHODS[method].adaptive else {}
    found = vmap(lambda t: solve(field, y0, t, **options).y1)(t)
    expected = torch.stack([solve(field, y0, own, **options).y1 for own in t])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_batch_of_networks_solves_adaptively_and_differentiates() -> None:
    fields, y0 = [Plain(mlp_field(seed)) for seed in range(3)], random_states(16, 4)
    weights = torch.func.stack_module_state(fields)[0]

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return solve(lambda t, y: functional_call(fields[0], weights, (t, y)), y0, [0.0, 0.5, 1.0]).y1.sin().sum()

    found = vmap(grad(loss))(weights)
    for m, field in enumerate(fields):
        gradients = torch.autograd.grad(solve(field, y0, [0.0, 0.5, 1.0]).y1.sin().sum(), list(field.parameters()))
        for (name, _), own in zip(field.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(found[name][m], own, rtol=1e-9, atol=1e-11)


@ignoring_jit
@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_quadratures_and_args_in_transforms(method: str) -> None:
    field, y0 = with_energy(lambda t, y: -y * torch.cos(t)), random_states(16, 4)
    options: dict[str, Any] = {"method": method, "step_size": 0.1} if method == "rk4" else {"method": method}

    def loss(a: Tensor) -> Tensor:
        options.update(args=(a,), n_quadratures=1)
        energy = solve(lambda t, y, a: a * field(t, y), y0, [0.0, 0.5, 1.0], **options).quadratures
        assert energy is not None
        return energy.sum()

    own = torch.tensor([0.7, -1.2], dtype=torch.float64).requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(a), own)[0] for a in own]).sum(dim=0)
    torch.testing.assert_close(vmap(grad(loss))(own.detach()), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        tangents = torch.stack([jvp(loss, (a,), (torch.ones_like(a),))[1] for a in own])
    torch.testing.assert_close(tangents, expected, rtol=1e-10, atol=1e-12)


def test_vmap_in_vmap() -> None:
    field, y0 = mlp_field(), random_states(17, 2 * 3 * 2).view(2, 3, 2, 2)
    found = vmap(vmap(lambda y: solve(field, y, [0.0, 0.5, 1.0]).y))(y0)
    expected = torch.stack([torch.stack([solve(field, y, [0.0, 0.5, 1.0]).y for y in own]) for own in y0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_vmap_with_one_step_for_all_rows_says_what_to_do() -> None:
    field = mlp_field()
    with pytest.raises(NotImplementedError, match="step_control='row'"):
        vmap(lambda y: solve(field, y, [0.0, 1.0], step_control="batch").y)(random_states(18, 4).view(2, 2, 2))


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_a_transform_tells_of_rows_that_failed(method: str) -> None:
    options: dict[str, Any] = {"method": method, "step_size": 0.1} if method == "rk4" else {"method": method}
    seen = []

    def loss(y0: Tensor) -> Tensor:
        solution = solve(runs_away, y0, [0.0, 1.0], **options)
        seen.append(solution.success)
        return solution.y1.nan_to_num().square().sum(), solution.status

    gradient, status = grad(loss, has_aux=True)(column(0.5, 30.0, 0.2))
    assert status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS] and seen == [False]
    assert bool(torch.isfinite(gradient[[0, 2]]).all())


def test_a_compiler_that_must_not_break_refuses_an_adaptive_solve() -> None:
    torch.compiler.reset()
    field = mlp_field()
    compiled = torch.compile(lambda y: solve(field, y, [0.0, 1.0]).y, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="chooses its steps while it runs"):
        compiled(random_states(19, 2))


@with_both_controls
@pytest.mark.parametrize("method", ["tsit5", "dopri8"])
def test_errors_have_the_same_derivatives_in_plain_torch(method: str, control: str) -> None:
    field, y0 = mlp_field(), random_states(9, 3).requires_grad_()
    inputs = [y0, *field.parameters()]

    def gradients(create_graph: bool) -> list[Tensor]:
        solution = solve(field, y0, [0.0, 0.3, 1.0], method=method, step_control=control, error_estimate=True)
        assert solution.error_estimate is not None
        return list(torch.autograd.grad(solution.error_estimate.sum(), inputs, create_graph=create_graph))

    for own, plain in zip(gradients(False), gradients(True), strict=True):
        assert float(own.abs().max()) > 0 and plain.requires_grad
        torch.testing.assert_close(plain, own, rtol=1e-9, atol=1e-9 * float(own.abs().max()))
