"""The JAX backend, and the Flax classes over it: the numbers of the others and of transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tiny, checkpoint, pack

import bloomq
from bloomq import backends
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.heads import Head
from bloomq.layers import Span
from bloomq.pack import Pack
from bloomq.schemes import SCHEME_NAMES, get_scheme
from bloomq.weights import Matrix

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from bloomq.backends.jax.attention import JaxCache, Places, ragged  # noqa: E402
from bloomq.backends.jax.layers import JaxBackend, product  # noqa: E402
from bloomq.backends.jax.restore import picked, placed, whole  # noqa: E402
from bloomq.backends.jax.steps import bucket  # noqa: E402
from bloomq.flax import FlaxBloomForCausalLM, FlaxBloomModel  # noqa: E402

TINY = Tiny(n_head=6, head_dim=12, vocab_size=131)  # 6 heads: slopes of both kinds
IDS = np.random.default_rng(9).integers(0, TINY.vocab_size, (3, 12))
MASKS = {name: np.ones((3, 12), int) for name in ("none", "left", "right", "middle")}
MASKS["left"][0, :7] = MASKS["left"][1, :1] = 0
MASKS["right"][0, 4:] = MASKS["right"][2, 11:] = 0
MASKS["middle"][0, [3, 4, 8]] = MASKS["middle"][1, ::3] = MASKS["middle"][2, 0] = 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def flax(base: Path) -> FlaxBloomForCausalLM:
    return FlaxBloomForCausalLM.from_pretrained(pack(base, TINY, "f32"))


@pytest.fixture(scope="module")
def oracle(base: Path) -> Iterator[Any]:
    """transformers' BloomForCausalLM in float32."""
    yield from _oracle(checkpoint(base, TINY))


def _oracle(folder: Path) -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on two
    yield transformers.BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(before)


