"""Hostile pickles: each would run code or exhaust memory if it were unpickled, and is refused by
name, in one line, with nothing run.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.opcodes import REFUSED, STEPS
from bloomq.converters.pickled import read_pickle
from bloomq.converters.reading import read_checkpoint
from bloomq.converters.stream import Stream
from bloomq.converters.torch_file import open_torch, torch_tensors
from bloomq.converters.torch_values import Placeholder
from conftest import write_checkpoint
from torch_files import (
    EMPTY,
    FALSE,
    ORDERED,
    REBUILD,
    archive,
    called,
    group,
    mapping,
    name,
    number,
    program,
    said,
    sizes,
    stored,
    tensor,
    text,
)

from bloomq.errors import CheckpointError

FLAG = "bloomq-flag"  # the file that every mine would write, in the current folder
CODE = f"open('{FLAG}', 'w').close()"
SYSTEM = called(name("os", "system"), text(f"touch {FLAG}"))
UNNEEDED = ", which no state dict needs: it was not imported and nothing was run; save the model as"


class _Mine:
    """What unpickling it runs writes the file."""

    def __reduce__(self) -> Any:
        return exec, (CODE,)


class _Stateful:
    def __init__(self) -> None:
        self.state = 1

    def __setstate__(self, state: Any) -> None:
        exec(CODE)


def new(made_by: bytes, *arguments: bytes) -> bytes:
    return made_by + group(*arguments) + b"\x81"


# What is pickled, and what the refusal says of it.
MINES: dict[str, tuple[bytes, str]] = {
    "os.system": (SYSTEM, "names os.system"),
    "posix.system": (called(name("posix", "system"), text(f"touch {FLAG}")), "names posix.system"),
    "eval": (called(name("builtins", "eval"), text(CODE)), "names builtins.eval"),
    "exec": (called(name("builtins", "exec"), text(CODE)), "names builtins.exec"),
    "exec of Python 2": (called(name("__builtin__", "exec"), text(CODE)), "names __builtin__.exec"),
    "getattr": (
        called(
            called(name("builtins", "getattr"), called(name("builtins", "__import__"), text("os")),
                   text("system")),
            text(f"touch {FLAG}"),
        ),
        "names builtins.getattr",
    ),
    "in a tensor's arguments": (
        called(REBUILD, SYSTEM, number(0), sizes((6,)), sizes((1,)), FALSE, ORDERED),
        "names os.system",
    ),
    "in a tensor's size": (
        called(REBUILD, stored(), number(0), group(SYSTEM), sizes((1,)), FALSE, ORDERED),
        "names os.system",
    ),
    "in a tensor's hooks": (
        called(REBUILD, stored(), number(0), sizes((6,)), sizes((1,)), FALSE, SYSTEM),
        "names os.system",
    ),
    "in a persistent id": (
        group(text("storage"), name("torch", "FloatStorage"), SYSTEM, text("cpu"), number(6))
        + b"Q",
        "names os.system",
    ),
    "as a key": (b"}" + SYSTEM + b"Ns", "names os.system"),
    "as a state": (ORDERED + SYSTEM + b"b", "names os.system"),
    "in the metadata": (ORDERED + mapping(_metadata=SYSTEM) + b"b", "names os.system"),
    "behind a tensor": (group(tensor(), SYSTEM), "names os.system"),
    "INST": (b"(" + text(f"touch {FLAG}") + b"ios\nsystem\n", "opcode INST"),
    "OBJ": (
        b"(" + name("subprocess", "getoutput") + text(f"touch {FLAG}") + b"o",
        "names subprocess.getoutput",
    ),
    "OBJ of an admitted name": (b"(" + name("torch", "Size") + b"o", "opcode OBJ"),
    "NEWOBJ": (
        new(name("subprocess", "Popen"), group(text("touch"), text(FLAG))), "names subprocess.Popen"
    ),
    "NEWOBJ of an admitted name": (new(name("collections", "OrderedDict")), "opcode NEWOBJ, which"),
    "NEWOBJ_EX": (
        name("collections", "OrderedDict") + EMPTY + b"}\x92", "opcode NEWOBJ_EX, which no state"
    ),
    "EXT1": (b"\x82\1" + EMPTY + b"R", "opcode EXT1, which no state dict needs: nothing was run"),
    "EXT2": (b"\x83\1\0" + EMPTY + b"R", "opcode EXT2, which no state dict needs"),
    "EXT4": (b"\x84\1\0\0\0" + EMPTY + b"R", "opcode EXT4, which no state dict needs"),
    "names on the stack": (
        text("os") + text("system") + b"\x93" + group(text(f"touch {FLAG}")) + b"R",
        "names os.system",
    ),
    "names from the memo": (
        text("system") + b"q\7" + text("os") + b"q\x08"  # as two values of a list, then asked for
        b"h\x08h\7\x93" + group(text(f"touch {FLAG}")) + b"R" + b"\x87",
        "names os.system",
    ),
    "a name with dots": (
        text("builtins") + text("exec.__call__") + b"\x93" + group(text(CODE)) + b"R",
        "names builtins.exec.__call__",
    ),
    "a name below torch": (
        text("torch") + text("serialization.os.system") + b"\x93" + group(text(f"touch {FLAG}"))
        + b"R",
        "names torch.serialization.os.system",
    ),
    "torch.hub": (called(name("torch.hub", "load"), text("x")), "names torch.hub.load"),
    "torch's own loader": (
        called(name("torch.storage", "_load_from_bytes"), b"C\0"),
        "names torch.storage._load_from_bytes",
    ),
    "torch's tensor of another type": (
        called(name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), EMPTY),
        "names torch._tensor._rebuild_from_type_v2",
    ),
    "torch's typed storage": (
        called(name("torch.storage", "TypedStorage")), "names torch.storage.TypedStorage"
    ),
    "Counter": (called(name("collections", "Counter")), "names collections.Counter"),
    "a method of OrderedDict": (
        called(name("collections", "OrderedDict.fromkeys"), b"]"),
        "names collections.OrderedDict.fromkeys",
    ),
    "copyreg": (
        called(name("copyreg", "_reconstructor"), name("builtins", "object")),
        "names copyreg._reconstructor",
    ),
    "marshal": (called(name("marshal", "loads"), b"C\0"), "names marshal.loads"),
    "pickle in a pickle": (called(name("_pickle", "loads"), b"C\0"), "names _pickle.loads"),
    "numpy": (
        called(name("numpy.core.multiarray", "_reconstruct"), b"N"),
        "names numpy.core.multiarray._reconstruct",
    ),
    "partial": (called(name("functools", "partial"), b"N"), "names functools.partial"),
    "codecs": (
        called(name("_codecs", "encode"), text("a"), text("latin1")), "names _codecs.encode"
    ),
    "a name without a module": (b"c\nexec\n" + EMPTY + b"R", "names .exec"),
    "a name of control codes": (b"cos\n\x1b[2Jsystem\n", r"names 'os.\x1b[2Jsystem'"),
    "an admitted name that is no maker": (
        called(name("torch", "FloatStorage"), number(6)), "torch.FloatStorage is called, which"
    ),
    "a call of a dict": (b"}" + EMPTY + b"R", "a dict is called, which makes nothing, at byte"),
    "a call of a tensor": (tensor() + EMPTY + b"R", "a tensor is called, which makes nothing"),
    "arguments that are no tuple": (REBUILD + b"]R", "arguments that are a list at byte"),
    "a state on a tensor": (tensor() + b"}b", "a state is set on a tensor at byte"),
    "a state on a plain dict": (b"}}b", "a state is set on a dict at byte"),
    "a state on a maker": (
        name("torch", "Size") + mapping(x=b"N") + b"b", "a state is set on torch.Size at byte"
    ),
    "a state in slots": (ORDERED + group(b"N", b"}") + b"b", "a state is set on a dict at"),
    "items on a tensor": (tensor() + text("a") + b"Ns", "items are set on a tensor at byte"),
    "items on a maker": (name("torch", "Size") + b"Na", "items are appended to torch.Size at"),
    "a number as a name": (number(1) + number(2) + b"\x93", "a name that is no text at byte"),
}  # fmt: skip
# Unpickled, these write the file.
LIVE = [
    "os.system", "posix.system", "eval", "exec", "exec of Python 2", "getattr",
    "as a key", "as a state", "in the metadata", "INST", "OBJ",
    "names on the stack", "names from the memo", "a name with dots",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        torch_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and not message.endswith(".") and len(message) < 1000
    return message


def machine(data: bytes, **options: Any) -> Any:
    """The value of a pickle in a file of its own."""
    Path("pickle").write_bytes(data)
    stream = Stream(Path("pickle"), len(data), 0, len(data), where="pickle")
    return read_pickle(stream, **options)[0]


def refused(data: bytes, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        machine(data, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# -- mines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("mine", MINES)
def test_mine_is_refused_by_name_and_runs_nothing(here, mine, protocol):
    body, message = MINES[mine]
    for content in (body, mapping(a=body), mapping(a=tensor(), b=group(body))):
        found = refusal(archive(here / "pytorch_model.bin", program(content, protocol)))
        assert message in found
        assert "nothing was run; save the model as" in found or found.endswith("damaged")
    old = program(number(0x1950A86A20F9469CFC6C)) + program(number(1001))
    old += program(mapping(little_endian=b"\x88")) + program(body)
    (here / "pytorch_model.bin").write_bytes(old)
    assert message in refusal(here / "pytorch_model.bin")
    assert not Path(FLAG).exists()


@pytest.mark.parametrize("mine", LIVE)
def test_mine_is_live(mine):
    """Python itself runs it: the table above is not of harmless text. In a process of its own: a
    pickle may do anything."""
    Path("mine").write_bytes(program(MINES[mine][0], 4 if "dots" in mine else 2))
    code = (
        "import pickle\nclass Reader(pickle.Unpickler):\n    persistent_load = print\n"
        "try: Reader(open('mine', 'rb')).load()\nexcept Exception as error: print(error)\n"
        "import time; time.sleep(0.2)"  # for a process that it started
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert Path(FLAG).exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("made", [_Mine, _Stateful])
def test_mine_that_python_pickled_is_refused(here, made, protocol):
    data = pickle.dumps({"a": made()}, protocol)
    found = refusal(archive(here / "pytorch_model.bin", data))
    assert UNNEEDED in found
    assert not Path(FLAG).exists()
    pickle.loads(data)
    assert Path(FLAG).exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_older_protocols_are_refused(protocol):
    data = pickle.dumps({"a": 1}, protocol)
    assert refused(data).startswith("pickle: does not begin as a pickle of protocol 2 or newer at")


def test_mine_in_a_checkpoint_is_refused(here):
    checkpoint = write_checkpoint(here / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    archive(checkpoint / "pytorch_model.bin", program(SYSTEM))
    expected = rf"pytorch_model.bin: data.pkl: names os.system{UNNEEDED}"
    with pytest.raises(CheckpointError, match=expected):
        read_checkpoint(checkpoint)
    assert not Path(FLAG).exists()


@pytest.mark.parametrize("mine", [mine for mine, (_, said) in MINES.items() if "names" in said])
def test_a_placeholder_of_a_mine_runs_nothing_either(here, mine):
    path = archive(here / "x.pt", program(mapping(a=MINES[mine][0]), 4))
    try:
        content = open_torch(path, unknown="keep").content
    except CheckpointError:  # such a thing where a tensor wants a number
        content = None
    assert content is None or isinstance(content, dict)
    assert not Path(FLAG).exists()


# -- placeholders ----------------------------------------------------------------------------------


def test_placeholders_remember_names_and_states():
    namespace = new(name("argparse", "Namespace")) + mapping(n=number(5)) + b"b"
    found = machine(program(mapping(args=namespace, rest=SYSTEM)), unknown="keep")
    assert str(found["args"].name) == "argparse.Namespace"
    assert found["args"].state == {"n": 5}
    assert str(found["rest"].name) == "os.system"
    assert isinstance(found["rest"], Placeholder) and found["rest"].state is None


def test_what_python_pickled_becomes_placeholders():
    """As the file of a run's arguments and of its generators' states has it."""
    args = argparse.Namespace(n=5, real=0.5, kind=np.float32(3))
    others = {
        "np": np.arange(9), "set": {1, 2}, "bytes": b"abc", "deque": deque([1, 2]),
        "counter": Counter("abca"), "path": Path("x"),
    }  # fmt: skip
    content = {"args": args, "rng": random.getstate(), "keys": {(1, 2): 3, "x": 4}, **others}
    found = machine(pickle.dumps(content, 2), unknown="keep")
    assert (found["args"].state["n"], found["args"].state["real"]) == (5, 0.5)
    assert found["rng"] == random.getstate()
    assert found["keys"] == {"x": 4}
    for key in others:
        assert isinstance(found[key], Placeholder), key


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (called(REBUILD, SYSTEM, *[b"N"] * 5), "a tensor of something of os.system, expected of a"),
        (
            called(REBUILD, stored(), SYSTEM, sizes((6,)), sizes((1,)), FALSE, ORDERED),
            "a tensor whose offset, shape or strides are no sizes",
        ),
        (
            called(REBUILD, stored(), number(0), sizes((6,)), sizes((1,)), FALSE, SYSTEM),
            "a tensor with backward hooks or metadata",
        ),
        (
            called(REBUILD, stored(), number(0), sizes((6,)), sizes((1,)), FALSE, ORDERED, SYSTEM),
            "a tensor with backward hooks or metadata",
        ),
        (SYSTEM + b"Q", "a persistent id of another form"),
        (
            group(text("storage"), SYSTEM, text("0"), text("cpu"), number(6)) + b"Q",
            "a storage of class something of os.system, expected one of torch's typed ones",
        ),
        (called(name("torch", "Size"), SYSTEM), "a torch.Size of other things than sizes"),
        (REBUILD + SYSTEM + b"R", "arguments that are something of os.system"),
        (b"\x8f", "opcode EMPTY_SET"),
    ],
    ids=said,
)
def test_placeholders_are_nothing_that_a_tensor_takes(body, message):
    assert message in refused(program(body), unknown="keep")


# -- opcodes ---------------------------------------------------------------------------------------


def test_every_opcode_of_pickle_is_admitted_or_refused_by_its_name():
    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    assert set(STEPS) | set(REFUSED) == set(names)
    assert set(STEPS) & set(REFUSED) == {0x81}  # NEWOBJ, for placeholders alone
    assert {code: names[code] for code in REFUSED} == REFUSED


@pytest.mark.parametrize("code", sorted(set(REFUSED) - {0x81}), ids=REFUSED.get)
def test_refused_opcode_is_named(code):
    expected = f"pickle: opcode {REFUSED[code]}, which no state dict needs: nothing was run; save"
    assert refused(program(bytes([code]) + b"1\n" * 20)).startswith(expected)


@pytest.mark.parametrize("code", sorted(set(range(256)) - set(STEPS) - set(REFUSED)))
def test_byte_that_is_no_opcode_is_named(code):
    assert f"byte {code:#04x}, which is no opcode, at byte 3" in refused(program(bytes([code])))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_python_reads_them(protocol):
    values = {
        "none": None, "true": True, "false": False, "zero": 0, "byte": 255, "word": 65535,
        "int": -(1 << 31), "long": 1 << 62, "negative": -(1 << 200), "real": -0.1, "text": "déjà",
        "long text": "x" * 1000, "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "list": [1, [2, []]], "dict": {"a": {}, 3: "b"}, "one": {"x": [None]},
    }  # fmt: skip
    if protocol > 2:
        values |= {"bytes": b"abc", "long bytes": b"x" * 1000}
    found = machine(pickle.dumps(values, protocol))
    assert found == values
    assert [type(value) for value in found.values()] == [type(v) for v in values.values()]


def test_values_with_lengths_of_8_bytes_are_read():
    long = struct.pack("<Q", 3)
    assert machine(program(b"\x8d" + long + b"abc" + b"\x8e" + long + b"abc\x86", 4)) == (
        "abc", b"abc",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0, within a value: truncated, download it again"),
        (b"\x80", "ends at byte 1, within a value"),
        (b"\x80\2", "ends at byte 2, within a value"),
        (b"\x80\6N.", "protocol 6, expected 2 to 5, at byte 2: damaged"),
        (b"\x80\1N.", "protocol 1, expected 2 to 5, at byte 2"),
        (b"N.", "does not begin as a pickle of protocol 2 or newer at byte 1"),
        (program(b""), "a value is missing at byte 3"),
        (program(b"NN"), "values are left over at byte 5"),
        (program(b"N(N"), "values are left over at byte"),
        (program(b"\x86"), "a value is missing at byte 3"),
        (program(b"N\x87"), "a value is missing at byte 4"),
        (program(b"t"), "a mark is missing at byte 3"),
        (program(b"e"), "a mark is missing at byte 3"),
        (program(b"(e"), "a value is missing at byte 4"),
        (program(b"(u"), "a value is missing at byte"),
        (program(b"R"), "a value is missing at byte 3"),
        (program(b"b"), "a value is missing at byte 3"),
        (program(b"Q"), "a value is missing at byte 3"),
        (program(b"q\0"), "a value is missing at byte 3"),
        (program(b"\x94"), "a value is missing at byte 3"),
        (program(b"h\0"), "memo 0 is asked for before it is set at byte 4"),
        (program(b"j\xff\xff\xff\xff"), "memo 4294967295 is asked for before it is set"),
        (program(b"Na"), "a value is missing at byte 4"),
        (program(b"NNa"), "items are appended to nothing at byte"),
        (program(b"}(Nu"), "items are set on a dict at byte 6"),
        (program(b"]NNs"), "items are set on a list at byte 6"),
        (program(b"}NNs"), "nothing as a key, expected a text or a number, at byte"),
        (program(b"}])s"), "a list as a key, expected a text or a number, at byte"),
        (program(b"}\x88Ns"), "a bool as a key, expected a text or a number, at byte"),
        (program(b"\x95" + b"\xff" * 8 + b"N"), "a frame of 18446744073709551615 bytes, more than"),
        (program(b"\x95\3" + bytes(7) + b"N"), "a frame of 3 bytes, more than there are, at byte"),
        (program(b"\x8b\xff\xff\xff\x7f\1"), "a whole number of 2147483647 bytes at byte 7"),
        (program(b"\x8b\0\0\0\x80\1"), "a whole number of 2147483648 bytes"),
        (program(b"\x8b\0\1\0\0" + bytes(256)), "a whole number of 256 bytes"),
        (program(b"X\xff\xff\xff\xffabc"), "within a value: truncated, download it again"),
        (program(b"\x8d" + b"\xff" * 8), "within a value: truncated, download it again"),
        (program(b"B\xff\xff\xff\x7f"), "within a value: truncated, download it again"),
        (program(b"\x8c\2\xff\xfe"), "a text that is not UTF-8 at byte 6"),
        (program(b"\x8c\3\xed\xa0\x80"), "a text that is not UTF-8"),
        (program(b"c\xff\nx\n"), "a text that is not UTF-8 at byte 5"),
        (program(b"cos"), "a name without an end at byte 3: damaged"),
        (program(b"cos\nsystem"), "a name without an end at byte 6: damaged"),
        (program(b"c" + b"x" * 300 + b"\ny\n"), "a name without an end at byte 3: damaged"),
        (program(b"(" * 300), "over 256 marks open at byte 259"),
    ],
    ids=said,
)
def test_damaged_pickle_is_refused(data, message):
    assert message in refused(data)


# -- bombs: bounded in time and memory -------------------------------------------------------------

_ITSELF = b"]q\0h\0a"


@pytest.mark.parametrize(
    "body",
    [
        b"N" + b"\x85" * 200_000,  # tuples in tuples
        b"]" * 100_000 + b"a" * 99_999,  # lists in lists
        (b"}" + text("a")) * 60_000 + b"N" + b"s" * 60_000,  # dicts in dicts
        ORDERED + (b"q\0" + text("a") + b"Ns") * 10,
    ],
    ids=["tuples", "lists", "dicts", "ordered"],
)
def test_deep_values_are_read_and_dropped(here, body):
    machine(program(body))
    assert "expected a tensor" in refusal(archive(here / "x.bin", program(mapping(a=body))))


def test_values_that_hold_themselves_are_read_and_refused(here):
    for body in (_ITSELF, b"}q\0" + text("a") + b"h\0s"):
        machine(program(body))
        assert "expected a" in refusal(archive(here / "x.bin", program(body)))
        assert "expected a tensor" in refusal(archive(here / "x.bin", program(mapping(a=body))))


@pytest.mark.parametrize("kind", ["tuples", "lists", "dicts"])
def test_billion_laughs_are_shared_not_walked(here, kind):
    """60 levels of two references each: 2^60 values, of which 60 are there."""
    level = {"tuples": b"h\0h\0\x86", "lists": b"](h\0h\0e"}
    level["dicts"] = b"}(" + text("a") + b"h\0" + text("b") + b"h\0u"
    body = b"](" + text("x") + b"q\0" + (level[kind] + b"q\0") * 60 + b"e"
    assert len(machine(program(body))) == 61
    assert "holds a list" in refusal(archive(here / "x.bin", program(body)))


def test_tuples_are_no_keys_so_that_their_hash_is_never_taken():
    """The hash of a tuple walks it, every time: 2^60 steps here."""
    body = b"}" + text("x") + b"q\0" + b"h\0\x86q\0" * 60 + b"Ns"
    assert "a tuple as a key" in refused(program(body))
    keeping = machine(
        program(b"}" + text("x") + b"q\0" + b"h\0\x86q\0" * 60 + b"Ns"), unknown="keep"
    )
    assert keeping == {}


def test_numbers_that_would_collide_as_keys_are_refused():
    """Multiples of 2^61 - 1 have one hash: n of them cost n^2 comparisons."""
    keys = b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 1000))
    assert "a number as a key" in refused(program(b"}(" + keys + b"u"))


def test_long_shape_in_the_memo_is_measured_once():
    """20,000 tensors of one shape of 40,000 extents: measured before it is walked."""
    shape = b"(" + b"K\1" * 40_000 + b"tq\0"
    one = REBUILD + b"(" + stored() + number(0) + b"h\0h\0" + FALSE + ORDERED + b"tR"
    found = refused(program(b"(" + shape + one * 1000 + b"t"))
    assert "a tensor whose offset, shape or strides are no sizes" in found


def test_a_pickle_of_too_many_steps_is_refused():
    found = refused(program(b"](" + b"N" * (1 << 18) + b"e"))
    assert found == "pickle: a pickle of over 262144 steps, expected a state dict"


def test_a_value_longer_than_the_file_takes_no_memory():
    tracemalloc.start()
    refused(program(b"\x8d" + struct.pack("<Q", 1 << 40)))
    refused(program(b"X" + struct.pack("<I", (1 << 32) - 1)))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_values_across_the_ends_of_what_is_read_at_once():
    """The stream reads 64 KiB at once: values that begin in one piece and end in the next."""
    values = ["x" * (i * 37 % 5000) for i in range(200)] + ["y" * 200_000, "z"]
    assert machine(pickle.dumps(values, 4)) == values
    names = name("torch", "FloatStorage")
    count = (1 << 17) // len(names)
    found = machine(program(b"](" + names * count + b"e"))
    assert len(found) == count and len({str(one) for one in found}) == 1
