"""The tokenizer against the real BLOOM's published cases, transformers, and itself."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from bloomq.errors import BloomqError, InputNotFound, PackError, TokenizerError, UsageError
from bloomq.pack import Pack
from bloomq.tokenizer import BloomTokenizer, Encoding

REPO = Path(__file__).resolve().parents[1]
DEMO = REPO / "tests" / "data" / "bloom-demo" / "tokenizer.json"
FIXTURES = REPO.parent / "shared" / "fixtures"
DEMO_CHECKPOINT = REPO.parent / "shared" / "checkpoints" / "bloom-demo"

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
FIRST_BYTE_ID = 4  # the byte characters follow the special tokens, by code point
N_DEMO = 8192
TEXTS = [
    "How are you doing?",
    " a leading space, and a trailing one ",
    "Il était une fois, à l'orée du bois… un « œuf »!",
    "El niño comió piñas; ¿quién lo vio?",
    "Não há pão em São João.",
    "生活的真谛是什么？很简单。",
    "नमस्ते दुनिया। मैं ठीक हूँ।",
    "مرحبا، كيف حالك؟ ۔",
    "Xin chào, tôi là một mô hình ngôn ngữ.",
    "😂 👍🏽 👩‍👩‍👧‍👦 ❤️ 🇫🇷",
    "def main(argv):\n\tfor i in range(10):\n        print(i ** 2)\r\n",
    "   \t\t\n\n \u00a0\u3000 x",
    "don ' t , please . it 's n't",  # what clean_up_tokenization_spaces would mangle
    "<s> text with </s> specials<pad><unk>",
    "e\u0301 \u00e9 \ufb01 \u212b",  # not normalized
    "\x00\x0b\x7f\x85",
    "",
]


# --- fixtures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> BloomTokenizer:
    return BloomTokenizer.from_file(DEMO)


def shared(name: str) -> Any:
    if not (FIXTURES / name).exists():
        pytest.skip(f"no {FIXTURES / name}")
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def demo_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The demo's tokenizer.json with one thing changed."""
    content = json.loads(DEMO.read_text(encoding="utf-8"))
    change(content)
    return json.dumps(content).encode()


def file_of(vocab: dict[str, int]) -> bytes:
    """A tokenizer.json with the demo's every setting, this vocabulary and no merges."""
    return demo_with(lambda content: content["model"].update(vocab=vocab, merges=[]))


def byte_chars() -> dict[int, str]:
    """Byte -> its character, from the library itself: sorted, the non-printables come last."""
    from tokenizers.pre_tokenizers import ByteLevel

    chars = sorted(ByteLevel.alphabet())
    own = {ord(char): char for char in chars if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in own]
    return own | dict(zip(others, chars[len(own) :], strict=True))


def byte_ids(tokenizer: BloomTokenizer) -> dict[int, int]:
    chars = byte_chars()
    ids = tokenizer.convert_tokens_to_ids([chars[byte] for byte in range(256)])
    assert isinstance(ids, list)
    return {byte: i for byte, i in enumerate(ids) if i is not None}


def streamed(tokenizer: BloomTokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.finish()


# --- the real BLOOM's published cases ---------------------------------------------------------


def tokens_of(case: dict[str, Any], vocab: dict[int, str]) -> list[str] | None:
    """The expected tokens of a case: as given, from its pieces of text, or from known ids."""
    if case.get("tokens"):
        return list(case["tokens"])
    if case.get("pieces"):
        chars = byte_chars()
        return ["".join(chars[byte] for byte in piece.encode()) for piece in case["pieces"]]
    found = [vocab.get(i) for i in case["ids"] or []]
    return [token for token in found if token] if found and None not in found else None


def pieces_of(text: str, config: dict[str, Any]) -> list[str]:
    """The pieces within which a token must lie: by the pre-tokenizer, between special tokens."""
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"version": "1.0", "pre_tokenizer": config, "model": model}
    split = Tokenizer.from_str(json.dumps(content)).pre_tokenizer.pre_tokenize_str
    pieces: list[str] = []
    for part in re.split("(<unk>|<s>|</s>|<pad>)", text):
        pieces += [part] if part in SPECIAL else [piece for piece, _ in split(part)]
    return pieces


def crossing(tokens: list[str], pieces: list[str]) -> str | None:
    """The first token that does not continue the piece it starts in; None if all lie within."""
    left = list(pieces)
    for token in tokens:
        if not left or not left[0].startswith(token):
            return token
        left[0] = left[0][len(token) :]
        left = left if left[0] else left[1:]
    return f"{left[0]} is left" if left else None


