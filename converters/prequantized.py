"""Reads what GPTQ and AWQ quantized: their packed tensors become weights in order, and where their
grid is one of ours, codes and scales are taken over as they are.

| checkpoint | our grid |
|---|---|
| GPTQ, 4 bits and symmetric, or 2 or 3, groups of a multiple of 32 | int4, groups of 128, 64, 32 |
| GPTQ of 4 bits, or AWQ, groups of a multiple of 64 | int6: code - zero lies in -16..15 |
| GPTQ, 8 bits, symmetric, a scale per row | int8, but for rows that hold -128 |
| anything else: activation order, 8 bits in groups | none: dequantized, then quantized anew |

Source: AutoGPTQ's BaseQuantizeConfig, AutoAWQ's AwqConfig; ScaledActivation of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bloomq.config import read_json
from bloomq.errors import CheckpointError, ConfigError, InputNotFound
from bloomq.schemes import GROUP_SIZES, Scheme, get_scheme

from .packed_grids import WORD_BITS, Bands, Grid
from .source import Checkpoint, SourceTensor, Stored

_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's own, llm-awq's
_WORDS, _ZEROS, _SCALES, _INDEX = ".qweight", ".qzeros", ".scales", ".g_idx"
# AutoAWQ divides BLOOM's gelu by this, and has multiplied the next linear's columns by it.
_ACTIVATION, _ACTIVATED = ".mlp.gelu_impl.scales", ".mlp.dense_4h_to_h"
# Other names of the same settings, as older versions wrote them.
_SYNONYMS: dict[str, str] = {"w_bit": "bits", "q_group_size": "group_size", "version": "format",
             "checkpoint_format": "format"}  # fmt: skip
# Zeros of GPTQ's first format are stored less one.
_FORMATS = {("gptq", "gptq"): 1, ("gptq", "gptq_v2"): 0, ("awq", "gemm"): 0}
_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
_LARGEST_GROUP = 1 << 20
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Packing:
    """What a checkpoint's settings say of its packed tensors. group_size: -1 for a scale a row;
    zero_shift: what is added to a stored zero."""

    method: str
    bits: int
    group_size: int
    symmetric: bool
    scattered: bool
    zero_shift: int

    @property
    def label(self) -> str:
        return self.method.upper()

    def to_dict(self) -> dict[str, Any]:
        """For a pack's provenance."""
        return {
            "method": self.method, "bits": self.bits, "group_size": self.group_size,
            "sym": self.symmetric, "desc_act": self.scattered,
        }  # fmt: skip

    def scheme(self, hidden_size: int) -> Scheme | None:
        """Ours with the same grid, if there is one."""
        whole = self.group_size == -1
        if self.scattered:
            return None
        if self.bits == 8:
            return get_scheme("int8") if whole and self.symmetric else None
        width = hidden_size if whole else self.group_size  # K is it, or four times it
        if self.symmetric or self.bits < 4:  # 3 bits less a zero of up to 8: -8..7
            sizes = [size for size in reversed(GROUP_SIZES) if width % size == 0]
            return get_scheme("int4", sizes[0]) if sizes else None
        return get_scheme("int6") if width % 64 == 0 else None


def read_packing(
    path: Path, config: Mapping[str, Any], found: Mapping[str, SourceTensor]
) -> Packing | None:
    """How the tensors of the checkpoint in folder `path` are packed, by its config.json or the file
    of the tool that made it; None: they are not.

    Raises: ConfigError, naming file and field; CheckpointError for other kinds of quantization.
    """
    raw, source = config.get("quantization_config"), f"{path / 'config.json'}: quantization_config"
    if raw is not None:
        return _packing(raw, source, path)
    packed = next((name for name in found if name.endswith(_WORDS)), None)
    if packed is None:
        return None
    for name in _FILES:
        try:
            return _packing(read_json(path / name), str(path / name), path, default="gptq")
        except InputNotFound:
            continue
    raise CheckpointError(
        f"{found[packed].name}: is packed, and neither config.json nor {' nor '.join(_FILES)} says "
        "how: download them too"
    )


def _packing(raw: Any, source: str, path: Path, default: str | None = None) -> Packing:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: found {raw!r:.40}, expected settings in a JSON object")
    settings: dict[str, Any] = {str(_SYNONYMS.get(key, key)): value for key, value in raw.items()}
    form = str(settings.get("format") or "").lower()
    named = settings.get("quant_method") or ("awq" if default and form == "gemm" else default)
    method = str(named).lower()
    if method not in _BITS:
        raise CheckpointError(
            f"{path}: is quantized already (quantization_config): convert the original checkpoint"
        )
    form = "marlin" if settings.get("is_marlin_format") else form or next(
        known for of, known in _FORMATS if of == method
    )  # fmt: skip
    if (method, form) not in _FORMATS:
        known = " or ".join(known for of, known in _FORMATS if of == method)
        raise ConfigError(
            f"{source}: the format is {form!r:.40}, expected {known}: bloomq unpacks no other"
        )
    if settings.get("dynamic"):
        raise ConfigError(f"{source}: dynamic is set: bits that differ by module are not supported")
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    if isinstance(bits, bool) or bits not in _BITS[method]:
        known = ", ".join(map(str, _BITS[method]))
        raise ConfigError(f"{source}: codes of {bits!r:.40} bits, expected one of {known}")
    if (
        isinstance(group, bool)
        or not isinstance(group, int)
        or not (group == -1 or 1 <= group <= _LARGEST_GROUP)
    ):
        raise ConfigError(f"{source}: group_size is {group!r:.40}, expected -1 or a whole number")
    symmetric = _flag(settings, "sym", True, source) if method == "gptq" else False
    scattered = method == "gptq" and _flag(settings, "desc_act", False, source) and group != -1
    return Packing(method, int(bits), group, symmetric, scattered, _FORMATS[method, form])


