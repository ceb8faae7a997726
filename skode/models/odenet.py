"""The ODE network: inputs -> initial state -> ODE block on [0, t1] -> linear head (Chen et al. 2018, section 3).

``n_members`` independent networks are one model: their states are the rows of one solve, member after member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError, SolverError
from skode.fields import ConvField, EnergyDynamics, MemberDynamics, MLPField, SecondOrderDynamics
from skode.fields.conv import draw_convolution
from skode.models.inputs import InputLayer
from skode.models.layers import MemberLinear
from skode.runtime import own_randomness
from skode.solver import BatchControl, Dynamics, Solution, solve
from skode.solver.dynamics import AutogradDynamics

FieldFactory = Callable[[int], nn.Module]

LARGEST_STATE_SIDE = 8  # images are halved by the stem until they are at most this wide


@dataclass(frozen=True)
class ODENetConfig:
    """Everything that fixes a network's shape; plain values, so that a fitted estimator pickles without torch."""

    n_features: int
    n_outputs: int
    n_members: int = 1
    n_encoded: int = 0
    n_units: int = 0
    hidden_layer_sizes: tuple[int, ...] = (32,)
    activation: str = "tanh"
    time_dependent: bool = True
    augment_dim: int | None = None
    order: int = 1
    t1: float = 1.0
    image_shape: tuple[int, int, int] | None = None
    field: FieldFactory | None = None


@dataclass(frozen=True)
class SolverOptions:
    """How the ODE block is solved."""

    method: str
    rtol: float
    atol: float
    step_size: float | None
    max_num_steps: int
    gradient: str = "discrete"


class Output(NamedTuple):
    """Of a training pass: values (n_members, n, n_outputs), per-row penalties (n_members, n), the solve's statistics.

    ``next_step`` is a good first step for the next batch.
    """

    values: Tensor
    error: Tensor
    energy: Tensor | None
    n_evals: float
    next_step: float


