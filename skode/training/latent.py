"""Training of a latent ODE on windows of irregular series."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.exceptions import DivergenceError, SolverError, warn
from skode.models import LatentODE, Rows, Series
from skode.training.gradients import set_gradients
from skode.training.loop import Epoch, Watcher
from skode.training.windows import Batch, HeldOut, Panel, draw_batch, held_out_tasks, observed, split_parts

N_WARM = 20  # updates over which the learning rate rises
BETAS = (0.9, 0.99)
AVERAGED = 100  # updates that the averaged weights look back over, about
LARGEST_GRADIENT = 1.0  # norm
MANY_SERIES = 100  # from which on whole series are held out, else parts of all
MANY_TARGETS = 20  # the same where series have targets
MOST_HELD_OUT = 150
# What training's steps may be off (see :class:`HeldOutCheck`); else there are twice as many, up to a number for a unit
# of time.
STEP_ERROR, MOST_STEPS_PER_UNIT = 0.01, 16.0


@dataclass(frozen=True)
class LatentOptions:
    """How to train a latent ODE.

    ``n_updates`` of ``batch_size`` windows at a learning rate that falls as a cosine; ``alpha`` is AdamW's decay,
    ``kl_weight`` the divergence's weight after a linear warm-up over the first ``kl_warm_up`` of the updates;
    ``steps_per_unit`` RK4 steps are taken for a unit of time, more once those turn out too few for what is held out; of
    series longer than ``longest`` rows an update sees a stretch; with ``validate`` the weights of the best of
    ``n_checks`` held-out scores are kept, and training ends after ``n_checks_no_change`` without a better one, or in
    any case after ``stop_after`` updates.
    """

    n_updates: int = 3000
    batch_size: int = 100
    learning_rate_init: float = 8e-3
    alpha: float = 1e-4
    kl_weight: float = 0.3
    kl_warm_up: float = 0.1
    steps_per_unit: float = 4.0
    longest: int = 256
    validate: bool = True
    n_checks: int = 20
    n_checks_no_change: int = 20
    tol: float = 0.0
    shuffle: bool = True
    gradient: str = "discrete"
    stop_after: int | None = None

    @property
    def round_updates(self) -> int:
        """Updates from one check to the next."""
        return max(1, self.n_updates // self.n_checks)

    @property
    def last(self) -> int:
        """Updates at most."""
        return self.n_updates if self.stop_after is None else min(self.stop_after, self.n_updates)

    @property
    def n_rounds(self) -> int:
        """From check to check, at most."""
        return math.ceil(self.last / self.round_updates)


@dataclass
class LatentHistory:
    """Mean losses between the checks, held-out log-densities an observation, and the update whose weights stay.

    ``steps_per_unit`` are those that further updates would take; ``stopped``: a watcher or the user ended training.
    """

    losses: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)
    best_update: int = 0
    n_updates: int = 0
    steps_per_unit: float = 4.0
    stopped: bool = False


@dataclass(frozen=True, eq=False)
class LatentData:
    """What is trained on, what is held out (``in_parts`` of all series), and held-out series with their targets."""

    panel: Panel
    held_out: list[HeldOut]
    held_targets: tuple[Series, Tensor] | None = None
    in_parts: bool = False

    @staticmethod
    def split(
        series: Series,
        generator: torch.Generator,
        *,
        validate: bool = True,
        share: float = 0.1,
        windows: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> LatentData:
        """Hold out series where there are many (100 or more, 20 with targets), parts of all series otherwise.

        Parameters
        ----------
        series : Series
        generator : torch.Generator
        validate : bool, default=True
            Whether anything is held out. Nothing is of point processes.
        share : float, default=0.1
            Of many series, that is held out.
        windows : tensor of shape (B, 2), optional
            Times over which events were counted; from the first to the last row if not given.
        targets : tensor of shape (B, n_targets), optional
            Standardised; of each whole series.

        Returns
        -------
        LatentData
        """
        whole = Panel.of(series, windows, targets)
        if not validate or not series.mask.shape[1]:
            return LatentData(whole, [])
        n = series.n_series
        if n < (MANY_SERIES if targets is None else MANY_TARGETS):
            own, tasks = split_parts(whole.series, generator)
            tasks = [task._replace(inputs=whole.inputs) for task in tasks]
            return LatentData(Panel(own, whole.inputs, whole.windows, targets), tasks, in_parts=True)
        order = torch.randperm(n, generator=generator).to(series.times.device)
        n_held = min(max(1, int(share * n)), MOST_HELD_OUT)
        out, inside = order[:n_held].sort().values, order[n_held:].sort().values
        panel = Panel.of(series.take(inside), whole.windows[inside], None if targets is None else targets[inside])
        held = series.take(out)
        held_targets = None if targets is None else (observed(held), targets[out])
        return LatentData(panel, held_out_tasks(held, generator), held_targets)


def train_latent(
    model: LatentODE,
    data: LatentData,
    options: LatentOptions,
    generator: torch.Generator,
    report: Callable[[Epoch], None] | None = None,
    watcher: Watcher | None = None,
) -> LatentHistory:
    """Train a model in place: the evidence bound of windows decoded over their whole series.

    Parameters
    ----------
    model : LatentODE
    data : LatentData
    options : LatentOptions
    generator : torch.Generator
        On the CPU; all draws are its.
    report : callable, optional
        Is given an :class:`Epoch` at each check.
    watcher : Watcher, optional
        Of the rounds from check to check.

    Returns
    -------
    LatentHistory

    Raises
    ------
    DivergenceError
        If the loss leaves the finite numbers, or the dynamics cannot be solved any more.
    """
    run = _Run(model, data, options, generator, report)
    try:
        run.rounds(watcher)
    except KeyboardInterrupt:
        warn("Training interrupted by user.")
        run.history.stopped = True
    run.finish()
    return run.history


class _Run:
    """State of a training run."""

    def __init__(
        self,
        model: LatentODE,
        data: LatentData,
        options: LatentOptions,
        generator: torch.Generator,
        report: Callable[[Epoch], None] | None,
    ) -> None:
        self.model, self.data, self.options, self.generator = model, data, options, generator
        self.parameters = list(model.parameters())
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        matrices = [p for p in self.parameters if p.dim() > 1]
        others = [p for p in self.parameters if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=options.alpha, fused=fused)
        self.history = LatentHistory(steps_per_unit=options.steps_per_unit)
        self.n_updates = 0
        self._report, self._began = report, time.perf_counter()
        self._average = [p.detach().clone() for p in self.parameters]
        self._best, self._best_weights = -math.inf, self._average
        self._order = torch.empty(0, dtype=torch.int64)
        counts = data.panel.series.lengths
        self._trained = torch.nonzero(counts > 0).view(-1)
        self._first: float | None = None

    def rounds(self, watcher: Watcher | None) -> None:
        options, without = self.options, 0
        for start in range(0, options.last, options.round_updates):
            if watcher is not None:
                watcher.begin()
            better = self._round(range(start, min(start + options.round_updates, options.last)))
            without = 0 if better else without + 1
            self.history.stopped = watcher is not None and watcher.end(self._epoch, self._ended)
            if self.history.stopped or (self.data.held_out and without >= options.n_checks_no_change):
                return

    def _round(self, updates: range) -> bool:
        """Updates and a check; whether it found the best weights so far."""
        try:
            total = 0.0
            for k in updates:
                total += self._update(k)
            self._note(total / len(updates))
            return self._check()
        except SolverError as error:
            raise DivergenceError(
                f"training diverged after {self.n_updates} updates at learning_rate_init="
                f"{self.options.learning_rate_init:g}, {error}; lower learning_rate_init."
            ) from error

    def _update(self, k: int) -> float:
        options = self.options
        warm = max(1.0, options.kl_warm_up * options.n_updates)
        loss = latent_loss(
            self.model,
            self.data.panel,
            self._batch(),
            options.kl_weight * min(1.0, (k + 1) / warm),
            self.generator,
            self.history.steps_per_unit,
            options.gradient,
        )
        rate = 0.5 * (1 + math.cos(math.pi * k / options.n_updates)) * min(1.0, (k + 1) / N_WARM)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_init * rate
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        set_gradients(self.parameters, gradients)
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
        self.optimizer.step()
        self.n_updates += 1
        memory = min(AVERAGED, 1 + self.n_updates / 5)
        torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters], 1 / memory)
        return float(loss.detach())

    def _batch(self) -> Batch:
        """The next series of a random order; a small panel comes several times, in other windows."""
        n, size = len(self._trained), self.options.batch_size
        while len(self._order) < size:
            order = torch.randperm(n, generator=self.generator) if self.options.shuffle else torch.arange(n)
            self._order = torch.cat([self._order, order])
        ids, self._order = self._order[:size], self._order[size:]
        ids = self._trained[ids.to(self._trained.device)]
        thinned = not self.model.config.point_process
        return draw_batch(self.data.panel, ids, self.options.longest, self.generator, thinned=thinned)

    def _note(self, loss: float) -> None:
        self._first = loss if self._first is None else self._first
        if not math.isfinite(loss) or loss > 1e3 * (1 + abs(self._first)):
            raise DivergenceError(
                f"training diverged within {self.n_updates} updates: the loss became {loss:.3g} at "
                f"learning_rate_init={self.options.learning_rate_init:g}; lower learning_rate_init."
            )
        self.history.losses.append(loss)
        self.history.n_updates = self.n_updates

    def _check(self) -> bool:
        """Whether the averaged weights have the best held-out score so far; without any held out they always have."""
        score = None
        if self.data.held_out:
            own = [p.detach().clone() for p in self.parameters]
            self._take(self._average)
            found = check_held_out(self.model, self.data.held_out, self.history.steps_per_unit)
            score = found.score - held_out_error(self.model, self.data.held_targets)
            self._take(own)
            self.history.validation_scores.append(score)
            steps = self.history.steps_per_unit
            if found.step_error > STEP_ERROR and steps < MOST_STEPS_PER_UNIT:
                self.history.steps_per_unit = min(2 * steps, MOST_STEPS_PER_UNIT)
        better = score is None or score > self._best + self.options.tol
        if better:
            self._best = self._best if score is None else score
            self._best_weights = [p.clone() for p in self._average]
            self.history.best_update = self.n_updates
        seconds = time.perf_counter() - self._began
        self._epoch = Epoch(self.n_updates, self.history.losses[-1], score, math.nan, seconds)
        if self._report is not None:
            self._report(self._epoch)
        return better

    @contextmanager
    def _ended(self) -> Iterator[LatentHistory]:
        """See :class:`Watcher`."""
        own = [p.detach().clone() for p in self.parameters]
        self._take(self._best_weights)
        try:
            yield deepcopy(self.history)
        finally:
            self._take(own)

    def finish(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self._take(self._best_weights)

    @torch.no_grad()
    def _take(self, weights: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)


def latent_loss(
    model: LatentODE,
    panel: Panel,
    batch: Batch,
    kl_weight: float,
    generator: torch.Generator,
    steps_per_unit: float = 4.0,
    gradient: str = "discrete",
) -> Tensor:
    """The negative evidence bound of a batch, an observation (Chen et al. 2018, section 5; one sample).

    The events' part, for point processes, is the log-likelihood of an inhomogeneous Poisson process.
    """
    series = batch.series
    posterior = model.encode(series.where(batch.keep), batch.reference.unsqueeze(1))
    posterior = type(posterior)(posterior.mean[:, 0], posterior.log_std[:, 0])
    eps = torch.randn(posterior.mean.shape, generator=generator, dtype=torch.float64)
    rows = Rows(posterior.sample(eps.to(posterior.mean)), batch.reference, batch.ids)
    told = series.where(batch.decoded)
    index = told.index
    window = batch.windows if model.config.point_process else None
    path = model.path(
        rows, index, told.times, panel.inputs, steps_per_unit=steps_per_unit, window=window, gradient=gradient
    )
    total = log_likelihood(model, path.z, told)
    if path.expected is not None:
        known = None if panel.inputs is None else panel.inputs.at(batch.ids[index], told.times)
        total = total + model.field.rate(path.z, known).log().sum() - path.expected.sum()
    n_told = int(told.mask.sum()) + (len(index) if window is not None else 0)
    n_all = int(series.mask.sum()) + (len(index) if window is not None else 0)
    loss = kl_weight * posterior.divergence().sum() / max(n_all, 1) - total / max(n_told, 1)
    if panel.targets is not None:
        loss = loss + (model.targets(series) - panel.targets[batch.ids]).square().mean()
    return loss


def log_likelihood(model: LatentODE, z: Tensor, series: Series) -> Tensor:
    """Of all observations, at their states (N, d), summed."""
    if not series.mask.shape[1]:
        return z.new_zeros(())
    eta = model.decode(z, series.static[series.index])
    return (model.likelihood.log_prob(eta, series.values) * series.mask).sum()


class HeldOutCheck(NamedTuple):
    """Mean log-density of held-out observations, and what training's steps are off, squared.

    That is told of a normal channel in units of its mean squared error, of others in those of what is decoded.
    """

    score: float
    step_error: float


def check_held_out(model: LatentODE, tasks: list[HeldOut], steps_per_unit: float) -> HeldOutCheck:
    """Held-out observations along the posterior's mean, by twice as many steps (32 at most): predictions will be exact.

    A normal channel has the noise that suits it best, not the learned one: calibration comes later, and of what was
    read in training less is known than of what is held out. Models of targets predict no series: their steps are not
    looked at.
    """
    found = [_checked(model, task, steps_per_unit) for task in tasks]
    score, error = (sum(part) / len(found) for part in zip(*found, strict=True))
    return HeldOutCheck(score if math.isfinite(score) else -math.inf, error)


@torch.no_grad()
def _checked(model: LatentODE, task: HeldOut, steps_per_unit: float) -> HeldOutCheck:
    given, target, inputs = task
    reference = given.last
    mean = model.encode(given, reference.unsqueeze(1)).mean[:, 0]
    rows = Rows(mean, reference, torch.arange(given.n_series, device=reference.device))

    def decoded(steps: float) -> Tensor:
        path = model.path(rows, target.index, target.times, inputs, steps_per_unit=steps)
        return model.decode(path.z, target.static[target.index])

    coarse = decoded(steps_per_unit)
    eta = coarse if model.head is not None else decoded(2 * steps_per_unit)
    n = target.mask.sum(dim=0).to(eta.dtype)
    each = (model.likelihood.log_prob(eta, target.values) * target.mask).sum(dim=0)
    square, off = (((eta - x).square() * target.mask).sum(dim=0) / n.clamp(min=1) for x in (target.values, coarse))
    square = square.clamp(min=1e-12)
    profile = -0.5 * n * ((2 * math.pi * square).log() + 1)
    normal = torch.tensor([family == "gaussian" for family in model.config.families], device=n.device)
    total, share = torch.where(normal, profile, each).sum(), (n * off / torch.where(normal, square, 1.0)).sum()
    return HeldOutCheck(*(float(x) / max(float(n.sum()), 1.0) for x in (total, share)))


@torch.no_grad()
def held_out_error(model: LatentODE, held: tuple[Series, Tensor] | None) -> float:
    """Mean squared error of held-out series' targets; 0 without any."""
    if held is None:
        return 0.0
    series, targets = held
    return float((model.targets(series) - targets).square().mean())