def off(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number."""
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


# -- the backend -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_restored_weights_have_the_same_bits_as_the_schemes_own(scheme: str):
    kind = get_scheme(scheme)
    w = np.random.default_rng(0).standard_normal((41, 70)).astype(np.float32)
    w[3] = 0
    matrix = Matrix("w", kind, w.shape, kind.quantize(w))
    parts = {name: placed(part) for name, part in matrix.parts.items()}
    ids = np.array([40, 0, 3, 17, 17])
    every = jax.jit(lambda parts: whole(parts, kind, w.shape))(parts)
    some = jax.jit(lambda parts, ids: picked(parts, kind, w.shape, ids))(parts, ids)
    assert np.asarray(every).tobytes() == matrix.dequantize().tobytes()
    assert np.asarray(some).tobytes() == matrix.rows(ids).tobytes()


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_logits_are_the_references_and_near_those_of_integer_kernels(base: Path, scheme: str):
    path, ids = pack(base, TINY, scheme), IDS[0]
    found = bloomq.load(path, backend="jax")(ids).logits
    assert found.dtype == np.float32
    assert off(found, bloomq.load(path, backend="reference")(ids).logits) < 1e-5
    kernels = bloomq.load(path, backend="numba", cache_dtype="f32")(ids).logits
    # the project's bound on what int8 activations may cost, see test_conformance
    bound = 1e-10 if get_scheme(scheme).is_float else 5e-4
    assert np.square(found - kernels).sum() <= bound * np.square(kernels).sum()


def test_the_demo_writes_the_same_text_as_on_numba(pack_of):
    prompts = ["Once upon a time", "def main("]
    found, expected = (
        bloomq.load(pack_of("f32"), backend=name).generate(prompts, max_new_tokens=24)
        for name in ("jax", "numba")
    )
    assert [one.text for one in found] == [one.text for one in expected]


def test_what_nobody_can_write_is_used_where_it_lies(base: Path):
    mapped = Pack.open(pack(base, TINY, "int8")).matrix("wte").parts["codes"]
    if jax.devices()[0].platform == "cpu":
        assert placed(mapped).unsafe_buffer_pointer() == mapped.ctypes.data
    mine = np.zeros(64, np.float32)
    there = placed(mine)
    mine[:] = 1
    assert not np.asarray(there).any()


def test_steps_of_like_size_and_all_layers_are_compiled_once(base: Path):
    lm = Head(Pack.open(pack(base, TINY, "int4")), JaxBackend(), "BloomForCausalLM")
    cache = lm.cache(2, 64)
    ids = IDS.reshape(-1)
    for lengths in ((9, 3), (11, 5), (1, 10)):
        before = product._cache_size(), ragged._cache_size()
        lm.step(ids[: sum(lengths)], cache, Span.of([0, 1], lengths), np.array([0]))
        compiled = product._cache_size() - before[0], ragged._cache_size() - before[1]
        assert compiled == (0, 0) or lengths == (9, 3)
        for row in (0, 1):
            cache.truncate(row, 0)


def test_a_text_that_left_nan_behind_does_not_reach_the_next():
    backend = JaxBackend()
    cache = JaxCache(TINY.config, 1, 64, 0)
    qkv = np.random.default_rng(0).standard_normal((5, 3 * TINY.config.hidden_size))
    qkv = qkv.astype(np.float32)
    attend = backend.attention(0, TINY.n_head, TINY.head_dim)
    clean = np.array(attend(qkv[:2], cache, Span.of([0], [2])))
    attend(np.full_like(qkv, np.nan), cache, Span.of([0], [5]))  # stored, and never counted
    assert np.array(attend(qkv[:2], cache, Span.of([0], [2]))).tobytes() == clean.tobytes()


def test_a_score_of_minus_infinity_is_not_taken_for_a_hidden_one():
    backend = JaxBackend()
    qkv = np.ones((2, TINY.n_head, 3, TINY.head_dim), np.float32)
    qkv[:, :, 0, 3], qkv[:, :, 1, 3] = np.inf, -1
    attend = backend.attention(0, TINY.n_head, TINY.head_dim)
    found = attend(qkv.reshape(2, -1), JaxCache(TINY.config, 1, 64, 0), Span.of([0], [2]))
    assert np.isnan(found).all()


def test_top_takes_zeros_of_either_sign_for_equal_and_sums_exactly():
    backend = JaxBackend()
    top = backend.top(np.array([[0.0, -0.0, -1.0, 0.0]], np.float32), 9)
    assert top.ids.tolist() == [[0, 1, 3, 2]]
    flat = np.random.default_rng(0).standard_normal((2, 250_880)).astype(np.float32)
    expected = np.log(np.exp(flat.astype(np.float64)).sum(axis=1))
    assert backend.top(flat, 1).logsumexp == pytest.approx(expected, abs=1e-9)
    scaled = np.log(np.exp(flat[0].astype(np.float64) / 0.7).sum())
    assert backend.sums(flat[:1], 0.7).logsumexp() == pytest.approx(scaled, abs=1e-9)
    flat[1, 7], flat[0, 3] = np.nan, np.inf
    assert not np.isfinite(backend.top(flat, 1).logsumexp).any()


def test_a_cache_beyond_memory_is_refused_new_or_grown(monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    expected = r"^no memory for a cache of \d+\.\d GB: ask for fewer tokens or rows$"
    cache = JaxBackend().cache(TINY.config, 1, 8)
    for tokens in (10**13, 2**60):
        with pytest.raises(CapacityError, match=expected):
            JaxBackend().cache(TINY.config, 1, tokens)
        with pytest.raises(CapacityError, match=expected):
            cache.grow(tokens)
    monkeypatch.setattr(jnp, "zeros", exhausted)
    with pytest.raises(CapacityError, match=r"^no memory for a cache of 0\.\d GB"):
        JaxBackend().cache(TINY.config, 1, 10**5)
    assert cache.capacity == 64


LOST = (
    r"^the cache \(past_key_values\) was lost when a step on it was interrupted: start a new one$"
)


def test_a_cache_whose_arrays_an_interruption_took_says_so(base: Path):
    lm = Head(Pack.open(pack(base, TINY, "int4")), JaxBackend(), "BloomForCausalLM")
    cache = lm.cache(2, 64)
    lm.step(IDS[0, :4], cache, Span.of([0], [4]), np.array([3]))
    cache.layers[1][0].delete()  # as a step does that is broken off behind its dispatch
    qkv = np.zeros((1, 3 * TINY.config.hidden_size), np.float32)
    span = Span.of([0], [1])
    for use in (
        lambda: lm.step(IDS[0, :1], cache, span, np.array([0])),
        lambda: lm.model.blocks[1].attention(qkv, cache, span),
        lambda: cache.grow(128),
        lambda: cache.copy(0, 1),
        lambda: cache.keys(1, 0, 4),
    ):
        with pytest.raises(BackendError, match=LOST):
            use()
    assert cache.lengths.tolist() == [4, 0]


def test_a_long_row_among_short_ones_makes_few_of_them_longer(base: Path):
    counts = [3] * 30 + [300, 1, 45, 3]
    cache = JaxCache(TINY.config, len(counts), 300, 0)
    places = Places.of(Span.of(range(len(counts)), counts), cache, bucket)
    assert (len(places.rows), places.longest) == (80, 32)  # of 64 x 512, had each row its own block
    rng, rows = np.random.default_rng(3), list(range(len(counts)))
    qkv = rng.standard_normal((2 * sum(counts), 3 * TINY.config.hidden_size)).astype(np.float32)
    attend = JaxBackend().attention(0, TINY.n_head, TINY.head_dim)
    start = 0
    for _ in range(2):  # onto nothing, then onto what is there
        span = Span.of(rows, counts)
        found = np.array(attend(qkv[start:][: sum(counts)], cache, span))
        for row in (0, 30, 32, 33):
            alone = JaxCache(TINY.config, 1, 600, 0)
            at = slice(int(span.starts[row]), int(span.starts[row + 1]))
            for before in range(0, start + 1, sum(counts)):
                mine = qkv[before:][at]
                expected = attend(mine, alone, Span.of([0], [counts[row]]))
                alone.advance(Span.of([0], [counts[row]]))
            assert off(found[at], expected) < 1e-5
        cache.advance(span)
        cache.grow(600)
        start += sum(counts)


@pytest.mark.parametrize("longest", [1, 2, 7, 100, 511])
def test_blocks_are_few_whatever_the_rows(longest: int):
    cache = JaxCache(TINY.config, 40, 600, 0)
    rng = np.random.default_rng(longest)
    for rows in (1, 2, 3, 4, 5, 8, 33, 40):
        counts = np.minimum(rng.geometric(0.3, rows), longest)
        counts[rng.integers(rows)] = longest
        span = Span.of(range(rows), counts.tolist())
        for room in (bucket, lambda n: n):
            places = Places.of(span, cache, room)
            assert len(places.rows) * places.longest <= 5 * room(int(counts.sum())) + len(counts)
            assert len(places.rows) <= 5 * room(rows) / 4
            token = np.repeat(np.arange(rows), counts)
            at = np.arange(len(token)) - span.starts[token]
            block = places.row[: len(token)]
            assert np.array_equal(places.rows[block], token)
            assert np.array_equal(places.past[block] + places.at[: len(token)], at)
            pairs = set(zip(block.tolist(), places.at.tolist(), strict=False))
            assert len(pairs) == len(token)
            assert places.at.max() < places.longest


def test_choosing_says_what_was_chosen_and_refuses_another_cache(base: Path):
    opened = Pack.open(pack(base, TINY, "int4"))
    choice = backends.choose("jax", opened, 3)
    assert choice.reason.startswith(f"asked for; JAX {jax.__version__}, ")
    with pytest.raises(UsageError) as caught:
        backends.choose("jax", opened, None, "f16")
    assert str(caught.value) == "cache_dtype is 'f16', the jax backend has f32 alone"


def test_without_jax_both_say_so(base: Path, monkeypatch: pytest.MonkeyPatch):
    path = pack(base, TINY, "int4")

    def refuse(name: str) -> None:
        raise ImportError("jaxlib is version 0.1\nSee the manual")

    with monkeypatch.context() as patch:
        patch.setattr(backends.importlib, "import_module", refuse)
        with pytest.raises(BackendError) as caught:
            FlaxBloomModel.from_pretrained(path)
    assert str(caught.value) == "the Flax classes run on JAX: jaxlib is version 0.1"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"jax is not installed \(it comes with pip install "):
        bloomq.load(path, backend="jax")


# -- the Flax classes against transformers ---------------------------------------------------------


@pytest.mark.parametrize("padding", MASKS)
def test_outputs_are_those_of_transformers_and_0_where_masked(flax, oracle, padding: str):
    torch, mask = pytest.importorskip("torch"), MASKS[padding]
    found = flax(IDS, mask, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        expected = oracle(
            torch.tensor(IDS), attention_mask=torch.tensor(mask), output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
    real = mask.astype(bool)
    for one, other in (
        (found.logits, expected.logits),
        *zip(found.hidden_states, expected.hidden_states, strict=True),
    ):
        assert off(one[real], other[real]) < 1e-5
        assert not np.asarray(one)[~real].any()
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        queries = np.broadcast_to(real[:, None, :, None], one.shape)
        assert np.abs(np.asarray(one) - np.asarray(other))[queries].max() < 1e-5
        assert not np.asarray(one)[~queries].any()


def test_the_bare_model_ends_behind_the_last_norm(base: Path, oracle):
    torch = pytest.importorskip("torch")
    model = bloomq.FlaxBloomModel.from_pretrained(pack(base, TINY, "f32"))
    found = model(IDS, MASKS["left"])
    with torch.no_grad():
        expected = oracle.transformer(torch.tensor(IDS), attention_mask=torch.tensor(MASKS["left"]))
    real = MASKS["left"].astype(bool)
    assert off(found.last_hidden_state[real], expected.last_hidden_state[real]) < 1e-5
    assert list(found) == ["last_hidden_state"]


def test_residuals_behind_the_norm_are_those_of_transformers(base: Path, tmp_path: Path):
    folder = tmp_path / "post"
    shutil.copytree(checkpoint(base, TINY), folder)
    config = json.loads((folder / "config.json").read_text())
    config["apply_residual_connection_post_layernorm"] = True
    (folder / "config.json").write_text(json.dumps(config))
    torch = pytest.importorskip("torch")
    found = FlaxBloomForCausalLM.from_pretrained(folder)(IDS).logits  # a checkpoint, converted
    for model in _oracle(folder):
        with torch.no_grad():
            assert off(found, model(torch.tensor(IDS)).logits) < 1e-5


def test_gradients_of_the_embeddings_are_those_of_torch(flax, oracle):
    torch, mask = pytest.importorskip("torch"), MASKS["left"]
    given = oracle.transformer.word_embeddings(torch.tensor(IDS)).detach().requires_grad_()
    weights = np.random.default_rng(1).standard_normal((*IDS.shape, TINY.vocab_size))
    weights = weights.astype(np.float32) * mask[..., None]
    logits = oracle(inputs_embeds=given, attention_mask=torch.tensor(mask)).logits
    (logits * torch.tensor(weights)).sum().backward()

    def loss(embeds: Any) -> Any:
        out = flax.apply(flax.params, attention_mask=mask, inputs_embeds=embeds)
        return (out.logits * weights).sum()

    found = jax.jit(jax.grad(loss))(given.detach().numpy())
    assert off(found, given.grad) < 1e-4
    assert not np.asarray(found)[mask == 0].any()


def test_unquantized_weights_have_gradients_too(flax, oracle):
    torch = pytest.importorskip("torch")
    oracle.zero_grad()
    oracle(torch.tensor(IDS)).logits.square().sum().backward()
    slopes = jax.jit(jax.grad(lambda p: jnp.square(flax.apply(p, IDS).logits).sum()))(flax.params)
    block = oracle.transformer.h[1]
    found = slopes["h.1.mlp.up"]["bias"], slopes["h.1.ln_1"]["weight"]
    expected = block.mlp.dense_h_to_4h.bias.grad, block.input_layernorm.weight.grad
    for one, other in zip(found, expected, strict=True):
        assert off(one, other) < 1e-4


# -- the Flax classes: pure, mapped, continued, sharded --------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "nl4", "int4", "bf16"])
def test_a_quantized_pack_gives_the_references_logits(base: Path, scheme: str):
    path = pack(base, TINY, scheme)
    found = FlaxBloomForCausalLM.from_pretrained(path, scheme=scheme)(IDS[:2, :8]).logits
    assert off(found, bloomq.load(path, backend="reference")(IDS[:2, :8]).logits) < 1e-5


def test_mapping_over_a_batch_of_batches_is_calling_each(flax):
    ids = IDS.reshape(3, 2, 6)
    masks = np.stack([MASKS["middle"][0].reshape(2, 6), *np.ones((2, 2, 6), int)])
    found = jax.jit(jax.vmap(lambda i, m: flax.apply(flax.params, i, m).logits))(ids, masks)
    for one, batch, mask in zip(found, ids, masks, strict=True):
        assert off(one, flax(batch, mask).logits) < 1e-5


def test_a_call_may_itself_be_traced_and_returns_a_tree(flax):
    out = jax.jit(lambda ids: flax(ids, output_hidden_states=True))(IDS)
    assert isinstance(out, bloomq.outputs.CausalLMOutput)
    assert off(out.logits, flax(IDS).logits) < 1e-5
    assert list(out) == ["logits", "hidden_states"]
    assert isinstance(flax(IDS.tolist(), return_dict=False), tuple)


def test_what_is_masked_reaches_nothing_whatever_it_is(flax):
    embeds = np.random.default_rng(0).standard_normal((3, 12, TINY.config.hidden_size))
    embeds, mask = embeds.astype(np.float32), MASKS["middle"]
    clean = flax(attention_mask=mask, inputs_embeds=embeds).logits
    embeds[mask == 0] = np.nan
    assert np.array_equal(flax(attention_mask=mask, inputs_embeds=embeds).logits, clean)
    assert not np.asarray(flax(IDS[:1], np.zeros((1, 12))).logits).any()


@pytest.mark.parametrize("wide", ["own", "so far", "max_length"])
def test_continuing_equals_running_at_once(flax, wide: str):
    whole_logits, past, at, parts = flax(IDS, MASKS["left"]).logits, flax.init_cache(3, 16), 0, []
    for count in (5, 1, 6):
        stop = at + count
        mask = {
            "own": MASKS["left"][:, at:stop],
            "so far": MASKS["left"][:, :stop],
            "max_length": np.pad(MASKS["left"], ((0, 0), (0, 4)), constant_values=1),
        }[wide]
        out = flax(IDS[:, at:stop], mask, past)
        past, at = out.past_key_values, stop
        parts.append(out.logits)
    assert off(np.concatenate(parts, axis=1), whole_logits) < 1e-5
    assert int(past.seen) == 12


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import bloomq
model = bloomq.FlaxBloomForCausalLM.from_pretrained(sys.argv[1])
mesh = Mesh(np.array(jax.devices()), ("rows",))
by_row, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["rows"], []))
params = {
    name: jax.device_put(parts, by_row if "codes" in parts else everywhere)
    for name, parts in model.params.items()
}
ids = np.arange(12).reshape(2, 6)
found = jax.jit(model.apply)(params, ids, np.ones((2, 6), int)).logits
alone, codes = np.asarray(model(ids).logits), params["wte"]["codes"]
print(len(jax.devices()), len(codes) // len(codes.addressable_shards[0].data))
print(float(np.abs(np.asarray(found) - alone).max() / np.abs(alone).max()))
"""


def test_parameters_may_lie_on_several_devices(base: Path):
    tiny = Tiny(n_head=4, head_dim=32, vocab_size=128)  # rows and tiles divide by four
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(pack(base, tiny, "int4"))],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    devices, parts, difference = done.stdout.split()
    assert (devices, parts) == ("4", "4")
    assert float(difference) < 1e-5


