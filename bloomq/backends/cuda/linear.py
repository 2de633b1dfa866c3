"""Linear layers: y = act(norm(x) @ W.T + b + delta) + add, by one of several ways to a product.

A product takes x [M, K] float32 and gives x @ W.T [M, N] float32. Which way a matrix goes is said
when its layer is built; the number of tokens decides between the skinny kernel and the wide
product at the call.

Activations are not quantized unless an outlier threshold is given: float32 on the CPU, 16 bits on
a GPU. A product of one int8 scale a token loses BLOOM's small activations beside its massive ones
(up to 3500 in 7b1), and LLM.int8, which takes those out, must ask the GPU where they are before it
can go on: no CUDA graph holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from bloomq.backends.cuda.device import import_bitsandbytes
from bloomq.backends.cuda.stored import Stored, codes_of, restored
from bloomq.layers import Activation
from bloomq.schemes import Scheme

Tensor = torch.Tensor
Product = Callable[[Tensor], Tensor]
Kernels = Literal["auto", "torch", "bitsandbytes", "triton"]
# Of a matrix restored for a product: a 7b1's layer in four parts, and 176B's head in 64.
RESTORED_BYTES = 128 << 20
# float16 ends at 65,504, and sums of a few inputs of half that must not pass it either.
_LARGEST_HALF = 16384.0
# cublasLt's int8 products want rows of 16 bytes.
_INT8_COLUMNS, _INT8_ROWS = 16, 8


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products are computed on a device.

    narrow: what a 16-bit GPU's inputs are rounded to, float32 on the CPU; threshold: None for
    activations as they are, 0 for int8 ones (one scale a token), more for LLM.int8, which computes
    columns with a value so large or larger unquantized.
    """

    device: torch.device
    narrow: torch.dtype
    kernels: Kernels = "auto"
    threshold: float | None = None

    def __str__(self) -> str:
        inputs = str(self.narrow).removeprefix("torch.")
        if self.threshold is not None:
            inputs += (
                f", int8 with outliers from {self.threshold:g}" if self.threshold else ", int8"
            )
        return f"{inputs} inputs"

    def dtype(self, scheme: Scheme) -> torch.dtype:
        """Of a product's inputs: a float's own where the device computes with it."""
        if self.device.type == "cpu" or scheme.name == "f32":
            return torch.float32
        if scheme.name == "f16":
            return torch.float16
        if scheme.name == "bf16" and self.narrow != torch.bfloat16:
            return torch.float32  # float16 has not its range
        return self.narrow


def product(stored: Stored, how: Arithmetic) -> Product:
    """The way that a matrix goes."""
    wide = _wide(stored, how)
    return wide


def _wide(stored: Stored, how: Arithmetic) -> Product:
    name, dtype = stored.scheme.name, how.dtype(stored.scheme)
    if name == "int8" and how.threshold is not None and _int8_fits(stored):
        return Int8Product(stored, how)
    if name == "nf4" and how.kernels in ("auto", "bitsandbytes"):
        return FourBitProduct(stored, dtype)
    return RestoredProduct(stored, dtype)


def _int8_fits(stored: Stored) -> bool:
    return stored.columns % _INT8_COLUMNS == 0 and stored.shape[0] % _INT8_ROWS == 0


