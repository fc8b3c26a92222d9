"""Tools and tool calls: arguments reach a template in the form that it writes rightly, whatever form the file has."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer
from support.tool_templates import TEMPLATES, expected_call
from transformers import PreTrainedTokenizerFast

from qlora.data.conversations.encode_records import encode_chunk, read_messages
from qlora.data.conversations.encoder import Encoder
from qlora.data.types import IGNORED, Record, RecordError

EACH_FAMILY = pytest.mark.parametrize("family", TEMPLATES)


def with_template(template: object) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("bytes", "chatml")
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    copy.chat_template = template
    return copy


@cache
def build_encoder(family: str) -> Encoder:
    return Encoder(with_template(TEMPLATES[family]))


def record_of(*calls: Any, **fields: Any) -> Record:
    turns = [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
    ]
    return Record("x:1", {"messages": [*turns, {"role": "tool", "content": "12"},
                                       {"role": "assistant", "content": "Twelve."}], **fields})  # fmt: skip


def call_of(arguments: Any, name: str = "lookup") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def trained_text(encoder: Encoder, record: Record) -> str:
    example = encoder.encode(record.where, read_messages(record, "auto"))
    return encoder.decode(example.labels[example.labels != IGNORED])


@EACH_FAMILY
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "object"])
def test_a_call_is_written_as_the_template_means_it(family: str, as_text: bool) -> None:
    arguments = {"part": "bolt 7"}
    text = json.dumps(arguments)
    record = record_of(call_of(text if as_text else arguments))
    expected = expected_call(family, "lookup", text, arguments, text)
    assert trained_text(build_encoder(family), record) == f"{expected}<|im_end|>Twelve.<|im_end|>"


names = st.text("abcdef_", min_size=1, max_size=8)
texts = st.text("ab \"'{}\\é\n<>", min_size=1, max_size=8).filter(str.strip)
values = st.one_of(texts, st.integers(-99, 99), st.booleans(), st.none(), st.lists(st.integers(0, 9), max_size=2))


@pytest.mark.sample(of=4)
@EACH_FAMILY
@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(st.dictionaries(names, values, min_size=1, max_size=3), min_size=1, max_size=2))
def test_text_and_object_give_the_same_ids(family: str, arguments: list[dict[str, Any]]) -> None:
    """Also if one record has both forms, and several calls in a turn."""
    encoder = build_encoder(family)
    texts = [json.dumps(item, ensure_ascii=False) for item in arguments]
    forms = [texts, arguments, [texts[0], *arguments[1:]]]
    results = [encode_chunk([record_of(*map(call_of, form))], "auto", encoder)[0] for form in forms]
    ids = [None if isinstance(result, RecordError) else result.example.input_ids.tolist() for result in results]
    assert ids[0] is not None and ids[0] == ids[1] == ids[2], results
    if family in ("object", "whole"):
        dumped = json.dumps(arguments[0], ensure_ascii=False)
        assert dumped in encoder.decode(ids[0])


def test_no_arguments_are_an_empty_object_where_the_template_wants_one() -> None:
    for arguments in ("{}", "", {}):
        assert '"arguments": {}}' in trained_text(build_encoder("object"), record_of(call_of(arguments)))


def test_arguments_that_are_no_object_stay_as_they_are() -> None:
    assert '"arguments": "seven"}' in trained_text(build_encoder("object"), record_of(call_of("seven")))


def test_arguments_that_a_template_loses_are_refused() -> None:
    encoder = Encoder(with_template(TEMPLATES["joined"].replace("c.arguments", "''")))
    with pytest.raises(RecordError, match=r"does not write tool arguments: .* neither as text nor as an object"):
        encoder.encode("x:1", read_messages(record_of(call_of('{"part": "bolt 7"}')), "auto"))


def test_tools_and_calls_may_be_json_text() -> None:
    encoder = build_encoder("object")
    calls, tools = [call_of({"part": "bolt 7"})], [{"type": "function", "function": {"name": "lookup"}}]
    plain = record_of(*calls, tools=tools)
    in_text = Record("x:1", {**plain.fields, "tools": json.dumps(tools)})
    in_text.fields["messages"][1] = {"role": "assistant", "tool_calls": json.dumps(calls)}
    expected = encoder.encode("x:1", read_messages(plain, "auto")).input_ids
    assert encoder.encode("x:1", read_messages(in_text, "auto")).input_ids.tolist() == expected.tolist()


def test_the_older_names_of_openai_are_read() -> None:
    encoder, function = build_encoder("object"), {"name": "lookup", "arguments": '{"part": "bolt 7"}'}
    turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": None, "function_call": function},
             {"role": "function", "name": "lookup", "content": "12"}]  # fmt: skip
    record = Record("x:1", {"messages": turns, "functions": [{"name": "lookup", "parameters": {}}]})
    result = encode_chunk([record], "auto", encoder)[0]
    assert not isinstance(result, RecordError), result
    assert trained_text(encoder, record).startswith('<tool_call>{"name": "lookup", "arguments": {"part": "bolt 7"}}')
    text = encoder.decode(result.example.input_ids)
    assert '[{"type": "function", "function": {"name": "lookup", "parameters": {}}}]' in text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("not JSON", "message 2: tool_calls is a string that is not JSON"),
        (7, "message 2: tool_calls is int, a list of calls is expected"),
        ([7], "message 2: tool call 1 is int, an object with a name is expected"),
        ([{"function": None}], "message 2: tool call 1 is NoneType"),
        ([call_of({}), {"function": {"arguments": {}}}], "message 2: tool call 2 has no name"),
    ],
)
def test_calls_that_are_none_are_refused_with_the_reason(value: object, reason: str) -> None:
    turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "x", "tool_calls": value}]
    with pytest.raises(RecordError, match=reason):
        read_messages(Record("x:1", {"messages": turns}), "auto")


def test_calls_in_a_row_and_at_once_are_trained_in_sharegpt_records() -> None:
    one, two = (
        '{"name": "f", "arguments": {"a": 1}}',
        '[{"name": "g", "arguments": "{\\"b\\": 2}"}, {"name": "h", "arguments": {}}]',
    )
    values = [("human", "Go."), ("function_call", one), ("observation", "1"), ("function_call", two),
              ("observation", "2"), ("gpt", "Done.")]  # fmt: skip
    record = Record("x:1", {"conversations": [{"from": role, "value": value} for role, value in values]})
    call = '<tool_call>{"name": "%s", "arguments": %s}</tool_call>'
    expected = [call % ("f", '{"a": 1}'), call % ("g", '{"b": 2}') + call % ("h", "{}"), "Done."]
    assert trained_text(build_encoder("object"), record) == "".join(f"{text}<|im_end|>" for text in expected)
