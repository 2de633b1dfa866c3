"""The WikiText-2 table of the GPTQ paper, for real BLOOMs: ours beside what was published.

    python benchmarks/wikitext.py --checkpoint bloom-560m bloom-7b1 --text wiki.test.raw \
        [--schemes f16,int8,nl4] [--packs DIR]
    python benchmarks/wikitext.py --models PACK... --text wiki.test.raw

Protocol as IST-DASLab/gptq (datautils.py, bloom.py): the test split's lines joined by two line
ends, tokenized once, windows of 2,048 side by side without the last, shorter one; perplexity is
exp(sum over windows of (mean loss of a window x 2,048) / (windows x 2,048)). `bloomq perplexity
--protocol gptq` is that.

The text is wiki.test.raw of wikitext-2-raw-v1. A file that is not that one is named as such, and
its figures are not comparable; a model whose own sizes are none of the published gets no yardstick.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import bloomq
from bloomq.perplexity import perplexity

# wiki.test.raw of wikitext-2-raw-v1.zip.
TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
TEST_LINES, TEST_BYTES = 4358, 1_290_590
# Source: GPTQ (arXiv 2210.17323), table 4 (BLOOM, WikiText2 perplexity); sizes by hidden_size and
# layers. RTN: rounded to nearest, per row.
PUBLISHED = {
    (1024, 24): ("560m", {"fp16": 22.42, "RTN 4 bits": 25.90, "GPTQ 4 bits": 24.03}),
    (1536, 24): ("1b1", {"fp16": 17.69, "RTN 4 bits": 22.00, "GPTQ 4 bits": 19.05}),
    (2048, 24): ("1b7", {"fp16": 15.39, "RTN 4 bits": 16.97, "GPTQ 4 bits": 16.48}),
    (2560, 30): ("3b", {"fp16": 13.48, "RTN 4 bits": 14.76, "GPTQ 4 bits": 14.20}),
    (4096, 30): ("7b1", {"fp16": 11.37, "RTN 4 bits": 12.10, "GPTQ 4 bits": 11.73}),
}
# Which published figure a scheme is to be held against.
_RIVAL = {"f32": "fp16", "bf16": "fp16", "f16": "fp16", "int8": "fp16"}


@dataclass(frozen=True, slots=True)
class Row:
    """A pack's perplexity. ratio: ours over the published one that it is held against, `against`;
    1.0 is the same; None where there is none."""

    model: str
    size: str | None
    scheme: str
    bits_per_weight: float
    perplexity: float
    windows: int
    window: int
    against: str | None
    published: float | None
    ratio: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--models", type=Path, nargs="+", help="packs")
    source.add_argument("--checkpoint", type=Path, nargs="+", help="checkpoints, to be converted")
    parser.add_argument("--text", type=Path, required=True, help="wiki.test.raw")
    parser.add_argument("--schemes", default="f16,int8,nl4", help="of checkpoints, with commas")
    parser.add_argument("--packs", type=Path, help="keep the converted packs in this folder")
    parser.add_argument("--window", type=int, help="another than the paper's 2,048")
    parser.add_argument("--tokens", type=int, help="so many of the text, to try it out")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", type=Path, help="append the rows here, as JSON lines")
    args = parser.parse_args()
    try:
        data = args.text.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{args.text}: cannot be read: {error}")
    difference = other_than_the_test_split(data)
    if difference:
        print(f"warning: {args.text} is not the test split ({difference}): not comparable",
              file=sys.stderr)  # fmt: skip
    print(f"{'model':12} {'scheme':12} {'bits':>6} {'perplexity':>10}  published, and ours over it")
    try:
        with packs(args.models, args.checkpoint, args.schemes.split(","), args.packs) as found:
            for path in found:
                row = measure(path, text, args.window, args.tokens, args.threads)
                print(line(row), flush=True)
                if args.json:
                    facts = {**asdict(row), "text_sha256": sha256(data).hexdigest()}
                    with args.json.open("a") as file:
                        file.write(json.dumps(facts) + "\n")
    except bloomq.BloomqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def other_than_the_test_split(data: bytes) -> str:
    """What tells a file from wikitext-2-raw's test split; nothing of that one."""
    if sha256(data).hexdigest() == TEST_SHA256:
        return ""
    lines = data.count(b"\n")
    if (lines, len(data)) == (TEST_LINES, TEST_BYTES):
        return "as long as it, of other bytes"
    return f"{lines:,} lines and {len(data):,} bytes, expected {TEST_LINES:,} and {TEST_BYTES:,}"


@contextmanager
def packs(
    models: list[Path] | None, checkpoints: list[Path] | None, schemes: list[str],
    keep: Path | None,
) -> Iterator[Iterator[Path]]:  # fmt: skip
    """The packs to measure, each made when its turn comes, and gone behind it unless kept."""
    with tempfile.TemporaryDirectory() as folder:
        yield iter(models) if models else converted(checkpoints or [], schemes, keep, Path(folder))


def converted(
    checkpoints: list[Path], schemes: list[str], keep: Path | None, folder: Path
) -> Iterator[Path]:
    for checkpoint in checkpoints:
        for scheme in schemes:
            target = (keep or folder) / f"{checkpoint.resolve().name}-{scheme}"
            if not target.exists():
                bloomq.convert(checkpoint, target, scheme=scheme)
            yield target
            if keep is None:
                for file in target.iterdir():
                    file.unlink()
                target.rmdir()


def measure(
    path: Path, text: str, window: int | None, tokens: int | None, threads: int | None
) -> Row:
    model = bloomq.load(path, threads=threads)
    found = perplexity(model, text, protocol="gptq", window=window, most_tokens=tokens)
    scheme = model.pack.schemes["h.0.attn.qkv"].label
    size, figures = PUBLISHED.get((model.config.hidden_size, model.config.n_layer), (None, {}))
    against = _RIVAL.get(scheme, "GPTQ 4 bits") if figures else None
    published = figures.get(against) if against else None
    return Row(
        path.resolve().name, size, scheme, model.pack.bits_per_weight, found.perplexity,
        found.windows, found.window, against, published,
        None if published is None else found.perplexity / published,
    )  # fmt: skip


def line(row: Row) -> str:
    start = f"{row.model:12} {row.scheme:12} {row.bits_per_weight:6.2f} {row.perplexity:10.3f}"
    windows = f"{row.windows} windows of {row.window}"
    if row.published is None:
        return f"{start}  ({windows}; no figure was published for these sizes)"
    figures = next(f for name, f in PUBLISHED.values() if name == row.size)
    others = ", ".join(f"{name} {value}" for name, value in figures.items())
    return f"{start}  {row.size}: {others}; {row.ratio:.4f} of {row.against} ({windows})"


if __name__ == "__main__":
    sys.exit(main())
