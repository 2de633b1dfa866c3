"""Attention with ALiBi over a cache on a device.

    out[i] = sum over keys j <= position of i:  softmax_j(q_i . k_j / sqrt(D) + slope * (j - i)) v_j

Two ways: rows that get one token are read together, in shapes that no length decides, so that a
step can be recorded (`decode`; on a GPU with Triton by a kernel that reads each row's own keys and
no others); a row that gets several goes through torch's scaled dot product attention, in blocks of
queries (`prefill`), whose softmax is float32 whatever it multiplies in.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from bloomq.backends.cuda.buffers import Layer, by_row
from bloomq.backends.cuda.cache import Held
from bloomq.backends.cuda.places import Ones, Piece, Places
from bloomq.backends.cuda.products import on_device_of
from bloomq.layers import Attention, Span, slopes
from bloomq.schemes import round_up

F32 = NDArray[np.float32]
# Biases that a block of queries has at once, [H, t, S]: 128 MiB in float16. With 32 heads that is
# 256 queries behind 8,192 keys, with the 112 of the 176B 64 of them.
BLOCK_BIASES = 1 << 26
BLOCK_KEYS = 1 << 26  # components of keys that `decode` restores at once: 256 MiB in float32
WIDE = 16  # biases of a query begin at multiples of it: else torch copies them before its kernels


def attention(
    layer: int, n_head: int, head_dim: int, device: torch.device, *, slope: F32 | None = None
) -> Attention:
    """A layer's attention: qkv [M, H * 3 * D] -> [M, H * D] in the dtype of qkv.

    slope: ALiBi's of each head, where these are some of a model's; None: `slopes`.
    """
    steep = torch.from_numpy(np.array(slopes(n_head) if slope is None else slope)).to(device)

    def call(qkv: Any, cache: Held, span: Span) -> torch.Tensor:
        split = torch.as_tensor(qkv, device=device).reshape(-1, n_head, 3, head_dim)
        places, held = cache.places(span), cache.layers[layer]
        ones = places.ones
        if ones is not None and ones.at is None:
            out = one_each(split, held, places, ones, steep)
        else:
            out = torch.empty_like(split[:, :, 0])  # [M, H, D]
            if ones is not None:
                out[ones.at] = one_each(split[ones.at], held, places, ones, steep)
            for piece in places.pieces:
                part = slice(piece.start, piece.stop)
                out[part] = several(split[part], held, places, piece, steep)
        return out.reshape(-1, n_head * head_dim)

    return call


def one_each(
    split: torch.Tensor, held: Layer, places: Places, ones: Ones, slope: torch.Tensor
) -> torch.Tensor:
    """Queries, keys and values [R, H, 3, D] of one token for each row; stores them -> [R, H, D]."""
    if reads_own_keys(held):
        from bloomq.backends.cuda.triton_attention import decode_attention

        with on_device_of(split):
            out: torch.Tensor = decode_attention(
                split.reshape(len(split), -1), held.codes, held.scales, ones.rows, ones.lengths,
                slope, capacity=places.capacity, out_dtype=split.dtype,
            ).view_as(split[:, :, 0])  # fmt: skip
        return out
    held.store(places.slots if ones.at is None else places.slots[ones.at], both_of(split))
    return decode(query_of(split), held, places, ones, slope).to(split.dtype)


def several(
    split: torch.Tensor, held: Layer, places: Places, piece: Piece, slope: torch.Tensor
) -> torch.Tensor:
    """Queries, keys and values [T, H, 3, D] of a row's new tokens; stores them -> [T, H, D]."""
    held.store(places.slots[piece.start : piece.stop], both_of(split))
    return prefill(query_of(split), held, places, piece, slope).to(split.dtype)


def query_of(split: torch.Tensor) -> torch.Tensor:
    """[M, H, 3, D] -> q / sqrt(D), float32 [M, H, D]; what it is multiplied in may be narrower."""
    return split[:, :, 0].float() * (1 / math.sqrt(split.shape[-1]))


def both_of(split: torch.Tensor) -> torch.Tensor:
    """[M, H, 3, D] -> keys and values [2, M, H, D]."""
    return split[:, :, 1:].permute(2, 0, 1, 3)


def reads_own_keys(held: Layer) -> bool:
    """Is there a kernel that reads of each row its own keys and no others? Then no length, and not
    which rows they are, is any part of a recorded step."""
    if not held.by_triton:
        return False
    from bloomq.backends.cuda.triton_attention import takes_heads

    return takes_heads(held.codes.shape[-1], held.codes.dtype)


# -- one token a row -------------------------------------------------------------------------------


