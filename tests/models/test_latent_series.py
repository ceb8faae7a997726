"""Ragged series: slicing, groups of nearly one length, inputs that hold, against loops."""

from __future__ import annotations

import torch
from torch import Tensor

from skode.models import HeldInputs, Series
from skode.models.series import groups, offsets_of, ragged_rows


def panel(lengths: list[int], seed: int = 0, n_covariates: int = 0) -> Series:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    times = [torch.rand(k, generator=generator, dtype=torch.float64).sort().values for k in lengths]
    values = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    values[torch.rand(n, 2, generator=generator) < 0.3] = torch.nan
    return Series.of(
        offsets_of(torch.tensor(lengths)),
        torch.cat(times),
        values,
        covariates=torch.randn(n, n_covariates, generator=generator, dtype=torch.float64),
        static=torch.randn(len(lengths), 1, generator=generator, dtype=torch.float64),
    )


def piece(series: Series, b: int) -> slice:
    return slice(int(series.offsets[b]), int(series.offsets[b + 1]))


def test_unobserved_values_are_zero() -> None:
    series = panel([5, 4])
    assert bool((series.values[~series.mask] == 0).all()) and not bool(series.mask.all())


def test_taken_series_are_those_of_a_loop() -> None:
    series = panel([3, 0, 5, 1], n_covariates=1)
    chosen = [2, 1, 2, 0]
    taken = series.take(torch.tensor(chosen))
    for i, b in enumerate(chosen):
        for name in ("times", "values", "mask", "covariates"):
            assert torch.equal(getattr(taken, name)[piece(taken, i)], getattr(series, name)[piece(series, b)])
    assert torch.equal(taken.static, series.static[chosen])


def test_rows_that_are_kept_are_those_of_a_loop() -> None:
    series = panel([3, 4, 2])
    keep = torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    kept = series.where(keep)
    assert kept.lengths.tolist() == [2, 0, 2]
    for b in range(3):
        assert torch.equal(kept.times[piece(kept, b)], series.times[piece(series, b)][keep[piece(series, b)]])
    assert kept.last.tolist() == [float(series.times[2]), 0.0, float(series.times[8])]


def test_hidden_observations_leave_their_rows() -> None:
    series = panel([3, 4])
    hidden = series.hidden(torch.tensor([True, False]).repeat(7, 1))
    assert not bool(hidden.mask[:, 1].any()) and bool((hidden.values[:, 1] == 0).all())
    assert torch.equal(hidden.mask[:, 0], series.mask[:, 0]) and torch.equal(hidden.times, series.times)


def test_ragged_rows_are_those_of_a_loop() -> None:
    offsets, rows = ragged_rows(torch.tensor([4, 0, 7]), torch.tensor([2, 0, 3]))
    assert offsets.tolist() == [0, 2, 2, 5] and rows.tolist() == [4, 5, 7, 8, 9]


def test_groups_hold_each_row_once_and_waste_little() -> None:
    lengths = torch.tensor([1, 500, 3, 0, 480, 2, 7, 1] + [2] * 400)
    offsets = offsets_of(lengths)
    found = groups(offsets)
    rows = torch.cat([group.rows[group.present] for group in found])
    assert torch.equal(rows.sort().values, torch.arange(int(offsets[-1])))
    assert torch.equal(torch.cat([group.series for group in found]).sort().values, torch.arange(len(lengths)))
    assert sum(group.rows.numel() for group in found) <= 2 * int(offsets[-1]) + len(lengths)
    for group in found:
        padded = group.padded(torch.arange(float(offsets[-1])))
        assert torch.equal(padded[group.present], group.rows[group.present].float())
        assert bool((padded[~group.present] == 0).all())


def held_by_a_loop(series: Series, b: int, t: float) -> Tensor:
    own = piece(series, b)
    before = int((series.times[own] <= t).sum())
    covariates = series.covariates[own]
    if not len(covariates):
        return series.covariates.new_zeros(series.covariates.shape[1])
    return covariates[max(before - 1, 0)]


def test_inputs_hold_until_the_next_row() -> None:
    series = panel([4, 1, 0, 6], n_covariates=2)
    inputs = HeldInputs(series)
    asked = torch.tensor([-5.0, -0.1, 0.2, 0.5, 0.9, 1.0, 7.0], dtype=torch.float64)
    asked = torch.cat([asked, series.times])
    for b in range(4):
        found = inputs.at(torch.full((len(asked),), b), asked)
        for t, row in zip(asked.tolist(), found, strict=True):
            assert torch.equal(row, torch.cat([held_by_a_loop(series, b, t), series.static[b]]))


def test_inputs_along_rows_run_from_their_starts() -> None:
    series = panel([4, 6], n_covariates=2)
    inputs = HeldInputs(series)
    ids, start = torch.tensor([1, 0]), torch.tensor([0.9, 0.1], dtype=torch.float64)
    along = inputs.along(ids, start, torch.tensor([[-0.8], [0.6]], dtype=torch.float64))
    u = torch.tensor([[0.5], [0.5]], dtype=torch.float64)
    assert torch.equal(along(u), inputs.at(ids, torch.tensor([0.5, 0.4], dtype=torch.float64)))


def test_inputs_at_shares_are_those_along_rows() -> None:
    inputs = HeldInputs(panel([4, 6], n_covariates=2))
    stretch = torch.tensor([1, 0, 0]), torch.tensor([0.9, 0.1, 0.3]).double(), torch.tensor([[-0.8], [0.6], [0.0]])
    along, shares = inputs.along(*stretch), [0.0, 0.5, 0.5, 1.0]
    found = inputs.at_shares(*stretch, shares)
    assert torch.equal(found, torch.stack([along(torch.full((3, 1), share).double()) for share in shares]))
