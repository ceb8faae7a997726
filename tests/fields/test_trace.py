"""Divergences of users' own fields: by their own trace, exactly, or by Hutchinson's estimate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields import FlowDynamics, FlowField, PlanarDynamics, TracedDynamics, draw_probe, traced
from skode.solver import solve
from tests.derivatives import KINDS_OF_TIMES, assert_derivatives_are_autograds, times_for
from tests.fields.flows import assert_close, flow_field, jacobians, planar_field, shaken, traces
from tests.problems import Plain, random_states

TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}

with_both_controls = pytest.mark.parametrize("control", ["row", "batch"])
PROBES: dict[str, Tensor | None] = {
    "none": None,
    "one": random_states(3, 1, 3)[0],
    "each": random_states(3, 6, 3),
}
with_all_probes = pytest.mark.parametrize("probe", PROBES)


class Own(nn.Module):
    """A field of a user's own, with a parameter that it does not use."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random_states(11, d, d))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y @ self.matrix.T + t)


class Knowing(Own):
    """It knows its divergence, and counts how often it is asked."""

    n_asked = 0

    def trace(self, t: Tensor, y: Tensor) -> Tensor:
        self.n_asked += 1
        return (torch.cos(y @ self.matrix.T + t) * self.matrix.diagonal()).sum(dim=1)


@with_all_probes
@pytest.mark.parametrize("kind", KINDS_OF_TIMES)
def test_integrands_are_what_the_jacobian_says(probe: str, kind: str) -> None:
    field, t, y, s = Own(), times_for(kind, 6), random_states(2, 6, 3), PROBES[probe]
    dynamics = traced(field, 3, probe=s, energy=True, jacobian=True)
    J = jacobians(field, t, y)
    if s is None:
        trace, norm = J.diagonal(dim1=1, dim2=2).sum(dim=1), J.square().sum(dim=(1, 2)) / 3
    else:
        row = (s.expand(6, 3).unsqueeze(1) @ J).squeeze(1)
        trace, norm = (row * s).sum(dim=1), row.square().mean(dim=1)
    expected = torch.stack([trace, field(t, y).square().mean(dim=1), norm], dim=1)
    for value in (dynamics(t, y), dynamics.linearize(t, y)[0]):
        assert_close(value[:, :3], field(t, y), 1e-13)
        assert_close(value[:, 3:], expected, 1e-12)
    with torch.no_grad():
        assert_close(dynamics(t, y)[:, 3:], expected, 1e-12)
    assert isinstance(dynamics, TracedDynamics) and dynamics.any_rows == (probe != "each")


@with_all_probes
@pytest.mark.parametrize("kind", KINDS_OF_TIMES)
def test_derivatives_are_autograds(probe: str, kind: str) -> None:
    for field in (Own(), Knowing()):
        dynamics = traced(field, 3, probe=PROBES[probe], energy=True, jacobian=True)
        assert_derivatives_are_autograds(dynamics, times_for(kind, 6), random_states(2, 6, 3))