# -- generate --------------------------------------------------------------------------------------


def test_greedy_generation_is_that_of_the_other_backends_whatever_the_padding(flax, base: Path):
    expected = bloomq.load(pack(base, TINY, "f32"), backend="reference").generate(
        [IDS[row][mask == 1].tolist() for row, mask in enumerate(MASKS["left"])], max_new_tokens=6
    )
    out = flax.generate(IDS, MASKS["left"], max_new_tokens=6, eos_token_id=[])
    assert isinstance(out.sequences, jax.Array)
    assert out.sequences.shape == (3, 18)
    assert np.array_equal(out.sequences[:, :12], IDS)
    for row, one in zip(out.sequences, expected, strict=True):
        assert tuple(row[12:].tolist())[: len(one.ids)] == one.ids


def test_a_row_that_ended_is_filled_up(flax):
    plain = flax.generate(IDS, max_new_tokens=5, eos_token_id=[])[0]
    end = int(plain[0, 13])
    out = flax.generate(IDS, max_new_tokens=5, eos_token_id=end, pad_token_id=7).sequences
    tail = plain[0, 12:].tolist()
    kept = tail[: tail.index(end) + 1]
    assert out[0, 12:].tolist() == (kept + [7] * 5)[: out.shape[1] - 12]
    filled = flax.generate(IDS[:1], max_new_tokens=5, eos_token_id=end).sequences
    assert filled[0, 12:].tolist() == kept


