"""What ODENetClassifier and ODENetRegressor promise beyond scikit-learn's protocol."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_iris, load_wine, make_moons
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import train_test_split

from skode import ODENetClassifier, ODENetRegressor
from skode.exceptions import DeviceError, DivergenceError, FieldError, SolverError
from skode.fields import MLPField
from skode.training import loop

# Short fits warn that they are short; what is tested here is something else.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")

QUICK = {"max_iter": 15, "n_members": 2, "random_state": 0}


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def _split(load):
    X, y = load(return_X_y=True)
    return train_test_split(X, y, random_state=0, stratify=y if load is not load_diabetes else None)


# --- it learns ---


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n_members": 1},
        {"gradient": "adjoint", "n_members": 2},
        {"gradient": "reversible", "n_members": 2, "max_iter": 30},
        {"method": "rk4", "n_members": 2},
        {"method": "euler", "step_size": 0.25, "n_members": 2},
        {"method": "tsit5", "n_members": 2},
        {"order": 2, "n_members": 2},
        {"augment_dim": 3, "n_members": 2},
        {"augment_dim": 3, "order": 2, "n_members": 2},
        {"energy_penalty": 0.01, "n_members": 2},
        {"time_dependent": False, "n_members": 2},
        {"activation": "softplus", "hidden_layer_sizes": (16, 16), "n_members": 2},
        {"input_encoding": "piecewise", "n_members": 2},
        {"input_encoding": "standard", "n_members": 2},
        {"hidden_layer_sizes": 24, "n_members": 3},
        {"dtype": "float32"},
        {"early_stopping": False, "max_iter": 60},
    ],
    ids=str,
)
def test_wine_is_learned_with(arguments):
    X_train, X_test, y_train, y_test = _split(load_wine)
    net = ODENetClassifier(random_state=0, **{"max_iter": 60, **arguments}).fit(X_train, y_train)
    assert net.score(X_test, y_test) > 0.9
    assert (net.solver_stats(X_test)["status"] == 0).all()


def test_a_thousand_scales_of_targets_and_columns_make_no_difference():
    X_train, X_test, y_train, y_test = _split(load_diabetes)
    plain = ODENetRegressor(random_state=0, max_iter=40).fit(X_train, y_train)
    scale = 10.0 ** np.linspace(-12, 12, X_train.shape[1])
    scaled = ODENetRegressor(random_state=0, max_iter=40).fit(X_train * scale, y_train * 1e6)
    assert plain.score(X_test, y_test) > 0.2
    np.testing.assert_allclose(scaled.predict(X_test * scale) / 1e6, plain.predict(X_test), rtol=1e-3)


def test_images_are_learned_by_a_convolutional_field():
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X[:900], y[:900], random_state=0, stratify=y[:900])
    net = ODENetClassifier((8,), image_shape=(1, 8, 8), max_iter=15, random_state=0, dtype="float32")
    assert net.fit(X_train, y_train).score(X_test, y_test) > 0.85
    pair = ODENetClassifier((4,), image_shape=(1, 8, 8), n_members=2, augment_dim=1, max_iter=2, random_state=0)
    assert pair.fit(X_train[:200], y_train[:200]).predict_proba(X_test).shape == (len(X_test), 10)


class Rotation(torch.nn.Module):
    """A field of one's own."""

    def __init__(self, n_dims):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(n_dims, 16), torch.nn.Tanh(), torch.nn.Linear(16, n_dims))

    def forward(self, t, y):
        return self.net(y) * (1 + t)


class Acceleration(torch.nn.Module):
    def __init__(self, n_dims):
        super().__init__()
        self.net = torch.nn.Linear(2 * n_dims, n_dims)

    def forward(self, t, y):
        return torch.tanh(self.net(y))


@pytest.mark.parametrize("arguments", [{"field": Rotation}, {"field": Rotation, "n_members": 2}])
def test_a_field_of_ones_own_is_learned(iris, arguments):
    net = ODENetClassifier(random_state=0, max_iter=100, **arguments).fit(*iris)
    assert net.score(*iris) > 0.9


def test_a_field_of_ones_own_may_be_an_acceleration(iris):
    net = ODENetClassifier(random_state=0, max_iter=100, field=Acceleration, order=2, augment_dim=1).fit(*iris)
    assert net.score(*iris) > 0.9
    assert net.trajectory(iris[0], [0.0, 1.0]).shape == (150, 2, 10)


def test_class_weights_move_the_decision():
    X, y = make_moons(400, noise=0.4, random_state=0)
    plain, leaning = (
        ODENetClassifier(random_state=0, max_iter=20, class_weight=weight).fit(X, y).predict(X).mean()
        for weight in (None, {0: 1, 1: 10})
    )
    assert leaning > plain + 0.1


