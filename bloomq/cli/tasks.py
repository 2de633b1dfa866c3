"""Commands that read texts with a fine-tuned model: classify, tag, answer and embed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bloomq.cli.options import Loading
from bloomq.cli.partial import Rows
from bloomq.cli.records import Record, Records, read_pairs, read_texts
from bloomq.cli.running import Output, Task, run
from bloomq.cli.task_options import (
    load_model,
    model_options,
    output_options,
    text_options,
    weights_of,
)
from bloomq.errors import UsageError
from bloomq.files import shown

if TYPE_CHECKING:
    from bloomq.pipelines import Answer, Classifier, Embedder, Label, Tag, Tagger
    from bloomq.pipelines.answerer import Pair
    from bloomq.pipelines.texts import Text

_BESIDE = 60  # characters of a text beside its result


@click.command()
@text_options
@click.option("--top-k", type=int, default=1, show_default=True, help="Classes of each text.")
@click.option("--threshold", type=float, help="Classes alone that score as much.")
@model_options
@output_options
def classify(
    texts: tuple[str, ...], file: Path | None, field: str, max_tokens: int | None, truncate: bool,
    top_k: int, threshold: float | None, model: Path | None, scheme: str | None,
    save_pack: Path | None, lora: tuple[str, ...], loading: Loading, batch_tokens: int,
    out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Sort TEXTs, or a file's, or the lines of standard input, into a classifier's classes."""
    from bloomq.modeling import BloomForSequenceClassification
    from bloomq.pipelines import Classifier
    from bloomq.tokenizer import BloomTokenizer

    records = read_texts(texts, file, field)
    loaded, adapters = load_model(
        BloomForSequenceClassification, model, scheme, save_pack, lora, loading, quiet
    )
    pipeline = Classifier(loaded, BloomTokenizer.of_pack(loaded.pack))

    def work(some: list[Text]) -> list[list[Label]]:
        return pipeline.classify(
            some, top_k=top_k, threshold=threshold, batch_tokens=batch_tokens, adapters=adapters
        )

    def show(record: Record, labels: list[Label], several: bool) -> str:
        found = [f"{shown(one.label)} {one.score:.4f}" for one in labels] or ["-"]
        return f"{'  '.join(found)}  {beside(record)}" if several else "\n".join(found)

    options = {
        "adapters": weights_of(adapters),
        "top_k": top_k, "threshold": threshold, "max_tokens": max_tokens, "truncate": truncate,
    }  # fmt: skip
    read = _reader(pipeline, max_tokens, truncate)
    task = Task("classify", loaded, options, records, read, _size, work)
    return run(task, Output(out, as_json, quiet, _line("text", "labels"), show), batch_tokens)


