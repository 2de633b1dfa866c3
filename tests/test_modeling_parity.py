"""Each class against transformers' of the same name, on checkpoints that transformers wrote.

`pytest -s tests/test_modeling_parity.py` ends with the worst deviation of each class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import DEMO
from oracle import (
    CLASSES,
    Models,
    Spec,
    ask,
    ids_of,
    nmse,
    off,
    one_torch_thread,
    padded,
    torch,
    transformers,
)

import bloomq

# Both sum in float32, in different orders. A sum of K = 4C products is off by about
# sqrt(K) * 2^-24 of its size; 4C <= 384, and errors of 4 products a layer and of the head add:
# sqrt(384) * 2^-24 * 9 = 1.05e-5.
LIMIT = 1e-5
DEMO_LIMIT = 3.3e-5  # the same with 4C = 1024 and 17 products
VARIANTS = {
    "4 heads": {},
    "1 head": {"n_head": 1},
    "3 heads": {"n_head": 3, "head_dim": 12},
    "12 heads": {"n_head": 12},
    "7 heads of 5": {"n_head": 7, "head_dim": 5},
    "post-norm residuals": {"post_norm": True},
    "slow but exact": {"slow_tp": 2},
    "post-norm, 6 heads, slow": {"post_norm": True, "n_head": 6, "slow_tp": 4},
}
CAUSAL, SEQUENCE, TOKEN = CLASSES[1:4]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def worst() -> Iterator[dict[str, float]]:
    """The largest deviation seen of each (class, result), printed at the end."""
    seen: dict[str, float] = {}
    yield seen
    print()
    for name in sorted(seen):
        print(f"{name}: {seen[name]:.1e}")


def deviations(found: Any, expected: Any, mask: np.ndarray) -> dict[str, float]:
    """How far each result is off at the tokens that are real. Masked ones of ours are 0."""
    assert list(found) == list(expected)
    real, result = mask == 1, {}
    for name in found:
        if name == "past_key_values":
            assert found[name].get_seq_length() == expected[name].get_seq_length()
            continue
        several = isinstance(expected[name], tuple)
        ours, theirs = (x if several else (x,) for x in (found[name], expected[name]))
        for one, other in zip(ours, theirs, strict=True):
            here, there = np.asarray(one), np.asarray(other)
            if name == "attentions":  # [B, H, T, S] -> [B, T, H, S]
                here, there = here.swapaxes(1, 2), there.swapaxes(1, 2)
            if name != "loss" and here.shape[:2] == mask.shape:
                assert not here[~real].any()
                here, there = here[real], there[real]
            result[name] = max(off(here, there), result.get(name, 0.0))
    return result


def compare(
    models: Models, spec: Spec, where: str = "none", *, scheme: str | None = "f32",
    backend: str = "numba", shape: tuple[int, int] = (3, 17), **options: Any,
) -> dict[str, float]:  # fmt: skip
    """The deviations of one call of both models, on random ids with padding somewhere."""
    mask = padded(where, *shape)
    ids = np.where(mask == 1, ids_of(spec, *shape), 3)
    given = {} if where == "none" else {"attention_mask": mask}
    found = models.ours(spec, scheme, backend)(ids, **given, **options)
    return deviations(found, ask(models.theirs(spec), ids, **given, **options), mask)


# -- unquantized: the same numbers -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_result_is_that_of_transformers(models, worst, kind, variant, where):
    spec = Spec(kind=kind, tied=kind != CAUSAL or variant != "3 heads", **VARIANTS[variant])
    found = compare(models, spec, where, output_hidden_states=True, output_attentions=True)
    assert {"hidden_states", "attentions"} < set(found)
    for name, deviation in found.items():
        key = f"{kind} {name}"
        worst[key] = max(worst.get(key, 0.0), deviation)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("where", ["none", "left"])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_reference_backend_gives_the_same_results(models, kind, where):
    options = {"output_hidden_states": True, "output_attentions": True}
    found = compare(models, Spec(kind=kind, n_head=3), where, backend="reference", **options)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_checkpoint_of_half_precision_is_taken_as_it_is(models, kind, dtype):
    found = compare(models, Spec(kind=kind, dtype=dtype), "left", scheme=None)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("kind", CLASSES)
def test_a_batch_of_more_tokens_than_a_step_takes_is_that_of_transformers(models, kind):
    """512 tokens a step: the second row is cut, the third lies in a later step."""
    spec = Spec(kind=kind, n_layer=1, n_head=2)
    found = compare(models, spec, "left", shape=(3, 300), output_hidden_states=True)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("keep", [1, 2, 16, 17, 0])
@pytest.mark.parametrize("where", ["none", "left"])
def test_logits_to_keep_gives_the_last_logits(models, keep, where):
    mask = padded(where, 3, 17)
    spec = Spec()
    ids = ids_of(spec, 3, 17)
    found = models.ours(spec)(ids, attention_mask=mask, logits_to_keep=keep).logits
    every = models.ours(spec)(ids, attention_mask=mask).logits
    expected = ask(models.theirs(spec), ids, attention_mask=mask, logits_to_keep=keep).logits
    real = mask[:, -keep:] == 1
    assert off(found[real], expected.numpy()[real]) < LIMIT
    assert found.tobytes() == every[:, -keep:].tobytes()


@pytest.mark.parametrize("where", ["none", "left", "middle"])
@pytest.mark.parametrize("kind", CLASSES)
def test_embeddings_of_ones_own_are_taken_as_transformers_takes_them(models, kind, where):
    spec, mask = Spec(kind=kind), padded(where, 2, 11)
    embeds = np.random.default_rng(3).standard_normal((2, 11, 32)).astype(np.float32)
    given = {"inputs_embeds": embeds, "attention_mask": mask, "output_attentions": True}
    found = deviations(models.ours(spec)(**given), ask(models.theirs(spec), **given), mask)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("kind", CLASSES)
def test_the_embeddings_of_ids_give_the_bits_of_the_ids(models, kind):
    for scheme in ("f32", "int8"):
        ours = models.ours(Spec(kind=kind), scheme)
        ids = ids_of(Spec(), 2, 9)
        embeds = ours.get_input_embeddings()(ids)
        assert embeds.shape == (2, 9, 32)
        found, expected = ours(inputs_embeds=embeds)[0], ours(ids)[0]
        assert found.tobytes() == expected.tobytes()


def test_the_demo_has_the_states_and_logits_of_transformers(pack_of):
    """From the table, bit for bit, to the logits: trained weights instead of random ones."""
    ids = np.random.default_rng(0).integers(4, 8192, (2, 60))
    theirs = transformers.BloomForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ours = bloomq.BloomForCausalLM.from_pretrained(pack_of("f32"), backend="numba")
    table = theirs.get_input_embeddings()(torch.tensor(ids)).detach().numpy()
    assert np.array_equal(ours.get_input_embeddings()(ids), table)
    options = {"output_hidden_states": True, "output_attentions": True}
    found, expected = ours(ids, **options), ask(theirs, ids, **options)
    assert max(deviations(found, expected, np.ones((2, 60))).values()) < DEMO_LIMIT


# -- past_key_values -------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(1,), (16,), (5, 6, 12), tuple(range(1, 17))], ids=str)
@pytest.mark.parametrize("where", ["none", "left", "right", "middle"])
def test_pieces_with_their_past_are_those_of_transformers(models, where, cuts):
    """Every piece of a padded batch; a piece that is padding alone in some row too."""
    spec, mask = Spec(kind="BloomModel", n_head=3), padded(where, 3, 17)
    ids = ids_of(spec, 3, 17)
    ours, theirs = models.ours(spec), models.theirs(spec)
    past, their_past = None, None
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        here = {"attention_mask": mask[:, :stop], "output_attentions": True}
        piece = ids[:, start:stop]
        found = ours(piece, past_key_values=past, **here)
        expected = ask(theirs, piece, past_key_values=their_past, **here)
        deviation = deviations(found, expected, mask[:, start:stop])
        assert max(deviation.values()) < LIMIT, (start, stop, deviation)
        past, their_past = found.past_key_values, expected.past_key_values
    assert past.get_seq_length() == 17


@pytest.mark.parametrize("kind", [CAUSAL, SEQUENCE, TOKEN])
def test_each_class_continues_a_past_as_transformers_does(models, kind):
    spec = Spec(kind=kind)
    ids, ours, theirs = ids_of(spec, 2, 14), models.ours(spec), models.theirs(spec)
    base, their_base = models.ours(Spec(kind="BloomModel")), theirs.transformer
    if kind == TOKEN:  # returns no past itself
        past = base(ids[:, :9]).past_key_values
        their_past = ask(models.theirs(Spec(kind="BloomModel")), ids[:, :9]).past_key_values
    else:
        past = ours(ids[:, :9]).past_key_values
        their_past = ask(their_base, ids[:, :9]).past_key_values
    found = ours(ids[:, 9:], past_key_values=past)
    expected = ask(theirs, ids[:, 9:], past_key_values=their_past)
    assert max(deviations(found, expected, np.ones((2, 5))).values()) < LIMIT


# -- quantized: transformers on the dequantized weights --------------------------------------------

# What differs is the rounding of activations to int8 in groups. A value of a group whose largest is
# m deviations is rounded to steps of m / 127, an NMSE of (m / 127)^2 / 12: 1.9e-4 for m = 6, which
# inputs behind gelu, the most uneven, reach. Weights of deviation 1 / sqrt(K) hand a relative error
# on as it is, and errors of products are independent: they add up over 4 products a layer and,
# where it is quantized, the head.
PRODUCT = (6 / 127) ** 2 / 12


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_quantized_model_is_transformers_on_its_weights(models, worst, kind, scheme):
    spec, mask = Spec(kind=kind, n_head=6, head_dim=16, n_layer=2), padded("left", 6, 30)
    ours = models.ours(spec, scheme)
    theirs = models.theirs(spec, of=ours)
    limit = PRODUCT * (4 * spec.n_layer + 1)
    ids = np.where(mask == 1, ids_of(spec, 6, 30), 3)
    found, expected = ours(ids, attention_mask=mask), ask(theirs, ids, attention_mask=mask)
    for name in set(found) - {"past_key_values"}:
        here, there = found[name], expected[name].numpy()
        if here.shape[:2] == mask.shape:
            here, there = here[mask == 1], there[mask == 1]
        error = nmse(here, there)
        worst[f"{kind} {name}, {scheme} (NMSE)"] = error
        assert error < limit
        assert error > 1e-8  # activations really are rounded
