"""`from_pretrained`: from a pack or a checkpoint's folder to a model, and what is left behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters import convert
from models import Tiny, checkpoint, copied, pack

import bloomq
from bloomq.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InputNotFound,
    OutputError,
    PackError,
    UsageError,
)
from bloomq.opening import open_or_convert

TINY = Tiny(n_head=2, head_dim=16, vocab_size=61, n_layer=1)
HALF = Tiny(n_head=2, head_dim=16, vocab_size=61, n_layer=1, dtype="BF16")
IDS = [[5, 6, 7]]
CLASSES = (
    bloomq.BloomForCausalLM,
    bloomq.BloomForSequenceClassification,
    bloomq.BloomForTokenClassification,
    bloomq.BloomForQuestionAnswering,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_model(path: Any, **options: Any) -> bloomq.BloomForCausalLM:
    return bloomq.BloomForCausalLM.from_pretrained(path, **options)


def schemes(model: bloomq.BloomForCausalLM) -> set[str]:
    return {scheme.name for scheme in model.pack.schemes.values()}


# -- what may be opened ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, {"f32"}),
        ("int8", {"int8"}),
        ("nl4", {"nl4", "int6"}),
        ("int4", {"int4", "int6"}),
        ("nf4", {"nf4", "int6"}),
    ],
)
def test_a_checkpoint_is_quantized_on_the_way_in(base, temporary, scheme, expected):
    model = open_model(checkpoint(base, TINY), scheme=scheme)
    assert schemes(model) == expected
    kept = open_model(pack(base, TINY, scheme or "f32"))
    assert model(IDS).logits.tobytes() == kept(IDS).logits.tobytes()


def test_without_a_scheme_tensors_stay_as_they_are_stored(base, temporary):
    assert schemes(open_model(checkpoint(base, HALF))) == {"bf16"}


def test_a_pack_is_opened_as_it_is(base, temporary):
    path = pack(base, TINY, "int4")
    for given in (path, str(path)):
        model = open_model(given)
        assert model.pack.path == path
    assert schemes(open_model(path, scheme="int4")) == {"int4", "int6"}
    assert not list(temporary.iterdir())


def test_a_pack_of_another_scheme_than_asked_for_is_refused(base):
    path = pack(base, TINY, "int4")
    with pytest.raises(UsageError) as caught:
        open_model(path, scheme="int8")
    expected = f"{path}: is int4 already, expected int8: convert the checkpoint to it"
    assert str(caught.value) == expected


def test_an_empty_scheme_is_none_and_refused(base, tmp_path):
    for path in (pack(base, TINY, "int4"), checkpoint(base, TINY)):
        for scheme in ("", "int3", 8):
            with pytest.raises(UsageError, match=f"^unknown scheme {scheme!r}, expected one of"):
                open_model(path, scheme=scheme)
    with pytest.raises(UsageError, match=r"^unknown scheme ''"):
        open_model(checkpoint(base, TINY), scheme="", save_pack=tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_a_path_may_hold_spaces_and_other_letters(base, tmp_path, temporary):
    folder = tmp_path / "my models" / "modèle № 1"
    shutil.copytree(checkpoint(base, TINY), folder)
    kept = tmp_path / "my packs" / "a pack"
    kept.parent.mkdir()
    first = open_model(folder, scheme="int8", save_pack=kept)
    assert first.pack.path == kept
    assert open_model(kept)(IDS).logits.tobytes() == first(IDS).logits.tobytes()
    assert open_model(folder)(IDS).logits.shape == (1, 3, 61)


def test_a_relative_path_is_taken_from_where_one_is(base, tmp_path, temporary, monkeypatch):
    folder = copied(checkpoint(base, TINY), tmp_path / "here")
    monkeypatch.chdir(folder)
    model = open_model(".", save_pack="../kept")
    assert model.pack.manifest["provenance"]["name"] == "here"
    again = open_model(folder, save_pack=tmp_path / "kept")  # of the same name
    assert again(IDS).logits.tobytes() == model(IDS).logits.tobytes()


def test_a_sharded_checkpoint_of_transformers_is_read(tmp_path, temporary):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 61}
    theirs = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    found = open_model(tmp_path / "sharded")(IDS).logits
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert found == pytest.approx(expected, abs=1e-5)


def test_options_reach_the_backend(base):
    path = pack(base, TINY, "int4")
    assert open_model(path, backend="reference").backend.name == "reference"
    model = open_model(path, backend="numba", threads=1, cache_dtype="int8")
    assert model.backend.description.endswith("1 thread, int8 cache")


# -- save_pack -------------------------------------------------------------------------------------


def test_a_saved_pack_is_taken_the_next_time(base, tmp_path, temporary):
    """And not made anew: its files are not touched."""
    kept = tmp_path / "kept"
    first = open_model(checkpoint(base, TINY), scheme="int8", save_pack=kept)
    before = {file: os.stat(file).st_mtime_ns for file in kept.iterdir()}
    again = open_model(checkpoint(base, TINY), scheme="int8", save_pack=str(kept))
    assert again.pack.path == kept
    assert {file: os.stat(file).st_mtime_ns for file in kept.iterdir()} == before
    assert again(IDS).logits.tobytes() == first(IDS).logits.tobytes()
    assert not list(temporary.iterdir())


def test_a_saved_pack_of_another_scheme_is_refused(base, tmp_path):
    kept = tmp_path / "kept"
    open_model(checkpoint(base, TINY), scheme="int8", save_pack=kept)
    for scheme, expected in (("int4", "int4"), (None, "f32")):
        with pytest.raises(UsageError, match=rf"kept: is int8 already, expected {expected}: conv"):
            open_model(checkpoint(base, TINY), scheme=scheme, save_pack=kept)


def test_a_saved_pack_of_another_checkpoint_is_refused(base, tmp_path):
    kept = tmp_path / "kept"
    open_model(checkpoint(base, TINY), scheme="int8", save_pack=kept)
    with pytest.raises(UsageError) as caught:
        open_model(checkpoint(base, HALF), scheme="int8", save_pack=kept)
    assert str(caught.value) == (
        f"{kept}: was not made from {checkpoint(base, HALF)} as it is now: remove it, or choose "
        "another save_pack"
    )


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_saved_pack_of_weights_that_were_trained_on_is_refused(base, tmp_path, at):
    folder, kept = tmp_path / "run" / "step", tmp_path / "kept"
    shutil.copytree(checkpoint(base, TINY), folder)
    open_model(folder, scheme="int8", save_pack=kept)
    moved = folder.rename(tmp_path / "elsewhere")
    open_model(moved, scheme="int8", save_pack=kept)  # the same weights in another place
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[8 + int.from_bytes(data[:8], "little") if at == "first" else -1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match=r"was not made from .* as it is now: remove it"):
        open_model(moved, scheme="int8", save_pack=kept)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("config.json", {"id2label": {"0": "ham", "1": "spam"}}),
        ("config.json", {"problem_type": "regression"}),
        ("config.json", {"pad_token_id": 3}),
        ("tokenizer.json", {"version": "1.1"}),
        ("tokenizer_config.json", {"padding_side": "right"}),
    ],
    ids=str,
)
def test_a_saved_pack_of_another_config_or_tokenizer_is_refused(base, tmp_path, file, changed):
    folder, kept = copied(checkpoint(base, TINY), tmp_path / "model"), tmp_path / "kept"
    config = json.loads((folder / "config.json").read_text())
    del config["labels"]  # a pack's spelling, which would win over id2label
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    first = open_model(folder, save_pack=kept)
    assert open_model(folder, save_pack=kept).pack.path == first.pack.path
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | changed))
    with pytest.raises(UsageError, match=r"was not made from .* as it is now: remove it"):
        open_model(folder, save_pack=kept)
    path.write_text(json.dumps(before))
    open_model(folder, save_pack=kept)


def test_a_pack_is_not_saved_again(base, tmp_path):
    path = pack(base, TINY, "int4")
    with pytest.raises(UsageError) as caught:
        open_model(path, save_pack=tmp_path / "kept")
    expected = f"{path}: is a pack already: save_pack is for that of a checkpoint"
    assert str(caught.value) == expected
    assert not (tmp_path / "kept").exists()


def test_a_saved_pack_that_is_none_is_refused_and_left_alone(base, tmp_path):
    kept = tmp_path / "notes"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match="not a pack"):
        open_model(checkpoint(base, TINY), save_pack=kept)
    assert [file.name for file in kept.iterdir()] == ["notes.txt"]


def test_a_pack_that_cannot_be_saved_says_so(base, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match=str(blocked)):
        open_model(checkpoint(base, TINY), scheme="int8", save_pack=blocked / "kept")


# -- the temporary pack ----------------------------------------------------------------------------


def test_a_temporary_pack_is_gone_with_its_model(base, temporary):
    model = open_model(checkpoint(base, TINY), scheme="int8")
    folder = model.pack.path.parent
    assert folder.parent == temporary
    assert folder.name.startswith("bloomq-")
    expected = open_model(pack(base, TINY, "int8"))(IDS).logits.tobytes()
    assert model(IDS).logits.tobytes() == expected
    del model
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_temporary_pack_stays_while_anything_uses_it(base, temporary):
    kept = open_model(checkpoint(base, TINY), scheme="int8").pack
    gc.collect()
    assert kept.path.exists()
    model = bloomq.BloomForCausalLM(kept, open_model(pack(base, TINY, "int8")).backend)
    del kept
    gc.collect()
    assert len(list(temporary.iterdir())) == 1
    assert model(IDS).logits.shape == (1, 3, 61)


def test_a_conversion_that_fails_leaves_nothing_behind(base, tmp_path, temporary):
    damaged = copied(checkpoint(base, TINY), tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        open_model(damaged, scheme="int8")
    with pytest.raises(UsageError, match="unknown scheme 'int3'"):
        open_model(checkpoint(base, TINY), scheme="int3")
    assert not list(temporary.iterdir())
    assert caught.value.__traceback__ is not None  # which still knows the folder


def test_a_conversion_that_is_interrupted_leaves_nothing_behind(base, temporary, monkeypatch):
    def interrupted(source: Path, target: Path, scheme: str) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_model(checkpoint(base, TINY), scheme="int8")
    assert not list(temporary.iterdir())


# -- heads -----------------------------------------------------------------------------------------


def test_a_pack_is_refused_by_a_class_of_another_head(base):
    path = pack(base, TINY, "int4")
    for kind in CLASSES[1:]:
        with pytest.raises(UsageError) as caught:
            kind.from_pretrained(path)
        assert str(caught.value) == (
            f"this model has the head of BloomForCausalLM, not of {kind.__name__}: load it as "
            "bloomq.BloomForCausalLM"
        )


@pytest.mark.parametrize("kind", CLASSES[1:])
def test_a_classifier_is_opened_by_its_class_and_by_the_one_without_a_head(tmp_path, kind):
    folder = classifier(tmp_path, kind.__name__)
    model = kind.from_pretrained(folder, save_pack=tmp_path / "pack")
    assert model.config.architecture == kind.__name__
    assert model.config.labels == ("no", "yes", "who knows")
    body = bloomq.BloomModel.from_pretrained(tmp_path / "pack")
    assert body(IDS).last_hidden_state.shape == (1, 3, 32)
    with pytest.raises(UsageError, match=f"^this model has the head of {kind.__name__}, not of Bl"):
        bloomq.BloomForCausalLM.from_pretrained(folder)


def classifier(folder: Path, kind: str) -> Path:
    """A checkpoint of a classifier, by torch and transformers."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(
        hidden_size=32, n_head=4, n_layer=1, vocab_size=61,
        id2label={0: "no", 1: "yes", 2: "who knows"},
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder / kind)
    return folder / kind


