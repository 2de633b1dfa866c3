"""Products of a few tokens with stored weights, in Triton: y = act(x @ W.T + b + delta) + add.

At a token or a few a product is a read of its weights, so a kernel is as good as the share of the
GPU's memory bandwidth that it reaches. Two kernels:

- `gemv`, one token: no matrix unit. A thread loads 16 bytes of codes at a time and multiplies and
  adds in float32; a program has BN rows and all of K.
- `skinny`, up to 64 tokens: a tile of weights is restored to the activations' dtype and given to
  the matrix unit, padded to 16, 32 or 64 tokens; int8 codes and int8 activations go there as they
  are. Where there are too few rows for all multiprocessors, K is cut and `finish` adds the pieces.

What should be reached on an H200 (4.8 TB/s, 132 multiprocessors at about 1.75 GHz, each 128
instructions, 64 of them integer, a cycle: 3.0e13 a second), counted by hand, never measured:

    gemv    instructions a weight                   weights/s at 4.8 TB/s   bound by instructions
    int4    mask 1, less 2^23 1, add 1, shift 1/8     9.0e12 (0.53 B)           9.4e12, 104 %
    nf4     shift 1, mask 1, table 1, address 1, 1    8.5e12 (0.56 B)           5.9e12,  70 %
    int8    convert 1 (half rate), add 1              4.8e12 (1 B)              9.9e12, 200 %
    f16     convert 1, add 1                          2.4e12 (2 B)              1.5e13, 600 %

so int8 and floats should be bound by memory alone (80 to 90 % of it), int4 by both (60 to 75 %),
nf4 by its table (45 to 60 %: its loads are one a weight, from 64 bytes in the first-level cache).
`skinny` spends about 6 instructions on a 4-bit weight whatever M: at most 50 % of the bandwidth;
on an int8 weight with int8 activations none at all.

Invariant: each output is added up in one order, whatever the other rows are: no atomics. Offsets
into the weights are int64: 250,880 x 14,336 is beyond 2^31.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from bloomq.schemes import NF4_CODEBOOK

MOST_TOKENS = 64  # of `product`; more are a matrix product like any other
X_GROUP = 128  # columns that share a scale of int8 activations, as on the CPU: schemes.py
PROGRAMS = 264  # that keep 132 multiprocessors busy: two each
# Weights in the 16 bytes that a thread loads at once.
IN_16_BYTES = {"int4": 32, "nf4": 32, "int8": 16, "int6": 16, "f32": 4, "f16": 8, "bf16": 8}
Kind = Literal["int4", "nf4", "byte", "float"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut: rows and 16-byte pieces of a row that a program has at a time, its
    warps, loads in flight, and pieces that K is cut into."""

    rows: int
    pieces: int
    warps: int
    stages: int
    splits: int = 1


def _kind(scheme: str) -> Kind:
    return "byte" if scheme in ("int8", "int6") else scheme if scheme in ("int4", "nf4") else "float"


def blocks_for(scheme: str, m: int, n: int, k: int) -> Blocks:
    """The cut of a product [m, k] x [n, k], by reasoning alone.

    One token: 32 pieces of 16 bytes are one load of a warp, 512 bytes of a row. Four warps, a row
    or two each: 2 to 4 KB in flight a program and stage, of 25 KB that a multiprocessor needs (4.8
    TB/s x 700 ns / 132); eight programs of 64 registers a thread fit. Fewer rows a program leave
    more programs, and no split of K: BLOOM's least n is 1,024. Several tokens: 32 rows of 256
    bytes, and K cut until there are two programs for each multiprocessor.
    """
    pieces = k // IN_16_BYTES[scheme]
    if m == 1:
        rows = 4 if n < 8 * PROGRAMS else 8
        return Blocks(rows, min(32, triton.next_power_of_2(pieces)), warps=4, stages=3)
    rows = 32 if m <= 32 else 64
    wide = min(8, triton.next_power_of_2(pieces))
    most = max(1, pieces // (2 * wide))  # two tiles a program at least
    splits = min(most, -(-PROGRAMS // (-(-n // rows))), 16)
    return Blocks(rows, wide, warps=4, stages=3, splits=splits)


@triton.jit
def _gelu(x):
    """BLOOM's tanh approximation; tanh(u) = 1 - 2 / (1 + exp(2 u)), right at both infinities."""
    inner = 0.79788456 * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))


@triton.jit
def _finished(y, at, columns, held, scales, bias, delta, add, ACT: tl.constexpr):
    """The epilogue, in float32: y at offsets `at` of [M, N], whose columns are `columns`."""
    if scales is not None:
        y *= tl.load(scales + columns, mask=held, other=0.0)
    if bias is not None:
        y += tl.load(bias + columns, mask=held, other=0.0)
    if delta is not None:
        y += tl.load(delta + at, mask=held, other=0.0).to(tl.float32)
    if ACT == "gelu":
        y = _gelu(y)
    if add is not None:
        y += tl.load(add + at, mask=held, other=0.0).to(tl.float32)
    return y


@triton.jit
def _eight(x, first, inside, PIECES: tl.constexpr):
    """Activations for PIECES x 4 words of eight 4-bit codes: those of code j of each word, j 0..7,
    each [PIECES, 4]."""
    at = first + tl.arange(0, 32 * PIECES)
    flat = tl.load(x + at, mask=at < inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(flat, (PIECES, 4, 2, 2, 2)))
    x04, x26 = tl.split(even)  # [PIECES, 4, 2]
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _level(words, BIT: tl.constexpr):
    """(code - 8) * 2**BIT of the 4 bits from BIT on, BIT at most 16, without a conversion: set in
    the fraction of 2**23, which is then taken away; exact."""
    bits = (words & (15 << BIT)) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * (1 << BIT))


