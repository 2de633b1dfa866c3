"""A product's micro-kernel as LLVM IR, for tests that look at what it is made of."""

from __future__ import annotations

import llvmlite.ir as ir

from bloomq.backends.numba_cpu.matmul import Spec, _emit_product
from bloomq.backends.numba_cpu.simd import I64, Vectors


def product_module(spec: Spec) -> ir.Module:
    """A module with the one function `product`."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 9), "product")
    builder = ir.IRBuilder(function.append_basic_block())
    _emit_product(Vectors(builder, spec.tier), spec, *function.args)
    builder.ret_void()
    return module
