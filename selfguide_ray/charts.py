"""What figures look like in the report: numbers as people read them, and bars and dots as inline SVG.

The drawings have no text and no fixed width: places are percentages, so they fit a phone, and colours are CSS classes.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from selfguide_ray.visible import visible

MARKED = 60  # a row of dots with more tasks shows their middle half instead of each
CLIPPED = 800  # characters shown of a text
TONES = 8  # colours of drop reasons in the template


def number(value: float | None) -> str:
    """One decimal, as scores are told."""
    return "–" if value is None else f"{value:.1f}"


def signed(value: float) -> str:
    """One decimal with its sign, which is a true minus; zero has none."""
    text = f"{value:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "−")


def count(value: int | None) -> str:
    """A whole number in groups of three."""
    return "–" if value is None else f"{value:,}"


def tasks(value: int) -> str:
    """So many tasks, or one."""
    return f"{value:,} task" + "s" * (value != 1)


def chance(value: float | None) -> str:
    """A p-value or q-value, three decimals."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def clipped(text: str, limit: int = CLIPPED) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"


def name(value: str) -> Markup:
    """A task's name that may break after each underscore."""
    return escape(visible(value)).replace("_", Markup("_<wbr>"))


def dots(values: Sequence[float], mean: float) -> Markup:
    """A mean on a scale of 0-100, with each task as a small dot, or their middle half if they are many."""
    marks = [_circle("task", value, 3) for value in values]
    if len(values) > MARKED:
        low, high = np.percentile(values, (25, 75))
        marks = [Markup('<rect class="middle" x="{:.2f}%" width="{:.2f}%" y="11" height="8"/>').format(low, high - low)]
    grid = [Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="0" y2="30"/>').format(x) for x in range(0, 101, 25)]
    stem = Markup('<line class="stem" x1="0" x2="{:.2f}%" y1="15" y2="15"/>').format(mean)
    return _svg("dots", 30, [*grid, stem, *marks, _circle("mean", mean, 6)])


def whisker(points: float, low: float | None, high: float | None, scale: tuple[float, float]) -> Markup:
    """A gain with its interval on a scale from its low to its high end, which holds zero."""

    def place(value: float) -> float:
        return 100 * (value - scale[0]) / (scale[1] - scale[0])

    zero = Markup('<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="16"/>').format(place(0.0))
    ends = [place(points if end is None else end) for end in (low, high)]
    interval = Markup('<line class="interval" x1="{:.2f}%" x2="{:.2f}%" y1="8" y2="8"/>').format(*ends)
    dot = Markup('<circle cx="{:.2f}%" cy="8" r="3.5"/>').format(place(points))
    return _svg("whisker", 16, [zero, interval, dot])


def stacked(parts: Sequence[dict[str, Any]]) -> Markup:
    """Shares of a whole side by side: what was kept, then a colour for each drop reason."""
    drawn, start = [], 0.0
    for part in parts:
        title = Markup("<title>{}: {:,} ({:.1f} %)</title>").format(visible(part["name"]), part["count"], part["share"])
        drawn.append(_bar(f"part {tone(part)}", start, part["share"], 22, title))
        start += part["share"]
    return _svg("stacked", 22, drawn)


def nested(line: dict[str, Any]) -> Markup:
    """Generated ⊇ accepted ⊇ elected ⊇ pairs, one upon the other."""
    steps = [(name, line[name] or 0) for name in ("generated", "accepted", "elected", "pairs")]
    whole = max(1, steps[0][1])
    return _svg("nested", 10, [_bar(name, 0, 100 * value / whole, 10) for name, value in steps if value])


def tone(part: dict[str, Any]) -> str:
    """The CSS class of a part's colour; the colours come round again if there are more reasons."""
    return "kept" if part["place"] is None else f"tone{part['place'] % TONES}"


def _bar(kind: str, start: float, width: float, height: int, title: str = "") -> Markup:
    shape = '<rect class="{}" x="{:.2f}%" width="{:.2f}%" height="{}">{}</rect>'
    return Markup(shape).format(kind, start, width, height, title)


def _circle(kind: str, x: float, radius: int) -> Markup:
    return Markup('<circle class="{}" cx="{:.2f}%" cy="15" r="{}"/>').format(kind, x, radius)


def _svg(kind: str, height: int, shapes: Sequence[str]) -> Markup:
    frame = '<svg class="{}" width="100%" height="{}" aria-hidden="true">{}</svg>'
    return Markup(frame).format(kind, height, Markup("").join(shapes))


def register(templates: jinja2.Environment) -> None:
    """Make all of it known to a template, and every text in it visible."""
    templates.finalize = visible
    templates.filters |= {f.__name__: f for f in (number, signed, chance, count, tasks, duration, clipped, name, tone)}
    templates.globals |= {f.__name__: f for f in (dots, whisker, stacked, nested)}
