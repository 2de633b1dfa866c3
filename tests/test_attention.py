"""ALiBi attention against NumPy: every cache dtype, the horizon, faint weights, huge caches.

Bounds are derived: `EPS` is float32's unit in the last place of 1, and a rounding is off by half of
it. What may be skipped is compared with a cache whose key lengths are infinite: nothing may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from test_kernels import BEST, EPS, POOLS, TIERS_HERE, compiling_ahead, same_bits

import bloomq
from bloomq.backends import reference
from bloomq.backends.numba_cpu.attention_parts import CHUNK, PAGE
from bloomq.backends.numba_cpu.cache import NumbaCache
from bloomq.backends.numba_cpu.layers import NumbaAttention, NumbaBackend
from bloomq.backends.numba_cpu.pages import Page
from bloomq.config import BloomConfig
from bloomq.layers import PAGE_TOKENS, Span, slopes

HEAD_DIMS = (8, 16, 64, 128)  # 8 is padded to 16, and shares its kernel
CASES = [(dim, "f16", BEST) for dim in HEAD_DIMS]
CASES += [(dim, dtype, BEST) for dtype in ("f32", "int8") for dim in HEAD_DIMS[:3]]
CASES += [(16, dtype, tier) for dtype in ("f16", "int8") for tier in TIERS_HERE if tier != BEST]
DTYPES = ["f32", "f16", "int8"]
CONFIG_OF = {
    dim: BloomConfig(hidden_size=3 * dim, n_layer=2, n_head=3, vocab_size=16) for dim in HEAD_DIMS
}
CHUNKY = [(250, 15, 1), (6, 1, 15), (1, 1, 240), (9, 17, 1), (300, 2, 16), (1, 1, 1)]
ONE = Span.of([0], [1])


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead() -> Iterator[None]:
    yield from compiling_ahead("test_attention")


def compile_from_the_end() -> None:
    for head_dim, dtype, tier in reversed(CASES):
        NumbaAttention(POOLS[1], tier, dtype, 0, 1, head_dim)


def as_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [..., D] as an int8 cache holds them: codes, and a scale [..., 1] for each."""
    peak = np.abs(x).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(peak < 1e-30, 0, np.float32(127) / peak).astype(np.float32)
    codes = np.rint(x * inverse)
    return codes, np.where(peak < 1e-30, 0, peak / np.float32(127)).astype(np.float32)


