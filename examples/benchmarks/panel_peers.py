"""What LatentODERegressor is compared with on irregular panels; for irregular_panels.py.

Each method is fitted to training series and gives a function from test series, of which some rows are hidden, to a
:class:`Predicted` of all rows. Everything that is chosen of a method is chosen on the training series.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from panel_data import TASKS, Sample, hide, without
from scipy.stats import norm
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import Tensor

QUANTILES = np.array([0.025, 0.1, 0.25, 0.75, 0.9, 0.975])


@dataclass(frozen=True, eq=False)
class Predicted:
    """Means (N, C); standard deviations (N, C) and quantiles (N, C, 6), a normal's if they are not given."""

    mean: np.ndarray
    std: np.ndarray | None = None
    quantiles: np.ndarray | None = None

    def bands(self) -> np.ndarray | None:
        if self.quantiles is not None or self.std is None:
            return self.quantiles
        return self.mean[:, :, None] + self.std[:, :, None] * norm.ppf(QUANTILES)


Predictor = Callable[[Sample], Predicted]


# --- without a model ---


def interpolated(sample: Sample) -> np.ndarray:
    """Straight lines between a channel's observations, the last and first value beyond them, else 0 (the mean)."""
    out = np.zeros_like(sample.values)
    for rows in sample.rows_of():
        for c in range(out.shape[1]):
            own = rows[~np.isnan(sample.values[rows, c])]
            if len(own):
                out[rows, c] = np.interp(sample.t[rows], sample.t[own], sample.values[own, c])
    return out


def last_value(train: Sample, seed: int) -> Predictor:
    return lambda given: Predicted(interpolated(given))


def channel_mean(train: Sample, seed: int) -> Predictor:
    return lambda given: Predicted(np.zeros_like(given.values))


# --- tasks that are made of training series ---


def drawn_task(train: Sample, rng: np.random.Generator) -> np.ndarray:
    """Rows (N,) hidden as a task does, of each series its own: half of them all behind a random row."""
    hidden, seen = hide(train, "inside", rng), train.seen
    for rows in train.rows_of():
        own = rows[seen[rows]]
        if rng.random() < 0.5 and len(own) > 1:
            hidden[rows] = False
            hidden[own[rng.integers(1, len(own)) :]] = True
    return hidden


