"""Run by test_constraints: compiles and follows constraints that were made to do harm.

Prints a line for each: its name, and the error or how many tokens were drawn. Memory is bounded;
who runs this bounds the time.
"""

from __future__ import annotations

import resource

import numpy as np
from constrained import END, drawn

import bloomq
from bloomq.constraints import Grammar, JsonSchema, Regex
from bloomq.constraints.matching import Compiler
from bloomq.errors import UsageError
from bloomq.tokenizer import BloomTokenizer

MEMORY = 5 << 29
STEPS = 30
FEW = 80_000  # bytes of chains that take long


def chain(rule: str, last: str, most: int = 65_000) -> str:
    """Rules that name the next, nearly as many as a grammar may hold: {0} and {1} in `rule`."""
    rules, size = [], 0
    while size < most - 100:
        rules.append(rule.format(len(rules), len(rules) + 1))
        size += len(rules[-1])
    return "".join(rules) + last.format(len(rules))


def schema_chain(part: str, most: int = 260_000) -> str:
    definitions = chain('"d{0}":' + part, '"d{0}":{{"type":"string"}}', most - 50)
    return '{"$ref":"#/$defs/d0","$defs":{' + definitions + "}}"


def twice(i: int, name: str) -> dict[str, object]:
    branch = {"type": "object", "properties": {f"{name}{i}": {"type": "string"}}}
    return {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, branch]}


def array(items: object, **bounds: int) -> dict[str, object]:
    return {"type": "array", "items": items, **bounds}


DOUBLING = {f"d{i}": {"allOf": [twice(i, "x"), twice(i, "y")]} for i in range(30)}
SCHEMAS: dict[str, object] = {
    "deep schema": '{"items":' * 20_000 + "true" + "}" * 20_000,
    "nested arrays": '{"type":"array","items":' * 400 + "true" + "}" * 400,
    "schemas in a chain": schema_chain('{{"items":{{"$ref":"#/$defs/d{1}"}}}},'),
    "objects in a chain": schema_chain('{{"properties":{{"a":{{"$ref":"#/$defs/d{1}"}}}}}},', FEW),
    "maps in a chain": schema_chain('{{"additionalProperties":{{"$ref":"#/$defs/d{1}"}}}},', FEW),
    "tuples in chain": schema_chain('{{"minItems":1,"prefixItems":[{{"$ref":"#/$defs/d{1}"}}]}},'),
    "choices in chain": schema_chain('{{"anyOf":[{{"$ref":"#/$defs/d{1}"}},{{"const":1}}]}},', FEW),
    "circular references": {"$ref": "#"},
    "two references in a circle": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a",
    },
    "endless object": {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
    "reference to itself in allOf": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    "doubling": {"$defs": {**DOUBLING, "d30": {"type": "object"}}, "$ref": "#/$defs/d0"},
    "product of choices": {"allOf": [
        {"anyOf": [{"properties": {f"a{i}_{j}": {"const": j}}} for j in range(10)]}
        for i in range(12)
    ]},
    "branches": {"anyOf": [{"properties": {f"k{i}": {"const": i}}} for i in range(6_000)]},
    "large enum": {"enum": [f"{i * 7919 % 10_007:04d}{i}" for i in range(20_000)]},
    "large enum of numbers": {"enum": list(range(37_000))},
    "many properties": {"properties": {f"p{i}": {"type": "string"} for i in range(2_000)}},
    "many patterns": {"patternProperties": {f"^p{i}.*$": {} for i in range(1_500)}},
    "exponential patterns": {
        "properties": {f"p{i}": {"pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(30)},
    },
    "a billion characters": {"type": "string", "minLength": 10**9},
    "a billion items": array(array(array({}, minItems=999), minItems=999), minItems=10**9),
    "ten million optional items": array({"type": "integer"}, maxItems=10**7),
    "large multiple": {"type": "integer", "multipleOf": 40_009},
    "tiny multiple": {"type": "number", "multipleOf": 0.000001234567},
    "wide bounds": '{"type": "number", "minimum": 1e-308, "maximum": 1e308}',
    "large bound": '{"type": "integer", "minimum": %s}' % ("9" * 4_000),
    "blanks": {"x-guidance": {"whitespace_pattern": "((a{1,999}){1,999}){1,999}"}},
    "long text": {"const": "x" * 20_000},
}  # fmt: skip
REGEXES = {
    "deep regex": "(" * 30_000 + "a" + ")" * 30_000,
    "repetition": "a{1,100000}",
    "repetitions of repetitions": "((a{1,1000}){1,1000}){1,1000}",
    "exponential automaton": "(a|b)*a(a|b){4000}",
    "nested stars": "(a+)+b",
    "overlapping branches": "|".join(f".*{i}.*" for i in range(7_000)),
    "letters": r"(\p{L}|\p{N}){1,5000}\p{Lu}\p{L}{1,5000}",
    "wide class": "[" + "".join(chr(0x4E00 + 2 * i) for i in range(10_000)) + "]{1,1000}",
    "long regex": "ab" * 10_000,
}
GRAMMARS = {
    "deep grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "rules in a chain": "start: r0\n" + chain("r{0}: r{1}\n", 'r{0}: "x"\n'),
    "optional rules in a chain": "start: r0\n" + chain("r{0}: (r{1}*)*\n", 'r{0}: "x"\n', 16_000),
    "terminals in a chain": "start: T0\n" + chain('T{0}: T{1} "q"\n', 'T{0}: "x"\n'),
    "negations in a chain": "start: T0\n" + chain("T{0}: ~T{1} & /q*/\n", 'T{0}: "x"\n'),
    "stars in a chain": "start: T0\n" + chain("T{0}: T{1}+\n", 'T{0}: "x"\n', 12_000),
    "ambiguity": 'start: start start | "a" | ',
    "conjunction": "start: X\nX: " + " & ".join(f"/(?s:.*){i}(?s:.*)/" for i in range(10, 60)),
    "many literals": "start: " + " | ".join(f"/a*{i}b*/" for i in range(3_000)),
    "many schemas": "start: " + " | ".join(['%json {"type":"object"}'] * 500),
    "a million repeats": 'start: ("a" "b"?){1,1000000}',
    "substrings": 'start: A\nA: %regex {"substring_chars": "' + "abc def" * 9_000 + '"}',
    "endless left recursion": 'start: start "a"',
    "rules of llama.cpp in a chain": (
        "root ::= r0\n" + chain('r{0} ::= "a" r{1}\n', 'r{0} ::= "x"\n', 10_000)
    ),
    "deep rule of llama.cpp": "root ::= " + "(" * 30_000,
}  # fmt: skip


def outcome(compiler: Compiler, kind: type, value: object) -> str:
    """Compile, draw some tokens by chance, go back to nothing."""
    drawn_tokens, rng = 0, np.random.default_rng(0)
    try:
        matcher = compiler.matcher(kind(value), (END,))
        while not matcher.ended and drawn_tokens < STEPS:
            matcher.forced()
            matcher.accept(drawn(matcher, rng))
            drawn_tokens += 1
        matcher.fork()
    except UsageError as error:
        return f"error: {error}"
    return f"{drawn_tokens} tokens"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tokenizer = BloomTokenizer.from_pretrained(bloomq.demo_pack())
    compiler = Compiler(tokenizer, tokenizer.vocab_size)
    for kind, values in ((JsonSchema, SCHEMAS), (Regex, REGEXES), (Grammar, GRAMMARS)):
        for name, value in values.items():
            print(f"{name}\t{outcome(compiler, kind, value)}", flush=True)


if __name__ == "__main__":
    main()
