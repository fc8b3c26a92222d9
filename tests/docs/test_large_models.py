"""docs/large-models.md: its tables are those that benchmarks/large_models.py draws from today's planner."""

import sys

from support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import large_models


def test_the_tables_are_drawn_from_the_planner() -> None:
    text = large_models.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text for name in large_models.TABLES)
    assert large_models.redraw(text) == text
    assert "redicted" in text


def test_twice_the_link_needs_about_half_the_tokens() -> None:
    slow, fast = (large_models.free_from(large_models.DeviceSpeed(1e14, link)) for link in (12.5e9, 25e9))
    assert abs(slow - 2 * fast) <= 0.1 * slow  # the fraction of attention grows with the tokens
