"""Addresses in compiled code: how kernels find their arguments and arrays."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

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


@intrinsic
def copy_bytes(typingctx: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy `count` >= 0 bytes from an address to another that is none of theirs. An array's slice
    set to another array would do, but costs 2 s of compiling once and 0.3 s each, for the words of
    an error."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, out_of = (builder.inttoptr(at, ir.PointerType()) for at in args[:2])
        cgutils.raw_memcpy(builder, into, out_of, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _view(dtype: Any) -> Any:
    """view(address, count): the values of this type at an address, as an array. `carray` does the
    same, compiled anew for each type."""
    array = types.Array(dtype, 1, "C")

    @intrinsic
    def view(typingctx: Any, at: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            made = context.make_array(array)(context, builder)
            size = I64(context.get_abi_sizeof(context.get_data_type(dtype)))
            populate_array(
                made, data=builder.inttoptr(args[0], made.data.type), shape=[args[1]],
                strides=[size], itemsize=size, meminfo=None,
            )  # fmt: skip
            return made._getvalue()

        return array(types.int64, types.int64), codegen

    return view


floats, doubles = _view(types.float32), _view(types.float64)
codes, octets, longs = _view(types.int8), _view(types.uint8), _view(types.int64)
shorts, ints = _view(types.uint16), _view(types.int32)
