"""A product's kernels as LLVM IR, for tests that look at what they are made of or run them bare."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.ir as ir

from bloomq.backends.numba_cpu.matmul import Spec, _emit_finish, _emit_product
from bloomq.backends.numba_cpu.prologue import _emit_quantize
from bloomq.backends.numba_cpu.simd import I64, Vectors


def product_module(spec: Spec) -> ir.Module:
    """A module with the one function `product`."""
    module = ir.Module()
    _add(module, spec, "product", 9, lambda v, *args: _emit_product(v, spec, *args))
    return module


def linear_module(spec: Spec) -> ir.Module:
    """A module with all that a linear layer is made of: `quantize`, `product` and `finish`, whose
    arguments are those of `quantize_row`, `multiply_tiles` and `finish_tiles` behind the spec."""
    module = product_module(spec)
    _add(module, spec, "finish", 8, lambda v, *args: _emit_finish(v, spec, *args))
    _add(
        module,
        spec,
        "quantize",
        7,
        lambda v, *args: _emit_quantize(v, spec.group, spec.limbs, *args),
    )
    return module


def _add(
    module: ir.Module, spec: Spec, name: str, arguments: int, emit: Callable[..., None]
) -> None:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    builder = ir.IRBuilder(function.append_basic_block())
    emit(Vectors(builder, spec.tier), *function.args)
    builder.ret_void()
