"""Decode and prefill of bloomq beside transformers, on random weights in the published shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from time import perf_counter

from gpu_engines import Bloomq, prompts
from gpu_loading import beside_plan, used_bytes
from gpu_peers import BF16, BF16_SDPA, INT8, INT8_PLAIN, NF4, Setting, makers
from gpu_run import Engine, Run, Sample, built, in_turns, report, status_mb

from bloomq.layers import CacheDtype

# 4 bits, 2,048 tokens x 4, on a device that has little room beside them: the first that fits.
BIG_SETTINGS: tuple[tuple[str, CacheDtype], ...] = (("nl4", "f16"), ("nl4", "int8"))


def decode_7b1(run: Run) -> None:
    """Batch 1, every scheme beside every peer."""
    settings = INT8, INT8_PLAIN, NF4, BF16, BF16_SDPA
    _decode(run, "bloom-7b1", ("int8", "nl4", "int4", "nf4", "bf16"), settings, 1)


def batch_7b1(run: Run) -> None:
    """32 rows, one step for all."""
    settings = INT8, INT8_PLAIN, NF4, BF16_SDPA
    _decode(run, "bloom-7b1", ("int8", "nl4", "int4", "bf16"), settings, run.sizes.batch)


def decode_560m(run: Run) -> None:
    _decode(run, "bloom-560m", ("int8", "nl4"), (INT8, INT8_PLAIN, NF4), 1)


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

    depth = sizes.prompt + sizes.tokens / 2
    in_turns(run, engines, take, partial(report, run, name, batch, depth, engines))


def prefill_7b1(run: Run) -> None:
    """One prompt of 2,048 tokens, to the scores of its last."""
    name, model, length = "bloom-7b1", run.model("bloom-7b1"), run.sizes.prefill
    schemes, settings = ("int8", "nl4", "int4", "bf16"), (BF16, BF16_SDPA, NF4, INT8_PLAIN)
    engines = _engines(run, model, schemes, settings, 1, length + 1)
    ids = prompts(model, 1, length)

    def say(samples: Mapping[str, list[Sample]]) -> None:
        for engine, found in samples.items():
            seconds = [sample.seconds for sample in found]
            run.emit(
                engine, model=name, batch=1, peer=engines[engine].is_peer, step_s=seconds,
                tokens_per_s=round(length / median(seconds), 1),
            )  # fmt: skip

    in_turns(run, engines, lambda engine: run.seconds(lambda: engine.start(ids)), say)


def decode_176b(run: Run) -> None:
    """4 bits on one device: 4 rows filled to 2,048 tokens, then one row, for its speed."""
    sizes, model, before = run.sizes, run.model("bloom-176b"), used_bytes(run.device)
    for scheme, cache_dtype in BIG_SETTINGS:
        name = f"bloomq {scheme}, {cache_dtype} cache"
        started = perf_counter()
        try:
            engine = Bloomq(
                run, model, scheme, sizes.big_batch, sizes.context, cache_dtype=cache_dtype,
                drawn=False,
            )  # fmt: skip
            run.wait()
            load_s, rss_mb = perf_counter() - started, status_mb("VmHWM")
            _fill(run, engine, name)
        except Exception as error:  # memory, most likely: the next setting takes less
            run.failed(name, error)
        else:
            break
        engine = None  # type: ignore[assignment]
        run.free()
    else:
        return
    _memory_of(run, scheme, cache_dtype, before)
    load_gb = engine.bytes_per_token / 1e9  # in windows, which the host copies once more than files
    run.emit(
        "bloom-176b from host memory", load_s=round(load_s, 2), load_gb=round(load_gb, 2),
        gb_s=round(load_gb / load_s, 2), bus_gb_s=round(run.bus_gb_s(), 2),
        peak_rss_mb=round(rss_mb),
    )  # fmt: skip
    one, count = engine.first_row(), sizes.peer_tokens

    def take(found: Engine) -> float:
        found.start(prompts(model, 1, sizes.prompt))
        return run.seconds(lambda: found.decode(count)) / count

    depth = sizes.prompt + count / 2
    in_turns(run, {name: one}, take, partial(report, run, "bloom-176b", 1, depth, {name: one}))


def _fill(run: Run, engine: Bloomq, name: str) -> None:
    """Fill every row but for a few tokens, and decode those."""
    sizes, count = run.sizes, run.sizes.peer_tokens
    ids = prompts(run.model("bloom-176b"), sizes.big_batch, sizes.context - count - 1)
    full_s = run.seconds(lambda: engine.start(ids))
    step_s = run.seconds(lambda: engine.decode(count)) / count
    run.emit(
        f"{name}: {sizes.big_batch} rows of {sizes.context} tokens", model="bloom-176b", full=True,
        rows=sizes.big_batch, context=sizes.context, prefill_s=round(full_s, 2), step_s=[step_s],
        tokens_per_s=round(sizes.big_batch / step_s, 2),
    )  # fmt: skip


def _memory_of(run: Run, scheme: str, cache_dtype: CacheDtype, before: float) -> None:
    try:
        beside_plan(run, "bloom-176b", scheme, cache_dtype, before)
    except Exception as error:  # the speed is still to come
        run.failed("memory of bloom-176b", error)


def _engines(
    run: Run, model: str, schemes: Sequence[str], settings: tuple[Setting, ...], batch: int,
    capacity: int,
) -> dict[str, Engine]:  # fmt: skip
    """bloomq in each scheme, and the peers."""
    ours: Mapping[str, Callable[[], Engine]] = {
        f"bloomq {scheme}": partial(Bloomq, run, model, scheme, batch, capacity)
        for scheme in schemes
    }
    return built(run, {**ours, **makers(run, model, settings)})
