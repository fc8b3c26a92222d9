"""docs/beyond.md says what the planner says: its tables are those that benchmarks/beyond.py draws today."""

import sys

from support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import beyond


def test_the_page_is_drawn_by_the_planner() -> None:
    text = beyond.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text for name in beyond.TABLES)
    assert beyond.drawn(text) == text
    assert "redicted" in text


def test_twice_the_link_needs_about_half_the_tokens() -> None:
    slow, fast = (beyond.free_from(beyond.DeviceSpeed(1e14, link)) for link in (12.5e9, 25e9))
    assert abs(slow - 2 * fast) <= 0.1 * slow  # attention's share grows with the tokens