@triton.jit
def _int4_products(words, x, first, inside, PIECES: tl.constexpr):
    """words [BN, PIECES, 4] of eight codes, the first of each byte in its high half -> code * x,
    summed over each piece, [BN, PIECES]. The power of two that a code carries is taken from x."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, first, inside, PIECES)
    high = words >> 12  # columns 4, 6 and 7 lie beyond the fraction's bits
    y = _level(words, 0) * x1[None]
    y += _level(words, 4) * (x0 * 0.0625)[None]
    y += _level(words, 8) * (x3 * 0.00390625)[None]
    y += _level(words, 12) * (x2 * 0.000244140625)[None]
    y += _level(words, 16) * (x5 * 0.0000152587890625)[None]
    y += _level(high, 8) * (x4 * 0.00390625)[None]
    y += _level(high, 12) * (x7 * 0.000244140625)[None]
    y += _level(high, 16) * (x6 * 0.0000152587890625)[None]
    return tl.sum(y, axis=2)


@triton.jit
def _nf4_products(words, book, x, first, inside, PIECES: tl.constexpr):
    """As `_int4_products`, of the code book's entries."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, first, inside, PIECES)
    y = tl.load(book + (words & 15)) * x1[None]
    y += tl.load(book + ((words >> 4) & 15)) * x0[None]
    y += tl.load(book + ((words >> 8) & 15)) * x3[None]
    y += tl.load(book + ((words >> 12) & 15)) * x2[None]
    y += tl.load(book + ((words >> 16) & 15)) * x5[None]
    y += tl.load(book + ((words >> 20) & 15)) * x4[None]
    y += tl.load(book + ((words >> 24) & 15)) * x7[None]
    y += tl.load(book + ((words >> 28) & 15)) * x6[None]
    return tl.sum(y, axis=2)


