"""What the flows' estimators share: arguments, training, and the solvers of training and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.callback import CallbackSupportMixin
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor

from skode.estimators.arguments import SHARED_CONSTRAINTS, DocumentationLink
from skode.estimators.columns import Columns
from skode.estimators.fit_tasks import FitTask, Rounds
from skode.estimators.fitted_flow import (
    BASES,
    LOOSEST,
    Array,
    FieldPlan,
    FittedFlow,
    bounded_log_density,
    chunks,
    exact_solver,
    in_blocks,
    refuse_nan,
)
from skode.estimators.mixtures import Choice, fit_mixture
from skode.estimators.namespaces import ArrayNamespaces
from skode.estimators.stored import Stored
from skode.estimators.table import Table
from skode.models import Base, LinearPath, Mixture, MixturePath, Normal, SolverOptions, StudentT
from skode.models.flow import ContinuousFlow
from skode.runtime import resolve_device, resolve_dtype, row_keys, to_tensor, torch_dtype
from skode.solver import METHODS
from skode.training import Watcher
from skode.training.flow import FlowOptions, FlowRows, FlowTraining, train_flow
from skode.training.noise import RowNoise

FEWEST_ROWS = 40  # distinct ones, to hold some out by default
SAMPLE_TOLERANCE = 1e-4  # of rtol and atol: an error of a sample shall not be seen, one of a training step may
Fitted = tuple[FittedFlow | None, FlowTraining | None]
CELL_POINTS = 8  # places in a cell that a discrete value's density is averaged over
MATCHING_UPDATES = 7.5  # for each update by likelihood
FITTED_SHARE = 3  # a flow that starts at a fitted mixture takes so many times fewer


class BaseFlow(DocumentationLink, CallbackSupportMixin, Stored, ArrayNamespaces):
    """Arguments and training that densities and conditional densities have in common."""

    columns_: Columns
    _flows: list[FittedFlow | None]

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **SHARED_CONSTRAINTS,
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "objective": [StrOptions({"auto", "likelihood", "flow_matching"})],
        "base": [StrOptions({"auto", *BASES})],
        "n_members": [Interval(Integral, 1, None, closed="left")],
        "jacobian_penalty": [Interval(Real, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
    }

    def __init__(
        self,
        hidden_layer_sizes: Any,
        activation: str,
        objective: str,
        base: str,
        field: Callable[[int], torch.nn.Module] | None,
        n_members: int,
        energy_penalty: float,
        jacobian_penalty: float,
        error_penalty: float,
        method: str,
        rtol: float,
        atol: float,
        step_size: float | None,
        max_num_steps: int,
        gradient: str,
        device: str | torch.device,
        dtype: Any,
        alpha: float,
        batch_size: int,
        learning_rate_init: float,
        max_iter: int,
        shuffle: bool,
        random_state: Any,
        tol: float,
        verbose: bool | int,
        warm_start: bool,
        early_stopping: str | bool,
        validation_fraction: float,
        n_iter_no_change: int,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.objective = objective
        self.base = base
        self.field = field
        self.n_members = n_members
        self.energy_penalty = energy_penalty
        self.jacobian_penalty = jacobian_penalty
        self.error_penalty = error_penalty
        self.method = method
        self.rtol = rtol
        self.atol = atol
        self.step_size = step_size
        self.max_num_steps = max_num_steps
        self.gradient = gradient
        self.device = device
        self.dtype = dtype
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    @property
    def column_kinds_(self) -> NDArray[np.str_]:
        """What each column was taken for."""
        return self.columns_.kinds

    # --- training ---

    def _resolve(self, data_dtype: np.dtype[Any]) -> torch.device:
        """Device and, as ``dtype_``, the floating-point type of training."""
        device = resolve_device(self.device, self.dtype)
        self.dtype_ = resolve_dtype(self.dtype, data_dtype, device)
        return device

    def _plan(self, net: str, n_dims: int, n_context: int = 0) -> FieldPlan:
        sizes = np.atleast_1d(np.asarray(self.hidden_layer_sizes))
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or len(sizes) == 0 or sizes.min() < 1:
            raise ValueError(f"hidden_layer_sizes must be whole numbers above 0, got {self.hidden_layer_sizes!r}.")
        if net == "planar" and len(set(sizes.tolist())) > 1:
            raise ValueError(f"net='planar' has one layer; got hidden_layer_sizes={self.hidden_layer_sizes!r}.")
        if isinstance(self.field, torch.nn.Module):
            raise TypeError(
                "field is an nn.Module instance, which every clone and fold would share; pass a callable that makes "
                "one: field=lambda n_dims: MyField(n_dims), or the class itself."
            )
        return FieldPlan(net, n_dims, tuple(int(n) for n in sizes), self.activation, n_context, self.field)

    def _held_out(self, content: Array, weight: Array, seed: int, part: int = 0) -> NDArray[np.bool_]:
        """A part of the weight, chosen by the rows' content; other parts have other rows."""
        keys, distinct = np.unique(row_keys(content, seed), return_inverse=True)
        if self.early_stopping is False or (self.early_stopping == "auto" and len(keys) < FEWEST_ROWS):
            return np.zeros(len(content), dtype=bool)
        total = np.bincount(distinct, weights=weight)
        share = (np.cumsum(total) - total / 2) / weight.sum() - part * self.validation_fraction
        picked = (share >= 0) & (share < self.validation_fraction)
        if not picked.any() and self.early_stopping == "auto":
            # A row of large weight spans the part: the one nearest to its middle stands for it.
            picked[np.abs(share - self.validation_fraction / 2).argmin()] = True
        held: NDArray[np.bool_] = picked[distinct]
        if not held.any():
            raise ValueError(
                f"early_stopping with validation_fraction={self.validation_fraction} holds out none of {len(keys)} "
                "distinct rows; raise it, or set early_stopping=False."
            )
        return held

    def _flow_rows(
        self,
        Z: Array,
        weight: Array,
        held_out: NDArray[np.bool_],
        content: Array,
        seed: int,
        device: torch.device,
        context: Array | None = None,
    ) -> FlowRows:
        dtype = torch_dtype(self.dtype_)
        return FlowRows(
            to_tensor(Z, dtype, device),
            to_tensor(weight, dtype, device),
            RowNoise(content, 2 * Z.shape[1] + 2, seed),
            torch.from_numpy(held_out),
            None if context is None else to_tensor(context, dtype, device),
        )

    def _best_flow(
        self,
        plan: FieldPlan,
        bases: Iterable[Base],
        rows: FlowRows,
        options: FlowOptions,
        generator: torch.Generator,
        earlier: FittedFlow | None = None,
        watcher: Watcher | None = None,
    ) -> FlowTraining:
        """The candidate that training ends with, at its best weights; an earlier flow is the only one."""
        if earlier is not None and earlier.plan != plan:
            raise ValueError(
                f"warm_start goes on with the field of the last fit, {earlier.plan}; the arguments now make {plan}. "
                "Set them back, or fit with warm_start=False."
            )
        dtype, device = rows.x.dtype, rows.x.device
        if earlier is not None:
            flows = [earlier.build(dtype, device).train()]
        else:
            flows = [
                ContinuousFlow(plan.make(generator).to(dtype).to(device), base.to(dtype, device)) for base in bases
            ]
        report = Table(validated=True) if self.verbose else None
        runs = []
        for flow in flows:
            path: LinearPath | MixturePath = LinearPath()
            own = options
            if isinstance(flow.base, Mixture):
                path = MixturePath(flow.base)
                own = replace(options, n_matching=options.n_matching // FITTED_SHARE)
            start = start_of(flow.base)
            runs.append(FlowTraining(flow, path, rows, start, self._training_solver(), own, generator, report))
        return train_flow(runs, watcher)

    def _flow_options(self, matching: bool, likelihood: bool, divergence: str) -> FlowOptions:
        error_penalty = float(self.error_penalty) if METHODS[self._training_solver().method].adaptive else 0.0
        return FlowOptions(
            round(MATCHING_UPDATES * self.max_iter) if matching else 0,
            int(self.max_iter) if likelihood else 0,
            int(self.batch_size),
            float(self.learning_rate_init),
            float(self.alpha),
            error_penalty if self.gradient == "discrete" else 0.0,
            float(self.energy_penalty),
            float(self.jacobian_penalty),
            divergence,
            bool(self.shuffle),
            float(self.tol),
            int(self.n_iter_no_change),
        )

    def _bases(
        self, Z: Array, weight: Array, seed: int, candidates: tuple[str, ...], choice: Choice | None = None
    ) -> Iterable[Base]:
        """Bases that are fitted to standardised rows."""
        for name in candidates if self.base == "auto" else (self.base,):
            if name == "mixture":
                yield fit_mixture(Z, weight, seed, choice)
            elif name == "student_t":
                yield StudentT.fit(Z, weight)
            else:
                yield Normal.standard(Z.shape[1])

    def _earlier(self) -> list[FittedFlow | None]:
        """The flows that a warm start goes on with."""
        if len(self._flows) != self.n_members:
            raise ValueError(
                f"warm_start goes on with {len(self._flows)} flows; n_members={self.n_members} is another number."
            )
        return list(self._flows)

    @property
    def _n_subtasks(self) -> int:
        """Of a fit, at most: rounds of the only member, or members."""
        return self._n_rounds if self.n_members == 1 else int(self.n_members)

    @property
    def _n_rounds(self) -> int:
        return self._flow_options(True, self.objective != "flow_matching", "auto").n_rounds

    def _fit_members(
        self,
        task: FitTask,
        fits: Iterable[Callable[[Rounds], Fitted]],
        keep: Callable[[Any, list[Fitted]], None],
    ) -> None:
        """One after the other; ``keep`` does to an estimator what is done after all are, for callbacks before that."""
        done: list[Fitted] = []
        for fit in fits:
            member = task if self.n_members == 1 else task.subtask("member", self._n_rounds)
            done.append(fit(member.rounds("round", lambda fitted, found: keep(fitted, [*done, found]))))
            stopped = member is not task and member.end(lambda fitted: keep(fitted, done))
            run = done[-1][1]
            if stopped or (run is not None and run.interrupted):
                break
        keep(self, done)

    def _keep_members(self, members: list[Fitted]) -> None:
        """Fitted attributes: the flows, and what tells of the training."""
        self._flows = [flow for flow, _ in members]
        runs = [run for _, run in members if run is not None]
        self.n_parameters_ = sum(flow.n_parameters for flow in self._flows if flow is not None)
        longest = max(runs, key=lambda run: run.n_updates, default=None)
        self.n_iter_ = max(1, longest.n_updates if longest else 0)
        history = longest.history if longest else None
        self.validation_scores_ = list(history.validation_scores) if history else []
        self.loss_curve_ = list(history.losses or history.matching_losses) if history else []
        self.loss_ = self.loss_curve_[-1] if self.loss_curve_ else None
        self.best_loss_ = min(self.loss_curve_, default=None)
        self.n_evals_ = history.n_evals if history else 0.0
        self.n_evals_curve_ = history.n_evals_curve if history else []

    # --- densities ---

    def _table_scores(
        self,
        X: Array,
        shift: Array | None = None,
        scale: Array | float = 1.0,
        context: Array | None = None,
        *,
        check: bool = True,
    ) -> tuple[Array, Array]:
        """Log-densities of the columns' table and bounds on the solver's errors, both (n,); 0 without ``check``.

        The flows are of the standardised rows' distances from a shift (n, d), in units of a scale (d,).
        """
        k = CELL_POINTS if self.columns_.has_cells else 1
        scores, errors = np.empty(len(X)), np.empty(len(X))
        for rows in chunks(len(X), self.columns_.n_kept, k):
            own = [None if part is None else part[rows] for part in (shift, context)]
            scores[rows], errors[rows] = self._chunk_scores(X[rows], own[0], scale, own[1], k, check)
        return refuse_nan(scores[:, None], "log-density")[:, 0], errors

    @np.errstate(invalid="ignore")  # rows without a log-density are refused when all chunks are known
    def _chunk_scores(
        self, X: Array, shift: Array | None, scale: Array | float, context: Array | None, k: int, check: bool
    ) -> tuple[Array, Array]:
        columns, device = self.columns_, self._predicting_device()
        places = columns.standardise(columns.centres(X) + (columns.cell_noise(X, k) if k > 1 else 0.0))
        if shift is not None:
            places = (places - shift) / scale
        places = places.reshape(k * len(X), columns.n_kept)
        contexts = None if context is None else np.tile(context, (k, 1))
        found = [bounded_log_density(flow, places, device, contexts, check=check) for flow in self._flows]
        log_standardised = np.logaddexp.reduce([values for values, _ in found]) - math.log(len(found))
        errors = np.max([errors for _, errors in found], axis=0)
        log_density, _ = columns.log_density(X, log_standardised.reshape(k, -1))
        return log_density - float(np.log(scale).sum()), errors.reshape(k, -1).max(axis=0, initial=0.0)

    def _flow_stats(self, Z: Array, times: list[float], context: Array | None, index: Any) -> pd.DataFrame:
        """What the solver did on the way of each row, summed over the flows."""
        names = ("n_evals", "n_steps", "n_rejected", "status")
        counts: NDArray[Any] = np.zeros((len(Z), len(names)), dtype=np.int64)
        device, solver = self._predicting_device(), exact_solver(LOOSEST)
        for fitted in self._flows:
            if fitted is None:
                continue
            flow = fitted.build(torch.float64, device)

            def counted(block: Tensor, given: Tensor | None, flow: ContinuousFlow = flow) -> Tensor:
                solution = flow.solution(block, times, solver, context=given)
                return torch.stack([getattr(solution, name).long() for name in names], dim=1)

            own = in_blocks(Z, counted, device, context)
            counts = np.column_stack([counts[:, :3] + own[:, :3], np.maximum(counts[:, 3], own[:, 3])])
        return pd.DataFrame(counts, columns=list(names), index=index)

    # --- solvers ---

    def _training_solver(self) -> SolverOptions:
        return self._solver("bosh3", float(self.rtol), float(self.atol))

    def _sampling_solver(self, share: float = SAMPLE_TOLERANCE) -> SolverOptions:
        exact = exact_solver(share * float(self.rtol))
        return self._solver(exact.method, exact.rtol, share * float(self.atol))

    def _solver(self, default: str, rtol: float, atol: float) -> SolverOptions:
        method = default if self.method == "auto" else self.method
        step_size = None if self.step_size is None or METHODS[method].adaptive else float(self.step_size)
        return SolverOptions(method, rtol, atol, step_size, int(self.max_num_steps), self.gradient)

    def _predicting_device(self) -> torch.device:
        """Densities and samples are computed in float64, which MPS does not have."""
        device = resolve_device(self.device, "float64")
        return torch.device("cpu") if device.type == "mps" else device


def start_of(base: Base) -> Callable[[Tensor], Tensor]:
    """From uniform numbers (n, 2 d) to draws of the path's start (n, d)."""
    if isinstance(base, StudentT):
        return base.drawn
    return lambda u: torch.special.ndtri(u[:, : base.n_dims])


def distinct(X: Array, weight: Array, seed: int) -> tuple[NDArray[np.int64], Array]:
    """The first of each kind of equal rows, with their total weight, in an order that depends on content alone."""
    _, first, place = np.unique(row_keys(X, seed), return_index=True, return_inverse=True)
    total: Array = np.bincount(place, weights=weight).astype(np.float64)
    return first, total
