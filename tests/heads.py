"""Fine-tuned classifiers of the demo model: whole checkpoints from the tensors that changed.

`data/heads/NAME` holds the config.json, the tensors that fine-tuning changed (changed.safetensors)
and held-out records (heldout.jsonl); every other tensor is the demo checkpoint's. This module knows
the safetensors format by itself and needs neither torch nor NumPy: bytes are copied, never read.
benchmarks/train_heads.py makes the data.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = Path(__file__).parent / "data" / "bloom-demo"
HEADS = Path(__file__).parent / "data" / "heads"
NAMES = ("sequence", "token", "question")  # BloomForSequenceClassification, ...Token..., Question..
PREFIX = "transformer."  # of the body's names in a classifier; the demo checkpoint's have none
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as it lies in a safetensors file."""

    dtype: str  # F32, BF16, ...
    shape: tuple[int, ...]
    data: bytes  # little endian, row-major


def assemble(name: str, folder: Path, *, heads: Path = HEADS) -> Path:
    """`folder`, made and filled with the checkpoint `name`: config, weights and tokenizer.

    The tensors' names are those that transformers saves: `transformer.h.0...`, `score.weight`.
    """
    changed = read_tensors(heads / name / "changed.safetensors")
    base = read_tensors(BASE / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", {PREFIX + k: v for k, v in base.items()} | changed)
    shutil.copyfile(heads / name / "config.json", folder / "config.json")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(BASE / file, folder / file)
    return folder


def heldout(name: str, *, heads: Path = HEADS) -> list[Record]:
    """The records that `name` was not trained on; data/heads/README.md says what is in one."""
    text = (heads / name / "heldout.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def read_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file: 8 bytes of length, a JSON header, the data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = raw[start + first : start + last]
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), data)
    return tensors


def write_tensors(path: Path, tensors: dict[str, Stored]) -> None:
    """F32 before BF16, so that each tensor starts at a multiple of its element's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].dtype != "F32", item[0])):
        end = offset + len(tensor.data)
        entries[name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]
        }  # fmt: skip
        blobs.append(tensor.data)
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # as the safetensors library pads, to align the data
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(blobs))
