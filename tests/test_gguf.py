"""GGUF files of BLOOM in: the weights, the vocabulary, and every kind of damage as an error."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters import gguf_parts
from bloomq.converters.convert import convert
from bloomq.converters.gguf_blocks import BY_NAME, TYPES, check_readable, q4_0_parts
from bloomq.converters.gguf_header import HEADER_BYTES, parse_header, read_header
from bloomq.converters.gguf_names import bloom_rows, gguf_name, gguf_runs, our_name
from bloomq.converters.gguf_tokenizer import read_tokenizer, write_tokenizer
from bloomq.converters.names import expected_tensors
from bloomq.converters.reading import read_checkpoint
from conftest import DEMO, write_checkpoint
from gguf_writing import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U32,
    Gguf,
    Tensor,
    packed,
    text,
    tiny,
    vocabulary,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomq.config import BloomConfig
from bloomq.errors import BloomqError, CheckpointError, ConfigError, TokenizerError
from bloomq.pack import Pack
from bloomq.schemes import get_scheme
from bloomq.tokenizer import BloomTokenizer
from bloomq.tokenizer_config import Settings

DEMO_TOKENIZER = DEMO / "tokenizer.json"
Edit = Callable[[Gguf], object]


def same_weights(a: Path, b: Path) -> None:
    """Two packs have the same bytes in the same weight files."""
    files = sorted(file.name for file in a.glob("*.safetensors"))
    assert files == sorted(file.name for file in b.glob("*.safetensors"))
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes()


def values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by our name."""
    checkpoint = read_checkpoint(path)
    return {name: t.rows(0, t.shape[0]) for name, t in checkpoint.tensors.items()}


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats_give_the_pack_of_the_checkpoint_they_are(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "checkpoint", n_layer=2)
    file = tiny(n_layer=2, dtype=dtype).write(tmp_path / "model.gguf")
    scheme = {"F32": "f32", "F16": "f16", "BF16": "bf16"}[dtype]
    convert(file, tmp_path / "b", scheme=scheme)
    if dtype == "BF16":  # the tests' own rounding to bf16 cuts off
        source = write_checkpoint(tmp_path / "cut", n_layer=2, edit=cut_matrices)
    convert(source, tmp_path / "a", scheme=scheme)
    same_weights(tmp_path / "a", tmp_path / "b")
    provenance = Pack.open(tmp_path / "b").manifest["provenance"]
    assert (provenance["format"], provenance["dtype"]) == ("gguf", dtype)
    assert provenance["types"] == ({"F32": 29} if dtype == "F32" else {dtype: 9, "F32": 20})


def cut_matrices(tensors: dict[str, Any]) -> None:
    for name, (_, array) in tensors.items():
        if array.ndim == 2:
            bits = array.view(np.uint32) & np.uint32(0xFFFF0000)
            tensors[name] = ("F32", bits.view(np.float32))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_either_version_and_any_alignment_are_read(tmp_path, version, alignment):
    gguf = replace(tiny(), version=version, alignment=alignment)
    gguf.metadata["general.alignment"] = (U32, alignment)
    found = values(gguf.write(tmp_path / "model.gguf"))
    expected = values(write_checkpoint(tmp_path / "checkpoint"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize(("n_head", "head_dim"), [(1, 64), (4, 16), (3, 5), (7, 1)])
def test_rows_of_q_k_and_v_come_in_blooms_order_from_any_row_to_any(n_head, head_dim):
    order = bloom_rows(n_head, head_dim)
    place = np.argsort(order)
    rows = 3 * n_head * head_dim
    for start in range(0, rows, 3):
        for stop in range(start, rows + 1, 2):
            runs = list(gguf_runs(start, stop, n_head, head_dim))
            got = [row for first, last in runs for row in range(first, last)]
            assert got == place[start:stop].tolist()
            assert all(last - first <= head_dim for first, last in runs)


def test_a_few_rows_of_q_k_and_v_are_those_of_the_whole(tmp_path):
    file = tiny(n_head=4).write(tmp_path / "model.gguf")
    for name in ("h.0.attn.qkv.weight", "h.0.attn.qkv.bias"):
        tensor = read_checkpoint(file).tensors[name]
        whole = tensor.rows(0, tensor.shape[0])
        for start, stop in ((0, 1), (15, 17), (30, 100), (191, 192), (64, 64)):
            np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])


