"""Packs as Hugging Face checkpoints: transformers computes what the pack does, `convert` makes the
pack again, and a target is whole, as it was, or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert
from bloomq.converters.export import FORMATS, export, huggingface, whole_folder
from bloomq.converters.export.huggingface import is_export, write
from bloomq.converters.reading import read_checkpoint
from click.testing import CliRunner, Result
from conftest import write_checkpoint

import bloomq
from bloomq.cli import commands
from bloomq.errors import InputNotFound, NumericError, OutputError, PackError, UsageError
from bloomq.pack import Pack
from bloomq.schemes import f32_to_bf16
from bloomq.tensorfile import TensorFile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny("int8")`: a pack of a random model, made once. Do not write into it."""
    base = tmp_path_factory.mktemp("tiny")
    write_checkpoint(base / "checkpoint", hidden_size=60, vocab_size=77, n_layer=2)

    def pack(scheme: str) -> Path:
        if not (base / scheme).exists():
            convert(base / "checkpoint", base / scheme, scheme=scheme)
        return base / scheme

    return pack


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(kind: type[Exception], pack: Path, target: Path, **options: Any) -> str:
    """The message with which the export is refused; what is there stays, and nothing is added."""
    before = names(target.parent)
    with pytest.raises(kind) as caught:
        export(pack, target, **options)
    assert type(caught.value) is kind
    assert names(target.parent) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_pack_of_an_export_is_the_pack(tmp_path, dtype):
    source = write_checkpoint(tmp_path / "a" / "checkpoint", dtype=dtype, n_layer=2, vocab_size=77)
    convert(source, tmp_path / "a" / "pack", scheme=dtype.lower())
    done = export(tmp_path / "a" / "pack", tmp_path / "b" / "checkpoint")
    convert(tmp_path / "b" / "checkpoint", tmp_path / "b" / "pack", scheme=dtype.lower())
    assert contents(tmp_path / "b" / "pack") == contents(tmp_path / "a" / "pack")
    assert done.nbytes == sum(len(data) for data in contents(done.target).values())
    assert (done.to, done.dtype) == ("huggingface", "auto")


def test_the_demo_there_and_back_is_the_same_to_the_byte(pack_of, tmp_path):
    export(pack_of("bf16"), tmp_path / "bloom-demo")
    convert(tmp_path / "bloom-demo", tmp_path / "pack", scheme="bf16")
    assert contents(tmp_path / "pack") == contents(pack_of("bf16"))


