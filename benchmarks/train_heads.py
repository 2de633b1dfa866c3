"""Fine-tunes a head and the last block of the demo checkpoint for each of BLOOM's classifiers.

    python benchmarks/train_heads.py --text DIR

DIR holds one file of plain text a language, `fr.txt`; the stems are the labels. The first 80 % of
each file are for training, the rest is held out. What is learnt:

sequence: the language of 40 to 120 characters.
token: the language of each token where the text goes over from one language to another.
question: a list of lines `fr: Il y avait.`, a question `fr?`; the answer is that line's text. The
question comes first and every line's text ends in its only full stop, because BLOOM is causal: a
position's logits know nothing of what follows it. The attention before the last block is trained
too: 400 steps of the last block alone gave 43 % exact answers, with that attention 85 %.

Only what changed is written, a folder a head, in the body rounded to bfloat16: tests/heads.py puts
the checkpoint together again. Accuracies are of those checkpoints, read by transformers in float32.
Held-out records are written from the --publish languages alone, whose text may be redistributed.
Needs torch, transformers, tokenizers, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tokenizers import Encoding, Tokenizer
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    logging,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from heads import BASE, HEADS, NAMES, PREFIX, Record, assemble  # noqa: E402

PAD, IGNORED = 3, -100  # the tokenizer's <pad>; cross_entropy's ignore_index
TRAIN_SHARE = 0.8  # of each file, from its start
# Public domain, CC0 or CC-BY: tests/data/heads/README.md says whose text it is.
PUBLISH = ("bn", "en", "es", "fr", "gu", "kn", "ml", "ne", "pa", "pt", "sw", "wo", "zh", "zu")
CLAUSE_ENDS = re.compile(r"[.,;:!?()\[\]…。，、；：！？।॥،؛؟۔|\"“”«»—]+")
LINES, CLAUSE = 3, 12  # of a question's context; characters of a clause at least
BATCH_TOKENS, POOL = 4096, 256  # padded tokens a step; examples sorted by length together
LAST_BLOCK = ("h.3.", "ln_f.")
Texts = dict[str, str]  # language -> text


@dataclass(frozen=True, slots=True)
class Example:
    """ids [T]; target: [label], [T labels] or [first, last token of the answer]."""

    ids: list[int]
    target: list[int]


class Task(Protocol):
    """What one head learns. A record is a line of heldout.jsonl, an example is its tokens."""

    name: str
    steps: int
    trained: tuple[str, ...]  # parts of the body by the start of their names; the head always is
    model_class: Any
    config: dict[str, Any]

    def draw(self, texts: Texts, rng: np.random.Generator) -> Record: ...
    def records(self, texts: Texts, rng: np.random.Generator) -> list[Record]: ...
    def encode(self, record: Record) -> Example: ...
    def loss(self, output: Any, target: Tensor, mask: Tensor) -> Tensor: ...
    def measure(self, model: Any, records: list[Record]) -> dict[str, float]: ...


class SequenceTask:
    """{"text", "label"}"""

    name, steps, model_class = "sequence", 400, BloomForSequenceClassification
    trained = LAST_BLOCK
    per_language = 43

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer) -> None:
        self.ids, self.tokenizer = {label: i for i, label in enumerate(labels)}, tokenizer
        self.config = label_config(labels) | {"problem_type": "single_label_classification"}

    def draw(self, texts: Texts, rng: np.random.Generator) -> Record:
        label = pick(rng, list(texts), 1)[0]
        return {"text": random_snippet(texts[label], rng, 40, 100), "label": label}

    def records(self, texts: Texts, rng: np.random.Generator) -> list[Record]:
        """As many of each language, evenly spaced; they overlap where the text is short."""
        found = []
        for label, text in texts.items():
            for start in np.linspace(0, len(text) - 140, self.per_language, dtype=np.int64):
                piece = snippet(text, int(start), int(rng.integers(40, 101)))
                found.append({"text": piece, "label": label})
        return found

    def encode(self, record: Record) -> Example:
        return Example(self.tokenizer.encode(record["text"]).ids, [self.ids[record["label"]]])

    def loss(self, output: Any, target: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.float(), target[:, 0])  # [B, labels]

    def measure(self, model: Any, records: list[Record]) -> dict[str, float]:
        """Logits of the last token; `least` is the lowest accuracy of a language."""
        hits: dict[str, list[bool]] = {record["label"]: [] for record in records}
        for record in records:
            example = self.encode(record)
            found = run(model, example.ids).logits[0].argmax().item()
            hits[record["label"]].append(found == example.target[0])
        worst = min(hits, key=lambda label: np.mean(hits[label]))
        every = np.concatenate(list(hits.values()))
        return {"accuracy": float(every.mean()), f"least, {worst}": float(np.mean(hits[worst]))}


class TokenTask:
    """{"text", "spans": [[start, end, label], ...], "tokens": [of each span, ...]}

    Spans cover the text; the space between two belongs to the second, as in the tokenizer.
    """

    name, steps, model_class = "token", 350, BloomForTokenClassification
    trained = LAST_BLOCK
    count = 300

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer) -> None:
        self.ids, self.tokenizer = {label: i for i, label in enumerate(labels)}, tokenizer
        self.config = label_config(labels)

    def draw(self, texts: Texts, rng: np.random.Generator) -> Record:
        text, spans = "", []
        for label in pick(rng, list(texts), 2):
            start = len(text)
            text += (" " if text else "") + random_snippet(texts[label], rng, 30, 60)
            spans.append([start, len(text), label])
        record = {"text": text, "spans": spans}
        return record | {"tokens": [len(self.inside(record, label)) for _, _, label in spans]}

    def inside(self, record: Record, label: str) -> list[int]:
        return [i for i, name in enumerate(self.names(record)) if name == label]

    def names(self, record: Record) -> list[str]:
        """The label of each token: of the span where it starts."""
        offsets = self.tokenizer.encode(record["text"]).offsets
        return [next(s[2] for s in record["spans"] if a < s[1]) for a, _ in offsets]

    def records(self, texts: Texts, rng: np.random.Generator) -> list[Record]:
        return [self.draw(texts, rng) for _ in range(self.count)]

    def encode(self, record: Record) -> Example:
        target = [self.ids[name] for name in self.names(record)]
        return Example(self.tokenizer.encode(record["text"]).ids, target)

    def loss(self, output: Any, target: Tensor, mask: Tensor) -> Tensor:
        logits = output.logits.float().flatten(0, 1)  # [B T, labels]
        return F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED)

    def measure(self, model: Any, records: list[Record]) -> dict[str, float]:
        hits: list[bool] = []
        for record in records:
            example = self.encode(record)
            found = run(model, example.ids).logits[0].argmax(-1)  # [T]
            hits += (found == torch.tensor(example.target)).tolist()
        return {"accuracy": float(np.mean(hits))}


class QuestionTask:
    """{"question", "context", "start", "end", "answer"}, in characters of the context.

    The model reads the question's tokens and then the context's, nothing between or around them.
    """

    name, steps, model_class = "question", 450, BloomForQuestionAnswering
    trained = (*LAST_BLOCK, "h.2.input_layernorm.", "h.2.self_attention.")
    count = 300

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer) -> None:
        self.tokenizer, self.config = tokenizer, {}
        self.clauses: dict[int, list[str]] = {}  # by the text's id: each is split once

    def draw(self, texts: Texts, rng: np.random.Generator) -> Record:
        lines, labels = [], pick(rng, list(texts), LINES)
        for label in labels:
            found = self.split(texts[label], label)
            lines.append(f"{label}: {found[rng.integers(len(found))]}.")
        wanted = int(rng.integers(LINES))
        start = sum(len(line) + 1 for line in lines[:wanted]) + len(labels[wanted]) + 2
        answer = lines[wanted][len(labels[wanted]) + 2 :]
        return {
            "question": f"{labels[wanted]}?", "context": "\n".join(lines),
            "start": start, "end": start + len(answer), "answer": answer,
        }  # fmt: skip

    def split(self, text: str, label: str) -> list[str]:
        """The first 12 to 45 characters of each clause, without punctuation that ends one."""
        if id(text) not in self.clauses:
            parts = [part.strip() for part in CLAUSE_ENDS.split(text)]
            self.clauses[id(text)] = [snippet(p, 0, 25) for p in parts if len(p) >= CLAUSE]
            if not self.clauses[id(text)]:
                sys.exit(f"error: no clause of {CLAUSE} characters in a part of {label}: add text")
        return self.clauses[id(text)]

    def records(self, texts: Texts, rng: np.random.Generator) -> list[Record]:
        return [self.draw(texts, rng) for _ in range(self.count)]

    def parts(self, record: Record) -> tuple[Encoding, Encoding]:
        encode = self.tokenizer.encode
        return encode(record["question"]), encode(record["context"])

    def encode(self, record: Record) -> Example:
        question, context = self.parts(record)
        inside = [
            i for i, (start, end) in enumerate(context.offsets, len(question))
            if end > record["start"] and start < record["end"]
        ]  # fmt: skip
        return Example(question.ids + context.ids, [inside[0], inside[-1]])

    def loss(self, output: Any, target: Tensor, mask: Tensor) -> Tensor:
        both = torch.stack([output.start_logits, output.end_logits], 1).float()  # [B, 2, T]
        both = both.masked_fill(~mask[:, None], -torch.inf)
        return F.cross_entropy(both.flatten(0, 1), target.flatten())

    def measure(self, model: Any, records: list[Record]) -> dict[str, float]:
        """Exact spans, and F1 over the characters of both spans: words would not do for zh."""
        exact, f1 = [], []
        for record in records:
            start, end = self.answer(model, record)
            common = max(0, min(end, record["end"]) - max(start, record["start"]))
            f1.append(2 * common / (end - start + record["end"] - record["start"]))
            exact.append((start, end) == (record["start"], record["end"]))
        return {"exact match": float(np.mean(exact)), "F1": float(np.mean(f1))}

    def answer(self, model: Any, record: Record) -> tuple[int, int]:
        """Start and end, in characters of the context, of the highest start + end logit."""
        question, context = self.parts(record)
        output = run(model, question.ids + context.ids)
        skip = len(question)
        start, end = output.start_logits[0, skip:], output.end_logits[0, skip:]  # [T]
        first, last = divmod(int((start[:, None] + end).triu().argmax()), len(end))
        begin, stop = context.offsets[first][0], context.offsets[last][1]
        piece = record["context"][begin:stop]
        return begin + len(piece) - len(piece.lstrip()), begin + len(piece.rstrip())


def label_config(labels: Sequence[str]) -> dict[str, Any]:
    ids = {label: i for i, label in enumerate(labels)}
    return {"id2label": {str(i): label for label, i in ids.items()}, "label2id": ids}


def pick(rng: np.random.Generator, items: list[str], count: int) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))[:count]]


def random_snippet(text: str, rng: np.random.Generator, low: int, high: int) -> str:
    """low to high + 20 characters from anywhere in the text."""
    length = int(rng.integers(low, high + 1))
    return snippet(text, int(rng.integers(len(text) - length - 40)), length)


def snippet(text: str, start: int, length: int) -> str:
    """Whole words where spaces part them: either end moves on to a space if within 20."""
    if start and text[start - 1] != " ":
        space = text.find(" ", start, start + 20)
        start = space + 1 if space >= 0 else start
    end = min(start + length, len(text))
    space = text.find(" ", end, end + 20)
    return text[start : space if space >= 0 else end if end + 20 < len(text) else len(text)].strip()


def read_texts(folder: Path) -> tuple[Texts, Texts]:
    """The training and the held-out part of each *.txt, all white space made single spaces."""
    train, held = {}, {}
    for path in sorted(folder.glob("*.txt")):
        text = " ".join(path.read_text(encoding="utf-8").split())
        cut = text.find(" ", int(TRAIN_SHARE * len(text)))
        if len(text) - cut < 400:
            sys.exit(f"error: {path} has {len(text)} characters, expected 2,000: add text")
        train[path.stem], held[path.stem] = text[:cut], text[cut + 1 :]
    if len(train) < LINES:
        sys.exit(f"error: {len(train)} *.txt in {folder}, expected {LINES} or more languages")
    return train, held


def batches(task: Task, texts: Texts, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """-> ids [B, T], mask [B, T], target [B, 1 | T | 2] for ever, of about equally long rows."""
    rng = np.random.default_rng(seed)
    while True:
        pool = [task.encode(task.draw(texts, rng)) for _ in range(POOL)]
        pool.sort(key=lambda example: len(example.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.ids) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        for i in rng.permutation(len(groups)):
            ids = padded([example.ids for example in groups[i]], PAD)
            target = padded([example.target for example in groups[i]], IGNORED)
            lengths = torch.tensor([len(example.ids) for example in groups[i]])
            yield ids, torch.arange(ids.shape[1]) < lengths[:, None], target


def padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def build_model(task: Task) -> Any:
    """float32, all frozen but the new head and the parts of the body that the task trains."""
    raw = json.loads((BASE / "config.json").read_text())
    config = BloomConfig(**raw | task.config)
    config.use_cache = False
    model = task.model_class(config)
    model.transformer.load_state_dict(load_file(BASE / "model.safetensors"))
    body = tuple(PREFIX + part for part in task.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(body) or not name.startswith(PREFIX)
    return model.float()


def train(task: Task, model: Any, texts: Texts, lr: float, seed: int) -> None:
    """Matrix products in bfloat16 where the processor multiplies it; weights stay float32."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, task.steps, pct_start=0.05)
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    model.train()
    start, mean = time.perf_counter(), 0.0
    for step, (ids, mask, target) in enumerate(batches(task, texts, seed), 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            output = model(input_ids=ids, attention_mask=mask)
        loss = task.loss(output, target, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
        mean = loss.item() if step == 1 else 0.95 * mean + 0.05 * loss.item()
        if step % 100 == 0 or step == task.steps:
            seconds = time.perf_counter() - start
            print(f"{task.name}: step {step} loss {mean:.3f}, {seconds:.0f} s", flush=True)
        if step == task.steps:
            return


def save_changed(task: Task, model: Any, folder: Path) -> None:
    """config.json and the trained tensors: the body's in bfloat16, the head's in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = {
        name: (p.bfloat16() if name.startswith(PREFIX) else p).contiguous()
        for name, p in trained.items()
    }
    (folder / "changed.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    raw = json.loads((BASE / "config.json").read_text())
    raw |= {"architectures": [task.model_class.__name__], "torch_dtype": "float32"} | task.config
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def load(task: Task, folder: Path) -> Any:
    """The checkpoint as transformers reads it in float32; every tensor must be there, no more."""
    model, info = task.model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: names for key, names in info.items() if names}
    if wrong:
        sys.exit(f"error: {folder} does not fit {task.model_class.__name__}: {wrong}")
    return model.eval()


@torch.no_grad()
def run(model: Any, ids: list[int]) -> Any:
    return model(input_ids=torch.tensor([ids]))


def check_reload(task: Task, model: Any, folder: Path, record: Record) -> None:
    """Loads once more and exits unless the logits are the same bits."""
    ids = task.encode(record).ids
    first, second = run(model, ids), run(load(task, folder), ids)
    for key in first:
        if key.endswith("logits") and not torch.equal(first[key], second[key]):
            sys.exit(f"error: {folder} gives other logits when it is loaded twice")


def write_records(path: Path, records: list[Record]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def make(task: Task, train_texts: Texts, held: Texts, args: argparse.Namespace) -> None:
    """Trains, writes and measures one head."""
    torch.manual_seed(args.seed)
    folder = args.out / task.name
    start = time.perf_counter()
    model = build_model(task)
    train(task, model, train_texts, args.lr, args.seed)
    save_changed(task, model, folder)
    minutes = (time.perf_counter() - start) / 60
    public = {label: text for label, text in held.items() if label in args.publish}
    published = task.records(public, np.random.default_rng(args.seed + 1))
    write_records(folder / "heldout.jsonl", published)
    with tempfile.TemporaryDirectory() as name:
        whole = assemble(task.name, Path(name), heads=args.out)
        model = load(task, whole)
        check_reload(task, model, whole, published[0])
        every = task.records(held, np.random.default_rng(args.seed + 1))
        for what, records in ((f"all {len(held)} languages", every), ("heldout.jsonl", published)):
            found = ", ".join(f"{k} {v:.1%}" for k, v in task.measure(model, records).items())
            print(f"{task.name}: {what}, {len(records)} records: {found}", flush=True)
    print(f"{task.name}: trained in {minutes:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=HEADS, metavar="DIR")
    parser.add_argument("--heads", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--publish", nargs="+", default=PUBLISH, metavar="LANGUAGE")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    train_texts, held = read_texts(args.text)
    if missing := set(args.publish) - set(held):
        parser.error(f"no text of {', '.join(sorted(missing))} in {args.text}: change --publish")
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    for kind in (SequenceTask, TokenTask, QuestionTask):
        if kind.name in args.heads:
            make(kind(list(held), tokenizer), train_texts, held, args)


if __name__ == "__main__":
    main()
