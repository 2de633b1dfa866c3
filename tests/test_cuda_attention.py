"""ALiBi attention of the CUDA backend on torch's CPU device, against the NumPy reference.

Bounds: EPS = 2^-23 is float32's unit in the last place of 1. A score is a sum of D products and a
bias, some 20 roundings of numbers below 16, each off by at most 16 * EPS / 2 = 1e-6. Roundings are
of either sign, so together sqrt(20) * 1e-6 = 4e-6; a weight errs by that part of itself, a result,
a mean of values of size 2, by 9e-6, and the reference by as much: CLOSE = 2e-5. A key left out or
seen in vain changes more: the least weight among some 300 keys is 1e-3.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import as_held

from bloomq.backends.reference import ReferenceAttention, ReferenceCache
from bloomq.config import BloomConfig
from bloomq.layers import Span, slopes

torch = pytest.importorskip("torch")

from bloomq.backends.cuda import attention as module  # noqa: E402  # they need torch
from bloomq.backends.cuda.attention import attention, biases, mix, queries_at_once  # noqa: E402
from bloomq.backends.cuda.cache import CudaCache  # noqa: E402

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
DTYPES = ["f32", "f16", "int8"]
CLOSE = 2e-5
# Of the largest result, of prompts that are multiplied in float16: a query, a bias and a weight are
# rounded to 11 bits, scores below 16 by some 16 * 2^-11 each way, so a weight by 1.6 %, and a mean
# of values of either sign by less than 1 % of their size.
NARROW = 0.01
ROWS = 4


def config_of(n_head: int, head_dim: int) -> BloomConfig:
    return BloomConfig(hidden_size=n_head * head_dim, n_layer=2, n_head=n_head, vocab_size=16)


def tokens_of(count: int, n_head: int, head_dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, n_head * 3 * head_dim)).astype(np.float32)


class Both:
    """A cache here and one of the reference, which is given keys and values as this one holds
    them."""

    def __init__(self, n_head: int, head_dim: int, dtype: str, device: str = "cpu") -> None:
        self._shape, self._dtype = (n_head, 3, head_dim), dtype
        config, there = config_of(n_head, head_dim), torch.device(device)
        on_gpu = there.type == "cuda"
        self.cache = CudaCache(config, ROWS, 400, 0, dtype, there, by_triton=on_gpu)
        self._expected = ReferenceCache(config, ROWS, 400, 0)
        self._layer = attention(1, n_head, head_dim, there)
        self._reference = ReferenceAttention(1, n_head, head_dim)

    def step(self, rows: list[int], counts: list[int], seed: int = 0) -> None:
        """Feed new tokens to both, and compare."""
        span = Span.of(rows, counts)
        qkv = tokens_of(sum(counts), self._shape[0], self._shape[2], seed)
        kept = qkv.copy()
        found = self._layer(qkv, self.cache, span).cpu().numpy()
        assert qkv.tobytes() == kept.tobytes()
        split = qkv.reshape(-1, *self._shape)
        split[:, :, 1:] = as_held(split[:, :, 1:], self._dtype)
        expected = self._reference(qkv, self._expected, span)
        assert found.shape == expected.shape
        narrow = self.cache.device.type == "cuda" and self._dtype != "f32" and max(counts) > 1
        bound = NARROW * np.abs(expected).max() if narrow else CLOSE
        assert np.abs(found - expected).max() <= bound
        self.cache.advance(span)
        self._expected.advance(span)


# -- against the reference -------------------------------------------------------------------------

COUNTS = st.lists(st.sampled_from([0, 1, 1, 1, 2, 7, 33]), min_size=ROWS, max_size=ROWS)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(st.tuples(COUNTS, st.permutations(range(ROWS))), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(3, 20), (4, 8), (1, 64)]),
)
def test_spans_of_any_rows_and_counts_agree_with_the_reference(steps, dtype, heads):
    both = Both(*heads, dtype)
    for seed, (counts, order) in enumerate(steps):
        rows = [row for row in order if counts[row]]
        if rows:
            both.step(rows, [counts[row] for row in rows], seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_head", [1, 8, 14])  # 14: slopes of the second series, as the 176B's
def test_long_rows_beside_short_ones_agree_with_the_reference(n_head: int, dtype: str, device: str):
    both = Both(n_head, 16, dtype, device)
    both.step([2, 0], [300, 1])
    both.step([0, 1, 2, 3], [1, 1, 1, 1], 1)
    both.step([3, 2], [1, 1], 2)
    both.step([1, 3, 0], [40, 1, 2], 3)
    both.step([2], [1], 4)


def test_some_heads_of_a_model_have_its_slopes():
    qkv, span = tokens_of(5, 14, 8), Span.of([0, 1], [4, 1])
    whole = attention(0, 14, 8, CPU)(qkv, CudaCache(config_of(14, 8), 2, 16, 0, "f32", CPU), span)
    part = attention(0, 6, 8, CPU, slope=slopes(14)[8:])(
        qkv.reshape(5, 14, 24)[:, 8:].reshape(5, -1),
        CudaCache(config_of(6, 8), 2, 16, 0, "f32", CPU), span,
    )  # fmt: skip
    assert torch.allclose(part, whole[:, 8 * 8 :], rtol=0, atol=CLOSE)


def test_a_row_that_gets_no_token_changes_nothing():
    layer, qkv = attention(0, 3, 8, CPU), tokens_of(4, 3, 8)
    caches = [CudaCache(config_of(3, 8), ROWS, 16, 0, "f32", CPU) for _ in range(2)]
    found = layer(qkv, caches[0], Span.of([0, 2, 1], [3, 0, 1]))
    expected = layer(qkv, caches[1], Span.of([0, 1], [3, 1]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_blocks_give_what_large_ones_give(dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK_BIASES", 3 * 400 * 5)
    monkeypatch.setattr(module, "BLOCK_KEYS", 2 * 305 * 3 * 8)
    both = Both(3, 8, dtype)
    both.step([0, 1], [300, 17])
    both.step([0, 1, 2, 3], [1, 1, 1, 1], 1)
    both.step([3, 0, 1], [1, 1, 1], 2)


@pytest.mark.parametrize("layer_dtype", [torch.float16, torch.bfloat16])
def test_a_result_has_the_dtype_of_its_input(layer_dtype):
    qkv = torch.from_numpy(tokens_of(5, 3, 8)).to(layer_dtype)
    for counts in ([5], [1]):
        cache = CudaCache(config_of(3, 8), 1, 16, 0, "f32", CPU)
        found = attention(0, 3, 8, CPU)(qkv[: counts[0]], cache, Span.of([0], counts))
        assert found.dtype == layer_dtype


# -- a kernel that reads each row's own keys -------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Triton's kernel is taken, but it is its twin; the rows of each call."""
    triton_attention = pytest.importorskip("bloomq.backends.cuda.triton_attention")
    calls: list[int] = []

    def twin(qkv, codes, scales, rows, lengths, slopes, *, capacity, out_dtype):
        assert qkv.is_contiguous()
        calls.append(len(qkv))
        return triton_attention.plain_decode_attention(
            qkv, codes, scales, rows, lengths, slopes, capacity=capacity
        ).to(out_dtype)

    monkeypatch.setattr(triton_attention, "decode_attention", twin)
    monkeypatch.setattr(module, "reads_own_keys", lambda held: True)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_one_token_go_to_the_kernel_and_others_do_not(dtype: str, kernel: list[int]):
    both = Both(3, 8, dtype)
    both.step([0, 1], [100, 17])
    both.step([3, 0, 2], [1, 1, 1], 1)
    both.step([3, 1, 2], [1, 20, 1], 2)
    both.step([1], [1], 3)
    assert kernel == [3, 2, 1]


