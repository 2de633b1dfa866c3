"""Megatron-DeepSpeed's layer files: any number of parts gives the pack of the safetensors
checkpoint; what is missing or does not fit is refused by name.

The layout is written by torch_files, from the published naming.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bloomq.converters.convert import convert
from bloomq.converters.reading import read_checkpoint
from conftest import write_checkpoint
from torch_files import (
    State,
    archive,
    beside,
    layer_file,
    mapping,
    name,
    number,
    program,
    said,
    save_megatron,
    state_of,
    tensor,
)

from bloomq.errors import CheckpointError, ConfigError, NumericError
from bloomq.pack import Pack

RUN = "mp_rank_00_model_states.pt"
Edit = Callable[[State], Any]


def weights(pack: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(pack.glob("weights-*"))]


@pytest.fixture
def layers(tmp_path: Path) -> Callable[..., Path]:
    """`layers(parts=2)`: the layer files of a tiny random model of 2 blocks, in `megatron`, beside
    its safetensors, in `checkpoint`."""

    def written(parts: int = 2, padding: int = 0, **options: Any) -> Path:
        checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=2, **options)
        (checkpoint / "tokenizer.json").write_text("{}")
        folder = beside(checkpoint, tmp_path / "megatron")
        return save_megatron(folder, state_of(checkpoint), parts, padding=padding)

    return written


def edited(folder: Path, layer: int, part: int, edit: Edit) -> Path:
    file = folder / layer_file(layer, part)
    tensors = torch.load(file)
    edit(tensors)
    torch.save(tensors, file)
    return folder


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message and not message.endswith(".")
    return message.removeprefix(str(folder)).lstrip(":/ ")


# -- what goes in comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 128])
def test_demo_in_any_number_of_parts_gives_the_same_weights(
    tmp_path, pack_of, demo_checkpoint, parts, padding
):
    folder = beside(demo_checkpoint, tmp_path / demo_checkpoint.name)
    save_megatron(folder, state_of(demo_checkpoint), parts, padding=padding)
    done = convert(folder, tmp_path / "pack", scheme="int4")
    assert weights(done.pack) == weights(pack_of("int4"))
    left_out = f"{folder}: {padding} rows that pad the vocabulary of 8192 are left out"
    assert done.notes == ((left_out,) if padding else ())
    found, expected = Pack.open(done.pack).manifest, Pack.open(pack_of("int4")).manifest
    assert (found["provenance"].pop("format"), expected["provenance"]["format"]) == (
        "megatron", "huggingface",
    )  # fmt: skip
    assert found["provenance"].items() <= expected["provenance"].items()
    assert found["files"] == expected["files"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("scheme", ["f32", "int8"])
def test_every_dtype_and_size_comes_through(tmp_path, layers, dtype, scheme):
    folder = layers(4, padding=6, dtype=dtype, vocab_size=70)
    convert(tmp_path / "checkpoint", tmp_path / "a", scheme=scheme)
    convert(folder, tmp_path / "b", scheme=scheme)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=len)
def test_any_rows_are_those_of_all_parts(tmp_path, layers, options):
    folder = layers(4)
    if options:
        for file in folder.glob("layer*"):
            torch.save(torch.load(file), file, **options)
    found = read_checkpoint(folder).tensors
    for key, whole in read_checkpoint(tmp_path / "checkpoint").tensors.items():
        assert (found[key].shape, found[key].dtype) == (whole.shape, whole.dtype)
        count = whole.shape[0]
        middle = (count // 4, count // 2 + 1)
        for start, stop in ((0, count), (0, 1), (5, 29), (count - 1, count), middle):
            assert found[key].rows(start, stop).tolist() == whole.rows(start, stop).tolist()


def test_weights_of_hugging_face_win_where_both_are_there(layers, tmp_path):
    folder = layers(2)
    (tmp_path / "checkpoint" / "model.safetensors").rename(folder / "model.safetensors")
    assert read_checkpoint(folder).provenance["format"] == "huggingface"


def test_repeated_tensors_that_differ_are_averaged_in_float32_and_noted(layers):
    folder = layers(2, dtype="BF16")
    for layer, key in ((3, "input_layernorm.weight"), (4, "mlp.dense_4h_to_h.bias")):
        edited(folder, layer, 1, lambda tensors, key=key: tensors[key].add_(0.5))
    opened = read_checkpoint(folder)
    assert opened.notes == (
        f"{folder}: h.0.input_layernorm.weight and 1 more differ between parts: averaged in "
        "float32",
    )
    both = [torch.load(folder / layer_file(3, i))["input_layernorm.weight"] for i in (0, 1)]
    found = opened.tensors["h.0.ln_1.weight"]
    expected = (both[0].float() + both[1].float()) / 2
    assert (found.dtype, found.rows(0, 64).tolist()) == ("F32", expected.tolist())
    assert found.rows(3, 5).tolist() == expected[3:5].tolist()
    assert opened.tensors["h.1.ln_1.weight"].dtype == "BF16"


def test_one_tensor_that_differs_is_noted(layers):
    folder = edited(layers(2), 8 - 2, 1, lambda tensors: tensors["bias"].add_(1))
    expected = f"{folder}: ln_f.bias differs between parts: averaged in float32"
    assert read_checkpoint(folder).notes == (expected,)


def test_what_is_no_tensor_is_left_out_and_noted(layers):
    folder = layers(1)
    edited(folder, 3, 0, lambda tensors: tensors.update(_extra_state=None, args=Namespace(a=1)))
    expected = f"{folder}: no tensors, left out: _extra_state, args"
    assert read_checkpoint(folder).notes == (expected,)


# -- without config.json ---------------------------------------------------------------------------


def run_file(folder: Path, **arguments: Any) -> Path:
    """The file of a run's arguments, with what else lies in it."""
    content = {
        "args": Namespace(**arguments), "iteration": 5, "np_rng_state": np.arange(9),
        "module": None, "rng": torch.get_rng_state(), "set": {1},
    }  # fmt: skip
    torch.save(content, folder / RUN)
    return folder


