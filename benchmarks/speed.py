"""Conversion, load, prefill and decode on random weights in the published shapes.

    python benchmarks/speed.py --work DIR [--models bloom-560m bloom-7b1] [--schemes int4 int8]
                               [--threads N] [--repeat 5] [--json FILE]

First the ceiling: the bandwidth at which this machine's threads read memory, measured between the
samples of every row, so that both drift together. Decode reads every weight once a token, so its
ceiling is bandwidth / bytes a token. `--work` keeps checkpoints and packs (7b1: 14 + 4 GB) for the
next run. Conversion runs in a process of its own, whose peak memory is the system's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numba
import numpy as np

import bloomq

HERE = Path(__file__).resolve().parent
BANDWIDTH_BYTES = 1 << 30
PROMPT, OUTPUT = 512, 64


@numba.njit(parallel=True, nogil=True)
def read_all(data, threads):  # type: ignore[no-untyped-def]
    """Four streams a thread, which keeps more reads in flight than one does."""
    sums = np.zeros(threads * 8, np.int64)  # a cache line each
    for share in numba.prange(threads):
        quarter = len(data) // (4 * threads)
        first = share * 4 * quarter
        a, b = data[first : first + quarter], data[first + quarter : first + 2 * quarter]
        c = data[first + 2 * quarter : first + 3 * quarter]
        d = data[first + 3 * quarter : first + 4 * quarter]
        total = np.int64(0)
        for i in range(quarter):
            total += a[i] + b[i] + c[i] + d[i]
        sums[8 * share] = total
    return sums


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split(":")[1].splitlines()[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


class Bandwidth:
    """Read bandwidth of `threads` threads over memory far larger than the caches."""

    def __init__(self, threads: int) -> None:
        self.threads, self.samples = threads, []
        self.data = np.ones(BANDWIDTH_BYTES // 8, np.int64)
        read_all(self.data, threads)

    def sample(self) -> None:
        started = time.perf_counter()
        read_all(self.data, self.threads)
        self.samples.append(self.data.nbytes / (time.perf_counter() - started) / 1e9)

    def take_gb_s(self) -> float:
        """The median since the last call."""
        result, self.samples = median(self.samples), []
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", default=["bloom-560m"])
    parser.add_argument("--schemes", nargs="+", default=["int4", "int8"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append every row here, as JSON lines")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    environment = {"cpu": cpu_name(), "load": os.getloadavg()[0], "bloomq": bloomq.__version__}
    print(f"{cpu_name()}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}, bloomq {bloomq.__version__}")  # fmt: skip
    for model in args.models:
        checkpoint = args.work / model
        if not (checkpoint / "config.json").exists():
            script = HERE / "make_checkpoint.py"
            subprocess.run([sys.executable, script, model, checkpoint], check=True)
        for scheme in args.schemes:
            pack = args.work / f"{model}-{scheme}"
            row = {**environment, "model": model, "scheme": scheme}
            row |= convert(checkpoint, pack, scheme)
            row |= measure(pack, args.threads, args.repeat)
            rows.append(row)
            report(row)
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


CONVERT = """
import json, resource, sys, bloomq
source, target, scheme = sys.argv[1:]
result = bloomq.convert(source, target, scheme=scheme, force=True)
usage = resource.getrusage(resource.RUSAGE_SELF)
peak_kb = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps({
    "convert_mb_s": result.source_bytes / 1e6 / result.seconds,
    "convert_s": result.seconds,
    "convert_cpu_s": usage.ru_utime + usage.ru_stime,
    "convert_rss_mb": peak_kb * 1024 / 1e6,
    "bits_per_weight": result.bits_per_weight,
}))
"""


def convert(checkpoint: Path, pack: Path, scheme: str) -> dict[str, float]:
    """Convert in a process of its own, which reports its own peak memory: what a parent sees of its
    children is the largest of them all."""
    command = [sys.executable, "-c", CONVERT, checkpoint, pack, scheme]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(pack: Path, threads: int | None, repeat: int) -> dict[str, Any]:
    model = bloomq.load(pack, threads=threads)
    rng = np.random.default_rng(0)
    prompt = rng.integers(10, 200_000, PROMPT).tolist()
    model.generate(prompt[:16], max_new_tokens=4)  # pages in, kernels ready
    bandwidth = Bandwidth(model.backend.threads)
    prefill, decode = [], []
    for _ in range(repeat):
        bandwidth.sample()
        decode.append(model.generate(prompt[:4], max_new_tokens=OUTPUT).stats)
        bandwidth.sample()
        prefill.append(model.generate(prompt, max_new_tokens=1).stats)
    reloaded = bloomq.load(pack, threads=threads).load_s
    per_s = median(s.generated_tokens_per_s for s in decode)
    gb_s = bandwidth.take_gb_s()
    weights = sum(matrix_size(model, name) for name in model.pack.schemes)
    return {
        "threads": model.backend.threads,
        "bandwidth_gb_s": gb_s,
        "decode_tok_s": per_s,
        "decode_samples": [round(s.generated_tokens_per_s, 2) for s in decode],
        "decode_gb_s": per_s * model.pack.bytes_per_token / 1e9,
        "decode_percent": 100 * per_s * model.pack.bytes_per_token / 1e9 / gb_s,
        "prefill_samples": [round(s.prompt_tokens_per_s, 1) for s in prefill],
        "prefill_tok_s": median(s.prompt_tokens_per_s for s in prefill),
        "prefill_gmac_s": median(s.prompt_tokens_per_s for s in prefill) * weights / 1e9,
        "load_s": reloaded,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        "pack_mb": model.pack.nbytes / 1e6,
    }


def matrix_size(model: bloomq.LanguageModel, name: str) -> int:
    """Products a prompt token costs in this matrix: none in the table, read for one token only."""
    if name in ("wte", "lm_head"):
        return 0
    n, k = model.pack.matrix(name).shape
    return n * k


def report(row: dict[str, Any]) -> None:
    print(
        f"\n{row['model']} {row['scheme']}: {row['pack_mb']:.0f} MB, "
        f"{row['bits_per_weight']:.2f} bits per weight, {row['threads']} threads\n"
        f"  convert     {row['convert_mb_s']:7.0f} MB/s of source, {row['convert_s']:.1f} s, "
        f"peak RSS {row['convert_rss_mb']:.0f} MB\n"
        f"  load        {row['load_s']:7.2f} s\n"
        f"  bandwidth   {row['bandwidth_gb_s']:7.1f} GB/s read, measured between the samples\n"
        f"  tg{OUTPUT}        {row['decode_tok_s']:7.1f} tok/s = {row['decode_gb_s']:.1f} GB/s = "
        f"{row['decode_percent']:.0f} % of it\n"
        f"  pp{PROMPT}       {row['prefill_tok_s']:7.0f} tok/s = "
        f"{row['prefill_gmac_s']:.0f} GMAC/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
