"""LoRA adapters merged at conversion: the weights that PEFT merges to, and a record of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import random_lora, written
from bloomq.converters.convert import convert
from bloomq.converters.merging import merged
from bloomq.converters.peft import read_adapter
from bloomq.converters.reading import read_checkpoint
from conftest import dequantized, write_checkpoint
from test_prequantized import packed_checkpoint

from bloomq.errors import BloomqError, CheckpointError, ConfigError, InputNotFound, UsageError
from bloomq.pack import Pack
from bloomq.schemes import bf16_to_f32, untile_bytes

LINEARS = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", hidden_size=32, n_layer=2, dtype="BF16")


def weights_of(checkpoint: Path, name: str) -> np.ndarray:
    """A linear of a checkpoint as float32."""
    tensor = read_checkpoint(checkpoint).tensors[f"{name}.weight"]
    raw = tensor.rows(0, tensor.shape[0])
    return bf16_to_f32(raw) if tensor.dtype == "BF16" else np.asarray(raw, np.float32)


def deltas(checkpoint: Path, adapter: Path, scale: float) -> dict[str, np.ndarray]:
    """What an adapter adds, in float64."""
    factors = read_adapter(adapter, read_checkpoint(checkpoint).config).factors
    return {
        name: scale * (f.up.astype(float) @ f.down.astype(float)) for name, f in factors.items()
    }


# -- against PEFT ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_by_peft(tmp_path_factory: Any, demo_checkpoint: Path) -> dict[str, Path]:
    """The demo's base in float32, a random adapter, and what PEFT merges them to."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("merged")
    model = transformers.BloomForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    random_lora(model, folder / "adapter", r=8, lora_alpha=16).merge_and_unload().save_pretrained(
        folder / "merged"
    )
    return {"base": demo_checkpoint, "adapter": folder / "adapter", "merged": folder / "merged"}


def rounding(base: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """How far two float32 ways to W + s B A may be apart: r products, their sum, the scale and the
    last sum are each rounded once, in either."""
    magnitude = np.abs(up).astype(float) @ np.abs(down)
    return 2 * 2.0**-24 * ((down.shape[0] + 3) * magnitude + np.abs(base) + magnitude)


def test_merged_weights_are_pefts_up_to_rounding(tmp_path, merged_by_peft):
    convert(
        merged_by_peft["base"], tmp_path / "pack", scheme="f32",
        lora=[(merged_by_peft["adapter"], 1.0)],
    )  # fmt: skip
    convert(merged_by_peft["merged"], tmp_path / "theirs", scheme="f32")
    ours, theirs = dequantized(tmp_path / "pack"), dequantized(tmp_path / "theirs")
    config = read_checkpoint(merged_by_peft["base"]).config
    adapter = read_adapter(merged_by_peft["adapter"], config)
    for name, weight in theirs.items():
        if name in adapter.factors:
            base, factors = weights_of(merged_by_peft["base"], name), adapter.factors[name]
            assert np.abs(weight - base).max() > 0.05  # the adapter counts
            assert (np.abs(ours[name] - weight) <= rounding(base, factors.up, factors.down)).all()
        else:
            assert np.array_equal(ours[name], weight), name


def test_merged_int8_codes_are_pefts_but_for_ties(tmp_path, merged_by_peft):
    """Codes differ by one at most, in one of 20,000, where a weight lies within rounding of the
    middle between two."""
    convert(
        merged_by_peft["base"], tmp_path / "pack", scheme="int8",
        lora=[(merged_by_peft["adapter"], 1.0)],
    )  # fmt: skip
    convert(merged_by_peft["merged"], tmp_path / "theirs", scheme="int8")
    ours, theirs = Pack.open(tmp_path / "pack"), Pack.open(tmp_path / "theirs")
    for layer in range(4):
        for linear in LINEARS:
            key = f"h.{layer}.{linear}.codes"
            a, b = (untile_bytes(pack.array(key)).astype(int) for pack in (ours, theirs))
            assert np.abs(a - b).max() <= 1
            assert np.count_nonzero(a != b) <= a.size / 20_000


# -- what is added ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5, -2, 0.0])
def test_the_adapter_counts_as_much_as_its_scale(tmp_path, base, scale):
    adapter = written(tmp_path / "adapter")
    convert(base, tmp_path / "pack", scheme="f32", lora=[(adapter, scale)])
    found = dequantized(tmp_path / "pack")
    for name, delta in deltas(base, adapter, scale).items():
        assert np.allclose(found[name], weights_of(base, name) + delta, rtol=0, atol=1e-6), name


def test_several_adapters_are_added_up(tmp_path, base):
    one, other = (written(tmp_path / name, rank=r, seed=r) for name, r in (("a", 2), ("b", 5)))
    convert(base, tmp_path / "pack", scheme="f32", lora=[(one, 1.0), (other, 0.25)])
    found = dequantized(tmp_path / "pack")
    added = deltas(base, other, 0.25)
    for name, delta in deltas(base, one, 1.0).items():
        expected = weights_of(base, name) + delta + added[name]
        assert np.allclose(found[name], expected, rtol=0, atol=1e-6)


def test_linears_without_an_adapter_stay_as_they_are(tmp_path, base):
    def only_up(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "dense_h_to_4h" not in name]:
            del tensors[name]

    adapter = written(tmp_path / "adapter", edit=only_up)
    convert(base, tmp_path / "pack")
    convert(base, tmp_path / "merged", lora=[(adapter, 1.0)])
    before, after = dequantized(tmp_path / "pack"), dequantized(tmp_path / "merged")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"h.0.mlp.up", "h.1.mlp.up"}


