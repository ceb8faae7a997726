"""Arrays of other libraries: the tests of ``array_api.py``, in a process where SciPy dispatches; and set_output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from skode import ContinuousFlowDensity, LatentODERegressor, Panel

TESTS = Path(__file__).with_name("array_api.py")
ROOT = TESTS.parents[2]
TRANSFORMERS = [ContinuousFlowDensity(4, max_iter=0, random_state=0), LatentODERegressor(max_iter=0, random_state=0)]


def test_estimators_take_and_give_arrays_of_other_libraries():
    """SciPy reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"SCIPY_ARRAY_API": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "passed" in run.stdout.splitlines()[-1]


# scikit-learn offers these to its own estimators alone.
@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
@pytest.mark.parametrize(
    "check",
    [
        "check_set_output_transform",
        "check_set_output_transform_pandas",
        "check_global_output_transform_pandas",
        "check_set_output_transform_polars",
        "check_transformer_get_feature_names_out",
        "check_transformer_get_feature_names_out_pandas",
    ],
)
@pytest.mark.parametrize("estimator", TRANSFORMERS, ids=lambda estimator: type(estimator).__name__)
def test_scikit_learns_checks_of_set_output_pass(estimator, check):
    getattr(estimator_checks, check)(type(estimator).__name__, estimator)


@pytest.mark.parametrize("estimator", TRANSFORMERS, ids=lambda estimator: type(estimator).__name__)
def test_places_and_states_are_columns_in_a_column_transformer(estimator):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(30, 4)), columns=list("abcd"), index=np.arange(30) + 100)
    both = ColumnTransformer([("flow", estimator, ["b", "c"]), ("rest", "passthrough", ["a"])])
    found = make_pipeline(both, StandardScaler()).set_output(transform="pandas").fit_transform(table)
    assert list(found.columns[:2]) == [f"flow__{type(estimator).__name__.lower()}{i}" for i in range(2)]
    assert found.columns[-1] == "rest__a"
    assert found.index.equals(table.index)


def test_a_density_takes_a_frame_of_places_back():
    X = np.random.default_rng(0).normal(size=(50, 2))
    density = ContinuousFlowDensity(4, max_iter=1, random_state=0).set_output(transform="pandas").fit(X)
    np.testing.assert_allclose(density.inverse_transform(density.transform(X)), X, atol=1e-6)


def test_a_warning_of_a_fit_names_the_line_that_called_it():
    X = np.random.default_rng(0).normal(size=(50, 2))[:, [0, 1, 1]]
    with pytest.warns(UserWarning, match="is a copy of column 1") as caught:
        ContinuousFlowDensity(4, max_iter=0).fit(X)
    series = np.stack([X, np.full_like(X, np.nan)], axis=2)
    with pytest.warns(UserWarning, match="never observed") as more:
        LatentODERegressor(max_iter=0).fit(series)
    assert {warning.filename for warning in [*caught, *more]} == {__file__}


def test_states_of_series_are_named_by_the_series():
    frame = pd.DataFrame({"id": np.repeat(["a", "b", "c"], 4), "t": np.tile(np.arange(4.0), 3), "x": np.arange(12.0)})
    model = LatentODERegressor(max_iter=0, series_id="id", time="t", random_state=0).fit(frame)
    plain = model.transform(frame)
    assert isinstance(plain, np.ndarray)
    panel = Panel.from_long(frame, series_id="id", time="t")
    with config_context(transform_output="pandas"):
        for X in (frame, panel):
            found = model.transform(X)
            assert found.index.tolist() == ["a", "b", "c"]
            assert list(found.columns) == list(model.get_feature_names_out())
            np.testing.assert_array_equal(found.to_numpy(), plain)
