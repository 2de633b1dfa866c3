"""Where chat templates run: Jinja as transformers sets it up, with limits on what a template does.

A template comes with a model, so it is untrusted. Invariant: it reaches nothing but the plain data
it is given; every repetition counts steps, and whatever enters a call, a filter, an operator or the
output is weighed before anything is made of it.
Source: transformers, utils/chat_template_utils.py, for the names and settings.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_STEPS = 250_000  # a conversation of 1,000 messages takes some 20,000
MOST_SECONDS = 10.0
MOST_CHARACTERS = 1 << 20  # of the text: five times the longest context BLOOM is used with
_MOST_WEIGHT = 1 << 21  # characters and items, of one argument
_MOST_PRODUCT = 1 << 25  # of two arguments' weights, where a result can be as large as that
_MOST_BITS = 4096  # of a whole number
# What can make more than it is given: by the names of filters and of methods of text.
_MULTIPLYING = (
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace",
    "rjust", "slice", "translate", "zfill",
)  # fmt: skip
_WIDTH = re.compile(r"\d{6}")  # in a format: a width or a precision that no line of text has


class Excess(TemplateRuntimeError):
    """More steps, time or text than a conversation can need."""


def weight(value: object, most: int = _MOST_WEIGHT) -> int:
    """Characters and items of plain data, as often as they occur. Raises: Excess over `most`."""
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str | bytes | list | tuple | dict):
            total += len(one)
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
        elif isinstance(one, int) and one.bit_length() > _MOST_BITS:
            total = most + 1
        if total > most:
            raise Excess(f"it makes more than {most} characters or items of one value")
    return total


class _Bounded(CodeGenerator):
    """Writes a count of steps into every block, and weighs what `~` joins."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """`{% generation %}`, which marks what the model says: here it is its body."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that templates are compiled for; threads may share one."""

    code_generator_class = _Bounded
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols],
            optimized=False, finalize=self.weighed,
        )  # fmt: skip
        self._spent = threading.local()
        self.begin()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._counted(name, made) for name, made in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def begin(self) -> None:
        """A new text, with all its steps to take, in this thread."""
        self._spent.steps, self._spent.until = 0, monotonic() + MOST_SECONDS

    def tick(self) -> None:
        """Count one step. Raises: Excess."""
        self._spent.steps += 1
        if self._spent.steps > MOST_STEPS:
            raise Excess(f"it takes more than {MOST_STEPS} steps")
        if self._spent.steps % 16 == 0 and monotonic() > self._spent.until:
            raise Excess(f"it takes more than {MOST_SECONDS:.0f} s")

    def weighed(self, value: Any) -> Any:
        """The value, before it is written. Raises: Excess."""
        weight(value)
        return value

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What `~` makes."""
        weight(parts)
        return "".join(map(str, parts))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Nothing, as in transformers; of Python's own attributes an error even if unused."""
        if attribute.startswith("_"):
            kind = type(obj).__name__
            raise SecurityError(f"access to attribute {attribute!r:.40} of a {kind} is unsafe")
        return super().unsafe_undefined(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        name = {"*": "replace", "%": "format"}.get(operator, operator)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        self._check("number" if numbers else name, (left, right))
        if operator == "**" and weight(left) + abs(right) > _MOST_BITS:
            raise Excess("it takes a power that is too large")
        result = super().call_binop(context, operator, left, right)
        weight(result)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        given = (owner, *args) if isinstance(owner, str | bytes) else args
        __self._check(getattr(__obj, "__name__", ""), (*given, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that weighs what it is given."""

        @wraps(function)  # with the marks by which Jinja knows what to pass
        def run(*args: Any, **kwargs: Any) -> Any:
            self._check(name, (*args, *kwargs.values()))
            return function(*args, **kwargs)

        return run

    def _check(self, name: str, args: tuple[Any, ...]) -> None:
        """Count a call, and refuse one that could make too much. Raises: Excess."""
        self.tick()
        weights = [abs(a) if isinstance(a, int) else 0 for a in args]
        weights += [weight(list(a.values()) if isinstance(a, Mapping) else a) for a in args]
        largest = sorted([1, 1, *weights])[-2:]
        if name in _MULTIPLYING and largest[0] * largest[1] > _MOST_PRODUCT:
            raise Excess(f"its {name} would make more than {_MOST_PRODUCT} characters")
        texts = [a for a in args if isinstance(a, str)] if name.startswith("format") else []
        if any(_WIDTH.search(text) and ("{" in text or "%" in text) for text in texts):
            raise Excess("it formats to a width that is too large")


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    if isinstance(indent, int) and indent > 64:
        raise Excess("it indents JSON by more than 64 spaces")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


class _Dict:
    """`dict(...)` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)`, of names that do not begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r:.40}")
