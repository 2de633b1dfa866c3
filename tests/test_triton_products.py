"""Triton's products against their torch twins: on a GPU if there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bloomq.backends.cuda.triton_products import (  # noqa: E402
    Blocks,
    blocks_for,
    plain_product,
    plain_weights,
    product,
    takes,
)
from bloomq.grids import GRIDS  # noqa: E402
from bloomq.schemes import NF4_CODEBOOK  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = [
    ("nl4", 32), ("nl4", 128), ("int4", 32), ("int4", 64), ("int4", 128), ("nf4", 64),
    ("int8", 128), ("int6", 64), ("f16", 64), ("bf16", 64), ("f32", 64),
]  # fmt: skip
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def stored(scheme: str, group_size: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales in the stored layout; the first group's scale, or row's, is 0."""
    generator = torch.Generator().manual_seed(n + k)

    def codes(low: int, high: int, dtype: torch.dtype, columns: int = k) -> torch.Tensor:
        return torch.randint(low, high, (n, columns), generator=generator).to(dtype)

    if scheme in DTYPES:
        values = torch.randn(n, k, generator=generator).to(DTYPES[scheme])
        return values.to(DEVICE), torch.empty(0, device=DEVICE)
    groups = torch.rand(n, k // group_size, generator=generator) + 0.5
    groups[0, 0] = 0
    if scheme == "int8":
        return codes(-127, 128, torch.int8).to(DEVICE), groups[:, 0].contiguous().to(DEVICE)
    if scheme == "int6":
        return codes(-32, 32, torch.int8).to(DEVICE), groups.half().to(DEVICE)
    scales = groups if scheme == "nf4" else groups.half()
    return codes(0, 256, torch.uint8, k // 2).to(DEVICE), scales.to(DEVICE)


def tokens(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to(dtype).to(DEVICE)


def allowed(x: torch.Tensor, weights: torch.Tensor, rounded: torch.dtype) -> torch.Tensor:
    """How far sums may be off: each of K additions by 2^-24 of the sum of magnitudes, twice, for
    both sides; each weight by half a unit of the dtype that it is rounded to."""
    magnitudes = x.float().abs() @ weights[:, : x.shape[1]].abs().T
    return magnitudes * (EPSILON[rounded] + 2 * x.shape[1] * 2.0**-24)


def test_a_byte_holds_the_first_of_two_codes_in_its_high_half() -> None:
    codes = torch.tensor([[0x9F, 0x08]], dtype=torch.uint8)
    weights = plain_weights(codes, torch.tensor([[2.0]]), "int4", 4)
    assert weights.tolist() == [[2.0, 14.0, -16.0, 0.0]]
    for scheme, book in (("nf4", NF4_CODEBOOK), ("nl4", GRIDS["nl4"].numbers)):
        entries = plain_weights(codes, torch.tensor([[1.0]]), scheme, 4)
        np.testing.assert_array_equal(entries[0], book[[9, 15, 0, 8]])


@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
def test_a_product_is_its_twins(scheme: str, group_size: int, m: int) -> None:
    """Rows beyond the last whole block, columns that only the codes are padded with."""
    dtype = DTYPES.get(scheme, torch.float16)
    if scheme == "bf16" and m > 4 and DEVICE == "cpu":
        dtype = torch.float16  # the interpreter multiplies matrices of bfloat16 by their bits
        codes = stored("f16", group_size, 37, 256)[0]
        scheme, scales = "f16", None
    else:
        codes, scales = stored(scheme, group_size, 37, 256)
    weights = plain_weights(codes, scales, scheme, group_size)
    x = tokens(m, 250, dtype)
    splits = 2 if m > 4 else 1
    pieces = 4 if scheme == "f32" else 2  # the matrix unit wants 16 columns
    y = product(
        x, codes, scales, scheme=scheme, group_size=group_size,
        blocks=Blocks(16, pieces, warps=4, stages=2, splits=splits),
    )  # fmt: skip
    wanted = plain_product(x, weights)
    rounded = dtype if m > 4 else torch.float32
    assert ((y - wanted).abs() <= allowed(x, weights, rounded)).all()


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_epilogue_is_fused(m: int, splits: int) -> None:
    codes, scales = stored("int8", 128, 40, 256)
    weights = plain_weights(codes, scales, "int8", 128)
    x = tokens(m, 256, torch.float16) / 64
    n_wide = [torch.randn(m, 40, device=DEVICE) for _ in range(2)]
    bias = torch.randn(40, device=DEVICE)
    y = product(
        x, codes, scales, scheme="int8", group_size=128, bias=bias, delta=n_wide[0].half(),
        act="gelu", add=n_wide[1], blocks=Blocks(16, 4, warps=4, stages=2, splits=splits),
    )  # fmt: skip
    wanted = plain_product(x, weights, bias=bias, delta=n_wide[0].half(), act="gelu", add=n_wide[1])
    # gelu is nowhere steeper than 1.13; its exponential and quotient are good to some 2^-21.
    off = 1.13 * allowed(x, weights, torch.float16) + (wanted.abs() + 1) * 2.0**-20
    assert ((y - wanted).abs() <= off).all()


def test_gelu_of_what_is_huge_is_0_or_itself() -> None:
    codes = torch.tensor([[100] * 16, [-100] * 16], dtype=torch.int8, device=DEVICE)
    x = torch.full((1, 16), 100.0, device=DEVICE)
    scales = torch.ones(2, device=DEVICE)
    y = product(x, codes, scales, scheme="int8", group_size=128, act="gelu")
    assert y.tolist() == [[160_000.0, 0.0]]


@pytest.mark.parametrize("m", [1, 17])
def test_int8_activations_meet_int8_codes_exactly(m: int) -> None:
    codes, scales = stored("int8", 128, 40, 256)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (m, 256), generator=generator).to(torch.int8).to(DEVICE)
    x_scales = (torch.randint(1, 9, (m, 2), generator=generator) / 8).to(DEVICE)
    y = product(x, codes, torch.ones_like(scales), scheme="int8", group_size=128, x_scales=x_scales)
    whole = plain_weights(codes, torch.ones_like(scales), "int8", 128)
    wanted = plain_product(x, whole, x_scales=x_scales)  # all sums are below 2^24 / 8
    assert torch.equal(y, wanted)


def test_a_rows_bits_do_not_depend_on_the_rows_beside_it() -> None:
    codes, scales = stored("int4", 32, 40, 256)
    x = tokens(4, 256, torch.float16)
    both = [product(rows, codes, scales, scheme="int4", group_size=32) for rows in (x, x[2:3])]
    assert torch.equal(both[0][2:3], both[1])


@pytest.mark.parametrize("scheme", ["nl4", "int4", "int8", "nf4", "bf16"])
@pytest.mark.parametrize("m", [1, 2, 16, 64])
def test_blocks_are_powers_of_two_and_all_of_a_gpu_has_work(scheme: str, m: int) -> None:
    for n, k in [(1024, 1024), (1024, 4096), (12288, 4096), (43008, 14336), (250880, 1024)]:
        cut = blocks_for(scheme, m, n, k)
        assert cut.rows & (cut.rows - 1) == 0 and cut.pieces & (cut.pieces - 1) == 0
        assert -(-n // cut.rows) * cut.splits >= min(132, 32 * k // 1024)


def test_int8_tokens_are_the_matrix_units_however_few() -> None:
    """Their tile is 128 columns, so a program's rows decide what is in flight."""
    for m in (1, 4):
        assert blocks_for("int8", m, 4096, 4096, torch.int8).rows == 32
        assert blocks_for("int8", m, 4096, 4096, torch.int8).splits == 3
        assert blocks_for("int8", m, 4096, 4096, torch.float32).rows <= 8


def test_it_says_what_it_takes() -> None:
    assert takes(1, 4096, scheme="int4", group_size=32)
    assert takes(64, 4096, scheme="int8", group_size=128, dtype=torch.int8)
    assert not takes(65, 4096, scheme="int4", group_size=32)
    assert not takes(0, 4096, scheme="int4", group_size=32)
    assert not takes(1, 48, scheme="int4", group_size=32)
    assert not takes(1, 96, scheme="nf4", group_size=64)
    assert not takes(1, 64, scheme="nl4", group_size=128)
    assert not takes(1, 4096, scheme="int4", group_size=32, dtype=torch.int8)
    assert not takes(1, 4096, scheme="int8", group_size=128, dtype=torch.float64)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bloomq.backends.cuda.triton_gemv import gemv
kind, group, stages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
types = {"out": "*fp32", "x": "*bf16", "codes": "*i32", "scales": "*fp16", "n": "i32",
         "magic": "i32"}
if kind == "book":
    types["book"] = "*fp32"
fixed = {"K": 4096, "X": 4096, "KIND": kind, "WIDTH": 32, "GROUP": group, "ACT": "gelu", "M": 1,
         "BN": 8, "PIECES": 32, "STAGES": stages, "bias": None, "delta": None, "add": None}
names = gemv.arg_names
fixed |= {"book": None} if kind == "int4" else {}
source = ASTSource(
    fn=gemv, signature={name: types.get(name, "constexpr") for name in names}, constexprs=fixed,
    attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},
)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(made.asm["ptx"])
"""


COMPILE_ONES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bloomq.backends.cuda import triton_gemv, triton_products
types = {"out": "*fp32", "sums": "*fp32", "x": "*fp32", "codes": "*fp32", "m": "i32", "n": "i32",
         "magic": "i32"}
fixed = {"K": 64, "X": 64, "KIND": "float", "WIDTH": 4, "GROUP": 0, "ACT": None, "BN": 4,
         "PIECES": 16, "STAGES": 3, "M": 4, "SPLITS": 2, "BLOCK": 1024}
for kernel, ones in ((triton_gemv.gemv, "n"), (triton_products.finish, "m"),
                     (triton_products.finish, "n")):
    names = kernel.arg_names
    read = {name: types.get(name, "constexpr") for name in names} | {ones: "constexpr"}
    given = {name: fixed.get(name) for name in names if read[name] == "constexpr"} | {ones: 1}
    source = ASTSource(fn=kernel, signature=read, constexprs=given)
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, ones)
"""


def compiled(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
    )


def test_a_size_of_1_is_no_tensor_and_compiles() -> None:
    """Triton makes a constant of it, as an adapter of one rank has, or a step of one token."""
    done = compiled(COMPILE_ONES)
    assert done.stdout.split("\n") == ["gemv n", "finish m", "finish n", ""], done.stderr


def test_it_compiles_for_an_h200_and_loads_16_bytes_at_a_time() -> None:
    done = compiled(COMPILE, "int4", "32", "3")
    assert ".target sm_90" in done.stdout, done.stderr
    assert "cp.async.cg.shared.global" in done.stdout and ", 0x10" in done.stdout
    assert ".local" not in done.stdout  # no register lies in memory


def test_a_book_compiles_for_an_h200_and_its_codes_come_16_bytes_at_a_time() -> None:
    done = compiled(COMPILE, "book", "64", "1")
    assert ".target sm_90" in done.stdout, done.stderr
    assert "ld.global.L1::evict_first.L2::cache_hint.v4.b32" in done.stdout
    assert ".local" not in done.stdout
