"""Text that a model, or chance, writes under a constraint, by a plain loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bloomq.constraints import AnyConstraint
from bloomq.constraints.matching import Compiler, Matcher
from bloomq.language_model import LanguageModel
from bloomq.layers import Span
from bloomq.tokenizer import BloomTokenizer

END = 2
HURRY = 40  # tokens after which a text is closed where it can be
CLOSING = ('"', "}", "]", ")", "Z", ":", ",", "0")  # the best first


class Writer:
    """Writes with the demo model; `by_chance` without any model."""

    def __init__(self, model: LanguageModel) -> None:
        assert model.tokenizer is not None
        self.head, self.tokenizer = model.head, model.tokenizer
        self.compiler = Compiler(model.tokenizer, model.config.vocab_size)
        self.prompt = model.tokenizer.encode("The answer: ")
        self._closing = closing(model.tokenizer)

    def __call__(self, constraint: AnyConstraint, seed: int | None, most: int = 200) -> str:
        """seed: of draws at temperature 1; None: the likeliest token that is allowed."""
        matcher, rng = self.compiler.matcher(constraint, (END,)), np.random.default_rng(seed)
        cache, fresh, ids = self.head.cache(1, len(self.prompt) + most), self.prompt, []
        while not matcher.ended and len(ids) < most:
            span, last = Span.of([0], [len(fresh)]), np.array([len(fresh) - 1])
            logits = self.head.step(np.array(fresh, np.int64), cache, span, last)
            row = self.head.backend.numpy(logits)[0].astype(np.float64)
            row = np.where(matcher.allowed(), row, -np.inf)
            if seed is not None:
                row += rng.gumbel(size=len(row))
            token = int(row.argmax())
            if len(ids) > HURRY:
                token = preferred(matcher, self._closing, token)
            matcher.accept(token)
            fresh = [token]
            ids += fresh
        assert matcher.complete, self.tokenizer.decode(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def by_chance(self, constraint: AnyConstraint, seed: int, most: int = 300) -> str:
        """Any allowed token is as likely as any other."""
        matcher, rng = self.compiler.matcher(constraint, (END,)), np.random.default_rng(seed)
        ids: list[int] = []
        while not matcher.ended and len(ids) < most:
            token = drawn(matcher, rng)
            if len(ids) > HURRY:
                token = preferred(matcher, self._closing, token)
            matcher.accept(token)
            ids.append(token)
        assert matcher.complete, self.tokenizer.decode(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def takes(self, constraint: AnyConstraint, text: str) -> bool:
        """Would this text, in its usual tokens, be let through as a whole?"""
        matcher = self.compiler.matcher(constraint, (END,))
        for token in self.tokenizer.encode(text):
            if not matcher.allowed()[token]:
                return False
            matcher.accept(token)
        return matcher.complete


def closing(tokenizer: BloomTokenizer) -> NDArray[np.int64]:
    """Tokens that bring a text nearer to its end."""
    return np.array([END, *(tokenizer.encode(text)[0] for text in CLOSING)])


def drawn(matcher: Matcher, rng: np.random.Generator) -> int:
    """Any allowed token."""
    return int(rng.choice(np.flatnonzero(matcher.allowed())))


def preferred(matcher: Matcher, tokens: NDArray[np.int64], other: int) -> int:
    """The first of some tokens that is allowed, else another one."""
    allowed = matcher.allowed()[tokens]
    return int(tokens[allowed.argmax()]) if allowed.any() else other
