"""Attention with ALiBi over a cache that the kernels read as it lies.

    out[i] = sum over keys j <= position of i:  softmax_j(q_i . k_j / sqrt(D) + slope * (j - i)) v_j

The bias is slope * j in the paper; softmax does not see the shift by slope * i, and near the query
it keeps float32's full resolution. Source: ALiBi (arXiv 2108.12409).

Keys and values lie in pages of 64 tokens, which a row's table gives the addresses of: see `pages`.
Keys lie in blocks of 16, [64/16, D, 16]: a lane is a key, so scores need no horizontal sums. Values
lie in rows [64, D]: a lane is a component. D is padded to a multiple of 16 with zeros. An int8
cache has a float32 scale for every key and value of every head.

Keys are walked in chunks of 256 at fixed positions, the newest first, with a running maximum
(online softmax). A weight below e^-40 of the largest seen so far counts as 0: 10^6 of them together
are 10^-12 of the result, far below float32's 6 x 10^-8. So a chunk whose keys provably all stay
below that, by |q||k| and the distance, is not read at all (the ALiBi horizon), and no bit changes.

Pages lie apart, so the processor's own guesses at what is read next end with each. So while a page
is read, the next one is asked for: behind 2,048 tokens that is 0.75 to 0.8 of the time that one
piece of memory took, and without it 1.15.

Bytes touched per decoded token: at most 2 x S x D x size of a cache element for each head.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from bloomq.backends.numba_cpu.attention_parts import (
    CHUNK,
    FAINT,
    PAGE,
    SHAPE,
    AttentionSpec,
    mix_values,
    score_keys,
    soften,
    store_vector,
)  # fmt: skip
from bloomq.backends.numba_cpu.jit import VECTOR_SUMS, called, kernel
from bloomq.backends.numba_cpu.memory import address, copy_bytes, fields, floats, keep, longs
from bloomq.backends.numba_cpu.simd import LANES

QUERIES = 8  # queries that share each loaded key and value in prefill

# Both kernels read `inputs`, which `NumbaCache.bind` writes: addresses of the tables of the rows'
# pages, heads of all layers; rows of the step, and the addresses of their numbers, starts and past
# lengths.


@called()
def _step_inputs(inputs):  # type: ignore[no-untyped-def]
    """Rows of the step, and the addresses of their tables of pages, starts and past lengths."""
    tables, _, n_rows, _, starts, past = fields(inputs, 6)
    return n_rows, tables, starts, past


@called()
def _in_page(inputs, layer, head, n_head, vector_bytes, scale_bytes):  # type: ignore[no-untyped-def]
    """Where one head of one layer lies in every page, in bytes: its keys, values and their scales,
    and the largest |k| among the keys. See `pages.Layout`."""
    places, place = fields(inputs, 2)[1], layer * n_head + head
    keys, scales = 2 * PAGE * vector_bytes * place, 2 * PAGE * vector_bytes * places
    key_scales = scales + 2 * PAGE * scale_bytes * place
    return (
        keys, keys + PAGE * vector_bytes, key_scales, key_scales + PAGE * scale_bytes,
        scales + 2 * PAGE * scale_bytes * places + 4 * place,
    )  # fmt: skip


@called(fastmath=VECTOR_SUMS)
def _length(x):  # type: ignore[no-untyped-def]
    """|x|, float32."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(math.sqrt(total))