def test_sizes_are_the_files_where_no_config_is(tmp_path, layers):
    folder = layers(2, padding=32)
    (folder / "config.json").unlink()
    run_file(
        folder, num_attention_heads=4, layernorm_epsilon=1e-6, seq_length=128, lr=Path("x"),
        apply_residual_connection_post_layernorm=False,
    )  # fmt: skip
    opened = read_checkpoint(folder)
    config = opened.config
    sizes = (config.hidden_size, config.n_layer, config.n_head, config.vocab_size)
    assert sizes == (64, 2, 4, 96 + 32)
    assert (config.layer_norm_epsilon, config.seq_length, config.pretraining_tp) == (1e-6, 128, 2)
    assert config.head_is_embedding
    assert opened.notes[0] == (
        f"{folder}: no config.json: sizes are the layer files', padding of the vocabulary included"
    )


@pytest.mark.parametrize("heads", [None, "4", 4.0, True, [4]])
def test_no_number_of_heads_is_an_error_with_its_remedy(layers, heads):
    folder = layers(1)
    (folder / "config.json").unlink()
    expected = f"no config.json, and no num_attention_heads in {RUN}: put the model's config.json "
    assert refusal(folder).startswith(expected)
    run_file(folder, num_attention_heads=heads)
    if heads in (4.0, True):
        assert "n_head is" in refusal(folder, ConfigError)
    else:
        assert refusal(folder).startswith(expected)


@pytest.mark.parametrize(
    "content", [[], {"args": 5}, {"args": {"a": 1}}, {"other": Namespace(num_attention_heads=4)}]
)
def test_a_run_without_arguments_has_no_heads(layers, content):
    folder = layers(1)
    (folder / "config.json").unlink()
    torch.save(content, folder / RUN)
    assert "no config.json, and no num_attention_heads in" in refusal(folder)


def test_arguments_may_be_a_plain_dict(layers):
    folder = layers(1)
    (folder / "config.json").unlink()
    torch.save({"args": {"num_attention_heads": 4}}, folder / RUN)
    assert read_checkpoint(folder).config.n_head == 4


