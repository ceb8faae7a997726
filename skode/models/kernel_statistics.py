"""What windows in time see of observations: nodes of autograd, their derivatives written by hand.

For many small windows, where passes over memory rule: weights are computed in leased memory, and in training the way
back goes to the windows' parameters alone, since times and values are data.

Symbols: G references, n rows about each, K windows, p channels. Of Gaussian windows ``u`` is a row's distance from the
centre in ``sqrt(2)`` widths; over the rows, ``c`` is the weights' sum, ``m`` the mean value, ``l`` the mean time and
``q`` the mean of their product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skode.solver.arena import Lease, lease

FAR = 1e6  # where padding is
LEAST = 1e-6  # an observation's share of these is added to their number
FARTHEST = 1e4  # half squared distances of the nearest row that are told apart
SMALLEST = -40.0  # log of a weight over the largest; less is 0: subnormal numbers would be slow
NOTHING = 8.0  # less the log density of nothing
PARTS = 4
HALF = 0.5**0.5


def kernel_statistics(dt: Tensor, values: Tensor, seen: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
    """Weighted mean, slope, place and density of what windows see of each channel.

    A window looks at the time ``offset`` after the reference. The mean is 0 where nothing is seen; the slope is the
    covariance with the time over the width, the place the mean time from the window's centre over the width, bounded
    by 3, the density a quarter of the log of the observations' number. The nearest row has the weight 1, so that a
    window far from all rows sees that one; the density knows how far it is.

    Parameters
    ----------
    dt : tensor of shape (G, n)
        Times of rows after the reference, :data:`FAR` where there is none.
    values : tensor of shape (G, n, p)
        0 where not seen.
    seen : tensor of shape (G, n, p)
        0 or 1.
    offset, log_width : tensors of shape (K,)

    Returns
    -------
    tensor of shape (G, K, 4, p)
    """
    time = dt.unsqueeze(2)
    read = torch.cat([seen, values, seen * time, values * time], dim=2)
    inputs = dt, read, offset, log_width
    found: Tensor = _Statistics.apply(_any_asks(inputs), *inputs)  # type: ignore[no-untyped-call]
    return found


def _any_asks(inputs: Sequence[Tensor]) -> bool:
    """Whether any is to get a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class _Seen(NamedTuple):
    """What the way back needs: of all rows (G, n, K) and of the statistics (G, p, K)."""

    memory: Lease[Tensor]
    u: Tensor
    weight: Tensor
    share: Tensor
    mean: Tensor
    late: Tensor
    slope: Tensor
    place: Tensor
    log_density: Tensor


