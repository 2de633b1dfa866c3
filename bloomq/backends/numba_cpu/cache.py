"""The memory of keys and values: rows of pages, which rows share until one of them writes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.attention_parts import PAGE
from bloomq.backends.numba_cpu.pages import Layout, Page, Pages, Spare
from bloomq.backends.numba_cpu.program import Program
from bloomq.config import BloomConfig
from bloomq.errors import CapacityError
from bloomq.layers import CacheDtype, Span, Stored, check_drop
from bloomq.schemes import round_up

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
BOUND = 7  # inputs of a program that `NumbaCache.bind` writes
_ADDRESSABLE_BYTES = 1 << 47  # of a process on x86-64


class NumbaCache:
    """Rows of tokens, each a list of pages (see `pages.Layout`).

    A page is allocated by the step that first writes to it, and goes when the last row that refers
    to it does. A step writes to no page that another row refers to: it takes a copy
    first. So copying a row costs its list, and what lies before a row's length never changes.

    A row's list is replaced, never changed, so what a program was told of it stays true while it
    runs. A page's count of rows is raised before it is referred to and lowered after: whatever
    interrupts that leaves a count too high, and so at most a page copied in vain.
    """

    def __init__(
        self, config: BloomConfig, batch: int, capacity: int, dtype: CacheDtype, ranks: int = 0
    ) -> None:
        self.dtype = dtype
        self._layout = Layout(config.n_layer, config.n_head, config.head_dim, dtype)
        self._spare = Spare(self._layout.page_bytes)
        self.batch = self.capacity = 0
        self.lengths: I64 = np.zeros(0, np.int64)
        self.gates: F32 = np.zeros((0, ranks), np.float32)
        self._rows: list[Pages] = []
        self._changing = threading.Lock()  # rows that share pages may be used by several threads
        self.grow(capacity, batch)

    @property
    def paged(self) -> bool:
        return True

    @property
    def token_bytes(self) -> int:
        return self._layout.token_bytes

    @property
    def pages_in_use(self) -> int:
        """Pages that rows refer to, each counted once."""
        return len({page.address for row in self._rows for page in row.pages})

    @property
    def nbytes(self) -> int:
        return self.pages_in_use * self._layout.page_bytes + self._spare.nbytes

    def grow(self, capacity: int, batch: int | None = None) -> None:
        capacity = max(self.capacity, round_up(capacity, PAGE))
        more = 0 if batch is None else max(0, batch - self.batch)
        total_bytes = (self.batch + more) * capacity * self.token_bytes
        if total_bytes > _ADDRESSABLE_BYTES:
            raise _no_memory(total_bytes)
        if more:
            ranks = self.gates.shape[1]
            self._rows += [Pages.of([]) for _ in range(more)]
            self.gates = np.concatenate([self.gates, np.zeros((more, ranks), np.float32)])
            self.lengths = np.concatenate([self.lengths, np.zeros(more, np.int64)])
            self.batch += more
        self.capacity = capacity

    # -- a step ------------------------------------------------------------------------------------

    def bind(self, program: Program, span: Span) -> None:
        """Tell a program where the rows of a step lie, which get the pages that it will write to;
        the program holds these while it runs. The first inputs are, in this order: the address of
        the rows' tables' addresses; heads of all layers; rows of the step, and addresses of their
        numbers, starts and past lengths; the gates' address.

        Raises: CapacityError where there is no memory for these pages."""
        rows, past = span.rows.tolist(), self.lengths[span.rows].tolist()
        ends = [length + count for length, count in zip(past, span.counts.tolist(), strict=True)]
        self._make_room(rows, past, ends)
        pages = [self._rows[row] for row in rows]
        n = len(rows)
        at = program.tell([*(p.address for p in pages), *rows, *past, *span.starts.tolist()])
        program.inputs[:BOUND] = (
            at, self._layout.places, n, at + 8 * n, at + 24 * n, at + 16 * n,
            self.gates.ctypes.data if self.gates.size else 0,
        )  # fmt: skip
        program.cache_bytes = sum(ends) * self.token_bytes
        program.held = (self.gates, pages)

    def _make_room(self, rows: list[int], past: list[int], ends: list[int]) -> None:
        """Pages of their own for what rows write, from past to ends."""
        try:
            for row, length, end in zip(rows, past, ends, strict=True):
                pages = self._rows[row].pages
                shared = any(page.rows > 1 for page in pages[length // PAGE :])
                if shared or len(pages) * PAGE < end:
                    self._write_from(row, length, end)
        except CapacityError:
            for row in rows:
                self._forget_beyond(row)
            raise

    def _write_from(self, row: int, length: int, end: int) -> None:
        with self._changing:
            pages = list(self._rows[row].pages)
            for i in range(min(length // PAGE, len(pages)), -(-end // PAGE)):
                if i == len(pages):
                    pages.append(self._page())
                elif pages[i].rows > 1:
                    pages[i] = self._page(pages[i], max(0, length - i * PAGE))
            self._hold(row, pages)

    def _page(self, source: Page | None = None, tokens: int = 0) -> Page:
        """A new page, with the first tokens of another. Raises: CapacityError."""
        try:
            if source is None:
                return self._layout.page(self._spare)
            return self._layout.copied(source, tokens, self._spare)
        except MemoryError:
            raise _no_memory(self.nbytes + self._layout.page_bytes) from None

    def advance(self, span: Span) -> None:
        for row, count in zip(span.rows.tolist(), span.counts.tolist(), strict=True):
            self.lengths[row] += count

    # -- rows --------------------------------------------------------------------------------------

    def _hold(self, row: int, pages: Sequence[Page]) -> None:
        """Make these the pages of a row; `_changing` is held."""
        for page in pages:
            page.rows += 1
        before, self._rows[row] = self._rows[row], Pages.of(pages)
        for page in before.pages:
            page.rows -= 1

    def _needed(self, row: int) -> tuple[Page, ...]:
        """The pages that a row's tokens lie in, without those that a broken step left behind."""
        return self._rows[row].pages[: -(-int(self.lengths[row]) // PAGE)]

    def _forget_beyond(self, row: int) -> None:
        if len(self._needed(row)) < len(self._rows[row].pages):
            with self._changing:
                self._hold(row, self._needed(row))

    def truncate(self, row: int, length: int) -> None:
        self.lengths[row] = min(length, int(self.lengths[row]))
        self._forget_beyond(row)

    def copy(self, source: int, target: int) -> None:
        with self._changing:
            self._hold(target, self._needed(source))
        self.gates[target] = self.gates[source]
        self.lengths[target] = self.lengths[source]

    def drop(self, row: int, start: int, count: int) -> None:
        check_drop(int(self.lengths[row]), start, count)
        with self._changing:
            pages = self._needed(row)
            self._hold(row, pages[: start // PAGE] + pages[(start + count) // PAGE :])
        self.lengths[row] -= count

    def keys(self, layer: int, row: int, count: int) -> F32:
        return self._layout.layer_keys(self._rows[row].pages, layer, count)

    def stored(self, row: int) -> Stored:
        return self._layout.stored(self._rows[row].pages, int(self.lengths[row]))

    def restore(self, row: int, stored: Stored) -> None:
        layout = self._layout
        shape = (layout.n_layer, layout.n_head, layout.head_dim)
        stored.check(shape, np.dtype(layout.element), self.capacity)
        pages = []
        for start in range(0, stored.length, PAGE):
            pages.append(self._page())
            layout.fill(pages[-1], stored, start)
        with self._changing:
            self._hold(row, pages)
        self.lengths[row] = stored.length


def _no_memory(size_bytes: int) -> CapacityError:
    return CapacityError(
        f"no memory for a cache of {size_bytes / 1e9:.1f} GB: ask for fewer tokens or rows"
    )
