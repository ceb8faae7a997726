"""What an update of a latent ODE reads and decodes: windows of series, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skode.models import HeldInputs, Series

CONTIGUOUS = 0.7  # share of windows that are a stretch of observations; the others are a random subset
PREFIX = 0.5  # share of stretches that start where the series does
SMALLEST = 0.12  # of a series that is read
AT_LAST, AT_FIRST = 0.4, 0.2  # shares of reference times at the last and first observation read; the others between
PREFIXES = (0.3, 0.5, 0.7)  # of held-out series, from which the rest is to be predicted
DECODED = 50  # rows of a series that an update decodes, about
SHORTEST = 4  # rows of a series of which a part is held out


@dataclass(frozen=True, eq=False)
class Panel:
    """Training series without rows that have no observation, their known inputs, and their windows of events (B, 2).

    The inputs know all rows; ``targets`` (B, k), standardised, are what is to be read from whole series.
    """

    series: Series
    inputs: HeldInputs | None
    windows: Tensor
    targets: Tensor | None = None

    @staticmethod
    def of(series: Series, windows: Tensor | None = None, targets: Tensor | None = None) -> Panel:
        """A panel of series as they come; events are counted from the first to the last row if not told otherwise."""
        if windows is None:
            windows = torch.stack([series.first, series.last], dim=1)
        return Panel(observed(series), HeldInputs.of(series), windows, targets)


def observed(series: Series) -> Series:
    """The series without rows that have no observation (where there are channels)."""
    return series.where(series.mask.any(dim=1)) if series.mask.shape[1] else series


class Batch(NamedTuple):
    """Series (numbers ``ids`` in the panel), which rows are read, which decoded, references (b,), windows (b, 2)."""

    series: Series
    ids: Tensor
    keep: Tensor
    decoded: Tensor
    reference: Tensor
    windows: Tensor


def draw_batch(panel: Panel, ids: Tensor, longest: int, generator: torch.Generator, *, thinned: bool = True) -> Batch:
    """A batch of some series: of longer ones a random stretch of ``longest`` rows, and what of it is to be read.

    Parameters
    ----------
    panel : Panel
    ids : tensor of shape (b,)
    longest : int
    generator : torch.Generator
    thinned : bool, default=True
        Whether random subsets of rows may be read, too.
    """
    own = panel.series
    u = torch.rand(len(ids), 8, generator=generator, dtype=torch.float64).to(own.times.device)
    n_all = own.lengths[ids]
    n = n_all.clamp(max=longest)
    skipped = (u[:, 0] * (n_all - n + 1)).long()
    starts = own.offsets[ids] + skipped
    series = own.stretch(ids, starts, n)
    keep = _kept(series, n, u, generator, thinned)
    reference = _reference(series, keep, u[:, 5:7])
    decoded = _decoded(series, generator) if thinned else torch.ones_like(keep)
    return Batch(series, ids, keep, decoded, reference, _windows(panel, ids, starts, n))


def _decoded(series: Series, generator: torch.Generator) -> Tensor:
    """About ``DECODED`` rows of each series at most, drawn at random: more tell little more of one state."""
    share = (DECODED / series.lengths.clamp(min=1)).to(torch.float64)
    if not len(share) or bool((share >= 1).all()):
        return torch.ones(len(series.times), dtype=torch.bool, device=series.times.device)
    draws = torch.rand(len(series.times), generator=generator, dtype=torch.float64).to(share.device)
    return draws < share[series.index]


def _windows(panel: Panel, ids: Tensor, starts: Tensor, n: Tensor) -> Tensor:
    """From a stretch's first row, or the window's start, to the row behind it, or the window's end."""
    own, windows = panel.series, panel.windows[ids]
    if not len(own.times):
        return windows
    is_first, is_last = starts == own.offsets[ids], starts + n == own.offsets[ids + 1]
    low = torch.where(is_first, windows[:, 0], own.times[starts.clamp(max=len(own.times) - 1)])
    high = torch.where(is_last, windows[:, 1], own.times[(starts + n).clamp(max=len(own.times) - 1)])
    return torch.stack([low, high], dim=1)


def _kept(series: Series, n: Tensor, u: Tensor, generator: torch.Generator, thinned: bool) -> Tensor:
    """Which rows are read, at least one of each series."""
    index = series.index
    rank = torch.arange(len(index), device=index.device) - series.offsets[index]
    share = SMALLEST + (1 - SMALLEST) * u[:, 2]
    count = torch.minimum(torch.ceil(share * n).long().clamp(min=1), n)
    start = torch.where(u[:, 3] < PREFIX, 0, (u[:, 4] * (n - count + 1)).long())
    stretch = (rank >= start[index]) & (rank < (start + count)[index])
    if not thinned:
        return stretch
    draws = torch.rand(len(index), generator=generator, dtype=torch.float64).to(index.device)
    subset = (draws < share[index]) | (rank == (u[:, 4] * n).long()[index])
    return torch.where((u[:, 1] < CONTIGUOUS)[index], stretch, subset)


def _reference(series: Series, keep: Tensor, u: Tensor) -> Tensor:
    first, last = ends(series.where(keep))
    inside = torch.lerp(first, last, u[:, 1].to(first.dtype))
    at_end = torch.where(u[:, 0] < AT_LAST + AT_FIRST, first, inside)
    return torch.where(u[:, 0] < AT_LAST, last, at_end)


def ends(series: Series) -> tuple[Tensor, Tensor]:
    """First and last times (B,)."""
    return series.first, series.last


class HeldOut(NamedTuple):
    """Series as they may be read, and as they are to be predicted: the same numbers of series."""

    given: Series
    target: Series
    inputs: HeldInputs | None


def split_parts(series: Series, generator: torch.Generator) -> tuple[Series, list[HeldOut]]:
    """Hold out a quarter of each series: the last part of one half of them, random rows of the others.

    Series of fewer than 4 rows stay whole.
    """
    hide = _tail(series, 0.75)
    draws = torch.rand(len(series.times), generator=generator, dtype=torch.float64).to(hide.device)
    by_tail = torch.rand(series.n_series, generator=generator, dtype=torch.float64).to(hide.device) < 0.5
    index = series.index
    hide = torch.where(by_tail[index], hide, draws < 0.25) & (series.lengths >= SHORTEST)[index]
    inputs = HeldInputs.of(series)
    own = series.where(~hide)
    return own, [HeldOut(own, series.where(hide), inputs)]


def held_out_tasks(series: Series, generator: torch.Generator, shares: tuple[float, ...] = PREFIXES) -> list[HeldOut]:
    """Predict the rest from prefixes of these shares, and from a random half."""
    inputs = HeldInputs.of(series)
    own = observed(series)
    hides = [_tail(own, share) for share in shares]
    hides.append(torch.rand(len(own.times), generator=generator, dtype=torch.float64).to(own.times.device) < 0.5)
    return [HeldOut(own.where(~hide), own.where(hide), inputs) for hide in hides]


def _tail(series: Series, share: float) -> Tensor:
    """The rows behind the first ``share`` of each series, at least one of which stays."""
    index = series.index
    rank = torch.arange(len(index), device=index.device) - series.offsets[index]
    return rank >= torch.ceil(share * series.lengths).long().clamp(min=1)[index]
