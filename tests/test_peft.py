"""Reading PEFT's folders: what is damaged, of another model, or more than plain LoRA is refused by
name.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import warm
from adapters import CONFIG, random_lora, written
from bloomq.converters.peft import LoraConfig, read_adapter
from conftest import Tensors, to_dtype
from models import Tiny
from torch_files import archive

import bloomq
from bloomq.errors import CheckpointError, ConfigError, InputNotFound
from bloomq.lora import Adapter

MODEL = Tiny(n_head=4, head_dim=8, n_layer=2).config
QKV = "base_model.model.transformer.h.0.self_attention.query_key_value"
WHERE = "adapter_model.safetensors: "


def refused(folder: Path, error: type[Exception] = CheckpointError) -> str:
    """What the error says behind the folder's name."""
    with pytest.raises(error) as caught:
        read_adapter(folder, MODEL)
    text = str(caught.value)
    assert text.startswith(str(folder)) and "\n" not in text
    return text.removeprefix(str(folder)).removeprefix("/")


def config_refused(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict(raw, "adapter_config.json")
    return str(caught.value).removeprefix("adapter_config.json: ")


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.transformer.", "base_model.model.", "transformer.", ""],
)
def test_names_with_and_without_their_prefixes_are_the_same(tmp_path, prefix):
    found = read_adapter(written(tmp_path / "lora", prefix=prefix), MODEL)
    right = read_adapter(written(tmp_path / "usual"), MODEL)
    assert list(found.factors) == [
        f"h.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    ]
    assert found.rank == 4
    for name, factors in right.factors.items():
        assert np.array_equal(found.factors[name].down, factors.down)
        assert np.array_equal(found.factors[name].up, factors.up)


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"lora_alpha": 0}, 0.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"query_key_value": 1}}, 0.25),
        ({"alpha_pattern": {"key_value": 1}}, 2.0),  # not a whole part of the name
        ({"alpha_pattern": {"h.1.self_attention.query_key_value": 1, "dense": 2}}, 2.0),
        ({"alpha_pattern": {r"h\.[0-9].*": 1, "query_key_value": 2}}, 0.25),  # the first one
        ({"alpha_pattern": {"^h.0.self_attention.query_key_value": 1}}, 2.0),
        ({"alpha_pattern": {"^transformer.h.0.self_attention.query_key_value": 1}}, 0.25),
    ],
    ids=str,
)
def test_scales_are_alpha_by_rank_as_the_patterns_say(tmp_path, extra, scale):
    found = read_adapter(written(tmp_path / "lora", config=extra), MODEL).factors["h.0.attn.qkv"]
    plain = written(tmp_path / "plain", config={"lora_alpha": 4})  # 4 / 4
    up = read_adapter(plain, MODEL).factors["h.0.attn.qkv"].up
    assert np.array_equal(found.up, np.float32(scale) * up)


def test_what_a_config_does_not_say_is_pefts_default():
    lora = LoraConfig.from_dict({"peft_type": "LORA"}, "a")
    assert (lora.rank("h.0"), lora.scale("h.0")) == (8, 1.0)


def test_fields_that_change_nothing_are_no_matter(tmp_path):
    extra = {
        "bias": "none", "modules_to_save": None, "use_dora": False, "fan_in_fan_out": False,
        "layer_replication": [], "init_lora_weights": "gaussian", "lora_dropout": 0.3,
        "task_type": "CAUSAL_LM", "rank_pattern": None, "later_field": 5,
    }  # fmt: skip
    assert read_adapter(written(tmp_path / "lora", config=extra), MODEL).rank == 4


