"""What decides the steps: tolerances, error norms, and the protocol of the deciders.

Every decider follows the elementary controller (Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations
I", section II.4): h_new = safety h err^(-1/k), for an error estimate of order h^k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skode.runtime import ALONE, Peers
from skode.solver.solution import Stats, Status
from skode.solver.step import Attempt, Place, Span, Stepper

SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Tolerance:
    """How exact and how long: tolerances, and limits of the steps.

    ``rtol`` and ``atol`` are numbers or, for each component, tensors that broadcast against a state.
    """

    rtol: float | Tensor
    atol: Tensor
    max_num_steps: int
    first_step: float | None = None
    step_size: float | None = None
    min_step: float = 0.0
    max_step: float | None = None

    def replace(self, **changes: Any) -> Tolerance:
        """The same with some changes."""
        return replace(self, **changes)

    def unit(self, y: Tensor, y1: Tensor) -> Tensor:
        """Atol + rtol max(abs(y), abs(y1))."""
        size = torch.maximum(y.abs(), y1.abs())
        if isinstance(self.rtol, float):
            return torch.add(self.atol, size, alpha=self.rtol)
        return size.mul_(self.rtol).add_(self.atol)


@dataclass(frozen=True)
class BatchControl:
    """One step for all rows, chosen by the (weighted) mean of the rows' squared errors.

    Parameters
    ----------
    weights : tensor of shape (n,), optional
        A row's share in the error norm; equal shares if not given.
    norm : callable, optional
        Another norm: from the errors in units of the tolerance ``(n, d)`` to one number; a step is accepted if it is
        at most 1. Rows that an event has ended have errors of 0.
    peers : Peers
        Processes that hold further rows of the batch; with them, all weights together must add up to 1.

    Examples
    --------
    Only the first row's error counts, so that the second one follows its steps:

    >>> import torch
    >>> from skode.solver import BatchControl, solve
    >>> rates = torch.tensor([[1.0], [9.0]])
    >>> control = BatchControl(weights=torch.tensor([1.0, 0.0]))
    >>> solve(lambda t, y: -rates * y, torch.ones(2, 1), [0.0, 1.0], step_control=control).n_steps.unique().numel()
    1
    """

    weights: Tensor | None = None
    norm: Callable[[Tensor], Tensor | float] | None = None
    peers: Peers = ALONE


class Verdict(NamedTuple):
    """A judged step.

    ``h`` is the step that counts (0 where a row stays), ``accept`` the rows that go on (None: all that want to).
    ``accepted``: whether any row did; ``finite``: whether everything that counts is; ``jumped``: whether the field
    has to be asked again where the next step starts. ``ratio`` is each component's error in units of the tolerance (of
    the second estimate ``ratio2``), ``unit`` that unit.
    """

    h: Tensor | float
    accept: Tensor | None
    accepted: bool
    finite: bool
    jumped: bool = False
    ratio: Tensor | None = None
    unit: Tensor | None = None
    ratio2: Tensor | None = None


class Control(Protocol):
    """Proposes steps and judges what came of them."""

    @property
    def running(self) -> bool:
        """Whether there is anything left to do."""
        ...

    def start_time(self) -> Tensor:
        """The time that the field sees where the next step begins, in the state's dtype."""
        ...

    def begin(self, stepper: Stepper, place: Place) -> None:
        """Choose the first step that is to be tried; the field at the start is known."""
        ...

    def propose(self) -> Span:
        """The next step."""
        ...

    def judge(self, place: Place, span: Span, attempt: Attempt) -> Verdict:
        """Whether it counts."""
        ...


class CountingControl(Control, Protocol):
    """A control that knows what it did."""

    def stop(self, rows: Tensor, status: Status) -> None:
        """End the solve of rows (one each, in the layout's shape) here."""
        ...

    def stats(self, y: Tensor) -> Stats:
        """What each row did, and at which time it stopped."""
        ...


def row_norm(ratio: Tensor, dim: int) -> Tensor:
    """Each row's root mean square."""
    # torch.linalg.vector_norm over the axis of the components takes ten times as long.
    return ratio.square().sum(dim=dim, keepdim=True).mul_(1 / max(ratio.shape[dim], 1)).sqrt_()


def combined(first: Tensor, second: Tensor) -> Tensor:
    """The error norm of a method with two estimates (Hairer, Norsett and Wanner I, section II.10, eq. 10.18)."""
    square = first.square()
    total = square + 0.01 * second.square()
    return torch.where(total == 0, 0.0, square / total.sqrt())


def at(c: float | Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A number as a tensor of one number for each row, without memory of its own."""
    return torch.as_tensor(c, dtype=like.dtype, device=like.device).view((1,) * len(shape)).expand(shape)
