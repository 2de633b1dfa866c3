"""The Numba kernels against their NumPy twins: every scheme, tier, odd size, batch and extreme.

Attention has a file of its own, test_attention.py.

Bounds are derived: `EPS` is float32's unit in the last place of 1, and sums are bounded by the
sum of their terms' magnitudes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numba import float32, types, void
from numba.extending import intrinsic

from bloomq.backends import reference
from bloomq.backends.numba_cpu import layers, recorded
from bloomq.backends.numba_cpu.jit import compiled
from bloomq.backends.numba_cpu.layers import (
    NumbaBackend,
    NumbaEmbedding,
    NumbaLinear,
)
from bloomq.backends.numba_cpu.memory import address
from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.prologue import norm_rows
from bloomq.backends.numba_cpu.simd import TIERS, V16F, Vectors
from bloomq.backends.numba_cpu.threads import Pool, physical_cores
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError, UsageError
from bloomq.layers import Span, slopes
from bloomq.schemes import TILE, Scheme, get_scheme, round_up
from bloomq.weights import Matrix, Norm

EPS = float(np.finfo(np.float32).eps)  # 2^-23
BEST = best_tier(cpu_features())
TIERS_HERE = [tier for tier, needs in TIERS.items() if cpu_features().issuperset(needs)]
SCHEMES = [
    get_scheme("int4", 32), get_scheme("int4", 128), get_scheme("nl4", 32), get_scheme("nl4", 64),
    get_scheme("int6"), get_scheme("int8"), get_scheme("nf4"), get_scheme("f32"), get_scheme("f16"),
    get_scheme("bf16"),
]  # fmt: skip
# A kernel takes some 5 s to compile, so every scheme runs on the best tier only. On AVX2, the most
# common one, those that differ in how they unpack; elsewhere the default.
ON_OTHER_TIERS = {"avx2": ("nl4-g64", "int4-g32", "int6", "int8", "nf4")}
CASES = [
    pytest.param(scheme, tier, id=f"{scheme.label}-{tier}")
    for scheme in SCHEMES
    for tier in TIERS_HERE
    if tier == BEST or scheme.label in ON_OTHER_TIERS.get(tier, ("nl4-g64",))
]
INT8 = get_scheme("int8")  # the head's, whose activations have two limbs
ON_BEST = [pytest.param(scheme, id=scheme.label) for scheme in SCHEMES]
# One weight; less than a tile and a group; over a pair of tiles and a group by one; whole pairs.
SIZES = [(1, 1), (15, 31), (33, 65), (47, 129), (16, 32), (100, 200), (96, 256)]
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17]  # one, four and eight tokens' kernels, and their blocks
# Columns that no group size divides, three shares of linear._COLUMNS; batches of more blocks than
# linear._FEW_BLOCKS: 40 tokens of 8 (avx512-vnni), 17 of 4 (the other tiers). Sizes of groups are
# no tier's matter: others run on the best one.
LONG, LONG_BATCHES = (47, 1100), (1, 2, 4, 5, 8, 9, 17, 40)
LONG_CASES = [
    pytest.param(scheme, tier, id=f"{scheme.label}-{tier}")
    for tier in TIERS_HERE
    for scheme in SCHEMES
    if tier == BEST or scheme.label in ON_OTHER_TIERS["avx2"]
]
# The head of the largest BLOOM: 3.6e9 weights, so its last row begins beyond 2^31 of them; in int8
# beyond 2^31 bytes too, in f16 beyond 2^32.
HUGE = (250_880, 14_336)
HUGE_SCHEMES = ["int4", "nl4", "int8", "nf4", "f16"]


AVX2_SCRIPT = """
import sys
import numpy as np
import bloomq
model = bloomq.load()
print(model.backend.tier)
generation = model.generate("Once upon a time", max_new_tokens=24)
print(*generation.ids)
ids = np.arange(100, 140)
with open(sys.argv[1], "wb") as file:
    np.save(file, model(ids).logits)
