"""Schemes: what lies where, what comes back, and the compiled quantizer bit for bit."""

import numpy as np
import pytest
from bloomq.converters.quantize import all_finite, quantize_block
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomq.errors import UsageError
from bloomq.grids import GRIDS, group_scales
from bloomq.schemes import (
    DEFAULT_GROUP,
    GROUP_SIZES,
    NF4_CODEBOOK,
    NF4_INT8_CODEBOOK,
    NF4_MIDPOINTS,
    SCHEME_NAMES,
    Scheme,
    bf16_to_f32,
    f32_to_bf16,
    get_scheme,
    round_up,
    untile_nibbles,
    untile_rows,
)

SCHEMES = [
    *(get_scheme(name) for name in SCHEME_NAMES if name not in DEFAULT_GROUP),
    *(get_scheme(name, size) for name in DEFAULT_GROUP for size in GROUP_SIZES),
]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
quick = settings(max_examples=40, deadline=None)


def matrix(n: int, k: int, *, seed: int = 0, size: float = 0.05) -> np.ndarray:
    """Normal weights [n, k] with outliers, a row of zeros and a stretch of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, size, (n, k)) * np.where(rng.random((n, k)) < 0.01, 8, 1)
    w[n // 2] = 0
    w[:, k // 3 : k // 3 + 40] *= rng.random((n, 1)) < 0.5
    return w.astype(np.float32)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Matrices of odd sizes, from tiny to large values, sometimes one value everywhere; within
    float16, beyond which a scale is infinite (`test_too_large_for_float16...`)."""
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 200))
    size = 2.0 ** draw(st.integers(-30, 12))
    if draw(st.booleans()):
        return np.clip(matrix(n, k, seed=draw(st.integers(0, 2**32 - 1)), size=size), -65504, 65504)
    return np.full((n, k), size * draw(st.sampled_from([-1, 1])), np.float32)


def in_dtype(w: np.ndarray, dtype: str) -> np.ndarray:
    """w as a checkpoint of that dtype stores it; f16 is clipped to its range."""
    if dtype == "BF16":
        return f32_to_bf16(w)
    return np.clip(w, -65504, 65504).astype(np.float16) if dtype == "F16" else w


def widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    return bf16_to_f32(raw) if dtype == "BF16" else raw.astype(np.float32)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        assert (found[part].dtype, found[part].shape) == (array.dtype, array.shape), part
        assert found[part].tobytes() == array.tobytes(), part


# -- what lies where: literal bytes of matrices small enough to lay out by hand ------------------


def placed(parts: dict[str, np.ndarray], part: str, background: int = 0) -> dict[int, int]:
    """Offset -> byte of everything in a part's bytes that is not background."""
    data = parts[part].tobytes()
    return {at: byte for at, byte in enumerate(data) if byte != background}


def test_int8_bytes_lie_in_fours_of_columns_by_lane_by_tile():
    w = np.zeros((18, 7), np.float32)
    w[0, 0], w[0, 1], w[0, 4] = 127, -1, 3
    w[1, 0], w[1, 6] = 254, -4  # scale 2
    w[17, 5] = -127
    parts = get_scheme("int8").quantize(w)  # stored as [32, 128]
    assert parts["codes"].shape == (2, 32, 16, 4)
    assert placed(parts, "codes") == {
        0: 127, 1: 256 - 1, 64: 3,  # row 0: columns 0, 1, 4
        4: 127, 64 + 4 + 2: 256 - 2,  # row 1: columns 0, 6
        2048 + 64 + 4 + 1: 256 - 127,  # row 17 is lane 1 of tile 1, which starts at 16 * 128
    }  # fmt: skip
    scales = np.zeros(32, np.float32)
    scales[[0, 1, 17]] = 1, 2, 1
    assert parts["scales"].tobytes() == scales.tobytes()


