"""The latent path: one solve in both directions, gathered at each row's own times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skode.exceptions import SolverError
from skode.models import Gaussian, HeldInputs, LatentConfig, LatentODE, Rows, Series, SolverOptions
from tests.models.test_latent_series import panel

TIGHT = SolverOptions("dopri5", 1e-10, 1e-12, None, 10_000)


def model(**options: object) -> LatentODE:
    config = LatentConfig(
        **{"families": ("gaussian",) * 2, "latent_dim": 3, "anchored": False, "hidden_layer_sizes": (8,), **options}
    )
    own = LatentODE(config, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        own.field.damping += torch.linspace(-0.5, 0.5, own.n_dims)
    return own


def rows(n: int, seed: int = 1) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    return Rows(torch.randn(n, 3, generator=generator, dtype=torch.float64), t, torch.arange(n))


def places(n: int, each: int = 7, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.arange(n).repeat_interleave(each), 2 * torch.rand(n * each, generator=generator, dtype=torch.float64)


def test_a_linear_field_gives_matrix_exponentials_at_every_place() -> None:
    own, start = model(), rows(4)
    with torch.no_grad():
        own.field.reach.zero_()
    place, t = places(4)
    away = (t - start.t[place]).view(-1, 1, 1)
    expected = (torch.linalg.matrix_exp(own.field.matrix() * away) @ start.z[place].unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(own.path(start, place, t, None, steps_per_unit=16).z, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(own.exact_path(start, place, t, None, TIGHT).z, expected, rtol=0, atol=1e-7)


def test_the_path_of_few_steps_comes_near_the_exact_one_by_its_order() -> None:
    own, start = model(), rows(5)
    place, t = places(5)
    exact = own.exact_path(start, place, t, None, TIGHT).z.detach()
    found = [own.path(start, place, t, None, steps_per_unit=k).z.detach() for k in (2, 4, 8)]
    errors = [float((z - exact).abs().max()) for z in found]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]


def test_gradients_of_the_path_pass_gradcheck() -> None:
    own, start = model(n_static=1, n_covariates=1), rows(3)
    place, t = places(3, 3)
    inputs = HeldInputs(panel([3, 2, 4], n_covariates=1))
    field = list(own.field.parameters())

    def path(z: Tensor, *_: Tensor) -> Tensor:
        return own.path(start._replace(z=z), place, t, inputs, steps_per_unit=2).z

    assert torch.autograd.gradcheck(path, (start.z.clone().requires_grad_(), *field))


def test_rows_do_not_depend_on_the_others_but_for_their_number_of_steps() -> None:
    own, start = model(), rows(4)
    place, t = places(4)
    t = torch.cat([t, start.t + 2])  # all rows are asked for about the same length
    place = torch.cat([place, torch.arange(4)])
    together = own.path(start, place, t, None).z
    exact = own.exact_path(start, *_sorted(place, t), None, TIGHT).z
    for b in range(4):
        alone = Rows(start.z[b : b + 1], start.t[b : b + 1], torch.zeros(1, dtype=torch.int64))
        mine = place == b
        torch.testing.assert_close(own.path(alone, place[mine] * 0, t[mine], None).z, together[mine])
        mine = _sorted(place, t)[0] == b
        times = _sorted(place, t)[1][mine]
        torch.testing.assert_close(own.exact_path(alone, mine[mine].long() * 0, times, None, TIGHT).z, exact[mine])


def _sorted(place: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(place, stable=True)
    return place[order], t[order]


def test_a_row_asked_for_nothing_but_its_reference_gives_its_state() -> None:
    own, start = model(), rows(3)
    place = torch.tensor([2, 0, 0])
    found = own.path(start, place, start.t[place], None).z
    assert torch.equal(found, start.z[place])
    assert torch.equal(
        own.exact_path(start, place.sort().values, start.t[place.sort().values], None, TIGHT).z,
        start.z[place.sort().values],
    )


def test_known_inputs_drive_the_path() -> None:
    own = model(n_covariates=1)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = Rows(torch.zeros(2, 3, dtype=torch.float64), times.new_zeros(2), torch.arange(2))
    covariates = torch.tensor([[0.0], [0.0], [0.0], [5.0]], dtype=torch.float64)
    offsets = torch.tensor([0, 2, 4])
    inputs = HeldInputs(Series.of(offsets, times.repeat(2), torch.zeros(4, 2, dtype=torch.float64), None, covariates))
    place, t = torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 2.0, 0.5, 2.0], dtype=torch.float64)
    found = own.exact_path(start, place, t, inputs, TIGHT).z.detach()
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-9)
    assert float((found[1] - found[3]).abs().max()) > 0.1


def test_expected_events_are_the_integral_of_the_rate() -> None:
    own, start = model(families=(), point_process=True), rows(3)
    window = torch.stack([start.t - 0.7, start.t + 1.1], dim=1)
    nothing = torch.zeros(0, dtype=torch.int64)
    found = own.path(start, nothing, start.t[:0], None, steps_per_unit=16, window=window).expected
    grid = torch.linspace(0, 1, 401, dtype=torch.float64)
    t = (window[:, :1] + grid * (window[:, 1:] - window[:, :1])).reshape(-1)
    z = own.exact_path(start, torch.arange(3).repeat_interleave(401), t, None, TIGHT).z.detach()
    expected = torch.trapezoid(own.field.rate(z).view(3, 401), dx=1.8 / 400)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert found is not None
    gradients = torch.autograd.grad(found.sum(), list(own.field.parameters()), allow_unused=True)
    assert all(g is not None and float(g.abs().sum()) > 0 for g in gradients)


def test_a_state_that_is_not_finite_is_told() -> None:
    own, start = model(), rows(2)
    start.z[1, 0] = torch.inf
    with pytest.raises(SolverError):
        own.path(start, *places(2), None)
    with pytest.raises(SolverError) as caught:
        own.exact_path(start, *places(2), None, TIGHT)
    assert caught.value.rows == (1,)


def test_a_gaussian_knows_its_density_and_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    own = Gaussian(mean, log_std)
    reference = torch.distributions.Normal(mean, log_std.exp())
    z = own.sample(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(own.log_prob(z), reference.log_prob(z).sum(dim=1))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(own.divergence(), torch.distributions.kl_divergence(reference, prior).sum(dim=1))


def test_an_anchored_model_says_at_first_that_all_stays_as_it_is() -> None:
    series = panel([9, 5, 1])
    own = model(anchored=True, encoder="attention", n_static=1)
    with torch.no_grad():
        own.field.damping[:2] = -50.0
        mean = own.encode(series, series.last.unsqueeze(1)).mean[:, 0]
        start = Rows(mean, series.last, torch.arange(3))
        place, t = places(3)
        eta = own.decode(own.path(start, place, t, HeldInputs(series)).z, series.static[place])
    torch.testing.assert_close(eta, mean[place, :2], rtol=0, atol=1e-9)
    only = series.values.index_select(0, series.offsets[2:3])[0] * own.encoder.level.mix.softmax(0)[:-1].sum(0)  # type: ignore[union-attr]
    torch.testing.assert_close(mean[2, :2], only.detach(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("counts", [False, True])
def test_steps_in_one_node_are_the_solvers_own(counts: bool) -> None:
    own, start = model(point_process=counts), rows(3)
    durations = torch.tensor([[0.4], [-1.1], [2.0]], dtype=torch.float64)
    found = []
    for steps in (own._stepped, lambda *args, counts: own._solved(*args, "discrete", counts=counts)):
        z = start.z.clone().requires_grad_()
        parts = [part for part in steps(z, durations, 5, None, counts=counts) if part is not None]
        gradients = torch.autograd.grad(
            sum((i + part).square().sum() for i, part in enumerate(parts)), [z, *own.field.parameters()]
        )
        found.append([*parts, *gradients])
    assert len(found[0]) == len(found[1]) == (3 if counts else 2) + 1 + len(list(own.field.parameters()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_targets_begin_as_their_mean() -> None:
    series = panel([4, 6])
    found = model(n_static=1, n_targets=2).targets(series)
    assert torch.equal(found, torch.zeros(2, 2, dtype=torch.float64))
