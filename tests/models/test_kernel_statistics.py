"""What kernels see, in one node of autograd: against the same in plain operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skode.models.kernel_statistics import FAR, LEAST, kernel_statistics, local_sums


def plain(dt: Tensor, values: Tensor, seen: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
    """The definition; the distance of the nearest row is a number that is divided out, not a function."""
    width = log_width.exp()
    half = 0.5 * ((dt.unsqueeze(1) - offset.unsqueeze(1)) / width.unsqueeze(1)).square()
    nearest = half.detach().amin(dim=2, keepdim=True).clamp(max=1e4)
    weight = torch.where(nearest - half > -40.0, (nearest - half).exp(), 0.0)
    time = dt.unsqueeze(2)
    count, total, late, product = (weight @ x for x in (seen, values, seen * time, values * time))
    mean, late, product = (x / (count + LEAST) for x in (total, late, product))
    slope = (product - mean * late) / width.unsqueeze(1)
    place = 3 * torch.tanh((late - offset.unsqueeze(1)) / (3 * width.unsqueeze(1)))
    density = torch.log1p((count + LEAST) * (8 - nearest).exp()) / 4 - 2
    return torch.stack([mean, slope, place, density], dim=2)


def rows(g: int, n: int, p: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Times after the references, values and masks; the last rows of some are padding, one reference is far away."""
    draws = torch.Generator().manual_seed(0)
    dt = 2 * torch.rand(g, n, generator=draws, dtype=torch.float64) - 1
    seen = (torch.rand(g, n, p, generator=draws, dtype=torch.float64) < 0.7).double()
    dt[0] += 3.0
    if g > 1:
        dt[1, n // 2 :], seen[1, n // 2 :] = FAR, 0.0
    return dt.to(dtype), (torch.randn(g, n, p, generator=draws, dtype=torch.float64) * seen).to(dtype), seen.to(dtype)


def windows(k: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    offset = torch.linspace(-1.0, 1.0, k, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (offset, (0.1 + 0.3 * offset.abs()).log())]


def assert_alike(
    own: Callable[..., Tensor], other: Callable[..., Tensor], data: list[Tensor], by: list[Tensor]
) -> None:
    """Values, gradients, and second derivatives, by the windows alone and by all inputs."""
    for of_data in (False, True):
        given = [x.detach().requires_grad_(of_data) for x in data]
        asked = [x.detach().requires_grad_() for x in by]
        values = [f(*given, *asked) for f in (own, other)]
        asked += given if of_data else []
        weight = torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        once = [torch.autograd.grad(x, asked, weight, retain_graph=True) for x in values]
        again = [torch.autograd.grad(x, asked, weight * x.detach(), create_graph=True) for x in values]
        twice = [torch.autograd.grad(sum(g.square().sum() for g in found), asked) for found in again]
        torch.testing.assert_close(values[0], values[1], rtol=1e-11, atol=1e-11)
        for first, second in ((once[0], once[1]), (twice[0], twice[1])):
            for ours, theirs in zip(first, second, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 9, 1, 5), (3, 1, 2, 4), (6, 12, 13, 8)])
def test_statistics_and_gradients_are_those_of_plain_operations(shape: tuple[int, int, int, int]) -> None:
    g, n, p, k = shape
    assert_alike(kernel_statistics, plain, list(rows(g, n, p)), windows(k))


def test_gradients_are_those_of_finite_differences_where_windows_are_wide() -> None:
    dt, values, seen = rows(5, 7, 2)
    dt[0] -= 3.0
    offset, log_width = windows(3)
    own = [offset, (log_width.detach() + 1.5).requires_grad_()]
    # The nearest row's distance counts as a constant; how much it matters is of the size of LEAST then.
    assert torch.autograd.gradcheck(
        lambda *w: kernel_statistics(dt, values, torch.ones_like(seen), *w), own, atol=1e-4, rtol=1e-4
    )


def test_passes_that_wait_for_their_gradient_keep_their_memory() -> None:
    first, second = rows(4, 9, 1), tuple(-x for x in rows(4, 9, 1)[:2])
    own = windows(5)
    expected = torch.autograd.grad(plain(*first, *own).sum(), own)
    one = kernel_statistics(*first, *own)
    kernel_statistics(second[0], second[1], first[2], *own)
    with torch.no_grad():
        kernel_statistics(second[0], second[1], first[2], *own)
    for retain in (True, False):
        torch.testing.assert_close(torch.autograd.grad(one.sum(), own, retain_graph=retain), expected)


def test_local_sums_and_their_gradients_are_those_of_plain_operations() -> None:
    def plain_sums(dt: Tensor, read: Tensor, log_width: Tensor) -> Tensor:
        far = (dt.unsqueeze(2) / log_width.exp()).square()
        return read.mT @ ((1 + far.detach().amin(dim=1, keepdim=True)) / (1 + far)).square()

    dt, values, seen = rows(6, 12, 3)
    log_width = torch.tensor([0.03, 0.3, 1.0], dtype=torch.float64).log()
    assert_alike(local_sums, plain_sums, [dt, torch.cat([seen, values], dim=2)], [log_width])


def test_transforms_of_torch_func_see_through() -> None:
    data, (offset, log_width) = rows(3, 6, 2), (x.detach() for x in windows(4))
    slope = torch.func.grad(lambda w: kernel_statistics(*data, offset, w).square().sum())(log_width)
    asked = log_width.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kernel_statistics(*data, offset, asked).square().sum(), asked)
    torch.testing.assert_close(slope, expected)
    each = torch.func.vmap(lambda w: kernel_statistics(*data, offset, w))(torch.stack([log_width, log_width + 0.1]))
    torch.testing.assert_close(each[1], kernel_statistics(*data, offset, log_width + 0.1))


def test_memory_that_was_made_in_inference_mode_serves_training() -> None:
    shape = (11, 13, 2)  # of no other test
    with torch.inference_mode():
        kernel_statistics(*rows(*shape), *windows(17))
    own = windows(17)
    kernel_statistics(*rows(*shape), *own).sum().backward()
    assert all(x.grad is not None for x in own)


def test_float32_is_as_exact_as_its_digits() -> None:
    single, double = torch.float32, torch.float64
    found = kernel_statistics(*rows(4, 40, 2, single), *windows(6, single))
    exact = kernel_statistics(*rows(4, 40, 2), *windows(6))
    torch.testing.assert_close(found.to(double), exact, rtol=1e-3, atol=1e-4)
