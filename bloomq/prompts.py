"""Prompts as callers give them: text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bloomq.errors import UsageError

Prompt = str | Sequence[int]


def is_ids(prompt: object) -> bool:
    """Is this one prompt of token ids: whole numbers in a list, tuple or one-dimensional array?"""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and prompt.dtype.kind in "iu"
    if not isinstance(prompt, list | tuple):
        return False
    return all(isinstance(t, int | np.integer) and not isinstance(t, bool) for t in prompt)


def several(prompts: object) -> list[Any]:
    """Several prompts, as a list. Raises: UsageError for what is neither one nor several."""
    if isinstance(prompts, list | tuple) or (isinstance(prompts, np.ndarray) and prompts.ndim):
        return list(prompts)
    raise UsageError(f"prompt is {prompts!r:.80}, expected text, token ids, or a list of either")
