"""Predictions of a latent ODE: along each series from several references, ahead by reading its own forecast again.

Symbols: B series, Q queries (series, time), c channels; a row is a reference: a series and a time whose latent state is
encoded; eta is what the decoder gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skode.models.kriging import Kernel, Windows
from skode.models.latent import LatentODE, Rows
from skode.models.odenet import SolverOptions
from skode.models.series import HeldInputs, Series, offsets_of

SPACING = 0.2  # of the references along a series
REACH = 1.2  # how far a reference has a say
NEIGHBOURS = 5  # references on either side of a query that may have one
LAGS = (0.0, 0.1, 0.2)  # of the references behind the end of a window, ahead of which it goes
FEWEST_POINTS = 8  # of a window that is read again
MOST_HOPS = 100
PAIRS_AT_ONCE = 200_000  # queries times references


class Outlook(NamedTuple):
    """The decoder's values (Q, c): their mean over references, and the standard deviation between them."""

    eta: Tensor
    disagreement: Tensor


@dataclass(frozen=True)
class ForecastOptions:
    """How to predict.

    ``stride`` is how far it goes ahead before the last window, as it was predicted, is encoded again; None: never.
    ``longest`` is the number of rows about a reference that the encoder reads, as in training.
    """

    solver: SolverOptions
    stride: float | None = 0.5
    longest: int = 256


def outlook(
    model: LatentODE,
    series: Series,
    query: Tensor,
    t: Tensor,
    inputs: HeldInputs | None,
    options: ForecastOptions,
) -> Outlook:
    """The decoder's values at queries.

    Inside of a series, and before it, they are means over references along it. Ahead of it the series is smoothed
    first; the smoothed window is encoded at its end (and a little before), followed for a stride, and the last window
    of what came out is encoded in turn.

    Parameters
    ----------
    model : LatentODE
    series : Series
        What may be used.
    query : int64 tensor of shape (Q,)
        The series of each query.
    t : tensor of shape (Q,)
    inputs : HeldInputs, optional
        Known inputs of the same series, if the model has any.
    options : ForecastOptions

    Returns
    -------
    Outlook

    Raises
    ------
    SolverError
        If a path cannot be solved; it names the series.
    """
    series = series.where(series.mask.any(dim=1)) if series.mask.shape[1] else series
    n_channels = series.mask.shape[1]
    eta, spread = (series.values.new_zeros(len(t), n_channels) for _ in range(2))
    order = torch.argsort(query, stable=True)
    for chosen in _portions(query[order]):
        own = order[chosen]
        part = _Part(model, series, query[own], t[own], inputs, options)
        eta[own], spread[own] = part.outlook()
    return Outlook(eta, spread)


class Missed(NamedTuple):
    """Of a channel, the observations that queries look at, and what predictions miss of them."""

    windows: Windows
    errors: Tensor

    def correction(self, kernel: Kernel) -> Tensor:
        """What predictions miss at the queries (Q,)."""
        return self.windows.correction(self.errors, kernel)


def compared(
    model: LatentODE,
    series: Series,
    query: Tensor,
    t: Tensor,
    inputs: HeldInputs | None,
    options: ForecastOptions,
    channels: list[int],
) -> tuple[Outlook, dict[int, Missed]]:
    """:func:`outlook`, and by channel what it misses of the observations nearby.

    An observation at a query's time is predicted with the query.
    """
    windows = {channel: Windows(series, query, t, channel) for channel in channels}
    rows = torch.unique(torch.cat([query.new_zeros(0), *(own.rows for own in windows.values())]))
    asked, at = series.index[rows], series.times[rows]
    places = torch.stack([torch.cat([query, asked]).to(at), torch.cat([t.detach().to(at), at])], dim=1)
    distinct, number = torch.unique(places, dim=0, return_inverse=True)
    place = number.new_full((len(distinct),), -1)
    place[number[: len(t)]] = torch.arange(len(t), device=t.device)
    new = place[number[len(t) :]] < 0
    place[number[len(t) :][new]] = len(t) + torch.arange(int(new.sum()), device=t.device)
    found = outlook(model, series, torch.cat([query, asked[new]]), torch.cat([t.to(at), at[new]]), inputs, options)
    own = found.eta[place[number[len(t) :]]]
    missed = {}
    for channel, each in windows.items():
        row = torch.searchsorted(rows, each.rows)
        missed[channel] = Missed(each, series.values[each.rows, channel] - own[row, channel])
    return Outlook(found.eta[: len(t)], found.disagreement[: len(t)]), missed


