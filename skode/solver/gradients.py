"""How a solve is differentiated: exactly through its steps, or by the paper's adjoint equation.

Symbols: ``g`` cotangents of outputs, ``a`` the adjoint state dL/dy, ``gk`` the cotangent of a stage's field value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skode.exceptions import SolverError
from skode.solver.control import Control, Verdict
from skode.solver.dynamics import Dynamics
from skode.solver.integrate import End, NoRecord, Record, Recorder, integrate
from skode.solver.interpolate import DenseOutput, Step
from skode.solver.solution import Stats, Status
from skode.solver.step import Attempt, Scheme, Span, make_stages


class Run(NamedTuple):
    """A finished solve: outputs (n, m, d), summed squared errors (n,), statistics, and what its gradient needs."""

    times: Tensor
    y: Tensor
    error: Tensor
    stats: Stats
    dense: DenseOutput | None


@dataclass(frozen=True)
class Problem:
    """What is to be solved, apart from the state and the times."""

    dynamics: Dynamics
    scheme: Scheme
    make_control: Callable[[Tensor, Tensor, Scheme], Control]
    tape_budget: int
    keep_errors: bool = False


class Gradients(NamedTuple):
    """Of y0 ``(n, d)``, the times ``(n, m)`` if they were asked for, and the parameters."""

    y0: Tensor
    times: Tensor | None
    parameters: tuple[Tensor, ...]


class GradientStrategy(Protocol):
    """A way to differentiate a solve; ``keeps_steps`` tells whether its backward needs the forward's steps."""

    keeps_steps: bool

    def recorder(self, problem: Problem, keep_stages: bool) -> Recorder:
        """What the forward solve has to keep: stages too where outputs are interpolated or times differentiated."""
        ...

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        """Pull the cotangents of outputs ``(n, m, d)`` and errors ``(n,)`` back to the solve's inputs."""
        ...


def relinearize(dynamics: Dynamics, scheme: Scheme, step: Step, idle: Tensor | None = None) -> list[Any]:
    """Tapes at the stages of a step as it counted: rows that stayed (h = 0) are linearised where they stand.

    Rows that are ``idle`` (arrived or failed for good) ask for nothing; a row that moves stands in for them, since
    the field need not be finite where they stand.
    """
    start, y = step.span.times[0], step.y
    if idle is not None:
        moving = torch.argmax((step.h != 0).to(torch.int8))
        y, start = torch.where(idle, y[moving], y), torch.where(idle, start[moving], start)
    f, tape = dynamics.linearize(start, y)
    tapes = [tape]
    stages = make_stages(scheme, y, step.h)
    for i in range(1, scheme.tableau.n_stages):
        stages.add(f)
        time = step.span.times[i]
        if isinstance(step.h, Tensor):
            time = torch.where(step.h == 0, start, time)
        f, tape = dynamics.linearize(time, stages.combine(y, i - 1))
        tapes.append(tape)
    return tapes


class _Interior(NamedTuple):
    """Cotangents of outputs that belong to one step, as flat entries."""

    rows: Tensor
    columns: Tensor
    theta: Tensor
    at_end: Tensor
    g: Tensor


class DiscreteGradient:
    """The exact derivative of the numerical map with its accepted steps held fixed.

    The first step carries t0, the last one t1; times between take the interpolant's slope. No rejected step is
    differentiated, and the cost does not depend on the number of output times.
    """

    keeps_steps = True

    def recorder(self, problem: Problem, keep_stages: bool) -> Recorder:
        return Record(keep_stages=keep_stages, tape_budget=problem.tape_budget, keep_errors=problem.keep_errors)

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        dense = run.dense
        assert dense is not None
        sweep = _Sweep(problem, dense, run.times if time else None, g_error.unsqueeze(1), _dead(run))
        if not dense.steps:
            return Gradients(torch.nan_to_num(g).sum(dim=1), sweep.time_gradient, sweep.parameter_gradients())
        if run.times.shape[1] == 2:
            lam = g[:, 1] if run.stats.success else torch.where(torch.isnan(run.y[:, 1]), 0.0, g[:, 1])
            groups: list[_Interior | None] = [None] * len(dense.steps)
        else:
            lam = torch.zeros_like(g[:, 0])
            groups = list(_grouped(dense, run, g))
        for step, group in zip(reversed(dense.steps), reversed(groups), strict=True):
            lam = sweep.through(step, lam, group)
        lam = sweep.start(lam)
        return Gradients(lam + g[:, 0], sweep.finish_times(), sweep.parameter_gradients())


