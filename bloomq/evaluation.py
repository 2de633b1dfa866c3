"""bloomq as a model of EleutherAI's lm-eval: its three kinds of requests, answered by a pack.

    python -m bloomq.evaluation --model_args pack=PACK,threads=2 --tasks lambada_openai
    lm_eval.simple_evaluate(bloomq.evaluation.BloomqLM("pack"), tasks=["lambada_openai"])

lm-eval finds models by a table of its own, and has no entry point for others: so the command is its
own command line, to which "bloomq" is known. It is imported when it is used, `pip install
bloomq[eval]`. Source: lm-evaluation-harness 0.4.13, api/model.py and models/huggingface.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from bloomq.answers import MOST_NEW, Answers, Options, check_whole
from bloomq.errors import BloomqError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.loading import load
from bloomq.scoring import BATCH_TOKENS

_ARGUMENTS = (
    "pack", "backend", "threads", "cache_dtype", "max_length", "max_gen_toks", "batch_tokens",
    "seed",
)  # fmt: skip


class _Requests:
    """lm-eval's requests, answered: all of `BloomqLM` that needs no lm-eval.

    pack: a pack, or a loaded model. max_length: None for what the model was trained on;
    batch_tokens: see `Answers`; max_gen_toks: of answers where a task says none. batch_size,
    max_batch_size, device: lm-eval passes its defaults; `backend` and `batch_tokens` count instead.
    Raises: UsageError for another argument: lm-eval passes on whatever it is given.
    """

    cache_hook: Any  # lm-eval's

    def __init__(
        self,
        pack: LanguageModel | str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        cache_dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = MOST_NEW,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:  # what --model_args names
            raise UsageError(
                f"model_args has {', '.join(sorted(unknown))}, expected {', '.join(_ARGUMENTS)}"
            )
        self.max_gen_toks = check_whole("max_gen_toks", max_gen_toks, 1)
        if not isinstance(pack, LanguageModel):
            pack = load(
                pack, backend=backend, threads=threads, context=max_length,
                cache_dtype=cache_dtype,
            )  # fmt: skip
        self.answers = Answers(pack, max_length=max_length, batch_tokens=batch_tokens, seed=seed)
        self.max_length = self.answers.max_length

    @property
    def eot_token_id(self) -> int | None:
        return self.answers.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.answers.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """BLOOM's tokenizer adds no special tokens, asked or not."""
        return self.answers.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [(context, rest) for _, context, rest in requests]
        found: list[Any] = [None] * len(pairs)
        with _bar(len(pairs), disable_tqdm, "loglikelihood") as bar:
            for number, answer in self.answers.likelihoods(pairs):
                found[number] = answer
                if requests[number][0] is not None:  # of a rolling one: saved as a whole
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update()
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows = [self.answers.rolling(request.args[0]) for request in requests]
        flat = [(None, *window) for one in windows for window in one]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        found = [float(sum(next(scores)[0] for _ in one)) for one in windows]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        groups: dict[Options, list[int]] = {}
        for number, request in enumerate(requests):
            options = Options.of(request.args[1], self.max_gen_toks)
            groups.setdefault(options, []).append(number)
        found = [""] * len(requests)
        with _bar(len(requests), disable_tqdm, "generate_until") as bar:
            for options, numbers in groups.items():
                contexts = [requests[number].args[0] for number in numbers]
                for i, text in self.answers.texts(contexts, options):
                    found[numbers[i]] = text
                    args = requests[numbers[i]].args
                    self.cache_hook.add_partial("generate_until", args, text)
                    bar.update()
        return found


def _bar(total: int, hidden: bool, name: str) -> Any:
    from tqdm import tqdm  # which lm-eval needs

    return tqdm(total=total, disable=hidden, desc=name)


@lru_cache(maxsize=1)
def lm_class() -> Any:
    """lm-eval's model "bloomq", `BloomqLM`, which it now knows by this name.

    Raises: UsageError where lm-eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  the table of its own models, which it fills but once
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is missing, which evaluation needs: pip install 'bloomq[eval]'"
        ) from None

    class BloomqLM(_Requests, TemplateLM):  # type: ignore[misc]  # lm-eval's types are not ours
        __doc__ = _Requests.__doc__

    return register_model("bloomq")(BloomqLM)


def __getattr__(name: str) -> Any:
    if name == "BloomqLM":
        return lm_class()
    raise AttributeError(f"module 'bloomq.evaluation' has no attribute {name!r}")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """lm-eval's command line, with --model bloomq where it names none, and exit."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        lm_class()
        from lm_eval.__main__ import cli_evaluate

        if not given or given[0] not in ("run", "ls", "validate", "-h", "--help"):
            given.insert(0, "run")
        named = any(arg.split("=")[0] in ("--model", "-M", "--config", "-C") for arg in given)
        if given[0] == "run" and not named:
            given[1:1] = ["--model", "bloomq"]
        sys.argv[1:] = given
        cli_evaluate()
    except BloomqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
