"""Perplexity in windows against transformers' recipe, divergence against torch's, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import DEMO, Tiny, pack

import bloomq
from bloomq import perplexity as measuring
from bloomq.divergence import divergence
from bloomq.errors import PackError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.perplexity import Measurement, perplexity
from bloomq.scoring import score
from bloomq.windows import gptq_text, mean_of_windows, plan

TEXT = (
    "The old man sat by the window and watched the rain fall over the quiet street below him. "
    "Il était une fois un roi qui avait trois filles.\n\n"
    "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n"
) * 6
WINDOW = 60


@pytest.fixture(scope="module")
def model(pack_of: Callable[..., Path]) -> LanguageModel:
    return bloomq.load(pack_of("f32"), cache_dtype="f32")


@pytest.fixture(scope="module")
def int4(pack_of: Callable[..., Path]) -> LanguageModel:
    return bloomq.load(pack_of("int4"))


@pytest.fixture(scope="module")
def ids(model: LanguageModel) -> list[int]:
    return model.prompt_ids(TEXT)


# -- against transformers and torch ----------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield transformers.BloomForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    torch.set_num_threads(before)


def recipe(theirs: Any, ids: list[int], window: int, stride: int) -> tuple[float, list[float]]:
    """The perplexity by the recipe of transformers' "Perplexity of fixed-length models", and each
    window's loss."""
    import torch

    encoded = torch.tensor([ids])
    total, count, before, losses = 0.0, 0, 0, []
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = encoded[:, begin:end].clone()
        labels[:, : before - begin] = -100
        loss = theirs(encoded[:, begin:end], labels=labels).loss.double().item()
        counted = int((labels != -100).sum()) - 1  # as they do, though behind the first window the
        total += loss * counted  # label that the shift loses is one that is masked anyway
        count += counted
        losses.append(loss)
        before = end
        if end == len(ids):
            break
    return math.exp(total / count), losses


def test_fixed_windows_give_the_perplexity_of_transformers_recipe(
    model: LanguageModel, theirs: Any, ids: list[int]
) -> None:
    expected, losses = recipe(theirs, ids, WINDOW, WINDOW)
    found = perplexity(model, TEXT, window=WINDOW)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.windows == len(losses) == -(-len(ids) // WINDOW)
    assert found.tokens == len(ids) - found.windows


def test_sliding_windows_have_the_losses_of_transformers_recipe(
    model: LanguageModel, theirs: Any, ids: list[int]
) -> None:
    stride = 20
    whole, losses = recipe(theirs, ids, WINDOW, stride)
    counts = [first_count(window) for window in plan(len(ids), WINDOW, stride, "sliding")]
    found = perplexity(model, ids, protocol="sliding", window=WINDOW, stride=stride)
    expected = math.exp(np.average(losses, weights=counts))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(whole, rel=1e-2)  # they count one too few in each
    assert found.tokens == len(ids) - 1


def first_count(window: tuple[int, int, int]) -> int:
    begin, end, first = window
    return end - begin - first


def test_the_gptq_protocol_is_the_published_code(
    model: LanguageModel, theirs: Any, ids: list[int]
) -> None:
    """As IST-DASLab/gptq's bloom_eval: the mean of whole windows' mean losses."""
    import torch

    samples, losses = len(ids) // WINDOW, []
    for i in range(samples):
        window = torch.tensor([ids[i * WINDOW : (i + 1) * WINDOW]])
        logits = theirs(window).logits[0, :-1]
        losses.append(torch.nn.CrossEntropyLoss()(logits, window[0, 1:]).item() * WINDOW)
    expected = math.exp(sum(losses) / (samples * WINDOW))
    found = perplexity(model, ids, protocol="gptq", window=WINDOW)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.windows, found.tokens) == (samples, samples * (WINDOW - 1))


def test_the_divergence_from_another_pack_is_torchs(
    model: LanguageModel, int4: LanguageModel, ids: list[int]
) -> None:
    torch = pytest.importorskip("torch")
    found = perplexity(int4, ids, window=WINDOW, base=model, most_tokens=2 * WINDOW).comparison
    assert found is not None
    kl, same, common = [], [], []
    for begin in (0, WINDOW):
        window = ids[begin : begin + WINDOW]
        p, q = (
            torch.from_numpy(m(window).logits[0, :-1]).double().log_softmax(1)
            for m in (model, int4)
        )
        kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1))
        same.append(p.argmax(1) == q.argmax(1))
        best = p.topk(10).indices, q.topk(10).indices
        common += [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(*best, strict=True)]
    wide = torch.cat(kl).numpy()
    assert found.kl == pytest.approx(wide.mean(), abs=1e-7)
    assert found.kl_most == pytest.approx(wide.max(), abs=1e-6)
    quantiles = {"50%": 0.5, "90%": 0.9, "99%": 0.99, "99.9%": 0.999}
    for name, q in quantiles.items():
        assert found.kl_quantiles[name] == pytest.approx(np.quantile(wide, q), abs=1e-6)
    assert found.same_top == pytest.approx(torch.cat(same).double().mean().item())
    assert found.same_best == pytest.approx(np.mean(common))
    assert 0.0 < found.kl < 0.05 and 0.8 < found.same_top < 1.0 and 0.8 < found.same_best < 1.0


