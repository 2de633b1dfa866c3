"""Conversion: every kind of Hugging Face checkpoint in, the expected weights out, or a refusal.

Whatever is refused leaves nothing behind: no pack, no hidden folder.
"""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters import whole
from bloomq.converters.convert import convert
from bloomq.converters.names import expected_tensors, huggingface_name
from bloomq.converters.plan import CONVERTER_VERSION
from bloomq.converters.reading import read_checkpoint
from bloomq.converters.source import Checkpoint, SourceTensor
from conftest import Tensors, dequantized, to_dtype, write_checkpoint

from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import (
    BloomqError,
    CheckpointError,
    ConfigError,
    InputNotFound,
    NumericError,
    OutputError,
    TokenizerError,
    UsageError,
)
from bloomq.pack import Pack
from bloomq.scheme_choice import choose_schemes
from bloomq.schemes import bf16_to_f32, get_scheme
from bloomq.tensorfile import TensorFile
from bloomq.tokenizer_config import Settings

TABLE, QKV = "transformer.word_embeddings.weight", "transformer.h.0.self_attention.query_key_value"


def source_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every tensor of a single-file checkpoint as float32, by foreign name without the prefix."""
    file = TensorFile.open(checkpoint / "model.safetensors")
    weights = {}
    for name, entry in file.entries.items():
        array = file.array(name)
        wide = bf16_to_f32(array) if entry.dtype == "BF16" else array.astype(np.float32)
        weights[name.removeprefix("transformer.")] = wide
    return weights


def expected_weights(checkpoint: Path, scheme: str = "f32") -> dict[str, np.ndarray]:
    """What a pack must hold: matrices through the scheme, vectors as they are, by our names."""
    config = BloomConfig.from_file(checkpoint / "config.json")
    source, weights = source_weights(checkpoint), {}
    body, head = (
        get_scheme(scheme),
        get_scheme("int6" if scheme in ("nl4", "int4", "nf4") else scheme),
    )
    for name in expected_tensors(config):
        array = source[huggingface_name(name)]
        if array.ndim == 2:
            chosen = head if name in ("wte.weight", "lm_head.weight") else body
            weights[name.removesuffix(".weight")] = through(chosen, array)
        else:
            weights[name] = array
    return weights


def through(scheme: Any, w: np.ndarray) -> np.ndarray:
    return scheme.dequantize(scheme.quantize(w), w.shape)


def assert_holds(pack: Path, expected: dict[str, np.ndarray]) -> None:
    """The pack's weights are exactly these; the padding of vectors is zero."""
    Pack.open(pack).verify()
    found = dequantized(pack)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        length = len(array)
        assert found[name][:length].tobytes() == array.tobytes(), name
        assert not found[name][length:].any(), name


def refused(
    kind: type[BloomqError], checkpoint: Path, target: Path | None = None, **options: Any
) -> str:
    """The one-line message with which the conversion is refused; nothing is left behind."""
    target = target or checkpoint.parent / "out" / "pack"
    target.parent.mkdir(exist_ok=True)
    before = sorted(target.parent.iterdir())
    with pytest.raises(kind) as caught:
        convert(checkpoint, target, **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert not message.endswith(".")
    assert sorted(target.parent.iterdir()) == before
    return message


# -- what goes in comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4", "f32", "bf16", "f16"])
def test_demo_pack_holds_the_checkpoints_weights(pack_of, demo_checkpoint, scheme):
    assert_holds(pack_of(scheme), expected_weights(demo_checkpoint, scheme))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scheme", ["f32", "int4"])
def test_every_source_dtype_is_read(tmp_path, dtype, scheme):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, n_layer=2)
    convert(checkpoint, tmp_path / "pack", scheme=scheme)
    assert_holds(tmp_path / "pack", expected_weights(checkpoint, scheme))
    assert Pack.open(tmp_path / "pack").manifest["provenance"]["dtype"] == dtype


def test_dtypes_may_differ_between_tensors(tmp_path):
    def widen(tensors: Tensors) -> None:
        name = f"{QKV}.weight"
        tensors[name] = ("F32", bf16_to_f32(tensors[name][1]) + np.float32(1e-6))

    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="BF16", edit=widen)
    convert(checkpoint, tmp_path / "pack", scheme="int8")
    assert_holds(tmp_path / "pack", expected_weights(checkpoint, "int8"))


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_shards_and_prefix_change_no_byte_of_the_weights(tmp_path, shards, prefix):
    whole = write_checkpoint(tmp_path / "a" / "checkpoint")
    parts = write_checkpoint(tmp_path / "b" / "checkpoint", shards=shards, prefix=prefix)
    for source in (whole, parts):
        convert(source, source.parent / "pack", scheme="int4")
    for file in (tmp_path / "a" / "pack").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "pack" / file.name).read_bytes()


