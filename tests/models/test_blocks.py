"""Blocks of one fixed shape."""

from __future__ import annotations

import pytest
import torch

from skode.models.blocks import block_size, blocks


@pytest.mark.parametrize("n_rows", [0, 1, 15, 16, 17, 48])
def test_every_row_comes_once_in_blocks_of_one_shape(n_rows):
    X = torch.arange(n_rows * 3.0).view(n_rows, 3)
    parts = list(blocks(X, 16))
    assert all(block.shape == (16, 3) for _, block in parts)
    rows = [block[: place.stop - place.start] for place, block in parts]
    assert torch.equal(torch.cat([X[:0], *rows]), X)


def test_the_size_depends_on_the_model_alone_and_shrinks_with_its_states():
    assert block_size(8, 64) * 8 == block_size(1, 64)
    assert block_size(1, 10**6) == 16
