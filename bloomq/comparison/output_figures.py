"""Plots and tables of predictions: text by text, along each, and how sure the models are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bloomq.comparison.drawing import Axis, Panel, escaped, linear, tag, unit
from bloomq.comparison.outputs import Bin, Figures, Outputs, Ties
from bloomq.comparison.weight_figures import figure
from bloomq.comparison.words import percent, perplexity, signed, small

_FEWEST = 5  # places of a bin whose share is drawn: of fewer it says nothing


def by_text(outputs: Outputs) -> str:
    """A row for each text, and one of all."""
    most = max((text.kl for text in outputs.texts), default=0.0) or 1.0
    least = min((text.same_top for text in outputs.texts), default=0.0)
    floor = min(0.9, math.floor(10 * least) / 10)
    names = (
        "text", "same top token", "KL, nats", "perplexity", "original", "pack", "places",
    )  # fmt: skip
    head = tag("tr", {}, *(tag("th", {"scope": "col"}, escaped(name)) for name in names))
    rows = [_row(text, most, floor) for text in outputs.texts]
    if len(rows) > 1:
        rows.append(_row(outputs.total, most, floor, "total"))
    table = tag("table", {}, tag("thead", {}, head), tag("tbody", {}, *rows))
    return tag("div", {"class": "scroll"}, table)


def _row(text: Figures, most: float, floor: float, style: str = "") -> str:
    bars = _bar(text.kl / most, "ours") if not style else ""
    same = _bar((text.same_top - floor) / (1 - floor), "third") if not style else ""
    low, high = (100 * bound for bound in text.change_interval)
    between = f"{signed(low)} to {signed(high)}" if math.isfinite(high - low) else ""
    return tag(
        "tr", {"class": style}, tag("th", {"scope": "row"}, escaped(text.name)),
        tag("td", {}, same, tag("span", {}, percent(text.same_top))),
        tag("td", {}, bars, tag("span", {}, small(text.kl))),
        tag("td", {}, f"{signed(100 * text.change)} %",
            tag("small", {}, f" {between}" if between else "")),
        tag("td", {}, perplexity(text.base_perplexity)), tag("td", {}, perplexity(text.perplexity)),
        tag("td", {}, f"{text.places:,}"),
    )  # fmt: skip


def _bar(share: float, style: str) -> str:
    """A bar in a cell of a table."""
    width = 60 * min(1.0, max(0.02, share))
    bar = {"x": 0, "y": 1, "width": f"{width:.1f}", "height": 8, "rx": 2, "class": f"bar {style}"}
    return tag("svg", {"viewBox": "0 0 60 10", "class": "cell", "aria-hidden": "true"},
               tag("rect", bar))  # fmt: skip


def along(outputs: Outputs) -> list[str]:
    """KL from the start to the end of each text, all on one scale."""
    axis = linear(value for _, curve in outputs.along for value in curve)
    found = []
    for text, (size, curve) in zip(outputs.texts, outputs.along, strict=True):
        places = len(curve) * size
        ticks = linear([places]).ticks
        x = Axis(0.0, float(places), tuple(t for t in ticks if t[0] <= places), "token")
        panel = Panel(x, axis, width=300, height=150)
        panel.line([(0.0, text.kl), (float(places), text.kl)], "theirs dashed")
        points = [((i + 0.5) * size, value) for i, value in enumerate(curve)]
        panel.line(points, "ours")
        label = f"KL along {text.name}: mean {small(text.kl)}, at most {small(max(curve))} nats"
        found.append(figure(panel.svg(label), text.name))
    return found


def calibration(outputs: Outputs) -> str:
    """How often what a model is sure of is so."""
    x = Axis(0.0, 1.0, unit("").ticks, "probability of the likeliest token")
    panel = Panel(x, unit(""), width=300, height=230)
    panel.line([(0.0, 0.0), (1.0, 1.0)], "even")
    pairs = (("theirs", outputs.base_calibration, panel.squares, "original"),
             ("ours", outputs.calibration, panel.dots, "pack"))  # fmt: skip
    for style, found, draw, name in pairs:
        bins = [b for b in found.bins if b.places >= _FEWEST]
        panel.line([(b.mean, b.share) for b in bins], style)
        draw([(b.mean, b.share, f"{name}: of {b.places:,} places at {percent(b.mean)}, "
               f"{percent(b.share)} came") for b in bins], style)  # fmt: skip
    key = tag(
        "p", {"class": "key"},
        *(tag("span", {"class": f"swatch {style}"}) + tag("span", {}, escaped(words))
          for style, words in (
              ("ours round", f"pack, {percent(outputs.calibration.error)} off on average"),
              ("theirs", f"original, {percent(outputs.base_calibration.error)}"))),
    )  # fmt: skip
    label = "How often the likeliest token came, by its probability, for the pack and the original"
    return figure(panel.svg(label) + key, "Calibration", "dotted: right as often as it says")


def agreement(bins: Sequence[Bin]) -> str:
    """How often both like the same token best, by how sure the original is."""
    x = Axis(0.0, 1.0, unit("").ticks, "the original's probability of its likeliest token")
    panel = Panel(x, unit(""), width=300, height=230)
    total = sum(b.places for b in bins) or 1
    for i, one in enumerate(bins):
        if one.places < _FEWEST:
            continue
        told = f"{one.places:,} places ({percent(one.places / total)}): same {percent(one.share)}"
        panel.bar(i / len(bins), (i + 1) / len(bins), one.share, "third", told)
        panel.inside(i / len(bins), (i + 1) / len(bins), one.share, f"{100 * one.share:.0f}")
    label = "Share of places with the same likeliest token, by the original's probability of it"
    return figure(panel.svg(label), "Agreement", "by how sure the original is")


def ties_words(ties: Ties, places: int) -> str:
    """Where the likeliest token changed, in a sentence or two."""
    if not ties.places:
        return f"The likeliest token is the same at all {places:,} places."
    factor = math.exp(min(50.0, ties.median_gap))
    return (
        f"The likeliest token changed at {ties.places:,} of {places:,} places. At half of these "
        f"the original's two best were within {small(ties.median_gap)} nats, a factor of "
        f"{factor:.3g} in probability; {percent(ties.near)} lie within 0.1 nats. The pack took the "
        f"original's second choice at {percent(ties.second)} of them."
    )


def worst(outputs: Outputs) -> str:
    """The places that differ most, as a table."""
    names = ("before", "came", "original's best", "pack's best")
    head = tag("tr", {}, *(tag("th", {"scope": "col", "class": "token"}, escaped(name))
                           for name in names), tag("th", {"scope": "col"}, "KL"))  # fmt: skip
    rows = [
        tag(
            "tr", {},
            tag("td", {"class": "text"}, tag("bdi", {}, escaped(place.before)),
                tag("small", {}, tag("bdi", {}, escaped(f" ({place.text})")))),
            *(tag("td", {"class": "token"}, tag("bdi", {}, escaped(token.replace(" ", "␣"))))
              for token in (place.came, place.base_best, place.best)),
            tag("td", {}, small(place.kl)),
        )
        for place in outputs.worst
    ]  # fmt: skip
    table = tag("table", {}, tag("thead", {}, head), tag("tbody", {}, *rows))
    return tag("div", {"class": "scroll"}, table)
