"""Configurations: both spellings are read, and whatever bloomq cannot honour is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from bloomq.config import BloomConfig, read_json, weight_specs
from bloomq.errors import BloomqError, ConfigError, InputNotFound

SIZES = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}


def refusal(raw: Any) -> str:
    """The message with which `raw` is refused."""
    with pytest.raises(ConfigError) as caught:
        BloomConfig.from_dict(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is read ----------------------------------------------------------------------------------


def test_published_bloom_560m_is_read():
    raw = {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 1024,
        "num_attention_heads": 16, "n_layer": 24, "vocab_size": 250880, "seq_length": 2048,
        "layer_norm_epsilon": 1e-05, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "unk_token_id": 0, "offset_alibi": 100, "masked_softmax_fusion": True, "n_inner": None,
        "apply_residual_connection_post_layernorm": False, "pretraining_tp": 1,
    }  # fmt: skip
    config = BloomConfig.from_dict(raw)
    assert config == BloomConfig(
        hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880, pad_token_id=3
    )
    assert config.head_dim == 64


@pytest.mark.parametrize("width", ["n_embed", "hidden_size"])
@pytest.mark.parametrize("heads", ["n_head", "num_attention_heads"])
@pytest.mark.parametrize("layers", ["n_layer", "num_hidden_layers"])
def test_either_spelling_is_read(width, heads, layers):
    config = BloomConfig.from_dict({width: 64, heads: 4, layers: 2, "vocab_size": 96})
    assert config == BloomConfig(**SIZES)


def test_n_embed_overrides_hidden_size_as_in_transformers():
    assert BloomConfig.from_dict({**SIZES, "n_embed": 128}).hidden_size == 128


def test_null_is_as_good_as_absent():
    raw = {**SIZES, "n_embed": None, "layer_norm_epsilon": None, "seq_length": None}
    assert BloomConfig.from_dict(raw) == BloomConfig(**SIZES)


def test_null_token_id_stays_null():
    assert BloomConfig.from_dict({**SIZES, "pad_token_id": None}).pad_token_id is None


def test_labels_are_read_in_the_order_of_their_ids():
    config = BloomConfig.from_dict({**SIZES, "id2label": {"1": "bad", "0": "good"}})
    assert config.labels == ("good", "bad")
    assert config.id2label == {0: "good", 1: "bad"}
    assert config.label2id == {"good": 0, "bad": 1}
    assert BloomConfig.from_dict({**SIZES, "num_labels": 3}).labels[2] == "LABEL_2"
    assert BloomConfig(**SIZES).num_labels == 2


def test_a_bare_model_counts_as_the_language_model_whose_head_it_shares():
    config = BloomConfig.from_dict({**SIZES, "architectures": ["BloomModel"]})
    assert config.architecture == "BloomForCausalLM"
    assert config.head_is_embedding


def test_an_unknown_head_is_refused():
    with pytest.raises(ConfigError, match=r"^architecture is 'BloomForChess', expected one of"):
        BloomConfig(architecture="BloomForChess")


def test_what_to_dict_writes_from_dict_reads():
    config = BloomConfig(
        **SIZES, architecture="BloomForTokenClassification", labels=("a", "b", "c"),
        problem_type="regression", pad_token_id=3,
    )  # fmt: skip
    assert BloomConfig.from_dict(config.to_dict()) == config


def test_transformers_names_and_defaults():
    config = BloomConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 8)
    assert (config.vocab_size, config.pad_token_id) == (250880, None)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BloomForSequenceClassification", ("score", (3, 64), False)),
        ("BloomForTokenClassification", ("classifier", (3, 64), True)),
        ("BloomForQuestionAnswering", ("qa_outputs", (2, 64), True)),
    ],
)
def test_a_classifier_has_its_head_last(architecture, expected):
    labels = ("a", "b", "c")
    for tied in (True, False):
        config = BloomConfig(
            **SIZES, architecture=architecture, labels=labels, tie_word_embeddings=tied
        )
        last = weight_specs(config)[-1]
        assert (last.name, last.shape, last.has_bias) == expected
        assert last.kind == "classifier"
        assert "lm_head" not in {spec.name for spec in weight_specs(config)}
        assert not config.head_is_embedding


def test_whole_number_epsilon_is_refused():
    assert "layer_norm_epsilon is 1, expected a number in (0, 1)" in refusal(
        {**SIZES, "layer_norm_epsilon": 1}
    )


def test_to_dict_is_read_back_the_same():
    config = BloomConfig(**SIZES, tie_word_embeddings=False, eos_token_id=None)
    assert BloomConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_demo_config_is_read_from_its_file(demo_checkpoint):
    config = BloomConfig.from_file(demo_checkpoint / "config.json")
    assert (config.hidden_size, config.n_layer, config.vocab_size) == (256, 4, 8192)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'bloom'"),
        ({"model_type": None}, "model_type is None, expected 'bloom'"),
        ({"hidden_size": None}, "no n_embed or hidden_size: the file is incomplete"),
        ({"n_layer": None}, "no n_layer or num_hidden_layers: the file is incomplete"),
        ({"n_head": None}, "no n_head or num_attention_heads: the file is incomplete"),
        ({"vocab_size": None}, "no vocab_size: the file is incomplete"),
        ({"hidden_size": 0}, "hidden_size is 0, expected a whole number from 1 to 131072"),
        ({"hidden_size": -64}, "hidden_size is -64, expected a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776, expected a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": [64]}, "hidden_size is [64], expected a whole number"),
        ({"n_layer": "9" * 99}, f"n_layer is '{'9' * 79}, expected a whole number from 1 to 4096"),
        ({"n_layer": 2.0}, "n_layer is 2.0, expected a whole number from 1 to 4096"),
        ({"n_layer": True}, "n_layer is True, expected a whole number"),
        ({"n_head": 1 << 13}, "n_head is 8192, expected a whole number from 1 to 4096"),
        ({"vocab_size": 1 << 25}, "vocab_size is 33554432, expected a whole number"),
        ({"seq_length": 0}, "seq_length is 0, expected a whole number from 1 to 16777216"),
        ({"n_head": 5}, "hidden_size 64 is not a multiple of n_head 5: check config.json"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0, expected a number in (0, 1)"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5', expected a number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan, expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"eos_token_id": 96}, "eos_token_id is 96, expected a whole number from 0 to 95"),
        ({"eos_token_id": [2]}, "eos_token_id is [2], expected a whole number from 0 to 95"),
        ({"pad_token_id": -1}, "pad_token_id is -1, expected a whole number from 0 to 95"),
        (
            {"apply_residual_connection_post_layernorm": "yes"},
            "apply_residual_connection_post_layernorm is 'yes', expected true or false",
        ),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures ['LlamaForCausalLM'], expected one of BloomModel, BloomForCausalLM, ",
        ),
        ({"architectures": "BloomModel"}, "architectures BloomModel, expected one of"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label does not name the labels 0, 1, ... in turn"),
        ({"id2label": {"0": 5}}, "labels are (5,), expected 1 to 65536 names"),
        ({"id2label": {}}, "labels are (), expected 1 to 65536 names"),
        ({"num_labels": 0}, "num_labels is 0, expected a whole number from 1 to 65536"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking', expected null or one of regress"),
        ({"n_inner": 128}, "n_inner is 128, expected null or 4 x hidden_size = 256"),
        ({"n_inner": "256"}, "n_inner is '256', expected null or 4 x hidden_size = 256"),
    ],
)
def test_impossible_settings_are_refused_by_name(change, message):
    found = refusal({**SIZES, **change})
    assert found.startswith("config.json: ")
    assert message in found


@pytest.mark.parametrize(("raw", "kind"), [([], "list"), (None, "NoneType"), ("x", "str")])
def test_config_that_is_not_an_object_is_refused(raw, kind):
    assert refusal(raw) == f"config.json: expected a JSON object, found {kind}"


def test_error_names_the_source_it_was_given():
    with pytest.raises(ConfigError, match=r"^here: no vocab_size"):
        BloomConfig.from_dict({k: v for k, v in SIZES.items() if k != "vocab_size"}, "here")


def test_config_made_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="hidden_size 64 is not a multiple of n_head 3"):
        BloomConfig(hidden_size=64, n_layer=1, n_head=3, vocab_size=10)


def test_n_inner_of_the_usual_width_is_accepted():
    assert BloomConfig.from_dict({**SIZES, "n_inner": 256}) == BloomConfig(**SIZES)


def test_astronomic_epsilon_is_refused():
    assert "layer_norm_epsilon" in refusal({**SIZES, "layer_norm_epsilon": 10**400})


# -- files -----------------------------------------------------------------------------------------


def test_absent_file_is_named(tmp_path):
    with pytest.raises(InputNotFound) as caught:
        BloomConfig.from_file(tmp_path / "config.json")
    assert str(caught.value) == f"{tmp_path / 'config.json'}: no such file"
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (b'{"a": 1', "not valid JSON (Expecting ',' delimiter"),
        (b"\x80\x04\x95", "not valid JSON ('utf-8' codec can't decode byte 0x80"),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b'{"a": ' * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        (b"9" * 5000, "not valid JSON (Exceeds the limit (4300 digits)"),
    ],
)
def test_file_that_is_not_json_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        BloomConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_json_larger_than_the_limit_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"[1, 2, 3]")
    with pytest.raises(ConfigError) as caught:
        read_json(path, limit_bytes=8)
    assert str(caught.value) == f"{path}: over 8 bytes: too large for what it should be"


def test_json_of_just_the_limit_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b"[1, 2, 3]")
    assert read_json(tmp_path / "config.json", limit_bytes=9) == [1, 2, 3]


def test_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_json(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_every_depth_of_nesting_is_read_or_refused(tmp_path):
    """Around the interpreter's own limit, where reading may pass and a later step may not."""
    path = tmp_path / "config.json"
    outcomes = set()
    for depth in range(800, 1010, 3):
        path.write_text(
            json.dumps(SIZES)[:-1] + ', "model_type": ' + "[" * depth + "]" * depth + "}"
        )
        with pytest.raises(BloomqError) as caught:
            BloomConfig.from_file(path)
        outcomes.add(str(caught.value).split(": ")[1].split(" ")[0])
    assert outcomes == {"model_type", "not"}


