"""Beams: the texts that are under way for one prompt, and which of them go on.

Nothing here knows a model: it is told what may follow each beam and says which tokens to run next.
Invariant: a step replaces the state of a group as a whole, so that what an interruption leaves is
the state before or behind a step.
Source: transformers 5's `_beam_search`; groups: `_group_beam_search` of transformers 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bloomq.errors import UsageError
from bloomq.generation import FinishReason
from bloomq.search.candidates import Candidates, Follow
from bloomq.search.hypotheses import Hypothesis
from bloomq.search.options import BeamOptions

Stopped = Callable[[tuple[int, ...]], bool]  # does a text of these tokens end here?


@dataclass(frozen=True, slots=True)
class Beam:
    """A text under way: its tokens, their logprobs under the model, its sum of scores, and which
    beam of the step before it continues."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    parent: int = 0


@dataclass(frozen=True, slots=True)
class Ends:
    """Where a text ends: behind one of the tokens `ids`, `most` tokens, or where `stopped` says."""

    ids: tuple[int, ...]
    most: int
    stopped: Stopped

    def reason(self, beam: Beam) -> FinishReason | None:
        """Why a text ends here, whatever its length; None: it goes on."""
        if beam.ids[-1] in self.ids:
            return "eos"
        return "stop" if self.stopped(beam.ids) else None


@dataclass(frozen=True, slots=True)
class _State:
    """running: beams that go on, best first; finished: best first, at most as many as there may be
    beams."""

    running: tuple[Beam, ...] = (Beam(),)
    finished: tuple[Hypothesis, ...] = ()


class Group:
    """`options.width` beams that search on their own."""

    def __init__(self, options: BeamOptions, ends: Ends) -> None:
        self._options, self._ends = options, ends
        self._state = _State()
        # So many that enough are left to go on where all the best end.
        self.kept = max(2, 1 + len(ends.ids)) * options.width

    @property
    def running(self) -> tuple[Beam, ...]:
        """The beams that go on; none when the search has ended."""
        return self._state.running

    def advance(self, candidates: Sequence[Candidates]) -> tuple[int, ...]:
        """Take the next step, given what may follow each running beam: the tokens that it chose.

        Raises: UsageError where processors forbid everything.
        """
        width = self._options.width
        children = self._children(candidates)
        ended: list[Hypothesis] = []
        going: list[Beam] = []
        for rank, beam in enumerate(children):
            reason = self._ends.reason(beam)
            if reason is None:
                going.append(beam)
            elif rank < width:  # the others are there to go on, not to end
                ended.append(self._ended(beam, reason))
        going = going[:width]
        finished = self._merged(self._state.finished, ended)
        if not children and not finished:
            raise UsageError(
                "no token is left for any beam: bad_words and the like forbid them all"
            )
        full = bool(going) and len(going[0].ids) == self._ends.most
        if full and not (self._options.grouped and self._enough(finished)):
            finished = self._merged(finished, [self._ended(beam, "length") for beam in going])
        done = full or not going or self._is_done(children, going, finished)
        self._state = _State(() if done else tuple(going), finished)
        return tuple(beam.ids[-1] for beam in going)

    def results(self) -> list[Hypothesis]:
        """What was found and, "interrupted", what is under way."""
        going = [self._ended(beam, "interrupted") for beam in self._state.running]
        return [*self._state.finished, *going]

    def _children(self, candidates: Sequence[Candidates]) -> list[Beam]:
        """The best continuations of all beams, best first; of equals the earlier beam's."""
        beams = self._state.running
        parents = np.repeat(np.arange(len(beams)), [len(one.ids) for one in candidates])
        ids = np.concatenate([one.ids for one in candidates])
        logprobs = np.concatenate([one.logprobs for one in candidates])
        totals = np.array([beam.total for beam in beams])[parents]
        totals = totals + np.concatenate([one.scores for one in candidates])
        children = []
        for i in np.argsort(-totals, kind="stable")[: self.kept].tolist():
            parent, logprob = int(parents[i]), float(logprobs[i])
            before = beams[parent]
            children.append(
                Beam((*before.ids, int(ids[i])), (*before.logprobs, logprob), float(totals[i]),
                     parent)
            )  # fmt: skip
        return children

    def _ended(self, beam: Beam, reason: FinishReason) -> Hypothesis:
        length = max(len(beam.ids), 1)  # interrupted before its first token, it has none
        score: float = beam.total / float(length) ** self._options.length_penalty
        return Hypothesis(beam.ids, score, beam.logprobs, reason)

    def _merged(
        self, finished: tuple[Hypothesis, ...], new: list[Hypothesis]
    ) -> tuple[Hypothesis, ...]:
        return tuple(_best_first([*finished, *new])[: self._options.width])

    def _enough(self, finished: tuple[Hypothesis, ...]) -> bool:
        return self._options.early_stopping is True and len(finished) == self._options.width

    def _is_done(
        self, children: list[Beam], going: list[Beam], finished: tuple[Hypothesis, ...]
    ) -> bool:
        """Is the best that may come no better than the worst that was found? Transformers 4, whose
        groups these are, counts what has just ended among what may come."""
        if len(finished) < self._options.width:
            return False
        if self._options.early_stopping is True:
            return True
        best = (children if self._options.grouped else going)[0]
        penalty = self._options.length_penalty
        never = self._options.early_stopping == "never" and penalty > 0.0
        length = self._ends.most if never else len(best.ids)
        reachable: float = best.total / float(length) ** penalty
        return reachable <= finished[-1].score


class Beams:
    """All beams of one prompt, in groups: what a group chooses makes the same tokens dearer for
    those behind it in the same step. (A group that has ended chooses nothing; in transformers 4 it
    goes on choosing padding.)"""

    def __init__(self, options: BeamOptions, ends: Ends) -> None:
        self._options = options
        self._groups = [Group(options, ends) for _ in range(options.num_beam_groups)]
        self._begun = False
        # A group may have to pass over what all others before it chose.
        self.most_candidates = self._groups[0].kept + options.num_beams - options.width

    @property
    def running(self) -> tuple[Beam, ...]:
        """The beams to run next: all groups', one after another; at first one, the prompt's."""
        groups = self._groups if self._begun else self._groups[:1]
        return tuple(beam for group in groups for beam in group.running)

    def advance(self, follow: Follow) -> tuple[int, ...]:
        """Take the next step, asking what may follow each beam: for each of those then running,
        the index of the one before that it continues."""
        chosen: Counter[int] = Counter()
        parents: list[int] = []
        first = 0  # of the group's beams among all
        for group in self._groups:
            penalty = self._options.diversity_penalty
            lowered = {token: count * penalty for token, count in chosen.items()}
            before = group.running
            if not before:
                continue
            chosen.update(group.advance([
                follow(first + i, beam.ids, group.kept, lowered) for i, beam in enumerate(before)
            ]))  # fmt: skip
            parents += [first + beam.parent for beam in group.running]
            first += len(before) if self._begun else 0
        self._begun = True
        return tuple(parents)

    def results(self) -> list[Hypothesis]:
        """The best texts of all groups, best first: num_return_sequences of them, fewer where so
        many do not exist."""
        groups = self._groups if self._begun else self._groups[:1]
        found = [one for group in groups for one in group.results()]
        return _best_first(found)[: self._options.num_return_sequences]


def _best_first(found: list[Hypothesis]) -> list[Hypothesis]:
    """Of equals the one found first."""
    return sorted(found, key=lambda one: -one.score)
