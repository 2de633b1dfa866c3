"""The plan says what a conversion then does, to the byte; which file holds which weight; and what
`verify --deep` finds in packs whose checksums are right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters import deep_verify as deep
from bloomq.converters.convert import convert
from bloomq.converters.deep_verify import deep_verify
from bloomq.converters.plan import estimate_seconds, make_plan
from bloomq.converters.reading import read_checkpoint
from bloomq.converters.source import Checkpoint, SourceTensor
from click.testing import CliRunner
from conftest import DEMO, edit_manifest, to_dtype, write_checkpoint

from bloomq import weight_files
from bloomq.cli import commands
from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import OutputError, PackError, TokenizerError, UsageError
from bloomq.pack import Pack
from bloomq.schemes import get_scheme
from bloomq.shards import lay_out
from bloomq.weight_files import layout

SCHEMES = ("int8", "int6", "nl4", "int4", "nf4", "f32", "bf16", "f16")


def command(*args: object) -> Any:
    return CliRunner().invoke(commands, [str(arg) for arg in args], standalone_mode=False)


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plan_foretells_every_size_of_the_pack(tmp_path, scheme):
    source = write_checkpoint(tmp_path / "checkpoint", n_layer=2, vocab_size=70)
    plan = make_plan(source, tmp_path / "pack", scheme=scheme)
    assert not (tmp_path / "pack").exists()
    done = convert(source, tmp_path / "pack", scheme=scheme)
    opened = Pack.open(tmp_path / "pack")
    assert (plan.pack_bytes, plan.bits_per_weight) == (opened.nbytes, opened.bits_per_weight)
    assert done.source_bytes == plan.checkpoint.nbytes
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "pack").iterdir()}
    shards = {shard.name: shard.nbytes for shard in plan.shards}
    assert shards.items() <= sizes.items()
    assert sum(sizes.values()) <= plan.disk_needed_bytes < 1.3 * sum(sizes.values()) + 20_000
    assert sum(share.parameters for share in plan.shares) == opened.parameters


def test_plan_lists_each_scheme_with_its_bytes(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint", n_layer=2)
    plan = make_plan(source, tmp_path / "pack", head_scheme="int8", group_size=64)
    found = {share.scheme: share for share in plan.shares}
    assert list(found) == ["int8", "vectors", "nl4-g64"]
    assert (found["int8"].weights, found["nl4-g64"].weights, found["vectors"].weights) == (
        1,
        8,
        20,
    )
    assert found["nl4-g64"].parameters == 2 * 12 * 64 * 64
    assert found["nl4-g64"].nbytes == 2 * 12 * 64 * 64 * 4.25 / 8


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint", n_layer=2, dtype="BF16")
    ended = command("convert", source, tmp_path / "a" / "pack", "--dry-run")
    assert ended.exit_code == 0, ended
    lines = ended.stdout.splitlines()
    assert lines[0] == f"source   {source}: huggingface, BF16, 0.2 MB"
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "source", "model", "pack", "files", "disk", "memory", "time"
    ]  # fmt: skip
    assert any("nl4-g64" in line and "8 arrays" in line for line in lines)
    assert "by a sample of reading and rounding" in lines[-1]
    assert "note: " in ended.stderr  # no tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_dry_run_in_json_has_all_of_it(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint")
    ended = command("convert", source, tmp_path / "pack", "--dry-run", "--json")
    facts = json.loads(ended.stdout)
    plan = make_plan(source, tmp_path / "pack")
    assert facts["pack_bytes"] == plan.pack_bytes
    assert facts["files"] == {shard.name: shard.nbytes for shard in plan.shards}
    assert facts["disk_needed_bytes"] == plan.disk_needed_bytes
    assert facts["disk_free_bytes"] > 0
    assert facts["estimated_seconds"] >= 0
    assert facts["estimated_peak_memory_bytes"] < 2 << 30
    assert (facts["scheme"], facts["form"], facts["dtypes"]) == ("nl4-g64", "huggingface", ["F32"])


def test_dry_run_of_a_calibration_foretells_its_disk_memory_and_time(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A few words only. " * 50)
    options = ("--calibrate", text, "--calibration-tokens", 64, "--dry-run")
    facts = json.loads(command("convert", DEMO, tmp_path / "pack", *options, "--json").stdout)
    assert (facts["method"], facts["calibration"]["tokens"]) == ("gptq", 64)
    assert facts["estimated_seconds"] > 0
    assert 170 << 20 < facts["estimated_peak_memory_bytes"] < 4 << 30
    plain = make_plan(DEMO, tmp_path / "pack").disk_needed_bytes
    assert facts["disk_needed_bytes"] == plain + 3 * 4 * 64 * 256  # three files of one stream
    lines = command("convert", DEMO, tmp_path / "pack", *options).stdout.splitlines()
    assert lines[-2].startswith("memory   about")
    assert lines[-1].startswith("time     about")
    assert lines[-1].endswith("by its operations, at rates measured now")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_names_that_no_file_can_have_are_told(tmp_path):
    long = "a" * 300
    ended = command("convert", DEMO, tmp_path / long, "--dry-run")
    assert "cannot be written: File name too long" in str(ended.exception)
    ended = command("convert", long, tmp_path / "pack")
    assert str(ended.exception) == f"{long}: no such file or folder"
    page = tmp_path / "page.html"
    ended = command("convert", long, tmp_path / "pack", "--report", page)
    assert isinstance(ended.exception, UsageError)


def test_dry_run_refuses_what_the_run_would_refuse(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint")
    convert(source, tmp_path / "pack")
    ended = command("convert", source, tmp_path / "pack", "--dry-run")
    assert isinstance(ended.exception, OutputError)
    assert "already exists" in str(ended.exception)
    assert command("convert", source, tmp_path / "pack", "--dry-run", "--force").exit_code == 0


def test_plan_says_where_the_disk_is_too_small(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "checkpoint")
    little = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("bloomq.converters.plan.shutil.disk_usage", lambda path: little)
    lines = make_plan(source, tmp_path / "pack").lines(5000)
    assert any(line.startswith("disk ") and line.endswith("NOT ENOUGH") for line in lines)
    assert "about 83 min" in lines[-1]
    assert "about 2.8 h" in make_plan(source, tmp_path / "pack").lines(10_000)[-1]


def test_large_pack_is_announced_on_a_pipe_too(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "checkpoint")
    assert " of disk needed, " not in command("convert", source, tmp_path / "a").stderr
    monkeypatch.setattr(sys.modules["bloomq.cli.convert"], "_LARGE_BYTES", 1000)
    ended = command("convert", source, tmp_path / "b")
    assert f"{source}: 0.2 MB become 0.0 MB in 1 file; " in ended.stderr
    assert " of disk needed, " in ended.stderr


class Made:
    """A checkpoint of 176B's shapes whose rows are made when they are read, and counted."""

    def __init__(self, **sizes: int) -> None:
        config = BloomConfig(hidden_size=14336, n_head=112, vocab_size=250_880, **sizes)
        tensors = {}
        for spec in weight_specs(config):
            tensors[f"{spec.name}.weight"] = self.tensor(spec.name, spec.shape)
            if spec.has_bias:
                tensors[f"{spec.name}.bias"] = self.tensor(spec.name, spec.shape[:1])
        self.read_bytes = 0
        self.checkpoint = Checkpoint(config, tensors, None, {"format": "made"})

    def tensor(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        def rows(start: int, stop: int) -> np.ndarray:
            found = np.full((stop - start, *shape[1:]), 0x3C00, np.uint16)
            self.read_bytes += found.nbytes
            return found

        return SourceTensor(name, "BF16", shape, rows)


def test_plan_of_the_largest_bloom_reads_a_few_blocks_of_it(tmp_path):
    made = Made(n_layer=70)
    plan = make_plan(tmp_path, tmp_path / "pack", checkpoint=made.checkpoint, threads=2)
    assert 352e9 < plan.checkpoint.nbytes < 353e9
    assert len(plan.shards) == 72
    assert 4.25 < plan.bits_per_weight < 4.35
    assert plan.peak_memory_bytes < 300 << 20
    assert made.read_bytes == 0
    assert estimate_seconds(plan) > 1
    assert made.read_bytes < 400e6


def test_schemes_may_be_chosen_for_each_matrix(tmp_path):
    source = write_checkpoint(tmp_path / "checkpoint")
    plan = make_plan(source, tmp_path / "pack")
    mixed = {**plan.schemes, "h.0.mlp.up": get_scheme("int8")}
    plan = make_plan(source, tmp_path / "pack", schemes=mixed)
    assert [share.scheme for share in plan.shares] == ["int6", "vectors", "nl4-g64", "int8"]
    assert "scheme" not in plan.options


# -- files -----------------------------------------------------------------------------------------


def test_large_pack_has_a_file_for_each_layer():
    config = BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=96)
    config_with_head = BloomConfig(
        hidden_size=64, n_layer=3, n_head=4, vocab_size=96, tie_word_embeddings=False
    )
    for one, last in ((config, ("ln_f",)), (config_with_head, ("ln_f", "lm_head"))):
        schemes = {s.name: get_scheme("int8") for s in weight_specs(one) if s.is_matrix}
        assert len(layout(one, schemes)) == 1
        shards = lay_out(weight_specs(one), schemes, 1000)
        assert [tuple(shard.weights)[:2] for shard in shards[:2]] == [
            ("wte", "emb_ln"), ("h.0.ln_1", "h.0.attn.qkv")
        ]  # fmt: skip
        assert tuple(shards[-1].weights) == last
        assert [shard.name for shard in shards][3:] == [
            "weights-00004-of-00005.safetensors", "weights-00005-of-00005.safetensors"
        ]  # fmt: skip
        for i, shard in enumerate(shards[1:-1]):
            assert all(name.startswith(f"h.{i}.") for name in shard.weights)