def test_prefix_may_differ_between_tensors(tmp_path):
    def mix(tensors: Tensors) -> None:
        tensors["ln_f.bias"] = tensors.pop("transformer.ln_f.bias")

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=mix)
    convert(checkpoint, tmp_path / "pack", scheme="f32")
    assert_holds(tmp_path / "pack", expected_weights(checkpoint))


def test_either_spelling_of_the_config_gives_the_same_bytes(tmp_path):
    ours = write_checkpoint(tmp_path / "a" / "checkpoint")
    theirs = write_checkpoint(tmp_path / "b" / "checkpoint")
    raw = {"model_type": "bloom", "n_embed": 64, "num_attention_heads": 4, "n_layer": 1}
    raw |= {"vocab_size": 96, "architectures": ["BloomForCausalLM"]}
    (theirs / "config.json").write_text(json.dumps(raw))
    for source in (ours, theirs):
        convert(source, source.parent / "pack")
    for file in (tmp_path / "a" / "pack").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "pack" / file.name).read_bytes()


@pytest.mark.parametrize("vocab_size", [1 + 3, 31, 32, 33, 70])
@pytest.mark.parametrize("hidden_size", [12, 60, 64, 132])
def test_sizes_that_fill_no_tile_are_padded(tmp_path, vocab_size, hidden_size):
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **sizes)
    for scheme in ("int4", "f32"):
        convert(checkpoint, tmp_path / scheme, scheme=scheme)
        assert_holds(tmp_path / scheme, expected_weights(checkpoint, scheme))


def test_matrix_larger_than_a_block_is_the_same_as_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 32 * 64 * 4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", vocab_size=150)
    for scheme in ("int8", "nl4", "int4", "nf4"):
        convert(checkpoint, tmp_path / scheme, scheme=scheme, threads=3)
        assert_holds(tmp_path / scheme, expected_weights(checkpoint, scheme))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_no_byte(tmp_path, threads):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=3)
    convert(checkpoint, tmp_path / "default")
    convert(checkpoint, tmp_path / "pack", threads=threads)
    for file in (tmp_path / "default").iterdir():
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()


def test_tokenizer_is_copied_byte_for_byte(pack_of, demo_checkpoint):
    original = (demo_checkpoint / "tokenizer.json").read_bytes()
    assert (pack_of("int4") / "tokenizer.json").read_bytes() == original
    assert Pack.open(pack_of("int4")).tokenizer_bytes() == original


def with_tokenizer(checkpoint: Path, settings: Any) -> Path:
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    return checkpoint


def test_settings_of_the_tokenizer_that_are_not_blooms_are_stored(tmp_path):
    settings = {"padding_side": "right", "pad_token": {"content": "</s>"}, "bos_token": "<s>"}
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "checkpoint"), settings)
    convert(checkpoint, tmp_path / "pack")
    stored = json.loads((tmp_path / "pack" / "manifest.json").read_text())["tokenizer"]
    assert stored == {"padding_side": "right", "pad_token": "</s>"}
    assert Pack.open(tmp_path / "pack").tokenizer_settings == read_checkpoint(checkpoint).settings


def test_blooms_own_settings_are_not_stored(tmp_path, pack_of):
    assert "tokenizer" not in Pack.open(pack_of("int4")).manifest
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "checkpoint"), {"pad_token": "</s>"})
    (checkpoint / "tokenizer.json").unlink()  # settings of nothing
    convert(checkpoint, tmp_path / "pack")
    assert "tokenizer" not in Pack.open(tmp_path / "pack").manifest


def test_settings_that_the_tokenizer_has_not_are_refused(tmp_path):
    checkpoint = with_tokenizer(
        write_checkpoint(tmp_path / "checkpoint"), {"add_prefix_space": True}
    )
    assert refused(TokenizerError, checkpoint) == (
        f"{checkpoint}/tokenizer_config.json: add_prefix_space is True, this tokenizer has False "
        "alone"
    )


def test_model_without_language_head_converts(tmp_path):
    config = {"architectures": ["BloomModel"]}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", prefix="", config=config)
    convert(checkpoint, tmp_path / "pack", scheme="f32")
    assert_holds(tmp_path / "pack", expected_weights(checkpoint))


