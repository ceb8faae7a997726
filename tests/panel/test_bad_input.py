"""What a panel refuses, and in which words; what it takes with a warning or without."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest

from skode import Panel
from tests.panel.frames import long_frame, panel_of


def frame_with(column: str, row: int, cell: Any) -> Any:
    frame = pd.DataFrame({"patient": list("aabb"), "hour": [0.0, 1.0, 2.0, 3.0], "pulse": [1.0, 2.0, 3.0, 4.0]})
    cells = frame[column].tolist()
    cells[row] = cell
    return frame.assign(**{column: cells})


@pytest.mark.parametrize(
    ("column", "cell", "error", "words"),
    [
        ("hour", np.nan, ValueError, "series 'b', row 2: the time is missing"),
        ("hour", np.inf, ValueError, "series 'b', row 2: the time is infinite"),
        ("hour", 3.0, ValueError, r"1 duplicate rows of \(series, time\); first: series 'b', row 3 .* of row 2"),
        ("hour", "noon", TypeError, "float at series 'a', row 0, str at series 'b', row 2"),
        ("pulse", -np.inf, ValueError, "series 'b', row 2: column 'pulse' is -inf"),
        ("pulse", "high", TypeError, "series 'b', row 2: column 'pulse' .* holds 'high'"),
        ("pulse", 1j, TypeError, "column 'pulse'"),
        ("pulse", pd.Timestamp("2024"), TypeError, "column 'pulse'"),
        ("patient", None, ValueError, "row 2: the series id is missing"),
        ("patient", np.nan, ValueError, "row 2: the series id is missing"),
    ],
)
def test_a_bad_cell_is_named_by_series_column_and_row(
    column: str, cell: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        panel_of(frame_with(column, 2, cell))


def test_a_missing_timestamp_is_named() -> None:
    frame = frame_with("hour", 0, 0.0).assign(hour=pd.to_datetime(["2024", "2025", None, "2026"]))
    with pytest.raises(ValueError, match=r"series 'b', row 2: the time is missing \(NaT\)"):
        panel_of(frame)


def test_mixed_time_zones_are_named() -> None:
    times = [pd.Timestamp("2024", tz=zone) for zone in ("UTC", "UTC", "Europe/Berlin", "UTC")]
    with pytest.raises(
        TypeError, match=r"mixed time zones .*in UTC at series 'a', row 0, .*in Europe/Berlin at .*row 2"
    ):
        panel_of(frame_with("hour", 0, 0.0).assign(hour=pd.Series(times, dtype=object)))


def test_frames_in_different_time_zones_are_named() -> None:
    frames = [
        pd.DataFrame({"a": [1.0]}, index=pd.DatetimeIndex(["2024"]).tz_localize(zone)) for zone in ("UTC", "Asia/Tokyo")
    ]
    with pytest.raises(TypeError, match=r"mixed time zones.*series 0, row 0.*Tokyo at series 1, row 0"):
        Panel.from_frames(frames)


@pytest.mark.parametrize("times", [list("wxyz"), pd.period_range("2024", periods=4), [True, False, True, False]])
def test_what_is_no_time_is_refused(times: Any) -> None:
    with pytest.raises(TypeError, match="Times must be numbers or datetimes"):
        panel_of(frame_with("hour", 0, 0.0).assign(hour=times))


def test_a_covariate_must_be_known_everywhere() -> None:
    with pytest.raises(ValueError, match="series 'b', row 2: covariate 'pulse' is NaN"):
        panel_of(frame_with("pulse", 2, np.nan), covariates="pulse")


def test_a_static_column_must_not_vary_within_a_series() -> None:
    with pytest.raises(ValueError, match=r"series 'b', row 3: static column 'pulse' is 4\.0, but 3\.0 at row 2"):
        panel_of(frame_with("pulse", 1, 1.0), static="pulse")
    unknown = panel_of(frame_with("pulse", 0, 1.0).assign(pulse=[np.nan, np.nan, 3.0, 3.0]), static="pulse")
    np.testing.assert_array_equal(unknown.static, [[np.nan], [3.0]])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"series_id": "nobody", "time": "hour"}, KeyError, "series_id='nobody' is not in the frame; columns: "),
        ({"series_id": "patient", "time": "when"}, KeyError, "time='when'"),
        ({"series_id": "patient", "time": "hour", "values": ["weight"]}, KeyError, "'weight'"),
        ({"series_id": "patient", "time": "hour", "static": "age"}, KeyError, "'age'"),
        ({"series_id": "patient", "time": "hour", "values": ["pulse", "pulse"]}, ValueError, "named twice"),
        ({"series_id": "patient", "time": "hour", "values": "hour"}, ValueError, "'hour' was named twice"),
        ({"series_id": "patient"}, TypeError, "time= is missing"),
        ({"time": "hour"}, TypeError, "series_id= is missing"),
        ({}, ValueError, r"index has 1 level\(s\)"),
        ({"series_id": "patient", "time": "hour", "origin": "noon"}, ValueError, "noon"),
        ({"series_id": "patient", "time": "hour", "origin": [1.0, 2.0]}, ValueError, "origin="),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Panel.from_long(long_frame(), **arguments)


def test_a_two_level_index_needs_times_in_its_second_level() -> None:
    frame = long_frame().set_index(["hour", "patient"])
    with pytest.raises(TypeError, match="Times must be numbers or datetimes"):
        Panel.from_long(frame)
    with pytest.raises(ValueError, match="3 level"):
        Panel.from_long(long_frame().set_index(["patient", "hour", "pulse"]))


def test_duplicate_columns_are_named() -> None:
    frame = long_frame().rename(columns={"pressure": "pulse"})
    with pytest.raises(ValueError, match=r"duplicate columns: \['pulse'\]"):
        panel_of(frame)


def test_a_name_in_columns_and_index_is_ambiguous() -> None:
    with pytest.raises(ValueError, match="both a column and a level"):
        panel_of(long_frame().set_index("hour", drop=False))


@pytest.mark.parametrize("data", [None, [[1.0]], {"a": 1}])
def test_what_is_no_frame_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match="takes a pandas DataFrame"):
        Panel.from_long(data, "a", "b")


def test_a_frame_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        panel_of(long_frame().iloc[:0])


def test_unsorted_times_are_told() -> None:
    frame = pd.DataFrame({"patient": list("abab"), "hour": [2.0, 5.0, 1.0, 6.0], "pulse": 1.0})
    with pytest.warns(UserWarning, match=r"times of 1 series are not ascending \(first: series 'a', row 2\)") as caught:
        panel = panel_of(frame)
    assert caught[0].filename == panel_of.__code__.co_filename
    assert panel.times.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_interleaved_series_and_late_queries_are_not_unsorted() -> None:
    frame = pd.DataFrame({"patient": list("ababa"), "hour": [1.0, 5.0, 4.0, 6.0, 2.0], "pulse": [1.0, 1, 1, 1, np.nan]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panel = panel_of(frame)
    assert panel.times.tolist() == [0.0, 1.0, 3.0, 0.0, 1.0]


def test_a_series_or_channel_without_any_observation_is_kept() -> None:
    panel = panel_of(frame_with("pulse", 0, 1.0).assign(pulse=[1.0, 2.0, np.nan, np.nan], pressure=np.nan))
    assert panel.shape == (2, 2)
    assert panel.lengths.tolist() == [2, 2]


def test_one_series_with_one_observation_is_a_panel() -> None:
    panel = Panel.from_dense([[7.0]])
    assert (panel.shape, panel.times.tolist()) == ((1, 1), [0.0])


@pytest.mark.parametrize(
    ("second", "error", "words"),
    [
        (pd.DataFrame({"a": []}), ValueError, "series 'y' has no rows"),
        (pd.DataFrame({"b": [1.0]}), KeyError, "series 'y': column 'a' is not in the frame"),
        (pd.DataFrame({"a": [1.0], "b": [1.0]}), ValueError, r"series 'y' has columns \['a', 'b'\]"),
        (pd.Series([1.0]), TypeError, "series 'y' must be a DataFrame"),
        (np.zeros(3), TypeError, "series 'y' must be a DataFrame"),
        (pd.DataFrame({"a": [np.inf]}), ValueError, "series 'y', row 0: column 'a' is inf"),
        (pd.DataFrame({"a": ["?"]}), TypeError, "series 'y', row 0: column 'a'"),
        (pd.DataFrame({"a": [1.0, 2.0]}, index=[3, 3]), ValueError, "series 'y', row 1 .* of row 0"),
    ],
)
def test_a_bad_frame_in_a_list_is_named(second: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Panel.from_frames([pd.DataFrame({"a": [1.0, 2.0]}), second], ids=["x", "y"])


@pytest.mark.parametrize("ids", [["x", "x"], ["x", None], ["x"]])
def test_ids_of_frames_must_be_different_and_as_many(ids: Any) -> None:
    with pytest.raises(ValueError, match="ids"):
        Panel.from_frames([pd.DataFrame({"a": [1.0]})] * 2, ids=ids)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"X": [1.0, 2.0]}, ValueError),
        ({"X": np.zeros((0, 3))}, ValueError),
        ({"X": np.zeros((2, 0))}, ValueError),
        ({"X": [["a"]]}, TypeError),
        ({"X": [[np.inf]]}, ValueError),
        ({"X": np.zeros((2, 3)), "times": [0.0, 1.0]}, ValueError),
        ({"X": np.zeros((2, 3)), "times": [0.0, 1.0, 1.0]}, ValueError),
        ({"X": np.zeros((2, 3)), "times": [0.0, 1.0, np.nan]}, ValueError),
        ({"X": np.zeros((2, 3)), "columns": ["a", "b"]}, ValueError),
        ({"X": np.zeros((2, 3)), "static": [[1.0]]}, ValueError),
    ],
)
def test_arrays_that_make_no_panel_are_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Panel.from_dense(**arguments)


def test_a_name_serves_one_column() -> None:
    panel = panel_of(long_frame())
    for names in (["hour", "pulse"], ["pulse", "pulse"]):
        with pytest.raises(ValueError, match=f"two columns are named '{names[0]}'"):
            panel.with_values(panel.values, names)
    with pytest.raises(ValueError, match="two columns are named 'age'"):
        Panel.from_dense([[1.0]], columns=["age"], static=pd.DataFrame({"age": [60.0]}))


def test_a_dictionary_of_frames_is_refused() -> None:
    with pytest.raises(TypeError, match="not dict"):
        Panel.from_frames({"a": pd.DataFrame({"x": [1.0]})})


def test_a_panel_is_not_made_by_its_class() -> None:
    with pytest.raises(TypeError, match="make a panel by"):
        Panel(long_frame())