# -- what the figures mean -------------------------------------------------------------------------


def test_a_pack_does_not_diverge_from_itself(model: LanguageModel, ids: list[int]) -> None:
    found = perplexity(model, ids, window=WINDOW, base=model)
    against = found.comparison
    assert against is not None
    assert (against.kl, against.kl_most, against.change) == (0.0, 0.0, 0.0)
    assert (against.same_top, against.same_best) == (1.0, 1.0)
    assert against.base_perplexity == found.perplexity and against.change_interval == (0.0, 0.0)


def test_the_change_is_that_of_two_measurements(
    model: LanguageModel, int4: LanguageModel, ids: list[int]
) -> None:
    found = perplexity(int4, ids, window=WINDOW, base=model)
    alone, base = (perplexity(m, ids, window=WINDOW) for m in (int4, model))
    against = found.comparison
    assert against is not None
    assert found.perplexity == alone.perplexity and found.interval == alone.interval
    assert against.base_perplexity == pytest.approx(base.perplexity, rel=1e-12)
    assert against.change == pytest.approx(alone.perplexity / base.perplexity - 1, rel=1e-9)
    low, high = against.change_interval
    assert low < against.change < high  # windows in pairs: far narrower than each one's
    assert high - low < (alone.interval[1] - alone.interval[0]) / alone.perplexity / 5


def test_the_loss_is_that_of_scores(model: LanguageModel, ids: list[int]) -> None:
    rows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    scores = score(model.head, rows)
    found = perplexity(model, ids, window=WINDOW)
    tokens = sum(len(one.ids) for one in scores)
    assert found.nll == pytest.approx(-sum(one.total for one in scores) / tokens, rel=1e-12)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    whole = len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * len(ids) / whole)


def test_the_standard_error_is_that_of_equal_windows_means() -> None:
    sums, counts = np.array([10.0, 14.0, 9.0, 15.0]), np.array([5, 5, 5, 5])
    mean, error = mean_of_windows(sums, counts)
    assert mean == pytest.approx(np.mean(sums / 5))
    assert error == pytest.approx(np.std(sums / 5, ddof=1) / 2)
    assert math.isnan(mean_of_windows(sums[:1], counts[:1])[1])


def test_the_interval_holds_the_truth_about_95_times_of_100() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        counts = rng.integers(20, 60, 40)
        sums = np.array([rng.normal(3.0, 1.0, n).sum() + n * rng.normal(0, 0.3) for n in counts])
        mean, error = mean_of_windows(sums, counts)
        hits += abs(mean - 3.0) < measuring.NORMAL_95 * error
    assert 360 <= hits <= 396


def test_one_window_has_no_interval(model: LanguageModel) -> None:
    found = perplexity(model, "Once upon a time there was a king.")
    assert math.isnan(found.standard_error) and math.isnan(found.interval[0])
    assert found.windows == found.windows_in_all == 1
    assert found.window == model.context == 2048


def test_a_token_is_scored_in_one_window_alone() -> None:
    for stride in (1, 3, 7, 9):
        seen: list[int] = []
        for begin, end, first in plan(100, 10, stride, "sliding"):
            assert begin + first >= 1 and 1 <= first < end - begin <= 10
            seen += range(begin + first, end)
        assert seen == list(range(1, 100))
    assert plan(21, 10, 10, "fixed") == [
        (0, 10, 1),
        (10, 20, 1),
    ]  # a last one with nothing to score
    assert plan(22, 10, 10, "fixed")[-1] == (20, 22, 1)
    assert plan(29, 10, 10, "gptq") == [(0, 10, 1), (10, 20, 1)]


def test_sliding_by_whole_windows_is_side_by_side(model: LanguageModel, ids: list[int]) -> None:
    assert plan(22, 10, 10, "sliding") == plan(22, 10, 10, "fixed")
    fixed = perplexity(model, ids, window=WINDOW)
    found = perplexity(model, ids, window=WINDOW, stride=WINDOW, protocol="sliding")
    assert (found.nll, found.tokens, found.windows) == (fixed.nll, fixed.tokens, fixed.windows)


