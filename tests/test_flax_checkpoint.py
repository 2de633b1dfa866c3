"""Flax checkpoints: every form gives the pack of the same model in safetensors, and what is damaged
is an error of ours that says where."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest
from bloomq.converters import flax
from bloomq.converters.convert import convert
from bloomq.converters.flax import flax_tensors
from bloomq.converters.flax_msgpack import find_arrays
from bloomq.converters.reading import read_checkpoint
from conftest import to_dtype
from flax_files import array, extension, fuzz_one, in_pieces, packed, write_flax, write_leaves

from bloomq.errors import CheckpointError

QKV = "transformer/h/0/self_attention/query_key_value/kernel"
ONE = np.arange(6, dtype=np.float32).reshape(2, 3)
SMALL = {"a": {"scale": array(ONE[0]), "bias": array(ONE[1])}, "kernel": array(ONE)}


def assert_same_pack(source: Path, other: Path, scheme: str = "int4") -> None:
    for checkpoint in (source, other):
        convert(checkpoint, checkpoint.parent / "pack", scheme=scheme)
    files = sorted((source.parent / "pack").iterdir())
    assert len(files) >= 2
    for file in files:
        assert file.read_bytes() == (other.parent / "pack" / file.name).read_bytes(), file.name


# -- what goes in comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_pack_is_that_of_the_same_model_in_safetensors(tmp_path, dtype):
    assert_same_pack(*write_flax(tmp_path, dtype=dtype, n_layer=2))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_change_no_byte(tmp_path, shards):
    assert_same_pack(*write_flax(tmp_path, shards=shards, n_layer=2))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("level", ["params", ""])
def test_levels_above_the_tree_change_no_byte(tmp_path, level, prefix):
    assert_same_pack(*write_flax(tmp_path, level=level, prefix=prefix))


@pytest.mark.parametrize("most", [7, 37, 64, 1000])
def test_arrays_in_pieces_are_joined_wherever_they_are_cut(tmp_path, most):
    assert_same_pack(*write_flax(tmp_path, most=most, dtype="BF16"))


@pytest.mark.parametrize("tie", [True, False])
def test_an_untied_head_is_transposed_too(tmp_path, tie):
    def with_head(tensors):
        dtype, table = tensors["transformer.word_embeddings.weight"]
        tensors["lm_head.weight"] = (dtype, table if tie else table[::-1].copy())

    config = {"tie_word_embeddings": tie}
    source, target = write_flax(tmp_path, edit=with_head, config=config, vocab_size=97)
    assert read_checkpoint(target).config.tie_word_embeddings is tie
    assert_same_pack(source, target)


def test_a_classifier_is_read_like_any_kernel(tmp_path):
    def with_score(tensors):
        tensors["score.weight"] = ("F32", np.arange(3 * 64, dtype=np.float32).reshape(3, 64))

    config = {"architectures": ["BloomForSequenceClassification"], "num_labels": 3}
    assert_same_pack(*write_flax(tmp_path, edit=with_score, config=config))


def test_safetensors_are_read_where_both_are_there(tmp_path):
    source, target = write_flax(tmp_path)
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (target / "flax_model.msgpack").write_bytes(b"nothing")
    assert_same_pack(source, target)


@pytest.mark.parametrize("panel", [1, 40 * 64 * 4, 100 * 64 * 4])
def test_panels_of_any_width_change_no_byte(tmp_path, monkeypatch, panel):
    monkeypatch.setattr(flax, "_PANEL_BYTES", panel)
    monkeypatch.setattr(flax, "_PIECE_BYTES", 1)
    monkeypatch.setattr("bloomq.converters.pieces._BLOCK_BYTES", 32 * 64 * 4)
    assert_same_pack(*write_flax(tmp_path, n_layer=2, most=1001))


def test_every_byte_of_a_kernel_is_read_once_in_each_pass(tmp_path, monkeypatch):
    read = 0
    columns = flax._Stored.columns

    def counted(self, start, stop):
        nonlocal read
        values = columns(self, start, stop)
        read += values.nbytes
        return values

    monkeypatch.setattr(flax._Stored, "columns", counted)
    monkeypatch.setattr(flax, "_PANEL_BYTES", 64 * 64 * 4)
    monkeypatch.setattr(flax, "_PIECE_BYTES", 1)
    kernel = np.arange(64 * 200, dtype=np.float32).reshape(64, 200)
    write_leaves(tmp_path, {"a/kernel": array(kernel)})
    tensor = flax_tensors([tmp_path / "flax_model.msgpack"])["a.weight"]
    blocks = [tensor.rows(start, min(start + 48, 200)) for start in range(0, 200, 48)]
    assert np.array_equal(np.concatenate(blocks), kernel.T)
    assert read == kernel.nbytes


def test_the_fingerprint_reads_64_stored_rows_of_a_large_kernel(tmp_path, monkeypatch):
    """A row of ours is a column there, and 64 columns are in every page of the file."""
    monkeypatch.setattr("bloomq.converters.source._WHOLE_BYTES", 1)
    monkeypatch.setattr("bloomq.converters.source._SAMPLED_ROWS", 4)
    _, target = write_flax(tmp_path)
    before = read_checkpoint(target).fingerprint
    monkeypatch.setattr(flax._Stored, "columns", None)
    assert read_checkpoint(target).fingerprint == before
    file = target / "flax_model.msgpack"
    found = find_arrays(io.BytesIO(file.read_bytes()), "file")
    at, count = found[QKV].pieces[0]
    for row, seen in ((0, True), (1, False), (63, True)):
        data = bytearray(file.read_bytes())
        data[at + row * count // 64] ^= 1
        file.write_bytes(data)
        assert (read_checkpoint(target).fingerprint != before) is seen
        data[at + row * count // 64] ^= 1
        file.write_bytes(data)


def test_threads_share_a_panel_and_its_error(tmp_path, monkeypatch):
    kernel = np.arange(64 * 200, dtype=np.float32).reshape(64, 200)
    write_leaves(tmp_path, {"a/kernel": array(kernel)})
    tensor = flax_tensors([tmp_path / "flax_model.msgpack"])["a.weight"]
    reading, go_on, failed = threading.Event(), threading.Event(), []

    def columns(self, start, stop):
        reading.set()
        go_on.wait(10)
        raise CheckpointError("the disk has gone")

    monkeypatch.setattr(flax._Stored, "columns", columns)

    def ask():
        try:
            tensor.rows(0, 32)
        except CheckpointError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert reading.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert failed == ["the disk has gone"] * 3
    monkeypatch.undo()
    assert np.array_equal(tensor.rows(10, 20), kernel.T[10:20])


# -- as flax writes it -----------------------------------------------------------------------------

# flax.serialization.to_bytes({"a": {"scale": bfloat16 [1, -2], "b": float32 [[3]]}}) of flax 0.12.8
GOLDEN = bytes.fromhex(
    "81a16182a57363616c65c71201939102a862666c6f61743136c404803f00c0"
    "a162c7120193920101a7666c6f61743332c40400004040"
)


def test_bytes_that_flax_wrote_are_read():
    found = find_arrays(io.BytesIO(GOLDEN), "file")
    assert {k: (a.dtype, a.shape) for k, a in found.items()} == {
        "a/scale": ("BF16", (2,)), "a/b": ("F32", (1, 1)),
    }  # fmt: skip
    ((at, count),) = found["a/scale"].pieces
    assert np.frombuffer(GOLDEN[at : at + count], np.uint16).tolist() == [0x3F80, 0xC000]
    ((at, count),) = found["a/b"].pieces
    assert np.frombuffer(GOLDEN[at : at + count], np.float32) == [3]


def test_the_writer_of_these_tests_writes_what_flax_writes(monkeypatch):
    serialization = pytest.importorskip("flax.serialization")
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    half = values.astype(np.float16)
    small = {"x": {"kernel": values, "scale": half[0, 0, :1]}, "y": half}
    ours = {"x": {"kernel": array(values), "scale": array(half[0, 0, :1], "F16")}}
    assert serialization.to_bytes(small) == packed({**ours, "y": array(half, "F16")})
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    cut = {"x": {"kernel": in_pieces(values, "F32", 10)}}
    assert serialization.to_bytes({"x": {"kernel": values}}) == packed(cut)


def test_an_array_of_sixteen_bytes_is_a_fixed_extension():
    data = packed({"x": array(np.ones((), np.float32))})
    assert b"\xd8" in data
    assert find_arrays(io.BytesIO(data), "file")["x"].shape == ()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 70000])
def test_maps_and_arrays_of_every_length_of_length(count):
    data = packed(
        {f"{i}{'x' * 40}": array(np.ones(i % 3, np.float16), "F16") for i in range(count)}
    )
    assert len(find_arrays(io.BytesIO(data), "file")) == count
    long = packed({"x": array(np.ones(count, np.float16), "F16")})
    assert find_arrays(io.BytesIO(long), "file")["x"].shape == (count,)


# -- damage ----------------------------------------------------------------------------------------


def raw(shape: bytes = b"\x91\x01", dtype: bytes = b"\xa7float32", rest: bytes = b"\xc4\x04abcd"):
    """{"x": an array of these fields}."""
    return b"\x81\xa1x" + extension(1, b"\x93" + shape + dtype + rest)


def pieces(**changes: object) -> bytes:
    tree = in_pieces(ONE, "F32", 4)
    tree.update(changes)
    return packed({"x": {k: v for k, v in tree.items() if v is not None}})


DAMAGED = {
    "nothing": (b"", "(at byte 0) ends inside a value: cut short or damaged, download it again"),
    "a list": (b"\x90", "(at byte 1) a msgpack list where a map of arrays by name belongs"),
    "a number": (b"\x07", "a msgpack number where a map of arrays by name belongs"),
    "an array alone": (
        packed({"x": array(ONE)})[3:], "a msgpack extension where a map of arrays by name belongs"
    ),
    "a zip file": (b"PK\x03\x04", "a msgpack number where a map of arrays by name belongs"),
    "a pickle": (b"\x80\x02}q\x00.", "(at byte 1) 5 bytes behind the end of the tree, expected"),
    "trailing": (packed(SMALL) + b"\0", "1 bytes behind the end of the tree, expected none"),
    "reserved": (b"\x81\xa1x\xc1", " x (at byte 4) a msgpack reserved byte where an array or a ma"),
    "nil": (packed({"x": None}), " x (at byte 4) a msgpack nil where an array or a map belongs"),
    "a float": (packed({"x": 1.5}), "a msgpack float where an array or a map belongs"),
    "a negative": (packed({"x": -7}), "a msgpack signed where an array or a map belongs"),
    "a text": (packed({"x": "y"}), "a msgpack text where an array or a map belongs"),
    "a list of arrays": (packed({"x": [array(ONE)]}), "a msgpack list where an array or a map"),
    "true": (packed({"x": True}), "a msgpack true where an array or a map belongs"),
    "a number as a name": (b"\x81\x01\x80", "a msgpack number where the name of an entry belongs"),
    "bytes as a name": (packed({b"x": {}}), "a msgpack bytes where the name of an entry belongs"),
    "no UTF-8": (b"\x81\xa1\xff\x80", "(at byte 3) the name of an entry is no UTF-8"),
    "a long name": (packed({"x" * 257: {}}), "the name of an entry is 257 bytes long, expected at"),
    "a name of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "is 4294967295 bytes long, expected at most 2"),
    "one name twice": (b"\x82\xa1x\x80\xa1x\x80", "(at byte 6) x is there twice in one map"),
    "one path twice": (
        packed({"a": {"b": array(ONE)}, "a/b": array(ONE)}), "is there twice, nested and by its"
    ),
    "a map of 4 billion": (b"\xdf\xff\xff\xff\xff", "a map of 4294967295 entries, more than 0 byt"),
    "a million maps": (
        packed({"x": {str(i): {} for i in range(300_000)}}), "over 262144 entries in all: not a BLO"
    ),
    "deep": (b"\x81\xa1x" * 18 + b"\x80", "maps nested over 16 deep: not a model"),
    "a scalar": (b"\x81\xa1x" + extension(3, b"abc"), " x (at byte 6) extension type 3, expected"),
    "a complex": (b"\x81\xa1x" + extension(2, b""), "extension type 2, expected 1, an array"),
    "a timestamp": (b"\x81\xa1x" + extension(255, b"abcd"), "extension type 255, expected 1"),
    "past the end": (b"\x81\xa1x\xc9\xff\xff\xff\xff\x01", "an array of 4294967295 bytes, only 0"),
    "an array of nothing": (b"\x81\xa1x" + extension(1, b""), "ends inside a value"),
    "no fields": (b"\x81\xa1x" + extension(1, b"\x80"), "a msgpack map where shape, dtype and val"),
    "two fields": (b"\x81\xa1x" + extension(1, b"\x92\x90\x90"), "an array of 2 fields and 0 axes"),
    "nine axes": (raw(b"\x99" + b"\x01" * 9), "an array of 3 fields and 9 axes, expected 3 and up"),
    "a negative extent": (raw(b"\x91\xff"), "a msgpack signed where an extent belongs"),
    "an extent that is none": (raw(b"\x91\xa11"), "a msgpack text where an extent belongs"),
    "a shape that is none": (raw(b"\x01"), "a msgpack number where a shape belongs"),
    "extents that overflow": (
        raw(b"\x94" + b"\xcf\x80\0\0\0\0\0\0\0" * 3 + b"\x10"), "of float32 has 5021681388309344611"
    ),
    "int32": (raw(dtype=b"\xa5int32"), "holds int32, expected float32, float16, bfloat16"),
    "float64": (raw(dtype=b"\xa7float64"), "holds float64, expected float32, float16, bfloat16"),
    "object": (raw(dtype=b"\xa6object"), "holds object, expected float32, float16, bfloat16"),
    "no dtype": (raw(dtype=b"\xc0"), "a msgpack nil where the name of a dtype belongs"),
    "values as text": (raw(rest=b"\xa4abcd"), "a msgpack text where values belongs"),
    "values too few": (raw(rest=b"\xc4\x03abc"), "3 bytes of values and 3 to the end of the array"),
    "values too many": (raw(rest=b"\xc4\x05abcde"), "5 bytes of values and 5 to the end of the ar"),
    "values past the array": (raw(rest=b"\xc4\x04abc"), "4 bytes of values and 3 to the end"),
    "values before its end": (raw(rest=b"\xc4\x04abcd\0"), "4 bytes of values and 5 to the end"),
    "pieces without chunks": (pieces(chunks=None), "an array in pieces without its shape or its"),
    "pieces without a shape": (pieces(shape=None), "an array in pieces without its shape or its c"),
    "no pieces": (pieces(chunks={}), "an array in pieces without its shape or its chunks"),
    "pieces of more": (pieces(more={}), "more in an array in pieces, expected shape and chunks"),
    "pieces that are false": (
        packed({"x": {"__msgpack_chunked_array__": False}}), "a msgpack false where true, which mar"
    ),
    "pieces of another shape": (
        pieces(shape={"0": 2, "1": 4}), "pieces of 6 values do not make an array [2, 4]"
    ),
    "a shape in a list": (pieces(shape=[2, 3]), "a msgpack list where a map, the shape of an arra"),
    "chunks in a list": (pieces(chunks=[]), "a msgpack list where a map, the chunks of an array i"),
    "pieces of two dtypes": (
        pieces(chunks={"0": array(ONE.reshape(-1)[:4]), "1": array(np.ones(2, np.float16), "F16")}),
        "pieces of 6 values do not make an array [2, 3]",
    ),
    "pieces that are not flat": (
        pieces(chunks={"0": array(ONE)}), "pieces of 6 values do not make an array [2, 3]"
    ),
    "a gap in the pieces": (
        pieces(chunks={"0": array(ONE[0]), "2": array(ONE[1])}), "2 counts the pieces of an array,"
    ),
    "a piece named 01": (pieces(chunks={"01": array(ONE[0])}), "01 counts the pieces of an array,"),
    "a piece named ²": (pieces(chunks={"²": array(ONE[0])}), "² counts the pieces of an array, ex"),
    "a piece twice": (
        packed({"x": in_pieces(ONE, "F32", 3)}).replace(b"\xa11\xc7", b"\xa10\xc7"),
        "0 counts the pieces of an array, expected 0 to 1",
    ),
    "a piece that is a map": (pieces(chunks={"0": {}}), "a msgpack map where a piece of an array"),
    "an extent that is a map": (pieces(shape={"0": {}}), "a msgpack map where an extent belongs"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_its_place(case):
    data, expected = DAMAGED[case]
    with pytest.raises(CheckpointError) as caught:
        find_arrays(io.BytesIO(data), "flax_model.msgpack")
    message = str(caught.value)
    assert message.startswith("flax_model.msgpack:")
    assert re.search(r" \(at byte \d+\) ", message)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_file_cut_anywhere_is_an_error_of_ours():
    data = packed({**SMALL, "p": in_pieces(ONE, "F32", 4)})
    assert fuzz_one(data)
    for size in range(len(data)):
        assert not fuzz_one(data[:size]), size


def test_a_file_with_any_bit_flipped_is_read_or_refused():
    data = packed({**SMALL, "p": in_pieces(ONE, "F32", 4)})
    outcomes = set()
    for at in range(len(data)):
        for mask in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= mask
            outcomes.add(fuzz_one(bytes(damaged)))
    assert outcomes == {True, False}  # a flip in values or in a name is not seen here


def test_names_with_line_breaks_are_shown_safely():
    with pytest.raises(CheckpointError) as caught:
        find_arrays(io.BytesIO(packed({"a\nb\x1b[31m": None})), "file")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


class Shrinking(io.BytesIO):
    """A file that another program cuts while it is read."""

    def read(self, size=-1):
        return super().read(size)[: 4 if self.tell() < 100 else 0]


def test_a_file_that_shrinks_while_it_is_walked_has_changed():
    with pytest.raises(CheckpointError, match=r"has grown shorter than its \d+ bytes: it changed"):
        find_arrays(Shrinking(packed(SMALL)), "file")


# -- checkpoints that are not whole ----------------------------------------------------------------


def refused(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint, checkpoint.parent / "pack")
    assert not (checkpoint.parent / "pack").exists()
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]
    return str(caught.value)


def edited(folder: Path, edit: Callable[[dict], object]) -> tuple[Path, str]:
    """A Flax checkpoint whose arrays, by path, were changed; and the name of its file."""
    _, target = write_flax(folder)
    file = target / "flax_model.msgpack"
    tree = msgpack.unpackb(file.read_bytes(), raw=False)
    leaves = {}

    def flatten(tree: dict, path: str) -> None:
        for key, value in tree.items():
            here = f"{path}/{key}".strip("/")
            flatten(value, here) if isinstance(value, dict) else leaves.update({here: value})

    flatten(tree, "")
    edit(leaves)
    write_leaves(target, leaves)
    return target, str(file)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    target, _ = edited(tmp_path, lambda leaves: leaves.pop(QKV))
    assert refused(target) == (
        f"{target}: no tensor h.0.self_attention.query_key_value.weight: the checkpoint is "
        "incomplete"
    )


def test_a_kernel_that_is_not_transposed_is_of_another_shape(tmp_path):
    target, file = edited(
        tmp_path, lambda leaves: leaves.update({QKV: array(np.ones((192, 64), np.float32))})
    )
    assert refused(target) == f"{file}: {QKV} is [64, 192], expected [192, 64] by config.json"


def test_a_kernel_must_have_two_axes(tmp_path):
    target, file = edited(
        tmp_path, lambda leaves: leaves.update({QKV: array(np.ones(192 * 64, np.float32))})
    )
    assert refused(target) == f"{file}: {QKV}: a kernel of shape [12288], expected two axes"


def test_a_weight_of_two_names_is_stored_twice(tmp_path):
    ones = array(np.ones(64, np.float32))
    target, file = edited(
        tmp_path, lambda leaves: leaves.update({"transformer/ln_f/embedding": ones})
    )
    assert refused(target) == (
        f"{file}: transformer/ln_f/embedding: is {file}: transformer/ln_f/scale too: stored twice"
    )


def test_an_array_of_another_model_is_unexpected(tmp_path):
    target, _ = edited(tmp_path, lambda leaves: leaves.update({"pooler/kernel": array(ONE)}))
    assert "unexpected tensor pooler.weight: not part of a BloomForCausalLM" in refused(target)


def test_layers_in_one_array_are_refused_by_name(tmp_path):
    name = "transformer/h/FlaxBloomBlockLayers/ln_1/scale"
    target, file = edited(tmp_path, lambda leaves: leaves.update({name: array(ONE)}))
    assert refused(target) == (
        f"{file}: {name}: layers in one array (use_scan), expected h/0, h/1 and so on"
    )


def test_a_shard_that_is_missing_is_named(tmp_path):
    _, target = write_flax(tmp_path, shards=3)
    shard = target / "flax_model-00002-of-00003.msgpack"
    shard.unlink()
    assert refused(target) == f"{shard}: missing shard: download it again"


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    _, target = write_flax(tmp_path, shards=1)
    index = target / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.msgpack"}}))
    assert "lies outside the checkpoint's folder" in refused(target)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    _, target = write_flax(tmp_path)
    file = target / "flax_model.msgpack"
    file.unlink()
    file.mkdir()
    assert refused(target) == f"{file}: is no regular file, expected msgpack"


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    _, target = write_flax(tmp_path)
    file = target / "flax_model.msgpack"
    original = Path.open

    def no_rights(self, *args, **options):
        if self == file:
            raise PermissionError(13, "Permission denied")
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", no_rights)
    assert refused(target) == f"{file}: cannot be read: Permission denied"


@pytest.mark.parametrize("rows", [(0, 3), (1, 2)])
@pytest.mark.parametrize("name", ["a.weight", "b.weight"])
def test_a_file_that_shrinks_under_a_reader_has_changed(tmp_path, monkeypatch, name, rows):
    monkeypatch.setattr(flax, "_PANEL_BYTES", 1)
    monkeypatch.setattr(flax, "_PIECE_BYTES", 1)
    values = to_dtype(np.ones((40, 40), np.float32), "F16")
    write_leaves(tmp_path, {"a/kernel": array(values, "F16"), "b/embedding": array(values, "F16")})
    file = tmp_path / "flax_model.msgpack"
    tensor = flax_tensors([file])[name]
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(10)
    with pytest.raises(CheckpointError, match=f"shorter than the {size} bytes it had: it changed"):
        tensor.rows(*rows)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        tensor.rows(*rows)
