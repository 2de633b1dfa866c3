"""Which tokens of a prompt speak for what comes next? Gradient times input, by JAX."""

import jax
import jax.numpy as jnp
import numpy as np

import bloomq

text = "def __init__(self, name):\n        self.name ="
model = bloomq.FlaxBloomForCausalLM.from_pretrained(bloomq.demo_pack())
tokenizer = bloomq.BloomTokenizerFast.from_pretrained(bloomq.demo_pack())

ids = np.array([tokenizer.encode(text)])
embed = bloomq.BloomModel.from_pretrained(bloomq.demo_pack()).get_input_embeddings()
vectors = jnp.asarray(embed(ids))  # [1, T, C]
best = int(model(ids).logits[0, -1].argmax())


def score(vectors):  # of the likeliest next token
    return jax.nn.log_softmax(model.apply(model.params, inputs_embeds=vectors).logits[0, -1])[best]


saliency = np.abs((jax.grad(score)(vectors) * vectors).sum(axis=-1))[0]
print(f"next: {tokenizer.decode(best)!r}")
for token, weight in zip(ids[0], saliency / saliency.max(), strict=True):
    print(f"{'#' * round(30 * float(weight)):30} {tokenizer.decode(token)!r}")
