"""The `bloomq` command: text on stdout, everything else on stderr.

Exit codes: 0 done; 1 a `BloomqError`, in one line; 2 wrong usage; 130 Ctrl-C, what was produced
kept.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from bloomq import __version__, console
from bloomq.errors import BloomqError, CapacityError, UsageError
from bloomq.schemes import GROUP_SIZES, SCHEME_NAMES

if TYPE_CHECKING:
    from bloomq.loading import LanguageModel, Stream

INTERRUPTED = 130


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command and exit; every error of ours is one line."""
    try:
        code = commands.main(args, prog_name="bloomq", standalone_mode=False)
    except UsageError as error:
        _fail(error, 2)
    except BloomqError as error:
        _fail(error, 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our pipe has left: nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of stdout: files of ours raise errors of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(OSError(f"standard output cannot be written: {error.strerror}"), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: Exception, code: int) -> NoReturn:
    click.echo("error: " + " ".join(str(error).split()), err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version")
def commands() -> None:
    """BLOOM language models, quantized, on this machine's CPU."""


def _option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model_options = _option_group(
    click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]"),
    click.option("--backend", default="auto", show_default=True,
                 help="auto, numba, cuda or reference."),
    click.option("-t", "--threads", type=int, help="CPU threads.  [default: physical cores]"),
    click.option("-c", "--context", type=int,
                 help="Most tokens of prompt and output.  [default: as trained]"),
    click.option("--cache-dtype", default="auto", show_default=True,
                 help="Of keys and values: auto, f16, f32 or int8 (half of f16's memory)."),
)  # fmt: skip
_sampling_options = _option_group(
    click.option("-n", "--max-new-tokens", type=int, default=64, show_default=True,
                 help="Tokens to produce at most."),
    click.option("--temperature", type=float, default=0.0, show_default=True,
                 help="0: always the likeliest token."),
    click.option("--top-k", type=int, default=0, show_default=True,
                 help="Draw from the k likeliest; 0: all."),
    click.option("--top-p", type=float, default=1.0, show_default=True,
                 help="Draw from the fewest tokens of this total probability."),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True,
                 help="Above 1: make tokens that occurred less likely."),
    click.option("--seed", type=int, help="Same seed, same text.  [default: a new one]"),
    click.option("--stop", multiple=True, help="End before this text; may be repeated."),
    click.option("--draft", help="Guess tokens ahead, for speed alone: 'lookup' (what the text "
                 "repeats) or a smaller model's pack."),
)  # fmt: skip


