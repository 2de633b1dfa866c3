"""A step as a program: a list of kernels, replayed by however many threads turn up.

An operation is a compiled kernel, the address of its arguments, and a number of units (tiles of a
matrix or pairs of them, heads, rows). They are divided into a stretch for each thread, so that it
reads memory in a stream of its own, or in two. A thread takes chunks of its own stretch from a
counter, then of the others', until none are left, and goes on when all of them are done.

Invariant: nobody is waited for who has not taken a chunk. A helper that wakes late, is preempted or
never comes costs its help and nothing else; slow cores take fewer chunks than fast ones. Each unit
is computed by one thread, so who computed it changes no bit.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import defaultdict
from functools import lru_cache
from time import sleep
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import int64, types, void
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from bloomq.backends.numba_cpu.jit import called, compiled

Array = NDArray[Any]
Number = int | float | np.floating[Any]

LINE = 64  # bytes of a cache line; what kernels align their vectors to
_ROWS = 8  # buffers of several rows have whole blocks of tokens
_ROW = 2 * LINE  # rows of a buffer are padded to this: a pair of weight tiles writes as much
_OPERATION = 5  # int64 of an operation: kernel, arguments, units, least and most of a chunk
# A job's counters, a cache line each: shall all stop? how many are at work? then of each operation
# what is done, and what is taken of each thread's stretch.
_STOP, _WORKING, _FIRST = 0, 1, 2
_SLICE = 16  # operations between two looks at signals: 0.4 s of a prompt's step on bloom-7b1
_SHARE = 4  # a chunk is such a part of what is left of its stretch
_SPINS = 2_000  # looks at a counter before the core is offered to others: some 50 us
I64 = ir.IntType(64)


class Buffer:
    """An array that the operations of a program write and read: [rows, columns].

    `array` has its rows padded to what the micro-kernels read at once, and its columns to what they
    write at once. The memory goes back to the program when nothing refers to the buffer any more,
    and later operations get it: operations run one after another.
    """

    __slots__ = ("array", "columns", "program", "rows")

    def __init__(self, program: Program, array: Array, rows: int, columns: int) -> None:
        self.program, self.array, self.rows, self.columns = program, array, rows, columns

    def __del__(self) -> None:
        if hasattr(self, "array"):  # Ctrl-C may cut off its making
            self.program.give_back(self.array)

    def __len__(self) -> int:
        return self.rows

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    @property
    def stride_bytes(self) -> int:
        return int(self.array.strides[0])

    def values(self) -> Array:
        """The rows and columns that mean something: a view."""
        return self.array[: self.rows, : self.columns]


class Input:
    """`rows` whole numbers that a program is given anew for each run, and where it reads them:
    their address is inputs[at]."""

    __slots__ = ("at", "program", "rows", "values")

    def __init__(self, program: Program, rows: int, at: int) -> None:
        self.program, self.rows, self.at = program, rows, at
        self.values = np.zeros(rows, np.int64)
        program.inputs[at] = self.values.ctypes.data
        program.keep(self.values)


class Program:
    """Operations in order, the memory that they work in, and what they read anew at each run.

    `inputs` [n] int64: addresses and sizes that differ from run to run; kernels get its address.
    """

    def __init__(self, inputs: int = 0) -> None:
        self.inputs: Array = np.zeros(inputs, np.int64)
        self.bytes_touched = 0  # weights, counted when recorded
        self.cache_bytes = 0  # keys and values, known when it runs
        self.held: object = None  # what `inputs` point into, of the latest run
        self._told, self._told_at = np.zeros(0, np.int64), 0
        self.nbytes = 0  # of buffers
        self._operations: list[tuple[int, int, int, int, int]] = []
        self._table: Array | None = None
        self._free: dict[int, list[Array]] = defaultdict(list)
        self._alive: list[object] = []  # what addresses in the arguments point into

    def buffer(self, rows: int, columns: int, dtype: type[np.generic]) -> Buffer:
        """Memory for an intermediate, of any content."""
        size, padded_rows = (
            np.dtype(dtype).itemsize,
            -(-rows // _ROWS) * _ROWS if rows > 1 else rows,
        )
        stride = -(-columns * size // _ROW) * _ROW
        count = padded_rows * stride
        if self._free[count]:
            memory = self._free[count].pop()
        else:
            memory = _aligned(count)
            self._alive.append(memory)  # also if Ctrl-C cuts off the buffer's `__del__`
            self.nbytes += count
        array = memory.view(dtype).reshape(padded_rows, stride // size)
        return Buffer(self, array, rows, columns)

    def give_back(self, array: Array) -> None:
        self._free[array.nbytes].append(array.reshape(-1).view("uint8"))

    def add(
        self, kernel: Any, units: int, chunk: int, *arguments: Number, most: int = 0,
        touched: int = 0,
    ) -> None:  # fmt: skip
        """Append an operation. chunk: units that one thread takes at a time, or with `most` at
        least: so many at most while there are plenty; touched: bytes of weights that it reads, by
        which `Pool` decides whether to wake helpers."""
        if units == 0:
            return
        block = np.array([_bits(argument) for argument in arguments], np.int64)
        self._alive += [kernel, block]
        least = max(1, chunk)
        self._operations.append((kernel.address, block.ctypes.data, units, least, max(least, most)))
        self.bytes_touched += touched
        self._table = None

    def tell(self, numbers: list[int]) -> int:
        """Whole numbers for the next run; returns the address that they have until then. In the
        same place each time: to ask NumPy for an address takes longer than all else here."""
        if len(numbers) != len(self._told):
            self._told = np.zeros(len(numbers), np.int64)
            self._told_at = self._told.ctypes.data
        self._told[:] = numbers
        return self._told_at

    def keep(self, *owners: object) -> None:
        """Hold what addresses among the arguments point into."""
        self._alive += owners

    def job(self, threads: int = 1) -> Job:
        """One run, not yet begun, for so many threads."""
        if self._table is None:
            self._table = np.array(self._operations, np.int64).reshape(-1, _OPERATION)
        return Job(self, self._table, threads)


class Job:
    """One run of a program, with counters of its own: a helper that comes after the end finds
    everything taken, even if the program is already running again.

    announced: where to write `number` when the run begins, by which helpers know it; 0: nowhere.
    """

    __slots__ = ("_counters", "_operations", "_owners", "_table", "_threads", "announced", "number")

    def __init__(self, program: Program, table: Array, threads: int) -> None:
        self._operations, self._threads = len(table), threads
        lines = _FIRST + self._operations * (1 + threads)
        self._counters = _aligned(lines * LINE).view(np.int64)
        self._table = table.ctypes.data
        self._owners: tuple[object, ...] = (program, program.held, table)
        self.announced = self.number = 0

    def work(self) -> None:
        """Take chunks until all are taken; returns when all are done, or when the run is stopped.
        Between slices Python looks at signals. Of what is done nothing is held but what a late
        helper reads, the table and the counters: the latest job is there until the next comes."""
        run, counters = runner(), self._counters.ctypes.data
        for first in range(0, self._operations, _SLICE):
            last = min(first + _SLICE, self._operations)
            run(
                self._table, first, last, counters, offer_core(), self._threads,
                0 if first else self.announced, self.number,
            )  # fmt: skip
        self._owners = self._owners[-1:]

    def help(self, who: int, looks: int) -> None:
        """The same as thread `who`; then look so many times whether another run was announced. All
        in one call: whoever wants the GIL between slices, or while a token is drawn, waits for it
        asleep, and waking up takes longer than many an operation."""
        helper()(
            self._table, self._operations, self._counters.ctypes.data, offer_core(), self._threads,
            who, self.announced, self.number, looks if self.announced else 0,
        )  # fmt: skip

    def stop(self) -> None:
        """Let nobody take another chunk; returns when those who are at one have finished it."""
        self._counters[_STOP * LINE // 8] = 1
        while self._counters[_WORKING * LINE // 8]:
            sleep(1e-4)


def _bits(value: Number) -> int:
    """An argument as an int64: whole numbers as they are, others as float32 in the low half."""
    if isinstance(value, float | np.floating):
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    return int(value)


def _aligned(count: int) -> Array:
    """`count` bytes, zeros, at a multiple of LINE."""
    memory = np.zeros(count + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + count]


@lru_cache(maxsize=1)
def offer_core() -> int:
    """The address of the system's call that offers this core to others; 0 where there is none."""
    if os.name == "nt":
        call: Any = ctypes.windll.kernel32.SwitchToThread  # type: ignore[attr-defined]
    else:
        call = getattr(ctypes.CDLL(None), "sched_yield", None)
    return 0 if call is None else ctypes.cast(call, ctypes.c_void_p).value or 0


