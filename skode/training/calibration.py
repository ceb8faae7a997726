"""What predictions miss, how far they may be off, and how far to hop ahead: learned from what was held out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode.models import LatentODE, Series
from skode.models.forecast import ForecastOptions, Missed, Outlook, compared, outlook, shifts
from skode.models.kriging import Kernel
from skode.models.predictive import Calibration, Predictive, Spread
from skode.training.windows import HeldOut, observed

STRIDES = (0.5, 0.25, None)
# A first guess of log factor, log growth and power inside and ahead, and how sure it is: where the noise is much larger
# than the error, the data do not tell the factor.
GUESS = ((0.2, -4.0, 0.5), (1.0, -2.0, 0.7))
SURE = ((0.15, 1.5, 0.3), (1.0, 1.5, 0.3))
SURE_OF_NOISE = 0.5
# Logarithm of the errors' degrees of freedom above 2: new series differ more than parts of the series of the training,
# on which few observations say little.
GUESSED_TAILS, SURE_OF_TAIL = (0.3, 1.1), 0.4  # inside, ahead
# For one value held out, and less by the root of their number: new series go further astray.
WIDER = (0.3, 1.2)
# Kernels that are tried, a guess among them, how sure it is, and by how much of twice the log-likelihood having none
# must be better: errors of new series are larger, and more alike nearby, than those of parts of series of the training.
KERNELS = tuple(Kernel(length, ratio) for length in (0.1, 0.2, 0.4, 0.8, 2.0) for ratio in (1.0, 4.0, 16.0, 64.0))
GUESSED_KERNEL, SURE_OF_KERNEL, WORTH = Kernel(0.8, 16.0), 2.0, 4.0
TAILS = torch.linspace(-1.0, 9.0, 201, dtype=torch.float64)
N_STEPS = 200


def choose_stride(model: LatentODE, tasks: list[HeldOut], options: ForecastOptions) -> float | None:
    """The stride whose forecasts of held-out observations have the best log-density.

    A different one than the first is taken only if it is better by more than a standard error of the paired difference
    over series.
    """
    scores = [_by_series(model, tasks, replace(options, stride=stride)) for stride in STRIDES]
    if not len(scores[0]):
        return STRIDES[0]
    best = 0
    for i in range(1, len(STRIDES)):
        gain = scores[i] - scores[best]
        if float(gain.mean()) > float(gain.std(correction=0)) / max(len(gain) - 1, 1) ** 0.5:
            best = i
    return STRIDES[best]


def _by_series(model: LatentODE, tasks: list[HeldOut], options: ForecastOptions) -> Tensor:
    """Mean log-density of each series' observations ahead, by the learned noise."""
    scores = []
    for task in tasks:
        ahead, found, own = _held_out_outlook(model, task, options, only_ahead=True)
        if not bool(ahead.any()):
            continue
        with torch.no_grad():
            each = (model.likelihood.log_prob(found.eta, own.values) * own.mask).sum(dim=1)
        index = own.index
        count = torch.bincount(index, own.mask.sum(dim=1).double(), minlength=own.n_series)
        total = torch.bincount(index, each.double(), minlength=own.n_series)
        scores.append((total / count.clamp(min=1))[count > 0])
    return torch.cat(scores) if scores else torch.zeros(0)


@torch.no_grad()
def _held_out_outlook(
    model: LatentODE, task: HeldOut, options: ForecastOptions, *, only_ahead: bool = False
) -> tuple[Tensor, Outlook, Series]:
    """Which held-out rows lie ahead of what is given, what is predicted of them, and they themselves."""
    given, target, ahead = _held_out(task)
    if only_ahead:
        target, ahead = target.where(ahead), ahead[ahead]
    return ahead, outlook(model, given, target.index, target.times, task.inputs, options), target


def _held_out(task: HeldOut) -> tuple[Series, Series, Tensor]:
    """What is given, the rows to be predicted of series that have anything given, and which of them lie ahead."""
    given, target = observed(task.given), task.target
    target = target.where((given.lengths > 0)[target.index])
    return given, target, target.times > given.last[target.index]


def distances(given: Series, query: Tensor, t: Tensor) -> Tensor:
    """How far (Q,) queries are from the nearest row of their series in ``given``; infinite if it has none."""
    given = observed(given)
    if not len(given.times):
        return torch.full_like(t, torch.inf)
    count = given.count_until(query, t)
    low, lengths = given.offsets[query], given.lengths[query]
    most = len(given.times) - 1
    before = torch.where(count > 0, t - given.times[(low + count - 1).clamp(0, most)], torch.inf)
    after = torch.where(count < lengths, given.times[(low + count).clamp(0, most)] - t, torch.inf)
    return torch.minimum(before, after)


def calibrate(model: LatentODE, tasks: list[HeldOut], options: ForecastOptions) -> Calibration:
    """The calibration that makes what was held out most likely.

    Parameters
    ----------
    model : LatentODE
    tasks : list of HeldOut
    options : ForecastOptions
        As it will predict.

    Returns
    -------
    Calibration
        Near a first guess where little was held out.
    """
    n_channels = len(model.config.families)
    normal = [channel for channel, family in enumerate(model.config.families) if family == "gaussian"]
    parts = [_compared(model, task, options, normal) for task in tasks]
    if not any(bool(part.mask.any()) for part in parts):
        return Calibration.plain(n_channels)
    chosen = {channel: kernel for channel in normal if (kernel := _kernel(parts, channel)) is not None}
    eta = torch.cat([part.eta + shifts(part.missed, chosen, part.eta) for part in parts])
    disagreement, y, mask, ahead, distance = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("disagreement", "y", "mask", "ahead", "distance")
    )
    kernels = tuple(chosen.get(channel) for channel in range(n_channels)) if chosen else ()
    return replace(_fitted(model, eta, disagreement, y, mask, ahead, distance), kernels=kernels)


