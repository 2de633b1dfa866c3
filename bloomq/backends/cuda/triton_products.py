"""Products of up to 64 tokens with stored weights, in Triton: act(x @ W.T + b + delta) + add.

`product` is what a linear calls. Up to four tokens go to `triton_gemv.gemv`; more to `skinny`: a
tile of weights is restored to the activations' dtype and given to the matrix unit, padded to 16, 32
or 64 tokens, while int8 codes meet int8 activations as they are. Where there are too few rows for
all multiprocessors, K is cut, and `finish` adds the pieces in order.

`skinny` spends 8 instructions on an int4 weight whatever M is (convert, scale, pack and move to the
matrix unit's layout), so 45 % of what an H200's bandwidth brings; 11 on one from a book, 30 %; 2 on
an int8 weight, and none on one that meets int8 activations: there, and with bfloat16 weights, 75 to
85 % should be reached. Counted in the compiled loops, never measured.

Invariant: each output is added up in one order: no atomics. Offsets into the weights are int64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl

from bloomq.backends.cuda.stored import BOOKS
from bloomq.backends.cuda.triton_gemv import finished, gemv
from bloomq.schemes import GROUPED

MOST_TOKENS = 64  # of `product`; more are a matrix product like any other
X_GROUP = 128  # columns that share a scale of int8 activations, as on the CPU: schemes.py
BY_HAND = 4  # tokens, at most, that `gemv` takes: beyond, the matrix unit costs less
PROGRAMS = 264  # that keep 132 multiprocessors busy: two each
# Weights in the 16 bytes that a thread loads at once.
IN_16_BYTES = {
    "nl4": 32, "int4": 32, "nf4": 32, "int8": 16, "int6": 16, "f32": 4, "f16": 8, "bf16": 8
}  # fmt: skip
Kind = Literal["book", "int4", "byte", "float"]
_KINDS: dict[str, Kind] = {
    "nl4": "book", "nf4": "book", "int4": "int4", "int8": "byte", "int6": "byte"
}  # fmt: skip
Case = Literal["one", "few", "tile", "wide"]
_MAGIC = 0x4B000000  # 2^23 as float32
_MOST_ROWS = 65535  # of a grid's second dimension


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut: rows and 16-byte pieces of a row that a program has at a time, its
    warps, loads in flight, and pieces that K is cut into."""

    rows: int
    pieces: int
    warps: int
    stages: int
    splits: int = 1


# How products are cut, by what the weights are ("int8": with int8 activations) and how many tokens
# there are: one, up to four, up to 32, up to 64. By reasoning alone, see `blocks_for`; the section
# "cuts" of benchmarks/gpu_figures.sh measures others and prints lines to put here.
CUTS: dict[tuple[Kind | Literal["int8"], Case], Blocks] = {
    ("int4", "one"): Blocks(8, 32, 4, 3),
    ("int4", "few"): Blocks(8, 32, 4, 3),
    ("int4", "tile"): Blocks(32, 8, 4, 3),
    ("int4", "wide"): Blocks(64, 8, 4, 2),
    ("book", "one"): Blocks(8, 32, 4, 1),
    ("book", "few"): Blocks(8, 32, 4, 1),
    ("book", "tile"): Blocks(32, 8, 4, 1),
    ("book", "wide"): Blocks(64, 8, 4, 1),
    ("byte", "one"): Blocks(8, 32, 4, 3),
    ("byte", "few"): Blocks(4, 32, 4, 3),
    ("byte", "tile"): Blocks(32, 8, 4, 3),
    ("byte", "wide"): Blocks(64, 8, 4, 2),
    ("float", "one"): Blocks(8, 32, 4, 3),
    ("float", "few"): Blocks(4, 32, 4, 3),
    ("float", "tile"): Blocks(32, 8, 4, 3),
    ("float", "wide"): Blocks(64, 8, 4, 2),
    ("int8", "tile"): Blocks(32, 8, 4, 5),
    ("int8", "wide"): Blocks(64, 8, 4, 3),
}


def _kind(scheme: str) -> Kind:
    return _KINDS.get(scheme, "float")


