"""Training of latent ODEs: windows, what is held out, learning a sine, forecasts that know how far they are off."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from skode.exceptions import DivergenceError
from skode.models import HeldInputs, LatentConfig, LatentODE, Rows, Series, SolverOptions
from skode.models.forecast import ForecastOptions, Missed, corrected, outlook
from skode.models.kriging import Windows
from skode.models.predictive import Calibration, Predictive
from skode.models.series import offsets_of
from skode.models.trajectories import Prior, fit_prior, log_bound, posterior_eta, prior_eta
from skode.training import LatentData, LatentHistory, LatentOptions, train_latent
from skode.training.calibration import (
    _Compared,
    _degrees,
    _held_out_outlook,
    _kernel,
    calibrate,
    choose_stride,
    distances,
)
from skode.training.latent import check_held_out
from skode.training.windows import Panel, draw_batch, held_out_tasks
from tests.models.test_latent_series import panel, piece

SOLVER = SolverOptions("tsit5", 1e-4, 1e-5, None, 10_000)
NOISE = 0.1


def sines(n: int, seed: int, stop: float = 1.0, each: int = 20) -> Series:
    """Waves of one frequency, any phase and amplitude, at times of their own."""
    generator = torch.Generator().manual_seed(seed)
    t = stop * torch.rand(n, each, generator=generator, dtype=torch.float64).sort(dim=1).values
    phase = 2 * math.pi * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    size = 0.5 + torch.rand(n, 1, generator=generator, dtype=torch.float64)
    values = size * torch.sin(6 * t + phase) + NOISE * torch.randn(n, each, generator=generator, dtype=torch.float64)
    return Series.of(torch.arange(n + 1) * each, t.reshape(-1), values.float().reshape(-1, 1))


@lru_cache(maxsize=1)
def fitted() -> tuple[LatentODE, LatentData, LatentHistory]:
    generator = torch.Generator().manual_seed(0)
    config = LatentConfig(("gaussian",), latent_dim=4, encoder_layer_sizes=(32,), hidden_layer_sizes=(16,))
    model = LatentODE(config, generator)
    data = LatentData.split(sines(150, 1), generator)
    history = train_latent(
        model, data, LatentOptions(n_updates=400, batch_size=40, learning_rate_init=1.5e-2), generator
    )
    return model, data, history


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_sine_is_learned_inside_and_ahead() -> None:
    model, _, history = fitted()
    series = sines(100, 2, stop=1.5, each=40)
    given = series.where(series.times < 1.0)
    with torch.no_grad():
        found = outlook(model, given, series.index, series.times, None, ForecastOptions(SOLVER, 0.5))
    error = (found.eta - series.values).square()
    ahead = series.times > 1.0
    assert float(error[~ahead].mean()) < (2.5 * NOISE) ** 2
    assert float(error[ahead].mean()) < (5 * NOISE) ** 2 < 0.5 * float(series.values[ahead].square().mean())
    assert history.losses[-1] < history.losses[0] and len(history.validation_scores) == 20
    assert NOISE * 0.8 < float(model.likelihood.scale[0].detach()) < 3 * NOISE


def test_calibrated_bands_cover_what_they_say() -> None:
    model, data, _ = fitted()
    options = ForecastOptions(SOLVER, choose_stride(model, data.held_out, ForecastOptions(SOLVER)))
    calibration = calibrate(model, held_out_tasks(sines(150, 5), torch.Generator().manual_seed(0), (0.3, 0.6)), options)
    series = sines(300, 3, stop=1.5, each=40)
    half = torch.rand(len(series.times), generator=torch.Generator().manual_seed(1)) < 0.5
    given, series = series.where((series.times < 1.0) & half), series.where((series.times >= 1.0) | ~half)
    found = corrected(model, given, series.index, series.times, None, options, calibration.kernels)
    ahead = series.times > given.last[series.index]
    spread = calibration.spread(found.disagreement, distances(given, series.index, series.times), ahead)
    degrees = calibration.degrees_of(ahead)
    own = Predictive(model.likelihood, found.eta, spread, calibration.noise, degrees)
    covered = (series.values >= own.quantile(0.1)) & (series.values <= own.quantile(0.9))
    assert 0.72 < float(covered[~ahead].double().mean()) < 0.92
    assert 0.65 < float(covered[ahead].double().mean()) < 0.92


@pytest.mark.parametrize(("degrees", "least", "most"), [(3.0, 2.8, 3.3), (6.0, 5.5, 6.5), (None, 30.0, np.inf)])
def test_degrees_of_freedom_are_those_of_many_errors(degrees: float | None, least: float, most: float) -> None:
    rng = np.random.default_rng(0)
    errors = rng.normal(size=20_000) if degrees is None else rng.standard_t(degrees, 20_000) * (1 - 2 / degrees) ** 0.5
    assert least < _degrees(torch.from_numpy(errors), 1.1) < most


def test_few_errors_hardly_move_the_guessed_degrees_of_freedom() -> None:
    few = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 4.5 < _degrees(few, 1.1) < 6.5
    assert _degrees(few[:0], 1.1) == pytest.approx(2 + np.exp(1.1), rel=0.05)


def test_errors_ahead_are_wider_by_the_root_of_how_few_values_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _ = fitted()
    tasks, options = data.held_out, ForecastOptions(SOLVER, 0.5)
    ahead = [_held_out_outlook(model, task, options, only_ahead=True)[2].mask.sum() for task in tasks]
    wider = calibrate(model, tasks, options)
    monkeypatch.setattr("skode.training.calibration.WIDER", (0.3, 0.0))
    plain = calibrate(model, tasks, options)
    assert wider.inside == plain.inside and wider.noise == plain.noise
    ratio = 1 + 1.2 / float(sum(ahead)) ** 0.5
    assert wider.ahead.factor / plain.ahead.factor == pytest.approx(ratio, rel=1e-9)
    assert wider.ahead.growth / plain.ahead.growth == pytest.approx(ratio, rel=1e-9)


def test_the_same_generator_gives_the_same_bits_and_the_global_one_stays() -> None:
    def trained() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        model = LatentODE(LatentConfig(("gaussian",), latent_dim=3, encoder="rnn"), generator)
        train_latent(model, LatentData.split(sines(12, 1), generator), LatentOptions(n_updates=4), generator)
        return [p.detach() for p in model.parameters()]

    before = torch.random.get_rng_state()
    first, second = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_by_the_node_moves_the_weights_as_training_by_the_solver_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = []
    for by_solver in (False, True):
        generator = torch.Generator().manual_seed(0)
        config = LatentConfig(("gaussian",), latent_dim=3, encoder_layer_sizes=(8,), hidden_layer_sizes=(7, 5))
        model = LatentODE(config, generator).double()
        if by_solver:
            monkeypatch.setattr(
                LatentODE, "_stepped", lambda own, *args, counts: own._solved(*args, "discrete", counts=counts)
            )
        data = LatentData.split(sines(30, 1).to(dtype=torch.float64), generator, validate=False)
        train_latent(model, data, LatentOptions(n_updates=4, batch_size=10, learning_rate_init=0.05), generator)
        weights.append([p.detach() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("turns", "expected"), [(0.0, 2.0), (8.0, 4.0), (30.0, 16.0)])
def test_steps_are_doubled_until_held_out_series_cannot_tell(turns: float, expected: float) -> None:
    generator = torch.Generator().manual_seed(0)
    model = LatentODE(LatentConfig(("gaussian",), latent_dim=2, anchored=False), generator)
    with torch.no_grad():
        model.field.turn.copy_(turns * torch.tensor([[0.0, 0.5], [-0.5, 0.0]]))
        model.field.reach.zero_()
    options = LatentOptions(n_updates=8, n_checks=8, steps_per_unit=2.0, learning_rate_init=1e-9)
    history = train_latent(model, LatentData.split(sines(120, 1), generator), options, generator)
    assert history.steps_per_unit == expected


def test_more_steps_than_are_ever_added_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skode.training.latent.STEP_ERROR", -1.0)
    generator = torch.Generator().manual_seed(0)
    model = LatentODE(LatentConfig(("gaussian",), latent_dim=2, hidden_layer_sizes=(8,)), generator)
    options = LatentOptions(n_updates=2, n_checks=2, steps_per_unit=24.0)
    assert train_latent(model, LatentData.split(sines(12, 1), generator), options, generator).steps_per_unit == 24.0


def test_what_steps_are_off_falls_by_their_order_and_models_of_targets_do_not_look() -> None:
    generator = torch.Generator().manual_seed(0)
    config = LatentConfig(("gaussian", "student_t"), n_static=1, latent_dim=2, anchored=False)
    model, tasks = LatentODE(config, generator).double(), held_out_tasks(panel([9, 7]), generator)
    with torch.no_grad():
        model.field.turn.copy_(torch.tensor([[0.0, 3.0], [-3.0, 0.0]]))
    few, more, many = (check_held_out(model, tasks, steps) for steps in (4.0, 8.0, 16.0))
    assert few.step_error > 30 * more.step_error > 900 * many.step_error > 0
    assert abs(more.score - many.score) < abs(few.score - many.score)
    with_targets = LatentODE(replace(config, n_targets=1), generator).double()
    assert check_held_out(with_targets, tasks, 4.0).step_error == 0.0


def test_divergence_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    model = LatentODE(LatentConfig(("gaussian",)), generator)
    series = sines(10, 1)
    series = replace(series, values=series.values * 1e30)
    with pytest.raises(DivergenceError, match="lower learning_rate_init"):
        train_latent(model, LatentData.split(series, generator), LatentOptions(n_updates=5), generator)


@pytest.mark.parametrize("thinned", [True, False])
def test_every_window_reads_something_and_refers_to_what_it_reads(thinned: bool) -> None:
    series = panel([1, 2, 9, 400, 30], n_covariates=1)
    own, generator = Panel.of(series), torch.Generator().manual_seed(0)
    kinds = set()
    for _ in range(30):
        batch = draw_batch(own, torch.tensor([0, 1, 2, 3, 4, 4]), 50, generator, thinned=thinned)
        assert batch.series.lengths.max() <= 50
        for b in range(6):
            rows = piece(batch.series, b)
            read = batch.series.times[rows][batch.keep[rows]]
            assert len(read) and read[0] <= batch.reference[b] <= read[-1]
            low, high = batch.windows[b]
            assert low <= batch.series.times[rows][0] and batch.series.times[rows][-1] <= high
            kept = torch.nonzero(batch.keep[rows]).view(-1)
            kinds.add("stretch" if int(kept[-1] - kept[0]) + 1 == len(kept) else "subset")
    assert kinds == ({"stretch", "subset"} if thinned else {"stretch"})


def test_parts_of_few_series_are_held_out_and_never_trained_on() -> None:
    series = sines(20, 1)
    data = LatentData.split(series, torch.Generator().manual_seed(0))
    (task,) = data.held_out
    assert data.panel.series.times.tolist() == task.given.times.tolist()
    together = torch.cat([task.given.times, task.target.times]).sort().values
    assert torch.equal(together, series.times.sort().values)
    assert 0.15 < len(task.target.times) / len(series.times) < 0.35


def test_many_series_are_held_out_whole() -> None:
    series = sines(120, 1)
    data = LatentData.split(series, torch.Generator().manual_seed(0))
    assert data.panel.series.n_series == 108
    for task in data.held_out:
        assert task.given.n_series == 12
        assert not bool(torch.isin(task.given.times, data.panel.series.times).any())


def test_distances_are_those_to_the_nearest_row() -> None:
    given = panel([3, 1, 0])
    query = torch.tensor([0, 0, 0, 1, 2])
    t = torch.tensor([-1.0, 0.4, 3.0, 0.5, 0.5], dtype=torch.float64)
    found = distances(given, query, t)
    own = [given.times[piece(given, b)][given.mask[piece(given, b)].any(1)] for b in query.tolist()]
    expected = [float((times - at).abs().min()) if len(times) else math.inf for times, at in zip(own, t, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("stride", [None, 0.5])
def test_forecasts_do_not_depend_on_other_series_or_queries(stride: float | None) -> None:
    model = LatentODE(LatentConfig(("gaussian",) * 2, 1, 1), torch.Generator().manual_seed(0)).double()
    series = panel([9, 30, 1, 5], n_covariates=1)
    options = ForecastOptions(SOLVER, stride)
    query = torch.arange(4).repeat_interleave(6)
    t = torch.linspace(-0.3, 1.9, 6, dtype=torch.float64).repeat(4)
    together = outlook(model, series, query, t, HeldInputs(series), options)
    for b in range(4):
        alone = series.take(torch.tensor([b]))
        for chosen in (slice(0, 6), slice(2, 5)):
            mine = torch.nonzero(query == b).view(-1)[chosen]
            found = outlook(model, alone, query[mine] * 0, t[mine], HeldInputs(alone), options)
            # Where the last query is decides where the solver's last step ends.
            exact = {"rtol": 1e-9, "atol": 1e-10} if len(mine) == 6 else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(found.eta, together.eta[mine], **exact)
            torch.testing.assert_close(found.disagreement, together.disagreement[mine], **exact)


def test_targets_of_series_are_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    series = sines(60, 1)
    level = series.values.new_zeros(60).index_add(0, series.index, series.values[:, 0].abs())
    targets = ((level - level.mean()) / level.std()).unsqueeze(1)
    config = LatentConfig(("gaussian",), latent_dim=3, encoder_layer_sizes=(32,), hidden_layer_sizes=(8,), n_targets=1)
    model = LatentODE(config, generator)
    data = LatentData.split(series, generator, targets=targets)
    train_latent(model, data, LatentOptions(n_updates=150, batch_size=50), generator)
    assert data.held_targets is not None
    held, wanted = data.held_targets
    with torch.no_grad():
        assert float((model.targets(held) - wanted).square().mean()) < 0.5 * float(wanted.square().mean())


# --- trajectories and bounds ---


def linear_model(noise: float = 0.3) -> LatentODE:
    """z of one dimension that decays at a known rate and is decoded to what is nearly itself."""
    config = LatentConfig(("gaussian",), latent_dim=1, decoder_layer_sizes=(), hidden_layer_sizes=(4,), anchored=False)
    model = LatentODE(config, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        model.field.reach.zero_()
        model.likelihood.log_scale.fill_(math.log(noise))
        assert model.decoder is not None
        for parameter, value in zip(model.decoder.parameters(), (1.0, 0.0), strict=True):
            parameter.fill_(value)
        # The encoder knows nothing: N(0, 1).
        weight, bias = list(model.encoder.parameters())[-2:]
        weight.zero_()
        bias.copy_(torch.tensor([0.0, math.log(7 / 2)]))
    return model


def test_the_bound_comes_near_the_likelihood_of_a_linear_gaussian_model() -> None:
    model, series = linear_model(), panel([4, 1, 0])
    series = replace(
        series, values=series.values[:, :1], mask=torch.ones(5, 1, dtype=torch.bool), static=series.static[:, :0]
    )
    prior = Prior(torch.tensor([0.4], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64))

    def bound(k: int, seed: int) -> Tensor:
        return log_bound(model, prior, series, None, normal(k, series.n_series, 1, seed=seed), SOLVER, 50)

    single, many = torch.stack([bound(1, seed) for seed in range(20)]).mean(dim=0), bound(5000, 0)
    rate = float(torch.nn.functional.softplus(model.field.damping[0]).detach())
    for b in range(2):
        t, y = (x[piece(series, b)] for x in (series.times, series.values[:, 0]))
        loading = torch.exp(-rate * (t - 0.5 * (t[0] + t[-1])))
        covariance = 0.64 * loading[:, None] * loading + 0.09 * torch.eye(len(t), dtype=torch.float64)
        exact = torch.distributions.MultivariateNormal(0.4 * loading, covariance).log_prob(y)
        assert abs(float(many[b] - exact)) < 0.1
        assert float(single[b]) < float(exact)
    assert float(many[2]) == 0.0


def test_prior_samples_have_the_moments_of_the_priors_path() -> None:
    model, n = linear_model(), 2000
    prior = Prior(torch.tensor([1.0], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64))
    t = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).repeat(n)
    static = torch.zeros(n, 0, dtype=torch.float64)
    offsets = torch.arange(n + 1) * 3
    eta = prior_eta(model, prior, offsets, t, static, None, SOLVER, normal(n, 1)).view(n, 3)
    rate = float(torch.nn.functional.softplus(model.field.damping[0]).detach())
    decay = torch.exp(-rate * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(eta.mean(0), decay, rtol=0.05, atol=0)
    torch.testing.assert_close(eta.std(0), 0.5 * decay, rtol=0.05, atol=0)


def test_posterior_trajectories_have_the_mean_and_spread_that_was_predicted() -> None:
    model, _, _ = fitted()
    series = sines(3, 4)
    query, t = torch.arange(3).repeat_interleave(4), torch.tensor([0.1, 0.9, 1.2, 1.5], dtype=torch.float64).repeat(3)
    eta, spread = torch.zeros(12, 1), torch.linspace(0.1, 1.0, 12).unsqueeze(1)
    args = (model, series, query, t, None, eta, spread)
    samples = posterior_eta(*args, normal(series.n_series, 200, model.n_dims), SOLVER, 256)
    assert samples.shape == (200, 12, 1)
    torch.testing.assert_close(samples.mean(0), eta, rtol=0, atol=1e-4)
    torch.testing.assert_close(samples.std(0, correction=0), spread, rtol=1e-3, atol=0)


def test_the_fitted_prior_holds_the_posteriors() -> None:
    model, data, _ = fitted()
    series = data.panel.series
    prior = fit_prior(model, series, 256)
    t = 0.5 * (series.first + series.last)
    with torch.no_grad():
        mean = model.encode(series, t.unsqueeze(1)).mean[:, 0]
    scaled = torch.linalg.solve_triangular(prior.factor, (mean - prior.mean).mT, upper=False)
    assert 0.3 < float(scaled.square().mean()) < 1.3


# --- events ---


def test_a_rate_of_events_is_learned() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    times, n = [], 60
    for _ in range(n):
        own = rng.uniform(0, 1, rng.poisson(40))
        times.append(np.sort(own[rng.uniform(size=len(own)) < np.where(own < 0.5, 0.2, 1.0)]))
    offsets = offsets_of(torch.tensor([len(own) for own in times]))
    series = Series.of(
        offsets, torch.from_numpy(np.concatenate(times)), torch.zeros(int(offsets[-1]), 0), clock=(0.0, 1.0)
    )
    config = LatentConfig(
        (),
        latent_dim=3,
        hidden_layer_sizes=(16,),
        encoder_layer_sizes=(16,),
        point_process=True,
        clock=(0.0, 1.0),
        base_rate=len(series.times) / n,
    )
    model = LatentODE(config, generator)
    windows = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(n, -1)
    data = LatentData.split(series, generator, windows=windows)
    train_latent(model, data, LatentOptions(n_updates=150, batch_size=30, learning_rate_init=2e-2), generator)
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    with torch.no_grad():
        middle = torch.full((n, 1), 0.5, dtype=torch.float64)
        rows = Rows(model.encode(series, middle).mean[:, 0], middle[:, 0], torch.arange(n))
        which, inputs = torch.arange(n).repeat_interleave(2), HeldInputs(series)
        z = model.exact_path(rows, which, t.repeat(n), inputs, SOLVER).z
        rate = model.field.rate(z, inputs.at(which, t.repeat(n)).float()).view(n, 2).mean(0)
    assert 5 < float(rate[0]) < 13 and 30 < float(rate[1]) < 50


def test_without_anything_held_out_a_plain_calibration_is_given() -> None:
    model = LatentODE(LatentConfig(("gaussian",) * 2), torch.Generator().manual_seed(0))
    assert calibrate(model, [], ForecastOptions(SOLVER)) == Calibration.plain(2)


def held_out_errors(shared: float, n: int = 40, seed: int = 0) -> list[_Compared]:
    """Errors at 8 observations of each of n series, and between them: white noise of 0.1, and what a series shares."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, 8, dtype=torch.float64).repeat(n)
    series = Series.of(torch.arange(n + 1) * 8, t, torch.zeros(8 * n, 1, dtype=torch.float64))
    query = torch.arange(n).repeat_interleave(2)
    asked = torch.tensor([0.3, 1.2], dtype=torch.float64).repeat(n)
    level = shared * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    errors = level[series.index] + 0.1 * torch.randn(8 * n, 1, generator=generator, dtype=torch.float64)
    y = level[query] + 0.1 * torch.randn(2 * n, 1, generator=generator, dtype=torch.float64)
    windows = Windows(series, query, asked, 0)
    everything = torch.ones_like(y, dtype=torch.bool)
    zero = torch.zeros_like(y)
    missed = {0: Missed(windows, errors[windows.rows, 0])}
    return [_Compared(zero, zero, y, everything, asked > 1, asked, missed)]


def test_errors_that_a_series_shares_are_interpolated_and_white_ones_are_not() -> None:
    kernel = _kernel(held_out_errors(0.3), 0)
    assert kernel is not None and kernel.length >= 0.8 and kernel.ratio >= 4
    assert _kernel(held_out_errors(0.0), 0) is None


def test_a_channel_of_which_nothing_was_held_out_is_not_corrected() -> None:
    parts = held_out_errors(0.3, n=1)
    assert _kernel(parts, 0) is not None
    parts[0].mask[:] = False
    assert _kernel(parts, 0) is None