def test_no_head_is_missing_from_a_bare_model_that_ties_none(tmp_path):
    config = {"architectures": ["BloomModel"], "tie_word_embeddings": False}
    convert(write_checkpoint(tmp_path / "checkpoint", config=config), tmp_path / "pack")
    assert Pack.open(tmp_path / "pack").config.head_is_embedding


# -- the head --------------------------------------------------------------------------------------


def with_head(change: float) -> Callable[[Tensors], None]:
    """Stores a head that is the embedding, its first value moved by `change`."""

    def edit(tensors: Tensors) -> None:
        dtype, table = tensors[TABLE]
        head = table.copy()
        head[-1, -1] += change
        tensors["lm_head.weight"] = (dtype, head)

    return edit


@pytest.mark.parametrize("tie", [True, False])
def test_head_that_repeats_the_embedding_is_stored_once(tmp_path, tie):
    config = {"tie_word_embeddings": tie}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config=config, edit=with_head(0))
    done = convert(checkpoint, tmp_path / "pack", scheme="f32")
    opened = Pack.open(tmp_path / "pack")
    assert opened.config.tie_word_embeddings
    assert "lm_head" not in opened.schemes
    assert not any("lm_head" in note for note in done.notes)


@pytest.mark.parametrize("tie", [True, False])
def test_head_that_differs_is_kept_and_noted(tmp_path, tie):
    config = {"tie_word_embeddings": tie}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config=config, edit=with_head(0.25))
    done = convert(checkpoint, tmp_path / "pack", scheme="f32")
    opened = Pack.open(tmp_path / "pack")
    assert not opened.config.tie_word_embeddings
    difference = opened.matrix("lm_head").dequantize() - opened.matrix("wte").dequantize()
    assert np.flatnonzero(difference).tolist() == [difference.size - 1]
    note = f"{checkpoint}: lm_head.weight differs from the embedding: kept as a head of its own"
    assert (note in done.notes) is tie


def test_long_tables_are_compared_to_their_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_COMPARE_BYTES", 10 * 64 * 4)
    for change in (0, 0.25):
        checkpoint = write_checkpoint(tmp_path / str(change), edit=with_head(change))
        assert read_checkpoint(checkpoint).config.tie_word_embeddings is (change == 0)


def test_untied_model_without_head_is_incomplete(tmp_path):
    config = {"tie_word_embeddings": False}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config=config)
    expected = f"{checkpoint}: no tensor lm_head.weight: the checkpoint is incomplete"
    assert refused(CheckpointError, checkpoint) == expected


def test_head_of_another_dtype_is_a_head_of_its_own(tmp_path):
    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = ("F16", tensors[TABLE][1].astype(np.float16))

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    assert not read_checkpoint(checkpoint).config.tie_word_embeddings


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "nl4", "int4"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_size_is_used_and_recorded(tmp_path, group_size, scheme):
    checkpoint, name = write_checkpoint(tmp_path / "checkpoint"), scheme or "nl4"
    convert(checkpoint, tmp_path / "pack", scheme=scheme, group_size=group_size)
    opened = Pack.open(tmp_path / "pack")
    assert {s.label for s in opened.schemes.values()} == {f"{name}-g{group_size}", "int6"}
    entry = opened.manifest["weights"]["h.0.mlp.up"]
    assert entry == {"shape": [256, 64], "scheme": name, "group_size": group_size}
    w = source_weights(checkpoint)["h.0.mlp.dense_h_to_4h.weight"]
    expected = through(get_scheme(name, group_size), w)
    assert opened.matrix("h.0.mlp.up").dequantize().tobytes() == expected.tobytes()


def test_head_scheme_is_for_the_embedding_and_the_head_alone(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=with_head(0.25))
    convert(checkpoint, tmp_path / "pack", scheme="int4", group_size=32, head_scheme="int8")
    opened = Pack.open(tmp_path / "pack")
    labels = {name: scheme.label for name, scheme in opened.schemes.items()}
    assert labels.pop("wte") == "int8"
    assert labels.pop("lm_head") == "int8"
    assert set(labels.values()) == {"int4-g32"}
    provenance = opened.manifest["provenance"]
    assert (provenance["scheme"], provenance["head_scheme"]) == ("int4-g32", "int8")


