"""What a model sees, as arrays, as a page that stays inert, and on a terminal."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import bloomq
from bloomq.cli import commands
from bloomq.errors import CapacityError, OutputError, UsageError
from bloomq.exploration import MOST_TOKENS, Exploration, explore
from bloomq.exploration.page import coded, visible
from bloomq.language_model import LanguageModel
from bloomq.layers import slopes
from bloomq.sampling import Sampling

PROMPT = "Once upon a time, ça 中"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def found(model: LanguageModel) -> Exploration:
    return explore(model, PROMPT, max_new_tokens=6, top=4)


# -- arrays ----------------------------------------------------------------------------------------


def test_the_numbers_are_the_models(model: LanguageModel, found: Exploration) -> None:
    generation = model.generate(PROMPT, max_new_tokens=6)
    prompt = model.prompt_ids(PROMPT)
    assert found.ids.tolist() == [*prompt, *generation.ids]
    assert found.prompt_tokens == len(prompt)
    np.testing.assert_allclose(found.logprobs[len(prompt) :], generation.logprobs, atol=1e-5)
    logits = model(found.ids[None]).logits[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    at = np.arange(1, len(found.ids))
    np.testing.assert_allclose(found.logprobs[1:], logprobs[at - 1, found.ids[1:]], atol=1e-5)
    best = np.argsort(-logprobs[:-1], axis=1, kind="stable")[:, :4]
    assert found.alternatives[1:].tolist() == best.tolist()
    expected = np.take_along_axis(logprobs[:-1], best, axis=1)
    np.testing.assert_allclose(found.alternative_logprobs[1:], expected, atol=1e-5)
    ranks = (logprobs[:-1] > logprobs[at - 1, found.ids[1:]][:, None]).sum(axis=1)
    assert found.ranks[1:].tolist() == ranks.tolist()
    assert (found.ranks[found.prompt_tokens :] == 0).all()  # greedy
    np.testing.assert_allclose(found.probabilities[1:], np.exp(found.logprobs[1:]))


def test_the_numbers_are_those_of_score_bit_for_bit(model: LanguageModel) -> None:
    ids = [i % 900 + 10 for i in range(130)]
    seen, scores = explore(model, ids, max_new_tokens=0, top=3), model.score(ids, top=3)
    np.testing.assert_array_equal(seen.logprobs[1:], scores.logprobs)
    np.testing.assert_array_equal(seen.ranks[1:], scores.ranks)
    np.testing.assert_array_equal(seen.alternatives[1:], scores.top_ids)
    np.testing.assert_array_equal(seen.alternative_logprobs[1:], scores.top_logprobs)


def test_a_text_of_one_token_has_nothing_but_its_attention(model: LanguageModel) -> None:
    seen = explore(model, [5], max_new_tokens=0)
    assert seen.alternatives.tolist() == [[-1] * 5]
    assert (
        seen.attentions[:, :, 0, 0].tolist() == [[1.0] * model.config.n_head] * model.config.n_layer
    )
    assert seen.page()


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(UsageError, match="the model is 5, expected a LanguageModel: load one with"):
        explore(5, "x")  # type: ignore[arg-type]


def test_nothing_foretells_the_first_token(found: Exploration) -> None:
    assert math.isnan(found.logprobs[0])
    assert found.ranks[0] == -1
    assert found.alternatives[0].tolist() == [-1] * 4
    assert found.alternative_tokens[0] == ()


def test_attentions_are_the_models(model: LanguageModel, found: Exploration) -> None:
    output = model.model(found.ids[None], output_attentions=True)
    expected = np.stack([layer[0] for layer in output.attentions])
    np.testing.assert_array_equal(found.attentions, expected)
    np.testing.assert_array_equal(found.slopes, slopes(model.config.n_head))
    assert found.slopes[0] * found.horizons[0] == pytest.approx(math.log(100))


def test_a_text_of_several_steps_is_one_text(model: LanguageModel) -> None:
    ids = [i % 900 + 10 for i in range(130)]
    seen = explore(model, ids, max_new_tokens=0, top=1)
    output = model.model(np.array([ids]), output_attentions=True)
    expected = np.stack([layer[0] for layer in output.attentions])
    np.testing.assert_allclose(seen.attentions, expected, atol=1e-6)
    logits = output.logits[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = np.arange(129)
    np.testing.assert_allclose(seen.logprobs[1:], logprobs[places, ids[1:]], atol=1e-5)
    assert not np.isnan(seen.logprobs[1:]).any()


def test_tokens_are_text_or_bytes(found: Exploration, model: LanguageModel) -> None:
    assert found.tokens[0] == "On"
    assert "\\xe4" in "".join(found.tokens)  # of 中, which the demo has no token for
    without = LanguageModel(model.model, None, 100, "", 0.0)
    bare = explore(without, [5, 6], max_new_tokens=1)
    assert bare.tokens[:2] == ("#5", "#6")
    assert {5, 6} <= bare.escaped


def test_escapes_are_told_from_text_that_looks_like_them(model: LanguageModel) -> None:
    text = r"\xe4 中"
    seen = explore(model, text, max_new_tokens=0)
    told = ["" if i in seen.escaped else t for i, t in zip(seen.ids, seen.tokens, strict=True)]
    assert "".join(told) == r"\xe4 "
    out, _ = command(text, "-n", "0", "--json", "-q")
    facts = json.loads(out)
    assert facts["escaped"] == [token in seen.escaped for token in seen.ids]
    assert sum(facts["escaped"]) == 3
    rows = zip(facts["alternatives"], facts["alternatives_escaped"], strict=True)
    assert all(len(row) == len(flags) for row, flags in rows)


def test_draws_are_those_of_the_seed(model: LanguageModel) -> None:
    sampling = Sampling(temperature=1.0, seed=4)
    one = explore(model, "The", max_new_tokens=5, sampling=sampling)
    generation = model.generate("The", max_new_tokens=5, temperature=1.0, seed=4)
    assert tuple(one.ids[one.prompt_tokens :].tolist()) == generation.ids
    assert "5 generated by demo" in repr(one)


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("a", {"max_new_tokens": -1}, UsageError, "max_new_tokens is -1, expected a number from 0"),
        ("a", {"max_new_tokens": 1.5}, UsageError, "expected a number from 0"),
        ("a", {"top": 0}, UsageError, "top is 0, expected 1 to 50 alternatives"),
        ("a", {"top": 51}, UsageError, "top is 51"),
        ("", {}, UsageError, "there is nothing to explore: the text has no token"),
        ([5] * 250, {}, CapacityError, "250 tokens and 32 new ones are more than the 256 that can"),
        (3, {}, UsageError, "prompt is 3"),
    ],
)
def test_what_cannot_be_explored_is_named(
    model: LanguageModel, prompt: Any, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        explore(model, prompt, **options)
    assert MOST_TOKENS == 256


# -- the page --------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page's elements, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.held: dict[str, str] = {}
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag if not dict(attrs).get("id") else f"{tag}#{dict(attrs)['id']}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split("#")[0] == tag

    def handle_data(self, data: str) -> None:
        at = self.open[-1] if self.open else ""
        self.held[at] = self.held.get(at, "") + data
        self.text += "" if at.startswith(("script", "style")) else data


def data_of(page: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(Page(page).held["script#data"])
    return parsed


HOSTILE = (
    "</script><script>alert(1)</script>", "<!--", "\"'&amp;&", "<img src=x onerror=alert(1)>",
    "\u202eabc\u2066", "\x00\x1b[2J\x9b", "\u2028\u2029", "${1}`", "\ud83d", "]]>", "\\",
)  # fmt: skip


@pytest.fixture(scope="module")
def hostile(found: Exploration) -> Exploration:
    """The exploration with tokens, alternatives and a title that attack the page."""
    tokens = (*HOSTILE, *found.tokens)[: len(found.tokens)]
    around = HOSTILE * 2
    alternatives = tuple(
        tuple(around[i % len(HOSTILE) :][: len(row)])
        for i, row in enumerate(found.alternative_tokens)
    )
    return replace(found, title=HOSTILE[0], tokens=tokens, alternative_tokens=alternatives)


def test_a_page_is_whole_html_that_asks_for_nothing(found: Exploration) -> None:
    page = Page(found.page())
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not {"src", "href", "onclick", "onload", "style"} & set(attributes), (
            tag,
            attributes,
        )
    assert not re.findall(r"https?:|url\(|@import|innerHTML|eval\(", found.page())


def test_only_this_script_and_this_style_may_run(found: Exploration) -> None:
    page = Page(found.page())
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        digest = base64.b64encode(sha256(page.held[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_hostile_tokens_stay_data(hostile: Exploration, found: Exploration) -> None:
    page = hostile.page()
    shape = [(tag, sorted(attributes)) for tag, attributes in Page(page).tags]
    assert shape == [(tag, sorted(attributes)) for tag, attributes in Page(found.page()).tags]
    raw = Page(page).held["script#data"]
    assert raw.isascii()
    assert not set("<>&\x00\x1b\n") & set(raw)
    tokens = data_of(page)["tokens"]
    assert tokens[0] == HOSTILE[0]
    assert tokens[4] == "\\u{202e}abc\\u{2066}"
    assert tokens[5] == "\\u{0}\\u{1b}[2J\\u{9b}"
    assert all(token.isprintable() for token in tokens)
    assert Page(page).held["title"] == HOSTILE[0]
    assert page.encode()


def test_what_cannot_be_seen_is_escaped() -> None:
    assert visible("a b é中") == "a b é中"
    assert visible("a\n\t\r\x7f") == "a↵⇥␍\\u{7f}"


def test_a_page_holds_the_models_numbers(found: Exploration) -> None:
    data = data_of(found.page())
    assert data["promptTokens"] == found.prompt_tokens
    assert data["probabilities"][0] is None
    np.testing.assert_allclose(data["probabilities"][1:], found.probabilities[1:], rtol=1e-3)
    assert data["ranks"] == found.ranks.tolist()
    for row, texts, logprobs in zip(
        data["alternatives"], found.alternative_tokens, found.alternative_logprobs, strict=True
    ):
        assert [text for text, _ in row] == [visible(text) for text in texts]
        np.testing.assert_allclose([p for _, p in row], np.exp(logprobs[: len(row)]), rtol=1e-3)
    layers, heads, length, _ = found.attentions.shape
    codes = np.frombuffer(zlib.decompress(base64.b64decode(data["attention"])), np.uint8)
    triangles = codes.reshape(layers, heads, length * (length + 1) // 2)
    queries, keys = np.tril_indices(length)
    restored = (triangles / 255.0) ** 2
    np.testing.assert_allclose(restored, found.attentions[:, :, queries, keys], atol=1 / 255)
    assert (data["layers"], data["heads"]) == (layers, heads)
    np.testing.assert_allclose(data["slopes"], found.slopes, rtol=1e-3)
    np.testing.assert_allclose(data["horizons"], found.horizons, rtol=1e-3)


def test_small_weights_are_told_from_nothing() -> None:
    weights = np.zeros((1, 1, 2, 2), np.float32)
    weights[0, 0, 1] = (1e-5, 1.0)
    assert list(coded(weights)) == [0, 1, 255]


def test_a_notebook_shows_the_page_in_a_frame_that_reaches_nothing(found: Exploration) -> None:
    frame = Page(found._repr_html_()).tags
    assert [tag for tag, _ in frame] == ["iframe"]
    attributes = frame[0][1]
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == found.page()
    assert html.escape("<script>") in found._repr_html_()


def test_a_page_too_large_is_refused(found: Exploration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bloomq.exploration._MOST_PAGE_BYTES", 100)
    with pytest.raises(CapacityError, match=r"GB, too much for a page: explore fewer tokens"):
        found.page()


DOCUMENT = r"""
const page = require("fs").readFileSync(0, "utf8"), nodes = {}, keys = {};
const drawing = new Proxy({}, {
  get: (t, k) => k in t ? t[k] : () => {}, set: (t, k, v) => (t[k] = v, true) });
