"""Stored estimators: of what they are made, which versions read them, and what those say that do not."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import skode
from skode import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
)
from skode.estimators import stored
from skode.exceptions import StoredModelError
from skode.models.kriging import Kernel
from skode.models.predictive import Calibration, Spread
from tests.data.make_stored_models import FLOW, FOLDER, NET, SERIES, cases

ESTIMATORS = [ODENetClassifier, ODENetRegressor, ContinuousFlowDensity, ContinuousFlowRegressor, LatentODERegressor]
# Short fits warn that they are short.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")


def through_pickle(estimator: Any) -> Any:
    return pickle.loads(pickle.dumps(estimator))


def through_joblib(estimator: Any) -> Any:
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def through_skops(estimator: Any) -> Any:
    data = skops.io.dumps(estimator)
    untrusted = skops.io.get_untrusted_types(data=data)
    return skops.io.loads(data, trusted=untrusted)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    made = cases().items()
    return {name: estimator.fit(X) if y is None else estimator.fit(X, y) for name, (estimator, X, y, _) in made}


@pytest.mark.parametrize("store", [through_pickle, through_joblib, through_skops, copy.deepcopy])
@pytest.mark.parametrize("name", cases())
def test_a_stored_estimator_predicts_the_same_bits(fitted: dict[str, Any], name: str, store: Any) -> None:
    _, X, _, method = cases()[name]
    again = store(fitted[name])
    np.testing.assert_array_equal(getattr(again, method)(X), getattr(fitted[name], method)(X))
    assert vars(again).keys() == vars(fitted[name]).keys()
    assert type(vars(again).get("dtype_")) is type(fitted[name].dtype_)


@pytest.mark.parametrize("name", cases())
def test_skops_trusts_everything_but_the_estimators_own_classes(fitted: dict[str, Any], name: str) -> None:
    for estimator in (fitted[name], cases()[name][0]):
        untrusted = skops.io.get_untrusted_types(data=skops.io.dumps(estimator))
        assert untrusted == [f"{type(estimator).__module__}.{type(estimator).__name__}"]


def test_the_network_inside_of_a_conditional_density_is_an_estimator_of_the_package() -> None:
    X = np.random.default_rng(0).normal(size=(24, 1))
    model = ContinuousFlowRegressor(**FLOW, n_members=1, dtype="float32").fit(X, X[:, 0])
    untrusted = skops.io.get_untrusted_types(data=skops.io.dumps(model))
    assert untrusted == [
        "skode.estimators.conditional.ContinuousFlowRegressor",
        "skode.estimators.location.FoldedRegressor",
    ]
    again = through_skops(model)
    assert again.location_ is again._location.mean
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


@pytest.mark.parametrize("name", cases())
def test_a_pickle_names_no_class_but_the_estimators_and_nothing_of_torch(fitted: dict[str, Any], name: str) -> None:
    words = [arg for _, arg, _ in pickletools.genops(pickle.dumps(fitted[name])) if isinstance(arg, str)]
    modules = {word for word in words if word.startswith(("skode.", "torch"))}
    assert modules == {type(fitted[name]).__module__}


def test_searches_and_pipelines_of_frames_are_stored_whole() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(40, 2)), columns=["a", "b"])
    y = np.where(frame["a"] > 0, "up", "down")
    net = make_pipeline(StandardScaler(), ODENetClassifier(**NET))
    search = GridSearchCV(net, {"odenetclassifier__rtol": [1e-1, 1e-2]}, cv=2).fit(frame, y)
    data = skops.io.dumps(search)
    other = GridSearchCV(LogisticRegression(), {"C": [1.0, 2.0]}, cv=2).fit(frame, y)
    own = set(skops.io.get_untrusted_types(data=data)) - set(skops.io.get_untrusted_types(data=skops.io.dumps(other)))
    assert own == {"skode.estimators.classifier.ODENetClassifier"}
    for again in (skops.io.loads(data, trusted=skops.io.get_untrusted_types(data=data)), through_pickle(search)):
        np.testing.assert_array_equal(again.predict_proba(frame), search.predict_proba(frame))
        assert list(again.feature_names_in_) == ["a", "b"]


def test_a_latent_ode_keeps_its_clock_and_nothing_of_the_panel() -> None:
    times = pd.date_range("2020-03-01", periods=30, tz="Europe/Berlin")
    values = np.sin(np.arange(30.0))
    rows = [pd.DataFrame({"id": i, "t": times, "v": values + i}) for i in range(3)]
    frame = pd.concat(rows, ignore_index=True)
    model = LatentODERegressor(
        **SERIES, series_id="id", time="t", origin=pd.Timestamp("2020-01-01", tz="Europe/Berlin")
    ).fit(frame)
    for again in (through_skops(model), through_pickle(model)):
        assert again.origin == model.origin and str(again.origin.tz) == "Europe/Berlin"
        assert again._zero == model._zero
        pd.testing.assert_frame_equal(again.predict(frame), model.predict(frame))
    arrays = [value for value in vars(model).values() if isinstance(value, np.ndarray)]
    assert all(array.size < 30 for array in arrays)


@pytest.mark.parametrize(
    "value",
    [
        np.dtype(np.float32),
        np.float64,
        torch.device("cpu"),
        torch.float32,
        pd.Timestamp("2020-01-01"),
        pd.Timestamp("2020-01-01 12:00", tz="UTC"),
        pd.Timedelta("3h"),
        (1, [2.0, {"a": np.dtype("int8"), 3: None}]),
        Calibration(Spread(), Spread(3.0), (1.0, 2.0), 7.0, (Kernel(0.4, 16.0), None)),
    ],
)
def test_arguments_of_any_kind_come_back(value: Any) -> None:
    again = stored.restored(stored.plain(value))
    assert again == value or again is value
    assert type(again) is type(value)


# --- versions ---


@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", cases())
def test_models_stored_by_earlier_versions_predict_as_they_did(folder: Path, name: str) -> None:
    estimator, _, _, method = cases()[name]
    expected = np.load(folder / "expected.npz")
    if name == "regressor":
        model = joblib.load(folder / f"{name}.joblib")
    else:
        kind = type(estimator)
        model = skops.io.load(folder / f"{name}.skops", trusted=[f"{kind.__module__}.{kind.__name__}"])
    found = getattr(model, method)(expected[f"{name}_X"])
    np.testing.assert_allclose(found, expected[f"{name}_{method}"], rtol=1e-10, atol=1e-10)
    assert model.get_params().keys() == estimator.get_params().keys()


@pytest.mark.parametrize("Estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("number", "version"), [(stored.FORMAT + 1, "9.1.0"), (0, "0.0.1"), ("new", "9.0.0")], ids=["newer", "older", "odd"]
)
def test_an_unknown_format_is_refused_with_both_versions_and_the_cure(
    Estimator: Any, number: Any, version: str
) -> None:
    state = {**Estimator().__getstate__(), "_skode_format": number, "_skode_version": version}
    with pytest.raises(StoredModelError, match=f"{Estimator.__name__} was stored by skode {version}") as caught:
        Estimator().__setstate__(state)
    assert f"skode {skode.__version__}" in str(caught.value) and "fit it anew" in str(caught.value)
    assert f"format is {number}" in str(caught.value) and "format 1" in str(caught.value)


def test_a_state_without_a_format_is_refused() -> None:
    with pytest.raises(StoredModelError, match=r"before 0\.1\.0"):
        ODENetClassifier().__setstate__(dict(vars(ODENetClassifier())))


def test_a_field_that_this_version_does_not_know_is_refused(fitted: dict[str, Any]) -> None:
    state = fitted["classifier"].__getstate__()
    state["_net"] = {**state["_net"], "later_field": 1}
    state["_skode_version"] = "0.7.0"
    with pytest.raises(StoredModelError, match=r"skode 0\.7\.0 .*later_field"):
        ODENetClassifier().__setstate__(state)
    state["_net"] = {"__skode__": "LaterNet"}
    with pytest.raises(StoredModelError, match="LaterNet"):
        ODENetClassifier().__setstate__(state)


def test_a_state_without_a_later_argument_or_field_takes_its_default(fitted: dict[str, Any]) -> None:
    model = fitted["classifier"]
    X = cases()["classifier"][1]
    state = model.__getstate__()
    del state["energy_penalty"], state["_net"]["config"]["image_shape"]
    again = ODENetClassifier()
    again.__setstate__(state)
    assert again.energy_penalty == 0.0
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_older_formats_are_brought_up_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "FORMAT", 3)
    monkeypatch.setitem(stored.UPGRADES, 1, lambda state: {**state, "rtol": state["rtol"] * 10})
    monkeypatch.setitem(stored.UPGRADES, 2, lambda state: {**state, "rtol": state["rtol"] * 10})
    state = {**ODENetRegressor(rtol=1e-3).__getstate__(), "_skode_format": 1}
    again = ODENetRegressor()
    again.__setstate__(state)
    assert again.rtol == pytest.approx(0.1)
    with pytest.raises(StoredModelError, match="this version reads formats 1 to 3"):
        again.__setstate__({**state, "_skode_format": 0})


class Linear(torch.nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(n_dims, n_dims)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.map(y))


def test_a_users_field_is_the_users_to_trust() -> None:
    X = np.random.default_rng(0).normal(size=(20, 2))
    model = ODENetClassifier(max_iter=2, random_state=0, field=Linear).fit(X, X[:, 0] > 0)
    untrusted = skops.io.get_untrusted_types(data=skops.io.dumps(model))
    assert set(untrusted) == {"skode.estimators.classifier.ODENetClassifier", f"{__name__}.Linear"}
    np.testing.assert_array_equal(through_pickle(model).predict_proba(X), model.predict_proba(X))
