"""Fixtures that many tests share: the demo checkpoint, its packs, and tiny random checkpoints.

The checkpoint writer here knows the safetensors format by itself (no torch, no safetensors), so
that what the converter reads is not what the same library wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert

from bloomq.backends.numba_cpu.jit import cache_dir
from bloomq.pack import Pack

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU Triton's kernels run in its interpreter, which is chosen when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# XLA's programs are kept beside our own kernels: to compile them is half of the time of the tests
# on JAX, and they are the same in the next run.
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": str(cache_dir().parent / "xla-of-tests"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": "100000000",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

DEMO = Path(__file__).parent / "data" / "bloom-demo"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
# The files of tests that take longest, in the order in which workers get them (`make test` keeps
# it): none is left with a long one at the end. With no kernel in the cache the first two compile
# nearly all of them, each its own, so nothing is compiled on two workers at once.
LONGEST = (
    "kernels", "attention", "jax", "conformance", "calibration", "heads", "transformers", "docs",
    "parallel", "cli", "compile_cache", "gpu_figures", "evaluation", "lora", "cuda_steps",
    "chat_command", "cuda_backend", "placed", "cache", "pipelines", "search", "prequantized",
    "tasks", "durability", "resume", "convert", "modeling_parity", "levels",
)  # fmt: skip
Tensors = dict[str, tuple[str, np.ndarray]]  # foreign name -> (dtype, array; bf16 as uint16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; else in their usual order."""
    rank = {f"test_{name}": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The folder of the trained demo checkpoint. Do not write into it."""
    return DEMO


@pytest.fixture(scope="session")
def pack_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pack_of("int4", group_size=32)`: the demo's pack, converted once. Do not write into it."""
    made: dict[tuple[Any, ...], Path] = {}

    def pack(scheme: str, group_size: int | None = None, head_scheme: str | None = None) -> Path:
        key = (scheme, group_size, head_scheme)
        if key not in made:
            target = tmp_path_factory.mktemp("packs") / scheme
            convert(DEMO, target, scheme=scheme, group_size=group_size, head_scheme=head_scheme)
            made[key] = target
        return made[key]

    return pack


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch with one thread: on a busy machine several wait for each other, thirty times as long
    for small products."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Callable[..., Path]:
    """`tiny_checkpoint(folder, vocab_size=70, dtype="BF16", ...)`: see `write_checkpoint`."""
    return write_checkpoint


def write_checkpoint(
    folder: Path,
    *,
    hidden_size: int = 64,
    n_layer: int = 1,
    n_head: int = 4,
    vocab_size: int = 96,
    dtype: str = "F32",
    prefix: str = "transformer.",
    config: Mapping[str, Any] | None = None,
    shards: int = 0,
    edit: Callable[[Tensors], None] | None = None,
    seed: int = 0,
) -> Path:
    """A random BLOOM in Hugging Face format in `folder`, which is made and returned.

    config: more keys for config.json; shards: 0 for one file, else so many and an index; edit: a
    last change to the tensors (names with prefix) before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": hidden_size, "n_layer": n_layer, "n_head": n_head}
    raw = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps({**raw, **sizes, **(config or {})}))
    tensors = random_tensors(hidden_size, n_layer, vocab_size, dtype, prefix=prefix, seed=seed)
    if edit is not None:
        edit(tensors)
    if not shards:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        write_safetensors(folder / shard, part)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def random_tensors(
    hidden_size: int, n_layer: int, vocab_size: int, dtype: str, *, prefix: str = "", seed: int = 0
) -> Tensors:
    """Every tensor of a random BLOOM, norms near (1, 0)."""
    rng, c = np.random.default_rng(seed), hidden_size
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (vocab_size, c)}
    norms = ["word_embeddings_layernorm", "ln_f"]
    for i in range(n_layer):
        norms += [f"h.{i}.input_layernorm", f"h.{i}.post_attention_layernorm"]
        linears = {
            "self_attention.query_key_value": (3 * c, c), "self_attention.dense": (c, c),
            "mlp.dense_h_to_4h": (4 * c, c), "mlp.dense_4h_to_h": (c, 4 * c),
        }  # fmt: skip
        for name, shape in linears.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[:1]
    shapes |= {f"{norm}.{leaf}": (c,) for norm in norms for leaf in ("weight", "bias")}
    gains = {f"{norm}.weight" for norm in norms}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05) + np.float32(
            name in gains
        )
        tensors[prefix + name] = (dtype, to_dtype(values, dtype))
    return tensors


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> the array of a safetensors dtype; BF16 cuts the low bits off and is uint16."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])


def write_safetensors(path: Path, tensors: Tensors, *, aligned: bool = True) -> Path:
    """A safetensors file: header length, header (padded so that the data is 64-byte aligned, or so
    that it is not), data."""
    header, offset = {}, 0
    for name, (dtype, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64 + (0 if aligned else 8))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def edit_manifest(pack: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a pack's manifest and seal it again with a right checksum: the forger's way."""
    from bloomq.pack import manifest_checksum

    manifest = json.loads((pack / "manifest.json").read_text())
    edit(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    (pack / "manifest.json").write_text(json.dumps(manifest))


def dequantized(pack: Path) -> dict[str, np.ndarray]:
    """Every weight of a pack as float32, vectors with their padding."""
    from bloomq.config import weight_specs

    opened = Pack.open(pack)
    weights = {}
    for spec in weight_specs(opened.config):
        if spec.is_matrix:
            weights[spec.name] = opened.matrix(spec.name).dequantize()
        for leaf in ("weight", "bias"):
            if spec.kind == "norm" or (leaf == "bias" and spec.has_bias):
                weights[f"{spec.name}.{leaf}"] = np.array(opened.array(f"{spec.name}.{leaf}"))
    return weights


def open_below(folder: Path) -> list[str]:
    """What this process has open of `folder` and below it. Not a count of all that is open: the
    garbage of other tests is closed at any instant. Linux's alone."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the handle that lists them
            found.append(os.readlink(handle))
    return [path for path in found if path.startswith(str(folder))]