def test_pack_of_many_files_is_the_same_weights(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "checkpoint", n_layer=3)
    convert(source, tmp_path / "one")
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 1000)
    convert(source, tmp_path / "many")
    one, many = Pack.open(tmp_path / "one"), Pack.open(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 5
    many.verify()
    for spec in weight_specs(one.config):
        if spec.is_matrix:
            found = many.matrix(spec.name).dequantize()
            assert found.tobytes() == one.matrix(spec.name).dequantize().tobytes()


# -- verify --deep ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    return write_checkpoint(folder, vocab_size=70, hidden_size=60)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pack_is_every_byte_what_its_checkpoint_gives(tmp_path, checkpoint, scheme, monkeypatch):
    monkeypatch.setattr(deep, "_BLOCK_VALUES", 32 * 64)
    convert(checkpoint, tmp_path / "pack", scheme=scheme)
    report = deep_verify(Pack.open(tmp_path / "pack"), read_checkpoint(checkpoint), threads=2)
    assert report.is_exact
    assert report.notes == ()


def forged(pack: Path, key: str, change: Callable[[np.ndarray], None]) -> Pack:
    """The pack with one array changed and every checksum right again."""
    import hashlib

    opened = Pack.open(pack)
    entry = opened._files[opened._where[key]].entries[key]
    array = np.array(opened.array(key))
    change(array)
    with opened._files[opened._where[key]].path.open("r+b") as file:
        file.seek(entry.start)
        file.write(array.tobytes())
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    name = opened._where[key]
    edit_manifest(pack, lambda m: m["files"][name]["arrays"].update({key: digest}))
    Pack.open(pack).verify()
    return Pack.open(pack)


def put(index: Any, value: Any) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] = value

    return change


