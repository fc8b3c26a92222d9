"""Laws of every format in the table: pure, strict about types, and its answers are what gets trained."""

import copy
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.data import FORMATS
from qlora.data.conversations.encode_records import messages_of
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Message, Record, RecordError

ROWS = {  # format: a row, and what is trained of it
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
}
WRONG = [None, 7, True, 1.5, [], {}, [7], [None], ["x"], [[["x"]]], {"a": 1}, "", " "]
EACH = pytest.mark.parametrize("kind", list(FORMATS))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, "<end>"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


def row_of(fields) -> Record:
    return Record("here:1", fields)


def test_every_format_has_a_row_here():
    assert set(ROWS) == set(FORMATS)


@EACH
def test_a_format_recognises_its_own_columns_and_auto_finds_it(kind):
    fields, _ = ROWS[kind]
    assert [name for name in FORMATS if FORMATS[name]().matches(fields)] == [kind]
    first, second = (messages_of(row_of(fields), name) for name in (kind, "auto"))
    assert [m.role for m in first] == [m.role for m in second]


@EACH
def test_reading_a_row_changes_nothing(kind):
    fields, _ = ROWS[kind]
    before = copy.deepcopy(fields)
    first, second = (messages_of(row_of(fields), kind) for _ in range(2))
    assert fields == before
    assert [(m.role, m.content, m.train) for m in first] == [(m.role, m.content, m.train) for m in second]


@EACH
def test_the_trained_tokens_decode_to_what_the_row_says(kind, encoder):
    fields, said = ROWS[kind]
    example = encoder.encode("here:1", messages_of(row_of(fields), kind))
    trained = encoder.decode(example.labels[example.labels != IGNORED])
    assert said is None or trained == "".join(f"{answer}<end>" for answer in said)


@EACH
@pytest.mark.parametrize(
    "wrong", [None, 7, True, 1.5, [], {}, [7], [None], ["x"], [[["x"]]], {"a": 1}, "", " "], ids=repr
)
def test_a_field_of_the_wrong_kind_is_refused_never_a_crash(kind, wrong, encoder):
    """Each field in turn is replaced; what still is a row must train the row's own words."""
    for name in ROWS[kind][0]:
        fields = {**ROWS[kind][0], name: wrong}
        try:
            messages = messages_of(row_of(fields), kind)
        except RecordError as error:
            assert error.reason
            continue
        assert all(isinstance(message, Message) and isinstance(message.content, str) for message in messages)
        encoder.encode_all([("here:1", messages)])


@EACH
def test_a_missing_field_is_refused_unless_it_is_optional(kind, encoder):
    optional = {"input", "system", "history", "labels"}
    for name in set(ROWS[kind][0]) - optional:
        fields = {key: value for key, value in ROWS[kind][0].items() if key != name}
        with pytest.raises(RecordError, match=name):
            messages_of(row_of(fields), kind)


@EACH
def test_ten_thousand_spoilt_rows_are_each_trained_or_refused(kind, encoder):
    draw = random.Random(kind)
    kept = refused = 0
    rows = [spoilt(ROWS[kind][0], draw) for _ in range(10_000 // len(FORMATS))]
    read = []
    for fields in rows:
        try:
            read.append(("here:1", messages_of(row_of(fields), kind)))
        except RecordError:
            refused += 1
    for made in encoder.encode_all(read):
        kept += not isinstance(made, RecordError)
        refused += isinstance(made, RecordError)
    assert kept + refused == len(rows) and kept and refused


def spoilt(fields, draw: random.Random):
    """A row with one value, however deep, replaced, removed or doubled."""
    made = json.loads(json.dumps(fields))
    spots = list(places(made))
    holder, key = draw.choice(spots)
    junk = [None, 0, -5, True, "", "x", [], {}, [[]], {"role": "user"}, 10**12, {"from": "gpt", "value": None}]
    if draw.random() < 0.8:
        holder[key] = draw.choice(junk)
    else:
        del holder[key]
    return made


def places(value):
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_an_empty_answer_is_never_learnt():
    for kind, fields in {
        "alpaca": {"instruction": "Add.", "output": "  "},
        "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "\n"}]},
        "completion": {"prompt": "Hi", "completion": ""},
    }.items():
        with pytest.raises(RecordError, match="empty answer"):
            messages_of(row_of(fields), kind)


def test_sharegpt_knows_its_roles_and_tool_calls():
    said = ["system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool", "gpt"]
    call = '{"name": "f", "arguments": {"a": 1}}'
    turns = [{"from": role, "value": call if role == "function_call" else role} for role in said]
    row = row_of({"conversations": turns, "tools": '[{"name": "f"}]'})
    messages = messages_of(row, "auto")
    roles = "tools system user assistant tool assistant user assistant tool assistant"
    assert [m.role for m in messages] == roles.split()
    assert messages[3].extra["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[0].extra["tools"] == [{"name": "f"}]
    with pytest.raises(RecordError, match=r"unknown role.*Did you mean 'human'"):
        messages_of(row_of({"conversations": [{"from": "humann", "value": "x"}]}), "auto")


def test_messages_take_text_parts_and_train_flags():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts, "name": "Ada"}, {"role": "assistant", "content": "c", "train": False}]
    user, assistant = messages_of(row_of({"messages": turns}), "auto")
    assert user.content == "ab" and user.extra == {"name": "Ada"} and assistant.train is False
    with pytest.raises(RecordError, match="only text"):
        messages_of(row_of({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "auto")


def test_completion_takes_message_lists_and_question_answer_columns():
    lists = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
             "completion": [{"role": "assistant", "content": "a"}]}  # fmt: skip
    assert [m.role for m in messages_of(row_of(lists), "auto")] == ["system", "user", "assistant"]
    asked = messages_of(row_of({"question": "q", "answer": "a"}), "auto")
    assert [(m.role, m.content) for m in asked] == [("user", "q"), ("assistant", "a")]


def test_columns_that_fit_no_format_are_named():
    with pytest.raises(RecordError, match="columns foo, bar"):
        messages_of(row_of({"foo": 1, "bar": 2}), "auto")
