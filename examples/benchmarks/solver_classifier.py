"""The solve inside ODENetClassifier's default train step, and torchdiffeq on the same stacked field.

Field, method, tolerances, penalty and batch are read from the estimator, so the table follows its defaults. torchdiffeq
gets the same work twice: ``midpoint`` with as many steps as skode took (no error control, no penalty), and
``adaptive_heun`` at the same tolerances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from solver_cases import Array
from torch import Tensor, nn

from skode import ODENetClassifier
from skode.fields import MLPField
from skode.solver import BatchControl, solve

N_FEATURES, N_CLASSES, N_ROWS = 20, 2, 128


class Draw(NamedTuple):
    """One batch: y0 and cotangent (members * rows, d), parameters, row weights, and the steps that skode takes."""

    y0: Array
    weights: list[Array]
    cotangent: Array
    shares: Tensor
    n_steps: int


class Setting(NamedTuple):
    """What the estimator uses by default."""

    config: Any
    solver: Any
    penalty: float
    n_dims: int


def default_setting() -> Setting:
    """The estimator's own choices, for 20 columns and two classes."""
    model = ODENetClassifier()
    config = model._config(N_FEATURES, N_CLASSES)
    n_dims = min(64, max(16, N_FEATURES + 8))
    return Setting(config, model._training_solver(), model._training_slack().weight, n_dims)


def make_field(setting: Setting, seed: int) -> MLPField:
    """The members' fields in one."""
    config = setting.config
    return MLPField(
        setting.n_dims,
        config.hidden_layer_sizes,
        config.activation,
        config.time_dependent,
        n_members=config.n_members,
        generator=torch.Generator().manual_seed(seed),
    )


class StackedNet(nn.Module):
    """The same field as plain torch operations: the members' matrices in one batched product a layer."""

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.weights = nn.ParameterList(p.detach().clone() for p in field.parameters())
        self.n_members, self.time_dependent = field.n_members or 1, field.time_dependent

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Value (members * rows, d) at a shared time."""
        x = y.view(self.n_members, -1, y.shape[1])
        n = len(self.weights) // 2
        for i in range(n):
            if self.time_dependent:
                x = torch.cat([x, t.to(x.dtype).expand(*x.shape[:2], 1)], dim=2)
            x = torch.baddbmm(self.weights[2 * i + 1].unsqueeze(1), x, self.weights[2 * i].mT)
            x = torch.tanh(x) if i < n - 1 else x
        return x.reshape(y.shape)


class Solver:
    """A contestant: ``solve_with(field, y0, draw)`` returns scalars or tensors to differentiate, with cotangents."""

    def __init__(self, name: str, field: nn.Module, solve_with: Any) -> None:
        self.name, self._field, self._solve = name, field, solve_with

    def load(self, inputs: Any) -> None:
        """Take a batch."""
        self._draw: Draw = inputs
        with torch.no_grad():
            for parameter, weight in zip(self._field.parameters(), inputs.weights, strict=True):
                parameter.copy_(torch.from_numpy(weight))
        self._y0 = torch.from_numpy(inputs.y0).requires_grad_()
        self._g = torch.from_numpy(inputs.cotangent)

    def step(self) -> object:
        """Solve and differentiate."""
        outputs, cotangents = self._solve(self._field, self._y0, self._draw, self._g)
        return torch.autograd.grad(outputs, (self._y0, *self._field.parameters()), cotangents)

    def outcome(self) -> Any:
        """Not compared."""
        raise NotImplementedError


def skode_solution(setting: Setting, field: nn.Module, y0: Tensor, shares: Tensor, first_step: float) -> Any:
    """The solve as the model's training pass makes it."""
    options = setting.solver
    return solve(
        field,
        y0,
        [0.0, setting.config.t1],
        method=options.method,
        rtol=options.rtol,
        atol=options.atol,
        gradient=options.gradient,
        step_control=BatchControl(shares),
        step_size=options.step_size,
        first_step=first_step,
        max_num_steps=options.max_num_steps,
        error_estimate=setting.penalty > 0,
    )


def draw_batches(setting: Setting, rounds: int) -> list[Draw]:
    """Fresh weights, as the estimator draws them, and states for every round."""
    draws = []
    n = N_ROWS * setting.config.n_members
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        y0 = rng.standard_normal((n, setting.n_dims)).astype(np.float32)
        field, shares = make_field(setting, seed), torch.ones(n)
        with torch.no_grad():
            solution = skode_solution(setting, field, torch.from_numpy(y0), shares, setting.config.t1)
        weights = [p.detach().numpy().copy() for p in field.parameters()]
        cotangent = rng.standard_normal(y0.shape).astype(np.float32)
        draws.append(Draw(y0, weights, cotangent, shares, int(solution.n_steps.max())))
    return draws


def classifier_contestants(rounds: int) -> tuple[list[Any], str, list[Any]]:
    """Contestants, a line that tells the setting, and the batches."""
    setting = default_setting()
    draws = draw_batches(setting, rounds)
    field = make_field(setting, 0)

    def by_skode(module: nn.Module, y0: Tensor, draw: Draw, g: Tensor) -> Any:
        solution = skode_solution(setting, module, y0, draw.shares, setting.config.t1)
        if solution.error_estimate is None:
            return [solution.y[:, -1]], [g]
        error = solution.error_estimate
        return [solution.y[:, -1], error], [g, torch.full_like(error, setting.penalty / N_ROWS)]

    found: list[Any] = [Solver("skode", field, by_skode)]
    found += torchdiffeq_contestants(setting, field)
    config, options = setting.config, setting.solver
    steps = np.mean([draw.n_steps for draw in draws])
    what = (
        f"{config.n_members} members of {N_ROWS} rows, D = {setting.n_dims}, hidden layers "
        f"{config.hidden_layer_sizes}, time_dependent={config.time_dependent}, {options.method} at "
        f"rtol={options.rtol:g}, atol={options.atol:g}, error penalty {setting.penalty:g}; {steps:.1f} steps a solve."
    )
    return found, what, draws


def torchdiffeq_contestants(setting: Setting, field: MLPField) -> list[Any]:
    """The same work by ``odeint_adjoint``."""
    try:
        from torchdiffeq import odeint_adjoint
    except ImportError as error:
        print(f"(torchdiffeq is left out: {error})")
        return []
    times = torch.tensor([0.0, setting.config.t1])

    def midpoint(module: nn.Module, y0: Tensor, draw: Draw, g: Tensor) -> Any:
        size = setting.config.t1 / max(draw.n_steps, 1)
        y = odeint_adjoint(module, y0, times, method="midpoint", options={"step_size": size})
        return [y[-1]], [g]

    def adaptive(module: nn.Module, y0: Tensor, draw: Draw, g: Tensor) -> Any:
        tolerances = {"rtol": setting.solver.rtol, "atol": setting.solver.atol}
        return [odeint_adjoint(module, y0, times, method="adaptive_heun", **tolerances)[-1]], [g]

    return [
        Solver("torchdiffeq odeint_adjoint, midpoint with the same steps", StackedNet(field), midpoint),
        Solver("torchdiffeq odeint_adjoint, adaptive_heun", StackedNet(field), adaptive),
    ]
