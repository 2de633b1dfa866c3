"""Writes groups.json and contrastive.json: what transformers 4.49 finds on the demo checkpoint.

    python -m venv old && old/bin/pip install "transformers==4.49.*" torch
    old/bin/python tests/data/search/make.py

Transformers 5 has neither group beam search nor contrastive search. Texts are cut behind their end,
which transformers fills up with padding.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parent
DEMO = HERE.parent / "bloom-demo"
PROMPTS = ("Once upon a time", "def main(", "Il était une fois")
EOS = 2
NEW_TOKENS = 12


def main() -> None:
    torch.set_num_threads(1)
    model = transformers.BloomForCausalLM.from_pretrained(DEMO, torch_dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    write("groups.json", [one for ids in prompts for one in groups(model, ids)])
    write("contrastive.json", [one for ids in prompts for one in contrastive(model, ids)])


def groups(model: Any, prompt: list[int]) -> list[dict[str, Any]]:
    """Group beam search, every way that a search may end; the second lot of ends are tokens that
    the text really has, late in it."""
    text = generated(model, prompt, do_sample=False)[0][0]
    late = list(dict.fromkeys(text))[-2:]
    cases = []
    for (beams, count), early, penalty, ends in product(
        ((2, 2), (4, 2), (6, 3)), (False, True, "never"), (-1.0, 1.0),
        ([EOS], [EOS, *late]),
    ):  # fmt: skip
        options = {
            "num_beams": beams, "num_beam_groups": count, "diversity_penalty": 0.7,
            "early_stopping": early, "length_penalty": penalty, "num_return_sequences": beams,
        }  # fmt: skip
        ids, scores = generated(model, prompt, eos_token_id=ends, do_sample=False, **options)
        rounded = [round(score, 6) for score in scores]
        cases.append({"prompt": prompt, "ends": ends, **options, "ids": ids, "scores": rounded})
    return cases


def contrastive(model: Any, prompt: list[int]) -> list[dict[str, Any]]:
    cases = []
    for alpha, top_k, penalty in product((0.2, 0.6, 1.0), (2, 4, 9), (1.0, 1.3)):
        options = {"penalty_alpha": alpha, "top_k": top_k, "repetition_penalty": penalty}
        ids, _ = generated(model, prompt, **options)
        cases.append({"prompt": prompt, **options, "ids": ids[0]})
    return cases


def generated(model: Any, prompt: list[int], **options: Any) -> tuple[list[list[int]], list[float]]:
    """New tokens of each sequence, up to its end, and the sequences' scores where there are any."""
    ends = options.get("eos_token_id", [EOS])
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
    sequences = []
    for row in found.sequences[:, len(prompt) :].tolist():
        at = next((i for i, token in enumerate(row) if token in ends), len(row))
        sequences.append(row[: at + 1])
    scores = found.get("sequences_scores")
    return sequences, [] if scores is None else scores.tolist()


def write(name: str, cases: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    release = f"transformers {transformers.__version__}"
    (HERE / name).write_text(f'{{"release":"{release}","cases":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
