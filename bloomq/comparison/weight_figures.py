"""Plots of weights: their errors, their outliers, their grid, and what they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bloomq.comparison.drawing import Axis, Panel, escaped, linear, logarithmic, tag
from bloomq.comparison.histogram import MARGIN, Histogram
from bloomq.comparison.weights import Tensor
from bloomq.comparison.words import decibels, percent, size, small

if TYPE_CHECKING:
    from bloomq.comparison import Part, Report

KINDS = {
    "attn.qkv": "attention, qkv", "attn.out": "attention, out", "mlp.up": "MLP, up",
    "mlp.down": "MLP, down", "wte": "embedding", "lm_head": "head",
}  # fmt: skip
# A histogram's picture: its left and right ends, the axis, and how high its peak goes.
_LEFT, _RIGHT, _FLOOR, _PEAK = 12.0, 388.0, 168.0, 12.0


def figure(drawn: str, title: str, caption: str = "") -> str:
    """A plot with its title."""
    below = tag("figcaption", {}, tag("b", {}, escaped(title)), f" {escaped(caption)}".rstrip())
    return tag("figure", {}, below, drawn)


def by_layer(
    tensors: Sequence[Tensor], values: Mapping[str, float], axis: Axis, what: str, form: Any
) -> list[str]:
    """A panel for each kind of matrix, layer by layer, all on one axis; values: by their names."""
    layers = 1 + max((tensor.layer or 0 for tensor in tensors), default=0)
    found = []
    for kind, title in KINDS.items():
        chosen = [t for t in tensors if t.kind == kind and t.layer is not None]
        if not chosen:
            continue
        panel = Panel(_layers(layers), axis, width=300, height=170)
        points = [(float(t.layer or 0), values[t.name]) for t in chosen]
        panel.line(points, "ours")
        told = [f"{t.name}: {form(values[t.name])}" for t in chosen]
        panel.dots([(*at, text) for at, text in zip(points, told, strict=True)], "ours", 2.6)
        for tensor in tensors:
            if tensor.layer is None and tensor.kind in KINDS:  # the table, for comparison
                level = values[tensor.name]
                panel.line([(0.0, level), (layers - 1.0, level)], "theirs dashed")
        ends = f"from {form(min(v for _, v in points))} to {form(max(v for _, v in points))}"
        found.append(figure(panel.svg(f"{what} of {title}, by layer: {ends}"), title))
    return found


def _layers(count: int) -> Axis:
    """With a tick for every layer, or for about six of them."""
    step = max(1, math.ceil((count - 1) / 6))
    ticks = tuple((float(i), str(i)) for i in range(0, count, step))
    edge = 0.35 if count > 1 else 0.5
    return Axis(-edge, count - 1 + edge, ticks, "layer")


def errors(tensors: Sequence[Tensor]) -> list[str]:
    values = {tensor.name: tensor.relative_error for tensor in tensors}
    return by_layer(tensors, values, logarithmic(values.values()), "Relative squared error", small)


def outliers(tensors: Sequence[Tensor]) -> list[str]:
    values = {tensor.name: tensor.largest for tensor in tensors}
    axis = linear(values.values())
    return by_layer(tensors, values, axis, "Largest weight in units of the mean", "{:.1f}".format)


def scatter(tensors: Sequence[Tensor]) -> str:
    """Error by outliers, a mark for each matrix."""
    x = linear((t.largest for t in tensors), "largest |w| / rms")
    panel = Panel(x, logarithmic(t.relative_error for t in tensors), width=400, height=230)
    for style, drawn, chosen in (
        ("ours", panel.dots, [t for t in tensors if t.kind.startswith("attn")]),
        ("theirs", panel.squares, [t for t in tensors if t.kind.startswith("mlp")]),
        ("third", panel.dots, [t for t in tensors if not t.kind.startswith(("attn", "mlp"))]),
    ):
        drawn(
            [
                (
                    t.largest, t.relative_error,
                    f"{t.name}: error {small(t.relative_error)}, largest {t.largest:.1f}",
                )
                for t in chosen
            ],
            style,
        )  # fmt: skip
    key = tag(
        "p", {"class": "key"},
        *(tag("span", {"class": f"swatch {style}"}) + tag("span", {}, name) for style, name in (
            ("ours round", "attention"), ("theirs", "MLP"), ("third round", "embedding, head"))),
    )  # fmt: skip
    title = "Error beside outliers"
    drawn_svg = panel.svg("Relative squared error of each matrix by its largest weight; see table")
    return figure(drawn_svg + key, title, "one mark a matrix; up and to the right: hard to round")


def picture(histogram: Histogram) -> dict[str, Any]:
    """A histogram as paths, for the page to show: the area, the grid's lines, and three labels."""
    width = (_RIGHT - _LEFT) / len(histogram.counts)
    peak = max(histogram.counts) or 1
    path = [f"M{_LEFT:g} {_FLOOR:g}"]
    for i, count in enumerate(histogram.counts):
        path.append(
            f"V{_FLOOR - count / peak * (_FLOOR - _PEAK):.0f}H{_LEFT + (i + 1) * width:.1f}"
        )
    middle, half = (_LEFT + _RIGHT) / 2, (_RIGHT - _LEFT) / 2
    lines = [
        f"M{middle + level / histogram.limit * half:.1f} {_FLOOR:g}v6" for level in histogram.levels
    ]
    end = histogram.limit / MARGIN
    if histogram.unit == "rms":
        labels = [f"{m}{end:g} rms" for m in ("−", "")]
        told = f"{percent(histogram.beyond / max(1, histogram.weights))} outside the picture"
    else:
        form = "{:.0f}" if end >= 2 else "{:.3g}"
        labels = [f"{m}{form.format(end)}" for m in ("−", "")]
        count = len(histogram.levels)
        told = (f"{count} levels" if count else "more levels than can be drawn") + (
            f"; {percent(histogram.beyond / max(1, histogram.weights))} outside the picture"
        )
    return {"area": "".join(path) + f"V{_FLOOR:g}Z", "grid": "".join(lines), "ends": labels,
            "told": told}  # fmt: skip


