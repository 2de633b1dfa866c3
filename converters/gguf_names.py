"""What GGUF calls BLOOM's tensors, and the order in which it has the rows of q, k and v."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Ours -> GGUF's. Source: llama.cpp, gguf-py/gguf/constants.py, MODEL_ARCH.BLOOM.
_GGUF = {
    "wte": "token_embd",
    "emb_ln": "token_embd_norm",
    "ln_1": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.out": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "ln_f": "output_norm",
    "lm_head": "output",
}
_OURS = {theirs: ours for ours, theirs in _GGUF.items()}
_LAYER, _BLOCK = re.compile(r"h\.(\d+)\.(.+)"), re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


def gguf_name(name: str) -> str:
    """`h.3.attn.qkv.bias` -> `blk.3.attn_qkv.bias`."""
    stem, _, leaf = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    if layer:
        return f"blk.{layer[1]}.{_GGUF[layer[2]]}.{leaf}"
    return f"{_GGUF[stem]}.{leaf}"


def our_name(name: str) -> str | None:
    """`blk.3.attn_qkv.bias` -> `h.3.attn.qkv.bias`; None for a tensor that BLOOM has not."""
    stem, _, leaf = name.rpartition(".")
    block = _BLOCK.fullmatch(stem)
    ours = _OURS.get(block[2] if block else stem)
    inside = ours is not None and ("." in ours or ours in ("ln_1", "ln_2"))
    if ours is None or leaf not in ("weight", "bias") or inside != bool(block):
        return None
    return f"h.{block[1]}.{ours}.{leaf}" if block else f"{ours}.{leaf}"


def gguf_runs(start: int, stop: int, n_head: int, head_dim: int) -> Iterator[tuple[int, int]]:
    """The rows of GGUF, run by run, that are rows start..stop of BLOOM's fused q, k and v.

    BLOOM has them as [H, 3, D], llama.cpp's converter puts them as [3, H, D]. So a run is of at
    most D rows.
    """
    while start < stop:
        head, part = divmod(start // head_dim, 3)
        first = (part * n_head + head) * head_dim + start % head_dim
        count = min(stop - start, head_dim - start % head_dim)
        yield first, first + count
        start += count


def bloom_rows(n_head: int, head_dim: int) -> NDArray[np.int64]:
    """[3 H D]: which row of BLOOM's fused q, k and v each row of GGUF's is."""
    rows = np.arange(3 * n_head * head_dim).reshape(n_head, 3, head_dim)
    return np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1)
