"""What a latent ODE misses of each series: its errors at the observations, interpolated by a Gaussian process.

Symbols: N observations, Q queries (series, time), c channels; a window is the few rows of a series that a query looks
at. Each channel's error is a process of its own, with a correlation that falls with the distance in time, around which
observations are noise: simple kriging, as in Rasmussen and Williams 2006, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skode.models.series import Series, groups, ragged_rows

BLOCK = 32  # rows: a query inside looks at its own block of them and one on either side, one ahead at the last of them
PAIRS_AT_ONCE = 2_000_000  # queries times rows


@dataclass(frozen=True)
class Kernel:
    """Of a channel's error: the length over which its correlation falls to 1 / e, and its variance over the noise's.

    The correlation is exponential (Matern's of 1/2): far ahead of the last observation it tells the level, never a
    slope, which would run away.
    """

    length: float
    ratio: float

    def correlation(self, gap: Tensor) -> Tensor:
        """At differences of times."""
        return (-gap.abs() / self.length).exp()


class Windows:
    """Which observations of a channel queries look at.

    Inside of a series, and before it, these are about a hundred around the query; ahead of it the last ones, so that
    it does not matter what else was observed long before.

    Parameters
    ----------
    series : Series
    query : int64 tensor of shape (Q,)
        The series of each query.
    t : tensor of shape (Q,)
    channel : int
    """

    def __init__(self, series: Series, query: Tensor, t: Tensor, channel: int) -> None:
        keep = series.mask[:, channel]
        series = series.where(keep)
        n = series.lengths[query]
        rank = series.count_until(query, t)
        most = int(n.max()) // BLOCK + 2 if len(n) else 1
        number = torch.where(rank == n, most - 1, rank // BLOCK)
        found, self._window = torch.unique(query * most + number, return_inverse=True)
        owner, number = found // most, found % most
        lengths = series.lengths[owner]
        is_last = number == most - 1
        start = torch.where(is_last, lengths - BLOCK, (number - 1) * BLOCK).clamp(min=0)
        end = torch.where(is_last, lengths, torch.minimum((number + 2) * BLOCK, lengths))
        self._offsets, rows = ragged_rows(series.offsets[owner] + start, end - start)
        self._t, self._times = t.detach(), series.times[rows]
        rows, self._row = torch.unique(rows, return_inverse=True)
        self.rows = torch.nonzero(keep).view(-1)[rows]

    def correction(self, errors: Tensor, kernel: Kernel) -> Tensor:
        """The channel's expected errors (Q,) from those at ``rows`` (N',) of the series."""
        weights = self._weights(errors[self._row], kernel)
        out = errors.new_zeros(len(self._t))
        for pairs, rows in self._pairs():
            near = kernel.correlation((self._t[pairs] - self._times[rows]).to(errors))
            out = out.index_add(0, pairs, near * weights[rows])
        return out

    def _weights(self, errors: Tensor, kernel: Kernel) -> Tensor:
        """(K + I / ratio)^-1 errors of every window's rows."""
        out = torch.zeros_like(errors)
        for group in groups(self._offsets) if len(errors) else ():
            portion = max(1, PAIRS_AT_ONCE // group.rows.shape[1] ** 2)
            for rows, there in zip(group.rows.split(portion), group.present.split(portion), strict=True):
                rows = torch.where(there, rows, 0)
                t, known = self._times[rows], torch.where(there, errors[rows], 0.0)
                both = there.unsqueeze(2) & there.unsqueeze(1)
                covariance = kernel.correlation((t.unsqueeze(2) - t.unsqueeze(1)).to(errors)) * both
                covariance.diagonal(dim1=1, dim2=2).add_(torch.ones_like(known).masked_fill(there, 1 / kernel.ratio))
                found = torch.cholesky_solve(known.unsqueeze(2), torch.linalg.cholesky(covariance)).squeeze(2)
                out = out.index_put((rows[there],), found[there])
        return out

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """In portions: queries, and places in the windows of the rows that each looks at."""
        start, counts = self._offsets[self._window], self._offsets.diff()[self._window]
        portion = counts.cumsum(0) // PAIRS_AT_ONCE
        for number in torch.unique(portion).tolist():
            some = torch.nonzero(portion == number).view(-1)
            _, rows = ragged_rows(start[some], counts[some])
            yield torch.repeat_interleave(some, counts[some], output_size=len(rows)), rows