def case_of(scheme: str, m: int, dtype: torch.dtype) -> tuple[Kind | Literal["int8"], Case]:
    """Which line of CUTS a product is cut by."""
    if dtype == torch.int8:
        return "int8", "tile" if m <= 32 else "wide"
    if m <= BY_HAND:
        return _kind(scheme), "one" if m == 1 else "few"
    return _kind(scheme), "tile" if m <= 32 else "wide"


def blocks_for(scheme: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Blocks:
    """The cut of a product [m, k] x [n, k] of activations of `dtype`: its line of CUTS, less where
    the matrix is small, and K cut where its rows are too few.

    Up to four tokens: 32 pieces of 16 bytes are one load of a warp, 512 bytes of a row. Four warps
    of a row or two, with three stages two loads ahead: 4 to 8 KB in flight a program, of 25 KB or
    more that a multiprocessor needs (4.8 TB/s x 700 ns / 132), where six programs fit. Fewer rows a
    program leave more programs, so that K is never cut: BLOOM's least n is 1,024. With a book
    only other programs look ahead, else its entries would be sent through shared memory too. More
    tokens, and int8 ones of any number: 32 rows of 128 bytes, and K cut until there are two
    programs for each multiprocessor; of int8, three of which hold 4,096 rows, four loads ahead
    have 16 KB in flight each, in 25 KB of shared memory. Beyond 32 tokens, and in float32, the
    activations' tiles take more of the shared memory than the weights': one fewer ahead and half as
    many columns leave int4's within the 99 KB of the GPUs that have least.
    """
    return fitted(CUTS[case_of(scheme, m, dtype)], scheme, m, n, k, dtype)


def fitted(cut: Blocks, scheme: str, m: int, n: int, k: int, dtype: torch.dtype) -> Blocks:
    """A line of CUTS for a matrix of this size: see `blocks_for`."""
    pieces = k // IN_16_BYTES[scheme]
    if m <= BY_HAND and dtype != torch.int8:
        rows = cut.rows if n >= cut.rows * PROGRAMS else min(4, cut.rows)
        wide = min(cut.pieces, triton.next_power_of_2(pieces))
        return replace(cut, rows=rows, pieces=wide)
    is_float32 = dtype == torch.float32
    rows = min(32, cut.rows) if is_float32 else cut.rows
    wide = min(4 if is_float32 else cut.pieces, triton.next_power_of_2(pieces))
    most = max(1, pieces // (2 * wide))  # two tiles a program at least
    splits = min(most, -(-PROGRAMS // -(-n // rows)), 16)
    return replace(cut, rows=rows, pieces=wide, splits=splits)


@triton.jit
def _restored(
    codes, scales, book, row, start, KIND: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, PIECES: tl.constexpr, to: tl.constexpr,
):  # fmt: skip
    """A tile of weights in dtype `to`, group scales applied: where a byte has two, those of even
    and of odd columns, each [BN, PIECES * 16]; of others [BN, PIECES * WIDTH] twice."""
    BN: tl.constexpr = row.shape[0]
    BYTES: tl.constexpr = 16 if WIDTH == 32 else WIDTH  # elements of a piece
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
    if WIDTH == 32:
        if KIND == "int4":
            even, odd = (loaded >> 4).to(tl.float32) - 8.0, (loaded & 15).to(tl.float32) - 8.0
        else:
            even, odd = tl.load(book + (loaded >> 4)), tl.load(book + (loaded & 15))
        even, odd = (even * scale).to(to), (odd * scale).to(to)
    else:
        if GROUP > 0:
            loaded = loaded.to(tl.float32) * scale
        even = loaded.to(to)
        odd = even
    shape: tl.constexpr = (BN, PIECES * BYTES)
    return tl.reshape(even, shape), tl.reshape(odd, shape)


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
    PAIRS: tl.constexpr = WIDTH == 32
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
        taken = tl.load(
            x + mine[:, None] * X + column[None, :], mask=(column < X)[None, :], other=0
        )
        even_w, odd_w = _restored(
            codes,
            scales,
            book,
            row,
            tile * PIECES,
            KIND,
            K,
            WIDTH,
            GROUP,
            PIECES,
            x.dtype.element_ty,
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
        y = finished(sums, at, columns, held, row_scales, bias, delta, add, ACT)
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
    piece = sums + at
    for _ in tl.static_range(SPLITS):
        y += tl.load(piece, mask=held, other=0.0)
        piece += m * n  # m is no tensor where it is 1; 64 x 2^24 rows are int32 still
    y = finished(y, at, columns, held, scales, bias, delta, add, ACT)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=held)


def takes(
    m: int, k: int, *, scheme: str, group_size: int, dtype: torch.dtype = torch.bfloat16
) -> bool:
    """Can `product` take m tokens of `dtype` and k columns, padded as `Scheme.padded` has them?"""
    if not 1 <= m <= MOST_TOKENS or k % IN_16_BYTES[scheme]:
        return False
    if scheme in GROUPED and k % group_size:
        return False
    if dtype == torch.int8:
        return scheme == "int8" and k % X_GROUP == 0
    return dtype in (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _book(scheme: str, device: torch.device) -> torch.Tensor:
    """A scheme's book there, float32: made at the first call, so before a graph is captured."""
    book = torch.tensor(BOOKS[scheme], device=device)
    assert book.data_ptr() % 64 == 0  # as `gemv` wants it; torch allocates so on any device
    return book


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
    k = codes.shape[1] * (2 if kind in ("book", "int4") else 1)
    cut = blocks or blocks_for(scheme, m, n, k, x.dtype)
    group = group_size if scheme in GROUPED else 0
    scale = None if kind == "float" else scales
    book = _book(scheme, x.device) if kind == "book" else None
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    common = {
        "K": k, "X": x.shape[1], "KIND": kind, "WIDTH": IN_16_BYTES[scheme], "GROUP": group,
        "BN": cut.rows, "PIECES": cut.pieces, "STAGES": cut.stages, "num_warps": cut.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    if m <= BY_HAND and x.dtype != torch.int8:
        words = codes.view(torch.int32) if kind in ("book", "int4") else codes
        gemv[(triton.cdiv(n, cut.rows),)](
            out, x, words, scale, book, bias, delta, add, n, _MAGIC, ACT=act, M=m, **common
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


def finished_in_place(
    y: torch.Tensor,
    *,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    act: Literal["gelu"] | None,
    delta: torch.Tensor | None,
    add: torch.Tensor | None,
) -> torch.Tensor:
    """act(y * scales + bias + delta) + add in the place of y, float32 [M, N], for any M; scales:
    float32 [N]. Bytes: each of them once."""
    m, n = y.shape
    delta, add = (None if one is None else one.contiguous() for one in (delta, add))
    # As many programs in the second dimension as a grid may have.
    for first in range(0, m, _MOST_ROWS):
        rows = slice(first, min(first + _MOST_ROWS, m))
        mine = y[rows]
        of_rows = (None if one is None else one[rows] for one in (delta, add))
        finish[(triton.cdiv(n, 1024), len(mine))](
            mine, mine, scales, bias, *of_rows, len(mine), n,
            ACT=act, SPLITS=1, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return y


# -- the same in plain torch -----------------------------------------------------------------------


def plain_weights(
    codes: torch.Tensor, scales: torch.Tensor | None, scheme: str, group_size: int
) -> torch.Tensor:
    """Stored codes and scales -> [N, K] float32."""
    if _kind(scheme) == "float":
        return codes.float()
    assert scales is not None
    if _kind(scheme) == "byte":
        values = codes.float()
    else:
        pairs = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1)
        is_book = _kind(scheme) == "book"
        values = _book(scheme, codes.device)[pairs.long()] if is_book else pairs.float() - 8
    if scheme == "int8":
        return values * scales[:, None]
    return values * scales.float().repeat_interleave(group_size, dim=1)


def plain_product(
    x: torch.Tensor,
    weights: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    act: Literal["gelu"] | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """`product`'s twin, float32, of weights [N, K] as `plain_weights` gives them."""
    x = x.float()
    if x_scales is not None:
        x = x * x_scales.repeat_interleave(X_GROUP, dim=1)[:, : x.shape[1]]
    y = x @ weights[:, : x.shape[1]].T
    y = y if bias is None else y + bias
    y = y if delta is None else y + delta.float()
    if act == "gelu":
        y = y * 0.5 * (1 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
    return y if add is None else y + add.float()
