"""What a call may ask of its texts beyond sampling: searches, several draws, ends, scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import warm
from models import Tiny, pack
from test_cli import error_line, run

import bloomq
from bloomq.constraints import JsonSchema, Regex
from bloomq.errors import CapacityError, UsageError
from bloomq.language_model import LanguageModel
from bloomq.sampling import Sampling
from bloomq.search import BeamOptions, ContrastOptions, beam_search, contrastive_search

BEAMS = BeamOptions(num_beams=3)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Without a tokenizer."""
    return bloomq.load(pack(tmp_path_factory.getbasetemp(), Tiny(vocab_size=97), "int8"))


# -- searches --------------------------------------------------------------------------------------


def test_a_search_gives_the_best_text_and_its_score(demo: LanguageModel):
    found = demo.generate(PROMPT, max_new_tokens=10, search=BEAMS)
    expected = beam_search(
        demo.head, demo.prompt_ids(PROMPT), num_beams=3, max_new_tokens=10, context=demo.context,
        ends=(demo.config.eos_token_id,),
    )[0]  # fmt: skip
    assert (found.ids, found.score, found.logprobs) == (
        expected.ids, expected.score, expected.logprobs,
    )  # fmt: skip
    assert found.text == demo.tokenizer.decode(list(found.ids))
    assert found.finish_reason == "length"
    assert found.stats.generated_tokens == 10
    assert found.stats.generate_s > 0


def test_several_results_of_a_search_are_a_list_for_each_prompt(demo: LanguageModel):
    search = BeamOptions(num_beams=4, num_return_sequences=2)
    one = demo.generate(PROMPT, max_new_tokens=6, search=search)
    assert len(one) == 2
    assert one[0].score >= one[1].score
    both = demo.generate([PROMPT, "The sea"], max_new_tokens=6, search=search)
    assert [g.ids for g in both[0]] == [g.ids for g in one]
    assert len(both[1]) == 2


