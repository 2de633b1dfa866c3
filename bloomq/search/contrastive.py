"""Contrastive search: a token that is likely, and unlike what the text said before.

The candidates of a step are run as rows of one cache that share their past; the row of the chosen
one stays. Only its logits are computed: likeness needs hidden states alone.
Source: Su et al. 2022 (arXiv 2202.06417); transformers 4's `_contrastive_search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.forward import cut
from bloomq.generation import FinishReason, PrefillProgress, check_prompts
from bloomq.heads import Head
from bloomq.layers import Span
from bloomq.sampling import Sampling
from bloomq.search.beams import Stopped
from bloomq.search.candidates import Candidates, Outlook
from bloomq.search.hypotheses import Hypothesis
from bloomq.search.options import ContrastOptions, check_greedy
from bloomq.search.rows import Rows

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Text:
    """A text under way: its prompt, and what it produced.

    states: hidden states behind the last norm, each divided by its length, [capacity, C]; last: the
    latest before the norm, [C]; rows: of the cache, the text's own and its candidates'.
    """

    prompt: I64
    states: F32
    last: F32
    rows: Rows
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: FinishReason | None = None

    def choose(self, candidates: Candidates, states: F32, penalty_alpha: float) -> int:
        """Which of the candidates comes next, given the unit states that they would have [k, C]."""
        said = self.states[: len(self.prompt) + len(self.ids)]
        likeness = (states @ said.T).max(axis=1)  # [k], the largest cosine of each
        gain = (1 - penalty_alpha) * np.exp(candidates.scores) - penalty_alpha * likeness
        return int(gain.argmax())


class ContrastiveSearch:
    """Texts behind some prompts, in one cache.

    Arguments: see `BeamSearch`; processors change the logits here. Raises: UsageError,
    CapacityError: see `generation.check_prompts`.
    """

    def __init__(
        self,
        head: Head,
        prompts: Sequence[Sequence[int]],
        options: ContrastOptions,
        *,
        max_new_tokens: int,
        context: int,
        ends: tuple[int, ...] = (),
        sampling: Sampling | None = None,
        stopped: Stopped = lambda ids: False,
        gates: F32 | None = None,
    ) -> None:
        check_prompts(prompts, max_new_tokens, context)
        self._head, self._options = head, options
        self._ends, self._stopped = ends, stopped
        self._sampling, self._most = sampling or Sampling(), int(max_new_tokens)
        check_greedy(self._sampling, "contrastive search")
        self._sampling.check_ids(head.config.vocab_size)
        # Hidden states before the last norm: `head.ln_f` and `head.read` both begin there.
        self._hidden = head.model.compile(lambda x: x)
        count = min(int(options.top_k), head.config.vocab_size)
        size = max(map(len, prompts)) + self._most  # candidates for the last token are run too
        self._cache = head.cache(count * len(prompts), size)
        if gates is not None:
            self._cache.gates[:] = np.repeat(gates, count, axis=0)
        self.texts = [
            Text(np.array(prompt, np.int64),
                 np.empty((len(prompt) + self._most, head.config.hidden_size), np.float32),
                 np.empty(0, np.float32), Rows(self._cache, i * count, count))
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip

    def run(self, progress: PrefillProgress = lambda done, total: None) -> Iterator[int]:
        """Search, in steps: yields how many tokens the texts under way have behind each."""
        self._prefill(progress)
        length = 0
        while any(text.reason is None for text in self.texts):
            self._step()
            length += 1
            yield length

    def results(self) -> list[list[Hypothesis]]:
        """Of each prompt its text, with the sum of its logprobs as score."""
        return [
            [Hypothesis(tuple(text.ids), sum(text.logprobs), tuple(text.logprobs),
                        text.reason or "interrupted")]
            for text in self.texts
        ]  # fmt: skip

    def _prefill(self, progress: PrefillProgress) -> None:
        """The prompts in steps of as many tokens as the backend takes."""
        total, most = sum(len(text.prompt) for text in self.texts), self._head.backend.step_tokens
        done = 0
        for step in cut([len(text.prompt) for text in self.texts], most):
            ids = np.concatenate([self.texts[i].prompt[a:b] for i, a, b in step])
            rows = [self.texts[i].rows.used[0] for i, _, _ in step]
            hidden, states = self._run(ids, Span.of(rows, [b - a for _, a, b in step]))
            first = 0
            for i, a, b in step:
                text, first = self.texts[i], first + b - a
                text.states[a:b], text.last = states[first - (b - a) : first], hidden[first - 1]
            done += len(ids)
            progress(done, total)

    def _step(self) -> None:
        """Run all candidates of the next token of each text under way, and choose."""
        texts = [text for text in self.texts if text.reason is None]
        found = self._candidates(texts)
        for text, candidates in zip(texts, found, strict=True):
            text.rows.follow([0] * len(candidates.ids))
        rows = [row for text in texts for row in text.rows.used]
        ids = np.concatenate([candidates.ids for candidates in found])
        hidden, states = self._run(ids, Span.of(rows, [1] * len(rows)))
        first = 0
        for text, candidates in zip(texts, found, strict=True):
            count = len(candidates.ids)
            mine = states[first : first + count]
            at = text.choose(candidates, mine, self._options.penalty_alpha)
            text.states[len(text.prompt) + len(text.ids)] = mine[at]
            text.last = hidden[first + at]
            text.rows.follow([at])
            text.ids.append(int(candidates.ids[at]))
            text.logprobs.append(float(candidates.logprobs[at]))
            text.reason = self._reason(text.ids)
            if text.reason is not None:
                text.rows.follow([])
            first += count

    def _reason(self, ids: list[int]) -> FinishReason | None:
        """Why a text of these tokens ends here; None: it goes on."""
        if ids[-1] in self._ends:
            return "eos"
        if self._stopped(tuple(ids)):
            return "stop"
        return "length" if len(ids) == self._most else None

    def _candidates(self, texts: list[Text]) -> list[Candidates]:
        """The likeliest tokens behind each text; all have produced as many. Raises: UsageError."""
        logits = self._head.read(np.stack([text.last for text in texts]))  # [texts, V]
        backend, count = self._head.backend, int(self._options.top_k)
        outlook = Outlook(
            backend, logits, self._sampling, self._ends, produced=len(texts[0].ids), most=count,
            editing="logits",
        )  # fmt: skip
        if not np.isfinite(outlook.top.logsumexp).all():
            rows = [text.rows.used[0] for text in texts]
            last = [[*text.prompt.tolist(), *text.ids][-1] for text in texts]
            span = Span.of(rows, [1] * len(rows))
            raise self._head.model.find_not_finite(np.array(last, np.int64), self._cache, span)
        found = [
            outlook.behind(text.prompt.tolist(), i)(0, tuple(text.ids), count, {})
            for i, text in enumerate(texts)
        ]
        if not all(len(candidates.ids) for candidates in found):
            raise UsageError(
                "no candidate is left to choose: bad_words and the like forbid them all"
            )
        return found

    def _run(self, ids: I64, span: Span) -> tuple[F32, F32]:
        """Hidden states of a step's tokens before the last norm, [M, C], and behind it, divided by
        their lengths."""
        backend = self._head.backend
        hidden = self._hidden(ids, self._cache, span, np.arange(len(ids)))
        states = backend.numpy(self._head.ln_f(hidden))
        if not np.isfinite(states).all():
            raise self._head.model.find_not_finite(ids, self._cache, span)
        lengths = np.linalg.norm(states, axis=1, keepdims=True)
        return backend.numpy(hidden), states / np.maximum(lengths, np.finfo(np.float32).tiny)


def contrastive_search(
    head: Head,
    prompt: Sequence[int],
    *,
    penalty_alpha: float,
    top_k: int = 4,
    max_new_tokens: int,
    context: int,
    ends: tuple[int, ...] = (),
    sampling: Sampling | None = None,
    gates: F32 | None = None,
    progress: PrefillProgress = lambda done, total: None,
) -> Hypothesis:
    """The text behind a prompt, with the sum of its logprobs as score: see `ContrastOptions` and
    `ContrastiveSearch`. Ctrl-C returns what was produced, with finish_reason "interrupted"."""
    search = ContrastiveSearch(
        head, [prompt], ContrastOptions(penalty_alpha=penalty_alpha, top_k=top_k),
        max_new_tokens=max_new_tokens, context=context, ends=ends, sampling=sampling, gates=gates,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):  # what was produced is worth more than a traceback
        for _ in search.run(progress):
            pass
    return search.results()[0][0]
