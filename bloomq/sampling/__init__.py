"""From the logits of one row to the next token: options checked once, then a callable per
sequence.

    logits ─▶ edited (by the text so far) ─▶ constraint ─▶ filters ─▶ draw ─▶ token
"""

from bloomq.sampling.logits import Logits
from bloomq.sampling.options import ORDER, Sampling
from bloomq.sampling.processors import edited
from bloomq.sampling.sampler import Constraint, Sampler, generator

__all__ = [
    "ORDER", "Constraint", "Logits", "Sampler", "Sampling", "edited", "generator",
]  # fmt: skip
