"""Options of the commands that write text, as one value: what is asked for of every text.

Sampling options are the fields of `Sampling`, said once, there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bloomq import console
from bloomq.cli.options import Loading, is_given, load_adapters, load_draft, lora_option
from bloomq.cli.task_options import weights_of
from bloomq.errors import UsageError
from bloomq.sampling import Sampling

if TYPE_CHECKING:
    from bloomq.constraints import AnyConstraint
    from bloomq.generation import Generation, Window
    from bloomq.language_model import LanguageModel, Stream
    from bloomq.search import AnySearch

# Fields that hold token ids, which a command line has as text: option, how often, help.
_AS_TEXT = {
    "dry_sequence_breakers": ("--dry-breaker", True, "DRY: text that no repetition reaches across; "
                              "may be repeated.  [default: newline, colon, quote and star]"),
    "logit_bias": ("--logit-bias", True, "TOKEN=BIAS, added to the score of a token (an id, or its "
                   "text); may be repeated."),
    "bad_words": ("--bad-word", True, "The usual tokens of this text must not occur; may be "
                  "repeated."),
    "forced_prefix": ("--forced-prefix", False, "What the output begins with."),
    "order": ("--order", False, "Which filters work first, separated by commas.  [default: "
              f"{','.join(Sampling().order)}]"),
}  # fmt: skip
BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
_USUAL = {"top_k", "top_p", "min_p", "repetition_penalty", "seed"}  # shown first


# Without a temperature nothing is drawn, and these do nothing.
_OF_DRAWS = (
    "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold",
    "mirostat_tau", "mirostat_eta", "dynamic_temperature", "dynamic_exponent", "order", "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks of every text, checked as far as no model is needed. sampling:
    without its fields that are given as text; texts: those; draft, lora: as they are spelled."""

    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    texts: Mapping[str, Any]
    window: Window | None
    constraint: AnyConstraint | None
    draft: str | None
    lora: tuple[str, ...]

    @classmethod
    def of(cls, given: dict[str, Any]) -> Asked:
        """Of a command's arguments, which are taken out of `given`. Raises: UsageError."""
        from bloomq.cli.constraints import from_options

        names = [each.name for each in fields(Sampling)]
        numbers = {name: given.pop(name) for name in names if name not in _AS_TEXT}
        texts = {name: given.pop(name) for name in _AS_TEXT}
        if (order := texts.pop("order")) is not None:
            numbers["order"] = tuple(name.strip() for name in order.split(","))
        sampling = Sampling(**numbers)
        if sampling.greedy:
            for name in _OF_DRAWS:
                taken = name == "top_k" and is_given("penalty_alpha")  # by contrastive search
                if is_given(name) and not taken:
                    console.note(f"note: --{_flag(name)} does nothing without a --temperature")
        if "" in texts["bad_words"]:
            raise UsageError("--bad-word is empty, expected a text")
        window, sinks = given.pop("window"), given.pop("sinks")
        if window is None and sinks:
            raise UsageError("--sinks belong to a --window: give its size")
        if given["max_new_tokens"] < 1:
            raise UsageError(f"max_new_tokens is {given['max_new_tokens']}, expected at least 1")
        kinds = [given.pop(name) for name in ("json_schema", "regex", "grammar", "json_object")]
        return cls(
            sampling=sampling, texts=texts, constraint=from_options(*kinds),
            window=None if window is None else _window(window, sinks),
            **{name: given.pop(name) for name in ("max_new_tokens", "stop", "draft", "lora")},
        )  # fmt: skip

    def ready(self, model: LanguageModel, loading: Loading, top_logprobs: int = 0) -> Ready:
        """All of it for a model: adapters and the draft are loaded, texts are token ids.

        Raises: UsageError for values that cannot be.
        """
        return Ready(
            model, self, self._sampling(model), load_draft(self.draft, loading),
            load_adapters(model, self.lora), top_logprobs,
        )  # fmt: skip

    def _sampling(self, model: LanguageModel) -> Sampling:
        texts, found = self.texts, dict[str, Any]()
        if texts["forced_prefix"]:
            found["forced_prefix"] = tuple(model.prompt_ids(texts["forced_prefix"]))
        if texts["bad_words"]:
            found["bad_words"] = bad_words(texts["bad_words"], model)
        if texts["logit_bias"]:
            found["logit_bias"] = dict(_bias(text, model) for text in texts["logit_bias"])
        if self.sampling.dry_multiplier:
            breakers = texts["dry_sequence_breakers"] or BREAKERS
            found["dry_sequence_breakers"] = ids_with(breakers, model)
        return replace(self.sampling, **found)


def _window(tokens: int, sinks: int) -> Window:
    from bloomq.generation import Window

    return Window(tokens, sinks)


