"""Small random BLOOMs in Hugging Face format, written without torch, and packs of them.

`Tiny` says what a checkpoint is; `checkpoint` and `pack` build it once in pytest's base folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bloomq.converters.convert import convert
from bloomq.converters.names import PREFIX, expected_tensors, huggingface_name
from numpy.typing import NDArray

from bloomq.config import BloomConfig
from bloomq.schemes import f32_to_bf16

DEMO = Path(__file__).parent / "data" / "bloom-demo"


@dataclass(frozen=True)
class Tiny:
    """A random BLOOM, its biases and layer-norm gains far from 0 and 1, so that each matters."""

    n_head: int = 4
    head_dim: int = 8
    vocab_size: int = 131
    n_layer: int = 2
    dtype: str = "F32"
    tied: bool = True
    seed: int = 0
    seq_length: int = 2048

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def config(self) -> BloomConfig:
        return BloomConfig(
            hidden_size=self.n_head * self.head_dim, n_layer=self.n_layer, n_head=self.n_head,
            vocab_size=self.vocab_size, tie_word_embeddings=self.tied, seq_length=self.seq_length,
        )  # fmt: skip


def checkpoint(base: Path, tiny: Tiny, tokenizer: Path | None = None) -> Path:
    """The checkpoint's folder under `base`, with a copy of `tokenizer` where one is given."""
    folder = base / f"checkpoint-{tiny.name}{'-text' if tokenizer else ''}"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(tiny.seed)
    entries, blobs, offset = {}, [], 0
    for name, shape in expected_tensors(tiny.config).items():
        values = _values(rng, name, shape)
        stored = {"F32": values, "F16": values.astype(np.float16), "BF16": f32_to_bf16(values)}
        blobs.append(stored[tiny.dtype].tobytes())
        key = huggingface_name(name)
        key = key if key.startswith("lm_head") else PREFIX + key
        end = offset + len(blobs[-1])
        entries[key] = {"dtype": tiny.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    data = len(header).to_bytes(8, "little") + header + b"".join(blobs)
    (folder / "model.safetensors").write_bytes(data)
    config = {**tiny.config.to_dict(), "model_type": "bloom", "architectures": ["BloomForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        return x if name.startswith(("wte", "lm_head")) else x / np.float32(np.sqrt(shape[1]))
    is_gain = name.split(".")[-2] in ("emb_ln", "ln_1", "ln_2", "ln_f") and name.endswith("weight")
    return np.float32(is_gain) + np.float32(0.2) * x


def pack(
    base: Path, source: Tiny | Path, scheme: str = "f32", group_size: int | None = None
) -> Path:
    """The pack of a tiny model, or of the checkpoint in a folder, converted once."""
    name = source.name if isinstance(source, (Tiny, Path)) else str(source)
    folder = base / f"pack-{name}-{scheme}-{group_size}"
    if not folder.exists():
        start = checkpoint(base, source) if isinstance(source, Tiny) else source
        convert(start, folder, scheme=scheme, group_size=group_size)
    return folder


def copied(source: Path, target: Path) -> Path:
    """A private copy of a pack, to be damaged."""
    shutil.copytree(source, target)
    return target
