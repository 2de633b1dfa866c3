"""Addresses in compiled code: how kernels find their arguments and arrays."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

I64 = ir.IntType(64)


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """The address of an array's first element, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), codegen


@intrinsic
def keep(typingctx: Any, array: Any) -> Any:
    """Nothing, but the array lives until here: Numba frees one after its last use by name, and a
    use by address is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic(prefer_literal=True)
def fields(typingctx: Any, arguments: Any, count: Any) -> Any:
    """The first `count` int64 at an address, as a tuple."""
    size = count.literal_value
    result = types.UniTuple(types.int64, size)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for i in range(size):
            at = builder.add(args[0], I64(8 * i))
            values.append(builder.load(builder.inttoptr(at, ir.PointerType()), typ=I64))
        return cgutils.pack_array(builder, values)

    return result(types.int64, count), codegen


@intrinsic
def as_float(typingctx: Any, bits: Any) -> Any:
    """The float32 in the low half of an int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


def _view(dtype: Any) -> Any:
    """view(address, count): the values of this type at an address, as an array."""

    @intrinsic
    def pointer(typingctx: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), codegen

    @njit
    def view(at, count):  # type: ignore[no-untyped-def]
        return carray(pointer(at), count)

    return view


floats, doubles = _view(types.float32), _view(types.float64)
codes, octets, longs = _view(types.int8), _view(types.uint8), _view(types.int64)
shorts, ints = _view(types.uint16), _view(types.int32)