def test_names_go_there_and_back():
    config = BloomConfig(
        hidden_size=8, n_layer=12, n_head=2, vocab_size=9, tie_word_embeddings=False
    )
    for name in expected_tensors(config):
        assert our_name(gguf_name(name)) == name
    for strange in (
        "blk.01.attn_qkv.weight", "attn_qkv.weight", "blk.0.token_embd.weight",
        "blk.0.attn_qkv.scale", "blk.0.attn_q.weight", "rope_freqs.weight", "", ".",
    ):  # fmt: skip
        assert our_name(strange) is None


def test_table_of_types_is_ggmls():
    constants = pytest.importorskip("gguf").constants
    for number, kind in TYPES.items():
        theirs = constants.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        assert constants.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random blocks, [rows, bytes] uint8, whose scales are small numbers."""
    rng = np.random.default_rng(seed)
    block = BY_NAME[kind]
    raw = rng.integers(0, 256, (rows, columns // block.block, block.block_bytes), np.uint8)
    small = (rng.random(raw.shape[:2]) * 0.01).astype(np.float16)[..., None].view(np.uint8)
    # where the float16 scales lie: first, last, or (IQ1_M) spread over the high nibbles
    places = {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
        "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2), "Q5_1": (0, 2),
    }  # fmt: skip
    for at in places.get(kind, (0,)):
        raw[..., at : at + 2] = small
    if kind == "IQ1_M":
        raw[..., 49::2] &= 0x0F
    if kind == "MXFP4":
        raw[..., 0] = 120
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", [k for k in BY_NAME if k not in ("F32", "F16", "BF16")])
def test_every_type_is_dequantized_a_block_of_rows_at_a_time(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    raw = blocks_of(kind, 768, 256)
    file = tiny(hidden_size=256, n_head=4, vocab_size=96)
    for tensor in file.tensors:
        if tensor.name == "blk.0.attn_qkv.weight":
            tensor.kind, tensor.data = BY_NAME[kind].number, raw.tobytes()
    tensor = read_checkpoint(file.write(tmp_path / "m.gguf")).tensors["h.0.attn.qkv.weight"]
    number = gguf.GGMLQuantizationType(BY_NAME[kind].number)
    expected = gguf.quants.dequantize(raw, number)[np.argsort(bloom_rows(4, 64))]
    assert tensor.dtype == "F32"
    for start, stop in ((0, 768), (100, 101), (130, 400)):
        np.testing.assert_array_equal(tensor.rows(start, stop), expected[start:stop])


@pytest.mark.parametrize("rows", [1, 31, 32, 70])
def test_q4_0_is_int4_in_groups_of_32_bit_for_bit(rows):
    gguf = pytest.importorskip("gguf")
    raw = blocks_of("Q4_0", rows, 96, seed=rows)
    raw[0, :2] = 0  # a block of scale 0
    parts, scheme = q4_0_parts(raw), get_scheme("int4", 32)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(scheme.dequantize(parts, (rows, 96)), expected)
    like = scheme.quantize(expected)
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
        k: (v.shape, v.dtype) for k, v in like.items()
    }
    padded = scheme.dequantize(parts, ((rows + 31) // 32 * 32, 96))
    assert not padded[rows:].any()


def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    check_readable(BY_NAME["BF16"], "w")
    file = tiny()
    file.tensors[0].kind, file.tensors[0].data = 2, bytes(96 * 36)
    with pytest.raises(CheckpointError, match=r"for which the gguf package is needed: pip install"):
        read_checkpoint(file.write(tmp_path / "m.gguf"))


# -- the head and the config -----------------------------------------------------------------------


def with_output(gguf: Gguf, change: float = 0) -> Gguf:
    table = gguf.tensors[0]
    array = np.frombuffer(table.data, np.float32).copy()
    array[-1] += change
    gguf.tensors.append(Tensor("output.weight", table.dims, 0, array.tobytes()))
    return gguf


def test_output_that_repeats_the_embedding_is_the_tied_head(tmp_path):
    checkpoint = read_checkpoint(with_output(tiny()).write(tmp_path / "m.gguf"))
    assert checkpoint.config.tie_word_embeddings
    assert not any("embedding" in note for note in checkpoint.notes)


def test_output_that_differs_is_a_head_of_its_own_and_noted(tmp_path):
    file = with_output(tiny(), 0.5).write(tmp_path / "m.gguf")
    checkpoint = read_checkpoint(file)
    assert not checkpoint.config.tie_word_embeddings
    assert any("differs from the embedding" in note for note in checkpoint.notes)


def test_config_is_that_of_the_checkpoint(tmp_path):
    gguf = tiny(n_layer=2)
    gguf.metadata["bloom.context_length"] = (U32, 2048)
    found = read_checkpoint(gguf.write(tmp_path / "m.gguf")).config
    assert found == read_checkpoint(write_checkpoint(tmp_path / "c", n_layer=2)).config
    assert found.layer_norm_epsilon == 1e-5  # not the float32 beside it


def test_context_that_is_the_hidden_size_is_a_converters_guess(tmp_path):
    gguf = tiny()
    gguf.metadata["bloom.context_length"] = (U32, 64)
    checkpoint = read_checkpoint(gguf.write(tmp_path / "m.gguf"))
    assert checkpoint.config.seq_length == 2048
    assert "is the hidden size, as of a converter that knew none" in checkpoint.notes[0]
    gguf.metadata["bloomq.version"] = (STRING, "1")  # bloomq knows it
    assert read_checkpoint(gguf.write(tmp_path / "m.gguf")).config.seq_length == 64
    del gguf.metadata["bloom.context_length"]
    assert read_checkpoint(gguf.write(tmp_path / "m.gguf")).config.seq_length == 2048


# -- what is a GGUF, and split ones ----------------------------------------------------------------


def test_a_folder_with_one_gguf_and_no_config_is_that_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    tiny().write(folder / "model.gguf")
    assert read_checkpoint(folder).provenance["name"] == "model.gguf"
    tiny().write(folder / "other.gguf")
    with pytest.raises(CheckpointError, match=r"holds model.gguf and 1 more and no other weights"):
        read_checkpoint(folder)
    assert gguf_parts.find_gguf(folder) is None
    assert gguf_parts.find_gguf(DEMO) is None
    assert gguf_parts.find_gguf(DEMO / "config.json") is None


def test_a_gguf_beside_a_config_alone_is_named(tmp_path):
    tiny().write(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds model\.gguf and no other weights: name the"):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs there")
def test_a_fifo_called_gguf_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is a FIFO, expected a GGUF file"):
        read_checkpoint(tmp_path)


def test_a_later_part_that_changes_underneath_is_an_error(tmp_path):
    first, *_, last = split(tiny(), tmp_path / "source")

    def touch(done: int, total: int) -> None:
        os.utime(last, ns=(0, 0))

    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: changed while it was"):
        convert(first, tmp_path / "pack", progress=touch)
    done = Pack.open(convert(first, tmp_path / "pack", checksum_source=True).pack)
    assert len(done.manifest["provenance"]["source_files"]) == 3


def split(gguf: Gguf, folder: Path, *edits: Callable[[list[Gguf]], object]) -> list[Path]:
    """The file in three parts, the metadata in the first, as llama-gguf-split writes them."""
    parts = []
    for i in range(3):
        metadata = dict(gguf.metadata) if i == 0 else {}
        metadata |= {
            "split.no": (2, i), "split.count": (2, 3),
            "split.tensors.count": (I32, len(gguf.tensors)),
        }  # fmt: skip
        parts.append(Gguf(metadata, gguf.tensors[i::3]))
    for edit in edits:
        edit(parts)
    folder.mkdir(exist_ok=True)
    return [part.write(folder / f"model-{i + 1:05}-of-00003.gguf") for i, part in enumerate(parts)]


def test_split_files_are_one_checkpoint(tmp_path):
    first, *_ = split(tiny(), tmp_path)
    expected = values(tiny().write(tmp_path.parent / "whole.gguf"))
    for source in (first, tmp_path):
        found = values(source)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_split_files_that_do_not_belong_together_are_refused(tmp_path):
    def refused(path: Path, words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(path)

    def edited(name: str, part: int, key: str, value: int) -> Path:
        """The first part's path, one part's metadata changed."""
        return split(
            tiny(), tmp_path / name, lambda p: p[part].metadata.update({key: (U32, value)})
        )[0]

    parts = split(tiny(), tmp_path / "missing")
    parts[1].unlink()
    refused(parts[0], "missing part of a split GGUF")
    refused(parts[2], "a later part of a split GGUF: give the first one")
    renamed = split(tiny(), tmp_path / "renamed")[0].rename(tmp_path / "one.gguf")
    refused(renamed, "is a part of 3, expected a name that ends in")
    refused(edited("a", 1, "split.no", 2), "does not call itself part 2 of 3")
    refused(edited("b", 2, "split.count", 4), "does not call itself part 3 of 3")
    refused(edited("c", 0, "split.no", 1), "is not the first of 3 parts: give that one")
    refused(edited("d", 0, "split.tensors.count", 7), "its parts hold 17 tensors, which is not")
    twice = split(tiny(), tmp_path / "e", lambda parts: parts[2].tensors.pop(),
                  lambda parts: parts[2].tensors.append(parts[1].tensors[0]))  # fmt: skip
    refused(twice[0], "another part, .* has it")


# -- the vocabulary --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DEMO_TOKENIZER.read_text(encoding="utf-8"))
    return content


def with_vocabulary(original: dict[str, Any], rows: int = 8200) -> Gguf:
    """A tiny model of 8,200 rows with the demo's 8,192 tokens."""
    gguf = tiny(hidden_size=4, n_head=1, vocab_size=rows)
    gguf.metadata |= vocabulary(original, rows)
    return gguf


