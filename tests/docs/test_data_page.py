"""docs/data.md names every format, loss key and setting that it is about."""

from typing import get_args

import pytest
from support.paths import ROOT

from qlora.data import FORMATS, Data
from qlora.data.reading import loss_keys

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
SETTINGS = [
    *get_args(Data.model_fields["overlong"].annotation),
    *FORMATS,
    *loss_keys.MESSAGE_KEYS,
    *loss_keys.RECORD_KEYS,
]


@pytest.mark.parametrize("word", SETTINGS)
def test_the_page_names_each_word(word: str) -> None:
    assert f"`{word}`" in PAGE or f"`{word}:" in PAGE


def test_each_tool_of_the_table_is_named_where_its_key_is_defined() -> None:
    code = (ROOT / "qlora/data/reading/loss_keys.py").read_text(encoding="utf-8")
    table = PAGE.split("| key of a message | tools |")[1].split("\n\n")[0]
    tools = {tool.strip() for line in table.splitlines()[2:] for tool in line.split("|")[2].split(",")}
    assert {tool for tool in tools if tool not in code} == set()
