"""``solve`` inside of function transforms, forward-mode differentiation and compilers.

Steps are decided on plain values first; then the accepted steps are taken in plain torch, which all of these can see
through. Derivatives are then those of ``gradient="discrete"``, whatever was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from skode.solver import wrapped
from skode.solver.arguments import check_state
from skode.solver.compiled import solve_compiled, why_not
from skode.solver.numerical_map import Course, course, numerical_map
from skode.solver.plan import planned
from skode.solver.problem import Problem
from skode.solver.quadrature import QuadratureDynamics, prepared
from skode.solver.solution import Solution, Status, Steps
from skode.solver.strategies import as_strategy
from skode.solver.tableaus import get_tableau

P = ParamSpec("P")
Rows = TypeVar("Rows", Solution, Course)
Solver = Callable[Concatenate[Any, Tensor, Any, P], Solution]

_UNSUPPORTED = ("events",)
_TIMES = ("jump_times", "step_times", "steps")


def transformable(solve: Solver[P]) -> Solver[P]:
    """``solve``, made to work inside of transforms and compilers."""
    apart: Callable[..., Solution] = torch.compiler.disable(solve, reason="this solve chooses its steps while it runs")

    @wraps(solve)
    def anywhere(field: Any, y0: Tensor, t: Any, *args: P.args, **options: P.kwargs) -> Solution:
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling() and why_not(t, options) is not None:
                return apart(field, y0, t, *args, **options)
            return solve_compiled(field, y0, t, options)
        if wrapped.active():
            return _Transformed(solve, field, y0, t, options).solution()
        return solve(field, y0, t, *args, **options)

    return anywhere  # type: ignore[return-value]


class _Transformed:
    """One solve inside of transforms.

    Where batches of ``vmap`` differ in what decides on steps, the rows of all of them are the rows of one solve.
    """

    def __init__(self, solve: Callable[..., Solution], field: Any, y0: Tensor, t: Any, options: dict[str, Any]) -> None:
        for name in _UNSUPPORTED:
            if options.get(name):
                raise NotImplementedError(f"solve(..., {name}=) does not work inside of torch.func's transforms.")
        if not as_strategy(options.get("gradient", "discrete")).interpolates:
            raise NotImplementedError(
                "gradient='reversible' does not work inside of torch.func's transforms; use gradient='discrete'."
            )
        check_state(y0)
        own = dict(options)
        args, self._q = own.pop("args", ()), own.get("n_quadratures", 0)
        self._solve, self._options, self._y0 = solve, own, y0
        with torch.no_grad():
            # Nobody has to look for parameters here.
            own["parameters"] = ()
            self._dynamics = prepared(field, y0.shape[1], args, (), self._q)
        self._inner = self._dynamics.inner if isinstance(self._dynamics, QuadratureDynamics) else self._dynamics
        self._times = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
        self._asks_field = get_tableau(own.get("method", "tsit5")).adaptive and own.get("steps") is None
        self._axes = wrapped.axes()
        self._sizes = [size for _, size in self._axes]
        self._folds = bool(self._axes) and self._differ()

    def _differ(self) -> bool:
        """Whether the batches of ``vmap`` differ in anything that decides on steps."""
        times = [self._times, *(x.t if isinstance(x, Steps) else x for x in map(self._options.get, _TIMES))]
        if any(isinstance(x, Tensor) and wrapped.is_batched(x) for x in times):
            return True
        if not self._asks_field:
            return False
        if wrapped.is_batched(self._y0):
            return True
        with torch.no_grad():
            t0 = self._times.detach()[..., :1].to(self._y0.dtype).expand(len(self._y0), 1)
            return wrapped.is_batched(self._inner(t0, self._y0.detach()))

    def solution(self) -> Solution:
        """The solve's outputs, within the transforms."""
        found, problem, fixed = self._decided()
        times = self._times.to(found.t.dtype)
        times = times.expand(len(self._y0), -1) if times.dim() == 1 else times
        d = self._y0.shape[1]
        y, error = numerical_map(problem, fixed, torch.nn.functional.pad(self._y0, (0, self._q)), times)
        found = replace(
            found,
            t=times.detach(),
            y=y[..., :d],
            quadratures=y[..., d:] if self._q else None,
            error_estimate=error if problem.keep_errors else None,
        )
        return found if self._asks_field else self._with_status(found, fixed)

    def _with_status(self, found: Solution, fixed: Course) -> Solution:
        """Steps that were not decided on the field's values say nothing about these: look at the outputs."""
        lost = ~torch.isfinite(found.y.detach())
        if fixed.missing is not None:
            lost = lost & ~fixed.missing.unsqueeze(2)
        values = wrapped.value(lost.flatten(1), with_axes=bool(self._axes))
        with wrapped.set_aside():
            row_lost = values.any(dim=1)
            status = wrapped.batched(row_lost.to(torch.int8) * int(Status.NON_FINITE), self._axes)
            return replace(found, status=status, success=not bool(row_lost.any()))

    # --- what is decided on values ---

    def _decided(self) -> tuple[Solution, Problem, Course]:
        """A solve of values: its solution as the caller sees its rows, and what it fixes of the map."""
        if self._folds and self._options.get("step_control", "row") != "row":
            raise NotImplementedError(
                "step_control='batch' does not work under torch.func.vmap: all batches would share their steps. Use "
                "step_control='row', or give all rows to one solve: they are its batch."
            )
        options = {name: self._of_rows(x) if name in _TIMES else x for name, x in self._options.items()}
        options.pop("gradient", None)
        t, asked = self._of_rows(self._times), self._asks_field
        y0 = wrapped.value(self._y0, with_axes=self._folds) if asked else self._y0
        with wrapped.set_aside() as transforms:
            if not asked:
                y0 = torch.zeros((self._n_rows, y0.shape[1]), dtype=y0.dtype, device=y0.device)
            found = self._solve(self._field(transforms), y0, t, **options)
            assert found._problem is not None
            problem = replace(found._problem, dynamics=self._dynamics)
            plan = planned(found.steps.t, found.t, found.status, problem.landings)
            equal = len(y0) and bool((plan.t == plan.t[:1]).all() & (found.t == found.t[:1]).all())
            fixed = course(plan, found.t, bool(equal))
            found = replace(found, _ragged=bool(torch.isnan(found.t).any()))
            if self._folds:
                found, fixed = replace(self._seen(found), _knots=None, _dense=None), self._seen(fixed)
        return found, problem, fixed

    def _field(self, transforms: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The field for values. Where it has no say in the steps it need not be asked."""
        if not self._asks_field:
            return lambda t, y: torch.nn.functional.pad(torch.zeros_like(y), (0, self._q))

        def field(t: Tensor, y: Tensor) -> Tensor:
            if self._folds:
                t, y = wrapped.batched(t, self._axes), wrapped.batched(y, self._axes)
            with wrapped.taken_up(transforms):
                return wrapped.value(self._inner(t, y), with_axes=self._folds)

        return field

    def _of_rows(self, x: Any) -> Any:
        """Values of times: shared ones, or one row for each row of the solve."""
        if isinstance(x, Steps):
            return Steps(self._of_rows(x.t), None if x.status is None else self._of_rows(x.status.unsqueeze(1))[:, 0])
        if not isinstance(x, Tensor):
            return x
        if not self._folds or not (wrapped.is_batched(x) or x.dim() > 1):
            return wrapped.value(x, with_axes=False)
        if x.dim() == 1:
            x = x.unsqueeze(0).expand(len(self._y0), -1)
        return wrapped.value(x, with_axes=True)

    @property
    def _n_rows(self) -> int:
        return len(self._y0) * (math.prod(self._sizes) if self._folds else 1)

    def _seen(self, found: Rows) -> Rows:
        """With all rows split into batches; what all of these share stays as it is."""
        n = self._n_rows
        changes: dict[str, Any] = {}
        for name in (own.name for own in fields(found)):
            x = getattr(found, name)
            if isinstance(x, Tensor) and x.dim() and len(x) == n:
                changes[name] = wrapped.batched(x, self._axes)
        return replace(found, **changes)
