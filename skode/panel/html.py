"""A panel in a notebook: a table and a picture, as HTML.

The picture is an SVG written by hand, since this room has no matplotlib. Its text and frame have the page's own colour,
so that both are readable on light and on dark pages.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skode.panel.store import Store
from skode.panel.writers import write_summary

Array = NDArray[np.float64]
N_CHANNELS, N_SERIES, N_POINTS = 4, 4, 200  # that are drawn; of longer series every so many points
WIDTH, HEIGHT = 230, 130  # of a channel's picture, in pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 22  # around its frame
COLOURS = ("#3b82c4", "#e07b1a", "#2f9e5b", "#c9508f")  # of series; about as far from white as from black
LONGEST_NAME = 24
UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def write_html(store: Store) -> str:
    """Facts, the picture of the first channels and series, and a table of the first series."""
    parts = [_facts(store), _picture(store), write_summary(store).to_html(border=0)]
    return f'<div class="skode-panel">{"".join(parts)}</div>'


def _facts(store: Store) -> str:
    cells = store.values.size
    observed = int(np.isfinite(store.values).sum())
    facts = {
        "series": str(len(store.ids)),
        "rows": str(len(store.stamps)),
        "channels": _named(store.columns),
        "covariates": _named(store.covariate_names),
        "static": _named(store.static_names),
        "observed values": f"{observed} ({observed / cells:.0%})" if cells else "",
        "times": _span(store),
        "longest series": _length(store),
    }
    rows = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{escape(fact)}</td></tr>'
        for name, fact in facts.items()
        if fact
    )
    return f"<table><caption>Panel</caption><tbody>{rows}</tbody></table>"


def _named(names: tuple[Any, ...]) -> str:
    shown = ", ".join(_short(name) for name in names[:8])
    return f"{len(names)}: {shown}{', ...' if len(names) > 8 else ''}" if names else ""


def _short(name: Any) -> str:
    text = str(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _span(store: Store) -> str:
    if not len(store.stamps):
        return ""
    first, last = store.clock.show(np.array([store.stamps.min(), store.stamps.max()]))
    if store.clock.kind == "number":
        first, last = f"{first:g}", f"{last:g}"
    return f"{first} to {last} ({store.clock.kind}s)"


def _length(store: Store) -> str:
    """From its first row to its last, in the unit of elapsed times."""
    some = np.flatnonzero(store.lengths > 0)
    if not len(some):
        return ""
    times = np.asarray(store.times)
    longest = float((times[store.offsets[some + 1] - 1] - times[store.offsets[some]]).max())
    return _elapsed(store, longest) if store.clock.unit else f"{longest:g} units of time"


def _elapsed(store: Store, time: float) -> str:
    """An elapsed time, seconds in the largest unit that they are one of."""
    if store.clock.unit is None:
        return f"{time:.4g}"
    unit, size = next((unit for unit in UNITS if abs(time) >= unit[1]), UNITS[-1])
    return f"{time / size:.4g} {unit}"


def _picture(store: Store) -> str:
    """One frame for each of the first channels, with the first series that have rows."""
    series = np.flatnonzero(store.lengths > 0)[:N_SERIES].tolist()
    channels = range(min(N_CHANNELS, len(store.columns)))
    if not series or not channels:
        return ""
    drawn = "".join(_channel(store, channel, series, channel * WIDTH) for channel in channels)
    width = WIDTH * len(channels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        'role="img" style="max-width:100%;height:auto" font-family="sans-serif" font-size="10" fill="currentColor">'
        f"<title>Values of the first {len(series)} series against time</title>{drawn}</svg>"
    )


def _channel(store: Store, channel: int, series: list[int], shift: int) -> str:
    """A frame, its labels, and a line with dots for each series."""
    rows = np.concatenate([np.arange(*store.offsets[i : i + 2]) for i in series])
    t, x = np.asarray(store.times)[rows], store.values[rows, channel]
    known = np.isfinite(x)
    (t0, t1), (x0, x1) = _ends(t), _ends(x[known])
    lines = []
    for colour, i in zip(COLOURS, series, strict=False):
        own = np.arange(*store.offsets[i : i + 2])
        own = own[np.isfinite(store.values[own, channel])]
        own = own[:: -(-len(own) // N_POINTS) or 1]
        if len(own):
            across = LEFT + (np.asarray(store.times)[own] - t0) / (t1 - t0) * (WIDTH - LEFT - RIGHT)
            down = HEIGHT - BOTTOM - (store.values[own, channel] - x0) / (x1 - x0) * (HEIGHT - TOP - BOTTOM)
            lines.append(_line(across, down, colour, _short(store.ids[i])))
    low, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    labels = [
        _text(LEFT, TOP - 8, _short(store.columns[channel]), "start"),
        _text(LEFT, low + 14, _elapsed(store, t0), "start"),
        _text(right, low + 14, _elapsed(store, t1), "end"),
    ]
    if known.any():
        labels += [_text(LEFT - 4, low, f"{x0:.3g}", "end"), _text(LEFT - 4, TOP + 8, f"{x1:.3g}", "end")]
    else:
        labels.append(_text((LEFT + right) // 2, (TOP + low) // 2, "nothing observed", "middle"))
    frame = f'<path d="M{LEFT} {TOP}V{low}H{right}" fill="none" stroke="currentColor" stroke-opacity="0.6"/>'
    return f'<g transform="translate({shift} 0)">{frame}{"".join(labels)}{"".join(lines)}</g>'


def _ends(x: Array) -> tuple[float, float]:
    """Least and largest, apart from each other."""
    low, high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    room = 0.5 * max(abs(low), 1e-300) if low else 0.5
    return (low, high) if low < high else (low - room, high + room)


def _line(across: Array, down: Array, colour: str, name: str) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(across, down, strict=True)]
    path = f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" stroke-opacity="0.7"/>'
    # A line of no length with round ends is a dot.
    dots = f'<path d="M{"h0M".join(points)}h0" stroke="{colour}" stroke-width="4" stroke-linecap="round"/>'
    return f"<g><title>{escape(name)}</title>{path}{dots}</g>"


def _text(x: int, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
