"""A solve from its first state to its outputs, and as one node of autograd's graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skode.solver import stiffness
from skode.solver.gradients import GradientStrategy, Run
from skode.solver.integrate import integrate
from skode.solver.interpolate import DenseOutput, Knots
from skode.solver.kernels import RowsDifferError
from skode.solver.layout import PaddedLayout
from skode.solver.outputs import Interpolated
from skode.solver.problem import Problem
from skode.solver.record import Record
from skode.solver.second import Node, pulled
from skode.solver.solution import Stats
from skode.solver.step import Stepper
from skode.solver.watch import Watch


def run(problem: Problem, record: Record, y0: Tensor, times: Tensor) -> Run:
    """Integrate, and place the outputs; nothing of it is differentiated by autograd."""
    stepper = problem.stepper(y0)
    t0, t1 = times[:, 0], last_times(times)
    try:
        end, stats, seen = _integrate(problem, stepper, record, y0, times, t1)
    except Exception as raised:
        if not minds_padding(raised, stepper):
            raise
        return run(replace(problem, padded=False), record.anew(), y0, times)
    layout = stepper.kernel.layout
    y_end = layout.leave(end)
    found = seen.found(times) if isinstance(seen, Watch) else None
    halts = None
    if found is not None:
        times, halts = found.times, found.halts()
    knots = Knots(record.spans, layout, t0, t1, halts)
    dense = None
    if problem.keeps_dense:
        dense = DenseOutput.of(record.steps, y_end, knots, problem.scheme, layout)
        record.drop_values(stepper)
    y = seen.finish(end, stats.success) if isinstance(seen, Interpolated) else _outputs(y0, times, y_end, stats, dense)
    error = y0.new_zeros(len(y0)) if record.error is None else record.error.clone()
    advice = (
        {}
        if stats.success
        else stiffness.advice(problem.dynamics, problem.scheme.tableau, problem.tolerance, y_end, stats, t0, t1)
    )
    return Run(times, y, error, stats, stepper, record, knots, dense, advice, found)


def minds_padding(raised: Exception, stepper: Stepper) -> bool:
    """Whether the field may want the rows as they are: it may hold something of its own for each of them."""
    began = getattr(stepper.kernel, "begun", False) and not isinstance(raised, RowsDifferError)
    return isinstance(stepper.kernel.layout, PaddedLayout) and not began


def _integrate(
    problem: Problem, stepper: Stepper, record: Record, y0: Tensor, times: Tensor, t1: Tensor
) -> tuple[Tensor, Stats, Watch | Interpolated | None]:
    observer: Watch | Interpolated | None = None
    if problem.dense and not problem.keeps_dense:
        observer = Interpolated(stepper, y0, times, t1, problem.memory_budget)
    with stepper.kernel.computing():
        control = problem.control(stepper, times[:, 0], t1)
        if problem.watched is not None:
            observer = Watch(problem.watched, stepper, control)
        end = integrate(stepper, stepper.kernel.layout.enter(y0), control, record, observer)
        return end, stepper.kernel.counted(control.stats(end)), observer


def _outputs(y0: Tensor, times: Tensor, y_end: Tensor, stats: Stats, dense: DenseOutput | None) -> Tensor:
    if dense is not None:
        y = dense.evaluate(times)
        if not stats.success:
            y.masked_fill_(torch.isinf(y), torch.nan)
        y[:, 0] = y0
        return y
    if times.shape[1] == 1:
        return y0.unsqueeze(1).clone()
    y = torch.stack([y0, y_end], dim=1)
    if not stats.success:
        y[:, 1].masked_fill_((stats.status != 0).unsqueeze(1), torch.nan)
    if times.stride(0):
        y[:, 1].masked_fill_(torch.isnan(times[:, 1:]), torch.nan)
    return y


def last_times(times: Tensor) -> Tensor:
    """Each row's last time that is not NaN padding; shared times have none."""
    if not times.stride(0):
        return times[:, -1]
    last = (~torch.isnan(times)).sum(dim=1, keepdim=True) - 1
    return times.gather(1, last).view(-1)


class Solve(torch.autograd.Function):
    """The solve as one node of the graph; what it recorded belongs to the node."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        strategy: GradientStrategy,
        done: Run,
        y0: Tensor,
        times: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # The outputs will point to this node; the node must not point to them.
        own = done._replace(y=done.y.detach(), error=done.error.detach(), dense=None)
        if not strategy.keeps_steps:
            own = own._replace(record=Record(), knots=done.knots.bare())
        ctx.problem, ctx.strategy, ctx.run = problem, strategy, own
        ctx.save_for_backward(y0, times, done.y, *parameters)  # so that torch notices changes in place before backward
        return done.y, done.error

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_error: Tensor) -> tuple[Tensor | None, ...]:
        y0, times, _, *parameters = ctx.saved_tensors
        node = Node(ctx.problem, ctx.strategy, ctx.run, ctx.needs_input_grad[4])
        return None, None, None, *pulled(node, g, g_error, y0, times, parameters)