def test_int4_head_takes_the_bodys_group_size(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "a", group_size=128, head_scheme="int4")
    assert Pack.open(tmp_path / "a").schemes["wte"].label == "int4-g128"
    convert(checkpoint, tmp_path / "b", scheme="int8", head_scheme="int4")
    assert Pack.open(tmp_path / "b").schemes["wte"] == get_scheme("int4")


def test_schemes_are_chosen_for_matrices_only():
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10)
    body, head = get_scheme("nf4"), get_scheme("int8")
    chosen = choose_schemes(config, body, head)
    assert chosen.pop("wte") == head
    assert set(chosen.values()) == {body}
    assert set(chosen) == {s.name for s in weight_specs(config) if s.kind == "linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scheme": "int3"},
            "unknown scheme 'int3', expected one of int8, int6, nl4, int4, nf4, f32",
        ),
        ({"head_scheme": "q8"}, "unknown scheme 'q8', expected one of int8, int6"),
        ({"scheme": ""}, "unknown scheme '', expected one of int8, int6"),
        ({"head_scheme": ""}, "unknown scheme '', expected one of int8, int6"),
        ({"group_size": 16}, "group size 16, expected one of (32, 64, 128)"),
        ({"group_size": -32}, "group size -32, expected one of (32, 64, 128)"),
        ({"scheme": "int8", "group_size": 64}, "scheme int8 has no group size to choose"),
        ({"threads": 0}, "threads is 0, expected 1 to 64"),
        ({"threads": -2}, "threads is -2, expected 1 to 64"),
        ({"threads": 1.5}, "threads is 1.5, expected 1 to 64"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert refused(UsageError, checkpoint, **options).startswith(message)


# -- the fingerprint -------------------------------------------------------------------------------


def fingerprint(w: np.ndarray, **changed: Any) -> tuple[str, int]:
    """That of a checkpoint of this one tensor, and the rows that were read for it."""
    read = 0

    def rows(start: int, stop: int) -> np.ndarray:
        nonlocal read
        read += stop - start
        return w[start:stop]

    tensor = SourceTensor("w", "F32", w.shape, rows)
    config = BloomConfig(**changed.pop("config", {}))
    tokenizer = changed.pop("tokenizer", b"{}")
    return Checkpoint(config, {"w": tensor}, tokenizer, {}, **changed).fingerprint, read


@pytest.mark.parametrize("shape", [(5000,), (2, 3), (64, 70_000), (1000, 250)], ids=str)
def test_fingerprint_is_of_every_value_of_a_small_tensor(shape):
    w = np.zeros(shape, np.float32)
    whole, read = fingerprint(w)
    assert read == shape[0]
    for at in (0, w.size // 2 + 1, w.size - 1):
        changed = w.copy()
        changed.flat[at] = 1
        assert fingerprint(changed)[0] != whole
    assert fingerprint(w.T.copy())[0] != whole or w.ndim == 1


def test_fingerprint_is_of_64_rows_of_a_large_tensor_the_first_and_the_last_too():
    w = np.zeros((3000, 100), np.float32)
    whole, read = fingerprint(w)
    assert read == 64
    noticed = []
    for row in range(3000):
        w[row, 99] = 1
        if fingerprint(w)[0] != whole:
            noticed.append(row)
        w[row, 99] = 0
    assert len(noticed) == 64
    assert (noticed[0], noticed[-1]) == (0, 2999)
    assert set(np.diff(noticed)) <= {47, 48}
    assert fingerprint(w + 1)[0] != whole


def test_fingerprint_is_of_config_tokenizer_and_settings_too():
    w = np.zeros((2, 2), np.float32)
    settings = Settings("right")
    found = [
        fingerprint(w)[0],
        fingerprint(w, tokenizer=None)[0],
        fingerprint(w, tokenizer=b"{ }")[0],
        fingerprint(w, settings=settings)[0],
        fingerprint(w, config={"labels": ("a", "b")})[0],
        fingerprint(w, config={"problem_type": "regression"})[0],
        fingerprint(w, config={"pad_token_id": 3})[0],
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(w, notes=("a note",))[0] == found[0]


# -- report and progress ---------------------------------------------------------------------------


def test_conversion_reports_what_it_did(pack_of, demo_checkpoint, tmp_path):
    done = convert(demo_checkpoint, tmp_path / "pack", scheme="int4")
    opened = Pack.open(tmp_path / "pack")
    assert done.pack == tmp_path / "pack"
    assert done.source_bytes == 2 * opened.parameters  # bf16
    assert (done.pack_bytes, done.bits_per_weight) == (opened.nbytes, opened.bits_per_weight)
    assert 4 < done.bits_per_weight < 6  # int4, with the embedding in int6
    assert done.seconds > 0
    assert done.notes == ()


def test_progress_rises_and_ends_at_the_total(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=3, edit=with_head(0.5))
    seen: list[tuple[int, int]] = []
    done = convert(checkpoint, tmp_path / "pack", progress=lambda *now: seen.append(now))
    bytes_done = [now for now, _ in seen]
    assert len(seen) > 30
    assert bytes_done == sorted(set(bytes_done))
    assert {total for _, total in seen} == {done.source_bytes}
    assert bytes_done[-1] == done.source_bytes


def test_progress_that_raises_leaves_nothing(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")

    def stop(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert(checkpoint, tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_missing_tokenizer_is_noted(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    done = convert(checkpoint, tmp_path / "pack")
    note = f"{checkpoint}: no tokenizer.json: the pack will take token ids only, not text"
    assert done.notes == (note,)
    assert Pack.open(tmp_path / "pack").tokenizer_bytes() is None


def test_provenance_names_the_checkpoint(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "my bloom", dtype="F16")
    convert(checkpoint, tmp_path / "pack", scheme="nf4")
    provenance = Pack.open(tmp_path / "pack").manifest["provenance"]
    assert provenance.pop("bloomq")
    assert re.fullmatch("[0-9a-f]{64}", provenance.pop("fingerprint"))
    assert provenance == {
        "format": "huggingface", "name": "my bloom", "architectures": ["BloomForCausalLM"],
        "dtype": "F16", "scheme": "nf4", "head_scheme": "int6", "method": "round-to-nearest",
        "converter": CONVERTER_VERSION,
    }  # fmt: skip


def test_missing_parents_of_the_target_are_made(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "a" / "b" / "pack")
    assert Pack.open(tmp_path / "a" / "b" / "pack").config.vocab_size == 96


# -- not a checkpoint ------------------------------------------------------------------------------


def test_absent_checkpoint_is_named(tmp_path):
    message = refused(InputNotFound, tmp_path / "none")
    assert message == f"{tmp_path / 'none'}: no such file or folder"


def test_file_in_place_of_the_checkpoint_is_named(tmp_path):
    file = write_checkpoint(tmp_path / "checkpoint") / "model.safetensors"
    expected = f"{file}: is a file, expected the folder of a checkpoint, or a GGUF"
    assert refused(CheckpointError, file) == expected


def test_folder_without_config_is_named(tmp_path):
    (tmp_path / "photos").mkdir()
    expected = f"{tmp_path / 'photos'}: no config.json: not a Hugging Face checkpoint"
    assert refused(CheckpointError, tmp_path / "photos") == expected


def test_folder_without_weights_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    assert refused(CheckpointError, checkpoint) == (
        f"{checkpoint}: no model.safetensors and no model.safetensors.index.json: not a checkpoint"
    )


@pytest.mark.parametrize("content", ["[1]", '"bloom"', "null"])
def test_config_that_is_not_an_object_is_named(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "config.json").write_text(content)
    expected = f"{checkpoint / 'config.json'}: expected a JSON object"
    assert refused(ConfigError, checkpoint) == expected


def test_config_that_is_not_json_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "config.json").write_text('{"hidden_size": 64,}')
    found = refused(ConfigError, checkpoint)
    assert found.startswith(f"{checkpoint / 'config.json'}: not valid JSON (")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"model_type": "gpt2"}, ConfigError, "model_type is 'gpt2', expected 'bloom'"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            ConfigError,
            "architectures ['LlamaForCausalLM'], expected one of BloomModel, BloomForCausalLM",
        ),
        (
            {"architectures": ["BloomForSequenceClassification"]},
            CheckpointError,
            "no tensor score.weight: the checkpoint is incomplete",
        ),
        (
            {"architectures": "BloomForCausalLM"},
            ConfigError,
            "architectures BloomForCausalLM, expected one of",
        ),
        (
            {"quantization_config": {"load_in_8bit": True}},
            CheckpointError,
            "is quantized already (quantization_config): convert the original checkpoint",
        ),
        (
            {"apply_residual_connection_post_layernorm": 1},
            ConfigError,
            "apply_residual_connection_post_layernorm is 1, expected true or false",
        ),
        ({"n_inner": 100}, ConfigError, "n_inner is 100, expected null or 4 x hidden_size = 256"),
        ({"n_head": 7}, ConfigError, "hidden_size 64 is not a multiple of n_head 7"),
        ({"n_layer": -1}, ConfigError, "n_layer is -1, expected a whole number"),
    ],
)
def test_unsupported_config_is_refused_by_name(tmp_path, config, kind, message):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config=config)
    found = refused(kind, checkpoint)
    assert str(checkpoint) in found
    assert message in found


# -- pickles ---------------------------------------------------------------------------------------


class _Mine:
    """What unpickling would run: it makes a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.flag, "owned"))


def test_pickle_is_refused_by_name_and_never_run(tmp_path):
    """What is no state dict; test_pickled has many more."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    flag = tmp_path / "flag"
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(_Mine(flag)))
    found = refused(CheckpointError, checkpoint)
    assert found.startswith(f"{checkpoint / 'pytorch_model.bin'}: names pathlib.Path.write_text, ")
    assert not flag.exists()


