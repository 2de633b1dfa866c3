"""LoRA adapters beside a quantized base, against PEFT's own forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import TARGETS, random_lora, scaled, stacked, written
from models import DEMO

import bloomq
from bloomq import backends
from bloomq.errors import UsageError
from bloomq.layers import Span
from bloomq.lora import Adapter, Adapters, Factors

pytest.importorskip("peft")
oracle = pytest.importorskip("oracle")

SPEC = oracle.Spec()
IDS = oracle.ids_of(SPEC, 3, 21)
Models = Any
# Float32 sums in another order; measured: 3e-7 to 8e-7 (numba), 2e-7 (reference).
CLOSE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    with oracle.one_torch_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return oracle.Models(tmp_path_factory.getbasetemp())


@pytest.fixture
def fresh(models: Models) -> Callable[..., Any]:
    """`fresh(SPEC, "int8", "reference")`: a model of ours with no adapter loaded."""

    def make(spec: Any = SPEC, scheme: str = "f32", backend: str = "numba") -> Any:
        pack = models.ours(spec, scheme).pack
        return getattr(bloomq, spec.kind)(pack, backends.choose(backend, pack, None).backend)

    return make


@pytest.fixture(scope="module")
def several(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of SPEC, of different ranks and modules."""
    base, theirs = tmp_path_factory.mktemp("several"), models.theirs(SPEC)
    random_lora(theirs, base / "a", seed=1)
    random_lora(theirs, base / "b", seed=2, r=7, target_modules=["dense", "query_key_value"])
    random_lora(theirs, base / "c", seed=3, r=60, lora_alpha=16)
    return {name: base / name for name in "abc"}


def logits(model: Any, ids: np.ndarray = IDS, **options: Any) -> np.ndarray:
    return model(ids, **options).logits


