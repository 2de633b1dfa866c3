"""How surprising is each token of a text? Its bits under the model, and the perplexity of all."""

import numpy as np

import bloomq

text = "It is a truth universally acknowledged, that a single man is a teapot."
model = bloomq.BloomForCausalLM.from_pretrained(bloomq.demo_pack())
tokenizer = bloomq.BloomTokenizerFast.from_pretrained(bloomq.demo_pack())

ids = np.array([tokenizer.encode(text)])
out = model(ids, labels=ids)
scores = out.logits[0, :-1].astype(np.float64)  # [T - 1, V], of the tokens from the second on
logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
for token, logprob in zip(ids[0, 1:], logprobs[np.arange(len(scores)), ids[0, 1:]], strict=True):
    bits = -logprob / np.log(2)
    print(f"{bits:5.1f} bits {'#' * round(bits)} {tokenizer.decode(token)!r}")
print(f"perplexity {np.exp(out.loss):.0f}")
