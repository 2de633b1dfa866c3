"""Packs: the bytes on disk, and every way in which a pack can be damaged, forged or newer."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert
from conftest import NEEDS_PROC, edit_manifest, open_below, write_checkpoint, write_safetensors

from bloomq import pack_writer, taken_folder, weight_files
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import InputNotFound, OutputError, PackError
from bloomq.pack import Pack, manifest_checksum, stored_arrays
from bloomq.pack_writer import writing_pack
from bloomq.schemes import get_scheme
from bloomq.tensorfile import TensorFile
from bloomq.tokenizer_config import Settings

SHARD = "weights-00001-of-00001.safetensors"
AGAIN = ": copy it again, or convert again"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 pack of one layer, hidden 64, 70 tokens, untied, with a (sham) tokenizer.json."""
    folder = tmp_path_factory.mktemp("tiny")

    def untie(tensors):
        dtype, table = tensors["transformer.word_embeddings.weight"]
        tensors["lm_head.weight"] = (dtype, table[::-1].copy())

    checkpoint = write_checkpoint(folder / "checkpoint", vocab_size=70, edit=untie)
    (checkpoint / "tokenizer.json").write_bytes(b'{"sham": true}')
    convert(checkpoint, folder / "pack", scheme="int8", head_scheme="int4")
    return folder / "pack"


@pytest.fixture
def pack(tiny_pack: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_pack, tmp_path / "pack"))


def refusal(path: Path, step: Callable[[Pack], Any] = lambda opened: None) -> str:
    """The one-line message with which opening the pack, or `step` after it, fails; the pack's own
    path, with which it must begin, is cut off."""
    with pytest.raises(PackError) as caught:
        step(Pack.open(path))
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).removeprefix("/")


# -- the bytes -------------------------------------------------------------------------------------


