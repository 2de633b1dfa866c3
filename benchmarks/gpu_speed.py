"""Decode and prefill of bloomq beside transformers, on random weights in the published shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter

import torch
from gpu_engines import Bloomq, prompts
from gpu_peers import BF16, BF16_SDPA, INT8, INT8_PLAIN, NF4, Setting, makers
from gpu_run import Engine, Run, built, in_turns, report, status_mb

from bloomq.layers import CacheDtype

# 4 bits, 2,048 tokens x 4, on a device that has little room beside them: the first that fits.
BIG_SETTINGS: tuple[tuple[str, CacheDtype], ...] = (
    ("int4", "f16"), ("nf4", "f16"), ("int4", "int8"),
)  # fmt: skip


def decode_7b1(run: Run) -> None:
    """Batch 1, every scheme beside every peer."""
    settings = INT8, INT8_PLAIN, NF4, BF16, BF16_SDPA
    _decode(run, "bloom-7b1", ("int8", "int4", "nf4", "bf16"), settings, 1)


def batch_7b1(run: Run) -> None:
    """32 rows, one step for all."""
    settings = INT8, INT8_PLAIN, NF4, BF16_SDPA
    _decode(run, "bloom-7b1", ("int8", "int4", "nf4", "bf16"), settings, run.sizes.batch)


def decode_560m(run: Run) -> None:
    _decode(run, "bloom-560m", ("int8", "int4"), (INT8, INT8_PLAIN, NF4), 1)


def _decode(
    run: Run, name: str, schemes: Sequence[str], settings: tuple[Setting, ...], batch: int
) -> None:
    sizes, model = run.sizes, run.model(name)
    capacity = sizes.prompt + sizes.tokens + 1
    engines = _engines(run, model, schemes, settings, batch, capacity)
    ids = prompts(model, batch, sizes.prompt)

    def take(engine: Engine) -> float:
        count = sizes.peer_tokens if engine.is_peer else sizes.tokens
        engine.start(ids)
        return run.seconds(lambda: engine.decode(count)) / count

    samples = in_turns(run, engines, take)
    report(run, name, batch, sizes.prompt + sizes.tokens / 2, engines, samples)


def prefill_7b1(run: Run) -> None:
    """One prompt of 2,048 tokens, to the scores of its last."""
    name, model, length = "bloom-7b1", run.model("bloom-7b1"), run.sizes.prefill
    schemes, settings = ("int8", "int4", "nf4", "bf16"), (BF16, BF16_SDPA, NF4, INT8_PLAIN)
    engines = _engines(run, model, schemes, settings, 1, length + 1)
    ids = prompts(model, 1, length)
    samples = in_turns(run, engines, lambda engine: run.seconds(lambda: engine.start(ids)))
    for engine, found in samples.items():
        seconds = [sample.seconds for sample in found]
        run.emit(
            engine, model=name, batch=1, peer=engines[engine].is_peer, step_s=seconds,
            tokens_per_s=round(length / median(seconds), 1),
        )  # fmt: skip


def decode_176b(run: Run) -> None:
    """4 bits on one device: 4 rows filled to 2,048 tokens, then one row, for its speed."""
    sizes, model = run.sizes, run.model("bloom-176b")
    for scheme, cache_dtype in BIG_SETTINGS:
        name = f"bloomq {scheme}, {cache_dtype} cache"
        make = lambda s=scheme, c=cache_dtype: Bloomq(  # noqa: E731
            run, model, s, sizes.big_batch, sizes.context, cache_dtype=c, drawn=False
        )
        started = perf_counter()
        engines = built(run, {name: make})
        if not engines:
            continue
        load_gb, load_s = engines[name].bytes_per_token / 1e9, perf_counter() - started
        run.emit(
            "bloom-176b from host memory", load_s=round(load_s, 2), load_gb=round(load_gb, 2),
            gb_s=round(load_gb / load_s, 2), bus_gb_s=round(run.bus_gb_s(), 2),
            peak_rss_mb=round(status_mb("VmHWM")),
        )  # fmt: skip
        try:
            _rows_of_the_big_one(run, engines, name)
            return
        except Exception as error:  # memory that only a step takes: the next is smaller
            run.failed(name, error)
        engines.clear()
        run.free()


def _rows_of_the_big_one(run: Run, engines: dict[str, Engine], name: str) -> None:
    sizes, model, engine = run.sizes, run.model("bloom-176b"), engines[name]
    assert isinstance(engine, Bloomq)
    short, tokens = sizes.prompt, sizes.peer_tokens
    ids = prompts(model, sizes.big_batch, sizes.context - tokens - 1)
    full_s = run.seconds(lambda: engine.start(ids))
    step_s = run.seconds(lambda: engine.decode(tokens)) / tokens
    facts: dict[str, object] = {}
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.device)
        facts = {"used_gb": round((total - free) / 1e9, 1), "total_gb": round(total / 1e9, 1)}
    run.emit(
        f"{name}: {sizes.big_batch} rows of {sizes.context} tokens", model="bloom-176b", full=True,
        rows=sizes.big_batch, context=sizes.context, prefill_s=round(full_s, 2),
        step_s=[step_s], tokens_per_s=round(sizes.big_batch / step_s, 2), **facts,
    )  # fmt: skip
    one = engine.first_row()

    def take(found: Engine) -> float:
        found.start(prompts(model, 1, short))
        return run.seconds(lambda: found.decode(tokens)) / tokens

    samples = in_turns(run, {name: one}, take)
    report(run, "bloom-176b", 1, short + tokens / 2, {name: one}, samples)


def _engines(
    run: Run, model: str, schemes: Sequence[str], settings: tuple[Setting, ...], batch: int,
    capacity: int,
) -> dict[str, Engine]:  # fmt: skip
    """bloomq in each scheme, and the peers."""
    ours: Mapping[str, Callable[[], Engine]] = {
        f"bloomq {scheme}": lambda s=scheme: Bloomq(run, model, s, batch, capacity)
        for scheme in schemes
    }
    return built(run, {**ours, **makers(run, model, settings)})
