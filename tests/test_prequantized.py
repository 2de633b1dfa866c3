"""GPTQ and AWQ checkpoints: weights equal to the published formulas', grids taken over as they are,
damage refused.

The packers here follow the formats' descriptions bit by bit; WORDS were packed by the libraries.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters import packed_grids
from bloomq.converters.convert import convert
from bloomq.converters.deep_verify import deep_verify
from bloomq.converters.prequantized import Packing
from bloomq.converters.reading import read_checkpoint
from conftest import Tensors, dequantized, random_tensors, write_safetensors

from bloomq.errors import CheckpointError, ConfigError
from bloomq.pack import Pack
from bloomq.schemes import untile_bytes, untile_nibbles, untile_rows, untile_sixes

C, V = 128, 96
LINEARS = {
    "h.0.attn.qkv": ("h.0.self_attention.query_key_value", (3 * C, C)),
    "h.0.attn.out": ("h.0.self_attention.dense", (C, C)),
    "h.0.mlp.up": ("h.0.mlp.dense_h_to_4h", (4 * C, C)),
    "h.0.mlp.down": ("h.0.mlp.dense_4h_to_h", (C, 4 * C)),
}
QKV = "transformer.h.0.self_attention.query_key_value"
DOWN = "transformer.h.0.mlp.dense_4h_to_h"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Grid:
    """A random integer grid of a matrix [N, K]: weight = (code - zero) * scale."""

    def __init__(
        self, shape: tuple[int, int], bits: int, group: int, *, zero: int | None, scattered: bool,
        seed: int,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(seed)
        n, k = shape
        group = k if group == -1 else group
        groups = -(-k // group)
        low = int(bits == 8)  # int8 has no -128
        self.codes = rng.integers(low, 1 << bits, shape)
        self.zeros = np.full((n, groups), zero) if zero else rng.integers(1, 1 << bits, (n, groups))
        self.scales = (rng.random((n, groups)) * 0.02 + 0.001).astype(np.float16)
        self.index = np.arange(k) // group
        if scattered:
            rng.shuffle(self.index)

    @property
    def steps(self) -> np.ndarray:
        return self.codes - self.zeros[:, self.index]

    @property
    def weights(self) -> np.ndarray:
        return self.steps.astype(np.float32) * self.scales.astype(np.float32)[:, self.index]


def string_of_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """[count] -> int32 words: the values one behind the other, lowest bits first."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values))
    return np.frombuffer(number.to_bytes(len(values) * bits // 8, "little"), np.int32)


def gptq(name: str, grid: Grid, bits: int, stored_less: int = 1) -> Tensors:
    words = np.stack([string_of_bits(row, bits) for row in grid.codes], axis=1)
    zeros = np.stack([string_of_bits(column, bits) for column in (grid.zeros - stored_less).T])
    return {
        f"{name}.qweight": ("I32", words), f"{name}.qzeros": ("I32", zeros),
        f"{name}.scales": ("F16", np.ascontiguousarray(grid.scales.T)),
        f"{name}.g_idx": ("I32", grid.index.astype(np.int32)),
    }  # fmt: skip


def awq_words(values: np.ndarray) -> np.ndarray:
    """[rows, columns] of 0..15 -> int32 [rows, columns / 8]: nibble i holds column order[i]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, column in enumerate(AWQ_ORDER):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def awq(name: str, grid: Grid) -> Tensors:
    return {
        f"{name}.qweight": ("I32", awq_words(grid.codes.T)),
        f"{name}.qzeros": ("I32", awq_words(grid.zeros.T)),
        f"{name}.scales": ("F16", np.ascontiguousarray(grid.scales.T)),
    }


def packed_checkpoint(
    folder: Path,
    *,
    method: str = "gptq",
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    scattered: bool = False,
    settings: dict[str, Any] | None = None,
    stored_less: int = 1,
    edit: Callable[[Tensors], None] | None = None,
    settings_file: str | None = None,
) -> tuple[Path, dict[str, Grid]]:
    """A random BLOOM whose linears are packed, and their grids by our names."""
    folder.mkdir(parents=True)
    tensors = random_tensors(C, 1, V, "F16", prefix="transformer.")
    grids = {}
    for i, (ours, (foreign, shape)) in enumerate(LINEARS.items()):
        zero = 1 << (bits - 1) if sym else None
        grid = Grid(shape, bits, group, zero=zero, scattered=scattered, seed=i)
        name = f"transformer.{foreign}"
        del tensors[f"{name}.weight"]
        tensors |= awq(name, grid) if method == "awq" else gptq(name, grid, bits, stored_less)
        grids[ours] = grid
    if edit is not None:
        edit(tensors)
    raw = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": V,
           "hidden_size": C, "n_layer": 1, "n_head": 4}  # fmt: skip
    said = {"quant_method": method, "bits": bits, "group_size": group}
    said |= {"sym": sym, "desc_act": scattered} if method == "gptq" else {"version": "gemm"}
    said |= settings or {}
    if settings_file is None:
        raw["quantization_config"] = said
    else:
        (folder / settings_file).write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps(raw))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder, grids


def stored_steps(pack: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes less their zero, and scales [N, groups], as they lie in a pack."""
    matrix, scheme = Pack.open(pack), Pack.open(pack).schemes[name]
    codes, scales = matrix.array(f"{name}.codes"), matrix.array(f"{name}.scales")
    if scheme.name == "int8":
        return untile_bytes(codes), np.asarray(scales)[:, None]
    untile, zero = (untile_nibbles, 8) if scheme.name == "int4" else (untile_sixes, 32)
    return untile(codes).astype(int) - zero, untile_rows(scales)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_gptq_weights_equal_the_formula(tmp_path, bits, group, sym):
    source, grids = packed_checkpoint(tmp_path / "m", bits=bits, group=group, sym=sym)
    tensors = read_checkpoint(source).tensors
    for name, grid in grids.items():
        weight = tensors[f"{name}.weight"]
        assert np.array_equal(weight.rows(0, weight.shape[0]), grid.weights), name
        assert np.array_equal(weight.rows(5, 6), grid.weights[5:6])
        assert np.array_equal(weight.rows(33, 96), grid.weights[33:96])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_gptq_weights_in_activation_order_equal_the_formula(tmp_path, group):
    source, grids = packed_checkpoint(tmp_path / "m", group=group, scattered=True)
    checkpoint = read_checkpoint(source)
    for name, grid in grids.items():
        weight = checkpoint.tensors[f"{name}.weight"]
        assert np.array_equal(weight.rows(0, weight.shape[0]), grid.weights), name
    assert checkpoint.stored_scheme is None
    assert "activation order (desc_act) is no grid of bloomq's" in " ".join(checkpoint.notes)


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_awq_weights_equal_the_formula(tmp_path, group):
    source, grids = packed_checkpoint(tmp_path / "m", method="awq", group=group, sym=False)
    tensors = read_checkpoint(source).tensors
    for name, grid in grids.items():
        weight = tensors[f"{name}.weight"]
        assert np.array_equal(weight.rows(0, weight.shape[0]), grid.weights), name
        assert np.array_equal(weight.rows(31, 65), grid.weights[31:65])


def test_second_format_of_gptq_stores_zeros_as_they_are(tmp_path):
    source, grids = packed_checkpoint(
        tmp_path / "m", sym=False, stored_less=0, settings={"checkpoint_format": "gptq_v2"}
    )
    weight = read_checkpoint(source).tensors["h.0.mlp.up.weight"]
    assert np.array_equal(weight.rows(0, 4 * C), grids["h.0.mlp.up"].weights)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_scales_of_other_types_are_read(tmp_path, dtype):
    def widen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            wide = np.round(tensors[name][1].astype(np.float32) * 256) / 256 + np.float32(2**-8)
            bits = (wide.view(np.uint32) >> 16).astype(np.uint16)
            tensors[name] = (dtype, bits if dtype == "BF16" else wide)

    source, grids = packed_checkpoint(tmp_path / "m", edit=widen)
    grid = grids["h.0.attn.out"]
    scales = np.round(grid.scales.astype(np.float32) * 256) / 256 + np.float32(2**-8)
    checkpoint = read_checkpoint(source)
    expected = grid.steps * scales[:, grid.index]
    assert np.array_equal(checkpoint.tensors["h.0.attn.out.weight"].rows(0, C), expected)
    assert checkpoint.stored_scheme is None  # our scales are float16
    assert "4 matrices with divided columns or wide scales" in " ".join(checkpoint.notes)


def test_awq_activation_scales_are_folded_into_the_next_linear(tmp_path):
    divisors = np.linspace(0.5, 2, 4 * C).astype(np.float16)

    def scale(tensors: Tensors) -> None:
        tensors["transformer.h.0.mlp.gelu_impl.scales"] = ("F16", divisors)

    options = {"method": "awq", "group": 64, "sym": False}
    source, grids = packed_checkpoint(tmp_path / "m", **options, edit=scale)
    checkpoint = read_checkpoint(source)
    expected = grids["h.0.mlp.down"].weights / divisors.astype(np.float32)
    assert np.array_equal(checkpoint.tensors["h.0.mlp.down.weight"].rows(0, C), expected)
    assert checkpoint.tensors["h.0.mlp.down.weight"].stored is None
    assert checkpoint.stored_scheme is not None
    assert "1 matrices with divided columns" in " ".join(checkpoint.notes)


# Codes 0, 1, 2, ... as QuantLinear.pack of AutoGPTQ 0.7.1 and WQLinear_GEMM of AutoAWQ store them.
GPTQ3_WORDS = np.array([[-1996831096], [-964101434], [-87652102]], np.int32)
GPTQ4_WORDS = np.array([[1985229328], [-19088744]] * 2, np.int32)
AWQ_WORDS = np.array([[1966171168, -38146904]], np.int32)


def test_words_of_the_libraries_unpack_to_what_was_packed():
    assert packed_grids.unpack_words(GPTQ3_WORDS, 3)[:, 0].tolist() == [i % 8 for i in range(32)]
    assert packed_grids.unpack_words(GPTQ4_WORDS, 4)[:, 0].tolist() == [i % 16 for i in range(32)]
    assert packed_grids.unpack_awq(AWQ_WORDS)[0].tolist() == list(range(16))


def test_bands_narrower_than_a_matrix_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_grids, "_BAND_BYTES", 3000)
    source, grids = packed_checkpoint(tmp_path / "m", group=32)
    weight = read_checkpoint(source).tensors["h.0.mlp.up.weight"]
    assert np.array_equal(weight.rows(0, 4 * C), grids["h.0.mlp.up"].weights)
    assert np.array_equal(weight.rows(40, 200), grids["h.0.mlp.up"].weights[40:200])


def test_columns_are_cut_out_of_rows_where_a_reader_knows_no_better(monkeypatch):
    from bloomq.converters.source import SourceTensor

    monkeypatch.setattr(packed_grids, "_BAND_BYTES", 100)
    array = np.arange(60, dtype=np.int32).reshape(12, 5)
    tensor = SourceTensor("t", "I32", array.shape, lambda start, stop: array[start:stop])
    assert np.array_equal(packed_grids.columns_of(tensor, 1, 4), array[:, 1:4])


def test_memory_holds_a_few_bands_only():
    bands = packed_grids.Bands()
    read: list[int] = []

    def piece(i: int) -> int:
        read.append(i)
        return i

    for i in [*range(20), 19, 18, 0]:
        assert bands.get("t", i, lambda i=i: piece(i)) == i
    assert read == [*range(20), 0]
    assert type(bands.__reduce__()[0]()) is packed_grids.Bands


# -- taken over ------------------------------------------------------------------------------------

TAKEN = [
    ("gptq", 4, 32, True, "int4-g32"), ("gptq", 4, 64, True, "int4-g64"),
    ("gptq", 4, 128, True, "int4-g128"), ("gptq", 4, -1, True, "int4-g128"),
    ("gptq", 4, 256, True, "int4-g128"), ("gptq", 3, 32, False, "int4-g32"),
    ("gptq", 2, 64, True, "int4-g64"), ("gptq", 4, 64, False, "int6"),
    ("gptq", 4, -1, False, "int6"), ("gptq", 8, -1, True, "int8"),
    ("awq", 4, 64, False, "int6"), ("awq", 4, 128, False, "int6"), ("awq", 4, -1, False, "int6"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "bits", "group", "sym", "label"), TAKEN)
def test_a_grid_of_ours_is_taken_over_bit_for_bit(tmp_path, method, bits, group, sym, label):
    source, grids = packed_checkpoint(
        tmp_path / "m", method=method, bits=bits, group=group, sym=sym
    )
    done = convert(source, tmp_path / "pack")
    assert f"{label}: taken over from {method.upper()} as it is" in done.notes
    weights = dequantized(tmp_path / "pack")
    for name, grid in grids.items():
        assert Pack.open(tmp_path / "pack").schemes[name].label == label
        steps, scales = stored_steps(tmp_path / "pack", name)
        assert np.array_equal(steps, grid.steps), name
        size = steps.shape[1] // scales.shape[1]
        wanted = grid.scales[:, grid.index[::size]].astype(scales.dtype)
        assert scales.tobytes() == np.ascontiguousarray(wanted).tobytes()
        assert np.array_equal(weights[name], grid.weights)


def test_rows_that_hold_the_code_int8_lacks_are_quantized_anew(tmp_path):
    source, grids = packed_checkpoint(tmp_path / "m", bits=8, group=-1)
    grid = grids["h.0.attn.out"]
    grid.codes[7, 3] = 0  # -128

    def low(tensors: Tensors) -> None:
        tensors |= gptq("transformer.h.0.self_attention.dense", grid, 8)

    source, _ = packed_checkpoint(tmp_path / "low", bits=8, group=-1, edit=low)
    convert(source, tmp_path / "pack")
    found = dequantized(tmp_path / "pack")["h.0.attn.out"]
    others = np.arange(C) != 7
    assert np.array_equal(found[others], grid.weights[others])
    step = np.abs(grid.weights[7]).max() / 127
    assert np.abs(found[7] - grid.weights[7]).max() <= step / 2 * 1.001
    assert not np.array_equal(found[7], grid.weights[7])


def test_a_float_pack_of_a_quantized_checkpoint_loses_nothing_twice(tmp_path):
    source, _ = packed_checkpoint(tmp_path / "m", group=128)
    done = convert(source, tmp_path / "pack", scheme="f32")
    assert not any("second loss" in note for note in done.notes)


@pytest.mark.parametrize("options", [{"scheme": "int8"}, {"scheme": "int4"}, {"group_size": 64}])
def test_another_scheme_quantizes_anew_and_says_so(tmp_path, options):
    source, grids = packed_checkpoint(tmp_path / "m", group=128)
    done = convert(source, tmp_path / "pack", **options)
    body = Pack.open(tmp_path / "pack").schemes["h.0.mlp.up"]
    assert f"{body.label}: quantized anew from GPTQ: a second loss, which int4-g128 has not" in (
        done.notes
    )
    w = grids["h.0.mlp.up"].weights
    expected = body.dequantize(body.quantize(w), w.shape)
    assert np.array_equal(dequantized(tmp_path / "pack")["h.0.mlp.up"], expected)


def test_the_scheme_by_name_takes_over_too(tmp_path):
    source, grids = packed_checkpoint(tmp_path / "m", group=128)
    convert(source, tmp_path / "pack", scheme="int4", group_size=128)
    assert np.array_equal(dequantized(tmp_path / "pack")["h.0.mlp.up"], grids["h.0.mlp.up"].weights)


@pytest.mark.parametrize("options", [{"group": 32, "sym": False}, {"bits": 8, "group": 64}])
def test_no_grid_of_ours_is_quantized_anew_by_default(tmp_path, options):
    source, _ = packed_checkpoint(tmp_path / "m", **options)
    done = convert(source, tmp_path / "pack")
    assert "is no grid of bloomq's" in " ".join(done.notes)
    assert Pack.open(tmp_path / "pack").schemes["h.0.mlp.up"].label == "nl4-g64"


@pytest.mark.parametrize(("method", "bits", "sym"), [("gptq", 4, True), ("awq", 4, False)])
def test_deep_verification_finds_a_pack_taken_over_whole(tmp_path, method, bits, sym):
    source, _ = packed_checkpoint(tmp_path / "m", method=method, bits=bits, group=64, sym=sym)
    convert(source, tmp_path / "pack")
    assert deep_verify(Pack.open(tmp_path / "pack"), read_checkpoint(source)).is_exact


def test_embedding_and_norms_are_read_as_ever(tmp_path):
    source, _ = packed_checkpoint(tmp_path / "m")
    convert(source, tmp_path / "pack", head_scheme="f32")
    plain = random_tensors(C, 1, V, "F16", prefix="")
    weights = dequantized(tmp_path / "pack")
    table = plain["word_embeddings.weight"][1].astype(np.float32)
    assert np.array_equal(weights["wte"], table)
    assert np.array_equal(weights["ln_f.bias"][:C], plain["ln_f.bias"][1].astype(np.float32))


def test_provenance_tells_how_it_was_packed(tmp_path):
    source, _ = packed_checkpoint(tmp_path / "m", group=64)
    convert(source, tmp_path / "pack")
    origin = Pack.open(tmp_path / "pack").manifest["provenance"]
    assert origin["quantization"] == {
        "method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False
    }  # fmt: skip
    assert origin["scheme"] == "int4-g64"


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_fingerprint_covers_packed_tensors(tmp_path, leaf):
    def change(tensors: Tensors) -> None:
        dtype, array = tensors[f"{QKV}.{leaf}"]
        changed = array.copy()
        changed.view(np.uint8).reshape(-1)[0] ^= 1
        tensors[f"{QKV}.{leaf}"] = (dtype, changed)

    one, _ = packed_checkpoint(tmp_path / "a", sym=False)
    other, _ = packed_checkpoint(tmp_path / "b", sym=False, edit=change)
    assert read_checkpoint(one).fingerprint != read_checkpoint(other).fingerprint


def test_number_of_threads_and_size_of_blocks_change_no_byte(tmp_path, monkeypatch):
    source, _ = packed_checkpoint(tmp_path / "m", group=64, sym=False)
    convert(source, tmp_path / "a", threads=1)
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 32 * C * 4)
    monkeypatch.setattr(packed_grids, "_BAND_BYTES", 5000)
    convert(source, tmp_path / "b", threads=5)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_may_lie_in_the_tools_own_file(tmp_path, name):
    source, grids = packed_checkpoint(tmp_path / "m", settings_file=name)
    raw = json.loads((source / name).read_text())
    del raw["quant_method"]  # as AutoGPTQ wrote it at first
    (source / name).write_text(json.dumps(raw))
    weight = read_checkpoint(source).tensors["h.0.mlp.up.weight"]
    assert np.array_equal(weight.rows(0, 4 * C), grids["h.0.mlp.up"].weights)