class Element {
  children = []; attributes = {}; classes = new Set(); set = {}; heard = {};
  style = { setProperty: (k, v) => (this.set[k] = v) };
  classList = { add: (c) => this.classes.add(c), remove: (c) => this.classes.delete(c) };
  parentElement = { clientWidth: 900 };
  get tBodies() { return (this.bodies ??= [new Element()]); }
  append(...all) { this.children.push(...all); }
  replaceChildren() { this.children = []; }
  setAttribute(k, v) { this.attributes[k] = v; }
  addEventListener(k, f) { this.heard[k] = f; }
  scrollIntoView() {}
  getContext() { return drawing; }
  set id(v) { nodes[v] = this; }
}
for (const [, id] of page.matchAll(/id="([^"]+)"/g)) nodes[id] = new Element();
nodes.data.textContent = page.split('id="data">')[1].split("</script>")[0];
globalThis.document = { getElementById: (id) => nodes[id], createElement: () => new Element(),
  documentElement: {}, addEventListener: (k, f) => (keys[k] = f) };
globalThis.window = { addEventListener() {}, matchMedia: () => ({ addEventListener() {} }) };
globalThis.getComputedStyle = () => ({ getPropertyValue: (name) => name });
const text = (n) =>
  typeof n === "string" ? n : (n.textContent ?? "") + n.children.map(text).join("");
