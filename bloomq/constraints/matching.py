"""Constraints followed token by token: which tokens may come next, which must.

Invariant: what is allowed depends on the constraint and the sequence's own tokens alone, so
sequences share the compiled vocabulary and nothing that changes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bloomq.byte_level import byte_alphabet
from bloomq.constraints import AnyConstraint
from bloomq.constraints.engine import compiled, engine, library_errors, limits, reason
from bloomq.errors import UsageError
from bloomq.tokenizer import BloomTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_COMPILED = 16  # constraints that are kept, the latest used


class Compiler:
    """Makes the matchers of one model: `matcher` for each sequence.

    The vocabulary is compiled at the first call, for all threads, once: 1.3 s and 90 MB for BLOOM's
    250,680 tokens. vocab_size: the model's, which may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: BloomTokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._compiled: dict[AnyConstraint, LLMatcher] = {}
        self._lock = threading.Lock()

    def matcher(self, constraint: AnyConstraint, ends: Sequence[int]) -> Matcher:
        """A matcher at the beginning. ends: the tokens at which generation ends, maybe none.

        Raises: UsageError; also for a pack without tokenizer, and where nothing can match.
        """
        if not isinstance(constraint, AnyConstraint):
            raise UsageError(
                f"constraint is {constraint!r:.60}, expected a JsonSchema, a Regex or a Grammar"
            )
        if self._tokenizer is None:
            raise UsageError("a constraint needs a tokenizer, which this pack has not")
        engine()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
            start = self._compiled.get(constraint)
        if start is None:  # compiled outside the lock: it may take its time
            start = _start(self._vocabulary, constraint)
        with self._lock:
            self._compiled.pop(constraint, None)
            self._compiled[constraint] = start  # behind the others: the latest used
            if len(self._compiled) > _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            copy = start.deep_copy()
        return Matcher(copy, self._tokenizer.vocab_size, self._vocab_size, ends)


class Matcher:
    """One sequence under a constraint: a `Constraint` of `sampling`.

    Call `allowed` for what may come next, `accept` for what came.
    """

    def __init__(
        self, matcher: LLMatcher, tokens: int, vocab_size: int, ends: Sequence[int]
    ) -> None:
        self._matcher, self._tokens, self._vocab_size = matcher, tokens, vocab_size
        self._ends = tuple(ends)
        self._allowed: NDArray[np.bool_] | None = None  # of the present state
        self._over = False  # a token of `ends` came

    @property
    def complete(self) -> bool:
        """Is the text so far all that the constraint asks for? It may still go on."""
        return self._over or self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Can nothing follow but the end? Generation may stop here, and must where there is no
        end-of-text token."""
        return self._over or (self._matcher.is_stopped() and self._matcher.is_accepting())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [V], read-only: those that the constraint has room for, and
        the end where it may be. Of a complete text: the end alone.

        Raises: UsageError where the constraint became too complex, or no token continues it.
        """
        if self._allowed is None:
            self._allowed = self._computed()
        return self._allowed

    def _computed(self) -> NDArray[np.bool_]:
        end = self._tokens  # llguidance's own end-of-text, behind the tokenizer's tokens
        words = np.zeros(max(end, self._vocab_size) // 32 + 1, np.int32)
        part = words[: end // 32 + 1]
        with library_errors("the constraint cannot be followed"):
            self._matcher.unsafe_compute_mask_ptr(part.ctypes.data, part.nbytes)
        self._check()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
        may_end = bool(bits[end]) and self._matcher.is_accepting()  # <[*]> has that bit too
        bits[end:] = False  # rows of the embedding that stand for no token
        allowed = bits[: self._vocab_size]
        allowed[list(self._ends)] |= may_end
        if not may_end and not allowed.any():
            raise UsageError(
                "no token of this vocabulary continues what the constraint expects next"
            )
        allowed.flags.writeable = False
        return allowed

    def accept(self, token: int) -> None:
        """Go on behind a token. Raises: UsageError for one that is not allowed here."""
        self._allowed = None
        if token in self._ends and self._matcher.is_accepting():
            self._over = True
            return
        fits = False
        if 0 <= token < self._tokens and not self._over:
            with library_errors("the constraint cannot be followed"):
                fits = self._matcher.try_consume_tokens([token]) == 1
            self._check()
        if not fits:
            raise UsageError(f"token {token} is not allowed by the constraint where it came")

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as they are known: guesses that come true."""
        if self.ended:
            return []
        tokens: list[int] = []
        with library_errors("the constraint cannot be followed"):
            known = self._matcher.compute_ff_tokens()
        for token in known:
            if token >= self._tokens:  # llguidance's own end
                break
            tokens.append(token)
        return tokens

    def fork(self) -> Matcher:
        """A matcher that goes on from here by itself."""
        copy = Matcher(self._matcher.deep_copy(), self._tokens, self._vocab_size, self._ends)
        copy._allowed, copy._over = self._allowed, self._over
        return copy

    def _check(self) -> None:
        if self._matcher.is_error():
            fault = reason(self._matcher.get_error())
            raise UsageError(f"the constraint cannot be followed any further: {fault}")


class Forced:
    """Guesses what a constraint leaves no choice about: see `speculation`."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        return self._matcher.forced()[:most]


class _Source:
    """A tokenizer as llguidance reads it: every token's bytes, and text to tokens."""

    bos_token_id = None

    def __init__(self, tokenizer: BloomTokenizer) -> None:
        self._tokenizer = tokenizer
        ids = list(range(tokenizer.vocab_size))
        tokens, alphabet = tokenizer.convert_ids_to_tokens(ids), byte_alphabet()
        self.tokens = [_bytes_of(token, alphabet) for token in tokens or ()]
        # An end of its own, so that a model's may be any, several or none.
        self.eos_token_id = len(self.tokens)
        self.tokens.append(b"<end of text>")
        self.special_token_ids = [*tokenizer.all_special_ids, self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode())


def _bytes_of(token: str | None, alphabet: dict[str, int]) -> bytes:
    """A token's bytes by the alphabet, else its UTF-8: as `BloomTokenizer` decodes it."""
    values = [alphabet.get(char, -1) for char in token or ""]
    return (token or "").encode() if -1 in values else bytes(values)


def _vocabulary(tokenizer: BloomTokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    source = _Source(tokenizer)
    wrapper = TokenizerWrapper(source)
    with library_errors("the vocabulary cannot be compiled"):
        vocabulary = LLTokenizer(wrapper)
    wrapper.tokens = source.tokens = []  # llguidance has its own: 12 MB of 250,680 tokens
    return vocabulary


def _start(vocabulary: LLTokenizer, constraint: AnyConstraint) -> LLMatcher:
    """llguidance's matcher at the beginning, with its first mask computed. Raises: UsageError."""

    def work() -> LLMatcher:
        from llguidance import LLMatcher

        start = LLMatcher(vocabulary, constraint.definition(), log_level=0, limits=limits())
        start.compute_bitmask()
        return start

    start = compiled("the constraint", work)
    if start.is_error():
        raise UsageError(f"the constraint cannot be followed: {reason(start.get_error())}")
    return start