def test_int4_bytes_hold_column_k_low_and_column_k_plus_4_high():
    w = np.zeros((18, 40), np.float32)
    w[0, [0, 1, 4, 5, 8]] = -8, 7, 1, -3, 3  # scale 1: these are its levels exactly
    w[0, 32:36] = -4, 3.5, 1, -0.5  # the second group, scale 0.5
    w[17, [0, 12]] = -16, 14  # scale 2
    parts = get_scheme("int4", 32).quantize(w)  # stored as [32, 64]
    assert parts["codes"].shape == (2, 8, 16, 4)
    assert placed(parts, "codes", background=0x88) == {  # 8 is zero
        0: 0x90, 1: 0x5F,  # columns 4|0 = 1|-8 and 5|1 = -3|7
        64: 0x8B,  # column 8 = 3
        256: 0x80, 257: 0x8F, 258: 0x8A, 259: 0x87,  # columns 32..35 = -8, 7, 2, -1
        512 + 4: 0x80, 512 + 64 + 4: 0xF8,  # row 17: column 0 = -8, column 12 = 7 (high nibble)
    }  # fmt: skip
    one, half, two = b"\x00\x3c", b"\x00\x38", b"\x00\x40"  # float16, little endian
    scales = bytearray(2 * 2 * 16 * 2)  # [tile, group, lane]
    scales[0:2], scales[32:34], scales[64 + 2 : 64 + 4] = one, half, two
    assert parts["scales"].tobytes() == bytes(scales)


def test_nf4_bytes_hold_code_book_indices_with_seven_as_zero():
    w = np.zeros((17, 64), np.float32)
    w[0, [0, 1, 4]] = -2, 2, 2 * float(NF4_CODEBOOK[12])
    w[16, 63] = 0.5
    parts = get_scheme("nf4").quantize(w)  # stored as [32, 64]
    assert parts["codes"].shape == (2, 8, 16, 4)
    assert placed(parts, "codes", background=0x77) == {
        0: 0xC0, 1: 0x7F,  # columns 4|0 = 12|0, column 1 = 15
        512 + 7 * 64 + 3: 0xF7,  # row 16, column 63: block 7, byte 3, high
    }  # fmt: skip
    scales = bytearray(2 * 1 * 16 * 2)
    scales[0:2], scales[32:34] = b"\x00\x40", b"\x00\x38"  # 2.0 and 0.5
    assert parts["scales"].tobytes() == bytes(scales)


@pytest.mark.parametrize(
    ("name", "one", "minus_third"),
    [
        ("f32", "0000803f", "abaaaabe"),
        ("f16", "003c", "55b5"),
        ("bf16", "803f", "abbe"),  # -0.3333 = beaaaaab rounds up to beab
    ],
)
def test_float_bytes_lie_by_tile_by_column_by_lane(name, one, minus_third):
    w = np.zeros((17, 3), np.float32)
    w[0, 0], w[5, 2], w[16, 1] = 1, -1 / 3, 1
    parts = get_scheme(name).quantize(w)  # stored as [32, 64]
    size = len(one) // 2
    expected = bytearray(2 * 64 * 16 * size)
    for element, value in ((0, one), (2 * 16 + 5, minus_third), (64 * 16 + 16, one)):
        expected[element * size : (element + 1) * size] = bytes.fromhex(value)
    assert parts["values"].shape == (2, 64, 16)
    assert parts["values"].tobytes() == bytes(expected)


def test_code_book_of_the_integer_kernels_is_127_times_nf4():
    assert NF4_INT8_CODEBOOK == (
        -127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127,
    )  # fmt: skip


@each_scheme
def test_parts_announce_what_quantize_makes(scheme):
    for shape in ((1, 1), (32, 128), (33, 129), (70, 200)):
        made = scheme.quantize(matrix(*shape))
        codes = {"F32": "f4", "F16": "f2", "BF16": "u2", "I8": "i1", "U8": "u1"}
        announced = {k: (np.dtype(codes[p.dtype]), p.shape) for k, p in scheme.parts(shape).items()}
        assert {k: (a.dtype, a.shape) for k, a in made.items()} == announced
        assert all(array.nbytes % 64 == 0 for array in made.values())