def as_held(x: np.ndarray, dtype: str) -> np.ndarray:
    """Vectors [..., D] as a cache gives them back, float64."""
    if dtype == "int8":
        codes, scale = as_int8(x)
        return codes.astype(np.float64) * scale
    return x.astype({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float64)


# -- against the reference -------------------------------------------------------------------------


def attention_steps(
    config: BloomConfig, dtype: str, cuts, threads: int = 2, tier: str = BEST
) -> list[np.ndarray]:
    """The outputs of feeding `cuts`, new tokens of each row step by step, to a fresh cache."""
    layer = NumbaAttention(POOLS[threads], tier, dtype, 1, config.n_head, config.head_dim)
    return feed(layer, NumbaCache(config, 3, 700, dtype), config, cuts)


def feed(layer, cache, config: BloomConfig, cuts, held_as: str = "f32") -> list[np.ndarray]:
    stream = token_stream(config)
    split = stream.reshape(3, 700, config.n_head, 3, config.head_dim)
    split[:, :, :, 1:] = as_held(split[:, :, :, 1:], held_as)
    outputs = []
    for counts in cuts:
        rows = [row for row in range(3) if counts[row]]
        span = Span.of(rows, [counts[row] for row in rows])
        at = [int(cache.lengths[row]) for row in rows]
        qkv = [stream[r, a : a + counts[r]] for r, a in zip(rows, at, strict=True)]
        outputs.append(layer(np.concatenate(qkv), cache, span))
        cache.advance(span)
    return outputs


def token_stream(config: BloomConfig) -> np.ndarray:
    """qkv of 700 tokens for each of 3 rows, [3, 700, H * 3 * D]."""
    rng = np.random.default_rng(5)
    return rng.standard_normal((3, 700, 3 * config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize(("head_dim", "dtype", "tier"), CASES)
def test_attention_equals_the_reference_across_block_and_chunk_edges(head_dim, dtype, tier):
    config = CONFIG_OF[head_dim]
    backend = reference.ReferenceBackend()
    expected = feed(
        backend.attention(1, config.n_head, head_dim), backend.cache(config, 3, 700), config,
        CHUNKY, dtype,
    )  # fmt: skip
    found = attention_steps(config, dtype, CHUNKY, tier=tier)
    # Scores are sums of D products: at most 2 sqrt(D) EPS |q||k| off on both sides, and the ALiBi
    # term 300 EPS; a weight is off by that share. |q||k| is near D, so D^1.5 EPS / sqrt(D) = D EPS.
    # int8: the kernel rounds once more with a key's or value's scale, the reference with each
    # restored component: EPS of |q||k| / sqrt(D), below the D EPS.
    bound = (4 * head_dim + 600) * EPS * 5  # |v| is at most 5
    for step, (y, want) in enumerate(zip(found, expected, strict=True)):
        assert np.abs(y - want).max() <= bound, step


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_same_bits_however_the_tokens_are_cut(dtype):
    config = CONFIG_OF[8]
    total = np.array(CHUNKY).sum(axis=0)
    whole = attention_steps(config, dtype, [tuple(total)])[0]
    starts = np.concatenate([[0], np.cumsum(total)])
    for threads in (1, 2):
        pieces: list[list[np.ndarray]] = [[], [], []]
        for counts, y in zip(CHUNKY, attention_steps(config, dtype, CHUNKY, threads), strict=True):
            for row, piece in enumerate(np.split(y, np.cumsum(counts)[:-1])):
                pieces[row].append(piece)
        for row in range(3):
            joined = np.concatenate(pieces[row])
            assert same_bits(joined, whole[starts[row] : starts[row + 1]]), (row, threads)


# Of 9 steps of 2 rows, recorded when a cache was one piece of memory: what lies where is no part of
# a result. Vectors of fused multiply-adds have the same bits on every tier.
GOLDEN = {"f32": "25395fcaeb8f21e1", "f16": "1bfadd6ae70e0d14", "int8": "88776c767aa00a4c"}
GOLDEN_STEPS = [
    (300, 9), (1, 1), (700, 0), (1, 55), (0, 1), (17, 300), (1, 1), (500, 0), (1, 1)
]  # fmt: skip
GOLDEN_CASES = [(dtype, tier) for dim, dtype, tier in CASES if dim == 16 and tier != "portable"]


def whole_numbers(count: int) -> np.ndarray:
    """qkv of whole numbers times powers of two, [count, 3 * 3 * 16]: the same everywhere."""
    rng = np.random.default_rng(7)
    qkv = rng.integers(-(2**14), 2**14 + 1, (count, 3, 3, 16)).astype(np.float32) / 2**13
    qkv[:, :, :2] *= np.exp2(rng.integers(-2, 3, (count, 3, 2, 1)))
    return qkv.reshape(count, -1)


@pytest.mark.parametrize(("dtype", "tier"), GOLDEN_CASES)
def test_attention_has_the_bits_that_it_had_before_there_were_pages(dtype, tier):
    layer = NumbaAttention(POOLS[2], tier, dtype, 1, 3, 16)
    cache, qkv, at = NumbaCache(CONFIG_OF[16], 2, 2000, dtype), whole_numbers(4096), 0
    digest = hashlib.sha256()
    for counts in GOLDEN_STEPS:
        rows = [row for row in range(2) if counts[row]]
        span = Span.of(rows, [counts[row] for row in rows])
        digest.update(layer(qkv[at : at + sum(counts)], cache, span).tobytes())
        cache.advance(span)
        at += sum(counts)
    assert digest.hexdigest()[:16] == GOLDEN[dtype]


def test_a_page_is_as_long_for_the_kernels_as_for_the_interface():
    assert PAGE == PAGE_TOKENS
    assert CHUNK % PAGE == 0


# -- one layer and its cache -----------------------------------------------------------------------


class Layer:
    """Attention of 8 heads of 16 (slopes 1/2 to 1/256), with a cache of its own."""

    n_head, head_dim = 8, 16

    def __init__(self, dtype: str, capacity: int, batch: int = 1) -> None:
        backend = NumbaBackend(2, dtype)
        size = self.n_head * self.head_dim
        config = BloomConfig(hidden_size=size, n_layer=1, n_head=self.n_head, vocab_size=16)
        self.dtype, self.attention = dtype, backend.attention(0, self.n_head, self.head_dim)
        self.cache = backend.cache(config, batch, capacity)

    def __call__(self, qkv: np.ndarray, row: int = 0, *, hold: bool = True) -> np.ndarray:
        """qkv [T, H, 3, D] -> [T, H, D]; held unless `hold` is False."""
        span = Span.of([row], [len(qkv)])
        y = self.attention(qkv.reshape(len(qkv), -1), self.cache, span)
        if hold:
            self.cache.advance(span)
        return y.reshape(len(qkv), self.n_head, self.head_dim)

    @property
    def pages(self) -> tuple[Page, ...]:
        """Of all rows."""
        return tuple(page for row in self.cache._rows for page in row.pages)

    def skip_nothing(self) -> None:
        """No chunk stored so far is provably faint."""
        for page in self.pages:
            page.key_lengths[:] = np.inf

    def poison(self, chunk: int) -> None:
        """Whatever reads a key or value of this chunk gets NaN; how long its keys are stays."""
        for page in self.pages[chunk * CHUNK // PAGE : (chunk + 1) * CHUNK // PAGE]:
            page.scales[:] = np.nan  # int8; empty for the others
            if self.dtype != "int8":
                page.data[:] = np.nan


def tokens(count: int, seed: int = 0, spread: float = 0.7) -> np.ndarray:
    """qkv [count, H, 3, D]; queries and keys from very short to long, by e^spread, so that heads
    see now near, now far."""
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((count, Layer.n_head, 3, Layer.head_dim)).astype(np.float32)
    qkv[:, :, :2] *= np.exp(rng.normal(0, spread, (count, Layer.n_head, 2, 1))).astype(np.float32)
    return qkv


@dataclass(frozen=True, eq=False)
class Exact:
    """Softmax in float64, without any cut: y [D], how far the kernel may be [D], weights [S]."""

    y: np.ndarray
    bound: np.ndarray
    weights: np.ndarray


def exact(q: np.ndarray, keys: np.ndarray, values: np.ndarray, slope: float) -> Exact:
    """The last token's attention of one head: q [D], keys and values [S, D] as held, float64.

    The bound, to first order in u = EPS / 2, over the keys that can be felt: those within 80 of the
    peak, since sums of the others are e^-40 of the result even before a peak 40 higher.
    - A score: q is rounded twice (1 / sqrt(D) and the product), its D products once each, an int8
      scale once: (D + 3) u of a = sum |q_d k_d| / sqrt(D); and the sum with the bias: u of it.
    - A weight: its score, the distance to the peak (40 u), and exp, 2e-7, once, and again with a
      product for every later chunk that raises the peak.
    - Sums: one rounding a key felt, value scale and chunk; of the weights alone one for each 16
      keys of a chunk, 16 lanes and each chunk. One division.
    - Weights that count as 0: exactly their share, up to the error of a score.
    """
    u, (size, dim) = EPS / 2, keys.shape
    distance = np.arange(size) - (size - 1)
    terms = np.abs(keys) @ np.abs(q) / np.sqrt(dim)
    scores = keys @ q / np.sqrt(dim) + slope * distance
    below = scores - scores.max()
    weights = np.exp(below)
    total = weights.sum()
    y = weights @ values / total
    felt, chunks = below >= -80, -(-size // CHUNK)
    score = u * ((dim + 3) * terms + np.abs(scores))[felt].max()
    weight = score + 40 * u + (chunks + 1) * (2e-7 + u)
    steps = 2 * weight + u * (felt.sum() + 1 + chunks + (CHUNK // 16 + 16 + chunks) + 1)
    faint = below < -40 + 2 * score
    lost = weights[faint] @ np.abs(values[faint]) + weights[faint].sum() * np.abs(y)
    bound = 1.01 * (steps * (weights @ np.abs(values)) + lost) / total  # 1 %: the second order
    return Exact(y, bound, weights / total)


def exact_heads(dtype: str, qkv: np.ndarray) -> list[Exact]:
    """`exact` of the last token, for each head."""
    keys, values = as_held(qkv[:, :, 1], dtype), as_held(qkv[:, :, 2], dtype)
    q = qkv[-1, :, 0].astype(np.float64)
    return [
        exact(q[head], keys[:, head], values[:, head], float(slope))
        for head, slope in enumerate(slopes(Layer.n_head))
    ]


# -- int8 ------------------------------------------------------------------------------------------


def test_an_int8_cache_holds_codes_rounded_half_to_even_with_a_scale_for_each_head_and_token():
    layer, qkv = Layer("int8", 64), tokens(40)
    # 127 makes the scale 1, so that these are the codes' own halves.
    qkv[7, 2, 1] = [127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -127, 126.5, *[0] * 6]
    qkv[8, 3, 2] = -2 * qkv[7, 2, 1]
    layer(qkv)
    stored = layer.cache.stored(0)
    keys, values = stored.keys[0], stored.values[0]
    for part, found in enumerate((keys, values)):
        codes, scale = as_int8(qkv[:, :, 1 + part])
        assert np.array_equal(found, codes)
        assert np.array_equal(stored.scales[part, 0], scale[..., 0])
    assert keys[7, 2, :10].tolist() == [127, 0, 2, 2, 4, 0, -2, -2, -127, 126]
    assert values[8, 3, :10].tolist() == [-127, 0, -2, -2, -4, 0, 2, 2, 127, -126]


def test_keys_and_values_of_zeros_have_scale_0_and_no_effect_but_their_weight():
    layer, qkv = Layer("int8", 64), tokens(20)
    qkv[3, :, 1:] = 0
    qkv[4, :, 1:] = 1e-31  # 127 / peak would overflow below 1e-36: all below 1e-30 are zeros
    y = layer(qkv)
    assert not layer.cache.stored(0).scales[:, :, 3:5].any()
    for head, (found, want) in enumerate(zip(y[-1], exact_heads("int8", qkv), strict=True)):
        assert (np.abs(found - want.y) <= want.bound).all(), head


def test_a_cache_of_nothing_but_zeros_gives_zero():
    for dtype in DTYPES:
        assert not Layer(dtype, 64)(np.zeros((20, 8, 3, 16), np.float32)).any()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("part", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("count", [9, 1], ids=["prefill", "decode"])
def test_int8_makes_nan_or_infinity_in_a_key_or_value_nan_and_not_a_number(bad, part, count):
    clean = tokens(18)
    qkv = clean.copy()
    qkv[5, 3, part, 2] = bad

    def run(x: np.ndarray) -> np.ndarray:
        layer = Layer("int8", 64)
        return np.concatenate([layer(x[at : at + count]) for at in range(0, 18, count)])

    found, expected = run(qkv), run(clean)
    assert np.isnan(found[5:, 3]).all()
    found[5:, 3] = expected[5:, 3]
    assert same_bits(found, expected)  # other heads, and tokens that came before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1, 2], ids=["key", "value"])
def test_nan_in_a_token_does_not_reach_the_blocks_of_queries_before_it(dtype, part):
    """Within its block of 8 it may, as 0 x NaN: a step with a NaN ends in an error anyway."""
    qkv = tokens(24)
    clean = Layer(dtype, 64)(qkv)
    qkv[13, :, part, 2] = np.nan
    found = Layer(dtype, 64)(qkv)
    assert same_bits(found[:8], clean[:8])
    assert np.isnan(found[13:, :, 2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_hides_nan_of_forgotten_tokens_and_shows_nan_of_held_ones(dtype):
    config = CONFIG_OF[16]
    backend = NumbaBackend(2, dtype)
    layer, cache = backend.attention(0, 3, 16), backend.cache(config, 1, 64)
    stream = token_stream(config)[0]
    ten = Span.of([0], [10])
    y = layer(stream[:10], cache, ten)
    cache.advance(ten)
    assert np.isfinite(y).all()
    assert np.isnan(layer(np.full_like(stream[:10], np.nan), cache, ten)).all()
    cache.advance(ten)
    assert np.isnan(layer(stream[20:21], cache, ONE)).all()
    cache.truncate(0, 10)
    again = layer(stream[10:11], cache, ONE)
    fresh_cache = backend.cache(config, 1, 64)
    fresh = layer(stream[:11], fresh_cache, Span.of([0], [11]))
    assert same_bits(again[0], fresh[10])


def test_keys_beyond_float16_end_as_nan_not_as_a_number():
    config = CONFIG_OF[16]
    backend = NumbaBackend(2, "f16")
    layer, cache = backend.attention(0, 3, 16), backend.cache(config, 1, 64)
    qkv = np.abs(token_stream(config)[0, :4])
    qkv.reshape(4, 3, 3, 16)[1, :, 1:, 3] = 70000.0  # keys and values beyond 65,504
    first = layer(qkv[:1], cache, ONE)
    cache.advance(ONE)
    rest = layer(qkv[1:], cache, Span.of([0], [3]))
    assert np.isfinite(first).all()
    assert not np.isfinite(rest.reshape(3, 3, 16)[:, :, 3]).any()


# -- copy, truncate --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_truncated_row_continues_as_if_the_rest_had_never_been(dtype):
    qkv, others = tokens(700), 3 * tokens(700, seed=1)  # longer keys, forgotten again
    for kept in (256, 300, 511):  # the edge of a chunk, and within one
        layer, fresh = Layer(dtype, 700, batch=2), Layer(dtype, 700)
        layer(qkv[:kept])
        layer(others[kept:])
        layer(others[:9], row=1)
        layer.cache.truncate(0, kept)
        assert layer.cache.lengths.tolist() == [kept, 9]
        assert same_bits(layer(qkv[kept:]), fresh(qkv)[kept:]), kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_row_continues_as_its_source_and_leaves_it_alone(dtype):
    qkv, others = tokens(700), tokens(700, seed=1)
    expected = Layer(dtype, 700)(qkv)
    layer = Layer(dtype, 800, batch=3)
    layer(qkv[:600])
    layer(others[:650], row=2)
    layer.cache.copy(0, 2)
    assert layer.cache.lengths.tolist() == [600, 0, 600]
    assert same_bits(layer(qkv[600:], row=2), expected[600:])
    layer(others[:40], row=2, hold=False)
    assert same_bits(layer(qkv[600:]), expected[600:])


# -- the horizon -----------------------------------------------------------------------------------

CONTEXT = 3000  # 12 chunks


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipping_what_cannot_matter_changes_no_bit_however_the_tokens_are_cut(dtype):
    qkv = tokens(CONTEXT)
    whole = Layer(dtype, CONTEXT)
    whole.skip_nothing()
    truth = []
    for token in range(CONTEXT):
        whole.skip_nothing()  # storing a chunk's first key begins its length anew
        truth.append(whole(qkv[token : token + 1]))
    expected = np.concatenate(truth)
    assert np.isfinite(expected).all()
    for step in (CONTEXT, 509, 1):
        layer = Layer(dtype, CONTEXT)
        found = np.concatenate([layer(qkv[a : a + step]) for a in range(0, CONTEXT, step)])
        assert same_bits(found, expected), step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 180], ids=["decode", "prefill"])
def test_flat_heads_read_old_chunks_and_those_that_provably_need_not_do_not(dtype, count):
    qkv, old = tokens(CONTEXT, spread=0.1), 9  # chunks
    layer = Layer(dtype, CONTEXT)
    layer(qkv[:-count])
    expected = layer(qkv[-count:], hold=False)
    for chunk in range(old):
        layer.poison(chunk)
    found = layer(qkv[-count:], hold=False)
    # A query's own key scores at least -|q||k| / sqrt(D); one that lies `gap` back at most that
    # without the sign, less slope * gap. Lengths are taken 5 % longer, the faintest 1 fainter than
    # they need be; 8 queries share what one of them reads.
    lengths = np.linalg.norm(qkv, axis=3)  # [T, H, 3]
    score = lengths[-count:, :, 0].max(axis=0) * lengths[:, :, 1].max(axis=0) / 4  # [H]
    blind = slopes(8) * (CONTEXT - count - old * CHUNK) > 2 * 1.05 * score + 41.01
    assert blind[:2].all()
    assert same_bits(found[:, blind], expected[:, blind])
    assert np.isfinite(expected).all()
    assert np.isnan(found[:, -1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_head_reads_the_chunks_that_its_bound_does_not_exclude_and_no_others(dtype):
    qkv = tokens(CONTEXT, seed=2, spread=0.4)
    layer = Layer(dtype, CONTEXT)
    layer(qkv[:-1])
    held = [(page.data.copy(), page.scales.copy()) for page in layer.pages]
    q, keys = qkv[-1, :, 0].astype(np.float64), as_held(qkv[:, :, 1], dtype)
    distance = CONTEXT - 1 - np.arange(CONTEXT)
    scores = np.einsum("shd,hd->sh", keys, q) / 4 - distance[:, None] * slopes(8)  # [S, H]
    reach = 1.05 * np.linalg.norm(q, axis=1) / 4  # [H]
    read = 0
    for chunk in range((CONTEXT - 1) // CHUNK):
        layer.poison(chunk)
        found = np.isnan(layer(qkv[-1:], hold=False)[0, :, 0])
        for page, (data, scales) in zip(layer.pages, held, strict=True):
            page.data[:], page.scales[:] = data, scales
        end = (chunk + 1) * CHUNK
        longest = np.linalg.norm(qkv[end - CHUNK : end, :, 1], axis=2).max(axis=0)
        room = reach * longest - slopes(8) * distance[end - 1] - scores[end:].max(axis=0) + 41
        sure = np.abs(room) > 0.01  # float32 here and there: 1e-6 of scores below 1,600
        assert np.array_equal(found[sure], room[sure] > 0), chunk
        read += int(found.sum())
    assert 0 < read < 11 * 8


def massive(place: int) -> np.ndarray:
    """Tokens of which one, far back, has keys so long that the last query sees it first: by 8 in
    every head."""
    qkv = tokens(CONTEXT, seed=3)
    q = qkv[-1, :, 0].astype(np.float64)
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    qkv[-1, :, 0] = 4 * q
    needed = 16 + slopes(8)[:, None] * (CONTEXT - 1 - place)  # |q||k| / sqrt(D) with |q| = 4
    qkv[place, :, 1] = needed * q
    return qkv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 255, 256, 700], ids=str)
def test_a_key_much_longer_than_the_others_counts_from_far_back(dtype, place):
    qkv = massive(place)
    layer = Layer(dtype, CONTEXT, batch=2)
    layer(qkv[:-1])
    y = layer(qkv[-1:], hold=False)[0]
    for head, want in enumerate(exact_heads(dtype, qkv)):
        assert want.weights[place] > 0.05
        assert (np.abs(y[head] - want.y) <= want.bound).all(), head
    layer.cache.copy(0, 1)
    assert same_bits(layer(qkv[-1:], row=1, hold=False)[0], y)
    layer.cache.restore(1, layer.cache.stored(0))
    assert same_bits(layer(qkv[-1:], row=1)[0], y)
    layer.cache.truncate(0, 720)  # within the chunk of 700
    layer(qkv[720:-1])
    assert same_bits(layer(qkv[-1:])[0], y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf], ids=str)
def test_a_key_that_is_not_finite_lies_beyond_no_horizon(dtype, bad):
    qkv = tokens(CONTEXT, spread=0.1)
    qkv[5, :, 1, 3] = bad  # others of its chunk come after it
    layer = Layer(dtype, CONTEXT)
    layer(qkv[:-1])
    found = layer(qkv[-1:], hold=False)
    layer.cache.restore(0, layer.cache.stored(0))
    assert np.array_equal(layer(qkv[-1:], hold=False), found, equal_nan=True)
    layer.skip_nothing()
    expected = layer(qkv[-1:])
    # An infinite score of f32 and f16 may be minus infinity, and then its weight is 0.
    assert np.isnan(expected).all() == (np.isnan(bad) or dtype == "int8")
    assert np.array_equal(found, expected, equal_nan=True)


# -- faint weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_keys_equal_softmax_in_float64(dtype):
    qkv = tokens(10_000)
    layer = Layer(dtype, 10_000)
    layer(qkv[:-9])
    together = layer(qkv[-9:], hold=False)[-1]
    layer(qkv[-9:-1])
    alone = layer(qkv[-1:])[0]
    assert same_bits(together, alone)
    for head, want in enumerate(exact_heads(dtype, qkv)):
        assert (np.abs(alone[head] - want.y) <= want.bound).all(), head


def test_weights_below_e_minus_40_are_all_that_is_lost():
    # The last key has the largest score, 0; the others lie from 45 to 35 below it, with values so
    # large that each decimal of the threshold would show.
    size, slope, rng = 10_000, 2.0**-8, np.random.default_rng(0)
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=1, vocab_size=16)
    backend = NumbaBackend(2, "f32")
    layer, cache = backend.attention(0, 1, 16), backend.cache(config, 1, size)
    q = rng.standard_normal(16)
    target = rng.uniform(-45, -35, size)
    target[-1] = 0
    qkv = np.zeros((size, 3, 16), np.float32)
    qkv[-1, 0] = q
    bias = slope * (np.arange(size) - (size - 1))
    qkv[:, 1] = (4 * (target - bias) / (q @ q))[:, None] * q
    qkv[:, 2] = np.exp(40) / 1000 * rng.uniform(0.5, 1.5, (size, 16))
    qkv[-1, 2] = rng.standard_normal(16)
    span = Span.of([0], [size])
    y = layer(qkv.reshape(size, -1), cache, span)[-1]
    want = exact(*qkv[-1:, 0].astype(np.float64), *qkv[:, 1:].swapaxes(0, 1).astype(float), slope)
    assert (np.abs(y - want.y) <= want.bound).all()
    one_more = (target >= -40) & (target < -39)  # a threshold of e^-39 would be seen
    assert (want.weights[one_more] @ qkv[one_more, 2] > 0.5 * want.bound).all()


def test_ten_thousand_weights_that_count_as_0_are_less_than_a_rounding():
    assert 10_000 * np.exp(-40) < EPS / 2 * 1e-5


# -- the demo with an int8 cache -------------------------------------------------------------------

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the garden "
    "with her dog. One day, they found a big red ball under a tree, and Lily was very happy. "
    '"Look!" she said. "We can play with it all day." '
)


@pytest.fixture(scope="module")
def logits_of() -> Callable[[str, np.ndarray], np.ndarray]:
    """`logits_of("int8", ids)`: of the demo, [T, V] float64."""
    models = {dtype: bloomq.load(cache_dtype=dtype) for dtype in DTYPES}
    return lambda dtype, ids: models[dtype](ids).logits[0].astype(np.float64)


# Rounding a key or value of 64 components to peak / 127, the peak some 3 deviations: a step is 1/42
# of a deviation, its error 1/146: NMSE 5e-5. Two of these in each of 4 layers add up to 4e-4, were
# all of the hidden state what attention adds to it.
INT8_NMSE = 8 * 5e-5


def test_int8_changes_the_demos_logits_and_perplexity_by_no_more_than_its_rounding(logits_of):
    ids = np.array(bloomq.load().prompt_ids(STORY))
    expected, found = logits_of("f32", ids), logits_of("int8", ids)
    assert np.square(found - expected).sum() <= INT8_NMSE * np.square(expected).sum()
    # A token's loss moves by the errors of its logit and of the others' mean: sqrt(2) of an error,
    # of either sign. Their mean over n tokens is within 3 deviations of it.
    error = np.sqrt(INT8_NMSE * np.square(expected).mean())
    moved = mean_loss(found, ids) - mean_loss(expected, ids)
    assert abs(moved) <= 3 * np.sqrt(2) * error / np.sqrt(len(ids) - 1)
    # float16 is as far from float32, or nearer
    nearer = logits_of("f16", ids)
    assert np.square(nearer - expected).sum() <= INT8_NMSE * np.square(expected).sum()


def mean_loss(logits: np.ndarray, ids: np.ndarray) -> float:
    peak = logits.max(axis=1, keepdims=True)
    total = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
    return float((total[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]).mean())


def test_greedy_text_with_an_int8_cache_takes_tokens_that_float32_ranks_first_or_nearly(logits_of):
    model = bloomq.load(cache_dtype="int8")
    assert model.backend.description.endswith("int8 cache")
    prompt = model.prompt_ids(STORY)
    generation = model.generate(prompt, max_new_tokens=64)
    assert generation.text.strip()
    assert len(generation.ids) == 64
    logits = logits_of("f32", np.array([*prompt, *generation.ids]))[len(prompt) - 1 : -1]
    error = np.sqrt(INT8_NMSE * np.square(logits).mean())
    chosen = logits[np.arange(64), list(generation.ids)]
    # Of two logits each 4 errors off, the wrong one may win by so much.
    assert (logits.max(axis=1) - chosen).max() <= 2 * 4 * error
