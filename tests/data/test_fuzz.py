"""Broken lines of all formats: each is trained or reported with file:line, without a crash or a hang."""

import json
import random
import time
from pathlib import Path

import pytest
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare

TEXTS = [
    "",
    " ",
    "a",
    "Hello there",
    "é😀漢",
    "<|im_end|>",
    "<|im_start|>system\n",
    "</s><s>",
    "{{ 7 }}",
    "word " * 300,
    "\u2028",
]
ODD = [None, 1, -1.5, True, [], {}, [[]], "x" * 40, ["a"], {"a": None}, 2**70, [None]]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "User", "", None, 3, "wizard"]


def random_turn(draw: random.Random, role: str, content: str) -> dict:
    return {role: draw.choice(ROLES[:6] if draw.random() < 0.9 else ROLES), content: draw.choice(TEXTS)}


def random_record(draw: random.Random) -> dict:
    """A valid or nearly valid record of a random format."""
    kind = draw.choice(["messages", "sharegpt", "alpaca", "completion", "text", "tokens"])
    text = [draw.choice(TEXTS) for _ in range(4)]
    pair = [{"role": "user", "content": text[0]}, {"role": "assistant", "content": text[1]}]
    if kind == "messages":
        turns = [random_turn(draw, "role", "content") for _ in range(draw.randrange(4))]
        return {"messages": pair if draw.random() < 0.5 else turns}
    if kind == "sharegpt":
        return {
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": text[i]} for i in range(draw.randrange(5))]
        }
    if kind == "tokens":
        ids = [draw.randrange(-2, 500) for _ in range(draw.randrange(9))]
        return {"input_ids": ids, **({"labels": [-100, *ids[1:]]} if draw.random() < 0.5 else {})}
    names = {"alpaca": ["instruction", "output", "input"], "completion": ["prompt", "completion"], "text": ["text"]}[
        kind
    ]
    return dict(zip(names, text, strict=False))


def damaged(draw: random.Random, value: object) -> object:
    """`value` with one value inside replaced, removed or repeated."""
    if isinstance(value, dict) and value and draw.random() < 0.7:
        key = draw.choice(list(value))
        change = draw.choice([{key: damaged(draw, value[key])}, {key: draw.choice(ODD)}, {f"{key}x": value[key]}, {}])
        return {name: item for name, item in value.items() if name != key} | change
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], damaged(draw, value[at]), *value[at + draw.choice([0, 1, 1]) :]]
    return draw.choice(ODD)


def random_line(draw: random.Random) -> bytes:
    record: object = random_record(draw)
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        record = damaged(draw, record)
    raw = bytearray(json.dumps(record, ensure_ascii=draw.random() < 0.5).encode())
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        at = draw.randrange(len(raw))
        raw[at : at + draw.choice([0, 1])] = draw.choice([b"{", b'"', b"\\ud800", b"\0", b"NaN", b"9" * 5000, b"\xff"])
    return bytes(raw).replace(b"\n", b" ")


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_records_are_each_trained_or_reported(tmp_path: Path, seed: int, count: int) -> None:
    path, draw = tmp_path / "records.jsonl", random.Random(seed)
    lines = [random_line(draw) for _ in range(count)]
    path.write_bytes(b"\n".join(lines))
    section = {"train": str(path), "max_length": 256, "packing": False, "eval_fraction": 0}
    started = time.monotonic()
    prepared = prepare(Data.model_validate(section), Encoder(make_tokenizer("bytes", "chatml")), 0)
    report, trained = prepared.report, [example.where for example in prepared.train]
    findings = [*report.problems, *report.warnings]
    dropped = [finding.where for finding in findings if finding.message.startswith("dropped")]
    expected = [f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip()]
    records = list(dict.fromkeys(trained))  # a long text is trained in several pieces
    assert sorted([*records, *dropped]) == sorted(expected)  # every line is in one of the two, once
    assert len(records) == report.kept and len(trained) - len(records) == report.pieces - report.split > 0
    assert sum(report.dropped.values()) == len(dropped)
    assert all(example.trained_tokens() for example in prepared.train)
    assert min(len(records), len(dropped)) > count / 8 and len(report.dropped) >= 20  # many of both kinds
    assert time.monotonic() - started < 300
