"""What the pickle of a state dict may speak of, as inert values: names, storages, tensors.

Invariant: nothing that a file names is imported, called or looked up; a name outside these tables
is text, and stays text.

Source: torch._utils (what tensors and parameters reduce to), torch.serialization (persistent ids).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bloomq.errors import CheckpointError
from bloomq.tensorfile import DTYPES

# A shape in the memo can be named by many tensors: it is measured before it is walked.
_MOST_DIMS = 8
# Keeps every product of sizes a number of few digits; no file comes near.
_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle speaks of: `torch.FloatStorage`."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A stretch of `count` elements, by the key under which the file holds its bytes."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as a view of a storage; offset and strides in elements of `dtype`. Not checked
    against the storage yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Placeholder:
    """What stands where a pickle wanted something of a name that we do not know. state: what it
    would have set on it."""

    name: Name
    state: object = None


_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPE_OF = {Name("torch", name): dtype for name, dtype in _DTYPES.items()}
_STORAGE_OF = {Name("torch", name): dtype for name, dtype in _STORAGES.items()}
_STORAGE_OF[Name("torch.storage", "UntypedStorage")] = "U8"


def storage(where: str, identity: object) -> Storage:
    """The storage that a persistent id means: ("storage", class, key, device, elements), and a
    sixth, None, in the older form. Raises: CheckpointError."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise CheckpointError(f"{where}: a persistent id of another form than a storage's: damaged")
    _, kind, key, device, count = identity[:5]
    dtype = _STORAGE_OF.get(kind) if type(kind) is Name else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: a storage of class {described(kind)}, expected one of torch's typed ones"
        )
    if type(key) is not str or type(device) is not str or not _is_size(count):
        raise CheckpointError(f"{where}: a storage without key, device or size: damaged")
    if len(identity) == 6 and identity[5] is not None:
        raise CheckpointError(
            f"{where}: storage {brief(key)} is a view of another, as before torch 0.4 only: save "
            "the model with a newer torch"
        )
    return Storage(key, dtype, count)


def _tensor(where: str, args: tuple[object, ...]) -> StoredTensor:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)"""
    if len(args) not in (6, 7):
        raise CheckpointError(f"{where}: a tensor of {len(args)} arguments, expected 6 or 7")
    base = args[0]
    if type(base) is not Storage:
        raise CheckpointError(f"{where}: a tensor of {described(base)}, expected of a storage")
    return _view(where, base, base.dtype, args)


def _tensor_of_dtype(where: str, args: tuple[object, ...]) -> StoredTensor:
    """_rebuild_tensor_v3(..., hooks, dtype, metadata=None): its storage has bytes, not elements."""
    dtype = _DTYPE_OF.get(args[6]) if len(args) in (7, 8) and type(args[6]) is Name else None
    base = args[0] if args else None
    if type(base) is not Storage or dtype is None:
        raise CheckpointError(f"{where}: an untyped tensor without storage or dtype: damaged")
    return _view(where, base, dtype, args[:6] + args[7:])


def _view(where: str, base: Storage, dtype: str, args: tuple[object, ...]) -> StoredTensor:
    """What both forms share: args[1:] are offset, size, stride, requires_grad, hooks, metadata."""
    offset, shape, strides, _, hooks, *metadata = args[1:]
    if not _is_size(offset) or not _is_shape(shape) or not _is_shape(strides):
        raise CheckpointError(
            f"{where}: a tensor whose offset, shape or strides are no sizes: damaged"
        )
    assert isinstance(offset, int) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if len(shape) != len(strides):
        raise CheckpointError(
            f"{where}: a tensor of {len(shape)} extents and {len(strides)} strides: damaged"
        )
    # Metadata is torch's conjugate and negative bits, which change the values.
    if not isinstance(hooks, dict) or hooks or any(metadata):
        raise CheckpointError(
            f"{where}: a tensor with backward hooks or metadata, which no weight needs: save the "
            "model as safetensors"
        )
    return StoredTensor(base, dtype, offset, shape, strides)


def _parameter(where: str, args: tuple[object, ...]) -> StoredTensor:
    """_rebuild_parameter(tensor, requires_grad, hooks), or with a state, which says nothing of
    values, behind them."""
    if len(args) not in (3, 4) or type(args[0]) is not StoredTensor:
        raise CheckpointError(f"{where}: a parameter that is not made of a tensor: damaged")
    return args[0]


def _ordered(where: str, args: tuple[object, ...]) -> dict[object, object]:
    if args:
        raise CheckpointError(f"{where}: an OrderedDict made of arguments, expected an empty one")
    return OrderedDict()


def _size(where: str, args: tuple[object, ...]) -> tuple[object, ...]:
    if len(args) != 1 or not _is_shape(args[0]):
        raise CheckpointError(f"{where}: a torch.Size of other things than sizes: damaged")
    assert isinstance(args[0], tuple)
    return args[0]


# What REDUCE may make, and by which function of ours.
MAKERS: Mapping[Name, Callable[[str, tuple[object, ...]], object]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("collections", "OrderedDict"): _ordered,
    Name("torch", "Size"): _size,
}
ADMITTED = frozenset(MAKERS) | frozenset(_DTYPE_OF) | frozenset(_STORAGE_OF)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_shape(value: object) -> bool:
    return type(value) is tuple and len(value) <= _MOST_DIMS and all(map(_is_size, value))


def brief(name: str) -> str:
    """A name from a file, short and on one line."""
    return name if name.isprintable() and len(name) <= 100 else f"{name!r:.100}"


_KINDS: Mapping[type, str] = {
    StoredTensor: "a tensor", Storage: "a storage", OrderedDict: "a dict", int: "a number",
    float: "a number", str: "a text", type(None): "nothing", bytes: "bytes",
}  # fmt: skip


def described(value: object) -> str:
    """What a value is, for an error: never the value itself, which may be endless."""
    if type(value) is Name:
        return brief(str(value))
    if type(value) is Placeholder:
        return f"something of {brief(str(value.name))}"
    return _KINDS.get(type(value), f"a {type(value).__name__}")