def _grouped(dense: DenseOutput, run: Run, g: Tensor) -> Iterator[_Interior | None]:
    """The outputs after the first, sorted by the step that covers them."""
    places = dense.locate(run.times[:, 1:])
    step = torch.where(places.beyond, len(dense.steps), places.step).reshape(-1)
    order = torch.argsort(step, stable=True)
    counts = torch.bincount(step, minlength=len(dense.steps) + 1).tolist()
    n_columns = places.step.shape[1]
    start = 0
    for count in counts[: len(dense.steps)]:
        entries = order[start : start + count]
        start += count
        if not count:
            yield None
            continue
        rows, columns = entries // n_columns, entries % n_columns
        inner = (rows, columns)
        yield _Interior(rows, columns + 1, places.theta[inner], places.at_end[inner], g[rows, columns + 1])


class _Sweep:
    """One way back through the steps, each evaluation of the field pulled exactly once."""

    def __init__(
        self, problem: Problem, dense: DenseOutput, times: Tensor | None, g_error: Tensor, dead: Tensor | None
    ) -> None:
        self._g_error = g_error
        self.dynamics, self.scheme, self.dense = problem.dynamics, problem.scheme, dense
        self._time = times is not None
        self.time_gradient: Tensor | None = None
        if times is not None:
            self.time_gradient = torch.zeros_like(times)
            self._last = (~torch.isnan(times)).sum(dim=1) - 1
        self._first_gradient: Tensor | None = None
        self._last_gradient: Tensor | None = None
        self._pulled: list[Any] = []
        self._parameters: tuple[Tensor, ...] | None = None
        self._carried: Tensor | None = None
        self._moved: Tensor | None = None
        self._dead = dead
        self._first_tape: Any | None = None
        tableau = self.scheme.tableau
        n = tableau.n_stages
        self._a = [[(j, tableau.a[j - 1][i]) for j in range(i + 1, n) if tableau.a[j - 1][i] != 0] for i in range(n)]

    def through(self, step: Step, lam: Tensor, group: _Interior | None) -> Tensor:
        """The cotangent of the step's start, given that of its end."""
        idle = None
        if isinstance(step.h, Tensor):
            self._moved = step.h != 0 if self._moved is None else self._moved | (step.h != 0)
            idle = None if self._dead is None else self._dead & ~self._moved
        tapes = step.tapes if step.tapes is not None else relinearize(self.dynamics, self.scheme, step, idle)
        direct, injected = None, None
        if group is not None:
            lam, direct, injected = self._inject(step, lam, group)
        tableau, h = self.scheme.tableau, step.h
        error = None if step.error is None else step.error * self._g_error
        pulled: dict[int, Tensor] = {}
        for i in reversed(range(tableau.n_stages)):
            gk = self._stage_cotangent(i, h, lam, pulled, injected, error)
            if gk is not None:
                self._note_step_length(step, i, gk)
            if i == tableau.n_stages - 1 and tableau.fsal and self._carried is not None:
                gk = self._carried if gk is None else gk + self._carried
            if gk is None:
                continue
            if i == 0:
                self._carried = gk
                break
            pulled[i] = self._pull(step, i, tapes[i], gk)
            if i == tableau.n_stages - 1 and tableau.fsal:
                # The last stage is the field at y1 itself: what it asks of its state, it asks of y1.
                lam = lam + pulled.pop(i)
        else:
            self._carried = None
        for part in pulled.values():
            lam = lam + part
        self._first_tape = tapes[0]
        if not tableau.fsal and self._carried is not None:
            lam = lam + self._pull(step, 0, tapes[0], self._carried)
            self._carried = None
        if step.tapes is None:
            self._settle()
        return lam if direct is None else lam + direct

    def start(self, lam: Tensor) -> Tensor:
        """Pull what the first step's first stage asks for."""
        if self._carried is not None:
            lam = lam + self._pull(self.dense.steps[0], 0, self._first_tape, self._carried)
        return lam

    def _stage_cotangent(
        self,
        i: int,
        h: Any,
        lam: Tensor,
        pulled: dict[int, Tensor],
        injected: Tensor | None,
        error: Tensor | None,
    ) -> Tensor | None:
        """Of stage i's field value: from the solution, later stages' states, outputs inside the step, and its error."""
        tableau = self.scheme.tableau
        terms = [(lam, tableau.b[i])] if tableau.b[i] != 0 else []
        terms += [(pulled[j], weight) for j, weight in self._a[i] if j in pulled]
        if error is not None and tableau.e is not None and tableau.e[i] != 0:
            terms.append((error, tableau.e[i]))
        if injected is not None:
            terms.append((injected[:, i], 1.0))
        if not terms:
            return None
        # K[i] = h f: a step length shared by all rows goes into the weights.
        factor = h if isinstance(h, float) else 1.0
        gk = terms[0][0] * (terms[0][1] * factor)
        for term, weight in terms[1:]:
            gk = gk.add_(term, alpha=weight * factor)
        return gk if isinstance(h, float) else gk.mul_(h)

    def _pull(self, step: Step, i: int, tape: Any, gk: Tensor) -> Tensor:
        dy, dt = self.dynamics.pull(tape, gk, time=self._time)
        self._pulled.append(tape)
        if dt is not None:
            self._note_stage_time(step, i, dt)
        return dy

    def _settle(self) -> None:
        if not self._pulled:
            return
        gradients = self.dynamics.accumulate(self._pulled)
        self._pulled = []
        if self._parameters is None:
            self._parameters = gradients
        else:
            self._parameters = tuple(p + g for p, g in zip(self._parameters, gradients, strict=True))

    def parameter_gradients(self) -> tuple[Tensor, ...]:
        """Of all evaluations pulled so far."""
        self._settle()
        if self._parameters is None:
            return tuple(torch.zeros_like(p) for p in self.dynamics.trainable())
        return self._parameters

    # --- outputs inside of a step ---

    def _inject(self, step: Step, lam: Tensor, group: _Interior) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents at the step's end, at its start and of its stages, from the outputs that it covers."""
        inner = ~group.at_end
        lam = lam.index_add(0, group.rows, group.g * group.at_end.unsqueeze(1))
        g = group.g * inner.unsqueeze(1)
        direct = torch.zeros_like(lam).index_add_(0, group.rows, g)
        beta = self.dense.weights(group.theta)
        injected = lam.new_zeros((len(lam), beta.shape[1], lam.shape[1]))
        injected.index_add_(0, group.rows, beta.unsqueeze(2) * g.unsqueeze(1))
        if self._time:
            self._note_output_times(step, group)
        return lam, direct, injected

    # --- derivatives with the times ---

    def _note_edges(self, step: Step, first: Tensor, last: Tensor) -> None:
        """Add ``first`` where this step starts at t0 and ``last`` where it ends at t1."""
        starts, ends, _ = self._edges(step)
        if self._first_gradient is None or self._last_gradient is None:
            self._first_gradient = torch.zeros(starts.shape, dtype=first.dtype, device=first.device)
            self._last_gradient = torch.zeros_like(self._first_gradient)
        self._first_gradient = self._first_gradient + first * starts
        self._last_gradient = self._last_gradient + last * ends

    def _edges(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """For each row: does the step start at t0, end at t1, move at all? Shape (n, 1)."""
        t0, t1 = self.dense.t0.view(-1, 1), self.dense.t1.view(-1, 1)
        moves = torch.as_tensor(step.h, device=t0.device) != 0
        return (t0 == step.span.t), (t1 == step.span.t_next) & moves, moves

    def _note_step_length(self, step: Step, i: int, gk: Tensor) -> None:
        """K[i] = h f: the first step's h falls with t0, the last one's grows with t1."""
        if self._time:
            assert step.K is not None
            h = torch.as_tensor(step.h, dtype=gk.dtype, device=gk.device)
            product = (gk * step.K[i]).sum(dim=1, keepdim=True)
            length = torch.where(h == 0, 0.0, product / torch.where(h == 0, 1.0, h) ** 2)
            self._note_edges(step, -length, length)

    def _note_stage_time(self, step: Step, i: int, dt: Tensor) -> None:
        """Stage i's time is t + c_i h, or t for a row that stays."""
        c = self.scheme.tableau.c[i] * self._edges(step)[2].to(dt.dtype)
        self._note_edges(step, (1 - c) * dt, c * dt)

    def _note_output_times(self, step: Step, group: _Interior) -> None:
        """Theta = (t_out - t) / h moves with the output time, and with the ends of the first and last step."""
        assert step.K is not None and self.time_gradient is not None
        h = torch.as_tensor(step.h, dtype=step.y.dtype, device=step.y.device).expand(len(step.y), 1)
        slope = torch.einsum("es,sed,ed->e", self.dense.slopes(group.theta), step.K[:, group.rows], group.g)
        slope = slope / h[group.rows, 0]
        carried = group.at_end & self._edges(step)[1][group.rows, 0] & (group.columns == self._last[group.rows])
        own = torch.where(carried, 0.0, slope).to(self.time_gradient.dtype)
        self.time_gradient.index_put_((group.rows, group.columns), own, accumulate=True)
        inner = slope * ~group.at_end
        # Outputs at t1 before the last one stay where they are when t1 moves on.
        ends = group.at_end & self._edges(step)[1][group.rows, 0]
        held = inner + slope * (ends & (group.columns != self._last[group.rows]))
        theta = group.theta.to(slope.dtype)
        zeros = slope.new_zeros((len(step.y), 1))
        first = zeros.index_add(0, group.rows, (inner * (theta - 1)).unsqueeze(1))
        last = zeros.index_add(0, group.rows, (-held * theta).unsqueeze(1))
        self._note_edges(step, first, last)

    def finish_times(self) -> Tensor | None:
        """Put what the first and last steps carry into t0's and t1's columns."""
        if self.time_gradient is None:
            return None
        if self._first_gradient is not None and self._last_gradient is not None:
            dtype = self.time_gradient.dtype
            self.time_gradient[:, :1] += self._first_gradient
            self.time_gradient.scatter_add_(1, self._last.unsqueeze(1), self._last_gradient.to(dtype))
        return self.time_gradient


class _AdjointDynamics:
    """State and adjoint side by side: d(y, a)/dt = (f, -a df/dy) (Chen et al. 2018, eq. 4)."""

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Any]:
        y, a = z.chunk(2, dim=1)
        f, tape = self._dynamics.linearize(t, y.contiguous())
        dy, _ = self._dynamics.pull(tape, a.contiguous())
        return torch.cat([f, -dy], dim=1), tape

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.linearize(t, z)[0]