def test_the_gptq_text_is_the_data_sets_lines_joined() -> None:
    raw = " \n = Title = \n \n First . \r\n Second . \n"
    lines = ["", " = Title = \n", "", " First . \n", " Second . \n"]  # as the loader gives them
    assert gptq_text(raw) == "\n\n".join(lines)


def test_a_part_of_the_logits_that_is_nothing_adds_nothing() -> None:
    base = np.zeros(40_000, np.float32)
    base[20_000:] = -np.float32(3e38)
    model = base.copy()
    assert divergence(base, model) == 0.0
    model[:10_000] = -1.0
    p = np.full(20_000, 1 / 20_000)
    q = np.exp(model[:20_000].astype(np.float64))
    expected = (p * np.log(p / (q / q.sum()))).sum()
    assert divergence(base, model) == pytest.approx(expected, abs=1e-6)


def test_a_loss_beyond_every_number_is_an_infinite_perplexity(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "token_logprobs", lambda piece, ids: np.full(len(ids), -800.0))
    assert perplexity(model, "Once upon a time there was a king.").perplexity == math.inf


# -- interrupted -----------------------------------------------------------------------------------


def test_ctrl_c_gives_what_the_finished_windows_say(model: LanguageModel, ids: list[int]) -> None:
    seen = []

    def stop(read: int, total: int, so_far: Any) -> None:
        seen.append(so_far)
        if read > 2.5 * WINDOW:
            raise KeyboardInterrupt

    found = perplexity(model, ids, window=WINDOW, progress=stop)
    assert (found.windows, found.windows_in_all) == (2, -(-len(ids) // WINDOW))
    expected = perplexity(model, ids, window=WINDOW, most_tokens=2 * WINDOW)
    assert (found.nll, found.interval) == (expected.nll, expected.interval)
    assert seen[0] is None and seen[-1].windows == 2


def test_ctrl_c_before_the_first_window_is_ctrl_c(model: LanguageModel, ids: list[int]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perplexity(model, ids, window=WINDOW, progress=stop)


def test_a_measurement_goes_on_where_it_was_left(model: LanguageModel, ids: list[int]) -> None:
    measurement = Measurement(model, ids, window=WINDOW)
    for _ in measurement:
        if measurement.windows_done == 1:
            break
    for _ in measurement:
        pass
    assert measurement.result == perplexity(model, ids, window=WINDOW)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", {}, "the text has 0 tokens, expected 2 or more: the first is context"),
        ([5], {}, "the text has 1 token, expected 2 or more: the first is context"),
        ([5] * 40, {"protocol": "gptq"},
         "the text has 40 tokens, expected a whole window of 2048: set a smaller one"),
        ([5, 6], {"window": 1}, "window is 1, expected 2 to 2048 tokens: load with a larger "
         "context for longer ones"),
        ([5, 6], {"window": 2049}, "window is 2049, expected 2 to 2048 tokens"),
        ([5, 6], {"stride": 5}, "stride is 5 with fixed windows, which have none: leave it out, "
         "or choose sliding ones$"),
        ([5, 6], {"stride": 10, "window": 9, "protocol": "sliding"},
         "stride is 10, expected 1 to 9, the window's tokens$"),
        ([5, 6], {"base": 5}, "base is 5, expected what bloomq.load returns"),
        ([5, 6], {"progress": 5}, "progress is 5, expected a function of three arguments"),
        ([5, 6], {"protocol": "moving"}, "protocol is 'moving', expected fixed, sliding or gptq"),
        ([5, 6], {"most_tokens": 0}, "most_tokens is 0, expected 1 or more of the text"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    model: LanguageModel, text: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=f"^{says}"):
        perplexity(model, text, **options)


def test_what_is_no_model_is_not_measured() -> None:
    with pytest.raises(UsageError, match=r"^model is 'pack', expected what bloomq.load returns"):
        perplexity("pack", [5, 6])  # type: ignore[arg-type]


def test_a_base_of_another_vocabulary_is_refused(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = bloomq.load(pack(tmp_path_factory.getbasetemp(), Tiny(vocab_size=211), "f32"))
    with pytest.raises(
        UsageError, match=r"^the base has 211 tokens, the model 8192: compare packs of one vocabul"
    ):
        perplexity(model, [5, 6, 7], base=other)
    with pytest.raises(PackError, match=r"has no tokenizer.json: pass token ids, not text"):
        perplexity(other, "text")
    assert perplexity(other, [5, 6, 7]).bits_per_byte is None


def test_a_base_of_another_tokenizer_is_refused(
    model: LanguageModel, int4: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "prompt_ids", lambda text: [9, 9, 9])
    with pytest.raises(
        UsageError, match=r"^the base has another tokenizer: compare packs of one m"
    ):
        perplexity(model, "a text of some tokens", base=int4)
