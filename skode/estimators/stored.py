"""How estimators are stored: as dictionaries, lists, numbers, strings and NumPy arrays, with a format number.

``__getstate__`` writes what :mod:`pickle`, :mod:`joblib` and ``skops.io`` store. Classes of skode's own become
dictionaries of their fields, so that a file names no class but the estimators', and private classes may move or grow.

The rules of the format:

- A class or an estimator may get a field or an argument *with a default* at any time: a state that lacks it takes the
  default.
- Any other change raises ``FORMAT`` by one and adds a function to ``UPGRADES`` that makes the new state of the old one;
  or none, and such files are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, NoReturn, TypeVar

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator

from skode.exceptions import StoredModelError
from skode.models import LatentConfig, ODENetConfig
from skode.models.kriging import Kernel
from skode.models.predictive import Calibration, Spread
from skode.runtime.versions import VERSION

FORMAT = 1
# By the format that they read: from a state of that format to one of the next.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_KIND = "__skode__"  # a dictionary with this key stands for an object of the kind that it names
_FORMAT, _VERSION = "_skode_format", "_skode_version"
_CLASSES: dict[str, type] = {kind.__name__: kind for kind in (ODENetConfig, LatentConfig, Calibration, Spread, Kernel)}


Kind = TypeVar("Kind", bound=type)


def stored(kind: Kind) -> Kind:
    """Let objects of a dataclass or named tuple be stored as their fields; for use as a decorator."""
    _CLASSES[kind.__name__] = kind
    return kind


class Stored(BaseEstimator):
    """An estimator whose state is plain: any device and any later version with the same format loads it."""

    def __getstate__(self) -> dict[str, Any]:
        state = {name: plain(value) for name, value in super().__getstate__().items()}
        return {**state, _FORMAT: FORMAT, _VERSION: VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        upgraded = _upgraded(dict(state), type(self).__name__)
        version = upgraded.pop(_VERSION)
        del upgraded[_FORMAT]
        try:
            attributes = {name: restored(value) for name, value in upgraded.items()}
        except (KeyError, TypeError) as error:
            _refuse(type(self).__name__, version, f"it holds {error}, which this version does not know", error)
        super().__setstate__({**_defaults(type(self)), **attributes})


def _upgraded(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The state in the format of now."""
    version = state.get(_VERSION, "before 0.1.0")
    number = state.get(_FORMAT, 0)
    while number != FORMAT:
        if number not in UPGRADES:
            _refuse(name, version, f"its format is {number}; this version reads {_readable()}")
        state = UPGRADES[number](state)
        number = state[_FORMAT] = number + 1
    return state


def _readable() -> str:
    oldest = FORMAT
    while oldest - 1 in UPGRADES:
        oldest -= 1
    return f"format {FORMAT}" if oldest == FORMAT else f"formats {oldest} to {FORMAT}"


def _refuse(name: str, version: str, reason: str, cause: Exception | None = None) -> NoReturn:
    raise StoredModelError(
        f"this {name} was stored by skode {version} and cannot be loaded by skode {VERSION}: {reason}. Load it "
        f"with skode {version}, or fit it anew with this version."
    ) from cause


def _defaults(estimator: type) -> dict[str, Any]:
    """Of the constructor's arguments: a state of an older version may lack some."""
    parameters = signature(estimator).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not Parameter.empty}


# --- values ---


def plain(value: Any) -> Any:
    """A value as dictionaries, lists, tuples, numbers, strings and arrays; what else it holds stays as it is."""
    kind = type(value)
    if _CLASSES.get(kind.__name__) is kind:
        names = signature(kind).parameters
        return {_KIND: kind.__name__, **{name: plain(getattr(value, name)) for name in names}}
    if kind in (list, tuple):
        return kind(plain(part) for part in value)
    if kind is dict:
        return {key: plain(part) for key, part in value.items()}
    return _plain_leaf(value)


def _plain_leaf(value: Any) -> Any:
    match value:
        case np.dtype():
            return {_KIND: "dtype", "name": value.str}
        case torch.device():
            return {_KIND: "device", "name": str(value)}
        case torch.dtype():
            return {_KIND: "torch.dtype", "name": str(value).removeprefix("torch.")}
        case pd.Timestamp():
            zone = None if value.tz is None else str(value.tz)
            moment = value if zone is None else value.tz_convert("UTC").tz_localize(None)
            return {_KIND: "Timestamp", "moment": moment.to_datetime64(), "zone": zone}
        case pd.Timedelta():
            return {_KIND: "Timedelta", "length": value.to_timedelta64()}
    return value


def _timestamp(moment: Any, zone: str | None) -> pd.Timestamp:
    found = pd.Timestamp(moment)
    return found if zone is None else found.tz_localize("UTC").tz_convert(zone)


_LEAVES: dict[str, Callable[..., Any]] = {
    "dtype": np.dtype,
    "device": torch.device,
    "torch.dtype": {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float64)}.__getitem__,
    "Timestamp": _timestamp,
    "Timedelta": pd.Timedelta,
}


def restored(value: Any) -> Any:
    """What :func:`plain` was given.

    Raises
    ------
    KeyError, TypeError
        If it names a kind or a field that is unknown.
    """
    kind = type(value)
    if kind is dict and _KIND in value:
        fields = {name: restored(part) for name, part in value.items() if name != _KIND}
        name = value[_KIND]
        return _CLASSES[name](**fields) if name in _CLASSES else _LEAVES[name](*fields.values())
    if kind in (list, tuple):
        return kind(restored(part) for part in value)
    if kind is dict:
        return {key: restored(part) for key, part in value.items()}
    return value
