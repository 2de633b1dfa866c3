"""Options that several commands share, and loading by them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from bloomq import console
from bloomq.errors import UsageError
from bloomq.files import exists
from bloomq.schemes import GROUP_SIZES, SCHEME_NAMES

if TYPE_CHECKING:
    from bloomq.language_model import LanguageModel
    from bloomq.modeling import BloomPreTrainedModel
    from bloomq.parallel.workers import Workers


def option_group(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


grid_options = option_group(
    click.option("--group-size", type=click.Choice([str(g) for g in GROUP_SIZES]),
                 help="Columns that share a scale, for nl4 (default: 64) and int4 (default: 32)."),
    click.option("--head-scheme", type=click.Choice(SCHEME_NAMES),
                 help="For the embedding and the head.  [default: int6 for nl4, int4 and nf4, "
                      "else as --scheme]"),
)  # fmt: skip
engine_options = option_group(
    click.option("--backend", default="auto", show_default=True,
                 help="auto, numba, cuda, jax or reference."),
    click.option("-t", "--threads", type=int, help="CPU threads.  [default: physical cores]"),
    click.option("--cache-dtype", default="auto", show_default=True,
                 help="Of keys and values: auto, f16, f32 or int8 (half of f16's memory)."),
)  # fmt: skip
place_options = option_group(
    click.option("--devices", default="auto", show_default=True,
                 help="auto (the GPUs that the model needs, or the CPU), cpu, or several over "
                      "which layers lie one after another: cuda:0,1 or cuda:0,cpu."),
    click.option("--max-memory", metavar="0:70GiB,cpu:64GiB",
                 help="What may be used of each device."),
)  # fmt: skip
lora_option = option_group(
    click.option("--lora", multiple=True, metavar="DIR[=SCALE]",
                 help="Use a LoRA adapter that PEFT saved; may be repeated: they add up."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is to be loaded: see `bloomq.load`."""

    backend: str
    threads: int | None
    cache_dtype: str
    devices: str = "auto"
    max_memory: str | None = None
    context: int | None = None


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `Loading` but the context, as its argument `loading`."""

    @wraps(command)
    def collected(
        *, backend: str, threads: int | None, cache_dtype: str, devices: str,
        max_memory: str | None, **rest: Any,
    ) -> Any:  # fmt: skip
        loading = Loading(backend, threads, cache_dtype, devices, max_memory)
        return command(loading=loading, **rest)

    decorated: Callable[..., Any] = engine_options(place_options(collected))
    return decorated


def context_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that has `loading_options` the context too."""

    @wraps(command)
    def collected(*, loading: Loading, context: int | None, **rest: Any) -> Any:
        return command(loading=replace(loading, context=context), **rest)

    decorated: Callable[..., Any] = click.option(
        "-c", "--context", type=int, help="Most tokens of prompt and output.  [default: as trained]"
    )(collected)
    return decorated


model_options = option_group(
    click.option("-m", "--model", type=Path, help="Pack to load.  [default: the embedded demo]"),
    loading_options,
    context_option,
)  # fmt: skip


def is_given(option: str) -> bool:
    """Does the command line name this option, be it with its usual value?"""
    source = click.get_current_context().get_parameter_source(option)
    return source is not None and source is not ParameterSource.DEFAULT


def load(model: Path | None, how: Loading, quiet: bool) -> LanguageModel:
    """The model that a command works with; says on stderr what was loaded."""
    from bloomq import loading  # imports engines, which --help does without

    if not quiet:
        console.announce_compilation()
    workers: Workers | None = click.get_current_context().obj
    if workers is not None:
        _refuse_files()
    with warnings.catch_warnings(record=True) as told:
        loaded = loading.load(
            model, backend=how.backend, threads=how.threads, context=how.context,
            cache_dtype=how.cache_dtype, devices=how.devices, max_memory=how.max_memory,
            workers=workers,
        )  # fmt: skip
    for warning in told:
        console.note(f"warning: {warning.message}")
    if not quiet:
        name = loaded.pack.path.name if model else "embedded demo"
        console.note(f"{name} on {loaded.backend.name} ({loaded.backend_reason})")
    return loaded


def _refuse_files() -> None:
    """Raises: UsageError for files that several processes would write."""
    given = click.get_current_context().params
    for name in ("out", "prompt_cache"):
        if given.get(name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is of one process, and torchrun has started several: "
                "send their standard output to a file"
            )


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


def load_draft(draft: str | None, how: Loading) -> LanguageModel | Literal["lookup"] | None:
    """Who guesses: a model to load, what the text repeats, or nobody."""
    from bloomq import loading

    if draft is None or draft == "lookup":
        return draft  # type: ignore[return-value]  # mypy does not narrow by ==
    return loading.load(Path(draft), backend=how.backend, threads=how.threads)
