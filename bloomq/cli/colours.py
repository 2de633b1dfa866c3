"""Tokens in the colour of their probability, for `--show-probs`.

On a terminal, from blue (likely) over violet to orange, underlined (hardly likely): hues of middle
lightness, at least 3:1 against black and against white, and told apart without red or green. Where
there are no colours (a pipe, NO_COLOR, TERM=dumb) a token is followed by its probability in
brackets: ` upon[0.98]`.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import click

from bloomq import console

if TYPE_CHECKING:
    from bloomq.generation import Piece

# From this probability on, the colour of the 256 and whether it is underlined.
SCALE = (
    (0.9, 33, False),
    (0.5, 99, False),
    (0.2, 163, False),
    (0.05, 161, False),
    (0.0, 166, True),
)


def colours_shown() -> bool:
    """Does standard output show colours?"""
    return console.colours_shown(sys.stdout)


def coloured(text: str, probability: float) -> str:
    """A text in the colour of a probability, 0 to 1."""
    at = next(((c, u) for least, c, u in SCALE if probability >= least), SCALE[-1][1:])
    return click.style(text, fg=at[0], underline=at[1] or None) if text else ""


def bracketed(text: str, probability: float) -> str:
    """A text followed by its probability, which line ends stay behind."""
    body = text.rstrip("\n")
    return f"{body}[{probability:.2f}]{text[len(body) :]}" if text else ""


def legend() -> str:
    """What the colours mean, in a line."""
    words = ["90% and more", "50%", "20%", "5%", "less"]
    return "probability: " + "  ".join(
        coloured(word, least) for word, (least, _, _) in zip(words, SCALE, strict=True)
    )


class Painter:
    """Pieces of a stream -> their text with probabilities shown.

    Text may come later than its tokens (a character in several of them, what may begin a stop
    string): it has the product of the probabilities of all that it waited for.
    """

    def __init__(self, colours: bool) -> None:
        self._paint = coloured if colours else bracketed
        self._waiting = 0.0  # log of a probability

    def paint(self, piece: Piece) -> str:
        """The text that a piece makes certain."""
        self._waiting += piece.logprob
        if not piece.text:
            return ""
        shown = self._paint(piece.text, math.exp(min(0.0, self._waiting)))
        self._waiting = 0.0
        return shown

    def rest(self, text: str) -> str:
        """What was held back when the stream ended."""
        return self._paint(text, math.exp(min(0.0, self._waiting)))
