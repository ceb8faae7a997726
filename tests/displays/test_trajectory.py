"""TrajectoryDisplay draws what the models predict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from skode import LatentODERegressor, Panel
from skode.displays import TrajectoryDisplay


def test_hidden_states_are_drawn_as_the_net_tells_them(plt, net, moons):
    X, y = moons
    display = TrajectoryDisplay.from_estimator(net, X[:7], y=y[:7], n_points=11, member=1)
    states = net[-1].trajectory(net[:-1].transform(X[:7]), np.linspace(0, 1, 11), member=1)
    assert display.axes_.shape == (1, 3) and len(display.lines_) == 21
    for i, line in enumerate(display.lines_):
        np.testing.assert_array_equal(line.get_xdata(), np.linspace(0, 1, 11))
        np.testing.assert_array_equal(line.get_ydata(), states[i // 3, :, i % 3])
    colours = [line.get_color() for line in display.lines_[::3]]
    assert colours == [f"C{label}" for label in y[:7]]
    assert [text.get_text() for text in display.axes_[0, -1].get_legend().get_texts()] == ["0", "1"]


def test_a_plane_shows_two_components_or_the_principal_ones(plt, net, moons):
    X = moons[0][:5]
    states = net[-1].trajectory(net[:-1].transform(X), [0.0, 0.5, 1.0])
    chosen = TrajectoryDisplay.from_estimator(net, X, kind="plane", times=[0.0, 0.5, 1.0], components=[2, 0])
    np.testing.assert_array_equal([line.get_ydata() for line in chosen.lines_], states[:, :, 0])
    assert chosen.ax_.get_xlabel() == "hidden 2"
    pca = TrajectoryDisplay.from_estimator(net, X, kind="plane", times=[0.0, 0.5, 1.0])
    flat = states.reshape(-1, 3) - states.reshape(-1, 3).mean(axis=0)
    kept = np.linalg.svd(flat, compute_uv=False)[:2]
    drawn = np.concatenate([line.get_xydata() for line in pca.lines_])
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=0), kept, rtol=1e-6)


def test_many_numbers_are_colours_on_a_scale(plt, net, moons):
    display = TrajectoryDisplay.from_estimator(net, moons[0][:12], y=np.linspace(0, 3, 12), n_points=3, components=[1])
    first, last = display.lines_[0], display.lines_[-1]
    cool = plt.get_cmap("cool")
    assert tuple(first.get_color()) == cool(0.0) and tuple(last.get_color()) == cool(1.0)
    assert display.figure_.axes[-1].get_ylabel() == "y"


def test_series_have_lines_bands_and_dots(plt, series):
    model, panel = series.model, series.panel
    display = TrajectoryDisplay.from_estimator(
        model, panel, series=["b", 3], channels=["pulse"], quantiles=(0.25, 0.75), horizon=2.0, n_points=15
    )
    assert display.axes_.shape == (2,) and len(display.bands_) == 2
    for line, dots, row, low, high in zip(
        display.lines_, display.dots_, [1, 3], display.lower, display.upper, strict=True
    ):
        index = panel[row].index
        t = line.get_xdata()
        assert (t[0], t[-1]) == pytest.approx((index[0], index[-1] + 2.0))
        expected = model.predict(panel[[row]], times=t)[0, :, 1]
        np.testing.assert_array_equal(line.get_ydata(), expected)
        band = model.predict(panel[[row]], times=t, quantiles=[0.25, 0.75])[0, :, 1]
        np.testing.assert_array_equal(np.column_stack([low, high]), band)
        seen = panel[row]["pulse"].dropna()
        np.testing.assert_array_equal(dots.get_xdata(), seen.index)
        np.testing.assert_array_equal(dots.get_ydata(), seen)
    assert [ax.get_title() for ax in display.axes_] == ["series b", "series d"]


def test_all_channels_of_the_first_four_series_are_shown_by_default(plt, series):
    display = TrajectoryDisplay.from_estimator(series.model, series.panel, n_points=5)
    assert [ax.get_title() for ax in display.axes_[:3]] == ["series a: load", "series a: pulse", "series b: load"]
    assert len(display.axes_) == 8


@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_datetimes_are_drawn_in_their_own_zone(plt, zone):
    index = pd.date_range("2024-03-30", periods=8, freq="6h", tz=zone)
    panel = Panel.from_frames([pd.DataFrame({"x": np.sin(np.arange(8.0) + k)}, index=index) for k in range(2)])
    model = LatentODERegressor(1, (4,), encoder_layer_sizes=(4,), decoder_layer_sizes=(4,), max_iter=2, random_state=0)
    display = TrajectoryDisplay.from_estimator(model.fit(panel), panel, series=[0], horizon="12h", n_points=9)
    start, end = pd.to_datetime(display.lines_[0].get_xdata()[[0, -1]])
    expected = index if zone is None else index.tz_convert("UTC").tz_localize(None)
    assert (start, end) == (expected[0], expected[-1] + pd.Timedelta("12h"))
    display.figure_.canvas.draw()
    shown = [label.get_text() for label in display.ax_.get_xticklabels()]
    assert shown[0] == "Mar-30"  # midnight where the series is, not in UTC


def test_timedeltas_are_drawn_in_seconds(plt):
    index = pd.to_timedelta(np.arange(6) * 30, unit="s")
    panel = Panel.from_frames([pd.DataFrame({"x": np.arange(6.0)}, index=index)])
    model = LatentODERegressor(1, (4,), encoder_layer_sizes=(4,), decoder_layer_sizes=(4,), max_iter=1, random_state=0)
    display = TrajectoryDisplay.from_estimator(model.fit(panel), panel, horizon="30s", n_points=4)
    np.testing.assert_allclose(display.lines_[0].get_xdata(), [0.0, 60.0, 120.0, 180.0])
    assert display.ax_.get_xlabel() == "time [s]"


def test_arrays_are_drawn_by_the_constructor(plt):
    times, values = [np.arange(3.0), np.arange(5.0)], [np.ones((3, 1)), np.zeros((5, 1))]
    display = TrajectoryDisplay(times, values, component_names=["height"], time_name="hours").plot(color="C3")
    assert [len(line.get_xdata()) for line in display.lines_] == [3, 5]
    assert {line.get_color() for line in display.lines_} == {"C3"}
    assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("hours", "height")


def test_bad_arguments_are_named(plt, net, series, flow, moons):
    X = moons[0][:3]
    with pytest.raises(TypeError, match="got ContinuousFlowDensity"):
        TrajectoryDisplay.from_estimator(flow, X)
    with pytest.raises(ValueError, match="kind='series'"):
        TrajectoryDisplay.from_estimator(net, X, kind="series")
    with pytest.raises(ValueError, match="7 is not there: the state has 3"):
        TrajectoryDisplay.from_estimator(net, X, components=[7])
    with pytest.raises(ValueError, match="'z' is not there"):
        TrajectoryDisplay.from_estimator(series.model, series.panel, series=["z"])
    with pytest.raises(ValueError, match="y has 2 values for 3 rows"):
        TrajectoryDisplay.from_estimator(net, X, y=[0, 1])
    with pytest.raises(ValueError, match="fitted to targets"):
        model = LatentODERegressor(1, (4,), encoder_layer_sizes=(4,), max_iter=1, random_state=0)
        TrajectoryDisplay.from_estimator(model.fit(series.panel, np.arange(6.0)), series.panel)
