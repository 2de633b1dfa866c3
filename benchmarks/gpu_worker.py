"""One section of the GPU figures, in a process of its own: what it breaks ends with it.

    python benchmarks/gpu_worker.py SECTION --device cuda:0 --out DIR --scratch DIR [--tiny]

`smoke` runs them all on tiny shapes and stops at the first error, with its traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_correct import greedy, parity
from gpu_cuts import cuts
from gpu_loading import load, memory
from gpu_profile import profile
from gpu_run import Run
from gpu_speed import batch_7b1, decode_7b1, decode_176b, decode_560m, prefill_7b1
from gpu_ways import ways

import bloomq
from bloomq.backends.cuda.device import why_no_triton


def machine(run: Run) -> None:
    """The device, its ceilings, and the versions of what runs on it."""
    from speed import cpu_name

    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "triton", "transformers", "bitsandbytes", "numpy")
        if _is_installed(name)
    }
    facts: dict[str, object] = {"device": cpu_name()}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        facts = {
            "device": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    if run.device.type == "cuda" and (missing := why_no_triton()) is not None:
        run.emit("Triton", failed=f"its kernels are not used: {missing}")
    run.emit(
        "machine", **facts, cpu=cpu_name(), python=platform.python_version(), **versions,
        bloomq=bloomq.__version__, commit=_said("git", "describe", "--always", "--dirty"),
        copy_gb_s=[round(run.copy_gb_s(), 1) for _ in range(4)][1:],
        read_gb_s=[round(run.read_gb_s(), 1) for _ in range(4)][1:],
        bus_gb_s=[round(run.bus_gb_s(), 2) for _ in range(3)],
    )  # fmt: skip


def smoke(run: Run) -> None:
    """Every other section; Numba's kernels, which take the longest to compile, last."""
    for name in (*(name for name in SECTIONS if name not in ("smoke", "greedy")), "greedy"):
        print(f"-- {name}", flush=True)
        SECTIONS[name](run)
        run.free()
    print("smoke: every section ran", flush=True)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "smoke": smoke,
    "machine": machine,
    "parity": parity,
    "greedy": greedy,
    "decode": decode_7b1,
    "big": decode_176b,
    "prefill": prefill_7b1,
    "batch": batch_7b1,
    "small": decode_560m,
    "load": load,
    "memory": memory,
    "profile": profile,
    "ways": ways,
    "cuts": cuts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-figures"))
    parser.add_argument("--scratch", type=Path, required=True, help="for packs, 5 GB")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU runs in seconds")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.scratch.mkdir(parents=True, exist_ok=True)
    strict = args.section == "smoke"
    if args.device == "cpu":
        torch.set_num_threads(1)  # tiny products: threads would only wait for each other
    run = Run(
        args.section, args.device, args.out, args.scratch, tiny=args.tiny or strict,
        seconds=args.seconds, strict=strict,
    )  # fmt: skip
    SECTIONS[args.section](run)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
