"""The command score: how likely given texts are to a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bloomq.cli.options import Loading, load, load_adapters, loading_options, lora_option
from bloomq.cli.records import Record, read_texts
from bloomq.cli.running import Output, Task, run, without_nan
from bloomq.cli.task_options import output_options, text_options, weights_of
from bloomq.cli.tasks import beside, check_most
from bloomq.errors import UsageError

if TYPE_CHECKING:
    from bloomq.scoring import Scores
    from bloomq.token_texts import TokenTexts
    from bloomq.tokenizer import BloomTokenizer


@dataclass(frozen=True, slots=True)
class _Given:
    """A record's tokens behind the context's; first: of those that are scored."""

    ids: list[int]
    first: int


@click.command()
@text_options
@click.option("--context", "before", default="", help="What stands before each text, not scored.")
@click.option("--tokens", "each_token", is_flag=True, help="Show every token with its logprob.")
@click.option(
    "--top",
    type=int,
    default=0,
    show_default=True,
    help="With the likeliest tokens in the place of each; more than 0: as --tokens.",
)
@click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]")
@lora_option
@loading_options
@click.option(
    "--batch-tokens",
    type=int,
    default=2048,
    show_default=True,
    help="Tokens of texts that run together, each text's rounded up to 64.",
)
@output_options
def score(
    texts: tuple[str, ...], file: Path | None, field: str, max_tokens: int | None, truncate: bool,
    before: str, each_token: bool, top: int, model: Path | None, loading: Loading,
    lora: tuple[str, ...], batch_tokens: int,
    out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Say how likely TEXTs, or a file's, or the lines of standard input, are to a model.

    For each: the logprob of all its tokens together (natural log), how many they are, and their
    perplexity. A text's first token is not among them, unless it follows a --context.
    """
    from bloomq import scoring
    from bloomq.pipelines.texts import read
    from bloomq.tokenizer import BloomTokenizer

    check_most(max_tokens)
    records = read_texts(texts, file, field)
    loaded = load(model, loading, quiet)
    adapters = load_adapters(loaded, lora)
    tokenizer = BloomTokenizer.of_pack(loaded.pack)
    prefix = tokenizer.encode(before)
    if len(prefix) >= loaded.context:
        raise UsageError(
            f"--context has {len(prefix)} tokens, expected less than the {loaded.context} that the "
            "model was trained on"
        )
    most = loaded.context - len(prefix) if max_tokens is None else max_tokens

    def given(some: list[Record]) -> list[_Given]:
        names = [record.where for record in some]
        whole = read(
            tokenizer, [record.fields[0] for record in some], most=most, truncate=truncate,
            names=names,
        )  # fmt: skip
        return [_Given([*prefix, *one.tokens.ids], len(prefix)) for one in whole]

    def work(some: list[_Given]) -> list[Scores]:
        return scoring.score(
            loaded.head, [one.ids for one in some], first=[one.first for one in some], top=top,
            gates=loaded.head.adapters.gates(adapters, len(some)), batch_tokens=batch_tokens,
        )  # fmt: skip

    with_tokens = tokenizer if each_token or top else None
    options = {
        "adapters": weights_of(adapters), "context": before, "tokens": with_tokens is not None,
        "top": top, "max_tokens": max_tokens, "truncate": truncate,
    }  # fmt: skip
    task = Task(
        "score", loaded.model, options, records, given, lambda one: len(one.ids), work
    )  # fmt: skip
    output = Output(
        out, as_json, quiet, lambda record, scores: _line(record, scores, with_tokens),
        lambda record, scores, several: _shown(record, scores, several, with_tokens), empty=None,
    )  # fmt: skip
    return run(task, output, batch_tokens)


def _line(
    record: Record, scores: Scores | None, tokenizer: BloomTokenizer | None
) -> dict[str, Any]:
    """A JSON line; with the tokens where a tokenizer shows them."""
    found: dict[str, Any] = {"line": record.line, "text": record.fields[0]}
    if scores is None:
        return found | {"logprob": None, "tokens": 0, "perplexity": None}
    found |= {"logprob": scores.total, "tokens": len(scores.ids), "perplexity": scores.perplexity}
    if tokenizer is not None:
        found["each"] = [_each(tokenizer, scores, i) for i in range(len(scores.ids))]
    whole: dict[str, Any] = without_nan(found)
    return whole


def _each(tokenizer: BloomTokenizer, scores: Scores, i: int) -> dict[str, Any]:
    """Of token i: what it is, its logprob and rank, and its alternatives."""
    token = _token(tokenizer, scores.ids[i], scores.logprobs[i])
    others = zip(scores.top_ids[i], scores.top_logprobs[i], strict=True)
    return {
        **token, "rank": int(scores.ranks[i]), "top": [_token(tokenizer, *one) for one in others]
    }  # fmt: skip


def _token(tokenizer: BloomTokenizer, token: Any, logprob: Any) -> dict[str, Any]:
    return {"token": tokenizer.decode([int(token)]), "id": int(token), "logprob": float(logprob)}


def _shown(
    record: Record, scores: Scores | None, several: bool, tokenizer: BloomTokenizer | None
) -> str:
    """A line for people, and one below it for each token."""
    if scores is None or not len(scores.ids):
        text = "nothing to score"
    else:
        count = len(scores.ids)
        text = f"{scores.total:.4f}  {count} token{'' if count == 1 else 's'}"
        text += f"  perplexity {scores.perplexity:.4g}"
    lines = [f"{text}  {beside(record)}" if several else text]
    if scores is not None and tokenizer is not None:
        from bloomq.token_texts import TokenTexts

        texts = TokenTexts(tokenizer)
        names = [_quoted(texts, token) for token in scores.ids]
        width = max(map(len, names), default=0)
        for i, name in enumerate(names):
            pairs = zip(scores.top_ids[i], scores.top_logprobs[i], strict=True)
            others = "  ".join(f"{_quoted(texts, token)} {value:.3f}" for token, value in pairs)
            row = f"{scores.logprobs[i]:9.4f}  {scores.ranks[i]:6}  {name:{width}}  {others}"
            lines.append(row.rstrip())
    return "\n".join(lines)


def _quoted(texts: TokenTexts, token: Any) -> str:
    """As JSON has it; a part of a character by its bytes."""
    text = texts.of(int(token))
    return json.dumps(text, ensure_ascii=False) if texts.is_text(int(token)) else f'"{text}"'
