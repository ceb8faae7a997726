"""Which tensors a field depends on: found by looking into the field, and checked against a graph of its values."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError

LEVELS = 8
"""How deep the search goes into objects that hold objects; a module with all that is in it counts as one."""

LONGEST, MOST = 10_000, 20_000
"""Containers with more entries are not looked through; the search ends after so many objects, near ones first."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ARRAYS = frozenset({"numpy", "scipy", "pandas", "sklearn", "matplotlib"})
_LIBRARIES = sys.stdlib_module_names | _ARRAYS | {"torch"}


def find_tensors(*roots: Any) -> list[Tensor]:
    """Tensors that need gradients among what objects hold, each once: leaves and others.

    Looked through are modules (parameters, buffers, other attributes), functions (what they close over, the globals
    they name, their defaults), methods, ``functools.partial``, containers and the attributes of other objects.
    """
    search = _Search()
    search.visit(roots)
    return search.tensors


def _is(x: Any, *kinds: Any) -> bool:
    """Like isinstance, but asks the object nothing."""
    return issubclass(type(x), kinds)


class _Search:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}  # holds what it has seen, so that no id comes twice

    def visit(self, roots: Iterable[Any]) -> None:
        todo = deque((root, LEVELS) for root in roots)
        while todo and len(self._seen) < MOST:
            x, level = todo.popleft()
            if _is(x, _PLAIN) or id(x) in self._seen:
                continue
            self._seen[id(x)] = x
            if _is(x, Tensor):
                if x.requires_grad:
                    self.tensors.append(x)
            elif level:
                with suppress(Exception):  # objects may do anything when they are asked for what they hold
                    todo.extend((part, level - 1) for part in self._parts(x) if not _is(part, _PLAIN))

    def _parts(self, x: Any) -> Iterable[Any]:
        if _is(x, nn.Module):
            return _parts_of_module(x)
        if _is(x, FunctionType):
            return () if _is_library(x) else _parts_of_function(x)
        if _is(x, MethodType):
            return x.__self__, x.__func__
        if _is(x, partial):
            return x.func, *x.args, *x.keywords.values()
        if _is(x, BuiltinMethodType):
            return () if _is(x.__self__, ModuleType) else (x.__self__,)
        if _is(x, dict):
            return list(x.values()) if len(x) <= LONGEST else ()
        if _is(x, list, tuple, set, frozenset, deque):
            return list(x) if len(x) <= LONGEST else ()
        if _is(x, staticmethod, classmethod):
            return (x.__func__,)
        if _is(x, property):
            return (x.fget,)
        if _is(x, type):
            return _parts_of_type(x)
        return () if _is(x, ModuleType) or _is_library(type(x), _ARRAYS) else _parts_of_object(x)


