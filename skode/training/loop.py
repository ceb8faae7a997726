"""The one training loop: batches, Adam, schedule, stopping, the best weights of every member."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.exceptions import ConvergenceWarning, DivergenceError, SolverError, warn
from skode.models import ODENet, SolverOptions
from skode.runtime import to_numpy
from skode.training.data import Batch, TrainingRows
from skode.training.gradients import set_gradients
from skode.training.tasks import Task

N_CHECKS = 50  # validations in a full training run
BETAS = (0.9, 0.99)  # of Adam; few updates want a shorter memory than its usual 0.999


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; names as in scikit-learn's MLPClassifier.

    The learning rate is constant for the first half of the updates and then falls linearly to 0; ``decay=False`` keeps
    it constant throughout (for ``partial_fit``).
    """

    max_iter: int
    batch_size: int
    learning_rate_init: float
    alpha: float
    tol: float
    n_iter_no_change: int
    shuffle: bool = True
    decay: bool = True
    error_penalty: float = 0.0
    energy_penalty: float = 0.0


class Epoch(NamedTuple):
    """What is known after an epoch."""

    number: int
    loss: float
    validation_score: float | None
    n_evals: float
    seconds: float


class Watcher(Protocol):
    """Sees the epochs of a training run, or its rounds from check to check, begin and end."""

    def begin(self) -> None:
        """An epoch begins."""

    def end(self, epoch: Epoch, ended: Callable[[], AbstractContextManager[Any]]) -> bool:
        """It is over; True ends training.

        Within ``ended()`` the model has the weights that it would end with now; it gives what training would return.
        """


@dataclass
class History:
    """The course of a training run."""

    loss_curve: list[float] = field(default_factory=list)
    validation_scores: list[float] | None = None
    validation_epochs: list[int] | None = None
    n_evals_curve: list[float] = field(default_factory=list)
    moments: list[NDArray[Any]] | None = None

    @property
    def n_iter(self) -> int:
        """Epochs that were run."""
        return len(self.loss_curve)

    @property
    def n_evals(self) -> float:
        """The field's evaluations a row in the last epoch."""
        return self.n_evals_curve[-1] if self.n_evals_curve else 0.0


def train(
    model: ODENet,
    task: Task,
    rows: TrainingRows,
    solver: SolverOptions,
    options: TrainingOptions,
    generator: torch.Generator,
    *,
    moments: list[NDArray[Any]] | None = None,
    report: Callable[[Epoch], None] | None = None,
    watcher: Watcher | None = None,
) -> History:
    """Train ``model`` in place.

    Parameters
    ----------
    model : ODENet
    task : Task
    rows : TrainingRows
        With folds, every member ends at its weights of lowest loss on the fold that it leaves out.
    solver : SolverOptions
    options : TrainingOptions
    generator : torch.Generator
        Orders the batches.
    moments : list of arrays, optional
        Adam's state from an earlier call, for incremental training.
    report : callable, optional
        Called with each epoch.
    watcher : Watcher, optional
        Of the epochs.

    Returns
    -------
    History

    Raises
    ------
    DivergenceError
        If the loss leaves the finite numbers or explodes, or the dynamics become unsolvable.
    SolverError
        If the dynamics cannot be solved from the start.
    """
    run = _Run(model, task, rows, solver, options, generator)
    if moments is not None:
        run.optimizer.restore(moments)
    try:
        run.epochs(report, watcher)
    except KeyboardInterrupt:
        if rows.peers.size > 1:
            raise  # the others would wait
        warn("Training interrupted by user.")
    if run.validation is not None:
        run.validation.restore_best()
    run.history.moments = run.optimizer.moments()
    return run.history


