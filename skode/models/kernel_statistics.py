"""What windows in time see of observations: nodes of autograd, their derivatives written by hand.

For many small windows, where passes over memory rule: weights are computed in leased memory, and the way back goes to
the windows' parameters alone, since times and values are data in training. Whoever wants derivatives by these, or
within transforms of ``torch.func``, gets the same from plain operations.

The nearest row's distance counts as a constant in derivatives; it cancels but for :data:`LEAST`.

Symbols: G references, n rows about each, K windows, p channels. Of Gaussian windows ``u`` is a row's distance from the
centre in ``sqrt(2)`` widths; over the rows, ``c`` is the weights' sum, ``m`` the mean value, ``l`` the mean time and
``q`` the mean of their product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from skode.solver import wrapped
from skode.solver.arena import Lease, lease

FAR = 1e6  # where padding is
LEAST = 1e-6  # an observation's share of these is added to their number
FARTHEST = 1e4  # half squared distances of the nearest row that are told apart
SMALLEST, NONE = -40.0, -80.0  # log of a weight over the largest, and what less counts as: exp is slow of less
NOTHING = 8.0  # minus the log density of nothing
HALF = 0.5**0.5


def kernel_statistics(dt: Tensor, values: Tensor, seen: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
    """Weighted mean, slope, place and density of what windows see of each channel.

    A window looks at the time ``offset`` after the reference. The mean is 0 where nothing is seen; the slope is the
    covariance with the time over the width, the place the mean time from the window's centre over the width, bounded
    by 3, the density a quarter of the log of the observations' number. The nearest row has the weight 1, so that a
    window far from all rows (but not :data:`FARTHEST`) sees that one; the density knows how far it is.

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
    return _by_node(_Statistics, _plain_statistics, (dt, read), (offset, log_width))


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
    return _by_node(_LocalSums, _plain_sums, (dt, read), (log_width,))


def _by_node(
    node: type[torch.autograd.Function],
    plain: Callable[..., Tensor],
    data: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
) -> Tensor:
    """The same from a node or, where it would not do, from plain operations."""
    grad = torch.is_grad_enabled()
    if wrapped.active() or torch.compiler.is_compiling() or (grad and any(x.requires_grad for x in data)):
        return plain(*data, *parameters)
    keep = grad and any(x.requires_grad for x in parameters)
    found: Tensor = node.apply(keep, *data, *parameters)
    return found


class _Described(NamedTuple):
    """The statistics (G, p, K) of sums over rows, and their parts."""

    share: Tensor
    mean: Tensor
    late: Tensor
    slope: Tensor
    place: Tensor
    log_density: Tensor

    @staticmethod
    def of(sums: Tensor, nearest: Tensor, offset: Tensor, width: Tensor) -> _Described:
        count, total, time, product = sums.chunk(4, dim=1)
        count = count + LEAST
        share = 1 / count
        mean, late = total * share, time * share
        slope = (product * share - mean * late) / width
        place = torch.tanh((late - offset) / (3 * width))
        return _Described(share, mean, late, slope, place, count.log() - nearest)

    def stacked(self) -> Tensor:
        density = (softplus(self.log_density + NOTHING) - NOTHING) / 4
        found = torch.stack([self.mean, self.slope, 3 * self.place, density], dim=1)
        return found.permute(0, 3, 1, 2).contiguous()


