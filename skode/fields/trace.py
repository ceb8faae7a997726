"""Velocity and divergence of any field, for flows: in closed form where the field knows it, else by autograd.

Symbols: v velocity ``(n, d)``, J its Jacobian with the state, ``s`` a probe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields.flow_field import FlowField
from skode.fields.integrands import Integrands, as_probe, check_rows
from skode.fields.planar import PlanarField
from skode.solver.dynamics import AutogradDynamics, Dynamics, as_dynamics
from skode.solver.wrapped import active

Pull = Callable[[Tensor], Tensor]
DIVERGENCES = ("auto", "exact", "hutchinson")


class TracedDynamics(AutogradDynamics):
    """Any field's velocity and integrands, for ``solve(..., n_quadratures=q)``; derivatives by autograd.

    The field's own ``trace(t, y)`` gives the divergence, if it has one. Else it is Hutchinson's estimate ``s J s`` [1]_
    by one vector-Jacobian product with the probe, which stays the same for the whole solve, as the solver needs a
    smooth integrand [2]_; without a probe it is exact, by d products. The Jacobian's norm is ``abs(s J)^2 / d``, or
    exact, from the same products.

    Parameters
    ----------
    field : nn.Module or callable
        ``field(t, y)``, or ``field(t, y, context)`` with a context; its ``trace`` has the same arguments and returns
        ``(n,)`` or ``(n, 1)``.
    n_dims : int
    context : tensor of shape (n, k), optional
        Conditions of the rows of the batch, in their order.
    integrands : Integrands
    probe : tensor of shape (d,) or (n, d), optional
    own_trace : bool, default=True
        Whether the field's own trace may be used.

    References
    ----------
    .. [1] M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing
       splines", Communications in Statistics 18, 1989.
    .. [2] W. Grathwohl et al., "FFJORD", ICLR 2019, section 3.1. arXiv:1810.01367

    Examples
    --------
    >>> import torch
    >>> from skode.fields import traced
    >>> from skode.solver import solve
    >>> dynamics = traced(lambda t, y: -y, 2)  # divergence -2 everywhere
    >>> solution = solve(dynamics, torch.ones(1, 2), [0.0, 1.0], n_quadratures=1)
    >>> round(float(solution.quadratures[0, -1, 0]), 4)
    -2.0
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        n_dims: int,
        context: Tensor | None = None,
        *,
        integrands: Integrands,
        probe: Tensor | None = None,
        own_trace: bool = True,
    ) -> None:
        probe = as_probe(probe, n_dims)
        args = () if context is None else (context,)
        super().__init__(_Traced(field, integrands, probe, own_trace), n_outputs=n_dims + integrands.n, args=args)
        self.n_quadratures = integrands.n
        self.any_rows = context is None and (probe is None or len(probe) == 1)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        if self._depends_on.watching and not torch.is_grad_enabled():
            return self.linearize(t, y)[0]  # where the state that products are taken with is known
        return super().__call__(t, y)