# -- round trips ---------------------------------------------------------------------------------


@quick
@given(matrices())
def test_f32_comes_back_exactly(w):
    scheme = get_scheme("f32")
    assert scheme.dequantize(scheme.quantize(w), w.shape).tobytes() == w.tobytes()


@quick
@given(matrices())
def test_f16_comes_back_as_numpy_rounds_it(w):
    scheme = get_scheme("f16")
    expected = w.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(scheme.dequantize(scheme.quantize(w), w.shape), expected)


@quick
@given(matrices())
def test_bf16_comes_back_within_half_a_unit(w):
    scheme = get_scheme("bf16")
    found = scheme.dequantize(scheme.quantize(w), w.shape)
    assert np.all(np.abs(found - w) <= np.abs(w) * 2.0**-8)


@quick
@given(matrices())
def test_int8_errs_by_half_a_step_of_its_row_at_most(w):
    scheme = get_scheme("int8")
    error = np.abs(scheme.dequantize(scheme.quantize(w), w.shape) - w)
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    assert np.all(error <= step * 0.50001)


@quick
@given(matrices())
def test_nf4_errs_by_half_the_widest_gap_of_its_block_at_most(w):
    scheme = get_scheme("nf4")
    error = np.abs(scheme.dequantize(scheme.quantize(w), w.shape) - w)
    padded = np.zeros(scheme.padded(w.shape), np.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    peak = np.abs(padded.reshape(len(padded), -1, 64)).max(axis=2).repeat(64, axis=1)
    peak = peak[: w.shape[0], : w.shape[1]]
    widest = np.diff(NF4_CODEBOOK).max() / 2
    half_rounding = 2.0**-10 * peak + 2.0**-24  # of the float16 scale
    assert np.all(error <= widest * peak + half_rounding)


@each_scheme
@quick
@given(w=matrices())
def test_zeros_stay_zero_and_padding_is_zero(scheme, w):
    w = w.copy()
    w[0] = 0
    stored = scheme.padded(w.shape)
    found = scheme.dequantize(scheme.quantize(w), stored)
    assert not found[0].any()
    assert not found[w.shape[0] :].any()
    assert not found[:, w.shape[1] :].any()


@each_scheme
def test_matrix_of_zeros_has_zero_scales_and_never_divides(scheme):
    with np.errstate(all="raise"):
        parts = scheme.quantize(np.zeros((3, 5), np.float32))
    assert not np.any(parts.get("scales", np.zeros(1)))
    assert not scheme.dequantize(parts, (3, 5)).any()


@each_scheme
@quick
@given(w=matrices(), data=st.data())
def test_dequantized_rows_are_rows_of_the_dequantized_matrix(scheme, w, data):
    parts = scheme.quantize(w)
    ids = np.array(
        data.draw(st.lists(st.integers(0, w.shape[0] - 1), min_size=1, max_size=40)), np.int64
    )
    found = scheme.dequantize_rows(parts, ids)
    whole = scheme.dequantize(parts, scheme.padded(w.shape))
    assert found.shape == (len(ids), scheme.padded(w.shape)[1])
    assert found.tobytes() == np.ascontiguousarray(whole[ids]).tobytes()


def test_no_row_ids_give_no_rows():
    scheme = get_scheme("int4")
    found = scheme.dequantize_rows(scheme.quantize(matrix(5, 64)), np.array([], np.int64))
    assert found.shape == (0, 64)


# -- bfloat16 against torch ----------------------------------------------------------------------


def test_bf16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bits[:50_000] = (bits[:50_000] & 0xFFFF0000) | 0x8000  # ties
    bits[50_000:60_000] &= 0x807FFFFF  # subnormals and zeros of either sign
    bits[60_000:60_006] = 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0, 0x80000000
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(f32_to_bf16(x), expected)


def test_bf16_keeps_nan_a_quiet_nan():
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    found = f32_to_bf16(bits.view(np.float32))
    assert np.isnan(bf16_to_f32(found)).all()
    assert (found & 0x40).all()


def test_every_bf16_survives_the_way_to_float32_and_back():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    bits = bits[~np.isnan(bf16_to_f32(bits))]
    np.testing.assert_array_equal(f32_to_bf16(bf16_to_f32(bits)), bits)


# -- int4: never worse than round to nearest -----------------------------------------------------


def group_errors(w: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """Squared error [N, K/G] of the nearest codes -8..7 under scales [N, K/G], in float64."""
    x = w.reshape(w.shape[0], -1, group).astype(np.float64)
    s = scales.astype(np.float64)[..., None]
    q = np.clip(np.rint(np.divide(x, s, out=np.zeros_like(x), where=s != 0)), -8, 7)
    return ((x - q * s) ** 2).sum(axis=2)


def plain_scales(w: np.ndarray, group: int) -> np.ndarray:
    """The signed peak of each group lands on -8."""
    groups = w.reshape(w.shape[0], -1, group)
    at = np.abs(groups).argmax(axis=2)[..., None]
    return np.take_along_axis(groups, at, axis=2)[..., 0] / np.float32(-8)


@quick
@given(matrices(), st.sampled_from([32, 64, 128]))
def test_int4_scale_never_errs_more_than_round_to_nearest(w, group):
    padded = np.zeros((w.shape[0], round_up(w.shape[1], group)), np.float32)
    padded[:, : w.shape[1]] = w
    plain = group_errors(padded, plain_scales(padded, group), group)
    found = group_errors(padded, group_scales(padded, group, GRIDS["int4"]), group)
    energy = (padded.reshape(w.shape[0], -1, group).astype(np.float64) ** 2).sum(axis=2)
    assert np.all(found <= plain + 1e-5 * energy)  # 1e-5: sums in float32


def test_int4_beats_round_to_nearest_on_normal_weights():
    w = np.random.default_rng(3).normal(0, 0.02, (64, 1024)).astype(np.float32)
    for group in (32, 64, 128):
        scheme = get_scheme("int4", group)
        found = ((scheme.dequantize(scheme.quantize(w), w.shape) - w) ** 2).sum()
        assert found < 0.93 * group_errors(w, plain_scales(w, group), group).sum()


@pytest.mark.parametrize("name", ["int4", "nl4"])
def test_numbers_of_a_grid_come_back_exactly(name):
    w = np.tile(GRIDS[name].numbers, (16, 4)) * np.float32(0.25)
    scheme = get_scheme(name, 32)
    np.testing.assert_array_equal(scheme.dequantize(scheme.quantize(w), w.shape), w)


# -- nl4: a grid that is denser where weights are --------------------------------------------------


def test_nl4_fits_the_dot_product_of_every_tier():
    book = GRIDS["nl4"].book
    assert len(book) == 16 and list(book) == sorted(set(book))
    largest = 2 * (book[-1] - book[0]) * 127  # two products of bytes from 0, and activations
    assert largest <= np.iinfo(np.int16).max
    assert 128 * (book[-1] - book[0]) * 127 * 255 <= np.iinfo(np.int32).max  # two limbs, joined


def test_a_grid_gives_the_nearest_number_and_its_code():
    x = np.arange(-90, 80, 0.25, dtype=np.float32)
    for grid in GRIDS.values():
        distances = np.abs(x[:, None] - grid.numbers)
        found = grid.nearest(x)
        np.testing.assert_array_equal(np.abs(found - x), distances.min(axis=1))
        np.testing.assert_array_equal(grid.numbers[grid.codes(found)], found)
        np.testing.assert_array_equal(grid.numbers[grid.codes(found.astype(np.int8))], found)
    ties = GRIDS["nl4"].midpoints
    np.testing.assert_array_equal(GRIDS["nl4"].nearest(ties), GRIDS["nl4"].numbers[:-1])
    np.testing.assert_array_equal(GRIDS["int4"].nearest(np.float32([-0.5, 1.5])), [0, 2])


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_nl4_keeps_more_than_int4(group):
    w = np.random.default_rng(3).normal(0, 0.02, (64, 1024)).astype(np.float32)
    errors = {}
    for name in ("int4", "nl4"):
        scheme = get_scheme(name, group)
        errors[name] = ((scheme.dequantize(scheme.quantize(w), w.shape) - w) ** 2).sum()
    assert errors["nl4"] < 0.85 * errors["int4"]


# -- nf4: bitsandbytes' algorithm ----------------------------------------------------------------


def test_nf4_midpoints_are_bitsandbytes_thresholds():
    """Source: bitsandbytes csrc/kernels.cu, dQuantizeNF4; to one unit in the last place."""
    published = np.array(
        [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
         -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
         0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
         0.5016634166240692, 0.6427869200706482, 0.8614784181118011],
        np.float32,
    )  # fmt: skip
    np.testing.assert_array_max_ulp(NF4_MIDPOINTS, published, maxulp=1)


@quick
@given(matrices())
def test_nf4_codes_are_the_nearest_in_the_code_book(w):
    scheme = get_scheme("nf4")
    parts = scheme.quantize(w)
    codes = untile_nibbles(parts["codes"])[: w.shape[0], : w.shape[1]]
    scales = untile_rows(parts["scales"]).astype(np.float64).repeat(64, axis=1)
    scales = scales[: w.shape[0], : w.shape[1]]
    x = np.divide(w, scales, out=np.zeros(w.shape), where=scales > 0)
    distances = np.abs(x[..., None] - NF4_CODEBOOK.astype(np.float64))
    chosen = np.take_along_axis(distances, codes[..., None].astype(np.int64), axis=2)[..., 0]
    assert np.all(chosen <= distances.min(axis=2) + 1e-6)  # 1e-6: ties, decided in float32


def test_nf4_breaks_ties_downwards():
    w = np.zeros((1, 64), np.float32)
    w[0, 0] = 1
    w[0, 1:16] = NF4_MIDPOINTS
    codes = untile_nibbles(get_scheme("nf4").quantize(w)["codes"])
    assert codes[0, 1:16].tolist() == list(range(15))


# -- overflow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["nl4", "int4", "nf4", "f16"])
def test_too_large_for_float16_becomes_infinite_not_wrong(label):
    w = np.full((1, 64), 1e7, np.float32)
    parts = get_scheme(label).quantize(w)
    stored = parts["values" if label == "f16" else "scales"]
    assert np.isinf(stored).any()
    assert not np.isnan(stored).any()


@pytest.mark.parametrize("label", ["int8", "f32"])
def test_the_largest_floats_survive(label):
    w = np.full((2, 3), 3.0e38, np.float32)
    scheme = get_scheme(label)
    np.testing.assert_allclose(scheme.dequantize(scheme.quantize(w), w.shape), w, rtol=1e-6)


@each_scheme
def test_the_smallest_floats_become_small_not_nan(scheme):
    w = np.full((2, 3), np.float32(1e-45))
    found = scheme.dequantize(scheme.quantize(w), w.shape)
    assert np.all(np.abs(found) <= np.float32(1e-44))


# -- the compiled quantizer ----------------------------------------------------------------------


@each_scheme
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(1, 1), (31, 127), (33, 129), (64, 256), (97, 331)])
def test_compiled_quantizer_gives_the_same_bits(scheme, dtype, shape):
    raw = in_dtype(matrix(*shape), dtype)
    expected = scheme.quantize(widened(raw, dtype))
    assert_same_bits(quantize_block(raw, dtype, scheme), expected)