def _parts_of_module(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        yield from part._parameters.values()
        yield from part._buffers.values()
        yield from [value for name, value in vars(part).items() if name not in _OF_EVERY_MODULE]
        yield type(part)


def _parts_of_function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    names = dict.fromkeys(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if _is(value, ModuleType):
            # Of a module just what is named too.
            yield from [vars(value)[own] for own in names if own in vars(value)] if not _is_library(value) else ()
        else:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    """What the code names, functions inside of it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _parts_of_type(kind: type) -> Iterator[Any]:
    """Methods and attributes of a class that is no library's."""
    for base in kind.__mro__:
        if not _is_library(base):
            yield from [value for name, value in vars(base).items() if not _is_furniture(name)]


def _is_furniture(name: str) -> bool:
    return name.startswith("__") and name != "__call__"


def _parts_of_object(x: Any) -> Iterator[Any]:
    kind = type(x)
    with suppress(Exception):
        yield from list(object.__getattribute__(x, "__dict__").values())
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            with suppress(Exception):
                yield object.__getattribute__(x, name)
    yield kind


def _is_library(x: Any, libraries: Container[str] = _LIBRARIES) -> bool:
    """Whether a function, class or module belongs to a library, whose own code holds nobody's parameters."""
    name = x.__name__ if isinstance(x, ModuleType) else getattr(x, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] in libraries


# --- what values depend on -----------------------------------------------------------------------------------------

_Edge = tuple[Any, int]


def _edge(x: Tensor) -> _Edge:
    return x.grad_fn, x.output_nr


def _leaves_and_cuts(starts: Iterable[_Edge], cuts: dict[_Edge, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves below edges of a graph, and those of ``cuts`` that were met; the walk does not go beyond them."""
    leaves: list[Tensor] = []
    met: dict[int, Tensor] = {}
    todo, seen = list(starts), set()
    while todo:
        edge = todo.pop()
        node = edge[0]
        if node is None:
            continue
        if edge in cuts:
            met[id(cuts[edge])] = cuts[edge]
        elif node not in seen:
            seen.add(node)
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)
            todo += node.next_functions
    return leaves, list(met.values())


class Dependencies:
    """The tensors that a field's gradients go to: some for sure, others if its values turn out to depend on them.

    Parameters
    ----------
    field : callable
    args : tuple
        What the field is called with besides times and states.
    given : iterable of tensors, optional
        The parameters as the caller names them; they are searched for if not given.

    Raises
    ------
    ValueError
        If something else than tensors is given.
    """

    def __init__(self, field: Any, args: tuple[Any, ...] = (), given: Iterable[Tensor] | None = None) -> None:
        own = field.parameters() if given is None and isinstance(field, nn.Module) else checked(given)
        self._sure = _distinct(own)
        sure = {id(x) for x in self._sure}
        roots = (field, *args) if given is None else args
        self._possible = {id(x): x for x in find_tensors(*roots) if id(x) not in sure}
        self._used: set[int] = set()
        self._search, self._name = given is None, getattr(field, "__name__", type(field).__name__)
        self._settled: tuple[Tensor, ...] | None = None
        self._looked = not torch.is_grad_enabled() or (given is not None and not self._possible)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that may get gradients; once settled, those that do."""
        return (*self._sure, *self._possible.values()) if self._settled is None else self._settled

    @property
    def watching(self) -> bool:
        """Whether the field's values are still to be looked at."""
        return not self._looked

    def look(self, f: Tensor, inputs: Sequence[Tensor] = ()) -> None:
        """Note what a value depends on, by its graph.

        Raises
        ------
        FieldError
            If it depends on a tensor that needs gradients and was not found.
        """
        cuts = {_edge(x): x for x in self.tensors if x.grad_fn is not None}
        leaves, met = _leaves_and_cuts([_edge(f)], cuts)
        if f.is_leaf and f.requires_grad:
            leaves = [f]
        self._used.update(id(x) for x in (*leaves, *met))
        if self._search:
            self._refuse_strangers(leaves, inputs)
        # What is not needed so far may be needed later on.
        self._looked = all(key in self._used for key in self._possible)

    def _refuse_strangers(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        known = {id(x) for x in (*self.tensors, *inputs)}
        for leaf in leaves:
            if id(leaf) not in known:
                name = name_of(leaf)
                raise FieldError(
                    f"the field {self._name} depends on {f'{name!r}, ' if name else ''}a tensor of shape "
                    f"{tuple(leaf.shape)} that needs gradients but was not found in the field; hand it to "
                    "solve(..., parameters=(...)), or to the field by args=, or make it an attribute of a module "
                    "(or detach it if it is to get none)."
                )

    def settle(self) -> None:
        """From now on ``tensors`` are those that are sure and those that were used."""
        tensors = (*self._sure, *(x for key, x in self._possible.items() if key in self._used))
        self._settled, self._looked = _independent(tensors), True


def checked(given: Iterable[Tensor] | None) -> list[Tensor]:
    """Parameters as a list.

    Raises
    ------
    ValueError
        If they are not tensors.
    """
    parameters = [] if given is None else [given] if isinstance(given, Tensor) else list(given)
    for x in parameters:
        if not isinstance(x, Tensor):
            raise ValueError(f"parameters must be tensors; got {type(x).__name__}.")
    return parameters


def _distinct(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(x): x for x in tensors if x.requires_grad}.values())


def _independent(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors, none of which is computed from another.

    Autograd finds total derivatives. Where one tensor is computed from another one, both would carry the same part,
    so those that are computed give way to the leaves that they come from.
    """
    computed = [x for x in tensors if x.grad_fn is not None]
    if not computed or len(tensors) == 1:
        return tensors
    cuts, plain = {_edge(x): x for x in computed}, {id(x) for x in tensors if x.grad_fn is None}
    below = [edge for x in computed for edge in x.grad_fn.next_functions]  # type: ignore[union-attr]
    leaves, met = _leaves_and_cuts(below, cuts)
    if not met and not any(id(x) in plain for x in leaves):
        return tensors
    leaves, _ = _leaves_and_cuts(below, {})
    return _distinct([*(x for x in tensors if x.grad_fn is None), *leaves])


@contextmanager
def hooks_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the callers' hooks on tensors from seeing parts of a gradient: they are to see the whole, once."""
    kept = [(x._backward_hooks, dict(x._backward_hooks)) for x in tensors if x._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


# --- names for errors ----------------------------------------------------------------------------------------------


def name_of(x: Tensor) -> str | None:
    """What the callers' code calls a tensor, if that can be found."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != __name__.partition(".")[0]:
            for scope in (frame.f_locals, frame.f_globals):
                for known_as in (_own_name, _name_inside):
                    name = known_as(x, scope)
                    if name is not None:
                        return name
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _own_name(x: Tensor, scope: dict[str, Any]) -> str | None:
    return next((name for name, value in list(scope.items()) if value is x and name.isidentifier()), None)


def _name_inside(x: Tensor, scope: dict[str, Any]) -> str | None:
    for name, value in list(scope.items()):
        for path, part in _named_parts(value):
            if part is x:
                return name + path
    return None


def _named_parts(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, nn.Module):
        yield from ((f".{name}", value) for name, value in x.named_parameters())
    elif type(x) is dict:
        yield from ((f"[{key!r}]", value) for key, value in list(x.items()) if isinstance(key, str | int))
    elif type(x) in (list, tuple):
        yield from ((f"[{i}]", value) for i, value in enumerate(x))
    elif not isinstance(x, type | ModuleType | FunctionType):
        yield from ((f".{name}", value) for name, value in list(getattr(x, "__dict__", {}).items()))
