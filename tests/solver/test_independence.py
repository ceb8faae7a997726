"""What is found for a row does not depend on the rows beside it: their number, order, failures or number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skode.fields import MLPField
from skode.solver import METHODS, Solution, Status, solve
from tests.problems import Field, random_states

SIZES = [1, 2, 5, 16, 17, 333, 1000]
DIMS = [2, 3, 6, 32]
DTYPES = [torch.float32, torch.float64]
ADAPTIVE = [name for name, tableau in METHODS.items() if tableau.adaptive and not getattr(tableau, "gamma", 0)]
GRADIENTS = ["discrete", "adjoint", "reversible"]
NAN = math.nan

# Derandomised: the same examples in every run.
as_property = settings(max_examples=40, deadline=None, derandomize=True, database=None)
with_both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
sizes, dims, dtypes, seeds = map(st.sampled_from, (SIZES, DIMS, DTYPES, range(1000)))


def mlp(d: int) -> MLPField:
    return MLPField(d, (24,), time_dependent=True, generator=torch.Generator().manual_seed(d))


class Gated(nn.Module):
    """A module of a user's own, without derivatives: Linear layers, a product with time, softplus and exp."""

    def __init__(self, d: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(100 + d)
        self.first, self.second = (
            nn.utils.skip_init(nn.Linear, d, 24),
            nn.utils.skip_init(nn.Linear, 24, d),
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        gate = torch.exp(-(y**2).sum(dim=1, keepdim=True) / y.shape[1])
        return self.second(nn.functional.softplus(self.first(y)) * torch.cos(t)) + gate - y


def function(t: Tensor, y: Tensor) -> Tensor:
    """Elementwise, and a coupling of neighbouring components."""
    return torch.sin(3 * y.roll(1, dims=1) + 2 * t) - 0.5 * y - 0.1 * y.pow(3)


@cache
def field_of(kind: str, d: int, dtype: torch.dtype) -> Field:
    makers: dict[str, Callable[[], Field]] = {
        "built in": lambda: mlp(d).to(dtype),
        "module": lambda: Gated(d).to(dtype),
        "function": lambda: function,
    }
    return makers[kind]()


KINDS = ["built in", "module", "function"]
# What companions do.
COMPANIONS: dict[str, Field] = {
    "nan": lambda t, y: torch.full_like(y, NAN),
    "late nan": lambda t, y: torch.where(t > 0.7, NAN, y),
    "stiff": lambda t, y: -600 * (y - torch.cos(t)),
    "restless": lambda t, y: 100 * torch.cos(100 * t) - 0 * y,
    "very restless": lambda t, y: 4500 * torch.cos(4500 * t) - 0 * y,
}
NUMBERS = {name: number for number, name in enumerate(COMPANIONS, 1)}
BAD = sorted(COMPANIONS.keys() - {"very restless"})


class Companied(nn.Module):
    """Rows whose last component is 0 follow ``inner``; others that of the companions whose number it is."""

    def __init__(self, inner: Field, companions: list[str]) -> None:
        super().__init__()
        self.inner, self.companions = inner, sorted(set(companions))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        state, kind = y[:, :-1], y[:, -1:]
        value = self.inner(t, state)
        for name in self.companions:
            value = torch.where(kind == NUMBERS[name], COMPANIONS[name](t, state), value)
        return torch.cat([value, torch.zeros_like(kind)], dim=1)


def good_rows(d: int, n: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    return torch.cat([states(d, n, dtype, seed), torch.zeros(n, 1, dtype=dtype)], dim=1)


def companions_of(names: list[str], d: int, dtype: torch.dtype) -> Tensor:
    kinds = torch.tensor([[NUMBERS[name]] for name in names], dtype=dtype)
    return torch.cat([torch.ones(len(names), d, dtype=dtype), kinds], dim=1)


def tolerance_of(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-12


def assert_rows_equal(found: Tensor, expected: Tensor, what: str = "states") -> None:
    """Row by row, in units of the row's largest entry."""
    assert found.shape == expected.shape
    assert torch.equal(torch.isnan(found), torch.isnan(expected)), f"{what}: other entries are NaN"
    flat, other = (x.detach().nan_to_num(nan=0.0).flatten(1) for x in (found, expected))
    scale = other.abs().amax(dim=1).clamp(min=1e-3)
    worst = ((flat - other).abs().amax(dim=1) / scale).max()
    assert worst <= tolerance_of(found.dtype), f"{what} differ by {float(worst):.2g} of their scale"


def assert_same_counts(found: Solution, expected: Solution, chosen: Tensor, kept: Tensor | None = None) -> None:
    """The rows found, all or those that are kept, have the counts of the chosen ones."""
    for name in ("status", "n_steps", "n_rejected", "n_evals"):
        own = getattr(found, name)
        assert torch.equal(own if kept is None else own[kept], getattr(expected, name)[chosen]), name


def states(d: int, n: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    return random_states(seed, n, d).to(dtype)


@cache
def in_full_company(kind: str, d: int, dtype: torch.dtype, rtol: float) -> Solution:
    with torch.no_grad():
        return solve(field_of(kind, d, dtype), states(d, 1000, dtype), [0.0, 0.7, 2.0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", DIMS)
@with_both_dtypes
@pytest.mark.parametrize("rtol", [1e-2, 1e-5])
def test_a_block_of_any_size_finds_what_a_thousand_rows_find(
    kind: str, d: int, dtype: torch.dtype, rtol: float
) -> None:
    field, y0, full = field_of(kind, d, dtype), states(d, 1000, dtype), in_full_company(kind, d, dtype, rtol)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(d))
    for size in SIZES:
        chosen = order[:size]
        with torch.no_grad():
            part = solve(field, y0[chosen], [0.0, 0.7, 2.0], rtol=rtol, atol=rtol)
        assert_rows_equal(part.y, full.y[chosen], f"states of {size} rows")
        if dtype == torch.float64:
            assert_same_counts(part, full, chosen)


@as_property
@given(
    kind=st.sampled_from(KINDS),
    n=st.sampled_from(SIZES[:6]),
    d=dims,
    dtype=dtypes,
    seed=seeds,
    method=st.sampled_from(ADAPTIVE),
)
def test_permuted_and_divided_rows_find_the_same(
    kind: str, n: int, d: int, dtype: torch.dtype, seed: int, method: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    field, y0 = field_of(kind, d, dtype), states(d, n, dtype, seed)
    order, cut = torch.randperm(n, generator=generator), int(torch.randint(1, n + 1, (), generator=generator))
    with torch.no_grad():
        whole = solve(field, y0, [0.0, 1.0], method=method, rtol=1e-2, atol=1e-4)
        for chosen in (order, order[:cut], order[cut - 1 :]):
            part = solve(field, y0[chosen], [0.0, 1.0], method=method, rtol=1e-2, atol=1e-4)
            assert_rows_equal(part.y, whole.y[chosen])
            if dtype == torch.float64:
                assert_same_counts(part, whole, chosen)


def check_beside(
    companions: list[str], kind: str, n: int, d: int, dtype: torch.dtype, seed: int, t: list[float]
) -> None:
    """Rows find what they find alone when companions stand anywhere among them."""
    field, good = Companied(field_of(kind, d, dtype), companions), good_rows(d, n, dtype, seed)
    order = torch.randperm(n + len(companions), generator=torch.Generator().manual_seed(seed))
    mixed, kept = torch.cat([good, companions_of(companions, d, dtype)])[order], order < n
    with torch.no_grad():
        alone = solve(field, good, t, max_num_steps=2000)
        beside = solve(field, mixed, t, max_num_steps=2000)
    chosen = order[kept]
    assert_rows_equal(beside.y[kept], alone.y[chosen])
    if dtype == torch.float64:
        assert_same_counts(beside, alone, chosen, kept)
    if "very restless" in companions:
        n_steps = beside.n_steps[order == n + companions.index("very restless")]
        assert alone.success and int(n_steps) >= 100 * int(alone.n_steps.max())


@as_property
@given(
    kind=st.sampled_from(KINDS),
    companions=st.lists(st.sampled_from(BAD), min_size=1, max_size=4),
    n=st.sampled_from(SIZES[:5]),
    d=dims,
    dtype=dtypes,
    seed=seeds,
)
def test_bad_companions_anywhere_leave_a_row_as_it_is_alone(
    kind: str, companions: list[str], n: int, d: int, dtype: torch.dtype, seed: int
) -> None:
    check_beside(companions, kind, n, d, dtype, seed, [0.0, 0.4, 1.0])


@settings(as_property, max_examples=6)
@given(
    kind=st.sampled_from(KINDS),
    companions=st.lists(st.sampled_from(BAD), max_size=2),
    n=st.sampled_from(SIZES[:5]),
    d=dims,
    dtype=dtypes,
    seed=seeds,
)
def test_a_row_that_needs_a_hundred_times_the_steps_changes_nothing(
    kind: str, companions: list[str], n: int, d: int, dtype: torch.dtype, seed: int
) -> None:
    check_beside([*companions, "very restless"], kind, n, d, dtype, seed, [0.0, 0.1, 0.25])


@pytest.mark.parametrize("n", SIZES[5:])
@pytest.mark.parametrize("d", DIMS)
@with_both_dtypes
def test_companions_leave_the_rows_of_a_large_batch_alone(n: int, d: int, dtype: torch.dtype) -> None:
    check_beside(["nan", "stiff", "very restless"], "built in", n, d, dtype, 7, [0.0, 0.1, 0.25])


@with_both_dtypes
@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_the_built_in_field_beside_a_row_that_is_no_number(d: int, dtype: torch.dtype, value: float) -> None:
    field, good = field_of("built in", d, dtype), states(d, 17, dtype)
    mixed = torch.cat([good[:9], torch.full((1, d), value, dtype=dtype), good[9:]])
    with torch.no_grad():
        alone, beside = (solve(field, y0, [0.0, 1.0]) for y0 in (good, mixed))
    assert_rows_equal(torch.cat([beside.y[:9], beside.y[10:]]), alone.y)
    assert int(beside.status[9]) == Status.NON_FINITE


@with_both_dtypes
def test_rows_with_times_of_their_own_find_what_they_find_alone(dtype: torch.dtype) -> None:
    field, y0 = field_of("built in", 6, dtype), states(6, 17, dtype)
    ends = torch.linspace(0.01, 10, 17, dtype=torch.float64)[
        torch.randperm(17, generator=torch.Generator().manual_seed(4))
    ]
    t = torch.stack([torch.zeros_like(ends), ends / 3, ends], dim=1)
    t[::3] = t[::3].flip(1)
    with torch.no_grad():
        beside = solve(field, y0, t, rtol=1e-5)
        for i in range(17):
            alone = solve(field, y0[i : i + 1], t[i : i + 1], rtol=1e-5)
            assert_rows_equal(beside.y[i : i + 1], alone.y, f"states of row {i}")


# --- gradients ---


def gradients(field: Field, y0: Tensor, rows: Tensor, gradient: str) -> Tensor:
    """Each row's gradient of a function of its own states."""
    start = y0[rows].clone().requires_grad_()
    weights = random_states(3, len(y0), 3 * y0.shape[1]).view(len(y0), 3, -1).to(y0)[rows]
    y = solve(field, start, [0.0, 0.4, 1.5], gradient=gradient, rtol=1e-4, atol=1e-5, max_num_steps=2000).y
    (found,) = torch.autograd.grad((weights * y).nansum() + y.square().nansum(), start)
    return found


@pytest.mark.filterwarnings("ignore:the two states of gradient='reversible' ended apart")
@as_property
@given(
    kind=st.sampled_from(KINDS),
    n=st.sampled_from(SIZES[:6]),
    d=dims,
    dtype=dtypes,
    seed=seeds,
    gradient=st.sampled_from(GRADIENTS),
)
def test_a_rows_gradient_does_not_depend_on_its_neighbours(
    kind: str, n: int, d: int, dtype: torch.dtype, seed: int, gradient: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    field, y0 = field_of(kind, d, dtype), states(d, n, dtype, seed)
    order, cut = torch.randperm(n, generator=generator), max(1, n // 3)
    whole = gradients(field, y0, torch.arange(n), gradient)
    for chosen in (order, order[:cut]):
        assert_rows_equal(gradients(field, y0, chosen, gradient), whole[chosen], "gradients")


# The adjoint cannot go back along a stiff row: its equation grows as fast as the row's own one decays.
@pytest.mark.parametrize(
    ("gradient", "companion"),
    [(g, c) for g in GRADIENTS for c in BAD if (g, c) != ("adjoint", "stiff")],
)
@with_both_dtypes
def test_a_rows_gradient_does_not_depend_on_a_bad_companion(gradient: str, companion: str, dtype: torch.dtype) -> None:
    field = Companied(function, [companion])
    good = good_rows(2, 5, dtype)
    mixed = torch.cat([good[:2], companions_of([companion], 2, dtype), good[2:]])
    rows = torch.tensor([0, 1, 3, 4, 5])
    start = mixed.clone().requires_grad_()
    y = solve(field, start, [0.0, 0.4, 1.5], gradient=gradient, rtol=1e-4, atol=1e-5, max_num_steps=2000).y
    weights = torch.linspace(-1, 1, 15, dtype=dtype).view(5, 3, 1)
    (beside,) = torch.autograd.grad((weights * y[rows]).sum(), start)
    start = good.clone().requires_grad_()
    y = solve(field, start, [0.0, 0.4, 1.5], gradient=gradient, rtol=1e-4, atol=1e-5, max_num_steps=2000).y
    (alone,) = torch.autograd.grad((weights * y).sum(), start)
    assert_rows_equal(beside[rows], alone, "gradients")


# --- fields that know their rows ---


@pytest.mark.parametrize("n", [1, 2, 3, 7, 15, 16, 17, 40])
@with_both_dtypes
@pytest.mark.parametrize("control", ["row", "batch"])
@pytest.mark.parametrize("method", ["tsit5", "bosh3", "rk4"])
def test_a_field_may_close_over_a_tensor_with_a_number_for_each_row(
    n: int, dtype: torch.dtype, control: str, method: str
) -> None:
    rate, y0 = torch.linspace(-1, 1, n, dtype=dtype).view(n, 1), torch.linspace(1, 2, n, dtype=dtype).view(n, 1)
    options = {"step_size": 0.05} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-5}
    solution = solve(lambda t, y: rate * y, y0, [0.0, 0.5, 1.0], method=method, step_control=control, **options)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    torch.testing.assert_close(solution.y[..., 0], y0 * torch.exp(rate * t), rtol=1e-3, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_tensor_with_a_number_for_each_row_serves_rows_that_end_at_different_times(gradient: str, n: int) -> None:
    # A solver that drops finished rows, or adds some, would pair numbers and rows wrongly.
    rate = torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1)
    ends = torch.linspace(2, 0.01, n, dtype=torch.float64)
    t = torch.stack([torch.zeros_like(ends), ends / 2, ends], dim=1)
    t[n // 2, 2] = NAN
    y0 = torch.linspace(1, 2, n, dtype=torch.float64).view(n, 1).requires_grad_()
    solution = solve(lambda t, y: rate * y, y0, t, gradient=gradient, rtol=1e-8, atol=1e-8)
    growth = torch.exp(rate * t).nan_to_num(nan=0.0)
    # Reversible steps are less exact where a field decays.
    rtol = 1e-5 if gradient == "reversible" else 1e-6
    torch.testing.assert_close(solution.y[..., 0].nan_to_num(nan=0.0), y0 * growth, rtol=rtol, atol=0)
    (found,) = torch.autograd.grad(solution.y.nansum(), y0)
    torch.testing.assert_close(found[:, 0], growth.sum(dim=1), rtol=rtol, atol=0)
