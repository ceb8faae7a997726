"""A panel in a notebook: a table and a picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest

from skode import Panel
from skode.panel.html import HEIGHT, N_CHANNELS, N_SERIES, WIDTH
from tests.panel.frames import long_frame, panel_of


def parsed(panel):
    """The whole representation, which is well-formed XML as well, and its picture."""
    root = ElementTree.fromstring(panel._repr_html_().replace("&nbsp;", " "))
    return root, root.find("{*}svg")


def texts(element):
    return [node.text for node in element.iter() if node.tag.endswith("text")]


def test_the_table_tells_numbers_channels_and_shares():
    panel = panel_of(long_frame())
    facts = {row[0].text: row[1].text for row in parsed(panel)[0].find("table/tbody")}
    observed = int(np.isfinite(panel.values).sum())
    assert facts["series"] == "12" and facts["rows"] == str(len(panel.times))
    assert facts["channels"] == "2: pulse, pressure"
    assert facts["observed values"] == f"{observed} ({observed / panel.values.size:.0%})"
    assert facts["longest series"].endswith("units of time")
    assert "covariates" not in facts


def test_each_channel_has_a_frame_and_the_first_series_as_lines():
    _, picture = parsed(panel_of(long_frame()))
    channels = picture.findall("{*}g")
    assert [texts(channel)[0] for channel in channels] == ["pulse", "pressure"]
    names = [group.find("{*}title").text for group in channels[0].findall("{*}g")]
    assert names == [f"patient {number}" for number in range(N_SERIES)]


def test_points_stand_where_times_and_values_are():
    panel = Panel.from_dense([[1.0, 5.0, np.nan, 3.0]], times=[0.0, 1.0, 2.0, 4.0])
    _, picture = parsed(panel)
    path = picture.find("{*}g/{*}g/{*}path").attrib["d"]
    points = np.array(re.findall(r"[\d.]+", path), dtype=float).reshape(-1, 2)
    across, down = points.T
    assert len(points) == 3  # what is not observed has no point
    assert (across[1] - across[0]) / (across[2] - across[0]) == pytest.approx(1 / 4, abs=1e-2)
    assert (down[0] - down[2]) / (down[0] - down[1]) == pytest.approx(1 / 2, abs=1e-2)  # down is less
    assert across.min() > 0 and across.max() < WIDTH and down.min() > 0 and down.max() < HEIGHT


def test_text_of_users_is_escaped():
    panel = Panel.from_dense([[[1.0], [2.0]]], ids=["<script>alert(1)</script>"], columns=['"><img src=x>&'])
    html = panel._repr_html_()
    assert "<script" not in html and "<img" not in html
    assert texts(parsed(panel)[1])[0] == '"><img src=x>&'


def test_only_the_first_channels_and_few_points_are_drawn():
    many = Panel.from_dense(np.random.default_rng(0).normal(size=(30, 5000, N_CHANNELS + 3)))
    html = many._repr_html_()
    assert len(parsed(many)[1].findall("{*}g")) == N_CHANNELS
    assert len(html) < 200_000


def test_seconds_of_datetimes_are_told_in_a_larger_unit():
    index = pd.date_range("2024-01-01", periods=4, freq="12h", tz="Europe/Berlin")
    panel = Panel.from_frames([pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0]}, index=index)])
    root, picture = parsed(panel)
    facts = {row[0].text: row[1].text for row in root.find("table/tbody")}
    assert facts["longest series"] == "1.5 d" and "2024-01-01 00:00:00+01:00" in facts["times"]
    assert texts(picture)[1:3] == ["0 s", "1.5 d"]


@pytest.mark.parametrize(
    ("panel", "said"),
    [
        (Panel.from_dense([[3.0]], times=[1.0]), "1 to 1 (numbers)"),
        (Panel.from_dense([[np.nan, np.nan]]), "nothing observed"),
        (Panel.from_dense([[1.0, 2.0]]).before(-1), "rows"),
        (Panel.from_dense([[1.0, 2.0]])[[]], "series"),
        (Panel.from_long(pd.DataFrame({"s": [0, 0], "t": [0.0, 1.0]}), series_id="s", time="t", values=[]), "rows"),
    ],
    ids=["one value", "nothing observed", "no rows", "no series", "bare events"],
)
def test_panels_of_next_to_nothing_have_a_representation_too(panel, said):
    root, _ = parsed(panel)
    assert said in "".join(root.itertext())


def test_colours_of_text_and_frame_are_the_pages_own():
    _, picture = parsed(panel_of(long_frame()))
    assert picture.attrib["fill"] == "currentColor"
    assert picture.find("{*}g/{*}path").attrib["stroke"] == "currentColor"