def test_settings_of_awq_may_have_its_first_names(tmp_path):
    source, _ = packed_checkpoint(
        tmp_path / "m", method="awq", sym=False, settings_file="quant_config.json"
    )
    first = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (source / "quant_config.json").write_text(json.dumps(first))
    assert read_checkpoint(source).provenance["quantization"]["method"] == "awq"


def test_a_stray_file_of_settings_means_nothing(tmp_path, demo_checkpoint, tiny_checkpoint):
    source = tiny_checkpoint(tmp_path / "m")
    (source / "quantize_config.json").write_text("{}")
    assert read_checkpoint(source).stored_scheme is None


# -- the demo --------------------------------------------------------------------------------------


def packed_demo(folder: Path, demo: Path) -> tuple[Path, Path]:
    """The demo with linears rounded to GPTQ's grid of 4 bits in groups of 64: packed, and as plain
    float32."""
    from bloomq.schemes import bf16_to_f32
    from bloomq.tensorfile import TensorFile

    file = TensorFile.open(demo / "model.safetensors")
    packed: Tensors = {}
    plain: Tensors = {}
    for name in file.entries:
        w = bf16_to_f32(file.array(name))
        plain[name] = ("F32", w)
        packed[name] = ("F32", w)
        stem = name.removesuffix(".weight")
        if w.ndim < 2 or "embeddings" in name:
            continue
        grid = Grid(w.shape, 4, 64, zero=8, scattered=False, seed=0)
        groups = w.reshape(len(w), -1, 64)
        grid.scales = (np.abs(groups).max(axis=2) * 2 / 15).astype(np.float16)
        steps = np.rint(groups / grid.scales.astype(np.float32)[..., None]).reshape(w.shape)
        grid.codes = np.clip(steps + 8, 0, 15).astype(int)
        del packed[name]
        packed |= gptq(stem, grid, 4)
        plain[name] = ("F32", grid.weights)
    raw = json.loads((demo / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    for name, tensors, more in (
        ("packed", packed, {"quantization_config": settings}), ("plain", plain, {})
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**raw, **more}))
        (folder / name / "tokenizer.json").write_bytes((demo / "tokenizer.json").read_bytes())
        write_safetensors(folder / name / "model.safetensors", tensors)
    return folder / "packed", folder / "plain"


