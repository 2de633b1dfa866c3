"""The next token of one sequence: its options, its random numbers, its history and its constraint.

Invariant: a sequence's tokens depend on its own logits, on (seed, index) and on its history, not on
threads, on the batch or on guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bloomq.errors import UsageError
from bloomq.sampling.candidates import Candidates, check_possible
from bloomq.sampling.filters import FEW, Chain, Turn
from bloomq.sampling.logits import Logits
from bloomq.sampling.options import Sampling
from bloomq.sampling.processors import Restorable, edit, edits
from bloomq.sampling.tally import Tally

I64 = NDArray[np.int64]


class Constraint(Protocol):
    """What may follow, by a grammar or the like."""

    @property
    def ended(self) -> bool:
        """Can nothing follow but the end?"""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [V]."""
        ...

    def accept(self, token: int) -> None:
        """The next token is this one."""
        ...


class Sampler:
    """Chooses the tokens of sequence `index` of a call, one by one.

    prompt: its tokens; ends: the end-of-text tokens, which min_new_tokens holds back.
    Raises: UsageError for options with token ids that the vocabulary has not.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] | I64,
        index: int,
        vocab_size: int,
        ends: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        sampling.check_ids(vocab_size)
        self._sampling, self._vocab_size = sampling, vocab_size
        self._ends, self._constraint = tuple(ends), constraint
        self._rng = generator(sampling, index)
        self._prompt_tokens = self._known = len(prompt)
        # The text as an array, with room for more.
        self._seen = np.concatenate([np.asarray(prompt, np.int64), np.empty(64, np.int64)])
        self._tally = Tally()  # of the output
        self._edits, self._chain = sampling.edits, Chain.of(sampling)
        self._cuts = self._chain.cuts
        self._few = FEW[0]  # tokens listed at first
        self._surprise = 2 * sampling.mirostat_tau  # where mirostat begins, in bits

    @property
    def wants(self) -> int:
        """How many of the best tokens, found by the caller for all rows at once, save this sampler
        a search of its own (see `Logits`); 1 where more would not."""
        sampling = self._sampling
        if sampling.greedy or self._edits or self._constraint:
            return 1
        return min(sampling.top_k or max(self._few, 1), self._vocab_size)

    def __call__(self, logits: Logits, produced: Sequence[int]) -> int:
        """The next token behind `produced`. To be called once for each token, in order: it takes
        one random number (and one for XTC, where that is on; greedy none).

        Raises: UsageError where options and constraint forbid every token.
        """
        if not self._edits or not edits(self._sampling, len(produced)):
            return self._chosen(logits)
        values = logits.values()
        if not values.flags.writeable:  # a view of what is JAX's
            values = values.copy()
        scores = Restorable(values)
        try:
            text, new = self._text(produced), len(produced)
            edit(self._sampling, scores, text, new, self._ends, self._tally)
            return self._chosen(logits.edited(values))
        finally:
            scores.restore()

    def _chosen(self, row: Logits) -> int:
        allowed = None if self._constraint is None else self._allowed(self._constraint)
        token = self._greedy(row, allowed) if self._sampling.greedy else self._draw(row, allowed)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _text(self, produced: Sequence[int]) -> I64:
        """Prompt and output, of which all but the latest tokens were seen by earlier calls."""
        count = self._prompt_tokens + len(produced)
        if count > len(self._seen):
            self._seen = np.concatenate([self._seen, np.empty(count, np.int64)])
        known = min(self._known, count)
        self._seen[known:count] = produced[known - self._prompt_tokens :]
        self._known = count
        return self._seen[:count]

    def _allowed(self, constraint: Constraint) -> NDArray[np.bool_] | None:
        """What the constraint lets through; None: everything."""
        allowed = constraint.allowed()
        if allowed.shape != (self._vocab_size,):
            raise UsageError(
                f"the constraint's mask is {allowed.shape}, expected one truth value for each of "
                f"{self._vocab_size} tokens"
            )
        return None if allowed.all() else np.ascontiguousarray(allowed, np.bool_)

    def _greedy(self, row: Logits, allowed: NDArray[np.bool_] | None) -> int:
        ids, values = row.best(1)
        if allowed is not None and not allowed[ids[0]]:
            ids, values = row.masked(allowed).best(1)
        check_possible(values[0])
        return int(ids[0])

    def _draw(self, row: Logits, allowed: NDArray[np.bool_] | None) -> int:
        sampling, u = self._sampling, self._rng.random()
        exclude = sampling.xtc_probability > 0 and self._rng.random() < sampling.xtc_probability
        if allowed is not None:
            row = row.masked(allowed)
        turn = Turn(exclude, self._surprise if sampling.mirostat_tau else None)
        kept = self._chain.left(row, turn, self._few)
        token = kept.pick(u)
        # Neighbouring places of a text differ, but most nuclei stay about as large.
        rank = 0 if self._cuts else kept.rank(token)
        self._few = next((few for few in FEW if (kept.few(few) if self._cuts else rank < few)), 0)
        if sampling.mirostat_tau:
            self._note(kept, token)
        return token

    def _note(self, kept: Candidates, token: int) -> None:
        """Mirostat's correction: the bound follows how surprising the token was."""
        score = kept.row.logit(token) / kept.temperature
        surprise = (kept.logsumexp() - score) / np.log(2)
        error = surprise - self._sampling.mirostat_tau
        self._surprise -= float(self._sampling.mirostat_eta * error)


def generator(sampling: Sampling, index: int) -> np.random.Generator:
    """The random numbers of sequence `index` of a call: its own stream, whatever the batch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([_seed(sampling), index])))


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None:
        return int(sampling.seed)
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