def test_no_kernel_is_taken_on_the_cpu():
    cache = CudaCache(config_of(3, 8), 1, 16, 0, "f16", CPU)
    assert not module.reads_own_keys(cache.layers[0])


@pytest.mark.parametrize(("head_dim", "taken"), [(64, True), (128, True), (20, False)])
def test_a_kernel_is_taken_for_the_heads_that_it_can_read(head_dim: int, taken: bool):
    pytest.importorskip("triton")
    cache = CudaCache(config_of(3, head_dim), 1, 16, 0, "f16", CPU, by_triton=True)
    assert module.reads_own_keys(cache.layers[0]) == taken
    cache.grow(32)
    assert module.reads_own_keys(cache.layers[0]) == taken


def test_a_kernel_runs_on_the_device_of_what_it_is_given(
    monkeypatch: pytest.MonkeyPatch, kernel: list[int]
):
    """Triton's launches go to the current device, whatever they are given."""
    entered: list[torch.device] = []

    def on_device_of(x: torch.Tensor):
        entered.append(x.device)
        return nullcontext()

    monkeypatch.setattr(module, "on_device_of", on_device_of)
    Both(3, 8, "f16").step([0], [1])
    assert kernel == [1] and entered == [CPU]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_head", "keys", "queries"),
    [(32, 8192, 256), (112, 8192, 64), (112, 8191, 64), (16, 2048, 2048), (112, 1 << 19, 1)],
)
def test_a_block_of_queries_is_bounded_by_its_biases(n_head: int, keys: int, queries: int):
    assert queries_at_once(n_head, keys) == queries


