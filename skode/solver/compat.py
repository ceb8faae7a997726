"""``odeint`` and its kin: torchdiffeq's calls on top of :func:`skode.solver.solve`.

The whole state, of any shape or a tuple, is one system: one row ``(1, D)`` with one step size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from skode.solver.compat_form import Form, State
from skode.solver.compat_options import (
    Options,
    adjoint_gradient,
    check_adjoint_options,
    checked_options,
    refuse_callbacks,
    tableau,
)
from skode.solver.compat_system import (
    EventFunction,
    Func,
    System,
    adaptive,
    check_monotone,
    fixed,
    step_control,
    until_event,
)
from skode.solver.step import time_dtype_of


def odeint(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    gradient: Any = "discrete",
    options: Options | None = None,
    event_fn: EventFunction | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0, called as torchdiffeq's ``odeint`` is.

    Parameters
    ----------
    func : nn.Module or callable
        ``func(t, y)`` with a 0-d tensor t and y like ``y0`` returns dy/dt like ``y0``.
    y0 : tensor of any shape, or tuple of tensors
        Real or complex. Half-precision states are solved in float32; ``func`` sees them in their own dtype.
    t : tensor of shape (m,)
        Output times, ascending or descending, the first one y0's.
    rtol, atol : float, tensor that broadcasts to y0's shape, or for tuples a sequence with one such entry a part
        Tolerances of adaptive methods. A step is judged by the root mean square of the errors in units of the
        tolerance, for tuples by the largest of the parts' root mean squares.
    method : str, default="dopri5"
        Adaptive: "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun". Fixed steps: "euler", "midpoint",
        "heun2", "heun3", "rk4" (the 3/8 rule, as in torchdiffeq). Other names of :func:`solve` are understood, too.
    gradient : str or strategy, default="discrete"
        See :func:`solve`.
    options : mapping, optional
        Adaptive methods: ``first_step``, ``min_step``, ``max_step``, ``max_num_steps`` (times the number of output
        intervals), ``step_t``, ``jump_t``, ``norm`` (of a state in units of the tolerance), ``dtype`` (times are
        float64 where the device has it).
        Fixed steps: ``step_size`` or ``grid_constructor(func, y0, t)``, without which one step goes from each output
        time to the next; ``interp`` ("linear" or "cubic") between steps; ``perturb`` (the field jumps where steps end).
    event_fn : callable, optional
        ``event_fn(t, y)`` returns a tensor. The solve stops where the sign of any of its entries first changes, at
        ``t[0]`` if one is zero there. Then t has two entries, and the second tells no more than the direction.

    Returns
    -------
    tensor of shape ``(m, *y0.shape)``, or tuple of such
        With ``event_fn``: the event's time (0-d), and the states at ``t[0]`` and there, ``(2, *y0.shape)``; gradients
        flow through the event's time and state, as they do from torchdiffeq's ``odeint_event``.

    Raises
    ------
    ValueError
        If an argument is not understood, or is one of torchdiffeq's that is not supported.
    FieldError
        If ``func`` returns something unlike ``y0``.
    SolverError
        If the solve fails.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import odeint
    >>> odeint(lambda t, y: -y, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    tensor([[1.0000, 2.0000],
            [0.3679, 0.7358]])
    """
    return _integrate(func, y0, t, rtol, atol, method, options, event_fn, gradient=gradient)


