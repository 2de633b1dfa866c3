"""From prompts to tokens to text: the loop, and what comes out of it."""

from bloomq.generation.engine import MOST_ROWS, Engine
from bloomq.generation.reading import Piece, PrefillProgress, Reader, read, read_each
from bloomq.generation.results import Alternatives, Clock, FinishReason, Generation, Stats, Token
from bloomq.generation.sequence import Request, Sequence, Window, check_prompts

__all__ = [
    "MOST_ROWS", "Alternatives", "Clock", "Engine", "FinishReason", "Generation", "Piece",
    "PrefillProgress", "Reader", "Request", "Sequence", "Stats", "Token", "Window",
    "check_prompts", "read", "read_each",
]  # fmt: skip
