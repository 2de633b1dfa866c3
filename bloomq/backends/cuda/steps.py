"""A step recorded once and replayed: what makes decoding as fast as the memory.

A decode step launches some 15 kernels a layer, and for one token launching takes longer than most
of them run. So steps of one token a row are padded to few shapes, each of which is recorded in a
CUDA graph when it comes a second time, and replayed from then on; a shape's first step runs as it
is, which also compiles what is compiled at first use. The graphs of a cache share one pool of
work space: they run one after another, and a result is copied out before the next begins.

Padding writes to the slot that is nobody's and sees no key, so it changes no row. Other steps
(prompts) run as they are. On torch's CPU device a plain call stands for the replay.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.backends.cuda.cache import CudaCache, Layer
from bloomq.backends.cuda.places import Ones, Places
from bloomq.errors import CapacityError
from bloomq.layers import Span, Step

I64 = NDArray[np.int64]
CUDA: Any = torch.cuda  # whose streams and events have no types
LEAST_KEYS = 256  # that a padded step looks at: every doubling from here is a step to record


def in_graphs(step: Step, device: torch.device, *, record: bool = True) -> Step:
    """The same step, padded and replayed where it can be; record: False for a step that no graph
    can hold, such as one that waits for the host."""
    return Recorder(step, device, record=record)


def bucket(n: int) -> int:
    """The power of two from n on: at most twice the work, for the logarithm of the shapes."""
    return 1 << (n - 1).bit_length() if n else 0


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The cache as one step sees it. It holds the buffers, not the cache: who records a frame does
    not keep the cache alive."""

    layers: list[Layer]
    lies: Places
    gates: torch.Tensor  # of each token's row, [M, ranks]

    def places(self, span: Span) -> Places:
        return self.lies

    def token_gates(self, span: Span) -> torch.Tensor:
        return self.gates


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides a recorded step: rows, keys looked at, whether rows are the first ones, and the
    columns of the hidden states that it is given, None for ids."""

    rows: int
    reach: int
    in_order: bool
    columns: int | None = None

    @classmethod
    def of(
        cls, span: Span, cache: CudaCache, wanted: I64, columns: int | None = None
    ) -> Shape | None:
        """The shape that a step is padded to; None for one that runs as it is."""
        rows = min(bucket(len(span.rows)), cache.batch)  # rows of padding are rows that there are
        if not rows or (span.counts != 1).any() or len(wanted) > rows:
            return None
        longest = int(cache.lengths[span.rows].max()) + 1
        reach = min(cache.capacity, bucket(max(longest, LEAST_KEYS)))
        in_order = np.array_equal(span.rows, np.arange(len(span.rows)))
        return cls(rows, reach, in_order, columns)


class Inputs:
    """What a padded step reads, at addresses that stay: int64 [R] each of ids, rows, slots, lengths
    after the step, wanted; float32 [R, ranks] gates; float32 [R, columns] states, if they are given
    in the place of ids.

    All is written on the host, in memory that the device reads while the host goes on, and copied
    in one piece: `fill` waits for no more than that the last step's has been read.
    """

    def __init__(self, shape: Shape, ranks: int, device: torch.device) -> None:
        rows = shape.rows
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(5, rows, dtype=torch.int64, pin_memory=on_gpu)
        self._host_gates = torch.zeros(rows, ranks, pin_memory=on_gpu)
        self._there = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.gates = torch.zeros(rows, ranks, device=device)
        self.ids, self.rows, self.slots, self.lengths, self.wanted = self._there
        wide = (rows, shape.columns or 0)
        self._host_states = torch.zeros(wide, pin_memory=on_gpu)
        self.states = None if shape.columns is None else torch.zeros(wide, device=device)
        self._read = CUDA.Event() if on_gpu else None

    def fill(self, given: Any, cache: CudaCache, span: Span, wanted: I64) -> None:
        count, size = len(given), self._host.shape[1]
        if self._read is not None:
            self._read.synchronize()
        past, host, gates = cache.lengths[span.rows], self._host.numpy(), self._host_gates.numpy()
        host[:] = 0  # padding is of length 0
        host[1, :count] = span.rows
        if self.states is None:
            host[0, :count] = given
        host[2] = cache.batch * cache.capacity  # the slot that is nobody's
        host[2, :count] = span.rows * cache.capacity + past
        host[3, :count] = past + 1
        host[4, : len(wanted)] = wanted
        gates[:count], gates[count:size] = cache.gates[span.rows], 0
        self._there.copy_(self._host, non_blocking=True)
        if gates.size:
            self.gates.copy_(self._host_gates, non_blocking=True)
        if self.states is not None:
            if isinstance(given, np.ndarray):
                self._host_states.numpy()[:count] = given
                given = self._host_states[:count]
            self.states[:count].copy_(given, non_blocking=True)
            self.states[count:].zero_()  # not what a larger step has left
        if self._read is not None:
            self._read.record()


@dataclass(slots=True, eq=False)
class Replay:
    """A step of one shape over the buffers of one cache."""

    inputs: Inputs
    frame: Frame
    graph: Any = None  # torch.cuda.CUDAGraph, once recorded
    result: torch.Tensor | None = None  # what it writes
    runs: int = 0

    @classmethod
    def of(cls, shape: Shape, cache: CudaCache) -> Replay:
        inputs = Inputs(shape, cache.gates.shape[1], cache.device)
        ones = Ones(None, inputs.rows, inputs.lengths, shape.reach, shape.in_order)
        lies = Places(cache.batch, cache.capacity, inputs.slots, ones, ())
        return cls(inputs, Frame(cache.layers, lies, inputs.gates))

    def call(self, step: Step) -> torch.Tensor:
        """The step as it is, over the inputs. [R, ...]"""
        nothing: Any = None  # for the span: the frame knows where its tokens lie
        inputs = self.inputs
        given = inputs.ids if inputs.states is None else inputs.states
        result: torch.Tensor = step(given, self.frame, nothing, inputs.wanted)
        return result


@dataclass(slots=True, eq=False)
class Replays:
    """All of a cache's. recording: False once there was no memory for a graph; pool: the work space
    of its graphs, a handle of torch's allocator, which must not outlive the last of them."""

    by_shape: dict[Shape, Replay] = field(default_factory=dict)
    recording: bool = True
    pool: Any = None


