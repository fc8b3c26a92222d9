"""Laws of every format: reading is pure and strict about types, and the record's answers are trained."""

import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.data import FORMATS
from qlora.data.conversations.build_example import Encoded
from qlora.data.conversations.encode_records import encode_chunk, read_messages
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, Record, RecordError, Unused

RECORDS = {  # of each format: the fields of a record, and its trained texts
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Count.", "history": [["Hi", "Ho"]]},
        ["Ho", "3"],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "Be brief."},
        ["Ho"],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        ["Ho"],
    ),
    "completion": ({"prompt": "Once", "completion": "upon"}, ["upon"]),
    "text": ({"text": "Once upon a time"}, ["Once upon a time"]),
    "tokens": ({"input_ids": [72, 105], "labels": [-100, 105]}, None),
    "preference": ({"prompt": "Once", "chosen": "upon", "rejected": "never"}, ["upon"]),
    "feedback": ({"prompt": "Once", "completion": "upon", "label": True}, ["upon"]),
}
WRONG = [None, 7, True, 1.5, [], {}, [7], [None], ["x"], [[["x"]]], {"a": 1}, "", " "]
EACH_FORMAT = pytest.mark.parametrize("kind", list(FORMATS))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


def make_record(fields: Mapping[str, Any]) -> Record:
    return Record("x:1", fields)


def test_every_format_has_a_record_here() -> None:
    assert set(RECORDS) == set(FORMATS)


@EACH_FORMAT
def test_a_format_matches_its_own_columns_and_auto_detects_it(kind: str) -> None:
    fields, _ = RECORDS[kind]
    also = ["completion"] if kind == "feedback" else []  # a label is read where the objective asks for one
    assert [name for name in FORMATS if FORMATS[name]().matches(fields)] == [*also, kind]
    first, second = (read_messages(make_record(fields), name) for name in (kind, "auto"))
    assert [m.role for m in first] == [m.role for m in second]


@EACH_FORMAT
def test_reading_a_record_does_not_change_it(kind: str) -> None:
    fields, _ = RECORDS[kind]
    before = copy.deepcopy(fields)
    first, second = (read_messages(make_record(fields), kind) for _ in range(2))
    assert fields == before
    assert [(m.role, m.content, m.train) for m in first] == [(m.role, m.content, m.train) for m in second]


@EACH_FORMAT
def test_the_trained_tokens_decode_to_the_answers(kind: str, encoder: Encoder) -> None:
    fields, answers = RECORDS[kind]
    example = encoder.encode("x:1", read_messages(make_record(fields), kind))
    trained = encoder.decode(example.labels[example.labels != IGNORED])
    assert answers is None or trained == "".join(f"{answer}<end>" for answer in answers)


@EACH_FORMAT
def test_a_field_that_is_not_read_is_reported_and_changes_nothing(kind: str, encoder: Encoder) -> None:
    fields, _ = RECORDS[kind]
    (plain, extended) = encode_chunk([make_record(fields), make_record({**fields, "loss_msk": [0]})], kind, encoder)
    assert isinstance(plain, Encoded) and plain.unused == Unused()
    assert isinstance(extended, Encoded) and extended.unused == Unused(fields=("loss_msk",))
    assert extended.example.labels.tolist() == plain.example.labels.tolist()


@EACH_FORMAT
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_field_of_the_wrong_type_is_refused_without_a_crash(kind: str, wrong: object, encoder: Encoder) -> None:
    """Each field in turn is replaced; what is still a record must be encoded without a crash."""
    for name in RECORDS[kind][0]:
        fields = {**RECORDS[kind][0], name: wrong}
        try:
            messages = read_messages(make_record(fields), kind)
        except RecordError as error:
            assert error.reason
            continue
        assert all(isinstance(message, Message) and isinstance(message.content, str) for message in messages)
        encoder.encode_batch([("x:1", messages)])


@EACH_FORMAT
def test_a_missing_field_is_refused_unless_it_is_optional(kind: str, encoder: Encoder) -> None:
    optional = {"input", "system", "history", "labels"}
    for name in set(RECORDS[kind][0]) - optional:
        fields = {key: value for key, value in RECORDS[kind][0].items() if key != name}
        with pytest.raises(RecordError, match=name):
            read_messages(make_record(fields), kind)


@EACH_FORMAT
def test_ten_thousand_damaged_records_are_each_trained_or_refused(kind: str, encoder: Encoder) -> None:
    draw = random.Random(kind)
    kept = refused = 0
    records = [damaged(RECORDS[kind][0], draw) for _ in range(10_000 // len(FORMATS))]
    items = []
    for fields in records:
        try:
            items.append(("x:1", read_messages(make_record(fields), kind)))
        except RecordError:
            refused += 1
    for result in encoder.encode_batch(items):
        kept += not isinstance(result, RecordError)
        refused += isinstance(result, RecordError)
    assert kept + refused == len(records) and kept and refused


def damaged(fields: Mapping[str, Any], draw: random.Random) -> Mapping[str, Any]:
    """The fields of a record with one value, at any depth, replaced or removed."""
    copied: Mapping[str, Any] = json.loads(json.dumps(fields))
    container, key = draw.choice(list(locations(copied)))
    junk = [None, 0, -5, True, "", "x", [], {}, [[]], {"role": "user"}, 10**12, {"from": "gpt", "value": None}]
    if draw.random() < 0.8:
        container[key] = draw.choice(junk)
    else:
        del container[key]
    return copied


def locations(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value` with each of its keys."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from locations(value[key])


def test_an_empty_answer_is_never_trained() -> None:
    for kind, fields in {
        "alpaca": {"instruction": "Add.", "output": "  "},
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "\n"}]},
        "completion": {"prompt": "Hi", "completion": ""},
    }.items():
        with pytest.raises(RecordError, match="empty answer"):
            read_messages(make_record(fields), kind)


def test_sharegpt_reads_all_roles_and_tool_calls() -> None:
    names = ["system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool", "gpt"]
    call = '{"name": "f", "arguments": {"a": 1}}'
    turns = [{"from": role, "value": call if role == "function_call" else role} for role in names]
    record = make_record({"conversations": turns, "tools": '[{"name": "f"}]'})
    messages = read_messages(record, "auto")
    roles = "tools system user assistant tool assistant user assistant tool assistant"
    assert [m.role for m in messages] == roles.split()
    assert messages[3].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[0].extra["tools"] == [{"name": "f"}]
    with pytest.raises(RecordError, match=r"unknown role.*Did you mean 'human'"):
        read_messages(make_record({"conversations": [{"from": "humann", "value": "x"}]}), "auto")


def test_messages_may_have_text_parts_and_train_flags() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts, "name": "Ada"}, {"role": "assistant", "content": "c", "train": False}]
    user, assistant = read_messages(make_record({"messages": turns}), "auto")
    assert user.content == "ab" and user.extra == {"name": "Ada"} and assistant.train is False
    with pytest.raises(RecordError, match="only text"):
        read_messages(make_record({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "auto")


def test_completion_reads_message_lists_and_question_answer_columns() -> None:
    lists = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
             "completion": [{"role": "assistant", "content": "a"}]}  # fmt: skip
    assert [m.role for m in read_messages(make_record(lists), "auto")] == ["system", "user", "assistant"]
    messages = read_messages(make_record({"question": "q", "answer": "a"}), "auto")
    assert [(m.role, m.content) for m in messages] == [("user", "q"), ("assistant", "a")]


def test_columns_of_no_format_are_named() -> None:
    with pytest.raises(RecordError, match="columns foo, bar"):
        read_messages(make_record({"foo": 1, "bar": 2}), "auto")
