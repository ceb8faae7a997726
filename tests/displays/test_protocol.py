"""What all displays share: axes, drawing again, pipelines, a missing matplotlib, links to the documentation."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
from sklearn.linear_model import Ridge

import skode
from skode import displays
from skode.displays import DensityDisplay, ToleranceDisplay, TrainingDisplay, TrajectoryDisplay, VectorFieldDisplay


@pytest.fixture(params=["trajectory", "series", "density", "training", "tolerance", "vector_field"])
def drawn(request, plt, net, flow, series, moons):
    """A function that draws a display, and its display."""
    X, y = moons
    draw = {
        "trajectory": lambda ax=None: TrajectoryDisplay.from_estimator(net, X[:5], n_points=3, ax=ax),
        "series": lambda ax=None: TrajectoryDisplay.from_estimator(
            series.model, series.panel, series=[0], n_points=3, ax=ax
        ),
        "density": lambda ax=None: DensityDisplay.from_estimator(flow, t=[0.0, 1.0], grid_resolution=4, ax=ax),
        "training": lambda ax=None: TrainingDisplay.from_estimator(net, ax=ax),
        "tolerance": lambda ax=None: ToleranceDisplay.from_estimator(net, X, y, rtol=[1e-1, 1e-3], ax=ax),
        "vector_field": lambda ax=None: VectorFieldDisplay.from_estimator(net, X, grid_resolution=4, ax=ax),
    }[request.param]
    return draw, draw()


def test_a_display_knows_its_axes_and_draws_again(plt, drawn):
    _, display = drawn
    first = display.figure_
    assert display.ax_ is np.ravel(display.axes_)[0] and display.ax_.figure is first
    assert display.plot() is display and display.figure_ is not first
    with plt.style.context("dark_background"):
        display.plot().figure_.canvas.draw()


def test_a_display_stays_in_the_axes_that_it_is_given(plt, drawn):
    draw, _ = drawn
    figure, axes = plt.subplots(1, 2)
    display = draw(axes[1])
    assert display.figure_ is figure and len(plt.get_fignums()) == 2
    left = axes[0].get_position().x1
    assert all(ax.get_position().x0 > left for ax in np.ravel(display.axes_))


def test_axes_that_do_not_fit_are_refused(plt, net):
    _, axes = plt.subplots(1, 2)
    with pytest.raises(ValueError, match="ax holds 2 axes; this display has 3 x 1 panels"):
        TrainingDisplay.from_estimator(net, ax=axes)
    with pytest.raises(ValueError, match="not part of a grid"):
        TrainingDisplay.from_estimator(net, ax=plt.figure().add_axes((0, 0, 1, 1)))
    _, axes = plt.subplots(3)
    assert TrainingDisplay.from_estimator(net, ax=axes).axes_[2, 0] is axes[2]


def test_estimators_stay_as_they_are(plt, net, flow, series, moons):
    before = pickle.dumps((net, flow, series.model))
    TrajectoryDisplay.from_estimator(net, moons[0][:3], n_points=3)
    TrajectoryDisplay.from_estimator(series.model, series.panel, n_points=3)
    DensityDisplay.from_estimator(flow, t=[0.5], grid_resolution=3)
    for model, X in ((net, moons[0]), (flow, moons[0]), (series.model, series.panel)):
        VectorFieldDisplay.from_estimator(model, X, grid_resolution=3)
        TrainingDisplay.from_estimator(model)
    assert pickle.dumps((net, flow, series.model)) == before


@pytest.mark.parametrize("name", displays.__all__)
def test_a_missing_matplotlib_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = (None,) if name == "TrainingDisplay" else (None, None)
    with pytest.raises(ImportError, match=f"{name}.from_estimator requires matplotlib"):
        getattr(displays, name).from_estimator(*arguments)


@pytest.mark.parametrize("display", [TrainingDisplay, VectorFieldDisplay, DensityDisplay])
def test_estimators_of_others_are_refused(plt, display):
    with pytest.raises(TypeError, match="got Ridge"):
        display.from_estimator(Ridge().fit([[0.0], [1.0]], [0.0, 1.0]))


@pytest.mark.parametrize(
    "name",
    [
        "ContinuousFlowDensity",
        "ContinuousFlowRegressor",
        "LatentODERegressor",
        "ODENetClassifier",
        "ODENetRegressor",
    ],
)
def test_notebook_representations_link_to_the_documentation(name):
    link = f"https://skode.readthedocs.io/en/stable/api/generated/skode.{name}.html"
    assert f'href="{link}"' in getattr(skode, name)()._repr_html_()
