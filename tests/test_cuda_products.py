"""Products of the CUDA backend on torch's CPU device, each against its plain twin."""

from __future__ import annotations

import numpy as np
import pytest

from bloomq.schemes import DEFAULT_GROUP, SCHEME_NAMES, get_scheme
from bloomq.weights import Matrix, Norm

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from bloomq.backends.cuda import linear, products  # noqa: E402
from bloomq.backends.cuda.layers import CudaBackend  # noqa: E402
from bloomq.backends.cuda.linear import CudaLinear, DeviceNorm  # noqa: E402
from bloomq.backends.cuda.products import (  # noqa: E402
    Arithmetic,
    FourBitProduct,
    Int8Product,
    RestoredProduct,
    narrowed,
    rounded,
)
from bloomq.backends.cuda.stored import Loader, Stored  # noqa: E402
from bloomq.backends.reference import ReferenceBackend, round_activations  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def matrix(scheme: str, shape: tuple[int, int]) -> Matrix:
    kind = get_scheme(scheme)
    return Matrix("w", kind, shape, kind.quantize(RNG.standard_normal(shape).astype(np.float32)))


def load(source: Matrix) -> Stored:
    return Loader(CPU).load(source)


def inputs(tokens: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal((tokens, columns)).astype(np.float32))


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Sums of 200 products of float32 in another order: each of some 8 levels of partial sums is off by
# at most 2^-24, of the largest result.
SUMS = 16 * 2**-24


def scaled(product: torch.Tensor, of: Stored) -> torch.Tensor:
    """What a product gives, with the scales that are left to what follows it."""
    return product * of.scales if of.scheme.name == "int8" else product


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_weights_restored_in_blocks_give_the_product_of_the_whole(scheme, tokens, monkeypatch):
    source, x = matrix(scheme, (150, 256)), inputs(tokens, 256)
    expected = x.double() @ torch.from_numpy(source.dequantize()).double().T
    for size in (1, 4 * 256 * 32, 1 << 27):  # a row, 32 of them, all
        monkeypatch.setattr(products, "RESTORED_BYTES", size)
        there = load(source)
        found = scaled(RestoredProduct(there, torch.float32)(x), there)
        assert found.dtype == torch.float32
        assert far(found, expected) < SUMS


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_products_of_16_bits_lose_no_more_than_their_rounding(scheme, narrow):
    source, x = matrix(scheme, (150, 256)), inputs(7, 256)
    how = Arithmetic(CPU, narrow, "torch", "float")
    there = load(source)
    found = scaled(products.product(there, how)(x), there)
    expected = x.double() @ torch.from_numpy(source.dequantize()).double().T
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[
        how.dtype(source.scheme)
    ]
    # Inputs, weights and their scales are rounded, each by half a unit of itself at most, which
    # averages out over 256 terms; nf4's result on the CPU too, which does not.
    assert far(found, expected) < unit + SUMS


def test_inputs_have_the_dtype_of_the_matrix_or_the_devices():
    kinds = {
        narrow: [Arithmetic(CPU, narrow).dtype(get_scheme(name)) for name in SCHEME_NAMES]
        for narrow in (torch.bfloat16, torch.float16, torch.float32)
    }
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    assert SCHEME_NAMES == ("int8", "int6", "nl4", "int4", "nf4", "f32", "bf16", "f16")
    assert kinds[bf16] == [bf16, bf16, bf16, bf16, bf16, f32, bf16, f16]
    assert kinds[f16] == [f16, f16, f16, f16, f16, f32, f32, f16]
    assert set(kinds[f32]) == {f32}


def test_activations_beyond_float16_are_scaled_into_it():
    """176B's 62nd block has them; other tokens of the step are as they were."""
    x = inputs(3, 256)
    x[1, 5], x[2, 7] = 3e6, -40_000
    narrow, scale = narrowed(x, torch.float16)
    assert torch.isfinite(narrow).all()
    assert scale is not None
    assert float(scale[0]) == 1
    assert torch.equal(narrow[0], x[0].half())
    source = matrix("f16", (40, 256))
    found = RestoredProduct(load(source), torch.float16)(x)
    expected = x.double() @ torch.from_numpy(source.dequantize()).double().T
    assert far(found, expected) < 2**-11
    assert narrowed(x, torch.bfloat16)[1] is None


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
@pytest.mark.parametrize("shape", [(150, 256), (33, 64)], ids=str)
def test_bitsandbytes_nf4_product_is_its_plain_twins(shape, tokens):
    there, x = load(matrix("nf4", shape)), inputs(tokens, shape[1])
    found = FourBitProduct(there, torch.float32)(x)
    assert far(found, RestoredProduct(there, torch.float32)(x)) < SUMS