def test_8192_tokens_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch):
    """The last queries see what the reference sees."""
    most = []
    scaled = module.scaled_dot_product_attention

    def measured(*args, attn_mask, **others):
        most.append(attn_mask.numel())
        return scaled(*args, attn_mask=attn_mask, **others)

    monkeypatch.setattr(module, "BLOCK_BIASES", 1 << 23)
    monkeypatch.setattr(module, "scaled_dot_product_attention", measured)
    count, last = 8192, 5
    config, qkv = config_of(2, 8), tokens_of(count, 2, 8)
    cache = CudaCache(config, 1, count, 0, "f16", CPU)
    found = attention(0, 2, 8, CPU)(qkv, cache, Span.of([0], [count])).numpy()[-last:]
    assert max(most) <= 1 << 23
    split = qkv.reshape(count, 2, 3, 8)
    held = as_held(split, "f16").astype(np.float32)
    expected = ReferenceAttention(0, 2, 8)._attend(
        split[-last:, :, 0], held[:, :, 1], held[:, :, 2], count - last
    )
    assert np.abs(found - expected.reshape(last, -1)).max() <= CLOSE


# -- what must not be NaN, and what must -----------------------------------------------------------


def test_a_row_that_sees_no_key_gives_zeros():
    """Padding: whatever lies in the keys."""
    rng = np.random.default_rng(0)
    q, keys, values = (torch.from_numpy(rng.standard_normal(s)).float() for s in
                       ((2, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8)))  # fmt: skip
    keys[0], values[0], keys[1, 4:], values[1, 4:] = 4 * [torch.nan]
    found = mix(q, keys, values, torch.tensor([0, 4]), torch.from_numpy(slopes(3)))
    assert not found[0].any()
    assert found[1].isfinite().all()
    assert found[1].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_longer_text_left_behind_is_not_seen(dtype: str):
    both = Both(3, 8, dtype)
    both.step([0, 1], [100, 9])
    for row, length in ((0, 20), (1, 0)):
        at = row * both.cache.capacity
        layer = both.cache.layers[1]
        if dtype == "int8":
            layer.scales[:, at + length : at + 100] = torch.nan
        else:
            layer.codes[:, at + length : at + 100] = torch.nan
        both.cache.truncate(row, length)
        both._expected.truncate(row, length)
    both.step([0, 1], [1, 1], 1)
    both.step([1, 0], [30, 2], 2)
    both.step([0], [1], 3)


@pytest.mark.parametrize("counts", [[4, 4], [1, 1], [1, 4]])
def test_nan_in_one_row_does_not_reach_another(counts: list[int]):
    layer, span = attention(0, 3, 8, CPU), Span.of([0, 1], counts)
    qkv = tokens_of(sum(counts), 3, 8)
    clean = layer(qkv, CudaCache(config_of(3, 8), 2, 16, 0, "f16", CPU), span).numpy()
    qkv[0] = np.nan
    found = layer(qkv, CudaCache(config_of(3, 8), 2, 16, 0, "f16", CPU), span).numpy()
    assert found[counts[0] :].tobytes() == clean[counts[0] :].tobytes()
    assert np.isnan(found[: counts[0]]).all()


# -- float16, which a GPU multiplies in ------------------------------------------------------------


def test_biases_in_float16_are_exact_near_the_query_and_off_by_a_rounding_elsewhere():
    slope = torch.from_numpy(slopes(112))
    wide, narrow = (biases(slope, 500, 8, kind) for kind in (torch.float32, torch.float16))
    assert narrow.shape == wide.shape == (1, 112, 8, 508)
    assert narrow.stride(2) % module.WIDE == 0
    hidden = torch.arange(508) > torch.arange(500, 508)[:, None]
    assert (wide.isneginf() == hidden).all()
    assert (narrow.isneginf() == hidden).all()
    error = (narrow.float() - wide).abs().nan_to_num(0)
    assert (error <= wide.abs().nan_to_num(posinf=0) * 2**-11).all()
    assert not narrow.diagonal(500, 2, 3).any()


def test_prefill_in_float16_is_off_by_roundings_to_float16(monkeypatch: pytest.MonkeyPatch):
    both = [CudaCache(config_of(4, 16), 1, 300, 0, "f16", CPU) for _ in range(2)]
    qkv, span = tokens_of(300, 4, 16), Span.of([0], [300])
    exact = attention(0, 4, 16, CPU)(qkv, both[0], span)
    monkeypatch.setattr(module, "multiplied_in", lambda q, held: torch.float16)
    found = attention(0, 4, 16, CPU)(qkv, both[1], span)
    assert 0 < (found - exact).abs().max() < NARROW * exact.abs().max()
