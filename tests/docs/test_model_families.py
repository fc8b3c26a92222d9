"""The page of model families lists the families that the laws run over."""

import re

import pytest
from support.architecture_table import RECURRENT
from support.expert_families import EXPERT_FAMILIES
from support.paths import ROOT
from support.wrapper_families import WRAPPER_FAMILIES

FAMILIES = {"experts": EXPERT_FAMILIES, "wrappers": WRAPPER_FAMILIES, "hybrids": RECURRENT}


@pytest.mark.parametrize("mark", FAMILIES)
def test_the_page_lists_the_tested_families(mark: str) -> None:
    text = (ROOT / "docs" / "model-families.md").read_text()
    listed = re.search(rf"<!-- {mark} -->(.*?)<!-- /{mark} -->", text, re.DOTALL)
    assert listed and re.findall(r"`(\w+)`", listed.group(1)) == sorted(FAMILIES[mark])


def test_the_readme_counts_them() -> None:
    assert f"[{len(EXPERT_FAMILIES)} families](docs/model-families.md)" in (ROOT / "README.md").read_text()
