"""Perplexity of the peers' quantized files and of bloomq's packs, of one checkpoint and text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peer_process import Child, PeerError
from peer_setup import WORKER, Bench
from quality import log_softmax, mean_loss, read_windows

import bloomq

# Compared in quality.
OURS: tuple[tuple[str, dict[str, object]], ...] = (
    ("int8", {"scheme": "int8"}),
    ("nl4", {}),
    ("nl4, groups of 32", {"scheme": "nl4", "group_size": 32}),
    ("nl4, head nl4", {"head_scheme": "nl4"}),
    ("int4, groups of 32", {"scheme": "int4", "group_size": 32}),
)


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
