"""Loss keys: every key by which a tool masks a message is honored in every format, and never reaches the template."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer

from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk, read_messages
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading.loss_keys import MESSAGE_KEYS, RECORD_KEYS, TOKEN_KEYS
from qlora.data.types import IGNORED, Record, RecordError

# Writes every key of a message, so that a key which reaches the template shows in the ids.
SHOWS_KEYS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.keys() | sort | join(',') + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant content,role\n' }}{% endif %}"
)
KEYS = ("weight", "loss", "train", "training", "trainable", "masked", "loss_mask", "loss_weight", "step_loss_mask",
        "loss_scale")  # fmt: skip
FLAGS = {True: (True, 1, 1.0), False: (False, 0, 0.0)}
ANSWERS = ("Wrong one.", "Good one.", "Better one.")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Encoder]:
    path = tmp_path_factory.mktemp("template") / "shows_keys.jinja"
    path.write_text(SHOWS_KEYS)
    return {on: Encoder(make_tokenizer("bytes", "chatml"), on, str(path)) for on in ("assistant", "last", "all")}


def encode(encoder: Encoder, fields: Mapping[str, Any]) -> Encoded:
    result = encode_chunk([Record("x:1", fields)], "auto", encoder)[0]
    assert isinstance(result, Encoded), result
    return result


def trained_answers(encoder: Encoder, fields: Mapping[str, Any]) -> list[str]:
    encoded = encode(encoder, fields)
    labels = encoded.example.labels
    trained = encoder.decode(labels[labels != IGNORED])
    text = encoder.decode(encoded.example.input_ids)
    assert not any(key in text for key in (*MESSAGE_KEYS, "from", "value")), text
    return [answer for answer in ANSWERS if f"{answer}<|im_end|>" in trained]


def conversation(kind: str, flags: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of a format; `flags` are the keys of its answers."""
    names = ("from", "value", "human", "gpt") if kind == "sharegpt" else ("role", "content", "user", "assistant")
    role, content, user, assistant = names
    turns = []
    for number, (answer, keys) in enumerate(zip(ANSWERS, flags, strict=False)):
        turns += [{role: user, content: f"Question {number}?"}, {role: assistant, content: answer, **keys}]
    if kind == "completion":
        return {"prompt": turns[:1], "completion": turns[1:]}
    return {"conversations" if kind == "sharegpt" else "messages": turns}


EACH_KIND = pytest.mark.parametrize("kind", ["messages", "sharegpt", "completion"])


def test_every_key_of_the_table_is_tested_here() -> None:
    assert set(KEYS) == set(MESSAGE_KEYS)


@EACH_KIND
@pytest.mark.parametrize("key", KEYS)
def test_each_key_masks_its_message(key: str, kind: str, encoders: Mapping[str, Encoder]) -> None:
    for wrong in FLAGS[key == "masked"]:
        fields = conversation(kind, [{key: wrong}, {key: not wrong}, {}])
        assert trained_answers(encoders["assistant"], fields) == list(ANSWERS[1:])
        assert trained_answers(encoders["all"], fields) == list(ANSWERS[1:])
        assert trained_answers(encoders["last"], fields) == list(ANSWERS[1:])


def test_the_record_of_the_report_trains_the_good_answer_alone(encoders: Mapping[str, Encoder]) -> None:
    turns = [("user", "Ping?"), ("assistant", "WRONG"), ("user", "Sure?"), ("assistant", "Good one.")]
    for key in ("messages", "conversations"):
        names = ("role", "content") if key == "messages" else ("from", "value")
        items = [{names[0]: role, names[1]: text} for role, text in turns]
        items[1]["weight"], items[3]["weight"] = 0, 1
        labels = encode(encoders["assistant"], {key: items}).example.labels
        assert encoders["assistant"].decode(labels[labels != IGNORED]) == "Good one.<|im_end|>"


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["messages", "sharegpt", "completion"]))
def test_a_conversation_trains_what_its_keys_say(data: st.DataObject, kind: str, encoders: Mapping) -> None:
    """Several agreeing keys in a message, in any combination, with and without the record's own list."""
    wanted = [data.draw(st.sampled_from([True, False, None])) for _ in ANSWERS]
    flags = [draw_keys(data, flag) for flag in wanted]
    fields = conversation(kind, flags)
    if data.draw(st.booleans()) and kind != "completion":
        wanted = [data.draw(st.booleans()) if flag is None else flag for flag in wanted]
        values = [data.draw(st.sampled_from(FLAGS[flag])) for flag in wanted]
        mask = [value for flag in values for value in (0, flag)]
        fields[data.draw(st.sampled_from(RECORD_KEYS))] = mask
    expected = [answer for answer, flag in zip(ANSWERS, wanted, strict=True) if flag is not False]
    if expected:
        assert trained_answers(encoders["assistant"], fields) == expected
    else:
        result = encode_chunk([Record("x:1", fields)], "auto", encoders["assistant"])[0]
        assert isinstance(result, RecordError) and result.reason == "nothing to train"