class Recorder:
    """A step, and how its recordings are made: they are the cache's, see `CudaCache.recorded`.

    One thread at a time: inputs and work space are shared.
    """

    def __init__(self, step: Step, device: torch.device, *, record: bool = True) -> None:
        self._step, self._device = step, device
        self._records = record and device.type == "cuda"
        self._stream: Any = None  # that they are recorded on
        self._alone = threading.Lock()

    def __call__(self, given: Any, cache: CudaCache, span: Span, wanted: I64) -> torch.Tensor:
        """given: ids, or hidden states, NumPy's or on the device.

        Raises: CapacityError where the device has no memory for the step."""
        try:
            with self._alone, self._on_device():
                columns = given.shape[1] if given.ndim > 1 else None
                shape = Shape.of(span, cache, wanted, columns)
                if shape is None:
                    return self._as_it_is(given, cache, span, wanted)
                return self._padded(shape, given, cache, span, wanted)
        except torch.cuda.OutOfMemoryError:
            pass  # outside, so that the traceback does not keep the step's work space
        cache.recorded.clear()
        raise CapacityError(
            f"no memory on {self._device} for a step of {len(given)} tokens: use fewer rows, a "
            "shorter prompt or a smaller cache"
        )

    def _on_device(self) -> AbstractContextManager[Any]:
        """Where "current" streams are the device's."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _as_it_is(self, given: Any, cache: CudaCache, span: Span, wanted: I64) -> torch.Tensor:
        frame = Frame(cache.layers, cache.places(span), cache.token_gates(span))
        if isinstance(given, np.ndarray):
            kind = np.int64 if given.ndim == 1 else np.float32
            given = torch.from_numpy(np.array(given, kind)).to(self._device)
        read = torch.from_numpy(np.array(wanted, np.int64)).to(self._device)
        result: torch.Tensor = self._step(given, frame, span, read)
        return result

    def _padded(
        self, shape: Shape, given: Any, cache: CudaCache, span: Span, wanted: I64
    ) -> torch.Tensor:
        known: Replays = cache.recorded.setdefault(self, Replays())
        replay = known.by_shape.get(shape)
        if replay is None:
            replay = known.by_shape[shape] = Replay.of(shape, cache)
        replay.inputs.fill(given, cache, span, wanted)
        replay.runs += 1
        if replay.graph is None and replay.runs > 1 and self._records and known.recording:
            try:
                self._record(replay, known)
            except torch.cuda.OutOfMemoryError:
                known.recording = False
        if replay.graph is None or replay.result is None:
            return replay.call(self._step)[: len(wanted)]
        replay.graph.replay()
        return replay.result[: len(wanted)].clone()

    def _record(self, replay: Replay, known: Replays) -> None:
        if self._stream is None:
            self._stream = CUDA.Stream(self._device)
        if known.pool is None:
            known.pool = CUDA.graph_pool_handle()
        graph = CUDA.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile is no part of it
        with CUDA.graph(
            graph, pool=known.pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = replay.call(self._step)
        replay.graph, replay.result = graph, result
