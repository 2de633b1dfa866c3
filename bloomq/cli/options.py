"""Options that several commands share, and loading by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bloomq import console
from bloomq.errors import UsageError
from bloomq.files import exists

if TYPE_CHECKING:
    from bloomq.language_model import LanguageModel
    from bloomq.modeling import BloomPreTrainedModel


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


engine_options = option_group(
    click.option("--backend", default="auto", show_default=True,
                 help="auto, numba, cuda, jax or reference."),
    click.option("-t", "--threads", type=int, help="CPU threads.  [default: physical cores]"),
    click.option("--cache-dtype", default="auto", show_default=True,
                 help="Of keys and values: auto, f16, f32 or int8 (half of f16's memory)."),
)  # fmt: skip
model_options = option_group(
    click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]"),
    engine_options,
    click.option("-c", "--context", type=int,
                 help="Most tokens of prompt and output.  [default: as trained]"),
)  # fmt: skip
sampling_options = option_group(
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
    click.option("--lora", multiple=True, metavar="DIR[=SCALE]",
                 help="Use a LoRA adapter that PEFT saved; may be repeated: they add up."),
)  # fmt: skip


def load(
    model: Path | None, backend: str, threads: int | None, context: int | None, cache_dtype: str,
    quiet: bool,
) -> LanguageModel:  # fmt: skip
    """The model that a command works with; says on stderr what was loaded."""
    from bloomq import loading  # imports engines, which --help does without

    if not quiet:
        console.announce_compilation()
    loaded = loading.load(
        model, backend=backend, threads=threads, context=context, cache_dtype=cache_dtype
    )
    if not quiet:
        name = loaded.pack.path.name if model else "embedded demo"
        console.note(f"{name} on {loaded.backend.name} ({loaded.backend_reason})")
    return loaded


def load_adapters(
    model: LanguageModel | BloomPreTrainedModel, given: tuple[str, ...]
) -> dict[str, float]:
    """Load what --lora names; the scale of each, as `generate` takes them."""
    scales = {}
    for text in given:
        folder, separator, scale = text.rpartition("=")
        if not separator or exists(Path(text)):  # a folder's name may have the sign too
            folder, scale = text, "1"
        try:
            scales[folder] = float(scale)
        except ValueError:
            raise UsageError(f"--lora {text}: {scale!r} is no scale, expected a number") from None
        model.load_adapter(folder, folder)
    return scales


def load_draft(
    draft: str | None, backend: str, threads: int | None
) -> LanguageModel | Literal["lookup"] | None:
    """Who guesses: a model to load, what the text repeats, or nobody."""
    from bloomq import loading

    if draft is None or draft == "lookup":
        return draft  # type: ignore[return-value]  # mypy does not narrow by ==
    return loading.load(Path(draft), backend=backend, threads=threads)