@triton.jit
def gemv(
    out, x, codes, scales, book, bias, delta, add, n,
    K: tl.constexpr, X: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    ACT: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [N] = act(x [X] @ W.T * scales + bias + delta) + add; K: X as the codes are padded.

    codes: [N, K / WIDTH, 16 bytes], of 4-bit codes as int32. GROUP: columns that share a scale, 0
    for one a row (or none, scales None). Bytes: the codes and scales once, x once a program (from
    the second-level cache). A warp reads 512 bytes of a row at a time; sums stay in registers, a
    float32 for each piece of each row, until the end.
    """
    SLOTS: tl.constexpr = 4 if KIND == "int4" or KIND == "nf4" else WIDTH  # elements of a piece
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    held = rows < n
    row = tl.minimum(rows, n - 1).to(tl.int64)  # the last one again, rather than a masked load
    starts = codes + (row * (K // WIDTH * SLOTS))[:, None, None] + tl.arange(0, SLOTS)[None, None, :]
    sums = tl.zeros((BN, PIECES), tl.float32)
    for start in tl.range(0, K // WIDTH, PIECES, num_stages=STAGES):
        piece = start + tl.arange(0, PIECES)
        there = starts + (piece * SLOTS)[None, :, None]
        if K // WIDTH % PIECES == 0:
            loaded = tl.load(there, eviction_policy="evict_first")
        else:  # beyond the row x is 0, and a code is a number
            loaded = tl.load(there, mask=(piece < K // WIDTH)[None, :, None], other=0)
        if KIND == "int4":
            part = _int4_products(loaded.to(tl.uint32, bitcast=True), x, start * 32, X, PIECES)
        elif KIND == "nf4":
            words = loaded.to(tl.uint32, bitcast=True)
            part = _nf4_products(words, book, x, start * 32, X, PIECES)
        else:
            at = start * WIDTH + tl.arange(0, PIECES * WIDTH)
            flat = tl.load(x + at, mask=at < X, other=0.0).to(tl.float32)
            part = tl.sum(loaded.to(tl.float32) * tl.reshape(flat, (1, PIECES, WIDTH)), axis=2)
        if GROUP > 0:
            group = tl.minimum(piece, K // WIDTH - 1) * WIDTH // GROUP
            part *= tl.load(scales + (row * (K // GROUP))[:, None] + group[None, :]).to(tl.float32)
        sums += part
    y = tl.sum(sums, axis=1)
    row_scales = None if GROUP > 0 else scales
    y = _finished(y, rows, rows, held, row_scales, bias, delta, add, ACT)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def _restored(codes, scales, book, row, start, KIND, K, WIDTH, GROUP, PIECES: tl.constexpr, to):
    """A tile of weights, in its two halves where a byte has two: of even and of odd columns, each
    [BN, PIECES * 16]; of others [BN, PIECES * WIDTH] and nothing. With group scales, in `to`."""
    BN: tl.constexpr = row.shape[0]
    BYTES: tl.constexpr = 16 if KIND == "int4" or KIND == "nf4" else WIDTH  # elements of a piece
    piece = start + tl.arange(0, PIECES)
    starts = codes + (row * (K // WIDTH * BYTES))[:, None, None] + (piece * BYTES)[None, :, None]
    there = starts + tl.arange(0, BYTES)[None, None, :]
    inside = (piece < K // WIDTH)[None, :, None]
    loaded = tl.load(there, mask=inside, other=0, eviction_policy="evict_first")
    scale = 1.0
    if GROUP > 0:
        group = tl.minimum(piece, K // WIDTH - 1) * WIDTH // GROUP
        scale = tl.load(scales + (row * (K // GROUP))[:, None] + group[None, :]).to(tl.float32)
        scale = scale[:, :, None]
    if KIND == "int4" or KIND == "nf4":
        if KIND == "int4":
            even, odd = (loaded >> 4).to(tl.float32) - 8.0, (loaded & 15).to(tl.float32) - 8.0
        else:
            even, odd = tl.load(book + (loaded >> 4)), tl.load(book + (loaded & 15))
        shape: tl.constexpr = (BN, PIECES * BYTES)
        return tl.reshape((even * scale).to(to), shape), tl.reshape((odd * scale).to(to), shape)
    if GROUP > 0:
        loaded = loaded.to(tl.float32) * scale
    tile = tl.reshape(loaded.to(to), (BN, PIECES * WIDTH))
    return tile, tile


@triton.jit
def skinny(
    out, x, x_scales, codes, scales, book, bias, delta, add, m, n,
    K: tl.constexpr, X: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    X_COLUMNS: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PIECES: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [M, N] of x [M, X] as `gemv` has it, or with SPLITS > 1 the bare sums of each cut of K,
    [SPLITS, M, N]. X_COLUMNS: columns that share one of x_scales [M, X / X_COLUMNS], 0 without.

    Bytes: codes and scales once, x [BM, K] once a program, from the second-level cache: with 32
    rows a program and 16 tokens, as many bytes as int8 weights have, twice those of 4-bit ones.
    """
    TILE: tl.constexpr = PIECES * WIDTH  # columns at a time
    PAIRS: tl.constexpr = KIND == "int4" or KIND == "nf4"
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.arange(0, BM)
    mine = tl.minimum(token, m - 1)
    tiles: tl.constexpr = (K + TILE - 1) // TILE
    each: tl.constexpr = (tiles + SPLITS - 1) // SPLITS
    first = tl.program_id(1) * each
    sums = tl.zeros((BM, BN), tl.float32)
    for tile in tl.range(first, tl.minimum(first + each, tiles), num_stages=STAGES):
        column = tile * TILE + tl.arange(0, TILE)
        taken = tl.load(x + mine[:, None] * X + column[None, :], mask=(column < X)[None, :], other=0)
        even_w, odd_w = _restored(
            codes, scales, book, row, tile * PIECES, KIND, K, WIDTH, GROUP, PIECES, x.dtype.element_ty
        )
        if PAIRS:
            even_x, odd_x = tl.split(tl.reshape(taken, (BM, TILE // 2, 2)))
            sums = tl.dot(even_x, tl.trans(even_w), sums, input_precision="ieee")
            sums = tl.dot(odd_x, tl.trans(odd_w), sums, input_precision="ieee")
        elif X_COLUMNS > 0:  # whole numbers, exact, until the scale of the tile's columns
            of_group = tl.load(x_scales + mine * ((X + TILE - 1) // TILE) + tile)
            sums += tl.dot(taken, tl.trans(even_w)).to(tl.float32) * of_group[:, None]
        else:
            sums = tl.dot(taken, tl.trans(even_w), sums, input_precision="ieee")
    held = (token < m)[:, None] & (rows < n)[None, :]
    at = token[:, None].to(tl.int64) * n + rows[None, :]
    if SPLITS > 1:
        tl.store(out + tl.program_id(1).to(tl.int64) * m * n + at, sums, mask=held)
    else:
        columns = tl.broadcast_to(rows[None, :], (BM, BN))
        row_scales = None if GROUP > 0 else scales
        y = _finished(sums, at, columns, held, row_scales, bias, delta, add, ACT)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=held)


@triton.jit
def finish(
    out, sums, scales, bias, delta, add, m, n,
    ACT: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of each cut of K, [SPLITS, M, N], added in order, and the epilogue -> out [M, N]."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = columns < n
    at = tl.program_id(1).to(tl.int64) * n + columns
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(sums + split * m.to(tl.int64) * n + at, mask=held, other=0.0)
    y = _finished(y, at, columns, held, scales, bias, delta, add, ACT)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=held)


def takes(
    m: int, k: int, *, scheme: str, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> bool:
    """Can `product` take m tokens of `dtype` and k columns, padded as `Scheme.padded` has them?"""
    if not 1 <= m <= MOST_TOKENS or k % IN_16_BYTES[scheme]:
        return False
    if scheme in ("int4", "int6", "nf4") and k % group_size:
        return False
    if dtype == torch.int8:
        return scheme == "int8" and k % X_GROUP == 0
    return dtype in (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _book(device: torch.device) -> torch.Tensor:
    """NF4's code book there: made at the first call, so before a graph is captured."""
    return torch.tensor(NF4_CODEBOOK, device=device)


def product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    scheme: str,
    group_size: int,
    x_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    act: Literal["gelu"] | None = None,
    add: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """act(x @ W.T + bias + delta) + add, [M, N], summed in float32.

    x: [M, K] float16, bfloat16 or float32; or int8 with x_scales float32 [M, K / 128], for int8
    alone. codes, scales: as `stored.Stored` has them, K padded or not. bias: float32 [N]; delta,
    add: [M, N] of any float. blocks: how it is cut, else as `blocks_for` says. What `takes` says
    can be taken: x, delta and add lie in rows without gaps.
    """
    m, n = x.shape[0], codes.shape[0]
    kind = _kind(scheme)
    k = codes.shape[1] * (2 if kind in ("int4", "nf4") else 1)
    cut = blocks or blocks_for(scheme, m if x.dtype != torch.int8 else max(m, 2), n, k)
    group = group_size if scheme in ("int4", "int6", "nf4") else 0
    scale = None if kind == "float" else scales
    book = _book(x.device) if kind == "nf4" else None
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    common = {
        "K": k, "X": x.shape[1], "KIND": kind, "WIDTH": IN_16_BYTES[scheme], "GROUP": group,
        "BN": cut.rows, "PIECES": cut.pieces, "STAGES": cut.stages, "num_warps": cut.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if m == 1 and x.dtype != torch.int8:
        words = codes.view(torch.int32) if kind in ("int4", "nf4") else codes
        gemv[(triton.cdiv(n, cut.rows),)](
            out, x, words, scale, book, bias, delta, add, n, ACT=act, **common
        )
        return out
    whole = cut.splits == 1
    sums = out if whole else torch.empty((cut.splits, m, n), dtype=torch.float32, device=x.device)
    x_columns = 0
    if x_scales is not None:
        x_columns, common["PIECES"] = X_GROUP, X_GROUP // IN_16_BYTES[scheme]
    skinny[(triton.cdiv(n, cut.rows), cut.splits)](
        sums, x, x_scales, codes, scale, book,
        *((bias, delta, add) if whole else (None, None, None)), m, n,
        X_COLUMNS=x_columns, ACT=act if whole else None, BM=max(16, triton.next_power_of_2(m)),
        SPLITS=cut.splits, **common,
    )  # fmt: skip
    if not whole:
        finish[(triton.cdiv(n, 1024), m)](
            out, sums, None if group else scale, bias, delta, add, m, n,
            ACT=act, SPLITS=cut.splits, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out
