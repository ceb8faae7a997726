"""Train steps and forward solves of one case by skode, torchdiffeq, torchode and diffrax, behind one face.

A contestant takes a repetition's arrays (``load``, not timed) and makes a step (``step``, timed): the outputs after
the first, and the vector-Jacobian product of their cotangent with y0 and all weights. Libraries that are not installed
are named and left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from solver_cases import Array, Case, Inputs, Net, mlp_field, set_weights
from torch import Tensor, nn

from skode.solver import METHODS, Solution, solve

SolveTorch = Callable[[nn.Module, Tensor], Tensor]


class Outcome(NamedTuple):
    """Outputs after the first (m - 1, n, d); gradients of y0 and the weights; evaluations forward and backward."""

    y: Array
    gradients: list[Array]
    forward: float
    backward: float | None


class Contestant(Protocol):
    """One way to make a step."""

    name: str

    def load(self, inputs: Inputs) -> None:
        """Take a repetition's arrays."""
        ...

    def step(self) -> object:
        """What is timed."""
        ...

    def outcome(self) -> Outcome:
        """One more step, looked at closely."""
        ...


# --- torch ------------------------------------------------------------------------------------------------------


class TorchContestant:
    """A solve in torch, and autograd through it; ``train=False`` solves without gradients.

    Parameters
    ----------
    name : str
    field : nn.Module
    solve_with : callable
        ``solve_with(field, y0)`` returns the outputs after the first (m - 1, n, d).
    train : bool
    """

    def __init__(self, name: str, field: nn.Module, solve_with: SolveTorch, train: bool = True) -> None:
        self.name, self.field, self._solve, self._train = name, field, solve_with, train
        self._count = count_evaluations(field)

    def load(self, inputs: Inputs) -> None:
        """Take a repetition's arrays."""
        set_weights(self.field, inputs.weights)
        self._y0 = torch.from_numpy(inputs.y0).requires_grad_(self._train)
        self._g = torch.from_numpy(inputs.cotangent)

    def step(self) -> tuple[Tensor, ...]:
        """Solve and differentiate."""
        if not self._train:
            with torch.no_grad():
                return (self._solve(self.field, self._y0),)
        y = self._solve(self.field, self._y0)
        return (y, *torch.autograd.grad(y, (self._y0, *self.field.parameters()), self._g))

    def outcome(self) -> Outcome:
        """One more step, its evaluations counted by the field."""
        self._count.reset()
        with self._count:
            if not self._train:
                with torch.no_grad():
                    y = self._solve(self.field, self._y0)
                return Outcome(y.numpy(), [], self._count.rows / len(self._y0), 0.0)
            y = self._solve(self.field, self._y0)
            forward = self._count.rows / len(self._y0)
            gradients = torch.autograd.grad(y, (self._y0, *self.field.parameters()), self._g)
        total = self._count.rows / len(self._y0)
        return Outcome(y.detach().numpy(), [g.numpy() for g in gradients], forward, total - forward)


