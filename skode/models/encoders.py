"""Encoders: from a series' observations to a Gaussian over its latent state at any reference time.

All read what they are given, masked observations never, in time linear in the observations. A padded group of series
has g series, n rows, r reference times; what is read has p channels: the observed ones and the known inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skode.models.kernel_statistics import FAR, kernel_statistics, local_sums
from skode.models.layers import Perceptron, drawn_linear
from skode.models.series import Series, groups
from skode.runtime import own_randomness

LOG_STD_RANGE = (-7.0, 2.0)


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder reads and gives: channels p, static inputs s, latent dimensions d.

    The first ``n_levels`` dimensions of the mean begin as the first channels' local levels.

    With a ``clock`` it reads the reference time, too, as its place between these two times; beyond them they count.
    """

    n_channels: int
    n_static: int
    latent_dim: int
    hidden_layer_sizes: tuple[int, ...] = (128, 128)
    clock: tuple[float, float] | None = None
    n_levels: int = 0

    @property
    def n_known(self) -> int:
        """Static inputs, and the clock's."""
        return self.n_static + (self.clock is not None)


class Read(NamedTuple):
    """A padded group: what is read (g, n, p), which of it is there (g, n, p), times after the references (g, r, n).

    ``present`` (g, n) tells rows from padding, ``static`` (g, r, s) is what is known besides.
    """

    x: Tensor
    seen: Tensor
    dt: Tensor
    present: Tensor
    static: Tensor

    def after(self) -> Tensor:
        """Times after the references, a reference a row (g r, n); padding is very far away."""
        return torch.where(self.present.unsqueeze(1), self.dt, FAR).flatten(0, 1)

    def at_references(self, x: Tensor) -> Tensor:
        """What is of a series (g, ...) at each of its references, (g r, ...)."""
        return x if self.dt.shape[1] == 1 else x.repeat_interleave(self.dt.shape[1], dim=0)


class Encoder(nn.Module, ABC):
    """Gives q(z(t_ref)), a Gaussian with independent components.

    Parameters
    ----------
    config : EncoderConfig
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.level = Level(config.n_levels) if config.n_levels else None

    @abstractmethod
    def features(self, read: Read) -> Tensor:
        """Mean and raw log standard deviation (g, r, 2 d) of a padded group."""

    def encode(self, series: Series, reference_times: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussians at reference times (B, r).

        Parameters
        ----------
        series : Series
            What may be read; a series without any observation gets what the encoder thinks of nothing.
        reference_times : tensor of shape (B, r)
            In the series' time.

        Returns
        -------
        mean, log_std : tensors of shape (B, r, d)
        """
        if series.mask.shape[1]:
            # Queries, and rows of known inputs alone, must not change what is thought of the observations.
            series = series.where(series.mask.any(dim=1))
        parts, order = [], []
        x, seen = _channels(series)
        for group in groups(series.offsets):
            t, refs = group.padded(series.times), reference_times[group.series]
            dt = (t.unsqueeze(1) - refs.unsqueeze(2)).to(x.dtype)
            dt = torch.where(group.present.unsqueeze(1), dt, 0.0)
            static = self._known(series.static[group.series], refs)
            read = Read(group.padded(x), group.padded(seen), dt, group.present, static)
            found = self.features(read)
            if self.level is not None:
                rest = found.shape[2] - self.config.n_levels
                found = found + nn.functional.pad(self.level(read), (0, rest))
            parts.append(found)
            order.append(group.series)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort()]
        mean, raw = out.chunk(2, dim=2)
        low, high = LOG_STD_RANGE
        return mean, low + (high - low) * torch.sigmoid(raw)

    def _known(self, static: Tensor, references: Tensor) -> Tensor:
        """Static inputs (g, s) at references (g, r), and where on the clock these are."""
        known = static.unsqueeze(1).expand(-1, references.shape[1], -1)
        if self.config.clock is None:
            return known
        low, high = self.config.clock
        place = ((references - low) / max(high - low, 1e-12)).clamp(0.0, 1.0).to(static.dtype)
        return torch.cat([known, 2 * place.unsqueeze(2) - 1], dim=2)


