"""Conversion, load, prefill and decode on random weights in the published shapes.

    python benchmarks/speed.py --work DIR [--models bloom-560m bloom-7b1] [--schemes nl4 int8]
                               [--threads N] [--repeat 5] [--json FILE]

Makes checkpoints and packs, then does what `bloomq bench` does on each pack: the machine's ceilings
are measured before every sample. `--work` keeps checkpoints and packs (7b1: 14 + 4 GB) for the next
run. Conversion runs in a process of its own, whose peak memory is the system's figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import bloomq
from bloomq.bench import Bench, peak_rss_mb, plan

HERE = Path(__file__).resolve().parent


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split(":")[1].splitlines()[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", nargs="+", default=["bloom-560m"])
    parser.add_argument("--schemes", nargs="+", default=["nl4", "int8"])
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
    model = bloomq.load(pack, backend="numba", threads=threads)
    bench = Bench(model.head, model.pack)
    rows = [bench.row(result) for result in bench.run(plan([512], [64], [0], [1]), repeat)]
    reloaded = bloomq.load(pack, backend="numba", threads=threads).load_s
    facts = {"backend": model.backend.description, "load_s": reloaded, "tests": rows}
    memory = {"rss_mb": peak_rss_mb() - bench.measuring_mb, "pack_mb": model.pack.nbytes / 1e6}
    return facts | memory


def report(row: dict[str, Any]) -> None:
    print(
        f"\n{row['model']} {row['scheme']}: {row['pack_mb']:.0f} MB, "
        f"{row['bits_per_weight']:.2f} bits per weight, {row['backend']}\n"
        f"  convert     {row['convert_mb_s']:7.0f} MB/s of source, {row['convert_s']:.1f} s, "
        f"peak RSS {row['convert_rss_mb']:.0f} MB\n"
        f"  load        {row['load_s']:7.2f} s; peak RSS of the process so far "
        f"{row['rss_mb']:.0f} MB"
    )
    for test in row["tests"]:
        rate = f"{test['gb_s']} GB/s" if "gb_s" in test else f"{test['gmac_s']} GMAC/s"
        print(f"  {test['test']:<11} {test['tokens_per_s']:7.1f} tok/s = {rate} = "
              f"{test['percent']:.0f} % of the ceiling in this run", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
