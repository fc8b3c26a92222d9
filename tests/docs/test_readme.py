"""The README's tables and plot are those that benchmarks/ draws from its results."""

import json
import sys

from support.paths import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS))

import plot_readme
import tables_readme


def test_the_tables_are_drawn_from_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in tables_readme.TABLES:
        assert f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text
    assert tables_readme.redraw(text) == text


def test_the_plot_is_drawn_from_a_run() -> None:
    run = json.loads(plot_readme.RESULT.read_text(encoding="utf-8"))
    assert plot_readme.PLOT.read_text(encoding="utf-8") == plot_readme.draw(run)
    assert "docs/run.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