def _channels(series: Series) -> tuple[Tensor, Tensor]:
    """What is read, and its mask as numbers: observed values and known inputs, or the bare times if there are none."""
    x = torch.cat([series.values, series.covariates], dim=1)
    known = torch.ones_like(series.covariates)
    seen = torch.cat([series.mask.to(x.dtype), known], dim=1)
    if not x.shape[1]:
        x = seen = x.new_ones(len(x), 1)
    return x, seen


class Level(nn.Module):
    """Where channels are at a reference time: a mix of local means over a few widths, the mix learned for each channel.

    It is 0, the mean of all series, for a channel without observations. A state that begins with it is worth about as
    much as the last values before anything is learned.

    Parameters
    ----------
    n_channels : int
        The first ones of those that are read.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.log_width = nn.Parameter(torch.tensor([0.03, 0.1, 0.3, 1.0]).log())
        # The last one is nothing: levels are drawn to the mean of all series.
        self.mix = nn.Parameter(torch.tensor([-2.0, 0.0, 1.0, 1.0, -1.0]).unsqueeze(1).repeat(1, n_channels))

    def forward(self, read: Read) -> Tensor:
        """Of a padded group, (g, r, n_channels)."""
        c = self.n_channels
        seen = read.seen[..., :c]
        columns = torch.cat([seen, read.x[..., :c] * seen], dim=2)
        # The nearest observation of any channel has weight 1; tails of a power law see the others' nearest, too.
        sums = local_sums(read.after(), read.at_references(columns), self.log_width)
        count, total = sums.unflatten(0, read.dt.shape[:2]).chunk(2, dim=2)
        level: Tensor = (total / (count + 1e-12) * self.mix.softmax(dim=0)[:-1].mT).sum(dim=3)
        return level


class KernelEncoder(Encoder):
    """Gaussian windows in time around the reference, and a perceptron over what they see.

    Kernel k looks at the time ``t_ref + offset_k`` with width ``w_k``, both learned. Of each channel it gives, over the
    observations weighted by the kernel, the mean, the slope (covariance with the time, over ``w_k``), the mean
    distance of the observations from its centre, over ``w_k``, and the log of their number. The largest weight of each
    kernel is 1, so that a kernel far from all observations still sees the nearest ones.

    Parameters
    ----------
    config : EncoderConfig
    generator : torch.Generator
    n_kernels : int, default=32
    """

    def __init__(self, config: EncoderConfig, generator: torch.Generator, n_kernels: int = 32) -> None:
        super().__init__(config)
        side = torch.linspace(-1.0, 1.0, n_kernels)
        self.offset = nn.Parameter(side.sign() * side.abs() ** 1.5)  # denser where the state is asked for
        width = 0.04 + 0.12 * side.abs()
        width[::8] = 0.5  # some see nearly all
        self.log_width = nn.Parameter(width.log())
        n_in = 4 * n_kernels * config.n_channels + config.n_known
        self.net = Perceptron([n_in, *config.hidden_layer_sizes, 2 * config.latent_dim], generator)

    def features(self, read: Read) -> Tensor:
        statistics = self.statistics(read)
        out: Tensor = self.net(torch.cat([statistics, read.static], dim=2))
        return out

    def statistics(self, read: Read) -> Tensor:
        """What the kernels see, (g, r, 4 * n_kernels * p)."""
        x, seen = (read.at_references(part) for part in (read.x * read.seen, read.seen))
        found = kernel_statistics(read.after(), x, seen, self.offset, self.log_width)
        return found.view(*read.dt.shape[:2], -1)


class RecurrentEncoder(Encoder):
    """GRUs with time gaps towards the reference from both sides.

    One runs back in time from the last observation (as in Chen et al. 2018, section 5), one forward from the first;
    at a reference time the states after the nearest observation on either side, and how far away these are, give the
    Gaussian. One run serves all reference times.

    Parameters
    ----------
    config : EncoderConfig
    generator : torch.Generator
    n_units : int, default=64
    """

    def __init__(self, config: EncoderConfig, generator: torch.Generator, n_units: int = 64) -> None:
        super().__init__(config)
        self.n_units = n_units
        self.sides = self._make_sides(2 * config.n_channels, generator)
        n_head = 2 * n_units + 4 + config.n_known
        self.net = Perceptron([n_head, *config.hidden_layer_sizes, 2 * config.latent_dim], generator)

    def features(self, read: Read) -> Tensor:
        x, t = torch.cat([read.x * read.seen, read.seen], dim=2), read.dt[:, 0]
        turned = _turned(read.present)
        back = x.gather(1, turned.unsqueeze(2).expand(-1, -1, x.shape[2]))
        n = read.present.sum(dim=1, keepdim=True)
        n_before = ((read.dt <= 0) & read.present.unsqueeze(1)).sum(dim=2)  # (g, r)
        n_after = ((read.dt >= 0) & read.present.unsqueeze(1)).sum(dim=2)
        before = self._at(0, self._states(0, x, _gaps(t)), n_before, read.dt, n_before - 1)
        after = self._at(1, self._states(1, back, _gaps(t.gather(1, turned))), n_after, read.dt, n - n_after)
        out: Tensor = self.net(torch.cat([before, after, read.static], dim=2))
        return out

    def _at(self, side: int, states: Tensor, count: Tensor, dt: Tensor, row: Tensor) -> Tensor:
        """States after ``count`` (g, r) rows, the gap from the last of them, ``row``, and whether there is any."""
        states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        state = states.gather(1, count.unsqueeze(2).expand(-1, -1, states.shape[2]))
        there = (count > 0).to(dt.dtype).unsqueeze(2)
        gap = dt.gather(2, row.clamp(0, dt.shape[2] - 1).unsqueeze(2)).abs() * there
        return torch.cat([self._moved(side, state, gap), gap, there], dim=2)

    def _make_sides(self, n_in: int, generator: torch.Generator) -> nn.ModuleList:
        with own_randomness(generator):
            return nn.ModuleList(nn.GRU(n_in + 1, self.n_units, batch_first=True) for _ in range(2))

    def _states(self, side: int, x: Tensor, gap: Tensor) -> Tensor:
        """The states after each row, (g, n, n_units)."""
        states: Tensor = self.sides[side](torch.cat([x, gap], dim=2))[0]
        return states

    def _moved(self, side: int, h: Tensor, gap: Tensor) -> Tensor:
        """What becomes of a state over a gap without observations."""
        return h


def _gaps(t: Tensor) -> Tensor:
    """How long ago the row before was, (g, n, 1)."""
    return t.diff(dim=1, prepend=t[:, :1]).abs().unsqueeze(2)


def _turned(present: Tensor) -> Tensor:
    """Row numbers that turn each series around and leave its padding at the end."""
    n = present.shape[1]
    steps = torch.arange(n, device=present.device)
    lengths = present.sum(dim=1, keepdim=True)
    return torch.where(steps < lengths, lengths - 1 - steps, steps)


class ODERNNEncoder(RecurrentEncoder):
    """As :class:`RecurrentEncoder`, the states following an ODE between observations (Rubanova et al. 2019).

    Over a gap dh/dt = rate (tanh(W h0 + b) - h) with h0 the state at its start, solved in closed form: h goes towards
    its goal by 1 - exp(-gap rate), the rates being learned for each unit. A gap of any length is one evaluation, the
    state stays bounded, and the cost does not grow with the number of distinct times. At the reference time the state
    has gone the way from the nearest observation, too.

    Parameters
    ----------
    config : EncoderConfig
    generator : torch.Generator
    n_units : int, default=64
    """

    def __init__(self, config: EncoderConfig, generator: torch.Generator, n_units: int = 64) -> None:
        super().__init__(config, generator, n_units)
        self.goals = nn.ModuleList(drawn_linear(n_units, n_units, generator) for _ in range(2))
        self.log_rate = nn.Parameter(torch.linspace(-1.0, 3.0, n_units).repeat(2, 1))

    def _make_sides(self, n_in: int, generator: torch.Generator) -> nn.ModuleList:
        with own_randomness(generator):
            return nn.ModuleList(nn.GRUCell(n_in, self.n_units) for _ in range(2))

    def _states(self, side: int, x: Tensor, gap: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), self.n_units), []
        for i in range(x.shape[1]):
            h = self.sides[side](x[:, i], self._moved(side, h, gap[:, i]))
            states.append(h)
        return torch.stack(states, dim=1)

    def _moved(self, side: int, h: Tensor, gap: Tensor) -> Tensor:
        share = -torch.expm1(-gap * self.log_rate[side].exp())
        return torch.lerp(h, torch.tanh(self.goals[side](h)), share)


class AttentionEncoder(Encoder):
    """Learned queries that attend to the observations, each of which knows its distance from the reference time.

    A set encoder without any order (multihead pooling as of Lee et al. 2019, arXiv:1810.00825; time features as of
    Shukla and Marlin 2021, arXiv:2101.10318), its cost linear in the observations.

    Parameters
    ----------
    config : EncoderConfig
    generator : torch.Generator
    n_queries : int, default=8
    n_units : int, default=64
    n_heads : int, default=4
    """

    def __init__(
        self,
        config: EncoderConfig,
        generator: torch.Generator,
        n_queries: int = 8,
        n_units: int = 64,
        n_heads: int = 4,
    ) -> None:
        super().__init__(config)
        self.n_heads, self.n_queries = n_heads, n_queries
        frequencies = torch.linspace(0.0, 5.0, 16).exp2() * 0.5
        self.frequency = nn.Parameter(frequencies)
        self.tokens = Perceptron([2 * config.n_channels + 33, n_units, n_units], generator)
        self.queries = nn.Parameter(torch.randn(n_queries, n_units, generator=generator).to(torch.get_default_dtype()))
        self.keys = drawn_linear(n_units, n_units, generator)
        self.contents = drawn_linear(n_units, n_units, generator)
        n_in = n_queries * n_units + 1 + config.n_known
        self.net = Perceptron([n_in, *config.hidden_layer_sizes, 2 * config.latent_dim], generator)

    def features(self, read: Read) -> Tensor:
        g, r, _ = read.dt.shape
        phase = read.dt.unsqueeze(3) * self.frequency
        x = torch.cat([read.x * read.seen, read.seen], dim=2).unsqueeze(1).expand(-1, r, -1, -1)
        tokens = self.tokens(torch.cat([x, phase.sin(), phase.cos(), torch.asinh(read.dt).unsqueeze(3)], dim=3))
        tokens = nn.functional.silu(tokens).flatten(0, 1)
        keys, contents = (self._by_head(layer(tokens)) for layer in (self.keys, self.contents))
        queries = self._by_head(self.queries.expand(g * r, -1, -1))
        # Whoever sees nothing attends to all of nothing.
        there = read.present | ~read.present.any(dim=1, keepdim=True)
        bias = torch.where(there, 0.0, -torch.inf).to(keys.dtype).repeat_interleave(r, dim=0)[:, None, None]
        pooled = nn.functional.scaled_dot_product_attention(queries, keys, contents, attn_mask=bias)
        pooled = pooled.transpose(1, 2).reshape(g, r, -1) * read.present.any(dim=1)[:, None, None]
        count = torch.log1p(read.present.sum(dim=1).to(pooled.dtype))[:, None, None].expand(-1, r, -1)
        out: Tensor = self.net(torch.cat([pooled, count, read.static], dim=2))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], self.n_heads, -1).transpose(1, 2)


def make_encoder(name: str, config: EncoderConfig, generator: torch.Generator) -> Encoder:
    """The encoder of a name: "kernel", "rnn", "ode_rnn" or "attention".

    Raises
    ------
    ValueError
        If there is none.
    """
    if name == "kernel":
        return KernelEncoder(config, generator, n_kernels=max(8, min(32, 96 // config.n_channels)))
    kinds: dict[str, type[RecurrentEncoder] | type[AttentionEncoder]] = {
        "rnn": RecurrentEncoder,
        "ode_rnn": ODERNNEncoder,
        "attention": AttentionEncoder,
    }
    if name not in kinds:
        raise ValueError(f"encoder={name!r} is unknown; use one of 'kernel', {', '.join(map(repr, kinds))}.")
    return kinds[name](config, generator)