def expected(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    return oracle.ask(model, input_ids=ids).logits.numpy()


# -- the same numbers as PEFT's --------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends.available())
@pytest.mark.parametrize("targets", [TARGETS, *([name] for name in TARGETS)], ids=str)
def test_logits_with_an_adapter_are_those_of_peft(models, fresh, tmp_path, backend, targets):
    theirs = random_lora(models.theirs(SPEC), tmp_path / "lora", target_modules=list(targets))
    model = fresh(backend=backend)
    base = logits(model)
    model.load_adapter(tmp_path / "lora", "lora")
    found = logits(model, adapters="lora")
    assert oracle.off(found, expected(theirs)) < CLOSE
    assert oracle.off(found, base) > 0.02  # the adapter is no trifle
    assert oracle.off(logits(model), base) < CLOSE
    assert model.adapters == {"lora": 4}


@pytest.mark.parametrize("backend", backends.available())
def test_residuals_behind_the_norm_take_adapters_too(models, fresh, tmp_path, backend):
    spec = oracle.Spec(post_norm=True, n_head=3, head_dim=20)
    theirs = random_lora(models.theirs(spec), tmp_path / "lora")
    model = fresh(spec, backend=backend)
    model.load_adapter(tmp_path / "lora", "lora")
    assert oracle.off(logits(model, adapters="lora"), expected(theirs)) < CLOSE


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_alpha": 3},
        {"rank_pattern": {"dense": 9, "h.1.mlp.dense_h_to_4h": 2}},
        {"alpha_pattern": {"query_key_value": 1.5, "mlp.*": 24}},
        {"rank_pattern": {r"^transformer\.h\.[01]\.mlp.*": 6}, "alpha_pattern": {"h.0.mlp.+": 2}},
        {"rank_pattern": {"(dense|dense_h_to_4h)": 3}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"r": 70},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*rank_pattern.*use_rslora")
def test_ranks_and_scales_are_what_the_config_says(models, fresh, tmp_path, options):
    theirs = random_lora(models.theirs(SPEC), tmp_path / "lora", **options)
    model = fresh()
    model.load_adapter(tmp_path / "lora", "lora")
    assert oracle.off(logits(model, adapters="lora"), expected(theirs)) < CLOSE
    ranks = [options.get("r", 4), *options.get("rank_pattern", {}).values()]
    assert model.adapters == {"lora": max(ranks)}


@pytest.mark.parametrize("scale", [0.5, -1, np.float32(2)])
def test_an_adapter_is_scaled(models, fresh, tmp_path, scale):
    theirs = scaled(random_lora(models.theirs(SPEC), tmp_path / "lora"), float(scale))
    model = fresh()
    model.load_adapter(tmp_path / "lora", "lora")
    assert oracle.off(logits(model, adapters={"lora": scale}), expected(theirs)) < CLOSE
    assert np.array_equal(logits(model, adapters={"lora": 0}), logits(model))
    assert np.array_equal(logits(model, adapters={"lora": 1}), logits(model, adapters="lora"))


@pytest.mark.parametrize("backend", backends.available())
def test_stacked_adapters_add_up(models, fresh, several, tmp_path, backend):
    theirs = stacked(random_lora(models.theirs(SPEC), tmp_path / "own"), several["b"], several["c"])
    model = fresh(backend=backend)
    model.load_adapter(tmp_path / "own", "own")
    for name in "bc":
        model.load_adapter(several[name], name)
    found = logits(model, adapters={"c": 1, "own": 1, "b": 1})
    assert oracle.off(found, expected(theirs)) < CLOSE


@pytest.mark.parametrize("kind", ["BloomModel", *oracle.CLASSES[2:]])
def test_every_class_takes_adapters(models, fresh, tmp_path, kind):
    spec = oracle.Spec(kind=kind)
    theirs = random_lora(models.theirs(spec), tmp_path / "lora")
    model = fresh(spec)
    model.load_adapter(tmp_path / "lora", "lora")
    found, base = model(IDS, adapters="lora")[0], model(IDS)[0]
    assert oracle.off(found, oracle.ask(theirs, input_ids=IDS)[0]) < CLOSE
    assert oracle.off(found, base) > 0.01


def test_an_adapter_of_a_bare_model_fits_the_language_model(models, fresh, tmp_path):
    """Its names lack `transformer.`."""
    random_lora(models.theirs(SPEC).transformer, tmp_path / "bare", seed=4)
    theirs = random_lora(models.theirs(SPEC), tmp_path / "whole", seed=4)
    model = fresh()
    model.load_adapter(tmp_path / "bare", "bare")
    assert oracle.off(logits(model, adapters="bare"), expected(theirs)) < CLOSE


def test_hidden_states_and_attentions_are_the_adapted_models(models, fresh, tmp_path):
    theirs = random_lora(models.theirs(SPEC), tmp_path / "lora")
    theirs.base_model.model.set_attn_implementation("eager")
    model = fresh()
    model.load_adapter(tmp_path / "lora", "lora")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    found = model(IDS, adapters="lora", **wanted)
    right = oracle.ask(theirs, input_ids=IDS, **wanted)
    assert np.array_equal(found.logits, logits(model, adapters="lora"))
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(found, name), getattr(right, name), strict=True):
            assert oracle.off(one, other) < CLOSE


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_factors_of_two_bytes_are_read_exactly(fresh, tmp_path, dtype):
    model = fresh()
    model.load_adapter(written(tmp_path / "short", dtype=dtype), "short")
    factors = model.head.adapters._loaded["short"].factors["h.1.mlp.up"]
    exact = written(tmp_path / "exact", dtype=dtype)
    from safetensors.torch import load_file

    tensors = load_file(exact / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.1.mlp.dense_h_to_4h.lora_"
    assert np.array_equal(factors.down, tensors[f"{name}A.weight"].float().numpy())
    assert np.array_equal(factors.up, 2 * tensors[f"{name}B.weight"].float().numpy())


# -- quantized bases -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "nl4", "int4", "nf4"])
def test_beside_a_quantized_base_an_adapter_is_not_rounded(models, fresh, tmp_path, scheme):
    """PEFT over the base's dequantized weights: the adapter's own products are float32, so what
    differs is what differs without it, the base's int8 activations: NMSE 5e-4 a product at most,
    which these layers amplify (see test_transformers)."""
    model = fresh(scheme=scheme)
    base = models.theirs(SPEC, of=models.ours(SPEC, scheme))
    theirs = random_lora(base, tmp_path / "lora")
    model.load_adapter(tmp_path / "lora", "lora")
    without = oracle.nmse(logits(model), expected(base))
    beside = oracle.nmse(logits(model, adapters="lora"), expected(theirs))
    assert beside < 2.5 * without < 2e-2
    merged = expected(theirs.merge_and_unload())
    assert oracle.nmse(logits(model, adapters="lora"), merged) < 2.5 * without
    assert oracle.nmse(logits(model), merged) > 10 * beside
    plain = fresh(scheme=scheme, backend="reference")  # whose activations are not rounded
    plain.load_adapter(tmp_path / "lora", "lora")
    assert oracle.off(logits(plain, adapters="lora"), merged) < CLOSE


# -- rows, switching -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["f32", "int8", "nl4"])
def test_rows_with_different_adapters_have_the_bits_that_each_has_alone(fresh, several, scheme):
    """Alone: in a model that has loaded this adapter and no other, or none for the base's row."""
    model = fresh(scheme=scheme)
    for name, folder in several.items():
        model.load_adapter(folder, name)
    choices = ["c", None, {"b": 0.5}, "a", {}]
    ids = oracle.ids_of(SPEC, len(choices), 21)
    together = logits(model, ids, adapters=choices)
    for row, choice in enumerate(choices):
        single = fresh(scheme=scheme)
        for name in dict.fromkeys([choice] if isinstance(choice, str) else choice or ()):
            single.load_adapter(several[name], name)
        alone = logits(single, ids[row : row + 1], adapters=choice)
        assert alone[0].tobytes() == together[row].tobytes(), choice


@pytest.mark.parametrize("backend", backends.available())
def test_rows_of_a_batch_are_independent(fresh, several, backend):
    model = fresh(backend=backend)
    for name, folder in several.items():
        model.load_adapter(folder, name)
    choices = ("b", None, {"a": 1, "c": -0.5})
    together = logits(model, adapters=choices)
    for row, choice in enumerate(choices):
        alone = logits(model, IDS[row : row + 1], adapters=choice)
        assert oracle.off(together[row], alone[0]) < CLOSE


def test_rows_of_different_length_keep_their_adapters(fresh, several):
    model = fresh()
    for name, folder in several.items():
        model.load_adapter(folder, name)
    mask, choices = oracle.padded("middle", 3, 21), ["b", None, {"a": 1, "c": -0.5}]
    together = logits(model, attention_mask=mask, adapters=choices)
    for row, choice in enumerate(choices):
        real = mask[row] != 0
        alone = logits(model, IDS[row : row + 1, real], adapters=choice)
        assert together[row, real].tobytes() == alone[0].tobytes()


def test_calls_switch_and_what_is_unloaded_leaves_no_trace(fresh, several):
    model = fresh()
    base = logits(model)
    model.load_adapter(several["a"], "a")
    first = logits(model, adapters="a")
    model.load_adapter(several["c"], "c")
    model.load_adapter(several["b"], "b")
    other = logits(model, adapters="b")
    assert logits(model, adapters="a").tobytes() == first.tobytes()
    assert logits(model).tobytes() == base.tobytes()
    model.unload_adapter("a")
    assert model.adapters == {"c": 60, "b": 7}
    assert logits(model, adapters="b").tobytes() == other.tobytes()
    model.unload_adapter("b")
    model.unload_adapter("c")
    assert model.adapters == {}
    assert model.head.model.blocks[0].qkv.down is None  # no operation more than before
    assert logits(model).tobytes() == base.tobytes()
    model.load_adapter(several["a"], "b")
    assert logits(model, adapters="b").tobytes() == first.tobytes()


def test_linears_that_no_adapter_touches_stay_plain(fresh, several):
    model = fresh()
    model.load_adapter(several["b"], "b")
    block = model.head.model.blocks[1]
    assert [p.down is not None for p in (block.qkv, block.out, block.up, block.down)] == [
        True, True, False, False
    ]  # fmt: skip


# -- caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [False, True])
def test_a_batch_continues_with_its_adapters(fresh, several, trace):
    model = fresh()
    for name in "ab":
        model.load_adapter(several[name], name)
    choices = ["a", None, {"a": 0.5, "b": 1}]
    whole = logits(model, adapters=choices)
    past = model(IDS[:, :9], adapters=choices).past_key_values
    rest = model(
        IDS[:, 9:], past_key_values=past, adapters=choices, output_hidden_states=trace
    ).logits
    assert rest.tobytes() == whole[:, 9:].tobytes()


@pytest.mark.parametrize("trace", [False, True])
def test_a_cache_of_other_adapters_is_refused_and_stays_as_it_is(fresh, several, trace):
    model = fresh()
    before = model(IDS, use_cache=True).past_key_values
    model.load_adapter(several["b"], "b")
    with pytest.raises(UsageError) as caught:
        model(IDS, past_key_values=before, output_attentions=trace)
    assert str(caught.value) == (
        "past_key_values is of a model with other layers, heads or adapters, or on another "
        "backend: start a new one"
    )
    assert before.get_seq_length() == 21
    after = model(IDS, adapters="b").past_key_values
    model.unload_adapter("b")
    with pytest.raises(UsageError, match="other layers, heads or adapters"):
        model(IDS, past_key_values=after)
    model.load_adapter(several["b"], "b")  # the same ranks again, but who knows what weights
    with pytest.raises(UsageError, match="other layers, heads or adapters"):
        model(IDS, past_key_values=after)
    model.unload_adapter("b")
    assert model(IDS, past_key_values=before).logits.shape == (3, 21, SPEC.vocab_size)


def test_a_step_on_a_cache_of_other_adapters_is_refused(fresh, several):
    model = fresh()
    cache = model.head.cache(1, 16)
    model.load_adapter(several["b"], "b")
    with pytest.raises(UsageError, match=r"with 0 ranks of adapters, this one has 7"):
        model.head.step(np.array([5]), cache, Span.of([0], [1]), np.array([0]))


# -- text ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter of the demo, and PEFT's model with it."""
    folder = tmp_path_factory.mktemp("demo") / "lora"
    model = oracle.transformers.BloomForCausalLM.from_pretrained(DEMO, dtype=oracle.torch.float32)
    return folder, random_lora(model.eval(), folder, lora_alpha=12)


PROMPTS = ["Once upon a time", "def main(", "Il était une fois"]


def test_greedy_text_with_an_adapter_is_that_of_peft(pack_of, demo):
    folder, theirs = demo
    model = bloomq.load(pack_of("f32"))
    plain = [result.text for result in model.generate(PROMPTS, max_new_tokens=40)]
    model.load_adapter(folder, "lora")
    assert model.adapters == {"lora": 4}
    for prompt, before in zip(PROMPTS, plain, strict=True):
        ids = np.array([model.prompt_ids(prompt)])
        right = theirs.generate(
            input_ids=oracle.tensor(ids), attention_mask=oracle.tensor(np.ones_like(ids)),
            max_new_tokens=40, do_sample=False, pad_token_id=3, eos_token_id=2,
        )  # fmt: skip
        found = model.generate(prompt, max_new_tokens=40, adapters="lora")
        assert list(found.ids) == right[0, ids.shape[1] :].tolist()
        assert found.text != before
        assert model.generate(prompt, max_new_tokens=40).text == before
    model.unload_adapter("lora")
    assert model.adapters == {}


def test_each_prompt_of_a_batch_has_its_adapter(pack_of, demo):
    model = bloomq.load(pack_of("int8"))
    model.load_adapter(demo[0], "lora")
    choices = [None, "lora", {"lora": 0.5}]
    together = model.generate(PROMPTS, max_new_tokens=24, adapters=choices)
    for prompt, choice, found in zip(PROMPTS, choices, together, strict=True):
        alone = model.generate(prompt, max_new_tokens=24, adapters=choice)
        assert (alone.ids, alone.logprobs) == (found.ids, found.logprobs)
        stream = model.stream(prompt, max_new_tokens=24, adapters=choice)
        assert tuple(piece.id for piece in stream) == found.ids
    guessed = model.generate(PROMPTS, max_new_tokens=24, adapters=choices, draft="lookup")
    assert [g.ids for g in guessed] == [t.ids for t in together]
    drafted = model.generate(PROMPTS[1], max_new_tokens=24, adapters="lora", draft=model)
    assert drafted.ids == together[1].ids  # the draft is the base
    assert model([[5, 6]], adapters="lora").logits.tobytes() != model([[5, 6]]).logits.tobytes()


def test_generate_of_the_class_takes_adapters_for_each_prompt(pack_of, demo):
    model = bloomq.BloomForCausalLM.from_pretrained(pack_of("int8"))
    model.load_adapter(demo[0], "lora")
    ids, options = np.array([[5, 6, 7], [8, 9, 10]]), {"max_new_tokens": 6, "seed": 1}
    found = model.generate(ids, adapters=["lora", None], **options)
    assert found[:1].tolist() == model.generate(ids[:1], adapters="lora", **options).tolist()
    assert found[1:].tolist() == model.generate(ids[1:], **options).tolist()
    sampled = {**options, "do_sample": True, "num_return_sequences": 2}
    twice = model.generate(ids, adapters=["lora", None], **sampled)
    one = model.generate(ids[:1], adapters="lora", **sampled)
    assert twice[:2].tolist() == one.tolist()


def test_a_stream_goes_on_with_the_adapter_it_began_with(pack_of, demo):
    model = bloomq.load(pack_of("int8"))
    model.load_adapter(demo[0], "lora")
    whole = model.generate(PROMPTS[0], max_new_tokens=12, adapters="lora")
    stream = model.stream(PROMPTS[0], max_new_tokens=12, adapters="lora")
    ids = [next(stream).id]
    model.unload_adapter("lora")
    ids += [piece.id for piece in stream]
    assert tuple(ids) == whole.ids


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["d", {"a": 1, "d": 1}, [None, "d", "a"], {7: 1}], ids=str)
def test_an_adapter_that_is_not_loaded_is_refused_with_those_that_are(fresh, several, chosen):
    model = fresh()
    with pytest.raises(UsageError, match=r"^no adapter '?[d7a]'? is loaded, .*: none$"):
        model(IDS, adapters=chosen)
    for name in "ab":
        model.load_adapter(several[name], name)
    with pytest.raises(UsageError, match=r"is loaded, those loaded are: 'a', 'b'$"):
        model(IDS, adapters=chosen)
    with pytest.raises(UsageError, match=r"^no adapter 'c' is loaded"):
        model.unload_adapter("c")