@commands.command()
@click.argument("prompt", required=False)
@_model_options
@_sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON when it is done.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def generate(
    prompt: str | None, model: Path | None, backend: str, threads: int | None, context: int | None,
    cache_dtype: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    repetition_penalty: float, seed: int | None, stop: tuple[str, ...], draft: str | None,
    as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Continue PROMPT (or standard input, when piped) and stream the text.

    One newline at the end of standard input is not part of the prompt.
    """
    text = _prompt_text(prompt)
    loaded = _load(model, backend, threads, context, cache_dtype, quiet)
    guesser = _draft(draft, backend, threads)
    with console.prefill_progress(quiet) as progress:
        stream = loaded.stream(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop, draft=guesser,
            progress=progress,
        )  # fmt: skip
        if not quiet and not as_json:
            console.echo_prompt(text)
        interrupted = _print_stream(stream, silent=as_json)
    if as_json:
        click.echo(json.dumps({"prompt": text, **asdict(stream.generation)}, ensure_ascii=False))
    if not quiet:
        console.note(console.stats_line(stream.generation))
    return INTERRUPTED if interrupted else 0


def _print_stream(stream: Stream, *, silent: bool) -> bool:
    """Print pieces as they come; did Ctrl-C end it?"""
    interrupted, shown = False, 0
    try:
        for piece in stream:
            if not silent:
                click.echo(piece.text, nl=False)
                shown += len(piece.text)
    except KeyboardInterrupt:
        interrupted = True
    if not silent:
        click.echo(stream.generation.text[shown:])  # what was held back, and the line's end
    return interrupted


def _prompt_text(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and (sys.stdin is None or console.is_terminal(sys.stdin)):
        raise UsageError("no prompt: give one as argument or on standard input")
    return console.read_all().removesuffix("\n")


def _load(
    model: Path | None, backend: str, threads: int | None, context: int | None, cache_dtype: str,
    quiet: bool,
) -> LanguageModel:  # fmt: skip
    from bloomq.loading import load

    if not quiet:
        console.announce_compilation()
    loaded = load(model, backend=backend, threads=threads, context=context, cache_dtype=cache_dtype)
    if not quiet:
        name = loaded.pack.path.name if model else "embedded demo"
        console.note(f"{name} on {loaded.backend.name} ({loaded.backend_reason})")
    return loaded


def _draft(
    draft: str | None, backend: str, threads: int | None
) -> LanguageModel | Literal["lookup"] | None:
    """Who guesses: a model to load, what the text repeats, or nobody."""
    from bloomq.loading import load

    if draft is None or draft == "lookup":
        return draft  # type: ignore[return-value]  # mypy does not narrow by ==
    return load(Path(draft), backend=backend, threads=threads)


@commands.command()
@_model_options
@_sampling_options
def chat(
    model: Path | None, backend: str, threads: int | None, context: int | None, cache_dtype: str,
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    seed: int | None, stop: tuple[str, ...], draft: str | None,
) -> int:  # fmt: skip
    """Talk to a model, line by line: it continues the conversation so far.

    Plain BLOOMZ style: your line, a newline, the answer. Ctrl-C ends an answer, Ctrl-D (or the end
    of standard input) the conversation. The oldest lines go when the context is full.
    """
    quiet = not console.is_terminal(sys.stderr)
    loaded = _load(model, backend, threads, context, cache_dtype, quiet)
    guesser = _draft(draft, backend, threads)
    turns: list[str] = []
    while (line := console.read_line()) is not None:
        if not line.strip():
            continue
        try:
            stream = loaded.stream(
                _conversation(loaded, [*turns, line], max_new_tokens),
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, seed=seed, stop=stop or ("\n",),
                draft=guesser,
            )  # fmt: skip
        except CapacityError as error:  # one line too long ends no conversation
            console.note(f"error: {error}")
            continue
        _print_stream(stream, silent=False)
        turns += [line, stream.generation.text.strip("\n")]
    return 0


def _conversation(loaded: LanguageModel, turns: list[str], new_tokens: int) -> str:
    """The latest turns, of which the last awaits an answer, that leave room for it."""
    while True:
        text = "\n".join(turns) + "\n"
        if len(turns) == 1 or len(loaded.prompt_ids(text)) + new_tokens <= loaded.context:
            return text
        turns = turns[2:]  # a line and its answer


@commands.command()
@click.argument("source", type=Path)
@click.argument("target", type=Path)
@click.option(
    "--scheme",
    type=click.Choice(SCHEME_NAMES),
    default="int4",
    show_default=True,
    help="How matrices are stored.",
)
@click.option(
    "--group-size",
    type=click.Choice([str(g) for g in GROUP_SIZES]),
    help="Columns that share a scale, for int4.  [default: 64]",
)
@click.option(
    "--head-scheme",
    type=click.Choice(SCHEME_NAMES),
    help="For the embedding and the head.  [default: as --scheme]",
)
@click.option("-t", "--threads", type=int, help="Worker threads.  [default: all cores]")
@click.option("--force", is_flag=True, help="Replace a pack that is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    source: Path, target: Path, scheme: str, group_size: str | None, head_scheme: str | None,
    threads: int | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert the checkpoint in folder SOURCE to a pack at TARGET.

    SOURCE: Hugging Face format, safetensors in one file or sharded. The model is never whole in
    memory, and a run that is interrupted leaves no pack.
    """
    from bloomq.converters.convert import convert as run

    with console.byte_progress("converting") as progress:
        result = run(
            source, target, scheme=scheme, group_size=int(group_size) if group_size else None,
            head_scheme=head_scheme, threads=threads, force=force, progress=progress,
        )  # fmt: skip
    for line in result.notes:
        console.note(f"note: {line}")
    if as_json:
        click.echo(json.dumps({**asdict(result), "pack": str(result.pack)}))
        return
    speed = result.source_bytes / 1e6 / result.seconds
    click.echo(
        f"{result.pack}: {result.pack_bytes / 1e6:.1f} MB of {result.source_bytes / 1e6:.1f} MB, "
        f"{result.bits_per_weight:.2f} bits per weight, {result.seconds:.1f} s ({speed:.0f} MB/s)"
    )


@commands.command()
@click.argument("pack", type=Path, required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(pack: Path | None, as_json: bool) -> None:
    """Describe PACK (default: the embedded demo) and what this machine runs it on."""
    from bloomq.describe import describe

    facts = describe(pack)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        console.print_facts(facts)


@commands.command()
@click.argument("pack", type=Path)
def verify(pack: Path) -> None:
    """Read every byte of PACK and compare it with its checksums."""
    from bloomq.pack import Pack

    opened = Pack.open(pack)
    with console.byte_progress("verifying") as progress:
        done = 0

        def count(fresh: int) -> None:
            nonlocal done
            done += fresh
            progress(done, opened.nbytes)

        opened.verify(count)
    click.echo(f"{pack}: whole, {done / 1e6:.1f} MB match their checksums")


@commands.command()
@_model_options
def warmup(
    model: Path | None, backend: str, threads: int | None, context: int | None, cache_dtype: str
) -> None:
    """Compile the kernels that a pack needs, so that its first use is as fast as the next."""
    loaded = _load(model, backend, threads, context, cache_dtype, quiet=False)
    loaded.generate([[1] * 16], max_new_tokens=2)  # one prefill step, one decode step
    click.echo(f"ready: {loaded.backend.name} ({loaded.backend.description})")


class _Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "N,..."

    def convert(self, value: Any, param: Any, context: Any) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(item) for item in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}, expected whole numbers with commas between them", param, context)


@commands.command()
@click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]")
@click.option(
    "-p", "--prompt", type=_Numbers(), default="512", help="Prompt tokens; 0: none.  [512]"
)
@click.option(
    "-n",
    "--generate",
    "generated",
    type=_Numbers(),
    default="64",
    help="Tokens to produce; 0: none.  [64]",
)
@click.option("-d", "--depth", type=_Numbers(), default="0", help="Tokens of context before.  [0]")
@click.option("-b", "--batch", type=_Numbers(), default="1", help="Rows at once.  [1]")
@click.option("-t", "--threads", type=int, help="CPU threads.  [default: physical cores]")
@click.option(
    "-r", "--repetitions", type=int, default=5, show_default=True, help="Samples of each."
)
@click.option("--cache-dtype", default="auto", show_default=True, help="auto, f16, f32 or int8.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each test.")
def bench(
    model: Path | None, prompt: list[int], generated: list[int], depth: list[int], batch: list[int],
    threads: int | None, repetitions: int, cache_dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure prefill and decode beside this machine's ceilings.

    pp512: a prompt of 512 tokens; tg64: 64 tokens produced; @ d2048: behind so many; x 8: in 8
    rows. Ceilings are measured before every sample; %: of memory bandwidth for tg, of int8 products
    for pp.
    """
    from bloomq.bench import Bench, peak_rss_mb, plan

    tests = plan(prompt, generated, depth, batch)
    loaded = _load(model, "numba", threads, None, cache_dtype, quiet=as_json)
    run = Bench(loaded.causal_lm, loaded.pack)
    facts = {
        "model": loaded.pack.path.name if model else "demo", "pack_mb": loaded.pack.nbytes / 1e6,
        "bits_per_weight": round(loaded.pack.bits_per_weight, 2), "bloomq": __version__,
        "backend": loaded.backend.description, "load_s": round(loaded.load_s, 3),
    }  # fmt: skip
    if not as_json:
        console.bench_header(facts, *run.ceilings())
    for result in run.run(tests, repetitions):
        row = run.row(result)
        if as_json:
            click.echo(json.dumps({**facts, **row, "peak_rss_mb": round(peak_rss_mb())}))
        else:
            console.bench_row(row)
    if not as_json:
        click.echo(
            f"peak memory {peak_rss_mb():.0f} MB: the pack {facts['pack_mb']:.0f}, what ceilings "
            f"are measured on {run.measuring_mb:.0f}, the rest libraries, caches, intermediates"
        )


if __name__ == "__main__":
    main()