"""
AVX2_FEATURES = "+64bit,+avx,+avx2,+bmi,+bmi2,+cx16,+cx8,+f16c,+fma,+fxsr,+lzcnt,+mmx,+movbe," \
    "+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"  # fmt: skip


# -- compiling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead() -> Iterator[None]:
    yield from compiling_ahead("test_kernels")


def compiling_ahead(module: str) -> Iterator[None]:
    """A second process compiles, from the other end, what a module's tests will ask for: with an
    empty cache compiling takes nearly all of their time, and a process compiles on one core."""
    code = f"import {module}; {module}.compile_from_the_end()"
    helper = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    yield
    helper.terminate()
    helper.wait()


def compile_from_the_end() -> None:
    """What the tests ask for in the order of CASES, and then on every tier."""
    if "avx2" in TIERS_HERE:
        run_lowered_to_avx2(os.devnull)
    for tier in TIERS_HERE:
        linear(tier, random_matrix(INT8, (16, 32)), limbs=2)
    for case in [*reversed(LONG_CASES), *reversed(CASES)]:
        scheme, tier = case.values
        linear(tier, random_matrix(scheme, (16, 32)))


def run_lowered_to_avx2(target: str | os.PathLike[str]) -> str:
    """What AVX2_SCRIPT prints in a process whose processor has AVX2 at most."""
    return run_script(target, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=AVX2_FEATURES)


def run_script(target: str | os.PathLike[str], **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", AVX2_SCRIPT, str(target)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


POOLS = {threads: Pool(threads) for threads in (1, 2, 7)}


def linear(
    tier: str, weight: Matrix, bias: np.ndarray | None = None, norm: Norm | None = None,
    act: str | None = None, threads: int = 2, limbs: int = 1,
) -> NumbaLinear:  # fmt: skip
    """A layer on a tier of the test's choice."""
    return NumbaLinear(POOLS[threads], tier, weight, bias, norm, act, limbs)


@dataclass(frozen=True, eq=False)
class Case:
    """A weight with all that may surround it, and some activations."""

    weight: Matrix
    bias: np.ndarray
    norm: Norm
    x: np.ndarray
    add: np.ndarray
    delta: np.ndarray

    @property
    def group(self) -> int:
        return self.weight.scheme.group_size


