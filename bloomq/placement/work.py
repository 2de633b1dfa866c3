"""Work space: what a device needs beside weights and cache, and where each figure comes from.

Estimates of what the CUDA backend allocates, read from its code; none is measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bloomq.config import BloomConfig
from bloomq.layers import GPU_STEP_TOKENS, STEP_TOKENS, SURVEYED_ROWS, CacheDtype
from bloomq.placement.sizes import Kind, cache_bytes
from bloomq.schemes import Scheme

_MIB = 1 << 20
# The CUDA context with lazily loaded kernels of torch, cuBLAS and bitsandbytes: 300 to 550 MiB in
# public reports (pytorch/pytorch, issues 107667 and 81257), and cuBLAS' own 32 MiB on Hopper.
CONTEXT_BYTES = 600 * _MIB
# What loading leaves to be used again: a block as sent, as rows, and the parts its codes are made
# of. Source: BLOCK_BYTES of backends/cuda/stored.py.
_LOADING_BYTES = 5 * (32 * _MIB)
# Of a token, for each of C, where a step has most: as mlp.down's input [4C] is narrowed. In float32
# the residual and a product; and of what a rank has its share of, that input and, scaled to fit
# float16, another of it, then in 16 bits. Where int8 matrices want it rounded by groups: the input,
# whole numbers, and what these restore.
_WHOLE_BYTES, _SHARE_BYTES, _ROUNDED_SHARE_BYTES = 4 * (1 + 1), 4 * (4 + 4) + 2 * 4, 4 * (4 + 4 + 4)
# Attention's biases of a block of queries, in float16 or as a float32 cache's; and what they are
# made of for all heads at once: int64 and float32 distances. Source: backends/cuda/attention.py.
_BLOCK_BIASES, _DISTANCE_BYTES = 1 << 26, 8 + 4
# Weights restored for a product, in blocks of rows of so many bytes, and how many of them there are
# at once: int4's nibbles together (a byte, half a block), as numbers, and less 8; then scaled. Of
# nl4 its bytes, two codes each, as int32 (two bytes a weight), and their numbers; then scaled.
# Source: RESTORED_BYTES of backends/cuda/products.py.
_RESTORED_BYTES = 128 * _MIB
_RESTORED_BLOCKS = {
    "int8": 1.0, "int6": 2.0, "nl4": 2.0, "int4": 2.5, "f32": 0.0, "f16": 0.0, "bf16": 0.0
}  # fmt: skip
_FEW_TOKENS = 64  # up to so many, Triton's kernels restore none
# Of each logit: itself, float32; and while a step finds the best of each row its order in 4 bytes
# and its key of 8, beside the place of each token, 8 bytes for all rows together (its power in
# float64, 8 bytes, comes when these are gone). Sampling takes one row at a time: four of float64
# and which are possible. Source: backends/cuda/top.py.
_LOGIT_BYTES, _SURVEY_BYTES, _PLACE_BYTES, _SUMS_BYTES = 4, 4 + 8, 8, 4 * 8 + 1
_READ_ROWS = 64  # of logits at once, where all are asked for: forward.py, scoring.py
# Recorded steps: one for each power of two of rows up to the batch (backends/cuda/steps.py), some
# 15 kernels a layer; 16 KiB a kernel is what vLLM's 0.5 GiB for 35 sizes of Llama 70B come to.
# Without Triton there is one for each power of two of keys, too.
_KERNELS_OF_LAYER, _RECORDED_BYTES = 15, 16 << 10
# Measured by benchmarks/conversion.py: Python, NumPy, Numba with its kernels.
_CPU_LIBRARIES_BYTES = 170 * _MIB


@dataclass(frozen=True, slots=True)
class Work:
    """What a device needs beside weights and cache: libraries, the largest of what it does at a
    time (a step of a prompt, reading many logits, loading, a cache's growing), the logits of all
    rows, and recorded decode steps with their own work space."""

    context_bytes: int
    step_bytes: int
    logits_bytes: int
    graph_bytes: int

    @property
    def nbytes(self) -> int:
        return self.context_bytes + self.step_bytes + self.logits_bytes + self.graph_bytes


def work(
    config: BloomConfig, kind: Kind, *, layers: int, has_head: bool, batch: int, context: int,
    cache_dtype: CacheDtype, schemes: Iterable[Scheme], heads: int | None = None,
) -> Work:  # fmt: skip
    """The work space of a device with so many layers, for `batch` rows of `context` tokens; heads:
    a rank's, None for all."""
    most = STEP_TOKENS if kind == "cpu" else GPU_STEP_TOKENS
    tokens = min(most, batch * context)  # more go in several steps
    schemes = tuple(schemes)
    rounds = any(scheme.name == "int8" for scheme in schemes)
    heads = config.n_head if heads is None else heads
    of_share = (_ROUNDED_SHARE_BYTES if rounds else _SHARE_BYTES) * config.head_dim * heads
    of_token = _WHOLE_BYTES * config.hidden_size + of_share
    vocabulary = config.vocab_size * has_head
    logits = vocabulary * _logits_bytes(batch)
    if kind == "cpu":
        return Work(_CPU_LIBRARIES_BYTES, tokens * of_token, logits, 0)
    restored = max(_restored_bytes(config, scheme, heads) for scheme in schemes)
    attention = _attention_bytes(config, min(tokens, context), context, cache_dtype, heads)
    step = max(
        _LOADING_BYTES,
        tokens * of_token + max(attention, restored),
        vocabulary * _logits_bytes(min(_READ_ROWS, tokens)) + restored,
        # Two layers of half the rows: backends/cuda/cache.py, `grow`.
        cache_bytes(config, cache_dtype, kind, batch, context, heads).nbytes,
    )
    return Work(CONTEXT_BYTES, step, logits, _graph_bytes(layers, batch, of_token, vocabulary)
                + restored * (batch > _FEW_TOKENS))  # fmt: skip


def _logits_bytes(rows: int) -> int:
    """For each token of the vocabulary, while so many rows of logits are looked at."""
    return _LOGIT_BYTES * rows + max(_SURVEY_BYTES * rows + _PLACE_BYTES, _SUMS_BYTES)


def _graph_bytes(layers: int, batch: int, of_token: int, vocabulary: int) -> int:
    """Of the steps recorded for 1, 2, 4, ... rows, the last for all: kernels and the memory of each
    step's own. A step's logits stay, and what it has beside them serves the next one's only where
    that is not larger; so all are added up."""
    each = [1 << i for i in range((batch - 1).bit_length())] + [batch]
    logits = sum(
        _LOGIT_BYTES * rows + (_SURVEY_BYTES * rows + _PLACE_BYTES) * (rows <= SURVEYED_ROWS)
        for rows in each
    )
    recorded = len(each) * layers * _KERNELS_OF_LAYER * _RECORDED_BYTES
    return recorded + sum(each) * of_token + vocabulary * logits


def _restored_bytes(config: BloomConfig, scheme: Scheme, heads: int) -> int:
    """For a product with a matrix of this scheme. bitsandbytes restores all of an nf4 matrix for a
    prompt's product; the largest of a layer is [4C, C]."""
    whole = 2 * 4 * config.hidden_size * heads * config.head_dim
    if scheme.name == "nf4":
        return whole
    return int(_RESTORED_BLOCKS[scheme.name] * min(_RESTORED_BYTES, whole))


def _attention_bytes(
    config: BloomConfig, tokens: int, context: int, cache_dtype: CacheDtype, heads: int
) -> int:
    """Of the prompt's attention: biases of a block of queries, and of an int8 cache a row's keys
    and values as float32, times their scales, in 16 bits."""
    of_bias = 4 if cache_dtype == "f32" else 2
    biases = min(_BLOCK_BIASES, heads * tokens * context) * (of_bias + _DISTANCE_BYTES / heads)
    restored = 2 * context * heads * config.head_dim * (4 + 4 + 2)
    return int(biases) + restored * (cache_dtype == "int8")
