"""VectorFieldDisplay draws the field that the solver follows."""

from __future__ import annotations

import numpy as np
import pytest

from skode import LatentODERegressor, ODENetRegressor, Panel
from skode.displays import VectorFieldDisplay
from skode.estimators.velocities import flow_velocity, hidden_velocity, latent_velocity

STEP = 1e-4


@pytest.mark.parametrize("order", [1, 2])
def test_the_hidden_field_is_the_slope_of_the_path(order):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    model = ODENetRegressor((6,), n_members=3, order=order, max_iter=3, tol=1.0, random_state=0).fit(X, y)
    model.set_params(rtol=1e-10, atol=1e-12)
    before, at, after = model.trajectory(X[:5], [0.5 - STEP, 0.5, 0.5 + STEP], member=2).swapaxes(0, 1)
    slope = (after - before) / (2 * STEP)
    np.testing.assert_allclose(hidden_velocity(model, at, 0.5, 2), slope, rtol=1e-5, atol=1e-6)


def test_the_flows_field_is_the_slope_of_the_path(flow, moons):
    before, at, after = flow.trajectory(moons[0][:5], [0.5 - STEP, 0.5, 0.5 + STEP]).swapaxes(0, 1)
    slope = (after - before) / (2 * STEP)
    np.testing.assert_allclose(flow_velocity(flow, at, 0.5), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("origin", ["series", "panel"])
def test_the_latent_field_is_per_unit_of_the_panels_time(origin):
    t = np.sort(np.random.default_rng(0).uniform(0, 50, (5, 8)), axis=1)
    panel = Panel.from_dense(np.sin(t)[:, :, None], times=t, origin=origin)
    sizes = {"encoder_layer_sizes": (4,), "decoder_layer_sizes": (4,)}
    model = LatentODERegressor(1, (4,), max_iter=3, random_state=0, **sizes).fit(panel)
    states = model.transform(panel)
    unit = model._fitted.scaling.time
    slow = latent_velocity(model, states, 10.0)
    assert slow.shape == states.shape == (5, 2)
    # Far out the linear part rules: the rest is bounded by the reach.
    reach = np.abs(model._fitted.arrays["field.reach"])
    far = latent_velocity(model, 1e6 * states, 10.0)
    turn = model._fitted.arrays["field.turn"].astype(np.float64)
    damping = np.log1p(np.exp(model._fitted.arrays["field.damping"].astype(np.float64)))
    linear = 1e6 * states @ (turn - turn.T - np.diag(damping)).T
    assert (np.abs(far * unit - linear) <= reach * (1 + 1e-6)).all()
    moved = not np.allclose(latent_velocity(model, states, 40.0), slow)
    assert moved == (origin == "panel")  # only a clock makes the field depend on time


def test_arrows_stand_in_a_plane_through_the_mean_state(plt, net, moons):
    display = VectorFieldDisplay.from_estimator(net, moons[0], t=0.5, features=(2, 0), grid_resolution=4, member=1)
    states = net[-1].trajectory(net[:-1].transform(moons[0]), [0.5], member=1)[:, 0]
    grid = np.full((16, 3), states[:, 1].mean())
    grid[:, 2], grid[:, 0] = display.xx0.ravel(), display.xx1.ravel()
    slope = hidden_velocity(net[-1], grid, 0.5, 1)
    np.testing.assert_allclose(display.arrows_.U, slope[:, 2])
    np.testing.assert_allclose(display.arrows_.V, slope[:, 0])
    np.testing.assert_array_equal(display.dots_.get_offsets(), states[:, [2, 0]])
    assert (display.ax_.get_xlabel(), display.ax_.get_title()) == ("hidden 2", "t = 0.5")


def test_a_flow_needs_no_data(plt, flow):
    display = VectorFieldDisplay.from_estimator(flow, t=1.0, grid_resolution=5, plot_method="streamplot")
    grid = np.column_stack([display.xx0.ravel(), display.xx1.ravel()])
    np.testing.assert_array_equal(np.column_stack([display.u.ravel(), display.v.ravel()]), flow_velocity(flow, grid, 1))
    np.testing.assert_allclose(display.states, flow.sample(300, random_state=0), rtol=1e-6)


def test_nets_and_latent_models_without_data_are_shown_around_zero(plt, net, series):
    for model in (net, series.model):
        display = VectorFieldDisplay.from_estimator(model, grid_resolution=3)
        assert display.dots_ is None and display.xx0.mean() == pytest.approx(0)


def test_latent_states_are_the_encoders(plt, series):
    display = VectorFieldDisplay.from_estimator(series.model, series.panel, features=("latent 3", "latent 2"))
    np.testing.assert_array_equal(display.states, series.model.transform(series.panel)[:, [3, 2]])


def test_bad_arguments_are_named(plt, net, flow, moons):
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        VectorFieldDisplay.from_estimator(net, moons[0], t=2.0)
    with pytest.raises(ValueError, match="member=5"):
        VectorFieldDisplay.from_estimator(net, moons[0], member=5)
    with pytest.raises(ValueError, match="plot_method='barbs'"):
        VectorFieldDisplay.from_estimator(flow, plot_method="barbs")
    with pytest.raises(TypeError, match="got StandardScaler"):
        VectorFieldDisplay.from_estimator(net[0], moons[0])
