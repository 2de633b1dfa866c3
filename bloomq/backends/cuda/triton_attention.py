"""Attention of a step that gives each row one token, in Triton, its new key and value stored too.

    out = softmax(q . k / sqrt(D) + slope * (key position - query position)) @ v

The keys of a row are cut into as many splits as keep the GPU busy whatever the batch is, each for a
program: (head, split, row). What it has seen stays in float32 registers, a maximum, a sum and a
vector for each of KEYS places, so that no program waits for its own other warps within the loop;
`join` adds the splits in order. Lengths are read from the device: a recorded graph may be replayed
with others.

Bytes: the keys and values held, once. Counted by hand for float16 and D = 128, a key's 256 bytes
take 128 conversions, 128 products and, 16 lanes to a key, 64 shuffles and sums; a value's as many
but for the shuffles: some 5 instructions for 4 bytes, 3.0e13 a second, so 2.4e13 bytes: bound by
memory, 70 to 85 % of it for long rows. int8 halves the bytes and converts at half the rate: 60 to
75 %. Below some 256 keys a head and row it is the time of two launches.

Invariant: one order of sums, which the other rows do not change: no atomics. Slots are int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from bloomq.backends.cuda.triton_norm import rounded_to_even

KEYS = 32  # at a time: 8 KB of float16 keys of 128 components, 64 bytes a thread
PROGRAMS = 264  # that keep 132 multiprocessors busy: two each
MOST_SPLITS = 32
DTYPES = (torch.float32, torch.float16, torch.int8)


@triton.jit
def _stored(vector, codes, scales, at, place, component, written, writes):
    """A new key or value as the cache holds it, stored at offset `at` and, int8's scale, at
    `place`; -> what will be read of it."""
    if scales is None:
        code = vector.to(codes.dtype.element_ty)
        read = code.to(tl.float32)
    else:
        peak = tl.max(tl.abs(vector), axis=0)
        faint = peak < 1e-30  # 127 / peak would be infinite
        inverse = tl.where(faint, 0.0, tl.div_rn(127.0, tl.where(faint, 1.0, peak)))
        scale = tl.where(faint, 0.0, tl.div_rn(peak, 127.0))
        whole = rounded_to_even(vector * inverse)
        code = whole.to(tl.int8)
        read = whole * scale
        tl.store(scales + place, scale, mask=writes)
    tl.store(codes + at + component, code, mask=written)
    return read


@triton.jit
def attend_split(
    out, part, qkv, keys, values, key_scales, value_scales, rows, lengths, slopes, capacity, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A split of a row's keys for one head -> part [R, H, SPLITS, D + 2]: the weighted values, the
    largest score and the sum of weights. With one split -> out [R, H, D] itself."""
    head, split, r = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    component = tl.arange(0, BLOCK_D)
    held = component < D
    length = tl.load(lengths + r).to(tl.int32)
    past = tl.maximum(length - 1, 0)
    first = tl.load(rows + r).to(tl.int64) * capacity  # slot of the row's first token
    mine = qkv + (r * H + head) * 3 * D + component  # q, k and v of a head lie together
    q = tl.load(mine, mask=held, other=0.0).to(tl.float32) * scale
    slope = tl.load(slopes + head)

    peak = tl.full((KEYS,), -3.0e38, tl.float32)  # not -inf: -inf - -inf is no number
    total = tl.zeros((KEYS,), tl.float32)
    sums = tl.zeros((KEYS, BLOCK_D), tl.float32)
    each = tl.cdiv(tl.cdiv(past, SPLITS), KEYS) * KEYS
    stop = tl.minimum((split + 1) * each, past)
    for start in tl.range(split * each, stop, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        there = key < stop
        place = (first + key) * H + head
        at = (place * D)[:, None] + component[None, :]
        mask = there[:, None] & held[None, :]
        k = tl.load(keys + at, mask=mask, other=0).to(tl.float32)
        v = tl.load(values + at, mask=mask, other=0).to(tl.float32)
        score = tl.sum(q[None, :] * k, axis=1)
        if key_scales is not None:
            score *= tl.load(key_scales + place, mask=there, other=0.0)
        score += slope * (key - past).to(tl.float32)
        highest = tl.where(there, tl.maximum(peak, score), peak)
        weight = tl.where(there, tl.exp(score - highest), 0.0)
        before = tl.exp(peak - highest)
        total = total * before + weight
        if value_scales is not None:
            weight *= tl.load(value_scales + place, mask=there, other=0.0)
        sums = sums * before[:, None] + weight[:, None] * v
        peak = highest

    # The new token, whose key and value no other program may look for in memory: the first split's.
    new = tl.where(split == 0, length, 0) > 0
    written = component < tl.where(new, D, 0)
    place = (first + past) * H + head
    k = tl.load(mine + D, mask=held, other=0.0).to(tl.float32)
    v = tl.load(mine + 2 * D, mask=held, other=0.0).to(tl.float32)
    k = _stored(k, keys, key_scales, place * D, place, component, written, new)
    v = _stored(v, values, value_scales, place * D, place, component, written, new)
    score = tl.where(new, tl.sum(q * k, axis=0), -3.0e38)

    highest = tl.maximum(tl.max(peak, axis=0), score)
    before = tl.exp(peak - highest)
    weight = tl.where(new, tl.exp(score - highest), 0.0)
    whole = tl.sum(total * before, axis=0) + weight
    mixed = tl.sum(sums * before[:, None], axis=0) + weight * v
    if SPLITS == 1:
        mixed = tl.where(length > 0, mixed / whole, 0.0)
        at = (r * H + head) * D + component
        tl.store(out + at, mixed.to(out.dtype.element_ty), mask=held)
    else:
        at = part + ((r * H + head) * SPLITS + split) * (D + 2)
        tl.store(at + component, mixed, mask=held)
        tl.store(at + D, highest)
        tl.store(at + D + 1, whole)


@triton.jit
def join(
    out, part, lengths,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits of each head, added in order -> out [R, H, D]; 0 for a row of length 0."""
    head, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    component = tl.arange(0, BLOCK_D)
    held = component < D
    at = part + (r * H + head) * SPLITS * (D + 2)
    highest = tl.load(at + D)
    for split in tl.static_range(1, SPLITS):
        highest = tl.maximum(highest, tl.load(at + split * (D + 2) + D))
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    whole = 0.0
    for split in tl.static_range(SPLITS):
        here = at + split * (D + 2)
        weight = tl.exp(tl.load(here + D) - highest)
        whole += tl.load(here + D + 1) * weight
        mixed += tl.load(here + component, mask=held, other=0.0) * weight
    mixed = tl.where(tl.load(lengths + r) > 0, mixed / whole, 0.0)
    tl.store(out + (r * H + head) * D + component, mixed.to(out.dtype.element_ty), mask=held)


def splits_for(n_head: int, capacity: int) -> int:
    """How many splits a row's keys are cut into: by the heads and the cache alone, so that a row's
    bits are the same in any batch."""
    return max(1, min(-(-PROGRAMS // n_head), capacity // (2 * KEYS), MOST_SPLITS))


def takes_heads(head_dim: int, dtype: torch.dtype) -> bool:
    """Can `decode_attention` take such heads from a cache of `dtype`?"""
    return head_dim % 8 == 0 and 8 <= head_dim <= 256 and dtype in DTYPES


def decode_attention(
    qkv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    slopes: torch.Tensor,
    *,
    capacity: int,
    splits: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token for each of R rows, [R, H * D]; its key and value are stored.

    qkv: [R, H * 3 * D] of any float, as BLOOM's product gives it. codes: [2, slots, H, D], keys and
    then values, float32, float16 or int8, token t of row r in slot r * capacity + t; scales:
    float32 [2, slots, H] for int8, None or of size 0 for others. rows: int [R], each at most once;
    lengths: int [R], the tokens held after this one, 0 for padding, which stores nothing and gets
    zeros; slopes: float32 [H]. Nothing is asked of the device: all sizes are known before.
    """
    _, _, n_head, head_dim = codes.shape
    r = qkv.shape[0]
    scaled = scales is not None and scales.numel() > 0
    key_scales, value_scales = (scales[0], scales[1]) if scaled else (None, None)
    splits = splits or splits_for(n_head, capacity)
    out = torch.empty((r, n_head * head_dim), dtype=out_dtype, device=qkv.device)
    part = out
    if splits > 1:
        shape = (r, n_head, splits, head_dim + 2)
        part = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    block = triton.next_power_of_2(head_dim)
    attend_split[(n_head, splits, r)](
        out, part, qkv, codes[0], codes[1], key_scales, value_scales, rows, lengths, slopes,
        capacity, 1 / math.sqrt(head_dim), H=n_head, D=head_dim, BLOCK_D=block, KEYS=KEYS,
        SPLITS=splits, STAGES=2, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        join[(n_head, r)](
            out, part, lengths, H=n_head, D=head_dim, BLOCK_D=block, SPLITS=splits,
            num_warps=max(1, block // 64), enable_fp_fusion=True,
        )  # fmt: skip
    return out


# -- the same in plain torch -----------------------------------------------------------------------


def plain_decode_attention(
    qkv: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    slopes: torch.Tensor,
    *,
    capacity: int,
) -> torch.Tensor:
    """`decode_attention`'s twin, row by row: it asks the device for every length."""
    _, _, n_head, head_dim = codes.shape
    split = qkv.float().view(-1, n_head, 3, head_dim)  # [R, H, 3, D]
    out = torch.zeros(len(split), n_head, head_dim, device=qkv.device)
    for r, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if not length:
            continue
        slot = row * capacity + length - 1
        for part in (0, 1):
            new = split[r, :, 1 + part]  # [H, D]
            if scales is not None and scales.numel():
                peak = new.abs().amax(dim=1, keepdim=True)
                faint = peak < 1e-30
                scales[part, slot] = torch.where(faint, 0, peak / 127)[:, 0]
                new = torch.round(new * torch.where(faint, 0, 127 / peak))
            codes[part, slot] = new.to(codes.dtype)
        held = codes[:, slot - length + 1 : slot + 1].float()  # [2, S, H, D]
        if scales is not None and scales.numel():
            held *= scales[:, slot - length + 1 : slot + 1, :, None]
        scores = torch.einsum("hd,shd->hs", split[r, :, 0], held[0]) / math.sqrt(head_dim)
        distance = torch.arange(length, device=qkv.device) - (length - 1)
        weights = torch.softmax(scores + slopes[:, None] * distance, dim=1)
        out[r] = torch.einsum("hs,shd->hd", weights, held[1])
    return out.view(len(split), -1)