def test_vocabulary_becomes_the_tokenizer_that_it_was(tmp_path, original):
    checkpoint = read_checkpoint(with_vocabulary(original).write(tmp_path / "m.gguf"))
    assert json.loads(checkpoint.tokenizer or b"") == original
    assert checkpoint.notes == ()
    assert checkpoint.settings == Settings()
    config = checkpoint.config
    ids = (config.unk_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert ids == (0, 1, 2, 3)


def test_rebuilt_tokenizer_encodes_and_decodes_as_the_original(tmp_path, original):
    theirs = BloomTokenizer.from_file(DEMO_TOKENIZER)
    checkpoint = read_checkpoint(with_vocabulary(original).write(tmp_path / "m.gguf"))
    ours = BloomTokenizer.from_bytes(checkpoint.tokenizer or b"")
    texts = [DEMO_TOKENIZER.read_text(encoding="utf-8")[:4000], "<s>a</s> <pad><unk>", " x  y\n\n"]
    texts += [bytes([i]).decode("latin-1") for i in range(256)]
    shuffled = random.Random(0)
    for length in (3, 30, 300):
        texts += ["".join(map(chr, shuffled.choices(range(0xD000), k=length))) for _ in range(50)]
    for text_ in texts:
        ids = theirs.encode(text_)
        assert ours.encode(text_) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    assert ours.vocab_size == theirs.vocab_size
    assert [ours.decode(i) for i in range(8192)] == [theirs.decode(i) for i in range(8192)]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("model", None, "has no vocabulary"),
        ("model", (STRING, "no_vocab"), "has no vocabulary"),
        ("model", (STRING, "llama"), "its tokenizer is 'llama', expected 'gpt2'"),
        ("pre", (STRING, "llama-bpe"), "its pre-tokenizer is 'llama-bpe', expected 'bloom'"),
        ("merges", None, "its vocabulary has no merges"),
        ("tokens", None, "its vocabulary has no tokens"),
    ],
    ids=["none", "no_vocab", "llama", "pre", "merges", "tokens"],
)
def test_vocabulary_that_is_not_blooms_is_left_out_and_noted(tmp_path, original, key, value, why):
    gguf = with_vocabulary(original)
    gguf.metadata.pop(f"tokenizer.ggml.{key}")
    gguf.metadata |= {f"tokenizer.ggml.{key}": value} if value else {}
    file = gguf.write(tmp_path / "m.gguf")
    checkpoint = read_checkpoint(file)
    assert checkpoint.tokenizer is None
    note = f"{file}: {why}: the pack will take token ids only, not text"
    assert checkpoint.notes == (note,)