def test_pickle_under_a_safetensors_name_is_never_opened(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    flag = tmp_path / "flag"
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(_Mine(flag)))
    assert refused(CheckpointError, checkpoint) == (
        f"{checkpoint / 'model.safetensors'}: is a PyTorch pickle, which bloomq never opens (it "
        "can run code): save the model as safetensors"
    )
    assert not flag.exists()
    pickle.loads((checkpoint / "model.safetensors").read_bytes())
    assert flag.exists()  # the mine was live


# -- damaged checkpoints ---------------------------------------------------------------------------

SHARD_1 = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def test_missing_shard_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shards=2)
    (checkpoint / SHARD_1).unlink()
    expected = f"{checkpoint / SHARD_1}: missing shard: download it again"
    assert refused(CheckpointError, checkpoint) == expected


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_truncated_shard_is_named(tmp_path, cut):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shards=2)
    data = (checkpoint / SHARD_1).read_bytes()
    (checkpoint / SHARD_1).write_bytes(data[:-cut])
    found = refused(CheckpointError, checkpoint)
    assert found.startswith(f"{checkpoint / SHARD_1}: damaged or truncated (")


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"weight_map": {}}', '{"weight_map": 1}'])
def test_index_without_weight_map_is_named(tmp_path, content):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shards=2)
    (checkpoint / INDEX).write_text(content)
    expected = f"{checkpoint / INDEX}: no weight_map: damaged, download it again"
    assert refused(CheckpointError, checkpoint) == expected


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ".", "./x"]
)
def test_index_pointing_outside_the_folder_is_refused(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shards=2)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    expected = f"{checkpoint / INDEX}: shard {name!r} lies outside the checkpoint's folder"
    assert refused(CheckpointError, checkpoint) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [("..", "is not a regular file"), ("", "is not a regular file"),
     (None, "missing shard"), ([], "missing shard"), ("a\0b", "missing shard")],
)  # fmt: skip
def test_index_pointing_at_no_file_is_refused(tmp_path, name, message):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shards=2)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    assert message in refused(CheckpointError, checkpoint)


