"""A plan as lines for people and as facts for machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bloomq.config import weight_specs
from bloomq.placement.advice import largest_batch, largest_context, remedies
from bloomq.placement.models import label_of
from bloomq.placement.request import Placement, Request, Share
from bloomq.placement.speed import step_s
from bloomq.taken_folder import size_text


@dataclass(frozen=True, slots=True)
class Report:
    """A placement and what can be said of it. tokens_per_s: at most, of one row with an empty
    cache, and of all rows with a full one, None where a bandwidth is not known; batch_limit: rows
    at this context, context_limit: tokens at this batch; ways: to make it fit."""

    name: str
    request: Request
    placement: Placement
    tokens_per_s: tuple[float, float] | None
    batch_limit: int
    context_limit: int
    ways: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, request: Request, placement: Placement, link_gb_s: float | None = None
    ) -> Report:
        """Everything about a placement of a model of this name."""
        speeds = None
        if placement.fits:
            speeds = _speeds(request, placement, link_gb_s)
        ways = () if placement.fits else tuple(remedies(request))
        limits = largest_batch(request), largest_context(request)
        return cls(name, request, placement, speeds, *limits, ways)

    def lines(self) -> list[str]:
        """All of it, for a person."""
        config, placement = self.request.config, self.placement
        layer = self.request.layer_cache[self.request.devices[0].kind].nbytes
        cached = layer * config.n_layer * self.request.ranks
        token_kb = cached / (placement.batch * placement.context) / 1e3
        total = self._total_weights_bytes
        return [
            f"model    {self.name}: {_parameters(self.request) / 1e9:.2f} billion parameters, "
            f"{config.n_layer} layers of {config.hidden_size}, {config.n_head} heads",
            f"weights  {label_of(self.request.schemes)}: {size_text(total)}",
            f"cache    {placement.batch} x {placement.context} tokens, {placement.cache_dtype}, "
            f"{token_kb:.1f} kB a token: {size_text(cached)}",
            f"split    {_split_words(placement)}",
            "",
            *(_table(placement) if placement.shares else ["no device has room for a layer"]),
            "",
            *self._verdict(),
        ]

    def _verdict(self) -> list[str]:
        placement = self.placement
        if not placement.fits:
            return [
                f"DOES NOT FIT: {size_text(placement.missing_bytes)} have no place",
                *(f"would fit  {way}" for way in self.ways),
                *self._limits(),
            ]
        if self.tokens_per_s is None:
            speed = "speed    not known: say how fast memory is read, as in 24GB@900"
        else:
            one, all_rows = self.tokens_per_s
            speed = (
                f"speed    at most {one:.1f} tokens/s of one text with an empty cache, "
                f"{all_rows:.1f} of {placement.batch} with a full one"
            )
        return ["fits", speed, *self._limits()]

    def _limits(self) -> list[str]:
        placement = self.placement
        batch = self.batch_limit or "none"
        context = self.context_limit or "none"
        return [
            f"limits   batch {batch} of {placement.context} tokens; context {context} with batch "
            f"{placement.batch}"
        ]

    @property
    def _total_weights_bytes(self) -> int:
        at = next(iter(self.request.sizes.values()))
        whole = at.before[-1].nbytes + at.head.nbytes + at.embedding.nbytes
        return whole * self.request.ranks

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        request, placement = self.request, self.placement
        return {
            "model": self.name, "parameters": _parameters(request),
            "schemes": label_of(request.schemes), "split": placement.split,
            "context": placement.context, "batch": placement.batch,
            "cache_dtype": placement.cache_dtype, "fits": placement.fits,
            "missing_bytes": placement.missing_bytes, "bytes": placement.nbytes,
            "weights_bytes": placement.weights_bytes, "cache_bytes": placement.cache_bytes,
            "work_bytes": placement.work_bytes,
            "devices": [_share_facts(share) for share in placement.shares],
            "tokens_per_s_at_most": None if self.tokens_per_s is None else {
                "one_row_empty_cache": round(self.tokens_per_s[0], 2),
                "all_rows_full_cache": round(self.tokens_per_s[1], 2),
            },
            "largest_batch": self.batch_limit, "largest_context": self.context_limit,
            "would_fit": list(self.ways),
        }  # fmt: skip


def _speeds(
    request: Request, placement: Placement, link_gb_s: float | None
) -> tuple[float, float] | None:
    config, batch = request.config, placement.batch
    one = step_s(placement, config, batch=1, tokens=0, link_gb_s=link_gb_s)
    full = step_s(placement, config, batch=batch, tokens=placement.context, link_gb_s=link_gb_s)
    return None if one is None or full is None else (1 / one, batch / full)


def _parameters(request: Request) -> int:
    specs = weight_specs(request.config)
    return sum(math.prod(s.shape) + (s.shape[0] if s.has_bias else 0) for s in specs)


def _split_words(placement: Placement) -> str:
    count = len(placement.shares)
    if placement.split == "tensor":
        return f"tensor parallel: every layer over {count} devices"
    if count <= 1:
        return "none: one device" + " has all" * placement.fits
    return f"layers over {count} devices, the embedding read in host memory"


def _table(placement: Placement) -> list[str]:
    """A row for each device, and their sum."""
    head = ("device", "is", "GB/s", "layers", "weights", "cache", "work", "in all", "of", "full")
    rows: list[Sequence[str]] = [head]
    for share in placement.shares:
        device = share.device
        has_nodes = any(one.device.node for one in placement.shares)
        rows.append((
            f"{device.node}/{device.name}" if has_nodes else device.name, device.label,
            "?" if device.gb_s is None else f"{device.gb_s:g}", _layer_words(placement, share),
            size_text(share.weights.nbytes), size_text(share.cache.nbytes),
            size_text(share.work_bytes), size_text(share.nbytes), size_text(device.memory_bytes),
            f"{100 * share.nbytes / device.memory_bytes:.0f} %",
        ))  # fmt: skip
    if len(rows) > 2:
        sums = (
            placement.weights_bytes, placement.cache_bytes, placement.work_bytes, placement.nbytes
        )  # fmt: skip
        rows.append(("in all", "", "", "", *map(size_text, sums), "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def _layer_words(placement: Placement, share: Share) -> str:
    layers = f"{share.first_layer}-{share.last_layer}"
    if placement.split == "tensor":
        return f"1/{len(placement.shares)} of {layers}"
    return layers + " + head" * (share.has_head and len(placement.shares) > 1)


def _share_facts(share: Share) -> dict[str, Any]:
    device, work = share.device, share.work
    return {
        "device": device.name, "node": device.node, "is": device.label,
        "memory_bytes": device.memory_bytes, "gb_s": device.gb_s,
        "first_layer": share.first_layer, "last_layer": share.last_layer,
        "has_embedding": share.has_embedding, "has_head": share.has_head,
        "bytes": share.nbytes, "weights_bytes": share.weights.nbytes,
        "cache_bytes": share.cache.nbytes, "work_bytes": share.work_bytes,
        "read_bytes": share.read_bytes,
        "work": {
            "context_bytes": work.context_bytes, "step_bytes": work.step_bytes,
            "logits_bytes": work.logits_bytes, "graph_bytes": work.graph_bytes,
            "rounding_bytes": share.work_bytes - work.nbytes,
        },
    }  # fmt: skip
