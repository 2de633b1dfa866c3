"""The goals of the CUDA backend, each judged from the rows of a run, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = dict[str, Any]
INT8_PEERS = "transformers bitsandbytes int8", "transformers bitsandbytes int8, threshold 0"
NF4_PEERS = ("transformers bitsandbytes nf4",)
BF16_PEERS = "transformers bf16", "transformers bf16, SDPA"


class Unmeasured(Exception):
    """There is no figure, and why."""


@dataclass(frozen=True, slots=True)
class Goal:
    """what: of the table; section: whose rows; limit: the figure is to be at least (or, where
    `at_most`, at most) so much."""

    what: str
    goal: str
    section: str
    measure: Callable[[Sequence[Row]], float]
    limit: float
    unit: str
    at_most: bool = False

    def met(self, figure: float) -> bool:
        return figure <= self.limit if self.at_most else figure >= self.limit


def percent(engine: str) -> Callable[[Sequence[Row]], float]:
    """Of the measured bandwidth that an engine's decode reaches."""
    return lambda rows: float(_row(rows, engine)["percent"])


def fact(what: str, name: str) -> Callable[[Sequence[Row]], float]:
    """A figure of the first row whose `what` starts so."""
    return lambda rows: float(_row(rows, what)[name])


def times(engine: str, peers: Sequence[str]) -> Callable[[Sequence[Row]], float]:
    """How often faster than the fastest of `peers`: the median of neighbours in time."""

    def measure(rows: Sequence[Row]) -> float:
        ours, ratios, reasons = _row(rows, engine), [], []
        for peer in peers:
            try:
                theirs = _row(rows, peer)
            except Unmeasured as error:
                reasons.append(str(error))
                continue
            pairs = zip(theirs["step_s"], ours["step_s"], strict=False)
            ratios.append(float(median(their / our for their, our in pairs)))
        if not ratios:
            raise Unmeasured(reasons[0])
        return min(ratios)

    return measure


def passed(rows: Sequence[Row]) -> float:
    """The share of a section's checks that came out right, of 1."""
    checks = [bool(row.get("correct")) for row in rows if "correct" in row or "failed" in row]
    if not checks:
        raise Unmeasured("nothing was checked")
    return sum(checks) / len(checks)


def deviation(rows: Sequence[Row]) -> float:
    """The largest, in percent of the plan, either way."""
    found = [abs(float(row["off_plan"])) for row in rows if "off_plan" in row]
    if not found:
        raise Unmeasured(_reason(rows))
    return max(found)


def big_percent(rows: Sequence[Row]) -> float:
    return float(_one_row(rows)["percent"])


def big_rate(rows: Sequence[Row]) -> float:
    return float(_one_row(rows)["tokens_per_s"])


def big_fits(rows: Sequence[Row]) -> float:
    """How many rows of the whole context were decoded."""
    for row in rows:
        if row.get("full"):
            return float(row["rows"])
    raise Unmeasured(_reason(rows))


def largest_rss(rows: Sequence[Row]) -> float:
    found = [float(row["peak_rss_mb"]) / 1e3 for row in rows if "peak_rss_mb" in row]
    if not found:
        raise Unmeasured(_reason(rows))
    return max(found)


