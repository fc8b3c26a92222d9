"""docs/base-check.md states the limits and the number of classes that code and tests hold."""

import json
import re

from support.architecture_table import PACKED, REFUSED, UNPACKED
from support.paths import ROOT

from qlora.training.base_check import LIMITS, UNFORCED_LIMITS
from qlora.training.base_trace import SEQUENCES, TOKENS

PAGE = " ".join((ROOT / "docs/base-check.md").read_text(encoding="utf-8").split())


def test_the_limits_are_those_of_the_code() -> None:
    for dtype, limit in LIMITS.items():
        assert f"| {str(dtype).removeprefix('torch.')} | {limit} | {UNFORCED_LIMITS[dtype]} |" in PAGE
    assert f"{SEQUENCES} sequences of {TOKENS} tokens" in PAGE


def test_the_numbers_of_classes_are_those_of_the_table() -> None:
    (numbers,) = re.findall(r"(\d+) train with the logits and the loss of transformers, (\d+) are refused", PAGE)
    assert numbers == (str(len(PACKED) + len(UNPACKED)), str(len(REFUSED)))


def test_the_cost_is_the_measured_one() -> None:
    result = json.loads((ROOT / "benchmarks/results/base_check.json").read_text(encoding="utf-8"))
    assert f"takes {1000 * result['median_seconds']:.0f} ms" in PAGE
