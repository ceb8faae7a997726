"""The paper's adjoint equation: gradients by a second solve, back in time, with memory that does not grow.

Symbols: ``g`` cotangents of outputs, ``a`` the adjoint state dL/dy, ``z = (y, a)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import SolverError
from skode.solver.control import Tolerance, Verdict
from skode.solver.dynamics import Dynamics
from skode.solver.gradients import Gradients, Run
from skode.solver.implicit import jacobian
from skode.solver.integrate import integrate
from skode.solver.layout import PADDING, RowLayout
from skode.solver.numerical_map import numerical_map
from skode.solver.problem import Landings, Problem
from skode.solver.quadrature import QuadratureDynamics
from skode.solver.record import Record, Step
from skode.solver.replay import effective
from skode.solver.run import run as run_steps
from skode.solver.solution import Stats, Status
from skode.solver.step import Attempt, Place, Span, Stepper, make_scheme
from skode.solver.tableaus import get_tableau


class _AdjointDynamics:
    """State and adjoint side by side: d(y, a)/dt = (f, -a df/dy) (Chen et al. 2018, eq. 4).

    Integrals are no part of it: nothing depends on them, so their cotangent ``a_q`` stays what the outputs made it.
    """

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics.inner if isinstance(dynamics, QuadratureDynamics) else dynamics
        self.a_q: Tensor | None = None
        self.any_rows: bool = getattr(dynamics, "any_rows", False)

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Any]:
        y, a = z.chunk(2, dim=1)
        f, tape = self._dynamics.linearize(t, y.contiguous())
        if self.a_q is not None:
            a = torch.cat([a, self.a_q], dim=1)
        dy, _ = self._dynamics.pull(tape, a.contiguous())
        return torch.cat([f[:, : y.shape[1]], -dy], dim=1), tape

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.linearize(t, z)[0]

    def jacobian(self, t: Tensor, z: Tensor) -> Tensor:
        """Of an implicit method's steps, but for what the state does to the adjoint's slope.

        That would take second derivatives; Newton's method gets by without: once the state stands, what is left is
        linear in the adjoint.
        """
        y, _ = z.chunk(2, dim=1)
        J = jacobian(self._dynamics, t, y.contiguous())
        nothing = torch.zeros_like(J)
        return torch.cat([torch.cat([J, nothing], dim=2), torch.cat([nothing, -J.mT], dim=2)], dim=1)


@dataclass
class _Quadrature(Record):
    """The parameters' gradient (Chen et al. 2018, eq. 5) as a quadrature over the accepted steps' stages.

    It is no part of the ODE's state: it costs nothing on rejected steps and does not enter the error norm. Where a
    step lands on an output, the adjoint takes on the output's cotangent and the state is set to what it was.
    """

    dynamics: Any = None
    adjoint: Any = None
    outputs: Tensor | None = None
    back: Tensor | None = None
    columns: Any = None
    control: Any = None
    total: tuple[Tensor, ...] = field(default=())

    @property
    def keeps_stages(self) -> bool:
        return True  # as tapes, for as long as the step lasts

    @property
    def wants_steps(self) -> bool:
        return False

    def note_span(self, span: Span, verdict: Verdict) -> None:
        """Nobody asks for them."""

    def _room(self, stepper: Stepper, place: Place | None = None) -> tuple[Any, int]:
        if self._scratch is None:
            self._scratch = stepper.kernel.block(2 * stepper.n_slots, True)
        block = self._scratch.memory
        return block, stepper.n_slots if place is not None and place.slot < stepper.n_slots else 0

    def advance(
        self, stepper: Stepper, place: Place, span: Span, attempt: Attempt, verdict: Verdict, own: bool
    ) -> Place:
        self._add(stepper, place, span, verdict)
        following = super().advance(stepper, place, span, attempt, verdict, own)
        tapes: list[Any] = place.block.tapes  # type: ignore[attr-defined]
        end = place.slot + stepper.scheme.end
        known = following.known and verdict.accept is None
        if known:
            following.block.tapes[following.slot] = tapes[end]  # type: ignore[attr-defined]
        if verdict.jumped:
            self._land(following.y)
        return following._replace(known=known and not verdict.jumped)

    def _land(self, z: Tensor) -> None:
        """Where rows have come to outputs, take these in."""
        assert self.outputs is not None and self.back is not None
        d = z.shape[1] // 2
        if isinstance(self.control.t, float):
            column = self.columns.get(self.control.t)
            if column is None:
                return
            output, rows = self.outputs[column], None
        else:
            here = self.back == self.control.t
            rows = here.any(dim=1, keepdim=True) & self.control.landed
            first = torch.argmax(here.to(torch.int8), dim=1, keepdim=True)
            output = self.outputs.gather(0, first.unsqueeze(0).expand(1, -1, self.outputs.shape[2]))[0]
        landed = torch.cat([output[:, :d], z[:, d:] + output[:, d : 2 * d]], dim=1)
        z.copy_(landed if rows is None else torch.where(rows, landed, z))
        if self.adjoint.a_q is not None:
            new = output[:, 2 * d :]
            self.adjoint.a_q = self.adjoint.a_q + (new if rows is None else torch.where(rows, new, 0.0))

    def _add(self, stepper: Stepper, place: Place, span: Span, verdict: Verdict) -> None:
        if not self.total:
            return
        if not verdict.finite:
            # Rows that stay are linearised where they stand: what was tried for them need not be finite.
            step = Step(span, verdict.h, verdict.accept, True, None, 0)
            stepper.attempt(place, effective(step), True)
        tapes = place.block.tapes[place.slot :]  # type: ignore[attr-defined]
        used = [(tape, -b * verdict.h) for tape, b in zip(tapes, stepper.scheme.tableau.b, strict=False) if b != 0]
        gradients = self.dynamics.accumulate([tape for tape, _ in used], [weight for _, weight in used])
        self.total = tuple(sum_ + new for sum_, new in zip(self.total, gradients, strict=True))


@dataclass(frozen=True)
class AdjointGradient:
    """The paper's continuous adjoint: O(1) memory, the state solved backwards together with its adjoint.

    Exact only up to the tolerance, and unreliable where the flow contracts strongly (its reverse expands).

    Parameters
    ----------
    method : str, optional
        The forward solve's if not given; so are the tolerances.
    rtol, atol : float, optional

    Examples
    --------
    >>> import torch
    >>> from skode.fields import MLPField
    >>> from skode.solver import AdjointGradient, solve
    >>> field = MLPField(2, generator=torch.Generator().manual_seed(0))
    >>> y = solve(field, torch.ones(3, 2), [0.0, 1.0], gradient=AdjointGradient(rtol=1e-5, atol=1e-7)).y1
    >>> y.square().sum().backward()
    >>> all(parameter.grad is not None for parameter in field.parameters())
    True
    """

    method: str | None = None
    rtol: float | None = None
    atol: float | None = None
    keeps_steps: bool = False
    interpolates = True
    run = staticmethod(run_steps)
    map = staticmethod(numerical_map)

    def record(self, problem: Problem) -> Record:
        return Record(keep_values=problem.keeps_dense)

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        lost = torch.isnan(run.y)
        g = torch.where(lost, 0.0, g)
        last = _last_reached(run.times, ~lost.any(dim=2))
        times = run.times.gather(1, last)
        y = run.y.gather(1, last.unsqueeze(2).expand_as(run.y)).nan_to_num(nan=0.0)
        d = y.shape[2] - getattr(problem.dynamics, "n_quadratures", 0)
        own = self._problem(problem, d)
        if run.found is not None:
            own = replace(own, batch=None)  # the rows start back at times of their own
        quadrature = _Quadrature(
            keep=True,
            dynamics=problem.dynamics,
            adjoint=own.dynamics,
            total=tuple(torch.zeros_like(p) for p in problem.dynamics.trainable()),
        )
        # Rows may be copied if the solve itself could do it.
        pads = own.batch is None and own.dynamics.any_rows and not isinstance(run.stepper.kernel.layout, RowLayout)  # type: ignore[attr-defined]
        a = self._solve_back(own, quadrature, times, y, g, d, run.stats.success, pads)
        gradient = self._time_gradient(problem, run, times, y, g, a) if time else None
        return Gradients(a, gradient, quadrature.total)

    def _problem(self, problem: Problem, d: int) -> Problem:
        """The adjoint's: twice as many components, each with its state's tolerances."""
        tableau = problem.scheme.tableau if self.method is None else get_tableau(self.method)
        scheme = make_scheme(tableau, problem.scheme.b.dtype, problem.scheme.b.device)
        tolerance = problem.tolerance
        if self.rtol is not None:
            tolerance = tolerance.replace(rtol=float(self.rtol))
        if self.atol is not None:
            tolerance = tolerance.replace(atol=torch.as_tensor(self.atol, dtype=scheme.b.dtype, device=scheme.b.device))
        batch = problem.batch
        if batch is not None and batch.norm is not None:
            batch = replace(batch, norm=_of_both(batch.norm, d))
        return replace(
            problem,
            batch=batch,
            dynamics=_AdjointDynamics(problem.dynamics),  # type: ignore[arg-type]
            scheme=scheme,
            tolerance=_doubled(tolerance, d),
            keep_errors=False,
            dense=False,
            padded=False,
            watched=None,
            plan=None,
        )

    def _solve_back(
        self,
        problem: Problem,
        quadrature: _Quadrature,
        times: Tensor,
        y: Tensor,
        g: Tensor,
        d: int,
        success: bool,
        pads: bool,
    ) -> Tensor:
        """The adjoint state at t0 of ``d`` components, then the integrals'; all outputs are taken in on the way."""
        n = len(y)
        if pads and y.dtype == torch.float32:
            # Copies of rows, asked for nothing, so that no row is treated differently by reason of its place.
            rows = torch.arange(n + -n % PADDING, device=y.device) % n
            times, y, g = times[rows], y[rows], torch.nn.functional.pad(g, (0, 0, 0, 0, 0, len(rows) - n))
            if problem.landings is not None:
                problem = replace(problem, landings=replace(problem.landings, t=problem.landings.t[rows]))
        back, outputs, at_start = _outputs_on_the_way(times, y[..., :d], g)
        z, t_last, t_first = outputs[0, :, : 2 * d].contiguous(), times[:, -1], times[:, 0]
        moves = (t_last != t_first).unsqueeze(1)
        a, a_q = z[:, d:], outputs[0, :, 2 * d :]
        quadrature.adjoint.a_q = a_q if a_q.shape[1] else None
        if bool(moves.any()):
            if not success:
                # The field need not be finite where a row stays for good: a row that moves stands in for it.
                row = int(torch.argmax(moves.to(torch.int8)))
                z = torch.where(moves, z, z[row])
                t_first = torch.where(moves[:, 0], t_first, t_first[row])
                t_last = torch.where(moves[:, 0], t_last, t_first[row])
            problem = replace(problem, landings=_with_outputs(problem.landings, back))
            stepper = problem.stepper(z)
            quadrature.control = problem.control(stepper, t_last, t_first)
            quadrature.outputs, quadrature.back = outputs, torch.where(back == back[:, -1:], torch.nan, back)
            if problem.batch is not None:
                quadrature.columns = _columns_on_the_way(back[0].tolist())
            end = integrate(stepper, z, quadrature.control, quadrature)
            self._check(quadrature.control.stats(end))
            a = torch.where(moves, end[:, d:], a)
        if quadrature.adjoint.a_q is not None:
            a = torch.cat([a, quadrature.adjoint.a_q], dim=1)
        return (a + at_start)[:n]

    @staticmethod
    def _check(stats: Stats) -> None:
        failed = torch.nonzero(stats.status).view(-1).tolist()
        if failed:
            status = Status(int(stats.status[failed[0]]))
            raise SolverError(
                f"the adjoint solve going back failed for {len(failed)} of {len(stats.status)} rows (first: row "
                f"{failed[0]} at t={float(stats.t[failed[0]]):.6g}): {status.message}; gradient='discrete' does not "
                "solve back.",
                failed,
            )

    def _time_gradient(self, problem: Problem, run: Run, times: Tensor, y: Tensor, g: Tensor, a: Tensor) -> Tensor:
        """dL/dt_i = g_i f(t_i, y_i), and dL/dt_0 = -a_0 f(t_0, y_0) but for the output at t_0 itself."""
        columns = []
        for i in range(times.shape[1]):
            f = problem.dynamics(times[:, i : i + 1].to(y.dtype), y[:, i].contiguous())
            cotangent = g[:, i] if i else g[:, 0] - a
            columns.append((cotangent * f).sum(dim=1))
        return torch.stack(columns, dim=1).to(run.times.dtype)


