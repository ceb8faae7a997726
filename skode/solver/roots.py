"""Roots of many functions at once, each within a bracket of its own.

The ITP method (Oliveira and Takahashi 2021, "An enhancement of the bisection method average performance preserving
minmax optimality", ACM TOMS 47(1)): secant steps, truncated and projected so that no bracket takes more than one
evaluation beyond what bisection would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TRUNCATION = 0.2
_MOST_STEPS = 80


def far_ends(
    value: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, at_a: Tensor, at_b: Tensor, tolerance: float
) -> Tensor:
    """Where functions change their signs: the ends of brackets ``[a, b]`` behind the changes.

    Parameters
    ----------
    value : callable
        From points ``(n,)`` to values ``(n,)``, each its own function's.
    a, b : tensors of shape (n,)
        ``a < b``, or ``a == b`` where nothing is asked for.
    at_a, at_b : tensors of shape (n,)
        The values there; at b they have the other sign, or are 0.
    tolerance : float
        Brackets are narrowed to twice this width.
    """
    sign = torch.where(at_b > at_a, 1.0, -1.0).to(a.dtype)
    low, high = sign * at_a, sign * at_b
    a = torch.where(high == 0, b, a)
    truncation = _TRUNCATION / (b - a).clamp(min=tolerance)
    radius = tolerance * 2 ** (torch.log2((b - a) / (2 * tolerance)).clamp(min=0).ceil() + 1)
    for _ in range(_MOST_STEPS):
        wide = b - a > 2 * tolerance
        if not bool(wide.any()):
            break
        x = torch.where(wide, _next_point(a, b, low, high, truncation, radius, tolerance), b)
        y = sign * value(x)
        behind = wide & (y >= 0)
        before = wide & ~behind
        a, low = torch.where(before | (wide & (y == 0)), x, a), torch.where(before, y, low)
        b, high = torch.where(behind, x, b), torch.where(behind, y, high)
        radius = radius / 2
    return b


def _next_point(
    a: Tensor, b: Tensor, low: Tensor, high: Tensor, truncation: Tensor, radius: Tensor, tolerance: float
) -> Tensor:
    """Interpolate, truncate, project."""
    middle = (a + b) / 2
    secant = (high * a - low * b) / (high - low)
    side = torch.sign(middle - secant)
    # At least the tolerance: a secant point that is right but for round-off would leave the other end where it is.
    shift = (truncation * (b - a).square()).clamp(min=tolerance)
    x = torch.where(shift <= (middle - secant).abs(), secant + side * shift, middle)
    reach = (radius - (b - a) / 2).clamp(min=0)
    return torch.where((x - middle).abs() <= reach, x, middle - side * reach)
