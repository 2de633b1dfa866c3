"""Tasks over whole texts: sort them, tag them, find answers in them, turn them into vectors.

Each class joins a model and a tokenizer; texts of any length run together without padding.
"""

from bloomq.pipelines.answerer import Answer, Answerer
from bloomq.pipelines.classifier import Classifier, Label
from bloomq.pipelines.embedder import Embedder
from bloomq.pipelines.tagger import Tag, Tagger

__all__ = ["Answer", "Answerer", "Classifier", "Embedder", "Label", "Tag", "Tagger"]
