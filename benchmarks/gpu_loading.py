"""How fast a pack comes to the device, what that takes of the host, and what the device then holds.

The one section that writes: a pack of two GB, once, in the scratch folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch
from gpu_engines import Bloomq, prompts
from gpu_run import Run
from gpu_weights import RandomWeights, config_of, write_pack

from bloomq.layers import CacheDtype
from bloomq.placement.models import schemes_of

BLOCK_BYTES = 16 << 20  # of one read
# In a process of its own, whose peak memory is the system's figure. What CUDA takes at its first
# use, a second or so, is no part of loading.
LOAD = """
import json, sys, time, torch
from bloomq.backends.cuda.layers import CudaBackend
from bloomq.heads import Head
from bloomq.pack import Pack
path, device = sys.argv[1:]
torch.zeros(1, device=device)
def status_mb(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024 / 1e6
before = status_mb("VmHWM")
started = time.perf_counter()
head = Head(Pack.open(path), CudaBackend(device), "BloomForCausalLM")
if device != "cpu":
    torch.cuda.synchronize()
seconds = time.perf_counter() - started
print(json.dumps({"load_s": seconds, "peak_rss_mb": status_mb("VmHWM"), "rss_before_mb": before,
                  "anon_mb": status_mb("RssAnon")}))
"""


def load(run: Run) -> None:
    """A pack's way to the device, from disk and from the system's memory of it."""
    bus = run.bus_gb_s()
    weights = RandomWeights(run.model("bloom-1b7"), "int8")
    path = run.scratch / "pack"
    free = shutil.disk_usage(run.scratch).free
    if free < 2 * weights.nbytes:
        raise OSError(f"{run.scratch}: {free / 1e9:.1f} GB are free, a pack needs twice its bytes")
    started = perf_counter()
    size_gb = write_pack(weights, path) / 1e9
    wrote_s = perf_counter() - started
    try:
        for how in ("disk", "memory"):
            files = sorted(path.glob("*.safetensors"))
            source = read_gb_s(files, forget=how == "disk")
            if how == "disk":
                forget_files(files)
            found = _loaded(path, run.device)
            speed, limit = size_gb / found["load_s"], min(source, bus)
            run.emit(
                f"load from {how}", pack_gb=round(size_gb, 3), gb_s=round(speed, 2),
                source_gb_s=round(source, 2), bus_gb_s=round(bus, 2), write_s=round(wrote_s, 1),
                percent=round(100 * speed / limit, 1), **found,
            )  # fmt: skip
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _loaded(path: Path, device: torch.device) -> dict[str, float]:
    command = [sys.executable, "-c", LOAD, str(path), str(device)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def forget_files(files: list[Path]) -> None:
    """Ask the system to drop what it remembers of files, so that the next read is the disk's."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_gb_s(files: list[Path], *, forget: bool) -> float:
    """Of reading files from first to last, in large blocks."""
    if forget:
        forget_files(files)
    buffer, total = bytearray(BLOCK_BYTES), 0
    started = perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
    return total / (perf_counter() - started) / 1e9


def memory(run: Run) -> None:
    """What the device holds after prompts and steps, beside what the plan said before."""
    before = used_bytes(run.device)
    sizes, model = run.sizes, run.model("bloom-7b1")
    engine = Bloomq(run, model, "int8", sizes.big_batch, sizes.context, drawn=False)
    engine.start(prompts(model, sizes.big_batch, sizes.context - sizes.peer_tokens - 1))
    engine.decode(sizes.peer_tokens)
    run.wait()
    beside_plan(run, "bloom-7b1", "int8", "f16", before)


def beside_plan(run: Run, name: str, scheme: str, cache_dtype: CacheDtype, before: float) -> None:
    """A row: what the device holds now, less what it did before, and the plan's figures for it."""
    from bloomq.placement import Device, plan

    sizes, config = run.sizes, config_of(run.model(name))
    place = Device(str(run.device), 1 << 40, None, "the device under test")
    said = plan(
        config, schemes_of(config, scheme), (place,), context=sizes.context, batch=sizes.big_batch,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    used = used_bytes(run.device) - before
    parts = {
        "planned_gb": said.nbytes, "used_gb": used, "weights_gb": said.weights_bytes,
        "cache_gb": said.cache_bytes, "work_gb": said.work_bytes,
    }  # fmt: skip
    if run.device.type == "cuda":
        parts |= {
            "reserved_gb": torch.cuda.max_memory_reserved(run.device),
            "allocated_gb": torch.cuda.max_memory_allocated(run.device),
        }
    run.emit(
        f"memory of {name} {scheme}", context=sizes.context, batch_planned=sizes.big_batch,
        off_plan=round(100 * (used / said.nbytes - 1), 1),
        **{part: round(value / 1e9, 3) for part, value in parts.items()},
    )  # fmt: skip


def used_bytes(device: torch.device) -> float:
    """Memory of the device that anything holds, the CUDA context included, which asking for it by
    torch would make: so by nvidia-smi. 0 for the CPU."""
    if device.type == "cpu":
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, f"--id={device.index or 0}"], capture_output=True)
        return float(done.stdout) * (1 << 20)
    except (OSError, ValueError):  # there is none, or it says N/A
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return 0.0  # nobody else's, as the script asks for
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free)
