"""Arrays into tensors and back: the one converter pair of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_array(X: Any) -> Any:
    """What a user passed, as something scikit-learn's validation understands.

    A torch tensor on any device (with or without gradients) becomes a NumPy array, in float32 if it is of bfloat16,
    which NumPy lacks; everything else passes through.

    Parameters
    ----------
    X : array-like, DataFrame or torch.Tensor

    Returns
    -------
    array-like
    """
    if not isinstance(X, torch.Tensor):
        return X
    X = X.detach().cpu()
    return (X.float() if X.dtype == torch.bfloat16 else X).numpy()


def to_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor that holds ``array``'s values.

    Shares memory with ``array`` where that is possible; a read-only array is copied, since torch would
    otherwise hand out a writable view of it.

    Parameters
    ----------
    array : ndarray
    dtype : torch.dtype
    device : torch.device

    Returns
    -------
    torch.Tensor
    """
    contiguous = np.ascontiguousarray(array)
    if not contiguous.flags.writeable:
        contiguous = contiguous.copy()
    return torch.from_numpy(contiguous).to(dtype).to(device)  # in this order: MPS has no float64


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A NumPy array with memory of its own that holds ``tensor``'s values, from any device.

    Parameters
    ----------
    tensor : torch.Tensor

    Returns
    -------
    ndarray
    """
    return np.array(tensor.detach().cpu().numpy())
