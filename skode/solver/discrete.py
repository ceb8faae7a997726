"""The exact gradient of a solve: the derivative of the numerical map with its accepted steps held fixed.

Symbols: ``g`` cotangents of outputs, ``lam`` that of a step's state, ``a[i]`` of stage i's value, ``v[i]`` of its
state, ``V`` all of these with lam as the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.gradients import Gradients, Run
from skode.solver.interpolate import slopes, weights
from skode.solver.numerical_map import numerical_map
from skode.solver.problem import Problem
from skode.solver.record import Record, Step
from skode.solver.replay import first_time, replayed
from skode.solver.run import run as run_steps
from skode.solver.solution import Status
from skode.solver.step import Stepper


class DiscreteGradient:
    """The exact derivative of the numerical map with its accepted steps held fixed.

    The first step carries t0, the last one t1; times between take the interpolant's slope. No rejected step is
    differentiated, and the cost does not depend on the number of output times.

    Examples
    --------
    ``gradient="discrete"`` stands for it:

    >>> import torch
    >>> from skode.solver import DiscreteGradient, solve
    >>> y0 = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    >>> y1 = solve(lambda t, y: -y, y0, [0.0, 1.0], gradient=DiscreteGradient(), rtol=1e-8).y1
    >>> torch.autograd.grad(y1.sum(), y0)[0].allclose(y1)  # of a linear field, up to rounding
    True
    """

    keeps_steps = True
    interpolates = True
    run = staticmethod(run_steps)
    map = staticmethod(numerical_map)

    def record(self, problem: Problem) -> Record:
        return Record(True, problem.memory_budget, problem.keeps_dense, problem.keep_errors)

    def backward(self, problem: Problem, run: Run, g: Tensor, g_error: Tensor, time: bool) -> Gradients:
        if not run.record.steps:
            times = slopes_at_start(problem, run, torch.nan_to_num(g)) if time else None
            zeros = tuple(torch.zeros_like(p) for p in problem.dynamics.trainable())
            return Gradients(torch.nan_to_num(g).sum(dim=1), times, zeros)
        with run.stepper.kernel.computing():
            errors = g_error if run.record.keep_errors else None
            sweep = Sweep(run.stepper, errors, TimeGradients(run) if time else None)
            layout = run.stepper.kernel.layout
            if not problem.dense:
                last = g[:, 1] if run.stats.success else torch.where(torch.isnan(run.y[:, 1]), 0.0, g[:, 1])
                sweep.lam.copy_(layout.enter_cotangent(last.contiguous()))
                groups: list[Outputs | None] = [None] * len(run.record.steps)
            else:
                groups = list(grouped(run, g))
            position = len(groups)
            for stretch in _stretches(run):
                for step in reversed(stretch):
                    position -= 1
                    sweep.through(step, groups[position])
                # Its memory is free before the next one's stages are computed.
                del stretch, step
            y0, times, parameters = sweep.finish()
        if times is not None:
            times = _with_standing_rows(problem, run, g, times.clone())
        # What was made in inference mode must not leave.
        return Gradients(
            y0 + g[:, 0],
            times,
            tuple(gradient.clone(memory_format=torch.contiguous_format) for gradient in parameters),
        )


def slopes_at_start(problem: Problem, run: Run, g: Tensor) -> Tensor:
    """Output times equal to t0: the output moves with the field when its time moves alone."""
    slopes = torch.zeros_like(run.times)
    later = run.times[:, 1:] == run.times[:, :1]
    if bool(later.any()):
        t = run.times[:, :1].to(g.dtype)
        if run.record.steps:
            layout = run.stepper.kernel.layout
            t = layout.leave(first_time(run.stepper, run.record.steps[0]).expand(layout.row)).clone()
        f = problem.dynamics(t, run.y[:, 0].contiguous())
        # Rows that nothing is asked of may have no field there.
        product = torch.where(g[:, 1:] == 0, 0.0, g[:, 1:] * f.unsqueeze(1))
        slopes[:, 1:] = torch.where(later, product.sum(dim=2), 0.0)
        slopes[:, 0] = -slopes[:, 1:].sum(dim=1)
    return slopes


def _with_standing_rows(problem: Problem, run: Run, g: Tensor, times: Tensor) -> Tensor:
    """The times' gradients, those of rows whose times are all the same put right: no step is theirs."""
    standing = ((run.times == run.times[:, :1]) | torch.isnan(run.times)).all(dim=1, keepdim=True)
    if not bool(standing.any()):
        return times
    return torch.where(standing, slopes_at_start(problem, run, torch.where(standing.unsqueeze(2), g, 0.0)), times)


