"""Joins a pack, a backend and a tokenizer: what `bloomq.load` returns.

This and the command line are the only places that know all three.
"""

from __future__ import annotations

import os
import warnings
from importlib.resources import files
from pathlib import Path
from time import perf_counter

from bloomq import backends, placing
from bloomq.backends import Choice
from bloomq.checks import is_whole
from bloomq.errors import CapacityError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.modeling import BloomForCausalLM
from bloomq.pack import Pack
from bloomq.parallel.cuts import rank_bytes
from bloomq.parallel.workers import Workers
from bloomq.tokenizer import BloomTokenizer

_MOST_CONTEXT = 1 << 24


def demo_pack() -> Path:
    """The pack that comes with bloomq: a small BLOOM, really trained."""
    return Path(str(files("bloomq"))) / "demo"


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    cache_dtype: str = "auto",
    devices: str = "auto",
    max_memory: str | None = None,
    workers: Workers | None = None,
) -> LanguageModel:
    """Map a pack (None: the embedded demo) and build its layers on a backend.

    backend: "auto", "numba", "cuda", "jax" or "reference"; threads: of the CPU, None for one a
    physical core; context: the most tokens of prompt and output together, None for what the model
    was trained on. ALiBi carries further, at some loss: a UserWarning says so. devices: "auto" (all
    GPUs that the model needs, or the CPU), "cpu", "cuda:0,1" or "cuda:0,cpu"; max_memory: what may
    be used of each, "0:70GiB,cpu:64GiB". workers: the processes that torchrun has started, who
    share the model, each with one GPU or a part of the cores: see `bloomq.parallel`.

    Raises: InputNotFound, PackError, TokenizerError, BackendError, UsageError; CapacityError where
    the devices have no room for the model, which says what would fit.
    """
    started = perf_counter()
    pack = Pack.open(demo_pack() if path is None else Path(path))
    if context is None:
        context = pack.config.seq_length
    if not is_whole(context) or not 2 <= context <= _MOST_CONTEXT:
        raise UsageError(f"context is {context!r}, expected 2 to {_MOST_CONTEXT} tokens")
    if context > pack.config.seq_length:
        warnings.warn(
            f"a context of {context} tokens, the model was trained on {pack.config.seq_length}: "
            "beyond them ALiBi extrapolates, at some loss",
            stacklevel=2,
        )
    if workers is None:
        choice = placing.choose(
            backend, pack, threads, cache_dtype, devices=devices, max_memory=max_memory,
            context=context,
        )  # fmt: skip
    else:
        if devices not in ("auto", "cpu") or max_memory is not None:
            raise UsageError(
                f"devices {devices!r} and max_memory {max_memory!r} on {workers.world} ranks, "
                "expected neither: each rank has the GPU of its number, or a part of the cores"
            )
        choice = _of_rank(workers, backend, pack, threads, cache_dtype, devices)
    used = choice.backend if workers is None else workers.backend(choice.backend, pack)
    tokenizer = BloomTokenizer.of_pack(pack) if pack.has_tokenizer else None
    model = BloomForCausalLM(pack, used)
    return LanguageModel(model, tokenizer, context, choice.reason, perf_counter() - started)


def _of_rank(
    workers: Workers, backend: str, pack: Pack, threads: int | None, cache_dtype: str, devices: str
) -> Choice:
    """The backend of one of several processes: on its own GPU, or on its share of the cores.

    Raises: CapacityError where the GPU has no room for this rank's part of the weights.
    """
    wants_gpu = backend in ("auto", "cuda") and devices == "auto"
    if wants_gpu and backends.why_not("cuda") is None:
        parts = rank_bytes(pack.config, pack.schemes, workers.world, workers.rank)
        needed, free = sum(parts.values()), workers.free_bytes()
        if needed > free:
            raise CapacityError(
                f"rank {workers.rank} has {needed / 1e9:.1f} GB of weights, {workers.device} has "
                f"{free / 1e9:.1f} GB free: start more ranks, or take a smaller scheme"
            )
        return backends.choose(backend, pack, threads, cache_dtype, workers.device)
    if threads is None and backend in ("auto", "numba"):
        from bloomq.backends.numba_cpu.threads import physical_cores

        threads = workers.threads(physical_cores())
    return backends.choose(backend, pack, threads, cache_dtype, devices)
