"""Every error of ours occurs in a test, by words that no other error has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bloomq import errors

ROOT = Path(__file__).parent.parent
FRAGMENT = 10  # characters, at least, that a message and a test must share

# Messages without so much literal text of their own, by module and function, and why.
WITHOUT_TEXT = {
    ("bloomq/config.py", "BloomConfig.from_dict"): "puts the file's name before the message",
    ("bloomq/pack.py", "Pack.open"): "takes a ConfigError's message over",
    ("bloomq/pack.py", "_read_manifest"): "takes a ConfigError's over, with the remedy after it",
    ("bloomq/pack.py", "_read_schemes"): "puts the weight's name before a UsageError's message",
    ("bloomq/pack.py", "_open_shards"): "takes a TensorFile's over, with the remedy after it",
    ("bloomq/pack.py", "_entry_field"): "`FILE has no FIELD`, in test_pack by each field",
    ("bloomq/sampling.py", "_check_number"): "`NAME is VALUE, expected RANGE`, in test_sampling",
    ("bloomq/tokenizer.py", "_library_errors"): "takes the library's message over",
}


@dataclass(frozen=True)
class Raise:
    """One place that makes an error: the literal pieces of its message."""

    module: str
    function: str
    line: int
    pieces: tuple[str, ...]


def sources() -> Iterator[Path]:
    for folder in ("bloomq", "converters"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def raises() -> list[Raise]:
    """Every call of an error of ours, or of a parameter that is one, in the package."""
    found = []
    known = {
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.BloomqError)
    }  # fmt: skip
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    for tree in trees.values():  # private ones, derived where they are used
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and known & {ast.unparse(b) for b in node.bases}:
                known.add(node.name)
    for path, tree in trees.items():
        module = str(path.relative_to(ROOT))
        for function, node in functions(tree):
            names = known | error_parameters(node)
            for call in own_calls(node):
                if isinstance(call.func, ast.Name) and call.func.id in names:
                    found.append(Raise(module, function, call.lineno, tuple(pieces(call))))
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its name, a method's with its class."""
    for node in ast.walk(tree):
        owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        if owner or isinstance(node, ast.Module | ast.FunctionDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    yield owner + child.name, child


def error_parameters(function: ast.FunctionDef) -> set[str]:
    arguments = function.args.args
    return {a.arg for a in arguments if a.annotation and "BloomqError" in ast.unparse(a.annotation)}


def own_calls(function: ast.FunctionDef) -> Iterator[ast.Call]:
    """Calls in a function's body, not in those defined inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def pieces(call: ast.Call) -> Iterator[str]:
    """The literal parts of a message, between its fields; the fields' own strings are not text."""
    for argument in call.args:
        parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def windows(piece: str) -> set[str]:
    """Every fragment of a literal piece."""
    return {piece[i : i + FRAGMENT] for i in range(len(piece) - FRAGMENT + 1)}


def test_texts() -> str:
    """Every string of the tests, as Python reads it; regular expressions without backslashes."""
    texts = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        if path.name != Path(__file__).name:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    joined = "\n".join(texts)
    return joined + joined.replace("\\", "")


test_texts.__test__ = False  # type: ignore[attr-defined]
RAISES = raises()


def distinctive(one: Raise) -> set[str]:
    """Fragments of its message that no other message of ours has (the same message may occur in
    several places)."""
    mine = set().union(*map(windows, one.pieces))
    others = (other for other in RAISES if other.pieces != one.pieces)
    return mine.difference(*(windows(piece) for other in others for piece in other.pieces))


@pytest.fixture(scope="module")
def tested() -> str:
    return test_texts()


def test_the_tree_is_really_searched():
    assert len(RAISES) > 90
    modules = {one.module for one in RAISES}
    assert {"bloomq/files.py", "bloomq/model.py", "converters/hf.py"} < modules
    assert any(one.function == "_lock" for one in RAISES)  # an error derived where it is used


@pytest.mark.parametrize("one", RAISES, ids=lambda one: f"{one.module}:{one.function}:{one.line}")
def test_every_error_occurs_in_a_test(one: Raise, tested: str):
    fragments = distinctive(one)
    if not fragments:
        assert (one.module, one.function) in WITHOUT_TEXT, f"no text of its own: {one}"
        return
    assert any(fragment in tested for fragment in fragments), f"in no test: {one}"


def test_every_exception_is_still_needed():
    bare = {(one.module, one.function) for one in RAISES if not distinctive(one)}
    assert bare == set(WITHOUT_TEXT)
