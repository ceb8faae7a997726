"""What goes into a panel comes out again: index, order, units, time zones."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal, assert_index_equal

from skode import Panel
from tests.panel.frames import long_frame, panel_of

UNITS = ["s", "ms", "us", "ns"]
ZONES = [None, "UTC", "Europe/Berlin", "America/St_Johns"]
ID_DTYPES = ["int64", "int8", "str", "object", "category", "float64", "datetime64[s]", "Int64"]
NUMBERS = ["int64", "uint8", "float32", "float64", "Int64"]


@st.composite
def datetimes(draw: Any, n_rows: int) -> Any:
    """Distinct datetimes around a change to daylight saving time, in any unit and zone."""
    unit, zone = draw(st.sampled_from(UNITS)), draw(st.sampled_from(ZONES))
    steps = draw(st.lists(st.integers(-(10**5), 10**5), min_size=n_rows, max_size=n_rows, unique=True))
    stamps = np.datetime64("2024-03-31T01:00", unit) + np.array(steps).astype(f"timedelta64[{unit}]")
    index = pd.DatetimeIndex(stamps)
    return index if zone is None else index.tz_localize("UTC").tz_convert(zone)


@st.composite
def number_times(draw: Any, n_rows: int) -> Any:
    dtype = draw(st.sampled_from(NUMBERS))
    times = draw(st.lists(st.integers(0, 200), min_size=n_rows, max_size=n_rows, unique=True))
    return pd.Index(pd.array(times, dtype=dtype))


@st.composite
def frames(draw: Any) -> Any:
    """Long frames with ids and times of all kinds, rows in any order."""
    n_rows = draw(st.integers(1, 12))
    ids = pd.Index(draw(st.lists(st.integers(1, 4), min_size=n_rows, max_size=n_rows)))
    ids = ids.astype(draw(st.sampled_from(ID_DTYPES)))
    times = draw(st.one_of(datetimes(n_rows), number_times(n_rows)))
    cells = st.one_of(st.just(np.nan), st.floats(-1e6, 1e6))
    value = draw(st.lists(cells, min_size=n_rows, max_size=n_rows))
    frame = pd.DataFrame({"a": value, "id": ids, "b": 1.5, "t": times}, index=range(7, 7 + n_rows))
    return frame


@pytest.mark.filterwarnings("ignore:the times of")
@settings(deadline=None, max_examples=25)
@given(frames())
def test_columns_come_back_with_index_order_dtypes_and_zones(frame: Any) -> None:
    panel = Panel.from_long(frame, series_id="id", time="t")
    assert_frame_equal(panel.to_long(), frame)
    assert_frame_equal(pickle.loads(pickle.dumps(panel)).to_long(), frame)


@pytest.mark.filterwarnings("ignore:the times of")
@settings(deadline=None, max_examples=25)
@given(frames())
def test_a_two_level_index_comes_back(frame: Any) -> None:
    frame = frame.set_index(["id", "t"])
    panel = Panel.from_long(frame)
    assert_frame_equal(panel.to_long(), frame)
    assert_frame_equal(pickle.loads(pickle.dumps(panel)).to_long(), frame)


@pytest.mark.filterwarnings("ignore:the times of")
@settings(deadline=None, max_examples=25)
@given(frames())
def test_frames_come_back(frame: Any) -> None:
    parts = {label: part.set_index("t")[["a", "b"]] for label, part in frame.groupby("id", sort=False, observed=True)}
    panel = Panel.from_frames(list(parts.values()), ids=list(parts))
    assert panel == Panel.from_frames(pd.Series(parts, dtype=object))
    for back, part in zip(panel.to_frames(), parts.values(), strict=True):
        assert_frame_equal(back, part)


@pytest.mark.parametrize(
    "index",
    [["id", "t"], ["t", "id"], ["t"], ["id"], ["other"], ["id", "other", "t"], ["other", "id"]],
    ids=lambda names: "-".join(names),
)
def test_ids_and_times_may_stand_in_columns_or_in_levels_of_the_index(index: list[str]) -> None:
    frame = pd.DataFrame(
        {
            "a": [1.0, 2.0, 3.0],
            "id": ["x", "y", "x"],
            "other": [5, 6, 7],
            "t": pd.date_range("2024", periods=3, tz="UTC"),
        }
    ).set_index(index)
    panel = Panel.from_long(frame, series_id="id", time="t", values="a")
    dropped = frame.drop(columns="other", errors="ignore")
    assert_frame_equal(panel.to_long(), dropped, check_freq=False)
    assert_frame_equal(panel.take([1, 0]).to_long(), dropped.iloc[[1, 0, 2]], check_freq=False)


def test_covariates_and_static_columns_come_back_in_their_places() -> None:
    frame = long_frame().assign(age=60.0, dose=np.arange(len(long_frame()), dtype=float))[
        ["age", "pulse", "patient", "dose", "hour"]
    ]
    panel = panel_of(frame, static="age", covariates=["dose"])
    assert (panel.columns, panel.covariate_names, panel.static_names) == (("pulse",), ("dose",), ("age",))
    assert (panel.static.shape, panel.covariates.shape) == ((12, 1), (len(frame), 1))
    assert_frame_equal(panel.to_long(), frame)
    assert panel[0].columns.tolist() == ["pulse", "dose"]


@pytest.mark.parametrize("values", [["pulse", "pressure"], ("pulse", "pressure"), np.array(["pulse", "pressure"])])
def test_columns_may_be_named_by_any_sequence(values: Any) -> None:
    assert panel_of(long_frame(), values=values) == panel_of(long_frame())


def test_a_column_may_be_named_by_a_tuple() -> None:
    frame = long_frame().rename(columns={"pulse": ("pulse", 1)})
    assert panel_of(frame, values=("pulse", 1)).columns == (("pulse", 1),)


def test_a_dense_array_comes_back() -> None:
    X = np.random.default_rng(0).normal(size=(4, 5, 3))
    X[1, 2, 0] = np.nan
    panel = Panel.from_dense(X)
    np.testing.assert_array_equal(panel.to_dense(), X)
    assert panel.shape == (4, 3)
    assert panel.times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] * 4


def test_two_dimensions_are_one_channel() -> None:
    X = np.arange(6.0).reshape(2, 3)
    panel = Panel.from_dense(X, times=pd.date_range("2024", periods=3, freq="h", tz="UTC"))
    assert panel.to_dense().shape == (2, 3, 1)
    assert panel.times.tolist() == [0.0, 3600.0, 7200.0] * 2


def test_every_series_of_an_array_may_have_its_own_times() -> None:
    times = np.array([[0.0, 2.0], [5.0, 9.0]])
    panel = Panel.from_dense([[1.0, 2.0], [3.0, 4.0]], times)
    assert panel.times.tolist() == [0.0, 2.0, 0.0, 4.0]


@pytest.mark.filterwarnings("ignore:the times of")
def test_unsorted_times_of_an_array_come_back_in_their_order() -> None:
    X = np.array([[1.0, 2.0, 3.0]])
    panel = Panel.from_dense(X, times=[5.0, 4.0, 6.0])
    assert panel.values.ravel().tolist() == [2.0, 1.0, 3.0]
    np.testing.assert_array_equal(panel.to_dense()[..., 0], X)


def test_a_wide_frame_gives_ids_and_times() -> None:
    wide = pd.DataFrame([[1.0, np.nan], [3.0, 4.0]], index=["x", "y"], columns=[0.5, 2.0])
    panel = Panel.from_dense(wide)
    assert panel.ids.tolist() == ["x", "y"]
    assert panel.times.tolist() == [0.0, 1.5, 0.0, 1.5]
    named = Panel.from_dense(wide.set_axis(["first", "second"], axis=1))
    assert named.times.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_an_array_is_the_same_panel_as_its_long_frame() -> None:
    X = np.random.default_rng(0).normal(size=(3, 4, 2))
    frame = pd.DataFrame(
        X.reshape(-1, 2), index=pd.MultiIndex.from_product([range(3), range(4)], names=["series", "time"])
    )
    assert Panel.from_dense(X) == Panel.from_long(frame)
    assert_frame_equal(Panel.from_dense(X).to_long(), frame)


def test_series_of_different_lengths_make_no_array() -> None:
    with pytest.raises(ValueError, match=r"the series have \d to 8 rows"):
        panel_of(long_frame()).to_dense()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_far_and_fine_times_keep_their_digits(scale: float) -> None:
    start = 1e12 if scale == 1.0 else 3 * scale
    times = start + scale * np.array([0.0, 0.25, 1.75])
    panel = Panel.from_dense([[1.0, 2.0, 3.0]], times)
    np.testing.assert_allclose(panel.times, scale * np.array([0.0, 0.25, 1.75]), rtol=1e-14)
    assert panel.to_long().index.get_level_values(1).tolist() == times.tolist()


def test_integers_far_apart_do_not_overflow() -> None:
    times = np.array([-(2**62) - 2**61, 0, 2**62 + 2**61])
    np.testing.assert_allclose(Panel.from_dense([[1.0, 2.0, 3.0]], times).times, [0.0, 1.5 * 2**62, 3.0 * 2**62])


def test_nanoseconds_over_decades_come_back_exactly() -> None:
    times = pd.DatetimeIndex(["1970-01-01T00:00:00.000000001", "2069-12-31T23:59:59.999999999"])
    panel = Panel.from_dense([[1.0, 2.0]], times)
    assert_index_equal(panel[0].index, times, check_names=False)


def test_time_elapses_through_a_change_to_daylight_saving_time() -> None:
    times = pd.DatetimeIndex(["2024-03-31 01:00", "2024-03-31 03:59:24"]).tz_localize("Europe/Berlin")
    panel = Panel.from_dense([[1.0, 2.0]], times)
    assert panel.unit == "s"
    assert panel.times[1] / 3600 == pytest.approx(1.99)
    assert_index_equal(panel[0].index, times, check_names=False)


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_of_datetimes_elapses_in_seconds(unit: str) -> None:
    times = pd.date_range("2024", periods=3, freq="90s", unit=unit)
    assert Panel.from_dense([[1.0, 2.0, 3.0]], times).times.tolist() == [0.0, 90.0, 180.0]


def test_frames_of_different_units_share_the_finer_one() -> None:
    frames = [pd.DataFrame({"a": [1.0]}, index=pd.DatetimeIndex(["2024"]).as_unit(unit)) for unit in ("s", "ns")]
    assert Panel.from_frames(frames).time_dtype == np.dtype("datetime64[ns]")


def test_a_panel_of_bare_events_has_no_channels() -> None:
    frame = pd.DataFrame({"patient": ["a", "a", "b"], "hour": [1.0, 2.0, 3.0]})
    panel = panel_of(frame)
    assert panel.shape == (2, 0)
    assert_frame_equal(panel.to_long(), frame)
