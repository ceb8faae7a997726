"""Who evaluates which rows when they lie in several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skode.runtime import Peers
from skode.training import ShardedRows, TrainingRows

SIZES = (30, 1, 69)
FOLDS = np.arange(100) % 10


class Told(Peers):
    """One of several processes, all of whose answers are known beforehand."""

    def __init__(self, rank, answers):
        self.rank, self.size, self._answers = rank, len(answers), answers

    def gather(self, value):
        assert np.array_equal(value, self._answers[self.rank])
        return self._answers


def _all_and_shards(n_members, folds):
    """All rows in one process, and in three; the row's number is its column, target and weight."""
    number = torch.arange(1.0, 101.0)
    parts = number.split(SIZES)
    peers = [Told(rank, [part.numpy() for part in parts]) for rank in range(len(SIZES))]
    shards = [
        ShardedRows(part.view(-1, 1), part, part, n_members, folds, own) for part, own in zip(parts, peers, strict=True)
    ]
    return TrainingRows(number.view(-1, 1), number, number, n_members, folds), shards


def _batches(rows, batch_size):
    return list(rows.batches(batch_size, torch.Generator().manual_seed(3)))


def _numbers(batch, member):
    """The rows that count for a member; weights, targets and columns agree about them."""
    weights, targets = (part.expand(len(batch.totals), -1)[member] for part in (batch.weights, batch.target))
    columns = (batch.X if batch.X.dim() == 3 else batch.X.expand(len(batch.totals), -1, -1))[member, :, 0]
    counted = weights > 0
    assert torch.equal(weights[counted], targets[counted]) and torch.equal(weights[counted], columns[counted])
    return weights[counted].tolist()


@pytest.mark.parametrize("folds", [None, FOLDS])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_processes_share_out_the_batches_that_one_alone_would_form(folds, batch_size):
    rows, shards = _all_and_shards(3, folds)
    assert [shard.n_rows for shard in shards] == [rows.n_rows] * 3
    epochs = [_batches(shard, batch_size) for shard in shards]
    for whole, *own in zip(_batches(rows, batch_size), *epochs, strict=True):
        for member in range(3):
            assert sorted(number for batch in own for number in _numbers(batch, member)) == sorted(
                _numbers(whole, member)
            )
        for batch in own:
            torch.testing.assert_close(batch.totals, whole.totals)


def test_left_out_rows_are_validated_where_they_are_even_by_slices():
    rows, shards = _all_and_shards(3, FOLDS)
    for whole, *own in zip(rows.validation(4), *(shard.validation(4) for shard in shards), strict=True):
        for member in range(3):
            assert sorted(number for batch in own for number in _numbers(batch, member)) == sorted(
                _numbers(whole, member)
            )


def test_a_process_without_rows_in_a_batch_evaluates_one_that_weighs_nothing():
    _, (_, one, _) = _all_and_shards(1, None)
    sizes = [batch.weights.shape for batch in _batches(one, 10)]
    assert set(sizes) == {(1, 1)}
    weights = sorted(float(batch.weights.sum()) for batch in _batches(one, 10))
    assert weights == [0.0] * 9 + [31.0]


def test_all_shares_in_the_error_norm_add_up_to_one():
    _, shards = _all_and_shards(2, FOLDS)
    controls = [[shard.control(batch) for batch in _batches(shard, 20)] for shard in shards]
    for own in zip(*controls, strict=True):
        assert float(sum(control.weights.sum() for control in own)) == pytest.approx(1.0, rel=1e-6)
