"""How much memory an autograd graph holds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor


def saved_bytes(*outputs: Tensor) -> int:
    """Bytes of the outputs and of what their graph saved for the way back, its leaves (inputs, parameters) aside."""
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in outputs}
    leaves: set[int] = set()
    for node in _nodes(outputs):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(leaf.untyped_storage()._cdata)
            continue
        for x in _saved(node):
            found[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(n_bytes for storage, n_bytes in found.items() if storage not in leaves)


def _nodes(outputs: tuple[Tensor, ...]) -> Iterator[Any]:
    seen: set[Any] = set()
    ahead = [x.grad_fn for x in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        ahead += [following for following, _ in node.next_functions]


def _saved(node: Any) -> Iterator[Tensor]:
    for name in _names(type(node)):  # type: ignore[arg-type]
        try:
            value = getattr(node, name)
        except RuntimeError:  # hooks of the callers' own that do not unpack now
            continue
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, Tensor):
                yield x


@lru_cache(maxsize=1024)
def _names(kind: type) -> tuple[str, ...]:
    """What a kind of node calls the tensors that it saved."""
    return tuple(name for name in dir(kind) if name == "saved_tensors" or name.startswith("_saved_"))