def test_missing_tensor_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=lambda t: t.pop(f"{QKV}.bias"))
    assert refused(CheckpointError, checkpoint) == (
        f"{checkpoint}: no tensor h.0.self_attention.query_key_value.bias: the checkpoint is "
        "incomplete"
    )


def test_fewer_layers_than_the_config_says_are_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config={"n_layer": 2})
    found = refused(CheckpointError, checkpoint)
    assert found.startswith(f"{checkpoint}: no tensor h.1.input_layernorm.weight: ")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["h.0.lora_A.weight"], "unexpected tensor h.0.lora_A.weight: not part of a Bloom"),
        (["zz", "score.weight"], "unexpected tensor score.weight and 1 more: not part of a Bloom"),
    ],
)
def test_extra_tensors_are_named(tmp_path, extra, message):
    def edit(tensors: Tensors) -> None:
        tensors.update(dict.fromkeys(extra, ("F32", np.zeros(3, np.float32))))

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    assert refused(CheckpointError, checkpoint).startswith(f"{checkpoint}: {message}")


def test_more_layers_than_the_config_says_are_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=2, config={"n_layer": 1})
    assert "unexpected tensor h.1.input_layernorm.bias and 11 more" in refused(
        CheckpointError, checkpoint
    )


def test_tensor_with_and_without_prefix_is_stored_twice(tmp_path):
    def edit(tensors: Tensors) -> None:
        tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"]

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    file = checkpoint / "model.safetensors"
    assert refused(CheckpointError, checkpoint) in (
        f"{file}: ln_f.bias: stored twice, also as {file}: transformer.ln_f.bias",
        f"{file}: transformer.ln_f.bias: stored twice, also as {file}: ln_f.bias",
    )


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        (TABLE, "F32", (95, 64), "is [95, 64], expected [96, 64] by config.json"),
        (TABLE, "F32", (64, 96), "is [64, 96], expected [96, 64] by config.json"),
        (TABLE, "F32", (0, 64), "is [0, 64], expected [96, 64] by config.json"),
        (TABLE, "F32", (), "is [], expected [96, 64] by config.json"),
        (f"{QKV}.weight", "F32", (192, 64, 1), "is [192, 64, 1], expected [192, 64] by config"),
        (f"{QKV}.bias", "F32", (191,), "is [191], expected [192] by config.json"),
        ("transformer.ln_f.weight", "F32", (1, 64), "is [1, 64], expected [64] by config.json"),
        (f"{QKV}.weight", "F64", (192, 64), "is F64, expected one of F32, F16, BF16"),
    ],
)
def test_tensor_of_wrong_shape_or_dtype_is_named(tmp_path, name, dtype, shape, message):
    wrong = (dtype, to_dtype(np.zeros(shape, np.float32), dtype))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=lambda t: t.update({name: wrong}))
    found = refused(CheckpointError, checkpoint)
    assert found.startswith(f"{checkpoint / 'model.safetensors'}: {name} {message}")


