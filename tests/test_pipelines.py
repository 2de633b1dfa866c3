"""Texts in, labels, tags, answers and vectors out: against transformers, and against the models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import written
from conftest import write_checkpoint
from heads import assemble, heldout
from hypothesis import given
from hypothesis import strategies as st

import bloomq
from bloomq.encoding import Tokens
from bloomq.errors import BloomqError, NumericError, PackError, TokenizerError, UsageError
from bloomq.heads import Head
from bloomq.pipelines import Answerer, Classifier, Embedder, Label, Tag, Tagger
from bloomq.pipelines.answerer import Spans, Window, best_answers, spans_of
from bloomq.pipelines.batches import plan
from bloomq.pipelines.tagger import _tags

DEMO = Path(__file__).parent / "data" / "bloom-demo"
TEXTS = [
    "Il était une fois, dans un pays très lointain",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 9,
    "¿Quién lo vio? Nadie.",
    "😂 生活的真谛是什么？",
]
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint("token")`: a fine-tuned one, put together once."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            made[name] = assemble(name, tmp_path_factory.mktemp("heads") / name)
        return made[name]

    return build


@pytest.fixture(scope="module")
def classifier(checkpoint: Checkpoint) -> Classifier:
    return Classifier.load(checkpoint("sequence"))


@pytest.fixture(scope="module")
def tagger(checkpoint: Checkpoint) -> Tagger:
    return Tagger.load(checkpoint("token"))


@pytest.fixture(scope="module")
def answerer(checkpoint: Checkpoint) -> Answerer:
    return Answerer.load(checkpoint("question"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(DEMO)


def tiny(folder: Path, labels: int = 3, gain: float = 1.0, **config: Any) -> Path:
    """A random sequence classifier with the demo's tokenizer."""
    rng = np.random.default_rng(1)
    score = (gain * rng.uniform(-1, 1, (labels, 32))).astype(np.float32)
    names = {str(i): f"L{i}" for i in range(labels)}
    raw = {"architectures": ["BloomForSequenceClassification"], "id2label": names, **config}
    write_checkpoint(
        folder, hidden_size=32, vocab_size=8192, config=raw,
        edit=lambda tensors: tensors.update({"score.weight": ("F32", score)}),
    )  # fmt: skip
    shutil.copy(DEMO / "tokenizer.json", folder)
    return folder


