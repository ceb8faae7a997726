"""Training of a flow: flow matching, then maximum likelihood, the weights of the best held-out likelihood kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import DivergenceError, SolverError, warn
from skode.fields import FlowField, PlanarField, draw_probe
from skode.fields.trace import knows_trace
from skode.models.flow import ContinuousFlow, TrainingPass
from skode.models.odenet import SolverOptions
from skode.models.paths import LinearPath, MixturePath
from skode.training.gradients import set_gradients
from skode.training.loop import Epoch, Watcher
from skode.training.noise import RowNoise

BETAS = (0.9, 0.99)
N_WARM = 20  # updates over which the learning rate rises
AVERAGED = 50  # updates that the averaged weights look back over, about
LIKELIHOOD_RATE = 0.4  # of the learning rate of flow matching
CHECKS = 8  # validations in the likelihood phase
FAR_BEHIND = 0.2  # nats after flow matching that likelihood does not make up for
RISE_TO_COME = 0.3  # of what a candidate would gain if it rose on as it did last; rises get smaller
DIVERGED = 1e6  # times the first loss
DEAR_TRACE = 3  # dimensions, above which the trace of a user's field is estimated in training


@dataclass(frozen=True)
class FlowOptions:
    """How to train a flow.

    ``n_matching`` and ``n_likelihood`` are numbers of updates; the solver's error, squared and in units of the training
    tolerance, is penalised with ``error_penalty``, the kinetic energy with ``energy_penalty``, the Jacobian's squared
    norm with ``jacobian_penalty``. The phase of likelihood ends when the held-out likelihood has not risen by ``tol``
    in ``n_checks_no_change`` of its 8 checks.
    """

    n_matching: int
    n_likelihood: int
    batch_size: int
    learning_rate_init: float
    alpha: float = 0.0
    error_penalty: float = 0.0
    energy_penalty: float = 0.0
    jacobian_penalty: float = 0.0
    divergence: str = "auto"
    shuffle: bool = True
    tol: float = 0.0
    n_checks_no_change: int = CHECKS

    @property
    def n_rounds(self) -> int:
        """At most: flow matching, then likelihood from check to check."""
        return 1 + (math.ceil(self.n_likelihood / self.likelihood_updates) if self.n_likelihood else 0)

    @property
    def likelihood_updates(self) -> int:
        """From one check to the next."""
        return max(1, self.n_likelihood // CHECKS)


@dataclass
class FlowRows:
    """Standardised rows (n, d), their weights (n,), noise, context, and which rows are held out.

    ``noise`` has 2 d + 2 columns: for the path's time, its component, and 2 d for its start.
    """

    x: Tensor
    weights: Tensor
    noise: RowNoise
    held_out: Tensor
    context: Tensor | None = None

    @property
    def inside(self) -> Tensor:
        """The rows that are trained on."""
        return torch.nonzero(~self.held_out).view(-1)


@dataclass
class FlowHistory:
    """Mean losses between the checks of either phase, the checks' held-out log-likelihoods, evaluations a row.

    ``n_evals`` is of the last update, ``n_evals_curve`` has that of the last one before each check by likelihood.
    """

    matching_losses: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)
    n_evals: float = 0.0
    n_evals_curve: list[float] = field(default_factory=list)


class FlowTraining:
    """The state of a training run.

    Parameters
    ----------
    flow : ContinuousFlow
        Trained in place.
    path : LinearPath or MixturePath
        From the flow's base to the data.
    rows : FlowRows
    start : callable
        Draws (n, d) of the path's noise, of uniform numbers (n, 2 d).
    solver : SolverOptions
        Of training; validation goes to 1e-4 and 1e-5 at least.
    options : FlowOptions
    generator : torch.Generator
        Orders the batches.
    report : callable, optional
        Is given an :class:`Epoch` at each check.
    """

    def __init__(
        self,
        flow: ContinuousFlow,
        path: LinearPath | MixturePath,
        rows: FlowRows,
        start: Callable[[Tensor], Tensor],
        solver: SolverOptions,
        options: FlowOptions,
        generator: torch.Generator,
        report: Callable[[Epoch], None] | None = None,
    ) -> None:
        self.flow, self.path, self.rows, self.options, self.generator = flow, path, rows, options, generator
        self._report, self._began = report, time.perf_counter()
        self.solver, self._start = solver, start
        self.parameters = [p for p in flow.parameters() if p.requires_grad]
        self.history = FlowHistory()
        self._inside, self._order, self._position = rows.inside, rows.inside, 0
        self._visits = torch.zeros(len(rows.weights), dtype=torch.float64)
        self._average = [p.detach().clone() for p in self.parameters]
        self._first_step: float | None = None
        self._first_loss: float | None = None
        # By itself only where the exact trace takes many products: of a user's field that does not know it.
        known = isinstance(flow.field, FlowField | PlanarField) or knows_trace(flow.field)
        dear = not known and flow.base.n_dims > DEAR_TRACE
        self._estimates_trace = options.divergence == "hutchinson" or (options.divergence == "auto" and dear)
        self.n_updates = 0
        self._done, self._without, self._promised = 0, 0, math.inf
        self.failure: SolverError | None = None
        self.interrupted = False
        self.best, self._best_weights = -math.inf, [p.detach().clone() for p in self.parameters]

    # --- phases ---

    def match(self) -> None:
        """Flow matching (Lipman et al. 2023): fit the field to the paths' velocities, without any solve."""
        n = self.options.n_matching
        losses = self._updates(n, self.options.learning_rate_init, self.options.batch_size, self._matching_loss)
        self.history.matching_losses += losses
        if n:
            self.check()

    def maximise(self) -> bool:
        """Maximum likelihood through the solver, as far as the next check; whether there is more to do."""
        n, options = self.options.n_likelihood, self.options
        if not n:
            return False
        if not self._done:
            self._start_likelihood()
        some = min(options.likelihood_updates, n - self._done)
        before = self.best
        try:
            self.history.losses += self._likelihood_updates(some, self._done, n)
        except SolverError as error:
            self.failure = error
            return False
        self.history.n_evals_curve.append(self.history.n_evals)
        self._done += some
        last, score = self.history.validation_scores[-1], self.check()
        self._without = 0 if score > before + options.tol else self._without + 1
        self._promised = score + RISE_TO_COME * (score - last) * (n - self._done) / some
        return self._done < n and self._without < options.n_checks_no_change

    @property
    def promised(self) -> float:
        """The held-out log-likelihood that may be hoped for at the end."""
        return max(self.best, self._promised)

    def check(self) -> float:
        """The held-out rows' mean log-density by the averaged weights, error-controlled; the best weights are kept."""
        own = [p.detach().clone() for p in self.parameters]
        self._take(self._average)
        score = self.validation_score()
        if score > self.best:
            self.best, self._best_weights = score, [p.clone() for p in self._average]
        self.history.validation_scores.append(score)
        self._take(own)
        if self._report is not None:
            self._report(self.epoch)
        return score

    @property
    def epoch(self) -> Epoch:
        """What is known since the last check."""
        history = self.history
        losses = history.losses or history.matching_losses or [math.nan]
        seconds = time.perf_counter() - self._began
        return Epoch(self.n_updates, losses[-1], history.validation_scores[-1], history.n_evals, seconds)

    @contextmanager
    def at_best(self) -> Iterator[FlowTraining]:
        """For a while with the weights of the best check."""
        own = [p.detach().clone() for p in self.parameters]
        self._take(self._best_weights)
        try:
            yield self
        finally:
            self._take(own)

    def restore_best(self) -> None:
        """The weights of the best check."""
        self._take(self._best_weights)
        self._average = [p.clone() for p in self._best_weights]

    @torch.no_grad()
    def validation_score(self) -> float:
        """Of the weights as they are."""
        rows = torch.nonzero(self.rows.held_out).view(-1)
        if not len(rows):
            rows = self._inside
        rtol, atol = min(self.solver.rtol, 1e-4), min(self.solver.atol, 1e-5)
        tight = replace(self.solver, method="tsit5", rtol=rtol, atol=atol, step_size=None)
        found = self.flow.densities(self.rows.x[rows], tight, context=self._context(rows))
        weights = self.rows.weights[rows]
        score = float((weights * found.log_density).sum() / weights.sum())
        return score if math.isfinite(score) else -math.inf

    # --- updates ---

    def _updates(self, n: int, rate: float, batch_size: int, loss_of: Callable[[Tensor], Tensor]) -> list[float]:
        optimizer = torch.optim.Adam(self.parameters, betas=BETAS, weight_decay=self.options.alpha, fused=True)
        losses, total = [], torch.zeros(())
        every = max(1, n // 10)
        for k in range(n):
            self._set_rate(optimizer, rate * min((k + 1) / N_WARM, 1.0, 2 * (1 - k / n)))
            loss = loss_of(self._next_rows(batch_size))
            if self._first_loss is None:
                self._finite(float(loss.detach()))
            self._step(optimizer, loss)
            total = total + loss.detach()
            if (k + 1) % every == 0:
                losses.append(self._finite(float(total) / every))
                total = torch.zeros(())
        return losses

    def _start_likelihood(self) -> None:
        self.restore_best()
        self._adam = torch.optim.Adam(self.parameters, betas=BETAS, weight_decay=self.options.alpha, fused=True)

    def _likelihood_updates(self, n: int, done: int, of: int) -> list[float]:
        total = 0.0
        for k in range(done, done + n):
            share = min((k + 1) / N_WARM, 1.0, 2 * (1 - k / of))
            self._set_rate(self._adam, LIKELIHOOD_RATE * self.options.learning_rate_init * share)
            loss = self._likelihood_loss(self._next_rows(2 * self.options.batch_size))
            self._step(self._adam, loss)
            total += float(loss.detach())
        return [self._finite(total / n)]

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        set_gradients(self.parameters, gradients)
        optimizer.step()
        self.n_updates += 1
        torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters], 1 / AVERAGED)

    @staticmethod
    def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _matching_loss(self, rows: Tensor) -> Tensor:
        x1, u = self.rows.x[rows], self._draw(rows)
        eps = self._start(u[:, 2:])
        pairs = self.path.at(x1, u[:, :1].to(x1), eps.to(x1), u[:, 1:2].to(x1))
        field: Any = self.flow.field
        context = self._context(rows)
        velocity = field(pairs.t, pairs.x) if context is None else field(pairs.t, pairs.x, context)
        return self._weighted((velocity - pairs.velocity).square().mean(dim=1), rows)

    def _likelihood_loss(self, rows: Tensor) -> Tensor:
        x, options = self.rows.x[rows], self.options
        probe = None
        if self._estimates_trace or options.jacobian_penalty > 0:
            probe = draw_probe(*x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        training = TrainingPass(
            self._first_step,
            options.error_penalty > 0,
            options.energy_penalty,
            options.jacobian_penalty,
            "hutchinson" if self._estimates_trace else "exact",
            probe,
        )
        found = self.flow.densities(x, self.solver, training=training, context=self._context(rows))
        self._first_step = min(found.next_step, 1.0)
        self.history.n_evals = found.n_evals
        loss = -found.log_density
        if found.error is not None:
            loss = loss + options.error_penalty * found.error
        if found.penalty is not None:
            loss = loss + found.penalty
        return self._weighted(loss, rows)

    # --- rows ---

    def _next_rows(self, batch_size: int) -> Tensor:
        n = len(self._inside)
        if n <= batch_size:
            return self._inside
        if not self.options.shuffle:
            rows = self._inside[torch.arange(self._position, self._position + batch_size) % n]
            self._position = (self._position + batch_size) % n
            return rows
        if self._position + batch_size > n:
            self._order = self._inside[torch.randperm(n, generator=self.generator)]
            self._position = 0
        rows = self._order[self._position : self._position + batch_size]
        self._position += batch_size
        return rows

    def _draw(self, rows: Tensor) -> Tensor:
        self._visits[rows] += 1
        return self.rows.noise.draw(rows, self._visits[rows])

    def _context(self, rows: Tensor) -> Tensor | None:
        return None if self.rows.context is None else self.rows.context[rows]

    def _weighted(self, loss: Tensor, rows: Tensor) -> Tensor:
        weights = self.rows.weights[rows]
        return (weights * loss).sum() / weights.sum()

    @torch.no_grad()
    def _take(self, weights: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    def _finite(self, loss: float) -> float:
        self._first_loss = loss if self._first_loss is None else self._first_loss
        if not abs(loss) <= DIVERGED * max(abs(self._first_loss), 1.0):
            raise DivergenceError(
                f"training diverged: the loss became {loss} at learning_rate_init="
                f"{self.options.learning_rate_init:g}; lower learning_rate_init."
            )
        return loss


def train_flow(runs: list[FlowTraining], watcher: Watcher | None = None) -> FlowTraining:
    """Match all candidates, go on with those that may still win, and return the best at its best weights.

    A watcher sees a round of flow matching, then rounds of likelihood from check to check: the leader's numbers.
    """
    try:
        _train(runs, watcher)
    except KeyboardInterrupt:
        warn("Training interrupted by user.")
        for run in runs:
            run.interrupted = True
    best = _leader(runs)
    if best.failure is not None:
        warn(f"training by likelihood ended early: {best.failure}")
    best.restore_best()
    return best


def _train(runs: list[FlowTraining], watcher: Watcher | None) -> None:
    if watcher is not None:
        watcher.begin()
    for run in runs:
        run.check()  # what it starts from counts, too
        run.match()
        run.restore_best()
    going = [run for run in runs if run.options.n_likelihood]
    best = _leader(runs)
    going = [run for run in going if run.best >= best.best - FAR_BEHIND]
    stopped = watcher is not None and watcher.end(best.epoch, best.at_best)
    while going and not stopped:
        if watcher is not None:
            watcher.begin()
        going = [run for run in going if run.maximise()]
        best = _leader(runs)
        going = [run for run in going if run is best or run.promised > best.best]
        stopped = watcher is not None and watcher.end(best.epoch, best.at_best)


def _leader(runs: list[FlowTraining]) -> FlowTraining:
    return max(runs, key=lambda run: run.best)
