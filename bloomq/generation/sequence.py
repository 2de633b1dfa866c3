"""One sequence: what is asked for, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import BloomqError, CapacityError, UsageError
from bloomq.generation.results import Clock, FinishReason, Stats, Token
from bloomq.generation.rows import Kept
from bloomq.layers import PAGE_TOKENS
from bloomq.sampling import Constraint, Sampler
from bloomq.speculation import Guesser, Pace

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Window:
    """Which tokens a long text keeps in view: the first `sinks` and the latest, `tokens` in all.

    Whole pages of 64 tokens leave, the oldest behind the sinks first, and those that stay move
    together: BLOOM's keys carry no position. What a token sees depends on its place alone.
    Source: StreamingLLM (arXiv 2309.17453), whose sinks are 4 tokens.

    Raises: UsageError for what is no multiple of 64, or leaves no page to move.
    """

    tokens: int
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("tokens", self.tokens, 2), ("sinks", self.sinks, 0)):
            if not is_whole(value) or value < least * PAGE_TOKENS or value % PAGE_TOKENS:
                raise UsageError(
                    f"a window with {name} = {value!r}, expected a multiple of {PAGE_TOKENS} from "
                    f"{least * PAGE_TOKENS}"
                )
        if self.sinks > self.tokens - 2 * PAGE_TOKENS:
            raise UsageError(
                f"a window of {self.tokens} tokens with {self.sinks} sinks, expected "
                f"{2 * PAGE_TOKENS} more tokens than sinks"
            )

    def dropped(self, position: int) -> int:
        """How many tokens are gone when the token at `position` runs."""
        return max(0, -(-(position + 1 - self.tokens) // PAGE_TOKENS) * PAGE_TOKENS)

    def room(self, position: int) -> int:
        """How many tokens from `position` on run before others must leave."""
        return self.tokens + self.dropped(position) - position


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for. ends: tokens that end the text; constraint: the sampler's; guesser: makes
    who guesses its tokens, when it begins; gates: [ranks], of its adapters (see `lora`), None: of
    none; top_logprobs: alternatives of each token."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampler: Sampler
    ends: tuple[int, ...] = ()
    guesser: Callable[[], Guesser] | None = None
    constraint: Constraint | None = None
    gates: F32 | None = None
    top_logprobs: int = 0
    window: Window | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way.

    beginning: its prompt, as rows know texts; row: of the cache, once there is one for it; read:
    tokens of the prompt that the row has had; dropped: tokens that left its window; reused: of the
    prompt, which the row held before; taken: of the tokens produced, how many the reader has.
    """

    request: Request
    beginning: Kept
    row: int | None = None
    guesser: Guesser | None = None
    read: int = 0
    dropped: int = 0
    reused: int = 0
    produced: list[Token] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # of those produced
    taken: int = 0
    reason: FinishReason | None = None
    error: BloomqError | None = None
    clock: Clock = field(default_factory=Clock)
    pace: Pace = field(default_factory=Pace)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt

    @property
    def shared(self) -> Kept:
        """What others may take from its row: nothing where tokens may leave it on the way."""
        return self.beginning if self.request.window is None else self.beginning.with_ids(())

    @property
    def place(self) -> int:
        """The row of one that is under way."""
        assert self.row is not None
        return self.row

    def enter(self, row: int, held: int) -> None:
        """Begin in a row that holds so many tokens of the prompt."""
        self.read = self.reused = held
        self.clock = Clock()
        self.row = row

    @property
    def held(self) -> int:
        """Tokens whose keys and values are there, those that left the window included: all but the
        last that was produced."""
        return len(self.prompt) + len(self.produced) - 1 if self.produced else self.read

    @property
    def wants(self) -> int:
        """How many of the best tokens of a place are asked for at once."""
        return max(self.request.sampler.wants, self.request.top_logprobs)

    @property
    def is_awaited(self) -> bool:
        """Has the reader all there is, so that it may want more?"""
        return self.taken == len(self.produced)

    @property
    def is_ready(self) -> bool:
        """Is there something for the reader?"""
        return not self.is_awaited or self.has_ended

    @property
    def has_ended(self) -> bool:
        return self.reason is not None or self.error is not None

    def produce(self, token: Token) -> None:
        """The next token is there; it may be the last."""
        request = self.request
        self.produced.append(token)
        self.ids.append(token.id)
        self.clock.tick()
        if token.id in request.ends:
            self.reason = "eos"
        elif request.constraint is not None and request.constraint.ended:
            self.reason = "stop"
        elif len(self.ids) == request.max_new_tokens:
            self.reason = "length"

    def take(self) -> Token | None:
        """The next token that the reader has not got; None: there is none yet, or the sequence has
        ended. Raises: what ended it."""
        if self.taken < len(self.produced):
            self.taken += 1
            return self.produced[self.taken - 1]
        if self.error is not None:
            raise self.error
        return None

    def stop(self) -> None:
        """Take part in no further step. The engine gives the row to others when it next looks."""
        self.reason = self.reason or "interrupted"

    def stats(self, load_s: float) -> Stats:
        return Stats(
            len(self.prompt), self.taken, self.clock.prompt_s, self.clock.generate_s, load_s,
            self.pace.guessed, self.pace.right, self.reused,
        )  # fmt: skip


def check_request(prompt: Items[int], new_tokens: Any, context: int, windowed: bool) -> int:
    """The number of new tokens as Python's. Raises: UsageError for an empty prompt or no new
    tokens, CapacityError where both together exceed the context and no window keeps them in it."""
    if not is_whole(new_tokens) or new_tokens < 1:
        raise UsageError(f"max_new_tokens is {new_tokens!r}, expected at least 1")
    count = int(new_tokens)  # NumPy's kinds wrap around
    if not len(prompt):
        raise UsageError("the prompt is empty: BLOOM needs at least one token to continue from")
    if len(prompt) + count > context and not windowed:
        room = context - len(prompt)
        remedy = f"ask for at most {room} new tokens" if room > 0 else "shorten it"
        raise CapacityError(
            f"a prompt of {len(prompt)} tokens and {count} new ones exceed the context of "
            f"{context}: {remedy}, load with a larger context, or give a window"
        )
    return count


def check_prompts(prompts: Items[Items[int]], new_tokens: Any, context: int) -> int:
    """`check_request` of several, of which there must be one."""
    if not len(prompts):
        raise UsageError("no prompts: give at least one")
    return max(check_request(prompt, new_tokens, context, False) for prompt in prompts)
