"""What is written under a constraint is what the constraint asks for."""

from __future__ import annotations

import ast
import json
import operator
import re
from pathlib import Path

import pytest
from constrained import Writer
from hypothesis import given, settings
from hypothesis import strategies as st

import bloomq
from bloomq.constraints import Grammar, JsonSchema, Regex

DATA = Path(__file__).parent / "data" / "constraints"
SCHEMAS = json.loads((DATA / "schemas.json").read_text())


@pytest.fixture(scope="module")
def write() -> Writer:
    return Writer(bloomq.load(threads=1))


def check(schema: object, text: str) -> None:
    """Is the text JSON that the schema describes, formats included?"""
    jsonschema = pytest.importorskip("jsonschema")
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_output_of_the_model_validates(write: Writer, name: str, seed: int | None):
    check(SCHEMAS[name], write(JsonSchema(SCHEMAS[name]), seed))


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_chance_writes_validates_too(write: Writer, name: str):
    for seed in range(3):
        check(SCHEMAS[name], write.by_chance(JsonSchema(SCHEMAS[name]), seed))


@pytest.mark.parametrize("name", ["object", "nested", "array of objects", "tuple", "definitions"])
def test_compact_json_has_no_blanks(write: Writer, name: str):
    text = write.by_chance(JsonSchema(SCHEMAS[name], compact=True), 0)
    assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    check(SCHEMAS[name], text)


SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -3, "maximum": 40},
        {"type": "number", "minimum": 0, "maximum": 2},
        {"type": "string", "maxLength": 4},
        {"enum": ["é", "日本", 1, None]},
        {"type": "string", "pattern": "^[a-z]{1,3}$"},
    ]
)


def larger(parts: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    names = st.sampled_from(["a", "b", "clé", "a b", '"', "\\"])
    objects = st.dictionaries(names, parts, max_size=3).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties) or [""]), unique=True).map(
            lambda required: {
                "type": "object", "properties": properties, "additionalProperties": False,
                "required": [name for name in required if name in properties],
            }
        )
    )  # fmt: skip
    arrays = st.tuples(parts, st.integers(0, 2), st.integers(0, 1)).map(
        lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
    )
    return objects | arrays | st.lists(parts, min_size=1, max_size=3).map(lambda p: {"anyOf": p})


@settings(max_examples=40, deadline=None)
@given(schema=st.recursive(SCALARS, larger, max_leaves=5), seed=st.integers(0, 99))
def test_what_is_written_under_any_schema_validates(write: Writer, schema: object, seed: int):
    check(schema, write.by_chance(JsonSchema(schema), seed))


def test_any_object_is_an_object(write: Writer):
    for seed in (None, 1, 2):
        assert isinstance(json.loads(write(JsonSchema.any_object(), seed)), dict)
    assert JsonSchema.any_object() == JsonSchema('{"type":"object"}')
    assert not write.takes(JsonSchema.any_object(), "[]")


def test_blanks_are_bounded_so_that_a_weak_model_ends(write: Writer):
    """At each place: none, one space, or a line break and up to 20 spaces."""
    schema = {"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 1}
    allowed = ["[1]", "[ 1 ]", "[\n  1\n]", "[\n" + " " * 20 + "1]"]
    refused = ["[  1]", "[\n\n1]", "[\n" + " " * 21 + "1]", " [1]", "[1] ", "[\t1]"]
    assert [write.takes(JsonSchema(schema), text) for text in allowed] == [True] * 4
    assert [write.takes(JsonSchema(schema), text) for text in refused] == [False] * 6
    assert [write.takes(JsonSchema(schema, compact=True), text) for text in allowed] == (
        [True] + [False] * 3
    )
    own = JsonSchema({**schema, "x-guidance": {"whitespace_pattern": "\\t"}})
    assert write.takes(own, "[\t1]") and not write.takes(own, "[ 1]")
    assert not write.takes(JsonSchema(str(own.schema), compact=True), "[\t1]")
    for flexible in (True, False):
        own = JsonSchema({**schema, "x-guidance": {"whitespace_flexible": flexible}})
        assert write.takes(own, "[1]") and write.takes(own, "[ \t 1]") == flexible


@pytest.mark.parametrize(
    "pattern",
    [
        "yes|no", r"\d{3}-\d{4}", "[a-f]+x?", "^anchored$", "(?i)case", r"[^aeiou\s]{2,6}",
        r"\w{1,5} \w{1,5}", "(un|deux|trois)( (un|deux|trois)){0,3}", "日本(語|人)", "é{3}",
        ".{0,12}", r"a/b\.c", '"quoted"', r"\\", "\n\t", "x*?y", "[😀-😎]{1,3}", "(a(b(c)?)?)?", "",
        r"([0-9]{1,3}\.){3}[0-9]{1,3}",
    ],
)  # fmt: skip
def test_every_output_matches_the_regex(write: Writer, pattern: str):
    texts = [write(Regex(pattern), seed) for seed in (None, 1, 2)]
    texts += [write.by_chance(Regex(pattern), seed) for seed in range(3)]
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_what_a_regex_does_not_match_is_not_let_through(write: Writer):
    assert write.takes(Regex(r"[a-z]+ \d+"), "abc 123")
    assert not write.takes(Regex(r"[a-z]+ \d+"), "abc")
    assert not write.takes(Regex(r"[a-z]+ \d+"), "Abc 123")


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(node: ast.expr) -> int:
    """Of an expression of numbers, + - and *; anything else is a KeyError."""
    if isinstance(node, ast.Constant):
        return int(node.value)
    assert isinstance(node, ast.BinOp)
    return OPERATORS[type(node.op)](value(node.left), value(node.right))


@pytest.mark.parametrize("name", ["arithmetic.lark", "arithmetic.gbnf"])
def test_every_output_of_a_grammar_parses_back(write: Writer, name: str):
    grammar = Grammar((DATA / name).read_text())
    texts = [write(grammar, seed) for seed in (None, 1, 2, 3)]
    texts += [write.by_chance(grammar, seed) for seed in range(10)]
    for text in texts:
        assert value(ast.parse(text, mode="eval").body) == eval(text)
    assert write.takes(grammar, "12*(3+4)-5")
    assert not any(write.takes(grammar, text) for text in ("12*", "(3", "012", "1/2", "1 + 2"))


def test_a_grammar_of_llama_cpp_means_what_it_means_there(write: Writer):
    grammar = Grammar(
        r"""
        root    ::= "\u00e9" [^a-z\n] "\x41" ideo-gram text? smiley # a comment
        ideo-gram ::= [\u4e00-\u9fff] | "/"
        text    ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt]))* "\""
        smiley  ::= [\U0001F600-\U0001F64F]{1,2} "\u0041"
        """
    )
    good = ["é!A日😀A", "é0A/😀😎A", 'é!A日"x\\n\\\\"😀A', 'é!A日""😀A']
    bad = ["é\nA日😀A", "éaA日😀A", "e!A日😀A", "é!A日A", "é!A日😀", 'é!A日"\n"😀A', "é!Ax😀A"]
    assert [write.takes(grammar, text) for text in good] == [True] * 4
    assert not any(write.takes(grammar, text) for text in bad)
