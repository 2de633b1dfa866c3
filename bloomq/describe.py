"""What a pack is and what would run it here: the facts of `bloomq info`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bloomq import __version__, backends
from bloomq.loading import demo_pack
from bloomq.pack import Pack


def describe(path: str | os.PathLike[str] | None = None) -> dict[str, dict[str, Any]]:
    """Facts about a pack (None: the embedded demo) and this machine, in sections.

    Raises: InputNotFound, PackError.
    """
    pack = Pack.open(demo_pack() if path is None else Path(path))
    return {"pack": _pack_facts(pack), "backends": _backend_facts(), "machine": _machine_facts()}


def _pack_facts(pack: Pack) -> dict[str, Any]:
    config = pack.config
    head = pack.schemes["wte"]
    body = pack.schemes["h.0.attn.qkv"]
    return {
        "path": str(pack.path),
        "format": f"version {pack.manifest['version']}",
        "model": f"{config.n_layer} layers, hidden {config.hidden_size}, {config.n_head} heads, "
        f"{config.vocab_size} tokens, {'tied' if config.tie_word_embeddings else 'own'} head",
        "parameters": pack.parameters,
        "bytes": pack.nbytes,
        "schemes": f"{body.label}, embedding {head.label}",
        "bits per weight": round(pack.bits_per_weight, 2),
        "bytes per token": pack.bytes_per_token,
        "tokenizer": "yes"
        if "tokenizer.json" in pack.manifest["files"]
        else "none: token ids only",
        "made from": _provenance(pack),
    }


def _provenance(pack: Pack) -> str:
    origin = pack.manifest.get("provenance")
    if not isinstance(origin, dict):
        return "not stated"
    return f"{origin.get('name')} ({origin.get('format')}, {origin.get('dtype')})"


def _backend_facts() -> dict[str, str]:
    facts = {}
    for name in backends.NAMES:
        problem = backends.why_not(name)
        facts[name] = "available" if problem is None else f"not available: {problem}"
    return facts


def _machine_facts() -> dict[str, str]:
    facts = {"bloomq": __version__}
    if backends.why_not("numba") is None:
        from bloomq.backends.numba_cpu.jit import cache_dir
        from bloomq.backends.numba_cpu.layers import NumbaBackend

        backend = NumbaBackend()
        facts |= {
            "instruction tier": backend.tier,
            "threads": str(backend.threads),
            "compiled kernels": str(cache_dir()),
        }
    return facts
