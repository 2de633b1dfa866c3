"""What the products' micro-kernels are made of: the instructions, not the numbers they give."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest
from product_ir import product_module

from bloomq.backends.numba_cpu import matmul
from bloomq.backends.numba_cpu.matmul import Spec
from bloomq.backends.numba_cpu.processor import cpu_features, cpu_name


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


def test_the_processor_is_the_one_that_numba_compiles_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("numba.config.CPU_NAME", "skylake")
    assert cpu_name() == "skylake"
    monkeypatch.setattr("numba.config.CPU_NAME", None)
    host = cpu_name()
    assert host not in ("", "host")
    monkeypatch.setattr("numba.config.CPU_NAME", "host")
    assert cpu_name() == host


def test_features_are_those_that_numba_compiles_for(monkeypatch: pytest.MonkeyPatch):
    present = {name for name, there in llvm.get_host_cpu_features().items() if there}
    for name in (None, "host", "skylake"):  # a name alone takes no feature away
        monkeypatch.setattr("numba.config.CPU_NAME", name)
        assert present <= cpu_features()
    monkeypatch.setattr("numba.config.CPU_FEATURES", "+avx2,+fma,-avx512f")
    assert cpu_features() == {"avx2", "fma"}
    monkeypatch.setattr("numba.config.CPU_FEATURES", "")
    assert cpu_features() == set()
