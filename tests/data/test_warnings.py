"""What the gate and the literature have to say is said where it applies, and nowhere else."""

import json
from pathlib import Path

import pytest
from support.tokenizers import tokenizer_of

from qlora.data import Data
from qlora.data.conversations.encoder import Encoder
from qlora.data.data_report import DataReport
from qlora.data.prepare import prepare
from qlora.recipe.recipe import Recipe, from_mapping
from qlora.recipe.recommendations import recommendations
from qlora.utils.progress import ProgressReporter

LONG = "word " * 300
SETS = {  # rows, what is said of them
    "clean": ([(f"question {i}", f"answer {i}") for i in range(200)], ""),
    "few": ([(f"question {i}", f"answer {i}") for i in range(99)], "99 rows: will overfit"),
    "one answer": (
        [(f"question {i}", "yes" if i % 5 else f"no {i}") for i in range(200)],
        "80% of the rows have the very",
    ),
    "half an answer each": ([(f"question {i}", "yes" if i % 2 else "no") for i in range(200)], ""),
    "long prompts": ([(f"{i} {LONG}", str(i)) for i in range(200)], "of the tokens are trained: long prompts"),
    "cut": (
        [(f"question {i}", f"answer {i} {LONG * 20 if i < 30 else ''}") for i in range(200)],
        "15% of the rows are above",
    ),
    "hardly cut": ([(f"question {i}", f"answer {i} {LONG * 20 if i < 5 else ''}") for i in range(200)], ""),
}


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
@pytest.mark.parametrize("name", SETS)
def test_each_advice_is_given_where_it_applies_and_no_other(name, overlong, tmp_path):
    rows, said = SETS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in rows))
    section = Data.model_validate({"train": str(path), "max_length": 4096, "overlong": overlong})
    report = prepare(section, Encoder(tokenizer_of("bytes", "chatml")), 0).report
    told = [f.message for f in report.warnings if f.where == "data.train" and "trained end token" not in f.message]
    assert len(told) == bool(said) and all(said in message for message in told), told


def test_the_length_that_is_advised_holds_99_of_100_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "word " * i}) for i in range(1, 201)))
    encoder = Encoder(tokenizer_of("bytes", "chatml"))
    report = prepare(Data.model_validate({"train": str(path), "max_length": 64}), encoder, 0).report
    enough = int(next(f.message for f in report.warnings if "would hold" in f.message).split("; ")[1].split()[0])
    again = prepare(Data.model_validate({"train": str(path), "max_length": enough}), encoder, 0).report
    assert 0 < again.dropped.get("overlong", 0) <= 2


def recipe_of(**sections) -> Recipe:
    return from_mapping({"model": "a/b", "data": {"train": "x.jsonl"}, **sections})[0]


def report_of(**counts) -> DataReport:
    known = {
        "rows": 1000,
        "kept": 1000,
        "tokens": 90_000,
        "trained_tokens": 40_000,
        "packed_rows": 800,
        "eval_rows": 20,
    }
    return DataReport(**{"dropped": {}, "problems": [], "warnings": [], "sha256": "", "notes": [], **known, **counts})


RECIPES = [  # sections, counts, steps, keys that are spoken of
    ({}, {}, 50, []),
    ({}, {"packed_rows": 60}, 4, ["train.global_batch"]),
    ({"train": {"max_steps": 4}}, {}, 4, []),
    ({"train": {"epochs": 9}}, {}, 450, ["train.epochs"]),
    ({"train": {"epochs": 9, "early_stop": 2, "eval_every": 10}}, {}, 450, []),
    ({"train": {"max_steps": 450}}, {}, 450, ["train.epochs"]),
    ({}, {"eval_rows": 0}, 50, ["data.eval_fraction"]),
    ({"optim": {"learning_rate": 1e-5}}, {}, 50, ["optim.learning_rate"]),
    ({"adapter": {"targets": ["q_proj", "v_proj"]}}, {}, 50, ["adapter.targets"]),
    ({"adapter": {"targets": ["q_proj", "up_proj"]}}, {}, 50, []),
    ({}, {"trained_tokens": 2_000_001}, 50, ["adapter.rank"]),
    ({"adapter": {"kind": "full"}, "quant": {"kind": "dense"}, "optim": {"learning_rate": 1e-5}}, {}, 50, []),
]


@pytest.mark.parametrize(("sections", "counts", "steps", "keys"), RECIPES)
def test_the_literature_is_cited_where_it_applies(sections, counts, steps, keys):
    found = list(recommendations(recipe_of(**sections), report_of(**counts), steps, 1_000_000))
    assert [key for key, _ in found] == keys, found


def test_rates_are_told_ever_more_rarely_and_not_at_once(monkeypatch):
    clock, lines = [0.0], list[str]()
    monkeypatch.setattr("qlora.utils.progress.time.monotonic", lambda: clock[0])
    told = ProgressReporter(lines.append, "data")
    for second in range(1, 3601):
        clock[0] = float(second)
        told(second * 1000)
    assert lines[0] == "data: 5,000 rows done, 1,000 rows/s" and 30 < len(lines) < 80


def test_a_preview_in_a_pipe_marks_what_is_trained(tmp_path, zoo):
    from support.command_line import qlora

    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}')
    (tmp_path / "r.yaml").write_text(f"model: {zoo('llama')}\ndata: {{train: {tmp_path}/rows.jsonl}}\n")
    said = qlora("preview", tmp_path / "r.yaml")
    assert said.code == 0 and "[[Ho<|im_end|>]]" in said.err and "[[Hi" not in said.err
    Path(tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": ""}')
    assert "no usable row" in qlora("preview", tmp_path / "r.yaml").err
    checked = qlora("check", tmp_path / "r.yaml")
    assert checked.code == 2 and f"{tmp_path}/rows.jsonl:1: dropped, empty answer" in checked.err
