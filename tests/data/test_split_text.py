"""Plain text above max_length is split: every token is trained exactly once, and a record stays on one side."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.command_line import qlora
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.batching.collate import collate
from qlora.data.batching.eval_split import LARGEST_FRACTION, eval_mask
from qlora.data.batching.split_text import split
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import Prepared, prepare
from qlora.data.preview import preview
from qlora.data.types import IGNORED, Example, Message

KINDS = ("bytes", "bytes_bos", "pieces", "unigram")


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {kind: Encoder(make_tokenizer(kind)) for kind in KINDS}


def write_texts(folder: Path, texts: Sequence[str], name: str = "records.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def prepared_of(path: Path, encoder: Encoder, **changes: Any) -> Prepared:
    section = {"train": str(path), "max_length": 64, "eval_fraction": 0, "packing": False, **changes}
    return prepare(Data.model_validate(section), encoder, 0)


def trained(examples: Sequence[Example]) -> list[int]:
    """The ids with loss of all examples, as the loss counts them: never the first token of a document."""
    batches = [collate([example], 0) for example in examples]
    return [int(label) for batch in batches for label in batch.labels[0] if label != IGNORED]


def check_pieces(whole: Example, pieces: Sequence[Example], max_length: int) -> None:
    assert all(len(piece) <= max_length for piece in pieces)
    assert trained(pieces) == trained([whole]) == whole.input_ids[1:].tolist()
    labels = [int(label) for piece in pieces for label in piece.labels if label != IGNORED]
    assert labels == [label for label in whole.labels if label != IGNORED]
    for before, after in pairwise(pieces):
        assert after.input_ids[0] == before.input_ids[-1] and len(before) == max_length


words = st.text("ab c\né😀", min_size=1, max_size=120).filter(str.strip)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(words, min_size=1, max_size=3), kind=st.sampled_from(KINDS), max_length=st.integers(2, 90))
def test_every_token_of_a_text_is_trained_once(
    texts: list[str], kind: str, max_length: int, tmp_path: Path, encoders: dict[str, Encoder]
) -> None:
    encoder = encoders[kind]
    wholes = [encoder.encode("x:1", [Message("text", text)]) for text in texts]
    path = write_texts(tmp_path, texts)
    packed, apart = (prepared_of(path, encoder, max_length=max_length, packing=flag) for flag in (True, False))
    for prepared in (packed, apart):
        report = prepared.report
        assert (report.rows, report.kept, report.dropped) == (len(texts), len(texts), {})
        assert report.tokens == sum(map(len, wholes))
        assert report.trained_tokens == sum(whole.trained_tokens() for whole in wholes)
        assert Counter(trained(prepared.train)) == Counter(trained(wholes))
        assert report.split == sum(len(whole) > max_length for whole in wholes)
        assert not any("dropped" in finding.message for finding in report.warnings)
    for number, whole in enumerate(wholes, 1):
        pieces = [example for example in apart.train if example.where.endswith(f":{number}")]
        check_pieces(whole, pieces, max_length)


def test_a_second_preparation_is_the_same(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    path = write_texts(tmp_path, ["word " * 200, "short", "other " * 100])
    one, two = (prepared_of(path, encoders["bytes"], packing=True, eval_fraction=0.3) for _ in range(2))
    for name in ("train", "eval"):
        examples, others = getattr(one, name), getattr(two, name)
        assert [e.input_ids.tolist() for e in examples] == [e.input_ids.tolist() for e in others]
    assert {**one.report.as_json(), "notes": 0} == {**two.report.as_json(), "notes": 0}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 400), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 9),
)
def test_no_record_is_on_both_sides(
    lengths: list[int], fraction: float, seed: int, tmp_path: Path, encoders: dict[str, Encoder]
) -> None:
    path = write_texts(tmp_path, [f"{i} " + "ab " * length for i, length in enumerate(lengths)])
    section = Data.model_validate({"train": str(path), "max_length": 32, "eval_fraction": fraction, "packing": False})
    prepared = prepare(section, encoders["bytes"], seed)
    train, held_out = ({example.where for example in examples} for examples in (prepared.train, prepared.eval))
    assert not train & held_out and len(train | held_out) == len(lengths) and prepared.report.overlap == 0
    total = len(prepared.train) + len(prepared.eval)
    limit = max(1, round(fraction * total))
    assert len(prepared.eval) <= limit or (len(held_out) == 1 and len(prepared.eval) <= LARGEST_FRACTION * total)


def test_where_every_text_is_long_the_shortest_is_held_out() -> None:
    keys = np.arange(20, dtype=np.uint64)
    pieces = np.full(20, 50)
    pieces[7] = 40
    assert np.flatnonzero(eval_mask(keys, pieces, 0.02, 0)).tolist() == [7]
    assert not eval_mask(keys[:2], pieces[:2], 0.02, 0).any()  # half of the data would be held out
    assert eval_mask(keys[:2], pieces[:2], 0.5, 0).sum() == 1
    assert not eval_mask(keys[:1], pieces[:1], 0.5, 0).any()


@pytest.mark.parametrize(("copies", "distinct", "held_out"), [(5, 20, 5), (2, 30, 2), (5, 4, 0), (40, 1, 0)])
def test_equal_records_are_held_out_together_or_a_warning_says_why_not(
    copies: int, distinct: int, held_out: int, tmp_path: Path, encoders: dict[str, Encoder]
) -> None:
    """Every group of equal records is larger than the fraction of 2 %."""
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"prompt": f"Q{i % distinct}", "completion": "A"}) for i in range(copies * distinct)]
    path.write_text("\n".join(lines))
    report = prepared_of(path, encoders["bytes"], eval_fraction=0.02, overlong="auto").report
    assert report.eval_rows == held_out and report.overlap == 0
    warnings = [finding.message for finding in report.warnings if finding.where == "data.eval_fraction"]
    assert len(warnings) == (held_out == 0), warnings
    if warnings:
        assert "nothing is held out" in warnings[0] and "data.eval" in warnings[0]
        assert (f"{copies} of {copies * distinct} examples" in warnings[0]) or distinct == 1


@pytest.mark.parametrize("overlong", ["auto", "split", "drop", "truncate", "error"])
def test_each_setting_treats_texts_and_conversations_as_it_says(
    overlong: str, tmp_path: Path, encoders: dict[str, Encoder]
) -> None:
    path, text, answer = tmp_path / "records.jsonl", "word " * 80, "long " * 80
    pair = {"prompt": "short", "completion": "short"}
    records = [{"text": text}, {"prompt": "short", "completion": answer}, pair, {"input_ids": [65] * 200}]
    path.write_text("\n".join(map(json.dumps, records)))
    report = prepared_of(path, encoders["bytes"], overlong=overlong).report
    kept = {"auto": (2, 1), "split": (3, 2), "drop": (1, 0), "truncate": (4, 0), "error": (1, 0)}[overlong]
    assert (report.kept, report.split) == kept and report.rows == 4
    assert report.dropped == ({"overlong": 4 - kept[0]} if kept[0] < 4 else {})
    assert bool(report.problems) == (overlong == "error")
    if overlong == "split":
        assert any("only plain text is split" in finding.message for finding in report.warnings)
    assert any("of text above max_length split into" in line for line in report.summary()) == (report.split > 0)


def test_labels_of_a_tokenized_record_are_split_with_it() -> None:
    ids = np.arange(10, dtype=np.int32)
    labels = np.where((ids > 2) & (ids < 6), ids, np.int32(IGNORED))
    pieces = split(Example("x:1", ids, labels), 4)
    assert [piece.input_ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert [piece.labels.tolist() for piece in pieces] == [[-100, -100, -100, 3], [-100, 4, 5, -100]]


def test_a_copy_of_a_long_text_is_one_duplicate(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    path = write_texts(tmp_path, ["word " * 100] * 2 + ["other " * 100])
    assert prepared_of(path, encoders["bytes"]).report.duplicates == 1
    weighted = prepared_of(path, encoders["bytes"], train=[{"path": str(path), "weight": 2}])
    assert len(weighted.train) == 2 * len(prepared_of(path, encoders["bytes"]).train)


def test_a_preview_shows_the_pieces(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    path, text = write_texts(tmp_path, ["word " * 100]), "word " * 100
    section = Data.model_validate({"train": str(path), "max_length": 64})
    whole = encoders["bytes"].encode("x:1", [Message("text", text)])
    rows = preview(section, encoders["bytes"], 100)
    labels = [label for row in rows for label in row["labels"] if label != IGNORED]
    assert len(rows) > 1 and labels == whole.input_ids.tolist()


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_book_is_trained_from_a_text_file(ends: str, tmp_path: Path, zoo: Any) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(ends.join(f"Line {number} of a book without a blank line." for number in range(300)).encode())
    (tmp_path / "r.yaml").write_text(f"model: {zoo('llama')}\ndata: {{train: {book}, max_length: 64}}\n")
    checked = qlora("check", tmp_path / "r.yaml", "--json").json
    data = checked["data"]
    assert checked["ok"] and (data["rows"], data["kept"], data["dropped"], data["split"]) == (1, 1, {}, 1)
    assert data["trained_tokens"] == data["tokens"] - 1 and data["pieces"] > 100
    assert any(f"split into {data['pieces']:,} pieces" in line for line in data["summary"])
    assert not any("will overfit" in warning["message"] for warning in checked["warnings"])
