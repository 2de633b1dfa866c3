"""Compiled kernels: kept in a private folder, and compiled anyway where that is of no use."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import float32, void

from bloomq.backends.numba_cpu import jit

SCRIPT = """
import logging, sys
import numpy as np
logging.basicConfig(stream=sys.stdout, format="%(name)s %(levelname)s %(message)s", level="INFO")
{before}
from bloomq.backends.numba_cpu.program import Program
from bloomq.backends.numba_cpu.prologue import norm_rows
from bloomq.backends.numba_cpu.threads import Pool
x, out = np.array([[1, 3], [4, 4]], np.float32), np.empty((2, 2), np.float32)
gain, shift, program = np.ones(2, np.float32), np.zeros(2, np.float32), Program()
program.add(norm_rows(), 2, 1, x.ctypes.data, 8, 2, gain.ctypes.data, shift.ctypes.data, 1e-5,
            out.ctypes.data, 8)
Pool(1).run(program)
print(out.round(3).tolist())
"""
RESULT = "[[-1.0, 1.0], [0.0, 0.0]]"
COMPILED = "bloomq.compile INFO compiled norm_rows ("
HELPERS = tuple(
    f"bloomq.compile INFO compiled {name} (" for name in ("run_program", "help_program")
)


def run(cache: Path | str | None, *, before: str = "", **environment: str) -> list[str]:
    """The log of compiling one cheap kernel in a process of its own, less that of what runs it; the
    result must be right."""
    settings = {k: v for k, v in os.environ.items() if k not in ("BLOOMQ_CACHE_DIR", "NUMBA_CACHE")}
    settings |= environment
    if cache is not None:
        settings["BLOOMQ_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)], env=settings, capture_output=True,
        text=True, timeout=120, cwd=environment.get("PWD"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *log, result = done.stdout.splitlines()
    assert result == RESULT
    return [line for line in log if not line.startswith(HELPERS)]


def kernels(base: Path) -> Path:
    """The folder of these sources' kernels below a cache."""
    return base / jit.cache_dir().name


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what SCRIPT compiles; to be copied."""
    base = tmp_path_factory.mktemp("filled")
    (line,) = run(base)
    assert line.startswith(COMPILED)
    return base


@pytest.fixture
def found(filled: Path, tmp_path: Path) -> Path:
    """A copy of a cache that holds what SCRIPT compiles. Numba looks at its sources' times, not at
    its own files'."""
    return shutil.copytree(filled, tmp_path / "cache")


def refused(folder: Path | str) -> str:
    return (
        f"bloomq.compile WARNING {folder} is not a folder that only you can write: kernels are "
        "compiled in every process; set BLOOMQ_CACHE_DIR to one that is"
    )


# -- a cache that works ----------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_and_then_found(filled: Path, found: Path):
    assert kernels(filled).stat().st_mode & 0o077 == 0
    assert run(found) == []


def test_the_cache_is_found_by_the_users_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BLOOMQ_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    found = [jit.cache_dir().parent]
    for name in ("BLOOMQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        found.append(jit.cache_dir().parent)
    assert found == [Path("/a"), Path("/b/bloomq"), Path("/c/.cache/bloomq")]


def test_numbas_own_cache_setting_is_left_as_it_was(tmp_path: Path):
    before = numba.config.CACHE_DIR
    with jit._cache_at(tmp_path):
        inside = numba.config.CACHE_DIR
    assert (inside, numba.config.CACHE_DIR) == (str(tmp_path), before)


# -- a folder that others may write ----------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX rights")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702], ids=oct)
def test_a_folder_that_others_may_write_is_not_read(found: Path, mode: int):
    kernels(found).chmod(mode)
    log = run(found)
    assert log[0] == refused(kernels(found))
    assert log[1].startswith(COMPILED)
    assert len(log) == 2


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)(), reason="only root can give files away")
def test_a_folder_of_somebody_else_is_not_read(tmp_path: Path):
    kernels(tmp_path).mkdir(mode=0o700)
    os.chown(kernels(tmp_path), 65534, 65534)
    assert run(tmp_path)[0] == refused(kernels(tmp_path))


def test_a_folder_that_we_may_not_write_is_not_used(tmp_path: Path, monkeypatch):
    """By what the system says: root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not jit._is_private(tmp_path / "kernels")


def test_a_file_in_place_of_the_folder_is_not_used(tmp_path: Path):
    (tmp_path / "cache").write_text("mine")
    log = run(tmp_path / "cache")
    assert log[0] == refused(kernels(tmp_path / "cache"))
    assert log[1].startswith(COMPILED)
    assert (tmp_path / "cache").read_text() == "mine"


def test_a_home_that_is_no_absolute_path_is_not_used(tmp_path: Path):
    """As under a service without a home folder; nothing may appear where it happens to run."""
    log = run(None, HOME="nowhere", XDG_CACHE_HOME="", PWD=str(tmp_path), PYTHONPATH=os.getcwd())
    assert log[0] == refused(f"nowhere/.cache/bloomq/{jit.cache_dir().name}")
    assert log[1].startswith(COMPILED)
    assert list(tmp_path.iterdir()) == []


# -- damage ----------------------------------------------------------------------------------------


def doubled(x):
    for i in range(x.shape[0]):
        x[i] = 2 * x[i]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds `doubled`."""
    monkeypatch.setenv("BLOOMQ_CACHE_DIR", str(tmp_path))
    compile_doubled()
    assert {file.suffix for file in kernels(tmp_path).rglob("*.nb*")} == {".nbi", ".nbc"}
    return tmp_path


def compile_doubled() -> None:
    x = np.array([1, 2.5], np.float32)
    jit.compiled(void(float32[::1]))(doubled)(x)
    assert x.tolist() == [2, 5]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, "bloomq.compile")
    return caplog


def test_a_cached_kernel_says_nothing(cache: Path, log):
    compile_doubled()
    assert log.messages == []


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("keep", [0, 1, 2, 20, 100, 0.5, 0.9, -1])
def test_a_kernel_cut_short_is_compiled_again(cache: Path, log, suffix: str, keep: float):
    (file,) = kernels(cache).rglob(f"*{suffix}")
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    log.clear()
    compile_doubled()
    warning, compiled = log.messages
    assert warning.startswith(f"{kernels(cache)} is damaged or full (")
    assert warning.endswith("): delete it")
    assert compiled.startswith("compiled doubled (")


def test_a_kernel_of_the_model_cut_short_is_compiled_again(found: Path):
    for file in kernels(found).rglob("*.nb*"):
        file.write_bytes(file.read_bytes()[:50])
    log = run(found)
    assert log[0].startswith(f"bloomq.compile WARNING {kernels(found)} is damaged or full (")
    assert log[1].startswith(COMPILED)
    assert len(log) == 2


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_cache_on_a_full_disk_costs_time_not_the_run(tmp_path: Path):
    """A limit on the size of files stands for the disk: mounting one is not allowed everywhere."""
    log = run(tmp_path, before=FULL)
    assert log[0].startswith(f"bloomq.compile WARNING {kernels(tmp_path)} is damaged or full (")
    assert log[0].endswith("): delete it")
    assert log[1].startswith(COMPILED)
    assert len(log) == 2
    assert run(tmp_path)[-1].startswith(COMPILED)  # and a disk with room again is used
    assert run(tmp_path) == []