def test_old_converters_types_and_missing_names_are_understood(tmp_path, original):
    gguf = with_vocabulary(original)
    types = [1] * 8192 + [4] * 8  # all normal, padding user-defined
    gguf.metadata["tokenizer.ggml.token_type"] = (ARRAY, (I32, types))
    del gguf.metadata["tokenizer.ggml.pre"]
    checkpoint = read_checkpoint(gguf.write(tmp_path / "m.gguf"))
    assert json.loads(checkpoint.tokenizer or b"") == original
    assert "names no pre-tokenizer: BLOOM's is taken" in checkpoint.notes[0]
    del gguf.metadata["tokenizer.ggml.token_type"]
    gguf.metadata["tokenizer.ggml.tokens"] = (ARRAY, (STRING, list(original["model"]["vocab"])))
    checkpoint = read_checkpoint(gguf.write(tmp_path / "m.gguf"))
    assert json.loads(checkpoint.tokenizer or b"") == original


def test_special_tokens_and_chat_templates_become_settings(tmp_path, original):
    gguf = with_vocabulary(original)
    gguf.metadata["tokenizer.ggml.padding_token_id"] = (U32, 2)
    gguf.metadata["tokenizer.chat_template"] = (STRING, "{{ x }}")
    gguf.metadata["tokenizer.chat_templates"] = (ARRAY, (STRING, ["tool", "gone"]))
    gguf.metadata["tokenizer.chat_template.tool"] = (STRING, "{{ y }}")
    checkpoint = read_checkpoint(gguf.write(tmp_path / "m.gguf"))
    assert checkpoint.settings.special["pad_token"] == "</s>"
    assert checkpoint.config.pad_token_id == 2
    assert checkpoint.settings.chat_templates == {"default": "{{ x }}", "tool": "{{ y }}"}