# -- files -----------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputNotFound, match=r"missing: no such adapter$"):
        read_adapter(tmp_path / "missing", MODEL)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty) == ": no adapter_config.json: not the folder of a PEFT adapter"
    (empty / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert refused(empty, InputNotFound) == "adapter_model.safetensors: no such file"


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("{}")
    assert "cannot be read: Not a directory" in refused(tmp_path / "file", ConfigError)


def test_a_bin_file_that_peft_saved_is_the_same_adapter(tmp_path):
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    theirs = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    wrapped = random_lora(theirs, tmp_path / "safetensors")
    wrapped.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert (tmp_path / "bin" / "adapter_model.bin").exists()
    expected, found = (read_adapter(tmp_path / form, MODEL) for form in ("safetensors", "bin"))
    assert found.factors.keys() == expected.factors.keys()
    for name, factors in expected.factors.items():
        assert found.factors[name].down.tobytes() == factors.down.tobytes()
        assert found.factors[name].up.tobytes() == factors.up.tobytes()


def test_safetensors_win_over_a_bin_file(tmp_path):
    folder = written(tmp_path / "lora")
    (folder / "adapter_model.bin").write_bytes(b"nothing that is read")
    assert read_adapter(folder, MODEL).rank == 4


def test_a_pickle_is_refused_by_name_and_never_run(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    archive(folder / "adapter_model.bin", b"\x80\2cos\nabort\n(tR.")
    assert refused(folder).startswith(
        "adapter_model.bin: data.pkl: names os.abort, which no state dict needs: it was not "
    )


def test_every_truncation_is_refused(tmp_path):
    folder = written(tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in [0, 7, 8, 100, 2000, len(whole) - 1, *range(200, len(whole), len(whole) // 40)]:
        file.write_bytes(whole[:size])
        assert refused(folder).startswith(WHERE)


def test_random_damage_is_an_error_of_ours_or_harmless(tmp_path):
    folder = written(tmp_path / "lora")
    rng, messages = np.random.default_rng(0), []
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for at in rng.integers(0, min(len(data), 4000), 3):
                data[at] = rng.integers(256)
            (folder / name).write_bytes(data)
            try:
                assert isinstance(read_adapter(folder, MODEL), Adapter)
            except (CheckpointError, ConfigError) as error:
                messages.append(str(error))
        (folder / name).write_bytes(whole)
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


# -- tensors ---------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)]


def put(name: str, values: np.ndarray, dtype: str = "F32") -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: (dtype, to_dtype(values, dtype))})


ADAPTED = "bloomq adapts dense, dense_4h_to_h, dense_h_to_4h, query_key_value of layers 0 to 1, by "
ONE = np.ones((4, 32), np.float32)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.transformer.word_embeddings.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.transformer.h.0.self_attention.q_proj.lora_A.weight",
        "base_model.model.transformer.h.2.self_attention.dense.lora_A.weight",
        "base_model.model.transformer.h.01.self_attention.dense.lora_A.weight",
        "base_model.model.transformer.h.0.mlp.dense.lora_A.weight",
        "base_model.model.transformer.ln_f.lora_A.weight",
        "base_model.model.score.weight",
        f"{QKV}.lora_magnitude_vector",
        f"{QKV}.lora_B.bias",
        f"{QKV}.lora_A.default.weight",
    ],
)
def test_what_is_no_factor_of_a_blocks_linear_is_refused(tmp_path, name):
    folder = written(tmp_path / "lora", edit=put(name, ONE))
    found = refused(folder)
    assert found == f"{WHERE}unexpected {name}: {ADAPTED}lora_A.weight and lora_B.weight"


def test_a_name_with_a_line_break_stays_one_line(tmp_path):
    folder = written(tmp_path / "lora", edit=put("a\nb", ONE))
    assert refused(folder).startswith(f"{WHERE}unexpected 'a\\nb': ")


@pytest.mark.parametrize("factor", "AB")
def test_a_factor_without_its_other_is_refused(tmp_path, factor):
    folder = written(tmp_path / "lora", edit=remove(f"{QKV}.lora_{factor}"))
    assert refused(folder) == f"{WHERE}{QKV} lacks lora_A or lora_B: damaged"


def test_an_adapter_of_nothing_is_refused(tmp_path):
    folder = written(tmp_path / "lora", edit=remove(""))
    assert refused(folder) == f"{WHERE}holds no lora_A and lora_B: not an adapter"


def test_a_linear_that_is_there_twice_is_refused(tmp_path):
    def again(tensors: Tensors) -> None:
        for factor in "AB":
            name = f"{QKV}.lora_{factor}.weight"
            tensors[name.replace("transformer.", "")] = tensors[name]

    other = QKV.replace("transformer.", "")
    folder = written(tmp_path / "lora", edit=again)
    assert refused(folder) == f"{WHERE}{other} is there twice, in two spellings"


@pytest.mark.parametrize(
    ("factor", "found", "right"),
    [("A", (4, 31), [4, 32]), ("A", (5, 32), [4, 32]), ("B", (32, 4), [96, 4]),
     ("A", (128,), [4, 32]), ("B", (96, 4, 1), [96, 4]), ("A", (0, 32), [4, 32])],
)  # fmt: skip
def test_a_shape_of_another_model_or_rank_is_refused(tmp_path, factor, found, right):
    name = f"{QKV}.lora_{factor}.weight"
    folder = written(tmp_path / "lora", edit=put(name, np.ones(found, np.float32)))
    assert refused(folder) == (
        f"{WHERE}{name} is {list(found)}, expected {right} by this model and adapter_config.json"
    )


def test_an_adapter_of_a_wider_model_is_refused(tmp_path):
    folder = written(tmp_path / "lora", hidden_size=64)
    assert "lora_A.weight is [4, 64], expected [4, 32] by this model" in refused(folder)


def test_another_dtype_is_refused(tmp_path):
    name = f"{QKV}.lora_A.weight"
    folder = written(tmp_path / "lora", edit=put(name, ONE, "F64"))
    assert refused(folder) == f"{WHERE}{name} is F64, expected one of F32, F16, BF16"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65505, -1e30])