# -- compiled --------------------------------------------------------------------------------------


@intrinsic
def _add(typingctx: Any, at: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically; returns what was there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _write(typingctx: Any, at: Any, value: Any) -> Any:
    """Set the int64 at an address, after everything that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _read(typingctx: Any, at: Any) -> Any:
    """The int64 at an address, and everything that was written before it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _call(typingctx: Any, function: Any, arguments: Any, first: Any, last: Any) -> Any:
    """Call a kernel at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kernel = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(args[0], kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any, offer: Any) -> Any:
    """Wait a little: with the processor's hint where `offer` is 0, else by the system call at that
    address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.if_else(builder.icmp_signed("==", args[0], I64(0))) as (hint, system):
            with hint:
                if "x86" in builder.module.triple:
                    name = "llvm.x86.sse2.pause"
                    nothing = ir.FunctionType(ir.VoidType(), [])
                    builder.call(cgutils.get_or_insert_function(builder.module, nothing, name), [])
            with system:
                call = ir.FunctionType(ir.IntType(32), [])
                builder.call(builder.inttoptr(args[0], call.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@called()
def _work(table, first_operation, last_operation, counters, offer, threads, who):  # type: ignore[no-untyped-def]
    """One thread's way through some operations of a program."""
    stop, working, operations = counters + _STOP * LINE, counters + _WORKING * LINE, _FIRST * LINE
    _add(working, 1)
    for i in range(first_operation, last_operation):
        operation = table + 8 * _OPERATION * i
        function, arguments = _read(operation), _read(operation + 8)
        units, least, most = _read(operation + 16), _read(operation + 24), _read(operation + 32)
        chunks = (units + least - 1) // least
        stretches = min(threads, chunks)
        done = counters + operations + LINE * (1 + threads) * i
        for other in range(stretches):
            stretch = (who + other) % stretches
            start = (chunks * stretch + stretches - 1) // stretches * least
            end = min((chunks * (stretch + 1) + stretches - 1) // stretches * least, units)
            taken = done + LINE * (1 + stretch)
            while start + _read(taken) < end and not _read(stop):
                # Less and less, so that the last chunks end at about the same time.
                chunk = min(max((end - start - _read(taken)) // _SHARE, least), most)
                first = start + _add(taken, chunk)
                if first >= end:
                    break
                last = min(first + chunk, end)
                _call(function, arguments, first, last)
                _add(done, last - first)
        looks = 0
        while _read(done) < units and not _read(stop):
            looks += 1
            _pause(offer if looks > _SPINS else 0)
    _add(working, -1)


@lru_cache(maxsize=1)
def runner() -> Any:
    """The caller's way through some operations:
    runner(table, first, last, counters, offer_core, threads, announced, number)."""

    @compiled(void(*[int64] * 8))
    def run_program(table, first, last, counters, offer, threads, announced, number):  # type: ignore[no-untyped-def]
        if announced:
            _write(announced, number)
        _work(table, first, last, counters, offer, threads, 0)

    return run_program


@lru_cache(maxsize=1)
def helper() -> Any:
    """A helper's way through all of them, and its look-out for the next run:
    helper(table, operations, counters, offer_core, threads, who, announced, number, looks)."""

    @compiled(void(*[int64] * 9))
    def help_program(table, operations, counters, offer, threads, who, announced, number, looks):  # type: ignore[no-untyped-def]
        _work(table, 0, operations, counters, offer, threads, who)
        for _ in range(looks):
            if _read(announced) != number:
                return
            _pause(0)

    return help_program
