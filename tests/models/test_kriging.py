"""Errors at the observations, interpolated: against dense Gaussian processes, series by series."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from skode.models import HeldInputs, LatentConfig, LatentODE, Series, SolverOptions
from skode.models.forecast import ForecastOptions, corrected, outlook
from skode.models.kriging import BLOCK, Kernel, Windows
from skode.models.series import offsets_of
from tests.models.test_latent_series import panel, piece

KERNEL = Kernel(0.3, 5.0)
OPTIONS = ForecastOptions(SolverOptions("tsit5", 1e-6, 1e-8, None, 10_000))


def errors_of(series: Series, seed: int = 3) -> Tensor:
    return torch.randn(len(series.times), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def found(series: Series, errors: Tensor, query: Tensor, t: Tensor, channel: int = 0) -> Tensor:
    windows = Windows(series, query, t, channel)
    return windows.correction(errors[windows.rows, channel], KERNEL)


def dense(times: np.ndarray, errors: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The posterior mean of a Gaussian process with noise."""
    covariance = np.exp(-np.abs(times[:, None] - times) / KERNEL.length)
    covariance[np.diag_indices(len(times))] += 1 / KERNEL.ratio
    mean: np.ndarray = np.exp(-np.abs(t[:, None] - times) / KERNEL.length) @ np.linalg.solve(covariance, errors)
    return mean


@pytest.mark.parametrize("channel", [0, 1])
def test_corrections_are_the_posterior_means_of_gaussian_processes(channel: int) -> None:
    series = panel([7, 1, 20, 3, 12])
    errors = errors_of(series)
    query = torch.arange(5).repeat_interleave(9)
    t = torch.linspace(-0.3, 1.6, 9, dtype=torch.float64).repeat(5)
    correction = found(series, errors, query, t, channel)
    for b in range(5):
        own = piece(series, b)
        seen = series.mask[own, channel]
        wanted = dense(series.times[own][seen].numpy(), errors[own, channel][seen].numpy(), t[query == b].numpy())
        np.testing.assert_allclose(correction[query == b], wanted, rtol=1e-10, atol=1e-12)


def test_ahead_of_a_long_series_its_last_rows_tell() -> None:
    series = panel([5 * BLOCK, 3])
    series = Series.of(series.offsets, series.times, torch.randn(len(series.times), 2, dtype=torch.float64))
    errors = errors_of(series)
    t = torch.tensor([1.1, 1.5], dtype=torch.float64)
    own = slice(4 * BLOCK, 5 * BLOCK)
    wanted = dense(series.times[own].numpy(), errors[own, 0].numpy(), t.numpy())
    np.testing.assert_allclose(found(series, errors, torch.zeros(2, dtype=torch.int64), t), wanted, rtol=1e-10)


def test_inside_of_a_long_series_the_rows_around_tell_nearly_as_much_as_all() -> None:
    n = 10 * BLOCK
    times = torch.linspace(0, 30, n, dtype=torch.float64)
    series = Series.of(torch.tensor([0, n]), times, torch.zeros(n, 2, dtype=torch.float64))
    errors = errors_of(series)
    t = torch.linspace(0, 29.9, 77, dtype=torch.float64)
    wanted = dense(times.numpy(), errors[:, 0].numpy(), t.numpy())
    np.testing.assert_allclose(found(series, errors, torch.zeros(77, dtype=torch.int64), t), wanted, atol=1e-4)


def test_corrections_do_not_depend_on_other_series_or_queries() -> None:
    series = panel([40, 70, 9])
    errors = errors_of(series)
    query, t = torch.tensor([0, 1, 1, 2]), torch.tensor([0.4, 0.5, 1.2, 0.1], dtype=torch.float64)
    together = found(series, errors, query, t)
    for i in range(4):
        alone = series.take(query[i : i + 1])
        own = errors[piece(series, int(query[i]))]
        torch.testing.assert_close(
            found(alone, own, torch.zeros(1, dtype=torch.int64), t[i : i + 1])[0], together[i], rtol=1e-12, atol=1e-13
        )


