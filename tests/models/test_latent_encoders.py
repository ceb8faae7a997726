"""Encoders: what they see, what they do not see, and that rows do not depend on their neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skode.models import EncoderConfig, Series, make_encoder
from skode.models.encoders import Encoder, KernelEncoder, Read
from tests.models.test_latent_series import panel

ENCODERS = ["kernel", "rnn", "ode_rnn", "attention"]


def encoder(name: str, n_channels: int = 2, n_static: int = 1, n_levels: int = 1) -> Encoder:
    config = EncoderConfig(n_channels, n_static, 3, (16,), n_levels=n_levels)
    return make_encoder(name, config, torch.Generator().manual_seed(0)).double()


def encoded(own: Encoder, series: Series, references: Tensor) -> Tensor:
    return torch.cat(own.encode(series, references), dim=2)


def references(series: Series) -> Tensor:
    return torch.stack([series.first - 0.1, 0.5 * (series.first + series.last), series.last], dim=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_series_do_not_depend_on_their_neighbours(name: str) -> None:
    own, series = encoder(name), panel([5, 0, 30, 1, 7, 7])
    together = encoded(own, series, references(series))
    assert together.shape == (6, 3, 6) and bool(torch.isfinite(together).all())
    for b in range(6):
        alone = series.take(torch.tensor([b]))
        torch.testing.assert_close(encoded(own, alone, references(alone))[0], together[b])


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_values_are_not_seen(name: str) -> None:
    own, series = encoder(name), panel([5, 9])
    loud = replace(series, values=torch.where(series.mask, series.values, 1e6))
    torch.testing.assert_close(encoded(own, loud, references(series)), encoded(own, series, references(series)))


@pytest.mark.parametrize("name", ENCODERS)
def test_observed_values_and_their_times_are_seen(name: str) -> None:
    own, series = encoder(name), panel([6])
    at = references(series)
    before = encoded(own, series, at)
    row = int(torch.nonzero(series.mask[:, 0])[0])
    values, times = series.values.clone(), series.times.clone()
    values[row, 0] += 1.0
    times[row] -= 1e-3
    for changed in (replace(series, values=values), replace(series, times=times)):
        assert float((encoded(own, changed, at) - before).abs().max().detach()) > 1e-6


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_without_an_observation_change_nothing(name: str) -> None:
    own, series = encoder(name), panel([6, 3])
    queries = Series.of(
        torch.tensor([0, 8, 12]),
        torch.cat([series.times[:6], torch.tensor([2.0, 3.0]), torch.tensor([-1.0]), series.times[6:]]),
        torch.cat([series.values[:6], torch.zeros(3, 2), series.values[6:]]),
        torch.cat([series.mask[:6], torch.zeros(3, 2, dtype=torch.bool), series.mask[6:]]),
        static=series.static,
    )
    at = references(series)
    torch.testing.assert_close(encoded(own, queries, at), encoded(own, series, at))


@pytest.mark.parametrize("name", ["kernel", "attention"])
def test_sets_have_no_order(name: str) -> None:
    own, series = encoder(name), panel([8])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    mixed = replace(series, times=series.times[order], values=series.values[order], mask=series.mask[order])
    at = references(series)
    torch.testing.assert_close(encoded(own, mixed, at), encoded(own, series, at))


@pytest.mark.parametrize("name", ENCODERS)
def test_only_the_distance_from_the_reference_counts(name: str) -> None:
    own, series = encoder(name), panel([6, 4])
    later = replace(series, times=series.times + 1000.0)
    torch.testing.assert_close(
        encoded(own, later, references(later)), encoded(own, series, references(series)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_event_times_alone_are_seen(name: str) -> None:
    own = encoder(name, 1, 0, 0)
    times = torch.linspace(0, 1, 9, dtype=torch.float64)
    dense = Series.of(torch.tensor([0, 9]), times, torch.zeros(9, 0, dtype=torch.float64))
    sparse = dense.where(torch.arange(9) % 4 == 0)
    at = torch.tensor([[0.5]], dtype=torch.float64)
    assert float((encoded(own, dense, at) - encoded(own, sparse, at)).abs().max().detach()) > 1e-3


def kernel_by_a_loop(own: KernelEncoder, read: Read, k: int, c: int) -> Tensor:
    """Mean, slope, offset and density of one kernel and channel for the first series and reference."""
    width, there = own.log_width[k].exp(), read.present[0] & (read.seen[0, :, c] > 0)
    dt, x = read.dt[0, 0][there], read.x[0, there, c]
    everything = -0.5 * ((read.dt[0, 0][read.present[0]] - own.offset[k]) / width).square()
    exponent, top = -0.5 * ((dt - own.offset[k]) / width).square(), everything.max()
    w = (exponent - top).exp()
    share = w / (w.sum() + 1e-6)
    mean, late = (share * x).sum(), (share * dt).sum()
    slope = ((share * x * dt).sum() - mean * late) / width
    offset = 3 * torch.tanh((late - own.offset[k]) / (3 * width))
    density = torch.logaddexp((w.sum() + 1e-6).log() + top, top.new_tensor(-8.0)) / 4
    return torch.stack([mean, slope, offset, density])


def test_kernels_see_weighted_means_slopes_offsets_and_densities() -> None:
    own = encoder("kernel")
    assert isinstance(own, KernelEncoder)
    generator = torch.Generator().manual_seed(4)
    present = torch.tensor([[True] * 5 + [False] * 2])
    seen = (torch.rand(1, 7, 2, generator=generator) < 0.7).double() * present.unsqueeze(2)
    x, dt = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((1, 7, 2), (1, 1, 7)))
    read = Read(x, seen, dt, present, torch.zeros(1, 1, 1))
    statistics = own.statistics(read).view(-1, 4, 2)
    for k in range(0, len(statistics), 3):
        for c in range(2):
            torch.testing.assert_close(statistics[k, :, c], kernel_by_a_loop(own, read, k, c))


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_finite_where_there_is_nothing_or_little_to_read(name: str) -> None:
    own, series = encoder(name), panel([0, 1, 2])
    loss = encoded(own, series, references(series) + 50.0).square().sum()
    gradients = torch.autograd.grad(loss, list(own.parameters()), allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="'kernel', 'rnn', 'ode_rnn', 'attention'"):
        encoder("transformer")


def test_the_clock_tells_where_the_reference_is() -> None:
    config = EncoderConfig(2, 1, 3, (16,), clock=(0.0, 1.0))
    own = make_encoder("kernel", config, torch.Generator().manual_seed(0)).double()
    series = panel([6])
    later = replace(series, times=series.times + 0.3)
    at = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
    moved = encoded(own, later, at + 0.3) - encoded(own, series, at)
    assert float(moved.abs().max().detach()) > 1e-3
    beyond = [encoded(own, replace(series, times=series.times + by), at + by) for by in (2.0, 3.0)]
    torch.testing.assert_close(*beyond)
