"""Work space: what a device needs beside weights and cache, and where each figure comes from.

Estimates of what the CUDA backend allocates, read from its code; none is measured yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bloomq.config import BloomConfig
from bloomq.forward import STEP_TOKENS
from bloomq.layers import CacheDtype
from bloomq.placement.sizes import Kind
from bloomq.schemes import Scheme

_MIB = 1 << 20
# The CUDA context with lazily loaded kernels of torch, cuBLAS and bitsandbytes: 300 to 550 MiB in
# public reports (pytorch/pytorch, issues 107667 and 81257), and cuBLAS' own 32 MiB on Hopper.
CONTEXT_BYTES = 600 * _MIB
# What loading leaves to be used again: a block as sent, as rows, and the parts its codes are made
# of. Source: BLOCK_BYTES of backends/cuda/stored.py.
_LOADING_BYTES = 5 * (32 * _MIB)
# Of a token, in float32, while mlp.up goes through gelu, for each of C: the residual, the
# normalised input, the product [4C] and what gelu makes of it [4C].
_STEP_BYTES_OF_C = 4 * (1 + 1 + 4 + 4)
# Attention's biases of a block of queries, as float32 and then in 16 bits. Source: BLOCK_BIASES of
# backends/cuda/attention.py.
_BLOCK_BIASES, _BIAS_BYTES = 1 << 26, 4 + 2
# Weights restored for a product, in blocks of rows of so many bytes, and how many of them there are
# at once: int4's nibbles apart (a byte each, half a block), as numbers, less 8, and scaled. Source:
# RESTORED_BYTES of backends/cuda/linear.py.
_RESTORED_BYTES = 128 * _MIB
_RESTORED_BLOCKS = {"int8": 1.0, "int6": 2.0, "int4": 3.5, "f32": 0.0, "f16": 0.0, "bf16": 0.0}
_SKINNY_ROWS = 16  # up to so many, decode restores none
# Of each logit, in `top`: itself, its order and twice its key of 8 bytes, or its power in float64.
_LOGIT_BYTES = 4 + 4 + 3 * 8
# Recorded steps: for each power of two of rows up to the batch and of keys from 256 up to the
# context (backends/cuda/steps.py), some 15 kernels a layer; 16 KiB a kernel is what vLLM's 0.5 GiB
# for 35 sizes of Llama 70B come to.
_LEAST_KEYS, _KERNELS_OF_LAYER, _RECORDED_BYTES = 256, 15, 16 << 10
# Measured by benchmarks/conversion.py: Python, NumPy, Numba with its kernels.
_CPU_LIBRARIES_BYTES = 170 * _MIB


@dataclass(frozen=True, slots=True)
class Work:
    """What a device needs beside weights and cache: libraries, the largest step of a prompt, the
    logits of all rows, and recorded decode steps with their own work space."""

    context_bytes: int
    step_bytes: int
    logits_bytes: int
    graph_bytes: int

    @property
    def nbytes(self) -> int:
        return self.context_bytes + self.step_bytes + self.logits_bytes + self.graph_bytes


def work(
    config: BloomConfig, kind: Kind, *, layers: int, has_head: bool, batch: int, context: int,
    cache_dtype: CacheDtype, schemes: Iterable[Scheme], ranks: int = 1,
) -> Work:  # fmt: skip
    """The work space of a device with so many layers, for `batch` rows of `context` tokens."""
    tokens = min(STEP_TOKENS, batch * context)  # more go in several steps
    activations = tokens * config.hidden_size * _STEP_BYTES_OF_C
    logits = batch * config.vocab_size * has_head
    if kind == "cpu":
        return Work(_CPU_LIBRARIES_BYTES, activations, _LOGIT_BYTES * logits, 0)
    restored = max(_restored_bytes(config, scheme, ranks) for scheme in schemes)
    attention = _attention_bytes(config, min(tokens, context), context, cache_dtype, ranks)
    step = max(_LOADING_BYTES, activations + max(attention, restored))
    pool = batch * config.hidden_size * _STEP_BYTES_OF_C + 4 * logits
    if batch > _SKINNY_ROWS:
        pool += restored
    recorded = layers * _KERNELS_OF_LAYER * _RECORDED_BYTES * _powers(1, batch)
    recorded *= _powers(_LEAST_KEYS, context)
    return Work(CONTEXT_BYTES, step, _LOGIT_BYTES * logits, recorded + pool)


def _restored_bytes(config: BloomConfig, scheme: Scheme, ranks: int) -> int:
    """For a product with a matrix of this scheme. bitsandbytes restores all of an nf4 matrix for a
    prompt's product; the largest of a layer is [4C, C]."""
    whole = 2 * 4 * config.hidden_size**2 // ranks
    if scheme.name == "nf4":
        return whole
    return int(_RESTORED_BLOCKS[scheme.name] * min(_RESTORED_BYTES, whole))


def _attention_bytes(
    config: BloomConfig, tokens: int, context: int, cache_dtype: CacheDtype, ranks: int
) -> int:
    """Of the prompt's attention: biases of a block of queries, and of an int8 cache a row's keys
    and values as float32, times their scales, in 16 bits."""
    heads = config.n_head // ranks
    biases = _BIAS_BYTES * min(_BLOCK_BIASES, heads * tokens * context)
    restored = 2 * context * heads * config.head_dim * (4 + 4 + 2)
    return biases + restored * (cache_dtype == "int8")


def _powers(least: int, most: int) -> int:
    """How many powers of two (`least` is one) reach from there to `most`, which counts as one."""
    return max(0, (max(most, least) - 1) // least).bit_length() + 1
