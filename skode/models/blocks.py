"""Predictions in blocks of one fixed shape, so that a row's result has the same bits in any company.

The rounding of a matrix product depends on its number of rows, and an adaptive solver amplifies it; a fixed number of
rows takes the cause away and bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_STATES = 2048  # rows times members of a block of dense states
LARGEST_BLOCK_BYTES = 2**23  # of one state block


def block_size(n_members: int, n_dims: int) -> int:
    """Rows of a block; depends on the model alone."""
    states = min(BLOCK_STATES, max(16, LARGEST_BLOCK_BYTES // (8 * n_dims)))
    return max(16, states // n_members)


def blocks(X: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of exactly ``size`` rows with the rows they stand for; the last is filled up with copies of its first."""
    for start in range(0, len(X), size):
        rows = slice(start, min(start + size, len(X)))
        block = X[rows]
        missing = size - len(block)
        if missing:
            block = torch.cat([block, block[:1].expand(missing, -1)])
        yield rows, block