def test_the_same_key_draws_the_same_tokens(flax):
    def drawn(key: Any, params: Any = None) -> list[list[int]]:
        out = flax.generate(
            IDS, max_new_tokens=8, do_sample=True, temperature=2.0, top_k=0, prng_key=key,
            params=params,
        )  # fmt: skip
        return np.asarray(out.sequences).tolist()

    first = drawn(jax.random.key(3))
    assert first == drawn(jax.random.PRNGKey(3), flax.params)
    assert first != drawn(jax.random.key(4))
    assert drawn(None) == drawn(jax.random.key(0))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "found neither of input_ids and inputs_embeds, expected one of them"),
        (
            {"input_ids": IDS, "inputs_embeds": np.zeros((3, 12, 72))},
            "found both of input_ids and inputs_embeds, expected one of them",
        ),
        ({"input_ids": IDS[0]}, r"input_ids is int32 \[12\], expected whole numbers of shape"),
        ({"input_ids": [[1.5]]}, r"input_ids is float32 \[1, 1\], expected whole"),
        ({"input_ids": np.zeros((0, 3), int)}, r"input_ids is int32 \[0, 3\], expected whole"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids has rows of different lengths: pad them and"),
        ({"input_ids": [[1, 131]]}, "token id 131, expected 0 to 130"),
        ({"input_ids": [[-1, 3]]}, "token id -1, expected 0 to 130"),
        (
            {"inputs_embeds": np.zeros((1, 2, 9), np.float32)},
            r"inputs_embeds is float32 \[1, 2, 9\], expected floats of shape \[B, T, 72\]",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.ones((3, 5))},
            r"attention_mask is \[3, 5\], expected \[3, 12\] as the tokens$",
        ),
        (
            {"input_ids": IDS, "attention_mask": np.full((3, 12), 2)},
            "attention_mask holds other values than 0 and 1",
        ),
        ({"input_ids": IDS, "attention_mask": [["a"] * 12] * 3}, "attention_mask holds other"),
        ({"input_ids": "text"}, r"input_ids is <U4 \[\], expected an array of numbers$"),
        (
            {"input_ids": [[1, None]]},
            r"input_ids is object \[1, 2\], expected an array of numbers$",
        ),
        (
            {"input_ids": [[1 << 70]]},
            r"input_ids is object \[1, 1\], expected an array of numbers$",
        ),
        ({"input_ids": jax.random.key(0)}, r"input_ids is key<fry> \[\], expected an array of num"),
        ({"input_ids": [[True]]}, r"input_ids is bool \[1, 1\], expected whole numbers"),
        ({"inputs_embeds": [["a", "b"]]}, r"inputs_embeds is <U1 \[1, 2\], expected an array of"),
        ({"inputs_embeds": [[[1.0]], []]}, "inputs_embeds has rows of different lengths"),
        (
            {"inputs_embeds": np.zeros((1, 0, 72))},
            r"inputs_embeds is float32 \[1, 0, 72\], expected",
        ),
        (
            {"inputs_embeds": np.zeros((0, 3, 72))},
            r"inputs_embeds is float32 \[0, 3, 72\], expected",
        ),
        (
            {"inputs_embeds": np.zeros((1, 2, 72), bool)},
            r"inputs_embeds is bool \[1, 2, 72\], expec",
        ),
        (
            {"inputs_embeds": np.zeros((1, 2, 72), complex)},
            r"inputs_embeds is complex64 \[1, 2, 72\]",
        ),
        (
            {"input_ids": IDS, "past_key_values": (1, 2)},
            "past_key_values is a tuple, expected what init_cache or an earlier call of a Flax",
        ),
        ({"input_ids": IDS, "params": []}, "params is a list, expected the form of model.params$"),
        ({"input_ids": IDS, "params": 7}, "params is a int, expected the form of model.params$"),
        ({"input_ids": IDS, "params": {"wte": 3}}, "params has no wte.values, expected the form"),
        ({"input_ids": IDS, "train": True}, "train and dropout_rng ask for dropout: quantized"),
        ({"input_ids": IDS, "dropout_rng": 3}, "train and dropout_rng ask for dropout"),
        ({"input_ids": IDS, "params": {}}, "params has no wte.values, expected the form of model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_of_wrong_arguments_is_refused(flax, arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=f"^{message}"):
        flax(**arguments)


def with_part(params: Any, name: str, part: str, value: Any) -> Any:
    return {**params, name: {**params[name], part: value}}


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("ln_f", "weight", [1.0] * 72, "params has a list for ln_f.weight, expected an array$"),
        ("ln_f", "bias", np.zeros(71, np.float32),
         r"params has ln_f.bias as float32 \[71\], this model has F32 \[72\]$"),
        ("wte", "codes", np.zeros((10, 24, 16, 4), np.int8),
         r"params has wte.codes as int8 \[10, 24, 16, 4\], this model has U8 \[10, 24, 16, 4\]$"),
        ("h.0.mlp.up", "scales", np.zeros((1, 1, 1), np.float16), "params has h.0.mlp.up.scales"),
    ],
    ids=["list", "shape", "kind", "scales"],
)  # fmt: skip
def test_params_of_another_form_are_refused_by_name(base: Path, name, part, value, message):
    model = FlaxBloomForCausalLM.from_pretrained(pack(base, TINY, "int4"))
    wrong = with_part(model.params, name, part, value)
    for use in (
        lambda: model(IDS, params=wrong),
        lambda: model.apply(wrong, IDS),
        lambda: model.generate(IDS, params=wrong, max_new_tokens=1),
    ):
        with pytest.raises(UsageError, match=f"^{message}"):
            use()


