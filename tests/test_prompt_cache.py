"""A prompt's keys and values in a file: taken up again, and refused where they are not its own."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tiny, pack
from safetensors.numpy import load_file, save_file

import bloomq
from bloomq import prompt_cache
from bloomq.errors import CapacityError, InputNotFound, OutputError, PromptCacheError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.tensorfile import TensorFile

TINY = Tiny(n_head=4, head_dim=16, vocab_size=211, seed=4)
PROMPT = np.random.default_rng(1).integers(4, 211, 150).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def tiny(base: Path) -> LanguageModel:
    return bloomq.load(pack(base, TINY, "int8"))


@pytest.fixture(scope="module")
def saved(base: Path) -> Path:
    """A file of the first 150 tokens."""
    path = base / "a prompt.cache"
    assert prompt_cache.save(bloomq.load(pack(base, TINY, "int8")), PROMPT, path) == 150
    return path


def rewritten(saved: Path, target: Path, change, **about: str) -> Path:
    """A copy with other arrays or other words in its header, its checksum made to fit."""
    arrays = load_file(saved)
    change(arrays)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    words = {**TensorFile.open(saved).metadata, **about}
    if "sha256" not in about and sorted(arrays) == sorted(prompt_cache._NAMES):
        words["sha256"] = prompt_cache._digest(arrays)
    save_file(arrays, target, metadata=words)
    return target


# -- taken up again --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "f32", "int8"])
def test_another_process_goes_on_without_reading_the_prompt(base, tmp_path, dtype):
    first = bloomq.load(pack(base, TINY, "int8"), cache_dtype=dtype)
    expected = first.generate([*PROMPT, 7, 9], max_new_tokens=20)
    prompt_cache.save(first, PROMPT, tmp_path / "p")
    second = bloomq.load(pack(base, TINY, "int8"), cache_dtype=dtype)
    assert prompt_cache.load(second, tmp_path / "p") == PROMPT
    found = second.generate([*PROMPT, 7, 9], max_new_tokens=20)
    assert found.stats.reused_tokens == 150
    assert (found.ids, found.logprobs) == (expected.ids, expected.logprobs)


@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_other_backends_have_it_too(base, tmp_path, backend):
    first, second = (bloomq.load(pack(base, TINY, "f32"), backend=backend) for _ in range(2))
    prompt_cache.save(first, PROMPT[:40], tmp_path / "p")
    prompt_cache.load(second, tmp_path / "p")
    found = second.generate([*PROMPT[:40], 7], max_new_tokens=3)
    assert found.stats.reused_tokens == 40
    assert found.ids == first.generate([*PROMPT[:40], 7], max_new_tokens=3).ids


def test_what_is_held_is_not_read_again_to_be_saved(tiny, tmp_path, monkeypatch):
    tiny.generate(PROMPT, max_new_tokens=5)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.head, "step", None)
        prompt_cache.save(tiny, PROMPT, tmp_path / "p")
    assert prompt_cache.load(tiny, tmp_path / "p") == PROMPT


def test_a_file_is_replaced_as_a_whole(tiny, saved, tmp_path):
    target = shutil.copy(saved, tmp_path / "p")
    prompt_cache.save(tiny, PROMPT[:5], target)
    assert prompt_cache.load(tiny, target) == PROMPT[:5]
    assert os.listdir(tmp_path) == ["p"]


# -- refused ---------------------------------------------------------------------------------------


def test_no_file_is_said_so(tiny, tmp_path):
    with pytest.raises(InputNotFound, match="no such file"):
        prompt_cache.load(tiny, tmp_path / "p")


def test_a_file_of_another_pack_is_refused(base, saved):
    other = bloomq.load(pack(base, Tiny(n_head=4, head_dim=16, vocab_size=211, seed=5), "int8"))
    with pytest.raises(PromptCacheError, match=r"belongs to another model: its pack is \w+, this"):
        prompt_cache.load(other, saved)


def test_a_file_of_another_cache_dtype_is_refused(base, saved):
    other = bloomq.load(pack(base, TINY, "int8"), cache_dtype="f32")
    with pytest.raises(PromptCacheError, match=r"its arithmetic is numba.*f16 cache, this one"):
        prompt_cache.load(other, saved)


def test_a_prompt_longer_than_the_context_is_refused(base, saved):
    small = bloomq.load(pack(base, TINY, "int8"), context=100)
    with pytest.raises(CapacityError, match=r"^150 tokens of a prompt, this model keeps 100: "):
        prompt_cache.load(small, saved)
    assert small.generate([5, 6], max_new_tokens=2).ids


def test_any_flipped_bit_is_found(tiny, saved, tmp_path):
    data = saved.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for at in (start, start + 1200, len(data) // 2, len(data) - 1):
        spoilt = bytearray(data)
        spoilt[at] ^= 4
        (tmp_path / "p").write_bytes(spoilt)
        with pytest.raises(PromptCacheError, match="does not match its checksum: it is damaged"):
            prompt_cache.load(tiny, tmp_path / "p")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_of_ours(base, data):
    model = damaged_model(base)
    saved = base / "a prompt.cache"
    whole = saved.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    spoilt = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, start + 200))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(spoilt)))
    path = base / "damaged.cache"
    path.write_bytes(spoilt[:cut] if data.draw(st.booleans()) else spoilt)
    if path.read_bytes() == whole:
        return
    with pytest.raises((PromptCacheError, CapacityError)):
        prompt_cache.load(model, path)


_MODELS: dict[Path, LanguageModel] = {}


def damaged_model(base: Path) -> LanguageModel:
    if base not in _MODELS:
        _MODELS[base] = bloomq.load(pack(base, TINY, "int8"))
        prompt_cache.save(_MODELS[base], PROMPT, base / "a prompt.cache")
    return _MODELS[base]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.update(ids=a["ids"][:-1]), "its ids are not of its keys"),
        (lambda a: a.update(ids=a["ids"].astype(np.int32)), "its ids are not of its keys"),
        (lambda a: a.update(ids=a["ids"][None]), "its ids are not of its keys"),
        (lambda a: a.update(values=a["values"][:, :-1]), "stored values are float16"),
        (lambda a: a.update(keys=a["keys"].astype(np.float32)), "stored keys are float32"),
        (lambda a: a.update(keys=a["keys"][..., :-1]), "stored keys are float16"),
        (lambda a: a.update(scales=np.ones(3, np.float32)), "stored scales are float32"),
        (lambda a: a.pop("scales"), "expected ids"),
        (lambda a: a.update(more=np.ones(1)), "expected ids"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tiny, saved, tmp_path, change, says):
    path = rewritten(saved, tmp_path / "p", change)
    with pytest.raises(PromptCacheError, match=says):
        prompt_cache.load(tiny, path)
    assert tiny.engine.used_rows == 0


def test_ids_beyond_the_vocabulary_are_refused(tiny, saved, tmp_path):
    path = rewritten(saved, tmp_path / "p", lambda a: a.update(ids=a["ids"] + 211))
    with pytest.raises(UsageError, match="token id"):
        prompt_cache.load(tiny, path)


def test_a_file_of_another_kind_is_refused(tiny, saved, tmp_path):
    (tmp_path / "p").write_bytes(b"no such thing" * 10)
    with pytest.raises(PromptCacheError, match="damaged or truncated"):
        prompt_cache.load(tiny, tmp_path / "p")
    rewritten(saved, tmp_path / "p", lambda a: None, version="2")
    with pytest.raises(PromptCacheError, match="is no prompt cache of version 1"):
        prompt_cache.load(tiny, tmp_path / "p")


def test_numbers_that_are_none_are_refused(tiny, saved, tmp_path):
    def spoil(arrays):
        arrays["keys"] = np.full_like(arrays["keys"], np.nan)

    with pytest.raises(PromptCacheError, match="holds NaN or infinity: it is damaged"):
        prompt_cache.load(tiny, rewritten(saved, tmp_path / "p", spoil))


def test_a_file_that_grows_shorter_under_the_reader_is_an_error(tiny, saved, tmp_path, monkeypatch):
    target = Path(shutil.copy(saved, tmp_path / "p"))
    opened = TensorFile.open

    def shortened(path):
        file = opened(path)
        os.truncate(target, 5000)
        return file

    monkeypatch.setattr(TensorFile, "open", shortened)
    with pytest.raises(PromptCacheError, match="grew shorter while it was read"):
        prompt_cache.load(tiny, target)
    monkeypatch.undo()


def test_a_folder_that_cannot_be_written_is_said_so(tiny, tmp_path):
    with pytest.raises(OutputError, match=r"no such folder/p: cannot be written: "):
        prompt_cache.save(tiny, PROMPT, tmp_path / "no such folder" / "p")


def test_a_full_disk_leaves_the_old_file(base, saved, tmp_path):
    """A limit on the size of files stands for the disk's end."""
    target = shutil.copy(saved, tmp_path / "p")
    before = saved.read_bytes()
    code = (
        "import resource, signal, sys, bloomq\n"
        "from bloomq import prompt_cache\n"
        f"model = bloomq.load({str(pack(base, TINY, 'int8'))!r})\n"
        f"prompt = {PROMPT}\n"
        "model.generate(prompt, max_new_tokens=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: prompt_cache.save(model, prompt, {str(target)!r})\n"
        "except bloomq.OutputError as error: print(error)\n"
    )
    done = warm.python("-c", code)
    assert "cannot be written" in done.stdout, done.stderr
    assert Path(target).read_bytes() == before
    assert os.listdir(tmp_path) == ["p"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
