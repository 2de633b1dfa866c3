"""Reads the pickle of a state dict without unpickling: a stack machine over inert values.

Unpickling can run anything, because three things in it reach out of the data: names are imported,
REDUCE, NEWOBJ, INST and OBJ call what was imported, and BUILD sets attributes. Here no code path
does either. A name becomes a `Name`, two strings. REDUCE looks that up in the fixed table of
`torch_values`, whose functions only check their arguments and make a tuple, a dict or a
`StoredTensor`. BUILD drops its state. Opcodes that state dicts do not need are refused by name, and
so is every name outside the table, unless the caller wants placeholders in their stead: these
remember the name and the state, are never called, and are no argument that a tensor accepts.

Invariant: time and memory are bounded by the pickle's size and by the limits below, whatever it
says: values in the memo are shared, never copied or walked, and keys are texts and small numbers,
whose hash costs no more than they do.

Source: CPython's pickletools (the opcodes), PEP 307, PEP 3154, PEP 574.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from functools import partial
from typing import Any, Literal, NoReturn

from bloomq.errors import CheckpointError

from .opcodes import NEWOBJ, REFUSED, STEPS
from .stream import Stream
from .torch_values import ADMITTED, MAKERS, Name, Placeholder, Storage, brief, described, storage

Unknown = Literal["refuse", "keep"]  # what to do with names that no state dict needs
MOST_BYTES = 16 << 20  # a state dict of the 176B, unsharded, has 150 KB
_MOST_STEPS = 1 << 18  # some 45 a tensor: 5,800 tensors, where the 176B has 846
_MOST_MARKS = 256  # open at once
_MOST_INT_BYTES = 255  # what LONG1 can hold; the magic number of the older form has 10
_SMALL = 1 << 63  # larger numbers as keys can be made to collide: each pair costs a comparison
_NEWEST_PROTOCOL = 5


def read_pickle(
    stream: Stream, *, unknown: Unknown = "refuse"
) -> tuple[object, dict[str, Storage]]:
    """The value of the pickle at the stream's place, and the storages it names, by their keys.

    Values are None, bool, int, float, str, bytes, tuple, list, dict, Name, Storage, StoredTensor
    and, with `unknown="keep"`, Placeholder. They may hold themselves: walk them to a known depth.
    The stream ends up behind it. Raises: CheckpointError, naming the stream.
    """
    machine = _Machine(stream, unknown)
    machine.run()
    return machine.value, machine.storages


class _Machine:
    """The stack, the marks that cut it, and the memo."""

    def __init__(self, stream: Stream, unknown: Unknown) -> None:
        self.stream, self.keeps = stream, unknown == "keep"
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.value: object = None
        self.done = False

    def run(self) -> None:
        take = self.stream.take
        steps = {code: partial(getattr(self, step), *args) for code, (step, args) in STEPS.items()}
        if take(1) != b"\x80":
            self.damaged("does not begin as a pickle of protocol 2 or newer")
        self.protocol()
        for _ in range(_MOST_STEPS):
            code = take(1)[0]
            step = steps.get(code)
            if step is None:
                self.refuse_opcode(code)
            step()
            if self.done:
                return
        raise CheckpointError(
            f"{self.stream.where}: a pickle of over {_MOST_STEPS} steps, expected a state dict"
        )

    # -- refusals --

    def damaged(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.stream.where}: {what} at byte {self.stream.at}: damaged")

    def refuse_opcode(self, code: int) -> NoReturn:
        name = REFUSED.get(code)
        if name is None:
            self.damaged(f"byte {code:#04x}, which is no opcode,")
        raise CheckpointError(
            f"{self.stream.where}: opcode {name}, which no state dict needs: nothing was run; save "
            "the model as safetensors"
        )

    # -- the stack --

    def pop(self) -> Any:
        if not self.stack:
            self.damaged("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            self.damaged("a value is missing")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, which goes."""
        if not self.marked:
            self.damaged("a mark is missing")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        if len(self.marked) >= _MOST_MARKS:
            self.damaged(f"over {_MOST_MARKS} marks open")
        self.marked.append(self.stack)
        self.stack = []

    def number(self, width: int) -> int:
        return int.from_bytes(self.stream.take(width), "little")

    # -- framing --

    def protocol(self) -> None:
        version = self.number(1)
        if not 2 <= version <= _NEWEST_PROTOCOL:
            self.damaged(f"protocol {version}, expected 2 to {_NEWEST_PROTOCOL},")

    def frame(self) -> None:
        """A frame only says how much may be read at once: here, that it must be there."""
        length = self.number(8)
        if length > self.stream.stop - self.stream.at:
            self.damaged(f"a frame of {length} bytes, more than there are,")

    def stop(self) -> None:
        self.value = self.pop()
        if self.stack or self.marked:
            self.damaged("values are left over")
        self.done = True

    # -- plain values --

    def constant(self, value: object) -> None:
        self.stack.append(value)

    def unsigned(self, width: int) -> None:
        self.stack.append(self.number(width))

    def signed(self) -> None:
        self.stack.append(int.from_bytes(self.stream.take(4), "little", signed=True))

    def long(self, width: int) -> None:
        count = self.number(width)
        if count > _MOST_INT_BYTES:  # LONG4's own sign too
            self.damaged(f"a whole number of {count} bytes")
        self.stack.append(int.from_bytes(self.stream.take(count), "little", signed=True))

    def real(self) -> None:
        self.stack.append(struct.unpack(">d", self.stream.take(8))[0])

    def text(self, width: int) -> None:
        self.stack.append(self.decoded(self.stream.take(self.number(width))))

    def raw(self, width: int) -> None:
        self.stack.append(self.stream.take(self.number(width)))

    def decoded(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.damaged("a text that is not UTF-8")

    # -- containers --

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def empty_list(self) -> None:
        self.stack.append([])

    def empty_dict(self) -> None:
        self.stack.append({})

    def append(self) -> None:
        self.extend([self.pop()])

    def appends(self) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Placeholder:
            self.damaged(f"items are appended to {described(target)}")

    def set_item(self) -> None:
        value = self.pop()
        self.update([self.pop(), value])

    def set_items(self) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        """items: key, value, key, value, ..."""
        target = self.top()
        if type(target) is Placeholder:
            return
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            self.damaged(f"items are set on {described(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str or (type(key) is int and -_SMALL <= key < _SMALL):
                target[key] = value
            elif not self.keeps:  # a placeholder's neighbours: nobody asks for such a key
                self.damaged(f"{described(key)} as a key, expected a text or a number,")

    # -- the memo --

    def put(self, width: int) -> None:
        self.memo[self.number(width)] = self.top()

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, width: int) -> None:
        index = self.number(width)
        if index not in self.memo:
            self.damaged(f"memo {index} is asked for before it is set")
        self.stack.append(self.memo[index])

    # -- names, and what is made of them --

    def name_in_lines(self) -> None:
        module = self.decoded(self.stream.line())
        self.named(module, self.decoded(self.stream.line()))

    def name_on_stack(self) -> None:
        attribute, module = self.pop(), self.pop()
        if type(module) is not str or type(attribute) is not str:
            self.damaged("a name that is no text")
        self.named(module, attribute)

    def named(self, module: str, attribute: str) -> None:
        name = Name(module, attribute)
        if name in ADMITTED:
            self.stack.append(name)
        elif self.keeps:
            self.stack.append(Placeholder(name))
        else:
            raise CheckpointError(
                f"{self.stream.where}: names {brief(str(name))}, which no state dict needs: it was "
                "not imported and nothing was run; save the model as safetensors"
            )

    def persistent(self) -> None:
        found = storage(self.stream.where, self.pop())
        if self.storages.setdefault(found.key, found) != found:
            self.damaged(f"storage {brief(found.key)} with a second type or size")
        self.stack.append(found)

    def reduce(self) -> None:
        args, made_by = self.pop(), self.pop()
        maker = MAKERS.get(made_by) if type(made_by) is Name else None
        if type(args) is not tuple:
            self.damaged(f"arguments that are {described(args)}")
        if type(made_by) is Placeholder:
            self.stack.append(Placeholder(made_by.name))
        elif maker is None:
            self.damaged(f"{described(made_by)} is called, which makes nothing,")
        else:
            self.stack.append(maker(self.stream.where, args))

    def new_object(self) -> None:
        self.pop()
        made_by = self.pop()
        if type(made_by) is not Placeholder:
            self.refuse_opcode(NEWOBJ)
        self.stack.append(Placeholder(made_by.name))

    def build(self) -> None:
        """A state dict's `_metadata` (versions of modules) comes as an attribute: dropped."""
        state, target = self.pop(), self.top()
        if type(target) is Placeholder:
            target.state = state
        elif type(target) is not OrderedDict or type(state) is not dict:
            self.damaged(f"a state is set on {described(target)}")
