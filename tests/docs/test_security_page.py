"""SECURITY.md promises the limits that the code sets: each figure on the page is drawn from its constant."""

import re

import pytest
from support.paths import ROOT

from qlora.data.conversations.record_limits import RECORD_LIMITS
from qlora.data.conversations.template_probe import PROBE_LIMITS
from qlora.utils.atomic_files import MAX_JSON_BYTES
from qlora.utils.machine import GIB, MIB
from qlora.utils.sandbox import PATTERN_LIMITS, Limits

PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def words_of(limits: Limits) -> str:
    return f"{limits.seconds:g} s of processor time and {limits.memory_bytes / GIB:g} GiB of memory"


FIGURES = {
    "probe": words_of(PROBE_LIMITS),
    "record": words_of(RECORD_LIMITS),
    "pattern": words_of(PATTERN_LIMITS),
    "json": f"{MAX_JSON_BYTES // MIB} MiB",
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_promised_limit_is_the_one_in_the_code(name: str) -> None:
    (text,) = re.findall(rf"<!-- {name} -->(.*?)<!-- /{name} -->", PAGE, flags=re.DOTALL)
    assert " ".join(text.split()) == FIGURES[name]