def test_pack_of_one_small_model_written_by_hand(tmp_path):
    """The whole shard, byte for byte: vocabulary 1, hidden 1, f32."""
    config = BloomConfig(
        hidden_size=1, n_layer=1, n_head=1, vocab_size=1, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, unk_token_id=0,
    )  # fmt: skip
    f32 = get_scheme("f32")
    specs = weight_specs(config)
    schemes = {spec.name: f32 for spec in specs if spec.is_matrix}
    with writing_pack(tmp_path / "pack", config, schemes) as writer:
        for number, spec in enumerate(specs, 1):
            for key, part in stored_arrays(spec, schemes.get(spec.name)).items():
                writer.write(key, np.full(part.shape, number, np.float32))
        writer.finish(b"{}", {"by": "hand"})
    data = (tmp_path / "pack" / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    matrix, vector = 2 * 64 * 16 * 4, 32 * 4  # one column padded to 64, one row padded to 32
    expected, at, values = {}, 0, b""
    for number, (key, size) in enumerate(
        [
            ("wte.values", matrix),
            ("emb_ln", vector),
            ("h.0.ln_1", vector),
            ("h.0.attn.qkv", matrix),
            ("h.0.attn.out", matrix),
            ("h.0.ln_2", vector),
            ("h.0.mlp.up", matrix),
            ("h.0.mlp.down", matrix),
            ("ln_f", vector),
        ],
        1,
    ):
        if number == 1:
            keys = [(key, size, [2, 64, 16])]
        elif size == matrix:
            keys = [(f"{key}.values", matrix, [2, 64, 16]), (f"{key}.bias", vector, [32])]
        else:
            keys = [(f"{key}.weight", vector, [32]), (f"{key}.bias", vector, [32])]
        for name, nbytes, shape in keys:
            offsets = [at, at + nbytes]
            expected[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            values += np.full(nbytes // 4, number, "<f4").tobytes()
            at += nbytes
    text = json.dumps(expected, separators=(",", ":")).encode()
    assert header.rstrip(b" ") == text
    assert (8 + length) % 64 == 0
    assert len(header) - len(text) < 64
    assert data[8 + length :] == values
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert (tmp_path / "pack" / "tokenizer.json").read_bytes() == b"{}"
    assert manifest["format"] == "bloomq-pack"
    assert manifest["version"] == 1
    assert manifest["config"] == config.to_dict()
    assert manifest["weights"]["wte"] == {"shape": [1, 1], "scheme": "f32"}
    assert manifest["weights"]["ln_f"] == {"shape": [1]}
    assert manifest["provenance"] == {"by": "hand"}
    assert manifest["files"]["tokenizer.json"] == {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    entry = manifest["files"][SHARD]
    assert entry["bytes"] == len(data)
    assert entry["arrays"]["ln_f.bias"] == hashlib.sha256(values[-128:]).hexdigest()


def test_manifest_checksum_is_of_the_sorted_compact_json():
    manifest = {"b": [1, "é"], "a": None, "checksum": "ignored"}
    text = b'{"a":null,"b":[1,"\\u00e9"]}'
    assert manifest_checksum(manifest) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("scheme", ["int8", "nl4", "int4", "nf4", "f32", "bf16", "f16"])
def test_every_array_is_aligned_and_there_are_no_holes(pack_of, scheme):
    path = pack_of(scheme)
    for shard in path.glob("*.safetensors"):
        file = TensorFile.open(shard)
        end = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        for entry in sorted(file.entries.values(), key=lambda entry: entry.start):
            assert entry.start % 64 == 0
            assert entry.start == end
            end += entry.nbytes
        assert end == file.size


def test_mapped_arrays_are_aligned_in_memory(pack_of):
    opened = Pack.open(pack_of("int4"))
    for spec in weight_specs(opened.config):
        for key in stored_arrays(spec, opened.schemes.get(spec.name)):
            assert opened.array(key).ctypes.data % 64 == 0, key


def test_two_conversions_give_identical_bytes(pack_of, demo_checkpoint, tmp_path):
    first = pack_of("int4")
    convert(demo_checkpoint, tmp_path / "again", scheme="int4", threads=1)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["manifest.json", "tokenizer.json", SHARD]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name


def test_shards_are_cut_at_layer_boundaries(demo_checkpoint, pack_of, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 400_000)
    convert(demo_checkpoint, tmp_path / "pack", scheme="int4")
    shards = sorted(path.name for path in tmp_path.glob("pack/*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"weights-00001-of-{len(shards):05d}.safetensors"
    layer_of = {}
    for shard in shards:
        for key in TensorFile.open(tmp_path / "pack" / shard).entries:
            layer = ".".join(key.split(".")[:2]) if key.startswith("h.") else key
            assert layer_of.setdefault(layer, shard) == shard, key
    many, one = Pack.open(tmp_path / "pack"), Pack.open(pack_of("int4"))
    many.verify()
    for spec in weight_specs(one.config):
        for key in stored_arrays(spec, one.schemes.get(spec.name)):
            assert many.array(key).tobytes() == one.array(key).tobytes(), key


# -- what an open pack says ------------------------------------------------------------------------


def test_pack_says_what_it_holds(tiny_pack):
    opened = Pack.open(tiny_pack)
    c, v = 64, 70
    layer = 12 * c * c + 13 * c
    assert opened.parameters == 2 * v * c + layer + 4 * c
    int4_table = 96 * 64 // 2 + 96 * 2 * 2  # 70 rows padded to 96, two groups of 32
    int8_row = 128 + 4  # 64 columns padded to 128
    rows = 3 * c + c + 4 * c
    linears = rows * int8_row + c * (256 + 4) + (rows + c) * 4
    assert opened.nbytes == 2 * int4_table + linears + 8 * c * 4
    assert opened.bytes_per_token == opened.nbytes - int4_table
    assert opened.bits_per_weight == 8 * opened.nbytes / opened.parameters
    assert opened.schemes["lm_head"].label == "int4-g32"
    assert opened.schemes["h.0.mlp.up"].label == "int8"
    assert opened.tokenizer_bytes() == b'{"sham": true}'


def test_tied_head_is_the_embedding(pack_of):
    opened = Pack.open(pack_of("int8"))
    assert opened.matrix("lm_head").parts["codes"] is not None
    assert opened.matrix("lm_head").name == "wte"
    assert opened.bytes_per_token == opened.nbytes


def test_norm_and_vector_come_without_padding(pack_of):
    opened = Pack.open(pack_of("int8"))
    assert opened.norm("ln_f").gain.shape == (256,)
    assert opened.vector("h.0.mlp.up.bias", 1000).shape == (1000,)


def test_matrix_gives_rows_without_padding(tiny_pack):
    table = Pack.open(tiny_pack).matrix("wte")
    ids = np.array([69, 0, 0, 17])
    np.testing.assert_array_equal(table.rows(ids), table.dequantize()[ids])
    assert table.rows(ids).shape == (4, 64)
    assert table.nbytes == sum(part.nbytes for part in table.parts.values())


def test_verify_passes_a_whole_pack_and_counts_its_bytes(tiny_pack):
    seen: list[int] = []
    opened = Pack.open(tiny_pack)
    opened.verify(seen.append)
    assert sum(seen) == opened.nbytes


def test_manifest_with_its_keys_in_another_order_is_the_same(pack):
    manifest = json.loads((pack / "manifest.json").read_text())
    (pack / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))
    assert Pack.open(pack).config.vocab_size == 70


# -- not a pack ------------------------------------------------------------------------------------


def test_absent_pack_is_named(tmp_path):
    with pytest.raises(InputNotFound) as caught:
        Pack.open(tmp_path / "none")
    expected = f"{tmp_path / 'none'}: no such pack: make one with 'bloomq convert'"
    assert str(caught.value) == expected


def test_file_in_place_of_a_pack_is_named(pack):
    assert refusal(pack / SHARD) == ": is a file, expected the folder of a pack"


def test_folder_without_manifest_is_no_pack(tmp_path, demo_checkpoint):
    expected = ": no manifest.json: not a pack (a checkpoint becomes one by 'bloomq convert')"
    assert refusal(tmp_path) == expected
    assert refusal(demo_checkpoint) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json: not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"format": "bloomq-pack"', "manifest.json: not valid JSON (Expecting ',' delimiter"),
        (pickle.dumps({}), "manifest.json: not valid JSON ("),
        (b"[" * 100_000, "manifest.json: not valid JSON (maximum recursion depth"),
        (b"[]", "manifest.json: not the manifest of a bloomq pack"),
        (b"null", "manifest.json: not the manifest of a bloomq pack"),
        (b'"bloomq-pack"', "manifest.json: not the manifest of a bloomq pack"),
        (b"{}", "manifest.json: not the manifest of a bloomq pack"),
        (b'{"format": "gguf", "version": 1}', "manifest.json: not the manifest of a bloomq pack"),
        (b'{"format": "bloomq-pack"}', "manifest.json: version is None, expected 1"),
    ],
)
def test_manifest_that_is_none_is_named(pack, content, message):
    (pack / "manifest.json").write_bytes(content)
    assert refusal(pack).startswith(message)


def test_folder_in_place_of_the_manifest_is_named(pack):
    (pack / "manifest.json").unlink()
    (pack / "manifest.json").mkdir()
    assert refusal(pack) == "manifest.json: cannot be read: Is a directory: convert again"


def test_every_depth_of_nesting_in_a_manifest_is_refused(pack):
    for depth in range(900, 1005):
        nested = "[" * depth + "]" * depth
        (pack / "manifest.json").write_text(
            f'{{"format": "bloomq-pack", "version": 1, "config": {nested}}}'
        )
        assert refusal(pack).startswith("manifest.json: ")


# -- damage to the manifest ------------------------------------------------------------------------


def test_newer_version_says_so(pack):
    edit_manifest(pack, lambda m: m.update(version=2))
    assert refusal(pack) == (
        "manifest.json: format version 2, this bloomq reads up to 1: upgrade bloomq, or convert "
        "with this one"
    )


def test_newer_version_says_so_even_when_nothing_else_is_known(pack):
    (pack / "manifest.json").write_text('{"format": "bloomq-pack", "version": 99}')
    assert "format version 99, this bloomq reads up to 1" in refusal(pack)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, None, [1]])
def test_impossible_version_is_named(pack, version):
    edit_manifest(pack, lambda m: m.update(version=version))
    assert refusal(pack) == f"manifest.json: version is {version!r}, expected 1"


def test_changed_manifest_does_not_match_its_checksum(pack):
    text = (pack / "manifest.json").read_text()
    (pack / "manifest.json").write_text(text.replace('"n_head": 4', '"n_head": 8'))
    message = "manifest.json: does not match its own checksum: damaged, convert again"
    assert refusal(pack) == message
    edit_manifest(pack, lambda m: None)
    manifest = json.loads((pack / "manifest.json").read_text())
    del manifest["checksum"]
    (pack / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(pack) == message


def test_every_changed_byte_of_the_manifest_is_refused_or_harmless(pack):
    """Every 13th byte with one bit flipped: refused, or (in white space) the same manifest."""
    path = pack / "manifest.json"
    whole = path.read_bytes()
    before = json.loads(whole)
    refused = 0
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            same = json.loads(path.read_bytes()) == before
        except ValueError:
            same = False
        if same:
            assert Pack.open(pack).manifest == before
        else:
            assert refusal(pack).startswith("manifest.json: ")
            refused += 1
    assert refused > 50


def weight(name: str, value: Any) -> Edit:
    return lambda m: m["weights"].update({name: value})


def shard_field(field: str, value: Any) -> Edit:
    return lambda m: m["files"][SHARD].update({field: value})


def renamed(name: str) -> Edit:
    return lambda m: m["files"].update({name: m["files"].pop(SHARD)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("config"), "manifest.json: no config: convert again"),
        (lambda m: m.update(weights=[]), "manifest.json: no weights: convert again"),
        (lambda m: m.update(files=None), "manifest.json: no files: convert again"),
        (
            lambda m: m["config"].update(n_head=7),
            "manifest.json: config: hidden_size 64 is not a multiple of n_head 7",
        ),
        (
            lambda m: m["config"].update(n_layer=1 << 60),
            "manifest.json: config: n_layer is 1152921504606846976, expected a whole number",
        ),
        (
            lambda m: m["config"].update(vocab_size=-70),
            "manifest.json: config: vocab_size is -70, expected a whole number",
        ),
        (
            lambda m: m["config"].update(hidden_size=[64]),
            "manifest.json: config: hidden_size is [64], expected a whole number",
        ),
        (
            lambda m: m["config"].update(layer_norm_epsilon=float("nan")),
            "manifest.json: config: layer_norm_epsilon is nan, expected a number in (0, 1)",
        ),
        (
            lambda m: m["config"].update(n_layer=2),
            "manifest.json: weights has no h.1.ln_1: convert again",
        ),
        (weight("wte", None), "manifest.json: weights has no wte: convert again"),
        (weight("wte", [1]), "manifest.json: weights has no wte: convert again"),
        (weight("wte", {}), "manifest.json: wte: unknown scheme 'None', expected one of"),
        (
            weight("wte", {"scheme": "int4", "group_size": 64, "shape": [70, 63]}),
            "manifest.json: wte has shape [70, 63], expected [70, 64] by the config: convert again",
        ),
        (
            weight("wte", {"scheme": "int4", "group_size": 64}),
            "manifest.json: wte has shape None, expected [70, 64] by the config: convert again",
        ),
        (
            weight("ln_f", {"shape": "64"}),
            "manifest.json: ln_f has shape '64', expected [64] by the config: convert again",
        ),
        (weight("wte", {"scheme": "q5"}), "manifest.json: wte: unknown scheme 'q5', expected one"),
        (weight("wte", {"scheme": ["f32"]}), "manifest.json: wte: unknown scheme \"['f32']\""),
        (
            weight("wte", {"scheme": "int4", "group_size": 48}),
            "manifest.json: wte: group size 48, expected one of (32, 64, 128)",
        ),
        (
            weight("wte", {"scheme": "int4", "group_size": -64}),
            "manifest.json: wte: group size -64, expected one of (32, 64, 128)",
        ),
        (
            weight("wte", {"scheme": "int4", "group_size": [64]}),
            "manifest.json: wte: group size [64], expected one of (32, 64, 128)",
        ),
        (
            weight("wte", {"scheme": "int8", "group_size": 64}),
            "manifest.json: wte: scheme int8 has no group size to choose: drop it, or use nl4 or "
            "int4",
        ),
        (
            weight("wte", {"shape": [70, 64], "scheme": "int4", "group_size": 64}),
            f"{SHARD}: wte.scales is F16 [6, 2, 16], expected F16 [6, 1, 16]: convert again",
        ),
        (
            weight("wte", {"shape": [70, 64], "scheme": "int8"}),
            f"{SHARD}: wte.codes is U8 [6, 8, 16, 4], expected I8 [6, 32, 16, 4]: convert again",
        ),
        (
            weight("wte", {"shape": [70, 64], "scheme": "f32"}),
            ": no array wte.values: the pack is incomplete, convert again",
        ),
        (
            lambda m: m["config"].update(vocab_size=150),
            "manifest.json: wte has shape [70, 64], expected [150, 64] by the config: convert",
        ),
        (renamed("../weights.safetensors"), "manifest.json: '../weights.safetensors' is not the"),
        (renamed(f"../pack/{SHARD}"), f"manifest.json: '../pack/{SHARD}' is not the name of"),
        (renamed("/etc/passwd"), "manifest.json: '/etc/passwd' is not the name of a shard"),
        (renamed(f"{SHARD}\n"), f"manifest.json: '{SHARD}\\n' is not the name of a shard"),
        (renamed("..\\x.safetensors"), "manifest.json: '..\\\\x.safetensors' is not the name of"),
        (renamed("manifest.json"), "manifest.json: 'manifest.json' is not the name of a shard"),
        (renamed(""), "manifest.json: '' is not the name of a shard"),
        (
            renamed("weights-00002-of-00002.safetensors"),
            "weights-00002-of-00002.safetensors: missing" + AGAIN,
        ),
        (lambda m: m["files"].clear(), ": no array wte.codes: the pack is incomplete"),
        (
            lambda m: m["files"].update({SHARD: None}),
            f"manifest.json: files: {SHARD} has no arrays: convert again",
        ),
        (
            shard_field("arrays", ["wte.codes"]),
            f"manifest.json: files: {SHARD} has no arrays: convert again",
        ),
        (
            shard_field("bytes", "123"),
            f"manifest.json: files: {SHARD} has no bytes: convert again",
        ),
        (shard_field("bytes", -1), f"{SHARD}: SIZE bytes, expected -1{AGAIN}"),
        (
            lambda m: m["files"][SHARD]["arrays"].pop("ln_f.bias"),
            f"{SHARD}: its arrays are not those of the manifest: convert again",
        ),
        (
            lambda m: m["files"][SHARD]["arrays"].update({"more": "00"}),
            f"{SHARD}: its arrays are not those of the manifest: convert again",
        ),
        (
            lambda m: m["files"]["tokenizer.json"].pop("sha256"),
            "manifest.json: files: tokenizer.json has no sha256: convert again",
        ),
        (
            lambda m: m["files"]["tokenizer.json"].update(bytes=None),
            "manifest.json: files: tokenizer.json has no bytes: convert again",
        ),
        (
            lambda m: m["files"].update({"tokenizer.json": []}),
            "manifest.json: files: tokenizer.json has no sha256: convert again",
        ),
    ],
)
def test_forged_manifest_is_refused_by_field(pack, edit, message):
    edit_manifest(pack, edit)
    size = (pack / SHARD).stat().st_size
    assert refusal(pack).startswith(message.replace("SIZE", str(size)))


# -- damage to the shards --------------------------------------------------------------------------


def rewritten(
    pack: Path,
    change: Callable[[dict[str, tuple[str, np.ndarray]]], Any],
    *,
    aligned: bool = True,
) -> None:
    """Change the shard's arrays, and make size and checksums of the manifest fit again."""
    file = TensorFile.open(pack / SHARD)
    arrays = {k: (e.dtype, np.array(file.array(k))) for k, e in file.entries.items()}
    change(arrays)
    write_safetensors(pack / SHARD, arrays, aligned=aligned)

    def seal(manifest: dict[str, Any]) -> None:
        digests = {k: hashlib.sha256(a.tobytes()).hexdigest() for k, (_, a) in arrays.items()}
        size = (pack / SHARD).stat().st_size
        manifest["files"][SHARD] = {"bytes": size, "arrays": digests}

    edit_manifest(pack, seal)


def test_missing_shard_is_named(pack):
    (pack / SHARD).unlink()
    assert refusal(pack) == f"{SHARD}: missing: copy it again, or convert again"


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -64, -1])
def test_truncated_shard_is_named(pack, keep):
    data = (pack / SHARD).read_bytes()
    (pack / SHARD).write_bytes(data[:keep])
    found = refusal(pack)
    assert found.startswith(f"{SHARD}: ")
    assert found.endswith(AGAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes: not a safetensors file"),
        (b"\xff" * 64, "damaged or truncated ("),
        (b"\0" * 64, "damaged or truncated ("),
        (pickle.dumps(list(range(100))), "is a PyTorch pickle, which bloomq never opens"),
    ],
)
def test_other_content_in_place_of_a_shard_is_named(pack, content, message):
    (pack / SHARD).write_bytes(content)
    found = refusal(pack)
    assert found.startswith(f"{SHARD}: {message}")
    assert found.endswith(AGAIN)


