"""bloomq beside llama.cpp, CTranslate2, OpenVINO GenAI and transformers, on the same work.

    python benchmarks/peers.py --work DIR --install        once: the peers, in DIR/venv
    python benchmarks/peers.py --work DIR [--models bloom-560m bloom-7b1] [--peers llama.cpp ...]
                               [--repeat 5] [--threads N] [--json FILE] [--plot FILE.png]
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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peer_process import Child, PeerError, memory_mb
from quality import log_softmax, mean_loss, read_windows
from speed import cpu_name

import bloomq
from bloomq import converters, schemes

HERE = Path(__file__).resolve().parent
WORKER = HERE / "peer_worker.py"
DEMO = HERE.parent / "tests/data/bloom-demo"
# transformers: the newest that this optimum-intel takes.
REQUIREMENTS = (
    "llama-cpp-python==0.3.36", "gguf==0.19.0", "ctranslate2==4.8.5", "transformers==5.5.4",
    "torch==2.13.0", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0",
    "matplotlib>=3.10",
)  # fmt: skip
TESTS = {"pp512": ("pp 512", 512), "tg32": ("tg 32 8", 32)}  # command, tokens
QUIET = 0.2  # processors that anything else may keep busy beside a sample


@dataclass(frozen=True, slots=True)
class Setting:
    """A peer as it is run. file: what it loads, "" for the checkpoint; scheme: bloomq's, beside."""

    engine: str
    name: str
    file: str
    scheme: str
    option: str = ""


SETTINGS = (
    Setting("llama.cpp", "Q4_0", "q4_0.gguf", "nl4"),
    Setting("llama.cpp", "Q4_K_M", "q4_k_m.gguf", "nl4"),
    Setting("llama.cpp", "Q4_K_M, no repack", "q4_k_m.gguf", "nl4", "no-repack"),
    Setting("llama.cpp", "Q8_0", "q8_0.gguf", "int8"),
    Setting("ctranslate2", "int8", "ctranslate2-int8", "int8"),
    Setting("ctranslate2", "int8, ISA AVX512", "ctranslate2-int8", "int8", "AVX512"),
    Setting("transformers", "bf16", "", "nl4"),
    Setting("openvino", "int4 g128", "openvino-int4", "nl4"),
)
# Compared in quality.
OURS: tuple[tuple[str, dict[str, object]], ...] = (
    ("int8", {"scheme": "int8"}),
    ("nl4", {}),
    ("nl4, groups of 32", {"scheme": "nl4", "group_size": 32}),
    ("nl4, head nl4", {"head_scheme": "nl4"}),
    ("int4, groups of 32", {"scheme": "int4", "group_size": 32}),
)
PEERS = tuple(dict.fromkeys(setting.engine for setting in SETTINGS))


