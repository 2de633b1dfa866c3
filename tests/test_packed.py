"""A pack as a source: what it computes with goes into another, nothing is lost twice unasked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert, run
from bloomq.converters.packed import pack_tensors
from bloomq.converters.plan import make_plan
from bloomq.converters.reading import read_checkpoint
from conftest import dequantized, edit_manifest, write_checkpoint

from bloomq.config import weight_specs
from bloomq.errors import CheckpointError, NumericError, PackError, UsageError
from bloomq.pack import Pack
from bloomq.schemes import bf16_to_f32, get_scheme

SCHEMES = ("f32", "bf16", "f16", "int8", "int6", "nl4", "int4", "nf4")
FINAL = ("nl4", "int4", "nf4")


@pytest.fixture(scope="module")
def tiny_pack(tmp_path_factory):
    """`tiny_pack("int8")`: a pack of a model whose sizes fill no tile, made once."""
    base = tmp_path_factory.mktemp("tiny")
    write_checkpoint(base / "checkpoint", hidden_size=60, vocab_size=77, n_layer=2)

    def pack(scheme: str, **options: Any) -> Path:
        target = base / "-".join([scheme, *map(str, options.values())])
        if not target.exists():
            convert(base / "checkpoint", target, scheme=scheme, head_scheme=scheme, **options)
        return target

    return pack


def weights_of(pack: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in pack.iterdir() if file.name != "manifest.json"}


def refused(kind: type[Exception], source: Path, target: Path, **options: Any) -> str:
    before = sorted(target.parent.iterdir())
    with pytest.raises(kind) as caught:
        convert(source, target, **options)
    assert type(caught.value) is kind
    assert sorted(target.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the same scheme -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["int4", "int6"])
def test_a_pack_of_several_schemes_keeps_each_unless_one_is_asked_for(tmp_path, first):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    schemes = make_plan(checkpoint, tmp_path / "pack", scheme="int4").schemes
    other = get_scheme({"int4": "int6", "int6": "int4"}[first])
    mixed = {**schemes, "h.0.attn.qkv": get_scheme(first), "h.0.mlp.down": other}
    run(make_plan(checkpoint, tmp_path / "pack", schemes=mixed))
    convert(tmp_path / "pack", tmp_path / "copy")
    assert Pack.open(tmp_path / "copy").schemes == mixed
    assert weights_of(tmp_path / "copy") == weights_of(tmp_path / "pack")
    convert(tmp_path / "pack", tmp_path / "head", head_scheme="int8")
    assert Pack.open(tmp_path / "head").schemes == {**mixed, "wte": get_scheme("int8")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_scheme_is_a_copy(tiny_pack, tmp_path, scheme):
    convert(tiny_pack(scheme), tmp_path / "copy", scheme=scheme, head_scheme=scheme)
    assert weights_of(tmp_path / "copy") == weights_of(tiny_pack(scheme))


@pytest.mark.parametrize("scheme", ["nl4", "int4", "nf4", "int8"])
def test_a_pack_with_the_usual_head_is_copied_by_the_same_options(pack_of, tmp_path, scheme):
    convert(pack_of(scheme), tmp_path / "copy", scheme=scheme)
    assert weights_of(tmp_path / "copy") == weights_of(pack_of(scheme))


def test_copies_are_the_same_in_blocks_of_any_size(tiny_pack, tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 32 * 60 * 4)
    for scheme in ("nl4", "bf16", "int8"):
        convert(tiny_pack(scheme), tmp_path / scheme, scheme=scheme, head_scheme=scheme)
        assert weights_of(tmp_path / scheme) == weights_of(tiny_pack(scheme))


# -- another scheme --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SCHEMES)
@pytest.mark.parametrize("source", [s for s in SCHEMES if s not in FINAL])
def test_weights_are_those_that_the_source_computes_with(tiny_pack, tmp_path, source, target):
    convert(tiny_pack(source), tmp_path / "pack", scheme=target, head_scheme=target)
    restored, found = dequantized(tiny_pack(source)), dequantized(tmp_path / "pack")
    assert found.keys() == restored.keys()
    scheme = get_scheme(target)
    for name, w in restored.items():
        anew = w.ndim == 2 and source != target  # int6 of int6 is not the same
        expected = scheme.dequantize(scheme.quantize(w), w.shape) if anew else w
        assert found[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("source", FINAL)
@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
def test_four_bits_may_become_floats(tiny_pack, tmp_path, source, target):
    convert(tiny_pack(source), tmp_path / "pack", scheme=target)
    restored, found = dequantized(tiny_pack(source)), dequantized(tmp_path / "pack")
    scheme = get_scheme(target)
    for name, w in restored.items():
        expected = scheme.dequantize(scheme.quantize(w), w.shape) if w.ndim == 2 else w
        assert found[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("target", ["int8", "int6", "nl4", "int4", "nf4"])
@pytest.mark.parametrize("source", FINAL)
def test_four_bits_are_not_quantized_anew(tiny_pack, tmp_path, source, target):
    if source == target:
        return
    pack = tiny_pack(source)
    label = {"nl4": "nl4-g64", "int4": "int4-g32", "nf4": "nf4"}
    assert refused(CheckpointError, pack, tmp_path / "pack", scheme=target) == (
        f"{pack}: wte is {label[source]}, which has lost too much for "
        f"{'int6' if target in FINAL else target}: convert the original checkpoint, or export this"
    )


def test_another_group_size_is_another_scheme(tiny_pack, tmp_path):
    pack = tiny_pack("int4", group_size=64)
    message = refused(CheckpointError, pack, tmp_path / "pack", head_scheme="int4")
    assert "wte is int4-g64, which has lost too much for int4-g32" in message
    convert(pack, tmp_path / "pack", group_size=64, head_scheme="int4")
    assert weights_of(tmp_path / "pack") == weights_of(pack)


def test_only_the_matrix_that_lost_much_is_refused(pack_of, tmp_path):
    message = refused(CheckpointError, pack_of("int4"), tmp_path / "pack", scheme="int8")
    assert message.startswith(f"{pack_of('int4')}: h.0.attn.qkv is int4-g32, which has lost")
    convert(pack_of("int4"), tmp_path / "pack", head_scheme="int8")  # the head is int6
    assert Pack.open(tmp_path / "pack").schemes["wte"].name == "int8"


# -- what goes along -------------------------------------------------------------------------------


def test_tokenizer_and_config_go_along(pack_of, demo_checkpoint, tmp_path):
    convert(pack_of("int8"), tmp_path / "pack")
    opened = Pack.open(tmp_path / "pack")
    assert opened.tokenizer_bytes() == (demo_checkpoint / "tokenizer.json").read_bytes()
    assert opened.config == Pack.open(pack_of("int8")).config


def test_settings_and_templates_go_along(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").write_text("{}")
    settings = {"padding_side": "right", "chat_template": "{{ messages }}"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(checkpoint, tmp_path / "first", scheme="int8")
    convert(tmp_path / "first", tmp_path / "second")
    assert Pack.open(tmp_path / "second").tokenizer_settings == read_checkpoint(checkpoint).settings


def test_an_untied_head_goes_along(tmp_path):
    def with_head(tensors):
        dtype, table = tensors["transformer.word_embeddings.weight"]
        tensors["lm_head.weight"] = (dtype, table[::-1].copy())

    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", config={"tie_word_embeddings": False}, edit=with_head
    )
    convert(checkpoint, tmp_path / "first", scheme="int8")
    convert(tmp_path / "first", tmp_path / "second", scheme="int8")
    assert weights_of(tmp_path / "second") == weights_of(tmp_path / "first")
    assert not Pack.open(tmp_path / "second").config.tie_word_embeddings


def test_provenance_names_the_source_and_what_that_was_made_from(pack_of, tmp_path):
    convert(pack_of("int8"), tmp_path / "first", scheme="int6")
    convert(tmp_path / "first", tmp_path / "second", scheme="int4")
    origin = Pack.open(pack_of("int8")).manifest["provenance"]
    first = Pack.open(tmp_path / "first").manifest["provenance"]
    second = Pack.open(tmp_path / "second").manifest["provenance"]
    assert first["format"] == "pack"
    assert first["name"] == "int8"
    assert first["from"] == origin
    assert second["from"] == first
    assert second["scheme"] == "int4-g32"


@pytest.mark.parametrize("given", [None, "text", [1], {}, {"from": 3}, {"note": "x" * 70_000}])
def test_provenance_that_is_strange_or_too_long_is_left_out(tiny_pack, tmp_path, given):
    shutil.copytree(tiny_pack("int8"), tmp_path / "source")
    edit_manifest(tmp_path / "source", lambda manifest: manifest.update(provenance=given))
    convert(tmp_path / "source", tmp_path / "pack")
    provenance = Pack.open(tmp_path / "pack").manifest["provenance"]
    assert provenance.get("from", {}) == {}


def test_a_chain_of_packs_is_cut_after_eight(tiny_pack, tmp_path):
    chain: dict[str, Any] = {"name": "0"}
    for i in range(1, 20):
        chain = {"name": str(i), "from": chain}
    shutil.copytree(tiny_pack("int8"), tmp_path / "source")
    edit_manifest(tmp_path / "source", lambda manifest: manifest.update(provenance=chain))
    one: Any = read_checkpoint(tmp_path / "source").provenance
    names = []
    while "from" in one:
        one = one["from"]
        names.append(one["name"])
    assert names == [str(i) for i in range(19, 11, -1)]


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_rows_are_those_of_the_whole(tiny_pack, scheme):
    pack = Pack.open(tiny_pack(scheme))
    tensors, expected = pack_tensors(pack), dequantized(tiny_pack(scheme))
    assert [spec.name for spec in weight_specs(pack.config) if spec.is_matrix] == list(pack.schemes)
    for name in ("wte", "h.1.mlp.down"):
        tensor = tensors[f"{name}.weight"]
        assert tensor.shape == expected[name].shape
        count = tensor.shape[0]
        for start, stop in ((0, count), (0, 1), (15, 17), (16, 48), (31, 32), (count - 1, count)):
            rows = tensor.rows(start, stop)
            assert rows.flags.c_contiguous
            wide = bf16_to_f32(rows) if tensor.dtype == "BF16" else rows.astype(np.float32)
            assert wide.tobytes() == expected[name][start:stop].tobytes()
    bias = tensors["h.1.mlp.up.bias"]
    assert bias.rows(3, 9).tolist() == expected["h.1.mlp.up.bias"][3:9].tolist()


def test_rows_come_without_the_mapping(tiny_pack, monkeypatch):
    """A pack that another program cuts is an error, not a crash: nothing is read where it is
    mapped."""
    tensors = pack_tensors(Pack.open(tiny_pack("int8")))
    monkeypatch.setattr("bloomq.tensorfile.TensorFile.raw", None)
    assert tensors["wte.weight"].rows(0, 77).shape == (77, 60)


# -- what is refused -------------------------------------------------------------------------------


def test_a_pack_is_not_converted_to_itself(tiny_pack, tmp_path):
    shutil.copytree(tiny_pack("int8"), tmp_path / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "pack")
    (tmp_path / "x").mkdir()
    for target in (tmp_path / "pack", tmp_path / "link", tmp_path / "x" / ".." / "pack"):
        message = refused(UsageError, tmp_path / "pack", target, force=True)
        assert message == f"{target}: is the source itself: choose another name for the target"
    Pack.open(tmp_path / "pack").verify()


def test_a_damaged_pack_is_a_pack_error(tiny_pack, tmp_path):
    shutil.copytree(tiny_pack("int8"), tmp_path / "source")
    manifest = tmp_path / "source" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("int8", "int6", 1))
    message = refused(PackError, tmp_path / "source", tmp_path / "pack")
    assert "does not match its own checksum" in message


@pytest.mark.parametrize("target", ["int8", "f32"])
def test_a_scale_that_is_no_number_is_refused(tiny_pack, tmp_path, target):
    source = tmp_path / "source"
    shutil.copytree(tiny_pack("int8"), source)
    opened = Pack.open(source)
    file, entry = opened.place("h.0.mlp.up.scales")
    with file.path.open("r+b") as raw:
        raw.seek(entry.start)
        raw.write(np.array([np.nan], np.float32).tobytes())
    message = refused(NumericError, source, tmp_path / "pack", scheme=target, head_scheme=target)
    if target == "int8":
        assert message == f"{source}: h.0.mlp.up has a scale that is no number: damaged"
    else:
        assert message == (
            f"{source}: h.0.mlp.up holds NaN or infinity in row 0: the checkpoint is damaged"
        )


def test_a_file_that_shrinks_under_a_reader_has_changed(tiny_pack, tmp_path):
    shutil.copytree(tiny_pack("int4"), tmp_path / "source")
    tensors = pack_tensors(Pack.open(tmp_path / "source"))
    (file,) = (tmp_path / "source").glob("*.safetensors")
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shorter than the \d+ bytes it had: it changed"):
        tensors["wte.weight"].rows(0, 32)


def test_a_tensor_says_where_it_lies(tiny_pack):
    tensors = read_checkpoint(tiny_pack("int8")).tensors
    assert tensors["ln_f.bias"].name == f"{tiny_pack('int8')}: ln_f.bias"
    assert tensors["wte.weight"].name == f"{tiny_pack('int8')}: wte"
