"""``solve``: many initial-value problems at once, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.solver import arguments
from skode.solver.control import BatchControl
from skode.solver.event_gradients import own_outputs, with_events
from skode.solver.events import Event, as_watched
from skode.solver.gradients import GradientStrategy, Run
from skode.solver.plan import given_plan
from skode.solver.problem import Problem, landings
from skode.solver.quadrature import controlled, prepared, settle, with_quadratures
from skode.solver.record import Record
from skode.solver.run import Solve
from skode.solver.solution import Solution
from skode.solver.step import make_scheme
from skode.solver.strategies import as_strategy, require_interpolant
from skode.solver.tableaus import get_tableau
from skode.solver.transforms import transformable

Field = Callable[..., Tensor]


@transformable
def solve(
    field: Field,
    y0: Tensor,
    t: Tensor | NDArray[Any] | Sequence[float],
    *,
    method: str = "tsit5",
    rtol: float | Tensor = 1e-3,
    atol: float | Tensor = 1e-6,
    gradient: str | GradientStrategy = "discrete",
    step_control: str | BatchControl = "row",
    step_size: float | None = None,
    first_step: float | None = None,
    min_step: float = 0.0,
    max_step: float | None = None,
    max_num_steps: int = 10_000,
    dense_output: bool = False,
    args: tuple[Any, ...] = (),
    parameters: Iterable[Tensor] | None = None,
    n_quadratures: int = 0,
    jump_times: Any = None,
    step_times: Any = None,
    steps: Any = None,
    error_estimate: bool = False,
    memory_budget: int = 2**28,
    events: Event | Sequence[Event] | None = None,
) -> Solution:
    """Solve dy/dt = field(t, y) from y0 for a batch of rows, each a problem of its own.

    Every row has its own step size, error control and status, so that its result does not depend on the others.

    Parameters
    ----------
    field : nn.Module or callable
        ``field(t, y)`` with t ``(n, 1)``, each row's own time, and y ``(n, d)`` returns dy/dt ``(n, d)``. It is never
        called outside of a row's interval. A field may offer ``vjp(t, y, a)``, used instead of autograd: from a
        cotangent ``a`` of its value it returns dy ``(n, d)``, or (dy, dt), or (dy, dt, gradients), one for each
        of the module's parameters (or of ``parameters``); what it does not return is found by autograd.
    y0 : tensor of shape (n, d)
        Initial states, float32 or float64; the solve computes in their dtype, on their device.
    t : tensor, array or list of shape (m,) or (n, m)
        Output times, the first one y0's: shared, or each row's own; ascending or descending (rows may differ), equal
        neighbours allowed, NaN-padded at the end for rows with fewer times.
    method : str, default="tsit5"
        Adaptive: "tsit5", "dopri5", "dopri8", "bosh3", "rk32", "fehlberg2", "adaptive_heun", "adaptive_midpoint".
        Adaptive and implicit, for stiff problems: "kencarp4", "kvaerno3"; a step then solves for its stages with the
        field's Jacobian, d vector-Jacobian products for states of d components. Fixed steps: "euler", "midpoint",
        "heun", "heun3", "rk4" (classic), "rk4_38" (the 3/8 rule).
    rtol, atol : float or tensor of shape (d,)
        A step is accepted if the root mean square of error / (atol + rtol abs(y)) is at most 1. With ``n_quadratures``
        a tensor may have d + q entries, else the integrals have the strictest of them; components and integrals with an
        infinite tolerance do not count.
    gradient : {"discrete", "adjoint", "reversible"} or strategy, default="discrete"
        "discrete" is the exact derivative of the accepted steps; "adjoint" solves the adjoint equation back in time
        [1]_, with memory that does not grow with the number of steps, and is as exact as the tolerance. "reversible"
        (experimental) takes steps that can be undone [2]_: exact derivatives of a map of its own, memory that does not
        grow but for the step sizes, twice the evaluations. It is for fields that contract or expand little: up to
        about e^3 to e^5 over the interval. Steps end at the output times; there are no events and no dense output.
    step_control : {"row", "batch"} or BatchControl, default="row"
        "batch" takes one step for all rows: faster in training, but rows then depend on each other.
    step_size : float, optional
        Length of the steps of a fixed-step method; a tenth of each row's interval if not given ("batch"), of the
        longest one ("row").
    first_step : float, optional
        Length of the first step that an adaptive method tries; estimated if not given.
    min_step, max_step : float, optional
        Bounds of the steps' lengths; a step of ``min_step`` is accepted whatever its error, if that is finite.
    jump_times, step_times : tensor or list of shape (k,) or (n, k), optional
        Times where steps end; at ``jump_times`` the field jumps: it is asked just before and just after, never there.
    max_num_steps : int, default=10000
        Largest number of steps, accepted or not, of a row.
    dense_output : bool, default=False
        Keep the steps, so that ``Solution.evaluate`` works at any time.
    args : tuple
        Handed on: ``field(t, y, *args)``. Tensors in it (or in tuples, lists, dicts in it) get gradients.
    parameters : iterable of tensors, optional
        The tensors that are to get gradients, besides y0, t and ``args``; no others do. If not given they are found: a
        module's parameters and what else it holds, what a function closes over, names or is bound to. One that was not
        found is an error, never a gradient of zero.
    n_quadratures : int, default=0
        q integrals along the solution: the field then returns ``(n, d + q)``, the last q being their integrands, which
        depend on t and y. See ``Solution.quadratures``.
    steps : Steps, or tensor of shape (k + 1,) or (n, k + 1), optional
        The accepted steps of an earlier solve, its ``Solution.steps``: they are taken again and none is rejected,
        whatever their error. The first one starts at the new first time, the last one ends at the new last time.
        With everything else as it was the solve gives the same bits.
    error_estimate : bool, default=False
        Give ``Solution.error_estimate``: each row's squared local errors in units of the tolerance, summed over its
        accepted steps, with gradients by "discrete" (a penalty on it keeps a learned field easy to solve).
    memory_budget : int, default=2**28
        Bytes that "discrete" may use to keep what its forward computed, about; beyond that it keeps states, and
        computes stages once more going back.
    events : Event or sequence of Event, optional
        What happens to rows where functions of their time and state become 0. A terminal event ends its row; see
        ``Solution.event_t``, ``.event_y``, ``.event_index`` and, for all of them, ``.crossings``. Gradients reach the
        events' times and states, and whatever the functions depend on.

    Returns
    -------
    Solution
        Gradients reach y0, the field's parameters and t.

    Raises
    ------
    ValueError
        If an argument is not understood, or times are not monotone.
    FieldError
        If the field, or an event's function, returns the wrong shape, dtype or type.

    Notes
    -----
    Second and higher derivatives (``create_graph=True``) are those of the accepted steps, taken again in plain torch.
    So are all derivatives under ``torch.func`` (grad, vjp, jvp, vmap, jacrev, jacfwd, hessian) and with dual numbers;
    under ``vmap`` every batch's rows take steps of their own. ``torch.compile`` and ``torch.export`` see through solves
    by a fixed-step method with ``step_size``, or along ``steps``, if t, steps, jump_times and step_times are lists of
    numbers; ``status`` then tells of rows that failed, ``success`` does not. Other solves run uncompiled between two
    graphs, and are refused with ``fullgraph=True`` and in exports. Implicit methods have none of these,
    ``gradient="reversible"`` only the derivatives by ``create_graph=True``.

    References
    ----------
    .. [1] R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, "Neural Ordinary Differential Equations",
       NeurIPS 2018, section 2. arXiv:1806.07366
    .. [2] S. McCallum, J. Foster, "Efficient, Accurate and Stable Gradients for Neural ODEs", 2024. arXiv:2410.11648

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
    arguments.check_state(y0)
    d = y0.shape[1]
    dynamics = prepared(field, d, args, parameters, n_quadratures)
    n_components = d + n_quadratures
    rtol, atol = (with_quadratures(*named, d, n_quadratures) for named in (("rtol", rtol), ("atol", atol)))
    tolerance = arguments.tolerance(y0, n_components, rtol, atol, max_num_steps, first_step, min_step, max_step)
    tableau = get_tableau(method)
    if step_size is not None and tableau.adaptive:
        raise ValueError(f"step_size={step_size} goes with fixed-step methods; {method!r} adapts its steps.")
    strategy = as_strategy(gradient)
    times, shared = arguments.output_times(t, y0)
    if not tableau.adaptive:
        tolerance = arguments.fixed_step(tolerance, step_size, times)
    if error_estimate and (gradient != "discrete" or not tableau.adaptive):
        raise ValueError("error_estimate=True needs gradient='discrete' and an adaptive method.")
    watched = as_watched(events, d)
    require_interpolant(strategy, dense_output=dense_output, events=watched is not None)
    keeps_dense = dense_output or watched is not None
    dense = keeps_dense or (times.shape[1] > 2 and strategy.interpolates)
    stops = landings(jump_times, step_times, y0, times.dtype)
    batch = arguments.batch_control(step_control, shared, len(y0))
    problem = Problem(
        dynamics,
        make_scheme(tableau.closed if dense else tableau, y0.dtype, y0.device),
        controlled(tolerance, batch, n_components),
        batch,
        memory_budget,
        dense,
        keeps_dense,
        error_estimate,
        stops,
        watched=watched,
        plan=given_plan(steps, y0, times, stops, batch is not None, watched is not None),
    )
    if n_quadratures:
        y0 = torch.nn.functional.pad(y0, (0, n_quadratures))
    done, y, error = _solved(problem, strategy, y0, times)
    stats, outputs = done.stats, own_outputs(done, y)
    solution = Solution(
        times.detach(),
        outputs[..., :d].contiguous() if n_quadratures else outputs,
        stats.status,
        stats.n_evals,
        stats.n_steps,
        stats.n_rejected,
        stats.t,
        stats.h,
        stats.norm,
        stats.next_step,
        stats.success,
        error if error_estimate else None,
        done.advice,
        _dense=done.dense if dense_output else None,
        _knots=done.knots,
        quadratures=outputs[..., d:].contiguous() if n_quadratures else None,
        _problem=problem,
        _ragged=False if shared else None,
    )
    return solution if watched is None else with_events(solution, watched, done, y)


def _solved(problem: Problem, strategy: GradientStrategy, y0: Tensor, times: Tensor) -> tuple[Run, Tensor, Tensor]:
    """The run, and its outputs and errors with their graph."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (y0, times, *problem.dynamics.trainable())):
        with torch.no_grad():
            done = strategy.run(problem, strategy.record(problem), y0.detach(), times.detach())
        # Only now it is known for sure which parameters the field has.
        settle(problem.dynamics)
        y, error = Solve.apply(problem, strategy, done, y0, times, *problem.dynamics.trainable())  # type: ignore[no-untyped-call]
        if not strategy.keeps_steps:
            done = done._replace(knots=done.knots.bare())
        return done, y, error
    with torch.no_grad():
        record = Record(keep_values=problem.keeps_dense, keep_errors=problem.keep_errors)
        done = strategy.run(problem, record, y0, times)
    return done, done.y, done.error