def test_contrastive_search_stops_at_a_string(demo: LanguageModel):
    options = ContrastOptions(penalty_alpha=0.6)
    whole = demo.generate(PROMPT, max_new_tokens=20, search=options)
    expected = contrastive_search(
        demo.head, demo.prompt_ids(PROMPT), penalty_alpha=0.6, max_new_tokens=20,
        context=demo.context,
    )  # fmt: skip
    assert whole.ids == expected.ids
    stop = whole.text[8:12]
    found = demo.generate(PROMPT, max_new_tokens=20, search=options, stop=stop)
    assert (found.text, found.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_a_search_that_is_interrupted_gives_the_best_so_far(demo: LanguageModel, monkeypatch):
    step, calls = demo.head.step, [0]

    def interrupted(*args):
        calls[0] += 1
        if calls[0] > 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(demo.head, "step", interrupted)
    found = demo.generate(PROMPT, max_new_tokens=10, search=BEAMS)
    assert (len(found.ids), found.finish_reason) == (4, "interrupted")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"best_of": 2}, "best_of and num_return_sequences are of draws"),
        ({"draft": "lookup"}, "a draft together with a search"),
        ({"top_logprobs": 1}, "top_logprobs together with a search"),
        ({"window": bloomq.Window(128)}, "a window together with a search"),
        ({"constraint": Regex("a")}, "a constraint together with a search"),
        ({"temperature": 1.0}, "beam search with temperature 1.0, expected 0"),
        ({"search": "beams"}, "search is 'beams', expected BeamOptions or ContrastOptions"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(demo: LanguageModel, given, says):
    with pytest.raises(UsageError, match=says):
        demo.generate(PROMPT, **{"search": BEAMS, **given})


# -- several draws ---------------------------------------------------------------------------------


def test_the_best_of_several_draws_has_the_likeliest_tokens(demo: LanguageModel):
    options = {"max_new_tokens": 8, "temperature": 1.2, "seed": 5}
    draws = demo.generate([PROMPT] * 4, **options)
    best = max(draws, key=lambda g: np.mean(g.logprobs))
    assert demo.generate(PROMPT, best_of=4, **options).ids == best.ids


def test_the_prompt_of_several_draws_is_read_once(demo: LanguageModel, monkeypatch):
    sizes, step = [], demo.head.step
    monkeypatch.setattr(
        demo.head, "step", lambda ids, *rest: sizes.append(len(ids)) or step(ids, *rest)
    )
    demo.generate([7] * 300, best_of=6, max_new_tokens=1, temperature=1.0, seed=1)
    assert sum(sizes) == 300 + 5


@pytest.mark.parametrize("best_of", [0, 1.5, "2"])
def test_an_impossible_number_of_draws_is_refused(demo: LanguageModel, best_of):
    with pytest.raises(UsageError, match=r"best_of is .*, expected 1, or more with a temperature"):
        demo.generate(PROMPT, best_of=best_of, temperature=1.0)


def test_several_draws_are_returned_best_first(demo: LanguageModel):
    options = {"max_new_tokens": 8, "temperature": 1.2, "seed": 5}
    draws = demo.generate([PROMPT] * 3, **options)
    found = demo.generate(PROMPT, num_return_sequences=3, **options)
    expected = sorted(draws, key=lambda g: -np.mean(g.logprobs))
    assert [g.ids for g in found] == [g.ids for g in expected]
    two = demo.generate(PROMPT, best_of=3, num_return_sequences=2, **options)
    assert [g.ids for g in two] == [g.ids for g in expected[:2]]


def test_greedy_texts_are_not_drawn_twice(demo: LanguageModel):
    with pytest.raises(UsageError, match="expected 1, or more with a temperature"):
        demo.generate(PROMPT, best_of=2)


# -- ends, options, constraints --------------------------------------------------------------------


def test_a_token_may_end_a_text(demo: LanguageModel):
    whole = demo.generate(PROMPT, max_new_tokens=12)
    found = demo.generate(PROMPT, max_new_tokens=12, stop_ids=[whole.ids[4], 3])
    first = whole.ids.index(whole.ids[4])
    assert (found.ids, found.finish_reason) == (whole.ids[: first + 1], "eos")


@pytest.mark.parametrize("given", [[-1], [1 << 40], ["a"], "abc", [1.5]])
def test_stop_ids_that_are_none_are_refused(demo: LanguageModel, given):
    with pytest.raises(UsageError, match=r"stop_ids are .*, expected token ids from 0 to "):
        demo.generate(PROMPT, stop_ids=given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"window": 128}, "window is 128, expected a bloomq.Window"),
        ({"max_new_tokens": "5", "draft": "lookup"}, "max_new_tokens is '5', expected at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens is None, expected at least 1"),
        ({"top_logprobs": 1.5}, "top_logprobs is 1.5, expected 0 to"),
    ],
)
def test_options_of_another_kind_are_refused(demo: LanguageModel, given, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        demo.generate(PROMPT, **given)


def test_a_draft_model_has_no_window(demo: LanguageModel):
    with pytest.raises(UsageError, match="a draft model together with a window"):
        demo.generate(PROMPT, draft=demo, window=bloomq.Window(128))


def test_lists_of_prompts_are_lists(demo: LanguageModel):
    with pytest.raises(UsageError, match="prompts are 'abc', expected several: put one"):
        demo.generate_each("abc")
    for first in (-1, "x", True):
        with pytest.raises(UsageError, match=r"first is .*, expected the number of a prompt"):
            demo.generate_each(["a"], first=first)
    with pytest.raises(UsageError, match="sampling is"):
        demo.generate_each(["a"], sampling={})
    with pytest.raises(UsageError, match=r"prompt is array\(5\), expected text"):
        demo.generate(np.array(5))


def test_options_of_a_call_go_before_those_of_its_sampling(demo: LanguageModel):
    base = Sampling(temperature=1.0, top_k=9, seed=3)
    mixed = demo.generate(PROMPT, sampling=base, top_k=4, max_new_tokens=8)
    plain = demo.generate(PROMPT, temperature=1.0, top_k=4, seed=3, max_new_tokens=8)
    assert mixed.ids == plain.ids


def test_sampling_of_another_kind_is_refused(demo: LanguageModel):
    with pytest.raises(UsageError, match=r"sampling is {}, expected a bloomq.Sampling"):
        demo.generate(PROMPT, sampling={})


def test_a_constraint_holds_in_a_batch_and_with_guesses(demo: LanguageModel):
    pattern = Regex(r" [a-z]{3,9}( [a-z]{3,9}){4}")
    texts = demo.generate([PROMPT, "El", "x"], constraint=pattern, max_new_tokens=40)
    for text, prompt in zip(texts, [PROMPT, "El", "x"], strict=True):
        assert demo.generate(prompt, constraint=pattern, max_new_tokens=40).ids == text.ids
        guessed = demo.generate(prompt, constraint=pattern, max_new_tokens=40, draft="lookup")
        assert guessed.ids == text.ids


def test_what_a_schema_forces_is_guessed(demo: LanguageModel):
    schema = JsonSchema(
        {
            "type": "object", "additionalProperties": False,
            "properties": {"a_long_name_of_a_property": {"type": "boolean"}},
            "required": ["a_long_name_of_a_property"],
        },
        compact=True,
    )  # fmt: skip
    found = demo.generate("JSON:", constraint=schema, max_new_tokens=60)
    assert set(json.loads(found.text)) == {"a_long_name_of_a_property"}
    assert found.finish_reason == "stop"
    assert found.stats.right_guesses > 5


def test_a_constraint_that_fails_in_the_middle_ends_its_text_alone(demo: LanguageModel):
    """A token that is forced from outside and does not fit."""
    good = demo.stream("The sea", max_new_tokens=6)
    next(good)
    wrong = Sampling(forced_prefix=(5,))
    with pytest.raises(UsageError, match=r"no token is left to choose|is not allowed by"):
        demo.generate("The sea", constraint=Regex("[0-9]+"), sampling=wrong)
    assert len(list(good)) == 5
    assert demo.engine.used_rows == 0


def test_a_pack_without_a_tokenizer_takes_ids_and_no_strings(bare: LanguageModel):
    assert bare.generate([5, 6], max_new_tokens=3, search=BEAMS).text == ""
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        bare.generate([5, 6], stop="a")
    with pytest.raises(UsageError, match="a constraint needs a tokenizer"):
        bare.generate([5, 6], constraint=Regex("a"))


# -- scores ----------------------------------------------------------------------------------------


def test_a_text_is_scored_as_it_would_be_written(demo: LanguageModel):
    written = demo.generate(PROMPT, max_new_tokens=12, top_logprobs=3)
    scores = demo.score(list(written.ids), context=PROMPT, top=3)
    assert tuple(scores.logprobs.tolist()) == written.logprobs
    assert scores.is_greedy
    assert scores.top_ids.tolist() == [[i for i, _ in top] for top in written.top_logprobs]


def test_several_texts_are_scored_at_once(demo: LanguageModel):
    both = demo.score(["The sea", "El rey"])
    assert [s.total for s in both] == [demo.score("The sea").total, demo.score("El rey").total]


def test_a_text_beyond_the_context_is_not_scored(demo: LanguageModel):
    with pytest.raises(CapacityError, match="a text of 2049 tokens exceeds the context of 2048"):
        demo.score([5] * 2049)


def test_perplexity_is_of_a_long_text(demo: LanguageModel):
    ids = demo.prompt_ids("It was a dark night. " * 40)
    found = demo.perplexity(ids, window=64)
    total = sum(
        demo.score(ids[i : i + 64]).total for i in range(0, len(ids), 64) if len(ids[i:]) > 1
    )
    assert found.perplexity == pytest.approx(np.exp(-total / found.tokens), rel=1e-6)


# -- the command -----------------------------------------------------------------------------------


def test_beams_are_printed_best_first() -> None:
    options = ("-n", "8", "--num-beams", "4", "--num-return-sequences", "2")
    lines = run("generate", PROMPT, *options).stdout.splitlines()
    assert lines[0].startswith("[1: -")
    assert lines[1].startswith("[2: -")
    one = json.loads(run("generate", PROMPT, "-n", "8", "--num-beams", "4", "--json").stdout)
    assert f"{one['score']:.4f}" in lines[0]


def test_a_schema_and_a_regex_hold_on_the_command_line(tmp_path: Path) -> None:
    schema = tmp_path / "a schema.json"
    pair = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    schema.write_text(json.dumps(pair))
    text = run("generate", "x", "--json-schema", str(schema), "-n", "40", "-q").stdout
    assert len(json.loads(text)) == 2
    assert run("generate", "x", "--regex", "ab{3}", "-q").stdout == "abbb\n"


def test_the_texts_that_an_option_names_become_tokens() -> None:
    free = run("generate", PROMPT, "-n", "12", "-q").stdout
    word = free.split()[1]
    assert word not in run("generate", PROMPT, "-n", "12", "-q", "--bad-word", word).stdout.split()
    forced = run("generate", PROMPT, "-n", "6", "-q", "--forced-prefix", " there was").stdout
    assert forced.startswith(" there was")
    order = "top_k,temperature,top_n_sigma,top_p,min_p,typical,xtc"
    run("generate", PROMPT, "-n", "3", "--temperature", "1", "--top-k", "5", "--order", order)
    run("generate", PROMPT, "-n", "3", "--temperature", "1", "--dry-multiplier", "1")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--penalty-alpha", "0.5", "--num-beams", "2"), "--penalty-alpha with 2 beams, expected"),
        (("--batch-file", "x.txt", "--num-beams", "2"), "a --batch-file has one text a prompt"),
        (("--num-beams", "0"), "num_beams is 0"),
        (("--length-penalty", "2"), "--length-penalty belongs to --num-beams above 1"),
        (("--bad-word", ""), "--bad-word is empty, expected a text"),
        (("-n", "0"), "max_new_tokens is 0, expected at least 1"),
        (("--order", "nonsense"), "order is ('nonsense',), expected some of"),
        (
            ("--logit-bias", "two words=1"),
            "--logit-bias two words=1: 'two words' is 3 tokens, expected one",
        ),
        (("--window", "100"), "a window with tokens = 100, expected a multiple of 64 from"),
    ],
)
def test_options_that_cannot_be_are_one_line(args, says) -> None:
    prompt = () if "--batch-file" in args else (PROMPT,)
    done = run("generate", *prompt, *args, check=2)
    assert says in error_line(done)


def test_breakers_need_a_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = pack(tmp_path_factory.getbasetemp(), Tiny(vocab_size=97), "int8")
    code = (
        "from bloomq.cli.generation_options import ids_with\nimport bloomq\n"
        f"try: ids_with(('x',), bloomq.load({str(folder)!r}))\n"
        "except bloomq.UsageError as error: print(error)"
    )
    done = warm.python("-c", code)
    assert "--dry-breaker needs a tokenizer, which this pack has not" in done.stdout


def test_transformers_names_search_too(pack_of: Callable[..., Path]):
    model = bloomq.BloomForCausalLM.from_pretrained(pack_of("f32"))
    with pytest.raises(UsageError, match="a streamer together with a search, expected one of them"):
        model.generate([[5, 6]], num_beams=2, streamer=object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="penalty_alpha with 2 beams, expected one of them"):
        model.generate([[5, 6]], num_beams=2, penalty_alpha=0.5)
    with pytest.raises(UsageError, match="the search found 1 texts, expected 2: processors and"):
        model.generate(
            [[5, 6]], num_beams=2, num_return_sequences=2, max_new_tokens=1,
            bad_words_ids=[[i] for i in range(model.config.vocab_size) if i != 9],
        )  # fmt: skip
