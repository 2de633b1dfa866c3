"""Mixed precision: the choice under a budget is the best there is, and what it rests on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from bloomq.converters.calibration.budget import CANDIDATES, choose
from bloomq.converters.calibration.sensitivity import measure
from bloomq.converters.plan import make_plan
from bloomq.converters.reading import read_checkpoint
from conftest import DEMO, write_checkpoint

from bloomq.config import BloomConfig, weight_specs
from bloomq.errors import OutputError, UsageError
from bloomq.schemes import Scheme, get_scheme

CONFIG = BloomConfig(hidden_size=128, n_layer=1, n_head=4, vocab_size=512)
NAMES = [spec.name for spec in weight_specs(CONFIG) if spec.is_matrix]


def random_costs(seed: int) -> dict[str, dict[Scheme, float]]:
    """Falling with the size of the scheme, but for one matrix that nothing helps."""
    rng = np.random.default_rng(seed)
    costs = {
        name: dict(zip(CANDIDATES, np.sort(rng.random(5))[::-1].tolist(), strict=True))
        for name in NAMES
    }
    costs[NAMES[2]] = dict.fromkeys(CANDIDATES, 0.1)
    return costs


def bits_of(schemes: dict[str, Scheme], tmp_path: Path) -> float:
    """As the plan of a conversion counts them."""
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder, hidden_size=128, vocab_size=512)
    return make_plan(folder, tmp_path / "pack", schemes=schemes).bits_per_weight


@pytest.mark.parametrize("bits", [4.7, 5.0, 5.6, 6.3, 8.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_choice_within_the_budget_costs_less(tmp_path, bits, seed):
    costs = random_costs(seed)

    def cost(schemes: dict[str, Scheme]) -> float:
        return sum(costs[name][scheme] for name, scheme in schemes.items())

    chosen = choose(CONFIG, costs, bits)
    assert bits_of(chosen, tmp_path) <= bits
    bits_by = {  # what each adds to the smallest
        name: {
            scheme: np.prod(shape) * size(scheme) for scheme in CANDIDATES
        }
        for name, shape in ((s.name, s.shape) for s in weight_specs(CONFIG) if s.is_matrix)
    }  # fmt: skip
    room = sum(bits_by[name][scheme] for name, scheme in chosen.items())
    for other in itertools.product(CANDIDATES, repeat=len(NAMES)):
        schemes = dict(zip(NAMES, other, strict=True))
        if sum(bits_by[name][scheme] for name, scheme in schemes.items()) <= room:
            assert cost(chosen) <= cost(schemes) + 1e-12


def size(scheme: Scheme) -> float:
    """Bits a weight, but for int8's scales."""
    return {"nl4": 4 + 16 / scheme.group_size, "int6": 6.25, "int8": 8.25}[scheme.name]


def test_room_for_all_gives_all_the_best(tmp_path):
    costs = random_costs(3)
    chosen = choose(CONFIG, costs, 16)
    assert all(chosen[n] == get_scheme("int8") for n in NAMES if n != NAMES[2])
    assert chosen[NAMES[2]] == CANDIDATES[0]  # of equal costs the smaller


def test_a_budget_below_the_smallest_is_refused(tmp_path):
    costs = random_costs(0)
    with pytest.raises(UsageError, match=r"smallest scheme takes so many for this model") as caught:
        choose(CONFIG, costs, 4.1)
    least = float(str(caught.value).split("expected ")[1].split()[0])
    assert bits_of(choose(CONFIG, costs, least), tmp_path) <= least
    with pytest.raises(UsageError, match="expected"):
        choose(CONFIG, costs, least - 0.02)


@pytest.mark.parametrize("bits", [float("nan"), -1, "4.25", True, 0])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(UsageError, match="bits"):
        choose(CONFIG, random_costs(0), bits)


def test_a_classifiers_rows_stay_as_they_are():
    config = BloomConfig(
        hidden_size=64, n_layer=1, n_head=4, vocab_size=96,
        architecture="BloomForSequenceClassification",
    )  # fmt: skip
    costs = {
        spec.name: dict.fromkeys(CANDIDATES, 1.0)
        for spec in weight_specs(config) if spec.is_matrix and spec.kind != "classifier"
    }  # fmt: skip
    assert choose(config, costs, 9)["score"] == get_scheme("f32")


def test_sensitivities_fall_with_bits_and_see_a_matrix_that_matters(tmp_path):
    def enlarge(tensors):
        dtype, w = tensors["transformer.h.1.self_attention.dense.weight"]
        tensors["transformer.h.1.self_attention.dense.weight"] = (dtype, w * np.float32(20))

    folder = write_checkpoint(tmp_path / "c", n_layer=2, vocab_size=96, edit=enlarge)
    checkpoint = read_checkpoint(folder)
    ids = np.random.default_rng(0).integers(0, 96, (2, 24))
    seen: list[tuple[int, int]] = []
    costs = measure(
        checkpoint, ids, tmp_path / "scratch", progress=lambda *at: seen.append(at), threads=1
    )
    assert list(costs) == [s.name for s in weight_specs(checkpoint.config) if s.is_matrix]
    for by_scheme in costs.values():
        values = [by_scheme[scheme] for scheme in CANDIDATES]
        assert values == sorted(values, reverse=True)
        assert values[-1] >= 0
    probe = {name: by_scheme[CANDIDATES[0]] for name, by_scheme in costs.items()}
    assert probe["h.1.attn.out"] > 5 * probe["h.0.attn.out"]
    assert seen[-1][0] == seen[-1][1]
    assert not (tmp_path / "scratch").exists()
    assert costs == measure(checkpoint, ids, tmp_path / "scratch", threads=2)


@pytest.mark.parametrize("architecture", ["BloomForSequenceClassification", "untied"])
def test_sensitivities_of_other_heads(tmp_path, architecture):
    def edit(tensors):
        if architecture == "untied":
            dtype, table = tensors["transformer.word_embeddings.weight"]
            tensors["lm_head.weight"] = (dtype, table[::-1].copy())
        else:
            tensors["score.weight"] = ("F32", np.ones((2, 64), np.float32))

    config = {"tie_word_embeddings": architecture != "untied"}
    if architecture != "untied":
        config["architectures"] = [architecture]
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "c", edit=edit, config=config))
    costs = measure(checkpoint, np.arange(40).reshape(2, 20), tmp_path / "scratch", threads=1)
    assert ("lm_head" in costs) == (architecture == "untied")
    assert all(by_scheme[CANDIDATES[0]] > 0 for by_scheme in costs.values())


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    from bloomq.converters.calibration import conversion

    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(conversion.tempfile, "TemporaryDirectory", refuse)
    text = tmp_path / "text.txt"
    text.write_text("A few words only.")
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        conversion.plan_calibrated(DEMO, tmp_path / "pack", text, bits=5)
