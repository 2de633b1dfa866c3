"""A pack beside its checkpoint: every figure against plain NumPy, the page that stays inert, and
what cannot be compared."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bloomq.converters.convert import convert
from click.testing import CliRunner

import bloomq
from bloomq.cli import commands
from bloomq.cli.compare import write_report
from bloomq.comparison import Report, check_target, compare, sample, words
from bloomq.comparison import outputs as summing
from bloomq.comparison import weights as measuring
from bloomq.comparison.drawing import escaped, linear, logarithmic
from bloomq.comparison.labels import Labels
from bloomq.comparison.outputs import Outputs
from bloomq.comparison.places import read
from bloomq.comparison.sides import PackSide, open_side
from bloomq.errors import InputNotFound, NumericError, OutputError, PackError, UsageError
from bloomq.pack import Pack
from bloomq.perplexity import perplexity
from bloomq.schemes import bf16_to_f32

TEXTS = {
    "en": "The old man sat by the window and watched the rain fall over the quiet street. " * 6,
    "py": "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n" * 4,
}
WINDOW = 60


@pytest.fixture(scope="module")
def report(pack_of: Callable[..., Path], demo_checkpoint: Path) -> Report:
    """The demo's int4 pack beside its checkpoint."""
    return compare(pack_of("int4"), demo_checkpoint, texts=TEXTS, tokens=130, window=WINDOW)


def foreign(checkpoint: Path, name: str) -> np.ndarray:
    """A tensor of a safetensors file with bf16 values, as float32, read by hand."""
    data = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    start, stop = (8 + length + at for at in entry["data_offsets"])
    return bf16_to_f32(np.frombuffer(data[start:stop], np.uint16)).reshape(entry["shape"])


# -- weights ---------------------------------------------------------------------------------------


def test_a_matrix_is_measured_as_plain_numpy_does(
    report: Report, pack_of: Callable[..., Path], demo_checkpoint: Path
) -> None:
    found = next(tensor for tensor in report.tensors if tensor.name == "h.1.mlp.down")
    w = foreign(demo_checkpoint, "h.1.mlp.dense_4h_to_h.weight").astype(np.float64)
    coded = Pack.open(pack_of("int4")).matrix("h.1.mlp.down").dequantize().astype(np.float64)
    error = w - coded
    assert found.shape == w.shape and found.layer == 1 and found.kind == "mlp.down"
    assert (found.stored, found.original, found.bits) == ("int4-g32", "bf16", 4.5)
    relative = np.square(error).sum() / np.square(w).sum()
    assert found.relative_error == pytest.approx(relative, rel=1e-6)
    assert found.snr_db == pytest.approx(-10 * math.log10(relative), abs=1e-6)
    assert found.max_error == pytest.approx(np.abs(error).max(), rel=1e-5)
    rms = math.sqrt(np.square(w).mean())
    assert found.rms == pytest.approx(rms, rel=1e-9)
    assert found.largest == pytest.approx(np.abs(w).max() / rms, rel=1e-6)
    assert found.kurtosis == pytest.approx((w**4).mean() / rms**4, rel=1e-9)
    low, high = ((np.abs(w) > 6 * rms * factor).mean() for factor in (1.01, 0.99))
    assert low <= found.beyond <= high
    for worst, axis in ((found.worst_rows, 1), (found.worst_columns, 0)):
        each = np.square(error).sum(axis=axis) / np.square(w).sum(axis=axis)
        assert [i for i, _ in worst] == np.argsort(-each)[:3].tolist()
        np.testing.assert_allclose([e for _, e in worst], np.sort(each)[::-1][:3], rtol=1e-6)
    assert not found.folded


def test_every_matrix_is_there_and_the_parts_are_the_whole(report: Report) -> None:
    assert [t.name for t in report.tensors[:3]] == ["wte", "h.0.attn.qkv", "h.0.attn.out"]
    assert len(report.tensors) == 1 + 4 * 4
    assert sum(part.nbytes for part in report.parts) == report.pack.nbytes
    assert sum(part.original_bytes for part in report.parts) == report.original.nbytes
    assert report.pack.bits_per_weight == pytest.approx(5.27, abs=0.01)
    assert [part.name for part in report.parts] == [
        "embedding", "attention", "mlp", "norms and biases"
    ]  # fmt: skip