def test_blocks_of_rows_are_parts_of_the_whole(tmp_path, base):
    checkpoint = merged(read_checkpoint(base), [(written(tmp_path / "adapter"), 1.0)])
    tensor = checkpoint.tensors["h.1.attn.qkv.weight"]
    whole = tensor.rows(0, 96)
    assert tensor.dtype == "F32"
    assert np.allclose(tensor.rows(32, 64), whole[32:64], rtol=0, atol=1e-6)


def test_no_adapter_changes_nothing(base):
    checkpoint = read_checkpoint(base)
    assert merged(checkpoint, []) is checkpoint


def test_a_quantized_base_is_dequantized_first_and_says_so(tmp_path):
    source, grids = packed_checkpoint(tmp_path / "packed", group=64)
    adapter = written(tmp_path / "adapter", hidden_size=128, layers=1)
    done = convert(source, tmp_path / "pack", scheme="f32", lora=[(adapter, 1.0)])
    assert any("with an adapter merged in is no grid any more" in note for note in done.notes)
    delta = deltas(source, adapter, 1.0)["h.0.mlp.up"]
    found = dequantized(tmp_path / "pack")["h.0.mlp.up"]
    assert np.allclose(found, grids["h.0.mlp.up"].weights + delta, rtol=0, atol=1e-6)


# -- what is kept of it ----------------------------------------------------------------------------


def test_provenance_names_adapter_digest_and_scale(tmp_path, base):
    adapter = written(tmp_path / "adapter")
    convert(base, tmp_path / "pack", lora=[(adapter, 0.5)])
    (entry,) = Pack.open(tmp_path / "pack").manifest["provenance"]["lora"]
    assert (entry["name"], entry["scale"]) == ("adapter", 0.5)
    assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])


def test_an_adapter_in_a_bin_file_is_merged_as_well(tmp_path, base):
    torch = pytest.importorskip("torch")
    files = pytest.importorskip("safetensors.torch")
    adapter = written(tmp_path / "adapter")
    expected = convert(base, tmp_path / "a", lora=[(adapter, 1.0)]).pack
    file = adapter / "adapter_model.safetensors"
    torch.save(files.load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    found = convert(base, tmp_path / "b", lora=[(adapter, 1.0)]).pack
    for weights in expected.glob("*.safetensors"):
        assert weights.read_bytes() == (found / weights.name).read_bytes()


def test_fingerprint_is_of_base_adapters_and_scales(tmp_path, base):
    one, other = (written(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    again = shutil.copytree(one, tmp_path / "again" / "a")
    checkpoint = read_checkpoint(base)

    def fingerprint(*lora: tuple[Path, float]) -> str:
        return merged(checkpoint, lora).fingerprint

    assert fingerprint((one, 1.0)) == fingerprint((again, 1))
    choices = [(), ((one, 1.0),), ((one, 0.5),), ((other, 1.0),), ((one, 1.0), (other, 1.0))]
    assert len({fingerprint(*choice) for choice in choices}) == len(choices)


def test_config_of_an_adapter_is_part_of_its_digest(tmp_path, base):
    adapter = written(tmp_path / "adapter")
    before = merged(read_checkpoint(base), [(adapter, 1.0)]).fingerprint
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, "lora_alpha": 9}))
    assert merged(read_checkpoint(base), [(adapter, 1.0)]).fingerprint != before


# -- what is refused -------------------------------------------------------------------------------


def refused(kind: type[BloomqError], message: str, base: Path, *lora: tuple[Any, Any]) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        convert(base, base.parent / "pack", lora=lora)
    assert not (base.parent / "pack").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "1", True, None])
def test_scales_that_are_no_number_are_refused(tmp_path, base, scale):
    adapter = written(tmp_path / "adapter")
    refused(
        UsageError, f"the adapter's scale is {scale!r}, expected a number", base, (adapter, scale)
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[BloomqError], str]] = {
    "no folder": (shutil.rmtree, InputNotFound, "no such adapter"),
    "no config": (
        lambda path: (path / "adapter_config.json").unlink(), CheckpointError,
        "not the folder of a PEFT adapter",
    ),
    "dora": (
        lambda path: (path / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "use_dora": true}'
        ), ConfigError, "use_dora is True, not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_adapters_that_cannot_be_read_are_refused(tmp_path, base, damage):
    adapter = written(tmp_path / "adapter")
    edit, kind, message = DAMAGE[damage]
    edit(adapter)
    refused(kind, message, base, (adapter, 1.0))


def test_an_adapter_of_another_model_is_refused(tmp_path, base):
    adapter = written(tmp_path / "adapter", hidden_size=64)
    refused(CheckpointError, "by this model and adapter_config.json", base, (adapter, 1.0))


def test_the_command_pairs_adapters_and_scales(tmp_path, base):
    from click.testing import CliRunner

    from bloomq.cli.convert import convert as command

    one, other = (written(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    adapters = ["--lora", str(one), "--lora", str(other)]
    run = CliRunner().invoke
    done = run(command, [str(base), str(tmp_path / "pack"), *adapters, "--lora-scale", "0.5"])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == "1 --lora-scale for 2 --lora: give one for each, or none"
    scales = ["--lora-scale", "0.5", "--lora-scale", "2"]
    done = run(command, [str(base), str(tmp_path / "pack"), *adapters, *scales])
    assert done.exit_code == 0, done.output
    kept = Pack.open(tmp_path / "pack").manifest["provenance"]["lora"]
    assert [(entry["name"], entry["scale"]) for entry in kept] == [("a", 0.5), ("b", 2.0)]
    assert run(command, [str(base), str(tmp_path / "one"), *adapters]).exit_code == 0
    kept = Pack.open(tmp_path / "one").manifest["provenance"]["lora"]
    assert [entry["scale"] for entry in kept] == [1.0, 1.0]