@click.command()
@text_options
@click.option("--threshold", type=float, help="Tags alone that score as much.")
@click.option("--each-token", is_flag=True, help="A tag for each token: neighbours stay apart.")
@click.option(
    "--outside", multiple=True, default=["O"], help="Class of what is no tag.  [default: O]"
)
@model_options
@output_options
def tag(
    texts: tuple[str, ...], file: Path | None, field: str, max_tokens: int | None, truncate: bool,
    threshold: float | None, each_token: bool, outside: tuple[str, ...], model: Path | None,
    scheme: str | None, save_pack: Path | None, lora: tuple[str, ...], loading: Loading,
    batch_tokens: int, out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Find what belongs to a class in TEXTs, in a file's, or in the lines of standard input."""
    from bloomq.modeling import BloomForTokenClassification
    from bloomq.pipelines import Tagger
    from bloomq.tokenizer import BloomTokenizer

    records = read_texts(texts, file, field)
    loaded, adapters = load_model(
        BloomForTokenClassification, model, scheme, save_pack, lora, loading, quiet
    )
    pipeline = Tagger(loaded, BloomTokenizer.of_pack(loaded.pack))

    def work(some: list[Text]) -> list[list[Tag]]:
        return pipeline.tag(
            some, merge=not each_token, threshold=threshold, outside=outside,
            batch_tokens=batch_tokens, adapters=adapters,
        )  # fmt: skip

    def show(record: Record, tags: list[Tag], several: bool) -> str:
        return _shown_spans(record, [shown(one.label) for one in tags], tags, several)

    options = {
        "adapters": weights_of(adapters),
        "threshold": threshold, "each_token": each_token, "outside": list(outside),
        "max_tokens": max_tokens, "truncate": truncate,
    }  # fmt: skip
    read = _reader(pipeline, max_tokens, truncate)
    task = Task("tag", loaded, options, records, read, _size, work)
    return run(task, Output(out, as_json, quiet, _line("text", "tags"), show), batch_tokens)


@click.command()
@click.option("--question", help="The question, for every context.")
@click.option("--context", help="The text to search.  [default: standard input]")
@click.option(
    "-f",
    "--file",
    type=Path,
    help="Read what is not given from here: a .jsonl, a .csv, or a .txt with one a line.",
)
@click.option(
    "--question-field",
    default="question",
    show_default=True,
    help="What holds the question in a .jsonl or a .csv.",
)
@click.option(
    "--context-field", default="context", show_default=True, help="What holds the context."
)
@click.option("--separator", default="", help="What stands between the two.  [default: nothing]")
@click.option("--top-k", type=int, default=1, show_default=True, help="Answers to each question.")
@click.option("--threshold", type=float, help="Answers alone that score as much.")
@click.option(
    "--max-answer-tokens", type=int, default=64, show_default=True, help="Most tokens of an answer."
)
@click.option(
    "--window-tokens",
    type=int,
    help="Tokens of question and context read at once.  [default: 512, or as trained]",
)
@click.option("--overlap", type=int, help="Tokens that two windows share.  [default: 128]")
@model_options
@output_options
def answer(
    question: str | None, context: str | None, file: Path | None, question_field: str,
    context_field: str, separator: str, top_k: int, threshold: float | None,
    max_answer_tokens: int, window_tokens: int | None, overlap: int | None, model: Path | None,
    scheme: str | None, save_pack: Path | None, lora: tuple[str, ...], loading: Loading,
    batch_tokens: int, out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Find where a context answers a question; both are options, or of each line of a file."""
    from bloomq.modeling import BloomForQuestionAnswering
    from bloomq.pipelines import Answerer
    from bloomq.tokenizer import BloomTokenizer

    records = read_pairs((question, context), file, (question_field, context_field))
    loaded, adapters = load_model(
        BloomForQuestionAnswering, model, scheme, save_pack, lora, loading, quiet
    )
    pipeline = Answerer(loaded, BloomTokenizer.of_pack(loaded.pack), separator=separator)

    def read(some: list[Record]) -> list[Pair]:
        return pipeline.pairs(
            _column(some, 0), _column(some, 1), window_tokens=window_tokens, overlap=overlap,
            names=_names(some),
        )  # fmt: skip

    def work(some: list[Pair]) -> list[list[Answer]]:
        return pipeline.answer_pairs(
            some, top_k=top_k, threshold=threshold, max_answer_tokens=max_answer_tokens,
            batch_tokens=batch_tokens, adapters=adapters,
        )  # fmt: skip

    def show(record: Record, answers: list[Answer], several: bool) -> str:
        return _shown_spans(record, [""] * len(answers), answers, several)

    options = {
        "adapters": weights_of(adapters),
        "separator": separator, "top_k": top_k, "threshold": threshold, "overlap": overlap,
        "max_answer_tokens": max_answer_tokens, "window_tokens": window_tokens,
    }  # fmt: skip
    task = Task("answer", loaded, options, records, read, _size_of_pair, work)
    output = Output(out, as_json, quiet, _line("question", "answers"), show)
    return run(task, output, batch_tokens)


@click.command()
@text_options
@click.option(
    "--pooling",
    type=click.Choice(["mean", "last", "max"]),
    default="mean",
    show_default=True,
    help="Over the hidden states of a text's tokens.",
)
@click.option("--normalize", is_flag=True, help="Vectors of length 1.")
@model_options
@output_options
def embed(
    texts: tuple[str, ...], file: Path | None, field: str, max_tokens: int | None, truncate: bool,
    pooling: Literal["mean", "last", "max"], normalize: bool, model: Path | None,
    scheme: str | None, save_pack: Path | None, lora: tuple[str, ...], loading: Loading,
    batch_tokens: int, out: Path | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Turn TEXTs, or a file's, or the lines of standard input, into vectors, as JSON lines.

    --out NAME.npy: one array of float32, a row a text, none of which may be empty. Without -m the
    embedded demo reads.
    """
    from bloomq.loading import demo_pack
    from bloomq.modeling import BloomModel
    from bloomq.pipelines import Embedder
    from bloomq.tokenizer import BloomTokenizer

    records = read_texts(texts, file, field)
    as_array = out is not None and out.suffix == ".npy"
    if as_array:
        _check_rows(records)
    loaded, adapters = load_model(
        BloomModel, model or demo_pack(), scheme, save_pack, lora, loading, quiet
    )
    pipeline = Embedder(loaded, BloomTokenizer.of_pack(loaded.pack))

    def work(some: list[Text]) -> Sequence[Any]:
        vectors = pipeline.embed(
            some, pooling=pooling, normalize=normalize, batch_tokens=batch_tokens, adapters=adapters
        )
        return list(vectors)

    def line(record: Record, vector: Any) -> Mapping[str, Any]:
        # The fewest digits that are the same float32.
        numbers = None if vector is None else [float(str(x)) for x in vector]
        return {"line": record.line, "text": record.fields[0], "embedding": numbers}

    options = {
        "adapters": weights_of(adapters),
        "pooling": pooling, "normalize": normalize, "max_tokens": max_tokens, "truncate": truncate,
    }  # fmt: skip
    read = _reader(pipeline, max_tokens, truncate)
    task = Task("embed", loaded, options, records, read, _size, work)
    output = Output(out, as_json, quiet, line, empty=None)
    if not as_array:
        return run(task, output, batch_tokens)
    layout = Rows(len(records.items), pipeline.model.config.hidden_size)
    return run(task, output, batch_tokens, layout=layout, encode=lambda _, row: bytes(row))


# -- what the commands share -----------------------------------------------------------------------


def _check_rows(records: Records) -> None:
    for record in records.items:
        if record.is_empty:
            raise UsageError(
                f"{record.where}: is empty, which no row of an array can say: leave it out, or "
                "write JSON lines"
            )


def check_most(most: int | None) -> None:
    """Raises: UsageError for --max-tokens that leave no text."""
    if most is not None and most < 1:
        raise UsageError(f"--max-tokens is {most}, expected 1 or more")


def _reader(
    pipeline: Classifier | Tagger | Embedder, most: int | None, truncate: bool
) -> Callable[[list[Record]], list[Text]]:
    """The tokens of records, whose errors say where a text comes from. Raises: UsageError."""
    check_most(most)
    return lambda some: pipeline.read(
        _column(some, 0), max_tokens=most, truncate=truncate, names=_names(some)
    )


def _size(text: Text) -> int:
    return len(text.tokens.ids)


def _size_of_pair(pair: Pair) -> int:
    return sum(len(window.ids) for window in pair.windows)


def _names(records: list[Record]) -> list[str]:
    return [record.where for record in records]


def _column(records: list[Record], i: int) -> list[str]:
    return [record.fields[i] for record in records]


def _line(given: str, found: str) -> Callable[[Record, Any], Mapping[str, Any]]:
    """A JSON line of a record's first field, by the name `given`, and results by `found`."""
    return lambda record, results: {
        "line": record.line, given: record.fields[0], found: [asdict(one) for one in results]
    }  # fmt: skip


def beside(record: Record) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(record.fields[0].split())
    return shown(text if len(text) <= _BESIDE else f"{text[: _BESIDE - 1]}…")


def _shown_spans(
    record: Record, labels: list[str], spans: Sequence[Tag | Answer], several: bool
) -> str:
    """A line for each span; of several records each below its text."""
    lines = [
        f"{label} {span.score:.4f}  {span.start}-{span.end}  {shown(span.text)}".lstrip()
        for label, span in zip(labels, spans, strict=True)
    ] or ["-"]
    return "\n    ".join([beside(record), *lines]) if several else "\n".join(lines)