def test_a_rare_channel_is_looked_at_as_far_away_as_it_was_observed() -> None:
    series = panel([3 * BLOCK])
    mask = torch.zeros_like(series.mask)
    mask[:, 0], mask[1, 1] = True, True
    series = series.hidden(torch.ones_like(mask))
    series = Series.of(series.offsets, series.times, series.values, mask)
    t = torch.tensor([0.9, 1.2], dtype=torch.float64)
    wanted = (-(t - series.times[1]) / KERNEL.length).exp() / (1 + 1 / KERNEL.ratio)
    torch.testing.assert_close(found(series, torch.ones(len(mask), 2).double(), torch.zeros(2).long(), t, 1), wanted)


def test_portions_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    series = panel([40, 70, 9, 30])
    query, t = series.index, series.times + 0.003
    together = found(series, errors_of(series), query, t)
    monkeypatch.setattr("skode.models.kriging.PAIRS_AT_ONCE", 50)
    torch.testing.assert_close(found(series, errors_of(series), query, t), together, rtol=1e-12, atol=1e-13)


def test_no_query_gets_no_correction() -> None:
    series = panel([4, 2])
    assert found(series, errors_of(series), torch.zeros(0, dtype=torch.int64), torch.zeros(0)).shape == (0,)


def test_forecasts_are_corrected_in_the_channels_that_have_a_kernel() -> None:
    series = panel([6, 9])
    model = LatentODE(LatentConfig(("gaussian",) * 2, 0, 1, latent_dim=2), torch.Generator().manual_seed(0)).double()
    query, t = series.index, series.times + 0.01
    with torch.no_grad():
        inputs = HeldInputs(series)
        plain = outlook(model, series, query, t, inputs, OPTIONS)
        same = corrected(model, series, query, t, inputs, OPTIONS, ())
        moved = corrected(model, series, query, t, inputs, OPTIONS, (None, KERNEL))
        at_rows = outlook(model, series, query, series.times, inputs, OPTIONS)
    assert torch.equal(same.eta, plain.eta)
    torch.testing.assert_close(moved.eta[:, 0], plain.eta[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved.disagreement, plain.disagreement, rtol=1e-9, atol=1e-11)
    shift = found(series, series.values - at_rows.eta, query, t, channel=1)
    torch.testing.assert_close(moved.eta[:, 1], plain.eta[:, 1] + shift, rtol=1e-9, atol=1e-11)
    off = lambda eta: float((eta[:, 1] - series.values[:, 1])[series.mask[:, 1]].square().mean())  # noqa: E731
    assert off(moved.eta) < off(plain.eta)


def test_corrected_forecasts_have_the_gradient_of_their_times() -> None:
    series = panel([6, 9])
    model = LatentODE(LatentConfig(("gaussian",) * 2, 0, 1, latent_dim=2), torch.Generator().manual_seed(0)).double()
    query, inputs = torch.tensor([0, 1, 1]), HeldInputs(series)
    t = torch.stack([series.times[2], series.times[8], series.times[8] + 0.2])  # two of them at observations
    slopes = []
    for kernels in ((), (None, KERNEL)):
        own = t.clone().requires_grad_()
        eta = corrected(model, series, query, own, inputs, OPTIONS, kernels).eta[:, 0]
        slopes.append(torch.autograd.grad(eta.sum(), own)[0])
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-8)
    assert float(slopes[0].abs().min()) > 0


def test_series_without_observations_are_not_corrected() -> None:
    nothing = torch.full((3, 2), torch.nan, dtype=torch.float64)
    series = Series.of(offsets_of(torch.tensor([3])), torch.arange(3, dtype=torch.float64), nothing)
    t = torch.tensor([0.5, 4.0], dtype=torch.float64)
    assert torch.equal(found(series, errors_of(series), torch.zeros(2, dtype=torch.int64), t), torch.zeros(2).double())