# --- after the fit ---


def test_tolerance_method_and_limits_act_without_a_refit(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK).fit(X, y)
    fine = net.set_params(method="dopri5", rtol=1e-9, atol=1e-9).predict_proba(X)
    errors, costs = [], []
    for rtol in (1e-1, 1e-3, 1e-5, 1e-7):
        net.set_params(rtol=rtol, atol=rtol / 10)
        errors.append(abs(net.predict_proba(X) - fine).max())
        costs.append(net.solver_stats(X)["n_evals"].mean())
    assert errors[-1] < 1e-6 < errors[0] and sorted(errors, reverse=True) == errors
    assert sorted(costs) == costs and costs[-1] > costs[0]


def test_coarse_and_fine_predictions_agree():
    X_train, X_test, y_train, _ = _split(load_wine)
    net = ODENetClassifier(random_state=0).fit(X_train, y_train)
    coarse = net.set_params(rtol=1e-2).predict_proba(X_test)
    fine = net.set_params(rtol=1e-6).predict_proba(X_test)
    assert abs(coarse - fine).max() < 0.01


def test_the_network_stays_as_it_was_fitted_when_other_arguments_change(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK).fit(X, y)
    before = net.predict_proba(X)
    net.set_params(hidden_layer_sizes=(3,), activation="relu", n_members=5, t1=2.0, gradient="adjoint")
    np.testing.assert_array_equal(net.predict_proba(X), before)


