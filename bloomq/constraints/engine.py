"""llguidance, which compiles constraints: what it is asked for, within which limits, and its errors
as ours.

Invariant: whatever is to be compiled, the process survives, and the call ends.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

from bloomq.errors import BackendError, BloomqError, UsageError
from bloomq.files import shown

if TYPE_CHECKING:
    import llguidance

Result = TypeVar("Result")

STACK_BYTES = 256 << 20  # reserved, not used: see MOST_BYTES for what a constraint may need of it
MOST_SECONDS = 20.0  # usual ones take milliseconds, the slowest found within MOST_BYTES 32 s
_REASON = 200  # characters of llguidance's own words that an error repeats
# Blanks without a bound let a model that is unsure write blanks until its tokens run out.
_BLANKS = r" |\n {0,20}"
_STARTING = threading.Lock()  # the size of new threads' stacks is one setting of the process


def engine() -> None:
    """Raises: BackendError where llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise BackendError(
            'constraints need llguidance, which is not installed: pip install "bloomq[grammar]"'
        ) from None


def limits() -> llguidance.LLParserLimits:
    """What compiling a constraint, and following it, may take: llguidance's defaults, but for the
    states of the lexer (1 to 2 KB each), of which it allows 250,000."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000, initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000,
        step_max_items=50_000, max_lexer_states=100_000, max_grammar_size=500_000,
        verbose_errors=False,
    )  # fmt: skip


def json_definition(schema: str, compact: bool) -> str:
    """What llguidance compiles for the JSON text of a schema that is an object."""
    from llguidance import LLMatcher

    if compact:
        return LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_flexible": False, "whitespace_pattern": None}
        )
    own = json.loads(schema).get("x-guidance")
    if isinstance(own, dict) and "whitespace_flexible" in own:  # which a pattern would override
        return LLMatcher.grammar_from_json_schema(schema)
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _BLANKS})


def text_definition(kind: Literal["regex", "lark"], text: str) -> str:
    """What llguidance compiles for a regular expression or a Lark grammar."""
    from llguidance import LLMatcher

    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text)


def converted_gbnf(text: str) -> str:
    """A GBNF grammar as Lark."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    # Without its line break a text that ends in a backslash has no place to name.
    return gbnf_to_lark(_CODE_POINT.sub(_plain, text) + "\n")


_CODE_POINT = re.compile(r"\\(?:\\|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


def _plain(escape: re.Match[str]) -> str:
    """An escape's character: the converter loses the zeros of \\u00e9, and keeps \\U as it is."""
    digits = escape[1] or escape[2]
    code = int(digits, 16) if digits else -1
    if 0 <= code < 0x80:
        return f"\\x{code:02x}"
    return chr(code) if 0x80 <= code < 0xD800 or 0xE000 <= code < 0x110000 else escape[0]


def check(what: str, definition: Callable[[], str]) -> None:
    """Raises: UsageError, naming `what`, for a definition that llguidance does not compile;
    BackendError where it is not installed."""
    engine()

    def work() -> str:
        from llguidance import LLMatcher

        failed, messages = LLMatcher.validate_grammar_with_warnings(definition(), limits=limits())
        return messages[0] if failed else ""

    fault = compiled(what, work)
    if fault:
        raise UsageError(f"{what} cannot be compiled: {reason(fault)}")


def compiled(what: str, work: Callable[[], Result]) -> Result:
    """The result of `work`, by a thread with room to recurse deeply and a limit of time.

    Raises: UsageError, naming `what`, where it fails or takes too long; BackendError where there is
    no memory for the thread.
    """
    results: list[Result] = []
    faults: list[BloomqError] = []

    def run() -> None:
        try:
            with library_errors(f"{what} cannot be compiled"):
                results.append(work())
        except BloomqError as error:
            faults.append(error)

    thread = threading.Thread(target=run, name="bloomq-constraint", daemon=True)
    with _STARTING:
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        except RuntimeError:
            megabytes = STACK_BYTES >> 20
            raise BackendError(
                f"{what} cannot be compiled: no memory for a stack of {megabytes} MB: free some"
            ) from None
        finally:
            threading.stack_size(usual)
    thread.join(MOST_SECONDS)
    if faults:
        raise faults[0]
    if not results:  # a thread cannot be ended: it goes on, and its result is forgotten
        raise UsageError(
            f"{what} took over {MOST_SECONDS:g} s to compile: make it simpler, or split its rules"
        )
    return results[0]


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns what llguidance and its converter raise, and Rust's panics, into UsageError."""
    try:
        yield
    except BloomqError:
        raise
    except BaseException as error:  # PanicException is exported nowhere: known by its name
        known = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not known:
            raise
        words = str(error) or type(error).__name__
        raise UsageError(f"{what}: {reason(words)}") from None


def reason(message: str) -> str:
    """llguidance's words on one line: the place and the fault, without an excerpt of the source."""
    if message.startswith("NoExtension"):
        return "nothing matches it, or the vocabulary lacks the tokens"
    text = re.split("<backtrace>|Stack backtrace:", message)[0].replace("<non-verbose/>", "")
    text = _PATTERN.sub("", text, count=1).removeprefix("panic: ")
    pointed = _POINTED.search(text)
    if pointed:
        place = _PLACE.match(text)
        column = len(pointed["before"]) - _INDENT + 1
        text = f"{place[0] if place else ''}{pointed['fault']} at character {column}"
    lines = [line for line in text.splitlines() if not _EXCERPT.match(line)]
    words = " ".join(" ".join(lines).split())
    return shown(words if len(words) <= _REASON else words[: _REASON - 3] + "...").rstrip(".:")


# A regular expression is repeated before its fault. Alone it is the grammar "start: /.../", whose
# place says nothing.
_PATTERN = re.compile(r'(at 1\(8\): )?invalid regex ".*" \(in \w+\): ', re.DOTALL)
_PLACE = re.compile(r"at \d+\(\d+\): ")  # line and column of a grammar
_POINTED = re.compile(r"\n(?P<before> *)\^+ *\nerror: (?P<fault>[^\n]+)")
_INDENT = 4  # of a pattern in the library's words
_EXCERPT = re.compile(r"\s*(\d+ \||\^+\s*$)")  # "   1 | start: foo", "            ^"
