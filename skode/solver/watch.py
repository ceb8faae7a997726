"""What sees events while a solve goes on: every accepted step is searched on its dense output.

Symbols: ``theta`` in [0, 1] is the place inside a step, ``g`` an event's function.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from skode.solver.control import Verdict
from skode.solver.events import Watched
from skode.solver.interpolate import weights
from skode.solver.roots import far_ends
from skode.solver.solution import Status
from skode.solver.step import Attempt, Place, Span, Stepper

CHECKED = (0.25, 0.5, 0.75, 1.0)
"""Where in a step the signs of the functions are looked at, besides its start."""

_ROUND_OFF = 16
"""A zero is at a row's first time if it lies no more than so many roundings of it, or of the first step, behind it."""


class StoppingControl(Protocol):
    """A control that can end rows."""

    def stop(self, rows: Tensor, status: Status) -> None:
        """End rows (in the layout's shape) where they are."""
        ...


class Found(NamedTuple):
    """Crossings, one entry each, sorted by row, then along its way; and the output times with theirs among them.

    ``stopped`` marks those that ended their rows; ``scale`` is the function's size over the step's length. ``t`` is
    ``times[row, column]``, and the caller's own times are ``times.gather(1, columns)``, but NaN behind a row's end.
    ``rank`` counts a row's crossings.
    """

    row: Tensor
    event: Tensor
    t: Tensor
    scale: Tensor
    stopped: Tensor
    rank: Tensor
    column: Tensor
    times: Tensor
    columns: Tensor

    def halts(self) -> Tensor:
        """Where rows ended (n,); NaN for those that did not."""
        halts = self.times.new_full((len(self.times),), torch.nan)
        halts[self.row[self.stopped]] = self.t[self.stopped]
        return halts


class _Entries(NamedTuple):
    row: Tensor
    event: Tensor
    theta: Tensor
    t: Tensor
    scale: Tensor
    stopped: Tensor

    def where(self, which: Tensor) -> _Entries:
        return _Entries(*(x[which] for x in self))