@lru_cache(maxsize=8)
def store(dtype: str, width: int, tier: str) -> Any:
    """Keys and values of a step's tokens into the cache. Units: cache rows times heads.

    Arguments: inputs, layer, qkv, stride of qkv in bytes, H, D.
    """
    spec = str(AttentionSpec(dtype, width, tier))
    size, scale_size = AttentionSpec.parse(spec).size, 4 if dtype == "int8" else 0
    key_step = LANES * size

    @kernel
    def store(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, layer, qkv, stride, n_head, head_dim = fields(arguments, 6)
        n_rows, tables, starts, past = _step_inputs(inputs)
        lone = np.zeros(width, np.float32)
        for unit in range(first, last):
            r, head = unit // n_head, unit % n_head
            begin, end = longs(starts, n_rows + 1)[r], longs(starts, n_rows + 1)[r + 1]
            keys, values, key_scales, value_scales, longest = _in_page(
                inputs, layer, head, n_head, width * size, scale_size
            )
            for token in range(begin, end):
                position = longs(past, n_rows)[r] + token - begin
                page = longs(longs(tables, n_rows)[r], position // PAGE + 1)[position // PAGE]
                at = position % PAGE
                source = qkv + token * stride + 4 * (3 * head + 1) * head_dim
                copy_bytes(address(lone), source, 4 * head_dim)
                length, so_far = _length(lone), floats(page + longest, 1)
                # NaN stays: a chunk with it is always read.
                if at == 0 or not (np.isnan(so_far[0]) or so_far[0] > length):
                    so_far[0] = length
                block = page + keys + (at // 16 * (16 * width) + at % 16) * size
                store_vector(spec, address(lone), block, key_step, page + key_scales + 4 * at)
                copy_bytes(address(lone), source + 4 * head_dim, 4 * head_dim)
                value = page + values + at * width * size
                store_vector(spec, address(lone), value, size, page + value_scales + 4 * at)
        keep(lone)

    return store


@lru_cache(maxsize=16)
def attend(dtype: str, width: int, tier: str, queries: int) -> Any:
    """Attention of a step's queries over the cache, `queries` (1 or QUERIES) at a time. Units:
    blocks of queries times heads, the heads that see farthest first.

    Arguments: inputs, layer, qkv, stride of qkv in bytes, H, D, slopes, out, stride of out in
    bytes. A step has at most tokens / queries + rows blocks; the last may not exist.
    """
    spec = str(AttentionSpec(dtype, width, tier, queries))
    single = str(replace(AttentionSpec.parse(spec), queries=1))
    size, scale_size = AttentionSpec.parse(spec).size, 4 if dtype == "int8" else 0

    @kernel
    def attend(arguments, first, last):  # type: ignore[no-untyped-def]
        inputs, layer, qkv, stride, n_head, head_dim, slopes, out, out_stride = fields(arguments, 9)
        n_rows, tables, starts, past = _step_inputs(inputs)
        norm = np.float32(1.0 / math.sqrt(head_dim))
        # Lengths are of unrounded keys: int8 moves each component by at most 1/254 of the largest,
        # float16 by 1/2048 of itself; 1.005 covers that and the roundings of the sums.
        slack = np.float32(1.005 + math.sqrt(width) / 254)
        q = np.zeros((queries, width), np.float32)
        scores = np.zeros((queries, CHUNK), np.float32)
        mixed = np.zeros((queries, width), np.float32)
        shape = np.zeros((queries, SHAPE), np.float32)
        far = np.zeros(queries, np.float32)  # the largest |q||k| per unit of |k|
        for unit in range(first, last):
            block, head = unit // n_head, n_head - 1 - unit % n_head
            r = 0
            begin = longs(starts, n_rows + 1)
            while r < n_rows:  # which row's block is it?
                here = (begin[r + 1] - begin[r] + queries - 1) // queries
                if block < here:
                    break
                block -= here
                r += 1
            if r == n_rows:
                continue
            table, before = longs(tables, n_rows)[r], longs(past, n_rows)[r]
            keys, values, key_scales, value_scales, longest = _in_page(
                inputs, layer, head, n_head, width * size, scale_size
            )
            slope = floats(slopes, n_head)[head]
            token = begin[r] + block * queries
            count = min(queries, begin[r + 1] - token)
            position = before + block * queries  # of the first of these queries
            for i in range(count):
                source = floats(qkv + (token + i) * stride + 12 * head * head_dim, head_dim)
                for d in range(head_dim):
                    q[i, d] = source[d] * norm
                far[i] = _length(q[i]) * slack
            mixed[:] = np.float32(0)
            shape[:] = np.float32(0)
            shape[:, 2] = np.float32(-np.inf)
            end = position + count  # keys that the last of these queries sees
            for chunk in range((end - 1) // CHUNK, -1, -1):
                at = chunk * CHUNK
                length = min(CHUNK, end - at)
                pages = table + 8 * (at // PAGE)
                if at + CHUNK <= position:  # all of it lies before every query
                    needed, farthest = False, np.float32(0)
                    for page in longs(pages, CHUNK // PAGE):
                        key = floats(page + longest, 1)[0]
                        if not (np.isnan(farthest) or farthest > key):
                            farthest = key
                    for i in range(count):
                        gap = np.float32(position + i - at - CHUNK + 1)
                        reach = far[i] * farthest - slope * gap
                        if not reach < shape[i, 2] - np.float32(FAINT + 1):
                            needed = True
                    if not needed:
                        continue
                score_keys(spec, address(q), pages, keys, (length + 15) // 16, address(scores))
                for i in range(queries):
                    visible = min(length, position + i + 1 - at)
                    shape[i, 0] = slope
                    shape[i, 1] = np.float32(at - position - i)
                    if i < count and visible > 0:
                        soften(
                            single, address(scores[i]), visible, address(shape[i]), pages,
                            key_scales, value_scales,
                        )  # fmt: skip
                        scores[i, (visible + 15) // 16 * 16 : length] = np.float32(0)
                    else:
                        scores[i, :length] = np.float32(0)
                        shape[i, 4] = np.float32(1)
                mix_values(
                    spec, address(scores), pages, values, length, address(shape[:, 4:]),
                    address(mixed),
                )  # fmt: skip
            for i in range(count):
                target = floats(out + (token + i) * out_stride + 4 * head * head_dim, head_dim)
                for d in range(head_dim):
                    target[d] = mixed[i, d] / shape[i, 3]
        keep(q)
        keep(scores)
        keep(mixed)
        keep(shape)

    return attend
