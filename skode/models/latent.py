"""The latent ODE: an encoder, dynamics, a decoder (Chen et al. 2018, section 5; Rubanova et al. 2019).

Symbols: B series, r reference times of each, R rows, each a latent state at a time of reference; Q places (row, time)
where states are asked for; d latent dimensions, c channels, k known inputs over time, s static ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skode.exceptions import SolverError
from skode.fields import LatentField
from skode.fields.latent import Inputs
from skode.fields.latent_steps import equal_steps, shares
from skode.models.encoders import EncoderConfig, make_encoder
from skode.models.layers import Perceptron
from skode.models.likelihoods import Likelihood
from skode.models.odenet import SolverOptions
from skode.models.series import CLOCK_INPUTS, HeldInputs, Series, groups, offsets_of
from skode.solver import solve
from skode.solver.tableaus import get_tableau
from skode.solver.unrolled import Weights

MOST_STEPS = 32  # of a row in training
RK4 = Weights.of(get_tableau("rk4"))


@dataclass(frozen=True)
class LatentConfig:
    """Everything that fixes a model's shape; plain values.

    ``families`` has one likelihood for each channel: "gaussian", "student_t", "bernoulli" or "poisson"; ``n_targets``
    numbers are read from each whole series. With a ``clock``, two times, encoders know where between them a reference
    time lies: for series whose times have a common meaning. With ``anchored`` the state has a dimension more for each
    channel, its level: before anything is learned the model says that all stays as it is. ``base_rate`` is the mean
    number of events in a unit of time (point processes).
    """

    families: tuple[str, ...]
    n_covariates: int = 0
    n_static: int = 0
    latent_dim: int = 8
    encoder: str = "kernel"
    encoder_layer_sizes: tuple[int, ...] = (128, 128)
    hidden_layer_sizes: tuple[int, ...] = (64, 64)
    decoder_layer_sizes: tuple[int, ...] = (64,)
    activation: str = "tanh"
    point_process: bool = False
    n_targets: int = 0
    clock: tuple[float, float] | None = None
    anchored: bool = True
    base_rate: float = 1.0


class Gaussian(NamedTuple):
    """Independent normals."""

    mean: Tensor
    log_std: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """Points of standard normal numbers, which may have leading axes."""
        return self.mean + self.log_std.exp() * eps

    def log_prob(self, z: Tensor) -> Tensor:
        """Summed over the last axis."""
        u = (z - self.mean) * (-self.log_std).exp()
        return (-0.5 * u.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from N(0, I), summed over the last axis."""
        return 0.5 * (self.mean.square() + (2 * self.log_std).exp() - 1 - 2 * self.log_std).sum(dim=-1)


class Rows(NamedTuple):
    """Latent states ``z`` (R, d) at times ``t`` (R,), and the series (R,) that each belongs to."""

    z: Tensor
    t: Tensor
    series: Tensor


class Path(NamedTuple):
    """States (Q, d), and for point processes the expected number of events (R,) in each row's window."""

    z: Tensor
    expected: Tensor | None


