"""bloomq: BLOOM language models, quantized, on a laptop CPU.

    import bloomq
    model = bloomq.load("pack")
    print(model.generate("Il était une fois").text)

Importing this module imports nothing heavy: names are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Answerer": "pipelines.answerer",
    "BeamOptions": "search",
    "BloomConfig": "config",
    "BloomForCausalLM": "modeling",
    "BloomForQuestionAnswering": "modeling",
    "BloomForSequenceClassification": "modeling",
    "BloomForTokenClassification": "modeling",
    "BloomModel": "modeling",
    "BloomPreTrainedModel": "modeling",
    "BloomTokenizer": "tokenizer",
    "BloomTokenizerFast": "tokenizer",
    "Classifier": "pipelines.classifier",
    "ContrastOptions": "search",
    "Conversation": "chat.conversation",
    "Embedder": "pipelines.embedder",
    "Exploration": "exploration",
    "FlaxBloomForCausalLM": "flax",
    "FlaxBloomModel": "flax",
    "Generation": "generation",
    "Grammar": "constraints",
    "JsonSchema": "constraints",
    "LanguageModel": "language_model",
    "Pack": "pack",
    "Perplexity": "perplexity",
    "Regex": "constraints",
    "Sampling": "sampling",
    "Scores": "scoring",
    "Tagger": "pipelines.tagger",
    "Window": "generation",
    "convert": "converters.convert",
    "demo_pack": "loading",
    "explore": "exploration",
    "export": "converters.export",
    "load": "loading",
    **dict.fromkeys(
        (
            "BackendError", "BloomqError", "CapacityError", "CheckpointError", "ConfigError",
            "InputNotFound", "NumericError", "OutputError", "PackError", "PromptCacheError",
            "TokenizerError", "UsageError",
        ),
        "errors",
    ),
}  # fmt: skip
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from bloomq.chat.conversation import Conversation as Conversation
    from bloomq.config import BloomConfig as BloomConfig
    from bloomq.constraints import Grammar as Grammar
    from bloomq.constraints import JsonSchema as JsonSchema
    from bloomq.constraints import Regex as Regex
    from bloomq.converters.convert import convert as convert
    from bloomq.converters.export import export as export
    from bloomq.exploration import Exploration as Exploration
    from bloomq.exploration import explore as explore
    from bloomq.flax import FlaxBloomForCausalLM as FlaxBloomForCausalLM
    from bloomq.flax import FlaxBloomModel as FlaxBloomModel
    from bloomq.generation import Generation as Generation
    from bloomq.generation import Window as Window
    from bloomq.language_model import LanguageModel as LanguageModel
    from bloomq.loading import demo_pack as demo_pack
    from bloomq.loading import load as load
    from bloomq.modeling import BloomForCausalLM as BloomForCausalLM
    from bloomq.modeling import BloomForQuestionAnswering as BloomForQuestionAnswering
    from bloomq.modeling import BloomForSequenceClassification as BloomForSequenceClassification
    from bloomq.modeling import BloomForTokenClassification as BloomForTokenClassification
    from bloomq.modeling import BloomModel as BloomModel
    from bloomq.modeling import BloomPreTrainedModel as BloomPreTrainedModel
    from bloomq.pack import Pack as Pack
    from bloomq.perplexity import Perplexity as Perplexity
    from bloomq.pipelines.answerer import Answerer as Answerer
    from bloomq.pipelines.classifier import Classifier as Classifier
    from bloomq.pipelines.embedder import Embedder as Embedder
    from bloomq.pipelines.tagger import Tagger as Tagger
    from bloomq.sampling import Sampling as Sampling
    from bloomq.scoring import Scores as Scores
    from bloomq.search import BeamOptions as BeamOptions
    from bloomq.search import ContrastOptions as ContrastOptions
    from bloomq.tokenizer import BloomTokenizer as BloomTokenizer
    from bloomq.tokenizer import BloomTokenizerFast as BloomTokenizerFast


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bloomq' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bloomq.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
