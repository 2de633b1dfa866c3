"""The command `plan`: which devices a model needs, before a byte is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import click

from bloomq.cli.options import grid_options
from bloomq.errors import CapacityError, UsageError
from bloomq.schemes import SCHEME_NAMES

if TYPE_CHECKING:
    from bloomq.config import BloomConfig
    from bloomq.layers import CacheDtype
    from bloomq.schemes import Scheme

_SPLITS = ("layers", "tensor")


@click.command()
@click.option("-m", "--pack", type=Path, help="Pack to plan for.")
@click.option("--model", help="Published model to plan for, as in bloom-176b or bloomz-7b1.")
@click.option(
    "--scheme",
    type=click.Choice(SCHEME_NAMES),
    help="How matrices are stored; not with --pack.  [default: the best that fits]",
)
@grid_options
@click.option(
    "--gpus",
    metavar="LIST",
    help="Hardware: 3x80GB, 2xH100, 1x24GB@900 (GB/s), cpu:64GB, with commas between them.",
)
@click.option("--nodes", type=int, default=1, show_default=True, help="Machines, all alike.")
@click.option(
    "--split",
    type=click.Choice(_SPLITS),
    help="Layers over devices, or each layer over all.  [default: layers; tensor for --nodes]",
)
@click.option(
    "--link", type=float, help="GB/s between GPUs, for --split tensor.  [default: 25; 12.5]"
)
@click.option("-c", "--context", type=int, help="Tokens of a text.  [default: as trained]")
@click.option("-b", "--batch", type=int, default=1, show_default=True, help="Texts at once.")
@click.option("--cache-dtype", default="auto", show_default=True, help="auto, f16, f32 or int8.")
@click.option("--max-memory", metavar="LIST", help="Of each device: 0:70GiB,cpu:64GiB.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plan(
    pack: Path | None, model: str | None, scheme: str | None, group_size: str | None,
    head_scheme: str | None, gpus: str | None, nodes: int, split: str | None, link: float | None,
    context: int | None, batch: int, cache_dtype: str, max_memory: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Say what goes where: bytes on every device, whether it fits, how fast it can be.

    Neither the model nor the hardware need be here. GB is 1e9 bytes. Speeds are upper bounds, what
    the bandwidths allow. Exit code 1 where it does not fit; what would is printed.
    """
    from bloomq.placement import Request, parse_gpus, parse_max_memory, placed
    from bloomq.placement.advice import best, refusal
    from bloomq.placement.options import capped
    from bloomq.placement.report import Report

    if gpus is None:
        raise UsageError("no hardware to plan for: give it with --gpus, as in --gpus 3x80GB")
    if link is not None and not 0 < link < 1e6:
        raise UsageError(f"--link is {link:g} GB/s, expected more than 0")
    name, config, schemes = _model(pack, model, scheme, group_size, head_scheme)
    devices = parse_gpus(gpus, nodes=nodes)
    if max_memory is not None:
        devices = capped(devices, parse_max_memory(max_memory))
    request = Request(
        config, schemes, devices, config.seq_length if context is None else context, batch,
        cast("CacheDtype | Literal['auto']", cache_dtype),
        "tensor" if split == "tensor" or (split is None and nodes > 1) else "layers",
    )  # fmt: skip
    if pack is None and scheme is None:
        request = best(request, head_scheme)
    placement = placed(request)
    report = Report.of(name, request, placement, link)
    click.echo(json.dumps(report.facts()) if as_json else "\n".join(report.lines()))
    if not placement.fits:
        raise CapacityError(refusal(request, placement, report.ways))


def _model(
    pack: Path | None, model: str | None, scheme: str | None, group_size: str | None,
    head_scheme: str | None,
) -> tuple[str, BloomConfig, Mapping[str, Scheme]]:  # fmt: skip
    """Name, config and schemes of what is planned for."""
    from bloomq.pack import Pack
    from bloomq.placement.models import published, schemes_of

    if (pack is None) == (model is None):
        raise UsageError("what to plan for: expected one of --pack and --model")
    if pack is not None:
        if scheme or group_size or head_scheme:
            raise UsageError(
                f"{pack} is stored in its own schemes: drop --scheme, --group-size and "
                "--head-scheme, or plan for --model"
            )
        opened = Pack.open(pack)
        return pack.name, opened.config, opened.schemes
    assert model is not None
    if group_size is not None and scheme is None:
        raise UsageError("a group size to plan with: name its scheme, --scheme nl4")
    config = published(model)
    size = None if group_size is None else int(group_size)
    return model, config, schemes_of(config, scheme or "int8", size, head_scheme)