class ODENet(nn.Module):
    """``n_members`` ODE networks as one module.

    Parameters
    ----------
    config : ODENetConfig
    generator : torch.Generator
        Draws all initial weights, those of a user's field included.
    """

    def __init__(self, config: ODENetConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.inputs = InputLayer(config.n_features, config.n_units)
        self.start: nn.Module = _make_start(config, generator)
        self.n_dims: int = int(self.start.n_dims) * config.order  # type: ignore[arg-type]
        self.fields = nn.ModuleList(_make_fields(config, self.start, self.n_dims, generator))
        self.head = MemberLinear(config.n_members, self.n_dims, config.n_outputs, generator)

    # --- from inputs to outputs ---

    def initial_state(self, X: Tensor) -> Tensor:
        """States at t = 0, shape (n_members * n, n_dims): member after member."""
        state: Tensor = self.start(self.inputs, X)
        missing = self.n_dims - state.shape[-1]
        if missing:
            state = nn.functional.pad(state, (0, missing))
        return state.reshape(-1, self.n_dims)

    def read_out(self, state: Tensor) -> Tensor:
        """Outputs (n_members, n, n_outputs) from final states."""
        out: Tensor = self.head(state.view(self.config.n_members, -1, self.n_dims))
        return out

    def forward(
        self,
        X: Tensor,
        options: SolverOptions,
        *,
        first_step: float | None = None,
        control: BatchControl | None = None,
        error: bool = False,
        energy: bool = False,
    ) -> Output:
        """A pass at training speed: one step size for the whole batch.

        Parameters
        ----------
        X : tensor of shape (n, n_features) or (n_members, n, n_features)
            Rows for all members, or each member's own.
        options : SolverOptions
        first_step : float, optional
        control : BatchControl, optional
            What the n_members * n rows weigh in the error norm.
        error, energy : bool
            Whether the penalties are wanted.

        Returns
        -------
        Output

        Raises
        ------
        SolverError
            If the solve fails.
        """
        y0 = self.initial_state(X)
        dynamics = self.dynamics()
        if energy:
            dynamics = EnergyDynamics(dynamics)
        solution = self.solve(
            dynamics,
            y0,
            [0.0, self.config.t1],
            options,
            control or BatchControl(),
            first_step=first_step,
            error_estimate=error,
            n_quadratures=int(energy),
        )
        if not solution.success:
            raise SolverError(f"the batch's solve {next(iter(solution.failures().values())).partition(' ')[2]}")
        members = self.config.n_members
        y1 = solution.y[:, -1]
        estimate = y1.new_zeros(len(y1)) if solution.error_estimate is None else solution.error_estimate
        return Output(
            self.read_out(y1),
            estimate.view(members, -1),
            None if solution.quadratures is None else solution.quadratures[:, -1].reshape(members, -1),
            float(solution.n_evals[0]) * members,
            solution.next_step,
        )

    def solve_rows(self, X: Tensor, options: SolverOptions, times: Tensor | list[float] | None = None) -> Solution:
        """Solve with every row's own steps, from X to the states at ``times`` (the ends by default)."""
        times = [0.0, self.config.t1] if times is None else times
        return self.solve(self.dynamics(), self.initial_state(X), times, options, "row", first_step=self.config.t1)

    def solve(
        self,
        dynamics: Dynamics,
        y0: Tensor,
        times: Any,
        options: SolverOptions,
        control: str | BatchControl,
        *,
        first_step: float | None = None,
        error_estimate: bool = False,
        n_quadratures: int = 0,
    ) -> Solution:
        """One call of the solver with the model's options."""
        return solve(
            dynamics,
            y0,
            times,
            method=options.method,
            rtol=options.rtol,
            atol=options.atol,
            gradient=options.gradient,
            step_control=control,
            step_size=options.step_size,
            first_step=first_step,
            max_num_steps=options.max_num_steps,
            error_estimate=error_estimate,
            n_quadratures=n_quadratures,
        )

    def dynamics(self) -> Dynamics:
        """The ODE block's right-hand side for all members."""
        n_outputs = self.n_dims // self.config.order
        members = [f if isinstance(f, Dynamics) else AutogradDynamics(f, n_outputs=n_outputs) for f in self.fields]
        joined = members[0] if len(members) == 1 else MemberDynamics(members)
        return SecondOrderDynamics(joined) if self.config.order == 2 else joined

    # --- parameters by member ---

    def member_parameters(self, member: int) -> list[Tensor]:
        """Views of the parameters that belong to one member alone."""
        stacked = [*self.start.member_parameters(member), self.head.weight[member], self.head.bias[member]]  # type: ignore[operator]
        if len(self.fields) == self.config.n_members and self.config.n_members > 1:
            own: list[Tensor] = list(self.fields[member].parameters())
        elif isinstance(self.fields[0], MLPField):
            own = [parameter[member] for parameter in self.fields[0].parameters()]
        else:
            own = list(self.fields[0].parameters())
        return [parameter.detach() for parameter in (*stacked, *own)]

    def weights_and_biases(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that the L2 penalty acts on, and the others."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for name, parameter in self.named_parameters():
            (biases if name.rpartition(".")[2] == "bias" else weights).append(parameter)
        return weights, biases


# --- the initial state ----------------------------------------------------------------------------------------------


class Lift(nn.Module):
    """A linear lift of the standardised inputs; the last ``n_encoded`` members read the piecewise-linear encoding."""

    def __init__(self, config: ODENetConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.n_dims = min(64, max(16, config.n_features + 8))
        self.n_plain = config.n_members - config.n_encoded
        width = self.n_dims * config.order  # second order: positions and velocities are both learned
        self.plain = MemberLinear(self.n_plain, config.n_features, width, generator) if self.n_plain else None
        self.encoded = None
        if config.n_encoded:
            self.encoded = MemberLinear(config.n_encoded, config.n_units, width, generator)

    def forward(self, inputs: InputLayer, X: Tensor) -> Tensor:
        z = inputs.standardise(X)
        own, read = (z, z) if z.dim() == 2 else (z[: self.n_plain], z[self.n_plain :])
        parts = [] if self.plain is None else [self.plain(inputs.clip(own))]
        if self.encoded is not None:
            parts.append(self.encoded(inputs.encode(read)))
        # Members' rows are joined flat: exporters do not see that a stack of them is contiguous for any number of rows.
        return torch.cat([part.flatten(0, 1) for part in parts])

    def member_parameters(self, member: int) -> list[Tensor]:
        layer, index = (self.plain, member) if member < self.n_plain else (self.encoded, member - self.n_plain)
        assert layer is not None
        return [layer.weight[index], layer.bias[index]]


class Augment(nn.Module):
    """The standardised inputs with zeros appended (Dupont et al. 2019, arXiv:1904.01681)."""

    def __init__(self, config: ODENetConfig) -> None:
        super().__init__()
        self.n_zeros = _n_zeros(config)
        self.n_dims = config.n_features + self.n_zeros
        self.n_members = config.n_members

    def forward(self, inputs: InputLayer, X: Tensor) -> Tensor:
        z = nn.functional.pad(inputs.clip(inputs.standardise(X)), (0, self.n_zeros))
        return z if z.dim() == 3 else z.repeat(self.n_members, 1)

    def member_parameters(self, member: int) -> list[Tensor]:
        return []


class Stem(nn.Module):
    """Convolutions that bring an image to the state's channels and size, one stack a member."""

    def __init__(self, config: ODENetConfig, generator: torch.Generator) -> None:
        super().__init__()
        assert config.image_shape is not None
        channels, height, width = config.image_shape
        n_out = config.hidden_layer_sizes[0]
        strides = [1]
        while max(height, width) > LARGEST_STATE_SIDE:
            height, width = (height + 1) // 2, (width + 1) // 2
            strides = [2] if strides == [1] else [*strides, 2]
        self.image_shape, self.state_shape = config.image_shape, (n_out, height, width)
        self.n_dims = n_out * height * width
        self.stacks = nn.ModuleList(
            nn.Sequential(*_stem_layers(channels, n_out, strides, generator)) for _ in range(config.n_members)
        )

    def forward(self, inputs: InputLayer, X: Tensor) -> Tensor:
        z = inputs.clip(inputs.standardise(X))
        images = z.expand(len(self.stacks), *z.shape[-2:]).unflatten(-1, self.image_shape)
        return torch.cat([stack(own).flatten(1) for stack, own in zip(self.stacks, images, strict=True)])

    def member_parameters(self, member: int) -> list[Tensor]:
        return list(self.stacks[member].parameters())


def _stem_layers(channels: int, n_out: int, strides: Sequence[int], generator: torch.Generator) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stride in strides:
        if layers:
            layers.append(nn.Tanh())
        layer = nn.utils.skip_init(nn.Conv2d, channels, n_out, 3, stride=stride, padding=1)
        draw_convolution(layer, generator)
        layers.append(layer)
        channels = n_out
    return layers


def _n_zeros(config: ODENetConfig) -> int:
    assert config.augment_dim is not None
    if config.image_shape is None:
        return config.augment_dim
    return config.augment_dim * config.image_shape[1] * config.image_shape[2]  # whole channels


def _make_start(config: ODENetConfig, generator: torch.Generator) -> nn.Module:
    if config.augment_dim is not None:
        return Augment(config)
    return Lift(config, generator) if config.image_shape is None else Stem(config, generator)


# --- the dynamics ---------------------------------------------------------------------------------------------------


def _make_fields(config: ODENetConfig, start: nn.Module, n_dims: int, generator: torch.Generator) -> list[nn.Module]:
    if config.field is not None:
        return [users_field(config.field, int(start.n_dims), generator) for _ in range(config.n_members)]  # type: ignore[arg-type]
    if config.image_shape is not None:
        return [_conv_field(config, start, generator) for _ in range(config.n_members)]
    return [
        MLPField(
            n_dims,
            config.hidden_layer_sizes,
            config.activation,
            config.time_dependent,
            n_outputs=n_dims // config.order,
            n_members=config.n_members,
            generator=generator,
        )
    ]


def _conv_field(config: ODENetConfig, start: nn.Module, generator: torch.Generator) -> nn.Module:
    shape: tuple[int, int, int]
    if isinstance(start, Stem):
        shape = start.state_shape
    else:
        assert config.image_shape is not None and config.augment_dim is not None
        channels, height, width = config.image_shape
        shape = (channels + config.augment_dim, height, width)
    return ConvField(
        (shape[0] * config.order, *shape[1:]),
        config.hidden_layer_sizes,
        config.activation,
        config.time_dependent,
        n_outputs=shape[0],
        generator=generator,
    )


def users_field(factory: FieldFactory, n_dims: int, generator: torch.Generator) -> nn.Module:
    """The module that a user's ``field`` makes, its initial weights drawn from ``generator``."""
    with own_randomness(generator):
        module = factory(n_dims)
    if not isinstance(module, nn.Module):
        raise FieldError(
            f"field={factory!r} returned {type(module).__name__} for n_dims={n_dims}; it must return a torch.nn.Module "
            "that maps (t, y) to dy/dt."
        )
    return module