TOKENS = "tokenizer.ggml.tokens"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (TOKENS, (U32, 7), "metadata tokenizer.ggml.tokens is 7, expected a list of texts"),
        (TOKENS, (ARRAY, (STRING, ["a"] * 97)), "97 tokens for the 96 rows of the embedding"),
        (TOKENS, (ARRAY, (STRING, ["a", "a"])), "tokens 0 and 1 are both 'a'"),
        ("token_type", (ARRAY, (I32, [1])), "does not give each of 3 tokens its type"),
        ("token_type", (ARRAY, (F32, [1, 1, 1])), "does not give each of 3 tokens its type"),
        ("token_type", (STRING, "abc"), "does not give each of 3 tokens its type"),
        ("merges", (ARRAY, (STRING, ["ab"])), "merge 0 is 'ab', expected two tokens"),
        ("merges", (ARRAY, (STRING, ["a  b"])), "merge 0 is 'a  b', expected two tokens"),
        ("merges", (ARRAY, (STRING, ["a c"])), "merge 0, 'a c', is not of the file's tokens"),
        ("bos_token_id", (U32, 3), "bos_token_id is 3, expected the number of one of 3 tokens"),
        ("eos_token_id", (BOOL, b"\1"), "eos_token_id is True, expected"),
        ("add_bos_token", (BOOL, b"\1"), "add_bos_token is set, and this tokenizer adds no token"),
        ("add_eos_token", (BOOL, b"\1"), "add_eos_token is set"),
    ],
    ids=["type", "many", "twice", "few", "float", "text", "one", "three", "foreign", "id", "bool",
         "bos", "eos"],
)  # fmt: skip
def test_damaged_vocabularies_are_refused(tmp_path, key, value, words):
    gguf = tiny()
    gguf.metadata |= {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        TOKENS: (ARRAY, (STRING, ["a", "b", "ab"])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
    }
    assert read_checkpoint(gguf.write(tmp_path / "m.gguf")).tokenizer is not None
    gguf.metadata[key if key == TOKENS else f"tokenizer.ggml.{key}"] = value
    with pytest.raises(BloomqError) as caught:
        read_checkpoint(gguf.write(tmp_path / "m.gguf"))
    assert words in str(caught.value)


def test_tokenizers_go_into_metadata_and_back(tmp_path, original):
    config = BloomConfig(hidden_size=4, n_head=1, n_layer=1, vocab_size=8200)
    template = Settings(chat_templates={"default": "{{ x }}", "rag": "{{ y }}"})
    data = json.dumps(original).encode()
    found = write_tokenizer(data, config, template, tmp_path)
    assert found["tokenizer.ggml.pre"] == "bloom"
    assert found["tokenizer.ggml.tokens"][8199] == "[PAD8199]"
    again = read_tokenizer(found, 8200, tmp_path)
    assert (json.loads(again[0] or b""), again[1], again[2]) == (original, template, ())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("pre_tokenizer", lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True)),
        ("normalizer", lambda t: t.update(normalizer={"type": "NFC"})),
        ("decoder", lambda t: t.update(decoder={"type": "BPEDecoder"})),
        ("post_processor", lambda t: t.update(post_processor={"type": "TemplateProcessing"})),
        ("model", lambda t: t["model"].update(byte_fallback=True)),
        ("added_tokens", lambda t: t["added_tokens"][0].update(lstrip=True)),
        ("merges", lambda t: t["model"].update(merges=[["a b", "c"]])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_gguf_cannot_carry_is_refused_by_name(tmp_path, original, field, change):
    content = json.loads(json.dumps(original))
    change(content)
    config = BloomConfig(hidden_size=4, n_head=1, n_layer=1, vocab_size=8200)
    with pytest.raises(TokenizerError, match=f"its {field} is not BLOOM's, which a GGUF cannot"):
        write_tokenizer(json.dumps(content).encode(), config, Settings(), tmp_path)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_no_tokenizer_is_refused_whatever_it_is(tmp_path, data):
    with pytest.raises(TokenizerError, match=r"no tokenizer.json that could become a GGUF's"):
        write_tokenizer(data, BloomConfig(vocab_size=9), Settings(), tmp_path)


def test_more_tokens_than_rows_do_not_fit(tmp_path, original):
    config = BloomConfig(hidden_size=4, n_head=1, n_layer=1, vocab_size=100)
    with pytest.raises(TokenizerError, match="has none of 100 rows"):
        write_tokenizer(json.dumps(original).encode(), config, Settings(), tmp_path)


# -- damage ----------------------------------------------------------------------------------------


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def setting(key: str, kind: int, value: Any) -> Edit:
    return lambda g: g.metadata.update({key: (kind, value)})


def tensor(**changed: Any) -> Edit:
    """Change the third tensor, a bias of q, k and v."""
    return lambda g: g.tensors.__setitem__(2, replace(g.tensors[2], **changed))


def more(data: bytes) -> Edit:
    return lambda g: g.more_entries.append(data)


HUGE = (1 << 64) - 1
DAMAGE: dict[str, tuple[Edit, str]] = {
    "magic": (lambda g: setattr(g, "magic", b"GGML"), "is a file, expected the folder"),
    "version 1": (lambda g: setattr(g, "version", 1), "GGUF version 1, expected 2 or 3"),
    "version 4": (lambda g: setattr(g, "version", 4), "GGUF version 4, expected 2 or 3"),
    "big-endian": (lambda g: setattr(g, "order", ">"), "is big-endian, expected little-endian"),
    "entries": (
        lambda g: setattr(g, "n_entries", HUGE), "metadata entries cannot lie in",
    ),
    "one entry more": (lambda g: setattr(g, "n_entries", 9), ""),
    "one entry less": (lambda g: setattr(g, "n_entries", 7), ""),
    "tensors": (lambda g: setattr(g, "n_tensors", 1 << 63), "tensors cannot lie in"),
    "one tensor more": (lambda g: setattr(g, "n_tensors", 22), ""),
    "one tensor less": (lambda g: setattr(g, "n_tensors", 16), "the checkpoint is incomplete"),
    "long key": (more(struct.pack("<Q", HUGE)), "the name of a metadata entry has 18446744073709"),
    "key beyond": (more(struct.pack("<Q", 1 << 20)), "goes beyond the file's"),
    "key not UTF-8": (more(entry(b"\xff", U8, b"\0")), "the name of a metadata entry is no UTF-8"),
    "text not UTF-8": (more(entry("a", STRING, text(b"\xc3"))), "metadata a is no UTF-8: damaged"),
    "same key": (more(entry("general.architecture", U8, b"\0")), "architecture is given twice"),
    "value type": (more(entry("a", 13, b"")), "metadata a has value type 13, expected 0 to 12"),
    "element type": (
        more(entry("a", ARRAY, struct.pack("<IQ", 99, 1))), "metadata a has value type 99",
    ),
    "array of arrays": (
        more(entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1))), "metadata a is an array of arrays",
    ),
    "long array": (
        more(entry("a", ARRAY, struct.pack("<IQ", F64, HUGE))), "metadata a goes beyond the file's",
    ),
    "long list": (
        more(entry("a", ARRAY, struct.pack("<IQ", STRING, 1 << 61))), "metadata a goes beyond",
    ),
    "neither true nor false": (more(entry("a", BOOL, b"\2")), "metadata a is neither true nor"),
    "control codes": (more(entry("a\n", 13, b"")), r"metadata 'a\n' has value type"),
    "alignment 0": (
        setting("general.alignment", U32, 0), "general.alignment is 0, expected a power of two",
    ),
    "alignment 24": (setting("general.alignment", U32, 24), "general.alignment is 24"),
    "alignment 2^31": (setting("general.alignment", U32, 1 << 31), "general.alignment is 21474"),
    "alignment as text": (setting("general.alignment", STRING, "32"), "general.alignment is '32'"),
    "alignment as float": (setting("general.alignment", F32, 32), "general.alignment is 32.0"),
    "alignment as list": (
        setting("general.alignment", ARRAY, (U32, [32])), "general.alignment is an array of 1",
    ),
    "alignment 4096": (setting("general.alignment", U32, 4096), ""),
    "long tensor name": (
        tensor(name="x" * 65), "the name of a tensor has 65 bytes, expected up to 64",
    ),
    "same tensor": (tensor(name="token_embd.weight"), "two tensors are called token_embd.weight"),
    "foreign tensor": (tensor(name="rope_freqs"), "no tensor of a BLOOM as llama.cpp names them"),
    "no dimensions": (tensor(dims=()), "has 0 dimensions, expected 1 to 4"),
    "five dimensions": (tensor(dims=(1,) * 5), "has 5 dimensions, expected 1 to 4"),
    "empty": (tensor(dims=(0,)), "is [0]: a tensor without elements"),
    "overflow": (tensor(dims=(1 << 32, 1 << 32)), "the file has"),
    "overflow to 0": (tensor(dims=(1 << 63, 1 << 63, 4, 4)), "the file has"),
    "ggml type 4": (tensor(kind=4), "is of ggml type 4, which bloomq does not read"),
    "ggml type 2^32": (tensor(kind=HUGE >> 32), "is of ggml type 4294967295"),
    "half a block": (tensor(kind=12), "rows of 192, expected a multiple of 256, the block of Q4_K"),
    "vector in blocks": (tensor(kind=8), "a vector in blocks of Q8_0, expected F32"),
    "unaligned": (tensor(offset=4), "has offset 4, expected a multiple of"),
    "beyond": (tensor(offset=1 << 40), "ends at byte"),
    "offset overflows": (tensor(offset=HUGE - 31), "ends at byte"),
    "overlap": (tensor(offset=0), "begins inside"),
    "shape": (tensor(dims=(191,)), "expected [192] by the sizes it states"),
    "matrix for vector": (tensor(dims=(96, 2)), "expected [192]"),
    "no embedding": (
        lambda g: g.tensors.pop(0), "no tensor token_embd.weight: not a whole model",
    ),
    "no norm": (lambda g: g.tensors.pop(), "no tensor blk.0.ffn_norm.bias: the checkpoint"),
    "architecture": (
        setting("general.architecture", STRING, "llama"), "its architecture is 'llama', expected",
    ),
    "architecture as number": (setting("general.architecture", U8, 3), "its architecture is 3"),
    "no architecture": (
        lambda g: g.metadata.pop("general.architecture"), "its architecture is None",
    ),
    "adapter": (setting("general.type", STRING, "adapter"), "holds a 'adapter', expected a model"),
    "type as list": (setting("general.type", ARRAY, (U8, [1, 2])), "holds a an array of 2"),
    "no hidden size": (
        lambda g: g.metadata.pop("bloom.embedding_length"), "metadata has no bloom.embedding_len",
    ),
    "hidden size as float": (
        setting("bloom.embedding_length", F32, 64.0), "is 64.0, expected a whole number",
    ),
    "hidden size as list": (
        setting("bloom.embedding_length", ARRAY, (U32, [64])), "expected a whole number",
    ),
    "hidden size of another": (setting("bloom.embedding_length", U32, 68), "feed_forward_length"),
    "hidden size 0": (setting("bloom.embedding_length", U32, 0), "feed_forward_length is 256"),
    "width": (
        setting("bloom.feed_forward_length", U32, 128), "feed_forward_length is 128, expected 256",
    ),
    "heads": (setting("bloom.attention.head_count", U32, 0), "head_count_kv is 4, expected 0"),
    "grouped heads": (setting("bloom.attention.head_count_kv", U32, 2), "no BLOOM has another"),
    "layers": (setting("bloom.block_count", U32, 0), "n_layer is 0, expected a whole number"),
    "missing layer": (setting("bloom.block_count", U32, 2), "the checkpoint is incomplete"),
    "billions of layers": (setting("bloom.block_count", U32, HUGE >> 32), "n_layer is 4294967295"),
    "epsilon as text": (
        setting("bloom.attention.layer_norm_epsilon", STRING, "1"), "expected a number such as",
    ),
    "epsilon 2": (
        setting("bloom.attention.layer_norm_epsilon", F32, 2.0), "layer_norm_epsilon is 2.0",
    ),
    "epsilon not a number": (
        setting("bloom.attention.layer_norm_epsilon", F32, float("nan")), "layer_norm_epsilon is",
    ),
    "context": (setting("bloom.context_length", U32, 0), "seq_length is 0"),
    "split without a name": (setting("split.count", 2, 2), "is a part of 2, expected a name"),
    "end token": (
        setting("tokenizer.ggml.eos_token_id", U32, 96), "eos_token_id is 96, expected a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_error_that_names_the_file(tmp_path, name):
    edit, words = DAMAGE[name]
    gguf = tiny()
    edit(gguf)
    file = gguf.write(tmp_path / "m.gguf")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_checkpoint(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert words in message
    assert "\n" not in message
    assert not message.endswith(".")


def parse(data: bytes) -> None:
    """What a fuzzer calls: any bytes give a header or a CheckpointError."""
    parse_header(io.BytesIO(data), len(data), Path("m.gguf"))


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    data = tiny(hidden_size=4, n_head=1, vocab_size=8).to_bytes()
    parse(data)
    for length in range(len(data) - 16):  # the last vector has 16 bytes
        with pytest.raises(CheckpointError):
            parse(data[:length])
    with pytest.raises(CheckpointError, match="5 bytes: not a GGUF file"):
        parse(b"GGUF\3")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        parse(bytes(100))


def test_flipped_bytes_give_a_checkpoint_or_an_error(tmp_path):
    gguf = tiny(hidden_size=4, n_head=1, vocab_size=8)
    gguf.metadata |= {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        TOKENS: (ARRAY, (STRING, ["a", "b", "ab"])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, [1, 1, 1])),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
    }
    data = bytearray(gguf.to_bytes())
    file, end = tmp_path / "m.gguf", len(data) - sum(len(t.data) + 16 for t in gguf.tensors)
    tried, read = 0, 0
    for at in range(0, end, 11):
        for flip in (1, 0x80):
            data[at] ^= flip
            file.write_bytes(data)
            tried += 1
            with suppress(BloomqError):
                read_checkpoint(file)
                read += 1
            data[at] ^= flip
    assert 0 < read < tried / 2  # nearly all of a header means something


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_behind_the_magic_are_a_header_or_an_error(data):
    for version in (b"\2\0\0\0", b"\3\0\0\0"):
        with suppress(CheckpointError):
            parse(b"GGUF" + version + data)


def test_header_beyond_its_bound_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "m.gguf"
    long = entry("a", STRING, struct.pack("<Q", HEADER_BYTES - 40))
    gguf = Gguf({}, [], more_entries=[long])
    with file.open("wb") as sparse:
        sparse.write(gguf.to_bytes())
        sparse.truncate(1 << 34)
    with pytest.raises(CheckpointError, match="where no header of a BLOOM reaches"):
        read_checkpoint(file)
    gguf.more_entries = [entry("a", STRING, struct.pack("<Q", HEADER_BYTES + 1))]
    with pytest.raises(CheckpointError, match=f"expected up to {HEADER_BYTES}"):
        read_checkpoint(gguf.write(file))


def test_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    file = tiny().write(tmp_path / "m.gguf")
    checkpoint = read_checkpoint(file)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="it changed"):
        checkpoint.tensors["ln_f.bias"].rows(0, 64)
    data = tiny().to_bytes()
    with pytest.raises(CheckpointError, match="grew shorter while its header was read"):
        parse_header(io.BytesIO(data[:100]), len(data), file)


def test_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_packed_numbers_are_as_wide_as_the_format_says():
    assert packed(U32, 1) == b"\1\0\0\0"
