"""Plots as SVG texts, drawn with numpy alone: distributions, curves by batch size, stacked stages.

Colours and fonts come from the page's style sheet: the classes `c0` to `c5` are series, `ink`,
`soft` and `line` what stands around them. Each plot is well-formed XML with a title and a
description for those who don't see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kp_runtime.bench_results import Times
from kp_runtime.html_page import clean

__all__ = ["SERIES", "Point", "batch_curves", "distribution", "milliseconds", "stage_bar", "ticks"]

SERIES = 6
"""Number of colours; a seventh series has the first one's again."""

_BINS = 60
_LETTER = 7.0  # about the width of a letter at 13 px


@dataclass(frozen=True)
class Point:
    """Milliseconds a face at one batch size; `low` to `high` is the interval of the median."""

    batch: int
    ms: float
    low: float
    high: float


def distribution(name: str, times: Times, color: int) -> str:
    """A histogram of all samples on a log axis of its own, with p50, p95 and p99 marked."""
    width, left, right, top, base = 380, 16, 16, 26, 124
    s = times.summary
    samples = np.concatenate([np.asarray(turn) for turn in times.turns_ms])
    room = max(0.04 * math.log(s.max_ms / s.min_ms), 0.005)
    low, high = math.log(s.min_ms) - room, math.log(s.max_ms) + room
    counts, edges = np.histogram(np.log(samples), bins=_BINS, range=(low, high))

    def at(ms: float) -> float:
        return left + (math.log(ms) - low) / (high - low) * (width - left - right)

    parts = []
    for i in np.flatnonzero(counts).tolist():
        x0, x1 = at(math.exp(edges[i])), at(math.exp(edges[i + 1]))
        tall = max(2.0, (base - top) * counts[i] / counts.max())  # a bin with one sample must be seen
        parts.append(_tag("rect", f"fill c{color}", x=x0, y=base - tall, width=x1 - x0 - 0.5, height=tall))
    marks = (("p50", s.p50_ms, ""), ("p95", s.p95_ms, "6 3"), ("p99", s.p99_ms, "2 3"))
    places = _spread([at(ms) for _, ms, _ in marks], 4 * _LETTER, left + 8, width - right - 8)
    for (label, ms, dashes), place in zip(marks, places, strict=True):
        parts.append(_tag("line", "stroke ink", x1=at(ms), x2=at(ms), y1=top - 6, y2=base, stroke_dasharray=dashes))
        parts.append(_tag("text", "ink small", label, x=place, y=top - 11, text_anchor="middle"))
    parts += _axis([(at(v), v) for v in ticks(s.min_ms, s.max_ms)], left, width - right, base)
    told = ", ".join(f"{label} {milliseconds(ms)} ms" for label, ms, _ in marks)
    description = f"{len(samples)} samples; {told}, longest {milliseconds(s.max_ms)} ms"
    return _svg(f"distribution of {name}", description, width, base + 36, parts)


def batch_curves(curves: Mapping[str, Sequence[Point]]) -> str:
    """Milliseconds a face by batch size, a line for each file, bars for the intervals."""
    width, height, left, right, top, bottom = 860, 380, 56, 236, 34, 48
    batches = sorted({point.batch for points in curves.values() for point in points})
    most = max(point.high for points in curves.values() for point in points)
    grid = [value for value in _steps(0, most * 1.08, 6) if value <= most * 1.08]
    span = math.log2(batches[-1] / batches[0]) or 1.0
    base = height - bottom

    def x(batch: int) -> float:
        share = math.log2(batch / batches[0]) / span if len(batches) > 1 else 0.5
        return left + 28 + share * (width - left - right - 56)

    def y(ms: float) -> float:
        return base - ms / (most * 1.08) * (base - top)

    parts = []
    for value in grid:
        parts.append(_tag("line", "stroke line", x1=left, x2=width - right, y1=y(value), y2=y(value)))
        parts.append(_tag("text", "soft", _label(value), x=left - 8, y=y(value) + 4, text_anchor="end"))
    for batch in batches:
        parts.append(_tag("text", "soft", str(batch), x=x(batch), y=base + 20, text_anchor="middle"))
    parts.append(_tag("text", "soft", "ms a face", x=left - 8, y=top - 18, text_anchor="start"))
    middle = (left + width - right) / 2
    parts.append(_tag("text", "soft", "faces in a batch", x=middle, y=base + 40, text_anchor="middle"))
    ends = _spread([y(points[-1].ms) for points in curves.values()], 20, top, base - 4)
    for i, ((name, points), end) in enumerate(zip(curves.items(), ends, strict=True)):
        color = f"c{i % SERIES}"
        line = " ".join(f"{x(p.batch):.2f},{y(p.ms):.2f}" for p in points)
        parts.append(_tag("polyline", f"stroke {color} bold", points=line))
        for p in points:
            parts += _interval(x(p.batch), y(p.low), y(p.high), color)
            where = f"{name}, batch {p.batch}: {milliseconds(p.ms)} ms a face"
            where += f" ({milliseconds(p.low)} to {milliseconds(p.high)})"
            parts.append(
                _tag("circle", f"fill {color}", inside=_tag("title", "", where), cx=x(p.batch), cy=y(p.ms), r=4.5)
            )
        last = x(points[-1].batch), y(points[-1].ms)
        parts.append(_tag("line", f"stroke {color}", x1=last[0] + 7, y1=last[1], x2=width - right + 10, y2=end))
        parts.append(_tag("text", "ink", name if len(name) <= 30 else name[:29] + "…", x=width - right + 16, y=end + 4))
    told = []
    for name, points in curves.items():
        told.append(f"{name}: {', '.join(f'{milliseconds(p.ms)} at {p.batch}' for p in points)}")
    return _svg("milliseconds a face by batch size", "; ".join(told), width, height, parts)