def draw_keys(data: st.DataObject, flag: bool | None) -> dict[str, Any]:
    keys = data.draw(st.lists(st.sampled_from(KEYS), unique=True, min_size=0 if flag is None else 1, max_size=3))
    value = {key: (flag == MESSAGE_KEYS[key]) if flag is not None else None for key in keys}
    return {key: item if item is None else data.draw(st.sampled_from(FLAGS[item])) for key, item in value.items()}


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_a_list_of_the_record_masks_messages_in_every_format(key: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["assistant"]
    for kind in ("messages", "sharegpt", "completion"):
        assert trained_answers(encoder, {**conversation(kind, [{}] * 3), key: [0, 0, 0, 1, False, True]}) == list(
            ANSWERS[1:]
        )
    alpaca = {"instruction": "Question?", "output": ANSWERS[1], "history": [["Question 0?", ANSWERS[0]]]}
    assert trained_answers(encoder, {**alpaca, key: [0, 0, 0, 1]}) == [ANSWERS[1]]
    with_system = {**alpaca, "system": "Be brief.", key: [0, 1, 0, 0]}
    assert trained_answers(encoder, with_system) == [ANSWERS[0]]
    assert trained_answers(encoder, {**with_system, key: [0, 0, 1, 0, 0]}) == [ANSWERS[0]]


@pytest.mark.parametrize(
    ("keys", "extra", "reason"),
    [
        ({"weight": 0, "train": True}, {}, r"contradictory loss keys: message 2: train: True and weight: 0"),
        ({"masked": True, "loss": 1}, {}, "contradictory loss keys: message 2: loss: 1 and masked: True"),
        ({"weight": 0}, {"loss_mask": [0, 1]}, "contradictory loss keys: message 2: loss_mask is 1"),
        ({"weight": 0.5}, {}, r"loss weight: message 2: weight is 0.5; a message bears loss or not. Allowed: true"),
        ({"loss_weight": 2}, {}, "loss weight: message 2: loss_weight is 2"),
        ({"loss": -1}, {}, "loss weight: message 2: loss is -1"),
        ({"train": "no"}, {}, r"wrong type: message 2: train is 'no'. Allowed: true, false, 1, 0"),
        ({"loss_mask": [1, 0]}, {}, r"wrong type: message 2: loss_mask is \[1, 0\]"),
        ({"train_detail": [{"begin_offset": 0}]}, {}, "loss mask of a part: message 2: train_detail"),
        ({}, {"loss_mask": [1]}, "loss mask does not fit: loss_mask has 1 flags for 2 messages"),
        ({}, {"loss_mask": 0}, "wrong type: loss_mask of the record is int"),
        ({}, {"loss_mask": [0, 0.3]}, r"loss weight: loss_mask\[1\] is 0.3"),
    ],
)
def test_keys_that_can_not_be_followed_are_refused(keys: dict, extra: dict, reason: str) -> None:
    for kind in ("messages", "sharegpt"):
        fields = conversation(kind, [keys]) | extra
        with pytest.raises(RecordError, match=reason):
            read_messages(Record("x:1", fields), "auto")


def test_a_masked_question_is_refused_where_all_is_trained(encoders: Mapping[str, Encoder]) -> None:
    fields = conversation("messages", [{}])
    fields["messages"][0]["masked"] = True
    result = encode_chunk([Record("x:1", fields)], "auto", encoders["all"])[0]
    assert isinstance(result, RecordError) and "message 1 (user) is masked, and data.train_on: all" in result.detail
    assert trained_answers(encoders["assistant"], fields) == [ANSWERS[0]]


def test_an_answer_in_a_prompt_bears_loss_if_it_asks_for_it(encoders: Mapping[str, Encoder]) -> None:
    turns = conversation("messages", [{}, {"weight": 1}, {}])["messages"]
    fields = {"prompt": turns[:5], "completion": turns[5:]}
    assert trained_answers(encoders["assistant"], fields) == list(ANSWERS[1:])
    assert trained_answers(encoders["all"], fields) == list(ANSWERS)


@pytest.mark.parametrize("key", TOKEN_KEYS)
def test_masks_of_tokens_stand_for_labels(key: str, encoders: Mapping[str, Encoder]) -> None:
    encoder, fields = encoders["assistant"], {"input_ids": [65, 66, 67, 68], key: [0, 0, 1, True]}
    assert encode(encoder, fields).example.labels.tolist() == [-100, -100, 67, 68]
    with_labels = {**fields, "labels": [-100, -100, -100, 68]}
    assert encode(encoder, with_labels).example.labels.tolist() == [-100, -100, -100, 68]
    for wrong, reason in (({"labels": [65, 66, 67, 68]}, "contradictory"), ({key: [1, 1]}, "2 flags for 4 input_ids"),
                          ({key: 1}, "int for 4"), ({key: [0, 0, 0.5, 1]}, "loss weight")):  # fmt: skip
        with pytest.raises(RecordError, match=reason):
            read_messages(Record("x:1", {**fields, **wrong}), "auto")


def test_all_masks_of_a_tokenized_record_hold(encoders: Mapping[str, Encoder]) -> None:
    fields = {"input_ids": [65, 66, 67], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}
    assert encode(encoders["assistant"], fields).example.labels.tolist() == [-100, -100, 67]