class _Traced(nn.Module):
    """A function of time and state that gives the velocity and the integrands."""

    def __init__(
        self, field: Callable[..., Tensor], integrands: Integrands, probe: Tensor | None, own_trace: bool
    ) -> None:
        super().__init__()
        self._field, self._integrands, self._probe = field, integrands, probe
        self._own_trace = own_trace and knows_trace(field)
        self.__name__ = getattr(field, "__name__", type(field).__name__)

    def forward(self, t: Tensor, y: Tensor, *args: Any) -> Tensor:
        asked, trace, norm = self._integrands, None, None
        if asked.jacobian or (asked.trace and not self._own_trace):
            v, pull = self._with_products(t, y, args)
            trace, norm = self._products(pull, y)
        else:
            v = self._velocity(t, y, args)
        if asked.trace and self._own_trace:
            trace = self._column(self._field.trace(t, y, *args), y)  # type: ignore[attr-defined]
        return asked.beside(v, trace if asked.trace else None, norm if asked.jacobian else None)

    def _velocity(self, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        v = self._field(t, y, *args)
        self._check(v, y)
        return v

    def _with_products(self, t: Tensor, y: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Pull]:
        """The velocity, and what multiplies cotangents with its Jacobian."""
        if active():
            v, products, *_ = torch.func.vjp(lambda state: self._velocity(t, state, args), y)
            return v, lambda a: products(a)[0]
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            state = y if graph and y.requires_grad else y.detach().requires_grad_()
            v = self._velocity(t, state, args)
        return v if graph else v.detach(), lambda a: _pulled(v, state, a, graph)

    def _products(self, pull: Pull, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the products tell of trace and squared norm."""
        d = y.shape[1]
        if self._probe is not None:
            check_rows("probes", None if len(self._probe) == 1 else self._probe, y)
            probes = [self._probe.to(y).expand_as(y)]
        else:
            probes = [unit.expand_as(y) for unit in torch.eye(d, dtype=y.dtype, device=y.device)]
        trace, norm = y.new_zeros((len(y), 1)), y.new_zeros((len(y), 1))
        for probe in probes:
            row = pull(probe)
            trace = trace + (row * probe).sum(dim=1, keepdim=True)
            if self._integrands.jacobian:
                norm = norm + row.square().sum(dim=1, keepdim=True) / d
        return trace, norm

    def _check(self, v: Any, y: Tensor) -> None:
        if not isinstance(v, Tensor) or v.shape != y.shape or v.dtype != y.dtype:
            got = f"{tuple(v.shape)} in {v.dtype}" if isinstance(v, Tensor) else type(v).__name__
            raise FieldError(
                f"the field {self.__name__} must return the velocity of shape {tuple(y.shape)} in {y.dtype}; got {got}."
            )

    def _column(self, trace: Any, y: Tensor) -> Tensor:
        if not isinstance(trace, Tensor) or trace.shape not in ((len(y),), (len(y), 1)) or trace.dtype != y.dtype:
            got = f"{tuple(trace.shape)} in {trace.dtype}" if isinstance(trace, Tensor) else type(trace).__name__
            raise FieldError(
                f"{self.__name__}.trace must return shape ({len(y)},) or ({len(y)}, 1) in {y.dtype}; got {got}."
            )
        return trace.reshape(-1, 1)


def _pulled(v: Tensor, y: Tensor, a: Tensor, graph: bool) -> Tensor:
    """The product of a cotangent with the Jacobian, zero where the velocity does not depend on the state."""
    if not v.requires_grad:
        return torch.zeros_like(y)
    (product,) = torch.autograd.grad(v, y, a, create_graph=graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(y) if product is None else product


def knows_trace(field: Any) -> bool:
    """Whether a field has a ``trace`` that is about what calling it does: no hooks, no newer ``forward``."""
    if not callable(getattr(field, "trace", None)):
        return False
    is_module = isinstance(field, nn.Module)
    if is_module and (field._forward_hooks or field._forward_pre_hooks):
        return False
    for kind in type(field).__mro__:
        if "trace" in vars(kind):
            return True
        if ("forward" if is_module else "__call__") in vars(kind):
            return False
    return True


def traced(
    field: Any,
    n_dims: int,
    context: Tensor | None = None,
    *,
    divergence: str = "auto",
    probe: Tensor | None = None,
    trace: bool = True,
    energy: bool = False,
    jacobian: bool = False,
) -> Dynamics:
    """The dynamics of a flow: a field's velocity and integrands, for ``solve(..., n_quadratures=q)``.

    Parameters
    ----------
    field : FlowField, PlanarField, nn.Module or callable
        ``field(t, y)``, or ``field(t, y, context)`` with a context.
    n_dims : int
        Dimension of the state.
    context : tensor of shape (n, k), optional
        Conditions of the rows of the batch, in their order; such dynamics belong to that batch.
    divergence : {"auto", "exact", "hutchinson"}, default="auto"
        "exact": in closed form for the package's fields, by ``field.trace`` where a user's field has it, else by d
        vector-Jacobian products. "hutchinson": its estimate by the probe, one product. "auto": exact, but for a
        user's field without ``trace`` if a probe is given.
    probe : tensor of shape (d,) or (n, d), optional
        See :func:`draw_probe`. It estimates the Jacobian's norm too.
    trace, energy, jacobian : bool
        Which integrands there are, in that order: the divergence, abs(v)^2 / d, and the Jacobian's squared Frobenius
        norm over d.

    Returns
    -------
    Dynamics
        With ``n_quadratures``, the number of integrands, and ``any_rows``.

    Raises
    ------
    ValueError
        If ``divergence`` is unknown, or the probe is missing or has the wrong shape.
    FieldError
        If the context does not fit the field.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import traced
    >>> from skode.solver import solve
    >>> dynamics = traced(lambda t, y: -y, 3)
    >>> solve(dynamics, torch.ones(1, 3), [0.0, 1.0], n_quadratures=1, rtol=1e-6).quadratures[:, -1]
    tensor([[-3.0000]])
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; use one of {', '.join(map(repr, DIVERGENCES))}.")
    if divergence == "hutchinson" and probe is None:
        raise ValueError("divergence='hutchinson' needs a probe: draw_probe(n, d, generator=...).")
    integrands = Integrands(trace, energy, jacobian)
    closed = divergence != "hutchinson" and isinstance(field, FlowField | PlanarField) and as_dynamics(field) is field
    if closed and isinstance(field, FlowField):
        return field.dynamics(context, trace=trace, energy=energy, jacobian=jacobian, probe=probe)
    if closed and isinstance(field, PlanarField):
        if context is not None:
            raise FieldError("a PlanarField takes no context.")
        return field.dynamics(trace=trace, energy=energy, jacobian=jacobian, probe=probe)
    exact = divergence == "exact" and not knows_trace(field)
    return TracedDynamics(
        field,
        n_dims,
        context,
        integrands=integrands,
        probe=None if exact else probe,
        own_trace=divergence != "hutchinson",
    )
