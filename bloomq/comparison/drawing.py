"""Plots as SVG text: axes, and marks on them. Colours and fonts come from the page's style.

Invariant: every text and every attribute is escaped here, so a caller may pass what a file holds.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 8.0, 8.0, 30.0  # of a panel, around what is plotted


def tag(name: str, attributes: Mapping[str, object], *children: str) -> str:
    """An element; children are elements or `escaped` text."""
    listed = "".join(f' {key}="{escaped(str(value))}"' for key, value in attributes.items())
    return f"<{name}{listed}>{''.join(children)}</{name}>"


def escaped(text: str) -> str:
    """Text as it can be seen, and as HTML has nothing to say about: controls, marks of direction
    and halves of characters are spelled out."""
    shown = "".join(c if c.isprintable() else _NAMED.get(c, f"\\u{{{ord(c):x}}}") for c in text)
    return html.escape(shown)


_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍", "\xa0": " "}


@dataclass(frozen=True, slots=True)
class Axis:
    """From low to high, by values or by their logarithms; ticks: (value, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    title: str = ""
    kind: Literal["linear", "log"] = "linear"

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one; what lies beyond is put at the end."""
        if self.kind == "log":
            low, high = math.log10(self.low), math.log10(self.high)
            at = math.log10(value) if value > 0 else low
        else:
            low, high, at = self.low, self.high, value
        share = (at - low) / (high - low) if high > low else 0.5
        return min(1.0, max(0.0, share)) if math.isfinite(share) else 1.0


def linear(values: Iterable[float], title: str = "", *, least: float = 0.0) -> Axis:
    """From 0 to a round number above all finite values (and `least`), with about four ticks."""
    most = max([v for v in values if math.isfinite(v)] + [least]) or 1.0
    power = 10.0 ** math.floor(math.log10(most))
    step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5) if s * power * 4 >= most)
    count = math.ceil(most / step - 1e-9)
    ticks = tuple((i * step, f"{i * step:,.6g}") for i in range(count + 1))
    return Axis(0.0, count * step, ticks, title)


def logarithmic(values: Iterable[float], title: str = "") -> Axis:
    """Around all positive finite values; ticks at powers of ten, and between them where these are
    few."""
    found = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(found) / 1.5, max(found) * 1.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    factors = (1,) if span > 3 else (1, 3) if span > 1.5 else (1, 2, 5)
    ticks = [f * 10.0**d for d in decades for f in factors]
    shown = tuple((t, _power(t)) for t in ticks if low <= t <= high)
    return Axis(low, high, shown, title, "log")


def _power(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-")


def unit(title: str) -> Axis:
    """Shares, as percentages."""
    return Axis(0.0, 1.0, tuple((i / 4, f"{25 * i} %") for i in range(5)), title)


@dataclass(slots=True)
class Panel:
    """One plot, `width` by `height` units, which the page scales."""

    x: Axis
    y: Axis
    width: float = 300.0
    height: float = 190.0
    marks: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        """Where a value lies."""
        across = _LEFT + self.x.place(x) * (self.width - _LEFT - _RIGHT)
        down = self.height - _BOTTOM - self.y.place(y) * (self.height - _TOP - _BOTTOM)
        return across, down

    def line(self, points: Sequence[Point], style: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self.marks.append(tag("polyline", {"points": path, "class": f"line {style}"}))

    def dots(self, points: Sequence[tuple[float, float, str]], style: str, size: float = 3) -> None:
        """points: (x, y, what a pointer is told)."""
        for x, y, told in points:
            cx, cy = self.at(x, y)
            place = {"cx": f"{cx:.1f}", "cy": f"{cy:.1f}", "r": size, "class": f"dot {style}"}
            self.marks.append(tag("circle", place, tag("title", {}, escaped(told))))

    def squares(self, points: Sequence[tuple[float, float, str]], style: str) -> None:
        for x, y, told in points:
            cx, cy = self.at(x, y)
            place = {"x": f"{cx - 3:.1f}", "y": f"{cy - 3:.1f}", "width": 6, "height": 6}
            told_tag = tag("title", {}, escaped(told))
            self.marks.append(tag("rect", {**place, "class": f"dot {style}"}, told_tag))

    def bar(self, left: float, right: float, top: float, style: str, told: str) -> None:
        """From the x axis up; left, right: where it begins and ends."""
        (x0, y), (x1, base) = self.at(left, top), self.at(right, self.y.low)
        place = {
            "x": f"{x0 + 0.75:.1f}", "y": f"{y:.1f}", "width": f"{max(0.5, x1 - x0 - 1.5):.1f}",
            "height": f"{max(0.0, base - y):.1f}", "class": f"bar {style}",
        }  # fmt: skip
        self.marks.append(tag("rect", place, tag("title", {}, escaped(told))))

    def inside(self, left: float, right: float, top: float, words: str) -> None:
        """A few characters within a bar, at its top."""
        across, down = self.at((left + right) / 2, top)
        place = {"x": f"{across:.1f}", "y": f"{down + 12:.1f}", "text-anchor": "middle"}
        self.marks.append(tag("text", {**place, "class": "inside"}, escaped(words)))

    def svg(self, label: str) -> str:
        """The plot; label: what it shows, for those who do not see it."""
        size = {"viewBox": f"0 0 {self.width:g} {self.height:g}", "role": "img"}
        return tag("svg", {**size, "aria-label": label}, *self._axes(), *self.marks)

    def _axes(self) -> list[str]:
        parts = []
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        for value, label in self.y.ticks:
            _, y = self.at(self.x.low, value)
            line = {"x1": _LEFT, "x2": f"{right:g}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
            parts.append(tag("line", {**line, "class": "grid"}))
            place = {"x": _LEFT - 5, "y": f"{y + 3.5:.1f}", "text-anchor": "end"}
            parts.append(tag("text", {**place, "class": "tick"}, escaped(label)))
        for value, label in self.x.ticks:
            x, _ = self.at(value, self.y.low)
            place = {"x": f"{x:.1f}", "y": f"{bottom + 13:.1f}", "text-anchor": "middle"}
            parts.append(tag("text", {**place, "class": "tick"}, escaped(label)))
        if self.x.title:
            middle = (_LEFT + right) / 2
            place = {"x": f"{middle:.1f}", "y": f"{self.height - 4:.1f}", "text-anchor": "middle"}
            parts.append(tag("text", {**place, "class": "axis"}, escaped(self.x.title)))
        return parts
