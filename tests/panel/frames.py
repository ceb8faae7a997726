"""Long frames for the tests of panels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from skode import Panel


def long_frame(n_series: int = 12, seed: int = 0) -> Any:
    """Irregular series of 3 to 8 rows with two channels, a third of the cells unobserved, sorted."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, size=n_series)
    ids = np.repeat([f"patient {number}" for number in range(n_series)], lengths)
    times = np.concatenate([10.0 * number + np.sort(rng.random(n)) for number, n in enumerate(lengths)])
    values = rng.normal(size=(len(ids), 2)) + 5.0
    values[rng.random(values.shape) < 1 / 3] = np.nan
    values[np.concatenate([[0], np.cumsum(lengths)[:-1]]), 0] = 5.0
    return pd.DataFrame({"patient": ids, "hour": times, "pulse": values[:, 0], "pressure": values[:, 1]})


def panel_of(frame: Any, **arguments: Any) -> Panel:
    return Panel.from_long(frame, series_id="patient", time="hour", **arguments)