@pytest.mark.parametrize("factor", "AB")
def test_what_is_no_weight_is_refused(tmp_path, factor, value):
    name = f"{QKV}.lora_{factor}.weight"
    values = np.ones((4, 32) if factor == "A" else (96, 4), np.float32)
    values[2, 1] = value
    folder = written(tmp_path / "lora", edit=put(name, values))
    assert refused(folder) == (
        f"{WHERE}{name} holds NaN, infinity or a weight beyond 65504: damaged"
    )


def test_a_scale_that_makes_too_large_a_weight_is_refused(tmp_path):
    folder = written(tmp_path / "lora", config={"lora_alpha": 65504}, edit=put(
        f"{QKV}.lora_B.weight", np.full((96, 4), 5, np.float32)))  # fmt: skip
    assert "lora_B.weight holds NaN, infinity or a weight beyond" in refused(folder)


# -- adapter_config.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LOHA", "PREFIX_TUNING", None, 5, ["LORA"]], ids=str)
def test_another_kind_of_adapter_is_refused(kind):
    assert config_refused({"peft_type": kind}) == f"peft_type is {kind!r}, expected 'LORA'"


def test_a_config_that_is_no_object_is_refused(tmp_path):
    assert config_refused([1]) == "peft_type is None, expected 'LORA'"
    folder = written(tmp_path / "lora")
    (folder / "adapter_config.json").write_text("{")
    assert refused(folder, ConfigError).startswith("adapter_config.json: not valid JSON")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["score"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["x"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 1}),
        ("velora_config", {"num_groups": 1}),
        ("monteclora_config", {}.fromkeys("ab", 1)),
        ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(field, value):
    assert config_refused({**CONFIG, field: value}) == (
        f"{field} is {value!r}, not supported: merge it into its checkpoint with PEFT, and convert "
        "that"
    )


@pytest.mark.parametrize("rank", [0, -1, 4097, 2.0, "4", None, True], ids=repr)
def test_an_impossible_rank_is_refused(rank):
    expected = f"a rank of {rank!r}, expected 1 to 4096"
    assert config_refused({**CONFIG, "r": rank}) == expected
    assert config_refused({**CONFIG, "rank_pattern": {"dense": rank}}) == expected


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e9, 10**400, "8", None, True], ids=str)
def test_an_impossible_alpha_is_refused(alpha):
    found = config_refused({**CONFIG, "lora_alpha": alpha})
    assert re.fullmatch(r"lora_alpha is .*, expected a number", found)
    assert config_refused({**CONFIG, "alpha_pattern": {"dense": alpha}}) == found