def test_a_trajectory_starts_at_the_initial_state_and_ends_where_predictions_are_read(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK, augment_dim=2).fit(X, y).set_params(rtol=1e-8, atol=1e-8)
    path = net.trajectory(X, np.linspace(0, 1, 5), member=1)
    assert path.shape == (150, 5, 6)
    assert (path[:, 0, 4:] == 0).all() and not (path[:, -1, 4:] == 0).all()
    whole = [net.trajectory(X, [1.0], member=m)[:, 0] for m in range(2)]
    weight, bias = net._net.arrays["head.weight"], net._net.arrays["head.bias"]
    logits = np.stack([whole[m] @ weight[m] + bias[m] for m in range(2)])
    proba = np.exp(logits - logits.max(axis=2, keepdims=True))
    proba = (proba / proba.sum(axis=2, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(proba, net.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("t", [[-0.1, 0.5], [0.5, 1.1], [0.5, 0.2], [], [np.nan]])
def test_times_outside_of_the_path_are_refused(iris, t):
    net = ODENetClassifier(**QUICK).fit(*iris)
    with pytest.raises(ValueError, match="t must"):
        net.trajectory(iris[0], t)
    with pytest.raises(ValueError, match="member=2"):
        net.trajectory(iris[0], [0.5], member=2)


def test_statistics_have_a_row_for_each_row_with_its_index(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK).fit(X, y)
    frame = pd.DataFrame(X, index=[f"flower {i}" for i in range(150)])
    stats = net.solver_stats(frame)
    assert list(stats.columns) == ["n_evals", "n_steps", "n_rejected", "status"]
    assert (stats.index == frame.index).all()
    assert (stats["n_evals"] >= 2 * 4).all()  # two members, one step of four evaluations


def test_counts_are_sums_over_members(iris):
    one, three = (ODENetClassifier(max_iter=5, n_members=n, random_state=0).fit(*iris) for n in (1, 3))
    assert three.n_evals_ == pytest.approx(3 * one.n_evals_, rel=0.5)
    assert one.n_evals_ >= 2
    n_features, n_dims, n_units, n_classes = 4, 16, 32, 3
    lift, head = (n_features + 1) * n_dims, (n_dims + 1) * n_classes
    field = (n_dims + 2) * n_units + (n_units + 2) * n_dims
    assert one.n_parameters_ == lift + field + head
    assert MLPField(n_dims, (n_units,)).layers[0].weight.shape == (n_units, n_dims + 1)


def test_a_failed_row_is_named_with_its_cure_and_statistics_still_come(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK).fit(X, y).set_params(rtol=1e-10, atol=1e-12, max_num_steps=3)
    with pytest.raises(SolverError, match=r"150 rows.*row 0.*t=.*max_num_steps.*rtol") as caught:
        net.predict(X)
    assert caught.value.rows == tuple(range(150))
    assert (net.solver_stats(X)["status"] == 1).all()


# --- training ---


def test_warm_start_goes_on_from_where_it_was(iris):
    X, y = iris
    net = ODENetClassifier(max_iter=30, n_members=2, random_state=0, warm_start=True).fit(X, y)
    first = net.loss_curve_[0], net.loss_curve_[-1]
    net.set_params(max_iter=2).fit(X, y)
    assert net.loss_curve_[0] < (first[0] + first[1]) / 2
    with pytest.raises(ValueError, match="classes"):
        net.fit(X, np.where(y == 2, 7, y))


def test_incremental_training_learns_and_keeps_its_momentum(iris):
    X, y = iris
    net = ODENetClassifier(random_state=0, n_members=2)
    rng = np.random.default_rng(0)
    for i in range(40):
        rows = rng.permutation(150)[:100]
        net.partial_fit(X[rows], y[rows], classes=[0, 1, 2] if i == 0 else None)
    assert net.score(X, y) > 0.9
    assert net.n_iter_ == 40 == len(net.loss_curve_)
    with pytest.raises(ValueError, match="classes"):
        ODENetClassifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="early_stopping"):
        ODENetClassifier(early_stopping=True).partial_fit(X, y, classes=[0, 1, 2])


def test_incremental_training_may_miss_classes_in_a_chunk(iris):
    X, y = iris
    net = ODENetClassifier(random_state=0, n_members=1).partial_fit(X[:60], y[:60], classes=[0, 1, 2])
    assert net.predict_proba(X).shape == (150, 3)
    regressor = ODENetRegressor(random_state=0, n_members=1)
    for _ in range(3):
        regressor.partial_fit(X[:, :3], X[:, 3])
    assert regressor.n_iter_ == 3


def test_early_stopping_is_on_from_a_hundred_rows_and_keeps_the_best_weights():
    X, y = make_moons(120, noise=0.3, random_state=0)
    assert ODENetClassifier(**QUICK).fit(X, y).validation_scores_ is not None
    assert ODENetClassifier(**QUICK).fit(X[:90], y[:90]).validation_scores_ is None
    assert ODENetClassifier(early_stopping=False, **QUICK).fit(X, y).validation_scores_ is None
    with pytest.raises(ValueError, match="early_stopping"):
        ODENetClassifier(early_stopping=True).fit(X[:5], y[:5])


def test_a_warning_comes_only_while_the_loss_still_falls(iris):
    X, y = iris
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        ODENetClassifier(max_iter=1, random_state=0, early_stopping=False).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ODENetClassifier(random_state=0).fit(X, y)


def test_the_table_has_a_line_for_each_epoch(iris, capsys):
    ODENetClassifier(max_iter=3, n_members=2, random_state=0, verbose=True).fit(*iris)
    lines = capsys.readouterr().out.strip().splitlines()
    assert re.split(r"\s+", lines[0].strip()) == ["epoch", "loss", "validation", "evals/row", "seconds"]
    assert len(lines) == 4 and all(re.match(r"\s*\d+\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+[\d.]+$", line) for line in lines[1:])


def test_an_interrupt_leaves_a_usable_model(iris, monkeypatch):
    original = loop._Run._epoch

    def interrupt(self, epoch):
        if epoch == 10:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(loop._Run, "_epoch", interrupt)
    with pytest.warns(UserWarning, match="interrupted"):
        net = ODENetClassifier(n_members=2, random_state=0).fit(*iris)
    assert net.n_iter_ == 10
    assert net.score(*iris) > 0.5


def test_divergence_is_an_error_that_names_the_learning_rate(iris):
    with pytest.raises(DivergenceError, match="learning_rate_init"):
        ODENetClassifier(learning_rate_init=1e3, random_state=0).fit(*iris)
    X, y = load_diabetes(return_X_y=True)
    with pytest.raises(DivergenceError, match="learning_rate_init"):
        ODENetRegressor(learning_rate_init=1e3, random_state=0).fit(X, y)


# --- bad input ---


@pytest.mark.parametrize("Net", [ODENetClassifier, ODENetRegressor])
def test_a_failed_fit_leaves_a_fitted_model_as_it_was(Net):
    data = load_iris(as_frame=True)
    net = Net(**QUICK).fit(data.data, data.target)
    before, predictions = dict(vars(net)), net.predict(data.data)
    for X, y, arguments in (
        (data.data.to_numpy()[:, :2] * np.nan, data.target, {}),
        (data.data.to_numpy()[:, :2], data.target[:10], {}),
        (data.data.to_numpy()[:, :2], data.target, {"device": "no such device"}),
        (data.data.to_numpy()[:, :2], data.target, {"learning_rate_init": 1e3, "max_iter": 300}),
        (data.data.to_numpy()[:, :2], data.target, {"field": lambda n_dims: torch.nn.Linear(n_dims, n_dims)}),
    ):
        net.set_params(**arguments)
        with pytest.raises((ValueError, TypeError)):
            net.fit(X, y)
        net.set_params(**{name: before[name] for name in arguments})
        assert vars(net).keys() == before.keys()
        assert all(vars(net)[name] is value for name, value in before.items())
    np.testing.assert_array_equal(net.predict(data.data), predictions)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"method": "rk5"}, ValueError, "method"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"gradient": "backprop"}, ValueError, "gradient"),
        ({"device": "tpu?"}, DeviceError, "tpu"),
        ({"dtype": "int32"}, ValueError, "float32"),
        ({"dtype": "nonsense"}, ValueError, "nonsense"),
        ({"activation": "sine"}, ValueError, "activation"),
        ({"hidden_layer_sizes": (8, 0)}, ValueError, "hidden_layer_sizes"),
        ({"image_shape": (1, 3, 3)}, ValueError, "9 pixels"),
        ({"image_shape": (4,)}, ValueError, "channels, height, width"),
        ({"field": MLPField(4)}, TypeError, "instance"),
        pytest.param({"field": lambda n_dims: "net"}, FieldError, "Module", id="field that makes no module"),
        ({"order": 3}, ValueError, "order"),
        ({"input_encoding": "piecewise", "augment_dim": 2}, ValueError, "input_encoding"),
        ({"n_members": 0}, ValueError, "n_members"),
    ],
    ids=str,
)
def test_an_argument_that_makes_no_sense_is_named(iris, arguments, error, match):
    with pytest.raises(error, match=match):
        ODENetClassifier(**{**QUICK, **arguments}).fit(*iris)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_an_absent_device_is_named_in_fit_and_in_predictions(iris):
    with pytest.raises(DeviceError, match="not available"):
        ODENetClassifier(device="cuda", **QUICK).fit(*iris)
    net = ODENetClassifier(**QUICK).fit(*iris)
    with pytest.raises(DeviceError, match="not available"):
        net.set_params(device="cuda:1").predict(iris[0])


