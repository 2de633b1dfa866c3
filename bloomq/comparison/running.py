"""Both models on the same texts: a language model's predictions, or a classifier's results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

import numpy as np

from bloomq import backends
from bloomq.comparison import outputs
from bloomq.comparison.labels import Labels, read_labels
from bloomq.comparison.outputs import Outputs, Place
from bloomq.comparison.places import Places, read
from bloomq.comparison.sides import PackSide, Side, runnable
from bloomq.errors import UsageError
from bloomq.heads import Head
from bloomq.pack import Pack
from bloomq.token_texts import TokenTexts
from bloomq.tokenizer import BloomTokenizer

_BEFORE = 24  # tokens that are shown of a place
Progress = Callable[[int, int], None]  # (tokens or texts done, in all)
RANDOM = "random token ids"


def sample() -> dict[str, str]:
    """The texts that are measured on where none is given, by their languages."""
    found: dict[str, str] = json.loads(
        (files("bloomq.comparison") / "sample.json").read_text("utf-8")
    )
    return found


def random_ids(vocab_size: int, count: int) -> list[int]:
    """Token ids for a model without a tokenizer: always the same ones."""
    return [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, count)]


def measure_outputs(
    ours: PackSide, theirs: Side, texts: Mapping[str, str] | None, tokens: int, window: int,
    engine: tuple[str, int | None, str], progress: Progress,
) -> Outputs | Labels:  # fmt: skip
    """What the two models make of these texts (None: of the sample).

    engine: backend, threads and cache_dtype, which is the pack's alone: the original has what is
    exact for it.

    Raises: UsageError for a text that is too short, or without a tokenizer; see `runnable`.
    """
    tokenizer = _tokenizer(ours, texts is not None)
    is_causal = ours.config.architecture == "BloomForCausalLM"
    given = sample() if texts is None else texts
    if tokenizer is None:
        rows = {RANDOM: random_ids(ours.config.vocab_size, tokens)}
    elif is_causal:
        rows = {name: tokenizer.encode(text)[:tokens] for name, text in given.items()}
    else:
        rows = _lines(tokenizer, given, tokens)
    window = min(window, ours.config.seq_length)
    if not is_causal:
        rows = {name: ids[:window] for name, ids in rows.items()}
    with runnable(ours) as pack, runnable(theirs) as base:
        backend, threads, _ = engine
        model, original = _head(pack, *engine), _head(base, backend, threads, "auto")
        if not is_causal:
            total = len(rows)
            return read_labels(
                model, original, list(rows.values()), lambda done: progress(done, total)
            )
        return _predictions(model, original, rows, window, tokenizer, progress)


def _tokenizer(side: PackSide, needed: bool) -> BloomTokenizer | None:
    if side.pack.has_tokenizer:
        return BloomTokenizer.of_pack(side.pack)
    if needed:
        raise UsageError(
            f"{side.path}: has no tokenizer, so no text can be compared on: leave the text out for "
            "random token ids"
        )
    return None


def _lines(
    tokenizer: BloomTokenizer, texts: Mapping[str, str], tokens: int
) -> dict[str, list[int]]:
    """The lines of texts, until a text has had so many tokens."""
    rows: dict[str, list[int]] = {}
    for name, text in texts.items():
        left = tokens
        for number, line in enumerate(text.splitlines(), 1):
            ids = tokenizer.encode(line)[:left] if line.strip() else []
            if ids:
                rows[f"{name}:{number}"] = ids
            left -= len(ids)
            if left <= 0:
                break
    if not rows:
        raise UsageError("the texts have no line to classify: give others")
    return rows


def _head(pack: Pack, backend: str, threads: int | None, cache_dtype: str) -> Head:
    chosen = backends.choose(backend, pack, threads, cache_dtype).backend
    return Head(pack, chosen, pack.config.architecture)


def _predictions(
    model: Head, base: Head, rows: Mapping[str, Sequence[int]], window: int,
    tokenizer: BloomTokenizer | None, progress: Progress,
) -> Outputs:  # fmt: skip
    total, before = sum(map(len, rows.values())), 0
    found: list[Places] = []
    for name, ids in rows.items():

        def show(done: int, before: int = before) -> None:
            progress(before + done, total)

        try:
            found.append(read(model, base, name, ids, window, show))
        except UsageError as error:  # a text of fewer than two tokens
            raise UsageError(f"{name}: {error}") from None
        before += len(ids)
    ids_of = [np.array(ids, np.int64) for ids in rows.values()]
    confidence, base_confidence, right, base_right, same = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (p.confidence, p.base_confidence, p.best == p.ids, p.base_best == p.ids, p.same)
                for p in found
            ),
            strict=True,
        )
    )
    places = [(found[t], ids_of[t], i) for t, i in outputs.most_different(found)]
    return Outputs(
        window, outputs.figures("all", found),
        tuple(outputs.figures(text.name, [text]) for text in found), outputs.ties(found),
        outputs.calibration(confidence, right), outputs.calibration(base_confidence, base_right),
        outputs.binned(base_confidence, same), tuple(outputs.along(text) for text in found),
        tuple(_place(*place, TokenTexts(tokenizer), tokenizer) for place in places),
        is_text=tokenizer is not None,
    )  # fmt: skip


def _place(
    text: Places, ids: np.ndarray, i: int, texts: TokenTexts, tokenizer: BloomTokenizer | None
) -> Place:
    at = int(text.at[i])
    before = ids[max(0, at - _BEFORE) : at].tolist()
    shown = "".join(map(texts.of, before)) if tokenizer is None else tokenizer.decode(before)
    came, base_best, best = (
        texts.of(int(token)) for token in (ids[at], text.base_best[i], text.best[i])
    )
    return Place(text.name, shown, came, base_best, best, float(text.kl[i]))
