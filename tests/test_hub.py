"""Checkpoints by their id, from a small server in place of the hub: what is fetched, what is kept,
and what happens when it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bloomq.converters import hub as hub_module
from bloomq.converters.convert import convert
from bloomq.converters.reading import read_checkpoint
from conftest import random_tensors, write_checkpoint, write_safetensors
from hub_server import COMMIT, Hub, serving

from bloomq.errors import BloomqError, CheckpointError, InputNotFound, OutputError, UsageError
from bloomq.pack import Pack

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
ID = "owner/model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint in three shards."""
    folder = write_checkpoint(tmp_path / "checkpoint", shards=3, n_layer=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Iterator[Hub]:
    """The server with that checkpoint; huggingface_hub asks it and nobody else."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)  # no folder of the id's name
    home = tmp_path / "home"
    with serving(Hub().add(checkpoint)) as served:
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": served.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        yield served


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it tries again, and writes 10 MB at once."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def refused(kind: type[BloomqError], message: str, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        convert(ID, tmp_path / "pack", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack").exists()
    return str(caught.value)


def left(tmp_path: Path) -> list[str]:
    """The files of weights in huggingface_hub's home, whole or not."""
    found = [p.name for p in (tmp_path / "home").rglob("*") if p.is_file() and not p.is_symlink()]
    return [name for name in found if "safetensors" in name or name.endswith("incomplete")]


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_pack_is_that_of_the_same_files_here(tmp_path, hub, checkpoint, stream):
    convert(ID, tmp_path / "pack", stream=stream)
    convert(checkpoint, tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()
    origin = Pack.open(tmp_path / "pack").manifest["provenance"]
    assert (origin["name"], origin["revision"]) == (ID, COMMIT)
    same = origin["fingerprint"] == read_checkpoint(checkpoint).fingerprint
    assert same is not stream  # a streamed one's is of the files' digests


def test_only_what_is_needed_is_fetched(tmp_path, hub):
    others = ("pytorch_model.bin", "flax_model.msgpack", "model.onnx", "README.md", "tf_model.h5",
              "generation_config.json", "training_args.bin")  # fmt: skip
    hub.files |= {name: b"x" * 9000 for name in others}
    convert(ID, tmp_path / "pack")
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert hub.downloaded() == wanted | shards


def test_one_file_is_preferred_to_shards_and_pickles_come_last(tmp_path, hub):
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": b"PK" + b"x" * 9000}
    refused(CheckpointError, "pytorch_model.bin", tmp_path)
    assert "pytorch_model.bin" in hub.downloaded()


def test_a_quantized_checkpoint_is_streamed_too(tmp_path, hub):
    from test_prequantized import packed_checkpoint

    source, _ = packed_checkpoint(tmp_path / "packed", group=64, settings_file="quant_config.json")
    (source / "model.safetensors").rename(source / "gptq_model-4bit-64g.safetensors")
    hub.files = {}
    hub.add(source)
    done = convert(ID, tmp_path / "pack", stream=True)
    convert(source, tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()
    assert any("taken over from GPTQ" in note for note in done.notes)
    assert not left(tmp_path)


def test_nothing_is_fetched_twice(tmp_path, hub):
    convert(ID, tmp_path / "pack")
    hub.requests.clear()
    convert(ID, tmp_path / "pack", force=True)
    assert not hub.downloaded()


def by_huggingface_hub(hub: Hub) -> list[str]:
    """Every file of the repository, as huggingface_hub has it."""
    where = {"cache_dir": constants.HF_HUB_CACHE, "endpoint": hub.endpoint, "revision": COMMIT}
    return [huggingface_hub.hf_hub_download(ID, name, **where) for name in hub.files]


def test_what_huggingface_hub_has_already_is_used(tmp_path, hub):
    by_huggingface_hub(hub)
    hub.requests.clear()
    convert(ID, tmp_path / "pack")
    assert not hub.downloaded()


def test_huggingface_hub_finds_what_we_fetched(tmp_path, hub):
    convert(ID, tmp_path / "pack")
    hub.requests.clear()
    assert all(Path(path).exists() for path in by_huggingface_hub(hub))
    assert not hub.requests


def test_a_revision_by_name_is_resolved_to_its_commit(tmp_path, hub):
    hub.revisions += ("v2",)
    convert(ID, tmp_path / "pack", revision="v2")
    assert Pack.open(tmp_path / "pack").manifest["provenance"]["revision"] == COMMIT
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.requests if "resolve" in path)


def test_a_folder_of_that_name_comes_first(tmp_path, hub, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "owner" / "model")
    convert(ID, tmp_path / "pack")
    assert not hub.requests


def test_offline_takes_what_is_in_the_cache(tmp_path, hub, monkeypatch):
    convert(ID, tmp_path / "first")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(ID, tmp_path / "pack", revision=COMMIT)
    assert not hub.requests
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()


def test_offline_without_a_copy_is_refused(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(
        InputNotFound, "not in the hub's cache, which is all there is: HF_HUB_OFFLINE", tmp_path
    )
    assert not hub.requests


def test_the_command_obeys_the_environment(tmp_path, hub):
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "cli"),
    }
    command = [sys.executable, "-m", "bloomq", "convert", ID, str(tmp_path / "pack"), "--stream"]
    run = lambda **more: subprocess.run(  # noqa: E731
        command, capture_output=True, text=True, cwd=tmp_path, env={**environment, **more}
    )
    done = run(HF_HUB_OFFLINE="1")
    assert (done.returncode, hub.requests) == (1, [])
    assert "HF_HUB_OFFLINE is set" in done.stderr
    done = run(HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert Pack.open(tmp_path / "pack").manifest["provenance"]["revision"] == COMMIT
    assert all(path.startswith((f"/{ID}/", f"/api/models/{ID}/")) for _, path, _ in hub.requests)


# -- streaming -------------------------------------------------------------------------------------


def test_a_streamed_shard_is_there_only_while_it_is_needed(tmp_path, hub, monkeypatch):
    """Of six shards in the order of the layers, at most two are on the disk at once."""
    tensors = random_tensors(64, 4, 96, "F32")
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.split(".")[1] if name.startswith("h.") else name[:4], {})[name] = (
            tensor
        )
    layers["word"] |= {}
    hub.files = {"config.json": hub.files["config.json"].replace(b'"n_layer": 2', b'"n_layer": 4')}
    weight_map = {}
    for i, part in enumerate(layers.values()):
        shard = f"model-{i}.safetensors"
        write_safetensors(tmp_path / shard, part)
        hub.files[shard] = (tmp_path / shard).read_bytes()
        weight_map |= dict.fromkeys(part, shard)
        (tmp_path / shard).unlink()
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    seen = []

    def look(done: int, total: int) -> None:
        seen.append(sum(name.endswith(".safetensors") for name in left(tmp_path)))

    convert(ID, tmp_path / "pack", stream=True, threads=1, progress=look)
    assert len(weight_map) > 40
    assert max(seen) <= 3 < len(layers)
    assert not left(tmp_path)
    assert not (tmp_path / "home" / "bloomq").exists()


def test_an_interrupted_stream_goes_on_and_leaves_nothing(tmp_path, hub):
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(ID, tmp_path / "pack", stream=True, progress=stop)
    assert left(tmp_path)
    done = convert(ID, tmp_path / "pack", stream=True)
    assert done.resumed_bytes
    assert not left(tmp_path)
    convert(ID, tmp_path / "expected", stream=True)
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()


def test_a_shard_is_dropped_where_a_tied_head_is_not_converted(tmp_path, hub, checkpoint):
    folder = write_checkpoint(
        tmp_path / "tied",
        edit=lambda t: t.update({"lm_head.weight": t["transformer.word_embeddings.weight"]}),
    )
    hub.files = {}
    hub.add(folder)
    convert(ID, tmp_path / "pack", stream=True)
    assert not left(tmp_path)


def test_streaming_reads_no_weights_before_they_are_converted(tmp_path, hub):
    opened = read_checkpoint(ID, stream=True)
    assert opened.nbytes > 100_000
    assert all(
        hub.sent(f"model-0000{i}-of-00003.safetensors") == ["bytes=0-100000"] for i in (1, 2)
    )
    assert not left(tmp_path)
    assert len(opened.fingerprint) == 64
    assert not left(tmp_path)


def test_streaming_of_pickles_is_refused(tmp_path, hub):
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": b"PK"}
    refused(UsageError, "pytorch_model.bin cannot be read by parts", tmp_path, stream=True)


def test_a_shard_that_is_not_what_its_header_said_is_refused(tmp_path, hub, monkeypatch):
    name = "model-00001-of-00003.safetensors"
    opened = read_checkpoint(ID, stream=True)
    tensors = {"transformer.other": random_tensors(64, 1, 96, "F32")["ln_f.bias"]}
    other = write_safetensors(tmp_path / "other", tensors).read_bytes()
    from bloomq.converters import streaming

    monkeypatch.setattr(
        streaming, "download", lambda repo, file, target, lock: (
            target.parent.mkdir(parents=True), target.write_bytes(other)
        ),
    )  # fmt: skip
    tensor = next(t for t in opened.tensors.values() if name in t.name)
    with pytest.raises(CheckpointError, match="other tensors than its header said before"):
        tensor.rows(0, 1)


def test_a_header_that_is_none_is_refused(tmp_path, hub):
    hub.files["model-00002-of-00003.safetensors"] = b"\x10\0\0\0\0\0\0\0{not json at all}" * 300
    refused(CheckpointError, "its header is no safetensors header", tmp_path, stream=True)


def test_a_tensor_in_two_streamed_shards_is_refused(tmp_path, hub):
    hub.files["model-00002-of-00003.safetensors"] = hub.files["model-00001-of-00003.safetensors"]
    refused(CheckpointError, "stored twice, also as owner/model/model-00001", tmp_path, stream=True)


# -- what fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_connection_is_gone_on_with(tmp_path, hub, impatient, stream):
    name = "model-00002-of-00003.safetensors"
    hub.cut[name] = [5000, 7000]
    convert(ID, tmp_path / "pack", stream=stream)
    parts = [part for part in hub.sent(name) if not re.fullmatch(r"bytes=\d+-\d+", part)]
    assert parts == ["", "bytes=5000-", "bytes=12000-"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_run_goes_on_where_a_cut_one_stopped(tmp_path, hub, impatient, stream, checkpoint):
    name = "model-00002-of-00003.safetensors"
    hub.cut[name] = [6000, *[0] * 99]  # every worker tries
    message = f"no connection to {hub.endpoint}"
    refused(CheckpointError, message, tmp_path, stream=stream)
    assert sum(part.endswith("incomplete") for part in left(tmp_path)) == 1
    hub.requests.clear()
    hub.cut.clear()
    convert(ID, tmp_path / "pack", stream=stream)
    assert hub.sent(name)[-1] == "bytes=6000-"
    convert(checkpoint, tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "pack" / file.name).read_bytes()
    assert not [part for part in left(tmp_path) if part.endswith("incomplete")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_a_file_of_another_digest_is_deleted_and_fetched_anew(tmp_path, hub, stream, name):
    hub.digests[name] = "ab" * (32 if "model" in name else 20)
    found = refused(
        CheckpointError, f"owner/model: {name} has the digest ", tmp_path, stream=stream
    )
    assert f"expected {hub.digests[name]}: changed on the way" in found
    hub.digests.clear()
    convert(ID, tmp_path / "pack", stream=stream)
    assert Pack.open(tmp_path / "pack").verify() is None


def test_a_partial_file_that_is_too_long_is_begun_anew(tmp_path, hub):
    name = "model-00002-of-00003.safetensors"
    blobs = tmp_path / "home" / "hub" / "models--owner--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.digest(name)[0]}.incomplete").write_bytes(b"x" * (len(hub.files[name]) + 1))
    convert(ID, tmp_path / "pack")
    assert hub.sent(name) == [""]


STATUS = {
    "no repository": (
        {"/revision/main": (404, "RepoNotFound")}, InputNotFound,
        "owner/model: no such folder, and no such repository at http://127.0.0.1:",
    ),
    "private": (
        {"/revision/main": (401, "")}, CheckpointError, "refuses access: log in: hf auth login"
    ),
    "no revision": (
        {"/revision/main": (404, "RevisionNotFound")}, InputNotFound,
        "owner/model: no revision main at http",
    ),
    "gated": (
        {"/revision/main": (401, "GatedRepo")}, CheckpointError,
        "its owners want their terms accepted: do so on its page",
    ),
    "gated files": (
        {"config.json": (403, "GatedRepo")}, CheckpointError, "then log in: hf auth login"
    ),
    "gated weights": (
        {"model-00001-of-00003.safetensors": (403, "GatedRepo")}, CheckpointError,
        "its owners want their terms accepted",
    ),
    "server fault": (
        {"/revision/main": (500, "")}, CheckpointError, "answers 500: run it again: it goes on",
    ),
    "weights are gone": (
        {"model-00001-of-00003.safetensors": (404, "EntryNotFound")}, CheckpointError,
        "model-00001-of-00003.safetensors is listed there, and missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", list(STATUS))
def test_what_the_hub_refuses_is_one_line(tmp_path, hub, impatient, monkeypatch, case, stream):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.status, kind, message = STATUS[case]
    refused(kind, message, tmp_path, stream=stream)


ANSWERS = {
    "no object": [1, 2],
    "text": "hello",
    "no id": {"sha": COMMIT},
    "siblings of numbers": {"id": ID, "sha": COMMIT, "siblings": [1]},
    "siblings without names": {"id": ID, "sha": COMMIT, "siblings": [{"size": 1}]},
    "a size of text": {
        "id": ID, "sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": "x"}]
    },
    "a digest of text": {
        "id": ID, "sha": COMMIT,
        "siblings": [{
            "rfilename": "config.json", "size": 1,
            "lfs": {"sha256": "../../evil", "size": 1, "pointerSize": 1},
        }],
    },
}  # fmt: skip


@pytest.mark.parametrize("case", list(ANSWERS))
def test_answers_that_describe_no_repository_are_refused(tmp_path, hub, case):
    hub.answer = ANSWERS[case]
    refused(CheckpointError, "says nothing that describes a repository", tmp_path)


@pytest.mark.parametrize("commit", [None, 7, "main", "../../../x", "0" * 39])
def test_a_commit_that_is_none_is_refused(tmp_path, hub, commit):
    hub.commit = commit
    refused(CheckpointError, f"names the commit {commit!r}, not a SHA-1", tmp_path)


def test_no_server_is_one_line(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(CheckpointError, "owner/model: no connection to http://127.0.0.1:9", tmp_path)


@pytest.mark.parametrize(
    "name", ["../../../evil.safetensors", "/tmp/evil.safetensors", "a/b", ".."]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, hub, name):
    index = {"weight_map": {"ln_f.bias": name}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files[name] = b"x" * 5000
    with pytest.raises(
        CheckpointError, match=r"outside the checkpoint's folder|which is not there"
    ):
        convert(ID, tmp_path / "pack")
    assert not [path for path in tmp_path.rglob("evil*")]


def test_an_index_may_name_only_files_that_are_there(tmp_path, hub):
    del hub.files["model-00003-of-00003.safetensors"]
    message = "its index names model-00003-of-00003.safetensors, which is not there"
    refused(CheckpointError, message, tmp_path)


def test_no_config_or_no_weights_are_refused_before_anything_is_fetched(tmp_path, hub):
    hub.files = {"config.json": hub.files["config.json"], "flax_model.msgpack": b"x" * 9000}
    refused(CheckpointError, "neither model.safetensors nor pytorch_model.bin, in one", tmp_path)
    assert hub.downloaded() == {"config.json"}
    del hub.files["config.json"]
    refused(CheckpointError, "owner/model: has no config.json: not a Hugging Face", tmp_path)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's own word
def test_too_little_space_is_said_before_the_download(tmp_path, hub, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("bloomq.converters.hub_files.shutil.disk_usage", lambda path: usage)
    refused(OutputError, "GB more, 0.00 GB are free: free some space, or use --stream", tmp_path)
    assert "model-00001-of-00003.safetensors" not in hub.downloaded()


def test_a_disk_that_runs_full_is_one_line(tmp_path, hub, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    refused(OutputError, "owner/model: disk full: free some space, then run it again", tmp_path)


def test_a_home_that_cannot_be_written_is_one_line(tmp_path, hub):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file")
    refused(OutputError, "cannot be written: ", tmp_path)


def test_without_huggingface_hub_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(InputNotFound, "as an id at the hub it needs huggingface_hub: pip install", tmp_path)


@pytest.mark.parametrize("revision", ["", "a\nb", "\x1b[0m"])
def test_a_revision_that_is_none_is_refused(tmp_path, hub, revision):
    refused(UsageError, "expected a branch, a tag or a commit", tmp_path, revision=revision)
    assert not hub.requests


@pytest.mark.parametrize("options", [{"revision": "main"}, {"stream": True}])
def test_options_of_an_id_are_refused_for_a_folder(tmp_path, checkpoint, options):
    with pytest.raises(UsageError, match="is a path: a revision and --stream are for a hub id"):
        convert(checkpoint, tmp_path / "pack", **options)


def test_an_id_that_the_library_refuses_is_no_folder(tmp_path, hub):
    with pytest.raises(InputNotFound, match="no such folder, and no id of a repository"):
        convert("owner/name..x", tmp_path / "pack")


@pytest.mark.parametrize("text", ["model", "a/b/c", "./a/b", "../b", "/a/b", "a/.b", "a /b", ""])
def test_other_texts_are_paths(text):
    assert not hub_module.is_id(text)


def test_texts_of_the_form_are_ids():
    assert hub_module.is_id("bigscience/bloomz-7b1")