# -- refused ---------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputNotFound) as caught:
        open_model(tmp_path / "nothing")
    assert str(caught.value) == f"{tmp_path / 'nothing'}: no such pack or checkpoint"
    with pytest.raises(InputNotFound, match=r"^bigscience/bloom-560m: no such pack or checkpoint$"):
        open_model("bigscience/bloom-560m")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CheckpointError) as caught:
            open_model(path)
        expected = f"{path}: neither a pack (manifest.json) nor a checkpoint"
        assert str(caught.value) == expected


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type is 'gpt2', expected 'bloom'"):
        open_model(tmp_path)


def test_what_the_backend_refuses_is_refused(base):
    path = pack(base, TINY, "int4")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        open_model(path, backend="gpu")
    with pytest.raises(UsageError, match="cache_dtype is 'q4'"):
        open_model(path, cache_dtype="q4")


@pytest.mark.parametrize("unknown", ["device_map", "torch_dtype", "revision", "load_in_8bit"])
def test_an_unknown_argument_is_refused_and_not_ignored(base, unknown):
    with pytest.raises(TypeError, match=unknown):
        open_model(pack(base, TINY, "int4"), **{unknown: "auto"})


def test_opening_without_a_model_gives_the_pack(base):
    path = pack(base, TINY, "int4")
    assert open_or_convert(path).path == path
    assert np.array_equal(
        open_or_convert(str(path)).array("ln_f.weight"), open_or_convert(path).array("ln_f.weight")
    )
