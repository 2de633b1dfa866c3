"""All figures of the CUDA backend inside ten minutes: correctness, then speed beside transformers.

    python benchmarks/gpu_figures.py [--out DIR] [--device cuda:0] [--sections decode big ...]
                                     [--seconds 570] [--dry-run]

Each section runs in a process of its own with a limit of time; what it has measured is in
DIR/figures.jsonl as it comes, and a crash, an overrun or a missing package is a line in the table.
DIR/table.md is written anew after every section; DIR/log.txt has everything that was printed.
`--dry-run` runs the same code on tiny shapes on the CPU, where no figure means anything.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpu_goals import cuts_table, figures, latest, table, ways_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ROWS = "figures.jsonl"
# Seconds that a section may take, in the order of what is wanted most when time is short. Together
# more than there are: few need theirs.
LIMITS = {
    "machine": 40, "conformance": 150, "parity": 60, "greedy": 90, "decode": 150, "big": 150,
    "prefill": 60, "batch": 90, "small": 60, "load": 90, "memory": 60, "profile": 60,
    "ways": 100, "cuts": 120,
}  # fmt: skip
# Tests that use a GPU where there is one; the backend's others are the CPU's anywhere.
ON_GPU = (
    "conformance", "cuda_attention", "cuda_steps", "triton_products", "triton_attention",
    "triton_norm",
)  # fmt: skip
LEAST_SECONDS = 10  # less is not worth a start
GRACE_SECONDS = 15  # beyond its limit, for the round that is under way


@dataclass(frozen=True, slots=True)
class Job:
    """What every section is started with."""

    out: Path
    scratch: Path
    device: str
    tiny: bool

    def rows(self) -> list[dict[str, Any]]:
        path = self.out / ROWS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def emit(self, section: str, what: str, **facts: object) -> None:
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps({"section": section, "what": what, **facts}) + "\n")

    def write_table(self) -> str:
        rows = latest(self.rows())
        title = ["Dry run on tiny shapes: no figure means anything.", ""] if self.tiny else []
        lines = [
            *title,
            *figures(rows),
            "",
            *ways_table(rows),
            *cuts_table(rows),
            *table(rows, meaning=not self.tiny),
            "",
        ]
        text = "\n".join(lines)
        (self.out / "table.md").write_text(text)
        return text


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, "table.md", "log.txt", "profile.txt"):
        (args.out / name).unlink(missing_ok=True)
    deadline = time.monotonic() + args.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        job = Job(args.out.resolve(), Path(scratch), args.device, args.dry_run)
        try:
            for section in args.sections:
                run(job, section, deadline)
        finally:
            print(job.write_table(), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-figures")
    parser.add_argument("--scratch", type=Path, help="where a pack of 2 GB may be written")
    parser.add_argument("--device", help="cuda:0, or cpu for a dry run")
    parser.add_argument("--sections", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=570, help="for all sections together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    args.device = args.device or ("cpu" if args.dry_run else "cuda:0")
    return args


def run(job: Job, section: str, deadline: float) -> None:
    """One section, within its limit and what is left of all; a row says why it did not end well."""
    left = min(LIMITS[section], deadline - time.monotonic())
    if left < LEAST_SECONDS:
        job.emit(section, section, failed="skipped: no time was left")
        return
    started = time.monotonic()
    print(f"{section} ... ", end="", flush=True)
    with (job.out / "log.txt").open("a") as log:
        log.write(f"\n==== {section}, {left:.0f} s\n")
        log.flush()
        problem = conformance(job, log, left) if section == "conformance" else work(
            job, section, log, left
        )  # fmt: skip
    if problem:
        job.emit(section, section, failed=problem)
    print(f"{time.monotonic() - started:.0f} s{f': {problem}' if problem else ''}", flush=True)
    job.write_table()


def work(job: Job, section: str, log: IO[str], seconds: float) -> str:
    """Why the section's process ended otherwise than it should; "" where it did not."""
    command = [
        sys.executable, str(HERE / "gpu_worker.py"), section, "--device", job.device,
        "--out", str(job.out), "--scratch", str(job.scratch), "--seconds", str(seconds),
    ]  # fmt: skip
    code = finish([*command, *(["--tiny"] if job.tiny else [])], log, seconds)
    if code is None:
        return f"ended after its {seconds:.0f} s"
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name} (log.txt)"
    return f"{last_line(job.out / 'log.txt')} (exit code {code}, log.txt)" if code else ""


def conformance(job: Job, log: IO[str], seconds: float) -> str:
    """The backend's tests, on the device under test; a row with how many passed, also of a run that
    was ended for its time."""
    on_gpu = job.device != "cpu"
    wanted = "(cuda or triton) and not cuda-cpu" if on_gpu else "says_what and cuda-cpu"
    workers = min(8, len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else 0
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", wanted,
        *(["-n", str(workers)] if on_gpu and workers else []),
        *(str(ROOT / f"tests/test_{name}.py") for name in (ON_GPU if on_gpu else ON_GPU[:1])),
    ]  # fmt: skip
    start = (job.out / "log.txt").stat().st_size
    code = finish(command, log, seconds)
    text = (job.out / "log.txt").read_text(errors="replace")[start:]
    counts = counted(text)
    if counts:
        job.emit(
            "conformance", f"pytest -k {wanted!r}", **counts,
            correct=code == 0 and counts.get("passed", 0) > 0,
        )  # fmt: skip
    if code is None:
        return f"ended after its {seconds:.0f} s, until then {counts or 'no test'}"
    return "" if counts else f"{last_line(job.out / 'log.txt')} (exit code {code}, log.txt)"


def counted(text: str) -> dict[str, int]:
    """How many tests passed, failed and so on, of what pytest has said so far with -v: "test.py::it
    PASSED [ 1%]", or of several workers "[gw1] [ 1%] PASSED test.py::it"."""
    words = r"(?m)^(?:\S+::.* |\[gw\d+\] \[ *\d+%\] )(PASSED|FAILED|ERROR|SKIPPED)\b"
    return dict(Counter(word.lower() for word in re.findall(words, text)))


def finish(command: list[str], log: IO[str], seconds: float) -> int | None:
    """A command's exit code; None where it was ended for the time it took."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT / "tests", env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own children, too
            process.wait()


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


if __name__ == "__main__":
    main()
