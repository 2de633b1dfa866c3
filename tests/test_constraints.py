"""A matcher says which tokens may come next, which must, and when a text is complete."""

from __future__ import annotations

import inspect
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import warm
from constrained import END, Writer, drawn
from tokenizers import Tokenizer, decoders, models

import bloomq
from bloomq.constraints import Grammar, JsonSchema, Regex
from bloomq.constraints.matching import Compiler, _Source
from bloomq.errors import UsageError
from bloomq.tokenizer import BloomTokenizer

HERE = Path(__file__).parent
SCHEMAS = json.loads((HERE / "data" / "constraints" / "schemas.json").read_text())


@pytest.fixture(scope="module")
def write() -> Writer:
    return Writer(bloomq.load(threads=1))


WORDS = ("café", "cafés", "cat", "日本", "日本語", "日光", "😀", "😎", "über", "ünder")


def test_allowed_are_exactly_the_tokens_that_lead_to_a_text(write: Writer):
    """Where one way remains, of its tokens the usual one; characters are cut in their middle."""
    ids = range(4, write.tokenizer.vocab_size)
    matcher, rng = write.compiler.matcher(Regex("|".join(WORDS)), (END,)), np.random.default_rng(0)
    pieces = {i: write.tokenizer._bytes_of(i) for i in ids}
    for start in range(8):
        here, written = matcher.fork(), b""
        while not here.ended:
            ways = [word.encode() for word in WORDS if word.encode().startswith(written)]
            right = {i for i in ids if any(w.startswith(written + pieces[i]) for w in ways)}
            found = set(np.flatnonzero(here.allowed()).tolist()) - {END}
            assert found and found <= right
            assert found == right or here.forced()[0] in found
            assert here.allowed()[END] == (written in ways)
            token = int(rng.choice(sorted(found)))
            written += pieces[token]
            here.accept(token)
        assert written.decode() in WORDS, start


def test_a_grammar_may_ask_for_a_special_token(write: Writer):
    matcher = write.compiler.matcher(Grammar('start: "a" <pad>'), (END,))
    matcher.accept(write.tokenizer.encode("a")[0])
    assert np.flatnonzero(matcher.allowed()).tolist() == [write.tokenizer.pad_token_id]


def test_text_has_no_special_tokens_and_no_padded_ids(write: Writer):
    wider = Compiler(write.tokenizer, write.tokenizer.vocab_size + 200)
    allowed = wider.matcher(Regex("(?s:.*)"), (END,)).allowed()
    assert len(allowed) == write.tokenizer.vocab_size + 200
    assert allowed[write.tokenizer.all_special_ids].tolist() == [False, False, True, False]
    assert not allowed[write.tokenizer.vocab_size :].any()
    assert allowed[4 : write.tokenizer.vocab_size].sum() > 8_000
    anything = wider.matcher(Grammar("start: <[*]>"), ())
    assert not anything.allowed()[write.tokenizer.vocab_size :].any()


def test_a_complete_text_is_followed_by_the_end_alone(write: Writer):
    matcher = write.compiler.matcher(Regex("ab?"), (END, 3))
    assert not matcher.complete and not matcher.ended
    matcher.accept(write.tokenizer.encode("a")[0])
    b = write.tokenizer.encode("b")[0]
    assert matcher.complete and not matcher.ended
    assert np.flatnonzero(matcher.allowed()).tolist() == [END, 3, b]
    other = matcher.fork()
    matcher.accept(b)
    assert matcher.complete and matcher.ended and matcher.forced() == []
    assert np.flatnonzero(matcher.allowed()).tolist() == [END, 3]
    other.accept(3)
    assert other.complete and other.ended
    with pytest.raises(UsageError, match="is not allowed by the constraint where it came"):
        other.accept(b)


def test_without_an_end_token_a_complete_text_says_so(write: Writer):
    matcher = write.compiler.matcher(Regex("a"), ())
    matcher.accept(write.tokenizer.encode("a")[0])
    assert matcher.ended and not matcher.allowed().any()


def test_an_end_that_is_text_too_may_be_either(write: Writer):
    a = write.tokenizer.encode("a")[0]
    matcher = write.compiler.matcher(Regex("aa|ab"), (a,))
    matcher.accept(a)
    assert not matcher.ended
    matcher.accept(a)
    assert matcher.ended


def test_forced_tokens_are_the_usual_ones_and_come_true(write: Writer):
    schema = {
        "type": "object", "properties": {"première chose": {"const": "日本語"}},
        "required": ["première chose"], "additionalProperties": False,
    }  # fmt: skip
    matcher = write.compiler.matcher(JsonSchema(schema, compact=True), (END,))
    usual = write.tokenizer.encode('{"première chose":"日本語"}')
    forced = matcher.forced()
    assert len(forced) >= len(usual) - 1 and forced == usual[: len(forced)]
    for token in forced:
        assert np.flatnonzero(matcher.allowed()).tolist() == [token]
        matcher.accept(token)
    free = write.compiler.matcher(Regex("[ab]+"), (END,))
    assert free.forced() == []


