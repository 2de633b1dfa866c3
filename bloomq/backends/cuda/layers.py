"""`Backend` on one GPU, or on torch's CPU device."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.backends.cuda.attention import attention
from bloomq.backends.cuda.cache import CudaCache
from bloomq.backends.cuda.embedding import CudaEmbedding
from bloomq.backends.cuda.linear import CudaLinear, DeviceNorm
from bloomq.backends.cuda.products import KERNELS, Activations, Arithmetic, Kernels
from bloomq.backends.cuda.steps import in_graphs
from bloomq.backends.cuda.stored import Loader
from bloomq.backends.cuda.surveyed import LogitRows
from bloomq.backends.cuda.top import best_of, logsumexp, row_sums
from bloomq.config import BloomConfig
from bloomq.errors import BackendError, UsageError
from bloomq.layers import (
    GPU_STEP_TOKENS,
    SURVEYED_ROWS,
    Activation,
    Attention,
    CacheDtype,
    Embedding,
    LayerNorm,
    Linear,
    Span,
    Step,
    Top,
)
from bloomq.levels import Levels, Sums, levels_of
from bloomq.weights import Matrix, Norm

Tensor = torch.Tensor
F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class CudaBackend:
    """`Backend` over torch's tensors; calls take NumPy's arrays too.

    device: "cuda:0" and so on, or "cpu". compute_dtype: of a GPU's products, "auto" for bfloat16
    where the GPU has it, else float16, and float32 on the CPU; the rest: see `Arithmetic`.

    Raises: UsageError for what these cannot be.
    """

    name = "cuda"
    step_tokens = GPU_STEP_TOKENS

    def __init__(
        self,
        device: str = "cuda:0",
        cache_dtype: CacheDtype = "f16",
        *,
        compute_dtype: str = "auto",
        activations: Activations = "int8",
        outlier_threshold: float | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        if outlier_threshold is not None and not outlier_threshold >= 0:
            raise UsageError(
                f"outlier_threshold is {outlier_threshold!r}, expected 0 or more, or None"
            )
        if activations not in ("int8", "float"):
            raise UsageError(f"activations is {activations!r}, expected int8 or float")
        if kernels not in KERNELS:
            raise UsageError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}")
        if kernels == "triton" and importlib.util.find_spec("triton") is None:
            raise BackendError("kernels is 'triton', which is not installed: use auto or torch")
        self.device, self.cache_dtype = torch.device(device), cache_dtype
        narrow = _narrow(compute_dtype, self.device)
        self._how = Arithmetic(self.device, narrow, kernels, activations, outlier_threshold)
        self._loader = Loader(self.device)
        missing = self._how.without_triton()
        if missing is not None and kernels == "triton":
            raise BackendError(f"kernels is 'triton', which cannot compile: {missing}: use auto")
        if missing is not None:
            said = f"Triton's kernels cannot be compiled, decoding is slower: {missing}"
            warnings.warn(said, stacklevel=2)

    @property
    def description(self) -> str:
        return self._described(f"{self.device} ({self._kind})")

    @property
    def arithmetic(self) -> str:
        """Of the kind of GPU, whichever of them it is."""
        return f"cuda: {self._described(self._kind)}"

    @property
    def _kind(self) -> str:
        cpu = self.device.type == "cpu"
        return "CPU" if cpu else torch.cuda.get_device_name(self.device)

    def _described(self, where: str) -> str:
        return f"torch {torch.__version__}, {where}, {self._how}, {self.cache_dtype} cache"

    def embedding(self, table: Matrix) -> Embedding:
        look_up = CudaEmbedding(self._loader.load(table))
        return lambda ids: look_up(self._there(ids))

    def norm(self, norm: Norm) -> LayerNorm:
        apply = self._norm(norm)
        return lambda x: apply(self._there(x))

    def linear(
        self,
        weight: Matrix,
        bias: F32 | None = None,
        *,
        norm: Norm | None = None,
        act: Activation | None = None,
        limbs: int = 1,
    ) -> Linear:
        # Activations that are not rounded to int8 have 16 bits at least.
        apply = CudaLinear(
            self._loader.load(weight),
            self._how if limbs == 1 else replace(self._how, activations="float", threshold=None),
            None if bias is None else self._there(bias),
            None if norm is None else self._norm(norm),
            act,
        )

        def call(x: Any, add: Any | None = None, delta: Any | None = None) -> Tensor:
            after = (None if value is None else self._there(value) for value in (add, delta))
            return apply(self._there(x), *after)

        return call

    def attention(
        self, layer: int, n_head: int, head_dim: int, *, slope: F32 | None = None
    ) -> Attention:
        return attention(layer, n_head, head_dim, self.device, slope=slope)

    def cache(self, config: BloomConfig, batch: int, capacity: int, ranks: int = 0) -> CudaCache:
        return CudaCache(
            config, batch, capacity, ranks, self.cache_dtype, self.device,
            by_triton=self._how.attends_by_triton,
        )  # fmt: skip

    def gate(self, x: Any, cache: Any, span: Span) -> Tensor:
        gated: Tensor = self._there(x) * cache.token_gates(span)
        return gated

    def compile(self, step: Step) -> Step:
        """LLM.int8 asks the GPU for its outliers within a step, which no CUDA graph can hold."""
        return in_graphs(step, self.device, record=not self._how.threshold)

    def take(self, x: Any, index: Any) -> Any:
        if isinstance(x, LogitRows):
            return x[self._there(index)]
        return self._there(x).index_select(0, self._there(index))

    def survey(self, logits: Any) -> Any:
        there = self._there(logits)
        return there if len(there) > SURVEYED_ROWS else LogitRows.of(there)

    def top(self, logits: Any, k: int) -> Top:
        if k <= 1 and isinstance(logits, LogitRows):
            return logits.top()
        there = self._there(logits)
        ids, best = best_of(there, k)
        total = logits.told[:, 2] if isinstance(logits, LogitRows) else logsumexp(there)
        return Top(ids.cpu().numpy(), best.cpu().numpy(), total.cpu().numpy())

    def best(self, logits: Any, k: int) -> tuple[I64, F32]:
        ids, best = best_of(self._there(logits), k)
        return ids[0].cpu().numpy(), best[0].cpu().numpy()

    def masked(self, logits: Any, allowed: NDArray[np.bool_]) -> Tensor:
        return self._there(logits).masked_fill(~self._there(allowed), -torch.inf)

    def sums(self, logits: Any, temperature: float = 1.0) -> Sums:
        best, *sums = row_sums(self._there(logits)[0], temperature).tolist()
        return Sums(best, temperature, *sums)

    def levels(self, logits: Any, temperature: float = 1.0) -> Levels:
        """NumPy's: summed on a GPU, the masses would not be the same each time."""
        return levels_of(self.numpy(logits)[0], temperature)

    def numpy(self, x: Any) -> F32:
        x = x.values if isinstance(x, LogitRows) else x
        return np.asarray(x.cpu() if isinstance(x, Tensor) else x, np.float32)

    def receive(self, x: Tensor) -> Tensor:
        """A tensor of another device on this one; between GPUs without waiting for it. On the CPU
        it is waited for: nothing there says when the bytes have come."""
        return x.to(self.device, non_blocking=self.device.type == "cuda")

    def _norm(self, norm: Norm) -> DeviceNorm:
        gain, bias = self._there(norm.gain), self._there(norm.bias)
        return DeviceNorm(gain, bias, norm.epsilon, self._how.has_triton)

    def _there(self, x: Any) -> Tensor:
        """x on the device; NumPy's arrays are copied."""
        if isinstance(x, Tensor):
            return x
        if isinstance(x, LogitRows):
            return x.values
        return torch.from_numpy(np.array(x, order="C")).to(self.device)


def _narrow(compute_dtype: str, device: torch.device) -> torch.dtype:
    """What the inputs of products are rounded to. Raises: UsageError."""
    if compute_dtype not in ("auto", "bf16", "f16", "f32"):
        raise UsageError(f"compute_dtype is {compute_dtype!r}, expected auto, bf16, f16 or f32")
    if compute_dtype != "auto" and (device.type == "cpu" or compute_dtype != "bf16"):
        return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[compute_dtype]
    if device.type == "cpu":
        return torch.float32
    # From compute capability 8.0 on; older ones imitate it, slowly.
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if compute_dtype == "bf16" and not has_bf16:
        raise UsageError(f"compute_dtype is 'bf16', which {device} has not: use f16, or auto")
    return torch.bfloat16 if has_bf16 else torch.float16
