"""Runs where llama-cpp-python is installed: ids of texts, and what llama.cpp continues with.

    llama_cpp_child.py MODEL.gguf < {"texts": [...], "prompts": [[ids], ...], "count": 200}

Prints {"ids", "texts", "greedy": [{"ids", "gaps", "first"}]}: the texts' ids, and their pieces
joined; of each prompt the greedy ids, at each how far the best logit lies above the second, and the
logits of the first.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

import llama_cpp as api
import numpy as np


def load(path: str) -> tuple[Any, Any, Any]:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 1024, 1024
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = 0  # float32
    return model, api.llama_init_from_model(model, params), api.llama_model_get_vocab(model)


def tokenize(vocab: Any, text: str) -> list[int]:
    data = text.encode()
    ids = (api.llama_token * (len(data) + 8))()
    count = api.llama_tokenize(vocab, data, len(data), ids, len(ids), False, True)
    return list(ids[:count])


def pieces(vocab: Any, ids: list[int]) -> str:
    """The text of ids, each one's bytes after the other's, special ones by name."""
    found = b""
    for i in ids:
        buffer = ctypes.create_string_buffer(256)
        count = api.llama_token_to_piece(vocab, i, buffer, 256, 0, True)
        found += buffer.raw[:count]
    return found.decode(errors="replace")


def step(context: Any, ids: list[int], size: int) -> np.ndarray:
    tokens = (api.llama_token * len(ids))(*ids)
    if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
        raise SystemExit("llama_decode failed")
    return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (size,)).copy()


def greedy(context: Any, prompt: list[int], count: int, size: int) -> dict[str, Any]:
    api.llama_memory_clear(api.llama_get_memory(context), True)
    ids: list[int] = []
    gaps: list[float] = []
    logits = first = step(context, prompt, size)
    for _ in range(count):
        second, best = np.sort(logits)[-2:]
        ids.append(int(logits.argmax()))
        gaps.append(float(best - second))
        logits = step(context, ids[-1:], size)
    return {"ids": ids, "gaps": gaps, "first": first.tolist()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints
    asked = json.load(sys.stdin)
    _, context, vocab = load(sys.argv[1])
    size = api.llama_vocab_n_tokens(vocab)
    ids = [tokenize(vocab, text) for text in asked.get("texts", [])]
    found = [greedy(context, p, asked.get("count", 200), size) for p in asked.get("prompts", [])]
    json.dump({"ids": ids, "texts": [pieces(vocab, i) for i in ids], "greedy": found}, answers)
    answers.close()


if __name__ == "__main__":
    main()
