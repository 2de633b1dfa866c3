"""bloomq against transformers' BloomForCausalLM: the same weights give the same logits and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.names import PREFIX, huggingface_name
from models import DEMO, Tiny, checkpoint, pack

import bloomq
from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.pack import Pack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINIES = [
    Tiny(4, 8, 131),
    Tiny(6, 20, 257, 3, tied=False),
    Tiny(7, 12, 99, dtype="F16"),
    Tiny(6, 16, 131, dtype="BF16"),
    Tiny(4, 20, 97, dtype="BF16", tied=False, seed=1),
    Tiny(7, 8, 301, 4, dtype="F16", tied=False, seed=2),
]
# XLA compiles every size anew. Both kinds of slopes, tied and not, one layer's sizes and several's:
# what a checkpoint's dtype becomes is no backend's matter.
ON_JAX = [TINIES[0], TINIES[1], TINIES[5]]
PROMPTS = ["Once upon a time", "Il était une fois", "def main(", "La ciudad de", "O gato"]
# Measured on the demo, 2 x 64 tokens of text: (worst matrix product's, logits') NMSE against
# transformers with the dequantized weights. What differs is int8 activations (in groups of the
# scheme's size; int8's are 128: the smaller, the less), nf4's code book rounded to 1/127 and the
# float16 cache. The worst product is always h.1.mlp.down, whose inputs after gelu are the most
# uneven.
MEASURED = {
    ("int4", 32): (5.64e-5, 5.11e-5),
    ("int4", 64): (9.71e-5, 7.41e-5),
    ("int4", 128): (1.57e-4, 8.61e-5),
    ("int8", None): (1.55e-4, 9.28e-5),
    ("nf4", None): (1.28e-4, 7.22e-5),
    ("nl4", 32): (5.59e-5, 5.32e-5),
    ("nl4", 64): (9.71e-5, 6.33e-5),
    ("nl4", 128): (1.57e-4, 7.43e-5),
}
TEXTS = [
    "The old man sat by the window and watched the rain fall over the quiet street below him. " * 4,
    "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n" * 4,
]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside Numba's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def oracle(folder: Path) -> Any:
    """BloomForCausalLM in float32."""
    return transformers.BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def oracle_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        given = None if mask is None else torch.tensor(mask.astype(np.int64))
        return model(torch.tensor(ids), attention_mask=given).logits.numpy()


def random_ids(tiny: Tiny, *shape: int) -> np.ndarray:
    return np.random.default_rng(9).integers(0, tiny.vocab_size, shape)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    wrong = np.square(found.astype(np.float64) - expected).sum()
    return float(wrong / np.square(expected.astype(np.float64)).sum())


# -- unquantized: the same numbers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "tiny"),
    [
        pytest.param(backend, tiny, id=f"{backend}-{tiny.name}")
        for backend in bloomq.backends.available()
        for tiny in (TINIES if backend != "jax" else ON_JAX)
    ],
)
def test_logits_of_an_f32_pack_are_those_of_transformers(base, tiny, backend):
    ids = random_ids(tiny, 3, 37)
    found = bloomq.load(pack(base, tiny, "f32"), backend=backend)(ids).logits
    expected = oracle_logits(oracle(checkpoint(base, tiny)), ids)
    assert found.dtype == np.float32
    assert off(found, expected) < 1e-5  # measured: 3e-7 to 7e-7


@pytest.mark.parametrize(("tiny", "scheme"), [(TINIES[2], "f16"), (TINIES[4], "bf16")])
def test_a_pack_of_the_source_dtype_loses_nothing(base, tiny, scheme):
    ids = random_ids(tiny, 2, 40)
    found = bloomq.load(pack(base, tiny, scheme))(ids).logits
    assert off(found, oracle_logits(oracle(checkpoint(base, tiny)), ids)) < 1e-5


@pytest.mark.parametrize("length", [1, 255, 300, 600])
def test_long_rows_across_chunks_equal_transformers(base, length):
    tiny = TINIES[1]
    ids = random_ids(tiny, 1, length)
    found = bloomq.load(pack(base, tiny, "f32"))(ids).logits
    assert off(found, oracle_logits(oracle(checkpoint(base, tiny)), ids)) < 1e-5


def masks() -> dict[str, np.ndarray]:
    left, right, holes = (np.ones((3, 24), bool) for _ in range(3))
    left[0, :17] = left[1, :1] = False
    right[0, 7:] = right[2, 23:] = False
    holes[0, [3, 4, 11]] = holes[1, ::3] = holes[2, 0] = False
    return {"left": left, "right": right, "holes": holes}


@pytest.mark.parametrize("where", ["left", "right", "holes"])
@pytest.mark.parametrize("tiny", TINIES[:3], ids=lambda tiny: tiny.name)
def test_padding_on_either_side_and_holes_equal_transformers(base, tiny, where):
    ids, mask = random_ids(tiny, 3, 24), masks()[where]
    found = bloomq.load(pack(base, tiny, "f32"))(ids, mask).logits
    expected = oracle_logits(oracle(checkpoint(base, tiny)), ids, mask)
    assert off(found[mask], expected[mask]) < 1e-5
    assert not found[~mask].any()


@pytest.mark.parametrize("scheme", ["f32", "int4"])
def test_left_padded_batches_equal_singles(base, scheme):
    tiny = TINIES[1]
    model, mask = bloomq.load(pack(base, tiny, scheme)), masks()["left"]
    ids = random_ids(tiny, 3, 24)
    found = model(ids, mask).logits
    for row in range(3):
        single = model(ids[row, mask[row]]).logits[0]
        assert found[row, mask[row]].tobytes() == single.tobytes()


# -- text -----------------------------------------------------------------------------------------


def continuation(model: Any, ids: list[int], count: int, cached: bool = True) -> list[int]:
    """Greedy tokens of transformers, the end-of-text token included."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count, do_sample=False, use_cache=cached, pad_token_id=3,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_greedy_text_of_the_demo_is_that_of_transformers_over_200_tokens(pack_of: Callable):
    model, hf = bloomq.load(pack_of("f32")), oracle(DEMO)
    for prompt, got in zip(PROMPTS, model.generate(PROMPTS, max_new_tokens=200), strict=True):
        ids = continuation(hf, model.prompt_ids(prompt), 200)
        assert list(got.ids) == ids, prompt
        assert got.text == model.tokenizer.decode(ids, skip_special_tokens=True)
        single = model.generate(prompt, max_new_tokens=200)
        assert (single.ids, single.text) == (got.ids, got.text)


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.name)
def test_greedy_tokens_of_random_models_are_those_of_transformers(base, tiny):
    model, hf = bloomq.load(pack(base, tiny, "f32")), oracle(checkpoint(base, tiny))
    prompt = random_ids(tiny, 11).tolist()
    found = model.generate(prompt, max_new_tokens=40)
    assert list(found.ids) == continuation(hf, prompt, 40)