def test_bitsandbytes_restores_nf4_to_the_same_bits():
    there = load(matrix("nf4", (150, 256)))
    products.import_bitsandbytes()
    found = torch.ops.bitsandbytes.dequantize_4bit(
        there.codes, there.scales.view(-1), 64, "nf4", [150, 256], torch.float32
    )
    assert torch.equal(found, products.restored(there))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_is_the_product_of_rounded_tokens_and_of_its_outliers(threshold):
    source, x = matrix("int8", (160, 256)), inputs(5, 256)
    x[2, 17] = 60
    given = x.clone()
    found = Int8Product(load(source), Arithmetic(CPU, torch.float32, threshold=threshold))(x)
    assert torch.equal(x, given)
    beside = (x.abs() >= threshold).any(dim=0) if threshold else torch.zeros(256, dtype=torch.bool)
    inner = x.masked_fill(beside, 0)
    # The scale of a token is that of what is not an outlier itself.
    peak = x.masked_fill(x.abs() >= threshold, 0) if threshold else x
    step = peak.abs().amax(dim=1, keepdim=True) / 127
    w = torch.from_numpy(source.dequantize()).double()
    expected = (torch.round(inner / step).double() * step + x.masked_fill(~beside, 0)) @ w.T
    assert far(found, expected) < SUMS
    exact = x.double() @ w.T
    lost = float((found - exact).square().sum() / exact.square().sum())
    # The outlier takes 127 steps of 60 / 127: the rest of its token is lost with them.
    assert lost < 1e-4 if threshold else lost > 1e-4


def test_llm_int8_says_nan_where_a_token_is():
    x = inputs(3, 256)
    x[1, 3] = np.nan
    for threshold in (0.0, 6.0):
        how = Arithmetic(CPU, torch.float32, threshold=threshold)
        found = Int8Product(load(matrix("int8", (160, 256))), how)(x)
        assert torch.isnan(found[1]).all()
        assert torch.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("shape", [(30, 128), (2, 256)], ids=str)
def test_a_matrix_that_cublas_has_no_int8_product_for_goes_another_way(shape):
    there, how = load(matrix("int8", shape)), Arithmetic(CPU, torch.float32, threshold=0.0)
    assert not how.by_tokens(there)
    assert isinstance(products.product(there, how), RestoredProduct)