def test_params_may_hold_more_and_be_of_other_precision(flax):
    more = {**flax.params, "note": "mine", 3: None}
    assert np.array_equal(flax(IDS, params=more).logits, flax(IDS).logits)
    half = with_part(flax.params, "ln_f", "weight", np.asarray(flax.params["ln_f"]["weight"], "f2"))
    assert np.isfinite(flax(IDS, params=half).logits).all()


def test_a_pure_call_refuses_what_is_no_array_of_numbers(flax):
    for ids in ("text", [[1, 2], [3]], [[1 << 70]], [[None]], jax.random.key(0), {}):
        with pytest.raises(UsageError, match=r"^input_ids is .*, expected an array of numbers$"):
            flax.apply(flax.params, ids)
    with pytest.raises(
        UsageError, match=r"^attention_mask is 'mask', expected an array of numbers"
    ):
        flax.apply(flax.params, IDS, "mask")
    traced = jax.jit(lambda one, other: flax([[one, other]]).logits)  # tracers in lists are numbers
    assert off(traced(5, 7), flax([[5, 7]]).logits) < 1e-5


def test_what_is_masked_may_be_any_id(flax):
    ids, mask = np.where(MASKS["middle"] == 1, IDS, -100), MASKS["middle"]
    assert np.array_equal(flax(ids, mask).logits, flax(IDS, mask).logits)
    past = flax(IDS[:, :4], mask[:, :4], flax.init_cache(3, 16)).past_key_values
    flax(ids[:, 4:], mask, past)  # a mask of the past too
    with pytest.raises(UsageError, match=r"^token id -100, expected 0 to 130$"):
        flax(ids, MASKS["left"])


