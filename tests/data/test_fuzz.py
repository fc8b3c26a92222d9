"""Ten thousand broken lines of every format: each is trained, or named with file:line; no crash, hang or silence."""

import json
import random
import time

from support.tokenizers import tokenizer_of

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


def turn(draw: random.Random, role: str, content: str) -> dict:
    return {role: draw.choice(ROLES[:6] if draw.random() < 0.9 else ROLES), content: draw.choice(TEXTS)}


def row(draw: random.Random) -> dict:
    """A row of a format, as it should be or nearly so."""
    kind = draw.choice(["messages", "sharegpt", "alpaca", "completion", "text", "tokens"])
    text = [draw.choice(TEXTS) for _ in range(4)]
    pair = [{"role": "user", "content": text[0]}, {"role": "assistant", "content": text[1]}]
    if kind == "messages":
        odd = [turn(draw, "role", "content") for _ in range(draw.randrange(4))]
        return {"messages": pair if draw.random() < 0.5 else odd}
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


def spoilt(draw: random.Random, value):
    """The value with something in it replaced, taken away or put twice."""
    if isinstance(value, dict) and value and draw.random() < 0.7:
        key = draw.choice(list(value))
        change = draw.choice([{key: spoilt(draw, value[key])}, {key: draw.choice(ODD)}, {f"{key}x": value[key]}, {}])
        return {name: each for name, each in value.items() if name != key} | change
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], spoilt(draw, value[at]), *value[at + draw.choice([0, 1, 1]) :]]
    return draw.choice(ODD)


def line(draw: random.Random) -> bytes:
    made = row(draw)
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        made = spoilt(draw, made)
    raw = bytearray(json.dumps(made, ensure_ascii=draw.random() < 0.5).encode())
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        at = draw.randrange(len(raw))
        raw[at : at + draw.choice([0, 1])] = draw.choice([b"{", b'"', b"\\ud800", b"\0", b"NaN", b"9" * 5000, b"\xff"])
    return bytes(raw).replace(b"\n", b" ")


def test_ten_thousand_fuzzed_rows_are_each_trained_or_named(tmp_path):
    path, count, draw = tmp_path / "rows.jsonl", 10_000, random.Random(0)
    lines = [line(draw) for _ in range(count)]
    path.write_bytes(b"\n".join(lines))
    section = {"train": str(path), "max_length": 256, "packing": False, "eval_fraction": 0}
    started = time.monotonic()
    made = prepare(Data.model_validate(section), Encoder(tokenizer_of("bytes", "chatml")), 0)
    report, trained = made.report, [example.where for example in made.train]
    dropped = [found.where for found in (*report.problems, *report.warnings) if found.message.startswith("dropped")]
    expected = [f"{path}:{number}" for number, each in enumerate(lines, 1) if each.strip()]
    assert sorted([*trained, *dropped]) == sorted(expected)  # each in one of the two, once
    assert len(trained) == report.kept and sum(report.dropped.values()) == len(dropped)
    assert all(example.trained_tokens() for example in made.train)
    assert min(len(trained), len(dropped)) > count / 8 and len(report.dropped) >= 20  # the fuzz hits both sides
    assert time.monotonic() - started < 300
