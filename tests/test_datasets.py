"""The spirals: protocol of the paper's section 5.1 on the curves of torchdiffeq's example."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skode import Panel
from skode.datasets import make_spirals


def test_shapes_and_times() -> None:
    spirals = make_spirals(n_series=7, n_points=100, random_state=0)
    assert spirals.values.shape == spirals.clean.shape == spirals.ahead.shape == (7, 100, 2)
    step = 6 * np.pi / 499
    np.testing.assert_allclose(spirals.times, step * np.arange(100))
    np.testing.assert_allclose(spirals.times_ahead, step * np.arange(100, 200))
    assert 100 * step == pytest.approx(3.777, abs=1e-3)  # 0.6 of a turn


@pytest.mark.parametrize("subset", ["train", "test"])
def test_half_are_clockwise_and_coordinates_spread_by_four(subset: str) -> None:
    spirals = make_spirals(subset=subset, random_state=0)
    assert spirals.clockwise.sum() == 500
    assert 3.5 < spirals.values.std() < 4.5
    np.testing.assert_allclose((spirals.values - spirals.clean).std(), 0.3, rtol=0.01)


def test_windows_lie_on_their_curves_and_turn_their_ways() -> None:
    spirals = make_spirals(n_series=200, subset="test", random_state=1)
    paths = np.concatenate([spirals.clean, spirals.ahead], axis=1)
    for clockwise, centre in ((False, 5.0), (True, -5.0)):
        x, y = (paths[spirals.clockwise == clockwise] - [centre, 0.0]).transpose(2, 0, 1)
        radius, angle = np.hypot(x, y), np.unwrap(np.arctan2(y, x), axis=1)
        turned = -1 if clockwise else 1
        np.testing.assert_allclose(np.diff(angle, axis=1), turned * 6 * np.pi / 499)
        slope = (
            radius * (angle - angle[:, :1] + 15 / radius[:, :1])
            if clockwise
            else np.diff(radius, axis=1) / np.diff(angle)
        )
        np.testing.assert_allclose(slope, 15.0 if clockwise else 0.3)


def test_starts_of_windows() -> None:
    for subset, last in (("train", 399), ("test", 299)):
        spirals = make_spirals(n_series=5000, subset=subset, random_state=0)
        clean = spirals.clean[~spirals.clockwise]
        starts = np.hypot(clean[:, 0, 0] - 5.0, clean[:, 0, 1]) / 0.3 / (6 * np.pi / 499)
        assert (round(starts.min()), round(starts.max())) == (100, last)


def test_test_curves_go_on_and_training_curves_may_end() -> None:
    assert np.isfinite(make_spirals(subset="test", random_state=0).ahead).all()
    train = make_spirals(random_state=0)
    assert np.isfinite(train.clean).all()
    ended = np.isnan(train.ahead)
    assert 0 < ended.mean() < 0.5
    assert (np.diff(ended.astype(int), axis=1) >= 0).all()


@pytest.mark.parametrize("n_observed", [0, 30, 100, None])
def test_as_many_points_of_each_series_are_observed_as_asked(n_observed: int | None) -> None:
    spirals = make_spirals(n_series=50, n_observed=n_observed, random_state=0)
    observed = np.isfinite(spirals.values)
    assert (observed[..., 0] == observed[..., 1]).all()
    assert (observed[..., 0].sum(axis=1) == (100 if n_observed is None else n_observed)).all()
    assert Panel.from_dense(spirals.values, spirals.times).shape == (50, 2)


@pytest.mark.parametrize("seed", [0, np.random.RandomState, np.random.default_rng])
def test_a_seed_repeats_the_spirals(seed: Any) -> None:
    one, two = (make_spirals(n_series=5, random_state=seed(3) if callable(seed) else seed) for _ in range(2))
    np.testing.assert_array_equal(one.values, two.values)
    assert (make_spirals(n_series=5, random_state=9).values != one.values).any()


@pytest.mark.parametrize(
    "arguments",
    [{"n_series": 0}, {"n_points": 167}, {"n_observed": 101}, {"noise": -1.0}, {"noise": np.nan}, {"subset": "all"}],
)
def test_sizes_out_of_range_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_spirals(**arguments)
