"""Who is trained on which rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skode.training import TrainingRows


def _rows(n, n_members, folds):
    X = torch.arange(float(n)).view(n, 1)
    return TrainingRows(X, torch.arange(n), torch.ones(n), n_members, folds)


def _epoch(rows, batch_size, seed=0):
    batches = list(rows.batches(batch_size, torch.Generator().manual_seed(seed)))
    members = rows.n_members
    return batches, torch.cat([batch.target.expand(members, -1) for batch in batches], dim=1)


def test_a_member_never_sees_the_fold_that_it_leaves_out_and_is_validated_on_it():
    folds = np.arange(100) % 10
    rows = _rows(100, 12, folds)
    _, seen = _epoch(rows, 30)
    (held,) = rows.validation()
    for member in range(12):
        own = set(np.flatnonzero(folds == member % 10))
        assert not own & set(seen[member].tolist())
        assert set(held.target[member][held.weights[member] > 0].tolist()) == own
        assert len(set(seen[member].tolist())) == 90


def test_batches_of_an_epoch_have_nearly_equal_sizes_and_orders_of_their_own():
    batches, seen = _epoch(_rows(100, 2, np.arange(100) % 4), 30)
    sizes = [batch.target.shape[1] for batch in batches]
    assert len(sizes) == round(75 / 30) and max(sizes) - min(sizes) <= 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen, _epoch(_rows(100, 2, np.arange(100) % 4), 30, seed=1)[1])


@pytest.mark.parametrize("folds", [None, np.arange(50) % 2])
def test_one_batch_holds_all_rows_whatever_the_seed(folds):
    first, seen = _epoch(_rows(50, 2, folds), 64)
    assert len(first) == 1
    assert torch.equal(seen, _epoch(_rows(50, 2, folds), 64, seed=5)[1])


def test_uneven_folds_are_filled_up_with_rows_that_weigh_nothing():
    (held,) = _rows(7, 2, np.array([0, 0, 0, 0, 1, 1, 1])).validation()
    assert held.weights.sum(dim=1).tolist() == [4.0, 3.0]
    slices = list(_rows(7, 2, np.array([0, 0, 0, 0, 1, 1, 1])).validation(3))
    assert [batch.weights.sum(dim=1).tolist() for batch in slices] == [[3.0, 3.0], [1.0, 0.0]]
