"""The classes of transformers' BLOOM page, over quantized weights.

Names, arguments and results are those of transformers 5; arrays are NumPy's. What differs is said
in docs/coming-from-transformers.md: masked positions give 0, and nothing is ever trained.
"""

from bloomq.modeling.base import BloomModel, BloomPreTrainedModel
from bloomq.modeling.causal_lm import BloomForCausalLM
from bloomq.modeling.classification import (
    BloomForSequenceClassification,
    BloomForTokenClassification,
)
from bloomq.modeling.question_answering import BloomForQuestionAnswering

__all__ = [
    "BloomForCausalLM",
    "BloomForQuestionAnswering",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomModel",
    "BloomPreTrainedModel",
]