def test_embeddings_of_less_precision_are_computed_in_float32(flax):
    embeds = np.random.default_rng(0).standard_normal((1, 3, 72)).astype(np.float16)
    wide = flax(inputs_embeds=embeds.astype(np.float32)).logits
    for given in (embeds, jnp.asarray(embeds)):
        assert np.array_equal(flax(inputs_embeds=given).logits, wide)


def test_a_saved_pack_is_found_the_next_time(base: Path, tmp_path: Path):
    folder, saved = checkpoint(base, TINY), tmp_path / "saved"
    models = [
        FlaxBloomForCausalLM.from_pretrained(folder, scheme="int8", save_pack=saved)
        for _ in range(2)
    ]
    assert Pack.open(saved).schemes["wte"].name == "int8"
    first, again = (model(IDS).logits for model in models)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("sizes", [(2, -1), (2, 5.5), ("2", 5), (0, 5), (True, 5)], ids=str)
def test_a_cache_of_no_size_is_refused(flax, sizes):
    with pytest.raises(UsageError, match=r"^init_cache's \w+ is .*, expected 1 or more$"):
        flax.init_cache(*sizes)


def test_a_past_of_another_model_is_refused(flax, base: Path):
    other = Tiny(n_head=4, head_dim=12, n_layer=3)
    mine = bloomq.BloomForCausalLM.from_pretrained(pack(base, TINY, "f32"), backend="reference")
    with pytest.raises(UsageError, match=r"^past_key_values is a KeyValues, expected what init_c"):
        flax(IDS, past_key_values=mine(IDS).past_key_values)
    past = FlaxBloomModel.from_pretrained(pack(base, other, "f32")).init_cache(3, 16)
    found = r"^past_key_values is of another model: this one has \d layers with 6 heads of 12$"
    with pytest.raises(UsageError, match=found):
        flax(IDS, past_key_values=past)
    with pytest.raises(UsageError, match=found):
        flax.apply(flax.params, IDS, past_key_values=past)


