"""Chat templates as transformers renders them, what they may not do, and conversations."""

from __future__ import annotations

import builtins
import json
import re
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, edit_manifest, write_checkpoint

import bloomq
from bloomq.chat import template as template_module
from bloomq.chat.conversation import Conversation
from bloomq.chat.sandbox import MOST_CHARACTERS
from bloomq.chat.stored import sampling_with
from bloomq.chat.styles import STYLES, Style, find_template
from bloomq.chat.template import ChatTemplate
from bloomq.errors import (
    CapacityError,
    InputNotFound,
    OutputError,
    PackError,
    TokenizerError,
    UsageError,
)
from bloomq.language_model import LanguageModel
from bloomq.sampling import Sampling
from bloomq.tokenizer import BloomTokenizer
from bloomq.tokenizer_config import MOST_TEMPLATE_CHARACTERS, read_settings

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""
ZEPHYR = """{% for message in messages %}
{% if message.role == 'user' %}
{{ '<|user|>\\n' + message.content + eos_token }}
{% elif message.role == 'system' %}
{{ '<|system|>\\n' + message.content + eos_token }}
{% else %}
{{ '<|assistant|>\\n'  + message.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] %}{%- set system = messages[0]['content'] -%}
{%- else -%}
    {%- set rest = messages %}{%- set system = false -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if loop.index0 == 0 and system != false -%}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] -%}
    {%- else -%}
        {%- set content = message['content'] -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' '  + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
FILTERS = """{%- macro head(role, n=1) -%}
### {{ role | capitalize }} {{ n }}:
{%- endmacro -%}
{%- set ns = namespace(count=0, seen=[]) -%}
{{ 'year ' ~ strftime_now('%Y') }} {{ dict(a=1, b=[1, 'x<y']) | tojson }}
{{ [1, {'é': none}] | tojson(indent=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' | ') }}
{%- for message in messages if message.role != 'system' %}
  {%- if loop.index > 5 %}{% break %}{% endif %}
  {%- if not message.content %}{% continue %}{% endif %}
  {%- set ns.count = ns.count + 1 %}
  {%- generation %}{{ head(message.role, ns.count) }}
     {{ message['content'] | trim | upper | replace('\\n', ' / ') }}{% endgeneration %}

  {%- if message.reasoning_content is defined %} ({{ message.reasoning_content }}){% endif %}
{%- endfor %}
{{ '%s of %d' % (ns.count, messages | length) }} {{ 'a' * 3 }}
{{ messages[0].content.split(' ')[-1] }}
{%- for tool in tools %} tool {{ tool.name }}{% endfor %} {{ extra | default('none') }}
{%- if add_generation_prompt %} {{ head('assistant') }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "zephyr": ZEPHYR, "llama2": LLAMA2, "filters": FILTERS}
ASKED = [{"role": "user", "content": " Où est\nla mer ? "}]
TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Bonjour 中文"},
    {"role": "assistant", "content": "{{ 7 * 7 }} {% x %}", "thinking": "hm", "name": None},
    {"role": "user", "content": "And\nnow?"},
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def tokenizer() -> BloomTokenizer:
    return BloomTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DEMO)


def written(source: str, messages: Any = ASKED, **options: Any) -> str:
    return ChatTemplate(source).render(messages, **{"add_generation_prompt": True, **options})


# -- as transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("messages", [ASKED, TALK], ids=["asked", "talk"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(
    tokenizer: BloomTokenizer, theirs: Any, name: str, messages: Any, begins: bool
) -> None:
    tools = [{"name": "clock", "parameters": {}}]
    expected = theirs.apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=begins, tokenize=False,
        tools=tools, extra="é",
    )  # fmt: skip
    found = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], add_generation_prompt=begins, tools=tools,
        variables={"extra": "é"},
    )  # fmt: skip
    assert found == expected
    assert "\n" in found or name == "llama2"


def test_tokens_are_those_of_transformers_too(tokenizer: BloomTokenizer, theirs: Any) -> None:
    ours = tokenizer.apply_chat_template(
        TALK, chat_template=ZEPHYR, tokenize=True, return_tensors="np"
    )
    expected = theirs.apply_chat_template(
        TALK, chat_template=ZEPHYR, add_generation_prompt=True, return_tensors="np"
    )
    assert ours["input_ids"].tolist() == expected["input_ids"].tolist()  # type: ignore[index]