@each_scheme
@quick
@given(w=matrices(), dtype=st.sampled_from(["F32", "F16", "BF16"]))
def test_compiled_quantizer_gives_the_same_bits_for_any_values(scheme, w, dtype):
    raw = in_dtype(w, dtype)
    with np.errstate(over="ignore"):
        expected = scheme.quantize(widened(raw, dtype))
    assert_same_bits(quantize_block(raw, dtype, scheme), expected)


@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-38, 1e-7, 6e-8, 7e4, 1e20, 3e38])
@pytest.mark.parametrize("label", ["int8", "nl4", "int4", "nf4"])
def test_compiled_quantizer_gives_the_same_bits_at_the_ends_of_the_range(label, size):
    w = (matrix(40, 130, size=1) / 40 * np.float64(size)).astype(np.float32)
    scheme = get_scheme(label)
    with np.errstate(all="ignore"):
        expected = scheme.quantize(w)
    assert_same_bits(quantize_block(w, "F32", scheme), expected)


@each_scheme
@pytest.mark.parametrize("rows", [32, 64])
def test_blocks_of_rows_are_blocks_of_the_whole(scheme, rows):
    w = matrix(109, 200)
    whole = scheme.quantize(w)
    blocks = [quantize_block(w[at : at + rows], "F32", scheme) for at in range(0, len(w), rows)]
    joined = {part: np.concatenate([block[part] for block in blocks]) for part in whole}
    assert_same_bits(joined, whole)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_seen(dtype, bad):
    raw = in_dtype(matrix(5, 7), dtype)
    assert all_finite(raw, dtype)
    value = np.array([bad], np.float32)
    raw[4, 6] = f32_to_bf16(value)[0] if dtype == "BF16" else value[0]
    assert not all_finite(raw, dtype)