def test_activations_are_rounded_as_the_references():
    x = inputs(4, 300)
    x[1, 128:256], x[2, 0], x[3, 40] = 0, 1e-38, 3500
    expected = round_activations(x.numpy(), 128)
    padded = torch.nn.functional.pad(x, (0, 84))
    assert rounded(padded, 128)[:, :300].numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("kernels", ["auto", "torch", "bitsandbytes"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_linear_is_the_references(scheme, kernels, tokens):
    compare(CudaBackend("cpu", kernels=kernels), scheme, tokens)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_a_linear_of_nothing_is_nothing(scheme):
    layer = CudaBackend("cpu").linear(matrix(scheme, (45, 200)))
    assert layer(np.zeros((0, 200), np.float32)).shape == (0, 45)


def compare(backend: CudaBackend, scheme: str, tokens: int) -> None:
    """A linear with all there is to one, of sizes that are no whole tiles or groups."""
    n, k = 45, 200
    weight, bias = matrix(scheme, (n, k)), RNG.standard_normal(n).astype(np.float32)
    norm = Norm("ln", *RNG.standard_normal((2, k)).astype(np.float32), 1e-5)
    x = RNG.standard_normal((tokens, k)).astype(np.float32)
    delta, add = RNG.standard_normal((2, tokens, n)).astype(np.float32)
    oracle = ReferenceBackend("int8" if scheme == "int8" else "f32")
    for before in (norm, None):
        found, expected = (
            each.numpy(each.linear(weight, bias, norm=before, act="gelu")(x, add=add, delta=delta))
            for each in (backend, oracle)
        )
        # Values of up to some 60, sums in another order; where an input lies at the edge of two
        # codes, one step of some 1/40 of a weight's 3 deviations: none of these does.
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_what_is_given_to_tritons_kernels_is_what_they_take(scheme, monkeypatch):
    """With their twins in their place, which the kernels' own tests compare them with."""
    pytest.importorskip("triton")
    from bloomq.backends.cuda import triton_norm, triton_products

    calls = []

    def multiplied(x, codes, scales, *, scheme, group_size, x_scales=None, bias=None, delta=None,
                   act=None, add=None):  # fmt: skip
        calls.append(len(x))
        for given in (x, delta, add):
            assert given is None or given.is_contiguous()
        kind = get_scheme(scheme, group_size if scheme in DEFAULT_GROUP else None)
        there = Stored(kind, (len(codes), x.shape[1]), codes, scales)
        assert triton_products.takes(
            len(x), there.columns, scheme=scheme, group_size=group_size, dtype=x.dtype
        )
        if x_scales is not None:
            wide = x_scales.repeat_interleave(128, dim=1)[:, : x.shape[1]]
            x = x.float() * wide
        w = products.restored(there)[:, : x.shape[1]]
        return linear.Epilogue(bias, act)(x.float() @ w.T, delta, add)

    def rounded_plainly(x, *, gain=None, bias=None, epsilon=0.0, group=128):
        assert triton_norm.takes_columns(x.shape[1])
        if gain is not None:
            x = triton_norm.plain_layer_norm(x, gain, bias, epsilon)
        return triton_norm.plain_rounded(x, group)

    monkeypatch.setattr(triton_products, "product", multiplied)
    monkeypatch.setattr(triton_norm, "rounded", rounded_plainly)
    monkeypatch.setattr(
        triton_norm, "layer_norm",
        lambda x, gain, bias, epsilon, out_dtype: (
            triton_norm.plain_layer_norm(x, gain, bias, epsilon).to(out_dtype)
        ),
    )  # fmt: skip
    backend = CudaBackend("cpu", kernels="triton")
    for tokens in (1, 3, 64, 65):
        compare(backend, scheme, tokens)
    few = [1] if get_scheme(scheme).is_float else [1, 3, 64]
    assert calls == [tokens for tokens in few for _ in range(2)]


def test_a_token_of_many_columns_is_rounded_in_cuts(monkeypatch):
    pytest.importorskip("triton")
    from bloomq.backends.cuda import triton_norm

    seen = []

    def rounded_plainly(x, *, group):
        seen.append(tuple(x.shape))
        return triton_norm.plain_rounded(x, group)

    monkeypatch.setattr(triton_norm, "rounded", rounded_plainly)
    how = Arithmetic(CPU, torch.float32, "triton")
    layer = CudaLinear(load(matrix("int8", (8, 57_344))), how)
    x = inputs(3, 57_344)
    assert layer._few is not None
    assert torch.equal(layer._few.rounded_values(x), rounded(x, 128))
    assert seen == [(84, 2048)]


def test_a_norm_of_nothing_is_nothing():
    norm = DeviceNorm(torch.ones(8), torch.zeros(8), 1e-5)
    assert norm(torch.zeros(0, 8), torch.bfloat16).shape == (0, 8)


def test_gelus_constants_are_blooms():
    x = torch.linspace(-12, 12, 4001)
    wide = x.double()
    exact = 0.5 * wide * (1 + torch.tanh(0.79788456 * wide * (1 + 0.044715 * wide * wide)))
    found = linear.Epilogue(None, "gelu")(x.clone(), None, None)
    assert float((found - exact).abs().max()) < 2e-6  # tanh near 1, times 0.5 * 12


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_nothing_comes_from_the_host_within_a_step(scheme, kernels, monkeypatch):
    """A CUDA graph cannot hold it: what layers need beside their inputs is there after a call."""
    backend, source = CudaBackend("cpu", kernels=kernels), matrix(scheme, (45, 200))
    layers = backend.linear(source, act="gelu"), backend.embedding(source)
    given = inputs(2, 200), torch.tensor([3, 1])
    before = [layer(x) for layer, x in zip(layers, given, strict=True)]

    def from_host(*arguments, **options):
        raise AssertionError("a copy from the host")

    with monkeypatch.context() as patch:
        for name in ("tensor", "from_numpy", "as_tensor"):
            patch.setattr(torch, name, from_host)
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__"):
            patch.setattr(torch.Tensor, name, from_host)
        after = [layer(x) for layer, x in zip(layers, given, strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("scheme", ["int8", "nl4", "f16"])
@pytest.mark.parametrize("given", ["nothing", "bias", "all"])
def test_what_follows_a_product_of_many_tokens_is_the_same_in_one_kernel(scheme, given):
    pytest.importorskip("triton")
    source, x = matrix(scheme, (150, 256)), inputs(66, 256)  # Triton's products take 64
    wide = [torch.randn(66, 150, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    bias = None if given == "nothing" else torch.linspace(-1, 1, 150)
    delta, add = wide if given == "all" else (None, None)
    found = [
        CudaLinear(
            load(source), Arithmetic(CPU, torch.float32, kernels, "float"), bias, None,
            "gelu" if given == "all" else None,
        )(x, add=add, delta=delta)
        for kernels in ("triton", "torch")
    ]  # fmt: skip
    # The same product; gelu's exponential and quotient are good to some 2^-21, each of the sums
    # and scales to 2^-24.
    assert far(found[0], found[1]) < 2**-20
