"""A state of any shape, or a tuple of such, as one row ``(1, D)`` of the solver, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skode.exceptions import FieldError

State = Any
"""A tensor of any shape, or a tuple of tensors."""


@dataclass(frozen=True)
class Form:
    """Shapes of a state's parts, and their common dtype.

    Complex entries are pairs in the row; half-precision states are float32 there, so that small steps are not lost.
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, y0: State) -> Form:
        """The form of ``y0``.

        Raises
        ------
        FieldError
            If ``y0`` is no state.
        """
        parts = y0 if isinstance(y0, tuple) else (y0,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise FieldError(f"y0 must be a tensor or a tuple of tensors; got {kind(y0)}.")
        dtype = torch.cat([part.detach().reshape(-1)[:0] for part in parts]).dtype
        if not (dtype.is_floating_point or dtype in (torch.complex64, torch.complex128)):
            raise FieldError(f"y0 must be real or complex, float32 or float64; got {dtype}: call y0.float(), say.")
        return cls(tuple(part.shape for part in parts), isinstance(y0, tuple), dtype)

    @property
    def real(self) -> torch.dtype:
        """The real dtype that belongs to the state's: that of times too."""
        return self.dtype.to_real()

    @property
    def sizes(self) -> list[int]:
        """Components of the parts in a row."""
        return [shape.numel() * (2 if self.dtype.is_complex else 1) for shape in self.shapes]

    def row(self, y: State) -> Tensor:
        """The state as ``(1, D)`` in the solver's dtype."""
        flat = torch.cat([part.reshape(-1) for part in (y if self.is_tuple else (y,))])
        if self.dtype.is_complex:
            flat = torch.view_as_real(flat.to(self.dtype)).reshape(-1)
        return flat.to(torch.float64 if self.real == torch.float64 else torch.float32).unsqueeze(0)

    def parts(self, x: Tensor) -> State:
        """``(..., D)`` as states with leading axes ``...``, in x's own precision."""
        lead = x.shape[:-1]
        if self.dtype.is_complex:
            x = torch.view_as_complex(x.reshape(*lead, x.shape[-1] // 2, 2).contiguous())
        if not self.is_tuple:
            return x.reshape((*lead, *self.shapes[0]))
        pieces = x.split([shape.numel() for shape in self.shapes], dim=-1)
        return tuple(piece.reshape((*lead, *shape)) for piece, shape in zip(pieces, self.shapes, strict=True))

    def state(self, x: Tensor) -> State:
        """The same in the state's own precision."""
        return self.parts(x.to(self.real))

    def derivative(self, value: Any, name: str) -> Tensor:
        """What the field ``name`` returned, as ``(1, D)``.

        Raises
        ------
        FieldError
            If it is unlike the state.
        """
        values = tuple(value) if self.is_tuple and isinstance(value, (tuple, list)) else (value,)
        if len(values) != len(self.shapes) or not all(isinstance(part, Tensor) for part in values):
            shapes = tuple(map(tuple, self.shapes))
            expected = f"a tuple of tensors of shapes {shapes}" if self.is_tuple else f"a tensor of shape {shapes[0]}"
            raise FieldError(f"the field {name} returned {kind(value)}; it must return {expected}, like y0.")
        fitted = tuple(self._fit(part, shape, name) for part, shape in zip(values, self.shapes, strict=True))
        return self.row(fitted if self.is_tuple else fitted[0])

    def _fit(self, value: Tensor, shape: torch.Size, name: str) -> Tensor:
        if value.is_complex() and not self.dtype.is_complex:
            raise FieldError(f"the field {name} returned a complex derivative of a real state; make y0 complex, too.")
        if value.shape == shape:
            return value
        try:
            return value.reshape(shape) if _long(value.shape) == _long(shape) else value.expand(shape)
        except RuntimeError:
            raise FieldError(
                f"the field {name} returned shape {tuple(value.shape)} for a state of shape {tuple(shape)}; "
                "it must return one derivative for each component."
            ) from None

    def entries(self, name: str, value: Any, like: Tensor) -> float | Tensor:
        """A number for each component of the row: a float if they are all the same, else ``(D,)``.

        Parameters
        ----------
        name : str
            What it is, for errors.
        value : float, tensor that broadcasts to the state, or for tuples a sequence with one such entry a part
        like : tensor
            Gives dtype and device.

        Raises
        ------
        ValueError
            If it does not fit the state.
        """
        if getattr(value, "requires_grad", False):
            raise ValueError(f"{name} cannot require gradients; pass {name}.detach().")
        each = self.is_tuple and (isinstance(value, (tuple, list)) or getattr(value, "ndim", 0) > 0)
        parts = list(value) if each else [value]
        if each and len(parts) != len(self.shapes):
            raise ValueError(f"{name} has {len(parts)} entries for the {len(self.shapes)} parts of y0.")
        tensors = [torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in parts]
        if not each and tensors[0].numel() == 1:
            return value if isinstance(value, float) else tensors[0].item()
        try:
            flat = torch.cat([_spread(x, shape) for x, shape in zip(tensors, self.shapes, strict=True)])
        except RuntimeError:
            shapes = [tuple(x.shape) for x in tensors]
            raise ValueError(
                f"{name} of shape {shapes} does not fit y0 of shape {list(map(tuple, self.shapes))}."
            ) from None
        return flat.repeat_interleave(2) if self.dtype.is_complex else flat


def name_of(func: Any) -> str:
    """What to call a field in errors."""
    return getattr(func, "__name__", type(func).__name__)


def kind(value: Any) -> str:
    """The type of a value, for errors."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _long(shape: Sequence[int]) -> list[int]:
    """The axes that are not 1."""
    return [size for size in shape if size != 1]


def _spread(x: Tensor, shape: torch.Size) -> Tensor:
    return x.reshape(-1) if x.shape == (shape.numel(),) else x.expand(shape).reshape(-1)
