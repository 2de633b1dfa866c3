"""The threads of the CPU kernels: who works on a program, who is waited for, and when they end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import lru_cache

import numpy as np
import pytest

from bloomq.backends.numba_cpu import threads as numba_threads
from bloomq.backends.numba_cpu.jit import kernel
from bloomq.backends.numba_cpu.memory import fields, longs
from bloomq.backends.numba_cpu.pages import Page
from bloomq.backends.numba_cpu.program import Buffer, Program
from bloomq.backends.numba_cpu.threads import Pool

BIG = 1 << 30  # bytes touched that wake helpers


@lru_cache
def add_one():
    """numbers[unit] += 1 after some work, and where numbers[0] was then. Arguments: numbers."""

    @kernel
    def add_one(arguments, first, last):
        numbers = longs(fields(arguments, 1)[0], last)
        for unit in range(first, last):
            noise = 0
            for i in range(2000):
                noise ^= i * numbers[0]
            numbers[unit] += 1 + (noise & 0)

    return add_one


@lru_cache
def note_chunk():
    """Of each unit: chunks that had it += 1, the first and the last unit of its chunk. Arguments:
    noted [units, 3]."""

    @kernel
    def note_chunk(arguments, first, last):
        noted = longs(fields(arguments, 1)[0], 3 * last)
        for unit in range(first, last):
            noted[3 * unit] += 1
            noted[3 * unit + 1] = first
            noted[3 * unit + 2] = last

    return note_chunk


@lru_cache
def mirror():
    """target[unit] = source[units - 1 - unit] + 1, which another thread may have written.
    Arguments: source, target, units."""

    @kernel
    def mirror(arguments, first, last):
        source, target, units = fields(arguments, 3)
        for unit in range(first, last):
            longs(target, units)[unit] = longs(source, units)[units - 1 - unit] + 1

    return mirror


def counting(units: int = 500, operations: int = 20) -> tuple[Program, np.ndarray]:
    """A program each of whose operations adds one to every number."""
    program, numbers = Program(), np.zeros(units, np.int64)
    for _ in range(operations):
        program.add(add_one(), units, 3, numbers.ctypes.data, touched=BIG)
    program.keep(numbers)
    return program, numbers


def helpers_alive() -> int:
    return sum(thread.name == "bloomq" for thread in threading.enumerate())


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


# -- programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_unit_of_every_operation_is_done_once(threads: int):
    program, numbers = counting()
    pool = Pool(threads)
    for run in range(1, 20):
        pool.run(program)
        assert (numbers == 20 * run).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("units", [1, 2, 7, 8, 9, 63, 64, 65, 500])
def test_chunks_cover_each_unit_once_and_split_no_block(threads: int, units: int):
    """Whichever thread begins; without `most` each chunk is a block, as of tokens in a prologue."""
    for least in (1, 3, 8, 100):
        for most in (0, 1, 5, 64, 1000):
            for who in {0, 1, threads // 2, threads - 1}:
                program, noted = Program(), np.zeros((units, 3), np.int64)
                program.add(note_chunk(), units, least, noted.ctypes.data, most=most)
                program.job(threads).help(who, 0)
                count, first, last = noted.T
                at = np.arange(units)
                assert (count == 1).all()
                assert (first <= at).all()
                assert (at < last).all()
                assert (last - first <= max(least, most)).all()
                if not most:
                    assert (first == at // least * least).all()
                    assert (last == np.minimum(first + least, units)).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_more_threads_than_cores_do_any_program_right(threads: int):
    """Operations that read what the last wrote, of random sizes, run again and again."""
    rng, pool = np.random.default_rng(threads), Pool(threads)
    for _ in range(12):
        units, program = int(rng.integers(1, 200)), Program()
        here, there = np.zeros((2, units), np.int64)
        pairs = int(rng.integers(1, 30))
        for source, target in [(here, there), (there, here)] * pairs:
            least, most = int(rng.integers(1, 9)), int(rng.integers(0, 40))
            at = source.ctypes.data, target.ctypes.data
            program.add(mirror(), units, least, *at, units, most=most, touched=BIG)
        for run in range(1, 15):
            pool.run(program)
            assert (here == 2 * pairs * run).all()


def test_an_operation_without_units_is_none():
    program, numbers = counting(operations=1)
    program.add(add_one(), 0, 1, numbers.ctypes.data)
    Pool(1).run(program)
    assert (numbers == 1).all()


def test_a_program_of_nothing_ends():
    Pool(2).run(Program())


@pytest.mark.parametrize("kind", [Buffer, Page])
def test_what_ctrl_c_cuts_off_while_it_is_made_ends_without_a_word(kind, monkeypatch):
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    half = kind.__new__(kind)
    del half
    assert not said


def test_helpers_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numba_threads._Helpers, "_help", lambda self, bell, who: None)
    program, numbers = counting()
    Pool(3).run(program)
    assert (numbers == 20).all()


def test_a_helper_that_comes_after_the_end_changes_nothing():
    program, numbers = counting()
    job = program.job()
    job.work()
    Pool(1).run(program)  # in between, the program has run again
    job.work()
    assert (numbers == 40).all()


def test_a_helper_works_on_though_nobody_else_refers_to_the_program():
    program, numbers = Program(), np.zeros(100, np.int64)
    for _ in range(20):
        program.add(add_one(), 100, 3, numbers.ctypes.data)
    job, there = program.job(2), weakref.ref(program)
    del program
    gc.collect()
    assert there() is not None
    job.help(1, 0)
    assert (numbers == 20).all()


def test_a_program_that_has_run_is_held_by_nobody():
    """Nor what it read, as pages of keys: the helpers have the latest job until the next comes."""
    pool = Pool(2)
    program, _ = counting()
    program.held = np.zeros(3)
    there = weakref.ref(program), weakref.ref(program.held)
    pool.run(program)
    del program
    gc.collect()
    assert [one() for one in there] == [None, None]


def test_small_programs_are_done_by_the_caller_alone():
    program, numbers = Program(), np.zeros(4, np.int64)
    program.add(add_one(), 4, 1, numbers.ctypes.data, touched=1000)
    pool = Pool(2)
    before = helpers_alive()
    pool.run(program)
    assert helpers_alive() == before


def test_many_callers_at_once_each_get_their_own_result():
    pool, wrong = Pool(2), []

    def work() -> None:
        program, numbers = counting(200, 10)
        for run in range(1, 30):
            pool.run(program)
            if not (numbers == 10 * run).all():
                wrong.append(numbers.copy())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_ctrl_c_before_the_work_leaves_no_helper_at_it(monkeypatch: pytest.MonkeyPatch):
    pool = Pool(2)
    program, numbers = counting()
    publish = numba_threads._Helpers.publish

    def interrupted(self, job):
        publish(self, job)
        if job is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(numba_threads._Helpers, "publish", interrupted)
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            pool.run(program)
        then = numbers.copy()
        time.sleep(0.01)
        assert (numbers == then).all()


def test_ctrl_c_ends_a_long_step_long_before_its_end():
    """Between slices of operations Python sees the signal; what was begun is finished, no more."""
    program, numbers = counting(units=2000, operations=200_000)  # more than a second
    pool = Pool(2)

    # A shell's background jobs ignore Ctrl-C, and so would Python in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(program)
    finally:
        signal.signal(signal.SIGINT, before)
    then = numbers.copy()
    time.sleep(0.02)
    assert (numbers == then).all()
    assert numbers.max() < 200_000


def test_a_system_without_more_threads_has_fewer_helpers(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(numba_threads.threading.Thread, "start", refuse)
    program, numbers = counting()
    Pool(3).run(program)
    assert (numbers == 20).all()


def test_memory_that_nothing_refers_to_is_used_again():
    program = Program()
    first = program.buffer(4, 100, np.float32)
    address = first.address
    second = program.buffer(4, 100, np.float32)
    assert second.address != address
    del first
    assert program.buffer(4, 100, np.float32).address == address


def test_buffers_begin_and_go_on_at_cache_lines():
    program = Program()
    for columns in (1, 33, 100):
        buffer = program.buffer(3, columns, np.float32)
        assert isinstance(buffer, Buffer)
        assert buffer.address % 64 == 0
        assert buffer.stride_bytes % 128 == 0
        assert buffer.values().shape == (3, columns)


# -- helpers ---------------------------------------------------------------------------------------


def test_memory_outlives_a_buffer_whose_return_ctrl_c_cut_off(monkeypatch: pytest.MonkeyPatch):
    """Python drops an exception that comes up in `__del__`; operations still have the address."""
    program = Program()
    memory = weakref.ref(root(program.buffer(1, 64, np.float32).array))
    assert memory() is not None
    monkeypatch.setattr(Program, "give_back", lambda self, array: None)
    memory = weakref.ref(root(program.buffer(1, 4096, np.float32).array))
    gc.collect()
    assert memory() is not None


def root(array: np.ndarray) -> np.ndarray:
    """The array that owns a view's memory."""
    return array if array.base is None else root(array.base)