@pytest.mark.parametrize("whose", ["real", "demo"])
def test_no_expected_token_crosses_a_piece_of_the_pre_tokenizer(whose: str) -> None:
    fixture = shared("bloom_tokenizer_cases.json")
    vocab = {int(i): token for i, token in shared("bloom_partial_vocab.json").items()}
    config = fixture["tokenizer"]["pre_tokenizer"]
    if whose == "demo":
        config = json.loads(DEMO.read_text(encoding="utf-8"))["pre_tokenizer"]
    checked = 0
    for case in fixture["cases"]:
        tokens = tokens_of(case, vocab)
        if tokens is not None:
            assert crossing(tokens, pieces_of(case["text"], config)) is None, case["text"]
            checked += 1
    assert checked >= 28


def test_the_piece_check_would_notice_a_wrong_pre_tokenizer() -> None:
    gpt2: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    gpt2["trim_offsets"] = True
    assert crossing(["Ġfaut", "Ġd'abord"], pieces_of(" faut d'abord", gpt2)) == "Ġd'abord"
    assert crossing(["Ġfaut"], pieces_of(" faut d", gpt2)) == "Ġd is left"


def test_the_demo_has_bloom_s_own_pre_tokenizer() -> None:
    real = shared("bloom_tokenizer_cases.json")["tokenizer"]["pre_tokenizer"]
    assert json.loads(DEMO.read_text(encoding="utf-8"))["pre_tokenizer"] == real


def test_cases_decode_to_their_text_through_decode_and_stream() -> None:
    vocab = {token: int(i) for i, token in shared("bloom_partial_vocab.json").items()}
    known = set(vocab.values())
    tokenizer = BloomTokenizer.from_bytes(file_of(vocab))
    checked = 0
    for case in shared("bloom_tokenizer_cases.json")["cases"]:
        if case["ids"] and known.issuperset(case["ids"]):
            assert tokenizer.decode(case["ids"]) == case.get("decoded", case["text"])
            plain = case["text"]
            for token in SPECIAL:
                plain = plain.replace(token, "")
            assert streamed(tokenizer, case["ids"]) == plain
            checked += 1
    assert checked >= 20


def test_the_real_tokenizer_gives_the_published_ids() -> None:
    path = os.environ.get("BLOOMQ_BLOOM_TOKENIZER")
    if not path:
        pytest.skip("BLOOMQ_BLOOM_TOKENIZER does not name the real BLOOM's tokenizer.json")
    fixture = shared("bloom_tokenizer_cases.json")
    tokenizer = BloomTokenizer.from_file(path)
    assert tokenizer.vocab_size == fixture["tokenizer"]["vocab_size"]
    for case in fixture["cases"]:
        ids = tokenizer.encode(case["text"])
        if case["ids"] is not None:
            assert ids == case["ids"], case["text"]
        if "tokens" in case:
            assert tokenizer.convert_ids_to_tokens(ids) == case["tokens"]
        assert tokenizer.decode(ids) == case.get("decoded", case["text"])


# --- bytes ------------------------------------------------------------------------------------


def test_the_alphabet_has_242_bytes_by_code_point_and_lacks_fourteen() -> None:
    known = {
        int(byte, 16): i for byte, i in shared("bloom_byte_alphabet.json")["byte_to_id"].items()
    }
    assert set(range(256)) - set(known) == {0x0B, 0xC0, 0xC1, *range(0xF5, 0x100)}
    chars = byte_chars()
    in_order = sorted(known, key=lambda byte: chars[byte])
    assert {byte: FIRST_BYTE_ID + n for n, byte in enumerate(in_order)} == known


def test_bytes_outside_the_vocabulary_vanish() -> None:
    known = {
        int(byte, 16): i for byte, i in shared("bloom_byte_alphabet.json")["byte_to_id"].items()
    }
    chars = byte_chars()
    vocab = SPECIAL | {chars[byte]: i for byte, i in known.items()}
    tokenizer = BloomTokenizer.from_bytes(file_of(vocab))
    assert tokenizer.vocab_size == 246
    assert tokenizer.encode("a\x0bb") == [68, 69]
    assert tokenizer.encode("\x0b") == []
    assert tokenizer.encode("é\t") == [known[0xC3], known[0xA9], known[0x09]]
    assert tokenizer.decode(tokenizer.encode("vertical\x0btab")) == "verticaltab"


def test_every_byte_token_streams_as_its_byte(demo: BloomTokenizer) -> None:
    ids = byte_ids(demo)
    assert len(ids) == 256  # the demo lacks none, unlike BLOOM
    for byte, i in ids.items():
        assert streamed(demo, [i]) == bytes([byte]).decode(errors="replace")