def _plain_statistics(dt: Tensor, read: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
    width = log_width.exp()
    half = ((dt.unsqueeze(2) - offset) * (HALF / width)).square()
    nearest = half.detach().amin(dim=1, keepdim=True).clamp(max=FARTHEST)
    log_weight = nearest - half
    weight = torch.where(log_weight > SMALLEST, log_weight, NONE).exp()
    return _Described.of(read.mT @ weight, nearest, offset, width).stacked()


class _Statistics(torch.autograd.Function):
    """The statistics of columns ``read`` (G, n, 4 p), and their derivative by the windows' parameters."""

    @staticmethod
    def forward(ctx: Any, keep: bool, dt: Tensor, read: Tensor, offset: Tensor, log_width: Tensor) -> Tensor:
        width = log_width.exp()
        memory, u, weight = _pair(dt, len(offset))
        narrow = HALF / width
        torch.mul(dt.unsqueeze(2), narrow, out=u).sub_(offset * narrow)
        torch.mul(u, u, out=weight)
        nearest = weight.amin(dim=1, keepdim=True).clamp_(max=FARTHEST)
        torch.threshold_(torch.sub(nearest, weight, out=weight), SMALLEST, NONE).exp_()
        described = _Described.of(torch.bmm(read.mT, weight), nearest, offset, width)
        if keep:
            ctx.save_for_backward(dt, read, offset, log_width)
            ctx.seen = memory, u, weight, described
        return described.stacked()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiably(ctx, _plain_statistics, cotangent)
        _, read, offset, log_width = ctx.saved_tensors
        _, u, weight, (share, mean, late, slope, place, log_density) = ctx.seen
        width = log_width.exp()
        of_mean, of_slope, of_place, of_density = cotangent.permute(2, 0, 3, 1).contiguous()
        scaled, moved = of_slope / width, of_slope * slope
        off_centre = (1 - place.square()).mul_(of_place).div_(width)
        # Cotangents of c, c m, c l and c q: first those of m, l and q.
        sums = torch.stack([share, of_mean, off_centre, scaled], dim=1)
        sums[:, 1].addcmul_(scaled, late, value=-1)
        sums[:, 2].addcmul_(scaled, mean, value=-1)
        by_share = torch.addcmul(moved, of_mean, mean).addcmul_(off_centre, late)
        by_share.addcmul_(scaled, mean * late, value=-1)
        torch.mul(torch.sigmoid(log_density + NOTHING), of_density, out=sums[:, 0]).mul_(0.25).sub_(by_share)
        sums.mul_(share.unsqueeze(1))
        held = _leased(u.numel(), width)
        pulled = held.memory[: u.numel()].view(u.shape)
        torch.bmm(read, sums.flatten(1, 2), out=pulled).mul_(weight).mul_(u)
        by_centre = pulled.sum(dim=(0, 1))
        by_width = pulled.mul_(u).sum(dim=(0, 1))
        d_offset = (2 * HALF) * by_centre / width - off_centre.sum(dim=(0, 1))
        d_width = 2 * by_width - moved.sum(dim=(0, 1)) - (off_centre * (late - offset)).sum(dim=(0, 1))
        return None, None, None, d_offset, d_width


def _plain_sums(dt: Tensor, read: Tensor, log_width: Tensor) -> Tensor:
    far = (dt.unsqueeze(2) * (-log_width).exp()).square()
    nearest = far.detach().amin(dim=1, keepdim=True)
    return read.mT @ ((1 + nearest) / (1 + far)).square()


class _LocalSums(torch.autograd.Function):
    """The sums, and their derivative by the widths; ``far`` is ``(dt / width)^2``."""

    @staticmethod
    def forward(ctx: Any, keep: bool, dt: Tensor, read: Tensor, log_width: Tensor) -> Tensor:
        memory, far, weight = _pair(dt, len(log_width))
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
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiably(ctx, _plain_sums, cotangent)
        _, read, _ = ctx.saved_tensors
        _, far, weight = ctx.seen
        pulled = torch.bmm(read, cotangent).mul_(weight).mul_(far).div_(far + 1)
        return None, None, None, 4 * pulled.sum(dim=(0, 1))


def _differentiably(ctx: Any, plain: Callable[..., Tensor], cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions of parameters and cotangent, for higher derivatives."""
    inputs: Sequence[Tensor] = ctx.saved_tensors
    asked = [x for x, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
    found = iter(torch.autograd.grad(plain(*inputs), asked, cotangent, create_graph=True))
    return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _pair(dt: Tensor, n_windows: int) -> tuple[Lease[Tensor], Tensor, Tensor]:
    """Leased memory of two tensors (G, n, K)."""
    shape = (*dt.shape, n_windows)
    size = 2 * math.prod(shape)
    held = _leased(size, dt)
    one, other = held.memory[:size].view(2, *shape)
    return held, one, other


def _leased(size: int, like: Tensor) -> Lease[Tensor]:
    """A piece of memory of at least ``size`` numbers; powers of two, so that batches of nearly one size share."""
    full = 1 << math.ceil(math.log2(max(size, 1)))
    key = "windows in time", full, like.dtype, like.device
    return lease(key, lambda: like.new_empty(full), full * like.element_size())
