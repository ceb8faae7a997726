"""What ``solve`` is given, checked and brought into shape."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import FieldError
from skode.solver.control import BatchControl, Tolerance
from skode.solver.step import time_dtype_of


def check_state(y0: Tensor) -> None:
    """Refuse a y0 that is not a floating point tensor of shape (n, d)."""
    if not isinstance(y0, Tensor):
        raise FieldError(f"y0 must be a tensor of shape (n, d); got {type(y0).__name__}.")
    if y0.dim() != 2:
        raise FieldError(f"y0 must have shape (n, d); got {tuple(y0.shape)}.")
    if y0.dtype not in (torch.float32, torch.float64):
        raise FieldError(f"y0 must be float32 or float64; got {y0.dtype}.")


def tolerance(
    y0: Tensor,
    n_components: int,
    rtol: Any,
    atol: Any,
    max_num_steps: int,
    first_step: float | None,
    min_step: float,
    max_step: float | None,
) -> Tolerance:
    """Tolerances and limits as the controls want them.

    Raises
    ------
    ValueError
        If one of them makes no sense.
    """
    relative = _per_component("rtol", rtol, n_components)
    absolute = _per_component("atol", atol, n_components)
    if _any_zero(relative, absolute):
        raise ValueError("rtol and atol are both 0; no step could be accepted. Give at least one a positive value.")
    for name, value, low in (("first_step", first_step, 0.0), ("min_step", min_step, 0.0), ("max_step", max_step, 0.0)):
        if value is not None and not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name}={value} must be finite and not negative.")
    for name, limit in (("first_step", first_step), ("max_step", max_step), ("max_num_steps", max_num_steps)):
        if limit is not None and limit <= 0:
            raise ValueError(f"{name}={limit} must be positive.")
    if max_step is not None and min_step > max_step:
        raise ValueError(f"min_step={min_step} exceeds max_step={max_step}.")
    return Tolerance(
        relative if isinstance(relative, float) else relative.to(y0),
        _scalar(absolute, y0.dtype, y0.device)
        if isinstance(absolute, float)
        else absolute.to(y0).clamp(min=torch.finfo(y0.dtype).tiny),
        int(max_num_steps),
        first_step,
        None,
        float(min_step),
        max_step,
    )


def _any_zero(relative: float | Tensor, absolute: float | Tensor) -> bool:
    total = relative + absolute
    return bool((total == 0).any()) if isinstance(total, Tensor) else total == 0


@lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A state of 0 has an error of 0 in any unit but 0.
    with torch.inference_mode(False):
        return torch.tensor(max(value, torch.finfo(dtype).tiny), dtype=dtype, device=device)


def _per_component(name: str, value: Any, n_components: int) -> float | Tensor:
    """A number, or a tensor with one for each component."""
    if isinstance(value, float) and 0 <= value < math.inf:
        return value
    numbers = torch.as_tensor(value, dtype=torch.float64).detach()
    if numbers.dim() and numbers.shape != (n_components,):
        raise ValueError(
            f"{name} must be a number or have shape ({n_components},), one for each component; got "
            f"{tuple(numbers.shape)}."
        )
    if bool(torch.isnan(numbers).any() | (numbers < 0).any()) or (not numbers.dim() and math.isinf(numbers)):
        raise ValueError(f"{name}={value} must be finite and not negative.")
    return numbers if numbers.dim() else float(numbers)


def fixed_step(tolerance: Tolerance, step_size: float | None, times: Tensor) -> Tolerance:
    """The tolerance of a fixed-step method: a step size; a tenth of the longest interval if none is given."""
    if step_size is None:
        longest = (
            times.detach().nan_to_num(nan=-math.inf).amax(1) - times.detach().nan_to_num(nan=math.inf).amin(1)
        ).amax()
        step_size = max(float(longest) / 10, torch.finfo(times.dtype).tiny)
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size={step_size} must be positive and finite.")
    return tolerance.replace(step_size=float(step_size), first_step=None)


def output_times(t: Any, y0: Tensor) -> tuple[Tensor, bool]:
    """Output times as (n, m) on the state's device, checked, and whether all rows share them."""
    times = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
    if not times.is_floating_point():
        times = times.to(torch.float64)
    times = times.to(time_dtype_of(y0.device)).to(y0.device)
    shared = times.dim() == 1
    if shared:
        if len(y0):
            _check_shared(list(t) if isinstance(t, list | tuple) else times.detach().tolist())
        times = times.expand(len(y0), -1)
    if times.dim() != 2 or len(times) != len(y0) or times.shape[1] == 0:
        raise ValueError(
            f"t must have shape (m,) or ({len(y0)}, m) for y0 of shape {tuple(y0.shape)}; got {tuple(times.shape)}."
        )
    if len(times) and not shared:
        _check_rows(times.detach())
    return times, shared or times.stride(0) == 0


def _check_rows(times: Tensor) -> None:
    missing = torch.isnan(times)
    if bool(missing[:, 0].any()) or bool((missing[:, :-1] & ~missing[:, 1:]).any()):
        raise ValueError("NaN in t may only pad the end of a row; every row needs its first time.")
    if bool(torch.isinf(times).any()):
        raise ValueError("t holds an infinite time.")
    steps = times.diff(dim=1).nan_to_num(0.0)
    wrong = torch.nonzero((steps > 0).any(dim=1) & (steps < 0).any(dim=1))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"t must be ascending or descending within a row; row {row} has {times[row].tolist()}.")


def _check_shared(times: list[float]) -> None:
    if not all(map(math.isfinite, times)):
        raise ValueError(f"t must be finite where it is shared by all rows; got {times}.")
    if times not in (sorted(times), sorted(times, reverse=True)):
        raise ValueError(f"t must be ascending or descending; got {times}.")


def batch_control(step_control: str | BatchControl, shared: bool, n: int) -> BatchControl | None:
    """How the batch shares its steps; None where every row has its own.

    Raises
    ------
    ValueError
        If it is not understood, or the rows have times of their own.
    """
    if isinstance(step_control, str) and step_control == "row":
        return None
    if step_control == "batch":
        step_control = BatchControl()
    if not isinstance(step_control, BatchControl):
        raise ValueError(f"step_control={step_control!r} is unknown; use 'row', 'batch' or a BatchControl.")
    if not shared:
        raise ValueError("step_control='batch' needs times shared by all rows, shape (m,); got times per row.")
    weights = step_control.weights
    if weights is not None and weights.shape != (n,):
        raise ValueError(f"BatchControl's weights must have shape ({n},); got {tuple(weights.shape)}.")
    return step_control
