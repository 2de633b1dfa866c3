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
from bloomq.sampling.filters import FEW, Turn, active, filtered
from bloomq.sampling.logits import Logits
from bloomq.sampling.options import Sampling
from bloomq.sampling.processors import edited

F32 = NDArray[np.float32]
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
        self._prompt = np.asarray(prompt, np.int64)
        self._produced = np.empty(64, np.int64)  # room for more; the caller's list as an array
        self._known = 0
        self._edits, self._active = sampling.edits, active(sampling)
        # Is the draw from a part of the tokens, even where XTC spares them all?
        self._cuts = bool(set(self._active) - {"temperature", "xtc"} or sampling.mirostat_tau)
        self._few = FEW  # tokens listed at first
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
        row = self._edited(logits, produced)
        allowed = None if self._constraint is None else self._allowed(self._constraint)
        token = self._greedy(row, allowed) if self._sampling.greedy else self._draw(row, allowed)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _edited(self, logits: Logits, produced: Sequence[int]) -> Logits:
        """The logits after all that depends on the text so far."""
        if not self._edits:
            return logits
        values = logits.values()
        changed = edited(self._sampling, values, self._prompt, self._array(produced), self._ends)
        return logits if changed is values else logits.edited(changed)

    def _array(self, produced: Sequence[int]) -> I64:
        """The tokens produced, of which all but the latest were seen by earlier calls."""
        count = len(produced)
        if count > len(self._produced):
            self._produced = np.concatenate([self._produced, np.empty(count, np.int64)])
        known = min(self._known, count)
        self._produced[known:count] = produced[known:]
        self._known = count
        return self._produced[:count]

    def _allowed(self, constraint: Constraint) -> NDArray[np.bool_] | None:
        """What the constraint lets through; None: everything."""
        allowed = constraint.allowed()
        if allowed.shape != (self._vocab_size,):
            raise UsageError(
                f"the constraint's mask is {allowed.shape}, expected one truth value for each of "
                f"{self._vocab_size} tokens"
            )
        return None if allowed.all() else allowed

    def _greedy(self, row: Logits, allowed: NDArray[np.bool_] | None) -> int:
        ids, values = row.best(1)
        if allowed is not None and not allowed[ids[0]]:
            ids, values = row.edited(masked(row.values(), allowed)).best(1)
        check_possible(values[0])
        return int(ids[0])

    def _draw(self, row: Logits, allowed: NDArray[np.bool_] | None) -> int:
        sampling, u = self._sampling, self._rng.random()
        exclude = sampling.xtc_probability > 0 and self._rng.random() < sampling.xtc_probability
        if allowed is not None:
            row = row.edited(masked(row.values(), allowed))
        turn = Turn(exclude, self._surprise if sampling.mirostat_tau else None)
        kept = filtered(sampling, self._active, row, turn, self._few)
        token = kept.pick(u)
        # Neighbouring places of a text differ, but most nuclei stay about as large.
        listed = kept.few(FEW) if self._cuts else kept.rank(token) < FEW
        self._few = FEW if listed else 0
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


def masked(values: F32, allowed: NDArray[np.bool_]) -> F32:
    """Scores [V] with -infinity where a token is not allowed. By arithmetic: over 250,880 tokens a
    choice by truth values takes five times as long, where these are mixed."""
    with np.errstate(divide="ignore"):
        mask = np.reciprocal(allowed.astype(np.float32))  # 1 or infinity
    np.subtract(np.float32(1), mask, out=mask)
    return np.add(values, mask, out=mask)
