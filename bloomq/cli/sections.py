"""A command's options in sections: generate has some sixty."""

from __future__ import annotations

import click

_OF_THE_MODEL = ("model", "backend", "threads", "cache_dtype", "context", "lora", "draft")
_OF_MANY = ("batch_file", "field", "out", "parallel")
_OF_SEARCH = (
    "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping",
    "num_return_sequences", "penalty_alpha", "best_of",
)  # fmt: skip
_OF_ENDS = (
    "max_new_tokens", "stop", "window", "sinks", "json_schema", "json_object", "regex", "grammar",
)  # fmt: skip
_OF_OUTPUT = (
    "top_logprobs", "prompt_cache", "show_probs", "as_json", "quiet", "system", "template", "saved",
    "help",
)  # fmt: skip
_ELSE = "Choosing tokens"  # the fields of `Sampling`
_SECTIONS: dict[str, tuple[str, ...]] = {
    "Model": _OF_THE_MODEL, "Text": _OF_ENDS, _ELSE: (), "Search": _OF_SEARCH,
    "Many prompts": _OF_MANY, "Output": _OF_OUTPUT,
}  # fmt: skip


class Sectioned(click.Command):
    """A command whose help has a heading for each kind of option."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found: dict[str, list[tuple[str, str]]] = {title: [] for title in _SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                name = "help" if "--help" in param.opts else param.name
                of = (title for title, known in _SECTIONS.items() if name in known)
                found[next(of, _ELSE)].append(record)
        for title, records in found.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