@pytest.mark.parametrize("name", ["object", "anyOf", "unicode", "recursion"])
def test_forced_tokens_come_true_wherever_they_are_offered(write: Writer, name: str):
    matcher, rng = write.compiler.matcher(JsonSchema(SCHEMAS[name]), ()), np.random.default_rng(4)
    for _ in range(60):
        if matcher.ended:
            break
        for token in matcher.forced():
            assert np.flatnonzero(matcher.allowed()).tolist() == [token]
            matcher.accept(token)
        if not matcher.ended:
            matcher.accept(drawn(matcher, rng))


def test_the_same_tokens_allow_the_same_in_forks_threads_and_models(write: Writer):
    constraint = JsonSchema(SCHEMAS["array of objects"])
    ids = write.tokenizer.encode('[{"id": 17, "tags": ["x"]}]')

    def masks(compiler: Compiler, fork: bool = False) -> list[bytes]:
        matcher, found = compiler.matcher(constraint, (END,)), []
        for token in ids:
            matcher = matcher.fork() if fork else matcher
            found.append(matcher.allowed().tobytes())
            matcher.accept(token)
        return found

    expected = masks(write.compiler)
    assert masks(write.compiler, fork=True) == expected
    fresh = Compiler(write.tokenizer, len(write.compiler.matcher(constraint, ()).allowed()))
    results: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(masks(fresh))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_a_fork_goes_its_own_way(write: Writer):
    first = write.compiler.matcher(Regex("ab|cd"), ())
    second = first.fork()
    first.accept(write.tokenizer.encode("a")[0])
    second.accept(write.tokenizer.encode("c")[0])
    texts = [write.tokenizer.decode(matcher.forced()) for matcher in (first, second)]
    assert texts == ["b", "d"]


def test_what_is_allowed_cannot_be_changed_by_its_reader(write: Writer):
    matcher = write.compiler.matcher(Regex("a"), ())
    with pytest.raises(ValueError, match="read-only"):
        matcher.allowed()[0] = True
    assert matcher.allowed() is matcher.allowed()


def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(write: Writer):
    matcher = write.compiler.matcher(Regex("abc"), (END,))
    before = matcher.allowed().copy()
    for token in (write.tokenizer.encode("z")[0], END, -1, write.tokenizer.vocab_size, 10**9):
        with pytest.raises(UsageError, match=f"token {token} is not allowed by the constraint"):
            matcher.accept(token)
    assert (matcher.allowed() == before).all()


def test_many_constraints_are_compiled_anew_and_alike(write: Writer):
    """More than are kept."""
    compiler = Compiler(write.tokenizer, write.tokenizer.vocab_size)
    for _ in range(2):
        for i in range(20):
            compiler.matcher(Regex(f"x{i}"), ())
    assert len(compiler._compiled) == 16


def test_a_vocabulary_that_lacks_a_byte_says_so():
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.decoder = decoders.ByteLevel()
    matcher = Compiler(BloomTokenizer(made, "left"), 2).matcher(Regex("ac"), ())
    matcher.accept(0)
    with pytest.raises(UsageError, match="matches it, or the vocabulary lacks the tokens"):
        matcher.allowed()


def test_an_end_that_a_grammar_asks_for_by_number_is_none(write: Writer):
    """The end that llguidance knows lies behind the tokenizer's tokens, and is nobody's token."""
    constraint = Grammar(f'start: "a" <[{write.tokenizer.vocab_size}]>')
    matcher = write.compiler.matcher(constraint, (END,))
    matcher.accept(write.tokenizer.encode("a")[0])
    with pytest.raises(UsageError, match="no token of this vocabulary continues what the const"):
        matcher.allowed()
    anything = write.compiler.matcher(Grammar("start: <[*]> <[*]>"), ()).allowed()
    assert not write.compiler.matcher(Grammar("start: <[*]> <[*]>"), (8_191,)).complete
    assert anything.sum() == write.tokenizer.vocab_size


def test_special_and_added_tokens_have_the_bytes_that_the_tokenizer_decodes(write: Writer):
    source = _Source(write.tokenizer)
    for i in range(write.tokenizer.vocab_size):
        if i not in write.tokenizer.all_special_ids:
            assert source.tokens[i] == write.tokenizer._bytes_of(i)


def test_the_code_of_the_page_runs(tmp_path: Path):
    if "constraint" not in inspect.signature(bloomq.LanguageModel.generate).parameters:
        pytest.skip("generate takes no constraint yet")
    page = (HERE.parent / "docs" / "constraints.md").read_text()
    (tmp_path / "page.py").write_text(
        "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    )
    done = warm.python(tmp_path / "page.py")
    assert done.returncode == 0, done.stderr
    person, answer, total = done.stdout.splitlines()
    assert "'age':" in person and answer in ("yes", "no")
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})?", total)


def test_the_benchmark_runs():
    options = ("--repeat", "1", "--tokens", "9000")
    done = warm.python("constraints.py", *options, cwd=HERE.parent / "benchmarks")
    assert done.returncode == 0, done.stderr
    assert re.search(r"9000 tokens: compiled in [\d.]+ s", done.stdout)
    assert re.search(r"any object +[\d.]+ +\d+ +\d+", done.stdout)