@pytest.mark.parametrize("scheme", ["f32", "int4"])
def test_cached_decoding_equals_recomputing_the_whole_text(base, scheme):
    model = bloomq.load(pack(base, TINIES[1], scheme))
    prompt = random_ids(TINIES[1], 21).tolist()
    found = model.generate(prompt, max_new_tokens=30)
    logits = model([prompt + list(found.ids)]).logits[0].astype(np.float64)
    rows = logits[len(prompt) - 1 : -1]
    assert rows.argmax(axis=1).tolist() == list(found.ids)
    peak = rows.max(axis=1)
    logprobs = -np.log(np.exp(rows - peak[:, None]).sum(axis=1))
    assert found.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)


# -- quantized: transformers on the dequantized weights --------------------------------------------


def dequantized_oracle(opened: Pack, folder: Path) -> Any:
    """BloomForCausalLM with the matrices that a pack holds."""
    model = oracle(folder)
    state = model.state_dict()
    for name in opened.schemes:
        key = huggingface_name(f"{name}.weight")
        key = key if key.startswith("lm_head") else PREFIX + key
        state[key].copy_(torch.tensor(opened.matrix(name).dequantize()))
    return model


def products(opened: Pack, hf: Any, ids: np.ndarray) -> dict[str, float]:
    """NMSE of every matrix product, on the activations that transformers has there."""
    inputs: dict[str, np.ndarray] = {}
    hooks = []
    names = {huggingface_name(f"{n}.weight").removesuffix(".weight"): n for n in opened.schemes}
    modules = dict(hf.transformer.named_modules()) | {"lm_head": hf.lm_head}
    names["lm_head"] = "lm_head"
    for foreign, name in names.items():
        if name == "wte":
            continue

        def keep(module: Any, args: Any, out: Any, name: str = name) -> None:
            inputs[name] = args[0].detach().numpy().reshape(-1, args[0].shape[-1])

        hooks.append(modules[foreign].register_forward_hook(keep))
    oracle_logits(hf, ids)
    for hook in hooks:
        hook.remove()
    backend, found = NumbaBackend(), {}
    for name, x in inputs.items():
        weight = opened.matrix(name)
        y = backend.linear(weight)(np.ascontiguousarray(x))
        found[name] = nmse(y, x.astype(np.float64) @ weight.dequantize().T.astype(np.float64))
    return found


@pytest.mark.parametrize(("scheme", "group"), list(MEASURED), ids=str)
def test_a_quantized_demo_equals_transformers_up_to_int8_activations(pack_of, scheme, group):
    path = pack_of(scheme, group)
    model, hf = bloomq.load(path), dequantized_oracle(Pack.open(path), DEMO)
    ids = np.array([model.tokenizer.encode(text)[:64] for text in TEXTS])
    product = products(model.pack, hf, ids)
    logits = nmse(model(ids).logits, oracle_logits(hf, ids))
    assert len(product) == 17  # 4 a layer, and the head
    worst, measured = MEASURED[scheme, group]
    assert max(product.values()) <= min(5e-4, 2.5 * worst)
    assert logits <= 2.5 * measured


@pytest.mark.parametrize(("scheme", "group"), list(MEASURED), ids=str)
def test_a_quantized_random_model_equals_transformers_up_to_int8_activations(base, scheme, group):
    tiny = TINIES[1]
    path = pack(base, tiny, scheme, group)
    model = bloomq.load(path)
    hf = dequantized_oracle(model.pack, checkpoint(base, tiny))
    ids = random_ids(tiny, 2, 40)
    assert max(products(model.pack, hf, ids).values()) <= 5e-4
    # Weights of deviation 1 make each layer amplify what came before: some 100 times a product's.
    assert nmse(model(ids).logits, oracle_logits(hf, ids)) <= 2e-2


@pytest.mark.parametrize(("scheme", "group"), list(MEASURED), ids=str)
def test_the_reference_on_a_quantized_pack_is_transformers_on_its_weights(base, scheme, group):
    tiny = TINIES[4]
    model = bloomq.load(pack(base, tiny, scheme, group), backend="reference")
    hf = dequantized_oracle(model.pack, checkpoint(base, tiny))
    ids = random_ids(tiny, 2, 30)
    assert off(model(ids).logits, oracle_logits(hf, ids)) < 1e-5
