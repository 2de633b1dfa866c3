"""bloomq beside llama.cpp, CTranslate2, OpenVINO GenAI and transformers, on the same work.

    python benchmarks/peers.py --work DIR --install        once: the peers, in DIR/venv
    python benchmarks/peers.py --work DIR [--models bloom-560m bloom-7b1] [--peers llama.cpp ...]
                               [--repeat 5] [--threads N] [--json FILE] [--plot FILE.png]
    python benchmarks/peers.py --work DIR --avx2 ...       everyone, bloomq too, as on a processor
                                                           that has AVX2 at most; installed apart
    python benchmarks/peers.py --work DIR --quality        perplexity of their 4-bit files and ours,
                               [--checkpoint DIR]          of the demo or another small checkpoint

Prefill of 512 tokens (pp512) and greedy decode (tg32) at batch 1, random weights in the published
shapes. bloomq is loaded beside one peer at a time, each in a process of its own; samples alternate,
with the machine's read bandwidth in between, and whoever is not asked is stopped: a ratio is of
neighbours in time, the only figures that compare on a machine that drifts. nl4 meets the 4-bit
peers, int8 the 8-bit ones; a bf16 peer meets nl4, which is what its user would change to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peer_process import Child, PeerError, memory_mb
from peer_quality import measure_quality
from peer_setup import (
    AVX2_BUILD,
    AVX2_PEERS,
    DEMO,
    HERE,
    NATIVE_BUILD,
    PEERS,
    SETTINGS,
    WORKER,
    Bench,
    Setting,
    checkpoint,
    install,
    lower_to_avx2,
    pack,
    prepare,
)
from speed import cpu_name

import bloomq

TESTS = {"pp512": ("pp 512", 512), "tg32": ("tg 32 8", 32)}  # command, tokens
QUIET = 0.2  # processors that anything else may keep busy beside a sample


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `with`: ends children
    venv = args.venv or args.work / ("venv-avx2" if args.avx2 else "venv")
    if args.install:
        install(venv, AVX2_BUILD if args.avx2 else NATIVE_BUILD)
        return
    if args.avx2:
        try:
            lower_to_avx2()
        except PeerError as error:
            sys.exit(f"error: {error}")
    python = venv.absolute() / "bin" / "python"
    if not python.exists():
        sys.exit(f"error: {python}: no peers here: run once with --install")
    bench = Bench(args.work, python, args.threads, args.repeat, args.avx2)
    if args.quality:
        measure_quality(bench, args.checkpoint, args.text, args.tokens, args.window)
        return
    settings = [s for s in SETTINGS if s.engine in args.peers]
    if args.avx2:
        settings = [s for s in settings if s.option != "AVX512"]
    rows = compare_all(bench, args.models, settings, args.json)
    if args.plot and rows:
        draw(bench, rows, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--venv", type=Path, help="the peers' environment (default: WORK/venv)")
    parser.add_argument("--avx2", action="store_true", help="as where there is no AVX-512")
    parser.add_argument("--install", action="store_true", help="make that environment, then end")
    parser.add_argument("--models", nargs="+", default=["bloom-560m"])
    parser.add_argument("--peers", nargs="+", choices=PEERS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="append every sample here, as JSON lines")
    parser.add_argument("--plot", type=Path, help="draw the table here, as PNG")
    parser.add_argument("--quality", action="store_true", help="perplexity, then end")
    parser.add_argument("--checkpoint", type=Path, default=DEMO, help="for --quality")
    heldout = HERE.parent.parent / "shared/corpora/heldout"
    parser.add_argument("--text", type=Path, default=heldout, help="for --quality")
    parser.add_argument("--tokens", type=int, default=8000, help="of each file, for --quality")
    parser.add_argument("--window", type=int, default=256, help="for --quality")
    args = parser.parse_args()
    known = AVX2_PEERS if args.avx2 else PEERS
    args.peers = args.peers or known
    if unknown := set(args.peers).difference(known):
        parser.error(
            f"--avx2 with {', '.join(sorted(unknown))}: only {', '.join(known)} can be kept to it"
        )
    if args.quality and args.avx2:
        parser.error("--quality with --avx2: perplexity is no matter of speed: leave --avx2 out")
    if args.quality and not args.text.exists():
        parser.error(f"{args.text}: no such text: name a file or folder with --text")
    if args.quality and not (args.checkpoint / "config.json").is_file():
        parser.error(f"{args.checkpoint}: no config.json there: name a folder with --checkpoint")
    return args


def compare_all(
    bench: Bench, models: Sequence[str], settings: Sequence[Setting], target: Path | None
) -> list[dict[str, Any]]:
    """Every pairing that works; a line for each that does not."""
    rows: list[dict[str, Any]] = []
    with bench.serve("bandwidth", Path("-")) as bandwidth:
        bandwidth.read()
        environment = describe_machine(bench, bandwidth)
        for model in models:
            flash: str | None = None
            checkpoint(bench, model)
            for setting in settings:
                try:
                    path = prepare(bench, model, setting)
                    if setting.engine == "llama.cpp" and flash is None:
                        flash = choose_flash(bench, path)
                    fresh = compare(bench, model, setting, path, flash or "", bandwidth)
                except PeerError as error:
                    print(f"{model} {setting.engine} {setting.name}: skipped: {error}", flush=True)
                    continue
                for row in fresh:
                    row["environment"] = environment
                    report(row, with_head=not rows)
                    rows.append(row)
                append(target, fresh)
            if flash is not None:  # llama.cpp's quantized files are there: 14 GB less for bloom-7b1
                (bench.files(model) / "f16.gguf").unlink(missing_ok=True)
    return rows


def describe_machine(bench: Bench, bandwidth: Child) -> dict[str, Any]:
    samples = [bandwidth.ask("bw")["gb_s"] for _ in range(5)]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    load = os.getloadavg()[0]
    print(
        f"{cpu_name()}, {os.cpu_count()} cores, {bench.threads} threads, load {load:.1f}, "
        f"bloomq {bloomq.__version__} {git.stdout.strip()}, "
        f"reads {median(samples):.1f} GB/s ({min(samples):.1f} to {max(samples):.1f})"
        + (", everyone kept to AVX2" if bench.avx2 else "")
    )
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"), "cpu": cpu_name(), "cores": os.cpu_count(),
        "memory_mb": memory_mb("MemTotal"), "system": platform.platform(), "threads": bench.threads,
        "load": load, "bandwidth_gb_s": samples, "bloomq": bloomq.__version__,
        "commit": git.stdout.strip(), "python": platform.python_version(), "avx2": bench.avx2,
    }  # fmt: skip


def choose_flash(bench: Bench, path: Path) -> str:
    """Options for flash attention where it is the faster, by test: medians of five, in turns."""
    with (
        bench.serve("llama.cpp", path) as plain,
        bench.serve("llama.cpp", path, "flash-pp flash-tg") as flash,
    ):
        for child in (plain, flash):
            child.read()
            for command, _ in TESTS.values():
                child.ask(command)
        chosen = []
        for test, (command, _) in TESTS.items():
            pairs = [[child.ask(command)["s"] for child in (plain, flash)] for _ in range(5)]
            without, with_it = (median(seconds) for seconds in zip(*pairs, strict=True))
            if with_it < without:
                chosen.append(f"flash-{test[:2]}")
    return " ".join(chosen)


def compare(
    bench: Bench, model: str, setting: Setting, path: Path, flash: str, bandwidth: Child
) -> list[dict[str, Any]]:
    """One peer beside bloomq: a row a test. Raises: PeerError."""
    option = setting.option
    if setting.engine == "llama.cpp":
        option = f"{option} {flash}".strip()
    with bench.serve("bloomq", pack(bench, model, setting.scheme)) as ours:
        try:
            our_facts = ours.read()
        except PeerError as error:
            raise PeerError(f"bloomq {setting.scheme} beside it: {error}") from None
        with bench.serve(setting.engine, path, option) as theirs:
            facts = theirs.read()
            if bench.avx2 and "AVX512 = 1" in facts["isa"]:  # llama.cpp's words
                raise PeerError(
                    f"built for more than AVX2: delete {bench.python.parents[1]}, --install"
                )
            children = {"bloomq": ours, "peer": theirs}
            for child in children.values():
                for command, _ in TESTS.values():
                    child.ask(command)  # pages in, kernels ready
            samples = take_samples(children, bandwidth, bench.repeat)
    return [
        summarize(
            {"model": model, "test": test, "engine": setting.engine, "setting": setting.name,
             "bloomq": setting.scheme, "note": facts["note"], "version": facts["version"],
             "isa": facts["isa"], "bloomq_isa": our_facts["isa"],
             "load_s": facts["load_s"], "weights_bytes": facts["weights_bytes"],
             "bloomq_weights_bytes": our_facts["weights_bytes"]},
            samples[test], tokens,
        )
        for test, (_, tokens) in TESTS.items()
    ]  # fmt: skip


def take_samples(
    children: dict[str, Child], bandwidth: Child, repeat: int
) -> dict[str, list[dict[str, Any]]]:
    """By test: bandwidth, bloomq, peer, bandwidth, bloomq, peer, ..."""
    samples: dict[str, list[dict[str, Any]]] = {test: [] for test in TESTS}
    for _ in range(repeat):
        for test, (command, _tokens) in TESTS.items():
            sample: dict[str, Any] = {"bandwidth_gb_s": bandwidth.ask("bw")["gb_s"]}
            for name, child in children.items():
                before, started = busy_s(), time.perf_counter()
                answer = child.ask(command)
                wall = time.perf_counter() - started
                # Processors kept busy by anything but the sample: the parent waits meanwhile.
                others = max(0.0, (busy_s() - before - answer["cpu_s"]) / wall)
                sample[name] = {**answer, "others": round(others, 3), "load": os.getloadavg()[0]}
            samples[test].append(sample)
    return samples


def busy_s() -> float:
    """CPU seconds that all processors have worked or were withheld (steal) since the start."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def summarize(row: dict[str, Any], samples: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """A row with its samples, and the ratio of each pair of neighbours."""
    peer = [tokens / sample["peer"]["s"] for sample in samples]
    ours = [tokens / sample["bloomq"]["s"] for sample in samples]
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    others = median(max(sample[who]["others"] for who in ("peer", "bloomq")) for sample in samples)
    return {
        **row, "tok_s": peer, "bloomq_tok_s": ours, "ratios": ratios, "ratio": median(ratios),
        "verdict": judge(ratios, others),
        "rss_mb": max(sample["peer"]["rss_mb"] for sample in samples),
        "bloomq_rss_mb": max(sample["bloomq"]["rss_mb"] for sample in samples),
        "bandwidth_gb_s": median(sample["bandwidth_gb_s"] for sample in samples),
        "others": others,
        "samples": samples,
    }  # fmt: skip


def judge(ratios: list[float], others: float) -> str:
    """What bloomq is, beside a peer: every pair must say so, on a machine that did little else."""
    if others > QUIET or len(ratios) < 2 or min(ratios) <= 1 <= max(ratios):
        return "noise"
    return "faster" if min(ratios) > 1 else "slower"


HEAD = (
    f"\n{'model':11} {'test':6} {'peer':30} {'tok/s':>16} {'GB/s':>5} {'bloomq':>6} {'tok/s':>16} "
    f"{'GB/s':>5} {'ratio':>17} {'of read':>8} {'peak RSS, MB':>13} {'others':>6}"
)


def report(row: dict[str, Any], *, with_head: bool) -> None:
    """One line: the peer, bloomq beside it, bloomq / peer, the machine meanwhile."""
    if with_head:
        print(HEAD)
    read = row["test"].startswith("tg")  # decode reads every weight once a token

    def rate(samples: list[float], weights: int) -> str:
        middle, spread = median(samples), (max(samples) - min(samples)) / 2
        gb_s = f"{middle * weights / 1e9:5.1f}" if read else "    -"
        return f"{middle:8.1f} ± {spread:5.1f} {gb_s}"

    theirs = rate(row["tok_s"], row["weights_bytes"])
    ours = rate(row["bloomq_tok_s"], row["bloomq_weights_bytes"])
    print(
        f"{row['model']:11} {row['test']:6} {row['engine'] + ' ' + row['setting']:30} {theirs} "
        f"{row['bloomq']:>6} {ours} {row['ratio']:7.2f}x {row['verdict']:>8} "
        f"{row['bandwidth_gb_s']:8.1f} {row['rss_mb']:6.0f} {row['bloomq_rss_mb']:6.0f} "
        f"{row['others']:6.2f}" + (f"  {row['note']}" if row["note"] else ""),
        flush=True,
    )


def append(target: Path | None, rows: list[dict[str, Any]]) -> None:
    if target:
        with target.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def draw(bench: Bench, rows: list[dict[str, Any]], target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps(rows))
        try:
            bench.work_on(str(target), WORKER, "plot", data, target)
        except PeerError as error:
            print(f"no picture: {error}")


if __name__ == "__main__":
    main()