def test_folder_in_place_of_a_shard_is_named(pack):
    (pack / SHARD).unlink()
    (pack / SHARD).mkdir()
    assert refusal(pack) == f"{SHARD}: is not a regular file{AGAIN}"


def test_longer_header_of_the_same_arrays_is_a_wrong_size(pack):
    data = (pack / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = (length + 64).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 64
    (pack / SHARD).write_bytes(longer + data[8 + length :])
    expected = f"{len(data) + 64} bytes, expected {len(data)}: copy it again, or convert again"
    assert refusal(pack) == f"{SHARD}: {expected}"


def test_missing_array_is_named(pack):
    rewritten(pack, lambda arrays: arrays.pop("h.0.attn.qkv.bias"))
    assert refusal(pack) == (": no array h.0.attn.qkv.bias: the pack is incomplete, convert again")


@pytest.mark.parametrize(
    ("key", "dtype", "shape", "message"),
    [
        ("ln_f.bias", "F32", (96,), "ln_f.bias is F32 [96], expected F32 [64]"),
        ("ln_f.bias", "F32", (64, 1), "ln_f.bias is F32 [64, 1], expected F32 [64]"),
        ("ln_f.bias", "I32", (64,), "ln_f.bias is I32 [64], expected F32 [64]"),
        ("ln_f.bias", "F32", (0,), "ln_f.bias is F32 [0], expected F32 [64]"),
        ("wte.scales", "BF16", (6, 2, 16), "wte.scales is BF16 [6, 2, 16], expected F16 [6, 2"),
        ("wte.codes", "U8", (6, 16, 8, 4), "wte.codes is U8 [6, 16, 8, 4], expected U8 [6, 8, 16"),
        ("h.0.attn.out.scales", "F64", (64,), "h.0.attn.out.scales is F64 [64], expected F32 [64"),
    ],
)
def test_array_of_wrong_dtype_or_shape_is_named(pack, key, dtype, shape, message):
    kinds = {"F32": "f4", "I32": "i4", "BF16": "u2", "U8": "u1", "F64": "f8"}
    rewritten(pack, lambda arrays: arrays.update({key: (dtype, np.zeros(shape, kinds[dtype]))}))
    found = refusal(pack)
    assert found.startswith(f"{SHARD}: {message}")
    assert found.endswith(": convert again")


def test_dtype_that_no_pack_has_is_named(pack):
    data = (pack / SHARD).read_bytes()
    (pack / SHARD).write_bytes(data.replace(b'"U8"', b'"F4"', 1))
    assert refusal(pack).startswith(f"{SHARD}: ")


def test_arrays_swapped_between_names_are_found_by_verify(pack):
    data = (pack / SHARD).read_bytes()
    swapped = data.replace(b"h.0.ln_1.bias", b"h.0.ln_X.bias")
    swapped = swapped.replace(b"h.0.ln_2.bias", b"h.0.ln_1.bias")
    (pack / SHARD).write_bytes(swapped.replace(b"h.0.ln_X.bias", b"h.0.ln_2.bias"))
    # both are zeros but for the noise of the random checkpoint
    assert "array h.0.ln_1.bias does not match its checksum" in refusal(pack, Pack.verify)


def test_verify_names_the_array_of_a_flipped_bit(pack):
    whole = (pack / SHARD).read_bytes()
    entries = TensorFile.open(pack / SHARD).entries
    rng = np.random.default_rng(0)
    for key, entry in entries.items():
        for at in (entry.start, entry.start + entry.nbytes - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(rng.integers(8))
            (pack / SHARD).write_bytes(damaged)
            assert refusal(pack, Pack.verify) == (
                f"{SHARD}: array {key} does not match its checksum: damaged, copy it again or "
                "convert again"
            )
    (pack / SHARD).write_bytes(whole)
    Pack.open(pack).verify()


@pytest.mark.parametrize("digest", [None, 5, "", "00" * 32])
def test_impossible_checksum_matches_nothing(pack, digest):
    edit_manifest(pack, lambda m: m["files"][SHARD]["arrays"].update({"ln_f.bias": digest}))
    assert "array ln_f.bias does not match its checksum" in refusal(pack, Pack.verify)


# -- damage to the tokenizer -----------------------------------------------------------------------


def test_missing_tokenizer_is_named(pack):
    (pack / "tokenizer.json").unlink()
    assert refusal(pack, Pack.tokenizer_bytes) == f"tokenizer.json: missing{AGAIN}"


def test_tokenizer_of_another_size_is_named(pack):
    (pack / "tokenizer.json").write_bytes(b"{}")
    expected = f"tokenizer.json: 2 bytes, expected 14{AGAIN}"
    assert refusal(pack, Pack.tokenizer_bytes) == expected
    assert refusal(pack, Pack.verify) == expected


def test_folder_in_place_of_the_tokenizer_is_named(pack):
    (pack / "tokenizer.json").unlink()
    (pack / "tokenizer.json").mkdir()
    found = refusal(pack, Pack.tokenizer_bytes)
    assert found == "tokenizer.json: cannot be read: Is a directory"


def test_verify_finds_a_changed_tokenizer(pack):
    (pack / "tokenizer.json").write_bytes(b'{"sham": TRUE}')
    assert refusal(pack, Pack.verify) == (
        "tokenizer.json: does not match its checksum: damaged, copy it again or convert again"
    )


def test_pack_without_tokenizer_opens(pack):
    edit_manifest(pack, lambda m: m["files"].pop("tokenizer.json"))
    assert Pack.open(pack).tokenizer_bytes() is None
    assert not Pack.open(pack).has_tokenizer


def test_absent_settings_are_blooms(pack):
    assert "tokenizer" not in json.loads((pack / "manifest.json").read_text())
    assert Pack.open(pack).tokenizer_settings == Settings()
    edit_manifest(pack, lambda m: m.update(tokenizer={}))
    assert Pack.open(pack).tokenizer_settings == Settings()


def test_settings_are_read_and_those_left_out_are_blooms(pack):
    edit_manifest(pack, lambda m: m.update(tokenizer={"pad_token": "</s>", "unk_token": "é"}))
    special = {"unk_token": "é", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert Pack.open(pack).tokenizer_settings == Settings("left", special)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "a NoneType, expected settings by name"),
        (["right"], "a list, expected settings by name"),
        ({"padding_side": "top"}, "padding_side is 'top', neither 'left' nor 'right'"),
        ({"padding_side": ["left"]}, "padding_side is ['left'], expected a string"),
        ({"padding_side": None}, "padding_side is None, expected a string"),
        ({"pad_token": 3}, "pad_token is 3, expected a string"),
        ({"eos_token": {"content": "x"}}, "eos_token is {'content': 'x'}, expected a string"),
        ({"bos_token": "\udc80"}, "bos_token '\\udc80' holds half a surrogate pair: no text"),
        ({"add_prefix_space": "no"}, "add_prefix_space is a setting that this tokenizer has not"),
        ({"a\nb": "no"}, r"'a\nb' is a setting that this tokenizer has not"),
    ],
)
def test_forged_settings_are_refused(pack, settings, message):
    edit_manifest(pack, lambda m: m.update(tokenizer=settings))
    assert refusal(pack) == f"manifest.json: tokenizer: {message}"


