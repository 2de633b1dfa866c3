"""The weight pack: a folder that is mapped into memory and computed with as it lies.

    manifest.json                        what is here, with a checksum of everything
    weights-00001-of-0000N.safetensors   the arrays of `stored_arrays`, each 64-byte aligned
    tokenizer.json                       the checkpoint's, byte for byte (may be absent)

A pack is untrusted input. Invariant: a `Pack` that opened has every array its config asks for, of
the dtype and shape its scheme says, inside a file of the right size; `verify` checks the bytes too.
docs/format.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bloomq.config import BloomConfig, WeightSpec, read_json, weight_specs
from bloomq.errors import BloomqError, ConfigError, InputNotFound, PackError, UsageError
from bloomq.files import exists, read_bounded, shown
from bloomq.schemes import Array, Part, Scheme, get_scheme, round_up
from bloomq.tensorfile import Entry, TensorFile
from bloomq.tokenizer_config import Settings, settings_of
from bloomq.weights import Matrix, Norm

FORMAT, VERSION = "bloomq-pack", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
_SHARD_NAME = re.compile(r"weights-\d{5}-of-\d{5}\.safetensors")
ALIGNMENT = 64  # bytes: a cache line, and a vector register
_HASH_BLOCK_BYTES = 8 << 20
Progress = Callable[[int], None]  # called with the bytes done since the last call


def stored_arrays(spec: WeightSpec, scheme: Scheme | None) -> dict[str, Part]:
    """The arrays of one weight, by pack key: a matrix by its scheme, vectors as float32.

    Vectors are padded with zeros to a multiple of 32, so that every array is a multiple of 64
    bytes.
    """
    length = (round_up(spec.shape[0], 32),)
    if spec.kind == "norm":
        return {
            f"{spec.name}.weight": Part("F32", length),
            f"{spec.name}.bias": Part("F32", length),
        }
    assert scheme is not None
    n, k = spec.shape
    arrays = {f"{spec.name}.{part}": at for part, at in scheme.parts((n, k)).items()}
    if spec.has_bias:
        arrays[f"{spec.name}.bias"] = Part("F32", length)
    return arrays


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its own `checksum`, keys sorted, no spaces."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Pack:
    """An open pack. Arrays are read-only views of the mapped files."""

    path: Path
    config: BloomConfig
    schemes: Mapping[str, Scheme]
    tokenizer_settings: Settings
    manifest: Mapping[str, Any]
    _specs: Mapping[str, WeightSpec]
    _files: Mapping[str, TensorFile]
    _where: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Map the pack in folder `path`.

        Raises: InputNotFound; PackError, naming file and field, for anything that does not fit.
        """
        path = Path(path)
        if not exists(path):
            raise InputNotFound(f"{path}: no such pack: make one with 'bloomq convert'")
        if not path.is_dir():
            raise PackError(f"{path}: is a file, expected the folder of a pack")
        manifest = _read_manifest(path)
        where = path / MANIFEST
        try:
            config = BloomConfig.from_dict(manifest["config"], f"{where}: config")
        except ConfigError as error:
            raise PackError(str(error)) from None
        specs = weight_specs(config)
        schemes = _read_schemes(manifest, specs, where)
        settings = settings_of(
            manifest.get("tokenizer", {}), manifest.get("chat_template"), f"{where}: tokenizer",
            PackError,
        )  # fmt: skip
        files, array_file = _open_shards(path, manifest)
        expected: dict[str, Part] = {}
        for spec in specs:
            expected |= stored_arrays(spec, schemes.get(spec.name))
        _check_arrays(path, expected, files, array_file)
        return cls(
            path, config, schemes, settings, manifest, {s.name: s for s in specs}, files, array_file
        )  # fmt: skip

    def array(self, key: str) -> Array:
        """A stored array, mapped; bf16 comes as uint16."""
        return self._files[self._where[key]].array(key)

    def place(self, key: str) -> tuple[TensorFile, Entry]:
        """The file that holds a stored array, and where in it: for who reads without mapping."""
        file = self._files[self._where[key]]
        return file, file.entries[key]

    def matrix(self, name: str) -> Matrix:
        """The matrix of a weight: `lm_head` is `wte` where they are tied."""
        if name == "lm_head" and self.config.head_is_embedding:
            name = "wte"
        n, k = self._specs[name].shape
        scheme = self.schemes[name]
        parts = {part: self.array(f"{name}.{part}") for part in scheme.parts((n, k))}
        return Matrix(name, scheme, (n, k), parts)

    def vector(self, key: str, length: int) -> NDArray[np.float32]:
        """A stored float32 vector without its padding."""
        return np.asarray(self.array(key)[:length], np.float32)

    def norm(self, name: str) -> Norm:
        c = self.config.hidden_size
        gain, bias = self.vector(f"{name}.weight", c), self.vector(f"{name}.bias", c)
        return Norm(name, gain, bias, self.config.layer_norm_epsilon)

    @property
    def has_tokenizer(self) -> bool:
        return TOKENIZER in self.manifest["files"]

    def tokenizer_bytes(self) -> bytes | None:
        """The content of tokenizer.json, None where the pack has none.

        Raises: PackError where its size is not what the manifest says.
        """
        entry = self.manifest["files"].get(TOKENIZER)
        if entry is None:
            return None
        path, size = self.path / TOKENIZER, entry["bytes"]
        try:
            data = read_bounded(path, max(size, 0), PackError)
        except InputNotFound:
            raise PackError(f"{path}: missing: copy it again, or convert again") from None
        _check_size(path, len(data), size)
        return data

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(e.nbytes for file in self._files.values() for e in file.entries.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a step of one token reads: all but the embedding's own table, of
        which a look-up reads one row, unless the language model's head is tied to it."""
        return self.nbytes - (0 if self.config.head_is_embedding else self.matrix("wte").nbytes)

    @property
    def parameters(self) -> int:
        """Weights of the model, as published (padding not counted)."""
        specs = self._specs.values()
        return sum(math.prod(s.shape) + (s.shape[0] if s.has_bias else 0) for s in specs)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits, scales and vectors too, over all weights."""
        return 8 * self.nbytes / self.parameters

    def verify(self, progress: Progress = lambda done: None) -> None:
        """Read every byte and compare with the manifest's checksums.

        Raises: PackError naming the first file and array that differ.
        """
        for name, entry in self.manifest["files"].items():
            if name == TOKENIZER:
                _check_digest(self.path / name, "", self.tokenizer_bytes() or b"", entry["sha256"])
                continue
            for key, expected in entry["arrays"].items():
                data = self._files[name].raw(key)
                _check_digest(self.path / name, f" array {key}", data, expected, progress)


def _read_manifest(path: Path) -> dict[str, Any]:
    where = path / MANIFEST
    try:
        manifest = read_json(where)
    except InputNotFound:
        raise PackError(
            f"{path}: no {MANIFEST}: not a pack (a checkpoint becomes one by 'bloomq convert')"
        ) from None
    except ConfigError as error:
        raise PackError(f"{error}: convert again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackError(f"{where}: not the manifest of a bloomq pack")
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise PackError(f"{where}: version is {version!r}, expected {VERSION}")
    if version > VERSION:
        raise PackError(
            f"{where}: format version {version}, this bloomq reads up to {VERSION}: "
            "upgrade bloomq, or convert with this one"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise PackError(f"{where}: does not match its own checksum: damaged, convert again")
    for field in ("config", "weights", "files"):
        if not isinstance(manifest.get(field), dict):
            raise PackError(f"{where}: no {field}: convert again")
    return manifest


def _check_arrays(
    path: Path,
    expected: Mapping[str, Part],
    files: Mapping[str, TensorFile],
    array_file: Mapping[str, str],
) -> None:
    """The arrays are those of the config, of the right dtype, shape and alignment."""
    for key, part in expected.items():
        if key not in array_file:
            raise PackError(f"{path}: no array {key}: the pack is incomplete, convert again")
        file = files[array_file[key]]
        found = file.entries[key]
        if (found.dtype, found.shape) != (part.dtype, part.shape):
            raise PackError(
                f"{file.path}: {key} is {found.dtype} {list(found.shape)}, "
                f"expected {part.dtype} {list(part.shape)}: convert again"
            )
        if found.start % ALIGNMENT:
            raise PackError(
                f"{file.path}: {key} starts at byte {found.start}, expected it aligned to "
                f"{ALIGNMENT} bytes: convert again"
            )
    for key in array_file:
        if key not in expected:
            raise PackError(f"{path}: unexpected array {shown(key)}: convert again")


def _read_schemes(
    manifest: Mapping[str, Any], specs: list[WeightSpec], where: Path
) -> dict[str, Scheme]:
    schemes = {}
    for spec in specs:
        entry = manifest["weights"].get(spec.name)
        if not isinstance(entry, dict):
            raise PackError(f"{where}: weights has no {spec.name}: convert again")
        try:
            if spec.is_matrix:
                schemes[spec.name] = get_scheme(str(entry.get("scheme")), entry.get("group_size"))
        except (UsageError, TypeError) as error:
            raise PackError(f"{where}: {spec.name}: {error}") from None
        if entry.get("shape") != list(spec.shape):
            raise PackError(
                f"{where}: {spec.name} has shape {entry.get('shape')!r}, expected "
                f"{list(spec.shape)} by the config: convert again"
            )
    return schemes


def _open_shards(
    path: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """The shards, each of the size and with the arrays that the manifest says."""
    files: dict[str, TensorFile] = {}
    array_file: dict[str, str] = {}
    for name, entry in manifest["files"].items():
        if name == TOKENIZER:
            _entry_field(path, name, entry, "sha256", str)
            _entry_field(path, name, entry, "bytes", int)
            continue
        if not _SHARD_NAME.fullmatch(name):
            raise PackError(f"{path / MANIFEST}: {name!r} is not the name of a shard")
        arrays = _entry_field(path, name, entry, "arrays", dict)
        try:
            file = TensorFile.open(path / name)
        except InputNotFound:
            raise PackError(f"{path / name}: missing: copy it again, or convert again") from None
        except BloomqError as error:
            raise PackError(f"{error}: copy it again, or convert again") from None
        _check_size(path / name, file.size, _entry_field(path, name, entry, "bytes", int))
        if set(arrays) != set(file.entries):
            raise PackError(
                f"{path / name}: its arrays are not those of the manifest: convert again"
            )
        files[name] = file
        array_file.update(dict.fromkeys(arrays, name))
    return files, array_file


def _entry_field(path: Path, name: str, entry: object, field: str, kind: type) -> Any:
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise PackError(f"{path / MANIFEST}: files: {name} has no {field}: convert again")
    return value


def _check_size(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise PackError(
            f"{path}: {found} bytes, expected {expected}: copy it again, or convert again"
        )


def _check_digest(
    path: Path, what: str, data: Any, expected: object, progress: Progress = lambda done: None
) -> None:
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(0, len(view), _HASH_BLOCK_BYTES):
        block = view[start : start + _HASH_BLOCK_BYTES]
        digest.update(block)
        progress(len(block))
    if digest.hexdigest() != expected:
        raise PackError(
            f"{path}:{what} does not match its checksum: damaged, copy it again or convert again"
        )