def test_the_sandbox_refuses_what_transformers_refuses(theirs: Any) -> None:
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.mro() }}", "{{ nothing.at.all }}"):
        with pytest.raises(Exception, match=r"unsafe|undefined"):
            theirs.apply_chat_template(ASKED, chat_template=source, tokenize=False)
        with pytest.raises(TokenizerError, match=r"unsafe|undefined"):
            written(source)


# -- what a template may not do --------------------------------------------------------------------

TOO_MUCH = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "more than 20000 steps"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
     "more than 20000 steps"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ range(10**9) }}", "Range too big"),
    ("{% for i in range(9999) %}{{ 'aaaaaaaaaa' * 11 }}{% endfor %}", "writes more than 1048576"),
    ("{{ 'a' * 10**10 }}", "its replace would make more than 33554432 characters"),
    ("{{ [0] * 10**9 }}", "would make more"),
    ("{{ 9 ** 99999 }}", "it takes a power that is too large"),
    ("{{ 'a'.center(10**9) }}", "its center would make more"),
    ("{{ 'a' | center(10**9) }}", "its center would make more"),
    ("{{ 'a' | replace('', 'a' * 9999) | replace('', 'a' * 9999) }}", "its replace would make"),
    ("{{ range(99999) | list | join('a' * 9999) }}", "its join would make more"),
    ("{{ '%999999999d' % 3 }}", "it formats to a width that is too large"),
    ("{{ '{:999999999d}'.format(3) }}", "it formats to a width that is too large"),
    ("{{ [[], []] | tojson(indent=10**9) }}", "it indents JSON by more than 64 spaces"),
    ("{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
     "{% endfor %}", "it makes more than 2097152 characters or items of one value"),
    ("{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
     "{% endfor %}", "characters or items of one value"),
    ("{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
     "{% endfor %}{{ n.x }}", "characters or items of one value"),
    ("{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
     "characters or items of one value"),
]  # fmt: skip
WRONG = [
    ("{% if %}", "is no Jinja that runs: Expected an expression"),
    ("{% for x in messages %}", "is no Jinja that runs"),
    ("{% for a in [] %}" * 30 + "{% endfor %}" * 30, "is no Jinja that runs: too many statically"),
    ("{{ x.y.z }}", "cannot write this: 'x' is undefined"),
    ("{{ raise_exception('Only user\n roles.') }}", "cannot write this: Only user roles$"),
    ("{{ raise_exception('\x1b[2J') }}", re.escape("cannot write this: ?[2J") + "$"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 'a' + 1 }}", "cannot write this: "),
    ("{{ messages[9].content.strip() }}", "cannot write this: "),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ messages.__class__ }}", "access to attribute '__class__' of a list is unsafe"),
    ("{{ messages | attr('__class__') }}", "unsafe"),
    ("{{ '{0.__class__}'.format(messages) }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ messages[0].update(role='x') }}", "unsafe"),
    ("{% set n = namespace(__class__=1) %}", "a namespace has no '__class__'"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "a namespace has no '_x'"),
    ("{{ lipsum(9) }}", "'lipsum' is undefined"),
    ("{{ '\\ud800' }}", "the chat template writes half a surrogate pair: no text"),
]  # fmt: skip


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bloomq.chat.sandbox.MOST_STEPS", 20_000)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("source", "message"), TOO_MUCH + WRONG)
def test_whatever_a_template_does_ends_in_one_line(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        written(source)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 300


def test_a_template_that_takes_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bloomq.chat.sandbox.MOST_SECONDS", -1.0)
    with pytest.raises(TokenizerError, match="it takes more than -1 s"):
        written("{% for i in range(99) %}{% endfor %}")


@pytest.mark.usefixtures("few_steps")
def test_a_template_goes_on_after_it_failed() -> None:
    made = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok")
    for _ in range(2):
        with pytest.raises(TokenizerError, match="more than 20000 steps"):
            made.render(ASKED, add_generation_prompt=True, variables={"n": 2000})
        assert made.render(ASKED, add_generation_prompt=True, variables={"n": 2}) == "ok"


def test_ordinary_arithmetic_and_long_messages_are_no_excess() -> None:
    long = [{"role": "user", "content": "word " * 100_000}] * 2
    assert len(written(CHATML, long)) > 1_000_000 - 100_000 < MOST_CHARACTERS
    assert written("{{ 100000 * 100000 + 2 ** 40 }}") == str(100000 * 100000 + 2**40)
    assert written("{{ messages[0].content.replace('word', 'w') | length }}", long) == "200000"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of at least one"),
        ("hello", "expected a list of at least one"),
        (["hello"], "message 0 is 'hello', expected a role and a content"),
        ([{"role": "user", "content": object()}], "message 0: holds a object, expected text, numb"),
        ([{"role": "user", "content": Path("/")}], "holds a PosixPath"),
        ([{"role": json.loads("[" * 40 + "]" * 40)}], "lists and mappings lie more than 32 deep"),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        written(CHATML, messages)


def test_text_of_other_kinds_becomes_plain_text() -> None:
    import numpy as np

    class Shouting(str):
        def upper(self) -> str:
            return "no"

    given = [{"role": Shouting("user"), "content": "a", "n": np.int64(3), "t": (True, 1.5)}]
    found = written("{{ messages[0].role.upper() }} {{ messages[0].n + 1 }} {{ messages }}", given)
    assert found.startswith("USER 4 ")


def test_without_jinja2_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TokenizerError, match="need jinja2, which is not installed: pip install"):
        ChatTemplate("x")