def corrected(
    model: LatentODE,
    series: Series,
    query: Tensor,
    t: Tensor,
    inputs: HeldInputs | None,
    options: ForecastOptions,
    kernels: tuple[Kernel | None, ...],
) -> Outlook:
    """As :func:`outlook`, the values corrected by what is missed of the observations nearby.

    ``series`` has rows that were observed alone; ``kernels`` one for each channel to be corrected, or nothing at all.
    """
    with_kernel = {channel: kernel for channel, kernel in enumerate(kernels) if kernel is not None}
    if not with_kernel:
        return outlook(model, series, query, t, inputs, options)
    found, missed = compared(model, series, query, t, inputs, options, list(with_kernel))
    return Outlook(found.eta + shifts(missed, with_kernel, found.eta), found.disagreement)


def shifts(missed: dict[int, Missed], kernels: dict[int, Kernel], like: Tensor) -> Tensor:
    """Corrections (Q, c) in the channels that have a kernel."""
    columns = [torch.zeros_like(column) for column in like.unbind(1)]
    for channel, kernel in kernels.items():
        columns[channel] = missed[channel].correction(kernel)
    return torch.stack(columns, dim=1)


def _portions(query: Tensor) -> Iterator[slice]:
    """Stretches of sorted queries, whole series each, so that no stretch is too large."""
    n, most = len(query), PAIRS_AT_ONCE // (2 * NEIGHBOURS + 1)
    start = 0
    while start < n:
        end = min(start + most, n)
        if end < n:
            first = int(torch.searchsorted(query, query[end - 1 : end])[0])
            last = int(torch.searchsorted(query, query[end - 1 : end], right=True)[0])
            end = first if first > start else last
        yield slice(start, end)
        start = end


