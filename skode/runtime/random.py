"""Random numbers from ``random_state`` alone; the global generators are never read, seeded or advanced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

RandomState = int | np.random.RandomState | np.random.Generator | None


def seed_sequence(random_state: RandomState) -> np.random.SeedSequence:
    """The root of every random number that a fit draws.

    Parameters
    ----------
    random_state : int, RandomState, Generator or None
        An int gives the same sequence every time; an instance is advanced by one draw; None takes fresh entropy
        from the operating system (NumPy's global generator is left alone).

    Returns
    -------
    numpy.random.SeedSequence
    """
    if random_state is None:
        return np.random.SeedSequence()
    if isinstance(random_state, np.random.RandomState):
        return np.random.SeedSequence(int(random_state.randint(np.iinfo(np.int32).max)))
    if isinstance(random_state, np.random.Generator):
        return np.random.SeedSequence(int(random_state.integers(np.iinfo(np.int64).max)))
    return np.random.SeedSequence(int(random_state))


def torch_generator(sequence: np.random.SeedSequence) -> torch.Generator:
    """A CPU generator seeded by ``sequence``: draws are made on the CPU, so that devices agree."""
    return torch.Generator("cpu").manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


class _OwnRandomness(TorchDispatchMode):
    """Gives every random torch operation of this thread a generator of ours."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            func = _with_generator(func)
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _with_generator(func: Any) -> Callable[..., Any]:
    """The overload of a random operation that takes a ``generator``."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func  # type: ignore[no-any-return]
    packet = func.overloadpacket
    own = func._overloadname.removeprefix("default")
    for name in ("generator", f"generator_{own}", f"{own}_generator"):
        if name in packet.overloads() and (own == "") == (name == "generator"):
            return getattr(packet, name)  # type: ignore[no-any-return]
    raise RuntimeError(f"{func} draws random numbers but takes no generator; initialise with torch.nn.init instead.")


@contextmanager
def own_randomness(generator: torch.Generator) -> Iterator[None]:
    """Run code that draws from torch's global generator (a user's ``nn.Linear``, say) on ours instead.

    The redirection belongs to this thread and block: the global generator is neither seeded nor advanced.

    Parameters
    ----------
    generator : torch.Generator
    """
    with _OwnRandomness(generator):
        yield