def test_the_largest_finite_values_count_as_finite():
    assert all_finite(np.array([np.finfo(np.float32).min], np.float32), "F32")
    assert all_finite(np.array([-65504], np.float16), "F16")
    assert all_finite(np.array([0xFF7F], np.uint16), "BF16")


# -- names ---------------------------------------------------------------------------------------


def test_schemes_know_their_group_and_label():
    found = {scheme.label: scheme.group_size for scheme in SCHEMES}
    assert found == {
        "int8": 128, "int6": 64, "nf4": 64, "f32": 64, "bf16": 64, "f16": 64,
        "int4-g32": 32, "int4-g64": 64, "int4-g128": 128,
        "nl4-g32": 32, "nl4-g64": 64, "nl4-g128": 128,
    }  # fmt: skip
    assert (get_scheme("int4").label, get_scheme("nl4").label) == ("int4-g32", "nl4-g64")


@pytest.mark.parametrize(
    ("name", "group", "message"),
    [
        (
            "int5",
            None,
            "unknown scheme 'int5', expected one of int8, int6, nl4, int4, nf4, f32, bf16, f16",
        ),
        ("nf4", 64, "scheme nf4 has no group size to choose: drop it, or use nl4 or int4"),
        ("f32", 32, "scheme f32 has no group size to choose: drop it, or use nl4 or int4"),
        ("int4", 48, "group size 48, expected one of (32, 64, 128)"),
        ("int4", 0, "group size 0, expected one of (32, 64, 128)"),
        ("int4", "64", "group size '64', expected one of (32, 64, 128)"),
    ],
)
def test_impossible_schemes_are_refused(name, group, message):
    with pytest.raises(UsageError) as caught:
        get_scheme(name, group)
    assert str(caught.value) == message


def test_group_size_that_is_not_an_integer_is_refused():
    with pytest.raises(UsageError):
        get_scheme("int4", 64.0)


def test_scheme_name_that_is_not_a_string_is_refused():
    with pytest.raises(UsageError):
        get_scheme(["int4"])


def test_scheme_is_a_value():
    assert get_scheme("int4", 64) == Scheme("int4", 64)
