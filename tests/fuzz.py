"""Coverage-guided fuzzing of what reads untrusted files: nothing but a typed error may come out.

    python tests/fuzz.py TARGET [--runs 1000000] [--seconds N] [--corpus DIR] [--seed N]

TARGET: manifest, safetensors, bin, megatron, flax, gguf or tokenizer. Needs the `fuzz` extra
(atheris, libFuzzer for Python). Each run writes mutated bytes in place of one file of a small whole
model, opens it as a user would, and reads the first and the last row of every tensor. A foreign
exception, a run of more than 10 seconds or 2 GB ends with exit code 77 or another one that is not
0, and libFuzzer keeps the input. Ends by printing how many runs there were.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

ROWS = 1 << 20  # a tensor of more bytes a row is not read: no seed is that wide

with atheris.instrument_imports(include=["bloomq"]):
    from bloomq.converters import megatron
    from bloomq.converters.convert import convert
    from bloomq.converters.flax import flax_tensors
    from bloomq.converters.gguf_file import read_gguf
    from bloomq.converters.safetensors_files import safetensors_tensors
    from bloomq.converters.source import SourceTensor
    from bloomq.converters.torch_file import torch_tensors

    from bloomq.errors import BloomqError
    from bloomq.pack import MANIFEST, Pack, manifest_checksum
    from bloomq.tokenizer import BloomTokenizer

SMALL: dict[str, int] = {"hidden_size": 8, "n_head": 2, "vocab_size": 16}
DEMO = Path(__file__).parent / "data" / "bloom-demo"
Parse = Callable[[bytes], None]


def touch(tensors: dict[str, SourceTensor]) -> None:
    """Read a little of each tensor."""
    for tensor in tensors.values():
        rows = tensor.shape[0] if tensor.shape else 0
        if rows and tensor.nbytes // rows <= ROWS:
            tensor.rows(0, 1)
            tensor.rows(rows - 1, rows)


def of_file(path: Path, parse: Callable[[Path], None]) -> tuple[Path, Parse]:
    """The file that is mutated, and what to do with its bytes."""

    def run(data: bytes) -> None:
        path.write_bytes(data)
        parse(path)

    return path, run


def manifest(folder: Path) -> tuple[Path, Parse]:
    convert(small_checkpoint(folder / "checkpoint"), folder / "pack", scheme="int4")
    path = folder / "pack" / MANIFEST

    def run(data: bytes) -> None:
        with suppress(ValueError, RecursionError):  # a right checksum lets mutations through
            raw = json.loads(data)
            if isinstance(raw, dict):
                raw["checksum"] = manifest_checksum(raw)
                data = json.dumps(raw).encode()
        path.write_bytes(data)
        Pack.open(path.parent)

    return path, run


def safetensors(folder: Path) -> tuple[Path, Parse]:
    path = small_checkpoint(folder) / "model.safetensors"
    return of_file(path, lambda file: touch(safetensors_tensors([file])))


def bin_(folder: Path) -> tuple[Path, Parse]:
    import torch
    from torch_files import state_of

    path = folder / "pytorch_model.bin"
    torch.save(state_of(small_checkpoint(folder / "checkpoint")), path)
    return of_file(path, lambda file: touch(torch_tensors(file)))


def megatron_(folder: Path) -> tuple[Path, Parse]:
    from torch_files import beside, layer_file, save_megatron, state_of

    checkpoint = small_checkpoint(folder / "checkpoint")
    whole = save_megatron(beside(checkpoint, folder / "megatron"), state_of(checkpoint), 1)
    path = whole / layer_file(3, 0)
    return of_file(path, lambda _: touch(dict(megatron.read_folder(whole).tensors)))


def flax(folder: Path) -> tuple[Path, Parse]:
    from flax_files import write_flax

    _, checkpoint = write_flax(folder, **SMALL)
    path = checkpoint / "flax_model.msgpack"
    return of_file(path, lambda file: touch(flax_tensors([file])))


def gguf(folder: Path) -> tuple[Path, Parse]:
    from gguf_writing import tiny, vocabulary

    made = tiny(**{**SMALL, "vocab_size": 400})
    made.metadata |= vocabulary(json.loads(small_tokenizer(folder).read_text()), 400)
    path = made.write(folder / "model.gguf")
    return of_file(path, lambda file: touch(dict(read_gguf(file).tensors)))


def tokenizer(folder: Path) -> tuple[Path, Parse]:
    path = folder / "tokenizer.json"
    shutil.copy(small_tokenizer(folder), path)

    def run(data: bytes) -> None:
        made = BloomTokenizer.from_bytes(data, "tokenizer.json")
        made.decode(made.encode("Il était une fois\n\0"))

    return path, run


TARGETS = {
    "manifest": manifest, "safetensors": safetensors, "bin": bin_, "megatron": megatron_,
    "flax": flax, "gguf": gguf, "tokenizer": tokenizer,
}  # fmt: skip


def small_checkpoint(folder: Path) -> Path:
    from conftest import write_checkpoint

    return write_checkpoint(folder, **SMALL)


def small_tokenizer(folder: Path) -> Path:
    """The demo's with 40 merges: a run should take microseconds."""
    raw = json.loads((DEMO / "tokenizer.json").read_text())
    merges = raw["model"]["merges"][:40]
    wanted = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges}
    vocab = raw["model"]["vocab"]
    kept = sorted((i, t) for t, i in vocab.items() if len(t) == 1 or t in wanted or i < 4)
    raw["model"]["vocab"] = {token: i for i, (_, token) in enumerate(kept)}
    raw["model"]["merges"] = merges
    path = folder / "small.json"
    path.write_text(json.dumps(raw))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="end earlier; 0: not")
    parser.add_argument("--corpus", type=Path, help="kept between runs (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        path, run = TARGETS[args.target](work)
        corpus = args.corpus or Path(scratch) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, corpus / "whole")
        run(path.read_bytes())  # the seed itself is good
        sys.stdout.flush()

        def once(data: bytes) -> None:
            with suppress(BloomqError):
                run(data)

        options = [
            sys.argv[0], str(corpus), f"-runs={args.runs}", f"-max_total_time={args.seconds}",
            f"-seed={args.seed}", "-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1",
            f"-max_len={4 * path.stat().st_size}", f"-artifact_prefix={os.getcwd()}/",
        ]  # fmt: skip
        atheris.Setup(options, once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
