"""Which scheme each matrix gets, from what is asked for the body and for the head."""

from __future__ import annotations

from bloomq.config import BloomConfig, weight_specs
from bloomq.schemes import Scheme, get_scheme

# The embedding, which is also the head, suffers most from few bits; in int6 it loses next to
# nothing (docs/experiments.md).
_HEAD_OF = {"int4": "int6", "nf4": "int6"}


def body_and_head(
    scheme: str, group_size: int | None, head_scheme: str | None
) -> tuple[Scheme, Scheme]:
    """Of the body's matrices and of the embedding and the head; the group size belongs to whichever
    is int4. head_scheme None: int6 for int4 and nf4, else as the body.

    Raises: UsageError for a scheme or a group size that cannot be.
    """
    head_scheme = _HEAD_OF.get(scheme, scheme) if head_scheme is None else head_scheme
    if "int4" not in (scheme, head_scheme):
        return get_scheme(scheme, group_size), get_scheme(head_scheme, group_size)
    return (
        get_scheme(scheme, group_size if scheme == "int4" else None),
        get_scheme(head_scheme, group_size if head_scheme == "int4" else None),
    )


def choose_schemes(config: BloomConfig, body: Scheme, head: Scheme) -> dict[str, Scheme]:
    """The scheme of every matrix: `head` for the embedding and the language model's head; a
    classifier's few rows stay as they are."""
    scheme_of = {
        "embedding": head, "head": head, "linear": body, "classifier": get_scheme("f32")
    }  # fmt: skip
    return {s.name: scheme_of[s.kind] for s in weight_specs(config) if s.is_matrix}
