"""Pickle's opcodes: those that a state dict needs, with what they do, and the names of the rest.

Source: CPython's pickletools.
"""

from __future__ import annotations

# Code -> the step of `pickled` that does it, and its argument: a width in bytes, a count, a value.
STEPS: dict[int, tuple[str, tuple[object, ...]]] = {
    0x80: ("protocol", ()),  # PROTO
    0x95: ("frame", ()),  # FRAME
    ord("."): ("stop", ()),  # STOP
    ord("("): ("mark", ()),  # MARK
    ord("N"): ("constant", (None,)),  # NONE
    0x88: ("constant", (True,)),  # NEWTRUE
    0x89: ("constant", (False,)),  # NEWFALSE
    ord(")"): ("constant", ((),)),  # EMPTY_TUPLE
    ord("K"): ("unsigned", (1,)),  # BININT1
    ord("M"): ("unsigned", (2,)),  # BININT2
    ord("J"): ("signed", ()),  # BININT
    0x8A: ("long", (1,)),  # LONG1
    0x8B: ("long", (4,)),  # LONG4
    ord("G"): ("real", ()),  # BINFLOAT
    0x8C: ("text", (1,)),  # SHORT_BINUNICODE
    ord("X"): ("text", (4,)),  # BINUNICODE
    0x8D: ("text", (8,)),  # BINUNICODE8
    ord("C"): ("raw", (1,)),  # SHORT_BINBYTES
    ord("B"): ("raw", (4,)),  # BINBYTES
    0x8E: ("raw", (8,)),  # BINBYTES8
    0x85: ("tuple_of", (1,)),  # TUPLE1
    0x86: ("tuple_of", (2,)),  # TUPLE2
    0x87: ("tuple_of", (3,)),  # TUPLE3
    ord("t"): ("tuple_since_mark", ()),  # TUPLE
    ord("]"): ("empty_list", ()),  # EMPTY_LIST
    ord("a"): ("append", ()),  # APPEND
    ord("e"): ("appends", ()),  # APPENDS
    ord("}"): ("empty_dict", ()),  # EMPTY_DICT
    ord("s"): ("set_item", ()),  # SETITEM
    ord("u"): ("set_items", ()),  # SETITEMS
    ord("q"): ("put", (1,)),  # BINPUT
    ord("r"): ("put", (4,)),  # LONG_BINPUT
    0x94: ("memoize", ()),  # MEMOIZE
    ord("h"): ("get", (1,)),  # BINGET
    ord("j"): ("get", (4,)),  # LONG_BINGET
    ord("c"): ("name_in_lines", ()),  # GLOBAL
    0x93: ("name_on_stack", ()),  # STACK_GLOBAL
    ord("Q"): ("persistent", ()),  # BINPERSID
    ord("R"): ("reduce", ()),  # REDUCE
    0x81: ("new_object", ()),  # NEWOBJ: for placeholders alone
    ord("b"): ("build", ()),  # BUILD
}
NEWOBJ = 0x81
# torch writes none of these.
REFUSED = {
    ord("0"): "POP", ord("1"): "POP_MARK", ord("2"): "DUP", ord("F"): "FLOAT", ord("I"): "INT",
    ord("L"): "LONG", ord("P"): "PERSID", ord("S"): "STRING", ord("T"): "BINSTRING",
    ord("U"): "SHORT_BINSTRING", ord("V"): "UNICODE", ord("d"): "DICT", ord("g"): "GET",
    ord("i"): "INST", ord("l"): "LIST", ord("o"): "OBJ", ord("p"): "PUT", NEWOBJ: "NEWOBJ",
    0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS",
    0x91: "FROZENSET", 0x92: "NEWOBJ_EX", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
