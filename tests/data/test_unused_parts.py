"""What a record says and training does not use is counted and reported once: keys, thoughts, content."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer
from support.tool_templates import TEMPLATES

from qlora.data import Data
from qlora.data.conversations.build_example import AnswerCounts, Encoded
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.data.reading import loss_keys
from qlora.data.types import Record, Unused

QUESTION, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}
THOUGHT = "I count from 0 two up."


@pytest.fixture(scope="module")
def chatml() -> Encoder:
    return Encoder(make_tokenizer("bytes", "chatml"))


@pytest.fixture(scope="module")
def qwen3() -> Encoder:
    return Encoder(make_tokenizer("bytes", "qwen3"))


def template_encoder(folder: Path, text: str) -> Encoder:
    path = folder / "template.jinja"
    path.write_text(text)
    return Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))


def report_of(folder: Path, encoder: Encoder, records: Sequence[dict], **fields: Any) -> DataReport:
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps({**record, **fields}) for record in records))
    section = Data.model_validate({"train": str(path), "packing": False, "max_length": 512, "eval_fraction": 0})
    return prepare(section, encoder, 0).report


def conversations(count: int, **keys: Any) -> list[dict]:
    turns = [[{**QUESTION, "content": f"How many? {i}"}, {**ANSWER, **keys}] for i in range(count)]
    return [{"messages": messages} for messages in turns]


def about_all(report: DataReport) -> list[str]:
    """The messages about the whole data set, but for its size."""
    texts = [finding.message for finding in report.warnings if finding.where == "data.train"]
    return [text for text in texts if "will overfit" not in text and "same answer" not in text]


def unused_of(encoder: Encoder, **fields: Any) -> Unused:
    result = encode_chunk([Record("x:1", fields)], "auto", encoder)[0]
    assert isinstance(result, Encoded), result
    return result.unused


def test_keys_like_a_mask_are_a_warning_that_names_the_near_key(tmp_path: Path, chatml: Encoder) -> None:
    records = [*conversations(3), *conversations(2, waight=0)]
    report = report_of(tmp_path, chatml, records, loss_msk=[0, 1])
    (warning,) = about_all(report)
    assert warning.startswith("5 records have keys that look like a loss mask and are NOT read: ")
    assert "loss_msk (did you mean loss_mask?), waight (did you mean weight?)" in warning
    assert f"({tmp_path}/records.jsonl:1, " in warning and report.kept == 5


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_misspelt_loss_key_is_a_warning(data: st.DataObject) -> None:
    """One letter of a key is left out, doubled or swapped with the next."""
    key = data.draw(st.sampled_from([*loss_keys.MESSAGE_KEYS, *loss_keys.RECORD_KEYS]))
    at = data.draw(st.integers(0, len(key) - 2))
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    misspelt = data.draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], swapped]))
    known = (*loss_keys.MESSAGE_KEYS, *loss_keys.RECORD_KEYS)
    assert misspelt in known or loss_keys.looks_like_one(misspelt, known)


@pytest.mark.parametrize(
    "key", ["my_mask", "is_masked", "turnLoss", "train_on_this", "ignore", "sample_weight", "trained", "lossmask"]
)
def test_other_names_of_a_mask_are_a_warning(key: str, tmp_path: Path, chatml: Encoder) -> None:
    for report in (report_of(tmp_path, chatml, conversations(2, **{key: 0})),
                   report_of(tmp_path, chatml, conversations(2), **{key: 0})):  # fmt: skip
        assert f"look like a loss mask and are NOT read: {key}" in about_all(report)[0]


def test_side_columns_are_one_quiet_note(tmp_path: Path, chatml: Encoder) -> None:
    side = {"id": 7, "source": "web", "lang": "en", "score": 0.5, "meta": {"a": 1}, "empty": "", "none": None, "no": []}
    report = report_of(tmp_path, chatml, conversations(120, name="Ada", id="m1"), **side)
    assert about_all(report) == []
    (note,) = [note for note in report.notes if "not read" in note]
    assert (
        note == "data.train: keys that are not read: id, source, lang, score, meta (of records); id, name (of messages)"
    )


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"instruction": "Add.", "output": "3", "input": "", "system": "Count.", "history": [["a", "b"]]}, ()),
        ({"prompt": "Once", "completion": "upon", "system": "Tell.", "question": "Who?"}, ("question",)),
        ({"question": "Who?", "choices": ["a", "b"], "answer": 1, "subject": "us"}, ("subject",)),
        ({"text": "Once upon a time", "loss_mask": [1]}, ("loss_mask",)),
        ({"input_ids": [65, 66], "attention_mask": [1, 1], "loss_mask": [0, 1], "length": 2}, ("length",)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "id": 1}, ("id",)),
        ({"messages": [QUESTION, ANSWER], "system": "Be brief.", "tools": "", "prompt": "x"}, ("prompt",)),
    ],
)
def test_each_format_reports_the_keys_that_it_does_not_read(fields: dict, names: tuple, chatml: Encoder) -> None:
    assert unused_of(chatml, **fields).fields == names


def test_a_key_that_the_template_reads_is_not_reported(tmp_path: Path, chatml: Encoder) -> None:
    named = "{% for m in messages %}{{ m.role ~ (m.get('name') or '') ~ ('!' if 'loud' in m else '') ~ m['content'] }}"
    named += "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    messages = [{**QUESTION, "name": "Ada", "loud": True, "mood": "x"}, {**ANSWER, "mood": "y"}]
    assert unused_of(template_encoder(tmp_path, named), messages=messages).keys == ("mood",)
    assert unused_of(chatml, messages=messages).keys == ("loud", "mood", "name")
    dumped = "{% for m in messages %}{{ m.role + m.content + (m | list | string) + eos_token }}{% endfor %}"
    assert unused_of(template_encoder(tmp_path, dumped), messages=messages).keys == ()


def test_keys_of_tool_messages_are_read_where_the_template_writes_them(tmp_path: Path) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "content": "2", "name": "look", "tool_call_id": "abcdefghi"}, ANSWER]  # fmt: skip
    plain = template_encoder(tmp_path, TEMPLATES["object"])
    assert unused_of(plain, messages=turns).keys == ("tool_call_id",)  # `name` is a key of its calls, too
    with_ids = TEMPLATES["object"].replace("(m.content or '')", "(m.tool_call_id or '') + m.content")
    assert unused_of(template_encoder(tmp_path, with_ids), messages=turns).keys == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_the_template_loses_are_a_warning(key: str, tmp_path: Path, chatml: Encoder) -> None:
    report = report_of(tmp_path, chatml, [*conversations(2, **{key: THOUGHT}), *conversations(120)])
    (warning,) = about_all(report)
    assert warning.startswith(f"2 records have thoughts ({key}) that the chat template does not write")
    assert "model.chat_template" in warning and "data.thinking: in_content" in warning
    assert (report.answers, report.trained_answers, report.thoughts, report.trained_thoughts) == (122, 122, 2, 0)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_the_template_writes_are_trained(key: str, qwen3: Encoder) -> None:
    result = encode_chunk([Record("x:1", {"messages": [QUESTION, {**ANSWER, key: THOUGHT}]})], "auto", qwen3)[0]
    assert isinstance(result, Encoded) and result.unused == Unused()
    assert THOUGHT in qwen3.decode(result.example.labels[result.example.labels != -100])


def test_an_earlier_thought_that_is_taken_out_is_trained_in_a_branch(qwen3: Encoder) -> None:
    turns = [QUESTION, {**ANSWER, "reasoning_content": THOUGHT}, QUESTION, {**ANSWER, "reasoning_content": "Again."}]
    result = encode_chunk([Record("x:1", {"messages": turns})], "auto", qwen3)[0]
    assert isinstance(result, Encoded) and result.unused.thoughts == () and result.untrained_answers == 0
    assert result.answers == AnswerCounts(2, 2, 2, 2) and len(result.example.branches) == 1


FIRST, BRIEF = "{% for m in messages %}{% if ", {"role": "system", "content": 'Be "brief",\nplease.'}
REST = " %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
RESULT = {**BRIEF, "role": "tool"}
DROPS = {  # templates that write the content of some roles only, in some places only, and a record that loses some
    "system": (FIRST + "m.role != 'system'" + REST, [BRIEF, QUESTION, ANSWER]),
    "system later on": (FIRST + "loop.first or m.role != 'system'" + REST, [QUESTION, ANSWER, BRIEF, QUESTION, ANSWER]),
    "user": (
        FIRST + "loop.index0 == 0 or m.role != 'user'" + REST,
        [QUESTION, ANSWER, {**QUESTION, **BRIEF, "role": "user"}, ANSWER],
    ),
    "tool": (FIRST + "m.role != 'tool'" + REST, [QUESTION, ANSWER, RESULT, ANSWER]),
}


@pytest.mark.parametrize("name", DROPS)
def test_content_that_the_template_loses_is_a_warning(name: str, tmp_path: Path) -> None:
    template, turns = DROPS[name]
    report = report_of(tmp_path, template_encoder(tmp_path, template), [{"messages": turns}] * 2)
    role = name.split()[0]
    expected = f"2 records have messages of the role {role} whose content the chat template does not write"
    assert [text for text in about_all(report) if text.startswith(expected)], report.warnings


def test_content_that_the_template_rewrites_is_not_called_lost(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ (m.content | tojson if m.role == 'tool' else m.content | trim | upper"
    encoder = template_encoder(tmp_path, text + " if m.role == 'user' else m.content) + eos_token }}{% endfor %}")
    turns = [QUESTION, ANSWER, {"role": "tool", "content": 'a "b"\n\\c'}, ANSWER]
    assert unused_of(encoder, messages=turns) == Unused()


def test_a_system_column_is_read_in_every_conversational_format(chatml: Encoder) -> None:
    shares = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    for fields in ({"messages": [QUESTION, ANSWER]}, {"conversations": shares}, {"prompt": "Hi", "completion": "Ho"}):
        result = encode_chunk([Record("x:1", {**fields, "system": "Be brief."})], "auto", chatml)[0]
        assert isinstance(result, Encoded) and result.unused == Unused()
        assert chatml.decode(result.example.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    twice = {"messages": [{"role": "system", "content": "Be long."}, QUESTION, ANSWER], "system": "Be brief."}
    assert "two system texts" in str(encode_chunk([Record("x:1", twice)], "auto", chatml)[0])


@pytest.mark.sample(of=2)
@pytest.mark.parametrize("key", ["images", "audios", "system_prompt", "chat_template_kwargs", "reasoning", "cot"])
def test_content_in_columns_that_are_not_read_is_a_warning(key: str, tmp_path: Path, chatml: Encoder) -> None:
    (warning,) = about_all(report_of(tmp_path, chatml, conversations(9), **{key: ["cat.png"]}))
    assert warning.startswith(f"9 records have content that is NOT read: {key}")
    assert about_all(report_of(tmp_path, chatml, conversations(9), **{key: []})) == []
    if key != "reasoning":  # a thought of a message
        (warning,) = about_all(report_of(tmp_path, chatml, conversations(9, **{key: ["cat.png"]})))
        assert warning.startswith(f"9 records have content that is NOT read: {key}")


def test_loss_for_another_role_is_a_warning_unless_all_is_trained(tmp_path: Path, chatml: Encoder) -> None:
    records = conversations(120)
    for record in records:
        record["loss_mask"] = [1, 1]
    assert about_all(report_of(tmp_path, chatml, records))[0].startswith(
        "120 records ask for loss on messages of the role user"
    )
    everything = Encoder(make_tokenizer("bytes", "chatml"), "all")
    assert about_all(report_of(tmp_path, everything, records)) == []


def test_an_evaluation_set_is_reported_too(tmp_path: Path, chatml: Encoder) -> None:
    report_of(tmp_path, chatml, conversations(3))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({**conversations(1)[0], "loss_msk": [0, 1], "id": 1}))
    section = {"train": str(tmp_path / "records.jsonl"), "eval": str(held_out)}
    report = prepare(Data.model_validate(section), chatml, 0).report
    assert [f.message for f in report.warnings if f.where == "data.eval" and "loss_msk" in f.message]
    assert "data.eval: keys that are not read: id (of records)" in report.notes