eval(page.split("<script>")[1].split("</script>")[0]);
setTimeout(() => {
  const shown = { tokens: nodes.tokens.children.map(text) };
  const look = (name) => (shown[name] = {
    chosen: text(nodes.chosen), rows: nodes.alternatives.tBodies[0].children.map(text),
    layer: text(nodes["layer-name"]), head: text(nodes["matrix-title"]),
    seen: nodes.tokens.children.filter((n) => n.set).map((n) => Number(n.set["--seen"])) });
  const press = (key) => keys.keydown({ key, preventDefault() {} });
  look("end");
  press("ArrowLeft"); press("ArrowDown"); press("]"); look("moved");
  press("Home"); press("ArrowLeft"); look("home");
  process.stdout.write(JSON.stringify(shown));
}, 300);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_the_script_shows_what_the_page_holds(hostile: Exploration) -> None:
    done = subprocess.run(
        ["node", "-e", DOCUMENT], input=hostile.page(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    last = len(hostile.ids) - 1
    assert [t for t in shown["tokens"] if t != "\n"] == [visible(t) for t in hostile.tokens]
    assert shown["end"]["chosen"].startswith(visible(hostile.tokens[last]))
    assert "rank 1" in shown["end"]["chosen"]
    assert len(shown["end"]["rows"]) == 4
    assert shown["end"]["layer"] == "mean of all 4"
    assert shown["end"]["head"].startswith("Head 0: slope 0.25, horizon 18.4 tokens")
    expected = np.sqrt(hostile.attentions[:, 0, last].mean(axis=0))
    np.testing.assert_allclose(shown["end"]["seen"], expected, atol=5e-3)
    moved = shown["moved"]
    assert moved["layer"] == "1 of 4"
    assert moved["head"].startswith("Head 1")
    expected = np.sqrt(hostile.attentions[0, 1, last - 1])
    np.testing.assert_allclose(moved["seen"], expected, atol=5e-3)
    assert shown["home"]["chosen"] == HOSTILE[0] + " begins the text: nothing foretold it"
    assert shown["home"]["rows"] == []


# -- files and the command -------------------------------------------------------------------------


def test_a_page_is_saved_and_replaces_pages_alone(found: Exploration, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    found.save(path)
    found.save(path)
    assert path.read_text("utf-8") == found.page()
    (tmp_path / "mine.html").write_text("<p>mine")
    with pytest.raises(OutputError, match="is there, and no page of bloomq explore: choose anoth"):
        found.save(tmp_path / "mine.html")
    with pytest.raises(OutputError, match="is not a regular file: choose another name"):
        found.save(tmp_path)
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        found.save(tmp_path / "no" / "page.html")
    with pytest.raises(OutputError, match="is no name of a file"):
        found.save("a\0b")
    with pytest.raises(UsageError, match="the name of a file is 5, expected text or a path"):
        found.save(5)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.html", "page.html"]


def command(*args: str) -> tuple[str, str]:
    done = CliRunner().invoke(commands, ["explore", *args])
    assert done.exception is None, done.exception
    return done.stdout, done.stderr


def test_the_terminal_gets_a_table() -> None:
    out, err = command("Once upon a time", "-n", "3", "--top", "2")
    lines = out.splitlines()
    assert lines[0] == "On"
    assert lines[5].startswith("-----")
    assert len(lines) == 5 + 1 + 3
    assert re.match(r"ce +0\.0\d\d  █ +ly +0\.17", lines[1])
    assert "\x1b" not in out
    assert "demo" in err


def test_machines_get_json() -> None:
    out, _ = command("Once upon", "-n", "2", "--top", "2", "--json", "-q")
    facts = json.loads(out)
    assert facts["tokens"][:2] == ["On", "ce"]
    assert facts["logprobs"][0] is None
    assert len(facts["alternatives"][-1]) == 2
    assert facts["prompt_tokens"] + 2 == len(facts["ids"])


def test_out_writes_the_page_and_nothing_else(tmp_path: Path) -> None:
    out, err = command("Once", "-n", "2", "-o", str(tmp_path / "p.html"))
    assert out == ""
    assert re.search(r"p.html: 4 tokens, \d+ kB\n", err)
    assert data_of((tmp_path / "p.html").read_text("utf-8"))["layers"] == 4


def test_the_commands_mistakes_are_errors_of_ours() -> None:
    done = CliRunner().invoke(commands, ["explore"], input="")
    assert isinstance(done.exception, UsageError)
    done = CliRunner().invoke(commands, ["explore", "a", "--temperature", "-1"])
    assert "temperature is -1.0" in str(done.exception)


def test_colours_are_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["bloomq.cli.explore"]  # of the package, the name is the command's
    monkeypatch.setattr(module, "colours_shown", lambda: True)
    done = CliRunner().invoke(commands, ["explore", "Once", "-n", "1"], color=True)
    assert "\x1b[38;5;166m\x1b[4mce\x1b[0m" in done.stdout