def _flag(settings: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: its {name} is {value!r:.40}, expected true or false")
    return value


def unpacked(
    path: Path, found: Mapping[str, SourceTensor], packing: Packing, hidden_size: int
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """The tensors with NAME.weight [N, K] in the place of what it was packed into, and notes.

    Reads nothing. Raises: CheckpointError, naming the tensor.
    """
    left, bands = dict(found), Bands()
    names = [name.removesuffix(_WORDS) for name in found if name.endswith(_WORDS)]
    if not names:
        raise CheckpointError(
            f"{path}: no tensor ends in {_WORDS}, expected some by its settings of {packing.label}"
        )
    scheme = packing.scheme(hidden_size)
    exact = 0
    for name in names:
        grid = _take(left, name, packing, bands)
        # int8 has float32 scales; those of the others are float16, as these tools write them.
        fits = grid.divisors is None and (packing.bits == 8 or grid.scales.dtype == "F16")
        exact += fits
        stored = Stored(scheme, partial(grid.parts, scheme)) if scheme and fits else None
        if name + ".weight" in left:
            raise CheckpointError(f"{grid.name}: packed, and stored as {name}.weight too: damaged")
        release = partial(_release, tuple(filter(None, grid.tensors)))
        left[name + ".weight"] = SourceTensor(
            grid.name, "F32", grid.shape, grid.rows, stored=stored, release=release
        )
    return left, _notes(path, packing, scheme, len(names) - exact)


def _release(tensors: tuple[SourceTensor, ...]) -> None:
    for tensor in tensors:
        tensor.release()


def _take(left: dict[str, SourceTensor], name: str, packing: Packing, bands: Bands) -> Grid:
    """The matrix that is stored under `name`; what it is packed into is taken out of `left`."""
    words = left.pop(name + _WORDS)
    zeros, scales = _part(left, words, name, _ZEROS), _part(left, words, name, _SCALES)
    index = _part(left, words, name, _INDEX) if packing.method == "gptq" else None
    n, k = _shape(words, packing)
    group = k if packing.group_size == -1 else packing.group_size
    groups = -(-k // group)
    _check(zeros, ("I32",), (groups, n * packing.bits // WORD_BITS))
    _check(scales, _FLOATS, (groups, n))
    _check(index, ("I32", "I64"), (k,))
    divisors = None
    if packing.method == "awq" and name.endswith(_ACTIVATED):
        divisors = left.pop(name.removesuffix(_ACTIVATED) + _ACTIVATION, None)
        _check(divisors, _FLOATS, (k,))
    return Grid(
        words.name, (n, k), packing.bits, group, packing.method == "awq", packing.zero_shift,
        words, zeros, scales, index, divisors, bands,
    )  # fmt: skip


def _part(left: dict[str, SourceTensor], words: SourceTensor, name: str, leaf: str) -> SourceTensor:
    tensor = left.pop(name + leaf, None)
    if tensor is None:
        raise CheckpointError(f"{words.name}: there is no {leaf[1:]} beside it: incomplete")
    return tensor


def _shape(words: SourceTensor, packing: Packing) -> tuple[int, int]:
    """[N, K] of the matrix whose codes these are. Whole words in both directions."""
    if words.dtype != "I32" or len(words.shape) != 2 or 0 in words.shape:
        raise CheckpointError(
            f"{words.name} is {words.dtype} {list(words.shape)}, expected words of I32 in two "
            "dimensions"
        )
    rows, columns = words.shape
    if packing.method == "awq":
        n, k = columns * WORD_BITS // packing.bits, rows
    else:
        n, k = columns, rows * WORD_BITS // packing.bits
    if n % WORD_BITS or (packing.method == "gptq" and rows % packing.bits):
        raise CheckpointError(
            f"{words.name} unpacks to [{n}, {k}], expected multiples of {WORD_BITS}: damaged, or "
            "of other bits than its settings say"
        )
    return n, k


def _check(tensor: SourceTensor | None, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != shape):
        raise CheckpointError(
            f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected {dtypes[0]} "
            f"{list(shape)} by the codes beside it and the settings"
        )


def _notes(path: Path, packing: Packing, scheme: Scheme | None, folded: int) -> tuple[str, ...]:
    """What the user should know whatever scheme is chosen."""
    if scheme is None:
        why = "columns in activation order (desc_act)" if packing.scattered else (
            f"{packing.bits} bits in groups of {packing.group_size}"
        )  # fmt: skip
        return (
            f"{path}: {packing.label} with {why} is no grid of bloomq's: the weights are "
            "dequantized and quantized anew: a second loss",
        )
    if folded:
        return (
            f"{path}: {folded} matrices with divided columns or wide scales are dequantized and "
            "quantized anew: a second loss",
        )
    return ()


def stored_notes(checkpoint: Checkpoint, body: Scheme) -> tuple[str, ...]:
    """What became of a checkpoint's own grid in a pack of scheme `body`."""
    kept, notes = checkpoint.stored_scheme, []
    if body.is_float:  # which loses nothing a second time
        return ()
    label = checkpoint.quantized_by
    if kept == body:
        notes.append(f"{kept.label}: taken over from {label} as it is")
    elif kept is not None:
        notes.append(
            f"{body.label}: quantized anew from {label}: a second loss, which {kept.label} has not"
        )
    types = checkpoint.provenance.get("types", ())  # of a GGUF
    if others := [
        name for name in types if name not in (*_FLOATS, *("Q4_0",) * (kept is not None))
    ]:
        notes.append(
            f"{', '.join(others)} of the GGUF: dequantized, then quantized anew: a second loss, "
            "which the original checkpoint has not"
        )
    return tuple(notes)