def test_changed_settings_do_not_match_the_checksum(pack):
    edit_manifest(pack, lambda m: m.update(tokenizer={"pad_token": "</s>"}))
    text = (pack / "manifest.json").read_text()
    (pack / "manifest.json").write_text(text.replace('"pad_token": "</s>"', '"pad_token": "<s>"'))
    assert "does not match its own checksum" in refusal(pack)


# -- writing ---------------------------------------------------------------------------------------

CONFIG = BloomConfig(hidden_size=4, n_layer=1, n_head=1, vocab_size=8)
F32_SCHEMES = {s.name: get_scheme("f32") for s in weight_specs(CONFIG) if s.is_matrix}


def write_zeros(target: Path, **options: Any) -> None:
    with writing_pack(target, CONFIG, F32_SCHEMES, **options) as writer:
        for spec in weight_specs(CONFIG):
            for key, part in stored_arrays(spec, F32_SCHEMES.get(spec.name)).items():
                writer.write(key, np.zeros(part.shape, np.float32))
        writer.finish(None, {})


def test_forgotten_array_never_becomes_a_pack(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"wte\.values was not written whole"),
        writing_pack(tmp_path / "pack", CONFIG, F32_SCHEMES) as writer,
    ):
        writer.finish(None, {})
    assert list(tmp_path.iterdir()) == []


