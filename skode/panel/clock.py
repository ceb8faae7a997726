"""Time as users give it: numbers, datetimes with or without time zone, timedeltas.

A *stamp* is a time as it is stored: int64, float64, timedelta64, or datetime64 in UTC, in the unit it came in. Elapsed
times are differences of stamps, so a change to daylight saving time is no jump, and no digit is lost to a distant
zero. Datetimes are never read as integers: pandas holds them in s, ms, us or ns.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Place = Callable[[int], str]

SECOND = np.timedelta64(1, "s")


@dataclass(frozen=True)
class Clock:
    """What a panel's times are.

    Parameters
    ----------
    dtype : dtype
        That of the user's times.
    """

    dtype: Any

    @property
    def tz(self) -> datetime.tzinfo | None:
        """Time zone of the user's times."""
        return getattr(self.dtype, "tz", None)

    @property
    def kind(self) -> str:
        """``"number"``, ``"datetime"`` or ``"timedelta"``."""
        return {"M": "datetime", "m": "timedelta"}.get(self.dtype.kind, "number")

    @property
    def unit(self) -> str | None:
        """Unit of elapsed times: seconds for datetimes and timedeltas, None (their own) for numbers."""
        return None if self.kind == "number" else "s"

    def elapsed(self, stamps: NDArray[Any], origins: NDArray[Any]) -> NDArray[np.float64]:
        """Times since ``origins``, in ``unit``."""
        span = stamps - origins
        if self.unit is not None:
            return np.asarray(span / SECOND, dtype=np.float64)
        rounded = stamps.astype(np.float64) - origins.astype(np.float64)
        return np.where(np.abs(rounded) < 2.0**62, span.astype(np.float64), rounded)  # int64 may have overflowed

    def show(self, stamps: NDArray[Any]) -> Any:
        """Stamps as an index in the user's time zone."""
        if self.tz is None:
            return pd.Index(stamps)
        return pd.DatetimeIndex(stamps).tz_localize("UTC").tz_convert(self.tz)

    def restore(self, stamps: NDArray[Any]) -> Any:
        """The panel's own stamps as an index of the user's dtype."""
        return self.show(stamps).astype(self.dtype)

    def joined(self, other: Clock) -> Clock:
        """The clock of two panels' times together.

        Raises
        ------
        ValueError
            If one has numbers and the other datetimes, or their time zones differ.
        """
        if self.dtype == other.dtype:
            return self
        if self.kind != other.kind or str(self.tz) != str(other.tz):
            raise ValueError(f"times of dtypes {self.dtype} and {other.dtype} do not join into one panel.")
        return Clock(pd.Index([], dtype=self.dtype).append(pd.Index([], dtype=other.dtype)).dtype)

    def moments(self, t: Any) -> NDArray[Any]:
        """Stamps of times that a user asks for; timedelta64 where offsets were given to a panel of datetimes.

        Parameters
        ----------
        t : number, Timestamp, Timedelta, str or sequence of them

        Returns
        -------
        ndarray of shape () or (n_times,)

        Raises
        ------
        TypeError
            If times of this kind do not belong to the panel: a number among datetimes, a naive time among aware ones.
        ValueError
            If a time is missing or infinite.
        """
        scalar = np.ndim(t) == 0
        index = pd.Index([_parsed(moment) for moment in ([t] if scalar else t)]) if _is_text(t) else _as_index(t)
        if not len(index):
            raise ValueError("no times were given.")
        stamps = stamps_of(index, lambda row: f"time {row}")
        found = Clock(index.dtype)
        allowed = {"number": {"number"}, "datetime": {"datetime", "timedelta"}, "timedelta": {"timedelta"}}[self.kind]
        if found.kind not in allowed:
            raise TypeError(
                f"the panel's times are {_words(self)}; {index[0]!r} is not among such times. Allowed: "
                + {
                    "number": "numbers.",
                    "datetime": "timestamps, or offsets such as '6h' or pd.Timedelta(6, 'h').",
                    "timedelta": "timedeltas.",
                }[self.kind]
            )
        if found.kind == "datetime" and (found.tz is None) != (self.tz is None):
            raise TypeError(
                f"the panel's times are {_words(self)}, but {index[0]!r} has {found.tz or 'no time zone'}: "
                f"mixed time zones. Use tz_localize or tz_convert."
            )
        return stamps[0] if scalar else stamps


