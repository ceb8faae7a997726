"""Second and higher derivatives of a solve: its backward, asked for a graph of its own.

The gradient itself comes from the solve's strategy, as without a graph. What differentiates it takes the accepted
steps again in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skode.solver import wrapped
from skode.solver.gradients import GradientStrategy, Run
from skode.solver.numerical_map import course
from skode.solver.parameters import hooks_aside
from skode.solver.plan import planned
from skode.solver.problem import Problem

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]


class Node(NamedTuple):
    """A solve that is to be differentiated, and whether its times are."""

    problem: Problem
    strategy: GradientStrategy
    run: Run
    time: bool

    def gradients(self, g: Tensor, g_error: Tensor) -> tuple[Tensor | None, ...]:
        """Of y0, the times and the parameters, by the strategy."""
        gradients = self.strategy.backward(self.problem, self.run, g.contiguous(), g_error, self.time)
        times, found = gradients.times, self.run.found
        if times is not None and found is not None:
            times = times.gather(1, found.columns)
        return gradients.y0, times, *gradients.parameters

    def map(self, y0: Tensor, times: Tensor) -> Tensors:
        """Outputs and errors in plain torch, with the steps that were accepted."""
        run, batch = self.run, self.problem.batch is not None
        plan = planned(run.knots.accepted(), run.times, run.stats.status, self.problem.landings)
        return self.strategy.map(self.problem, course(plan, run.times, batch and bool(len(y0))), y0, times)


def pulled(
    node: Node, g: Tensor, g_error: Tensor, y0: Tensor, times: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of y0, the times and the parameters; with a graph of their own in grad mode.

    Raises
    ------
    NotImplementedError
        If there is no second derivative.
    """
    batched = wrapped.any_batched(g, g_error)
    if not (batched or torch.is_grad_enabled()):
        return node.gradients(g, g_error)
    if node.run.found is not None:
        raise NotImplementedError(
            "a solve with events has no second derivatives (create_graph=True), nor batched ones."
        )
    if batched:
        return differentiated(node.map, (y0, times), node.problem.dynamics.trainable(), (g, g_error), (True, node.time))
    return Pull.apply(node, y0, times, g, g_error, *parameters)  # type: ignore[no-any-return, no-untyped-call]


class Pull(torch.autograd.Function):
    """The gradients of a solve as a node of their own."""

    @staticmethod
    def forward(
        ctx: Any, node: Node, y0: Tensor, times: Tensor, g: Tensor, g_error: Tensor, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.node = node
        ctx.save_for_backward(y0, times, g, g_error, *parameters)
        return node.gradients(g, g_error)

    @staticmethod
    def backward(ctx: Any, *h: Tensor | None) -> tuple[Tensor | None, ...]:
        own = ctx.saved_tensors[:4]
        parameters = ctx.node.problem.dynamics.trainable()
        gradient = partial(_gradient, ctx.node.map, parameters, 2)
        return None, *differentiated(gradient, own, parameters, h, ctx.needs_input_grad[1:5])


class Higher(torch.autograd.Function):
    """A function in plain torch as one node, cut off from what its inputs depend on."""

    @staticmethod
    def forward(ctx: Any, function: Function, parameters: Tensors, wanted: Sequence[bool], *own: Tensor) -> Tensors:
        n = len(own) - len(parameters)
        ctx.function, ctx.parameters, ctx.n = function, parameters, n
        ctx.save_for_backward(*own)
        with torch.enable_grad():
            found = function(*_leaves(own[:n], wanted))
        return tuple(x.detach() for x in found)

    @staticmethod
    def backward(ctx: Any, *h: Tensor | None) -> tuple[Tensor | None, ...]:
        own, wanted = ctx.saved_tensors[: ctx.n], ctx.needs_input_grad[3 : 3 + ctx.n]
        return None, None, None, *differentiated(ctx.function, own, ctx.parameters, h, wanted)


def differentiated(
    function: Function, own: Sequence[Tensor], parameters: Tensors, h: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Tensors:
    """Cotangents ``h`` of ``function(*own)`` pulled to its inputs and the parameters; with a graph in grad mode.

    The function's inputs are cut off from what they depend on: parameters may have been at work there too.
    """
    cotangents = [own[0].new_zeros(()) if x is None else x for x in h]
    if torch.is_grad_enabled():
        gradient = partial(_gradient, function, parameters, len(own))
        asked = (*wanted, *(x.requires_grad for x in cotangents))
        return Higher.apply(gradient, parameters, asked, *own, *cotangents, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    with torch.enable_grad():
        leaves = _leaves(own, wanted)
        values = function(*leaves)
        return _pull(values, (*leaves, *parameters), cotangents, graph=False)


def _gradient(function: Function, parameters: Tensors, n: int, *own: Tensor) -> Tensors:
    """What a function of ``n`` tensors gives to them and its parameters, as a function of them and its cotangents."""
    values = function(*own[:n])
    return _pull(values, (*own[:n], *parameters), own[n:], graph=True)


def _pull(values: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, graph: bool) -> Tensors:
    """Vector-Jacobian products; zeros where nothing depends."""
    pairs = [(value, a) for value, a in zip(values, cotangents, strict=True) if value.requires_grad]
    asked = [x for x in inputs if x.requires_grad]
    found: list[Tensor | None] = [None] * len(asked)
    if pairs and asked:
        ends, weights = zip(*pairs, strict=True)
        with hooks_aside(asked):
            found = list(torch.autograd.grad(ends, asked, weights, create_graph=graph, allow_unused=True))
    return tuple(torch.zeros_like(x) if (g := found.pop(0) if x.requires_grad else None) is None else g for x in inputs)


def _leaves(own: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_(want) for x, want in zip(own, wanted, strict=True)]
