"""Events: functions of time and state whose zeros are looked for on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.exceptions import FieldError

EventFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Event:
    """Something that happens to a row where a function of its time and state changes its sign.

    It is looked for at the ends of the accepted steps and at three places inside of each, on the method's dense output,
    and located there to round-off: a function that changes its sign twice between two of these places is not seen
    (``max_step`` brings them closer). A zero at the row's first time is no event, one at its last time is.

    Parameters
    ----------
    function : callable
        ``function(t, y)`` with times (n, 1) and states (n, d) returns (n,), each value a function of its own row. It
        may read tensors that need gradients; for gradients through an event's time autograd has to see through it.
        (Second derivatives through it are refused.)
    terminal : bool, default=True
        Whether the row ends there.
    direction : {-1, 0, 1}, default=0
        1 takes notice only of changes from negative to positive along the row's way, -1 of those from positive to
        negative, 0 of both. A function that comes to 0 and turns back counts as if it had gone on.

    Raises
    ------
    ValueError
        If the function cannot be called, or the direction is another number.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import Event, solve
    >>> fall = lambda t, y: torch.stack([y[:, 1], torch.full_like(y[:, 1], -9.81)], dim=1)
    >>> y0 = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    >>> solve(fall, y0, [0.0, 5.0], events=Event(lambda t, y: y[:, 0])).event_t
    tensor([0.4515, 0.6386], dtype=torch.float64)
    """

    function: EventFunction
    terminal: bool = True
    direction: int = 0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"an event's function is called as function(t, y); got {type(self.function).__name__}.")
        if self.direction not in (-1, 0, 1):
            raise ValueError(f"direction={self.direction!r} of an event is unknown; use -1, 0 or 1.")


class Crossings(NamedTuple):
    """All that happened, one entry each: tensors of shape (k,), states (k, d), sorted by row, then along its way.

    ``event`` counts the events as they were given to ``solve``. Times and states carry gradients.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import Event, solve
    >>> turn = lambda t, y: torch.stack([y[:, 1], -y[:, 0]], dim=1)
    >>> passes = Event(lambda t, y: y[:, 0], terminal=False)
    >>> found = solve(turn, torch.tensor([[1.0, 0.0]]), [0.0, 6.0], rtol=1e-6, events=passes).crossings
    >>> [round(float(t), 2) for t in found.t]  # pi / 2 and 3 pi / 2
    [1.57, 4.71]
    """

    row: Tensor
    event: Tensor
    t: Tensor
    y: Tensor


class Ends(NamedTuple):
    """Where terminal events ended rows: time (n,), state (n, d), event (n,); NaN, -1 elsewhere. And all crossings."""

    t: Tensor
    y: Tensor
    event: Tensor
    crossings: Crossings


class Watched(NamedTuple):
    """Events that are looked for, and the number of components that their functions see."""

    events: tuple[Event, ...]
    d: int

    def value(self, number: int, t: Tensor, y: Tensor) -> Tensor:
        """An event's function at times (n, 1) and states (n, at least d).

        Raises
        ------
        FieldError
            If it returns something else than floating point numbers (n,).
        """
        function = self.events[number].function
        value = function(t, y[:, : self.d])
        name = f"event {number} ({getattr(function, '__name__', type(function).__name__)})"
        if not isinstance(value, Tensor):
            raise FieldError(f"{name} returned {type(value).__name__}; it must return a tensor.")
        if value.shape != (len(y),) or not value.is_floating_point():
            raise FieldError(
                f"{name} returned {value.dtype} of shape {tuple(value.shape)} for states of shape "
                f"({len(y)}, {self.d}); it must return floating point numbers of shape ({len(y)},), one for each row."
            )
        return value


def no_ends(y: Tensor, dtype: torch.dtype) -> Ends:
    """Of rows (n, d) without events."""
    index = torch.full((len(y),), -1, dtype=torch.int64, device=y.device)
    none = index[:0]
    nan = y.new_full(y.shape, torch.nan)
    crossings = Crossings(none, none, none.to(dtype), nan[:0])
    return Ends(torch.full((len(y),), torch.nan, dtype=dtype, device=y.device), nan, index, crossings)


def as_watched(events: Any, d: int) -> Watched | None:
    """What ``solve`` was given for states of d components; None if there is nothing to look for.

    Raises
    ------
    ValueError
        If there is something else than events.
    """
    if events is None:
        return None
    given = (events,) if isinstance(events, Event) else tuple(events) if isinstance(events, Sequence) else (events,)
    for event in given:
        if not isinstance(event, Event):
            raise ValueError(f"events must be an Event or a sequence of them; got {type(event).__name__}.")
    return Watched(given, d) if given else None
