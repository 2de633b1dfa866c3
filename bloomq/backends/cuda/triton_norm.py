"""Layer norm and the rounding of activations to int8, in Triton: what a product is fed with.

One program has one token, whose values stay in registers between the two passes of the norm; so
bytes are those of x once and of the result once (7b1: 16 KB in, 8 KB out a token), and the time is
a launch's. No share of the bandwidth is to be reached before there are some 500 tokens.

Invariant: the same arithmetic as `reference.layer_norm` and `reference.round_activations`, in
float32, but for the order of sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

MOST_COLUMNS = 32_768  # of a row that 16 warps hold in registers: 64 float32 a thread


@triton.jit
def rounded_to_even(x):
    """x to the nearest whole number, of equals the even one, for |x| < 2^22: at 1.5 * 2^23 float32
    has no fractions. Not to be contracted with what made x: launch with enable_fp_fusion=False."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def norm_rows(
    out, out_scales, x, gain, bias, epsilon,
    C: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Row by row: x [M, C], normed if NORM -> out [M, C]; with GROUP > 0 as int8 codes, and the
    scale of each GROUP columns in out_scales [M, GROUPS]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    held = column < C
    y = tl.load(x + row * C + column, mask=held, other=0.0).to(tl.float32)
    if NORM:
        centred = tl.where(held, y - tl.sum(y, axis=0) / C, 0.0)
        spread = tl.sqrt_rn(tl.sum(centred * centred, axis=0) / C + epsilon)
        y = tl.div_rn(centred, spread) * tl.load(gain + column, mask=held, other=0.0)
        y += tl.load(bias + column, mask=held, other=0.0)
    if GROUP > 0:
        grouped = tl.reshape(y, (BLOCK // GROUP, GROUP))
        peak = tl.max(tl.abs(grouped), axis=1)
        faint = peak < 1e-30  # 127 / peak would be infinite
        inverse = tl.where(faint, 0.0, tl.div_rn(127.0, tl.where(faint, 1.0, peak)))
        codes = tl.reshape(rounded_to_even(grouped * inverse[:, None]), (BLOCK,))
        tl.store(out + row * C + column, codes.to(tl.int8), mask=held)
        group = tl.arange(0, BLOCK // GROUP)
        scale = tl.div_rn(peak, 127.0)
        tl.store(out_scales + row * GROUPS + group, scale, mask=group < GROUPS)
    else:
        tl.store(out + row * C + column, y.to(out.dtype.element_ty), mask=held)


def takes_columns(columns: int) -> bool:
    """Can `layer_norm` and `rounded` take rows of so many columns?"""
    return 1 <= columns <= MOST_COLUMNS


def _launch(
    x: torch.Tensor, out: torch.Tensor, scales: torch.Tensor | None,
    gain: torch.Tensor | None, bias: torch.Tensor | None, epsilon: float, group: int,
) -> None:  # fmt: skip
    m, c = x.shape
    block = max(triton.next_power_of_2(c), group, 32)
    norm_rows[(m,)](
        out, scales, x, gain, bias, epsilon, C=c, BLOCK=block, GROUP=group,
        GROUPS=triton.cdiv(c, group) if group else 0, NORM=gain is not None,
        num_warps=min(16, max(1, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip


def layer_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) * gain + bias over the columns of x [M, C], whose rows
    lie without gaps; gain, bias: float32 [C]."""
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _launch(x, out, None, gain, bias, epsilon, 0)
    return out


def rounded(
    x: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 0.0,
    group: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, C], with a gain and a bias its layer norm, as int8 codes [M, C] and the scale of each
    `group` columns, float32 [M, C / group]. group: a power of two."""
    m, c = x.shape
    codes = torch.empty((m, c), dtype=torch.int8, device=x.device)
    scales = torch.empty((m, triton.cdiv(c, group)), dtype=torch.float32, device=x.device)
    _launch(x, codes, scales, gain, bias, epsilon, group)
    return codes, scales


# -- the same in plain torch -----------------------------------------------------------------------


def plain_layer_norm(
    x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """`layer_norm`'s twin, float32."""
    centred = x.float() - x.float().mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    return centred / torch.sqrt(variance + epsilon) * gain + bias


def plain_rounded(x: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """`rounded`'s twin, of what is normed already."""
    m, c = x.shape
    grouped = F.pad(x.float(), (0, -c % group)).view(m, -1, group)
    peak = grouped.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(peak < 1e-30, 0, 127 / torch.where(peak == 0, 1, peak))
    codes = torch.round(grouped * inverse).to(torch.int8).view(m, -1)[:, :c].contiguous()
    return codes, (peak / 127)[..., 0]
