"""Triton's layer norm and rounding against their torch twins."""

from __future__ import annotations

import numpy as np
import pytest

from bloomq.backends.reference import layer_norm as reference_norm
from bloomq.weights import Norm

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bloomq.backends.cuda.triton_norm import (  # noqa: E402
    layer_norm,
    plain_layer_norm,
    plain_rounded,
    rounded,
    takes_columns,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given(m: int, c: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, C] with a mean of 3, gain and bias."""
    generator = torch.Generator().manual_seed(c)
    x, gain, bias = (torch.randn(s, generator=generator) for s in ((m, c), (c,), (c,)))
    return (2 * x + 3).to(DEVICE), gain.to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize("columns", [32, 80, 1024])
def test_a_norm_is_its_twins_and_the_references(columns: int) -> None:
    x, gain, bias = given(3, columns)
    y = layer_norm(x, gain, bias, 1e-5)
    # Sums of C values in another order, each off by 2^-24: of a normed value of 4, say, and gain 3.
    assert (y - plain_layer_norm(x, gain, bias, 1e-5)).abs().max() <= 12 * columns * 2.0**-24 + 1e-6
    norm = Norm("ln_1", gain.cpu().numpy(), bias.cpu().numpy(), 1e-5)
    wanted = reference_norm(x.cpu().numpy(), norm)
    np.testing.assert_allclose(y.cpu(), wanted, atol=12 * columns * 2.0**-24 + 1e-6, rtol=0)


def test_a_norm_in_16_bits_is_the_norm_rounded_once() -> None:
    x, gain, bias = given(2, 80)
    whole = layer_norm(x, gain, bias, 1e-5)
    half = layer_norm(x, gain, bias, 1e-5, out_dtype=torch.float16)
    assert torch.equal(half, whole.half())


def test_a_row_of_one_value_is_the_bias() -> None:
    _, gain, bias = given(1, 64)
    y = layer_norm(torch.full((1, 64), 7.0, device=DEVICE), gain, bias, 1e-5)
    assert torch.equal(y[0], bias)


@pytest.mark.parametrize("columns", [64, 200, 256])
def test_rounding_has_its_twins_bits(columns: int) -> None:
    x, _, _ = given(3, columns)
    x[1] = 0
    x[2, :5] = torch.tensor([1e-31, 2.5, 127.0, -0.5, 1.5])  # ties, of a peak of 127
    codes, scales = rounded(x)
    wanted, wanted_scales = plain_rounded(x)
    assert torch.equal(codes, wanted) and torch.equal(scales, wanted_scales)
    assert codes[2, :5].tolist() == [0, 2, 127, 0, 2] and not codes[1].any()


def test_norm_and_rounding_are_one_kernel() -> None:
    x, gain, bias = given(3, 256)
    codes, scales = rounded(x, gain=gain, bias=bias, epsilon=1e-5)
    wanted, wanted_scales = plain_rounded(layer_norm(x, gain, bias, 1e-5))
    assert torch.equal(codes, wanted) and torch.equal(scales, wanted_scales)


def test_it_says_how_many_columns_it_takes() -> None:
    assert takes_columns(14_336)
    assert not takes_columns(0) and not takes_columns(40_000)
