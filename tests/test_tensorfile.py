"""Safetensors files: one written out by hand, and every way in which one can be wrong."""

import io
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bloomq.errors import BloomqError, CheckpointError, InputNotFound
from bloomq.tensorfile import Entry, TensorFile

HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},'
    b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    b'"c":{"dtype":"I8","shape":[],"data_offsets":[12,13]}}  '
)
DATA = b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x80\x3f\x00\x40\xff"
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + DATA


def written(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (bytes, or to be JSON), data and header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, end: int, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(path: Path) -> str:
    """The one-line message with which opening `path` fails, without the path it must begin with."""
    with pytest.raises(CheckpointError) as caught:
        TensorFile.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# -- reading ---------------------------------------------------------------------------------------


def test_file_written_by_hand_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    file = TensorFile.open(path)
    start = 8 + len(HEADER)
    assert (file.path, file.size) == (path, len(WHOLE))
    assert file.entries == {
        "a": Entry("F32", (1, 2), start, 8),
        "b": Entry("BF16", (2,), start + 8, 4),
        "c": Entry("I8", (), start + 12, 1),
    }
    assert file.array("a").tolist() == [[1.0, -2.0]]
    assert file.array("b").tolist() == [0x3F80, 0x4000]
    assert file.array("c").tolist() == -1
    assert file.raw("b").tobytes() == DATA[8:12]


def test_views_cannot_be_written(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    with pytest.raises(ValueError, match="read-only"):
        TensorFile.open(path).array("a")[0, 0] = 1


def test_every_dtype_of_the_library_comes_back(tmp_path):
    kinds = "f4 f2 f8 i1 u1 i2 u2 i4 u4 i8 u8 ?"
    arrays = {k: np.arange(6).reshape(2, 3).astype(k) for k in kinds.split()}
    save_file(arrays, tmp_path / "x.safetensors")
    file = TensorFile.open(tmp_path / "x.safetensors")
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)
        assert file.array(name).dtype == array.dtype


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        max_size=6,
    )
)
def test_whatever_the_library_writes_is_read(tmp_path_factory, shapes):
    arrays = {name: np.full(shape, i, np.int16) for i, (name, shape) in enumerate(shapes.items())}
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    save_file(arrays, path)
    file = TensorFile.open(path)
    assert {name: file.array(name).tolist() for name in file.entries} == {
        name: array.tolist() for name, array in arrays.items()
    }


# -- damage ----------------------------------------------------------------------------------------


def test_absent_file_is_named(tmp_path):
    with pytest.raises(InputNotFound) as caught:
        TensorFile.open(tmp_path / "x")
    assert str(caught.value) == f"{tmp_path / 'x'}: no such file"


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_too_short_for_a_header_length_names_the_file(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0"[:size])
    assert refusal(path) == f"{size} bytes: not a safetensors file"


def test_folder_in_place_of_a_file_is_named(tmp_path):
    assert refusal(tmp_path) == "is not a regular file"


def test_truncated_header_names_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    for size in range(8, 8 + len(HEADER)):
        path.write_bytes(WHOLE[:size])
        assert refusal(path).startswith("damaged or truncated (Error while deserializing header")


def test_truncated_data_names_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    for size in range(8 + len(HEADER), len(WHOLE)):
        path.write_bytes(WHOLE[:size])
        assert "not fully covered" in refusal(path)


def test_bytes_after_the_data_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE + b"\0")
    assert "not fully covered" in refusal(path)


