"""Warnings about the data and recommendations of the literature appear where they apply, and nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tokenizers import make_tokenizer

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.recipe.literature import SuggestedRate
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.recipe.recommendations import recommend_settings
from qlora.utils.progress import ProgressReporter

LONG = "word " * 100
DATA_SETS = {  # pairs of prompt and completion, and the expected warning
    "clean": ([(f"question {i}", f"answer {i}") for i in range(200)], ""),
    "few": ([(f"question {i}", f"answer {i}") for i in range(99)], "99 records: will overfit"),
    "same answer": (
        [(f"question {i}", "yes" if i % 5 else f"no {i}") for i in range(200)],
        "80% of the records have the same answer",
    ),
    "two answers": ([(f"question {i}", "yes" if i % 2 else "no") for i in range(200)], ""),
    "long prompts": ([(f"{i} {LONG}", str(i)) for i in range(200)], "of the tokens are trained: long prompts"),
    "overlong": (
        [(f"question {i}", f"answer {i} {LONG * 9 if i < 30 else ''}") for i in range(200)],
        "15% of the records are above",
    ),
    "hardly overlong": ([(f"question {i}", f"answer {i} {LONG * 9 if i < 5 else ''}") for i in range(200)], ""),
}


@pytest.mark.sample(of=2, every=("name",))
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("name", DATA_SETS)
def test_each_warning_appears_where_it_applies(name: str, overlong: str, tmp_path: Path) -> None:
    pairs, expected = DATA_SETS[name]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in pairs))
    section = Data.model_validate({"train": str(path), "max_length": 4096, "overlong": overlong})
    report = prepare(section, Encoder(make_tokenizer("bytes", "chatml")), 0).report
    about_all = [f.message for f in report.warnings if f.where == "data.train"]
    messages = [message for message in about_all if "trained end token" not in message]
    assert len(messages) == bool(expected) and all(expected in message for message in messages), messages


def test_the_recommended_max_length_holds_99_of_100_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": "word " * i}) for i in range(1, 201)))
    encoder = Encoder(make_tokenizer("bytes", "chatml"))
    settings = {"train": str(path), "overlong": "drop"}
    report = prepare(Data.model_validate({**settings, "max_length": 64}), encoder, 0).report
    enough = int(next(f.message for f in report.warnings if "would hold" in f.message).split("; ")[1].split()[0])
    again = prepare(Data.model_validate({**settings, "max_length": enough}), encoder, 0).report
    assert 0 < again.dropped.get("overlong", 0) <= 2


def make_recipe(**sections: object) -> Recipe:
    return from_mapping({"model": "a/b", "data": {"train": "x.jsonl"}, **sections})[0]


def make_report(**counts: int) -> DataReport:
    defaults = {
        "rows": 1000,
        "kept": 1000,
        "tokens": 90_000,
        "trained_tokens": 40_000,
        "packed_rows": 800,
        "eval_rows": 20,
    }
    return DataReport(
        **{"dropped": {}, "problems": [], "warnings": [], "sha256": "", "notes": [], **defaults, **counts}
    )


SUGGESTED = SuggestedRate(3e-4, "a paper")
RECIPES = [  # sections, counts, steps, keys of the recommendations
    ({}, {}, 50, []),
    ({}, {"packed_rows": 60}, 4, ["train.global_batch"]),
    ({"train": {"max_steps": 4}}, {}, 4, []),
    ({"train": {"epochs": 9}}, {}, 450, ["train.epochs"]),
    ({"train": {"epochs": 9, "early_stop": 2, "eval_every": 10}}, {}, 450, []),
    ({"train": {"max_steps": 450}}, {}, 450, ["train.epochs"]),
    ({"data": {"train": "x.jsonl", "eval_fraction": 0}}, {"eval_rows": 0}, 50, ["data.eval_fraction"]),
    ({"optim": {"learning_rate": 1e-5}}, {}, 50, ["optim.learning_rate"]),
    ({"optim": {"learning_rate": 5e-3}}, {}, 50, ["optim.learning_rate"]),
    ({"train": {"global_batch": 64}}, {}, 50, ["train.global_batch"]),
    ({"train": {"epochs": 4}}, {"kept": 999}, 200, ["train.epochs"]),
    ({"train": {"epochs": 4}}, {}, 200, []),
    ({"adapter": {"dropout": 0.1}}, {}, 50, ["adapter.dropout"]),
    ({"adapter": {"dropout": 0.1}}, {"kept": 500}, 50, []),
    ({"adapter": {"targets": ["q_proj", "v_proj"]}}, {}, 50, ["adapter.targets"]),
    ({"adapter": {"targets": ["q_proj", "up_proj"]}}, {}, 50, []),
    ({}, {"trained_tokens": 2_000_001}, 50, ["adapter.rank"]),
    ({"adapter": {"kind": "full"}, "quant": {"kind": "dense"}, "optim": {"learning_rate": 1e-5}}, {}, 50, []),
]


@pytest.mark.parametrize(("sections", "counts", "steps", "keys"), RECIPES)
def test_a_recommendation_appears_where_it_applies(sections: dict, counts: dict, steps: int, keys: list[str]) -> None:
    result = list(recommend_settings(make_recipe(**sections), make_report(**counts), steps, 1_000_000, SUGGESTED))
    assert [key for key, _ in result] == keys, result


def test_progress_is_reported_ever_more_rarely_and_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [0.0], list[str]()
    monkeypatch.setattr("qlora.utils.progress.time.monotonic", lambda: clock[0])
    report = ProgressReporter(lines.append, "data")
    for second in range(1, 3601):
        clock[0] = float(second)
        report(second * 1000)
    assert lines[0] == "data: 5,000 records done, 1,000 records/s" and 30 < len(lines) < 80


def test_a_preview_in_a_pipe_marks_the_trained_text(tmp_path: Path, zoo: Callable) -> None:
    from support.command_line import qlora

    (tmp_path / "records.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}')
    (tmp_path / "r.yaml").write_text(f"model: {zoo('llama')}\ndata: {{train: {tmp_path}/records.jsonl}}\n")
    shown = qlora("preview", tmp_path / "r.yaml")
    assert shown.code == 0 and "[[Ho<|im_end|>]]" in shown.err and "[[Hi" not in shown.err
    Path(tmp_path / "records.jsonl").write_text('{"prompt": "Hi", "completion": ""}')
    assert "no record can be trained on" in qlora("preview", tmp_path / "r.yaml").err
    checked = qlora("check", tmp_path / "r.yaml")
    assert checked.code == 2 and f"{tmp_path}/records.jsonl:1: dropped, empty answer" in checked.err
