"""A conversation with a model: messages, and answers that stream.

    talk = bloomq.Conversation(bloomq.load())
    for piece in talk.say("Bonjour !"):
        print(piece.text, end="")

Invariant: messages are a system's, if any, then a user's and an assistant's in turn. What cannot be
answered leaves them as they were; an answer that is broken off is kept as far as it came.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Literal

from bloomq.chat.answer import Answer
from bloomq.chat.stored import USUAL_NEW_TOKENS, Stored, from_json, read, to_json
from bloomq.chat.styles import Template, find_template, is_named
from bloomq.checks import is_whole
from bloomq.constraints import AnyConstraint
from bloomq.errors import CapacityError, PackError, UsageError
from bloomq.files import as_path, write_whole
from bloomq.language_model import LanguageModel
from bloomq.lora import Choices
from bloomq.sampling import Sampling
from bloomq.text import stop_strings

Message = dict[str, str]
_ROOM = 4  # when old turns must go, a quarter of the context goes with them: see `_prompt`


class Conversation:
    """Talks to a model, which answers with what went before in mind.

    template: "bloomz", "belle", "alpaca", a Jinja file, or the name of one of the model's own
    templates; None: the model's own, "bloomz" where it has none. system: what stands before all
    turns. max_new_tokens: of an answer, None for 256, or half the context if that is less. stop:
    texts that an answer ends before, in place of those that the template has. constraint, draft,
    adapters: see `LanguageModel.generate`. When the context is full the oldest turns are left out
    of the prompt, not of `messages`.

    Raises: PackError for a model without a tokenizer, UsageError, TokenizerError.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        template: str | os.PathLike[str] | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        constraint: AnyConstraint | None = None,
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
    ) -> None:
        if not isinstance(model, LanguageModel):
            raise UsageError(
                f"the model is {model!r:.40}, expected a LanguageModel: load one with bloomq.load()"
            )
        if sampling is not None and not isinstance(sampling, Sampling):
            raise UsageError(f"sampling is {sampling!r:.80}, expected a bloomq.Sampling")
        if system is not None and not isinstance(system, str):
            raise UsageError(f"the system's message is {system!r:.40}, expected text or None")
        if model.tokenizer is None:
            raise PackError(f"{model.pack.path}: has no tokenizer.json: it cannot talk")
        self.model, self._draft, self._adapters = model, draft, adapters
        self._constraint = constraint
        self.template: Template = find_template(template, model.tokenizer)
        self.sampling = Sampling() if sampling is None else sampling
        self.max_new_tokens = self.usual_new_tokens
        self.stop: tuple[str, ...] = ()
        self.set(max_new_tokens=max_new_tokens, stop=stop)
        self._settled: list[Message] = []
        self._answer: Answer | None = None
        self._dropped = 0  # messages that the context has no room for, behind the system's
        self._tries = 0  # of the last answer
        self.system = system

    @property
    def usual_new_tokens(self) -> int:
        """max_new_tokens where nothing else is said."""
        return min(USUAL_NEW_TOKENS, self.model.context // 2)

    def set(
        self, *, max_new_tokens: int | None = None, stop: str | Sequence[str] | None = None
    ) -> None:
        """Change how answers end; None leaves a value as it is. Raises: UsageError."""
        if max_new_tokens is not None:
            if not is_whole(max_new_tokens) or not 1 <= max_new_tokens < self.model.context:
                raise UsageError(
                    f"max_new_tokens is {max_new_tokens!r}, expected 1 to "
                    f"{self.model.context - 1}, so that the context holds a prompt too"
                )
            self.max_new_tokens = int(max_new_tokens)
        if stop is not None:
            self.stop = stop_strings(stop)

    @property
    def messages(self) -> list[Message]:
        """Copies of all messages, the answer under way too, as far as it came."""
        now = [] if self._answer is None else [_message("assistant", self._answer.text)]
        before = [] if self.system is None else [_message("system", self.system)]
        return [*before, *map(dict, self._settled), *now]

    def say(self, text: str) -> Answer:
        """The answer to a message: iterate over it, to the end or as far as you like.

        Raises: UsageError, CapacityError where the message alone exceeds the context,
        TokenizerError where the template refuses it.
        """
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"the message is {text!r:.40}, expected some text")
        before = self._turns()
        answer = self._start([*before, _message("user", text)], 0)
        self._settled, self._answer = [*before, _message("user", text)], answer
        self._tries = 0
        return answer

    def regenerate(self) -> Answer:
        """Another answer to the last message; with a seed, from the next one.

        Raises: UsageError where nothing was said yet.
        """
        before = self._before_answer("answer again")
        answer = self._start(before, self._tries + 1)
        self._settled, self._answer = before, answer
        self._tries += 1
        return answer

    def edit(self, text: str) -> Answer:
        """The answer to another message in place of the last one. Raises: as `say`."""
        turns, answer = self._turns(), self._answer
        settled = self._settled
        self._settled, self._answer = self._before_answer("edit")[:-1], None
        try:
            return self.say(text)
        except BaseException:
            self._settled, self._answer = (settled, answer) if answer else (turns, None)
            raise

    def undo(self) -> str:
        """Forget the last message and its answer; the message. Raises: UsageError without one."""
        *rest, message = self._before_answer("undo")
        self._settled, self._answer = rest, None
        self._dropped = min(self._dropped, len(rest))
        return message["content"]

    def clear(self) -> None:
        """Forget all turns; the system's message stays."""
        self._settled, self._answer, self._dropped, self._tries = [], None, 0, 0

    def fork(self) -> Conversation:
        """Another conversation with the same past, and a future of its own."""
        other = copy(self)
        other._settled, other._answer = self._turns(), None
        return other

    def prompt_tokens(self) -> int:
        """How many tokens the next prompt begins with: all messages, or those there is room for."""
        turns = self._turns()
        return len(self._ids(turns, self._dropped)) if turns or self.system is not None else 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and settings as JSON, whole or not at all; replaces a saved conversation.
        Of the template the name, if it has one that models share; not that of a file.

        Raises: UsageError; OutputError, also where another file has that name.
        """
        template = self.template.name if self.keeps_template else None
        stored = Stored(self.messages, self.sampling, self.max_new_tokens, self.stop, template)
        write_whole(as_path(path), to_json(stored, as_path(path)))

    @property
    def keeps_template(self) -> bool:
        """Does a saved conversation name its template?"""
        tokenizer = self.model.tokenizer
        return tokenizer is not None and is_named(self.template.name, tokenizer)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take messages and settings from a file that `save` wrote; after an error all is as it
        was. The template stays: a UserWarning says where the file names another.

        Raises: InputNotFound, UsageError naming the file and what is wrong in it.
        """
        stored = from_json(read(as_path(path)), str(path))
        most = min(stored.max_new_tokens, self.model.context - 1)  # of a larger context, perhaps
        self.set(max_new_tokens=most, stop=stored.stop)
        self.clear()
        self.sampling = stored.sampling
        first = stored.messages[:1]
        has_system = bool(first) and first[0]["role"] == "system"
        self.system = first[0]["content"] if has_system else None
        self._settled = stored.messages[has_system:]
        if stored.template not in (None, self.template.name):
            warnings.warn(
                f"{path}: was saved with the template {stored.template}, and goes on with "
                f"{self.template.name}",
                stacklevel=2,
            )

    @classmethod
    def load(
        cls,
        model: LanguageModel,
        path: str | os.PathLike[str],
        *,
        template: str | os.PathLike[str] | None = None,
        draft: LanguageModel | Literal["lookup"] | None = None,
        adapters: Choices = None,
    ) -> Conversation:
        """A saved conversation, to go on with. Raises: as `restore`, and as the class."""
        made = cls(model, template=template, draft=draft, adapters=adapters)
        made.restore(path)
        return made

    def _turns(self) -> list[Message]:
        """All but the system's, the last answer as it is now."""
        return self.messages[self.system is not None :]

    def _before_answer(self, what: str) -> list[Message]:
        """The turns up to the last message of the user's. Raises: UsageError without one."""
        turns = self._turns()
        if not turns:
            raise UsageError(f"there is nothing to {what}: nothing was said yet")
        return turns[:-1]

    def _start(self, turns: list[Message], tries: int) -> Answer:
        ids = self._prompt(turns)
        text = self.model.tokenizer.decode(ids[-4:]) if self.model.tokenizer else ""
        sampling = self.sampling
        if sampling.seed is not None and tries:
            sampling = replace(sampling, seed=sampling.seed + tries)
        stream = self.model.stream(
            ids, max_new_tokens=self.max_new_tokens, sampling=sampling,
            stop=self.stop or self.template.stop, stop_ids=self.template.ends,
            constraint=self._constraint, draft=self._draft, adapters=self._adapters,
        )  # fmt: skip
        return Answer(stream, not text[-1:].isspace())

    def _prompt(self, turns: list[Message]) -> list[int]:
        """The ids of the latest turns that leave room for an answer.

        Where some must go, more go than need to: a prompt that begins elsewhere is read anew, and
        so that happens once in many turns. Raises: CapacityError.
        """
        ids = self._ids(turns, self._dropped)
        room = self.model.context - self.max_new_tokens
        if len(ids) <= room:
            return ids
        wanted = max(1, room - self.model.context // _ROOM)
        for dropped in range(self._dropped + 2, len(turns), 2):  # a message and its answer
            ids = self._ids(turns, dropped)
            if len(ids) <= wanted:
                break
        else:
            dropped = len(turns) - 1
            ids = self._ids(turns, dropped)
        if len(ids) > room:
            raise CapacityError(
                f"a message of {len(ids)} tokens and {self.max_new_tokens} new ones exceed the "
                f"context of {self.model.context}: shorten it"
            )
        self._dropped = dropped
        return ids

    def _ids(self, turns: list[Message], dropped: int) -> list[int]:
        before = [] if self.system is None else [_message("system", self.system)]
        return self.model.prompt_ids(self.template.prompt([*before, *turns[dropped:]]))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