@dataclass(frozen=True, eq=False)
class _Compared:
    """Held-out values ``y`` (Q, c) beside what is predicted of them, and what is missed of the observations."""

    eta: Tensor
    disagreement: Tensor
    y: Tensor
    mask: Tensor
    ahead: Tensor
    distance: Tensor
    missed: dict[int, Missed]


@torch.no_grad()
def _compared(model: LatentODE, task: HeldOut, options: ForecastOptions, channels: list[int]) -> _Compared:
    given, target, ahead = _held_out(task)
    found, missed = compared(model, given, target.index, target.times, task.inputs, options, channels)
    distance = distances(given, target.index, target.times)
    return _Compared(found.eta, found.disagreement, target.values, target.mask, ahead, distance, missed)


def _kernel(parts: list[_Compared], channel: int) -> Kernel | None:
    """The one that makes a channel's errors least likely to be that large, near a guess; None if none is worth it."""
    if not any(bool(part.mask[:, channel].any()) for part in parts):
        return None

    def cost(kernel: Kernel | None) -> float:
        """Twice the negative log-likelihood of errors whose variances, inside and ahead, suit them best."""
        total = WORTH if kernel is None else _doubt(kernel)
        sides: tuple[list[Tensor], list[Tensor]] = [], []
        for part in parts:
            error = part.y[:, channel] - part.eta[:, channel]
            if kernel is not None:
                error = error - part.missed[channel].correction(kernel)
            for side, own in zip(sides, (part.ahead, ~part.ahead), strict=True):
                side.append(error[own & part.mask[:, channel]].square())
        for squares in map(torch.cat, sides):
            if len(squares):
                total += len(squares) * math.log(max(float(squares.mean()), 1e-12))
        return total

    return min((None, *KERNELS), key=cost)


def _doubt(kernel: Kernel) -> float:
    length, ratio = kernel.length / GUESSED_KERNEL.length, kernel.ratio / GUESSED_KERNEL.ratio
    return SURE_OF_KERNEL * (math.log2(length) ** 2 + (0.5 * math.log2(ratio)) ** 2)


def _fitted(model: LatentODE, *held_out: Tensor) -> Calibration:
    """Maximum a posteriori by Adam, of values, disagreement, what was held out, its mask, side and distance."""
    eta, disagreement, y, mask, ahead, distance = (
        x.cpu().double() if x.is_floating_point() else x.cpu() for x in held_out
    )
    likelihood = model.likelihood
    guess = torch.tensor(GUESS, dtype=torch.float64)
    spreads = guess.clone().requires_grad_()
    noise = torch.zeros(eta.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([spreads, noise], lr=0.05)
    for _ in range(N_STEPS):
        values = spreads[ahead.long()]
        grown = values[:, 1].exp() * distance.clamp(min=1e-6) ** values[:, 2].clamp(min=0.0)
        spread = ((values[:, :1].exp() * disagreement).square() + grown.square().unsqueeze(1)).sqrt()
        predictive = Predictive(likelihood, eta, spread, noise.exp())
        log_prob = (predictive.log_prob(y) * mask).sum()
        doubt = ((spreads - guess) / torch.tensor(SURE, dtype=torch.float64)).square().sum()
        loss = -log_prob + 0.5 * doubt + 0.5 * (noise / SURE_OF_NOISE).square().sum()
        gradients = torch.autograd.grad(loss, [spreads, noise])
        spreads.grad, noise.grad = gradients
        optimizer.step()
    spreads = spreads.detach()
    normal = [i for i, family in enumerate(model.config.families) if family == "gaussian"]
    factors, degrees = tuple(noise.detach().exp().tolist()), []
    with torch.no_grad():
        off = (y - eta) / Predictive(likelihood, eta, spread, factors).std()
    for i, side in enumerate((~ahead, ahead)):
        degrees.append(_degrees(off[side][:, normal][mask[side][:, normal]], GUESSED_TAILS[i]))
        spreads[i, :2] += math.log1p(WIDER[i] / max(int(mask[side].sum()), 1) ** 0.5)
    inside, later = (Spread(float(own[0].exp()), float(own[1].exp()), max(float(own[2]), 0.0)) for own in spreads)
    return Calibration(inside, later, factors, degrees[0], degrees_ahead=degrees[1])


def _degrees(off: Tensor, guess: float) -> float:
    """Degrees of freedom of errors in units of their standard deviation: the most likely, near a guess for few."""
    each = torch.stack([_t_log_density(off, 2 + float(tail.exp())).sum() for tail in TAILS])
    best = TAILS[torch.argmax(each - 0.5 * ((TAILS - guess) / SURE_OF_TAIL).square())]
    return 2 + float(best.exp())


def _t_log_density(z: Tensor, degrees: float) -> Tensor:
    """Of Student's t with a variance of 1, up to a constant that is the same for all degrees."""
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees - 2)
    return constant - (degrees + 1) / 2 * torch.log1p(z.square() / (degrees - 2))