def test_a_jinja2_with_known_holes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in ("3.1.5", "2.99", "3.0.0rc1"):
        monkeypatch.setattr(template_module, "version", lambda name, old=old: old)
        with pytest.raises(TokenizerError, match=f"jinja2 {old} lets templates out of its sandbox"):
            ChatTemplate("x")
    monkeypatch.setattr(template_module, "version", lambda name: "3.2.0.dev1")
    ChatTemplate("x")


# -- where templates are kept ----------------------------------------------------------------------


def checkpoint_with(folder: Path, config: object = None, file: str | bytes | None = None) -> Path:
    """A checkpoint with the demo's tokenizer, these settings and this chat_template.jinja."""
    write_checkpoint(folder, vocab_size=8192)
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    if file is not None:
        (folder / "chat_template.jinja").write_bytes(
            file.encode() if isinstance(file, str) else file
        )
    return folder


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        (None, None, {}),
        ("a", None, {"default": "a"}),
        ([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}], None,
         {"default": "a", "tool_use": "b"}),
        ({"default": "a"}, None, {"default": "a"}),
        (None, "é\n", {"default": "é\n"}),
        ("a", "b", {"default": "b"}),
    ],
)  # fmt: skip
def test_a_pack_keeps_the_templates_of_its_checkpoint(
    tmp_path: Path, config: object, file: str | None, expected: dict[str, str]
) -> None:
    folder = checkpoint_with(tmp_path / "model", config, file)
    assert read_settings(folder).chat_templates == expected
    bloomq.convert(folder, tmp_path / "pack")
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert manifest.get("chat_template", {}) == expected
    assert "tokenizer" not in manifest
    for path in (folder, tmp_path / "pack"):
        found = BloomTokenizer.from_pretrained(path)
        assert (found.chat_template or {}) == expected
        if "default" in expected:
            assert found.apply_chat_template(ASKED) == expected["default"].removesuffix("\n")


