"""Packs out as GGUF: the same weights for any reader, whole or not there; and llama.cpp's words.

The last tests run where BLOOMQ_LLAMA_PYTHON names an interpreter that has llama-cpp-python.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert
from bloomq.converters.export import gguf as export
from bloomq.converters.export.gguf import DTYPES, write
from bloomq.converters.gguf_blocks import q4_0_parts
from bloomq.converters.gguf_header import read_header
from bloomq.converters.reading import read_checkpoint
from conftest import edit_manifest, write_checkpoint

import bloomq
from bloomq.errors import NumericError, OutputError, TokenizerError, UsageError
from bloomq.pack import Pack
from bloomq.schemes import bf16_to_f32

LLAMA = os.environ.get("BLOOMQ_LLAMA_PYTHON", "")
NEEDS_LLAMA = pytest.mark.skipif(
    not LLAMA, reason="BLOOMQ_LLAMA_PYTHON names no interpreter with llama-cpp-python"
)
CHILD = Path(__file__).parent / "llama_cpp_child.py"


@pytest.fixture
def packed(tmp_path) -> Callable[..., Pack]:
    """`packed("int4", group_size=64, hidden_size=128)`: a tiny random model's pack."""

    def pack(scheme: str, **options: Any) -> Pack:
        given = {k: options.pop(k) for k in ("group_size", "head_scheme") if k in options}
        checkpoint = write_checkpoint(tmp_path / "checkpoint", **options)
        convert(checkpoint, tmp_path / "pack", scheme=scheme, force=True, **given)
        return Pack.open(tmp_path / "pack")

    return pack


def restored(pack: Pack) -> dict[str, np.ndarray]:
    """Every tensor of a pack as float32, by our name."""
    checkpoint = {}
    for name in read_names(pack):
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and stem in pack.schemes:
            checkpoint[name] = pack.matrix(stem).dequantize()
        else:
            checkpoint[name] = np.asarray(pack.array(name), np.float32)
    return checkpoint


def read_names(pack: Pack) -> list[str]:
    from bloomq.converters.names import expected_tensors

    return list(expected_tensors(pack.config))


