"""Arguments of ContinuousFlowDensity that all estimators share: solver, training, warm start, users' own fields."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn

from skode import ContinuousFlowDensity
from skode.estimators import flow_base

QUICK = {"max_iter": 8, "hidden_layer_sizes": 16, "random_state": 0}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Tables here are small: blocks of 256 rows are filled up with fewer copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skode.models.blocks.BLOCK_STATES", 256)
        yield


@pytest.fixture(scope="module")
def moons():
    return make_moons(240, noise=0.1, random_state=0)[0]


class Twist(nn.Module):
    """A small field of a user's own, without a trace of its own."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_dims + 1, 8), nn.Tanh(), nn.Linear(8, n_dims))

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand(len(y), 1)], dim=1))


class Stretch(nn.Module):
    """v = a y, whose flow and log-determinant are known."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(n_dims))

    def forward(self, t, y):
        return self.a * y


class Explosion(nn.Module):
    """v = 1 + y ** 4, which reaches infinity in finite time."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(n_dims))

    def forward(self, t, y):
        return 1e3 * (1 + self.a.square() * y**4)


def integral(density):
    """Over the plane of the moons."""
    x, y = np.meshgrid(np.linspace(-4, 5, 91), np.linspace(-4, 4, 81))
    grid = np.column_stack([x.ravel(), y.ravel()])
    return np.exp(density.score_samples(grid)).sum() * 0.1 * 0.1


# --- users' own fields ---


@pytest.mark.parametrize("base", ["normal", "mixture"])
def test_a_users_field_makes_a_density_that_integrates_to_1(moons, base):
    density = ContinuousFlowDensity(field=Twist, base=base, max_iter=16, random_state=0).fit(moons)
    assert abs(integral(density) - 1) < 1e-3
    again = density.inverse_transform(density.transform(moons))
    np.testing.assert_allclose(again, moons, atol=1e-4)


def test_a_users_field_learns(moons):
    few, more = (
        ContinuousFlowDensity(field=Twist, base="normal", max_iter=n, random_state=0).fit(moons) for n in (0, 80)
    )
    assert more.score(moons) > few.score(moons) + 0.2


def test_a_users_field_is_drawn_from_random_state_alone(moons):
    torch.manual_seed(5)
    first = ContinuousFlowDensity(**QUICK, field=Twist, base="normal").fit(moons)
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    second = ContinuousFlowDensity(**QUICK, field=Twist, base="normal").fit(moons)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(first.score_samples(moons), second.score_samples(moons))


def test_a_stretch_learns_the_variances():
    X = np.random.default_rng(0).normal(size=(400, 2)) @ np.diag([1.0, 3.0])
    density = ContinuousFlowDensity(field=Stretch, base="normal", max_iter=40, random_state=0).fit(X)
    np.testing.assert_allclose(density.sample(4000, random_state=0).std(axis=0), X.std(axis=0), rtol=0.1)


def test_a_field_that_blows_up_is_told(moons):
    with (
        pytest.warns(UserWarning, match="training by likelihood ended early"),
        pytest.raises(Exception, match="log-density was found for row"),
    ):
        ContinuousFlowDensity(field=Explosion, base="normal", max_iter=8, random_state=0).fit(moons)


def test_an_instance_of_a_field_is_refused(moons):
    with pytest.raises(TypeError, match="every clone and fold would share"):
        ContinuousFlowDensity(field=Twist(2)).fit(moons)


def test_what_makes_no_module_is_refused(moons):
    with pytest.raises(ValueError, match=r"must return a torch\.nn\.Module"):
        ContinuousFlowDensity(field=lambda n_dims: n_dims).fit(moons)


# --- the solver's arguments ---


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tsit5"},
        {"method": "rk4", "step_size": 0.125},
        {"gradient": "adjoint"},
        {"gradient": "reversible", "method": "rk4", "step_size": 0.25},
        {"divergence": "hutchinson"},
        {"energy_penalty": 0.1, "jacobian_penalty": 0.1},
    ],
    ids=str,
)
def test_every_way_to_train_gives_a_density(moons, options):
    density = ContinuousFlowDensity(**QUICK, base="normal", objective="likelihood", **options).fit(moons)
    assert abs(integral(density) - 1) < 1e-3
    assert density.validation_scores_[-1] > density.validation_scores_[0]