def fails(error: type[BloomqError], message: str, action: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        action()
    assert str(caught.value) == message


# -- batches ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 900), max_size=60), st.integers(1, 3000))
def test_batches_hold_every_row_once_within_their_tokens(lengths: list[int], most: int) -> None:
    batches = list(plan(lengths, most))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (-(-lengths[batch[-1]] // 64) * 64) <= most


@pytest.mark.parametrize("batch_tokens", [1, 64, 130, 600, 5000])
def test_scores_have_the_same_bits_in_any_batch(classifier: Classifier, batch_tokens: int) -> None:
    alone = np.concatenate([classifier.scores([text]) for text in TEXTS])
    np.testing.assert_array_equal(classifier.scores(TEXTS, batch_tokens=batch_tokens), alone)
    backwards = classifier.scores(TEXTS[::-1], batch_tokens=batch_tokens)
    np.testing.assert_array_equal(backwards[::-1], alone)


def test_no_texts_have_no_results(
    classifier: Classifier, tagger: Tagger, answerer: Answerer, embedder: Embedder
) -> None:
    assert classifier.classify([]) == tagger.tag([]) == answerer.answer([], []) == []
    assert embedder.embed([]).shape == (0, 256)


def test_a_batch_of_no_tokens_is_refused(classifier: Classifier) -> None:
    for wrong in (0, -5, 1.5, True):
        message = f"batch_tokens is {wrong!r}, expected 1 or more"
        fails(UsageError, message, lambda w=wrong: classifier.scores(["a"], batch_tokens=w))


def test_a_result_that_is_not_finite_is_reported_and_not_returned(tmp_path: Path) -> None:
    wild = Classifier.load(tiny(tmp_path / "wild", gain=1e38))
    with pytest.raises(NumericError, match="NaN or infinity after ln_f or the head"):
        wild.classify(["a b c"])


# -- classes ---------------------------------------------------------------------------------------


def test_held_out_texts_get_their_labels(classifier: Classifier) -> None:
    records = heldout("sequence")[::3]
    found = classifier.classify([record["text"] for record in records])
    right = [labels[0].label == r["label"] for labels, r in zip(found, records, strict=True)]
    assert np.mean(right) > 0.9


def test_scores_equal_transformers_pipeline(classifier: Classifier, checkpoint: Checkpoint) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.pipeline(
        "text-classification", str(checkpoint("sequence")), top_k=None, dtype="float32",
        device="cpu",
    )  # fmt: skip
    for ours, theirs in zip(classifier.classify(TEXTS, top_k=None), oracle(TEXTS), strict=True):
        expected = {one["label"]: one["score"] for one in theirs}
        assert {one.label: one.score for one in ours} == pytest.approx(expected, abs=2e-4)
        assert [one.label for one in ours[:2]] == [one["label"] for one in theirs[:2]]


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", 3),
        ("multi_label_classification", 3),
        ("regression", 1),
        ("regression", 3),
        (None, 3),
        (None, 1),
    ],
)
def test_each_kind_of_problem_has_the_scores_of_transformers(
    tmp_path: Path, problem: str | None, labels: int
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny(tmp_path / "model", labels, problem_type=problem)
    oracle = transformers.pipeline("text-classification", str(folder), top_k=None, device="cpu")
    found = Classifier.load(folder).classify(TEXTS, top_k=None)
    for ours, theirs in zip(found, oracle(TEXTS), strict=True):
        expected = {one["label"]: one["score"] for one in theirs}
        assert {one.label: one.score for one in ours} == pytest.approx(expected, abs=1e-4)


def test_top_k_and_threshold_choose_among_the_classes(classifier: Classifier) -> None:
    every = classifier.classify(TEXTS, top_k=None)
    assert classifier.classify(TEXTS, top_k=3) == [labels[:3] for labels in every]
    assert classifier.classify(TEXTS) == [labels[:1] for labels in every]
    least = every[1][0].score  # of one letter, uncertain
    found = classifier.classify(TEXTS, top_k=None, threshold=least)
    assert found == [[one for one in labels if one.score >= least] for labels in every]
    assert classifier.classify(TEXTS[:1], threshold=1.1) == [[]]
    assert isinstance(every[0][0], Label) and abs(sum(o.score for o in every[0]) - 1) < 1e-9


def test_padding_at_the_end_of_a_text_is_not_what_is_classified(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", pad_token_id=3, problem_type="regression")
    classifier = Classifier.load(folder)
    texts = ["a b<pad>", "a b", "<pad>", "<pad><pad>", "a<pad>b"]
    scores = classifier.scores(texts)
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[2], scores[3])
    model: Any = classifier.model
    rows = classifier.tokenizer(texts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(scores.astype(np.float32), model(**rows).logits)


def test_a_text_of_several_steps_equals_the_models_own_call(embedder: Embedder) -> None:
    text = TEXTS[2] * 12
    assert len(embedder.tokenizer.encode(text)) > 1100
    model: Any = embedder.model
    hidden = model(embedder.tokenizer.encode(text)).last_hidden_state[0]
    np.testing.assert_array_equal(embedder.embed([text, "a"], pooling="last")[0], hidden[-1])
    mean = embedder.embed(["a", text])[1]
    np.testing.assert_allclose(mean, hidden.mean(axis=0), rtol=1e-5, atol=1e-5)


# -- tags ------------------------------------------------------------------------------------------


def test_held_out_texts_get_their_tags(tagger: Tagger) -> None:
    records = heldout("token")[::3]
    right = total = 0
    for record, tags in zip(records, tagger.tag([r["text"] for r in records]), strict=True):
        for start, end, label in record["spans"]:
            inside = [t for t in tags if t.label == label]
            right += sum(max(0, min(end, t.end) - max(start, t.start)) for t in inside)
            total += end - start
    assert right / total > 0.8


@pytest.mark.parametrize("merge", [True, False])
def test_tags_equal_transformers_pipeline(
    tagger: Tagger, checkpoint: Checkpoint, merge: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.pipeline(
        "token-classification", str(checkpoint("token")), dtype="float32", device="cpu",
        aggregation_strategy="simple" if merge else "none",
    )  # fmt: skip
    for record in heldout("token")[:25]:
        text = record["text"]
        theirs = [
            (one["entity_group" if merge else "entity"], text[one["start"] : one["end"]].strip(),
             float(one["score"]))
            for one in oracle(text)
        ]  # fmt: skip
        theirs = [one for one in theirs if one[1]]
        ours = [(one.label, one.text, one.score) for one in tagger.tag([text], merge=merge)[0]]
        assert [one[:2] for one in ours] == [one[:2] for one in theirs]
        assert [o[2] for o in ours] == pytest.approx([o[2] for o in theirs], abs=1e-3)


def tags_of(pieces: list[str], labels: list[str], *, merge: bool = True) -> list[Tag]:
    """Tags of tokens that are sure of their labels."""
    text, offsets, names = "".join(pieces), [], sorted(set(labels))
    for piece in pieces:
        start = offsets[-1][1] if offsets else 0
        offsets.append((start, start + len(piece)))
    logits = np.array([[50.0 * (name == label) for name in names] for label in labels], np.float32)
    return _tags(text, Tokens([0] * len(pieces), offsets), logits, names, merge, {"O"})


def test_neighbours_of_a_class_are_one_tag_without_the_space_before() -> None:
    pieces = ["Hi", " Ann", "e", " and", " Bo", "b", "."]
    found = tags_of(pieces, ["O", "PER", "PER", "O", "PER", "PER", "O"])
    assert [(t.label, t.start, t.end, t.text) for t in found] == [
        ("PER", 3, 7, "Anne"), ("PER", 12, 15, "Bob"),
    ]  # fmt: skip
    assert found[0].score == pytest.approx(1)
    alone = tags_of(pieces, ["O", "PER", "PER", "O", "PER", "PER", "O"], merge=False)
    assert [t.text for t in alone] == ["Ann", "e", "Bo", "b"]


def test_b_begins_a_tag_and_i_continues_one_of_its_class() -> None:
    labels = ["B-PER", "I-PER", "B-PER", "I-LOC", "I-LOC", "O", "I-PER", "I-PER", "B-LOC"]
    found = tags_of([" a", " b", " c", " d", " e", " f", " g", " h", " i"], labels)
    assert [(t.label, t.text) for t in found] == [
        ("PER", "a b"), ("PER", "c"), ("LOC", "d e"), ("PER", "g h"), ("LOC", "i"),
    ]  # fmt: skip
    each = tags_of([" a", " b"], ["B-PER", "I-PER"], merge=False)
    assert [t.label for t in each] == ["B-PER", "I-PER"]


def test_white_space_is_no_tag() -> None:
    assert tags_of([" ", "\n", " a"], ["X", "X", "O"]) == []
    assert [t.text for t in tags_of([" ", "\n", " a"], ["X", "X", "X"])] == ["a"]


def test_a_tag_covers_characters_of_several_tokens(tagger: Tagger) -> None:
    text = "𓀀 𓀀𓀀"  # each has four tokens of a byte
    for tags in (tagger.tag([text])[0], tagger.tag([text], merge=False)[0]):
        assert tags and all(tag.text == text[tag.start : tag.end] for tag in tags)


def test_a_threshold_and_classes_outside_leave_tags_out(tagger: Tagger) -> None:
    text = heldout("token")[0]["text"]
    every = tagger.tag([text])[0]
    least = sorted(tag.score for tag in every)[-1]
    assert tagger.tag([text], threshold=least)[0] == [t for t in every if t.score >= least]
    label = every[0].label
    rest = tagger.tag([text], outside=[label])[0]
    assert rest == [tag for tag in every if tag.label != label]


# -- answers ---------------------------------------------------------------------------------------


def test_held_out_questions_get_their_answers(answerer: Answerer) -> None:
    records = heldout("question")[::3]
    found = answerer.answer([r["question"] for r in records], [r["context"] for r in records])
    for record, (best,) in zip(records, found, strict=True):
        assert best.text == record["context"][best.start : best.end]
    exact = [
        (best.start, best.end) == (record["start"], record["end"])
        for record, (best,) in zip(records, found, strict=True)
    ]
    assert np.mean(exact) > 0.5


def test_answers_are_the_best_spans_by_transformers_logits(
    answerer: Answerer, checkpoint: Checkpoint
) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.BloomForQuestionAnswering.from_pretrained(
        checkpoint("question"), dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("question"))
    for record in heldout("question")[:12]:
        both = record["question"], record["context"]
        encoded = tokenizer(*both, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        skip = len(tokenizer(record["question"])["input_ids"])
        with torch.no_grad():
            out = model(**encoded)
        starts, ends = (x[0, skip:].numpy() for x in (out.start_logits, out.end_logits))
        expected = brute_force(record["context"], offsets[skip:], starts, ends, 64)
        found = answerer.answer([both[0]], [both[1]], top_k=3)[0]
        assert [(a.start, a.end) for a in found][:1] == [span for span, _ in expected][:1]
        scores = [score for _, score in expected[:3]]
        assert [a.score for a in found] == pytest.approx(scores, abs=1e-3)


def brute_force(
    context: str, offsets: list[Any], starts: Any, ends: Any, most: int
) -> list[tuple[tuple[int, int], float]]:
    """Each piece of the context with its probability, best first."""
    weights: dict[tuple[int, int], float] = {}
    for i in range(len(starts)):
        for j in range(i, min(i + most, len(starts))):
            start, end = offsets[i][0], offsets[j][1]
            piece = context[start:end]
            start, end = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
            if start < end:
                weight = float(np.exp(np.float64(starts[i]) + np.float64(ends[j])))
                weights[start, end] = weights.get((start, end), 0) + weight
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda item: -item[1])
    return [(span, weight / total) for span, weight in ranked]


@given(st.integers(0, 2**32), st.integers(1, 9))
def test_spans_are_those_of_the_definition(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [
        ["a", " b", " ", "\n", "  ", " cd"][i] for i in rng.integers(0, 6, rng.integers(1, 9))
    ]
    context = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    logits = rng.standard_normal((2 + len(pieces), 2)).astype(np.float32)
    window = Window(0, [0] * len(logits), 2, offsets)
    found = best_answers(context, [spans_of(context, window, logits, most)], 100)
    expected = brute_force(context, offsets, *logits[2:].T, most)
    assert len(found) == len(expected)
    scores = {(answer.start, answer.end): answer.score for answer in found}
    assert scores == pytest.approx(dict(expected), rel=1e-6)
    assert [a.score for a in found] == sorted((a.score for a in found), reverse=True)
    assert all(a.text == context[a.start : a.end] == a.text.strip() for a in found)


def test_a_piece_that_two_windows_offer_counts_once_with_both_weights() -> None:
    spans = Spans(np.array([0, 2]), np.array([1, 3]), np.log([3.0, 1.0]))
    again = Spans(np.array([2, 4]), np.array([3, 5]), np.log([4.0, 2.0]))
    found = best_answers("a b c", [spans, again], 3)
    assert [(a.text, round(a.score, 6)) for a in found] == [("b", 0.5), ("a", 0.3), ("c", 0.2)]


def test_windows_cover_a_long_context_and_overlap(answerer: Answerer) -> None:
    context = " ".join(f"word{i}" for i in range(120))
    (pair,) = answerer.pairs(["why?"], [context], window_tokens=50, overlap=10)
    windows = pair.windows
    whole = answerer.tokenizer.encode(context)
    question = answerer.tokenizer.encode("why?")
    room = 50 - len(question)
    assert len(windows) > 5
    for before, window in zip([None, *windows], windows, strict=False):
        assert window.ids[: window.skip] == question
        assert window.ids[window.skip :] == whole[window.first : window.first + room]
        if before is not None:
            assert before.first + room - window.first == 10
    assert windows[-1].first + room >= len(whole)
    assert len(windows[-1].ids) - window.skip > 10


def test_an_answer_is_found_wherever_it_stands_in_a_long_context(answerer: Answerer) -> None:
    record = next(
        r for r in heldout("question")
        if answerer.answer([r["question"]], [r["context"]])[0][0].text == r["answer"]
    )  # fmt: skip
    lines = [r["context"] for r in heldout("question")[20:32]]
    others = [line for line in lines if f"{record['question'][:-1]}:" not in line]
    context = "\n".join([*others[:4], record["context"], *others[4:]])
    options: dict[str, Any] = {"window_tokens": 160, "overlap": 100, "top_k": 8}
    (pair,) = answerer.pairs([record["question"]], [context], window_tokens=160)
    assert len(pair.windows) > 2
    found = answerer.answer([record["question"]], [context], **options)[0]
    assert record["answer"] in [a.text for a in found]
    assert all(a.text == context[a.start : a.end] for a in found)


def test_a_separator_stands_between_question_and_context(answerer: Answerer) -> None:
    lined = Answerer(answerer.model, answerer.tokenizer, separator="\n")
    ((window,),) = (pair.windows for pair in lined.pairs(["why?"], ["because"]))
    assert window.ids[: window.skip] == answerer.tokenizer.encode("why?\n")


def test_answers_are_short_and_sure_enough(answerer: Answerer) -> None:
    record = next(r for r in heldout("question") if r["context"].isascii())
    ask = ([record["question"]], [record["context"]])
    (tokens,) = answerer.tokenizer.encode_with_offsets(ask[1])
    for most in (1, 3):
        (found,) = answerer.answer(*ask, top_k=9, max_answer_tokens=most)
        for one in found:
            inside = [a < one.end and b > one.start for a, b in tokens.offsets]
            assert 1 <= sum(inside) <= most
    (found,) = answerer.answer(*ask, top_k=9)
    least = found[1].score
    assert answerer.answer(*ask, top_k=9, threshold=least)[0] == found[:2]
    assert answerer.answer(["why?"], [" \n "]) == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0, expected a whole number from 1"),
        ({"max_answer_tokens": 0}, "max_answer_tokens is 0, expected a whole number from 1"),
        ({"window_tokens": 1}, "window_tokens is 1, expected 2 or more"),
        ({"window_tokens": 9, "overlap": 9}, "overlap is 9, expected 0 to 8 tokens"),
        ({"overlap": -1}, "overlap is -1, expected 0 to 511 tokens"),
        (
            {"window_tokens": 8, "overlap": 7},
            "pair 0: a question of 3 tokens leaves too few of 8 to its context: raise "
            "window_tokens or lower overlap",
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(
    answerer: Answerer, options: dict[str, Any], message: str
) -> None:
    assert len(answerer.tokenizer.encode("why?")) == 3
    fails(UsageError, message, lambda: answerer.answer(["why?"], ["because"], **options))


def test_a_question_without_its_context_is_refused(answerer: Answerer) -> None:
    message = "1 questions, and 2 contexts for them"
    fails(UsageError, message, lambda: answerer.answer(["why?"], ["a", "b"]))
    for pair, what in (("", "a"), "question"), (("why?", ""), "context"):
        message = f"pair 0: the {what}: has no tokens: leave empty texts out"
        fails(UsageError, message, lambda p=pair: answerer.answer([p[0]], [p[1]]))


# -- vectors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_vectors_pool_the_hidden_states(embedder: Embedder, pooling: Any) -> None:
    vectors = embedder.embed(TEXTS, pooling=pooling)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 256)
    model: Any = embedder.model
    for text, vector in zip(TEXTS, vectors, strict=True):
        hidden = model(embedder.tokenizer.encode(text)).last_hidden_state[0]
        pool = {"mean": hidden.mean(axis=0), "last": hidden[-1], "max": hidden.max(axis=0)}
        np.testing.assert_array_equal(vector, pool[pooling])


def test_normalized_vectors_have_length_one(embedder: Embedder) -> None:
    plain, unit = embedder.embed(TEXTS), embedder.embed(TEXTS, normalize=True)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, plain / lengths, rtol=1e-6)
    assert unit.dtype == np.float32


def test_a_pack_of_any_head_gives_vectors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("sequence", "token", "question"):
        bloomq.convert(checkpoint(name), tmp_path / name, scheme="int8")
        assert bloomq.Embedder.load(tmp_path / name).embed(["a b"]).shape == (1, 256)


def test_an_unknown_pooling_is_refused(embedder: Embedder) -> None:
    wrong: Any = "min"
    message = "pooling is 'min', expected mean, last or max"
    fails(UsageError, message, lambda: embedder.embed(["a"], pooling=wrong))


# -- loading and limits ----------------------------------------------------------------------------


def test_the_classes_are_exported() -> None:
    found = (bloomq.Answerer, bloomq.Classifier, bloomq.Embedder, bloomq.Tagger)
    assert found == (Answerer, Classifier, Embedder, Tagger)


def test_a_quantized_classifier_finds_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    records = heldout("sequence")[::10]
    for scheme in ("int8", "int4"):
        small = Classifier.load(
            checkpoint("sequence"), scheme=scheme, save_pack=tmp_path / scheme, threads=1,
            backend="numba", cache_dtype="f16",
        )  # fmt: skip
        found = small.classify([record["text"] for record in records])
        right = [labels[0].label == r["label"] for labels, r in zip(found, records, strict=True)]
        assert np.mean(right) > 0.9
        assert Classifier.load(tmp_path / scheme).model.pack.path == tmp_path / scheme


def test_every_pipeline_runs_on_the_reference_backend(checkpoint: Checkpoint) -> None:
    text = heldout("token")[0]["text"]
    for load, name in ((Classifier.load, "sequence"), (Tagger.load, "token")):
        loaded: Any = load(checkpoint(name), backend="reference")
        fast: Any = load(checkpoint(name), backend="numba")
        if name == "sequence":
            np.testing.assert_allclose(loaded.scores([text]), fast.scores([text]), atol=1e-4)
        else:
            assert [t.text for t in loaded.tag([text])[0]] == [t.text for t in fast.tag([text])[0]]


def test_another_head_is_named() -> None:
    message = (
        "this model has the head of BloomForCausalLM, not of BloomForSequenceClassification: "
        "load it as bloomq.BloomForCausalLM"
    )
    fails(UsageError, message, lambda: Classifier.load(DEMO))


def test_a_pack_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    bloomq.convert(folder, tmp_path / "pack")
    message = (
        f"{tmp_path / 'pack'}: has no tokenizer: convert a checkpoint that has a tokenizer.json"
    )
    fails(PackError, message, lambda: Classifier.load(tmp_path / "pack"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", vocab_size=96)
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "model")
    bloomq.convert(tmp_path / "model", tmp_path / "pack")
    message = (
        f"{tmp_path / 'pack' / 'tokenizer.json'}: 8192 tokens, the model has 96: "
        "it belongs to another model"
    )
    fails(TokenizerError, message, lambda: Embedder.load(tmp_path / "pack"))


def test_texts_that_are_too_long_are_refused_or_cut(classifier: Classifier) -> None:
    texts = ["short", "one two three four five six"]
    count = len(classifier.tokenizer.encode(texts[1]))
    message = f"text 1: has {count} tokens, expected 4 at most: truncate it, or raise max_tokens"
    fails(UsageError, message, lambda: classifier.classify(texts, max_tokens=4))
    cut = classifier.scores(texts, max_tokens=4, truncate=True)
    start = classifier.tokenizer.decode(classifier.tokenizer.encode(texts[1])[:4])
    np.testing.assert_array_equal(cut[1], classifier.scores([start])[0])
    np.testing.assert_array_equal(cut[0], classifier.scores(texts)[0])


def test_the_limit_is_what_the_model_was_trained_on(tmp_path: Path) -> None:
    small = Classifier.load(tiny(tmp_path / "model", seq_length=5))
    with pytest.raises(UsageError, match=r"text 0: has \d+ tokens, expected 5 at most"):
        small.classify(["one two three four five six seven eight"])
    assert small.classify(["one two three four five six seven eight"], max_tokens=99)


def test_limits_and_texts_that_cannot_be_are_refused(
    classifier: Classifier, tagger: Tagger, embedder: Embedder
) -> None:
    empty = "text 1: has no tokens: leave empty texts out"
    runs: list[Callable[..., object]] = [classifier.classify, tagger.tag, embedder.embed]
    for call in runs:
        fails(UsageError, empty, lambda c=call: c(["a", ""]))
        fails(
            UsageError, "max_tokens is 0, expected 1 or more", lambda c=call: c(["a"], max_tokens=0)
        )
        fails(UsageError, "texts: expected a list of str, found str", lambda c=call: c("a"))
    for wrong in (0, -1, 1.5):
        message = f"top_k is {wrong!r}, expected None, or 1 or more classes"
        fails(UsageError, message, lambda w=wrong: classifier.classify(["a"], top_k=w))


def test_what_is_no_number_is_no_threshold(
    classifier: Classifier, tagger: Tagger, answerer: Answerer
) -> None:
    runs: list[Callable[..., object]] = [
        lambda **o: classifier.classify(["a"], **o),
        lambda **o: tagger.tag(["a"], **o),
        lambda **o: answerer.answer(["a"], ["b"], **o),
    ]
    for call in runs:
        for wrong in ("x", float("nan"), float("inf"), 10**400, True, [0.5]):
            message = f"threshold is {wrong!r:.80}, expected None or a number"
            fails(UsageError, message, lambda c=call, w=wrong: c(threshold=w))
        call(threshold=np.float32(0.5))


def test_classes_outside_are_names(tagger: Tagger) -> None:
    for wrong in (None, [[]], "O", [1]):
        message = f"outside is {wrong!r}, expected a list of names of classes"
        options: Any = {"outside": wrong}
        fails(UsageError, message, lambda o=options: tagger.tag(["a"], **o))
    assert tagger.tag(["a"], outside={"O"}) == tagger.tag(["a"])


def test_questions_contexts_and_separators_are_texts(answerer: Answerer) -> None:
    wrong: Any = (one for one in ["why?"])
    message = "questions are generator, expected a list of texts"
    fails(UsageError, message, lambda: answerer.answer(wrong, ["a"]))
    wrong = [None]
    message = "questions: number 0 is NoneType, expected text"
    fails(UsageError, message, lambda: answerer.answer(wrong, ["a"]))
    message = "contexts are str, expected a list of texts"
    fails(UsageError, message, lambda: answerer.answer(["a"], "a"))
    wrong = None
    message = "separator is None, expected text"
    fails(
        UsageError, message,
        lambda: Answerer(answerer.model, answerer.tokenizer, separator=wrong),
    )  # fmt: skip


def test_texts_that_were_read_before_have_the_same_results(
    classifier: Classifier, tagger: Tagger, embedder: Embedder
) -> None:
    options: dict[str, Any] = {"max_tokens": 9, "truncate": True}
    runs: list[tuple[Any, Callable[..., Any]]] = [
        (classifier, classifier.classify), (tagger, tagger.tag), (embedder, embedder.embed),
    ]  # fmt: skip
    for pipeline, call in runs:
        read = pipeline.read(TEXTS, **options)
        assert [len(text.tokens.ids) for text in read] == [9, 1, 9, 8, 9]
        np.testing.assert_equal(call(read), call(TEXTS, **options))
    message = "line 7: has no tokens: leave empty texts out"
    fails(UsageError, message, lambda: classifier.read([""], names=["line 7"]))


# -- adapters --------------------------------------------------------------------------------------


def test_an_adapter_changes_every_text_and_goes_again(tmp_path: Path) -> None:
    classifier = Classifier.load(tiny(tmp_path / "model"))
    before = classifier.scores(TEXTS)
    classifier.model.load_adapter(written(tmp_path / "lora", layers=1), "mine")
    np.testing.assert_array_equal(classifier.scores(TEXTS), before)
    for batch_tokens in (64, 2048):
        found = classifier.scores(TEXTS, adapters="mine", batch_tokens=batch_tokens)
        assert (found != before).any(axis=1).all()
        for text, scores in zip(TEXTS, found, strict=True):
            model: Any = classifier.model
            logits = model(classifier.tokenizer.encode(text), adapters="mine").logits[0]
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(scores, weights / weights.sum(), rtol=1e-5)
    half = classifier.classify(TEXTS, top_k=None, adapters={"mine": 0.5})
    assert half != classifier.classify(TEXTS, top_k=None, adapters="mine")
    wrong: Any = ["mine"]
    message = "adapters is a list, expected one choice, which all texts share"
    fails(UsageError, message, lambda: classifier.scores(["a"], adapters=wrong))


def test_every_pipeline_takes_an_adapter(
    checkpoint: Checkpoint, tmp_path: Path, embedder: Embedder
) -> None:
    folder = written(tmp_path / "lora", hidden_size=256, layers=embedder.model.config.n_layer)
    tagger, answerer = Tagger.load(checkpoint("token")), Answerer.load(checkpoint("question"))
    mine = Embedder.load(DEMO)
    for pipeline in (tagger, answerer, mine):
        pipeline.model.load_adapter(folder, "a")
    text = heldout("token")[0]["text"]
    runs: list[Callable[..., Any]] = [
        lambda **o: tagger.tag([text], **o),
        lambda **o: answerer.answer(["why?"], [text], **o),
        lambda **o: mine.embed([text], **o).tolist(),
    ]
    for call in runs:
        assert call(adapters="a") != call()


def test_a_cache_is_as_large_as_the_texts_need(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, whole = [], Head.cache

    def cache(head: Head, batch: int, capacity: int) -> Any:
        shapes.append((batch, capacity))
        return whole(head, batch, capacity)

    monkeypatch.setattr(Head, "cache", cache)
    classifier.classify(["a"], batch_tokens=10**12)
    classifier.classify(["a"] * 5, batch_tokens=64 * 3)
    assert shapes == [(1, 1), (3, 1)]