class RestoredProduct:
    """With weights restored in blocks of rows; floats of the inputs' dtype as they lie."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self._stored, self._dtype = stored, dtype
        n, k = stored.shape[0], stored.columns
        lies = stored.scheme.is_float and stored.codes.dtype == dtype
        self._step = n if lies else max(1, RESTORED_BYTES // (k * dtype.itemsize))

    def __call__(self, x: Tensor) -> Tensor:
        n = self._stored.shape[0]
        x, scale = narrowed(x, self._dtype)
        if self._step >= n:
            y = self._part(x, self._stored)
        else:
            y = torch.empty((len(x), n), dtype=torch.float32, device=x.device)
            for first in range(0, n, self._step):
                stop = min(first + self._step, n)
                y[:, first:stop] = self._part(x, self._stored.rows(first, stop))
        return y if scale is None else y * scale

    def _part(self, x: Tensor, stored: Stored) -> Tensor:
        if stored.scheme.name == "int8":  # its codes are exact in 16 bits, its scales are not
            return multiply(x, codes_of(stored, self._dtype)) * stored.scales
        return multiply(x, restored(stored, self._dtype))


class FourBitProduct:
    """bitsandbytes' product with nf4 weights; the plain way is `RestoredProduct`.

    Up to 4 tokens its kernel computes with float32 inputs as it does with 16-bit ones, and the
    weights' bytes are what takes time; beyond, it wants 16 bits.
    """

    _FLOAT32_TOKENS = 4  # gemm_4bit's fused kernel serves so many on any GPU

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        import_bitsandbytes()
        self._stored, self._dtype = stored, dtype
        self._absmax = stored.scales.view(-1)

    def __call__(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if len(x) <= self._FLOAT32_TOKENS else self._dtype
        x, scale = narrowed(x, dtype)
        shape = [self._stored.shape[0], self._stored.columns]
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, self._stored.codes, shape, self._absmax, self._stored.scheme.group_size, "nf4"
        )
        y = y.float()
        return y if scale is None else y * scale


class Int8Product:
    """bitsandbytes' int8 product with int8 activations, one scale a token; with a threshold
    LLM.int8. Its 32-bit sums are scaled here, in float32: `int8_scaled_mm` ends in float16."""

    def __init__(self, stored: Stored, how: Arithmetic) -> None:
        import_bitsandbytes()
        assert how.threshold is not None
        self._stored, self._threshold = stored, how.threshold
        # The CUDA kernel quantizes float16 alone.
        self._dtype = torch.float16 if how.device.type == "cuda" else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        ops, codes, scales = torch.ops.bitsandbytes, self._stored.codes, self._stored.scales
        x, scale = narrowed(x, self._dtype)
        x = x.contiguous()
        quantized, peaks, columns = ops.int8_vectorwise_quant(x, self._threshold)
        # NaN has no int8: a token that holds one is NaN by its scale.
        peaks = peaks + 0 * x.float().sum(dim=1)
        sums = ops.int8_linear_matmul(quantized, codes)  # int32 [M, N]
        y: Tensor = sums * (peaks / 127)[:, None] * scales
        if columns is not None and columns.numel():
            beside = codes[:, columns].to(self._dtype)
            y = y + multiply(x[:, columns], beside) * scales
        return y if scale is None else y * scale


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x in `dtype`, and what each token's result is to be multiplied with [M, 1]: float16 has no
    room for the activations of 176B's 62nd block, so they are scaled into it."""
    if dtype != torch.float16:
        return x.to(dtype), None
    scale = (x.abs().amax(dim=1, keepdim=True) / _LARGEST_HALF).clamp(min=1)
    return (x / scale).to(dtype), scale


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T in float32, also from 16-bit inputs where torch can give that."""
    if x.dtype == torch.float32:
        return x @ w.T
    if x.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return (x @ w.T).float()


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNorm:
    """A layer norm on the device, in float32."""

    gain: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, C] -> (x - mean) / sqrt(variance + epsilon) * gain + bias."""
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.epsilon)


class CudaLinear:
    """`Linear` over a product."""

    def __init__(
        self,
        stored: Stored,
        how: Arithmetic,
        bias: Tensor | None,
        norm: DeviceNorm | None,
        act: Activation | None,
    ) -> None:
        self._n, self._padding = stored.shape[0], stored.columns - stored.shape[1]
        self._product, self._bias = product(stored, how), bias
        self._norm, self._act = norm, act

    def __call__(self, x: Tensor, add: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        if not len(x):
            return x.new_empty((0, self._n))
        if self._norm is not None:
            x = self._norm(x)
        if self._padding:
            x = F.pad(x, (0, self._padding))
        y = self._product(x)
        if self._bias is not None:
            y = y.add_(self._bias)
        if delta is not None:
            y = y.add_(delta)
        if self._act == "gelu":  # its constants are BLOOM's, rounded to float32
            y = F.gelu(y, approximate="tanh")
        return y if add is None else y.add_(add)