def test_a_template_changes_the_fingerprint_and_its_absence_does_not(tmp_path: Path) -> None:
    from bloomq.converters.reading import read_checkpoint

    plain = read_checkpoint(checkpoint_with(tmp_path / "a"))
    same = read_checkpoint(checkpoint_with(tmp_path / "b", None))
    other = read_checkpoint(checkpoint_with(tmp_path / "c", "x"))
    assert plain.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "chat_template is 3, expected text, or texts by name"),
        ([{"name": "a"}], "expected text, or texts by name"),
        ([{"template": "a"}], "expected text, or texts by name"),
        ({"default": None}, "expected text, or texts by name"),
        ("a" * (MOST_TEMPLATE_CHARACTERS + 1), "has 1 texts of 262152 characters, expected at mo"),
        ({str(i): "" for i in range(17)}, "expected at most 16 of 262144"),
        ("\ud800", "chat_template holds half a surrogate pair: no text"),
    ],
)
def test_templates_that_are_none_are_named(
    tmp_path: Path, config: object, message: str, pack_of: Callable[..., Path]
) -> None:
    import shutil

    with pytest.raises(TokenizerError, match=f"tokenizer_config.json: .*{message}"):
        read_settings(checkpoint_with(tmp_path / "model", config))
    pack = Path(shutil.copytree(pack_of("int4"), tmp_path / "pack"))
    edit_manifest(pack, lambda manifest: manifest.update(chat_template=config))
    with pytest.raises(PackError, match=message):
        bloomq.Pack.open(pack)


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = checkpoint_with(tmp_path / "model", "a", b"ab\xff")
    with pytest.raises(TokenizerError, match="jinja: byte 2 is no UTF-8: not a template"):
        read_settings(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(TokenizerError, match="Is a directory"):
        read_settings(folder)


def test_a_tokenizer_has_the_template_it_is_given(tokenizer: BloomTokenizer) -> None:
    data = (DEMO / "tokenizer.json").read_bytes()
    named = BloomTokenizer.from_bytes(
        data, chat_template={"default": "a", "rag": "b{{ eos_token }}"}
    )
    assert named.apply_chat_template(ASKED) == "a"
    assert named.apply_chat_template(ASKED, chat_template="rag") == "b</s>"
    assert named.apply_chat_template(ASKED, chat_template="c{{ 1 }}") == "c1"
    assert BloomTokenizer.from_bytes(data, chat_template="d").apply_chat_template(ASKED) == "d"
    with pytest.raises(TokenizerError, match="no default chat template, but none at all: pass"):
        tokenizer.apply_chat_template(ASKED)
    with pytest.raises(TokenizerError, match="no default chat template, but rag: pass"):
        BloomTokenizer.from_bytes(data, chat_template={"rag": "b"}).apply_chat_template(ASKED)


# -- styles ----------------------------------------------------------------------------------------


def test_styles_write_what_fine_tunes_were_trained_on() -> None:
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    assert STYLES["bloomz"].prompt(talk) == "a\nb\nc\n"
    assert STYLES["belle"].prompt(talk[:1]) == "Human: a\n\nAssistant:"
    assert STYLES["belle"].prompt(talk) == "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert STYLES["alpaca"].prompt(talk[:1]) == "### Instruction:\na\n\n### Response:\n"
    system = {"role": "system", "content": "{}"}
    assert STYLES["bloomz"].prompt([system, *talk[:1]]) == "{}\na\n"


def test_how_answers_end_is_read_off_the_template(
    tmp_path: Path, tokenizer: BloomTokenizer
) -> None:
    def found(source: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        (tmp_path / "t.jinja").write_text(source)
        made = find_template(str(tmp_path / "t.jinja"), tokenizer)
        return made.stop, made.ends

    eos = tokenizer.eos_token_id
    assert found(CHATML) == (("<|im_end|>",), (eos,))
    assert found(ZEPHYR) == ((), (eos,))
    assert found(LLAMA2) == ((), (eos,))
    assert found("{{ messages[0].content }}") == ((), (eos,))
    assert found("{{ raise_exception('a system first') }}") == ((), (eos,))
    pad = tokenizer.pad_token_id
    ends = "{% for m in messages %}{{ m.content + pad_token }}{% endfor %}"
    assert found(ends) == ((), (eos, pad))


def test_a_template_is_a_style_a_name_or_a_file(tmp_path: Path, tokenizer: BloomTokenizer) -> None:
    assert find_template(None, tokenizer).name == "bloomz"
    data = (DEMO / "tokenizer.json").read_bytes()
    named = BloomTokenizer.from_bytes(data, chat_template={"default": CHATML, "rag": ZEPHYR})
    assert find_template(None, named).prompt(ASKED).startswith("<|im_start|>user")
    assert find_template("rag", named).prompt(ASKED).startswith("<|user|>")
    assert find_template("belle", named).name == "belle"
    with pytest.raises(UsageError, match="'nope' is no file, and none of bloomz, belle, alpaca, d"):
        find_template("nope", named)
    (tmp_path / "bad").write_text("{% if %}")
    with pytest.raises(TokenizerError, match="bad is no Jinja that runs"):
        find_template(str(tmp_path / "bad"), tokenizer)


# -- conversations ---------------------------------------------------------------------------------


def said(talk: Conversation) -> list[str]:
    return [message["content"] for message in talk.messages]


def test_an_answer_streams_and_becomes_a_message(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=12)
    answer = talk.say("Once upon a time")
    text = "".join(piece.text for piece in answer) + answer.rest
    assert text.strip("\n") == answer.text
    assert talk.messages == [
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": answer.text},
    ]
    expected = model.generate("Once upon a time\n", max_new_tokens=12, stop="\n")
    assert answer.generation.ids == expected.ids
    talk.say("And then?")
    assert talk.prompt_tokens() > 8
    assert len(said(talk)) == 4


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=50, stop=["zzz"])
    answer = talk.say("Once upon a time")
    for _ in range(3):
        next(answer)
    assert len(answer.generation.ids) == 3
    assert said(talk)[1] == answer.text != ""
    list(talk.say("Go on"))
    assert said(talk)[1] == model.tokenizer.decode(list(answer.generation.ids)).strip("\n")  # type: ignore[union-attr]


def test_a_token_that_ends_answers_ends_this_one(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(model, max_new_tokens=20, stop=["zzz"])
    second = model.generate("Once upon a time\n", max_new_tokens=2).ids[1]
    from dataclasses import replace

    talk.template = replace(STYLES["bloomz"], ends=(second,))
    answer = talk.say("Once upon a time")
    assert len(list(answer)) == 2
    assert answer.generation.finish_reason == "eos"
    assert list(answer) == []


def test_a_space_between_prompt_and_answer_is_not_the_answers(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=3)
    talk.template = Style("plain", "{}", "{}", " {}", stop=("\n",))
    answer = talk.say("Once upon a")
    pieces = "".join(piece.text for piece in answer) + answer.rest
    assert answer.generation.text.startswith(" ")
    assert pieces == answer.generation.text[1:]
    assert said(talk)[1] == pieces.strip("\n")


def test_regenerate_draws_anew_and_greedy_repeats(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=5))
    first = list(talk.say("The sea"))
    second = list(talk.regenerate())
    assert [p.id for p in first] != [p.id for p in second]
    assert len(talk.messages) == 2
    again = Conversation(model, max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=5))
    assert [p.id for p in again.say("The sea")] == [p.id for p in first]
    assert [p.id for p in again.regenerate()] == [p.id for p in second]
    talk.sampling = Sampling()
    assert list(talk.regenerate()) == list(talk.regenerate())