@given(st.text())
def test_any_text_survives_the_round_trip(demo: BloomTokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


# --- streaming --------------------------------------------------------------------------------

ids_biased_to_bytes = st.lists(
    st.one_of(st.integers(0, 260), st.integers(0, N_DEMO - 1), st.integers(0, 2**40)), max_size=40
)


@given(ids_biased_to_bytes)
def test_pieces_joined_are_the_decoded_whole(demo: BloomTokenizer, ids: list[int]) -> None:
    assert streamed(demo, ids) == demo.decode(ids, skip_special_tokens=True)


@given(st.binary(max_size=24))
def test_pieces_of_any_bytes_are_the_decoded_whole(demo: BloomTokenizer, data: bytes) -> None:
    ids = [byte_ids(demo)[byte] for byte in data]
    assert streamed(demo, ids) == demo.decode(ids)


def test_broken_utf8_is_replaced_as_the_library_does(demo: BloomTokenizer) -> None:
    """Each class of byte that UTF-8 tells apart, in every sequence of three and, coarser, four."""
    fine = b"\x00A\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef"
    fine += b"\xf0\xf1\xf3\xf4\xf5\xff"
    coarse = b"A\x80\x90\xa0\xc2\xe0\xe1\xed\xf0\xf1\xf4\xff"
    of_byte = byte_ids(demo)
    for data in itertools.chain(
        itertools.product(fine, repeat=3), itertools.product(coarse, repeat=4)
    ):
        ids = [of_byte[byte] for byte in data]
        assert streamed(demo, ids) == demo.decode(ids), bytes(data)


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"a\xc3\xa9", ["a", "", "é", ""]),
        (b"\xf0\x9f\x98\x82!", ["", "", "", "😂", "!", ""]),
        (b"\xf0\x9f\x98", ["", "", "", "\ufffd"]),  # cut short
        (b"\xe6A", ["", "\ufffdA", ""]),  # certain only with the next byte
        (b"\xff", ["\ufffd", ""]),
    ],
)
def test_a_character_appears_with_its_last_byte(
    demo: BloomTokenizer, data: bytes, pieces: list[str]
) -> None:
    stream, of_byte = demo.stream(), byte_ids(demo)
    assert [stream.push(of_byte[byte]) for byte in data] + [stream.finish()] == pieces


def test_a_special_token_within_a_character_does_not_break_it(demo: BloomTokenizer) -> None:
    of_byte = byte_ids(demo)
    ids = [of_byte[0xE6], 2, of_byte[0x97], N_DEMO + 100, of_byte[0xA5]]
    assert streamed(demo, ids) == "日" == demo.decode(ids, skip_special_tokens=True)


def test_a_finished_stream_is_as_new(demo: BloomTokenizer) -> None:
    stream, of_byte = demo.stream(), byte_ids(demo)
    assert (stream.push(of_byte[0xE6]), stream.finish(), stream.finish()) == ("", "\ufffd", "")
    assert stream.push(of_byte[0x41]) == "A"


def test_streams_do_not_share_their_state(demo: BloomTokenizer) -> None:
    one, two, of_byte = demo.stream(), demo.stream(), byte_ids(demo)
    assert (one.push(of_byte[0xC3]), two.push(of_byte[0x41])) == ("", "A")
    assert one.push(of_byte[0xA9]) == "é"


def test_several_ids_may_be_pushed_at_once(demo: BloomTokenizer) -> None:
    assert demo.stream().push(np.array(demo.encode("日本 語"))) == "日本 語"


def test_added_tokens_stream_as_they_decode() -> None:
    added = ["日本", "naïve 日", "<|user|>", "cafés"]  # é is in the alphabet: byte E9

    def add(content: dict[str, Any]) -> None:
        template = content["added_tokens"][0]
        for n, token in enumerate(added):
            fields = {"id": N_DEMO + n, "content": token, "special": token == "<|user|>"}
            content["added_tokens"].append(template | fields)

    tokenizer = BloomTokenizer.from_bytes(demo_with(add))
    ids = tokenizer.encode("le 日本<|user|>naïve 日cafés")
    assert {N_DEMO, N_DEMO + 1, N_DEMO + 2, N_DEMO + 3} <= set(ids)
    assert streamed(tokenizer, ids) == "le 日本naïve 日caf\ufffds"
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert (tokenizer.vocab_size, tokenizer.all_special_ids) == (
        N_DEMO + 4,
        [0, 1, 2, 3, N_DEMO + 2],
    )


