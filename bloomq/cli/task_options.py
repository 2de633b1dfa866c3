"""Options that the commands of tasks share: what is read, by which model, where results go; and
loading by them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from bloomq import console
from bloomq.cli.options import Loading, load_adapters, loading_options, option_group
from bloomq.errors import UsageError
from bloomq.schemes import SCHEME_NAMES

if TYPE_CHECKING:
    from bloomq.config import Architecture
    from bloomq.modeling import BloomPreTrainedModel

Model = TypeVar("Model", bound="BloomPreTrainedModel")
# Of the head that a pack has, the command that takes it.
_COMMANDS: dict[Architecture, str] = {
    "BloomForCausalLM": "generate", "BloomForSequenceClassification": "classify",
    "BloomForTokenClassification": "tag", "BloomForQuestionAnswering": "answer",
}  # fmt: skip

text_options = option_group(
    click.argument("texts", nargs=-1, metavar="[TEXT]..."),
    click.option("-f", "--file", type=Path, help="Read texts from here: a .txt (one a line), "
                 ".jsonl or .csv file. One of white space alone has an empty result."),
    click.option("--field", "--column", "field", default="text", show_default=True,
                 help="What holds the text in a .jsonl or a .csv."),
    click.option("--max-tokens", type=int, help="Most tokens of a text.  [default: as trained]"),
    click.option("--truncate", is_flag=True, help="Cut longer texts instead of refusing them."),
)  # fmt: skip
model_options = option_group(
    click.option("-m", "--model", type=Path, help="Pack to load, or a checkpoint's folder."),
    click.option("--scheme", type=click.Choice(SCHEME_NAMES),
                 help="How a checkpoint's matrices are quantized.  [default: as they are stored]"),
    click.option("--save-pack", type=Path,
                 help="Keep a checkpoint's pack here for the next time, and take it from here."),
    click.option("--lora", multiple=True, metavar="DIR[=SCALE]",
                 help="Use a LoRA adapter that PEFT saved; may be repeated: they add up."),
    loading_options,
    click.option("--batch-tokens", type=int, default=2048, show_default=True,
                 help="Tokens of texts that run together, each text's rounded up to 64."),
)  # fmt: skip
output_options = option_group(
    click.option("-o", "--out", type=Path, help="Write JSON lines to this file; after an "
                 "interruption the same command goes on with it."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON lines; \"line\" in each: of "
                 "the .txt, .jsonl or standard input, row of the .csv below its header, or which "
                 "argument, from 1."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)  # fmt: skip


def load_model(
    kind: type[Model], path: Path | None, scheme: str | None, save_pack: Path | None,
    lora: tuple[str, ...], how: Loading, quiet: bool,
) -> tuple[Model, dict[str, float]]:  # fmt: skip
    """The model of a command, said so on stderr, and the scale of each adapter that it uses."""
    from bloomq import placing
    from bloomq.opening import open_or_convert

    if path is None:
        raise UsageError(f"no model: name the pack of a {kind.__name__} with -m")
    if not quiet:
        console.announce_compilation()
    placing.check_options(how.devices, how.max_memory)
    pack = open_or_convert(path, scheme, save_pack)
    found = pack.config.architecture
    if kind.__name__ not in (found, "BloomModel"):
        raise UsageError(f"{path}: has the head of a {found}: use bloomq {_COMMANDS[found]}")
    choice = placing.choose(
        how.backend, pack, how.threads, how.cache_dtype, devices=how.devices,
        max_memory=how.max_memory,
    )  # fmt: skip
    model = kind(pack, choice.backend)
    if not quiet:
        name, description = model.backend.name, model.backend.description
        console.note(f"{pack.path.name} on {name} ({description})")
    return model, load_adapters(model, lora)


def weights_of(adapters: Mapping[str, float]) -> list[list[str | float]]:
    """What results depend on of adapters: SHA-256 of what PEFT saved of each, and its scale."""
    found: list[list[str | float]] = []  # as JSON gives them back
    for folder, scale in adapters.items():
        digest = hashlib.sha256()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update(Path(folder, name).read_bytes())
        found.append([digest.hexdigest(), scale])
    return found
