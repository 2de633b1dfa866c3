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
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bloomq.backends.cuda.attention import reads_own_keys
from bloomq.backends.cuda.buffers import Layer
from bloomq.backends.cuda.cache import CudaCache
from bloomq.backends.cuda.places import Ones, Places
from bloomq.errors import CapacityError
from bloomq.layers import Span, Step
from bloomq.schemes import round_up

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
    """What decides a recorded step: rows, keys looked at, and whether rows are the first ones;
    where a kernel reads each row's own keys, rows alone. width: C of hidden states, 0 for ids."""

    rows: int
    reach: int
    in_order: bool
    width: int = 0

    @classmethod
    def of(cls, x: Any, span: Span, cache: CudaCache, wanted: I64) -> Shape | None:
        """The shape that a step is padded to; None for one that runs as it is."""
        rows = min(bucket(len(span.rows)), cache.batch)  # rows of padding are rows that there are
        if not rows or (span.counts != 1).any() or len(wanted) > rows:
            return None
        width = x.shape[1] if x.ndim > 1 else 0
        if reads_own_keys(cache.layers[0]):
            return cls(rows, cache.capacity, False, width)
        longest = int(cache.lengths[span.rows].max()) + 1
        reach = min(cache.capacity, bucket(max(longest, LEAST_KEYS)))
        in_order = np.array_equal(span.rows, np.arange(len(span.rows)))
        return cls(rows, reach, in_order, width)