class _Path:
    """One step of all rows as a function of theta, in the callers' shapes; rows that stay are where they were."""

    def __init__(self, stepper: Stepper, place: Place, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        scheme, layout = stepper.scheme, stepper.kernel.layout
        self._scheme, self.dtype = scheme, scheme.b.dtype
        self._y, self._y1 = layout.leave(place.y), layout.leave(attempt.y1)
        self._F = layout.leave(place.block.F[place.slot : place.slot + scheme.n_stages])
        n, device = len(self._y), self._y.device

        def column(x: Any, dtype: torch.dtype) -> Tensor:
            if isinstance(x, Tensor):
                return layout.leave(x).to(dtype)
            return torch.full((n, 1), x, dtype=dtype, device=device)

        time_dtype = scheme.late.dtype
        self._h = column(verdict.h, self.dtype)
        self.moved = self._h != 0
        self.t = column(span.t, time_dtype)
        self._t_next = torch.where(self.moved, column(span.t_next, time_dtype), self.t)
        self.length = self._t_next - self.t

    def time(self, theta: Tensor) -> Tensor:
        """Times (n, 1) at ``theta`` of the same shape."""
        return torch.where(theta == 1, self._t_next, self.t + theta * self.length)

    def start(self) -> tuple[Tensor, Tensor]:
        """The time as the field sees it (n, 1), and the state (n, d), where the step begins."""
        return self.t.to(self.dtype, copy=True), self._y.clone()

    def end(self) -> tuple[Tensor, Tensor]:
        """Where it ends."""
        return self._t_next.to(self.dtype, copy=True), torch.where(self.moved, self._y1, self._y)

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """In between, at ``theta`` (n, 1)."""
        beta = weights(self._scheme, theta[:, 0])
        inside = self._y + self._h * torch.einsum("ns,snd->nd", beta, self._F)
        y = torch.where(theta == 1, self._y1, inside)
        return self.time(theta).to(self.dtype), torch.where(self.moved, y, self._y)


class Watch:
    """Observes a solve: finds the events of every row, and ends rows at their first terminal one.

    Parameters
    ----------
    watched : Watched
    stepper : Stepper
        Of a closed tableau.
    control : StoppingControl
    """

    def __init__(self, watched: Watched, stepper: Stepper, control: StoppingControl) -> None:
        self._watched, self._stepper, self._control = watched, stepper, control
        device, events = stepper.scheme.b.device, watched.events
        directions = torch.tensor([event.direction for event in events], device=device).view(-1, 1, 1)
        self._up, self._down = directions >= 0, directions <= 0
        self._terminal = torch.tensor([event.terminal for event in events], device=device)
        self._round_off = float(_ROUND_OFF * torch.finfo(stepper.scheme.b.dtype).eps)
        self._t0 = torch.empty(0)
        self._g: Tensor | None = None
        self._found: list[_Entries] = []

    def observe(self, place: Place, span: Span, attempt: Attempt, verdict: Verdict) -> None:
        """Search a step."""
        # The functions are the users': they get ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            path = _Path(self._stepper, place, span, attempt, verdict)
            ended = self._search(path)
        if ended is not None:
            self._control.stop(self._stepper.kernel.layout.enter(ended.unsqueeze(1)), Status.EVENT)

    def _values(self, t: Tensor, y: Tensor) -> Tensor:
        """All functions at one time and state of each row, shape (n_events, n)."""
        values = [self._watched.value(number, t, y) for number in range(len(self._watched.events))]
        return torch.stack([value.to(self._t0.dtype) for value in values])

    def _search(self, path: _Path) -> Tensor | None:
        """Rows that end in this step, if any."""
        if self._g is None:
            self._t0 = path.t
            self._g = self._values(*path.start())
        inner = [self._values(*path.at(torch.full_like(path.t, theta))) for theta in CHECKED[:-1]]
        end = self._values(*path.end())
        g = torch.stack([self._g, *inner, end], dim=1)
        before, after = g[:, :-1], g[:, 1:]
        hits = ((before < 0) & (after >= 0) & self._up) | ((before > 0) & (after <= 0) & self._down)
        hits &= path.moved[:, 0]
        self._g = end
        if not bool(hits.any()):
            return None
        return self._keep(self._located(path, g, hits), len(path.t))

    def _located(self, path: _Path, g: Tensor, hits: Tensor) -> _Entries:
        """Every hit (n_events, n_checked, n), one for each row at a time."""
        size = torch.where(torch.isfinite(g), g.abs(), 0.0).amax(dim=1)
        scale = size / torch.where(path.moved, path.length, 1.0).abs()[:, 0]
        entries = []
        for number in range(len(self._watched.events)):
            while bool(hits[number].any()):
                first = hits[number].to(torch.int8).argmax(dim=0, keepdim=True)
                rows = torch.nonzero(hits[number].any(dim=0)).view(-1)
                theta = self._root(path, number, g[number], first[0], hits[number].any(dim=0)).unsqueeze(1)
                t = path.time(theta)
                event = torch.full_like(rows, number)
                stops = self._terminal[number].expand(len(rows))
                entries.append(_Entries(rows, event, theta[rows, 0], t[rows, 0], scale[number, rows], stops))
                hits[number].scatter_(0, first, False)
        found = _Entries(*(torch.cat(parts) for parts in zip(*entries, strict=True)))
        t0 = self._t0[found.row, 0]
        steps = torch.maximum(t0.abs(), path.length[found.row, 0].abs())
        return found.where((found.t - t0).abs() > self._round_off * steps)

    def _root(self, path: _Path, number: int, g: Tensor, first: Tensor, wanted: Tensor) -> Tensor:
        """Where g changes its sign between two checked places, for the rows that want it."""
        places = path.t.new_tensor((0.0, *CHECKED))
        b = places[first + 1]
        a = torch.where(wanted, places[first], b)
        at_a, at_b = (g.gather(0, index.unsqueeze(0))[0] for index in (first, first + 1))

        def value(theta: Tensor) -> Tensor:
            return self._watched.value(number, *path.at(theta.unsqueeze(1))).to(a.dtype)

        return far_ends(value, a, b, at_a, at_b, torch.finfo(path.dtype).eps)

    def _keep(self, found: _Entries, n: int) -> Tensor | None:
        """Note what happened before rows ended; which rows did."""
        row, theta = found.row, found.theta
        stops = torch.full((n,), torch.inf, dtype=theta.dtype, device=theta.device)
        stops = stops.scatter_reduce(0, row[found.stopped], theta[found.stopped], "amin")
        last = found.stopped & (theta == stops[row])
        first = torch.full_like(stops, len(self._watched.events), dtype=torch.int64)
        first = first.scatter_reduce(0, row[last], found.event[last], "amin")
        found = found._replace(stopped=last & (found.event == first[row]))
        self._found.append(found.where(theta <= stops[row]))
        ended = torch.isfinite(stops)
        return ended if bool(ended.any()) else None

    def found(self, times: Tensor) -> Found | None:
        """Everything, with output times ``(n, m)`` that hold the crossings' too. None: nothing happened."""
        entries = [entries for entries in self._found if len(entries.row)]
        if not entries:
            return None
        row, event, _, t, scale, stopped = (torch.cat(parts) for parts in zip(*entries, strict=True))
        sign = _signs(times)
        order = torch.argsort(event, stable=True)
        for key in (sign[row] * t, row):
            order = order[torch.argsort(key[order], stable=True)]
        row, event, t, scale, stopped = (x[order] for x in (row, event, t, scale, stopped))
        rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        merged, columns = _merged(times, sign, row, t, stopped, rank)
        m = times.shape[1]
        return Found(row, event, t, scale, stopped, rank, columns[row, m + rank], merged, columns[:, :m])


def _signs(times: Tensor) -> Tensor:
    """1 for rows that go up in time, -1 for the others."""
    down = (times < times[:, :1]).any(dim=1)
    return torch.where(down, -1.0, 1.0).to(times.dtype)


def _merged(
    times: Tensor, sign: Tensor, row: Tensor, t: Tensor, stopped: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor]:
    """All times, sorted along the rows' ways, NaN last; and where ``times``, then the crossings, have gone."""
    stop = sign.new_full((len(times), 1), torch.nan)
    stop[row[stopped], 0] = t[stopped]
    own = torch.where(sign.unsqueeze(1) * times > sign.unsqueeze(1) * stop, torch.nan, times)
    others = sign.new_full((len(times), int(rank.max()) + 1), torch.nan)
    others[row, rank] = t
    together = torch.cat([own, others], dim=1)
    order = torch.argsort(sign.unsqueeze(1) * together, dim=1, stable=True)
    return together.gather(1, order), torch.argsort(order, dim=1)