@dataclass(frozen=True, slots=True)
class Ready:
    """What is asked for, as `LanguageModel` takes it."""

    model: LanguageModel
    asked: Asked
    sampling: Sampling
    draft: LanguageModel | Literal["lookup"] | None
    adapters: dict[str, float]
    top_logprobs: int

    def _given(self) -> dict[str, Any]:
        """What each of the model's ways to write takes."""
        asked = self.asked
        return {
            "max_new_tokens": asked.max_new_tokens, "sampling": self.sampling, "stop": asked.stop,
            "window": asked.window, "constraint": asked.constraint, "draft": self.draft,
            "top_logprobs": self.top_logprobs, "adapters": self.adapters,
        }  # fmt: skip

    def stream(self, text: str, progress: console.Progress) -> Stream:
        return self.model.stream(text, **self._given(), progress=progress)

    def generate(
        self, text: str, search: AnySearch | None, best_of: int, count: int,
        progress: console.Progress,
    ) -> Generation | list[Generation]:  # fmt: skip
        """What a search, or the best of several draws, gives."""
        given = self._given()
        if search is not None:  # contrastive search has taken top_k for itself
            given["sampling"], count = replace(self.sampling, top_k=0), 1
        found: Generation | list[Generation] = self.model.generate(
            text, **given, search=search, best_of=best_of, num_return_sequences=count,
            progress=progress,
        )  # fmt: skip
        return found

    def each(self, prompts: Sequence[list[int]], first: int, parallel: int) -> Iterator[Generation]:
        """What follows each prompt from the first one on: see `LanguageModel.generate_each`."""
        return self.model.generate_each(
            prompts[first:], first=first, parallel=parallel, **self._given()
        )

    @property
    def options(self) -> dict[str, Any]:
        """What results depend on beside the model and the prompts, as JSON gives it back."""
        asked = self.asked
        return {
            "max_new_tokens": asked.max_new_tokens, "stop": list(asked.stop),
            "sampling": repr(self.sampling), "window": repr(asked.window),
            "constraint": repr(asked.constraint), "top_logprobs": self.top_logprobs,
            "adapters": weights_of(self.adapters),
        }  # fmt: skip


def bad_words(words: Sequence[str], model: LanguageModel) -> tuple[tuple[int, ...], ...]:
    """The usual tokens of each word: as it stands at the start of a text, and behind a space."""
    forms = [form for word in words for form in {word: 0, f" {word.removeprefix(' ')}": 0}]
    return tuple(tuple(model.prompt_ids(form)) for form in forms)


def _bias(text: str, model: LanguageModel) -> tuple[int, float]:
    token, _, bias = text.rpartition("=")
    try:
        value = float(bias if token else "none")
    except ValueError:
        raise UsageError(f"--logit-bias {text}: expected TOKEN=BIAS, a number last") from None
    if token.isdecimal():
        return int(token), value
    ids = model.prompt_ids(token)
    if len(ids) != 1:
        raise UsageError(f"--logit-bias {text}: {token!r} is {len(ids)} tokens, expected one")
    return ids[0], value


def ids_with(texts: Sequence[str], model: LanguageModel) -> tuple[int, ...]:
    """All tokens with one of these texts in them: a repetition that crosses it crosses one."""
    if model.tokenizer is None:
        raise UsageError("--dry-breaker needs a tokenizer, which this pack has not")
    decode = model.tokenizer.decode
    size = model.tokenizer.vocab_size
    return tuple(i for i in range(size) if any(text in decode([i]) for text in texts))


def generation_options(max_new_tokens: int) -> Callable[[Any], Any]:
    """Options of a command that writes text, which gets them as `asked`."""

    def decorate(command: Any) -> Any:
        @wraps(command)
        def collected(*args: Any, **given: Any) -> Any:
            workers = click.get_current_context().obj
            drawn = workers is not None and given.get("batch_file") is None
            if drawn and given["seed"] is None:  # the ranks must draw alike
                given["seed"] = workers.seed()
            asked = Asked.of(given)
            return command(*args, asked=asked, **given)

        for option in reversed(list(_options(max_new_tokens))):
            collected = option(collected)
        return collected

    return decorate


def _options(max_new_tokens: int) -> list[Callable[[Any], Any]]:
    told = sorted(fields(Sampling), key=lambda f: (f.name != "temperature", f.name not in _USUAL))
    return [
        click.option("-n", "--max-new-tokens", type=int, default=max_new_tokens, show_default=True,
                     help="Tokens to produce at most."),
        *(_option(each) for each in told),
        click.option("--stop", multiple=True, help="End before this text; may be repeated."),
        click.option("--window", type=int, help="Keep this many of the latest tokens in view (a "
                     "multiple of 64), so that a text may go on beyond the context."),
        click.option("--sinks", type=int, default=0, help="Of a window: keep so many of the first "
                     "tokens too (a multiple of 64).  [default: 0]"),
        click.option("--json-schema", type=Path, help="Write JSON that the schema in this file "
                     "describes."),
        click.option("--json-object", is_flag=True, help="Write a JSON object."),
        click.option("--regex", help="Write what this regular expression matches (Rust's "
                     "syntax)."),
        click.option("--grammar", type=Path, help="Write a sentence of the grammar in this file: "
                     "Lark's, or llama.cpp's GBNF."),
        click.option("--draft", help="Guess tokens ahead, for speed alone: 'lookup' (what the text "
                     "repeats) or a smaller model's pack."),
        lora_option,
    ]  # fmt: skip


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _option(each: Any) -> Callable[[Any], Any]:
    """The option of a field of `Sampling`."""
    if each.name in _AS_TEXT:
        flag, multiple, text = _AS_TEXT[each.name]
        return click.option(flag, each.name, multiple=multiple, help=text)
    assert each.default is not MISSING
    return click.option(
        f"--{_flag(each.name)}", each.name, help=each.metadata["help"],
        type=int if each.default is None else type(each.default), default=each.default,
        show_default=each.default is not None,
    )  # fmt: skip