def _stretches(run: Run) -> Iterator[list[Step]]:
    """The steps from the last to the first, in stretches whose stages are at hand."""
    steps = run.record.steps
    if steps[0].block is not None:
        yield steps
        return
    dead = None
    if bool((run.stats.status == Status.NON_FINITE).any()):
        dead = (run.stats.status == Status.NON_FINITE).view(-1, 1)
        dead = run.stepper.kernel.layout.enter(dead)
    starts = [i for i, step in enumerate(steps) if i % run.record.stride == 0]
    for start, end in reversed(list(zip(starts, [*starts[1:], len(steps)], strict=True))):
        again, leases = replayed(run.stepper, steps[start:end], dead)
        yield again
        del again, leases


class Outputs(NamedTuple):
    """Cotangents of outputs that belong to one step, as flat entries."""

    rows: Tensor
    columns: Tensor
    theta: Tensor
    at_end: Tensor
    g: Tensor


def grouped(run: Run, g: Tensor) -> Iterator[Outputs | None]:
    """The outputs after the first, sorted by the step that covers them."""
    n_steps = len(run.record.steps)
    places = run.knots.locate(run.times[:, 1:])
    step = torch.where(places.beyond, n_steps, places.step).reshape(-1)
    order = torch.argsort(step, stable=True)
    counts = torch.bincount(step, minlength=n_steps + 1).tolist()
    n_columns = places.step.shape[1]
    start = 0
    for count in counts[:n_steps]:
        entries = order[start : start + count]
        start += count
        if not count:
            yield None
            continue
        rows, columns = entries // n_columns, entries % n_columns
        inner = (rows, columns)
        yield Outputs(rows, columns + 1, places.theta[inner], places.at_end[inner], g[rows, columns + 1])


