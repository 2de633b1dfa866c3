"""What the products' micro-kernels are made of: the instructions, not the numbers they give."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from product_ir import product_module

from bloomq.backends.numba_cpu import matmul
from bloomq.backends.numba_cpu.matmul import Spec


@pytest.mark.parametrize("scheme", ["int8", "int6", "int4", "nl4", "nf4"])
def test_a_streaming_processor_is_not_asked_for_one_token(
    scheme: str, monkeypatch: pytest.MonkeyPatch
):
    group = 128 if scheme == "int8" else 64
    one, two = (Spec(scheme, group, "avx512-vnni", tokens) for tokens in (1, 8))
    monkeypatch.setattr(matmul, "cpu_name", lambda: "znver5")
    assert "llvm.prefetch" in str(product_module(one))
    assert "llvm.prefetch" in str(product_module(two))
    monkeypatch.setattr(matmul, "cpu_name", lambda: "znver4")
    assert "llvm.prefetch" not in str(product_module(one))
    assert "llvm.prefetch" in str(product_module(two))


@pytest.mark.parametrize("tier", ["avx512-vnni", "avx2"])
def test_one_token_of_4_bit_codes_streams_from_both_halves_of_a_matrix(tier: str):
    for scheme, far in (
        ("nl4", True),
        ("int4", True),
        ("nf4", True),
        ("int8", False),
        ("int6", False),
        ("bf16", False),
    ):
        assert Spec(scheme, 64, tier, 1).far == far
        assert not Spec(scheme, 64, tier, 4).far


@pytest.mark.parametrize("scheme", ["nl4", "nf4"])
def test_codes_of_one_token_are_permuted_where_the_processor_can(
    scheme: str, monkeypatch: pytest.MonkeyPatch
):
    one, two = (Spec(scheme, 64, "avx512-vnni", tokens) for tokens in (1, 8))
    for features, used, other in (
        ({"avx512vbmi"}, "permvar.qi", "pshuf"),
        ((), "pshuf", "permvar"),
    ):
        monkeypatch.setattr(matmul, "cpu_features", lambda found=features: frozenset(found))
        assert used in str(product_module(one)) and other not in str(product_module(one))
        assert "pshuf" in str(product_module(two))


# Numba's own account of itself, in a process of its own, since it reads its settings once.
NUMBAS_PROCESSOR = """
from numba.core.registry import cpu_target
from bloomq.backends.numba_cpu.processor import cpu_features, cpu_name
_, name, features = cpu_target.target_context.codegen().magic_tuple()
print(name == cpu_name())
print({item[1:] for item in features.split(",") if item.startswith("+")} ^ cpu_features())
print("avx2" in cpu_features())
"""


@pytest.mark.skipif(not platform.machine().startswith("x86"), reason="a name says more on ARM")
@pytest.mark.parametrize(
    ("settings", "avx2"),
    [
        ({}, None),
        ({"NUMBA_CPU_NAME": "skylake"}, None),  # a name alone takes no feature away,
        ({"NUMBA_CPU_NAME": "ivybridge"}, False),  # but of those that Numba mistrusts
        ({"NUMBA_CPU_NAME": "generic"}, False),
        ({"NUMBA_ENABLE_AVX": "0"}, False),
        ({"NUMBA_CPU_FEATURES": "+avx2,+fma,-avx512f"}, True),
        ({"NUMBA_CPU_FEATURES": ""}, False),
    ],
)
def test_the_processor_is_the_one_that_numba_compiles_for(
    settings: dict[str, str], avx2: bool | None
):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    name, difference, found = subprocess.run(
        [sys.executable, "-c", NUMBAS_PROCESSOR],
        env={**inherited, **settings}, check=True, capture_output=True, text=True,
    ).stdout.split("\n")[:3]  # fmt: skip
    assert (name, difference) == ("True", "set()")
    assert avx2 is None or found == str(avx2)
