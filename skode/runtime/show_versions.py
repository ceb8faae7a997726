"""What a bug report should tell of the machine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from sklearn.utils._show_versions import _get_sys_info

from skode.runtime.versions import VERSION

REQUIRED = ("scikit-learn", "torch", "numpy", "pandas", "joblib", "scipy", "threadpoolctl")
OPTIONAL = ("matplotlib", "rich", "skops", "onnx", "onnxruntime", "onnxscript", "optuna", "dask", "sktime")


def show_versions() -> None:
    """Print the versions and devices that matter for a bug report.

    Optional packages are not imported for it.

    Examples
    --------
    >>> import skode
    >>> skode.show_versions()  # doctest: +ELLIPSIS
    <BLANKLINE>
    System
      ...
    """
    for title, rows in _sections().items():
        print(f"\n{title}")
        for name, value in rows.items():
            print(f"  {name + ':':<25}{value}")


def _sections() -> dict[str, dict[str, Any]]:
    system = {name: str(value).replace("\n", " ") for name, value in _get_sys_info().items()}
    packages = {"skode": VERSION, **{name: _version(name) for name in (*REQUIRED, *OPTIONAL)}}
    return {"System": system, "Packages": packages, "torch": _torch_info(), "Threads": _threads()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _torch_info() -> dict[str, Any]:
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "built for CUDA": torch.version.cuda or "no",
        "CUDA devices": ", ".join(torch.cuda.get_device_name(i) for i in range(n_devices)) or "none",
        "MPS": "available" if torch.backends.mps.is_available() else "not available",
    }


def _threads() -> dict[str, Any]:
    """Of the native libraries that threadpoolctl knows."""
    from threadpoolctl import threadpool_info

    return {
        f"{pool['user_api']} {pool['prefix']}": f"{pool['num_threads']} ({pool['version'] or 'unknown version'})"
        for pool in threadpool_info()
    }