class WrongShape(torch.nn.Module):
    def __init__(self, n_dims):
        super().__init__()
        self.map = torch.nn.Linear(n_dims, n_dims + 1)

    def forward(self, t, y):
        return self.map(y)


class NotANumber(torch.nn.Module):
    def __init__(self, n_dims):
        super().__init__()
        self.map = torch.nn.Linear(n_dims, n_dims)

    def forward(self, t, y):
        return self.map(y) * torch.nan


def test_a_users_field_that_breaks_the_protocol_is_named(iris):
    with pytest.raises(FieldError, match=r"WrongShape returned shape \(.*, 17\)"):
        ODENetClassifier(field=WrongShape, **{**QUICK, "n_members": 1}).fit(*iris)
    with pytest.raises(SolverError, match="NaN or infinite"):
        ODENetClassifier(field=NotANumber, **{**QUICK, "n_members": 1}).fit(*iris)


@pytest.mark.parametrize("Net", [ODENetClassifier, ODENetRegressor])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_numbers_are_refused(Net, iris, bad):
    X, y = iris[0].copy(), iris[1]
    X[3, 2] = bad
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        Net().fit(X, y)
    net = Net(**QUICK).fit(*iris)
    with pytest.raises(ValueError, match=r"NaN|infinity"):
        net.predict(X)


def test_extreme_and_constant_columns_are_harmless(iris):
    X, y = iris
    wide = np.column_stack([X[:, 0] * 1e12, X[:, 1] * 1e-12, X[:, 2:], np.full(150, 5.0), np.zeros(150)])
    net = ODENetClassifier(**{**QUICK, "max_iter": 60}).fit(wide, y)
    assert net.score(wide, y) > 0.9
    far = wide.copy()
    far[:, 0] *= 1e6
    assert np.isfinite(net.predict_proba(far)).all()


def test_shapes_that_do_not_fit_are_refused(iris):
    X, y = iris
    net = ODENetClassifier(**QUICK).fit(X, y)
    with pytest.raises(ValueError, match="4 features"):
        net.predict(X[:, :3])
    with pytest.raises(ValueError, match="one class"):
        ODENetClassifier().fit(X, np.zeros(150))
    with pytest.raises(ValueError, match="0 sample"):
        ODENetClassifier().fit(X[:0], y[:0])
    with pytest.raises(ValueError, match="class"):
        ODENetClassifier().fit(X[:1], y[:1])
    with pytest.raises(NotFittedError):
        ODENetClassifier().predict(X)
    assert ODENetRegressor(**QUICK).fit(X[:1], y[:1]).predict(X).shape == (150,)
