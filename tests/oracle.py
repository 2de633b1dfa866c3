"""Random checkpoints as transformers writes them, and its models beside ours.

Where torch or transformers is missing, whoever imports this is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bloomq

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

CLASSES = (
    "BloomModel",
    "BloomForCausalLM",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomForQuestionAnswering",
)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A random checkpoint of one class. slow_tp: over how many ranks transformers' slow_but_exact
    path sums (1: not taken); it forgets two biases there, so these are then 0."""

    kind: str = "BloomForCausalLM"
    n_head: int = 4
    head_dim: int = 8
    n_layer: int = 2
    vocab_size: int = 97
    post_norm: bool = False
    labels: int = 3
    problem: str | None = None
    pad: int | None = 3
    tied: bool = True
    slow_tp: int = 1
    dtype: str = "float32"
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


def saved(base: Path, spec: Spec) -> Path:
    """The checkpoint's folder under `base`, written once by transformers' save_pretrained."""
    folder = base / spec.name
    if folder.exists():
        return folder
    config = transformers.BloomConfig(
        hidden_size=spec.n_head * spec.head_dim, n_layer=spec.n_layer, n_head=spec.n_head,
        vocab_size=spec.vocab_size, num_labels=spec.labels, problem_type=spec.problem,
        apply_residual_connection_post_layernorm=spec.post_norm, pad_token_id=spec.pad,
        tie_word_embeddings=spec.tied,
        slow_but_exact=spec.slow_tp > 1, pretraining_tp=spec.slow_tp, hidden_dropout=0.1,
        attention_dropout=0.1,
    )  # fmt: skip
    model = getattr(transformers, spec.kind)(config)
    randomise(model, spec)
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder)
    return folder


def randomise(model: Any, spec: Spec) -> None:
    """Biases and gains far from 0 and 1, so that each matters."""
    draw = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 2:
                wide = 1.0 if "word_embeddings" in name else parameter.shape[1] ** -0.5
                parameter.copy_(noise * wide)
            elif spec.slow_tp > 1 and name.endswith(("dense.bias", "dense_4h_to_h.bias")):
                parameter.zero_()
            else:
                gain = name.endswith("weight")
                parameter.copy_(float(gain) + 0.2 * noise)


@dataclass
class Models:
    """Our models and transformers' of random checkpoints, each made once."""

    base: Path
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def ours(self, spec: Spec, scheme: str | None = "f32", backend: str = "numba") -> Any:
        """From the checkpoint's folder; scheme None: as its tensors are."""
        key = (spec, scheme, backend)
        if key not in self._made:
            self._made[key] = getattr(bloomq, spec.kind).from_pretrained(
                saved(self.base, spec), scheme=scheme, backend=backend,
                save_pack=self.base / f"pack-{spec.name}-{scheme}",
            )  # fmt: skip
        return self._made[key]

    def theirs(self, spec: Spec, of: Any = None) -> Any:
        """In float32. of: a model of ours, whose dequantized weights it then has."""
        scheme = None if of is None else of.pack.path
        key = (spec, "transformers", scheme)
        if key not in self._made:
            folder = saved(self.base, spec)
            model = getattr(transformers, spec.kind).from_pretrained(folder, dtype=torch.float32)
            if of is not None:
                dequantize(model, of)
            self._made[key] = model.eval()
        return self._made[key]


def dequantize(theirs: Any, ours: Any) -> None:
    """Give transformers' model the matrices that ours computes with."""
    from bloomq.converters.names import huggingface_name

    state = theirs.state_dict()
    for name in ours.pack.schemes:
        key = huggingface_name(f"{name}.weight")
        found = [k for k in (key, f"transformer.{key}") if k in state]
        state[found[0]].copy_(torch.tensor(ours.pack.matrix(name).dequantize()))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Matrices this small are slower on two, above all beside Numba's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ask(theirs: Any, *args: Any, **arguments: Any) -> Any:
    """Call transformers' model with arrays."""
    with torch.no_grad():
        return theirs(*map(tensor, args), **{k: tensor(v) for k, v in arguments.items()})


def tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    whole = value.dtype.kind in "biu"
    return torch.tensor(value.astype(np.int64) if whole else value)


def off(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    expected = np.asarray(expected)
    assert np.shape(found) == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    wrong = np.square(found.astype(np.float64) - expected).sum()
    return float(wrong / np.square(expected.astype(np.float64)).sum())


def ids_of(spec: Spec, *shape: int, seed: int = 5) -> np.ndarray:
    """Random ids, none of them padding."""
    rng = np.random.default_rng(seed)
    return rng.integers(4, spec.vocab_size, shape)


def padded(where: str, batch: int, length: int) -> np.ndarray:
    """A mask: rows of different length, filled up on the left, on the right or in between."""
    mask = np.ones((batch, length), np.int64)
    for row in range(1, batch):
        gone = min(3 * row, length - 1)
        if where == "left":
            mask[row, :gone] = 0
        elif where == "right":
            mask[row, length - gone :] = 0
        elif where == "middle":
            mask[row, 1 : 1 + gone] = 0
    return mask
