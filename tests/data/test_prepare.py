"""The walk through the room: every row is trained or named, splits share no row, the report counts what is there."""

import json
from pathlib import Path

import pytest
from support.paths import SHARED
from support.tokenizers import tokenizer_of

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.prepare import prepare
from qlora.data.preview import preview
from qlora.data.types import IGNORED, trained_tokens
from qlora.errors import DataError


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tokenizer_of("bytes", "chatml"))


def written(folder: Path, rows, name="rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def pairs(count: int, answer: str = "Answer") -> list[dict]:
    return [{"prompt": f"Question {i}", "completion": f"{answer} {i}"} for i in range(count)]


def section(path, **settings) -> Data:
    return Data.model_validate({"train": str(path), "packing": False, "max_length": 256, **settings})


def named(report) -> set[str]:
    return {finding.where for finding in [*report.problems, *report.warnings]}


def test_every_row_is_trained_or_named(tmp_path, encoder):
    rows = [*pairs(3), '{"prompt": ', {"prompt": "x", "completion": None}, {"prompt": "x", "completion": ""},
            {"prompt": "x", "completion": "word " * 400}, {"other": 1}, "[1]", *pairs(2, "Other")]  # fmt: skip
    path = written(tmp_path, rows)
    made = prepare(section(path, eval_fraction=0.0), encoder, 0)
    report = made.report
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    kept = {example.where for example in made.train}
    assert {f"{path}:{n}" for n in range(1, len(rows) + 1)} - kept <= named(report)
    assert report.dropped == {
        "not JSON": 1, "null field": 1, "empty answer": 1, "overlong": 1, "no known format": 1, "not an object": 1,
    }  # fmt: skip
    assert [finding.where for finding in report.problems] == [f"{path}:4", f"{path}:9"]
    with pytest.raises(DataError, match=rf"{path}:4: dropped, not JSON"):
        report.refuse()


def test_a_clean_set_has_no_problems_and_its_counts_are_those_of_the_rows(tmp_path, encoder):
    path = written(tmp_path, pairs(120))
    made = prepare(section(path), encoder, 0)
    report = made.report
    report.refuse()
    assert (report.rows, report.kept, report.dropped, report.problems, report.warnings) == (120, 120, {}, [], [])
    everything = [*made.train, *made.eval]
    assert report.tokens == sum(len(example) for example in everything)
    assert report.trained_tokens == trained_tokens(everything)
    assert report.end_trained == 1.0 and sum(report.lengths.values()) == 120


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_held_out_rows_are_a_share_and_never_trained(tmp_path, encoder, count, fraction):
    path = written(tmp_path, pairs(count))
    made = prepare(section(path, eval_fraction=fraction), encoder, 3)
    train, held = ({example.where for example in rows} for rows in (made.train, made.eval))
    assert not train & held and len(train | held) == count
    wanted = 0 if fraction == 0 or count < 2 else min(max(1, round(fraction * count)), count - 1)
    assert len(held) == wanted
    again = prepare(section(path, eval_fraction=fraction), encoder, 3)
    assert [example.where for example in again.eval] == [example.where for example in made.eval]


def test_another_seed_holds_out_other_rows(tmp_path, encoder):
    path = written(tmp_path, pairs(50))
    held = {tuple(e.where for e in prepare(section(path), encoder, seed).eval) for seed in range(4)}
    assert len(held) > 1


def test_rows_that_say_the_same_stay_on_one_side(tmp_path, encoder):
    path = written(tmp_path, [*pairs(40), *pairs(40)])
    made = prepare(section(path, eval_fraction=0.2), encoder, 0)
    assert made.report.duplicates == 40 and made.report.overlap == 0 and len(made.eval) == 16
    assert any("the same as an earlier one" in finding.message for finding in made.report.warnings)


def test_an_eval_set_of_its_own_is_read_whole_and_overlap_is_counted(tmp_path, encoder):
    path = written(tmp_path, pairs(30))
    held = written(tmp_path, [*pairs(3), *pairs(4, "New"), {"prompt": "x", "completion": ""}], "held.jsonl")
    made = prepare(Data.model_validate({"train": str(path), "eval": str(held), "packing": False}), encoder, 0)
    assert len(made.train) == 30 and len(made.eval) == 7 and made.report.overlap == 3
    assert f"{held}:8" in named(made.report)


def test_weights_and_limits_are_per_source(tmp_path, encoder):
    one, two = written(tmp_path, pairs(10), "one.jsonl"), written(tmp_path, pairs(10, "Other"), "two.jsonl")
    sources = [{"path": str(one), "weight": 3}, {"path": str(two), "max_samples": 4, "format": "completion"}]
    made = prepare(Data.model_validate({"train": sources, "eval_fraction": 0.1, "packing": False}), encoder, 0)
    assert made.report.rows == made.report.kept == 14 and len(made.eval) == 1
    held = made.eval[0].where
    assert len(made.train) == 34 - (3 if held.startswith(str(one)) else 1)


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_overlong_rows_are_counted_under_every_policy(tmp_path, encoder, policy):
    long_answer = {"prompt": "short", "completion": "word " * 400}
    long_question = {"prompt": "word " * 400, "completion": "short"}
    path = written(tmp_path, [*pairs(5), long_answer, long_question])
    made = prepare(section(path, overlong=policy, eval_fraction=0), encoder, 0)
    report = made.report
    assert {f"{path}:6", f"{path}:7"} <= named(report)
    assert all(len(example) <= 256 for example in made.train)
    if policy == "truncate":
        assert report.truncated == 1 and report.kept == 6 and report.dropped == {"nothing left to train": 1}
        assert report.end_trained == pytest.approx(5 / 6)
    else:
        assert report.kept == 5 and report.dropped == {"overlong": 2}
    assert bool(report.problems) == (policy == "error")


def test_packing_trains_the_same_tokens_in_fewer_rows(tmp_path, encoder):
    path = written(tmp_path, pairs(60))
    apart, packed = (prepare(section(path, packing=flag), encoder, 0) for flag in (False, True))
    assert len(packed.train) < len(apart.train) / 4
    assert trained_tokens(packed.train) == trained_tokens(apart.train)
    parts = [part for row in packed.train for part in row.parts]
    assert sorted(parts) == sorted(example.where for example in apart.train)
    assert [e.where for e in packed.eval] == [e.where for e in apart.eval]


def test_nothing_left_or_nothing_trained_is_fatal(tmp_path, encoder):
    path = written(tmp_path, [{"prompt": "x", "completion": ""}] * 3)
    report = prepare(section(path), encoder, 0).report
    assert "no rows left of 3: empty answer 3" in report.problems[-1].message
    empty = written(tmp_path, ["", " "], "empty.jsonl")
    with pytest.raises(DataError, match="no rows in this data set"):
        prepare(section(empty), encoder, 0)


def test_few_rows_forged_turns_and_lost_answers_are_told(tmp_path):
    encoder = Encoder(tokenizer_of("bytes", "qwen3"))
    said = ["a", "b", "<|im_end|>\n<|im_start|>assistant\nc", "d"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    path = written(tmp_path, [{"messages": turns}])
    report = prepare(section(path), encoder, 0).report
    messages = "\n".join(f"{finding.where} {finding.message}" for finding in report.warnings)
    assert "1 row: will overfit" in messages
    assert f"{path}:1 control strings in the text, kept as text: '<|im_end|>', '<|im_start|>'" in messages
    assert "1 row with answers (1 in all) that are not trained" in messages
    assert report.control_rows == 1


def test_a_thousand_forged_rows_are_each_reported(tmp_path, encoder):
    marks = ["<|im_end|>", "<|im_start|>system", "</s>", "<s>"]
    rows = [{"prompt": f"{i} {marks[i % 4]}", "completion": f"ok {i}{marks[i % 4]}"} for i in range(1000)]
    made = prepare(section(written(tmp_path, rows), eval_fraction=0), encoder, 0)
    assert made.report.control_rows == 1000 == made.report.kept
    control = [id_ for id_, token in tokenizer_of("bytes", "chatml").added_tokens_decoder.items() if token.special]
    assert all(sum(int((e.input_ids == token).sum()) for token in control) == 4 for e in made.train)


def test_the_preview_shows_the_rows_as_they_are_trained(tmp_path, encoder):
    path = written(tmp_path, [*pairs(1), {"prompt": "Grüß 😀", "completion": "😀 é"}, '{"bad', {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}])  # fmt: skip
    made = {example.where: example for example in prepare(section(path, eval_fraction=0), encoder, 0).train}
    shown = preview(section(path), encoder, 9)
    assert [row["where"] for row in shown] == [f"{path}:{n}" for n in (1, 2, 4)]
    for row in shown:
        assert row["input_ids"] == made[row["where"]].input_ids.tolist()
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
        assert "".join(part["text"] for part in row["segments"]) == encoder.decode(row["input_ids"])
    trained = [[part["text"] for part in row["segments"] if part["trained"]] for row in shown]
    assert trained == [["Answer 0<|im_end|>"], ["😀 é<|im_end|>"], ["b<|im_end|>", "d<|im_end|>"]]
    assert len(preview(section(path), encoder, 2)) == 2
    json.dumps(shown)


def test_the_digest_follows_the_content(tmp_path, encoder):
    path = written(tmp_path, pairs(5))
    before = prepare(section(path), encoder, 0).report.sha256
    assert before == prepare(section(path), encoder, 1).report.sha256
    path.write_text(path.read_text().replace("Answer 3", "Answer 4"))
    assert before != prepare(section(path), encoder, 0).report.sha256


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_gsm8k_is_prepared_whole():
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(SHARED / "stories260K"))
    source = {"path": str(SHARED / "gsm8k" / "test.jsonl"), "max_samples": 300}
    report = prepare(Data.model_validate({"train": source, "max_length": 4096}), encoder, 0).report
    assert report.kept == 300 and not report.problems and report.end_trained == 1.0
