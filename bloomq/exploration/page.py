"""An exploration as one HTML page: its style, its script and its data inside it, nothing outside.

Tokens are anybody's text. Invariant: the data is JSON of ASCII without `<`, `>` and `&`; the script
writes it as text, never as HTML; and the page's policy allows this script and this style alone.
"""

from __future__ import annotations

import html
import json
import zlib
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
MARK = "<!-- bloomq explore -->"
_LEVELS = 255


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """weights: [L, H, T, T], query by key; slopes, horizons: [H]."""

    weights: F32
    slopes: F32
    horizons: F64


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """What a page shows: of T tokens, probabilities, ranks and K alternatives."""

    title: str
    prompt_tokens: int
    tokens: tuple[str, ...]
    probabilities: F64
    ranks: I64
    alternatives: tuple[tuple[str, ...], ...]
    alternative_probabilities: F64
    attention: Attention


def written(shown: Shown) -> str:
    """The page."""
    folder = files("bloomq.exploration")
    style, script, body = (
        (folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html")
    )
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'"
    )
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(visible(shown.title))}</title>\n<style>{style}</style>\n</head>\n"
        f'<body>\n{body}<script type="application/json" id="data">{_embedded(shown)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def framed(page: str) -> str:
    """A page inside another one, a notebook's, which it cannot reach."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" width="100%" height="1000" '
        'style="border:0" title="bloomq explore"></iframe>'
    )


def visible(text: str) -> str:
    """Text as it can be seen: what is not printable (controls, marks of direction) escaped."""
    return "".join(c if c.isprintable() else _NAMED.get(c) or _escaped(c) for c in text)


_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def _escaped(char: str) -> str:
    return f"\\u{{{ord(char):x}}}"


def _embedded(shown: Shown) -> str:
    """The data as JSON that HTML has nothing to say about."""
    attention = shown.attention
    layers, heads = attention.weights.shape[:2]
    data = {
        "title": visible(shown.title),
        "promptTokens": shown.prompt_tokens,
        "tokens": [visible(token) for token in shown.tokens],
        "breaks": ["\n" in token for token in shown.tokens],
        "probabilities": _numbers(shown.probabilities),
        "ranks": shown.ranks.tolist(),
        "alternatives": [
            [[visible(text), float(f"{p:.4g}")] for text, p in zip(texts, row, strict=False)]
            for texts, row in zip(
                shown.alternatives, shown.alternative_probabilities.tolist(), strict=True
            )
        ],
        "layers": layers,
        "heads": heads,
        "slopes": _numbers(attention.slopes),
        "horizons": _numbers(attention.horizons),
        "attention": b64encode(zlib.compress(coded(attention.weights))).decode(),
    }
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def coded(weights: F32) -> bytes:
    """[L, H, T, T] -> uint8 [L, H, T(T+1)/2]: 255 times the root of each weight a query can have,
    row by row. By the root, weights down to 4e-6 are told from 0."""
    length = weights.shape[2]
    queries, keys = np.tril_indices(length)
    parts = []
    for layer in weights:  # one at a time: half the memory
        picked = np.sqrt(np.clip(layer[:, queries, keys], 0.0, 1.0))
        parts.append(np.rint(picked * _LEVELS).astype(np.uint8).tobytes())
    return b"".join(parts)


def _numbers(values: F32 | F64) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.4g}") for v in values.tolist()]


def _digest(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