def test_helpers_start_at_the_first_need_and_end_with_their_pool():
    gc.collect()
    before = helpers_alive()
    pool = Pool(4)
    assert helpers_alive() == before
    program, _ = counting()
    pool.run(program)
    assert helpers_alive() == before + 3
    del pool
    gc.collect()
    deadline = time.monotonic() + 10
    while helpers_alive() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert helpers_alive() == before


def test_ctrl_c_while_helpers_start_leaves_none_of_them(monkeypatch: pytest.MonkeyPatch):
    gc.collect()
    before, start, started = helpers_alive(), threading.Thread.start, [0]

    def interrupted(self: threading.Thread) -> None:
        start(self)
        started[0] += 1
        if started[0] == 2:
            raise KeyboardInterrupt

    pool = Pool(4)
    program, numbers = counting()
    monkeypatch.setattr(numba_threads.threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run(program)
    deadline = time.monotonic() + 10
    while helpers_alive() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert helpers_alive() == before
    assert not numbers.any()
    pool.run(program)
    assert (numbers == 20).all()
    assert helpers_alive() == before + 3


def test_helpers_sleep_when_there_is_nothing_to_do():
    pool = Pool(2)
    program, _ = counting()
    pool.run(program)
    time.sleep(0.2)
    started = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - started < 0.1


FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")
import bloomq
model = bloomq.load(threads=2)
prompt = "Once upon a time " * 200
ids = model.generate(prompt, max_new_tokens=4).ids
sys.stdout.flush()
child = os.fork()
if child == 0:
    print(model.generate(prompt, max_new_tokens=4).ids == ids)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
print(model.generate(prompt, max_new_tokens=4).ids == ids)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_helpers_of_its_own():
    done = run_script(FORKED)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


TWO_AT_ONCE = """
import threading, bloomq
model = bloomq.load(threads=2)
prompts = ["Once upon a time " * 200, "El perro y el gato " * 200]
expected = [model.generate(p, max_new_tokens=4).ids for p in prompts]
wrong = []
def work(i):
    for _ in range(4):
        found = model.generate(prompts[i], max_new_tokens=4).ids
        if found != expected[i]:
            wrong.append(found)
threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
for t in threads: t.start()
for t in threads: t.join()
print(wrong)
"""


def test_one_model_may_generate_in_two_python_threads():
    done = run_script(TWO_AT_ONCE)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


MANY_SHAPES = """
import sys, threading, bloomq
sys.setswitchinterval(1e-6)
model = bloomq.load(backend="numba", threads=1)
prompts = [list(range(1, 2 + n)) for n in range(24)]
expected = [model.generate(p, max_new_tokens=2).ids for p in prompts]
wrong = []
def work(first):
    for i in range(len(prompts)):
        at = (first + i) % len(prompts)
        if model.generate(prompts[at], max_new_tokens=2).ids != expected[at]:
            wrong.append(at)
threads = [threading.Thread(target=work, args=(4 * i,)) for i in range(6)]
for t in threads: t.start()
for t in threads: t.join()
print(wrong)
"""


def test_steps_of_many_shapes_may_run_in_many_python_threads():
    done = run_script(MANY_SHAPES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


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