class _Run:
    """State of a training run between its batches."""

    def __init__(
        self,
        model: ODENet,
        task: Task,
        rows: TrainingRows,
        solver: SolverOptions,
        options: TrainingOptions,
        generator: torch.Generator,
    ) -> None:
        self.model, self.task, self.rows, self.solver, self.options = model, task, rows, solver, options
        self.generator = generator if options.shuffle else None
        self.optimizer = _Adam(model)
        self.history = History()
        self.validation = None if rows.folds is None else _Validation(self)
        self.first_step = model.config.t1
        self.n_updates = 0
        self._n_batches = max(1, round(rows.n_rows / options.batch_size))

    def epochs(self, report: Callable[[Epoch], None] | None, watcher: Watcher | None) -> None:
        start = time.perf_counter()
        every = max(1, self.options.max_iter // N_CHECKS)
        for epoch in range(self.options.max_iter):
            if watcher is not None:
                watcher.begin()
            score = None
            last = epoch + 1 == self.options.max_iter
            with self._named_as_divergence():
                self._epoch(epoch)
                if self.validation is not None and ((epoch + 1) % every == 0 or last):
                    score = self.validation.check(epoch)
            seconds = time.perf_counter() - start
            told = Epoch(epoch + 1, self.history.loss_curve[-1], score, self.history.n_evals, seconds)
            if report is not None:
                report(told)
            stop = watcher is not None and watcher.end(told, self._ended)
            if self.rows.peers.any(stop) or self._has_settled(epoch):
                return
        self._warn_if_falling()

    @contextmanager
    def _named_as_divergence(self) -> Iterator[None]:
        """Dynamics that training has made unsolvable."""
        try:
            yield
        except SolverError as error:
            if self.n_updates == 0:
                raise
            raise DivergenceError(
                f"training diverged after {self.n_updates} updates at learning_rate_init="
                f"{self.options.learning_rate_init:g}, {error}; lower learning_rate_init."
            ) from error

    @contextmanager
    def _ended(self) -> Iterator[History]:
        """See :class:`Watcher`."""
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        if self.validation is not None:
            self.validation.restore_best()
        try:
            yield replace(deepcopy(self.history), moments=self.optimizer.moments())
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), own, strict=True):
                    parameter.copy_(value)

    def _epoch(self, epoch: int) -> None:
        total, n_evals = torch.zeros((), dtype=self.rows.X.dtype, device=self.rows.X.device), 0.0
        n = 0
        for n, batch in enumerate(self.rows.batches(self.options.batch_size, self.generator), start=1):
            progress = (epoch + (n - 1) / self._n_batches) / self.options.max_iter
            rate = self.options.learning_rate_init
            if self.options.decay:
                rate *= min(1.0, 2 * (1 - progress))
            loss, evals = self._step(batch, rate)
            total += loss
            n_evals += evals
        self.history.n_evals_curve.append(n_evals / n)
        self._note_loss(float(total) / n)

    def _step(self, batch: Batch, rate: float) -> tuple[Tensor, float]:
        """One update; the loss that is told is the mean over members."""
        options, model = self.options, self.model
        output = model(
            batch.X,
            self.solver,
            first_step=self.first_step,
            control=self.rows.control(batch),
            error=options.error_penalty > 0,
            energy=options.energy_penalty > 0,
        )
        self.first_step = min(output.next_step, model.config.t1)
        shares = batch.weights / batch.totals.unsqueeze(1)
        loss = (shares * self.task.loss(output.values, batch.target)).sum(dim=1)
        objective = loss
        if options.error_penalty > 0:
            objective = objective + options.error_penalty * (shares * output.error).sum(dim=1)
        if output.energy is not None:
            objective = objective + options.energy_penalty * (shares * output.energy).sum(dim=1)
        gradients = torch.autograd.grad(objective.sum(), self.optimizer.parameters, allow_unused=True)
        # A gradient is missing where a user's field does not use a parameter.
        found = [gradient for gradient in gradients if gradient is not None]
        mean, *found = self.rows.peers.total([loss.detach().mean(), *found])
        gradients = tuple(None if gradient is None else found.pop(0) for gradient in gradients)
        self.optimizer.step(gradients, rate, options.alpha / float(batch.totals.mean()))
        self.n_updates += 1
        return mean, output.n_evals

    def _note_loss(self, loss: float) -> None:
        curve = self.history.loss_curve
        curve.append(loss)
        if not math.isfinite(loss) or loss > 1e3 * (1 + curve[0]) or (len(curve) == 1 and loss > 1e6):
            raise DivergenceError(
                f"training diverged in epoch {len(curve)}: the loss went from {curve[0]:.3g} to {loss:.3g} at "
                f"learning_rate_init={self.options.learning_rate_init:g}; lower learning_rate_init."
            )

    def _has_settled(self, epoch: int) -> bool:
        """No member's validation loss, or the training loss, fell by ``tol`` for ``n_iter_no_change`` epochs."""
        patience = self.options.n_iter_no_change
        if self.validation is not None:
            return epoch - self.validation.last_improvement >= max(patience, self.options.max_iter // 4)
        curve = self.history.loss_curve
        if len(curve) <= patience:
            return False
        return min(curve[-patience:]) > min(curve[:-patience]) - self.options.tol

    def _warn_if_falling(self) -> None:
        curve = self.history.loss_curve
        window = max(1, len(curve) // 10)
        settled = self.validation is not None and self.validation.last_improvement < len(curve) - 1
        if not self.options.decay or settled:
            return
        if len(curve) == 1 or curve[-1 - window] - curve[-1] > window * self.options.tol:
            warn(
                f"Maximum iterations (max_iter={self.options.max_iter}) reached and the loss still falls "
                f"(now {curve[-1]:.4g}); raise max_iter.",
                ConvergenceWarning,
            )


class _Validation:
    """Losses of the members on the rows that they leave out, and their best weights so far."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        n_members = run.model.config.n_members
        self._best = torch.full((n_members,), math.inf, dtype=torch.float64)
        self._weights: list[list[Tensor]] = [[] for _ in range(n_members)]
        self.last_improvement = 0
        run.history.validation_scores, run.history.validation_epochs = [], []

    @torch.no_grad()
    def check(self, epoch: int) -> float:
        """Validate, keep what improved, and return the score."""
        run = self._run
        parts = [self._solve(batch) for batch in run.rows.validation()]
        parts = [part for own in run.rows.peers.gather(parts) for part in own]
        loss, values, target, weights = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        losses = ((weights * loss).sum(dim=1) / weights.sum(dim=1)).cpu().double()
        if bool((losses < self._best - run.options.tol).any()):
            self.last_improvement = epoch
        for m in torch.nonzero(losses < self._best).view(-1).tolist():
            self._weights[m] = [parameter.clone() for parameter in run.model.member_parameters(m)]
            self._best[m] = losses[m]
        score = run.task.score(values, target, weights)
        assert run.history.validation_scores is not None and run.history.validation_epochs is not None
        run.history.validation_scores.append(score)
        run.history.validation_epochs.append(epoch + 1)
        return score

    def _solve(self, batch: Batch) -> tuple[Tensor, ...]:
        """Loss, values, targets and weights of a slice of the left-out rows."""
        run = self._run
        values = run.model(batch.X, run.solver, first_step=run.first_step, control=run.rows.control(batch)).values
        found = run.task.loss(values, batch.target), values, batch.target, batch.weights
        return tuple(part.cpu() for part in found)  # as they are told to other processes

    @torch.no_grad()
    def restore_best(self) -> None:
        """Give every member its best weights back."""
        for m, weights in enumerate(self._weights):
            for parameter, best in zip(self._run.model.member_parameters(m), weights, strict=bool(weights)):
                parameter.copy_(best)


class _Adam:
    """torch's Adam with the L2 term on weights alone, and a state that travels as NumPy arrays."""

    def __init__(self, model: ODENet) -> None:
        weights, biases = model.weights_and_biases()
        fused = weights[0].device.type in ("cpu", "cuda")
        groups = [{"params": weights}, *([{"params": biases}] if biases else [])]
        self._adam = torch.optim.Adam(groups, betas=BETAS, fused=fused)
        self.parameters = [*weights, *biases]

    def step(self, gradients: Sequence[Tensor | None], rate: float, decay: float) -> None:
        set_gradients(self.parameters, gradients)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.param_groups[0]["weight_decay"] = decay
        self._adam.step()

    def moments(self) -> list[NDArray[Any]]:
        """Step counts and moments of all parameters, in order."""
        kept: list[NDArray[Any]] = []
        for parameter in self.parameters:
            state = self._adam.state.get(parameter, {})
            zeros = torch.zeros_like(parameter)
            kept.append(np.array(float(state.get("step", 0.0))))
            kept += [to_numpy(state.get(name, zeros)) for name in ("exp_avg", "exp_avg_sq")]
        return kept

    def restore(self, moments: list[NDArray[Any]]) -> None:
        """Take up what :meth:`moments` gave."""
        for i, parameter in enumerate(self.parameters):
            step, mean, square = moments[3 * i : 3 * i + 3]
            self._adam.state[parameter] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=parameter.device),
                "exp_avg": _laid_out(mean, parameter),
                "exp_avg_sq": _laid_out(square, parameter),
            }


def _laid_out(values: NDArray[Any], parameter: Tensor) -> Tensor:
    """Numbers in a parameter's layout of memory, as the fused optimizer reads them."""
    return torch.empty_like(parameter).detach().copy_(torch.from_numpy(values))