def test_undo_edit_and_clear(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=4, system="Short.")
    list(talk.say("One"))
    list(talk.say("Two"))
    list(talk.edit("Three"))
    assert said(talk)[:2] == ["Short.", "One"]
    assert said(talk)[3] == "Three"
    before = talk.messages
    with pytest.raises(UsageError, match="expected some text"):
        talk.edit(" ")
    assert talk.messages == before
    assert talk.undo() == "Three"
    assert len(talk.messages) == 3
    talk.clear()
    assert said(talk) == ["Short."]
    for method, what in ((talk.undo, "undo"), (talk.regenerate, "answer again")):
        with pytest.raises(UsageError, match=f"there is nothing to {what}: nothing was said yet"):
            method()


def test_a_fork_shares_the_past_and_not_the_future(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=4)
    list(talk.say("One"))
    other = talk.fork()
    assert other.messages == talk.messages
    list(other.say("Two"))
    other.sampling = Sampling(temperature=0.5)
    assert len(talk.messages) == 2
    assert len(other.messages) == 4
    assert talk.sampling == Sampling()


def test_messages_are_copies(model: LanguageModel) -> None:
    talk = Conversation(model, max_new_tokens=2)
    list(talk.say("One"))
    talk.messages[0]["content"] = "changed"
    talk.messages.clear()
    assert said(talk)[0] == "One"


