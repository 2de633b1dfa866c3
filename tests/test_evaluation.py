"""lm-eval's requests: what the model answers, and lm-eval itself against its transformers model.

The runs need lm-eval, of the extra `eval`; what answers does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import DEMO, Tiny, pack

import bloomq
from bloomq import evaluation
from bloomq.answers import Answers, Options
from bloomq.errors import InputNotFound, UsageError
from bloomq.language_model import LanguageModel
from bloomq.sampling import Sampling
from bloomq.scoring import score
from bloomq.search import BeamOptions

TEXTS = [
    row["text"]
    for row in map(json.loads, (DEMO.parent / "heads/sequence/heldout.jsonl").open())
    if row["label"] in ("en", "fr", "es", "pt")
]
LONGEST = 48  # of what the models of the runs read at once: so that texts have several windows


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return bloomq.load()


@pytest.fixture(scope="module")
def answers(model: LanguageModel) -> Answers:
    return Answers(model, max_length=64)


# -- logprobs of continuations ---------------------------------------------------------------------


def test_a_continuation_has_the_sum_of_its_tokens_logprobs(answers: Answers) -> None:
    pairs = [([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9]), ([1], [5])]
    found = dict(answers.likelihoods(pairs))
    for number, (context, rest) in enumerate(pairs):
        (alone,) = score(answers.model.head, [[*context, *rest]], first=[len(context)])
        assert found[number] == (alone.total, alone.is_greedy)


def test_what_the_model_would_write_is_greedy(answers: Answers, model: LanguageModel) -> None:
    prompt = model.prompt_ids("Once upon a time")
    ids = list(model.generate(prompt, max_new_tokens=5).ids)
    found = dict(answers.likelihoods([(prompt, ids), (prompt, [*ids[:-1], ids[-1] + 1])]))
    assert found[0][1] and not found[1][1]


def test_a_context_that_is_too_long_loses_its_beginning(answers: Answers) -> None:
    ids = list(range(10, 200))
    long, short = ([*ids[:150]], ids[150:160]), (ids[160 - 65 : 150], ids[150:160])
    found = dict(answers.likelihoods([long, short]))
    assert found[0] == found[1]


@pytest.mark.parametrize("pair", [([], [5]), ([5], [6] * 65)], ids=["no context", "too long"])
def test_a_pair_that_cannot_be_scored_is_refused(answers: Answers, pair: Any) -> None:
    with pytest.raises(UsageError, match=r"^request 0 has a context of \d tokens and \d+ to score"):
        list(answers.likelihoods([pair]))


# -- whole texts -----------------------------------------------------------------------------------


def test_each_token_of_a_text_is_in_one_window(answers: Answers) -> None:
    text = " ".join(TEXTS[:20])
    ids = answers.tokenizer.encode(text)
    pairs = answers.rolling(text)
    assert [token for _, rest in pairs for token in rest] == ids
    assert pairs[0][0] == [answers.prefix_id] == [answers.tokenizer.bos_token_id]
    assert all(len(context) + len(rest) == 65 for context, rest in pairs)
    context, rest = pairs[-1]
    assert [*context, *rest] == ids[-65:]


def test_a_short_text_is_one_window_and_none_has_no_text(answers: Answers) -> None:
    assert answers.rolling("") == []
    assert answers.rolling("a king") == [([1], answers.tokenizer.encode("a king"))]


def test_a_tokenizer_without_a_beginning_or_an_end_is_refused(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers.tokenizer, "bos_token_id", None)
    assert answers.prefix_id == answers.tokenizer.eos_token_id
    monkeypatch.setattr(answers.tokenizer, "eos_token_id", None)
    with pytest.raises(UsageError, match=r"^the tokenizer has neither <s> nor </s> to put before"):
        answers.rolling("text")


def test_a_pack_without_a_tokenizer_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    other = bloomq.load(pack(tmp_path_factory.getbasetemp(), Tiny(vocab_size=211), "f32"))
    with pytest.raises(UsageError, match="has no tokenizer, which tasks of text need"):
        Answers(other)


# -- texts that are written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, Options(32)),
        ({"until": "\n"}, Options(32, ("\n",))),
        ({"until": ["\n", "", "."], "max_gen_toks": 5}, Options(5, ("\n", "."))),
        ({"max_new_tokens": 7, "max_gen_toks": 9}, Options(9)),
        ({"do_sample": False, "temperature": 0.7}, Options(32)),
        ({"do_sample": True}, Options(32, (), Sampling(temperature=1.0))),
        ({"temperature": 0.5, "top_k": 3, "top_p": None},
         Options(32, (), Sampling(temperature=0.5, top_k=3))),
        ({"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
         Options(32, (), Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1))),
        ({"temperature": 1, "min_p": 0.1, "typical_p": 0.9, "no_repeat_ngram_size": 3,
          "min_new_tokens": 2},
         Options(32, (), Sampling(temperature=1, min_p=0.1, typical_p=0.9, no_repeat_ngram_size=3,
                                  min_new_tokens=2))),
        ({"num_beams": 1, "do_sample": False}, Options(32)),
        ({"num_beams": 4, "early_stopping": True, "temperature": 0.0},
         Options(32, (), Sampling(), BeamOptions(num_beams=4, early_stopping=True))),
    ],
    ids=str,
)  # fmt: skip
def test_generation_kwargs_are_read_as_lm_eval_means_them(
    request_: dict[str, Any], expected: Options
) -> None:
    assert Options.of(request_, 32) == expected


def test_generation_kwargs_that_bloomq_has_not_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^generation_kwargs has penalty_alpha, typical, expected"
    ):
        Options.of({"typical": 1, "penalty_alpha": 0.6, "until": []})


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many', expected a whole number from 1 on"),
        ({"max_gen_toks": -3}, "max_gen_toks is -3, expected a whole number from 1 on"),
        ({"num_beams": 0}, "num_beams is 0, expected a whole number from 1 on"),
        ({"num_beams": 1 << 20}, "num_beams is 1048576, expected 1 to"),
        ({"num_beams": 4, "do_sample": True}, "num_beams with temperature 1.0, expected 0"),
        ({"temperature": "warm"}, "temperature is 'warm', expected"),
        ({"top_k": -1}, "top_k is -1, expected"),
        ({"until": 5}, "until is 5, expected strings that end an answer"),
        ({"until": [5]}, "until is .5., expected strings that end an answer"),
    ],
    ids=str,
)
def test_generation_kwargs_that_cannot_be_are_refused(request_: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=f"^{says}"):
        Options.of(request_)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0, expected a whole number from 1 on"),
        ({"seed": "abc"}, "seed is 'abc', expected a whole number from 0 on"),
        ({"max_length": -1}, "max_length is -1, expected a whole number from 1 on"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(
    model: LanguageModel, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=f"^{says}$"):
        Answers(model, **options)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_texts_by_beams_are_those_of_generate(model: LanguageModel, batch_tokens: int) -> None:
    answers = Answers(model, max_length=64, batch_tokens=batch_tokens)
    contexts = ["Once upon a time", "El", "def f(x):\n"]
    asked = {"num_beams": 3, "no_repeat_ngram_size": 2, "max_gen_toks": 8, "until": ["."]}
    found = dict(answers.texts(contexts, Options.of(asked)))
    for number, context in enumerate(contexts):
        expected = model.generate(
            context, max_new_tokens=8, stop=".", search=BeamOptions(num_beams=3),
            sampling=Sampling(no_repeat_ngram_size=2),
        )  # fmt: skip
        assert found[number] == expected.text


@pytest.mark.parametrize("batch_tokens", [1, 120, 10_000])
def test_texts_are_those_of_generate_in_any_batches(
    model: LanguageModel, batch_tokens: int
) -> None:
    answers = Answers(model, max_length=64, batch_tokens=batch_tokens)
    contexts = ["Once upon a time", "El", "def f(x):\n", "Il était une fois un roi"]
    found = dict(answers.texts(contexts, Options(12, (" a",))))
    for number, context in enumerate(contexts):
        expected = model.generate(context, max_new_tokens=12, stop=" a").text
        assert found[number] == expected


def test_draws_are_the_same_every_time_and_differ_between_contexts(answers: Answers) -> None:
    options = Options(10, (), Sampling(temperature=1.0))
    first, again = (dict(answers.texts(["The king"] * 4, options)) for _ in range(2))
    assert first == again and len(set(first.values())) == 4


def test_a_long_context_leaves_room_for_what_is_written(
    answers: Answers, model: LanguageModel
) -> None:
    text = " ".join(TEXTS[:10])
    ids = model.prompt_ids(text)
    assert len(ids) > 64
    expected = model.generate(ids[-54:], max_new_tokens=10).text
    assert dict(answers.texts([text], Options(10))) == {0: expected}
    assert set(dict(answers.texts([""], Options(3)))) == {0}


def test_more_new_tokens_than_the_model_reads_are_refused(answers: Answers) -> None:
    with pytest.raises(UsageError, match=r"^a task asks for 64 new tokens, expected less than the"):
        list(answers.texts(["a"], Options(64)))


def test_ctrl_c_ends_the_evaluation(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **options: Any) -> Any:
        return [type("Found", (), {"finish_reason": "interrupted"})]

    monkeypatch.setattr(answers.model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(answers.texts(["a"], Options(3)))


# -- without lm-eval -------------------------------------------------------------------------------


def test_without_lm_eval_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "lm_class", evaluation.lm_class.__wrapped__)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"is missing, which evaluation needs: pip install"):
        _ = evaluation.BloomqLM
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--tasks", "x"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: lm_eval")
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = evaluation.Nonsense


# -- lm-eval itself --------------------------------------------------------------------------------

TASKS = {
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{target}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 2
fewshot_split: test
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "written": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: " {{target}}"
generation_kwargs:
  until: ["\\n", ".", ","]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}

PHRASES = [  # of which the demo, as small as it is, knows the end of some
    ("It was at the same", "time"), ("She had seen him for the first", "time"),
    ("He shook his", "head"), ("They sat down at the", "table"), ("on the other", "hand"),
    ("He came out of", "the"), ("from time to", "time"), ("in the middle of", "nowhere"),
    ("Il était une fois un", "roi"), ("import os\nimport", "sys"),
]  # fmt: skip


def write_tasks(folder: Path) -> None:
    """Each task as people write them: a YAML file, and the data beside it."""
    rng = np.random.default_rng(0)
    texts = [text for text in TEXTS if len(text.split()) > 5][:24]
    lasts = [" " + text.split()[-1] for text in texts]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for i, (text, last) in enumerate(zip(texts, lasts, strict=True)):
        context = text[: -len(last)]
        others = [lasts[j] for j in rng.choice(len(lasts), 3)]
        choices = [*others[: i % 4], last, *others[i % 4 :]]
        rows["choice"].append({"context": context, "choices": choices, "answer": i % 4})
    for name in ("last_word", "written"):
        rows[name] = [{"context": context, "target": last} for context, last in PHRASES]
    rows["rolling"] = [{"text": " ".join(texts[i : i + 6])} for i in range(0, 24, 6)]
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        kind = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        (folder / f"{name}.yaml").write_text(kind + files + body)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tasks."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def python(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process without network."""
    environment = {
        **os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


EVALUATE = """
import json, sys
import lm_eval
from bloomq import evaluation
from lm_eval.tasks import TaskManager

folder, out, pack, demo, longest, *tasks = sys.argv[1:]
hf = {"pretrained": demo, "dtype": "float32", "device": "cpu", "max_length": int(longest)}
models = {
    "bloomq": (evaluation.BloomqLM(pack, cache_dtype="f32", max_length=int(longest)), None),
    "hf": ("hf", hf),
}
found = {}
for name, (model, options) in models.items():
    manager = TaskManager(include_path=folder, include_defaults=False)
    done = lm_eval.simple_evaluate(
        model, options, tasks=tasks, bootstrap_iters=0, task_manager=manager
    )
    samples = {task: [(s["doc_id"], s["resps"]) for s in done["samples"][task]] for task in tasks}
    found[name] = {"results": done["results"], "samples": samples}
json.dump(found, open(out, "w"), default=str)
"""


def test_lm_eval_finds_what_it_finds_of_transformers(
    tasks: Path, pack_of: Callable[..., Path]
) -> None:
    pytest.importorskip("transformers")
    out = tasks / "found.json"
    done = python(tasks, "-c", EVALUATE, tasks, out, pack_of("f32"), DEMO, LONGEST, *TASKS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    ours, theirs = found["bloomq"], found["hf"]
    for task in TASKS:
        results, expected = ours["results"][task], theirs["results"][task]
        figures = {key for key in expected if "," in key and "stderr" not in key}
        assert figures and figures <= set(results)
        for key in figures:
            assert results[key] == pytest.approx(expected[key], rel=1e-4), (task, key)
        assert [doc for doc, _ in ours["samples"][task]] == list(range(len(ours["samples"][task])))
        for mine, its in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert flat(mine) == pytest.approx(flat(its), abs=1e-3), (task, mine[0])
    assert 0.0 < ours["results"]["choice"]["acc,none"] < 1.0
    assert 0.0 < ours["results"]["last_word"]["acc,none"] < 1.0
    assert 0.0 < ours["results"]["written"]["exact_match,none"] < 1.0
    assert ours["results"]["rolling"]["word_perplexity,none"] > 1.0


def flat(sample: Any) -> list[float]:
    """Its document, logprobs and whether they are greedy; of a text, its characters."""
    if isinstance(sample, list):
        return [number for part in sample for number in flat(part)]
    return [*map(float, sample.encode())] if isinstance(sample, str) else [float(sample)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--tasks", "x"], ["run", "--model", "bloomq", "--tasks", "x"]),
        (["run", "--tasks", "x"], ["run", "--model", "bloomq", "--tasks", "x"]),
        (["--model", "hf"], ["run", "--model", "hf"]),
        (["-M=hf"], ["run", "-M=hf"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], ["run", "--model", "bloomq"]),
    ],
    ids=str,
)
def test_lm_evals_command_line_is_told_the_model(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lm_eval.__main__")
    seen = []
    monkeypatch.setattr(cli, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["evaluation", *given])
    with pytest.raises(SystemExit) as caught:
        evaluation.main()
    assert caught.value.code == 0 and seen == [expected]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputNotFound("x: no such pack"), 1, "error: x: no such pack\n"),
        (UsageError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=str,
)
def test_an_error_of_a_run_is_one_line(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cli = pytest.importorskip("lm_eval.__main__")

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "cli_evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["evaluation"])
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--tasks", "x"])
    assert (caught.value.code, capsys.readouterr().err) == (code, says)


def test_lm_eval_takes_a_loaded_model(model: LanguageModel) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    lm = evaluation.BloomqLM(model, batch_size=1, device="cuda:0")
    assert get_model("bloomq") is type(lm)
    assert lm.max_length == 2048 and lm.eot_token_id == 2 and lm.prefix_token_id == 1
    request = Instance("loglikelihood", {}, ("Once upon a", " time"), 0)
    ((logprob, greedy),) = lm.loglikelihood([request], disable_tqdm=True)
    ids = model.prompt_ids("Once upon a time")
    assert logprob == score(model.head, [ids], first=[len(ids) - 1])[0].total and not greedy


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("foo=3,bar=4", "model_args has bar, foo, expected pack, backend, threads, cache_dtype, "),
        ("seed=abc", "seed is 'abc', expected a whole number from 0 on"),
        ("max_gen_toks=-3", "max_gen_toks is -3, expected a whole number from 1 on"),
        ("batch_tokens=0", "batch_tokens is 0, expected a whole number from 1 on"),
        ("threads=many", "threads is 'many', expected 1 to"),
    ],
)
def test_model_args_that_cannot_be_are_refused(given: str, says: str) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UsageError, match=f"^{says}"):
        evaluation.BloomqLM.create_from_arg_string(given, {"batch_size": 1, "device": None})
