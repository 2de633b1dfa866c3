"""Triton's decode attention against its torch twin and the reference backend."""

from __future__ import annotations

import numpy as np
import pytest

from bloomq.backends.reference import ReferenceAttention
from bloomq.layers import slopes

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bloomq.backends.cuda.triton_attention import (  # noqa: E402
    decode_attention,
    plain_decode_attention,
    splits_for,
    takes_heads,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, CAPACITY, ROWS = 3, 160, 4
Held = tuple[torch.Tensor, torch.Tensor]


def held(dtype: torch.dtype, head_dim: int) -> Held:
    """A cache full of random codes, and scales for int8."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = (2, ROWS * CAPACITY + 1, HEADS, head_dim)
    if dtype == torch.int8:
        codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        return codes.to(DEVICE), (torch.rand(shape[:3], generator=generator) / 50).to(DEVICE)
    codes = torch.randn(shape, generator=generator).to(dtype)
    return codes.to(DEVICE), torch.empty(0, device=DEVICE)


def asked(lengths: list[int], head_dim: int) -> tuple[torch.Tensor, ...]:
    """qkv, rows (in no order), lengths, slopes."""
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(len(lengths), HEADS * 3 * head_dim, generator=generator)
    rows = torch.tensor([2, 0, 1, 3, 0][: len(lengths)])
    slope = torch.from_numpy(slopes(HEADS))
    return tuple(part.to(DEVICE) for part in (qkv, rows, torch.tensor(lengths), slope))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float32, 8), (torch.float16, 24), (torch.int8, 16)],
    ids=["f32", "f16", "int8"],
)  # fmt: skip
def test_attention_is_its_twins(dtype: torch.dtype, head_dim: int, splits: int) -> None:
    """A full row, a first token, a whole block of keys before the new one, and padding."""
    codes, scales = held(dtype, head_dim)
    qkv, rows, lengths, slope = asked([160, 1, 33, 70, 0], head_dim)
    before = codes.clone(), scales.clone()
    y = decode_attention(qkv, codes, scales, rows, lengths, slope, capacity=CAPACITY, splits=splits)
    wanted = plain_decode_attention(qkv, *before, rows, lengths, slope, capacity=CAPACITY)
    # Values below 4; 160 weights that add up to 1, each from a score below 40 off by 2^-22 of it.
    assert (y - wanted).abs().max() <= 4 * (2 * 160 * 2.0**-24 + 2 * 40 * 2.0**-22)
    assert torch.equal(codes, before[0]) and torch.equal(scales, before[1])  # the new ones stored
    assert not y[4].any()


def test_padding_stores_nothing() -> None:
    codes, scales = held(torch.float16, 8)
    before = codes.clone()
    qkv, rows, lengths, slope = asked([0, 0], 8)
    y = decode_attention(qkv, codes, scales, rows, lengths, slope, capacity=CAPACITY)
    assert not y.any() and torch.equal(codes, before)


def test_what_lies_behind_a_row_is_not_read() -> None:
    codes, scales = held(torch.float32, 8)
    codes[:, CAPACITY + 40 : 2 * CAPACITY] = float("nan")  # row 1 beyond its 40 tokens
    qkv, _, lengths, slope = asked([41], 8)
    rows = torch.tensor([1], device=DEVICE)
    y = decode_attention(qkv, codes, scales, rows, lengths, slope, capacity=CAPACITY, splits=2)
    assert torch.isfinite(y).all()


def test_a_key_that_is_no_number_makes_the_output_none() -> None:
    codes, scales = held(torch.float32, 8)
    codes[0, 10, 1] = float("nan")  # row 0, token 10, head 1
    qkv, _, lengths, slope = asked([41], 8)
    rows = torch.tensor([0], device=DEVICE)
    y = decode_attention(qkv, codes, scales, rows, lengths, slope, capacity=CAPACITY, splits=2)
    assert torch.isnan(y.view(HEADS, 8)).all(dim=1).tolist() == [False, True, False]


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it() -> None:
    codes, scales = held(torch.float16, 8)
    qkv, rows, lengths, slope = asked([100, 50, 20], 8)
    both = decode_attention(
        qkv, codes.clone(), scales, rows, lengths, slope, capacity=CAPACITY, splits=2
    )
    alone = decode_attention(
        qkv[1:2], codes, scales, rows[1:2], lengths[1:2], slope, capacity=CAPACITY, splits=2
    )
    assert torch.equal(both[1:2], alone)


def test_attention_is_the_references() -> None:
    """Of 20 tokens one after another in a float32 cache."""
    head_dim, capacity = 8, 32
    reference = ReferenceAttention(0, HEADS, head_dim)
    qkv = asked([1] * 5, head_dim)[0][:1].repeat(20, 1) * torch.linspace(0.5, 2, 20)[:, None].to(
        DEVICE
    )
    codes = torch.zeros(2, capacity + 1, HEADS, head_dim, device=DEVICE)
    slope = torch.from_numpy(slopes(HEADS)).to(DEVICE)
    rows = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for t in range(20):
        length = torch.tensor([t + 1], device=DEVICE)
        y = decode_attention(
            qkv[t : t + 1], codes, None, rows, length, slope, capacity=capacity, splits=1
        )
    split = qkv.cpu().numpy().reshape(20, HEADS, 3, head_dim)
    wanted = reference._attend(split[-1:, :, 0], split[:, :, 1], split[:, :, 2], 19)
    np.testing.assert_allclose(y.cpu().numpy(), wanted.reshape(1, -1), atol=1e-5, rtol=0)


def test_splits_come_of_heads_and_capacity_alone() -> None:
    assert splits_for(32, 2048) == 9 and splits_for(112, 2048) == 3 and splits_for(16, 64) == 1


def test_it_says_which_heads_it_takes() -> None:
    assert takes_heads(128, torch.float16) and takes_heads(80, torch.int8)
    assert not takes_heads(100, torch.float16) and not takes_heads(128, torch.bfloat16)