def test_a_damaged_file_of_arguments_is_named(layers):
    folder = layers(1)
    (folder / "config.json").unlink()
    (folder / RUN).write_bytes(b"nothing")
    assert refusal(folder).startswith(f"{RUN}: neither a zip archive nor a pickle")


def test_names_in_the_arguments_run_nothing(layers, tmp_path):
    folder = layers(1)
    (folder / "config.json").unlink()
    flag = tmp_path / "flag"
    mine = name("os", "system") + b"(" + b"X" + len(f"touch {flag}").to_bytes(4, "little")
    mine += f"touch {flag}".encode() + b"tR"
    archive(folder / RUN, program(mapping(args=mine, x=mine)))
    assert "no num_attention_heads" in refusal(folder)
    archive(folder / RUN, program(mapping(args=mapping(num_attention_heads=number(4)), x=mine)))
    assert read_checkpoint(folder).config.n_head == 4
    assert not flag.exists()


# -- files that are missing or too many ------------------------------------------------------------


def drop(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / file).unlink() for file in names]


def copy(source: str, target: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes())


def both(layer: int) -> list[str]:
    return [layer_file(layer, part) for part in (0, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(layer_file(1, 0)), "no part 00 of layer 01, which others have: download it again"),
        (drop(layer_file(4, 1)), "no part 01 of layer 04, which others have: download it again"),
        (drop(layer_file(6, 1)), "no part 01 of layer 06, which others have"),
        (drop(*both(1)), "no files of layer 01: download them again"),
        (drop(*both(3)), "no files of layer 03: download them again"),
        (drop(*both(6)), "layer files end with 04, expected 01, blocks from 03 and a final norm"),
        (drop(*both(4)), "no files of layer 04: download them again"),
        (drop(*both(1), *both(3), *both(4)), "no files of layer 01"),
        (drop(*both(4), *both(6)), "layer files end with 03, expected 01, blocks from 03"),
        (copy(layer_file(3, 0), layer_file(5, 0)), "unexpected files of layer 05, expected none"),
        (copy(layer_file(3, 0), layer_file(2, 0)), "unexpected files of layer 02, expected none"),
        (copy(layer_file(3, 0), layer_file(0, 0)), "unexpected files of layer 00, expected none"),
        (copy(layer_file(3, 0), layer_file(7, 0)), "no files of layer 05"),
        (copy(layer_file(3, 0), layer_file(99999, 0)), "no files of layer 05"),
        (copy(layer_file(3, 0), layer_file(3, 2)), "no part 02 of layer 01, which others have"),
        (copy(layer_file(3, 0), layer_file(3, 99999)), "no part 02 of layer 01, which others have"),
        (
            copy(layer_file(3, 0), "layer_3-model_00-model_states.pt"),
            "layer_3-model_00-model_states.pt is there twice, in two spellings",
        ),
        (
            copy(layer_file(3, 0), "layer_03-model_0-model_states.pt"),
            "layer_03-model_00-model_states.pt is there twice, in two spellings",
        ),
    ],
    ids=said,
)  # fmt: skip
def test_layer_files_missing_or_too_many_are_named(layers, change, message):
    folder = layers(2)
    change(folder)
    assert refusal(folder).startswith(message)