def stage_bar(stages: Mapping[str, float]) -> str:
    """The stages' median milliseconds, one behind the other."""
    width, left, right, top, base = 860, 4, 24, 8, 60
    total = sum(stages.values())
    scale = (width - left - right) / total
    parts, at = [], float(left)
    for i, (name, ms) in enumerate(stages.items()):
        wide = ms * scale
        told = f"{name}: {milliseconds(ms)} ms, {ms / total:.1%}"
        # a stage too short to be seen keeps half a pixel, and its line in the table
        shown = max(wide - 1, 0.5)
        inside = _tag("title", "", told)
        parts.append(_tag("rect", f"fill c{i % SERIES}", inside=inside, x=at, y=top, width=shown, height=base - top))
        label = f"{name} {milliseconds(ms)}"
        for text in (label, name):
            if len(text) * _LETTER + 12 < wide:
                parts.append(_tag("text", "paper", text, x=at + 8, y=(top + base) / 2 + 4))
                break
        at += wide
    parts += _axis([(left + v * scale, v) for v in _steps(0, total, 8)], left, width - right, base + 4)
    told = ", ".join(f"{name} {milliseconds(ms)} ms" for name, ms in stages.items())
    return _svg("medians of the stages of a photo", told, width, base + 40, parts)


def ticks(low: float, high: float) -> list[float]:
    """Round values inside a range over 0, for a log axis; the ends where no round value is inside."""
    if high / low < 6:
        inside = _steps(low, high, 4)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high / low < 300 else (1,)
        inside = [v for v in (f * 10.0**d for d in decades for f in factors) if low <= v <= high]
    return inside if len(inside) > 1 else sorted({low, high})


def milliseconds(ms: float) -> str:
    """Three digits, as many as an interval mostly leaves meaning to."""
    if ms == 0:
        return "0"
    return f"{ms:.{min(4, max(0, 2 - math.floor(math.log10(abs(ms)))))}f}"


def _steps(low: float, high: float, most: int) -> list[float]:
    """At most about `most` multiples of 1, 2 or 5 times a power of ten, inside a range."""
    rough = max(high - low, high * 1e-6) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near the wanted ones as lets each be `gap` from the next, in their order."""
    order = np.argsort(wanted, kind="stable").tolist()
    placed, at = list(wanted), low - gap
    for i in order:
        at = placed[i] = max(wanted[i], at + gap)
    at = high + gap
    for i in reversed(order):
        at = placed[i] = min(placed[i], at - gap)
    return placed


def _axis(marks: Sequence[tuple[float, float]], left: float, right: float, y: float) -> list[str]:
    """A horizontal axis; the last mark tells the unit, and one whose number would touch the next one's has none."""
    parts = [_tag("line", "stroke soft", x1=left, x2=right, y1=y, y2=y)]
    unit, free = " ms", math.inf
    for x, value in reversed(marks):
        label = _label(value) + unit
        parts.append(_tag("line", "stroke soft", x1=x, x2=x, y1=y, y2=y + 5))
        half = len(label) * _LETTER / 2
        if x + half < free:
            parts.append(_tag("text", "soft small", label, x=x, y=y + 20, text_anchor="middle"))
            unit, free = "", x - half - 6
    return parts


def _interval(x: float, low: float, high: float, color: str) -> list[str]:
    caps = [_tag("line", f"stroke {color}", x1=x - 5, x2=x + 5, y1=y, y2=y) for y in (low, high)]
    return [_tag("line", f"stroke {color}", x1=x, x2=x, y1=low, y2=high), *caps]


def _svg(title: str, description: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = _tag("title", "", title) + _tag("desc", "", description)
    name = clean(f"{title}: {description}")
    inside = "\n".join([head, *parts])
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">{inside}</svg>'


def _tag(name: str, classes: str, text: str = "", *, inside: str = "", **attributes: float | str) -> str:
    """An element with an escaped text, or with ready markup `inside`; empty attributes are left out."""
    words = {"class": classes} | {key.replace("_", "-"): value for key, value in attributes.items()}
    said = "".join(f' {k}="{v if isinstance(v, str) else f"{v:.2f}"}"' for k, v in words.items() if v != "")
    return f"<{name}{said}>{inside}{clean(text)}</{name}>"


def _label(value: float) -> str:
    """A round value on an axis."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