def test_rtol_rules_samples_after_the_fit_and_leaves_log_densities_alone(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal").fit(moons)
    scores, places = density.score_samples(moons), density.transform(moons)
    density.set_params(rtol=1e-6, atol=1e-7)
    exact = density.transform(moons)
    density.set_params(rtol=1.0, atol=0.1)
    loose = density.transform(moons)
    np.testing.assert_array_equal(density.score_samples(moons), scores)
    assert np.abs(exact - places).max() < np.abs(exact - loose).max()


def test_a_method_of_fixed_steps_draws_samples_with_them(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal").fit(moons)
    exact = density.transform(moons)
    coarse, fine = (density.set_params(method="rk4", step_size=step).transform(moons) for step in (0.5, 1 / 16))
    assert np.abs(fine - exact).max() < np.abs(coarse - exact).max()


def test_the_solver_tells_what_it_did(moons):
    frame = pd.DataFrame(moons, columns=["a", "b"]).set_axis([f"row {i}" for i in range(240)])
    density = ContinuousFlowDensity(**QUICK, base="normal").fit(frame)
    stats = density.solver_stats(frame)
    assert list(stats.columns) == ["n_evals", "n_steps", "n_rejected", "status"]
    assert stats.index.equals(frame.index)
    assert (stats["status"] == 0).all() and (stats["n_evals"] > 0).all()


# --- training's arguments ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_computes_in_the_dtype_that_is_asked_for(moons, dtype):
    density = ContinuousFlowDensity(**QUICK, base="normal", dtype=dtype).fit(moons)
    assert density.dtype_ == dtype
    assert {array.dtype.name for array in density._flows[0].field_arrays.values()} == {dtype}
    assert density.score_samples(moons).dtype == np.float64


def test_auto_is_the_dtype_of_x(moons):
    assert ContinuousFlowDensity(**QUICK).fit(moons.astype(np.float32)).dtype_ == np.float32
    assert ContinuousFlowDensity(**QUICK).fit(moons).dtype_ == np.float64


def test_a_warm_start_goes_on_where_the_last_fit_ended(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal", warm_start=True).fit(moons)
    first = density.validation_scores_[-1]
    columns = density.columns_
    density.fit(moons)
    assert density.columns_ is columns
    assert density.validation_scores_[0] == pytest.approx(max(first, density.validation_scores_[0]), abs=1e-6)
    assert max(density.validation_scores_) > first
    with pytest.raises(ValueError, match="n_members=2"):
        density.set_params(n_members=2).fit(moons)


def test_without_early_stopping_all_rows_are_trained_on(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal", early_stopping=False).fit(moons)
    assert density.n_iter_ > 1 and len(density.loss_curve_) > 0


def test_early_stopping_is_to_hold_out_a_row():
    X = np.random.default_rng(0).normal(size=(5, 1))
    with pytest.raises(ValueError, match="holds out none of 5 distinct rows"):
        ContinuousFlowDensity(**QUICK, early_stopping=True, validation_fraction=0.1).fit(X)


def test_training_ends_when_the_likelihood_no_longer_rises(moons):
    whole = ContinuousFlowDensity(**QUICK, base="normal", objective="likelihood").fit(moons)
    short = ContinuousFlowDensity(**QUICK, base="normal", objective="likelihood", tol=1e3, n_iter_no_change=2).fit(
        moons
    )
    assert short.n_iter_ == 2 and whole.n_iter_ == 8


def test_verbose_prints_a_line_at_each_check(moons, capsys):
    ContinuousFlowDensity(**QUICK, base="normal", verbose=True).fit(moons)
    lines = capsys.readouterr().out.splitlines()
    assert "validation" in lines[0]
    assert len(lines) == 1 + 2 + 8  # the head; before training and after matching; the checks of the likelihood


def test_what_training_did_is_told(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal").fit(moons)
    assert density.loss_ == density.loss_curve_[-1] and density.best_loss_ == min(density.loss_curve_)
    assert density.n_evals_ > 0
    assert density.n_parameters_ == sum(array.size for array in density._flows[0].field_arrays.values())


@pytest.mark.parametrize("sizes", [(2.5,), (0,), (), [[8, 8]], "auto"])
def test_sizes_that_are_no_whole_numbers_are_refused(moons, sizes):
    with pytest.raises(ValueError, match="hidden_layer_sizes"):
        ContinuousFlowDensity(hidden_layer_sizes=sizes).fit(moons)


def test_a_planar_flow_has_one_layer(moons):
    with pytest.raises(ValueError, match="planar"):
        ContinuousFlowDensity(net="planar", hidden_layer_sizes=(8, 4)).fit(moons)


def test_members_hold_out_different_rows():
    rows, weight = np.random.default_rng(0).normal(size=(200, 2)), np.ones(200)
    flow = ContinuousFlowDensity(validation_fraction=0.2)
    parts = [flow_base.BaseFlow._held_out(flow, rows, weight, 0, part) for part in range(5)]
    assert (np.sum(parts, axis=0) <= 1).all()
    assert np.sum(parts) == 200


def test_equal_densities_do_not_make_all_rows_outliers():
    with pytest.warns(UserWarning, match="constant"):
        density = ContinuousFlowDensity().fit(np.ones((50, 1)))
    assert (density.predict(np.ones((50, 1))) == 1).all()
    coin = np.repeat([[0.0], [1.0]], [20, 30], axis=0)
    assert (ContinuousFlowDensity(**QUICK).fit(coin).predict(coin) == 1).all()


def test_a_warm_start_keeps_its_field(moons):
    density = ContinuousFlowDensity(**QUICK, base="normal", warm_start=True).fit(moons)
    scores = density.score_samples(moons)
    with pytest.raises(ValueError, match="warm_start goes on with the field of the last fit"):
        density.set_params(hidden_layer_sizes=8).fit(moons)
    np.testing.assert_array_equal(density.score_samples(moons), scores)