# --- transformers is the oracle ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["PreTrainedTokenizerFast", "AutoTokenizer"])
def oracle(request: pytest.FixtureRequest) -> Any:
    transformers = pytest.importorskip("transformers")
    if request.param == "AutoTokenizer":
        if not DEMO_CHECKPOINT.exists():
            pytest.skip(f"no {DEMO_CHECKPOINT}")
        return transformers.AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO), padding_side="left", clean_up_tokenization_spaces=False, **names
    )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_mask_and_text_equal_transformers(demo: BloomTokenizer, oracle: Any, text: str) -> None:
    theirs, ours = oracle(text), demo(text)
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours["attention_mask"] == theirs["attention_mask"]
    ids = theirs["input_ids"]
    for skip in (False, True):
        ours_text = demo.decode(ids, skip_special_tokens=skip)
        assert ours_text == oracle.decode(ids, skip_special_tokens=skip)
    assert demo.convert_ids_to_tokens(ids) == oracle.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "truncation": True, "max_length": 7},
        {"padding": "max_length", "max_length": 12},
        {"padding": "max_length", "truncation": True, "max_length": 5},
        {"truncation": True, "max_length": 3},
        {"padding": False},
    ],
)
def test_batches_equal_transformers(
    demo: BloomTokenizer, oracle: Any, options: dict[str, Any]
) -> None:
    ours, theirs = demo(TEXTS, **options), oracle(TEXTS, **options)
    assert dict(ours) == {key: theirs[key] for key in ("input_ids", "attention_mask")}


def test_arrays_equal_transformers(demo: BloomTokenizer, oracle: Any) -> None:
    for text in (TEXTS, TEXTS[0]):
        ours = demo(text, padding=True, return_tensors="np")
        theirs = oracle(text, padding=True, return_tensors="np")
        for key in ("input_ids", "attention_mask"):
            assert np.asarray(ours[key]).dtype == np.int64 and not isinstance(ours[key], list)
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_special_ids_and_size_equal_transformers(demo: BloomTokenizer, oracle: Any) -> None:
    for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
        assert getattr(demo, name) == getattr(oracle, name)
        assert getattr(demo, f"{name}_id") == getattr(oracle, f"{name}_id")
    assert set(demo.all_special_ids) == set(oracle.all_special_ids)
    assert len(demo) == len(oracle) == N_DEMO


# --- pairs, offsets and settings, against AutoTokenizer on the checkpoint's folder -------------

PAIRS = [*TEXTS[1:], "the last text's pair"]
PAIR_OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding": True},
    {"padding": "max_length", "max_length": 40, "truncation": True},
    *({"truncation": True, "max_length": most} for most in (1, 2, 7, 12, 25, 400)),
]


@pytest.fixture(scope="module")
def ours() -> BloomTokenizer:
    return BloomTokenizer.from_pretrained(DEMO.parent)


@pytest.fixture(scope="module")
def auto() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(DEMO.parent)


@pytest.mark.parametrize("options", PAIR_OPTIONS, ids=str)
def test_pairs_equal_transformers(ours: BloomTokenizer, auto: Any, options: dict[str, Any]) -> None:
    mine = ours(TEXTS, PAIRS, return_offsets_mapping=True, **options)
    theirs = auto(TEXTS, PAIRS, return_offsets_mapping=True, **options)
    assert dict(mine) == {key: theirs[key] for key in mine}
    assert list(mine) == ["input_ids", "attention_mask", "offset_mapping"]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_equal_transformers(ours: BloomTokenizer, auto: Any, text: str) -> None:
    for pair in (None, "and a pair, 日本"):
        mine = ours(text, pair, return_offsets_mapping=True)
        assert (
            mine["offset_mapping"] == auto(text, pair, return_offsets_mapping=True).offset_mapping
        )


def test_offsets_come_as_arrays_with_padding_at_zero(ours: BloomTokenizer, auto: Any) -> None:
    options: dict[str, Any] = {"padding": True, "return_tensors": "np"}
    mine = ours(TEXTS, return_offsets_mapping=True, **options)
    theirs = auto(TEXTS, return_offsets_mapping=True, **options)
    for key in mine:
        assert np.asarray(mine[key]).dtype == np.int64 and not isinstance(mine[key], list)
        np.testing.assert_array_equal(mine[key], theirs[key])
    assert not np.asarray(mine["offset_mapping"])[np.asarray(mine["attention_mask"]) == 0].any()
    assert np.shape(ours([], return_offsets_mapping=True, **options)["offset_mapping"]) == (0, 0, 2)


def test_every_token_of_a_character_has_its_span(demo: BloomTokenizer) -> None:
    (tokens,) = demo.encode_with_offsets(["a 𓀀"])  # a hieroglyph: one token a byte
    assert [span for span in tokens.offsets if span[1] == 3][-3:] == [(2, 3)] * 3
    assert tokens.ids == demo.encode("a 𓀀")


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("text", ["one", ["one", "and two"]], ids=str)
def test_special_tokens_and_mask_may_be_asked_for(
    ours: BloomTokenizer, auto: Any, text: Any, mask: bool, add: bool
) -> None:
    """BLOOM adds no special tokens either way."""
    options: dict[str, Any] = {"add_special_tokens": add, "return_attention_mask": mask}
    options |= {"padding": True, "return_offsets_mapping": True}
    mine, theirs = ours(text, **options), auto(text, **options)
    assert dict(mine) == {key: theirs[key] for key in mine}
    assert ("attention_mask" in mine) is mask is ("attention_mask" in theirs)
    mine = ours(text, return_tensors="np", **options)
    assert list(mine) == ["input_ids"] + ["attention_mask"] * mask + ["offset_mapping"]