def read_back(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF as float32, by our own reader."""
    found = {}
    for name, tensor in read_checkpoint(file).tensors.items():
        rows = tensor.rows(0, tensor.shape[0])
        found[name] = bf16_to_f32(rows) if tensor.dtype == "BF16" else rows.astype(np.float32)
    return found


def differences(pack: Pack, file: Path) -> dict[str, float]:
    """The largest difference of every tensor that is not the same, over its largest weight."""
    found, worst = read_back(file), {}
    for name, padded in restored(pack).items():
        got = found[name]
        expected = padded[: len(got)]
        if not np.array_equal(got, expected):
            worst[name] = float(np.abs(got - expected).max() / np.abs(expected).max())
    return worst


EXACT = [
    ("f32", {}, "F32"), ("f16", {}, "F16"), ("bf16", {}, "BF16"), ("int6", {}, "Q8_0"),
    ("nl4", {}, "Q8_0"), ("int4", {"group_size": 32, "head_scheme": "int4"}, "Q4_0"),
    ("int4", {"group_size": 64, "head_scheme": "int4"}, "Q4_0"),
    ("int4", {"group_size": 128, "head_scheme": "int4"}, "Q4_0"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options", "kind"), EXACT, ids=str)
def test_auto_keeps_every_bit_of_what_ggml_has_a_grid_for(tmp_path, packed, scheme, options, kind):
    pack = packed(scheme, n_layer=2, hidden_size=96, vocab_size=70, **options)
    write(pack, tmp_path / "m.gguf", dtype="auto")
    assert differences(pack, tmp_path / "m.gguf") == {}
    types = {name: e.type.name for name, e in read_header(tmp_path / "m.gguf").tensors.items()}
    assert {types[name] for name in types if "weight" in name and "norm" not in name} == {kind}
    assert {types[name] for name in types if "bias" in name or "norm" in name} == {"F32"}
    assert "output.weight" not in types


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 5e-4), ("nf4", 5e-4)], ids=["int8", "nf4"])
def test_auto_loses_next_to_nothing_of_the_rest(tmp_path, packed, scheme, limit):
    pack = packed(scheme, head_scheme=scheme)
    write(pack, tmp_path / "m.gguf", dtype="auto")
    assert max(differences(pack, tmp_path / "m.gguf").values()) < limit


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4", "bf16"])
def test_q8_0_keeps_codes_and_is_near_where_there_are_none(tmp_path, packed, scheme):
    pack = packed(scheme, head_scheme=scheme)
    write(pack, tmp_path / "m.gguf", dtype="q8_0")
    worst = max(differences(pack, tmp_path / "m.gguf").values(), default=0)
    assert (
        worst == 0
        if scheme in ("int6", "nl4", "int4")
        else worst < (5e-4 if scheme == "int8" else 5e-3)
    )


def test_q4_0_of_other_grids_loses_no_more_than_int4_does(tmp_path, packed):
    pack = packed("f32")
    write(pack, tmp_path / "m.gguf", dtype="q4_0")
    found, wanted = read_back(tmp_path / "m.gguf"), restored(pack)
    convert(tmp_path / "checkpoint", tmp_path / "int4", scheme="int4", group_size=32)
    ours = restored(Pack.open(tmp_path / "int4"))
    for name in wanted:
        if name.startswith("h.0") and wanted[name].ndim == 2:
            np.testing.assert_array_equal(found[name], ours[name])
    types = {name: e.type.name for name, e in read_header(tmp_path / "m.gguf").tensors.items()}
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")


def test_q4_0_blocks_are_the_codes_and_scales_of_the_pack(tmp_path, pack_of):
    pack, file = Pack.open(pack_of("int4", 32)), tmp_path / "m.gguf"
    write(pack, file, dtype="auto")
    entry = read_header(file).tensors["blk.2.ffn_up.weight"]
    raw = np.fromfile(file, np.uint8, entry.row_bytes * entry.shape[0], offset=entry.start)
    parts = q4_0_parts(raw.reshape(entry.shape[0], -1))
    for name, stored in pack.matrix("h.2.mlp.up").parts.items():
        np.testing.assert_array_equal(parts[name], stored)
    assert differences(pack, file) == {}  # nor of the head, which is int6, in Q8_0


@pytest.mark.parametrize(("scheme", "notes"), [("int4", 1), ("f32", 0)])
def test_quantizing_another_type_anew_is_said_to_lose_twice(tmp_path, packed, scheme, notes):
    write(packed("int8"), tmp_path / "m.gguf")
    done = convert(tmp_path / "m.gguf", tmp_path / "again", scheme=scheme)
    loss = "Q8_0 of the GGUF: dequantized, then quantized anew: a second loss, which the original "
    assert sum(note.startswith(loss) for note in done.notes) == notes


def test_a_q4_0_file_is_taken_over_code_by_code(tmp_path, pack_of):
    write(Pack.open(pack_of("int4", 32, "int4")), tmp_path / "m.gguf", dtype="q4_0")
    done = convert(tmp_path / "m.gguf", tmp_path / "again")
    assert done.notes[-1] == "int4-g32: taken over from GGUF as it is"
    for file in pack_of("int4", 32, "int4").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_scale_of_a_q4_0_file_that_is_no_number_is_named(tmp_path, pack_of):
    path = tmp_path / "m.gguf"
    write(Pack.open(pack_of("int4", 32, "int4")), path, dtype="q4_0")
    entry = read_header(path).tensors["blk.1.ffn_up.weight"]
    with path.open("r+b") as file:
        file.seek(entry.start)
        file.write(np.array([np.inf], "<f2").tobytes())
    with pytest.raises(NumericError, match="has a scale that is no number: the file is damaged"):
        convert(path, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_checkpoint_comes_back_as_the_same_pack_by_way_of_gguf(tmp_path, pack_of, dtype):
    write(Pack.open(pack_of("bf16")), tmp_path / "m.gguf", dtype=dtype)
    convert(tmp_path / "m.gguf", tmp_path / "again", scheme="bf16")
    first, second = Pack.open(pack_of("bf16")), Pack.open(tmp_path / "again")
    assert second.config == first.config
    for file in pack_of("bf16").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    was, now = (json.loads(p.tokenizer_bytes() or b"") for p in (first, second))
    assert now == was


@pytest.mark.parametrize("dtype", ["auto", "bf16", "q8_0"])
def test_ggufs_own_reader_finds_the_same_values(tmp_path, pack_of, dtype):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    write(Pack.open(pack_of("int4")), file, dtype=dtype)
    ours, reader = read_header(file), gguf.GGUFReader(file)
    assert [t.name for t in reader.tensors] == list(ours.tensors)
    for tensor in reader.tensors:
        mine = ours.tensors[tensor.name]
        assert (tensor.tensor_type.name, tensor.data_offset) == (mine.type.name, mine.start)
        assert tuple(tensor.shape[::-1]) == mine.shape
    found = read_back(file)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    for name, theirs_name in (
        ("wte.weight", "token_embd"),
        ("h.3.mlp.down.weight", "blk.3.ffn_down"),
    ):
        tensor = theirs[f"{theirs_name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found[name], values)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "bloom"
    assert fields["bloom.feed_forward_length"] == 1024
    assert fields["tokenizer.ggml.tokens"][:5] == ["<unk>", "<s>", "</s>", "<pad>", "!"]
    assert fields["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_every_type_is_named_by_its_number(tmp_path, packed):
    pack, numbers = packed("int4"), {}
    for dtype in DTYPES:
        write(pack, tmp_path / "m.gguf", dtype=dtype)
        numbers[dtype] = read_header(tmp_path / "m.gguf").metadata["general.file_type"]
    assert numbers == {"auto": 2, "q4_0": 2, "f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def test_a_head_of_its_own_is_written(tmp_path, packed):
    def edit(tensors: Any) -> None:
        dtype, table = tensors["transformer.word_embeddings.weight"]
        tensors["lm_head.weight"] = (dtype, table + np.float32(1))

    pack = packed("f32", edit=edit)
    write(pack, tmp_path / "m.gguf", dtype="auto")
    assert "output.weight" in read_header(tmp_path / "m.gguf").tensors
    assert differences(pack, tmp_path / "m.gguf") == {}


def test_rows_that_are_no_whole_blocks_are_f16(tmp_path, packed):
    pack = packed("int4", hidden_size=36, head_scheme="int4")
    write(pack, tmp_path / "m.gguf", dtype="q4_0")
    types = {name: e.type.name for name, e in read_header(tmp_path / "m.gguf").tensors.items()}
    assert types["blk.0.attn_qkv.weight"] == types["token_embd.weight"] == "F16"


def test_blocks_of_rows_change_no_byte_and_progress_reaches_the_end(tmp_path, packed, monkeypatch):
    pack = packed("int4", vocab_size=333)
    write(pack, tmp_path / "whole.gguf", dtype="auto")
    monkeypatch.setattr(export, "_BLOCK_BYTES", 1)
    seen: list[tuple[int, int]] = []
    write(pack, tmp_path / "m.gguf", dtype="auto", progress=lambda *at: seen.append(at))
    data = (tmp_path / "m.gguf").read_bytes()
    assert data == (tmp_path / "whole.gguf").read_bytes()
    assert seen == sorted(seen)
    assert seen[-1] == (len(data), len(data))


def test_a_pack_without_a_tokenizer_becomes_a_file_of_ids(tmp_path, packed):
    pack = packed("bf16")
    write(pack, tmp_path / "m.gguf", dtype="auto")
    metadata = read_header(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "no_vocab"
    assert metadata["bloom.vocab_size"] == 96
    checkpoint = read_checkpoint(tmp_path / "m.gguf")
    assert (checkpoint.tokenizer, checkpoint.config) == (None, pack.config)


# -- refusals --------------------------------------------------------------------------------------


def test_what_grows_or_is_rounded_again_is_said(packed):
    grown = "GGUF holds {}, in more bits: for a small file convert its source with --scheme int4"
    again = "{} weights were rounded a second time: convert its source with --scheme int4"
    for scheme, head, dtype, *expected in (
        ("nl4", "int8", "auto", grown.format("nl4 as Q8_0")),
        ("nf4", "nl4", "auto", grown.format("nf4 as F16 and nl4 as Q8_0")),
        ("int8", "nl4", "auto", grown.format("nl4 as Q8_0")),
        ("nl4", "int8", "q4_0", again.format("nl4")),
        ("int8", "nl4", "q4_0", again.format("int8")),  # the head goes to Q8_0 as it is
        ("nl4", "int8", "q8_0"),
        ("int4", "int8", "auto"),
        ("int4", "int6", "q4_0"),
        ("bf16", "bf16", "q4_0"),  # rounded once
    ):
        notes = export.notes(packed(scheme, head_scheme=head), dtype)
        assert [note.partition(", which")[0] for note in notes] == expected
    assert not export.notes(packed("nl4", hidden_size=36), "auto")  # int4's would be F16 too


def test_unknown_type_is_refused(tmp_path, packed):
    with pytest.raises(UsageError, match=r"unknown dtype 'q6_k' for a GGUF, expected one of auto"):
        write(packed("f32"), tmp_path / "m.gguf", dtype="q6_k")


def test_classifiers_are_refused(tmp_path, packed):
    def edit(tensors: Any) -> None:
        tensors["score.weight"] = ("F32", np.ones((2, 64), np.float32))

    pack = packed("f32", config={"architectures": ["BloomForSequenceClassification"]}, edit=edit)
    with pytest.raises(UsageError, match="a GGUF of BLOOM holds language models only"):
        write(pack, tmp_path / "m.gguf")


def test_residuals_behind_the_norms_are_refused(tmp_path, packed):
    pack = packed("f32", config={"apply_residual_connection_post_layernorm": True})
    with pytest.raises(UsageError, match="its residuals start behind the norms: llama"):
        write(pack, tmp_path / "m.gguf")


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_weights_too_large_for_a_type_are_refused(tmp_path, packed, dtype):
    def edit(tensors: Any) -> None:
        tensors["transformer.h.0.mlp.dense_4h_to_h.weight"][1][3, 5] = 1e12

    pack = packed("f32", edit=edit)
    with pytest.raises(NumericError, match=r"ffn_down.weight has weights that .* cannot hold"):
        write(pack, tmp_path / "m.gguf", dtype=dtype)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint", "pack"}


def test_tokenizer_that_a_gguf_cannot_carry_is_refused(tmp_path, pack_of):
    pack = tmp_path / "pack"
    shutil.copytree(pack_of("int4"), pack)
    content = (
        (pack / "tokenizer.json").read_bytes().replace(b'"normalizer": null', b'"normalizer": 7   ')
    )
    content = json.dumps({**json.loads(content), "normalizer": {"type": "NFC"}}).encode()
    (pack / "tokenizer.json").write_bytes(content)
    edit_manifest(pack, lambda m: m["files"]["tokenizer.json"].update(bytes=len(content)))
    with pytest.raises(TokenizerError, match="its normalizer is not BLOOM's"):
        write(Pack.open(pack), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_q4_0_scale_that_is_no_number_is_an_error(tmp_path, packed):
    write(packed("int4"), tmp_path / "m.gguf")
    entry = read_header(tmp_path / "m.gguf").tensors["blk.0.ffn_up.weight"]
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(entry.start + entry.row_bytes)
        file.write(np.float16(np.inf).tobytes())
    with pytest.raises(NumericError, match="has a scale that is no number: the file is damaged"):
        convert(tmp_path / "m.gguf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


# -- the file --------------------------------------------------------------------------------------


def test_a_gguf_that_is_there_is_replaced_and_nothing_else(tmp_path, packed):
    pack, target = packed("f32"), tmp_path / "m.gguf"
    write(pack, target)
    first = target.read_bytes()
    target.write_bytes(b"GGUF of another time")
    write(pack, target)
    assert target.read_bytes() == first
    target.write_bytes(b"my thesis")
    with pytest.raises(OutputError, match="is there, and is no such file to replace"):
        write(pack, target)
    assert target.read_bytes() == b"my thesis"
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        write(pack, tmp_path / "no" / "folder" / "m.gguf")
    with pytest.raises(OutputError, match="is no name that a file can have"):
        write(pack, tmp_path / "m\0.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs there")
def test_a_fifo_is_not_waited_for(tmp_path, packed):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(OutputError, match="is there, and is no such file to replace"):
        write(packed("f32"), tmp_path / "m.gguf")


def test_a_name_that_is_no_text_becomes_one(tmp_path, packed):
    pack = packed("f32").path
    edit_manifest(
        pack, lambda m: m["provenance"].update(name="m\udcff")
    )  # a folder called b"m\xff"
    write(Pack.open(pack), tmp_path / "m.gguf")
    assert read_header(tmp_path / "m.gguf").metadata["general.name"] == "m?"


def test_a_token_that_is_no_text_is_refused(tmp_path, demo_checkpoint):
    pack = convert(demo_checkpoint, tmp_path / "pack").pack
    tokenizer = json.loads((pack / "tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"]["\ud800"] = 300
    content = json.dumps(tokenizer).encode()
    (pack / "tokenizer.json").write_bytes(content)
    edit_manifest(pack, lambda m: m["files"]["tokenizer.json"].update(bytes=len(content)))
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json that could become a GGUF's"):
        write(Pack.open(pack), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "disk full: free some space"),
        (KeyboardInterrupt("now"), "now"),
    ],
    ids=["full", "Ctrl-C"],
)
def test_an_export_that_ends_early_leaves_what_was_there(tmp_path, packed, error, words):
    pack, target = packed("f32"), tmp_path / "m.gguf"
    target.write_bytes(b"GGUF of another time")

    def fail(done: int, total: int) -> None:
        assert (tmp_path / ".m.gguf.partial").exists()
        raise error

    with pytest.raises(OutputError if words != "now" else KeyboardInterrupt, match=words):
        write(pack, target, progress=fail)
    assert target.read_bytes() == b"GGUF of another time"
    assert not (tmp_path / ".m.gguf.partial").exists()


def test_too_small_a_disk_is_named_before_anything_is_written(tmp_path, packed, monkeypatch):
    pack = packed("f32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(OutputError, match=r"takes 0.2 MB, 0.0 MB are free: choose another disk"):
        write(pack, tmp_path / "m.gguf")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_two_exports_to_one_file_do_not_meet(tmp_path, packed):
    pack, target = packed("f32"), tmp_path / "m.gguf"
    met = []

    def again(done: int, total: int) -> None:
        if not met:
            with pytest.raises(OutputError, match="another export is writing it: wait until it"):
                write(pack, target)
            met.append(True)

    write(pack, target, progress=again)
    assert met == [True]
    assert read_header(target).tensors
    (tmp_path / ".m.gguf.partial").write_bytes(bytes(10_000_000))  # of a run that was killed
    write(pack, target)
    assert target.stat().st_size < 1_000_000


# -- llama.cpp -------------------------------------------------------------------------------------

PROMPTS = (
    "The history of the city",
    "Le président de la",
    "def main(argv):\n    ",
    "Once upon a time",
)


def llama(file: Path, **asked: Any) -> dict[str, Any]:
    done = subprocess.run(
        [LLAMA, CHILD, file], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@NEEDS_LLAMA
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_llama_cpp_writes_the_same_greedy_text(tmp_path, pack_of, dtype):
    write(Pack.open(pack_of("bf16")), tmp_path / "m.gguf", dtype=dtype)
    model = bloomq.load(pack_of("bf16"), cache_dtype="f32")
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    theirs = llama(tmp_path / "m.gguf", prompts=ids, count=100)["greedy"]
    for prompt, one in zip(ids, theirs, strict=True):
        ours = list(model.generate(prompt, max_new_tokens=100).ids)
        for at, (mine, other) in enumerate(zip(ours, one["ids"], strict=False)):
            if mine != other:  # a tie but for the last bits: what follows is another text
                assert one["gaps"][at] < 0.005
                break


@NEEDS_LLAMA
@pytest.mark.parametrize("dtype", ["auto", "q8_0", "q4_0"])
def test_llama_cpp_computes_nearly_the_same_logits_from_blocks(tmp_path, pack_of, dtype):
    write(Pack.open(pack_of("int4", 32)), tmp_path / "m.gguf", dtype=dtype)
    write(Pack.open(pack_of("int4", 32)), tmp_path / "f32.gguf", dtype="f32")
    tokenizer = bloomq.BloomTokenizer.from_pretrained(pack_of("int4", 32))
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found, exact = (
        np.array([one["first"] for one in llama(tmp_path / name, prompts=ids, count=1)["greedy"]])
        for name in ("m.gguf", "f32.gguf")
    )
    assert np.abs(found - exact).max() < 0.25  # llama.cpp's activations are int8 then


@NEEDS_LLAMA
def test_llama_cpp_makes_the_same_tokens_of_a_text(tmp_path, pack_of):
    write(Pack.open(pack_of("int4", 32)), tmp_path / "m.gguf")
    tokenizer = bloomq.BloomTokenizer.from_pretrained(pack_of("int4", 32))
    texts = [*PROMPTS, " a  b\n\n\tc", "naïve — œuf… 生活的真谛 नमस्ते।", "it's</s> <pad>", "x" * 50]
    found = llama(tmp_path / "m.gguf", texts=texts)
    assert found["ids"] == [tokenizer.encode(text) for text in texts]
    assert found["texts"] == [tokenizer.decode(ids) for ids in found["ids"]]
