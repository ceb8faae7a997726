"""TrainingDisplay and ToleranceDisplay: the course of a fit, and what a tolerance costs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.metrics import get_scorer

from skode import ContinuousFlowDensity, ODENetClassifier
from skode.displays import ToleranceDisplay, TrainingDisplay
from skode.metrics import n_evals_score


def test_losses_scores_and_evaluations_of_every_epoch_are_drawn(plt, net):
    model = net[-1]
    display = TrainingDisplay.from_estimator(net)
    epochs = np.arange(1, model.n_iter_ + 1)
    expected = [
        (epochs, model.loss_curve_),
        (model.validation_epochs_, model.validation_scores_),
        (epochs, model.n_evals_curve_),
    ]
    for line, (x, values) in zip(display.lines_, expected, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), x)
        np.testing.assert_array_equal(line.get_ydata(), values)
    assert display.axes_.shape == (3, 1) and display.axes_[-1, 0].get_xlabel() == "epoch"


def test_the_last_check_of_a_flow_belongs_to_its_last_loss(plt, flow):
    display = TrainingDisplay.from_estimator(flow)
    losses, scores, evaluations = display.lines_
    assert len(losses.get_xdata()) == len(evaluations.get_xdata()) == len(flow.loss_curve_) == 8
    np.testing.assert_array_equal(scores.get_xdata(), np.arange(9))
    np.testing.assert_array_equal(scores.get_ydata(), flow.validation_scores_[-9:])


def test_a_flow_without_the_phase_of_likelihood_has_checks_before_and_after(plt, moons):
    flow = ContinuousFlowDensity((4,), objective="flow_matching", base="normal", max_iter=2, random_state=0)
    display = TrainingDisplay.from_estimator(flow.fit(moons[0]))
    np.testing.assert_array_equal(display.lines_[1].get_xdata(), [0, len(flow.loss_curve_)])
    assert len(display.lines_) == 2


def test_latent_models_have_a_score_for_each_loss(plt, series):
    losses, scores = TrainingDisplay.from_estimator(series.model).lines_
    np.testing.assert_array_equal(losses.get_xdata(), scores.get_xdata())


def test_too_few_rows_have_no_losses(plt):
    density = ContinuousFlowDensity(random_state=0).fit(np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(ValueError, match="ContinuousFlowDensity has no losses"):
        TrainingDisplay.from_estimator(density)


@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_scores_and_costs_are_those_of_the_tolerances(plt, net, moons, scoring):
    before = pickle.dumps(net)
    display = ToleranceDisplay.from_estimator(net, *moons, rtol=[1e-1, 1e-5], scoring=scoring)
    assert pickle.dumps(net) == before
    own = pickle.loads(before)
    for k, rtol in enumerate([1e-1, 1e-5]):
        own.set_params(odenetclassifier__rtol=rtol)
        score = own.score(*moons) if scoring is None else get_scorer(scoring)(own, *moons)
        assert display.score[k] == score and display.cost[k] == n_evals_score(own, moons[0])
    np.testing.assert_array_equal(
        display.score_line_.get_xydata(), np.column_stack([[1e-5, 1e-1], display.score[::-1]])
    )
    np.testing.assert_array_equal(display.cost_line_.get_ydata(), display.cost[::-1])
    assert display.cost[0] < display.cost[1] and display.ax_.xaxis_inverted()


def test_atol_follows_on_request(plt, net, moons):
    fixed, scaled = (
        ToleranceDisplay.from_estimator(net, *moons, rtol=[1e-6], scale_atol=scale).cost[0] for scale in (False, True)
    )
    assert fixed < scaled


def results(**more):
    """Of a search over two tolerances and another parameter."""
    return {
        "param_net__rtol": np.ma.array([1e-1, 1e-3, 1e-1, 1e-3], dtype=object),
        "param_net__alpha": np.ma.array([0.0, 0.0, 1.0, 1.0], dtype=object),
        "mean_test_score": np.array([0.6, 0.9, 0.7, 0.8]),
        "std_test_score": np.array([0.1, 0.2, 0.3, 0.4]),
        "mean_score_time": np.array([1.0, 2.0, 3.0, 4.0]),
        "mean_fit_time": np.array([10.0, 20.0, 30.0, 40.0]),
        **more,
    }


def test_a_search_shows_the_best_setting_of_each_tolerance(plt):
    display = ToleranceDisplay.from_cv_results(results())
    np.testing.assert_array_equal(display.score_line_.get_ydata(), [0.9, 0.7])
    np.testing.assert_array_equal(display.cost_line_.get_ydata(), [2.0, 3.0])
    band = display.band_.get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4, 1.1))
    assert display.cost_name == "score time [s]"
    halving = ToleranceDisplay.from_cv_results(results(iter=np.array([0, 0, 0, 1])), cost="fit_time")
    np.testing.assert_array_equal(halving.score, [0.8, 0.7])
    np.testing.assert_array_equal(halving.cost, [40.0, 30.0])


def test_the_cost_of_a_search_may_be_a_metric(plt):
    evals = {"mean_test_evals": np.array([4.0, 7.0, 5.0, 8.0])}
    display = ToleranceDisplay.from_cv_results(results(**evals), cost="evals")
    np.testing.assert_array_equal(display.cost, [7.0, 5.0])


def test_what_was_not_searched_is_named(plt, moons):
    with pytest.raises(ValueError, match="param='atol' was not searched"):
        ToleranceDisplay.from_cv_results(results(), param="atol")
    with pytest.raises(ValueError, match="no 'mean_test_evals'"):
        ToleranceDisplay.from_cv_results(results(), cost="evals")


def test_evaluations_are_kept_by_partial_fit_too(moons):
    model = ODENetClassifier((4,), n_members=1, random_state=0)
    for _ in range(3):
        model.partial_fit(*moons, classes=[0, 1])
    assert len(model.n_evals_curve_) == len(model.loss_curve_) == 3
    assert model.n_evals_curve_[-1] == model.n_evals_ > 0
    assert model.validation_epochs_ is None