def two_parts(train: Sample, seed: int) -> tuple[Sample, Sample]:
    """Most training groups, and a fifth of them to choose by."""
    groups = np.random.default_rng([seed, 5]).permutation(np.unique(train.group))
    held = np.isin(train.group, groups[: max(1, len(groups) // 5)])
    return train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))


# --- a recurrent network on a grid ---

MOST_STEPS = 48
GRU_SIZES = (16, 48)
GRU_UPDATES, GRU_CHECK, GRU_PATIENCE = 800, 25, 6


class _Grid:
    """The times that training series have, or 48 of their quantiles."""

    def __init__(self, train: Sample) -> None:
        times = np.unique(train.t)
        self.times = times if len(times) <= MOST_STEPS else np.unique(np.quantile(times, np.linspace(0, 1, MOST_STEPS)))
        self.scale = float(np.ptp(times)) or 1.0

    def inputs(self, given: Sample) -> Tensor:
        """(S, G, features): values held and joined by lines, masks, gaps to observations, time, known inputs."""
        g, n_channels = self.times, given.values.shape[1]
        out = np.zeros((given.n_series, len(g), 4 * n_channels + 1 + given.inputs().shape[1]))
        nearest = np.abs(given.t[:, None] - g[None, :]).argmin(axis=1)
        for i, rows in enumerate(given.rows_of()):
            for c in range(n_channels):
                own = rows[~np.isnan(given.values[rows, c])]
                if not len(own):
                    out[i, :, [c + 2 * n_channels, c + 3 * n_channels]] = 1.0
                    continue
                t = given.t[own]
                out[i, :, c] = np.interp(g, t, given.values[own, c])
                np.add.at(out[i, :, c + n_channels], nearest[own], 1.0)
                before, after = np.searchsorted(t, g, "right") - 1, np.searchsorted(t, g)
                back = np.where(before >= 0, (g - t[before.clip(0)]) / self.scale, 1.0)
                out[i, :, c + 2 * n_channels] = back
                out[i, :, c + 3 * n_channels] = np.where(
                    after < len(t), (t[after.clip(max=len(t) - 1)] - g) / self.scale, 1.0
                )
            known = given.inputs()[rows]
            place = np.searchsorted(given.t[rows], g, "right").clip(1) - 1
            out[i, :, 4 * n_channels + 1 :] = known[place]
        out[:, :, 4 * n_channels] = g / self.scale
        return torch.tensor(out, dtype=torch.float32)

    def at_rows(self, given: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Grid points on both sides of each row (N,), and the second one's weight."""
        high = np.searchsorted(self.times, given.t).clip(1, len(self.times) - 1)
        low = high - 1
        weight = ((given.t - self.times[low]) / (self.times[high] - self.times[low])).clip(0, 1)
        return torch.tensor(low), torch.tensor(high), torch.tensor(weight, dtype=torch.float32)


class _Recurrent(torch.nn.Module):
    def __init__(self, n_inputs: int, n_channels: int, size: int) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(n_inputs, size, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(2 * size, n_channels)
        torch.nn.init.zeros_(self.head.weight)
        self.n_channels = n_channels

    def forward(self, inputs: Tensor, series: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Values at rows: what was held or joined by lines, and a correction."""
        out = self.head(self.gru(inputs)[0]) + inputs[:, :, : self.n_channels]
        low, high, weight = at
        return torch.lerp(out[series, low], out[series, high], weight[:, None])


def _squared_error(found: Tensor, target: Tensor) -> Tensor:
    """Mean over what the target knows."""
    asked = ~target.isnan()
    return (found[asked] - target[asked]).square().mean()


def _task_tensors(grid: _Grid, sample: Sample, hidden: np.ndarray) -> tuple[Any, ...]:
    target = torch.tensor(np.where(hidden[:, None], sample.values, np.nan), dtype=torch.float32)
    return grid.inputs(without(sample, hidden)), torch.tensor(sample.series), grid.at_rows(sample), target


def gru(train: Sample, seed: int) -> Predictor:
    """Both directions, inputs with masks and gaps; early stopping and the size by a fifth of the training series."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 7])
    fit, valid = two_parts(train, seed)
    grid = _Grid(train)
    tasks = [_task_tensors(grid, fit, drawn_task(fit, rng)) for _ in range(30)]
    checks = [_task_tensors(grid, valid, hide(valid, task, rng)) for task in TASKS for _ in range(4)]
    best, best_state, best_size = np.inf, None, 0
    for size in GRU_SIZES:
        model = _Recurrent(tasks[0][0].shape[2], train.values.shape[1], size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-3)
        without_gain, own_best = 0, np.inf
        for k in range(GRU_UPDATES):
            *inputs, target = tasks[rng.integers(len(tasks))]
            loss = _squared_error(model(*inputs), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (k + 1) % GRU_CHECK:
                continue
            with torch.no_grad():
                score = float(np.mean([float(_squared_error(model(*one), y)) for *one, y in checks]))
            without_gain = 0 if score < own_best else without_gain + 1
            own_best = min(own_best, score)
            if score < best:
                best, best_size = score, size
                best_state = {key: value.clone() for key, value in model.state_dict().items()}
            if without_gain >= GRU_PATIENCE:
                break
    model = _Recurrent(tasks[0][0].shape[2], train.values.shape[1], best_size)
    assert best_state is not None
    model.load_state_dict(best_state)

    def predict(given: Sample) -> Predicted:
        with torch.no_grad():
            found = model(grid.inputs(given), torch.tensor(given.series), grid.at_rows(given))
        return Predicted(found.double().numpy())

    return predict


# --- boosting ---

TASKS_DRAWN = 8  # of all training series
BOOSTING_ROUNDS = 400
BOOSTING = tuple(itertools.product((4, 15), (False, True)))  # leaves; whether what is learned is a correction


def features(given: Sample, rows: np.ndarray, c: int) -> np.ndarray:
    """Of channel ``c`` at rows (n,), from what is given of their series."""
    n_channels = given.values.shape[1]
    lines, out = interpolated(given), []
    starts = given.rows_of()
    inputs = given.inputs()
    for row in rows:
        own = starts[given.series[row]]
        t = given.t[row]
        seen = own[~np.isnan(given.values[own, c])]
        before, after = seen[given.t[seen] < t], seen[given.t[seen] > t]
        y = given.values[:, c]
        one = [t, float(c), float(len(seen)), y[seen].mean() if len(seen) else np.nan, lines[row, c]]
        for side, order in ((before, -1), (after, 1)):
            near = side[::order][:2]
            values = [y[k] for k in near] + [np.nan] * (2 - len(near))
            gaps = [abs(t - given.t[k]) for k in near] + [np.nan] * (2 - len(near))
            slope = (values[0] - values[1]) / (gaps[1] - gaps[0]) if len(near) == 2 else np.nan
            one += [*values, *gaps, slope]
        one += [y[seen[0]] if len(seen) else np.nan]
        if n_channels > 1:
            one += list(lines[row])
        out.append([*one, *inputs[row]])
    return np.array(out, dtype=float)


LINE = 4  # column of the value on the line between observations


def _rows_of_task(sample: Sample, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    given = without(sample, hidden)
    X, y = [], []
    for c in range(sample.values.shape[1]):
        rows = np.flatnonzero(hidden & ~np.isnan(sample.values[:, c]))
        if len(rows):
            X.append(features(given, rows, c))
            y.append(sample.values[rows, c])
    return np.vstack(X), np.concatenate(y)


def boosting(train: Sample, seed: int) -> Predictor:
    """Of hand-made features; rounds, leaves and the kind of target by a fifth of the training series."""
    rng = np.random.default_rng([seed, 9])

    def rows(part: Sample, n: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [_rows_of_task(part, drawn_task(part, rng)) for _ in range(n)]
        return np.vstack([X for X, _ in parts]), np.concatenate([y for _, y in parts])

    n_tasks = TASKS_DRAWN if train.n_series > 100 else 3 * TASKS_DRAWN
    (X, y), (X_valid, y_valid) = (rows(part, n_tasks) for part in two_parts(train, seed))
    X_all, y_all = np.vstack([X, X_valid]), np.concatenate([y, y_valid])

    def fitted(leaves: int, corrects: bool, quantile: float | None) -> tuple[float, Any]:
        def model(n: int) -> HistGradientBoostingRegressor:
            kind: dict[str, Any] = {} if quantile is None else {"loss": "quantile", "quantile": quantile}
            return HistGradientBoostingRegressor(
                learning_rate=0.05, max_iter=n, max_leaf_nodes=leaves, early_stopping=False, random_state=seed, **kind
            )

        base, base_valid, base_all = (corrects * part[:, LINE] for part in (X, X_valid, X_all))
        tried = model(BOOSTING_ROUNDS).fit(X, y - base)
        losses = []
        for found in tried.staged_predict(X_valid):
            away = y_valid - base_valid - found
            pinball = away**2 if quantile is None else np.maximum(quantile * away, (quantile - 1) * away)
            losses.append(pinball.mean())
        n = int(np.argmin(losses)) + 1
        return float(min(losses)), model(n).fit(X_all, y_all - base_all)

    candidates = [(*fitted(leaves, corrects, None), leaves, corrects) for leaves, corrects in BOOSTING]
    _, mean_model, leaves, corrects = min(candidates, key=lambda one: one[0])
    models = [fitted(leaves, corrects, q)[1] for q in QUANTILES]

    def predict(given: Sample) -> Predicted:
        n_channels = given.values.shape[1]
        mean = np.zeros((len(given.t), n_channels))
        bands = np.zeros((len(given.t), n_channels, len(QUANTILES)))
        for c in range(n_channels):
            X_new = features(given, np.arange(len(given.t)), c)
            base = corrects * X_new[:, LINE]
            mean[:, c] = base + mean_model.predict(X_new)
            each = np.column_stack([base + model.predict(X_new) for model in models])
            bands[:, c] = np.sort(each, axis=1)
        return Predicted(mean, None, bands)

    return predict


def quietly(method: Callable[[Sample, int], Predictor], train: Sample, seed: int) -> Predictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # statsmodels puts its own filters first.
        with contextlib.redirect_stderr(io.StringIO()):
            return method(train, seed)