def test_head_of_wrong_shape_is_named(tmp_path):
    wrong = ("F32", np.zeros((96, 63), np.float32))
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", edit=lambda t: t.update({"lm_head.weight": wrong})
    )
    assert "lm_head.weight is [96, 63], expected [96, 64]" in refused(CheckpointError, checkpoint)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [TABLE, f"{QKV}.bias"])
def test_weights_that_are_not_numbers_are_named(tmp_path, dtype, bad, name):
    def edit(tensors: Tensors) -> None:
        tensors[name][1].reshape(-1)[-1] = to_dtype(np.float32(bad).reshape(1), dtype)[0]

    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, edit=edit)
    row = 191 if name.endswith("bias") else 95
    assert refused(NumericError, checkpoint) == (
        f"{checkpoint / 'model.safetensors'}: {name} holds NaN or infinity in row {row}: the "
        "checkpoint is damaged"
    )


@pytest.mark.parametrize("scheme", ["nl4", "int4", "nf4", "f16"])
def test_weights_too_large_for_the_scheme_are_named(tmp_path, scheme):
    def edit(tensors: Tensors) -> None:
        tensors[f"{QKV}.weight"][1][5, 6] = 1e7

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    assert refused(NumericError, checkpoint, scheme=scheme) == (
        f"{checkpoint / 'model.safetensors'}: {QKV}.weight holds weights too large for {scheme}: "
        "choose bf16, f32 or int8"
    )
    convert(checkpoint, tmp_path / "pack", scheme="int8")
    assert_holds(tmp_path / "pack", expected_weights(checkpoint, "int8"))


def test_folder_in_place_of_the_tokenizer_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").mkdir()
    expected = f"{checkpoint / 'tokenizer.json'}: cannot be read: Is a directory"
    assert refused(CheckpointError, checkpoint) == expected


def test_giant_tokenizer_is_not_read(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with (checkpoint / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)  # sparse: no disk is used
    expected = f"{checkpoint / 'tokenizer.json'}: over 268435456 bytes: too large for what it "
    expected += "should be"
    assert refused(CheckpointError, checkpoint) == expected


# -- sources that change meanwhile -----------------------------------------------------------------


def test_source_cut_short_while_converting_is_an_error_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=4)
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size

    def cut(done: int, total: int) -> None:
        with file.open("r+b") as handle:
            handle.truncate(size // 8)

    found = refused(CheckpointError, checkpoint, progress=cut)
    assert found == f"{file}: shorter than the {size} bytes it had: it changed"


def test_source_removed_while_converting_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=4)
    file = checkpoint / "model.safetensors"
    found = refused(CheckpointError, checkpoint, progress=lambda *_: file.unlink(missing_ok=True))
    assert found == f"{file}: cannot be read: No such file or directory"


# -- targets ---------------------------------------------------------------------------------------


