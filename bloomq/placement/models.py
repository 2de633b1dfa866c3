"""The published models by name, and the schemes that a conversion would give their matrices."""

from __future__ import annotations

from collections.abc import Mapping

from bloomq.config import BloomConfig
from bloomq.errors import UsageError
from bloomq.scheme_choice import body_and_head, choose_schemes
from bloomq.schemes import Scheme

# hidden_size, n_layer, n_head; all have 250,880 tokens and were trained on 2,048.
# Source: the config.json of each at huggingface.co/bigscience.
_SIZES = {
    "560m": (1024, 24, 16),
    "1b1": (1536, 24, 16),
    "1b7": (2048, 24, 16),
    "3b": (2560, 30, 32),
    "7b1": (4096, 30, 32),
    "176b": (14336, 70, 112),
}
_SHAPES = {
    **{f"{kind}-{size}": at for kind in ("bloom", "bloomz") for size, at in _SIZES.items()},
    "bloom": _SIZES["176b"], "bloomz": _SIZES["176b"], "bloomz-7b1-mt": _SIZES["7b1"],
    "bloomz-7b1-p3": _SIZES["7b1"], "bloomz-mt": _SIZES["176b"], "bloomz-p3": _SIZES["176b"],
}  # fmt: skip
PUBLISHED = tuple(_SHAPES)

# Best first, by KL on the demo (README): what is tried where no scheme is asked for. Not int6,
# which the CUDA backend holds in bytes; nor int4 and nf4, than which nl4 of the same size is
# better: in groups of 64 it is as good as int4 in groups of 32.
BY_QUALITY = (("int8", None), ("nl4", 32), ("nl4", 64), ("nl4", 128))


def published(name: str) -> BloomConfig:
    """The config of a published model: `bloom-7b1`, `bloomz-560m`, `bigscience/bloom`.

    Raises: UsageError.
    """
    key = name.lower().removeprefix("bigscience/")
    if key not in _SHAPES:
        raise UsageError(
            f"unknown model {name!r}, expected one of {', '.join(PUBLISHED)}: for another one "
            "give its pack"
        )
    hidden_size, n_layer, n_head = _SHAPES[key]
    return BloomConfig(hidden_size=hidden_size, n_layer=n_layer, n_head=n_head)


def schemes_of(
    config: BloomConfig, scheme: str, group_size: int | None = None, head_scheme: str | None = None
) -> dict[str, Scheme]:
    """The scheme of every matrix, as `bloomq convert` with these options would choose it.

    Raises: UsageError for a scheme or a group size that cannot be.
    """
    return choose_schemes(config, *body_and_head(scheme, group_size, head_scheme))


def label_of(schemes: Mapping[str, Scheme]) -> str:
    """What the matrices are stored in, in a few words: "nl4-g64, embedding int6"."""
    bodies = sorted({scheme.label for name, scheme in schemes.items() if name.startswith("h.")})
    return f"{' and '.join(bodies)}, embedding {schemes['wte'].label}"
