"""DensityDisplay draws what the density tells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ContinuousFlowDensity
from skode.displays import DensityDisplay


@pytest.mark.parametrize("plot_method", ["contourf", "contour", "pcolormesh"])
def test_the_surface_is_the_log_density_on_the_grid(plt, flow, moons, plot_method):
    display = DensityDisplay.from_estimator(flow, moons[0], grid_resolution=7, samples=20, plot_method=plot_method)
    grid = np.column_stack([display.xx0.ravel(), display.xx1.ravel()])
    np.testing.assert_array_equal(display.log_density.ravel(), flow.score_samples(grid))
    np.testing.assert_array_equal(display.data_[0].get_offsets(), moons[0])
    np.testing.assert_array_equal(display.samples_[0].get_offsets(), flow.sample(500, random_state=0)[:20])
    assert display.axes_.shape == (1, 1) and display.colorbar_.ax.get_ylabel() == "log-density"


def test_features_in_the_other_order_swap_the_axes(plt, flow):
    display = DensityDisplay.from_estimator(flow, features=(1, 0), grid_resolution=5)
    grid = np.column_stack([display.xx1.ravel(), display.xx0.ravel()])
    np.testing.assert_array_equal(display.log_density.ravel(), flow.score_samples(grid))
    assert display.ax_.get_xlabel() == "column 1"


def test_the_flow_in_time_carries_the_base_to_the_data(plt, flow, moons):
    display = DensityDisplay.from_estimator(flow, moons[0], t=[1.0, 0.0, 0.5], samples=40, grid_resolution=6)
    rows = flow.sample(500, random_state=0)[:40]
    np.testing.assert_allclose(display.samples[0], rows, rtol=1e-6)
    base = flow.transform(rows) * flow.columns_.scale + flow.columns_.mean
    np.testing.assert_allclose(display.samples[1], base, atol=1e-5)
    grid = np.column_stack([display.xx0.ravel(), display.xx1.ravel()])
    # Exact at the data, and the base itself at time 0.
    np.testing.assert_allclose(display.log_density[0].ravel(), flow.score_samples(grid), atol=0.02)
    normal = -0.5 * np.square((grid - flow.columns_.mean) / flow.columns_.scale).sum(axis=1) - np.log(2 * np.pi)
    np.testing.assert_allclose(display.log_density[1].ravel(), normal - flow.columns_.log_scale, atol=1e-9)
    assert [ax.get_title() for ax in display.axes_[0]] == ["t = 1", "t = 0", "t = 0.5"]
    assert len(display.data_) == 1  # in the panel of time 1


def test_densities_at_intermediate_times_integrate_to_one(plt, flow):
    display = DensityDisplay.from_estimator(flow, t=[0.5], grid_resolution=60)
    area = np.ptp(display.xx0) * np.ptp(display.xx1) / 59**2
    assert np.exp(display.log_density).sum() * area == pytest.approx(1, abs=0.02)


def test_of_more_columns_the_marginal_of_two_is_estimated(plt):
    X = np.random.default_rng(0).normal(size=(300, 3)) * [1.0, 2.0, 3.0]
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    density = make_pipeline(
        StandardScaler().set_output(transform="pandas"), ContinuousFlowDensity(max_iter=0, random_state=0)
    ).fit(frame)
    display = DensityDisplay.from_estimator(density, frame, features=("c", "a"), grid_resolution=5)
    middle = display.log_density[2, 2]
    assert middle == pytest.approx(-np.log(2 * np.pi), abs=0.4)
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("c", "a")
    np.testing.assert_allclose(display.data, (X / X.std(axis=0) - X.mean(axis=0) / X.std(axis=0))[:, [2, 0]])


def test_bad_arguments_are_named(plt, net, flow, moons):
    with pytest.raises(TypeError, match="got ODENetClassifier"):
        DensityDisplay.from_estimator(net)
    with pytest.raises(ValueError, match="plot_method='hexbin'"):
        DensityDisplay.from_estimator(flow, plot_method="hexbin")
    with pytest.raises(ValueError, match="two different columns"):
        DensityDisplay.from_estimator(flow, features=(0, 0))
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        DensityDisplay.from_estimator(flow, t=[0.5, 2.0])
    X = np.column_stack([np.random.default_rng(0).normal(size=30), np.full(30, 3.0)])
    with pytest.raises(ValueError, match="this density has one"):
        DensityDisplay.from_estimator(ContinuousFlowDensity(max_iter=0, random_state=0).fit(X[:, :1]))
    with pytest.warns(UserWarning, match="constant"):
        constant = ContinuousFlowDensity(max_iter=0, random_state=0).fit(X)
    with pytest.raises(ValueError, match="column 1 of X is constant"):
        DensityDisplay.from_estimator(constant)