def test_the_oldest_turns_leave_the_prompt_and_the_system_stays(model: LanguageModel) -> None:
    small = LanguageModel(model.model, model.tokenizer, 48, "", 0.0)
    talk = Conversation(small, max_new_tokens=4, system="Be brief.")
    prompts = []
    for i in range(12):
        answer = talk.say(f"line number {i} of a long talk")
        list(answer)
        prompts.append(answer.generation.stats.prompt_tokens)
    assert len(talk.messages) == 25
    assert max(prompts) <= 44
    drops = sum(b < a for a, b in pairwise(prompts))
    assert 1 <= drops < 9  # not at every turn: each is a prompt read anew
    ids = talk._ids(talk._turns(), talk._dropped)
    assert small.tokenizer.decode(ids).startswith("Be brief.\nline number")  # type: ignore[union-attr]
    before = talk.messages
    with pytest.raises(CapacityError, match=r"a message of .* new ones exceed the context of 48"):
        talk.say("far too long " * 30)
    assert talk.messages == before
    list(talk.say("short"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "expected 1 to 2047, so that the context holds a prompt too"),
        ({"max_new_tokens": 2048}, "so that the context holds a prompt too"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"stop": [""]}, "expected strings of at least one character"),
        ({"template": "nope"}, "is no file, and none of"),
        ({"stop": 5}, "stop is 5, expected a string or a list of them"),
        ({"template": 5}, "template is 5, expected a name, or that of a Jinja file"),
        ({"template": ""}, "template is '', expected a name, or that of a Jinja file"),
        ({"system": 5}, "the system's message is 5, expected text or None"),
        ({"sampling": {}}, "sampling is {}, expected a bloomq.Sampling"),
    ],
)
def test_impossible_options_of_a_conversation(
    model: LanguageModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Conversation(model, **options)


def test_what_is_no_model_and_no_file_is_named_at_once(model: LanguageModel) -> None:
    for call in (Conversation, lambda one: Conversation.load(one, "x")):
        with pytest.raises(UsageError, match="the model is 5, expected a LanguageModel: load one "):
            call(5)
    talk: Any = Conversation(model)
    for call in (talk.save, talk.restore, lambda path: Conversation.load(model, path)):
        with pytest.raises(UsageError, match="the name of a file is 5, expected text or a path"):
            call(5)


def test_a_template_may_be_a_path(model: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{{ messages[0].content }}!")
    talk = Conversation(model, template=tmp_path / "t")
    assert talk.template.prompt(ASKED).endswith("!")


def test_a_conversation_needs_text(model: LanguageModel) -> None:
    without = LanguageModel(model.model, None, 100, "", 0.0)
    with pytest.raises(PackError, match=r"has no tokenizer.json: it cannot talk"):
        Conversation(without)
    talk = Conversation(model)
    assert talk.max_new_tokens == 256
    for nothing in ("", "  \n", 3, "\ud800"):
        with pytest.raises(UsageError):
            talk.say(nothing)  # type: ignore[arg-type]
    assert talk.messages == []
    with pytest.raises(UsageError, match="the message is '', expected some text"):
        talk.say("")


def test_a_template_that_refuses_leaves_the_conversation(
    model: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "t").write_text("{{ raise_exception('no') if 'x' in messages[-1].content }}hi")
    talk = Conversation(model, template=str(tmp_path / "t"), max_new_tokens=2)
    list(talk.say("a"))
    with pytest.raises(TokenizerError, match="cannot write this: no"):
        talk.say("x")
    assert len(talk.messages) == 2


# -- saved conversations ---------------------------------------------------------------------------


def test_a_saved_conversation_comes_back(model: LanguageModel, tmp_path: Path) -> None:
    talk = Conversation(
        model, system="é", sampling=Sampling(temperature=0.5, seed=3), max_new_tokens=5, stop=["x"]
    )
    list(talk.say("One"))
    talk.save(tmp_path / "talk.json")
    text = (tmp_path / "talk.json").read_text()
    assert '"content": "é"' in text
    found = Conversation.load(model, tmp_path / "talk.json")
    assert found.messages == talk.messages
    assert (found.sampling, found.max_new_tokens, found.stop) == (talk.sampling, 5, ("x",))
    list(found.say("Two"))
    found.save(tmp_path / "talk.json")  # an earlier one is replaced
    assert len(Conversation.load(model, tmp_path / "talk.json").messages) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_a_saved_conversation_names_its_template(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    belle = Conversation(model, template="belle")
    assert belle.keeps_template
    belle.save(path)
    assert json.loads(path.read_text())["template"] == "belle"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Conversation.load(model, path, template="belle")
    with pytest.warns(UserWarning, match="was saved with the template belle, and goes on with blo"):
        Conversation.load(model, path)
    (tmp_path / "t").write_text("{{ messages[0].content }}")
    own = Conversation(model, template=str(tmp_path / "t"))
    assert not own.keeps_template
    own.save(path)
    assert "template" not in json.loads(path.read_text())


def stored(**changes: Any) -> dict[str, Any]:
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return {"format": "bloomq-conversation", "version": 1, "messages": exchange, **changes}


def messages(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


BAD_FILES = [
    ("{", "is no JSON: expected a conversation that was saved"),
    ("[" * 100_000, "is no JSON: expected a conversation that was saved"),
    (b"\xff", "is no JSON"),
    ([], "is no conversation that bloomq saved"),
    ({"messages": []}, "is no conversation that bloomq saved"),
    (stored(version=2), "conversation of version 2, this bloomq reads 1: upgrade bloomq"),
    (stored(version="1"), "conversation of version '1'"),
    (stored(messages={}), "messages are {}, expected a list"),
    (stored(messages=["a"]), "message 1 is by None, expected system or user"),
    (stored(messages=messages("assistant")), "message 1 is by 'assistant', expected system or us"),
    (stored(messages=messages("user", "user")), "message 2 is by 'user', expected assistant"),
    (stored(messages=messages("user", "assistant", "system")), "message 3 is by 'system'"),
    (stored(messages=messages("user")), "ends with a message that has no answer"),
    (stored(messages=[{"role": "user", "content": 3}]), "message 1 is no text: 3"),
    (stored(messages=[{"role": "user", "content": "\ud800"}]), "message 1 is no text"),
    (stored(template=3), "template is 3, expected the name of one"),
    (stored(template="\x1b[2J"), "expected the name of one"),
    (stored(settings=[]), r"settings are \[\], expected them by name"),
    (stored(settings={"max_new_tokens": 0}), ": max_new_tokens is 0, expected at least 1"),
    (stored(settings={"max_new_tokens": 1e9}), "max_new_tokens is 1000000000.0"),
    (stored(settings={"stop": "x"}), ": stop is 'x', expected a list of texts"),
    (stored(settings={"stop": [""]}), "expected a list of texts"),
    (stored(settings={"sampling": 3}), "sampling is 3, expected its fields by name"),
    (
        stored(settings={"sampling": {"heat": 1}}),
        "sampling has no heat, expected a field such as temperature",
    ),
    (stored(settings={"sampling": {"temperature": -1}}), "temperature is -1"),
    (stored(settings={"sampling": {"temperature": 10**400}}), "sampling cannot be {'temperature'"),
    (stored(settings={"sampling": {"top_k": [1]}}), "top_k"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_file_that_is_no_conversation_changes_nothing(
    model: LanguageModel, tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "talk.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    talk = Conversation(model, max_new_tokens=3, system="s")
    list(talk.say("One"))
    before = talk.messages
    with pytest.raises(UsageError, match=message) as caught:
        talk.restore(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert (talk.messages, talk.max_new_tokens, talk.sampling) == (before, 3, Sampling())


def test_a_conversation_from_a_larger_context_fits_into_a_smaller(
    model: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "t").write_text(json.dumps(stored(settings={"max_new_tokens": 10**6})))
    assert Conversation.load(model, tmp_path / "t").max_new_tokens == 2047
    with pytest.raises(InputNotFound, match="no such file"):
        Conversation.load(model, tmp_path / "nothing")


def test_nothing_but_a_conversation_is_replaced(model: LanguageModel, tmp_path: Path) -> None:
    talk = Conversation(model)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is there, and no saved conversation: choose another"):
        talk.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="is not a regular file: choose another name"):
        talk.save(tmp_path)
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        talk.save(tmp_path / "no" / "such")


def test_sampling_with_other_values() -> None:
    assert sampling_with(Sampling(), {"temperature": 0.5}).temperature == 0.5
    with pytest.raises(UsageError, match="sampling has no heat, expected a field such as"):
        sampling_with(Sampling(), {"heat": 1})
    with pytest.raises(UsageError, match="such as temperature, dynamic_temp"):
        sampling_with(Sampling(), {"temprature": 1})


def test_a_module_of_jinja_is_imported_when_a_template_is_used() -> None:
    import subprocess

    code = (
        "import sys, bloomq; m = bloomq.load(); from bloomq.chat.conversation import Conversation; "
        "Conversation(m); print('jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
