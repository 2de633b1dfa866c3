"""Processes that peers run in: asked line by line, stopped in between, ended before they harm."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

MEMORY_FLOOR_MB = 1024  # a child is ended before the system has less than this left
DEADLINE_S = 3600  # of one answer or preparation


class PeerError(Exception):
    """A peer, or bloomq beside it, cannot do this: one line that says why."""


class Child:
    """A process that answers lines with JSON, and is stopped while it is not asked.

    It is killed, and the reason kept, when an answer is overdue or, if it is the one to `yield_`,
    when the system's memory runs short.
    """

    def __init__(
        self, command: Sequence[object], log: Path, threads: int, *, yield_: bool = True
    ) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.yield_, self.reason = log, yield_, ""
        self.deadline = time.monotonic() + DEADLINE_S
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=stderr, text=True, env=environment,
            )  # fmt: skip
        self.done = Event()
        Thread(target=self._guard, daemon=True).start()

    def _guard(self) -> None:
        while not self.done.wait(0.2):
            if self.yield_ and memory_mb("MemAvailable") < MEMORY_FLOOR_MB:
                total_gb = memory_mb("MemTotal") / 1e3
                self.reason = f"needs more memory than is free of the {total_gb:.0f} GB here"
            elif time.monotonic() > self.deadline:
                self.reason = f"no answer in {DEADLINE_S} s"
            if self.reason:
                self.process.kill()
                return

    def read(self) -> dict[str, Any]:
        """The next answer. Raises: PeerError with the log's last line where the child ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(self._why())
        answer: dict[str, Any] = json.loads(line)
        self.process.send_signal(signal.SIGSTOP)
        self.deadline = math.inf
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.deadline = time.monotonic() + DEADLINE_S
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._why()) from None
        return self.read()

    def finish(self) -> None:
        """Wait for a child that only works. Raises: PeerError if it fails."""
        self.process.communicate()
        if self.process.returncode:
            raise PeerError(self._why())

    def _why(self) -> str:
        code = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return self.reason or f"{lines[-1].strip() if lines else f'exit code {code}'} ({self.log})"

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.done.set()
        self.process.kill()
        self.process.communicate()


def memory_mb(field: str) -> float:
    text = Path("/proc/meminfo").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024 / 1e6
