"""torchdiffeq's method names, options and callbacks: what they mean here, and what is refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skode.solver.adjoint import AdjointGradient
from skode.solver.compat_form import name_of
from skode.solver.tableaus import Tableau, get_tableau

Options = Mapping[str, Any]

LIMITS = ("first_step", "min_step", "max_step")
STOPS = {"step_t": "step_times", "jump_t": "jump_times"}
_OWN_NAMES = {"rk4": "rk4_38", "heun2": "heun"}
_ABSENT = {
    **dict.fromkeys(("explicit_adams", "implicit_adams", "fixed_adams", "adams"), "a multistep method"),
    **dict.fromkeys(("implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "trbdf2"), "implicit, fixed-step"),
    **dict.fromkeys(("radauIIA3", "radauIIA5", "gl4", "gl6"), "implicit, fixed-step"),
    "scipy_solver": "SciPy's, without gradients",
}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
# The step controller's factors: torchdiffeq lets one change them.
_CONSTANTS = {"safety": 0.9, "ifactor": 10.0, "dfactor": 0.2}
_ADAPTIVE_OPTIONS = (*LIMITS, "max_num_steps", *STOPS, "norm", "dtype", *_CONSTANTS)
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm")


def number(value: Any) -> float:
    """A number, or a tensor with one entry, as a float."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def tableau(method: str | None) -> Tableau:
    """The method that torchdiffeq calls by that name, or skode does."""
    if method in _ABSENT:
        raise ValueError(
            f"method={method!r} ({_ABSENT[method]}) is not supported; use 'dopri5' or 'tsit5', "
            "which are fast at all tolerances down to 1e-10."
        )
    return get_tableau("dopri5" if method is None else _OWN_NAMES.get(method, method))


def refuse_callbacks(func: Any) -> None:
    """Refuse a field that expects to be told of its steps."""
    for name in (*_CALLBACKS, *(f"{callback}_adjoint" for callback in _CALLBACKS)):
        if hasattr(func, name):
            raise ValueError(
                f"{name_of(func)}.{name} would not be called: callbacks are not supported. Remove it; the steps "
                "taken are found in the Solution of skode.solver.solve."
            )


def checked_options(options: Options, adaptive: bool, method: str) -> Options:
    """The options that are set; those that would have no effect are refused."""
    own, other = (_ADAPTIVE_OPTIONS, _FIXED_OPTIONS) if adaptive else (_FIXED_OPTIONS, _ADAPTIVE_OPTIONS)
    for name in options:
        if name not in own:
            why = f"goes with {'fixed-step' if adaptive else 'adaptive'} methods" if name in other else "is unknown"
            raise ValueError(f"options[{name!r}] {why}; method={method!r} takes {', '.join(own)}.")
    options = {name: value for name, value in options.items() if value is not None}
    for name, constant in _CONSTANTS.items():
        if number(options.get(name, constant)) != constant:
            raise ValueError(
                f"options[{name!r}]={options[name]} is not supported: it is {constant} here. Leave it out, and set "
                "rtol, min_step or max_step instead."
            )
    if options.get("dtype", torch.float64) not in (torch.float32, torch.float64):
        raise ValueError(f"options['dtype']={options['dtype']} is not supported: times are float64. Leave it out.")
    if options.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(f"options['interp']={options['interp']!r} is unknown; use 'linear' or 'cubic'.")
    if "step_size" in options and "grid_constructor" in options:
        raise ValueError("options has both step_size and grid_constructor; give one of them.")
    return options


def check_adjoint_options(adjoint_options: Options, options: Options) -> None:
    """Refuse options of the solve going back that are not the forward's."""
    for name, value in adjoint_options.items():
        if name == "norm":
            if value != "seminorm":
                raise ValueError(
                    "adjoint_options['norm'] may be 'seminorm' only: the solve going back is judged by y and its "
                    "adjoint. Leave it out, or lower adjoint_rtol."
                )
        elif value is not options.get(name) and (isinstance(value, Tensor) or value != options.get(name)):
            raise ValueError(
                f"adjoint_options[{name!r}]={value} differs from options ({options.get(name)}): the solve going back "
                "takes the forward's options. Leave it out, or give it in options, too."
            )


def adjoint_gradient(
    method: str | None, adjoint_method: str | None, tolerances: dict[str, Any]
) -> str | AdjointGradient:
    """The strategy for torchdiffeq's ``adjoint_*`` arguments."""
    forward, back = tableau(method), tableau(adjoint_method or method)
    if forward.adaptive and not back.adaptive:
        raise ValueError(
            f"adjoint_method={adjoint_method!r} takes fixed steps, and {forward.name!r} leaves none to go back by; "
            "use an adaptive adjoint_method, or a fixed-step method for both."
        )
    given: dict[str, Any] = {name: number(value) for name, value in tolerances.items() if value is not None}
    if back is not forward:
        given["method"] = back.name
    return AdjointGradient(**given) if given else "adjoint"
