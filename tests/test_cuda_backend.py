"""The CUDA backend as a whole on torch's CPU device, and what is said where it cannot run."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bloomq
from bloomq import backends
from bloomq.backends.cuda import device, products
from bloomq.backends.placed.layers import Place, PlacedBackend
from bloomq.backends.reference import ReferenceBackend
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.heads import Head
from bloomq.layers import GPU_STEP_TOKENS, STEP_TOKENS, Backend, Span
from bloomq.pack import Pack
from bloomq.schemes import SCHEME_NAMES
from bloomq.tokenizer import BloomTokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from bloomq.backends.cuda.layers import CudaBackend  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
PROMPTS = ("Once upon a time", "La ville de Paris", "The history of")


@pytest.fixture(scope="module")
def opened(pack_of: Callable[..., Path]) -> Pack:
    return Pack.open(pack_of("int8"))


def greedy(opened: Pack, backend: Backend, count: int) -> list[list[int]]:
    """The best token of each prompt, `count` times."""
    tokenizer = BloomTokenizer.of_pack(opened)
    head, pieces = Head(opened, backend, "BloomForCausalLM"), [*map(tokenizer.encode, PROMPTS)]
    cache, said = head.cache(len(pieces), 256), []
    for _ in range(count):
        span = Span.of(range(len(pieces)), [*map(len, pieces)])
        logits = head.step(np.concatenate(pieces), cache, span, span.last)
        said.append(backend.top(logits, 1).ids[:, 0])
        pieces = [*said[-1][:, None]]
    return np.array(said).T.tolist()


# -- what it computes ------------------------------------------------------------------------------


def test_the_greedy_text_of_an_int8_pack_is_the_cpus(opened: Pack):
    """Activations are rounded alike. Sums in another order may round to another code, which moves a
    logit by up to 0.1: in these texts the best token is never so near to another where it did."""
    numba = backends.choose("numba", opened, 1).backend
    assert greedy(opened, CudaBackend("cpu"), 200) == greedy(opened, numba, 200)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_logits_are_the_references(pack_of: Callable[..., Path], scheme: str):
    opened, ids = Pack.open(pack_of(scheme)), np.arange(3, 60)
    found = []
    activations = "int8" if scheme == "int8" else "f32"
    for backend in (CudaBackend("cpu", "f32"), ReferenceBackend(activations)):
        head = Head(opened, backend, "BloomForCausalLM")
        logits = head.step(ids, head.cache(1, 64), Span.of([0], [57]), np.arange(57))
        found.append(np.array(backend.numpy(logits)))
    if scheme == "int8":  # an activation at the edge of two codes takes either: the project's bound
        error = np.square(found[0] - found[1]).sum() / np.square(found[1]).sum()
        assert error <= 5e-4
    else:  # float32 sums in another order, as in test_conformance
        assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[1]).max()


@pytest.mark.parametrize(
    "options",
    [{"compute_dtype": "bf16"}, {"compute_dtype": "f16"}, {"outlier_threshold": 6.0},
     {"activations": "float"}, {"kernels": "torch"}],
    ids=str,
)  # fmt: skip
def test_other_ways_to_compute_give_much_the_same(opened: Pack, options: dict):
    ids = np.arange(3, 60)
    found = []
    for backend in (CudaBackend("cpu"), CudaBackend("cpu", **options)):
        head = Head(opened, backend, "BloomForCausalLM")
        logits = head.step(ids, head.cache(1, 64), Span.of([0], [57]), np.arange(57))
        found.append(np.array(backend.numpy(logits), np.float64))
    error = np.square(found[0] - found[1]).sum() / np.square(found[0]).sum()
    # bfloat16: 2^-9 of each of some 10 sums on the way, squared: 4e-5; int8 tokens: see conformance
    assert error < 5e-4


def test_the_residual_stream_and_logits_are_float32(opened: Pack):
    head = Head(opened, CudaBackend("cpu", compute_dtype="bf16"), "BloomForCausalLM")
    cache, span = head.cache(1, 16), Span.of([0], [3])
    hidden = head.model._forward(np.arange(3), cache, span, np.arange(3))
    assert hidden.dtype == torch.float32
    assert head.read(hidden).dtype == torch.float32


def test_what_was_chosen_is_said(opened: Pack):
    choice = backends.choose("cuda", opened, None, devices="cpu")
    assert choice.backend.cache_dtype == "f16"
    assert choice.reason == (
        f"asked for; torch {torch.__version__}, cpu (CPU), float32 products (of int8: int8 by "
        "groups), kernels of auto, f16 cache"
    )
    said = {
        CudaBackend("cpu", **options).arithmetic
        for options in ({}, {"outlier_threshold": 6.0}, {"outlier_threshold": 0.0},
                        {"kernels": "torch"}, {"compute_dtype": "bf16"}, {"activations": "float"})
    }  # fmt: skip
    assert len(said) == 6


def gpu(monkeypatch, capability: tuple[int, int] = (9, 0)):
    """A CudaBackend for GPUs that are not here; nothing of it may run."""
    monkeypatch.setattr(products, "why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return CudaBackend


def test_gpus_of_a_kind_are_alike(monkeypatch):
    made = [gpu(monkeypatch)(f"cuda:{i}") for i in (0, 1)]
    assert made[0].arithmetic == made[1].arithmetic
    assert "NVIDIA H200" in made[0].arithmetic and "cuda:1" in made[1].description
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert "NVIDIA A100" in made[0].arithmetic


def test_torchs_own_products_go_with_torchs_own_attention(monkeypatch):
    """It is also the way out where Triton cannot compile."""
    pytest.importorskip("triton")
    backend = gpu(monkeypatch)
    asked = {way: backend("cuda:0", kernels=way)._how for way in ("auto", "triton", "torch")}
    assert {way: how.attends_by_triton for way, how in asked.items()} == {
        "auto": True, "triton": True, "torch": False,
    }  # fmt: skip
    assert not gpu(monkeypatch, (7, 5))("cuda:0")._how.attends_by_triton
    assert not CudaBackend("cpu", kernels="triton")._how.attends_by_triton


def test_a_machine_where_triton_cannot_compile_says_so_and_does_without(monkeypatch):
    pytest.importorskip("triton")
    backend = gpu(monkeypatch)
    monkeypatch.setattr(products, "why_no_triton", lambda: "Failed to find C compiler.")
    with pytest.warns(UserWarning, match="cannot be compiled, decoding is slower: Failed to find"):
        how = backend("cuda:0")._how
    assert not how.has_triton and not how.attends_by_triton
    with pytest.raises(BackendError, match="which cannot compile: Failed to find C compiler"):
        backend("cuda:0", kernels="triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in ("torch", "bitsandbytes"):
            backend("cuda:0", kernels=asked)  # says nothing of it
    assert CudaBackend("cpu", kernels="triton")._how.has_triton  # its interpreter


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease"), "Failed to find C compiler."),
        (subprocess.CalledProcessError(1, ["gcc"]), "gcc ended with exit code 1: are Python's"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (AssertionError("libcuda.so cannot found!\nPlease"), "libcuda.so cannot found!"),
        (None, None),
    ],
)  # fmt: skip
def test_why_triton_cannot_compile_is_one_line(monkeypatch, error, says):
    runtime = pytest.importorskip("triton.runtime")

    def compiled() -> int:
        if error is not None:
            raise error
        return 0

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=compiled))
    monkeypatch.setattr(runtime, "driver", driver)
    found = device.why_no_triton.__wrapped__()
    assert found is None if says is None else says in found and "\n" not in found


def test_prompts_are_read_in_steps_as_long_as_the_backend_takes(opened: Pack, monkeypatch):
    model = bloomq.load(opened.path, backend="cuda", devices="cpu")
    assert model.backend.step_tokens == GPU_STEP_TOKENS == 4 * STEP_TOKENS
    monkeypatch.setattr(CudaBackend, "step_tokens", 600)
    step, sizes = model.head._step, []

    def counted(ids: np.ndarray, *given: Any) -> Any:
        sizes.append(len(ids))
        return step(ids, *given)

    monkeypatch.setattr(model.head, "_step", counted)
    model.generate([5] * 1009, max_new_tokens=2)
    assert sizes == [600, 409, 1]
    places = [Place(model.backend, range(1)), Place(ReferenceBackend(), range(1, 2))]
    assert PlacedBackend(places).step_tokens == STEP_TOKENS  # of the place that takes fewest


def test_what_comes_to_the_cpu_is_waited_for(monkeypatch):
    """A copy that is not would be read before it is done."""
    asked = []
    given = SimpleNamespace(to=lambda device, non_blocking: asked.append(non_blocking))
    for backend in (CudaBackend("cpu"), gpu(monkeypatch)("cuda:1")):
        backend.receive(given)  # type: ignore[arg-type]
    assert asked == [False, True]


def test_llm_int8_is_not_recorded(monkeypatch):
    """It waits for the host within a step."""
    from bloomq.backends.cuda import layers

    asked = []
    monkeypatch.setattr(layers, "in_graphs", lambda step, device, record: asked.append(record))
    for threshold in (None, 0.0, 6.0):
        CudaBackend("cpu", outlier_threshold=threshold).compile(lambda *arguments: None)
    assert asked == [True, True, False]


# -- bitsandbytes, without its words ---------------------------------------------------------------


def test_bitsandbytes_says_nothing_of_its_own_kernels():
    code = (
        "import logging\n"
        "from bloomq.backends.cuda.device import import_bitsandbytes\n"
        "import torch\nimport_bitsandbytes()\n"
        "print(hasattr(torch.ops.bitsandbytes, 'gemm_4bit'),"
        " logging.getLogger('bitsandbytes.backends.cpu.ops').disabled)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
    assert done.stderr == ""


def test_asking_what_can_run_imports_no_torch_where_there_is_no_gpu():
    code = (
        "import sys\nfrom bloomq import backends\nfrom bloomq.backends.cuda import device\n"
        "device.driver_version = lambda: None\n"
        "print(backends.why_not('cuda'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{device.NO_GPU} False\n"


# -- where it cannot run ---------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with two GPUs on which all is well; the test says what is not."""
    state = SimpleNamespace(
        driver=13000, cuda="13.0", available=True, versions={"torch": "2.13.0+cu130",
        "bitsandbytes": "0.50.2"},
    )  # fmt: skip
    monkeypatch.setattr(device, "driver_version", lambda: state.driver)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in state.versions or None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: state.versions[name])
    monkeypatch.setattr(torch.version, "cuda", state.cuda)
    state.torch_cuda = lambda version: monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return state


