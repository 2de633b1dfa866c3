"""Beam search on a model: the beams of all prompts in one cache, one step for all of them.

Invariant: what is found for a prompt does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.forward import cut
from bloomq.generation import PrefillProgress, check_prompts
from bloomq.heads import Head
from bloomq.layers import Span
from bloomq.sampling import Sampling
from bloomq.search.beams import Beams, Ends, Stopped
from bloomq.search.candidates import Outlook
from bloomq.search.hypotheses import Hypothesis
from bloomq.search.options import BeamOptions, check_greedy
from bloomq.search.rows import Rows

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class BeamSearch:
    """The likeliest texts behind some prompts.

    ends: tokens that end a text, which are part of it; sampling: its processors change the scores,
    with temperature 0; stopped: does a text of these tokens end here (stop strings)?; gates: of the
    prompts' adapters (see `lora`), None: of none.
    Raises: UsageError, CapacityError: see `generation.check_prompts`.
    """

    def __init__(
        self,
        head: Head,
        prompts: Sequence[Sequence[int]],
        options: BeamOptions,
        *,
        max_new_tokens: int,
        context: int,
        ends: tuple[int, ...] = (),
        sampling: Sampling | None = None,
        stopped: Stopped = lambda ids: False,
        gates: F32 | None = None,
    ) -> None:
        check_prompts(prompts, max_new_tokens, context)
        self._head, self._sampling = head, sampling or Sampling()
        check_greedy(self._sampling, "beam search")
        self._sampling.check_ids(head.config.vocab_size)
        self._prompts = [np.array(prompt, np.int64) for prompt in prompts]
        self._ends = Ends(tuple(dict.fromkeys(ends)), int(max_new_tokens), stopped)
        self._beams = [Beams(options, self._ends) for _ in prompts]
        count, longest = options.num_beams, max(map(len, prompts))
        # The last token is produced, not fed back: it needs no place.
        self._cache = head.cache(count * len(prompts), longest + self._ends.most - 1)
        if gates is not None:
            self._cache.gates[:] = np.repeat(gates, count, axis=0)
        self._rows = [Rows(self._cache, i * count, count) for i in range(len(prompts))]

    def run(self, progress: PrefillProgress = lambda done, total: None) -> Iterator[int]:
        """Search, in steps: yields how many tokens the texts under way have behind each."""
        total, most = sum(map(len, self._prompts)), self._head.backend.step_tokens
        done = 0
        for step in cut([len(prompt) for prompt in self._prompts], most):
            ids = np.concatenate([self._prompts[i][a:b] for i, a, b in step])
            rows = [self._rows[i].used[0] for i, _, _ in step]
            ended = [i for i, _, b in step if b == len(self._prompts[i])]
            self._step(ids, Span.of(rows, [b - a for _, a, b in step]), ended, 0)
            done += len(ids)
            progress(done, total)
        length = 1
        yield length
        while active := [i for i, beams in enumerate(self._beams) if beams.running]:
            ids = np.array([b.ids[-1] for i in active for b in self._beams[i].running], np.int64)
            rows = [row for i in active for row in self._rows[i].used]
            self._step(ids, Span.of(rows, [1] * len(rows)), active, length)
            length += 1
            yield length

    def results(self) -> list[list[Hypothesis]]:
        """Of each prompt the best texts, best first: num_return_sequences of them, fewer where so
        many do not exist. Before the search has ended those under way are "interrupted"."""
        return [beams.results() for beams in self._beams]

    def _step(self, ids: I64, span: Span, active: list[int], produced: int) -> None:
        """Run the tokens of `span`, and let the beams of the prompts `active`, which have produced
        so many tokens, choose behind their last ones."""
        rows = [row for i in active for row in self._rows[i].used]
        wanted = span.last[np.isin(span.rows, rows)]  # in the order of `rows`
        logits = self._head.step(ids, self._cache, span, wanted)
        if not active:  # a prompt's first part: nobody reads its logits
            return
        outlook = Outlook(
            self._head.backend, logits, self._sampling, self._ends.ids,
            produced=produced, most=self._beams[0].most_candidates, editing="logprobs",
        )  # fmt: skip
        if not np.isfinite(outlook.top.logsumexp).all():
            raise self._head.model.find_not_finite(ids, self._cache, span)
        first = 0
        for i in active:
            beams, used = self._beams[i], self._rows[i].used
            parents = beams.advance(outlook.behind(self._prompts[i].tolist(), first))
            self._rows[i].follow(parents)
            first += len(used)


def beam_search(
    head: Head,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    context: int,
    ends: tuple[int, ...] = (),
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    sampling: Sampling | None = None,
    stopped: Stopped = lambda ids: False,
    gates: F32 | None = None,
    progress: PrefillProgress = lambda done, total: None,
) -> list[Hypothesis]:
    """The likeliest texts behind a prompt, best first: see `BeamOptions` and `BeamSearch`. Ctrl-C
    ends the search and returns the best so far, with finish_reason "interrupted"."""
    options = BeamOptions(
        num_beams=num_beams, num_return_sequences=num_return_sequences,
        length_penalty=length_penalty, early_stopping=early_stopping,
        num_beam_groups=num_beam_groups, diversity_penalty=diversity_penalty,
    )  # fmt: skip
    search = BeamSearch(
        head, [prompt], options, max_new_tokens=max_new_tokens, context=context, ends=ends,
        sampling=sampling, stopped=stopped, gates=gates,
    )  # fmt: skip
    try:
        for _ in search.run(progress):
            pass
    except KeyboardInterrupt:
        pass  # what was found is worth more than a traceback
    return search.results()[0]