class Inputs:
    """What a padded step reads, at addresses that stay: int64 [R] each of ids, rows, slots, lengths
    after the step, wanted; float32 gates [R, ranks]; float32 hidden states [R, C] where a step
    begins with them, such as that of a model's second device.

    All is written on the host, in memory that the device reads while the host goes on: `fill` waits
    for no more than that the last step's has been read.
    """

    def __init__(self, rows: int, ranks: int, width: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        wide = round_up(rows, 2)  # each at a multiple of 16 bytes, for which Triton compiles apart
        self._host = torch.zeros(5, wide, dtype=torch.int64, pin_memory=on_gpu)
        self._host_gates = torch.zeros(rows, ranks, pin_memory=on_gpu)
        self._there = torch.zeros(5, wide, dtype=torch.int64, device=device)
        self._host_hidden = torch.zeros(rows, width, pin_memory=on_gpu)
        self.gates = torch.zeros(rows, ranks, device=device)
        self._hidden = torch.zeros(rows, width, device=device)
        self.ids, self.rows, self.slots, self.lengths, self.wanted = self._there[:, :rows]
        self._read = CUDA.Event() if on_gpu else None

    @property
    def first(self) -> torch.Tensor:
        """What a step begins with: hidden states, or ids."""
        return self._hidden if self._hidden.numel() else self.ids

    def fill(self, x: Any, cache: CudaCache, span: Span, wanted: I64) -> None:
        if self._read is not None:
            self._read.synchronize()
        count, past = len(x), cache.lengths[span.rows]
        host, gates = self._host.numpy(), self._host_gates.numpy()
        host[:] = 0  # padding is of length 0
        host[1, :count] = span.rows
        host[2] = cache.batch * cache.capacity  # the slot that is nobody's
        host[2, :count] = span.rows * cache.capacity + past
        host[3, :count] = past + 1
        host[4, : len(wanted)] = wanted
        if x.ndim == 1:
            host[0, :count] = x
        elif isinstance(x, torch.Tensor):  # of this device or another
            self._hidden[:count].copy_(x, non_blocking=True)
        else:
            self._host_hidden.numpy()[:count] = x
            self._hidden.copy_(self._host_hidden, non_blocking=True)
        gates[count:] = 0
        gates[:count] = cache.gates[span.rows]
        self._there.copy_(self._host, non_blocking=True)
        if gates.size:
            self.gates.copy_(self._host_gates, non_blocking=True)
        if self._read is not None:
            self._read.record()


@dataclass(slots=True, eq=False)
class Replay:
    """A step of one shape over the buffers of one cache."""

    inputs: Inputs
    frame: Frame
    graph: Any = None  # torch.cuda.CUDAGraph, once recorded
    result: Any = None  # what it writes
    runs: int = 0

    @classmethod
    def of(cls, shape: Shape, cache: CudaCache) -> Replay:
        inputs = Inputs(shape.rows, cache.gates.shape[1], shape.width, cache.device)
        ones = Ones(None, inputs.rows, inputs.lengths, shape.reach, shape.in_order)
        lies = Places(cache.batch, cache.capacity, inputs.slots, ones, ())
        return cls(inputs, Frame(cache.layers, lies, inputs.gates))

    def call(self, step: Step) -> Any:
        """The step as it is, over the inputs. [R, ...]"""
        nothing: Any = None  # for the span: the frame knows where its tokens lie
        return step(self.inputs.first, self.frame, nothing, self.inputs.wanted)


@dataclass(slots=True, eq=False)
class Replays:
    """All of a cache's. recording: False once there was no memory for a graph; pool: the work space
    of its graphs, a handle of torch's allocator, which must not outlive the last of them."""

    by_shape: dict[Shape, Replay] = field(default_factory=dict)
    recording: bool = True
    pool: Any = None


class Recorder:
    """A step, and how its recordings are made: they are the cache's, see `CudaCache.recorded`.

    One thread at a time: inputs and work space are shared. A step that turns out not to be
    recordable runs as it is, with a UserWarning.
    """

    def __init__(self, step: Step, device: torch.device, *, record: bool = True) -> None:
        self._step, self._device = step, device
        self._records = record and device.type == "cuda"
        self._stream: Any = None  # that they are recorded on
        self._alone = threading.Lock()

    def __call__(self, x: Any, cache: CudaCache, span: Span, wanted: I64) -> Any:
        """x: ids int64 [M], or hidden states [M, C] of NumPy or torch. Raises: CapacityError where
        the device has no memory for the step."""
        try:
            with self._alone, self._on_device():
                shape = Shape.of(x, span, cache, wanted)
                if shape is None:
                    return self._as_it_is(x, cache, span, wanted)
                return self._padded(shape, x, cache, span, wanted)
        except torch.cuda.OutOfMemoryError:
            pass  # outside, so that the traceback does not keep the step's work space
        cache.recorded.clear()
        torch.cuda.empty_cache()  # what torch holds in reserve; nothing where there is no GPU
        raise CapacityError(
            f"no memory on {self._device} for a step of {len(x)} tokens: use fewer rows, a "
            "shorter prompt or a smaller cache"
        )

    def _on_device(self) -> AbstractContextManager[Any]:
        """Where "current" streams are the device's."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _as_it_is(self, x: Any, cache: CudaCache, span: Span, wanted: I64) -> Any:
        frame = Frame(cache.layers, cache.places(span), cache.token_gates(span))
        given, read = (
            (a if isinstance(a, torch.Tensor) else torch.from_numpy(np.array(a))).to(self._device)
            for a in (x, wanted)
        )
        return self._step(given, frame, span, read)

    def _padded(self, shape: Shape, x: Any, cache: CudaCache, span: Span, wanted: I64) -> Any:
        known: Replays = cache.recorded.setdefault(self, Replays())
        replay = known.by_shape.get(shape)
        if replay is None:
            replay = known.by_shape[shape] = Replay.of(shape, cache)
        replay.inputs.fill(x, cache, span, wanted)
        replay.runs += 1
        if replay.graph is None and replay.runs > 1 and self._records and known.recording:
            try:
                self._record(replay, known)
            except RuntimeError as error:  # also what torch raises where memory runs out
                known.recording = False
                self._give_up(error)
        if replay.graph is None or replay.result is None:
            return replay.call(self._step)[: len(wanted)]
        replay.graph.replay()
        return replay.result[: len(wanted)].clone()

    def _record(self, replay: Replay, known: Replays) -> None:
        if self._stream is None:
            self._stream = CUDA.Stream(self._device)
        if known.pool is None:
            known.pool = CUDA.graph_pool_handle()
        # This thread's, which need not be that of the step before: a recording may not make one.
        CUDA.current_blas_handle()
        graph = CUDA.CUDAGraph()
        # If recording fails, torch leaves its stream the current one: the outer `with` does not.
        # thread_local: what other threads do on the device meanwhile is no part of it.
        with (
            CUDA.stream(CUDA.current_stream(self._device)),
            CUDA.graph(
                graph, pool=known.pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            result = replay.call(self._step)
        replay.graph, replay.result = graph, result

    def _give_up(self, error: RuntimeError) -> None:
        """Where it was not for memory, which another cache may leave, the step cannot be recorded:
        it is never tried again, and said once."""
        causes = (error, error.__context__)  # that recording could not be ended may hide the cause
        if not any(isinstance(cause, torch.cuda.OutOfMemoryError) for cause in causes):
            self._records = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decoding runs without CUDA graphs, slower: {reason}", stacklevel=2)
