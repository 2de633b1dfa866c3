"""The AArch64 kernels, compiled for and inspected: no ARM machine runs these tests."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest
from product_ir import product_module

from bloomq.backends.numba_cpu.jit import best_tier
from bloomq.backends.numba_cpu.matmul import Spec

TRIPLE, FEATURES = "aarch64-unknown-linux-gnu", "+neon,+dotprod,+fullfp16"


def assembly(spec: Spec) -> str:
    """The AArch64 assembly of a product's micro-kernel."""
    module = product_module(spec)
    module.triple = TRIPLE
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLE)
    machine = target.create_target_machine(features=FEATURES, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_products_use_the_dot_product_instruction(scheme: str, tokens: int):
    group = 128 if scheme == "int8" else 64
    limbs = 2 if scheme == "int8" and tokens == 1 else 1  # as a head's
    text = assembly(Spec(scheme, group, "neon", tokens, limbs))
    assert "sdot\tv" in text
    assert ("tbl\tv" in text) == (scheme == "nf4")
    assert "fmla\tv" in text
    assert "\tbl\t" not in text  # nothing falls back to a call


def test_an_arm_processor_with_dot_products_gets_this_tier():
    assert best_tier(frozenset({"neon", "dotprod", "fp-armv8"})) == "neon"
    assert best_tier(frozenset({"neon"})) == "portable"