# wte of 70 x 60 is stored as 96 x 64 (128 columns for int8); row 33 is lane 1 of tile 2.
@pytest.mark.parametrize(
    ("scheme", "key", "change", "message"),
    [
        ("int4", "wte.scales", put((2, 0, 1), np.nan), "wte: row 33 has a scale that is NaN"),
        ("int4", "wte.scales", put((2, 0, 1), np.inf), "wte: row 33 has a scale that is NaN"),
        ("int8", "wte.scales", put(33, -1), "wte: row 33 has a negative scale"),
        ("nf4", "h.0.mlp.up.scales", put((2, 0, 1), -1), "h.0.mlp.up: row 33 has a negative scale"),
        ("int8", "wte.codes", put((2, 3, 1, 0), -128), "wte: row 33 has a code of -128, expected"),
        ("f32", "wte.values", put((2, 7, 1), np.nan), "wte: row 33 holds NaN or infinity"),
        ("f32", "wte.values", put((2, 63, 1), 1), "wte: row 33 is padding and not zero"),
        ("f32", "wte.values", put((4, 0, 8), 1), "wte: row 72 is padding and not zero"),
        ("int8", "wte.codes", put((2, 31, 1, 3), 1), "wte: row 33 is padding and not zero"),
        ("int4", "h.0.mlp.up.codes", put((2, 7, 1, 3), 0), "h.0.mlp.up: row 33 is padding and not"),
        ("int8", "ln_f.bias", put(5, np.inf), "ln_f.bias: row 5 is NaN or infinite"),
        ("int8", "ln_f.weight", put(63, 1), "ln_f.weight: row 63 is padding and not zero"),
        ("int8", "h.0.mlp.up.bias", put(255, 1), "h.0.mlp.up.bias: row 255 is padding and not ze"),
    ],
)  # fmt: skip
def test_values_that_no_converter_writes_are_named(
    tmp_path, checkpoint, monkeypatch, scheme, key, change, message
):
    monkeypatch.setattr(deep, "_BLOCK_VALUES", 1)  # 32 rows at a time
    convert(checkpoint, tmp_path / "pack", scheme=scheme)
    pack = forged(tmp_path / "pack", key, change)
    with pytest.raises(PackError) as caught:
        deep_verify(pack)
    assert str(caught.value).startswith(f"{tmp_path / 'pack'}: {message}")