class LatentODE(nn.Module):
    """The modules, and the path between them.

    Parameters
    ----------
    config : LatentConfig
    generator : torch.Generator
        Draws all initial weights.
    """

    def __init__(self, config: LatentConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.n_levels = len(config.families) if config.anchored else 0
        self.n_dims = d = config.latent_dim + self.n_levels
        n_inputs = config.n_covariates + config.n_static + (0 if config.clock is None else CLOCK_INPUTS)
        n_read = max(1, len(config.families) + config.n_covariates)
        reads = EncoderConfig(n_read, config.n_static, d, config.encoder_layer_sizes, config.clock, self.n_levels)
        self.encoder = make_encoder(config.encoder, reads, generator)
        self.field = LatentField(
            d,
            config.hidden_layer_sizes,
            config.activation,
            n_inputs=n_inputs,
            intensity=config.point_process,
            base_rate=config.base_rate,
            generator=generator,
        )
        self.decoder: Perceptron | None = None
        if config.families:
            sizes = [d + config.n_static, *config.decoder_layer_sizes, len(config.families)]
            self.decoder = Perceptron(sizes, generator)
            if config.anchored:
                self._start_from_levels()
        self.likelihood = Likelihood(config.families)
        self.head: Perceptron | None = None
        if config.n_targets:
            self.head = Perceptron([3 * d + config.n_static, 64, config.n_targets], generator)
            with torch.no_grad():
                self.head.layers[-1].weight.zero_()  # type: ignore[operator]  # targets begin as their mean

    @torch.no_grad()
    def _start_from_levels(self) -> None:
        """Let the networks say nothing at first, so that levels stay."""
        assert self.decoder is not None
        n, encoder = self.n_levels, self.encoder.net
        assert isinstance(encoder, Perceptron)
        self.decoder.layers[-1].weight.zero_()  # type: ignore[operator]
        self.field.network.layers[-1].weight[:n].zero_()  # type: ignore[index]
        encoder.layers[-1].weight[:n].zero_()  # type: ignore[index]
        self.field.turn[:n].zero_()
        self.field.turn[:, :n].zero_()
        self.field.damping[:n] = -4.0

    # --- encoder, decoder ---

    def encode(self, series: Series, reference_times: Tensor) -> Gaussian:
        """q(z) at reference times (B, r) from all observations in ``series``: mean and log std (B, r, d)."""
        readable = replace(series, values=torch.where(series.mask, self.likelihood.as_input(series.values), 0.0))
        return Gaussian(*self.encoder.encode(readable, reference_times))

    def decode(self, z: Tensor, static: Tensor) -> Tensor:
        """What the likelihood takes, (..., c), at states (..., d) with the series' static inputs (..., s)."""
        if self.decoder is None:
            return z.new_zeros(*z.shape[:-1], 0)
        out: Tensor = self.decoder(torch.cat([z, static], dim=-1))
        return out + z[..., : self.n_levels] if self.n_levels else out

    def targets(self, series: Series) -> Tensor:
        """What is read from whole series, (B, n_targets): from the states' means at first, in the middle and at last.

        Raises
        ------
        ValueError
            If the model was made without targets.
        """
        if self.head is None:
            raise ValueError("this model was made with n_targets=0.")
        first, last = series.first, series.last
        mean = self.encode(series, torch.stack([first, 0.5 * (first + last), last], dim=1)).mean
        out: Tensor = self.head(torch.cat([mean.flatten(1), series.static], dim=1))
        return out

    # --- the path ---

    def path(
        self,
        rows: Rows,
        place: Tensor,
        t: Tensor,
        inputs: HeldInputs | None,
        *,
        steps_per_unit: float = 4.0,
        window: Tensor | None = None,
        gradient: str = "discrete",
    ) -> Path:
        """States at places, by few equal steps of each row forward and back, all rows and directions in one solve.

        Each row's time from its reference to the farthest place asked for is cut into the same number of RK4 steps;
        states inside of steps come from the cubic through both ends (Hermite). Gradients flow.

        Parameters
        ----------
        rows : Rows
        place : int64 tensor of shape (Q,)
            The row of each place.
        t : tensor of shape (Q,)
            Its time.
        inputs : HeldInputs, optional
            Known inputs; needed if the model has any.
        steps_per_unit : float, default=4
            Steps for a unit of time, at least 2 and at most 32 for the longest row.
        window : tensor of shape (R, 2), optional
            Times over which events are counted (point processes); the reference lies between them.
        gradient : {"discrete", "adjoint", "reversible"}, default="discrete"
            As of :func:`skode.solver.solve`.

        Returns
        -------
        Path

        Raises
        ------
        SolverError
            If a state leaves the finite numbers.
        """
        after = (t - rows.t[place]).to(rows.z.dtype)
        n = len(rows.z)
        if not n:
            return Path(rows.z[place], None if window is None else rows.z.new_zeros(0))
        back = after < 0
        ends = after.new_zeros(2 * n).scatter_reduce(0, place + n * back, after.abs(), "amax")
        if window is not None:
            reach = torch.cat([window[:, 1] - rows.t, rows.t - window[:, 0]]).to(ends)
            ends = torch.maximum(ends, reach)
        moves = ends > 0
        back = back | ((after == 0) & (moves[n:] & ~moves[:n])[place])
        moves[:n] |= ~moves[n:]  # every row has one side, so that its own state is found
        active = torch.nonzero(moves).view(-1)
        row = active % n
        durations = (ends[active] * torch.where(active < n, 1.0, -1.0)).unsqueeze(1)
        k = int(min(max(2, math.ceil(float(ends.max()) * steps_per_unit - 1e-6)), MOST_STEPS))
        stretch = rows.series[row], rows.t[row], durations.to(rows.t.dtype)
        start, counts = rows.z[row], window is not None
        if gradient == "discrete":
            at = None if inputs is None else inputs.at_shares(*stretch, shares(k, RK4))
            y, slopes, events = self._stepped(start, durations, k, at, counts=counts)
        else:
            known = None if inputs is None else inputs.along(*stretch)
            y, slopes, events = self._solved(start, durations, k, known, gradient, counts=counts)
        column = moves.cumsum(0) - 1
        side = place + n * back
        length = ends[side]
        z = _hermite(y, slopes, column[side], after.abs() / torch.where(length > 0, length, 1.0))
        if events is None:
            return Path(z, None)
        return Path(z, events.new_zeros(n).index_add(0, row, events))

    def _stepped(
        self, z: Tensor, durations: Tensor, k: int, known: Tensor | None, *, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (k + 1, n, d) at the ends of k steps, their changes in a step at those rates, numbers of events (n,).

        In one node of autograd: the solver's own exact gradients, in a fraction of the time, since batches are small.
        """
        h = durations / k
        states, changes = equal_steps(self.field, z, h, k, RK4, known, stages=counts)
        failed = torch.nonzero(~states[-1].detach().isfinite().all(dim=1)).view(-1)
        if len(failed):
            raise SolverError(f"the batch's solve left the finite numbers in {len(failed)} of {len(z)} rows.")
        if not counts:
            return states, changes, None
        return states[:: len(RK4.b)], changes, self._events(states[:-1], h, k, known)

    def _events(self, stages: Tensor, h: Tensor, k: int, known: Tensor | None) -> Tensor:
        """Their expected number (n,), by the steps' own weights from the states at all stages, (k s, n, d)."""
        inputs = None if known is None else known[:-1].flatten(0, 1)
        rates = self.field.rate(stages.flatten(0, 1), inputs).view(-1, len(h))
        return h.abs().squeeze(1) * (rates.new_tensor(RK4.b * k) @ rates)

    def _solved(
        self, z: Tensor, durations: Tensor, k: int, known: Inputs | None, gradient: str, *, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`_stepped`, by the solver: for gradients that need less memory."""
        solution = solve(
            self.field.dynamics(durations, known, intensity=counts),
            z,
            [i / k for i in range(k + 1)],
            method="rk4",
            step_size=1.0 / k,
            step_control="batch",
            gradient=gradient,
            n_quadratures=int(counts),
        )
        if not solution.success:
            raise SolverError(f"the batch's solve {next(iter(solution.failures().values())).partition(' ')[2]}")
        y, slopes = (x.transpose(0, 1) for x in (solution.y, self._slopes(solution.y, durations, known) / k))
        if not counts:
            return y, slopes, None
        assert solution.quadratures is not None
        return y, slopes, solution.quadratures[:, -1, 0] * durations.squeeze(1).sign()

    def _slopes(self, y: Tensor, durations: Tensor, known: Inputs | None) -> Tensor:
        """dz/du at the steps' ends, (n, k + 1, d), in one evaluation."""
        n, m, d = y.shape
        u = torch.linspace(0, 1, m, dtype=y.dtype, device=y.device).repeat(n, 1)
        every = durations.repeat_interleave(m, dim=0)
        inputs = None
        if known is not None:
            values = torch.stack([known(u[:, i : i + 1]) for i in range(m)], dim=1).flatten(0, 1)
            inputs = lambda _: values  # noqa: E731
        dynamics = self.field.dynamics(every, inputs)
        slopes: Tensor = dynamics(u.reshape(-1, 1), y.reshape(-1, d)).view(n, m, d)
        return slopes

    def exact_path(
        self, rows: Rows, place: Tensor, t: Tensor, inputs: HeldInputs | None, options: SolverOptions
    ) -> Path:
        """As :meth:`path`, error-controlled with every row's own steps.

        Rows go in groups of nearly as many places, so that padding wastes little.
        """
        z = rows.z.new_zeros(len(t), rows.z.shape[1])
        after = t.double() - rows.t.double()[place]
        for side in (after > 0, after < 0):
            own = torch.nonzero(side).view(-1)
            if len(own):
                z[own] = self._exact(rows, place[own], after[own], inputs, options)
        return Path(torch.where((after == 0).unsqueeze(1), rows.z[place], z), None)

    def _exact(
        self, rows: Rows, place: Tensor, after: Tensor, inputs: HeldInputs | None, options: SolverOptions
    ) -> Tensor:
        """States at places on one side of the references."""
        order = torch.argsort(after.abs(), stable=True)
        order = order[torch.argsort(place[order], stable=True)]
        counts = torch.bincount(place, minlength=len(rows.z))
        out = rows.z.new_zeros(len(place), rows.z.shape[1])
        for group in groups(offsets_of(counts)):
            asked = group.present.any(dim=1)
            if not bool(asked.any()):
                continue
            row, present = group.series[asked], group.present[asked]
            places = order[group.rows[asked]]
            times = torch.where(present, after[places], torch.nan)
            known = None
            if inputs is not None:
                ones = torch.ones(len(row), 1, dtype=torch.float64, device=after.device)
                known = inputs.along(rows.series[row], rows.t[row].double(), ones)
            solution = solve(
                self.field.dynamics(None, known),
                rows.z[row],
                torch.cat([torch.zeros_like(times[:, :1]), times], dim=1),
                method=options.method,
                rtol=options.rtol,
                atol=options.atol,
                step_size=options.step_size,
                max_num_steps=options.max_num_steps,
            )
            if not solution.success:
                bad = torch.nonzero(solution.status != 0).view(-1)
                raise SolverError(next(iter(solution.failures().values())), rows.series[row[bad]].unique().tolist())
            out[places[present]] = solution.y[:, 1:][present]
        return out


def _hermite(y: Tensor, slope: Tensor, row: Tensor, u: Tensor) -> Tensor:
    """States at shares u (Q,) of the way of rows (Q,), from ends of k equal steps (k + 1, n, d) and changes a step."""
    m, n, d = y.shape
    step = (u * (m - 1)).floor().clamp(max=m - 2)
    s = u * (m - 1) - step
    r = 1 - s
    weights = torch.stack([r * r * (1 + 2 * s), r * r * s, s * s * (1 + 2 * r), -s * s * r], dim=1)
    at = step.long() * n + row
    knots = torch.cat([y, slope], dim=2).view(m * n, 2 * d)
    around = knots[torch.stack([at, at + n], dim=1)].view(-1, 4, d)
    z: Tensor = (around * weights.unsqueeze(2)).sum(dim=1)
    return z
