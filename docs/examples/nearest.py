"""Which of some texts is nearest to another? Mean hidden states, compared by angle."""

import numpy as np

import bloomq

texts = [
    "def main(argv):",
    "Il était une fois une petite fille.",
    "class Parser(object):",
    "The ship sailed at dawn.",
]
query = "import os, sys"
model = bloomq.BloomModel.from_pretrained(bloomq.demo_pack())
tokenizer = bloomq.BloomTokenizerFast.from_pretrained(bloomq.demo_pack())

batch = tokenizer([query, *texts], padding=True, return_tensors="np")
hidden = model(**batch).last_hidden_state  # [B, T, C], 0 where there is padding
vectors = hidden.sum(axis=1) / np.asarray(batch["attention_mask"]).sum(axis=1, keepdims=True)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
for score, text in sorted(zip(vectors[1:] @ vectors[0], texts, strict=True), reverse=True):
    print(f"{score:6.3f} {text}")
