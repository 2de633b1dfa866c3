"""Which scheme each matrix gets, from what is asked for the body and for the head."""

from __future__ import annotations

from bloomq.config import BloomConfig, weight_specs
from bloomq.schemes import DEFAULT_GROUP, Scheme, get_scheme

DEFAULT_SCHEME = "nl4"  # in groups of 64 its KL is that of int4 in groups of 32, in fewer bits
# The embedding, which is also the head, suffers most from few bits; in int6 it loses next to
# nothing (docs/experiments.md).
_HEAD_OF = {"nl4": "int6", "int4": "int6", "nf4": "int6"}


def body_and_head(
    scheme: str, group_size: int | None, head_scheme: str | None
) -> tuple[Scheme, Scheme]:
    """Of the body's matrices and of the embedding and the head; the group size belongs to whichever
    has one to choose. head_scheme None: int6 for nl4, int4 and nf4, else as the body.

    Raises: UsageError for a scheme or a group size that cannot be.
    """
    head_scheme = _HEAD_OF.get(scheme, scheme) if head_scheme is None else head_scheme
    if not any(name in (scheme, head_scheme) for name in DEFAULT_GROUP):
        return get_scheme(scheme, group_size), get_scheme(head_scheme, group_size)
    return (
        get_scheme(scheme, group_size if scheme in DEFAULT_GROUP else None),
        get_scheme(head_scheme, group_size if head_scheme in DEFAULT_GROUP else None),
    )


def choose_schemes(config: BloomConfig, body: Scheme, head: Scheme) -> dict[str, Scheme]:
    """The scheme of every matrix: `head` for the embedding and the language model's head; a
    classifier's few rows stay as they are."""
    scheme_of = {
        "embedding": head, "head": head, "linear": body, "classifier": get_scheme("f32")
    }  # fmt: skip
    return {s.name: scheme_of[s.kind] for s in weight_specs(config) if s.is_matrix}
