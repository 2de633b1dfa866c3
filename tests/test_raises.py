"""Every error of ours occurs in a test, by words that no other error has."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bloomq import errors

ROOT = Path(__file__).parent.parent
FRAGMENT = 10  # characters, at least, that a message and a test must share

# Messages with no words of their own, and why that is right.
WITHOUT_WORDS = {
    "{}": "pack: a ConfigError's message as a PackError's",
    "{}: {}": "config: the file's name before a message; tokenizer: the library's own words",
    "{}: {}: {}": "pack: the weight's name before a UsageError's message",
    "{}: convert again": "pack: a ConfigError's message, and the remedy",
    "{}: copy it again, or convert again": "pack: a TensorFile's message, and the remedy",
    "{} is {}, expected {}": "sampling: the range is an argument; test_sampling has each",
}


@dataclass(frozen=True)
class Raise:
    """One place that makes an error. Fields of its message are {}."""

    module: str
    function: str
    line: int
    message: str

    @property
    def pieces(self) -> list[str]:
        """The literal parts of the message."""
        return self.message.split("{}")


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
        for node in statements(tree):
            if isinstance(node, ast.ClassDef) and known & {ast.unparse(b) for b in node.bases}:
                known.add(node.name)
    for path, tree in trees.items():
        module = str(path.relative_to(ROOT))
        for function, node in functions(tree):
            names = known | error_parameters(node)
            for call in own_calls(node):
                if isinstance(call.func, ast.Name) and call.func.id in names:
                    found.append(
                        Raise(module, function, call.lineno, "".join(map(text_of, call.args)))
                    )
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """A tree without its expressions, which are most of it."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from statements(child)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its name, a method's with its class."""
    for node in statements(tree):
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


def text_of(node: ast.expr) -> str:
    """The text of a string; what is computed is {}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    literal = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if literal else "{}"


def windows(piece: str) -> set[str]:
    """Every fragment of a literal piece."""
    return {piece[i : i + FRAGMENT] for i in range(len(piece) - FRAGMENT + 1)}


def texts_of_tests() -> str:
    """Every string of the tests, as Python reads it; regular expressions without backslashes."""
    texts = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        if path.name == Path(__file__).name:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                texts.append(text_of(node))
    joined = "\n".join(texts)
    return joined + joined.replace("\\", "")


RAISES = raises()


MESSAGES = {one.message: set().union(*map(windows, one.pieces)) for one in RAISES}
SHARED = Counter(fragment for fragments in MESSAGES.values() for fragment in fragments)


def distinctive(one: Raise) -> set[str]:
    """Fragments of its message that no other message of ours has (the same message may occur in
    several places)."""
    return {fragment for fragment in MESSAGES[one.message] if SHARED[fragment] == 1}


def whole(one: Raise) -> str:
    """A pattern of the whole message, but for what is computed at its ends: for one whose words
    others have too."""
    return "[^\\n]{1,80}?".join(re.escape(piece) for piece in one.message.strip(": {}").split("{}"))


@pytest.fixture(scope="module")
def tested() -> str:
    return texts_of_tests()


def test_the_tree_is_really_searched():
    assert len(RAISES) > 90
    modules = {one.module for one in RAISES}
    assert {"bloomq/files.py", "bloomq/model.py", "converters/hf.py"} < modules
    assert any(one.function == "_lock" for one in RAISES)  # an error derived where it is used


@pytest.mark.parametrize("one", RAISES, ids=lambda one: f"{one.module}:{one.function}:{one.line}")
def test_every_error_occurs_in_a_test(one: Raise, tested: str):
    if one.message in WITHOUT_WORDS:
        return
    found = any(fragment in tested for fragment in distinctive(one))
    assert found or (not distinctive(one) and re.search(whole(one), tested)), one.message


def test_what_is_excepted_has_no_words_of_its_own():
    bare = {one.message for one in RAISES if not distinctive(one)}
    assert set(WITHOUT_WORDS) <= bare
