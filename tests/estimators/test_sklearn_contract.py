"""scikit-learn's own checks, and what its users take for granted."""

from __future__ import annotations

import io
import pickle
import pickletools

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from skode import ODENetClassifier, ODENetRegressor
from skode.metrics import n_evals_score, neg_n_evals_score


@parametrize_with_checks([ODENetClassifier(), ODENetRegressor()])
def test_scikit_learns_checks_pass_with_default_arguments(estimator, check):
    check(estimator)


@pytest.mark.parametrize(("estimator", "least"), [(ODENetClassifier, 62), (ODENetRegressor, 55)])
def test_no_check_is_dodged(estimator, least):
    names = [row["check_name"] for row in _collect(estimator())]
    tags = estimator().__sklearn_tags__()
    assert len(names) >= least
    assert not tags.non_deterministic and not tags.no_validation and not tags._skip_test
    scored = tags.classifier_tags or tags.regressor_tags
    assert not scored.poor_score


def _collect(estimator):
    from sklearn.utils.estimator_checks import estimator_checks_generator

    return [{"check_name": check.func.__name__} for _, check in estimator_checks_generator(estimator)]


@pytest.mark.parametrize("estimator", [ODENetClassifier(dtype="float32"), ODENetRegressor(dtype="float32")])
def test_in_float32_only_sample_weight_equivalence_may_fail(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    assert failed <= {"check_sample_weight_equivalence_on_dense_data"}


def _classification(dtype=np.float64):
    X, y = load_iris(return_X_y=True)
    return X.astype(dtype), y


# Short fits warn that they are short; what is tested here is something else.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")

QUICK = {"max_iter": 15, "n_members": 2, "random_state": 0}


def test_a_search_over_tolerances_works_in_a_pipeline_on_a_frame_with_string_labels_and_routed_weights():
    data = load_wine(as_frame=True)
    y = data.target.map({0: "Barolo", 1: "Grignolino", 2: "Barbera"})
    weights = np.linspace(0.5, 1.5, len(y))
    with sklearn.config_context(enable_metadata_routing=True):
        net = ODENetClassifier(**QUICK).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        grid = {"odenetclassifier__rtol": [1e-1, 1e-2]}
        search = GridSearchCV(make_pipeline(scaler, net), grid, cv=2, n_jobs=2)
        search.fit(data.data, y, sample_weight=weights)
    assert set(search.predict(data.data)) <= set(y)
    assert search.best_score_ > 0.8


def test_a_halving_search_works():
    X, y = _classification()
    net = make_pipeline(StandardScaler(), ODENetClassifier(**QUICK))
    search = HalvingGridSearchCV(net, {"odenetclassifier__rtol": [1e-1, 1e-2]}, cv=2, random_state=0)
    assert search.fit(X, y).best_score_ > 0.6


def test_cost_is_a_scorer_in_cross_validation_and_in_a_pipeline():
    X, y = _classification()
    scoring = {"accuracy": "accuracy", "cost": n_evals_score, "thrift": neg_n_evals_score}
    for net in (ODENetClassifier(**QUICK), make_pipeline(StandardScaler(), ODENetClassifier(**QUICK))):
        scores = cross_validate(net, X, y, cv=2, scoring=scoring)
        assert (scores["test_cost"] >= 2 * 3).all()
        np.testing.assert_array_equal(scores["test_thrift"], -scores["test_cost"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "round_trip",
    [
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: _through_joblib(net),
        lambda net: clone(net).fit(*_classification(net.dtype_)),
    ],
    ids=["pickle", "joblib", "clone and fit"],
)
def test_round_trips_predict_the_same_bits(round_trip, dtype):
    X, y = _classification(dtype)
    net = ODENetClassifier(**QUICK).fit(X, y)
    np.testing.assert_array_equal(round_trip(net).predict_proba(X), net.predict_proba(X))


def _through_joblib(net):
    buffer = io.BytesIO()
    joblib.dump(net, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


@pytest.mark.parametrize("estimator", [ODENetClassifier(**QUICK), ODENetRegressor(**QUICK)])
def test_the_pickle_holds_nothing_of_torch(estimator):
    X, y = _classification()
    names = [arg for op, arg, _ in pickletools.genops(pickle.dumps(estimator.fit(X, y))) if isinstance(arg, str)]
    assert not [name for name in names if name == "torch" or name.startswith("torch.")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("method", ["auto", "tsit5", "rk4"])
def test_a_row_alone_and_among_a_thousand_is_predicted_alike(dtype, tolerance, method):
    X, y = load_breast_cancer(return_X_y=True)
    X = X.astype(dtype)
    net = ODENetClassifier(**QUICK).fit(X, y).set_params(method=method)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(X), size=1000)
    crowd = X[rows] * rng.uniform(0.5, 2, size=(1000, 1)).astype(dtype)
    together = net.predict_proba(crowd)
    for i in (0, 1, 255, 256, 998, 999):
        np.testing.assert_allclose(net.predict_proba(crowd[i : i + 1])[0], together[i], rtol=tolerance, atol=0)
    order = rng.permutation(1000)
    np.testing.assert_allclose(net.predict_proba(crowd[order]), together[order], rtol=tolerance, atol=0)


@pytest.mark.parametrize("Net", [ODENetClassifier, ODENetRegressor])
def test_weights_zero_weights_and_repetition_agree(Net):
    rng = np.random.default_rng(1)
    X = rng.normal(size=(40, 3))
    y = (X[:, 0] > 0).astype(int)
    weights = rng.integers(0, 4, size=40)
    weighted = Net(random_state=0, max_iter=60).fit(X, y, sample_weight=weights)
    repeated = Net(random_state=0, max_iter=60).fit(np.repeat(X, weights, axis=0), np.repeat(y, weights))
    method = "predict_proba" if Net is ODENetClassifier else "predict"
    np.testing.assert_allclose(getattr(weighted, method)(X), getattr(repeated, method)(X), rtol=1e-7, atol=1e-9)


def test_global_generators_and_settings_are_left_alone():
    X, y = _classification()
    before = torch.get_rng_state(), np.random.get_state(), torch.get_num_threads(), torch.get_default_dtype()
    ODENetClassifier(max_iter=2, n_members=2).fit(X, y).predict(X)
    ODENetClassifier(max_iter=2, field=_Linear).fit(X, y).predict(X)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True))
    assert (before[2], before[3]) == (torch.get_num_threads(), torch.get_default_dtype())


class _Linear(torch.nn.Module):
    def __init__(self, n_dims):
        super().__init__()
        self.map = torch.nn.Linear(n_dims, n_dims)

    def forward(self, t, y):
        return torch.tanh(self.map(y))


def test_the_same_random_state_gives_the_same_bits_with_a_users_field_too():
    X, y = _classification()
    for arguments in ({"n_members": 3}, {"field": _Linear}):
        a, b = (ODENetClassifier(max_iter=3, random_state=7, **arguments).fit(X, y) for _ in range(2))
        np.testing.assert_array_equal(a.predict_proba(X), b.predict_proba(X))


@pytest.mark.parametrize("kind", ["read-only", "fortran", "strided", "tensor", "Float64", "Float32", "Int64"])
def test_any_container_of_numbers_is_taken(kind):
    X, y = _classification()
    expected = ODENetClassifier(**QUICK).fit(X, y).predict_proba(X)
    if kind == "read-only":
        given = X.copy()
        given.setflags(write=False)
    elif kind == "fortran":
        given = np.asfortranarray(X)
    elif kind == "strided":
        given = np.repeat(X, 2, axis=0)[::2]
    elif kind == "tensor":
        given = torch.tensor(X, requires_grad=True)
    else:
        scaled = (X * 10).round() if kind == "Int64" else X
        given = pd.DataFrame(scaled).astype(kind)
        expected = ODENetClassifier(**QUICK).fit(given.to_numpy(dtype=_plain(kind)), y).predict_proba(scaled)
    got = ODENetClassifier(**QUICK).fit(given, y).predict_proba(given)
    np.testing.assert_allclose(got, expected, rtol=1e-9 if kind != "Float32" else 1e-4)


def _plain(kind):
    return {"Float64": np.float64, "Float32": np.float32, "Int64": np.float64}[kind]


def test_columns_are_named_after_a_frame():
    data = load_iris(as_frame=True)
    net = ODENetClassifier(**QUICK).fit(data.data, data.target)
    assert list(net.feature_names_in_) == list(data.data.columns)
    with pytest.raises(ValueError, match="feature names"):
        net.predict(data.data.iloc[:, ::-1])


def test_regression_takes_several_targets():
    X, y = load_diabetes(return_X_y=True)
    both = np.column_stack([y, -2 * y + 3])
    net = ODENetRegressor(**QUICK).fit(X, both)
    assert net.predict(X).shape == both.shape
    assert np.corrcoef(net.predict(X).T)[0, 1] < -0.9
    assert net.score(X, both) > 0.3
    assert ODENetRegressor(**QUICK).fit(X, y).predict(X).shape == y.shape
