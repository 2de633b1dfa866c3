"""Options of a search, as the value that `generate` takes."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from bloomq.cli.options import is_given, option_group
from bloomq.errors import UsageError

if TYPE_CHECKING:
    from bloomq.search import AnySearch

_OPTIONS = option_group(
    click.option("--num-beams", type=int, default=1, show_default=True,
                 help="Follow so many texts at once, and print the likeliest."),
    click.option("--num-beam-groups", type=int, default=1, show_default=True,
                 help="Beams in groups that avoid each other's tokens."),
    click.option("--diversity-penalty", type=float, default=0.0, show_default=True,
                 help="Of groups: what a token loses that an earlier one chose."),
    click.option("--length-penalty", type=float, default=1.0, show_default=True,
                 help="Of beams: above 0 favours long texts, below 0 short ones."),
    click.option("--early-stopping", type=click.Choice(["true", "false", "never"]),
                 default="false", show_default=True,
                 help="End beams when enough have ended (true), when the best under way cannot do "
                 "better as it is (false), or at any length (never)."),
    click.option("--num-return-sequences", type=int, default=1, show_default=True,
                 help="Print so many texts, of beams or of several draws, best first."),
    click.option("--penalty-alpha", type=float, help="Contrastive search: how much a token loses "
                 "by being like those before; among the --top-k likeliest (4 where that is 0)."),
)  # fmt: skip
_NAMES = (
    "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping",
    "num_return_sequences", "penalty_alpha",
)  # fmt: skip


def search_options(command: Any) -> Any:
    """A command that has `generation_options` gets the search that is asked for as `search` (None:
    none is), and how many texts. Contrastive search takes --top-k from them."""

    @wraps(command)
    def collected(*args: Any, **given: Any) -> Any:
        asked = {name: given.pop(name) for name in _NAMES}
        count = asked.pop("num_return_sequences")
        search = _search(asked, count, given["top_k"])
        return command(*args, search=search, num_return_sequences=count, **given)

    return _OPTIONS(collected)


def _search(asked: dict[str, Any], count: int, top_k: int) -> AnySearch | None:
    from bloomq.search import BeamOptions, ContrastOptions

    alpha, early = asked.pop("penalty_alpha"), asked.pop("early_stopping")
    stopping = {"true": True, "false": False}.get(early, early)
    if asked["num_beams"] == 1:
        for name in ("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"):
            if is_given(name):
                raise UsageError(f"--{name.replace('_', '-')} belongs to --num-beams above 1")
        beams = BeamOptions(num_beams=1)
    else:
        beams = BeamOptions(early_stopping=stopping, num_return_sequences=count, **asked)
    if alpha is None:
        return None if beams.num_beams == 1 else beams
    if beams.num_beams > 1:
        raise UsageError(f"--penalty-alpha with {beams.num_beams} beams, expected one of them")
    return ContrastOptions(penalty_alpha=alpha, top_k=top_k or 4)
