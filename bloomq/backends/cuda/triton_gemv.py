"""Products of one to four tokens with stored weights, in Triton, by multiplications and additions.

A product of a token is a read of its weights, so a kernel is as good as the share of the memory
bandwidth that it reaches. Every thread loads 16 bytes of codes at a time, three such loads ahead
where the compiler can keep them in shared memory, and adds up in float32.

Instructions a weight at one token, counted in the compiled loops of 8 rows (sm_90 SASS), against
what an H200 can start, 132 multiprocessors x 128 x 1.75 GHz = 3.0e13 a second, and what 4.8 TB/s
bring:

    int4    4.7: mask, less 2^23, add; 1.7 for x and loads   8.5e12 weights/s (0.56 B)          75 %
            4.2 with 16 rows                                                                    83 %
    nl4     6.0: shift, address 2, table, add                9.0e12 (0.53 B)                    55 %
            5.6 with 16 rows                                                                    60 %
    nf4     6.0: as nl4                                      8.5e12 (0.56 B)                    59 %
    int8    3: extend, convert (half rate), add              4.8e12 (1 B)                      150 %
    f16     2: widen, add                                    2.4e12 (2 B)                      600 %

so int8 and floats should be bound by memory alone (80 to 90 % of it), int4 by both (55 to 75 %),
nl4 and nf4 by their book (45 to 55 %: a load from 64 bytes of the first-level cache for each
weight). Three more tokens cost a weight three additions more, and no load from a book. None of this
has been measured.

Invariant: each output is added up in one order, whatever the other rows are: no atomics. Offsets
into the weights are int64: 250,880 x 14,336 is beyond 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """BLOOM's tanh approximation; tanh(u) = 1 - 2 / (1 + exp(2 u)), right at both infinities."""
    inner = 0.79788456 * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))


@triton.jit
def finished(y, at, columns, held, scales, bias, delta, add, ACT: tl.constexpr):
    """The epilogue, in float32: y at offsets `at` of [M, N], whose columns are `columns`."""
    if scales is not None:
        y *= tl.load(scales + columns, mask=held, other=0.0)
    if bias is not None:
        y += tl.load(bias + columns, mask=held, other=0.0)
    if delta is not None:
        y += tl.load(delta + at, mask=held, other=0.0).to(tl.float32)
    if ACT == "gelu":
        y = gelu(y)
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
def _level(words, magic, BIT: tl.constexpr):
    """(code - 8) * 2**BIT of the 4 bits from BIT on, BIT at most 16, without a conversion: set in
    the fraction of 2**23, `magic`, which is then taken away; exact. That number is an argument
    because one instruction has room for one constant: as a constant it took the mask's place, and
    masks were loaded into registers again and again, 66 of a loop's 360 instructions."""
    bits = (words & (15 << BIT)) | magic
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * (1 << BIT))


@triton.jit
def _int4_products(words, magic, x, first, inside, PIECES: tl.constexpr):
    """words [BN, PIECES, 4] of eight codes, the first of each byte in its high half -> code * x,
    summed over each piece, [BN, PIECES]. The power of two that a code carries is taken from the
    sum over the words."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, first, inside, PIECES)
    high = words >> 12  # columns 4, 6 and 7 lie beyond the fraction's bits
    y = _level(words, magic, 0) * x1[None]
    y += _level(words, magic, 4) * (x0 * 0.0625)[None]
    y += _level(words, magic, 8) * (x3 * 0.00390625)[None]
    y += _level(words, magic, 12) * (x2 * 0.000244140625)[None]
    y += _level(words, magic, 16) * (x5 * 0.0000152587890625)[None]
    y += _level(high, magic, 8) * (x4 * 0.00390625)[None]
    y += _level(high, magic, 12) * (x7 * 0.000244140625)[None]
    y += _level(high, magic, 16) * (x6 * 0.0000152587890625)[None]
    return tl.sum(y, axis=2)


@triton.jit
def _entry(words, book, BIT: tl.constexpr):
    """The book's entry of the 4 bits from BIT on. The place is set in the book's address, 64 bytes
    from a multiple of 64 on: added to it, each weight took one instruction more for the carry."""
    at = (words << 2) & 60 if BIT == 0 else (words >> (BIT - 2)) & 60
    there = book.to(tl.uint64, bitcast=True) | at.to(tl.uint64)
    return tl.load(there.to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def _book_products(words, book, x, first, inside, PIECES: tl.constexpr):
    """As `_int4_products`, of the book's entries."""
    x0, x1, x2, x3, x4, x5, x6, x7 = _eight(x, first, inside, PIECES)
    y = _entry(words, book, 0) * x1[None]
    y += _entry(words, book, 4) * x0[None]
    y += _entry(words, book, 8) * x3[None]
    y += _entry(words, book, 12) * x2[None]
    y += _entry(words, book, 16) * x5[None]
    y += _entry(words, book, 20) * x4[None]
    y += _entry(words, book, 24) * x7[None]
    y += _entry(words, book, 28) * x6[None]
    return tl.sum(y, axis=2)


