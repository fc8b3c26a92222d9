"""`qlora report`: a page of one run or several, with the settings that differ, and without any request."""

import json
import re
from pathlib import Path

import pytest
from support.command_line import qlora

from qlora.runs.report.html_tables import flat_settings

Folders = tuple[Path, Path]


@pytest.fixture
def runs(tmp_path: Path) -> Folders:
    """Two run folders, of rank 8 and rank 32."""
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


def test_two_runs_are_compared_on_one_page_without_requests(runs: Folders, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert qlora("report", *runs, "--out", out).code == 0
    page = out.read_text()
    assert "2 runs compared" in page and "Settings that differ" in page and "adapter.rank" in page
    assert page.count("smooth c0") and page.count("smooth c1")
    assert '<th scope="col">rank8</th>' in page and '<th scope="col">rank32</th>' in page
    assert not re.search(r"""<[^>]*\s(?:src|href|srcset)\s*=|url\(|@import|<script|<link|<iframe|<img""", page)
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page


def test_settings_are_flat_and_read_as_yaml() -> None:
    text = 'data:\n  train:\n  - path: "a: b"\n    max_samples: 5\n  format: auto  # any\noptim: {betas: [0.9, 0.99]}\n'
    assert flat_settings(text) == {
        "data.train.0.path": "a: b",
        "data.train.0.max_samples": "5",
        "data.format": "auto",
        "optim.betas": "[0.9, 0.99]",
    }
    assert flat_settings("adapter: {rank: [") == {} and flat_settings("") == {}


def test_one_run_is_drawn_into_its_own_folder(runs: Folders) -> None:
    assert qlora("report", runs[0]).code == 0
    page = (runs[0] / "report.html").read_text()
    assert "rank8" in page and "4 &lt;b&gt;by 8" in page  # the samples are kept when the page is drawn again


def test_a_run_in_progress_has_a_page_too(runs: Folders) -> None:
    (runs[0] / "run.json").unlink()
    assert qlora("report", runs[0]).code == 0


def test_runs_of_one_name_are_distinguished_by_their_paths(runs: Folders, tmp_path: Path) -> None:
    other = tmp_path / "again" / "rank8"
    other.parent.mkdir()
    runs[0].rename(other)
    (tmp_path / "rank8").mkdir()
    (tmp_path / "rank8" / "metrics.jsonl").write_text((other / "metrics.jsonl").read_text())
    assert qlora("report", other, tmp_path / "rank8", "--out", tmp_path / "x.html").code == 0
    assert "again/rank8" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("case", ["missing", "twice", "damaged"])
def test_what_is_not_a_run_is_one_line_and_exit_code_2(case: str, runs: Folders, tmp_path: Path) -> None:
    if case == "damaged":
        (runs[0] / "run.json").write_text("{")
    folders = {"missing": [tmp_path / "none"], "twice": [runs[0], runs[0]], "damaged": [runs[0]]}[case]
    result = qlora("report", *folders, "--out", tmp_path / "x.html")
    assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert not (tmp_path / "x.html").exists()