def test_existing_pack_is_replaced_only_by_force(tmp_path):
    write_zeros(tmp_path / "pack")
    with pytest.raises(OutputError) as caught:
        write_zeros(tmp_path / "pack")
    assert str(caught.value) == f"{tmp_path / 'pack'}: already exists: --force replaces a pack"
    (tmp_path / "pack" / "old").write_text("")
    write_zeros(tmp_path / "pack", force=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "pack", SHARD]


def test_force_replaces_nothing_but_a_pack(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(OutputError) as caught:
        write_zeros(tmp_path / "photos", force=True)
    expected = f"{tmp_path / 'photos'}: already exists: choose another name"
    assert str(caught.value) == expected
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "pack").mkdir()
    write_zeros(tmp_path / "pack")
    Pack.open(tmp_path / "pack").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_leftovers_of_a_killed_run_are_taken_over(tmp_path):
    partial = tmp_path / ".pack.partial"
    (partial / "folder").mkdir(parents=True)
    (partial / "folder" / "file").write_text("x")
    (partial / "weights-00001-of-00009.safetensors").write_bytes(bytes(100))
    write_zeros(tmp_path / "pack")
    Pack.open(tmp_path / "pack").verify()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["manifest.json", "pack", SHARD]


# -- what is in the way ----------------------------------------------------------------------------