def decode(
    q: torch.Tensor, held: Layer, places: Places, ones: Ones, slope: torch.Tensor
) -> torch.Tensor:
    """Queries [R, H, D], already divided by sqrt(D), one for each row -> float32 [R, H, D].

    Rows are taken so many at once that the restored keys stay within BLOCK_KEYS. Bytes touched:
    of every row the keys and values of `reach` tokens, several times.
    """
    codes = by_row(held.codes, places.batch, places.capacity)[:, :, : ones.reach]
    scales = held.scales
    if scales.numel():
        scales = by_row(scales, places.batch, places.capacity)[:, :, : ones.reach]
    at_once = max(1, BLOCK_KEYS // (ones.reach * q[0].numel()))
    parts = []
    for start in range(0, len(q), at_once):
        some = slice(start, min(start + at_once, len(q)))
        which = some if ones.in_order else ones.rows[some]
        both = held.restored(
            codes[:, which], scales[:, which] if scales.numel() else scales, torch.float32
        )  # [2, R, S, H, D]
        parts.append(mix(q[some], both[0], both[1], ones.lengths[some], slope))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mix(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor,
    slope: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """softmax(q . k + slope * (key position - query position)) @ v over each row's first keys; 0
    for a row of length 0.

    q float32 [R, H, D], keys and values float32 [R, S, H, D], lengths int64 [R] (the query's
    position is the last), slope float32 [H] -> float32 [R, H, D].
    """
    at = torch.arange(keys.shape[1], device=q.device)
    seen = at < lengths[:, None]  # [R, S]
    distance = (at - (lengths[:, None] - 1)).float()  # [R, S]
    scores = torch.einsum("rhd,rshd->rhs", q, keys) + slope[:, None] * distance[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True)
    # A row that sees nothing has no peak to subtract; what it sums up is 0, by which none divides.
    peak = peak.masked_fill((lengths == 0)[:, None, None], 0)
    powers = torch.exp(scores - peak)
    total = powers.sum(dim=-1, keepdim=True)
    weights = powers / total.masked_fill((lengths == 0)[:, None, None], 1)  # [R, H, S]
    # What a longer text has left behind, NaN perhaps, is not weighed with 0 but is 0.
    kept = values.masked_fill(~seen[:, :, None, None], 0)
    return torch.einsum("rhs,rshd->rhd", weights, kept)


# -- several tokens of a row -----------------------------------------------------------------------


def prefill(
    q: torch.Tensor, held: Layer, places: Places, piece: Piece, slope: torch.Tensor
) -> torch.Tensor:
    """Queries [T, H, D] of a row's new tokens, already divided by sqrt(D) -> float32 [T, H, D].

    Work space: BLOCK_BIASES biases, and the row's keys and values restored.
    """
    total = piece.past + len(q)
    slots = slice(piece.row * places.capacity, piece.row * places.capacity + total)
    scales = held.scales[:, slots] if held.scales.numel() else held.scales
    kind = multiplied_in(q, held)
    both = held.restored(held.codes[:, slots], scales, kind)  # [2, S, H, D]
    keys, values = both.transpose(1, 2)[:, None]  # [1, H, S, D]
    out = torch.empty_like(q)
    block = queries_at_once(q.shape[1], total)
    for start in range(0, len(q), block):
        stop = min(start + block, len(q))
        seen = piece.past + stop
        out[start:stop] = scaled_dot_product_attention(
            q[start:stop].to(kind).transpose(0, 1)[None], keys[:, :, :seen], values[:, :, :seen],
            attn_mask=biases(slope, piece.past + start, stop - start, kind), scale=1.0,
        )[0].transpose(0, 1)  # fmt: skip
    return out


def multiplied_in(q: torch.Tensor, held: Layer) -> torch.dtype:
    """float16 on a GPU whose cache holds no more than that, else float32."""
    narrow = q.is_cuda and held.codes.dtype != torch.float32
    return torch.float16 if narrow else torch.float32


def queries_at_once(n_head: int, keys: int) -> int:
    """How many queries have biases for `keys` keys within BLOCK_BIASES: a multiple of 64 if that is
    possible, as kernels take them."""
    fitting = BLOCK_BIASES // (n_head * round_up(keys, WIDE))
    return max(1, fitting // 64 * 64 or fitting)


def biases(slope: torch.Tensor, first: int, count: int, kind: torch.dtype) -> torch.Tensor:
    """slope * (key position - query position) for queries first .. first + count and all keys up to
    the last, -inf for those behind a query: [1, H, count, first + count].

    float16 rounds them by 2^-11 of themselves: 4e-3 where a weight has shrunk to e^-8, and nothing
    near the query.
    """
    keys = first + count
    at = torch.arange(round_up(keys, WIDE), device=slope.device)
    distance = (at - torch.arange(first, keys, device=slope.device)[:, None]).float()  # [t, S]
    distance.masked_fill_(distance > 0, -torch.inf)
    bias = torch.empty(len(slope), *distance.shape, dtype=kind, device=slope.device)
    torch.mul(slope[:, None, None], distance, out=bias)  # [H, t, S], rounded as it is written
    return bias[None, :, :, :keys]