@dataclass(frozen=True, slots=True)
class Bench:
    """What every step needs: where files lie, and who runs what."""

    work: Path
    python: Path  # the peers'
    threads: int
    repeat: int

    def files(self, model: str) -> Path:
        return self.work / "peers" / model

    def log(self, name: str) -> Path:
        return self.work / "peers" / "logs" / f"{name.replace(' ', '-').replace(',', '')}.log"

    def serve(self, engine: str, path: Path, option: str = "") -> Child:
        ours = engine in ("bloomq", "bandwidth")
        python = sys.executable if ours else self.python
        command = (python, WORKER, "serve", engine, path, self.threads, option)
        log = self.log(f"{engine} {path.name}")
        return Child(command, log, self.threads, yield_=not ours)

    def work_on(self, name: str, *arguments: object, python: object = None) -> None:
        """Run a preparing command to its end, and say how long it took."""
        started = time.perf_counter()
        print(f"preparing {name} ... ", end="", flush=True)
        with Child((python or self.python, *arguments), self.log(name), self.threads) as child:
            try:
                child.finish()
            except PeerError:
                print("failed")
                raise
        print(f"{time.perf_counter() - started:.0f} s")


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `with`: ends children
    venv = args.venv or args.work / "venv"
    if args.install:
        install(venv)
        return
    python = venv.absolute() / "bin" / "python"
    if not python.exists():
        sys.exit(f"error: {python}: no peers here: run once with --install")
    bench = Bench(args.work, python, args.threads, args.repeat)
    if args.quality:
        measure_quality(bench, args.checkpoint, args.text, args.tokens, args.window)
        return
    rows = compare_all(bench, args.models, args.peers, args.json)
    if args.plot and rows:
        draw(bench, rows, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--venv", type=Path, help="the peers' environment (default: WORK/venv)")
    parser.add_argument("--install", action="store_true", help="make that environment, then end")
    parser.add_argument("--models", nargs="+", default=["bloom-560m"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
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
    if args.quality and not args.text.exists():
        parser.error(f"{args.text}: no such text: name a file or folder with --text")
    if args.quality and not (args.checkpoint / "config.json").is_file():
        parser.error(f"{args.checkpoint}: no config.json there: name a folder with --checkpoint")
    return args


def install(venv: Path) -> None:
    """The peers at pinned versions, llama.cpp compiled for this very processor."""
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = {**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    command: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install", *REQUIREMENTS]
    command += ["--no-binary", "llama-cpp-python"]
    subprocess.run(command, check=True, env=environment)
    # optimum-intel brings torchvision, whose operators are those of another build of torch where
    # that is a CPU one: transformers then cannot import BLOOM. No peer here looks at pictures.
    subprocess.run([*command[:3], "uninstall", "--yes", "torchvision"], check=True)


def compare_all(
    bench: Bench, models: Sequence[str], peers: Sequence[str], target: Path | None
) -> list[dict[str, Any]]:
    """Every pairing that works; a line for each that does not."""
    rows: list[dict[str, Any]] = []
    with bench.serve("bandwidth", Path("-")) as bandwidth:
        bandwidth.read()
        environment = describe_machine(bench, bandwidth)
        for model in models:
            flash: str | None = None
            checkpoint(bench, model)
            for setting in (s for s in SETTINGS if s.engine in peers):
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
            if "llama.cpp" in peers:  # its quantized files are there: 14 GB less for bloom-7b1
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
    )
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"), "cpu": cpu_name(), "cores": os.cpu_count(),
        "memory_mb": memory_mb("MemTotal"), "system": platform.platform(), "threads": bench.threads,
        "load": load, "bandwidth_gb_s": samples, "bloomq": bloomq.__version__,
        "commit": git.stdout.strip(), "python": platform.python_version(),
    }  # fmt: skip


def checkpoint(bench: Bench, model: str) -> Path:
    path = bench.work / model
    if not (path / "config.json").exists():
        subprocess.run([sys.executable, HERE / "make_checkpoint.py", model, path], check=True)
    return path


def pack(bench: Bench, model: str, scheme: str) -> Path:
    """bloomq's own file, made again where it is older than the code that makes it."""
    path = bench.work / f"{model}-{scheme}"
    manifest = path / "manifest.json"
    code = [Path(schemes.__file__), *Path(converters.__file__).parent.glob("*.py")]
    newest = max(file.stat().st_mtime for file in code)
    if not manifest.exists() or manifest.stat().st_mtime < newest:
        bench.work_on(
            f"{model} bloomq {scheme}", "-m", "bloomq", "convert", bench.work / model, path,
            "--scheme", scheme, "--force", python=sys.executable,
        )  # fmt: skip
    return path


def prepare(bench: Bench, model: str, setting: Setting) -> Path:
    """What a setting loads, made where it is missing. Raises: PeerError."""
    source = bench.work / model
    folder = bench.files(model)
    target = folder / setting.file
    if not setting.file:
        return for_transformers(source, folder / "checkpoint")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with building(target) as part:
        name = f"{model} {setting.file}"
        if setting.engine == "llama.cpp":
            quantize(bench, source, folder / "f16.gguf", part, target.stem)
        elif setting.engine == "ctranslate2":
            check_disk(source, folder, 0.6)
            foreign = for_transformers(source, folder / "checkpoint")
            bench.work_on(name, WORKER, "ctranslate2", foreign, part)
        else:
            check_disk(source, folder, 1.4)  # the whole model comes first, in a temporary folder
            foreign = for_transformers(source, folder / "checkpoint")
            bench.work_on(
                name, bench.python.parent / "optimum-cli", "export", "openvino",
                "--model", foreign, "--task", "text-generation-with-past",
                "--weight-format", "int4", "--group-size", "128", "--sym", part,
            )  # fmt: skip
    return target


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Where to write, so that `target` is there only when it is whole."""
    part = target.with_name(f"{target.name}.part")
    try:
        yield part
        part.rename(target)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def quantize(bench: Bench, source: Path, whole: Path, target: Path, kind: str) -> None:
    """Checkpoint -> F16 GGUF (kept until the model's last setting) -> a quantized one."""
    if not whole.exists():
        check_disk(source, target.parent, 1.6)  # the two together
        with building(whole) as part:
            bench.work_on(f"{source.name} f16.gguf", WORKER, "gguf", source, part)
    check_disk(source, target.parent, 0.6)  # Q8_0: 8.5 of 16 bits
    bench.work_on(f"{source.name} {kind}.gguf", WORKER, "quantize", whole, target, kind)


def check_disk(source: Path, folder: Path, share: float) -> None:
    needed = share * sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise PeerError(f"preparing needs {needed:.0f} GB of disk, {free:.0f} are free")


def for_transformers(source: Path, folder: Path) -> Path:
    """The checkpoint as transformers wants it: an index with metadata, and a tokenizer, for which
    the demo's will do, because only ids are used."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in source.iterdir() if file.is_file()]
    files += [file for file in DEMO.iterdir() if "token" in file.name]
    for file in files:
        target = folder / file.name
        if file.name.endswith(".index.json"):
            target.write_text(json.dumps({"metadata": {}, **json.loads(file.read_text())}))
        elif not target.exists():
            target.symlink_to(file.resolve())
    return folder


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
            children = {"bloomq": ours, "peer": theirs}
            for child in children.values():
                for command, _ in TESTS.values():
                    child.ask(command)  # pages in, kernels ready
            samples = take_samples(children, bandwidth, bench.repeat)
    return [
        summarize(
            {"model": model, "test": test, "engine": setting.engine, "setting": setting.name,
             "bloomq": setting.scheme, "note": facts["note"], "version": facts["version"],
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


def measure_quality(bench: Bench, source: Path, text: Path, tokens: int, window: int) -> None:
    """Perplexity of a checkpoint at the compared settings, on the same ids and windows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bloomq.convert(source, folder / "f32", scheme="f32")
        base = bloomq.load(folder / "f32")
        windows = read_windows(base, text, tokens, window)
        np.save(folder / "windows.npy", np.array(windows))
        loss = np.array([mean_loss(log_softmax(base, ids), ids) for ids in windows])
        print(f"{len(windows)} windows of {window} tokens, "
              f"bloomq f32 perplexity {np.exp(loss.mean()):.3f}\n")  # fmt: skip
        print(f"{'setting':22} {'bits':>5} {'perplexity':>10} {'change':>18}")
        for number, (label, options) in enumerate(OURS):
            bloomq.convert(source, folder / str(number), **options)  # type: ignore[arg-type]
            model = bloomq.load(folder / str(number))
            losses = [mean_loss(log_softmax(model, ids), ids) for ids in windows]
            quality_line(f"bloomq {label}", model.pack.bits_per_weight, losses, loss)
        for kind in ("f16", "q8_0", "q4_k_m", "q4_0", "iq4_nl"):
            try:
                facts = gguf_quality(bench, source, folder, kind)
            except PeerError as error:
                print(f"llama.cpp {kind}: skipped: {error}")
                continue
            quality_line(f"llama.cpp {kind}", facts["bits_per_weight"], facts["losses"], loss)


def gguf_quality(bench: Bench, source: Path, folder: Path, kind: str) -> dict[str, Any]:
    """The checkpoint's losses by window in llama.cpp. Raises: PeerError."""
    target, whole = folder / f"{kind}.gguf", folder / "f16.gguf"
    if not whole.exists():
        run_quietly(bench, "gguf", source, whole)
    if not target.exists():
        run_quietly(bench, "quantize", whole, target, kind)
    command = (bench.python, WORKER, "losses", target, folder / "windows.npy")
    with Child(command, bench.log(f"losses {kind}"), bench.threads) as child:
        return child.read()


def run_quietly(bench: Bench, *arguments: object) -> None:
    log = bench.log(f"demo {arguments[0]}")
    with Child((bench.python, WORKER, *arguments), log, bench.threads) as child:
        child.finish()


def quality_line(name: str, bits: float, losses: Sequence[float], base: np.ndarray) -> None:
    """Two standard errors of the difference in loss, windows as samples."""
    difference = np.array(losses) - base
    error = 200 * difference.std(ddof=1) / np.sqrt(len(losses))
    print(f"{name:22} {bits:5.2f} {np.exp(np.mean(losses)):10.3f} "
          f"{100 * np.expm1(difference.mean()):+9.3f} ± {error:.3f} %", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
