"""Scores of given tokens: what the logits say, in any company, with beginnings run once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import written
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Tiny, pack

import bloomq
from bloomq import scoring
from bloomq.errors import NumericError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.scoring import Piece, Scores, score
from bloomq.sharing import Text, batches

TINY = Tiny(n_head=4, head_dim=16, vocab_size=211, seed=4)
TEXTS = [
    "Once upon a time there was a king who had three daughters.",
    "def add(a, b):\n    return a + b\n",
    "El rey",
    "Il était une fois un roi qui avait trois filles, et la plus jeune était la plus belle. " * 8,
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def tiny(base: Path) -> LanguageModel:
    return bloomq.load(pack(base, TINY, "f32"))


def rows_of(model: LanguageModel, texts: list[str] = TEXTS) -> list[list[int]]:
    return [model.prompt_ids(text) for text in texts]


def assert_same_bits(found: Scores, expected: Scores) -> None:
    for name in ("ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def count_tokens(monkeypatch: pytest.MonkeyPatch, model: LanguageModel) -> list[int]:
    """The number of tokens of each step from now on."""
    counts: list[int] = []
    step = model.head.step

    def counted(ids: Any, *rest: Any) -> Any:
        counts.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(model.head, "step", counted)
    return counts


# -- what scores are -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_scores_are_what_the_logits_of_a_forward_call_say(backend: str) -> None:
    model = bloomq.load(backend=backend)
    ids = rows_of(model)[0]
    (scores,) = score(model.head, [ids], top=3)
    wide = model(ids).logits[0, :-1].astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max()).sum(axis=1, keepdims=True)) - wide.max()
    at = np.arange(len(ids) - 1)
    np.testing.assert_allclose(scores.logprobs, expected[at, ids[1:]], atol=1e-5)
    order = np.argsort(-wide, axis=1, kind="stable")
    np.testing.assert_array_equal(scores.top_ids, order[:, :3])
    np.testing.assert_allclose(
        scores.top_logprobs, np.take_along_axis(expected, order[:, :3], 1), atol=1e-5
    )
    np.testing.assert_array_equal(scores.ranks, np.argmax(order == np.array(ids[1:])[:, None], 1))
    np.testing.assert_array_equal(scores.ids, ids[1:])


def test_generated_tokens_have_the_logprobs_that_they_were_generated_with(
    demo: LanguageModel,
) -> None:
    prompt = demo.prompt_ids("Once upon a time")
    written = demo.generate(prompt, max_new_tokens=30)
    (scores,) = score(demo.head, [[*prompt, *written.ids]], first=[len(prompt)])
    assert tuple(scores.logprobs) == written.logprobs
    assert scores.is_greedy
    assert scores.total == pytest.approx(sum(written.logprobs))
    assert scores.perplexity == pytest.approx(np.exp(-np.mean(written.logprobs)))
    other = [*prompt, *written.ids[:-1], (written.ids[-1] + 1) % 8192]
    assert not score(demo.head, [other], first=[len(prompt)])[0].is_greedy


def test_a_text_of_one_token_has_nothing_to_score(demo: LanguageModel) -> None:
    one, two = score(demo.head, [[5], [5, 6]], top=2)
    assert one.logprobs.shape == (0,) and one.top_ids.shape == (0, 2)
    assert one.total == 0.0 and np.isnan(one.perplexity) and one.is_greedy
    assert two.top_ids.shape == (1, 2)


def test_a_context_is_not_scored(demo: LanguageModel) -> None:
    ids = rows_of(demo)[3]
    whole, part, none = score(demo.head, [ids, ids, ids], first=[0, 150, len(ids)])
    np.testing.assert_array_equal(part.logprobs, whole.logprobs[149:])
    assert len(none.ids) == 0


def test_equal_logits_rank_by_their_id(tiny: LanguageModel) -> None:
    logits = np.array([[1.0, 2.0, 2.0, 0.0]] * 4, np.float32)
    piece = Piece(logits, tiny.backend.top(logits, 1), [])
    np.testing.assert_array_equal(scoring.ranks(piece, np.arange(4)), [2, 0, 1, 3])


# -- the same bits, however texts are cut and batched ----------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_a_batch_of_texts_has_the_bits_of_each_alone(
    demo: LanguageModel, batch_tokens: int
) -> None:
    rows = rows_of(demo)
    together = score(demo.head, rows, top=4, batch_tokens=batch_tokens)
    for row, found in zip(rows, together, strict=True):
        assert_same_bits(found, score(demo.head, [row], top=4)[0])


def test_pieces_of_another_size_have_the_same_bits(
    demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(demo.head, rows_of(demo), top=2)
    monkeypatch.setattr(scoring, "PIECE_TOKENS", 7)
    monkeypatch.setattr(type(demo.backend), "step_tokens", 20)
    for found, wanted in zip(score(demo.head, rows_of(demo), top=2), expected, strict=True):
        assert_same_bits(found, wanted)


def test_one_thread_scores_as_two_do(demo: LanguageModel) -> None:
    rows = rows_of(demo)
    one = bloomq.load(threads=1)
    for found, wanted in zip(score(one.head, rows), score(demo.head, rows), strict=True):
        assert_same_bits(found, wanted)


# -- beginnings that texts share -------------------------------------------------------------------


def test_continuations_of_one_context_run_it_once(
    demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = rows_of(demo)[3][:120]
    rows = [[*context, *end] for end in ([9, 10], [9], [11, 12, 13], [9, 10], [7])]
    first = [len(context)] * len(rows)
    expected = [score(demo.head, [row], first=[len(context)])[0] for row in rows]
    counts = count_tokens(monkeypatch, demo)
    for found, wanted in zip(score(demo.head, rows, first=first), expected, strict=True):
        assert_same_bits(found, wanted)
    assert sum(counts) == 119 + sum(len(row) - 120 for row in rows)


def test_a_family_larger_than_a_batch_keeps_its_beginning(
    demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = rows_of(demo)[3][:100]
    rows = [[*context, i, i + 1] for i in range(4, 24)]
    first = [len(context)] * len(rows)
    expected = score(demo.head, rows, first=first)
    counts = count_tokens(monkeypatch, demo)
    found = score(demo.head, rows, first=first, batch_tokens=300)
    for one, wanted in zip(found, expected, strict=True):
        assert_same_bits(one, wanted)
    assert sum(counts) == 99 + 2 * len(rows)


def test_examples_before_every_question_run_once(
    demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot: all begin alike, and the answers to one question begin alike further on."""
    shots, questions = list(range(100, 180)), [list(range(10, 40)), list(range(50, 90))]
    rows = [[*shots, *question, *end] for question in questions for end in ([1], [2, 3], [4])]
    first = [80 + len(question) for question in questions for _ in range(3)]
    expected = [score(demo.head, [r], first=[f])[0] for r, f in zip(rows, first, strict=True)]
    counts = count_tokens(monkeypatch, demo)
    for found, wanted in zip(score(demo.head, rows, first=first), expected, strict=True):
        assert_same_bits(found, wanted)
    assert sum(counts) == 80 + 30 + 40 - 2 + 2 * (1 + 2 + 1)


