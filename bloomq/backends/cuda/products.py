"""The ways from x [M, K] float32 to x @ W.T [M, N] float32, for any number of tokens.

Which way a matrix goes is said when its layer is built: bitsandbytes' operations, or weights
restored in blocks for torch's own product, which is the twin of the others.

Activations meet int8 weights as the CPU's kernels have them, int8 with a scale for each token and
128 columns, but for a head's of two limbs, which stay as they are. Of 11 greedy texts of the demo,
200 tokens each, 7 were the CPU's when both rounded the head's too, and 4 with all activations left
as they are. The others part where two tokens are within 0.04 of a logit, since a
sum in another order may round to another code. Other schemes' activations stay as they are,
float32 on the CPU and 16 bits on a GPU. LLM.int8 has one scale a token, in which BLOOM's small
activations are lost beside its massive ones (up to 3500 in 7b1); taking those out, by a threshold,
has the GPU wait for the host to learn where they are, so no CUDA graph holds it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from bloomq.backends.cuda.device import import_bitsandbytes, why_no_triton
from bloomq.backends.cuda.stored import Stored, codes_of, restored
from bloomq.schemes import Scheme

Tensor = torch.Tensor
Product = Callable[[Tensor], Tensor]
Kernels = Literal["auto", "torch", "bitsandbytes", "triton"]
Activations = Literal["int8", "float"]
KERNELS = ("auto", "torch", "bitsandbytes", "triton")
# Of a matrix restored for a product: 7b1's largest layer at once, 176B's head in 54 parts.
RESTORED_BYTES = 128 << 20
_LARGEST_HALF = 32768.0  # that a token's inputs are scaled to: float16 ends at 65,504
# cublasLt's int8 product wants whole 16 bytes of columns, and rows by eights.
_INT8_COLUMNS, _INT8_ROWS = 16, 8


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How products are computed on a device.

    narrow: what a product's inputs are rounded to; kernels: "auto" for what should be fastest,
    "torch" for torch's own alone, the others to say whose few tokens are. Of int8 matrices:
    activations: "int8" by groups, as on the CPU, or "float"; threshold, where it is not None: of
    LLM.int8, which computes columns with a value so large or larger unquantized; 0: no such.
    """

    device: torch.device
    narrow: torch.dtype
    kernels: Kernels = "auto"
    activations: Activations = "int8"
    threshold: float | None = None

    def __str__(self) -> str:
        narrow = str(self.narrow).removeprefix("torch.")
        rounded = {"int8": "int8 by groups", "float": narrow}[self.activations]
        if self.threshold is not None:
            rounded = f"LLM.int8 from {self.threshold:g}" if self.threshold else "int8 by tokens"
        by = "Triton" if self.has_triton else self.kernels
        return f"{narrow} products (of int8: {rounded}), kernels of {by}"

    @property
    def has_triton(self) -> bool:
        """Do products of few tokens go through Triton's kernels? It compiles for GPUs alone, from
        compute capability 8.0 on; on the CPU it interprets them, where it is asked to."""
        if self.kernels != "auto" or self.device.type == "cpu":
            return self.kernels == "triton"
        return self._compiles

    @property
    def attends_by_triton(self) -> bool:
        """Does attention to a cache go through them, where a row gets one token? On a GPU alone,
        and where "torch" does not ask for torch's own."""
        return self.device.type == "cuda" and self.kernels != "torch" and self._compiles

    @property
    def _compiles(self) -> bool:
        new_enough = torch.cuda.get_device_capability(self.device) >= (8, 0)
        return new_enough and why_no_triton() is None

    def without_triton(self) -> str | None:
        """Why kernels of Triton that are installed, and should run on this GPU, do not; None where
        they do or nobody asks for them."""
        if self.device.type == "cpu" or self.kernels in ("torch", "bitsandbytes"):
            return None
        there = importlib.util.find_spec("triton") is not None
        new_enough = torch.cuda.get_device_capability(self.device) >= (8, 0)
        return why_no_triton() if there and new_enough else None

    def dtype(self, scheme: Scheme) -> torch.dtype:
        """Of a product's inputs: a float's own where the device computes with it."""
        if self.narrow == torch.float32 or scheme.name == "f32":
            return torch.float32
        if scheme.name == "f16":
            return torch.float16
        if scheme.name == "bf16" and self.narrow != torch.bfloat16:
            return torch.float32  # float16 has not its range
        return self.narrow

    def by_tokens(self, stored: Stored) -> bool:
        """Is a matrix multiplied with int8 activations of one scale a token?"""
        fits = stored.columns % _INT8_COLUMNS == 0 and stored.shape[0] % _INT8_ROWS == 0
        return self.threshold is not None and stored.scheme.name == "int8" and fits

    def by_codes(self, stored: Stored) -> bool:
        """Is what a matrix's product gives still to be multiplied with the scales of its rows?"""
        return stored.scheme.name == "int8" and not self.by_tokens(stored)

    def by_groups(self, stored: Stored) -> bool:
        """Is a matrix multiplied with int8 activations of a scale for each token and group?"""
        asked = self.threshold is None and self.activations == "int8"
        return asked and stored.scheme.name == "int8"


def product(stored: Stored, how: Arithmetic) -> Product:
    """The way that a matrix goes; without its scales where it goes `Arithmetic.by_codes`. Its
    activations are rounded here, if they are to be and Triton does not (`linear.FewTokens`)."""
    if how.by_tokens(stored):
        return Int8Product(stored, how)
    if stored.scheme.name == "nf4" and how.kernels != "torch":
        return FourBitProduct(stored, how.dtype(stored.scheme))
    plain = RestoredProduct(stored, how.dtype(stored.scheme))
    if not how.by_groups(stored) or how.has_triton:
        return plain
    return lambda x: plain(rounded(x, stored.scheme.group_size))


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
        # int8's codes are exact in 16 bits, its scales are not: they follow, see `by_codes`.
        if stored.scheme.name == "int8":
            return multiply(x, codes_of(stored, self._dtype))
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


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Where a kernel of Triton's runs: on the current device, whatever it is given."""
    there: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return there


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x in `dtype`, and what each token's result is to be multiplied with [M, 1]: float16 has no
    room for the activations of 176B's 62nd block, so they are scaled into it."""
    if dtype != torch.float16:
        return x.to(dtype), None
    scale = (x.abs().amax(dim=1, keepdim=True) / _LARGEST_HALF).clamp(min=1)
    return (x / scale).to(dtype), scale


def rounded(x: Tensor, group: int) -> Tensor:
    """x [M, K] as int8 codes with a scale for each group of columns restore it, float32."""
    grouped = x.reshape(len(x), -1, group)
    peak = grouped.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(peak < 1e-30, 0, 127 / peak)  # else it would be infinite
    return (torch.round(grouped * inverse) * (peak / 127)).view(x.shape)


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T in float32, also of 16-bit inputs: float16 sums may pass its end."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T
