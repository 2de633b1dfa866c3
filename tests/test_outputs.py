"""What forward calls return: fields by name, by index and as a tuple, as transformers' outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from bloomq import outputs
from bloomq.outputs import BaseModelOutput, CausalLMOutput, ModelOutput, QuestionAnsweringOutput

LOGITS, STATES = np.ones((1, 2, 3)), (np.zeros(1), np.ones(1))
THEIRS = {
    "BaseModelOutput": "BaseModelOutputWithPastAndCrossAttentions",
    "CausalLMOutput": "CausalLMOutputWithCrossAttentions",
    "SequenceClassifierOutput": "SequenceClassifierOutputWithPast",
    "TokenClassifierOutput": "TokenClassifierOutput",
    "QuestionAnsweringOutput": "QuestionAnsweringModelOutput",
}


@pytest.fixture
def output() -> CausalLMOutput:
    return CausalLMOutput(logits=LOGITS, hidden_states=STATES)


def test_a_field_is_had_by_name_key_and_index(output: CausalLMOutput):
    assert output.logits is output["logits"] is output[0] is LOGITS
    assert output.hidden_states is output["hidden_states"] is output[1] is output[-1] is STATES


def test_what_was_not_asked_for_is_none_and_takes_no_place(output: CausalLMOutput):
    assert output.loss is None
    assert "loss" not in output
    assert list(output) == list(output.keys()) == ["logits", "hidden_states"]
    assert len(output) == len(output.to_tuple()) == 2
    assert output.get("loss", 5) == 5


def test_a_missing_key_is_named_with_those_that_are_there(output: CausalLMOutput):
    for key in ("loss", "pooler_output"):
        with pytest.raises(KeyError, match=f"no '{key}', only logits, hidden_states"):
            output[key]


def test_an_index_beyond_the_fields_is_an_index_error(output: CausalLMOutput):
    with pytest.raises(IndexError):
        output[2]


def test_a_slice_is_a_tuple_of_fields_in_order(output: CausalLMOutput):
    assert output[:1] == (LOGITS,)
    assert output[1:] == (STATES,)
    whole = CausalLMOutput(1.5, LOGITS, "past", STATES, ("weights",))
    assert whole.to_tuple() == whole[:] == (1.5, LOGITS, "past", STATES, ("weights",))


def test_an_output_unpacks_as_keywords_and_as_a_tuple(output: CausalLMOutput):
    assert dict(**output) == {"logits": LOGITS, "hidden_states": STATES}
    logits, states = output.to_tuple()
    assert (logits, states) == (LOGITS, STATES)
    assert list(output.values()) == [LOGITS, STATES]
    assert isinstance(output, Mapping)


def test_a_zero_or_an_empty_array_is_there():
    output = CausalLMOutput(loss=0.0, logits=np.zeros((0, 3)))
    assert list(output) == ["loss", "logits"]


def test_outputs_are_compared_by_identity(output: CausalLMOutput):
    """Arrays have no truth value to compare by."""
    same = CausalLMOutput(logits=LOGITS, hidden_states=STATES)
    assert [output] == [output]
    assert output != same
    assert len({output, same}) == 2


def test_an_output_cannot_be_changed(output: CausalLMOutput):
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.logits = None  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        output.other = 1  # type: ignore[attr-defined]


def test_a_question_has_two_logits_and_a_model_without_a_head_none():
    question = QuestionAnsweringOutput(start_logits=LOGITS, end_logits=STATES)
    assert question.to_tuple() == (LOGITS, STATES)
    assert list(BaseModelOutput(LOGITS)) == ["last_hidden_state"]


@pytest.mark.parametrize("name", THEIRS)
def test_fields_are_those_of_transformers_in_its_order(name: str):
    """But for cross attentions, which no BLOOM has."""
    theirs: Any = pytest.importorskip("transformers.modeling_outputs")
    pytest.importorskip("torch")
    expected = [field.name for field in dataclasses.fields(getattr(theirs, THEIRS[name]))]
    found = [field.name for field in dataclasses.fields(getattr(outputs, name))]
    assert found == [field for field in expected if field != "cross_attentions"]
    assert issubclass(getattr(outputs, name), ModelOutput)
