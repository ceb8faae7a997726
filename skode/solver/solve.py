"""``solve``: many initial-value problems at once, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from skode.exceptions import FieldError
from skode.solver.control import BatchControl, Control, RowControl, SharedControl, Tolerance, time_dtype_of
from skode.solver.dynamics import as_dynamics
from skode.solver.gradients import STRATEGIES, GradientStrategy, Problem, Run
from skode.solver.integrate import NoRecord, Record, Recorder, integrate
from skode.solver.interpolate import DenseOutput
from skode.solver.solution import Solution
from skode.solver.step import Scheme, make_scheme
from skode.solver.tableaus import get_tableau

Field = Callable[[Tensor, Tensor], Tensor]


def solve(
    field: Field,
    y0: Tensor,
    t: Tensor | NDArray[Any] | Sequence[float],
    *,
    method: str = "tsit5",
    rtol: float = 1e-3,
    atol: float = 1e-6,
    gradient: str = "discrete",
    step_control: str | BatchControl = "row",
    step_size: float | None = None,
    first_step: float | None = None,
    max_num_steps: int = 10_000,
    dense_output: bool = False,
    error_estimate: bool = False,
    memory_budget: int = 2**28,
) -> Solution:
    """Solve dy/dt = field(t, y) from y0 for a batch of rows, each a problem of its own.

    Every row has its own step size, error control and status, so that its result does not depend on the others.

    Parameters
    ----------
    field : nn.Module or callable
        ``field(t, y)`` with t ``(n, 1)``, each row's own time, and y ``(n, d)`` returns dy/dt ``(n, d)``. It is never
        called outside of a row's interval.
    y0 : tensor of shape (n, d)
        Initial states, float32 or float64; the solve computes in their dtype, on their device.
    t : tensor, array or list of shape (m,) or (n, m)
        Output times, the first one y0's: shared, or each row's own; ascending or descending (rows may differ), equal
        neighbours allowed, NaN-padded at the end for rows with fewer times.
    method : str, default="tsit5"
        Adaptive: "tsit5", "dopri5", "bosh3", "rk32", "fehlberg2", "adaptive_heun", "adaptive_midpoint". Fixed steps:
        "euler", "midpoint", "heun", "rk4" (classic), "rk4_38" (the 3/8 rule).
    rtol, atol : float
        A step is accepted if the root mean square of error / (atol + rtol abs(y)) is at most 1.
    gradient : {"discrete", "adjoint"}, default="discrete"
        "discrete" is the exact derivative of the accepted steps; "adjoint" solves the adjoint equation back in time
        [1]_, with memory that does not grow with the number of steps, and is as exact as the tolerance.
    step_control : {"row", "batch"} or BatchControl, default="row"
        "batch" takes one step for all rows: faster in training, but rows then depend on each other.
    step_size : float, optional
        Length of the steps of a fixed-step method; a tenth of each row's interval if not given ("batch"), of the
        longest one ("row").
    first_step : float, optional
        Length of the first step that an adaptive method tries; estimated if not given.
    max_num_steps : int, default=10000
        Largest number of steps, accepted or not, of a row.
    dense_output : bool, default=False
        Keep the steps, so that ``Solution.evaluate`` works at any time.
    error_estimate : bool, default=False
        Give ``Solution.error_estimate``: each row's squared local errors in units of the tolerance, summed over its
        accepted steps, with gradients by "discrete" (a penalty on it keeps a learned field easy to solve).
    memory_budget : int, default=2**28
        Bytes that "discrete" may use to keep what its forward computed ("batch"); beyond that, stages are computed
        once more going back.

    Returns
    -------
    Solution
        Gradients reach y0, the field's parameters and t.

    Raises
    ------
    ValueError
        If an argument is not understood, or times are not monotone.
    FieldError
        If the field returns the wrong shape, dtype or type.

    References
    ----------
    .. [1] R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, "Neural Ordinary Differential Equations",
       NeurIPS 2018, section 2. arXiv:1806.07366

    Examples
    --------
    >>> import torch
    >>> from skode.solver import solve
    >>> y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> solution = solve(lambda t, y: -y, y0, [0.0, 1.0], rtol=1e-8, atol=1e-8)
    >>> solution.y1
    tensor([[0.3679],
            [0.7358]], dtype=torch.float64)
    """
    _check_state(y0)
    # A state of 0 has an error of 0 in any unit but 0.
    tolerance = _tolerance(rtol, atol, max_num_steps, first_step, least_atol=torch.finfo(y0.dtype).tiny)
    tableau = get_tableau(method)
    if step_size is not None and tableau.adaptive:
        raise ValueError(f"step_size={step_size} goes with fixed-step methods; {method!r} adapts its steps.")
    if gradient not in STRATEGIES:
        raise ValueError(f"gradient={gradient!r} is unknown; use one of {', '.join(map(repr, STRATEGIES))}.")
    times = _times(t, y0)
    dense = dense_output or times.shape[1] > 2
    scheme = make_scheme(tableau.closed if dense else tableau, y0.dtype, y0.device)
    if not tableau.adaptive:
        tolerance = _fixed(tolerance, step_size, times)
    strategy = STRATEGIES[gradient]
    shared = times.stride(0) == 0 or (t.dim() if isinstance(t, Tensor) else np.ndim(t)) == 1
    problem = Problem(
        as_dynamics(field),
        scheme,
        _control_maker(step_control, tolerance, shared, y0),
        memory_budget if step_control != "row" else 0,
        error_estimate,
    )
    if error_estimate and (gradient != "discrete" or not tableau.adaptive):
        raise ValueError("error_estimate=True needs gradient='discrete' and an adaptive method.")
    runs: list[Run] = []
    parameters = problem.dynamics.trainable()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (y0, times, *parameters)):
        y, error = _Solve.apply(  # type: ignore[no-untyped-call]
            problem, strategy, dense, runs, y0, times, *parameters
        )
    else:
        recorder: Recorder = NoRecord()
        if dense or error_estimate:
            recorder = Record(keep_stages=dense, keep_errors=error_estimate)
        with torch.no_grad():
            runs.append(_run(problem, recorder, dense, y0, times))
        y, error = runs[0].y, runs[0].error
    run = runs[0]
    stats = run.stats
    return Solution(
        times.detach(),
        y,
        stats.status,
        stats.n_evals,
        stats.n_steps,
        stats.n_rejected,
        stats.t,
        stats.next_step,
        stats.success,
        error if error_estimate else None,
        run.dense if dense_output else None,
    )


def _run(problem: Problem, recorder: Recorder, dense: bool, y0: Tensor, times: Tensor) -> Run:
    """Integrate and place the outputs."""
    t0, t1 = times[:, 0], _last_times(times)
    end = integrate(problem.dynamics, problem.scheme, y0, problem.make_control(t0, t1, problem.scheme), recorder)
    record = None
    if isinstance(recorder, Record):
        record = DenseOutput(recorder.steps, end.y, t0, t1, problem.scheme)
    if dense:
        assert record is not None
        y = record.evaluate(times)
        if not end.stats.success:
            y.masked_fill_(torch.isinf(y), torch.nan)
        y[:, 0] = y0
    elif times.shape[1] == 1:
        y = y0.unsqueeze(1).clone()
    else:
        y = torch.stack([y0, end.y], dim=1)
        if not end.stats.success:
            y[:, 1].masked_fill_((end.stats.status != 0).unsqueeze(1), torch.nan)
        if times.stride(0):
            y[:, 1].masked_fill_(torch.isnan(times[:, 1:]), torch.nan)
    error = recorder.error if isinstance(recorder, Record) else None
    return Run(times, y, y0.new_zeros(len(y0)) if error is None else error, end.stats, record)


def _last_times(times: Tensor) -> Tensor:
    """Each row's last time that is not NaN padding; shared times have none."""
    if not times.stride(0):
        return times[:, -1]
    last = (~torch.isnan(times)).sum(dim=1, keepdim=True) - 1
    return times.gather(1, last).view(-1)


