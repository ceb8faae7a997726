"""Which device computes, and in which floating-point type. Nothing here runs at import."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

from skode.exceptions import DeviceError

_TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def resolve_device(device: str | torch.device, dtype: Any = "auto") -> torch.device:
    """Turn a ``device`` argument into a torch device that this machine has.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"`` takes CUDA, else MPS (unless ``dtype`` asks for float64, which MPS lacks), else the CPU.
    dtype : str or dtype, default="auto"
        The dtype argument that goes with it.

    Returns
    -------
    torch.device

    Raises
    ------
    DeviceError
        If torch does not know the name or the machine does not have the device.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        double = dtype != "auto" and _numpy_dtype(dtype) == np.float64
        return torch.device("mps" if torch.backends.mps.is_available() and not double else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(
            f"device={device!r} is not a torch device; use 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ..."
        ) from error
    n_devices = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (resolved.index or 0) >= n_devices.get(resolved.type, int(_can_allocate(resolved))):
        present = [name for name, count in n_devices.items() if count]
        raise DeviceError(
            f"device={device!r} is not available on this machine (available: {', '.join(present)}); "
            "use device='auto' to take the best one present."
        )
    return resolved


def _can_allocate(device: torch.device) -> bool:
    if device.type in ("cpu", "cuda", "mps", "meta"):
        return False
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return True


def resolve_dtype(dtype: DTypeLike | str, data_dtype: np.dtype[Any], device: torch.device) -> np.dtype[Any]:
    """Turn a ``dtype`` argument into float32 or float64.

    Parameters
    ----------
    dtype : {"auto", "float32", "float64"} or NumPy dtype
        ``"auto"``: the data's dtype on the CPU (anything but float32 computes in float64), float32 on accelerators.
    data_dtype : numpy.dtype
        The dtype of X.
    device : torch.device
        The resolved device.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    ValueError
        If ``dtype`` is neither float32 nor float64.
    DeviceError
        If the device cannot compute in it.
    """
    if isinstance(dtype, str) and dtype == "auto":
        single = device.type != "cpu" or data_dtype == np.float32
        return np.dtype(np.float32 if single else np.float64)
    resolved = _numpy_dtype(dtype)
    check_dtype_on_device(resolved, device)
    return resolved


def check_dtype_on_device(dtype: np.dtype[Any], device: torch.device) -> None:
    """Raise DeviceError where ``device`` cannot compute in ``dtype``."""
    if device.type == "mps" and dtype == np.float64:
        raise DeviceError("device 'mps' does not compute in float64; use dtype='float32' or device='cpu'.")


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        resolved = np.dtype(str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is not understood; use 'auto', 'float32' or 'float64'.") from error
    if resolved not in _TORCH_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; use 'auto', 'float32' or 'float64'.")
    return resolved


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a NumPy float32 or float64."""
    return _TORCH_DTYPES[np.dtype(dtype)]
