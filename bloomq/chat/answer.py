"""One answer of a model's, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bloomq.generation import Generation, Piece
from bloomq.language_model import Stream


class Answer:
    """An iterator over the pieces of one answer. `text` is what came so far, also after Ctrl-C;
    `generation` has its tokens and times, and the text as the model wrote it."""

    def __init__(self, stream: Stream, spaced: bool) -> None:
        self._stream, self._spaced = stream, spaced
        self._handed_out = 0  # characters, as the model wrote them

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = next(self._stream)
        self._handed_out += len(piece.text)
        if self._spaced and self._handed_out == len(piece.text):  # the first text
            return replace(piece, text=piece.text.removeprefix(" "))
        return piece

    @property
    def generation(self) -> Generation:
        return self._stream.generation

    @property
    def rest(self) -> str:
        """What no piece had when the iteration ended: text that might have begun a stop string."""
        return self.generation.text[self._handed_out :]

    @property
    def text(self) -> str:
        """Without the line ends around it, and the space that parts it from the prompt's end."""
        text = self.generation.text
        return (text.removeprefix(" ") if self._spaced else text).strip("\n")
