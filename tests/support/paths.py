"""Paths of the project's folders."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
BENCHMARKS = ROOT / "benchmarks"
DEMO_BASE = ROOT / "qlora" / "demo" / "base"
ATTACKS = TESTS / "security" / "attacks"
TEMPLATES = TESTS / "support" / "templates"
SHARED = ROOT.parent / "shared" / "data"  # larger models and data, where they exist
