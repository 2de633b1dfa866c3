"""Linear layers and norms: y = act(norm(x) @ W.T + b + delta) + add, float32 in and out.

Few tokens, as a decode step has them, go through one kernel of Triton's that reads the weights once
and does all of the rest; more, and all where there is no Triton, through a product for any number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bloomq.backends.cuda.products import Arithmetic, narrowed, on_device_of, product
from bloomq.backends.cuda.stored import Stored
from bloomq.layers import Activation

Tensor = torch.Tensor
_CUT_COLUMNS = 2048  # that a program rounds: eight of them have 7b1's mlp.down


@dataclass(frozen=True, slots=True, eq=False)
class DeviceNorm:
    """A layer norm in float32; by_triton: in one kernel with the rounding of what it gives."""

    gain: Tensor
    bias: Tensor
    epsilon: float
    by_triton: bool = False

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x [M, C] -> (x - mean) / sqrt(variance + epsilon) * gain + bias, rounded to `dtype`."""
        if self.by_triton and len(x):
            from bloomq.backends.cuda.triton_norm import layer_norm

            with on_device_of(x):
                normed: Tensor = layer_norm(
                    x.contiguous(), self.gain, self.bias, self.epsilon, out_dtype=dtype
                )
            return normed
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.epsilon).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Epilogue:
    """What follows a product; its constants of gelu are BLOOM's, rounded to float32. scales: of
    each column, where the product has not multiplied with them; by_triton: in one kernel, so that y
    is read and written once, where a prompt's step else does it up to four times."""

    bias: Tensor | None
    act: Activation | None
    scales: Tensor | None = None
    by_triton: bool = False

    def __call__(self, y: Tensor, delta: Tensor | None, add: Tensor | None) -> Tensor:
        """act(y * scales + bias + delta) + add; y is overwritten."""
        if self.by_triton:
            from bloomq.backends.cuda.triton_products import finished_in_place

            with on_device_of(y):
                done: Tensor = finished_in_place(
                    y, scales=self.scales, bias=self.bias, act=self.act, delta=delta, add=add
                )
            return done
        if self.scales is not None:
            y = y.mul_(self.scales)
        if self.bias is not None:
            y = y.add_(self.bias)
        if delta is not None:
            y = y.add_(delta)
        if self.act == "gelu":
            y = torch.ops.aten.gelu_(y, approximate="tanh")
        return y if add is None else y.add_(add)


class CudaLinear:
    """`Linear` for any number of tokens."""

    def __init__(
        self,
        stored: Stored,
        how: Arithmetic,
        bias: Tensor | None = None,
        norm: DeviceNorm | None = None,
        act: Activation | None = None,
    ) -> None:
        self._n, self._padding = stored.shape[0], stored.columns - stored.shape[1]
        self._product, self._norm = product(stored, how), norm
        by_triton = how.has_triton and not how.by_tokens(stored)
        scales = stored.scales if how.by_codes(stored) else None
        self._finish = Epilogue(bias, act, scales, by_triton)
        few = FewTokens(stored, how, norm, Epilogue(bias, act))
        self._few = few if by_triton else None

    def __call__(self, x: Tensor, add: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
        if not len(x):
            return x.new_empty((0, self._n))
        if self._few is not None and len(x) <= self._few.most:
            return self._few(x, add, delta)
        if self._few is not None and self._few.rounds:
            x = self._few.rounded_values(x)
        elif self._norm is not None:
            x = self._norm(x)
        if self._padding:
            x = F.pad(x, (0, self._padding))
        return self._finish(self._product(x), delta, add)


class FewTokens:
    """A linear of up to `most` tokens, by Triton's kernels.

    One token is taken in float32, if not as int8: its kernel multiplies so anyway. Several of
    floats are the matrix unit's, which torch's own product knows best.
    """

    def __init__(
        self, stored: Stored, how: Arithmetic, norm: DeviceNorm | None, finish: Epilogue
    ) -> None:
        self._stored, self._norm, self._finish = stored, norm, finish
        self._dtype, self.rounds = how.dtype(stored.scheme), how.by_groups(stored)
        self.most = 1 if stored.scheme.is_float else 64

    def __call__(self, x: Tensor, add: Tensor | None, delta: Tensor | None) -> Tensor:
        if self.rounds:
            codes, scales = self._rounded(x)
            return self._multiplied(codes, scales, self._finish, delta, add)
        dtype = torch.float32 if len(x) == 1 else self._dtype
        if self._norm is not None:
            x = self._norm(x, torch.float32 if dtype == torch.float16 else dtype)
        x, scale = narrowed(x, dtype)
        if scale is not None:  # what follows is of the unscaled
            return self._finish(self._multiplied(x) * scale, delta, add)
        return self._multiplied(x, None, self._finish, delta, add)

    def rounded_values(self, x: Tensor) -> Tensor:
        """x, normed, as its int8 codes restore it: [M, K] float32, for any number of tokens."""
        (codes, scales), (m, k) = self._rounded(x), x.shape
        group = self._stored.scheme.group_size
        padding = -k % group
        grouped = (F.pad(codes, (0, padding)) if padding else codes).view(m, -1, group)
        return (grouped * scales[..., None]).view(m, -1)[:, :k]

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, normed, as int8 codes [M, K] and their scales [M, K / 128]."""
        from bloomq.backends.cuda.triton_norm import rounded

        group, (m, k) = self._stored.scheme.group_size, x.shape
        x = x.contiguous()
        with on_device_of(x):
            if self._norm is not None:
                norm = self._norm
                found: tuple[Tensor, Tensor] = rounded(
                    x, gain=norm.gain, bias=norm.bias, epsilon=norm.epsilon, group=group
                )
                return found
            # Groups know nothing of each other, so a token is cut: a program holds a row, and
            # 57,344 columns of 176B's are too many for one.
            columns = k if k % group else math.gcd(k, _CUT_COLUMNS)
            codes, scales = rounded(x.view(-1, columns), group=group)
        return codes.view(m, k), scales.view(m, -1)

    def _multiplied(
        self,
        x: Tensor,
        scales: Tensor | None = None,
        finish: Epilogue | None = None,
        delta: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        from bloomq.backends.cuda.triton_products import product as multiply

        scheme = self._stored.scheme
        with on_device_of(x):
            y: Tensor = multiply(
                x.contiguous(), self._stored.codes, self._stored.scales, x_scales=scales,
                scheme=scheme.name, group_size=scheme.group_size,
                bias=None if finish is None else finish.bias,
                act=None if finish is None else finish.act,
                delta=None if delta is None else delta.contiguous(),
                add=None if add is None else add.contiguous(),
            )  # fmt: skip
        return y