class _Solve(torch.autograd.Function):
    """The solve as one node of the graph; what it recorded belongs to the node."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        strategy: GradientStrategy,
        dense: bool,
        runs: list[Run],
        y0: Tensor,
        times: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        recorder = strategy.recorder(problem, dense or (strategy.keeps_steps and ctx.needs_input_grad[5]))
        run = _run(problem, recorder, dense, y0.detach(), times.detach())
        runs.append(run)
        # The outputs will point to this node; the node must not point to them.
        steps = run.dense if strategy.keeps_steps else None
        own = run._replace(y=run.y.detach(), error=run.error.detach(), dense=steps)
        ctx.problem, ctx.strategy, ctx.run = problem, strategy, own
        ctx.save_for_backward(y0, run.y, *parameters)  # so that torch notices changes in place before backward
        return run.y, run.error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_error: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        gradients = ctx.strategy.backward(ctx.problem, ctx.run, g.contiguous(), g_error, ctx.needs_input_grad[5])
        return None, None, None, None, gradients.y0, gradients.times, *gradients.parameters


def _check_state(y0: Tensor) -> None:
    if not isinstance(y0, Tensor):
        raise FieldError(f"y0 must be a tensor of shape (n, d); got {type(y0).__name__}.")
    if y0.dim() != 2:
        raise FieldError(f"y0 must have shape (n, d); got {tuple(y0.shape)}.")
    if y0.dtype not in (torch.float32, torch.float64):
        raise FieldError(f"y0 must be float32 or float64; got {y0.dtype}.")


def _tolerance(rtol: float, atol: float, max_num_steps: int, first_step: float | None, least_atol: float) -> Tolerance:
    for name, value, low in (("rtol", rtol, 0.0), ("atol", atol, 0.0), ("first_step", first_step, 0.0)):
        if value is not None and not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name}={value} must be finite and not negative.")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol are both 0; no step could be accepted. Give at least one a positive value.")
    if first_step == 0 or max_num_steps < 1:
        raise ValueError(f"first_step={first_step} and max_num_steps={max_num_steps} must be positive.")
    return Tolerance(float(rtol), max(float(atol), least_atol), int(max_num_steps), first_step)


def _fixed(tolerance: Tolerance, step_size: float | None, times: Tensor) -> Tolerance:
    if step_size is None:
        longest = (
            times.detach().nan_to_num(nan=-math.inf).amax(1) - times.detach().nan_to_num(nan=math.inf).amin(1)
        ).amax()
        step_size = max(float(longest) / 10, torch.finfo(times.dtype).tiny)
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size={step_size} must be positive and finite.")
    return Tolerance(tolerance.rtol, tolerance.atol, tolerance.max_num_steps, None, float(step_size))


def _times(t: Any, y0: Tensor) -> Tensor:
    """Output times as (n, m) on the state's device, checked."""
    times = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
    if not times.is_floating_point():
        times = times.to(torch.float64)
    times = times.to(time_dtype_of(y0.device)).to(y0.device)
    if times.dim() == 1:
        times = times.expand(len(y0), -1)
    if times.dim() != 2 or len(times) != len(y0) or times.shape[1] == 0:
        raise ValueError(
            f"t must have shape (m,) or ({len(y0)}, m) for y0 of shape {tuple(y0.shape)}; got {tuple(times.shape)}."
        )
    if len(times):
        _check_monotone(times.detach())
    return times


