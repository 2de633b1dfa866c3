"""Where a step's time goes: kernels by time, of a decode step and of a prefill."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_engines import Bloomq, prompts
from gpu_run import Run
from torch.profiler import ProfilerActivity

TOP = 25  # kernels in the listing


def profile(run: Run) -> None:
    """bloom-7b1 in int8 and nl4: after warming up, so that graphs are recorded."""
    sizes, model = run.sizes, run.model("bloom-7b1")
    for scheme in ("int8", "nl4"):
        try:
            engine = Bloomq(run, model, scheme, 1, sizes.prefill + 8 * sizes.tokens)
            ids = prompts(model, 1, sizes.prefill)
            engine.start(ids)
            engine.decode(sizes.tokens)
            kernels(run, f"prefill {scheme}", partial(engine.start, ids))
            engine.decode(sizes.tokens)
            kernels(run, f"decode {scheme}", partial(engine.decode, 1))
        except Exception as error:  # the other scheme's profile is wanted all the same
            run.failed(f"profile {scheme}", error)
        run.free()


def kernels(run: Run, what: str, work: Callable[[], object]) -> None:
    """Append a listing to profile.txt, and a row with its head."""
    wall_s = min(run.seconds(work) for _ in range(3))
    on_gpu = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as found:
        work()
        run.wait()
    events = [event for event in found.key_averages() if not on_gpu or _is_kernel(event)]
    events.sort(key=_own_us, reverse=True)
    total_us = sum(map(_own_us, events))
    count = sum(event.count for event in events)
    head = (
        f"{what}: {1e3 * wall_s:.3f} ms a call without the profiler; {count} "
        f"{'kernels' if on_gpu else 'operations'}, {total_us / 1e3:.3f} ms in them"
    )
    lines = [head, f"{'us':>10} {'share':>6} {'calls':>6}  name"]
    for event in events[:TOP]:
        share = 100 * _own_us(event) / max(total_us, 1e-9)
        lines.append(f"{_own_us(event):10.1f} {share:5.1f}% {event.count:6}  {event.key[:110]}")
    text = "\n".join(lines) + "\n\n"
    with (run.out / "profile.txt").open("a") as file:
        file.write(text)
    print(text, flush=True)
    run.emit(
        f"profile of {what}", wall_ms=round(1e3 * wall_s, 3), kernels_ms=round(total_us / 1e3, 3),
        calls=count, top=[[e.key[:60], e.count, round(_own_us(e), 1)] for e in events[:8]],
    )  # fmt: skip


def _is_kernel(event: Any) -> bool:
    return "CUDA" in str(event.device_type)


def _own_us(event: Any) -> float:
    """Of a kernel, its time; on the CPU, of an operation without those it calls."""
    if _is_kernel(event):
        return float(event.self_device_time_total)
    return float(event.self_cpu_time_total)
