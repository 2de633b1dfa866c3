"""The threads of the CPU kernels: which layer starts them, and who waits for whom."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from bloomq.backends.numba_cpu import threads as numba_threads
from bloomq.backends.numba_cpu.layers import NumbaBackend
from bloomq.errors import BackendError

WARNING = r"^numba's omp threading layer does not load here; workqueue is used instead: "


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: Numba starts its threads once in each."""
    return subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# -- which layer -----------------------------------------------------------------------------------

LAYER = "import bloomq; print(bloomq.load().backend.threading_layer)"


def test_omp_is_taken_where_it_loads():
    assert run(LAYER).stdout == "omp\n"


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_the_layer_that_the_user_chose_is_taken(layer: str):
    assert run(LAYER, NUMBA_THREADING_LAYER=layer).stdout == f"{layer}\n"


def test_a_layer_that_another_user_of_numba_started_is_taken():
    code = "import numba; numba.config.THREADING_LAYER = 'workqueue'; numba.set_num_threads(1)\n"
    assert run(code + LAYER).stdout == "workqueue\n"


def test_a_layer_that_does_not_exist_is_refused_in_one_line():
    code = (
        "import bloomq\ntry: bloomq.load(backend='numba')\n"
        "except bloomq.BackendError as error: print(error)"
    )
    done = run(code, NUMBA_THREADING_LAYER="nonsense")
    assert done.stdout.startswith("numba starts no threads here ("), done.stderr
    assert done.stdout.endswith("): reinstall numba\n")
    assert done.stdout.count("\n") == 1


def test_no_threading_layer_is_a_backend_error(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def refuse(*args: object) -> None:
        tried.append(numba_threads.numba.config.THREADING_LAYER)
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(numba_threads.numba, "threading_layer", refuse)
    monkeypatch.setattr(numba_threads.numba, "set_num_threads", refuse)
    expected = (
        r"^numba starts no threads here \(No threading layer could be loaded\.\): reinstall numba$"
    )
    for chosen, then in (("omp", ["omp"]), ("default", ["omp", "default"])):
        monkeypatch.setattr(numba_threads.numba.config, "THREADING_LAYER", chosen)
        tried.clear()
        with pytest.raises(BackendError, match=expected):
            NumbaBackend(1)
        assert tried[1:] == then  # the first asks whether threads run already


def test_a_reason_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object) -> None:
        raise ValueError("No threading layer could be loaded.\nHINT:\nIntel TBB is required")

    monkeypatch.setattr(numba_threads.numba, "threading_layer", refuse)
    monkeypatch.setattr(numba_threads.numba, "set_num_threads", refuse)
    monkeypatch.setattr(numba_threads.numba.config, "THREADING_LAYER", "tbb")
    with pytest.raises(BackendError) as caught:
        NumbaBackend(1)
    assert "\n" not in str(caught.value)


def test_the_next_layer_is_tried_where_omp_does_not_load(monkeypatch: pytest.MonkeyPatch):
    started: list[str] = []

    def start(threads: int) -> None:
        layer = numba_threads.numba.config.THREADING_LAYER
        if layer == "omp":
            raise ValueError("No threading layer could be loaded.")
        started.append(layer)

    def layer() -> str:
        if not started:
            raise ValueError("Threading layer is not initialized.")
        return "workqueue"

    monkeypatch.setattr(numba_threads.numba.config, "THREADING_LAYER", "default")
    monkeypatch.setattr(numba_threads.numba, "set_num_threads", start)
    monkeypatch.setattr(numba_threads.numba, "threading_layer", layer)
    with pytest.warns(RuntimeWarning, match=WARNING):
        assert numba_threads.start_threads(1) == "workqueue"
    assert started == ["default"]


# -- how idle threads wait -------------------------------------------------------------------------

SPIN = """
import os, numba, bloomq
seen = []
start = numba.set_num_threads
def watched(n):
    seen.append(os.environ.get("GOMP_SPINCOUNT"))
    start(n)
numba.set_num_threads = watched
bloomq.load()
print(seen[0], os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 7"),
        ({"OMP_WAIT_POLICY": "passive"}, "None None"),
    ],
    ids=["ours", "the user's count", "the user's policy"],
)
def test_idle_threads_spin_briefly_unless_the_user_says_otherwise(
    environment, expected, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run(SPIN, **environment).stdout == f"{expected}\n"


# -- one at a time ---------------------------------------------------------------------------------


def at_once(kernel) -> int:
    """How many of four Python threads were inside the kernel together, at most."""
    inside, most, lock = 0, 0, threading.Lock()

    def body(*args: object) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= 1

    threads = [threading.Thread(target=kernel(body), args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_workqueue_warns_and_its_kernels_take_one_call_at_a_time(monkeypatch):
    monkeypatch.setattr(numba_threads.numba, "threading_layer", lambda: "workqueue")
    with pytest.warns(RuntimeWarning, match=WARNING):
        NumbaBackend(1)
    assert at_once(numba_threads.entry) == 1


def test_a_kernel_that_fails_under_workqueue_lets_the_next_one_in(monkeypatch):
    monkeypatch.setattr(numba_threads.numba, "threading_layer", lambda: "workqueue")

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        numba_threads.entry(fail)()
    assert at_once(numba_threads.entry) == 1


def test_kernels_of_other_layers_run_together(monkeypatch):
    monkeypatch.setattr(numba_threads.numba, "threading_layer", lambda: "omp")
    assert at_once(numba_threads.entry) > 1


TWO_AT_ONCE = """
import threading, bloomq
models = [bloomq.load(threads=2) for _ in range(2)]
prompts = ["Once upon a time " * 40, "El perro y el gato " * 40]
expected = [m.generate(p, max_new_tokens=4).ids for m, p in zip(models, prompts)]
wrong = []
def work(i):
    for _ in range(4):
        found = models[i].generate(prompts[i], max_new_tokens=4).ids
        if found != expected[i]:
            wrong.append(found)
threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for t in threads: t.start()
for t in threads: t.join()
print(models[0].backend.threading_layer, wrong)
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_two_models_may_generate_in_two_python_threads(layer: str):
    """Numba's workqueue ends the process where two parallel calls meet."""
    done = run(TWO_AT_ONCE, NUMBA_THREADING_LAYER=layer)
    assert (done.returncode, done.stdout) == (0, f"{layer} []\n"), done.stderr


# -- how many --------------------------------------------------------------------------------------


def test_processors_without_a_topology_count_as_cores(monkeypatch: pytest.MonkeyPatch):
    def absent(path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(numba_threads.Path, "read_text", absent)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert numba_threads.physical_cores() == allowed


def test_hyperthreads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    pairs = {"cpu0": "0,2\n", "cpu2": "0,2\n", "cpu1": "1,3\n", "cpu3": "1,3\n"}
    monkeypatch.setattr(numba_threads.Path, "read_text", lambda path: pairs[path.parts[5]])
    assert numba_threads.physical_cores() == 2


def test_a_system_without_affinity_has_its_processors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert numba_threads.physical_cores() == (os.cpu_count() or 1)
