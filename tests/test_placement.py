"""Where layers go: bytes against hand-computed tables, ranges, options, and what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.pack import Pack
from bloomq.parallel.cuts import Cuts, rank_bytes
from bloomq.placement import (
    GPUS,
    Device,
    Placement,
    Request,
    choose_devices,
    gpu_called,
    parse_bytes,
    parse_devices,
    parse_gpus,
    parse_max_memory,
    placed,
    plan,
)
from bloomq.placement.advice import best, check, largest_batch, largest_context, remedies
from bloomq.placement.models import PUBLISHED, label_of, published, schemes_of
from bloomq.placement.plan import has_room
from bloomq.placement.sizes import Rank, cache_bytes, sizes, weight_bytes
from bloomq.placement.speed import step_s
from bloomq.placement.work import CONTEXT_BYTES, work
from bloomq.schemes import get_scheme

# bloom-176b: C = 14,336, 70 layers, 112 heads of 128, 250,880 tokens.
C, LAYERS, VOCAB = 14336, 70, 250880
BODY = 12 * C * C  # weights of a block: qkv 3 C^2, out C^2, up 4 C^2, down 4 C^2
ROWS = 9 * C  # of a block's matrices: 3 C + C + 4 C + C; also the values of its biases
NORMS = 4 * C  # ln_1 and ln_2, gain and bias
VECTORS_BYTES = 4 * (ROWS + NORMS)  # biases and norms are float32
ENDS_BYTES = 4 * 4 * C  # emb_ln and ln_f
INT8_LAYER = BODY + 4 * ROWS + VECTORS_BYTES  # a byte a weight, a float32 scale a row
INT8_HEAD = VOCAB * C + 4 * VOCAB + ENDS_BYTES
FOUR_LAYER = BODY // 2 + 2 * BODY // 32 + VECTORS_BYTES  # float16 scales of groups of 32
INT6_HEAD = VOCAB * C + 2 * VOCAB * C // 64 + ENDS_BYTES  # held in bytes, scales of 64
# Keys and values of a token in a layer, 2 x 2 bytes a component, and of the slot that is nobody's.
CACHE_LAYER = (4 * 2048 + 1) * 2 * 2 * C
BIG = published("bloom-176b")


def request(scheme: str, gpus: str, *, batch: int = 4, nodes: int = 1, **more: Any) -> Request:
    """bloom-176b with 2,048 tokens in each row."""
    return Request(BIG, schemes_of(BIG, scheme), parse_gpus(gpus, nodes=nodes), 2048, batch, **more)


def ranges(placement: Placement) -> list[tuple[int | None, int | None]]:
    return [(share.first_layer, share.last_layer) for share in placement.shares]


# -- sizes -----------------------------------------------------------------------------------------


def test_the_published_models_have_their_published_parameters():
    # Source: the model cards at huggingface.co/bigscience.
    counts = {
        "bloom-560m": 559_214_592, "bloom-1b1": 1_065_314_304, "bloom-1b7": 1_722_408_960,
        "bloom-3b": 3_002_557_440, "bloom-7b1": 7_069_016_064, "bloom-176b": 176_247_271_424,
    }  # fmt: skip
    for name, count in counts.items():
        config, found = published(name), 0
        for spec in weight_specs(config):
            size = spec.shape[0] * (spec.shape[1] if spec.is_matrix else 1)
            found += size + spec.shape[0] * spec.has_bias
        assert found == count, name
    assert published("bigscience/BLOOM") == published("bloomz-mt") == published("bloom-176b")
    assert published("bloomz-7b1-mt") == published("bloom-7b1")


def test_int8_of_the_176b_has_the_bytes_that_paper_says():
    assert INT8_LAYER == 2_466_250_752 + 516_096 + 745_472 == 2_467_512_320
    assert INT8_HEAD == 3_596_615_680 + 1_003_520 + 229_376 == 3_597_848_576
    found = sizes(BIG, schemes_of(BIG, "int8"), "cuda")
    assert found.layers(range(1)).nbytes == INT8_LAYER
    assert found.head.nbytes == INT8_HEAD
    assert found.embedding.nbytes == 0  # the head's table is the embedding's
    assert found.before[-1].nbytes == LAYERS * INT8_LAYER == 172_725_862_400


def test_four_bits_of_the_176b_have_the_bytes_that_paper_says():
    assert FOUR_LAYER == 1_233_125_376 + 154_140_672 + 745_472 == 1_388_011_520
    assert INT6_HEAD == 3_596_615_680 + 112_394_240 + 229_376 == 3_709_239_296
    int4 = sizes(BIG, schemes_of(BIG, "int4"), "cuda")
    assert (int4.layers(range(3)).nbytes, int4.head.nbytes) == (3 * FOUR_LAYER, INT6_HEAD)
    # nf4 has float32 scales of 64: the same bytes as float16 scales of 32.
    nf4 = sizes(BIG, schemes_of(BIG, "nf4"), "cuda")
    assert nf4.layers(range(1)).nbytes == FOUR_LAYER


@pytest.mark.parametrize(
    ("scheme", "bytes_of_640_columns"),
    [
        ("int8", [96 * 640, 4 * 96]),
        ("int6", [96 * 640, 2 * 96 * 10]),
        ("nl4", [96 * 320, 2 * 96 * 10]),
        ("int4", [96 * 320, 2 * 96 * 20]),
        ("nf4", [96 * 320, 4 * 96 * 10]),
        ("bf16", [2 * 96 * 640]),
        ("f32", [4 * 96 * 640]),
    ],
)
def test_each_scheme_has_its_bytes_on_a_gpu(scheme: str, bytes_of_640_columns: list[int]):
    config = BloomConfig(hidden_size=640, n_layer=1, n_head=10, vocab_size=96)
    wte = weight_specs(config)[0]
    assert weight_bytes(wte, get_scheme(scheme), "cuda") == bytes_of_640_columns


def test_columns_are_padded_to_whole_groups_and_rows_are_not():
    config = BloomConfig(hidden_size=80, n_layer=1, n_head=10, vocab_size=97)
    wte = weight_specs(config)[0]
    assert weight_bytes(wte, get_scheme("int8"), "cuda") == [97 * 128, 4 * 97]


def test_the_cpu_holds_a_pack_byte_for_byte(pack_of: Callable[..., Path]):
    pack = Pack.open(pack_of("int4"))
    found = sizes(pack.config, pack.schemes, "cpu")
    assert found.before[-1].nbytes + found.head.nbytes == pack.nbytes


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4", "bf16", "f32"])
def test_the_cuda_backend_holds_the_bytes_that_a_plan_says(
    pack_of: Callable[..., Path], scheme: str
):
    torch = pytest.importorskip("torch")
    stored = pytest.importorskip("bloomq.backends.cuda.stored")
    pack = Pack.open(pack_of(scheme))
    loader = stored.Loader(torch.device("cpu"))
    for spec in weight_specs(pack.config):
        if spec.is_matrix:
            bare = replace(spec, has_bias=False)
            held = loader.load(pack.matrix(spec.name)).nbytes
            assert held == sum(weight_bytes(bare, pack.schemes[spec.name], "cuda")), spec.name


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_the_cuda_backends_cache_has_the_bytes_that_a_plan_says(
    pack_of: Callable[..., Path], dtype: Any
):
    torch = pytest.importorskip("torch")
    cache = pytest.importorskip("bloomq.backends.cuda.cache")
    config = Pack.open(pack_of("int4")).config
    made = cache.CudaCache(config, 3, 200, 0, dtype, torch.device("cpu"))
    assert made.nbytes == config.n_layer * cache_bytes(config, dtype, "cuda", 3, 200).nbytes


def test_a_planned_model_gets_the_schemes_that_a_conversion_gives(pack_of: Callable[..., Path]):
    for scheme, group_size, head in (
        ("int8", None, None),
        ("nl4", 32, None),
        ("int4", 64, "nl4"),
        ("nf4", None, "int4"),
    ):
        pack = Pack.open(pack_of(scheme, group_size, head))
        assert schemes_of(pack.config, scheme, group_size, head) == pack.schemes
    assert label_of(schemes_of(BIG, "nl4")) == "nl4-g64, embedding int6"


def test_a_cache_has_a_slot_that_is_nobodys_and_int8_scales():
    assert cache_bytes(BIG, "f16", "cuda", 4, 2048).nbytes == CACHE_LAYER
    # int8: 128 codes and a float32 scale for each head, of keys and of values.
    assert cache_bytes(BIG, "int8", "cuda", 4, 2048).nbytes == 8193 * 2 * 112 * (128 + 4)
    # On the CPU whole pages of 64 tokens, each with a float32 a head beside it.
    page = 64 * 2 * 112 * 128 * 2 + 4 * 112
    assert cache_bytes(BIG, "f16", "cpu", 4, 100).nbytes == 4 * 2 * page


def test_a_rank_has_its_share_of_rows_or_columns():
    held = {spec.name: spec for spec in weight_specs(BIG)}
    int8, schemes = get_scheme("int8"), schemes_of(BIG, "int8")
    first, second = (Rank(Cuts.of(BIG, schemes, 2), number) for number in (0, 1))
    half = 3 * C // 2
    for rank in (first, second):
        found = weight_bytes(held["h.0.attn.qkv"], int8, "cuda", rank)
        assert found == [half * C, 4 * half, 4 * half]
    # By columns: every rank has all rows, and so all of their scales; one has the bias.
    down = held["h.0.mlp.down"]
    assert weight_bytes(down, int8, "cuda", first) == [2 * C * C, 4 * C, 4 * C]
    assert weight_bytes(down, int8, "cuda", second) == [2 * C * C, 4 * C]
    assert weight_bytes(held["wte"], int8, "cuda", second) == [125440 * C, 4 * 125440]
    assert weight_bytes(held["ln_f"], None, "cuda", second) == [4 * C, 4 * C]


def test_ranks_have_of_matrices_what_tensor_parallelism_gives_them():
    schemes = schemes_of(BIG, "int4")
    for number in (0, 2):  # of 38, 37 and 37 heads
        rank = Rank(Cuts.of(BIG, schemes, 3), number)
        theirs = rank_bytes(BIG, schemes, 3, number)
        for spec in weight_specs(BIG):
            scheme = schemes.get(spec.name)
            if scheme is not None and scheme.name != "int6":  # which a GPU holds in bytes
                mine = weight_bytes(replace(spec, has_bias=False), scheme, "cuda", rank)
                assert sum(mine) == theirs[spec.name], spec.name


def test_the_allocator_rounds_as_torch_does():
    # 3 MiB come six to a block of 20 MiB, of which 2 MiB are lost: a third of a MiB each.
    config = BloomConfig(hidden_size=1024, n_layer=1, n_head=8, vocab_size=3072)
    table = sizes(config, schemes_of(config, "int8"), "cuda").head
    scales, norms = 4 * 3072, 4 * 4 * 1024  # both whole multiples of 512 bytes
    assert table.nbytes == (3 << 20) + scales + norms
    assert table.rounding_bytes == (20 << 20) // 6 - (3 << 20)


# -- work space ------------------------------------------------------------------------------------


def test_work_space_of_the_176b_is_what_its_parts_add_up_to():
    found = work(
        BIG, "cuda", layers=70, has_head=True, batch=4, context=2048, cache_dtype="f16",
        schemes=[get_scheme("int4"), get_scheme("int6")],
    )  # fmt: skip
    assert found.context_bytes == CONTEXT_BYTES == 600 << 20
    # 2,048 tokens of 48 C bytes; then int4's blocks restored, 2.5 x 128 MiB, which are more than
    # 2^26 biases of 2 bytes.
    assert found.step_bytes == 2048 * 48 * C + 320 * (1 << 20)
    # 4 rows of logits, float32; of each logit its order, 4 bytes, and its key, 8; each token's
    # place, 8 bytes.
    assert found.logits_bytes == VOCAB * (4 * 4 + 4 * 12 + 8) == 18_063_360
    # Steps of 1, 2 and 4 rows, each of 70 x 15 kernels of 16 KiB; activations and logits of 7 rows
    # in all, and what each step finds out about its logits.
    surveyed = VOCAB * (7 * 12 + 3 * 8)
    assert found.graph_bytes == 3 * 70 * 15 * 16384 + 7 * (48 * C + 4 * VOCAB) + surveyed


def test_recorded_steps_of_more_rows_than_are_surveyed_keep_their_logits_alone():
    same: dict[str, Any] = {"layers": 1, "context": 64, "cache_dtype": "f16"}
    graphs = {
        (batch, head): work(
            BIG, "cuda", **same, has_head=head, batch=batch, schemes=[get_scheme("f16")]
        ).graph_bytes
        for batch in (64, 96) for head in (False, True)
    }  # fmt: skip
    # 1, 2, 4, ... 64: 127 rows in 7 steps; one step more of 96.
    assert graphs[64, True] - graphs[64, False] == VOCAB * (127 * (4 + 12) + 7 * 8)
    assert graphs[96, True] - graphs[64, True] - (graphs[96, False] - graphs[64, False]) == (
        96 * VOCAB * 4
    )


def test_a_rank_has_its_share_of_a_steps_work():
    found = work(
        BIG, "cuda", layers=70, has_head=False, batch=4, context=2048, cache_dtype="f16",
        schemes=[get_scheme("int8")], heads=14,
    )  # fmt: skip
    # An eighth of the heads: of a token 8 C bytes whole and an eighth of 48 C, and biases of 14.
    assert found.step_bytes == 2048 * (8 * C + 6 * C) + 2048 * 2048 * (14 * 2 + 12)


def test_logits_of_many_tokens_are_read_64_at_a_time_and_sampled_one_by_one():
    small = published("bloom-560m")
    same: dict[str, Any] = {"layers": 24, "cache_dtype": "f16", "schemes": [get_scheme("f16")]}
    found = work(small, "cuda", **same, has_head=True, batch=1, context=2048)
    # More than 2,048 tokens of 48 x 1024 bytes and 16 x 2048 x 2048 biases of 2.75 bytes: 276 MB.
    assert found.step_bytes == max(VOCAB * (64 * 16 + 8), 2048 * 48 * 1024 + (1 << 26) * 11 // 4)
    # Of one row four float64 and which are possible, 33 bytes, are more than 12 + 8.
    assert found.logits_bytes == VOCAB * (4 + 33)


def test_a_cache_that_doubles_has_room_for_the_last_layers_of_the_one_before():
    small = published("bloom-560m")
    found = work(
        small, "cuda", layers=24, has_head=False, batch=256, context=2048, cache_dtype="f16",
        schemes=[get_scheme("f16")],
    )  # fmt: skip
    assert found.step_bytes == (256 * 2048 + 1) * 2 * 2 * 1024


def test_nl4_restores_two_blocks_nf4_whole_matrices_and_an_int8_cache_a_row():
    same: dict[str, Any] = {"layers": 1, "has_head": False, "batch": 1, "context": 2048}
    plain = work(BIG, "cuda", **same, cache_dtype="f16", schemes=[get_scheme("f16")])
    # Biases of 2 bytes, made of distances of 12 bytes for all 112 heads.
    assert plain.step_bytes == 2048 * 48 * C + int((1 << 26) * (2 + 12 / 112))
    wide = work(BIG, "cuda", **same, cache_dtype="f32", schemes=[get_scheme("f32")])
    assert wide.step_bytes - plain.step_bytes == 2 * (1 << 26)
    nl4 = work(BIG, "cuda", **same, cache_dtype="f16", schemes=[get_scheme("nl4")])
    assert nl4.step_bytes == 2048 * 48 * C + 2 * (128 << 20)
    nf4 = work(BIG, "cuda", **same, cache_dtype="f16", schemes=[get_scheme("nf4")])
    assert nf4.step_bytes == 2048 * 48 * C + 8 * C * C
    int8 = work(BIG, "cuda", **same, cache_dtype="int8", schemes=[get_scheme("f16")])
    assert int8.step_bytes - plain.step_bytes == 2 * 2048 * C * 10


def test_int8_matrices_round_their_inputs_and_many_rows_restore_weights():
    same: dict[str, Any] = {"layers": 1, "has_head": False, "context": 2048, "cache_dtype": "f16"}
    few = work(BIG, "cuda", **same, batch=4, schemes=[get_scheme("int8")])
    assert few.step_bytes == 2048 * 56 * C + int((1 << 26) * (2 + 12 / 112))
    assert few.graph_bytes == 3 * 15 * 16384 + 7 * 56 * C
    many = work(BIG, "cuda", **same, batch=65, schemes=[get_scheme("int8")])
    assert many.graph_bytes == 8 * 15 * 16384 + (127 + 65) * 56 * C + (128 << 20)


def test_a_device_without_the_head_needs_no_logits():
    rest = work(
        BIG, "cuda", layers=9, has_head=False, batch=4, context=64, cache_dtype="f16",
        schemes=[get_scheme("int8")],
    )  # fmt: skip
    assert rest.logits_bytes == 0
    cpu = work(
        BIG, "cpu", layers=9, has_head=False, batch=4, context=64, cache_dtype="f16",
        schemes=[get_scheme("int8")],
    )  # fmt: skip
    assert (cpu.context_bytes, cpu.graph_bytes) == (170 << 20, 0)


# -- the 176B on the hardware of the issue ---------------------------------------------------------


def test_int8_of_the_176b_lies_on_three_gpus_of_80_gb():
    placement = placed(request("int8", "3x80GB"))
    assert placement.fits
    # 70 layers of 2.467 + 0.470 GB and a head of 3.6 GB, evenly: 24, 24 and 22 with the head.
    assert ranges(placement) == [(0, 23), (24, 47), (48, 69)]
    assert (placement.head, placement.embedding) == (2, None)  # looked up in host memory
    assert [share.weights.nbytes for share in placement.shares] == [
        24 * INT8_LAYER, 24 * INT8_LAYER, 22 * INT8_LAYER + INT8_HEAD
    ]  # fmt: skip
    assert placement.weights_bytes == 70 * INT8_LAYER + INT8_HEAD == 176_323_710_976
    assert placement.cache_bytes == 70 * CACHE_LAYER == 32_887_357_440
    assert all(share.nbytes <= 80e9 for share in placement.shares)


def test_int8_of_the_176b_lies_on_two_gpus_of_141_gb():
    placement = placed(request("int8", "2x141GB"))
    assert placement.fits
    assert ranges(placement) == [(0, 35), (36, 69)]
    assert placement.shares[0].weights.nbytes == 36 * INT8_LAYER
    assert placement.shares[1].cache.nbytes == 34 * CACHE_LAYER


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_four_bits_of_the_176b_lie_on_one_gpu_of_141_gb_with_room_for_four_texts(scheme: str):
    placement = placed(request(scheme, "1x141GB"))
    assert placement.fits
    assert ranges(placement) == [(0, 69)]
    assert placement.embedding == placement.head == 0
    assert placement.weights_bytes == 70 * FOUR_LAYER + INT6_HEAD == 100_870_045_696
    assert largest_batch(request(scheme, "1x141GB")) == 4


def test_the_176b_on_eight_gpus_of_24_gb_gets_four_bits():
    wanted = best(request("int8", "8x24GB"))
    assert label_of(wanted.schemes) == "nl4-g32, embedding int6"
    placement = placed(wanted)
    # Not on the six that would be 99 % full: 9 layers each, 7 beside the head.
    assert [len(share.layers) for share in placement.shares] == [9] * 7 + [7]
    assert not placed(request("int8", "8x24GB")).fits  # 209 GB on 192


def test_two_nodes_of_four_gpus_share_every_layer_of_the_176b():
    placement = placed(request("int8", "4x40GB", nodes=2, split="tensor"))
    assert placement.fits
    assert [share.device.node for share in placement.shares] == [0] * 4 + [1] * 4
    assert ranges(placement) == [(0, 69)] * 8
    # An eighth of all weights; of scales and biases by rows an eighth of 7 C, by columns all scales
    # of 2 C rows, whose biases the first rank has; all norms.
    layer = BODY // 8 + 2 * 4 * 7 * C // 8 + 4 * 2 * C + 4 * NORMS
    head = VOCAB * C // 8 + 4 * VOCAB // 8 + ENDS_BYTES
    weights = [share.weights.nbytes for share in placement.shares]
    assert weights == [70 * (layer + 4 * 2 * C) + head] + [70 * layer + head] * 7
    assert placement.shares[0].cache.nbytes == 70 * CACHE_LAYER // 8
    with pytest.raises(UsageError, match="cannot lie on several machines"):
        request("int8", "4x40GB", nodes=2)


def test_heads_that_do_not_divide_make_uneven_ranks():
    placement = placed(request("int8", "3x80GB", split="tensor"))
    assert placement.fits
    assert [share.cache.nbytes for share in placement.shares] == [
        70 * (4 * 2048 + 1) * 2 * 2 * heads * 128 for heads in (38, 37, 37)
    ]


def test_what_gpus_cannot_hold_the_cpu_does_from_the_first_layer_on():
    placement = placed(request("int4", "1x80GB,cpu:64GB"))
    assert placement.fits
    cpu, gpu = placement.shares
    assert (cpu.device.name, gpu.device.name) == ("cpu", "cuda:0")
    assert (cpu.first_layer, gpu.last_layer) == (0, 69)
    assert cpu.layers.stop == gpu.layers.start
    assert gpu.has_head and not cpu.has_head
    one_more = gpu.nbytes + FOUR_LAYER + CACHE_LAYER
    assert gpu.nbytes <= 80e9 < one_more  # the GPU is full
    assert not placed(request("int4", "1x80GB,cpu:32GB")).fits


def test_a_model_that_one_gpu_holds_is_not_spread_over_many():
    config = published("bloom-560m")
    placement = plan(config, schemes_of(config, "int8"), parse_gpus("4x80GB"), context=2048)
    assert [share.device.name for share in placement.shares] == ["cuda:0"]


def test_unequal_gpus_are_filled_alike():
    config = published("bloom-7b1")
    devices = parse_gpus("1x6GB,1x4GB")
    placement = plan(config, schemes_of(config, "int8"), devices, context=256)
    assert placement.fits
    full = [share.nbytes / share.device.memory_bytes for share in placement.shares]
    layer = placement.shares[0].weights.nbytes / len(placement.shares[0].layers)
    assert abs(full[0] - full[1]) < 2 * layer / 4e9  # to a layer of either
    assert sum(len(share.layers) for share in placement.shares) == 30


@settings(max_examples=40, deadline=None)
@given(
    gb=st.lists(st.integers(1, 12), min_size=1, max_size=5), cpu_gb=st.integers(0, 9),
    scheme=st.sampled_from(["int8", "int4"]), batch=st.integers(1, 9),
)  # fmt: skip
def test_what_fits_has_every_layer_once_in_order_within_every_memory(
    gb: list[int], cpu_gb: int, scheme: str, batch: int
):
    config = published("bloom-7b1")
    hardware = ",".join([f"{size}GB" for size in gb] + [f"cpu:{cpu_gb}GB"] * (cpu_gb > 0))
    wanted = Request(config, schemes_of(config, scheme), parse_gpus(hardware), 700, batch)
    placement = placed(wanted)
    assert has_room(wanted) == placement.fits
    assert all(share.layers for share in placement.shares)
    layers = [layer for share in placement.shares for layer in share.layers]
    first = layers[0] if layers else 30
    assert layers == list(range(first, 30))
    if placement.fits:
        assert first == 0
        assert all(share.nbytes <= share.device.memory_bytes for share in placement.shares)
        assert [share.has_head for share in placement.shares][-1]
        assert placement.cache_bytes >= 30 * 2 * 2 * 4096 * 700 * batch


def test_a_cap_is_the_most_that_a_device_gets():
    capped = plan(
        BIG, schemes_of(BIG, "int8"), parse_gpus("4x80GB"), context=2048, batch=4,
        max_memory={"cuda:0": 40 * 10**9},
    )  # fmt: skip
    assert capped.fits
    assert capped.shares[0].nbytes <= 40e9
    with pytest.raises(UsageError, match="most memory is given for cuda:7, which is none of"):
        plan(BIG, {}, parse_gpus("1x80GB"), context=64, max_memory={"cuda:7": 1})


def test_an_untied_head_is_held_beside_the_embedding_by_a_device_that_is_alone():
    config = replace(published("bloom-560m"), tie_word_embeddings=False)
    schemes, table = schemes_of(config, "int8"), 250880 * 1024 + 4 * 250880
    alone = plan(config, schemes, parse_gpus("1x16GB"), context=64)
    assert alone.weights_bytes - alone.shares[0].read_bytes == table
    two = plan(config, schemes, parse_gpus("2x1300MB"), context=64)
    assert len(two.shares) == 2
    assert two.weights_bytes == alone.shares[0].read_bytes


def test_a_yardstick_gets_a_float32_cache():
    config = published("bloom-560m")
    gpu = parse_gpus("1x80GB")
    assert plan(config, schemes_of(config, "bf16"), gpu, context=64).cache_dtype == "f32"
    assert plan(config, schemes_of(config, "int8"), gpu, context=64).cache_dtype == "f16"


# -- speed -----------------------------------------------------------------------------------------


def test_devices_that_take_turns_add_up_their_times():
    three = request("int8", "3x80GB@2000")
    placement = placed(three)
    read_s = (70 * INT8_LAYER + INT8_HEAD) / 2000e9
    assert step_s(placement, BIG, batch=1, tokens=0) == pytest.approx(read_s + 3 * 20e-6)
    full_s = read_s + 70 * CACHE_LAYER / 2000e9
    assert step_s(placement, BIG, batch=4, tokens=2048) == pytest.approx(full_s + 3 * 20e-6)


def test_tensor_parallel_reads_at_once_and_sums_twice_a_block():
    placement = placed(request("int8", "8x80GB@2000", split="tensor"))
    share = placement.shares[0]
    sums_s = 140 * (20e-6 + 4 * C * 2 * 7 / 8 / 25e9)
    found = step_s(placement, BIG, batch=1, tokens=0)
    assert found == pytest.approx(share.read_bytes / 2000e9 + sums_s)
    faster = step_s(placement, BIG, batch=1, tokens=0, link_gb_s=450)
    assert faster is not None and found is not None and faster < found


def test_no_bandwidth_no_speed():
    assert step_s(placed(request("int4", "1x200GB")), BIG, batch=1, tokens=0) is None


# -- what would fit --------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_what_would():
    wanted = request("int8", "1x141GB")
    with pytest.raises(CapacityError, match="the model does not fit: ") as refused:
        check(wanted)
    text = str(refused.value)
    for way in ("--scheme nl4 --group-size 32", "1 more GPU (141GB as H200)", "GB beside the GPUs"):
        assert way in text
    assert check(request("int4", "1x141GB")).fits


@pytest.mark.parametrize(
    ("scheme", "gpus", "more"),
    [
        ("int8", "8x24GB", {}),
        ("int8", "2x80GB", {}),
        ("int8", "1x80GB,cpu:16GB", {}),
        ("int8", "4x40GB", {"split": "tensor"}),
        ("bf16", "cpu:64GB", {}),
    ],
)
def test_every_way_out_that_is_advised_really_fits(scheme: str, gpus: str, more: dict[str, Any]):
    wanted = request(scheme, gpus, **more)
    ways = remedies(wanted)
    assert ways
    for way in ways:
        assert placed(changed_as_advised(wanted, way)).fits, way


def changed_as_advised(wanted: Request, way: str) -> Request:
    """The request with the change that a line of advice names."""
    if found := re.fullmatch(r"--scheme (\w+)(?: --group-size (\d+))?", way):
        size = None if found[2] is None else int(found[2])
        return replace(wanted, schemes=schemes_of(BIG, found[1], size))
    if way == "cache dtype int8":
        return wanted.changed(cache_dtype="int8")
    if found := re.fullmatch(r"(context|batch) (\d+)", way):
        return wanted.changed(**{found[1]: int(found[2])})
    if found := re.match(r"(\d+) more GPU", way):
        added = [replace(wanted.gpus[-1], name=f"cuda:{100 + i}") for i in range(int(found[1]))]
        rest = wanted.devices[len(wanted.gpus) :]
        return wanted.changed(devices=(*wanted.gpus, *added, *rest))
    found = re.match(r"cpu:(\d+)GB", way)
    assert found is not None, way
    cpu = Device("cpu", int(found[1]) * 10**9, None, "CPU")
    return wanted.changed(devices=(*wanted.gpus, cpu))


def test_limits_are_the_last_that_fit():
    wanted = request("int8", "3x80GB")
    batch, context = largest_batch(wanted), largest_context(wanted)
    assert placed(wanted.changed(batch=batch)).fits
    assert not placed(wanted.changed(batch=batch + 1)).fits
    assert placed(wanted.changed(context=context)).fits
    assert not placed(wanted.changed(context=context + 64)).fits
    assert largest_batch(request("int8", "1x80GB")) == 0


# -- hardware and options --------------------------------------------------------------------------


def test_gpus_are_named_by_size_by_product_and_by_bandwidth():
    eight = parse_gpus("2xH100, 1x24GB@900, cpu:64GB")
    assert [device.name for device in eight] == ["cuda:0", "cuda:1", "cuda:2", "cpu"]
    assert eight[0].memory_bytes == int(0.985 * 81559 * 2**20)
    assert (eight[0].gb_s, eight[2].gb_s, eight[2].memory_bytes) == (3350, 900, 24 * 10**9)
    assert parse_gpus("80GiB")[0].memory_bytes == 80 << 30
    assert parse_gpus("1x24GB")[0].gb_s == 300  # as the slowest of that size
    assert parse_gpus("rtx 4090") == parse_gpus("RTX4090") == parse_gpus("4090")
    assert parse_gpus("A100-80GB")[0].gb_s == 2039


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_drivers_names_are_known(driver: str, name: str):
    found = gpu_called(driver)
    assert found is not None and found.name == name
    assert gpu_called("Radeon VII") is None


def test_every_gpu_of_the_table_is_found_by_its_own_name():
    for gpu in GPUS:
        assert parse_gpus(gpu.name)[0].label == gpu.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "hardware '', expected such as 3x80GB"),
        ("3x", "unknown GPU '3x'"),
        ("@900", "hardware '@900', expected such as 3x80GB"),
        ("3xH9000", "unknown GPU 'H9000', expected one of B200"),
        ("A100", "unknown GPU 'A100'"),
        ("0x80GB", "expected 1 to 1024 GPUs in all"),
        ("9999x80GB", "expected 1 to 1024 GPUs in all"),
        ("1x80GB@0", "hardware '1x80GB@0': 0 GB/s, expected more than 0"),
        ("cpu:64GB,cpu:1GB", "has several CPUs, expected cpu:SIZE once"),
        ("cpu:lots", "size 'lots', expected a number and its unit"),
        ("80", "unknown GPU '80'"),
        ("cpu:80", "size '80' is 80 bytes, expected 1 MiB or more"),
    ],
)
def test_wrong_hardware_is_named(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_gpus(text)
    with pytest.raises(UsageError, match="0 machines, expected 1 to 1024"):
        parse_gpus("1x80GB", nodes=0)


def test_sizes_have_units_of_a_thousand_and_of_1024():
    assert parse_bytes("70GiB") == 70 * 2**30
    assert parse_bytes(" 1.5 GB") == 1_500_000_000
    assert parse_bytes("3000000") == 3_000_000
    with pytest.raises(UsageError, match="expected a number and its unit, as in 80GB"):
        parse_bytes("1.5")


def test_devices_are_named_in_order():
    assert parse_devices("auto") == ("auto",)
    assert parse_devices("cpu") == ("cpu",)
    assert parse_devices("cuda") == ("cuda:0",)
    assert parse_devices("cuda:0,1") == ("cuda:0", "cuda:1")
    assert parse_devices("cuda:1, cuda:0,cpu") == ("cuda:1", "cuda:0", "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "'gpu', expected auto, cpu, or GPUs as in cuda:0,1"),
        ("0,1", "'0', expected auto, cpu, or GPUs"),
        ("cuda:0,auto", "'auto', expected auto, cpu, or GPUs"),
        ("cuda:0,0", "has cuda:0 twice, expected every device once"),
        ("cpu,cuda:0", "expected the CPU last: it takes what GPUs cannot"),
        ("", "'', expected auto, cpu, or GPUs"),
    ],
)
def test_wrong_devices_are_named(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_devices(text)


def test_devices_are_chosen_of_those_that_are_here():
    here = parse_gpus("2x80GB,cpu:64GB")
    assert [device.name for device in choose_devices(("auto",), here)] == ["cuda:0", "cuda:1"]
    assert choose_devices(("auto",), here[2:]) == here[2:]
    assert choose_devices(("cuda:1", "cpu"), here) == here[1:]
    with pytest.raises(BackendError, match="cuda:4 is not on this machine: found cuda:0, cuda:1"):
        choose_devices(("cuda:4",), here)


def test_the_most_memory_of_each_device_is_read():
    found = parse_max_memory("0:70GiB, cuda:1=10GB,cpu:64GiB")
    assert found == {"cuda:0": 70 << 30, "cuda:1": 10**10, "cpu": 64 << 30}
    with pytest.raises(UsageError, match="most memory 'all', expected DEVICE:SIZE as in 0:70GiB"):
        parse_max_memory("all")
    with pytest.raises(UsageError, match="has cuda:0 twice, expected it once"):
        parse_max_memory("0:1GB,cuda:0:2GB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context to plan for is 0, expected 1 to"),
        ({"batch": 1 << 20}, "batch to plan for is 1048576, expected 1 to"),
        ({"cache_dtype": "f8"}, "cache_dtype to plan for is 'f8', expected auto"),
        ({"devices": ()}, "no devices to plan for, expected one or more"),
    ],
)
def test_what_cannot_be_planned_is_named(change: dict[str, Any], message: str):
    given: dict[str, Any] = {
        "config": BIG, "schemes": schemes_of(BIG, "int8"), "devices": parse_gpus("1x80GB"),
        "context": 64, "batch": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        Request(**{**given, **change})


def test_devices_in_another_order_or_number_are_refused():
    gpu, cpu = parse_gpus("1x80GB,cpu:64GB")
    with pytest.raises(UsageError, match="the CPU is before a GPU, expected it last"):
        Request(BIG, schemes_of(BIG, "int8"), (cpu, gpu), 64)
    with pytest.raises(UsageError, match="tensor parallel plans are for GPUs alone"):
        Request(BIG, schemes_of(BIG, "int8"), (gpu, cpu), 64, split="tensor")
    with pytest.raises(UsageError, match="113 ranks for a model of 112 heads"):
        placed(request("int8", "113x80GB", split="tensor"))


def test_an_unknown_model_is_named_with_those_that_are_known():
    with pytest.raises(UsageError, match="unknown model 'bloom-13b', expected one of bloom-560m"):
        published("bloom-13b")
    assert "bloomz-560m" in PUBLISHED
