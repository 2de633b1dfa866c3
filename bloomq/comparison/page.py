"""A comparison as one HTML page: its style, its script, its plots and its data inside it.

Names, provenance and texts are anybody's. Invariant: text reaches the page through `escaped` or as
JSON of ASCII without `<`, `>` and `&`, which the script writes as text; and the page's policy
allows this script and this style alone.
"""

from __future__ import annotations

import html
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bloomq import __version__
from bloomq.comparison import output_figures, weight_figures
from bloomq.comparison.drawing import escaped, tag
from bloomq.comparison.labels import Labels
from bloomq.comparison.outputs import Outputs
from bloomq.comparison.weights import Tensor
from bloomq.comparison.words import decibels, percent, perplexity, signed, size, small

if TYPE_CHECKING:
    from bloomq.comparison import Model, Report

MARK = "<!-- bloomq compare -->"
# Of the provenance, which may be anything: characters of a value, entries.
_MOST_VALUE, _MOST_FACTS = 400, 40
# Of the table of matrices.
_COLUMNS = (
    "matrix", "stored", "shape", "bits", "error", "SNR, dB", "largest error", "largest / rms",
    "kurtosis", "beyond 6 rms",
)  # fmt: skip


def written(report: Report) -> str:
    """The page."""
    folder = files("bloomq.comparison")
    style, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'"
    )
    title = f"{report.pack.name} beside {report.original.name}"
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(_body(report))
        + f'\n<script type="application/json" id="data">{_data(report)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def framed(page: str) -> str:
    """A page inside another one, a notebook's, which it cannot reach."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" width="100%" height="1000" '
        'style="border:0" title="bloomq compare"></iframe>'
    )


def _body(report: Report) -> Iterator[str]:
    found = report.outputs
    yield _header(report)
    yield "<main>"
    yield _cards(report)
    if isinstance(found, Outputs):
        yield from _predictions(found)
    yield from _weights(report)
    yield _section("Size", weight_figures.composition(report), "size")
    yield _section("Where this comes from", _origin(report), "origin")
    yield "</main>"
    yield _footer()


def _header(report: Report) -> str:
    config = report.config
    sizes = (
        f"{config['n_layer']} layers, {config['n_head']} heads, "
        f"{config['hidden_size']:,} channels, {config['vocab_size']:,} tokens"
    )
    pair = f"{report.pack.name} beside {report.original.name}"
    return tag(
        "header", {},
        tag("p", {"class": "over"}, tag("bdi", {}, escaped(pair))),
        tag("h1", {}, escaped(report.verdict)),
        tag("p", {"class": "headline"}, escaped(report.headline)),
        tag("p", {"class": "quiet"}, escaped(sizes)),
    )  # fmt: skip


def _card(title: str, value: str, below: str) -> str:
    return tag(
        "div", {"class": "card"}, tag("h2", {}, escaped(title)),
        tag("p", {"class": "value"}, escaped(value)), tag("p", {"class": "quiet"}, escaped(below)),
    )  # fmt: skip


def _cards(report: Report) -> str:
    """The figures that matter most."""
    cards, found = [], report.outputs
    if isinstance(found, Outputs):
        total = found.total
        low, high = (100 * bound for bound in total.change_interval)
        if found.is_text:
            cards.append(_card(
                "Perplexity", f"{signed(100 * total.change)} %",
                f"{perplexity(total.base_perplexity)} → {perplexity(total.perplexity)}; "
                f"95 %: {signed(low)} to {signed(high)}"))  # fmt: skip
        cards.append(_card(
            "Same top token", percent(total.same_top),
            f"of five likeliest {percent(total.same_few)}, of ten {percent(total.same_best)}",
        ))  # fmt: skip
        cards.append(_card(
            "KL divergence", f"{small(total.kl)}",
            f"nats a token; 99 % of places below {small(total.kl_quantiles['99%'])}"))  # fmt: skip
    elif isinstance(found, Labels):
        lines = f"{found.places:,} places of {found.lines:,} texts"
        if found.same_label is not None:
            cards.append(_card("Same label", percent(found.same_label), lines))
            cards.append(_card("Probability", percent(found.shift or 0.0),
                               "of a label, moved on average where it moved most"))  # fmt: skip
        cards.append(_card("Error of results", small(found.relative_error),
                           f"relative, squared; largest {small(found.max_error)}"))  # fmt: skip
    worst = max(report.tensors, key=lambda tensor: tensor.relative_error)
    cards.append(_card("Worst matrix", decibels(worst.snr_db),
                       f"above its error: {worst.name}, {worst.stored}"))  # fmt: skip
    share = report.pack.nbytes / max(1, report.original.nbytes)
    cards.append(_card("Size", size(report.pack.nbytes),
                       f"{report.pack.bits_per_weight:.2f} bits a weight, {percent(share)} of "
                       f"{size(report.original.nbytes)}"))  # fmt: skip
    return tag("div", {"class": "cards"}, *cards)


def _section(title: str, body: str, name: str, about: str = "") -> str:
    note = [tag("p", {"class": "about"}, escaped(about))] if about else []
    heading = tag("h2", {"id": f"{name}-title"}, escaped(title))
    return tag("section", {"aria-labelledby": f"{name}-title"}, heading, *note, body)


def _predictions(found: Outputs) -> Iterator[str]:
    about = (
        f"Both models read the same tokens, in windows of {found.window}. KL: how far the pack's "
        "probabilities of the next token lie from the original's, over the whole vocabulary."
    )
    panels = tag("div", {"class": "panels"}, *output_figures.along(found))
    under = tag("h3", {}, "KL along the text") + tag(
        "p", {"class": "about"}, "Nats, means of neighbouring places; dashed: the text's mean."
    )
    yield _section("Text by text", output_figures.by_text(found) + under + panels, "texts", about)
    pair = output_figures.agreement(found.agreement)
    if found.is_text:
        pair += output_figures.calibration(found)
    body = tag("div", {"class": "pair"}, pair)
    if found.worst:
        body += tag("h3", {}, "The places that differ most") + output_figures.worst(found)
    words = output_figures.ties_words(found.ties, found.total.places)
    yield _section("Where the top token changes", body, "ties", words)


def _weights(report: Report) -> Iterator[str]:
    tensors = report.tensors
    panels = tag("div", {"class": "panels"}, *weight_figures.errors(tensors))
    tables = any(t.layer is None and t.kind in weight_figures.KINDS for t in tensors)
    dashed = " Dashed: the embedding (and a head of its own)." if tables else ""
    yield _section(
        "Error by layer", panels, "errors",
        f"Relative squared error of each matrix, |W − W′|² / |W|², on one logarithmic "
        f"scale.{dashed}",
    )  # fmt: skip
    panels = tag("div", {"class": "panels"}, *weight_figures.outliers(tensors))
    yield _section(
        "Outliers by layer", panels + weight_figures.scatter(tensors), "outliers",
        "The largest weight of each matrix, in units of its root mean square: what a grid must "
        f"reach to.{dashed}",
    )  # fmt: skip
    worst = max(tensors, key=lambda tensor: tensor.relative_error)
    yield _section(
        "One matrix and its grid", _chosen(report, worst), "grid",
        "The original's weights in steps of the scale that each is stored with; ticks below: the "
        "levels that the pack rounds them to.",
    )  # fmt: skip
    yield _section("Every matrix", _table(tensors), "matrices",
                   "A click on a column's name sorts by it.")  # fmt: skip


def _chosen(report: Report, tensor: Tensor) -> str:
    options = [
        tag("option", {"value": i, **({"selected": ""} if t is tensor else {})}, escaped(t.name))
        for i, t in enumerate(report.tensors)
    ]
    facts = weight_figures.told(tensor, report.row_names)
    rows = [
        tag("dt", {}, escaped(key)) + tag("dd", {}, tag("bdi", {}, escaped(value)))
        for key, value in facts.items()
    ]
    caption = weight_figures.picture(tensor.histogram)["told"]
    left = tag(
        "div", {}, tag("p", {"class": "controls"}, tag("label", {"for": "chosen"}, "Matrix "),
                       tag("select", {"id": "chosen"}, *options)),
        weight_figures.histogram_svg(tensor),
        tag("p", {"class": "about", "id": "caption"}, escaped(caption)),
    )  # fmt: skip
    return tag("div", {"class": "pair"}, left, tag("dl", {"id": "facts"}, *rows))


def _table(tensors: Sequence[Tensor]) -> str:
    """Every matrix; the script sorts by the numbers in `data-value`."""
    head = [
        tag("th", {"scope": "col", "aria-sort": "none"},
            tag("button", {"type": "button"}, escaped(name)))
        for name in _COLUMNS
    ]  # fmt: skip
    rows = []
    for i, t in enumerate(tensors):
        cells: list[tuple[float, str]] = [
            (t.shape[0] * t.shape[1], f"{t.shape[0]:,} × {t.shape[1]:,}"),
            (t.bits, f"{t.bits:.2f}"),
            (t.relative_error, small(t.relative_error)),
            (t.snr_db, "∞" if not t.relative_error else f"{t.snr_db:.1f}"),
            (t.max_error, small(t.max_error)), (t.largest, f"{t.largest:.1f}"),
            (t.kurtosis, f"{t.kurtosis:.2f}"), (t.beyond, small(100 * t.beyond) + " %"),
        ]  # fmt: skip
        rows.append(tag(
            "tr", {}, tag("th", {"scope": "row", "data-value": i}, escaped(t.name)),
            tag("td", {"data-value": t.stored}, escaped(t.stored)),
            *(tag("td", {"data-value": _sortable(value)}, text) for value, text in cells),
        ))  # fmt: skip
    table = tag("table", {"id": "tensors"}, tag("thead", {}, tag("tr", {}, *head)),
                tag("tbody", {}, *rows))  # fmt: skip
    return tag("div", {"class": "scroll tall", "tabindex": 0, "role": "region",
                       "aria-label": "every matrix"}, table)  # fmt: skip


def _sortable(value: float) -> str:
    return {float("inf"): "1e999", float("-inf"): "-1e999"}.get(value, f"{value:.9g}")


def _origin(report: Report) -> str:
    notes = "".join(tag("li", {}, tag("bdi", {}, escaped(note))) for note in report.notes)
    both = tag("div", {"class": "pair"}, _facts(report.pack, "Pack"),
               _facts(report.original, "Original"))  # fmt: skip
    return both + (tag("h3", {}, "Notes") + tag("ul", {}, notes) if notes else "")


def _facts(model: Model, title: str) -> str:
    facts: Mapping[str, object] = {
        "path": model.path, "kind": model.kind, "weights": size(model.nbytes), **model.provenance
    }  # fmt: skip
    rows = [
        tag("dt", {}, escaped(_value(key))) + tag("dd", {}, tag("bdi", {}, escaped(_value(value))))
        for key, value in list(facts.items())[:_MOST_FACTS]
    ]
    return tag("div", {}, tag("h3", {}, title), tag("dl", {}, *rows))


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_VALUE else f"{text[:_MOST_VALUE]}…"


def _footer() -> str:
    return tag("footer", {}, tag("p", {}, f"bloomq compare {escaped(__version__)}")) + (
        "<noscript>Sorting and the choice of a matrix need this page's own script, which is turned "
        "off here; everything else is drawn already.</noscript>"
    )


def _data(report: Report) -> str:
    """What the script exchanges, as JSON that HTML has nothing to say about."""
    data: list[dict[str, Any]] = [
        {
            **weight_figures.picture(tensor.histogram),
            "facts": list(weight_figures.told(tensor, report.row_names).items()),
        }
        for tensor in report.tensors
    ]
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
