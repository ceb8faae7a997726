"""What is kept of a solve: nothing, its steps' stages as they were computed, or states to compute them from again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver.arena import Block, Lease
from skode.solver.control import Verdict
from skode.solver.step import Attempt, Place, Span, Stepper

BLOCK_BYTES = 2**21
"""Blocks hold several steps, but no more than about this much, and at least one."""


class Step(NamedTuple):
    """A step that counted for some row.

    ``h`` is what counted (0 for rows that stay), ``accept`` the rows that went on (None: all that wanted to). ``own``
    tells whether the first stage was evaluated for this step, not handed on, and ``start_time`` when, if that is not
    simply the span's start; ``f`` is what was handed on, where an evaluation would not give it again. Stages lie in
    ``block`` from ``slot`` on (None: they are computed again from a state before). ``F`` are the field's values for
    dense output, ``y`` the state at the start where it is kept apart, ``error`` the derivative of the squared error
    with the error's estimates.
    """

    span: Span
    h: Any
    accept: Tensor | None
    own: bool
    block: Block | None
    slot: int
    y: Tensor | None = None
    F: Tensor | None = None
    error: Tensor | None = None
    start_time: Tensor | None = None
    f: Tensor | None = None


@dataclass
class Record:
    """Leases the memory that a solve runs in, and keeps what is asked for.

    Parameters
    ----------
    keep : bool
        Whether stages are to be differentiated: they stay where they are computed while that fits into ``budget``;
        after that, states only, thinned so that they fit.
    budget : int
        Bytes.
    keep_values : bool
        Whether dense output is wanted: states and field values of every step.
    keep_errors : bool
        ``error`` then adds up the rows' squared errors in units of the tolerance.
    spans : list of (start, end, accept)
        Where steps began and ended, and which rows they counted for; a few numbers a step.
    """

    keep: bool = False
    budget: int = 0
    keep_values: bool = False
    keep_errors: bool = False
    steps: list[Step] = field(default_factory=list)
    error: Tensor | None = None
    stride: int = 0
    spans: list[tuple[Any, Any, Tensor | None]] = field(default_factory=list)
    n_expected: int | None = None  # how many steps there will be, if that is known

    def __post_init__(self) -> None:
        self.leases: list[Lease[Any]] = []
        self._scratch: Lease[Any] | None = None
        self._n_kept_states, self._used = 0, 0
        if self.keep and self.budget <= 0:
            self.stride = 1

    @property
    def keeps_stages(self) -> bool:
        """Whether the next step's stages stay where they are computed."""
        return self.keep and not self.stride

    @property
    def wants_steps(self) -> bool:
        """Whether steps are listed at all."""
        return self.keep or self.keep_values

    def note_span(self, span: Span, verdict: Verdict) -> None:
        """Keep when a step began and ended."""
        self.spans.append((span.t, span.t_next, verdict.accept))

    def open(self, stepper: Stepper, y: Tensor) -> Place:
        """Room for the first step, from a state."""
        block, slot = self._room(stepper)
        block.y[slot].copy_(y)
        return Place(block, slot, False)

    def advance(
        self, stepper: Stepper, place: Place, span: Span, attempt: Attempt, verdict: Verdict, own: bool
    ) -> Place:
        """Note a step, and say where the next one begins."""
        error = self._note_error(stepper, verdict) if self.keep_errors else None
        self.note_span(span, verdict)
        if self.wants_steps:
            self._note(stepper, place, span, verdict, own, error)
        handed_on = stepper.scheme.tableau.fsal and not verdict.jumped
        first = place.slot + stepper.scheme.end
        if verdict.accept is None and stepper.scheme.flat and not verdict.jumped:
            if first + stepper.n_slots <= place.block.n_slots:
                return Place(place.block, first, handed_on)
            first = -1
        else:
            first = place.slot + stepper.n_slots if self.keeps_stages else -1
        block, slot = place.block, first
        if first < 0 or first + stepper.n_slots > block.n_slots:
            block, slot = self._room(stepper, place)
        return self._hand_on(stepper, place, verdict, block, slot, handed_on)

    def _hand_on(
        self, stepper: Stepper, place: Place, verdict: Verdict, block: Block, slot: int, handed_on: bool
    ) -> Place:
        """Copy to a new slot the state, and the field's value if known, of rows that went on and that did not."""
        end = place.slot + stepper.scheme.end
        source, accept = place.block, verdict.accept
        if accept is None:
            block.y[slot].copy_(source.y[end])
        else:
            block.y[slot].copy_(torch.where(accept, source.y[end], place.y))
        if handed_on:
            block.f[slot].copy_(source.f[end] if accept is None else torch.where(accept, source.f[end], place.f))
        return Place(block, slot, handed_on)

    def anew(self) -> Record:
        """Another record that keeps the same, still empty."""
        return Record(self.keep, self.budget, self.keep_values, self.keep_errors)

    # --- memory ---

    def _room(self, stepper: Stepper, place: Place | None = None) -> tuple[Block, int]:
        """A block's beginning. What is not kept is computed in two scratch blocks by turns."""
        if self.keeps_stages and len(self.steps) != self.n_expected:
            n_slots = stepper.n_slots
            nbytes = self._block_bytes(stepper, n_slots)
            ahead = 8 if self.n_expected is None else min(8, self.n_expected - len(self.steps))
            n_steps = max(1, min(ahead, min(BLOCK_BYTES, self.budget - self._used) // max(nbytes, 1)))
            lease = stepper.kernel.block(n_steps * (n_slots - 1) + 1, True)
            self.leases.append(lease)
            self._used += lease.memory.nbytes
            return lease.memory, 0
        if self._scratch is None:
            self._scratch = stepper.kernel.block(2 * stepper.n_slots, False)
        # The other half of the scratch block.
        half = stepper.n_slots
        block: Block = self._scratch.memory
        in_first = place is not None and place.block is block and place.slot < half
        return block, half if in_first else 0

    @staticmethod
    def _block_bytes(stepper: Stepper, n_slots: int) -> int:
        return stepper.kernel.slot_bytes * n_slots

    # --- steps ---

    def _note(
        self, stepper: Stepper, place: Place, span: Span, verdict: Verdict, own: bool, error: Tensor | None
    ) -> None:
        if self.keeps_stages and not verdict.finite:
            self._keep_states_only(stepper)
        values = None
        n = stepper.scheme.n_stages
        if self.keep_values and not self.keeps_stages:
            values = place.block.F[place.slot : place.slot + n].clone()
        if self.keeps_stages:
            step = Step(span, verdict.h, verdict.accept, own, place.block, place.slot, None, None, error)
        else:
            y, f = None, None
            if self.keep_values or (self.stride and len(self.steps) % self.stride == 0):
                y = place.y.clone()
                f = place.f.clone() if stepper.scheme.tableau.implicit else None
                self._n_kept_states += 1
            step = Step(span, verdict.h, verdict.accept, own, None, 0, y, values, error, f=f)
        self.steps.append(step)
        if self.keep:
            self._fit(stepper)

    def _fit(self, stepper: Stepper) -> None:
        """Stay within the budget: half of it for states, half for a stretch of steps computed again."""
        if self.keeps_stages:
            last = self.steps[-1]
            assert last.block is not None
            self._used += last.block.tape_bytes(last.slot, stepper.scheme.n_stages)
            if self._used > self.budget:
                self._keep_states_only(stepper)
            return
        if not self.keep_values:
            self._thin(stepper)

    def _thin(self, stepper: Stepper) -> None:
        """Keep every 2nd, 4th, ... state alone, as many as fit."""
        if not self.steps:
            return
        state_bytes = sum(x.nbytes for x in (self.steps[0].y, self.steps[0].f) if x is not None)
        step_bytes = stepper.kernel.slot_bytes * (stepper.n_slots - 1)
        # A budget too small for both halves: as little as both together can be.
        while (kept := self._n_kept_states * state_bytes) > self.budget // 2 and (
            2 * self.stride * step_bytes <= max(self.budget // 2, kept)
        ):
            self.stride *= 2
            self.steps = [
                step if i % self.stride == 0 else step._replace(y=None, f=None) for i, step in enumerate(self.steps)
            ]
            self._n_kept_states = -(-len(self.steps) // self.stride)

    def _keep_states_only(self, stepper: Stepper) -> None:
        """Stages that were kept are let go."""
        n = stepper.scheme.n_stages
        self.steps = [
            step
            if step.block is None
            else step._replace(
                block=None,
                y=step.block.y[step.slot].clone(),
                f=step.block.f[step.slot].clone() if stepper.scheme.tableau.implicit else None,
                F=step.block.F[step.slot : step.slot + n].clone() if self.keep_values else None,
            )
            for step in self.steps
        ]
        self._n_kept_states = len(self.steps)
        self.stride = 1
        self.leases.clear()

    def drop_values(self, stepper: Stepper) -> None:
        """What only dense output needed is let go; going back needs less."""
        self.steps = [step if step.F is None else step._replace(F=None) for step in self.steps]
        self.keep_values = False
        if not self.keep:
            self.steps = []
        elif self.stride:
            self._thin(stepper)

    def _note_error(self, stepper: Stepper, verdict: Verdict) -> Tensor | None:
        """Add the square of error / unit, and return its derivative with the error (the unit held fixed).

        With two estimates the derivatives come side by side.
        """
        if verdict.ratio is None or verdict.unit is None:
            return None
        layout, dim = stepper.kernel.layout, stepper.kernel.layout.dim
        ratios = [ratio * verdict.h for ratio in (verdict.ratio, verdict.ratio2) if ratio is not None]
        squares = [ratio.square().mean(dim=dim, keepdim=True) for ratio in ratios]
        square, slopes = (squares[0], [1.0]) if len(squares) == 1 else combined_squares(*squares)
        own = layout.leave(square).reshape(-1)
        self.error = own if self.error is None else self.error + own
        return torch.stack(
            [
                torch.where(ratio == 0, 0.0, ratio / verdict.unit).mul_(2 / ratio.shape[dim]).mul_(slope)
                for ratio, slope in zip(ratios, slopes, strict=True)
            ]
        )


def combined_squares(first: Tensor, second: Tensor) -> tuple[Tensor, list[Any]]:
    """What two estimates' squares give together (see ``control.combined``), and its derivatives with both."""
    total = torch.where(first == 0, 1.0, first + 0.01 * second)
    share = first / total
    return first * share, [share * (2 - share), -0.01 * share.square()]