class _Part:
    """Queries of some series, who are numbered anew from 0."""

    def __init__(
        self,
        model: LatentODE,
        series: Series,
        query: Tensor,
        t: Tensor,
        inputs: HeldInputs | None,
        options: ForecastOptions,
    ) -> None:
        self.model, self.inputs, self.options = model, inputs, options
        self.ids, self.query = torch.unique(query, return_inverse=True)
        self.series, self.t = series.take(self.ids), t.to(series.times)
        self.first, self.last = self.series.first, self.series.last

    def outlook(self) -> Outlook:
        ahead = self.t > self.last[self.query]
        found = Outlook(*(self.series.values.new_zeros(len(self.t), self.series.mask.shape[1]) for _ in range(2)))
        inside, later = torch.nonzero(~ahead).view(-1), torch.nonzero(ahead).view(-1)
        if len(inside):
            found.eta[inside], found.disagreement[inside] = self.along(self.query[inside], self.t[inside])
        if len(later):
            found.eta[later], found.disagreement[later] = self.ahead(self.query[later], self.t[later])
        return found

    # --- along the series ---

    def along(self, query: Tensor, t: Tensor) -> Outlook:
        """By the references near each query."""
        span = self.last - self.first
        count = torch.ceil(span / SPACING).long() + 1
        offsets = offsets_of(count)
        owner = torch.repeat_interleave(count, output_size=int(offsets[-1]))
        share = (torch.arange(len(owner), device=t.device) - offsets[owner]) / (count[owner] - 1).clamp(min=1)
        reference = self.first[owner] + share * span[owner]
        gap = (span / (count - 1).clamp(min=1)).clamp(min=1e-12)
        middle = ((t - self.first[query]) / gap[query]).round().clamp(min=0).long()
        middle = torch.minimum(middle, count[query] - 1)
        near = middle.unsqueeze(1) + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, device=t.device)
        there = (near >= 0) & (near < count[query].unsqueeze(1))
        column = torch.arange(len(t), device=t.device).unsqueeze(1).expand_as(near)[there]
        row = (offsets[query].unsqueeze(1) + near)[there]
        weight = (1 - ((t[column] - reference[row]) / REACH).square()).clamp(min=1e-3)
        read = self.series.around(owner, reference, self.options.longest)
        eta = self._from(read, owner, reference, row, t[column])
        return _mixed(eta, weight.to(eta), column, len(t))

    # --- ahead ---

    def ahead(self, query: Tensor, t: Tensor) -> Outlook:
        """Hop by hop."""
        stride, n = self.options.stride, len(self.ids)
        horizon = self.last.new_zeros(n).scatter_reduce(0, query, t - self.last[query], "amax")
        found = Outlook(*(self.series.values.new_zeros(len(t), self.series.mask.shape[1]) for _ in range(2)))
        if stride is None:
            read = self.series.around(torch.arange(n, device=t.device), self.last, self.options.longest)
            return self._hop(read, torch.arange(n, device=t.device), self.last, query, t)
        points = self._points()
        end, hop = self.last, 0
        active = torch.nonzero(horizon > 0).view(-1)
        window = self._window(active, end[active], points)
        while len(active):
            final = hop + 1 == MOST_HOPS
            until = end + stride
            due = torch.nonzero((t > end[query]) & ((t <= until[query]) | final)).view(-1)
            number = torch.full((n,), -1, device=t.device)
            number[active] = torch.arange(len(active), device=t.device)
            goes_on = (horizon[active] > until[active] - self.last[active]) & (not final)
            following = active[goes_on]
            nodes, owner = self._nodes(following, until[following], points)
            asked = torch.cat([number[query[due]], number[following][owner]])
            both = self._hop(window, active, end[active], asked, torch.cat([t[due], nodes]))
            found.eta[due], found.disagreement[due] = (x[: len(due)] for x in both)
            window = self._as_series(following, nodes, points, both.eta[len(due) :])
            active, end, hop = following, until, hop + 1
        return found

    def _points(self) -> Tensor:
        """Of each series' window: as many as the last window of observations has."""
        n = len(self.ids)
        every = torch.arange(n, device=self.last.device)
        early = self.series.before(every, self.last - 1.0, inclusive=False)
        return (self.series.lengths - early.lengths).clamp(FEWEST_POINTS, self.options.longest)

    def _nodes(self, ids: Tensor, end: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Even times over the window that ends at ``end``, and which of the ids each belongs to."""
        count = points[ids]
        offsets = offsets_of(count)
        owner = torch.repeat_interleave(count, output_size=int(offsets[-1]))
        share = (torch.arange(len(owner), device=end.device) - offsets[owner]) / (count[owner] - 1)
        start = torch.maximum(self.first[ids], end - 1.0)
        return torch.lerp(start[owner], end[owner], share.to(end.dtype)), owner

    def _window(self, ids: Tensor, end: Tensor, points: Tensor) -> Series:
        """The observed series' last window, smoothed."""
        nodes, owner = self._nodes(ids, end, points)
        return self._as_series(ids, nodes, points, self.along(ids[owner], nodes).eta)

    def _as_series(self, ids: Tensor, nodes: Tensor, points: Tensor, eta: Tensor) -> Series:
        """Predictions as if they were observations."""
        owner = torch.repeat_interleave(points[ids], output_size=len(nodes))
        covariates = None
        if self.inputs is not None:
            covariates = self.inputs.at(self.ids[ids[owner]], nodes)[:, : self.series.covariates.shape[1]]
        values = self.model.likelihood.mean(eta)
        everything = torch.ones_like(values, dtype=torch.bool)
        return Series.of(offsets_of(points[ids]), nodes, values, everything, covariates, self.series.static[ids])

    def _hop(self, read: Series, ids: Tensor, end: Tensor, asked: Tensor, t: Tensor) -> Outlook:
        """From windows (the series of ``ids``) that end at ``end``: the mean over a few references at their ends.

        ``asked`` has the window's number of each time.
        """
        n, r = len(ids), len(LAGS)
        length = (end - self.first[ids]).clamp(max=1.0)
        lags = torch.tensor(LAGS, dtype=end.dtype, device=end.device)
        reference = (end.unsqueeze(1) - lags * length.unsqueeze(1)).reshape(-1)
        window = torch.arange(n, device=end.device).repeat_interleave(r)
        row = (asked.unsqueeze(1) * r + torch.arange(r, device=end.device)).reshape(-1)
        column = torch.arange(len(t), device=end.device).repeat_interleave(r)
        eta = self._from(read.take(window), ids[window], reference, row, t[column])
        return _mixed(eta, torch.ones_like(column).to(eta), column, len(t))

    def _from(self, read: Series, owner: Tensor, reference: Tensor, row: Tensor, t: Tensor) -> Tensor:
        """Encode what is read, one series a reference, and decode at times (P,) from rows (P,)."""
        used, row = torch.unique(row, return_inverse=True)
        read, owner, reference = read.take(used), owner[used], reference[used]
        z = self.model.encode(read, reference.unsqueeze(1)).mean[:, 0]
        rows = Rows(z, reference, self.ids[owner])
        states = self.model.exact_path(rows, row, t, self.inputs, self.options.solver).z
        return self.model.decode(states, self.series.static[owner[row]])


def _mixed(eta: Tensor, weight: Tensor, column: Tensor, n: int) -> Outlook:
    """Weighted mean and standard deviation of each column's values."""
    w = weight.unsqueeze(1)
    total = eta.new_zeros(n, 1).index_add(0, column, w)
    mean = eta.new_zeros(n, eta.shape[1]).index_add(0, column, w * eta) / total
    square = eta.new_zeros(n, eta.shape[1]).index_add(0, column, w * (eta - mean[column]).square()) / total
    return Outlook(mean, square.sqrt())