def test_existing_pack_is_kept_without_force(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "pack", scheme="int8")
    before = (tmp_path / "pack" / "manifest.json").read_bytes()
    found = refused(OutputError, checkpoint, tmp_path / "pack")
    assert found == f"{tmp_path / 'pack'}: already exists: --force replaces a pack"
    assert (tmp_path / "pack" / "manifest.json").read_bytes() == before
    convert(checkpoint, tmp_path / "pack", scheme="int4", force=True)
    assert Pack.open(tmp_path / "pack").schemes["wte"].name == "int6"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "pack"]


def test_failed_replacement_keeps_the_old_pack(tmp_path):
    good = write_checkpoint(tmp_path / "good")
    bad = write_checkpoint(
        tmp_path / "bad", edit=lambda t: t["transformer.ln_f.bias"][1].fill(np.nan)
    )
    convert(good, tmp_path / "pack", scheme="int8")
    refused(NumericError, bad, tmp_path / "pack", force=True)
    Pack.open(tmp_path / "pack").verify()


@pytest.mark.parametrize("force", [False, True])
def test_existing_file_or_folder_is_never_replaced(tmp_path, force):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", checkpoint):
        found = refused(OutputError, checkpoint, target, force=force)
        assert found == f"{target}: already exists: choose another name"
    assert (tmp_path / "file").read_text() == "mine"


def test_file_as_parent_of_the_target_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        convert(checkpoint, tmp_path / "file" / "pack")
    expected = f"{tmp_path / 'file' / 'pack'}: cannot be written: Not a directory"
    assert str(caught.value) == expected


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc on this system")
def test_unwritable_folder_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(OutputError, match=r"^/proc/pack: cannot be written: "):
        convert(checkpoint, "/proc/pack")


# -- memory ----------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from bloomq.converters.convert import convert

def megabytes(field):  # of this process; ru_maxrss would count the parent that forked it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

small, large, out = sys.argv[1:]
convert(small, out + "/small-pack", scheme="int4", threads=2)  # compiles
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = megabytes("VmRSS")
convert(large, out + "/large-pack", scheme="int4", threads=2)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_a_few_blocks_not_the_model(tmp_path):
    """A 198 MB checkpoint, of which one table is 123 MB; two workers hold a few blocks of 8 MB."""
    sizes = {"hidden_size": 1024, "n_head": 16, "dtype": "BF16"}
    small = write_checkpoint(tmp_path / "small", **sizes, vocab_size=32)
    large = write_checkpoint(tmp_path / "large", **sizes, n_layer=3, vocab_size=60_000, shards=3)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, small, large, tmp_path],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(f"peak RSS above the start: {float(done.stdout):.0f} MB")
    assert float(done.stdout) < 150


# -- known gaps ------------------------------------------------------------------------------------


def test_float32_weights_beyond_bf16_are_refused(tmp_path):
    def edit(tensors: Tensors) -> None:
        tensors[f"{QKV}.weight"][1][5, 6] = np.finfo(np.float32).max

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    assert "too large for bf16" in refused(NumericError, checkpoint, scheme="bf16")


def test_architectures_that_are_not_names_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config={"architectures": [["x"]]})
    assert "architectures [['x']]" in refused(ConfigError, checkpoint)


def test_head_and_embedding_that_are_scalars_are_refused(tmp_path):
    def edit(tensors: Tensors) -> None:
        scalar = ("F32", np.zeros((), np.float32))
        tensors.update({TABLE: scalar, "lm_head.weight": scalar})

    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    assert "expected [96, 64]" in refused(CheckpointError, checkpoint)


def test_extra_tensor_with_a_line_break_stays_on_one_line(tmp_path):
    extra = {"zz\nerror: all is lost": ("F32", np.zeros(3, np.float32))}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", edit=lambda t: t.update(extra))
    assert "unexpected tensor" in refused(CheckpointError, checkpoint)


def test_failure_removes_the_parents_it_made(tmp_path):
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", edit=lambda t: t["transformer.ln_f.bias"][1].fill(np.nan)
    )
    with pytest.raises(NumericError):
        convert(checkpoint, tmp_path / "a" / "b" / "pack")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_group_size_that_is_not_an_integer_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    assert "group size 64.0" in refused(UsageError, checkpoint, group_size=64.0)


def test_group_size_is_for_an_int4_head_too(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    convert(checkpoint, tmp_path / "pack", scheme="int8", head_scheme="int4", group_size=32)
    assert Pack.open(tmp_path / "pack").schemes["wte"].label == "int4-g32"
