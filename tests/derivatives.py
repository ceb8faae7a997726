"""What a field says of its derivatives, against plain autograd through its values."""

from __future__ import annotations

import torch
from torch import Tensor

from skode.solver import Dynamics

# One time of each row, one for all rows, and one for all rows that costs nothing.
KINDS_OF_TIMES = ["own", "equal", "expanded"]


def times_for(kind: str, n: int) -> Tensor:
    if kind == "own":
        return torch.linspace(-1, 2, n, dtype=torch.float64).view(-1, 1)
    shared = torch.full((1, 1), 0.7, dtype=torch.float64).expand(n, 1)
    return shared if kind == "expanded" else shared.clone()


def assert_derivatives_are_autograds(dynamics: Dynamics, t: Tensor, y: Tensor) -> None:
    """`linearize`, `pull` and `accumulate` against autograd through `__call__`, for two evaluations with weights."""
    generator = torch.Generator().manual_seed(5)
    parameters = dynamics.trainable()
    shares: list[Tensor | float] = [torch.rand(len(y), 1, generator=generator, dtype=y.dtype), -0.7]
    tapes, expected = [], [torch.zeros_like(p) for p in parameters]
    plain = [torch.zeros_like(p) for p in parameters]
    for share in shares:
        moving_t, moving_y = t.clone().requires_grad_(), y.clone().requires_grad_()
        value = dynamics(moving_t, moving_y)
        a = torch.randn(value.shape, generator=generator, dtype=y.dtype)
        inputs = [moving_y, moving_t, *parameters]
        by_autograd, weighted = (
            torch.autograd.grad(value, inputs, cotangent, retain_graph=True, materialize_grads=True, allow_unused=True)
            for cotangent in (a, a * share)
        )
        with torch.no_grad():
            seen, tape = dynamics.linearize(t, y)
            dy, dt = dynamics.pull(tape, a, time=True)
            assert dynamics.pull(tape, a)[1] is None
        assert tape.nbytes >= 0 and dt is not None
        for found, wanted in ((seen, value.detach()), (dy, by_autograd[0]), (dt, by_autograd[1])):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        expected = [total + g for total, g in zip(expected, weighted[2:], strict=True)]
        plain = [total + g for total, g in zip(plain, by_autograd[2:], strict=True)]
        tapes.append(tape)
        t, y = t + 0.3, y + 0.1
    with torch.no_grad():
        sums = dynamics.accumulate(tapes, shares), dynamics.accumulate(tapes)
    for found, wanted in zip(sums, (expected, plain), strict=True):
        assert len(found) == len(parameters)
        for own, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)