@triton.jit(do_not_specialize=["magic"])
def gemv(
    out, x, codes, scales, book, bias, delta, add, n, magic,
    K: tl.constexpr, X: tl.constexpr, KIND: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    ACT: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, PIECES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [M, N] = act(x [M, X] @ W.T * scales + bias + delta) + add; K: X as the codes are padded.

    codes: [N, K / WIDTH, 16 bytes], of 4-bit codes as int32. GROUP: columns that share a scale, 0
    for one a row (or none, scales None). Bytes: the codes and scales once, x once a program (from
    the second-level cache). A warp reads 512 bytes of a row at a time; sums stay in registers, a
    float32 for each piece of each row, until the end.
    """
    PAIRS: tl.constexpr = WIDTH == 32
    SLOTS: tl.constexpr = 4 if PAIRS else WIDTH  # elements of a piece
    LENGTH: tl.constexpr = K // WIDTH  # pieces of a row
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    held = rows < n
    row = tl.minimum(rows, n - 1).to(tl.int64)  # the last one again, rather than a masked load
    starts = codes + (row * (LENGTH * SLOTS))[:, None, None] + tl.arange(0, SLOTS)[None, None, :]
    # Of pairs one sum a piece, of others one an element: a multiplication and an addition are one.
    zeros = tl.zeros((BN, PIECES) if PAIRS else (BN, PIECES, WIDTH), tl.float32)
    sums = (zeros,) * M
    for start in tl.range(0, LENGTH, PIECES, num_stages=STAGES):
        piece = start + tl.arange(0, PIECES)
        there = starts + (piece * SLOTS)[None, :, None]
        if LENGTH % PIECES == 0:
            loaded = tl.load(there, eviction_policy="evict_first")
        else:  # beyond the row x is 0, and a code is a number
            loaded = tl.load(there, mask=(piece < LENGTH)[None, :, None], other=0)
        scale = 1.0
        if GROUP > 0:
            group = tl.minimum(piece, LENGTH - 1) * WIDTH // GROUP
            scale = tl.load(scales + (row * (K // GROUP))[:, None] + group[None, :]).to(tl.float32)
        more = ()
        for token in tl.static_range(M):
            mine = x + token * X
            if KIND == "int4":
                words = loaded.to(tl.uint32, bitcast=True)
                part = _int4_products(words, magic, mine, start * 32, X, PIECES) * scale
            elif KIND == "book":
                words = loaded.to(tl.uint32, bitcast=True)
                part = _book_products(words, book, mine, start * 32, X, PIECES) * scale
            else:
                at = (piece * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
                taken = tl.load(mine + at, mask=at < X, other=0.0).to(tl.float32)[None]
                if GROUP > 0:
                    taken = taken * scale[:, :, None]
                part = loaded.to(tl.float32) * taken
            more = more + (sums[token] + part,)
        sums = more
    for token in tl.static_range(M):
        of_pieces = sums[token]
        if not PAIRS:
            of_pieces = tl.sum(of_pieces, axis=2)
        y = tl.sum(of_pieces, axis=1)
        at = token * n + rows  # n is no tensor where it is 1; four times 2^29 rows are int32 still
        y = finished(y, at, rows, held, None if GROUP > 0 else scales, bias, delta, add, ACT)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=held)