def test_the_demo_taken_over_continues_as_transformers_does(tmp_path, demo_checkpoint):
    """Logits differ by what int8 activations and the int6 embedding do, the text does not."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import bloomq

    packed, plain = packed_demo(tmp_path, demo_checkpoint)
    convert(packed, tmp_path / "pack", head_scheme="f32")
    convert(plain, tmp_path / "yardstick", scheme="f32")
    ours, yardstick = dequantized(tmp_path / "pack"), dequantized(tmp_path / "yardstick")
    assert all(np.array_equal(ours[name], yardstick[name]) for name in yardstick)
    model = transformers.BloomForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    loaded = bloomq.load(tmp_path / "pack")
    prompt = "The old man sat by the window and watched the rain"
    ids = loaded.tokenizer.encode(prompt)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.numpy()
        text = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    found = loaded(np.array([ids])).logits
    error = np.square(found.astype(float) - expected).sum() / np.square(expected).sum()
    assert error < 1e-4  # measured: 1.8e-5, of int8 activations
    assert list(loaded.generate(prompt, max_new_tokens=24).ids) == text[len(ids) :]


# -- damage ----------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) and None


def replaced(name: str, dtype: str, array: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (dtype, array)})


def changed(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        dtype, array = tensors[name]
        tensors[name] = (dtype, np.ascontiguousarray(change(array)))

    return edit


def put(at: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[at] = value
        return array

    return change


GPTQ_DAMAGE = {
    "no zeros": (without(f"{QKV}.qzeros"), "query_key_value.qweight: there is no qzeros beside it"),
    "no scales": (without(f"{QKV}.scales"), "there is no scales beside it: incomplete"),
    "no index": (without(f"{QKV}.g_idx"), "there is no g_idx beside it"),
    "no words": (without(f"{QKV}.qweight"), "no tensor h.0.self_attention.query_key_value.weight"),
    "float words": (
        replaced(f"{QKV}.qweight", "F32", np.zeros((16, 384), np.float32)),
        "is F32 [16, 384], expected words of I32 in two dimensions",
    ),
    "flat words": (
        changed(f"{QKV}.qweight", lambda a: a.reshape(-1)), "expected words of I32 in two"
    ),
    "empty words": (
        replaced(f"{QKV}.qweight", "I32", np.zeros((0, 384), np.int32)), "is I32 [0, 384]"
    ),
    "words too few": (
        changed(f"{QKV}.qweight", lambda a: a[:-1]),
        "unpacks to [384, 120], expected multiples of 32: damaged, or of other bits",
    ),
    "words of fewer columns": (
        changed(f"{QKV}.qweight", lambda a: a[:, :-1]), "unpacks to [383, 128], expected multiples"
    ),
    "half the words": (
        changed(f"{QKV}.qweight", lambda a: a[:8]), "qzeros is I32 [4, 48], expected I32 [2, 48] by"
    ),
    "transposed words": (changed(f"{QKV}.qweight", lambda a: a.T), "expected multiples of 32"),
    "short words": (
        replaced(f"{QKV}.qweight", "I16", np.zeros((16, 384), np.int16)), "is I16 [16, 384]"
    ),
    "zeros too few": (
        changed(f"{QKV}.qzeros", lambda a: a[:-1]), "by the codes beside it and the settings"
    ),
    "zeros too narrow": (changed(f"{QKV}.qzeros", lambda a: a[:, 1:]), "expected I32 [4, 48]"),
    "float zeros": (
        replaced(f"{QKV}.qzeros", "F16", np.zeros((4, 48), np.float16)), "is F16 [4, 48], expected"
    ),
    "scales too few": (changed(f"{QKV}.scales", lambda a: a[1:]), "expected F16 [4, 384]"),
    "scales too narrow": (changed(f"{QKV}.scales", lambda a: a[:, 1:]), "expected F16 [4, 384]"),
    "whole scales": (
        replaced(f"{QKV}.scales", "I32", np.zeros((4, 384), np.int32)), "expected F16 [4, 384]"
    ),
    "scales of NaN": (
        changed(f"{QKV}.scales", put((0, 3), np.nan)), "scales holds NaN or infinity: damaged"
    ),
    "scales of infinity": (
        changed(f"{QKV}.scales", put((3, 383), np.inf)), "scales holds NaN or infinity"
    ),
    "index too short": (changed(f"{QKV}.g_idx", lambda a: a[1:]), "expected I32 [128]"),
    "index of two dimensions": (
        changed(f"{QKV}.g_idx", lambda a: a.reshape(2, -1)), "expected I32 [128]"
    ),
    "float index": (
        replaced(f"{QKV}.g_idx", "F32", np.zeros(128, np.float32)), "is F32 [128], expected I32"
    ),
    "index too large": (
        changed(f"{QKV}.g_idx", put((5,), 4)), "g_idx holds groups 0 to 4, expected 0 to 3: damaged"
    ),
    "index below zero": (
        changed(f"{QKV}.g_idx", put((5,), -1)), "g_idx holds groups -1 to 3, expected 0 to 3"
    ),
    "index of huge numbers": (changed(f"{QKV}.g_idx", put((0,), 2**31 - 1)), "groups 0 to 21474"),
    "index out of order": (
        changed(f"{QKV}.g_idx", lambda a: a[::-1]),
        "its groups are scattered (g_idx), though desc_act is false: choose a --scheme",
    ),
    "zeros off the middle": (
        changed(f"{QKV}.qzeros", put((0, 0), 0)),
        "expected -8 to 7 of a symmetric grid: choose a --scheme to quantize them anew",
    ),
    "a weight beside its words": (
        replaced(f"{QKV}.weight", "F16", np.zeros((384, 128), np.float16)), "packed, and stored as"
    ),
    "a second set of words": (
        lambda t: t.update({f"{DOWN}.qweight": t[f"{QKV}.qweight"]}), "dense_4h_to_h.qzeros is"
    ),
    "zeros of nothing": (
        lambda t: t.update({"transformer.h.0.x.qzeros": t[f"{QKV}.qzeros"]}), "unexpected tensor"
    ),
    "nothing packed": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".qweight")] and None,
        "no tensor ends in .qweight, expected some by its settings of GPTQ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(GPTQ_DAMAGE))
def test_damaged_gptq_is_refused(tmp_path, damage):
    edit, message = GPTQ_DAMAGE[damage]
    source, _ = packed_checkpoint(tmp_path / "m", edit=edit)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        convert(source, tmp_path / "pack")
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack").exists()


AWQ_DAMAGE = {
    "no zeros": (without(f"{QKV}.qzeros"), "there is no qzeros beside it"),
    "words too wide": (changed(f"{QKV}.qweight", lambda a: a[:, :-1]), "expected multiples of 32"),
    "words of three dimensions": (
        changed(f"{QKV}.qweight", lambda a: a[None]), "expected words of I32 in two dimensions"
    ),
    "index": (
        replaced(f"{QKV}.g_idx", "I32", np.zeros(128, np.int32)), "unexpected tensor"
    ),
    "scales of NaN": (changed(f"{QKV}.scales", put((0, 0), np.nan)), "holds NaN or infinity"),
    "divisors of zero": (
        replaced("transformer.h.0.mlp.gelu_impl.scales", "F16", np.zeros(512, np.float16)),
        "gelu_impl.scales holds 0, NaN or infinity: damaged",
    ),
    "divisors too few": (
        replaced("transformer.h.0.mlp.gelu_impl.scales", "F16", np.ones(128, np.float16)),
        "gelu_impl.scales is F16 [128], expected F16 [512]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(AWQ_DAMAGE))
def test_damaged_awq_is_refused(tmp_path, damage):
    edit, message = AWQ_DAMAGE[damage]
    source, _ = packed_checkpoint(tmp_path / "m", method="awq", group=64, sym=False, edit=edit)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(source, tmp_path / "pack")


SETTINGS = {
    "bits": ({"bits": 5}, "codes of 5 bits, expected one of 2, 3, 4, 8"),
    "no bits": ({"bits": None}, "codes of None bits, expected one of"),
    "true bits": ({"bits": True}, "codes of True bits, expected one of"),
    "group": ({"group_size": 0}, "group_size is 0, expected -1 or a whole number"),
    "text group": ({"group_size": "128"}, "group_size is '128', expected -1"),
    "huge group": ({"group_size": 10**30}, "expected -1 or a whole number"),
    "marlin": ({"checkpoint_format": "marlin"}, "the format is 'marlin', expected gptq or gptq_v2"),
    "marlin by flag": ({"is_marlin_format": True}, "the format is 'marlin', expected gptq"),
    "exllama": ({"format": "exllama"}, "'exllama', expected gptq or gptq_v2: bloomq unpacks no"),
    "gemv": ({"quant_method": "awq", "version": "gemv"}, "the format is 'gemv', expected gemm"),
    "awq of 3 bits": ({"quant_method": "awq", "version": "gemm", "bits": 3}, "expected one of 4"),
    "dynamic": ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic is set: bits that differ by module"),
    "sym": ({"sym": "yes"}, "its sym is 'yes', expected true or false"),
    "desc_act": ({"desc_act": 1}, "its desc_act is 1, expected true or false"),
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_settings_that_are_not_supported_are_refused_by_name(tmp_path, case):
    settings, message = SETTINGS[case]
    source, _ = packed_checkpoint(tmp_path / "m", settings=settings)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        convert(source, tmp_path / "pack")
    assert "config.json: quantization_config: " in str(caught.value)


def test_settings_that_are_no_object_are_refused(tmp_path):
    source, _ = packed_checkpoint(tmp_path / "m")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "quantization_config": [4]}))
    with pytest.raises(ConfigError, match=re.escape("found [4], expected settings in a JSON")):
        convert(source, tmp_path / "pack")


def test_packed_tensors_without_settings_are_refused(tmp_path):
    source, _ = packed_checkpoint(tmp_path / "m", settings_file="other.json")
    with pytest.raises(
        CheckpointError, match=r"is packed, and neither config\.json nor quantize_c"
    ):
        convert(source, tmp_path / "pack")


def test_awq_is_never_scattered_or_symmetric():
    assert Packing("awq", 4, 64, False, False, 0).scheme(C) is not None
    assert Packing("gptq", 4, 16, True, False, 1).scheme(C) is None
