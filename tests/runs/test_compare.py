"""A page of one run or several: it says what differs, and asks nothing of any network."""

import json
import re

import pytest
from support.command_line import qlora


@pytest.fixture
def runs(tmp_path):
    for rank in (8, 32):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        lines = [{"event": "train", "step": step, "loss": 3 - step * rank / 1000, "learning_rate": 1e-4}
                 for step in range(1, 41)]  # fmt: skip
        sample = {"prompt": "2 + 2?", "reference": "4", "before": "5", "after": f"4 <b>by {rank}</b>"}
        lines += [{"event": "eval", "step": step, "eval_loss": 3 - step * rank / 1200} for step in (0, 20, 40)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(
            json.dumps({"result": {"steps": 40, "loss": 3 - rank / 25}, "seconds": 9.0, "samples": [sample]})
        )
        (folder / "recipe.yaml").write_text(f"model:\n  name: https://a.b/<img src=x>\nadapter:\n  rank: {rank}\n")
    return tmp_path / "rank8", tmp_path / "rank32"


def test_two_runs_are_compared_on_one_page_that_asks_for_nothing(runs, tmp_path):
    out = tmp_path / "both.html"
    assert qlora("report", *runs, "--out", out).code == 0
    page = out.read_text()
    assert "2 runs compared" in page and "Settings that differ" in page and "adapter.rank" in page
    assert page.count("smooth c0") and page.count("smooth c1")
    assert '<th scope="col">rank8</th>' in page and '<th scope="col">rank32</th>' in page
    assert not re.search(r"""<[^>]*\s(?:src|href|srcset)\s*=|url\(|@import|<script|<link|<iframe|<img""", page)
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_one_run_is_drawn_into_its_own_folder(runs):
    assert qlora("report", runs[0]).code == 0
    page = (runs[0] / "report.html").read_text()
    assert "rank8" in page and "4 &lt;b&gt;by 8" in page  # the samples are not lost when it is drawn anew


def test_a_run_that_goes_on_has_a_page_too(runs):
    (runs[0] / "run.json").unlink()
    assert qlora("report", runs[0]).code == 0


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    other = tmp_path / "again" / "rank8"
    other.parent.mkdir()
    runs[0].rename(other)
    (tmp_path / "rank8").mkdir()
    (tmp_path / "rank8" / "metrics.jsonl").write_text((other / "metrics.jsonl").read_text())
    assert qlora("report", other, tmp_path / "rank8", "--out", tmp_path / "x.html").code == 0
    assert "again/rank8" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("wrong", ["nothing", "twice", "damaged"])
def test_what_is_no_run_is_one_line_and_exit_code_2(wrong, runs, tmp_path):
    if wrong == "damaged":
        (runs[0] / "run.json").write_text("{")
    named = {"nothing": [tmp_path / "none"], "twice": [runs[0], runs[0]], "damaged": [runs[0]]}[wrong]
    said = qlora("report", *named, "--out", tmp_path / "x.html")
    assert said.code == 2 and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert not (tmp_path / "x.html").exists()