@pytest.mark.parametrize("value", ["yes", 1, None], ids=repr)
def test_a_use_rslora_that_is_neither_is_refused(value):
    found = config_refused({**CONFIG, "use_rslora": value})
    assert found == f"use_rslora is {value!r}, expected true or false"


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_are_none_are_refused(name):
    found = config_refused({**CONFIG, name: [4]})
    assert found == f"{name} is [4], expected a JSON object"
    found = config_refused({**CONFIG, name: {"[dense": 4}})
    assert found.startswith(f"{name} has the key '[dense', no regular expression: unterminated")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("a{99999999999999}", "the repetition number is too large"),
        ("(" * 5000, "maximum recursion depth exceeded"),
    ],
    ids=["repeated", "nested"],
)
def test_an_expression_beyond_what_python_compiles_is_refused(key, reason):
    found = config_refused({**CONFIG, "rank_pattern": {key: 4}})
    assert found.startswith(f"rank_pattern has the key '{key[:79]}")
    assert f", no regular expression: {reason}" in found


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(.*)", "(?:dense)", "a*b*c*d*", ".{1,9}a+b+c+", "(.|.)" * 9 + "x"]
)
def test_an_expression_that_might_never_end_is_refused(key):
    assert config_refused({**CONFIG, "rank_pattern": {key: 4}}) == (
        f"rank_pattern has the key {key!r}, too intricate an expression: write out the modules' "
        "names"
    )


def test_the_worst_expressions_allowed_end_soon():
    lora = LoraConfig.from_dict({**CONFIG, "rank_pattern": {".*.*.*x": 9, "(.|.)(.|.)x": 9}}, "a")
    started = time.perf_counter()
    assert lora.rank("base.transformer.h.10.self_attention.query_key_value") == 4
    assert time.perf_counter() - started < 1


# -- the command -----------------------------------------------------------------------------------


def bloomq_command(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return warm.python("-m", "bloomq", *args, stdin=stdin.encode(), env=environment)


@pytest.fixture
def demo_lora(tmp_path: Path) -> Path:
    """A strong adapter of the embedded demo, in a folder whose name has an equals sign."""
    return written(tmp_path / "lora=1", hidden_size=256, layers=4, config={"lora_alpha": 12})


def test_generate_takes_adapters_and_their_scales(demo_lora):
    prompt = ("generate", "Once upon a time", "-n", "12", "-q")
    base = bloomq_command(*prompt).stdout
    adapted = bloomq_command(*prompt, "--lora", str(demo_lora)).stdout
    assert adapted != base
    assert bloomq_command(*prompt, "--lora", f"{demo_lora}=0").stdout == base
    other = written(demo_lora.parent / "other", hidden_size=256, layers=4, seed=1)
    both = bloomq_command(*prompt, "--lora", f"{demo_lora}=0.5", "--lora", str(other)).stdout
    model = bloomq.load()
    model.load_adapter(demo_lora, "a")
    model.load_adapter(other, "b")
    found = model.generate(prompt[1], max_new_tokens=12, adapters={"a": 0.5, "b": 1})
    assert both == found.text + "\n"
    assert both not in (base, adapted)


def test_chat_takes_adapters(demo_lora):
    options = ("-n", "8", "--lora", str(demo_lora))
    found = bloomq_command("chat", *options, stdin="Once upon\n")
    assert found.returncode == 0
    assert found.stdout != bloomq_command("chat", *options[:2], stdin="Once upon\n").stdout


@pytest.mark.parametrize(
    ("option", "code", "expected"),
    [
        ("DIR=much", 2, "error: --lora DIR=much: 'much' is no scale, expected a number"),
        ("DIR=nan", 2, "error: the scale of adapter 'DIR' is nan, expected a number"),
        ("missing", 1, "error: missing: no such adapter"),
    ],
)
def test_a_wrong_adapter_on_the_command_line_is_one_line(demo_lora, option, code, expected):
    option, expected = (text.replace("DIR", str(demo_lora)) for text in (option, expected))
    done = bloomq_command("generate", "Once", "-n", "2", "-q", "--lora", option)
    assert (done.returncode, done.stderr.strip()) == (code, expected)
