"""Data preparation: every record is trained or reported, splits are disjoint, the report counts are right."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.paths import SHARED
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.data.preview import preview
from qlora.data.types import IGNORED, trained_tokens
from qlora.errors import DataError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer("bytes", "chatml"))


def write_records(folder: Path, records: Sequence[dict | str], name: str = "records.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def pairs(count: int, answer: str = "Answer") -> list[dict]:
    return [{"prompt": f"Question {i}", "completion": f"{answer} {i}"} for i in range(count)]


def section(path: Path, **settings: object) -> Data:
    return Data.model_validate({"train": str(path), "packing": False, "max_length": 256, **settings})


def reported(report: DataReport) -> set[str]:
    return {finding.where for finding in [*report.problems, *report.warnings]}


def test_every_record_is_trained_or_reported(tmp_path: Path, encoder: Encoder) -> None:
    records = [*pairs(3), '{"prompt": ', {"prompt": "x", "completion": None}, {"prompt": "x", "completion": ""},
            {"prompt": "x", "completion": "word " * 400}, {"other": 1}, "[1]", *pairs(2, "Other")]  # fmt: skip
    path = write_records(tmp_path, records)
    prepared = prepare(section(path, eval_fraction=0.0), encoder, 0)
    report = prepared.report
    assert report.rows == len(records) == report.kept + sum(report.dropped.values())
    kept = {example.where for example in prepared.train}
    assert {f"{path}:{n}" for n in range(1, len(records) + 1)} - kept <= reported(report)
    assert report.dropped == {
        "not JSON": 1, "null field": 1, "empty answer": 1, "overlong": 1, "no known format": 1, "not an object": 1,
    }  # fmt: skip
    assert [finding.where for finding in report.problems] == [f"{path}:4", f"{path}:9"]
    with pytest.raises(DataError, match=rf"{path}:4: dropped, not JSON"):
        report.raise_for_problems()


def test_clean_data_has_no_problems_and_exact_counts(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, pairs(120))
    prepared = prepare(section(path), encoder, 0)
    report = prepared.report
    report.raise_for_problems()
    assert (report.rows, report.kept, report.dropped, report.problems, report.warnings) == (120, 120, {}, [], [])
    examples = [*prepared.train, *prepared.eval]
    assert report.tokens == sum(len(example) for example in examples)
    assert report.trained_tokens == trained_tokens(examples)
    assert report.end_trained == 1.0 and sum(report.lengths.values()) == 120


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_a_fraction_of_the_examples_is_held_out_and_never_trained(
    tmp_path: Path, encoder: Encoder, count: int, fraction: float
) -> None:
    path = write_records(tmp_path, pairs(count))
    prepared = prepare(section(path, eval_fraction=fraction), encoder, 3)
    train, held = ({example.where for example in examples} for examples in (prepared.train, prepared.eval))
    assert not train & held and len(train | held) == count
    expected = 0 if fraction == 0 or count < 2 else min(max(1, round(fraction * count)), count - 1)
    assert len(held) == expected
    again = prepare(section(path, eval_fraction=fraction), encoder, 3)
    assert [example.where for example in again.eval] == [example.where for example in prepared.eval]


def test_another_seed_holds_out_other_examples(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, pairs(50))
    held = {tuple(e.where for e in prepare(section(path), encoder, seed).eval) for seed in range(4)}
    assert len(held) > 1


def test_equal_examples_are_all_trained_or_all_held_out(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, [*pairs(40), *pairs(40)])
    prepared = prepare(section(path, eval_fraction=0.2), encoder, 0)
    assert prepared.report.duplicates == 40 and prepared.report.overlap == 0 and len(prepared.eval) == 16
    assert any("the same as an earlier one" in finding.message for finding in prepared.report.warnings)


def test_all_of_an_eval_set_is_read_and_overlap_is_counted(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, pairs(30))
    held = write_records(tmp_path, [*pairs(3), *pairs(4, "New"), {"prompt": "x", "completion": ""}], "held.jsonl")
    prepared = prepare(Data.model_validate({"train": str(path), "eval": str(held), "packing": False}), encoder, 0)
    assert len(prepared.train) == 30 and len(prepared.eval) == 7 and prepared.report.overlap == 3
    assert f"{held}:8" in reported(prepared.report)


def test_weights_and_limits_are_per_source(tmp_path: Path, encoder: Encoder) -> None:
    one, two = write_records(tmp_path, pairs(10), "one.jsonl"), write_records(tmp_path, pairs(10, "Other"), "two.jsonl")
    sources = [{"path": str(one), "weight": 3}, {"path": str(two), "max_samples": 4, "format": "completion"}]
    prepared = prepare(Data.model_validate({"train": sources, "eval_fraction": 0.1, "packing": False}), encoder, 0)
    assert prepared.report.rows == prepared.report.kept == 14 and len(prepared.eval) == 1
    held = prepared.eval[0].where
    assert len(prepared.train) == 34 - (3 if held.startswith(str(one)) else 1)


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_overlong_examples_are_counted_under_every_policy(tmp_path: Path, encoder: Encoder, policy: str) -> None:
    long_answer = {"prompt": "short", "completion": "word " * 400}
    long_question = {"prompt": "word " * 400, "completion": "short"}
    path = write_records(tmp_path, [*pairs(5), long_answer, long_question])
    prepared = prepare(section(path, overlong=policy, eval_fraction=0), encoder, 0)
    report = prepared.report
    assert {f"{path}:6", f"{path}:7"} <= reported(report)
    assert all(len(example) <= 256 for example in prepared.train)
    if policy == "truncate":
        assert report.truncated == 1 and report.kept == 6 and report.dropped == {"nothing left to train": 1}
        assert report.end_trained == pytest.approx(5 / 6)
    else:
        assert report.kept == 5 and report.dropped == {"overlong": 2}
    assert bool(report.problems) == (policy == "error")


def test_packing_trains_the_same_tokens_in_fewer_sequences(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, pairs(60))
    apart, packed = (prepare(section(path, packing=flag), encoder, 0) for flag in (False, True))
    assert len(packed.train) < len(apart.train) / 4
    assert trained_tokens(packed.train) == trained_tokens(apart.train)
    origins = [origin for sequence in packed.train for origin in sequence.origins]
    assert sorted(origins) == sorted(example.where for example in apart.train)
    assert [e.where for e in packed.eval] == [e.where for e in apart.eval]


def test_data_without_trained_tokens_is_a_problem(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, [{"prompt": "x", "completion": ""}] * 3)
    report = prepare(section(path), encoder, 0).report
    assert "no records left of 3: empty answer 3" in report.problems[-1].message
    empty = write_records(tmp_path, ["", " "], "empty.jsonl")
    with pytest.raises(DataError, match="no records in this data set"):
        prepare(section(empty), encoder, 0)


def test_few_records_and_control_strings_are_reported(tmp_path: Path) -> None:
    encoder = Encoder(make_tokenizer("bytes", "qwen3"))
    texts = ["a", "b", "<|im_end|>\n<|im_start|>assistant\nc", "d"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    path = write_records(tmp_path, [{"messages": turns}])
    report = prepare(section(path), encoder, 0).report
    messages = "\n".join(f"{finding.where} {finding.message}" for finding in report.warnings)
    assert "1 record: will overfit" in messages
    assert f"{path}:1 control strings in the text, kept as text: '<|im_end|>', '<|im_start|>'" in messages
    assert (report.answers, report.trained_answers) == (2, 2)
    assert "answers trained: 2 of 2" in report.summary()
    assert report.control_rows == 1


def test_records_with_control_strings_are_each_reported(tmp_path: Path, encoder: Encoder) -> None:
    control = ["<|im_end|>", "<|im_start|>system", "</s>", "<s>"]
    records = [{"prompt": f"{i} {control[i % 4]}", "completion": f"ok {i}{control[i % 4]}"} for i in range(200)]
    prepared = prepare(section(write_records(tmp_path, records), eval_fraction=0), encoder, 0)
    assert prepared.report.control_rows == 200 == prepared.report.kept
    special = [id_ for id_, token in make_tokenizer("bytes", "chatml").added_tokens_decoder.items() if token.special]
    assert all(sum(int((e.input_ids == token).sum()) for token in special) == 4 for e in prepared.train)


def test_the_preview_shows_examples_as_they_are_trained(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, [*pairs(1), {"prompt": "Grüß 😀", "completion": "😀 é"}, '{"bad', {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}])  # fmt: skip
    examples = {example.where: example for example in prepare(section(path, eval_fraction=0), encoder, 0).train}
    shown = preview(section(path), encoder, 9)
    assert [item["where"] for item in shown] == [f"{path}:{n}" for n in (1, 2, 4)]
    for item in shown:
        assert item["input_ids"] == examples[item["where"]].input_ids.tolist()
        assert all(label in (IGNORED, token) for token, label in zip(item["input_ids"], item["labels"], strict=True))
        assert "".join(part["text"] for part in item["segments"]) == encoder.decode(item["input_ids"])
    trained = [[part["text"] for part in item["segments"] if part["trained"]] for item in shown]
    assert trained == [["Answer 0<|im_end|>"], ["😀 é<|im_end|>"], ["b<|im_end|>", "d<|im_end|>"]]
    assert len(preview(section(path), encoder, 2)) == 2
    json.dumps(shown)


def test_the_data_digest_depends_on_the_content(tmp_path: Path, encoder: Encoder) -> None:
    path = write_records(tmp_path, pairs(5))
    before = prepare(section(path), encoder, 0).report.sha256
    assert before == prepare(section(path), encoder, 1).report.sha256
    path.write_text(path.read_text().replace("Answer 3", "Answer 4"))
    assert before != prepare(section(path), encoder, 0).report.sha256


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_gsm8k_is_prepared_without_problems() -> None:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(SHARED / "stories260K"))
    source = {"path": str(SHARED / "gsm8k" / "test.jsonl"), "max_samples": 300}
    report = prepare(Data.model_validate({"train": source, "max_length": 4096}), encoder, 0).report
    assert report.kept == 300 and not report.problems and report.end_trained == 1.0
