"""The processor that code is compiled for: LLVM's name of it, its features, its tier."""

from __future__ import annotations

from functools import lru_cache

import numba
from llvmlite import binding as llvm
from numba.core.codegen import get_host_cpu_features

from bloomq.backends.numba_cpu.simd import TIERS


def cpu_name() -> str:
    """The processor that Numba names to LLVM: "znver4", or NUMBA_CPU_NAME's."""
    name = numba.config.CPU_NAME
    return llvm.get_host_cpu_name() if name is None else str(name)


def cpu_features() -> frozenset[str]:
    """The names of LLVM's features that Numba compiles for: the processor's own, less what
    NUMBA_CPU_FEATURES, NUMBA_ENABLE_AVX=0 or an old processor's name take away; on AArch64, where a
    name implies most features, those of the tier too. One too many, and LLVM ends the process."""
    text = numba.config.CPU_FEATURES
    if text is None:
        text = get_host_cpu_features()
    found = frozenset(item[1:] for item in text.split(",") if item.startswith("+"))
    triple = llvm.get_process_triple()
    if triple.startswith(("aarch64", "arm64")) and selects_dot_products(triple, cpu_name(), text):
        found |= frozenset(TIERS["neon"])
    return found


def best_tier(features: frozenset[str]) -> str:
    """The first tier of `simd.TIERS` whose features are all there."""
    return next(tier for tier, needs in TIERS.items() if features.issuperset(needs))


@lru_cache(maxsize=4)
def selects_dot_products(triple: str, name: str, features: str) -> bool:
    """Does LLVM compile a sum of products of bytes to AArch64's `sdot` for this processor?

    Asked of its code, since neither Linux nor macOS tell it of the feature: `get_host_cpu_features`
    lacks it on every processor that has it.
    """
    llvm.initialize_native_target()  # once or often is the same
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    return "sdot" in machine.emit_assembly(llvm.parse_assembly(_SUM_OF_PRODUCTS))


_SUM_OF_PRODUCTS = """
define i32 @sum(<16 x i8> %a, <16 x i8> %b) {
  %x = sext <16 x i8> %a to <16 x i32>
  %y = sext <16 x i8> %b to <16 x i32>
  %products = mul <16 x i32> %x, %y
  %total = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %total
}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""
