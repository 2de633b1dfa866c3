"""Write a checkpoint of random weights in the shape of a published BLOOM, shard by shard.

    python benchmarks/make_checkpoint.py bloom-7b1 /tmp/bloom-7b1 [--labels 8]

Hugging Face format, bf16, the shapes and key names of the real one; for measuring speed and memory,
never quality. The weights are drawn like BLOOM's (normal, standard deviation 0.02 with a few larger
columns), so quantizers meet realistic groups. Peak memory is one block of rows. No tokenizer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from bloomq.converters.names import expected_tensors, huggingface_name

from bloomq.config import Architecture, BloomConfig, weight_specs
from bloomq.placement.models import PUBLISHED, published
from bloomq.schemes import f32_to_bf16

SHARD_BYTES = 5 << 30
BLOCK_VALUES = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=PUBLISHED)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model has")
    parser.add_argument("--labels", type=int, help="a sequence classifier of so many labels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = published(args.model)
    if args.layers:
        config = replace(config, n_layer=args.layers)
    if args.labels:
        labels = tuple(f"LABEL_{i}" for i in range(args.labels))
        kind: Architecture = "BloomForSequenceClassification"
        config = replace(config, architecture=kind, labels=labels, pad_token_id=3)
    args.out.mkdir(parents=True)
    rng = np.random.default_rng(args.seed)
    shards = plan(config)
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(args.out / file, names, config, rng)
        index.update({huggingface_name(name): file for name in names})
        print(f"{file}: {(args.out / file).stat().st_size / 1e9:.2f} GB")
    whole = {"metadata": {}, "weight_map": index}  # transformers wants both
    (args.out / "model.safetensors.index.json").write_text(json.dumps(whole))
    raw = {
        **config.to_dict(), "model_type": "bloom", "torch_dtype": "bfloat16",
        "id2label": {str(i): label for i, label in config.id2label.items()},
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(raw, indent=1))


def plan(config: BloomConfig) -> list[list[str]]:
    """Tensor names of each shard: a new one after SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in expected_tensors(config).items():
        nbytes = 2 * int(np.prod(shape))
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def write_shard(
    path: Path, names: list[str], config: BloomConfig, rng: np.random.Generator
) -> None:
    shapes = expected_tensors(config)
    entries, offset = {}, 0
    for name in names:
        end = offset + 2 * int(np.prod(shapes[name]))
        foreign = huggingface_name(name)
        entries[foreign] = {
            "dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    block = random_block(rng)
    norms = {f"{s.name}.weight" for s in weight_specs(config) if s.kind == "norm"}
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            left = int(np.prod(shapes[name]))
            gain = np.float32(1 if name in norms else 0)
            while left:
                count = min(left, BLOCK_VALUES)
                shift = int(rng.integers(0, BLOCK_VALUES))  # the same draws, at another place
                values = np.roll(block, shift)[:count] + gain
                file.write(f32_to_bf16(values).tobytes())
                left -= count


def random_block(rng: np.random.Generator) -> np.ndarray:
    block = rng.standard_normal(BLOCK_VALUES, np.float32) * np.float32(0.02)
    large = rng.integers(0, BLOCK_VALUES, BLOCK_VALUES // 1000)
    block[large] *= np.float32(6)
    return block


if __name__ == "__main__":
    main()
