"""Rows that have ended while the others, which share their steps, go on."""

from __future__ import annotations

import torch
from torch import Tensor

from skode.solver.layout import Layout
from skode.solver.solution import Stats, Status, failed_rows
from skode.solver.step import Span


class Standing:
    """Rows that stand still: their steps have no length, so that nothing new is asked of the field there.

    Parameters
    ----------
    layout : Layout
    like : tensor
        Has the times' dtype and device.
    """

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self._layout = layout
        self.rows = torch.zeros(layout.row, dtype=torch.bool, device=like.device)
        self._t = torch.zeros(layout.row, dtype=like.dtype, device=like.device)
        self._status = torch.zeros(layout.row, dtype=torch.int8, device=like.device)
        self._counts = torch.zeros((3, *layout.row), dtype=torch.int64, device=like.device)

    def add(self, rows: Tensor, status: Status, t: float, counts: tuple[int, int, int]) -> None:
        """Rows that stop at ``t``, after so many evaluations, steps and rejected steps."""
        new = rows & ~self.rows
        self.rows = self.rows | rows
        self._t = torch.where(new, t, self._t)
        self._status = self._status.masked_fill(new, status)
        self._counts = torch.stack(
            [own.masked_fill(new, count) for own, count in zip(self._counts, counts, strict=True)]
        )

    def weights(self, weights: Tensor | None) -> Tensor:
        """The other rows' shares in the error norm."""
        own = torch.ones_like(self._t) if weights is None else weights
        own = own.masked_fill(self.rows, 0.0)
        return own / own.sum().clamp(min=torch.finfo(own.dtype).tiny)

    def hold(self, span: Span, dtype: torch.dtype) -> Span:
        """The step for the rows that move, none for those that stand."""
        assert span.times is not None

        def held(x: float) -> Tensor:
            return torch.where(self.rows, self._t, x)

        h = torch.where(self.rows, 0.0, torch.full_like(self._t, span.h)).to(dtype)
        times = torch.where(self.rows, self._t.to(dtype), span.times)
        return Span(held(span.t), held(span.t_next), h, times)

    def clear(self, *errors: Tensor | None) -> None:
        """Their errors do not count."""
        for error in errors:
            if error is not None:
                error.masked_fill_(self.rows, 0.0)

    def in_stats(self, stats: Stats) -> Stats:
        """The statistics, with what these rows did."""

        def column(x: Tensor) -> Tensor:
            return self._layout.leave(x).reshape(-1)

        rows = column(self.rows)

        def merged(own: Tensor, other: Tensor) -> Tensor:
            return torch.where(rows, column(own).to(other.dtype), other)

        n_evals, n_steps, n_rejected = self._counts
        status = merged(self._status, stats.status)
        return stats._replace(
            status=status,
            n_evals=merged(n_evals, stats.n_evals),
            n_steps=merged(n_steps, stats.n_steps),
            n_rejected=merged(n_rejected, stats.n_rejected),
            t=merged(self._t, stats.t),
            success=not bool(failed_rows(status).any()),
        )