@pytest.mark.parametrize("chosen", [7, b"a", {"a"}, [[None], "a", None]], ids=str)
def test_what_chooses_no_adapters_is_refused(fresh, several, chosen):
    model = fresh()
    model.load_adapter(several["a"], "a")
    expected = (
        r"^adapters is .*, expected None, a name, a mapping of names to scales, or a list of these$"
    )
    with pytest.raises(UsageError, match=expected):
        model(IDS, adapters=chosen)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e39, -(10**400), "1", None, True], ids=repr)
def test_a_scale_that_is_no_number_is_refused(fresh, several, scale):
    model = fresh()
    model.load_adapter(several["a"], "a")
    with pytest.raises(UsageError, match=r"^the scale of adapter 'a' is .*, expected a number$"):
        model(IDS, adapters={"a": scale})


def test_a_list_of_another_length_than_the_batch_is_refused(fresh, several, pack_of, demo):
    model = fresh()
    model.load_adapter(several["a"], "a")
    with pytest.raises(UsageError) as caught:
        model(IDS, adapters=["a", None])
    assert str(caught.value) == (
        "2 adapters for 3 rows: a list has one entry a row, a mapping of names to scales uses "
        "several in a row"
    )
    with pytest.raises(UsageError, match=r"^2 adapters for 1 rows"):
        model.generate(IDS[:1], adapters=["a", "a"])


