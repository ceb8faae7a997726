"""scikit-learn's callbacks and our own in all estimators."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.callback import CallbackContext, ProgressBar, ScoringMonitor
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skode import ContinuousFlowDensity, ContinuousFlowRegressor, LatentODERegressor, ODENetClassifier, ODENetRegressor
from skode.callbacks import EvaluationRecorder, TrajectoryRecorder, ValidationMonitor
from skode.exceptions import DivergenceError, SolverError
from skode.runtime import Peers, together
from tests.estimators.series import SMALL, panel_of

pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 2))
Y = X[:, 0] + 0.1 * RNG.normal(size=30)
LABELS = np.where(Y > 0, "up", "down")
PANEL = panel_of(4, 0)

NET = {"max_iter": 3, "n_members": 2, "random_state": 0}
FLOW = {
    "max_iter": 1,
    "hidden_layer_sizes": (4,),
    "early_stopping": True,
    "validation_fraction": 0.3,
    "random_state": 0,
}
CASES = {
    "classifier": (ODENetClassifier(**NET), (X, LABELS), "predict_proba"),
    "validated regressor": (ODENetRegressor(**NET, early_stopping=True), (X, Y), "predict"),
    "density": (ContinuousFlowDensity(**FLOW), (X[:20],), "score_samples"),
    "density of two": (ContinuousFlowDensity(**FLOW, n_members=2, base="normal"), (X[:20],), "score_samples"),
    # So few rows have no location, which would be trained for 50 epochs.
    "conditional density": (ContinuousFlowRegressor(**FLOW, n_members=1), (X[:9], Y[:9]), "predict"),
    "series": (LatentODERegressor(max_iter=20, random_state=0, **SMALL), (PANEL,), "transform"),
    "targets of series": (LatentODERegressor(max_iter=20, random_state=0, **SMALL), (PANEL, Y[:4]), "predict"),
}
each_case = pytest.mark.parametrize("case", CASES)
fitted_without = {}


class Witness:
    """Notes the hooks that are called, predicts with each model that it is shown, and stops at the n-th end."""

    def __init__(self, X=None, method="predict", stop_at=None):
        self.events, self.predictions = [], []
        self._X, self._method, self._stop_at = X, method, stop_at

    def setup(self, estimator, context):
        self.events.append(("setup", context.task_name))

    def teardown(self, estimator, context):
        self.events.append(("teardown", context.task_name))

    def on_fit_task_begin(self, estimator, context):
        self.events.append(("begin", context.task_name))
        assert context.parent is None or len(context.parent._children_map) <= context.parent.max_subtasks

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
        self.events.append(("end", context.task_name))
        if fitted_estimator is not None and self._X is not None:
            self.predictions.append(getattr(fitted_estimator, self._method)(self._X))
        return len(self.named("end")) == self._stop_at

    def named(self, hook):
        return [name for event, name in self.events if event == hook]


def plainly_fitted(case):
    if case not in fitted_without:
        estimator, data, _ = CASES[case]
        fitted_without[case] = clone(estimator).fit(*data)
    return fitted_without[case]


@each_case
def test_callbacks_see_all_tasks_and_change_no_bit(case):
    estimator, data, method = CASES[case]
    witness, plain = Witness(data[0], method), plainly_fitted(case)
    watched = clone(estimator).set_callbacks(witness).fit(*data)
    expected = getattr(plain, method)(data[0])
    np.testing.assert_array_equal(getattr(watched, method)(data[0]), expected)
    np.testing.assert_array_equal(witness.predictions[-1], expected)
    assert witness.events[:2] == [("setup", "fit"), ("begin", "fit")]
    assert witness.events[-2:] == [("end", "fit"), ("teardown", "fit")]
    assert sorted(witness.named("begin")) == sorted(witness.named("end"))
    assert len(witness.named("end")) >= 3
    assert vars(watched).keys() - vars(plain).keys() == {"_skl_callbacks"}
    for name in ("n_iter_", "loss_curve_", "validation_scores_", "best_loss_", "n_evals_", "n_parameters_"):
        assert getattr(watched, name) == getattr(plain, name)


# Those of several members and of two trainings have tests of their own.
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("density of two", "series")])
def test_a_fit_that_a_callback_ends_gives_the_model_that_it_was_shown(case):
    estimator, data, method = CASES[case]
    # The conditional density's first part, its location, shows no model yet.
    witness = Witness(data[0], method, stop_at=2 if case == "conditional density" else 1)
    stopped = clone(estimator).set_callbacks(witness).fit(*data)
    shown, *_, last = witness.predictions
    np.testing.assert_array_equal(getattr(stopped, method)(data[0]), shown)
    np.testing.assert_array_equal(last, shown)
    assert witness.events[-2:] == [("end", "fit"), ("teardown", "fit")]
    assert stopped.n_iter_ < plainly_fitted(case).n_iter_ or case == "conditional density"


def test_a_stop_in_the_second_training_of_few_series_leaves_the_first():
    estimator, data, _ = CASES["series"]
    witness = Witness(PANEL, "transform", stop_at=3)
    stopped = clone(estimator).set_callbacks(witness).fit(*data)
    assert witness.named("end") == ["round", "round", "round", "refit", "fit"]
    np.testing.assert_array_equal(stopped.transform(PANEL), witness.predictions[1])


def test_the_end_of_a_member_ends_the_fit_if_a_callback_says_so():
    estimator, data, _ = CASES["density of two"]
    witness = Witness(X, "score_samples", stop_at=3)
    stopped = clone(estimator).set_callbacks(witness).fit(*data)
    assert witness.named("end") == ["round", "round", "member", "fit"]
    np.testing.assert_array_equal(stopped.score_samples(X), witness.predictions[2])


def test_training_of_a_location_is_part_of_the_fit():
    class Names(Witness):
        max_propagation_depth = None

        def on_fit_task_begin(self, estimator, context):
            self.events.append(("begin", f"{context.estimator_name} {context.source_task_name or context.task_name}"))

    names = Names()
    # Location training is stopped by the first of its epochs, the flow by its first round.
    names.on_fit_task_end = lambda estimator, context: True
    model = ContinuousFlowRegressor(**FLOW, n_members=1).set_callbacks(names).fit(X[:12], Y[:12])
    expected = ["ContinuousFlowRegressor fit", "FoldedRegressor location", "FoldedRegressor epoch"]
    assert names.named("begin") == [*expected, "ContinuousFlowRegressor round"]
    assert model.location_.n_iter_ == 1 and not hasattr(model.location_, "_skl_callbacks")


@pytest.mark.parametrize("hook", ["setup", "on_fit_task_begin", "on_fit_task_end"])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("case", ["classifier", "density"])
def test_an_error_in_a_hook_leaves_the_estimator_as_it_was_and_tears_down(case, fitted, hook):
    estimator, data, _ = CASES[case]
    estimator = clone(plainly_fitted(case)) if not fitted else plainly_fitted(case).__class__(**estimator.get_params())
    if fitted:
        vars(estimator).update(vars(plainly_fitted(case)))
    witness = Witness()

    def fail(*_, **__):
        raise OSError("the disk is full")

    setattr(witness, hook, fail)
    estimator.set_callbacks(witness)
    before = dict(vars(estimator))
    with pytest.raises(OSError, match="disk is full"):
        estimator.fit(*data)
    assert vars(estimator) == before
    assert witness.named("teardown") == ["fit"]


@pytest.mark.parametrize("case", ["validated regressor", "series"])
def test_an_error_in_a_hook_is_not_taken_for_a_diverged_training(case):
    estimator, data, _ = CASES[case]
    witness = Witness()

    def fail(*_, **__):
        raise SolverError("of the hook")

    witness.on_fit_task_end = fail
    with pytest.raises(SolverError, match="of the hook"):
        clone(estimator).set_callbacks(witness).fit(*data)


def test_a_training_that_diverges_tears_callbacks_down():
    witness = Witness()
    net = ODENetRegressor(**NET | {"max_iter": 50}, learning_rate_init=1e9).set_callbacks(witness)
    before = dict(vars(net))
    with pytest.raises(DivergenceError):
        net.fit(X, Y)
    assert vars(net) == before
    assert witness.events[-1] == ("teardown", "fit")


def test_without_callbacks_there_are_no_tasks_but_the_fit(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an epoch became a task")

    monkeypatch.setattr(CallbackContext, "subcontext", refuse)
    ODENetClassifier(**NET).fit(X, LABELS)


def test_partial_fit_is_a_task_of_one_epoch():
    witness = Witness(X)
    net = ODENetRegressor(**NET).set_callbacks(witness)
    net.partial_fit(X, Y).partial_fit(X, Y)
    assert witness.named("end") == ["epoch", "partial_fit"] * 2
    np.testing.assert_array_equal(witness.predictions[-2], net.predict(X))


# --- scikit-learn's own callbacks ---


@pytest.fixture(scope="module")
def searched():
    """A search by two workers with callbacks of all kinds: their records, and what the progress bar printed."""
    callbacks = [
        ScoringMonitor(scoring="accuracy"),
        EvaluationRecorder(),
        TrajectoryRecorder(X[:4], [0.0, 1.0], every=2),
    ]
    net = ODENetClassifier(**NET | {"tol": 0.0}).set_callbacks(*callbacks)
    pipeline = make_pipeline(StandardScaler(), net)
    search = GridSearchCV(pipeline, {"odenetclassifier__rtol": [1e-1]}, cv=2, n_jobs=2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(X, LABELS)
    return search, callbacks, printed.getvalue()


def test_progress_bars_are_nested_through_a_search_by_two_workers(searched):
    _, _, printed = searched
    bars = [line for line in printed.splitlines() if "100%" in line]
    assert sum("GridSearchCV - fit " in bar for bar in bars) == 1
    assert sum("ODENetClassifier - fit" in bar for bar in bars) == 3  # two folds and the refit
    depths = [len(bar) - len(bar.lstrip()) for bar in bars if "ODENetClassifier" in bar]
    assert min(depths) > 0


@pytest.mark.parametrize(("number", "rows"), [(0, 3 + 1), (1, 3), (2, 2)])
def test_records_of_workers_come_back(searched, number, rows):
    search, callbacks, _ = searched
    records = callbacks[number].get_logs().data_as_pandas
    assert len(records) == 3 * rows
    assert records["task_id_path"].is_unique
    column = ["accuracy", "loss", "trajectory"][number]
    assert records[column].notna().all()
    net = search.best_estimator_[-1]
    refit = records[records["parent_task_id_path"].map(lambda path: path[0] == 0 and path[1] == 1)]
    assert len(refit) == rows
    if column == "accuracy":
        assert refit["accuracy"].iloc[0] == search.score(X, LABELS)
    elif column == "loss":
        np.testing.assert_array_equal(refit["loss"], net.loss_curve_)
    else:
        np.testing.assert_array_equal(refit["trajectory"].iloc[-1], net.trajectory(X[:4], [0.0, 1.0]))


def test_the_scoring_monitor_scores_each_epoch_by_names_and_weights():
    weights = RNG.uniform(size=30)
    frame = pd.DataFrame(X, columns=["a", "b"])
    monitor = ScoringMonitor(scoring=["r2", "neg_mean_squared_error"])
    net = ODENetRegressor(**NET).set_callbacks(monitor).fit(frame, Y, sample_weight=weights)
    records = monitor.get_logs().data_as_pandas
    assert list(records["task_name"]) == ["fit", "epoch", "epoch", "epoch"]
    assert records["r2"].iloc[-1] == records["r2"].iloc[0] == net.score(frame, Y, sample_weight=weights)
    assert records["r2"].nunique() == 3


# --- our own ---


def test_training_and_validation_scores_are_monitored_together():
    monitor, own = ValidationMonitor(X[20:], Y[20:]), ValidationMonitor(scoring="r2")
    net = ODENetRegressor(**NET, early_stopping=True).set_callbacks(monitor, own).fit(X[:20], Y[:20])
    records, records_of_own = monitor.get_logs().data_as_pandas, own.get_logs().data_as_pandas
    assert records["training"].iloc[-1] == net.score(X[:20], Y[:20]) == records_of_own["training"].iloc[-1]
    assert records["validation"].iloc[-1] == net.score(X[20:], Y[20:])
    assert list(records_of_own["validation"][1:]) == net.validation_scores_


def test_a_flow_is_recorded_from_check_to_check_without_targets():
    recorder, monitor = EvaluationRecorder(), ValidationMonitor(X[20:])
    flow = clone(CASES["density"][0]).set_callbacks(recorder, monitor).fit(X[:20])
    records, scores = recorder.get_logs().data_as_pandas, monitor.get_logs().data_as_pandas
    assert records["epoch"].iloc[-1] == flow.n_iter_
    assert set(records["validation_score"]) <= set(flow.validation_scores_)
    assert scores[["training", "validation"]].iloc[0].tolist() == [flow.score(X[:20]), flow.score(X[20:])]
    assert len(scores) == len(records) + 1


def test_a_latent_ode_is_recorded_from_check_to_check_without_targets():
    recorder, paths, monitor = (
        EvaluationRecorder(),
        TrajectoryRecorder(PANEL[:3], [0.0, 8.0], every=2),
        ValidationMonitor(),
    )
    series = clone(CASES["series"][0]).set_callbacks(recorder, paths, monitor).fit(PANEL)
    records, scores = recorder.get_logs().data_as_pandas, monitor.get_logs().data_as_pandas
    assert list(records["epoch"])[:2] == [10, 20]
    first = records[records["task_id_path"].map(len) == 2]
    assert list(first["loss"]) == series.loss_curve_
    assert list(first["validation_score"]) == series.validation_scores_ == list(scores["validation"][1:])
    assert records["n_evals"].isna().all() and scores["training"].notna().all()
    (record,) = paths.get_logs().data
    assert (record["epoch"], record["trajectory"].shape) == (10, (3, 2, 1))


def test_where_nothing_is_held_out_the_estimators_own_validation_is_unknown():
    monitor = ValidationMonitor()
    weights = np.arange(30.0)
    density = ContinuousFlowDensity(max_iter=1, n_members=1).set_callbacks(monitor).fit(X, sample_weight=weights)
    records = monitor.get_logs().data_as_pandas
    assert records["training"].iloc[-1] == density.score(X, sample_weight=weights)
    net_monitor = ValidationMonitor()
    ODENetClassifier(**NET).set_callbacks(net_monitor).fit(X, LABELS)
    assert net_monitor.get_logs().data_as_pandas["validation"].isna().all()


def test_evaluations_and_losses_of_all_epochs_are_recorded():
    recorder = EvaluationRecorder()
    net = ODENetRegressor(**NET, early_stopping=True).set_callbacks(recorder).fit(X, Y)
    records = recorder.get_logs().data_as_pandas
    assert list(records["epoch"]) == [1, 2, 3]
    assert list(records["loss"]) == net.loss_curve_
    assert list(records["validation_score"]) == net.validation_scores_
    assert records["n_evals"].iloc[-1] == net.n_evals_
    assert (records["seconds"].diff().dropna() > 0).all()


def test_the_way_of_a_densitys_rows_is_recorded():
    recorder = TrajectoryRecorder(X[:3], [0.0, 1.0])
    ContinuousFlowDensity(**FLOW).set_callbacks(recorder).fit(X)
    path = recorder.get_logs().data[-1]["trajectory"]
    np.testing.assert_allclose(path[:, -1], X[:3])


def test_estimators_without_trajectories_and_steps_of_none_are_refused():
    with pytest.raises(TypeError, match="ContinuousFlowRegressor has no trajectories"):
        ContinuousFlowRegressor().set_callbacks(TrajectoryRecorder(X, [0.0])).fit(X, Y)
    with pytest.raises(ValueError, match="every=0"):
        TrajectoryRecorder(X, [0.0], every=0)


class Counting(Peers):
    """A process alone that keeps what it would tell others."""

    def __init__(self):
        self.told = []

    def gather(self, value):
        self.told.append("gather")
        return [value]

    def share(self, value, source=0):
        self.told.append("share")
        return value

    def add_up(self, number):
        self.told.append("add_up")
        return number

    def total(self, tensors):
        self.told.append("total")
        return list(tensors)


def test_callbacks_of_one_process_do_not_make_it_say_more_than_the_others():
    told = []
    for callbacks in ([], [ValidationMonitor(), EvaluationRecorder()]):
        with together(peers := Counting()):
            ODENetClassifier(max_iter=2, n_members=1, tol=1.0, random_state=0).set_callbacks(*callbacks).fit(X, LABELS)
        told.append(peers.told)
    assert told[0] == told[1] and told[0]