def random_matrix(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> Matrix:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[0, : shape[1] // 2] = 0  # whole groups of zeros too: scale 0
    return Matrix("w", scheme, shape, scheme.quantize(w))


def random_case(scheme: Scheme, shape: tuple[int, int], batch: int, seed: int = 0) -> Case:
    n, k = shape
    rng = np.random.default_rng([seed, n, k, batch])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    norm = Norm("ln", 1 + 0.2 * normal(k), 0.2 * normal(k), 1e-5)
    x, add, delta = normal(batch, k), normal(batch, n), normal(batch, n)
    return Case(random_matrix(scheme, shape), normal(n), norm, x, add, delta)


def product(case: Case, tier: str, x: np.ndarray | None = None, threads: int = 2) -> np.ndarray:
    """x @ W.T by the compiled kernel, nothing around it."""
    return linear(tier, case.weight, threads=threads)(case.x if x is None else x)


def twin(
    case: Case, *, bias: bool = False, gelu: bool = False, add: bool = False, norm: bool = False,
    delta: bool = False, limbs: int = 1,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The same in NumPy, float64 from the rounded operands on, and how far a right kernel may be.

    Integer schemes: the products of codes are exact; what rounds is one fused multiply-add a group,
    its scale (a product of two or three float32) and the twin's restored values: (groups + 6) EPS
    of the terms' magnitude; the sum of two limbs is exact too, but may be rounded once to float32.
    Float schemes: one fused multiply-add a column within a group, then one addition a group. A norm
    before it moves x by some EPS, and where x stood close to the middle between two codes by a
    whole code.
    """
    scheme, x = case.weight.scheme, case.x
    if norm:
        x = reference.layer_norm(x, case.norm)
    groups = round_up(x.shape[1], case.group) // case.group
    if scheme.is_float:
        a, w, steps = x, case.weight.dequantize(), case.group + groups
    else:
        with np.errstate(over="ignore"):  # 127 / peak of a group under 1e-36: not used
            a = reference.round_activations(x, case.group, limbs)
        w = reference.integer_weights(case.weight)
        steps = groups + 5 + limbs
    a64, w64 = a.astype(np.float64), w.astype(np.float64)
    # 1e-40: float32 loses digits under 1e-38.
    bound = steps * EPS * (np.abs(a64) @ np.abs(w64).T) + 1e-40
    if norm:
        # Sums of k terms in another order: k EPS at most, of the mean and of the variance.
        slack = (8 + x.shape[1]) * EPS
        moved = slack * (np.abs(x) + np.abs(case.norm.bias) + np.abs(case.norm.gain))
        if not scheme.is_float:
            moved += code_flips(x, case.group, moved, limbs)
        bound += moved @ np.abs(w64).T
    y = a64 @ w64.T
    if bias:
        y, bound = y + case.bias, bound + EPS * np.abs(y + case.bias)
    if delta:
        y, bound = y + case.delta, bound + EPS * np.abs(y + case.delta)
    if gelu:
        # Its slope is at most 1.13; 2e-7 of exp and the roundings of u, which is at most 5 where it
        # matters: 16 EPS of x.
        bound = 1.13 * bound + 16 * EPS * np.abs(y)
        y = exact_gelu(y)
    if add:
        y, bound = y + case.add, bound + EPS * (np.abs(y) + np.abs(case.add))
    return y, bound


def code_flips(x: np.ndarray, group: int, moved: np.ndarray, limbs: int) -> np.ndarray:
    """A code's worth [M, K] of the last limb where moving x by `moved` may change its int8 code."""
    m, k = x.shape
    padded = np.zeros((m, round_up(k, group)))
    padded[:, :k] = x
    peak = np.abs(padded.reshape(m, -1, group)).max(axis=2)
    step = np.repeat(peak / 127, group, axis=1)[:, :k] / 254 ** (limbs - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        real = np.where(step > 0, x / step, 0)
        near = 0.5 - np.abs(real - np.rint(real)) < 4 * moved / step
    return np.where((step > 0) & near, step, 0)


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """BLOOM's gelu in float64, x / (1 + e^-2u), which does not cancel as 1 + tanh u does."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * 0.79788456 * x * (1 + 0.044715 * x * x)))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# -- linear ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "tier"), CASES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_linear_equals_its_twin_for_odd_sizes_and_every_batch(scheme, tier, shape):
    for batch in BATCHES:
        case = random_case(scheme, shape, batch)
        expected, bound = twin(case)
        assert (np.abs(product(case, tier) - expected) <= bound).all(), batch


@pytest.mark.parametrize(("scheme", "tier"), CASES)
def test_linear_adds_norm_bias_delta_gelu_and_residual_in_this_order(scheme, tier):
    for bits in range(32):
        norm, bias, gelu, add, delta = (bool(bits >> i & 1) for i in range(5))
        for batch in (1, 3, 9):
            case = random_case(scheme, (47, 129), batch, seed=bits)
            layer = linear(
                tier, case.weight, case.bias if bias else None,
                case.norm if norm else None, "gelu" if gelu else None,
            )  # fmt: skip
            y = layer(case.x, case.add if add else None, case.delta if delta else None)
            expected, bound = twin(case, norm=norm, bias=bias, gelu=gelu, add=add, delta=delta)
            assert (np.abs(y - expected) <= bound).all(), (norm, bias, gelu, add, delta, batch)


@pytest.mark.parametrize("shape", [(100, 200), (4200, 512)], ids=["one-thread", "parallel"])
@pytest.mark.parametrize(("scheme", "tier"), CASES)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(scheme, tier, shape):
    case = random_case(scheme, shape, 17)
    weight_bytes = sum(part.nbytes for part in case.weight.parts.values())
    assert (weight_bytes >= 1 << 20) == (shape[0] > 1000)  # threads._ALONE_BYTES

    def run(x: np.ndarray, threads: int) -> np.ndarray:
        layer = linear(tier, case.weight, case.bias, case.norm, "gelu", threads)
        return layer(x)

    singles = np.concatenate([run(case.x[i : i + 1], 1) for i in range(17)])
    for batch in BATCHES:
        for threads in (1, 2):
            assert same_bits(run(case.x[:batch], threads), singles[:batch]), (batch, threads)


@pytest.mark.parametrize(("scheme", "tier"), LONG_CASES)
def test_long_rows_equal_their_twin_in_blocks_of_columns_too(scheme, tier):
    for batch in LONG_BATCHES:
        case = random_case(scheme, LONG, batch)
        expected, bound = twin(case)
        assert (np.abs(product(case, tier) - expected) <= bound).all(), batch


@pytest.mark.parametrize(("scheme", "tier"), LONG_CASES)
def test_a_long_row_has_the_same_bits_in_any_batch(scheme, tier):
    case = random_case(scheme, LONG, max(LONG_BATCHES))
    layer = linear(tier, case.weight, case.bias, case.norm, "gelu", threads=1)
    singles = np.concatenate([layer(case.x[i : i + 1], case.add[i : i + 1]) for i in range(40)])
    for batch in LONG_BATCHES:
        assert same_bits(layer(case.x[:batch], case.add[:batch]), singles[:batch]), batch


@pytest.mark.parametrize("scheme", ON_BEST)
def test_more_threads_than_tiles_leave_no_output_unwritten(scheme):
    for shape in ((17, 64), (17, 131072)):  # two tiles; the second is above _ALONE_BYTES
        case = random_case(scheme, shape, 9)
        assert same_bits(product(case, BEST, threads=7), product(case, BEST, threads=1))


@pytest.mark.parametrize(("scheme", "tier"), CASES)
def test_a_row_of_zeros_gives_exactly_the_bias(scheme, tier):
    case = random_case(scheme, (47, 129), 3)
    layer = linear(tier, case.weight, case.bias, None, None)
    y = layer(np.zeros((3, 129), np.float32))
    assert same_bits(y, np.tile(case.bias, (3, 1)))


@pytest.mark.parametrize("scheme", ON_BEST)
def test_weights_of_zeros_give_exactly_zero(scheme):
    weight = Matrix("w", scheme, (33, 65), scheme.quantize(np.zeros((33, 65), np.float32)))
    case = random_case(scheme, (33, 65), 2)
    layer = linear(BEST, weight, None, None, None)
    assert not layer(case.x).any()


@pytest.mark.parametrize(("scheme", "tier"), CASES)
def test_massive_and_tiny_activations_stay_within_the_bound(scheme, tier):
    case = random_case(scheme, (47, 200), 9)
    case.x[0, 3] = 3500.0  # BLOOM's massive activations
    case.x[1, ::7] *= 3500
    case.x[2] *= np.float32(1e-38)  # near the least normal float32
    case.x[3] *= np.float32(1e-30)  # where 127 / peak is still finite
    case.x[4, 1:] = 0
    case.x[5] = 3e35  # sums reach 1e37
    expected, bound = twin(case)
    y = product(case, tier)
    assert np.isfinite(y).all()
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize(("scheme", "tier"), CASES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_nan_or_infinity_in_never_gives_a_plausible_number(scheme, tier, bad):
    for batch in (1, 4, 9):
        case = random_case(scheme, (47, 129), batch)
        clean = product(case, tier)
        x = case.x.copy()
        x[batch // 2, 128] = bad  # the lone column of the last group
        for norm in (None, case.norm):
            layer = linear(tier, case.weight, case.bias, norm, "gelu")
            assert not np.isfinite(layer(x)[batch // 2]).any()
        y = product(case, tier, x)
        others = np.arange(batch) != batch // 2
        assert not np.isfinite(y[batch // 2]).any()
        assert same_bits(y[others], clean[others])


@pytest.mark.parametrize("scheme", ON_BEST)
def test_two_python_threads_at_once_get_the_right_bits(scheme):
    cases = [random_case(scheme, (4200, 512), 4, seed) for seed in range(2)]
    layers = [linear(BEST, c.weight, c.bias, c.norm, "gelu") for c in cases]
    expected = [layer(case.x) for layer, case in zip(layers, cases, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not same_bits(layers[i](cases[i].x), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_two_limbs_equal_their_twin_for_odd_sizes_and_every_batch(tier):
    for shape in SIZES:
        for batch in BATCHES:
            case = random_case(INT8, shape, batch)
            expected, bound = twin(case, limbs=2)
            y = linear(tier, case.weight, limbs=2)(case.x)
            assert (np.abs(y - expected) <= bound).all(), (shape, batch)
    case = random_case(INT8, (47, 129), 9)
    layer = linear(tier, case.weight, case.bias, case.norm, "gelu", limbs=2)
    expected, bound = twin(case, norm=True, bias=True, gelu=True, add=True, limbs=2)
    assert (np.abs(layer(case.x, case.add) - expected) <= bound).all()


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_two_limbs_are_254_times_as_close_to_what_was_given(tier):
    case = random_case(INT8, (64, 1024), 9)
    exact = case.x.astype(np.float64) @ case.weight.dequantize().astype(np.float64).T
    one, two = (linear(tier, case.weight, limbs=limbs)(case.x) for limbs in (1, 2))
    # Either deviation is known to 1 / sqrt(2 * 576) from its 576 outputs, their ratio to 4 %.
    assert np.std(two - exact) == pytest.approx(np.std(one - exact) / 254, rel=0.1)


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_two_limbs_have_the_same_bits_in_any_batch_and_with_any_number_of_threads(tier):
    for shape in ((100, 200), (4200, 512), LONG):
        case = random_case(INT8, shape, 40)
        layers = [
            linear(tier, case.weight, case.bias, case.norm, "gelu", threads, limbs=2)
            for threads in (1, 2)
        ]
        singles = np.concatenate([layers[0](case.x[i : i + 1]) for i in range(40)])
        for batch in (*BATCHES, 40):
            for layer in layers:
                assert same_bits(layer(case.x[:batch]), singles[:batch]), (shape, batch)


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_two_limbs_keep_extremes_within_the_bound_and_not_a_number_for_what_it_is(tier):
    case = random_case(INT8, (47, 200), 9)
    case.x[0, 3] = 3500.0
    case.x[1] *= np.float32(1e-38)
    case.x[2] *= np.float32(1e-30)
    case.x[3] = 0
    case.x[4] = 3e35
    layer = linear(tier, case.weight, limbs=2)
    (expected, bound), y = twin(case, limbs=2), layer(case.x)
    assert (np.abs(y - expected) <= bound).all()
    for bad in (np.nan, np.inf):
        case.x[5, 199] = bad
        found = layer(case.x)
        assert not np.isfinite(found[5]).any()
        assert same_bits(np.delete(found, 5, axis=0), np.delete(y, 5, axis=0))


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_every_tier_gives_the_same_bits_for_one_integer_group(tier):
    scheme = get_scheme("int4", 64)  # one group: no float sum whose order could differ
    case = random_case(scheme, (33, 64), 9)
    assert same_bits(product(case, tier), product(case, "portable"))


# -- matrices of more than 2^31 weights ------------------------------------------------------------


def huge_and_its_last_rows(name: str) -> tuple[Matrix, Matrix]:
    """A matrix of HUGE size, zeros but for its last pair of tiles, and that pair alone. The system
    backs zeros that nobody writes with one page."""
    scheme = get_scheme(name)
    last = random_matrix(scheme, (2 * TILE, HUGE[1]))
    parts = {}
    for part, spec in scheme.parts(HUGE).items():
        stored = np.asarray(last.parts[part])
        try:
            parts[part] = np.zeros(spec.shape, stored.dtype)
        except MemoryError:
            pytest.skip("this system gives out no more memory than it has")
        parts[part][-len(stored) :] = stored
    return Matrix("huge", scheme, HUGE, parts), last


@pytest.mark.parametrize("name", HUGE_SCHEMES)
def test_the_last_rows_of_a_matrix_of_more_than_2_31_weights_are_the_right_ones(name):
    huge, last = huge_and_its_last_rows(name)
    layer, alone = linear(BEST, huge), linear(BEST, last)
    for batch in (1, 9, 40):  # each number of tokens of a block, and blocks of columns
        x = np.random.default_rng(batch).standard_normal((batch, HUGE[1])).astype(np.float32)
        y = layer(x)
        assert same_bits(np.ascontiguousarray(y[:, -2 * TILE :]), alone(x)), batch
        assert not y[:, : -2 * TILE].any(), batch


@pytest.mark.parametrize("name", HUGE_SCHEMES)
def test_the_last_ids_of_a_table_of_more_than_2_31_weights_find_their_rows(name):
    huge, last = huge_and_its_last_rows(name)
    lanes = np.array([0, 15, 16, 31])
    found = NumbaEmbedding(POOLS[2], huge)(np.concatenate([HUGE[0] - 2 * TILE + lanes, [0]]))
    assert same_bits(found[:4], NumbaEmbedding(POOLS[2], last)(lanes))
    assert not found[4].any()


# -- exp, gelu, norm -------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def apply(typingctx, tier, function, x):
    """16 float32 at an address, in place: `Vectors.exp` or `Vectors.gelu`."""
    method = function.literal_value

    def codegen(context, builder, signature, args):
        vectors = Vectors(builder, tier.literal_value)
        vectors.store(getattr(vectors, method)(vectors.load(args[2], V16F)), args[2])
        return context.get_dummy_value()

    return types.void(tier, function, types.int64), codegen


@lru_cache
def elementwise(tier: str, function: str):
    @compiled(void(float32[::1]))
    def run(x):
        for block in range(x.shape[0] // 16):
            apply(tier, function, address(x) + 64 * block)

    return run


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_exp_is_within_2e_7_of_float64(tier):
    x = np.linspace(-87.2, 88, 1 << 16).astype(np.float32)
    y = x.copy()
    elementwise(tier, "exp")(y)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y / exact - 1) < 2e-7).all()


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_exp_of_special_values(tier):
    x = np.zeros(16, np.float32)
    x[:7] = [0, -np.inf, -88, np.nan, np.inf, 1000, -0.0]
    elementwise(tier, "exp")(x)
    capped = np.exp(np.float64(88))
    assert list(x[:3]) == [1, 0, 0]
    assert np.isnan(x[3])
    assert x[4] == x[5] == pytest.approx(capped, rel=2e-7)
    assert x[6] == 1


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_gelu_is_close_to_float64(tier):
    x = np.linspace(-20, 20, 1 << 16).astype(np.float32)
    y = x.copy()
    elementwise(tier, "gelu")(y)
    exact = exact_gelu(x.astype(np.float64))
    # Relative: gelu goes with e^2u, and u is a few roundings off: 8 |u| EPS, |u| up to 43 where
    # gelu is 1e-37.
    seen = np.abs(exact) > 1e-36
    assert (np.abs(y - exact)[seen] <= np.abs(exact[seen]) * 8 * 43 * EPS).all()
    assert (np.abs(y - exact) <= 4 * EPS * np.maximum(np.abs(x), 1)).all()


@pytest.mark.parametrize("tier", TIERS_HERE)
def test_gelu_of_massive_values_is_the_value_or_nothing(tier):
    x = np.zeros(16, np.float32)
    x[:4] = [3500, -3500, 1e30, -1e30]
    elementwise(tier, "gelu")(x)
    assert list(x[[0, 2]]) == [np.float32(3500), np.float32(1e30)]
    assert abs(x[1]) < 1e-30
    assert abs(x[3]) < 1e-7  # 1e30 over the cap of e^88 = 1.7e38
    assert not x[4:].any()


@pytest.mark.parametrize("width", [1, 7, 16, 33, 256])
def test_norm_equals_its_twin(width):
    rows = 12
    case = random_case(get_scheme("f32"), (1, width), rows)
    case.x[1] *= 3500
    case.x[2] = 1.0  # no variance: epsilon alone
    out = np.empty_like(case.x)
    epsilon = np.float32(case.norm.epsilon)
    program = Program()
    program.add(
        norm_rows(), rows, 1, case.x.ctypes.data, case.x.strides[0], width,
        case.norm.gain.ctypes.data, case.norm.bias.ctypes.data, epsilon, out.ctypes.data,
        out.strides[0],
    )  # fmt: skip
    POOLS[1].run(program)
    exact = case.x.astype(np.float64)
    exact -= exact.mean(axis=1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(axis=1, keepdims=True) + epsilon)
    exact = exact * case.norm.gain + case.norm.bias
    # The mean is off by at most `width` roundings, which dividing by a small deviation enlarges.
    scale = np.abs(case.x).max(axis=1, keepdims=True) / np.sqrt(
        case.x.astype(np.float64).var(axis=1, keepdims=True) + epsilon
    )
    bound = (width + 8) * EPS * np.maximum(scale, 1) * (np.abs(case.norm.gain) + 1)
    assert (np.abs(out - exact) <= bound).all()
    assert (np.abs(reference.layer_norm(case.x, case.norm) - exact) <= bound).all()


# -- top, slopes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 1000, 8191])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_top_equals_a_stable_sort(size, temperature):
    rng = np.random.default_rng(size)
    logits = (5 * rng.standard_normal((3, size))).astype(np.float32)
    logits[1] = np.rint(logits[1])  # many ties
    logits[2] = 7  # nothing but ties
    backend = NumbaBackend()
    order = np.argsort(-logits, axis=1, kind="stable")
    for k in sorted({1, min(5, size), min(40, size), size}):
        top = backend.top(logits, k)
        assert np.array_equal(top.ids, order[:, :k])
        assert np.array_equal(top.logits, np.take_along_axis(logits, order[:, :k], axis=1))
        single = backend.top(logits[1:2], k)
        assert np.array_equal(single.ids[0], top.ids[1])
        assert single.logsumexp[0] == top.logsumexp[1]
    for row in range(3):
        scaled = logits[row].astype(np.float64) / temperature
        peak = scaled.max()
        logsumexp = peak + np.log(np.exp(scaled - peak).sum())
        # float32: a lane sums size / 16 terms, each 2e-7 off; 1 / temperature is rounded
        bound = (size / 16 + 4) * EPS + EPS * np.abs(peak) * 2 + 40 * EPS / temperature
        assert (
            abs(backend.sums(logits[row : row + 1], temperature).logsumexp() - logsumexp) <= bound
        )
        if temperature == 1.0:
            assert abs(top.logsumexp[row] - logsumexp) <= bound


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("at", [0, 8, 99])
def test_top_reports_a_logit_that_is_not_finite(bad, at):
    logits = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    clean = NumbaBackend().top(logits, 3)
    logits[1, at] = bad
    top = NumbaBackend().top(logits, 3)
    assert not np.isfinite(top.logsumexp[1])
    assert top.logsumexp[0] == clean.logsumexp[0]


def test_top_of_minus_infinity_alone_is_not_a_number():
    top = NumbaBackend().top(np.full((1, 20), -np.inf, np.float32), 1)
    assert not np.isfinite(top.logsumexp).any()


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 7, 12, 16, 25, 32, 40, 112])
def test_slopes_equal_those_of_transformers(n_head):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    bias = modeling.build_alibi_tensor(torch.ones(1, 2), n_head, torch.float32)  # [H, 1, 2]
    assert slopes(n_head).dtype == np.float32
    # two pow() functions: half a unit in the last place each
    assert np.abs(slopes(n_head) / bias[:, 0, 1].numpy() - 1).max() <= EPS


# -- what the backend chooses, and refuses ---------------------------------------------------------


def test_a_tier_is_chosen_only_where_all_its_features_are():
    for tier, needs in TIERS.items():
        assert best_tier(frozenset(needs)) == tier
    assert best_tier(frozenset({"avx512f", "avx2"})) == "portable"
    assert TIERS_HERE[0] == BEST


@pytest.mark.parametrize("threads", [0, -1, 100_000, 1.5, "2", True])
def test_an_impossible_number_of_threads_is_refused(threads):
    most = os.cpu_count()
    expected = rf"^threads is {threads!r}, expected 1 to {most} \(this machine's cores\)$"
    with pytest.raises(UsageError, match=expected):
        NumbaBackend(threads)


def test_threads_are_at_most_the_physical_cores_by_default():
    cores = physical_cores()
    assert 1 <= cores <= (os.cpu_count() or 1)
    assert NumbaBackend().threads == cores


def test_a_description_says_tier_threads_and_cache():
    backend = NumbaBackend(1, "f32")
    assert backend.description == f"{BEST}, 1 thread, f32 cache"


def test_a_cache_that_memory_cannot_hold_says_its_size():
    config = BloomConfig(hidden_size=384, n_layer=2, n_head=3, vocab_size=16)
    with pytest.raises(
        CapacityError, match=r"^no memory for a cache of \d{6,}\.\d GB: ask for fewer"
    ):
        NumbaBackend().cache(config, 1, 10**13)


def test_a_step_no_longer_kept_for_replay_gives_its_memory_back_at_once(
    monkeypatch: pytest.MonkeyPatch,
):
    made: list[weakref.ref[Program]] = []

    class Watched(Program):
        def __init__(self, inputs: int = 0) -> None:
            super().__init__(inputs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(layers, "Program", Watched)
    backend = NumbaBackend(1)
    table = random_matrix(get_scheme("int4"), (50, 40))
    embedding = backend.embedding(table)
    step = backend.compile(lambda ids, cache, span, wanted: backend.take(embedding(ids), wanted))
    config = BloomConfig(hidden_size=40, n_layer=1, n_head=1, vocab_size=50)
    cache = backend.cache(config, 1, 64)
    gc.collect()
    gc.disable()  # Python looks for cycles rarely, and a prompt's step may hold 100 MB
    try:
        for count in range(1, 20):
            step(np.arange(count), cache, Span.of([0], [count]), np.array([0]))
        alive = sum(program() is not None for program in made)
    finally:
        gc.enable()
    assert len(made) == 19
    assert alive <= recorded._PROGRAMS


@pytest.mark.skipif("avx2" not in TIERS_HERE, reason="this processor has no AVX2")
def test_a_process_lowered_to_avx2_takes_that_tier_and_writes_the_same_text(tmp_path: Path):
    found = []
    for name, run in (("avx2", run_lowered_to_avx2), (BEST, run_script)):
        tier, ids = run(tmp_path / f"{name}.npy").splitlines()
        assert tier == name
        found.append((ids, np.load(tmp_path / f"{name}.npy")))
    (ids, logits), (same_ids, same_logits) = found
    # The sums of layer norms run in another order, so an activation may take the next code: logits
    # differ by 1e-4 of their size (NMSE), far less than int4 itself changes them.
    assert np.square(logits - same_logits).sum() <= 1e-4 * np.square(same_logits).sum()
    assert ids == same_ids