@pytest.mark.parametrize("name", ["", None, 7], ids=repr)
def test_a_name_that_is_none_is_refused(fresh, several, name):
    with pytest.raises(UsageError, match=r"^the adapter's name is .*, expected text$"):
        fresh().load_adapter(several["a"], name)


def test_a_name_that_is_taken_is_refused_and_what_has_it_stays(fresh, several):
    model = fresh()
    model.load_adapter(several["a"], "x")
    found = logits(model, adapters="x")
    with pytest.raises(UsageError) as caught:
        model.load_adapter(several["b"], "x")
    assert str(caught.value) == "adapter 'x' is loaded already: unload it, or use another name"
    assert logits(model, adapters="x").tobytes() == found.tobytes()


# -- places ----------------------------------------------------------------------------------------


def test_no_adapter_lies_across_two_groups_unless_it_begins_one():
    def of_rank(rank: int) -> Adapter:
        factors = Factors(np.zeros((rank, 8), np.float32), np.zeros((8, rank), np.float32))
        return Adapter({"h.0.attn.out": factors})

    ranks = [60, 4, 1, 63, 2, 70, 60]
    adapters = Adapters({str(i): of_rank(rank) for i, rank in enumerate(ranks)})
    starts = [place.start for place in adapters._places.values()]
    assert starts == [0, 60, 64, 65, 128, 192, 320]
    assert adapters.ranks == 380
    assert adapters.gates(["4", None], 2).nonzero()[1].tolist() == [128, 129]