A4, EIGHT = {"a": tensor(0, 4)}, b"12345678"


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"", b"", "damaged or truncated"),
        (b"null", b"", "invalid JSON"),
        (b"[]", b"", "invalid JSON"),
        (b'"a"', b"", "damaged or truncated"),
        (b"\xff\xfe{}", b"", "damaged or truncated"),
        (b"[" * 50_000, b"", "damaged or truncated"),
        (b'{"a":' * 50_000, b"", "damaged or truncated"),
        ({"a": None}, b"", "damaged or truncated"),
        ({"a": {}}, b"", "missing field"),
        ({"a": {**tensor(0, 4), "dtype": "F33"}}, b"1234", "unknown variant"),
        ({"a": {**tensor(0, 4), "dtype": 32}}, b"1234", "damaged or truncated"),
        ({"a": tensor(0, 4, shape=[-1])}, b"1234", "invalid value: integer `-1`"),
        ({"a": tensor(0, 4, shape=[1.5])}, b"1234", "invalid type: floating point"),
        ({"a": tensor(0, 4, shape=[2**64])}, b"1234", "damaged or truncated"),
        ({"a": tensor(0, 4, shape=[2**62, 2**62])}, b"1234", "overflow"),
        ({"a": tensor(0, 4, shape=[2**40])}, b"1234", "damaged or truncated"),
        ({"a": tensor(0, 4, shape=[2])}, b"1234", "damaged or truncated"),
        ({"a": tensor(0, 4, shape=1)}, b"1234", "damaged or truncated"),
        ({"a": tensor(4, 0)}, b"1234", "damaged or truncated"),
        ({"a": tensor(-4, 0)}, b"1234", "damaged or truncated"),
        ({"a": tensor(4, 8)}, EIGHT, "invalid offset for tensor `a`"),
        ({"a": tensor(0, 2**63)}, b"1234", "damaged or truncated"),
        ({"a": {**tensor(0, 4), "data_offsets": [0]}}, b"1234", "damaged or truncated"),
        ({"a": {**tensor(0, 4), "data_offsets": [0, 4, 8]}}, b"1234", "damaged or truncated"),
        ({**A4, "b": tensor(0, 4)}, b"1234", "invalid offset for tensor"),
        ({**A4, "b": tensor(2, 6)}, EIGHT, "invalid offset for tensor `b`"),
        ({**A4, "b": tensor(8, 12)}, EIGHT + b"1234", "invalid offset for tensor `b`"),
        (A4, EIGHT, "not fully covered"),
        (A4, b"123", "not fully covered"),
        ({**A4, "__metadata__": {"x": 1}}, b"1234", "damaged or truncated"),
        ({**A4, "__metadata__": []}, b"1234", "damaged or truncated"),
    ],
)
def test_damaged_header_names_the_file(tmp_path, header, data, reason):
    found = refusal(written(tmp_path, header, data))
    assert found.startswith("damaged or truncated (")
    assert reason in found


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 10_000, 1])
def test_wrong_header_length_names_the_file(tmp_path, length):
    assert "damaged or truncated (" in refusal(written(tmp_path, A4, b"1234", length))


def test_key_twice_with_other_bytes_is_refused(tmp_path):
    first = json.dumps(A4)[:-1].encode()
    second = b', "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    assert "invalid offset for tensor `a`" in refusal(written(tmp_path, first + second, EIGHT))


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 4), ("C64", 32), ("F4", 2)])
def test_dtype_that_is_valid_but_foreign_names_the_tensor(tmp_path, dtype, size):
    path = written(tmp_path, {"h.0.x": tensor(0, size, dtype, [4])}, bytes(size))
    assert refusal(path) == f"h.0.x has dtype {dtype}, which bloomq does not read"


def zip_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [zip_file(), *(pickle.dumps({"a": list(range(20))}, p) for p in (2, 3, 4, 5))]
)
def test_pickle_under_a_safetensors_name_is_refused_unopened(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert refusal(path) == (
        "is a PyTorch pickle, which bloomq never opens (it can run code): save the model as "
        "safetensors"
    )


def test_file_that_grows_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, A4, b"1234")
    longer = {**A4, "b": tensor(4, 8)}
    really_open = safetensors.safe_open

    def open_after_a_change(*args: Any, **options: Any) -> Any:
        written(tmp_path, longer, EIGHT)
        return really_open(*args, **options)

    size = path.stat().st_size
    monkeypatch.setattr(safetensors, "safe_open", open_after_a_change)
    assert refusal(path) == f"{size} bytes, expected {size + 4} by its header"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(tmp_path_factory, at, byte):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    opened = None
    with suppress(BloomqError):
        opened = TensorFile.open(path)
    assert opened is None or sum(opened.raw(name).size for name in opened.entries) == len(DATA)


# -- known gaps ------------------------------------------------------------------------------------


def test_tensor_name_with_a_line_break_stays_on_one_line(tmp_path):
    path = written(tmp_path, {"a\nb": tensor(0, 4, "F8_E4M3", [4])}, b"1234")
    assert "which bloomq does not read" in refusal(path)


def test_file_name_too_long_for_the_system_is_an_error_of_ours(tmp_path):
    with pytest.raises(BloomqError):
        TensorFile.open(tmp_path / ("x" * 300))