def test_a_gpu_with_all_it_needs_is_offered_first(machine, opened: Pack, monkeypatch):
    assert backends.why_not("cuda") is None
    assert backends.available()[0] == "cuda"
    monkeypatch.setitem(backends._BUILD, "cuda", lambda *given: SimpleNamespace(description="it"))
    assert backends.choose("auto", opened, None).reason == "auto: the fastest available here; it"


def test_a_gpu_that_cannot_be_used_is_passed_over_with_the_reason(machine, opened: Pack):
    machine.available = False
    reason = backends.choose("auto", opened, 1).reason
    assert "; not cuda: torch sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES say" in reason


def test_no_gpu_is_not_worth_a_word_where_the_cpu_runs(machine, opened: Pack):
    machine.driver = None
    choice = backends.choose("auto", opened, 1)
    assert choice.backend.name == "numba"
    assert choice.reason.startswith("auto: the fastest available here; numba") or (
        "cuda" not in choice.reason
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"driver": None}, "no NVIDIA GPU with a driver is here"),
        ({"versions": {}}, "torch is not installed (it comes with pip install 'bloomq[cuda]')"),
        ({"versions": {"torch": "2.13.0"}},
         "bitsandbytes is not installed (it comes with pip install 'bloomq[cuda]')"),
        ({"versions": {"torch": "2.13.0", "bitsandbytes": "0.49.1"}},
         "bitsandbytes 0.49.1 is too old, expected 0.50 or newer: pip install -U 'bloomq[cuda]'"),
        ({"versions": {"torch": "2.7.1+cu126", "bitsandbytes": "0.50.2"}},
         "torch 2.7.1+cu126 is too old, expected 2.8 or newer: pip install -U 'bloomq[cuda]'"),
        ({"cuda": None},
         f"torch {torch.__version__} was built without CUDA: install torch for CUDA"),
        ({"driver": 12040},
         f"the NVIDIA driver is too old: it runs CUDA 12.4, torch {torch.__version__} needs 13.0: "
         "update the driver"),
        ({"available": False},
         "torch sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES say which there are)"),
    ],
    ids=["driver", "torch", "bitsandbytes", "old bitsandbytes", "old torch", "CPU torch",
         "old driver", "hidden"],
)  # fmt: skip
def test_why_no_gpu_can_be_used_is_one_line(machine, opened: Pack, change, says: str):
    for name, value in change.items():
        setattr(machine, name, value)
    if "cuda" in change:
        machine.torch_cuda(change["cuda"])
    assert backends.why_not("cuda") == says
    with pytest.raises(BackendError) as caught:
        backends.choose("cuda", opened, None)
    assert str(caught.value).startswith(f"backend cuda is not available: {says}: use one of [")
    with pytest.raises(BackendError) as caught:
        backends.choose("auto", opened, None, devices="cuda:1")
    assert str(caught.value) == (f"devices is 'cuda:1', but {says}: devices='cpu' needs no GPU")


