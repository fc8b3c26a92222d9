"""A Parquet file gives the ids of the JSON lines of the same records, although Arrow fills missing keys with null."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer
from support.tool_templates import TEMPLATES

from qlora.data import Source
from qlora.data.conversations.encode_records import encode_chunk
from qlora.data.conversations.encoder import Encoder
from qlora.data.reading import source
from qlora.data.reading.arrow_nulls import without_filled_nulls
from qlora.data.types import Record, RecordError

TYPES = {"city": "string", "when": "string", "count": "integer", "fast": "boolean"}  # of each parameter's name
VALUES = {"string": st.text('abc "é', min_size=1, max_size=4), "integer": st.integers(0, 9), "boolean": st.booleans()}


@cache
def build_encoder(folder: Path) -> Encoder:
    path = folder / "template.jinja"
    path.write_text(TEMPLATES["object"])
    return Encoder(make_tokenizer("bytes", "chatml"), "assistant", str(path))


def ids_of(path: Path, encoder: Encoder) -> list[list[int]]:
    records = list(source.read_sources([Source(path=str(path))], seed=0))
    assert all(isinstance(record, Record) for record in records), records
    results = encode_chunk(records, "auto", encoder)
    assert not any(isinstance(result, RecordError) for result in results), results
    return [result.example.input_ids.tolist() for result in results if result and not isinstance(result, RecordError)]


def write_both(folder: Path, records: Sequence[dict]) -> tuple[Path, Path]:
    lines, table = folder / "records.jsonl", folder / "records.parquet"
    lines.write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(list(records)), table)
    return lines, table


def record_of(name: str, properties: dict[str, Any], arguments: dict[str, Any], **schema: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": {"type": "object", "properties": properties, **schema}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


@st.composite
def generated_records(draw: st.DrawFn) -> dict[str, Any]:
    names = [name for name in TYPES if draw(st.booleans())] or ["city"]  # in one order: Arrow keeps no other
    properties = {}
    for name in names:
        schema: dict[str, Any] = {"type": TYPES[name]}
        if draw(st.booleans()):
            schema["description"] = draw(VALUES["string"])
        if draw(st.booleans()):
            schema["enum"] = draw(st.lists(st.one_of(st.none(), VALUES[TYPES[name]]), min_size=1, max_size=3))
        if name == "when":
            schema["default"] = None  # always null: the user's own
        elif draw(st.booleans()):
            schema["default"] = draw(VALUES[TYPES[name]])
        properties[name] = schema
    given_names = [name for name in names if draw(st.booleans())] or names
    arguments = {name: draw(VALUES[TYPES[name]]) for name in given_names}
    required = {"required": given_names} if draw(st.booleans()) else {}
    return record_of(draw(st.sampled_from(["look", "find"])), properties, arguments, **required)


def full_record() -> dict[str, Any]:
    """A record with every key that another one may have."""
    values = {"string": "a", "integer": 1, "boolean": True}
    properties = {
        name: {"type": kind, "description": "a", "enum": [values[kind]], "default": values[kind]}
        for name, kind in TYPES.items()
    }
    properties["when"]["default"] = None
    arguments = {name: values[kind] for name, kind in TYPES.items()}
    return record_of("look", properties, arguments, required=list(TYPES))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(generated_records(), min_size=2, max_size=4))
def test_parquet_and_json_lines_give_the_same_ids(records: list[dict], tmp_path: Path) -> None:
    lines, table = write_both(tmp_path, [full_record(), *records])
    encoder = build_encoder(tmp_path)
    assert ids_of(table, encoder) == ids_of(lines, encoder)


def test_the_records_of_the_report_give_the_same_ids(tmp_path: Path) -> None:
    city = {"city": {"type": "string", "default": None, "enum": ["Oslo", None]}}
    numbers = {"a": {"type": "integer"}, "b": {"type": "integer"}}
    records = [record_of("weather", city, {"city": "Oslo"}), record_of("add", numbers, {"a": 1, "b": 2})]
    lines, table = write_both(tmp_path, records)
    encoder = build_encoder(tmp_path)
    ids = ids_of(table, encoder)
    assert ids == ids_of(lines, encoder)
    text = encoder.decode(ids[0])
    assert '"arguments": {"city": "Oslo"}' in text and '"default": null, "enum": ["Oslo", null]' in text
    assert '"arguments": {"a": 1, "b": 2}' in encoder.decode(ids[1]) and "null" not in encoder.decode(ids[1])


def test_nulls_that_json_lines_have_stay(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record_of("look", {"a": None}, {"a": None, "b": [None]})))
    encoder = build_encoder(tmp_path)
    text = encoder.decode(ids_of(path, encoder)[0])
    assert '"arguments": {"a": null, "b": [null]}' in text and '"properties": {"a": null}' in text


def test_messages_and_parts_lose_filled_keys_too(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Go"}, {"type": "text", "value": "!"}]
    records = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1], "weight": 1}]},
        {"messages": [{"role": "user", "content": parts[:1], "name": "Ada"}, {"role": "assistant", "content": parts}]},
    ]
    lines, table = write_both(tmp_path, records)
    encoder = build_encoder(tmp_path)
    assert ids_of(table, encoder) == ids_of(lines, encoder)


@pytest.mark.parametrize("typed", [True, False])
def test_columns_members_of_lists_and_json_stay(typed: bool) -> None:
    text, integer = datasets.Value("string"), datasets.Value("int64")
    features = {
        "text": text,
        "list": datasets.List(integer),
        "object": {"a": integer, "default": integer, "nested": {"b": text}},
        "schema": {"default": datasets.Value("null"), "properties": {"default": datasets.Value("null")}},
    }
    fields = {
        "text": None,
        "list": [None, 1],
        "object": {"a": None, "default": None, "nested": {"b": None}},
        "schema": {"default": None, "properties": {"default": None}},
    }
    pruned = without_filled_nulls(fields, datasets.Features(features) if typed else None)
    expected = {"text": None, "list": [None, 1], "schema": {"default": None, "properties": {}}}
    assert pruned == {**expected, "object": {"nested": {}} if typed else {"default": None, "nested": {}}}
    as_json = datasets.Features({"object": datasets.Json()})
    assert without_filled_nulls({"object": {"a": None}}, as_json) == {"object": {"a": None}}
