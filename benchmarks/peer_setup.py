"""The peers, as they are run beside bloomq: their settings, environment, processes and files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llvmlite import binding as llvm
from peer_process import Child, PeerError

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
PEERS = tuple(dict.fromkeys(setting.engine for setting in SETTINGS))

# Of these it is known how they are kept to AVX2.
AVX2_PEERS = ("llama.cpp", "ctranslate2")
NATIVE_BUILD = "-DGGML_NATIVE=ON"
AVX2_BUILD = (
    "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON "
    "-DGGML_AVX512=OFF -DGGML_AVX_VNNI=OFF"
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every step needs: where files lie, and who runs what."""

    work: Path
    python: Path  # the peers'
    threads: int
    repeat: int
    avx2: bool = False  # everyone kept to it

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


def install(venv: Path, build: str) -> None:
    """The peers at pinned versions, llama.cpp compiled with these options for CMake."""
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = {**os.environ, "CMAKE_ARGS": build}
    command: list[str | Path] = [venv / "bin" / "python", "-m", "pip", "install", *REQUIREMENTS]
    # No cache: pip would take a wheel that it built with other options before.
    command += ["--no-cache-dir", "--no-binary", "llama-cpp-python"]
    subprocess.run(command, check=True, env=environment)
    # optimum-intel brings torchvision, whose operators are those of another build of torch where
    # that is a CPU one: transformers then cannot import BLOOM. No peer here looks at pictures.
    subprocess.run([*command[:3], "uninstall", "--yes", "torchvision"], check=True)


def lower_to_avx2() -> None:
    """Keep the processes started from here on, bloomq's and the peers', to AVX2. bloomq is told of
    the nearest processor without more, since what it asks for ahead depends on the make.

    Raises: PeerError where there is no AVX2 to lower to.
    """
    beyond = ("avx512", "avx10", "avxvnni", "avxneconvert", "avxifma", "amx", "evex")
    present = llvm.get_host_cpu_features().items()
    features = sorted(name for name, there in present if there and not name.startswith(beyond))
    if "avx2" not in features:
        raise PeerError(
            f"--avx2: {llvm.get_host_cpu_name()} has no AVX2: run this on an x86 that has"
        )
    amd = llvm.get_host_cpu_name().startswith("znver")
    os.environ["NUMBA_CPU_NAME"] = "znver3" if amd else "haswell"
    os.environ["NUMBA_CPU_FEATURES"] = ",".join(f"+{name}" for name in features)
    # CTranslate2, and the two libraries that may multiply for it, which look for themselves.
    for name in ("CT2_FORCE_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        os.environ[name] = "AVX2"


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