def odeint_adjoint(
    func: Func,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Options | None = None,
    event_fn: EventFunction | None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Options | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """:func:`odeint` with gradients by the adjoint equation, called as torchdiffeq's ``odeint_adjoint`` is.

    Memory does not grow with the number of steps; gradients are as exact as the tolerance. :func:`odeint` has exact
    gradients, and mostly takes less time.

    Parameters
    ----------
    func, y0, t, rtol, atol, method, options, event_fn
        As for :func:`odeint`.
    adjoint_rtol, adjoint_atol : float, optional
        Tolerances of the solve going back; the forward's if not given.
    adjoint_method : str, optional
        Method of the solve going back; the forward's if not given.
    adjoint_options : mapping, optional
        The solve going back takes the forward's options, and other ones are refused. ``{"norm": "seminorm"}`` is how
        it always is here: the parameters' gradients are no part of the error norm.
    adjoint_params : iterable of tensors, optional
        Tensors that get gradients besides y0 and t; found by themselves if not given, for functions too.

    Returns
    -------
    tensor of shape ``(m, *y0.shape)``, or tuple of such
        As :func:`odeint`.

    Raises
    ------
    ValueError, FieldError, SolverError
        As :func:`odeint`.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import odeint_adjoint
    >>> class Field(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(2, 2)
    ...     def forward(self, t, y):
    ...         return torch.tanh(self.linear(y))
    >>> field = Field()
    >>> y = odeint_adjoint(field, torch.zeros(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4)
    >>> y[-1].sum().backward()
    >>> field.linear.weight.grad.shape
    torch.Size([2, 2])
    """
    if adjoint_method not in (None, method) and options and adjoint_options is None:
        raise ValueError(
            f"adjoint_method={adjoint_method!r} differs from method={method!r}, so that options={dict(options)} "
            "may not be meant for both; give adjoint_options, too."
        )
    check_adjoint_options(adjoint_options or {}, options or {})
    gradient = adjoint_gradient(method, adjoint_method, {"rtol": adjoint_rtol, "atol": adjoint_atol})
    chosen = {}
    if adjoint_params is None and isinstance(func, nn.Module):
        adjoint_params = tuple(func.parameters())  # as in torchdiffeq: no others
    if adjoint_params is not None:
        chosen["parameters"] = tuple(p for p in adjoint_params if p.requires_grad)
    return _integrate(func, y0, t, rtol, atol, method, options, event_fn, gradient=gradient, **chosen)


def odeint_event(
    func: Func,
    y0: State,
    t0: Tensor,
    *,
    event_fn: EventFunction,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solve from t0 until an event, called as torchdiffeq's ``odeint_event`` is.

    Parameters
    ----------
    func, y0, event_fn
        As for :func:`odeint`.
    t0 : tensor with one entry
        The time of y0.
    reverse_time : bool, default=False
        Go back in time.
    odeint_interface : callable, default=odeint
        :func:`odeint`, :func:`odeint_adjoint`, or a function that calls one of them.
    **kwargs
        Handed on to ``odeint_interface``.

    Returns
    -------
    event_t : tensor, 0-d
        The event's time; carries gradients.
    solution : tensor of shape ``(2, *y0.shape)``, or tuple of such
        The states at t0 and at the event.

    Raises
    ------
    ValueError, FieldError, SolverError
        As :func:`odeint`.

    Examples
    --------
    >>> import torch
    >>> from skode.solver import odeint_event
    >>> def fall(t, state):
    ...     height, speed = state
    ...     return speed, torch.full_like(speed, -9.81)
    >>> state = torch.tensor(10.0), torch.tensor(0.0)
    >>> event_t, (height, speed) = odeint_event(fall, state, torch.tensor(0.0), event_fn=lambda t, state: state[0])
    >>> print(f"{event_t:.4f} s, {speed[-1]:.3f} m/s")
    1.4278 s, -14.007 m/s
    """
    start = torch.as_tensor(t0).reshape(-1)
    if len(start) != 1:
        raise ValueError(f"t0 must have one entry; got shape {tuple(start.shape)}.")
    start = start if start.is_floating_point() else start.double()
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def _integrate(
    func: Func,
    y0: State,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Options | None,
    event_fn: EventFunction | None,
    **keywords: Any,
) -> Any:
    form, found = Form.of(y0), tableau(method)
    refuse_callbacks(func)
    given = checked_options(options or {}, found.adaptive, method or "dopri5")
    row = form.row(y0)
    times = _times(t, row.device)
    keywords |= {
        "method": found.name,
        "rtol": form.entries("rtol", rtol, row),
        "atol": form.entries("atol", atol, row),
        "step_control": step_control(form, given.get("norm")),
    }
    system = System(func, form, y0, row, found, given, keywords)
    if event_fn is not None:
        return until_event(system, times, event_fn)
    return form.state(adaptive(system, times) if found.adaptive else fixed(system, times))


def _times(t: Any, device: torch.device) -> Tensor:
    times = torch.as_tensor(t, device=device)
    times = times if times.is_floating_point() else times.to(time_dtype_of(device))
    if times.dim() != 1 or not len(times):
        raise ValueError(f"t must be 1-D with at least one time; got shape {tuple(times.shape)}.")
    check_monotone("t", times.tolist())
    return times