def _check_monotone(times: Tensor) -> None:
    if times.stride(0) == 0:
        _check_shared(times[0].tolist())
        return
    missing = torch.isnan(times)
    if bool(missing[:, 0].any()) or bool((missing[:, :-1] & ~missing[:, 1:]).any()):
        raise ValueError("NaN in t may only pad the end of a row; every row needs its first time.")
    if bool(torch.isinf(times).any()):
        raise ValueError("t holds an infinite time.")
    steps = times.diff(dim=1).nan_to_num(0.0)
    wrong = torch.nonzero((steps > 0).any(dim=1) & (steps < 0).any(dim=1))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"t must be ascending or descending within a row; row {row} has {times[row].tolist()}.")


def _check_shared(times: list[float]) -> None:
    if not all(map(math.isfinite, times)):
        raise ValueError(f"t must be finite where it is shared by all rows; got {times}.")
    if times not in (sorted(times), sorted(times, reverse=True)):
        raise ValueError(f"t must be ascending or descending; got {times}.")


def _control_maker(
    step_control: str | BatchControl, tolerance: Tolerance, shared: bool, y0: Tensor
) -> Callable[[Tensor, Tensor, Scheme], Control]:
    if isinstance(step_control, str) and step_control == "row":
        return lambda t0, t1, scheme: RowControl(t0, t1, tolerance, scheme)
    if step_control == "batch":
        step_control = BatchControl()
    if not isinstance(step_control, BatchControl):
        raise ValueError(f"step_control={step_control!r} is unknown; use 'row', 'batch' or a BatchControl.")
    if not shared:
        raise ValueError("step_control='batch' needs times shared by all rows, shape (m,); got times per row.")
    weights = step_control.weights
    if weights is not None and weights.shape != (len(y0),):
        raise ValueError(f"BatchControl's weights must have shape ({len(y0)},); got {tuple(weights.shape)}.")

    def make(t0: Tensor, t1: Tensor, scheme: Scheme) -> Control:
        if not len(t0):
            return RowControl(t0, t1, tolerance, scheme)
        return SharedControl(float(t0[0]), float(t1[0]), len(t0), tolerance, scheme, weights)

    return make
