"""Reversible steps: exact gradients with memory that does not grow, experimental (McCallum and Foster 2024).

Going back, the two states of a step (:mod:`skode.solver.coupled`) are found again step by step, and cotangents are
pulled through the two base steps.

Symbols: y and z are the states, ``gy`` and ``gz`` their cotangents; a *turn* is the base step from y' backwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skode.exceptions import ConvergenceWarning, warn
from skode.solver.coupled import CoupledStepper, Landed, Pair, at_outputs, require_outputs, restarting
from skode.solver.coupled_map import coupled_map
from skode.solver.discrete import Outputs, Sweep, TimeGradients, grouped, slopes_at_start
from skode.solver.gradients import Gradients, Run
from skode.solver.integrate import integrate
from skode.solver.interpolate import Knots
from skode.solver.numerical_map import Course
from skode.solver.problem import Problem
from skode.solver.record import Record, Step
from skode.solver.replay import effective, first_time
from skode.solver.run import last_times, minds_padding
from skode.solver.solution import Stats
from skode.solver.step import Span, make_scheme

DEVIATION = 1e-3
"""What the way back may miss y0 by, as a part of the states' size, before a warning says so."""

PARTING = 100.0
"""How many tolerances y and z may end apart before a warning says so; y is then off by about a third of that."""

ROUGH_PARTING = 0.3
"""The same for methods without tolerances, as a part of the states' size."""