def test_a_device_that_is_not_there_is_refused_with_those_that_are(machine, opened: Pack):
    assert device.one_device("cuda:1") == "cuda:1"
    assert device.one_device("auto") == device.one_device("cuda") == "cuda:0"
    with pytest.raises(UsageError) as caught:
        backends.choose("cuda", opened, None, devices="cuda:2")
    assert str(caught.value) == "devices is 'cuda:2', torch sees 2 GPUs: cuda:0 is the first"


@pytest.mark.parametrize(
    "devices", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "", None], ids=str
)
def test_devices_of_no_kind_are_refused(machine, opened: Pack, devices):
    with pytest.raises(UsageError) as caught:
        backends.choose("cuda", opened, None, devices=devices)
    assert str(caught.value) == (
        f"devices is {devices!r}, expected auto, cpu, cuda or cuda:0 and so on"
    )


@pytest.mark.parametrize("name", ["numba", "jax", "reference"])
def test_the_other_backends_have_the_cpu_alone(opened: Pack, name: str):
    with pytest.raises(UsageError) as caught:
        backends.choose(name, opened, None, devices="cuda:0")
    assert str(caught.value) == f"devices is 'cuda:0', the {name} backend has the CPU alone"
    assert backends.choose("auto", opened, 1, devices="cpu").backend.name == "numba"