class _Statistics(torch.autograd.Function):
    """The statistics of columns ``read`` (G, n, 4 p), and their exact derivative by the windows' parameters."""

    @staticmethod
    def forward(ctx: Any, keep: bool, dt: Tensor, read: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
        width = log_width.exp()
        (g, n), k, p = dt.shape, len(offset), read.shape[2] // PARTS
        memory = _leased(2 * g * n * k, dt)
        u, weight = (piece.view(g, n, k) for piece in memory.memory[: 2 * g * n * k].chunk(2))
        narrow = HALF / width
        torch.mul(dt.unsqueeze(2), narrow, out=u).sub_(offset * narrow)
        torch.mul(u, u, out=weight)
        nearest = weight.amin(dim=1, keepdim=True).clamp_(max=FARTHEST)
        torch.threshold_(torch.sub(nearest, weight, out=weight), SMALLEST, -math.inf).exp_()
        count, total, time, product = torch.bmm(read.mT, weight).split(p, dim=1)
        share = (count + LEAST).reciprocal_()
        mean, late, both = total * share, time * share, product * share
        slope = torch.addcmul(both, mean, late, value=-1).div_(width)
        place = ((late - offset) / (3 * width)).tanh_()
        log_density = (count + LEAST).log_().sub_(nearest)
        density = torch.logaddexp(log_density, log_density.new_tensor(-NOTHING)) / 4
        if keep:
            ctx.save_for_backward(read, offset, width)
            ctx.seen = _Seen(memory, u, weight, share, mean, late, slope, place, log_density)
        return torch.stack([mean, slope, 3 * place, density], dim=1).permute(0, 3, 1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        read, offset, width = ctx.saved_tensors
        seen: _Seen = ctx.seen
        of_mean, of_slope, of_place, of_density = cotangent.permute(2, 0, 3, 1).contiguous()
        scaled, moved = of_slope / width, of_slope * seen.slope
        off_centre = (1 - seen.place.square()).mul_(of_place).div_(width)
        # Cotangents of c, c m, c l and c q: first those of m, l and q.
        sums = torch.stack([seen.share, of_mean, off_centre, scaled], dim=1)
        sums[:, 1].addcmul_(scaled, seen.late, value=-1)
        sums[:, 2].addcmul_(scaled, seen.mean, value=-1)
        by_share = torch.addcmul(moved, of_mean, seen.mean).addcmul_(off_centre, seen.late)
        by_share.addcmul_(scaled, seen.mean * seen.late, value=-1)
        torch.mul(torch.sigmoid(seen.log_density + NOTHING), of_density, out=sums[:, 0]).mul_(0.25).sub_(by_share)
        sums.mul_(seen.share.unsqueeze(1))
        held = _leased(seen.u.numel(), width)
        pulled = held.memory[: seen.u.numel()].view(seen.u.shape)
        torch.bmm(read, sums.flatten(1, 2), out=pulled).mul_(seen.weight).mul_(seen.u)
        by_centre = pulled.sum(dim=(0, 1))
        d_dt = (pulled @ (-2 * HALF / width)) if ctx.needs_input_grad[1] else None
        d_read = torch.bmm(seen.weight, sums.flatten(1, 2).mT) if ctx.needs_input_grad[2] else None
        by_width = pulled.mul_(seen.u).sum(dim=(0, 1))
        d_offset = (2 * HALF) * by_centre / width - off_centre.sum(dim=(0, 1))
        d_width = 2 * by_width - moved.sum(dim=(0, 1)) - (off_centre * (seen.late - offset)).sum(dim=(0, 1))
        return None, d_dt, d_read, d_offset, d_width


def local_sums(dt: Tensor, read: Tensor, log_width: Tensor) -> Tensor:
    """Sums of columns over rows, weighted by ``(1 + (dt / width)^2)^-2``, the nearest row by 1.

    Parameters
    ----------
    dt : tensor of shape (G, n)
        Times of rows after the reference, :data:`FAR` where there is none.
    read : tensor of shape (G, n, q)
        Columns.
    log_width : tensor of shape (K,)

    Returns
    -------
    tensor of shape (G, q, K)
    """
    inputs = dt, read, log_width
    found: Tensor = _LocalSums.apply(_any_asks(inputs), *inputs)  # type: ignore[no-untyped-call]
    return found


class _LocalSums(torch.autograd.Function):
    """The sums, and their exact derivative; ``far`` is ``(dt / width)^2``."""

    @staticmethod
    def forward(ctx: Any, keep: bool, dt: Tensor, read: Tensor, log_width: Tensor) -> Tensor:
        (g, n), k = dt.shape, len(log_width)
        memory = _leased(2 * g * n * k, dt)
        far, weight = (piece.view(g, n, k) for piece in memory.memory[: 2 * g * n * k].chunk(2))
        torch.mul(dt.unsqueeze(2), (-log_width).exp(), out=far)
        far.mul_(far)
        nearest = far.amin(dim=1, keepdim=True).add_(1)
        torch.add(far, 1, out=weight)
        torch.div(nearest, weight, out=weight)
        weight.mul_(weight)
        if keep:
            ctx.save_for_backward(dt, read, log_width)
            ctx.seen = memory, far, weight
        return torch.bmm(read.mT, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        dt, read, log_width = ctx.saved_tensors
        _, far, weight = ctx.seen
        pulled = torch.bmm(read, cotangent).mul_(weight).div_(far + 1)
        d_dt = -4 * dt * (pulled @ (-2 * log_width).exp()) if ctx.needs_input_grad[1] else None
        d_read = torch.bmm(weight, cotangent.mT) if ctx.needs_input_grad[2] else None
        return None, d_dt, d_read, 4 * pulled.mul_(far).sum(dim=(0, 1))


def _leased(size: int, like: Tensor) -> Lease[Tensor]:
    """A piece of memory of at least ``size`` numbers; powers of two, so that batches of nearly one size share."""
    full = 1 << math.ceil(math.log2(max(size, 1)))
    key = "kernel statistics", full, like.dtype, like.device
    return lease(key, lambda: like.new_empty(full), full * like.element_size())
