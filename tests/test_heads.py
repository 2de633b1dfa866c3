"""Really fine-tuned heads keep their accuracy when they are quantized."""

from __future__ import annotations

from pathlib import Path

import heads
import numpy as np
import pytest

from bloomq import (
    BloomForQuestionAnswering,
    BloomForSequenceClassification,
    BloomForTokenClassification,
    BloomTokenizerFast,
)
from bloomq.pipelines import Answerer

# Points of accuracy that a scheme may cost. nf4 has int4's bits.
MAY_COST = {"int8": 0.5, "int6": 0.5, "int4": 1.0, "nl4": 1.0, "nf4": 1.0}
BATCH = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("heads")
    return {name: heads.assemble(name, base / name) for name in heads.NAMES}


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> BloomTokenizerFast:
    return BloomTokenizerFast.from_pretrained(folders["sequence"])


def languages(folder: Path, scheme: str | None, tokenizer: BloomTokenizerFast) -> float:
    """Percent of the held-out snippets whose language is found."""
    model = BloomForSequenceClassification.from_pretrained(folder, scheme=scheme)
    rows, right = heads.heldout("sequence"), 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="np")
        found = model(**batch).logits.argmax(axis=1)
        right += sum(
            model.config.labels[i] == row["label"] for i, row in zip(found, part, strict=True)
        )
    return 100 * right / len(rows)


def tags(folder: Path, scheme: str | None, tokenizer: BloomTokenizerFast) -> float:
    """Percent of tokens whose language is found, in texts that change it."""
    model = BloomForTokenClassification.from_pretrained(folder, scheme=scheme)
    right, total = 0, 0
    for row in heads.heldout("token"):
        expected = np.repeat([label for _, _, label in row["spans"]], row["tokens"])
        found = model([tokenizer.encode(row["text"])]).logits[0].argmax(axis=1)
        right += int((np.array(model.config.labels)[found] == expected).sum())
        total += len(expected)
    return 100 * right / total


def answers(folder: Path, scheme: str | None, tokenizer: BloomTokenizerFast) -> float:
    """Percent of questions answered with the very words."""
    model = BloomForQuestionAnswering.from_pretrained(folder, scheme=scheme)
    rows = heads.heldout("question")
    found = Answerer(model, tokenizer).answer(
        [row["question"] for row in rows], [row["context"] for row in rows], max_answer_tokens=256
    )
    exact = [best[0].text == row["answer"] for best, row in zip(found, rows, strict=True)]
    return 100 * sum(exact) / len(exact)


TASKS = {"sequence": (languages, 94.0), "token": (tags, 88.0), "question": (answers, 90.0)}


@pytest.mark.parametrize("name", TASKS)
def test_accuracy_survives_quantization(
    name: str, folders: dict[str, Path], tokenizer: BloomTokenizerFast
):
    measure, least = TASKS[name]
    whole = measure(folders[name], None, tokenizer)
    assert whole >= least  # it was trained, and is read right
    found = {scheme: measure(folders[name], scheme, tokenizer) for scheme in MAY_COST}
    print(f"{name}: as trained {whole:.1f} %, {found}")
    for scheme, accuracy in found.items():
        assert accuracy >= whole - MAY_COST[scheme], scheme
