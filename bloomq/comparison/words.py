"""What a comparison found, in words and in figures that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bloomq.comparison.labels import Labels
from bloomq.comparison.outputs import Outputs
from bloomq.comparison.weights import Tensor

# Mean KL in nats up to which a word holds. Measured on the demo, held-out text: int8 0.0007 (top
# token the same at 97.6 % of places), int6 0.0027 (95.3 %), nl4 0.012 (90.9 %).
_WORDS = (
    (0.001, "Practically the original"), (0.005, "Very close to the original"),
    (0.02, "Close to the original"), (0.1, "Noticeably different"),
)  # fmt: skip
_WORST_WORD = "Far from the original"
_SNR_WORDS = ((35.0, _WORDS[0][1]), (25.0, _WORDS[1][1]), (17.0, _WORDS[2][1]), (8.0, _WORDS[3][1]))
_MINUS = "\N{MINUS SIGN}"


def verdict(outputs: Outputs | Labels | None, tensors: Sequence[Tensor]) -> str:
    """How good the pack is, in a few words."""
    if isinstance(outputs, Outputs):
        kl = outputs.total.kl
        return next((word for most, word in _WORDS if kl <= most), _WORST_WORD)
    if isinstance(outputs, Labels):
        error = outputs.relative_error
    else:
        error = max((tensor.relative_error for tensor in tensors), default=0.0)
    snr = math.inf if not error else -10 * math.log10(error) if math.isfinite(error) else -math.inf
    return next((word for least, word in _SNR_WORDS if snr >= least), _WORST_WORD)


def headline(outputs: Outputs | Labels | None, tensors: Sequence[Tensor]) -> str:
    """What was measured, in a sentence."""
    if isinstance(outputs, Outputs):
        total = outputs.total
        found = f"The top token is the same at {percent(total.same_top)} of {total.places:,} places"
        if not outputs.is_text:
            return f"{found}, of token ids drawn at random"
        return (
            f"{found}; perplexity {perplexity(total.base_perplexity)} → "
            f"{perplexity(total.perplexity)} ({signed(100 * total.change)} %)"
        )
    if isinstance(outputs, Labels):
        where = f"{outputs.places:,} place{'' if outputs.places == 1 else 's'}"
        if outputs.same_label is None:
            return f"The results differ by {percent(outputs.relative_error)} of their power"
        return f"The label is the same at {percent(outputs.same_label)} of {where}"
    worst = max(tensors, key=lambda tensor: tensor.relative_error)
    return (
        f"{len(tensors)} matrices; the worst, {worst.name}, lies {decibels(worst.snr_db)} "
        "above its error"
    )


def percent(share: float) -> str:
    """0.976 -> 97.6 %; more digits where few would say 100 %, or 0."""
    if not math.isfinite(share):
        return "–"
    digits = 1 if 0.001 <= share < 0.995 or share in (0.0, 1.0) else 2
    return f"{100 * share:.{0 if share in (0.0, 1.0) else digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a true minus."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def decibels(value: float) -> str:
    if value == math.inf:
        return "infinitely"
    return f"{value:.1f} dB".replace("-", _MINUS)


def small(value: float) -> str:
    """A small number as people read it: 0.00213, 3.1e-6."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞" if value > 0 else "–"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}".replace("e-0", "e-")


def perplexity(value: float) -> str:
    """Four digits, or the whole number."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" if value < 1e9 else f"{value:.2e}"


def size(nbytes: float) -> str:
    for limit, unit, digits in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 0)):
        if nbytes >= limit:
            return f"{nbytes / limit:.{digits}f} {unit}"
    return f"{nbytes:.0f} B"