def test_a_context_that_is_a_whole_row_of_its_own_is_run_for_the_others(
    demo: LanguageModel,
) -> None:
    context = list(range(100, 140))
    rows, first = [context, [*context, 5, 6]], [40, 40]
    none, found = score(demo.head, rows, first=first)
    assert len(none.ids) == 0
    assert_same_bits(found, score(demo.head, [rows[1]], first=[40])[0])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch_tokens=st.sampled_from([64, 200, 1000]))
def test_any_company_leaves_the_bits_as_they_are(data: st.DataObject, batch_tokens: int) -> None:
    model = CACHE["tiny"]
    stem = list(range(10, 60))
    rows, first = [], []
    for _ in range(data.draw(st.integers(1, 7))):
        kept = data.draw(st.sampled_from([0, 5, 17, 30, 50]))
        end = data.draw(st.lists(st.integers(4, 20), min_size=0 if kept else 1, max_size=20))
        rows.append(stem[:kept] + end)
        first.append(data.draw(st.integers(0, len(rows[-1]))))
    found = score(model.head, rows, first=first, top=1, batch_tokens=batch_tokens)
    for row, start, one in zip(rows, first, found, strict=True):
        assert_same_bits(one, score(model.head, [row], first=[start], top=1)[0])


CACHE: dict[str, LanguageModel] = {}  # hypothesis takes no fixtures of a module


@pytest.fixture(scope="module", autouse=True)
def _kept(tiny: LanguageModel) -> None:
    CACHE["tiny"] = tiny


def test_batches_hold_no_more_than_their_tokens() -> None:
    rng = np.random.default_rng(0)
    texts = [Text(i, rng.integers(0, 9, n), 1) for i, n in enumerate(rng.integers(1, 200, 60))]
    made = list(batches(texts, 512))
    assert sorted(text.index for batch in made for text in batch.texts) == list(range(60))
    assert all(batch.rows * -(-batch.longest // 64) * 64 <= 512 for batch in made)
    assert all(len(batch.texts) <= batch.rows for batch in made)


# -- adapters --------------------------------------------------------------------------------------


def test_texts_of_different_adapters_share_no_beginning(
    base: Path, tiny: LanguageModel, tmp_path: Path
) -> None:
    model = bloomq.load(pack(base, TINY, "f32"))
    model.load_adapter(written(tmp_path / "one", hidden_size=64), "one")
    rows = [[*range(10, 60), 7, 8]] * 2
    gates = model.head.adapters.gates([None, "one"], 2)
    plain, adapted = score(model.head, rows, first=[50, 50], gates=gates)
    assert_same_bits(plain, score(tiny.head, rows[:1], first=[50])[0])
    (alone,) = score(model.head, rows[:1], first=[50], gates=model.head.adapters.gates("one", 1))
    assert_same_bits(adapted, alone)
    assert plain.total != adapted.total


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([[]], {}, "text 1 has no tokens to score: leave it out"),
        ([[4], ["a"]], {}, "text 2 is no list of token ids: tokenize texts before"),
        (
            [[4], [4, 211]],
            {},
            "text 2 has the token id 211, expected 0 to 210: use this model's tokenizer",
        ),
        (
            [[4, -1]],
            {},
            "text 1 has the token id -1, expected 0 to 210: use this model's tokenizer",
        ),
        ([[4, 5]], {"first": [3]}, "text 1 is scored from token 3, expected 0 to 2"),
        ([[4, 5]], {"first": [-1]}, "text 1 is scored from token -1, expected 0 to 2"),
        ([[4, 5]], {"top": 212}, "top is 212, expected 0 to 211 alternatives"),
        ([[4, 5]], {"top": True}, "top is True, expected 0 to 211 alternatives"),
        ([[4, 5]], {"batch_tokens": 0}, "batch_tokens is 0, expected 1 token or more"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    tiny: LanguageModel, rows: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=f"^{says}$"):
        score(tiny.head, rows, **options)


def test_logits_that_are_no_numbers_name_the_layer(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tiny.head.step

    def bad(*args: Any) -> Any:
        return tiny.backend.numpy(step(*args)) * np.float32(np.nan)

    monkeypatch.setattr(tiny.head, "step", bad)
    with pytest.raises(NumericError, match=r"^NaN or infinity after ln_f or the head: "):
        score(tiny.head, [[4, 5, 6]])