@dataclass(frozen=True)
class ReversibleGradient:
    """Exact gradients of reversible steps, with memory that does not grow with their number; experimental.

    Where the field contracts, the two states part: with "tsit5" at ``rtol=1e-3``, y is off by 3, 13, 50 and 140
    tolerances for a rate of decay times a length of time of 2, 3, 4 and 5, and useless beyond. States are found again
    going back, which loses a factor ``coupling ** -n_steps`` of precision. A warning tells when either went too far.
    Steps end at all output times, and each costs two steps of the method.

    Parameters
    ----------
    coupling : float, default=0.999
        Pulls the two states together. ``(1 - coupling) * n_steps`` should be at most about 1, in float64 up to 10: a
        smaller value for few steps keeps the states closer together.

    References
    ----------
    .. [1] S. McCallum, J. Foster, "Efficient, Accurate and Stable Gradients for Neural ODEs", 2024. arXiv:2410.11648
    """

    coupling: float = 0.999
    keeps_steps = True
    interpolates = False

    def __post_init__(self) -> None:
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling={self.coupling} must be positive and at most 1.")

    def record(self, problem: Problem) -> Record:
        return Record(keep=True)

    def run(self, problem: Problem, record: Record, y0: Tensor, times: Tensor) -> Run:
        """As :func:`skode.solver.run.run`; of the record only ``keep`` counts: whether to note the steps."""
        tableau = problem.scheme.tableau
        if tableau.implicit:
            raise ValueError(
                f"gradient='reversible' needs an explicit method; {tableau.name!r} is not: use gradient='discrete'."
            )
        if problem.plan is not None:
            require_outputs(problem.plan, times)
        scheme = make_scheme(restarting(tableau), y0.dtype, y0.device)
        own = replace(problem, scheme=scheme, landings=at_outputs(problem.landings, times))
        jumps = problem.landings is not None and bool(problem.landings.jumps.any())
        stepper = CoupledStepper(scheme, problem.stepper(y0).kernel, self.coupling, jumps)
        pair = Pair(Landed(y0, times, stepper.kernel.shared_times), record.keep)
        try:
            stats = _integrate(own, stepper, pair, y0, times)
        except Exception as raised:
            if not minds_padding(raised, stepper):
                raise
            return self.run(replace(problem, padded=False), record, y0, times)
        _warn_of_parting(own, stepper, pair, stats, y0)
        y = pair.outputs.finish(stats.success)
        knots = Knots(pair.spans, stepper.kernel.layout, times[:, 0], last_times(times))
        return Run(times, y, y0.new_zeros(len(y0)), stats, stepper, pair, knots, None, {})

    def map(self, problem: Problem, fixed: Course, y0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return coupled_map(self.coupling, problem, fixed, y0, times)

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        g = torch.where(torch.isnan(run.y), 0.0, g)
        at_start = (run.times == run.times[:, :1]).unsqueeze(2)
        g_start, g = torch.where(at_start, g, 0.0), torch.where(at_start, 0.0, g)
        y0, times, parameters = _back_to_start(problem, run, g, time)
        if times is not None:
            times = times + slopes_at_start(problem, run, g_start)
        return Gradients(y0 + g_start.sum(dim=1), times, parameters)


def _integrate(problem: Problem, stepper: CoupledStepper, pair: Pair, y0: Tensor, times: Tensor) -> Stats:
    with stepper.kernel.computing():
        control = problem.control(stepper, times[:, 0], last_times(times))
        z = integrate(stepper, stepper.kernel.layout.enter(y0), control, pair)
        stats = control.stats(stepper.y + 0 * z)  # a row has failed if either state has
        pair.end = stepper.y.clone(), z.clone()
    turns = (stats.n_steps + stats.n_rejected) * stepper.base.scheme.n_stages
    return stats._replace(n_evals=stats.n_evals + turns)


def _back_to_start(problem: Problem, run: Run, g: Tensor, time: bool) -> Gradients:
    """The gradients by all outputs after the start."""
    if not (run.record.steps and bool(g.any())):
        zeros = tuple(torch.zeros_like(p) for p in problem.dynamics.trainable())
        return Gradients(torch.zeros_like(g[:, 0]), torch.zeros_like(run.times) if time else None, zeros)
    with run.stepper.kernel.computing():
        retrace = _Retrace(run, g, time)
        for step, outputs in zip(reversed(run.record.steps), reversed(list(grouped(run, g))), strict=True):
            retrace.back(step, outputs)
        deviation = retrace.deviation()
        y0, times, parameters = retrace.finish()
    _warn_of_deviation(deviation)
    # What was made in inference mode must not leave.
    return Gradients(
        y0.clone(),
        None if times is None else times.clone(),
        tuple(gradient.clone(memory_format=torch.contiguous_format) for gradient in parameters),
    )


def _warn_of_deviation(deviation: Tensor) -> None:
    """Say so if states were not found again."""
    missed = ~(deviation <= DEVIATION)
    if bool(missed.any()):
        row = int(deviation.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
        warn(
            f"gradient='reversible' missed y0 going back in {int(missed.sum())} of {len(missed)} rows, by "
            f"{float(deviation[row]):.0e} of the states' size in row {row}: the gradient is wrong by about as much. "
            f"{_ADVICE}",
            ConvergenceWarning,
        )


def _warn_of_parting(problem: Problem, stepper: CoupledStepper, pair: Pair, stats: Stats, y0: Tensor) -> None:
    """Say so if y and z ended far apart: both should be the solution."""
    if not len(y0):
        return
    assert pair.end is not None
    y, z = (stepper.kernel.layout.leave(x) for x in pair.end)
    unit = torch.maximum(y.square(), y0.square()).mean(dim=1, keepdim=True).sqrt()
    limit, of = ROUGH_PARTING, "of the states' size"
    if problem.scheme.tableau.adaptive:
        unit = problem.tolerance.unit(y, z) + 10 * torch.finfo(y.dtype).eps * y.abs()
        limit, of = PARTING, "tolerances"
    gap = ((y - z) / unit).square().mean(dim=1).sqrt().nan_to_num(nan=0.0)
    parted = (stats.status == 0) & (gap > limit)
    if bool(parted.any()):
        row = int(torch.where(parted, gap, 0.0).argmax())
        warn(
            f"the two states of gradient='reversible' ended apart in {int(parted.sum())} of {len(parted)} rows, by "
            f"{float(gap[row]):.0e} {of} in row {row}, and the solution is wrong by up to as much. {_ADVICE}",
            ConvergenceWarning,
        )


_ADVICE = (
    "The field contracts or expands too strongly over this length of time; use gradient='discrete', or a shorter "
    "interval."
)


# --- the way back --------------------------------------------------------------------------------------------------


class _Retrace:
    """Goes back through the steps: finds the states again, and pulls the cotangents through.

    Of rows that nothing is asked of (``g`` is 0) nothing is looked for. Others have no way back if they did not end
    with finite states, or once states that are found are not finite: they are ``_spoiled``.
    """

    def __init__(self, run: Run, g: Tensor, time: bool) -> None:
        assert isinstance(run.stepper, CoupledStepper) and isinstance(run.record, Pair)
        assert run.record.end is not None
        self._stepper, self._layout = run.stepper, run.stepper.kernel.layout
        self._times = _LandingTimes(run) if time else None
        self._sweep = Sweep(self._stepper.base, None, self._times)
        n_slots = self._stepper.base.n_slots
        self._leases = [self._stepper.kernel.block(n_slots, True) for _ in range(2)]
        self._y, self._z = (x.clone() for x in run.record.end)
        self._gy, self._gz = torch.zeros_like(self._y), torch.zeros_like(self._y)
        self._y0, self._size = run.y[:, 0], self._y.abs()
        asked = self._layout.enter((g != 0).flatten(1).any(dim=1, keepdim=True))
        finite = (torch.isfinite(self._y) & torch.isfinite(self._z)).all(dim=self._layout.dim, keepdim=True)
        self._spoiled, self._lost = asked & ~finite, ~(asked & finite)
        self._any_lost = bool(self._lost.any())

    def back(self, step: Step, outputs: Outputs | None) -> None:
        """Take both states and their cotangents from a step's end to its start."""
        if outputs is not None:
            self._take_in(outputs)
        step = self._with_length(step)
        coupling, span = self._stepper.coupling, effective(step)
        while True:
            idle = self._idle(step)
            if idle is not None and self._any_lost and bool(idle.all()):
                return
            turn, psi = self._leg(0, self._y, *self._stepper.turned(span), idle)
            z = self._z + psi
            ahead, psi = self._leg(1, z, first_time(self._stepper, step), span, idle)
            y = self._y.sub(z).sub_(psi).div_(coupling).add_(z)
            if self._found(y, z, idle):
                break
        # z' = z - Psi_-h(t + h, y')
        gy = self._pulled(turn, -self._gz, turned=True).add_(self._gy)
        if idle is not None:
            gy = torch.where(idle, 0.0, gy)
        # y' = z + l (y - z) + Psi_h(t, z)
        gz = self._pulled(ahead, gy, turned=False).add_(gy, alpha=1 - coupling).add_(self._gz)
        gy = gy * coupling
        if idle is not None:
            y, z = torch.where(idle, self._y, y), torch.where(idle, self._z, z)
            gy, gz = torch.where(idle, self._gy, gy), torch.where(idle, self._gz, gz)
        self._y, self._z, self._gy, self._gz = y, z, gy, gz
        self._size = torch.maximum(self._size, y.abs())
        if self._times is not None:
            self._times.land(step, outputs, self._layout.leave(self._leases[0].memory.f[0]))

    def _take_in(self, outputs: Outputs) -> None:
        g = torch.zeros_like(self._y0).index_add_(0, outputs.rows, outputs.g)
        g = self._layout.enter_cotangent(g)
        self._gy += torch.where(self._lost, 0.0, g) if self._any_lost else g

    def _found(self, y: Tensor, z: Tensor, idle: Tensor | None) -> bool:
        """Whether all rows have states; those without are given up."""
        broken = ~(torch.isfinite(y) & torch.isfinite(z)).all(dim=self._layout.dim, keepdim=True)
        if idle is not None:
            broken &= ~idle
        if not bool(broken.any()):
            return True
        self._lost, self._spoiled, self._any_lost = self._lost | broken, self._spoiled | broken, True
        self._gy, self._gz = (torch.where(broken, 0.0, g) for g in (self._gy, self._gz))
        return False

    def _with_length(self, step: Step) -> Step:
        """As the step was when it was taken."""
        h = step.span.t_next - step.span.t
        if isinstance(h, Tensor):
            h = h.to(self._y.dtype)
        counted = h if step.accept is None else h * step.accept
        return step._replace(span=step.span._replace(h=h), h=counted)

    def _idle(self, step: Step) -> Tensor | None:
        """Rows that the step does not move, if there are any."""
        if isinstance(step.h, float):
            return self._lost if self._any_lost else None
        idle = (step.h == 0) | self._lost
        return idle if bool(idle.any()) else None

    def _leg(self, number: int, x: Tensor, start: Tensor, span: Span, idle: Tensor | None) -> tuple[Step, Tensor]:
        """A base step's stages again, and its increment."""
        n_late = self._stepper.base.scheme.n_stages - 1
        if span.times is not None:
            span = span._replace(times=span.times[:n_late])
        if idle is not None:
            x, start, span = self._with_stand_in(x, start, span, idle)
        block = self._leases[number].memory
        block.y[0].copy_(x)
        psi = self._stepper.leg(block, start, span, keep=True)
        return Step(span, span.h, None, True, block, 0), psi

    def _with_stand_in(self, x: Tensor, start: Tensor, span: Span, idle: Tensor) -> tuple[Tensor, Tensor, Span]:
        """The field need not be finite where a row stays: a row that moves stands in for it, and stands still."""
        row = int(torch.argmax((~idle).reshape(-1).to(torch.int8)))
        x = torch.where(idle, self._layout.one(x, row), x)
        if isinstance(span.t, float):
            return x, start, span
        start = torch.where(idle, self._layout.one(start, row), start)
        t = torch.where(idle, self._layout.one(span.t, row), span.t)
        t_next = torch.where(idle, t, span.t_next)
        times = None if span.times is None else torch.where(idle, start, span.times)
        return x, start, Span(t, t_next, torch.where(idle, 0.0, span.h), times)

    def _pulled(self, step: Step, g: Tensor, turned: bool) -> Tensor:
        """The cotangent of a base step's start, from that of its increment."""
        if self._times is not None:
            self._times.turned = turned
        self._sweep.lam.copy_(g)
        self._sweep.through(step, None)
        return self._sweep.lam.clone()

    def deviation(self) -> Tensor:
        """What each row's way back missed y0 by, as a part of the states' size; 0 where nothing was asked."""
        y, z = self._layout.leave(self._y), self._layout.leave(self._z)
        missed = torch.maximum((y - self._y0).abs(), (z - self._y0).abs()).square().mean(dim=1).sqrt()
        size = self._layout.leave(self._size).square().mean(dim=1).sqrt()
        lost, spoiled = (self._layout.leave(rows)[:, 0] for rows in (self._lost, self._spoiled))
        deviation = torch.where(lost | (missed == 0), 0.0, missed / size)
        return torch.where(spoiled, torch.inf, deviation)

    def finish(self) -> Gradients:
        """The gradients at the start; NaN for rows whose own was lost."""
        _, times, parameters = self._sweep.finish()
        g = torch.where(self._spoiled, torch.nan, self._gy + self._gz)
        return Gradients(self._layout.leave(g), times, parameters)


class _LandingTimes(TimeGradients):
    """The times' part: t0, t1 and the output times are ends of steps, and lengthen one step and shorten the next.

    Of equal times the last one is the steps' end; the outputs at the others move with the field when their time moves.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.turned = False
        self._carries = torch.ones_like(run.times, dtype=torch.bool)
        self._carries[:, :-1] = run.times[:, 1:] != run.times[:, :-1]
        self._start, self._end = torch.zeros_like(self._t0), torch.zeros_like(self._t0)
        self._of_next = torch.zeros_like(self._t0)  # what the following step asks of its start

    def _note_edges(self, step: Step, first: Tensor, last: Tensor) -> None:
        start, end = (last, first) if self.turned else (first, last)
        self._start, self._end = self._start + start, self._end + end

    def land(self, step: Step, outputs: Outputs | None, f: Tensor) -> None:
        """Both halves of a step were pulled; ``f`` (n, d) is the field at its end."""
        moved = self._length(step) != 0
        if outputs is not None:
            rows, columns = outputs.rows, outputs.columns
            here = outputs.at_end & moved[rows, 0]
            carries = here & self._carries[rows, columns]
            alone = (f[rows] * outputs.g).sum(dim=1).to(self._own.dtype)
            alone = torch.where(here & ~carries, alone, 0.0)
            ends = (self._of_next + self._end).index_add(0, rows, -alone.unsqueeze(1))
            own = torch.where(carries, ends[rows, 0], alone)
            self._own.index_put_((rows, columns), own, accumulate=True)
        self._of_next = torch.where(moved, self._start, self._of_next)
        self._start, self._end = torch.zeros_like(self._t0), torch.zeros_like(self._t0)

    def finish(self) -> Tensor:
        self._own[:, :1] += self._of_next
        return self._own
