"""How fast a placement can decode at most: the bytes of a step over the bandwidths.

Layers on several devices run one after the other, so their times add up; in tensor parallel all
devices read at once, and wait twice a block for the sum of what each found. A real step is slower:
launches, attention's softmax and whatever reads below the full bandwidth are not counted.
"""

from __future__ import annotations

from bloomq.config import BloomConfig
from bloomq.placement.request import Placement, Share

# A hidden state of one device for the next, and a small all-reduce, take about so long before the
# first byte; the second figure is between machines. Assumed, not measured.
_HOP_S, _FAR_HOP_S = 20e-6, 50e-6
# PCIe 4.0 x16 in one direction, and a network of 100 Gbit/s: what sums travel through where
# nobody says more. NVLink has 300 GB/s and more.
LINK_GB_S, FAR_LINK_GB_S = 25.0, 12.5


def step_s(
    placement: Placement,
    config: BloomConfig,
    *,
    batch: int,
    tokens: int,
    link_gb_s: float | None = None,
) -> float | None:
    """Seconds of a decode step of `batch` rows that hold `tokens` each; None where a bandwidth is
    not known. link_gb_s: between the devices, for tensor parallel."""
    cached = batch * tokens / (placement.batch * placement.context)  # of the cache, so much is read
    times = []
    for share in placement.shares:
        if share.device.gb_s is None:
            return None
        times.append(_read_s(share, cached))
    if placement.split == "layers":
        return sum(times) + _HOP_S * (len(times) if len(times) > 1 else 0)
    return max(times) + _sums_s(placement, config, batch, link_gb_s)


def _read_s(share: Share, cached: float) -> float:
    assert share.device.gb_s is not None
    return (share.read_bytes + cached * share.cache.nbytes) / (1e9 * share.device.gb_s)


def _sums_s(
    placement: Placement, config: BloomConfig, batch: int, link_gb_s: float | None
) -> float:
    """Two all-reduces a block, of a float32 hidden state for each row. In a ring each device sends
    2 (n - 1) / n of the bytes."""
    count = len(placement.shares)
    if count == 1:
        return 0.0
    far = len({share.device.node for share in placement.shares}) > 1
    link = link_gb_s or (FAR_LINK_GB_S if far else LINK_GB_S)
    sent = 4 * batch * config.hidden_size * 2 * (count - 1) / count
    return 2 * config.n_layer * ((_FAR_HOP_S if far else _HOP_S) + sent / (1e9 * link))
