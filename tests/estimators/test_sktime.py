"""LatentODERegressor and sktime's panel types, by sktime's own converters and checks; the recipes of docs/sktime.md."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from skode import LatentODERegressor, Panel
from tests.estimators.series import SMALL

pytest.importorskip("sktime", reason="sktime pins older versions of pandas: install it by the extra 'sktime'")
from sktime.datatypes import check_is_mtype, convert_to, get_examples

# Short fits warn that they are short; what is tested here is something else.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sktime.md"
MODEL = LatentODERegressor(**SMALL, max_iter=3, early_stopping=False, random_state=0)
TYPES = ["pd-multiindex", "df-list", "numpy3D", "nested_univ"]
DAYS = {
    "integers": lambda days: pd.Index(days),
    "datetimes": lambda days: pd.DatetimeIndex(np.datetime64("2024-01-01") + days),
    "timedeltas": lambda days: pd.to_timedelta(days, "D"),
}


def irregular(kind: str) -> pd.DataFrame:
    """Five series of 4 to 8 days of their own, two channels, some values unobserved."""
    rng = np.random.default_rng(0)
    frames = {
        f"s{i}": pd.DataFrame(
            rng.normal(size=(4 + i, 2)), DAYS[kind](np.sort(rng.permutation(30)[: 4 + i])), ["a", "b"]
        )
        for i in range(5)
    }
    frame = pd.concat(frames, names=["id", "time"])
    frame.iloc[::3, 1] = np.nan
    return frame


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """What the page's code defines, after it has run."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("example", [0, 1, 2])
@pytest.mark.parametrize("mtype", TYPES)
def test_sktimes_own_examples_go_in_and_come_back_in_their_type(mtype: str, example: int) -> None:
    X = get_examples(mtype, "Panel")[example]
    long = convert_to(X, "pd-multiindex")
    panel = Panel.from_long(long)
    assert check_is_mtype(panel.to_long(), "pd-multiindex", "Panel")
    back = convert_to(panel.to_long(), mtype)
    assert check_is_mtype(back, mtype, "Panel")
    # Through nested frames sktime loses the name of the times.
    pd.testing.assert_frame_equal(convert_to(back, "pd-multiindex"), long, check_dtype=False, check_names=False)
    np.testing.assert_array_equal(panel.to_dense().swapaxes(1, 2), convert_to(X, "numpy3D"))


@pytest.mark.parametrize("kind", list(DAYS))
def test_irregular_types_are_read_as_they_are_and_predictions_have_the_same_type(kind: str) -> None:
    long = irregular(kind)
    frames = convert_to(long, "df-list")
    assert check_is_mtype(long, "pd-multiindex", "Panel")
    assert check_is_mtype(frames, "df-list", "Panel")
    smooth = MODEL.fit(long).predict(long)
    assert check_is_mtype(smooth, "pd-multiindex", "Panel")
    assert smooth.index.equals(long.index)
    parts = MODEL.fit(frames).predict(frames)
    assert check_is_mtype(parts, "df-list", "Panel")
    np.testing.assert_array_equal(np.concatenate(parts), smooth)


def test_a_nested_frame_is_refused_with_the_way_out() -> None:
    nested = convert_to(irregular("integers"), "nested_univ")
    with pytest.raises(TypeError, match=r"row 's0' and column 'a'.*convert_to\(X, 'pd-multiindex'\)"):
        MODEL.fit(nested)
    assert MODEL.fit(convert_to(nested, "pd-multiindex")).n_features_in_ == 2


def test_the_recipe_for_types_gives_values_at_the_places_of_its_input(recipes: dict[str, Any]) -> None:
    assert recipes["back"].shape == recipes["array"].shape
    by_series = recipes["smooth"].to_numpy().reshape(12, 10, 2)
    np.testing.assert_array_equal(recipes["back"], by_series.swapaxes(1, 2))


@pytest.mark.parametrize("mtype", TYPES)
def test_the_recipe_for_a_regressor_takes_every_type(recipes: dict[str, Any], mtype: str) -> None:
    X = convert_to(recipes["array"], mtype)
    y = recipes["heights"]
    found = recipes["LatentODETargets"](MODEL).fit(X, y).predict(X)
    np.testing.assert_array_equal(found, MODEL.fit(recipes["long"], y).predict(recipes["long"]))


@pytest.mark.parametrize("mtype", ["pd-multiindex", "df-list", "nested_univ"])
def test_the_recipe_for_a_forecaster_answers_in_the_type_of_its_input(recipes: dict[str, Any], mtype: str) -> None:
    long, fh = recipes["irregular"], recipes["fh"]
    found = recipes["LatentODEForecaster"](MODEL).fit(convert_to(long, mtype)).predict(fh)
    assert check_is_mtype(found, mtype, "Panel")
    expected = MODEL.fit(long).predict(long, times=fh.to_pandas())
    np.testing.assert_array_equal(convert_to(found, "numpy3D").swapaxes(1, 2), expected)


def test_the_recipe_for_a_forecaster_tells_intervals_and_takes_news_without_a_refit(recipes: dict[str, Any]) -> None:
    long, fh = recipes["irregular"], recipes["fh"]
    forecaster = recipes["LatentODEForecaster"](MODEL).fit(long)
    band = forecaster.predict_interval(fh, coverage=0.8)
    quantiles = forecaster.model_.predict(long, times=fh.to_pandas(), quantiles=[0.1, 0.9])
    np.testing.assert_array_equal(band.to_numpy(), quantiles.reshape(-1, 2))
    before, model = forecaster.predict(fh), forecaster.model_
    day = pd.MultiIndex.from_product([[3], [pd.Timestamp("2024-03-03")]], names=long.index.names)
    after = forecaster.update(pd.DataFrame({"pulse": 90.0}, day)).predict(fh)
    changed = (after != before)["pulse"].groupby("patient").any()
    assert changed[changed].index.tolist() == [3]
    assert forecaster.model_ is model