GOALS = (
    Goal("conformance suite", "all pass", "conformance", passed, 1, "of 1"),
    Goal("parity: reference, transformers", "all pass", "parity", passed, 1, "of 1"),
    Goal("greedy int8 text of 200 tokens", "equals the CPU's", "greedy", passed, 1, "of 1"),
    Goal("7b1 int8 decode, of bandwidth", ">= 60 %", "decode", percent("bloomq int8"), 60, "%"),
    Goal("7b1 nl4 decode, of bandwidth", ">= 50 %", "decode", percent("bloomq nl4"), 50, "%"),
    Goal("7b1 int4 decode, of bandwidth", ">= 50 %", "decode", percent("bloomq int4"), 50, "%"),
    Goal("7b1 nf4 decode, of bandwidth", ">= 50 %", "decode", percent("bloomq nf4"), 50, "%"),
    Goal("7b1 int8 over bitsandbytes int8", ">= 8 x", "decode",
         times("bloomq int8", INT8_PEERS), 8, "x"),
    Goal("7b1 nl4 over bitsandbytes nf4", ">= 5 x", "decode",
         times("bloomq nl4", NF4_PEERS), 5, "x"),
    Goal("7b1 int4 over bitsandbytes nf4", ">= 5 x", "decode",
         times("bloomq int4", NF4_PEERS), 5, "x"),
    Goal("7b1 nf4 over bitsandbytes nf4", ">= 5 x", "decode",
         times("bloomq nf4", NF4_PEERS), 5, "x"),
    *(
        Goal(f"7b1 {scheme} over bf16 (ours, transformers)", ">= 1 x", "decode",
             times(f"bloomq {scheme}", ("bloomq bf16", *BF16_PEERS)), 1, "x")
        for scheme in ("int8", "nl4", "int4", "nf4")
    ),
    Goal("560m int8 over bitsandbytes int8", ">= 8 x", "small",
         times("bloomq int8", INT8_PEERS), 8, "x"),
    Goal("560m nl4 over bitsandbytes nf4", ">= 8 x", "small",
         times("bloomq nl4", NF4_PEERS), 8, "x"),
    Goal("7b1 batch 32 int8 over bitsandbytes int8", ">= 3 x", "batch",
         times("bloomq int8", INT8_PEERS), 3, "x"),
    *(
        Goal(f"7b1 prefill 2,048 {scheme} over transformers bf16", ">= 1 x", "prefill",
             times(f"bloomq {scheme}", BF16_PEERS), 1, "x")
        for scheme in ("int8", "nl4", "int4", "bf16")
    ),
    Goal("176B, 4 bits, one device, of bandwidth", ">= 45 %", "big", big_percent, 45, "%"),
    Goal("176B, 4 bits, decode", ">= 20 tokens/s", "big", big_rate, 20, "tokens/s"),
    Goal("176B, 4 bits, rows of 2,048 tokens", ">= 4", "big", big_fits, 4, "rows"),
    Goal("load from disk, of the slower of disk and bus", ">= 70 %", "load",
         fact("load from disk", "percent"), 70, "%"),
    Goal("load from memory, of the slower of it and bus", ">= 70 %", "load",
         fact("load from memory", "percent"), 70, "%"),
    Goal("host memory of loading 176B", "<= 4 GB", "big", largest_rss, 4, "GB", at_most=True),
    Goal("7b1 memory, off what the plan said", "<= 5 %", "memory", deviation, 5, "%", at_most=True),
    Goal("176B memory, off what the plan said", "<= 5 %", "big", deviation, 5, "%", at_most=True),
)  # fmt: skip


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows that say the same with more samples each time, the last alone."""
    last = {(row["section"], row["what"]): i for i, row in enumerate(rows) if "step_s" in row}
    return [
        row for i, row in enumerate(rows)
        if last.get((row["section"], row["what"]), i) == i or "step_s" not in row
    ]  # fmt: skip


def table(rows: Sequence[Row], *, meaning: bool) -> list[str]:
    """Markdown lines: a row for each goal. meaning: False for a dry run, which judges nothing."""
    lines = ["| what | goal | measured | met |", "|---|---|---|---|"]
    for goal in GOALS:
        of_section = [row for row in rows if row["section"] == goal.section]
        try:
            figure = goal.measure(of_section)
            measured = f"{figure:.3g} {goal.unit}"
            verdict = ("yes" if goal.met(figure) else "**no**") if meaning else "dry run"
        except Unmeasured as error:
            measured, verdict = f"not measured: {error}", "-"
        lines.append(f"| {goal.what} | {goal.goal} | {measured} | {verdict} |")
    return lines


def figures(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: every engine's speed, and what failed."""
    lines = [
        "| section | engine | tokens/s | ms | GB/s | of bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "tokens_per_s" in row:
            ms = 1e3 * median(row["step_s"])
            share = f"{row['percent']} %" if "percent" in row else ""
            lines.append(
                f"| {row['section']} | {row['what']} | {row['tokens_per_s']} | {ms:.2f} | "
                f"{row.get('gb_s', '')} | {share} |"
            )
    lines += ["", *map(_load_line, (row for row in rows if "load_s" in row))]
    lines += map(_memory_line, (row for row in rows if "off_plan" in row))
    failures = [row for row in rows if "failed" in row]
    lines += ["", *(f"- {row['section']}, {row['what']}: {row['failed']}" for row in failures)]
    return lines


def _load_line(row: Row) -> str:
    return (
        f"- {row['what']}: {row['load_s']:.2f} s, {row['gb_s']} GB/s; "
        f"the bus {row['bus_gb_s']} GB/s; {row['peak_rss_mb'] / 1e3:.2f} GB of host memory at most"
    )


def _memory_line(row: Row) -> str:
    return (
        f"- {row['what']}, {row['batch_planned']} rows of {row['context']} tokens: planned "
        f"{row['planned_gb']} GB (weights {row['weights_gb']}, cache {row['cache_gb']}, work space "
        f"{row['work_gb']}), in use {row['used_gb']} GB"
    )


def ways_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: microseconds of a block's four products, by way and number of tokens."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "block_us" in row:
            found.setdefault(row["way"], {})[row["tokens"]] = row["block_us"]
    counts = sorted({count for of_way in found.values() for count in of_way})
    lines = [
        f"| {way} | " + " | ".join(str(of_way.get(count, "")) for count in counts) + " |"
        for way, of_way in found.items()
    ]
    head = "| us of a block, tokens: | " + " | ".join(map(str, counts)) + " |"
    return [head, "|---" * (1 + len(counts)) + "|", *lines, ""] if found else []


def cuts_table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines: what to put into `triton_products.CUTS`, beside what is there now."""
    found = [row for row in rows if "cut_us" in row]
    lines = [
        f"    {row['line']}  # {row['tokens']} tokens: {row['cut_us']} us, {row['cut_gb_s']} GB/s; "
        f"now {row['now_us']} us"
        for row in found
    ]
    return ["```python", *lines, "```", ""] if found else []


def _row(rows: Sequence[Row], what: str) -> Row:
    """The row of that name. Raises: Unmeasured with the reason that another row gives."""
    for row in rows:
        if row["what"] == what and "failed" not in row:
            return row
    of_it = [row for row in rows if row["what"] in (what, row["section"])]  # or of all of it
    raise Unmeasured(_reason(of_it, what))


def _one_row(rows: Sequence[Row]) -> Row:
    """176B's decode at batch 1."""
    for row in rows:
        if row.get("batch") == 1 and "percent" in row:
            return row
    raise Unmeasured(_reason(rows))


def _reason(rows: Sequence[Row], what: str = "it") -> str:
    said = [str(row["failed"]) for row in rows if "failed" in row]
    return said[-1] if said else f"{what} was not run"
