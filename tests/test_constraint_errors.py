"""A constraint that cannot be ends in one line, whatever it does to its compiler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import pytest
from constrained import END, Writer

import bloomq
from bloomq.cli.constraints import from_options
from bloomq.constraints import MOST_BYTES, MOST_SCHEMA_BYTES, Grammar, JsonSchema, Regex, engine
from bloomq.constraints.matching import Compiler, Matcher
from bloomq.errors import BackendError, BloomqError, InputNotFound, UsageError

HERE = Path(__file__).parent
DATA = HERE / "data" / "constraints"


@pytest.fixture(scope="module")
def write() -> Writer:
    return Writer(bloomq.load(threads=1))


BAD_SCHEMAS = {
    "{": "the JSON schema is not JSON: Expecting property name",
    "": "the JSON schema is not JSON",
    '{"a": 1e999, "const": NaN}': "cannot be written as JSON: Out of range float",
    "[" * 100_000: "the JSON schema is not JSON: .*recursion",
    '{"const": %s}' % ("9" * 5000): "the JSON schema is not JSON: Exceeds the limit",
    "3": r"the JSON schema is 3, expected an object or true \(false allows nothing\)",
    "false": "the JSON schema is False, expected an object or true",
    '{"type": "strin"}': "the JSON schema cannot be compiled: Invalid type: strin",
    '{"not": {}}': r'cannot be compiled: Unimplemented keys: \["not"\]',
    '{"type": "array", "uniqueItems": true}': r'Unimplemented keys: \["uniqueItems"\]',
    '{"type": "string", "format": "colour"}': "Unknown format: colour",
    '{"$ref": "#/nowhere"}': "Pointer '/nowhere' does not exist",
    '{"$ref": "file:///etc/passwd"}': "is not present in a registry",
    '{"type": "string", "pattern": "a("}': "unclosed group at character 2$",
    '{"type": "integer", "minimum": 3, "maximum": 1}': "Unsatisfiable schema: minimum",
    '{"x-guidance": {"blanks": 1}}': "unknown field `blanks`",
    '{"const": "\\ud800"}': "cannot be compiled: unexpected end of hex escape",
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda text: text[:40])
def test_a_bad_schema_is_refused_on_one_line(schema: str):
    with pytest.raises(UsageError, match=BAD_SCHEMAS[schema]) as caught:
        JsonSchema(schema)
    check_line(str(caught.value))


@pytest.mark.parametrize(
    "schema", [None, 3, b"{}", ["type"], False, object()], ids=lambda one: type(one).__name__
)
def test_what_is_no_schema_is_refused(schema: object):
    with pytest.raises(UsageError, match="expected an object or true"):
        JsonSchema(schema)


def test_a_mapping_that_json_cannot_hold_is_refused():
    cyclic: dict[str, object] = {}
    cyclic["items"] = cyclic
    with pytest.raises(UsageError, match="the JSON schema cannot be written as JSON: Circular"):
        JsonSchema(cyclic)
    with pytest.raises(UsageError, match="cannot be written as JSON: set is no JSON type"):
        JsonSchema({"enum": {1}})
    with pytest.raises(UsageError, match="compact is 'yes', expected True or False"):
        JsonSchema({}, compact="yes")


def test_a_schema_is_compared_by_its_text_whatever_it_was_given_as():
    plain = {"type": "object", "properties": {"a": {"type": "null"}}}
    proxy = MappingProxyType({**plain, "properties": MappingProxyType(plain["properties"])})
    same = {JsonSchema(plain), JsonSchema(json.dumps(plain, indent=2)), JsonSchema(proxy)}
    assert len(same) == 1 and JsonSchema(True) == JsonSchema({})
    assert JsonSchema({}) != JsonSchema({}, compact=True)


BAD_PATTERNS = {
    "(": "the regular expression cannot be compiled: unclosed group at character 1$",
    "x" * 300 + "(": "unclosed group at character 301$",
    "ab{5,2}": "invalid repetition count range, the start must be <= the end at character 3$",
    "(?=a)b": "look-around, including look-ahead and look-behind, is not supported",
    r"(a)\1": "backreferences are not supported at character 4$",
    r"\ba": "lookarounds not supported yet",
    "a"
    * (
        MOST_BYTES + 1
    ): f"has {MOST_BYTES + 1} bytes, expected at most {MOST_BYTES}: make it shorter",
    "\ud800": "the regular expression holds a lone surrogate: give text that UTF-8 can hold",
}


@pytest.mark.parametrize("pattern", BAD_PATTERNS, ids=lambda text: ascii(text[:20]))
def test_a_bad_regex_is_refused_on_one_line(pattern: str):
    with pytest.raises(UsageError, match=BAD_PATTERNS[pattern]) as caught:
        Regex(pattern)
    check_line(str(caught.value))


BAD_GRAMMARS = {
    "": "the grammar cannot be compiled: Empty grammar",
    'rule: "a"': "no start rule found",
    "start: foo": 'at 1\\(8\\): unknown name: "foo"',
    'start: A\nB: "x"\nA: /(/': r"at 3\(4\): unclosed group at character 1$",
    'start: "a': r"1\(10\): lexer error",
    '%import nope.X\nstart: X\n\x1b[31m': "lexer error|unknown common",
    'root ::= "a" | other': "the grammar cannot be compiled: Rule 'other' not found",
    'root ::= ("a"': r"Expected '\)' at line",
    'root ::= "\\': "Invalid escape sequence",
    'root ::= "\\ud800"': "the grammar cannot be compiled",
    "root ::= " + "(" * 3_000: "recursion",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_GRAMMARS, ids=lambda text: ascii(text[:20]))
def test_a_bad_grammar_is_refused_on_one_line(text: str):
    with pytest.raises(UsageError, match=f"(?i){BAD_GRAMMARS[text]}") as caught:
        Grammar(text)
    check_line(str(caught.value))


def check_line(message: str) -> None:
    assert message.isprintable() and len(message) < 300 and not message.endswith(".")


@pytest.mark.parametrize("kind", [Regex, Grammar])
@pytest.mark.parametrize("value", [None, 3, b"a"], ids=repr)
def test_what_is_no_text_is_refused(kind: type, value: object):
    with pytest.raises(UsageError, match=r"(expression|grammar) is .*, expected a string"):
        kind(value)


def test_what_is_no_constraint_is_refused(write: Writer):
    for value in ("[a-z]+", {"type": "object"}, None):
        with pytest.raises(UsageError, match="expected a JsonSchema, a Regex or a Grammar"):
            write.compiler.matcher(value, ())
    with pytest.raises(UsageError, match="a constraint needs a tokenizer, which this pack has not"):
        Compiler(None, 100).matcher(Regex("a"), ())


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Regex(r"[^\s\S]"), "the constraint cannot be followed: nothing matches it"),
        (JsonSchema({"$ref": "#"}), "the constraint cannot be followed: nothing matches it"),
        (Grammar('start: start "a"'), "the constraint cannot be followed: nothing matches it"),
        (Grammar("start: <nope>"), r"at 1\(8\): unknown special token"),
        (Grammar("start: <[99999999]>"), "Token range end too large: 99999999"),
    ],
    ids=str,
)
def test_what_nothing_can_match_is_refused_before_a_token_is_drawn(write, constraint, words):
    with pytest.raises(UsageError, match=words) as caught:
        write.compiler.matcher(constraint, (END,))
    check_line(str(caught.value))


MANY = "start: " + " | ".join(f"/a*{i}b*/" for i in range(3_000))


def go_on(matcher: Matcher, token: int) -> None:
    matcher.accept(token)
    matcher.allowed()


def test_a_text_that_becomes_too_complex_ends_in_one_line(write: Writer):
    matcher = write.compiler.matcher(Grammar(MANY), ())
    token = write.tokenizer.encode("a")[0]
    with pytest.raises(
        UsageError, match="the constraint cannot be followed any further: "
    ) as caught:
        go_on(matcher, token)
    check_line(str(caught.value))


def test_without_llguidance_the_remedy_is_named(monkeypatch, write: Writer):
    constraint = Regex("a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: Regex("a"), lambda: JsonSchema({}), lambda: Grammar('root ::= "a"'),
        lambda: Compiler(write.tokenizer, 8192).matcher(constraint, ()),
    ):  # fmt: skip
        with pytest.raises(BackendError, match=r'llguidance, .* pip install "bloomq\[grammar\]"'):
            make()


def test_importing_constraints_does_not_import_llguidance():
    code = "import sys, bloomq.constraints.matching; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_panic_of_the_library_is_an_error_of_ours():
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(UsageError, match="it failed: index out of bounds"),
        engine.library_errors("it failed"),
    ):
        raise PanicException("index out\n of bounds")
    with pytest.raises(KeyboardInterrupt), engine.library_errors("it failed"):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="it cannot be compiled: integer division"):
        engine.compiled("it", lambda: 1 // 0)


def test_compiling_has_a_limit_of_time(monkeypatch):
    monkeypatch.setattr(engine, "MOST_SECONDS", 0.05)
    release = threading.Event()
    with pytest.raises(UsageError, match=r"the grammar took over 0\.05 s to compile: make it simp"):
        engine.compiled("the grammar", release.wait)
    release.set()


def test_a_stack_that_there_is_no_memory_for_is_an_error_of_ours(monkeypatch):
    usual = threading.stack_size()
    monkeypatch.setattr(engine, "STACK_BYTES", 1 << 50)
    with pytest.raises(BackendError, match="cannot be compiled: no memory for a stack of"):
        Regex("a")
    assert threading.stack_size() == usual


def test_hostile_constraints_end_in_errors_within_bounds_of_time_and_memory():
    """Under 2.5 GB of address space; the process would die of a stack overflow or an abort."""
    done = subprocess.run(
        [sys.executable, HERE / "hostile_constraints.py"], capture_output=True, text=True,
        timeout=120, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    outcomes = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert len(outcomes) > 30
    for name, words in {
        "rules in a chain": "error: the grammar cannot be compiled|[0-9]+ tokens",
        "schemas in a chain": "error: .*schema too large|[0-9]+ tokens",
        "deep schema": "error: the JSON schema .*recursion",
        "deep regex": "error: the regular expression cannot be compiled",
        "branches": "error: the JSON schema cannot be compiled: schema too large",
        "circular references": "error: the constraint cannot be followed: nothing matches it",
        "doubling": "error: the JSON schema cannot be compiled: schema too large",
    }.items():
        assert re.match(words, outcomes[name]), (name, outcomes[name])
    for outcome in outcomes.values():
        assert re.match(r"error: |[0-9]+ tokens", outcome), outcome
        check_line(outcome)


def test_options_become_constraints(tmp_path: Path):
    (tmp_path / "schema.json").write_bytes(b'\xef\xbb\xbf{"type": "null"}')
    assert from_options(None, None, None, False) is None
    assert from_options(None, "a+", None, False) == Regex("a+")
    assert from_options(None, "", None, False) == Regex("")
    assert from_options(None, None, None, True) == JsonSchema.any_object()
    assert from_options(tmp_path / "schema.json", None, None, False) == JsonSchema({"type": "null"})
    gbnf = DATA / "arithmetic.gbnf"
    assert from_options(None, None, gbnf, False) == Grammar(gbnf.read_text())


def test_two_constraints_at_once_are_refused(tmp_path: Path):
    with pytest.raises(
        UsageError, match="--json-schema and --regex cannot both hold: give one con"
    ):
        from_options(tmp_path / "missing", "a", None, False)
    with pytest.raises(UsageError, match="--grammar and --json-object cannot both hold"):
        from_options(None, None, tmp_path, True)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, InputNotFound, "no such file"),
        (b"\xff{}", UsageError, "not UTF-8 text at byte 0: save it as UTF-8"),
        (b"{", UsageError, "the JSON schema is not JSON"),
        (b" " * (MOST_SCHEMA_BYTES + 1), UsageError, "over 262144 bytes: too large"),
    ],
)
def test_a_file_that_is_no_constraint_is_named(
    tmp_path: Path, content: bytes | None, error: type[BloomqError], words: str
):
    path = tmp_path / "given.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=f"given.json: .*{words}"):
        from_options(path, None, None, False)


def test_a_grammar_file_that_is_wrong_is_named(tmp_path: Path):
    (tmp_path / "wrong.lark").write_text("start: foo")
    with pytest.raises(UsageError, match=r"wrong\.lark: the grammar cannot be compiled: at 1\(8\)"):
        from_options(None, None, tmp_path / "wrong.lark", False)