def test_a_pair_that_does_not_match_its_texts_is_refused(demo: BloomTokenizer) -> None:
    start = "text_pair: expected one for each text, found"
    fails(UsageError, f"{start} 2 for 1", lambda: demo("a", ["b", "c"]))
    fails(UsageError, f"{start} 1 for 2", lambda: demo(["a", "b"], ["c"]))
    fails(UsageError, f"{start} 1 for 1", lambda: demo(["a"], "b"))


def test_the_fast_tokenizer_is_the_tokenizer() -> None:
    import bloomq

    assert bloomq.BloomTokenizerFast is BloomTokenizer is bloomq.BloomTokenizer


def test_from_pretrained_takes_a_checkpoint_a_pack_or_a_file(
    demo: BloomTokenizer, tmp_path: Path
) -> None:
    shutil.copy(DEMO, tmp_path)
    for path in (DEMO.parent, REPO / "bloomq" / "demo", DEMO, tmp_path, str(tmp_path)):
        tokenizer = BloomTokenizer.from_pretrained(path)
        assert (tokenizer.padding_side, tokenizer.encode("é")) == ("left", demo.encode("é"))


def settings(folder: Path, content: object) -> Path:
    shutil.copy(DEMO, folder)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def test_the_side_is_the_settings_unless_one_is_given(tmp_path: Path) -> None:
    load = BloomTokenizer.from_pretrained
    settings(tmp_path, {"padding_side": "right", "clean_up_tokenization_spaces": True})
    assert load(tmp_path).padding_side == "right"
    assert load(tmp_path / "tokenizer.json").padding_side == "right"
    assert load(tmp_path, padding_side="left").padding_side == "left"


def test_special_tokens_are_those_of_the_settings(tmp_path: Path) -> None:
    settings(tmp_path, {"pad_token": "</s>", "bos_token": {"content": "<pad>"}, "unk_token": None})
    tokenizer = BloomTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<pad>", "<unk>")
    assert tokenizer(["a", "a b"], padding=True)["input_ids"][0][0] == 2  # type: ignore[index]


def test_a_pack_keeps_the_settings_of_its_checkpoint(tmp_path: Path) -> None:
    import bloomq

    folder, pack = write_checkpoint(tmp_path / "model", vocab_size=N_DEMO), tmp_path / "pack"
    settings(folder, {"padding_side": "right", "pad_token": "</s>", "eos_token": "no such token"})
    bloomq.convert(folder, pack)
    expected = ("right", 2, None)
    for tokenizer in (
        BloomTokenizer.from_pretrained(folder),
        BloomTokenizer.from_pretrained(pack),
        BloomTokenizer.from_pretrained(pack / "tokenizer.json"),
        BloomTokenizer.of_pack(Pack.open(pack)),
        bloomq.Embedder.load(pack).tokenizer,
        bloomq.load(pack).tokenizer,
    ):
        assert tokenizer is not None
        found = (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert found == expected
    assert BloomTokenizer.from_pretrained(pack, padding_side="left").padding_side == "left"


def test_a_pack_s_tokenizer_must_be_there_and_its_model_s(tmp_path: Path) -> None:
    import bloomq

    small, pack = write_checkpoint(tmp_path / "model"), tmp_path / "pack"
    bloomq.convert(small, pack)
    message = f"{pack}: has no tokenizer: convert a checkpoint that has a tokenizer.json"
    fails(PackError, message, lambda: BloomTokenizer.from_pretrained(pack))
    shutil.copy(DEMO, small)
    bloomq.convert(small, pack, force=True)
    message = "8192 tokens, the model has 96: it belongs to another model"
    fails(
        TokenizerError, f"{pack}/tokenizer.json: {message}",
        lambda: BloomTokenizer.from_pretrained(pack),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pad_token": "\ud800"}, "pad_token '\\ud800' holds half a surrogate pair: no text"),
        ({"padding_side": "top"}, "padding_side is 'top', neither 'left' nor 'right'"),
        ({"add_prefix_space": True}, "add_prefix_space is True, this tokenizer has False alone"),
        ({"add_eos_token": True}, "add_eos_token is True, this tokenizer has False alone"),
        (
            {"truncation_side": "left"},
            "truncation_side is 'left', this tokenizer has 'right' alone",
        ),
        ([1], "a list, expected settings by name"),
        ("[1", "settings are no JSON (Expecting ',' delimiter: line 1 column 3 (char 2))"),
    ],
)
def test_settings_that_the_tokenizer_has_not_are_named(
    tmp_path: Path, content: object, message: str
) -> None:
    settings(tmp_path, content)
    named = f"{tmp_path}/tokenizer_config.json: {message}"
    fails(TokenizerError, named, lambda: BloomTokenizer.from_pretrained(tmp_path))


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    shutil.copy(DEMO, tmp_path)
    (tmp_path / "tokenizer_config.json").mkdir()
    message = f"{tmp_path}/tokenizer_config.json: cannot be read: Is a directory"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_pretrained(tmp_path))


