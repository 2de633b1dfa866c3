"""Matrices on torch's CPU device: laid out as GPU kernels read them, brought there in blocks."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bloomq.errors import CapacityError
from bloomq.pack import Pack
from bloomq.schemes import SCHEME_NAMES, get_scheme
from bloomq.weights import Matrix

torch = pytest.importorskip("torch")

from bloomq.backends.cuda import stored as module  # noqa: E402
from bloomq.backends.cuda.embedding import CudaEmbedding  # noqa: E402
from bloomq.backends.cuda.stored import Loader, restored  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CPU = torch.device("cpu")
SCHEMES = [(name, None) for name in SCHEME_NAMES] + [("nl4", 32), ("nl4", 128), ("int4", 64)]
SHAPES = [(40, 70), (1, 1), (33, 128), (150, 300)]  # rows and columns that are no whole tiles


def matrix(scheme: str, shape: tuple[int, int], group: int | None = None, seed: int = 0) -> Matrix:
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[:, : shape[1] // 3] *= 100
    w[len(w) // 2] = 0
    kind = get_scheme(scheme, group)
    return Matrix("w", kind, shape, kind.quantize(w))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scheme", "group"), SCHEMES, ids=str)
def test_a_matrix_restored_on_the_device_has_the_schemes_own_bits(scheme, group, shape):
    source = matrix(scheme, shape, group)
    found = restored(Loader(CPU).load(source))
    assert found.shape == (shape[0], source.scheme.padded(shape)[1])
    assert found[:, : shape[1]].numpy().tobytes() == source.dequantize().tobytes()
    assert not found[:, shape[1] :].any()


@pytest.mark.parametrize("block_bytes", [1, 5000, 1 << 20])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_no_more_than_a_block_of_it_is_in_the_hosts_memory(scheme, block_bytes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    source, sizes = matrix(scheme, (150, 300)), []
    send = module._Staging._send

    def counted(staging, block):
        sizes.append(block.nbytes)
        return send(staging, block)

    monkeypatch.setattr(module._Staging, "_send", counted)
    loader = Loader(CPU)
    found = loader.load(source)
    assert restored(found)[:, :300].numpy().tobytes() == source.dequantize().tobytes()
    tile = max(part[:1].nbytes for part in source.parts.values() if part.ndim > 1)
    assert max(sizes) <= max(block_bytes, tile)  # a tile is the least that can be laid out
    assert sum(sizes) == sum(part.nbytes for part in source.parts.values() if part.ndim > 1)
    assert sum(buffer.nbytes for buffer in loader._staging._buffers) <= 2 * max(block_bytes, tile)


def test_what_is_sent_of_a_mapped_file_leaves_memory(pack_of: Callable[..., Path], monkeypatch):
    """The system is told of pages that were read, and never of a page that others share."""
    told = []

    def advise(block, advice, *, whole_pages):
        told.append((advice, whole_pages, block.nbytes))

    monkeypatch.setattr(module, "_advise", advise)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 16)
    source = Pack.open(pack_of("int8")).matrix("wte")
    Loader(CPU).load(source)
    gone = [nbytes for advice, whole, nbytes in told if advice == "MADV_DONTNEED" and whole]
    assert sum(gone) == source.parts["codes"].nbytes
    assert all(whole == (advice == "MADV_DONTNEED") for advice, whole, _ in told)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no such advice")
def test_pages_given_back_are_read_again_when_they_are_needed(pack_of: Callable[..., Path]):
    source = Pack.open(pack_of("int8")).matrix("h.0.mlp.up")
    before = source.dequantize()
    Loader(CPU).load(source)
    assert isinstance(module._owner(source.parts["codes"]), mmap.mmap)
    assert source.dequantize().tobytes() == before.tobytes()


def test_a_tied_head_is_on_the_device_once(pack_of: Callable[..., Path]):
    opened, loader = Pack.open(pack_of("int4")), Loader(CPU)
    table = loader.load(opened.matrix("wte"))
    assert loader.load(opened.matrix("lm_head")) is table
    assert loader.load(opened.matrix("h.0.attn.qkv")) is not table


def test_another_matrix_of_the_same_name_and_form_is_another():
    loader = Loader(CPU)
    first, second = matrix("int8", (40, 70)), matrix("int8", (40, 70), seed=1)
    one, other = loader.load(first), loader.load(second)
    assert not torch.equal(one.codes, other.codes)
    assert loader.load(first) is one


def test_memory_used_again_is_not_taken_for_what_was_there():
    """A freed array's address may be the next one's."""
    loader, kept = Loader(CPU), []
    for seed in range(8):
        source = matrix("f32", (40, 70), seed=seed)
        kept.append(loader.load(source))
        expected = source.dequantize()
        assert restored(kept[-1])[:, :70].numpy().tobytes() == expected.tobytes()
        del source


def test_a_matrix_is_as_large_as_its_numbers():
    n, k = 64, 256
    nbytes = {name: Loader(CPU).load(matrix(name, (n, k))).nbytes for name in SCHEME_NAMES}
    assert nbytes == {
        "f32": 4 * n * k, "f16": 2 * n * k, "bf16": 2 * n * k,
        "int8": n * k + 4 * n, "int6": n * k + 2 * n * k // 64,
        "nl4": n * k // 2 + 2 * n * k // 64, "int4": n * k // 2 + 2 * n * k // 32,
        "nf4": n * k // 2 + 4 * n * k // 64,
    }  # fmt: skip


@pytest.mark.parametrize(("scheme", "zero"), [("nl4", 8), ("nf4", 7), ("int4", 8)])
def test_the_first_of_two_columns_is_in_the_high_half_of_a_byte(scheme: str, zero: int):
    w = np.zeros((32, 64), np.float32)
    w[3, 0] = w[3, 5] = 1
    kind = get_scheme(scheme)
    found = Loader(CPU).load(Matrix("w", kind, w.shape, kind.quantize(w)))
    high, low = found.codes[3] >> 4, found.codes[3] & 15
    assert (high != zero).nonzero().tolist() == [[0]]
    assert (low != zero).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_an_embedding_reads_rows_in_any_order(scheme):
    source = matrix(scheme, (50, 70))
    ids = np.array([49, 0, 7, 7, 24])
    found = CudaEmbedding(Loader(CPU).load(source))(torch.from_numpy(ids))
    assert found.numpy().tobytes() == source.dequantize()[ids].tobytes()


def test_a_full_device_is_an_error_with_a_remedy_and_its_reserve_is_freed(monkeypatch):
    freed = []

    def full(loader, source):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 GiB")

    monkeypatch.setattr(Loader, "_loaded", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000_000, 80_000_000_000))
    with pytest.raises(CapacityError) as caught:
        Loader(CPU).load(matrix("f32", (1000, 1000)))
    assert str(caught.value) == (
        "w: no room for its 0.00 GB on cpu, where 0.00 GB are free: use a smaller scheme, or more "
        "devices"
    )
    assert freed
    assert caught.value.__context__ is None  # whose traceback would hold the device's memory