def test_blocks_of_any_size_give_the_same_bytes(tiny, tmp_path, monkeypatch):
    for scheme in ("nl4", "int4", "int8", "bf16"):
        export(tiny(scheme), tmp_path / "whole" / scheme)
        monkeypatch.setattr(huggingface, "_BLOCK_BYTES", 7 * 60 * 4)
        export(tiny(scheme), tmp_path / "blocks" / scheme)
        monkeypatch.undo()
        assert contents(tmp_path / "blocks" / scheme) == contents(tmp_path / "whole" / scheme)


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 200_000])
def test_files_of_any_size_hold_the_same_model(tiny, tmp_path, shard_bytes):
    (tmp_path / "sharded").mkdir()
    target = tmp_path / "sharded" / "checkpoint"
    write(Pack.open(tiny("f32")), target, shard_bytes=shard_bytes)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("model-*-of-*.safetensors"))
    assert len(files) > 1
    assert {path.name for path in files} == set(index["weight_map"].values())
    sizes = [sum(e.nbytes for e in TensorFile.open(path).entries.values()) for path in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    for path, size in zip(files, sizes, strict=True):
        assert size <= shard_bytes or len(TensorFile.open(path).entries) == 1
    convert(target, tmp_path / "sharded" / "pack", scheme="f32")
    assert contents(tmp_path / "sharded" / "pack") == contents(tiny("f32"))


def test_the_dtype_is_that_of_floats_and_exact_for_others(tiny, tmp_path):
    found = {}
    for scheme in ("f32", "bf16", "f16", "int8", "int4"):
        export(tiny(scheme), tmp_path / scheme)
        found[scheme] = json.loads((tmp_path / scheme / "config.json").read_text())["torch_dtype"]
        restored = Pack.open(tiny(scheme)).matrix("h.1.mlp.up").dequantize()
        rows = read_checkpoint(tmp_path / scheme).tensors["h.1.mlp.up.weight"].rows(0, 240)
        stored = f32_to_bf16(restored) if scheme == "bf16" else restored
        assert np.array_equal(rows, stored)
    assert found == {
        "f32": "float32", "bf16": "bfloat16", "f16": "float16", "int8": "float32",
        "int4": "float32",
    }  # fmt: skip


def test_progress_ends_at_all_bytes_of_the_tensors(tiny, tmp_path):
    seen: list[tuple[int, int]] = []
    export(tiny("int8"), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert totals == {read_checkpoint(tmp_path / "out").nbytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_tensors_are_named_and_laid_out_as_others_expect(tiny, tmp_path):
    export(tiny("f32"), tmp_path / "out")
    file = TensorFile.open(tmp_path / "out" / "model.safetensors")
    assert file.metadata["format"] == "pt"
    assert "transformer.h.0.self_attention.query_key_value.weight" in file.entries
    assert "lm_head.weight" not in file.entries
    assert all(entry.start % 8 == 0 for entry in file.entries.values())


def test_labels_and_problem_are_written_as_transformers_spells_them(tmp_path):
    def with_score(tensors):
        tensors["score.weight"] = ("F32", np.ones((3, 64), np.float32))

    config = {
        "architectures": ["BloomForSequenceClassification"], "problem_type": "regression",
        "id2label": {"0": "no", "1": "maybe", "2": "yes"}, "pad_token_id": 3,
    }  # fmt: skip
    source = write_checkpoint(tmp_path / "checkpoint", config=config, edit=with_score)
    convert(source, tmp_path / "pack")
    export(tmp_path / "pack", tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert raw["label2id"] == {"no": 0, "maybe": 1, "yes": 2}
    assert raw["problem_type"] == "regression"
    assert "labels" not in raw
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert read_checkpoint(tmp_path / "out").config == Pack.open(tmp_path / "pack").config


@pytest.mark.parametrize(
    "templates",
    [
        "{{ messages }}",
        [{"name": "default", "template": "{{ a }}"}, {"name": "tool", "template": "{{ b }}"}],
        [{"name": "rag", "template": "{{ a }}"}],
        None,
    ],
    ids=["one", "several", "one of another name", "none"],
)
def test_settings_of_the_tokenizer_come_back(tmp_path, templates):
    source = write_checkpoint(tmp_path / "checkpoint")
    (source / "tokenizer.json").write_text("{}")
    settings = {"padding_side": "right", "pad_token": "</s>", "chat_template": templates}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "pack")
    export(tmp_path / "pack", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert read_checkpoint(tmp_path / "out").settings == read_checkpoint(source).settings


def test_a_pack_without_a_tokenizer_gives_none(tiny, tmp_path):
    export(tiny("f32"), tmp_path / "out")
    assert names(tmp_path / "out") == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip


# -- against transformers --------------------------------------------------------------------------

KINDS = (
    "BloomModel", "BloomForCausalLM", "BloomForSequenceClassification",
    "BloomForTokenClassification", "BloomForQuestionAnswering",
)  # fmt: skip
# Float32 sums in another order: as in test_modeling_parity. In 16 bits each weight is off by up to
# half a unit of its last place, and errors of 9 products in a row add.
LIMITS = {"f32": 1e-5, "f16": 9 * 2.0**-11, "bf16": 9 * 2.0**-8}


@pytest.fixture(scope="module")
def oracle() -> Iterator[Any]:
    found = pytest.importorskip("oracle")
    with found.one_torch_thread():
        yield found


def loaded(oracle: Any, kind: str, folder: Path) -> Any:
    """transformers' model of an export, which has every weight and no other."""
    model, info = getattr(oracle.transformers, kind).from_pretrained(
        folder, dtype=oracle.torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_the_pack_does(oracle, tmp_path, kind, scheme, dtype):
    spec = oracle.Spec(kind=kind, n_head=6, head_dim=10)
    convert(oracle.saved(tmp_path, spec), tmp_path / "pack", scheme=scheme)
    export(tmp_path / "pack", tmp_path / "out", dtype=dtype)
    ids = oracle.ids_of(spec, 2, 7)
    ours = getattr(bloomq, kind).from_pretrained(tmp_path / "pack", backend="reference")(ids)
    theirs = oracle.ask(loaded(oracle, kind, tmp_path / "out"), ids)
    for field in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if field in ours:
            assert oracle.off(ours[field], theirs[field]) < LIMITS[dtype], field


def test_an_untied_head_is_one_in_transformers(oracle, tmp_path):
    spec = oracle.Spec(tied=False)
    convert(oracle.saved(tmp_path, spec), tmp_path / "pack", scheme="int8")
    export(tmp_path / "pack", tmp_path / "out")
    theirs = loaded(oracle, "BloomForCausalLM", tmp_path / "out")
    assert not theirs.config.tie_word_embeddings
    ids = oracle.ids_of(spec, 1, 5)
    ours = bloomq.BloomForCausalLM.from_pretrained(tmp_path / "pack", backend="reference")(ids)
    assert oracle.off(ours.logits, oracle.ask(theirs, ids).logits) < LIMITS["f32"]


def test_a_sharded_demo_is_loaded_with_its_dtype_and_its_tokenizer(oracle, pack_of, tmp_path):
    write(Pack.open(pack_of("bf16")), tmp_path / "out", shard_bytes=3_000_000)
    assert len(list(tmp_path.glob("out/model-*.safetensors"))) > 2
    transformers = oracle.transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(model).__name__ == "BloomForCausalLM"
    assert model.dtype == oracle.torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "<pad>"
    text = "Il était une fois"
    ours = bloomq.BloomTokenizer.from_pretrained(pack_of("bf16"))
    assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]


def test_transformers_keeps_nothing_by_which_its_files_look_like_ours(oracle, tiny, tmp_path):
    export(tiny("f32"), tmp_path / "out")
    assert is_export(tmp_path / "out")
    loaded(oracle, "BloomForCausalLM", tmp_path / "out").save_pretrained(tmp_path / "out")
    assert not is_export(tmp_path / "out")
    assert "is there, and is not just an export" in refused(
        OutputError, tiny("f32"), tmp_path / "out", force=True
    )


# -- weights that do not fit -----------------------------------------------------------------------


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    def large(tensors):
        tensors["transformer.ln_f.bias"][1][5] = 70000.0

    convert(write_checkpoint(tmp_path / "checkpoint", edit=large), tmp_path / "pack", scheme="int8")
    message = refused(NumericError, tmp_path / "pack", tmp_path / "out", dtype="f16")
    expected = f"{tmp_path / 'pack'}: ln_f.bias holds NaN, or values that f16 cannot: choose f32"
    assert message == expected
    export(tmp_path / "pack", tmp_path / "out", dtype="bf16")


# -- the target ------------------------------------------------------------------------------------


def test_an_empty_folder_is_taken(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    export(tiny("f32"), tmp_path / "out")
    assert is_export(tmp_path / "out")


def test_folders_above_are_made_and_removed_again(tiny, tmp_path):
    export(tiny("f32"), tmp_path / "a" / "b" / "out")
    assert is_export(tmp_path / "a" / "b" / "out")
    write(Pack.open(tiny("f32")), tmp_path / "link" / "out")

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny("f32"), tmp_path / "c" / "d" / "out", progress=fail)
    assert names(tmp_path) == ["a", "link"]


def test_an_export_is_replaced_by_force_alone(tiny, tmp_path):
    export(tiny("f32"), tmp_path / "out")
    before = contents(tmp_path / "out")
    assert refused(OutputError, tiny("int8"), tmp_path / "out") == (
        f"{tmp_path / 'out'}: already exists: --force replaces an earlier export"
    )
    assert contents(tmp_path / "out") == before
    export(tiny("int8"), tmp_path / "out", force=True)
    assert contents(tmp_path / "out") != before
    assert names(tmp_path) == ["out"]


def spoil_by_a_file(out: Path) -> None:
    (out / "README.md").write_text("mine")


def spoil_by_a_folder(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "config.json").mkdir()


def spoil_the_weights(out: Path) -> None:
    (out / "model.safetensors").write_bytes(b"mine")


def remove_the_weights(out: Path) -> None:
    (out / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "spoil", [spoil_by_a_file, spoil_by_a_folder, spoil_the_weights, remove_the_weights]
)
def test_what_is_not_just_an_export_is_never_replaced(tiny, tmp_path, spoil):
    export(tiny("f32"), tmp_path / "out")
    spoil(tmp_path / "out")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    message = refused(OutputError, tiny("f32"), tmp_path / "out", force=True)
    assert message == (
        f"{tmp_path / 'out'}: is there, and is not just an export: choose another name"
    )
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("force", [False, True])
def test_packs_checkpoints_and_files_are_never_replaced(tiny, tmp_path, force):
    shutil.copytree(tiny("int8"), tmp_path / "pack")
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("mine")
    for name in ("pack", "checkpoint", "file"):
        refused(OutputError, tiny("int8"), tmp_path / name, force=force)
    refused(OutputError, tmp_path / "pack", tmp_path / "pack", force=force)
    Pack.open(tmp_path / "pack").verify()


def test_a_link_to_an_export_keeps_pointing_at_the_new_one(tiny, tmp_path):
    export(tiny("f32"), tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    export(tiny("int8"), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "out"]


@pytest.mark.parametrize("at", [1, 20])
def test_an_interrupt_keeps_the_export_it_was_to_replace(tiny, tmp_path, at):
    export(tiny("f32"), tmp_path / "out")
    before = contents(tmp_path / "out")
    seen = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny("int8"), tmp_path / "out", force=True, progress=interrupt)
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_taken_over(tiny, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    export(tiny("f32"), tmp_path / "old")
    (tmp_path / "old" / "config.json").unlink()  # killed while it was removed
    (tmp_path / "old").rename(tmp_path / ".out.old")
    export(tiny("f32"), tmp_path / "out")
    assert names(tmp_path) == ["out"]
    (tmp_path / ".out.old").mkdir()
    export(tiny("f32"), tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def test_what_lies_in_the_way_and_is_not_ours_stays(tiny, tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "mine").write_text("mine")
    assert refused(OutputError, tiny("f32"), tmp_path / "out") == (
        f"{tmp_path / 'out'}: {tmp_path / '.out.old'} lies in the way: rename or remove it"
    )


def test_a_rename_that_fails_brings_the_old_export_back(tiny, tmp_path, monkeypatch):
    export(tiny("f32"), tmp_path / "out")
    before = contents(tmp_path / "out")
    rename = Path.rename

    def failing(self, target):
        if self.name == ".out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    message = refused(OutputError, tiny("int8"), tmp_path / "out", force=True)
    assert message == f"{tmp_path / 'out'}: cannot be written: Input/output error"
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(sys.platform == "win32", reason="no flock there")
def test_a_second_export_to_one_target_is_told_to_wait(tiny, tmp_path):
    def second(done: int, total: int) -> None:
        if done < total:
            with pytest.raises(OutputError, match="is writing it: wait for it"):
                export(tiny("int8"), tmp_path / "out")

    export(tiny("f32"), tmp_path / "out", progress=second)
    assert is_export(tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_up_front(tiny, tmp_path, monkeypatch):
    little = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: little)
    message = refused(OutputError, tiny("f32"), tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out'}: the export takes 0.")
    assert message.endswith(" MB, 0.0 MB are free: choose another disk or a smaller dtype")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, "disk full: "), (errno.EIO, "cannot be written: Input/output error")],
)
def test_an_error_of_the_disk_leaves_nothing(tiny, tmp_path, monkeypatch, number, expected):
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    message = refused(OutputError, tiny("f32"), tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out'}: {expected}")
    assert names(tmp_path) == []


# -- options ---------------------------------------------------------------------------------------


def test_what_is_no_format_or_dtype_is_named(tiny, tmp_path):
    target = tmp_path / "out"
    assert refused(UsageError, tiny("f32"), target, to="onnx") == (
        "format 'onnx' to export to, expected one of huggingface, gguf"
    )
    assert refused(UsageError, tiny("f32"), target, dtype="int8") == (
        "dtype 'int8' for huggingface, expected one of auto, f32, bf16, f16"
    )
    with pytest.raises(UsageError, match="no checkpoint is of dtype 'q4_0', expected auto, f32"):
        write(Pack.open(tiny("f32")), target, dtype="q4_0")
    with pytest.raises(UsageError, match="files of 0 bytes of tensors, expected at least 1"):
        write(Pack.open(tiny("f32")), target, shard_bytes=0)


def test_a_file_of_safetensors_is_no_target(tiny, tmp_path):
    target = tmp_path / "model.safetensors"
    assert refused(UsageError, tiny("f32"), target) == (
        f"{target}: the Hugging Face format is a folder: name one, without ending"
    )


def test_what_is_no_pack_is_named(demo_checkpoint, tmp_path):
    assert "no such pack" in refused(InputNotFound, tmp_path / "none", tmp_path / "out")
    assert "not a pack" in refused(PackError, demo_checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "to", "found"),
    [("x.gguf", None, "gguf"), ("x", "gguf", "gguf"), ("x.gguf", "huggingface", "huggingface")],
)
def test_the_format_is_that_of_the_ending_or_the_one_asked_for(
    tiny, tmp_path, monkeypatch, name, to, found
):
    def written(pack, target, *, dtype, progress=None):
        target.write_bytes(f"GGUF {dtype}".encode())

    module = types.SimpleNamespace(
        DTYPES=("auto", "q8_0"), write=written, notes=lambda pack, dtype: (f"as {dtype}",)
    )
    monkeypatch.setitem(sys.modules, "bloomq.converters.export.gguf", module)
    assert export(tiny("f32"), tmp_path / name, to=to).to == found
    assert (tmp_path / name).is_file() is (found == "gguf")
    if found == "gguf":
        refused(OutputError, tiny("f32"), tmp_path / name, to=to)
        again = export(tiny("f32"), tmp_path / name, to=to, force=True, dtype="q8_0")
        assert again.notes == ("as q8_0",)
        assert (tmp_path / name).read_bytes() == b"GGUF q8_0"
    assert set(FORMATS) == {"huggingface", "gguf"}


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["export", *map(str, arguments)])


def test_the_command_says_what_it_wrote(tiny, tmp_path):
    done = run(tiny("int8"), tmp_path / "out", "--dtype", "bf16")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path / 'out'}: huggingface, 0.")
    assert is_export(tmp_path / "out")


def test_the_command_speaks_json(tiny, tmp_path):
    done = run(tiny("int8"), tmp_path / "out", "--json", "--to", "huggingface")
    result = json.loads(done.stdout)
    assert result["target"] == str(tmp_path / "out")
    assert result["to"] == "huggingface"
    assert result["nbytes"] == sum(map(len, contents(tmp_path / "out").values()))
    assert result["notes"] == []


def test_the_command_says_what_would_not_be_expected(demo_checkpoint, tmp_path):
    bloomq.convert(demo_checkpoint, tmp_path / "pack", scheme="nl4")
    done = run(tmp_path / "pack", tmp_path / "m.gguf")
    assert "note: GGUF holds nl4 as Q8_0, in more bits: for a small file" in done.stderr
    done = run(tmp_path / "pack", tmp_path / "m.gguf", "--force", "--json")
    (note,) = json.loads(done.stdout)["notes"]
    assert note.startswith("GGUF holds nl4 as Q8_0")


def test_the_command_replaces_by_force_alone(tiny, tmp_path):
    assert run(tiny("int8"), tmp_path / "out").exit_code == 0
    assert isinstance(run(tiny("int8"), tmp_path / "out").exception, OutputError)
    assert run(tiny("int8"), tmp_path / "out", "--force").exit_code == 0


def test_it_is_there_by_its_name():
    assert bloomq.export is export