def _words(clock: Clock) -> str:
    return "numbers" if clock.kind == "number" else f"{clock.kind}s ({clock.tz or 'no time zone'})"


def _is_text(t: Any) -> bool:
    moments = [t] if isinstance(t, str) or np.ndim(t) == 0 else list(t)
    return bool(moments) and all(isinstance(moment, str) for moment in moments)


def _parsed(text: str) -> pd.Timedelta | pd.Timestamp:
    """An offset such as "6h", or else a timestamp."""
    try:
        float(text)
    except ValueError:
        pass
    else:
        raise TypeError(f"{text!r} is a number in quotes: give the number, or an offset with its unit, such as '6h'.")
    try:
        return pd.Timedelta(text)
    except ValueError:
        return pd.Timestamp(text)


def _as_index(t: Any) -> Any:
    if np.ndim(t) == 0:
        return pd.Index(np.atleast_1d(t) if isinstance(t, np.ndarray) else [t])
    if np.ndim(t) > 1:
        raise ValueError(f"times must be one-dimensional, but have shape {np.shape(t)}.")
    return t if isinstance(t, pd.Index) else pd.Index(t, dtype=getattr(t, "dtype", None))


def stamps_of(times: Any, at: Place) -> NDArray[Any]:
    """Stamps of an index of times.

    Parameters
    ----------
    times : Index
    at : callable
        Words for the place of a row in the user's data.

    Returns
    -------
    ndarray
        int64, float64, timedelta64, or datetime64 in UTC.

    Raises
    ------
    TypeError
        If these are no times, or times of several kinds or zones.
    ValueError
        If a time is missing or infinite.
    """
    dtype = times.dtype
    missing = times.isna()
    if missing.any():
        raise ValueError(f"{at(int(missing.argmax()))}: the time is missing ({times[missing.argmax()]}).")
    if isinstance(dtype, pd.DatetimeTZDtype):
        return np.asarray(times.tz_convert("UTC").tz_localize(None))
    if isinstance(dtype, np.dtype) and dtype.kind in "mM":
        return np.asarray(times)
    if dtype.kind in "iu":
        if dtype.kind == "u" and len(times) and times.max() > np.iinfo(np.int64).max:
            raise ValueError(f"{at(int(np.argmax(times)))}: the time is {times.max()}, more than int64 holds.")
        return np.asarray(times, dtype=np.int64)
    if dtype.kind == "f":
        stamps = np.asarray(times, dtype=np.float64)
        infinite = np.isinf(stamps)
        if infinite.any():
            raise ValueError(f"{at(int(infinite.argmax()))}: the time is infinite.")
        return stamps
    raise TypeError(_not_times(times, at))


def _not_times(times: Any, at: Place) -> str:
    """Why an index is no index of times."""
    advice = "Times must be numbers or datetimes: convert them, by pd.to_datetime(..., utc=True) for example."
    kinds: dict[str, int] = {}
    for row, time in enumerate(times):
        zone = getattr(time, "tzinfo", None)
        kinds.setdefault(f"{type(time).__name__}{f' in {zone}' if zone else ''}", row)
        if len(kinds) == 2:
            break
    (kind, row), *others = kinds.items()
    if others:
        other, place = others[0]
        zones = "mixed time zones or kinds of time"
        return f"{zones}: {kind} at {at(row)}, {other} at {at(place)}. {advice}"
    return f"times of dtype {times.dtype} are no times ({at(row)}: {times[row]!r}). {advice}"
