"""Tensors inside of function transforms (:mod:`torch.func`) and forward-mode differentiation, and their plain values.

A transform wraps tensors, and those of several levels lie inside of one another. Deciding on steps takes plain
values, which are found with all transforms set aside. A level of ``vmap`` adds an axis to a value, the outermost first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether any transform, or forward-mode differentiation, is at work."""
    return functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether a ``vmap`` has given the value an axis."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def any_batched(*cotangents: Tensor) -> bool:
    """Whether autograd was given many cotangents at once (``is_grads_batched=True``)."""
    return any(functorch.is_legacy_batchedtensor(x) or functorch.is_functorch_wrapped_tensor(x) for x in cotangents)


def axes() -> list[tuple[int, int]]:
    """Level and length of every axis of ``vmap``, the outermost first.

    Raises
    ------
    NotImplementedError
        If there are transforms of other kinds.
    """
    found = []
    for interpreter in pyfunctorch.retrieve_all_functorch_interpreters():
        kind = interpreter.key()
        if kind == functorch.TransformType.Vmap:
            found.append((interpreter.level(), interpreter.batch_size()))  # type: ignore[attr-defined]
        elif kind not in (functorch.TransformType.Grad, functorch.TransformType.Jvp):
            raise NotImplementedError(
                f"solve does not work under torch.func's {kind}; it does under grad, jvp and vmap."
            )
    return sorted(found)


def value(x: Tensor, *, with_axes: bool) -> Tensor:
    """What is left of a tensor ``(..., n, k)`` without transforms and derivatives.

    With the axes of ``vmap``, rows of all batches follow one another.
    """
    with ExitStack() as aside:
        while (top := functorch.peek_interpreter_stack()) is not None:
            if top.key() == functorch.TransformType.Vmap:
                if with_axes:
                    size = pyfunctorch.coerce_cinterpreter(top).batch_size()  # type: ignore[attr-defined]
                    x = functorch._remove_batch_dim(x, top.level(), size, 0)
            elif functorch.is_gradtrackingtensor(x) and functorch.maybe_get_level(x) == top.level():
                x = functorch.get_unwrapped(x)
            aside.enter_context(pyfunctorch.temporarily_pop_interpreter_stack())
        x = x.detach()
        return x.flatten(0, -2) if with_axes else x


def batched(x: Tensor, levels: list[tuple[int, int]]) -> Tensor:
    """Rows of all batches ``(N, ...)`` as seen inside of ``vmap``; to be called with all transforms set aside."""
    x = x.reshape(*(size for _, size in levels), -1, *x.shape[1:])
    for level, _ in levels:
        x = functorch._add_batch_dim(x, 0, level)
    return x


@contextmanager
def set_aside() -> Iterator[Any]:
    """No transforms and no derivatives in here; gives what :func:`taken_up` needs."""
    no_tangents, cleared = forward_ad._set_fwd_grad_enabled(False), pyfunctorch.temporarily_clear_interpreter_stack()
    with torch.no_grad(), no_tangents, cleared as transforms:
        yield transforms


@contextmanager
def taken_up(transforms: Any) -> Iterator[None]:
    """The transforms again that were set aside."""
    with pyfunctorch.temporarily_restore_interpreter_stack(transforms):
        yield
