"""Options that the commands of tasks share: what is read, by which model, and where results go."""

from __future__ import annotations

from pathlib import Path

import click

from bloomq.cli.options import engine_options, option_group

text_options = option_group(
    click.argument("texts", nargs=-1, metavar="[TEXT]..."),
    click.option("-f", "--file", type=Path, help="Read texts from here: a .txt (one a line), "
                 ".jsonl or .csv file."),
    click.option("--field", "--column", "field", default="text", show_default=True,
                 help="What holds the text in a .jsonl or a .csv."),
    click.option("--max-tokens", type=int, help="Most tokens of a text.  [default: as trained]"),
    click.option("--truncate", is_flag=True, help="Cut longer texts instead of refusing them."),
)  # fmt: skip
model_options = option_group(
    click.option("-m", "--model", type=Path, help="Pack to load, or a checkpoint's folder."),
    engine_options,
    click.option("--batch-tokens", type=int, default=2048, show_default=True,
                 help="Tokens of texts that run together, each text's rounded up to 64."),
)  # fmt: skip
output_options = option_group(
    click.option("-o", "--out", type=Path, help="Write JSON lines to this file; after an "
                 "interruption the same command goes on with it."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON lines."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)  # fmt: skip
