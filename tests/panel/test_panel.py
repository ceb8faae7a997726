"""Panels: picking, splitting in time, joining, queries."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from skode import Panel
from tests.panel.frames import long_frame, panel_of

HOURS = pd.date_range("2024-03-30 22:00", periods=6, freq="h", tz="Europe/Berlin")


def clock_panel() -> Panel:
    """Two series, the second an hour later, across a change to daylight saving time."""
    return Panel.from_dense(
        [[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]], [HOURS[0:3].tolist(), HOURS[1:4].tolist()], ids=["a", "b"]
    )


# Picking


@pytest.mark.parametrize(
    "key",
    [
        slice(2, 5),
        [2, 3, 4],
        np.array([2, 3, -8]),
        np.isin(np.arange(12), [2, 3, 4]),
        pd.Series(range(12)).between(2, 4).tolist(),
    ],
    ids=["slice", "list", "array", "mask", "list of bools"],
)
def test_slices_lists_and_masks_give_panels(key: Any) -> None:
    frame = long_frame()
    panel = panel_of(frame)
    expected = panel_of(frame[frame["patient"].isin(["patient 2", "patient 3", "patient 4"])])
    for picked in (panel[key], panel.iloc[key]):
        assert picked == expected
    assert_frame_equal(panel[key].to_long(), frame[frame["patient"].isin(expected.ids)])


def test_an_integer_gives_a_frame_with_the_times_of_the_user() -> None:
    frame = long_frame()
    expected = frame[frame["patient"] == "patient 3"].set_index("hour")[["pulse", "pressure"]]
    panel = panel_of(frame)
    for one in (panel[3], panel[-9], panel.iloc[np.int64(3)], panel.loc["patient 3"], list(panel)[3]):
        assert_frame_equal(one, expected)


def test_labels_pick_series_and_channels() -> None:
    panel = panel_of(long_frame())
    picked = panel.loc[["patient 4", "patient 1"], ["pressure"]]
    assert (picked.ids.tolist(), picked.columns) == (["patient 4", "patient 1"], ("pressure",))
    assert picked == panel.iloc[[4, 1], 1] == panel.take([4, 1]).take([1], axis=1)
    assert panel.loc[:, "pulse"].shape == (12, 1)


def test_a_series_may_be_taken_twice() -> None:
    frame = long_frame()
    twice = panel_of(frame).take([5, 0, 5])
    parts = [frame[frame["patient"] == f"patient {number}"] for number in (5, 0, 5)]
    assert_frame_equal(twice.to_long(), pd.concat(parts))
    assert twice.loc["patient 5"].ids.tolist() == ["patient 5", "patient 5"]
    with pytest.raises(ValueError, match="'patient 5' more than once"):
        twice.positions(["patient 0"])


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        (12, IndexError, "position 12 is out of range for 12 series"),
        ([0, -13], IndexError, "position -13"),
        ([True, False], IndexError, "the mask has 2 entries for 12 series"),
        ("patient 1", TypeError, "for labels use loc"),
        ([0.5], TypeError, "picked by integers"),
    ],
)
def test_positions_that_are_none_are_refused(key: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        panel_of(long_frame())[key]


@pytest.mark.parametrize("key", ["nobody", ["patient 1", "nobody"]])
def test_unknown_labels_are_named(key: Any) -> None:
    with pytest.raises(KeyError, match="'nobody'"):
        panel_of(long_frame()).loc[key]
    with pytest.raises(KeyError, match="'weight'"):
        panel_of(long_frame()).loc[:, "weight"]


def test_an_empty_choice_is_an_empty_panel() -> None:
    empty = panel_of(long_frame())[[]]
    assert (len(empty), empty.shape, len(empty.to_long())) == (0, (0, 2), 0)


def test_nothing_can_be_changed() -> None:
    panel = panel_of(long_frame())
    with pytest.raises(AttributeError, match="cannot be changed"):
        panel.values = 0
    for array in (panel.ids, panel.offsets, panel.times, panel.values, panel.static):
        assert not array.flags.writeable
    ids = np.array([3, 4])
    Panel.from_dense(np.zeros((2, 2)), ids=ids)
    assert ids.flags.writeable


def test_a_pickle_of_some_series_holds_only_these() -> None:
    frame = long_frame(n_series=400).set_index(pd.Index([f"row {n}" for n in range(len(long_frame(n_series=400)))]))
    panel = panel_of(frame)
    few = pickle.dumps(panel[:4])
    assert len(few) < len(pickle.dumps(panel)) / 20
    assert pickle.loads(few) == panel[:4]
    assert_frame_equal(pickle.loads(few).to_long(), panel[:4].to_long())


def test_panels_are_equal_by_content() -> None:
    frame = long_frame()
    panel = panel_of(frame)
    assert panel == panel_of(frame.set_index("patient")) == panel.copy()
    assert panel != panel_of(frame.assign(pulse=0.0))
    assert panel != panel_of(frame, origin="panel")
    assert panel != panel[::-1]
    assert panel != frame


def test_a_panel_is_no_array() -> None:
    panel = panel_of(long_frame())
    for call in (np.asarray, np.mean, np.isnan):
        with pytest.raises(TypeError):
            call(panel)
    with pytest.raises(TypeError, match=r"use panel\.to_dense"):
        np.asarray(panel)


def test_the_text_of_a_panel_is_a_short_table() -> None:
    text = repr(panel_of(long_frame(n_series=50)))
    assert text.startswith("Panel of 50 series, 2 channels, ")
    assert len(text.splitlines()) == 9
    assert "patient 49" in text
    assert "<table" in panel_of(long_frame())._repr_html_()


def test_bytes_are_counted() -> None:
    panel = panel_of(long_frame())
    assert panel.nbytes >= panel.values.nbytes + panel.times.nbytes


# Time


def test_each_series_starts_at_its_own_zero_or_all_share_one() -> None:
    panel = clock_panel()
    assert panel.times.tolist() == [0.0, 3600.0, 7200.0] * 2
    common = panel.with_origin("panel")
    assert common.times.tolist() == [0.0, 3600.0, 7200.0, 3600.0, 7200.0, 10800.0]
    assert common.with_origin("series") == panel
    noon = panel.with_origin(pd.Timestamp("2024-03-30 21:00", tz="UTC") - pd.Timedelta("1h"))
    assert (noon.origin, noon.times[0]) == ("panel", 3600.0)


def test_origin_may_be_a_number() -> None:
    assert Panel.from_dense([[1.0, 2.0]], [4.0, 6.0], origin=-1.0).times.tolist() == [5.0, 7.0]


@pytest.mark.parametrize("t", [HOURS[2], HOURS[2].tz_convert("UTC"), HOURS[2].to_pydatetime(), str(HOURS[2])])
def test_a_timestamp_cuts_all_series_at_one_time(t: Any) -> None:
    panel = clock_panel()
    assert panel.before(t).lengths.tolist() == [2, 1]
    assert panel.after(t).lengths.tolist() == [1, 2]


@pytest.mark.parametrize("t", ["1h", pd.Timedelta("1h"), np.timedelta64(60, "m"), ["1h", "1h"]])
def test_an_offset_cuts_each_series_from_its_own_origin(t: Any) -> None:
    assert clock_panel().before(t).lengths.tolist() == [1, 1]


def test_an_offset_may_count_from_the_last_observation() -> None:
    panel = clock_panel()
    assert panel.after("0h", since="last").values.ravel().tolist()[0] == 2.0
    assert panel.before("0h", since="last").lengths.tolist() == [1, 2]


def test_numbers_cut_at_times_or_from_origins() -> None:
    panel = panel_of(long_frame())
    assert panel.before(10.0).lengths.tolist() == [panel.lengths[0]] + [0] * 11
    assert (panel.before(0.5, since="origin").times < 0.5).all()
    each = 10.0 * np.arange(12) + 0.5
    early, late = panel.before(each), panel.after(each)
    assert (early.lengths + late.lengths).tolist() == panel.lengths.tolist()
    assert Panel.concat([early, late]) == panel


def test_parts_keep_the_origins_of_the_whole() -> None:
    late = panel_of(long_frame()).after(0.5, since="origin")
    assert (late.times >= 0.5).all()
    assert len(late) == 12


@pytest.mark.parametrize("t", [3.0, pd.Timestamp("2024"), "2024-03-31", "3", None, pd.NaT])
def test_times_that_do_not_belong_to_the_panel_are_refused(t: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        clock_panel().before(t)


@pytest.mark.parametrize("t", ["1h", pd.Timedelta("1h"), pd.Timestamp("2024"), np.nan, np.inf, [1.0, 2.0], True])
def test_what_is_no_number_is_refused_by_a_panel_of_numbers(t: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        panel_of(long_frame()).before(t)


# Joining


def test_new_observations_join_a_known_series() -> None:
    frame = long_frame()
    news = pd.DataFrame({"patient": ["patient 1", "new"], "hour": [99.0, 1.0], "pulse": [1.0, 2.0], "pressure": np.nan})
    joined = Panel.concat([panel_of(frame), panel_of(news)])
    together = pd.concat([frame, news])
    assert joined == panel_of(together)
    assert_frame_equal(joined.to_long(), together)


def test_older_observations_move_the_origin() -> None:
    one, older = (Panel.from_dense([[1.0, 2.0]], times, ids=["a"]) for times in ([5.0, 6.0], [1.0, 2.0]))
    assert Panel.concat([one, older]).times.tolist() == [0.0, 1.0, 4.0, 5.0]


def test_the_same_time_twice_is_refused_when_panels_join() -> None:
    panel = panel_of(long_frame())
    with pytest.raises(ValueError, match=r"duplicate rows of \(series, time\); first: series 'patient 0', row"):
        Panel.concat([panel, panel[:1]])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Panel.from_dense(np.zeros((2, 3, 2))), "columns"),
        (Panel.from_dense([[1.0]], origin="panel"), "origin"),
        (Panel.from_dense([[1.0]], HOURS[:1]), "dtypes int64 and datetime64"),
        (Panel.from_dense([[1.0]], static=[[1.0]]), "static_names"),
    ],
)
def test_panels_of_different_forms_do_not_join(other: Panel, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Panel.concat([Panel.from_dense([[1.0, 2.0]]), other])


def test_panels_in_different_time_zones_do_not_join() -> None:
    other = Panel.from_dense([[1.0]], HOURS[:1].tz_convert("UTC"))
    with pytest.raises(ValueError, match="Europe/Berlin"):
        Panel.concat([clock_panel(), other])


def test_units_of_joined_panels_become_the_finer_one() -> None:
    panels = [Panel.from_dense([[1.0]], HOURS[place : place + 1].as_unit(u)) for place, u in enumerate(("s", "ns"))]
    joined = Panel.concat(panels)
    assert (str(joined.time_dtype), joined.times.tolist()) == ("datetime64[ns, Europe/Berlin]", [0.0, 3600.0])


def test_static_values_that_differ_are_refused_when_panels_join() -> None:
    panels = [Panel.from_dense([[1.0]], [t], static=pd.DataFrame({"age": [age]})) for t, age in ((0, 60.0), (1, 61.0))]
    with pytest.raises(ValueError, match="static column 'age' is 61"):
        Panel.concat(panels)


def test_numpy_concatenates_without_joining() -> None:
    panel = panel_of(long_frame())
    assert np.concatenate([panel[:5], panel[5:]]) == panel
    assert np.concatenate([panel, panel]).shape == (24, 2)
    assert_frame_equal(np.concatenate([panel[:5], panel[5:]]).to_long(), long_frame())
    with pytest.raises(TypeError, match="panels with panels alone"):
        np.concatenate([panel, np.zeros((1, 2))])


# Queries and predictions


def test_shared_times_ask_every_series() -> None:
    queries = clock_panel().queries([HOURS[0], HOURS[4]])
    assert queries.series.tolist() == [0, 0, 1, 1]
    assert queries.times.tolist() == [0.0, 14400.0, -3600.0, 10800.0]
    assert queries.n_shared == 2
    assert queries.index.equals(pd.MultiIndex.from_product([["a", "b"], HOURS[[0, 4]]]))
    assert queries.index.names == ["series", "time"]


def test_a_horizon_counts_from_each_last_observation() -> None:
    queries = clock_panel().queries(["1h", "2h"], since="last")
    assert queries.times.tolist() == [7200.0, 10800.0, 10800.0, 14400.0]
    assert queries.index.get_level_values(1).tolist() == [HOURS[2], HOURS[3], HOURS[4], HOURS[5]]


def test_an_index_asks_for_pairs_and_is_kept() -> None:
    index = pd.MultiIndex.from_arrays([["b", "a", "b"], HOURS[[5, 0, 1]].tz_convert("UTC")])
    queries = clock_panel().queries(index)
    assert (queries.series.tolist(), queries.times.tolist()) == ([1, 0, 1], [14400.0, 0.0, 0.0])
    assert queries.index is index
    assert queries.n_shared is None


def test_unknown_ids_in_queries_are_named() -> None:
    index = pd.MultiIndex.from_product([["a", *"uvwxyz"], HOURS[:1]])
    with pytest.raises(KeyError, match=r"'u', 'v', 'w', 'x', 'y' and 1 more"):
        clock_panel().queries(index)


@pytest.mark.parametrize(
    ("times", "since", "error"),
    [
        ([], None, ValueError),
        ([1.0], None, TypeError),
        (HOURS.tz_localize(None), None, TypeError),
        ([[HOURS[0]]], None, ValueError),
        (["1h", "nonsense"], None, ValueError),
        (HOURS, "last", TypeError),
        ("1h", "first", ValueError),
        (pd.MultiIndex.from_product([["a"], pd.to_timedelta(["1h"])]), None, TypeError),
        (pd.MultiIndex.from_product([["a"], HOURS[:1], [0]]), None, ValueError),
    ],
)
def test_queries_that_are_no_times_are_refused(times: Any, since: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        clock_panel().queries(times, since)


def test_a_horizon_needs_an_observation() -> None:
    with pytest.raises(ValueError, match=r"1 series have no observation to count from \(first: 1\)"):
        Panel.from_dense([[1.0], [np.nan]]).queries([1.0], since="last")


def test_predictions_take_the_places_of_values() -> None:
    frame = long_frame().iloc[::-1].sort_values("patient", kind="stable")
    with pytest.warns(UserWarning, match="not ascending"):
        panel = panel_of(frame)
    assert panel.with_values(panel.values, panel.columns) == panel
    back = panel.with_values(panel.times[:, np.newaxis], ["age"]).to_long()
    assert back.columns.tolist() == ["patient", "hour", "age"]
    expected = frame["hour"] - frame.groupby("patient")["hour"].transform("min")
    np.testing.assert_allclose(back["age"], expected, atol=1e-12)
    assert back.index.equals(frame.index)
    with pytest.raises(ValueError, match="values of shape"):
        panel.with_values(np.zeros((3, 2)))