# -- the weights of a config -----------------------------------------------------------------------


def test_weights_come_in_the_order_in_which_a_step_reads_them():
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10)
    assert [(s.name, s.kind, s.shape) for s in weight_specs(config)] == [
        ("wte", "embedding", (10, 8)),
        ("emb_ln", "norm", (8,)),
        ("h.0.ln_1", "norm", (8,)),
        ("h.0.attn.qkv", "linear", (24, 8)),
        ("h.0.attn.out", "linear", (8, 8)),
        ("h.0.ln_2", "norm", (8,)),
        ("h.0.mlp.up", "linear", (32, 8)),
        ("h.0.mlp.down", "linear", (8, 32)),
        ("ln_f", "norm", (8,)),
    ]


def test_untied_model_has_a_head_without_bias():
    config = BloomConfig(**SIZES, tie_word_embeddings=False)
    head = weight_specs(config)[-1]
    assert (head.name, head.kind, head.shape) == ("lm_head", "head", (96, 64))
    assert (head.is_matrix, head.has_bias) == (True, False)


def test_path_is_taken_as_given():
    with pytest.raises(InputNotFound, match=r"^no/such/config\.json: no such file$"):
        BloomConfig.from_file(Path("no/such/config.json"))


def test_what_the_page_lists_and_inference_ignores_is_kept():
    raw = {
        **SIZES, "hidden_dropout": 0.1, "attention_dropout": 0, "initializer_range": 0.01,
        "pretraining_tp": 4, "slow_but_exact": True,
    }  # fmt: skip
    config = BloomConfig.from_dict(raw)
    assert (config.hidden_dropout, config.pretraining_tp, config.slow_but_exact) == (0.1, 4, True)
    assert config.model_type == "bloom"
    for change, expected in (
        ({"hidden_dropout": "much"}, "hidden_dropout is 'much', expected a number from 0 to 1"),
        ({"pretraining_tp": 0}, "pretraining_tp is 0, expected a whole number from 1"),
    ):
        assert expected in refusal({**SIZES, **change})


def test_a_config_comes_from_a_checkpoint_or_a_pack(tmp_path):
    config = BloomConfig(**SIZES, labels=("a", "b", "c"))
    for name, content in (
        ("config.json", config.to_dict()),
        ("manifest.json", {"config": config.to_dict()}),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
        assert BloomConfig.from_pretrained(folder) == config
    with pytest.raises(InputNotFound, match=r"config\.json: no such file$"):
        BloomConfig.from_pretrained(tmp_path)
