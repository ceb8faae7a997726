"""Arrays of other libraries with scikit-learn's dispatch, which SciPy has to be told of before it is imported.

``test_array_api.py`` runs this file; alone: ``SCIPY_ARRAY_API=1 python -m pytest tests/estimators/array_api.py``.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from array_api_strict import asarray as strict_array
from sklearn import config_context
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils._array_api import get_namespace_and_device, move_estimator_to
from sklearn.utils.estimator_checks import estimator_checks_generator

from skode import ContinuousFlowDensity, ContinuousFlowRegressor, LatentODERegressor, ODENetClassifier, ODENetRegressor
from skode.estimators.location import FoldedRegressor

# What is tested does not depend on how long is trained, and short fits warn that they are short.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Maximum iterations",
    "ignore:column .* is a linear combination",
    "ignore::skode.exceptions.ConvergenceWarning",
)

ESTIMATORS = [
    ODENetClassifier(max_iter=2, n_members=2, random_state=0),
    ODENetRegressor(max_iter=2, n_members=2, random_state=0),
    ContinuousFlowDensity(4, max_iter=1, random_state=0),
    ContinuousFlowRegressor(4, max_iter=1, n_members=1, random_state=0),
    LatentODERegressor(max_iter=1, random_state=0),
]
X = np.random.default_rng(0).normal(size=(24, 3))
Y = (X[:, 0] > 0).astype(np.int64)
METHODS = ["predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples", "transform", "sample"]
METHODS += ["log_density_gradient"]


@pytest.fixture(autouse=True)
def dispatch(monkeypatch):
    monkeypatch.setattr("skode.estimators.base.N_UPDATES", 2)  # of the mean of ContinuousFlowRegressor
    monkeypatch.setattr(FoldedRegressor, "_default_epochs", 2)
    with config_context(array_api_dispatch=True):
        yield


@pytest.fixture(params=ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def estimator(request):
    return clone(request.param)


CHECKS = [
    pytest.param(one, check, id="-".join([type(one).__name__, check.func.__name__, *map(str, check.keywords.values())]))
    for estimator in ESTIMATORS
    for one, check in estimator_checks_generator(estimator)
    if getattr(check, "func", check).__name__.startswith("check_array_api")
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_scikit_learns_array_api_checks_pass(estimator, check):
    with config_context(array_api_dispatch=False):  # they switch it on themselves
        check(estimator)


def test_the_checks_are_those_of_estimators_that_support_it():
    assert len(CHECKS) >= 15 * len(ESTIMATORS)  # without support there is one


@pytest.mark.parametrize("convert", [torch.tensor, strict_array], ids=["torch", "array_api_strict"])
def test_arrays_of_any_library_give_the_bits_of_numpy_in_that_library(estimator, convert):
    ours, theirs = clone(estimator).fit(X, Y), clone(estimator).fit(convert(X), convert(Y))
    compared = 0
    for name in METHODS:
        if not hasattr(ours, name):
            continue
        arguments = {"random_state": 0} if name == "sample" else {}
        rows = () if name == "sample" and isinstance(ours, ContinuousFlowDensity) else (X,)
        expected = getattr(ours, name)(*rows, **arguments)
        found = getattr(theirs, name)(*map(convert, rows), **arguments)
        assert type(found) is type(convert(X))
        np.testing.assert_array_equal(np.from_dlpack(found), expected)
        assert np.from_dlpack(found).dtype == expected.dtype
        compared += 1
    assert compared >= 1


def test_without_dispatch_tensors_give_numpy_arrays(estimator):
    with config_context(array_api_dispatch=False):
        method = "transform" if hasattr(estimator, "transform") else "predict"
        found = getattr(estimator.fit(torch.tensor(X), torch.tensor(Y)), method)(torch.tensor(X))
    assert isinstance(found, np.ndarray)


def test_no_fitted_attribute_is_a_bare_array_but_the_classes(estimator):
    fitted = vars(estimator.fit(torch.tensor(X), torch.tensor(Y)))
    assert [name for name, value in fitted.items() if hasattr(value, "__dlpack__") and name != "classes_"] == []


def test_a_tensor_that_wants_a_gradient_is_refused_by_name_of_the_cure():
    net = ODENetRegressor(max_iter=1, n_members=1).fit(torch.tensor(X), Y)
    wants = torch.tensor(X, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(24, 3\) requires a gradient.*X\.detach\(\)"):
        net.predict(wants)
    with torch.no_grad():
        assert not net.predict(wants).requires_grad
    with config_context(array_api_dispatch=False):
        assert isinstance(net.predict(wants), np.ndarray)


def test_a_fit_on_tensors_moves_to_numpy_and_back_and_pickles_as_numpy():
    density = ContinuousFlowDensity(4, max_iter=1, random_state=0).fit(torch.tensor(X))
    expected = density.score_samples(torch.tensor(X)).numpy()
    with pytest.raises(ValueError, match=r"Density\.score_samples\(\) must use .* torch on cpu; these are NumPy"):
        density.score_samples(X)
    xp, _, device = get_namespace_and_device(X)
    moved = move_estimator_to(density, xp, device)
    np.testing.assert_array_equal(moved.score_samples(X), expected)
    xp, _, device = get_namespace_and_device(torch.tensor(X))
    assert torch.equal(move_estimator_to(moved, xp, device).score_samples(torch.tensor(X)), torch.tensor(expected))
    data = pickle.dumps(density)
    assert b"_rebuild_tensor" not in data
    assert torch.equal(pickle.loads(data).score_samples(torch.tensor(X)), torch.tensor(expected))


def test_a_fit_that_fails_leaves_the_place_of_the_last_one():
    net = ODENetRegressor(max_iter=1, n_members=1).fit(X, Y)
    with pytest.raises(ValueError, match="NaN"):
        net.fit(torch.tensor(X) * torch.nan, torch.tensor(Y))
    assert isinstance(net.predict(X), np.ndarray)


def test_samples_of_a_density_can_be_scored_where_it_was_fitted():
    density = ContinuousFlowDensity(4, max_iter=1, random_state=0).fit(strict_array(X))
    samples, log_density = density.sample(4, random_state=0, return_log_density=True)
    np.testing.assert_array_equal(np.asarray(density.score_samples(samples)), np.asarray(log_density))


def test_labels_that_are_strings_stay_in_numpy():
    names = np.array(["no", "yes"])[Y]
    net = ODENetClassifier(max_iter=5, n_members=1, random_state=0).fit(torch.tensor(X), names)
    assert net.predict(torch.tensor(X)).dtype == names.dtype
    assert isinstance(net.predict_proba(torch.tensor(X)), torch.Tensor)
    assert net.score(torch.tensor(X), names) > 0.5


def test_a_pipeline_and_a_cross_validation_stay_in_torch():
    net = make_pipeline(StandardScaler(), PCA(2), ODENetClassifier(max_iter=5, n_members=1, random_state=0))
    rows, labels = torch.tensor(X), torch.tensor(Y)
    scores = cross_validate(net, rows, labels, cv=2, scoring=["accuracy", "neg_log_loss"], return_estimator=True)
    assert np.isfinite(scores["test_neg_log_loss"]).all()
    assert isinstance(scores["estimator"][0].predict(rows), torch.Tensor)


def test_series_in_a_tensor_are_predicted_in_tensors():
    series = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0))
    series[0, 1, 0] = torch.nan
    model = LatentODERegressor(max_iter=1, random_state=0).fit(series)
    for found, shape in [
        (model.predict(series), (6, 5, 2)),
        (model.predict(series, times=torch.tensor([1.0, 7.0]), return_std=True)[1], (6, 2, 2)),
        (model.sample(times=torch.tensor([1.0, 2.0]), n_samples=3), (3, 2, 2)),
    ]:
        assert isinstance(found, torch.Tensor) and found.shape == shape
    frames = model.set_output(transform="pandas").transform(series)
    assert frames.shape == (6, 10)


def test_bfloat16_is_read_as_float32():
    net = ODENetRegressor(max_iter=1, n_members=1, random_state=0).fit(torch.tensor(X).bfloat16(), Y)
    assert net.dtype_ == np.float32