class Sweep:
    """One way back through the steps, each evaluation of the field pulled exactly once.

    A first-same-as-last method evaluates a step's first stage as the last one of the step before: what it is asked for
    is carried there. ``lam`` is the cotangent of the state where the sweep has arrived.
    """

    def __init__(self, stepper: Stepper, g_error: Tensor | None, times: TimeGradients | None) -> None:
        self._scheme, self._layout = stepper.scheme, stepper.kernel.layout
        self._n, self._end = self._scheme.n_stages, self._scheme.tableau.end_stage
        self._way = stepper.kernel.way_back(self._n)
        self._room = self._way.room
        self.lam = self._room.v[self._n]
        self._g_error = None if g_error is None else self._layout.enter_cotangent(g_error.unsqueeze(1))
        self._carries, self._extras_used = False, False
        self._times = times

    def through(self, step: Step, outputs: Outputs | None) -> None:
        """Take ``lam`` from the step's end to its start."""
        assert step.block is not None
        asked = self._asked_from_outside(step, outputs)
        kept_back = self._split(step)
        self._way.begin_step(step.h)
        if isinstance(step.h, float):
            torch.mul(self._scheme.back.weights, step.h, out=self._room.scaled)
        top = self._last_asked(asked)
        if asked is _NOTHING and self._times is None:
            self._through_stages(step, top)
        else:
            for i in range(top, 0, -1):
                self._ask(step, i, asked)
                self._pull(step, i)
        if step.own:
            self._ask(step, 0, asked, kept_back)
            self._pull(step, 0)
        if top or step.own:
            self._way.accumulate(step.block, step.slot, 0 if step.own else 1, top + 1)
        if not step.own:
            assert self._end is not None
            # Its place is free again: the step before finds there what its last stage is asked for.
            self._ask(step, 0, asked, kept_back, into=self._end)
        self._carries = not step.own
        self._to_start(step, asked)

    def _through_stages(self, step: Step, top: int) -> None:
        """What ``_ask`` and ``_pull`` do where nothing comes from outside, which is most of the time."""
        room, pull, end, mv = self._room, self._way.pull, self._end, torch.mv
        shared = isinstance(step.h, float)
        rows = room.scaled_rows if shared else self._scheme.back.rows
        for i in range(top, 0, -1):
            if i == end:
                self._ask(step, i, _NOTHING)
                self._pull(step, i)
                continue
            mv(room.stacks[i + 1], rows[i], out=room.a_flat[i])
            if not shared:
                room.a[i].mul_(step.h)
            pull(step.block, step.slot, i, room.v[i], False)

    def _last_asked(self, asked: _Asked) -> int:
        """The last stage that has any cotangent; all before it have one then."""
        for i in range(self._n - 1, 0, -1):
            if self._is_asked(i, asked):
                return i
        return 0

    def _is_asked(self, i: int, asked: _Asked) -> bool:
        if asked.stages is not None or self._scheme.back.used[i] or (i == self._end and self._carries):
            return True
        return asked.error is not None and any(e[i] != 0 for e in self._scheme.tableau.estimates)

    def _ask(self, step: Step, i: int, asked: _Asked, kept_back: Tensor | None = None, into: int | None = None) -> None:
        """Set ``a[i]``: from later stages' states and the solution, the outputs, the error, and what is carried."""
        h, place = step.h, i if into is None else into
        carried = self._carries and i == self._end
        room = self._room
        a, flat = (room.new, room.new_flat) if carried else (room.a[place], room.a_flat[place])
        rows = room.scaled_rows if isinstance(h, float) else self._scheme.back.rows
        torch.mv(room.stacks[i + 1], rows[i], out=flat)
        scale = h if isinstance(h, float) else 1.0
        if asked.error is not None:
            for error, e in zip(asked.error, self._scheme.tableau.estimates, strict=True):
                a.add_(error, alpha=e[i] * scale)
        if asked.stages is not None:
            a.add_(asked.stages[i], alpha=scale)
        if not isinstance(h, float):
            a.mul_(h)
        if self._times is not None:
            self._times.note_length(step, i, a)
        if kept_back is not None:
            a.add_(kept_back)
        if carried:
            room.a[i].add_(a)

    def _pull(self, step: Step, i: int) -> None:
        out = self._room.new if i == self._end else self._room.v[i]
        dt = self._way.pull(step.block, step.slot, i, out, self._times is not None)
        if self._times is not None:
            self._times.note_stage(step, i, dt, out)
        if i == self._end:
            # What the field at the new state asks of its state, it asks of the solution.
            self.lam.add_(out)

    def _split(self, step: Step) -> Tensor | None:
        """What is carried belongs to the last stage of rows that went on, and to the first of those that stayed."""
        if step.accept is None or not self._carries:
            return None
        assert self._end is not None
        carried = self._room.a[self._end]
        kept_back = torch.where(step.accept, 0.0, carried)
        carried.mul_(step.accept)
        return kept_back

    def _to_start(self, step: Step, asked: _Asked) -> None:
        torch.mv(self._room.stacks[1], self._scheme.back.start, out=self._room.new_flat)
        self.lam.copy_(self._room.new)
        if step.own:
            self.lam.add_(self._room.v[0])
        if asked.start is not None:
            self.lam.add_(asked.start)

    def finish(self) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Gradients of y0 ``(n, d)``, of the times, and of the parameters."""
        times = None if self._times is None else self._times.finish()
        return self._layout.leave(self.lam), times, self._way.gradients()

    # --- what outputs and errors ask for ---

    def _asked_from_outside(self, step: Step, outputs: Outputs | None) -> _Asked:
        error = None if step.error is None or self._g_error is None else step.error * self._g_error
        if self._extras_used:
            self._clear_extras()
        if outputs is None:
            return _NOTHING if error is None else _Asked(error, None, None)
        inner = ~outputs.at_end
        n, d = self._layout.n, self._layout.d
        at_end = self.lam.new_zeros((n, d)).index_add_(0, outputs.rows, outputs.g * outputs.at_end.unsqueeze(1))
        self.lam.add_(self._layout.enter_cotangent(at_end))
        if self._times is not None:
            self._times.note_outputs(step, outputs)
        if not bool(inner.any()):
            return _Asked(error, None, None)
        g = outputs.g * inner.unsqueeze(1)
        start = self.lam.new_zeros((n, d)).index_add_(0, outputs.rows, g)
        beta = weights(self._scheme, outputs.theta)
        stages = self.lam.new_zeros((self._n, n, d)).index_add_(1, outputs.rows, (beta.t().unsqueeze(2) * g))
        self._extras_used = True
        return _Asked(
            error, [self._layout.enter_cotangent(stage) for stage in stages], self._layout.enter_cotangent(start)
        )

    def _clear_extras(self) -> None:
        """Stages that only outputs inside of a step ask for give nothing in a step without any."""
        for i in range(self._scheme.tableau.n_main, self._n):
            self._room.v[i].zero_()
        self._extras_used = False


class _Asked(NamedTuple):
    """Cotangents from outside of the step: of its error's estimates, its stages' values (over h), and its start."""

    error: Tensor | None
    stages: list[Tensor] | None
    start: Tensor | None


_NOTHING = _Asked(None, None, None)


class TimeGradients:
    """The times' part: the first step's length falls with t0, the last one's grows with t1."""

    def __init__(self, run: Run) -> None:
        self._layout, self._scheme = run.stepper.kernel.layout, run.stepper.scheme
        self._shape = run.times.shape
        times = run.times
        self._last = (~torch.isnan(times)).sum(dim=1) - 1
        self._t0, self._t1 = times[:, :1], times.gather(1, self._last.unsqueeze(1))
        self._own = torch.zeros_like(times)
        self._first_part = torch.zeros_like(self._t0)
        self._last_part = torch.zeros_like(self._t0)

    def note_length(self, step: Step, i: int, a: Tensor) -> None:
        """With ``a`` the cotangent of F_i, which has h as a factor."""
        assert step.block is not None
        product = self._rows((a * step.block.f[step.slot + i]).sum(dim=self._layout.dim, keepdim=True))
        self._note_length(step, product)

    def _note_length(self, step: Step, product: Tensor) -> None:
        """Of a product that still has h as a factor."""
        h = self._length(step)
        length = torch.where(h == 0, 0.0, product / torch.where(h == 0, 1.0, h))
        self._note_edges(step, -length, length)

    def note_stage(self, step: Step, i: int, dt: Tensor | None, v: Tensor) -> None:
        """Stage i's time is t + c_i h, or t for a row that stays; an implicit stage's state has a part of its own."""
        assert step.block is not None
        gamma = self._scheme.tableau.gamma
        if gamma and i:
            own = (v * step.block.f[step.slot + i]).sum(dim=self._layout.dim, keepdim=True)
            length = gamma * self._rows(own) * (self._length(step) != 0)
            self._note_edges(step, -length, length)
        if dt is not None:
            dt = self._rows(dt)
            c = self._scheme.tableau.c[i] * (self._length(step) != 0).to(dt.dtype)
            self._note_edges(step, (1 - c) * dt, c * dt)

    def note_outputs(self, step: Step, outputs: Outputs) -> None:
        """Theta = (t_out - t) / h moves with the output time, and with the ends of the first and last step."""
        assert step.block is not None
        n = self._scheme.n_stages
        values = self._layout.leave(step.block.F[step.slot : step.slot + n])
        slope = torch.einsum(
            "es,sed,ed->e", slopes(self._scheme, outputs.theta), values[:, outputs.rows], outputs.g
        ).to(self._own.dtype)
        ends = outputs.at_end & self._edges(step)[1][outputs.rows, 0]
        carried = ends & (outputs.columns == self._last[outputs.rows])
        self._own.index_put_((outputs.rows, outputs.columns), torch.where(carried, 0.0, slope), accumulate=True)
        inner = slope * ~outputs.at_end
        # Outputs at t1 before the last one stay where they are when t1 moves on.
        held = inner + slope * (ends & ~carried)
        zeros = torch.zeros_like(self._first_part)
        first = zeros.index_add(0, outputs.rows, (inner * (outputs.theta - 1)).unsqueeze(1))
        last = zeros.index_add(0, outputs.rows, (-held * outputs.theta).unsqueeze(1))
        self._note_edges(step, first, last)

    def finish(self) -> Tensor:
        """Put what the first and last steps carry into t0's and t1's columns."""
        self._own[:, :1] += self._first_part
        self._own.scatter_add_(1, self._last.unsqueeze(1), self._last_part)
        return self._own

    def _note_edges(self, step: Step, first: Tensor, last: Tensor) -> None:
        """Add ``first`` where this step starts at t0 and ``last`` where it ends at t1."""
        starts, ends = self._edges(step)
        self._first_part += first * starts
        self._last_part += last * ends

    def _edges(self, step: Step) -> tuple[Tensor, Tensor]:
        """For each row: does the step start at t0, end at t1? Shape (n, 1)."""
        t, t_next = self._numbers(step.span.t), self._numbers(step.span.t_next)
        return self._t0 == t, (self._t1 == t_next) & (self._length(step) != 0)

    def _length(self, step: Step) -> Tensor:
        return self._numbers(step.h)

    def _numbers(self, x: Any) -> Tensor:
        """A number, or one for each row, as (n, 1)."""
        if isinstance(x, float):
            return torch.full_like(self._t0, x)
        return self._rows(x)

    def _rows(self, x: Tensor) -> Tensor:
        return self._layout.leave(x).to(self._t0.dtype)
