"""The README says what was measured: its tables are those that benchmarks/tables.py draws from the results."""

import json
import sys

from support.paths import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS))

import tables


def test_the_tables_are_drawn_from_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text
    assert tables.drawn(text) == text


def test_the_picture_is_drawn_from_a_run() -> None:
    import picture  # beside tables.py

    found = json.loads(picture.RESULT.read_text(encoding="utf-8"))
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.drawn(found)
    assert "docs/run.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