def _of_both(norm: Callable[[Tensor], Tensor | float], d: int) -> Callable[[Tensor], float]:
    """The state's norm, for state and adjoint: whichever is larger."""
    return lambda ratio: max(float(norm(ratio[:, :d])), float(norm(ratio[:, d:])))


def _doubled(tolerance: Tolerance, d: int) -> Tolerance:
    rtol, atol = tolerance.rtol, tolerance.atol
    changes: dict[str, Any] = {"atol": torch.cat([atol[:d], atol[:d]])} if atol.dim() else {}
    if isinstance(rtol, Tensor):
        changes["rtol"] = torch.cat([rtol[:d], rtol[:d]]) if rtol.dim() else rtol
    return tolerance.replace(**changes)


def _last_reached(times: Tensor, reached: Tensor) -> Tensor:
    """For each output the last one, itself included, that exists and was reached."""
    index = torch.arange(times.shape[1], device=times.device) * (reached & ~torch.isnan(times))
    return torch.cummax(index, dim=1).values


def _outputs_on_the_way(times: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Going back: times (n, m), outputs (m, n, d + ...), states beside cotangents, and the cotangent at the start.

    Of outputs at equal times the first on the way has the cotangents of all.
    """
    back, g = times.flip(1), g.flip(1)
    at_start = (back == times[:, :1]) & (times[:, -1:] != times[:, :1])
    rest = torch.where(at_start.unsqueeze(2), 0.0, g)
    index = torch.arange(back.shape[1], device=back.device).expand(len(back), -1)
    new = torch.cat([torch.ones_like(at_start[:, :1]), back[:, 1:] != back[:, :-1]], dim=1)
    group = torch.cummax(torch.where(new, index, 0), dim=1).values
    merged = torch.zeros_like(rest).scatter_add_(1, group.unsqueeze(2).expand_as(rest), rest)
    outputs = torch.cat([y.flip(1), merged], dim=2).transpose(0, 1)
    return back, outputs, (g * at_start.unsqueeze(2)).sum(dim=1)


def _with_outputs(landings: Landings | None, back: Tensor) -> Landings | None:
    """The solve's own landings, and the outputs between its ends."""
    if back.shape[1] <= 2:
        return landings
    jumps = torch.ones(back.shape[1], dtype=torch.bool, device=back.device)
    if landings is None:
        return Landings(back, jumps, aside=False)
    return Landings(torch.cat([back, landings.t], dim=1), torch.cat([jumps, landings.jumps]), landings.aside)


def _columns_on_the_way(times: list[float]) -> dict[float, int]:
    """Of outputs that all rows share, the first column with each time between the ends."""
    return {times[j]: j for j in reversed(range(1, len(times))) if times[j] not in (times[0], times[-1])}