def test_threads_and_blocks_change_no_figure(
    pack_of: Callable[..., Path], demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_of("int8")
    one = compare(pack, demo_checkpoint, weights_only=True, threads=1)
    assert compare(pack, demo_checkpoint, weights_only=True, threads=3).tensors == one.tensors
    monkeypatch.setattr(measuring, "_BLOCK_WEIGHTS", 1 << 14)
    small = compare(pack, demo_checkpoint, weights_only=True, threads=2)
    for a, b in zip(one.tensors, small.tensors, strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-12)
        assert (a.max_error, a.beyond, a.worst_rows) == (b.max_error, b.beyond, b.worst_rows)


def test_no_more_rows_are_read_at_a_time_than_a_block(
    pack_of: Callable[..., Path], demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    rows = PackSide.rows

    def counted(self: PackSide, name: str, start: int, stop: int) -> Any:
        asked.append((stop - start) * self.pack.matrix(name).shape[1])
        return rows(self, name, start, stop)

    monkeypatch.setattr(PackSide, "rows", counted)
    monkeypatch.setattr(measuring, "_BLOCK_WEIGHTS", 1 << 15)
    compare(pack_of("int4"), demo_checkpoint, weights_only=True, threads=2)
    assert max(asked) <= 1 << 15


@pytest.mark.parametrize("scheme", ["bf16", "f32"])
def test_an_exact_pack_has_no_error(
    pack_of: Callable[..., Path], demo_checkpoint: Path, scheme: str
) -> None:
    found = compare(pack_of(scheme), demo_checkpoint, texts=TEXTS, tokens=40)
    assert {tensor.relative_error for tensor in found.tensors} == {0.0}
    assert found.tensors[0].snr_db == math.inf
    assert found.verdict == "Practically the original"
    assert isinstance(found.outputs, Outputs)
    assert found.outputs.total.same_top == 1.0
    assert found.outputs.ties.places == 0
    assert found.page()


def test_a_scale_moved_into_the_norm_is_no_error(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    factors = np.exp2(np.arange(64) % 5 - 2).astype(np.float32)  # exact in float32

    def fold(tensors: dict[str, Any]) -> None:
        layer = "transformer.h.0."
        for norm, matrix in (
            ("input_layernorm", "self_attention.query_key_value"),
            ("post_attention_layernorm", "mlp.dense_h_to_4h"),
        ):
            tensors[f"{layer}{matrix}.weight"][1][:] *= factors
            for leaf in ("weight", "bias"):
                tensors[f"{layer}{norm}.{leaf}"][1][:] /= factors

    plain = tiny_checkpoint(tmp_path / "plain")
    convert(tiny_checkpoint(tmp_path / "folded", edit=fold), tmp_path / "pack", scheme="f32")
    found = compare(tmp_path / "pack", plain, tokens=40, backend="reference")
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert by_name["h.0.attn.qkv"].folded and by_name["h.0.mlp.up"].folded
    assert not by_name["h.0.attn.out"].folded
    assert max(tensor.relative_error for tensor in found.tensors) < 1e-12
    notes = "\n".join(found.notes)
    assert "norms or biases that are not the original's: h.0.ln_1.weight, h.0.ln_1.bias" in notes
    assert "and 1 more" in notes
    assert "the pack was not made from this checkpoint as it is now" in notes
    assert isinstance(found.outputs, Outputs)
    assert found.outputs.total.kl < 1e-6


def test_the_histogram_is_in_steps_of_the_grid(
    report: Report, pack_of: Callable[..., Path], demo_checkpoint: Path
) -> None:
    found = report.tensors[1].histogram
    assert (found.unit, found.levels) == ("step", tuple(map(float, range(-8, 8))))
    assert sum(found.counts) + found.beyond == found.weights == math.prod(report.tensors[1].shape)
    int8 = compare(pack_of("int8"), demo_checkpoint, weights_only=True).tensors[1].histogram
    assert int8.levels == () and int8.limit == pytest.approx(127 * 1.16)
    plain = compare(pack_of("bf16"), demo_checkpoint, weights_only=True).tensors[1].histogram
    assert plain.unit == "rms"


@pytest.mark.parametrize("scheme", ["int8", "int6", "nl4", "int4", "nf4", "f16"])
def test_odd_shapes_and_rows_of_zeros_are_measured(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["transformer.word_embeddings.weight"][1][5:40] = 0
        tensors["transformer.h.0.mlp.dense_h_to_4h.weight"][1][:] = 0

    source = tiny_checkpoint(tmp_path / "c", vocab_size=71, hidden_size=48, edit=edit)
    convert(source, tmp_path / "pack", scheme=scheme)
    found = compare(tmp_path / "pack", source, weights_only=True)
    zero = next(tensor for tensor in found.tensors if tensor.name == "h.0.mlp.up")
    assert (zero.relative_error, zero.largest, zero.kurtosis, zero.worst_rows) == (0, 0, 0, ())
    assert 0 < found.tensors[0].relative_error < 0.02
    assert found.page()


# -- predictions -----------------------------------------------------------------------------------


def test_predictions_are_those_of_perplexity(report: Report, pack_of: Callable[..., Path]) -> None:
    model, base = bloomq.load(pack_of("int4")), bloomq.load(pack_of("bf16"))
    assert isinstance(report.outputs, Outputs)
    for (_name, text), found in zip(TEXTS.items(), report.outputs.texts, strict=True):
        expected = perplexity(model, text, window=WINDOW, base=base, most_tokens=130)
        other = expected.comparison
        assert other is not None
        assert (found.places, found.windows) == (expected.tokens, expected.windows)
        for value, wanted in (
            (found.perplexity, expected.perplexity), (found.interval, expected.interval),
            (found.base_perplexity, other.base_perplexity), (found.change, other.change),
            (found.change_interval, other.change_interval), (found.kl, other.kl),
            (found.kl_standard_error, other.kl_standard_error), (found.kl_most, other.kl_most),
            (found.same_top, other.same_top), (found.same_best, other.same_best),
        ):  # fmt: skip
            assert value == pytest.approx(wanted, rel=1e-9)
        assert found.kl_quantiles == pytest.approx(other.kl_quantiles)
    total = report.outputs.total
    assert total.places == sum(text.places for text in report.outputs.texts)


def test_places_are_the_logits_own(pack_of: Callable[..., Path]) -> None:
    model, base = bloomq.load(pack_of("int4")), bloomq.load(pack_of("bf16"))
    ids = model.prompt_ids(TEXTS["en"])[:50]
    found = read(model.head, base.head, "en", ids, 50)
    q, p = (np.asarray(m([ids]).logits[0, :-1], np.float64) for m in (model, base))
    order = np.argsort(-p, axis=1)
    assert found.base_best.tolist() == order[:, 0].tolist()
    assert found.best.tolist() == q.argmax(axis=1).tolist()
    ours, theirs = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (q, p))
    np.testing.assert_allclose(found.base_confidence, np.exp(theirs.max(axis=1)), rtol=1e-4)
    np.testing.assert_allclose(found.confidence, np.exp(ours.max(axis=1)), rtol=1e-4)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    np.testing.assert_allclose(found.kl, kl, atol=1e-5)
    rows = np.arange(len(p))
    np.testing.assert_allclose(found.gap, p[rows, order[:, 0]] - p[rows, order[:, 1]], atol=1e-4)
    assert found.second.tolist() == (q.argmax(axis=1) == order[:, 1]).tolist()
    five = [len({*a[:5]} & {*b[:5]}) for a, b in zip(order, np.argsort(-q, axis=1), strict=True)]
    assert found.common[:, 0].tolist() == five


def test_bins_are_tenths() -> None:
    found = summing.binned(np.array([0.05, 0.0, 1.0, 0.95]), np.array([True, False, True, True]))
    assert (found[0].places, found[0].mean, found[0].share) == (2, 0.025, 0.5)
    assert (found[9].places, found[9].share) == (2, 1.0)
    assert math.isnan(found[4].share)
    off = summing.calibration(np.array([0.5, 0.9]), np.array([False, True]))
    assert off.error == pytest.approx((0.5 + 0.1) / 2)


def test_another_pack_may_be_the_original(pack_of: Callable[..., Path]) -> None:
    found = compare(pack_of("int4"), pack_of("int8"), texts=TEXTS, tokens=40)
    assert (found.original.kind, found.tensors[1].original) == ("pack", "int8")
    assert found.notes == ()
    assert "int4" in repr(found)


def test_the_sample_is_used_where_no_text_is_given(
    pack_of: Callable[..., Path], demo_checkpoint: Path
) -> None:
    found = compare(pack_of("int8"), demo_checkpoint, tokens=12)
    assert isinstance(found.outputs, Outputs)
    assert [text.name for text in found.outputs.texts] == list(sample())
    assert len(sample()) == 10


def test_without_a_tokenizer_ids_are_drawn(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "c")
    convert(source, tmp_path / "pack", scheme="int8")
    found = compare(tmp_path / "pack", source, tokens=40, backend="reference")
    assert isinstance(found.outputs, Outputs)
    assert "of token ids drawn at random" in found.headline
    assert "Perplexity" not in re.findall(r"<h2>([^<]*)", found.page())
    with pytest.raises(UsageError, match="has no tokenizer, so no text can be compared on"):
        compare(tmp_path / "pack", source, texts=TEXTS)


@pytest.mark.parametrize(
    ("architecture", "head", "columns", "labelled"),
    [
        ("BloomForSequenceClassification", "score", 3, True),
        ("BloomForTokenClassification", "classifier", 3, True),
        ("BloomForQuestionAnswering", "qa_outputs", 2, False),
    ],
)
def test_a_classifier_is_compared_by_its_results(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, architecture: str, head: str,
    columns: int, labelled: bool,
) -> None:  # fmt: skip
    def edit(tensors: dict[str, Any]) -> None:
        rng = np.random.default_rng(1)
        tensors[f"{head}.weight"] = ("F32", rng.standard_normal((columns, 64)).astype(np.float32))
        if head != "score":
            tensors[f"{head}.bias"] = ("F32", np.zeros(columns, np.float32))

    config = {"architectures": [architecture], "num_labels": columns}
    source = tiny_checkpoint(tmp_path / "c", config=config, edit=edit)
    convert(source, tmp_path / "pack", scheme="int8")
    found = compare(tmp_path / "pack", source, tokens=30, backend="reference")
    assert isinstance(found.outputs, Labels)
    assert found.outputs.relative_error < 0.01
    assert found.outputs.places == (1 if head == "score" else 30)
    assert (found.outputs.same_label is not None) == labelled
    assert found.parts[-2].name == "classifier"
    assert found.page()
    done = command(tmp_path / "pack", source, "-q", "--backend", "reference")
    assert done.exit_code == 0 and "results' error" in done.stdout


# -- words -----------------------------------------------------------------------------------------


def test_a_verdict_is_in_words(report: Report) -> None:
    assert report.verdict in ("Very close to the original", "Close to the original")
    assert re.match(
        r"The top token is the same at \d\d\.\d % of \d+ places; perpl", report.headline
    )
    weights = replace(report, outputs=None)
    assert weights.verdict == "Close to the original"
    assert weights.headline.startswith("17 matrices; the worst, ")


def test_figures_are_written_for_people() -> None:
    assert [words.percent(x) for x in (0.976, 0.9996, 1.0, 0.0, math.nan)] == [
        "97.6 %", "99.96 %", "100 %", "0 %", "–"
    ]  # fmt: skip
    assert words.signed(-1.5) == "−1.50"
    assert [words.small(x) for x in (0.00213, 3.1e-6, 0.0, math.inf)] == [
        "0.00213", "3.1e-6", "0", "∞"
    ]  # fmt: skip
    assert [words.size(x) for x in (12, 5e3, 3.5e6, 7e9)] == ["12 B", "5 kB", "3.5 MB", "7.00 GB"]


def test_axes_end_at_round_numbers() -> None:
    assert [label for _, label in linear([7.3]).ticks] == ["0", "2", "4", "6", "8"]
    assert linear([]).high == 1.0 and linear([math.inf, 1600.0]).ticks[-1][1] == "2,000"
    axis = logarithmic([1e-5, 1e-2])
    assert axis.place(0.0) == 0.0 and axis.place(math.inf) == 1.0
    assert "0.001" in [label for _, label in axis.ticks]


# -- the page --------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\u202eabc\x00\x1b\n\ud83d<!--"


class Page(HTMLParser):
    """A page's elements, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.open: list[str] = []
        self.held: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))
        if tag != "meta":
            self.open.append(f"{tag}#{dict(attrs)['id']}" if "id" in dict(attrs) else tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split("#")[0] == tag

    def handle_data(self, data: str) -> None:
        at = self.open[-1] if self.open else ""
        self.held[at] = self.held.get(at, "") + data


@pytest.fixture(scope="module")
def hostile(report: Report) -> Report:
    """The report with everything that comes from files attacking the page."""
    assert isinstance(report.outputs, Outputs)
    model = replace(report.pack, name=HOSTILE, path=HOSTILE, provenance=dict(
        dict.fromkeys(report.pack.provenance, HOSTILE)))  # fmt: skip
    place = replace(report.outputs.worst[0], before=HOSTILE, came=HOSTILE, best=HOSTILE,
                    base_best=HOSTILE, text=HOSTILE)  # fmt: skip
    texts = tuple(replace(text, name=HOSTILE) for text in report.outputs.texts)
    found = replace(report.outputs, texts=texts, worst=(place,) * len(report.outputs.worst))
    rows = dict.fromkeys(report.row_names, HOSTILE)
    return replace(report, pack=model, outputs=found, row_names=rows)


def test_a_page_is_whole_html_that_asks_for_nothing(report: Report) -> None:
    text = report.page()
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not {"src", "href", "onclick", "onload", "style"} & set(attributes), tag
    assert not re.findall(r"https?:|url\(|@import|innerHTML|eval\(", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        digest = base64.b64encode(sha256(page.held[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]
    assert "nan" not in re.sub(r"<s(cript|tyle).*?</s", "", text, flags=re.S).lower().split()


def test_plots_have_words_for_those_who_do_not_see_them(report: Report) -> None:
    for drawing in re.findall(r"<svg[^>]*>", report.page()):
        assert 'aria-hidden="true"' in drawing or re.search(r'aria-label="[^"]{15,}', drawing)


def test_hostile_names_and_tokens_stay_data(hostile: Report, report: Report) -> None:
    page = hostile.page()
    page.encode()
    assert Page(page).tags == Page(report.page()).tags
    raw = Page(page).held["script#data"]
    assert raw.isascii() and not set("<>&\x00\x1b\n") & set(raw)
    assert not set("\x00\x1b\u202e\ud83d") & set(page)
    assert escaped(HOSTILE) in page
    many = replace(report.pack, provenance={f"k{i}": "v" * 9999 for i in range(9999)})
    assert len(replace(report, pack=many).page()) < len(report.page()) + 50_000


def test_what_cannot_be_seen_is_spelled_out() -> None:
    assert escaped("a<b>&\n\x1b") == "a&lt;b&gt;&amp;↵\\u{1b}"


DOCUMENT = r"""
const page = require("fs").readFileSync(0, "utf8"), nodes = {};
class Element {
  children = []; attributes = {}; heard = {}; cells = []; rows = [];
  append(...all) { this.children.push(...all); this.rows = all; }
  replaceChildren() { this.children = []; }
  setAttribute(k, v) { this.attributes[k] = v; }
  getAttribute(k) { return this.attributes[k]; }
  addEventListener(k, f) { this.heard[k] = f; }
}
const cell = (value) => Object.assign(new Element(), { attributes: { "data-value": value } });
for (const [, id] of page.matchAll(/id="([^"]+)"/g)) nodes[id] = new Element();
nodes.data.textContent = page.split('id="data">')[1].split("</script>")[0];
const body = page.split('id="tensors">')[1].split("<tbody>")[1].split("</tbody>")[0];
const rows = body.split("</tr>").slice(0, -1).map((row) => Object.assign(new Element(), {
  cells: [...row.matchAll(/data-value="([^"]*)"/g)].map(([, value]) => cell(value)) }));
const heads = rows[0].cells.map(() => new Element());
nodes.tensors.tBodies = [Object.assign(new Element(), { rows })];
nodes.tensors.tHead = { rows: [{ cells: heads }] };
globalThis.document = {
  getElementById: (id) => nodes[id], createElement: () => new Element() };
eval(page.split("<script>")[1].split("</script>")[0]);
const errorOf = (row) => row.cells[4].attributes["data-value"];
const order = () => nodes.tensors.tBodies[0].rows.map(errorOf);
heads[4].heard.click(); const down = order();
heads[4].heard.click(); const up = order();
rows[3].heard.click();
process.stdout.write(JSON.stringify({ down, up, chosen: nodes.chosen.value,
  caption: nodes.caption.textContent, facts: nodes.facts.children.map((n) => n.textContent),
  area: nodes.area.attributes.d, sort: heads[4].attributes["aria-sort"] }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script")
def test_the_script_sorts_and_shows_a_matrix(hostile: Report) -> None:
    done = subprocess.run(
        ["node", "-e", DOCUMENT], input=hostile.page(), capture_output=True, timeout=60,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    errors = sorted(tensor.relative_error for tensor in hostile.tensors)
    np.testing.assert_allclose([float(e) for e in shown["up"]], errors, rtol=1e-6)
    assert shown["down"] == shown["up"][::-1] and shown["sort"] == "ascending"
    assert "4.50 bits a weight" in "".join(shown["facts"])
    assert shown["chosen"] == "3" and shown["caption"].startswith("16 levels")
    assert shown["area"].startswith("M12 168V")


# -- the command, and what cannot be compared ------------------------------------------------------


def command(*args: object) -> Any:
    return CliRunner().invoke(commands, ["compare", *map(str, args)])


def test_the_command_prints_lines_and_writes_a_page(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "en.txt").write_text(TEXTS["en"])
    page = tmp_path / "report.html"
    args = (pack_of("int4"), demo_checkpoint, "--text", tmp_path, "--tokens", 60, "--report", page)
    done = command(*args)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith(("Very close to the original. ", "Close to the original. "))
    assert any(re.match(r"KL +0\.\d+ nats a token, 99 % of places below", x) for x in lines)
    assert re.match(r"h\.\d\.\S+ +int4-g32 +0\.00\d+ +2\d\.\d dB", lines[-1])
    assert page.read_text("utf-8").startswith("<!doctype html>\n<!-- bloomq compare -->")
    again = command(*args, "--json", "-q")  # an earlier page is replaced
    facts = json.loads(again.stdout)
    assert again.stderr == ""
    assert facts["outputs"]["texts"][0]["name"] == "en"
    assert facts["tensors"][0]["name"] == "wte" and "histogram" not in facts["tensors"][0]
    assert facts["headline"] in done.stdout


def test_a_conversion_writes_its_report(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = tmp_path / "report.html"
    write_report(pack_of("int8"), demo_checkpoint, page, tokens=12)
    assert "report.html: " in capsys.readouterr().err
    assert "bloomq compare" in page.read_text("utf-8")


def test_weights_alone_are_compared_without_a_run(
    pack_of: Callable[..., Path], demo_checkpoint: Path
) -> None:
    done = command(pack_of("bf16"), demo_checkpoint, "--weights-only", "--json")
    facts = json.loads(done.stdout)
    assert facts["outputs"] is None and facts["tensors"][0]["snr_db"] is None
    wrong = command(pack_of("bf16"), demo_checkpoint, "--weights-only", "--tokens", "9")
    assert isinstance(wrong.exception, UsageError)
    assert "--weights-only and options of texts" in str(wrong.exception)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 2}, "n_layer is 1, there 2"),
        ({"vocab_size": 64}, "vocab_size is 96, there 64"),
        ({"hidden_size": 32, "n_head": 2}, "hidden_size is 64, there 32; n_head is 4, there 2"),
    ],
)
def test_two_models_are_told_apart(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, config: dict[str, int], message: str
) -> None:
    convert(tiny_checkpoint(tmp_path / "a"), tmp_path / "pack", scheme="int8")
    other = tiny_checkpoint(tmp_path / "b", **config)
    with pytest.raises(UsageError, match="is of another model than") as error:
        compare(tmp_path / "pack", other)
    assert message in str(error.value)


def test_damage_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def break_it(tensors: dict[str, Any]) -> None:
        tensors["transformer.h.0.mlp.dense_h_to_4h.weight"][1][3, 3] = np.nan

    convert(tiny_checkpoint(tmp_path / "a"), tmp_path / "pack", scheme="int8")
    broken = tiny_checkpoint(tmp_path / "b", edit=break_it)
    with pytest.raises(NumericError, match=r"h\.0\.mlp\.up holds NaN or infinity, which no error"):
        compare(tmp_path / "pack", broken)


def test_what_is_missing_is_named(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputNotFound, match="no such pack"):
        compare(tmp_path / "none", demo_checkpoint)
    with pytest.raises(PackError, match="not a pack"):
        compare(demo_checkpoint, demo_checkpoint)
    with pytest.raises(InputNotFound, match="no such file or folder"):
        compare(pack_of("int8"), tmp_path / "none")
    assert isinstance(open_side(pack_of("int8")), PackSide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1}, "tokens is 1, expected 2 or more to compare predictions on"),
        ({"window": 1.5}, "window is 1.5, expected 2 or more"),
        ({"threads": 0}, "threads is 0, expected 1 or more to compare with"),
        ({"texts": {}}, "no texts to compare on: give one, or None for the sample"),
        ({"texts": {"a": ""}}, "a: the text has 0 tokens, expected 2 or more"),
        ({"texts": {"a": "a"}}, "a: the text has 1 token, expected 2 or more"),
    ],
)
def test_options_that_cannot_be_are_named(
    pack_of: Callable[..., Path], demo_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compare(pack_of("int8"), demo_checkpoint, **options)


def test_lines_without_text_cannot_be_classified(
    tiny_checkpoint: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["score.weight"] = ("F32", np.ones((2, 64), np.float32))

    config = {"architectures": ["BloomForSequenceClassification"], "num_labels": 2}
    source = tiny_checkpoint(tmp_path / "c", vocab_size=8192, config=config, edit=edit)
    shutil.copy(demo_checkpoint / "tokenizer.json", source)
    convert(source, tmp_path / "pack", scheme="int8")
    with pytest.raises(UsageError, match="the texts have no line to classify: give others"):
        compare(tmp_path / "pack", source, texts={"a": "\n \n"})
    found = compare(tmp_path / "pack", source, texts={"a": "One line.\n\nTwo."}, tokens=2).outputs
    assert isinstance(found, Labels) and found.lines == 1


def test_texts_that_cannot_be_are_named(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    def error(text: Path) -> str:
        done = command(pack_of("int8"), demo_checkpoint, "--text", text)
        assert done.exception is not None
        return str(done.exception)

    assert "no such file" in error(tmp_path / "none.txt")
    assert "there is no .txt in this folder" in error(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert "is empty, expected a text to compare on" in error(tmp_path / "a.txt")


def test_a_page_replaces_pages_alone_and_is_refused_early(
    report: Report, pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    report.save(tmp_path / "page.html")
    report.save(tmp_path / "page.html")
    (tmp_path / "mine.html").write_text("<p>mine")
    with pytest.raises(OutputError, match="is there, and no page of bloomq compare"):
        check_target(tmp_path / "mine.html")
    with pytest.raises(OutputError, match=r"there is no folder .* to write the page to: make it"):
        check_target(tmp_path / "no" / "page.html")
    with pytest.raises(OutputError, match="is not a regular file: choose another name for the"):
        check_target(tmp_path)
    done = command(pack_of("int8"), demo_checkpoint, "--report", tmp_path / "mine.html")
    assert isinstance(done.exception, OutputError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.html", "page.html"]


def test_a_folder_without_rights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bloomq.comparison.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="no right to write a page into"):
        check_target(tmp_path / "page.html")


def test_a_full_temporary_folder_is_named_with_its_remedy(
    pack_of: Callable[..., Path], demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, free = pack_of("int8"), shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("bloomq.pack_writer.shutil.disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"MB, 0\.0 MB are free: .* the original runs from there"):
        compare(pack, demo_checkpoint, tokens=8)


def test_other_tokens_are_noted(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(demo_checkpoint, tmp_path / "other")
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    found = compare(pack_of("int8"), other, weights_only=True)
    assert "the tokenizers differ: both models are given the tokens of the pack's" in found.notes


def test_ctrl_c_leaves_nothing(
    pack_of: Callable[..., Path], demo_checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import tempfile

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("bloomq.comparison.running.read", interrupt)
    done = command(pack_of("int8"), demo_checkpoint, "--report", tmp_path / "page.html")
    assert done.exit_code != 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["tmp"]