# --- the interface ----------------------------------------------------------------------------


def test_special_tokens_are_ids_zero_to_three(demo: BloomTokenizer) -> None:
    assert demo.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3] == demo.all_special_ids
    ids = (demo.unk_token_id, demo.bos_token_id, demo.eos_token_id, demo.pad_token_id)
    assert ids == (0, 1, 2, 3)
    published = shared("bloom_tokenizer_cases.json")["tokenizer"]["special"]
    assert published == SPECIAL


def test_neither_bos_nor_eos_is_added(demo: BloomTokenizer) -> None:
    assert demo.encode("") == []
    assert not set(demo.encode("Hello, world")) & set(SPECIAL.values())


def test_a_folder_and_its_file_give_the_same_tokenizer(demo: BloomTokenizer) -> None:
    assert BloomTokenizer.from_file(str(DEMO.parent)).encode(TEXTS[2]) == demo.encode(TEXTS[2])


def test_importing_the_module_does_not_import_tokenizers() -> None:
    code = "import sys, bloomq.tokenizer; print('tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_padding_is_on_the_left_unless_the_right_is_chosen(demo: BloomTokenizer) -> None:
    a, b = demo.encode("a"), demo.encode("a b c")
    pad = len(b) - len(a)
    left = demo(["a", "a b c"], padding=True)
    assert left["input_ids"] == [[3] * pad + a, b]
    assert left["attention_mask"] == [[0] * pad + [1] * len(a), [1] * len(b)]
    right = BloomTokenizer.from_file(DEMO, padding_side="right")(["a", "a b c"], padding=True)
    assert right["input_ids"] == [a + [3] * pad, b]
    assert right["attention_mask"] == [[1] * len(a) + [0] * pad, [1] * len(b)]


def test_an_encoding_is_a_mapping_and_can_be_unpacked(demo: BloomTokenizer) -> None:
    def model(input_ids: object, attention_mask: object) -> object:
        return input_ids, attention_mask

    encoding = demo("a b")
    assert isinstance(encoding, Encoding) and list(encoding) == ["input_ids", "attention_mask"]
    assert (len(encoding), "labels" in encoding) == (2, False)
    assert model(**encoding) == (encoding.input_ids, encoding.attention_mask)
    with pytest.raises(AttributeError):
        encoding.input_ids = []  # type: ignore[misc]


def test_empty_inputs_keep_their_shape(demo: BloomTokenizer) -> None:
    for text, shape in (("", (1, 0)), ([], (0, 0)), (["", ""], (2, 0))):
        encoding = demo(text, padding=True, return_tensors="np")
        assert np.shape(encoding["input_ids"]) == np.shape(encoding["attention_mask"]) == shape
    nothing: dict[str, list[int]] = {"input_ids": [], "attention_mask": []}
    assert (dict(demo("")), dict(demo([]))) == (nothing, nothing)


def test_settings_saved_in_the_file_do_not_pad_or_cut() -> None:
    def save(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 2} | {
            "strategy": "LongestFirst",
            "stride": 0,
        }
        content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 3} | {
            "pad_to_multiple_of": None,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }

    tokenizer = BloomTokenizer.from_bytes(demo_with(save))
    assert tokenizer.encode("a b c d") == BloomTokenizer.from_file(DEMO).encode("a b c d")
    assert tokenizer(["a"], padding=False)["input_ids"] == [tokenizer.encode("a")]


def test_ids_come_as_lists_arrays_or_scalars(demo: BloomTokenizer) -> None:
    ids = demo.encode("Hello, monde")
    for dtype in (np.int32, np.int64, np.uint16, np.uint64):
        assert demo.decode(np.array(ids, dtype=dtype)) == "Hello, monde"
    assert demo.decode([np.int64(i) for i in ids]) == "Hello, monde"
    assert demo.decode(tuple(ids)) == "Hello, monde"
    assert demo.decode(np.int64(ids[0])) == demo.decode(ids[0]) == demo.decode(ids[:1])
    assert demo.stream().push(np.int32(ids[0])) == demo.decode(ids[:1])
    assert (demo.decode([]), demo.decode(np.array([]))) == ("", "")
    assert demo.batch_decode(np.array([ids, ids])) == ["Hello, monde"] * 2
    assert demo.batch_decode([[1, *ids], ids], skip_special_tokens=True) == ["Hello, monde"] * 2


