"""A text cut into windows: how the protocols of published perplexities do it, and what windows as
samples say of the whole.
"""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bloomq.checks import is_whole
from bloomq.errors import UsageError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
WindowProtocol = Literal["fixed", "sliding", "gptq"]
GPTQ_WINDOW = 2048  # of the published figures. Source: IST-DASLab/gptq, bloom.py: model.seqlen


def window_tokens(protocol: WindowProtocol, window: int | None, context: int) -> int:
    """Of a window, of which `context` is the most. Raises: UsageError."""
    if window is None:
        return min(GPTQ_WINDOW, context) if protocol == "gptq" else context
    if not is_whole(window) or not 2 <= window <= context:
        raise UsageError(
            f"window is {window!r}, expected 2 to {context} tokens: load with a larger context for "
            "longer ones"
        )
    return int(window)


def stride_tokens(protocol: WindowProtocol, stride: int | None, window: int) -> int:
    """From the start of a window to that of the next. Raises: UsageError."""
    if protocol != "sliding":
        if stride is not None:
            raise UsageError(
                f"stride is {stride!r} with {protocol} windows, which have none: leave it out, or "
                "choose sliding ones"
            )
        return window
    if stride is None:
        return max(1, window // 2)
    if not is_whole(stride) or not 1 <= stride <= window:
        raise UsageError(f"stride is {stride!r}, expected 1 to {window}, the window's tokens")
    return int(stride)


def plan(
    length: int, window: int, stride: int, protocol: WindowProtocol
) -> list[tuple[int, int, int]]:
    """(begin, end, first of it that is scored) of each window of a text of `length` tokens.

    Raises: UsageError for a text that is too short.
    """
    if protocol == "gptq" and length < window:
        raise UsageError(
            f"the text has {_tokens(length)}, expected a whole window of {window}: set a smaller "
            "one"
        )
    if length < 2:
        raise UsageError(
            f"the text has {_tokens(length)}, expected 2 or more: the first is context"
        )
    windows, scored = [], 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        whole = end - begin == window or protocol != "gptq"
        if whole and end - max(scored, begin + 1) > 0:
            windows.append((begin, end, max(scored - begin, 1)))
        scored = end
        if end == length:
            break
    return windows


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def gptq_text(text: str) -> str:
    """A file's text as the figures of the GPTQ paper take it: its lines, of which those of white
    space are empty, with two line ends between them beside their own.

    Source: IST-DASLab/gptq, datautils.py: "\\n\\n".join(testdata["text"]); huggingface/datasets,
    wikitext.py: what an element is.
    """
    lines = io.StringIO(text, newline=None)
    return "\n\n".join(line if line.strip() else "" for line in lines)


def mean_of_windows(sums: F64, counts: I64) -> tuple[float, float]:
    """The mean over tokens, from each window's sum and number of them, and its standard error: of a
    ratio of two means over windows, which are taken as independent; NaN of one window."""
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return mean, math.nan
    spread = float(np.square(sums - mean * counts).sum())
    return mean, math.sqrt(spread * n / (n - 1)) / float(counts.sum())