class _Quadrature:
    """The parameters' gradient (Chen et al. 2018, eq. 5) as a quadrature over the accepted steps' stages.

    It is no part of the ODE's state: it costs nothing on rejected steps and does not enter the error norm.
    """

    wants_tapes = True

    def __init__(self, dynamics: Dynamics, adjoint: _AdjointDynamics, scheme: Scheme) -> None:
        self._dynamics, self._adjoint, self._scheme = dynamics, adjoint, scheme
        self.total: tuple[Tensor, ...] = tuple(torch.zeros_like(p) for p in dynamics.trainable())

    def record(self, y: Tensor, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        if not self.total:
            return
        tapes = attempt.tapes
        assert tapes is not None
        if not verdict.finite:
            tapes = relinearize(self._adjoint, self._scheme, Step(y, span, verdict.h, None, None))  # type: ignore[arg-type]
        used = [(tape, -b * verdict.h) for tape, b in zip(tapes, self._scheme.tableau.b, strict=True) if b != 0]
        gradients = self._dynamics.accumulate([tape for tape, _ in used], [weight for _, weight in used])
        self.total = tuple(sum_ + new for sum_, new in zip(self.total, gradients, strict=True))


class AdjointGradient:
    """The paper's continuous adjoint: O(1) memory, the state solved backwards together with its adjoint.

    Exact only up to the tolerance, and unreliable where the flow contracts strongly (its reverse expands).
    """

    keeps_steps = False

    def recorder(self, problem: Problem, keep_stages: bool) -> Recorder:
        return Record(keep_stages=True) if keep_stages else NoRecord()

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        lost = torch.isnan(run.y)
        g = torch.where(lost, 0.0, g)
        last = _last_reached(run.times, ~lost.any(dim=2))
        times = run.times.gather(1, last)
        y = run.y.gather(1, last.unsqueeze(2).expand_as(run.y)).nan_to_num(nan=0.0)
        adjoint = _AdjointDynamics(problem.dynamics)
        quadrature = _Quadrature(problem.dynamics, adjoint, problem.scheme)
        a = g[:, -1]
        for i in range(times.shape[1] - 1, 0, -1):
            pair = times[:, i - 1 : i + 1]
            moves = pair[:, :1] != pair[:, 1:]
            z = torch.cat([y[:, i], a], dim=1)
            if not run.stats.success and bool(moves.any()):
                # The field need not be finite where a row stays for good: a row that moves stands in for it.
                row = torch.argmax(moves.to(torch.int8))
                z, pair = torch.where(moves, z, z[row]), torch.where(moves, pair, pair[row, 1:])
            if bool(moves.any()):
                end = self._interval(problem, adjoint, quadrature, z, pair)
                a = torch.where(moves, end.y[:, y.shape[2] :], a)
            a = a + g[:, i - 1]
        gradient = self._time_gradient(problem, run, times, y, g, a) if time else None
        return Gradients(a, gradient, quadrature.total)

    def _interval(
        self,
        problem: Problem,
        adjoint: _AdjointDynamics,
        quadrature: _Quadrature,
        z: Tensor,
        pair: Tensor,
    ) -> End:
        control = problem.make_control(pair[:, 1], pair[:, 0], problem.scheme)
        end = integrate(adjoint, problem.scheme, z, control, quadrature)  # type: ignore[arg-type]
        failed = torch.nonzero(end.stats.status).view(-1).tolist()
        if failed:
            status = Status(int(end.stats.status[failed[0]]))
            raise SolverError(
                f"the adjoint solve going back failed for {len(failed)} of {len(z)} rows (first: row {failed[0]} at "
                f"t={float(end.stats.t[failed[0]]):.6g}): {status.message}; gradient='discrete' does not solve back.",
                failed,
            )
        return end

    def _time_gradient(self, problem: Problem, run: Run, times: Tensor, y: Tensor, g: Tensor, a: Tensor) -> Tensor:
        """dL/dt_i = g_i f(t_i, y_i), and dL/dt_0 = -a_0 f(t_0, y_0) but for the output at t_0 itself."""
        columns = []
        for i in range(times.shape[1]):
            f = problem.dynamics(times[:, i : i + 1].to(y.dtype), y[:, i].contiguous())
            cotangent = g[:, i] if i else g[:, 0] - a
            columns.append((cotangent * f).sum(dim=1))
        return torch.stack(columns, dim=1).to(run.times.dtype)


def _dead(run: Run) -> Tensor | None:
    """Rows (n, 1) where the field or the state is not finite."""
    return None if run.stats.success else (run.stats.status == Status.NON_FINITE).unsqueeze(1)


def _last_reached(times: Tensor, reached: Tensor) -> Tensor:
    """For each output the last one, itself included, that exists and was reached."""
    index = torch.arange(times.shape[1], device=times.device) * (reached & ~torch.isnan(times))
    return torch.cummax(index, dim=1).values


STRATEGIES: dict[str, GradientStrategy] = {"discrete": DiscreteGradient(), "adjoint": AdjointGradient()}
