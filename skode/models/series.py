"""Irregular series as flat tensors, and the ragged operations on them.

Symbols: B series, N observations in all, c channels, k known inputs over time, s static ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLOCK_WAVES = 4  # half periods of the slowest wave of a clock are its length
CLOCK_INPUTS = 1 + 2 * CLOCK_WAVES
WASTE = 2.0  # padded rows over real ones, above which rows are grouped by length


@dataclass(frozen=True, eq=False)
class Series:
    """Series one after another, each with times of its own.

    Attributes
    ----------
    offsets : int64 tensor of shape (B + 1,)
        Series b has the rows ``offsets[b]`` to ``offsets[b + 1]``.
    times : tensor of shape (N,)
        Ascending within a series, in units in which a typical series (or training window) is about 1 long. Best
        float64: differences are taken before they are rounded to the values' dtype.
    values : tensor of shape (N, c)
        Scaled; 0 where unobserved.
    mask : bool tensor of shape (N, c)
        What was observed; a row without any is a time where known inputs change, or a query.
    covariates : tensor of shape (N, k)
        Known inputs over time: each holds until the series' next row, the first one before it, too.
    static : tensor of shape (B, s)
    clock : (float, float), optional
        Two times of a clock that all series share: the time's place between them, with a few sines and cosines, is
        a known input.

    Examples
    --------
    >>> import torch
    >>> from skode.models import Series
    >>> series = Series.of(torch.tensor([0, 2, 3]), torch.tensor([0.0, 1.0, 0.5]), torch.ones(3, 1))
    >>> series.n_series, series.take(torch.tensor([1])).times
    (2, tensor([0.5000]))
    """

    offsets: Tensor
    times: Tensor
    values: Tensor
    mask: Tensor
    covariates: Tensor
    static: Tensor
    clock: tuple[float, float] | None = None

    @staticmethod
    def of(
        offsets: Tensor,
        times: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        covariates: Tensor | None = None,
        static: Tensor | None = None,
        clock: tuple[float, float] | None = None,
    ) -> Series:
        """Series with what is not given left empty; without a mask NaN is unobserved."""
        mask = ~torch.isnan(values) if mask is None else mask
        values = torch.where(mask, values, 0.0)
        covariates = values.new_zeros(len(times), 0) if covariates is None else covariates
        static = values.new_zeros(len(offsets) - 1, 0) if static is None else static
        return Series(offsets, times, values, mask, covariates, static, clock)

    @property
    def n_inputs(self) -> int:
        """Known inputs: over time, static, and the clock's."""
        own = self.covariates.shape[1] + self.static.shape[1]
        return own if self.clock is None else own + CLOCK_INPUTS

    @property
    def n_series(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Rows of each series, (B,)."""
        return self.offsets.diff()

    @property
    def index(self) -> Tensor:
        """The series of each row, (N,)."""
        return torch.repeat_interleave(self.lengths, output_size=len(self.times))

    @property
    def first(self) -> Tensor:
        """Each series' first time, (B,); 0 for one without rows."""
        return self._end(self.offsets[:-1])

    @property
    def last(self) -> Tensor:
        """Each series' last time, (B,); 0 for one without rows."""
        return self._end(self.offsets[1:] - 1)

    def _end(self, rows: Tensor) -> Tensor:
        if not len(self.times):
            return self.times.new_zeros(self.n_series)
        return torch.where(self.lengths > 0, self.times[rows.clamp(0, len(self.times) - 1)], 0.0)

    def take(self, series: Tensor) -> Series:
        """Some series, in the given order, repetitions allowed."""
        return self.stretch(series, self.offsets[series], self.lengths[series])

    def stretch(self, series: Tensor, starts: Tensor, lengths: Tensor) -> Series:
        """Of some series the rows from ``starts`` on, ``lengths`` of them."""
        offsets, rows = ragged_rows(starts, lengths)
        return Series(
            offsets,
            self.times[rows],
            self.values[rows],
            self.mask[rows],
            self.covariates[rows],
            self.static[series],
            self.clock,
        )

    def around(self, series: Tensor, t: Tensor, longest: int) -> Series:
        """For each of some series (n,) the ``longest`` rows about a time (n,), half of them before it if it can."""
        lengths = self.lengths[series]
        rank = self.count_until(series, t)
        start = torch.minimum((rank - longest // 2).clamp(min=0), (lengths - longest).clamp(min=0))
        return self.stretch(series, self.offsets[series] + start, lengths.clamp(max=longest))

    def before(self, series: Tensor, t: Tensor, *, inclusive: bool = True) -> Series:
        """For each of some series (n,) its rows up to a time (n,), or before it."""
        return self.stretch(series, self.offsets[series], self.count_until(series, t, inclusive=inclusive))

    def count_until(self, series: Tensor, t: Tensor, *, inclusive: bool = True) -> Tensor:
        """How many rows of some series (n,) are not later than times (n,), or earlier, by one binary search."""
        return _Keys(self).count(series, t, inclusive=inclusive)

    def where(self, keep: Tensor) -> Series:
        """All series, with the rows alone that a bool tensor (N,) keeps; some may have none then."""
        counts = torch.zeros(len(keep) + 1, dtype=torch.int64, device=keep.device)
        torch.cumsum(keep, dim=0, out=counts[1:])
        return Series(
            counts[self.offsets],
            self.times[keep],
            self.values[keep],
            self.mask[keep],
            self.covariates[keep],
            self.static,
            self.clock,
        )

    def hidden(self, keep: Tensor) -> Series:
        """All series and rows, with the observations alone that a bool tensor (N,) or (N, c) keeps."""
        mask = self.mask & (keep if keep.dim() == 2 else keep.unsqueeze(1))
        return replace(self, mask=mask, values=torch.where(mask, self.values, 0.0))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Series:
        """On another device, its values in another dtype."""
        return Series(
            self.offsets.to(device),
            self.times.to(device),
            self.values.to(device, dtype),
            self.mask.to(device),
            self.covariates.to(device, dtype),
            self.static.to(device, dtype),
            self.clock,
        )


def offsets_of(lengths: Tensor) -> Tensor:
    """Where stretches of such lengths (n,) begin, one after another, and where the last one ends: (n + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def ragged_rows(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """New offsets (n + 1,), and the rows of stretches that have these starts and lengths."""
    offsets = offsets_of(lengths)
    total = int(offsets[-1])
    shift = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=total)
    return offsets, torch.arange(total, device=starts.device) + shift


class Group:
    """Some series of nearly one length, padded.

    Attributes
    ----------
    series : tensor of shape (g,)
        Which they are.
    rows : tensor of shape (g, n)
        Their rows in the flat tensors; any row where ``present`` (g, n) is False.
    """

    def __init__(self, series: Tensor, starts: Tensor, lengths: Tensor, width: int) -> None:
        self.series = series
        steps = torch.arange(width, device=starts.device)
        self.present = steps < lengths.unsqueeze(1)
        self.rows = torch.where(self.present, starts.unsqueeze(1) + steps, 0)

    def padded(self, x: Tensor) -> Tensor:
        """Flat rows (N, ...) as (g, n, ...), 0 where there are none."""
        if not len(x):
            return x.new_zeros(*self.rows.shape, *x.shape[1:])
        present = self.present.view(*self.present.shape, *[1] * (x.dim() - 1))
        return torch.where(present, x[self.rows], torch.zeros((), dtype=x.dtype, device=x.device))


def groups(offsets: Tensor) -> list[Group]:
    """The series in groups, so that padding wastes little: all at once, or by powers of two of their lengths."""
    lengths = offsets.diff()
    if not len(lengths):
        return []
    longest = int(lengths.max())
    everything = torch.arange(len(lengths), device=offsets.device)
    if longest * len(lengths) <= WASTE * (int(offsets[-1]) + 64):
        return [Group(everything, offsets[:-1], lengths, max(longest, 1))]
    level = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    found = []
    for each in torch.unique(level).tolist():
        own = everything[level == each]
        found.append(Group(own, offsets[own], lengths[own], max(int(lengths[own].max()), 1)))
    return found


class _Keys:
    """All rows' times as one ascending list of numbers, so that one binary search serves many series."""

    def __init__(self, series: Series) -> None:
        self._series = series
        times = series.times.double()
        self._low = float(times.min()) if len(times) else 0.0
        self._width = (float(times.max()) - self._low if len(times) else 0.0) + 1.0
        self._keys = series.index * (3 * self._width) + (times - self._low)

    def count(self, series: Tensor, t: Tensor, *, inclusive: bool = True) -> Tensor:
        """How many rows of series (n,) are not later than times (n,), or earlier."""
        own = self._series.offsets
        since = (t.double() - self._low).clamp(-self._width, self._width)
        found = torch.searchsorted(self._keys, series * (3 * self._width) + since, right=inclusive)
        return torch.minimum(torch.maximum(found, own[series]), own[series + 1]) - own[series]


class HeldInputs:
    """Known inputs at any times: what holds until the next row, the static ones, and the clock's.

    Parameters
    ----------
    series : Series
    """

    def __init__(self, series: Series) -> None:
        self._series, self._keys = series, _Keys(series)

    @property
    def series(self) -> Series:
        """Whose inputs they are."""
        return self._series

    def at(self, series: Tensor, t: Tensor) -> Tensor:
        """Inputs (n, k + s) of series (n,) at times (n,), and the clock's: place, sines and cosines."""
        held = self._held(series, t)
        if self._series.clock is None:
            return held
        low, high = self._series.clock
        place = (2 * ((t - low) / max(high - low, 1e-12)).clamp(-0.5, 1.5) - 1).to(held).unsqueeze(1)
        waves = place * (math.pi * torch.arange(1, CLOCK_WAVES + 1, dtype=held.dtype, device=held.device))
        return torch.cat([held, place, waves.sin(), waves.cos()], dim=1)

    def _held(self, series: Tensor, t: Tensor) -> Tensor:
        own = self._series
        if not own.covariates.shape[1]:
            return own.static[series]
        row = own.offsets[series] + (self._keys.count(series, t) - 1).clamp(min=0)
        held = (
            own.covariates[row.clamp(max=len(own.times) - 1)]
            if len(own.times)
            else own.covariates.new_zeros(len(row), own.covariates.shape[1])
        )
        return torch.cat([torch.where((own.lengths[series] > 0).unsqueeze(1), held, 0.0), own.static[series]], dim=1)

    @staticmethod
    def of(series: Series) -> HeldInputs | None:
        """Of the series, if they have any."""
        return HeldInputs(series) if series.n_inputs else None

    def along(self, series: Tensor, start: Tensor, durations: Tensor) -> Callable[[Tensor], Tensor]:
        """For rows that start at times (n,) and last (n, 1): a function of the share of it that has gone, (n, 1)."""
        return lambda u: self.at(series, start + (u.to(start.dtype) * durations).squeeze(1))

    def at_shares(self, series: Tensor, start: Tensor, durations: Tensor, shares: Sequence[float]) -> Tensor:
        """For rows as of :meth:`along` the inputs (m, n, k + s) at m shares of the way."""
        number = {share: i for i, share in enumerate(dict.fromkeys(shares))}
        t = start + start.new_tensor(list(number)).unsqueeze(1) * durations.squeeze(1)
        found = self.at(series.repeat(len(number)), t.flatten()).view(len(number), len(series), -1)
        return found[[number[share] for share in shares]]
