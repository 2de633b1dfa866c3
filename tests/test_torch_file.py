"""Files of torch's `save`: every form gives the pack of the safetensors checkpoint; what is damaged
is refused by name, with nothing left behind.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bloomq.converters.convert import convert
from bloomq.converters.reading import read_checkpoint
from bloomq.converters.source import SourceTensor
from bloomq.converters.torch_file import torch_tensors
from conftest import write_checkpoint
from torch_files import (
    EMPTY,
    FALSE,
    ORDERED,
    REBUILD,
    SIX,
    archive,
    beside,
    called,
    group,
    mapping,
    name,
    number,
    program,
    said,
    save_sharded,
    sizes,
    state_of,
    stored,
    tensor,
    text,
)

from bloomq.errors import CheckpointError, InputNotFound
from bloomq.tensorfile import DTYPES

LEGACY = {"_use_new_zipfile_serialization": False}


def refusal(path: Path) -> str:
    """The one-line message with which a file is refused, without its path."""
    with pytest.raises(CheckpointError) as caught:
        torch_tensors(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(str(path)).removeprefix(": ")


def values(found: SourceTensor) -> np.ndarray:
    return found.rows(0, found.shape[0])


# -- the same model in every form ------------------------------------------------------------------


def save_single(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def save_legacy(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", **LEGACY)


def save_parameters(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """As `dict(model.named_parameters())`, one with an attribute, as transformers sets them."""
    parameters = {key: torch.nn.Parameter(weight) for key, weight in state.items()}
    next(iter(parameters.values()))._is_hf_initialized = True
    torch.save(parameters, folder / "pytorch_model.bin")


def save_module(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """As `model.state_dict()`: an OrderedDict with `_metadata`."""
    module = torch.nn.Module()
    for key, weight in state.items():
        module.register_buffer(key.replace(".", "/"), weight)
    whole = module.state_dict()
    for key in list(whole):
        whole[key.replace("/", ".")] = whole.pop(key)
    assert whole._metadata
    torch.save(whole, folder / "pytorch_model.bin")


def save_in_one_storage(folder: Path, state: dict[str, torch.Tensor]) -> None:
    flat = torch.cat([weight.reshape(-1) for weight in state.values()])
    views, at = {}, 0
    for key, weight in state.items():
        views[key] = flat[at : at + weight.numel()].view(weight.shape)
        at += weight.numel()
    torch.save(views, folder / "pytorch_model.bin")


def save_transposed(folder: Path, state: dict[str, torch.Tensor]) -> None:
    turned = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()}
    torch.save(turned, folder / "pytorch_model.bin")


def save_with_head(folder: Path, state: dict[str, torch.Tensor]) -> None:
    head = state["word_embeddings.weight"]
    torch.save({**state, "lm_head.weight": head}, folder / "pytorch_model.bin")


def save_pickle_4(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", pickle_protocol=4)


def save_pickle_5_legacy(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin", pickle_protocol=5, **LEGACY)


def save_three(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_sharded(folder, state, 3)


FORMS = [
    save_single, save_legacy, save_three, save_parameters, save_module, save_in_one_storage,
    save_transposed, save_with_head, save_pickle_4, save_pickle_5_legacy,
]  # fmt: skip


@pytest.mark.parametrize("save", FORMS)
def test_demo_in_every_form_gives_the_same_pack(tmp_path, pack_of, demo_checkpoint, save):
    folder = beside(demo_checkpoint, tmp_path / demo_checkpoint.name)
    save(folder, state_of(demo_checkpoint))
    done = convert(folder, tmp_path / "pack", scheme="int4")
    assert done.notes == ()
    names = sorted(file.name for file in pack_of("int4").iterdir())
    assert sorted(file.name for file in done.pack.iterdir()) == names
    for file in names:
        assert (done.pack / file).read_bytes() == (pack_of("int4") / file).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_dtype_comes_through(tmp_path, dtype):
    checkpoint = write_checkpoint(tmp_path / "a" / "checkpoint", dtype=dtype)
    folder = beside(checkpoint, tmp_path / "b" / "checkpoint")
    save_single(folder, state_of(checkpoint))
    for source in (checkpoint, folder):
        convert(source, source.parent / "pack", scheme="f32")
    for file in (tmp_path / "a" / "pack").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / "pack" / file.name).read_bytes()


def test_safetensors_win_where_both_are_there(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "pytorch_model.bin").write_bytes(b"nothing that is read")
    assert (
        read_checkpoint(checkpoint)
        .tensors["wte.weight"]
        .name.startswith(f"{checkpoint / 'model.safetensors'}: ")
    )


def test_missing_shard_of_bin_files_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    save_sharded(checkpoint, state_of(checkpoint), 2)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.bin: missing shard: download it"):
        read_checkpoint(checkpoint)


def test_bin_shards_without_their_index_are_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model-00001-of-00002.bin")
    index = "pytorch_model.bin.index.json"
    expected = f"{checkpoint}: pytorch_model-00001-of-00002.bin without {index}: download that too"
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(checkpoint)
    assert str(caught.value) == expected


def test_tensor_in_two_bin_shards_is_stored_twice(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    state = state_of(checkpoint)
    save_sharded(checkpoint, state, 2)
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"bin: transformer\.\S+: stored twice, also as /"):
        read_checkpoint(checkpoint)


def test_nothing_of_a_file_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "x.bin")
    found = torch_tensors(tmp_path / "x.bin")["a"]
    assert (found.dtype, found.shape, found.nbytes) == ("F32", (1000, 1000), 4_000_000)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        found.rows(0, 1)


# -- places and strides ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_views_are_read_as_torch_reads_them(tmp_path, options):
    base = torch.arange(120, dtype=torch.float32).reshape(10, 12)
    views = {
        "whole": base, "rows": base[3:7], "columns": base[:, 2:5], "transposed": base.t(),
        "block of the transposed": base.t()[2:9, 1:4], "every second row": base[::2],
        "one row": base[4], "one column, as a matrix": base[:, 3:4], "vector": base.view(-1)[5:77],
        "one": base[2:3, 3:4], "none": base[:0], "cube": base.view(2, 5, 12),
        "row of the transposed": base.t()[2:3],
    }  # fmt: skip
    torch.save(views, tmp_path / "x.bin", **options)
    found = torch_tensors(tmp_path / "x.bin")
    assert list(found) == list(views)
    for key, view in views.items():
        assert found[key].shape == tuple(view.shape)
        assert values(found[key]).tolist() == view.tolist(), key
        for start in range(0, len(view), 3):
            stop = min(start + 2, len(view))
            assert found[key].rows(start, stop).tolist() == view[start:stop].tolist(), key


@pytest.mark.parametrize(
    ("view", "strides"),
    [
        (lambda base: base[:, ::2], "[12, 2]"),
        (lambda base: base.view(-1)[::3], "[3]"),
        (lambda base: base[:1].expand(5, 12), "[0, 1]"),
        (lambda base: base.as_strided((5, 4), (2, 1)), "[2, 1]"),
        (lambda base: base.view(2, 5, 12).permute(2, 0, 1), "[1, 60, 12]"),
    ],
    ids=["columns apart", "elements apart", "repeated", "overlapping", "cube"],
)
def test_views_of_scattered_elements_are_refused_by_name(tmp_path, view, strides):
    base = torch.arange(120, dtype=torch.float32).reshape(10, 12)
    torch.save({"a": base, "h.0.x": view(base)}, tmp_path / "x.bin")
    found = refusal(tmp_path / "x.bin")
    assert found.startswith("h.0.x has shape [")
    assert f"with strides {strides}, expected rows or columns in one piece: call .contig" in found


@pytest.mark.parametrize(
    ("dtype", "ours"),
    [
        (torch.float64, "F64"), (torch.int64, "I64"), (torch.int32, "I32"), (torch.int16, "I16"),
        (torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.uint16, "U16"),
        (torch.uint32, "U32"), (torch.uint64, "U64"), (torch.float16, "F16"),
        (torch.bfloat16, "BF16"), (torch.float32, "F32"),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes_are_named_as_in_safetensors(tmp_path, dtype, ours):
    torch.save({"a": torch.ones(2, 3).to(dtype)}, tmp_path / "x.bin")
    found = torch_tensors(tmp_path / "x.bin")["a"]
    assert (found.dtype, values(found).dtype) == (ours, DTYPES[ours])
    assert values(found).tobytes() == torch.ones(2, 3).to(dtype).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("dtype", "asked"),
    [(torch.complex64, "torch.ComplexFloatStorage"), (torch.float8_e4m3fn, "torch.float8_e4m3fn")],
    ids=str,
)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype, asked):
    torch.save({"a": torch.ones(2).to(dtype)}, tmp_path / "x.bin")
    assert f"names {asked}, which no state dict needs" in refusal(tmp_path / "x.bin")


def test_a_weight_in_float64_is_refused_with_the_remedy(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    state = {name: tensor.double() for name, tensor in state_of(checkpoint).items()}
    save_single(checkpoint, state)
    (checkpoint / "model.safetensors").unlink()
    expected = r"weight is F64, expected one of F32, F16, BF16: save the model in one of them$"
    with pytest.raises(CheckpointError, match=expected):
        read_checkpoint(checkpoint)


# -- what is no state dict -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, expected a state dict"),
        (torch.ones(2), "holds a tensor, expected a state dict"),
        (None, "holds nothing, expected a state dict"),
        ({"model": {"a": torch.ones(2)}}, "model is a dict, expected a tensor: save the model's s"),
        ({"a": 1}, "a is a number, expected a tensor"),
        ({"a": None}, "a is nothing, expected a tensor"),
        ({0: torch.ones(2)}, "a tensor called 0, a number, expected a text"),
        ({"a": torch.float32}, "a is torch.float32, expected a tensor"),
        ({"a\nb": 1.5}, "'a\\nb' is a number, expected a tensor"),
        ({"a" * 5000: 1.5}, "'" + "a" * 99 + " is a number, expected a tensor"),
        ({(1, 2): torch.ones(2)}, "a tuple as a key, expected a text or a number, at byte"),
        ({1 << 64: torch.ones(2)}, "a number as a key, expected a text or a number, at byte"),
        ({"a": {1, 2}}, "names __builtin__.set, which no state dict needs: it was not imported"),
        ({"a": b"bytes"}, "names _codecs.encode, which no state dict needs"),
        ({"a": 1 + 2j}, "names __builtin__.complex, which no state dict needs"),
        (torch.nn.Linear(2, 2), "names torch.nn.modules.linear.Linear, which no state dict needs"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_other_content_is_refused_by_name(tmp_path, content, message, options):
    torch.save(content, tmp_path / "x.bin", **options)
    assert message in refusal(tmp_path / "x.bin")


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(InputNotFound, match=r"x\.bin: no such file$"):
        torch_tensors(tmp_path / "x.bin")


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "x.bin").mkdir()
    assert refusal(tmp_path / "x.bin") == "is not a regular file"


@pytest.mark.parametrize("content", [b"", b"P", b"PK", b"{}", b"PK\5\6" + bytes(18), bytes(100)])
def test_files_of_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    expected = "neither a zip archive nor a pickle: not a file of torch's"
    assert refusal(tmp_path / "x.bin") == expected


# -- damaged archives ------------------------------------------------------------------------------

ONE = program(mapping(a=tensor()))


def test_an_archive_by_hand_is_read(tmp_path):
    path = archive(tmp_path / "x.bin", ONE, byteorder=b"little", version=b"3\n")
    assert values(torch_tensors(path)["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(shape=(2, 4), strides=(4, 1)), "a reaches beyond its storage of 24 bytes: damaged"),
        (tensor(offset=1), "a reaches beyond its storage of 24 bytes"),
        (tensor(offset=7, shape=(0, 3)), "a reaches beyond its storage of 24 bytes"),
        (tensor(shape=(2, 3), strides=(1 << 61, 1)), "a reaches beyond its storage of 24 bytes"),
        (tensor(shape=(1 << 61, 1 << 61), strides=(0, 0)), "with strides [0, 0], expected rows or"),
        (tensor(shape=(1 << 60,), strides=(0,)), "with strides [0], expected rows or columns"),
        (tensor(offset=-1), "a tensor whose offset, shape or strides are no sizes: damaged"),
        (tensor(shape=(-2, 3)), "a tensor whose offset, shape or strides are no sizes"),
        (tensor(strides=(-3, 1)), "a tensor whose offset, shape or strides are no sizes"),
        (tensor(shape=(1 << 62, 1)), "a tensor whose offset, shape or strides are no sizes"),
        (tensor(shape=[1] * 9, strides=[1] * 9), "a tensor whose offset, shape or strides are no"),
        (tensor(shape=(6,)), "a tensor of 1 extents and 2 strides: damaged"),
        (tensor(b"N"), "a tensor of nothing, expected of a storage"),
        (tensor(tensor()), "a tensor of a tensor, expected of a storage"),
        (called(REBUILD, stored()), "a tensor of 1 arguments, expected 6 or 7"),
        (
            called(REBUILD, stored(), number(0), sizes((6,)), sizes((1,)), FALSE, mapping(x=FALSE)),
            "a tensor with backward hooks or metadata, which no weight needs",
        ),
        (
            called(
                REBUILD, stored(), number(0), sizes((6,)), sizes((1,)), FALSE, ORDERED,
                mapping(neg=b"\x88"),
            ),
            "a tensor with backward hooks or metadata, which no weight needs",
        ),
        (
            called(name("torch._utils", "_rebuild_tensor_v3"), stored()),
            "an untyped tensor without storage or dtype: damaged",
        ),
        (
            called(name("torch._utils", "_rebuild_parameter"), b"N", FALSE, ORDERED),
            "a parameter that is not made of a tensor: damaged",
        ),
        (called(name("collections", "OrderedDict"), b"]"), "an OrderedDict made of arguments, exp"),
        (called(name("torch", "Size"), b"]"), "a torch.Size of other things than sizes: damaged"),
        (group(text("storage")) + b"Q", "a persistent id of another form than a storage's"),
        (group(text("module"), *[b"N"] * 4) + b"Q", "a persistent id of another form than a stor"),
        (text("0") + b"Q", "a persistent id of another form than a storage's: damaged"),
        (stored(kind="float32"), "a storage of class torch.float32, expected one of torch's typed"),
        (stored(count=-1), "a storage without key, device or size: damaged"),
        (
            group(text("storage"), name("torch", "FloatStorage"), number(0), text("cpu"), number(6))
            + b"Q",
            "a storage without key, device or size: damaged",
        ),
        (
            group(
                text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(6),
                group(text("1"), number(0), number(6)),
            )
            + b"Q",
            "storage 0 is a view of another, as before torch 0.4 only: save the model with a newer",
        ),
        (tensor(stored("1")), "no storage 1: damaged, download it again"),
        (tensor(stored("../0")), "no storage ../0: damaged, download it again"),
        (tensor(stored(count=7)), "storage 0 takes 24 bytes of the archive, expected 28 fo"),
        (tensor(stored(kind="HalfStorage")), "the archive, expected 12 for 6 of F16: damaged, dow"),
        (
            tensor(stored(count=1 << 61)),
            f"storage 0 takes 24 bytes of the archive, expected {1 << 63} for {1 << 61} of F32",
        ),
        (
            group(stored(), stored(kind="HalfStorage")),
            "storage 0 with a second type or size at byte",
        ),
    ],
    ids=said,
)  # fmt: skip
def test_tensors_that_cannot_be_are_refused(tmp_path, body, message):
    assert message in refusal(archive(tmp_path / "x.bin", program(mapping(a=body))))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"byteorder": b"big"}, "byte order big, expected little: save the model on a little-end"),
        ({"byteorder": b"\xff\n" * 100}, "expected little: save the model on a little-endian mach"),
        ({"byteorder": b""}, "byte order , expected little"),
        ({"../../x": b"1"}, "an entry is called archive/../../x, expected names as torch writes"),
        ({"/etc/passwd": b"1"}, "an entry is called archive//etc/passwd, expected names as torch"),
        ({"a\\b": b"1"}, "an entry is called archive/a\\b, expected names as torch writes them"),
        ({"./b": b"1"}, "an entry is called archive/./b, expected names as torch writes them"),
        ({"b/": b""}, "an entry is called archive/b/, expected names as torch writes them"),
        ({"x" * 1100: b"1"}, "expected names as torch writes them"),
        ({"data/0": SIX}, "two entries are called archive/data/0: damaged"),
        ({"data.pkl": ONE}, "two entries are called archive/data.pkl: damaged"),
    ],
    ids=said,
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_torch_would_not_write_are_refused(tmp_path, entries, message):
    assert message in refusal(archive(tmp_path / "x.bin", ONE, **entries))


def zipped(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for entry, data in entries.items():
            file.writestr(entry, data)
    return path


def test_an_archive_without_or_with_two_pickles_is_refused(tmp_path):
    none = zipped(tmp_path / "x.bin", {"a/b": b"1"})
    assert refusal(none) == "0 entries data.pkl, expected one: damaged"
    two = zipped(tmp_path / "x.bin", {"a/data.pkl": ONE, "b/data.pkl": ONE})
    assert refusal(two) == "2 entries data.pkl, expected one: damaged"
    deep = zipped(tmp_path / "x.bin", {"a/b/data.pkl": ONE})
    assert refusal(deep) == "0 entries data.pkl, expected one: damaged"


def test_a_compressed_archive_is_refused_by_name(tmp_path):
    path = zipped(tmp_path / "x.bin", {"a/data.pkl": ONE, "a/data/0": SIX}, zipfile.ZIP_DEFLATED)
    assert refusal(path) == (
        "entry a/data.pkl is compressed (method 8), as torch never writes: save the model again"
    )


def test_a_giant_pickle_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.torch_file.MOST_BYTES", 100)
    path = archive(tmp_path / "x.bin", ONE)
    assert refusal(path) == f"data.pkl of {len(ONE)} bytes, expected at most 100"


def test_an_archive_of_too_many_entries_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("bloomq.converters.stored_zip._MOST_ENTRIES", 1)
    path = archive(tmp_path / "x.bin", ONE)
    assert refusal(path) == "an archive of 2 entries, expected at most 1: not a model"


def test_what_follows_the_pickle_is_refused(tmp_path):
    path = archive(tmp_path / "x.bin", ONE + ONE)
    assert refusal(path) == "data.pkl goes on behind its end: damaged"


def edited(path: Path, signature: bytes, at: int, value: bytes, *, last: bool = False) -> Path:
    """Overwrites bytes of the first (or last) record of an archive with this signature."""
    data = bytearray(path.read_bytes())
    start = (data.rfind if last else data.find)(signature) + at
    assert start >= at
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


LOCAL, ENTRY, END, END_64, LOCATOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
AGAIN = ": damaged or truncated, download it again"
SIZE_64 = struct.pack("<Q", 1 << 63)


@pytest.mark.parametrize(
    ("signature", "at", "value", "last", "message"),
    [
        (END, 0, b"PK\5\7", False, "no end of an archive's directory"),
        (END, 4, b"\1\0", False, "an archive of several parts, or with a comment"),
        (END, 8, b"\1\0", False, "an archive of several parts, or with a comment"),
        (END, 20, b"\1\0", False, "an archive of several parts, or with a comment"),
        (END, 12, b"\0\0\0\0", False, "the directory of 0 bytes from "),
        (END, 16, b"\0\0\0\0", False, "bytes from 0 does not end at "),
        (END, 8, b"\1\0\1\0", False, "the archive's directory has more than its entries"),
        (END, 8, b"\3\0\3\0", False, "no entry 2 in the archive's directory"),
        (ENTRY, 0, b"PK\1\3", False, "no entry 0 in the archive's directory"),
        (ENTRY, 8, b"\1\0", False, "entry archive/data.pkl has flags 0x0001, encrypted or unknown"),
        (ENTRY, 8, b"\0\4", False, "entry archive/data.pkl has flags 0x0400, encrypted or unknown"),
        (ENTRY, 20, b"\1\0\0\0", True, "entry archive/data/0 has 1 bytes for 24"),
        (ENTRY, 28, b"\xff\xff", True, "entry 1 runs out of the archive's directory"),
        (ENTRY, 42, b"\xff\xff\0\0", True, "entry archive/data/0 lies behind the archive's end"),
        (ENTRY, 42, b"\0\0\0\0", True, "entry archive/data/0 is not where the directory says"),
        (ENTRY, 42, b"\xff\xff\xff\xff", True, "entry archive/data/0 lacks its long sizes"),
        (ENTRY, 20, b"\xff" * 8, True, "entry archive/data/0 lacks its long sizes"),
        (LOCAL, 0, b"PK\3\5", True, "entry archive/data/0 is not where the directory says"),
        (LOCAL, 26, b"\1\0", True, "entry archive/data/0 is not where the directory says"),
        (LOCAL, 30, b"X", True, "entry archive/data/0 is not where the directory says"),
        (LOCAL, 8, b"\x08\0", True, "entry archive/data/0 is stored in two ways"),
        (LOCAL, 6, b"\1\0", True, "entry archive/data/0 is stored in two ways"),
        (LOCAL, 22, b"\1", True, "entry archive/data/0 is stored in two ways"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, signature, at, value, last, message):
    path = edited(archive(tmp_path / "x.bin", ONE), signature, at, value, last=last)
    found = refusal(path)
    assert message in found
    assert found.endswith(AGAIN)


def test_entries_that_overlap_are_refused(tmp_path):
    path = edited(archive(tmp_path / "x.bin", ONE), LOCAL, 28, b"\x28\0")
    assert refusal(path) == "entry archive/data/0 overlaps another: damaged"
    path = edited(archive(tmp_path / "x.bin", ONE), LOCAL, 28, b"\xff\xff")
    assert refusal(path) == "entry archive/data.pkl overlaps another: damaged"


@pytest.mark.parametrize(
    ("signature", "at", "value", "message"),
    [
        (END_64, 0, b"PK\6\5", "no long directory where the archive says"),
        (LOCATOR, 8, SIZE_64, "no long directory where the archive says"),
        (END_64, 24, SIZE_64, "an archive of several parts, or with a comment"),
        (END_64, 40, SIZE_64, "the directory of 9223372036854775808 bytes from "),
        (END_64, 48, SIZE_64, "bytes from 9223372036854775808 does not end at "),
        (LOCATOR, 0, b"PK\6\5", "does not end at "),
    ],
)
def test_a_damaged_long_directory_is_refused(tmp_path, signature, at, value, message):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    assert message in refusal(edited(tmp_path / "x.bin", signature, at, value))


def test_a_long_directory_that_begins_before_the_file_is_refused(tmp_path):
    end = END + struct.pack("<4H2IH", 0, 0, 0, 0, 0, 0, 0)
    (tmp_path / "x.bin").write_bytes(LOCAL + LOCATOR + bytes(16) + end)
    assert refusal(tmp_path / "x.bin") == f"no place for the archive's long directory{AGAIN}"


def test_an_archive_beyond_4_gb_is_read_where_it_says(tmp_path):
    """Sparse: a storage of 2 bytes lies behind one of 5 GB, and their places take 64 bits."""
    pickle = program(
        mapping(
            a=tensor(stored("0", "ByteStorage", 5 << 30), 0, (5 << 10, 1 << 20), (1 << 20, 1)),
            b=tensor(stored("1", "ByteStorage", 2), 0, (2,), (1,)),
        )
    )
    sizes_of = {"a/data.pkl": len(pickle), "a/data/0": 5 << 30, "a/data/1": 2}
    directory, path = b"", tmp_path / "x.bin"
    with path.open("wb") as file:
        for entry, nbytes in sizes_of.items():
            at, raw = file.tell(), entry.encode()
            head = struct.pack("<2H3H3I2H", 45, 0x808, 0, 0, 0, 0, 0, 0, len(raw), 0)
            file.write(LOCAL + head + raw)
            file.write({"a/data.pkl": pickle, "a/data/1": b"\x05\x06"}.get(entry, b""))
            if nbytes == 5 << 30:
                file.seek(nbytes - 1, 1)
                file.write(b"\x09")
            long = [value for value in (nbytes, nbytes, at) if value > 0xFFFFFFFE]
            extra = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
            extra = (b"\x99\0\2\0zz" + extra) if long else b""
            short = [min(value, 0xFFFFFFFF) for value in (nbytes, nbytes, at)]
            directory += ENTRY + struct.pack(
                "<6H3I5H2I", 45, 45, 0x808, 0, 0, 0, 0, *short[:2], len(raw), len(extra), 0, 0, 0,
                0, short[2],
            ) + raw + extra  # fmt: skip
        at = file.tell()
        file.write(directory)
        end = file.tell()
        file.write(
            END_64 + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 3, 3, end - at, at)
            + LOCATOR + struct.pack("<IQI", 0, end, 1)
            + END + struct.pack("<4H2IH", 0, 0, 3, 3, len(directory), 0xFFFFFFFF, 0)
        )  # fmt: skip
    found = torch_tensors(path)
    assert values(found["b"]).tolist() == [5, 6]
    assert found["a"].rows(5119, 5120)[0, -2:].tolist() == [0, 9]


# -- damaged files of the older form ---------------------------------------------------------------

MAGIC = program(number(0x1950A86A20F9469CFC6C))
HEAD = MAGIC + program(number(1001)) + program(mapping(little_endian=b"\x88"))
OLD = HEAD + ONE + program(b"]" + text("0") + b"a")
COUNT = struct.pack("<Q", 6)


def test_the_older_form_by_hand_is_read(tmp_path):
    (tmp_path / "x.bin").write_bytes(OLD + COUNT + SIX)
    assert values(torch_tensors(tmp_path / "x.bin")["a"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (program(number(5)), "a pickle, but not of torch's: not a state dict"),
        (program(EMPTY), "a pickle, but not of torch's: not a state dict"),
        (MAGIC + program(number(1000)), "ends at byte"),
        (MAGIC + program(number(1000)) + program(b"}"), "another version than 1001 of torch's"),
        (MAGIC + program(number(1001)) + program(b"]"), "another version than 1001 of torch's for"),
        (MAGIC + program(number(1001)) + program(b"}"), "not of a little-endian machine: save the"),
        (
            MAGIC + program(number(1001)) + program(mapping(little_endian=FALSE)),
            "not of a little-endian machine: save the model on one",
        ),
        (HEAD + ONE, "within a value: truncated, download it again"),
        (HEAD + ONE + program(b"]"), "its storages are others than its tensors name: damaged"),
        (HEAD + ONE + program(text("0")), "its storages are others than its tensors name"),
        (HEAD + ONE + program(b"]" + b"K\0a"), "its storages are others than its tensors name"),
        (
            HEAD + ONE + program(b"]" + (text("0") + b"a") * 2) + (COUNT + SIX) * 2,
            "its storages are others than its tensors name: damaged",
        ),
        (
            HEAD + ONE + program(b"](" + text("0") + text("1") + b"e") + (COUNT + SIX) * 2,
            "its storages are others than its tensors name: damaged",
        ),
        (OLD, "ends within storage 0: truncated, download it again"),
        (OLD + COUNT + SIX[:-1], "ends within storage 0: truncated, download it again"),
        (OLD + struct.pack("<Q", 7) + SIX, "storage 0 is not as long as its tensors say: damaged"),
        (OLD + SIZE_64 + SIX, "storage 0 is not as long as its tensors say: damaged"),
        (OLD + COUNT + SIX + b"!", "1 bytes behind the last storage: damaged"),
        (HEAD + program(b"}") + program(b"]") + SIX, "24 bytes behind the last storage: damaged"),
    ],
    ids=said,
)  # fmt: skip
def test_damage_of_the_older_form_is_refused(tmp_path, content, message):
    (tmp_path / "x.bin").write_bytes(content)
    assert message in refusal(tmp_path / "x.bin")


# -- any damage ------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, LEGACY], ids=["archive", "legacy"])
def small(request, tmp_path) -> Path:
    """A file of some 1,500 bytes as torch writes it: three tensors, one transposed."""
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    content = {"a": base, "b": base.t(), "c": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(content, tmp_path / "x.bin", **request.param)
    return tmp_path / "x.bin"


def outcome(path: Path) -> str:
    """ "read", or the error's message: whatever is handed out can be read."""
    try:
        for found in torch_tensors(path).values():
            if found.shape:
                assert values(found).nbytes <= path.stat().st_size
    except CheckpointError as error:
        return str(error)
    return "read"


def test_every_truncation_is_refused(small):
    """In place: a file that is written anew each time waits for the disk."""
    assert outcome(small) == "read"
    with small.open("r+b", buffering=0) as file:
        for size in reversed(range(small.stat().st_size)):
            file.truncate(size)
            assert outcome(small) != "read"


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x80])
def test_every_flipped_byte_is_refused_or_harmless(small, flip):
    refused = 0
    with small.open("r+b", buffering=0) as file:
        for at, byte in enumerate(small.read_bytes()):
            for now in (byte ^ flip, byte):
                file.seek(at)
                file.write(bytes([now]))
                refused += now != byte and outcome(small) != "read"
    assert outcome(small) == "read"
    assert refused > 250


def test_a_file_cut_short_behind_our_back_is_an_error(small):
    found = torch_tensors(small)
    size = small.stat().st_size
    with small.open("r+b") as file:
        file.truncate(300)
    for one in found.values():
        with pytest.raises(CheckpointError, match=f"shorter than the {size} bytes it had"):
            values(one)