def test_torchs_cpu_device_needs_bitsandbytes_too(machine, opened: Pack):
    machine.versions = {"torch": "2.13.0"}
    with pytest.raises(BackendError) as caught:
        backends.choose("cuda", opened, None, devices="cpu")
    assert str(caught.value) == (
        "torch's CPU device cannot be used: bitsandbytes is not installed (it comes with pip "
        "install 'bloomq[cuda]')"
    )


def test_a_drivers_version_is_asked_of_the_driver_itself(monkeypatch):
    """With a driver that is not there, one without a GPU, and one with."""
    ask = device.driver_version.__wrapped__

    def driver(count: int, broken: int = 0) -> SimpleNamespace:
        def write(value: int):
            def call(where) -> int:
                where._obj.value = value
                return 0

            return call

        return SimpleNamespace(
            cuInit=lambda flags: broken, cuDeviceGetCount=write(count),
            cuDriverGetVersion=write(12040),
        )  # fmt: skip

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    for found, expected in ((driver(1), 12040), (driver(0), None), (driver(1, broken=100), None)):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, found=found: found)
        assert ask() == expected
    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert ask() is None


# -- wrong options, and no memory ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outlier_threshold": -1.0}, "outlier_threshold is -1.0, expected 0 or more, or None"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold is nan, expected 0 or more, or N"),
        ({"compute_dtype": "f64"}, "compute_dtype is 'f64', expected auto, bf16, f16 or f32"),
        ({"activations": "int4"}, "activations is 'int4', expected int8 or float"),
        ({"kernels": "cutlass"}, "kernels is 'cutlass', expected one of auto, torch, bitsandbytes"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_are_refused(options: dict, says: str):
    with pytest.raises(UsageError) as caught:
        CudaBackend("cpu", **options)
    assert str(caught.value).startswith(says)


def test_triton_asked_for_where_it_is_not_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError) as caught:
        CudaBackend("cpu", kernels="triton")
    assert str(caught.value) == "kernels is 'triton', which is not installed: use auto or torch"


def test_bfloat16_is_what_a_gpu_has_or_float16(monkeypatch):
    from bloomq.backends.cuda.layers import _narrow

    there = torch.device("cuda:0")
    for capability, expected in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        assert _narrow("auto", there) == expected
        assert _narrow("f16", there) == torch.float16
        assert _narrow("f32", there) == torch.float32
    with pytest.raises(UsageError) as caught:
        _narrow("bf16", there)
    assert str(caught.value) == "compute_dtype is 'bf16', which cuda:0 has not: use f16, or auto"


def test_a_full_gpu_in_a_step_is_an_error_and_the_next_step_runs(opened: Pack, monkeypatch):
    head = Head(opened, CudaBackend("cpu"), "BloomForCausalLM")
    cache, span = head.cache(1, 32), Span.of([0], [3])
    with monkeypatch.context() as patch:

        def full(*given):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        patch.setattr(torch.nn.functional, "layer_norm", full)
        with pytest.raises(CapacityError, match="for a step of 3 tokens: use fewer rows, a"):
            head.step(np.arange(3), cache, span, np.array([2]))
    assert cache.lengths.tolist() == [0]
    found = head.step(np.arange(3), cache, span, np.array([2]))
    fresh = head.step(np.arange(3), head.cache(1, 32), span, np.array([2]))
    assert torch.equal(found.values, fresh.values)


def test_a_head_of_two_limbs_keeps_to_no_outliers_threshold(opened: Pack):
    """LLM.int8's inputs would be rounded to int8 below the threshold: an NMSE of 1e-3."""
    x = np.random.default_rng(1).standard_normal((9, opened.config.hidden_size)).astype(np.float32)
    matrix, found = opened.matrix("wte"), []
    for backend in (CudaBackend("cpu", outlier_threshold=0.0), CudaBackend("cpu")):
        found.append(backend.numpy(backend.linear(matrix, limbs=2)(x)))
    assert np.array_equal(*found)