def test_tokens_and_ids_convert_one_or_many(demo: BloomTokenizer) -> None:
    assert demo.convert_tokens_to_ids("<pad>") == 3
    assert demo.convert_tokens_to_ids(["<s>", "no such token"]) == [1, None]
    assert demo.convert_tokens_to_ids("no such token") is None
    assert demo.convert_ids_to_tokens(3) == "<pad>"
    assert demo.convert_ids_to_tokens(np.array([3, N_DEMO])) == ["<pad>", None]


@pytest.mark.parametrize("beyond", [N_DEMO, 250_680, 250_879, 2**32 - 1, 2**32, 2**70])
def test_an_id_beyond_the_vocabulary_decodes_to_nothing(demo: BloomTokenizer, beyond: int) -> None:
    ids = demo.encode("é")
    assert demo.decode([beyond, *ids, beyond]) == streamed(demo, [beyond, *ids, beyond]) == "é"
    assert demo.convert_ids_to_tokens(beyond) is None


# --- errors -----------------------------------------------------------------------------------


def fails(error: type[BloomqError], message: str, action: Callable[[], object]) -> None:
    """The action raises this error with exactly this message, which is one lower-case line."""
    with pytest.raises(error) as caught:
        action()
    assert str(caught.value) == message
    assert "\n" not in message and not message.endswith(".")


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    for path, named in (
        (tmp_path / "no", tmp_path / "no"),
        (tmp_path, tmp_path / "tokenizer.json"),
        ("a\0b", "a\0b"),
    ):
        message = f"{named}: no such file; expected a tokenizer.json"
        fails(InputNotFound, message, partial(BloomTokenizer.from_file, path))
        fails(InputNotFound, message, partial(BloomTokenizer.from_pretrained, path))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    message = f"{tmp_path}/tokenizer.json: cannot be read: Is a directory"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_file(tmp_path))


def test_a_name_that_is_too_long_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    message = f"{path}: cannot be read: File name too long"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_pretrained(path))


@pytest.mark.skipif(sys.platform == "win32", reason="FIFOs are POSIX's")
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    message = f"{path}: is not a regular file: replace it"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_file(path))


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bloomq.tokenizer.MAX_FILE_BYTES", DEMO.stat().st_size - 1)
    message = f"{DEMO}: over {DEMO.stat().st_size - 1} bytes: too large for what it should be"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_file(DEMO))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b"hello", "expected value at line 1 column 1"),
        (b"{}", "Model missing. at line 1 column 2"),
        (b"\xff\xfe{\x00", "expected value at line 1 column 1"),
        (b"[" * 100_000, "invalid type: sequence, expected struct Tokenizer at line 1 column 1"),
    ],
)
def test_what_is_no_tokenizer_says_why(data: bytes, reason: str) -> None:
    message = f"pack: not a tokenizer.json: {reason}"
    fails(TokenizerError, message, lambda: BloomTokenizer.from_bytes(data, "pack"))


def test_a_truncated_file_is_no_tokenizer() -> None:
    data = DEMO.read_bytes()
    for end in range(0, len(data) - 2, 9973):
        with pytest.raises(TokenizerError, match=r"^x: not a tokenizer\.json: \S"):
            BloomTokenizer.from_bytes(data[:end], "x")


def no_decoder(content: dict[str, Any]) -> None:
    content["decoder"] = None