@pytest.mark.parametrize(
    ("key", "change", "row"),
    [
        ("wte.codes", put((4, 3, 5, 0), 77), 69),
        ("wte.scales", put((4, 0, 5), 1), 69),
        ("h.0.mlp.up.codes", put((1, 0, 3, 1), 9), 19),
        ("h.0.ln_2.weight", put(7, 3.5), 7),
    ],
)
def test_row_that_is_not_the_checkpoints_is_named(tmp_path, checkpoint, key, change, row):
    convert(checkpoint, tmp_path / "pack")
    pack = forged(tmp_path / "pack", key, change)
    deep_verify(pack)
    with pytest.raises(PackError) as caught:
        deep_verify(pack, read_checkpoint(checkpoint))
    assert str(caught.value) == (
        f"{tmp_path / 'pack'}: {key}: row {row} is not what the checkpoint gives: convert again"
    )


def test_pack_of_another_checkpoint_is_told_apart(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "pack")
    for name, sizes in (("values", {"seed": 1}), ("shapes", {"n_layer": 2})):
        other = write_checkpoint(tmp_path / name, vocab_size=70, hidden_size=60, **sizes)
        with pytest.raises(PackError, match=f"was not made of the checkpoint {name}, as it is now"):
            deep_verify(Pack.open(tmp_path / "pack"), read_checkpoint(other))


def test_pack_of_another_method_is_measured_instead(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "pack", scheme="int8")
    edit_manifest(tmp_path / "pack", lambda m: m["provenance"].update(method="by hand"))
    report = deep_verify(Pack.open(tmp_path / "pack"), read_checkpoint(checkpoint))
    assert not report.is_exact
    found = {row.weight: row for row in report.differences}
    assert len(found) == 5
    assert found["h.0.mlp.up"].scheme == "int8"
    assert all(0.001 < row.relative_error < 0.02 for row in found.values())
    ended = command("verify", "--deep", tmp_path / "pack", checkpoint)
    assert "h.0.mlp.up           int8       relative error 0.00" in ended.stdout


def test_pack_with_an_adapter_is_not_called_another_checkpoints(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "pack")
    edit_manifest(tmp_path / "pack", lambda m: m["provenance"].update(lora=[{"name": "a"}]))
    with pytest.raises(UsageError, match="has adapters merged in, so its numbers are not"):
        deep_verify(Pack.open(tmp_path / "pack"), read_checkpoint(checkpoint))


def test_odd_tensors_are_noted_and_no_error(tmp_path):
    def edit(tensors: dict[str, Any]) -> None:
        for name, value in (("mlp.dense_h_to_4h", 0), ("mlp.dense_4h_to_h", 100)):
            dtype, array = tensors[f"transformer.h.0.{name}.weight"]
            array[...] = to_dtype(np.full(array.shape, value, np.float32), dtype)
        tensors["transformer.ln_f.weight"][1][3] = 1e5

    odd = write_checkpoint(tmp_path / "checkpoint", edit=edit)
    convert(odd, tmp_path / "pack", scheme="int8")
    ended = command("verify", "--deep", tmp_path / "pack", odd)
    assert ended.exit_code == 0
    assert "note: h.0.mlp.up holds all zeros" in ended.stderr
    assert "note: h.0.mlp.down holds a root mean square of 100, implausible" in ended.stderr
    assert "note: ln_f.weight holds 1e+05: implausibly large" in ended.stderr
    assert f"{tmp_path / 'pack'}: every byte is what {odd} gives" in ended.stdout


def test_tokenizer_that_cannot_be_read_is_found(tmp_path, checkpoint):
    source = write_checkpoint(tmp_path / "checkpoint")
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "pack")
    Pack.open(tmp_path / "pack").verify()
    with pytest.raises(TokenizerError):
        deep_verify(Pack.open(tmp_path / "pack"))


def test_impossible_options_of_verify_are_refused(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "pack")
    found = command("verify", tmp_path / "pack", checkpoint).exception
    assert isinstance(found, UsageError)
    assert str(found) == "a checkpoint to compare with: add --deep"
    found = command("verify", tmp_path / "pack", "--deep", "-t", 0).exception
    assert isinstance(found, UsageError)
    assert "threads is 0" in str(found)
