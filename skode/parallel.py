"""Data-parallel fits: several processes, each with rows of its own, fit one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from skode.exceptions import PeerError
from skode.runtime import Group, together

__all__ = ["data_parallel"]


@contextmanager
def data_parallel(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let all processes of a group fit one model together, each with rows of its own.

    Inside the block, ``fit`` and ``partial_fit`` of :class:`~skode.ODENetClassifier` and
    :class:`~skode.ODENetRegressor` are common to the processes: each passes the rows that it holds and evaluates the
    network on these alone. All end with the same weights, those that one process would find with all rows put one
    behind the other in the order of ranks, but for rounding. Predictions and scores stay each process's own.

    Every process has to make the same fits in the same order, with the same arguments (``device`` and ``verbose``
    may differ; the seed is that of the first process). No process gets rows of X of another. What they tell each
    other: one number per row (weights and labels), statistics, at most some 40,000 values of one column at a time (for
    quantiles), the network's outputs for held-out rows, and sums of losses, errors and gradients.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        That can send tensors on the CPU (gloo). By default the one of all processes.

    Raises
    ------
    PeerError
        If torch.distributed has not been initialised, or another process failed, ended, or did something else.

    Examples
    --------
    A script that ``torchrun --nproc-per-node 2 script.py`` runs in two processes; here, a group of one:

    >>> import tempfile
    >>> import torch.distributed as dist
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.parallel import data_parallel
    >>> X, y = load_iris(return_X_y=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    ...     rank, size = dist.get_rank(), dist.get_world_size()
    ...     with data_parallel():
    ...         model = ODENetClassifier(max_iter=20, n_members=1, random_state=0).fit(X[rank::size], y[rank::size])
    ...     dist.destroy_process_group()
    >>> bool(model.score(X, y) > 0.9)
    True
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise PeerError(
            "data_parallel needs torch.distributed: call torch.distributed.init_process_group('gloo') first, in a "
            "script that torchrun starts."
        )
    if "cpu" not in dist.get_backend_config(group):
        raise PeerError(
            f"data_parallel needs a process group that sends tensors on the CPU; this one has "
            f"{dist.get_backend_config(group)}. Pass group=torch.distributed.new_group(backend='gloo')."
        )
    with together(Group(group)):
        yield