def word_level(content: dict[str, Any]) -> None:
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def sentencepiece(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def long_prefix(content: dict[str, Any]) -> None:
    content["model"]["continuing_subword_prefix"] = "#" * 20


@pytest.mark.parametrize("change", [no_decoder, word_level, sentencepiece, long_prefix])
def test_another_kind_of_tokenizer_is_refused(
    change: Callable[[dict[str, Any]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    message = (
        "x: expected a byte-level BPE such as BLOOM's, found another kind; "
        "take the tokenizer.json of the model"
    )
    fails(TokenizerError, message, lambda: BloomTokenizer.from_bytes(demo_with(change), "x"))
    assert capfd.readouterr().err == ""  # Rust would panic on the last two, and print it


def test_a_panic_of_the_library_becomes_an_error() -> None:
    data = demo_with(sentencepiece).replace(b"Precompiled", b"\\u0050recompiled")
    with pytest.raises(TokenizerError, match=r"^x: not a tokenizer\.json: Precompiled: Error"):
        BloomTokenizer.from_bytes(data, "x")
    # a merge that makes a token longer than all in the vocabulary overruns the library's buffer
    merge = {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    data = demo_with(lambda content: content["model"].update(merge))
    with pytest.raises(TokenizerError, match=r"^x: not a tokenizer\.json: range end index 2 out"):
        BloomTokenizer.from_bytes(data, "x")


def test_a_failure_while_encoding_becomes_an_error() -> None:
    def lack_unk(content: dict[str, Any]) -> None:
        content["model"].update(vocab={"x": 4}, merges=[], unk_token="nope")

    tokenizer = BloomTokenizer.from_bytes(demo_with(lack_unk))
    reason = "Unk token `nope` not found in the vocabulary"
    one, many = "the tokenizer failed on the text", "the tokenizer failed on the texts"
    fails(TokenizerError, f"{one}: {reason}", lambda: tokenizer.encode("hello"))
    fails(TokenizerError, f"{many}: {reason}", lambda: tokenizer.encode_batch(["hello"]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, TypeError])
def test_other_exceptions_pass_through(error: type[BaseException]) -> None:
    class Library:
        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise error

    tokenizer = BloomTokenizer.from_file(DEMO)
    tokenizer._tokenizer = Library()  # type: ignore[assignment]
    with pytest.raises(error):
        tokenizer.encode("a")


def test_an_unknown_padding_side_is_refused() -> None:
    message = "padding_side 'center': expected 'left' or 'right'"
    wrong: Any = "center"
    fails(UsageError, message, lambda: BloomTokenizer.from_file(DEMO, padding_side=wrong))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "right"}, "padding 'right': expected a bool, 'longest' or 'max_length'"),
        ({"return_tensors": "pt"}, "return_tensors 'pt': expected 'np' or None"),
        ({"truncation": True}, "max_length None: expected >= 1 to cut or pad to, else None"),
        ({"padding": "max_length"}, "max_length None: expected >= 1 to cut or pad to, else None"),
        ({"max_length": 5}, "max_length 5: expected >= 1 to cut or pad to, else None"),
        (
            {"truncation": True, "max_length": 0},
            "max_length 0: expected >= 1 to cut or pad to, else None",
        ),
        (
            {"return_tensors": "np"},
            "return_tensors='np': the rows differ in length; pass padding=True",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(
    demo: BloomTokenizer, options: dict[str, Any], message: str
) -> None:
    fails(UsageError, message, lambda: demo(["a", "a b c"], **options))


def test_padding_without_a_pad_token_is_refused() -> None:
    def drop_pad(content: dict[str, Any]) -> None:
        del content["added_tokens"][3], content["model"]["vocab"]["<pad>"]

    tokenizer = BloomTokenizer.from_bytes(demo_with(drop_pad))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (None, None)
    message = "no <pad> token to pad with; encode the texts one by one"
    fails(TokenizerError, message, lambda: tokenizer(["a", "a b c"], padding=True))


def test_what_is_no_text_is_refused(demo: BloomTokenizer) -> None:
    wrong: Any = 5
    fails(UsageError, "the text: expected str, found int", lambda: demo.encode(wrong))
    fails(UsageError, "texts: expected a list of str, found int", lambda: demo(wrong))
    fails(UsageError, "texts: expected a list of str, found str", lambda: demo.encode_batch("ab"))
    fails(UsageError, "text 1: expected str, found int", lambda: demo(["a", wrong]))


def test_a_lone_surrogate_is_named_with_its_position(demo: BloomTokenizer) -> None:
    fault = "lone surrogate U+D800 at position 2, which UTF-8 cannot hold; remove it"
    fails(UsageError, f"the text: {fault}", lambda: demo.encode("é \ud800"))
    fails(UsageError, f"text 1: {fault}", lambda: demo(["a", "é \ud800"]))
    fails(UsageError, f"the token: {fault}", lambda: demo.convert_tokens_to_ids("é \ud800"))


def test_a_negative_id_is_refused(demo: BloomTokenizer) -> None:
    message = "id -100 is negative; expected 0 or more"
    fails(UsageError, message, lambda: demo.decode([5, -100]))
    fails(UsageError, message, lambda: demo.decode(np.array([5, -100], dtype=np.int8)))
    fails(UsageError, message, lambda: demo.stream().push(-100))


@pytest.mark.parametrize("wrong", [[1.5], "12", None, [[1, 2], [3, 4]], [[1, 2], [3]], {1, 2}])
def test_what_is_no_row_of_ids_is_refused(demo: BloomTokenizer, wrong: Any) -> None:
    message = "ids: expected one row of integers; batch_decode takes several rows"
    fails(UsageError, message, lambda: demo.decode(wrong))