@dataclass
class count_evaluations:  # noqa: N801
    """Counts the rows that a field is evaluated at while it is entered, whichever of its faces is called.

    skode's network is evaluated by a kernel that it makes for each solve: that is counted, too.
    """

    field: nn.Module
    faces: tuple[str, ...] = ("forward", "linearize")
    rows: float = 0.0

    def reset(self) -> None:
        """Start at zero."""
        self.rows = 0.0

    def __enter__(self) -> None:
        for face in self.faces:
            method = getattr(self.field, face, None)
            if method is not None:
                object.__setattr__(self.field, face, self._counted(method))
        kernel = getattr(self.field, "kernel", None)
        if kernel is not None:
            object.__setattr__(self.field, "kernel", self._counting_kernel(kernel))

    def __exit__(self, *error: object) -> None:
        for face in (*self.faces, "kernel"):
            self.field.__dict__.pop(face, None)

    def _counting_kernel(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(of: Any, face: str, n: int) -> None:
            method = getattr(of, face)

            def counting(*args: Any, **options: Any) -> Any:
                self.rows += n
                return method(*args, **options)

            setattr(of, face, counting)

        def made(y0: Tensor, **options: Any) -> Any:
            kernel = make(y0, **options)
            way_back = kernel.way_back

            def counting_way_back(n_stages: int) -> Any:
                way = way_back(n_stages)
                counted(way, "pull", len(y0))
                return way

            if "forward" in self.faces:
                counted(kernel, "evaluate", len(y0))
            if "pull" in self.faces:
                kernel.way_back = counting_way_back
            return kernel

        return made

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(t: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
            self.rows += len(y)
            return method(t, y, *args, **options)

        return counted


def skode_solver(case: Case, method: str, control: Any, gradient: str = "discrete", **options: Any) -> SolveTorch:
    """``solve`` as a function of field and state."""

    def solve_with(field: nn.Module, y0: Tensor) -> Tensor:
        solution = skode_solution(case, field, y0, method, control, gradient, **options)
        return solution.y[:, 1:].transpose(0, 1)

    return solve_with


def skode_solution(
    case: Case, field: nn.Module, y0: Tensor, method: str, control: Any, gradient: str = "discrete", **options: Any
) -> Solution:
    """One call of skode."""
    return solve(
        field,
        y0,
        list(case.times),
        method=method,
        rtol=case.rtol,
        atol=case.atol,
        gradient=gradient,
        step_control=control,
        **options,
    )


SKODE_METHODS = ("tsit5", "dopri5")


def skode_contestants(case: Case, train: bool = True, every: bool = True) -> Iterator[Contestant]:
    """skode's own field, by both controls; ``every`` adds the adjoint equation."""
    for method in SKODE_METHODS:
        for control in ("batch", "row"):
            yield TorchContestant(
                f"skode {method}, {control}", mlp_field(case), skode_solver(case, method, control), train
            )
    if train and every:
        for control in ("batch", "row"):
            name = f"skode {SKODE_METHODS[-1]}, {control}, adjoint"
            yield TorchContestant(name, mlp_field(case), skode_solver(case, SKODE_METHODS[-1], control, "adjoint"))


def skode_with_users_module(case: Case) -> Iterator[Contestant]:
    """skode with a plain ``nn.Module``, differentiated by autograd."""
    for method in SKODE_METHODS:
        for control in ("batch", "row"):
            name = f"user's module, {method}, {control}"
            yield TorchContestant(name, Net(case), skode_solver(case, method, control))


def torchdiffeq_contestants(case: Case, train: bool = True, every: bool = True) -> Iterator[Contestant]:
    """``odeint_adjoint`` (the reference) first, then its seminorm and ``odeint``."""
    import torchdiffeq

    times = torch.tensor(case.times)
    tolerances = {"rtol": case.rtol, "atol": case.atol, "method": "dopri5"}

    def direct(field: nn.Module, y0: Tensor) -> Tensor:
        return torchdiffeq.odeint(field, y0, times, **tolerances)[1:]

    def adjoint(field: nn.Module, y0: Tensor, **options: Any) -> Tensor:
        return torchdiffeq.odeint_adjoint(field, y0, times, **tolerances, **options)[1:]

    def seminorm(field: nn.Module, y0: Tensor) -> Tensor:
        return adjoint(field, y0, adjoint_options={"norm": "seminorm"})

    if train:
        yield TorchContestant("torchdiffeq odeint_adjoint", Net(case), adjoint)
    if train and every:
        yield TorchContestant("torchdiffeq odeint_adjoint, seminorm", Net(case), seminorm)
    yield TorchContestant("torchdiffeq odeint", Net(case), direct, train)


def torchode_contestants(case: Case, train: bool = True, every: bool = True) -> Iterator[Contestant]:
    """Own step for each row (AutoDiff), or one step for all (JointBacksolve, which has no interior outputs here)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchode

    def solver(field: nn.Module, joint: bool) -> Any:
        term = torchode.ODETerm(field)
        method = torchode.Tsit5(term=term)
        controller = torchode.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
        if joint:
            return torchode.JointBacksolveAdjoint(term, method, controller)
        return torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False)

    def contestant(name: str, joint: bool) -> Contestant:
        field = Net(case)
        own = solver(field, joint)
        times = torch.tensor(case.times)
        ends = {"t_start": times[:1].expand(case.batch), "t_end": times[-1:].expand(case.batch)}
        if len(times) > 2:
            ends["t_eval"] = times.expand(case.batch, -1)

        def solve_with(_: nn.Module, y0: Tensor) -> Tensor:
            ys = own.solve(torchode.InitialValueProblem(y0, **ends)).ys
            return ys[:, int(len(times) > 2) :].transpose(0, 1)

        return TorchContestant(name, field, solve_with, train)

    yield contestant("torchode AutoDiff", joint=False)
    if train and every:
        yield contestant("torchode JointBacksolve", joint=True)


# --- jax --------------------------------------------------------------------------------------------------------


class JaxContestant:
    """A jitted diffrax solve with its pull-back; compiled when it is first called."""

    def __init__(self, name: str, function: Callable[..., Any], train: bool, n_stages: int) -> None:
        self.name, self._function, self._train, self._n_stages = name, function, train, n_stages

    def load(self, inputs: Inputs) -> None:
        """Take a repetition's arrays."""
        import jax

        self._arguments = jax.block_until_ready(
            jax.device_put((inputs.y0, inputs.weights, *([inputs.cotangent] if self._train else [])))
        )

    def step(self) -> Any:
        """Solve and differentiate, and wait for it."""
        import jax

        return jax.block_until_ready(self._function(*self._arguments))

    def outcome(self) -> Outcome:
        """One more step; evaluations of the forward solve from diffrax's count of steps, backward unknown."""
        y, gradients, n_steps = self.step()
        flat = [np.asarray(g) for g in (gradients[0], *gradients[1])] if self._train else []
        return Outcome(np.asarray(y), flat, float(np.max(n_steps)) * self._n_stages + 2, None)


def diffrax_contestants(case: Case, train: bool = True, every: bool = True) -> Iterator[Contestant]:
    """One system of the whole batch (shared step) with every adjoint, and a vmapped solve (own steps)."""
    import diffrax as dfx
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    steps = 16 if case.gain <= 1 else 64  # more room costs time, less would not do

    def controller(**options: Any) -> Any:
        return dfx.PIDController(rtol=case.rtol, atol=case.atol, **options)

    def contestant(name: str, adjoint: Any, solver: Any = dfx.Tsit5, max_steps: int = steps, rows: bool = False) -> Any:
        function = _diffrax_step(case, solver(), controller(), adjoint, max_steps, rows, train)
        kind = "own steps (vmap)" if rows else "shared step"
        return JaxContestant(f"diffrax {solver.__name__}, {kind}, {name}", function, train, 6)

    checkpoints = dfx.RecursiveCheckpointAdjoint(checkpoints=steps)
    if not train:
        forward = dfx.ForwardMode() if hasattr(dfx, "ForwardMode") else checkpoints
        yield contestant("forward", forward)
        yield contestant("forward", forward, dfx.Dopri5)
        yield contestant("forward", forward, dfx.Dopri5, rows=True)
        return
    yield contestant(f"RecursiveCheckpoint({steps})", checkpoints, dfx.Dopri5)
    if not every:
        return
    seminorm = dfx.BacksolveAdjoint(stepsize_controller=controller(norm=dfx.adjoint_rms_seminorm))
    yield contestant(f"RecursiveCheckpoint({steps})", checkpoints)
    yield contestant("RecursiveCheckpoint", dfx.RecursiveCheckpointAdjoint(), max_steps=4096)
    yield contestant("Direct", dfx.DirectAdjoint())
    yield contestant("Backsolve", dfx.BacksolveAdjoint())
    yield contestant("Backsolve, seminorm", seminorm)
    yield contestant("Backsolve, seminorm", seminorm, dfx.Dopri5)
    yield contestant(f"RecursiveCheckpoint({steps})", checkpoints, dfx.Dopri5, rows=True)
    yield contestant("Direct", dfx.DirectAdjoint(), dfx.Dopri5, rows=True)
    if case.batch <= 64:  # it holds every row's parameter gradients: minutes a step beyond
        yield contestant("Backsolve, seminorm", seminorm, rows=True)


def _diffrax_step(
    case: Case, solver: Any, controller: Any, adjoint: Any, max_steps: int, rows: bool, train: bool
) -> Callable[..., Any]:
    import diffrax as dfx
    import jax
    import jax.numpy as jnp

    activation = {"tanh": jnp.tanh, "silu": jax.nn.silu}[case.activation]
    times = jnp.asarray(case.times, dtype=jnp.float32)
    outputs = dfx.SaveAt(t1=True) if len(case.times) == 2 else dfx.SaveAt(ts=times[1:])

    def field(t: Any, y: Any, weights: list[Any]) -> Any:
        n = len(weights) // 2
        for i in range(n):
            if case.time_dependent:
                y = jnp.concatenate([y, jnp.broadcast_to(t, (*y.shape[:-1], 1)).astype(y.dtype)], axis=-1)
            y = y @ weights[2 * i].T + weights[2 * i + 1]
            y = activation(y) if i < n - 1 else y
        return y

    def one(y0: Any, weights: list[Any]) -> Any:
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            solver,
            case.times[0],
            case.times[-1],
            None,
            y0,
            args=weights,
            saveat=outputs,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        return solution.ys, solution.stats["num_steps"]

    many = jax.vmap(one, (0, None), (1, 0)) if rows else one

    def step(y0: Any, weights: list[Any], g: Any) -> Any:
        y, pull, n_steps = jax.vjp(many, y0, weights, has_aux=True)
        return y, pull(g), n_steps

    def forward(y0: Any, weights: list[Any]) -> Any:
        y, n_steps = many(y0, weights)
        return y, None, n_steps

    return jax.jit(step if train else forward)


# --- all --------------------------------------------------------------------------------------------------------

LIBRARIES: dict[str, Callable[..., Iterator[Contestant]]] = {
    "torchdiffeq": torchdiffeq_contestants,
    "skode": skode_contestants,
    "torchode": torchode_contestants,
    "diffrax": diffrax_contestants,
}

missing: set[str] = set()  # libraries that were named as missing


def contestants(case: Case, libraries: list[str], train: bool = True, every: bool = True) -> list[Contestant]:
    """All contestants of the libraries that can be imported."""
    found: list[Contestant] = []
    for library in libraries:
        try:
            found += LIBRARIES[library](case, train, every)
        except ImportError as error:
            if library not in missing:
                print(f"({library} is left out: {error})")
                missing.add(library)
    return found


def reference(case: Case, inputs: Inputs) -> Outcome:
    """The same step in float64 at a tolerance of 1e-10: torchdiffeq's dopri8 if it is there, else skode."""
    field, times = Net(case).double(), torch.tensor(case.times, dtype=torch.float64)
    set_weights(field, inputs.weights)
    y0 = torch.from_numpy(inputs.y0).double().requires_grad_()
    try:
        from torchdiffeq import odeint_adjoint

        y = odeint_adjoint(field, y0, times, rtol=1e-10, atol=1e-11, method="dopri8")[1:]
    except ImportError:
        method = "dopri8" if "dopri8" in METHODS else "tsit5"
        y = solve(field, y0, times, method=method, rtol=1e-11, atol=1e-11, max_num_steps=10**5).y[:, 1:].transpose(0, 1)
    gradients = torch.autograd.grad(y, (y0, *field.parameters()), torch.from_numpy(inputs.cotangent).double())
    return Outcome(y.detach().numpy(), [g.numpy() for g in gradients], field.n_evals, None)


def state_error(own: Outcome, true: Outcome) -> float:
    """Relative, in the Euclidean norm of all outputs."""
    return float(np.linalg.norm(own.y - true.y) / np.linalg.norm(true.y))


def gradient_error(own: Outcome, true: Outcome) -> float:
    """The larger one of y0's and the weights' relative errors, each in the Euclidean norm."""

    def relative(ours: list[Array], theirs: list[Array]) -> float:
        difference = [np.linalg.norm(a - b) for a, b in zip(ours, theirs, strict=True)]
        return float(np.linalg.norm(difference) / np.linalg.norm([np.linalg.norm(b) for b in theirs]))

    return max(
        relative(own.gradients[:1], true.gradients[:1]),
        relative(own.gradients[1:], true.gradients[1:]),
    )