def test_a_past_that_does_not_fit_is_refused(flax):
    past = flax.init_cache(3, 16)
    with pytest.raises(UsageError, match=r"^2 rows, past_key_values has 3$"):
        flax(IDS[:2], past_key_values=past)
    with pytest.raises(UsageError, match=r"expected \[3, 12\] as the tokens, or with a column for"):
        flax(IDS, np.ones((3, 17)), past)
    past = flax(IDS, past_key_values=past).past_key_values
    with pytest.raises(CapacityError, match=r"^24 columns, past_key_values has room for 16: ask "):
        flax(IDS, past_key_values=past)
    with pytest.raises(UsageError, match=r"^attention_mask has 5 columns, expected 3 for these"):
        flax(IDS[:, :3], np.ones((3, 5)), past)
    with pytest.raises(CapacityError, match=r"^no memory for a cache of "):
        flax.init_cache(1, 2**60)


def test_other_dtypes_schemes_and_heads_are_refused(base: Path):
    path = pack(base, TINY, "int4")
    for dtype in (jnp.bfloat16, "float16", np.dtype(np.float64)):
        with pytest.raises(UsageError, match=r"^dtype is .*, these classes compute in float32: a"):
            FlaxBloomModel.from_pretrained(path, dtype=dtype)
    for dtype in (jnp.float32, "float32", np.dtype(np.float32)):
        assert FlaxBloomModel.from_pretrained(path, dtype=dtype).config == Pack.open(path).config
    with pytest.raises(UsageError, match=r"is int4 already, expected int8"):
        FlaxBloomModel.from_pretrained(path, scheme="int8")


def test_generation_of_wrong_arguments_is_refused(flax):
    with pytest.raises(UsageError, match=r"^a prompt has no token that attention_mask leaves"):
        flax.generate(IDS, np.concatenate([np.ones((2, 12)), np.zeros((1, 12))]))
    with pytest.raises(
        UsageError, match=r"^prng_key is 'seed', expected what jax.random.key makes"
    ):
        flax.generate(IDS, do_sample=True, prng_key="seed")
    with pytest.raises(UsageError, match=r"^max_new_tokens is '3', expected a whole number"):
        flax.generate(IDS, max_new_tokens="3")
