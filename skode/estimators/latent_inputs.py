"""How LatentODERegressor reads X: as a panel of the channels of the fit, on its clock and in its units."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from skode.estimators.arguments import DocumentationLink
from skode.estimators.containers import Columns, Container, is_frames, read_series, read_wide
from skode.estimators.fitted_latent import FittedLatent, Forecaster
from skode.estimators.namespaces import ArrayNamespaces
from skode.estimators.stored import Stored
from skode.exceptions import warn
from skode.models import FAMILIES, SolverOptions
from skode.panel import Panel
from skode.panel.checks import shown
from skode.runtime import as_array, resolve_device, row_keys

DEFAULT_METHOD = "tsit5"


class LatentInputs(DocumentationLink, Stored, ArrayNamespaces):
    """Reading of X, for fits and predictions."""

    likelihood: Any
    point_process: bool
    window: Any
    series_id: Hashable
    time: Hashable
    values: Any
    static: Any
    covariates: Any
    origin: Any
    method: str
    rtol: float
    atol: float
    step_size: float | None
    max_num_steps: int
    device: Any

    _fitted: FittedLatent
    _by_channels: bool
    _shared_clock: bool
    _zero: Any
    _all_columns: tuple[Hashable, ...]
    _channels: list[int]

    def _read(self, X: Any, *, reset: bool) -> tuple[Container, np.dtype[Any]]:
        """X as a panel whose channels are those of the fit."""
        columns = Columns(self.series_id, self.time, self.values, self.static, self.covariates, self.origin)
        if not (isinstance(X, Panel | pd.DataFrame) or is_frames(X)):
            X = as_array(X)
        container = read_series(X, columns)
        if container is None:
            options: dict[str, Any] = {"dtype": (np.float64, np.float32), "ensure_all_finite": "allow-nan"}
            if reset or not self._by_channels:
                table = validate_data(self, X, reset=reset, **options)
            else:  # a model of channels takes series of any length
                table = check_array(X, **options)
            container, dtype = read_wide(X, np.asarray(table, np.float64), columns), table.dtype
        else:
            dtype = np.dtype(getattr(X, "dtype", np.float64)) if container.kind == "dense" else np.dtype(np.float64)
            if reset:
                self.n_features_in_ = len(container.panel.columns)
                self._name_features(container.panel.columns)
        if reset:
            self._by_channels = container.kind != "wide"
        return container, dtype

    def _name_features(self, columns: tuple[Hashable, ...]) -> None:
        if columns and all(isinstance(column, str) for column in columns):
            self.feature_names_in_ = np.array(columns, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_

    def _checked(self, panel: Panel, fresh: bool) -> Panel:
        """The panel's observed channels, told of what cannot be learned.

        Raises
        ------
        ValueError
            If there is nothing to learn from.
        """
        if not len(panel):
            raise ValueError("X has no series.")
        if fresh:
            self._shared_clock = panel.origin == "panel"
            self._zero = zero_of(panel) if self._shared_clock else None
            self._all_columns = panel.columns
            seen = ~np.isnan(panel.values).all(axis=0)
            self._channels = np.flatnonzero(seen).tolist()
            if panel.columns and not len(self._channels) and not self.point_process:
                raise ValueError(f"no value of any of the {len(panel)} series of X is observed: all are NaN.")
            if not panel.columns and not self.point_process:
                raise ValueError("X has no channels; bare events need point_process=True.")
            for position in np.flatnonzero(~seen):
                warn(
                    f"channel {panel.columns[position]!r} is never observed in the {len(panel)} series of the fit; it "
                    "is left out, and predicted as NaN.",
                )
        return self._known_channels(panel)

    def _families(self, columns: tuple[Hashable, ...]) -> tuple[str, ...]:
        """Of the channels of the panel.

        Raises
        ------
        ValueError
            If there are not as many as channels, or one is unknown.
        """
        given = self.likelihood
        if isinstance(given, str):
            families = [given] * len(columns)
        elif isinstance(given, Mapping):
            strangers = [name for name in given if name not in self._all_columns]
            if strangers:
                raise ValueError(
                    f"likelihood names {strangers[0]!r}, but X has the channels {list(self._all_columns)}."
                )
            families = [given.get(name, "gaussian") for name in columns]
        else:
            if len(given) != len(self._all_columns):
                raise ValueError(f"likelihood has {len(given)} entries for {len(self._all_columns)} channels.")
            families = [given[position] for position in self._channels]
        unknown = [name for name in families if name not in FAMILIES]
        if unknown:
            raise ValueError(f"likelihood {unknown[0]!r} is none of {', '.join(FAMILIES)}.")
        return tuple(families)

    @staticmethod
    def _check_support(panel: Panel, families: tuple[str, ...]) -> None:
        """Refuse counts that are none, and binary values other than 0 and 1.

        Raises
        ------
        ValueError
            It names the first.
        """
        for i, family in enumerate(families):
            x = panel.values[:, i]
            known = ~np.isnan(x)
            if family == "bernoulli":
                bad, told = known & (x != 0) & (x != 1), "0 and 1"
            elif family == "poisson":
                bad, told = known & ((x < 0) | (x != np.round(x))), "whole numbers, 0 or more"
            else:
                continue
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"channel {panel.columns[i]!r} has the likelihood {family!r}, which takes {told}; series "
                    f"{shown(panel.ids[panel.series[row]])} has {x[row]:g}."
                )

    def _known_channels(self, panel: Panel) -> Panel:
        """The channels that the model has, on the clock of the fit."""
        if self._shared_clock:
            panel = panel.with_origin(self._zero) if len(panel.times) else panel
        return panel if len(self._channels) == len(panel.columns) else panel.take(self._channels, axis=1)

    def _read_fitted(self, X: Any) -> tuple[Container, Panel]:
        """X, and as a panel of the model's channels.

        Raises
        ------
        ValueError
            If its channels or known inputs are not those of the fit.
        """
        check_is_fitted(self)
        container, _ = self._read(X, reset=False)
        panel = container.panel
        if panel.columns != self._all_columns:
            if set(panel.columns) == set(self._all_columns) and len(set(panel.columns)) == len(panel.columns):
                order = [panel.columns.index(column) for column in self._all_columns]
                panel = panel.take(order, axis=1)
                container = Container(panel, container.kind, container.given)
            elif len(panel.columns) != len(self._all_columns) or self._named():
                raise ValueError(
                    f"X has the channels {list(panel.columns)}; the model was fitted to {list(self._all_columns)}."
                )
        config = self._fitted.config
        found = (panel.covariates.shape[1], panel.static.shape[1])
        if found != (config.n_covariates, config.n_static):
            raise ValueError(
                f"X has {found[0]} covariates and {found[1]} static columns; the model was fitted to "
                f"{config.n_covariates} and {config.n_static}."
            )
        return container, self._known_channels(panel)

    def _named(self) -> bool:
        return all(isinstance(column, str) for column in self._all_columns)

    # --- the model's units ---

    def _solver(self) -> SolverOptions:
        """Of predictions."""
        method = DEFAULT_METHOD if self.method == "auto" else self.method
        step_size = None if self.step_size is None else float(self.step_size)
        return SolverOptions(method, float(self.rtol), float(self.atol), step_size, int(self.max_num_steps))

    def _forecaster(self, panel: Panel) -> Forecaster:
        device = resolve_device(self.device, "float64")
        device = torch.device("cpu") if device.type == "mps" else device
        series = self._fitted.scaling.series(panel, torch.float64, device, self._fitted.config.clock)
        return Forecaster(self._fitted, series, device, self._solver())

    def _windows(self, panel: Panel, unit: float) -> NDArray[np.float64] | None:
        """Scaled times between which events were looked for, (n_series, 2); None for those of the rows.

        Raises
        ------
        ValueError
            If it is no interval, or a row lies outside.
        """
        if self.window is None:
            return None
        ends = np.array([_number(end) for end in self.window], dtype=np.float64)
        if ends.shape != (2,) or not ends[0] < ends[1]:
            raise ValueError(f"window={self.window!r} must be (start, end) with start < end.")
        outside = np.flatnonzero((panel.times < ends[0]) | (panel.times > ends[1]))
        if len(outside):
            row = int(outside[0])
            raise ValueError(
                f"series {shown(panel.ids[panel.series[row]])} has a row at {panel.times[row]:g} since its origin, "
                f"outside of window={self.window!r}."
            )
        return np.tile(ends / unit, (len(panel), 1))


def _number(end: Any) -> float:
    """A time since the origin, in seconds where it is a length of time."""
    if isinstance(end, str | pd.Timedelta | np.timedelta64):
        return float(pd.Timedelta(end).total_seconds())
    return float(end)


def zero_of(panel: Panel) -> Any:
    """Time 0 of a panel with a common clock, as ``Panel.with_origin`` takes it."""
    zero = panel.origins[0]
    return pd.Timestamp(zero, tz="UTC") if getattr(panel.time_dtype, "tz", None) is not None else zero


def series_keys(panel: Panel, seed: int) -> NDArray[np.uint64]:
    """A number for each series that depends on its observations and ``seed`` alone."""
    seen = panel.rows(~np.isnan(panel.values).all(axis=1)) if panel.columns else panel
    known = ~np.isnan(seen.values)
    keys = row_keys(np.column_stack([seen.times, np.where(known, seen.values, 0.0), known]), seed)
    total = np.zeros(len(panel), dtype=np.uint64)
    np.add.at(total, seen.series, keys)
    high, low = (total >> np.uint64(32)).astype(np.float64), (total & np.uint64(0xFFFFFFFF)).astype(np.float64)
    return row_keys(np.column_stack([high, low, seen.lengths]), seed)
