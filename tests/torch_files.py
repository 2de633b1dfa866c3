"""Writes what the readers of PyTorch files read: by torch itself, and by hand, opcode by opcode,
what torch would never write.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bloomq.tensorfile import TensorFile

State = dict[str, torch.Tensor]


def said(value: object) -> str:
    """A part of a parametrized test's name: of messages, not of bytes."""
    return value[:40] if isinstance(value, str) else ""


# -- by torch --------------------------------------------------------------------------------------


def as_torch(dtype: str, array: np.ndarray) -> torch.Tensor:
    """An array of a safetensors dtype (bf16 as uint16) as torch's."""
    if dtype == "BF16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def state_of(checkpoint: Path) -> State:
    """The state dict of a single-file safetensors checkpoint."""
    file = TensorFile.open(checkpoint / "model.safetensors")
    return {name: as_torch(entry.dtype, file.array(name)) for name, entry in file.entries.items()}


def beside(checkpoint: Path, folder: Path) -> Path:
    """A new folder with all that lies beside the weights of a checkpoint."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def save_sharded(folder: Path, state: State, count: int) -> None:
    """As transformers did: pytorch_model-0000i-of-0000n.bin and an index."""
    weight_map = {}
    for i in range(count):
        name = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = dict(list(state.items())[i::count])
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# -- Megatron-DeepSpeed ----------------------------------------------------------------------------

_MEGATRON = {
    "word_embeddings.weight": (1, "word_embeddings.weight"),
    "word_embeddings_layernorm.weight": (1, "word_embeddings.norm.weight"),
    "word_embeddings_layernorm.bias": (1, "word_embeddings.norm.bias"),
}
BY_ROWS = (
    "word_embeddings.weight", "query_key_value.weight", "query_key_value.bias",
    "dense_h_to_4h.weight", "dense_h_to_4h.bias",
)  # fmt: skip
BY_COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")


def megatron_layers(state: Mapping[str, torch.Tensor]) -> dict[int, State]:
    """Layer -> its tensors, by Megatron's names."""
    names = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    n_layer = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("h."))
    layers: dict[int, State] = {}
    for name, tensor in names.items():
        if name.startswith("h."):
            _, i, foreign = name.split(".", 2)
            number = int(i) + 3
        elif name.startswith("ln_f."):
            number, foreign = n_layer + 4, name.removeprefix("ln_f.")
        else:
            number, foreign = _MEGATRON[name]
        layers.setdefault(number, {})[foreign] = tensor
    return layers


def parts_of(name: str, tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """A tensor cut as Megatron cuts it over `count` tensor-parallel ranks."""
    if name.endswith(BY_ROWS):
        return list(tensor.chunk(count, 0))
    return list(tensor.chunk(count, 1)) if name.endswith(BY_COLUMNS) else [tensor] * count


def layer_file(number: int, part: int) -> str:
    return f"layer_{number:02d}-model_{part:02d}-model_states.pt"


def save_megatron(folder: Path, state: State, count: int, *, padding: int = 0) -> Path:
    """The layer files of `count` ranks; the vocabulary gets `padding` more rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, tensors in megatron_layers(state).items():
        if number == 1 and padding:
            table = tensors["word_embeddings.weight"]
            filler = torch.full((padding, table.shape[1]), 7.0, dtype=table.dtype)
            tensors["word_embeddings.weight"] = torch.cat([table, filler])
        for part in range(count):
            cut = {n: parts_of(n, t, count)[part].clone() for n, t in tensors.items()}
            torch.save(cut, folder / layer_file(number, part))
    return folder


# -- by hand ---------------------------------------------------------------------------------------

NONE, TRUE, FALSE, EMPTY, MARK = b"N", b"\x88", b"\x89", b")", b"("


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def group(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def called(made_by: bytes, *arguments: bytes) -> bytes:
    return made_by + group(*arguments) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}" + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


ORDERED = called(name("collections", "OrderedDict"))
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def stored(key: str = "0", kind: str = "FloatStorage", count: int = 6) -> bytes:
    identity = [text("storage"), name("torch", kind), text(key), text("cpu"), number(count)]
    return group(*identity) + b"Q"


def sizes(values: Any) -> bytes:
    return group(*map(number, values))


def tensor(
    base: bytes | None = None, offset: int = 0, shape: Any = (2, 3), strides: Any = (3, 1)
) -> bytes:
    """A call that makes a tensor; by default 2 x 3 of float32 in storage "0" of 6."""
    base = stored() if base is None else base
    return called(
        REBUILD, base, number(offset), sizes(shape), sizes(strides), FALSE, ORDERED
    )  # fmt: skip


SIX = np.arange(6, dtype=np.float32).tobytes()


def archive(
    path: Path, pickle: bytes, storages: Mapping[str, bytes] | None = None, **entries: bytes
) -> Path:
    """A zip archive as torch's with this data.pkl; other entries by their names below its root."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        for other, data in entries.items():
            file.writestr(f"archive/{other}", data)
        for key, data in ({"0": SIX} if storages is None else storages).items():
            file.writestr(f"archive/data/{key}", data)
    return path
