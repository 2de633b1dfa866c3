"""`python ...` in forks of a warm process, where imports are done and kernels are at hand: a new
process of bloomq takes a second until its command begins, a fork some milliseconds.

A fork is a process like any other: its own streams, folder, environment and exit code. What an
interpreter does when it starts and ends (what it imports, variables that Numba and Python read,
terminals, streams that are closed or full) is seen in a new one alone.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

LONG_S = 120


def python(
    *arguments: object,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` writes, and its exit code: `-m MODULE ...`, `-c CODE ...` or
    `SCRIPT ...`. Its streams are pipes; what comes out is UTF-8."""
    words = [str(argument) for argument in arguments]
    job = {"words": words, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
    (theirs, ours), (out, its_out), (err, its_err) = os.pipe(), os.pipe(), os.pipe()
    server = _server()
    server.start(job, (theirs, its_out, its_err))
    with ThreadPoolExecutor(2) as readers:
        try:
            texts = readers.map(_all_of, (out, err), timeout=LONG_S)
            with suppress(BrokenPipeError), open(ours, "wb") as file:
                file.write(stdin)
            raw, code = list(texts), server.exit_code()
        except BaseException:  # its next answer would be this job's: it ends, and the job with it
            server.close()
            atexit.unregister(server.close)
            _server.cache_clear()
            raise
    stdout, stderr = (text.decode() for text in raw)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def _all_of(handle: int) -> bytes:
    with open(handle, "rb") as file:
        return file.read()


class _Server:
    """The warm process, and a socket on which it is told what a fork shall run."""

    def __init__(self) -> None:
        self._socket, its_socket = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(its_socket.fileno())],
            pass_fds=[its_socket.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        its_socket.close()
        self._socket.settimeout(LONG_S)

    def start(self, job: dict[str, Any], streams: tuple[int, int, int]) -> None:
        """Run a job with these streams, which are closed here."""
        data = json.dumps(job).encode()
        socket.send_fds(self._socket, [len(data).to_bytes(8, "little")], streams)
        self._socket.sendall(data)
        for stream in streams:
            os.close(stream)

    def exit_code(self) -> int:
        """Of the job that was started last, once it has ended."""
        code = self._socket.recv(4)
        assert code, "the warm process has died"
        return int.from_bytes(code, "little", signed=True)

    def close(self) -> None:
        self._socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@lru_cache(maxsize=1)
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


# -- the warm process ------------------------------------------------------------------------------


def jobs(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Returns in forks alone: the job of each, and its streams."""
    while True:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not size:
            raise SystemExit
        with connection.makefile("rb") as file:
            job = json.loads(file.read(int.from_bytes(size, "little")))
        child = os.fork()
        if not child:
            connection.close()
            return job, streams
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(code.to_bytes(4, "little", signed=True))


def run(words: list[str]) -> None:
    """What `python WORDS` does; `sys.path` begins as its does."""
    if words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        script = os.path.abspath(words[0])
        sys.path[0], sys.argv = os.path.dirname(script), words
        runpy.run_path(script, run_name="__main__")


def main() -> None:
    import bloomq.converters.convert

    import bloomq.cli  # what most forks import

    bloomq.load(threads=1)  # no helpers: a fork has none of its parent's threads
    job, streams = jobs(socket.socket(fileno=int(sys.argv[1])))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    end(run, job["words"])


def end(work: Callable[[list[str]], None], words: list[str]) -> NoReturn:
    """Work, and exit as an interpreter does, without the second that freeing kernels takes."""
    code: Any = 0
    try:
        work(words)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for threads, as an interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