def output_error(target: Path, **options: Any) -> str:
    """The message with which writing to `target` is refused, without the target's path."""
    with pytest.raises(OutputError) as caught:
        write_zeros(target, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{target}: ")


def test_link_in_place_of_the_hidden_folder_is_refused_and_not_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    partial = tmp_path / ".pack.partial"
    for points_to in ("photos", "nowhere"):
        partial.symlink_to(points_to)
        assert output_error(tmp_path / "pack") == f"{partial} is a link: remove it"
        assert partial.is_symlink()
        partial.unlink()
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_file_in_place_of_the_hidden_folder_is_refused_and_kept(tmp_path):
    (tmp_path / ".pack.partial").write_text("mine")
    assert output_error(tmp_path / "pack") == "cannot be written: File exists"
    assert (tmp_path / ".pack.partial").read_text() == "mine"


def in_the_way(old: Path, kind: str) -> None:
    if kind == "folder":
        old.mkdir()
        (old / "cat.jpg").write_text("meow")
    elif kind == "file":
        old.write_text("meow")
    else:
        old.symlink_to("pack" if kind == "link" else "nowhere")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
@pytest.mark.parametrize("replaces", [True, False], ids=["replacing", "new"])
def test_what_is_no_pack_is_not_deleted_where_the_old_one_would_go(tmp_path, kind, replaces):
    if replaces:
        write_zeros(tmp_path / "pack")
        (tmp_path / "pack" / "old").write_text("")
    old = tmp_path / ".pack.old"
    in_the_way(old, kind)
    expected = f"{old} is in the way: move it elsewhere"
    assert output_error(tmp_path / "pack", force=True) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [".pack.old"] + ["pack"] * replaces
    assert not replaces or (tmp_path / "pack" / "old").exists()
    if kind == "folder":
        assert (old / "cat.jpg").read_text() == "meow"
    elif kind == "file":
        assert old.read_text() == "meow"
    else:
        assert old.is_symlink()


@pytest.mark.parametrize("empty", [True, False])
def test_old_pack_of_a_killed_run_is_deleted(tmp_path, empty):
    if empty:
        (tmp_path / ".pack.old").mkdir()
    else:
        write_zeros(tmp_path / ".pack.old")
    write_zeros(tmp_path / "pack")
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_old_pack_loses_its_manifest_last(tmp_path, monkeypatch):
    """Without it, what a kill leaves is no pack, and in every later run's way."""
    write_zeros(tmp_path / "pack")
    scandir, unlink, gone = os.scandir, os.unlink, []

    def manifest_first(path: Any) -> Any:
        with scandir(path) as entries:
            return nullcontext(sorted(entries, key=lambda entry: entry.name != "manifest.json"))

    def recorded(path: Any, **options: Any) -> None:
        gone.append(Path(path).name)
        unlink(path, **options)

    monkeypatch.setattr(os, "scandir", manifest_first)
    monkeypatch.setattr(os, "unlink", recorded)
    write_zeros(tmp_path / "pack", force=True)
    assert gone == [SHARD, "manifest.json"]


@pytest.mark.parametrize("replaces", [True, False], ids=["replacing", "new"])
def test_pack_that_cannot_become_visible_leaves_the_old_one(tmp_path, monkeypatch, replaces):
    if replaces:
        write_zeros(tmp_path / "pack")
        (tmp_path / "pack" / "old").write_text("")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".pack.partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    found = output_error(tmp_path / "pack", force=True)
    assert found == "cannot be written: Input/output error"
    assert [p.name for p in tmp_path.iterdir()] == ["pack"] * replaces
    assert not replaces or (tmp_path / "pack" / "old").exists()


# -- two at once -----------------------------------------------------------------------------------

NEEDS_LOCKS = pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX's")


@NEEDS_LOCKS
def test_second_run_leaves_the_first_ones_folder_alone(tmp_path):
    with writing_pack(tmp_path / "pack", CONFIG, F32_SCHEMES) as writer:
        for spec in weight_specs(CONFIG):
            for key, part in stored_arrays(spec, F32_SCHEMES.get(spec.name)).items():
                writer.write(key, np.zeros(part.shape, np.float32))
        for force in (False, True):
            found = output_error(tmp_path / "pack", force=force)
            assert found == "another conversion is writing it: wait for it"
        writer.finish(None, {})
    Pack.open(tmp_path / "pack").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


@NEEDS_LOCKS
@pytest.mark.parametrize("again", [True, False], ids=["replaced", "gone"])
def test_lock_on_a_folder_that_its_owner_took_away_is_taken_anew(tmp_path, monkeypatch, again):
    """Between our opening the folder and our locking it, another run ended: the lock is on what is
    now its pack."""
    lock, handles = taken_folder._lock, []

    def late(folder: Path, target: Path) -> int:
        handles.append(lock(folder, target))
        if len(handles) == 1:
            folder.rename(tmp_path / "elsewhere")
            if again:
                folder.mkdir()
        return handles[-1]

    monkeypatch.setattr(taken_folder, "_lock", late)
    write_zeros(tmp_path / "pack")
    assert len(handles) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "pack"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    Pack.open(tmp_path / "pack").verify()


@NEEDS_LOCKS
def test_pack_that_another_run_wrote_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """It ended between our look at the target and our lock."""
    take, meanwhile = pack_writer.take_folder, []

    def late(folder: Path, target: Path) -> int:
        if not meanwhile:
            meanwhile.append(True)
            write_zeros(target)
            (target / "theirs").write_text("")
        return take(folder, target)

    monkeypatch.setattr(pack_writer, "take_folder", late)
    found = output_error(tmp_path / "pack")
    assert found == "already exists: --force replaces a pack"
    assert (tmp_path / "pack" / "theirs").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


@NEEDS_LOCKS
@NEEDS_PROC
def test_failure_leaves_no_lock_and_nothing_open(tmp_path, monkeypatch):
    (tmp_path / ".pack.old").write_text("in the way")
    for _ in range(3):
        assert "is in the way" in output_error(tmp_path / "pack")
    (tmp_path / ".pack.old").unlink()
    write_zeros(tmp_path / "pack")
    assert open_below(tmp_path) == []


# -- known gaps ------------------------------------------------------------------------------------


def test_float_group_size_in_a_manifest_is_refused(pack):
    edit_manifest(pack, weight("wte", {"scheme": "int4", "group_size": 64.0}))
    assert "group size 64.0" in refusal(pack)


def test_astronomic_epsilon_in_a_manifest_is_refused(pack):
    edit_manifest(pack, lambda m: m["config"].update(layer_norm_epsilon=10**400))
    assert "layer_norm_epsilon" in refusal(pack)


def test_misaligned_arrays_are_refused(pack):
    rewritten(pack, lambda arrays: None, aligned=False)
    assert "wte.codes starts at byte" in refusal(pack)
    assert "expected it aligned to 64 bytes" in refusal(pack)


def test_extra_array_is_named(pack):
    rewritten(pack, lambda arrays: arrays.update(more=("F32", np.zeros(16, np.float32))))
    assert refusal(pack) == ": unexpected array more: convert again"


def test_extra_array_with_a_line_break_stays_on_one_line(pack):
    extra = {"zz\nall is lost": ("F32", np.zeros(16, np.float32))}
    rewritten(pack, lambda arrays: arrays.update(extra))
    assert refusal(pack) == r": unexpected array 'zz\nall is lost': convert again"


def test_name_too_long_for_the_system_is_an_error_of_ours(tmp_path):
    with pytest.raises(InputNotFound):
        Pack.open(tmp_path / ("x" * 300))


def test_target_name_too_long_for_the_system_is_an_output_error(tmp_path):
    with pytest.raises(OutputError):
        write_zeros(tmp_path / ("x" * 300))


def test_force_through_a_link_leaves_nothing_behind(tmp_path):
    write_zeros(tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "pack")
    write_zeros(tmp_path / "pack", force=True)
    assert not (tmp_path / ".pack.old").is_symlink()
