"""The AArch64 kernels: compiled for and inspected, and run under an emulator where there is one.
`.ci/aarch64` runs all of the backend so."""

from __future__ import annotations

import ctypes
from pathlib import Path

import aarch64
import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
import pytest
from aarch64 import MEMORY, Call
from product_ir import linear_module, product_module

from bloomq.backends.numba_cpu.matmul import Spec, weight_offset
from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
from bloomq.backends.numba_cpu.simd import TIERS
from bloomq.schemes import TILE, Array, get_scheme

GROUPS = 3
needs_an_emulator = pytest.mark.skipif(
    not (aarch64.QEMU and aarch64.ASSEMBLER and aarch64.LINKER),
    reason="no qemu-aarch64 with AArch64's binutils (Debian: qemu-user-static, "
    "binutils-aarch64-linux-gnu)",
)
needs_avx2 = pytest.mark.skipif(
    not cpu_features().issuperset(TIERS["avx2"]), reason="no AVX2 to compare with"
)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nl4", "nf4"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_products_use_the_dot_product_instruction(scheme: str, tokens: int):
    group = 128 if scheme == "int8" else 64
    limbs = 2 if scheme == "int8" and tokens == 1 else 1  # as a head's
    text = aarch64.assembly(product_module(Spec(scheme, group, "neon", tokens, limbs)))
    assert "sdot\tv" in text
    assert ("tbl\tv" in text) == (scheme in ("nl4", "nf4"))
    assert "fmla\tv" in text
    assert "\tbl\t" not in text  # nothing falls back to a call


@pytest.mark.parametrize("triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin"])
@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("neoverse-n1", "neon"),
        ("apple-m1", "neon"),
        ("cortex-a72", "portable"),
        ("generic", "portable"),
    ],
)
def test_an_arm_processor_with_dot_products_gets_this_tier(
    triple: str, name: str, tier: str, monkeypatch: pytest.MonkeyPatch
):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    monkeypatch.setattr("numba.config.CPU_NAME", None)
    monkeypatch.setattr("numba.config.CPU_FEATURES", None)
    monkeypatch.setattr("llvmlite.binding.get_process_triple", lambda: triple)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: name)
    for features in ({}, {"neon": True, "fp-armv8": True, "lse": True}):  # macOS; Linux
        found = llvm.FeatureMap(features)
        monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda found=found: found)
        assert best_tier(cpu_features()) == tier


class Layer:
    """The tiles of one call, as a linear layer with gelu on a few tokens, in one stretch of
    memory."""

    def __init__(self, scheme: str, tokens: int, limbs: int) -> None:
        stored, rng = get_scheme(scheme), np.random.default_rng(tokens)
        self.scheme, self.group, self.tokens, self.limbs = stored, stored.group_size, tokens, limbs
        self.tiles, k = self.spec("neon").tiles, GROUPS * self.group
        rows = TILE * self.tiles
        parts = stored.quantize(rng.normal(0, 0.02, (rows, k)).astype(np.float32))
        x = rng.normal(0, 1, (tokens, k)).astype(np.float32)
        bias = rng.normal(0, 1, rows).astype(np.float32)
        self.at: dict[str, int] = {}
        self.memory = bytearray()
        given = {"codes": parts["codes"], "scales": parts["scales"], "x": x, "bias": bias}
        self.tile_bytes = [given[name].nbytes // self.tiles for name in ("codes", "scales")]
        for name, array in given.items():
            self._put(name, np.ascontiguousarray(array))
        self._put("acts", np.zeros((k, tokens, limbs), np.int8))
        for name, dtype in (("act_scales", np.float32), ("act_sums", np.int32)):
            self._put(name, np.zeros((GROUPS, tokens), dtype))
        for name in ("totals", "y"):
            self._put(name, np.zeros((tokens, rows), np.float32))

    def _put(self, name: str, array: Array) -> None:
        self.at[name] = len(self.memory)
        self.memory += array.tobytes() + bytes(-array.nbytes % 64)

    def spec(self, tier: str) -> Spec:
        return Spec(self.scheme.name, self.group, tier, self.tokens, self.limbs)

    def module(self, tier: str) -> ir.Module:
        spec = self.spec(tier)
        assert spec.tiles == self.tiles
        return linear_module(spec)

    def calls(self, tier: str) -> list[Call]:
        at = {name: MEMORY + offset for name, offset in self.at.items()}
        row = 4 * GROUPS * self.group
        offset, step = weight_offset(self.scheme.name, tier), 4 * self.tokens
        quantized = [
            ("quantize", (at["x"] + t * row, GROUPS, offset, at["acts"] + 4 * t * self.limbs, step,
                          at["act_scales"] + 4 * t, at["act_sums"] + 4 * t))
            for t in range(self.tokens)
        ]  # fmt: skip
        tile_codes, tile_scales = self.tile_bytes
        product = (at["codes"], tile_codes, at["scales"], tile_scales, at["acts"],
                   at["act_scales"], at["act_sums"], GROUPS, at["totals"])  # fmt: skip
        row_bytes = 4 * TILE * self.tiles
        finish = (at["totals"], at["bias"], 0, 1, 0, at["y"], row_bytes, 4 * TILE)
        return [*quantized, ("product", product), ("finish", finish)]

    def array(self, name: str, memory: bytes) -> np.ndarray:
        rows = TILE * self.tiles
        count = self.tokens * rows
        return np.frombuffer(memory, np.float32, count, self.at[name]).reshape(-1, rows)


def on_this_machine(layer: Layer, tier: str) -> bytes:
    """The layer's memory behind the same calls, of the same IR for a tier of this processor."""
    module = layer.module(tier)
    aarch64.add_calls(module, layer.calls(tier))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features, opt=3
    )
    module.triple = llvm.get_default_triple()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    memory = np.frombuffer(bytes(64) + bytes(layer.memory), np.uint8).copy()
    start = -memory.ctypes.data % 64
    memory[start : start + len(layer.memory)] = layer.memory
    calls = ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("calls"))
    calls(memory.ctypes.data + start)
    return memory[start : start + len(layer.memory)].tobytes()


@needs_an_emulator
@needs_avx2
@pytest.mark.parametrize(
    ("scheme", "tokens", "limbs"),
    [
        *((scheme, tokens, 1) for scheme in ("int8", "int6", "nl4", "int4", "nf4")
          for tokens in (1, 4)),
        ("int8", 1, 2), ("int8", 2, 2),
    ],
)  # fmt: skip
def test_a_linear_layer_has_the_bits_that_avx2_gives(
    scheme: str, tokens: int, limbs: int, tmp_path: Path
):
    layer = Layer(scheme, tokens, limbs)
    calls = layer.calls("neon")
    there = aarch64.emulated(layer.module("neon"), calls, bytes(layer.memory), tmp_path)
    here = on_this_machine(layer, "avx2")
    assert layer.array("totals", here).any()
    for name in ("totals", "y"):
        np.testing.assert_array_equal(layer.array(name, there), layer.array(name, here))