def test_a_fields_own_trace_is_used() -> None:
    field, t, y = Knowing(), times_for("own", 6), random_states(2, 6, 3)
    exact = traced(Own(), 3)(t, y)
    for divergence, times_asked in (("auto", 1), ("exact", 1), ("hutchinson", 0)):
        field.n_asked = 0
        value = traced(field, 3, divergence=divergence, probe=PROBES["one"])(t, y)
        assert field.n_asked == times_asked
        assert torch.allclose(value, exact, rtol=1e-12, atol=1e-12) == bool(times_asked)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_trace_may_be_a_vector_or_a_column(shape: tuple[int, ...]) -> None:
    class Field:
        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

        def trace(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.full(shape, -3.0, dtype=torch.float64)

    value = traced(Field(), 3)(times_for("own", 6), random_states(2, 6, 3))
    assert torch.equal(value[:, 3], torch.full((6,), -3.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_estimate_is_right_on_average(kind: str) -> None:
    field, n = Own(), 4000
    t, y = torch.zeros(n, 1, dtype=torch.float64), random_states(2, 1, 3).expand(n, 3)
    probe = draw_probe(n, 3, generator=torch.Generator().manual_seed(0), kind=kind, dtype=torch.float64)
    with torch.no_grad():
        estimates = traced(field, 3, probe=probe, jacobian=True)(t, y)[:, 3:]
        exact = traced(field, 3, jacobian=True)(t[:1], y[:1])[:, 3:]
    assert (estimates.std(dim=0) > 1e-3).all()
    assert ((estimates.mean(dim=0) - exact).abs() <= 5 * estimates.std(dim=0) / math.sqrt(n)).all()


def test_signs_have_no_error_where_the_jacobian_is_diagonal() -> None:
    probe = draw_probe(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, y = times_for("own", 5), random_states(2, 5, 3)
    value = traced(lambda t, y: y**3, 3, probe=probe)(t, y)
    assert_close(value[:, 3], 3 * y.square().sum(dim=1), 1e-13)


def test_one_evaluation_asks_for_one_product() -> None:
    calls: list[int] = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return 2 * y

        @staticmethod
        def backward(ctx: Any, a: Tensor) -> Tensor:
            calls.append(1)
            return 2 * a

    t, y = times_for("own", 4), random_states(2, 4, 3)
    for probe, n_products in ((PROBES["one"], 1), (None, 3)):
        calls.clear()
        with torch.no_grad():
            value = traced(lambda t, y: Counted.apply(y), 3, probe=probe, jacobian=True)(t, y)
        assert len(calls) == n_products
        assert not value.requires_grad


@with_both_controls
@pytest.mark.parametrize("knows", [False, True])
def test_log_determinants_are_those_of_the_flow_map(control: str, knows: bool) -> None:
    field, y0 = Knowing() if knows else Own(), random_states(2, 4, 3)

    def end(y: Tensor) -> Tensor:
        return solve(field, y, [0.0, 1.0], step_control=control, rtol=1e-11, atol=1e-11).y1

    eps = 1e-5
    J = torch.stack([(end(y0 + eps * e) - end(y0 - eps * e)) / (2 * eps) for e in torch.eye(3).double()], dim=2)
    solution = solve(traced(field, 3), y0, [0.0, 1.0], step_control=control, n_quadratures=1, **TIGHT)
    assert solution.quadratures is not None
    assert_close(solution.quadratures[:, -1, 0], torch.linalg.slogdet(J).logabsdet, 1e-7)


@with_all_probes
@with_both_controls
def test_discrete_and_adjoint_gradients_agree(probe: str, control: str) -> None:
    field, y0 = Own(), random_states(2, 6, 3)
    found = []
    for gradient in ("discrete", "adjoint"):
        dynamics = traced(field, 3, probe=PROBES[probe], energy=True, jacobian=True)
        options: Any = {"gradient": gradient, "step_control": control, **TIGHT}
        solution = solve(dynamics, y0, [0.0, 0.7], n_quadratures=3, **options)
        assert solution.quadratures is not None
        loss = solution.y1.sum() + solution.quadratures[:, -1].square().sum()
        found.append(torch.autograd.grad(loss, [field.matrix, field.unused]))
    assert_close(found[0][0], found[1][0], 1e-6)
    assert torch.equal(found[0][1], torch.zeros(2).double()) and torch.equal(found[1][1], torch.zeros(2).double())


@with_both_controls
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_hidden_field_has_the_gradients_of_the_closed_form(control: str, gradient: str) -> None:
    field, y0 = flow_field(1, 3, n_context=2), random_states(2, 5, 3)
    context = random_states(7, 5, 2).requires_grad_()

    def hidden(t: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return field(t, y, c)

    found = []
    for dynamics in (traced(field, 3, context), traced(hidden, 3, context)):
        options: Any = {"gradient": gradient, "step_control": control, **TIGHT}
        solution = solve(dynamics, y0, [0.0, 1.0], n_quadratures=1, **options)
        assert solution.quadratures is not None
        loss = solution.y1.square().sum() + solution.quadratures[:, -1].sum()
        found.append(torch.autograd.grad(loss, [context, *field.parameters()]))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-6)


def test_the_packages_fields_know_their_own_divergence() -> None:
    probe = PROBES["one"]
    assert isinstance(traced(flow_field(), 3), FlowDynamics)
    assert isinstance(traced(flow_field(), 3, divergence="exact", probe=probe), FlowDynamics)
    assert isinstance(traced(planar_field(), 3, probe=probe), PlanarDynamics)
    for field in (flow_field(), planar_field()):
        estimated = traced(field, 3, divergence="hutchinson", probe=probe)
        assert isinstance(estimated, TracedDynamics)
        assert_derivatives_are_autograds(estimated, times_for("own", 6), random_states(2, 6, 3))


def test_a_trace_that_is_not_about_the_value_is_not_used() -> None:
    class Faster(Knowing):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(t, y)

    class FasterFlow(FlowField):
        def forward(self, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
            return 2 * super().forward(t, y)

    hooked = flow_field(1)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    t, y = times_for("own", 6), random_states(2, 6, 3)
    for field in (Faster(), shaken(FasterFlow(3, (4, 4)), 1), hooked):
        assert_close(traced(field, 3)(t, y)[:, 3:], traces(field, t, y), 1e-12)


def test_exact_means_exact_with_a_probe_too() -> None:
    t, y = times_for("own", 6), random_states(2, 6, 3)
    value = traced(Own(), 3, divergence="exact", probe=PROBES["one"])(t, y)
    assert_close(value, traced(Own(), 3)(t, y), 1e-13)


@pytest.mark.parametrize("field", [lambda t, y: torch.ones_like(y), lambda t, y: 2 * t + 0 * y.detach()])
def test_a_field_may_ignore_the_state(field: Any) -> None:
    y0 = random_states(2, 4, 3).requires_grad_()
    solution = solve(traced(field, 3, jacobian=True), y0, [0.0, 1.0], n_quadratures=2)
    assert solution.quadratures is not None
    assert torch.equal(solution.quadratures, torch.zeros(4, 2, 2, dtype=torch.float64))
    assert_close(torch.autograd.grad(solution.y1.sum(), y0)[0], torch.ones(4, 3, dtype=torch.float64))


def test_second_derivatives_are_there() -> None:
    field, y0 = Own(2), random_states(2, 3).requires_grad_()

    def lost(y: Tensor) -> Tensor:
        solution = solve(traced(field, 2), y, [0.0, 1.0], n_quadratures=1, method="rk4", step_size=0.25)
        assert solution.quadratures is not None
        return solution.quadratures[:, -1].sum()

    assert torch.autograd.gradgradcheck(lost, (y0,))
    (expected,) = torch.autograd.grad(lost(y0), y0)
    for transform in (torch.func.grad, torch.func.jacrev):
        assert_close(transform(lost)(y0.detach()), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    field, y0 = Plain(Own().to(dtype)), random_states(2, 21, 3).to(dtype)
    dynamics = traced(field, 3, jacobian=True)
    all_of_them = solve(dynamics, y0, [0.0, 1.0], n_quadratures=2).quadratures
    alone = solve(dynamics, y0[4:9], [0.0, 1.0], n_quadratures=2).quadratures
    assert all_of_them is not None and alone is not None
    assert_close(alone, all_of_them[4:9], 1e-12 if dtype == torch.float64 else 1e-5)


def test_probes_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    for kind in ("rademacher", "gaussian"):
        first, second, other = (
            draw_probe(50, 4, generator=torch.Generator().manual_seed(seed), kind=kind) for seed in (1, 1, 2)
        )
        assert torch.equal(first, second) and not torch.equal(first, other) and first.dtype == torch.float32
        double = draw_probe(50, 4, generator=torch.Generator().manual_seed(1), kind=kind, dtype=torch.float64)
        assert_close(double.float(), first, 1e-7)
        assert (first.abs() == 1).all() == (kind == "rademacher")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_does_not_fit_is_refused() -> None:
    t, y = times_for("own", 6), random_states(2, 6, 3)
    with pytest.raises(ValueError, match="divergence='brute' is unknown; use one of 'auto', 'exact', 'hutchinson'"):
        traced(Own(), 3, divergence="brute")
    with pytest.raises(ValueError, match="needs a probe"):
        traced(Own(), 3, divergence="hutchinson")
    with pytest.raises(ValueError, match=r"a probe has shape \(3,\)"):
        traced(Own(), 3, probe=random_states(1, 6, 2))
    with pytest.raises(ValueError, match="kind='uniform' is unknown"):
        draw_probe(3, generator=torch.Generator(), kind="uniform")
    with pytest.raises(FieldError, match="takes no context"):
        traced(planar_field(), 3, random_states(1, 6, 2))
    with pytest.raises(FieldError, match=r"velocity of shape \(6, 3\) in torch.float64; got \(6, 1\)"):
        traced(lambda t, y: y[:, :1], 3)(t, y)

    class Wrong(Own):
        def trace(self, t: Tensor, y: Tensor) -> Tensor:
            return y

    with pytest.raises(FieldError, match=r"Wrong.trace must return shape \(6,\) or \(6, 1\).*got \(6, 3\)"):
        traced(Wrong(), 3)(t, y)