def histogram_svg(tensor: Tensor) -> str:
    """The picture of one matrix, whose paths the page's script exchanges."""
    drawn = picture(tensor.histogram)
    offset = (_RIGHT - _LEFT) / 2 / MARGIN
    middle = (_LEFT + _RIGHT) / 2
    ends = [
        tag("text", {"x": f"{x:.1f}", "y": 190, "text-anchor": "middle", "class": "tick",
                     "id": f"end-{i}"}, escaped(words))
        for i, (x, words) in enumerate(
            zip((middle - offset, middle + offset), drawn["ends"], strict=True))
    ]  # fmt: skip
    zero = tag("text", {"x": middle, "y": 190, "text-anchor": "middle", "class": "tick"}, "0")
    floor = {"x1": _LEFT, "x2": _RIGHT, "y1": _FLOOR, "y2": _FLOOR, "class": "floor"}
    label = "Histogram of a matrix's weights in steps of the grid that they are rounded to"
    return tag(
        "svg", {"viewBox": "0 0 400 196", "role": "img", "aria-label": label},
        tag("path", {"d": drawn["area"], "class": "area", "id": "area"}),
        tag("line", floor), tag("path", {"d": drawn["grid"], "class": "levels", "id": "grid"}),
        *ends, zero,
    )  # fmt: skip


def composition(report: Report) -> str:
    """What each part takes, in the original and in the pack, to one scale."""
    most = max(report.pack.nbytes, report.original.nbytes) or 1
    bars = []
    for row, (model, field) in enumerate(
        ((report.original, "original_bytes"), (report.pack, "nbytes"))
    ):
        y, x = 22 + row * 52, 0.0
        name = "original" if row == 0 else "pack"
        words = f"{name}: {size(model.nbytes)}, {model.bits_per_weight:.2f} bits a weight"
        bars.append(tag("text", {"x": 0, "y": y - 6, "class": "label"}, escaped(words)))
        for style, part in zip(_shades(report.parts), report.parts, strict=True):
            width = 960 * getattr(part, field) / most
            told = tag("title", {}, escaped(f"{part.name}: {size(getattr(part, field))}"))
            place = {"x": f"{x:.1f}", "y": y, "width": f"{max(width - 1, 0.4):.1f}", "height": 26}
            bars.append(tag("rect", {**place, "class": style}, told))
            x += width
    told = f"The original takes {size(report.original.nbytes)}, the pack {size(report.pack.nbytes)}"
    drawn = tag("svg", {"viewBox": "0 0 960 104", "role": "img", "aria-label": told}, *bars)
    rows = [
        tag("tr", {}, tag("th", {"scope": "row"},
            tag("span", {"class": f"swatch {style}"}), escaped(part.name)),
            tag("td", {}, f"{part.weights:,}"), tag("td", {}, size(part.original_bytes)),
            tag("td", {}, size(part.nbytes)),
            tag("td", {}, f"{8 * part.nbytes / max(1, part.weights):.2f}"))
        for style, part in zip(_shades(report.parts), report.parts, strict=True)
    ]  # fmt: skip
    head = _head_row(("part", "weights", "original", "pack", "bits a weight"))
    return tag("figure", {}, drawn, tag("div", {"class": "scroll"}, tag(
        "table", {}, tag("thead", {}, head), tag("tbody", {}, *rows))))  # fmt: skip


def _shades(parts: Iterable[Part]) -> list[str]:
    return [f"part-{i % 5}" for i, _ in enumerate(parts)]


def _head_row(names: Sequence[str]) -> str:
    return tag("tr", {}, *(tag("th", {"scope": "col"}, escaped(name)) for name in names))


def told(tensor: Tensor, row_names: Mapping[int, str]) -> dict[str, str]:
    """What a matrix's card says."""
    is_table = tensor.kind in ("wte", "lm_head")
    rows = ", ".join(
        f"{i}{f' “{row_names[i]}”' if is_table and i in row_names else ''} ({small(e)})"
        for i, e in tensor.worst_rows
    )
    columns = ", ".join(f"{i} ({small(e)})" for i, e in tensor.worst_columns)
    return {
        "stored": f"{tensor.stored}, {tensor.bits:.2f} bits a weight (original {tensor.original})",
        "shape": f"{tensor.shape[0]:,} × {tensor.shape[1]:,}",
        "relative squared error": f"{small(tensor.relative_error)} ({decibels(tensor.snr_db)})",
        "largest error": f"{small(tensor.max_error)} (rms of the weights {small(tensor.rms)})",
        "largest weight": f"{tensor.largest:.1f} × rms; beyond 6 rms {percent(tensor.beyond)}",
        "kurtosis": f"{tensor.kurtosis:.2f} (normal: 3)",
        "worst rows": rows or "none",
        "worst columns": columns or "none",
        **({"norm": "a scale of its columns was moved into the norm in front"}
           if tensor.folded else {}),
    }  # fmt: skip