def test_a_final_norm_that_is_missing_is_noticed(tmp_path):
    """The last of four blocks then stands where the norm is expected."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=4)
    folder = save_megatron(beside(checkpoint, tmp_path / "megatron"), state_of(checkpoint), 1)
    (folder / layer_file(8, 0)).unlink()
    assert refusal(folder) == (
        "unexpected files of layer 05, expected none of it in a model that ends with 06: the last "
        "layer may be missing"
    )


def test_a_folder_that_may_not_be_listed_is_named(layers, monkeypatch):
    def forbidden(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    folder = layers(1)
    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert refusal(folder) == "cannot be listed: Permission denied"


def test_files_of_other_names_are_not_looked_at(layers):
    folder = layers(1)
    others = [
        "layer_03-model_00-optim_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "layer_xx-model_00-model_states.pt", "layer_03-model_00-model_states.pt.tmp",
    ]  # fmt: skip
    for file in others:
        (folder / file).write_bytes(b"nothing that is read")
    assert read_checkpoint(folder).notes == ()


def test_another_number_of_blocks_than_the_config_says_is_named(layers):
    folder = layers(2)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "n_layer": 3}))
    assert refusal(folder) == "layer files of 2 blocks, expected 3 by config.json"


def test_a_vocabulary_larger_than_the_table_is_named(layers):
    folder = layers(2)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 97}))
    expected = "layer 01: word_embeddings.weight is [96, 64], expected [97, 64] by config.json"
    assert refusal(folder) == expected


# -- layer files that do not fit -------------------------------------------------------------------

QKV, UP, NORM = (
    "self_attention.query_key_value.weight", "mlp.dense_h_to_4h.weight", "input_layernorm.weight"
)  # fmt: skip
DENSE, TABLE = "self_attention.dense.weight", "word_embeddings.weight"


def put(key: str, value: Any) -> Edit:
    return lambda tensors: tensors.update({key: value})


def change(key: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({key: edit(tensors[key]).clone()})


@pytest.mark.parametrize(
    ("layer", "part", "edit", "message"),
    [
        (3, 0, lambda t: t.pop(QKV), f"{layer_file(3, 0)}: no {QKV}, which this layer must have: "),
        (3, 1, lambda t: t.pop(NORM), f"{layer_file(3, 1)}: no {NORM}, which this layer must have"),
        (1, 1, lambda t: t.pop(TABLE), f"{layer_file(1, 1)}: no {TABLE}, which this layer must"),
        (6, 0, lambda t: t.pop("bias"), f"{layer_file(6, 0)}: no bias, which this layer must have"),
        (3, 0, put("x", torch.ones(2)), f"{layer_file(3, 0)}: unexpected tensor x in this layer"),
        (6, 0, put(QKV, torch.ones(2)), f"{layer_file(6, 0)}: unexpected tensor {QKV} in this lay"),
        (1, 0, put("weight", torch.ones(2)), f"{layer_file(1, 0)}: unexpected tensor weight in th"),
        (3, 0, put("a\nb", torch.ones(2)), f"{layer_file(3, 0)}: unexpected tensor 'a\\nb' in thi"),
        (3, 0, put(7, torch.ones(2)), f"{layer_file(3, 0)}: unexpected tensor 7 in this layer"),
        (3, 0, put(QKV, None), f"{layer_file(3, 0)}: {QKV} is nothing, no weight: damaged"),
        (3, 0, put(QKV, Namespace()), f"{QKV} is something of argparse.Namespace, no weight"),
        (3, 0, put(QKV, {"a": 1}), f"{layer_file(3, 0)}: {QKV} is a dict, no weight: damaged"),
        (3, 1, change(QKV, lambda w: w[:-1]), f"{layer_file(3, 1)}: {QKV} is F32 [95, 64], but F3"),
        (3, 1, change(QKV, lambda w: w[:, 1:]), f"{QKV} is F32 [96, 63], but F32 [96, 64] in part"),
        (3, 1, change(QKV, lambda w: w.half()), f"{QKV} is F16 [96, 64], but F32 [96, 64] in part"),
        (3, 1, change(NORM, lambda w: w[1:]), f"{NORM} is F32 [63], but F32 [64] in part 00"),
        (3, 1, change(DENSE, lambda w: w.t()), f"{DENSE} is F32 [32, 64], but F32 [64, 32] in pa"),
        (1, 1, change(TABLE, lambda w: w[:40]), f"{TABLE} is F32 [40, 64], but F32 [48, 64] in p"),
        (3, 0, change(QKV, lambda w: w.double()), f"{QKV} is F64, expected a weight of F32, F16"),
        (3, 1, change(QKV, lambda w: w.long()), f"{QKV} is I64, expected a weight of F32, F16"),
    ],
    ids=said,
)  # fmt: skip
def test_a_layer_that_does_not_fit_is_named(layers, layer, part, edit, message):
    assert message in refusal(edited(layers(2), layer, part, edit))


@pytest.mark.parametrize(
    ("layer", "key", "shape", "message"),
    [
        (3, QKV, (97, 64), f"layer 03: {QKV} is [194, 64], expected [192, 64] by config.json"),
        (3, DENSE, (64, 33), f"layer 03: {DENSE} is [64, 66], expected [64, 64] by config.json"),
        (4, UP, (128, 65), f"layer 04: {UP} is [256, 65], expected [256, 64] by config.json"),
        (3, NORM, (63,), f"{layer_file(3, 0)}: {NORM} is [63], expected [64] by config.json"),
        (3, NORM, (8, 8), f"{NORM} has shape [8, 8], expected a vector"),
        (3, NORM, ((1 << 17) + 1,), f"{NORM} has shape [131073], expected a vector"),
        (3, NORM, (0,), f"{NORM} has shape [0], which no weight has"),
        (3, NORM, (), f"{NORM} has shape [], which no weight has"),
        (3, QKV, (0, 64), f"{QKV} has shape [0, 64], which no weight has"),
        (3, DENSE, (64, 0), f"{DENSE} has shape [64, 0], which no weight has"),
        (3, DENSE, (64,), f"{DENSE} has shape [64], which no weight has"),
        (3, DENSE, (4, 8, 8), f"{DENSE} has shape [4, 8, 8], which no weight has"),
        (1, TABLE, (48,), f"{TABLE} has shape [48], which no weight has"),
        (1, TABLE, (48, 32), f"layer 01: {TABLE} is [96, 32], expected [96, 64] by config.json"),
    ],
    ids=said,
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(layers, layer, key, shape, message):
    folder = layers(2)
    for part in (0, 1):
        edited(folder, layer, part, put(key, torch.ones(shape)))
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a zip archive nor a pickle: not a file of torch's"),
        (b"PK\3\4" + bytes(100), "no end of an archive's directory"),
        (b"\x80\2]q\0.", "a pickle, but not of torch's: not a state dict"),
        (program(b"cos\nsystem\n"), "names os.system, which no state dict needs"),
    ],
    ids=said,
)
def test_a_layer_file_of_other_content_is_named(layers, content, message):
    folder = layers(2)
    (folder / layer_file(4, 1)).write_bytes(content)
    assert refusal(folder).startswith(f"{layer_file(4, 1)}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (program(b"]"), "holds a list, expected a layer"),
        (program(tensor()), "holds a tensor, expected a layer"),
        (program(name("os", "system")), "holds something of os.system, expected a layer"),
        (program(mapping(weight=tensor(offset=3))), "weight reaches beyond its storage of 24 byt"),
        (program(b"(o"), "data.pkl: opcode OBJ, which no state dict needs"),
    ],
    ids=said,
)  # fmt: skip
def test_a_layer_archive_of_other_content_is_named(layers, content, message):
    folder = layers(1)
    archive(folder / layer_file(6, 0), content)
    assert refusal(folder).startswith(f"{layer_file(6, 0)}: {message}")


def test_every_truncation_of_a_layer_file_is_named(layers):
    folder = layers(1)
    file = folder / layer_file(6, 0)
    with file.open("r+b", buffering=0) as handle:
        for size in range(file.stat().st_size - 1, -1, -13):
            handle.truncate(size)
            assert refusal(folder).startswith(layer_file(6, 0))


def test_a_missing_tokenizer_is_noted(layers):
    folder = layers(1)
    assert not any("tokenizer" in note for note in read_checkpoint(folder).notes)
    (folder / "tokenizer.json").unlink()
    assert any("no tokenizer.json" in note for note in read_checkpoint(folder).notes)


def test_values_that_are_not_numbers_are_named_by_their_layer(layers, tmp_path):
    folder = edited(layers(2), 4, 1, lambda tensors: tensors[DENSE].fill_(np.nan))
    expected = re.escape(f"{folder}: layer 04: {DENSE} holds NaN or infinity")
    with pytest.raises(NumericError, match=expected):
        convert(folder, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
